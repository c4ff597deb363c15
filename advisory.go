// Package advisory makes work run in one process at a time, of all that share a
// PostgreSQL database, with PostgreSQL's advisory locks. It works on database/sql with
// any driver that speaks to PostgreSQL 14 or newer, and imports the standard library alone.
//
//	err := advisory.WithLock(ctx, db, advisory.Name("nightly-report"), func(ctx context.Context) error {
//		return buildReport(ctx) // ctx ends if the lock is lost
//	})
//
// # Which function
//
//   - [WithLock] is for work of any kind, and [WithLocks] for work that needs several keys.
//     [Acquire] takes the same lock for what is no function.
//   - [WithTxLock] is for work that is one transaction in the same database: lock and work
//     commit together, and no pooler is in the way.
//   - [WithConnLock] is for migrations and other work on one session.
//   - [Lead] runs a function on one of many processes, for as long as they live.
//   - [AcquireTx], [AcquireConn] and [ReleaseConn] are for a transaction and a connection of
//     the caller's; [NewSessionLocker] is for goose.
//
// Those that are given a function release the lock when that ends, also by a panic or
// runtime.Goexit. What Acquire and AcquireConn took, the caller releases, with [Lock.Release]
// and ReleaseConn, and what AcquireTx took, the end of the transaction.
//
// Locks of the same [Key] exclude each other, but for [Shared] ones, in one database of one
// server, whichever of the functions takes them; so do those of other programs that call
// PostgreSQL's own functions with [Key.SQL]. Keys are made by [Name], [ID] and [Pair].
//
// # What a nil error means
//
// The function has run and returned nil, and the lock was held from before it began until
// after it ended: the server has said so on the release. Any other error matches, with
// [errors.Is], one of [ErrNotAcquired], [ErrLost], [ErrReentrant] and [ErrDeadlock], or is that
// of the function, the driver or the context. Those that this package makes name the operation
// and the key.
//
// # One session carries many locks
//
// PostgreSQL holds a session-level lock for a session, that is, for a connection, until it
// is unlocked or the session ends. The locks that WithLock, WithLocks, Acquire and Lead hold
// in one process through one [sql.DB] share a session. It is a connection of the pool,
// borrowed with the first lock and handed back after the last. Only a lock that was waited for
// in the server's queue stays on the connection that waited, until it is released.
//
// A lone request is one statement, and nothing is prepared for it. Requests that come while
// a round trip is under way go out together in the next one, as one prepared statement; the
// first few go out one by one, because to prepare it costs two round trips.
//
// If the session dies, all the locks on it are lost together, and each holder is told. A lock
// that is to stand alone is taken through a second sql.DB.
//
// A connection goes back to the pool only if the server has said that its locks are
// released and its settings are as they were. In doubt it is closed, because a closed
// session holds no lock.
//
// # Waiting
//
// Within a process, a key has one queue, first come, first served; who waits in it holds
// no connection. Shared locks are held together, and do not overtake an exclusive one that
// waits. A released lock is handed to the next in line without asking the server to lock or
// unlock; that ends 20 ms after the server granted it, and then it goes back to the server, so
// that other processes get their turn. The release of a lock that was handed on still asks
// the server whether the session has lived until then. WithTxLock and WithConnLock wait in the same
// queue before they take a connection. AcquireConn and AcquireTx do not.
//
// A wait for another process is in the server's queue, so that a released lock is handed on
// at once. One statement waits for 100 ms at first, for up to 400 ms as the wait grows older, and
// for half of the server's deadlock_timeout at most; then the next one does. A statement that waits holds a
// snapshot, and if the holder runs CREATE INDEX CONCURRENTLY, which waits for all snapshots, the
// two would deadlock (golang-migrate/migrate#960, flyway/flyway#1654). The server logs nothing of it.
// Because older waits stay longer, they are at the head of the queue.
//
// Such a wait takes a connection, and there are not more than "How large a pool" says. Further
// ones try again and again instead, after pauses that grow from 5 to 250 ms. So do all waits where
// the server has no PL/pgSQL, or this role may not use it; the [Logger] is told.
//
// Waits outlive a restart and a failover of the server, if it is back within 30 s, and those of Lead any
// outage. All waits through one sql.DB go through it together: one of them at a time tries to reach the server,
// after pauses that grow from 50 ms to 2 s, and each Logger is told once that the server is missed, and once that
// it is back. They pass over every refusal of a connection but those that stay: a wrong password, or a database or a
// privilege that is missing. They end
// with ctx, at once (AcquireConn's within 400 ms) and without costing the connection, with [Timeout], or, with [NoWait], before they
// begin. Taking a key again with the
// ctx that fn was given is an error at once, [ErrReentrant], and not a wait for oneself.
//
// # A lock is a lease
//
// A session can die without its holder's doing. The session of held locks is checked
// every [Heartbeat]; if it does not answer, is another session, or is on a standby, the contexts that
// their functions were given end, with a cause that matches [ErrLost], within two heartbeats,
// and the functions of this package return ErrLost whatever fn returns. In the other
// direction, a holder that falls silent (power loss, partition, SIGSTOP) is ended by the
// server itself after [HolderTimeout], and that is at least three heartbeats: its context has
// ended before another process can have the lock. Where locks of several callers are on one
// session, the shortest Heartbeat and the shortest HolderTimeout count for all of them.
//
// That is so from the first heartbeat on, which is at once for Lead, or from the grant of a
// lock that was waited for in the server's queue; HolderTimeout tells what holds before. It is not so where
// the server ends the session by itself, as on pg_terminate_backend or a restart: the lock is free
// at once, and its holder is told within two heartbeats.
//
// WithConnLock and WithTxLock have no heartbeat: their work is on the session that has the
// lock, and ends with it. They have the server look every second, during a statement, whether the process
// is still there (client_connection_check_interval, unless it is shorter), and put that back afterwards: otherwise the
// lock of a process that dies lasts as long as its statement. With the other functions the lock of such a process is
// free at once, and its statements may still run in the server beside its successor's.
//
// # What it does not promise
//
//   - A function whose lock is lost is not stopped. Its ctx ends.
//   - A process that is frozen together with its clock does not know, when it goes on, that
//     it has lost its lock; and a write of its may be under way in the network. [Token] is for that.
//   - The order in which processes get a lock is not exactly that in which they asked.
//   - A deadlock is found if its waits are given the ctx of those who hold the locks (see
//     [ErrDeadlock]). WithLocks takes several keys in one order, and never meets one.
//   - A caller that takes a key again without the ctx that it was given waits for itself.
//
// # How large a pool
//
// WithLock, WithLocks, Acquire and Lead take, through one sql.DB,
//
//   - one connection for the session that carries locks;
//   - one for each wait in the server's queue, and for the lock that comes of it, up to 8.
//     Together with the first one, which there always is, these are not more than half
//     of a limited pool.
//
// WithTxLock and WithConnLock take
//
//   - one each, when they hold the lock or wait for another process: the one that fn
//     works on.
//
// The rest is for the work. So a program with a pool of 2 can hold a thousand locks, have a
// thousand callers wait, and still has a connection. A pool of fewer than 4 has none to spare for
// the server's queue: those who call the first four functions try again and again. A pool of 1 is
// enough if fn does not use it; a fn that does waits for a connection that is not free before it returns.
//
// # Drivers
//
// Any driver for database/sql will do. The statements on the sessions of WithLock, WithLocks,
// Acquire and Lead run on the caller's goroutine where the driver is lib/pq or pgx's stdlib, and
// one that is not answered in time is broken off at the network connection. With
// any other driver, each statement has a goroutine of its own: slower, and otherwise the same. The
// sessions that fn uses, of WithTxLock and WithConnLock, are always treated like that.
//
// A driver may be wrapped, as for tracing. Where the wrapper hands out what it wraps (otelsql by
// Raw, dd-trace-go by WrappedConn), waits and heartbeats go past it; others (sqlmw) see them.
//
// # Poolers and standbys
//
// Session-level locks mean nothing behind a pooler in transaction or statement mode, and would exclude
// nobody on the primary if they were taken on a standby. [Check] finds that out. On a standby, a try is refused, as if
// another held the lock, and a wait ends with an error that says so; heartbeats ask, too: an endpoint may lead to
// a standby for a while after a switch-over. The drivers' own setting against that is target_session_attrs=read-write.
// WithTxLock at READ COMMITTED and AcquireTx work behind a transaction pooler.
//
// # Looking at locks
//
// [Holders] tells who holds a lock and who waits for it, and how to do the same in psql, and to
// break a lock by hand. The message of a Timeout names the holder. [Observe] reports how long
// acquisitions wait and locks are held, and each loss; the module
// github.com/pgadvisory/advisory/otel makes OpenTelemetry's metrics and spans of it. [Logger]
// has what cannot be returned as an error.
//
// # Testing code that uses it
//
// With go-sqlmock, an uncontended WithLock is two statements without arguments, each of
// which affects one row: see the example of WithLock with it. What a lock is good for is better
// tested against a real server, with two pools in place of two processes.
package advisory

