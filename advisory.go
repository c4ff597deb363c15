package advisory

import (
	"context"
	"database/sql"
	"runtime"
	"slices"

	"github.com/pgadvisory/advisory/internal/pgsql"
)

// WithLock runs fn while it holds the session-level advisory lock of key, and releases the
// lock afterwards. If another holds the lock, WithLock waits for it first.
//
// A nil error means that fn returned nil, and that the lock was held from before fn began
// until after it ended. If the lock is lost meanwhile, the ctx of fn ends, with a cause that
// matches [ErrLost]. The error of WithLock then matches ErrLost, too, joined with fn's own,
// whether fn looked at its ctx or not. fn is not stopped otherwise: for writes that must not
// come late, see [Token] and [WithTxLock].
//
// If the lock is not acquired, fn does not run. The error matches [ErrHeld] (NoWait or Timeout
// found that another holds the lock), ctx's error, [ErrReentrant], [ErrDeadlock], or the
// driver's error. A wait outlives a restart and a failover of the server. A server that cannot
// be reached at first is an error: WithLock does not wait for its return, but for 30 s at most
// for a connection to be made.
//
// If fn panics or calls runtime.Goexit, the lock is released, and the panic propagates.
//
// fn must not keep its ctx, which ends with it. WithLock takes the options Shared, NoWait,
// Timeout, AtLeast, Heartbeat, HolderTimeout, Logger and Observe. It is safe to call from
// several goroutines.
func WithLock(ctx context.Context, db *sql.DB, key Key, fn func(context.Context) error, opts ...Option) error {
	return new(hold).with(ctx, "WithLock", db, []Key{key}, fn, opts)
}

// WithLocks is [WithLock] for several keys: fn runs while all of them are held. It takes them
// in an order of its own, so that callers who name the same keys in any order do not deadlock
// with each other. Repeated keys count once.
func WithLocks(ctx context.Context, db *sql.DB, keys []Key, fn func(context.Context) error, opts ...Option) error {
	keys = slices.Clone(keys)
	slices.SortStableFunc(keys, func(a, b Key) int { return pgsql.Compare(a.key, b.key) })
	keys = slices.CompactFunc(keys, func(a, b Key) bool { return a.key.Unnamed() == b.key.Unnamed() })
	return new(hold).with(ctx, "WithLocks", db, keys, fn, opts)
}

// Acquire takes the lock that [WithLock] takes, for work that does not fit in one function.
// The caller must call Release. ctx bounds the acquisition alone: its end does not release the
// lock. Acquire takes WithLock's options and returns WithLock's errors.
//
// A Lock that is garbage-collected without a Release is released, with a warning to the
// Logger. That is a safety net: it may be minutes late.
func Acquire(ctx context.Context, db *sql.DB, key Key, opts ...Option) (*Lock, error) {
	h, keys := new(hold), []Key{key}
	c := call{function: "Acquire", options: sessionOptions, db: db, missing: nilArg("db", db == nil), detached: true}
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

// Context returns a context that ends when the lock is released or lost. Its [context.Cause]
// then matches [context.Canceled] or [ErrLost]. It carries the values of Acquire's ctx, and
// the held key, so that to take the key again with it is [ErrReentrant].
//
// The context does not keep the Lock from being garbage-collected.
func (l *Lock) Context() context.Context { return &l.hold.marked }

// Token returns the fencing token of the lock: see the function [Token]. If ctx has ended,
// Token asks nothing. Otherwise ctx does not bound the question: to break it off would lose
// the lock.
func (l *Lock) Token(ctx context.Context) (int64, error) {
	defer runtime.KeepAlive(l)
	return l.hold.askToken(ctx)
}

// Release ends the lock's Context and releases the lock. It takes ten seconds or so at most,
// even if the server cannot be reached. Further calls return the same result. [AtLeast] may
// keep the lock for longer. For a nil Lock, Release returns an error.
//
// A nil error means that the lock was held until now. Any other error matches [ErrLost]. In
// either case this process does not hold the lock any more: a connection on which the release
// failed is closed, and the other locks that it carries are lost with it.
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
