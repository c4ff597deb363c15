package integration

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/pgadvisory/advisory"
)

// Who waits for the lock that he holds waits for ever.
func TestTakingAHeldKeyAgainIsAnErrorAtOnce(t *testing.T) {
	t.Parallel()
	eachDriver(t, func(t *testing.T, d driver) {
		db := d.open(t, server.DSN())
		for _, outer := range openers { // they give out a ctx
			for _, inner := range ways {
				ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
				defer cancel()
				key, ran := testKey(t), false
				again := func(ctx context.Context) error {
					return inner.with(ctx, db, key, func(context.Context, querier) error { ran = true; return nil })
				}
				err := outer.with(ctx, db, key, func(ctx context.Context, _ querier) error { return again(ctx) })
				if !errors.Is(err, advisory.ErrReentrant) || ran {
					t.Fatalf("%s in %s: error is %v, want ErrReentrant (ran: %t)", inner.name, outer.name, err, ran)
				}
				// However deep, and whatever is taken between.
				err = outer.with(ctx, db, key, func(ctx context.Context, _ querier) error {
					return advisory.WithLock(ctx, db, advisory.Name("between "+t.Name()), again)
				})
				if !errors.Is(err, advisory.ErrReentrant) || ran {
					t.Fatalf("%s deep in %s: error is %v, want ErrReentrant (ran: %t)", inner.name, outer.name, err, ran)
				}
			}
		}
		wantGranted(t, db, testKey(t))
		wantClean(t, db)
	})
}

func TestDifferentKeysNest(t *testing.T) {
	t.Parallel()
	eachDriver(t, func(t *testing.T, d driver) {
		db := d.open(t, server.DSN())
		key := testKey(t)
		nest := noWork
		for i, w := range append(ways, ways...) {
			next, key := nest, advisory.Name(key.String()+string(rune('a'+i)))
			nest = func(ctx context.Context, _ querier) error { return w.with(ctx, db, key, next) }
		}
		if err := nest(soon(t), db); err != nil {
			t.Error(err)
		}
		wantClean(t, db)
	})
}

// The mark goes with the lock: what it forbade is allowed when the lock is released.
func TestReleasedKeyMayBeTakenAgain(t *testing.T) {
	t.Parallel()
	eachDriver(t, func(t *testing.T, d driver) {
		db, key := d.open(t, server.DSN()), testKey(t)
		lock, err := advisory.Acquire(t.Context(), db, key)
		if err != nil {
			t.Fatal(err)
		}
		ctx := context.WithoutCancel(lock.Context())
		if err := withLock.with(ctx, db, key, noWork, advisory.Timeout(5*time.Second)); !errors.Is(err, advisory.ErrReentrant) {
			t.Errorf("error is %v, want ErrReentrant", err)
		}
		if err := lock.Release(); err != nil {
			t.Error(err)
		}
		if err := withLock.with(ctx, db, key, noWork); err != nil {
			t.Error(err)
		}
	})
}
