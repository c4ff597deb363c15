package lockconn_test

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"errors"
	"io"
	"log/slog"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/pgadvisory/advisory/internal/lockconn"
	"github.com/pgadvisory/advisory/internal/pgsql"
	"github.com/pgadvisory/advisory/internal/session"
)

// A server stands in for PostgreSQL and its driver. It answers every statement with one row, and the
// prepared one with ones, and writes down what happens on its only connection.
type server struct {
	answer func(ctx context.Context, query string) (rows int64, err error) // nil: one row
	batch  func(ops, keys string) (string, error)                          // nil: ones
	rtt    time.Duration                                                   // how long a statement takes
	caches bool                                                            // the driver looks like pgx, and keeps statements prepared

	mu    sync.Mutex
	log   []string    // statements, and "prepare", "batch <operations> <keys>", "deallocate", "close"
	beats []time.Time // when the heartbeats came
}

func (srv *server) write(what string) {
	srv.mu.Lock()
	defer srv.mu.Unlock()
	srv.log = append(srv.log, what)
	if isBeat(what) {
		srv.beats = append(srv.beats, time.Now())
	}
}

// beatsSince returns how long after start each heartbeat came.
func (srv *server) beatsSince(start time.Time) (after []time.Duration) {
	srv.mu.Lock()
	defer srv.mu.Unlock()
	for _, at := range srv.beats {
		after = append(after, at.Sub(start))
	}
	return after
}

// lines is the log.
func (srv *server) lines() []string {
	srv.mu.Lock()
	defer srv.mu.Unlock()
	return slices.Clone(srv.log)
}

// clear forgets the log.
func (srv *server) clear() {
	srv.mu.Lock()
	defer srv.mu.Unlock()
	srv.log = nil
}

// want compares the log with lines.
func (srv *server) want(t *testing.T, lines ...string) {
	t.Helper()
	if diff := cmp.Diff(lines, srv.lines()); diff != "" {
		t.Errorf("log of the server (-want +got):\n%s", diff)
	}
}

func (srv *server) send(ctx context.Context, query string) (int64, error) {
	srv.write(query)
	time.Sleep(srv.rtt)
	if srv.answer == nil {
		return 1, nil
	}
	return srv.answer(ctx, query)
}

func (srv *server) Driver() driver.Driver { return nil }

func (srv *server) Connect(context.Context) (driver.Conn, error) {
	if srv.caches {
		return &pgxConn{&conn{srv: srv}}, nil
	}
	return &conn{srv: srv}, nil
}

// A pgxConn has what pgx's connection is known by.
type (
	pgxConn   struct{ *conn }
	pgxInner  struct{}
	pgConn    struct{}
	pgxConfig struct {
		DefaultQueryExecMode   mode
		StatementCacheCapacity int
	}
	mode int
)

func (*pgxConn) Conn() *pgxInner      { return nil }
func (*pgxInner) PgConn() *pgConn     { return nil }
func (*pgxInner) Config() *pgxConfig  { return &pgxConfig{StatementCacheCapacity: 512} }
func (*pgConn) Conn() (none net.Conn) { return none }
func (mode) String() string           { return "cache statement" }

type conn struct {
	srv    *server
	closed sync.Once
}

func (c *conn) ExecContext(ctx context.Context, query string, _ []driver.NamedValue) (driver.Result, error) {
	rows, err := c.srv.send(ctx, query)
	return driver.RowsAffected(rows), err
}

func (c *conn) PrepareContext(ctx context.Context, _ string) (driver.Stmt, error) {
	_, err := c.srv.send(ctx, "prepare")
	return stmt{c.srv}, err
}

func (c *conn) Close() error                        { c.closed.Do(func() { c.srv.write("close") }); return nil }
func (c *conn) Prepare(string) (driver.Stmt, error) { return nil, errors.New("without a context") }
func (c *conn) Begin() (driver.Tx, error)           { return nil, errors.New("no transactions") }

type stmt struct{ srv *server }

