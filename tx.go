package advisory

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"time"
)

// WithTxLock runs fn in a transaction that holds the lock of key: BEGIN, lock, fn,
// COMMIT. The work and the lock end together, on one session, so that nothing
// fn does in tx can happen without the lock: use it where all of the work is in
// this database. If fn returns an error, or panics, the transaction is rolled back.
//
// At READ COMMITTED it takes a transaction-scoped lock, the only kind that works
// behind a transaction pooler. At REPEATABLE READ and above it takes a session-level
// lock on the same connection before BEGIN and releases it after COMMIT: the lock
// statement would otherwise fix the snapshot before the lock is granted, and fn
// would read what was there before the last holder's work (PostgreSQL manual,
// section "Transaction Isolation").
//
// It uses one connection, which it takes when no other caller in this process holds key
// through db, or asks for it: until then it waits without one.
//
// A nil error means: fn returned nil, and the transaction was committed, under the
// lock. fn must not commit or roll back tx. It takes the options Shared, NoWait,
// Timeout, TxOptions, HolderTimeout, Logger and Observe; errors are as with [WithLock], and
// the driver's for BEGIN and COMMIT. There is no heartbeat. HolderTimeout has no
// default here; if it is given, the server ends the transaction once it has waited
// for a statement for that long (idle_in_transaction_session_timeout). If the process dies while a statement runs, the
// server notices within about a second (client_connection_check_interval).
func WithTxLock(ctx context.Context, db *sql.DB, key Key, fn func(context.Context, *sql.Tx) error, opts ...Option) error {
	keys := []Key{key}
	c := call{function: "WithTxLock", options: txOptions, db: db, missing: missing("db", db == nil, "fn", fn == nil)}
	cfg, err := c.prepare(ctx, keys, opts)
	if err != nil {
		return err
	}
	ctx, o := observe(ctx, c.function, keys, &cfg)
	a := acquisition{attempts: newAttempts(ctx, db, keys, &cfg), hub: hubOf(db)}
	turn, err := a.enterApart(key)
	if err != nil {
		_, err = o.acquired(ctx, a.error(err), nil)
		return err
	}
	defer turn.leave()
	a.turn = turn
	var t *txn
	oneSnapshot := cfg.txOptions.Isolation > sql.LevelReadCommitted
	s, err := a.keepTrying(func(s *session) error {
		attempt := &txn{s: s, cfg: &cfg, oneSnapshot: oneSnapshot}
		s.settings.checks = !s.refusals().check
		s.unwind = func() { _ = attempt.rollback() }
		t = attempt
		err := t.beginLocked(ctx, key, a.began, a.deadline)
		oneSnapshot = t.oneSnapshot
		return err
	})
	holdCtx, err := o.acquired(ctx, a.error(err), func() { _ = t.rollback(); s.discard() })
	if err != nil {
		return err
	}
	fnCtx, cancel := context.WithCancel(holdCtx)
	m := new(marked)
	m.mark(fnCtx, db, keys)
	m.token.run, m.token.target = &s.runner, t.tx
	return t.run(ctx, keys, o, func() error {
		defer cancel()
		defer m.ended.Store(true)
		return fn(m, t.tx)
	})
}

// A txn is a transaction of WithTxLock, on a session of ours.
type txn struct {
	s           *session
	cfg         *config
	oneSnapshot bool // REPEATABLE READ and above: the lock is the session's

	// tx has a context of its own. At the end of the caller's, database/sql would roll back in its
	// own time, and close the connection.
	tx     *sql.Tx
	failed error              // of BEGIN: there is no tx
	abort  context.CancelFunc // ends the context of tx

	rolledBack sync.Once
	unclean    error // of the rollback
}

