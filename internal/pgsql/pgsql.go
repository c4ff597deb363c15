// Package pgsql is what this module says to PostgreSQL: every statement, as text, with what its
// answer means, and the errors that come back. It sends nothing, and knows no driver.
//
// Statements have no arguments, but for Batch, Holders, TryCached and UnlockCached. Both drivers then
// use the simple protocol: one round trip that leaves no prepared statement behind. The answer is the
// number of rows in the command tag, but for Batch, Token, Holders, Locks and Waits. Numbers and
// percent-encoded names are the only text that is put in. Every function, operator, type and relation
// is qualified with pg_catalog, so that nothing in the search path can take its place.
package pgsql

import (
	"strconv"
	"strings"
	"time"
)

// Try takes the locks of keys, until one is refused. Its answer has as many rows as locks were
// granted, which are the first of keys. Nothing is granted on a standby, whose locks exclude
// nobody on the primary.
func Try(keys []Key, shared bool) string {
	if len(keys) == 1 {
		return calls("SELECT WHERE "+onPrimary, "pg_try_advisory_lock", keys, shared) + " END"
	}
	var b strings.Builder
	b.WriteString("SELECT FROM pg_catalog.generate_series(1, CASE WHEN pg_catalog.pg_is_in_recovery() THEN 0")
	for i := range keys {
		b.WriteString(calls(" WHEN NOT ", "pg_try_advisory_lock", keys[i:i+1], shared))
		b.WriteString(" THEN " + strconv.Itoa(i))
	}
	b.WriteString(" ELSE " + strconv.Itoa(len(keys)) + " END)")
	return b.String()
}

// TryCached is Try of one lock, with its key as arguments.
func TryCached(k Key, shared bool) (query string, args []int64) {
	query, args = cached("SELECT WHERE "+onPrimary, "pg_try_advisory_lock", k, shared)
	return query + " END", args
}

// onPrimary begins a condition that is false on a standby. AND would leave the order to the planner.
const onPrimary = "CASE WHEN pg_catalog.pg_is_in_recovery() THEN false ELSE "

// TryWith is Try of one lock, and makes the settings of w.
func TryWith(w Settings, k Key, shared bool) string {
	try := Try([]Key{k}, shared)
	if set := w.calls(true); set != "" {
		return "SELECT " + set + strings.TrimPrefix(try, "SELECT")
	}
	return try
}

// answer has one row if condition is true, none if it is not, and OnStandby rows on a standby.
func answer(condition string) string {
	return "SELECT FROM pg_catalog.generate_series(1, CASE WHEN pg_catalog.pg_is_in_recovery() THEN " + strconv.Itoa(OnStandby) + " WHEN " + condition + " THEN 1 ELSE 0 END)"
}

// Numbers of rows that are neither yes nor no.
const (
	OnStandby = 2 // the server is a hot standby

	// Of TryCallers alone.
	CallersInTx = 3 // the session is in a transaction
	CallersHeld = 4 // the session holds the lock already

	// Of TryTx alone.
	OneSnapshot = 5 // the transaction has one snapshot for all its statements
)

// TryCallers is Try on a session of the caller's, whose state is not known. In a transaction, now() stays
// at its begin, and so differs from statement_timestamp().
func TryCallers(k Key, shared bool) string {
	return "SELECT FROM pg_catalog.generate_series(1, CASE WHEN pg_catalog.pg_is_in_recovery() THEN " + strconv.Itoa(OnStandby) +
		" WHEN pg_catalog.now() OPERATOR(pg_catalog.<>) pg_catalog.statement_timestamp() THEN " + strconv.Itoa(CallersInTx) +
		" WHEN EXISTS (SELECT FROM pg_catalog.pg_locks WHERE pid OPERATOR(pg_catalog.=) pg_catalog.pg_backend_pid() AND " +
		k.Row() + ") THEN " + strconv.Itoa(CallersHeld) +
		calls(" WHEN ", "pg_try_advisory_lock", []Key{k}, shared) + " THEN 1 ELSE 0 END)"
}

// Unlock has one row if all the locks were held.
func Unlock(keys []Key, shared bool) string {
	return calls("SELECT WHERE ", "pg_advisory_unlock", keys, shared)
}

// UnlockCached is Unlock of one lock, with its key as arguments.
func UnlockCached(k Key, shared bool) (query string, args []int64) {
	return cached("SELECT WHERE ", "pg_advisory_unlock", k, shared)
}

// UnlockHeld unlocks whichever of the locks the session holds, with a row for each. The server
// warns of an unlock of what is not held, so the statement looks first, once for all of them.
func UnlockHeld(keys []Key, shared bool) string {
	unlock := "pg_catalog.pg_advisory_unlock"
	if shared {
		unlock += "_shared"
	}
	rows := make([]string, len(keys))
	for i, k := range keys {
		rows[i] = k.Row()
	}
	return "SELECT CASE WHEN objsubid OPERATOR(pg_catalog.=) 2" +
		" THEN " + unlock + "(classid::pg_catalog.int4, objid::pg_catalog.int4)" +
		" ELSE " + unlock + "((classid::pg_catalog.int8 OPERATOR(pg_catalog.<<) 32) OPERATOR(pg_catalog.|) objid::pg_catalog.int8) END" +
		" FROM (SELECT classid, objid, objsubid" + ourLocks(shared) + "(" + strings.Join(rows, " OR ") + ") OFFSET 0) AS held"
}

