package neighbours_test

import (
	"context"
	"database/sql"
	"errors"
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
	"github.com/pgadvisory/advisory/integration/neighbours"
)

var migrateKey = advisory.Name("migrations") // that of Migrate

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
		return neighbours.Migrate(context.Background(), db, os.Getenv("TEST_URL"), sub("testdata/migrate"))
	}
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

// The situation that Migrate is for, without it: while one process creates the index, one
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
	files, err := iofs.New(migrations, ".")
	if err != nil {
		return err
	}
	m, err := migrate.NewWithSourceInstance("iofs", files, dbURL)
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
			if err := neighbours.Migrate(t.Context(), db, dbURL, sub("testdata/migrate")); err != nil {
				t.Fatal(err)
			}
		}
		wantMigrated(t, db)
		err := neighbours.Migrate(t.Context(), db, dbURL, fstest.MapFS{"1_other.up.sql": {}})
		if !errors.Is(err, os.ErrNotExist) { // version 3 is applied, and not among these
			t.Errorf("want migrate's error, got %v", err)
		}
		waitUntilFree(t, db, migrateKey)
	})
}
