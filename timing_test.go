package advisory

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/pgadvisory/advisory/internal/lockconn"
	"github.com/pgadvisory/advisory/internal/manager"
	"github.com/pgadvisory/advisory/internal/pgsql"
	"github.com/pgadvisory/advisory/internal/session"
)

// newConn returns a Conn that holds the lock of key.
func newConn(t *testing.T, db *sql.DB) *lockconn.Conn {
	t.Helper()
	s, err := manager.For(db).Pool(db).Open(t.Context(), session.Silent, session.ForLocks)
	wantError(t, err)
	c := lockconn.New(s, session.Silent, nil, false, func(*lockconn.Conn) {})
	r := &lockconn.Request{Op: lockconn.Try, Keys: []pgsql.Key{key.key}}
	wantError(t, c.Ask(t.Context(), r))
	if !r.OK {
		t.Fatal("not granted")
	}
	return c
}

// A caller who leaves before its request has been served, in the moment in which it would be, takes
// the others' locks with it.
func TestARequestLeftBeforeItIsServed(t *testing.T) {
	for i := range 100 {
		_, dbs, _ := newTable(t, 1)
		c := newConn(t, dbs[0])
		h := &lockconn.Holder{Heartbeat: time.Minute, IdleTimeout: time.Hour}
		lost := make(chan error, 1)
		h.Begin(func(cause error) { lost <- cause })
		wantError(t, c.Hold(h))
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		_ = c.Ask(ctx, &lockconn.Request{Op: lockconn.Try, Keys: []pgsql.Key{ID(43).key}})
		time.Sleep(time.Millisecond)
		if err := c.Lost(); err != nil {
			t.Fatalf("round %d: %v, and the holder is told: %v", i, err, <-lost)
		}
	}
}

// The same from above: of many who leave, one in some ten thousand, on a busy machine more.
func TestManyWhoLeaveAtOnce(t *testing.T) {
	db, _ := newServer(t)
	l := take(t, db, key)
	var wg sync.WaitGroup
	for w := range 16 {
		wg.Go(func() {
			for i := 0; i < 3000 && l.Context().Err() == nil; i++ {
				ctx, cancel := context.WithTimeout(t.Context(), time.Duration(i%100)*time.Microsecond)
				_ = WithLock(ctx, db, ID(int64(1000+w)), nothing)
				cancel()
			}
		})
	}
	wg.Wait()
	if l.Context().Err() != nil {
		t.Error(context.Cause(l.Context()))
	}
	wantError(t, l.Release())
}

// A Ping has an answer of the server's, also together with a heartbeat that has nothing to ask.
func TestAPingBesideAHeartbeat(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p, dbs, srvs := newTable(t, 1)
		c := newConn(t, dbs[0])
		p.takes(time.Millisecond)
		go func() { _ = c.Ask(t.Context(), &lockconn.Request{Op: lockconn.Ping}) }() // under way
		synctest.Wait()
		go func() { _ = c.Prove(t.Context()) }()
		answered := make(chan error, 1)
		go func() { answered <- c.Ask(t.Context(), &lockconn.Request{Op: lockconn.Ping}) }()
		synctest.Wait()
		time.Sleep(time.Millisecond / 2)
		n := len(srvs[0].lines())
		time.Sleep(time.Second)
		if lines := srvs[0].lines(); <-answered == nil && len(lines) == n {
			t.Errorf("nothing was sent, and the release said that the lock was held: %q", lines)
		}
		wantError(t, c.Ask(t.Context(), &lockconn.Request{Op: lockconn.Unlock, Keys: []pgsql.Key{key.key}}))
		c.Leave()
	})
}

// An endingCtx ends by a Timeout between its caller's look at it and the statement.
type endingCtx struct {
	context.Context
	looks *atomic.Int32
}

func (c endingCtx) Err() error {
	if c.looks.Add(1) <= 1 {
		return nil
	}
	return c.Context.Err()
}

