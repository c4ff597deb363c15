package integration

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"sync"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/pgadvisory/advisory"
	"github.com/pgadvisory/advisory/integration/internal/testkit"
	"github.com/pgadvisory/advisory/internal/manager"
)

// How soon a deadlock is found at the latest, on a machine that is busy with other tests, too. On one
// that is not, it takes no time in a process, and between two and three seconds between processes.
const (
	foundInProcess = 8 * time.Second
	foundBetween   = 20 * time.Second
)

// A ringCaller takes a lock in one way, and then wants the next one's in another.
type ringCaller struct {
	db           *sql.DB
	outer, inner way
}

// A ring is callers of whom each wants what the next one holds.
type ring struct {
	callers []ringCaller
	keys    []advisory.Key
	errs    []error       // of the inner locks
	outer   error         // of the outer ones
	took    time.Duration // from when all held theirs until one was told of the deadlock
}

// run has all callers take their locks, and then one another's, and waits until they are through.
func (r *ring) run(t testing.TB, name string) {
	t.Helper()
	n := len(r.callers)
	r.errs = make([]error, n)
	for i := range n {
		r.keys = append(r.keys, advisory.Name(fmt.Sprintf("%s, %d of %d", name, i, n)))
	}
	ctx := soon(t)
	var hold sync.WaitGroup
	hold.Add(n)
	var mu sync.Mutex
	r.outer = concurrently(n, 1, func(i int) error {
		c := r.callers[i]
		arrive := sync.OnceFunc(hold.Done)
		defer arrive()
		return c.outer.with(ctx, c.db, r.keys[i], func(ctx context.Context, _ querier) error {
			arrive()
			hold.Wait()
			began := time.Now()
			r.errs[i] = c.inner.with(ctx, c.db, r.keys[(i+1)%n], noWork)
			if errors.Is(r.errs[i], advisory.ErrDeadlock) {
				mu.Lock()
				defer mu.Unlock()
				r.took = time.Since(began)
			}
			return nil
		})
	})
}

// wantOne fails the test unless exactly one was told of a deadlock, in time, and all others went through.
func (r *ring) wantOne(t testing.TB, name string, within time.Duration) {
	t.Helper()
	told := 0
	for _, err := range append(r.errs, r.outer) {
		switch {
		case errors.Is(err, advisory.ErrDeadlock):
			told++
		case err != nil:
			t.Errorf("%s: error %v", name, err)
		}
	}
	if told != 1 || r.took > within {
		t.Errorf("%s: %d were told of a deadlock, after %v; want one, within %v", name, told, r.took, within)
	}
	admin := adminDB(t)
	for _, key := range r.keys {
		wantFree(t, admin, key)
	}
	for _, c := range r.callers {
		wantClean(t, c.db)
		waitFor(t, name+" has left nothing", func() (bool, error) {
			if left := manager.For(c.db).String(); left != "" {
				return false, errors.New(left)
			}
			return true, nil
		})
	}
}

// Which process each caller of a ring is of.
var layouts = map[string]map[int][]int{
	"one process":   {2: {0, 0}, 3: {0, 0, 0}, 5: {0, 0, 0, 0, 0}},
	"one each":      {2: {0, 1}, 3: {0, 1, 2}, 5: {0, 1, 2, 3, 4}},
	"mixed":         {3: {0, 0, 1}, 5: {0, 0, 1, 0, 1}},
	"mixed, in two": {5: {0, 0, 0, 1, 1}},
}

