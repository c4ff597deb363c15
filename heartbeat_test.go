package advisory

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/DATA-DOG/go-sqlmock"

	"github.com/pgadvisory/advisory/internal/session"
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
			" WHEN NOT pg_catalog.pg_try_advisory_lock(-7, -2147483648) THEN 3 ELSE 4 END)", 4)
		result("/* advisory: -1, 4294967298, nightly-report, -7.-2147483648 */ "+set+beat, 1)
		result("/* advisory: -1, 4294967298, nightly-report, -7.-2147483648 */ "+beat, 1)
		result("RESET advisory.session; RESET idle_session_timeout; SELECT WHERE pg_catalog.pg_advisory_unlock(-1)"+
			" AND pg_catalog.pg_advisory_unlock(4294967298) AND pg_catalog.pg_advisory_unlock(7440995589958059143)"+
			" AND pg_catalog.pg_advisory_unlock(-7, -2147483648)", 1)
		wantError(t, WithLocks(t.Context(), db, []Key{Pair(-7, -2147483648), ID(1<<32 + 2), ID(-1), Name("nightly-report")}, sleeps(50*time.Second), Heartbeat(20*time.Second), HolderTimeout(time.Minute)))
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
			wantError(t, WithLock(t.Context(), db, key, sleeps(2500*time.Millisecond)))
		}
		if len(nonces) != 4 || nonces[0] != nonces[1] || nonces[2] != nonces[3] || nonces[0] == nonces[2] || len(nonces[0]) < 5 {
			t.Errorf("nonces %q", nonces)
		}
	})
}

func TestAHeldLockIsCheckedEveryHeartbeatAndTheServerArmedOnce(t *testing.T) {
	t.Parallel()
	for _, c := range closures[:3] {
		bubble(t, c.name, func(t *testing.T) {
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
			wantError(t, c.run(t.Context(), db, key, sleeps(3500*time.Millisecond)))
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
			wantError(t, WithLock(t.Context(), db, key, sleeps(999*time.Millisecond)))
		}
		time.Sleep(time.Hour)
		srv.want(t, on(1, "open", tryQuery, unlockQuery, tryQuery, unlockQuery, tryQuery, unlockQuery)...)
	})
}

func TestSharedLocksAreCheckedToo(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		db, srv := newServer(t)
		wantError(t, WithLock(t.Context(), db, key, sleeps(1500*time.Millisecond), Shared(), HolderTimeout(3*time.Second)))
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
		wantError(t, WithLock(t.Context(), db, key, sleeps(1500*time.Millisecond)))
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
				bubble(t, c.name+" "+test.name, func(t *testing.T) {
					db, srv := newServer(t)
					srv.script = script(when(beatQuery, test.second))
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
		err := WithLocks(t.Context(), db, []Key{ID(1), ID(2), ID(3)}, untilDone)
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
		srv.script = script(when(isBeat, func() { time.Sleep(999 * time.Millisecond) }))
		wantError(t, WithLock(t.Context(), db, key, sleeps(time.Minute)))
	})
}

// The server's error is an answer, too: to the question whether the session lives, and, when it
// comes from pg_cancel_backend, to a heartbeat, which is asked again.
func TestAServersErrorIsAnAnswer(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		p, dbs, srvs := newTable(t, 1)
		p.takes(time.Millisecond)
		cancelled := map[string]bool{}
		p.fail = func(_ int, query string) error {
			kind := ""
			switch {
			case query == "SELECT":
				kind = "alive"
			case isBeat(query):
				kind = "heartbeat"
			}
			if kind == "" || cancelled[kind] {
				return nil
			}
			cancelled[kind] = true
			return pgError("57014")
		}
		l := take(t, dbs[0], ID(43))
		var wg sync.WaitGroup
		for range 2 { // one hands it on
			wg.Go(func() { wantError(t, WithLock(t.Context(), dbs[0], key, nothing)) })
		}
		wg.Wait()
		time.Sleep(3 * defaultHeartbeat)
		wantError(t, l.Release())
		if len(cancelled) != 2 || srvs[0].opened != 1 {
			t.Errorf("cancelled: %v; %d connections", cancelled, srvs[0].opened)
		}
		wantIdle(t, dbs[0])
		p.clean()
	})
}