// A Timeout that is over in the moment in which a wait goes out bounds it, too.
func TestATimeoutBeforeTheStatementIsGuarded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		db, srv := newServer(t)
		srv.direct = true
		srv.script = func(ctx context.Context, _ int, query string) (int64, error) {
			if isWait(query) {
				<-ctx.Done() // no answer
				return 0, ctx.Err()
			}
			return 1, nil
		}
		s, err := manager.For(db).Pool(db).Open(t.Context(), session.Silent, session.ForLocks)
		wantError(t, err)
		ctx, cancel := context.WithCancelCause(t.Context())
		cancel(session.ErrTimeout)
		start := time.Now()
		err = s.Wait(endingCtx{ctx, new(atomic.Int32)}, key.key, start)
		if d := time.Since(start); d > time.Second {
			t.Errorf("after %v: %v", d, err)
		}
		s.Discard()
		time.Sleep(time.Minute)
	})
}

// Refused tries are answers, too: the session lives.
func TestRefusedTriesAndTheHeartbeat(t *testing.T) {
	for _, shared := range []bool{false, true} {
		t.Run(fmt.Sprint("looks: ", shared), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				p, dbs, _ := newTable(t, 2)
				p.takes(300 * time.Millisecond)
				l := take(t, dbs[0], key)
				var there []*Lock
				for _, k := range ids(9) {
					if shared {
						there = append(there, take(t, dbs[0], k, Shared()))
					} else {
						there = append(there, take(t, dbs[1], k))
					}
				}
				if err := l.Context().Err(); err != nil {
					t.Fatal("too early")
				}
				var wg sync.WaitGroup
				for range 3 {
					for _, k := range ids(9) {
						wg.Go(func() {
							opts := []Option{NoWait()}
							if shared {
								opts = append(opts, Shared())
							}
							_ = WithLock(t.Context(), dbs[0], k, nothing, opts...)
						})
					}
					time.Sleep(10 * time.Second)
				}
				wg.Wait()
				if l.Context().Err() != nil {
					t.Errorf("lost: %v", context.Cause(l.Context()))
				}
				wantError(t, l.Release())
				for _, l := range there {
					_ = l.Release()
				}
				time.Sleep(time.Second) // the sessions are cleaned
			})
		})
	}
}

// A grant that was long on its way is confirmed; but not for longer than its caller waits.
func TestATimeoutWhileAGrantIsConfirmed(t *testing.T) {
	for _, test := range []struct {
		name string
		opts []Option
		ctx  time.Duration
	}{
		{"Timeout", []Option{Timeout(300 * time.Millisecond)}, time.Hour},
		{"ctx", nil, 300 * time.Millisecond},
	} {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				db, srv := newServer(t)
				srv.direct = true
				srv.script = func(ctx context.Context, _ int, query string) (int64, error) {
					switch {
					case isWait(query):
						time.Sleep(90 * time.Millisecond)
						return 1, nil
					case isBeat(query):
						<-ctx.Done() // the server is out of reach
						return 0, ctx.Err()
					case strings.Contains(query, "_try_"):
						return 0, nil
					}
					return 1, nil
				}
				ctx, cancel := context.WithTimeout(t.Context(), test.ctx)
				defer cancel()
				start := time.Now()
				err := WithLock(ctx, db, key, nothing, append(test.opts, Heartbeat(50*time.Millisecond), HolderTimeout(time.Second))...)
				if d := time.Since(start); d > 1300*time.Millisecond {
					t.Errorf("after %v: %v", d, err)
				}
				if !errors.Is(err, ErrNotAcquired) {
					t.Error(err)
				}
				time.Sleep(time.Minute)
			})
		})
	}
}

// A lock that is lost as soon as it is granted, again and again, is an error in the end.
func TestALockThatIsLostAsSoonAsItIsGranted(t *testing.T) {
	for name, fail := range map[string]error{"dies": io.ErrUnexpectedEOF, "is another": nil} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				db, srv := newServer(t)
				beats := 0
				ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
				defer cancel()
				srv.script = func(ctx context.Context, _ int, query string) (int64, error) {
					switch {
					case isWait(query):
						time.Sleep(90 * time.Millisecond)
						return 1, nil
					case isBeat(query):
						beats++
						return 0, fail
					case strings.Contains(query, "_try_"):
						return 0, nil
					}
					return 1, nil
				}
				err := WithLock(ctx, db, key, nothing, Heartbeat(50*time.Millisecond), HolderTimeout(time.Second))
				if ctx.Err() != nil {
					t.Errorf("%d attempts, until ctx ended: %v", beats, err)
				}
				time.Sleep(time.Minute)
			})
		})
	}
}

