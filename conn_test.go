package advisory

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"errors"
	"io"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/DATA-DOG/go-sqlmock"
	"github.com/google/go-cmp/cmp"
)

func withConnLock(ctx context.Context, db *sql.DB, opts ...Option) error {
	return WithConnLock(ctx, db, key, func(context.Context, *sql.Conn) error { return nil }, opts...)
}

// A session of the package's own is handed back clean, or discarded.
func TestEveryWayASessionLockCanGo(t *testing.T) {
	t.Parallel()
	died := io.ErrUnexpectedEOF
	for _, test := range []struct {
		name    string
		replies []reply
		opts    []Option
		want    []string
		wants   []any
	}{
		{
			"granted", nil, nil,
			on(1, "open", tryQuery, unlockQuery), nil,
		},
		{
			"granted after waiting", []reply{refused, granted}, nil,
			on(1, "open", tryQuery, armedWaitQuery, disarmQuery), nil,
		},
		{
			"granted after three slices", []reply{refused, refused, refused, granted}, nil,
			on(1, "open", tryQuery, armedWaitQuery, armedWaitQuery, armedWaitQuery, disarmQuery), nil,
		},
		{
			"a cancelled slice ends no waiting; what it may have got is freed, and its settings have gone with it",
			[]reply{refused, fails(err57014), done, fails(err57014), done, granted}, nil,
			on(1, "open", tryQuery, armedWaitQuery, freeQuery, armedWaitQuery, freeQuery, armedWaitQuery, disarmQuery), nil,
		},
		{
			"a cancelled slice, and what it may have got is not to be freed",
			[]reply{refused, fails(err57014), fails(pgError("53200"))}, nil,
			on(1, "open", tryQuery, armedWaitQuery, freeQuery, freeQuery, "close"), []any{pgError("53200")},
		},
		{
			"NoWait refused", []reply{refused}, []Option{NoWait()},
			on(1, "open", tryQuery), []any{ErrNotAcquired},
		},
		{
			"the try fails after it was sent", []reply{fails(died)}, nil,
			on(1, "open", tryQuery, "close"), []any{died},
		},
		{
			"the server refuses the try", []reply{fails(pgError("53200"))}, nil,
			on(1, "open", tryQuery, freeQuery, "close"), []any{pgError("53200")},
		},
		{
			"the try is cancelled by an administrator", []reply{fails(err57014)}, nil,
			on(1, "open", tryQuery, freeQuery, "close"), []any{err57014},
		},
		{
			"the wait fails", []reply{refused, fails(pgError("53200"))}, nil,
			on(1, "open", tryQuery, armedWaitQuery, resetQuery+freeQuery, "close"), []any{pgError("53200")},
		},
		{
			"the wait deadlocks", []reply{refused, refused, fails(pgError("40P01"))}, nil,
			on(1, "open", tryQuery, armedWaitQuery, armedWaitQuery, resetQuery+freeQuery, "close"), []any{ErrDeadlock, pgError("40P01")},
		},
		{
			"the session dies in the wait: the next one waits at once", []reply{refused, fails(died)}, nil,
			slices.Concat(on(1, "open", tryQuery, armedWaitQuery, "close"), on(2, "open", probeQuery, armedWaitQuery, disarmQuery)), nil,
		},
		{
			"the session dies between try and wait", []reply{refused, fails(driver.ErrBadConn)}, nil,
			slices.Concat(on(1, "open", tryQuery, armedWaitQuery, "close"), on(2, "open", probeQuery, armedWaitQuery, disarmQuery)), nil,
		},
		{
			"three sessions die", []reply{refused, fails(died), done, refused, fails(died), done, fails(died)}, nil,
			slices.Concat(
				on(1, "open", tryQuery, armedWaitQuery, "close"), on(2, "open", probeQuery, armedWaitQuery, armedWaitQuery, "close"),
				on(3, "open", probeQuery, armedWaitQuery, "close"), on(4, "open", probeQuery, armedWaitQuery, disarmQuery),
			), nil,
		},
		{
			"unlock refused", []reply{granted, refused}, nil,
			on(1, "open", tryQuery, unlockQuery, freeQuery, "close"), []any{ErrLost},
		},
		{
			"unlock refused after a wait", []reply{refused, refused, granted, refused}, nil,
			on(1, "open", tryQuery, armedWaitQuery, armedWaitQuery, disarmQuery, resetQuery+freeQuery, "close"), []any{ErrLost},
		},
		{
			"unlock fails", []reply{granted, fails(died)}, nil,
			on(1, "open", tryQuery, unlockQuery, "close"), []any{ErrLost, died},
		},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				db, srv := newServer(t, test.replies...)
				wantError(t, WithLock(t.Context(), db, key, nothing, test.opts...), test.wants...)
				srv.want(t, test.want...)
				if n := db.Stats().InUse; n != 0 {
					t.Errorf("%d connections not handed back", n)
				}
				if got, want := db.Stats().Idle, srv.open(); got != want {
					t.Errorf("%d connections idle of %d open", got, want)
				}
			})
		})
	}
}

// taken is a server on which another holds the lock for good. Its waits take what they were told to.
func taken(t testing.TB) func(context.Context, int, string) (int64, error) {
	return func(_ context.Context, _ int, query string) (int64, error) {
		switch {
		case isWait(query):
			time.Sleep(boundIn(t, query))
			return 0, nil
		case strings.Contains(query, "_try_"):
			return 0, nil
		}
		return 1, nil
	}
}

// isWait tells whether a statement waits for a lock.
func isWait(query string) bool { return waitCall.MatchString(query) }

// isBeat tells whether a statement is a heartbeat.
func isBeat(query string) bool { return beatOf.MatchString(query) }

// boundIn is how long a statement that waits does so at most.
func boundIn(t testing.TB, query string) time.Duration {
	t.Helper()
	ms, err := strconv.Atoi(boundOf.FindStringSubmatch(query)[1])
	if err != nil {
		t.Error(err)
	}
	return time.Duration(ms) * time.Millisecond
}

