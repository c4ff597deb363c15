package advisory

import (
	"context"
	"database/sql"
	"errors"
	"io"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/DATA-DOG/go-sqlmock"
)

// However many locks there are, the server is asked one thing.
func TestStatementsOfTheHeartbeat(t *testing.T) {
	t.Parallel()
	const (
		beat = "SELECT FROM pg_catalog.generate_series(1, CASE WHEN pg_catalog.pg_is_in_recovery() THEN 2" +
			" WHEN pg_catalog.current_setting('advisory.session', true) OPERATOR(pg_catalog.=) 'N' THEN 1 ELSE 0 END)"
		set = "SELECT pg_catalog.set_config('advisory.session', 'N', false), pg_catalog.set_config('idle_session_timeout', '60000', false); "
	)
	synctest.Test(t, func(t *testing.T) {
		db, mock := newMock(t)
		result := func(query string, n int64) {
			mock.ExpectExec(query).WithoutArgs().WillReturnResult(sqlmock.NewResult(0, n))
		}
		result("SELECT FROM pg_catalog.generate_series(1, CASE WHEN pg_catalog.pg_is_in_recovery() THEN 0 WHEN NOT pg_catalog.pg_try_advisory_lock(-1) THEN 0"+
			" WHEN NOT pg_catalog.pg_try_advisory_lock(4294967298) THEN 1"+
			" WHEN NOT pg_catalog.pg_try_advisory_lock(7440995589958059143) THEN 2"+
			" WHEN NOT pg_catalog.pg_try_advisory_lock(-7, -2147483647-1) THEN 3 ELSE 4 END)", 4)
		result("/* advisory: -1, 4294967298, nightly-report, -7.-2147483648 */ "+set+beat, 1)
		result("/* advisory: -1, 4294967298, nightly-report, -7.-2147483648 */ "+beat, 1)
		result("RESET advisory.session; RESET idle_session_timeout; SELECT WHERE pg_catalog.pg_advisory_unlock(-1)"+
			" AND pg_catalog.pg_advisory_unlock(4294967298) AND pg_catalog.pg_advisory_unlock(7440995589958059143)"+
			" AND pg_catalog.pg_advisory_unlock(-7, -2147483647-1)", 1)
		wantError(t, WithLocks(t.Context(), db, []Key{Pair(-7, -2147483648), ID(1<<32 + 2), ID(-1), Name("nightly-report")}, func(context.Context) error {
			time.Sleep(50 * time.Second)
			return nil
		}, Heartbeat(20*time.Second), HolderTimeout(time.Minute)))
	})
}

// Each session has a nonce of its own, and the same one for as long as it has locks.
func TestTheNonceOfASession(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		db, srv := newServer(t)
		var nonces []string
		srv.script = func(_ context.Context, _ int, query string) (int64, error) {
			if isBeat(query) {
				nonces = append(nonces, beatOf.FindStringSubmatch(query)[1])
				if m := nonceOf.FindStringSubmatch(query); m != nil && m[1] != nonces[len(nonces)-1] {
					t.Errorf("sets %s and asks for %s", m[1], nonces[len(nonces)-1])
				}
			}
			return 1, nil
		}
		for range 2 {
			wantError(t, WithLock(t.Context(), db, key, func(context.Context) error {
				time.Sleep(2500 * time.Millisecond)
				return nil
			}))
		}
		if len(nonces) != 4 || nonces[0] != nonces[1] || nonces[2] != nonces[3] || nonces[0] == nonces[2] || len(nonces[0]) < 5 {
			t.Errorf("nonces %q", nonces)
		}
	})
}

func TestAHeldLockIsCheckedEveryHeartbeatAndTheServerArmedOnce(t *testing.T) {
	t.Parallel()
	for _, c := range closures[:3] {
		synctest.Test(t, func(t *testing.T) {
			db, srv := newServer(t)
			var at []time.Duration
			start := time.Now()
			srv.script = func(_ context.Context, _ int, query string) (int64, error) {
				if isBeat(query) {
					at = append(at, time.Since(start))
					time.Sleep(100 * time.Millisecond) // the answer takes a while
				}
				return 1, nil
			}
			wantError(t, c.run(t.Context(), db, key, func(ctx context.Context) error {
				time.Sleep(3500 * time.Millisecond)
				return ctx.Err()
			}))
			srv.want(t, on(1, "open", tryQuery, armQuery, beatQuery, beatQuery, disarmQuery)...)
			if !slices.Equal(at, []time.Duration{time.Second, 2 * time.Second, 3 * time.Second}) {
				t.Errorf("heartbeats at %v", at)
			}

			// Nothing runs after the release.
			time.Sleep(time.Hour)
			if n := len(srv.lines()); n != 6 {
				t.Errorf("sent after the release: %q", srv.lines()[6:])
			}
		})
	}
}

