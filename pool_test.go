package advisory

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"errors"
	"io"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/pgadvisory/advisory/internal/session"
)

func TestDeadConnectionsInThePoolAreDroppedAndTheNextOneTried(t *testing.T) {
	t.Parallel()
	for _, c := range closures {
		for _, dead := range []error{driver.ErrBadConn, io.ErrUnexpectedEOF, pgError("57P01")} {
			t.Run(c.name+" "+dead.Error(), func(t *testing.T) {
				t.Parallel()
				db, srv := newServer(t)
				idle(t, db, 3)
				srv.script = func(_ context.Context, conn int, _ string) (int64, error) {
					if conn <= 3 {
						return 0, dead
					}
					return 1, nil
				}
				ran := 0
				wantError(t, c.run(t.Context(), db, key, func(context.Context) error { ran++; return nil }))
				if ran != 1 || srv.opened != 4 || srv.open() != 1 {
					t.Errorf("fn ran %d times, %d connections of %d open", ran, srv.open(), srv.opened)
				}
			})
		}
	}
}

// Dead connections in the pool, as many as there may be, are no reason to fail: neither for who
// opens the common session nor for those who share it.
func TestDeadConnectionsInThePool(t *testing.T) {
	t.Parallel()
	for _, dead := range []int{1, 3, 4, 12} {
		synctest.Test(t, func(t *testing.T) {
			p, dbs, srvs := newTable(t, 1)
			db := dbs[0]
			db.SetMaxIdleConns(dead)
			var conns []*sql.Conn
			for range dead {
				conns = append(conns, borrow(t, db))
			}
			for i, conn := range conns {
				wantError(t, conn.Close())
				p.kill(backendID{srvs[0], i + 1})
			}
			answer := srvs[0].script
			srvs[0].script = func(ctx context.Context, conn int, query string) (int64, error) {
				session.Sleep(ctx, time.Millisecond) // also to find out that it is dead
				return answer(ctx, conn, query)
			}
			each(ids(20), func(k Key) { wantError(t, WithLock(t.Context(), db, k, nothing)) })
			time.Sleep(time.Second)
			wantIdle(t, db)
			p.clean()
		})
	}
}

// A connection that lies in the pool may lead into a black hole.
func TestAPooledConnectionThatDoesNotAnswerIsDroppedAndTheNextOneTried(t *testing.T) {
	t.Parallel()
	for _, c := range closures {
		bubble(t, c.name, func(t *testing.T) {
			db, srv := newServer(t)
			idle(t, db, 2)
			back := make(chan struct{})
			srv.script = func(ctx context.Context, conn int, _ string) (int64, error) {
				switch conn {
				case 1: // the driver does not return
					<-back
				case 2:
					<-ctx.Done()
					return 0, ctx.Err()
				}
				return 1, nil
			}
			start := time.Now()
			wantError(t, c.run(t.Context(), db, key, nothing))
			wantTook(t, start, 2*session.AnswerBound, 2*session.AnswerBound+3*abandonAfter)
			close(back)
			synctest.Wait()
			if srv.opened != 3 || srv.open() != 1 || db.Stats().InUse != 0 {
				t.Errorf("%d connections of %d open", srv.open(), srv.opened)
			}
		})
	}
}

// So may one that the driver asks whether it lives.
func TestAPooledConnectionWhosePingIsNotAnsweredIsDropped(t *testing.T) {
	t.Parallel()
	for _, c := range closures {
		bubble(t, c.name, func(t *testing.T) {
			db, srv := newServer(t)
			idle(t, db, 1)
			srv.reset = func(ctx context.Context, conn int) error {
				if conn > 1 {
					return nil
				}
				<-ctx.Done()
				return driver.ErrBadConn
			}
			start := time.Now()
			wantError(t, c.run(t.Context(), db, key, nothing))
			wantTook(t, start, session.AnswerBound, session.AnswerBound)
			synctest.Wait()
			srv.wantConns(t, 1, 2)
		})
	}
}

func TestAConnectionThatIsNeverMadeIsGivenUp(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		db, srv := newServer(t)
		srv.dial = noDial
		start := time.Now()
		wantError(t, WithLock(t.Context(), db, key, nothing), "no answer from the server within 30s")
		wantTook(t, start, dialBound, dialBound)
	})
}

