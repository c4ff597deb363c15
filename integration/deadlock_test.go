package integration

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/pgadvisory/advisory"
)

// crossed has two callers take two locks in opposite orders, and returns the errors of the inner ones.
func crossed(t *testing.T, outer, inner way, dbs [2]*sql.DB, keys [2]advisory.Key) (errs [2]error) {
	t.Helper()
	ctx := soon(t)
	var in [2]chan struct{}
	for i := range in {
		in[i] = make(chan struct{})
	}
	_ = concurrently(2, 1, func(i int) error {
		err := outer.with(ctx, dbs[i], keys[i], func(ctx context.Context, _ querier) error {
			close(in[i])
			<-in[1-i]
			errs[i] = inner.with(ctx, dbs[i], keys[1-i], noWork)
			return nil
		})
		if err != nil {
			t.Errorf("%s %d: %v", outer.name, i, err)
		}
		return nil
	})
	return errs
}

// wantDeadlock checks that one has been told, and the other got its lock.
func wantDeadlock(t *testing.T, errs [2]error, says ...string) {
	t.Helper()
	if errs[1] == nil {
		slices.Reverse(errs[:])
	}
	if errs[0] != nil || !errors.Is(errs[1], advisory.ErrDeadlock) || errors.Is(errs[1], advisory.ErrNotAcquired) {
		t.Errorf("errors %v, want ErrDeadlock for one", errs)
		return
	}
	for _, s := range says {
		if !strings.Contains(errs[1].Error(), s) {
			t.Errorf("error %q does not say %q", errs[1], s)
		}
	}
}

func TestDeadlocksInAProcessAreFoundAtOnce(t *testing.T) {
	t.Parallel()
	eachDriver(t, func(t *testing.T, d driver) {
		t.Parallel()
		db := d.open(t, server.DSN())
		db.SetMaxIdleConns(8)
		for _, outer := range openers {
			for _, inner := range ways {
				name := fmt.Sprintf("%s in %s", inner.name, outer.name)
				keys := [2]advisory.Key{advisory.Name("a " + name + d.name), advisory.Name("b " + name + d.name)}
				errs := crossed(t, outer, inner, [2]*sql.DB{db, db}, keys)
				wantDeadlock(t, errs, "deadlock: this caller holds", "which this process holds while it waits for")
			}
		}
		wantClean(t, db)
	})
}

func TestDeadlocksBetweenProcessesAreFound(t *testing.T) {
	t.Parallel()
	bothDrivers(t, func(t *testing.T, d driver) {
		t.Parallel()
		var g errgroup.Group
		g.SetLimit(6)
		for _, outer := range queuers {
			for _, inner := range queuers {
				if outer.name == acquireConn.name {
					continue // whose ctx carries nothing
				}
				g.Go(func() error {
					name := fmt.Sprintf("%s in %s %s", inner.name, outer.name, d.name)
					app := appName(t)
					dsn := withParams(t, server.DSN(), "application_name", app)
					dbs := [2]*sql.DB{d.open(t, dsn), d.open(t, dsn)}
					began := time.Now()
					errs := crossed(t, outer, inner, dbs, [2]advisory.Key{advisory.Name("a " + name), advisory.Name("b " + name)})
					wantDeadlock(t, errs, "deadlock: this caller holds", "which pid ", app)
					if took := time.Since(began); took > 8*time.Second {
						t.Errorf("%s: found after %v", name, took)
					}
					for _, db := range dbs {
						wantClean(t, db)
						_ = db.Close()
					}
					return nil
				})
			}
		}
		_ = g.Wait()
	})
}

