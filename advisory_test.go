package advisory

import (
	"context"
	"database/sql"
	"errors"
	"io"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/DATA-DOG/go-sqlmock"
	"github.com/google/go-cmp/cmp"
)

// The statements for key, as they must go out.
const (
	tryQuery        = "SELECT WHERE CASE WHEN pg_catalog.pg_is_in_recovery() THEN false ELSE pg_catalog.pg_try_advisory_lock(42) END"
	unlockQuery     = "SELECT WHERE pg_catalog.pg_advisory_unlock(42)"
	unlockLentQuery = "SELECT pg_catalog.pg_advisory_unlock_all() FROM pg_catalog.generate_series(1, CASE WHEN NOT (pg_catalog.pg_advisory_unlock(42)) THEN 0 WHEN pg_catalog.now() OPERATOR(pg_catalog.<>) pg_catalog.statement_timestamp() THEN 2 ELSE 1 END)"
	unlockHeldQuery = "SELECT pg_catalog.pg_advisory_unlock(42) FROM (" + heldQuery + " OFFSET 0) AS held"
	tryCalledQuery  = "SELECT FROM pg_catalog.generate_series(1, CASE WHEN pg_catalog.pg_is_in_recovery() THEN 2 WHEN pg_catalog.now() OPERATOR(pg_catalog.<>) pg_catalog.statement_timestamp() THEN 3 WHEN EXISTS (SELECT FROM pg_catalog.pg_locks WHERE pid OPERATOR(pg_catalog.=) pg_catalog.pg_backend_pid() AND " + heldRow + ") THEN 4 WHEN pg_catalog.pg_try_advisory_lock(42) THEN 1 ELSE 0 END)"
	freeQuery       = "SELECT pg_catalog.pg_advisory_unlock_all()"
	heldPrefix      = "SELECT FROM pg_catalog.pg_locks WHERE pid OPERATOR(pg_catalog.=) pg_catalog.pg_backend_pid() AND granted AND mode OPERATOR(pg_catalog.=) "
	heldRow         = "locktype OPERATOR(pg_catalog.=) 'advisory' AND classid OPERATOR(pg_catalog.=) '0' AND objid OPERATOR(pg_catalog.=) '42' AND objsubid OPERATOR(pg_catalog.=) 1"
	heldQuery       = heldPrefix + "'ExclusiveLock' AND " + heldRow
	beatQuery       = "/* advisory: 42 */ " + beatAnswer
	beatAnswer      = "SELECT FROM pg_catalog.generate_series(1, CASE WHEN pg_catalog.pg_is_in_recovery() THEN 2 WHEN pg_catalog.current_setting('advisory.session', true) OPERATOR(pg_catalog.=) 'N' THEN 1 ELSE 0 END)"
	setQuery        = "SELECT pg_catalog.set_config('advisory.session', 'N', false), pg_catalog.set_config('idle_session_timeout', '15000', false); "
	resetQuery      = "RESET advisory.session; RESET idle_session_timeout; "
	armQuery        = "/* advisory: 42 */ " + setQuery + beatAnswer
	disarmQuery     = resetQuery + unlockQuery
	probeQuery      = "SELECT FROM pg_catalog.generate_series(1, CASE WHEN pg_catalog.pg_is_in_recovery() THEN 2 WHEN true THEN 1 ELSE 0 END)"
	tryTxQuery      = "SELECT WHERE CASE WHEN pg_catalog.pg_is_in_recovery() THEN false ELSE pg_catalog.pg_try_advisory_xact_lock(42) END"
	tryFirstQuery   = "SELECT FROM pg_catalog.generate_series(1, CASE WHEN pg_catalog.current_setting('transaction_isolation') OPERATOR(pg_catalog.=) ANY ('{repeatable read,serializable}') THEN 2 WHEN pg_catalog.pg_is_in_recovery() THEN 0 WHEN pg_catalog.pg_try_advisory_xact_lock(42) THEN 1 ELSE 0 END)"
	savepointQuery  = "SAVEPOINT advisory"
	rollbackToQuery = "ROLLBACK TO SAVEPOINT advisory; RELEASE SAVEPOINT advisory"
	deadlockQuery   = "SELECT FROM pg_catalog.pg_locks WHERE " + heldRow + " AND granted AND database OPERATOR(pg_catalog.=) (SELECT oid FROM pg_catalog.pg_database WHERE datname OPERATOR(pg_catalog.=) pg_catalog.current_database()) AND pg_catalog.pg_backend_pid() OPERATOR(pg_catalog.=) ANY (pg_catalog.pg_blocking_pids(pid))"
	holdersQuery    = `SELECT COALESCE(l.pid, 0), l.granted, l.mode OPERATOR(pg_catalog.=) 'ShareLock',
	COALESCE(a.usename::pg_catalog.text, ''), COALESCE(a.application_name, ''), COALESCE(pg_catalog.host(a.client_addr), ''), COALESCE(a.state, ''),
	CASE WHEN a.query OPERATOR(pg_catalog.=) '<insufficient privilege>' THEN '' ELSE COALESCE(a.query, '') END,
	a.backend_start, l.waitstart
FROM pg_catalog.pg_locks l LEFT JOIN pg_catalog.pg_stat_activity a ON a.pid OPERATOR(pg_catalog.=) l.pid
WHERE l.locktype OPERATOR(pg_catalog.=) 'advisory'
	AND l.classid OPERATOR(pg_catalog.=) $1::pg_catalog.int8::pg_catalog.oid
	AND l.objid OPERATOR(pg_catalog.=) $2::pg_catalog.int8::pg_catalog.oid
	AND l.objsubid OPERATOR(pg_catalog.=) $3::pg_catalog.int4
	AND l.database OPERATOR(pg_catalog.=) (SELECT oid FROM pg_catalog.pg_database WHERE datname OPERATOR(pg_catalog.=) pg_catalog.current_database())
ORDER BY l.granted DESC, l.waitstart, a.backend_start, l.pid`
	tokenQuery = "SELECT pg_catalog.pg_current_xact_id()::pg_catalog.text FROM pg_catalog.pg_logical_emit_message(true, 'advisory', ''), pg_catalog.set_config('synchronous_commit', CASE WHEN pg_catalog.current_setting('synchronous_commit') OPERATOR(pg_catalog.=) 'off' THEN 'local' ELSE pg_catalog.current_setting('synchronous_commit') END, true)"
)

