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
)

// CREATE INDEX CONCURRENTLY waits for every transaction that might see the table as it
// was before, and a statement that waits for a lock is one (golang-migrate/migrate#960).
func TestHolderBuildsIndexConcurrentlyWhileOthersWait(t *testing.T) {
	t.Parallel()
	eachDriver(t, func(t *testing.T, d driver) {
		eachWay(t, indexBuilders, func(t *testing.T, holder way) {
			t.Parallel()
			if err := buildIndexAsHolder(t, d, holder, queuers, "1s"); err != nil {
				t.Error(err)
			}
		})
	})
}

// A wait is shorter than the server's deadlock_timeout, whatever that is. It is not parallel: a
// machine that is late by half of it sees a deadlock.
func TestHolderBuildsIndexConcurrentlyWithAShortDeadlockTimeout(t *testing.T) {
	bothDrivers(t, func(t *testing.T, d driver) {
		eachWay(t, indexBuilders, func(t *testing.T, holder way) {
			for _, w := range queuers {
				if err := buildIndexAsHolder(t, d, holder, []way{w}, "100ms"); err != nil {
					t.Errorf("%s: %v", w.name, err)
				}
			}
		})
	})
}

// A transaction of the caller's is one transaction for as long as it waits. It does no
// harm, unless the index build meets it in the middle of a statement.
func TestHolderBuildsIndexConcurrentlyWhileTransactionsTry(t *testing.T) {
	t.Parallel()
	eachDriver(t, func(t *testing.T, d driver) {
		eachWay(t, indexBuilders, func(t *testing.T, holder way) {
			t.Parallel()
			allowLog(t, "STATEMENT:  CREATE INDEX CONCURRENTLY accounts_id") // where that happens
			var errs []error
			for range 3 { // a rare coincidence each time, not three times
				err := buildIndexAsHolder(t, d, holder, []way{acquireTx}, "1s")
				if err == nil {
					return
				}
				errs = append(errs, err)
			}
			t.Error(errors.Join(errs...))
		})
	})
}

// indexBuilders build the index on the session that holds the lock, where the server can
// see a deadlock, and on another, where nobody can.
var indexBuilders = []way{withConnLock, withLock}

// buildIndexAsHolder builds an index under a lock for which processes wait in the given
// ways, and returns what goes wrong.
func buildIndexAsHolder(t *testing.T, d driver, holder way, waiting []way, deadlockTimeout string) error {
	var (
		dsn     = withParams(t, inDatabase(t), "deadlock_timeout", deadlockTimeout) // other tests' transactions would hold up the index
		db      = d.open(t, withParams(t, dsn, "statement_timeout", "5s"))
		key     = testKey(t)
		waiters errgroup.Group
	)
	wait := func(w way, opts ...advisory.Option) {
		process := d.open(t, dsn)
		waiters.Go(func() error {
			if err := w.with(t.Context(), process, key, noWork, opts...); err != nil {
				return fmt.Errorf("waiter: %s: %w", w.name, err)
			}
			return nil
		})
	}
	setUp(t, db, `CREATE TABLE accounts AS SELECT generate_series(1, 100) AS id`)
	err := holder.with(t.Context(), db, key, func(ctx context.Context, q querier) error {
		queue, try := 0, 0
		for _, w := range waiting {
			wait(w)
			wait(w, advisory.Timeout(time.Minute))
			w.shared = true
			wait(w)
			if w.tries {
				try += 3
			} else {
				queue += 3
			}
		}
		waitForSlices(t, db, queue)
		waitForTriers(t, db, key, try)
		_, err := q.ExecContext(ctx, `CREATE INDEX CONCURRENTLY accounts_id ON accounts (id)`)
		return err
	})
	if err != nil {
		err = fmt.Errorf("holder: %w", err)
	}
	err = errors.Join(err, waiters.Wait())
	if valid, verr := isTrue(db, `SELECT indisvalid FROM pg_index WHERE indexrelid = 'accounts_id'::regclass`); !valid {
		err = errors.Join(err, fmt.Errorf("the index is not valid (%w)", verr))
	}
	wantFree(t, db, key)
	return err
}

