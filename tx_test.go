package advisory

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/DATA-DOG/go-sqlmock"
	"github.com/google/go-cmp/cmp"
)

func noTx(context.Context, *sql.Tx) error { return nil }

func isolation(level sql.IsolationLevel) Option {
	return TxOptions(&sql.TxOptions{Isolation: level})
}

// A server on a platform that cannot check its connections is asked to once, and that costs no lock.
func TestAServerThatDoesNotCheckItsConnectionsIsAskedOnce(t *testing.T) {
	t.Parallel()
	for _, f := range waiters() {
		if !strings.HasPrefix(f.name, "WithConnLock") && !strings.HasPrefix(f.name, "WithTxLock") {
			continue
		}
		for _, contended := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, contended %v", f.name, contended), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					p, dbs, srvs := newTable(t, 2)
					srvs[0].checkless = true
					if contended {
						holdFor(t, dbs[1], key, 250*time.Millisecond)
					}
					var log logBuffer
					for range 3 {
						wantError(t, f.run(t.Context(), dbs[0], key, nothing, log.option()))
					}
					asked := 0
					for _, line := range srvs[0].raw {
						if strings.Contains(line, "set_config('client_connection_check_interval'") {
							asked++
						}
					}
					if n := strings.Count(log.String(), "does not check its connections"); asked == 0 || asked > 2 || n != 1 {
						t.Errorf("asked %d times, %d warnings: %q", asked, n, srvs[0].raw)
					}
					if srvs[0].opened != 1 {
						t.Errorf("%d connections", srvs[0].opened)
					}
					wantIdle(t, dbs[0])
					p.clean()
				})
			})
		}
	}
}

func TestStatementsOfWithTxLock(t *testing.T) {
	t.Parallel()
	one, none := sqlmock.NewResult(0, 1), sqlmock.NewResult(0, 0)
	const (
		current = "pg_catalog.current_setting('client_connection_check_interval')"
		check   = "pg_catalog.set_config('client_connection_check_interval', CASE" +
			" WHEN " + current + "::pg_catalog.interval OPERATOR(pg_catalog.>) '0' AND " + current + "::pg_catalog.interval OPERATOR(pg_catalog.<) '1s'" +
			" THEN " + current + " ELSE '1s' END, "
		own = "SELECT " + check + "true); "
	)
	wait := waitStatement(inTx, restartStatement, key, false, sliceMin, sessionSettings{checks: true})
	for _, test := range []struct {
		name   string
		opts   []Option
		expect func(sqlmock.Sqlmock)
	}{
		{"by default", nil, func(m sqlmock.Sqlmock) {
			m.ExpectBegin()
			m.ExpectExec(own + tryFirstQuery).WithoutArgs().WillReturnResult(one)
			m.ExpectExec("UPDATE t SET i = i + 1").WillReturnResult(one)
			m.ExpectCommit()
		}},
		{"at READ COMMITTED, shared", []Option{isolation(sql.LevelReadCommitted), Shared()}, func(m sqlmock.Sqlmock) {
			m.ExpectBegin()
			m.ExpectExec(own + "SELECT WHERE CASE WHEN pg_catalog.pg_is_in_recovery() THEN false ELSE pg_catalog.pg_try_advisory_xact_lock_shared(42) END").WithoutArgs().WillReturnResult(one)
			m.ExpectExec("UPDATE t SET i = i + 1").WillReturnResult(one)
			m.ExpectCommit()
		}},
		{"contended", nil, func(m sqlmock.Sqlmock) {
			m.ExpectBegin()
			m.ExpectExec(own + tryFirstQuery).WithoutArgs().WillReturnResult(none)
			m.ExpectExec(wait).WithoutArgs().WillReturnResult(none)
			m.ExpectExec(wait).WithoutArgs().WillReturnResult(one)
			m.ExpectExec("UPDATE t SET i = i + 1").WillReturnResult(one)
			m.ExpectCommit()
		}},
		{"at REPEATABLE READ", []Option{isolation(sql.LevelRepeatableRead)}, func(m sqlmock.Sqlmock) {
			m.ExpectExec(strings.Replace(tryQuery, "SELECT", "SELECT "+check+"false)", 1)).WithoutArgs().WillReturnResult(one)
			m.ExpectBegin()
			m.ExpectExec("UPDATE t SET i = i + 1").WillReturnResult(one)
			m.ExpectCommit()
			m.ExpectExec("RESET client_connection_check_interval; " + unlockQuery).WithoutArgs().WillReturnResult(one)
		}},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			db, mock := newMock(t)
			test.expect(mock)
			wantError(t, WithTxLock(t.Context(), db, key, func(ctx context.Context, tx *sql.Tx) error {
				_, err := tx.ExecContext(ctx, "UPDATE t SET i = i + 1")
				return err
			}, test.opts...))
		})
	}
}

