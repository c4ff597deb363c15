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
	unlockHeldQuery    = "SELECT pg_catalog.pg_advisory_unlock(42) FROM (" + heldQuery + " OFFSET 0) AS held"
	tryCalledQuery     = "SELECT FROM pg_catalog.generate_series(1, CASE WHEN pg_catalog.pg_is_in_recovery() THEN 2 WHEN pg_catalog.now() OPERATOR(pg_catalog.<>) pg_catalog.statement_timestamp() THEN 3 WHEN EXISTS (SELECT FROM pg_catalog.pg_locks WHERE pid OPERATOR(pg_catalog.=) pg_catalog.pg_backend_pid() AND " + heldRow + ") THEN 4 WHEN pg_catalog.pg_try_advisory_lock(42) THEN 1 ELSE 0 END)"
	freeQuery          = "SELECT pg_catalog.pg_advisory_unlock_all()"
	heldPrefix         = "SELECT FROM pg_catalog.pg_locks WHERE pid OPERATOR(pg_catalog.=) pg_catalog.pg_backend_pid() AND granted AND mode OPERATOR(pg_catalog.=) "
	heldRow            = "locktype OPERATOR(pg_catalog.=) 'advisory' AND classid OPERATOR(pg_catalog.=) '0' AND objid OPERATOR(pg_catalog.=) '42' AND objsubid OPERATOR(pg_catalog.=) 1"
	heldQuery          = heldPrefix + "'ExclusiveLock' AND " + heldRow
	beatQuery          = "/* advisory: 42 */ " + beatAnswer
	beatAnswer         = "SELECT FROM pg_catalog.generate_series(1, CASE WHEN pg_catalog.pg_is_in_recovery() THEN 2 WHEN pg_catalog.current_setting('advisory.session', true) OPERATOR(pg_catalog.=) 'N' THEN 1 ELSE 0 END)"
	setQuery           = "SELECT pg_catalog.set_config('advisory.session', 'N', false), pg_catalog.set_config('idle_session_timeout', '15000', false); "
	resetQuery         = "RESET advisory.session; RESET idle_session_timeout; "
	armQuery           = "/* advisory: 42 */ " + setQuery + beatAnswer
	disarmQuery        = resetQuery + unlockQuery
	probeQuery         = "SELECT FROM pg_catalog.generate_series(1, CASE WHEN pg_catalog.pg_is_in_recovery() THEN 2 WHEN true THEN 1 ELSE 0 END)"
	tryTxQuery         = "SELECT WHERE CASE WHEN pg_catalog.pg_is_in_recovery() THEN false ELSE pg_catalog.pg_try_advisory_xact_lock(42) END"
	tryFirstQuery      = "SELECT FROM pg_catalog.generate_series(1, CASE WHEN pg_catalog.current_setting('transaction_isolation') OPERATOR(pg_catalog.=) ANY ('{repeatable read,serializable}') THEN 2 WHEN pg_catalog.pg_is_in_recovery() THEN 0 WHEN pg_catalog.pg_try_advisory_xact_lock(42) THEN 1 ELSE 0 END)"
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
	armedWaitQuery  = pgsql.Wait(pgsql.OnOwn, "", key.key, false, sliceMin, pgsql.Settings{Silence: 15 * time.Second, Nonce: "N"})
	ownWaitQuery    = pgsql.Wait(pgsql.OnOwn, "", key.key, false, sliceMin, pgsql.Settings{})
	calledWaitQuery = pgsql.Wait(pgsql.OnCalled, "", key.key, false, sliceMin, pgsql.Settings{})
	waitTxQuery     = pgsql.Wait(pgsql.InTx, pgsql.Restart, key.key, false, sliceMin, pgsql.Settings{})
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

