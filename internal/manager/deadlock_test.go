package manager_test

import (
	"context"
	"database/sql"
	"errors"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/pgadvisory/advisory/internal/manager"
	"github.com/pgadvisory/advisory/internal/pgsql"
	"github.com/pgadvisory/advisory/internal/session"
	"github.com/pgadvisory/advisory/internal/waitgraph"
)

// holding is a request by a caller who holds a key.
func holding(held, wanted pgsql.Key) *manager.Request {
	r := request(wanted)
	r.CallerHolds = []pgsql.Key{held}
	return r
}

// waitFor begins to acquire what r asks for, and returns when that waits.
func waitFor(ctx context.Context, db *sql.DB, r *manager.Request) <-chan error {
	done := make(chan error, 1)
	go func() {
		locks, err := acquire(ctx, db, r)
		if err == nil {
			err = locks.Release()
		}
		done <- err
	}()
	synctest.Wait()
	return done
}

// A wait that closes a cycle of its process ends at once, and the others go on.
func TestACycleInAProcessEndsTheWaitThatClosesIt(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		db, _ := newDB(t)
		a, b := take(t, db, key(1)), take(t, db, key(2))
		first := waitFor(t.Context(), db, holding(key(1), key(2)))
		_, err := acquire(t.Context(), db, holding(key(2), key(1)))
		var deadlock manager.Deadlock
		if !errors.As(err, &deadlock) || deadlock != "deadlock: this caller holds 2 and waits for 1, which this process holds while it waits for 2" {
			t.Errorf("error: %v", err)
		}
		wantError(t, b.Release(), nil)
		wantError(t, <-first, nil)
		wantError(t, a.Release(), nil)
		synctest.Wait()
		wantState(t, db, 0, 0)
	})
}

// A wait whose ctx has ended is part of no cycle, even if it has not returned yet.
func TestAWaitThatIsOverIsPartOfNoCycle(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		db, _ := newDB(t)
		a, b := take(t, db, key(1)), take(t, db, key(2))
		ctx, cancel := context.WithCancel(t.Context())
		first := waitFor(ctx, db, holding(key(1), key(2)))
		cancel() // and it is not waited for
		second := waitFor(t.Context(), db, holding(key(2), key(1)))
		wantError(t, <-first, context.Canceled)
		wantError(t, a.Release(), nil)
		wantError(t, <-second, nil)
		wantError(t, b.Release(), nil)
		synctest.Wait()
		wantState(t, db, 0, 0)
	})
}

// A shared wait may be over in a moment, though the one who holds the lock waits, too. One that lasts
// counts.
func TestASharedWaitCountsWhenItLasts(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		db, _ := newDB(t)
		take(t, db, key(1))
		b := take(t, db, key(2))
		first := waitFor(t.Context(), db, holding(key(1), key(2)))
		r := holding(key(2), key(1))
		r.Shared = true
		start := time.Now()
		_, err := acquire(t.Context(), db, r)
		if !errors.As(err, new(manager.Deadlock)) || time.Since(start) < time.Second || time.Since(start) > 2*time.Second {
			t.Errorf("error after %v: %v", time.Since(start), err)
		}
		wantError(t, b.Release(), nil)
		wantError(t, <-first, nil)
	})
}

// A panic of the driver's, when it is asked for the waits of others, leaves nothing behind: others ask
// again.
func TestAPanicOfTheDriverLeavesNoWaitBehind(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		db, srv := newDB(t)
		srv.answer = taken(key(2), 100*time.Millisecond)
		asked := 0
		srv.waits = func(string) { asked++; panic("driver") }
		for range 2 {
			func() {
				defer func() {
					if p := recover(); p != "driver" {
						t.Errorf("panic: %v", p)
					}
				}()
				_, _ = acquire(t.Context(), db, holding(key(1), key(2)))
			}()
		}
		time.Sleep(time.Minute)
		if asked != 2 {
			t.Errorf("asked %d times", asked)
		}
		wantState(t, db, 0, 0)
	})
}

// Others see a wait while its session asks for theirs.
func TestTheQuestionForWaitsCarriesTheWait(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		db, srv := newDB(t)
		srv.answer = taken(key(2), 100*time.Millisecond)
		asked := 0
		srv.waits = func(query string) {
			if !strings.HasSuffix(query, pgsql.Waits) {
				return // it asks for the holder, at the end
			}
			asked++
			waits := waitgraph.Parse(pgsql.EdgesIn(query))
			if len(waits) != 1 || waits[0].Wanted != "2" || !slices.Equal(waits[0].Held, []string{"1"}) {
				t.Errorf("%v in %s", waits, query)
			}
		}
		r := holding(key(1), key(2))
		r.Timeout = 5 * time.Second
		_, err := acquire(t.Context(), db, r)
		wantError(t, err, session.ErrTimeout)
		if asked < 4 {
			t.Errorf("asked %d times", asked)
		}
	})
}

// A shared waiter that looks whether others wait may be let in: it closes no cycle.
func TestALookIsNoWaitOfADeadlock(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		db, srv := newDB(t)
		srv.answer = func(_ context.Context, _ int, q string) (int64, error) {
			if strings.Contains(q, "NOT granted") {
				time.Sleep(10 * time.Millisecond)
				return 0, nil
			}
			return 1, nil
		}
		shared := func(r *manager.Request) *manager.Request { r.Shared = true; return r }
		one := take(t, db, key(1))
		two, err := acquire(t.Context(), db, shared(request(key(2))))
		wantError(t, err, nil)
		ctx, cancel := context.WithCancel(t.Context())
		between := waitFor(ctx, db, request(key(2)))
		a := waitFor(t.Context(), db, shared(holding(key(1), key(2))))
		time.Sleep(1500 * time.Millisecond)
		cancel()
		wantError(t, <-between, context.Canceled)
		time.Sleep(5 * time.Millisecond) // a looks, and will be let in
		b := waitFor(t.Context(), db, holding(key(2), key(1)))
		wantError(t, <-a, nil)
		wantError(t, one.Release(), nil)
		wantError(t, <-b, nil)
		wantError(t, two.Release(), nil)
	})
}