func TestTimeoutIsKeptByTheServerAndCostsNoConnection(t *testing.T) {
	t.Parallel()
	for i, c := range closures {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				db, srv := newServer(t)
				srv.script = taken(t)
				start := time.Now()
				err := c.run(t.Context(), db, key, nothing, Timeout(time.Second))
				wantError(t, err, ErrNotAcquired, "advisory: acquire bigint 42: not acquired within 1s")
				if d := time.Since(start); d != time.Second {
					t.Errorf("after %v", d)
				}
				sent := [][]string{
					0: {"open", tryQuery, armedWaitQuery, holdersQuery},
					3: {"open", tryQuery, ownWaitQuery, holdersQuery},
					4: {"open", "BEGIN", tryFirstQuery, waitTxQuery, holdersQuery, "ROLLBACK"},
				}[[]int{0, 0, 0, 3, 4, 3}[i]]
				if diff := cmp.Diff(on(1, sent...), slices.Compact(srv.lines())); diff != "" {
					t.Errorf("log of the server, slices in a row as one (-want +got):\n%s", diff)
				}
				if stats := db.Stats(); stats.InUse != 0 || stats.Idle != 1 {
					t.Errorf("%+v", stats)
				}
			})
		})
	}
}

func TestAServerThatDoesNotAnswerEndsATimeoutSoonAfter(t *testing.T) {
	t.Parallel()
	for _, c := range closures {
		synctest.Test(t, func(t *testing.T) {
			db, srv := newServer(t)
			srv.script = func(ctx context.Context, _ int, query string) (int64, error) {
				if !strings.Contains(query, "lock") {
					return 1, nil
				}
				<-ctx.Done()
				return 0, ctx.Err()
			}
			start := time.Now()
			err := c.run(t.Context(), db, key, nothing, Timeout(2*time.Second))
			wantError(t, err, ErrNotAcquired, "not acquired within 2s", "no answer from the server")
			var silence noAnswer
			var is interface{ Timeout() bool }
			if !errors.As(err, &silence) || !errors.As(err, &is) || !is.Timeout() {
				t.Errorf("%s: error %v", c.name, err)
			}
			if d := time.Since(start); d < 2*time.Second || d > 2*time.Second+lateBound+2*abandonAfter {
				t.Errorf("%s: after %v", c.name, d)
			}
			synctest.Wait()
			if srv.open() != 0 {
				t.Errorf("%s: the connection was not discarded", c.name)
			}
		})
	}
}

func TestAWaitThatIsNotAnsweredIsGivenUpWithoutATimeoutToo(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		db, srv := newServer(t)
		srv.script = func(ctx context.Context, conn int, query string) (int64, error) {
			if conn > 1 {
				return 1, nil
			}
			if plainly(query) == armedWaitQuery {
				<-ctx.Done()
				return 0, ctx.Err()
			}
			return 0, nil
		}
		start := time.Now()
		wantError(t, WithLock(t.Context(), db, key, nothing))
		if d := time.Since(start); d < sliceMin+answerBound || d > sliceMin+answerBound+time.Second {
			t.Errorf("after %v", d)
		}
		srv.want(t, slices.Concat(on(1, "open", tryQuery, armedWaitQuery, "close"), on(2, "open", probeQuery, armedWaitQuery, disarmQuery))...)
	})
}

// idle fills db's pool with n idle connections.
func idle(t *testing.T, db *sql.DB, n int) {
	t.Helper()
	db.SetMaxIdleConns(n)
	var conns []*sql.Conn
	for range n {
		conn, err := db.Conn(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		conns = append(conns, conn)
	}
	for _, conn := range conns {
		if err := conn.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

func TestDeadConnectionsInThePoolAreDroppedAndTheNextOneTried(t *testing.T) {
	t.Parallel()
	for _, c := range closures {
		for _, dead := range []error{driver.ErrBadConn, io.ErrUnexpectedEOF, pgError("57P01")} {
			t.Run(c.name+" "+dead.Error(), func(t *testing.T) {
				t.Parallel()
				db, srv := newServer(t)
				idle(t, db, 3)
				srv.script = func(_ context.Context, conn int, _ string) (int64, error) {
					if conn <= 3 {
						return 0, dead
					}
					return 1, nil
				}
				ran := 0
				wantError(t, c.run(t.Context(), db, key, func(context.Context) error { ran++; return nil }))
				if ran != 1 || srv.opened != 4 || srv.open() != 1 {
					t.Errorf("fn ran %d times, %d connections of %d open", ran, srv.open(), srv.opened)
				}
			})
		}
	}
}

func TestADeadServerIsAnErrorAtOnce(t *testing.T) {
	t.Parallel()
	down := errors.New("connection refused")
	for _, c := range closures {
		synctest.Test(t, func(t *testing.T) {
			db, srv := newServer(t)
			srv.dial = func(context.Context) error { return down }
			wantError(t, c.run(t.Context(), db, key, nothing), down, "acquire bigint 42: ")

			// The pool does not know it yet.
			srv.dial = nil
			idle(t, db, 2)
			srv.script = func(context.Context, int, string) (int64, error) { return 0, driver.ErrBadConn }
			wantError(t, c.run(t.Context(), db, key, nothing), driver.ErrBadConn)
			if srv.opened != 3 || srv.open() != 0 {
				t.Errorf("%s: %d connections of %d open", c.name, srv.open(), srv.opened)
			}
			start := time.Now()
			srv.dial = func(context.Context) error { return down }
			wantError(t, c.run(t.Context(), db, key, nothing, Timeout(time.Minute)), down)
			if d := time.Since(start); d != 0 {
				t.Errorf("%s: after %v", c.name, d)
			}
		})
	}
}

// awayFor is a server on which another holds the lock. It goes down during the first
// wait, and is up again after d: then it is granted.
func awayFor(srv *server, d time.Duration, down error) {
	var back time.Time
	srv.script = func(_ context.Context, conn int, query string) (int64, error) {
		switch {
		case conn > 1:
			return 1, nil
		case strings.Contains(query, "_try_"):
			return 0, nil
		case isWait(query):
			back = time.Now().Add(d)
			return 0, io.ErrUnexpectedEOF
		}
		return 1, nil
	}
	srv.dial = func(context.Context) error {
		if time.Now().Before(back) {
			return down
		}
		return nil
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
			t.Run(c.name+" "+test.name, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					db, srv := newServer(t)
					awayFor(srv, test.outage, test.down)
					start := time.Now()
					var log logBuffer
					wantError(t, c.run(t.Context(), db, key, nothing, append(test.opts, log.option())...), test.wants...)
					if d := time.Since(start); d < test.atLeast || d > test.atLeast+outagePauseMax {
						t.Errorf("after %v", d)
					}
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
		if d := time.Since(start); d != 5*time.Second {
			t.Errorf("after %v", d)
		}
	})
}

func TestWaitingForAPooledConnectionCounts(t *testing.T) {
	t.Parallel()
	for _, c := range closures {
		for _, test := range []struct {
			name  string
			ctx   time.Duration
			opts  []Option
			wants []any
		}{
			{"Timeout", time.Hour, []Option{Timeout(2 * time.Second)}, []any{ErrNotAcquired, "not acquired within 2s"}},
			{"ctx", 2 * time.Second, nil, []any{ErrNotAcquired, context.DeadlineExceeded}},
			{"NoWait", 2 * time.Second, []Option{NoWait()}, []any{ErrNotAcquired, context.DeadlineExceeded}},
		} {
			t.Run(c.name+" "+test.name, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					db, srv := newServer(t)
					db.SetMaxOpenConns(1)
					conn, err := db.Conn(t.Context())
					if err != nil {
						t.Fatal(err)
					}
					defer conn.Close()
					ctx, cancel := context.WithTimeout(t.Context(), test.ctx)
					defer cancel()
					start := time.Now()
					wantError(t, c.run(ctx, db, key, nothing, test.opts...), append(test.wants, "pool")...)
					if d := time.Since(start); d != 2*time.Second {
						t.Errorf("after %v", d)
					}
					srv.want(t, on(1, "open")...)
				})
			})
		}
	}
}

