package advisory

import (
	"context"
	"database/sql"
	"math"
	"strings"
	"testing"
	"time"

	"github.com/DATA-DOG/go-sqlmock"
	"github.com/google/go-cmp/cmp"

	"github.com/pgadvisory/advisory/internal/pgsql"
)

// The statements for key, as they must go out.
const (
	tryQuery           = "SELECT WHERE CASE WHEN pg_catalog.pg_is_in_recovery() THEN false ELSE pg_catalog.pg_try_advisory_lock(42) END"
	unlockQuery        = "SELECT WHERE pg_catalog.pg_advisory_unlock(42)"
	unlockExposedQuery = "SELECT pg_catalog.pg_advisory_unlock_all() FROM pg_catalog.generate_series(1, CASE WHEN NOT (pg_catalog.pg_advisory_unlock(42)) THEN 0 WHEN pg_catalog.now() OPERATOR(pg_catalog.<>) pg_catalog.statement_timestamp() THEN 2 ELSE 1 END)"
	unlockHeldQuery    = "SELECT CASE WHEN objsubid OPERATOR(pg_catalog.=) 2 THEN pg_catalog.pg_advisory_unlock(classid::pg_catalog.int4, objid::pg_catalog.int4) ELSE pg_catalog.pg_advisory_unlock((classid::pg_catalog.int8 OPERATOR(pg_catalog.<<) 32) OPERATOR(pg_catalog.|) objid::pg_catalog.int8) END FROM (SELECT classid, objid, objsubid FROM pg_catalog.pg_locks WHERE pid OPERATOR(pg_catalog.=) pg_catalog.pg_backend_pid() AND granted AND mode OPERATOR(pg_catalog.=) 'ExclusiveLock' AND (" + heldRow + ") OFFSET 0) AS held"
	tryCalledQuery     = "SELECT FROM pg_catalog.generate_series(1, CASE WHEN pg_catalog.pg_is_in_recovery() THEN 2 WHEN pg_catalog.now() OPERATOR(pg_catalog.<>) pg_catalog.statement_timestamp() THEN 3 WHEN EXISTS (SELECT FROM pg_catalog.pg_locks WHERE pid OPERATOR(pg_catalog.=) pg_catalog.pg_backend_pid() AND " + heldRow + ") THEN 4 WHEN pg_catalog.pg_try_advisory_lock(42) THEN 1 ELSE 0 END)"
	freeQuery          = "SELECT pg_catalog.pg_advisory_unlock_all()"
	heldRow            = "locktype OPERATOR(pg_catalog.=) 'advisory' AND classid OPERATOR(pg_catalog.=) '0' AND objid OPERATOR(pg_catalog.=) '42' AND objsubid OPERATOR(pg_catalog.=) 1"
	beatQuery          = "/* advisory: 42 */ " + beatAnswer
	beatAnswer         = "SELECT FROM pg_catalog.generate_series(1, CASE WHEN pg_catalog.pg_is_in_recovery() THEN 2 WHEN pg_catalog.current_setting('advisory.session', true) OPERATOR(pg_catalog.=) 'N' THEN 1 ELSE 0 END)"
	setQuery           = "SELECT pg_catalog.set_config('advisory.session', 'N', false), pg_catalog.set_config('idle_session_timeout', '15000', false); "
	resetQuery         = "RESET advisory.session; RESET idle_session_timeout; "
	armQuery           = "/* advisory: 42 */ " + setQuery + beatAnswer
	disarmQuery        = resetQuery + unlockQuery
	probeQuery         = "SELECT FROM pg_catalog.generate_series(1, CASE WHEN pg_catalog.pg_is_in_recovery() THEN 2 WHEN true THEN 1 ELSE 0 END)"
	callersTryQuery    = "SELECT FROM pg_catalog.generate_series(1, CASE WHEN pg_catalog.pg_is_in_recovery() THEN 2 WHEN pg_catalog.pg_try_advisory_xact_lock(42) THEN 1 ELSE 0 END)"
	tryTxQuery         = "SELECT FROM pg_catalog.generate_series(1, CASE WHEN pg_catalog.current_setting('transaction_isolation') OPERATOR(pg_catalog.=) ANY ('{repeatable read,serializable}') THEN 5 WHEN pg_catalog.pg_is_in_recovery() THEN 0 WHEN pg_catalog.pg_try_advisory_xact_lock(42) THEN 1 ELSE 0 END)"
	savepointQuery     = "SAVEPOINT advisory"
	rollbackToQuery    = "ROLLBACK TO SAVEPOINT advisory; RELEASE SAVEPOINT advisory"
	deadlockQuery      = "SELECT FROM pg_catalog.pg_locks WHERE " + heldRow + " AND granted AND database OPERATOR(pg_catalog.=) (SELECT oid FROM pg_catalog.pg_database WHERE datname OPERATOR(pg_catalog.=) pg_catalog.current_database()) AND pg_catalog.pg_backend_pid() OPERATOR(pg_catalog.=) ANY (pg_catalog.pg_blocking_pids(pid))"
	holdersQuery       = `SELECT COALESCE(l.pid, 0), l.granted, l.mode OPERATOR(pg_catalog.=) 'ShareLock',
	COALESCE(a.usename::pg_catalog.text, ''), COALESCE(a.application_name, ''), COALESCE(pg_catalog.host(a.client_addr), ''), COALESCE(a.state, ''),
	CASE WHEN a.query OPERATOR(pg_catalog.=) '<insufficient privilege>' THEN '' ELSE COALESCE(a.query, '') END,
	a.backend_start, l.waitstart
FROM pg_catalog.pg_locks l LEFT JOIN pg_catalog.pg_stat_activity a ON a.pid OPERATOR(pg_catalog.=) l.pid
WHERE l.locktype OPERATOR(pg_catalog.=) 'advisory'
	AND l.database OPERATOR(pg_catalog.=) (SELECT oid FROM pg_catalog.pg_database WHERE datname OPERATOR(pg_catalog.=) pg_catalog.current_database())
	AND l.classid OPERATOR(pg_catalog.=) $1::pg_catalog.int8::pg_catalog.oid
	AND l.objid OPERATOR(pg_catalog.=) $2::pg_catalog.int8::pg_catalog.oid
	AND l.objsubid OPERATOR(pg_catalog.=) $3::pg_catalog.int4
ORDER BY l.granted DESC, l.waitstart, a.backend_start, l.pid`
	tokenQuery = "SELECT pg_catalog.pg_current_xact_id()::pg_catalog.text FROM pg_catalog.pg_logical_emit_message(true, 'advisory', ''), pg_catalog.set_config('synchronous_commit', CASE WHEN pg_catalog.current_setting('synchronous_commit') OPERATOR(pg_catalog.=) 'off' THEN 'local' ELSE pg_catalog.current_setting('synchronous_commit') END, true)"
)

