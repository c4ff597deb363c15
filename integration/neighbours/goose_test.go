package neighbours_test

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"
	"testing"
	"testing/fstest"

	"github.com/pressly/goose/v3"
	"github.com/pressly/goose/v3/lock"

	"github.com/pgadvisory/advisory"
)

var _ lock.SessionLocker = advisory.NewSessionLocker(advisory.Key{})

var gooseKey = advisory.Name("goose test")

func newGoose(db *sql.DB, migrations fs.FS) (*goose.Provider, error) {
	return goose.NewProvider(goose.DialectPostgres, db, migrations,
		goose.WithSessionLocker(advisory.NewSessionLocker(gooseKey)))
}

func init() {
	children["goose"] = func() error {
		db, err := sql.Open(os.Getenv("TEST_DRIVER"), os.Getenv("TEST_DSN"))
		if err != nil {
			return err
		}
		defer db.Close()
		provider, err := newGoose(db, sub("testdata/goose"))
		if err != nil {
			return err
		}
		results, err := provider.Up(context.Background())
		fmt.Println(len(results))
		return err
	}
}

// Four processes migrate at a time. One applies all the migrations while the others wait
// in the server's queue: where a blocking waiter would be in a deadlock with CREATE INDEX
// CONCURRENTLY.
func TestGooseProcesses(t *testing.T) {
	bothDrivers(t, func(t *testing.T, d driver) {
		allowLog(t, "goose_db_version") // goose makes its table, and may do so in several processes at once
		dsn := database(t)
		db := d.open(t, dsn)
		applied := map[string]int{} // number of migrations: processes
		for _, n := range fourProcesses(t, db, gooseKey, childEnv+"=goose", "TEST_DRIVER="+d.sql, "TEST_DSN="+dsn) {
			applied[n]++
		}
		if applied["3"] != 1 || applied["0"] != 3 {
			t.Errorf("migrations applied: processes = %v, want 3 by one of 4", applied)
		}
		var versions string
		if err := db.QueryRow("SELECT string_agg(version_id::text, ' ' ORDER BY id) FROM goose_db_version").Scan(&versions); err != nil || versions != "0 1 2 3" {
			t.Errorf("versions %s; %v", versions, err)
		}
		wantMigrated(t, db)
		waitUntilFree(t, db, gooseKey)
	})
}

// The session that migrates dies in the middle of a migration.
func TestGooseSessionDies(t *testing.T) {
	bothDrivers(t, func(t *testing.T, d driver) {
		dsn := database(t)
		db := d.open(t, dsn)
		openGate := shutGate(t, db)
		provider, err := newGoose(db, fstest.MapFS{
			"1_first.sql": {Data: []byte("-- +goose Up\nCREATE TABLE first (n int);")},
			"2_gate.sql":  {Data: []byte("-- +goose NO TRANSACTION\n-- +goose Up\nINSERT INTO gate VALUES (1);")},
		})
		if err != nil {
			t.Fatal(err)
		}
		up := make(chan error, 1)
		go func() {
			_, err := provider.Up(context.Background())
			up <- err
		}()
		waitFor(t, "the second migration is under way", func() (waits bool, err error) {
			err = db.QueryRow("SELECT exists (SELECT FROM pg_locks WHERE relation = 'gate'::regclass AND NOT granted)").Scan(&waits)
			return waits, err
		})
		terminate(t, db, holder(t, db, gooseKey))

		err = <-up
		var partial *goose.PartialError
		if !errors.As(err, &partial) || len(partial.Applied) != 1 || partial.Failed.Source.Version != 2 {
			t.Errorf("want goose's PartialError for migration 2, got %v", err)
		}
		if !errors.Is(err, advisory.ErrLost) {
			t.Errorf("want ErrLost, got %v", err)
		}

		openGate()
		wantApplied(t, provider, 1)
		waitUntilFree(t, db, gooseKey)
	})
}

// The session that waits for its turn dies.
func TestGooseWaiterDies(t *testing.T) {
	bothDrivers(t, func(t *testing.T, d driver) {
		dsn := database(t)
		db := d.open(t, dsn)
		provider, err := newGoose(db, sub("testdata/goose"))
		if err != nil {
			t.Fatal(err)
		}
		release := hold(t, db, gooseKey)
		up := make(chan error, 1)
		go func() {
			_, err := provider.Up(context.Background())
			up <- err
		}()
		terminate(t, db, waitForWaiters(t, db, gooseKey, 1)[0])
		if err := <-up; err == nil || !strings.Contains(err.Error(), "advisory: acquire ") || !strings.Contains(err.Error(), gooseKey.SQL()) {
			t.Errorf("want the error of SessionLock, got %v", err)
		}

		release()
		wantApplied(t, provider, 3)
		wantMigrated(t, db)
		waitUntilFree(t, db, gooseKey)
	})
}

func wantApplied(t *testing.T, provider *goose.Provider, want int) {
	t.Helper()
	results, err := provider.Up(t.Context())
	if err != nil || len(results) != want {
		t.Errorf("the next run applied %d migrations, want %d; %v", len(results), want, err)
	}
}