var key = ID(42)

// The statements that wait for key: TestStatementsThatWait has them verbatim.
var (
	armedWaitQuery  = waitStatement(onOwn, "", key, false, sliceMin, sessionSettings{silence: 15 * time.Second, nonce: "N"})
	ownWaitQuery    = waitStatement(onOwn, "", key, false, sliceMin, sessionSettings{})
	calledWaitQuery = waitStatement(onCalled, "", key, false, sliceMin, sessionSettings{})
	waitTxQuery     = waitStatement(inTx, restartStatement, key, false, sliceMin, sessionSettings{})
)

// statement_timeout, or pg_cancel_backend
var err57014 = pgError("57014")

// The functions that hold a lock around fn, and what they send for key.
var closures = []struct {
	name             string
	run              func(ctx context.Context, db *sql.DB, key Key, fn func(context.Context) error, opts ...Option) error
	acquires         []string
	releases, undoes []string // after fn's success; after its failure
}{
	{
		"WithLock", WithLock,
		[]string{"open", tryQuery}, []string{unlockQuery}, []string{unlockQuery},
	},
	{
		"WithLocks", func(ctx context.Context, db *sql.DB, key Key, fn func(context.Context) error, opts ...Option) error {
			return WithLocks(ctx, db, []Key{key}, fn, opts...)
		},
		[]string{"open", tryQuery}, []string{unlockQuery}, []string{unlockQuery},
	},
	{
		"Acquire", func(ctx context.Context, db *sql.DB, key Key, fn func(context.Context) error, opts ...Option) (err error) {
			l, err := Acquire(ctx, db, key, opts...)
			if err != nil {
				return err
			}
			defer func() { err = join(err, l.Release()) }()
			return fn(l.Context())
		},
		[]string{"open", tryQuery}, []string{unlockQuery}, []string{unlockQuery},
	},
	{
		"WithConnLock", func(ctx context.Context, db *sql.DB, key Key, fn func(context.Context) error, opts ...Option) error {
			return WithConnLock(ctx, db, key, func(ctx context.Context, _ *sql.Conn) error { return fn(ctx) }, opts...)
		},
		[]string{"open", tryQuery}, []string{unlockLentQuery}, []string{unlockLentQuery},
	},
	{
		"WithTxLock", func(ctx context.Context, db *sql.DB, key Key, fn func(context.Context) error, opts ...Option) error {
			return WithTxLock(ctx, db, key, func(ctx context.Context, _ *sql.Tx) error { return fn(ctx) }, opts...)
		},
		[]string{"open", "BEGIN", tryFirstQuery}, []string{"COMMIT"}, []string{"ROLLBACK"},
	},
	{
		"WithTxLock at REPEATABLE READ", func(ctx context.Context, db *sql.DB, key Key, fn func(context.Context) error, opts ...Option) error {
			opts = append(opts, TxOptions(&sql.TxOptions{Isolation: sql.LevelRepeatableRead}))
			return WithTxLock(ctx, db, key, func(ctx context.Context, _ *sql.Tx) error { return fn(ctx) }, opts...)
		},
		[]string{"open", tryQuery, "BEGIN REPEATABLE READ"}, []string{"COMMIT", unlockQuery}, []string{"ROLLBACK", unlockQuery},
	},
}

