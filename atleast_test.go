package advisory

import (
	"context"
	"errors"
	"io"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/pgadvisory/advisory/internal/pgsql"
	"github.com/pgadvisory/advisory/internal/session"
)

// The functions that take AtLeast.
var keepers = closures[:3]

var errOfFn = errors.New("fn's own")

// The call returns with fn, and the lock stays until the time is over: for another process, and for
// another caller of this one.
func TestALockStaysForAtLeast(t *testing.T) {
	t.Parallel()
	const d, works = time.Minute, 50 * time.Millisecond
	for _, c := range keepers {
		for name, fnErr := range map[string]error{"nil": nil, "an error": errOfFn} {
			for _, who := range []string{"this process", "another process"} {
				bubble(t, c.name+", "+name+", waited for by "+who, func(t *testing.T) {
					p, dbs, _ := newTable(t, 2)
					db, waits := dbs[0], dbs[0]
					if who == "another process" {
						waits = dbs[1]
					}
					began := time.Now()
					err := c.run(t.Context(), db, key, func(ctx context.Context) error {
						time.Sleep(works)
						return errors.Join(fnErr, ctx.Err())
					}, AtLeast(d))
					if !errors.Is(err, fnErr) {
						t.Errorf("error %v, want %v", err, fnErr)
					}
					wantTook(t, began, works, works)
					for _, db := range dbs {
						wantError(t, c.run(t.Context(), db, key, neverRuns(t), NoWait()), ErrHeld)
					}
					wantError(t, c.run(t.Context(), waits, key, func(context.Context) error {
						wantTook(t, began, d, d)
						return nil
					}))
					p.clean()
					for _, db := range dbs {
						wantIdle(t, db)
					}
				})
			}
		}
	}
}

// What takes longer is released when it ends. So is what has waited longer than that for its lock.
func TestAtLeastIsNoMore(t *testing.T) {
	t.Parallel()
	for _, c := range keepers {
		bubble(t, c.name, func(t *testing.T) {
			p, dbs, _ := newTable(t, 2)
			holdFor(t, dbs[1], key, 5*time.Second)
			began := time.Now()
			wantError(t, c.run(t.Context(), dbs[0], key, sleeps(2*time.Second), AtLeast(time.Second)))
			wantTook(t, began, 7*time.Second, 7*time.Second)
			if n := p.holders(key); n > 0 {
				t.Error("the lock stays")
			}
			wantError(t, c.run(t.Context(), dbs[0], key, nothing, AtLeast(0)))
			if n := p.holders(key); n > 0 {
				t.Error("the lock stays for at least 0")
			}
		})
	}
}

// It counts from the grant, and not from the call.
func TestAtLeastCountsFromTheGrant(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		p, dbs, _ := newTable(t, 2)
		holdFor(t, dbs[1], key, 5*time.Second)
		began := time.Now()
		wantError(t, WithLock(t.Context(), dbs[0], key, nothing, AtLeast(time.Second)))
		wantError(t, WithLock(t.Context(), dbs[1], key, nothing))
		wantTook(t, began, 6*time.Second, 6*time.Second)
		p.clean()
	})
}

func TestALockStaysThoughFnPanics(t *testing.T) {
	t.Parallel()
	for name, ends := range map[string]func(){"panic": func() { panic("mine") }, "Goexit": runtime.Goexit} {
		bubble(t, name, func(t *testing.T) {
			p, dbs, _ := newTable(t, 1)
			ended := make(chan any)
			go func() {
				defer func() { ended <- recover() }()
				_ = WithLock(t.Context(), dbs[0], key, func(context.Context) error { ends(); return nil }, AtLeast(time.Minute))
			}()
			if r := <-ended; r != nil && r != "mine" {
				t.Error(r)
			}
			time.Sleep(59 * time.Second)
			if n := p.holders(key); n != 1 {
				t.Errorf("%d hold the lock", n)
			}
			time.Sleep(time.Second)
			synctest.Wait()
			p.clean()
		})
	}
}

// What is sent: the question whether the session lives, when fn has ended, and the unlock later.
func TestStatementsOfALockThatStays(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		db, srv := newServer(t)
		wantError(t, WithLock(t.Context(), db, key, nothing, AtLeast(time.Second/2)))
		srv.want(t, on(1, "open", tryQuery, pgsql.Ping)...)
		time.Sleep(time.Second / 2)
		synctest.Wait()
		srv.want(t, on(1, "open", tryQuery, pgsql.Ping, unlockQuery)...)
		wantIdle(t, db)
	})
}

