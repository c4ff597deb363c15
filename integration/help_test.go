package integration

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/pgadvisory/advisory"
	"github.com/pgadvisory/advisory/integration/internal/testkit"
)

// rounds is n for a driver in its default mode, and fewer for the other modes.
func (d driver) rounds(n int) int {
	if len(d.param) > 0 {
		return n / 5
	}
	return n
}

// setUp runs statements that prepare the database for a test.
func setUp(t testing.TB, db *sql.DB, statements ...string) {
	t.Helper()
	for _, s := range statements {
		if _, err := db.Exec(s); err != nil {
			t.Fatal(err)
		}
	}
}

// What the server says in its log of a session that it ends because the test wants it to.
const (
	terminated = "FATAL:  terminating connection due to administrator command"
	silent     = "FATAL:  terminating connection due to idle-session timeout"
	silentInTx = "FATAL:  terminating connection due to idle-in-transaction timeout"
	clientGone = "FATAL:  connection to client lost"
)

// brokenOff is what the server says of a statement that the package, or its driver, breaks off
// because the answer is late. A machine that stands still for half a second makes it so.
const brokenOff = "ERROR:  canceling statement due to user request"

// appName is an application_name that no other test's pools have.
func appName(t testing.TB) string { return "test " + testKey(t).SQL() }

// waitForTriers waits until n transactions have tried in vain to take key, and do not
// wait for it in the server's queue.
func waitForTriers(t testing.TB, db *sql.DB, key advisory.Key, n int) {
	t.Helper()
	waitFor(t, fmt.Sprintf("%d try to take %v", n, key), func() (bool, error) {
		var got int
		err := db.QueryRow(`SELECT count(*) FROM pg_stat_activity
			WHERE state = 'idle in transaction' AND query ~ 'pg_try_advisory_xact_lock(_shared)?\(' AND query LIKE $1`,
			"%("+key.SQL()+")%").Scan(&got)
		if err == nil && got < n {
			err = fmt.Errorf("%d try", got)
		}
		return got >= n, err
	})
}

// noWork is the least that can be done under a lock.
func noWork(context.Context, querier) error { return nil }

// wantGranted fails the test unless key can be had at once.
func wantGranted(t testing.TB, db *sql.DB, key advisory.Key) {
	t.Helper()
	if err := withLock.with(context.Background(), db, key, noWork, advisory.NoWait()); err != nil {
		t.Errorf("want the lock: %v", err)
	}
}

// wantRefused fails the test unless another holds key.
func wantRefused(t testing.TB, db *sql.DB, key advisory.Key) {
	t.Helper()
	if err := withLock.with(context.Background(), db, key, noWork, advisory.NoWait()); !errors.Is(err, advisory.ErrNotAcquired) {
		t.Errorf("want ErrNotAcquired, got %v", err)
	}
}

// wantClean fails the test unless every connection in the pool is as it was when it was
// opened: no lock, no transaction, no changed setting.
func wantClean(t testing.TB, db *sql.DB) {
	t.Helper()
	waitFor(t, "no connection is in use", func() (bool, error) {
		if n := db.Stats().InUse; n > 0 {
			return false, fmt.Errorf("%d are", n)
		}
		return true, nil
	})
	for range db.Stats().Idle {
		conn, err := db.Conn(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close() // not before: each one once
		wantCleanSession(t, conn)
	}
	if stats := db.Stats(); stats.Idle != 0 {
		t.Errorf("%d connections not looked at", stats.Idle)
	}
}

func wantCleanSession(t testing.TB, q querier) {
	t.Helper()
	var dirt string
	if err := q.QueryRowContext(context.Background(), `
		SELECT concat_ws(', ',
			(SELECT string_agg(name || ' = ' || setting, ', ') FROM pg_settings
			 WHERE source = 'session' OR setting <> reset_val AND name IN
				('lock_timeout', 'statement_timeout', 'idle_session_timeout', 'idle_in_transaction_session_timeout')),
			(SELECT string_agg(mode || ' on advisory lock ' || classid || '/' || objid, ', ') FROM pg_locks
			 WHERE locktype = 'advisory' AND pid = pg_backend_pid()))`,
	).Scan(&dirt); err != nil {
		t.Error(err)
	}
	if dirt != "" {
		t.Errorf("the session is not clean: %s", dirt)
	}
}

// A counter is a row that is read and written in two statements, with nothing but a
// lock to keep one increment from undoing another.
type counter struct{ table string }

func newCounter(t testing.TB, db *sql.DB) counter {
	t.Helper()
	c := counter{testkit.Unique("counter")}
	setUp(t, db, "DROP TABLE IF EXISTS "+c.table, "CREATE TABLE "+c.table+" (n int)", "INSERT INTO "+c.table+" VALUES (0)")
	t.Cleanup(func() { setUp(t, db, "DROP TABLE IF EXISTS "+c.table) })
	return c
}

func (c counter) value(ctx context.Context, q querier) (n int, err error) {
	err = q.QueryRowContext(ctx, "SELECT n FROM "+c.table).Scan(&n)
	return n, err
}

func (c counter) increment(ctx context.Context, q querier) error {
	n, err := c.value(ctx, q)
	if err != nil {
		return err
	}
	_, err = q.ExecContext(ctx, "UPDATE "+c.table+" SET n = $1", n+1)
	return err
}

// wantValue fails the test unless every increment counted.
func (c counter) wantValue(t testing.TB, db *sql.DB, want int) {
	t.Helper()
	if got, err := c.value(context.Background(), db); err != nil || got != want {
		t.Errorf("%d increments counted, want %d (%v)", got, want, err)
	}
}

// concurrently runs f in n goroutines, each times times.
func concurrently(n, times int, f func(goroutine int) error) error {
	var g errgroup.Group
	for i := range n {
		g.Go(func() error {
			for range times {
				if err := f(i); err != nil {
					return err
				}
			}
			return nil
		})
	}
	return g.Wait()
}

// soon bounds what must not take for ever.
func soon(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	t.Cleanup(cancel)
	return ctx
}
