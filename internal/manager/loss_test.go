package manager_test

import (
	"context"
	"io"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/pgadvisory/advisory/internal/manager"
	"github.com/pgadvisory/advisory/internal/pgsql"
	"github.com/pgadvisory/advisory/internal/session"
)

// A holder that is told of a loss may keep the next ones waiting. One who has acquired its locks anew
// meanwhile, on another session, is not told of it.
func TestALossThatIsToldLate(t *testing.T) {
	t.Parallel()
	for range 20 { // holders are told in any order
		synctest.Test(t, func(t *testing.T) {
			db, srv := newDB(t)
			var free atomic.Bool
			elsewhere := taken(key(3), 100*time.Millisecond)
			srv.answer = func(ctx context.Context, conn int, query string) (int64, error) {
				switch {
				case conn == 1 && query == pgsql.Ping:
					return 0, io.ErrUnexpectedEOF
				case free.Load():
					return 1, nil
				}
				return elsewhere(ctx, conn, query)
			}
			slow, err := manager.Acquire(t.Context(), watched(db, request(key(1)), time.Second))
			wantError(t, err, nil)
			told := make(chan struct{})
			slow.Begin(func(error) { <-told })

			shared := func(keys ...pgsql.Key) *manager.Request {
				r := watched(db, request(keys...), time.Second)
				r.Shared = true
				return r
			}
			acquired := make(chan *manager.Locks)
			go func() {
				locks, err := manager.Acquire(t.Context(), shared(key(2), key(3)))
				wantError(t, err, nil)
				locks.Begin(func(cause error) { t.Errorf("told of %v", cause) })
				acquired <- locks
			}()
			time.Sleep(2500 * time.Millisecond) // it has the lock of 2, and waits for that of 3
			go func() { wantError(t, slow.Ping(), io.ErrUnexpectedEOF) }()
			synctest.Wait()                                             // the session of 1 and 2 is lost
			beside, err := manager.Acquire(t.Context(), shared(key(2))) // has its queue know
			wantError(t, err, nil)
			wantError(t, beside.Release(), nil)
			time.Sleep(time.Second) // the last heartbeat is not fresh any more
			free.Store(true)
			locks := <-acquired
			close(told)
			synctest.Wait()
			wantError(t, locks.Release(), nil)
			wantError(t, slow.Release(), io.ErrUnexpectedEOF)
			synctest.Wait()
			wantState(t, db, 0, 0)
		})
	}
}

// The answer to another's heartbeat, which is under way, does not make a leader.
func TestAHeartbeatUnderWayMakesNoLeader(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		db, srv := newDB(t)
		srv.answer = func(_ context.Context, _ int, query string) (int64, error) {
			switch {
			case isTry(query) && of(key(2), query):
				time.Sleep(200 * time.Millisecond)
			case strings.Contains(query, "current_setting('advisory.session', true)"):
				time.Sleep(300 * time.Millisecond)
				return pgsql.OnStandby, nil
			}
			return 1, nil
		}
		other, err := acquireWatched(t.Context(), db, request(key(1)), time.Second)
		wantError(t, err, nil)
		time.Sleep(900 * time.Millisecond) // the heartbeat comes while the lock of 2 is asked for
		r := request(key(2))
		r.Lead = true
		_, err = acquireWatched(t.Context(), db, r, time.Second)
		wantError(t, err, session.ErrStandby)
		wantError(t, other.Release(), session.ErrStandby)
		synctest.Wait()
		wantState(t, db, 0, 0)
	})
}

// A leader whose grant was long on its way has the full time for the answer that makes it one.
func TestALeaderWhoseGrantWasSlow(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		db, srv := newDB(t)
		srv.answer = func(_ context.Context, _ int, query string) (int64, error) {
			if isTry(query) {
				time.Sleep(2500 * time.Millisecond)
			} else {
				time.Sleep(900 * time.Millisecond)
			}
			return 1, nil
		}
		r := watched(db, request(key(1)), time.Second)
		r.IdleTimeout, r.Lead = 3*time.Second, true
		start := time.Now()
		locks, err := manager.Acquire(t.Context(), r)
		if err != nil {
			t.Fatal(err)
		}
		wantTook(t, start, 3400*time.Millisecond)
		wantError(t, locks.Release(), nil)
	})
}
