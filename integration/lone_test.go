package integration

import (
	"context"
	"database/sql"
	sqldriver "database/sql/driver"
	"slices"
	"strings"
	"testing"

	"github.com/pgadvisory/advisory"
)

// prepared returns which of a lone lock's statements the only session of db has prepared.
func prepared(t *testing.T, db *sql.DB) (statements []string) {
	t.Helper()
	rows, err := db.QueryContext(t.Context(), "SELECT statement FROM pg_prepared_statements ORDER BY statement DESC")
	if err != nil {
		t.Fatal(err)
	}
	defer rows.Close()
	for rows.Next() {
		var s string
		if err := rows.Scan(&s); err != nil {
			t.Fatal(err)
		}
		if i := strings.Index(s, "pg_catalog.pg_try_"); i >= 0 {
			statements = append(statements, strings.TrimSuffix(s[i:], " END"))
		} else if i := strings.Index(s, "pg_catalog.pg_advisory_"); i >= 0 {
			statements = append(statements, s[i:])
		}
	}
	if err := rows.Err(); err != nil {
		t.Fatal(err)
	}
	return statements
}

// lone takes and releases a lock on db, which has one connection.
func lone(t *testing.T, db *sql.DB, key advisory.Key, opts ...advisory.Option) {
	t.Helper()
	db.SetMaxOpenConns(1)
	if err := advisory.WithLock(t.Context(), db, key, func(context.Context) error {
		wantHeld(t, key)
		return nil
	}, opts...); err != nil {
		t.Error(err)
	}
	wantFree(t, adminDB(t), key)
}

// pgx keeps the statements of a lone lock in the cache that it has for all of the program's. Other
// drivers, and other modes of pgx, prepare nothing.
func TestALoneLockIsPreparedWhereTheDriverCaches(t *testing.T) {
	t.Parallel()
	eachDriver(t, func(t *testing.T, d driver) {
		t.Parallel()
		caches := d.name == "pgx"
		db := d.open(t, watchLog(t, server.DSN()))
		lone(t, db, testKey(t))
		lone(t, db, testKey(t), advisory.Shared())
		lone(t, db, advisory.Pair(-7, 42))
		want := []string{
			"pg_catalog.pg_try_advisory_lock_shared($1)", "pg_catalog.pg_try_advisory_lock($1, $2)", "pg_catalog.pg_try_advisory_lock($1)",
			"pg_catalog.pg_advisory_unlock_shared($1)", "pg_catalog.pg_advisory_unlock($1, $2)", "pg_catalog.pg_advisory_unlock($1)",
		}
		if !caches {
			want = nil
		}
		got := prepared(t, db)
		slices.Sort(got)
		slices.Sort(want)
		if !slices.Equal(got, want) {
			t.Errorf("prepared: %q, want %q", got, want)
		}
	})
}

// A program, or a pooler, may have the session forget what is prepared on it.
func TestALoneLockAfterTheStatementsWereForgotten(t *testing.T) {
	t.Parallel()
	eachDriver(t, func(t *testing.T, d driver) {
		t.Parallel()
		allowLog(t, `ERROR:  prepared statement "stmtcache_`) // of which pgx is told
		for _, forget := range []string{"DISCARD ALL", "DEALLOCATE ALL"} {
			db, key := d.open(t, server.DSN()), testKey(t)
			for range 3 {
				lone(t, db, key)
				if _, err := db.ExecContext(t.Context(), forget); err != nil {
					t.Fatal(err)
				}
			}
			lone(t, db, key)
			wantClean(t, db)
		}
	})
}

// A wrapper that hands out what it wraps, as otelsql's does, is seen through. Behind another, the key
// is in the statement's text.
func TestALoneLockBehindWrappers(t *testing.T) {
	t.Parallel()
	for name, wrap := range map[string]func(*testing.T, sqldriver.Connector) *sql.DB{
		"otelsql": func(t *testing.T, c sqldriver.Connector) *sql.DB {
			db, _ := openOtelsql(t, c)
			return db
		},
		"another": func(_ *testing.T, c sqldriver.Connector) *sql.DB { return sql.OpenDB(opaque{c}) },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			db := wrap(t, drivers[1].connector(t, server.DSN()))
			t.Cleanup(func() { _ = db.Close() })
			lone(t, db, testKey(t))
			if got, want := len(prepared(t, db)) > 0, name == "otelsql"; got != want {
				t.Errorf("prepared: %t, want %t", got, want)
			}
		})
	}
}

// An opaque connector makes connections as those of sqlmw, which do not hand out what they wrap.
type opaque struct{ sqldriver.Connector }

func (c opaque) Connect(ctx context.Context) (sqldriver.Conn, error) {
	conn, err := c.Connector.Connect(ctx)
	return opaqueConn{conn}, err
}

type opaqueConn struct{ conn sqldriver.Conn }

func (c opaqueConn) Prepare(query string) (sqldriver.Stmt, error) { return c.conn.Prepare(query) }
func (c opaqueConn) Close() error                                 { return c.conn.Close() }
func (c opaqueConn) Begin() (sqldriver.Tx, error)                 { return nil, sqldriver.ErrSkip }

func (c opaqueConn) ExecContext(ctx context.Context, query string, args []sqldriver.NamedValue) (sqldriver.Result, error) {
	return c.conn.(sqldriver.ExecerContext).ExecContext(ctx, query, args)
}

func (c opaqueConn) QueryContext(ctx context.Context, query string, args []sqldriver.NamedValue) (sqldriver.Rows, error) {
	return c.conn.(sqldriver.QueryerContext).QueryContext(ctx, query, args)
}
