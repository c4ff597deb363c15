package session_test

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"errors"
	"io"
	"log/slog"
	"net"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/pgadvisory/advisory/internal/pgsql"
	"github.com/pgadvisory/advisory/internal/session"
)

// A server stands in for PostgreSQL and its driver: it writes down what happens on each connection,
// and answers by a function.
type server struct {
	answer func(ctx context.Context, query string) (rows int64, err error) // nil: one row
	direct bool                                                            // the connections have pgx's shape
	dial   func(ctx context.Context) error                                 // nil: a connection is made

	mu     sync.Mutex
	log    []string // "<connection> <statement, or open, or close>"
	opened int
}

// newPool returns the pool of a server.
func newPool(t *testing.T) (session.Pool, *server) {
	srv := new(server)
	db := sql.OpenDB(srv)
	t.Cleanup(func() { _ = db.Close() })
	return session.Pool{DB: db, Facts: new(session.Facts)}, srv
}

// open returns a session of pool.
func open(t *testing.T, pool session.Pool, use session.Use) *session.Session {
	t.Helper()
	s, err := pool.Open(t.Context(), slog.New(slog.DiscardHandler), use)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func (srv *server) write(conn int, what string) {
	srv.mu.Lock()
	defer srv.mu.Unlock()
	srv.log = append(srv.log, strconv.Itoa(conn)+" "+what)
}

// want compares what has happened on the first connection, once it was open, with lines.
func (srv *server) want(t *testing.T, lines ...string) {
	t.Helper()
	want := []string{"1 open"}
	for _, l := range lines {
		want = append(want, "1 "+l)
	}
	srv.mu.Lock()
	defer srv.mu.Unlock()
	if diff := cmp.Diff(want, srv.log); diff != "" {
		t.Errorf("log of the server (-want +got):\n%s", diff)
	}
}

func (srv *server) Driver() driver.Driver { return nil }

func (srv *server) Connect(ctx context.Context) (driver.Conn, error) {
	if srv.dial != nil {
		if err := srv.dial(ctx); err != nil {
			return nil, err
		}
	}
	srv.mu.Lock()
	srv.opened++
	c := &conn{srv: srv, no: srv.opened}
	srv.mu.Unlock()
	srv.write(c.no, "open")
	if !srv.direct {
		return c, nil
	}
	c.net.ctx, c.net.end = context.WithCancel(context.Background())
	return &pgxConn{c}, nil
}

type conn struct {
	srv  *server
	no   int
	once sync.Once
	net  network
}

func (c *conn) ExecContext(ctx context.Context, query string, _ []driver.NamedValue) (driver.Result, error) {
	if c.srv.direct {
		ctx = c.net.ctx
	}
	c.srv.write(c.no, query)
	if c.srv.answer == nil {
		return driver.RowsAffected(1), nil
	}
	rows, err := c.srv.answer(ctx, query)
	return driver.RowsAffected(rows), err
}

func (c *conn) Close() error {
	c.once.Do(func() { c.srv.write(c.no, "close") })
	return nil
}

func (c *conn) Prepare(string) (driver.Stmt, error) { return nil, errors.New("prepared") }
func (c *conn) Begin() (driver.Tx, error)           { return nil, errors.New("no transactions") }

// A pgxConn has pgx's Conn().PgConn().Conn(), a net.Conn, whose deadline ends what is under way.
type (
	pgxConn  struct{ *conn }
	pgxInner struct{ c *conn }
	pgConn   struct{ c *conn }
	network  struct {
		net.Conn
		ctx context.Context
		end context.CancelFunc
	}
)

func (c *pgxConn) Conn() *pgxInner             { return &pgxInner{c.conn} }
func (i *pgxInner) PgConn() *pgConn            { return &pgConn{i.c} }
func (p *pgConn) Conn() net.Conn               { return &p.c.net }
func (n *network) SetDeadline(time.Time) error { n.end(); return nil }

// Answers.

// hangs never comes.
func hangs(ctx context.Context, _ string) (int64, error) {
	<-ctx.Done()
	return 0, ctx.Err()
}

// after comes after d, whatever becomes of ctx.
func after(d time.Duration) func(context.Context, string) (int64, error) {
	return func(context.Context, string) (int64, error) {
		time.Sleep(d)
		return 1, nil
	}
}

// gives is always the same.
func gives(rows int64, err error) func(context.Context, string) (int64, error) {
	return func(context.Context, string) (int64, error) { return rows, err }
}

// first comes to the first statement, and one row to the others.
func first(answer func(context.Context, string) (int64, error)) func(context.Context, string) (int64, error) {
	var once sync.Once
	return func(ctx context.Context, query string) (rows int64, err error) {
		rows = 1
		once.Do(func() { rows, err = answer(ctx, query) })
		return rows, err
	}
}

// A serverError is one of the server's own.
type serverError string

func (e serverError) Error() string    { return "server error " + string(e) }
func (e serverError) SQLState() string { return string(e) }

var died = io.ErrUnexpectedEOF

var key = pgsql.Key{Space: pgsql.Bigint, ID: 42}

var (
	try    = pgsql.Try([]pgsql.Key{key}, false)
	unlock = pgsql.Unlock([]pgsql.Key{key}, false)
)

// wantTook reports it if not exactly d has passed since start.
func wantTook(t *testing.T, start time.Time, d time.Duration) {
	t.Helper()
	if took := time.Since(start); took != d {
		t.Errorf("after %v, want %v", took, d)
	}
}

// wantError reports it if err does not match want.
func wantError(t *testing.T, err, want error) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Errorf("error: %v, want %v", err, want)
	}
}

// wantPanic reports it if f does not panic with "mine".
func wantPanic(t *testing.T, f func()) {
	t.Helper()
	defer func() {
		t.Helper()
		if r := recover(); r != "mine" {
			t.Errorf("recovered %v", r)
		}
	}()
	f()
}