import (
	"context"
	"database/sql"
	"runtime"
	"slices"

	"github.com/pgadvisory/advisory/internal/pgsql"
)

// WithLock runs fn while holding the session-level advisory lock of key, waiting for
// it first if another holds it, and releases it afterwards.
//
// A nil error means: fn returned nil, and the lock was held from before fn began
// until after it ended. If the lock is lost meanwhile, the ctx that fn was given
// ends, with a cause that matches [ErrLost], and so does the error of WithLock,
// joined with fn's own, even if fn did not look. fn is not stopped otherwise; for
// writes that must not happen late, see [Token] and [WithTxLock].
//
// If the lock is not acquired, fn does not run, and the error matches
// [ErrNotAcquired] (NoWait, Timeout, end of ctx), [ErrReentrant] (ctx is one that a
// function holding the lock was given), [ErrDeadlock], or the driver's error. The
// waiting outlives a restart or failover of the server; a server that cannot be
// reached at first is an error at once.
//
// If fn panics or calls runtime.Goexit, the lock is released, and that goes on its way.
//
// fn must not hold on to its ctx, which ends with it. It takes the options Shared,
// NoWait, Timeout, Heartbeat, HolderTimeout, Logger and Observe. WithLock is safe to
// call from several goroutines.
func WithLock(ctx context.Context, db *sql.DB, key Key, fn func(context.Context) error, opts ...Option) error {
	return new(hold).with(ctx, "WithLock", db, []Key{key}, fn, opts)
}

