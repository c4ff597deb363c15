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
	tryQuery        = "SELECT WHERE pg_catalog.pg_try_advisory_lock(42)"
	waitQuery       = "SELECT pg_catalog.set_config('lock_timeout', '400', true), pg_catalog.pg_advisory_lock(42)"
	waitAgainQuery  = waitQuery + " WHERE NOT EXISTS (" + heldQuery + ")"
	armedWaitQuery  = "SET idle_session_timeout = 15000; " + waitQuery
	unlockQuery     = "SELECT WHERE pg_catalog.pg_advisory_unlock(42)"
	unlockAllQuery  = "SELECT pg_catalog.pg_advisory_unlock_all() WHERE pg_catalog.pg_advisory_unlock(42)"
	unlockLentQuery = "SELECT pg_catalog.pg_advisory_unlock_all() FROM pg_catalog.generate_series(1, CASE WHEN NOT (pg_catalog.pg_advisory_unlock(42)) THEN 0 WHEN pg_catalog.now() OPERATOR(pg_catalog.<>) pg_catalog.statement_timestamp() THEN 2 ELSE 1 END)"
	freeQuery       = "SELECT pg_catalog.pg_advisory_unlock_all()"
	clearQuery      = "ROLLBACK; SELECT pg_catalog.pg_advisory_unlock_all()"
	clearArmedQuery = "ROLLBACK; RESET idle_session_timeout; SELECT pg_catalog.pg_advisory_unlock_all()"
	heldPrefix      = "SELECT FROM pg_catalog.pg_locks WHERE pid OPERATOR(pg_catalog.=) pg_catalog.pg_backend_pid() AND granted AND mode OPERATOR(pg_catalog.=) "
	heldRow         = "locktype OPERATOR(pg_catalog.=) 'advisory' AND classid OPERATOR(pg_catalog.=) '0' AND objid OPERATOR(pg_catalog.=) '42' AND objsubid OPERATOR(pg_catalog.=) 1"
	heldQuery       = heldPrefix + "'ExclusiveLock' AND (" + heldRow + ")"
	heldShared      = heldPrefix + "'ShareLock' AND (" + heldRow + ")"
	armQuery        = "SET idle_session_timeout = 15000; " + heldQuery
	disarmQuery     = "RESET idle_session_timeout; " + unlockQuery
	disarmAllQuery  = "RESET idle_session_timeout; " + unlockAllQuery
	tryTxQuery      = "SELECT WHERE pg_catalog.pg_try_advisory_xact_lock(42)"
	tryFirstQuery   = "SELECT FROM pg_catalog.generate_series(1, CASE WHEN pg_catalog.current_setting('transaction_isolation') OPERATOR(pg_catalog.=) ANY ('{repeatable read,serializable}') THEN 2 WHEN pg_catalog.pg_try_advisory_xact_lock(42) THEN 1 ELSE 0 END)"
	waitTxQuery     = "WITH old AS MATERIALIZED (SELECT pg_catalog.current_setting('lock_timeout') AS lock_timeout) SELECT pg_catalog.set_config('lock_timeout', '400', true), pg_catalog.pg_advisory_xact_lock(42), pg_catalog.set_config('lock_timeout', old.lock_timeout, true) FROM old"
	savepointQuery  = "SAVEPOINT advisory"
	rollbackToQuery = "ROLLBACK TO SAVEPOINT advisory; RELEASE SAVEPOINT advisory"
	deadlockQuery   = "SELECT FROM pg_catalog.pg_locks WHERE " + heldRow + " AND granted AND database OPERATOR(pg_catalog.=) (SELECT oid FROM pg_catalog.pg_database WHERE datname OPERATOR(pg_catalog.=) pg_catalog.current_database()) AND pg_catalog.pg_backend_pid() OPERATOR(pg_catalog.=) ANY (pg_catalog.pg_blocking_pids(pid))"
	holdersQuery    = `SELECT coalesce(l.pid, 0), l.granted, l.mode = 'ShareLock',
	coalesce(a.usename::text, ''), coalesce(a.application_name, ''), coalesce(pg_catalog.host(a.client_addr), ''), coalesce(a.state, ''),
	CASE WHEN a.query = '<insufficient privilege>' THEN '' ELSE coalesce(a.query, '') END,
	a.backend_start, l.waitstart
FROM pg_catalog.pg_locks l LEFT JOIN pg_catalog.pg_stat_activity a ON a.pid = l.pid
WHERE l.locktype = 'advisory' AND l.classid = $1::bigint::oid AND l.objid = $2::bigint::oid AND l.objsubid = $3::int
	AND l.database = (SELECT oid FROM pg_catalog.pg_database WHERE datname = pg_catalog.current_database())
ORDER BY l.granted DESC, l.waitstart, a.backend_start, l.pid`
	tokenQuery = "SELECT pg_catalog.pg_current_xact_id()::pg_catalog.text FROM pg_catalog.pg_logical_emit_message(true, 'advisory', ''), pg_catalog.set_config('synchronous_commit', CASE pg_catalog.current_setting('synchronous_commit') WHEN 'off' THEN 'local' ELSE pg_catalog.current_setting('synchronous_commit') END, true)"
)

