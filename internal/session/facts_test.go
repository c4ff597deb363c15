package session_test

import (
	"context"
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