func TestEveryWayATransactionLockCanGo(t *testing.T) {
	t.Parallel()
	died, mine := io.ErrUnexpectedEOF, errors.New("mine")
	readCommitted, serializable := isolation(sql.LevelReadCommitted), isolation(sql.LevelSerializable)
	const setLocal = "SET LOCAL idle_in_transaction_session_timeout = 60000; "
	setWait := waitStatement(inTx, restartStatement+setLocal, key, false, sliceMin, sessionSettings{})
	commit := func(_ context.Context, tx *sql.Tx) error { return tx.Commit() }
	for _, test := range []struct {
		name    string
		replies []reply
		opts    []Option
		fn      func(context.Context, *sql.Tx) error
		want    []string
		wants   []any
	}{
		{
			"READ COMMITTED, by name", nil, []Option{readCommitted}, noTx,
			on(1, "open", "BEGIN READ COMMITTED", tryTxQuery, "COMMIT"), nil,
		},
		{
			"READ UNCOMMITTED is the same", nil, []Option{isolation(sql.LevelReadUncommitted)}, noTx,
			on(1, "open", "BEGIN READ UNCOMMITTED", tryTxQuery, "COMMIT"), nil,
		},
		{
			"read-only", nil, []Option{TxOptions(&sql.TxOptions{ReadOnly: true})}, noTx,
			on(1, "open", "BEGIN READ ONLY", tryFirstQuery, "COMMIT"), nil,
		},
		{
			"TxOptions nil is the default", nil, []Option{TxOptions(nil)}, noTx,
			on(1, "open", "BEGIN", tryFirstQuery, "COMMIT"), nil,
		},
		{
			"SERIALIZABLE: the lock is taken before the snapshot", nil, []Option{serializable}, noTx,
			on(1, "open", tryQuery, "BEGIN SERIALIZABLE", "COMMIT", unlockQuery), nil,
		},
		{
			"the server's default is REPEATABLE READ", []reply{done, {rows: 2}}, nil, noTx,
			on(1, "open", "BEGIN", tryFirstQuery, "ROLLBACK", tryQuery, "BEGIN", "COMMIT", unlockQuery), nil,
		},
		{
			"and another holds it", []reply{done, {rows: 2}, done, refused, refused, granted}, nil, noTx,
			on(1, "open", "BEGIN", tryFirstQuery, "ROLLBACK", tryQuery, ownWaitQuery, ownWaitQuery, "BEGIN", "COMMIT", unlockQuery), nil,
		},
		{
			"and the session dies: the next one knows it", []reply{done, {rows: 2}, done, refused, fails(died)}, nil, noTx,
			slices.Concat(
				on(1, "open", "BEGIN", tryFirstQuery, "ROLLBACK", tryQuery, ownWaitQuery, "close"),
				on(2, "open", probeQuery, tryQuery, "BEGIN", "COMMIT", unlockQuery),
			), nil,
		},
		{
			"NoWait refused", []reply{done, refused}, []Option{NoWait()}, noTx,
			on(1, "open", "BEGIN", tryFirstQuery, "ROLLBACK"), []any{ErrNotAcquired},
		},
		{
			"NoWait refused, rollback fails", []reply{done, refused, fails(died)}, []Option{NoWait()}, noTx,
			on(1, "open", "BEGIN", tryFirstQuery, "ROLLBACK", "close"), []any{ErrNotAcquired},
		},
		{
			"granted after three slices, one of which is cancelled", []reply{done, refused, refused, fails(err57014)}, nil, noTx,
			on(1, "open", "BEGIN", tryFirstQuery, waitTxQuery, waitTxQuery, "ROLLBACK AND CHAIN", waitTxQuery, "COMMIT"), nil,
		},
		{
			"the session dies in the second slice: the next one begins anew", []reply{done, refused, refused, fails(died)}, nil, noTx,
			slices.Concat(
				on(1, "open", "BEGIN", tryFirstQuery, waitTxQuery, waitTxQuery, "ROLLBACK", "close"),
				on(2, "open", probeQuery, "BEGIN", tryFirstQuery, "COMMIT"),
			), nil,
		},
		{
			"a slice fails", []reply{done, refused, fails(pgError("53200"))}, nil, noTx,
			on(1, "open", "BEGIN", tryFirstQuery, waitTxQuery, "ROLLBACK", "close"), []any{pgError("53200")},
		},
		{
			"a standby", []reply{done, refused, {rows: 2}}, nil, noTx,
			on(1, "open", "BEGIN", tryFirstQuery, waitTxQuery, "ROLLBACK", "close"), []any{"hot standby", "primary"},
		},
		{
			"a deadlock", []reply{done, refused, fails(pgError("40P01"))}, nil, noTx,
			on(1, "open", "BEGIN", tryFirstQuery, waitTxQuery, "ROLLBACK", "close"), []any{ErrDeadlock},
		},
		{
			"BEGIN fails", []reply{fails(died)}, nil, noTx,
			on(1, "open", "BEGIN", "close"), []any{died, "advisory: acquire bigint 42: begin: "},
		},
		{
			"BEGIN is refused", []reply{fails(pgError("0A000"))}, nil, noTx,
			on(1, "open", "BEGIN", "close"), []any{pgError("0A000")},
		},
		{
			"BEGIN fails under a session-level lock", []reply{granted, fails(died)}, []Option{serializable}, noTx,
			on(1, "open", tryQuery, "BEGIN SERIALIZABLE", "close"), []any{died},
		},
		{
			"the try fails", []reply{done, fails(died)}, nil, noTx,
			on(1, "open", "BEGIN", tryFirstQuery, "ROLLBACK", "close"), []any{died},
		},
		{
			"the try is refused", []reply{done, fails(pgError("53200"))}, nil, noTx,
			on(1, "open", "BEGIN", tryFirstQuery, "ROLLBACK", "close"), []any{pgError("53200"), "max_locks_per_transaction"},
		},
		{
			"the connection dies under BEGIN", []reply{fails(driver.ErrBadConn)}, nil, noTx,
			on(1, "open", "BEGIN", "close"), []any{driver.ErrBadConn},
		},
		{
			"HolderTimeout", nil, []Option{HolderTimeout(time.Minute)}, noTx,
			on(1, "open", "BEGIN", setLocal+tryFirstQuery, "COMMIT"), nil,
		},
		{
			"HolderTimeout at SERIALIZABLE", nil, []Option{HolderTimeout(time.Minute), serializable}, noTx,
			on(1, "open", tryQuery, "BEGIN SERIALIZABLE", setLocal, "COMMIT", unlockQuery), nil,
		},
		{
			"HolderTimeout after a wait", []reply{done, refused, refused}, []Option{HolderTimeout(time.Minute)}, noTx,
			on(1, "open", "BEGIN", setLocal+tryFirstQuery, setWait, setWait, "COMMIT"), nil,
		},
		{
			"HolderTimeout cannot be set", []reply{done, fails(pgError("42704"))}, []Option{HolderTimeout(time.Minute)}, noTx,
			on(1, "open", "BEGIN", setLocal+tryFirstQuery, "ROLLBACK", "close"), []any{pgError("42704")},
		},
		{
			"COMMIT is refused: the server has rolled back", []reply{done, granted, fails(pgError("40001"))}, nil, noTx,
			on(1, "open", "BEGIN", tryFirstQuery, "COMMIT"), []any{pgError("40001"), "advisory: commit bigint 42: "},
		},
		{
			"COMMIT is refused under a session-level lock", []reply{granted, done, fails(pgError("40001"))}, []Option{serializable}, noTx,
			on(1, "open", tryQuery, "BEGIN SERIALIZABLE", "COMMIT", unlockQuery), []any{pgError("40001")},
		},
		{
			"COMMIT is refused, and so is unlock", []reply{granted, done, fails(pgError("40001")), refused}, []Option{serializable}, noTx,
			on(1, "open", tryQuery, "BEGIN SERIALIZABLE", "COMMIT", unlockQuery, freeQuery, "close"), []any{pgError("40001"), ErrLost},
		},
		{
			"COMMIT fails: nobody knows", []reply{done, granted, fails(died)}, nil, noTx,
			on(1, "open", "BEGIN", tryFirstQuery, "COMMIT", "close"), []any{died, "commit bigint 42"},
		},
		{
			"COMMIT fails under a session-level lock", []reply{granted, done, fails(died)}, []Option{serializable}, noTx,
			on(1, "open", tryQuery, "BEGIN SERIALIZABLE", "COMMIT", "close"), []any{died},
		},
		{
			"the server shuts down at COMMIT", []reply{done, granted, fails(pgError("57P01"))}, nil, noTx,
			on(1, "open", "BEGIN", tryFirstQuery, "COMMIT", "close"), []any{pgError("57P01")},
		},
		{
			"unlock refused after COMMIT", []reply{granted, done, done, refused}, []Option{serializable}, noTx,
			on(1, "open", tryQuery, "BEGIN SERIALIZABLE", "COMMIT", unlockQuery, freeQuery, "close"), []any{ErrLost, "release bigint 42"},
		},
		{
			"unlock fails after COMMIT, which is on the same session", []reply{granted, done, done, fails(died)}, []Option{serializable}, noTx,
			on(1, "open", tryQuery, "BEGIN SERIALIZABLE", "COMMIT", unlockQuery, "close"), nil,
		},
		{
			"fn fails, and so does ROLLBACK", []reply{done, granted, fails(died)}, nil, func(context.Context, *sql.Tx) error { return mine },
			on(1, "open", "BEGIN", tryFirstQuery, "ROLLBACK", "close"), []any{mine},
		},
		{
			"fn fails, and unlock is refused", []reply{granted, done, done, refused}, []Option{serializable}, func(context.Context, *sql.Tx) error { return mine },
			on(1, "open", tryQuery, "BEGIN SERIALIZABLE", "ROLLBACK", unlockQuery, freeQuery, "close"), []any{mine, ErrLost},
		},
		{
			"fn commits", nil, nil, commit,
			on(1, "open", "BEGIN", tryFirstQuery, "COMMIT", "close"), []any{sql.ErrTxDone, "must leave that to WithTxLock"},
		},
		{
			"fn rolls back", nil, []Option{serializable}, func(_ context.Context, tx *sql.Tx) error { return tx.Rollback() },
			on(1, "open", tryQuery, "BEGIN SERIALIZABLE", "ROLLBACK", freeQuery, "close"), []any{sql.ErrTxDone},
		},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				db, srv := newServer(t, test.replies...)
				wantError(t, WithTxLock(t.Context(), db, key, test.fn, test.opts...), test.wants...)
				synctest.Wait()
				srv.want(t, test.want...)
				if n := db.Stats().InUse; n != 0 {
					t.Errorf("%d connections not handed back", n)
				}
				if got, want := db.Stats().Idle, srv.open(); got != want {
					t.Errorf("%d connections idle of %d open", got, want)
				}
			})
		})
	}
}

