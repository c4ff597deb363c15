package session

import (
	"cmp"
	"context"
	"errors"
	"sync/atomic"
	"time"

	"github.com/pgadvisory/advisory/internal/pgsql"
)

// A verdict is an error that leaves the state of the session known.
type verdict struct {
	msg     string
	timeout bool
}

func (v verdict) Error() string { return v.msg }

// Timeout makes ErrTimeout known as one to those who ask by this method.
func (v verdict) Timeout() bool { return v.timeout }

// Errors that leave the state of the session known.
var (
	ErrRefused = error(verdict{msg: "another holds the lock"})
	ErrYield   = error(verdict{msg: "others wait who cannot wait in the server's queue"})

	// ErrTimeout is the cause of the end of the context that bounds an acquisition by a Timeout.
	ErrTimeout = error(verdict{"timeout", true})

	// ErrReentrant and ErrInTransaction are those of a session of the caller's. A lock that is taken in a
	// transaction would outlive it, and to wait for it could end the transaction.
	ErrReentrant     = error(verdict{msg: "conn's session holds it already, and one ReleaseConn would leave it behind"})
	ErrInTransaction = error(verdict{msg: "conn is in a transaction: take the lock before that begins, or use AcquireTx"})

	errOneSnapshot = error(verdict{msg: "the transaction has one snapshot for all its statements"})
	ErrWaitRefused = error(verdict{msg: "the server does not execute the statement that waits"})
)

// Errors after which a session is discarded.
var (
	ErrStandby = errors.New("the server is a hot standby: its locks exclude nobody on the primary; connect to the primary (target_session_attrs=read-write)")
	ErrNotHeld = errors.New("this session did not hold it (behind a transaction pooler, use WithTxLock; Check tells)")

	// What fn must not do on its conn.
	ErrLeftOpen   = errors.New("fn left rows or a transaction open on its conn, which has been closed")
	ErrConnClosed = errors.New("fn closed its conn, with the lock on it; the session has been ended")
)

// A wait in the server's queue is made of slices: statements that wait for a bounded time, one
// after the other. With each slice, it goes to the end of the queue.
//
// The slices of older waits are longer, so that these begin anew less often, and come to the head of the
// queue. With the same slice for all, chance would decide, and some would wait for ever.
const (
	sliceMin = 100 * time.Millisecond
	sliceMax = 400 * time.Millisecond

	// sliceAge is the age of a wait whose slices are half-way between the two.
	sliceAge = 3 * time.Second
)

// sliceOf returns the length of the next slice of a wait that began at since.
func sliceOf(since time.Time) time.Duration {
	age := time.Since(since)
	return sliceMin + time.Duration(float64(sliceMax-sliceMin)*float64(age)/float64(age+sliceAge))
}

// How long a wait that tries pauses between two tries: at first, and at most.
const (
	PauseMin = 5 * time.Millisecond
	PauseMax = 250 * time.Millisecond
)

// standbyAfter is after how many refused tries a wait asks whether the server is a standby, which never
// grants. It is some 250 ms.
const standbyAfter = 6

// Refused tells whether the server has refused the lock, so that a wait has begun.
func (s *Session) Refused() bool { return s.refused }

// Sent returns when the last statement that takes a lock went out.
func (s *Session) Sent() time.Time { return s.sent }

// Lock takes the lock of k. The acquisition began at since.
func (s *Session) Lock(ctx context.Context, k pgsql.Key, noWait bool, since time.Time) error {
	granted, err := s.try(ctx, k)
	switch {
	case err != nil:
		return err
	case granted:
	case noWait:
		return ErrRefused
	default:
		if err := s.waitOrTry(ctx, k, since); err != nil {
			return err
		}
	}
	s.held = []pgsql.Key{k}
	if s.callers() {
		return nil
	}
	return Ended(ctx) // a grant that comes too late is not used
}

// Ended returns why ctx has ended, if it has.
func Ended(ctx context.Context) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return nil
}

