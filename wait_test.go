package advisory

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
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

// A wait whose ctx ends, whenever, returns at once, and leaves nothing: no lock, no setting, no
// transaction, no goroutine. It costs no connection. Another process holds the lock, and
// releases it in the middle, so that the grant meets the end of ctx.
func TestTheEndOfCtxDuringAWait(t *testing.T) {
	t.Parallel()
	const rtt = 10 * time.Millisecond
	for i, f := range waiters() {
		for j, opts := range [][]Option{nil, {HolderTimeout(time.Minute)}} {
			if j > 0 && f.name == "AcquireConn" {
				continue
			}
			t.Run(f.name, func(t *testing.T) {
				for end := time.Duration(1+i+3*j) * time.Millisecond; end < 320*time.Millisecond; end += 5 * time.Millisecond {
					synctest.Test(t, func(t *testing.T) {
						p, dbs, srvs := newTable(t, 2)
						there := take(t, dbs[1], key)
						time.AfterFunc(180*time.Millisecond, func() { wantError(t, there.Release()) })
						p.takes(rtt)
						ctx, cancel := context.WithCancel(t.Context())
						var ended time.Time
						time.AfterFunc(end, func() { ended = time.Now(); cancel() })
						ran := false
						err := f.run(ctx, dbs[0], key, func(context.Context) error {
							ran = true
							<-ctx.Done()
							return nil
						}, opts...)
						late := time.Duration(0)
						switch {
						case ran:
							late = 3 * rtt // of the release
						case strings.HasPrefix(f.name, "WithLock"), f.name == "Acquire":
							late = 2 * rtt // a try on a session of many is waited for, and a grant confirmed
						}
						if d := time.Since(ended); d > late {
							t.Errorf("ctx ended after %v, and %s returned %v later", end, f.name, d)
						}
						if !ran {
							wantError(t, err, ErrNotAcquired, context.Canceled)
						}
						// It does not block those who come after it.
						wantError(t, f.run(t.Context(), dbs[0], ID(43), nothing))
						wantError(t, f.run(t.Context(), dbs[1], ID(43), nothing))
						time.Sleep(time.Second)
						wantIdle(t, dbs[0])
						if srvs[0].open() != srvs[0].opened {
							t.Errorf("ctx ended after %v: %d of %d connections open: %q", end, srvs[0].open(), srvs[0].opened, srvs[0].lines())
						}
						lines := srvs[0].lines()
						if begun, ended := count(lines, "BEGIN")-count(lines, "$BEGIN"), count(lines, " ROLLBACK")-count(lines, "*/ ROLLBACK")+count(lines, " COMMIT"); begun != ended {
							t.Errorf("ctx ended after %v: %d of %d transactions ended: %q", end, ended, begun, lines)
						}
						p.clean()
						wantError(t, f.run(t.Context(), dbs[0], key, nothing, NoWait()))
						wantError(t, there.Release())
						p.clean()
					})
				}
			})
		}
	}
}

// A wait that is left has the turn on the caller's session until it has ended, and whatever it got is
// unlocked before the caller's next statement.
func TestTheCallersNextStatementComesAfterAWaitThatWasLeft(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name    string
		rows    int64 // of the wait
		unlocks []string
	}{
		{"granted", 1, []string{unlockQuery}},
		{"not granted", 0, nil},
	} {
		for _, next := range []string{"a statement", "AcquireConn", "Close"} {
			t.Run(test.name+", "+next, func(t *testing.T) {
				// In real time, because database/sql waits for its own locks here.
				db, srv := newServer(t)
				conn, err := db.Conn(t.Context())
				if err != nil {
					t.Fatal(err)
				}
				defer conn.Close()
				ctx, cancel := context.WithCancel(t.Context())
				free := make(chan struct{})
				srv.script = func(ctx context.Context, _ int, query string) (int64, error) {
					switch {
					case isWait(query):
						cancel()
						<-free
						return test.rows, ctx.Err()
					case query == tryQuery:
						return 0, nil
					}
					return 1, nil
				}
				wantError(t, AcquireConn(ctx, conn, key), ErrNotAcquired, context.Canceled)
				time.AfterFunc(20*time.Millisecond, func() { close(free) })
				want := append([]string{"open", tryQuery, calledWaitQuery}, test.unlocks...)
				switch next {
				case "a statement":
					if _, err := conn.ExecContext(t.Context(), "mine"); err != nil {
						t.Error(err)
					}
					want = append(want, "mine")
				case "AcquireConn":
					wantError(t, AcquireConn(t.Context(), conn, key, NoWait()), ErrNotAcquired)
					want = append(want, tryQuery)
				case "Close":
					if err := conn.Close(); err != nil {
						t.Error(err)
					}
				}
				srv.want(t, on(1, want...)...)
				if next == "Close" {
					wantIdle(t, db)
				}
			})
		}
	}
}