// The statements that wait for key: TestStatementsThatWait has them verbatim.
var (
	armedWaitQuery  = commentedWait(pgsql.OnOwn, "", key.key, false, sliceMin, pgsql.Settings{IdleTimeout: 15 * time.Second, Nonce: "N"})
	ownWaitQuery    = commentedWait(pgsql.OnOwn, "", key.key, false, sliceMin, pgsql.Settings{})
	calledWaitQuery = commentedWait(pgsql.OnCallers, "", key.key, false, sliceMin, pgsql.Settings{})
	waitTxQuery     = commentedWait(pgsql.InTx, pgsql.Restart+"; ", key.key, false, sliceMin, pgsql.Settings{})
)

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

// The statements that wait. What they are, verbatim, is tested where they are made.
func TestStatementsThatWait(t *testing.T) {
	t.Parallel()
	watched := pgsql.Settings{IdleTimeout: 15 * time.Second, Nonce: "N"}
	minute, exposed := watched, watched
	minute.IdleTimeout, exposed.Exposed = time.Minute, true
	wait := func(on pgsql.Place, restart string, k Key, shared bool, w pgsql.Settings) string {
		return commentedWait(on, restart, k.key, shared, 100*time.Millisecond, w)
	}
	withLock := func(ctx context.Context, on target, k Key, opts ...Option) error {
		return WithLock(ctx, on.db, k, nothing, opts...)
	}
	withConnLock := func(ctx context.Context, on target, k Key, opts ...Option) error {
		return WithConnLock(ctx, on.db, k, func(context.Context, *sql.Conn) error { return nil }, opts...)
	}
	acquireConn := func(ctx context.Context, on target, k Key, opts ...Option) error {
		return AcquireConn(ctx, on.conn, k, opts...)
	}
	withTxLock := func(ctx context.Context, on target, k Key, opts ...Option) error {
		return WithTxLock(ctx, on.db, k, noTx, opts...)
	}
	for _, test := range []struct {
		name string
		run  func(ctx context.Context, on target, k Key, opts ...Option) error
		key  Key
		opts []Option
		want string
	}{
		{"a session of ours, which the server is to watch", withLock, key, nil, wait(pgsql.OnOwn, "", key, false, watched)},
		{"HolderTimeout", withLock, key, []Option{HolderTimeout(time.Minute)}, wait(pgsql.OnOwn, "", key, false, minute)},
		{"one that it is not to watch", withConnLock, key, nil, wait(pgsql.OnOwn, "", key, false, pgsql.Settings{})},
		{"one that fn uses, and that is to be watched", withConnLock, key, []Option{HolderTimeout(15 * time.Second)}, wait(pgsql.OnOwn, "", key, false, exposed)},
		{"the caller's session", acquireConn, key, nil, wait(pgsql.OnCallers, "", key, false, pgsql.Settings{})},
		{"the caller's session, shared, a pair", acquireConn, Pair(-7, 42), []Option{Shared()}, wait(pgsql.OnCallers, "", Pair(-7, 42), true, pgsql.Settings{})},
		{"a transaction", withTxLock, key, nil, wait(pgsql.InTx, pgsql.Restart+"; ", key, false, pgsql.Settings{})},
		{
			"a transaction with a HolderTimeout, shared, a pair", withTxLock, Pair(1, -2147483648), []Option{HolderTimeout(time.Minute), Shared()},
			wait(pgsql.InTx, pgsql.Restart+"; "+pgsql.TxIdleTimeout(time.Minute), Pair(1, -2147483648), true, pgsql.Settings{}),
		},
		{"the smallest number", withConnLock, ID(math.MinInt64), nil, wait(pgsql.OnOwn, "", ID(math.MinInt64), false, pgsql.Settings{})},
		{"a name", withConnLock, Name("a */ b'; --"), nil, wait(pgsql.OnOwn, "", Name("a */ b'; --"), false, pgsql.Settings{})},
	} {
		bubble(t, test.name, func(t *testing.T) {
			on, srv := newTarget(t)
			var waits []string
			srv.script = func(_ context.Context, _ int, query string) (int64, error) {
				switch {
				case isWait(query):
					waits = append(waits, plainly(query))
					return int64(len(waits) - 1), nil // the second one is granted
				case isTry(query):
					return 0, nil
				}
				return 1, nil
			}
			wantError(t, test.run(t.Context(), on, test.key, test.opts...))
			if diff := cmp.Diff([]string{test.want, test.want}, waits); diff != "" {
				t.Errorf("waits (-want +got):\n%s", diff)
			}
		})
	}
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

// commentedWait is pgsql.Wait with the comment that it has where nothing else waits.
func commentedWait(on pgsql.Place, restart string, k pgsql.Key, shared bool, bound time.Duration, w pgsql.Settings) string {
	return pgsql.Comment([]pgsql.Key{k}, "") + pgsql.Wait(on, restart, k, shared, bound, w)
}
