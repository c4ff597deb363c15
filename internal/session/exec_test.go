package session_test

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/pgadvisory/advisory/internal/pgsql"
	"github.com/pgadvisory/advisory/internal/session"
)

// abandonAfter is that of run.go.
const abandonAfter = 200 * time.Millisecond

// kinds runs a test in virtual time with a driver that goes by contexts, and with one that is known,
// and broken off at the network connection.
func kinds(t *testing.T, f func(t *testing.T, pool session.Pool, srv *server)) {
	for name, direct := range map[string]bool{"by its context": false, "at the network connection": true} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				pool, srv := newPool(t)
				srv.direct = direct
				f(t, pool, srv)
			})
		})
	}
}

// Whoever sends, and by which method, there is one statement at a time on a session.
func TestOneStatementAtATime(t *testing.T) {
	t.Parallel()
	kinds(t, func(t *testing.T, pool session.Pool, srv *server) {
		s := open(t, pool, session.ForLocks)
		var under atomic.Int32
		srv.answer = func(context.Context, string) (int64, error) {
			if under.Add(1) > 1 {
				t.Error("two statements at once")
			}
			time.Sleep(time.Millisecond)
			under.Add(-1)
			return 1, nil
		}
		var wg sync.WaitGroup
		for range 10 {
			wg.Go(func() {
				_, err := s.Exec(t.Context(), session.AnswerBound, "exec")
				wantError(t, err, nil)
			})
			wg.Go(func() {
				_, err := s.ExecQuiet(t.Context(), session.AnswerBound, "quiet")
				wantError(t, err, nil)
			})
			wg.Go(func() {
				wantError(t, s.Do(t.Context(), session.AnswerBound, func(ctx context.Context) error {
					_, err := s.Conn().ExecContext(ctx, "do")
					return err
				}), nil)
			})
		}
		start := time.Now()
		wg.Wait()
		wantTook(t, start, 30*time.Millisecond)
		s.HandBack()
	})
}

// A statement that is not answered within its bound is broken off, and nothing is sent any more.
func TestABoundBreaksOffAStatement(t *testing.T) {
	t.Parallel()
	kinds(t, func(t *testing.T, pool session.Pool, srv *server) {
		s := open(t, pool, session.ForLocks)
		srv.answer = hangs
		start := time.Now()
		_, err := s.Exec(context.Background(), 3*time.Second, "mine")
		wantTook(t, start, 3*time.Second)
		if !pgsql.IsNoAnswer(err) {
			t.Errorf("error: %v", err)
		}
		s.Discard()
		srv.want(t, "mine", "close")
	})
}

// Where the network connection has been broken off, it is of no use any more, even if the answer came.
func TestAnAnswerOverAConnectionThatWasBrokenOff(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		pool, srv := newPool(t)
		srv.direct = true
		s := open(t, pool, session.ForLocks)
		srv.answer = after(1001 * time.Millisecond)
		rows, err := s.Exec(context.Background(), time.Second, "mine")
		if rows != 1 || err != nil {
			t.Errorf("%d rows, %v", rows, err)
		}
		s.Discard()
		srv.want(t, "mine", "close")
	})
}

// An answer that comes within Grace of the end of ctx is one: to break the statement off would cost
// the connection.
func TestTheEndOfCtxLeavesGraceToTheAnswer(t *testing.T) {
	t.Parallel()
	const end = time.Second
	kinds(t, func(t *testing.T, pool session.Pool, srv *server) {
		ctx, cancel := context.WithTimeout(t.Context(), end)
		defer cancel()
		s := open(t, pool, session.ForLocks)
		srv.answer = after(end + session.Grace - 1)
		rows, err := s.Exec(ctx, session.AnswerBound, "mine")
		if rows != 1 || err != nil {
			t.Errorf("%d rows, %v", rows, err)
		}
		s.HandBack()
		srv.want(t, "mine")
	})
	for _, test := range []struct {
		name  string
		cause error // of the end of ctx
		want  error
	}{
		{"ended", context.Canceled, context.Canceled},
		{"by a Timeout", session.ErrTimeout, pgsql.NoAnswer{After: session.Grace}}, // the server's fault
	} {
		t.Run(test.name, func(t *testing.T) {
			kinds(t, func(t *testing.T, pool session.Pool, srv *server) {
				ctx, cancel := context.WithCancelCause(t.Context())
				time.AfterFunc(end, func() { cancel(test.cause) })
				s := open(t, pool, session.ForLocks)
				srv.answer = first(hangs)
				start := time.Now()
				_, err := s.Exec(ctx, session.AnswerBound, "mine")
				wantTook(t, start, end+session.Grace)
				wantError(t, err, test.want)
				s.Discard()
				srv.want(t, "mine", "close") // what it holds is not known
			})
		})
	}
}

