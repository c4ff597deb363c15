package pgsql_test

import (
	"fmt"
	"math"
	"slices"
	"testing"
	"time"

	"github.com/pgadvisory/advisory/internal/pgsql"
)

// The statements, verbatim. What the tests of this file and of wait_test.go have is what is sent.

// A verbatim is a statement, and the text that it has.
type verbatim struct{ name, got, want string }

func check(t *testing.T, statements []verbatim) {
	t.Helper()
	for _, s := range statements {
		if s.got != s.want {
			t.Errorf("%s:\n%s\nwant\n%s", s.name, s.got, s.want)
		}
	}
}

// Parts of statements.
const (
	answers        = "SELECT FROM pg_catalog.generate_series(1, CASE WHEN pg_catalog.pg_is_in_recovery() THEN 2 WHEN "
	onPrimary      = "SELECT WHERE CASE WHEN pg_catalog.pg_is_in_recovery() THEN false ELSE "
	mine           = "pid OPERATOR(pg_catalog.=) pg_catalog.pg_backend_pid() AND "
	row42          = "locktype OPERATOR(pg_catalog.=) 'advisory' AND classid OPERATOR(pg_catalog.=) '0' AND objid OPERATOR(pg_catalog.=) '42' AND objsubid OPERATOR(pg_catalog.=) 1"
	rowPair        = "locktype OPERATOR(pg_catalog.=) 'advisory' AND classid OPERATOR(pg_catalog.=) '4294967289' AND objid OPERATOR(pg_catalog.=) '42' AND objsubid OPERATOR(pg_catalog.=) 2"
	keyOfRow       = "(classid::pg_catalog.int8 OPERATOR(pg_catalog.<<) 32) OPERATOR(pg_catalog.|) objid::pg_catalog.int8"
	inThisDatabase = " AND database OPERATOR(pg_catalog.=) (SELECT oid FROM pg_catalog.pg_database WHERE datname OPERATOR(pg_catalog.=) pg_catalog.current_database())"
	marked         = answers + "pg_catalog.current_setting('advisory.session', true) OPERATOR(pg_catalog.=) 'N' THEN 1 ELSE 0 END)"
)

