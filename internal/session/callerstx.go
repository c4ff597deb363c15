package session

import (
	"context"
	"database/sql"
	"time"

	"github.com/pgadvisory/advisory/internal/pgsql"
)

const (
	// txPauseMax is how long a try in a transaction of the caller's pauses at most.
	txPauseMax = 100 * time.Millisecond

	// deadlockPause is the time before each question whether the holder waits for the transaction. It is
	// PostgreSQL's default deadlock_timeout.
	deadlockPause = time.Second
)

// ErrDeadlock says that the holder of the lock waits for the transaction of its caller.
var ErrDeadlock = error(verdict{msg: "the holder of the lock waits for this transaction: deadlock"})

// LockTx takes the lock of k in a transaction of the caller's, by trying again and again. CREATE
// INDEX CONCURRENTLY that has met the transaction while it waited would wait for all of it. waiting is
// called when a try is refused, and may end ctx.
func LockTx(ctx context.Context, tx *sql.Tx, k pgsql.Key, shared, noWait bool, waiting func()) error {
	c := callersTx{tx: tx, sender: newSender()}
	lookAt := time.Now().Add(deadlockPause)
	suspect := false
	pauses := NewBackoff(PauseMin, txPauseMax)
	for {
		last := timedOut(ctx) // it tries once more then
		if ctx.Err() != nil && !last {
			return context.Cause(ctx)
		}
		rows, err := c.exec(ctx, pgsql.TryCallersTx(k, shared))
		switch {
		case err != nil:
			return err
		case rows == pgsql.OnStandby:
			return ErrStandby
		case rows > 0:
			return nil
		case noWait:
			return ErrRefused
		case last:
			return ErrTimeout
		}
		waiting()
		pauses.Pause(ctx)
		if time.Now().Before(lookAt) || ctx.Err() != nil {
			continue
		}
		deadlock, err := c.deadlocked(ctx, k)
		switch {
		case err != nil:
			return err
		case deadlock && suspect: // twice: it is no moment in a hand-off
			return ErrDeadlock
		}
		suspect = deadlock
		lookAt = time.Now().Add(deadlockPause)
	}
}

// A callersTx sends statements in a transaction of the caller's.
type callersTx struct {
	tx     *sql.Tx
	sender Sender
}

func (c *callersTx) exec(ctx context.Context, query string) (rows int64, err error) {
	return Run(ctx, &c.sender, AnswerBound, 0, func(ctx context.Context) (int64, error) {
		return rowsAffected(c.tx.ExecContext(ctx, query))
	})
}

// deadlocked tells whether a holder of the lock waits for this transaction. It asks under a
// savepoint: a question that fails must not cost the transaction. The error is that of a
// transaction that may be lost all the same.
func (c *callersTx) deadlocked(ctx context.Context, k pgsql.Key) (bool, error) {
	if _, err := c.exec(ctx, pgsql.Savepoint); err != nil {
		return false, err
	}
	rows, err := c.exec(ctx, pgsql.Deadlock(k))
	if err != nil && pgsql.State(err) == "" {
		return false, err
	}
	_, err = c.exec(ctx, pgsql.RollbackToSavepoint)
	return rows > 0, err
}