// timedOut tells whether ctx has ended by a Timeout.
func timedOut(ctx context.Context) bool { return errors.Is(context.Cause(ctx), ErrTimeout) }

// waitOrTry waits for the lock of k. A try has just been refused.
func (s *Session) waitOrTry(ctx context.Context, k pgsql.Key, since time.Time) error {
	s.refused = true
	if !s.pool.Facts.noWaits.Load() {
		s.waiting()
		if err := s.Wait(ctx, k, since); !errors.Is(err, ErrWaitRefused) {
			return err
		}
	}
	return s.waitByTrying(ctx, k)
}

// try tries to take the lock of k, and makes the settings with the grant.
func (s *Session) try(ctx context.Context, k pgsql.Key) (granted bool, err error) {
	if err := Ended(ctx); err != nil {
		return false, err
	}
	made := s.made
	s.sent = time.Now()
	switch s.place {
	case pgsql.OnCallers:
		return s.tryCallers(ctx, k)
	case pgsql.InTx:
		granted, err = s.tryTx(ctx, k)
	default:
		granted, err = s.tryOwn(ctx, k)
	}
	if s.dropCheck(err) { // after it has granted the lock
		s.made = made
		if _, err := s.Exec(ctx, AnswerBound, s.undo(k)); err != nil {
			return false, err
		}
		return s.try(ctx, k)
	}
	return granted, err
}

func (s *Session) tryOwn(ctx context.Context, k pgsql.Key) (granted bool, err error) {
	made := s.made
	s.made = !s.settings.None()
	rows, err := s.Exec(ctx, AnswerBound, pgsql.TryWith(s.settings, k, s.Shared))
	if err == nil && rows == 0 {
		s.made = made
	}
	return rows > 0, err
}

func (s *Session) tryTx(ctx context.Context, k pgsql.Key) (granted bool, err error) {
	rows, err := s.Exec(ctx, AnswerBound, s.restart()+s.settings.SetCheck()+pgsql.TryTx(k, s.Shared))
	if rows == pgsql.OneSnapshot {
		return false, errOneSnapshot
	}
	return rows > 0, err
}

func (s *Session) tryCallers(ctx context.Context, k pgsql.Key) (granted bool, err error) {
	rows, err := s.Exec(ctx, AnswerBound, pgsql.TryCallers(k, s.Shared))
	switch {
	case rows == pgsql.CallersInTx, pgsql.State(err) == pgsql.InFailedTransaction:
		return false, ErrInTransaction
	case rows == pgsql.CallersHeld:
		return false, ErrReentrant
	case rows == pgsql.OnStandby:
		return false, ErrStandby
	}
	return rows > 0, err
}

// restart returns what begins a statement that takes a lock in a transaction. Once the lock has been
// refused, that is a new transaction.
func (s *Session) restart() string {
	switch {
	case s.place != pgsql.InTx:
		return ""
	case !s.refused:
		return s.txIdleTimeout
	default:
		return pgsql.Restart + "; " + s.txIdleTimeout
	}
}

// Wait waits for the lock of k in the server's queue. The acquisition began at since, and a try has
// just been refused.
func (s *Session) Wait(ctx context.Context, k pgsql.Key, since time.Time) error {
	for {
		granted, err := s.slice(ctx, k, sliceOf(since))
		if err != nil {
			return err
		}
		if granted {
			s.held = []pgsql.Key{k}
			return nil
		}
		if err := s.poolClosed(); err != nil {
			return err
		}
		s.waiting()
		if s.Yield != nil && s.Yield() {
			return ErrYield
		}
		// A very short statement_timeout or deadlock_timeout ends slices early. This must not become
		// a busy loop.
		if d := sliceMin - time.Since(s.sent); d > 0 {
			Sleep(ctx, d)
		}
	}
}

func (s *Session) waiting() {
	if s.Waiting != nil {
		s.Waiting()
	}
}

func (s *Session) poolClosed() error {
	if s.callers() {
		return nil
	}
	return s.pool.Closed()
}