// A statement that takes the lock and is broken off by the end of ctx may have taken it.
func TestAStatementThatIsBrokenOff(t *testing.T) {
	for _, name := range []string{"AcquireConn, wait", "AcquireConn, try", "WithConnLock, try", "WithTxLock REPEATABLE READ, try", "WithConnLock, undo"} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				db, srv := newServer(t)
				srv.checkless = true
				ctx, cancel := context.WithCancel(t.Context())
				held, closed := false, false
				srv.ended = func(int) { closed = true }
				srv.script = func(ctx context.Context, _ int, query string) (int64, error) {
					take := func() (int64, error) {
						cancel()
						held = true
						<-ctx.Done() // the driver gives up, and keeps the connection
						return 0, ctx.Err()
					}
					switch {
					case isWait(query) && strings.HasSuffix(name, "undo"):
						held = true
						return 0, err57014
					case query == freeQuery && strings.HasSuffix(name, "undo") && ctx.Err() == nil && held && !closed && ctxIs(&cancelled, cancel):
						<-ctx.Done()
						return 0, ctx.Err()
					case isWait(query):
						return take()
					case strings.Contains(query, "_try_") && strings.HasSuffix(name, "try"):
						return take()
					case strings.Contains(query, "_try_"):
						return 0, nil
					case strings.Contains(query, "unlock"):
						held = false
					}
					return 1, nil
				}
				cancelled.Store(false)
				switch {
				case strings.HasPrefix(name, "AcquireConn"):
					conn, err := db.Conn(t.Context())
					wantError(t, err)
					wantError(t, AcquireConn(ctx, conn, key), ErrNotAcquired, context.Canceled)
					_ = conn.Close()
				case strings.HasPrefix(name, "WithConnLock"):
					for i := range 2 { // the first one finds that the server does not check
						if i > 0 && strings.HasSuffix(name, "undo") {
							break
						}
						wantError(t, withConnLock(ctx, db), ErrNotAcquired, context.Canceled)
						time.Sleep(10 * time.Second)
						ctx, cancel = context.WithCancel(t.Context())
					}
				default:
					for range 2 {
						wantError(t, WithTxLock(ctx, db, key, func(context.Context, *sql.Tx) error { return nil },
							TxOptions(&sql.TxOptions{Isolation: sql.LevelRepeatableRead})), ErrNotAcquired, context.Canceled)
						time.Sleep(10 * time.Second)
						ctx, cancel = context.WithCancel(t.Context())
					}
				}
				time.Sleep(10 * time.Second)
				if held && srv.open() > 0 {
					t.Errorf("the lock is held on a connection of the pool: %q", srv.lines())
				}
				cancel()
			})
		})
	}
}

var cancelled atomic.Bool

func ctxIs(b *atomic.Bool, cancel func()) bool {
	if b.Swap(true) {
		return false
	}
	cancel()
	return true
}

// While a connection is made, the same call does not make another.
func TestASlowDialIsOne(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		db, srv := newServer(t)
		db.SetMaxOpenConns(10)
		srv.dial = func(context.Context) error {
			time.Sleep(2 * time.Second)
			return nil
		}
		wantError(t, WithTxLock(t.Context(), db, key, func(context.Context, *sql.Tx) error { return nil }))
		time.Sleep(time.Minute)
		if srv.opened > 2 {
			t.Errorf("%d connections were made for one", srv.opened)
		}
	})
}

// The driver's error is not lost with ctx.
func TestTheServersErrorAtTheEndOfCtx(t *testing.T) {
	full := pgError("53200")
	for _, c := range closures {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				db, srv := newServer(t)
				ctx, cancel := context.WithCancel(t.Context())
				srv.script = func(_ context.Context, _ int, query string) (int64, error) {
					if strings.Contains(query, "_try_") {
						cancel()
						return 0, full
					}
					return 1, nil
				}
				wantError(t, c.run(ctx, db, key, nothing), ErrNotAcquired, context.Canceled, full)
				time.Sleep(time.Minute)
			})
		})
	}
}