func TestAConnectionThatIsNeverMadeIsGivenUp(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		db, srv := newServer(t)
		srv.dial = func(ctx context.Context) error {
			<-ctx.Done()
			return ctx.Err()
		}
		start := time.Now()
		wantError(t, WithLock(t.Context(), db, key, nothing), "no answer from the server within 30s")
		if d := time.Since(start); d != dialBound {
			t.Errorf("after %v", d)
		}
	})
}

// stuck is a driver that does not return from the statement that begins with prefix
// before it is told to, whatever becomes of ctx. Another holds the lock.
func stuck(srv *server, prefix string) (free func()) {
	back := make(chan struct{})
	srv.script = func(_ context.Context, _ int, query string) (int64, error) {
		if strings.HasPrefix(plainly(query), prefix) {
			<-back
		}
		if strings.Contains(query, "_try_") {
			return 0, nil
		}
		return 1, nil
	}
	return func() { close(back) }
}

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
		for _, end := range []time.Duration{time.Second, answerBound - time.Second} { // of ctx, before its statement is abandoned
			c := closures[test.closure]
			t.Run(c.name, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					db, srv := newServer(t)
					free := stuck(srv, test.stuckIn)
					ctx, cancel := context.WithTimeout(t.Context(), end)
					defer cancel()
					start := time.Now()
					err := c.run(ctx, db, key, func(context.Context) error {
						t.Error("fn runs")
						return nil
					}, test.opts...)
					wantError(t, err, ErrNotAcquired, context.DeadlineExceeded)
					limit := time.Duration(0)
					if test.closure < 3 && test.stuckIn == tryQuery {
						limit = answerGrace + 2*abandonAfter // a try's answer is worth a moment
					}
					if d := time.Since(start) - end; d > limit {
						t.Errorf("%v after the end of ctx", d)
					}
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
			})
		}
	}
}

func TestADriverThatDoesNotReturnFromAWaitOfAcquireConnIsAbandoned(t *testing.T) {
	t.Parallel()
	for _, end := range []time.Duration{time.Second, answerBound - time.Second} {
		synctest.Test(t, func(t *testing.T) {
			db, srv := newServer(t)
			free := stuck(srv, calledWaitQuery)
			conn, err := db.Conn(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			ctx, cancel := context.WithTimeout(t.Context(), end)
			defer cancel()
			start := time.Now()
			wantError(t, AcquireConn(ctx, conn, key), ErrNotAcquired, context.DeadlineExceeded)
			if d := time.Since(start) - end; d > 0 {
				t.Errorf("%v after the end of ctx", d)
			}
			time.Sleep(time.Hour)
			free()
			synctest.Wait()
			srv.want(t, on(1, "open", tryCalledQuery, calledWaitQuery, unlockQuery)...)
		})
	}
}

func TestReleaseIsBoundedEvenIfTheDriverDoesNotReturn(t *testing.T) {
	t.Parallel()
	for _, c := range closures[:4] {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				db, srv := newServer(t)
				back := make(chan struct{})
				srv.script = func(_ context.Context, _ int, query string) (int64, error) {
					if query == c.releases[0] {
						<-back
					}
					return 1, nil
				}
				start := time.Now()
				wantError(t, c.run(t.Context(), db, key, nothing), ErrLost, "release bigint 42", "no answer from the server within 5s")
				if d := time.Since(start); d > releaseBound+2*abandonAfter {
					t.Errorf("after %v", d)
				}
				close(back)
				synctest.Wait()
				srv.want(t, on(1, append(append(slices.Clip(c.acquires), c.releases...), "close")...)...)
			})
		})
	}
}