// waitForSlices waits until n sessions of db's database wait in the server's queue, or have just done so.
func waitForSlices(t testing.TB, db *sql.DB, n int) {
	t.Helper()
	waitFor(t, fmt.Sprintf("%d have waited", n), func() (bool, error) {
		return isTrue(db, `SELECT count(*) >= $1 FROM pg_stat_activity
			WHERE datname = current_database() AND query LIKE '/* advisory: %lock_timeout%'`, n)
	})
}

// What the tests above would see if waiting were one long statement.
func TestNaiveWaitersDeadlockWithTheHoldersIndex(t *testing.T) {
	t.Parallel()
	allowLog(t, "ERROR:  deadlock detected")
	db := drivers[0].open(t, inDatabase(t))
	key := testKey(t)
	setUp(t, db, `CREATE TABLE accounts AS SELECT generate_series(1, 100) AS id`)
	var g errgroup.Group
	holder := withConnLock.with(t.Context(), db, key, func(ctx context.Context, q querier) error {
		for range 3 {
			g.Go(func() error {
				_, err := db.ExecContext(t.Context(), "SELECT pg_advisory_lock("+key.SQL()+"), pg_advisory_unlock("+key.SQL()+")")
				return err
			})
		}
		waitForWaiters(t, db, key, 3)
		_, err := q.ExecContext(ctx, `CREATE INDEX CONCURRENTLY accounts_id ON accounts (id)`)
		return err
	})
	waiter := g.Wait()
	if sqlState(holder) != "40P01" && sqlState(waiter) != "40P01" {
		t.Errorf("holder: %v, waiter: %v; want a deadlock", holder, waiter)
	}
}

// A statement_timeout is meant for statements, and one wait is several.
func TestStatementTimeoutDoesNotEndTheWaiting(t *testing.T) {
	t.Parallel()
	const statementTimeout = 100 * time.Millisecond
	allowLog(t, "ERROR:  canceling statement due to statement timeout") // in the moment before or after the block
	eachDriver(t, func(t *testing.T, d driver) {
		t.Parallel()
		db := d.open(t, withParams(t, server.DSN(), "statement_timeout", statementTimeout.String()))
		key := testKey(t)
		release := hold(t, adminDB(t), key)
		var g errgroup.Group
		for _, w := range ways {
			for _, opts := range [][]advisory.Option{nil, {advisory.Timeout(20 * time.Second)}} {
				g.Go(func() error {
					if err := w.with(soon(t), db, key, noWork, opts...); err != nil {
						return fmt.Errorf("%s: %w", w.name, err)
					}
					return nil
				})
			}
			waitForWaiters(t, adminDB(t), key, 1)
		}
		time.Sleep(5 * statementTimeout) // the time itself is the condition
		release()
		if err := g.Wait(); err != nil {
			t.Error(err)
		}
		wantClean(t, db)
	})
}

// Timeout is kept by the server, to the millisecond and at no cost: the connection stays.
func TestTimeoutIsKeptAndCostsNoConnection(t *testing.T) {
	t.Parallel()
	const timeout = 500 * time.Millisecond // longer than one bounded wait
	eachDriver(t, func(t *testing.T, d driver) {
		t.Parallel()
		key := testKey(t)
		hold(t, adminDB(t), key)
		var g errgroup.Group
		for _, w := range ways {
			db := d.open(t, server.DSN())
			db.SetMaxOpenConns(1)
			pid := backendPID(t, db)
			g.Go(func() error {
				began := time.Now()
				err := w.with(soon(t), db, key, noWork, advisory.Timeout(timeout))
				if took := time.Since(began); !errors.Is(err, advisory.ErrNotAcquired) || took < timeout || took > timeout+2*time.Second {
					t.Errorf("%s: %v after %v, want ErrNotAcquired after %v", w.name, err, took, timeout)
				}
				if backendPID(t, db) != pid {
					t.Errorf("%s: the connection was not kept", w.name)
				}
				wantClean(t, db)
				return nil
			})
		}
		_ = g.Wait()
	})
}

func backendPID(t testing.TB, db *sql.DB) (pid int) {
	t.Helper()
	if err := db.QueryRow("SELECT pg_backend_pid()").Scan(&pid); err != nil {
		t.Error(err)
	}
	return pid
}