func nothing(context.Context) error { return nil }

// newMock is for statements verbatim, but for nonces and bounds, and in order, and none but those.
func newMock(t *testing.T) (*sql.DB, sqlmock.Sqlmock) {
	t.Helper()
	db, mock, err := sqlmock.New(sqlmock.QueryMatcherOption(sqlmock.QueryMatcherFunc(func(want, got string) error {
		return sqlmock.QueryMatcherEqual.Match(plainly(want), plainly(got))
	})))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := mock.ExpectationsWereMet(); err != nil {
			t.Error(err)
		}
		_ = db.Close() // which the mock did not expect
	})
	return db, mock
}

func TestStatementsOfWithLock(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name   string
		key    Key
		opts   []Option
		expect []string // each is answered with one row, but "0: …" with none
	}{
		{"bigint", ID(8675309), nil, []string{
			"SELECT WHERE CASE WHEN pg_catalog.pg_is_in_recovery() THEN false ELSE pg_catalog.pg_try_advisory_lock(8675309) END",
			"SELECT WHERE pg_catalog.pg_advisory_unlock(8675309)",
		}},
		{"name", Name("nightly-report"), nil, []string{
			"SELECT WHERE CASE WHEN pg_catalog.pg_is_in_recovery() THEN false ELSE pg_catalog.pg_try_advisory_lock(7440995589958059143) END",
			"SELECT WHERE pg_catalog.pg_advisory_unlock(7440995589958059143)",
		}},
		{"pair", Pair(-7, 42), nil, []string{
			"SELECT WHERE CASE WHEN pg_catalog.pg_is_in_recovery() THEN false ELSE pg_catalog.pg_try_advisory_lock(-7, 42) END",
			"SELECT WHERE pg_catalog.pg_advisory_unlock(-7, 42)",
		}},
		{"shared", Pair(-7, 42), []Option{Shared()}, []string{
			"SELECT WHERE CASE WHEN pg_catalog.pg_is_in_recovery() THEN false ELSE pg_catalog.pg_try_advisory_lock_shared(-7, 42) END",
			"SELECT WHERE pg_catalog.pg_advisory_unlock_shared(-7, 42)",
		}},
		{"contended", key, nil, []string{"0: " + tryQuery, armedWaitQuery, disarmQuery}},
		{"contended, shared", key, []Option{Shared()}, []string{
			"0: SELECT WHERE CASE WHEN pg_catalog.pg_is_in_recovery() THEN false ELSE pg_catalog.pg_try_advisory_lock_shared(42) END",
			strings.Replace(armedWaitQuery, "pg_advisory_lock(", "pg_advisory_lock_shared(", 1),
			resetQuery + "SELECT WHERE pg_catalog.pg_advisory_unlock_shared(42)",
		}},
		{"contended, HolderTimeout", key, []Option{HolderTimeout(time.Minute)}, []string{
			"0: " + tryQuery, strings.Replace(armedWaitQuery, "'15000'", "'60000'", 1), disarmQuery,
		}},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			db, mock := newMock(t)
			for _, e := range test.expect {
				query, no := strings.CutPrefix(e, "0: ")
				mock.ExpectExec(query).WithoutArgs().WillReturnResult(sqlmock.NewResult(0, map[bool]int64{true: 0, false: 1}[no]))
			}
			wantError(t, WithLock(t.Context(), db, test.key, nothing, test.opts...))
			if n := db.Stats().OpenConnections; n != 1 {
				t.Errorf("%d connections in the pool, want 1", n)
			}
		})
	}
}

