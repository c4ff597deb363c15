package advisory

import (
	"fmt"
	"strconv"
	"strings"
	"time"
)

// The statements. They go out without arguments: both drivers then use the simple
// protocol, one round trip that leaves no prepared statement behind, and the answer is the
// number of rows in the command tag. Numbers and percent-encoded names are the only text ever
// put in, and every function and operator is PostgreSQL's own, whatever the search path says.

// tryStatement: so many rows as locks were granted, which are the first of keys.
//
// Nothing is granted on a standby, whose locks exclude nobody on the primary.
func tryStatement(keys []Key, shared bool) string {
	if len(keys) == 1 {
		return statement("SELECT WHERE "+onPrimary, "pg_try_advisory_lock", keys, shared) + " END"
	}
	var b strings.Builder
	b.WriteString("SELECT FROM pg_catalog.generate_series(1, CASE WHEN pg_catalog.pg_is_in_recovery() THEN 0")
	for i := range keys {
		b.WriteString(statement(" WHEN NOT ", "pg_try_advisory_lock", keys[i:i+1], shared))
		b.WriteString(" THEN " + strconv.Itoa(i))
	}
	b.WriteString(" ELSE " + strconv.Itoa(len(keys)) + " END)")
	return b.String()
}

// tryCalledStatement is tryStatement on the caller's session, whose state is not known: calledInTx rows if it
// is in a transaction, whose clock stands still, and calledHeld if it holds the lock already.
func tryCalledStatement(k Key, shared bool) string {
	classid, objid := lockColumns(k)
	return "SELECT FROM pg_catalog.generate_series(1, CASE WHEN pg_catalog.pg_is_in_recovery() THEN 2" +
		" WHEN pg_catalog.now() OPERATOR(pg_catalog.<>) pg_catalog.statement_timestamp() THEN 3" +
		" WHEN EXISTS (SELECT FROM pg_catalog.pg_locks WHERE pid OPERATOR(pg_catalog.=) pg_catalog.pg_backend_pid() AND " +
		lockRows("'"+classid+"'", "'"+objid+"'", k.space) + ") THEN 4" +
		statement(" WHEN ", "pg_try_advisory_lock", []Key{k}, shared) + " THEN 1 ELSE 0 END)"
}

const (
	calledInTx = 3
	calledHeld = 4
)

// unlockStatement: one row if all the locks were held.
func unlockStatement(keys []Key, shared bool) string {
	return statement("SELECT WHERE ", "pg_advisory_unlock", keys, shared)
}

// onPrimary begins a condition that is false on a standby. AND would leave the order to the planner.
const onPrimary = "CASE WHEN pg_catalog.pg_is_in_recovery() THEN false ELSE "

// unlockHeldStatement unlocks whichever of the locks the session holds. The server warns of an
// unlock of what is not held, so the statement looks first.
func unlockHeldStatement(keys []Key, shared bool) string {
	var b strings.Builder
	for i := range keys {
		if i > 0 {
			b.WriteString(" UNION ALL ")
		}
		b.WriteString(statement("SELECT ", "pg_advisory_unlock", keys[i:i+1], shared))
		b.WriteString(" FROM (" + heldStatement(keys[i], shared) + " OFFSET 0) AS held")
	}
	return b.String()
}

// unlockLentStatement: one row if the lock was held, and two if a transaction is open on
// the session besides: the clock of a transaction stands still. It frees whatever else
// the session holds.
func unlockLentStatement(keys []Key, shared bool) string {
	return statement("SELECT pg_catalog.pg_advisory_unlock_all() FROM pg_catalog.generate_series(1, CASE WHEN NOT (",
		"pg_advisory_unlock", keys, shared) +
		") THEN 0 WHEN pg_catalog.now() OPERATOR(pg_catalog.<>) pg_catalog.statement_timestamp() THEN 2 ELSE 1 END)"
}

// leftOpenStatement is one that a driver refuses to send while rows are open.
const leftOpenStatement = "SELECT WHERE true"

// freeStatement unlocks all that the session holds.
const freeStatement = "SELECT pg_catalog.pg_advisory_unlock_all()"

