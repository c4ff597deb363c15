package session_test

import (
	"context"
	"log/slog"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/pgadvisory/advisory/internal/pgsql"
	"github.com/pgadvisory/advisory/internal/session"
)

// A pool whose connections are not all of one type.
func TestAPoolOfTwoTypes(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		pool, srv := newPool(t)
		srv.direct = true
		s1 := open(t, pool, session.ForLocks)
		srv.direct = false
		s2 := open(t, pool, session.ForLocks)
		srv.answer = hangs
		_, err := s2.Exec(context.Background(), time.Second, "mine")
		if !pgsql.IsNoAnswer(err) {
			t.Errorf("error: %v", err)
		}
		s2.Discard()
		srv.answer = nil
		s1.Discard()
	})
}

// A panic in a statement by database/sql leaves no bound behind.
func TestAPanicLeavesNoBound(t *testing.T) {
	kinds(t, func(t *testing.T, pool session.Pool, srv *server) {
		s := open(t, pool, session.ForLocks)
		wantPanic(t, func() {
			_ = s.Do(context.Background(), time.Second, func(context.Context) error { panic("mine") })
		})
		time.Sleep(2 * time.Second)
		srv.answer = func(ctx context.Context, _ string) (int64, error) { return 1, ctx.Err() }
		_, err := s.Exec(context.Background(), session.AnswerBound, "next")
		wantError(t, err, nil)
		s.Discard()
	})
}

// Who finds a place in the pool that another then takes waits for others, and not for the server: for longer
// than a connection may take to be made.
func TestAPlaceThatAnotherTakes(t *testing.T) {
	t.Parallel()
	const callers = 40
	for range 50 {
		synctest.Test(t, func(t *testing.T) {
			pool, _ := newPool(t)
			pool.DB.SetMaxOpenConns(2)
			var wg sync.WaitGroup
			for range callers {
				wg.Go(func() {
					s, err := pool.Open(t.Context(), slog.New(slog.DiscardHandler), session.ForLocks)
					wantError(t, err, nil)
					if err == nil {
						time.Sleep(time.Minute)
						s.HandBack()
					}
				})
			}
			wg.Wait()
		})
	}
}

// A connection that is not made in time is no wait for others, though it takes the only place.
func TestAConnectionThatIsNotMade(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		pool, srv := newPool(t)
		pool.DB.SetMaxOpenConns(1)
		srv.dial = func(ctx context.Context) error { <-ctx.Done(); return ctx.Err() }
		start := time.Now()
		_, err := pool.Open(context.Background(), slog.New(slog.DiscardHandler), session.ForLocks)
		if took := time.Since(start); !pgsql.IsNoAnswer(err) || took != 30*time.Second {
			t.Errorf("after %v: %v", took, err)
		}
	})
}