func TestWithLocksSortsAndDropsRepeats(t *testing.T) {
	t.Parallel()
	const (
		try = "SELECT FROM pg_catalog.generate_series(1, CASE" +
			" WHEN pg_catalog.pg_is_in_recovery() THEN 0 WHEN NOT pg_catalog.pg_try_advisory_lock(-5) THEN 0" +
			" WHEN NOT pg_catalog.pg_try_advisory_lock(3) THEN 1" +
			" WHEN NOT pg_catalog.pg_try_advisory_lock(7440995589958059143) THEN 2" +
			" WHEN NOT pg_catalog.pg_try_advisory_lock(-1, 9) THEN 3" +
			" WHEN NOT pg_catalog.pg_try_advisory_lock(1, 0) THEN 4" +
			" ELSE 5 END)"
		unlock = "SELECT WHERE pg_catalog.pg_advisory_unlock(-5) AND pg_catalog.pg_advisory_unlock(3)" +
			" AND pg_catalog.pg_advisory_unlock(7440995589958059143) AND pg_catalog.pg_advisory_unlock(-1, 9) AND pg_catalog.pg_advisory_unlock(1, 0)"
	)
	given := []Key{Pair(1, 0), ID(3), Name("nightly-report"), Pair(-1, 9), ID(-5), ID(3), ID(7440995589958059143), Pair(1, 0)}
	before := slices.Clone(given)
	for range 2 {
		db, mock := newMock(t)
		mock.ExpectExec(try).WithoutArgs().WillReturnResult(sqlmock.NewResult(0, 5))
		mock.ExpectExec(unlock).WithoutArgs().WillReturnResult(sqlmock.NewResult(0, 1))
		wantError(t, WithLocks(t.Context(), db, given, nothing))
		if diff := cmp.Diff(before, given, cmp.Comparer(func(a, b Key) bool { return a == b })); diff != "" {
			t.Errorf("the caller's keys were changed:\n%s", diff)
		}
		slices.Reverse(given)
		slices.Reverse(before)
	}
}

