package advisory

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"errors"
	"io"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/DATA-DOG/go-sqlmock"
)

func noTx(context.Context, *sql.Tx) error { return nil }

func isolation(level sql.IsolationLevel) Option {
	return TxOptions(&sql.TxOptions{Isolation: level})
}

func TestStatementsOfWithTxLock(t *testing.T) {
	t.Parallel()
	one, none := sqlmock.NewResult(0, 1), sqlmock.NewResult(0, 0)
	for _, test := range []struct {
		name   string
		opts   []Option
		expect func(sqlmock.Sqlmock)
	}{
		{"by default", nil, func(m sqlmock.Sqlmock) {
			m.ExpectBegin()
			m.ExpectExec(tryFirstQuery).WithoutArgs().WillReturnResult(one)
			m.ExpectExec("UPDATE t SET i = i + 1").WillReturnResult(one)
			m.ExpectCommit()
		}},
		{"at READ COMMITTED, shared", []Option{isolation(sql.LevelReadCommitted), Shared()}, func(m sqlmock.Sqlmock) {
			m.ExpectBegin()
			m.ExpectExec("SELECT WHERE pg_catalog.pg_try_advisory_xact_lock_shared(42)").WithoutArgs().WillReturnResult(one)
			m.ExpectExec("UPDATE t SET i = i + 1").WillReturnResult(one)
			m.ExpectCommit()
		}},
		{"contended", nil, func(m sqlmock.Sqlmock) {
			m.ExpectBegin()
			m.ExpectExec(tryFirstQuery).WithoutArgs().WillReturnResult(none)
			m.ExpectExec(waitTxQuery).WithoutArgs().WillReturnError(err55P03)
			m.ExpectRollback()
			m.ExpectBegin()
			m.ExpectExec(waitTxQuery).WithoutArgs().WillReturnResult(one)
			m.ExpectExec("UPDATE t SET i = i + 1").WillReturnResult(one)
			m.ExpectCommit()
		}},
		{"at REPEATABLE READ", []Option{isolation(sql.LevelRepeatableRead)}, func(m sqlmock.Sqlmock) {
			m.ExpectExec(tryQuery).WithoutArgs().WillReturnResult(one)
			m.ExpectBegin()
			m.ExpectExec("UPDATE t SET i = i + 1").WillReturnResult(one)
			m.ExpectCommit()
			m.ExpectExec(unlockQuery).WithoutArgs().WillReturnResult(one)
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
	const setLocal = "SET LOCAL idle_in_transaction_session_timeout = 60000"
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
			"and another holds it", []reply{done, {rows: 2}, done, refused, fails(err55P03), granted}, nil, noTx,
			on(1, "open", "BEGIN", tryFirstQuery, "ROLLBACK", tryQuery, waitQuery, waitQuery, "BEGIN", "COMMIT", unlockAllQuery), nil,
		},
		{
			"and the session dies: the next one knows it", []reply{done, {rows: 2}, done, refused, fails(died)}, nil, noTx,
			slices.Concat(
				on(1, "open", "BEGIN", tryFirstQuery, "ROLLBACK", tryQuery, waitQuery, "close"),
				on(2, "open", tryQuery, "BEGIN", "COMMIT", unlockQuery),
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
			"a lock_timeout and a statement_timeout", []reply{done, refused, fails(err55P03), done, done, fails(err57014)}, nil, noTx,
			on(1, "open", "BEGIN", tryFirstQuery, waitTxQuery, "ROLLBACK", "BEGIN", waitTxQuery, "ROLLBACK", "BEGIN", waitTxQuery, "COMMIT"), nil,
		},
		{
			"a lock_timeout, BEGIN fails", []reply{done, refused, fails(err55P03), done, fails(died)}, nil, noTx,
			slices.Concat(
				on(1, "open", "BEGIN", tryFirstQuery, waitTxQuery, "ROLLBACK", "BEGIN", "close"),
				on(2, "open", "BEGIN", tryFirstQuery, "COMMIT"),
			), nil,
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
			on(1, "open", "BEGIN", setLocal, tryFirstQuery, "COMMIT"), nil,
		},
		{
			"HolderTimeout at SERIALIZABLE", nil, []Option{HolderTimeout(time.Minute), serializable}, noTx,
			on(1, "open", tryQuery, "BEGIN SERIALIZABLE", setLocal, "COMMIT", unlockQuery), nil,
		},
		{
			"HolderTimeout after a wait", []reply{done, done, refused, fails(err55P03)}, []Option{HolderTimeout(time.Minute)}, noTx,
			on(1, "open", "BEGIN", setLocal, tryFirstQuery, waitTxQuery, "ROLLBACK", "BEGIN", setLocal, waitTxQuery, "COMMIT"), nil,
		},
		{
			"HolderTimeout cannot be set", []reply{done, fails(pgError("42704"))}, []Option{HolderTimeout(time.Minute)}, noTx,
			on(1, "open", "BEGIN", setLocal, "ROLLBACK", "close"), []any{pgError("42704")},
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
			on(1, "open", tryQuery, "BEGIN SERIALIZABLE", "COMMIT", unlockQuery, "close"), []any{pgError("40001"), ErrLost},
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
			on(1, "open", tryQuery, "BEGIN SERIALIZABLE", "COMMIT", unlockQuery, "close"), []any{ErrLost, "release bigint 42"},
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
			on(1, "open", tryQuery, "BEGIN SERIALIZABLE", "ROLLBACK", unlockQuery, "close"), []any{mine, ErrLost},
		},
		{
			"fn commits", nil, nil, commit,
			on(1, "open", "BEGIN", tryFirstQuery, "COMMIT", "close"), []any{sql.ErrTxDone, "must leave that to WithTxLock"},
		},
		{
			"fn rolls back", nil, []Option{serializable}, func(_ context.Context, tx *sql.Tx) error { return tx.Rollback() },
			on(1, "open", tryQuery, "BEGIN SERIALIZABLE", "ROLLBACK", "close"), []any{sql.ErrTxDone},
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

func TestTimeoutOfWithTxLockHandsBackTheConnection(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		db, srv := newServer(t)
		srv.script = script55P03(t)
		start := time.Now()
		wantError(t, WithTxLock(t.Context(), db, key, noTx, Timeout(500*time.Millisecond)), ErrNotAcquired, "not acquired within 500ms")
		if d := time.Since(start); d != 500*time.Millisecond {
			t.Errorf("after %v", d)
		}
		srv.want(t, on(1, "open", "BEGIN", tryFirstQuery, waitTxQuery, "ROLLBACK", "BEGIN",
			strings.Replace(waitTxQuery, "400", "100", 1), "ROLLBACK", "BEGIN", "ROLLBACK", holdersQuery)...)
	})
}

// Nothing that fn did is committed, and the connection goes, because database/sql
// does not tell how its own rollback went.
func TestTheEndOfCtxWhileFnRunsRollsBack(t *testing.T) {
	t.Parallel()
	for _, level := range []sql.IsolationLevel{sql.LevelReadCommitted, sql.LevelSerializable} {
		for _, fnErr := range []error{nil, context.Canceled} {
			synctest.Test(t, func(t *testing.T) {
				db, srv := newServer(t)
				ctx, cancel := context.WithCancel(t.Context())
				err := WithTxLock(ctx, db, key, func(ctx context.Context, _ *sql.Tx) error {
					cancel()
					<-ctx.Done()
					synctest.Wait()
					return fnErr
				}, isolation(level))
				wantError(t, err, context.Canceled)
				synctest.Wait()
				lines := srv.lines()
				if slices.Contains(lines, "1 COMMIT") || !slices.Contains(lines, "1 ROLLBACK") || lines[len(lines)-1] != "1 close" {
					t.Errorf("log: %q", lines)
				}
			})
		}
	}
}

// database/sql rolls back by itself when ctx ends: a wait behind that would be outside
// of any transaction.
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
func TestADriverThatDoesNotReturnInATransactionIsAbandoned(t *testing.T) {
	t.Parallel()
	db, srv := newServer(t)
	free := stuck(srv, waitTxQuery)
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	start := time.Now()
	wantError(t, WithTxLock(ctx, db, key, noTx), ErrNotAcquired, context.DeadlineExceeded)
	if d := time.Since(start); d > 2*abandonAfter+time.Second {
		t.Errorf("after %v", d)
	}
	srv.want(t, on(1, "open", "BEGIN", tryFirstQuery, waitTxQuery)...)
	free()
	for deadline := time.Now().Add(5 * time.Second); srv.open() > 0; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("the connection is still open")
		}
	}
	for _, line := range srv.lines()[4:] {
		if line != "1 ROLLBACK" && line != "1 close" {
			t.Errorf("sent afterwards: %s", line)
		}
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
	lastWait := strings.Replace(savepointTxQuery, "400", "200", 1)
	for _, test := range []struct {
		name    string
		replies []reply
		opts    []Option
		want    []string // after BEGIN
		wants   []any
	}{
		{"granted", nil, nil, []string{tryTxQuery}, nil},
		{"shared", nil, []Option{Shared()}, []string{"SELECT WHERE pg_catalog.pg_try_advisory_xact_lock_shared(42)"}, nil},
		{"granted after waiting", []reply{refused}, nil, []string{tryTxQuery, savepointTxQuery}, nil},
		{
			"shared, granted after waiting", []reply{refused}, []Option{Shared()},
			[]string{
				"SELECT WHERE pg_catalog.pg_try_advisory_xact_lock_shared(42)",
				strings.Replace(savepointTxQuery, "xact_lock", "xact_lock_shared", 1),
			}, nil,
		},
		{"NoWait refused", []reply{refused}, []Option{NoWait()}, []string{tryTxQuery}, []any{ErrNotAcquired}},
		{
			"a lock_timeout", []reply{refused, fails(err55P03), done, granted}, nil,
			[]string{tryTxQuery, savepointTxQuery, rollbackToQuery, savepointTxQuery}, nil,
		},
		{
			"a statement_timeout", []reply{refused, fails(err57014), done, granted}, nil,
			[]string{tryTxQuery, savepointTxQuery, rollbackToQuery, savepointTxQuery}, nil,
		},
		{
			"Timeout", []reply{refused, fails(err55P03), done, fails(err55P03)}, []Option{Timeout(600 * time.Millisecond)},
			[]string{tryTxQuery, savepointTxQuery, rollbackToQuery, lastWait, rollbackToQuery, "SAVEPOINT advisory_wait", holdersQuery, rollbackToQuery}, []any{ErrNotAcquired, "not acquired within 600ms"},
		},
		{
			"a deadlock", []reply{refused, fails(pgError("40P01"))}, nil,
			[]string{tryTxQuery, savepointTxQuery, rollbackToQuery}, []any{ErrDeadlock, pgError("40P01")},
		},
		{"the try fails", []reply{fails(died)}, nil, []string{tryTxQuery}, []any{died}},
		{"the wait fails", []reply{refused, fails(died)}, nil, []string{tryTxQuery, savepointTxQuery}, []any{died}},
		{
			"the rollback to the savepoint fails", []reply{refused, fails(err55P03), fails(died)}, nil,
			[]string{tryTxQuery, savepointTxQuery, rollbackToQuery}, []any{err55P03, died},
		},
	} {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				db, srv := newServer(t)
				tx, err := db.BeginTx(context.Background(), nil)
				if err != nil {
					t.Fatal(err)
				}
				answers := inOrder(test.replies...)
				srv.script = func(ctx context.Context, conn int, query string) (int64, error) {
					rows, err := answers(ctx, conn, query)
					if err == error(err55P03) {
						_, err = script55P03(t)(ctx, conn, query)
					}
					return rows, err
				}
				wantError(t, AcquireTx(t.Context(), tx, key, test.opts...), test.wants...)
				srv.want(t, on(1, append([]string{"open", "BEGIN"}, test.want...)...)...)
				if err := tx.Commit(); err != nil {
					t.Error(err)
				}
			})
		})
	}
}