var key = ID(42)

// statement time-out and lock time-out
var (
	err55P03 = pgError("55P03")
	err57014 = pgError("57014")
)

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

// newMock is for statements verbatim and in order, and none but those.
func newMock(t *testing.T) (*sql.DB, sqlmock.Sqlmock) {
	t.Helper()
	db, mock, err := sqlmock.New(sqlmock.QueryMatcherOption(sqlmock.QueryMatcherEqual))
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
			"SELECT WHERE pg_catalog.pg_try_advisory_lock(8675309)",
			"SELECT WHERE pg_catalog.pg_advisory_unlock(8675309)",
		}},
		{"name", Name("nightly-report"), nil, []string{
			"SELECT WHERE pg_catalog.pg_try_advisory_lock(7440995589958059143)",
			"SELECT WHERE pg_catalog.pg_advisory_unlock(7440995589958059143)",
		}},
		{"pair", Pair(-7, 42), nil, []string{
			"SELECT WHERE pg_catalog.pg_try_advisory_lock(-7, 42)",
			"SELECT WHERE pg_catalog.pg_advisory_unlock(-7, 42)",
		}},
		{"shared", Pair(-7, 42), []Option{Shared()}, []string{
			"SELECT WHERE pg_catalog.pg_try_advisory_lock_shared(-7, 42)",
			"SELECT WHERE pg_catalog.pg_advisory_unlock_shared(-7, 42)",
		}},
		{"contended", key, nil, []string{"0: " + tryQuery, armedWaitQuery, disarmQuery}},
		{"contended, shared", key, []Option{Shared()}, []string{
			"0: SELECT WHERE pg_catalog.pg_try_advisory_lock_shared(42)",
			"SET idle_session_timeout = 15000; SELECT pg_catalog.set_config('lock_timeout', '400', true), pg_catalog.pg_advisory_lock_shared(42)",
			"RESET idle_session_timeout; SELECT WHERE pg_catalog.pg_advisory_unlock_shared(42)",
		}},
		{"contended, HolderTimeout", key, []Option{HolderTimeout(time.Minute)}, []string{
			"0: " + tryQuery, "SET idle_session_timeout = 60000; " + waitQuery, disarmQuery,
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
		keys = "%s(-5) AND %s(3) AND %s(7440995589958059143) AND %s(-1, 9) AND %s(1, 0)"
		try  = "pg_catalog.pg_try_advisory_lock"
		open = "pg_catalog.pg_advisory_unlock"
	)
	given := []Key{Pair(1, 0), ID(3), Name("nightly-report"), Pair(-1, 9), ID(-5), ID(3), ID(7440995589958059143), Pair(1, 0)}
	before := slices.Clone(given)
	for range 2 {
		db, mock := newMock(t)
		mock.ExpectExec("SELECT WHERE " + strings.ReplaceAll(keys, "%s", try)).WillReturnResult(sqlmock.NewResult(0, 1))
		mock.ExpectExec("SELECT WHERE " + strings.ReplaceAll(keys, "%s", open)).WillReturnResult(sqlmock.NewResult(0, 1))
		wantError(t, WithLocks(t.Context(), db, given, nothing))
		if diff := cmp.Diff(before, given, cmp.Comparer(func(a, b Key) bool { return a == b })); diff != "" {
			t.Errorf("the caller's keys were changed:\n%s", diff)
		}
		slices.Reverse(given)
		slices.Reverse(before)
	}
}

