package advisory

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"errors"
	"io"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/DATA-DOG/go-sqlmock"
	"github.com/google/go-cmp/cmp"

	"github.com/pgadvisory/advisory/internal/pgsql"
	"github.com/pgadvisory/advisory/internal/session"
)

const (
	tryExposedQuery    = "SELECT pg_catalog.set_config('advisory.session', 'N', false), pg_catalog.set_config('idle_session_timeout', '60000', false), pg_catalog.set_config('idle_in_transaction_session_timeout', '60000', false) WHERE CASE WHEN pg_catalog.pg_is_in_recovery() THEN false ELSE pg_catalog.pg_try_advisory_lock(42) END"
	disarmExposedQuery = resetQuery + "RESET idle_in_transaction_session_timeout; "
)

func TestStatementsOfWithConnLock(t *testing.T) {
	t.Parallel()
	mock := func(t *testing.T, queries ...string) *sql.DB {
		db, mock := newMock(t)
		for _, q := range queries {
			mock.ExpectExec(q).WithoutArgs().WillReturnResult(sqlmock.NewResult(0, 1))
		}
		return db
	}
	const (
		check = "pg_catalog.set_config('client_connection_check_interval', CASE" +
			" WHEN pg_catalog.current_setting('client_connection_check_interval')::pg_catalog.interval OPERATOR(pg_catalog.>) '0'" +
			" AND pg_catalog.current_setting('client_connection_check_interval')::pg_catalog.interval OPERATOR(pg_catalog.<) '1s'" +
			" THEN pg_catalog.current_setting('client_connection_check_interval') ELSE '1s' END, false)"
		uncheck = "RESET client_connection_check_interval; "
		try     = "SELECT " + check + " WHERE CASE WHEN pg_catalog.pg_is_in_recovery() THEN false ELSE pg_catalog.pg_try_advisory_lock(42) END"
	)
	wantError(t, withConnLock(t.Context(), mock(t, try, pgsql.LeftOpen, uncheck+unlockExposedQuery)))
	wantError(t, withConnLock(t.Context(), mock(t,
		strings.ReplaceAll(try, "_lock(", "_lock_shared("), pgsql.LeftOpen,
		uncheck+strings.ReplaceAll(unlockExposedQuery, "pg_advisory_unlock(", "pg_advisory_unlock_shared("),
	), Shared()))
	db, srv := newServer(t)
	wantError(t, withConnLock(t.Context(), db, HolderTimeout(time.Minute)))
	if diff := cmp.Diff(on(1, "open", strings.Replace(tryExposedQuery, " WHERE", ", "+check+" WHERE", 1), pgsql.LeftOpen, disarmExposedQuery+uncheck+unlockExposedQuery), srv.raw); diff != "" {
		t.Errorf("with HolderTimeout (-want +got):\n%s", diff)
	}
	wantError(t, WithConnLock(t.Context(), mock(t, try, "CREATE TABLE t ()", pgsql.LeftOpen, uncheck+unlockExposedQuery), key,
		func(ctx context.Context, conn *sql.Conn) error {
			_, err := conn.ExecContext(ctx, "CREATE TABLE t ()")
			return err
		}))
}

func TestWithConnLockThatCannotBeArmedIsNotAcquired(t *testing.T) {
	t.Parallel()
	db, srv := newServer(t, fails(pgError("42704")))
	err := WithConnLock(t.Context(), db, key, func(context.Context, *sql.Conn) error {
		t.Error("fn runs")
		return nil
	}, HolderTimeout(time.Minute))
	wantError(t, err, pgError("42704"), "PostgreSQL 14")
	srv.want(t, on(1, "open", tryExposedQuery, disarmExposedQuery+freeQuery, "close")...)
}

func TestWaitsOfWithConnLockAreArmedWithHolderTimeout(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		db, srv := newServer(t, refused, refused, granted)
		wantError(t, withConnLock(t.Context(), db, HolderTimeout(time.Minute)))
		wait := commentedWait(pgsql.OnOwn, "", key.key, false, sliceMin, pgsql.Settings{IdleTimeout: time.Minute, Nonce: "N", Exposed: true})
		srv.want(t, on(1, "open", tryExposedQuery, wait, wait, disarmExposedQuery+unlockExposedQuery)...)
	})
}

// Rows that fn leaves open are found before its ctx ends, and closes them.
func TestRowsThatFnLeavesOpenEndTheSession(t *testing.T) {
	t.Parallel()
	for _, direct := range []bool{false, true} {
		db, srv := newServer(t)
		srv.direct = direct
		srv.leftOpen = errors.New("pq: there is already a query being processed on this connection")
		err := WithConnLock(t.Context(), db, key, func(ctx context.Context, _ *sql.Conn) error { return ctx.Err() })
		wantError(t, err, session.ErrLeftOpen, "advisory: release bigint 42: fn left rows or a transaction open on its conn")
		if errors.Is(err, ErrLost) {
			t.Errorf("%v matches ErrLost", err)
		}
		srv.want(t, on(1, "open", tryQuery, "close")...)
	}
}

