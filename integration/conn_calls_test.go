package integration

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/pgadvisory/advisory"
)

// What callers may do with a conn that is theirs, or lent to them, and should not.

func newConn(t testing.TB, db *sql.DB) *sql.Conn {
	t.Helper()
	conn, err := db.Conn(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

// execOn executes statements, each of which must succeed.
func execOn(t testing.TB, q querier, statements ...string) {
	t.Helper()
	for _, s := range statements {
		if _, err := q.ExecContext(t.Context(), s); err != nil {
			t.Errorf("%s: %v", s, err)
		}
	}
}

// wantHeld fails the test unless the key is held once.
func wantHeld(t testing.TB, key advisory.Key) {
	t.Helper()
	if n, err := locks(t.Context(), adminDB(t), key, true); n != 1 || err != nil {
		t.Errorf("%d hold %v, want one (%v)", n, key, err)
	}
}

// A session-level lock in a transaction outlives its rollback, and a wait in one holds a snapshot for
// as long as it lasts.
func TestAcquireConnInATransactionIsRefused(t *testing.T) {
	t.Parallel()
	bothDrivers(t, func(t *testing.T, d driver) {
		db := d.open(t, server.DSN())
		for _, contended := range []bool{false, true} {
			for _, begin := range []string{"BeginTx", "BEGIN", "BEGIN ISOLATION LEVEL REPEATABLE READ"} {
				for name, opts := range someOptions {
					t.Run(fmt.Sprintf("contended %t %s %s", contended, begin, name), func(t *testing.T) {
						err := acquireConnInATransaction(t, db, contended, begin, opts)
						if err == nil || !strings.Contains(err.Error(), "transaction") {
							t.Errorf("error %v, want one that says transaction", err)
						}
						if errors.Is(err, advisory.ErrNotAcquired) && name == "waiting" {
							t.Errorf("error %v matches ErrNotAcquired", err)
						}
					})
				}
			}
		}
		wantClean(t, db)
	})
}

// acquireConnInATransaction calls AcquireConn in a transaction, and returns its error. It
// fails the test unless the transaction goes on.
func acquireConnInATransaction(t *testing.T, db *sql.DB, contended bool, begin string, opts []advisory.Option) error {
	t.Helper()
	key := testKey(t)
	if contended {
		hold(t, adminDB(t), key)
	}
	conn := newConn(t, db)
	q, commit := beginOn(t, conn, begin)
	execOn(t, q, "CREATE TEMPORARY TABLE work (n int) ON COMMIT DROP", "INSERT INTO work VALUES (1)")

	result := advisory.AcquireConn(soon(t), conn, key, opts...)
	if !contended {
		if n, err := locks(t.Context(), adminDB(t), key, true); n != 0 || err != nil {
			t.Errorf("%d hold the lock (%v)", n, err)
		}
	}
	// The transaction is the same, and goes on.
	execOn(t, q, "UPDATE work SET n = n + 1")
	if err := commit(); err != nil {
		t.Errorf("COMMIT: %v", err)
	}
	if !contended { // and afterwards conn is good for a lock
		if err := advisory.AcquireConn(soon(t), conn, key, opts...); err != nil {
			t.Errorf("after COMMIT: %v", err)
		} else if err := advisory.ReleaseConn(soon(t), conn, key); err != nil {
			t.Errorf("after COMMIT: %v", err)
		}
	}
	wantCleanSession(t, conn)
	conn.Close()
	return result
}

// beginOn begins a transaction on conn by BeginTx, or by a statement.
func beginOn(t testing.TB, conn *sql.Conn, begin string) (q querier, commit func() error) {
	t.Helper()
	if begin == "BeginTx" {
		tx, err := conn.BeginTx(t.Context(), nil)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { tx.Rollback() })
		return tx, tx.Commit
	}
	execOn(t, conn, begin)
	return conn, func() error {
		_, err := conn.ExecContext(t.Context(), "COMMIT")
		return err
	}
}

// The server would count two locks, and each ReleaseConn release one.
func TestAcquireConnTwiceIsAnError(t *testing.T) {
	t.Parallel()
	bothDrivers(t, func(t *testing.T, d driver) {
		db := d.open(t, server.DSN())
		for name, opts := range someOptions {
			for _, waited := range []bool{false, true} {
				t.Run(fmt.Sprint(name, " waited ", waited), func(t *testing.T) {
					testAcquireConnTwice(t, db, waited && name != "NoWait", opts)
				})
			}
		}
		wantClean(t, db)
	})
}

// testAcquireConnTwice takes the lock at once, or after a wait, and then once more.
func testAcquireConnTwice(t *testing.T, db *sql.DB, waited bool, opts []advisory.Option) {
	key, another := testKey(t), advisory.Name(t.Name()+" another")
	conn := newConn(t, db)
	if waited {
		acquireConnWaiting(t, conn, key, opts)
	} else if err := advisory.AcquireConn(soon(t), conn, key, opts...); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := advisory.AcquireConn(soon(t), conn, key, opts...); !errors.Is(err, advisory.ErrReentrant) {
			t.Errorf("the second time: %v, want ErrReentrant", err)
		}
		wantHeld(t, key)
	}
	if err := advisory.AcquireConn(soon(t), conn, another, opts...); err != nil {
		t.Errorf("another key: %v", err)
	}
	if err := advisory.ReleaseConn(t.Context(), conn, key); err != nil {
		t.Errorf("ReleaseConn: %v", err)
	}
	wantFree(t, adminDB(t), key)
	wantHeld(t, another)
	if err := advisory.ReleaseConn(t.Context(), conn, another); err != nil {
		t.Errorf("ReleaseConn of the other: %v", err)
	}
	wantCleanSession(t, conn)
	conn.Close()
}

