package advisory

import (
	"cmp"
	"context"
	"database/sql"
	"time"

	"github.com/pgadvisory/advisory/internal/manager"
	"github.com/pgadvisory/advisory/internal/session"
)

// WithConnLock is [WithLock] for work that has to run on the session that holds the lock, such
// as migrations. fn is given the connection. What fn does on it cannot happen after the lock
// is lost, because the lock ends with the session. So there is no heartbeat.
//
// [HolderTimeout] has no default here, because the server takes for silence whatever fn does
// between two statements. If the option is given, the server ends the session, and with it the
// lock, after such a silence, in a transaction or not. If the process dies while a statement
// runs, the server ends both within about a second (client_connection_check_interval).
//
// After fn, the connection goes back to the pool without any advisory lock on it. fn must not
// close it, and must not leave rows, a transaction or a changed setting on it. Each of the
// first three ends the session, and is an error.
//
// WithConnLock takes one connection, as soon as no other caller in this process holds key
// through db, or asks for it. Until then it waits without one.
//
// It takes the options Shared, NoWait, Timeout, HolderTimeout, Logger and Observe. Errors and
// panics are as with WithLock.
func WithConnLock(ctx context.Context, db *sql.DB, key Key, fn func(context.Context, *sql.Conn) error, opts ...Option) error {
	keys := []Key{key}
	c := call{function: "WithConnLock", options: withConnOptions, db: db, missing: cmp.Or(nilArg("db", db == nil), nilArg("fn", fn == nil))}
	cfg, err := c.prepare(ctx, keys, opts)
	if err != nil {
		return err
	}
	ctx, o := observe(ctx, c.function, keys, &cfg)
	s, done, err := manager.Dedicated(ctx, cfg.request(ctx, db, keys), session.ForConn, func(ctx context.Context, s *session.Session, since time.Time) error {
		s.SetIdleTimeout(cfg.givenHolderTimeout())
		return s.Lock(ctx, key.key, cfg.noWait, since)
	})
	if err != nil {
		err = acquireError(ctx, keys, &cfg, err)
		o.acquireEnd(ctx, err)
		return err
	}
	defer done()
	ctx = o.acquired(ctx, s.Discard)
	h := &hold{session: s, cfg: cfg, observed: o}
	h.begin(ctx, db, keys, s)
	return h.run(func(ctx context.Context) error { return fn(ctx, s.Conn()) })
}

// AcquireConn takes the session-level lock of key on the caller's conn. The lock stays there
// until [ReleaseConn], or until the session ends; the end of ctx does not end it, nor does
// conn.Close, which hands the connection back to the pool with the lock on it. Nothing watches
// the session: the next statement on it finds a loss. Others must not use conn until
// AcquireConn returns.
//
// In a transaction, AcquireConn refuses: take the lock before BEGIN, or use [AcquireTx]. If
// conn's session already holds a lock of key, shared or not, the error matches [ErrReentrant]:
// the server would count the two, and one ReleaseConn would leave one behind. To find that
// out, AcquireConn reads pg_locks, as ReleaseConn does.
//
// It takes the options Shared, NoWait, Timeout, Logger and Observe. After an error that
// matches [ErrReentrant] or [ErrNotAcquired], after a deadlock that this package has found,
// and in a transaction, conn is as it was before. If ctx ends during the wait, AcquireConn
// returns when the statement under way has ended, within 400 ms. If the server does not answer
// then, and after any other error, conn has been closed for good, because the state of its
// session is in doubt.
//
// If ctx already carries key, the result is ErrReentrant, even if that lock is in another
// database: conn does not tell.
func AcquireConn(ctx context.Context, conn *sql.Conn, key Key, opts ...Option) error {
	keys := []Key{key}
	c := call{function: "AcquireConn", options: acquireOptions, missing: nilArg("conn", conn == nil)}
	cfg, err := c.prepare(ctx, keys, opts)
	if err != nil {
		return err
	}
	ctx, o := observe(ctx, c.function, keys, &cfg)
	if err = ctx.Err(); err == nil { // otherwise nothing is sent
		err = manager.OnConn(ctx, conn, cfg.request(ctx, nil, keys))
	}
	if err != nil {
		err = acquireError(ctx, keys, &cfg, err)
	}
	o.acquireEnd(ctx, err)
	return err
}

// ReleaseConn releases what [AcquireConn] took on conn, once. It needs the same [Shared]
// option, and takes Logger. ctx, which may have ended, does not bound it; it takes a few
// seconds at most.
//
// If the session does not hold the lock, the error matches [ErrLost], and conn is as it was.
// If the server does not answer, or answers with an error, the error matches ErrLost, too, and
// conn has been closed for good: whatever it still held is free.
func ReleaseConn(ctx context.Context, conn *sql.Conn, key Key, opts ...Option) error {
	return releaseConn(ctx, conn, key, releaseConnOptions, opts)
}

func releaseConn(ctx context.Context, conn *sql.Conn, key Key, allowed optionSet, opts []Option) error {
	keys := []Key{key}
	c := call{function: "ReleaseConn", options: allowed, missing: nilArg("conn", conn == nil)}
	cfg, err := c.check(ctx, "release", keys, opts)
	if err != nil {
		return err
	}
	if err := session.OnConn(conn, cfg.logger, cfg.shared).Unlock(key.key); err != nil {
		return lostError("release", keys, err)
	}
	return nil
}
