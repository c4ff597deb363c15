package integration

import (
	"context"
	"database/sql"
	"errors"
	"slices"
	"strconv"
	"testing"
	"time"

	"github.com/pgadvisory/advisory"
)

// A querier is what work under a lock is done with: *sql.DB, *sql.Conn, *sql.Tx.
type querier interface {
	ExecContext(ctx context.Context, query string, args ...any) (sql.Result, error)
	QueryRowContext(ctx context.Context, query string, args ...any) *sql.Row
}

// work is what is done under a lock.
type work func(context.Context, querier) error

// A way is one of the functions that acquire a lock, used as a program would use it.
type way struct {
	name    string
	closure bool // releases by itself, whatever the work does
	opens   bool // gets a connection itself, and gives out a ctx
	beats   bool // has a heartbeat
	tries   bool // tries again and again, and does not wait in the server's queue
	shared  bool // takes a shared lock
	run     func(ctx context.Context, db *sql.DB, key advisory.Key, fn work, o options) error
}

// What a lock has whose heartbeat, or whose loss, a test waits for. With a shorter heartbeat, a
// machine that stands still for half a second would lose the lock.
const shortHeartbeat, shortTimeout = 800 * time.Millisecond, 3 * shortHeartbeat

type options struct{ acquire, release []advisory.Option }

// with does fn under the lock of key, in this way.
func (w way) with(ctx context.Context, db *sql.DB, key advisory.Key, fn work, opts ...advisory.Option) error {
	o := options{acquire: slices.Clone(opts)}
	if w.shared {
		o.acquire = append(o.acquire, advisory.Shared())
		o.release = append(o.release, advisory.Shared())
	}
	return w.run(ctx, db, key, fn, o)
}

var (
	withLock = way{name: "WithLock", closure: true, opens: true, beats: true,
		run: func(ctx context.Context, db *sql.DB, key advisory.Key, fn work, o options) error {
			return advisory.WithLock(ctx, db, key, func(ctx context.Context) error { return fn(ctx, db) }, o.acquire...)
		}}
	withLocks = way{name: "WithLocks", closure: true, opens: true, beats: true,
		run: func(ctx context.Context, db *sql.DB, key advisory.Key, fn work, o options) error {
			keys := []advisory.Key{key, second(key)}
			return advisory.WithLocks(ctx, db, keys, func(ctx context.Context) error { return fn(ctx, db) }, o.acquire...)
		}}
	acquire = way{name: "Acquire", opens: true, beats: true,
		run: func(ctx context.Context, db *sql.DB, key advisory.Key, fn work, o options) error {
			lock, err := advisory.Acquire(ctx, db, key, o.acquire...)
			if err != nil {
				return err
			}
			return errors.Join(fn(lock.Context(), db), lock.Release())
		}}
	withConnLock = way{name: "WithConnLock", closure: true, opens: true,
		run: func(ctx context.Context, db *sql.DB, key advisory.Key, fn work, o options) error {
			return advisory.WithConnLock(ctx, db, key, func(ctx context.Context, conn *sql.Conn) error { return fn(ctx, conn) }, o.acquire...)
		}}
	acquireConn = way{name: "AcquireConn",
		run: func(ctx context.Context, db *sql.DB, key advisory.Key, fn work, o options) error {
			conn, err := db.Conn(ctx)
			if err != nil {
				return err
			}
			defer conn.Close()
			if err := advisory.AcquireConn(ctx, conn, key, o.acquire...); err != nil {
				return err
			}
			return errors.Join(fn(ctx, conn), advisory.ReleaseConn(ctx, conn, key, o.release...))
		}}
	withTxLock = way{name: "WithTxLock", closure: true, opens: true,
		run: func(ctx context.Context, db *sql.DB, key advisory.Key, fn work, o options) error {
			return advisory.WithTxLock(ctx, db, key, func(ctx context.Context, tx *sql.Tx) error { return fn(ctx, tx) }, o.acquire...)
		}}
	acquireTx = way{name: "AcquireTx", tries: true,
		run: func(ctx context.Context, db *sql.DB, key advisory.Key, fn work, o options) error {
			tx, err := db.BeginTx(ctx, nil)
			if err != nil {
				return err
			}
			defer tx.Rollback()
			if err := advisory.AcquireTx(ctx, tx, key, o.acquire...); err != nil {
				return err
			}
			if err := fn(ctx, tx); err != nil {
				return err
			}
			return tx.Commit()
		}}
)

var ways = []way{withLock, withLocks, acquire, withConnLock, acquireConn, withTxLock, acquireTx}

var (
	closures = waysThat(func(w way) bool { return w.closure })
	openers  = waysThat(func(w way) bool { return w.opens })
	queuers  = waysThat(func(w way) bool { return !w.tries })
)

func waysThat(are func(way) bool) []way {
	return slices.DeleteFunc(slices.Clone(ways), func(w way) bool { return !are(w) })
}

// someOptions are the kinds of waiting.
var someOptions = map[string][]advisory.Option{
	"waiting": nil,
	"NoWait":  {advisory.NoWait()},
	"Timeout": {advisory.Timeout(20 * time.Second)},
}

// second is the other key that withLocks takes: after key, so that who waits for key
// does not make others wait for another.
func second(key advisory.Key) advisory.Key {
	id, err := strconv.ParseInt(key.SQL(), 10, 64)
	if err != nil {
		panic(err)
	}
	return advisory.Pair(int32(id>>32), int32(id))
}

func eachWay(t *testing.T, ways []way, body func(t *testing.T, w way)) {
	t.Helper()
	for _, w := range ways {
		t.Run(w.name, func(t *testing.T) { body(t, w) })
	}
}
