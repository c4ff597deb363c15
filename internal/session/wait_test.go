package session_test

import (
	"context"
	"database/sql"
	"log/slog"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/pgadvisory/advisory/internal/pgsql"
	"github.com/pgadvisory/advisory/internal/session"
)

// isWait tells whether a statement waits for a lock.
func isWait(query string) bool {
	return strings.Contains(query, ", pg_catalog.pg_advisory_lock(")
}

// contended is a server on which another holds the lock, and a wait is answered by wait.
func contended(wait func(context.Context, string) (int64, error)) func(context.Context, string) (int64, error) {
	return func(ctx context.Context, query string) (int64, error) {
		switch {
		case isWait(query):
			return wait(ctx, query)
		case strings.Contains(query, "pg_try_advisory_lock("):
			return 0, nil
		}
		return 1, nil
	}
}

// sent is what has happened on the first connection, with "wait" for a statement that waits.
func (srv *server) sent() (lines []string) {
	srv.mu.Lock()
	defer srv.mu.Unlock()
	for _, l := range srv.log {
		if l = strings.TrimPrefix(l, "1 "); isWait(l) {
			l = "wait"
		}
		lines = append(lines, l)
	}
	return lines
}

func wantSent(t *testing.T, srv *server, lines ...string) {
	t.Helper()
	if got := strings.Join(srv.sent(), "\n"); got != strings.Join(append([]string{"open"}, lines...), "\n") {
		t.Errorf("sent:\n%s", got)
	}
}

// A wait is made of slices, until it is granted. Who does not wait is refused by the try.
func TestLock(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name   string
		waits  []int64 // the answers
		noWait bool
		sent   []string
		want   error
	}{
		{"free", nil, false, []string{try}, nil},
		{"granted by the second slice", []int64{0, 1}, false, []string{try, "wait", "wait"}, nil},
		{"not waited for", []int64{0}, true, []string{try}, session.ErrRefused},
		{"on a standby", []int64{pgsql.OnStandby}, false, []string{try, "wait"}, session.ErrStandby},
	} {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				pool, srv := newPool(t)
				if len(test.waits) > 0 {
					srv.answer = contended(func(context.Context, string) (int64, error) {
						rows := test.waits[0]
						test.waits = test.waits[1:]
						return rows, nil
					})
				}
				s := open(t, pool, session.ForLocks)
				wantError(t, s.Lock(t.Context(), key, test.noWait, time.Now()), test.want)
				wantSent(t, srv, test.sent...)
				s.Discard()
			})
		})
	}
}

// A grant that comes when ctx has ended is not used.
func TestAGrantThatComesTooLate(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		pool, srv := newPool(t)
		s := open(t, pool, session.ForLocks)
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		srv.answer = first(after(time.Second + session.Grace/2))
		err := s.Lock(ctx, key, false, time.Now())
		wantError(t, err, context.DeadlineExceeded)
		s.GiveUp(ctx, err)
		wantSent(t, srv, try, pgsql.UnlockAll)
	})
}

// At the end of ctx, a wait is left to end by itself: to break it off would cost the connection.
// What it gets is unlocked then. A statement on a connection of the caller's is not left.
func TestAWaitIsLeftAtTheEndOfCtx(t *testing.T) {
	t.Parallel()
	for _, callers := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			pool, srv := newPool(t)
			s := open(t, pool, session.ForLocks)
			var ended atomic.Bool
			s.OnEnd = func() { ended.Store(true) }
			if callers {
				s = session.OnConn(s.Conn(), slog.New(slog.DiscardHandler), false)
			}
			srv.answer = contended(after(300 * time.Millisecond)) // granted too late
			ctx, cancel := context.WithCancel(t.Context())
			time.AfterFunc(100*time.Millisecond, cancel)
			start := time.Now()
			err := s.Wait(ctx, key, start)
			if callers {
				wantError(t, err, nil) // granted, as it is
				wantTook(t, start, 300*time.Millisecond)
				return
			}
			wantError(t, err, context.Canceled)
			s.GiveUp(ctx, err)
			wantTook(t, start, 100*time.Millisecond)
			if wantSent(t, srv, "wait"); ended.Load() {
				t.Error("it has ended before its statement")
			}
			time.Sleep(time.Second)
			wantSent(t, srv, "wait", pgsql.UnlockAll)
			if !ended.Load() || pool.DB.Stats().Idle != 1 {
				t.Errorf("it has not been handed back: %+v", pool.DB.Stats())
			}
		})
	}
}

// A driver that does not return from a wait is left behind, and what it answers later is nobody's.
func TestADriverThatDoesNotReturnFromAWaitIsAbandoned(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		pool, srv := newPool(t)
		s := open(t, pool, session.ForConn)
		srv.answer = contended(after(time.Hour))
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		err := s.Wait(ctx, key, time.Now())
		if !pgsql.IsNoAnswer(err) {
			t.Errorf("error %v, want that there was no answer", err)
		}
		s.GiveUp(ctx, err)
		time.Sleep(time.Hour)
		synctest.Wait()
		wantSent(t, srv, "wait", "close")
	})
}

// The driver's panic in a wait is that of who waits, and leaves the turn and the connection as they
// are to be.
func TestADriverThatPanicsInAWait(t *testing.T) {
	t.Parallel()
	kinds(t, func(t *testing.T, pool session.Pool, srv *server) {
		s := open(t, pool, session.ForLocks)
		srv.answer = contended(func(context.Context, string) (int64, error) { panic("mine") })
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		wantPanic(t, func() { _ = s.Wait(ctx, key, time.Now()) })
		start := time.Now()
		_, err := s.Exec(t.Context(), session.AnswerBound, "next")
		wantError(t, err, sql.ErrConnDone) // database/sql has closed it
		s.Discard()
		wantTook(t, start, 0) // nobody has the turn
		wantSent(t, srv, "wait", "close")
	})
}

// Where the server does not execute the statement that waits, who waits tries again and again, and
// the next one knows it.
func TestWhereWaitsAreRefused(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		pool, srv := newPool(t)
		tries := 0
		srv.answer = func(_ context.Context, query string) (int64, error) {
			switch {
			case isWait(query):
				return 0, serverError("42501")
			case query == try:
				tries++
				return int64(tries / 3), nil // the third one is granted
			}
			return 1, nil
		}
		for _, sent := range [][]string{
			{try, "wait", pgsql.UnlockAll, try, try},
			{try, "wait", pgsql.UnlockAll, try, try, unlock, try, try, try},
		} {
			tries = 0
			s := open(t, pool, session.ForLocks)
			wantError(t, s.Lock(t.Context(), key, false, time.Now()), nil)
			wantSent(t, srv, sent...)
			wantError(t, s.Release(), nil)
		}
		if !pool.RefusesWaits() {
			t.Error("the pool does not know it")
		}
	})
}
