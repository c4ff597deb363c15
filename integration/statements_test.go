package integration

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"regexp"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/pgadvisory/advisory"
	"github.com/pgadvisory/advisory/integration/internal/pgtest"
)

// What the statements are to the server: how many different ones, and how long each takes it.
// pg_stat_statements, which keeps 5,000 by default, tells.

// A statementLog is a server that keeps pg_stat_statements, and a database of it.
type statementLog struct {
	admin    *sql.DB
	database string
	dsn      string  // of the database
	other    *sql.DB // on the database, for those who hold the locks that are waited for
}

func newStatementLog(t testing.TB, settings ...pgtest.Option) statementLog {
	t.Helper()
	available, err := isTrue(adminDB(t), `SELECT EXISTS (SELECT FROM pg_available_extensions WHERE name = 'pg_stat_statements')`)
	if err == nil && !available {
		err = errors.New("the extension pg_stat_statements is not installed")
	}
	if server.Own() { // from the same programs as one for this test
		require(t, "pg_stat_statements", err)
	}
	s := ownServer(t, append(settings,
		pgtest.Setting("shared_preload_libraries", "pg_stat_statements"),
		pgtest.Setting("pg_stat_statements.track", "all"), // what a block executes, too
	)...)
	l := statementLog{database: "watched"}
	l.admin = openPlain(t, s.DSN())
	_, err = l.admin.ExecContext(t.Context(), "CREATE EXTENSION pg_stat_statements")
	require(t, "pg_stat_statements", err)
	setUp(t, l.admin, "CREATE DATABASE "+l.database)
	l.dsn = withParams(t, s.DSN(), "dbname", l.database)
	l.other = openPlain(t, l.dsn)
	return l
}

// openPlain opens a pool that does not use the package under test.
func openPlain(t testing.TB, dsn string) *sql.DB {
	t.Helper()
	db, err := sql.Open("pgx", dsn)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { db.Close() })
	return db
}

// An entry is one of pg_stat_statements.
type entry struct {
	query     string
	calls     int
	mean, min time.Duration
}

func (e entry) String() string {
	return fmt.Sprintf("%6d × %v (%v at least): %s", e.calls, e.mean, e.min, e.query)
}

func (l statementLog) reset(t testing.TB) {
	t.Helper()
	setUp(t, l.admin, "SELECT pg_stat_statements_reset()")
}

// entries are those of the database, but for what its other users send, most called first.
func (l statementLog) entries(t testing.TB) (entries []entry) {
	t.Helper()
	rows, err := l.admin.Query(`SELECT query, calls, mean_exec_time, min_exec_time FROM pg_stat_statements
		WHERE dbid = (SELECT oid FROM pg_database WHERE datname = $1) AND query NOT LIKE '%unnest%' ORDER BY calls DESC`, l.database)
	if err != nil {
		t.Fatal(err)
	}
	defer rows.Close()
	for rows.Next() {
		var e entry
		var mean, least float64 // milliseconds
		if err := rows.Scan(&e.query, &e.calls, &mean, &least); err != nil {
			t.Fatal(err)
		}
		e.mean, e.min = time.Duration(mean*1e6), time.Duration(least*1e6)
		entries = append(entries, e)
	}
	if err := rows.Err(); err != nil {
		t.Fatal(err)
	}
	return entries
}

func logEntries(t testing.TB, entries []entry) {
	for _, e := range entries {
		t.Log(e)
	}
}

