package pgsql

import (
	"fmt"
	"strconv"
	"strings"
	"time"
)

// A Place is where a lock is taken.
type Place uint8

const (
	OnOwn     Place = iota // a session that holds nothing else
	OnCallers              // a session of the caller's, which may hold other locks
	InTx                   // a transaction
)

// Wait is one bounded wait: an answer, with one row if the lock was granted. It is one message,
// and so one transaction: the settings that are local to it are gone with it.
//
// lock_timeout ends the wait, in a block that catches the error, so that the server does not log
// it. The wait lasts for half of deadlock_timeout at most. A holder's CREATE INDEX CONCURRENTLY waits
// for all snapshots, and a statement that waits has one, so that the server would call the two a
// deadlock (golang-migrate/migrate#960).
//
// The server may grant a lock to a wait that has already decided to end
// (madelson/DistributedLock#147). The block finds that, and so the answer is exact.
//
// In a transaction, restart begins a new one. A holder's CREATE INDEX CONCURRENTLY may wait for the
// end of the one that waited before.
//
// The block's text is constant, and what it needs is in settings, so that pg_stat_statements
// has one entry for all keys. A Comment is to be put before it.
func Wait(on Place, restart string, k Key, shared bool, bound time.Duration, w Settings) string {
	t := waitText{on: on}
	if on == InTx {
		// The SELECT takes the comment: to pg_stat_statements, up to PostgreSQL 15, a ROLLBACK with one
		// comment is not that with another. The transaction's own lock_timeout is put back with the grant.
		t.first.WriteString("SELECT; " + restart + "WITH old AS MATERIALIZED (SELECT pg_catalog.current_setting('lock_timeout') AS lock_timeout) ")
	}
	t.first.WriteString("SELECT pg_catalog.set_config('lock_timeout', pg_catalog.ceil(LEAST(" + milliseconds(bound) +
		", pg_catalog.date_part('epoch', pg_catalog.current_setting('deadlock_timeout')::pg_catalog.interval)" +
		" OPERATOR(pg_catalog.*) 500))::pg_catalog.text, true)")
	t.set("granted", "''")
	const granted = "pg_catalog.set_config('advisory.granted', '1', true)"
	t.block.WriteString("PERFORM " + granted)
	t.settings(w)
	t.lock(k, shared) // last, so that little is left to do after the grant; a time-out undoes the settings
	if on == InTx {
		t.set("lock_timeout", "old.lock_timeout")
		t.apply("lock_timeout", "lock_timeout", "true")
	}
	t.block.WriteString("; EXCEPTION WHEN lock_not_available OR query_canceled THEN ")
	switch on {
	case OnOwn:
		t.block.WriteString("PERFORM pg_catalog.pg_advisory_unlock_all();")
	case OnCallers:
		classid, objid := k.columns()
		t.set("classid", "'"+classid+"'")
		t.set("objid", "'"+objid+"'")
		t.block.WriteString("PERFORM " + granted + " FROM (SELECT" + ourLocks(shared) + lockRows(get("classid", "oid"), get("objid", "oid"), k) + ") AS held;")
	case InTx:
		t.block.WriteString("NULL;") // the grant has gone with the block
		t.first.WriteString(" FROM old")
	}
	block := "BEGIN " + t.block.String() + " END"
	rows := answer("pg_catalog.current_setting('advisory.granted') OPERATOR(pg_catalog.=) '1'")
	if on == OnOwn {
		// A cursor has the answer planned before the wait. That takes a seventh off a hand-off. Elsewhere, there
		// may be one of that name, or it would stay.
		block = "DECLARE answer pg_catalog.refcursor := 'advisory_answer'; BEGIN OPEN answer FOR " + rows + "; " + block + "; END"
		rows = "MOVE ALL IN advisory_answer"
	}
	return t.first.String() + "; DO $advisory$" + block + "$advisory$; " + rows
}

// A waitText is a Wait in the making: what comes before the block, and the block.
type waitText struct {
	on           Place
	first, block strings.Builder
}

// set makes a setting for the block to read.
func (t *waitText) set(name, value string) {
	t.first.WriteString(", pg_catalog.set_config('advisory." + name + "', " + value + ", true)")
}

// apply has the block make a setting of the server's, with a value that set has passed to it.
func (t *waitText) apply(name, from, local string) {
	t.block.WriteString(", pg_catalog.set_config('" + name + "', pg_catalog.current_setting('advisory." + from + "'), " + local + ")")
}

