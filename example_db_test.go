package advisory_test

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"io"
	"strings"
	"sync"
	"time"
)

// db stands for a pool on PostgreSQL, so that the examples run without one: a server
// of one lock, and one answer to every question. In a program, db is what sql.Open
// returned.
var db = sql.OpenDB(&exampleServer{})

// takenDB is one whose lock another program holds.
var takenDB = sql.OpenDB(&exampleServer{holder: new(exampleConn)})

// firstDB and lateDB are the pools of two replicas of a program.
var firstDB, lateDB = func() (*sql.DB, *sql.DB) {
	server := &exampleServer{}
	return sql.OpenDB(server), sql.OpenDB(server)
}()

var ctx = context.Background()

type exampleServer struct {
	mu     sync.Mutex
	holder *exampleConn
}

func (s *exampleServer) Driver() driver.Driver { return nil }

func (s *exampleServer) Connect(context.Context) (driver.Conn, error) {
	return &exampleConn{s}, nil
}

type exampleConn struct{ server *exampleServer }

func (c *exampleConn) Prepare(string) (driver.Stmt, error) { return nil, driver.ErrSkip }
func (c *exampleConn) Close() error                        { return nil }
func (c *exampleConn) Begin() (driver.Tx, error)           { return c, nil }
func (c *exampleConn) Commit() error                       { return nil }
func (c *exampleConn) Rollback() error                     { return nil }

func (c *exampleConn) BeginTx(context.Context, driver.TxOptions) (driver.Tx, error) { return c, nil }

func (c *exampleConn) ExecContext(_ context.Context, query string, _ []driver.NamedValue) (driver.Result, error) {
	c.server.mu.Lock()
	defer c.server.mu.Unlock()
	switch {
	case strings.Contains(query, "pg_try_advisory_lock"):
		if c.server.holder != nil {
			return driver.RowsAffected(0), nil
		}
		c.server.holder = c
		return driver.RowsAffected(max(1, strings.Count(query, "WHEN NOT"))), nil
	case strings.Contains(query, "DO $advisory$"): // waits, and is never granted
		time.Sleep(20 * time.Millisecond)
		return driver.RowsAffected(0), nil
	case strings.Contains(query, "pg_advisory_unlock") && c.server.holder == c:
		c.server.holder = nil
	}
	return driver.RowsAffected(1), nil
}

func (c *exampleConn) QueryContext(_ context.Context, query string, _ []driver.NamedValue) (driver.Rows, error) {
	holder := []driver.Value{int64(4711), true, false, "app", "billing", "10.0.0.7", "idle", "/* advisory: nightly-report */ SELECT", time.Now(), nil}
	switch {
	case strings.Contains(query, "l.objsubid, "): // Locks
		return &exampleRows{values: append([]driver.Value{int64(0x6743ba10), int64(0xa2b2c487), int64(1)}, holder...)}, nil
	case strings.Contains(query, "pg_stat_activity"): // Holders
		return &exampleRows{values: holder}, nil
	}
	return &exampleRows{values: []driver.Value{"4711"}}, nil // Token
}

// exampleRows is one row.
type exampleRows struct {
	values []driver.Value
	read   bool
}

func (r *exampleRows) Columns() []string { return make([]string, len(r.values)) }
func (r *exampleRows) Close() error      { return nil }

func (r *exampleRows) Next(dest []driver.Value) error {
	if r.read {
		return io.EOF
	}
	r.read = true
	copy(dest, r.values)
	return nil
}