// sessionSettings are the settings of a session that holds locks.
type sessionSettings struct {
	// The server ends the session once it has heard nothing for so long. 0: none are set.
	silence time.Duration

	// nonce tells the session from every other. DISCARD ALL, which frees the locks, resets it.
	nonce string

	// lent: a caller may open a transaction, which is not idle in the sense of
	// idle_session_timeout.
	lent bool

	// checks: the server looks during each statement whether this process is still there.
	checks bool
}

// A parameter is a setting of the server's.
type parameter struct{ name, from string }

// parameters are those that depend on values, and where each has its value from.
func (w sessionSettings) parameters() []parameter {
	switch {
	case w.silence == 0:
		return nil
	case w.lent:
		return []parameter{{"advisory.session", "nonce"}, {"idle_session_timeout", "silence"}, {"idle_in_transaction_session_timeout", "silence"}}
	default:
		return []parameter{{"advisory.session", "nonce"}, {"idle_session_timeout", "silence"}}
	}
}

func (w sessionSettings) value(from string) string {
	if from == "nonce" {
		return w.nonce
	}
	return milliseconds(w.silence)
}

// calls are the calls that make the settings.
func (w sessionSettings) calls() string {
	var calls []string
	for _, p := range w.parameters() {
		calls = append(calls, "pg_catalog.set_config('"+p.name+"', '"+w.value(p.from)+"', false)")
	}
	if w.checks {
		calls = append(calls, checkCall(false))
	}
	return strings.Join(calls, ", ")
}

const checkInterval = "client_connection_check_interval"

// checkCall has the server look every second, or as often as it does anyway, whether this process is
// still there (PostgreSQL 14). Otherwise a lock outlives a process that dies by the statement that is
// under way.
func checkCall(local bool) string {
	const current = "pg_catalog.current_setting('" + checkInterval + "')"
	return "pg_catalog.set_config('" + checkInterval + "', CASE" +
		" WHEN " + current + "::pg_catalog.interval OPERATOR(pg_catalog.>) '0' AND " + current + "::pg_catalog.interval OPERATOR(pg_catalog.<) '1s'" +
		" THEN " + current + " ELSE '1s' END, " + strconv.FormatBool(local) + ")"
}

// checkStatement is put before a try in a transaction. A wait makes the same setting with its grant.
func (w sessionSettings) checkStatement() string {
	if !w.checks {
		return ""
	}
	return "SELECT " + checkCall(true) + "; "
}

// setStatement is put before another statement, as resetStatement is. The nonce is set once: another
// session must not get it.
func (w sessionSettings) setStatement(first bool) string {
	calls := w.calls()
	if !first {
		_, calls, _ = strings.Cut(calls, ", false), ")
	}
	return "SELECT " + calls + "; "
}

func (w sessionSettings) resetStatement() string {
	var s string
	for _, p := range w.parameters() {
		s += "RESET " + p.name + "; "
	}
	if w.checks {
		s += "RESET " + checkInterval + "; "
	}
	return s
}

// beatStatement: an answer, with one row if the session is still the one with the nonce. set is put
// before it, and may set that.
func beatStatement(keys []Key, set, nonce string) string {
	return comment(keys) + set + markedStatement(nonce)
}

// answer has one row if condition is true, none if it is not, and standbyRows on a standby.
func answer(condition string) string {
	return "SELECT FROM pg_catalog.generate_series(1, CASE WHEN pg_catalog.pg_is_in_recovery() THEN 2 WHEN " + condition + " THEN 1 ELSE 0 END)"
}

const standbyRows = 2

// probeStatement: an answer, with one row.
var probeStatement = answer("true")

// A place is on what a wait takes its lock.
type place uint8

const (
	onOwn    place = iota // a session that holds nothing else
	onCalled              // the caller's session, which may hold other locks
	inTx                  // a transaction
)

