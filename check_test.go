package advisory

import (
	"context"
	"database/sql/driver"
	"fmt"
	"io"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// locks is a server that Check is content with: with sessions of their own, and locks that exclude each
// other. session names the session that a connection has; nil: each has its own.
func locks(session func(conn int) int) func(context.Context, int, string) (int64, error) {
	var mu sync.Mutex
	holder, marks := map[string]int{}, map[int]string{}
	yes := map[bool]int64{true: 1}
	return func(_ context.Context, conn int, query string) (int64, error) {
		mu.Lock()
		defer mu.Unlock()
		if session != nil {
			conn = session(conn)
		}
		_, arg, _ := strings.Cut(query, "lock(")
		arg, _, _ = strings.Cut(arg, ")")
		_, mark, _ := strings.Cut(query, "OPERATOR(pg_catalog.=) ")
		switch {
		case strings.HasPrefix(query, "SELECT pg_catalog.set_config('advisory.session'"):
			marks[conn] = mark
			return 1, nil
		case strings.Contains(query, "current_setting('advisory.session', true)"):
			return yes[marks[conn] == mark], nil
		case strings.HasPrefix(query, "SELECT WHERE CASE WHEN pg_catalog.pg_is_in_recovery() THEN false ELSE pg_catalog.pg_try_advisory_lock("):
			if holder[arg] != 0 && holder[arg] != conn {
				return 0, nil
			}
			holder[arg] = conn
			return 1, nil
		case isWait(query):
			return yes[len(holder) == 0], nil
		case strings.HasPrefix(query, "SELECT WHERE pg_catalog.pg_advisory_unlock("):
			held := holder[arg] == conn
			if held {
				delete(holder, arg)
			}
			return yes[held], nil
		case query == freeQuery:
			for k, c := range holder {
				if c == conn {
					delete(holder, k)
				}
			}
			return 1, nil
		}
		return 0, pgError("42601")
	}
}

func TestCheckIsContentAndLeavesNothingBehind(t *testing.T) {
	t.Parallel()
	for _, limit := range []int{0, 2, 3, 8} {
		db, srv := newServer(t)
		db.SetMaxOpenConns(limit)
		srv.script = locks(nil)
		wantError(t, Check(t.Context(), db))
		wantNone(t, srv)
		all := strings.Join(srv.lines(), "\n")
		if n := len(srv.lines()) - 2*4 - strings.Count(all, freeQuery); srv.opened != 4 || n != 16 {
			t.Errorf("limit %d: %d connections, %d statements: %s", limit, srv.opened, n, all)
		}
	}
}

// wantNone waits until no connection is open.
func wantNone(t *testing.T, srv *server) {
	t.Helper()
	for range 500 {
		if srv.open() == 0 {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Errorf("%d of %d connections open", srv.open(), srv.opened)
}

func TestCheckFindsWhatMakesLocksMeanNothing(t *testing.T) {
	t.Parallel()
	turn := 0
	for _, test := range []struct {
		name    string
		session func(conn int) int
		// answer is asked before a good server, and tells whether it answers.
		answer func(conn int, query string) (rows int64, answers bool)
		says   string
	}{
		{"a hot standby", nil, func(_ int, query string) (int64, bool) { return 2, strings.Contains(query, "pg_is_in_recovery") }, "hot standby"},
		{"a second one that is", nil, func(conn int, query string) (int64, bool) {
			return 2, conn > 1 && strings.Contains(query, "pg_is_in_recovery")
		}, "hot standby"},
		{"a session that changes", func(int) int { turn++; return turn }, nil, "changes between statements"},
		{"a session that is shared", func(int) int { return 1 }, nil, "changes between statements"},
		{"settings that do nothing", nil, func(_ int, query string) (int64, bool) { return 0, strings.Contains(query, "advisory.session") }, "changes between statements"},
		{"locks that nobody gets", nil, func(_ int, query string) (int64, bool) { return 0, isTry(query) }, "refuses a lock that nobody can hold"},
		{"locks that do nothing", nil, func(_ int, query string) (int64, bool) {
			return 1, strings.Contains(query, "advisory_") || isWait(query)
		}, "lock functions do nothing"},
		{"two servers", nil, func(conn int, query string) (int64, bool) { return 1, conn == 2 && isWait(query) }, "two connections (1 and 2) held the same lock"},
		{"one server of several", nil, func(conn int, query string) (int64, bool) { return 1, conn == 4 && isWait(query) }, "two connections (1 and 4) held the same lock"},
		{"a lock that is gone", nil, func(_ int, query string) (int64, bool) { return 0, strings.Contains(query, "unlock(") }, "gone when it was to be released"},
		{"a lock that is not free", nil, func(_ int, query string) (int64, bool) {
			return 1, strings.Contains(query, "unlock(") // and it stays locked
		}, "released lock was not free"},
	} {
		t.Run(test.name, func(t *testing.T) {
			db, srv := newServer(t)
			good := locks(test.session)
			srv.script = func(ctx context.Context, conn int, query string) (int64, error) {
				if test.answer != nil {
					if rows, answers := test.answer(conn, query); answers {
						return rows, nil
					}
				}
				return good(ctx, conn, query)
			}
			wantError(t, Check(t.Context(), db), "advisory: check: ", test.says)
			wantNone(t, srv)
		})
	}
}

// A role that may not wait is told so, and by which of the server's errors.
func TestCheckTriesTheStatementThatWaits(t *testing.T) {
	t.Parallel()
	db, srv := newServer(t)
	good := locks(nil)
	srv.script = func(ctx context.Context, conn int, query string) (int64, error) {
		if isWait(query) {
			return 0, pgError("42501")
		}
		return good(ctx, conn, query)
	}
	wantError(t, Check(t.Context(), db), pgError("42501"), "does not execute the statement that waits")
}

func TestCheckReturnsTheErrorOfEachStep(t *testing.T) {
	t.Parallel()
	for _, died := range []error{io.ErrUnexpectedEOF, pgError("XX000")} {
		for step := 1; ; step++ {
			db, srv := newServer(t)
			good := locks(nil)
			sent := 0
			srv.script = func(ctx context.Context, conn int, query string) (int64, error) {
				if query == freeQuery {
					return 1, nil
				}
				if sent++; sent == step {
					return 0, died
				}
				return good(ctx, conn, query)
			}
			err := Check(t.Context(), db)
			if sent < step { // there is none so late
				wantError(t, err)
				break
			}
			wantNone(t, srv)
			if died == error(io.ErrUnexpectedEOF) && err == nil && strings.Contains(strings.Join(srv.lines(), "\n"), "close") {
				continue // a connection of the pool was dead, and is replaced
			}
			wantError(t, err, died, "advisory: check: ")
		}
	}
}

// Several Checks of a pool go one after the other. Those of other processes may have the connections that
// this one needs, and it has one that they need.
func TestChecksDoNotWaitForEachOther(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		db, srv := newServer(t)
		db.SetMaxOpenConns(2)
		srv.script = locks(nil)
		var all sync.WaitGroup
		for range 5 {
			all.Go(func() { wantError(t, Check(t.Context(), db)) })
		}
		all.Wait()

		// Two programs behind a pooler that has two sessions.
		const sessions = 2
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		slots := make(chan struct{}, sessions)
		for range 2 {
			db, srv := newServer(t)
			good, has := locks(nil), map[int]bool{}
			var mu sync.Mutex
			srv.script = func(_ context.Context, conn int, query string) (int64, error) {
				mu.Lock()
				waits := !has[conn]
				has[conn] = true
				mu.Unlock()
				if waits {
					select {
					case slots <- struct{}{}:
					case <-ctx.Done():
						return 0, ctx.Err()
					}
				}
				return good(ctx, conn, query)
			}
			srv.ended = func(int) { <-slots }
			all.Go(func() { wantError(t, Check(ctx, db)) })
		}
		all.Wait()
	})
}

func TestCheckEndsWithCtx(t *testing.T) {
	t.Parallel()
	for step := 1; step <= 12; step++ {
		bubble(t, fmt.Sprint("step ", step), func(t *testing.T) {
			db, srv := newServer(t)
			good := locks(nil)
			var sent atomic.Int64
			srv.script = func(ctx context.Context, conn int, query string) (int64, error) {
				if sent.Add(1) >= int64(step) {
					time.Sleep(time.Hour) // whatever becomes of ctx
					return 0, ctx.Err()
				}
				return good(ctx, conn, query)
			}
			ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
			defer cancel()
			start := time.Now()
			wantError(t, Check(ctx, db), context.DeadlineExceeded)
			wantTook(t, start, 0, 3*time.Second)
			time.Sleep(3 * time.Hour)
		})
	}
}

func TestCheckDropsDeadConnectionsOfThePool(t *testing.T) {
	t.Parallel()
	db, srv := newServer(t)
	idle(t, db, 3)
	good := locks(nil)
	srv.script = func(ctx context.Context, conn int, query string) (int64, error) {
		if conn <= 3 {
			return 0, driver.ErrBadConn
		}
		return good(ctx, conn, query)
	}
	wantError(t, Check(t.Context(), db))
}

func TestCheckNeedsTwoConnections(t *testing.T) {
	t.Parallel()
	db, srv := newServer(t)
	db.SetMaxOpenConns(1)
	wantError(t, Check(t.Context(), db), "advisory: check: the pool is limited to one connection")
	srv.want(t)
}

func TestCheckOfADeadServer(t *testing.T) {
	t.Parallel()
	db, srv := newServer(t)
	srv.dial = func(context.Context) error { return io.ErrClosedPipe }
	wantError(t, Check(t.Context(), db), io.ErrClosedPipe)
}

// In an outage, Check ends by itself: after dialBound if no connection is made, and within a minute
// whenever the server falls silent.
func TestCheckInAnOutageEndsByItself(t *testing.T) {
	t.Parallel()
	for _, what := range []string{"connection", "answer", "connection and no answer"} {
		for after := range 18 { // statements
			bubble(t, fmt.Sprintf("no %s after %d", what, after), func(t *testing.T) {
				db, srv := newServer(t)
				good := locks(nil)
				var sent atomic.Int64
				srv.script = func(ctx context.Context, conn int, query string) (int64, error) {
					if sent.Add(1) > int64(after) && strings.Contains(what, "answer") {
						return hangs(ctx)
					}
					return good(ctx, conn, query)
				}
				srv.dial = func(ctx context.Context) error {
					if sent.Load() >= int64(after) && strings.Contains(what, "connection") {
						return noDial(ctx)
					}
					return nil
				}
				start := time.Now()
				err := Check(t.Context(), db)
				if err == nil && after < 16 && what != "connection" {
					t.Error("no error")
				}
				wantTook(t, start, 0, time.Minute)
				if after == 0 && strings.Contains(what, "connection") {
					wantError(t, err, "advisory: check: no answer from the server within 30s")
					wantTook(t, start, dialBound, dialBound)
				}
				time.Sleep(time.Hour)
			})
		}
	}
}

func TestCheckOfNothing(t *testing.T) {
	t.Parallel()
	db, srv := newServer(t)
	wantError(t, Check(t.Context(), nil), "advisory: check: nil db")
	wantError(t, Check(noCtx, db), "advisory: check: nil ctx")
	srv.want(t)
}

// Once ctx has ended, Check asks for nothing more, and its error is ctx's.
func TestCheckAsksNothingAfterTheEndOfCtx(t *testing.T) {
	t.Parallel()
	for step := 1; step <= 16; step++ {
		bubble(t, fmt.Sprint("step ", step), func(t *testing.T) {
			db, srv := newServer(t)
			ctx, cancel := context.WithCancel(t.Context())
			good := locks(nil)
			asked := 0
			srv.script = func(c context.Context, conn int, query string) (int64, error) {
				if ctx.Err() != nil && query != freeQuery {
					t.Errorf("asked: %s", query)
				}
				if asked++; asked == step {
					defer cancel()
				}
				return good(c, conn, query)
			}
			wantError(t, Check(ctx, db), context.Canceled)
		})
	}
}
