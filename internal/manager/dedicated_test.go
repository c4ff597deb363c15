package manager_test

import (
	"context"
	"database/sql/driver"
	"errors"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/pgadvisory/advisory/internal/manager"
	"github.com/pgadvisory/advisory/internal/pgsql"
	"github.com/pgadvisory/advisory/internal/session"
)

// turnBound is that of dedicated.go.
const turnBound = 250 * time.Millisecond

// release releases what dedicated has taken.
func release(t *testing.T, s *session.Session, done func()) {
	t.Helper()
	wantError(t, s.Release(), nil)
	done()
}

// Those who take a lock on a session of their own, and those who take it on the common one, wait for each
// other in one queue, without a connection.
func TestTheDedicatedWaitInTheQueueOfTheirKey(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		db, srv := newDB(t)
		first := take(t, db, key(1))
		var order []string
		var wg sync.WaitGroup
		wg.Go(func() {
			s, done, err := dedicated(t.Context(), db, key(1))
			wantError(t, err, nil)
			order = append(order, "dedicated")
			time.Sleep(time.Second)
			release(t, s, done)
		})
		synctest.Wait()
		wg.Go(func() {
			takeOnce(t, db, key(1))
			order = append(order, "common session")
		})
		synctest.Wait()
		r := request(key(1))
		r.DB, r.NoWait = db, true
		_, _, err := manager.Dedicated(t.Context(), r, session.ForConn, nil)
		wantError(t, err, session.ErrRefused)
		if n := srv.opened.Load(); n != 1 {
			t.Errorf("%d connections", n)
		}
		wantError(t, first.Release(), nil)
		wg.Wait()
		if len(order) != 2 || order[0] != "dedicated" {
			t.Errorf("order: %q", order)
		}
		wantState(t, db, 0, 0)
	})
}

// Whose turn it is, but has no connection in time, lets others have it who do. With a connection, he
// has the turn at once if it is free; otherwise he waits in line again, without the connection.
func TestTheTurnIsLetGoWithoutAConnection(t *testing.T) {
	t.Parallel()
	for _, free := range []bool{true, false} { // when there is a connection
		synctest.Test(t, func(t *testing.T) {
			db, _ := newDB(t)
			db.SetMaxOpenConns(2)
			others := take(t, db, key(2)) // so that the common session is open
			conn, err := db.Conn(t.Context())
			wantError(t, err, nil)
			start := time.Now()
			var wg sync.WaitGroup
			wg.Go(func() {
				s, done, err := dedicated(t.Context(), db, key(1))
				wantError(t, err, nil)
				wantTook(t, start, turnBound+2*time.Second)
				release(t, s, done)
			})
			synctest.Wait()
			locks := take(t, db, key(1))
			wantTook(t, start, turnBound)
			time.Sleep(time.Second)
			if free {
				wantError(t, locks.Release(), nil)
				time.Sleep(time.Second)
				wantError(t, conn.Close(), nil)
			} else {
				wantError(t, conn.Close(), nil)
				time.Sleep(time.Second)
				if n := db.Stats().InUse; n != 1 { // the common session
					t.Errorf("%d connections in use", n)
				}
				wantError(t, locks.Release(), nil)
			}
			wg.Wait()
			wantError(t, others.Release(), nil)
			wantState(t, db, 0, 0)
		})
	}
}

// However one's way ends, by its ctx, an error or a panic, the turn is the next one's.
func TestTheTurnIsTheNextOnesHoweverItEnds(t *testing.T) {
	t.Parallel()
	mine := errors.New("mine")
	for name, lock := range map[string]func(ctx context.Context, s *session.Session) error{
		"an error": func(context.Context, *session.Session) error { return mine },
		"a panic":  func(context.Context, *session.Session) error { panic("driver") },
		"the end of ctx": func(ctx context.Context, _ *session.Session) error {
			<-ctx.Done()
			return ctx.Err()
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				db, srv := newDB(t)
				ctx, cancel := context.WithTimeout(t.Context(), time.Second)
				defer cancel()
				func() {
					defer func() {
						if r := recover(); (r == "driver") != (name == "a panic") {
							t.Errorf("recovered %v", r)
						}
					}()
					r := request(key(1))
					r.DB = db
					_, _, err := manager.Dedicated(ctx, r, session.ForConn, func(ctx context.Context, s *session.Session, _ time.Time) error {
						return lock(ctx, s)
					})
					if err == nil || name == "an error" && !errors.Is(err, mine) {
						t.Errorf("error: %v", err)
					}
				}()
				time.Sleep(time.Second)
				s, done, err := dedicated(t.Context(), db, key(1))
				wantError(t, err, nil)
				release(t, s, done)
				wantState(t, db, 0, 0)
				if n := db.Stats().InUse; n != 0 || srv.open.Load() != 1 {
					t.Errorf("%d connections in use, %d open", n, srv.open.Load())
				}
			})
		})
	}
}

// done is called when the session has ended: until then nobody else asks for the lock.
func TestTheTurnLastsAsLongAsTheSession(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		db, srv := newDB(t)
		s, done, err := dedicated(t.Context(), db, key(1))
		wantError(t, err, nil)
		srv.answer = func(_ context.Context, _ int, query string) (int64, error) {
			if query == pgsql.UnlockExposed([]pgsql.Key{key(1)}, false) || isTry(query) {
				t.Errorf("sent: %s", query)
			}
			return 1, nil
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		_, err = acquire(ctx, db, request(key(1)))
		wantError(t, err, context.DeadlineExceeded)
		srv.answer = nil
		release(t, s, done)
		takeOnce(t, db, key(1))
	})
}

// One who has left the turn, and then gets no connection, has it again before the next attempt.
func TestADedicatedCallerHasTheTurnAgainAfterAFailedOpening(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		db, srv := newDB(t)
		db.SetMaxOpenConns(4)
		db.SetMaxIdleConns(0)
		refused, dials := false, 0
		srv.answer = func(_ context.Context, _ int, query string) (int64, error) {
			switch {
			case of(key(1), query) && isTry(query) && !refused:
				refused = true
				return 0, nil
			case of(key(1), query) && isWait(query):
				return 0, driver.ErrBadConn
			}
			return 1, nil
		}
		srv.dial = func() error {
			if dials++; dials == 3 { // the second is that of the outage
				time.Sleep(2 * turnBound)
				return errors.New("connection refused")
			}
			return nil
		}
		s, done, err := dedicated(t.Context(), db, key(1))
		wantError(t, err, nil)
		r := request(key(1))
		r.DB, r.NoWait = db, true
		_, _, err = manager.Dedicated(t.Context(), r, session.ForConn, func(context.Context, *session.Session, time.Time) error {
			return errors.New("it has the turn, too")
		})
		wantError(t, err, session.ErrRefused)
		release(t, s, done)
		wantState(t, db, 0, 0)
	})
}
