package integration

import (
	"context"
	"database/sql"
	"errors"
	"runtime"
	"slices"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/pgadvisory/advisory"
	"github.com/pgadvisory/advisory/integration/internal/pgtest"
)

// keepers are the functions that take AtLeast.
var keepers = []way{withLock, withLocks, acquire}

// tick is what a replica does when its clock strikes. It tells whether the job has run.
func tick(t testing.TB, w way, db *sql.DB, opts ...advisory.Option) (ran bool) {
	t.Helper()
	err := w.with(soon(t), db, testKey(t), func(context.Context, querier) error {
		ran = true
		return nil
	}, append(slices.Clone(opts), advisory.NoWait())...)
	if err != nil && !errors.Is(err, advisory.ErrNotAcquired) {
		t.Error(err)
	}
	return ran
}

// The clock of one replica strikes when the job is over on the others: without AtLeast, the tick runs
// again.
func TestATickRunsOnceThoughClocksDiffer(t *testing.T) {
	t.Parallel()
	const d = time.Second // in which three replicas ask
	for _, w := range keepers {
		t.Run(w.name, func(t *testing.T) {
			t.Parallel()
			bothDrivers(t, func(t *testing.T, driver driver) {
				t.Parallel()
				var replicas []*sql.DB
				for range 3 {
					replicas = append(replicas, driver.open(t, server.DSN()))
				}
				round := func(opts ...advisory.Option) (ran int) {
					for _, db := range append(replicas, replicas[0]) { // and a clock that is put back
						if tick(t, w, db, opts...) {
							ran++
						}
					}
					return ran
				}
				if ran := round(); ran != 4 {
					t.Errorf("without AtLeast, the tick ran %d times; want 4, or this test shows nothing", ran)
				}
				for attempt := range 5 {
					began := time.Now()
					ran := round(advisory.AtLeast(d))
					late := time.Since(began) >= d
					wantFree(t, adminDB(t), testKey(t))
					if took := time.Since(began); took < d {
						t.Errorf("the lock is free after %v", took)
					}
					if ran == 1 {
						break
					}
					if !late || attempt == 4 {
						t.Fatalf("the tick ran %d times", ran)
					}
				}
				for _, db := range replicas {
					wantClean(t, db)
				}
			})
		})
	}
}

// Those who wait, in this process or in another, get the lock when the time is over.
func TestWaitersWaitForALockThatStays(t *testing.T) {
	t.Parallel()
	const d = time.Second
	bothDrivers(t, func(t *testing.T, driver driver) {
		db, another := driver.open(t, server.DSN()), driver.open(t, server.DSN())
		for _, w := range keepers {
			began := time.Now()
			if !tick(t, w, db, advisory.AtLeast(d)) {
				t.Error("the lock is not free")
			}
			if took := time.Since(began); took >= d {
				t.Errorf("%s returned after %v, want at once", w.name, took)
			}
			var g errgroup.Group
			for _, db := range []*sql.DB{db, another} {
				g.Go(func() error {
					return w.with(soon(t), db, testKey(t), func(context.Context, querier) error {
						if took := time.Since(began); took < d {
							t.Errorf("%s had the lock after %v, want %v", w.name, took, d)
						}
						return nil
					})
				})
			}
			if err := g.Wait(); err != nil {
				t.Error(err)
			}
		}
		wantClean(t, db)
		wantClean(t, another)
	})
}

