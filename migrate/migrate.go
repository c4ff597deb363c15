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
	"os"

	"github.com/golang-migrate/migrate/v4"

	"github.com/pgadvisory/advisory"
)

// Up applies the migrations that are missing, in one process at a time. Under the lock of key, it calls
// open, applies the migrations of what that returns, and closes it. That there is nothing to do is no
// error. It takes the options of [advisory.WithLock], and has its errors, migrate's, and open's.
//
// open must open a database of its own, as migrate.New does from a URL, because migrate's Close closes the
// pool that it works on. db is for the lock.
//
// A migration takes no ctx. If ctx ends, or the lock is lost, Up returns the cause after the migration that
// is under way. Until then, migrate's own lock keeps others out.
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
		return eachStep(ctx, m)
	}, opts...)
}

// eachStep applies the missing migrations one by one, until ctx ends. (Migrate.GracefulStop is read by two
// goroutines of migrate's without a mutex.)
func eachStep(ctx context.Context, m *migrate.Migrate) error {
	for ctx.Err() == nil {
		err := m.Steps(1)
		if errors.Is(err, os.ErrNotExist) { // there are no more, or those that are applied are not among them
			if err = m.Up(); errors.Is(err, migrate.ErrNoChange) {
				return nil
			}
		}
		if err != nil {
			return err
		}
	}
	return context.Cause(ctx)
}
