package integration

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/pgadvisory/advisory"
	"github.com/pgadvisory/advisory/integration/internal/testkit"
)

// outline says what the tests compare of the locks of a database.
func outline(t testing.TB, q advisory.Querier) string {
	t.Helper()
	locks, err := advisory.Locks(t.Context(), q)
	if err != nil {
		t.Error(err)
	}
	var b strings.Builder
	for _, l := range locks {
		fmt.Fprintf(&b, "%v\n", l.Key)
		for _, h := range l.Holders {
			fmt.Fprintf(&b, "  held: %s\n", brief(h))
		}
		for _, h := range l.Waiters {
			fmt.Fprintf(&b, "  waits: %s\n", brief(h))
		}
	}
	return b.String()
}

func wantOutline(t testing.TB, q advisory.Querier, want ...string) {
	t.Helper()
	if got, want := outline(t, q), strings.Join(want, ""); got != want {
		t.Errorf("got\n%swant\n%s", got, want)
	}
}

func (s session) holds(shared bool) string { return "  held: " + s.brief(true, shared) + "\n" }
func (s session) waits(shared bool) string { return "  waits: " + s.brief(false, shared) + "\n" }

// Locks of other programs, which have no names.
func TestLocksListsEveryLockOfTheDatabase(t *testing.T) {
	t.Parallel()
	eachDriver(t, func(t *testing.T, d driver) {
		t.Parallel()
		dsn := inDatabase(t)
		db := d.open(t, dsn)
		wantOutline(t, db)

		key, id, pair := testKey(t), advisory.ID(-1), advisory.Pair(7, -42)
		a, b := newSession(t, d, dsn, "a"), newSession(t, d, dsn, "b")
		late, early := newSession(t, d, dsn, "late"), newSession(t, d, dsn, "early")
		newSession(t, d, inDatabase(t), "elsewhere").take(t, advisory.ID(5), "")
		a.take(t, key, "_shared")
		b.take(t, key, "_shared")
		b.take(t, pair, "")
		early.wait(t, key, "")
		late.wait(t, key, "_shared")
		if _, err := a.conn.ExecContext(t.Context(), "BEGIN; SELECT pg_advisory_xact_lock(-1)"); err != nil {
			t.Fatal(err)
		}
		unnamed := func(k advisory.Key) string { return "bigint " + k.SQL() + "\n" }
		ofKey := unnamed(key) + a.holds(true) + b.holds(true) + early.waits(false) + late.waits(true)
		ofID := unnamed(id) + a.holds(false)
		bigints := ofID + ofKey
		if strings.HasPrefix(key.SQL(), "-") { // the order is that of the numbers
			bigints = ofKey + ofID
		}
		ofPair := "pair (7, -42)\n" + b.holds(false)
		conn, err := db.Conn(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		tx, err := db.BeginTx(t.Context(), nil)
		if err != nil {
			t.Fatal(err)
		}
		defer tx.Rollback()
		wantOutline(t, db, bigints, ofPair)
		wantOutline(t, conn, bigints, ofPair)
		wantOutline(t, tx, bigints, ofPair)
		if locks, err := advisory.Locks(t.Context(), tx); err != nil || locks[len(locks)-1].Key != pair {
			t.Errorf("the last of %v is not %v; %v", locks, pair, err)
		}
	})
}

// A name is known when a heartbeat has told it, or as long as somebody waits.
func TestLocksKnowsNamesThatStatementsTell(t *testing.T) {
	t.Parallel()
	bothDrivers(t, func(t *testing.T, d driver) {
		t.Parallel()
		for _, n := range named {
			t.Run(n.name, func(t *testing.T) {
				t.Parallel()
				dsn, key := inDatabase(t), advisory.Name(n.name)
				cut := strings.HasSuffix(n.name, "/tail")
				db, another := d.open(t, dsn), d.open(t, dsn)
				knows := func(holders, waiters int) {
					t.Helper()
					waitFor(t, fmt.Sprintf("%v is known, with %d holders and %d waiters", key, holders, waiters), func() (bool, error) {
						locks, err := advisory.Locks(t.Context(), another)
						if err != nil || len(locks) != 1 || locks[0].Key.SQL() != key.SQL() {
							return false, fmt.Errorf("%v, %v", locks, err)
						}
						l := locks[0]
						if (l.Key == key) == cut || len(l.Holders) != holders || len(l.Waiters) != waiters {
							return false, fmt.Errorf("%v", l)
						}
						return true, nil
					})
				}
				err := advisory.WithLock(soon(t), db, key, func(context.Context) error {
					time.Sleep(2 * shortHeartbeat)
					knows(1, 0)
					return nil
				}, advisory.Heartbeat(shortHeartbeat))
				if err != nil {
					t.Error(err)
				}
				release := hold(t, db, key)
				var g errgroup.Group
				g.Go(func() error { return withLock.with(soon(t), another, key, noWork) })
				knows(1, 1)
				release()
				if err := g.Wait(); err != nil {
					t.Error(err)
				}
				if locks, err := advisory.Locks(t.Context(), db); err != nil || len(locks) > 0 {
					t.Errorf("%v, %v", locks, err)
				}
			})
		}
	})
}

// A comment that somebody else has written gives no lock a wrong name.
func TestLocksBelievesNoCommentThatDoesNotFit(t *testing.T) {
	t.Parallel()
	eachDriver(t, func(t *testing.T, d driver) {
		dsn := inDatabase(t)
		liar := newSession(t, d, dsn, "liar")
		key := advisory.Name("its name")
		if _, err := liar.conn.ExecContext(t.Context(), "/* advisory: other, its%20name, "+key.SQL()+" */ SELECT pg_advisory_lock(42), pg_advisory_lock("+key.SQL()+")"); err != nil {
			t.Fatal(err)
		}
		wantOutline(t, d.open(t, dsn), "bigint 42\n"+liar.holds(false), key.String()+"\n"+liar.holds(false))
	})
}

// A role that may not see the sessions of others sees their locks, without names.
func TestLocksForAnUnprivilegedRole(t *testing.T) {
	t.Parallel()
	bothDrivers(t, func(t *testing.T, d driver) {
		dsn := inDatabase(t)
		role := testkit.Unique("advisory_nobody")
		setUp(t, adminDB(t), "CREATE ROLE "+role)
		t.Cleanup(func() { setUp(t, adminDB(t), "DROP ROLE "+role) })
		holder, key := newSession(t, d, dsn, "holder"), advisory.Name("a")
		if _, err := holder.conn.ExecContext(t.Context(), "/* advisory: a */ SELECT pg_advisory_lock("+key.SQL()+")"); err != nil {
			t.Fatal(err)
		}
		wantOutline(t, d.open(t, dsn), key.String()+"\n"+holder.holds(false))
		nobody := newSession(t, d, watchLog(t, dsn), "nobody")
		if _, err := nobody.conn.ExecContext(t.Context(), "SET ROLE "+role); err != nil {
			t.Fatal(err)
		}
		wantOutline(t, nobody.conn, "bigint "+key.SQL()+"\n"+holder.holds(false))
	})
}