func (s stmt) QueryContext(_ context.Context, args []driver.NamedValue) (driver.Rows, error) {
	ops, keys := args[0].Value.(string), args[1].Value.(string)
	s.srv.write("batch " + ops + " " + keys)
	time.Sleep(s.srv.rtt)
	if s.srv.batch == nil {
		return &row{answer: strings.Repeat("1", 1+strings.Count(ops, ","))}, nil
	}
	answer, err := s.srv.batch(ops, keys)
	return &row{answer: answer}, err
}

func (s stmt) Close() error                             { _, err := s.srv.send(context.Background(), "deallocate"); return err }
func (stmt) NumInput() int                              { return 2 }
func (stmt) Exec([]driver.Value) (driver.Result, error) { return nil, errors.New("executed") }
func (stmt) Query([]driver.Value) (driver.Rows, error)  { return nil, errors.New("without a context") }

type row struct {
	answer string
	done   bool
}

func (*row) Columns() []string { return []string{"answer"} }
func (*row) Close() error      { return nil }

func (r *row) Next(dest []driver.Value) error {
	if r.done {
		return io.EOF
	}
	dest[0], r.done = r.answer, true
	return nil
}

// A serverError is one of the server's own.
type serverError string

func (e serverError) Error() string    { return "server error " + string(e) }
func (e serverError) SQLState() string { return string(e) }

// A fixture is a Conn, whose test has use for it, and what is about it.
type fixture struct {
	*lockconn.Conn
	s    *session.Session
	db   *sql.DB
	srv  *server
	lost chan error // why it was lost, when onLost was called
}

// newConn returns a Conn. If idleTimeout is not 0, it holds the lock of id(0), and the server has been
// told to watch it.
func newConn(t *testing.T, idleTimeout time.Duration) *fixture {
	t.Helper()
	return newConnOn(t, new(server), idleTimeout)
}

func newConnOn(t *testing.T, srv *server, idleTimeout time.Duration) *fixture {
	t.Helper()
	f := &fixture{srv: srv, lost: make(chan error, 1)}
	f.db = sql.OpenDB(f.srv)
	t.Cleanup(func() {
		time.Sleep(time.Minute) // until what is discarded has been closed
		_ = f.db.Close()
	})
	pool := session.Pool{DB: f.db, Facts: new(session.Facts)}
	var err error
	if f.s, err = pool.Open(t.Context(), slog.New(slog.DiscardHandler), session.ForLocks); err != nil {
		t.Fatal(err)
	}
	var keys []pgsql.Key
	if idleTimeout > 0 {
		keys = id(0)
		f.s.SetIdleTimeout(idleTimeout)
		wantError(t, f.s.Lock(t.Context(), keys[0], false, time.Now()), nil)
		f.srv.clear()
	}
	f.Conn = lockconn.New(f.s, slog.New(slog.DiscardHandler), keys, false, func(c *lockconn.Conn) { f.lost <- c.Lost() })
	return f
}

// ask has a request served.
func (f *fixture) ask(ctx context.Context, op lockconn.Op, keys ...pgsql.Key) (ok bool, err error) {
	r := &lockconn.Request{Op: op, Keys: keys}
	err = f.Ask(ctx, r)
	return err == nil && r.OK, err // r may be under way still
}

// must has a request served that is not to fail.
func (f *fixture) must(t *testing.T, op lockconn.Op, keys ...pgsql.Key) {
	t.Helper()
	if ok, err := f.ask(t.Context(), op, keys...); !ok || err != nil {
		t.Errorf("%d %v: %v, %v", op, keys, ok, err)
	}
}

// wantHandedBack reports it if the connection is not idle in the pool.
func (f *fixture) wantHandedBack(t *testing.T) {
	t.Helper()
	if stats := f.db.Stats(); stats.Idle != 1 || stats.InUse != 0 {
		t.Errorf("%d connections idle, %d in use", stats.Idle, stats.InUse)
	}
}

// id is the key of number n, alone.
func id(n int64) []pgsql.Key { return []pgsql.Key{{Space: pgsql.Bigint, ID: n}} }

func try(n int64) string    { return pgsql.Try(id(n), false) }
func unlock(n int64) string { return pgsql.Unlock(id(n), false) }

// isBeat tells whether a statement is a heartbeat.
func isBeat(query string) bool { return strings.HasPrefix(query, "/* advisory") }

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
