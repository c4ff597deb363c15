package advisorygocron_test

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"strings"
	"sync"
	"testing"
	"time"
)

// A server is as much of PostgreSQL as the tests need: one lock, whatever its key, and bounded waits for it.
type server struct {
	mu     sync.Mutex
	holder *conn
	sent   int
	away   error // why nobody can connect
	gone   *conn // its session has ended
}

func (s *server) pool(tb testing.TB) *sql.DB {
	db := sql.OpenDB(s)
	tb.Cleanup(func() { db.Close() })
	return db
}

// take has another program take the lock.
func (s *server) take() (release func()) {
	other := new(conn)
	s.set(other)
	return func() { s.set(nil) }
}

func (s *server) set(holder *conn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.holder = holder
}

// kill ends the session of the holder.
func (s *server) kill() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.gone, s.holder = s.holder, nil
}

func (s *server) held() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.holder != nil
}

func (s *server) statements() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.sent
}

func (s *server) Driver() driver.Driver { return nil }

func (s *server) Connect(context.Context) (driver.Conn, error) {
	if s.away != nil {
		return nil, s.away
	}
	return &conn{s}, nil
}

type conn struct{ *server }

func (c *conn) Prepare(string) (driver.Stmt, error) { return nil, driver.ErrSkip }
func (c *conn) Begin() (driver.Tx, error)           { return nil, driver.ErrSkip }

func (c *conn) Close() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.free()
	return nil
}

func (c *conn) free() {
	if c.holder == c {
		c.holder = nil
	}
}

func (c *conn) ExecContext(_ context.Context, query string, _ []driver.NamedValue) (driver.Result, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.sent++
	switch {
	case c == c.gone:
		return nil, driver.ErrBadConn
	case strings.Contains(query, "DO $advisory$"):
		for range 20 { // as long as a bounded wait is
			if c.holder == nil {
				break
			}
			c.mu.Unlock()
			time.Sleep(time.Millisecond)
			c.mu.Lock()
		}
		fallthrough
	case strings.Contains(query, "pg_try_advisory_lock"):
		if c.holder != nil {
			return driver.RowsAffected(0), nil
		}
		c.holder = c
	case strings.Contains(query, "pg_advisory_unlock"):
		c.free()
	}
	return driver.RowsAffected(1), nil
}
