package advisory

import (
	"context"
	"database/sql/driver"
	"errors"
	"io"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
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
						late := 2 * rtt // a try is waited for, and a grant confirmed
						switch {
						case f.name == "AcquireConn":
							late = sliceMin + 3*rtt // the statement that waits, too
						case ran:
							late = 3 * rtt // of the release
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
						if begun, ended := count(lines, "BEGIN")-count(lines, "DO $advisory$"), count(lines, " ROLLBACK")-count(lines, "; ROLLBACK")+count(lines, " COMMIT"); begun != ended {
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
			bubble(t, c.name+" "+test.name, func(t *testing.T) {
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
					case isTry(query):
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
				wantTook(t, start, 0, 0)
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
		}
	}
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
					p.fail = failing(isWait, pgError("42501"))
					ctx, cancel := context.WithTimeout(t.Context(), end)
					defer cancel()
					start := time.Now()
					wantError(t, f.run(ctx, dbs[0], key, nothing), ErrNotAcquired, context.DeadlineExceeded)
					if d := time.Since(start) - end; d > 10*time.Millisecond { // a try on a session of many, or a wait that is refused
						t.Errorf("%v after the end of ctx", d)
					}
					time.Sleep(time.Second)
					wantIdle(t, dbs[0])
					srvs[0].wantConns(t, srvs[0].opened, srvs[0].opened)
					wantError(t, there.Release())
					p.clean()
				})
			}
		})
	}
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
			p.takes(time.Millisecond)
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
				// A COMMIT that meets the end of ctx costs its connection: database/sql rolls back by itself.
				if srv.open() > 6 || srv.opened-srv.open() > 3 {
					t.Errorf("%d of %d connections open", srv.open(), srv.opened)
				}
			}
			p.clean()
		})
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

// A caller that goes away leaves nothing behind, wherever its request is: in the line for the
// session, under way alone or among others, or answered too late.
func TestACallerThatGoesAwayLeavesNoLock(t *testing.T) {
	t.Parallel()
	for _, others := range []int{0, 2, 30} {
		for after := time.Duration(0); after <= 20*time.Millisecond; after += time.Millisecond / 2 {
			synctest.Test(t, func(t *testing.T) {
				p, dbs, srvs := newTable(t, 1)
				p.takes(3 * time.Millisecond)
				db := dbs[0]
				var wg sync.WaitGroup
				for i, k := range ids(others) {
					wg.Go(func() {
						time.Sleep(time.Duration(i%3) * time.Millisecond)
						wantError(t, WithLock(t.Context(), db, k, sleeps(5*time.Millisecond)))
					})
				}
				ctx, cancel := context.WithTimeout(t.Context(), after)
				defer cancel()
				var ran bool
				wg.Go(func() {
					err := WithLock(ctx, db, key, func(context.Context) error { ran = true; return nil })
					if !ran {
						wantError(t, err, ErrNotAcquired, context.DeadlineExceeded)
					} else {
						wantError(t, err)
					}
					if d := time.Duration(0); !ran && p.holders(key) > 0 && d > 0 {
						t.Error("held")
					}
				})
				// The next in line gets it when it is certain that the first has not.
				wg.Go(func() {
					time.Sleep(time.Millisecond)
					wantError(t, WithLock(t.Context(), db, key, func(ctx context.Context) error {
						if p.holders(key) != 1 {
							t.Errorf("%d holders", p.holders(key))
						}
						return ctx.Err()
					}))
				})
				wg.Wait()
				time.Sleep(time.Minute)
				wantIdle(t, db)
				p.clean()
				if srvs[0].opened > 1 {
					t.Errorf("%d connections", srvs[0].opened)
				}
			})
		}
	}
}

// A statement that is broken off at the end of ctx leaves a session that may hold the lock, even if the
// driver's connection is well.
func TestAStatementThatIsBrokenOffLeavesNoLock(t *testing.T) {
	t.Parallel()
	for _, stuckIn := range []string{tryCalledQuery, calledWaitQuery} {
		synctest.Test(t, func(t *testing.T) {
			db, srv := newServer(t)
			conn, err := db.Conn(t.Context())
			wantError(t, err)
			ctx, cancel := context.WithCancel(t.Context())
			srv.script = func(ctx context.Context, _ int, query string) (int64, error) {
				if plainly(query) == stuckIn {
					cancel()
					<-ctx.Done()
					return 0, ctx.Err()
				}
				return 0, nil
			}
			wantError(t, AcquireConn(ctx, conn, key), ErrNotAcquired, context.Canceled)
			_ = conn.Close()
			if srv.open() != 0 {
				t.Errorf("%s: the connection is still open", stuckIn)
			}
		})
	}
}
