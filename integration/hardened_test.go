package integration

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/pgadvisory/advisory"
	"github.com/pgadvisory/advisory/integration/internal/testkit"
)

// A server need not let everybody use PL/pgSQL, in which the waits are written. Then they are made
// of tries, and that is said once.

// hardenings are the ways to take PL/pgSQL away, and what the server says then.
var hardenings = []struct{ name, statement, message string }{
	{"revoked", "REVOKE USAGE ON LANGUAGE plpgsql FROM PUBLIC", "permission denied for language plpgsql"},
	{"dropped", "DROP EXTENSION plpgsql", `language "plpgsql" does not exist`},
}

// hardenedDatabase returns the name of a database for the test alone in which statement has been
// executed, and a role that is not a superuser.
func hardenedDatabase(t testing.TB, statement string) (database, role string) {
	t.Helper()
	dsn := inDatabase(t)
	setUp(t, openPlain(t, dsn), statement)
	role = testkit.Unique("hardened")
	setUp(t, adminDB(t), "CREATE ROLE "+role)
	t.Cleanup(func() { setUp(t, adminDB(t), "DROP ROLE "+role) })
	return databaseOf(t, dsn), role
}

func TestWaitsWithoutPLpgSQLTryAgainAndAgain(t *testing.T) {
	t.Parallel()
	for _, h := range hardenings {
		t.Run(h.name, func(t *testing.T) {
			allowLog(t, "ERROR:  "+h.message)
			database, role := hardenedDatabase(t, h.statement)
			other := openPlain(t, withParams(t, server.DSN(), "dbname", database))
			bothDrivers(t, func(t *testing.T, d driver) {
				eachWay(t, queuers, func(t *testing.T, w way) {
					p := newHardenedPool(t, d, database, role)
					key := testKey(t)
					release := hold(t, other, key)
					tryAgainAndAgain(t, p, w, key, release)
					want := 1
					if w.name == acquireConn.name { // of which nobody knows the *sql.DB
						want = 3
					}
					p.wantTold(t, h.message, want)
					wantFree(t, other, key)
					wantClean(t, p.db)
				})
			})
		})
	}
}

// tryAgainAndAgain waits by w three times: until a Timeout, until the end of ctx, and until the
// other releases the lock.
func tryAgainAndAgain(t *testing.T, p *hardenedPool, w way, key advisory.Key, release func()) {
	t.Helper()
	const timeout = 200 * time.Millisecond
	began := time.Now()
	err := w.with(soon(t), p.db, key, noWork, p.log.option(), advisory.Timeout(timeout))
	if took := time.Since(began); !errors.Is(err, advisory.ErrNotAcquired) || took < timeout || took > timeout+2*time.Second {
		t.Errorf("%v after %v, want ErrNotAcquired after %v", err, took, timeout)
	}

	ctx, cancel := context.WithCancel(soon(t))
	defer cancel()
	var g errgroup.Group
	p.sent.take()
	g.Go(func() error { return w.with(ctx, p.db, key, noWork, p.log.option()) })
	p.waitForTries(t)
	cancel()
	if err := g.Wait(); !errors.Is(err, context.Canceled) {
		t.Errorf("%v, want context.Canceled", err)
	}

	worked := false
	p.sent.take()
	g = errgroup.Group{}
	g.Go(func() error {
		return w.with(soon(t), p.db, key, func(context.Context, querier) error { worked = true; return nil }, p.log.option())
	})
	p.waitForTries(t)
	release()
	if err := g.Wait(); err != nil || !worked {
		t.Errorf("after the release: %v, the work is done: %t", err, worked)
	}
}

// What is said of a pool is not said again, whatever is called.
func TestPoolWithoutPLpgSQLIsReportedOnce(t *testing.T) {
	t.Parallel()
	h := hardenings[0]
	allowLog(t, "ERROR:  "+h.message)
	database, role := hardenedDatabase(t, h.statement)
	other := openPlain(t, withParams(t, server.DSN(), "dbname", database))
	bothDrivers(t, func(t *testing.T, d driver) {
		key := testKey(t)
		release := hold(t, other, key)
		p := newHardenedPool(t, d, database, role)
		for range 2 {
			for _, w := range openers {
				err := w.with(soon(t), p.db, key, noWork, p.log.option(), advisory.Timeout(30*time.Millisecond))
				if !errors.Is(err, advisory.ErrNotAcquired) {
					t.Errorf("%s: %v, want ErrNotAcquired", w.name, err)
				}
			}
		}
		p.wantTold(t, h.message, 1)
		release()
		wantClean(t, p.db)
	})
}

// A hardenedPool belongs to a program that may not use PL/pgSQL.
type hardenedPool struct {
	db   *sql.DB
	app  string
	sent *wire
	log  *logbook
	from int64 // in the server's log
}

func newHardenedPool(t testing.TB, d driver, database, role string) *hardenedPool {
	t.Helper()
	p := &hardenedPool{app: appName(t), sent: newWire(t), log: newLogbook()}
	p.db = d.open(t, withParams(t, p.sent.dsn, "dbname", database, "role", role, "application_name", p.app))
	if super, err := isTrue(p.db, "SELECT rolsuper FROM pg_roles WHERE rolname = current_user"); super || err != nil {
		t.Fatalf("the program is a superuser: %t, %v", super, err)
	}
	if server.Own() {
		var err error
		if p.from, err = server.LogSize(); err != nil {
			t.Fatal(err)
		}
	}
	return p
}

// waitForTries waits until several tries have been sent, which only a wait that is made of tries
// does.
func (p *hardenedPool) waitForTries(t testing.TB) {
	t.Helper()
	const enough = 4
	tries := 0
	waitFor(t, fmt.Sprintf("it has tried %d times", enough), func() (bool, error) {
		for _, s := range p.sent.take() {
			if strings.Contains(s, "pg_try_advisory_") {
				tries++
			}
		}
		return tries >= enough, nil
	})
}

// wantTold fails the test unless the Logger and the server's log were told n times what the server
// said.
func (p *hardenedPool) wantTold(t testing.TB, message string, n int) {
	t.Helper()
	if told := p.log.times("waits try again and again"); len(told) != n || len(p.log.times("")) != n {
		t.Errorf("the Logger was told %d times, and %d of them that waits try again and again, want %d", len(p.log.times("")), len(told), n)
	}
	if !server.Own() {
		return
	}
	log, err := server.LogSince(p.from)
	if err != nil {
		t.Fatal(err)
	}
	if errs, all := strings.Count(log, "] "+p.app+" ERROR:  "+message), strings.Count(log, "] "+p.app+" ERROR:"); errs != n || all != n {
		t.Errorf("the server's log has %d errors, %d of them that %s, want %d", all, errs, message, n)
	}
}
