package advisory

import (
	"context"
	"database/sql"
	"errors"
	"io"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

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

// What is asked for while a round trip is under way goes out in the next one, and soon
// in one statement, which is gone when the connection goes back.
func TestManyRequestsAreOneRoundTrip(t *testing.T) {
	t.Parallel()
	for _, direct := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			p, dbs, srvs := newTable(t, 1)
			p.takes(time.Millisecond)
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
			wantTook(t, start, 0, 200*time.Millisecond)
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
		p.takes(time.Millisecond)
		each(ids(3*batchLimit), func(k Key) {
			wantError(t, WithLock(t.Context(), dbs[0], k, sleeps(time.Second/2)))
		})
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
		bubble(t, test.name, func(t *testing.T) {
			p, dbs, srvs := newTable(t, 1)
			p.takes(time.Millisecond)
			l := take(t, dbs[0], key)
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
			storm := func(k Key) {
				// Half of them, with 120, come in the round trip of the others: so they go out together.
				late := func() {
					if n, _ := strconv.Atoi(k.SQL()); n%2 == 0 {
						time.Sleep(time.Microsecond)
					}
				}
				late()
				err := WithLock(t.Context(), dbs[0], k, func(ctx context.Context) error {
					if p.holders(k) != 1 {
						t.Errorf("%v: %d holders", k, p.holders(k))
					}
					late()
					return ctx.Err()
				})
				if test.name == "locking" && k == ID(120) && failed > 0 {
					wantError(t, err, full, "max_locks_per_transaction")
				} else {
					wantError(t, err)
				}
			}
			for range 10 { // 120 may go out alone
				if failed == 0 {
					each(ids(40), storm)
				}
			}
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
	}
}

// Heartbeats go out between requests that are answered one by one, each of which may be refused.
func TestHeartbeatsComeBetweenRequestsAnsweredOneByOne(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		p, dbs, srvs := newTable(t, 1)
		l := take(t, dbs[0], key, Heartbeat(time.Second))
		p.takes(200 * time.Millisecond)
		full := pgError("53200")
		p.failIn = func(int64, int64) error { return full }
		p.fail = failing(has("try_advisory_lock("), full)
		each(ids(20), func(k Key) {
			wantError(t, WithLock(t.Context(), dbs[0], k, nothing), full)
		})
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
			bubble(t, name, func(t *testing.T) {
				p, dbs, srvs := newTable(t, 1)
				p.takes(time.Millisecond)
				srv := srvs[0]
				srv.direct = direct
				l := take(t, dbs[0], key)
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
				each(ids(30), func(k Key) {
					err := WithLock(t.Context(), dbs[0], k, func(ctx context.Context) error { return nil })
					if err != nil && !errors.Is(err, ErrLost) {
						t.Errorf("%v: %v", k, err)
					}
				})
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
		}
	}
}

// The server's error to a lone request is no loss to others on the session.
func TestALoneRequestThatFailsDisturbsNobody(t *testing.T) {
	t.Parallel()
	full := pgError("53200")
	second := func(query string) string { return strings.ReplaceAll(query, "42", "43") }
	free := second(unlockHeldQuery)
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
			p.fail = failing(test.failing, full)
			l := take(t, dbs[0], key)
			wantError(t, WithLock(t.Context(), dbs[0], ID(43), nothing), test.wants...)
			wantError(t, l.Release())
			srvs[0].want(t, on(1, slices.Concat([]string{"open", tryQuery}, test.want, []string{unlockQuery})...)...)
			wantIdle(t, dbs[0])
			p.clean()
		})
	}
}

// A server that does not know the statement for many, as some that call themselves compatible, is
// asked one by one, and the Logger told once for the session.
func TestAServerWithoutTheStatementForMany(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		p, dbs, srvs := newTable(t, 1)
		p.takes(time.Millisecond)
		p.fail = failing("prepare", pgError("42883"))
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
		p.takes(time.Millisecond)
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
