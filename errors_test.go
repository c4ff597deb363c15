package advisory

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/pgadvisory/advisory/internal/manager"
	"github.com/pgadvisory/advisory/internal/session"
)

func TestErrorsSayTheOperationTheKeyAndTheReason(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name    string
		replies []reply
		opts    []Option
		wants   []any
	}{
		{"NoWait", []reply{refused}, []Option{NoWait()}, []any{ErrHeld, ErrNotAcquired,
			"advisory: acquire a: not acquired: another holds the lock [bigint -3848465438864589366]"}},
		{"a deadlock", []reply{refused, fails(pgError("40P01"))}, nil, []any{ErrDeadlock, pgError("40P01"),
			"advisory: acquire a: server error 40P01"}},
		{"a deadlock, wrapped by a driver", []reply{refused, fails(fmt.Errorf("ERROR: %w", pgError("40P01")))}, nil,
			[]any{ErrDeadlock, pgError("40P01"), "ERROR: server error 40P01"}},
		{"a full lock table", []reply{fails(pgError("53200"))}, nil, []any{pgError("53200"),
			"advisory: acquire a: server error 53200 ", "max_locks_per_transaction"}},
		{"another kind of server", []reply{fails(pgError("42883"))}, nil, []any{pgError("42883"), "PostgreSQL 14 or newer"}},
		{"the driver's own", []reply{fails(io.ErrUnexpectedEOF)}, nil, []any{io.ErrUnexpectedEOF,
			"advisory: acquire a: unexpected EOF"}},
		{"unlock refused", []reply{granted, refused}, nil, []any{ErrLost,
			"advisory: release a: lock lost: this session did not hold it"}},
		{"unlock failed", []reply{granted, fails(io.ErrUnexpectedEOF)}, nil, []any{ErrLost, io.ErrUnexpectedEOF,
			"advisory: release a: lock lost: unexpected EOF"}},
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
				wantError(t, err, ErrHeld)
				var is interface{ Timeout() bool }
				if got := errors.As(err, &is) && is.Timeout(); got != test.want {
					t.Errorf("%s: %v: Timeout() is %v", c.name, err, got)
				}
			}
		})
	}
}

// "Another does the work" and "this process shuts down" differ.
func TestTheEndOfACtxIsNeverErrHeld(t *testing.T) {
	t.Parallel()
	held := acquireError(t.Context(), []Key{ID(1)}, &config{}, session.ErrRefused)
	over := acquireError(t.Context(), []Key{ID(1)}, &config{timeout: time.Second}, &manager.Failure{Cause: session.ErrTimeout, Held: true})
	wantError(t, held, ErrHeld)
	wantError(t, over, ErrHeld)
	for _, c := range waiters() {
		for _, cause := range []error{errors.New("shutdown"), held, over} { // an errgroup has another's error for a cause
			bubble(t, c.name+" "+cause.Error(), func(t *testing.T) {
				db, srv := newServer(t)
				srv.script = taken(t)
				ctx, cancel := context.WithCancelCause(t.Context())
				time.AfterFunc(time.Second, func() { cancel(cause) })
				err := c.run(ctx, db, key, neverRuns(t))
				wantError(t, err, ErrNotAcquired, context.Canceled, "advisory: acquire bigint 42: not acquired: "+cause.Error())
				if cause != held && cause != over && !errors.Is(err, cause) {
					t.Errorf("error %q does not match the cause", err)
				}
				time.Sleep(time.Minute)
			})
		}
	}
}

// A Timeout says that another holds the lock only if that is known.
func TestATimeoutBeforeTheServerAnswersIsNotErrHeld(t *testing.T) {
	t.Parallel()
	for _, c := range waiters() {
		bubble(t, c.name, func(t *testing.T) {
			db, srv := newServer(t)
			srv.script = func(ctx context.Context, _ int, _ string) (int64, error) {
				<-ctx.Done()
				return 0, ctx.Err()
			}
			wantError(t, c.run(t.Context(), db, key, neverRuns(t), Timeout(time.Second)), ErrNotAcquired, "not acquired within 1s")
			time.Sleep(time.Minute)
		})
	}
}

