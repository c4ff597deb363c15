package integration

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/pgadvisory/advisory"
	"github.com/pgadvisory/advisory/integration/internal/pgtest"
	"github.com/pgadvisory/advisory/integration/internal/testkit"
)

// bothHosts is a DSN that names two servers, and means the one that takes writes. Both
// drivers have that (lib/pq since 1.11), but lib/pq has no URL for it.
func bothHosts(d driver, a, b *pgtest.Server) string {
	const params = "sslmode=disable%[1]sconnect_timeout=2%[1]starget_session_attrs=read-write"
	if d.sql == "postgres" {
		return fmt.Sprintf("host=%[2]s,%[3]s port=%[4]d,%[5]d user=postgres dbname=postgres "+params, " ", a.Host(), b.Host(), a.Port(), b.Port())
	}
	return fmt.Sprintf("postgres://postgres@%[2]s:%[4]d,%[3]s:%[5]d/postgres?"+params, "&", a.Host(), b.Host(), a.Port(), b.Port())
}

// A fenced counter remembers the largest token that it has seen, and refuses a smaller one.
type fencedCounter struct{}

func (fencedCounter) create(t testing.TB, db *sql.DB) {
	t.Helper()
	setUp(t, db, "DROP TABLE IF EXISTS fenced", "CREATE TABLE fenced (n int, token bigint)", "INSERT INTO fenced VALUES (0, 0)",
		"DROP TABLE IF EXISTS fenced_log", "CREATE TABLE fenced_log (n int, token bigint)")
}

var errStale = errors.New("stale token")

// write adds 1, as the holder of the token. The log has every write that was accepted.
func (fencedCounter) write(ctx context.Context, db *sql.DB, token int64) error {
	r, err := db.ExecContext(ctx, `
		WITH w AS (UPDATE fenced SET n = n + 1, token = $1 WHERE token <= $1 RETURNING n, token)
		INSERT INTO fenced_log SELECT * FROM w`, token)
	if err != nil {
		return err
	}
	if n, err := r.RowsAffected(); err != nil || n != 1 {
		return errors.Join(errStale, err)
	}
	return nil
}

// wantNoStale fails the test if a write was accepted after one with a larger token.
func (fencedCounter) wantNoStale(t testing.TB, db *sql.DB) (writes int) {
	t.Helper()
	var stale int
	if err := db.QueryRow(`
		SELECT count(*), count(*) FILTER (WHERE token < before)
		FROM (SELECT token, max(token) OVER (ORDER BY n ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING) AS before FROM fenced_log) AS l`,
	).Scan(&writes, &stale); err != nil {
		t.Fatal(err)
	}
	if stale > 0 {
		t.Errorf("%d of %d writes are stale", stale, writes)
	}
	return writes
}

func TestFailover(t *testing.T) {
	t.Parallel()
	bothDrivers(t, func(t *testing.T, d driver) {
		primary := ownServer(t)
		standby := testkit.Standby(t, primary)
		// What a failover loses is lost to the tokens, too. A standby whose word the
		// commits wait for loses nothing.
		setUp(t, d.open(t, primary.DSN()), "ALTER SYSTEM SET synchronous_standby_names = 'standby'", "SELECT pg_reload_conf()")

		const heartbeat = 400 * time.Millisecond
		dsn := bothHosts(d, primary, standby)
		db := d.open(t, dsn)
		f := &failover{opts: []advisory.Option{advisory.Heartbeat(heartbeat)}}
		f.counter.create(t, db)

		const n = 5
		for i := range n {
			f.hold(t, db, failoverKey(t, i))
		}
		// Waiters write under their own token, again and again, and so does whoever
		// else holds a token, be it stale.
		var wg sync.WaitGroup
		for i := range n {
			wg.Go(func() { f.wait(t, d.open(t, dsn), failoverKey(t, i)) })
		}
		for i := range n {
			waitForWaiters(t, db, failoverKey(t, i), 1)
		}

		failed := time.Now()
		if err := primary.Kill(); err != nil {
			t.Fatal(err)
		}
		if err := standby.Promote(t.Context()); err != nil {
			t.Fatal(err)
		}
		promoted := time.Now()
		told := awaitLosses(t, f.held, failed)
		wg.Wait()
		var took []time.Duration
		for _, at := range f.begun {
			took = append(took, at.Sub(promoted))
		}
		logBound(t, "failover "+d.name, "holder told", 2*heartbeat+500*time.Millisecond, told)
		logBound(t, "failover "+d.name, "waiter begins, from promoted", 2*time.Second, took)

		// An old holder that did not look. Its connections are new, or dead.
		fresh := d.open(t, dsn)
		for i, lock := range f.held {
			if err := f.counter.write(t.Context(), fresh, f.tokens[i]); !errors.Is(err, errStale) {
				t.Errorf("an old holder's write: %v, want it refused", err)
			}
			wantLost(t, "Release", lock.Release())
		}
		if writes := f.counter.wantNoStale(t, fresh); writes < n+20 {
			t.Errorf("%d writes", writes)
		}
	})
}

func failoverKey(t testing.TB, i int) advisory.Key { return advisory.Name(fmt.Sprint(t.Name(), i)) }

// A failover is seen by those who hold locks, and by those who wait for them.
type failover struct {
	counter fencedCounter
	opts    []advisory.Option
	held    []*advisory.Lock
	tokens  []int64 // of those that are held

	mu    sync.Mutex
	begun []time.Time // when waiters had their locks
}

// hold takes the lock of key, and writes under its token.
func (f *failover) hold(t testing.TB, db *sql.DB, key advisory.Key) {
	t.Helper()
	lock, err := advisory.Acquire(t.Context(), db, key, f.opts...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { lock.Release() })
	token, err := lock.Token(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := f.counter.write(t.Context(), db, token); err != nil {
		t.Fatal(err)
	}
	f.held, f.tokens = append(f.held, lock), append(f.tokens, token)
}

// wait waits for the lock of key, and writes under its token.
func (f *failover) wait(t testing.TB, db *sql.DB, key advisory.Key) {
	if err := advisory.WithLock(soon(t), db, key, func(ctx context.Context) error {
		f.mu.Lock()
		f.begun = append(f.begun, time.Now())
		f.mu.Unlock()
		token, err := advisory.Token(ctx)
		if err != nil {
			return err
		}
		for _, old := range f.tokens {
			if token <= old {
				t.Errorf("token %d after the failover, %d before", token, old)
			}
		}
		for range 20 {
			if err := f.counter.write(ctx, db, token); err != nil && !errors.Is(err, errStale) {
				return err
			}
		}
		return nil
	}, f.opts...); err != nil {
		t.Errorf("waiter: %v", err)
	}
}