func TestStatementsOfASession(t *testing.T) {
	t.Parallel()
	one, pairs, three := []pgsql.Key{id(42)}, []pgsql.Key{pair(-7, 42)}, []pgsql.Key{id(42), pair(-7, 42), named("a", 5)}
	check(t, []verbatim{
		{"Try", pgsql.Try(one, false), onPrimary + "pg_catalog.pg_try_advisory_lock(42) END"},
		{"Try, shared", pgsql.Try(one, true), onPrimary + "pg_catalog.pg_try_advisory_lock_shared(42) END"},
		{"Try, a pair", pgsql.Try(pairs, false), onPrimary + "pg_catalog.pg_try_advisory_lock(-7, 42) END"},
		{"Try, the smallest number", pgsql.Try([]pgsql.Key{id(math.MinInt64)}, false),
			onPrimary + "pg_catalog.pg_try_advisory_lock(-9223372036854775808) END"},
		{"Try, several", pgsql.Try(three, false),
			"SELECT FROM pg_catalog.generate_series(1, CASE WHEN pg_catalog.pg_is_in_recovery() THEN 0" +
				" WHEN NOT pg_catalog.pg_try_advisory_lock(42) THEN 0" +
				" WHEN NOT pg_catalog.pg_try_advisory_lock(-7, 42) THEN 1" +
				" WHEN NOT pg_catalog.pg_try_advisory_lock(5) THEN 2 ELSE 3 END)"},
		{"Try, several, shared", pgsql.Try(three[:2], true),
			"SELECT FROM pg_catalog.generate_series(1, CASE WHEN pg_catalog.pg_is_in_recovery() THEN 0" +
				" WHEN NOT pg_catalog.pg_try_advisory_lock_shared(42) THEN 0" +
				" WHEN NOT pg_catalog.pg_try_advisory_lock_shared(-7, 42) THEN 1 ELSE 2 END)"},
		{"TryCallers", pgsql.TryCallers(id(42), false),
			"SELECT FROM pg_catalog.generate_series(1, CASE WHEN pg_catalog.pg_is_in_recovery() THEN 2" +
				" WHEN pg_catalog.now() OPERATOR(pg_catalog.<>) pg_catalog.statement_timestamp() THEN 3" +
				" WHEN EXISTS (SELECT FROM pg_catalog.pg_locks WHERE " + mine + row42 + ") THEN 4" +
				" WHEN pg_catalog.pg_try_advisory_lock(42) THEN 1 ELSE 0 END)"},
		{"TryCallers, shared, a pair", pgsql.TryCallers(pair(-7, 42), true),
			"SELECT FROM pg_catalog.generate_series(1, CASE WHEN pg_catalog.pg_is_in_recovery() THEN 2" +
				" WHEN pg_catalog.now() OPERATOR(pg_catalog.<>) pg_catalog.statement_timestamp() THEN 3" +
				" WHEN EXISTS (SELECT FROM pg_catalog.pg_locks WHERE " + mine + rowPair + ") THEN 4" +
				" WHEN pg_catalog.pg_try_advisory_lock_shared(-7, 42) THEN 1 ELSE 0 END)"},
		{"Unlock", pgsql.Unlock(one, false), "SELECT WHERE pg_catalog.pg_advisory_unlock(42)"},
		{"Unlock, several, shared", pgsql.Unlock(three, true),
			"SELECT WHERE pg_catalog.pg_advisory_unlock_shared(42) AND pg_catalog.pg_advisory_unlock_shared(-7, 42) AND pg_catalog.pg_advisory_unlock_shared(5)"},
		{"UnlockHeld", pgsql.UnlockHeld(one, false),
			"SELECT CASE WHEN objsubid OPERATOR(pg_catalog.=) 2 THEN pg_catalog.pg_advisory_unlock(classid::pg_catalog.int4, objid::pg_catalog.int4)" +
				" ELSE pg_catalog.pg_advisory_unlock(" + keyOfRow + ") END FROM (SELECT classid, objid, objsubid FROM pg_catalog.pg_locks WHERE " + mine + "granted" +
				" AND mode OPERATOR(pg_catalog.=) 'ExclusiveLock' AND (" + row42 + ") OFFSET 0) AS held"},
		{"UnlockHeld, several, shared", pgsql.UnlockHeld(three[:2], true),
			"SELECT CASE WHEN objsubid OPERATOR(pg_catalog.=) 2 THEN pg_catalog.pg_advisory_unlock_shared(classid::pg_catalog.int4, objid::pg_catalog.int4)" +
				" ELSE pg_catalog.pg_advisory_unlock_shared(" + keyOfRow + ") END FROM (SELECT classid, objid, objsubid FROM pg_catalog.pg_locks WHERE " + mine + "granted" +
				" AND mode OPERATOR(pg_catalog.=) 'ShareLock' AND (" + row42 + " OR " + rowPair + ") OFFSET 0) AS held"},
		{"UnlockExposed", pgsql.UnlockExposed(one, true),
			"SELECT pg_catalog.pg_advisory_unlock_all() FROM pg_catalog.generate_series(1, CASE WHEN NOT (pg_catalog.pg_advisory_unlock_shared(42))" +
				" THEN 0 WHEN pg_catalog.now() OPERATOR(pg_catalog.<>) pg_catalog.statement_timestamp() THEN 2 ELSE 1 END)"},
		{"UnlockExposed, several", pgsql.UnlockExposed(three[:2], false),
			"SELECT pg_catalog.pg_advisory_unlock_all() FROM pg_catalog.generate_series(1, CASE WHEN NOT (pg_catalog.pg_advisory_unlock(42)" +
				" AND pg_catalog.pg_advisory_unlock(-7, 42))" +
				" THEN 0 WHEN pg_catalog.now() OPERATOR(pg_catalog.<>) pg_catalog.statement_timestamp() THEN 2 ELSE 1 END)"},
		{"UnlockAll", pgsql.UnlockAll, "SELECT pg_catalog.pg_advisory_unlock_all()"},
		{"Ping", pgsql.Ping, "SELECT"},
		{"LeftOpen", pgsql.LeftOpen, "SELECT WHERE true"},
		{"Probe", pgsql.Probe, answers + "true THEN 1 ELSE 0 END)"},
		{"Look", pgsql.Look(id(42)), "SELECT WHERE EXISTS (SELECT FROM pg_catalog.pg_locks WHERE " + row42 + " AND NOT granted" + inThisDatabase + ")"},
		{"Look, a pair", pgsql.Look(pair(-7, 42)), "SELECT WHERE EXISTS (SELECT FROM pg_catalog.pg_locks WHERE " + rowPair + " AND NOT granted" + inThisDatabase + ")"},
		{"Row", id(42).Row(), row42},
		{"Row, a pair", pair(-7, 42).Row(), rowPair},
		{"Marked", pgsql.Marked("N"), marked},
		{"Mark", pgsql.Mark("N"), "SELECT pg_catalog.set_config('advisory.session', 'N', false); " + marked},
		{"Heartbeat", pgsql.Heartbeat(three, "", "N"), "/* advisory: 42, -7.42, a */ " + marked},
		{"Heartbeat, with settings", pgsql.Heartbeat(one, "SELECT 1; ", "N"), "/* advisory: 42 */ SELECT 1; " + marked},
	})
}

