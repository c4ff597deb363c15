package integration

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sync/errgroup"

	"github.com/pgadvisory/advisory"
)

// stormSize is the number of acquisitions in a storm, per driver.
const stormSize = 1500

// A storm is many acquisitions at once, in all ways, that end in all ways.
type storm struct {
	keys                       []advisory.Key
	granted, refused, canceled atomic.Int64
}

func newStorm(t testing.TB) *storm {
	s := &storm{}
	for i := range 3 {
		s.keys = append(s.keys, advisory.Name(fmt.Sprintf("%s %d", t.Name(), i)))
	}
	return s
}

func (s *storm) String() string {
	return fmt.Sprintf("%d granted, %d refused, %d cancelled", s.granted.Load(), s.refused.Load(), s.canceled.Load())
}

// blow makes n acquisitions in 8 goroutines over two pools, each of which stands for a
// process that keeps its connections.
func (s *storm) blow(t testing.TB, pools []*sql.DB, n int) {
	const goroutines = 8
	allowLog(t, brokenOff, "STATEMENT:  SELECT pg_sleep(") // the latter is the work, which ends with its ctx
	for _, db := range pools {
		db.SetMaxOpenConns(goroutines + 1) // one for each lock, and some for the work
		db.SetMaxIdleConns(goroutines + 1)
	}
	err := concurrently(goroutines, n/goroutines, func(i int) error { return s.one(soon(t), pools[i%2]) })
	if err != nil {
		t.Error(err)
	}
	if s.granted.Load() == 0 || s.refused.Load() == 0 || s.canceled.Load() == 0 {
		t.Errorf("no storm: %v", s)
	}
}

// one makes one acquisition.
func (s *storm) one(ctx context.Context, db *sql.DB) error {
	w := ways[rand.IntN(len(ways))]
	w.shared = rand.IntN(4) == 0
	patience := 300*time.Microsecond + rand.N(30*time.Millisecond)
	var opts []advisory.Option
	switch rand.IntN(4) {
	case 0:
		opts = append(opts, advisory.NoWait())
	case 1:
		opts = append(opts, advisory.Timeout(patience))
	case 2:
		// Not WithTimeout: drivers know a deadline beforehand.
		var cancel context.CancelFunc
		ctx, cancel = context.WithCancel(ctx)
		defer cancel()
		defer time.AfterFunc(patience, cancel).Stop()
	}
	if w.opens && rand.IntN(4) == 0 {
		opts = append(opts, advisory.HolderTimeout(10*time.Second))
	}
	work := "SELECT pg_sleep(0.001)"
	if w.beats && rand.IntN(20) == 0 {
		// Not shorter: the holders beside it lose their locks with it, where the machine is late.
		opts = append(opts, advisory.Heartbeat(100*time.Millisecond))
		work = "SELECT pg_sleep(0.150)"
	}
	err := w.with(ctx, db, s.keys[rand.IntN(len(s.keys))], func(ctx context.Context, q querier) error {
		_, err := q.ExecContext(ctx, work)
		return err
	}, opts...)
	switch {
	case err == nil:
		s.granted.Add(1)
	case ctx.Err() != nil:
		s.canceled.Add(1)
	case errors.Is(err, advisory.ErrNotAcquired):
		s.refused.Add(1)
	case errors.Is(err, advisory.ErrLost):
		// A heartbeat of 100 ms was late, its own or that of a holder beside it.
	default:
		return fmt.Errorf("%s: %w", w.name, err)
	}
	return nil
}

// However acquisitions end, no session keeps a lock, a transaction or a setting.
func TestNothingIsLeftBehind(t *testing.T) {
	t.Parallel()
	eachDriver(t, func(t *testing.T, d driver) {
		t.Parallel()
		app := appName(t)
		dsn := withParams(t, server.DSN(), "application_name", app)
		pools := []*sql.DB{d.open(t, dsn), d.open(t, dsn)}
		s := newStorm(t)
		s.blow(t, pools, d.rounds(stormSize))
		t.Log(s)

		for _, key := range s.keys {
			wantFree(t, adminDB(t), key)
			wantFree(t, adminDB(t), second(key))
		}
		waitFor(t, "no session is in a transaction", func() (bool, error) {
			return isTrue(adminDB(t), `SELECT NOT EXISTS (SELECT FROM pg_stat_activity
				WHERE application_name = $1 AND state <> 'idle')`, app)
		})
		for _, db := range pools {
			wantClean(t, db)
		}
	})
}