func TestWhatWithTxLockCannotReturnGoesToTheLogger(t *testing.T) {
	t.Parallel()
	died, mine := io.ErrUnexpectedEOF, errors.New("mine")
	for _, test := range []struct {
		name    string
		replies []reply
		fn      error
		says    string
	}{
		{"unlock after COMMIT", []reply{granted, done, done, fails(died)}, nil, "lock could not be released"},
		{"ROLLBACK", []reply{granted, done, fails(died)}, mine, "transaction could not be rolled back"},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			db, _ := newServer(t, test.replies...)
			var log logBuffer
			err := WithTxLock(t.Context(), db, key, func(context.Context, *sql.Tx) error { return test.fn },
				isolation(sql.LevelSerializable), log.option())
			if err != test.fn {
				t.Errorf("error: %v", err)
			}
			if !strings.Contains(log.String(), test.says) || !strings.Contains(log.String(), "bigint 42") {
				t.Errorf("log: %q", log.String())
			}
		})
	}
}

// Nothing that fn did is committed: the transaction is rolled back once, at the end of ctx, and the
// connection is handed back.
func TestTheEndOfCtxWhileFnRunsRollsBackOnce(t *testing.T) {
	t.Parallel()
	mine := errors.New("mine")
	for _, c := range closures[4:] {
		for _, fnErr := range []error{nil, context.Canceled, mine} {
			for _, waits := range []bool{false, true} { // fn, for the rollback
				t.Run(fmt.Sprint(c.name, " ", fnErr, " ", waits), func(t *testing.T) {
					synctest.Test(t, func(t *testing.T) {
						db, srv := newServer(t)
						ctx, cancel := context.WithCancel(t.Context())
						err := c.run(ctx, db, key, func(ctx context.Context) error {
							cancel()
							<-ctx.Done()
							if waits {
								synctest.Wait()
								srv.want(t, on(1, append(slices.Clip(c.acquires), "ROLLBACK")...)...)
							}
							return fnErr
						})
						wants := []any{context.Canceled, "commit bigint 42: context canceled"}
						if fnErr != nil {
							wants = []any{fnErr}
						}
						wantError(t, err, wants...)
						synctest.Wait()
						srv.want(t, on(1, append(slices.Clip(c.acquires), c.undoes...)...)...)
						if stats := db.Stats(); stats.InUse != 0 || stats.Idle != 1 {
							t.Errorf("%+v", stats)
						}
					})
				})
			}
		}
	}
}

