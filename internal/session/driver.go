package session

import (
	"cmp"
	"context"
	"database/sql"
	"database/sql/driver"
	"fmt"
	"io"
	"math"
	"net"
	"reflect"
	"strconv"
	"strings"
	"time"

	"github.com/pgadvisory/advisory/internal/pgsql"
)

// raw is Conn.Raw, which panics if database/sql closes the Conn at the wrong moment, as it does
// by itself when the context of a transaction ends: it looks whether the Conn is closed, and then
// takes its connection, without a lock around the two.
func raw(conn *sql.Conn, f func(dc any) error) (err error) {
	called := false
	defer func() {
		if !called && recover() != nil {
			err = sql.ErrConnDone
		}
	}()
	return conn.Raw(func(dc any) error {
		called = true
		return f(dc)
	})
}

// send executes query over the driver's connection itself. When that is found dead, Conn.ExecContext
// closes the Conn, and first waits, for ever, for its transactions and rows to be closed, which may be
// the caller's, or fn's to have left open.
func (s *Session) send(ctx context.Context, to path, query string, args []int64) (rows int64, err error) {
	rawErr := raw(s.conn, func(dc any) error {
		if s.cond.Load() == abandoned { // while database/sql's own lock was waited for
			return abandonedError{}
		}
		rows, err = execOn(ctx, to(dc), query, args...)
		return nil
	})
	return rows, cmp.Or(rawErr, err)
}

// execOn executes query on a driver's connection, and returns the number of rows in its command
// tag.
func execOn(ctx context.Context, dc any, query string, args ...int64) (int64, error) {
	execer, ok := dc.(driver.ExecerContext)
	if !ok {
		return 0, noExec(dc)
	}
	var values []driver.NamedValue
	for i, arg := range args {
		values = append(values, driver.NamedValue{Ordinal: i + 1, Value: arg})
	}
	rows, err := rowsAffected(execer.ExecContext(ctx, query, values))
	if err == driver.ErrSkip { // of a wrapper around a connection that cannot
		return 0, noExec(dc)
	}
	return rows, err
}

func noExec(dc any) error {
	return fmt.Errorf("the driver's connection, a %T, does not execute statements without preparing them (driver.ExecerContext)", dc)
}

// waitsOn executes query, a pgsql.Waits, on a driver's connection: database/sql's Query would close a dead
// connection, and wait for its transaction first, for ever.
func waitsOn(ctx context.Context, dc any, query string) (all []Statement, err error) {
	queryer, ok := dc.(driver.QueryerContext)
	if !ok {
		return nil, noExec(dc)
	}
	rows, err := queryer.QueryContext(ctx, query, unprepared(dc))
	if err != nil {
		return nil, err
	}
	defer func() { err = cmp.Or(err, rows.Close()) }()
	for {
		var row [3]driver.Value
		if err := rows.Next(row[:]); err == io.EOF {
			return all, nil
		} else if err != nil {
			return nil, err
		}
		var text [3]string
		for i, v := range row {
			if b, ok := v.([]byte); ok {
				v = string(b)
			}
			text[i] = fmt.Sprint(v)
		}
		pid, err := strconv.Atoi(text[0])
		if err != nil {
			return nil, err
		}
		all = append(all, Statement{PID: pid, ApplicationName: text[1], Query: text[2]})
	}
}

func rowsAffected(result driver.Result, err error) (int64, error) {
	if err != nil {
		return 0, err
	}
	return result.RowsAffected()
}

// A path leads from a driver's connection to the one that a statement is sent to.
type path = func(dc any) any

func direct(dc any) any { return dc }

// unwrap returns the driver's connection inside of those that wrap it to trace statements, if
// they hand it out, and it executes statements without them: otelsql's do so by Raw, and
// dd-trace-go's by WrappedConn.
func unwrap(dc any) any {
	for {
		var inner driver.Conn
		switch c := dc.(type) {
		case interface{ Raw() driver.Conn }:
			inner = c.Raw()
		case interface{ WrappedConn() driver.Conn }:
			inner = c.WrappedConn()
		}
		if _, ok := inner.(driver.ExecerContext); !ok {
			return dc
		}
		dc = inner
	}
}

// A breaker breaks off the statement under way on a driver's connection, so that it returns with
// an error. The zero breaker is that of a driver that is not known.
type breaker struct {
	breaks func(dc any)

	// longest is the length of the longest statement, in bytes, for which that is certain.
	longest int
}

