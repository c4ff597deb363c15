package neighbours_test

import (
	"context"
	"database/sql"
	"errors"
	"io/fs"
	"net/url"
	"os"
	"strings"
	"testing"
	"testing/fstest"

	"github.com/golang-migrate/migrate/v4"
	_ "github.com/golang-migrate/migrate/v4/database/pgx/v5"
	_ "github.com/golang-migrate/migrate/v4/database/postgres"
	"github.com/golang-migrate/migrate/v4/source/iofs"

	"github.com/pgadvisory/advisory"
	advisorymigrate "github.com/pgadvisory/advisory/migrate"
)

var migrateKey = advisory.Name("migrations")

// migrateURL is dsn as migrate takes it.
func (d driver) migrateURL(t *testing.T, dsn string) string {
	t.Helper()
	u, err := url.Parse(dsn)
	if err != nil || u.Scheme == "" {
		t.Skipf("migrate needs a URL, and the server's DSN is none (%v)", err)
	}
	u.Scheme = d.migrate
	return u.String()
}

func init() {
	children["migrate"] = func() error {
		db, err := sql.Open(os.Getenv("TEST_DRIVER"), os.Getenv("TEST_DSN"))
		if err != nil {
			return err
		}
		defer db.Close()
		return up(context.Background(), db, os.Getenv("TEST_URL"), sub("testdata/migrate"))
	}
}

// up applies migrations as a program does.
func up(ctx context.Context, db *sql.DB, dbURL string, migrations fs.FS) error {
	return advisorymigrate.Up(ctx, db, migrateKey, func() (*migrate.Migrate, error) { return openMigrate(dbURL, migrations) })
}

func openMigrate(dbURL string, migrations fs.FS) (*migrate.Migrate, error) {
	files, err := iofs.New(migrations, ".")
	if err != nil {
		return nil, err
	}
	return migrate.NewWithSourceInstance("iofs", files, dbURL)
}

// Four processes migrate at a time, with CREATE INDEX CONCURRENTLY among the migrations.
func TestMigrateProcesses(t *testing.T) {
	bothDrivers(t, func(t *testing.T, d driver) {
		dsn := database(t)
		dbURL := d.migrateURL(t, dsn)
		db := d.open(t, dsn)
		fourProcesses(t, db, migrateKey, childEnv+"=migrate", "TEST_DRIVER="+d.sql, "TEST_DSN="+dsn, "TEST_URL="+dbURL)
		var version int
		var dirty bool
		if err := db.QueryRow("SELECT version, dirty FROM schema_migrations").Scan(&version, &dirty); err != nil || version != 3 || dirty {
			t.Errorf("version %d, dirty: %t; %v", version, dirty, err)
		}
		wantMigrated(t, db)
		waitUntilFree(t, db, migrateKey)
	})
}

// The situation that Up is for, without it: while one process creates the index, one
// other waits in migrate's own lock, and the server finds a deadlock. This shows that the
// test above would see one.
func TestMigrateAloneDeadlocks(t *testing.T) {
	bothDrivers(t, func(t *testing.T, d driver) {
		// migrate gives up, and leaves sessions that end with the database.
		allowLog(t, "ERROR:  deadlock detected", "FATAL:  terminating connection due to administrator command")
		dsn := database(t)
		dbURL := d.migrateURL(t, dsn)
		db := d.open(t, dsn)
		if _, err := db.Exec("CREATE TABLE account (email text)"); err != nil {
			t.Fatal(err)
		}
		migrations := fstest.MapFS{
			"1_gate.up.sql":  {Data: []byte("INSERT INTO gate VALUES (1);")},
			"2_index.up.sql": {Data: []byte("CREATE INDEX CONCURRENTLY account_email ON account (email);")},
		}
		// The first migration waits until the other process waits.
		openGate := shutGate(t, db)
		done := make(chan error, 2)
		for range cap(done) {
			go func() { done <- migrateAlone(dbURL, migrations) }()
		}
		waitFor(t, "one process migrates and the other waits", func() (ok bool, err error) {
			err = db.QueryRow(`SELECT exists (SELECT FROM pg_locks WHERE relation = 'gate'::regclass AND NOT granted)
				AND exists (SELECT FROM pg_locks WHERE locktype = 'advisory' AND NOT granted
					AND database = (SELECT oid FROM pg_database WHERE datname = current_database()))`).Scan(&ok)
			return ok, err
		})
		openGate()
		// The server picks which of the two it ends.
		if err := errors.Join(<-done, <-done); err == nil || !strings.Contains(err.Error(), "deadlock detected") {
			t.Errorf("want a deadlock, got %v", err)
		}
	})
}

func migrateAlone(dbURL string, migrations fstest.MapFS) error {
	m, err := openMigrate(dbURL, migrations)
	if err != nil {
		return err
	}
	defer m.Close()
	return m.Up()
}

// A second run finds nothing to do, and an error of migrate is the caller's.
func TestMigrateErrors(t *testing.T) {
	bothDrivers(t, func(t *testing.T, d driver) {
		dsn := database(t)
		dbURL := d.migrateURL(t, dsn)
		db := d.open(t, dsn)
		for range 2 {
			if err := up(t.Context(), db, dbURL, sub("testdata/migrate")); err != nil {
				t.Fatal(err)
			}
		}
		wantMigrated(t, db)
		err := up(t.Context(), db, dbURL, fstest.MapFS{"1_other.up.sql": {}})
		if !errors.Is(err, os.ErrNotExist) { // version 3 is applied, and not among these
			t.Errorf("want migrate's error, got %v", err)
		}
		waitUntilFree(t, db, migrateKey)
	})
}

// The end of ctx stops migrate between two migrations, and is the error.
func TestMigrateStopsAtTheEndOfCtx(t *testing.T) {
	bothDrivers(t, func(t *testing.T, d driver) {
		dsn := database(t)
		dbURL := d.migrateURL(t, dsn)
		db := d.open(t, dsn)
		openGate := shutGate(t, db)
		migrations := fstest.MapFS{
			"1_gate.up.sql":  {Data: []byte("INSERT INTO gate VALUES (1);")},
			"2_after.up.sql": {Data: []byte("INSERT INTO gate VALUES (2);")},
		}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- up(ctx, db, dbURL, migrations) }()
		waitFor(t, "the first migration is under way", func() (ok bool, err error) {
			err = db.QueryRow("SELECT exists (SELECT FROM pg_locks WHERE relation = 'gate'::regclass AND NOT granted)").Scan(&ok)
			return ok, err
		})
		cancel()
		openGate()
		if err := <-done; !errors.Is(err, context.Canceled) {
			t.Errorf("want context.Canceled, got %v", err)
		}
		rows := func() (n int) {
			if err := db.QueryRow("SELECT count(*) FROM gate").Scan(&n); err != nil {
				t.Error(err)
			}
			return n
		}
		if n := rows(); n != 1 {
			t.Errorf("%d migrations are applied, want one", n)
		}
		if err := up(t.Context(), db, dbURL, migrations); err != nil || rows() != 2 {
			t.Errorf("%d migrations are applied; %v", rows(), err)
		}
		waitUntilFree(t, db, migrateKey)
	})
}