// slice waits for the lock of k for at most bound, or until ctx's deadline. After an error, or the
// end of ctx, the session may hold the lock.
func (s *Session) slice(ctx context.Context, k pgsql.Key, bound time.Duration) (granted bool, err error) {
	if deadline, ok := ctx.Deadline(); ok {
		bound = min(bound, time.Until(deadline))
	}
	if err := Ended(ctx); err != nil {
		return false, err
	}
	if bound <= 0 {
		<-ctx.Done()
		return false, context.Cause(ctx)
	}
	made, settings := s.made, s.settings
	switch {
	case s.place == pgsql.InTx: // whose settings go with it
		settings = pgsql.Settings{Check: settings.Check}
	case made:
		settings = pgsql.Settings{}
	default:
		s.made = !settings.None()
	}
	s.sent = time.Now()
	rows, err := s.execLeavable(ctx, bound+AnswerBound, s.comment(k)+pgsql.Wait(s.place, s.restart(), k, s.Shared, bound, settings))
	checkRefused := s.dropCheck(err)
	switch {
	case err == nil && rows == pgsql.OnStandby:
		return false, ErrStandby
	case err == nil && rows == 1:
		return true, nil
	case err == nil:
		s.refused, s.made = true, made
		return false, nil
	case checkRefused, pgsql.RefusesWait(err), pgsql.State(err) == pgsql.QueryCanceled:
		// It ended in the moment before its block, or after it: what it got is not known.
		s.made = made
		if _, err := s.Exec(ctx, AnswerBound, s.undo(k)); err != nil {
			return false, err
		}
		if !checkRefused && pgsql.RefusesWait(err) {
			s.noteFact(&s.pool.Facts.noWaits, "advisory: waits try again and again, because the server does not execute the statement that waits", err)
			return false, ErrWaitRefused
		}
		return false, nil
	default:
		return false, err
	}
}

// comment returns what a statement begins with that is sent for a wait for the lock of k.
func (s *Session) comment(k pgsql.Key) string {
	edges := ""
	if s.Edges != nil {
		edges = s.Edges()
	}
	return pgsql.Comment([]pgsql.Key{k}, edges)
}

// undo returns the statement that frees the lock of k, if a statement that takes it may have got it.
func (s *Session) undo(k pgsql.Key) string {
	switch s.place {
	case pgsql.OnOwn:
		return pgsql.UnlockAll
	case pgsql.InTx:
		return pgsql.Restart
	default:
		return pgsql.UnlockHeld([]pgsql.Key{k}, s.Shared)
	}
}

// dropCheck has the session do without the setting of pgsql.Settings.Check if the server has refused that by
// err. It tells whether it has.
func (s *Session) dropCheck(err error) bool {
	if !s.settings.Check || !pgsql.RefusesCheck(err) {
		return false
	}
	s.settings.Check = false
	s.noteFact(&s.pool.Facts.noChecks, "advisory: a lock may outlive this process until the statement under way ends, because the server does not check its connections", err)
	return true
}

// noteFact notes what the server refuses. The first time, that is reported to the Logger.
func (s *Session) noteFact(fact *atomic.Bool, message string, err error) {
	if !fact.Swap(true) {
		s.log.Warn(message, "error", err)
	}
}

// waitByTrying is Wait where the server refuses that.
func (s *Session) waitByTrying(ctx context.Context, k pgsql.Key) error {
	pauses := NewBackoff(PauseMin, PauseMax)
	for n := 1; ; n++ {
		s.waiting()
		pauses.Pause(ctx)
		if err := cmp.Or(Ended(ctx), s.poolClosed()); err != nil {
			return err
		}
		if granted, err := s.try(ctx, k); err != nil || granted {
			return err
		}
		if n == standbyAfter {
			if rows, err := s.Exec(ctx, AnswerBound, pgsql.Probe); err != nil || rows == pgsql.OnStandby {
				return cmp.Or(err, ErrStandby)
			}
		}
	}
}