// waitStatement is one bounded wait: an answer, with one row if the lock was granted. It is one
// message, and so one transaction: the settings that are local to it are gone with it.
//
// lock_timeout ends the wait, in a block that catches the error, so that the server does not log
// it. The wait is shorter than deadlock_timeout, by half: a holder's CREATE INDEX CONCURRENTLY
// waits for all snapshots, and a statement that waits has one, so that the server would call
// the two a deadlock (golang-migrate/migrate#960).
//
// The server may grant a lock to a wait that has already decided to end
// (madelson/DistributedLock#147). The block finds that, and so the answer is exact.
//
// In a transaction, restart begins a new one: a holder's CREATE INDEX CONCURRENTLY that has met the
// transaction while it waited waits for its end.
//
// The block's text is constant, and what it needs is in settings, so that pg_stat_statements
// has one entry for all keys.
func waitStatement(on place, restart string, k Key, shared bool, bound time.Duration, w sessionSettings) string {
	var first, block strings.Builder
	set := func(name, value string) {
		first.WriteString(", pg_catalog.set_config('advisory." + name + "', " + value + ", true)")
	}
	apply := func(name, from, local string) {
		block.WriteString(", pg_catalog.set_config('" + name + "', pg_catalog.current_setting('advisory." + from + "'), " + local + ")")
	}
	get := func(name, as string) string {
		return "pg_catalog.current_setting('advisory." + name + "')::pg_catalog." + as
	}

	first.WriteString(comment([]Key{k}))
	if on == inTx {
		// The SELECT takes the comment: to pg_stat_statements, up to PostgreSQL 15, a ROLLBACK with one
		// comment is not that with another. The transaction's own lock_timeout is put back with the grant.
		first.WriteString("SELECT; " + restart + "WITH old AS MATERIALIZED (SELECT pg_catalog.current_setting('lock_timeout') AS lock_timeout) ")
	}
	first.WriteString("SELECT pg_catalog.set_config('lock_timeout', pg_catalog.ceil(LEAST(" + milliseconds(bound) +
		", pg_catalog.date_part('epoch', pg_catalog.current_setting('deadlock_timeout')::pg_catalog.interval)" +
		" OPERATOR(pg_catalog.*) 500))::pg_catalog.text, true)")
	set("granted", "''")

	block.WriteString("PERFORM pg_catalog.pg_advisory_")
	if on == inTx {
		block.WriteString("xact_")
	}
	block.WriteString("lock")
	if shared {
		block.WriteString("_shared")
	}
	if k.space == pairSpace {
		class, object := k.pair()
		set("class", fmt.Sprintf("'%d'", class))
		set("object", fmt.Sprintf("'%d'", object))
		block.WriteString("(" + get("class", "int4") + ", " + get("object", "int4") + ")")
	} else {
		set("key", fmt.Sprintf("'%d'", k.id))
		block.WriteString("(" + get("key", "int8") + ")")
	}
	// With the grant, because this process may be out of reach by then.
	if w.silence > 0 {
		set("nonce", "'"+w.value("nonce")+"'")
		set("silence", "'"+w.value("silence")+"'")
	}
	for _, p := range w.parameters() {
		apply(p.name, p.from, "false")
	}
	if w.checks {
		block.WriteString(", " + checkCall(on == inTx))
	}
	if on == inTx {
		set("lock_timeout", "old.lock_timeout")
		apply("lock_timeout", "lock_timeout", "true")
	}
	const granted = "pg_catalog.set_config('advisory.granted', '1', true)"
	block.WriteString(", " + granted + "; EXCEPTION WHEN lock_not_available OR query_canceled THEN ")
	switch on {
	case onOwn:
		block.WriteString("PERFORM pg_catalog.pg_advisory_unlock_all();")
	case onCalled:
		classid, objid := lockColumns(k)
		set("classid", "'"+classid+"'")
		set("objid", "'"+objid+"'")
		block.WriteString("PERFORM " + granted + " FROM (" + heldRows(get("classid", "oid"), get("objid", "oid"), k.space, shared) + ") AS held;")
	case inTx:
		block.WriteString("NULL;") // the grant has gone with the block
	}
	if on == inTx {
		first.WriteString(" FROM old")
	}
	return first.String() + "; DO $advisory$BEGIN " + block.String() + " END$advisory$; " +
		answer("pg_catalog.current_setting('advisory.granted') OPERATOR(pg_catalog.=) '1'")
}

// comment begins a statement that waits, or a heartbeat: pg_stat_activity then says by name who
// waits, and who holds.
func comment(keys []Key) string {
	const most = 4
	var b strings.Builder
	b.WriteString("/* advisory: ")
	for i, k := range keys[:min(len(keys), most)] {
		if i > 0 {
			b.WriteString(", ")
		}
		b.WriteString(label(k))
	}
	if len(keys) > most {
		b.WriteString(", +" + strconv.Itoa(len(keys)-most))
	}
	b.WriteString(" */ ")
	return b.String()
}