// In real time, because database/sql waits for its own locks.
func TestWhatFnLeavesOpenOnItsConnDoesNotHoldUpTheRelease(t *testing.T) {
	t.Parallel()
	died := io.ErrUnexpectedEOF
	leftOpen := []any{"advisory: release bigint 42: fn left rows or a transaction open on its conn"}
	var wg sync.WaitGroup
	defer wg.Wait()
	for _, test := range []struct {
		name  string
		reply reply // to the release
		panic bool
		rows  bool // that is what is left, and not a transaction
		wants []any
	}{
		{"a transaction", reply{rows: 2}, false, false, leftOpen},
		{"a transaction that has failed", fails(pgError("25P02")), false, false, leftOpen},
		{"a transaction, and the session is dead", fails(died), false, false, []any{ErrLost, died}},
		{"a transaction, with a panic", reply{rows: 2}, true, false, nil},
		{"a transaction, with a panic, and the session is dead", fails(died), true, false, nil},
		{"rows, and the session is dead", fails(died), false, true, []any{ErrLost, died}},
	} {
		wg.Go(func() {
			db, srv := newServer(t)
			srv.rows = func(int, []driver.NamedValue) ([][]driver.Value, error) {
				return [][]driver.Value{{int64(1)}, {int64(2)}}, nil
			}
			srv.script = script(when(unlockExposedQuery, test.reply))
			var rows *sql.Rows
			var tx *sql.Tx
			start := time.Now()
			err := func() error {
				defer func() {
					if r := recover(); (r == "mine") != test.panic {
						t.Errorf("%s: recovered %v", test.name, r)
					}
				}()
				return WithConnLock(t.Context(), db, key, func(_ context.Context, conn *sql.Conn) (err error) {
					if test.rows {
						rows, err = conn.QueryContext(context.Background(), "SELECT $1", 1)
					} else {
						tx, err = conn.BeginTx(context.Background(), nil)
					}
					if test.panic {
						panic("mine")
					}
					return err
				})
			}()
			wantError(t, err, test.wants...)
			if d := time.Since(start); d > abandonAfter+time.Second {
				t.Errorf("%s: after %v", test.name, d)
			}
			if lines := srv.lines(); lines[len(lines)-1] != "1 close" || lines[3] != "1 "+unlockExposedQuery {
				t.Errorf("%s: log: %q", test.name, lines)
			}
			// database/sql's part can end now.
			if test.rows {
				err = errors.Join(rows.Err(), rows.Close())
			} else if err = tx.Rollback(); errors.Is(err, driver.ErrBadConn) {
				err = nil
			}
			if err != nil {
				t.Errorf("%s: %v", test.name, err)
			}
		})
	}
}

func TestWithConnLocksConnectionIsDiscardedIfFnClosedOrLostIt(t *testing.T) {
	t.Parallel()
	db, srv := newServer(t)
	err := WithConnLock(t.Context(), db, key, func(_ context.Context, conn *sql.Conn) error {
		return conn.Raw(func(any) error { return driver.ErrBadConn })
	})
	wantError(t, err, driver.ErrBadConn, ErrLost, sql.ErrConnDone)
	srv.want(t, on(1, "open", tryQuery, "close")...)

	// Closed, it lies in the pool, among others.
	db, srv = newServer(t)
	db.SetMaxIdleConns(3)
	var log logBuffer
	err = WithConnLock(t.Context(), db, key, func(_ context.Context, conn *sql.Conn) error {
		for range 2 {
			defer borrow(t, db).Close()
		}
		return conn.Close()
	}, log.option())
	wantError(t, err, session.ErrConnClosed, "advisory: release bigint 42: fn closed its conn")
	srv.want(t, slices.Concat(on(1, "open", tryQuery), on(2, "open"), on(3, "open"), on(1, unlockExposedQuery, "close"))...)
	if stats := db.Stats(); stats.InUse != 0 || stats.Idle != 2 || log.String() != "" {
		t.Errorf("%d connections in use, %d idle; log: %s", stats.InUse, stats.Idle, log.String())
	}

	// Closed, and the lock is not on it any more: nothing else is either.
	db, srv = newServer(t, granted, refused)
	err = WithConnLock(t.Context(), db, key, func(_ context.Context, conn *sql.Conn) error { return conn.Close() }, log.option())
	wantError(t, err, ErrLost, sql.ErrConnDone)
	srv.want(t, on(1, "open", tryQuery, unlockExposedQuery, pgsql.UnlockAll, "close")...)

	// Another has it from there.
	var other *sql.Conn
	err = WithConnLock(t.Context(), db, key, func(_ context.Context, conn *sql.Conn) (err error) {
		wantError(t, conn.Close())
		db.SetMaxIdleConns(0)
		db.SetMaxIdleConns(2)
		other, err = db.Conn(t.Context())
		return err
	}, log.option())
	wantError(t, err, ErrLost, sql.ErrConnDone)
	wantError(t, other.Close())
	if !strings.Contains(log.String(), "conn was closed while fn ran") {
		t.Errorf("log: %s", log.String())
	}
}

// fn's conn is closed with its session, which dies under fn's own statement: the release does not
// look for it for long.
func TestWithConnLocksSessionDiesUnderFnsStatement(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		db, srv := newServer(t)
		db.SetMaxIdleConns(5)
		down := false
		srv.script = func(_ context.Context, _ int, query string) (int64, error) {
			if down = query == "mine"; down {
				return 0, driver.ErrBadConn
			}
			return 1, nil
		}
		srv.reset = func(context.Context, int) error {
			if down {
				return driver.ErrBadConn
			}
			return nil
		}
		srv.dial = func(ctx context.Context) error {
			if down {
				<-ctx.Done()
			}
			return ctx.Err()
		}
		start := time.Now()
		wantError(t, WithConnLock(t.Context(), db, key, func(ctx context.Context, conn *sql.Conn) error {
			for range 4 {
				other, err := db.Conn(ctx)
				wantError(t, err)
				defer other.Close()
			}
			_, err := conn.ExecContext(ctx, "mine")
			return err
		}), ErrLost, driver.ErrBadConn)
		wantTook(t, start, 0, clearBound)
		time.Sleep(dialBound) // the driver is told to give up then
	})
}