func TestALockIsLostWhileItStays(t *testing.T) {
	t.Parallel()
	bothDrivers(t, func(t *testing.T, driver driver) {
		t.Parallel()
		key := testKey(t)
		db := driver.open(t, server.DSN())
		log := newLogbook()
		lost, ended := make(chan error, 1), make(chan error, 1)
		observer := &advisory.Observer{
			Lost:    func(_ context.Context, _ advisory.LockInfo, err error) { lost <- err },
			HoldEnd: func(_ context.Context, _ advisory.LockInfo, _ time.Duration, err error) { ended <- err },
		}
		if !tick(t, withLock, db, advisory.AtLeast(4*time.Second), log.option(), advisory.Observe(observer)) {
			t.Fatal("the lock is not free")
		}
		terminateHolder(t, adminDB(t), key)
		log.waitFor(t, "lock lost before AtLeast was over", 1)
		wantLost(t, "Lost", <-lost)
		select {
		case err := <-ended:
			t.Errorf("HoldEnd is called before the time is over: %v", err)
		default:
		}
		wantFree(t, adminDB(t), key)
		if !tick(t, withLock, db) {
			t.Error("the lock is not free")
		}
		wantLost(t, "HoldEnd", <-ended)
		if n := len(log.times("")); n != 1 {
			t.Errorf("the Logger was told %d times", n)
		}
		wantClean(t, db)
	})
}

// Closing the pool does not release the lock, nor waits for it. Its session ends with it.
func TestAPoolIsClosedWhileALockStays(t *testing.T) {
	t.Parallel()
	const d = 2 * time.Second
	bothDrivers(t, func(t *testing.T, driver driver) {
		t.Parallel()
		log := newLogbook()
		db := driver.open(t, withParams(t, server.DSN(), "application_name", appName(t)))
		began := time.Now()
		if !tick(t, withLock, db, advisory.AtLeast(d), log.option(), advisory.Heartbeat(shortHeartbeat)) {
			t.Fatal("the lock is not free")
		}
		if err := db.Close(); err != nil {
			t.Error(err)
		}
		wantFree(t, adminDB(t), testKey(t))
		if took := time.Since(began); took < d {
			t.Errorf("the lock is free after %v, want %v", took, d)
		}
		waitFor(t, "the session has ended", func() (bool, error) {
			return isTrue(adminDB(t), `SELECT NOT EXISTS (SELECT FROM pg_stat_activity WHERE application_name = $1)`, appName(t))
		})
		if n := len(log.times("")); n > 0 {
			t.Errorf("the Logger was told %d times", n)
		}
	})
}

// Not in parallel with other tests, whose goroutines it would count.
func TestTenThousandLocksStay(t *testing.T) {
	const n, d = 10_000, 10 * time.Second
	s := ownServer(t, pgtest.Setting("max_locks_per_transaction", "256"))
	bothDrivers(t, func(t *testing.T, driver driver) {
		admin := driver.open(t, s.DSN())
		log := newLogbook()
		db := driver.open(t, withParams(t, s.DSN(), "application_name", appName(t)))
		keys := keysNumbered(t, n)
		before := runtime.NumGoroutine()
		over := time.Now().Add(d)
		var g errgroup.Group
		g.SetLimit(64)
		for _, key := range keys {
			g.Go(func() error {
				return advisory.WithLock(soon(t), db, key, func(context.Context) error { return nil },
					advisory.AtLeast(time.Until(over)), log.option())
			})
		}
		if err := g.Wait(); err != nil {
			t.Fatal(err)
		}
		t.Logf("%d locks are taken %v before the end", n, time.Until(over))
		held := func() int {
			locks, _, _ := heldBy(t, admin, appName(t))
			return len(locks)
		}
		if got := held(); got != n || time.Now().After(over) {
			t.Errorf("%d locks are held, want %d", got, n)
		}
		if more := runtime.NumGoroutine() - before; more > 100 {
			t.Errorf("%d goroutines for them", more)
		}
		if open := db.Stats().OpenConnections; open != 1 {
			t.Errorf("%d connections for them", open)
		}
		time.Sleep(time.Until(over))
		waitFor(t, "all are free", func() (bool, error) { return held() == 0, nil })
		t.Logf("and are free %v after it", time.Since(over))
		if n := len(log.times("")); n > 0 {
			t.Errorf("the Logger was told %d times", n)
		}
		wantClean(t, db)
	})
}
