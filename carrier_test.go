package advisory

import (
	"context"
	"database/sql"
	"errors"
	"io"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

const millisecond = time.Millisecond

// rtt is how long each statement takes on a table.
func (p *lockTable) takes(d time.Duration) *lockTable {
	p.rtt = func() time.Duration { return d }
	return p
}

// ids are n keys.
func ids(n int) []Key {
	keys := make([]Key, n)
	for i := range keys {
		keys[i] = ID(int64(100 + i))
	}
	return keys
}

func count(lines []string, part string) (n int) {
	for _, l := range lines {
		if strings.Contains(l, part) {
			n++
		}
	}
	return n
}

// What is asked for while a round trip is under way goes out in the next one, and soon
// in one statement, which is gone when the connection goes back.
func TestManyRequestsAreOneRoundTrip(t *testing.T) {
	t.Parallel()
	for _, direct := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			p, dbs, srvs := newTable(t, 1)
			p.takes(millisecond)
			srvs[0].direct = direct
			start := time.Now()
			var wg sync.WaitGroup
			keys := append(ids(62), Pair(-3, 7), Pair(7, -2147483648))
			for i, k := range keys {
				for range 10 {
					wg.Go(func() {
						var opts []Option
						if i%2 > 0 {
							opts = append(opts, Shared())
						}
						wantError(t, WithLock(t.Context(), dbs[0], k, func(ctx context.Context) error {
							if p.holders(k) != 1 {
								t.Errorf("%v: %d holders", k, p.holders(k))
							}
							return ctx.Err()
						}, opts...))
					})
				}
			}
			wg.Wait()
			if d := time.Since(start); d > 200*millisecond {
				t.Errorf("after %v", d)
			}
			time.Sleep(time.Second) // the statement is closed behind the last one's back
			lines := srvs[0].lines()
			if srvs[0].opened != 1 || count(lines, "1 prepare") != 1 || count(lines, "1 batch ") == 0 || lines[len(lines)-1] != "1 deallocate" {
				t.Errorf("%d connections; last: %q", srvs[0].opened, lines[len(lines)-1])
			}
			wantIdle(t, dbs[0])
			p.clean()
		})
	}
}

// A batch is of limited size.
func TestABatchIsLimited(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		p, dbs, srvs := newTable(t, 1)
		p.takes(millisecond)
		var wg sync.WaitGroup
		for _, k := range ids(3 * batchLimit) {
			wg.Go(func() {
				wantError(t, WithLock(t.Context(), dbs[0], k, func(context.Context) error {
					time.Sleep(time.Second / 2)
					return nil
				}))
			})
		}
		wg.Wait()
		time.Sleep(time.Second)
		for _, l := range srvs[0].lines() {
			if n := 1 + strings.Count(l, ",")/2; strings.Contains(l, "batch") && n > batchLimit {
				t.Errorf("%d locks in one statement", n)
			}
		}
		if srvs[0].opened != 1 {
			t.Errorf("%d connections", srvs[0].opened)
		}
		p.clean()
	})
}

// The server refuses in the middle of a batch: what is half taken is freed, the requests are
// answered one by one, and what is held is not disturbed.
func TestABatchThatFails(t *testing.T) {
	t.Parallel()
	full := pgError("53200")
	for _, test := range []struct {
		name    string
		failing func(op int64) bool
	}{
		{"locking", func(op int64) bool { return op == 1 }},
		{"unlocking", func(op int64) bool { return op == 2 }},
	} {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				p, dbs, srvs := newTable(t, 1)
				p.takes(millisecond)
				l, err := Acquire(t.Context(), dbs[0], key)
				wantError(t, err)
				failed := 0
				p.failIn = func(op, k int64) error {
					if k == 120 && test.failing(op) {
						failed++
						return full
					}
					return nil
				}
				// Alone, it is refused, too.
				p.fail = func(_ int, query string) error {
					if failed > 0 && strings.Contains(query, "try_advisory_lock(120)") {
						return full
					}
					return nil
				}
				var wg sync.WaitGroup
				for _, k := range ids(40) {
					wg.Go(func() {
						var wants []any
						if test.name == "locking" && k == ID(120) {
							wants = []any{full, "max_locks_per_transaction"}
						}
						wantError(t, WithLock(t.Context(), dbs[0], k, func(ctx context.Context) error {
							if p.holders(k) != 1 {
								t.Errorf("%v: %d holders", k, p.holders(k))
							}
							return ctx.Err()
						}), wants...)
					})
				}
				wg.Wait()
				if failed == 0 {
					t.Error("no batch has failed")
				}
				if p.holders(key) != 1 || l.Context().Err() != nil || srvs[0].opened != 1 {
					t.Errorf("%d holders, %v, %d connections", p.holders(key), context.Cause(l.Context()), srvs[0].opened)
				}
				wantError(t, l.Release())
				time.Sleep(time.Second)
				wantIdle(t, dbs[0])
				p.clean()
			})
		})
	}
}

