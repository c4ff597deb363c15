// Package advisorymigrate has one of many processes apply the migrations of
// github.com/golang-migrate/migrate/v4, under a lock of [github.com/pgadvisory/advisory].
//
//	err := advisorymigrate.Up(ctx, db, advisory.Name("migrations"), func() (*migrate.Migrate, error) {
//		return migrate.New("file://migrations", databaseURL)
//	})
//
// migrate has a lock of its own, but who waits for that waits inside a statement. CREATE INDEX
// CONCURRENTLY waits for whoever does, so that a migration with it and a waiter deadlock
// (golang-migrate/migrate#960), and migrate.New waits already. [Up] has the others wait before that,
// in a way that holds up no index.
package advisorymigrate

import (
	"context"
	"database/sql"
	"errors"

	"github.com/golang-migrate/migrate/v4"

	"github.com/pgadvisory/advisory"
)

// Up applies the migrations that are missing, in one process at a time: it calls open under the lock
// of key, then Up and Close of what that returns. That there is nothing to do is no error. It takes the
// options of [advisory.WithLock], and has its errors, migrate's, and open's.
//
// open must open a database of its own, as migrate.New does from a URL, because migrate's Close closes the
// pool that it works on, and db may be in use for more. db is for the lock.
//
// migrate takes no ctx. If ctx ends, or the lock is lost, Up has migrate stop after the migration that it
// is at, and returns the cause. migrate's own lock keeps others out until then.
func Up(ctx context.Context, db *sql.DB, key advisory.Key, open func() (*migrate.Migrate, error), opts ...advisory.Option) error {
	return advisory.WithLock(ctx, db, key, func(ctx context.Context) (err error) {
		m, err := open()
		if err != nil {
			return err
		}
		defer func() {
			source, database := m.Close()
			err = errors.Join(err, source, database)
		}()
		defer context.AfterFunc(ctx, func() {
			select {
			case m.GracefulStop <- true:
			default: // somebody else has stopped it
			}
		})()
		err = m.Up()
		switch {
		case errors.Is(err, migrate.ErrNoChange):
			err = nil
		case err == nil:
			err = context.Cause(ctx) // it may have stopped before the last one
		}
		return err
	}, opts...)
}
