package pgsql_test

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"errors"
	"fmt"
	"io"
	"net"
	"testing"
	"time"

	"github.com/pgadvisory/advisory/internal/pgsql"
)

// A serverError has the shape of the drivers' errors, and no severity.
type serverError string

func (e serverError) Error() string    { return "server error " + string(e) }
func (e serverError) SQLState() string { return string(e) }

// A severeError has all of the shape.
type severeError struct {
	serverError
	Severity string
}

// unsent is an error of a statement that was not sent.
type unsent bool

func (unsent) Error() string       { return "conn closed" }
func (u unsent) SafeToRetry() bool { return bool(u) }

func wrapped(err error) error { return fmt.Errorf("wrapped: %w", err) }

func TestState(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		err  error
		want string
	}{
		{nil, ""},
		{errors.New("a driver's own"), ""},
		{serverError("40P01"), pgsql.DeadlockDetected},
		{wrapped(serverError("57014")), pgsql.QueryCanceled},
		{errors.Join(io.EOF, serverError("25P02")), pgsql.InFailedTransaction},
		{&severeError{"0A000", "ERROR"}, pgsql.FeatureNotSupported},
	} {
		if got := pgsql.State(test.err); got != test.want {
			t.Errorf("%v: %q, want %q", test.err, got, test.want)
		}
	}
}

func TestWhichErrorsEndASession(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		err  error
		want bool
	}{
		{driver.ErrBadConn, true},
		{io.EOF, true},
		{io.ErrUnexpectedEOF, true},
		{net.ErrClosed, true},
		{&net.OpError{Op: "write", Err: errors.New("broken pipe")}, true},
		{pgsql.NoAnswer{After: time.Second}, true},
		{errors.New("a driver's own"), false}, // says nothing of the session
		{sql.ErrTxDone, false},
		{context.Canceled, false},
		{unsent(true), true}, // as pgx has it
		{unsent(false), false},
		{serverError("08006"), true}, // connection_failure
		{serverError("08P01"), true}, // protocol_violation
		{serverError("57P01"), true}, // admin_shutdown
		{serverError("57P02"), true}, // crash_shutdown
		{serverError("57P03"), true}, // cannot_connect_now
		{serverError("57P05"), true}, // idle_session_timeout
		{serverError("25P03"), true}, // idle_in_transaction_session_timeout
		{serverError("25P04"), true}, // transaction_timeout
		{serverError("57P04"), false},
		{serverError("25P02"), false},
		{serverError("57014"), false},
		{serverError("22023"), false},
		{serverError("40P01"), false},
		{serverError("53200"), false},
		{serverError("53300"), false}, // too_many_connections: no answer to a statement
		{serverError("XX000"), false},
		{severeError{"XX000", "FATAL"}, true},
		{&severeError{"XX000", "FATAL"}, true},
		{severeError{"XX000", "ERROR"}, false},
		{severeError{"XX000", "PANIC"}, false},
		{struct {
			error
			Severity int
		}{io.ErrNoProgress, 3}, false},
	} {
		for _, err := range []error{test.err, wrapped(test.err), wrapped(wrapped(test.err))} {
			if got := pgsql.Gone(err); got != test.want {
				t.Errorf("%#v: %v, want %v", err, got, test.want)
			}
		}
	}
	// The server's own error is its answer, whatever a driver adds.
	if err := errors.Join(serverError("22023"), io.EOF); pgsql.Gone(err) {
		t.Errorf("%v ends the session", err)
	}
}

func TestNoAnswer(t *testing.T) {
	t.Parallel()
	err := wrapped(pgsql.NoAnswer{After: 1500 * time.Millisecond})
	if got, want := err.Error(), "wrapped: no answer from the server within 1.5s"; got != want {
		t.Errorf("%q, want %q", got, want)
	}
	if !pgsql.IsNoAnswer(err) || pgsql.IsNoAnswer(io.EOF) || pgsql.IsNoAnswer(nil) {
		t.Error("IsNoAnswer")
	}
}

