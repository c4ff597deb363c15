package advisory

import (
	"context"
	"database/sql"
	"math"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
)

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
		answer = " END$advisory$; SELECT FROM pg_catalog.generate_series(1, CASE WHEN pg_catalog.pg_is_in_recovery() THEN 2" +
			" WHEN pg_catalog.current_setting('advisory.granted') OPERATOR(pg_catalog.=) '1' THEN 1 ELSE 0 END)"
		do = "; DO $advisory$BEGIN PERFORM pg_catalog."
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
			"one that is lent, and to be watched", withConnLock, key, []Option{HolderTimeout(15 * time.Second)},
			"/* advisory: 42 */ " + bound + "pg_catalog.set_config('advisory.key', '42', true)" + arm +
				do + "pg_advisory_lock" + bigint + arms +
				"pg_catalog.set_config('idle_in_transaction_session_timeout', pg_catalog.current_setting('advisory.silence'), false), " +
				granted + caught + frees + answer,
		},
		{
			"the caller's session", acquireConn, key, nil,
			"/* advisory: 42 */ " + bound + "pg_catalog.set_config('advisory.key', '42', true)" +
				", pg_catalog.set_config('advisory.classid', '0', true), pg_catalog.set_config('advisory.objid', '42', true)" +
				do + "pg_advisory_lock" + bigint + granted + caught + looks + answer,
		},
		{
			"the caller's session, shared, a pair", acquireConn, Pair(-7, 42), []Option{Shared()},
			"/* advisory: -7.42 */ " + bound + "pg_catalog.set_config('advisory.class', '-7', true), pg_catalog.set_config('advisory.object', '42', true)" +
				", pg_catalog.set_config('advisory.classid', '4294967289', true), pg_catalog.set_config('advisory.objid', '42', true)" +
				do + "pg_advisory_lock_shared" + pair + granted + caught +
				strings.NewReplacer("'ExclusiveLock'", "'ShareLock'", "objsubid OPERATOR(pg_catalog.=) 1", "objsubid OPERATOR(pg_catalog.=) 2").Replace(looks) + answer,
		},
		{
			"a transaction", withTxLock, key, nil,
			"/* advisory: 42 */ SELECT; ROLLBACK AND CHAIN; " + old + bound +
				"pg_catalog.set_config('advisory.key', '42', true), pg_catalog.set_config('advisory.lock_timeout', old.lock_timeout, true) FROM old" +
				do + "pg_advisory_xact_lock" + bigint +
				"pg_catalog.set_config('lock_timeout', pg_catalog.current_setting('advisory.lock_timeout'), true), " + granted + caught + "NULL;" + answer,
		},
		{
			"a transaction with a HolderTimeout, shared, a pair", withTxLock, Pair(1, -2147483648), []Option{HolderTimeout(time.Minute), Shared()},
			"/* advisory: 1.-2147483648 */ SELECT; ROLLBACK AND CHAIN; SET LOCAL idle_in_transaction_session_timeout = 60000; " + old + bound +
				"pg_catalog.set_config('advisory.class', '1', true), pg_catalog.set_config('advisory.object', '-2147483648', true)" +
				", pg_catalog.set_config('advisory.lock_timeout', old.lock_timeout, true) FROM old" +
				do + "pg_advisory_xact_lock_shared" + pair +
				"pg_catalog.set_config('lock_timeout', pg_catalog.current_setting('advisory.lock_timeout'), true), " + granted + caught + "NULL;" + answer,
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
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				on, srv := newTarget(t)
				var waits []string
				srv.script = func(_ context.Context, _ int, query string) (int64, error) {
					switch {
					case isWait(query):
						waits = append(waits, plainly(query))
						return int64(len(waits) - 1), nil // the second one is granted
					case strings.Contains(query, "_try_"):
						return 0, nil
					}
					return 1, nil
				}
				wantError(t, test.run(t.Context(), on, test.key, test.opts...))
				if diff := cmp.Diff([]string{test.want, test.want}, waits); diff != "" {
					t.Errorf("waits (-want +got):\n%s", diff)
				}
			})
		})
	}
}