func TestStatementsWithArguments(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		of    func(pgsql.Key, bool) (string, []int64)
		query string
	}{
		{pgsql.TryCached, onPrimary + "pg_catalog.pg_try_advisory_lock%s(%s) END"},
		{pgsql.UnlockCached, "SELECT WHERE pg_catalog.pg_advisory_unlock%s(%s)"},
	} {
		for _, shared := range []bool{false, true} {
			suffix := map[bool]string{true: "_shared"}[shared]
			query, args := test.of(named("a", 42), shared)
			if want := fmt.Sprintf(test.query, suffix, "$1"); query != want || !slices.Equal(args, []int64{42}) {
				t.Errorf("%s with %v, want %s with 42", query, args, want)
			}
			query, args = test.of(pair(-7, 42), shared)
			if want := fmt.Sprintf(test.query, suffix, "$1, $2"); query != want || !slices.Equal(args, []int64{-7, 42}) {
				t.Errorf("%s with %v, want %s with -7 and 42", query, args, want)
			}
		}
	}
}

func TestStatementsOfATransaction(t *testing.T) {
	t.Parallel()
	first := func(lock string) string {
		return "SELECT FROM pg_catalog.generate_series(1, CASE" +
			" WHEN pg_catalog.current_setting('transaction_isolation') OPERATOR(pg_catalog.=) ANY ('{repeatable read,serializable}') THEN 5" +
			" WHEN pg_catalog.pg_is_in_recovery() THEN 0 WHEN pg_catalog." + lock + " THEN 1 ELSE 0 END)"
	}
	check(t, []verbatim{
		{"TryCallersTx", pgsql.TryCallersTx(id(42), false), answers + "pg_catalog.pg_try_advisory_xact_lock(42) THEN 1 ELSE 0 END)"},
		{"TryCallersTx, shared, a pair", pgsql.TryCallersTx(pair(-7, 42), true), answers + "pg_catalog.pg_try_advisory_xact_lock_shared(-7, 42) THEN 1 ELSE 0 END)"},
		{"TryTx", pgsql.TryTx(id(42), false), first("pg_try_advisory_xact_lock(42)")},
		{"TryTx, shared, a pair", pgsql.TryTx(pair(-7, 42), true), first("pg_try_advisory_xact_lock_shared(-7, 42)")},
		{"Deadlock", pgsql.Deadlock(id(42)), "SELECT FROM pg_catalog.pg_locks WHERE " + row42 + " AND granted" + inThisDatabase +
			" AND pg_catalog.pg_backend_pid() OPERATOR(pg_catalog.=) ANY (pg_catalog.pg_blocking_pids(pid))"},
		{"Deadlock, a pair", pgsql.Deadlock(pair(-7, 42)), "SELECT FROM pg_catalog.pg_locks WHERE " + rowPair + " AND granted" + inThisDatabase +
			" AND pg_catalog.pg_backend_pid() OPERATOR(pg_catalog.=) ANY (pg_catalog.pg_blocking_pids(pid))"},
		{"Restart", pgsql.Restart, "ROLLBACK AND CHAIN"},
		{"Savepoint", pgsql.Savepoint, "SAVEPOINT advisory"},
		{"RollbackToSavepoint", pgsql.RollbackToSavepoint, "ROLLBACK TO SAVEPOINT advisory; RELEASE SAVEPOINT advisory"},
		{"TxIdleTimeout", pgsql.TxIdleTimeout(time.Minute), "SET LOCAL idle_in_transaction_session_timeout = 60000; "},
	})
}