// fn may return before the rollback at the end of ctx has begun.
func TestFnReturnsInTheMomentInWhichCtxEnds(t *testing.T) {
	t.Parallel()
	for range 200 {
		db, srv := newServer(t)
		ctx, cancel := context.WithCancel(t.Context())
		for range 1000 { // which end before, or after, what WithTxLock has made of ctx
			_, cancel := context.WithCancel(ctx)
			defer cancel()
		}
		wantError(t, WithTxLock(ctx, db, key, func(context.Context, *sql.Tx) error {
			go cancel()
			<-ctx.Done()
			return nil
		}), context.Canceled)
		wantIdle(t, db)
		if want := on(1, "open", "BEGIN", tryFirstQuery, "ROLLBACK"); !slices.Equal(want, srv.lines()) {
			t.Fatalf("log: %q", srv.lines())
		}
	}
}

// fn may not know that its transaction has ended, and goes on.
func TestAStatementOfFnAfterTheEndOfCtxIsNotSent(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		db, srv := newServer(t)
		ctx, cancel := context.WithCancel(t.Context())
		wantError(t, WithTxLock(ctx, db, key, func(_ context.Context, tx *sql.Tx) error {
			cancel()
			synctest.Wait()
			_, err := tx.ExecContext(context.Background(), "mine")
			return err
		}), sql.ErrTxDone)
		srv.want(t, on(1, "open", "BEGIN", tryFirstQuery, "ROLLBACK")...)
	})
}