// UnlockExposed has one row if the lock was held, and two if a transaction is open on the session
// besides. It frees whatever else the session holds.
func UnlockExposed(keys []Key, shared bool) string {
	return calls("SELECT pg_catalog.pg_advisory_unlock_all() FROM pg_catalog.generate_series(1, CASE WHEN NOT (",
		"pg_advisory_unlock", keys, shared) +
		") THEN 0 WHEN pg_catalog.now() OPERATOR(pg_catalog.<>) pg_catalog.statement_timestamp() THEN 2 ELSE 1 END)"
}

// UnlockAll unlocks all that the session holds.
const UnlockAll = "SELECT pg_catalog.pg_advisory_unlock_all()"

// Ping is answered by a session that lives.
const Ping = "SELECT"

// LeftOpen is a statement that a driver refuses to send while rows are open.
const LeftOpen = "SELECT WHERE true"

// Probe is answered with one row by a primary.
var Probe = answer("true")

// Look has one row if somebody waits for the lock in the server's queue.
func Look(k Key) string {
	return "SELECT WHERE EXISTS (SELECT FROM pg_catalog.pg_locks WHERE " + k.Row() + " AND NOT granted" + inThisDatabase + ")"
}

// Heartbeat has one row if the session is still the one with the nonce. set is put before it, and
// may set the nonce. It costs the same however many locks there are. A look into pg_locks would cost
// more with each lock of any database of the server.
func Heartbeat(keys []Key, set, nonce string) string { return Comment(keys, "") + set + Marked(nonce) }

// Mark gives a session the nonce, and is then Marked.
func Mark(nonce string) string {
	return "SELECT pg_catalog.set_config('advisory.session', '" + nonce + "', false); " + Marked(nonce)
}

// Marked has one row if the session has the nonce.
func Marked(nonce string) string {
	return answer("pg_catalog.current_setting('advisory.session', true) OPERATOR(pg_catalog.=) '" + nonce + "'")
}

// The transaction-scoped statements. COMMIT and ROLLBACK release the locks.

// TryCallersTx has one row if the lock was granted, and OnStandby rows on a standby.
func TryCallersTx(k Key, shared bool) string {
	return answer(calls("", "pg_try_advisory_xact_lock", []Key{k}, shared))
}

// TryTx has one row if the lock was granted. It has OneSnapshot rows, and does not try, if the server's
// default (default_transaction_isolation) gives the transaction one snapshot.
func TryTx(k Key, shared bool) string {
	return calls("SELECT FROM pg_catalog.generate_series(1, CASE"+
		" WHEN pg_catalog.current_setting('transaction_isolation') OPERATOR(pg_catalog.=) ANY ('{repeatable read,serializable}') THEN "+strconv.Itoa(OneSnapshot)+
		" WHEN pg_catalog.pg_is_in_recovery() THEN 0 WHEN ", "pg_try_advisory_xact_lock", []Key{k}, shared) + " THEN 1 ELSE 0 END)"
}

// Deadlock has a row for each holder of the lock that waits for this session.
func Deadlock(k Key) string {
	return "SELECT FROM pg_catalog.pg_locks WHERE " + k.Row() + " AND granted" + inThisDatabase +
		" AND pg_catalog.pg_backend_pid() OPERATOR(pg_catalog.=) ANY (pg_catalog.pg_blocking_pids(pid))"
}

const (
	// Restart begins a new transaction like the one that it rolls back.
	Restart = "ROLLBACK AND CHAIN"

	Savepoint           = "SAVEPOINT advisory"
	RollbackToSavepoint = "ROLLBACK TO SAVEPOINT advisory; RELEASE SAVEPOINT advisory"
)

// TxIdleTimeout is put before a statement, and has the server end the transaction once it has waited
// for its next statement for d. SET takes no snapshot.
func TxIdleTimeout(d time.Duration) string {
	return "SET LOCAL idle_in_transaction_session_timeout = " + milliseconds(d) + "; "
}

// Token draws the fencing token. Drawing a transaction ID writes nothing that a commit would wait
// for, and after a crash the server would draw it again. The message, which nobody needs to read,
// has it written and flushed, even where synchronous_commit is off, and where that is on, sent to
// the synchronous standbys. The text is what every driver can scan: none of them knows xid8.
const Token = "SELECT pg_catalog.pg_current_xact_id()::pg_catalog.text" +
	" FROM pg_catalog.pg_logical_emit_message(true, 'advisory', '')," +
	" pg_catalog.set_config('synchronous_commit', CASE WHEN pg_catalog.current_setting('synchronous_commit')" +
	" OPERATOR(pg_catalog.=) 'off' THEN 'local' ELSE pg_catalog.current_setting('synchronous_commit') END, true)"