// The question for the waits of others leaves nothing prepared on the session that waits.
func TestTheSearchForDeadlocksLeavesNothingPrepared(t *testing.T) {
	t.Parallel()
	bothDrivers(t, func(t *testing.T, d driver) {
		t.Parallel()
		db, other := d.open(t, server.DSN()), d.open(t, server.DSN())
		key := testKey(t)
		conn, err := db.Conn(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		before := countPrepared(t, conn, "statement LIKE '%pg_stat_activity%'")
		err = advisory.WithLock(t.Context(), other, key, func(context.Context) error {
			return advisory.WithLock(t.Context(), db, advisory.Name(t.Name()+" of the caller"), func(ctx context.Context) error {
				err := advisory.AcquireConn(ctx, conn, key, advisory.Timeout(2500*time.Millisecond)) // two questions
				if !errors.Is(err, advisory.ErrHeld) {
					return fmt.Errorf("%w, want ErrHeld", err)
				}
				return nil
			})
		})
		if err != nil {
			t.Error(err)
		}
		if after := countPrepared(t, conn, "statement LIKE '%pg_stat_activity%'"); before != 0 || after != 0 {
			t.Errorf("%d statements are prepared, %d were", after, before)
		}
	})
}

// A wait that tries again and again, because its pool has no connection to spare, is not seen by others. It
// ends itself, though it is the older one.
func TestADeadlockWithAnOlderWaitThatIsNotSeen(t *testing.T) {
	t.Parallel()
	bothDrivers(t, func(t *testing.T, d driver) {
		t.Parallel()
		small, other := d.open(t, server.DSN()), d.open(t, server.DSN())
		small.SetMaxOpenConns(3)
		a, b := advisory.Name("a "+t.Name()), advisory.Name("b "+t.Name())
		ctx, holds, waits := soon(t), make(chan struct{}), make(chan struct{})
		var unseen, seen error
		err := concurrently(2, 1, func(i int) error {
			if i == 0 {
				return advisory.WithLock(ctx, small, a, func(ctx context.Context) error {
					<-holds
					close(waits)
					unseen = withLock.with(ctx, small, b, noWork)
					return nil
				})
			}
			return advisory.WithLock(ctx, other, b, func(ctx context.Context) error {
				close(holds)
				<-waits
				time.Sleep(300 * time.Millisecond) // nothing shows when the other waits
				seen = withLock.with(ctx, other, a, noWork)
				return nil
			})
		})
		if err != nil || !errors.Is(unseen, advisory.ErrDeadlock) || seen != nil {
			t.Errorf("%v; the older wait: %v; the other: %v", err, unseen, seen)
		}
	})
}

// A pool that is dry finds deadlocks, too: the session that waits asks between two slices.
func TestDeadlocksAreFoundByPoolsThatAreDry(t *testing.T) {
	t.Parallel()
	bothDrivers(t, func(t *testing.T, d driver) {
		t.Parallel()
		dbs := [2]*sql.DB{d.openLimited(t, 2), d.openLimited(t, 2)}
		keys := [2]advisory.Key{advisory.Name("a " + t.Name()), advisory.Name("b " + t.Name())}
		wantDeadlock(t, crossed(t, withConnLock, withConnLock, dbs, keys), "which pid ")
	})
}

// A third process is part of the cycle by waits that are stuck behind others': its caller waits in the
// queue of its process for a lock whose holder waits elsewhere.
func TestDeadlocksThroughTheQueueOfAProcess(t *testing.T) {
	t.Parallel()
	bothDrivers(t, func(t *testing.T, d driver) {
		t.Parallel()
		one, other := d.open(t, server.DSN()), d.open(t, server.DSN())
		key := func(s string) advisory.Key { return advisory.Name(s + t.Name()) }
		x, b, y := key("x"), key("b"), key("y")
		ctx := soon(t)
		held := make(chan struct{}, 3)
		hold := func(db *sql.DB, outer, inner advisory.Key, after time.Duration) error {
			var got error
			err := advisory.WithLock(ctx, db, outer, func(ctx context.Context) error {
				held <- struct{}{}
				time.Sleep(after)
				got = advisory.WithLock(ctx, db, inner, func(context.Context) error { return nil })
				return nil
			})
			return errors.Join(err, got)
		}
		errs := make([]error, 3)
		_ = concurrently(3, 1, func(i int) error {
			switch i {
			case 0: // holds b and waits for y, which the other process holds
				errs[i] = hold(one, b, y, 300*time.Millisecond)
			case 1: // holds x and waits for b, in the process's queue
				errs[i] = hold(one, x, b, 400*time.Millisecond)
			case 2: // holds y and waits for x
				errs[i] = hold(other, y, x, 500*time.Millisecond)
			}
			return nil
		})
		told := slices.DeleteFunc(slices.Clone(errs), func(err error) bool { return err == nil })
		if len(told) != 1 || !errors.Is(told[0], advisory.ErrDeadlock) {
			t.Errorf("errors %v, want one ErrDeadlock", errs)
		}
	})
}

// A wait that holds nothing asks nobody. One that holds something asks once a second, after the first.
func TestWhatFindingDeadlocksCosts(t *testing.T) {
	t.Parallel()
	eachDriver(t, func(t *testing.T, d driver) {
		t.Parallel()
		if d.name != "pq" && d.name != "pgx_simple" {
			t.Skip("a question that is prepared is sent without its text")
		}
		const lasts = 4500 * time.Millisecond
		for _, holds := range []bool{false, true} {
			sent := newWire(t)
			db, key, outer := d.open(t, sent.dsn), testKey(t), advisory.Name(fmt.Sprint("outer ", t.Name(), holds))
			release := holdAll(t, d.open(t, server.DSN()), []advisory.Key{key})
			wait := func(ctx context.Context) error {
				ctx, cancel := context.WithTimeout(ctx, lasts)
				defer cancel()
				return advisory.WithLock(ctx, db, key, func(context.Context) error { return nil })
			}
			err := error(nil)
			if holds {
				err = advisory.WithLock(t.Context(), db, outer, wait)
			} else {
				err = wait(t.Context())
			}
			if !errors.Is(err, advisory.ErrNotAcquired) {
				t.Errorf("error %v, want ErrNotAcquired", err)
			}
			asked := 0
			for _, s := range sent.take() {
				if strings.Contains(s, "pg_stat_activity") && !strings.Contains(s, "pg_locks") {
					asked++
				}
			}
			if least, most := 2, 4; holds && (asked < least || asked > most) || !holds && asked > 0 {
				t.Errorf("holds: %t; %d questions in %v", holds, asked, lasts)
			}
			release()
		}
	})
}
