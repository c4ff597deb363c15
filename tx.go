package advisory

import (
	"cmp"
	"context"
	"database/sql"
	"errors"
	"time"

	"github.com/pgadvisory/advisory/internal/manager"
	"github.com/pgadvisory/advisory/internal/session"
)

// WithTxLock runs fn in a transaction that holds the lock of key: BEGIN, lock, fn, COMMIT. The
// work and the lock end together, on one session, so that nothing that fn does in tx can
// happen without the lock. Use it where all of the work is in this database. If fn returns an
// error, or panics, the transaction is rolled back.
//
// At READ COMMITTED, the default, it takes a transaction-scoped lock, the only kind that works
// behind a transaction pooler. At REPEATABLE READ and above, it takes a session-level lock on
// the same connection before BEGIN and releases it after COMMIT. Otherwise the lock statement
// would fix the snapshot before the lock is granted, and fn would read what was there before
// the last holder's work (PostgreSQL manual, section "Transaction Isolation").
//
// WithTxLock takes one connection, as soon as no other caller in this process holds key
// through db, or asks for it. Until then it waits without one.
//
// A nil error means that fn returned nil, and that the transaction was committed under the
// lock. fn must not commit or roll back tx. Errors are as with [WithLock], and the driver's
// for BEGIN and COMMIT.
//
// It takes the options Shared, NoWait, Timeout, TxOptions, HolderTimeout, Logger and Observe.
// There is no heartbeat. HolderTimeout has no default here. If it is given, the server ends
// the transaction once it has waited that long for a statement
// (idle_in_transaction_session_timeout). If the process dies while a statement runs, the
// server ends the transaction within about a second (client_connection_check_interval).
func WithTxLock(ctx context.Context, db *sql.DB, key Key, fn func(context.Context, *sql.Tx) error, opts ...Option) error {
	keys := []Key{key}
	c := call{function: "WithTxLock", options: txOptions, db: db, missing: cmp.Or(nilArg("db", db == nil), nilArg("fn", fn == nil))}
	cfg, err := c.prepare(ctx, keys, opts)
	if err != nil {
		return err
	}
	ctx, o := observe(ctx, c.function, keys, &cfg)
	var t *session.Tx
	oneSnapshot := cfg.txOptions.Isolation > sql.LevelReadCommitted
	s, done, err := manager.Dedicated(ctx, cfg.request(ctx, db, keys), session.ForTx, func(ctx context.Context, s *session.Session, since time.Time) error {
		t = session.NewTx(s, cfg.txOptions, oneSnapshot, cfg.givenHolderTimeout())
		err := t.Begin(ctx, key.key, cfg.noWait, since)
		oneSnapshot = t.OneSnapshot
		return err
	})
	if err != nil {
		err = acquireError(ctx, keys, &cfg, err)
		o.acquireEnd(ctx, err)
		return err
	}
	defer done()
	ctx = o.acquired(ctx, func() { _ = t.Rollback(); s.Discard() })
	fnCtx, cancel := context.WithCancel(ctx)
	m := new(marked)
	m.mark(fnCtx, db, keys, s, t.Tx())
	return runTx(ctx, t, keys, &cfg, o, func() error {
		defer cancel()
		defer m.ended.Store(true)
		return fn(m, t.Tx())
	})
}

// runTx runs fn, and ends the transaction and the session whatever becomes of fn.
func runTx(ctx context.Context, t *session.Tx, keys []Key, cfg *config, o *observation, fn func() error) (err error) {
	// The end of ctx rolls back, as database/sql does.
	stop := context.AfterFunc(ctx, func() { _ = t.Rollback() })
	returned := false
	result := session.ErrPanicked // of the commit and the release
	defer func() {                // even if the driver panics
		result = join(result, endTx(t, keys, cfg))
		o.holdEnd(result)
		err = join(err, result)
	}()
	defer func() {
		stop()
		commits := returned && err == nil
		if commits && ctx.Err() == nil {
			result = commitError(ctx, keys, t.Commit(ctx))
			return
		}
		unclean := t.Rollback()
		result = nil
		switch {
		case commits:
			result = commitError(ctx, keys, context.Cause(ctx))
		case unclean != nil && ctx.Err() == nil:
			cfg.logger.Warn("advisory: session discarded, because its transaction could not be rolled back", "key", keyList(keys), "error", unclean)
		}
	}()
	err = fn()
	returned = true
	return err
}

// commitError returns the error of a commit that has ended with err.
func commitError(ctx context.Context, keys []Key, err error) error {
	if err == nil {
		return nil
	}
	e := &Error{Op: "commit", Keys: keys, msg: err.Error(), errs: []error{err}}
	switch {
	case ctx.Err() != nil:
		e.errs = append(e.errs, ctx.Err()) // err may be its cause alone
	case errors.Is(err, sql.ErrTxDone):
		e.msg += " (by fn, which must leave that to WithTxLock)"
	}
	return e
}

// endTx ends the session of t, whose transaction has ended. It returns an error if there was a
// session-level lock, and it had not been held.
func endTx(t *session.Tx, keys []Key, cfg *config) error {
	err := t.End()
	if errors.Is(err, session.ErrNotHeld) {
		return lostError("release", keys, err)
	}
	if err != nil {
		// No news about the transaction: it has ended on the same session.
		cfg.logger.Warn("advisory: session discarded, because its lock could not be released", "key", keyList(keys), "error", err)
	}
	return nil
}

// AcquireTx takes the transaction-scoped lock of key in the caller's transaction, which holds
// it until COMMIT or ROLLBACK, or until it is rolled back to a savepoint that is older than
// the lock. It works behind a transaction pooler.
//
// It takes the options Shared, NoWait, Timeout, Logger and Observe. tx stays usable after an
// error that ends a wait (NoWait, Timeout, the end of ctx, a deadlock), unless the server does
// not answer. Its settings stay as they are.
//
// AcquireTx does not wait in the server's queue. It tries again, after pauses that grow to 100
// ms. The reason is CREATE INDEX CONCURRENTLY: if it meets a transaction in the middle of a
// statement, it waits for the whole transaction. If the lock's holder builds the index, the
// two would wait for each other. So those who do wait in the queue go first: where many
// compete for a key, use [WithTxLock]. If the holder is found to wait for tx, because of a row
// that tx has locked, say, the error matches [ErrDeadlock], after some two seconds.
//
// At REPEATABLE READ and above, tx reads what there was before its first statement, and this
// may be its first. To read what the last holder wrote, take the lock with [WithTxLock], or
// take a session-level lock before BEGIN.
//
// If ctx already carries key, the result is [ErrReentrant], even if that lock is in another
// database: tx does not tell.
func AcquireTx(ctx context.Context, tx *sql.Tx, key Key, opts ...Option) error {
	keys := []Key{key}
	c := call{function: "AcquireTx", options: acquireOptions, missing: nilArg("tx", tx == nil)}
	cfg, err := c.prepare(ctx, keys, opts)
	if err != nil {
		return err
	}
	ctx, o := observe(ctx, c.function, keys, &cfg)
	if err = manager.InTx(ctx, tx, cfg.request(ctx, nil, keys)); err != nil {
		err = acquireError(ctx, keys, &cfg, err)
	}
	o.acquireEnd(ctx, err)
	return err
}
