package session_test

import (
	"context"
	"database/sql"
	"errors"
	"log/slog"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/pgadvisory/advisory/internal/pgsql"
	"github.com/pgadvisory/advisory/internal/session"
)

// clearBound is that of run.go.
const clearBound = time.Second

// A session ends once. Its connection is idle in the pool again, or closed.
func wantEnded(t *testing.T, pool session.Pool, ends *atomic.Int32, idle bool) {
	t.Helper()
	synctest.Wait()
	stats := pool.DB.Stats()
	if n := ends.Load(); n != 1 || stats.InUse != 0 || (stats.Idle == 1) != idle {
		t.Errorf("ended %d times, %d connections in use, %d idle", n, stats.InUse, stats.Idle)
	}
}

// HandBack sends nothing: the connection is clean.
func TestHandBackSendsNothing(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		pool, srv := newPool(t)
		s := open(t, pool, session.ForLocks)
		var ends atomic.Int32
		s.OnEnd = func() { ends.Add(1) }
		s.HandBack()
		srv.want(t)
		wantEnded(t, pool, &ends, true)
	})
}

// A session whose state is in doubt does not go back to the pool: HandBack closes its connection.
func TestHandBackClosesWhatIsInDoubt(t *testing.T) {
	t.Parallel()
	exec := func(s *session.Session) { _, _ = s.Exec(context.Background(), time.Second, "mine") }
	for _, test := range []struct {
		name   string
		direct bool
		answer func(context.Context, string) (int64, error)
		before func(*session.Session)
		sent   []string
	}{
		{"gone", false, gives(0, died), exec, []string{"mine"}},
		{"not answered", false, hangs, exec, []string{"mine"}},
		{"broken off in the moment of the answer", true, after(1001 * time.Millisecond), exec, []string{"mine"}},
		{"broken off", false, nil, func(s *session.Session) { s.Interrupt(died) }, nil},
	} {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				pool, srv := newPool(t)
				srv.direct, srv.answer = test.direct, test.answer
				s := open(t, pool, session.ForLocks)
				var ends atomic.Int32
				s.OnEnd = func() { ends.Add(1) }
				test.before(s)
				s.HandBack()
				time.Sleep(time.Minute) // until the driver has returned
				srv.want(t, append(test.sent, "close")...)
				wantEnded(t, pool, &ends, false)
			})
		})
	}
}

// Discard frees the locks, and undoes the settings, before it closes the connection: what a driver's
// Close does is not certain. It does not if the session is gone, and waits only a moment.
func TestDiscardFreesTheLocksAndClosesTheConnection(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name   string
		before func(s *session.Session, srv *server)
		sent   func(s *session.Session) []string
		took   time.Duration
	}{
		{"as it is", nil, func(*session.Session) []string { return []string{pgsql.UnlockAll} }, 0},
		{"with settings", func(s *session.Session, _ *server) { s.ChangeIdleTimeout(time.Minute) }, func(s *session.Session) []string {
			return []string{s.Reset() + pgsql.UnlockAll}
		}, 0},
		{"gone", func(s *session.Session, srv *server) {
			srv.answer = gives(0, died)
			_, _ = s.Exec(context.Background(), session.AnswerBound, "mine")
		}, func(*session.Session) []string { return []string{"mine"} }, 0},
		{"broken off", func(s *session.Session, _ *server) { s.Interrupt(died) }, func(*session.Session) []string { return nil }, 0},
		{"not answered", func(_ *session.Session, srv *server) { srv.answer = hangs }, func(*session.Session) []string {
			return []string{pgsql.UnlockAll}
		}, abandonAfter},
	} {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				pool, srv := newPool(t)
				s := open(t, pool, session.ForLocks)
				var ends atomic.Int32
				s.OnEnd = func() { ends.Add(1) }
				if test.before != nil {
					test.before(s, srv)
				}
				start := time.Now()
				s.Discard()
				wantTook(t, start, test.took)
				time.Sleep(clearBound)
				srv.want(t, append(test.sent(s), "close")...)
				wantEnded(t, pool, &ends, false)
			})
		})
	}
}