func TestALockThatIsReleasedBeforeItsFirstHeartbeatCostsNone(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		db, srv := newServer(t)
		for range 3 {
			wantError(t, WithLock(t.Context(), db, key, func(context.Context) error {
				time.Sleep(999 * time.Millisecond)
				return nil
			}))
		}
		time.Sleep(time.Hour)
		srv.want(t, on(1, "open", tryQuery, unlockQuery, tryQuery, unlockQuery, tryQuery, unlockQuery)...)
	})
}

func TestSharedLocksAreCheckedToo(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		db, srv := newServer(t)
		wantError(t, WithLock(t.Context(), db, key, func(context.Context) error {
			time.Sleep(1500 * time.Millisecond)
			return nil
		}, Shared(), HolderTimeout(3*time.Second)))
		srv.want(t, on(1, "open", "SELECT WHERE CASE WHEN pg_catalog.pg_is_in_recovery() THEN false ELSE pg_catalog.pg_try_advisory_lock_shared(42) END",
			strings.Replace(armQuery, "15000", "3000", 1),
			resetQuery+"SELECT WHERE pg_catalog.pg_advisory_unlock_shared(42)")...)
	})
}

// A grant that was waited for has armed the session.
func TestTheHeartbeatsAfterAWait(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		db, srv := newServer(t, refused, refused, granted)
		wantError(t, WithLock(t.Context(), db, key, func(context.Context) error {
			time.Sleep(1500 * time.Millisecond)
			return nil
		}))
		srv.want(t, on(1, "open", tryQuery, armedWaitQuery, armedWaitQuery, beatQuery, disarmQuery)...)
	})
}

func TestALossEndsFnsCtxAndTheClosureReturnsErrLost(t *testing.T) {
	t.Parallel()
	mine := errors.New("mine")
	hang := func(ctx context.Context) (int64, error) { <-ctx.Done(); return 0, ctx.Err() }
	for _, test := range []struct {
		name   string
		second func(ctx context.Context) (int64, error) // the second heartbeat's answer
		after  time.Duration
		wants  []any
		sound  bool // the session is there: its locks are freed before it is closed
		late   bool // it may be
	}{
		{
			"the session is gone", func(context.Context) (int64, error) { return 0, io.ErrUnexpectedEOF },
			2 * time.Second, []any{io.ErrUnexpectedEOF}, false, false,
		},
		{
			"the server ended it", func(context.Context) (int64, error) { return 0, pgError("57P05") },
			2 * time.Second, []any{pgError("57P05")}, false, false,
		},
		{
			"the server is a standby by now", func(context.Context) (int64, error) { return 2, nil },
			2 * time.Second, []any{"hot standby"}, true, false,
		},
		{
			"it is another session", func(context.Context) (int64, error) { return 0, nil },
			2 * time.Second, []any{"this session did not hold it"}, true, false,
		},
		{"no answer in time", hang, 3 * time.Second, []any{"no answer from the server within 1s"}, false, true},
		{
			"no answer, and the driver does not return", func(context.Context) (int64, error) { time.Sleep(time.Hour); return 1, nil },
			3 * time.Second, []any{"no answer from the server within 1s"}, false, false,
		},
		{
			"an answer too late", func(context.Context) (int64, error) { time.Sleep(1001 * time.Millisecond); return 1, nil },
			3 * time.Second, []any{"no answer from the server within 1s"}, false, true,
		},
	} {
		for _, c := range closures[:3] {
			for _, fnErr := range []error{nil, mine} {
				t.Run(c.name+" "+test.name, func(t *testing.T) {
					synctest.Test(t, func(t *testing.T) {
						db, srv := newServer(t)
						srv.script = func(ctx context.Context, _ int, query string) (int64, error) {
							if plainly(query) == beatQuery {
								return test.second(ctx)
							}
							return 1, nil
						}
						wants := append(test.wants, ErrLost, "lock lost")
						start := time.Now()
						err := c.run(t.Context(), db, key, func(ctx context.Context) error {
							select {
							case <-ctx.Done():
							case <-time.After(time.Minute):
								t.Error("ctx has not ended")
							}
							if d := time.Since(start); d != test.after {
								t.Errorf("ctx ended after %v, want %v", d, test.after)
							}
							wantError(t, context.Cause(ctx), append(wants, "advisory: hold bigint 42: ")...)
							time.Sleep(10 * time.Second) // fn takes no notice
							_, err := Token(ctx)
							wantError(t, err, ErrLost)
							return fnErr
						})
						wants = append(wants, "advisory: release bigint 42: ")
						if fnErr != nil {
							wants = append(wants, fnErr)
						}
						wantError(t, err, wants...)
						time.Sleep(2 * time.Hour)
						want := []string{"open", tryQuery, armQuery, beatQuery}
						if test.sound || test.late && slices.Contains(srv.lines(), "1 "+resetQuery+freeQuery) {
							want = append(want, resetQuery+freeQuery)
						}
						srv.want(t, on(1, append(want, "close")...)...)
					})
				})
			}
		}
	}
}

