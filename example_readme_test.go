package advisory_test

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"log"
	"log/slog"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/pgadvisory/advisory"
)

// The snippets of the README.

func runDueJobs(context.Context, *sql.DB) error { return nil }
func importAll(context.Context, *sql.DB) error  { return nil }

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

// A leader that releases its lock on SIGTERM, and exits with status 0.
func ExampleLead_shutdown() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	err := advisory.Lead(ctx, db, advisory.Name("scheduler"), func(ctx context.Context) error {
		for {
			if err := runDueJobs(ctx, db); err != nil && ctx.Err() == nil {
				slog.Warn("due jobs", "error", err) // the next round tries again
			}
			select {
			case <-time.After(time.Minute):
			case <-ctx.Done():
				return ctx.Err() // a shutdown; or the lock is lost, and Lead campaigns again
			}
		}
	})
	if err != nil && ctx.Err() == nil {
		log.Fatal(err)
	}
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
