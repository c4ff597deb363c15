package advisory

import (
	"context"
	"errors"
	"strings"

	"github.com/pgadvisory/advisory/internal/manager"
	"github.com/pgadvisory/advisory/internal/pgsql"
	"github.com/pgadvisory/advisory/internal/session"
)

// Every error of this package says the operation and the key, and matches, with
// errors.Is, one of these where it applies, and the error of the driver or the context
// beneath it.
var (
	// ErrNotAcquired: the lock was not taken and is not held, because NoWait found
	// it taken, Timeout was over (then errors.As finds an error whose Timeout method
	// says so), or the context ended while waiting (then errors.Is finds the context's
	// error too).
	ErrNotAcquired = errors.New("advisory: lock not acquired")

	// ErrLost: the lock was acquired, and it cannot be shown that it was held to
	// the end. The session died, did not answer, or is no longer the one that
	// took the lock. Another process may have held the lock in the meantime.
	ErrLost = errors.New("advisory: lock lost")

	// ErrReentrant: the context says that its own caller holds the lock already.
	// Waiting for it would last for ever.
	ErrReentrant = errors.New("advisory: lock already held by this caller")

	// ErrDeadlock: the wait was part of a deadlock, and has ended. The lock is not held.
	//
	// A wait is part of the search if its ctx is the one that a function or a [Lock] of this package has
	// given out: such a ctx carries the locks that its caller holds. A deadlock of waits in one process,
	// through one *sql.DB, is found when the last of them begins, or within two seconds if one of them
	// is for a shared lock. A deadlock between processes is found within some three seconds, and ends
	// the wait that began last. Waits tell of each other in the comments of their statements, and read
	// these once a second in pg_stat_activity. A wait whose caller holds nothing costs nothing.
	//
	// Not found is a deadlock
	//   - of processes that connect as different roles, unless these are members of pg_read_all_stats;
	//   - of callers that do not pass on the ctx that they were given, or that hold a lock by
	//     [AcquireConn] or [AcquireTx], which give out none;
	//   - with locks of other programs, or that are taken by SQL;
	//   - between processes, if two of the waits try with pauses: those of AcquireTx, of a
	//     pool that has no connection to spare, and on a server without PL/pgSQL;
	//   - between processes, while other holders in its own process keep a wait in the queue there.
	//
	// A function that waits on another goroutine with its ctx, and itself goes on to return, is the
	// exception: a wait may be ended though that return would have freed the lock. AcquireConn and
	// AcquireTx take it that conn and tx are of the database of the locks that ctx carries.
	//
	// The server's own error (SQLSTATE 40P01) is ErrDeadlock, too, and so is the end of an AcquireTx
	// whose transaction the holder is found to wait for.
	ErrDeadlock = errors.New("advisory: deadlock detected")
)

// A lockError is the error of one operation on one key, or several.
type lockError struct {
	op   string // "acquire", "release", "hold"
	key  string
	msg  string
	errs []error // what errors.Is and errors.As find
}

func (e *lockError) Error() string {
	var b strings.Builder
	b.WriteString("advisory: ")
	b.WriteString(e.op)
	if e.key != "" {
		b.WriteByte(' ')
		b.WriteString(e.key)
	}
	b.WriteString(": ")
	b.WriteString(e.msg)
	return b.String()
}

func (e *lockError) Unwrap() []error { return e.errs }

// acquireError returns the error of a failed acquisition, which err has ended.
func acquireError(ctx context.Context, keys []Key, cfg *config, err error) error {
	hint := ""
	if f := (*manager.Failure)(nil); errors.As(err, &f) {
		hint, err = f.Hint, f.Cause
	}
	e := &lockError{op: "acquire", key: keyList(keys)}
	var deadlock manager.Deadlock
	switch {
	case errors.Is(err, session.ErrRefused):
		e.msg = "not acquired: " + err.Error()
		e.errs = []error{ErrNotAcquired}
	case errors.Is(err, session.ErrTimeout):
		e.msg = "not acquired within " + cfg.timeout.String()
		e.errs = []error{ErrNotAcquired, err}
	case ctx.Err() != nil:
		e.msg = "not acquired: " + context.Cause(ctx).Error()
		e.errs = []error{ErrNotAcquired, ctx.Err(), context.Cause(ctx), err}
	case errors.As(err, &deadlock):
		e.msg = deadlock.Error()
		e.errs = []error{ErrDeadlock, deadlock}
	case errors.Is(err, session.ErrHeld):
		e.msg = err.Error()
		e.errs = []error{ErrReentrant}
	case errors.Is(err, session.ErrDeadlock):
		e.msg = err.Error()
		e.errs = []error{ErrDeadlock}
	case pgsql.State(err) == pgsql.DeadlockDetected:
		e.msg = pgsql.Explain(err)
		e.errs = []error{ErrDeadlock, err}
	default:
		e.msg = pgsql.Explain(err)
		e.errs = []error{err}
	}
	if hint != "" {
		e.msg += ": " + hint
	}
	return e
}

// lostError returns the error of locks that were held and are lost.
func lostError(op string, keys []Key, cause error) error {
	errs := []error{ErrLost, cause}
	if errors.Is(cause, session.ErrNotHeld) {
		errs = errs[:1]
	}
	return &lockError{op: op, key: keyList(keys), msg: "lock lost: " + pgsql.Explain(cause), errs: errs}
}

// join is errors.Join, but leaves a lone error as it is.
func join(a, b error) error {
	switch {
	case a == nil:
		return b
	case b == nil:
		return a
	default:
		return errors.Join(a, b)
	}
}