const (
	tryLent    = "SELECT pg_catalog.set_config('advisory.session', 'N', false), pg_catalog.set_config('idle_session_timeout', '60000', false), pg_catalog.set_config('idle_in_transaction_session_timeout', '60000', false) WHERE CASE WHEN pg_catalog.pg_is_in_recovery() THEN false ELSE pg_catalog.pg_try_advisory_lock(42) END"
	disarmLent = resetQuery + "RESET idle_in_transaction_session_timeout; "
)

func TestStatementsOfWithConnLock(t *testing.T) {
	t.Parallel()
	mock := func(t *testing.T, queries ...string) *sql.DB {
		db, mock := newMock(t)
		for _, q := range queries {
			mock.ExpectExec(q).WithoutArgs().WillReturnResult(sqlmock.NewResult(0, 1))
		}
		return db
	}
	const (
		check = "pg_catalog.set_config('client_connection_check_interval', CASE" +
			" WHEN pg_catalog.current_setting('client_connection_check_interval')::pg_catalog.interval OPERATOR(pg_catalog.>) '0'" +
			" AND pg_catalog.current_setting('client_connection_check_interval')::pg_catalog.interval OPERATOR(pg_catalog.<) '1s'" +
			" THEN pg_catalog.current_setting('client_connection_check_interval') ELSE '1s' END, false)"
		uncheck = "RESET client_connection_check_interval; "
		try     = "SELECT " + check + " WHERE CASE WHEN pg_catalog.pg_is_in_recovery() THEN false ELSE pg_catalog.pg_try_advisory_lock(42) END"
	)
	wantError(t, withConnLock(t.Context(), mock(t, try, leftOpenStatement, uncheck+unlockLentQuery)))
	wantError(t, withConnLock(t.Context(), mock(t,
		strings.ReplaceAll(try, "_lock(", "_lock_shared("), leftOpenStatement,
		uncheck+strings.ReplaceAll(unlockLentQuery, "pg_advisory_unlock(", "pg_advisory_unlock_shared("),
	), Shared()))
	db, srv := newServer(t)
	wantError(t, withConnLock(t.Context(), db, HolderTimeout(time.Minute)))
	if diff := cmp.Diff(on(1, "open", strings.Replace(tryLent, " WHERE", ", "+check+" WHERE", 1), leftOpenStatement, disarmLent+uncheck+unlockLentQuery), srv.raw); diff != "" {
		t.Errorf("with HolderTimeout (-want +got):\n%s", diff)
	}
	wantError(t, WithConnLock(t.Context(), mock(t, try, "CREATE TABLE t ()", leftOpenStatement, uncheck+unlockLentQuery), key,
		func(ctx context.Context, conn *sql.Conn) error {
			_, err := conn.ExecContext(ctx, "CREATE TABLE t ()")
			return err
		}))
}

func TestWithConnLockThatCannotBeArmedIsNotAcquired(t *testing.T) {
	t.Parallel()
	db, srv := newServer(t, fails(pgError("42704")))
	err := WithConnLock(t.Context(), db, key, func(context.Context, *sql.Conn) error {
		t.Error("fn runs")
		return nil
	}, HolderTimeout(time.Minute))
	wantError(t, err, pgError("42704"), "PostgreSQL 14")
	srv.want(t, on(1, "open", tryLent, disarmLent+freeQuery, "close")...)
}

// Rows that fn leaves open are found before its ctx ends, and closes them.
func TestRowsThatFnLeavesOpenEndTheSession(t *testing.T) {
	t.Parallel()
	for _, direct := range []bool{false, true} {
		db, srv := newServer(t)
		srv.direct = direct
		srv.leftOpen = errors.New("pq: there is already a query being processed on this connection")
		err := WithConnLock(t.Context(), db, key, func(ctx context.Context, _ *sql.Conn) error { return ctx.Err() })
		wantError(t, err, errLeftOpen, "advisory: release bigint 42: fn left rows or a transaction open on its conn")
		if errors.Is(err, ErrLost) {
			t.Errorf("%v matches ErrLost", err)
		}
		srv.want(t, on(1, "open", tryQuery, "close")...)
	}
}

func TestWithConnLocksConnectionIsDiscardedIfFnClosedOrLostIt(t *testing.T) {
	t.Parallel()
	db, srv := newServer(t)
	err := WithConnLock(t.Context(), db, key, func(_ context.Context, conn *sql.Conn) error {
		return conn.Raw(func(any) error { return driver.ErrBadConn })
	})
	wantError(t, err, driver.ErrBadConn, ErrLost, sql.ErrConnDone)
	srv.want(t, on(1, "open", tryQuery, "close")...)

	// Closed, it lies in the pool, among others.
	db, srv = newServer(t)
	db.SetMaxIdleConns(3)
	var log logBuffer
	err = WithConnLock(t.Context(), db, key, func(_ context.Context, conn *sql.Conn) error {
		for range 2 {
			other, err := db.Conn(t.Context())
			wantError(t, err)
			defer other.Close()
		}
		return conn.Close()
	}, log.option())
	wantError(t, err, errConnClosed, "advisory: release bigint 42: fn closed its conn")
	srv.want(t, slices.Concat(on(1, "open", tryQuery), on(2, "open"), on(3, "open"), on(1, unlockLentQuery, freeQuery, "close"))...)
	if stats := db.Stats(); stats.InUse != 0 || stats.Idle != 2 || log.String() != "" {
		t.Errorf("%d connections in use, %d idle; log: %s", stats.InUse, stats.Idle, log.String())
	}

	// Another has it from there.
	var other *sql.Conn
	err = WithConnLock(t.Context(), db, key, func(_ context.Context, conn *sql.Conn) (err error) {
		wantError(t, conn.Close())
		db.SetMaxIdleConns(0)
		db.SetMaxIdleConns(2)
		other, err = db.Conn(t.Context())
		return err
	}, log.option())
	wantError(t, err, ErrLost, sql.ErrConnDone)
	wantError(t, other.Close())
	if !strings.Contains(log.String(), "conn was closed while fn ran") {
		t.Errorf("log: %s", log.String())
	}
}

