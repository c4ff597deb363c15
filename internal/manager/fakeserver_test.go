package manager_test

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/pgadvisory/advisory/internal/manager"
	"github.com/pgadvisory/advisory/internal/pgsql"
	"github.com/pgadvisory/advisory/internal/session"
)

// A server stands in for PostgreSQL and its driver.
type server struct {
	answer func(ctx context.Context, conn int, query string) (rows int64, err error) // nil: one row
	dial   func() error                                                              // nil: a connection is made
	waits  func(query string)                                                        // is called when it is asked for waits; there are none

	opened, open atomic.Int32
}

// newDB returns a *sql.DB, and its server.
func newDB(t *testing.T) (*sql.DB, *server) {
	srv := new(server)
	db := sql.OpenDB(srv)
	t.Cleanup(func() { _ = db.Close() })
	return db, srv
}

func (srv *server) Driver() driver.Driver { return nil }

func (srv *server) Connect(context.Context) (driver.Conn, error) {
	if srv.dial != nil {
		if err := srv.dial(); err != nil {
			return nil, err
		}
	}
	srv.open.Add(1)
	return &conn{srv: srv, no: int(srv.opened.Add(1))}, nil
}

type conn struct {
	srv    *server
	no     int
	closed sync.Once
}

func (c *conn) ExecContext(ctx context.Context, query string, _ []driver.NamedValue) (driver.Result, error) {
	if c.srv.answer == nil {
		return driver.RowsAffected(1), nil
	}
	rows, err := c.srv.answer(ctx, c.no, query)
	return driver.RowsAffected(rows), err
}

func (c *conn) QueryContext(_ context.Context, query string, _ []driver.NamedValue) (driver.Rows, error) {
	if c.srv.waits != nil {
		c.srv.waits(query)
	}
	return noRows{}, nil
}

type noRows struct{}

func (noRows) Columns() []string         { return make([]string, 3) }
func (noRows) Close() error              { return nil }
func (noRows) Next([]driver.Value) error { return io.EOF }

func (c *conn) Close() error                        { c.closed.Do(func() { c.srv.open.Add(-1) }); return nil }
func (c *conn) Prepare(string) (driver.Stmt, error) { return nil, errors.New("prepared") }
func (c *conn) Begin() (driver.Tx, error)           { return nil, errors.New("no transactions") }

func isTry(query string) bool { return strings.Contains(query, "pg_try_advisory_lock") }
func isWait(query string) bool {
	return strings.Contains(query, ", pg_catalog.pg_advisory_lock")
}

// of tells whether a statement is about the lock of k.
func of(k pgsql.Key, query string) bool {
	return strings.Contains(query, "("+k.SQL()+")") || strings.Contains(query, "'advisory.key', '"+k.SQL()+"'")
}

// taken is a server on which another has the lock of k. Its waits are not granted, after slice.
func taken(k pgsql.Key, slice time.Duration) func(context.Context, int, string) (int64, error) {
	return func(_ context.Context, _ int, query string) (int64, error) {
		switch {
		case !of(k, query):
		case isWait(query):
			time.Sleep(slice)
			return 0, nil
		case isTry(query):
			return 0, nil
		}
		return 1, nil
	}
}

// A serverError is the server's, with that SQLSTATE.
type serverError string

func (e serverError) Error() string    { return "server error " + string(e) }
func (e serverError) SQLState() string { return string(e) }

func key(n int64) pgsql.Key { return pgsql.Key{Space: pgsql.Bigint, ID: n} }

// request is what a caller wants who wants the locks of keys.
func request(keys ...pgsql.Key) *manager.Request {
	return &manager.Request{Keys: keys, Log: slog.New(slog.DiscardHandler)}
}

// acquire acquires the locks of r.
func acquire(ctx context.Context, db *sql.DB, r *manager.Request) (*manager.Locks, error) {
	return acquireWatched(ctx, db, r, time.Minute)
}

// acquireWatched acquires the locks of r, with heartbeats.
func acquireWatched(ctx context.Context, db *sql.DB, r *manager.Request, heartbeat time.Duration) (*manager.Locks, error) {
	locks, err := manager.Acquire(ctx, watched(db, r, heartbeat))
	if err == nil {
		locks.Begin(func(error) {})
	}
	return locks, err
}

// watched completes r.
func watched(db *sql.DB, r *manager.Request, heartbeat time.Duration) *manager.Request {
	r.DB, r.Heartbeat, r.IdleTimeout = db, heartbeat, time.Hour
	return r
}

// take acquires the locks of keys, and fails the test if it cannot.
func take(t *testing.T, db *sql.DB, keys ...pgsql.Key) *manager.Locks {
	t.Helper()
	locks, err := acquire(t.Context(), db, request(keys...))
	if err != nil {
		t.Fatal(err)
	}
	return locks
}

// takeOnce takes the lock of k, and releases it.
func takeOnce(t *testing.T, db *sql.DB, k pgsql.Key) {
	t.Helper()
	locks, err := acquire(t.Context(), db, request(k))
	if err == nil {
		err = locks.Release()
	}
	wantError(t, err, nil)
}

// dedicated takes the lock of k on a session of its own.
func dedicated(ctx context.Context, db *sql.DB, k pgsql.Key) (*session.Session, func(), error) {
	r := request(k)
	r.DB = db
	return manager.Dedicated(ctx, r, session.ForConn, func(ctx context.Context, s *session.Session, since time.Time) error {
		return s.Lock(ctx, k, false, since)
	})
}

// wantState reports it if the Manager of db is not about so many queues and sessions; none of either
// is nothing at all.
func wantState(t *testing.T, db *sql.DB, queues, sessions int) {
	t.Helper()
	want := fmt.Sprintf("%d queues, %d sessions, ", queues, sessions)
	if got := manager.For(db).String(); queues+sessions == 0 && got != "" || !strings.HasPrefix(got+want, want) {
		t.Errorf("the Manager has %q, want %s", got, want)
	}
}

// wantError reports it if err does not match want.
func wantError(t *testing.T, err, want error) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Errorf("error: %v, want %v", err, want)
	}
}

// wantTook reports it if not exactly d has passed since start.
func wantTook(t *testing.T, start time.Time, d time.Duration) {
	t.Helper()
	if took := time.Since(start); took != d {
		t.Errorf("after %v, want %v", took, d)
	}
}
