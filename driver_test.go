package advisory

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"errors"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/pgadvisory/advisory/internal/pgsql"
	"github.com/pgadvisory/advisory/internal/session"
)

func TestADriverThatDoesNotReturnFromAnAcquisitionIsAbandoned(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		closure int
		stuckIn string
		opts    []Option
		sent    []string // until then
	}{
		{0, tryQuery, []Option{Timeout(time.Minute)}, []string{"open", tryQuery}},
		{0, tryQuery, nil, []string{"open", tryQuery}},
		{3, tryQuery, nil, []string{"open", tryQuery}},
		{5, tryQuery, nil, []string{"open", tryQuery}},
		{0, armedWaitQuery, nil, []string{"open", tryQuery, armedWaitQuery}},
		{2, armedWaitQuery, nil, []string{"open", tryQuery, armedWaitQuery}},
		{3, ownWaitQuery, nil, []string{"open", tryQuery, ownWaitQuery}},
		{4, "BEGIN", nil, []string{"open", "BEGIN"}},
		{5, ownWaitQuery, nil, []string{"open", tryQuery, ownWaitQuery}},
	} {
		for _, end := range []time.Duration{time.Second, session.AnswerBound - time.Second} { // of ctx, before its statement is abandoned
			c := closures[test.closure]
			bubble(t, c.name, func(t *testing.T) {
				db, srv := newServer(t)
				free := stuck(srv, test.stuckIn)
				ctx, cancel := context.WithTimeout(t.Context(), end)
				defer cancel()
				start := time.Now()
				err := c.run(ctx, db, key, neverRuns(t), test.opts...)
				wantError(t, err, ErrNotAcquired, context.DeadlineExceeded)
				wantTook(t, start, end, end+session.Grace+2*abandonAfter) // an answer is worth a moment
				time.Sleep(time.Hour)
				sent := slices.Clone(test.sent)
				srv.want(t, on(1, sent...)...)

				// The driver returns after all: the connection is closed then, and
				// nothing else is sent on it, but that database/sql may come to undo the
				// BEGIN first.
				free()
				synctest.Wait()
				if slices.Contains(srv.lines(), "1 ROLLBACK") && test.closure == 4 {
					sent = append(sent, "ROLLBACK")
				}
				srv.want(t, on(1, append(sent, "close")...)...)
				if n := db.Stats().OpenConnections; n != 0 {
					t.Errorf("%d connections in the pool", n)
				}
			})
		}
	}
}

func TestReleaseIsBoundedEvenIfTheDriverDoesNotReturn(t *testing.T) {
	t.Parallel()
	for _, c := range closures[:4] {
		bubble(t, c.name, func(t *testing.T) {
			db, srv := newServer(t)
			back := make(chan struct{})
			srv.script = script(when(c.releases[0], func() { <-back }))
			start := time.Now()
			wantError(t, c.run(t.Context(), db, key, nothing), ErrLost, "release bigint 42", "no answer from the server within 5s")
			wantTook(t, start, 0, session.ReleaseBound+2*abandonAfter)
			close(back)
			synctest.Wait()
			srv.want(t, on(1, append(append(slices.Clip(c.acquires), c.releases...), "close")...)...)
		})
	}
}

// A statement that never returns is broken off on the network's connection of a driver that
// is known, on the caller's goroutine.
func TestAStatementThatNeverReturnsIsBrokenOff(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name  string
		stuck string
		after time.Duration
		sent  []string
		wants []any
	}{
		{"a try", tryQuery, session.AnswerBound, []string{tryQuery}, []any{"no answer from the server within 10s"}},
		{"an unlock", unlockQuery, session.ReleaseBound, []string{tryQuery, unlockQuery}, []any{ErrLost, "no answer from the server within 5s"}},
	} {
		bubble(t, test.name, func(t *testing.T) {
			db, srv := newServer(t)
			srv.direct = true
			srv.script = script(when(test.stuck, hangs))
			start := time.Now()
			wantError(t, WithLock(t.Context(), db, key, nothing), test.wants...)
			wantTook(t, start, test.after, test.after)
			srv.want(t, on(1, append(append([]string{"open"}, test.sent...), "close")...)...)
			wantIdle(t, db)
		})
	}
}