// A Release that meets a heartbeat waits for it. One that is not answered is a loss.
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
			on(1, "open", tryQuery, armQuery, "close"), []any{ErrLost},
		},
		{
			"from which the driver does not return", func(context.Context) (int64, error) { time.Sleep(time.Hour); return 1, nil },
			on(1, "open", tryQuery, armQuery, "close"), []any{ErrLost},
		},
	} {
		bubble(t, test.name, func(t *testing.T) {
			db, srv := newServer(t)
			srv.script = script(when(armQuery, test.answer))
			l := take(t, db, key)
			time.Sleep(1100 * time.Millisecond)
			start := time.Now()
			wantError(t, l.Release(), test.wants...)
			if d := time.Since(start); d > session.ReleaseBound+2*abandonAfter {
				t.Errorf("Release took %v", d)
			}
			wantError(t, context.Cause(l.Context()), context.Canceled)
			time.Sleep(2 * time.Hour)
			srv.want(t, test.want...)
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
			l := take(t, db, key)
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
		bubble(t, c.name, func(t *testing.T) {
			db, srv := newServer(t)
			wantError(t, c.run(t.Context(), db, key, sleeps(time.Hour)))
			srv.want(t, on(1, append(slices.Clip(c.acquires), c.releases...)...)...)
		})
	}
}

// The strictest Heartbeat and HolderTimeout of those on a session count, for as long as they are.
func TestTheStrictestHeartbeatAndHolderTimeoutCount(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		p, dbs, srvs := newTable(t, 1)
		start := time.Now()
		var at []string
		p.fail = func(_ int, query string) error {
			if beatOf.MatchString(query) {
				beat := fmt.Sprint(time.Since(start))
				if m := idleTimeoutOf.FindStringSubmatch(query); m != nil {
					beat += " sets " + m[1]
				}
				at = append(at, beat)
			}
			return nil
		}
		lenient := take(t, dbs[0], key, Heartbeat(2*time.Second), HolderTimeout(20*time.Second))
		time.Sleep(2100 * time.Millisecond)
		strict := take(t, dbs[0], ID(43), Heartbeat(200*time.Millisecond), HolderTimeout(time.Second))
		time.Sleep(500 * time.Millisecond)
		wantError(t, strict.Release())
		time.Sleep(5 * time.Second)
		other := take(t, dbs[0], ID(44), Heartbeat(3*time.Second), HolderTimeout(30*time.Second))
		wantError(t, lenient.Release())
		time.Sleep(5 * time.Second)
		wantError(t, other.Release())
		const arm = " sets "
		want := []string{
			"2s" + arm + "20000", "2.3s" + arm + "1000", "2.5s",
			// One that is not so strict any more takes effect with the next heartbeat.
			"2.7s" + arm + "20000", "4.7s", "6.7s", "8.7s" + arm + "30000", "11.7s",
		}
		if !slices.Equal(at, want) {
			t.Errorf("heartbeats: %q, want %q", at, want)
		}
		if lines := srvs[0].lines(); lines[len(lines)-1] != "1 "+resetQuery+"SELECT WHERE pg_catalog.pg_advisory_unlock(44)" {
			t.Errorf("last: %s", lines[len(lines)-1])
		}
		wantIdle(t, dbs[0])
		p.clean()
	})
}

// A strict holder that leaves during the heartbeat that has armed the session for it leaves a
// session that the server would end too early for the others: they have a heartbeat before.
func TestAStrictHolderThatLeavesDuringItsHeartbeat(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		db, srv := newServer(t)
		srv.script = script(when(isBeat, func() { time.Sleep(50 * time.Millisecond) }))
		lax := take(t, db, ID(1), Heartbeat(time.Minute), HolderTimeout(time.Hour))
		strict := take(t, db, ID(2), Heartbeat(time.Second), HolderTimeout(3*time.Second))
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
				session.Sleep(ctx, 3*time.Second)
				return context.Cause(ctx)
			}, Heartbeat(time.Second)))
		})
		wantError(t, there.Release())
		wg.Wait()
		p.clean()
	})
}
