package advisory

import (
	"context"
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
						if begun, ended := count(lines, "BEGIN")-count(lines, "$BEGIN"), count(lines, " ROLLBACK")-count(lines, "; ROLLBACK")+count(lines, " COMMIT"); begun != ended {
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
					case query == tryCalledQuery:
						return 0, nil
					}
					return 1, nil
				}
				wantError(t, AcquireConn(ctx, conn, key), ErrNotAcquired, context.Canceled)
				time.AfterFunc(20*time.Millisecond, func() { close(free) })
				want := append([]string{"open", tryCalledQuery, calledWaitQuery}, test.unlocks...)
				switch next {
				case "a statement":
					if _, err := conn.ExecContext(t.Context(), "mine"); err != nil {
						t.Error(err)
					}
					want = append(want, "mine")
				case "AcquireConn":
					wantError(t, AcquireConn(t.Context(), conn, key, NoWait()), ErrNotAcquired)
					want = append(want, tryCalledQuery)
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

// A session of the caller's on which a wait has failed that was left may hold the lock. That is unlocked, or the
// session closed, before anybody else has it, even if the caller has closed conn meanwhile. Its other locks stay.
func TestAWaitOfAcquireConnThatFailsAfterItWasLeft(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name         string
		wait, unlock reply
		sent         []string // after the wait
	}{
		{"the session dies", fails(io.ErrUnexpectedEOF), done, []string{"close"}},
		{"the server's error", fails(pgError("XX000")), done, []string{unlockHeldQuery}},
		{"cancelled outside of the block", fails(err57014), done, []string{unlockHeldQuery}},
		{"a standby", reply{rows: 2}, done, []string{unlockHeldQuery}},
		{"the unlock fails", granted, fails(pgError("XX000")), []string{unlockQuery, "close"}},
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
						case query == tryCalledQuery:
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
					want := on(1, append([]string{"open", tryCalledQuery, calledWaitQuery}, test.sent...)...)
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
			_ = s.runLeft(ctx, time.Second, func(context.Context, *caller) error { panic("mine") })
		}()
		if err := s.take(ctx, time.Second); err != nil {
			t.Errorf("the turn: %v", err)
		}
		s.give()
		wantError(t, conn.Close())
	})
}

// Where waits are refused, too, the end of ctx is one at once.
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
					if d := time.Since(start) - end; d > 10*time.Millisecond { // a try on a session of many, or a wait that is refused
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

// A caller who leaves before the statement goes out goes on with conn as it was: nothing is sent then.
func TestNothingIsSentOnceTheCallerHasLeft(t *testing.T) {
	t.Parallel()
	db, srv := newServer(t)
	conn, err := db.Conn(t.Context())
	wantError(t, err)
	used, free := make(chan struct{}), make(chan struct{})
	go func() {
		_ = conn.Raw(func(any) error { // which keeps others from the connection
			close(used)
			<-free
			return nil
		})
	}()
	<-used
	ctx, cancel := context.WithCancel(t.Context())
	time.AfterFunc(10*time.Millisecond, cancel)
	wantError(t, AcquireConn(ctx, conn, key), ErrNotAcquired, context.Canceled)
	close(free)
	_, err = conn.ExecContext(t.Context(), "mine")
	wantError(t, err)
	wantError(t, conn.Close())
	wantError(t, db.Close())
	for _, line := range srv.lines() {
		if strings.Contains(line, "advisory") {
			t.Errorf("sent: %s", line)
		}
	}
}

// A wait that is cancelled outside of its block may have been granted. The end of ctx does not keep it from
// being unlocked.
func TestTheEndOfCtxDoesNotKeepACancelledWaitFromBeingUnlocked(t *testing.T) {
	t.Parallel()
	db, srv := newServer(t)
	ctx, cancel := context.WithCancel(t.Context())
	var unlocked atomic.Bool
	srv.script = func(ctx context.Context, _ int, query string) (int64, error) {
		switch {
		case query == tryQuery:
			return 0, nil
		case isWait(query):
			return 0, err57014
		case strings.HasSuffix(query, freeQuery):
			cancel()
			if ctx.Err() == nil {
				unlocked.Store(true)
			}
		}
		return 1, ctx.Err()
	}
	wantError(t, withConnLock(ctx, db), ErrNotAcquired, context.Canceled)
	if !unlocked.Load() {
		t.Errorf("sent: %q", srv.lines())
	}
}

// The answer of a primary is no grant, for a caller who has left.
func TestTheEndOfCtxDuringTheQuestionForAPrimaryUnlocksNothing(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		db, srv := newServer(t)
		conn, err := db.Conn(t.Context())
		wantError(t, err)
		ctx, cancel := context.WithCancel(t.Context())
		asked := false
		srv.script = func(_ context.Context, _ int, query string) (int64, error) {
			switch {
			case query == tryCalledQuery:
				return 0, nil
			case isWait(query):
				return 0, pgError("42501")
			case query == probeQuery:
				asked = true
				cancel()
				time.Sleep(10 * time.Millisecond)
			}
			return 1, nil
		}
		wantError(t, AcquireConn(ctx, conn, key), ErrNotAcquired, context.Canceled)
		wantError(t, conn.Close())
		if lines := srv.lines(); !asked || slices.Contains(lines, "1 "+unlockQuery) {
			t.Errorf("asked: %v; log: %q", asked, lines)
		}
	})
}