// The holder's ctx has ended: it holds nothing, and waits for the lock as others do.
func TestWhoseLockStaysDoesNotHoldIt(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		_, dbs, _ := newTable(t, 1)
		began := time.Now()
		l := take(t, dbs[0], key, AtLeast(time.Minute))
		wantError(t, WithLock(l.Context(), dbs[0], key, nothing, NoWait()), ErrReentrant)
		for range 2 {
			wantError(t, l.Release())
		}
		if !errors.Is(context.Cause(l.Context()), context.Canceled) {
			t.Errorf("after Release, Context's cause is %v", context.Cause(l.Context()))
		}
		_, err := l.Token(t.Context())
		wantError(t, err, ErrLost)
		wantError(t, WithLock(context.WithoutCancel(l.Context()), dbs[0], key, nothing))
		wantTook(t, began, time.Minute, time.Minute)
	})
}

// A shared lock that stays excludes exclusive ones, and not other shared ones.
func TestASharedLockStays(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		p, dbs, _ := newTable(t, 2)
		began := time.Now()
		wantError(t, WithLock(t.Context(), dbs[0], key, nothing, Shared(), AtLeast(time.Minute)))
		for _, db := range dbs {
			wantError(t, WithLock(t.Context(), db, key, nothing, Shared(), NoWait()))
			wantError(t, WithLock(t.Context(), db, key, neverRuns(t), NoWait()), ErrHeld)
		}
		wantTook(t, began, 0, 0)
		wantError(t, WithLock(t.Context(), dbs[0], key, nothing))
		wantTook(t, began, time.Minute, time.Minute)
		p.clean()
	})
}

// A loss has nobody to tell but the Logger and the Observer, each once.
func TestALockIsLostWhileItStays(t *testing.T) {
	t.Parallel()
	const d = time.Minute
	told := func(t *testing.T, log *logBuffer, calls []string, lost bool) {
		t.Helper()
		if n := strings.Count(log.String(), "advisory: lock lost before AtLeast was over"); n != 1 || !strings.Contains(log.String(), "bigint 42: lock lost: ") {
			t.Errorf("%d times in the log: %q", n, log)
		}
		if n := count(calls, "Lost "); n > 1 || lost && n < 1 {
			t.Errorf("the Observer's Lost is called %d times: %q", n, calls)
		}
		if last := calls[len(calls)-1]; !strings.HasPrefix(last, "HoldEnd 1m0s advisory: release bigint 42: lock lost: ") {
			t.Errorf("the last call is %q", last)
		}
	}
	for _, c := range keepers {
		bubble(t, c.name+", found by a heartbeat", func(t *testing.T) {
			p, dbs, srvs := newTable(t, 2)
			var log logBuffer
			var calls []string
			wantError(t, c.run(t.Context(), dbs[0], key, nothing, AtLeast(d), log.option(), Observe(record(&calls))))
			time.Sleep(10 * time.Second)
			p.kill(backendID{srvs[0], 1})
			time.Sleep(2 * defaultHeartbeat)
			if !strings.Contains(log.String(), "lock lost") {
				t.Error("nothing in the log two heartbeats later")
			}
			wantError(t, WithLock(t.Context(), dbs[1], key, nothing, NoWait()))
			wantError(t, WithLock(t.Context(), dbs[0], key, nothing, NoWait()))
			time.Sleep(d)
			synctest.Wait()
			told(t, &log, calls, true)
			p.clean()
			wantIdle(t, dbs[0])
		})
		bubble(t, c.name+", found by the release", func(t *testing.T) {
			db, srv := newServer(t)
			srv.script = func(_ context.Context, _ int, query string) (int64, error) {
				if query == unlockQuery || strings.HasSuffix(query, unlockQuery) {
					return 0, io.ErrUnexpectedEOF
				}
				return 1, nil
			}
			var log logBuffer
			var calls []string
			wantError(t, c.run(t.Context(), db, key, nothing, AtLeast(d), log.option(), Observe(record(&calls)), HolderTimeout(time.Hour), Heartbeat(10*time.Minute)))
			time.Sleep(d + time.Second)
			synctest.Wait()
			told(t, &log, calls, false)
			wantIdle(t, db)
		})
	}
}

// One that is lost before fn ends is lost as always, and does not stay.
func TestALostLockDoesNotStay(t *testing.T) {
	t.Parallel()
	for _, c := range keepers {
		bubble(t, c.name, func(t *testing.T) {
			p, dbs, srvs := newTable(t, 1)
			var log logBuffer
			var calls []string
			began := time.Now()
			err := c.run(t.Context(), dbs[0], key, func(context.Context) error {
				p.kill(backendID{srvs[0], 1})
				return nil
			}, AtLeast(time.Minute), log.option(), Observe(record(&calls)))
			wantError(t, err, ErrLost, "bigint 42")
			if last := calls[len(calls)-1]; !strings.Contains(last, "HoldEnd 0s") {
				t.Errorf("the last call is %q", last)
			}
			wantError(t, c.run(t.Context(), dbs[0], key, nothing, NoWait()))
			wantTook(t, began, 0, 0)
			time.Sleep(2 * time.Minute)
			synctest.Wait()
			if log.String() != "" {
				t.Errorf("log: %q", log.String())
			}
			p.clean()
		})
	}
}