func TestTheEndOfCtxEndsAWaitOfAcquireTxWithoutCancelling(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		db, srv := newServer(t)
		tx, err := db.BeginTx(context.Background(), nil)
		if err != nil {
			t.Fatal(err)
		}
		cause := errors.New("cause")
		ctx, cancel := context.WithCancelCause(t.Context())
		time.AfterFunc(time.Second, func() { cancel(cause) })
		waits := script55P03(t)
		srv.script = func(stmtCtx context.Context, conn int, query string) (int64, error) {
			rows, err := waits(stmtCtx, conn, query)
			if stmtCtx.Err() != nil {
				t.Error("a statement was cancelled")
			}
			return rows, err
		}
		start := time.Now()
		wantError(t, AcquireTx(ctx, tx, key), ErrNotAcquired, context.Canceled, cause)
		if d := time.Since(start) - time.Second; d < 0 || d > waitBound {
			t.Errorf("%v after the end of ctx", d)
		}
		srv.want(t, on(1, "open", "BEGIN", tryTxQuery,
			savepointTxQuery, rollbackToQuery, savepointTxQuery, rollbackToQuery, savepointTxQuery, rollbackToQuery)...)
		wantError(t, AcquireTx(ctx, tx, key), ErrNotAcquired, cause) // sends nothing
		if err := tx.Commit(); err != nil {
			t.Error(err)
		}
	})
}

func TestStatementTimeoutsInAcquireTxArePaced(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		db, srv := newServer(t)
		tx, err := db.Begin()
		if err != nil {
			t.Fatal(err)
		}
		srv.script = func(_ context.Context, _ int, query string) (int64, error) {
			if strings.HasPrefix(query, "SAVEPOINT advisory_wait;") {
				return 0, err57014
			}
			return 0, nil
		}
		wantError(t, AcquireTx(t.Context(), tx, key, Timeout(time.Second)), ErrNotAcquired)
		if n := strings.Count(strings.Join(srv.lines(), "\n"), "1 SAVEPOINT advisory_wait;"); n != 20 {
			t.Errorf("%d waits in a second, want 20", n)
		}
		if err := tx.Rollback(); err != nil {
			t.Error(err)
		}
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
