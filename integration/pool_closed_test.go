package integration

import (
	"context"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sync/errgroup"

	"github.com/pgadvisory/advisory"
)

// Not in parallel with other tests, whose goroutines it would count.
func TestPoolIsClosedUnderHoldersAndWaiters(t *testing.T) {
	adminDB(t)
	eachDriver(t, func(t *testing.T, d driver) {
		const n = 10
		var outside []func()
		defer func() {
			for _, release := range outside {
				release()
			}
		}()
		before := goleak.IgnoreCurrent()
		db := d.open(t, withParams(t, server.DSN(), "application_name", appName(t)))
		var held []*advisory.Lock
		for _, key := range keysNumbered(t, n) {
			lock, err := advisory.Acquire(soon(t), db, key)
			if err != nil {
				t.Fatal(err)
			}
			held = append(held, lock)
		}
		var wg sync.WaitGroup
		var handed, ended atomic.Int64
		wait := func(key advisory.Key, w way) {
			wg.Go(func() {
				switch err := w.with(soon(t), db, key, noWork); {
				case err == nil:
					handed.Add(1)
				case !strings.Contains(err.Error(), "database is closed"):
					t.Errorf("%s: %v", w.name, err)
				}
				ended.Add(1)
			})
		}
		abroad := []way{withLock, withTxLock, withConnLock}
		for _, w := range abroad { // for another process
			key := advisory.Name(t.Name() + w.name)
			outside = append(outside, hold(t, adminDB(t), key))
			wait(key, w)
			waitForWaiters(t, adminDB(t), key, 1)
		}
		for i, lock := range held { // for this process
			wait(lock.Key(), abroad[i%len(abroad)])
		}
		if err := db.Close(); err != nil {
			t.Error(err)
		}
		waitFor(t, "who waits for another process has ended", func() (bool, error) { return ended.Load() >= int64(len(abroad)), nil })
		for _, lock := range held {
			wantLive(t, lock.Context())
			if err := lock.Release(); err != nil {
				t.Error(err)
			}
		}
		wg.Wait()
		// The session of the last holder may have served another.
		if n := handed.Load(); n > int64(len(held)) {
			t.Errorf("%d had a lock of which another process is the holder", n-int64(len(held)))
		}
		waitFor(t, "the goroutines have ended", func() (bool, error) {
			err := goleak.Find(before)
			return err == nil, err
		})
		waitFor(t, "the sessions have ended", func() (bool, error) {
			return isTrue(adminDB(t), `SELECT NOT EXISTS (SELECT FROM pg_stat_activity WHERE application_name = $1)`, appName(t))
		})
	})
}

// A holder may go on for as long as it likes with a pool that is closed. Who waits for it
// need not, wherever it waits.
func TestWaitersForTheirOwnProcessEndWithThePool(t *testing.T) {
	t.Parallel()
	bothDrivers(t, func(t *testing.T, d driver) {
		db := d.open(t, server.DSN())
		key := testKey(t)
		lock, err := advisory.Acquire(t.Context(), db, key)
		if err != nil {
			t.Fatal(err)
		}
		defer lock.Release()
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		defer cancel()
		var g errgroup.Group
		for _, w := range []way{withLock, withTxLock, withConnLock} {
			g.Go(func() error {
				if err := w.with(ctx, db, key, noWork); err == nil || ctx.Err() != nil {
					t.Errorf("%s: %v, want an error at once, as by who waits for another process", w.name, err)
				}
				return nil
			})
		}
		time.Sleep(50 * time.Millisecond) // most likely they wait by then
		if err := db.Close(); err != nil {
			t.Error(err)
		}
		_ = g.Wait()
	})
}