// beginLocked begins the transaction and acquires the lock. After an error, rollback is due.
func (t *txn) beginLocked(ctx context.Context, k Key, since, deadline time.Time) error {
	if !t.oneSnapshot {
		if err := t.beginThenLock(ctx, k, since, deadline); err != nil {
			return err
		}
	}
	if t.oneSnapshot {
		if err := t.s.acquire(ctx, k, t.cfg.noWait, since, deadline); err != nil {
			return err
		}
		if err := t.begin(ctx, deadline); err != nil {
			return err
		}
		if silence := t.silence(); silence != "" {
			if _, err := t.s.execLeft(ctx, answerWithin(0, deadline), silence, k, false); err != nil {
				return err
			}
		}
	}
	return ctx.Err() // a grant that comes too late is not used
}

// beginThenLock takes the transaction-scoped lock. If it finds that the transaction
// has one snapshot, it sets oneSnapshot and leaves nothing behind.
func (t *txn) beginThenLock(ctx context.Context, k Key, since, deadline time.Time) error {
	t.s.on = inTx
	t.s.restart = restartStatement + t.silence()
	if err := t.begin(ctx, deadline); err != nil {
		return err
	}
	try := tryTxStatement
	if t.cfg.txOptions.Isolation == sql.LevelDefault {
		try = tryFirstStatement
	}
	rows, err := t.s.execLeft(ctx, answerWithin(0, deadline), t.silence()+t.s.settings.checkStatement()+try(k, t.s.shared), k, false)
	switch {
	case t.s.refusesCheck(err):
		if err := t.rollbackWithin(ctx, deadline); err != nil {
			return err
		}
		return t.beginThenLock(ctx, k, since, deadline)
	case err != nil || rows == 1:
		return err
	case rows == 2:
		t.oneSnapshot, t.s.on, t.s.restart = true, onOwn, ""
		return t.rollbackWithin(ctx, deadline)
	case t.cfg.noWait:
		return errRefused
	}
	return t.s.waitOrTry(ctx, k, since, deadline)
}

// silence is put before a statement, and has the server end a transaction that has fallen silent.
func (t *txn) silence() string {
	if !t.cfg.given.has(optHolderTimeout) {
		return ""
	}
	// SET takes no snapshot.
	return "SET LOCAL idle_in_transaction_session_timeout = " + milliseconds(t.cfg.holderTimeout) + "; "
}

func (t *txn) begin(ctx context.Context, deadline time.Time) error {
	txCtx, abort := context.WithCancel(context.WithoutCancel(ctx))
	t.tx, t.failed, t.abort, t.rolledBack, t.unclean = nil, nil, abort, sync.Once{}, nil
	bound := answerWithin(0, deadline)
	return t.s.runLeft(ctx, bound, func(ctx context.Context, _ *caller) error {
		var tx *sql.Tx
		err := t.s.runAside(ctx, bound, func(context.Context) (err error) {
			tx, err = t.s.conn.BeginTx(txCtx, t.cfg.txOptions)
			return err
		})
		if err != nil {
			abort()                                   // a driver that returns too late has begun nothing
			if sqlState(err) == featureNotSupported { // lib/pq's BEGIN READ WRITE
				err = fmt.Errorf("%w: %w", errStandby, err)
			}
			t.failed = fmt.Errorf("begin: %w", err)
			return t.failed
		}
		t.tx = tx
		return nil
	})
}

// rollback rolls back, once, if the transaction has begun. If it cannot be sure that the server has
// rolled back, the session is broken. It does not wait for a driver that does not return.
func (t *txn) rollback() error { return t.rollbackBound(context.Background(), releaseBound) }

// rollbackWithin is rollback for one who goes on, until then or the end of ctx.
func (t *txn) rollbackWithin(ctx context.Context, deadline time.Time) error {
	late, cancel := lateContext(ctx)
	defer cancel()
	return t.rollbackBound(late, answerWithin(0, deadline))
}

func (t *txn) rollbackBound(ctx context.Context, bound time.Duration) error {
	t.rolledBack.Do(func() {
		t.unclean = t.s.do(ctx, bound, func(context.Context) error {
			if t.tx == nil {
				return t.failed
			}
			return t.tx.Rollback()
		})
		if t.abort != nil {
			t.abort()
		}
		t.s.broken = t.s.broken || t.unclean != nil
	})
	return t.unclean
}