// GiveUp hands a session back if its state is known, and frees what it may hold first. Otherwise
// it discards it.
func TestGiveUpHandsBackWhatIsKnown(t *testing.T) {
	t.Parallel()
	ended, cancel := context.WithCancel(context.Background())
	cancel()
	for _, test := range []struct {
		name string
		held bool
		ctx  context.Context
		err  error
		sent []string // and "close": it is discarded
	}{
		{"refused", false, context.Background(), session.ErrRefused, nil},
		{"yields", false, context.Background(), session.ErrYield, nil},
		{"ctx has ended", false, ended, context.Canceled, nil},
		{"a grant came too late", true, ended, context.Canceled, []string{try, pgsql.UnlockAll}},
		{"an error of ctx's, which lives", false, context.Background(), context.Canceled, []string{pgsql.UnlockAll, "close"}},
		{"the server's error", false, context.Background(), serverError("53200"), []string{pgsql.UnlockAll, "close"}},
		{"a standby", false, context.Background(), session.ErrStandby, []string{pgsql.UnlockAll, "close"}},
		{"the server's error, at the end of ctx", false, ended, serverError("53200"), []string{pgsql.UnlockAll, "close"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				pool, srv := newPool(t)
				s := open(t, pool, session.ForLocks)
				var ends atomic.Int32
				s.OnEnd = func() { ends.Add(1) }
				if test.held {
					wantError(t, s.Lock(t.Context(), key, false, time.Now()), nil)
				}
				s.GiveUp(test.ctx, test.err)
				synctest.Wait()
				srv.want(t, test.sent...)
				n := len(test.sent)
				wantEnded(t, pool, &ends, n == 0 || test.sent[n-1] != "close")
			})
		})
	}
}

// GiveUp returns at once if ctx has ended, and soon otherwise. What it has to send goes on.
func TestGiveUpDoesNotWaitForLong(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name string
		end  bool // of ctx
		took time.Duration
	}{{"ctx has ended", true, 0}, {"ctx lives", false, abandonAfter}} {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				pool, srv := newPool(t)
				s := open(t, pool, session.ForLocks)
				var ends atomic.Int32
				s.OnEnd = func() { ends.Add(1) }
				wantError(t, s.Lock(t.Context(), key, false, time.Now()), nil)
				ctx, cancel := context.WithCancel(t.Context())
				defer cancel()
				err := session.ErrRefused
				if test.end {
					cancel()
					err = ctx.Err()
				}
				srv.answer = after(time.Second)
				start := time.Now()
				s.GiveUp(ctx, err)
				wantTook(t, start, test.took)
				time.Sleep(2 * time.Second)
				srv.want(t, try, pgsql.UnlockAll)
				wantEnded(t, pool, &ends, true)
			})
		})
	}
}

// Release is one round trip. Only if the server says that the lock was held is the connection handed
// back.
func TestReleaseIsOfALockThatWasHeld(t *testing.T) {
	t.Parallel()
	exposed := pgsql.UnlockExposed([]pgsql.Key{key}, false)
	for _, test := range []struct {
		name string
		use  session.Use
		rows int64
		err  error
		sent []string // after the try
		want error
	}{
		{"held", session.ForLocks, 1, nil, []string{unlock}, nil},
		{"not held", session.ForLocks, 0, nil, []string{unlock, pgsql.UnlockAll, "close"}, session.ErrNotHeld},
		{"the server's error", session.ForLocks, 0, serverError("XX000"), []string{unlock, pgsql.UnlockAll, "close"}, serverError("XX000")},
		{"gone", session.ForLocks, 0, died, []string{unlock, "close"}, died},
		{"fn's conn", session.ForConn, 1, nil, []string{exposed}, nil},
		{"a transaction is left open", session.ForConn, 2, nil, []string{exposed, "close"}, session.ErrLeftOpen},
		{"a failed transaction is left open", session.ForConn, 0, serverError("25P02"), []string{exposed, "close"}, session.ErrLeftOpen},
	} {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				pool, srv := newPool(t)
				s := open(t, pool, test.use)
				s.SetIdleTimeout(time.Minute)
				var ends atomic.Int32
				s.OnEnd = func() { ends.Add(1) }
				wantError(t, s.Lock(t.Context(), key, false, time.Now()), nil)
				srv.mu.Lock()
				srv.log = srv.log[:1] // as it was open
				srv.mu.Unlock()
				reset := s.Reset()
				srv.answer = first(gives(test.rows, test.err))
				wantError(t, s.Release(), test.want)
				for i := range test.sent {
					if test.sent[i] != "close" {
						test.sent[i] = reset + test.sent[i]
					}
				}
				srv.want(t, test.sent...)
				wantEnded(t, pool, &ends, test.want == nil)
			})
		})
	}
}

