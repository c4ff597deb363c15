package advisory

import (
	"context"
	"database/sql/driver"
	"io"
	"strings"
	"sync"
	"testing"
)

const (
	standbyQuery = "SELECT WHERE pg_catalog.pg_is_in_recovery()"
	pidLow       = "SELECT FROM pg_catalog.generate_series(1, pg_catalog.pg_backend_pid() OPERATOR(pg_catalog.%) 4096)"
	pidHigh      = "SELECT FROM pg_catalog.generate_series(1, pg_catalog.pg_backend_pid() OPERATOR(pg_catalog./) 4096)"
)

// locks is a server that Check is content with: with locks that exclude each other.
// The process of connection n is 10000 + n.
func locks() func(context.Context, int, string) (int64, error) {
	var mu sync.Mutex
	holder := map[string]int{}
	one := map[bool]int64{true: 1}
	return func(_ context.Context, conn int, query string) (int64, error) {
		mu.Lock()
		defer mu.Unlock()
		_, arg, _ := strings.Cut(query, "lock(")
		switch {
		case query == standbyQuery:
			return 0, nil
		case query == pidLow:
			return int64(10000+conn) % 4096, nil
		case query == pidHigh:
			return int64(10000+conn) / 4096, nil
		case strings.HasPrefix(query, "SELECT WHERE pg_catalog.pg_try_advisory_lock("):
			if holder[arg] != 0 {
				return 0, nil
			}
			holder[arg] = conn
			return 1, nil
		case strings.HasPrefix(query, heldPrefix):
			for _, c := range holder {
				if c == conn {
					return 1, nil
				}
			}
			return 0, nil
		case strings.HasPrefix(query, "SELECT WHERE pg_catalog.pg_advisory_unlock("):
			held := holder[arg] == conn
			if held {
				delete(holder, arg)
			}
			return one[held], nil
		}
		return 0, pgError("42601")
	}
}

func TestCheckIsContentAndLeavesNothingBehind(t *testing.T) {
	t.Parallel()
	for limit, conns := range map[int]int{0: 4, 2: 2, 3: 2, 6: 3, 8: 4, 100: 4} {
		db, srv := newServer(t)
		db.SetMaxOpenConns(limit)
		db.SetMaxIdleConns(10)
		srv.script = locks()
		wantError(t, Check(t.Context(), db))
		if srv.opened != conns || srv.open() != conns || db.Stats().InUse != 0 {
			t.Errorf("limit %d: %d connections of %d open, want %d", limit, srv.open(), srv.opened, conns)
		}
		all := strings.Join(srv.lines(), "\n")
		if tried, unlocked := strings.Count(all, "pg_try_advisory_lock"), strings.Count(all, "pg_advisory_unlock"); tried != conns+1 || unlocked != 2 {
			t.Errorf("limit %d: %d tries, %d unlocks", limit, tried, unlocked)
		}
	}
}

func TestCheckFindsWhatMakesLocksMeanNothing(t *testing.T) {
	t.Parallel()
	var pid int64
	for _, test := range []struct {
		name string
		// answer is asked before a good server, and tells whether it answers.
		answer func(conn int, query string) (rows int64, answers bool)
		says   string
	}{
		{"a hot standby", func(_ int, query string) (int64, bool) { return 1, query == standbyQuery }, "hot standby"},
		{"a session that changes", func(_ int, query string) (int64, bool) { pid++; return pid, query == pidLow }, "changes between statements"},
		{"a session that is shared", func(_ int, query string) (int64, bool) { return 7, query == pidLow || query == pidHigh }, "two connections share a session"},
		{"locks that nobody gets", func(_ int, query string) (int64, bool) { return 0, strings.Contains(query, "_try_") }, "refuses a lock that nobody can hold"},
		{"locks that do nothing", func(_ int, query string) (int64, bool) { return 1, strings.Contains(query, "advisory_") }, "does not hold it"},
		{"locks that are not held", func(_ int, query string) (int64, bool) { return 0, strings.Contains(query, "pg_locks") }, "does not hold it"},
		{"two servers", func(conn int, query string) (int64, bool) { return 1, conn == 2 && strings.Contains(query, "_try_") }, "two connections (1 and 2) held the same lock"},
		{"a lock that is gone", func(_ int, query string) (int64, bool) { return 0, strings.Contains(query, "unlock") }, "gone when it was to be released"},
		{"a lock that is not free", func(_ int, query string) (int64, bool) { return 1, strings.Contains(query, "unlock") }, "released lock was not free"},
	} {
		t.Run(test.name, func(t *testing.T) {
			db, srv := newServer(t)
			good := locks()
			srv.script = func(ctx context.Context, conn int, query string) (int64, error) {
				if rows, answers := test.answer(conn, query); answers {
					return rows, nil
				}
				return good(ctx, conn, query)
			}
			wantError(t, Check(t.Context(), db), "advisory: check: ", test.says)
			if db.Stats().InUse != 0 {
				t.Error("connections not handed back")
			}
			if strings.Contains(strings.Join(srv.lines(), "\n"), "_try_") && srv.open() != 0 {
				t.Error("a connection that may hold a lock was handed back")
			}
		})
	}
}

func TestSessionsWithoutProcessIDsAreNotTakenForOne(t *testing.T) {
	t.Parallel()
	db, srv := newServer(t)
	good := locks()
	srv.script = func(ctx context.Context, conn int, query string) (int64, error) {
		if query == pidLow || query == pidHigh {
			return 0, nil
		}
		return good(ctx, conn, query)
	}
	wantError(t, Check(t.Context(), db))
}

func TestCheckReturnsTheErrorOfEachStep(t *testing.T) {
	t.Parallel()
	for _, died := range []error{io.ErrUnexpectedEOF, pgError("XX000")} {
		for step := 1; ; step++ {
			db, srv := newServer(t)
			good := locks()
			sent := 0
			srv.script = func(ctx context.Context, conn int, query string) (int64, error) {
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
			if step <= 4 && step > 1 && died == error(io.ErrUnexpectedEOF) {
				wantError(t, err) // the pool's connection was dead, and is replaced
				continue
			}
			wantError(t, err, died, "advisory: check: ")
			if srv.open() != 0 {
				t.Errorf("step %d: %d connections open", step, srv.open())
			}
		}
	}
}

func TestCheckDropsDeadConnectionsOfThePool(t *testing.T) {
	t.Parallel()
	db, srv := newServer(t)
	idle(t, db, 3)
	good := locks()
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

func TestCheckOfNothing(t *testing.T) {
	t.Parallel()
	db, srv := newServer(t)
	wantError(t, Check(t.Context(), nil), "advisory: check: nil db")
	wantError(t, Check(noCtx, db), "advisory: check: nil ctx")
	srv.want(t)
}
