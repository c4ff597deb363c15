// Package advisory makes work run in one process at a time, of all that share a PostgreSQL
// database. It uses PostgreSQL's advisory locks, works with any driver for database/sql, and
// imports the standard library alone.
//
//	err := advisory.WithLock(ctx, db, advisory.Name("nightly-report"), func(ctx context.Context) error {
//		return buildReport(ctx) // ctx ends if the lock is lost
//	})
//
// This page is the reference. The directory docs of the repository has guarantees with their
// tests, poolers, operating, and how the package works inside.
//
// # Which function
//
//   - [WithLock] is for work of any kind, and [WithLocks] for work that needs several keys.
//     [Acquire] and [Lock.Release] are for work that does not fit in one function.
//   - [WithTxLock] is for work that is one transaction in the same database. Lock and work
//     commit together, also behind a transaction pooler.
//   - [WithConnLock] is for migrations and other work on one session.
//   - [Lead] runs a function on one of many replicas: the leader. When the function returns,
//     Lead ends.
//   - [AcquireTx], [AcquireConn] and [ReleaseConn] are for a transaction and a connection of
//     the caller's. [NewSessionLocker] is for goose.
//   - [Check], at program start, tells whether locks exclude each other through a db at all.
//   - [Holders] and [Locks] tell who holds locks and who waits for them.
//
// A function that takes another function releases the lock when that function ends, also by a
// panic or runtime.Goexit; with [AtLeast], perhaps later. The caller releases what Acquire and
// AcquireConn took. The end of the transaction releases what AcquireTx took.
//
// # Keys
//
// Locks of the same [Key] exclude each other, except [Shared] ones, in one database of one
// server, whichever function takes them. Keys are made by [Name], [ID], [Pair] and [HashText].
// Other programs take part with PostgreSQL's own functions and [Key.SQL].
//
// # Options
//
// Each function takes the options that make sense for it. Any other is an error before anything
// is sent.
//
//	                 Shared NoWait Timeout AtLeast Heartbeat HolderTimeout TxOptions Logger Observe
//	WithLock         yes    yes    yes     yes     1s        15s           -         yes    yes
//	WithLocks        yes    yes    yes     yes     1s        15s           -         yes    yes
//	Acquire          yes    yes    yes     yes     1s        15s           -         yes    yes
//	Lead             -      -      -       -       1s        15s           -         slog   yes
//	WithConnLock     yes    yes    yes     -       -         none          -         yes    yes
//	WithTxLock       yes    yes    yes     -       -         none          server's  yes    yes
//	AcquireConn      yes    yes    yes     -       -         -             -         yes    yes
//	AcquireTx        yes    yes    yes     -       -         -             -         yes    yes
//	ReleaseConn      yes    -      -       -       -         -             -         yes    -
//	NewSessionLocker yes    yes    yes     -       -         -             -         yes    yes
//
// A value is the default. Logger is silent by default, except for Lead, which logs to
// slog.Default.
//
// # Errors
//
// A nil error means that the function ran and returned nil, and that the lock was held from
// before the function began until after it ended: the server has said so on the release. Any
// other error matches, with [errors.Is], one of
//
//   - [ErrNotAcquired]: the lock was not taken. If another holds it, the error also matches
//     [ErrHeld]. If ctx ended, it matches ctx's error instead.
//   - [ErrLost]: the lock was taken, and cannot be shown to have been held to the end.
//   - [ErrReentrant]: ctx is one that a function holding the lock was given.
//   - [ErrDeadlock]: the wait was part of a deadlock.
//
// or is that of the function, the driver or the server. An [*Error] names the operation and the
// keys. The error of the function is returned as it is; if the lock was lost, it is joined with
// the error that says so.
//
// # A lock is a lease
//
// A session can die without its holder's doing. Every [Heartbeat], the package checks the session
// of the held locks. If the session does not answer, is another one, or is on a standby, the
// contexts of its holders end within two heartbeats, with a cause that matches ErrLost. The
// functions themselves are not stopped.
//
// In the other direction, the server ends the session of a holder that falls silent (power loss,
// partition, SIGSTOP) after [HolderTimeout], which is at least three heartbeats. So the holder's
// context has ended before another process can have the lock, unless the process itself was
// frozen: it learns of its loss when it goes on. HolderTimeout tells from which moment on that is
// so. If the server ends the session by itself, as on pg_terminate_backend, a restart or a
// failover, the lock is free at once, and its holder is told within two heartbeats.
//
// A process that is frozen together with its clock does not know, when it goes on, that it has
// lost its lock; and one of its writes may still be under way. [Token] is for that.
//
// WithConnLock and WithTxLock need no heartbeat: their work is on the session that has the lock,
// and ends with it.
//
// # Waiting
//
// Within a process, a key has one queue, first come, first served; callers in it hold no
// connection. For other processes, a caller waits in the server's queue, so that it has a
// released lock at once. It waits there in statements of at most 400 ms. Between two of them,
// the holder's CREATE INDEX CONCURRENTLY gets through. Statements of older waits last longer, so
// that these are at the head of the queue.
//
// Waits go on through a restart or a failover of the server that takes up to 30 s, and those of
// Lead through any. They end with ctx or with [Timeout]. With [NoWait] there is none.
//
// # Connections
//
// The locks that WithLock, WithLocks, Acquire and Lead hold through one [sql.DB] share one
// session: a connection of the pool, borrowed with the first lock and handed back after the last.
// Each wait in the server's queue takes another one, until the lock that comes of it is released.
// There are at most 8 of these. All together take at most half of a limited pool, but always one.
// Further waits try again, after pauses that grow from 5 to 250 ms. So do all waits through a
// pool of fewer than 4 connections. A pool of 1 is enough only if fn does not use it: the Logger
// is warned of that, and an error that says so is joined to fn's.
//
// If the session dies, all the locks on it are lost together, and each holder is told. Take a
// lock that is to stand alone through a second sql.DB.
//
// WithTxLock and WithConnLock take one connection each, on which fn works, when they hold the lock
// or wait for another process.
//
// A connection goes back to the pool only if the server has said that its locks are released, and
// the settings that were made for them RESET. In doubt it is closed.
//
// # Observing
//
// An [Observer] is told how long acquisitions wait, how long locks are held, and of each loss. The
// module github.com/pgadvisory/advisory/otel makes OpenTelemetry's metrics and spans of it. The
// [Logger] has what cannot be returned as an error. On the server, pg_stat_activity shows the
// names of keys in a comment before each statement that waits, and before heartbeats.
//
// # Drivers, poolers, standbys
//
// With lib/pq and pgx's stdlib, statements for locks run on the caller's goroutine. On a
// connection that fn uses, and with any other driver, each has a goroutine of its own: slower, and
// otherwise the same. Waits and heartbeats go past a wrapper that hands out the driver's
// connection, as otelsql and dd-trace-go do.
//
// Behind a pooler in transaction mode, only WithTxLock at READ COMMITTED and AcquireTx exclude
// anybody. On a standby no lock is granted. Check finds both.
package advisory
