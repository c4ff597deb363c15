package manager_test

import (
	"context"
	"database/sql"
	"errors"
	"io"
	"runtime"
	"sync"
	"testing"
	"testing/synctest"
	"time"
	"weak"

	"github.com/pgadvisory/advisory/internal/manager"
	"github.com/pgadvisory/advisory/internal/pgsql"
	"github.com/pgadvisory/advisory/internal/session"
)

// All that a process does with a *sql.DB goes through one Manager.
func TestForIsOneForEachDB(t *testing.T) {
	t.Parallel()
	db, _ := newDB(t)
	other, _ := newDB(t)
	if m := manager.For(db); m != manager.For(db) || m == manager.For(other) {
		t.Error("two for one, or one for two")
	}
	wantState(t, db, 0, 0)
}

// A Manager goes with its *sql.DB.
func TestTheManagerOfAGarbageDBIsForgotten(t *testing.T) {
	t.Parallel()
	m := func() weak.Pointer[manager.Manager] {
		db := sql.OpenDB(new(server))
		wantError(t, db.Ping(), nil)
		m := weak.Make(manager.For(db)) // unused: the timers of a session are not stopped, and would keep it for seconds
		wantError(t, db.Close(), nil)
		if runtime.GC(); m.Value() == nil {
			t.Error("it is forgotten before its DB")
		}
		runtime.KeepAlive(db)
		return m
	}()
	for range 2000 {
		if runtime.GC(); m.Value() == nil {
			return
		}
		time.Sleep(5 * time.Millisecond)
	}
	t.Error("it is still known")
}

// A session is counted from before it is opened until it has ended: the common one, with all its locks,
// as one, and each that waits.
func TestSessionsAreCounted(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		db, srv := newDB(t)
		srv.dial = func() error { time.Sleep(time.Second); return nil }
		time.AfterFunc(time.Second/2, func() { wantState(t, db, 1, 1) })
		first := take(t, db, key(1))
		second := take(t, db, key(2), key(3))
		wantState(t, db, 3, 1)

		srv.answer = taken(key(4), 300*time.Millisecond)
		ctx, cancel := context.WithCancel(t.Context())
		time.AfterFunc(1500*time.Millisecond, func() { wantState(t, db, 4, 2) })
		time.AfterFunc(2*time.Second, cancel) // in a slice, from 1.9 s to 2.2 s
		_, err := acquire(ctx, db, request(key(4)))
		wantError(t, err, context.Canceled)
		synctest.Wait()
		wantState(t, db, 3, 2) // until the statement that was left has ended
		time.Sleep(300 * time.Millisecond)
		wantState(t, db, 3, 1)
		wantError(t, first.Release(), nil)
		wantError(t, second.Release(), nil)
		wantState(t, db, 0, 0)
	})
}

// Nor is one that could not be opened, or that has died.
func TestASessionThatIsNotThereIsNotCounted(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		db, srv := newDB(t)
		down := errors.New("connection refused")
		srv.dial = func() error { return down }
		_, err := acquire(t.Context(), db, request(key(1)))
		wantError(t, err, down)
		wantState(t, db, 0, 0)

		srv.dial = nil
		locks := take(t, db, key(1))
		srv.answer = func(context.Context, int, string) (int64, error) { return 0, io.ErrUnexpectedEOF }
		_, err = acquire(t.Context(), db, request(key(2))) // notices it
		wantError(t, err, io.ErrUnexpectedEOF)
		wantError(t, locks.Release(), io.ErrUnexpectedEOF)
		synctest.Wait()
		wantState(t, db, 0, 0)
	})
}

// No more than half of a limited pool waits in the server's queue, the common session included. The
// others try again and again, on that.
func TestWaitsAreLimited(t *testing.T) {
	t.Parallel()
	for _, test := range []struct{ limit, waits int }{{2, 0}, {4, 1}, {10, 4}, {0, 8}} {
		synctest.Test(t, func(t *testing.T) {
			db, srv := newDB(t)
			db.SetMaxOpenConns(test.limit)
			var mu sync.Mutex
			waiting, most := 0, 0
			count := func(n int) {
				mu.Lock()
				defer mu.Unlock()
				waiting += n
				most = max(most, waiting)
			}
			srv.answer = func(_ context.Context, _ int, query string) (int64, error) {
				switch {
				case isWait(query):
					count(1)
					time.Sleep(100 * time.Millisecond)
					count(-1)
					return 0, nil
				case isTry(query):
					return 0, nil
				}
				return 1, nil
			}
			ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
			defer cancel()
			var wg sync.WaitGroup
			for n := range int64(20) {
				wg.Go(func() {
					_, err := acquire(ctx, db, request(key(n)))
					wantError(t, err, context.DeadlineExceeded)
				})
			}
			wg.Wait()
			time.Sleep(time.Second)
			if most != test.waits {
				t.Errorf("limit %d: %d wait at once, want %d", test.limit, most, test.waits)
			}
			wantState(t, db, 0, 0)
		})
	}
}