// Holders selects who holds a lock and who waits for it. Its arguments are Key.Columns.
const Holders = "SELECT " + ofLocks + `
	AND l.classid OPERATOR(pg_catalog.=) $1::pg_catalog.int8::pg_catalog.oid
	AND l.objid OPERATOR(pg_catalog.=) $2::pg_catalog.int8::pg_catalog.oid
	AND l.objsubid OPERATOR(pg_catalog.=) $3::pg_catalog.int4` + ofLocksOrder

// Locks is Holders of all advisory locks of the database. The columns of the key, for KeyOf, come first.
const Locks = "SELECT l.classid::pg_catalog.int8, l.objid::pg_catalog.int8, l.objsubid, " + ofLocks + ofLocksOrder

const (
	ofLocks = `COALESCE(l.pid, 0), l.granted, l.mode OPERATOR(pg_catalog.=) 'ShareLock',
	COALESCE(a.usename::pg_catalog.text, ''), COALESCE(a.application_name, ''), COALESCE(pg_catalog.host(a.client_addr), ''), COALESCE(a.state, ''),
	CASE WHEN a.query OPERATOR(pg_catalog.=) '<insufficient privilege>' THEN '' ELSE COALESCE(a.query, '') END,
	a.backend_start, l.waitstart
FROM pg_catalog.pg_locks l LEFT JOIN pg_catalog.pg_stat_activity a ON a.pid OPERATOR(pg_catalog.=) l.pid
WHERE l.locktype OPERATOR(pg_catalog.=) 'advisory'
	AND l.database OPERATOR(pg_catalog.=) (SELECT oid FROM pg_catalog.pg_database WHERE datname OPERATOR(pg_catalog.=) pg_catalog.current_database())`

	ofLocksOrder = `
ORDER BY l.granted DESC, l.waitstart, a.backend_start, l.pid`
)

// Waits selects the statements that begin with a comment of ours, and are under way, or were a moment
// ago: a wait is not seen to have a gap between two of its statements, which grows with the load.
const Waits = `SELECT pid, COALESCE(application_name, ''), query FROM pg_catalog.pg_stat_activity
WHERE datname OPERATOR(pg_catalog.=) pg_catalog.current_database() AND pg_catalog.starts_with(query, '` + commentBegins + `')
	AND (state OPERATOR(pg_catalog.=) 'active'
		OR state_change OPERATOR(pg_catalog.>) (pg_catalog.clock_timestamp() OPERATOR(pg_catalog.-) '250 ms'::pg_catalog.interval))`

// inThisDatabase goes with a condition on pg_locks that would be true in others, too.
const inThisDatabase = " AND database OPERATOR(pg_catalog.=)" +
	" (SELECT oid FROM pg_catalog.pg_database WHERE datname OPERATOR(pg_catalog.=) pg_catalog.current_database())"

// Row is the condition on pg_locks that finds the lock of k in any database.
func (k Key) Row() string {
	classid, objid := k.columns()
	return lockRows("'"+classid+"'", "'"+objid+"'", k)
}

func (k Key) columns() (classid, objid string) {
	c, o, _ := k.Columns()
	return strconv.FormatUint(uint64(c), 10), strconv.FormatUint(uint64(o), 10)
}

// ourLocks begins the FROM of a query for locks that this session holds.
func ourLocks(shared bool) string {
	mode := "ExclusiveLock"
	if shared {
		mode = "ShareLock"
	}
	return " FROM pg_catalog.pg_locks WHERE pid OPERATOR(pg_catalog.=) pg_catalog.pg_backend_pid() AND granted" +
		" AND mode OPERATOR(pg_catalog.=) '" + mode + "' AND "
}

func lockRows(classid, objid string, k Key) string {
	_, _, subid := k.Columns()
	return "locktype OPERATOR(pg_catalog.=) 'advisory'" +
		" AND classid OPERATOR(pg_catalog.=) " + classid +
		" AND objid OPERATOR(pg_catalog.=) " + objid +
		" AND objsubid OPERATOR(pg_catalog.=) " + strconv.Itoa(subid)
}

// calls is prefix and the calls of the lock function for keys, joined by AND.
func calls(prefix, function string, keys []Key, shared bool) string {
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
		b = k.appendLiteral(b)
		b = append(b, ')')
	}
	return string(b)
}

// cached is prefix and the call of the lock function, with the key as arguments.
func cached(prefix, function string, k Key, shared bool) (query string, args []int64) {
	if shared {
		function += "_shared"
	}
	if k.Space == Pair {
		class, object := k.Pair()
		return prefix + "pg_catalog." + function + "($1, $2)", []int64{int64(class), int64(object)}
	}
	return prefix + "pg_catalog." + function + "($1)", []int64{k.ID}
}

// milliseconds is d as PostgreSQL's time settings take it, rounded up: to them, 0 means "no limit".
func milliseconds(d time.Duration) string {
	return strconv.FormatInt(int64((d+time.Millisecond-1)/time.Millisecond), 10)
}
