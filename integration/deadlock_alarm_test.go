package integration

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"math/rand/v2"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/pgadvisory/advisory"
)

// Whoever takes locks in one order is told of no deadlock, however many do, in whatever ways.
func TestAStormInOneOrderIsNoDeadlock(t *testing.T) {
	t.Parallel()
	bothDrivers(t, func(t *testing.T, d driver) {
		t.Parallel()
		dbs := []*sql.DB{d.open(t, server.DSN()), d.open(t, server.DSN())}
		for _, db := range dbs {
			db.SetMaxIdleConns(20)
		}
		end := time.Now().Add(4 * time.Second)
		nested := 0
		if err := concurrently(8, 1, func(i int) error {
			for time.Now().Before(end) {
				if err := inOrder(soon(t), dbs[i%2], t.Name(), 0); err != nil {
					return err
				}
				if i == 0 {
					nested++
				}
			}
			return nil
		}); err != nil {
			t.Error(err)
		}
		t.Logf("%d times by one of eight", nested)
	})
}

// inOrder takes some of five locks from the first on, one under the other.
func inOrder(ctx context.Context, db *sql.DB, name string, first int) error {
	if first >= 5 {
		time.Sleep(rand.N(3 * time.Millisecond))
		return nil
	}
	if rand.IntN(3) == 0 {
		return inOrder(ctx, db, name, first+1)
	}
	w := openers[rand.IntN(len(openers))]
	w.shared = rand.IntN(3) == 0
	return w.with(ctx, db, advisory.Name(fmt.Sprint(name, first)), func(ctx context.Context, _ querier) error {
		return inOrder(ctx, db, name, first+1)
	})
}

// Shared holders of one process are looked after, and waited for, for a moment. That is no deadlock,
// even if the one who holds the lock waits for the one who wants to share it.
func TestSharingALockIsNoDeadlock(t *testing.T) {
	t.Parallel()
	bothDrivers(t, func(t *testing.T, d driver) {
		t.Parallel()
		db := d.open(t, server.DSN())
		db.SetMaxIdleConns(20)
		a, b := advisory.Name("a"+t.Name()), advisory.Name("b"+t.Name())
		ctx, stop := context.WithCancel(soon(t))
		var others errgroup.Group
		for range 4 {
			others.Go(func() error {
				for ctx.Err() == nil {
					if err := withLock.with(context.WithoutCancel(ctx), db, a, noWork, advisory.Shared()); err != nil {
						return err
					}
					time.Sleep(rand.N(30 * time.Millisecond))
				}
				return nil
			})
		}
		for range d.rounds(40) {
			waits := make(chan error, 1)
			err := advisory.WithLock(ctx, db, b, func(holding context.Context) error {
				inside := make(chan struct{})
				go func() {
					waits <- advisory.WithLock(ctx, db, a, func(ctx context.Context) error {
						close(inside)
						return advisory.WithLock(ctx, db, b, func(context.Context) error { return nil })
					}, advisory.Shared())
				}()
				<-inside
				time.Sleep(25 * time.Millisecond) // until one who comes has to look
				return advisory.WithLock(holding, db, a, func(context.Context) error { return nil }, advisory.Shared())
			})
			if err := errors.Join(err, <-waits); err != nil {
				t.Fatal(err)
			}
		}
		stop()
		if err := others.Wait(); err != nil {
			t.Error(err)
		}
	})
}

// Chains stand for as long as what is at their ends, and so do waits that make a circle of sessions,
// but not of callers: those who hold the locks of it do not wait.
func TestChainsAndCirclesOfSessionsAreNoDeadlocks(t *testing.T) {
	t.Parallel()
	bothDrivers(t, func(t *testing.T, d driver) {
		t.Parallel()
		const lasts = 10 * time.Second
		dbs := []*sql.DB{d.open(t, server.DSN()), d.open(t, server.DSN()), d.open(t, server.DSN())}
		ctx := soon(t)
		var g errgroup.Group
		name := func(s string) advisory.Key { return advisory.Name(s + t.Name()) }
		// holds takes a lock, and then what fn says.
		holds := func(db *sql.DB, key advisory.Key, fn func(ctx context.Context) error) {
			in := make(chan struct{})
			g.Go(func() error {
				return advisory.WithLock(ctx, db, key, func(ctx context.Context) error {
					close(in)
					return fn(ctx)
				})
			})
			<-in
		}
		stand := func(context.Context) error { time.Sleep(lasts); return nil }
		wait := func(db *sql.DB, key advisory.Key) func(context.Context) error {
			return func(ctx context.Context) error {
				return advisory.WithLock(ctx, db, key, func(context.Context) error { return nil })
			}
		}
		// A chain, through three processes and back.
		holds(dbs[2], name("c0"), stand)
		for i := range 5 {
			db := dbs[i%3]
			holds(db, name(fmt.Sprint("c", i+1)), wait(db, name(fmt.Sprint("c", i))))
		}
		// A circle: a process has both the lock that the other's waits for, and a wait for what that has.
		for i, keys := range [][3]string{{"a", "x", "b"}, {"b", "y", "a"}} {
			holds(dbs[i], name(keys[0]), stand)
			holds(dbs[i], name(keys[1]), wait(dbs[i], name(keys[2])))
		}
		began := time.Now()
		if err := g.Wait(); err != nil {
			t.Error(err)
		}
		if took := time.Since(began); took < lasts/2 {
			t.Errorf("all over after %v", took)
		}
	})
}

// Cycles that come and go because one of the waits has a Timeout are no deadlocks, however often one
// of them is seen.
func TestCyclesThatDissolveAreNoDeadlocks(t *testing.T) {
	t.Parallel()
	bothDrivers(t, func(t *testing.T, d driver) {
		t.Parallel()
		one, other := d.open(t, server.DSN()), d.open(t, server.DSN())
		ctx := soon(t)
		end := time.Now().Add(7 * time.Second)
		key := func(s string, i int) advisory.Key { return advisory.Name(fmt.Sprint(s, i, t.Name())) }

		// A wait that lasts, so that the process asks all the time.
		release := hold(t, other, key("far", 0))
		defer release()
		var g errgroup.Group
		g.Go(func() error {
			return advisory.WithLock(ctx, other, key("near", 0), func(ctx context.Context) error {
				err := advisory.WithLock(ctx, other, key("far", 0), func(context.Context) error { return nil }, advisory.Timeout(time.Until(end)))
				if !errors.Is(err, advisory.ErrNotAcquired) {
					return fmt.Errorf("%w, want ErrNotAcquired", err)
				}
				return nil
			})
		})
		dissolved := make([]int, 3)
		for i := range 3 {
			a, b := key("a", i), key("b", i)
			g.Go(func() error { // whose waits end by themselves
				for time.Now().Before(end) {
					err := advisory.WithLock(ctx, one, a, func(ctx context.Context) error {
						return advisory.WithLock(ctx, one, b, func(context.Context) error { return nil }, advisory.Timeout(300*time.Millisecond))
					})
					if errors.Is(err, advisory.ErrNotAcquired) {
						dissolved[i]++
					} else if err != nil {
						return err
					}
				}
				return nil
			})
			g.Go(func() error {
				for time.Now().Before(end) {
					if err := advisory.WithLock(ctx, other, b, func(ctx context.Context) error {
						return advisory.WithLock(ctx, other, a, func(context.Context) error { return nil })
					}); err != nil {
						return err
					}
				}
				return nil
			})
		}
		if err := g.Wait(); err != nil {
			t.Error(err)
		}
		t.Logf("%v cycles", dissolved)
	})
}