const ofLocks = "COALESCE(l.pid, 0), l.granted, l.mode OPERATOR(pg_catalog.=) 'ShareLock',\n" +
	"\tCOALESCE(a.usename::pg_catalog.text, ''), COALESCE(a.application_name, ''), COALESCE(pg_catalog.host(a.client_addr), ''), COALESCE(a.state, ''),\n" +
	"\tCASE WHEN a.query OPERATOR(pg_catalog.=) '<insufficient privilege>' THEN '' ELSE COALESCE(a.query, '') END,\n" +
	"\ta.backend_start, l.waitstart\n" +
	"FROM pg_catalog.pg_locks l LEFT JOIN pg_catalog.pg_stat_activity a ON a.pid OPERATOR(pg_catalog.=) l.pid\n" +
	"WHERE l.locktype OPERATOR(pg_catalog.=) 'advisory'\n" +
	"\tAND l.database OPERATOR(pg_catalog.=) (SELECT oid FROM pg_catalog.pg_database WHERE datname OPERATOR(pg_catalog.=) pg_catalog.current_database())"

func TestStatementsThatReadColumns(t *testing.T) {
	t.Parallel()
	check(t, []verbatim{
		{"Token", pgsql.Token, "SELECT pg_catalog.pg_current_xact_id()::pg_catalog.text" +
			" FROM pg_catalog.pg_logical_emit_message(true, 'advisory', '')," +
			" pg_catalog.set_config('synchronous_commit', CASE WHEN pg_catalog.current_setting('synchronous_commit')" +
			" OPERATOR(pg_catalog.=) 'off' THEN 'local' ELSE pg_catalog.current_setting('synchronous_commit') END, true)"},
		{"Holders", pgsql.Holders, "SELECT " + ofLocks + "\n" +
			"\tAND l.classid OPERATOR(pg_catalog.=) $1::pg_catalog.int8::pg_catalog.oid\n" +
			"\tAND l.objid OPERATOR(pg_catalog.=) $2::pg_catalog.int8::pg_catalog.oid\n" +
			"\tAND l.objsubid OPERATOR(pg_catalog.=) $3::pg_catalog.int4\n" +
			"ORDER BY l.granted DESC, l.waitstart, a.backend_start, l.pid"},
		{"Locks", pgsql.Locks, "SELECT l.classid::pg_catalog.int8, l.objid::pg_catalog.int8, l.objsubid, " + ofLocks + "\n" +
			"ORDER BY l.granted DESC, l.waitstart, a.backend_start, l.pid"},
	})
}

// Rows that mean something else than yes or no must not be taken for that, or for each other.
func TestNumbersOfRows(t *testing.T) {
	t.Parallel()
	if pgsql.OnStandby != 2 || pgsql.CallersInTx != 3 || pgsql.CallersHeld != 4 || pgsql.OneSnapshot != 5 {
		t.Error("they are not those in the statements")
	}
}

// The server counts in milliseconds, and 0 would be no limit at all.
func TestTimesAreSentInMillisecondsRoundedUp(t *testing.T) {
	t.Parallel()
	for d, want := range map[time.Duration]string{
		1:                                "1",
		time.Millisecond:                 "1",
		time.Millisecond + 1:             "2",
		15 * time.Second:                 "15000",
		math.MaxInt32 * time.Millisecond: "2147483647",
	} {
		check(t, []verbatim{{d.String(), pgsql.TxIdleTimeout(d), "SET LOCAL idle_in_transaction_session_timeout = " + want + "; "}})
	}
}