// The same holds for a server that has refused the lock, and then falls silent.
func TestATimeoutOfAServerThatFallsSilentIsNotErrHeld(t *testing.T) {
	t.Parallel()
	for _, c := range waiters() {
		bubble(t, c.name, func(t *testing.T) {
			db, srv := newServer(t)
			var refused atomic.Bool
			srv.script = func(ctx context.Context, _ int, query string) (int64, error) {
				switch {
				case strings.Contains(query, "pg_try_advisory") && !refused.Swap(true):
					return 0, nil
				case !refused.Load():
					return 1, nil
				case ctx.Done() == nil: // ROLLBACK
					return 0, driver.ErrBadConn
				}
				<-ctx.Done()
				return 0, ctx.Err()
			}
			wantError(t, c.run(t.Context(), db, key, neverRuns(t), Timeout(time.Second)), ErrNotAcquired, "not acquired within 1s", "no answer from the server")
			if !refused.Load() {
				t.Error("the server has not refused")
			}
			time.Sleep(time.Minute)
		})
	}
}

// The end of a ctx names the holder where nobody need be asked for that.
func TestTheEndOfACtxNamesTheHolderInThisProcess(t *testing.T) {
	t.Parallel()
	for _, holder := range closures {
		bubble(t, holder.name, func(t *testing.T) {
			p, dbs, _ := newTable(t, 2)
			end := func(says string) {
				t.Helper()
				ctx, cancel := context.WithTimeout(t.Context(), time.Second)
				defer cancel()
				err := WithLock(ctx, dbs[0], key, nothing)
				wantError(t, err, ErrNotAcquired, context.DeadlineExceeded)
				if want := "advisory: acquire bigint 42: not acquired: context deadline exceeded" + says; err.Error() != want {
					t.Errorf("error %q, want %q", err, want)
				}
			}
			wantError(t, holder.run(t.Context(), dbs[0], key, func(context.Context) error {
				end(": held by this process")
				return nil
			}))
			there := take(t, dbs[1], key)
			var wg sync.WaitGroup
			wg.Go(func() { wantError(t, holder.run(t.Context(), dbs[0], key, nothing)) })
			synctest.Wait()
			end("") // this process waits for it
			wantError(t, WithLock(t.Context(), dbs[0], key, nothing, NoWait()), ErrHeld, "not acquired: another holds the lock")
			wantError(t, there.Release())
			wg.Wait()
			time.Sleep(time.Second)
			wantIdle(t, dbs[0])
			p.clean()
		})
	}
}

// Of nested locks, the Error tells which was refused.
func TestAnErrorTellsWhichLockWasRefused(t *testing.T) {
	t.Parallel()
	for _, outer := range closures {
		for _, inner := range closures {
			t.Run(outer.name+" "+inner.name, func(t *testing.T) {
				t.Parallel()
				p, dbs, _ := newTable(t, 2)
				there := take(t, dbs[1], ID(43))
				var refused error
				err := outer.run(t.Context(), dbs[0], Name("outer"), func(ctx context.Context) error {
					refused = inner.run(ctx, dbs[0], ID(43), neverRuns(t), NoWait())
					return refused
				})
				var e *Error
				if err != refused || !errors.Is(err, ErrHeld) || !errors.As(err, &e) {
					t.Fatalf("error: %#v, want that of the inner lock", err)
				}
				if e.Op != "acquire" || !slices.Equal(e.Keys, []Key{ID(43)}) || e.Holder != "" {
					t.Errorf("%+v", e)
				}
				there.Release()
				err = inner.run(t.Context(), dbs[0], ID(43), func(context.Context) error {
					return WithLocks(t.Context(), dbs[0], []Key{Name("outer"), ID(43)}, neverRuns(t), NoWait())
				})
				if !errors.As(err, &e) || len(e.Keys) != 2 || e.Holder != "this process" {
					t.Errorf("%#v", err)
				}
				p.clean()
			})
		}
	}
}

func TestFnsErrorIsReturnedAsItIs(t *testing.T) {
	t.Parallel()
	for _, c := range closures {
		for _, want := range []error{errors.New("fn's"), ErrHeld, context.Canceled, context.DeadlineExceeded, &Error{Op: "acquire"}} {
			t.Run(c.name+" "+want.Error(), func(t *testing.T) {
				t.Parallel()
				_, dbs, _ := newTable(t, 1)
				if err := c.run(t.Context(), dbs[0], key, func(context.Context) error { return want }); err != want {
					t.Errorf("error: %#v, want %#v", err, want)
				}
				err := Lead(t.Context(), dbs[0], key, func(context.Context) error { return want })
				if err != want {
					t.Errorf("Lead: error: %#v, want %#v", err, want)
				}
			})
		}
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
		wantError(t, err, ErrHeld, want)
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
