package integration

import (
	"context"
	"database/sql"
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/pgadvisory/advisory"
)

// "Another does the work" is ErrHeld, and "this process shuts down" is the error of ctx.
func TestHeldAndShuttingDownDiffer(t *testing.T) {
	t.Parallel()
	bothDrivers(t, func(t *testing.T, d driver) {
		t.Parallel()
		eachWay(t, ways, func(t *testing.T, w way) {
			db, key := d.open(t, server.DSN()), testKey(t)
			release := hold(t, adminDB(t), key)
			for name, opt := range map[string]advisory.Option{"NoWait": advisory.NoWait(), "Timeout": advisory.Timeout(time.Second)} {
				err := w.with(t.Context(), db, key, noWork, opt)
				var e *advisory.Error
				switch {
				case !errors.Is(err, advisory.ErrHeld), !errors.Is(err, advisory.ErrNotAcquired), !errors.As(err, &e):
					t.Errorf("%s: error is %v, want ErrHeld", name, err)
				case e.Op != "acquire" || !slices.Contains(e.Keys, key):
					t.Errorf("%s: the error is of %s %v", name, e.Op, e.Keys)
				case !strings.HasPrefix(err.Error(), "advisory: acquire "+t.Name()), !strings.HasSuffix(err.Error(), "]"):
					t.Errorf("%s: the name is not first, or the number not last: %v", name, err)
				}
			}
			ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
			defer cancel()
			err := w.with(ctx, db, key, noWork)
			if errors.Is(err, advisory.ErrHeld) || !errors.Is(err, advisory.ErrNotAcquired) || !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("error is %v, want ctx's and ErrNotAcquired, and not ErrHeld", err)
			}
			release()
			if err := w.with(soon(t), db, key, noWork); err != nil {
				t.Error(err)
			}
			wantClean(t, db)
		})
	})
}

func TestNestedLocksTellWhichWasRefused(t *testing.T) {
	t.Parallel()
	bothDrivers(t, func(t *testing.T, d driver) {
		t.Parallel()
		db := d.open(t, server.DSN())
		outer, inner := advisory.Name("outer "+t.Name()), advisory.Name("inner "+t.Name())
		hold(t, adminDB(t), inner)
		for _, out := range closures {
			for _, in := range closures {
				var refused error
				err := out.with(t.Context(), db, outer, func(ctx context.Context, _ querier) error {
					refused = in.with(ctx, db, inner, noWork, advisory.NoWait())
					return refused
				})
				var e *advisory.Error
				if err != refused || !errors.Is(err, advisory.ErrHeld) || !errors.As(err, &e) || !slices.Contains(e.Keys, inner) {
					t.Errorf("%s in %s: error is %v, want that of the inner one", in.name, out.name, err)
				}
			}
		}
	})
}

// The lock has the only connection of the pool.
func TestAPoolOfOneConnection(t *testing.T) {
	t.Parallel()
	const says = "fn cannot get a connection while the lock is held"
	bothDrivers(t, func(t *testing.T, d driver) {
		t.Parallel()
		db, key, log := d.open(t, server.DSN()), testKey(t), newLogbook()
		db.SetMaxOpenConns(1)
		withLock := func(fn func(context.Context) error) error {
			return advisory.WithLock(t.Context(), db, key, fn, log.option())
		}
		err := withLock(func(ctx context.Context) error {
			ctx, cancel := context.WithTimeout(ctx, 200*time.Millisecond)
			defer cancel()
			_, err := db.ExecContext(ctx, "SELECT")
			return err
		})
		if !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), says) {
			t.Errorf("error is %v, want one that says %q", err, says)
		}
		err = withLock(func(ctx context.Context) error {
			return advisory.WithTxLock(ctx, db, second(key), func(context.Context, *sql.Tx) error { return nil },
				advisory.Timeout(200*time.Millisecond))
		})
		if !errors.Is(err, advisory.ErrNotAcquired) || errors.Is(err, advisory.ErrHeld) || !strings.Contains(err.Error(), "the pool's only connection carries locks") {
			t.Errorf("error is %v", err)
		}
		if err := withLock(func(context.Context) error { return nil }); err != nil {
			t.Error(err)
		}
		if n := len(log.times(says)); n != 1 {
			t.Errorf("the Logger was warned %d times, want once", n)
		}
		wantClean(t, db)
	})
}
