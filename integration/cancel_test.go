package integration

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/pgadvisory/advisory"
)

// A caller whose ctx ends gets its goroutine back at once. Its session finishes the bounded
// statement and goes back to the pool: to break it off would cost the connection, and, because the
// server notices late, would leave the server with more sessions than the pool may have.

// TestCancelledWaitsCostNoConnection cancels a thousand waits and counts the sessions that the
// server has had.
func TestCancelledWaitsCostNoConnection(t *testing.T) {
	t.Parallel()
	const waits, goroutines, limit = 1000, 4, 6
	bothDrivers(t, func(t *testing.T, d driver) {
		t.Parallel()
		allowLog(t, brokenOff)
		database := databaseOf(t, inDatabase(t))
		sent := newWire(t)
		app := appName(t)
		db := d.open(t, withParams(t, sent.dsn, "dbname", database, "application_name", app))
		db.SetMaxOpenConns(limit)
		db.SetMaxIdleConns(limit)

		var keys []advisory.Key
		for i := range queuers {
			keys = append(keys, advisory.Name(fmt.Sprint(t.Name(), i)))
		}
		other := d.open(t, withParams(t, server.DSN(), "dbname", database))
		release := holdAll(t, other, keys)

		seen := pollSessions(t, app)
		late, err := cancelledWaits(t, db, keys, waits, goroutines)
		if err != nil {
			t.Error(err)
		}
		waitFor(t, "nobody waits", func() (bool, error) {
			return isTrue(adminDB(t), `SELECT NOT EXISTS (SELECT FROM pg_stat_activity
				WHERE application_name = $1 AND state <> 'idle')`, app)
		})
		logBound(t, "cancel "+d.name, "return after the end of ctx", time.Second, late)
		if n := db.Stats().OpenConnections; n > limit {
			t.Errorf("the pool has %d connections, want %d at most", n, limit)
		}
		release()
		for _, key := range keys {
			wantFree(t, other, key)
			wantFree(t, other, second(key))
		}
		wantClean(t, db)
		most, pids := seen()
		// A session that the machine was too late for is replaced, and takes a moment to end.
		const replaced = 3
		if most > limit+1 {
			t.Errorf("the server had %d sessions of a pool of %d at a time", most, limit)
		}

		reached := 0
		for _, s := range sent.take() {
			if strings.Contains(s, "DO $advisory$") {
				reached++
			}
		}
		if reached < limit {
			t.Errorf("%d waits reached the server's queue, too few to show anything", reached)
		}
		const others = 2 // the holder's, and the one that was asked for the database's name
		sessions := sessionsEver(t, database, len(pids)+others, db, other)
		t.Logf("%d waits, %d statements that wait; %d sessions of the pool were seen, %d at a time; there were %d",
			waits, reached, len(pids), most, sessions-others)
		if sessions > limit+others+replaced {
			t.Errorf("a pool of %d has had %d sessions", limit, sessions-others)
		}
	})
}

// cancelledWaits cancels n waits, in several goroutines, and returns how late each returned.
func cancelledWaits(t *testing.T, db *sql.DB, keys []advisory.Key, n, goroutines int) ([]time.Duration, error) {
	var next atomic.Int64
	late := make([][]time.Duration, goroutines)
	err := concurrently(goroutines, 1, func(g int) error {
		for {
			i := int(next.Add(1))
			if i > n {
				return nil
			}
			w := queuers[i%len(queuers)]
			took, err := cancelledWait(t, w, db, keys[i%len(keys)], 300*time.Microsecond+rand.N(29700*time.Microsecond))
			if err != nil {
				return fmt.Errorf("%s: %w", w.name, err)
			}
			late[g] = append(late[g], took)
		}
	})
	return slices.Concat(late...), err
}

// cancelledWait waits for key, which another holds, cancels that after a while, and returns how
// long it took from then until the wait returned.
func cancelledWait(t testing.TB, w way, db *sql.DB, key advisory.Key, patience time.Duration) (took time.Duration, err error) {
	wait, end, err := w.waiting(t, db, key)
	if err != nil {
		return 0, err
	}
	defer end()
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	var ended time.Time
	time.AfterFunc(patience, func() {
		ended = time.Now()
		cancel()
	})
	err = wait(ctx)
	returned := time.Now()
	<-ctx.Done()
	if !errors.Is(err, context.Canceled) {
		return 0, fmt.Errorf("%v after %v, want context.Canceled", err, returned.Sub(ended))
	}
	return returned.Sub(ended), nil
}

// waiting returns the part of the way that waits: without what a program does before and after, to
// get a connection and to close it, which waits for the statement.
func (w way) waiting(t testing.TB, db *sql.DB, key advisory.Key) (wait func(context.Context) error, end func(), err error) {
	if w.name != acquireConn.name {
		return func(ctx context.Context) error { return w.with(ctx, db, key, noWork) }, func() {}, nil
	}
	conn, err := db.Conn(t.Context())
	if err != nil {
		return nil, nil, err
	}
	return func(ctx context.Context) error { return advisory.AcquireConn(ctx, conn, key) }, func() { conn.Close() }, nil
}

