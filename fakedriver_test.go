package advisory

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// A server stands in for PostgreSQL and its driver: it writes down what happens on
// each connection, and answers from a script.
type server struct {
	// script answers a statement: with a number of rows, or for the token with the
	// number itself. It may block, and need not honour ctx. nil: always one row.
	script func(ctx context.Context, conn int, query string) (int64, error)
	// rows answers a query with arguments. nil: no row.
	rows func(conn int, args []driver.NamedValue) ([][]driver.Value, error)
	// dial makes a connection. nil: always.
	dial func(ctx context.Context) error

	// reset is asked before a connection of the pool is used again. nil: it is well.
	reset func(ctx context.Context, conn int) error

	mu     sync.Mutex
	log    []string
	opened int
	closed int
}

// A reply answers one statement, whatever it is.
type reply struct {
	rows int64
	err  error
}

var (
	granted = reply{rows: 1}
	refused = reply{rows: 0}
	done    = granted
)

func fails(err error) reply { return reply{err: err} }

// newServer returns a server that gives replies in order, and one row ever after.
func newServer(t testing.TB, replies ...reply) (*sql.DB, *server) {
	s := &server{}
	if len(replies) > 0 {
		s.script = inOrder(replies...)
	}
	db := sql.OpenDB(s)
	t.Cleanup(func() {
		if err := db.Close(); err != nil {
			t.Error(err)
		}
	})
	return db, s
}

func inOrder(replies ...reply) func(context.Context, int, string) (int64, error) {
	var mu sync.Mutex
	return func(context.Context, int, string) (int64, error) {
		mu.Lock()
		defer mu.Unlock()
		if len(replies) == 0 {
			return 1, nil
		}
		r := replies[0]
		replies = replies[1:]
		return r.rows, r.err
	}
}

func (s *server) write(format string, args ...any) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.log = append(s.log, fmt.Sprintf(format, args...))
}

// lines is the log: "<connection> <statement, or open, or close>".
func (s *server) lines() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.log)
}

// open is the number of connections that are open.
func (s *server) open() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.opened - s.closed
}

// want compares the whole log with lines.
func (s *server) want(t testing.TB, lines ...string) {
	t.Helper()
	if diff := cmp.Diff(lines, s.lines()); diff != "" {
		t.Errorf("log of the server (-want +got):\n%s", diff)
	}
}

// on is statements as they stand in the log of connection number conn.
func on(conn int, statements ...string) []string {
	lines := make([]string, len(statements))
	for i, s := range statements {
		lines[i] = strconv.Itoa(conn) + " " + s
	}
	return lines
}

func (s *server) Driver() driver.Driver { return nil }

func (s *server) Connect(ctx context.Context) (driver.Conn, error) {
	if s.dial != nil {
		if err := s.dial(ctx); err != nil {
			return nil, err
		}
	}
	s.mu.Lock()
	s.opened++
	c := &fakeConn{s: s, no: s.opened}
	s.mu.Unlock()
	s.write("%d open", c.no)
	return c, nil
}

type fakeConn struct {
	s      *server
	no     int
	closed bool // guarded by s.mu
}

func (c *fakeConn) send(ctx context.Context, query string) (int64, error) {
	c.s.mu.Lock()
	closed := c.closed
	c.s.mu.Unlock()
	switch {
	case closed && query == "ROLLBACK":
		return 0, driver.ErrBadConn // database/sql ends its transaction, in its own time
	case closed:
		c.s.write("%d after close: %s", c.no, query)
		return 0, driver.ErrBadConn
	}
	c.s.write("%d %s", c.no, query)
	if c.s.script == nil {
		return 1, nil
	}
	return c.s.script(ctx, c.no, query)
}

// Close closes once, like the drivers' own: it may be called twice.
func (c *fakeConn) Close() error {
	c.s.mu.Lock()
	defer c.s.mu.Unlock()
	if !c.closed {
		c.closed = true
		c.s.closed++
		c.s.log = append(c.s.log, fmt.Sprintf("%d close", c.no))
	}
	return nil
}

func (c *fakeConn) ResetSession(ctx context.Context) error {
	if c.s.reset == nil {
		return nil
	}
	return c.s.reset(ctx, c.no)
}

func (c *fakeConn) Prepare(query string) (driver.Stmt, error) {
	return nil, errors.New("prepared: " + query)
}

func (c *fakeConn) ExecContext(ctx context.Context, query string, args []driver.NamedValue) (driver.Result, error) {
	if len(args) > 0 {
		return nil, errors.New("arguments: " + query)
	}
	n, err := c.send(ctx, query)
	if err != nil {
		return nil, err
	}
	return driver.RowsAffected(n), nil
}

func (c *fakeConn) QueryContext(ctx context.Context, query string, args []driver.NamedValue) (driver.Rows, error) {
	if len(args) > 0 {
		c.s.write("%d %s", c.no, query)
		if c.s.rows == nil {
			return &fakeRows{}, nil
		}
		rows, err := c.s.rows(c.no, args)
		if err != nil {
			return nil, err
		}
		return &fakeRows{rows}, nil
	}
	n, err := c.send(ctx, query)
	if err != nil {
		return nil, err
	}
	return &fakeRows{[][]driver.Value{{strconv.FormatInt(n, 10)}}}, nil
}

func (c *fakeConn) Begin() (driver.Tx, error) { return nil, errors.New("BEGIN without options") }

func (c *fakeConn) BeginTx(ctx context.Context, o driver.TxOptions) (driver.Tx, error) {
	query := "BEGIN"
	if level := sql.IsolationLevel(o.Isolation); level != sql.LevelDefault {
		query += " " + strings.ToUpper(level.String())
	}
	if o.ReadOnly {
		query += " READ ONLY"
	}
	if _, err := c.send(ctx, query); err != nil {
		return nil, err
	}
	return fakeTx{c}, nil
}

type fakeTx struct{ c *fakeConn }

func (t fakeTx) Commit() error   { return t.end("COMMIT") }
func (t fakeTx) Rollback() error { return t.end("ROLLBACK") }

func (t fakeTx) end(query string) error {
	_, err := t.c.send(context.Background(), query)
	return err
}

type fakeRows struct{ rows [][]driver.Value }

func (r *fakeRows) Close() error { return nil }

func (r *fakeRows) Columns() []string {
	if len(r.rows) == 0 {
		return nil
	}
	return make([]string, len(r.rows[0]))
}

func (r *fakeRows) Next(dest []driver.Value) error {
	if len(r.rows) == 0 {
		return io.EOF
	}
	copy(dest, r.rows[0])
	r.rows = r.rows[1:]
	return nil
}

// A pgError is a server's error as every driver gives it: something with a SQLSTATE.
type pgError string

func (e pgError) Error() string    { return "server error " + string(e) }
func (e pgError) SQLState() string { return string(e) }