// The end of ctx leaves a moment to the answer of a try, if nobody else has locks on the
// session, and breaks off the network's connection then. A wait is left to end by itself, unless it
// does not in time.
func TestTheEndOfCtxAndAStatementThatNeverReturns(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		stuck         string
		after, closed time.Duration // the end of ctx
		sent          []string
	}{
		{tryQuery, session.Grace, session.Grace, []string{tryQuery}},
		{armedWaitQuery, 0, session.AnswerBound, []string{tryQuery, armedWaitQuery}},
	} {
		synctest.Test(t, func(t *testing.T) {
			db, srv := newServer(t)
			srv.direct = true
			srv.script = script(when(test.stuck, hangs), when(isTry, refused))
			var end time.Time
			closed := make(chan time.Time, 1)
			srv.ended = func(int) { closed <- time.Now() }
			ctx, cancel := context.WithCancel(t.Context())
			time.AfterFunc(50*time.Millisecond, func() { end = time.Now(); cancel() })
			wantError(t, WithLock(ctx, db, key, nothing), ErrNotAcquired, context.Canceled)
			if d := time.Since(end); d != test.after {
				t.Errorf("%s: after %v, want %v", test.stuck, d, test.after)
			}
			if d := (<-closed).Sub(end); d < test.closed || d > test.closed+2*abandonAfter {
				t.Errorf("%s: closed after %v, want %v", test.stuck, d, test.closed)
			}
			synctest.Wait()
			srv.want(t, on(1, append(append([]string{"open"}, test.sent...), "close")...)...)
			wantIdle(t, db)
		})
	}
}

// A driver that does not execute statements without preparing them is told so, by every function.
func TestADriverWithoutExecerContext(t *testing.T) {
	t.Parallel()
	for name, connect := range map[string]func(*fakeConn) driver.Conn{
		"without ExecerContext": func(c *fakeConn) driver.Conn { return preparing{c} },
		"with ErrSkip":          func(c *fakeConn) driver.Conn { return skipping{preparing{c}} },
	} {
		for _, f := range functions {
			if f.name == "AcquireTx" {
				continue // whose statements are database/sql's
			}
			t.Run(name+" "+f.name, func(t *testing.T) {
				t.Parallel()
				srv := new(server)
				db := sql.OpenDB(connecting{srv, connect})
				conn := borrow(t, db)
				ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
				defer cancel()
				var log logBuffer
				err := f.call(ctx, target{db: db, conn: conn}, key, log.option())
				if f.name == "Lead" { // campaigns for as long as ctx lives
					err = errors.New(log.String())
				}
				wants := []any{"does not execute statements without preparing them (driver.ExecerContext)"}
				if f.name == "ReleaseConn" {
					wants = append(wants, ErrLost)
				}
				wantError(t, err, wants...)
				_ = conn.Close()
				if err := db.Close(); err != nil {
					t.Error(err)
				}
				for _, line := range srv.lines() {
					if !slices.Contains([]string{"open", "BEGIN", "ROLLBACK", "close"}, line[2:]) {
						t.Errorf("sent: %s", line)
					}
				}
				for range 500 { // at the end of ctx, nobody waits for the discarding
					if srv.open() == 0 {
						return
					}
					time.Sleep(10 * time.Millisecond)
				}
				t.Errorf("%d connections open", srv.open())
			})
		}
	}
}

type connecting struct {
	*server
	wrap func(*fakeConn) driver.Conn
}

func (c connecting) Connect(ctx context.Context) (driver.Conn, error) {
	conn, err := c.server.Connect(ctx)
	if err != nil {
		return nil, err
	}
	return c.wrap(conn.(*fakeConn)), nil
}

type preparing struct{ c *fakeConn }

