package advisory

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"errors"
	"fmt"
	"io"
	"net"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/pgadvisory/advisory/internal/pgsql"
)

// A server stands in for PostgreSQL and its driver: it writes down what happens on
// each connection, and answers from a script.
type server struct {
	// script answers a statement: with a number of rows, or for the token with the
	// number itself. It may block, and need not honour ctx. nil: always one row.
	script func(ctx context.Context, conn int, query string) (int64, error)
	// rows answers a query with arguments. nil: no row.
	rows func(conn int, args []driver.NamedValue) ([][]driver.Value, error)
	// batch answers the prepared statement. nil: ones. It may block, like script.
	batch func(ctx context.Context, conn int, ops, keys string) (string, error)
	// ended is told that a connection has been closed. It may be nil.
	ended func(conn int)
	// dial makes a connection. nil: always.
	dial func(ctx context.Context) error

	// reset is asked before a connection of the pool is used again. nil: it is well.
	reset func(ctx context.Context, conn int) error

	// direct: the driver's connections have pgx's shape, so that the package breaks off a
	// statement by the deadline of the network's connection. Contexts are not looked at.
	direct bool

	// leftOpen is what the driver says of a statement while rows are open. nil: none are.
	leftOpen error

	// checkless: the server does not make the setting of checkCall.
	checkless bool

	mu     sync.Mutex
	log    []string
	raw    []string // the log with the setting of checkCall, and pgsql.LeftOpen
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

// newServer returns a server that gives replies in order, and one row ever after; without any, it
// grants everything.
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
	line := fmt.Sprintf(format, args...)
	s.raw = append(s.raw, plainly(line))
	if !strings.HasSuffix(line, " "+pgsql.LeftOpen) {
		s.log = append(s.log, unchecked(plainly(line)))
	}
}

// unchecked is a statement without the setting of checkCall, but for which it is as if there were no
// such thing: the tests of that setting look at what was really sent.
func unchecked(query string) string {
	for _, c := range []struct{ old, new string }{
		{pgsql.Settings{Check: true}.SetCheck(), ""},
		{"SELECT " + checkCall(false) + " WHERE", "SELECT WHERE"},
		{", " + checkCall(false), ""},
		{", " + checkCall(true), ""},
		{"RESET client_connection_check_interval; ", ""},
	} {
		query = strings.Replace(query, c.old, c.new, 1)
	}
	return query
}

var (
	nonces = regexp.MustCompile(`('advisory\.(?:session|nonce)', |'advisory\.session', true\) OPERATOR\(pg_catalog\.=\) )'[0-9a-z]+'`)
	bounds = regexp.MustCompile(`LEAST\(\d+,`)
)

// edges are what a comment tells other processes of whom a wait waits for.
var edges = regexp.MustCompile(`(/\* advisory: [^|*]*) \|[^*]*`)

// plainly is a statement without what differs from one time to the next: its nonce, and how long it waits.
func plainly(query string) string {
	return edges.ReplaceAllString(bounds.ReplaceAllString(nonces.ReplaceAllString(query, "${1}'N'"), "LEAST(100,"), "$1 ")
}

