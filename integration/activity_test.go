package integration

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sync/errgroup"

	"github.com/pgadvisory/advisory"
)

// What an operator reads in pg_stat_activity.

// named are names of locks, and how comments spell them.
var named = []struct{ name, comment string }{
	{"nightly-report", "nightly-report"},
	{"invoices/2024 Q1", "invoices%2F2024%20Q1"},
	{"*/ DROP TABLE x; -- 'é", "%2A%2F%20DROP%20TABLE%20x%3B%20--%20%27%C3%A9"},
	{strings.Repeat("n", 61) + "/tail", strings.Repeat("n", 61) + "%2F"},
	{strings.Repeat("n", 62) + "/tail", strings.Repeat("n", 62)},
}

func TestActivityNamesTheLockThatIsWaitedFor(t *testing.T) {
	t.Parallel()
	bothDrivers(t, func(t *testing.T, d driver) {
		t.Parallel()
		dsn := inDatabase(t) // where the names are nobody else's
		eachWay(t, queuers, func(t *testing.T, w way) {
			app := appName(t)
			db, other := d.open(t, withParams(t, dsn, "application_name", app)), d.open(t, dsn)
			for _, n := range named {
				key := advisory.Name(n.name)
				release := hold(t, other, key)
				var g errgroup.Group
				g.Go(func() error { return w.with(soon(t), db, key, noWork) })
				waitForQuery(t, app, "wait_event = 'advisory'", "/* advisory: "+n.comment+" */ ")
				release()
				if err := g.Wait(); err != nil {
					t.Error(err)
				}
			}
		})
	})
}

// waitForQuery waits until the session of an application that the condition finds shows a statement
// that begins like that.
func waitForQuery(t testing.TB, app, condition, begins string) {
	t.Helper()
	waitFor(t, "a statement begins with "+begins, func() (bool, error) {
		var query string
		err := adminDB(t).QueryRow(`SELECT query FROM pg_stat_activity WHERE application_name = $1 AND `+condition, app).Scan(&query)
		if err == nil && !strings.HasPrefix(query, begins) {
			err = fmt.Errorf("it is %q", query)
		}
		return err == nil, err
	})
}

func TestActivityNamesTheLocksThatAreHeld(t *testing.T) {
	t.Parallel()
	bothDrivers(t, func(t *testing.T, d driver) {
		t.Parallel()
		dsn := inDatabase(t)
		app := appName(t)
		db := d.open(t, withParams(t, dsn, "application_name", app))
		wantComment := func(comment string) func(context.Context) error {
			return func(context.Context) error {
				waitForQuery(t, app, "state = 'idle'", "/* advisory: "+comment+" */ SELECT FROM ")
				return nil
			}
		}
		one := map[string]advisory.Key{
			// Keys without a name.
			"-8675309": advisory.ID(-8675309), "7.-1": advisory.Pair(7, -1),
		}
		for _, n := range named {
			one[n.comment] = advisory.Name(n.name)
		}
		for comment, key := range one {
			if err := advisory.WithLock(t.Context(), db, key, wantComment(comment), advisory.Heartbeat(shortHeartbeat)); err != nil {
				t.Error(err)
			}
		}
		for _, count := range []int{2, 4, 5, 16} {
			keys, comment := jobKeys(t, count)
			if err := advisory.WithLocks(t.Context(), db, keys, wantComment(comment), advisory.Heartbeat(shortHeartbeat)); err != nil {
				t.Error(err)
			}
		}
		wantClean(t, db)
	})
}

// jobKeys returns several keys, and the comment that names them: in the order in which
// everybody takes them, and four at most.
func jobKeys(t testing.TB, count int) (keys []advisory.Key, comment string) {
	t.Helper()
	names := map[advisory.Key]string{}
	for i := range count {
		name := fmt.Sprintf("job-%d", i)
		keys = append(keys, advisory.Name(name))
		names[keys[i]] = name
	}
	inOrder := slices.SortedFunc(slices.Values(keys), func(a, b advisory.Key) int { return cmp.Compare(number(t, a), number(t, b)) })
	var parts []string
	for _, key := range inOrder[:min(4, count)] {
		parts = append(parts, names[key])
	}
	if count > 4 {
		parts = append(parts, fmt.Sprintf("+%d", count-4))
	}
	return keys, strings.Join(parts, ", ")
}

// number is what a key of the bigint key space is on the server.
func number(t testing.TB, key advisory.Key) int64 {
	t.Helper()
	n, err := strconv.ParseInt(key.SQL(), 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// Statements that do not wait are sent for every lock, and are none the longer for the operator.
func TestShortSectionsSendNoComment(t *testing.T) {
	t.Parallel()
	eachDriver(t, func(t *testing.T, d driver) {
		eachWay(t, ways, func(t *testing.T, w way) {
			sent := newWire(t)
			db := d.open(t, sent.dsn)
			key := testKey(t)
			for _, shared := range []bool{false, true} {
				w.shared = shared
				if err := w.with(t.Context(), db, key, noWork); err != nil {
					t.Error(err)
				}
				release := hold(t, adminDB(t), key)
				if err := w.with(t.Context(), db, key, noWork, advisory.NoWait()); err == nil {
					t.Error("another holds the lock, and it was granted")
				}
				release()
			}
			statements := sent.take()
			locking := 0
			for _, s := range statements {
				if strings.Contains(s, "/*") {
					t.Errorf("sent %q", s)
				}
				if strings.Contains(s, "lock") {
					locking++
				}
			}
			if locking < 4 { // two that are granted, and two that are not
				t.Errorf("of what was sent, %d lock: %q", locking, statements)
			}
		})
	})
}

// The first heartbeat, which sets the server's time-out besides, names the lock like all others: it
// is what the session shows until the next one.
func TestEveryHeartbeatNamesTheLock(t *testing.T) {
	t.Parallel()
	bothDrivers(t, func(t *testing.T, d driver) {
		sent := newWire(t)
		db := d.open(t, sent.dsn)
		lock, err := advisory.Acquire(t.Context(), db, advisory.Name("nightly-report"), advisory.Heartbeat(shortHeartbeat))
		if err != nil {
			t.Fatal(err)
		}
		sent.take()
		var heartbeats []string
		waitFor(t, "three heartbeats are sent", func() (bool, error) {
			heartbeats = append(heartbeats, sent.take()...)
			return len(heartbeats) >= 3, nil
		})
		for i, s := range heartbeats {
			if !strings.HasPrefix(s, "/* advisory: nightly-report */ ") {
				t.Errorf("heartbeat %d is %q", i+1, s)
			}
		}
		if err := lock.Release(); err != nil {
			t.Error(err)
		}
	})
}
