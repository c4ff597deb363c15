package integration

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/pgadvisory/advisory"
)

func TestNoUpdateIsLost(t *testing.T) {
	t.Parallel()
	const goroutines, increments = 16, 4
	// Two keys in both orders: a deadlock, if they were taken as they come.
	opposite := withLocks
	opposite.name = "WithLocks_in_opposite_orders"
	var turn atomic.Int64
	opposite.run = func(ctx context.Context, db *sql.DB, key advisory.Key, fn work, o options) error {
		keys := []advisory.Key{key, second(key), key}
		if turn.Add(1)%2 == 0 {
			keys = []advisory.Key{second(key), key}
		}
		return advisory.WithLocks(ctx, db, keys, func(ctx context.Context) error { return fn(ctx, db) }, o.acquire...)
	}
	eachDriver(t, func(t *testing.T, d driver) {
		t.Parallel()
		pools := []*sql.DB{d.open(t, server.DSN()), d.open(t, server.DSN())}
		eachWay(t, append(slices.Clone(ways), opposite), func(t *testing.T, w way) {
			key, c := testKey(t), newCounter(t, pools[0])
			err := concurrently(goroutines, increments, func(i int) error {
				return w.with(soon(t), pools[i%2], key, c.increment)
			})
			if err != nil {
				t.Error(err)
			}
			c.wantValue(t, pools[0], goroutines*increments)
		})
	})
}

// All kinds of locks on a key are one lock: they exclude each other too.
func TestNoUpdateIsLostBetweenWays(t *testing.T) {
	t.Parallel()
	const increments = 6
	eachDriver(t, func(t *testing.T, d driver) {
		pools := []*sql.DB{d.open(t, server.DSN()), d.open(t, server.DSN())}
		key, c := testKey(t), newCounter(t, pools[0])
		err := concurrently(2*len(ways), increments, func(i int) error {
			return ways[i/2].with(soon(t), pools[i%2], key, c.increment)
		})
		if err != nil {
			t.Error(err)
		}
		c.wantValue(t, pools[0], 2*len(ways)*increments)
	})
}

func TestSharedLocksOverlap(t *testing.T) {
	t.Parallel()
	eachDriver(t, func(t *testing.T, d driver) {
		pools := []*sql.DB{d.open(t, server.DSN()), d.open(t, server.DSN())}
		key := testKey(t)
		var inside atomic.Int64
		all := make(chan struct{})
		err := concurrently(2*len(ways), 1, func(i int) error {
			w := ways[i/2]
			w.shared = true
			return w.with(soon(t), pools[i%2], key, func(ctx context.Context, _ querier) error {
				if inside.Add(1) == int64(2*len(ways)) {
					wantRefused(t, pools[0], key)
					wantRefused(t, pools[1], key)
					close(all)
				}
				select {
				case <-all:
					return nil
				case <-ctx.Done():
					return fmt.Errorf("alone: %w", ctx.Err())
				}
			})
		})
		if err != nil {
			t.Error(err)
		}
		wantGranted(t, pools[0], key)
	})
}

func TestSharedLocksExcludeWriters(t *testing.T) {
	t.Parallel()
	eachDriver(t, func(t *testing.T, d driver) {
		pools := []*sql.DB{d.open(t, server.DSN()), d.open(t, server.DSN())}
		key := testKey(t)
		var readers, writers atomic.Int64
		err := concurrently(4*len(ways), 5, func(i int) error {
			w := ways[i/4]
			w.shared = i%4 > 0
			return w.with(soon(t), pools[i%2], key, func(context.Context, querier) error {
				mine, others := &writers, &readers
				if w.shared {
					mine, others = &readers, &writers
				}
				n := mine.Add(1)
				defer mine.Add(-1)
				runtime.Gosched()
				if others.Load() > 0 || !w.shared && n > 1 {
					return fmt.Errorf("%s: shared %t: in company", w.name, w.shared)
				}
				return nil
			})
		})
		if err != nil {
			t.Error(err)
		}
	})
}

func TestLockIsReleasedHoweverTheWorkEnds(t *testing.T) {
	t.Parallel()
	failed := errors.New("work failed")
	endings := []ending{
		{name: "success", end: func(context.CancelFunc) error { return nil }},
		{name: "error", end: func(context.CancelFunc) error { return failed }, err: failed},
		{name: "panic", end: func(context.CancelFunc) error { panic(failed) }, panicking: failed},
		{name: "Goexit_as_by_FailNow", end: func(context.CancelFunc) error { runtime.Goexit(); return nil }, exit: true},
		{name: "ended_ctx", end: func(cancel context.CancelFunc) error { cancel(); return failed }, err: failed},
		{name: "ended_ctx_and_panic", end: func(cancel context.CancelFunc) error { cancel(); panic(failed) }, panicking: failed},
	}
	eachDriver(t, func(t *testing.T, d driver) {
		db, other := d.open(t, server.DSN()), d.open(t, server.DSN())
		eachWay(t, closures, func(t *testing.T, w way) {
			for _, e := range endings {
				t.Run(e.name, func(t *testing.T) { e.test(t, w, db, other) })
			}
		})
	})
}