// run runs fn, and ends the transaction and the session whatever becomes of fn.
func (t *txn) run(ctx context.Context, keys []Key, o *observation, fn func() error) (err error) {
	// As database/sql does at the end of a transaction's context.
	stop := context.AfterFunc(ctx, func() { _ = t.rollback() })
	returned := false
	defer func() {
		var ending error
		if returned && err == nil {
			ending = t.commit(ctx, stop, keys)
		} else {
			stop()
			unclean := t.rollback()
			ending = t.end(keys)
			if unclean != nil && ctx.Err() == nil {
				t.cfg.logger.Warn("advisory: session discarded, because its transaction could not be rolled back", "key", keyList(keys), "error", unclean)
			}
		}
		o.holdEnd(ending)
		err = join(err, ending)
	}()
	err = fn()
	returned = true
	return err
}

// commit commits, and ends the session. stop stops the rollback at the end of ctx.
func (t *txn) commit(ctx context.Context, stop func() bool, keys []Key) error {
	var err error
	if stop() && ctx.Err() == nil { // stop may come before the rollback that ctx has begun
		defer context.AfterFunc(ctx, t.abort)()
		err = t.s.do(ctx, 0, func(context.Context) error { return t.tx.Commit() })
		t.abort()
		// The server's own error means that it has rolled back, and is ready for more.
		t.s.broken = err != nil && (sqlState(err) == "" || sessionGone(err))
	} else {
		_ = t.rollback()
		err = context.Cause(ctx)
	}
	lost := t.end(keys)
	if err == nil {
		return lost
	}
	msg := err.Error()
	if errors.Is(err, sql.ErrTxDone) && ctx.Err() == nil {
		msg += " (by fn, which must leave that to WithTxLock)"
	}
	errs := []error{err}
	if ctx.Err() != nil {
		errs = append(errs, ctx.Err()) // err may be its cause alone
	}
	return join(&lockError{op: "commit", key: keyList(keys), msg: msg, errs: errs}, lost)
}

// end ends the session, whose transaction has ended. It returns an error if there
// was a session-level lock, and it had not been held.
func (t *txn) end(keys []Key) error {
	switch {
	case t.s.broken:
		t.s.discard()
	case !t.oneSnapshot:
		t.s.handBack()
	default:
		err := t.s.release()
		if errors.Is(err, errNotHeld) {
			return lostError("release", keys, err)
		}
		if err != nil {
			// No news about the transaction: it has ended on the same session.
			t.cfg.logger.Warn("advisory: session discarded, because its lock could not be released", "key", keyList(keys), "error", err)
		}
	}
	return nil
}

// AcquireTx takes the transaction-scoped lock of key in the caller's transaction,
// which holds it until COMMIT or ROLLBACK (or until it is rolled back to a savepoint
// that is older than the lock). It works behind a transaction pooler.
//
// It takes the options Shared, NoWait, Timeout, Logger and Observe. tx stays usable after any
// error that ends a wait: NoWait, Timeout, the end of ctx, a deadlock; but for one under which the server does not
// answer. Its settings stay as they are.
//
// It does not wait in the server's queue, but tries again after pauses that grow to 100 ms.
// CREATE INDEX CONCURRENTLY, having met a transaction in the middle of a statement, waits
// for all of the transaction, which would wait for the lock: if the lock's holder builds the index,
// for ever. So those who do wait in the queue go first; where many compete for a key, use [WithTxLock].
// If the holder is found to wait for tx, for a row that it has locked, say, the error
// matches [ErrDeadlock], after some two seconds.
//
// At REPEATABLE READ and above, tx reads what there was before its first statement,
// and this may be its first: take the lock with [WithTxLock], or a session-level lock
// before BEGIN, to read what the last holder wrote.
//
// If ctx carries key already, the result is [ErrReentrant] even if that was acquired
// on another database: tx does not tell.
func AcquireTx(ctx context.Context, tx *sql.Tx, key Key, opts ...Option) error {
	keys := []Key{key}
	c := call{function: "AcquireTx", options: acquireOptions, missing: missing("tx", tx == nil, "", false)}
	cfg, err := c.prepare(ctx, keys, opts)
	if err != nil {
		return err
	}
	ctx, o := observe(ctx, c.function, keys, &cfg)
	a := txAcquisition{runner: runner{send: txSend(tx), busy: make(chan struct{}, 1)}, tx: tx, key: key, cfg: &cfg}
	if err = a.acquire(ctx); err != nil {
		// No question for the message: one that takes long would cost the caller's transaction.
		err = acquireError(ctx, keys, &cfg, err, "")
	}
	o.acquireEnd(ctx, err)
	return err
}