// On the caller's connection, what it holds is known exactly, and nothing else on it is touched.
func TestAcquireConn(t *testing.T) {
	t.Parallel()
	died := io.ErrUnexpectedEOF
	sharedTry := strings.Replace(tryCalledQuery, "_lock(", "_lock_shared(", 1)
	sharedWait := waitStatement(onCalled, "", key, true, sliceMin, sessionSettings{})
	for _, test := range []struct {
		name    string
		replies []reply
		opts    []Option
		want    []string // after open
		wants   []any
	}{
		{"granted", nil, nil, []string{tryCalledQuery}, nil},
		{"shared", nil, []Option{Shared()}, []string{sharedTry}, nil},
		{"granted after waiting", []reply{refused}, nil, []string{tryCalledQuery, calledWaitQuery}, nil},
		{"granted after two slices", []reply{refused, refused}, nil, []string{tryCalledQuery, calledWaitQuery, calledWaitQuery}, nil},
		{"shared, after two slices", []reply{refused, refused}, []Option{Shared()}, []string{sharedTry, sharedWait, sharedWait}, nil},
		{"NoWait refused", []reply{refused}, []Option{NoWait()}, []string{tryCalledQuery}, []any{ErrNotAcquired}},
		{
			"Timeout", []reply{refused, refused, refused}, []Option{Timeout(150 * time.Millisecond)},
			[]string{tryCalledQuery, calledWaitQuery, calledWaitQuery}, []any{ErrNotAcquired, "not acquired within 150ms"},
		},
		{"the try fails", []reply{fails(died)}, nil, []string{tryCalledQuery, "close"}, []any{died}},
		{"the server refuses the try", []reply{fails(pgError("53200"))}, nil, []string{tryCalledQuery, freeQuery, "close"}, []any{pgError("53200")}},
		{"the wait fails", []reply{refused, fails(died)}, nil, []string{tryCalledQuery, calledWaitQuery, "close"}, []any{died}},
		{"a deadlock", []reply{refused, fails(pgError("40P01"))}, nil, []string{tryCalledQuery, calledWaitQuery, freeQuery, "close"}, []any{ErrDeadlock}},
		{
			"a slice that is cancelled outside of its block: what it got is unlocked", []reply{refused, fails(err57014)}, nil,
			[]string{tryCalledQuery, calledWaitQuery, unlockHeldQuery, calledWaitQuery}, nil,
		},
		{"in a transaction", []reply{{rows: 3}}, nil, []string{tryCalledQuery}, []any{"in a transaction"}},
		{"in one that has failed", []reply{fails(pgError("25P02"))}, nil, []string{tryCalledQuery}, []any{"in a transaction"}},
		{"twice", []reply{{rows: 4}}, nil, []string{tryCalledQuery}, []any{ErrReentrant}},
		{"a standby", []reply{refused, {rows: 2}}, nil, []string{tryCalledQuery, calledWaitQuery, freeQuery, "close"}, []any{"hot standby", "primary"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				db, srv := newServer(t)
				answers := inOrder(test.replies...)
				srv.script = func(ctx context.Context, conn int, query string) (int64, error) {
					rows, err := answers(ctx, conn, query)
					if rows == 0 && err == nil {
						_, err = taken(t)(ctx, conn, query)
					}
					return rows, err
				}
				conn, err := db.Conn(t.Context())
				if err != nil {
					t.Fatal(err)
				}
				wantError(t, AcquireConn(t.Context(), conn, key, test.opts...), test.wants...)
				srv.want(t, on(1, append([]string{"open"}, test.want...)...)...)
				if test.want[len(test.want)-1] == "close" {
					if err := conn.PingContext(t.Context()); !errors.Is(err, sql.ErrConnDone) {
						t.Errorf("the caller can go on: %v", err)
					}
				} else if _, err := conn.ExecContext(t.Context(), "SELECT"); err != nil {
					t.Errorf("the caller cannot go on: %v", err)
				}
				_ = conn.Close()
			})
		})
	}
}

func TestReleaseConn(t *testing.T) {
	t.Parallel()
	died := io.ErrUnexpectedEOF
	for _, test := range []struct {
		name  string
		reply reply
		opts  []Option
		want  []string
		wants []any
	}{
		{"held", granted, nil, []string{unlockHeldQuery}, nil},
		{"held shared", granted, []Option{Shared()}, []string{strings.NewReplacer("_unlock(", "_unlock_shared(", "ExclusiveLock", "ShareLock").Replace(unlockHeldQuery)}, nil},
		{"not held", refused, nil, []string{unlockHeldQuery}, []any{ErrLost, "release bigint 42"}},
		{"fails", fails(died), nil, []string{unlockHeldQuery, "close"}, []any{ErrLost, died}},
		{"refused", fails(pgError("25P02")), nil, []string{unlockHeldQuery, freeQuery, "close"}, []any{ErrLost, pgError("25P02")}},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			db, srv := newServer(t, granted, test.reply)
			conn, err := db.Conn(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			wantError(t, AcquireConn(t.Context(), conn, key, test.opts...))
			ended, cancel := context.WithCancel(t.Context())
			cancel() // and it is released nevertheless
			wantError(t, ReleaseConn(ended, conn, key, test.opts...), test.wants...)
			got := srv.lines()[2:]
			if !slices.Equal(got, on(1, test.want...)) {
				t.Errorf("log: %q", got)
			}
		})
	}
}