// Heartbeats go out between requests that are answered one by one, each of which may be refused.
func TestHeartbeatsComeBetweenRequestsAnsweredOneByOne(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		p, dbs, srvs := newTable(t, 1)
		l, err := Acquire(t.Context(), dbs[0], key, Heartbeat(time.Second))
		wantError(t, err)
		p.takes(200 * millisecond)
		full := pgError("53200")
		p.failIn = func(int64, int64) error { return full }
		p.fail = func(_ int, query string) error {
			if strings.Contains(query, "try_advisory_lock(") {
				return full
			}
			return nil
		}
		var wg sync.WaitGroup
		for _, k := range ids(20) {
			wg.Go(func() {
				wantError(t, WithLock(t.Context(), dbs[0], k, nothing), full)
			})
		}
		wg.Wait()
		if count(srvs[0].lines(), "batch") == 0 {
			t.Error("nothing was asked for together")
		}
		wantError(t, l.Release())
		wantIdle(t, dbs[0])
		p.clean()
	})
}

// The session dies in a batch, or its answer makes no sense: all is lost, and the requests
// go on over a new session.
func TestABatchThatIsLost(t *testing.T) {
	t.Parallel()
	for _, direct := range []bool{false, true} {
		for name, answer := range map[string]func(ctx context.Context) (string, error){
			"gone":     func(context.Context) (string, error) { return "", io.ErrUnexpectedEOF },
			"too few":  func(context.Context) (string, error) { return "1", nil },
			"not held": func(context.Context) (string, error) { return strings.Repeat("0", 100), nil },
			"silence":  func(ctx context.Context) (string, error) { <-ctx.Done(); return "", ctx.Err() },
		} {
			t.Run(name, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					p, dbs, srvs := newTable(t, 1)
					p.takes(millisecond)
					srv := srvs[0]
					srv.direct = direct
					l, err := Acquire(t.Context(), dbs[0], key)
					wantError(t, err)
					batch := srv.batch
					srv.batch = func(ctx context.Context, conn int, ops, keys string) (string, error) {
						if conn == 1 {
							if name == "not held" && !strings.Contains(ops, "2") {
								return batch(ctx, conn, ops, keys)
							}
							return answer(ctx)
						}
						return batch(ctx, conn, ops, keys)
					}
					var wg sync.WaitGroup
					for _, k := range ids(30) {
						wg.Go(func() {
							err := WithLock(t.Context(), dbs[0], k, func(ctx context.Context) error { return nil })
							if err != nil && !errors.Is(err, ErrLost) {
								t.Errorf("%v: %v", k, err)
							}
						})
					}
					wg.Wait()
					<-l.Context().Done()
					wantError(t, context.Cause(l.Context()), ErrLost, "hold bigint 42")
					wantError(t, l.Release(), ErrLost)
					time.Sleep(time.Minute)
					if lines := srv.lines(); !slices.Contains(lines, "1 close") || srv.open() != srv.opened-1 {
						t.Errorf("%d connections of %d open", srv.open(), srv.opened)
					}
					wantIdle(t, dbs[0])
					p.clean()
				})
			})
		}
	}
}