// Several locks are tried together, and if they are not to be had, exactly those that were granted
// are unlocked.
func TestWithLocksContended(t *testing.T) {
	t.Parallel()
	const (
		tries   = "SELECT FROM pg_catalog.generate_series(1, CASE WHEN pg_catalog.pg_is_in_recovery() THEN 0 WHEN NOT pg_catalog.pg_try_advisory_lock(42) THEN 0 WHEN NOT pg_catalog.pg_try_advisory_lock(43) THEN 1 WHEN NOT pg_catalog.pg_try_advisory_lock(44) THEN 2 ELSE 3 END)"
		unlocks = "SELECT WHERE pg_catalog.pg_advisory_unlock(42) AND pg_catalog.pg_advisory_unlock(43) AND pg_catalog.pg_advisory_unlock(44)"
		first   = "SELECT WHERE pg_catalog.pg_advisory_unlock(42)"
		two     = "SELECT WHERE pg_catalog.pg_advisory_unlock(42) AND pg_catalog.pg_advisory_unlock(43)"
	)
	of43 := func(query string) string { return strings.ReplaceAll(query, "42", "43") }
	of44 := func(query string) string { return strings.ReplaceAll(query, "42", "44") }
	for _, test := range []struct {
		name    string
		replies []reply
		opts    []Option
		want    []string
		wants   []any
	}{
		{
			"the first is taken: there is nothing to unlock, and they are taken in order", []reply{refused}, nil,
			on(1, "open", tries, tryQuery, of43(tryQuery), of44(tryQuery), unlocks), nil,
		},
		{
			"the second is taken", []reply{{rows: 1}}, nil,
			on(1, "open", tries, first, tryQuery, of43(tryQuery), of44(tryQuery), unlocks), nil,
		},
		{
			"the third is taken", []reply{{rows: 2}}, nil,
			on(1, "open", tries, two, tryQuery, of43(tryQuery), of44(tryQuery), unlocks), nil,
		},
		{
			"waits for the first on a session that then carries all", []reply{refused, refused}, nil,
			on(1, "open", tries, tryQuery, armedWaitQuery, of43(tryQuery), of44(tryQuery), resetQuery+unlocks), nil,
		},
		{
			"waits for the second on a session of its own", []reply{{rows: 1}, done, granted, refused}, nil,
			slices.Concat(
				on(1, "open", tries, first, tryQuery, of43(tryQuery)), on(2, "open", of43(armedWaitQuery)),
				on(1, of44(tryQuery), "SELECT WHERE pg_catalog.pg_advisory_unlock(42) AND pg_catalog.pg_advisory_unlock(44)"), on(2, of43(disarmQuery)),
			), nil,
		},
		{
			"waits for the second twice", []reply{{rows: 1}, done, granted, refused, refused}, nil,
			slices.Concat(
				on(1, "open", tries, first, tryQuery, of43(tryQuery)), on(2, "open", of43(armedWaitQuery), of43(armedWaitQuery)),
				on(1, of44(tryQuery), "SELECT WHERE pg_catalog.pg_advisory_unlock(42) AND pg_catalog.pg_advisory_unlock(44)"), on(2, of43(disarmQuery)),
			), nil,
		},
		{
			"NoWait, and the first is taken", []reply{refused}, []Option{NoWait()},
			on(1, "open", tries), []any{ErrNotAcquired},
		},
		{
			"NoWait, and the third is taken", []reply{{rows: 2}}, []Option{NoWait()},
			on(1, "open", tries, two), []any{ErrNotAcquired},
		},
		{
			"what cannot be unlocked costs the session", []reply{{rows: 2}, fails(io.ErrUnexpectedEOF), {rows: 3}}, nil,
			slices.Concat(on(1, "open", tries, two, "close"), on(2, "open", tries, unlocks)), nil,
		},
		{
			"so does what was not held any more", []reply{{rows: 2}, refused, done, {rows: 3}}, []Option{NoWait()},
			slices.Concat(on(1, "open", tries, two, freeQuery, "close"), on(2, "open", tries, unlocks)), nil,
		},
		{
			"a deadlock", []reply{refused, granted, refused, fails(pgError("40P01"))}, nil,
			slices.Concat(
				on(1, "open", tries, tryQuery, of43(tryQuery)), on(2, "open", of43(armedWaitQuery), resetQuery+freeQuery, "close"),
				on(1, unlockQuery),
			), []any{ErrDeadlock},
		},
		{
			"one of them was not held any more", []reply{{rows: 3}, refused}, nil,
			on(1, "open", tries, unlocks, freeQuery, "close"), []any{ErrLost, "bigint 42, bigint 43, bigint 44"},
		},
	} {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				db, srv := newServer(t, test.replies...)
				wantError(t, WithLocks(t.Context(), db, []Key{ID(44), ID(43), key}, nothing, test.opts...), test.wants...)
				synctest.Wait()
				srv.want(t, test.want...)
				if n := db.Stats().InUse; n != 0 {
					t.Errorf("%d connections not handed back", n)
				}
			})
		})
	}
}

func TestTimeoutOfSeveralKeysUnlocksThoseAlreadyHeld(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		db, srv := newServer(t)
		waits := taken(t)
		srv.script = func(ctx context.Context, conn int, query string) (int64, error) {
			if waitKey(query) == key {
				return 1, nil
			}
			return waits(ctx, conn, query)
		}
		err := WithLocks(t.Context(), db, []Key{ID(43), key}, nothing, Timeout(300*time.Millisecond))
		wantError(t, err, ErrNotAcquired, "bigint 42, bigint 43: not acquired within 300ms")
		synctest.Wait()
		lines := srv.lines()
		if want := append(on(2, holdersQuery), on(1, disarmQuery)...); !slices.Equal(lines[len(lines)-2:], want) {
			t.Errorf("log: %q", lines)
		}
		wantIdle(t, db)
	})
}

func TestFnRunsBetweenAcquisitionAndRelease(t *testing.T) {
	t.Parallel()
	for _, c := range closures {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			type value struct{}
			db, srv := newServer(t)
			var ctx context.Context
			err := c.run(context.WithValue(t.Context(), value{}, "kept"), db, key, func(fnCtx context.Context) error {
				ctx = fnCtx
				srv.want(t, on(1, c.acquires...)...)
				if fnCtx.Err() != nil || fnCtx.Value(value{}) != "kept" {
					t.Errorf("fn's ctx: %v", fnCtx)
				}
				return nil
			})
			wantError(t, err)
			srv.want(t, on(1, append(slices.Clip(c.acquires), c.releases...)...)...)
			if ctx.Err() == nil {
				t.Error("fn's ctx has not ended with it")
			}
			if n := db.Stats().InUse; n != 0 {
				t.Errorf("%d connections not handed back", n)
			}
			// The connection that is handed back is one to use again.
			wantError(t, c.run(t.Context(), db, key, nothing))
			if srv.opened != 1 {
				t.Errorf("%d connections were made", srv.opened)
			}
		})
	}
}