// label is k's name, percent-encoded, or its number, or its two with a dot between.
func label(k Key) string {
	const longest = 64
	switch {
	case k.name != "":
	case k.space == pairSpace:
		class, object := k.pair()
		return fmt.Sprintf("%d.%d", class, object)
	default:
		return strconv.FormatInt(k.id, 10)
	}
	var b strings.Builder
	for i := range len(k.name) {
		c := k.name[i]
		s := string(rune(c))
		if !('a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || '0' <= c && c <= '9' || strings.IndexByte("-._~", c) >= 0) {
			s = fmt.Sprintf("%%%02X", c)
		}
		if b.Len()+len(s) > longest {
			break
		}
		b.WriteString(s)
	}
	return b.String()
}

// heldStatement: one row if this session holds the lock of k.
func heldStatement(k Key, shared bool) string {
	classid, objid := lockColumns(k)
	return heldRows("'"+classid+"'", "'"+objid+"'", k.space, shared)
}

func heldRows(classid, objid string, space keySpace, shared bool) string {
	mode := "ExclusiveLock"
	if shared {
		mode = "ShareLock"
	}
	return "SELECT FROM pg_catalog.pg_locks WHERE pid OPERATOR(pg_catalog.=) pg_catalog.pg_backend_pid() AND granted" +
		" AND mode OPERATOR(pg_catalog.=) '" + mode + "' AND " + lockRows(classid, objid, space)
}

// inThisDatabase goes with a condition on pg_locks that would be true in others, too.
const inThisDatabase = " AND database OPERATOR(pg_catalog.=)" +
	" (SELECT oid FROM pg_catalog.pg_database WHERE datname OPERATOR(pg_catalog.=) pg_catalog.current_database())"

// lockRow is the condition on pg_locks that finds the lock of k in any database.
func lockRow(k Key) string {
	classid, objid := lockColumns(k)
	return lockRows("'"+classid+"'", "'"+objid+"'", k.space)
}

// lockColumns is how a key is spread over the columns of pg_locks: the manual's section "pg_locks".
func lockColumns(k Key) (classid, objid string) {
	return strconv.FormatUint(uint64(k.id)>>32, 10), strconv.FormatUint(uint64(uint32(k.id)), 10)
}

func lockRows(classid, objid string, space keySpace) string {
	subid := "1"
	if space == pairSpace {
		subid = "2"
	}
	return "locktype OPERATOR(pg_catalog.=) 'advisory'" +
		" AND classid OPERATOR(pg_catalog.=) " + classid +
		" AND objid OPERATOR(pg_catalog.=) " + objid +
		" AND objsubid OPERATOR(pg_catalog.=) " + subid
}

// statement is prefix and the calls of the lock function for keys, joined by AND.
func statement(prefix, function string, keys []Key, shared bool) string {
	var few [160]byte
	b := append(few[:0], prefix...)
	for i, k := range keys {
		if i > 0 {
			b = append(b, " AND "...)
		}
		b = append(b, "pg_catalog."...)
		b = append(b, function...)
		if shared {
			b = append(b, "_shared"...)
		}
		b = append(b, '(')
		b = k.appendSQL(b)
		b = append(b, ')')
	}
	return string(b)
}