// The error of an acquisition is a Failure, which says more of why where that is known.
func TestAFailureSaysWhy(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		db, _ := newDB(t)
		db.SetMaxOpenConns(1)
		conn, err := db.Conn(t.Context())
		wantError(t, err, nil)
		r := request(key(1))
		r.Timeout = time.Second
		for _, test := range []struct{ hint, holder string }{{hint: "the pool's only connection is in use"}, {holder: "this process"}} {
			start := time.Now()
			_, err := acquire(t.Context(), db, r)
			var failure *manager.Failure
			if !errors.As(err, &failure) || failure.Hint != test.hint || failure.Holder != test.holder {
				t.Errorf("error: %+v, want %+v", failure, test)
			}
			wantError(t, err, session.ErrTimeout)
			wantTook(t, start, time.Second)
			if conn != nil {
				wantError(t, conn.Close(), nil)
				conn = nil
				defer take(t, db, key(1)).Release()
			}
		}
	})
}

// A request whose session is lost to another's is tried again on another session.
func TestARequestThatLosesItsSessionToAnothers(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		db, srv := newDB(t)
		srv.answer = func(ctx context.Context, conn int, query string) (int64, error) {
			if conn == 1 && of(key(1), query) {
				<-ctx.Done()
				return 0, ctx.Err()
			}
			return 1, nil
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		var wg sync.WaitGroup
		wg.Go(func() {
			_, err := acquire(ctx, db, request(key(1)))
			wantError(t, err, context.DeadlineExceeded)
		})
		synctest.Wait()
		for n := range int64(5) {
			wg.Go(func() { takeOnce(t, db, key(n+2)) })
		}
		wg.Wait()
		synctest.Wait()
		if opened, open := srv.opened.Load(), srv.open.Load(); opened != 2 || open != 1 {
			t.Errorf("%d connections of %d open", open, opened)
		}
		wantState(t, db, 0, 0)
	})
}

// So is one that finds the session of others dead. Their locks are lost, and who waits for one of those
// in the process has it on the new session.
func TestARequestThatFindsTheSessionDead(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		db, srv := newDB(t)
		lost := take(t, db, key(1))
		var wg sync.WaitGroup
		wg.Go(func() { takeOnce(t, db, key(1)) })
		synctest.Wait()
		srv.answer = func(_ context.Context, conn int, _ string) (int64, error) {
			if conn == 1 {
				return 0, io.ErrUnexpectedEOF
			}
			return 1, nil
		}
		takeOnce(t, db, key(2))
		wg.Wait()
		wantError(t, lost.Release(), io.ErrUnexpectedEOF)
		synctest.Wait()
		wantState(t, db, 0, 0)
	})
}

// A session outlives those who have opened it, and waited on it. It does not keep them in memory.
func TestASessionDoesNotKeepItsFirstCallerInMemory(t *testing.T) {
	t.Parallel()
	for name, refused := range map[string]bool{"of a try": false, "of a wait": true} {
		db, srv := newDB(t)
		srv.answer = func(_ context.Context, _ int, query string) (int64, error) {
			if refused && isTry(query) && of(key(1), query) {
				return 0, nil
			}
			return 1, nil
		}
		type valueKey struct{}
		var others *manager.Locks
		first := func() weak.Pointer[[64]byte] {
			value := new([64]byte)
			r := request(key(1))
			r.CallerHolds = []pgsql.Key{key(7)} // so that its waits are noted
			locks, err := acquire(context.WithValue(t.Context(), valueKey{}, value), db, r)
			wantError(t, err, nil)
			others = take(t, db, key(2))
			wantError(t, locks.Release(), nil)
			return weak.Make(value)
		}()
		for range 2000 {
			if runtime.GC(); first.Value() == nil {
				break
			}
			time.Sleep(5 * time.Millisecond)
		}
		if n := srv.opened.Load(); first.Value() != nil || srv.open.Load() == 0 {
			t.Errorf("%s: kept: %v, %d sessions", name, first.Value() != nil, n)
		}
		wantError(t, others.Release(), nil)
	}
}
