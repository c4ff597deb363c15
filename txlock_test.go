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

	"github.com/pgadvisory/advisory/internal/pgsql"
	"github.com/pgadvisory/advisory/internal/session"
)

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
	wait := commentedWait(pgsql.InTx, pgsql.Restart+"; ", key.key, false, sliceMin, pgsql.Settings{Check: true})
	for _, test := range []struct {
		name   string
		opts   []Option
		expect func(sqlmock.Sqlmock)
	}{
		{"by default", nil, func(m sqlmock.Sqlmock) {
			m.ExpectBegin()
			m.ExpectExec(own + tryTxQuery).WithoutArgs().WillReturnResult(one)
			m.ExpectExec("UPDATE t SET i = i + 1").WillReturnResult(one)
			m.ExpectCommit()
		}},
		{"at READ COMMITTED, shared", []Option{isolation(sql.LevelReadCommitted), Shared()}, func(m sqlmock.Sqlmock) {
			m.ExpectBegin()
			m.ExpectExec(own + strings.Replace(tryTxQuery, "xact_lock(", "xact_lock_shared(", 1)).WithoutArgs().WillReturnResult(one)
			m.ExpectExec("UPDATE t SET i = i + 1").WillReturnResult(one)
			m.ExpectCommit()
		}},
		{"contended", nil, func(m sqlmock.Sqlmock) {
			m.ExpectBegin()
			m.ExpectExec(own + tryTxQuery).WithoutArgs().WillReturnResult(none)
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
	setWait := commentedWait(pgsql.InTx, pgsql.Restart+"; "+setLocal, key.key, false, sliceMin, pgsql.Settings{})
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
			on(1, "open", "BEGIN READ ONLY", tryTxQuery, "COMMIT"), nil,
		},
		{
			"TxOptions nil is the default", nil, []Option{TxOptions(nil)}, noTx,
			on(1, "open", "BEGIN", tryTxQuery, "COMMIT"), nil,
		},
		{
			"SERIALIZABLE: the lock is taken before the snapshot", nil, []Option{serializable}, noTx,
			on(1, "open", tryQuery, "BEGIN SERIALIZABLE", "COMMIT", unlockQuery), nil,
		},
		{
			"the server's default is REPEATABLE READ", []reply{done, {rows: pgsql.OneSnapshot}}, nil, noTx,
			on(1, "open", "BEGIN", tryTxQuery, "ROLLBACK", tryQuery, "BEGIN", "COMMIT", unlockQuery), nil,
		},
		{
			"and another holds it", []reply{done, {rows: pgsql.OneSnapshot}, done, refused, refused, granted}, nil, noTx,
			on(1, "open", "BEGIN", tryTxQuery, "ROLLBACK", tryQuery, ownWaitQuery, ownWaitQuery, "BEGIN", "COMMIT", unlockQuery), nil,
		},
		{
			"and the session dies: the next one knows it", []reply{done, {rows: pgsql.OneSnapshot}, done, refused, fails(died)}, nil, noTx,
			slices.Concat(
				on(1, "open", "BEGIN", tryTxQuery, "ROLLBACK", tryQuery, ownWaitQuery, "close"),
				on(2, "open", probeQuery, tryQuery, "BEGIN", "COMMIT", unlockQuery),
			), nil,
		},
		{
			"NoWait refused", []reply{done, refused}, []Option{NoWait()}, noTx,
			on(1, "open", "BEGIN", tryTxQuery, "ROLLBACK"), []any{ErrHeld},
		},
		{
			"NoWait refused, rollback fails", []reply{done, refused, fails(died)}, []Option{NoWait()}, noTx,
			on(1, "open", "BEGIN", tryTxQuery, "ROLLBACK", "close"), []any{ErrHeld},
		},
		{
			"granted after three slices, one of which is cancelled", []reply{done, refused, refused, fails(err57014)}, nil, noTx,
			on(1, "open", "BEGIN", tryTxQuery, waitTxQuery, waitTxQuery, "ROLLBACK AND CHAIN", waitTxQuery, "COMMIT"), nil,
		},
		{
			"the session dies in the second slice: the next one begins anew", []reply{done, refused, refused, fails(died)}, nil, noTx,
			slices.Concat(
				on(1, "open", "BEGIN", tryTxQuery, waitTxQuery, waitTxQuery, "ROLLBACK", "close"),
				on(2, "open", probeQuery, "BEGIN", tryTxQuery, "COMMIT"),
			), nil,
		},
		{
			"a slice fails", []reply{done, refused, fails(pgError("53200"))}, nil, noTx,
			on(1, "open", "BEGIN", tryTxQuery, waitTxQuery, "ROLLBACK", "close"), []any{pgError("53200")},
		},
		{
			"a standby", []reply{done, refused, {rows: 2}}, nil, noTx,
			on(1, "open", "BEGIN", tryTxQuery, waitTxQuery, "ROLLBACK", "close"), []any{"hot standby", "primary"},
		},
		{
			"a deadlock", []reply{done, refused, fails(pgError("40P01"))}, nil, noTx,
			on(1, "open", "BEGIN", tryTxQuery, waitTxQuery, "ROLLBACK", "close"), []any{ErrDeadlock},
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
			on(1, "open", "BEGIN", tryTxQuery, "ROLLBACK", "close"), []any{died},
		},
		{
			"the try is refused", []reply{done, fails(pgError("53200"))}, nil, noTx,
			on(1, "open", "BEGIN", tryTxQuery, "ROLLBACK", "close"), []any{pgError("53200"), "max_locks_per_transaction"},
		},
		{
			"the connection dies under BEGIN", []reply{fails(driver.ErrBadConn)}, nil, noTx,
			on(1, "open", "BEGIN", "close"), []any{driver.ErrBadConn},
		},
		{
			"HolderTimeout", nil, []Option{HolderTimeout(time.Minute)}, noTx,
			on(1, "open", "BEGIN", setLocal+tryTxQuery, "COMMIT"), nil,
		},
		{
			"HolderTimeout at SERIALIZABLE", nil, []Option{HolderTimeout(time.Minute), serializable}, noTx,
			on(1, "open", tryQuery, "BEGIN SERIALIZABLE", setLocal, "COMMIT", unlockQuery), nil,
		},
		{
			"HolderTimeout after a wait", []reply{done, refused, refused}, []Option{HolderTimeout(time.Minute)}, noTx,
			on(1, "open", "BEGIN", setLocal+tryTxQuery, setWait, setWait, "COMMIT"), nil,
		},
		{
			"HolderTimeout cannot be set", []reply{done, fails(pgError("42704"))}, []Option{HolderTimeout(time.Minute)}, noTx,
			on(1, "open", "BEGIN", setLocal+tryTxQuery, "ROLLBACK", "close"), []any{pgError("42704")},
		},
		{
			"COMMIT is refused: the server has rolled back", []reply{done, granted, fails(pgError("40001"))}, nil, noTx,
			on(1, "open", "BEGIN", tryTxQuery, "COMMIT"), []any{pgError("40001"), "advisory: commit bigint 42: "},
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
			on(1, "open", "BEGIN", tryTxQuery, "COMMIT", "close"), []any{died, "commit bigint 42"},
		},
		{
			"COMMIT fails under a session-level lock", []reply{granted, done, fails(died)}, []Option{serializable}, noTx,
			on(1, "open", tryQuery, "BEGIN SERIALIZABLE", "COMMIT", "close"), []any{died},
		},
		{
			"the server shuts down at COMMIT", []reply{done, granted, fails(pgError("57P01"))}, nil, noTx,
			on(1, "open", "BEGIN", tryTxQuery, "COMMIT", "close"), []any{pgError("57P01")},
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
			on(1, "open", "BEGIN", tryTxQuery, "ROLLBACK", "close"), []any{mine},
		},
		{
			"fn fails, and unlock is refused", []reply{granted, done, done, refused}, []Option{serializable}, func(context.Context, *sql.Tx) error { return mine },
			on(1, "open", tryQuery, "BEGIN SERIALIZABLE", "ROLLBACK", unlockQuery, freeQuery, "close"), []any{mine, ErrLost},
		},
		{
			"fn commits", nil, nil, commit,
			on(1, "open", "BEGIN", tryTxQuery, "COMMIT", "close"), []any{sql.ErrTxDone, "must leave that to WithTxLock"},
		},
		{
			"fn rolls back", nil, []Option{serializable}, func(_ context.Context, tx *sql.Tx) error { return tx.Rollback() },
			on(1, "open", tryQuery, "BEGIN SERIALIZABLE", "ROLLBACK", freeQuery, "close"), []any{sql.ErrTxDone},
		},
	} {
		bubble(t, test.name, func(t *testing.T) {
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
				bubble(t, fmt.Sprint(c.name, " ", fnErr, " ", waits), func(t *testing.T) {
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
		if want := on(1, "open", "BEGIN", tryTxQuery, "ROLLBACK"); !slices.Equal(want, srv.lines()) {
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
		srv.want(t, on(1, "open", "BEGIN", tryTxQuery, "ROLLBACK")...)
	})
}

// A rollback that cannot be sure of itself costs the connection.
func TestARollbackAtTheEndOfCtxThatFails(t *testing.T) {
	t.Parallel()
	for name, answer := range map[string]reply{
		"gone":    fails(io.ErrUnexpectedEOF),
		"refused": fails(pgError("XX000")),
	} {
		bubble(t, name, func(t *testing.T) {
			db, srv := newServer(t)
			srv.script = script(when("ROLLBACK", answer))
			ctx, cancel := context.WithCancel(t.Context())
			start := time.Now()
			wantError(t, WithTxLock(ctx, db, key, func(ctx context.Context, _ *sql.Tx) error {
				cancel()
				<-ctx.Done()
				return nil
			}), context.Canceled)
			wantTook(t, start, 0, 0)
			synctest.Wait()
			lines := srv.lines()
			if count(lines, "ROLLBACK") != 1 || lines[len(lines)-1] != "1 close" || slices.Contains(lines, "1 COMMIT") {
				t.Errorf("log: %q", lines)
			}
			if n := db.Stats().OpenConnections; n != 0 {
				t.Errorf("%d connections in the pool", n)
			}
		})
	}
}

func TestAfterTheEndOfCtxNoWaitGoesOut(t *testing.T) {
	t.Parallel()
	for range 200 {
		ctx, cancel := context.WithCancel(t.Context())
		db, srv := newServer(t)
		srv.script = func(_ context.Context, _ int, query string) (int64, error) {
			if query == tryTxQuery {
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
	for _, stuckIn := range []string{tryTxQuery, waitTxQuery} {
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
		wantTook(t, start, 0, time.Second)
		sent := srv.lines()
		if last := sent[len(sent)-1]; last != "1 "+stuckIn {
			t.Errorf("log: %q", sent)
		}
		free()
		wantIdle(t, db)
		if stuckIn == waitTxQuery {
			srv.want(t, append(sent, on(1, "ROLLBACK")...)...)
		} else if srv.open() != 0 { // a try is given up with its session
			t.Errorf("the session is open: %q", srv.lines())
		}
	}
}

// COMMIT is waited for as long as ctx lives.
func TestADriverThatDoesNotReturnFromCommitIsAbandonedWithCtx(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		db, srv := newServer(t)
		back := make(chan struct{})
		srv.script = script(when("COMMIT", func() { <-back }))
		ctx, cancel := context.WithTimeout(t.Context(), time.Hour)
		defer cancel()
		start := time.Now()
		wantError(t, WithTxLock(ctx, db, key, noTx), context.DeadlineExceeded, "advisory: commit bigint 42: ")
		wantTook(t, start, time.Hour, time.Hour+session.Grace+2*abandonAfter)
		close(back)
		synctest.Wait()
		srv.want(t, on(1, "open", "BEGIN", tryTxQuery, "COMMIT", "close")...)
	})
}

func TestFnDoesNotRunUnderAnEndedCtxAtRepeatableRead(t *testing.T) {
	t.Parallel()
	db, srv := newServer(t)
	ctx, cancel := context.WithCancel(t.Context())
	srv.script = script(when(has("BEGIN"), func() { cancel() }))
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

// A server on a platform that cannot check its connections is asked to once, and that costs no lock.
func TestAServerThatDoesNotCheckItsConnectionsIsAskedOnce(t *testing.T) {
	t.Parallel()
	for _, f := range waiters() {
		if !strings.HasPrefix(f.name, "WithConnLock") && !strings.HasPrefix(f.name, "WithTxLock") {
			continue
		}
		for _, contended := range []bool{false, true} {
			bubble(t, fmt.Sprintf("%s, contended %v", f.name, contended), func(t *testing.T) {
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
		}
	}
}
