package advisory

import (
	"context"
	"errors"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// All that a process holds is on one connection, which it gives back with the last lock.
func TestOneSessionCarriesManyLocks(t *testing.T) {
	t.Parallel()
	p, dbs, srvs := newTable(t, 1)
	db := dbs[0]
	db.SetMaxOpenConns(2)
	var locks []*Lock
	for _, k := range append(ids(1000), Pair(1, 2), Name("a")) {
		locks = append(locks, take(t, db, k))
	}
	shared := take(t, db, key, Shared())
	if n := db.Stats().InUse; n != 1 {
		t.Errorf("%d connections in use", n)
	}
	// And there is another for the work.
	if _, err := db.ExecContext(t.Context(), "SELECT"); err != nil {
		t.Error(err)
	}
	for _, l := range locks {
		wantError(t, l.Release())
	}
	if n := db.Stats().InUse; n != 1 {
		t.Errorf("%d connections in use", n)
	}
	wantError(t, shared.Release())
	wantIdle(t, db)
	p.clean()
	if srvs[0].opened != 2 {
		t.Errorf("%d connections", srvs[0].opened)
	}
}

// A lost session ends every hold on it before anybody else can have the lock; who waits goes
// on over a new session.
func TestALostSessionEndsAllItsHolds(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		p, dbs, srvs := newTable(t, 1)
		db := dbs[0]
		var locks []*Lock
		for _, k := range ids(5) {
			locks = append(locks, take(t, db, k))
		}
		locks = append(locks, take(t, db, key, Shared()), take(t, db, key, Shared()))
		var wg sync.WaitGroup
		for i, k := range append(ids(5), key) {
			wg.Go(func() {
				wantError(t, WithLock(t.Context(), db, k, func(ctx context.Context) error {
					if locks[i].Context().Err() == nil || p.holders(k) != 1 {
						t.Errorf("%v: %d holders, and the one before goes on", k, p.holders(k))
					}
					return ctx.Err()
				}))
			})
		}
		synctest.Wait()
		p.kill(backendID{srvs[0], 1})
		// It is noticed by whoever asks something first.
		wantError(t, WithLock(t.Context(), db, ID(1), nothing))
		wg.Wait()
		for _, l := range locks {
			wantError(t, context.Cause(l.Context()), ErrLost, "lock lost")
			wantError(t, l.Release(), ErrLost)
		}
		srvs[0].wantConns(t, 1, 2)
		wantIdle(t, db)
		p.clean()
	})
}

// A server that is down is an error at once for all who wait for the one who asks.
func TestOneOpensTheSessionForAll(t *testing.T) {
	t.Parallel()
	for _, fails := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			_, dbs, srvs := newTable(t, 1)
			down := errors.New("connection refused")
			dials := 0
			srvs[0].dial = func(context.Context) error {
				dials++
				time.Sleep(time.Second)
				if fails {
					return down
				}
				return nil
			}
			var wants []any
			if fails {
				wants = []any{down}
			}
			each(ids(20), func(k Key) { wantError(t, WithLock(t.Context(), dbs[0], k, nothing), wants...) })
			if dials != 1 {
				t.Errorf("%d connections were asked for", dials)
			}
			time.Sleep(time.Second)
			wantIdle(t, dbs[0])
		})
	}
}

// Those that take the lock on a session of their own wait for others of the process without
// a connection.
func TestWaitersForOwnSessionsHoldNoConnection(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		p, dbs, srvs := newTable(t, 1)
		db := dbs[0]
		db.SetMaxOpenConns(2)
		var wg sync.WaitGroup
		running := 0
		for range 30 {
			for _, c := range closures {
				wg.Go(func() {
					wantError(t, c.run(t.Context(), db, key, func(context.Context) error {
						if running++; running > 1 {
							t.Error("two at a time")
						}
						time.Sleep(time.Millisecond)
						// The work has a connection.
						_, err := db.ExecContext(t.Context(), "SELECT")
						running--
						return err
					}))
				})
			}
		}
		wg.Wait()
		if srvs[0].opened > 2 {
			t.Errorf("%d connections", srvs[0].opened)
		}
		wantIdle(t, db)
		p.clean()
	})
}

// Waits for other processes take no more than half of a limited pool, and a few of one without
// a limit; the other requests are tried again and again, with pauses that grow.
func TestWaitsTakeHalfOfThePool(t *testing.T) {
	t.Parallel()
	for _, test := range []struct{ limit, most int }{{1, 1}, {2, 1}, {3, 1}, {6, 3}, {0, 1 + maxWaits}} {
		synctest.Test(t, func(t *testing.T) {
			p, dbs, srvs := newTable(t, 2)
			p.takes(100 * time.Microsecond)
			dbs[0].SetMaxOpenConns(test.limit)
			keys := ids(40)
			var others []*Lock
			for _, k := range keys {
				others = append(others, take(t, dbs[1], k))
			}
			var wg sync.WaitGroup
			for _, k := range keys {
				wg.Go(func() {
					wantError(t, WithLock(t.Context(), dbs[0], k, func(ctx context.Context) error {
						if p.holders(k) != 1 {
							t.Errorf("%v: %d holders", k, p.holders(k))
						}
						return ctx.Err()
					}))
				})
			}
			for range 100 {
				time.Sleep(100 * time.Millisecond)
				n := dbs[0].Stats().InUse
				if n > test.most { // those that try again open the common session for a moment
					time.Sleep(20 * time.Millisecond)
					n = dbs[0].Stats().InUse
				}
				if n > test.most {
					t.Fatalf("%d connections of %d are in use", n, test.limit)
				}
			}
			before := len(srvs[0].lines())
			time.Sleep(10 * time.Second)
			if n := len(srvs[0].lines()) - before; n > 10*4*len(keys)+200 { // four times a second
				t.Errorf("limit %d: %d statements in 10 s", test.limit, n)
			}
			wantError(t, WithLock(t.Context(), dbs[0], keys[39], nothing, Timeout(time.Second)), ErrHeld, "within 1s")
			for _, l := range others {
				wantError(t, l.Release())
			}
			start := time.Now()
			wg.Wait()
			if d := time.Since(start); d > 2*time.Second {
				t.Errorf("limit %d: after %v", test.limit, d)
			}
			time.Sleep(time.Second)
			wantIdle(t, dbs[0])
			p.clean()
		})
	}
}

// A wait that is left is one of those that the pool can spare until it has ended.
func TestAWaitThatIsLeftCountsUntilItHasEnded(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		p, dbs, srvs := newTable(t, 2)
		dbs[0].SetMaxOpenConns(4) // a common session, and one that waits
		there := take(t, dbs[1], key)
		p.takes(time.Millisecond)
		for range 10 {
			ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
			wantError(t, WithLock(ctx, dbs[0], key, nothing), ErrNotAcquired, context.DeadlineExceeded)
			cancel()
			if n := p.waiters(key); n > 1 {
				t.Errorf("%d waits at once", n)
			}
		}
		time.Sleep(time.Second)
		if srvs[0].opened > 2 || srvs[0].open() != srvs[0].opened {
			t.Errorf("%d of %d connections open", srvs[0].open(), srvs[0].opened)
		}
		wantIdle(t, dbs[0])
		wantError(t, there.Release())
		p.clean()
	})
}