func TestFnsErrorIsReturnedAsItIsAndTheLockReleased(t *testing.T) {
	t.Parallel()
	for _, c := range closures {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			db, srv := newServer(t)
			mine := errors.New("mine")
			if err := c.run(t.Context(), db, key, func(context.Context) error { return mine }); err != mine {
				t.Errorf("error: %v", err)
			}
			srv.want(t, on(1, append(slices.Clip(c.acquires), c.undoes...)...)...)
		})
	}
}

func TestFnsPanicReleasesAndGoesOnUnchanged(t *testing.T) {
	t.Parallel()
	for _, c := range closures {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			db, srv := newServer(t)
			value := new(int)
			func() {
				defer func() {
					if r := recover(); r != value {
						t.Errorf("recovered %v", r)
					}
				}()
				_ = c.run(t.Context(), db, key, func(context.Context) error { panic(value) })
				t.Error("no panic")
			}()
			srv.want(t, on(1, append(slices.Clip(c.acquires), c.undoes...)...)...)
		})
	}
}

func TestGoexitInFnReleases(t *testing.T) {
	t.Parallel()
	for _, c := range closures {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			db, srv := newServer(t)
			var wg sync.WaitGroup
			returned := false
			wg.Go(func() {
				_ = c.run(t.Context(), db, key, func(context.Context) error {
					runtime.Goexit() // as t.FailNow does
					return nil
				})
				returned = true
			})
			wg.Wait()
			if returned {
				t.Error("Goexit was stopped")
			}
			srv.want(t, on(1, append(slices.Clip(c.acquires), c.undoes...)...)...)
		})
	}
}

func TestAPanicOnALostLockDiscardsAndSaysSoToTheLogger(t *testing.T) {
	t.Parallel()
	db, srv := newServer(t, granted, refused)
	var log logBuffer
	func() {
		defer func() {
			if r := recover(); r != "mine" {
				t.Errorf("recovered %v", r)
			}
		}()
		_ = WithLock(t.Context(), db, key, func(context.Context) error { panic("mine") }, log.option())
	}()
	srv.want(t, on(1, "open", tryQuery, unlockQuery, freeQuery, "close")...)
	if !strings.Contains(log.String(), "lock lost") {
		t.Errorf("log: %q", log.String())
	}
}

func TestFnDoesNotRunWithoutTheLock(t *testing.T) {
	t.Parallel()
	for _, c := range closures {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			db, srv := newServer(t)
			srv.script = func(_ context.Context, _ int, query string) (int64, error) {
				if strings.Contains(query, "pg_try_") {
					return 0, nil
				}
				return 1, nil
			}
			err := c.run(t.Context(), db, key, func(context.Context) error {
				t.Error("fn runs")
				return nil
			}, NoWait())
			wantError(t, err, ErrNotAcquired, "acquire bigint 42")
			if db.Stats().InUse != 0 || srv.open() != 1 {
				t.Error("the connection is as good as before, and was not handed back")
			}
		})
	}
}

func TestAnUnlockThatIsRefusedOrFailsMakesTheErrorErrLostAndDiscards(t *testing.T) {
	t.Parallel()
	mine := errors.New("mine")
	for _, c := range closures {
		if c.name == "WithTxLock" || c.name == "WithTxLock at REPEATABLE READ" {
			continue // tx_test.go
		}
		for _, test := range []struct {
			name  string
			reply reply
			fn    error
			wants []any
		}{
			{"refused", refused, nil, []any{ErrLost, "release bigint 42"}},
			{"refused, and fn failed", refused, mine, []any{ErrLost, mine}},
			{"failed", fails(io.ErrUnexpectedEOF), nil, []any{ErrLost, io.ErrUnexpectedEOF}},
			{"failed, and fn failed", fails(io.ErrUnexpectedEOF), mine, []any{ErrLost, io.ErrUnexpectedEOF, mine}},
			{"the server's own error", fails(pgError("XX000")), nil, []any{ErrLost, pgError("XX000")}},
		} {
			t.Run(c.name+" "+test.name, func(t *testing.T) {
				t.Parallel()
				db, srv := newServer(t, granted, test.reply)
				err := c.run(t.Context(), db, key, func(context.Context) error { return test.fn })
				wantError(t, err, test.wants...)
				want := append(slices.Clip(c.acquires), c.releases...)
				if !sessionGone(test.reply.err) {
					want = append(want, freeQuery)
				}
				srv.want(t, on(1, append(want, "close")...)...)
				if n := db.Stats().OpenConnections; n != 0 {
					t.Errorf("%d connections in the pool", n)
				}
			})
		}
	}
}