// acquireConnWaiting takes the lock of key, for which it has to wait.
func acquireConnWaiting(t *testing.T, conn *sql.Conn, key advisory.Key, opts []advisory.Option) {
	t.Helper()
	release := hold(t, adminDB(t), key)
	done := make(chan error, 1)
	go func() { done <- advisory.AcquireConn(soon(t), conn, key, opts...) }()
	waitForWaiters(t, adminDB(t), key, 1)
	release()
	if err := await(t, "AcquireConn returns", done); err != nil {
		t.Fatal(err)
	}
}

// The server would warn of it.
func TestReleaseConnOfWhatIsNotHeld(t *testing.T) {
	t.Parallel()
	bothDrivers(t, func(t *testing.T, d driver) {
		db := d.open(t, server.DSN())
		conn := newConn(t, db)
		key, other, elsewhere := testKey(t), advisory.Name(t.Name()+" other"), advisory.Name(t.Name()+" elsewhere")
		shared := advisory.Name(t.Name() + " shared")
		pid := 0
		if err := conn.QueryRowContext(t.Context(), "SELECT pg_backend_pid()").Scan(&pid); err != nil {
			t.Fatal(err)
		}
		hold(t, adminDB(t), elsewhere)
		if err := advisory.AcquireConn(t.Context(), conn, other); err != nil {
			t.Fatal(err)
		}
		if err := advisory.AcquireConn(t.Context(), conn, shared, advisory.Shared()); err != nil {
			t.Fatal(err)
		}
		for name, release := range map[string]func() error{
			"never held":           func() error { return advisory.ReleaseConn(t.Context(), conn, key) },
			"held by another":      func() error { return advisory.ReleaseConn(t.Context(), conn, elsewhere) },
			"shared, not held":     func() error { return advisory.ReleaseConn(t.Context(), conn, key, advisory.Shared()) },
			"shared, as exclusive": func() error { return advisory.ReleaseConn(t.Context(), conn, shared) },
			"exclusive, as shared": func() error { return advisory.ReleaseConn(t.Context(), conn, other, advisory.Shared()) },
		} {
			if err := release(); err == nil {
				t.Errorf("%s: no error", name)
			}
			var now int
			if err := conn.QueryRowContext(t.Context(), "SELECT pg_backend_pid()").Scan(&now); err != nil || now != pid {
				t.Fatalf("%s: conn is not usable any more, or another session: %v", name, err)
			}
			for _, k := range []advisory.Key{other, shared, elsewhere} {
				wantHeld(t, k)
			}
		}
		if err := errors.Join(advisory.ReleaseConn(t.Context(), conn, other), advisory.ReleaseConn(t.Context(), conn, shared, advisory.Shared())); err != nil {
			t.Errorf("ReleaseConn of what is held: %v", err)
		}
		if err := advisory.ReleaseConn(t.Context(), conn, other); err == nil {
			t.Error("ReleaseConn once more: no error")
		}
		wantCleanSession(t, conn)
		conn.Close()
		wantClean(t, db)
	})
}

