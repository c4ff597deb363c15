package session

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"fmt"
	"sync"
	"time"

	"github.com/pgadvisory/advisory/internal/pgsql"
)

// A Tx is a transaction on a session that is borrowed for it, and the lock that it holds.
type Tx struct {
	s           *Session
	opts        *sql.TxOptions
	idleTimeout string // put before a statement; "": HolderTimeout is not given

	// OneSnapshot: at REPEATABLE READ and above the lock is the session's. The lock statement would
	// otherwise fix the snapshot before the lock is granted.
	OneSnapshot bool

	// tx has a context of its own. At the end of the caller's, database/sql would roll back in its
	// own time, and close the connection.
	tx    *sql.Tx            // nil: it has not begun
	abort context.CancelFunc // ends the context of tx

	rolledBack sync.Once
	unclean    error // of the rollback
}

// NewTx returns a transaction that has not begun. The server ends it once it has waited for a
// statement for holderTimeout; 0 is for ever.
func NewTx(s *Session, opts *sql.TxOptions, oneSnapshot bool, holderTimeout time.Duration) *Tx {
	t := &Tx{s: s, opts: opts, OneSnapshot: oneSnapshot}
	if holderTimeout > 0 {
		t.idleTimeout = pgsql.TxIdleTimeout(holderTimeout)
	}
	s.unwind = func() { _ = t.Rollback() }
	return t
}

// Tx returns the transaction, which has begun.
func (t *Tx) Tx() *sql.Tx { return t.tx }

// Begin begins the transaction and takes the lock of k. After an error, the session is to be given
// up, which rolls back.
func (t *Tx) Begin(ctx context.Context, k pgsql.Key, noWait bool, since time.Time) error {
	if !t.OneSnapshot {
		t.s.place, t.s.txIdleTimeout = pgsql.InTx, t.idleTimeout
		if err := t.begin(ctx); err != nil {
			return err
		}
		if err := t.s.Lock(ctx, k, noWait, since); err != errOneSnapshot {
			return err
		}
		t.OneSnapshot, t.s.place = true, pgsql.OnOwn
		if err := t.rollback(ctx); err != nil {
			return err
		}
	}
	if err := t.s.Lock(ctx, k, noWait, since); err != nil {
		return err
	}
	if err := t.begin(ctx); err != nil {
		return err
	}
	if t.idleTimeout != "" {
		if _, err := t.s.Exec(ctx, AnswerBound, t.idleTimeout); err != nil {
			return err
		}
	}
	return Ended(ctx) // a grant that comes too late is not used
}

func (t *Tx) begin(ctx context.Context) error {
	txCtx, abort := context.WithCancel(context.WithoutCancel(ctx))
	t.tx, t.abort, t.rolledBack, t.unclean = nil, abort, sync.Once{}, nil
	tx, err := Run(ctx, &t.s.Sender, AnswerBound, 0, func(context.Context) (*sql.Tx, error) { return t.s.conn.BeginTx(txCtx, t.opts) })
	if err == nil {
		t.tx = tx
		return nil
	}
	abort() // a driver that returns too late has begun nothing
	t.s.worsen(doubtful)
	if pgsql.State(err) == pgsql.FeatureNotSupported { // lib/pq's BEGIN READ WRITE
		err = fmt.Errorf("%w: %w", ErrStandby, err)
	}
	return fmt.Errorf("begin: %w", err)
}

// Rollback rolls back, once, if the transaction has begun. If it cannot be sure that the server has
// rolled back, the session is doubtful. It does not wait for a driver that does not return.
func (t *Tx) Rollback() error { return t.rollback(context.Background()) }

func (t *Tx) rollback(ctx context.Context) error {
	t.rolledBack.Do(func() {
		if t.tx == nil {
			return
		}
		t.unclean = ErrPanicked
		defer func() {
			t.abort()
			if t.unclean != nil {
				t.s.worsen(doubtful)
			}
		}()
		t.unclean = t.s.Do(ctx, ReleaseBound, func(context.Context) error { return t.tx.Rollback() })
	})
	return t.unclean
}

// Commit commits. It is bounded by ctx alone.
func (t *Tx) Commit(ctx context.Context) (err error) {
	err = ErrPanicked
	defer func() {
		t.abort()
		// The server's own error means that it has rolled back, and is ready for more.
		if err != nil && !pgsql.Answered(err) {
			t.s.worsen(doubtful)
		}
	}()
	if t.s.cond.Load() >= gone { // by a panic of Token's in tx, say, for which database/sql would wait for ever
		return driver.ErrBadConn
	}
	defer context.AfterFunc(ctx, t.abort)()
	return t.s.Do(ctx, 0, func(context.Context) error { return t.tx.Commit() })
}

// End ends the session, whose transaction has ended. It returns an error if there was a
// session-level lock that could not be released.
func (t *Tx) End() error {
	switch {
	case t.s.cond.Load() != known:
		t.s.Discard()
	case !t.OneSnapshot:
		t.s.HandBack()
	default:
		return t.s.Release()
	}
	return nil
}