// pg_stat_statements has one entry for all keys, and tells DO blocks apart by their text.
func TestTheBlockThatWaitsIsTheSameForAllKeys(t *testing.T) {
	t.Parallel()
	block := func(on place, k Key, w sessionSettings) string {
		_, block, _ := strings.Cut(waitStatement(on, "", k, false, time.Second, w), "DO ")
		return block
	}
	for _, on := range []place{onOwn, onCalled, inTx} {
		for _, silence := range []time.Duration{0, time.Second} {
			a := block(on, ID(1), sessionSettings{silence: silence, nonce: "a"})
			b := block(on, Name("b"), sessionSettings{silence: 2 * silence, nonce: "b"})
			if a != b {
				t.Errorf("place %d:\n%s\n%s", on, a, b)
			}
		}
	}
}

func TestTheCommentNamesTheKeys(t *testing.T) {
	t.Parallel()
	long := strings.Repeat("x", 70)
	for _, test := range []struct {
		keys []Key
		want string
	}{
		{[]Key{Name("nightly-report")}, "nightly-report"},
		{[]Key{Name("AZaz09-._~")}, "AZaz09-._~"},
		{[]Key{Name("a b%c")}, "a%20b%25c"},
		{[]Key{Name("*/ DROP TABLE t; /*")}, "%2A%2F%20DROP%20TABLE%20t%3B%20%2F%2A"},
		{[]Key{Name("$1 ? :x \x00\n'\"\\")}, "%241%20%3F%20%3Ax%20%00%0A%27%22%5C"},
		{[]Key{Name("größe")}, "gr%C3%B6%C3%9Fe"},
		{[]Key{ID(8675309)}, "8675309"},
		{[]Key{ID(math.MinInt64)}, "-9223372036854775808"},
		{[]Key{Pair(-7, 42)}, "-7.42"},
		{[]Key{Name(long)}, long[:64]},
		{[]Key{Name(long[:64])}, long[:64]},
		{[]Key{Name(long[:62] + "%")}, long[:62]}, // no half of what is encoded
		{[]Key{Name(long[:61] + "%")}, long[:61] + "%25"},
		{[]Key{Name(long[:63] + "%y")}, long[:63]}, // nor what comes after it
		{[]Key{Name(strings.Repeat("%", 30))}, strings.Repeat("%25", 21)},
		{ids(2), "100, 101"},
		{ids(4), "100, 101, 102, 103"},
		{ids(5), "100, 101, 102, 103, +1"},
		{ids(16), "100, 101, 102, 103, +12"},
	} {
		got := comment(test.keys)
		if want := "/* advisory: " + test.want + " */ "; got != want {
			t.Errorf("comment of %s: %q, want %q", keyList(test.keys), got, want)
		}
		if strings.Count(got, "*/") != 1 || strings.Count(got, "/*") != 1 {
			t.Errorf("more than one comment: %q", got)
		}
	}
}

func TestUnlockHeldStatement(t *testing.T) {
	t.Parallel()
	row := func(object, subid string) string {
		return "SELECT FROM pg_catalog.pg_locks WHERE pid OPERATOR(pg_catalog.=) pg_catalog.pg_backend_pid() AND granted AND mode OPERATOR(pg_catalog.=) 'ShareLock'" +
			" AND locktype OPERATOR(pg_catalog.=) 'advisory' AND classid OPERATOR(pg_catalog.=) '0' AND objid OPERATOR(pg_catalog.=) '" + object + "' AND objsubid OPERATOR(pg_catalog.=) " + subid
	}
	want := "SELECT pg_catalog.pg_advisory_unlock_shared(42) FROM (" + row("42", "1") + " OFFSET 0) AS held" +
		" UNION ALL SELECT pg_catalog.pg_advisory_unlock_shared(0, 7) FROM (" + row("7", "2") + " OFFSET 0) AS held"
	if got := unlockHeldStatement([]Key{key, Pair(0, 7)}, true); got != want {
		t.Errorf("%s\nwant %s", got, want)
	}
}
