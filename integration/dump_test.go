package integration

import (
	"context"
	"fmt"
	"os/exec"
	"testing"
	"time"

	"github.com/pgadvisory/advisory"
	"github.com/pgadvisory/advisory/integration/internal/pgtest"
)

// pg_dump locks every table of its database, and pg_locks has them all, whatever database they are
// in. A heartbeat that looked there would take as long as that is large, for every holder at once.
func TestDumpOfAnotherDatabaseCostsNoLock(t *testing.T) {
	t.Parallel()
	const holders, tables, heartbeat = 200, 20_000, time.Second
	s := ownServer(t,
		pgtest.Setting("max_connections", "300"),
		pgtest.Setting("max_locks_per_transaction", "128"),
		pgtest.Setting("autovacuum", "off"), // which would look at all the tables
	)
	dump, err := s.Program("pg_dump")
	require(t, "pg_dump", err)
	admin := openPlain(t, s.DSN())
	setUp(t, admin, "CREATE DATABASE large")
	large := withParams(t, s.DSN(), "dbname", "large")
	const batch = 1000 // all in one transaction would be as many locks
	began := time.Now()
	for first := 0; first < tables; first += batch {
		setUp(t, openPlain(t, large), fmt.Sprintf(`DO $$BEGIN FOR i IN %d..%d LOOP
			EXECUTE 'CREATE TABLE table_' || i || ' (id int)'; END LOOP; END$$`, first, first+batch-1))
	}
	t.Logf("%d tables in %v", tables, time.Since(began))

	bothDrivers(t, func(t *testing.T, d driver) {
		var locks []*advisory.Lock
		for i := range holders {
			lock, err := advisory.Acquire(t.Context(), d.open(t, s.DSN()), advisory.Name(fmt.Sprint(t.Name(), i)), advisory.Heartbeat(heartbeat))
			if err != nil {
				t.Fatal(err)
			}
			locks = append(locks, lock)
		}
		began := time.Now()
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
		defer cancel()
		stop := mostLocks(t, s)
		out, err := exec.CommandContext(ctx, dump, "--schema-only", "--dbname", large, "--file", "/dev/null").CombinedOutput()
		if err != nil {
			t.Fatalf("pg_dump: %v\n%s", err, out)
		}
		took, most := time.Since(began), stop()
		t.Logf("pg_dump took %v; pg_locks had up to %d rows", took, most)
		if most < tables {
			t.Errorf("pg_locks had up to %d rows, too few to show anything", most)
		}
		lost := 0
		for _, lock := range locks {
			if err := lock.Release(); err != nil {
				if lost++; lost == 1 {
					t.Error(err)
				}
			}
		}
		if lost > 0 {
			t.Errorf("%d of %d locks were lost", lost, holders)
		}
	})
}

// mostLocks counts the locks that the server has at a time until stop is called.
func mostLocks(t testing.TB, s *pgtest.Server) (stop func() (most int)) {
	t.Helper()
	admin := openPlain(t, s.DSN())
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan int)
	go func() {
		most := 0
		tick := time.NewTicker(200 * time.Millisecond)
		defer tick.Stop()
		for {
			var n int
			if admin.QueryRowContext(ctx, "SELECT count(*) FROM pg_locks").Scan(&n) == nil {
				most = max(most, n)
			}
			select {
			case <-tick.C:
			case <-ctx.Done():
				done <- most
				return
			}
		}
	}()
	return func() int { cancel(); return <-done }
}
