// Package neighbours_test has the package run with the libraries next to it, on a real PostgreSQL:
// goose, golang-migrate (module migrate) and gocron (module gocron).
package neighbours_test

import (
	"bytes"
	"context"
	"database/sql"
	"embed"
	"errors"
	"fmt"
	"io/fs"
	"log"
	"os"
	"os/exec"
	"strings"
	"testing"

	_ "github.com/jackc/pgx/v5/stdlib"
	_ "github.com/lib/pq"

	"github.com/pgadvisory/advisory"
	"github.com/pgadvisory/advisory/integration/internal/pgtest"
	"github.com/pgadvisory/advisory/integration/internal/testkit"
)

var server *pgtest.Server

func TestMain(m *testing.M) {
	if child := children[os.Getenv(childEnv)]; child != nil {
		if err := child(); err != nil {
			log.Fatal(err)
		}
		return
	}
	os.Exit(testkit.Main(func(s *pgtest.Server) (int, error) {
		server = s
		dropExamples, err := openExamples()
		if err != nil {
			return 1, err
		}
		return m.Run(), dropExamples()
	}))
}

// childEnv names, in the environment of a process that a test starts, what it does.
const childEnv = "ADVISORY_TEST_CHILD"

var children = map[string]func() error{}

//go:embed testdata
var testdata embed.FS

func sub(dir string) fs.FS {
	fsys, err := fs.Sub(testdata, dir)
	if err != nil {
		panic(err)
	}
	return fsys
}

// A driver is a database driver, by its names.
type driver struct {
	sql     string // for sql.Open
	migrate string // the scheme of migrate's URL
}

var drivers = map[string]driver{
	"pq":  {"postgres", "postgres"},
	"pgx": {"pgx", "pgx5"},
}

// bothDrivers runs body over both drivers, at the same time.
func bothDrivers(t *testing.T, body func(t *testing.T, d driver)) {
	t.Parallel()
	for name, d := range drivers {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			body(t, d)
		})
	}
}

// open opens a pool, which stands for one process. It is closed with the test, and must not have
// complained in the server's log by then.
func (d driver) open(t testing.TB, dsn string) *sql.DB {
	t.Helper()
	db, err := sql.Open(d.sql, testkit.WatchLog(t, dsn))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { db.Close() })
	return db
}

// database creates a database for the test alone and returns a DSN for it. What the processes do
// that the test starts with this DSN is for the test to answer for.
func database(t testing.TB) (dsn string) {
	t.Helper()
	return testkit.WatchLog(t, testkit.Database(t, server))
}

var (
	allowLog = testkit.AllowLog
	hold     = testkit.Hold
	waitFor  = testkit.WaitFor
)

// fourProcesses starts four processes of this binary with env added to their environments,
// holds them up until all of them wait for key, and returns what they printed.
func fourProcesses(t *testing.T, db *sql.DB, key advisory.Key, env ...string) (printed []string) {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	release := hold(t, db, key)
	var processes [4]*exec.Cmd
	var stdout, stderr [4]bytes.Buffer
	for i := range processes {
		p := exec.Command(exe)
		p.Env = append(os.Environ(), env...)
		p.Stdout, p.Stderr = &stdout[i], &stderr[i]
		if err := p.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = p.Process.Kill() }) // of no effect once it has been waited for
		processes[i] = p
	}
	waitForWaiters(t, db, key, len(processes))
	release()
	for i, p := range processes {
		if err := p.Wait(); err != nil {
			t.Errorf("%v: %s", err, &stderr[i])
		}
		printed = append(printed, strings.TrimSpace(stdout[i].String()))
	}
	return printed
}

// shutGate creates a table, gate, that nobody can write to before open is called.
func shutGate(t *testing.T, db *sql.DB) (open func()) {
	t.Helper()
	if _, err := db.Exec("CREATE TABLE gate (n int)"); err != nil {
		t.Fatal(err)
	}
	tx, err := db.Begin()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = tx.Rollback() })
	if _, err := tx.Exec("LOCK TABLE gate"); err != nil {
		t.Fatal(err)
	}
	return func() {
		t.Helper()
		if err := tx.Rollback(); err != nil {
			t.Fatal(err)
		}
	}
}

// sessions returns the sessions that hold key (granted) or wait for it.
func sessions(ctx context.Context, db *sql.DB, key advisory.Key, granted bool) (pids []int, err error) {
	holders, err := advisory.Holders(ctx, db, key)
	for _, h := range holders {
		if h.Granted == granted {
			pids = append(pids, h.PID)
		}
	}
	return pids, err
}

func waitForWaiters(t testing.TB, db *sql.DB, key advisory.Key, n int) (pids []int) {
	t.Helper()
	waitFor(t, fmt.Sprintf("%d sessions wait for %v", n, key), func() (_ bool, err error) {
		pids, err = sessions(t.Context(), db, key, false)
		return len(pids) == n, err
	})
	return pids
}

func waitUntilFree(t testing.TB, db *sql.DB, key advisory.Key) {
	t.Helper()
	waitFor(t, fmt.Sprintf("%v is free", key), func() (bool, error) {
		pids, err := sessions(t.Context(), db, key, true)
		return len(pids) == 0, err
	})
}

// holder returns the session that holds key.
func holder(t testing.TB, db *sql.DB, key advisory.Key) int {
	t.Helper()
	pids, err := sessions(t.Context(), db, key, true)
	if err != nil || len(pids) != 1 {
		t.Fatalf("sessions %v hold %v, want one (%v)", pids, key, err)
	}
	return pids[0]
}

func terminate(t testing.TB, db *sql.DB, pid int) {
	t.Helper()
	allowLog(t, "FATAL:  terminating connection due to administrator command")
	var ok bool
	if err := db.QueryRowContext(t.Context(), "SELECT pg_terminate_backend($1)", pid).Scan(&ok); err != nil || !ok {
		t.Fatalf("terminate session %d: %t, %v", pid, ok, err)
	}
}

// wantMigrated fails the test unless the migrations in testdata have been applied once.
func wantMigrated(t testing.TB, db *sql.DB) {
	t.Helper()
	var rows int
	var named bool
	var index sql.NullBool
	err := errors.Join(
		db.QueryRow("SELECT count(*) FROM account").Scan(&rows),
		db.QueryRow("SELECT exists (SELECT FROM information_schema.columns WHERE table_name = 'account' AND column_name = 'name')").Scan(&named),
		db.QueryRow("SELECT (SELECT indisvalid AND indisready FROM pg_index WHERE indexrelid = to_regclass('account_email'))").Scan(&index),
	)
	if err != nil || rows != 1000 || !named || !index.Bool {
		t.Errorf("%d rows (want 1000), column name: %t, index valid: %v; %v", rows, named, index, err)
	}
}