// holdNumbered holds n locks, which it returns the keys of, on one session.
func (l statementLog) holdNumbered(t testing.TB, name string, n int) (keys []advisory.Key, release func()) {
	t.Helper()
	for i := range n {
		keys = append(keys, advisory.Name(fmt.Sprint(name, " ", i)))
	}
	ids := make([]string, n)
	for i, key := range keys {
		ids[i] = key.SQL()
	}
	conn, err := l.other.Conn(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := conn.ExecContext(t.Context(), `SELECT pg_advisory_lock(id) FROM unnest('{`+strings.Join(ids, ",")+`}'::bigint[]) AS id`); err != nil {
		t.Fatal(err)
	}
	release = sync.OnceFunc(func() {
		if _, err := conn.ExecContext(context.Background(), `SELECT pg_advisory_unlock_all() FROM unnest('{1}'::bigint[])`); err != nil {
			t.Error(err)
		}
		conn.Close()
	})
	t.Cleanup(release)
	return keys, release
}

// waitInVain waits for each of the keys, which another holds, in several goroutines.
func waitInVain(t testing.TB, db *sql.DB, w way, keys []advisory.Key) {
	t.Helper()
	var next atomic.Int64
	err := concurrently(8, 1, func(int) error {
		for {
			i := int(next.Add(1)) - 1
			if i >= len(keys) {
				return nil
			}
			if err := w.with(t.Context(), db, keys[i], noWork, advisory.Timeout(10*time.Millisecond)); !errors.Is(err, advisory.ErrNotAcquired) {
				return fmt.Errorf("%s: %v, want ErrNotAcquired", w.name, err)
			}
		}
	})
	if err != nil {
		t.Fatal(err)
	}
}

// However many names there are, they do not push others' statements out of pg_stat_statements.
func TestWaitsForManyNamesAreFewStatements(t *testing.T) {
	t.Parallel()
	const names, batch, most = 10_000, 250, 4
	l := newStatementLog(t)
	next, waited := 0, 0
	l.reset(t)
	// What a call sends beside its wait: tries, unlocks, and the question for the holder's name.
	beside := regexp.MustCompile(`^SELECT (WHERE |pg_catalog\.pg_advisory_unlock|COALESCE\(l\.pid)`)
	bothDrivers(t, func(t *testing.T, d driver) {
		db := d.open(t, l.dsn)
		db.SetMaxIdleConns(16)
		for range names / 2 / batch { // half of the names with each driver
			keys, release := l.holdNumbered(t, fmt.Sprint(t.Name(), next), batch)
			waitInVain(t, db, withLock, keys)
			release()
			next += batch
		}
		waits, ofWaits := 0, 0
		entries := l.entries(t)
		for _, e := range entries {
			if strings.HasPrefix(e.query, "DO $advisory$") {
				waits += e.calls
			}
			if !beside.MatchString(e.query) {
				ofWaits++
			}
		}
		t.Logf("%d names, %d waits, %d entries, %d of them of waits", next, waits, len(entries), ofWaits)
		if ofWaits > most {
			t.Errorf("%d entries of waits for %d names, want %d at most", ofWaits, next, most)
		}
		// On a busy machine a Timeout may be over before the wait has begun.
		if waits-waited < names/32 {
			t.Errorf("%d waits, too few to show anything", waits-waited)
		}
		waited = waits
		if t.Failed() {
			logEntries(t, entries[:min(len(entries), 20)])
		}
	})
}

// The same for every way to take a lock.
func TestNamesDoNotMakeStatements(t *testing.T) {
	t.Parallel()
	const names, most = 100, 25
	l := newStatementLog(t)
	keys, _ := l.holdNumbered(t, t.Name(), names)
	bothDrivers(t, func(t *testing.T, d driver) {
		db := d.open(t, l.dsn)
		db.SetMaxIdleConns(16)
		eachWay(t, ways, func(t *testing.T, w way) {
			l.reset(t)
			for _, shared := range []bool{false, true} {
				w.shared = shared
				waitInVain(t, db, w, keys)
			}
			entries := l.entries(t)
			t.Logf("%d entries", len(entries))
			if len(entries) > most {
				t.Errorf("%d entries for %d names, want %d at most", len(entries), names, most)
				logEntries(t, entries[:most])
			}
		})
	})
}

// A heartbeat does not cost the server the more the more locks there are, of whatever program.
func TestHeartbeatCostsTheSameWhateverIsHeld(t *testing.T) {
	t.Parallel()
	const (
		processes = 8
		heartbeat = 20 * time.Millisecond
		times     = 300
		most      = 2
	)
	l := newStatementLog(t, pgtest.Setting("max_locks_per_transaction", "128"))
	bothDrivers(t, func(t *testing.T, d driver) {
		allowLog(t, clientGone, brokenOff) // where holdAgain loses a lock
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		var g errgroup.Group
		for i := range processes {
			db, key := d.open(t, l.dsn), advisory.Name(fmt.Sprint(t.Name(), " holder ", i))
			g.Go(func() error { return holdAgain(ctx, db, key, heartbeat) })
		}
		with10, with9000 := l.heartbeat(t, 10, times), l.heartbeat(t, 9000, times)
		if with9000 > most*with10 {
			t.Errorf("a heartbeat costs %v with 9,000 locks, and %v with 10", with9000, with10)
		}
		cancel()
		if err := g.Wait(); err != nil && !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
	})
}

// holdAgain holds a lock until ctx ends. A machine that is busy may lose a lock with such a
// heartbeat. There is another one then.
func holdAgain(ctx context.Context, db *sql.DB, key advisory.Key, heartbeat time.Duration) error {
	for ctx.Err() == nil {
		lock, err := advisory.Acquire(ctx, db, key, advisory.Heartbeat(heartbeat))
		if err != nil {
			return err
		}
		<-lock.Context().Done()
		if err := lock.Release(); err != nil && !errors.Is(err, advisory.ErrLost) {
			return err
		}
	}
	return nil
}

// heartbeat returns what a heartbeat costs when so many locks are held. The least time of
// many is the statement's own, without what else the machine does.
func (l *statementLog) heartbeat(t *testing.T, locks, times int) time.Duration {
	t.Helper()
	_, release := l.holdNumbered(t, t.Name(), locks)
	defer release()
	l.reset(t)
	var beat entry
	waitFor(t, fmt.Sprintf("%d heartbeats are sent", times), func() (bool, error) {
		for _, e := range l.entries(t) {
			if strings.Contains(e.query, "pg_is_in_recovery") && e.calls > beat.calls {
				beat = e
			}
		}
		return beat.calls >= times, nil
	})
	t.Logf("with %d locks: %v", locks, beat)
	return beat.min
}
