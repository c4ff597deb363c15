package manager_test

import (
	"context"
	"errors"
	"io"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/pgadvisory/advisory/internal/lockconn"
	"github.com/pgadvisory/advisory/internal/manager"
	"github.com/pgadvisory/advisory/internal/pgsql"
	"github.com/pgadvisory/advisory/internal/session"
)

// A countdown ends when it has been asked for its Err so many times.
type countdown struct {
	context.Context
	done chan struct{}

	mu   sync.Mutex
	left int
}

func (c *countdown) Done() <-chan struct{} { return c.done }

func (c *countdown) Err() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.left--; c.left == 0 {
		close(c.done)
	}
	if c.left <= 0 {
		return context.Canceled
	}
	return nil
}

// Whenever ctx ends, its error gives no reason that is none.
func TestTheEndOfCtxBesideAFullPool(t *testing.T) {
	t.Parallel()
	for n := 1; n < 200; n++ {
		synctest.Test(t, func(t *testing.T) {
			db, srv := newDB(t)
			db.SetMaxOpenConns(2) // so that nobody waits in the server's queue
			srv.answer = taken(key(1), 100*time.Millisecond)
			ctx := &countdown{Context: context.Background(), left: n, done: make(chan struct{})}
			_, err := acquire(ctx, db, request(key(1)))
			var f *manager.Failure
			if !errors.As(err, &f) || f.Hint != "" {
				t.Errorf("%d: %v, hint %q", n, err, f.Hint)
			}
			time.Sleep(time.Minute)
			wantState(t, db, 0, 0)
		})
	}
}

// The reason why a session is lost before its locks are used is said once, and not for each of them.
func TestALossOfSeveralLocksIsSaidOnce(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		db, srv := newDB(t)
		_, err := acquireWatched(t.Context(), db, request(key(9)), time.Second) // has the common session watched
		wantError(t, err, nil)
		time.Sleep(1500 * time.Millisecond)
		synctest.Wait()
		var standby atomic.Bool
		srv.answer = func(_ context.Context, _ int, q string) (int64, error) {
			switch {
			case strings.Contains(q, "WHEN NOT pg_catalog.pg_try_"):
				time.Sleep(300 * time.Millisecond)
				standby.Store(true)
				return 3, nil
			case strings.Contains(q, "current_setting('advisory.session', true)") && standby.Load():
				return pgsql.OnStandby, nil
			}
			return 1, nil
		}
		_, err = acquireWatched(t.Context(), db, request(key(1), key(2), key(3)), 100*time.Millisecond)
		if err == nil || strings.Count(err.Error(), session.ErrStandby.Error()) != 1 {
			t.Errorf("error: %v", err)
		}
	})
}

// The error of a release may be the cause of another's ctx, as in an errgroup. To that one it is no loss.
func TestTheErrorOfAReleaseAsACause(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		db, srv := newDB(t)
		srv.answer = func(ctx context.Context, _ int, q string) (int64, error) {
			if of(key(5), q) {
				<-ctx.Done()
				return 0, ctx.Err()
			}
			return 1, nil
		}
		first := take(t, db, key(1))
		other := waitFor(t.Context(), db, request(key(5))) // loses the session
		err := first.Release()
		if err == nil || errors.As(err, new(lockconn.LostError)) {
			t.Errorf("the release: %T %v", err, err)
		}
		ctx, cancel := context.WithCancelCause(t.Context())
		cancel(err)
		time.Sleep(time.Second)
		_, got := acquire(ctx, db, request(key(3)))
		if errors.Unwrap(got) != err {
			t.Errorf("the acquisition: %T %v", errors.Unwrap(got), got)
		}
		<-other
	})
}

// Holders are told of a loss before the queues are. A shared caller who comes in between is not handed the
// grant that is over.
func TestASharedCallerWhoComesBetweenLossAndQueue(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		db, srv := newDB(t)
		srv.answer = func(_ context.Context, conn int, query string) (int64, error) {
			if conn == 1 && query == pgsql.Ping {
				return 0, io.ErrUnexpectedEOF
			}
			return 1, nil
		}
		shared := watched(db, request(key(1)), time.Minute)
		shared.Shared = true
		locks, err := manager.Acquire(t.Context(), shared)
		wantError(t, err, nil)
		told := make(chan error, 1)
		locks.Begin(func(error) {
			again := *shared
			locks, err := acquire(t.Context(), db, &again)
			if err == nil {
				err = locks.Release()
			}
			told <- err
		})
		wantError(t, locks.Ping(), io.ErrUnexpectedEOF)
		wantError(t, <-told, nil)
		wantError(t, locks.Release(), io.ErrUnexpectedEOF)
		synctest.Wait()
		wantState(t, db, 0, 0)
	})
}
