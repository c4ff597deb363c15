package advisory

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/pgadvisory/advisory/internal/manager"
	"github.com/pgadvisory/advisory/internal/pgsql"
	"github.com/pgadvisory/advisory/internal/session"
)

// Every error that this package makes is an [*Error], which names the operation and the keys. It
// matches, with errors.Is, one of these where it applies, and the error of the driver or the
// context beneath it.
var (
	// ErrNotAcquired means that the lock was not taken and is not held. Either another holds it,
	// and the error also matches ErrHeld; or ctx ended, and the error also matches ctx's error; or
	// Timeout was over before the server had said whether another holds it. After a Timeout,
	// errors.As finds an error whose Timeout method returns true.
	ErrNotAcquired = errors.New("advisory: lock not acquired")

	// ErrHeld means that another holds the lock: NoWait was refused, or Timeout was over. It is a
	// kind of ErrNotAcquired. The end of ctx is never ErrHeld, so that "another does the work" and
	// "this process shuts down" cannot be mixed up. Nor is a Timeout that was over before the
	// server had answered, or while it could not be reached. To NoWait, another caller of this
	// process that has just asked for the lock counts as one that holds it.
	ErrHeld = fmt.Errorf("%w: another holds it", ErrNotAcquired)

	// ErrLost means that the lock was acquired, and cannot be shown to have been held to the end.
	// Its session died, did not answer, or is no longer the one that took the lock. Another
	// process may have held the lock in the meantime.
	ErrLost = errors.New("advisory: lock lost")

	// ErrReentrant means that the caller already holds the lock, as ctx says. A wait for it would
	// never end.
	ErrReentrant = errors.New("advisory: lock already held by this caller")

	// ErrDeadlock means that the wait was part of a deadlock, and has ended. The lock is not held.
	//
	// A wait takes part in the search if its ctx is one that a function or a [Lock] of this
	// package has given out: such a ctx carries the locks that its caller holds. A deadlock in one
	// process, through one *sql.DB, is found when the last of its waits begins, or within two
	// seconds if one of them is for a shared lock. A deadlock between processes is found within
	// some three seconds, and ends the wait that began last. Waits tell of each other in the
	// comments of their statements, and read these once a second in pg_stat_activity. A wait whose
	// caller holds nothing costs nothing.
	//
	// These deadlocks are not found:
	//   - of processes that connect as different roles, unless these are members of pg_read_all_stats;
	//   - of callers that do not pass on the ctx that they were given, or that hold a lock by
	//     [AcquireConn] or [AcquireTx], which give out none;
	//   - with locks of other programs, or that are taken by SQL;
	//   - between processes, if two of the waits try with pauses: those of AcquireTx, of a pool that
	//     has no connection to spare, and on a server without PL/pgSQL;
	//   - between processes, while other holders in its own process keep a wait in the queue there.
	//
	// One wait may be ended that is in no deadlock: that of a goroutine which a function has started
	// with its ctx, if the function itself would have returned and freed the lock. AcquireConn
	// and AcquireTx assume that conn and tx are of the database of the locks that ctx carries.
	//
	// The server's own error (SQLSTATE 40P01) is ErrDeadlock, too. So is the end of an AcquireTx
	// whose transaction the holder is found to wait for.
	ErrDeadlock = errors.New("advisory: deadlock detected")
)

// An Error is a failed operation on the locks of keys. Where locks are nested, its Keys tell which
// of them was refused. What fn returns is not made an Error; it is returned as it is.
type Error struct {
	Op     string // "acquire", "hold" (a loss, or a fn that had no connection), "release", "commit", "token of", "look up", "look up locks" or "check"
	Keys   []Key  // all keys of the operation; none for Check and Locks, and for Token without a lock
	Holder string // who holds the lock, for people: "pid 4711", "this process"; "" if that is not known

	msg, hint string
	errs      []error // what errors.Is and errors.As find
}

// Error names the operation and the keys first, and the numbers of named keys last.
func (e *Error) Error() string {
	var b strings.Builder
	b.WriteString("advisory: " + e.Op)
	if len(e.Keys) > 0 {
		b.WriteString(" " + pgsql.Names(bare(e.Keys)))
	}
	b.WriteString(": " + e.msg)
	if e.Holder != "" {
		b.WriteString(": held by " + e.Holder)
	}
	if e.hint != "" {
		b.WriteString(": " + e.hint)
	}
	b.WriteString(pgsql.Numbers(bare(e.Keys)))
	return b.String()
}

// Unwrap returns what the error matches.
func (e *Error) Unwrap() []error { return e.errs }

// An ending is the cause of the end of an acquisition's context. It may be the error of another
// acquisition, and so it does not say that this one was refused, or that its Timeout was over.
type ending struct{ error }

func (e ending) Is(target error) bool {
	return target != ErrHeld && target != session.ErrTimeout && errors.Is(e.error, target)
}

func (e ending) As(target any) bool { return errors.As(e.error, target) }

// acquireError returns the error of a failed acquisition, which err has ended.
func acquireError(ctx context.Context, keys []Key, cfg *config, err error) error {
	e := &Error{Op: "acquire", Keys: keys}
	kind := ErrNotAcquired
	if f := (*manager.Failure)(nil); errors.As(err, &f) {
		e.Holder, e.hint, err = f.Holder, f.Hint, f.Cause
		if f.Held {
			kind = ErrHeld
		}
	}
	var deadlock manager.Deadlock
	switch {
	case errors.Is(err, session.ErrRefused):
		e.msg, e.errs = "not acquired", []error{ErrHeld}
		if e.Holder == "" {
			e.msg += ": " + err.Error()
		}
	case errors.Is(err, session.ErrTimeout):
		e.msg, e.errs = "not acquired within "+cfg.timeout.String(), []error{kind, ending{err}}
	case ctx.Err() != nil:
		cause := context.Cause(ctx)
		e.msg, e.errs = "not acquired: "+cause.Error(), []error{ErrNotAcquired, ctx.Err(), ending{cause}, ending{err}}
	case errors.As(err, &deadlock):
		e.msg, e.errs = deadlock.Error(), []error{ErrDeadlock, deadlock}
	case errors.Is(err, session.ErrDeadlock):
		e.msg, e.errs = err.Error(), []error{ErrDeadlock}
	case errors.Is(err, session.ErrReentrant):
		e.msg, e.errs = err.Error(), []error{ErrReentrant}
	case pgsql.State(err) == pgsql.DeadlockDetected:
		e.msg, e.errs = pgsql.Explain(err), []error{ErrDeadlock, err}
	default:
		e.msg, e.errs = pgsql.Explain(err), []error{err}
	}
	return e
}

// lostError returns the error of locks that were held and are lost.
func lostError(op string, keys []Key, cause error) error {
	errs := []error{ErrLost, cause}
	if errors.Is(cause, session.ErrNotHeld) {
		errs = errs[:1]
	}
	return &Error{Op: op, Keys: keys, msg: "lock lost: " + pgsql.Explain(cause), errs: errs}
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
