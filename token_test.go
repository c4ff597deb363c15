package advisory

import (
	"context"
	"database/sql"
	"errors"
	"io"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/DATA-DOG/go-sqlmock"
)

func TestTokenIsAskedForOnceOnTheHoldingSession(t *testing.T) {
	t.Parallel()
	for _, c := range closures {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			db, srv := newServer(t)
			srv.script = script(when(tokenQuery, reply{rows: 1<<40 + 7}))
			var after context.Context
			wantError(t, c.run(t.Context(), db, key, func(ctx context.Context) error {
				after = ctx
				derived, cancel := context.WithCancel(ctx)
				defer cancel()
				for _, ctx := range []context.Context{ctx, derived, ctx} {
					no, err := Token(ctx)
					wantError(t, err)
					if no != 1<<40+7 {
						t.Errorf("token %d", no)
					}
				}
				return nil
			}))
			srv.want(t, on(1, slices.Concat(c.acquires, []string{tokenQuery}, c.releases)...)...)

			_, err := Token(context.WithoutCancel(after))
			wantError(t, err, ErrLost, "token of bigint 42")
		})
	}
}

// The inner lock had to be waited for, which is on another session.
func TestTokenIsOfTheInnermostLock(t *testing.T) {
	t.Parallel()
	db, srv := newServer(t, granted, refused)
	wantError(t, WithLock(t.Context(), db, ID(1), func(ctx context.Context) error {
		return WithLock(ctx, db, ID(2), func(ctx context.Context) error {
			_, err := Token(ctx)
			return err
		})
	}))
	if !slices.Contains(srv.lines(), "2 "+tokenQuery) {
		t.Errorf("log: %q", srv.lines())
	}
}

func TestLockToken(t *testing.T) {
	t.Parallel()
	db, srv := newServer(t)
	l := take(t, db, key)
	for _, ask := range []func() (int64, error){
		func() (int64, error) { return l.Token(t.Context()) },
		func() (int64, error) { return Token(l.Context()) },
	} {
		no, err := ask()
		wantError(t, err)
		if no != 1 {
			t.Errorf("token %d", no)
		}
	}
	wantError(t, l.Release())
	_, err := l.Token(t.Context())
	wantError(t, err, ErrLost, "not held any more")
	srv.want(t, on(1, "open", tryQuery, tokenQuery, unlockQuery)...)
}

func TestTokenWithoutALockIsAnError(t *testing.T) {
	t.Parallel()
	_, err := Token(t.Context())
	wantError(t, err, "advisory: token of: ctx carries no lock")
}

func TestTokenUnderAnEndedCtxSendsNothing(t *testing.T) {
	t.Parallel()
	db, srv := newServer(t)
	l := take(t, db, key)
	cause := errors.New("cause")
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(cause)
	_, err := l.Token(ctx)
	wantError(t, err, context.Canceled, cause, "token of bigint 42: cause")
	wantError(t, l.Release())
	srv.want(t, on(1, "open", tryQuery, unlockQuery)...)
}

// A driver that breaks off a statement closes the session, and with it goes the lock.
func TestTheEndOfCtxDoesNotBreakOffToken(t *testing.T) {
	t.Parallel()
	for _, c := range closures[:4] {
		db, srv := newServer(t)
		wantError(t, c.run(t.Context(), db, key, func(ctx context.Context) error {
			ctx, cancel := context.WithCancel(ctx)
			srv.script = func(stmtCtx context.Context, _ int, query string) (int64, error) {
				if query == tokenQuery {
					cancel()
					return 99, stmtCtx.Err()
				}
				return 1, nil
			}
			no, err := Token(ctx)
			wantError(t, err)
			if no != 99 {
				t.Errorf("token %d", no)
			}
			return nil
		}))
		srv.want(t, on(1, slices.Concat(c.acquires, []string{tokenQuery}, c.releases)...)...)
	}
}