func TestRings(t *testing.T) {
	t.Parallel()
	bothDrivers(t, func(t *testing.T, d driver) {
		t.Parallel()
		var g errgroup.Group
		g.SetLimit(4)
		turn := 0
		for layout, sizes := range layouts {
			for n, processes := range sizes {
				turn++
				name := fmt.Sprintf("%s %s %d", t.Name(), layout, turn)
				within := foundBetween
				if layout == "one process" {
					within = foundInProcess
				}
				dbs := make(map[int]*sql.DB)
				r := new(ring)
				for i, p := range processes {
					if dbs[p] == nil {
						dbs[p] = d.open(t, server.DSN())
					}
					r.callers = append(r.callers, ringCaller{dbs[p], openers[(turn+i)%len(openers)], queuers[(turn*n+i)%len(queuers)]})
				}
				g.Go(func() error {
					defer func() {
						for _, db := range dbs {
							_ = db.Close()
						}
					}()
					r.run(t, name)
					r.wantOne(t, name, within)
					t.Logf("%s: %d callers, found after %v", layout, n, r.took)
					return nil
				})
			}
		}
		_ = g.Wait()
	})
}

// AcquireTx tries, and no statement shows that it waits. It sees the others, and is the one that ends.
func TestDeadlocksWithATransactionThatTries(t *testing.T) {
	t.Parallel()
	bothDrivers(t, func(t *testing.T, d driver) {
		t.Parallel()
		one, other := d.open(t, server.DSN()), d.open(t, server.DSN())
		r := &ring{callers: []ringCaller{{one, withLock, acquireTx}, {other, withLock, withLock}}}
		r.run(t, t.Name())
		r.wantOne(t, t.Name(), foundBetween)
		if !errors.Is(r.errs[0], advisory.ErrDeadlock) {
			t.Errorf("errors %v, want ErrDeadlock for AcquireTx", r.errs)
		}
	})
}