// A rollback that cannot be sure of itself costs the connection.
func TestARollbackAtTheEndOfCtxThatFails(t *testing.T) {
	t.Parallel()
	for name, answer := range map[string]func(ctx context.Context) error{
		"gone":    func(context.Context) error { return io.ErrUnexpectedEOF },
		"refused": func(context.Context) error { return pgError("XX000") },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				db, srv := newServer(t)
				srv.script = func(ctx context.Context, _ int, query string) (int64, error) {
					if query == "ROLLBACK" {
						return 0, answer(ctx)
					}
					return 1, nil
				}
				ctx, cancel := context.WithCancel(t.Context())
				start := time.Now()
				wantError(t, WithTxLock(ctx, db, key, func(ctx context.Context, _ *sql.Tx) error {
					cancel()
					<-ctx.Done()
					return nil
				}), context.Canceled)
				if d := time.Since(start); d > 0 {
					t.Errorf("after %v", d)
				}
				synctest.Wait()
				lines := srv.lines()
				if count(lines, "ROLLBACK") != 1 || lines[len(lines)-1] != "1 close" || slices.Contains(lines, "1 COMMIT") {
					t.Errorf("log: %q", lines)
				}
				if n := db.Stats().OpenConnections; n != 0 {
					t.Errorf("%d connections in the pool", n)
				}
			})
		})
	}
}

func TestAfterTheEndOfCtxNoWaitGoesOut(t *testing.T) {
	t.Parallel()
	for range 200 {
		ctx, cancel := context.WithCancel(t.Context())
		db, srv := newServer(t)
		srv.script = func(_ context.Context, _ int, query string) (int64, error) {
			if query == tryFirstQuery {
				cancel()
				return 0, nil
			}
			return 1, nil
		}
		wantError(t, WithTxLock(ctx, db, key, noTx), ErrNotAcquired, context.Canceled)
		if slices.Contains(srv.lines(), "1 "+waitTxQuery) {
			t.Fatalf("log: %q", srv.lines())
		}
	}
}