// Statements that take long, but not for ever, do not add up beyond the end of ctx.
func TestHowLateTheEndIs(t *testing.T) {
	type late struct {
		d    time.Duration
		what string
	}
	var worst []late
	for _, rtt := range []time.Duration{200 * time.Millisecond, 350 * time.Millisecond, 390 * time.Millisecond} {
		for _, refused := range []bool{false, true} {
			for _, timeout := range []bool{false, true} {
				for _, f := range waiters() {
					w := late{}
					// Never in the moment in which a statement ends: the bubble's time stands still for one who
					// waits for a mutex of database/sql's.
					for end := 50*time.Millisecond + 500*time.Microsecond; end < 3*time.Second; end += 70 * time.Millisecond {
						synctest.Test(t, func(t *testing.T) {
							db, srv := newServer(t)
							_ = db.PingContext(t.Context())
							wantError(t, WithLock(t.Context(), db, ID(7), nothing)) // a connection lies ready
							srv.rows = func(int, []driver.NamedValue) ([][]driver.Value, error) {
								time.Sleep(rtt)
								return nil, nil
							}
							srv.reset = func(context.Context, int) error {
								time.Sleep(rtt) // as pgx asks whether an idle connection lives
								return nil
							}
							srv.script = func(ctx context.Context, _ int, query string) (int64, error) {
								d := rtt
								if isWait(query) {
									d += boundIn(t, query)
								}
								time.Sleep(d)
								switch {
								case query == tryTxQuery || strings.Contains(query, "THEN 2") && strings.Contains(query, "xact") && !isWait(query):
									return pgsql.OneSnapshot, nil
								case refused && (strings.Contains(query, "_try_") || isWait(query)):
									return 0, nil
								}
								return 1, nil
							}
							var ctx = t.Context()
							var opts []Option
							var ended time.Time
							start := time.Now()
							if timeout {
								opts = append(opts, Timeout(end))
								ended = start.Add(end)
							} else {
								c, cancel := context.WithCancel(ctx)
								time.AfterFunc(end, cancel)
								ctx, ended = c, start.Add(end)
							}
							ran := false
							err := f.run(ctx, db, key, func(context.Context) error { ran = true; return nil }, opts...)
							if !ran && err != nil {
								if d := time.Since(ended); d > w.d {
									w = late{d, fmt.Sprintf("rtt %v refused %v timeout %v %s end %v: %v", rtt, refused, timeout, f.name, end, err)}
								}
							}
							time.Sleep(time.Minute)
						})
					}
					worst = append(worst, w)
				}
			}
		}
	}
	for _, w := range worst {
		if w.d > time.Second {
			t.Errorf("%v late: %s", w.d, w.what)
		}
	}
}

// A caller whose request has been answered does not wait for what others have left.
func TestATimeoutWhileAnotherRequestIsUndone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p, dbs, srvs := newTable(t, 2)
		db := dbs[0]
		srvs[0].direct = true
		l := take(t, db, key, Heartbeat(20*time.Second), HolderTimeout(time.Minute))
		there := take(t, dbs[1], ID(2)) // B is refused, and would wait
		p.takes(100 * time.Millisecond)
		answer := srvs[0].script
		srvs[0].script = func(ctx context.Context, conn int, query string) (int64, error) {
			if strings.Contains(query, "pg_advisory_unlock(3)") {
				<-ctx.Done() // no answer
				return 0, ctx.Err()
			}
			return answer(ctx, conn, query)
		}
		go func() {
			_ = WithLock(t.Context(), db, ID(1), func(context.Context) error { time.Sleep(time.Hour); return nil })
		}()
		time.Sleep(time.Millisecond)
		var took time.Duration
		var err error
		go func() {
			start := time.Now()
			err = WithLock(t.Context(), db, ID(2), nothing, Timeout(400*time.Millisecond), Heartbeat(20*time.Second), HolderTimeout(time.Minute))
			took = time.Since(start)
		}()
		time.Sleep(time.Millisecond)
		ctx, cancel := context.WithTimeout(t.Context(), 250*time.Millisecond)
		defer cancel()
		_ = WithLock(ctx, db, ID(3), nothing)
		time.Sleep(time.Minute)
		synctest.Wait()
		if took > 1400*time.Millisecond {
			t.Errorf("after %v: %v", took, err)
		}
		_ = l.Release()
		_ = there.Release()
		time.Sleep(time.Hour)
	})
}

