package advisory

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"errors"
	"fmt"
	"io"
	"net"
	"testing"
	"testing/synctest"
	"time"
)

func TestErrorsSayTheOperationTheKeyAndTheReason(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name    string
		replies []reply
		opts    []Option
		wants   []any
	}{
		{"NoWait", []reply{refused}, []Option{NoWait()}, []any{ErrNotAcquired,
			"advisory: acquire a (bigint -3848465438864589366): not acquired: another holds the lock"}},
		{"a deadlock", []reply{refused, fails(pgError("40P01"))}, nil, []any{ErrDeadlock, pgError("40P01"),
			"advisory: acquire a (bigint -3848465438864589366): server error 40P01"}},
		{"a deadlock, wrapped by a driver", []reply{refused, fails(fmt.Errorf("ERROR: %w", pgError("40P01")))}, nil,
			[]any{ErrDeadlock, pgError("40P01"), "ERROR: server error 40P01"}},
		{"a full lock table", []reply{fails(pgError("53200"))}, nil, []any{pgError("53200"),
			"advisory: acquire a (bigint -3848465438864589366): server error 53200 ", "max_locks_per_transaction"}},
		{"another kind of server", []reply{fails(pgError("42883"))}, nil, []any{pgError("42883"), "PostgreSQL 14 or newer"}},
		{"the driver's own", []reply{fails(io.ErrUnexpectedEOF)}, nil, []any{io.ErrUnexpectedEOF,
			"advisory: acquire a (bigint -3848465438864589366): unexpected EOF"}},
		{"unlock refused", []reply{granted, refused}, nil, []any{ErrLost,
			"advisory: release a (bigint -3848465438864589366): lock lost: this session did not hold it"}},
		{"unlock failed", []reply{granted, fails(io.ErrUnexpectedEOF)}, nil, []any{ErrLost, io.ErrUnexpectedEOF,
			"advisory: release a (bigint -3848465438864589366): lock lost: unexpected EOF"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			db, _ := newServer(t, test.replies...)
			err := WithLock(t.Context(), db, Name("a"), func(context.Context) error { return nil }, test.opts...)
			wantError(t, err, test.wants...)
		})
	}
}

func TestATimeoutCanBeToldFromARefusal(t *testing.T) {
	t.Parallel()
	for _, c := range closures {
		bubble(t, c.name, func(t *testing.T) {
			db, srv := newServer(t)
			srv.script = taken(t)
			for _, test := range []struct {
				opt  Option
				want bool
			}{{Timeout(time.Second), true}, {NoWait(), false}} {
				err := c.run(t.Context(), db, key, nothing, test.opt)
				wantError(t, err, ErrNotAcquired)
				var is interface{ Timeout() bool }
				if got := errors.As(err, &is) && is.Timeout(); got != test.want {
					t.Errorf("%s: %v: Timeout() is %v", c.name, err, got)
				}
			}
		})
	}
}

func TestTheMessageOfManyKeysStaysShort(t *testing.T) {
	t.Parallel()
	for n, want := range map[int]string{
		1: "acquire bigint 1: ",
		2: "acquire bigint 1, bigint 2: ",
		4: "acquire bigint 1, bigint 2, bigint 3, bigint 4: ",
		5: "acquire bigint 1, bigint 2, bigint 3 and 2 more keys: ",
	} {
		db, _ := newServer(t, refused)
		var keys []Key
		for i := range n {
			keys = append(keys, ID(int64(i+1)))
		}
		err := WithLocks(t.Context(), db, keys, func(context.Context) error { return nil }, NoWait())
		wantError(t, err, ErrNotAcquired, want)
	}
}

// A lastWord has the shape of the drivers' errors.
type lastWord struct {
	pgError
	Severity string
}

// A lost session is replaced while waiting; the server's refusal is final.
func TestWhatEndsAWaitAndWhatEndsOnlyItsSession(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		err  error
		goOn bool
	}{
		{driver.ErrBadConn, true},
		{io.EOF, true},
		{io.ErrUnexpectedEOF, true},
		{fmt.Errorf("write: %w", net.ErrClosed), true},
		{fmt.Errorf("write: %w", &net.OpError{Op: "write", Err: errors.New("broken pipe")}), true},
		{errors.New("a driver's own"), false}, // says nothing of the session
		{unsent(true), true},                  // as pgx has it
		{unsent(false), false},
		{pgError("08006"), true}, // connection_failure
		{pgError("57P01"), true}, // admin_shutdown
		{pgError("57P02"), true}, // crash_shutdown
		{pgError("57P03"), true}, // cannot_connect_now
		{pgError("57P05"), true}, // idle_session_timeout
		{pgError("25P03"), true}, // idle_in_transaction_session_timeout
		{pgError("25P04"), true}, // transaction_timeout
		{pgError("22023"), false},
		{pgError("53200"), false},
		{pgError("53300"), false}, // too_many_connections: no answer to a statement, but see TestAWaitOutlivesARestartOfTheServer
		{pgError("XX000"), false},
		{lastWord{pgError("XX000"), "FATAL"}, true},
		{lastWord{pgError("XX000"), "ERROR"}, false},
	} {
		for _, c := range []struct {
			function string
			replies  []reply
			run      func(ctx context.Context, db *sql.DB) error
		}{
			{"WithLock", []reply{refused, fails(test.err)}, func(ctx context.Context, db *sql.DB) error {
				return WithLock(ctx, db, key, func(context.Context) error { return nil })
			}},
			{"WithTxLock", []reply{done, refused, fails(test.err)}, func(ctx context.Context, db *sql.DB) error {
				return WithTxLock(ctx, db, key, func(context.Context, *sql.Tx) error { return nil })
			}},
		} {
			bubble(t, c.function+" "+test.err.Error(), func(t *testing.T) {
				db, srv := newServer(t, c.replies...)
				err := c.run(t.Context(), db)
				if test.goOn {
					wantError(t, err)
				} else {
					wantError(t, err, test.err)
				}
				if got, want := srv.opened, map[bool]int{false: 1, true: 2}[test.goOn]; got != want {
					t.Errorf("%d connections were made, want %d", got, want)
				}
				synctest.Wait()
				if got, want := srv.open(), srv.opened-1; got != want {
					t.Errorf("%d connections open, want %d", got, want)
				}
			})
		}
	}
}

// unsent is an error of a statement that was not sent.
type unsent bool

func (unsent) Error() string { return "conn closed" }

func (u unsent) SafeToRetry() bool { return bool(u) }
