package session

import (
	"context"
	"database/sql"
	"errors"
	"log/slog"
	"reflect"
	"sync"
	"sync/atomic"
	"time"

	"github.com/pgadvisory/advisory/internal/pgsql"
)

// dialBound is how long a connection may take to be made where the pool has room for it, so that
// waiting for it does not mean waiting for others.
const dialBound = 30 * time.Second

// A Pool is where sessions are borrowed from.
type Pool struct {
	DB    *sql.DB
	Facts *Facts
}

// Facts are what is known of the server and the driver of a pool.
type Facts struct {
	noWaits, noChecks atomic.Bool // the server does not know pgsql.Wait, or the setting of pgsql.Settings.Check

	driver  sync.Once
	of      reflect.Type // of the driver's connections
	breaker breaker
	caches  bool // see caches
}

// ofDriver returns what is known of the driver. It asks one connection, since all of a pool have the same
// driver and configuration.
func (f *Facts) ofDriver(dc any) (breaker, bool) {
	f.driver.Do(func() { f.of, f.breaker, f.caches = reflect.TypeOf(dc), findBreaker(reflect.TypeOf(dc)), caches(dc) })
	if t := reflect.TypeOf(dc); t != f.of { // of a connector that has several drivers
		return findBreaker(t), caches(dc)
	}
	return f.breaker, f.caches
}

// RefusesWaits tells whether the server does not execute the statement that waits.
func (p Pool) RefusesWaits() bool { return p.Facts.noWaits.Load() }

// Closed returns an error if the pool has been closed: a connection in use outlives it, and so
// would a wait.
func (p Pool) Closed() error {
	if _, err := p.DB.Conn(endedCtx); pgsql.PoolClosed(err) {
		return err
	}
	return nil
}

// endedCtx asks for a connection without taking one.
var endedCtx = func() context.Context {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	return ctx
}()

// Exhausted tells whether all connections of a limited pool are in use.
func (p Pool) Exhausted() bool {
	stats := p.DB.Stats()
	return stats.MaxOpenConnections > 0 && stats.InUse >= stats.MaxOpenConnections
}

// Open borrows a connection.
func (p Pool) Open(ctx context.Context, log *slog.Logger, use Use) (*Session, error) {
	conn, err := p.conn(ctx)
	if err != nil {
		return nil, err
	}
	return borrowed(conn, p, log, use), nil
}

// conn borrows a connection. It returns when ctx ends, even if a driver that is making a connection,
// or asks whether one that lies ready still lives, does not: hooks of the program's may be what it waits for.
func (p Pool) conn(ctx context.Context) (*sql.Conn, error) {
	for {
		conn, err := p.boundedConn(ctx)
		if err != errFull {
			return conn, err
		}
		if err := Ended(ctx); err != nil {
			return nil, err
		}
	}
}

// errFull says that there was a place in the pool at first, and that others took it. So the bound, which is for
// the driver, ran out in a wait for them.
var errFull = errors.New("the pool is full")

func (p Pool) boundedConn(ctx context.Context) (*sql.Conn, error) {
	switch {
	case p.DB.Stats().Idle == 0:
		return p.borrowLeavable(ctx, dialBound)
	case ctx.Done() != nil:
		return p.borrowLeavable(ctx, AnswerBound)
	default:
		ctx, cancel := context.WithTimeoutCause(ctx, AnswerBound, pgsql.NoAnswer{After: AnswerBound})
		defer cancel()
		return p.borrow(ctx)
	}
}

func (p Pool) borrow(ctx context.Context) (*sql.Conn, error) {
	conn, err := p.DB.Conn(ctx)
	switch {
	case err == nil || ctx.Err() == nil:
		return conn, err
	case err == ctx.Err() && p.Exhausted(): // an error of database/sql's own, which has waited for others
		return nil, errFull
	default:
		return nil, context.Cause(ctx)
	}
}

// borrowLeavable is borrow, but returns at the end of ctx, or of bound if there is a place in the pool. What
// comes too late goes to the pool: to break off the making of a connection would cost the server a session,
// and the next one another.
func (p Pool) borrowLeavable(ctx context.Context, bound time.Duration) (*sql.Conn, error) {
	making, cancel, late := ctx, func() {}, (<-chan struct{})(nil)
	if !p.Exhausted() { // otherwise the wait is for others
		making, cancel = context.WithTimeoutCause(context.WithoutCancel(ctx), bound, pgsql.NoAnswer{After: bound})
		late = making.Done()
	}
	done := spawn(func() (*sql.Conn, error) { return p.borrow(making) })
	o, returned, err := outcome[*sql.Conn]{}, false, error(nil)
	select {
	case o = <-done:
		returned = true
	case <-ctx.Done():
		err = context.Cause(ctx)
	case <-late:
		err = context.Cause(making)
		o, returned = done.soon()
	}
	if returned {
		cancel()
		return o.result()
	}
	go func() {
		defer cancel()
		if conn, err := (<-done).result(); err == nil {
			_ = conn.Close()
		}
	}()
	return nil, err
}