func TestTokenThatCannotBeHad(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name  string
		reply reply
		wants []any
	}{
		{"the session is gone", fails(io.ErrUnexpectedEOF), []any{ErrLost, io.ErrUnexpectedEOF, "token of bigint 42: lock lost"}},
		{"a standby", fails(pgError("25006")), []any{pgError("25006"), "token of bigint 42"}},
		{"PostgreSQL 12", fails(pgError("42883")), []any{pgError("42883"), "PostgreSQL 14"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			db, srv := newServer(t, granted, test.reply, reply{rows: 5}, done)
			l := take(t, db, key)
			_, err := l.Token(t.Context())
			wantError(t, err, test.wants...)
			if errors.Is(err, ErrLost) {
				_ = l.Release()
				return
			}
			no, err := l.Token(t.Context()) // an error is not remembered
			wantError(t, err)
			if no != 5 {
				t.Errorf("token %d", no)
			}
			wantError(t, l.Release())
			srv.want(t, on(1, "open", tryQuery, tokenQuery, tokenQuery, unlockQuery)...)
		})
	}
}

func TestATokenThatIsNoNumberIsAnError(t *testing.T) {
	t.Parallel()
	db, mock := newMock(t)
	mock.ExpectExec(tryQuery).WillReturnResult(sqlmock.NewResult(0, 1))
	mock.ExpectQuery(tokenQuery).WithoutArgs().WillReturnRows(sqlmock.NewRows([]string{"text"}).AddRow("(1,2)"))
	mock.ExpectExec(unlockQuery).WillReturnResult(sqlmock.NewResult(0, 1))
	wantError(t, WithLock(t.Context(), db, key, func(ctx context.Context) error {
		if no, err := Token(ctx); err == nil {
			t.Errorf("token %d", no)
		}
		return nil
	}))
}

// Heartbeat and token are two statements on one session at one time.
func TestTokenDuringAHeartbeatWaitsForIt(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		db, srv := newServer(t)
		under := false
		srv.script = func(context.Context, int, string) (int64, error) {
			if under {
				t.Error("two statements at once")
			}
			under = true
			time.Sleep(200 * time.Millisecond)
			under = false
			return 1, nil
		}
		wantError(t, WithLock(t.Context(), db, key, func(ctx context.Context) error {
			time.Sleep(1100 * time.Millisecond)
			_, err := Token(ctx)
			return err
		}))
		srv.want(t, on(1, "open", tryQuery, armQuery, tokenQuery, disarmQuery)...)
	})
}

func TestTokenOfAConnThatIsClosedIsErrLost(t *testing.T) {
	t.Parallel()
	db, _ := newServer(t)
	_ = WithConnLock(t.Context(), db, key, func(ctx context.Context, conn *sql.Conn) error {
		wantError(t, conn.Close())
		_, err := Token(ctx)
		wantError(t, err, ErrLost, sql.ErrConnDone)
		return nil
	})
}

func TestTokenOfATransactionThatHasEndedIsErrLost(t *testing.T) {
	t.Parallel()
	db, _ := newServer(t)
	_ = WithTxLock(t.Context(), db, key, func(ctx context.Context, tx *sql.Tx) error {
		wantError(t, tx.Commit())
		_, err := Token(ctx)
		wantError(t, err, ErrLost, sql.ErrTxDone)
		return nil
	})
}

// Token and Release meet: the token is one of before the unlock, or none. A later one
// could be larger than the next holder's.
func TestATokenIsNotAskedForAfterTheUnlock(t *testing.T) {
	t.Parallel()
	bad := 0
	const n = 200
	for range n {
		db, srv := newServer(t)
		unlocking, unlock := make(chan struct{}), make(chan struct{})
		srv.script = func(_ context.Context, _ int, query string) (int64, error) {
			if query == unlockQuery {
				close(unlocking)
				<-unlock
			}
			return 1, nil
		}
		l := take(t, db, key)
		var wg sync.WaitGroup
		_, err := l.Token(errCtx{context.Background(), func() { // in the moment between
			wg.Go(func() { _ = l.Release() })
			<-unlocking
			time.AfterFunc(100*time.Microsecond, func() { close(unlock) })
		}})
		wg.Wait()
		if err == nil {
			bad++
		}
	}
	if bad > 0 {
		t.Errorf("%d of %d tokens were taken after the unlock", bad, n)
	}
}

type errCtx struct {
	context.Context
	asked func()
}

func (c errCtx) Err() error { c.asked(); return nil }