// An ending is how work under a lock ends.
type ending struct {
	name string
	end  func(cancel context.CancelFunc) error
	// what becomes of the caller
	err       error
	panicking any
	exit      bool
}

// test ends work under a lock that a session of db holds, and looks from the other pool.
func (e ending) test(t *testing.T, w way, db, other *sql.DB) {
	key := testKey(t)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var (
		err       error
		panicking any
		exit      = true
	)
	done := make(chan struct{})
	go func() {
		defer close(done)
		defer func() {
			if panicking = recover(); panicking != nil {
				exit = false
			}
		}()
		err = w.with(ctx, db, key, func(_ context.Context, q querier) error {
			wantRefused(t, other, key)
			return e.end(cancel)
		})
		exit = false
	}()
	<-done
	if !errors.Is(err, e.err) || errors.Is(err, advisory.ErrLost) {
		t.Errorf("error is %v, want %v", err, e.err)
	}
	if panicking != e.panicking {
		t.Errorf("panic value is %v, want %v", panicking, e.panicking)
	}
	if exit != e.exit {
		t.Errorf("goroutine exited: %t, want %t", exit, e.exit)
	}
	if ctx.Err() != nil {
		// database/sql rolls back at the end of ctx, in its own time.
		wantFree(t, other, key)
	}
	wantGranted(t, other, key)
	wantClean(t, db)
}

// A waiter in another process begins at once, not at the end of some poll interval.
func TestHandOffIsImmediate(t *testing.T) {
	const handOffs, bound = 50, 20 * time.Millisecond
	eachDriver(t, func(t *testing.T, d driver) {
		db, other := d.open(t, server.DSN()), d.open(t, server.DSN())
		eachWay(t, []way{withLock, withConnLock, withTxLock}, func(t *testing.T, w way) {
			key := testKey(t)
			var took []time.Duration
			for range d.rounds(handOffs) {
				lock, err := advisory.Acquire(t.Context(), db, key)
				if err != nil {
					t.Fatal(err)
				}
				var begun time.Time
				waiter := make(chan error, 1)
				go func() {
					waiter <- w.with(soon(t), other, key, func(context.Context, querier) error {
						begun = time.Now()
						return nil
					})
				}()
				waitForWaiters(t, adminDB(t), key, 1)
				released := time.Now()
				if err := errors.Join(lock.Release(), <-waiter); err != nil {
					t.Fatal(err)
				}
				took = append(took, begun.Sub(released))
			}
			slices.Sort(took)
			if p50 := took[len(took)/2]; p50 > bound {
				t.Errorf("hand-off took %v (p50 of %d), want under %v", p50, len(took), bound)
			} else {
				t.Logf("p50 %v, max %v", p50, took[len(took)-1])
			}
		})
	})
}

// A pool of one connection is enough for all holders of session-level locks; who comes too
// late, or needs a connection as well, is told why.
func TestPoolOfOne(t *testing.T) {
	t.Parallel()
	eachDriver(t, func(t *testing.T, d driver) {
		db := d.open(t, server.DSN())
		db.SetMaxOpenConns(1)
		key := testKey(t)
		lock, err := advisory.Acquire(t.Context(), db, key)
		if err != nil {
			t.Fatal(err)
		}
		wantTimeout := func(w way, key advisory.Key, hint string) {
			t.Helper()
			err := w.with(soon(t), db, key, noWork, advisory.Timeout(100*time.Millisecond))
			if !errors.Is(err, advisory.ErrNotAcquired) || !strings.Contains(err.Error(), hint) {
				t.Errorf("%s: error is %v, want ErrNotAcquired that says %q", w.name, err, hint)
			}
		}
		free := advisory.Name(t.Name() + ", free")
		for _, w := range openers {
			wantTimeout(w, key, "held by this process")
			if w.beats {
				if err := w.with(soon(t), db, free, noWork); err != nil {
					t.Errorf("%s beside the lock that is held: %v", w.name, err)
				}
			} else {
				wantTimeout(w, free, "pool")
			}
		}
		if err := lock.Release(); err != nil {
			t.Error(err)
		}
		for _, w := range ways {
			if err := w.with(soon(t), db, key, noWork); err != nil {
				t.Errorf("%s: %v", w.name, err)
			}
		}
		wantClean(t, db)
	})
}