// panicOnReset has the driver panic when the next connection that lies ready is to be used again.
func (s *server) panicOnReset() {
	panics := true
	s.reset = func(context.Context, int) error {
		if panics {
			panics = false
			panic("driver")
		}
		return nil
	}
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

// wantConns reports it if not so many connections are open, of so many that were opened.
func (s *server) wantConns(t testing.TB, open, opened int) {
	t.Helper()
	if s.open() != open || s.opened != opened {
		t.Errorf("%d connections of %d are open, want %d of %d", s.open(), s.opened, open, opened)
	}
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
	if s.direct {
		c.net.ctx, c.net.end = context.WithCancel(context.Background())
		return pgxConn{c}.pointer(), nil
	}
	return c, nil
}

type fakeConn struct {
	s      *server
	no     int
	closed bool // guarded by s.mu
	net    fakeNet
}

func (c *fakeConn) send(ctx context.Context, query string) (int64, error) {
	ctx, err := c.begin(ctx, query)
	if err != nil {
		return 0, err
	}
	if query == pgsql.LeftOpen {
		return 0, c.s.leftOpen
	}
	if c.s.checkless && strings.Contains(query, "set_config('client_connection_check_interval'") {
		return 0, checkRefused{}
	}
	if c.s.script == nil {
		// Yes; and so many rows as locks are tried together.
		return max(1, int64(strings.Count(query, "WHEN NOT pg_catalog.pg_try_"))), nil
	}
	return c.s.script(ctx, c.no, unchecked(query))
}

// checkRefused is what a server on Windows says.
type checkRefused struct{}

func (checkRefused) Error() string {
	return `invalid value for parameter "client_connection_check_interval": 1000`
}

func (checkRefused) SQLState() string { return "22023" }

// begin begins a statement.
func (c *fakeConn) begin(ctx context.Context, line string) (context.Context, error) {
	c.s.mu.Lock()
	closed := c.closed
	c.s.mu.Unlock()
	switch {
	case closed && line == "ROLLBACK":
		return nil, driver.ErrBadConn // database/sql ends its transaction, in its own time
	case closed:
		c.s.write("%d after close: %s", c.no, line)
		return nil, driver.ErrBadConn
	}
	if c.s.direct {
		if ctx = c.net.ctx; ctx.Err() != nil {
			return nil, driver.ErrBadConn
		}
	}
	c.s.write("%d %s", c.no, line)
	return ctx, nil
}

// Close closes once, like the drivers' own: it may be called twice.
func (c *fakeConn) Close() error {
	c.s.mu.Lock()
	defer c.s.mu.Unlock()
	if !c.closed {
		c.closed = true
		c.s.closed++
		c.s.log = append(c.s.log, fmt.Sprintf("%d close", c.no))
		if c.s.ended != nil {
			c.s.ended(c.no)
		}
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
	return nil, errors.New("prepared without a context: " + query)
}

// PrepareContext is for the statement that serves many requests: in the log it is
// "prepare", "batch <operations> <keys>" and "deallocate".
func (c *fakeConn) PrepareContext(ctx context.Context, query string) (driver.Stmt, error) {
	if query != pgsql.Batch {
		return nil, errors.New("prepared: " + query)
	}
	if _, err := c.send(ctx, "prepare"); err != nil {
		return nil, err
	}
	return fakeStmt{c}, nil
}

type fakeStmt struct{ c *fakeConn }

func (fakeStmt) NumInput() int { return 2 }

func (fakeStmt) Exec([]driver.Value) (driver.Result, error) { return nil, errors.New("executed") }

func (fakeStmt) Query([]driver.Value) (driver.Rows, error) {
	return nil, errors.New("without a context")
}

func (s fakeStmt) Close() error {
	_, err := s.c.send(context.Background(), "deallocate")
	return err
}

func (s fakeStmt) QueryContext(ctx context.Context, args []driver.NamedValue) (driver.Rows, error) {
	ops, keys := args[0].Value.(string), args[1].Value.(string)
	ctx, err := s.c.begin(ctx, "batch "+ops+" "+keys)
	if err != nil {
		return nil, err
	}
	answer := strings.Repeat("1", 1+strings.Count(ops, ","))
	if s.c.s.batch != nil {
		if answer, err = s.c.s.batch(ctx, s.c.no, ops, keys); err != nil {
			return nil, err
		}
	}
	return &fakeRows{[][]driver.Value{{answer}}}, nil
}

// A pgxConn has pgx's Conn().PgConn().Conn(), a net.Conn.
type pgxConn struct{ *fakeConn }

func (c pgxConn) pointer() *pgxConn { return &c }

func (c *pgxConn) Conn() *pgxInner { return &pgxInner{c.fakeConn} }

type pgxInner struct{ c *fakeConn }

func (i *pgxInner) PgConn() *pgConn { return (*pgConn)(i) }

type pgConn pgxInner

func (p *pgConn) Conn() net.Conn { return &p.c.net }

func (p *pgConn) IsBusy() bool { return p.c.s.leftOpen != nil }

// A fakeNet ends what is under way on it, and everything after, with its deadline.
type fakeNet struct {
	net.Conn
	ctx context.Context
	end context.CancelFunc
}

func (n *fakeNet) SetDeadline(at time.Time) error {
	if !at.Before(time.Now()) {
		return errors.New("not a deadline that is over")
	}
	n.end()
	return nil
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

func (t fakeTx) Commit() error { return t.end("COMMIT") }

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

func (e pgError) Error() string { return "server error " + string(e) }

func (e pgError) SQLState() string { return string(e) }