// In real time, because database/sql waits for its own locks here.
func TestADriverThatDoesNotReturnInATransactionIsLeft(t *testing.T) {
	t.Parallel()
	for _, stuckIn := range []string{tryFirstQuery, waitTxQuery} {
		db, srv := newServer(t)
		free := stuck(srv, stuckIn)
		script := srv.script
		ctx, cancel := context.WithCancel(t.Context())
		srv.script = func(ctx context.Context, conn int, query string) (int64, error) {
			if plainly(query) == stuckIn {
				cancel()
			}
			return script(ctx, conn, query)
		}
		start := time.Now()
		wantError(t, WithTxLock(ctx, db, key, noTx), ErrNotAcquired, context.Canceled)
		if d := time.Since(start); d > time.Second {
			t.Errorf("after %v", d)
		}
		sent := srv.lines()
		if last := sent[len(sent)-1]; last != "1 "+stuckIn {
			t.Errorf("log: %q", sent)
		}
		free()
		wantIdle(t, db)
		srv.want(t, append(sent, on(1, "ROLLBACK")...)...)
	}
}

// COMMIT is waited for as long as ctx lives.
func TestADriverThatDoesNotReturnFromCommitIsAbandonedWithCtx(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		db, srv := newServer(t)
		back := make(chan struct{})
		srv.script = func(_ context.Context, _ int, query string) (int64, error) {
			if query == "COMMIT" {
				<-back
			}
			return 1, nil
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Hour)
		defer cancel()
		start := time.Now()
		wantError(t, WithTxLock(ctx, db, key, noTx), context.DeadlineExceeded, "advisory: commit bigint 42: ")
		if d := time.Since(start); d < time.Hour || d > time.Hour+2*abandonAfter {
			t.Errorf("after %v", d)
		}
		close(back)
		synctest.Wait()
		srv.want(t, on(1, "open", "BEGIN", tryFirstQuery, "COMMIT", "close")...)
	})
}

// The caller's transaction goes on after whatever ends the wait.
func TestAcquireTx(t *testing.T) {
	t.Parallel()
	died := io.ErrUnexpectedEOF
	const shared = "SELECT WHERE CASE WHEN pg_catalog.pg_is_in_recovery() THEN false ELSE pg_catalog.pg_try_advisory_xact_lock_shared(42) END"
	for _, test := range []struct {
		name    string
		replies []reply
		opts    []Option
		want    []string // after BEGIN
		wants   []any
	}{
		{"granted", nil, nil, []string{tryTxQuery}, nil},
		{"shared", nil, []Option{Shared()}, []string{shared}, nil},
		{"granted after waiting", []reply{refused, refused}, nil, []string{tryTxQuery, tryTxQuery, tryTxQuery}, nil},
		{"shared, granted after waiting", []reply{refused}, []Option{Shared()}, []string{shared, shared}, nil},
		{"NoWait refused", []reply{refused}, []Option{NoWait()}, []string{tryTxQuery}, []any{ErrNotAcquired}},
		{
			"Timeout, with a last try", []reply{refused, refused}, []Option{Timeout(time.Millisecond)},
			[]string{tryTxQuery, tryTxQuery}, []any{ErrNotAcquired, "not acquired within 1ms"},
		},
		{"the last try is granted", []reply{refused, granted}, []Option{Timeout(time.Millisecond)}, []string{tryTxQuery, tryTxQuery}, nil},
		{"the try fails", []reply{fails(died)}, nil, []string{tryTxQuery}, []any{died}},
		{"the second try fails", []reply{refused, fails(died)}, nil, []string{tryTxQuery, tryTxQuery}, []any{died}},
		{"the server refuses the second try", []reply{refused, fails(err57014)}, nil, []string{tryTxQuery, tryTxQuery}, []any{err57014}},
	} {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				tx, srv := beginTx(t)
				srv.script = inOrder(test.replies...)
				wantError(t, AcquireTx(t.Context(), tx, key, test.opts...), test.wants...)
				srv.want(t, on(1, append([]string{"open", "BEGIN"}, test.want...)...)...)
				if err := tx.Commit(); err != nil {
					t.Error(err)
				}
			})
		})
	}
}

