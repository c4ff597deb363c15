package advisory

import (
	"database/sql/driver"
	"errors"
	"io"
	"net"
	"reflect"
	"slices"
	"strings"
	"time"
)

// Every error of this package says the operation and the key, and matches, with
// errors.Is, one of these where it applies, and the error of the driver or the context
// beneath it.
var (
	// ErrNotAcquired: the lock was not taken and is not held, because NoWait found
	// it taken, Timeout was over (then errors.As finds an error whose Timeout method
	// says so), or the context ended while waiting (then errors.Is finds the context's
	// error too).
	ErrNotAcquired = errors.New("advisory: lock not acquired")

	// ErrLost: the lock was acquired, and it cannot be shown that it was held to
	// the end. The session died, did not answer, or is no longer the one that
	// took the lock. Another process may have held the lock in the meantime.
	ErrLost = errors.New("advisory: lock lost")

	// ErrReentrant: the context says that its own caller holds the lock already.
	// Waiting for it would last for ever.
	ErrReentrant = errors.New("advisory: lock already held by this caller")

	// ErrDeadlock: the wait was part of a deadlock, and has ended. The lock is not held.
	// The server found it (SQLSTATE 40P01), or AcquireTx did.
	//
	// Not every deadlock is found. The statements of this package that wait end before the server's
	// deadlock_timeout (see the package documentation), so that it does not see one that
	// is made of them alone. Callers that take several locks one by one should do so in one order, as
	// WithLocks does, or with a Timeout.
	ErrDeadlock = errors.New("advisory: deadlock detected")
)

// A lockError is the error of one operation on one key, or several.
type lockError struct {
	op   string // "acquire", "release", "hold"
	key  string
	msg  string
	errs []error // what errors.Is and errors.As find
}

func (e *lockError) Error() string {
	var b strings.Builder
	b.WriteString("advisory: ")
	b.WriteString(e.op)
	if e.key != "" {
		b.WriteByte(' ')
		b.WriteString(e.key)
	}
	b.WriteString(": ")
	b.WriteString(e.msg)
	return b.String()
}

func (e *lockError) Unwrap() []error { return e.errs }

func keyList(keys []Key) string {
	var b strings.Builder
	for i, k := range keys {
		if i == 3 && len(keys) > 4 {
			b.WriteString(" and ")
			b.WriteString(plural(len(keys)-i, "more key"))
			break
		}
		if i > 0 {
			b.WriteString(", ")
		}
		b.WriteString(k.String())
	}
	return b.String()
}

// SQLSTATEs that mean something to a lock (PostgreSQL manual, appendix "PostgreSQL
// Error Codes").
const (
	lockNotAvailable    = "55P03" // lock_timeout
	queryCanceled       = "57014" // statement_timeout, pg_cancel_backend
	inFailedTransaction = "25P02"
	deadlockDetected    = "40P01"
	outOfMemory         = "53200" // the server's lock table is full
	featureNotSupported = "0A000"
	syntaxError         = "42601"
	undefinedFunc       = "42883"
	undefinedObject     = "42704"
)

// sqlState is the SQLSTATE of a server's error, or "". Both drivers' errors have
// the method.
func sqlState(err error) string {
	var s interface{ SQLState() string }
	if errors.As(err, &s) {
		return s.SQLState()
	}
	return ""
}

// sessionGone tells whether err means that the session has ended, or is out of
// reach: not the server's answer to a statement, but the lack of one.
func sessionGone(err error) bool {
	switch state := sqlState(err); {
	case strings.HasPrefix(state, "08"), fatal(err): // connection exception
		return true
	case state != "":
		switch state {
		case "57P01", "57P02", "57P03", // shutdown, crash, starting up
			"57P05", "25P03", "25P04": // idle and transaction timeouts
			return true
		}
		return false
	}
	var silence noAnswer
	var network net.Error
	// pgx says so of an error on a connection that it has found closed.
	var unsent interface{ SafeToRetry() bool }
	if errors.As(err, &unsent) && unsent.SafeToRetry() {
		return true
	}
	return errors.Is(err, driver.ErrBadConn) || errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) ||
		errors.Is(err, net.ErrClosed) || errors.Is(err, errAbandoned) ||
		errors.As(err, &silence) || errors.As(err, &network)
}

// fatal tells whether err is the last word of a server, or of a pooler, whose SQLSTATEs are its own. Both
// drivers' errors have the field.
func fatal(err error) bool {
	for ; err != nil; err = errors.Unwrap(err) {
		v := reflect.Indirect(reflect.ValueOf(err))
		if v.Kind() != reflect.Struct {
			continue
		}
		if severity := v.FieldByName("Severity"); severity.IsValid() && severity.Kind() == reflect.String && severity.String() == "FATAL" {
			return true
		}
	}
	return false
}

// mayPass tells whether err, of a connection that could not be made, may pass. A server that restarts or
// fails over says many things, and so do the poolers before it. A wrong password, or a database or a
// privilege that is missing, stays.
func mayPass(err error) bool {
	state := sqlState(err)
	return !strings.HasPrefix(state, "28") && !strings.HasPrefix(state, "3D") && !strings.HasPrefix(state, "42")
}

// isClosed tells whether err is that of a *sql.DB that has been closed, which has no
// name of its own.
func isClosed(err error) bool {
	for ; err != nil; err = errors.Unwrap(err) {
		if err.Error() == "sql: database is closed" {
			return true
		}
		if e, ok := err.(interface{ Unwrap() []error }); ok {
			return slices.ContainsFunc(e.Unwrap(), isClosed)
		}
	}
	return false
}

// explain is err's own text, and what to do about it where that is known.
func explain(err error) string {
	msg := err.Error()
	switch sqlState(err) {
	case outOfMemory:
		return msg + " (the server's lock table is full: raise max_locks_per_transaction, or hold fewer locks)"
	case syntaxError, undefinedFunc, undefinedObject:
		return msg + " (is this PostgreSQL 14 or newer? see Check)"
	}
	return msg
}

// A noAnswer is the error of a statement that the server did not answer in time.
type noAnswer struct{ after time.Duration }

func (e noAnswer) Error() string { return "no answer from the server within " + e.after.String() }