func TestAcquireConnAndReleaseConnOnAConnThatIsClosed(t *testing.T) {
	t.Parallel()
	db, srv := newServer(t)
	conn, err := db.Conn(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := conn.Close(); err != nil {
		t.Fatal(err)
	}
	wantError(t, AcquireConn(t.Context(), conn, key), sql.ErrConnDone)
	wantError(t, ReleaseConn(t.Context(), conn, key), ErrLost, sql.ErrConnDone)
	srv.want(t, "1 open")
}

func TestAcquireConnUnderAnEndedCtxLeavesConnAsItWas(t *testing.T) {
	t.Parallel()
	db, srv := newServer(t)
	conn, err := db.Conn(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	wantError(t, AcquireConn(ctx, conn, key), ErrNotAcquired, context.Canceled)
	srv.want(t, "1 open")
}

func TestATimeoutWithoutEndIsOne(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		db, srv := newServer(t, refused, refused)
		wantError(t, WithLock(t.Context(), db, key, nothing, Timeout(1<<63-1)))
		srv.want(t, on(1, "open", tryQuery, armedWaitQuery, armedWaitQuery, disarmQuery)...)
	})
}

// A connection that lies in the pool may lead into a black hole.
func TestAPooledConnectionThatDoesNotAnswerIsDroppedAndTheNextOneTried(t *testing.T) {
	t.Parallel()
	for _, c := range closures {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				db, srv := newServer(t)
				idle(t, db, 2)
				back := make(chan struct{})
				srv.script = func(ctx context.Context, conn int, _ string) (int64, error) {
					switch conn {
					case 1: // the driver does not return
						<-back
					case 2:
						<-ctx.Done()
						return 0, ctx.Err()
					}
					return 1, nil
				}
				start := time.Now()
				wantError(t, c.run(t.Context(), db, key, nothing))
				if d := time.Since(start); d < 2*answerBound || d > 2*answerBound+3*abandonAfter {
					t.Errorf("after %v", d)
				}
				close(back)
				synctest.Wait()
				if srv.opened != 3 || srv.open() != 1 || db.Stats().InUse != 0 {
					t.Errorf("%d connections of %d open", srv.open(), srv.opened)
				}
			})
		})
	}
}

// So may one that the driver asks whether it lives.
func TestAPooledConnectionWhosePingIsNotAnsweredIsDropped(t *testing.T) {
	t.Parallel()
	for _, c := range closures {
		synctest.Test(t, func(t *testing.T) {
			db, srv := newServer(t)
			idle(t, db, 1)
			srv.reset = func(ctx context.Context, conn int) error {
				if conn > 1 {
					return nil
				}
				<-ctx.Done()
				return driver.ErrBadConn
			}
			start := time.Now()
			wantError(t, c.run(t.Context(), db, key, nothing))
			if d := time.Since(start); d != answerBound {
				t.Errorf("%s: after %v", c.name, d)
			}
			synctest.Wait()
			if srv.opened != 2 || srv.open() != 1 {
				t.Errorf("%s: %d connections of %d open", c.name, srv.open(), srv.opened)
			}
		})
	}
}

// The connections that others use do not make a dead network a longer wait.
func TestAConnectionThatIsNeverMadeIsGivenUpWhateverElseIsInUse(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		db, srv := newServer(t)
		for range 3 {
			conn, err := db.Conn(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
		}
		srv.dial = func(ctx context.Context) error {
			<-ctx.Done()
			return ctx.Err()
		}
		start := time.Now()
		wantError(t, WithLock(t.Context(), db, key, nothing), "no answer from the server within 30s")
		if d := time.Since(start); d != dialBound {
			t.Errorf("after %v", d)
		}
	})
}

func TestADriverThatDoesNotReturnFromMakingAConnectionIsAbandoned(t *testing.T) {
	t.Parallel()
	for _, c := range closures {
		synctest.Test(t, func(t *testing.T) {
			db, srv := newServer(t)
			back := make(chan struct{})
			srv.dial = func(context.Context) error { <-back; return nil }
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			defer cancel()
			start := time.Now()
			wantError(t, c.run(ctx, db, key, nothing), ErrNotAcquired, context.DeadlineExceeded)
			if d := time.Since(start); d != time.Second {
				t.Errorf("%s: after %v", c.name, d)
			}
			close(back)
			synctest.Wait()
			srv.want(t, "1 open")
			if stats := db.Stats(); stats.Idle != 1 || stats.InUse != 0 {
				t.Errorf("%s: the connection that came late: %+v", c.name, stats)
			}
		})
	}
}

// What Close does is the driver's business: that of pgx on a pgxpool hands a sound
// session to the next user. None may have a lock then.
func TestADiscardedSessionLeavesNoLockEvenIfCloseDoesNotEndIt(t *testing.T) {
	t.Parallel()
	internal := pgError("XX000")
	for _, test := range []struct {
		name string
		run  func(t *testing.T, db *sql.DB, failing func(string, error))
	}{
		{"the release fails", func(t *testing.T, db *sql.DB, failing func(string, error)) {
			failing(unlockQuery, internal)
			wantError(t, WithLock(t.Context(), db, key, nothing), ErrLost, internal)
		}},
		{"the release of conn fails", func(t *testing.T, db *sql.DB, failing func(string, error)) {
			failing(unlockLentQuery, internal)
			wantError(t, withConnLock(t.Context(), db), ErrLost, internal)
		}},
		{"the release of the caller's conn fails", func(t *testing.T, db *sql.DB, failing func(string, error)) {
			failing(unlockHeldQuery, internal)
			conn, err := db.Conn(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			wantError(t, AcquireConn(t.Context(), conn, key))
			wantError(t, ReleaseConn(t.Context(), conn, key), ErrLost, internal)
		}},
		{"the answer to the try is an error", func(t *testing.T, db *sql.DB, failing func(string, error)) {
			failing(tryQuery, internal)
			wantError(t, WithLock(t.Context(), db, key, nothing), internal)
		}},
		{"BEGIN fails under a session-level lock", func(t *testing.T, db *sql.DB, failing func(string, error)) {
			failing("BEGIN SERIALIZABLE", internal)
			wantError(t, WithTxLock(t.Context(), db, key, noTx, isolation(sql.LevelSerializable)), internal)
		}},
		{"a heartbeat fails", func(t *testing.T, db *sql.DB, failing func(string, error)) {
			failing(armQuery, internal)
			wantError(t, WithLock(t.Context(), db, key, func(ctx context.Context) error {
				<-ctx.Done()
				return nil
			}), ErrLost, internal)
		}},
	} {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				db, srv := newServer(t)
				held, armed := false, false
				fails := map[string]error{}
				srv.script = func(_ context.Context, _ int, query string) (int64, error) {
					switch {
					case strings.Contains(query, "_try_"):
						held = true
					case query == freeQuery || query == resetQuery+freeQuery:
						held = false
					}
					armed = setting.MatchString(query) || armed && !resetting.MatchString(query)
					return 1, fails[plainly(query)]
				}
				test.run(t, db, func(query string, err error) { fails[query] = err })
				synctest.Wait()
				if held || armed {
					t.Errorf("held: %v, armed: %v; log: %q", held, armed, srv.lines())
				}
				if lines := srv.lines(); lines[len(lines)-1] != "1 close" || db.Stats().OpenConnections != 0 {
					t.Errorf("not closed; log: %q", lines)
				}
			})
		})
	}
}

