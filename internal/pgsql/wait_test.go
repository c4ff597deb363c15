package pgsql_test

import (
	"math"
	"strings"
	"testing"
	"time"

	"github.com/pgadvisory/advisory/internal/pgsql"
)

const (
	connCheck = "pg_catalog.set_config('client_connection_check_interval', CASE" +
		" WHEN pg_catalog.current_setting('client_connection_check_interval')::pg_catalog.interval OPERATOR(pg_catalog.>) '0'" +
		" AND pg_catalog.current_setting('client_connection_check_interval')::pg_catalog.interval OPERATOR(pg_catalog.<) '1s'" +
		" THEN pg_catalog.current_setting('client_connection_check_interval') ELSE '1s' END, false)"
	connCheckTx = "pg_catalog.set_config('client_connection_check_interval', CASE" +
		" WHEN pg_catalog.current_setting('client_connection_check_interval')::pg_catalog.interval OPERATOR(pg_catalog.>) '0'" +
		" AND pg_catalog.current_setting('client_connection_check_interval')::pg_catalog.interval OPERATOR(pg_catalog.<) '1s'" +
		" THEN pg_catalog.current_setting('client_connection_check_interval') ELSE '1s' END, true)"
)

// Statements that wait, verbatim.
func TestWait(t *testing.T) {
	t.Parallel()
	const (
		bound = "SELECT pg_catalog.set_config('lock_timeout', pg_catalog.ceil(LEAST(100, " +
			"pg_catalog.date_part('epoch', pg_catalog.current_setting('deadlock_timeout')::pg_catalog.interval) OPERATOR(pg_catalog.*) 500))::pg_catalog.text, true), " +
			"pg_catalog.set_config('advisory.granted', '', true)"
		old          = "WITH old AS MATERIALIZED (SELECT pg_catalog.current_setting('lock_timeout') AS lock_timeout) "
		bigint       = "(pg_catalog.current_setting('advisory.key')::pg_catalog.int8)"
		pairArgs     = "(pg_catalog.current_setting('advisory.class')::pg_catalog.int4, pg_catalog.current_setting('advisory.object')::pg_catalog.int4)"
		idleTimeout  = ", pg_catalog.set_config('advisory.nonce', 'N', true), pg_catalog.set_config('advisory.idle_timeout', '15000', true)"
		idleTimeouts = ", pg_catalog.set_config('advisory.session', pg_catalog.current_setting('advisory.nonce'), false), " +
			"pg_catalog.set_config('idle_session_timeout', pg_catalog.current_setting('advisory.idle_timeout'), false)"
		idleTimeoutsTx = ", pg_catalog.set_config('idle_in_transaction_session_timeout', pg_catalog.current_setting('advisory.idle_timeout'), false)"
		lockTimeout    = ", pg_catalog.set_config('advisory.lock_timeout', old.lock_timeout, true) FROM old"
		restores       = ", pg_catalog.set_config('lock_timeout', pg_catalog.current_setting('advisory.lock_timeout'), true)"
		granted        = "pg_catalog.set_config('advisory.granted', '1', true)"
		caught         = "; EXCEPTION WHEN lock_not_available OR query_canceled THEN "
		frees          = "PERFORM pg_catalog.pg_advisory_unlock_all();"
		looks          = "PERFORM " + granted + " FROM (SELECT FROM pg_catalog.pg_locks WHERE pid OPERATOR(pg_catalog.=) pg_catalog.pg_backend_pid() AND granted" +
			" AND mode OPERATOR(pg_catalog.=) 'ExclusiveLock' AND locktype OPERATOR(pg_catalog.=) 'advisory'" +
			" AND classid OPERATOR(pg_catalog.=) pg_catalog.current_setting('advisory.classid')::pg_catalog.oid" +
			" AND objid OPERATOR(pg_catalog.=) pg_catalog.current_setting('advisory.objid')::pg_catalog.oid AND objsubid OPERATOR(pg_catalog.=) 1) AS held;"
		doBare = "; DO $advisory$BEGIN PERFORM " + granted
		rows   = "SELECT FROM pg_catalog.generate_series(1, CASE WHEN pg_catalog.pg_is_in_recovery() THEN 2" +
			" WHEN pg_catalog.current_setting('advisory.granted') OPERATOR(pg_catalog.=) '1' THEN 1 ELSE 0 END)"
		do = "; DO $advisory$DECLARE answer pg_catalog.refcursor := 'advisory_answer'; BEGIN OPEN answer FOR " + rows +
			"; BEGIN PERFORM " + granted
		ends     = " END; END$advisory$; MOVE ALL IN advisory_answer"
		endsBare = " END$advisory$; " + rows
	)
	watched := pgsql.Settings{IdleTimeout: 15 * time.Second, Nonce: "N"}
	minute, exposed, checked := watched, watched, watched
	minute.IdleTimeout, exposed.Exposed, checked.Check = time.Minute, true, true
	const number = "pg_catalog.set_config('advisory.key', '42', true)"
	for _, test := range []struct {
		name    string
		on      pgsql.Place
		restart string
		key     pgsql.Key
		shared  bool
		w       pgsql.Settings
		want    string
	}{
		{
			"a session that the server watches", pgsql.OnOwn, "", id(42), false, watched,
			"/* advisory: 42 */ " + bound + idleTimeout + ", " + number +
				do + idleTimeouts + ", pg_catalog.pg_advisory_lock" + bigint + caught + frees + ends,
		},
		{
			"for another time", pgsql.OnOwn, "", id(42), false, minute,
			"/* advisory: 42 */ " + bound + strings.Replace(idleTimeout, "15000", "60000", 1) + ", " + number +
				do + idleTimeouts + ", pg_catalog.pg_advisory_lock" + bigint + caught + frees + ends,
		},
		{
			"one that it does not watch", pgsql.OnOwn, "", id(42), false, pgsql.Settings{},
			"/* advisory: 42 */ " + bound + ", " + number +
				do + ", pg_catalog.pg_advisory_lock" + bigint + caught + frees + ends,
		},
		{
			"one that is exposed", pgsql.OnOwn, "", id(42), false, exposed,
			"/* advisory: 42 */ " + bound + idleTimeout + ", " + number +
				do + idleTimeouts + idleTimeoutsTx + ", pg_catalog.pg_advisory_lock" + bigint + caught + frees + ends,
		},
		{
			"one with the connection check", pgsql.OnOwn, "", id(42), false, checked,
			"/* advisory: 42 */ " + bound + idleTimeout + ", " + number +
				do + idleTimeouts + ", " + connCheck + ", pg_catalog.pg_advisory_lock" + bigint + caught + frees + ends,
		},
		{
			"the caller's session", pgsql.OnCallers, "", id(42), false, pgsql.Settings{},
			"/* advisory: 42 */ " + bound + ", " + number +
				", pg_catalog.set_config('advisory.classid', '0', true), pg_catalog.set_config('advisory.objid', '42', true)" +
				doBare + ", pg_catalog.pg_advisory_lock" + bigint + caught + looks + endsBare,
		},
		{
			"the caller's session, shared, a pair", pgsql.OnCallers, "", pair(-7, 42), true, pgsql.Settings{},
			"/* advisory: -7.42 */ " + bound + ", pg_catalog.set_config('advisory.class', '-7', true), pg_catalog.set_config('advisory.object', '42', true)" +
				", pg_catalog.set_config('advisory.classid', '4294967289', true), pg_catalog.set_config('advisory.objid', '42', true)" +
				doBare + ", pg_catalog.pg_advisory_lock_shared" + pairArgs + caught +
				strings.NewReplacer("'ExclusiveLock'", "'ShareLock'", "objsubid OPERATOR(pg_catalog.=) 1", "objsubid OPERATOR(pg_catalog.=) 2").Replace(looks) + endsBare,
		},
		{
			"a transaction", pgsql.InTx, pgsql.Restart + "; ", id(42), false, pgsql.Settings{},
			"/* advisory: 42 */ SELECT; ROLLBACK AND CHAIN; " + old + bound + ", " + number + lockTimeout +
				doBare + ", pg_catalog.pg_advisory_xact_lock" + bigint + restores + caught + "NULL;" + endsBare,
		},
		{
			"a transaction that goes on", pgsql.InTx, "", id(42), false, pgsql.Settings{},
			"/* advisory: 42 */ SELECT; " + old + bound + ", " + number + lockTimeout +
				doBare + ", pg_catalog.pg_advisory_xact_lock" + bigint + restores + caught + "NULL;" + endsBare,
		},
		{
			"a transaction with the connection check", pgsql.InTx, pgsql.Restart + "; ", id(42), false, pgsql.Settings{Check: true},
			"/* advisory: 42 */ SELECT; ROLLBACK AND CHAIN; " + old + bound + ", " + number + lockTimeout +
				doBare + ", " + connCheckTx + ", pg_catalog.pg_advisory_xact_lock" + bigint + restores + caught + "NULL;" + endsBare,
		},
		{
			"a transaction that the server watches, shared, a pair", pgsql.InTx, pgsql.Restart + "; " + pgsql.TxIdleTimeout(time.Minute), pair(1, math.MinInt32), true, pgsql.Settings{},
			"/* advisory: 1.-2147483648 */ SELECT; ROLLBACK AND CHAIN; SET LOCAL idle_in_transaction_session_timeout = 60000; " + old + bound +
				", pg_catalog.set_config('advisory.class', '1', true), pg_catalog.set_config('advisory.object', '-2147483648', true)" + lockTimeout +
				doBare + ", pg_catalog.pg_advisory_xact_lock_shared" + pairArgs + restores + caught + "NULL;" + endsBare,
		},
		{
			"the smallest number", pgsql.OnOwn, "", id(math.MinInt64), false, pgsql.Settings{},
			"/* advisory: -9223372036854775808 */ " + bound + ", pg_catalog.set_config('advisory.key', '-9223372036854775808', true)" +
				do + ", pg_catalog.pg_advisory_lock" + bigint + caught + frees + ends,
		},
		{
			"a name", pgsql.OnOwn, "", named("a */ b'; --", -5), false, pgsql.Settings{},
			"/* advisory: a%20%2A%2F%20b%27%3B%20-- */ " + bound + ", pg_catalog.set_config('advisory.key', '-5', true)" +
				do + ", pg_catalog.pg_advisory_lock" + bigint + caught + frees + ends,
		},
	} {
		check(t, []verbatim{{test.name, pgsql.Comment([]pgsql.Key{test.key}, "") + pgsql.Wait(test.on, test.restart, test.key, test.shared, 100*time.Millisecond, test.w), test.want}})
	}
	got := pgsql.Wait(pgsql.OnOwn, "", id(42), false, 400*time.Millisecond-1, pgsql.Settings{})
	if want := "pg_catalog.ceil(LEAST(400, "; !strings.Contains(got, want) {
		t.Errorf("%s\nhas no %s", got, want)
	}
}

