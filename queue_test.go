package advisory

import (
	"context"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/pgadvisory/advisory/internal/keyqueue"
	"github.com/pgadvisory/advisory/internal/pgsql"
	"github.com/pgadvisory/advisory/internal/session"
)

// For 20 ms after a try has asked for it, a lock is handed on without the server, which is asked by
// the release whether it was held; then it goes back to the server's queue.
func TestALockIsHandedOnForAMoment(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		p, dbs, srvs := newTable(t, 1)
		var order []int
		var wg sync.WaitGroup
		l := take(t, dbs[0], key)
		for i := range 6 {
			wg.Go(func() {
				wantError(t, WithLock(t.Context(), dbs[0], key, func(context.Context) error {
					order = append(order, i)
					time.Sleep(6 * time.Millisecond)
					return nil
				}))
			})
			synctest.Wait()
		}
		wantError(t, l.Release())
		wg.Wait()
		if !slices.Equal(order, []int{0, 1, 2, 3, 4, 5}) {
			t.Errorf("order: %v", order)
		}
		// Each release asks, but for those that unlock.
		const asks = "SELECT"
		srvs[0].want(t, on(1, "open", tryQuery, asks, asks, asks, asks, unlockQuery, tryQuery, asks, unlockQuery)...)
		wantIdle(t, dbs[0])
		p.clean()
	})
}

// The release of a lock that was handed on is not nil if the session was gone by then.
func TestAHandedOnLockThatIsLostIsNoSuccess(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		p, dbs, srvs := newTable(t, 1)
		l := take(t, dbs[0], key)
		var wg sync.WaitGroup
		wg.Go(func() {
			// It may be handed on before the loss is known, but not be held in the end.
			err := WithLock(t.Context(), dbs[0], key, func(ctx context.Context) error { session.Sleep(ctx, time.Second); return nil })
			if err != nil {
				wantError(t, err, ErrLost)
			}
		})
		synctest.Wait()
		p.kill(backendID{srvs[0], 1})
		wantError(t, l.Release(), ErrLost)
		wg.Wait()
		wantIdle(t, dbs[0])
		p.clean()
	})
}

// Other processes get their turn: two of them share a lock that both always want.
func TestProcessesShareALockThatBothAlwaysWant(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		p, dbs, _ := newTable(t, 2)
		p.takes(time.Millisecond)
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		defer cancel()
		var turns [2]int
		var wg sync.WaitGroup
		for i, db := range dbs {
			for range 8 {
				wg.Go(func() {
					for ctx.Err() == nil {
						_ = WithLock(ctx, db, key, func(context.Context) error {
							turns[i]++
							time.Sleep(time.Millisecond)
							return nil
						})
					}
				})
			}
		}
		wg.Wait()
		if min(turns[0], turns[1])*2 < max(turns[0], turns[1]) || turns[0]+turns[1] < 1000 {
			t.Errorf("turns: %v", turns)
		}
		time.Sleep(time.Minute)
		p.clean()
	})
}

// Shared holders of a process have one lock of the server, and look whether others wait for it
// once it is old.
func TestSharedHoldersShareTheServersLock(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		p, dbs, srvs := newTable(t, 2)
		db := dbs[0]
		tryShared, unlockShared := "SELECT WHERE CASE WHEN pg_catalog.pg_is_in_recovery() THEN false ELSE pg_catalog.pg_try_advisory_lock_shared(42) END", "SELECT WHERE pg_catalog.pg_advisory_unlock_shared(42)"
		look := pgsql.Look(key.key)
		first, second := take(t, db, key, Shared()), take(t, db, key, Shared())
		if n := p.holders(key); n != 1 {
			t.Errorf("%d locks of the server", n)
		}
		time.Sleep(keyqueue.HandOffFor)
		third := take(t, db, key, Shared(), NoWait())
		fourth := take(t, db, key, Shared()) // for another moment without a look
		srvs[0].want(t, on(1, "open", tryShared, look)...)

		var wg sync.WaitGroup
		wg.Go(func() { wantError(t, WithLock(t.Context(), dbs[1], key, nothing)) })
		time.Sleep(keyqueue.HandOffFor)
		if p.waiters(key) != 1 {
			t.Errorf("%d wait", p.waiters(key))
		}
		_, err := Acquire(t.Context(), db, key, Shared(), NoWait())
		wantError(t, err, ErrHeld)
		// One who may wait does so behind the other process.
		wg.Go(func() {
			wantError(t, WithLock(t.Context(), db, key, func(context.Context) error {
				if p.waiters(key) != 0 {
					t.Error("before the other process")
				}
				return nil
			}, Shared()))
		})
		synctest.Wait()
		for _, l := range []*Lock{first, second, third, fourth} {
			wantError(t, l.Release())
		}
		wg.Wait()
		synctest.Wait()
		// Once for the four, who had one lock, and once for the one who came after the other process.
		if lines := srvs[0].lines(); count(lines, unlockShared) != 2 {
			t.Errorf("log: %q", lines)
		}
		wantIdle(t, db)
		p.clean()
	})
}