// beginTx returns a transaction of a server of its own.
func beginTx(t *testing.T) (*sql.Tx, *server) {
	t.Helper()
	db, srv := newServer(t)
	tx, err := db.BeginTx(context.Background(), nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = tx.Rollback() })
	return tx, srv
}

// tries is the times at which a server on which another holds the lock is asked for it.
func tries(srv *server) *[]time.Duration {
	start := time.Now()
	at := new([]time.Duration)
	srv.script = func(_ context.Context, _ int, query string) (int64, error) {
		switch query {
		case tryTxQuery:
			*at = append(*at, time.Since(start))
			return 0, nil
		case deadlockQuery:
			return 0, nil
		}
		return 1, nil
	}
	return at
}

func TestTheTriesOfAcquireTxArePaced(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		tx, srv := beginTx(t)
		at := tries(srv)
		start := time.Now()
		wantError(t, AcquireTx(t.Context(), tx, key, Timeout(10*time.Second)), ErrNotAcquired, "not acquired within 10s")
		if d := time.Since(start); d != 10*time.Second {
			t.Errorf("after %v", d)
		}
		most := 5 * time.Millisecond
		for i := 1; i < len(*at); i++ {
			d, last := (*at)[i]-(*at)[i-1], i == len(*at)-1
			if d > most || d < most/2 && !last {
				t.Errorf("pause %d: %v, want %v to %v", i, d, most/2, most)
			}
			most = min(2*most, 100*time.Millisecond)
		}
		if last := (*at)[len(*at)-1]; last != 10*time.Second {
			t.Errorf("the last try is at %v", last)
		}
		if n := strings.Count(strings.Join(srv.lines(), "\n"), deadlockQuery); n != 9 {
			t.Errorf("asked for a deadlock %d times in 10 s", n)
		}
	})
}

func TestTheEndOfCtxEndsAWaitOfAcquireTxWithoutCancelling(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		tx, srv := beginTx(t)
		cause := errors.New("cause")
		ctx, cancel := context.WithCancelCause(t.Context())
		time.AfterFunc(time.Second, func() { cancel(cause) })
		srv.script = func(stmtCtx context.Context, _ int, _ string) (int64, error) {
			time.Sleep(60 * time.Millisecond)
			if stmtCtx.Err() != nil {
				t.Error("a statement was cancelled")
			}
			return 0, nil
		}
		start := time.Now()
		wantError(t, AcquireTx(ctx, tx, key), ErrNotAcquired, context.Canceled, cause)
		if d := time.Since(start) - time.Second; d < 0 || d > 60*time.Millisecond {
			t.Errorf("%v after the end of ctx", d)
		}
		sent := srv.lines()
		wantError(t, AcquireTx(ctx, tx, key), ErrNotAcquired, cause) // sends nothing
		srv.want(t, sent...)
		if err := tx.Commit(); err != nil {
			t.Error(err)
		}
	})
}

// If the holder waits for the transaction that waits for it, neither gets anywhere.
func TestADeadlockThatTheServerDoesNotSeeEndsAcquireTx(t *testing.T) {
	t.Parallel()
	question := []string{tryTxQuery, savepointQuery, deadlockQuery, rollbackToQuery}
	twice := slices.Concat(question, question)
	died := io.ErrUnexpectedEOF
	for _, test := range []struct {
		name    string
		failing string // the statement that fails, with err
		err     error
		rows    []int64 // the answers
		want    []string
		after   time.Duration
		wants   []any
	}{
		{"found twice", "", nil, []int64{1, 1}, twice, 2 * time.Second, []any{ErrDeadlock, "acquire bigint 42", "waits for this transaction"}},
		{"found by two holders", "", nil, []int64{2, 3}, twice, 2 * time.Second, []any{ErrDeadlock}},
		{"a moment in a hand-off", "", nil, []int64{1, 0, 1, 0, 1, 1}, slices.Concat(twice, twice, twice), 6 * time.Second, []any{ErrDeadlock}},
		{"the connection dies", deadlockQuery, died, nil, question[:3], time.Second, []any{died}},
		{"the savepoint fails", savepointQuery, pgError("53200"), nil, question[:2], time.Second, []any{pgError("53200")}},
		{"the rollback fails", rollbackToQuery, died, []int64{0}, question, time.Second, []any{died}},
		{"it may not be asked for", deadlockQuery, pgError("42501"), nil, append(slices.Clone(twice), tryTxQuery), 3 * time.Second, nil},
	} {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				tx, srv := beginTx(t)
				start := time.Now()
				answers := test.rows
				srv.script = func(_ context.Context, _ int, query string) (int64, error) {
					switch {
					case query == test.failing:
						return 0, test.err
					case query == tryTxQuery && time.Since(start) > 2900*time.Millisecond && test.wants == nil:
						return 1, nil
					case query == tryTxQuery:
						return 0, nil
					case query == deadlockQuery:
						rows := answers[0]
						answers = answers[1:]
						return rows, nil
					}
					return 1, nil
				}
				wantError(t, AcquireTx(t.Context(), tx, key), test.wants...)
				if d := time.Since(start) - test.after; d < -100*time.Millisecond || d > time.Duration(len(test.want)/4+1)*100*time.Millisecond {
					t.Errorf("%v off", d)
				}
				if diff := cmp.Diff(on(1, append([]string{"open", "BEGIN"}, test.want...)...), slices.Compact(srv.lines())); diff != "" {
					t.Errorf("log of the server, tries in a row as one (-want +got):\n%s", diff)
				}
				srv.script = nil
				if err := tx.Commit(); err != nil {
					t.Error(err)
				}
			})
		})
	}
}

