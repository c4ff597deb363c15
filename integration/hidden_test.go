//go:build unix

package integration

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/pgadvisory/advisory"
)

// When a lock is granted in the moment in which lock_timeout ends the wait, the server
// reports the timeout and keeps the lock (madelson/DistributedLock#147). Stopping the
// waiting server process while both happens brings that about for certain.
func TestGrantHiddenByTimeoutIsFound(t *testing.T) {
	if !server.Own() {
		t.Skip("it stops processes of the server, which must be this test's own")
	}
	t.Parallel()
	const bound = 400 * time.Millisecond // of one wait, without a shorter Timeout
	options := map[string][]advisory.Option{
		"waiting":             nil,
		"Timeout":             {advisory.Timeout(bound - bound/8)},
		"Timeout_after_waits": {advisory.Timeout(bound + bound/2)},
	}
	bothDrivers(t, func(t *testing.T, d driver) {
		t.Parallel()
		var g errgroup.Group
		for _, w := range queuers {
			for name, opts := range options {
				db := d.open(t, server.DSN())
				db.SetMaxOpenConns(4) // with less than that, WithLock would not wait in the server's queue
				key := advisory.Name(t.Name() + w.name + name)
				release := hold(t, adminDB(t), key)
				waiter := make(chan error, 1)
				pid := waitSeen(t, key, waiter, func() { waiter <- w.with(soon(t), db, key, heldOnce(t, key), opts...) })
				require(t, "a server on this machine", syscall.Kill(pid, syscall.SIGSTOP))
				// The timeout will have come by then: a young wait's statement waits for little over 100 ms.
				time.AfterFunc(bound/2, func() { _ = syscall.Kill(pid, syscall.SIGCONT) })
				release()
				g.Go(func() error {
					err := <-waiter
					if timeout := len(opts) > 0; err != nil && !(timeout && errors.Is(err, advisory.ErrNotAcquired)) {
						t.Errorf("%s, %s: %v", w.name, name, err)
					}
					wantFree(t, adminDB(t), key)
					wantGranted(t, db, key)
					wantClean(t, db)
					return nil
				})
			}
		}
		if err := g.Wait(); err != nil {
			t.Error(err)
		}
	})
}

// heldOnce is work that wants the lock of key held exactly once, as far as others can see.
func heldOnce(t *testing.T, key advisory.Key) work {
	return func(ctx context.Context, q querier) error {
		n, err := locks(ctx, adminDB(t), key, true)
		if n != 1 {
			err = errors.Join(err, fmt.Errorf("%d hold the lock", n))
		}
		return err
	}
}

// waitSeen calls wait, in a goroutine, and returns the server's process that waits for key.
// It calls wait again if that has ended before it was seen, because its Timeout was over.
func waitSeen(t *testing.T, key advisory.Key, ended <-chan error, wait func()) (pid int) {
	t.Helper()
	go wait()
	waitFor(t, "it waits", func() (bool, error) {
		select {
		case <-ended:
			go wait()
		default:
		}
		err := adminDB(t).QueryRow(waiterPIDs, key.SQL()).Scan(&pid)
		return err == nil, err
	})
	return pid
}

// The same by chance: locks released in about the moment in which a wait ends.
func TestEveryGrantIsReleasedOnce(t *testing.T) {
	t.Parallel()
	const bound, waiters = 400 * time.Millisecond, 12
	options := [][]advisory.Option{nil, {advisory.Timeout(bound)}}
	eachDriver(t, func(t *testing.T, d driver) {
		t.Parallel()
		db := d.open(t, server.DSN())
		db.SetMaxIdleConns(waiters)
		fill(t, db, waiters)
		err := concurrently(waiters, 3, func(i int) error {
			ctx, opts := soon(t), options[i%len(options)]
			key := advisory.Name(fmt.Sprint(t.Name(), i))
			conn, err := db.Conn(ctx)
			if err != nil {
				return err
			}
			defer conn.Close()
			release := hold(t, adminDB(t), key)
			defer release()
			defer time.AfterFunc(bound-3*time.Millisecond+rand.N(6*time.Millisecond), release).Stop()

			err = advisory.AcquireConn(ctx, conn, key, opts...)
			if opts != nil && errors.Is(err, advisory.ErrNotAcquired) {
				err = nil
			} else if err == nil {
				err = advisory.ReleaseConn(ctx, conn, key)
			}
			wantCleanSession(t, conn)
			return err
		})
		if err != nil {
			t.Error(err)
		}
	})
}