// The look fails with the server's error, or finds the session lost.
func TestALookThatFails(t *testing.T) {
	t.Parallel()
	for _, failure := range []error{pgError("53200"), errSessionEnded} {
		synctest.Test(t, func(t *testing.T) {
			p, dbs, _ := newTable(t, 1)
			p.fail = failing(pgsql.Look(key.key), failure)
			l := take(t, dbs[0], key, Shared())
			time.Sleep(2 * keyqueue.HandOffFor)
			err := WithLock(t.Context(), dbs[0], key, nothing, Shared())
			if pgsql.State(failure) != "" {
				wantError(t, err, failure)
				wantError(t, l.Release())
			} else {
				wantError(t, err) // on a new session
				wantError(t, l.Release(), ErrLost)
			}
			wantIdle(t, dbs[0])
			p.clean()
		})
	}
}

// A look ends with its ctx and its Timeout, whatever the holders' Heartbeat is.
func TestALookThatIsNotAnswered(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		db, srv := newServer(t)
		srv.direct = true
		srv.script = script(when(has("NOT granted"), hangs))
		l := take(t, db, key, Shared(), Heartbeat(time.Hour), HolderTimeout(4*time.Hour))
		time.Sleep(time.Second)
		start := time.Now()
		wantError(t, WithLock(t.Context(), db, key, nothing, Shared(), Timeout(100*time.Millisecond)), ErrNotAcquired, "within 100ms")
		ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
		defer cancel()
		wantError(t, WithLock(ctx, db, key, nothing, Shared()), ErrNotAcquired, context.DeadlineExceeded)
		wantTook(t, start, 0, 3*time.Second)
		wantError(t, l.Release(), ErrLost) // the session never answered again
	})
}

// One who waits after a look is told that the pool has been closed.
func TestThePoolIsClosedAfterALook(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		_, dbs, _ := newTable(t, 2)
		l := take(t, dbs[0], key, Shared())
		var wg sync.WaitGroup
		wg.Go(func() { wantError(t, WithLock(t.Context(), dbs[1], key, nothing)) })
		time.Sleep(50 * time.Millisecond)
		looked := make(chan error)
		go func() { looked <- WithLock(t.Context(), dbs[0], key, nothing, Shared()) }()
		time.Sleep(100 * time.Millisecond)
		wantError(t, dbs[0].Close())
		select {
		case err := <-looked:
			wantError(t, err, "database is closed")
		case <-time.After(time.Second):
			t.Error("it still waits")
		}
		wantError(t, l.Release())
		wg.Wait()
	})
}

// Several looks, on a session that has the statement for many, which does not look.
func TestSeveralLooksAtOnce(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		p, dbs, srvs := newTable(t, 1)
		p.takes(time.Millisecond)
		var locks []*Lock
		for _, k := range ids(20) {
			locks = append(locks, take(t, dbs[0], k, Shared()))
		}
		each(ids(40)[20:], func(k Key) { wantError(t, WithLock(t.Context(), dbs[0], k, nothing)) })
		time.Sleep(2 * keyqueue.HandOffFor)
		atOnce(t, dbs[0], 20, 0, Shared())
		if n := count(srvs[0].lines(), "NOT granted"); n != 20 || count(srvs[0].lines(), "batch ") == 0 {
			t.Errorf("%d looks", n)
		}
		for _, l := range locks {
			wantError(t, l.Release())
		}
		time.Sleep(time.Second)
		wantIdle(t, dbs[0])
		p.clean()
	})
}

func TestNoWaitAgainstALockOfTheProcessSendsNothing(t *testing.T) {
	t.Parallel()
	db, srv := newServer(t)
	l := take(t, db, key)
	sent := srv.lines()
	for _, c := range closures {
		wantError(t, c.run(t.Context(), db, key, nothing, NoWait()), ErrHeld, ErrNotAcquired, "not acquired: held by this process")
		wantError(t, c.run(t.Context(), db, key, nothing, NoWait(), Shared()), ErrHeld)
	}
	wantError(t, WithLocks(t.Context(), db, []Key{key, ID(43)}, nothing, NoWait()), ErrHeld)
	if diff := srv.lines(); !slices.Equal(diff, sent) && count(diff[len(sent):], "42") > 0 {
		t.Errorf("sent: %q", diff[len(sent):])
	}
	wantError(t, l.Release())
}