// A conn of the caller's is as it was after a deadlock, with the locks that it holds.
func TestADeadlockLeavesTheCallersConn(t *testing.T) {
	t.Parallel()
	bothDrivers(t, func(t *testing.T, d driver) {
		t.Parallel()
		for _, processes := range []int{1, 2} {
			one, other := d.open(t, server.DSN()), d.open(t, server.DSN())
			if processes == 1 {
				other = one
			}
			name := fmt.Sprint(t.Name(), processes)
			conn, err := one.Conn(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			before := advisory.Name(name + "before")
			if err := advisory.AcquireConn(t.Context(), conn, before); err != nil {
				t.Fatal(err)
			}
			onConn := way{name: "AcquireConn", run: func(ctx context.Context, _ *sql.DB, key advisory.Key, _ work, _ options) error {
				time.Sleep(300 * time.Millisecond) // by which it is the youngest
				if err := advisory.AcquireConn(ctx, conn, key); err != nil {
					return err
				}
				return advisory.ReleaseConn(ctx, conn, key)
			}}
			r := &ring{callers: []ringCaller{{one, withLock, onConn}, {other, withLock, withLock}}}
			r.run(t, name)
			if !errors.Is(r.errs[0], advisory.ErrDeadlock) || r.errs[1] != nil {
				t.Errorf("errors %v, want ErrDeadlock for AcquireConn", r.errs)
			}
			if err := advisory.ReleaseConn(t.Context(), conn, before); err != nil {
				t.Errorf("the lock that conn held before: %v", err)
			}
			conn.Close()
		}
	})
}

// Of several holders of a shared lock, one is in the ring. The others hold it until the deadlock is
// found, and the one who waits for all of them then goes on.
func TestDeadlocksWithSharedLocks(t *testing.T) {
	t.Parallel()
	shared := func(w way) way { w.shared = true; return w }
	bothDrivers(t, func(t *testing.T, d driver) {
		t.Parallel()
		var g errgroup.Group
		for _, processes := range []int{1, 2} {
			for _, test := range []struct {
				name   string
				first  [2]way // outer and inner of each
				second [2]way
				within time.Duration
			}{
				{"a shared one is held", [2]way{withLock, withLock}, [2]way{shared(withLock), withLock}, foundInProcess},
				{"shared ones are held", [2]way{shared(acquire), withTxLock}, [2]way{shared(withConnLock), withLock}, foundInProcess},
				{"a shared one is wanted", [2]way{withLock, shared(withLock)}, [2]way{withLock, withLock}, foundBetween},
				{"shared ones are wanted", [2]way{withTxLock, shared(withLock)}, [2]way{withLock, shared(withTxLock)}, foundBetween},
			} {
				g.Go(func() error {
					name := fmt.Sprintf("%s, %s, %d", t.Name(), test.name, processes)
					dbs := []*sql.DB{d.open(t, server.DSN()), d.open(t, server.DSN())}
					within := test.within
					if processes == 1 {
						dbs[1] = dbs[0]
					} else {
						within = foundBetween
					}
					r := &ring{callers: []ringCaller{{dbs[0], test.first[0], test.first[1]}, {dbs[1], test.second[0], test.second[1]}}}
					var bystanders errgroup.Group
					if test.second[0].shared {
						ctx := soon(t)
						key := advisory.Name(fmt.Sprintf("%s, %d of %d", name, 1, 2))
						third := d.open(t, server.DSN())
						for _, db := range []*sql.DB{dbs[1], third} {
							in := make(chan struct{})
							bystanders.Go(func() error {
								return advisory.WithLock(ctx, db, key, func(context.Context) error {
									close(in)
									time.Sleep(3500 * time.Millisecond)
									return nil
								}, advisory.Shared())
							})
							<-in
						}
					}
					r.run(t, name)
					if err := bystanders.Wait(); err != nil {
						t.Errorf("%s: a bystander: %v", name, err)
					}
					r.wantOne(t, name, within)
					return nil
				})
			}
		}
		_ = g.Wait()
	})
}

// A session of the ring is lost while the ring is searched: one that holds a lock, which frees the
// others, or again and again those that wait, which go on on others.
func TestLossesInARing(t *testing.T) {
	t.Parallel()
	bothDrivers(t, func(t *testing.T, d driver) {
		t.Parallel()
		allowLog(t, terminated, "WARNING:  PID ")
		var g errgroup.Group
		for _, lose := range []string{"the holder", "the waiters"} {
			g.Go(func() error {
				name := t.Name() + lose
				dsn := withParams(t, server.DSN(), "application_name", testkit.Unique("ring"))
				r := &ring{callers: []ringCaller{{d.open(t, dsn), withLock, withLock}, {d.open(t, dsn), withLock, withLock}}}
				done := make(chan struct{})
				go func() {
					defer close(done)
					r.run(t, name)
				}()
				admin := adminDB(t)
				for i := range 2 {
					waitForWaiters(t, admin, advisory.Name(fmt.Sprintf("%s, %d of 2", name, i)), 1)
				}
				if lose == "the holder" {
					time.Sleep(1200 * time.Millisecond) // it has been seen once
					terminateOn(t, admin, r.keys[0], true)
				}
				for lose == "the waiters" {
					terminateOn(t, admin, r.keys[0], false)
					terminateOn(t, admin, r.keys[1], false)
					select {
					case <-done:
					case <-time.After(700 * time.Millisecond):
						continue
					}
					break
				}
				select {
				case <-done:
				case <-time.After(2 * foundBetween):
					t.Errorf("%s: not over", name)
				}
				<-done
				told, lost := 0, 0
				for _, err := range append(r.errs, r.outer) {
					switch {
					case errors.Is(err, advisory.ErrDeadlock):
						told++
					case errors.Is(err, advisory.ErrLost):
						lost++
					case err != nil:
						t.Errorf("%s: %v", name, err)
					}
				}
				if lose == "the waiters" && (told != 1 || lost != 0) || told+lost == 0 {
					t.Errorf("%s: errors %v", name, r.errs)
				}
				for _, key := range r.keys {
					wantFree(t, admin, key)
				}
				return nil
			})
		}
		_ = g.Wait()
	})
}

// terminateOn ends the sessions that hold key, or wait for it.
func terminateOn(t testing.TB, admin *sql.DB, key advisory.Key, granted bool) {
	t.Helper()
	if _, err := admin.Exec(`SELECT pg_terminate_backend(pid) FROM pg_locks
		WHERE locktype = 'advisory' AND granted = $1 AND objsubid = 1 AND (classid::bigint << 32 | objid::bigint)::text = $2`,
		granted, key.SQL()); err != nil {
		t.Error(err)
	}
}