func TestACtxThatHasEndedSendsNothing(t *testing.T) {
	t.Parallel()
	for _, c := range closures {
		db, srv := newServer(t)
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		wantError(t, c.run(ctx, db, key, nothing), ErrNotAcquired, context.Canceled)
		srv.want(t)
	}
}

func TestTheEndOfCtxWhileFnRunsEndsFnsCtxAndTheReleaseIsClean(t *testing.T) {
	t.Parallel()
	cause := errors.New("cause")
	for _, i := range []int{0, 1, 3} {
		c := closures[i]
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			db, srv := newServer(t)
			ctx, cancel := context.WithCancelCause(t.Context())
			err := c.run(ctx, db, key, func(fnCtx context.Context) error {
				cancel(cause)
				<-fnCtx.Done()
				return context.Cause(fnCtx)
			})
			if err != cause {
				t.Errorf("error: %v", err)
			}
			srv.want(t, on(1, append(slices.Clip(c.acquires), c.releases...)...)...)
		})
	}
}

func TestTakingAKeyAgainIsErrReentrant(t *testing.T) {
	t.Parallel()
	type acquirer func(ctx context.Context, db *sql.DB, conn *sql.Conn, tx *sql.Tx, key Key) error
	inner := map[string]acquirer{
		"AcquireConn": func(ctx context.Context, _ *sql.DB, conn *sql.Conn, _ *sql.Tx, key Key) error {
			return AcquireConn(ctx, conn, key)
		},
		"AcquireTx": func(ctx context.Context, _ *sql.DB, _ *sql.Conn, tx *sql.Tx, key Key) error {
			return AcquireTx(ctx, tx, key)
		},
		"Lead": func(ctx context.Context, db *sql.DB, _ *sql.Conn, _ *sql.Tx, key Key) error {
			return Lead(ctx, db, key, nothing)
		},
		"WithLocks, among others": func(ctx context.Context, db *sql.DB, _ *sql.Conn, _ *sql.Tx, key Key) error {
			return WithLocks(ctx, db, []Key{ID(1), ID(2), key}, nothing)
		},
	}
	for _, c := range closures {
		inner[c.name] = func(ctx context.Context, db *sql.DB, _ *sql.Conn, _ *sql.Tx, key Key) error {
			return c.run(ctx, db, key, nothing)
		}
	}
	for _, outer := range closures {
		for name, acquire := range inner {
			t.Run(outer.name+" then "+name, func(t *testing.T) {
				t.Parallel()
				db, srv := newServer(t)
				other, _ := newServer(t)
				conn, err := other.Conn(t.Context())
				if err != nil {
					t.Fatal(err)
				}
				defer conn.Close()
				tx, err := other.Begin()
				if err != nil {
					t.Fatal(err)
				}
				defer func() { _ = tx.Rollback() }()

				var ended context.Context
				err = outer.run(t.Context(), db, key, func(ctx context.Context) error {
					ended = ctx
					sent := srv.lines()
					wantError(t, acquire(ctx, db, conn, tx, key), ErrReentrant, "acquire bigint 42")
					derived, cancel := context.WithCancel(ctx)
					defer cancel()
					wantError(t, acquire(derived, db, conn, tx, key), ErrReentrant)
					srv.want(t, sent...)

					wantError(t, acquire(ctx, db, conn, tx, ID(43)))
					wantError(t, acquire(ctx, db, conn, tx, Pair(0, 42)))
					if !strings.HasPrefix(name, "Acquire") || name == "Acquire" {
						wantError(t, acquire(ctx, other, nil, nil, key)) // of another database
					}
					// Two locks deep, the outer one counts as well.
					return WithLock(ctx, db, ID(44), func(ctx context.Context) error {
						wantError(t, acquire(ctx, db, conn, tx, key), ErrReentrant)
						return nil
					})
				})
				wantError(t, err)

				// The lock is released, and what the ctx says of it is history. The
				// ctx itself has ended, too.
				wantError(t, acquire(context.WithoutCancel(ended), db, conn, tx, key))
			})
		}
	}
}

