package advisory

import (
	"context"
	"database/sql/driver"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

func TestADeadServerIsAnErrorAtOnce(t *testing.T) {
	t.Parallel()
	down := errors.New("connection refused")
	for _, c := range closures {
		bubble(t, c.name, func(t *testing.T) {
			db, srv := newServer(t)
			srv.dial = func(context.Context) error { return down }
			wantError(t, c.run(t.Context(), db, key, nothing), down, "acquire bigint 42: ")

			// The pool does not know it yet.
			srv.dial = nil
			idle(t, db, 2)
			srv.script = func(context.Context, int, string) (int64, error) { return 0, driver.ErrBadConn }
			wantError(t, c.run(t.Context(), db, key, nothing), driver.ErrBadConn)
			srv.wantConns(t, 0, 3)
			start := time.Now()
			srv.dial = func(context.Context) error { return down }
			wantError(t, c.run(t.Context(), db, key, nothing, Timeout(time.Minute)), down)
			wantTook(t, start, 0, 0)
		})
	}
}

func TestAWaitOutlivesARestartOfTheServer(t *testing.T) {
	t.Parallel()
	down := errors.New("connection refused")
	for _, c := range closures {
		for _, test := range []struct {
			name    string
			outage  time.Duration
			down    error
			opts    []Option
			atLeast time.Duration
			wants   []any
		}{
			{"of 25 s", 25 * time.Second, down, nil, 25 * time.Second, nil},
			{"while it is full", 25 * time.Second, pgError("53300"), nil, 25 * time.Second, nil},
			{"while it starts up", 25 * time.Second, pgError("57P03"), nil, 25 * time.Second, nil},
			{"but not an outage", time.Hour, down, nil, 30 * time.Second, []any{down}},
			{"but not another password", time.Hour, pgError("28P01"), nil, 0, []any{pgError("28P01")}},
			{"nor its own Timeout", time.Hour, down, []Option{Timeout(10 * time.Second)}, 10 * time.Second, []any{ErrNotAcquired, "within 10s"}},
		} {
			bubble(t, c.name+" "+test.name, func(t *testing.T) {
				db, srv := newServer(t)
				awayFor(srv, test.outage, test.down)
				start := time.Now()
				var log logBuffer
				wantError(t, c.run(t.Context(), db, key, nothing, append(test.opts, log.option())...), test.wants...)
				wantTook(t, start, test.atLeast, test.atLeast+outagePauseMax)
				missed, back := 1, 1
				if test.wants != nil {
					back = 0
				}
				if test.atLeast == 0 {
					missed = 0
				}
				if n, m := strings.Count(log.String(), "the server cannot be reached"), strings.Count(log.String(), "the server is back"); n != missed || m != back || strings.Count(log.String(), "\n") != n+m {
					t.Errorf("log: %s", log.String())
				}
			})
		}
	}
}

func TestTheEndOfCtxEndsAWaitForTheServer(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		db, srv := newServer(t)
		awayFor(srv, time.Hour, errors.New("connection refused"))
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		defer cancel()
		start := time.Now()
		wantError(t, WithLock(ctx, db, key, nothing), ErrNotAcquired, context.DeadlineExceeded, "connection refused")
		wantTook(t, start, 5*time.Second, 5*time.Second)
	})
}

func TestAWaitThatComesToAStandbyDuringAnOutageGoesOn(t *testing.T) {
	t.Parallel()
	for _, c := range closures {
		for _, test := range []struct {
			standby time.Duration
			wants   []any
		}{
			{10 * time.Second, nil},
			{time.Hour, []any{"hot standby"}},
		} {
			bubble(t, fmt.Sprint(c.name, " ", test.standby), func(t *testing.T) {
				db, srv := newServer(t)
				start := time.Now()
				srv.script = func(_ context.Context, conn int, query string) (int64, error) {
					switch {
					case isWait(query) && conn == 1:
						return 0, io.ErrUnexpectedEOF
					case isWait(query) && time.Since(start) < test.standby:
						return 2, nil
					case isTry(query) && (conn == 1 || time.Since(start) < test.standby):
						return 0, nil
					}
					return 1, nil
				}
				wantError(t, c.run(t.Context(), db, key, nothing), test.wants...)
				least := min(test.standby, reconnectFor)
				wantTook(t, start, least, least+time.Second)
				time.Sleep(time.Second)
				wantIdle(t, db)
			})
		}
	}
}

// Who shares another's answer has not begun to wait, and is no wait that outlives an outage.
func TestASharedNoWaitDoesNotWaitOutAnOutage(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		db, srv := newServer(t)
		down := errors.New("connection refused")
		srv.script = func(context.Context, int, string) (int64, error) {
			time.Sleep(time.Second)
			srv.dial = func(context.Context) error { return down }
			return 0, driver.ErrBadConn
		}
		start := time.Now()
		var both sync.WaitGroup
		for range 2 {
			both.Go(func() {
				wantError(t, WithLock(t.Context(), db, key, neverRuns(t), Shared(), NoWait()), "acquire bigint 42: ")
				wantTook(t, start, time.Second, 2*time.Second)
			})
		}
		both.Wait()
	})
}