// A session that is not to be cleared is closed, and that within a moment.
func TestADiscardThatIsNotAnsweredEndsInAClose(t *testing.T) {
	t.Parallel()
	for name, answer := range map[string]func(context.Context) error{
		"an error":  func(context.Context) error { return pgError("XX000") },
		"no answer": func(ctx context.Context) error { <-ctx.Done(); return ctx.Err() },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				db, srv := newServer(t)
				srv.script = func(ctx context.Context, _ int, query string) (int64, error) {
					switch query {
					case unlockQuery:
						return 0, nil
					case freeQuery:
						return 0, answer(ctx)
					}
					return 1, nil
				}
				start := time.Now()
				wantError(t, WithLock(t.Context(), db, key, nothing), ErrLost)
				if d := time.Since(start); d > abandonAfter {
					t.Errorf("after %v", d)
				}
				time.Sleep(clearBound)
				synctest.Wait()
				srv.want(t, on(1, "open", tryQuery, unlockQuery, freeQuery, "close")...)
			})
		})
	}
}

// In real time, because database/sql waits for its own locks.
func TestWhatFnLeavesOpenOnItsConnDoesNotHoldUpTheRelease(t *testing.T) {
	t.Parallel()
	died := io.ErrUnexpectedEOF
	leftOpen := []any{"advisory: release bigint 42: fn left rows or a transaction open on its conn"}
	var wg sync.WaitGroup
	defer wg.Wait()
	for _, test := range []struct {
		name  string
		reply reply // to the release
		panic bool
		rows  bool // that is what is left, and not a transaction
		wants []any
	}{
		{"a transaction", reply{rows: 2}, false, false, leftOpen},
		{"a transaction that has failed", fails(pgError("25P02")), false, false, leftOpen},
		{"a transaction, and the session is dead", fails(died), false, false, []any{ErrLost, died}},
		{"a transaction, with a panic", reply{rows: 2}, true, false, nil},
		{"a transaction, with a panic, and the session is dead", fails(died), true, false, nil},
		{"rows, and the session is dead", fails(died), false, true, []any{ErrLost, died}},
	} {
		wg.Go(func() {
			db, srv := newServer(t)
			srv.rows = func(int, []driver.NamedValue) ([][]driver.Value, error) {
				return [][]driver.Value{{int64(1)}, {int64(2)}}, nil
			}
			srv.script = func(_ context.Context, _ int, query string) (int64, error) {
				if query == unlockLentQuery {
					return test.reply.rows, test.reply.err
				}
				return 1, nil
			}
			var rows *sql.Rows
			var tx *sql.Tx
			start := time.Now()
			err := func() error {
				defer func() {
					if r := recover(); (r == "mine") != test.panic {
						t.Errorf("%s: recovered %v", test.name, r)
					}
				}()
				return WithConnLock(t.Context(), db, key, func(_ context.Context, conn *sql.Conn) (err error) {
					if test.rows {
						rows, err = conn.QueryContext(context.Background(), "SELECT $1", 1)
					} else {
						tx, err = conn.BeginTx(context.Background(), nil)
					}
					if test.panic {
						panic("mine")
					}
					return err
				})
			}()
			wantError(t, err, test.wants...)
			if d := time.Since(start); d > abandonAfter+time.Second {
				t.Errorf("%s: after %v", test.name, d)
			}
			if lines := srv.lines(); lines[len(lines)-1] != "1 close" || lines[3] != "1 "+unlockLentQuery {
				t.Errorf("%s: log: %q", test.name, lines)
			}
			// database/sql's part can end now.
			if test.rows {
				err = errors.Join(rows.Err(), rows.Close())
			} else if err = tx.Rollback(); errors.Is(err, driver.ErrBadConn) {
				err = nil
			}
			if err != nil {
				t.Errorf("%s: %v", test.name, err)
			}
		})
	}
}

