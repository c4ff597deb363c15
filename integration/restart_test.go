package integration

import (
	"context"
	"database/sql"
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/pgadvisory/advisory"
	"github.com/pgadvisory/advisory/integration/internal/pgtest"
)

// A crash of the server ends all sessions and keeps no lock.
func TestRestartLosesEveryLockAndTheProgramGoesOn(t *testing.T) {
	t.Parallel()
	s := ownServer(t)

	bothDrivers(t, func(t *testing.T, d driver) {
		const n, waiters = 50, 10
		db := d.open(t, s.DSN())
		db.SetMaxIdleConns(n + waiters)
		opts := []advisory.Option{advisory.Heartbeat(shortHeartbeat)}
		var keys []advisory.Key
		for i := range n {
			keys = append(keys, advisory.Name(fmt.Sprint(t.Name(), i)))
		}

		held := acquireEach(t, db, keys, opts...)
		var mu sync.Mutex
		var begun []time.Time
		var wg sync.WaitGroup
		for _, key := range keys[:waiters] {
			wg.Go(func() {
				err := advisory.WithLock(soon(t), d.open(t, s.DSN()), key, func(ctx context.Context) error {
					mu.Lock()
					defer mu.Unlock()
					begun = append(begun, time.Now())
					return nil
				}, opts...)
				if err != nil {
					t.Errorf("waiter: %v", err)
				}
			})
		}
		admin := d.open(t, s.DSN())
		for _, key := range keys[:waiters] {
			waitForWaiters(t, admin, key, 1)
		}

		crash := time.Now()
		if err := s.Restart(t.Context(), "immediate"); err != nil {
			t.Fatal(err)
		}
		restarted := time.Now()
		told := awaitLosses(t, held, crash)
		for _, lock := range held {
			wantLost(t, "Release", lock.Release())
		}
		wg.Wait()
		var took []time.Duration
		for _, at := range begun {
			took = append(took, at.Sub(restarted))
		}
		logBound(t, "restart "+d.name, "holder told", 2*500*time.Millisecond+3*time.Second, told) // the restart, and other tests, take time
		logBound(t, "restart "+d.name, "waiter begins, from ready", 2*time.Second, took)

		// The pool's connections are all dead, and it takes as many locks as before.
		for _, lock := range acquireEach(t, db, keys, opts...) {
			wantLive(t, lock.Context())
			if err := lock.Release(); err != nil {
				t.Error(err)
			}
		}
		wantClean(t, db)
	})
}

// acquireEach takes the lock of each key. The locks are released with the test at the latest.
func acquireEach(t testing.TB, db *sql.DB, keys []advisory.Key, opts ...advisory.Option) (held []*advisory.Lock) {
	t.Helper()
	for _, key := range keys {
		lock, err := advisory.Acquire(t.Context(), db, key, opts...)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { lock.Release() })
		held = append(held, lock)
	}
	return held
}

// A fast shutdown says goodbye to its clients, who may well be waiting for a lock.
func TestWaitOutlivesARestart(t *testing.T) {
	t.Parallel()
	s := ownServer(t)
	for _, mode := range []string{"fast", "immediate"} {
		t.Run(mode, func(t *testing.T) {
			if mode == "fast" {
				allowLog(t, terminated)
			}
			bothDrivers(t, func(t *testing.T, d driver) { testWaitOutlivesARestart(t, []driver{d}, s, s.DSN(), mode) })
		})
	}
}

// testWaitOutlivesARestart restarts the server, to which dsn leads, while there are waits with the
// drivers.
func testWaitOutlivesARestart(t *testing.T, ds []driver, s *pgtest.Server, dsn, mode string) {
	ways := []way{withLock, withTxLock, withConnLock}
	var locks []*advisory.Lock
	failed := make(chan error, len(ds)*len(ways))
	for _, d := range ds {
		key := advisory.Name(t.Name() + d.name)
		// A pool for each, or they would wait for each other and not for the server.
		lock, err := advisory.Acquire(t.Context(), d.open(t, dsn), key)
		if err != nil {
			t.Fatal(err)
		}
		locks = append(locks, lock)
		for _, w := range ways {
			other := d.open(t, dsn)
			go func() {
				err := w.with(soon(t), other, key, noWork)
				if err != nil {
					err = fmt.Errorf("%s, %s: %w", d.name, w.name, err)
				}
				failed <- err
			}()
		}
		waitForWaiters(t, d.open(t, s.DSN()), key, len(ways))
	}
	if err := s.Restart(t.Context(), mode); err != nil {
		t.Fatal(err)
	}
	restarted := time.Now()
	var took []time.Duration
	for range cap(failed) {
		if err := <-failed; err != nil {
			t.Error(err)
		}
		took = append(took, time.Since(restarted))
	}
	limit := 3 * time.Second // a pause is up to 2 s
	if dsn != s.DSN() {
		limit = 8 * time.Second // and a pooler takes its own time to find the server back
	}
	logBound(t, mode+" restart", "waiter goes on, from ready", limit, took)
	for _, lock := range locks {
		wantLost(t, "Release", lock.Release())
	}
}