// What fn does on the connection that holds the lock does not reach its next user.
func TestConnectionIsHandedBackCleanOrNotAtAll(t *testing.T) {
	t.Parallel()
	eachDriver(t, func(t *testing.T, d driver) {
		db := d.open(t, server.DSN())
		db.SetMaxOpenConns(1)
		key := testKey(t)
		pid := backendPID(t, db)

		err := withConnLock.with(t.Context(), db, key, func(ctx context.Context, q querier) error {
			_, err := q.ExecContext(ctx, "SELECT pg_advisory_lock("+key.SQL()+"), pg_advisory_lock("+second(key).SQL()+")")
			return err
		})
		if err != nil {
			t.Error(err)
		}
		wantClean(t, db)
		if backendPID(t, db) != pid {
			t.Error("forgotten locks cost the connection")
		}

		allowLog(t, "WARNING:  you don't own a lock of type ExclusiveLock") // fn has unlocked it
		err = withConnLock.with(t.Context(), db, key, func(ctx context.Context, q querier) error {
			_, err := q.ExecContext(ctx, "SELECT pg_advisory_unlock("+key.SQL()+"), pg_advisory_lock("+second(key).SQL()+")")
			return err
		})
		if !errors.Is(err, advisory.ErrLost) {
			t.Errorf("error is %v, want ErrLost", err)
		}
		wantClean(t, db)
		if backendPID(t, db) == pid {
			t.Error("a connection in doubt was handed back")
		}
		wantFree(t, adminDB(t), second(key))
	})
}

// Not in parallel with other tests, whose goroutines it would count.
func TestNoGoroutineIsLeftBehind(t *testing.T) {
	bothDrivers(t, func(t *testing.T, d driver) {
		before := goleak.IgnoreCurrent()
		pools := []*sql.DB{d.open(t, server.DSN()), d.open(t, server.DSN())}
		newStorm(t).blow(t, pools, stormSize/5)
		for _, db := range pools {
			if err := db.Close(); err != nil {
				t.Error(err)
			}
		}
		waitFor(t, "the goroutines have ended", func() (bool, error) {
			err := goleak.Find(before)
			return err == nil, err
		})
	})
}

// A pool does not know that its idle connections have died, after a restart of the
// server, say. Who takes a lock need not know either.
func TestDeadIdleConnectionsDoNotMatter(t *testing.T) {
	t.Parallel()
	eachDriver(t, func(t *testing.T, d driver) {
		app := appName(t)
		dsn := withParams(t, server.DSN(), "application_name", app)
		for _, w := range openers {
			for name, opts := range someOptions {
				db, key := d.open(t, dsn), testKey(t)
				fill(t, db, 4)
				terminate(t, `application_name = $1`, app)
				if err := w.with(t.Context(), db, key, noWork, opts...); err != nil {
					t.Errorf("%s, %s: %v", w.name, name, err)
				}
				wantFree(t, adminDB(t), key)
				db.Close()
			}
		}
	})
}

// fill puts n idle connections into the pool.
func fill(t testing.TB, db *sql.DB, n int) {
	t.Helper()
	db.SetMaxIdleConns(n)
	for range n {
		conn, err := db.Conn(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
	}
}

// terminate ends the sessions on the server that the condition finds, and waits until
// they are gone. It waits for the first one: a wait leaves the server's queue for a moment, again and again.
func terminate(t testing.TB, condition string, args ...any) {
	t.Helper()
	allowLog(t, terminated)
	var pids []int64
	waitFor(t, "there is a session to terminate", func() (bool, error) {
		rows, err := adminDB(t).Query(`SELECT pid FROM pg_stat_activity WHERE pid <> pg_backend_pid() AND `+condition, args...)
		if err != nil {
			return false, err
		}
		defer rows.Close()
		for rows.Next() {
			var pid int64
			if err := rows.Scan(&pid); err != nil {
				return false, err
			}
			pids = append(pids, pid)
		}
		return len(pids) > 0, rows.Err()
	})
	for _, pid := range pids {
		if _, err := adminDB(t).Exec(`SELECT pg_terminate_backend($1)`, pid); err != nil {
			t.Fatal(err)
		}
	}
	waitFor(t, "the sessions are gone", func() (bool, error) {
		return isTrue(adminDB(t), `SELECT NOT EXISTS (SELECT FROM pg_stat_activity WHERE pid = ANY($1))`, pids)
	})
}

// isTrue asks the server.
func isTrue(db *sql.DB, query string, args ...any) (yes bool, err error) {
	err = db.QueryRow(query, args...).Scan(&yes)
	return yes, err
}

// waiterPIDs finds the sessions that wait for key.
const waiterPIDs = `SELECT pid FROM pg_locks WHERE locktype = 'advisory' AND NOT granted AND database = (
	SELECT oid FROM pg_database WHERE datname = current_database())
	AND (classid::bigint << 32 | objid::bigint)::text = $1`

func TestWaiterOutlivesItsSession(t *testing.T) {
	t.Parallel()
	eachDriver(t, func(t *testing.T, d driver) {
		var g errgroup.Group
		for _, w := range openers {
			key := advisory.Name(t.Name() + w.name)
			release := hold(t, adminDB(t), key)
			db := d.open(t, server.DSN())
			g.Go(func() error {
				if err := w.with(soon(t), db, key, noWork); err != nil {
					return fmt.Errorf("%s: %w", w.name, err)
				}
				return nil
			})
			waitForWaiters(t, adminDB(t), key, 1)
			terminate(t, `pid IN (`+waiterPIDs+`)`, key.SQL())
			terminated := time.Now()
			waitForWaiters(t, adminDB(t), key, 1)
			// In the time of a few statements, not of one that goes unanswered.
			if took := time.Since(terminated); took > 5*time.Second {
				t.Errorf("%s: waits again only after %v", w.name, took)
			}
			release()
		}
		if err := g.Wait(); err != nil {
			t.Error(err)
		}
	})
}
