package advisory

import (
	"context"
	"database/sql"
	"time"

	"github.com/pgadvisory/advisory/internal/manager"
	"github.com/pgadvisory/advisory/internal/session"
)

// WithConnLock is [WithLock] for work that has to run on the very session that
// holds the lock, like migrations: fn is given the connection. What fn does on conn
// cannot happen after the lock is lost, because the lock is lost with the session.
// Therefore there is no heartbeat. [HolderTimeout] has no default here, because
// the server counts as silence whatever fn does between two statements; if the
// option is given, the server ends the session, and with it the lock, after such a
// silence, in a transaction or not. If the process dies while a statement runs, the server
// notices within about a second (client_connection_check_interval), and ends both.
//
// conn is handed back to the pool after fn, without any advisory lock on it. fn must
// not close it, nor leave rows or a transaction open or a setting changed on it. If it does one of the
// first three, the session is ended, and that is an error.
//
// It uses one connection, which it takes when no other caller in this process holds key
// through db, or asks for it: until then it waits without one.
//
// It takes the options Shared, NoWait, Timeout, HolderTimeout, Logger and Observe.
// Errors and panics are as with WithLock.
func WithConnLock(ctx context.Context, db *sql.DB, key Key, fn func(context.Context, *sql.Conn) error, opts ...Option) error {
	keys := []Key{key}
	c := call{function: "WithConnLock", options: withConnOptions, db: db, missing: missing("db", db == nil, "fn", fn == nil)}
	cfg, err := c.prepare(ctx, keys, opts)
	if err != nil {
		return err
	}
	ctx, o := observe(ctx, c.function, keys, &cfg)
	s, done, err := manager.Dedicated(ctx, db, cfg.request(ctx, db, keys), session.ForConn, func(ctx context.Context, s *session.Session, since time.Time) error {
		s.SetSilence(cfg.givenHolderTimeout())
		return s.Lock(ctx, key.key, cfg.noWait, since)
	})
	if err != nil {
		_, err = o.acquired(ctx, acquireError(ctx, keys, &cfg, err), nil)
		return err
	}
	defer done()
	ctx, _ = o.acquired(ctx, nil, s.Discard)
	h := &hold{session: s, cfg: cfg, observed: o}
	h.begin(ctx, db, keys, s)
	return h.run(func(ctx context.Context) error { return fn(ctx, s.Conn()) })
}

// AcquireConn takes the session-level lock of key on the caller's conn, where it
// stays until [ReleaseConn], or until the session ends; the end of ctx does not end it.
// Nothing watches the session: a lost lock is noticed by the next statement on it.
// conn must not be used by others until AcquireConn returns. It waits in the server's queue.
//
// In a transaction, AcquireConn refuses: take the lock before BEGIN, or use [AcquireTx]. If conn's session
// holds a lock of key already, shared or not, the error matches [ErrReentrant]: the server would count the two,
// and one ReleaseConn would leave one behind. To see that, it reads pg_locks, as ReleaseConn does.
//
// It takes the options Shared, NoWait, Timeout, Logger and Observe. After an error that matches
// [ErrReentrant] or [ErrNotAcquired], or in a transaction, conn is as it was before. If ctx ends
// during the wait, AcquireConn returns when the statement under way has ended, within 400 ms; if
// the server does not answer then, conn is closed. After any other error, the state of the session
// would be in doubt, and conn has been closed for good.
//
// If ctx carries key already, the result is ErrReentrant even if that was acquired
// on another database: conn does not tell.
func AcquireConn(ctx context.Context, conn *sql.Conn, key Key, opts ...Option) error {
	keys := []Key{key}
	c := call{function: "AcquireConn", options: acquireOptions, missing: missing("conn", conn == nil, "", false)}
	cfg, err := c.prepare(ctx, keys, opts)
	if err != nil {
		return err
	}
	ctx, o := observe(ctx, c.function, keys, &cfg)
	if err = ctx.Err(); err == nil { // otherwise nothing is sent
		w := callersWait(ctx, &cfg, keys)
		defer w.Done()
		s := session.OnConn(conn, cfg.logger, cfg.shared)
		w.Equip(s)
		if err = s.Lock(w.Ctx, key.key, cfg.noWait, time.Now()); err != nil {
			s.GiveUp(w.Ctx, err)
			err = w.Failure(err)
		}
	}
	if err != nil {
		err = acquireError(ctx, keys, &cfg, err)
	}
	o.acquireEnd(ctx, err)
	return err
}

// callersWait returns a wait on a session or in a transaction of the caller's, whose database is taken
// for that of the locks that ctx carries.
func callersWait(ctx context.Context, cfg *config, keys []Key) *manager.Callers {
	db, _ := held(ctx, nil)
	return manager.NewCallers(ctx, db, cfg.request(ctx, nil, keys))
}

// ReleaseConn releases what [AcquireConn] took on conn, once. It needs the same
// [Shared] option, and takes Logger. It is not bounded by ctx, which may have ended,
// but takes no more than a few seconds.
//
// If the session does not hold the lock, the error matches [ErrLost], and conn is as it was. If the
// server does not answer, or with an error, it matches ErrLost, too, and conn has been closed for good: whatever it
// still held is free.
func ReleaseConn(ctx context.Context, conn *sql.Conn, key Key, opts ...Option) error {
	return releaseConn(ctx, conn, key, releaseConnOptions, opts)
}

func releaseConn(ctx context.Context, conn *sql.Conn, key Key, allowed optionSet, opts []Option) error {
	keys := []Key{key}
	c := call{function: "ReleaseConn", options: allowed, missing: missing("conn", conn == nil, "", false)}
	cfg, err := c.check(ctx, "release", keys, opts)
	if err != nil {
		return err
	}
	if err := session.OnConn(conn, cfg.logger, cfg.shared).Unlock(key.key); err != nil {
		return lostError("release", keys, err)
	}
	return nil
}