// All locks of a session are lost with it.
func TestALossIsOfAllLocksOfTheSession(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		db, srv := newServer(t)
		srv.script = func(_ context.Context, _ int, query string) (int64, error) {
			switch {
			case isBeat(query):
				return 0, nil
			case strings.Contains(query, "generate_series"):
				return 3, nil
			}
			return 1, nil
		}
		other := take(t, db, key)
		err := WithLocks(t.Context(), db, []Key{ID(1), ID(2), ID(3)}, func(ctx context.Context) error {
			<-ctx.Done()
			return nil
		})
		wantError(t, err, ErrLost, "bigint 1, bigint 2, bigint 3")
		wantError(t, context.Cause(other.Context()), ErrLost, "bigint 42")
		wantError(t, other.Release(), ErrLost)
		synctest.Wait()
		if srv.open() != 0 {
			t.Error("the session was not discarded")
		}
	})
}

func TestAnAnswerJustInTimeIsOne(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		db, srv := newServer(t)
		srv.script = func(_ context.Context, _ int, query string) (int64, error) {
			if isBeat(query) {
				time.Sleep(999 * time.Millisecond)
			}
			return 1, nil
		}
		wantError(t, WithLock(t.Context(), db, key, func(ctx context.Context) error {
			time.Sleep(time.Minute)
			return ctx.Err()
		}))
	})
}

func TestAProcessThatWasFrozenHasLostItsLock(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		db, srv := newServer(t)
		l, err := Acquire(t.Context(), db, key)
		wantError(t, err)
		// The clock went on, and the timer did not.
		hub := l.hold.hub
		hub.mu.Lock()
		c := l.hold.grants[0].on
		c.proof, c.watch.since = c.proof.Add(-time.Second), c.watch.since.Add(-time.Second)
		hub.mu.Unlock()
		<-l.Context().Done()
		wantError(t, context.Cause(l.Context()), ErrLost, "no heartbeat for 2s")
		wantError(t, l.Release(), ErrLost)
		wantError(t, l.Release(), ErrLost)
		synctest.Wait()
		srv.want(t, on(1, "open", tryQuery, freeQuery, "close")...) // no heartbeat, which might have come back well
	})
}

// A Release that meets a heartbeat waits for it, and what comes of it is no news.
func TestAReleaseDuringAHeartbeat(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name   string
		answer func(ctx context.Context) (int64, error)
		want   []string
		wants  []any
	}{
		{
			"which is well", func(context.Context) (int64, error) { time.Sleep(500 * time.Millisecond); return 1, nil },
			on(1, "open", tryQuery, armQuery, disarmQuery), nil,
		},
		{
			"which is not answered", func(ctx context.Context) (int64, error) { <-ctx.Done(); return 0, ctx.Err() },
			on(1, "open", tryQuery, armQuery, disarmQuery, "close"), nil,
		},
		{
			"from which the driver does not return", func(context.Context) (int64, error) { time.Sleep(time.Hour); return 1, nil },
			on(1, "open", tryQuery, armQuery, "close"), []any{ErrLost},
		},
	} {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				db, srv := newServer(t)
				srv.script = func(ctx context.Context, _ int, query string) (int64, error) {
					if plainly(query) == armQuery {
						return test.answer(ctx)
					}
					return 1, nil
				}
				l, err := Acquire(t.Context(), db, key)
				wantError(t, err)
				time.Sleep(1100 * time.Millisecond)
				start := time.Now()
				wantError(t, l.Release(), test.wants...)
				if d := time.Since(start); d > releaseBound+2*abandonAfter {
					t.Errorf("Release took %v", d)
				}
				wantError(t, context.Cause(l.Context()), context.Canceled)
				time.Sleep(2 * time.Hour)
				srv.want(t, test.want...)
			})
		})
	}
}