// batchStatement does for each of two arrays' elements, in order, what the first asks for
// (the op, with 16 for a shared lock and 32 for a Pair) to the key in the second. Its answer
// is a string of ones and zeros. The arrays are text, which every driver can send.
const batchStatement = "SELECT pg_catalog.array_to_string(ARRAY(SELECT CASE" +
	" WHEN op OPERATOR(pg_catalog.%) 16 OPERATOR(pg_catalog.=) 1 AND pg_catalog.pg_is_in_recovery() THEN 0" +
	" WHEN op OPERATOR(pg_catalog.=) 1 THEN pg_catalog.pg_try_advisory_lock(key)::pg_catalog.int4" +
	" WHEN op OPERATOR(pg_catalog.=) 2 THEN pg_catalog.pg_advisory_unlock(key)::pg_catalog.int4" +
	" WHEN op OPERATOR(pg_catalog.=) 17 THEN pg_catalog.pg_try_advisory_lock_shared(key)::pg_catalog.int4" +
	" WHEN op OPERATOR(pg_catalog.=) 18 THEN pg_catalog.pg_advisory_unlock_shared(key)::pg_catalog.int4" +
	" WHEN op OPERATOR(pg_catalog.=) 33 THEN pg_catalog.pg_try_advisory_lock(" + batchPair + ")::pg_catalog.int4" +
	" WHEN op OPERATOR(pg_catalog.=) 34 THEN pg_catalog.pg_advisory_unlock(" + batchPair + ")::pg_catalog.int4" +
	" WHEN op OPERATOR(pg_catalog.=) 49 THEN pg_catalog.pg_try_advisory_lock_shared(" + batchPair + ")::pg_catalog.int4" +
	" WHEN op OPERATOR(pg_catalog.=) 50 THEN pg_catalog.pg_advisory_unlock_shared(" + batchPair + ")::pg_catalog.int4" +
	" ELSE 0 END FROM ROWS FROM (pg_catalog.unnest($1::pg_catalog.text::pg_catalog.int4[])," +
	" pg_catalog.unnest($2::pg_catalog.text::pg_catalog.int8[])) AS asked (op, key)), '')"

const batchPair = "(key OPERATOR(pg_catalog.>>) 32)::pg_catalog.int4," +
	" ((key OPERATOR(pg_catalog.<<) 32) OPERATOR(pg_catalog.>>) 32)::pg_catalog.int4"

// lookStatement: one row if somebody waits for the lock.
func lookStatement(k Key) string {
	return "SELECT WHERE EXISTS (SELECT FROM pg_catalog.pg_locks WHERE " + lockRow(k) + " AND NOT granted" + inThisDatabase + ")"
}

// The transaction-scoped statements. COMMIT and ROLLBACK release the locks.

// tryTxStatement: one row if the lock was granted.
func tryTxStatement(k Key, shared bool) string {
	return statement("SELECT WHERE "+onPrimary, "pg_try_advisory_xact_lock", []Key{k}, shared) + " END"
}

// tryCallersTxStatement is an answer, with one row if the lock was granted.
func tryCallersTxStatement(k Key, shared bool) string {
	return answer(statement("", "pg_try_advisory_xact_lock", []Key{k}, shared))
}

// tryFirstStatement: like tryTxStatement, and two rows, without trying, if this
// transaction has one snapshot for all its statements by the server's default
// (default_transaction_isolation).
func tryFirstStatement(k Key, shared bool) string {
	return statement("SELECT FROM pg_catalog.generate_series(1, CASE"+
		" WHEN pg_catalog.current_setting('transaction_isolation') OPERATOR(pg_catalog.=) ANY ('{repeatable read,serializable}') THEN 2"+
		" WHEN pg_catalog.pg_is_in_recovery() THEN 0 WHEN ", "pg_try_advisory_xact_lock", []Key{k}, shared) + " THEN 1 ELSE 0 END)"
}

// deadlockStatement: a row for each holder of the lock that waits for this session.
func deadlockStatement(k Key) string {
	return "SELECT FROM pg_catalog.pg_locks WHERE " + lockRow(k) + " AND granted" + inThisDatabase +
		" AND pg_catalog.pg_backend_pid() OPERATOR(pg_catalog.=) ANY (pg_catalog.pg_blocking_pids(pid))"
}

// restartStatement is put before another statement, and begins a new transaction like the one that
// it rolls back.
const restartStatement = "ROLLBACK AND CHAIN; "

const (
	savepointStatement  = "SAVEPOINT advisory"
	rollbackToStatement = "ROLLBACK TO SAVEPOINT advisory; RELEASE SAVEPOINT advisory"
)

// markStatement marks a session for Check: an answer, with one row if that has worked. markedStatement
// has one row if the session is the one that was marked.
func markStatement(nonce string) string {
	return "SELECT pg_catalog.set_config('advisory.session', '" + nonce + "', false); " + markedStatement(nonce)
}

func markedStatement(nonce string) string {
	return answer("pg_catalog.current_setting('advisory.session', true) OPERATOR(pg_catalog.=) '" + nonce + "'")
}