// The connections that others use do not make a dead network a longer wait.
func TestAConnectionThatIsNeverMadeIsGivenUpWhateverElseIsInUse(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		db, srv := newServer(t)
		for range 3 {
			borrow(t, db)
		}
		srv.dial = noDial
		start := time.Now()
		wantError(t, WithLock(t.Context(), db, key, nothing), "no answer from the server within 30s")
		wantTook(t, start, dialBound, dialBound)
	})
}

// A connection that is not made in time is an error, also if it would be the pool's last.
func TestAConnectionIsNotMadeInTime(t *testing.T) {
	t.Parallel()
	for _, honours := range []bool{true, false} {
		synctest.Test(t, func(t *testing.T) {
			db, srv := newServer(t)
			db.SetMaxOpenConns(1)
			srv.dial = func(ctx context.Context) error {
				if !honours {
					ctx = context.WithoutCancel(ctx)
				}
				session.Sleep(ctx, time.Hour)
				return errors.New("connection timed out")
			}
			start := time.Now()
			wantError(t, WithLock(context.Background(), db, key, nothing), "no answer from the server within 30s")
			wantTook(t, start, 0, dialBound+time.Second)
			time.Sleep(2 * time.Hour)
		})
	}
}

func TestADriverThatDoesNotReturnFromMakingAConnectionIsAbandoned(t *testing.T) {
	t.Parallel()
	for _, c := range closures {
		bubble(t, c.name, func(t *testing.T) {
			db, srv := newServer(t)
			back := make(chan struct{})
			srv.dial = func(context.Context) error { <-back; return nil }
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			defer cancel()
			start := time.Now()
			wantError(t, c.run(ctx, db, key, nothing), ErrNotAcquired, context.DeadlineExceeded)
			wantTook(t, start, time.Second, time.Second)
			close(back)
			synctest.Wait()
			srv.want(t, "1 open")
			if stats := db.Stats(); stats.Idle != 1 || stats.InUse != 0 {
				t.Errorf("the connection that came late: %+v", stats)
			}
		})
	}
}

// That the pool is busy is no reason to give up: not for who opens the common session, nor for
// those who wait for it to be open.
func TestThePoolIsBusyForLong(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		p, dbs, _ := newTable(t, 2)
		db := dbs[0]
		db.SetMaxOpenConns(1)
		there := take(t, dbs[1], key)
		wantError(t, db.Ping()) // one lies ready
		var wg sync.WaitGroup
		wg.Go(func() { wantError(t, WithLock(context.Background(), db, key, nothing)) })
		time.Sleep(time.Second)
		conn := borrow(t, db)
		time.Sleep(time.Second)
		wg.Go(func() {
			ctx, cancel := context.WithTimeout(t.Context(), time.Hour)
			defer cancel()
			wantError(t, WithLock(ctx, db, ID(43), nothing))
		})
		wantError(t, there.Release())
		time.Sleep(45 * time.Second)
		wantError(t, conn.Close())
		wg.Wait()
		wantIdle(t, db)
		p.clean()
	})
}

// All of the pool is in use: those who wait for the session wait together, and the end of one's
// ctx or Timeout is not the others'.
func TestThePoolIsExhausted(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		_, dbs, srvs := newTable(t, 1)
		db := dbs[0]
		db.SetMaxOpenConns(1)
		conn := borrow(t, db)
		var wg sync.WaitGroup
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		wg.Go(func() {
			wantError(t, WithLock(ctx, db, key, nothing), ErrNotAcquired, context.DeadlineExceeded, "the pool's only connection is in use")
		})
		synctest.Wait()
		wg.Go(func() {
			wantError(t, WithLock(t.Context(), db, ID(44), nothing, Timeout(2*time.Second)), ErrNotAcquired, "within 2s", "the pool's only connection is in use")
		})
		for _, k := range ids(5) {
			wg.Go(func() { wantError(t, WithLock(t.Context(), db, k, nothing)) })
		}
		time.Sleep(3 * time.Second)
		wantError(t, conn.Close())
		wg.Wait()
		time.Sleep(time.Second)
		if srvs[0].opened != 1 {
			t.Errorf("%d connections", srvs[0].opened)
		}
		wantIdle(t, db)
	})
}