func (p preparing) Begin() (driver.Tx, error) { return fakeTx(p), nil }

func (p preparing) Close() error { return p.c.Close() }

func (p preparing) Prepare(query string) (driver.Stmt, error) {
	return nil, errors.New("prepared: " + query)
}

type skipping struct{ preparing }

func (skipping) ExecContext(context.Context, string, []driver.NamedValue) (driver.Result, error) {
	return nil, driver.ErrSkip
}

// A wrapped connection is one that traces statements, and hands out what it wraps.
type wrappedConn struct {
	*fakeConn
	traced *tracer
}

type tracer struct {
	mu  sync.Mutex
	log []string
}

func (w wrappedConn) ExecContext(ctx context.Context, query string, args []driver.NamedValue) (driver.Result, error) {
	w.traced.mu.Lock()
	if query != pgsql.LeftOpen {
		w.traced.log = append(w.traced.log, unchecked(plainly(query)))
	}
	w.traced.mu.Unlock()
	return w.fakeConn.ExecContext(ctx, query, args)
}

type (
	rawConn     struct{ wrappedConn } // as otelsql
	wrappedOnce struct{ wrappedConn } // as dd-trace-go
	wrappedTwo  struct{ wrappedConn } // one in the other
	hidden      struct{ wrappedConn } // hands out nothing
	preparingIn struct{ wrappedConn } // around a driver that cannot execute without preparing
	nilHanded   struct{ wrappedConn } // hands out a nil interface
)

func (c rawConn) Raw() driver.Conn { return c.fakeConn }

func (c wrappedOnce) WrappedConn() driver.Conn { return c.fakeConn }

func (c wrappedTwo) WrappedConn() driver.Conn { return rawConn(c) }

func (c preparingIn) Raw() driver.Conn { return preparing{c.fakeConn} }

func (c nilHanded) Raw() driver.Conn { return nil }

// Nobody has asked for waits and heartbeats, which a wrapper would trace.
func TestWaitsAndHeartbeatsPassWrappersThatTrace(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name  string
		wrap  func(wrappedConn) driver.Conn
		quiet bool
	}{
		{"Raw", func(c wrappedConn) driver.Conn { return rawConn{c} }, true},
		{"WrappedConn", func(c wrappedConn) driver.Conn { return wrappedOnce{c} }, true},
		{"one in the other", func(c wrappedConn) driver.Conn { return wrappedTwo{c} }, true},
		{"one that hands out nothing", func(c wrappedConn) driver.Conn { return hidden{c} }, false},
		{"one that hands out nil", func(c wrappedConn) driver.Conn { return nilHanded{c} }, false},
		{"one around a driver without ExecerContext", func(c wrappedConn) driver.Conn { return preparingIn{c} }, false},
	} {
		for _, f := range waiters() {
			bubble(t, test.name+" "+f.name, func(t *testing.T) {
				srv := new(server)
				var traced tracer
				db := sql.OpenDB(connecting{srv, func(c *fakeConn) driver.Conn { return test.wrap(wrappedConn{c, &traced}) }})
				srv.script = script(when(isTry, refused))
				wantError(t, f.run(t.Context(), db, key, sleeps(2500*time.Millisecond)))
				var sent, quiet []string
				for _, line := range srv.lines() {
					switch line = line[2:]; {
					case slices.Contains([]string{"open", "BEGIN", "BEGIN REPEATABLE READ", "COMMIT"}, line):
					case test.quiet && strings.Contains(line, "/* advisory"):
						quiet = append(quiet, line)
					default:
						sent = append(sent, line)
					}
				}
				if diff := cmp.Diff(sent, traced.log); diff != "" {
					t.Errorf("traced (-want +got):\n%s", diff)
				}
				if test.quiet && len(quiet) == 0 {
					t.Errorf("log: %q", srv.lines())
				}
				time.Sleep(time.Second)
				if err := db.Close(); err != nil {
					t.Error(err)
				}
			})
		}
	}
}