// pg_stat_statements has one entry for all keys, and tells DO blocks apart by their text.
func TestTheBlockThatWaitsIsTheSameForAllKeys(t *testing.T) {
	t.Parallel()
	block := func(on pgsql.Place, k pgsql.Key, bound time.Duration, w pgsql.Settings) string {
		_, block, _ := strings.Cut(pgsql.Wait(on, "", k, false, bound, w), "DO ")
		return block
	}
	for _, on := range []pgsql.Place{pgsql.OnOwn, pgsql.OnCallers, pgsql.InTx} {
		for _, idleTimeout := range []time.Duration{0, time.Second} {
			a := block(on, id(1), time.Second, pgsql.Settings{IdleTimeout: idleTimeout, Nonce: "a"})
			b := block(on, named("b", -5), time.Minute, pgsql.Settings{IdleTimeout: 2 * idleTimeout, Nonce: "b"})
			if a != b {
				t.Errorf("place %d:\n%s\n%s", on, a, b)
			}
		}
		a, b := block(on, pair(1, 2), time.Second, pgsql.Settings{}), block(on, pair(-3, -4), time.Second, pgsql.Settings{})
		if a != b {
			t.Errorf("place %d:\n%s\n%s", on, a, b)
		}
	}
}

func TestSettings(t *testing.T) {
	t.Parallel()
	const (
		nonce    = "pg_catalog.set_config('advisory.session', 'N', false), "
		idle     = "pg_catalog.set_config('idle_session_timeout', '15000', false)"
		idleTx   = "pg_catalog.set_config('idle_in_transaction_session_timeout', '15000', false)"
		try      = " WHERE CASE WHEN pg_catalog.pg_is_in_recovery() THEN false ELSE pg_catalog.pg_try_advisory_lock_shared(42) END"
		undo     = "RESET advisory.session; RESET idle_session_timeout; "
		undoBare = "RESET idle_in_transaction_session_timeout; "
		unCheck  = "RESET client_connection_check_interval; "
	)
	for _, test := range []struct {
		name         string
		w            pgsql.Settings
		first, again string // Set
		reset, inTx  string
		tryWith      string
		isNone       bool
	}{
		{
			name: "none", w: pgsql.Settings{Nonce: "N", Exposed: true},
			tryWith: "SELECT" + try, isNone: true,
		},
		{
			name: "silence", w: pgsql.Settings{IdleTimeout: 15 * time.Second, Nonce: "N"},
			first: "SELECT " + nonce + idle + "; ", again: "SELECT " + idle + "; ", reset: undo,
			tryWith: "SELECT " + nonce + idle + try,
		},
		{
			name: "silence, exposed", w: pgsql.Settings{IdleTimeout: 15 * time.Second, Nonce: "N", Exposed: true},
			first: "SELECT " + nonce + idle + ", " + idleTx + "; ", again: "SELECT " + idle + ", " + idleTx + "; ", reset: undo + undoBare,
			tryWith: "SELECT " + nonce + idle + ", " + idleTx + try,
		},
		{
			name: "check", w: pgsql.Settings{Check: true},
			first: "SELECT " + connCheck + "; ", reset: unCheck, inTx: "SELECT " + connCheckTx + "; ",
			tryWith: "SELECT " + connCheck + try,
		},
		{
			name: "all", w: pgsql.Settings{IdleTimeout: 15 * time.Second, Nonce: "N", Exposed: true, Check: true},
			first: "SELECT " + nonce + idle + ", " + idleTx + ", " + connCheck + "; ",
			again: "SELECT " + idle + ", " + idleTx + ", " + connCheck + "; ",
			reset: undo + undoBare + unCheck, inTx: "SELECT " + connCheckTx + "; ",
			tryWith: "SELECT " + nonce + idle + ", " + idleTx + ", " + connCheck + try,
		},
	} {
		if got := test.w.None(); got != test.isNone {
			t.Errorf("%s: None is %v", test.name, got)
		}
		check(t, []verbatim{
			{test.name + ": TryWith", pgsql.TryWith(test.w, id(42), true), test.tryWith},
			{test.name + ": Reset", test.w.Reset(), test.reset},
			{test.name + ": SetCheck", test.w.SetCheck(), test.inTx},
		})
		if test.first != "" {
			check(t, []verbatim{{test.name + ": Set(true)", test.w.Set(true), test.first}})
		}
		if test.again != "" {
			check(t, []verbatim{{test.name + ": Set(false)", test.w.Set(false), test.again}})
		}
	}
}