// The server's error to a lone request is no loss to others on the session.
func TestALoneRequestThatFailsDisturbsNobody(t *testing.T) {
	t.Parallel()
	full := pgError("53200")
	second := func(query string) string { return strings.ReplaceAll(query, "42", "43") }
	free := "SELECT pg_catalog.pg_advisory_unlock(43) FROM (" + strings.Replace(heldQuery, "'42'", "'43'", 1) + " OFFSET 0) AS held"
	for _, test := range []struct {
		name    string
		failing string
		want    []string
		wants   []any
	}{
		{"try", second(tryQuery), []string{second(tryQuery), free}, []any{full, "acquire bigint 43"}},
		{"unlock", second(unlockQuery), []string{second(tryQuery), second(unlockQuery), free}, nil},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			p, dbs, srvs := newTable(t, 1)
			p.fail = func(_ int, query string) error {
				if query == test.failing {
					return full
				}
				return nil
			}
			l, err := Acquire(t.Context(), dbs[0], key)
			wantError(t, err)
			wantError(t, WithLock(t.Context(), dbs[0], ID(43), nothing), test.wants...)
			wantError(t, l.Release())
			srvs[0].want(t, on(1, slices.Concat([]string{"open", tryQuery}, test.want, []string{unlockQuery})...)...)
			wantIdle(t, dbs[0])
			p.clean()
		})
	}
}

// A statement that never returns is broken off on the network's connection of a driver that
// is known, on the caller's goroutine.
func TestAStatementThatNeverReturnsIsBrokenOff(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name  string
		stuck string
		run   func(t *testing.T, ctx context.Context, locks func(opts ...Option) error) error
		after time.Duration
		sent  []string
		wants []any
	}{
		{"a try", tryQuery, nil, answerBound, []string{tryQuery}, []any{"no answer from the server within 10s"}},
		{"an unlock", unlockQuery, nil, releaseBound, []string{tryQuery, unlockQuery}, []any{ErrLost, "no answer from the server within 5s"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				db, srv := newServer(t)
				srv.direct = true
				srv.script = func(ctx context.Context, _ int, query string) (int64, error) {
					if query == test.stuck {
						<-ctx.Done()
						return 0, io.ErrUnexpectedEOF
					}
					return 1, nil
				}
				start := time.Now()
				wantError(t, WithLock(t.Context(), db, key, nothing), test.wants...)
				if d := time.Since(start); d != test.after {
					t.Errorf("after %v", d)
				}
				srv.want(t, on(1, append(append([]string{"open"}, test.sent...), "close")...)...)
				wantIdle(t, db)
			})
		})
	}
}

// The end of ctx leaves a moment to the answer of a try, if nobody else has locks on the
// session, and breaks off the network's connection then. A wait is left to end by itself, unless it
// does not in time.
func TestTheEndOfCtxAndAStatementThatNeverReturns(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		stuck         string
		after, closed time.Duration // the end of ctx
		sent          []string
	}{
		{tryQuery, answerGrace, answerGrace, []string{tryQuery}},
		{armedWaitQuery, 0, answerBound, []string{tryQuery, armedWaitQuery}},
	} {
		synctest.Test(t, func(t *testing.T) {
			db, srv := newServer(t)
			srv.direct = true
			srv.script = func(ctx context.Context, _ int, query string) (int64, error) {
				if plainly(query) == test.stuck {
					<-ctx.Done()
					return 0, io.ErrUnexpectedEOF
				}
				return 0, nil
			}
			var end time.Time
			closed := make(chan time.Time, 1)
			srv.ended = func(int) { closed <- time.Now() }
			ctx, cancel := context.WithCancel(t.Context())
			time.AfterFunc(50*time.Millisecond, func() { end = time.Now(); cancel() })
			wantError(t, WithLock(ctx, db, key, nothing), ErrNotAcquired, context.Canceled)
			if d := time.Since(end); d != test.after {
				t.Errorf("%s: after %v, want %v", test.stuck, d, test.after)
			}
			if d := (<-closed).Sub(end); d < test.closed || d > test.closed+2*abandonAfter {
				t.Errorf("%s: closed after %v, want %v", test.stuck, d, test.closed)
			}
			synctest.Wait()
			srv.want(t, on(1, append(append([]string{"open"}, test.sent...), "close")...)...)
			wantIdle(t, db)
		})
	}
}

// A session is lost while two of its requests are not answered, and one of them is the
// first part of a release: the second part is on another session.
func TestAReleaseOnTwoSessionsOneOfWhichIsSilent(t *testing.T) {
	t.Parallel()
	for _, first := range []time.Duration{time.Hour, time.Second} { // that the one before it takes
		synctest.Test(t, func(t *testing.T) { releaseOnTwoSessions(t, first) })
	}
}

