package neighbours

import (
	"context"
	"database/sql"
	"errors"
	"io/fs"

	"github.com/golang-migrate/migrate/v4"
	"github.com/golang-migrate/migrate/v4/source/iofs"

	"github.com/pgadvisory/advisory"
)

// Migrate applies the migrations in fsys that are missing, while other processes that want
// to do the same wait in front of migrate instead of inside: there they would wait in
// pg_advisory_lock, and CREATE INDEX CONCURRENTLY waits for whoever does, which is a
// deadlock (golang-migrate/migrate#960).
//
// migrate opens a pool of its own at databaseURL, because its Close closes the pool that
// it works on, and the lock would go with that. Up takes no ctx: it goes on even if the lock
// is lost meanwhile. migrate's own lock then still keeps others out.
func Migrate(ctx context.Context, db *sql.DB, databaseURL string, fsys fs.FS) error {
	return advisory.WithLock(ctx, db, advisory.Name("migrations"), func(context.Context) error {
		files, err := iofs.New(fsys, ".")
		if err != nil {
			return err
		}
		m, err := migrate.NewWithSourceInstance("iofs", files, databaseURL)
		if err != nil {
			return err
		}
		defer m.Close()
		if err := m.Up(); !errors.Is(err, migrate.ErrNoChange) {
			return err
		}
		return nil
	})
}