const (
	// How long AcquireTx pauses between two tries: at first, and at most.
	tryPauseMin = 5 * time.Millisecond
	tryPauseMax = 100 * time.Millisecond

	// deadlockPause is how long AcquireTx waits before it asks whether the holder waits
	// for it. It is PostgreSQL's default deadlock_timeout.
	deadlockPause = time.Second
)

// A txAcquisition acquires a lock in a transaction of the caller's.
type txAcquisition struct {
	runner
	tx  *sql.Tx
	key Key
	cfg *config
}

func (a *txAcquisition) acquire(ctx context.Context) error {
	deadline := a.cfg.deadline()
	late, cancel := lateContext(ctx)
	defer cancel()
	pause := tryPauseMin
	lookAt := time.Now().Add(deadlockPause)
	suspect := false
	for {
		if err := ctx.Err(); err != nil {
			return err
		}
		rows, err := a.exec(late, answerWithin(0, deadline), tryCallersTxStatement(a.key, a.cfg.shared))
		switch {
		case err == nil && rows == standbyRows:
			return errStandby
		case err != nil && sessionGone(err) && within(1, deadline) <= 0:
			return errors.Join(errTimeout, err)
		case err != nil:
			return err
		case rows > 0:
			return nil
		case a.cfg.noWait:
			return errRefused
		case within(1, deadline) <= 0:
			return errTimeout
		}
		sleep(ctx, within(pause/2+rand.N(pause/2), deadline))
		pause = min(2*pause, tryPauseMax)
		if time.Now().After(lookAt) && ctx.Err() == nil {
			deadlock, err := a.deadlocked(late, deadline)
			if err != nil {
				return err
			}
			if deadlock && suspect { // twice: it is no moment in a hand-off
				return ErrDeadlock
			}
			suspect = deadlock
			lookAt = time.Now().Add(deadlockPause)
		}
	}
}

// deadlocked tells whether a holder of the lock waits for this transaction.
func (a *txAcquisition) deadlocked(ctx context.Context, deadline time.Time) (bool, error) {
	var rows int64 // the question's until aside returns nil
	err := a.aside(ctx, deadline, func(ctx context.Context) (err error) {
		rows, err = a.send(ctx, deadlockStatement(a.key))
		return err
	})
	if err != nil {
		return false, err
	}
	return rows > 0, nil
}

// aside asks a question under a savepoint: one that fails must not cost the transaction.
// It returns an error if the transaction may be lost all the same.
func (a *txAcquisition) aside(ctx context.Context, deadline time.Time, question func(context.Context) error) error {
	if _, err := a.exec(ctx, answerWithin(0, deadline), savepointStatement); err != nil {
		return err
	}
	if err := a.do(ctx, answerWithin(0, deadline), question); err != nil && sqlState(err) == "" {
		return err
	}
	_, err := a.exec(ctx, answerWithin(0, deadline), rollbackToStatement)
	return err
}

// lateContext ends lateBound after ctx. To break off a statement costs the connection, and with it the
// caller's transaction, so an answer that is on its way is waited for.
func lateContext(ctx context.Context) (context.Context, context.CancelFunc) {
	late, cancel := context.WithCancelCause(context.WithoutCancel(ctx))
	stop := context.AfterFunc(ctx, func() {
		sleep(late, lateBound)
		cancel(context.Cause(ctx))
	})
	return late, func() {
		stop()
		cancel(nil)
	}
}