func TestWhichErrorsOfAConnectionMayPass(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		err  error
		want bool
	}{
		{&net.OpError{Op: "dial", Err: errors.New("connection refused")}, true},
		{errors.New("a driver's own"), true},
		{serverError("57P03"), true},                    // cannot_connect_now
		{serverError("53300"), true},                    // too_many_connections
		{serverError("08P01"), true},                    // PgBouncer's, of all kinds
		{severeError{"XX000", "FATAL"}, true},           // the same
		{serverError("28000"), false},                   // invalid_authorization_specification
		{serverError("28P01"), false},                   // invalid_password
		{wrapped(severeError{"3D000", "FATAL"}), false}, // invalid_catalog_name
		{serverError("42501"), false},                   // insufficient_privilege
	} {
		if got := pgsql.MayPass(test.err); got != test.want {
			t.Errorf("%v: %v, want %v", test.err, got, test.want)
		}
	}
}

func TestWhichErrorsRefuseTheStatementThatWaits(t *testing.T) {
	t.Parallel()
	for state, want := range map[string]bool{
		"42501": true, // insufficient_privilege: the language is not trusted for this role
		"42704": true, // undefined_object: there is no PL/pgSQL
		"42601": true, // syntax_error
		"0A000": true, // feature_not_supported
		"40P01": false,
		"57014": false,
		"55P03": false,
		"53200": false,
	} {
		if got := pgsql.RefusesWait(wrapped(serverError(state))); got != want {
			t.Errorf("%s: %v, want %v", state, got, want)
		}
	}
	if pgsql.RefusesWait(io.EOF) {
		t.Error("EOF is not the server's answer")
	}
}

// A message names the setting, and its language is the server's.
func TestWhichErrorsRefuseTheConnectionCheck(t *testing.T) {
	t.Parallel()
	refused := fmt.Errorf("ERROR: client_connection_check_interval muss auf Plattformen ohne POLLRDHUP auf 0 gesetzt sein (%w)", serverError("22023"))
	if !pgsql.RefusesCheck(refused) || !pgsql.RefusesCheck(wrapped(refused)) {
		t.Errorf("not by %v", refused)
	}
	for _, err := range []error{serverError("22023"), errors.New("client_connection_check_interval"), io.EOF} {
		if pgsql.RefusesCheck(err) {
			t.Errorf("by %v", err)
		}
	}
}

func TestPoolClosed(t *testing.T) {
	t.Parallel()
	db := sql.OpenDB(noConnector{})
	err := db.PingContext(t.Context())
	if pgsql.PoolClosed(err) {
		t.Errorf("open: %v", err)
	}
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
	closed := db.PingContext(t.Context())
	for _, err := range []error{closed, wrapped(closed), errors.Join(io.EOF, closed), wrapped(errors.Join(io.EOF, wrapped(closed)))} {
		if !pgsql.PoolClosed(err) {
			t.Errorf("closed: %v", err)
		}
	}
	for _, err := range []error{nil, sql.ErrConnDone, errors.Join(io.EOF, io.EOF)} {
		if pgsql.PoolClosed(err) {
			t.Errorf("not closed: %v", err)
		}
	}
}

// A noConnector makes no connection.
type noConnector struct{}

func (noConnector) Connect(context.Context) (driver.Conn, error) { return nil, io.EOF }
func (noConnector) Driver() driver.Driver                        { return nil }

func TestExplainSaysWhatToDo(t *testing.T) {
	t.Parallel()
	const old = " (is this PostgreSQL 14 or newer? see Check)"
	for _, test := range []struct {
		err  error
		want string
	}{
		{io.EOF, "EOF"},
		{serverError("40P01"), "server error 40P01"},
		{serverError("53200"), "server error 53200 (the server's lock table is full: raise max_locks_per_transaction, or hold fewer locks)"},
		{serverError("42601"), "server error 42601" + old},
		{serverError("42704"), "server error 42704" + old},
		{wrapped(serverError("42883")), "wrapped: server error 42883" + old},
	} {
		if got := pgsql.Explain(test.err); got != test.want {
			t.Errorf("%q, want %q", got, test.want)
		}
	}
}
