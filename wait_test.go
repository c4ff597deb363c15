package advisory

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
)

// The functions that wait in the server's queue: closures, and AcquireConn, with the ReleaseConn
// that belongs to it.
func waiters() []struct {
	name string
	run  runs
} {
	var all []struct {
		name string
		run  runs
	}
	for _, c := range closures {
		all = append(all, struct {
			name string
			run  runs
		}{c.name, c.run})
	}
	return append(all, struct {
		name string
		run  runs
	}{"AcquireConn", func(ctx context.Context, db *sql.DB, key Key, fn func(context.Context) error, opts ...Option) error {
		conn, err := db.Conn(ctx)
		if err != nil {
			return acquireError(ctx, []Key{key}, new(config), err, "")
		}
		// Close waits for the statement that AcquireConn has left, and that on a lock of database/sql's.
		defer func() { time.AfterFunc(sliceMax+answerGrace, func() { _ = conn.Close() }) }()
		if err := AcquireConn(ctx, conn, key, opts...); err != nil {
			return err
		}
		return join(fn(ctx), ReleaseConn(ctx, conn, key))
	}})
}

type runs = func(ctx context.Context, db *sql.DB, key Key, fn func(context.Context) error, opts ...Option) error

// The longer one has waited, the longer is a slice; and nobody sends more than ten a second.
func TestTheSlicesOfAWaitGrow(t *testing.T) {
	t.Parallel()
	for _, f := range waiters() {
		t.Run(f.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
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
				wantError(t, f.run(t.Context(), db, key, nothing, Timeout(timeout)), ErrNotAcquired, "not acquired within 1m40s")
				if d := time.Since(start); d < timeout || d > timeout+time.Millisecond {
					t.Errorf("after %v", d)
				}
				for i := range at {
					age := at[i].Seconds()
					want := min(100+300*age/(age+10), float64(timeout-at[i])/1e6)
					if got := float64(bounds[i]) / 1e6; got < want-1 || got > want+1 {
						t.Errorf("at %v: %v, want %.0fms", at[i], bounds[i], want)
					}
				}
				if i := slices.IndexFunc(at, func(d time.Duration) bool { return d >= 10*time.Second }); bounds[0] != sliceMin || bounds[i] < 245*time.Millisecond || bounds[i] > 255*time.Millisecond {
					t.Errorf("%v at first, %v after 10 s", bounds[0], bounds[i])
				}
				mostPerSecond(t, at, 10)
			})
		})
	}
}

// mostPerSecond checks that in no second there are more than most of at.
func mostPerSecond(t *testing.T, at []time.Duration, most int) {
	t.Helper()
	for i := range at {
		if j := i + most; j < len(at) && at[j]-at[i] < time.Second {
			t.Errorf("%d statements from %v to %v", most+1, at[i], at[j])
			return
		}
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
			t.Run(f.name+" "+name, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					db, srv := newServer(t)
					start := time.Now()
					var at []time.Duration
					srv.script = func(_ context.Context, _ int, query string) (int64, error) {
						switch {
						case isWait(query):
							at = append(at, time.Since(start))
							time.Sleep(time.Millisecond)
							return 0, answer
						case strings.Contains(query, "_try_"):
							return 0, nil
						}
						return 1, nil
					}
					wantError(t, f.run(t.Context(), db, key, nothing, Timeout(5*time.Second)), ErrNotAcquired)
					if d := time.Since(start); d != 5*time.Second {
						t.Errorf("after %v", d)
					}
					mostPerSecond(t, at, 10)
					if len(at) < 45 {
						t.Errorf("%d slices in 5 s", len(at))
					}
					if stats := db.Stats(); stats.OpenConnections != 1 {
						t.Errorf("%+v", stats)
					}
				})
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
			t.Run(f.name+" "+state, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					p, dbs, srvs := newTable(t, 2)
					there := take(t, dbs[1], key)
					time.AfterFunc(10*time.Second, func() { wantError(t, there.Release()) })
					start := time.Now()
					var tries []time.Duration
					p.fail = func(_ int, query string) error {
						if isWait(query) {
							return pgError(state)
						}
						if strings.Contains(query, "_try_") {
							tries = append(tries, time.Since(start))
						}
						return nil
					}
					var log logBuffer
					wantError(t, f.run(t.Context(), dbs[0], key, nothing, log.option()))
					if d := time.Since(start) - 10*time.Second; d < 0 || d > 2*pollMax {
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
					wantError(t, f.run(t.Context(), dbs[0], key, nothing, log.option(), Timeout(time.Second)), ErrNotAcquired, "within 1s")
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
					if srvs[0].open() != srvs[0].opened {
						t.Errorf("%d of %d connections open", srvs[0].open(), srvs[0].opened)
					}
					p.clean()
				})
			})
		}
	}
}

// Many waiters of one process are told of it once.
func TestARefusalOfWaitsIsToldOfOnce(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		p, dbs, srvs := newTable(t, 2)
		p.takes(millisecond)
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
		t.Run(f.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				db, srv := newServer(t)
				srv.script = func(_ context.Context, _ int, query string) (int64, error) {
					switch {
					case isWait(query):
						return 2, nil
					case strings.Contains(query, "_try_"):
						return 0, nil
					}
					return 1, nil
				}
				wantError(t, f.run(t.Context(), db, key, func(context.Context) error {
					t.Error("fn runs")
					return nil
				}), "acquire bigint 42: the server is a hot standby", "target_session_attrs=read-write")
				time.Sleep(time.Second)
				wantIdle(t, db)
				if srv.opened != 1 || srv.open() != 0 {
					t.Errorf("%d of %d connections open", srv.open(), srv.opened)
				}
			})
		})
	}
}

