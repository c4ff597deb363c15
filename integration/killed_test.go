//go:build linux

package integration

import (
	"context"
	"database/sql"
	"fmt"
	"io"
	"os"
	"slices"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/pgadvisory/advisory"
)

// A process that dies in the middle of a statement does not hold its lock until that is over.

// sleeperArgs is what the child function sleeper is called with.
type sleeperArgs struct {
	Driver, DSN   string
	Way           string
	Key           string
	HolderTimeout time.Duration // 0: none is given
	Isolation     sql.IsolationLevel
}

func init() {
	children["sleeper"] = sleeper
}

// sleeper has the server work on a long statement under a lock. It reports "failed" if it does not.
func sleeper() int {
	var a sleeperArgs
	childArgs(&a)
	d := drivers[slices.IndexFunc(drivers, func(d driver) bool { return d.name == a.Driver })]
	db, err := d.openDB(a.DSN)
	if err != nil {
		tell("failed", "", err)
		return 1
	}
	all := append(slices.Clone(openers), leadOnce)
	w := all[slices.IndexFunc(all, func(w way) bool { return w.name == a.Way })]
	var opts []advisory.Option
	if a.HolderTimeout > 0 {
		opts = append(opts, advisory.HolderTimeout(a.HolderTimeout))
	}
	if a.Isolation != sql.LevelDefault {
		opts = append(opts, advisory.TxOptions(&sql.TxOptions{Isolation: a.Isolation}))
	}
	err = w.with(context.Background(), db, advisory.Name(a.Key), func(ctx context.Context, q querier) error {
		_, err := q.ExecContext(ctx, "SELECT pg_sleep(18)")
		return err
	}, opts...)
	tell("failed", "", err)
	return 1
}

// A killing is one way to hold a lock while the server works.
type killing struct {
	d         driver
	w         way
	isolation sql.IsolationLevel
	timeout   time.Duration // HolderTimeout
	contended bool
	limit     time.Duration
}

func (k killing) name() string {
	name := k.d.name + " " + k.w.name
	if k.isolation != sql.LevelDefault {
		name += " " + k.isolation.String()
	}
	if k.timeout > 0 {
		name += " HolderTimeout"
	}
	if k.contended {
		name += " contended"
	}
	return name
}

// How long a lock may outlive its process, whose statement is on another session, or on that of the lock.
const onAnother, onTheSame = 4 * time.Second, 6 * time.Second

func killings() (all []killing) {
	for _, d := range drivers[:2] {
		for _, contended := range []bool{false, true} {
			for _, w := range []way{withLock, withLocks, acquire, leadOnce} {
				if contended && w.name != withLock.name {
					continue
				}
				all = append(all, killing{d: d, w: w, contended: contended, limit: onAnother})
			}
			for _, timeout := range []time.Duration{0, 20 * time.Second} {
				all = append(all, killing{d: d, w: withConnLock, timeout: timeout, contended: contended, limit: onTheSame})
				for _, isolation := range []sql.IsolationLevel{sql.LevelReadCommitted, sql.LevelRepeatableRead} {
					all = append(all, killing{d: d, w: withTxLock, isolation: isolation, timeout: timeout, contended: contended, limit: onTheSame})
				}
			}
		}
	}
	return all
}

func TestProcessKilledInTheMiddleOfAStatementFreesItsLock(t *testing.T) {
	t.Parallel()
	for some := range slices.Chunk(killings(), 17) { // as many processes at a time
		var oneByOne sync.Mutex
		allTogether(t, some, killing.name, func(t *testing.T, k killing, meet func()) {
			allowLog(t, clientGone)
			key, app := testKey(t), appName(t)
			release := func() {}
			if k.contended {
				release = hold(t, adminDB(t), key)
			}
			c := startChild(t, "sleeper", sleeperArgs{
				Driver: k.d.name, DSN: watchLog(t, withParams(t, server.DSN(), "application_name", app)),
				Way: k.w.name, Key: t.Name(), HolderTimeout: k.timeout, Isolation: k.isolation,
			})
			if k.contended {
				waitForWaiters(t, adminDB(t), key, 1)
				release()
			}
			waitFor(t, "the server is at work", func() (bool, error) {
				if e, failed := c.find("failed", ""); failed {
					return false, fmt.Errorf("it has ended: %s", e.Err)
				}
				return isTrue(adminDB(t), `SELECT EXISTS (SELECT FROM pg_stat_activity
					WHERE application_name = $1 AND state = 'active' AND query LIKE 'SELECT pg_sleep%')`, app)
			})
			if n, err := locks(t.Context(), adminDB(t), key, true); n != 1 || err != nil {
				t.Fatalf("%d hold the lock, want the process (%v)", n, err)
			}
			meet() // to start processes takes the machine so long that nothing is measured meanwhile
			if k.limit == onAnother {
				oneByOne.Lock()
				defer oneByOne.Unlock()
			}
			killed := time.Now()
			c.signal(syscall.SIGKILL)
			waitFor(t, "the lock is free", func() (bool, error) {
				time.Sleep(20 * time.Millisecond)
				n, err := locks(t.Context(), adminDB(t), key, true)
				return n == 0, err
			})
			took := time.Since(killed)
			t.Logf("free after %v", took.Round(time.Millisecond))
			if took > k.limit {
				t.Errorf("free after %v, want %v", took, k.limit)
			}
			// What is left of the statement is of no interest.
			allowLog(t, terminated)
			setUp(t, adminDB(t), "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = '"+app+"'")
		})
	}
}

func init() {
	children["keeper"] = keeper
}

// keeper has a lock stay for an hour, reports "returned", and exits when it is told to.
func keeper() int {
	var a holderArgs
	childArgs(&a)
	db, err := drivers[slices.IndexFunc(drivers, func(d driver) bool { return d.name == a.Driver })].openDB(a.DSN)
	if err == nil {
		err = advisory.WithLock(context.Background(), db, advisory.Name(a.Keys[0]), func(context.Context) error { return nil },
			advisory.AtLeast(time.Hour))
	}
	tell("returned", a.Keys[0], err)
	_, _ = io.Copy(io.Discard, os.Stdin)
	return 0
}

// A lock that stays ends with its process, however that ends.
func TestALockThatStaysEndsWithItsProcess(t *testing.T) {
	t.Parallel()
	bothDrivers(t, func(t *testing.T, d driver) {
		for name, end := range map[string]func(*child){
			"exit": func(c *child) { c.stdin.Close(); <-c.done },
			"kill": (*child).kill,
		} {
			t.Run(name, func(t *testing.T) {
				t.Parallel()
				key := testKey(t)
				c := startChild(t, "keeper", holderArgs{Driver: d.name, DSN: watchLog(t, server.DSN()), Keys: []string{t.Name()}})
				if e := c.await("returned", t.Name()); e.Err != "" {
					t.Fatal(e.Err)
				}
				if n, err := locks(t.Context(), adminDB(t), key, true); err != nil || n != 1 {
					t.Errorf("%d hold the lock; %v", n, err)
				}
				end(c)
				wantFree(t, adminDB(t), key)
			})
		}
	})
}