// WithLocks is [WithLock] for several keys: fn runs while all of them are held.
// They are taken in an order of their own, whatever the order of keys, so that
// callers cannot deadlock with each other; repeated keys count once.
func WithLocks(ctx context.Context, db *sql.DB, keys []Key, fn func(context.Context) error, opts ...Option) error {
	keys = slices.Clone(keys)
	slices.SortStableFunc(keys, func(a, b Key) int { return pgsql.Compare(a.key, b.key) })
	keys = slices.CompactFunc(keys, func(a, b Key) bool { return a.key.Lock() == b.key.Lock() })
	return new(hold).with(ctx, "WithLocks", db, keys, fn, opts)
}

// Acquire takes the lock that [WithLock] takes, for critical sections that are no
// function. The caller must call Release. ctx bounds the acquisition alone: its end
// does not release the lock. It takes WithLock's options and has WithLock's errors.
//
// A Lock that is garbage-collected unreleased is released, with a warning to the
// Logger. That is a safety net: it may be minutes late.
func Acquire(ctx context.Context, db *sql.DB, key Key, opts ...Option) (*Lock, error) {
	h, keys := new(hold), []Key{key}
	c := call{function: "Acquire", options: sessionOptions, db: db, missing: missing("db", db == nil, "", false), detached: true}
	var err error
	if h.cfg, err = c.prepare(ctx, keys, opts); err != nil {
		return nil, err
	}
	if err := h.acquire(ctx, c, keys); err != nil {
		return nil, err
	}
	l := &Lock{hold: h}
	l.cleanup = runtime.AddCleanup(l, abandoned, h)
	return l, nil
}

// A Lock is a held session-level lock. Its methods are safe to call from several
// goroutines.
type Lock struct {
	hold    *hold
	cleanup runtime.Cleanup
}

// Key returns the key that was acquired.
func (l *Lock) Key() Key { return l.hold.keys[0] }

// Context returns a context that ends when the lock is released or lost:
// [context.Cause] then matches [context.Canceled] or [ErrLost]. It carries the values
// of Acquire's ctx, and the mark that makes taking the key again [ErrReentrant].
//
// It does not keep the Lock from being garbage-collected.
func (l *Lock) Context() context.Context { return &l.hold.marked }

// Token returns the fencing token of the lock: see the function [Token]. ctx bounds
// nothing but the start: the question is asked on the session that holds the lock,
// and breaking it off would lose the lock.
func (l *Lock) Token(ctx context.Context) (int64, error) {
	defer runtime.KeepAlive(l)
	return l.hold.token.get(ctx)
}

// Release releases the lock. It ends Context first, takes some ten seconds at most even
// if the server is out of reach, and may be called again, with the same result.
//
// A nil error means that the lock was held until now. Otherwise the error matches
// [ErrLost]. In either case the lock is not held any more, as far as this process
// can see to it: a connection on which the release failed is closed, and the other
// locks that it carries are lost with it.
//
// Release of a nil Lock is an error: a deferred one may be of a Lock that Acquire has not returned.
func (l *Lock) Release() error {
	if l == nil {
		return &Error{Op: "release", msg: "nil Lock: Acquire has failed, and its error says why"}
	}
	l.cleanup.Stop()
	return l.hold.release()
}

// abandoned releases the lock of a garbage-collected Lock.
func abandoned(h *hold) {
	// Not on the goroutine that runs all cleanups.
	go func() {
		defer func() {
			if err := h.release(); err != nil {
				h.cfg.logger.Warn("advisory: abandoned Lock", "error", err)
			}
		}()
		h.cfg.logger.Warn("advisory: Lock was garbage-collected without Release", "key", keyList(h.keys))
	}()
}