func TestWithLocksContended(t *testing.T) {
	t.Parallel()
	const (
		tries    = "SELECT WHERE pg_catalog.pg_try_advisory_lock(42) AND pg_catalog.pg_try_advisory_lock(43)"
		unlocks  = "SELECT WHERE pg_catalog.pg_advisory_unlock(42) AND pg_catalog.pg_advisory_unlock(43)"
		freeKeys = "SELECT pg_catalog.pg_advisory_unlock(42), pg_catalog.pg_advisory_unlock(43)"
	)
	second := func(query string) string { return strings.ReplaceAll(query, "42", "43") }
	for _, test := range []struct {
		name    string
		replies []reply
		opts    []Option
		want    []string
		wants   []any
	}{
		{
			"frees what the try took, and takes them in order", []reply{refused}, nil,
			on(1, "open", tries, freeKeys, tryQuery, second(tryQuery), unlocks), nil,
		},
		{
			"waits for the first on a session that then carries both", []reply{refused, done, refused}, nil,
			on(1, "open", tries, freeKeys, tryQuery, armedWaitQuery, second(tryQuery), "RESET idle_session_timeout; "+unlocks), nil,
		},
		{
			"waits for the second on a session of its own", []reply{refused, done, granted, refused}, nil,
			slices.Concat(
				on(1, "open", tries, freeKeys, tryQuery, second(tryQuery)), on(2, "open", second(armedWaitQuery)),
				on(1, unlockQuery), on(2, second(disarmQuery)),
			), nil,
		},
		{
			"a wait that failed may have been granted", []reply{refused, done, granted, refused, fails(err55P03)}, nil,
			slices.Concat(
				on(1, "open", tries, freeKeys, tryQuery, second(tryQuery)), on(2, "open", second(armedWaitQuery), second(armedWaitQuery)),
				on(1, unlockQuery), on(2, second(disarmAllQuery)),
			), nil,
		},
		{
			"NoWait frees what the try took", []reply{refused}, []Option{NoWait()},
			on(1, "open", tries, freeKeys), []any{ErrNotAcquired},
		},
		{
			"what cannot be freed is discarded", []reply{refused, fails(io.ErrUnexpectedEOF)}, nil,
			slices.Concat(on(1, "open", tries, freeKeys, "close"), on(2, "open", tries, unlocks)), nil,
		},
		{
			"a deadlock", []reply{refused, done, granted, refused, fails(pgError("40P01"))}, nil,
			slices.Concat(
				on(1, "open", tries, freeKeys, tryQuery, second(tryQuery)), on(2, "open", second(armedWaitQuery), clearQuery, "close"),
				on(1, unlockQuery),
			), []any{ErrDeadlock},
		},
		{
			"one of them was not held any more", []reply{granted, refused}, nil,
			on(1, "open", tries, unlocks, clearQuery, "close"), []any{ErrLost, "bigint 42, bigint 43"},
		},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			db, srv := newServer(t, test.replies...)
			wantError(t, WithLocks(t.Context(), db, []Key{ID(43), key}, nothing, test.opts...), test.wants...)
			srv.want(t, test.want...)
		})
	}
}