// Connections in use outlive their pool; a wait does not.
func TestAWaitEndsWithItsPool(t *testing.T) {
	t.Parallel()
	for _, c := range closures {
		bubble(t, c.name, func(t *testing.T) {
			db, srv := newServer(t)
			srv.script = taken(t)
			time.AfterFunc(time.Second, func() { wantError(t, db.Close()) })
			start := time.Now()
			wantError(t, c.run(t.Context(), db, key, nothing), "acquire bigint 42: sql: database is closed")
			wantTook(t, start, time.Second, time.Second+sliceMax)
			synctest.Wait()
			if srv.open() != 0 {
				t.Error("the connection is still open")
			}
		})
	}
}

// db.Close is under way while locks are held: they stay, and no new one is taken.
func TestAPoolThatIsClosedUnderneath(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		p, dbs, srvs := newTable(t, 1)
		l := take(t, dbs[0], key)
		wantError(t, dbs[0].Close())
		wantError(t, WithLock(t.Context(), dbs[0], ID(43), nothing), "database is closed")
		time.Sleep(10 * time.Second)
		wantError(t, l.Context().Err())
		wantError(t, l.Release())
		synctest.Wait()
		if srvs[0].open() != 0 {
			t.Error("the connection is still open")
		}
		wantIdle(t, dbs[0])
		p.clean()
	})
}

// A pool that is limited to one connection has none for fn while a lock is held. That is said once, to
// the first Logger.
func TestAPoolOfOneIsWarnedAboutOnce(t *testing.T) {
	t.Parallel()
	const warning = "fn cannot get a connection while the lock is held"
	for _, test := range []struct {
		limit int
		run   runs
		warns bool
	}{
		{1, closures[0].run, true}, {1, closures[1].run, true}, {1, closures[2].run, true},
		{1, closures[3].run, false}, {1, closures[4].run, false}, // fn has the connection
		{0, WithLock, false},
		{2, WithLock, false},
	} {
		_, dbs, _ := newTable(t, 2)
		for _, db := range dbs {
			db.SetMaxOpenConns(test.limit)
			var log logBuffer
			wantError(t, test.run(t.Context(), db, key, nothing)) // without a Logger
			for range 3 {
				wantError(t, test.run(t.Context(), db, key, nothing, log.option()))
			}
			want := 0
			if test.warns {
				want = 1
			}
			if got := strings.Count(log.String(), warning); got != want {
				t.Errorf("limit %d: warned %d times, want %d: %s", test.limit, got, want, log.String())
			}
		}
	}
}

// So does the error of a wait for that connection: fn's own, or that of another acquisition.
func TestAWaitForTheConnectionThatTheLockHasSaysSo(t *testing.T) {
	t.Parallel()
	const says = "fn cannot get a connection while the lock is held"
	for _, c := range closures {
		bubble(t, c.name, func(t *testing.T) {
			p, dbs, _ := newTable(t, 1)
			db := dbs[0]
			db.SetMaxOpenConns(1)
			soon := func(ctx context.Context) error { // as a query does
				ctx, cancel := context.WithTimeout(ctx, time.Second)
				defer cancel()
				conn, err := db.Conn(ctx)
				if err == nil {
					return conn.Close()
				}
				return err
			}
			outer := func(fn func(context.Context) error) error {
				return WithLock(t.Context(), db, Name("outer"), fn)
			}
			err := outer(soon)
			wantError(t, err, context.DeadlineExceeded, "advisory: hold outer: "+says)
			wantError(t, err.(interface{ Unwrap() []error }).Unwrap()[0], context.DeadlineExceeded)

			err = outer(func(ctx context.Context) error { return c.run(ctx, db, key, soon, Timeout(time.Second)) })
			if strings.HasPrefix(c.name, "WithConn") || strings.HasPrefix(c.name, "WithTx") {
				wantError(t, err, ErrNotAcquired, "advisory: acquire bigint 42: not acquired within 1s: the pool's only connection carries locks")
			} else if c.name != "Acquire" {
				wantError(t, err, context.DeadlineExceeded, "advisory: hold bigint 42: "+says)
				if n := strings.Count(err.Error(), says); n != 1 {
					t.Errorf("said %d times: %v", n, err)
				}
			}

			// Nobody has waited for it.
			for _, own := range []error{context.DeadlineExceeded, io.EOF} {
				if err := outer(func(context.Context) error { return own }); err != own {
					t.Errorf("error: %v, want %v", err, own)
				}
			}
			db.SetMaxOpenConns(2)
			wantError(t, outer(soon))
			time.Sleep(time.Minute)
			wantIdle(t, db)
			p.clean()
		})
	}
}