// Of several locks on several sessions, one is lost: the others stay.
func TestOneOfSeveralLocksIsLostWhileTheyStay(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		p, dbs, srvs := newTable(t, 2)
		first, second := ID(1), ID(2)
		holdFor(t, dbs[1], first, time.Second) // the first is waited for, and so on a session of its own
		var log logBuffer
		began := time.Now()
		l := take(t, dbs[0], ID(3)) // on the common session
		wantError(t, WithLocks(t.Context(), dbs[0], []Key{first, second}, nothing, AtLeast(time.Minute), log.option()))
		wantError(t, l.Release())
		p.kill(backendID{srvs[0], 2})
		time.Sleep(10 * time.Second)
		wantError(t, WithLock(t.Context(), dbs[1], first, nothing, NoWait()))
		wantError(t, WithLock(t.Context(), dbs[1], second, neverRuns(t), NoWait()), ErrHeld)
		wantError(t, WithLock(t.Context(), dbs[1], second, nothing))
		wantTook(t, began, 61*time.Second, 61*time.Second)
		time.Sleep(time.Second)
		if n := strings.Count(log.String(), "lock lost"); n != 2 { // message and error
			t.Errorf("log: %q", log.String())
		}
		p.clean()
		wantIdle(t, dbs[0])
	})
}

// A pool that is closed takes no lock away, and the session ends with the lock.
func TestAPoolIsClosedWhileALockStays(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		p, dbs, srvs := newTable(t, 2)
		var log logBuffer
		began := time.Now()
		wantError(t, WithLock(t.Context(), dbs[0], key, nothing, AtLeast(time.Minute), log.option()))
		wantError(t, dbs[0].Close())
		wantError(t, WithLock(t.Context(), dbs[1], key, neverRuns(t), NoWait()), ErrHeld)
		wantError(t, WithLock(t.Context(), dbs[1], key, nothing))
		wantTook(t, began, time.Minute, time.Minute)
		time.Sleep(time.Second)
		if n := srvs[0].open(); n > 0 || log.String() != "" {
			t.Errorf("%d connections are open; log: %q", n, log.String())
		}
		p.clean()
	})
}

// A Lock that was never released is, and stays as long.
func TestAGarbageLockStays(t *testing.T) {
	t.Parallel()
	db, srv := newServer(t)
	var sent atomic.Bool
	asked := make(chan struct{})
	srv.script = func(_ context.Context, _ int, query string) (int64, error) {
		switch query {
		case pgsql.Ping:
			close(asked)
		case unlockQuery:
			sent.Store(true)
		}
		return 1, nil
	}
	var held *hold
	func() {
		l := take(t, db, key, AtLeast(time.Hour))
		held = l.hold
		runtime.KeepAlive(l)
	}()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for asking := true; asking; {
		select {
		case <-asked:
			asking = false
		case <-tick.C:
			runtime.GC()
		case <-time.After(10 * time.Second):
			t.Fatal("not released")
		}
	}
	wantError(t, held.release()) // which has the result of the first
	if sent.Load() {
		t.Error("the lock was unlocked")
	}
	wantError(t, held.locks.Release()) // not in an hour
}

// Thousands of locks stay at a time: for that there is one connection, and no goroutine.
func TestThousandsOfLocksStayWithoutAGoroutineEach(t *testing.T) {
	const n, d = 2_000, 10 * time.Second
	synctest.Test(t, func(t *testing.T) {
		p, dbs, srvs := newTable(t, 1)
		before := runtime.NumGoroutine()
		keys := ids(n)
		for _, k := range keys {
			wantError(t, WithLock(t.Context(), dbs[0], k, nothing, AtLeast(d)))
		}
		synctest.Wait()
		if more := runtime.NumGoroutine() - before; more > 10 {
			t.Errorf("%d goroutines for %d locks", more, n)
		}
		if open := srvs[0].open(); open != 1 {
			t.Errorf("%d connections", open)
		}
		time.Sleep(d - 1)
		for _, k := range keys {
			if p.holders(k) != 1 {
				t.Fatalf("%v does not stay", k)
			}
		}
		time.Sleep(session.ReleaseBound)
		p.clean()
		wantIdle(t, dbs[0])
	})
}