// A release looks for a connection that fn has closed, and does not wait for a driver that does not return.
func TestReclaimDoesNotWaitForLong(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		pool, srv := newPool(t)
		s := open(t, pool, session.ForConn)
		wantError(t, s.Lock(t.Context(), key, false, time.Now()), nil)
		wantError(t, s.Conn().Close(), nil)
		srv.answer = func(context.Context, string) (int64, error) {
			time.Sleep(time.Hour)
			return 1, nil
		}
		start := time.Now()
		wantError(t, s.Release(), sql.ErrConnDone)
		if took := time.Since(start); took > 2*time.Second {
			t.Errorf("after %v", took)
		}
		time.Sleep(2 * time.Hour)
		if open := pool.DB.Stats().OpenConnections; open != 0 {
			t.Errorf("%d connections are open", open)
		}
	})
}

// What is known of a connection of the caller's after an error leaves it alone. Otherwise it is
// closed, with what the caller had on it.
func TestTheCallersConnectionIsLeftAlone(t *testing.T) {
	t.Parallel()
	tryCallers := pgsql.TryCallers(key, false)
	held := pgsql.UnlockHeld([]pgsql.Key{key}, false)
	acquire := func(ctx context.Context, s *session.Session) error {
		err := s.Lock(ctx, key, true, time.Now())
		if err != nil {
			s.GiveUp(ctx, err)
		}
		return err
	}
	release := func(_ context.Context, s *session.Session) error { return s.Unlock(key) }
	for _, test := range []struct {
		name string
		does func(context.Context, *session.Session) error
		rows int64
		err  error
		sent []string
		want error
	}{
		{"granted", acquire, 1, nil, []string{tryCallers}, nil},
		{"refused", acquire, 0, nil, []string{tryCallers}, session.ErrRefused},
		{"in a transaction", acquire, pgsql.CallersInTx, nil, []string{tryCallers}, session.ErrInTransaction},
		{"in a failed transaction", acquire, 0, serverError("25P02"), []string{tryCallers}, session.ErrInTransaction},
		{"held already", acquire, pgsql.CallersHeld, nil, []string{tryCallers}, session.ErrReentrant},
		{"the server's error", acquire, 0, serverError("53200"), []string{tryCallers, pgsql.UnlockAll, "close"}, serverError("53200")},
		{"gone", acquire, 0, died, []string{tryCallers, "close"}, died},
		{"released", release, 1, nil, []string{held}, nil},
		{"not held", release, 0, nil, []string{held}, session.ErrNotHeld},
		{"the release fails", release, 0, serverError("XX000"), []string{held, pgsql.UnlockAll, "close"}, serverError("XX000")},
	} {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				pool, srv := newPool(t)
				conn, err := pool.DB.Conn(t.Context())
				wantError(t, err, nil)
				defer conn.Close()
				s := session.OnConn(conn, slog.New(slog.DiscardHandler), false)
				srv.answer = first(gives(test.rows, test.err))
				wantError(t, test.does(t.Context(), s), test.want)
				srv.want(t, test.sent...)
				_, err = conn.ExecContext(t.Context(), "the caller's")
				if closed := test.sent[len(test.sent)-1] == "close"; errors.Is(err, sql.ErrConnDone) != closed {
					t.Errorf("the caller goes on: %v", err)
				}
			})
		})
	}
}

// A driver that panics while a session is discarded does not keep the session from being counted as ended.
func TestADriverThatPanicsInADiscard(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		pool, srv := newPool(t)
		s := open(t, pool, session.ForLocks)
		var ends atomic.Int32
		s.OnEnd = func() { ends.Add(1) }
		srv.answer = func(context.Context, string) (int64, error) { panic("the driver's") }
		func() {
			defer func() {
				if p := recover(); p != "the driver's" {
					t.Errorf("panicked: %v", p)
				}
			}()
			s.Discard()
		}()
		wantEnded(t, pool, &ends, false)
	})
}