func releaseOnTwoSessions(t *testing.T, first time.Duration) {
	p, dbs, srvs := newTable(t, 2)
	held := make(chan struct{})
	free := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		wantError(t, WithLock(t.Context(), dbs[1], ID(43), func(context.Context) error {
			close(held)
			<-free
			return nil
		}))
	})
	<-held
	silent := false
	script := srvs[0].script
	srvs[0].script = func(ctx context.Context, conn int, query string) (int64, error) {
		if silent && conn == 1 {
			sleep(ctx, first)
			if first = time.Hour; ctx.Err() != nil {
				return 0, ctx.Err()
			}
		}
		return script(ctx, conn, query)
	}
	time.AfterFunc(100*millisecond, func() { close(free) })
	err := WithLocks(t.Context(), dbs[0], []Key{key, ID(43)}, func(context.Context) error {
		// Others are at work on the first session.
		silent = true
		for range 3 {
			wg.Go(func() { _ = WithLock(t.Context(), dbs[0], ID(44), nothing, NoWait(), Timeout(time.Minute)) })
			wg.Go(func() { _ = WithLock(t.Context(), dbs[0], ID(45), nothing, NoWait()) })
		}
		synctest.Wait()
		return nil
	}, Heartbeat(time.Hour), HolderTimeout(4*time.Hour))
	wantError(t, err, ErrLost)
	wg.Wait()
	time.Sleep(time.Minute)
	wantIdle(t, dbs[0])
	p.clean()
}

// atOnce takes n locks, each on its own, holds them for d, and releases them, all at once.
func atOnce(t *testing.T, db *sql.DB, n int, d time.Duration, opts ...Option) {
	t.Helper()
	var all, wg sync.WaitGroup
	all.Add(n)
	for _, k := range ids(n) {
		wg.Go(func() {
			wantError(t, WithLock(t.Context(), db, k, func(context.Context) error {
				all.Done()
				all.Wait()
				time.Sleep(d)
				return nil
			}, opts...))
		})
	}
	wg.Wait()
	time.Sleep(time.Second) // the session is handed back behind the last one's back
	synctest.Wait()
}

// A server that does not know the statement for many, as some that call themselves compatible, is
// asked one by one, and the Logger told once for the session.
func TestAServerWithoutTheStatementForMany(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		p, dbs, srvs := newTable(t, 1)
		p.takes(millisecond)
		p.fail = func(_ int, query string) error {
			if query == "prepare" {
				return pgError("42883")
			}
			return nil
		}
		var log logBuffer
		atOnce(t, dbs[0], 100, 0, log.option())
		lines := srvs[0].lines()
		if count(lines, "prepare") != 1 || count(lines, "batch ") > 0 || strings.Count(log.String(), "taken one by one") != 1 {
			t.Errorf("log: %s%q", log.String(), lines)
		}
		wantIdle(t, dbs[0])
		p.clean()
	})
}

// A session that dies while the statement for many is prepared is replaced.
func TestASessionThatDiesWhileItPrepares(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		p, dbs, srvs := newTable(t, 1)
		p.takes(millisecond)
		p.fail = func(conn int, query string) error {
			if query == "prepare" && conn == 1 {
				return io.ErrUnexpectedEOF
			}
			return nil
		}
		var wg sync.WaitGroup
		var granted atomic.Int32
		for _, k := range ids(100) {
			wg.Go(func() {
				// Those that were held on it are lost.
				if l, err := Acquire(t.Context(), dbs[0], k); err != nil {
					t.Error(err)
				} else if l.Release() == nil {
					granted.Add(1)
				}
			})
		}
		wg.Wait()
		time.Sleep(time.Second)
		if n := granted.Load(); n < 90 || srvs[0].opened != 2 {
			t.Errorf("%d of 100 granted, %d connections", n, srvs[0].opened)
		}
		wantIdle(t, dbs[0])
		p.clean()
	})
}