func TestADriverThatDoesNotReturnFromTheQuestionForADeadlockIsAbandoned(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		tx, srv := beginTx(t)
		srv.script = func(_ context.Context, _ int, query string) (int64, error) {
			if query == deadlockQuery {
				time.Sleep(time.Minute)
				return 1, nil
			}
			return 0, nil
		}
		start := time.Now()
		wantError(t, AcquireTx(t.Context(), tx, key), "no answer from the server within 10s")
		if d := time.Since(start); d > deadlockPause+tryPauseMax+answerBound+abandonAfter {
			t.Errorf("after %v", d)
		}
		time.Sleep(time.Hour)
	})
}

func TestAcquireTxOnATransactionThatHasEnded(t *testing.T) {
	t.Parallel()
	db, srv := newServer(t)
	tx, err := db.Begin()
	if err != nil {
		t.Fatal(err)
	}
	if err := tx.Commit(); err != nil {
		t.Fatal(err)
	}
	wantError(t, AcquireTx(t.Context(), tx, key), sql.ErrTxDone)
	srv.want(t, on(1, "open", "BEGIN", "COMMIT")...)
}

func TestAServerThatDoesNotAnswerAcquireTxIsGivenUp(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		db, srv := newServer(t)
		tx, err := db.Begin()
		if err != nil {
			t.Fatal(err)
		}
		srv.script = func(ctx context.Context, _ int, query string) (int64, error) {
			if query == tryTxQuery {
				<-ctx.Done()
				return 0, ctx.Err()
			}
			return 1, nil
		}
		start := time.Now()
		wantError(t, AcquireTx(t.Context(), tx, key), "no answer from the server within 10s")
		if d := time.Since(start); d != answerBound {
			t.Errorf("after %v", d)
		}
		_ = tx.Rollback()
	})
}

func TestFnDoesNotRunUnderAnEndedCtxAtRepeatableRead(t *testing.T) {
	t.Parallel()
	db, srv := newServer(t)
	ctx, cancel := context.WithCancel(t.Context())
	srv.script = func(_ context.Context, _ int, query string) (int64, error) {
		if strings.HasPrefix(query, "BEGIN") {
			cancel()
		}
		return 1, nil
	}
	wantError(t, WithTxLock(ctx, db, key, func(context.Context, *sql.Tx) error {
		t.Error("fn runs")
		return nil
	}, isolation(sql.LevelRepeatableRead)), ErrNotAcquired, context.Canceled)
}

// The error has the cause, and the context's own error.
func TestACommitEndedByCtxMatchesTheContextsError(t *testing.T) {
	t.Parallel()
	for range 20 { // do chooses at random
		db, _ := newServer(t)
		cause := errors.New("cause")
		ctx, cancel := context.WithCancelCause(t.Context())
		wantError(t, WithTxLock(ctx, db, key, func(context.Context, *sql.Tx) error {
			cancel(cause)
			return nil
		}), context.Canceled, cause, "commit bigint 42")
	}
}
