package pgsql

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

// SQLSTATEs that mean something to a lock (PostgreSQL manual, appendix "PostgreSQL Error Codes").
const (
	QueryCanceled       = "57014" // statement_timeout, pg_cancel_backend
	InFailedTransaction = "25P02"
	DeadlockDetected    = "40P01"
	FeatureNotSupported = "0A000"

	outOfMemory     = "53200" // the server's lock table is full
	syntaxError     = "42601"
	undefinedFunc   = "42883"
	undefinedObject = "42704"

	undefinedStatement = "26000"
	duplicateStatement = "42P05"
)

// State returns the SQLSTATE of a server's error, or "". Both drivers' errors have the method.
func State(err error) string {
	if err == nil {
		return ""
	}
	var s interface{ SQLState() string }
	if errors.As(err, &s) {
		return s.SQLState()
	}
	return ""
}

// Gone tells whether err means that the session has ended, or is out of reach: it is not the
// server's answer to a statement, but the lack of one.
func Gone(err error) bool {
	switch state := State(err); {
	case strings.HasPrefix(state, "08"), fatal(err): // connection exception
		return true
	case state != "":
		return slices.Contains([]string{
			"57P01", "57P02", "57P03", // shutdown, crash, starting up
			"57P05", "25P03", "25P04", // idle and transaction timeouts
		}, state)
	}
	var network net.Error
	// pgx says so of an error on a connection that it has found closed.
	var unsent interface{ SafeToRetry() bool }
	if errors.As(err, &unsent) && unsent.SafeToRetry() {
		return true
	}
	return errors.Is(err, driver.ErrBadConn) || errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) ||
		errors.Is(err, net.ErrClosed) || IsNoAnswer(err) || errors.As(err, &network)
}

// Answered tells whether err is the server's answer to a statement, on a session that goes on.
func Answered(err error) bool { return State(err) != "" && !Gone(err) }

// fatal tells whether err is the last word of a server, or of a pooler, whose SQLSTATEs are its
// own. Both drivers' errors have the field.
func fatal(err error) bool {
	for ; err != nil; err = errors.Unwrap(err) {
		v := reflect.Indirect(reflect.ValueOf(err))
		if v.Kind() != reflect.Struct {
			continue
		}
		if f := v.FieldByName("Severity"); f.IsValid() && f.Kind() == reflect.String && f.String() == "FATAL" {
			return true
		}
	}
	return false
}

// MayPass tells whether err, of a connection that could not be made, may pass. A server that
// restarts or fails over says many things, and so do the poolers before it. A wrong password, or
// a database or a privilege that is missing, stays.
func MayPass(err error) bool {
	state := State(err)
	return !strings.HasPrefix(state, "28") && !strings.HasPrefix(state, "3D") && !strings.HasPrefix(state, "42")
}

// NotPrepared tells whether err is that of a prepared statement of which the driver knows more, or less,
// than the server. It has not been executed.
func NotPrepared(err error) bool {
	state := State(err)
	return state == undefinedStatement || state == duplicateStatement
}

// RefusesWait tells whether the server does not execute the statement of Wait: PL/pgSQL is gone,
// say, or this role may not use it.
func RefusesWait(err error) bool {
	state := State(err)
	return strings.HasPrefix(state, "42") || strings.HasPrefix(state, "0A")
}

// RefusesCheck tells whether the server does not make the setting of Settings.Check: it runs on
// a platform that cannot, or is no PostgreSQL.
func RefusesCheck(err error) bool {
	return State(err) != "" && strings.Contains(err.Error(), checkInterval)
}

// PoolClosed tells whether err is that of a *sql.DB that has been closed, which has no name of
// its own.
func PoolClosed(err error) bool {
	for ; err != nil; err = errors.Unwrap(err) {
		if err.Error() == "sql: database is closed" {
			return true
		}
		if e, ok := err.(interface{ Unwrap() []error }); ok {
			return slices.ContainsFunc(e.Unwrap(), PoolClosed)
		}
	}
	return false
}

// Explain returns err's own text, and what to do about it where that is known.
func Explain(err error) string {
	msg := err.Error()
	switch State(err) {
	case outOfMemory:
		return msg + " (the server's lock table is full: raise max_locks_per_transaction, or hold fewer locks)"
	case syntaxError, undefinedFunc, undefinedObject:
		return msg + " (is this PostgreSQL 14 or newer? see Check)"
	}
	return msg
}

// A NoAnswer is the error of a statement that was not answered in time.
type NoAnswer struct{ After time.Duration }

func (e NoAnswer) Error() string { return "no answer from the server within " + e.After.String() }

// IsNoAnswer tells whether err is a NoAnswer.
func IsNoAnswer(err error) bool { return errors.As(err, new(NoAnswer)) }
