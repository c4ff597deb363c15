//go:build linux

package integration

import (
	"bufio"
	"context"
	"database/sql"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/pgadvisory/advisory"
	"github.com/pgadvisory/advisory/integration/internal/history"
)

func init() {
	children["nester"] = nester
	children["nesters"] = nesters
}

// nesterArgs is what the child functions nester and nesters are called with.
type nesterArgs struct {
	Driver, DSN  string
	Outer, Inner string // names; those of nesters begin with Outer
}

func (a nesterArgs) open() *sql.DB {
	i := slices.IndexFunc(drivers, func(d driver) bool { return d.name == a.Driver })
	db, err := drivers[i].openDB(a.DSN)
	if err != nil {
		panic(err)
	}
	return db
}

// nester takes a lock, and another under it when it is ordered to.
func nester() int {
	var a nesterArgs
	childArgs(&a)
	db := a.open()
	orders := bufio.NewScanner(os.Stdin)
	err := advisory.WithLock(context.Background(), db, advisory.Name(a.Outer), func(ctx context.Context) error {
		tell("held", a.Outer, nil)
		if !orders.Scan() {
			os.Exit(0)
		}
		tell("inner", a.Inner, advisory.WithLock(ctx, db, advisory.Name(a.Inner), func(context.Context) error { return nil }))
		return nil
	})
	tell("outer", a.Outer, err)
	return 0
}

// Each caller of the ring is a process, and the message says which one holds the lock.
func TestARingOfProcesses(t *testing.T) {
	t.Parallel()
	for _, n := range []int{2, 3, 5} {
		var ring []*child
		key := func(i int) string { return fmt.Sprintf("%s %d of %d", t.Name(), i%n, n) }
		for i := range n {
			dsn := watchLog(t, withParams(t, server.DSN(), "application_name", fmt.Sprint("nester ", i)))
			ring = append(ring, startChild(t, "nester", nesterArgs{Driver: drivers[i%2].name, DSN: dsn, Outer: key(i), Inner: key(i + 1)}))
		}
		for i, c := range ring {
			c.await("held", key(i))
		}
		began := time.Now()
		for _, c := range ring {
			c.order("go on")
		}
		var told []string
		for i, c := range ring {
			if inner := c.await("inner", key(i+1)); inner.Err != "" {
				told = append(told, inner.Err)
				if who := fmt.Sprintf("(app \"nester %d\")", (i+1)%n); !strings.Contains(inner.Err, "deadlock: this caller holds ") || !strings.Contains(inner.Err, who) {
					t.Errorf("error %q, want a deadlock with %s", inner.Err, who)
				}
			}
			if outer := c.await("outer", key(i)); outer.Err != "" {
				t.Error(outer.Err)
			}
		}
		if took := time.Since(began); len(told) != 1 || took > foundBetween {
			t.Errorf("%d processes: %d told after %v: %q; want one", n, len(told), took, told)
		} else {
			t.Logf("%d processes: over after %v: %s", n, took, told[0])
		}
	}
}

// nesters takes locks under others, in random order and in all ways, until it is ordered to stop.
func nesters() int {
	var a nesterArgs
	childArgs(&a)
	db := a.open()
	db.SetMaxIdleConns(20)
	ctx, stop := context.WithCancel(context.Background())
	go func() {
		if !bufio.NewScanner(os.Stdin).Scan() {
			os.Exit(0)
		}
		stop()
	}()
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for ctx.Err() == nil {
				err := nestAtRandom(ctx, db, a.Outer, rand.Perm(8)[:2+rand.IntN(2)])
				switch {
				case ctx.Err() != nil:
				case err == nil:
					tell("through", "", nil)
				case errors.Is(err, advisory.ErrDeadlock):
					tell("deadlock", "", nil)
				default:
					tell("violation", "", err)
				}
			}
		})
	}
	wg.Wait()
	return 0
}

// nestAtRandom takes locks, one under the other.
func nestAtRandom(ctx context.Context, db *sql.DB, name string, locks []int) error {
	if len(locks) == 0 {
		time.Sleep(rand.N(3 * time.Millisecond))
		return nil
	}
	w := openers[rand.IntN(len(openers))]
	w.shared = rand.IntN(3) == 0
	return w.with(ctx, db, advisory.Name(fmt.Sprint(name, locks[0])), func(ctx context.Context, _ querier) error {
		return nestAtRandom(ctx, db, name, locks[1:])
	})
}

// However many take locks in whatever order: each cycle is found, and they go on.
func TestNothingStandsStill(t *testing.T) {
	t.Parallel()
	const lasts = 12 * time.Second
	var all []*child
	for i := range 3 {
		dsn := watchLog(t, withParams(t, server.DSN(), "application_name", fmt.Sprint("nesters ", i)))
		all = append(all, startChild(t, "nesters", nesterArgs{Driver: drivers[i%2].name, DSN: dsn, Outer: t.Name()}))
	}
	began := history.Now()
	time.Sleep(lasts)
	ended := history.Now()
	counts := make(map[string]int)
	at := []time.Duration{began, ended}
	for _, c := range all {
		for _, e := range c.all() {
			counts[e.What]++
			at = append(at, e.At)
			if e.What == "violation" {
				t.Error(e.Err)
			}
		}
		c.order("stop")
	}
	for _, c := range all {
		select {
		case <-c.done:
		case <-time.After(20 * time.Second):
			t.Fatal("a process does not end")
		}
	}
	slices.Sort(at)
	still := time.Duration(0)
	for i := range at[1:] {
		still = max(still, at[i+1]-at[i])
	}
	t.Logf("%v: %v; the longest time in which nothing went on: %v", lasts, counts, still)
	if still > foundBetween || counts["deadlock"] == 0 || counts["through"] == 0 {
		t.Errorf("%v; nothing went on for %v, want at most %v", counts, still, foundBetween)
	}
}