// findBreaker knows drivers by their connections' types: no driver is imported. The names of
// methods are constants, so that the linker still drops what a program does not use.
func findBreaker(t reflect.Type) breaker {
	switch {
	case t.Kind() != reflect.Pointer:
	case t.Elem().PkgPath() == "github.com/lib/pq":
		// Close is made to be called while another goroutine reads. But it writes, and so waits for
		// one that writes: as a longer statement may for ever, once the network's buffers are full.
		return breaker{longest: 4096, breaks: func(dc any) {
			if conn, ok := dc.(driver.Conn); ok {
				_ = conn.Close()
			}
		}}
	case isPgx(t):
		// The deadline of the network's connection may be set at any time, which is what pgx itself
		// does when a context ends.
		return breaker{longest: math.MaxInt, breaks: func(dc any) {
			if conn, ok := pgConn(dc).MethodByName("Conn").Call(nil)[0].Interface().(net.Conn); ok {
				_ = conn.SetDeadline(time.Unix(1, 0))
			}
		}}
	}
	return breaker{}
}

// isPgx tells whether t has pgx's Conn().PgConn().Conn(), a net.Conn.
func isPgx(t reflect.Type) bool {
	var ok bool
	for _, m := range [...]func(reflect.Type) (reflect.Method, bool){
		func(t reflect.Type) (reflect.Method, bool) { return t.MethodByName("Conn") },
		func(t reflect.Type) (reflect.Method, bool) { return t.MethodByName("PgConn") },
		func(t reflect.Type) (reflect.Method, bool) { return t.MethodByName("Conn") },
	} {
		var method reflect.Method
		if method, ok = m(t); !ok || method.Type.NumIn() != 1 || method.Type.NumOut() != 1 {
			return false
		}
		t = method.Type.Out(0)
	}
	return t == reflect.TypeFor[net.Conn]()
}

// pgConn returns the *pgconn.PgConn of a connection for which isPgx is true.
func pgConn(dc any) reflect.Value {
	return reflect.ValueOf(dc).MethodByName("Conn").Call(nil)[0].MethodByName("PgConn").Call(nil)[0]
}

// pgxConfig returns the configuration of pgx's connection. It is not valid of any other's.
func pgxConfig(dc any) (none reflect.Value) {
	if t := reflect.TypeOf(dc); t.Kind() != reflect.Pointer || !isPgx(t) {
		return none
	}
	config := reflect.ValueOf(dc).MethodByName("Conn").Call(nil)[0].MethodByName("Config")
	if !config.IsValid() || config.Type().NumIn() != 0 || config.Type().NumOut() != 1 {
		return none
	}
	c := reflect.Indirect(config.Call(nil)[0])
	if c.Kind() != reflect.Struct || !c.FieldByName("DefaultQueryExecMode").IsValid() {
		return none
	}
	return c
}

// caches tells whether dc is pgx's, in the mode that keeps statements with arguments prepared, which is
// its default. Such a statement costs a quarter less than one without arguments, which is parsed each
// time.
func caches(dc any) bool {
	c := pgxConfig(dc)
	if !c.IsValid() {
		return false
	}
	capacity := c.FieldByName("StatementCacheCapacity")
	return fmt.Sprint(c.FieldByName("DefaultQueryExecMode").Interface()) == "cache statement" &&
		capacity.IsValid() && capacity.CanInt() && capacity.Int() > 0
}

// unprepared returns the argument by which pgx does not keep a query prepared. It would, whatever the query,
// and no other will have the same comment.
func unprepared(dc any) []driver.NamedValue {
	c := pgxConfig(dc)
	if !c.IsValid() || !c.FieldByName("DefaultQueryExecMode").CanInt() {
		return nil
	}
	mode := reflect.New(c.FieldByName("DefaultQueryExecMode").Type()).Elem()
	for n := range int64(8) {
		mode.SetInt(n)
		if fmt.Sprint(mode.Interface()) == "exec" { // pgx.QueryExecModeExec
			return []driver.NamedValue{{Ordinal: 1, Value: mode.Interface()}}
		}
	}
	return nil
}

// rowsOpen tells whether rows are open on a driver's connection. pgx hides that in
// driver.ErrBadConn, and is asked. lib/pq refuses a statement.
func rowsOpen(ctx context.Context, dc any) bool {
	if t := reflect.TypeOf(dc); t.Kind() == reflect.Pointer && isPgx(t) {
		if isBusy := pgConn(dc).MethodByName("IsBusy"); isBusy.IsValid() {
			busy, _ := isBusy.Call(nil)[0].Interface().(bool)
			return busy
		}
	}
	_, err := execOn(ctx, dc, pgsql.LeftOpen)
	return err != nil && strings.Contains(err.Error(), "already a query being processed")
}
