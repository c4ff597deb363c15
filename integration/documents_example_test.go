package integration

import (
	"context"
	"database/sql"
	"errors"
	"testing"

	"github.com/pgadvisory/advisory"
)

// The test with a real server in docs/testing.md.
func TestTwoPoolsAreTwoProcesses(t *testing.T) {
	ctx, dsn := t.Context(), inDatabase(t)
	bothDrivers(t, func(t *testing.T, d driver) {
		open := func(t *testing.T) *sql.DB { return d.open(t, dsn) }
		setUp(t, open(t), "CREATE TABLE IF NOT EXISTS api_token (expires_at timestamptz)")
		sweep := func(ctx context.Context, db *sql.DB) error {
			return advisory.WithLock(ctx, db, advisory.Name("sweep-tokens"), func(ctx context.Context) error {
				_, err := db.ExecContext(ctx, "DELETE FROM api_token WHERE expires_at < now()")
				return err
			}, advisory.NoWait())
		}

		here, there := open(t), open(t) // each by sql.Open
		lock, err := advisory.Acquire(ctx, here, advisory.Name("sweep-tokens"))
		if err != nil {
			t.Fatal(err)
		}
		if err := sweep(ctx, there); !errors.Is(err, advisory.ErrHeld) {
			t.Errorf("another holds the lock, and sweep returned %v", err)
		}
		if err := lock.Release(); err != nil {
			t.Fatal(err)
		}
		if err := sweep(ctx, there); err != nil {
			t.Error(err)
		}
	})
}