// A session of the caller's on which a wait has failed that was left may hold the lock. It is closed before
// anybody else has it, even if the caller has closed conn meanwhile.
func TestAWaitOfAcquireConnThatFailsAfterItWasLeft(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name         string
		wait, unlock reply
		sent         []string // after the wait
	}{
		{"the session dies", fails(io.ErrUnexpectedEOF), done, []string{"close"}},
		{"the server's error", fails(pgError("XX000")), done, []string{freeQuery, "close"}},
		{"cancelled outside of the block", fails(err57014), done, []string{freeQuery, "close"}},
		{"a standby", reply{rows: 2}, done, []string{freeQuery, "close"}},
		{"the unlock fails", granted, fails(pgError("XX000")), []string{unlockQuery, freeQuery, "close"}},
		{"the session dies in the unlock", granted, fails(io.ErrUnexpectedEOF), []string{unlockQuery, "close"}},
	} {
		for _, closed := range []bool{false, true} { // by the caller
			t.Run(fmt.Sprint(test.name, " ", closed), func(t *testing.T) {
				t.Parallel()
				// In real time, because database/sql waits for its own locks here.
				for range 20 {
					db, srv := newServer(t)
					conn, err := db.Conn(t.Context())
					if err != nil {
						t.Fatal(err)
					}
					ctx, cancel := context.WithCancel(t.Context())
					free := make(chan struct{})
					srv.script = func(_ context.Context, _ int, query string) (int64, error) {
						switch {
						case isWait(query):
							cancel()
							<-free
							return test.wait.rows, test.wait.err
						case query == tryQuery:
							return 0, nil
						case query == unlockQuery:
							return test.unlock.rows, test.unlock.err
						}
						return 1, nil
					}
					wantError(t, AcquireConn(ctx, conn, key), ErrNotAcquired, context.Canceled)
					if closed {
						time.AfterFunc(time.Millisecond, func() { close(free) })
						_ = conn.Close() // or has been closed already
					} else {
						close(free)
					}
					want := on(1, append([]string{"open", tryQuery, calledWaitQuery}, test.sent...)...)
					if closed && slices.Contains(test.sent, freeQuery) {
						want = want[:len(want)-1] // it holds nothing: database/sql may pool it or not
					}
					for i := 0; len(srv.lines()) < len(want) && i < 2000; i++ {
						time.Sleep(time.Millisecond)
					}
					_ = conn.Close()
					lines := srv.lines()
					if len(lines) > len(want) && lines[len(want)] == "1 close" {
						lines = lines[:len(want)]
					}
					if diff := cmp.Diff(want, lines); diff != "" {
						t.Fatalf("log of the server (-want +got):\n%s", diff)
					}
				}
			})
		}
	}
}

// On a session of ours, what such a wait may have got is freed, or the session closed.
func TestAWaitThatFailsAfterItWasLeft(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name  string
		wait  reply
		free  reply
		close bool
	}{
		{"the session dies", fails(io.ErrUnexpectedEOF), fails(driver.ErrBadConn), true},
		{"the server's error", fails(pgError("XX000")), done, false},
		{"the server's error, and it cannot be freed", fails(pgError("XX000")), fails(pgError("XX000")), true},
		{"cancelled outside of the block", fails(err57014), done, false},
		{"granted", granted, done, false},
		{"granted, and it cannot be freed", granted, fails(pgError("XX000")), true},
		{"a standby", reply{rows: 2}, done, false},
	} {
		for _, c := range closures {
			t.Run(c.name+" "+test.name, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					db, srv := newServer(t)
					ctx, cancel := context.WithCancel(t.Context())
					held := false
					srv.script = func(_ context.Context, _ int, query string) (int64, error) {
						switch {
						case isWait(query):
							cancel()
							time.Sleep(50 * time.Millisecond)
							held = true // it may be
							return test.wait.rows, test.wait.err
						case strings.Contains(query, "_try_"):
							return 0, nil
						case strings.HasSuffix(query, freeQuery), query == "ROLLBACK":
							if strings.HasPrefix(c.name, "WithTxLock") != (query == "ROLLBACK") && test.free.err == nil {
								held = false
							}
							return test.free.rows, test.free.err
						}
						return 1, nil
					}
					start := time.Now()
					wantError(t, c.run(ctx, db, key, nothing), ErrNotAcquired, context.Canceled)
					if d := time.Since(start); d > 0 {
						t.Errorf("after %v", d)
					}
					time.Sleep(5 * time.Second)
					wantIdle(t, db)
					if want := map[bool]int{false: 1}[test.close]; srv.open() != want || db.Stats().Idle != want {
						t.Errorf("%d connections open, want %d; log: %q", srv.open(), want, srv.lines())
					}
					lines := srv.lines()
					if !test.close && held && c.name != "WithTxLock" && !strings.HasSuffix(lines[len(lines)-1], freeQuery) {
						t.Errorf("the lock may be held: %q", lines)
					}
				})
			})
		}
	}
}

