// Package integration holds what needs a real PostgreSQL, a driver, a pooler or
// another library. Every test body runs over every driver and mode.
package integration

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"

	_ "github.com/jackc/pgx/v5/stdlib"
	_ "github.com/lib/pq"

	"github.com/pgadvisory/advisory"
	"github.com/pgadvisory/advisory/integration/internal/pgtest"
	"github.com/pgadvisory/advisory/integration/internal/testkit"
)

// server is the PostgreSQL that all tests share, but for those that restart or kill
// one of their own.
var server *pgtest.Server

func TestMain(m *testing.M) {
	// A process that a test starts from this binary has a main of its own.
	if child := os.Getenv(childEnv); child != "" {
		os.Exit(childMain(child))
	}
	os.Exit(testkit.Main(func(s *pgtest.Server) (int, error) {
		server = s
		defer func() { removeCommand() }()
		return m.Run(), nil
	}))
}

// removeCommand removes the command advisory, if a test has built it.
var removeCommand = func() {}

// childEnv names, in the environment of a child process, the function that it runs.
const childEnv = "ADVISORY_TEST_CHILD"

// children are the functions that a child process can run; the result is the exit
// status. Test files add theirs in init.
var children = map[string]func() int{}

func childMain(name string) int {
	f := children[name]
	if f == nil {
		fmt.Fprintf(os.Stderr, "no child function %q\n", name)
		return 2
	}
	return f()
}

// A driver is a database/sql driver in one of its modes.
type driver struct {
	name  string            // of the subtest
	sql   string            // for sql.Open
	param map[string]string // added to the DSN
}

var drivers = []driver{
	{name: "pq", sql: "postgres"},
	{name: "pgx", sql: "pgx"},
	{name: "pgx_simple", sql: "pgx", param: map[string]string{"default_query_exec_mode": "simple_protocol"}},
	{name: "pgx_exec", sql: "pgx", param: map[string]string{"default_query_exec_mode": "exec"}},
}

// eachDriver runs body over every driver and mode.
func eachDriver(t *testing.T, body func(t *testing.T, d driver)) {
	t.Helper()
	for _, d := range drivers {
		t.Run(d.name, func(t *testing.T) { body(t, d) })
	}
}

// bothDrivers runs body over the two drivers, in their default modes: for tests that
// take long and do not depend on the protocol.
func bothDrivers(t *testing.T, body func(t *testing.T, d driver)) {
	t.Helper()
	for _, d := range drivers[:2] {
		t.Run(d.name, func(t *testing.T) { body(t, d) })
	}
}

// open opens a pool on dsn, which stands for one process. It is closed with the test, and must
// not have complained in the server's log by then.
func (d driver) open(t testing.TB, dsn string) *sql.DB {
	t.Helper()
	db, err := d.openDB(watchLog(t, dsn))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { db.Close() })
	return db
}

func (d driver) openDB(dsn string) (*sql.DB, error) {
	for key, value := range d.param {
		var err error
		if dsn, err = pgtest.WithParam(dsn, key, value); err != nil {
			return nil, err
		}
	}
	return sql.Open(d.sql, dsn)
}

// inDatabase creates a database for the test alone and returns a DSN for it: for tests
// that other tests' transactions would hold up, or the other way round.
func inDatabase(t testing.TB) string {
	t.Helper()
	return testkit.Database(t, server)
}

// withParams returns dsn with connection parameters set: key, value, key, value...
func withParams(t testing.TB, dsn string, params ...string) string {
	t.Helper()
	for i := 0; i < len(params); i += 2 {
		var err error
		if dsn, err = pgtest.WithParam(dsn, params[i], params[i+1]); err != nil {
			t.Fatal(err)
		}
	}
	return dsn
}

// requireEnv lists, separated by commas, what must not be missing where the tests run.
const requireEnv = "ADVISORY_TEST_REQUIRE"

// require skips the test because what it needs is missing, as err says, or fails it if
// requireEnv lists that. It does nothing if err is nil.
func require(t testing.TB, what string, err error) {
	t.Helper()
	switch {
	case err == nil:
	case slices.Contains(strings.Split(os.Getenv(requireEnv), ","), what):
		t.Fatalf("%s is required (%s): %v", what, requireEnv, err)
	default:
		t.Skipf("needs %s: %v", what, err)
	}
}

// testKey is a key that no other test uses.
func testKey(t testing.TB) advisory.Key { return advisory.Name(t.Name()) }

var admin = sync.OnceValues(func() (*sql.DB, error) { return sql.Open("pgx", server.DSN()) })

// adminDB is a pool for looking at the shared server from outside of the test.
func adminDB(t testing.TB) *sql.DB {
	t.Helper()
	db, err := admin()
	if err != nil {
		t.Fatal(err)
	}
	return db
}

var (
	hold      = testkit.Hold
	waitFor   = testkit.WaitFor
	watchLog  = testkit.WatchLog
	allowLog  = testkit.AllowLog
	ownServer = testkit.OwnServer
)

// locks counts the rows of pg_locks for key.
func locks(ctx context.Context, db *sql.DB, key advisory.Key, granted bool) (n int, err error) {
	err = db.QueryRowContext(ctx, `
		SELECT count(*) FROM pg_locks
		WHERE locktype = 'advisory' AND granted = $1
		  AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
		  AND CASE objsubid WHEN 1 THEN (classid::bigint << 32 | objid::bigint)::text
		      ELSE (classid::bigint::bit(32)::int)::text || ', ' || (objid::bigint::bit(32)::int)::text END = $2`,
		granted, key.SQL()).Scan(&n)
	return n, err
}

// waitForWaiters waits until n wait for key in the server's queue.
func waitForWaiters(t testing.TB, db *sql.DB, key advisory.Key, n int) {
	t.Helper()
	waitFor(t, fmt.Sprintf("%d wait for %v", n, key), func() (bool, error) {
		got, err := locks(context.Background(), db, key, false)
		if err == nil && got < n {
			err = fmt.Errorf("%d wait", got)
		}
		return got >= n, err
	})
}

// wantFree fails the test unless nobody holds or waits for key before long.
func wantFree(t testing.TB, db *sql.DB, key advisory.Key) {
	t.Helper()
	waitFor(t, fmt.Sprintf("%v is free", key), func() (bool, error) {
		granted, err1 := locks(context.Background(), db, key, true)
		waiting, err2 := locks(context.Background(), db, key, false)
		if err := errors.Join(err1, err2); err != nil {
			return false, err
		}
		if granted+waiting > 0 {
			return false, fmt.Errorf("%d hold it, %d wait", granted, waiting)
		}
		return true, nil
	})
}