// A leaving is what fn of WithConnLock may leave behind, and what the error then says.
type leaving struct {
	name, says string
	leave      func(t testing.TB, ctx context.Context, conn *sql.Conn) error
	stays      bool // database/sql counts the connection until the rows are closed, whoever is done with it
}

var leavings = []leaving{
	{name: "rows", says: "rows", leave: func(t testing.TB, ctx context.Context, conn *sql.Conn) error {
		return leaveRows(t, ctx, conn, 1, 0)
	}},
	{name: "many rows", says: "rows", leave: func(t testing.TB, ctx context.Context, conn *sql.Conn) error {
		return leaveRows(t, ctx, conn, 100_000, 0)
	}},
	{name: "rows, some read", says: "rows", leave: func(t testing.TB, ctx context.Context, conn *sql.Conn) error {
		return leaveRows(t, ctx, conn, 100_000, 3)
	}},
	{name: "rows, another ctx", says: "rows", stays: true, leave: func(t testing.TB, _ context.Context, conn *sql.Conn) error {
		return leaveRows(t, context.Background(), conn, 1, 0)
	}},
	{name: "rows, some read, another ctx", says: "rows", stays: true, leave: func(t testing.TB, _ context.Context, conn *sql.Conn) error {
		return leaveRows(t, context.Background(), conn, 100_000, 3)
	}},
	{name: "closed conn", says: "close", leave: func(_ testing.TB, _ context.Context, conn *sql.Conn) error { return conn.Close() }},
}

// leaveRows reads some of n rows, and leaves the others until the test ends.
func leaveRows(t testing.TB, ctx context.Context, conn *sql.Conn, n, read int) error {
	rows, err := conn.QueryContext(ctx, fmt.Sprintf("SELECT n, repeat('x', 100) FROM generate_series(1, %d) AS n", n))
	if err != nil {
		return err
	}
	t.Cleanup(func() { rows.Close() })
	for range read {
		rows.Next()
	}
	return rows.Err()
}

func TestWhatFnLeavesOnItsConnIsAnErrorThatSaysSo(t *testing.T) {
	t.Parallel()
	allowLog(t, "STATEMENT:  SELECT n, repeat('x', 100)", clientGone) // the connection ends while the server sends them
	bothDrivers(t, func(t *testing.T, d driver) {
		for _, l := range leavings {
			for _, limit := range []int{0, 1} {
				if l.stays && limit > 0 {
					continue
				}
				for _, timeout := range []bool{false, true} {
					t.Run(fmt.Sprintf("%s, pool of %d, HolderTimeout %t", l.name, limit, timeout), func(t *testing.T) {
						var opts []advisory.Option
						if timeout {
							opts = append(opts, advisory.HolderTimeout(20*time.Second))
						}
						l.test(t, d, limit, opts)
					})
				}
			}
		}
	})
}

// test has fn leave it, on a connection of a pool of at most limit connections.
func (l leaving) test(t *testing.T, d driver, limit int, opts []advisory.Option) {
	db := d.open(t, server.DSN())
	db.SetMaxOpenConns(limit)
	key := testKey(t)
	began := time.Now()
	err := advisory.WithConnLock(soon(t), db, key, func(ctx context.Context, conn *sql.Conn) error {
		return l.leave(t, ctx, conn)
	}, opts...)
	if err == nil || !strings.Contains(err.Error(), l.says) || errors.Is(err, advisory.ErrLost) || errors.Is(err, advisory.ErrNotAcquired) {
		t.Errorf("error %v, want one that says %q and is not ErrLost", err, l.says)
	}
	wantFree(t, adminDB(t), key)
	if err := withConnLock.with(soon(t), db, key, noWork); err != nil {
		t.Errorf("the next one: %v", err)
	}
	if took := time.Since(began); took > 5*time.Second {
		t.Errorf("all of it took %v", took)
	}
	if !l.stays {
		wantClean(t, db)
	}
}
