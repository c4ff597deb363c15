package advisoryotel_test

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"io"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// A server is as much of PostgreSQL as the tests need: exclusive locks, bounded waits for
// them, and a way to fail.
type server struct {
	mu       sync.Mutex
	holders  map[string]*conn // by key
	failWith error            // of the next lock statement
}

func newServer() *server { return &server{holders: map[string]*conn{}} }

func (s *server) pool(tb testing.TB) *sql.DB {
	db := sql.OpenDB(s)
	tb.Cleanup(func() { db.Close() })
	return db
}

// fail has the next lock statement fail with err.
func (s *server) fail(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.failWith = err
}

// kill ends the session that holds key.
func (s *server) kill(key string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	c := s.holders[key]
	c.dead = true
	c.freeAll()
}

func (s *server) Driver() driver.Driver { return nil }

func (s *server) Connect(context.Context) (driver.Conn, error) { return &conn{server: s}, nil }

// An sqlError is what the errors of pgx and pq have in common.
type sqlError string

func (e sqlError) Error() string    { return "ERROR: (SQLSTATE " + string(e) + ")" }
func (e sqlError) SQLState() string { return string(e) }

type conn struct {
	*server
	dead bool
}

func (c *conn) Prepare(string) (driver.Stmt, error) { return nil, driver.ErrSkip }
func (c *conn) Begin() (driver.Tx, error)           { return c, nil }
func (c *conn) Commit() error                       { return c.Close() }
func (c *conn) Rollback() error                     { return c.Close() }

func (c *conn) BeginTx(context.Context, driver.TxOptions) (driver.Tx, error) { return c, nil }

// Close frees what the session, or the transaction, holds.
func (c *conn) Close() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.freeAll()
	return nil
}

func (c *conn) freeAll() {
	for k, holder := range c.holders {
		if holder == c {
			delete(c.holders, k)
		}
	}
}

var lockCall = regexp.MustCompile(`(?:lock|lock_shared)\(([-0-9, ]+)\)`)

func (c *conn) ExecContext(ctx context.Context, query string, _ []driver.NamedValue) (driver.Result, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.dead {
		return nil, sqlError("57P01")
	}
	var keys []string
	for _, m := range lockCall.FindAllStringSubmatch(query, -1) {
		keys = append(keys, m[1])
	}
	if err := c.failWith; err != nil && len(keys) > 0 {
		c.failWith = nil
		return nil, err
	}
	taken := func(k string) bool { return c.holders[k] != nil && c.holders[k] != c }
	switch {
	case strings.Contains(query, "pg_try_advisory"):
		if slices.ContainsFunc(keys, taken) {
			return driver.RowsAffected(0), nil
		}
	case strings.Contains(query, "pg_advisory_unlock"):
		c.freeAll() // no test holds two locks on one session and keeps one
		return driver.RowsAffected(1), nil
	case strings.Contains(query, "pg_locks"): // a heartbeat
		n := 0
		for _, holder := range c.holders {
			if holder == c {
				n++
			}
		}
		return driver.RowsAffected(n), nil
	default: // a wait
		const lockTimeout = 20 * time.Millisecond
		for end := time.Now().Add(lockTimeout); slices.ContainsFunc(keys, taken); {
			c.mu.Unlock()
			time.Sleep(time.Millisecond)
			c.mu.Lock()
			if ctx.Err() != nil {
				return nil, ctx.Err()
			}
			if time.Now().After(end) {
				return nil, sqlError("55P03")
			}
		}
	}
	for _, k := range keys {
		c.holders[k] = c
	}
	return driver.RowsAffected(1), nil
}

// QueryContext answers Holders, which nobody asks for an answer here.
func (c *conn) QueryContext(context.Context, string, []driver.NamedValue) (driver.Rows, error) {
	return noRows{}, nil
}

type noRows struct{}

func (noRows) Columns() []string         { return make([]string, 10) }
func (noRows) Close() error              { return nil }
func (noRows) Next([]driver.Value) error { return io.EOF }