func TestTimeoutOfSeveralKeysFreesThoseAlreadyHeld(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		db, srv := newServer(t)
		srv.script = func(_ context.Context, _ int, query string) (int64, error) {
			switch {
			case strings.Contains(query, "try"):
				return 0, nil
			case strings.Contains(query, "_advisory_lock(43)"):
				time.Sleep(300 * time.Millisecond)
				return 0, err55P03
			}
			return 1, nil
		}
		err := WithLocks(t.Context(), db, []Key{ID(43), key}, nothing, Timeout(300*time.Millisecond))
		wantError(t, err, ErrNotAcquired, "bigint 42, bigint 43: not acquired within 300ms")
		lines := srv.lines()
		if want := slices.Concat(on(2, freeQuery), on(1, disarmQuery)); !slices.Equal(lines[len(lines)-2:], want) {
			t.Errorf("log: %q", lines)
		}
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
	srv.want(t, on(1, "open", tryQuery, unlockQuery, clearQuery, "close")...)
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
					want = append(want, clearQuery)
				}
				srv.want(t, on(1, append(want, "close")...)...)
				if n := db.Stats().OpenConnections; n != 0 {
					t.Errorf("%d connections in the pool", n)
				}
			})
		}
	}
}

// Of a contended acquisition, each statement in turn is the one in which the
// context ends, and drivers differ in what they make of it.
func TestTheEndOfCtxAtEachStepDiscardsTheConnection(t *testing.T) {
	t.Parallel()
	cause := errors.New("cause")
	session := []reply{refused, fails(err55P03), granted}
	acquireConn := func(ctx context.Context, db *sql.DB, _ Key, _ func(context.Context) error, _ ...Option) error {
		conn, err := db.Conn(context.Background())
		if err != nil {
			return err
		}
		defer conn.Close()
		return AcquireConn(ctx, conn, key)
	}
	for _, c := range []struct {
		name    string
		run     func(ctx context.Context, db *sql.DB, key Key, fn func(context.Context) error, opts ...Option) error
		replies []reply
		many    bool // the try is on a session of many: its answer is waited for a moment
	}{
		{"WithLock", closures[0].run, session, true},
		{"Acquire", closures[2].run, session, true},
		{"WithConnLock", closures[3].run, session, false},
		{"AcquireConn", acquireConn, session, false},
		{"WithTxLock", closures[4].run, []reply{done, refused, fails(err55P03), done, done, granted}, false},
		{"WithTxLock at REPEATABLE READ", closures[5].run, append(slices.Clip(session), done), false},
	} {
		for step := range c.replies {
			for manner, answer := range map[string]func(context.Context, reply) reply{
				"context error":   func(ctx context.Context, _ reply) reply { return fails(ctx.Err()) },
				"server's cancel": func(context.Context, reply) reply { return fails(err57014) },
				"as if nothing":   func(_ context.Context, r reply) reply { return r },
			} {
				t.Run(c.name+" "+manner, func(t *testing.T) {
					synctest.Test(t, func(t *testing.T) {
						ctx, cancel := context.WithCancelCause(t.Context())
						replies := slices.Clone(c.replies)
						db, srv := newServer(t)
						answers := inOrder(replies...)
						var sent int
						srv.script = func(stmtCtx context.Context, conn int, query string) (int64, error) {
							rows, err := answers(stmtCtx, conn, query)
							if sent++; sent == step+1 {
								cancel(cause)
								if query == "ROLLBACK" {
									return rows, err
								}
								r := answer(ctx, reply{rows, err})
								return r.rows, r.err
							}
							return rows, err
						}
						err := c.run(ctx, db, key, func(context.Context) error {
							t.Errorf("step %d: fn runs", step)
							return nil
						})
						wantError(t, err, ErrNotAcquired, context.Canceled, cause, "acquire bigint 42", "cause")
						synctest.Wait()
						left := 0
						if c.many && step == 0 && manner == "as if nothing" {
							left = 1 // it has been refused: the session holds nothing
						}
						if srv.opened != 1 || srv.open() != left || db.Stats().Idle != left {
							t.Errorf("step %d: %d of %d connections still open; log: %q", step, srv.open(), srv.opened, srv.lines())
						}
						for _, line := range srv.lines()[step+2:] {
							if line != "1 ROLLBACK" && line != "1 "+clearQuery && line != "1 "+clearArmedQuery && line != "1 close" {
								t.Errorf("step %d: sent afterwards: %s", step, line)
							}
						}
					})
				})
			}
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
		{"lost", refused, on(1, "open", tryQuery, unlockQuery, clearQuery, "close"), []any{ErrLost}},
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
