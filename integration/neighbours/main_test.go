package neighbours_test

import (
	"bytes"
	"context"
	"database/sql"
	"embed"
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"os"
	"os/exec"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	_ "github.com/jackc/pgx/v5/stdlib"
	_ "github.com/lib/pq"

	"github.com/pgadvisory/advisory"
	"github.com/pgadvisory/advisory/integration/internal/pgtest"
)

var server *pgtest.Server

func TestMain(m *testing.M) {
	run := func() error { return runTests(m) }
	if child := children[os.Getenv(childEnv)]; child != nil {
		run = child
	}
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func runTests(m *testing.M) (err error) {
	if server, err = pgtest.Start(context.Background()); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, server.Stop()) }()
	if admin, err = sql.Open("pgx", server.DSN()); err != nil {
		return err
	}
	defer admin.Close()
	closeExamples, err := openExamples()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, closeExamples()) }()
	if code := m.Run(); code != 0 {
		return fmt.Errorf("exit status %d", code)
	}
	return nil
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

// inDatabase creates a database for the test alone and returns a DSN for it.
func inDatabase(t *testing.T) (dsn string) {
	t.Helper()
	dsn, drop, err := createDatabase()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := drop(); err != nil {
			t.Error(err)
		}
	})
	return dsn
}

// open opens a pool, which stands for one process. It is closed with the test.
func (d driver) open(t testing.TB, dsn string) *sql.DB {
	t.Helper()
	db, err := sql.Open(d.sql, dsn)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { db.Close() })
	return db
}

// admin is for creating databases.
var admin *sql.DB

var databases atomic.Int64

func createDatabase() (dsn string, drop func() error, err error) {
	name := fmt.Sprintf("neighbours_%d_%d", os.Getpid(), databases.Add(1))
	if _, err := admin.Exec("CREATE DATABASE " + name); err != nil {
		return "", nil, err
	}
	drop = func() error {
		_, err := admin.Exec("DROP DATABASE " + name + " WITH (FORCE)")
		return err
	}
	// In the path of a URL: lib/pq, given one there and another as a parameter, takes the
	// one that comes last in the alphabet.
	if u, err := url.Parse(server.DSN()); err == nil && u.Scheme != "" {
		u.Path = "/" + name
		return u.String(), drop, nil
	}
	dsn, err = pgtest.WithParam(server.DSN(), "dbname", name)
	return dsn, drop, err
}

// A process runs this binary's child function for the test.
type process struct {
	cmd            *exec.Cmd
	stdout, stderr bytes.Buffer
}

func startProcess(t *testing.T, child string, env ...string) *process {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	p := &process{cmd: exec.Command(exe)}
	p.cmd.Env = append(os.Environ(), append(env, childEnv+"="+child)...)
	p.cmd.Stdout, p.cmd.Stderr = &p.stdout, &p.stderr
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = p.cmd.Process.Kill() }) // of no effect once it has been waited for
	return p
}

// wait waits for the process and returns what it printed.
func (p *process) wait() (string, error) {
	if err := p.cmd.Wait(); err != nil {
		return "", fmt.Errorf("%w: %s", err, &p.stderr)
	}
	return strings.TrimSpace(p.stdout.String()), nil
}

// hold holds key without the package under test, until release is called.
func hold(t *testing.T, db *sql.DB, key advisory.Key) (release func()) {
	t.Helper()
	conn, err := db.Conn(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := conn.ExecContext(t.Context(), "SELECT pg_advisory_lock("+key.SQL()+")"); err != nil {
		t.Fatal(err)
	}
	release = sync.OnceFunc(func() {
		if _, err := conn.ExecContext(context.Background(), "SELECT pg_advisory_unlock("+key.SQL()+")"); err != nil {
			t.Error(err)
		}
		conn.Close()
	})
	t.Cleanup(release)
	return release
}

// waitFor waits until condition holds, and fails the test if that takes too long.
func waitFor(t testing.TB, what string, condition func() (bool, error)) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(2 * time.Millisecond) {
		ok, err := condition()
		if ok && err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("waited in vain until %s: %v", what, err)
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