// The statements that wait, verbatim.
func TestStatementsThatWait(t *testing.T) {
	t.Parallel()
	const (
		bound = "SELECT pg_catalog.set_config('lock_timeout', pg_catalog.ceil(LEAST(100, " +
			"pg_catalog.date_part('epoch', pg_catalog.current_setting('deadlock_timeout')::pg_catalog.interval) OPERATOR(pg_catalog.*) 500))::pg_catalog.text, true), " +
			"pg_catalog.set_config('advisory.granted', '', true), "
		old     = "WITH old AS MATERIALIZED (SELECT pg_catalog.current_setting('lock_timeout') AS lock_timeout) "
		bigint  = "(pg_catalog.current_setting('advisory.key')::pg_catalog.int8), "
		pair    = "(pg_catalog.current_setting('advisory.class')::pg_catalog.int4, pg_catalog.current_setting('advisory.object')::pg_catalog.int4), "
		arm     = ", pg_catalog.set_config('advisory.nonce', 'N', true), pg_catalog.set_config('advisory.silence', '15000', true)"
		arms    = "pg_catalog.set_config('advisory.session', pg_catalog.current_setting('advisory.nonce'), false), pg_catalog.set_config('idle_session_timeout', pg_catalog.current_setting('advisory.silence'), false), "
		granted = "pg_catalog.set_config('advisory.granted', '1', true)"
		caught  = "; EXCEPTION WHEN lock_not_available OR query_canceled THEN "
		frees   = "PERFORM pg_catalog.pg_advisory_unlock_all();"
		looks   = "PERFORM " + granted + " FROM (SELECT FROM pg_catalog.pg_locks WHERE pid OPERATOR(pg_catalog.=) pg_catalog.pg_backend_pid() AND granted" +
			" AND mode OPERATOR(pg_catalog.=) 'ExclusiveLock' AND locktype OPERATOR(pg_catalog.=) 'advisory'" +
			" AND classid OPERATOR(pg_catalog.=) pg_catalog.current_setting('advisory.classid')::pg_catalog.oid" +
			" AND objid OPERATOR(pg_catalog.=) pg_catalog.current_setting('advisory.objid')::pg_catalog.oid AND objsubid OPERATOR(pg_catalog.=) 1) AS held;"
		doBare = "; DO $advisory$BEGIN PERFORM pg_catalog."
		endOf  = " END$advisory$; "
		rows   = "SELECT FROM pg_catalog.generate_series(1, CASE WHEN pg_catalog.pg_is_in_recovery() THEN 2" +
			" WHEN pg_catalog.current_setting('advisory.granted') OPERATOR(pg_catalog.=) '1' THEN 1 ELSE 0 END)"
		do         = "; DECLARE advisory_answer CURSOR FOR " + rows + doBare
		answer     = endOf + "MOVE ALL IN advisory_answer"
		answerBare = endOf + rows
	)
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
		{
			"a session of ours, which the server is to watch", withLock, key, nil,
			"/* advisory: 42 */ " + bound + "pg_catalog.set_config('advisory.key', '42', true)" + arm +
				do + "pg_advisory_lock" + bigint + arms + granted + caught + frees + answer,
		},
		{
			"HolderTimeout", withLock, key, []Option{HolderTimeout(time.Minute)},
			"/* advisory: 42 */ " + bound + "pg_catalog.set_config('advisory.key', '42', true)" + strings.Replace(arm, "15000", "60000", 1) +
				do + "pg_advisory_lock" + bigint + arms + granted + caught + frees + answer,
		},
		{
			"one that it is not to watch", withConnLock, key, nil,
			"/* advisory: 42 */ " + bound + "pg_catalog.set_config('advisory.key', '42', true)" +
				do + "pg_advisory_lock" + bigint + granted + caught + frees + answer,
		},
		{
			"one that fn uses, and that is to be watched", withConnLock, key, []Option{HolderTimeout(15 * time.Second)},
			"/* advisory: 42 */ " + bound + "pg_catalog.set_config('advisory.key', '42', true)" + arm +
				do + "pg_advisory_lock" + bigint + arms +
				"pg_catalog.set_config('idle_in_transaction_session_timeout', pg_catalog.current_setting('advisory.silence'), false), " +
				granted + caught + frees + answer,
		},
		{
			"the caller's session", acquireConn, key, nil,
			"/* advisory: 42 */ " + bound + "pg_catalog.set_config('advisory.key', '42', true)" +
				", pg_catalog.set_config('advisory.classid', '0', true), pg_catalog.set_config('advisory.objid', '42', true)" +
				doBare + "pg_advisory_lock" + bigint + granted + caught + looks + answerBare,
		},
		{
			"the caller's session, shared, a pair", acquireConn, Pair(-7, 42), []Option{Shared()},
			"/* advisory: -7.42 */ " + bound + "pg_catalog.set_config('advisory.class', '-7', true), pg_catalog.set_config('advisory.object', '42', true)" +
				", pg_catalog.set_config('advisory.classid', '4294967289', true), pg_catalog.set_config('advisory.objid', '42', true)" +
				doBare + "pg_advisory_lock_shared" + pair + granted + caught +
				strings.NewReplacer("'ExclusiveLock'", "'ShareLock'", "objsubid OPERATOR(pg_catalog.=) 1", "objsubid OPERATOR(pg_catalog.=) 2").Replace(looks) + answerBare,
		},
		{
			"a transaction", withTxLock, key, nil,
			"/* advisory: 42 */ SELECT; ROLLBACK AND CHAIN; " + old + bound +
				"pg_catalog.set_config('advisory.key', '42', true), pg_catalog.set_config('advisory.lock_timeout', old.lock_timeout, true) FROM old" +
				doBare + "pg_advisory_xact_lock" + bigint +
				"pg_catalog.set_config('lock_timeout', pg_catalog.current_setting('advisory.lock_timeout'), true), " + granted + caught + "NULL;" + answerBare,
		},
		{
			"a transaction with a HolderTimeout, shared, a pair", withTxLock, Pair(1, -2147483648), []Option{HolderTimeout(time.Minute), Shared()},
			"/* advisory: 1.-2147483648 */ SELECT; ROLLBACK AND CHAIN; SET LOCAL idle_in_transaction_session_timeout = 60000; " + old + bound +
				"pg_catalog.set_config('advisory.class', '1', true), pg_catalog.set_config('advisory.object', '-2147483648', true)" +
				", pg_catalog.set_config('advisory.lock_timeout', old.lock_timeout, true) FROM old" +
				doBare + "pg_advisory_xact_lock_shared" + pair +
				"pg_catalog.set_config('lock_timeout', pg_catalog.current_setting('advisory.lock_timeout'), true), " + granted + caught + "NULL;" + answerBare,
		},
		{
			"the smallest number", withConnLock, ID(math.MinInt64), nil,
			"/* advisory: -9223372036854775808 */ " + bound + "pg_catalog.set_config('advisory.key', '-9223372036854775808', true)" +
				do + "pg_advisory_lock" + bigint + granted + caught + frees + answer,
		},
		{
			"a name", withConnLock, Name("a */ b'; --"), nil,
			"/* advisory: a%20%2A%2F%20b%27%3B%20-- */ " + bound + "pg_catalog.set_config('advisory.key', '" + Name("a */ b'; --").SQL() + "', true)" +
				do + "pg_advisory_lock" + bigint + granted + caught + frees + answer,
		},
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