// A driver that does not return is left behind. Nothing more is sent, and the connection is closed,
// and the session has ended, when the driver returns.
func TestADriverThatDoesNotReturnIsAbandoned(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		pool, srv := newPool(t)
		s := open(t, pool, session.ForLocks)
		var ended atomic.Bool
		s.OnEnd = func() { ended.Store(true) }
		srv.answer = after(time.Hour)
		start := time.Now()
		_, err := s.Exec(context.Background(), time.Second, "mine")
		wantTook(t, start, time.Second+abandonAfter)
		wantError(t, err, pgsql.NoAnswer{After: time.Second})
		_, err = s.Exec(context.Background(), time.Second, "after")
		wantError(t, err, driver.ErrBadConn)
		wantTook(t, start, time.Second+abandonAfter)
		s.Discard()
		wantTook(t, start, time.Second+2*abandonAfter)
		if srv.want(t, "mine"); ended.Load() {
			t.Error("it has ended before the driver has returned")
		}
		time.Sleep(time.Hour)
		synctest.Wait()
		if srv.want(t, "mine", "close"); !ended.Load() {
			t.Error("it has not ended")
		}
	})
}

// A ctx that ends before it is the statement's turn ends the wait for it. Nothing is sent, and the
// session is as good as before; so does the bound.
func TestACtxEndsBeforeTheStatementGoesOut(t *testing.T) {
	t.Parallel()
	kinds(t, func(t *testing.T, pool session.Pool, srv *server) {
		s := open(t, pool, session.ForLocks)
		srv.answer = after(5 * time.Second)
		var other sync.WaitGroup
		other.Go(func() { _, _ = s.Exec(context.Background(), session.AnswerBound, "another's") })
		synctest.Wait()
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		start := time.Now()
		_, err := s.Exec(ctx, session.AnswerBound, "mine")
		wantError(t, err, context.DeadlineExceeded)
		wantTook(t, start, time.Second)
		_, err = s.Exec(context.Background(), time.Second, "mine, too")
		wantError(t, err, pgsql.NoAnswer{After: time.Second})
		wantTook(t, start, 2*time.Second)
		other.Wait()

		// The next one has its own time.
		_, err = s.Exec(t.Context(), session.AnswerBound, "next")
		wantError(t, err, nil)
		s.HandBack()
		srv.want(t, "another's", "next")
	})
}

// The bound of a statement that has been answered is not the next one's.
func TestAnAnsweredStatementsBoundIsOver(t *testing.T) {
	t.Parallel()
	kinds(t, func(t *testing.T, pool session.Pool, srv *server) {
		s := open(t, pool, session.ForLocks)
		srv.answer = after(800 * time.Millisecond)
		for range 3 {
			for _, bound := range []time.Duration{time.Second, session.AnswerBound, 0} {
				_, err := s.Exec(context.Background(), bound, "mine")
				wantError(t, err, nil)
			}
		}
		s.HandBack()
	})
}

// An answer may come in the moment in which the statement is broken off, with the next statement
// behind it. In real time.
func TestAnAnswerInTheMomentOfTheBound(t *testing.T) {
	t.Parallel()
	for _, direct := range []bool{false, true} {
		pool, srv := newPool(t)
		srv.direct = direct
		for i := range 300 {
			s := open(t, pool, session.ForLocks)
			srv.answer = first(after(time.Duration(200+i%40) * time.Microsecond))
			_, err := s.Exec(t.Context(), 200*time.Microsecond, "mine")
			_, next := s.Exec(t.Context(), session.AnswerBound, "next")
			switch {
			case err != nil && !pgsql.IsNoAnswer(err):
				t.Errorf("error: %v", err)
			case !direct && next != nil: // whose network connection is broken off with it
				t.Errorf("the next one: %v", next)
			}
			s.Discard()
		}
	}
}

// The driver's panic is that of who has sent the statement. database/sql closes the connection, and
// the session can be ended.
func TestADriversPanicGoesOnToItsCaller(t *testing.T) {
	t.Parallel()
	kinds(t, func(t *testing.T, pool session.Pool, srv *server) {
		s := open(t, pool, session.ForLocks)
		srv.answer = first(func(context.Context, string) (int64, error) { panic("mine") })
		wantPanic(t, func() { _, _ = s.Exec(t.Context(), session.AnswerBound, "mine") })
		start := time.Now()
		_, err := s.Exec(t.Context(), session.AnswerBound, "next")
		wantError(t, err, sql.ErrConnDone)
		s.Discard()
		wantTook(t, start, 0) // nobody has the turn
		srv.want(t, "mine", "close")
	})
}
