package integration

import (
	"context"
	"database/sql"
	"testing"

	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/jackc/pgx/v5/stdlib"

	"github.com/pgadvisory/advisory"
)

// Where database/sql stands on a pgxpool, closing a connection gives a sound session back
// to that pool. Discarded ones hold no lock all the same.
func TestDiscardedSessionsOfAPgxpoolHoldNoLock(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	pool, err := pgxpool.New(ctx, watchLog(t, server.DSN()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(pool.Close)
	db := stdlib.OpenDBFromPool(pool)
	t.Cleanup(func() { db.Close() })

	t.Run("fn that commits WithTxLock's transaction", func(t *testing.T) {
		key := testKey(t)
		err := advisory.WithTxLock(ctx, db, key, func(_ context.Context, tx *sql.Tx) error { return tx.Commit() },
			advisory.TxOptions(&sql.TxOptions{Isolation: sql.LevelRepeatableRead}))
		if err == nil {
			t.Error("no error")
		}
		wantFree(t, adminDB(t), key)
	})

	t.Run("ctx that ends about when the lock is granted", func(t *testing.T) {
		key := testKey(t)
		for range 200 {
			ctx, cancel := context.WithCancel(ctx)
			go cancel()
			_ = advisory.WithLock(ctx, db, key, func(context.Context) error { return nil })
		}
		wantFree(t, adminDB(t), key)
	})
}

// fn may leave anything open on its conn, and panic: the lock is released, and the panic
// goes on its way.
func TestWhatFnLeavesOpenOnItsConnHoldsNoLock(t *testing.T) {
	t.Parallel()
	eachDriver(t, func(t *testing.T, d driver) {
		t.Parallel()
		for name, fn := range map[string]func(ctx context.Context, conn *sql.Conn) error{
			"a transaction": func(_ context.Context, conn *sql.Conn) error {
				_, err := conn.BeginTx(context.Background(), nil)
				return err
			},
			"a failed transaction": func(_ context.Context, conn *sql.Conn) error {
				tx, err := conn.BeginTx(context.Background(), nil)
				if err != nil {
					return err
				}
				_, err = tx.Exec("SELECT 1/0")
				return err
			},
			"a transaction, and panics": func(_ context.Context, conn *sql.Conn) error {
				if _, err := conn.BeginTx(context.Background(), nil); err != nil {
					return err
				}
				panic("fn")
			},
			"rows": func(_ context.Context, conn *sql.Conn) error {
				_, err := conn.QueryContext(context.Background(), "SELECT generate_series(1, 100000)") //nolint:rowserrcheck // the point
				return err
			},
		} {
			t.Run(name, func(t *testing.T) {
				t.Parallel()
				// What fn has asked for itself: of the rows, the server learns that nobody wants them.
				allowLog(t, "ERROR:  division by zero", "STATEMENT:  SELECT generate_series")
				allowLog(t, "ERROR:  current transaction is aborted") // the unlock, in what fn has left
				db, key := d.open(t, server.DSN()), testKey(t)
				func() {
					defer func() {
						if r := recover(); r != nil && r != "fn" {
							t.Errorf("panic %v", r)
						}
					}()
					if err := advisory.WithConnLock(t.Context(), db, key, fn); err == nil {
						t.Error("no error")
					}
				}()
				wantFree(t, adminDB(t), key)
			})
		}
	})
}
