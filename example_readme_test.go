package advisory_test

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"time"

	"github.com/pgadvisory/advisory"
)

// The snippets of the README.

func importAll(context.Context, *sql.DB) error { return nil }

func ExampleWithTxLock_update() {
	err := advisory.WithTxLock(ctx, db, advisory.Name("invoice-numbers"), func(ctx context.Context, tx *sql.Tx) error {
		_, err := tx.ExecContext(ctx, "UPDATE counter SET n = n + 1 WHERE name = 'invoice'")
		return err
	})
	fmt.Println(err)
	// Output: <nil>
}

func ExampleWithConnLock_index() {
	err := advisory.WithConnLock(ctx, db, advisory.Name("migrations"), func(ctx context.Context, conn *sql.Conn) error {
		_, err := conn.ExecContext(ctx, "CREATE INDEX CONCURRENTLY IF NOT EXISTS users_email ON users (email)")
		return err
	})
	fmt.Println(err)
	// Output: <nil>
}

func ExampleAcquire_release() {
	run := func() error {
		lock, err := advisory.Acquire(ctx, db, advisory.Name("import"), advisory.Timeout(5*time.Second))
		if err != nil {
			return err
		}
		err = importAll(lock.Context(), db)
		return errors.Join(err, lock.Release()) // ErrLost if the lock was not held to the end
	}
	fmt.Println(run())
	// Output: <nil>
}

func ExampleWithLock_skip() {
	sweep := func(context.Context) error { fmt.Println("sweeping"); return nil }
	sweepOnce := func() error {
		err := advisory.WithLock(ctx, db, advisory.Name("sweep-tokens"), sweep, advisory.NoWait())
		if errors.Is(err, advisory.ErrHeld) {
			return nil // another process sweeps
		}
		return err
	}
	fmt.Println(sweepOnce())
	// Output:
	// sweeping
	// <nil>
}