// Both want their turn on the session at one moment. Whichever comes first, the
// connection goes back to the pool without an idle_session_timeout.
func TestAHeartbeatNeverFollowsTheRelease(t *testing.T) {
	t.Parallel()
	for range 300 {
		synctest.Test(t, func(t *testing.T) {
			db, srv := newServer(t)
			srv.script = func(_ context.Context, _ int, query string) (int64, error) {
				if query == unlockQuery || query == disarmQuery {
					time.Sleep(time.Millisecond)
				}
				return 1, nil
			}
			l, err := Acquire(t.Context(), db, key)
			wantError(t, err)
			time.Sleep(time.Second)
			wantError(t, l.Release())
			time.Sleep(time.Second)
			lines := srv.lines()
			want := on(1, "open", tryQuery, unlockQuery)
			switch {
			case slices.Contains(lines, "1 "+armQuery):
				want = on(1, "open", tryQuery, armQuery, disarmQuery)
			case slices.Contains(lines, "1 "+beatQuery): // the release had begun: nothing was to be armed
				want = on(1, "open", tryQuery, beatQuery, unlockQuery)
			}
			if !slices.Equal(lines, want) {
				t.Errorf("log: %q", lines)
			}
		})
	}
}

func TestALockIsWatchedBeyondTheCtxOfItsAcquisition(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		db, srv := newServer(t)
		ctx, cancel := context.WithCancel(t.Context())
		l, err := Acquire(ctx, db, key)
		wantError(t, err)
		cancel()
		time.Sleep(2500 * time.Millisecond)
		wantError(t, l.Release())
		srv.want(t, on(1, "open", tryQuery, armQuery, beatQuery, disarmQuery)...)
	})
}

// Where the caller drives the session, nobody else sends anything on it.
func TestNoHeartbeatOnTheCallersSession(t *testing.T) {
	t.Parallel()
	for _, c := range closures[3:] {
		synctest.Test(t, func(t *testing.T) {
			db, srv := newServer(t)
			wantError(t, c.run(t.Context(), db, key, func(context.Context) error {
				time.Sleep(time.Hour)
				return nil
			}))
			srv.want(t, on(1, append(slices.Clip(c.acquires), c.releases...)...)...)
		})
	}
}

func TestTokenIsAskedForOnceOnTheHoldingSession(t *testing.T) {
	t.Parallel()
	for _, c := range closures {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			db, srv := newServer(t)
			srv.script = func(_ context.Context, _ int, query string) (int64, error) {
				if query == tokenQuery {
					return 1<<40 + 7, nil
				}
				return 1, nil
			}
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
	l, err := Acquire(t.Context(), db, key)
	wantError(t, err)
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
	_, err = l.Token(t.Context())
	wantError(t, err, ErrLost, "not held any more")
	srv.want(t, on(1, "open", tryQuery, tokenQuery, unlockQuery)...)
}

func TestTokenWithoutALockIsAnError(t *testing.T) {
	t.Parallel()
	_, err := Token(t.Context())
	wantError(t, err, "advisory: token: ctx carries no lock")
}

func TestTokenUnderAnEndedCtxSendsNothing(t *testing.T) {
	t.Parallel()
	db, srv := newServer(t)
	l, err := Acquire(t.Context(), db, key)
	wantError(t, err)
	cause := errors.New("cause")
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(cause)
	_, err = l.Token(ctx)
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
			l, err := Acquire(t.Context(), db, key)
			wantError(t, err)
			_, err = l.Token(t.Context())
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
		if err := conn.Close(); err != nil {
			t.Error(err)
		}
		_, err := Token(ctx)
		wantError(t, err, ErrLost, sql.ErrConnDone)
		return nil
	})
}

