package advisorymigrate_test

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"errors"
	"fmt"
	"io"
	"log"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/fstest"

	"github.com/golang-migrate/migrate/v4"
	"github.com/golang-migrate/migrate/v4/database/stub"
	"github.com/golang-migrate/migrate/v4/source/iofs"

	"github.com/pgadvisory/advisory"
	advisorymigrate "github.com/pgadvisory/advisory/migrate"
)

var migrations = fstest.MapFS{
	"1_invoice.up.sql": {Data: []byte("CREATE TABLE invoice (id bigint)")},
	"2_number.up.sql":  {Data: []byte("CREATE INDEX CONCURRENTLY number ON invoice (id)")},
}

var key = advisory.Name("migrations")

// A server grants every lock but those that are taken, and writes down what happens.
type server struct {
	mu    sync.Mutex
	taken bool
	log   []string
}

func (s *server) write(what string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.log = append(s.log, what)
}

func (s *server) pool(tb testing.TB) *sql.DB {
	db := sql.OpenDB(s)
	tb.Cleanup(func() { db.Close() })
	return db
}

func (s *server) Driver() driver.Driver                        { return nil }
func (s *server) Connect(context.Context) (driver.Conn, error) { return conn{s}, nil }

type conn struct{ *server }

func (c conn) Prepare(string) (driver.Stmt, error) { return nil, driver.ErrSkip }
func (c conn) Begin() (driver.Tx, error)           { return nil, driver.ErrSkip }
func (c conn) Close() error                        { return nil }

func (c conn) ExecContext(_ context.Context, query string, _ []driver.NamedValue) (driver.Result, error) {
	switch {
	case strings.Contains(query, "pg_try_advisory_lock") && c.taken:
		return driver.RowsAffected(0), nil
	case strings.Contains(query, "pg_try_advisory_lock"):
		c.write("lock")
	case strings.Contains(query, "pg_advisory_unlock"):
		c.write("unlock")
	}
	return driver.RowsAffected(1), nil
}

// A database is migrate's stub of one, which writes down what happens to it.
type database struct {
	*stub.Stub
	*server
	runs func() error // is called with each migration
}

func (d *database) Run(migration io.Reader) error {
	if d.runs != nil {
		if err := d.runs(); err != nil {
			return err
		}
	}
	return d.Stub.Run(migration)
}

func (d *database) Close() error {
	d.write("close")
	return d.Stub.Close()
}

// opens returns a function for Up. runs is called with each migration.
func (s *server) opens(runs func() error) (d *database, open func() (*migrate.Migrate, error)) {
	d = &database{server: s, runs: runs}
	return d, func() (*migrate.Migrate, error) {
		s.write("open")
		if d.Stub == nil {
			instance, err := stub.WithInstance(nil, &stub.Config{})
			if err != nil {
				return nil, err
			}
			d.Stub = instance.(*stub.Stub)
		}
		files, err := iofs.New(migrations, ".")
		if err != nil {
			return nil, err
		}
		return migrate.NewWithInstance("iofs", files, "stub", d)
	}
}

func TestUpMigratesUnderTheLock(t *testing.T) {
	var s server
	d, open := s.opens(nil)
	for range 2 { // the second time, there is nothing to do
		if err := advisorymigrate.Up(t.Context(), s.pool(t), key, open); err != nil {
			t.Fatal(err)
		}
		if want := []string{"lock", "open", "close", "unlock"}; !slices.Equal(s.log, want) {
			t.Errorf("%q, want %q", s.log, want)
		}
		if d.CurrentVersion != 2 || d.IsDirty {
			t.Errorf("version %d, dirty: %t", d.CurrentVersion, d.IsDirty)
		}
		s.log = nil
	}
}

func TestUpDoesNothingWithoutTheLock(t *testing.T) {
	s := server{taken: true}
	_, open := s.opens(nil)
	if err := advisorymigrate.Up(t.Context(), s.pool(t), key, open, advisory.NoWait()); !errors.Is(err, advisory.ErrHeld) || len(s.log) > 0 {
		t.Errorf("%q; error %v, want ErrNotAcquired", s.log, err)
	}
}

func TestUpReturnsTheErrors(t *testing.T) {
	mine := errors.New("mine")
	var s server
	err := advisorymigrate.Up(t.Context(), s.pool(t), key, func() (*migrate.Migrate, error) { return nil, mine })
	if !errors.Is(err, mine) {
		t.Errorf("error %v, want that of open", err)
	}
	_, open := s.opens(func() error { return mine })
	if err := advisorymigrate.Up(t.Context(), s.pool(t), key, open); !errors.Is(err, mine) || errors.Is(err, migrate.ErrNoChange) {
		t.Errorf("error %v, want that of the migration", err)
	}
	if !slices.Equal(s.log, []string{"lock", "unlock", "lock", "open", "close", "unlock"}) {
		t.Errorf("%q", s.log)
	}
}

// The migration that is under way when ctx ends is the last.
func TestTheEndOfCtxStopsUpBetweenMigrations(t *testing.T) {
	var s server
	ctx, cancel := context.WithCancelCause(t.Context())
	why := errors.New("shutting down")
	d, open := s.opens(func() error { cancel(why); return nil })
	err := advisorymigrate.Up(ctx, s.pool(t), key, open)
	if !errors.Is(err, why) || d.CurrentVersion != 1 || d.IsDirty {
		t.Errorf("version %d, dirty: %t; error %v, want %v", d.CurrentVersion, d.IsDirty, err, why)
	}
	d.runs = nil
	if err := advisorymigrate.Up(t.Context(), s.pool(t), key, open); err != nil || d.CurrentVersion != 2 {
		t.Errorf("version %d; %v", d.CurrentVersion, err)
	}
}

func ExampleUp() {
	// In a program, db is what sql.Open returned, and the database is named by a URL:
	// migrate.NewWithSourceInstance("iofs", files, "pgx5://…").
	db := sql.OpenDB(&server{})
	err := advisorymigrate.Up(context.Background(), db, advisory.Name("migrations"), func() (*migrate.Migrate, error) {
		files, err := iofs.New(migrations, ".")
		if err != nil {
			return nil, err
		}
		return migrate.NewWithSourceInstance("iofs", files, "stub://")
	})
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println("migrated")
	// Output: migrated
}
