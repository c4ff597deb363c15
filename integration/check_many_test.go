package integration

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/pgadvisory/advisory"
	"github.com/pgadvisory/advisory/integration/internal/pgtest"
)

// Programs call Check when they start, and many start at a time.

func TestTwoChecksOfAPoolOfTwo(t *testing.T) {
	t.Parallel()
	const rounds, limit = 5, 30 * time.Second // those who waited for each other would do so for ever
	bothDrivers(t, func(t *testing.T, d driver) {
		for range rounds {
			db := d.open(t, server.DSN())
			db.SetMaxOpenConns(2)
			ctx, cancel := context.WithTimeout(t.Context(), limit)
			if err := concurrently(2, 1, func(int) error { return advisory.Check(ctx, db) }); err != nil {
				t.Error(err)
			}
			cancel()
			wantClean(t, db)
			db.Close()
		}
	})
}

// Each of the pools may have more connections than the pooler has for all of them.
func TestChecksShareTheConnectionsOfAPooler(t *testing.T) {
	t.Parallel()
	const pools, limit = 6, 10 * time.Second
	s := ownServer(t)
	pooler, err := s.Pooler(t.Context(), pgtest.Session, pgtest.PoolSize(8))
	require(t, "pgbouncer", err)
	bothDrivers(t, func(t *testing.T, d driver) {
		ctx, cancel := context.WithTimeout(t.Context(), 2*limit)
		defer cancel()
		var g errgroup.Group
		began := time.Now()
		for range pools {
			db := d.open(t, pooler.DSN())
			g.Go(func() error {
				// A program that has been told that all is well goes on, and keeps its connections.
				return advisory.Check(ctx, db)
			})
		}
		if err := g.Wait(); err != nil {
			t.Error(err)
		}
		took := time.Since(began)
		t.Logf("%d checks took %v", pools, took.Round(time.Millisecond))
		if took > limit {
			t.Errorf("%d checks took %v, want %v at most", pools, took, limit)
		}
	})
	wantNoLocks(t, s)
}

// roleRestrictions are what an administrator may take from a role, and what Check says.
var roleRestrictions = []struct {
	name       string
	statements []string
	says       string
}{
	{"language", []string{"REVOKE USAGE ON LANGUAGE plpgsql FROM PUBLIC"}, "plpgsql"},
	{"lock", []string{"REVOKE EXECUTE ON FUNCTION pg_catalog.pg_advisory_lock(bigint) FROM PUBLIC"}, "permission denied for function pg_advisory_lock"},
	{"try", []string{"REVOKE EXECUTE ON FUNCTION pg_catalog.pg_try_advisory_lock(bigint) FROM PUBLIC"}, "permission denied for function pg_try_advisory_lock"},
	{"both", []string{
		"REVOKE EXECUTE ON FUNCTION pg_catalog.pg_advisory_lock(bigint) FROM PUBLIC",
		"REVOKE EXECUTE ON FUNCTION pg_catalog.pg_try_advisory_lock(bigint) FROM PUBLIC",
	}, "permission denied for function pg_"},
}

func TestCheckFindsWhatARoleMayNot(t *testing.T) {
	t.Parallel()
	for _, r := range roleRestrictions {
		t.Run(r.name, func(t *testing.T) {
			allowLog(t, "ERROR:  permission denied for ")
			database, role := hardenedDatabase(t, strings.Join(r.statements, "; "))
			bothDrivers(t, func(t *testing.T, d driver) {
				dsn := withParams(t, server.DSN(), "dbname", database, "role", role)
				for _, limit := range []int{0, 2} {
					db := d.open(t, dsn)
					db.SetMaxOpenConns(limit)
					err := advisory.Check(soon(t), db)
					if err == nil || !strings.Contains(err.Error(), r.says) {
						t.Errorf("pool of %d: Check says %v, and should say %q", limit, err, r.says)
					}
					waitFor(t, "nothing is locked", func() (bool, error) {
						return isTrue(adminDB(t), `SELECT count(*) = 0 FROM pg_locks WHERE locktype = 'advisory'
							AND database = (SELECT oid FROM pg_database WHERE datname = $1)`, database)
					})
					wantClean(t, db)
					db.Close()
				}
			})
		})
	}
}

// A Check costs a start no more than a few round trips.
func TestCheckSendsFewStatements(t *testing.T) {
	t.Parallel()
	const most = 16 + 4 // one cleans each of the four connections before it is closed
	eachDriver(t, func(t *testing.T, d driver) {
		for _, limit := range []int{0, 2, 10} {
			t.Run(fmt.Sprint("pool of ", limit), func(t *testing.T) {
				w := newWire(t)
				db := d.open(t, w.dsn)
				db.SetMaxOpenConns(limit)
				var sent []string
				// It begins anew where a connection takes a second to be made.
				for began := time.Now().Add(-time.Hour); time.Since(began) > time.Second; {
					began = time.Now()
					if err := advisory.Check(t.Context(), db); err != nil {
						t.Fatal(err)
					}
					sent = w.take()
					t.Logf("%d statements in %v", len(sent), time.Since(began).Round(time.Millisecond))
				}
				if len(sent) > most {
					t.Errorf("Check sends %d statements, want %d at most:\n%s", len(sent), most, strings.Join(sent, "\n"))
				}
			})
		}
	})
}
