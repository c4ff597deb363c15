package integration

import (
	"database/sql"
	"errors"
	"os/exec"
	"testing"

	"github.com/pgadvisory/advisory/integration/internal/pgtest"
)

// Behind a transaction pooler, each transaction may be on another session of the server:
// the transaction-scoped locks are the ones that work there.
func TestTransactionLocksWorkBehindTransactionPooler(t *testing.T) {
	t.Parallel()
	const goroutines, increments, sessions = 16, 8, 5
	postgres := server
	if !postgres.Own() {
		postgres = ownServer(t)
	}
	pooler, err := postgres.Pooler(t.Context(), pgtest.Transaction, pgtest.PoolSize(sessions))
	if errors.Is(err, exec.ErrNotFound) {
		require(t, "pgbouncer", err)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := pooler.Stop(); err != nil {
			t.Error(err)
		}
	})
	direct := drivers[0].open(t, postgres.DSN())
	// Those that need no prepared statements.
	modes := []driver{
		{name: "pq", sql: "postgres"},
		{name: "pq_binary", sql: "postgres", param: map[string]string{"binary_parameters": "yes"}},
		{name: "pgx_simple", sql: "pgx", param: map[string]string{"default_query_exec_mode": "simple_protocol"}},
		{name: "pgx_exec", sql: "pgx", param: map[string]string{"default_query_exec_mode": "exec"}},
	}
	for _, d := range modes {
		t.Run(d.name, func(t *testing.T) {
			pools := []*sql.DB{d.open(t, pooler.DSN()), d.open(t, pooler.DSN())}
			eachWay(t, []way{withTxLock, acquireTx}, func(t *testing.T, w way) {
				key, c := testKey(t), newCounter(t, direct)
				err := concurrently(goroutines, increments, func(i int) error {
					return w.with(soon(t), pools[i%2], key, c.increment)
				})
				if err != nil {
					t.Error(err)
				}
				c.wantValue(t, direct, goroutines*increments)
				wantFree(t, direct, key)
			})
		})
	}
}