// holdAll holds keys on one session of its own, without the package under test, until release is
// called.
func holdAll(t testing.TB, db *sql.DB, keys []advisory.Key) (release func()) {
	t.Helper()
	conn, err := db.Conn(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, key := range keys {
		if _, err := conn.ExecContext(t.Context(), "SELECT pg_advisory_lock("+key.SQL()+")"); err != nil {
			t.Fatal(err)
		}
	}
	return func() {
		t.Helper()
		if _, err := conn.ExecContext(context.Background(), "SELECT pg_advisory_unlock_all()"); err != nil {
			t.Error(err)
		}
		conn.Close()
	}
}

// pollSessions looks at the sessions of an application until seen is called, which returns the most
// that there were at a time, and all that there were.
func pollSessions(t testing.TB, app string) (seen func() (most int, pids map[int]bool)) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	t.Cleanup(cancel)
	most, pids := 0, map[int]bool{}
	look := func() error {
		rows, err := adminDB(t).Query(`SELECT pid FROM pg_stat_activity WHERE application_name = $1`, app)
		if err != nil {
			return err
		}
		defer rows.Close()
		n := 0
		for ; rows.Next(); n++ {
			var pid int
			if err := rows.Scan(&pid); err != nil {
				return err
			}
			pids[pid] = true
		}
		most = max(most, n)
		return rows.Err()
	}
	done := make(chan error, 1)
	go func() {
		tick := time.NewTicker(2 * time.Millisecond)
		defer tick.Stop()
		for {
			if err := look(); err != nil {
				done <- err
				return
			}
			select {
			case <-tick.C:
			case <-ctx.Done():
				done <- nil
				return
			}
		}
	}()
	return func() (int, map[int]bool) {
		t.Helper()
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
		return most, pids
	}
}

// sessionsEver closes pools, which are all that a database is used by, and returns how many
// sessions it has had since it was created: at least so many.
func sessionsEver(t testing.TB, database string, least int, pools ...*sql.DB) (n int) {
	t.Helper()
	for _, db := range pools {
		if err := db.Close(); err != nil {
			t.Error(err)
		}
	}
	waitFor(t, "no session is left", func() (bool, error) {
		return isTrue(adminDB(t), `SELECT NOT EXISTS (SELECT FROM pg_stat_activity
			WHERE datname = $1 AND backend_type = 'client backend')`, database)
	})
	// A session is counted when it has ended, at the latest; before version 15, soon after that.
	waitFor(t, "the sessions are counted", func() (bool, error) {
		err := adminDB(t).QueryRow(`SELECT sessions FROM pg_stat_database WHERE datname = $1`, database).Scan(&n)
		if err == nil && n < least {
			err = fmt.Errorf("%d are", n)
		}
		return n >= least, err
	})
	return n
}

// A wait that has been cancelled is over before its statement is: it need not even be one of the
// shortest. AcquireConn's is over with its statement.
func TestCancelledWaitReturnsBeforeItsStatement(t *testing.T) {
	t.Parallel()
	const tries = 20
	bothDrivers(t, func(t *testing.T, d driver) {
		t.Parallel()
		eachWay(t, queuers, func(t *testing.T, w way) {
			key := testKey(t)
			release := hold(t, adminDB(t), key)
			db := d.open(t, server.DSN())
			db.SetMaxOpenConns(6)
			wait, end, err := w.waiting(t, db, key)
			if err != nil {
				t.Fatal(err)
			}
			defer end()
			before := 0
			for range tries {
				ctx, cancel := context.WithCancel(t.Context())
				var g errgroup.Group
				g.Go(func() error { return wait(ctx) })
				waitForWaiters(t, adminDB(t), key, 1)
				cancel()
				if err := g.Wait(); !errors.Is(err, context.Canceled) {
					t.Fatalf("%v, want context.Canceled", err)
				}
				waiting, err := locks(t.Context(), adminDB(t), key, false)
				if err != nil {
					t.Fatal(err)
				}
				before += waiting
				waitFor(t, "the statement has ended", func() (bool, error) {
					waiting, err := locks(t.Context(), adminDB(t), key, false)
					return waiting == 0, err
				})
			}
			t.Logf("%d of %d returned before the statement had ended", before, tries)
			switch {
			case w.name == acquireConn.name: // conn is the caller's again then
				if before > 0 {
					t.Error("AcquireConn returned before its statement had ended")
				}
			case before == 0:
				t.Error("a cancelled wait returns no sooner than its statement")
			}
			release()
			wantFree(t, adminDB(t), key)
		})
	})
}

// The caller's own session outlives a wait that it has cancelled, and so do the locks on it.
func TestCancelledAcquireConnLeavesConnAsItWas(t *testing.T) {
	t.Parallel()
	bothDrivers(t, func(t *testing.T, d driver) {
		t.Parallel()
		db := d.open(t, server.DSN())
		key, held := testKey(t), advisory.Name(t.Name()+" held")
		release := hold(t, adminDB(t), key)
		conn, err := db.Conn(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		if err := advisory.AcquireConn(t.Context(), conn, held); err != nil {
			t.Fatal(err)
		}
		for range 10 {
			ctx, cancel := context.WithCancel(t.Context())
			var g errgroup.Group
			g.Go(func() error { return advisory.AcquireConn(ctx, conn, key) })
			waitForWaiters(t, adminDB(t), key, 1)
			cancel()
			if err := g.Wait(); !errors.Is(err, context.Canceled) {
				t.Fatalf("%v, want context.Canceled", err)
			}
			if _, err := conn.ExecContext(t.Context(), "SELECT"); err != nil {
				t.Fatalf("the statement after a cancelled wait: %v", err)
			}
			wantRefused(t, db, held)
		}
		release()
		wantFree(t, adminDB(t), key)
		if err := advisory.ReleaseConn(t.Context(), conn, held); err != nil {
			t.Error(err)
		}
		wantCleanSession(t, conn)
	})
}