func TestAWaitThatComesToAStandbyDuringAnOutageGoesOn(t *testing.T) {
	t.Parallel()
	for _, c := range closures {
		for _, test := range []struct {
			standby time.Duration
			wants   []any
		}{
			{10 * time.Second, nil},
			{time.Hour, []any{"hot standby"}},
		} {
			t.Run(fmt.Sprint(c.name, " ", test.standby), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					db, srv := newServer(t)
					start := time.Now()
					srv.script = func(_ context.Context, conn int, query string) (int64, error) {
						switch {
						case isWait(query) && conn == 1:
							return 0, io.ErrUnexpectedEOF
						case isWait(query) && time.Since(start) < test.standby:
							return 2, nil
						case strings.Contains(query, "_try_") && (conn == 1 || time.Since(start) < test.standby):
							return 0, nil
						}
						return 1, nil
					}
					wantError(t, c.run(t.Context(), db, key, nothing), test.wants...)
					least := min(test.standby, reconnectFor)
					if d := time.Since(start); d < least || d > least+time.Second {
						t.Errorf("after %v", d)
					}
					time.Sleep(time.Second)
					wantIdle(t, db)
				})
			})
		}
	}
}

// A wrapped connection is one that traces statements, and hands out what it wraps.
type wrappedConn struct {
	*fakeConn
	traced *tracer
}

type tracer struct {
	mu  sync.Mutex
	log []string
}

func (w wrappedConn) ExecContext(ctx context.Context, query string, args []driver.NamedValue) (driver.Result, error) {
	w.traced.mu.Lock()
	if query != leftOpenStatement {
		w.traced.log = append(w.traced.log, unchecked(plainly(query)))
	}
	w.traced.mu.Unlock()
	return w.fakeConn.ExecContext(ctx, query, args)
}

type (
	rawConn     struct{ wrappedConn } // as otelsql
	wrappedOnce struct{ wrappedConn } // as dd-trace-go
	wrappedTwo  struct{ wrappedConn } // one in the other
	hidden      struct{ wrappedConn } // hands out nothing
	preparingIn struct{ wrappedConn } // around a driver that cannot execute without preparing
	nilHanded   struct{ wrappedConn } // hands out a nil interface
)

func (c rawConn) Raw() driver.Conn             { return c.fakeConn }
func (c wrappedOnce) WrappedConn() driver.Conn { return c.fakeConn }
func (c wrappedTwo) WrappedConn() driver.Conn  { return rawConn(c) }
func (c preparingIn) Raw() driver.Conn         { return preparing{c.fakeConn} }
func (c nilHanded) Raw() driver.Conn           { return nil }

// Nobody has asked for waits and heartbeats, which a wrapper would trace.
func TestWaitsAndHeartbeatsPassWrappersThatTrace(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name  string
		wrap  func(wrappedConn) driver.Conn
		quiet bool
	}{
		{"Raw", func(c wrappedConn) driver.Conn { return rawConn{c} }, true},
		{"WrappedConn", func(c wrappedConn) driver.Conn { return wrappedOnce{c} }, true},
		{"one in the other", func(c wrappedConn) driver.Conn { return wrappedTwo{c} }, true},
		{"one that hands out nothing", func(c wrappedConn) driver.Conn { return hidden{c} }, false},
		{"one that hands out nil", func(c wrappedConn) driver.Conn { return nilHanded{c} }, false},
		{"one around a driver without ExecerContext", func(c wrappedConn) driver.Conn { return preparingIn{c} }, false},
	} {
		for _, f := range waiters() {
			t.Run(test.name+" "+f.name, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					srv := new(server)
					var traced tracer
					db := sql.OpenDB(connecting{srv, func(c *fakeConn) driver.Conn { return test.wrap(wrappedConn{c, &traced}) }})
					srv.script = func(_ context.Context, _ int, query string) (int64, error) {
						if strings.Contains(query, "_try_") {
							return 0, nil
						}
						return 1, nil
					}
					wantError(t, f.run(t.Context(), db, key, func(ctx context.Context) error {
						time.Sleep(2500 * time.Millisecond)
						return ctx.Err()
					}))
					var sent, quiet []string
					for _, line := range srv.lines() {
						switch line = line[2:]; {
						case slices.Contains([]string{"open", "BEGIN", "BEGIN REPEATABLE READ", "COMMIT"}, line):
						case test.quiet && strings.Contains(line, "/* advisory"):
							quiet = append(quiet, line)
						default:
							sent = append(sent, line)
						}
					}
					if diff := cmp.Diff(sent, traced.log); diff != "" {
						t.Errorf("traced (-want +got):\n%s", diff)
					}
					if test.quiet && len(quiet) == 0 {
						t.Errorf("log: %q", srv.lines())
					}
					time.Sleep(time.Second)
					if err := db.Close(); err != nil {
						t.Error(err)
					}
				})
			})
		}
	}
}