// get is the value that set has passed to the block.
func get(name, as string) string {
	return "pg_catalog.current_setting('advisory." + name + "')::pg_catalog." + as
}

// lock has the block take the lock.
func (t *waitText) lock(k Key, shared bool) {
	t.block.WriteString(", pg_catalog.pg_advisory_")
	if t.on == InTx {
		t.block.WriteString("xact_")
	}
	t.block.WriteString("lock")
	if shared {
		t.block.WriteString("_shared")
	}
	if k.Space == Pair {
		class, object := k.Pair()
		t.set("class", fmt.Sprintf("'%d'", class))
		t.set("object", fmt.Sprintf("'%d'", object))
		t.block.WriteString("(" + get("class", "int4") + ", " + get("object", "int4") + ")")
	} else {
		t.set("key", fmt.Sprintf("'%d'", k.ID))
		t.block.WriteString("(" + get("key", "int8") + ")")
	}
}

// settings has the block make the settings of w, which stay with the grant: this process may be out of
// reach by then.
func (t *waitText) settings(w Settings) {
	if w.IdleTimeout > 0 {
		t.set("nonce", "'"+w.Nonce+"'")
		t.set("idle_timeout", "'"+milliseconds(w.IdleTimeout)+"'")
	}
	for _, p := range w.parameters() {
		t.apply(p.name, p.from, "false")
	}
	if w.Check {
		t.block.WriteString(", " + check(t.on == InTx))
	}
}

// Settings are the settings of a session that holds locks.
type Settings struct {
	// IdleTimeout is how long the server waits for the session's next statement before it ends the
	// session. 0: for ever.
	IdleTimeout time.Duration

	// Nonce tells the session from every other. DISCARD ALL, which frees the locks, resets it.
	Nonce string

	// Exposed: the caller may open a transaction, which is not idle in the sense of
	// idle_session_timeout.
	Exposed bool

	// Check: the server looks during each statement whether this process is still there. Otherwise
	// a lock outlives a process that dies by the statement that is under way.
	Check bool
}

// A parameter is a setting of the server's, and where it has its value from.
type parameter struct{ name, from string }

func (w Settings) parameters() []parameter {
	switch {
	case w.IdleTimeout == 0:
		return nil
	case w.Exposed:
		return []parameter{{"advisory.session", "nonce"}, {"idle_session_timeout", "idle_timeout"}, {"idle_in_transaction_session_timeout", "idle_timeout"}}
	default:
		return []parameter{{"advisory.session", "nonce"}, {"idle_session_timeout", "idle_timeout"}}
	}
}

// None tells whether there is nothing to set.
func (w Settings) None() bool { return w.IdleTimeout == 0 && !w.Check }

// calls are the calls that make the settings. The nonce is set the first time alone.
func (w Settings) calls(first bool) string {
	var calls []string
	for _, p := range w.parameters() {
		if p.from == "nonce" && !first {
			continue
		}
		value := milliseconds(w.IdleTimeout)
		if p.from == "nonce" {
			value = w.Nonce
		}
		calls = append(calls, "pg_catalog.set_config('"+p.name+"', '"+value+"', false)")
	}
	if w.Check {
		calls = append(calls, check(false))
	}
	return strings.Join(calls, ", ")
}

// Set makes the settings. It is put before another statement, as Reset is. Only the first Set has the
// nonce: if the session has been replaced since, the other one must not get it.
func (w Settings) Set(first bool) string {
	return "SELECT " + w.calls(first) + "; "
}

// Reset undoes Set.
func (w Settings) Reset() string {
	var s string
	for _, p := range w.parameters() {
		s += "RESET " + p.name + "; "
	}
	if w.Check {
		s += "RESET " + checkInterval + "; "
	}
	return s
}

// SetCheck is put before a try in a transaction. A wait makes the same setting with its grant.
func (w Settings) SetCheck() string {
	if !w.Check {
		return ""
	}
	return "SELECT " + check(true) + "; "
}

const checkInterval = "client_connection_check_interval" // PostgreSQL 14

// check has the server look every second, or as often as it does anyway.
func check(local bool) string {
	const current = "pg_catalog.current_setting('" + checkInterval + "')"
	return "pg_catalog.set_config('" + checkInterval + "', CASE" +
		" WHEN " + current + "::pg_catalog.interval OPERATOR(pg_catalog.>) '0' AND " + current + "::pg_catalog.interval OPERATOR(pg_catalog.<) '1s'" +
		" THEN " + current + " ELSE '1s' END, " + strconv.FormatBool(local) + ")"
}