func TestANameIsTheSameLockAsItsNumber(t *testing.T) {
	t.Parallel()
	db, _ := newServer(t)
	wantError(t, WithLock(t.Context(), db, Name("a"), func(ctx context.Context) error {
		wantError(t, WithLock(ctx, db, ID(-3848465438864589366), nothing), ErrReentrant)
		return nil
	}))
}

func TestALockOutlivesTheCtxOfItsAcquisition(t *testing.T) {
	t.Parallel()
	db, srv := newServer(t)
	type value struct{}
	ctx, cancel := context.WithCancel(context.WithValue(t.Context(), value{}, "kept"))
	l, err := Acquire(ctx, db, key)
	wantError(t, err)
	cancel()
	if l.Key() != key {
		t.Errorf("Key() = %v", l.Key())
	}
	if err := l.Context().Err(); err != nil {
		t.Errorf("Context has ended with Acquire's: %v", err)
	}
	if l.Context().Value(value{}) != "kept" {
		t.Error("Context does not carry the values of Acquire's")
	}
	wantError(t, WithLock(l.Context(), db, key, nothing), ErrReentrant)
	wantError(t, l.Release())
	if !errors.Is(context.Cause(l.Context()), context.Canceled) || errors.Is(context.Cause(l.Context()), ErrLost) {
		t.Errorf("cause after Release: %v", context.Cause(l.Context()))
	}
	srv.want(t, on(1, "open", tryQuery, unlockQuery)...)
}

func TestReleaseTwiceIsReleaseOnce(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name  string
		reply reply
		log   []string
		wants []any
	}{
		{"held", granted, on(1, "open", tryQuery, unlockQuery), nil},
		{"lost", refused, on(1, "open", tryQuery, unlockQuery, freeQuery, "close"), []any{ErrLost}},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			db, srv := newServer(t, granted, test.reply)
			l, err := Acquire(t.Context(), db, key)
			wantError(t, err)
			var wg sync.WaitGroup
			for range 8 {
				wg.Go(func() { wantError(t, l.Release(), test.wants...) })
			}
			wg.Wait()
			wantError(t, l.Release(), test.wants...)
			srv.want(t, test.log...)
		})
	}
}

// Whoever works by the context has ended before another can begin.
func TestTheContextEndsBeforeTheUnlockIsSent(t *testing.T) {
	t.Parallel()
	db, srv := newServer(t)
	l, err := Acquire(t.Context(), db, key)
	wantError(t, err)
	srv.script = func(_ context.Context, _ int, query string) (int64, error) {
		if query == unlockQuery && l.Context().Err() == nil {
			t.Error("unlock under a living context")
		}
		return 1, nil
	}
	wantError(t, l.Release())
}

func TestALockThatIsGarbageIsReleasedWithAWarning(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name  string
		reply reply
		log   string
	}{
		{"held", granted, "garbage-collected without Release"},
		{"lost", refused, "lock lost"},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			db, srv := newServer(t)
			released := make(chan struct{})
			srv.script = func(_ context.Context, _ int, query string) (int64, error) {
				if query == unlockQuery {
					defer close(released)
					return test.reply.rows, test.reply.err
				}
				return 1, nil
			}
			var log logBuffer
			ctx := func() context.Context {
				l, err := Acquire(t.Context(), db, key, log.option())
				wantError(t, err)
				runtime.GC() // not while it is in use
				if err := l.Context().Err(); err != nil {
					t.Error(err)
				}
				runtime.KeepAlive(l)
				return l.Context()
			}()
			tick := time.NewTicker(5 * time.Millisecond)
			defer tick.Stop()
			for waiting := true; waiting; {
				select {
				case <-released:
					waiting = false
				case <-tick.C:
					runtime.GC()
				case <-time.After(10 * time.Second):
					t.Fatal("not released")
				}
			}
			<-ctx.Done()
			for range 2000 {
				if strings.Contains(log.String(), test.log) {
					return
				}
				<-tick.C
			}
			t.Errorf("log: %q", log.String())
		})
	}
}

func TestReleaseStopsTheWarning(t *testing.T) {
	t.Parallel()
	db, srv := newServer(t)
	var log logBuffer
	func() {
		l, err := Acquire(t.Context(), db, key, log.option())
		wantError(t, err)
		wantError(t, l.Release())
	}()
	runtime.GC()
	runtime.GC()
	srv.want(t, on(1, "open", tryQuery, unlockQuery)...)
	if log.String() != "" {
		t.Errorf("log: %q", log.String())
	}
}
