package advisory

import (
	"context"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/pgadvisory/advisory/internal/session"
)

// The longer one has waited, the longer is a slice; and nobody sends more than ten a second.
func TestTheSlicesOfAWaitGrow(t *testing.T) {
	t.Parallel()
	for _, f := range waiters() {
		bubble(t, f.name, func(t *testing.T) {
			db, srv := newServer(t)
			start := time.Now()
			waits := taken(t)
			var at, bounds []time.Duration
			srv.script = func(ctx context.Context, conn int, query string) (int64, error) {
				if isWait(query) {
					at, bounds = append(at, time.Since(start)), append(bounds, boundIn(t, query))
				}
				return waits(ctx, conn, query)
			}
			const timeout = 100 * time.Second
			wantError(t, f.run(t.Context(), db, key, nothing, Timeout(timeout)), ErrHeld, "not acquired within 1m40s")
			wantTook(t, start, timeout, timeout+time.Millisecond)
			for i := range at {
				age := at[i].Seconds()
				want := min(100+300*age/(age+3), float64(timeout-at[i])/1e6)
				if got := float64(bounds[i]) / 1e6; got < want-1 || got > want+1 {
					t.Errorf("at %v: %v, want %.0fms", at[i], bounds[i], want)
				}
			}
			if i := slices.IndexFunc(at, func(d time.Duration) bool { return d >= 3*time.Second }); bounds[0] != sliceMin || bounds[i] < 245*time.Millisecond || bounds[i] > 255*time.Millisecond {
				t.Errorf("%v at first, %v after 3 s", bounds[0], bounds[i])
			}
			mostPerSecond(t, at, 10)
		})
	}
}

// A very short statement_timeout, or deadlock_timeout, must not make a wait a busy loop, nor a longer one.
func TestSlicesThatEndEarlyArePaced(t *testing.T) {
	t.Parallel()
	for name, answer := range map[string]error{"in the block": nil, "outside of it": err57014} {
		for _, f := range waiters() {
			if answer != nil && f.name == "AcquireConn" {
				continue // see TestAcquireConn
			}
			bubble(t, f.name+" "+name, func(t *testing.T) {
				db, srv := newServer(t)
				start := time.Now()
				var at []time.Duration
				srv.script = func(_ context.Context, _ int, query string) (int64, error) {
					switch {
					case isWait(query):
						at = append(at, time.Since(start))
						time.Sleep(time.Millisecond)
						return 0, answer
					case isTry(query):
						return 0, nil
					}
					return 1, nil
				}
				wantError(t, f.run(t.Context(), db, key, nothing, Timeout(5*time.Second)), ErrHeld)
				wantTook(t, start, 5*time.Second, 5*time.Second)
				mostPerSecond(t, at, 10)
				if len(at) < 45 {
					t.Errorf("%d slices in 5 s", len(at))
				}
				if stats := db.Stats(); stats.OpenConnections != 1 {
					t.Errorf("%+v", stats)
				}
			})
		}
	}
}

// A server that does not execute the statement that waits: PL/pgSQL is gone (42704), or not allowed
// (42501), or it is another kind of server (0A000).
func TestWhereWaitsAreRefusedTheyTryAgainAndAgain(t *testing.T) {
	t.Parallel()
	for _, state := range []string{"42501", "42704", "0A000"} {
		for _, f := range waiters() {
			bubble(t, f.name+" "+state, func(t *testing.T) {
				p, dbs, srvs := newTable(t, 2)
				there := take(t, dbs[1], key)
				time.AfterFunc(10*time.Second, func() { wantError(t, there.Release()) })
				start := time.Now()
				var tries []time.Duration
				p.fail = func(_ int, query string) error {
					if isWait(query) {
						return pgError(state)
					}
					if isTry(query) {
						tries = append(tries, time.Since(start))
					}
					return nil
				}
				var log logBuffer
				wantError(t, f.run(t.Context(), dbs[0], key, nothing, log.option()))
				if d := time.Since(start) - 10*time.Second; d < 0 || d > 2*session.PauseMax {
					t.Errorf("%v after the release", d)
				}
				mostPerSecond(t, tries, 20)
				if n := len(tries); n < 25 || n > 100 {
					t.Errorf("%d tries in 10 s", n)
				}
				lines := srvs[0].lines()
				if n := strings.Count(log.String(), "\n"); n != 1 || !strings.Contains(log.String(), "waits try again and again") || !strings.Contains(log.String(), state) || count(lines, "DO $advisory$") != 1 {
					t.Errorf("%d lines, log: %s%q", n, log.String(), lines)
				}

				// The next one knows it.
				there = take(t, dbs[1], key)
				wantError(t, f.run(t.Context(), dbs[0], key, nothing, log.option(), Timeout(time.Second)), ErrHeld, "within 1s")
				known := 1
				if f.name == "AcquireConn" { // which does not know its *sql.DB
					known = 2
				}
				if n := strings.Count(log.String(), "\n"); n != known || count(srvs[0].lines(), "DO $advisory$") != known {
					t.Errorf("%d lines, log: %s%q", n, log.String(), srvs[0].lines())
				}
				wantError(t, there.Release())
				time.Sleep(time.Second)
				wantIdle(t, dbs[0])
				srvs[0].wantConns(t, srvs[0].opened, srvs[0].opened)
				p.clean()
			})
		}
	}
}

// Many waiters of one process are told of it once.
func TestARefusalOfWaitsIsToldOfOnce(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		p, dbs, srvs := newTable(t, 2)
		p.takes(time.Millisecond)
		answer := srvs[0].script
		srvs[0].script = func(ctx context.Context, conn int, query string) (int64, error) {
			if isWait(query) { // several are refused at a time
				time.Sleep(20 * time.Millisecond)
				return 0, pgError("42501")
			}
			return answer(ctx, conn, query)
		}
		var log logBuffer
		var wg sync.WaitGroup
		for i, k := range ids(20) {
			for _, c := range []int{0, 3, 4}[i%3:] {
				there := take(t, dbs[1], k, Shared())
				time.AfterFunc(2*time.Second, func() { wantError(t, there.Release()) })
				wg.Go(func() { wantError(t, closures[c].run(t.Context(), dbs[0], k, nothing, log.option())) })
			}
		}
		wg.Wait()
		time.Sleep(time.Second)
		if n := strings.Count(log.String(), "\n"); n != 1 {
			t.Errorf("log: %s", log.String())
		}
		wantIdle(t, dbs[0])
		p.clean()
	})
}

// A standby is found by a wait, and that is final, unless the wait has lost its session: the way to
// the new primary may lead to a standby for a while.
func TestAWaitOnAStandby(t *testing.T) {
	t.Parallel()
	for _, f := range waiters() {
		bubble(t, f.name, func(t *testing.T) {
			db, srv := newServer(t)
			srv.script = script(when(isWait, reply{rows: 2}), when(isTry, refused))
			wantError(t, f.run(t.Context(), db, key, neverRuns(t)), "acquire bigint 42: the server is a hot standby", "target_session_attrs=read-write")
			time.Sleep(time.Second)
			wantIdle(t, db)
			srv.wantConns(t, 0, 1)
		})
	}
}