// A session that cannot be cleaned is closed, and the Logger told.
func TestASessionThatCannotBeCleaned(t *testing.T) {
	t.Parallel()
	for _, dirty := range []string{"deallocate", resetQuery} {
		synctest.Test(t, func(t *testing.T) {
			p, dbs, srvs := newTable(t, 1)
			p.takes(millisecond)
			p.fail = func(_ int, query string) error {
				if query == dirty {
					return pgError("57014")
				}
				return nil
			}
			var log logBuffer
			atOnce(t, dbs[0], 100, 2*defaultHeartbeat, log.option())
			if lines := srvs[0].lines(); lines[len(lines)-1] != "1 close" || !strings.Contains(log.String(), "could not be cleaned") {
				t.Errorf("after a failed %q: %q; log: %s", dirty, lines[len(lines)-1], log.String())
			}
			wantIdle(t, dbs[0])
		})
	}
}

// The server's error is an answer, too: to the question whether the session lives, and, when it
// comes from pg_cancel_backend, to a heartbeat, which is asked again.
func TestAServersErrorIsAnAnswer(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		p, dbs, srvs := newTable(t, 1)
		p.takes(millisecond)
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

// Several looks, on a session that has the statement for many, which does not look.
func TestSeveralLooksAtOnce(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		p, dbs, srvs := newTable(t, 1)
		p.takes(millisecond)
		var locks []*Lock
		for _, k := range ids(20) {
			locks = append(locks, take(t, dbs[0], k, Shared()))
		}
		var wg sync.WaitGroup
		for i := range 20 {
			wg.Go(func() { wantError(t, WithLock(t.Context(), dbs[0], ID(int64(i)), nothing)) })
		}
		wg.Wait()
		time.Sleep(2 * handOffFor)
		atOnce(t, dbs[0], 20, 0, Shared())
		if n := count(srvs[0].lines(), "NOT granted"); n != 20 || count(srvs[0].lines(), "batch ") == 0 {
			t.Errorf("%d looks", n)
		}
		for _, l := range locks {
			wantError(t, l.Release())
		}
		time.Sleep(time.Second)
		wantIdle(t, dbs[0])
		p.clean()
	})
}

// A grant that was so long on its way that the server, told to, may have ended the session since,
// is asked for again.
func TestAGrantThatWasLongOnItsWayIsConfirmed(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		p, dbs, srvs := newTable(t, 1)
		answer := srvs[0].script
		srvs[0].script = func(ctx context.Context, conn int, query string) (int64, error) {
			n, err := answer(ctx, conn, query)
			if strings.Contains(query, "try_advisory_lock(43)") {
				sleep(ctx, 1200*millisecond)
			}
			return n, err
		}
		l := take(t, dbs[0], key)
		time.Sleep(defaultHeartbeat + 100*millisecond) // armed
		before := count(srvs[0].lines(), "'advisory.session', true)")
		wantError(t, WithLock(t.Context(), dbs[0], ID(43), func(ctx context.Context) error {
			if count(srvs[0].lines(), "'advisory.session', true)") == before {
				t.Error("nobody has asked")
			}
			return ctx.Err()
		}))
		wantError(t, l.Release())
		wantIdle(t, dbs[0])
		p.clean()
	})
}

// A lock that came after its caller had gone, and cannot be given back, costs the session.
func TestALateGrantThatCannotBeUndone(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		p, dbs, srvs := newTable(t, 1)
		p.takes(time.Second)
		p.fail = func(_ int, query string) error {
			if strings.Contains(query, "unlock(43)") {
				return pgError("57014")
			}
			return nil
		}
		l := take(t, dbs[0], key, Heartbeat(time.Minute), HolderTimeout(time.Hour))
		ctx, cancel := context.WithTimeout(t.Context(), 100*millisecond)
		defer cancel()
		wantError(t, WithLock(ctx, dbs[0], ID(43), nothing), ErrNotAcquired, context.DeadlineExceeded)
		time.Sleep(10 * time.Second)
		wantError(t, context.Cause(l.Context()), ErrLost, pgError("57014"))
		wantError(t, l.Release(), ErrLost, pgError("57014"))
		wantIdle(t, dbs[0])
		if n := p.holders(ID(43)); n != 0 || srvs[0].open() != 0 {
			t.Errorf("%d holders, %d connections", n, srvs[0].open())
		}
	})
}