// The server counts from a grant that may have been long on its way.
func TestAnArmedGrantThatTookAHeartbeatIsConfirmed(t *testing.T) {
	t.Parallel()
	wait := strings.Replace(armedWaitQuery, "'15000'", "'600'", 1)
	for _, test := range []struct {
		name  string
		took  time.Duration
		reply reply // to the question
		want  []string
		wants []any
	}{
		{"quick", 199 * time.Millisecond, done, on(1, "open", tryQuery, wait, disarmQuery), nil},
		{"slow", 200 * time.Millisecond, granted, on(1, "open", tryQuery, wait, beatQuery, disarmQuery), nil},
		{
			"too slow", time.Second, refused,
			slices.Concat(on(1, "open", tryQuery, wait, beatQuery, resetQuery+freeQuery, "close"), on(2, "open", probeQuery, wait, disarmQuery)), nil,
		},
		{
			"gone", time.Second, fails(io.ErrUnexpectedEOF),
			slices.Concat(on(1, "open", tryQuery, wait, beatQuery, "close"), on(2, "open", probeQuery, wait, disarmQuery)), nil,
		},
		{
			"refused", time.Second, fails(pgError("53200")),
			on(1, "open", tryQuery, wait, beatQuery, resetQuery+freeQuery, "close"), []any{pgError("53200")},
		},
	} {
		for _, c := range closures[:3] {
			t.Run(c.name+" "+test.name, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					db, srv := newServer(t)
					srv.script = func(_ context.Context, conn int, query string) (int64, error) {
						switch {
						case conn > 1:
						case query == tryQuery:
							return 0, nil
						case plainly(query) == wait:
							time.Sleep(test.took)
						case plainly(query) == beatQuery:
							return test.reply.rows, test.reply.err
						}
						return 1, nil
					}
					wantError(t, c.run(t.Context(), db, key, func(ctx context.Context) error { return ctx.Err() },
						Heartbeat(200*time.Millisecond), HolderTimeout(600*time.Millisecond)), test.wants...)
					synctest.Wait()
					srv.want(t, test.want...)
				})
			})
		}
	}
}

func TestAGrantThatIsConfirmedTooLateIsNotUsed(t *testing.T) {
	t.Parallel()
	for _, c := range closures[:3] {
		synctest.Test(t, func(t *testing.T) {
			db, srv := newServer(t)
			ctx, cancel := context.WithCancel(t.Context())
			srv.script = func(_ context.Context, _ int, query string) (int64, error) {
				switch {
				case strings.Contains(query, "_try_"):
					return 0, nil
				case isWait(query):
					time.Sleep(time.Second)
				case isBeat(query):
					cancel()
				}
				return 1, nil
			}
			wantError(t, c.run(ctx, db, key, func(context.Context) error {
				t.Errorf("%s: fn runs", c.name)
				return nil
			}, HolderTimeout(time.Minute)), ErrNotAcquired, context.Canceled)
		})
	}
}

func TestWaitsOfWithConnLockAreArmedWithHolderTimeout(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		db, srv := newServer(t, refused, refused, granted)
		wantError(t, withConnLock(t.Context(), db, HolderTimeout(time.Minute)))
		wait := waitStatement(onOwn, "", key, false, sliceMin, sessionSettings{silence: time.Minute, nonce: "N", lent: true})
		srv.want(t, on(1, "open", tryLent, wait, wait, disarmLent+unlockLentQuery)...)
	})
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
				conn, err := db.Conn(t.Context())
				if err != nil {
					t.Fatal(err)
				}
				ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
				defer cancel()
				var log logBuffer
				err = f.call(ctx, target{db: db, conn: conn}, key, log.option())
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
func (p preparing) Close() error              { return p.c.Close() }
func (p preparing) Prepare(query string) (driver.Stmt, error) {
	return nil, errors.New("prepared: " + query)
}

type skipping struct{ preparing }

func (skipping) ExecContext(context.Context, string, []driver.NamedValue) (driver.Result, error) {
	return nil, driver.ErrSkip
}

// Connections in use outlive their pool; a wait does not.
func TestAWaitEndsWithItsPool(t *testing.T) {
	t.Parallel()
	for _, c := range closures {
		synctest.Test(t, func(t *testing.T) {
			db, srv := newServer(t)
			srv.script = taken(t)
			time.AfterFunc(time.Second, func() {
				if err := db.Close(); err != nil {
					t.Error(err)
				}
			})
			start := time.Now()
			wantError(t, c.run(t.Context(), db, key, nothing), "acquire bigint 42: sql: database is closed")
			if d := time.Since(start) - time.Second; d > sliceMax {
				t.Errorf("%s: %v after Close", c.name, d)
			}
			synctest.Wait()
			if srv.open() != 0 {
				t.Errorf("%s: the connection is still open", c.name)
			}
		})
	}
}

// An answer that comes when the statement is broken off, and the next statement behind it.
func TestAnAnswerInTheMomentOfTheBound(t *testing.T) {
	t.Parallel()
	r := &runner{busy: make(chan struct{}, 1)}
	for i := range 500 {
		_ = r.do(t.Context(), 200*time.Microsecond, func(context.Context) error {
			time.Sleep(time.Duration(200+i%40) * time.Microsecond)
			return nil
		})
	}
}

// fn's conn is closed with its session, which dies under fn's own statement: the release does not
// look for it for long.
func TestWithConnLocksSessionDiesUnderFnsStatement(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		db, srv := newServer(t)
		db.SetMaxIdleConns(5)
		down := false
		srv.script = func(_ context.Context, _ int, query string) (int64, error) {
			if down = query == "mine"; down {
				return 0, driver.ErrBadConn
			}
			return 1, nil
		}
		srv.reset = func(context.Context, int) error {
			if down {
				return driver.ErrBadConn
			}
			return nil
		}
		srv.dial = func(ctx context.Context) error {
			if down {
				<-ctx.Done()
			}
			return ctx.Err()
		}
		start := time.Now()
		wantError(t, WithConnLock(t.Context(), db, key, func(ctx context.Context, conn *sql.Conn) error {
			for range 4 {
				other, err := db.Conn(ctx)
				wantError(t, err)
				defer other.Close()
			}
			_, err := conn.ExecContext(ctx, "mine")
			return err
		}), ErrLost, driver.ErrBadConn)
		if d := time.Since(start); d > clearBound {
			t.Errorf("after %v", d)
		}
		time.Sleep(dialBound) // the driver is told to give up then
	})
}