// A panic of the driver in a wait is its caller's, and leaves the turn and the connection as they
// are to be.
func TestADriverThatPanicsInAWait(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		db, srv := newServer(t)
		conn, err := db.Conn(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		srv.direct = true
		s := newSession(conn, nil, &config{})
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		func() {
			defer func() {
				if r := recover(); r != "mine" {
					t.Errorf("recovered %v", r)
				}
			}()
			_ = s.runLeft(ctx, time.Second, func(context.Context, func() bool) error { panic("mine") })
		}()
		if err := s.take(ctx, time.Second); err != nil {
			t.Errorf("the turn: %v", err)
		}
		s.give()
		wantError(t, conn.Close())
	})
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

// So is the end of ctx, as everywhere.
func TestTheEndOfCtxWhereWaitsAreRefused(t *testing.T) {
	t.Parallel()
	for _, f := range waiters() {
		t.Run(f.name, func(t *testing.T) {
			for end := time.Millisecond; end < 300*time.Millisecond; end += 7 * time.Millisecond {
				synctest.Test(t, func(t *testing.T) {
					p, dbs, srvs := newTable(t, 2)
					there := take(t, dbs[1], key)
					p.takes(5 * time.Millisecond)
					p.fail = func(_ int, query string) error {
						if isWait(query) {
							return pgError("42501")
						}
						return nil
					}
					ctx, cancel := context.WithTimeout(t.Context(), end)
					defer cancel()
					start := time.Now()
					wantError(t, f.run(ctx, dbs[0], key, nothing), ErrNotAcquired, context.DeadlineExceeded)
					if d := time.Since(start) - end; d > 5*time.Millisecond { // a try on a session of many
						t.Errorf("%v after the end of ctx", d)
					}
					time.Sleep(time.Second)
					wantIdle(t, dbs[0])
					if srvs[0].open() != srvs[0].opened {
						t.Errorf("%d of %d connections open", srvs[0].open(), srvs[0].opened)
					}
					wantError(t, there.Release())
					p.clean()
				})
			}
		})
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
	w.traced.log = append(w.traced.log, plainly(query))
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

// A wait that is left is one of those that the pool can spare until it has ended.
func TestAWaitThatIsLeftCountsUntilItHasEnded(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		p, dbs, srvs := newTable(t, 2)
		dbs[0].SetMaxOpenConns(4) // a shared session, and one that waits
		there := take(t, dbs[1], key)
		p.takes(millisecond)
		for range 10 {
			ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
			wantError(t, WithLock(ctx, dbs[0], key, nothing), ErrNotAcquired, context.DeadlineExceeded)
			cancel()
			if n := p.waiters(key); n > 1 {
				t.Errorf("%d waits at once", n)
			}
		}
		time.Sleep(time.Second)
		if srvs[0].opened > 2 || srvs[0].open() != srvs[0].opened {
			t.Errorf("%d of %d connections open", srvs[0].open(), srvs[0].opened)
		}
		wantIdle(t, dbs[0])
		wantError(t, there.Release())
		p.clean()
	})
}

// Of many that wait, and go away at any time, nothing is left, and there are never more connections than
// the pool's.
func TestManyWaitsThatAreLeft(t *testing.T) {
	t.Parallel()
	for seed := range 5 {
		synctest.Test(t, func(t *testing.T) {
			p, dbs, srvs := newTable(t, 2)
			for _, db := range dbs {
				db.SetMaxOpenConns(6)
				db.SetMaxIdleConns(6)
			}
			p.takes(millisecond)
			var holders atomic.Int32
			var wg sync.WaitGroup
			for i := range 40 {
				for j, f := range waiters() {
					wg.Go(func() {
						time.Sleep(time.Duration(i*50+j*7+seed*3) * time.Millisecond)
						ctx, cancel := context.WithTimeout(t.Context(), time.Duration(20+(i*37+j*53+seed*11)%400)*time.Millisecond)
						defer cancel()
						err := f.run(ctx, dbs[(i+j)%2], key, func(context.Context) error {
							if f.name == "WithTxLock" {
								return nil // whose transaction, and with it the lock, ends with ctx
							}
							if holders.Add(1) != 1 {
								t.Error("two hold the lock")
							}
							time.Sleep(15 * time.Millisecond)
							holders.Add(-1)
							return nil
						})
						if err != nil && !errors.Is(err, ErrNotAcquired) && !errors.Is(err, context.DeadlineExceeded) {
							t.Error(err)
						}
					})
				}
			}
			wg.Wait()
			time.Sleep(time.Second)
			for i, srv := range srvs {
				wantIdle(t, dbs[i])
				if srv.open() > 6 || srv.opened-srv.open() > 0 {
					t.Errorf("%d of %d connections open", srv.open(), srv.opened)
				}
			}
			p.clean()
		})
	}
}