func TestTokenOfATransactionThatHasEndedIsErrLost(t *testing.T) {
	t.Parallel()
	db, _ := newServer(t)
	_ = WithTxLock(t.Context(), db, key, func(ctx context.Context, tx *sql.Tx) error {
		if err := tx.Commit(); err != nil {
			t.Error(err)
		}
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
		l, err := Acquire(t.Context(), db, key)
		wantError(t, err)
		var wg sync.WaitGroup
		_, err = l.Token(errCtx{context.Background(), func() { // in the moment between
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

// The heartbeats count from when the grant was asked for, because a server that is armed
// with it counts from the grant. One that took a heartbeat or longer is no reason to give
// up the lock: it is confirmed, or, if nobody else counts, the first one is from the answer.
func TestTheFirstHeartbeat(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		waits       bool
		took, first time.Duration
	}{
		{false, 0, time.Second},
		{false, 600 * time.Millisecond, time.Second},
		{false, 5 * time.Second, 6 * time.Second},
		{true, 600 * time.Millisecond, time.Second},
		{true, 999 * time.Millisecond, time.Second},
		{true, 5 * time.Second, 6 * time.Second}, // it was confirmed at 5 s
	} {
		synctest.Test(t, func(t *testing.T) {
			db, srv := newServer(t)
			start := time.Now()
			var at []time.Duration
			srv.script = func(_ context.Context, _ int, query string) (int64, error) {
				switch {
				case query == tryQuery && test.waits:
					return 0, nil
				case query == tryQuery || plainly(query) == armedWaitQuery:
					time.Sleep(test.took)
				case isBeat(query):
					at = append(at, time.Since(start))
				}
				return 1, nil
			}
			wantError(t, WithLock(t.Context(), db, key, func(ctx context.Context) error {
				time.Sleep(1100 * time.Millisecond)
				return ctx.Err()
			}))
			if len(at) == 0 || !slices.Contains(at, test.first) || at[0] != test.first && at[0] != test.took {
				t.Errorf("waits %v, grant after %v: heartbeats at %v, want %v", test.waits, test.took, at, test.first)
			}
		})
	}
}

// A strict holder that leaves during the heartbeat that has armed the session for it leaves a
// session that the server would end too early for the others: they have a heartbeat before.
func TestAStrictHolderThatLeavesDuringItsHeartbeat(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		db, srv := newServer(t)
		srv.script = func(_ context.Context, _ int, query string) (int64, error) {
			if isBeat(query) {
				time.Sleep(50 * time.Millisecond)
			}
			return 1, nil
		}
		lax, err := Acquire(t.Context(), db, ID(1), Heartbeat(time.Minute), HolderTimeout(time.Hour))
		wantError(t, err)
		strict, err := Acquire(t.Context(), db, ID(2), Heartbeat(time.Second), HolderTimeout(3*time.Second))
		wantError(t, err)
		time.Sleep(time.Second + 10*time.Millisecond)
		wantError(t, strict.Release())
		time.Sleep(2 * time.Second)
		if !slices.ContainsFunc(srv.lines(), func(l string) bool { return strings.Contains(l, "'idle_session_timeout', '3600000'") }) {
			t.Errorf("log: %q", srv.lines())
		}
		wantError(t, lax.Context().Err())
		wantError(t, lax.Release())
	})
}

// A lock that was long on its way, and is handed on to a holder with a shorter Heartbeat, is not
// lost for that: nobody was to prove it at that pace.
func TestAShortHeartbeatCountsFromItsBeginning(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		p, dbs, srvs := newTable(t, 2)
		there := take(t, dbs[1], key)
		answer := srvs[0].script
		srvs[0].script = func(ctx context.Context, conn int, query string) (int64, error) {
			switch {
			case isWait(query):
				time.Sleep(5 * time.Second)
			case query == "SELECT": // the first holder asks whether it held the lock to the end
				time.Sleep(time.Second / 2)
			}
			return answer(ctx, conn, query)
		}
		var wg sync.WaitGroup
		wg.Go(func() {
			wantError(t, WithLock(t.Context(), dbs[0], key, nothing, Heartbeat(10*time.Second), HolderTimeout(time.Minute)))
		})
		time.Sleep(time.Second)
		wg.Go(func() {
			wantError(t, WithLock(t.Context(), dbs[0], key, func(ctx context.Context) error {
				sleep(ctx, 3*time.Second)
				return context.Cause(ctx)
			}, Heartbeat(time.Second)))
		})
		wantError(t, there.Release())
		wg.Wait()
		p.clean()
	})
}