// A driver that panics when a session is given up leaves no lock.
func TestAPanicWhileASessionIsGivenUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		db, srv := newServer(t)
		ctx, cancel := context.WithCancel(t.Context())
		var held, closed, panicked atomic.Bool
		srv.ended = func(int) { closed.Store(true) }
		srv.script = func(_ context.Context, _ int, query string) (int64, error) {
			switch {
			case isWait(query):
				cancel()
				time.Sleep(50 * time.Millisecond)
				held.Store(true)
				return 1, nil
			case strings.Contains(query, "_try_"):
				return 0, nil
			case strings.HasSuffix(query, freeQuery):
				if !panicked.Swap(true) {
					panic("driver")
				}
				held.Store(false)
			}
			return 1, nil
		}
		wantError(t, WithLock(ctx, db, key, nothing), ErrNotAcquired, context.Canceled)
		time.Sleep(time.Minute)
		if held.Load() && !closed.Load() {
			t.Errorf("the lock is held, and %d connections are in use: %s", db.Stats().InUse, describe(db))
		}
		if s := describe(db); s != "" {
			t.Errorf("kept: %s", s)
		}
	})
}

// A Release takes no more than some ten seconds.
func TestAReleaseBehindSlowStatements(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p, dbs, _ := newTable(t, 2)
		var slow atomic.Bool
		p.rtt = func() time.Duration {
			if slow.Load() {
				return 3 * time.Second
			}
			return 0
		}
		l := take(t, dbs[0], key)
		for _, k := range ids(12) {
			k := take(t, dbs[1], k)
			defer k.Release()
		}
		slow.Store(true)
		var wg sync.WaitGroup
		for _, k := range ids(8) {
			wg.Go(func() {
				_ = WithLock(t.Context(), dbs[0], k, nothing, NoWait())
			})
			time.Sleep(time.Millisecond)
		}
		defer time.Sleep(5 * time.Minute)
		start := time.Now()
		err := l.Release()
		if d := time.Since(start); d > 11*time.Second {
			t.Errorf("after %v: %v", d, err)
		}
		wg.Wait()
	})
}

// The Manager counts no session that was not opened.
func TestAPanicWhileASessionIsOpenedIsNotCounted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		db, srv := newServer(t)
		wantError(t, WithLock(context.Background(), db, key, nothing))
		srv.panicOnReset()
		func() {
			defer func() { _ = recover() }()
			_ = WithLock(context.Background(), db, key, nothing)
		}()
		time.Sleep(time.Minute)
		if s := describe(db); s != "" {
			t.Errorf("kept: %s", s)
		}
	})
}

// The end of a Timeout is ErrNotAcquired, whatever the server does.
func TestATimeoutWithoutAnAnswer(t *testing.T) {
	for _, name := range []string{"AcquireConn", "AcquireTx"} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				db, srv := newServer(t)
				srv.script = func(ctx context.Context, _ int, query string) (int64, error) {
					if strings.Contains(query, "_try_") {
						<-ctx.Done()
						return 0, ctx.Err()
					}
					return 1, nil
				}
				var err error
				if name == "AcquireConn" {
					conn, _ := db.Conn(t.Context())
					err = AcquireConn(t.Context(), conn, key, Timeout(300*time.Millisecond))
					_ = conn.Close()
				} else {
					tx, _ := db.BeginTx(t.Context(), nil)
					err = AcquireTx(t.Context(), tx, key, Timeout(300*time.Millisecond))
					_ = tx.Rollback()
				}
				if !errors.Is(err, ErrNotAcquired) {
					t.Error(err)
				}
			})
		})
	}
}
