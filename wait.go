package advisory

import (
	"cmp"
	"context"
	"database/sql/driver"
	"errors"
	"math/rand/v2"
	"strings"
	"sync/atomic"
	"time"
)

// A wait in the server's queue is made of slices: statements that wait for a bounded time, one
// after the other. Whose slice is over goes to the end of the queue.
//
// The longer one has waited, the longer is one's slice. So those at the head of the queue, who
// came there longest ago, are those who have waited longest. With the same slice for all, chance
// would decide, and some would wait for ever.
const (
	sliceMin = 100 * time.Millisecond
	sliceMax = 400 * time.Millisecond

	// sliceAge is the age of a wait whose slices are half-way between the two.
	sliceAge = 10 * time.Second
)

// sliceOf is how long the next slice of a wait takes that has begun then.
func sliceOf(since time.Time) time.Duration {
	age := time.Since(since)
	return sliceMin + time.Duration(float64(sliceMax-sliceMin)*float64(age)/float64(age+sliceAge))
}

// acquire takes the lock of k for one who wants it since then. deadline is the Timeout's, or zero. After any error but
// errRefused and errTimeout the state of the session is unknown.
func (s *session) acquire(ctx context.Context, k Key, noWait bool, since, deadline time.Time) error {
	s.proof = time.Now()
	granted, err := s.try(ctx, k, deadline)
	switch {
	case err != nil:
		return err
	case granted:
	case noWait:
		return errRefused
	default:
		if err := s.waitOrTry(ctx, k, since, deadline); err != nil {
			return err
		}
	}
	s.held = []Key{k}
	if !s.ours {
		return nil // execLeft has seen to what came too late
	}
	// A grant that comes too late is not used.
	return ctx.Err()
}

// waitOrTry waits for the lock of k, which a try has just refused.
func (s *session) waitOrTry(ctx context.Context, k Key, since, deadline time.Time) error {
	s.waited = true
	if !s.refusals().wait {
		if err := s.wait(ctx, k, since, deadline); !s.refused(err) {
			return err
		}
	}
	return s.waitByTrying(ctx, k, deadline)
}

// errRefused, errTimeout and errYield end an acquisition that leaves the session usable.
var (
	errRefused       = errors.New("another holds the lock")
	errTimeout error = timeoutError{}
	errYield         = errors.New("others wait who cannot wait in the server's queue")
)

// A timeoutError can be told from a refusal as context.DeadlineExceeded can be told from
// context.Canceled.
type timeoutError struct{}

func (timeoutError) Error() string { return "timeout" }
func (timeoutError) Timeout() bool { return true }

// errStandby is the error of a lock on a standby.
var errStandby = errors.New("the server is a hot standby: its locks exclude nobody on the primary; connect to the primary (target_session_attrs=read-write)")

// try tries to take the lock of k, and makes the settings with the grant.
func (s *session) try(ctx context.Context, k Key, deadline time.Time) (granted bool, err error) {
	query := tryStatement([]Key{k}, s.shared)
	calls := s.settings.calls()
	armed := s.armed
	switch {
	case s.on == onCalled:
		query = tryCalledStatement(k, s.shared)
	case s.on == inTx:
		query = s.restart + s.settings.checkStatement() + tryTxStatement(k, s.shared)
	case calls != "":
		query = "SELECT " + calls + strings.TrimPrefix(query, "SELECT")
		s.armed = true
	}
	rows, err := s.execLeft(ctx, answerWithin(0, deadline), query, k, false)
	if s.refusesCheck(err) {
		// The lock was taken before the setting was refused.
		if _, err := s.execLate(ctx, deadline, freeStatement); err != nil {
			return false, err
		}
		s.armed = armed
		return s.try(ctx, k, deadline)
	}
	switch {
	case s.on == onCalled && (rows == calledInTx || sqlState(err) == inFailedTransaction):
		return false, errInTransaction
	case s.on == onCalled && rows == calledHeld:
		return false, ErrReentrant
	case s.on == onCalled && rows == standbyRows:
		return false, errStandby
	case err == nil && rows == 0:
		s.armed = armed
	}
	return rows > 0, err
}

// errInTransaction is the error of a session-level lock on a conn that is in a transaction. It would outlive
// that, and to wait for it could end it.
var errInTransaction = errors.New("conn is in a transaction: take the lock before that begins, or use AcquireTx")

// wait waits for the lock of k in the server's queue. A try has just refused it.
func (s *session) wait(ctx context.Context, k Key, since, deadline time.Time) error {
	for {
		granted, err := s.slice(ctx, k, sliceOf(since), deadline)
		if err != nil || granted {
			return err
		}
		if err := poolClosed(s.db); err != nil {
			return err
		}
		if s.enough != nil && s.enough() {
			return errYield
		}
		s.pace(ctx, deadline)
	}
}

// pace keeps slices that end early, by a very short statement_timeout or deadlock_timeout, from
// becoming a busy loop.
func (s *session) pace(ctx context.Context, deadline time.Time) {
	if d := within(sliceMin-time.Since(s.proof), deadline); d > 0 {
		sleep(ctx, d)
	}
}

// slice waits for the lock of k for at most bound, or until deadline. After an error, or the end of
// ctx, the session may hold the lock.
func (s *session) slice(ctx context.Context, k Key, bound time.Duration, deadline time.Time) (granted bool, err error) {
	if err := ctx.Err(); err != nil {
		return false, err
	}
	bound = within(bound, deadline)
	if bound <= 0 {
		return false, errTimeout
	}
	armed, settings := s.armed, s.settings
	switch {
	case s.on == inTx: // whose settings go with it
		settings = sessionSettings{checks: settings.checks}
	case armed:
		settings = sessionSettings{}
	default:
		s.armed = settings.calls() != ""
	}
	s.waitingFor, s.proof = k, time.Now()
	rows, err := s.execLeft(ctx, answerWithin(bound, deadline), waitStatement(s.on, s.restart, k, s.shared, bound, settings), k, true)
	checkRefused := s.refusesCheck(err)
	switch {
	case err == nil && rows == standbyRows:
		return false, errStandby
	case err == nil && rows == 1:
		return true, nil
	case err == nil:
		s.waited, s.armed = true, armed
		return false, nil
	case checkRefused, refusesWait(err), sqlState(err) == queryCanceled:
		// It ended in the moment before its block, or after it: what it got is not known.
		s.armed = armed
		undo := map[place]string{onOwn: freeStatement, onCalled: unlockHeldStatement([]Key{k}, s.shared), inTx: "ROLLBACK AND CHAIN"}[s.on]
		if _, err := s.execLate(ctx, deadline, undo); err != nil {
			return false, err
		}
		if checkRefused || !refusesWait(err) {
			return false, nil
		}
		err = waitRefused{err}
	}
	return false, err
}

// A waitRefused is the error of a server that does not execute the statement that waits: PL/pgSQL is
// gone, say, or this role may not use it. The session is as it was.
type waitRefused struct{ error }

func (e waitRefused) Unwrap() error { return e.error }

func refusesWait(err error) bool {
	state := sqlState(err)
	return strings.HasPrefix(state, "42") || strings.HasPrefix(state, "0A")
}

// refused tells whether err is such an error. The first one of a pool is reported to the Logger.
func (s *session) refused(err error) bool {
	if !errors.As(err, new(waitRefused)) {
		return false
	}
	s.refuse(refusals{wait: true}, "advisory: waits try again and again, because the server does not execute the statement that waits", err)
	return true
}

// refusesCheck tells whether err is that of a server that does not make the setting of checkCall: it
// runs on a platform that cannot, or is no PostgreSQL. Then the session does without.
func (s *session) refusesCheck(err error) bool {
	if !s.settings.checks || sqlState(err) == "" || !strings.Contains(err.Error(), checkInterval) {
		return false
	}
	s.settings.checks = false
	s.refuse(refusals{check: true}, "advisory: a lock may outlive this process until the statement under way ends, because the server does not check its connections", err)
	return true
}

// refuse notes what the server of the pool does not execute. The first time it is reported to the Logger.
func (s *session) refuse(what refusals, message string, err error) {
	before := s.refusals()
	if s.db != nil {
		h := hubOf(s.db)
		h.mu.Lock()
		before = h.refused
		h.refused.wait = before.wait || what.wait
		h.refused.check = before.check || what.check
		h.mu.Unlock()
	}
	if what.wait && !before.wait || what.check && !before.check {
		s.log.Warn(message, "error", err)
	}
}

// refusals are those that are known of the session's pool.
func (s *session) refusals() refusals {
	if s.db == nil {
		return refusals{}
	}
	h := hubOf(s.db)
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.refused
}

// waitByTrying is wait where the server refuses that.
func (s *session) waitByTrying(ctx context.Context, k Key, deadline time.Time) error {
	s.waitingFor = k
	for pause := pollMin; ; pause = min(2*pause, pollMax) {
		d := within(pause/2+rand.N(pause), deadline)
		if d <= 0 {
			return errTimeout
		}
		sleep(ctx, d)
		if err := cmp.Or(ctx.Err(), poolClosed(s.db)); err != nil {
			return err
		}
		if granted, err := s.try(ctx, k, deadline); err != nil || granted {
			return err
		}
		if pause < pollMax && 2*pause >= pollMax { // once: a standby never grants
			// Not by execLeft, to which a row is a grant.
			if rows, err := s.execLate(ctx, deadline, probeStatement); err != nil || rows == standbyRows {
				return cmp.Or(err, errStandby)
			}
		}
	}
}

// execLeft sends a statement that takes the lock of k, or ends by itself before long; as runLeft does. It
// sends nothing once its caller has left. If that happens meanwhile, and the session is not ours, what the statement
// got is unlocked, or the connection closed, before anybody else's statement.
func (s *session) execLeft(ctx context.Context, bound time.Duration, query string, k Key, quiet bool) (int64, error) {
	var rows int64 // the statement's until runLeft returns without its caller having left
	outer := ctx
	err := s.runLeft(ctx, bound, func(ctx context.Context, caller *caller) (err error) {
		rows, err = s.execBy(func(ctx context.Context, query string) (rows int64, err error) {
			rawErr := raw(s.conn, func(dc any) error {
				if caller.hasLeft() {
					return nil
				}
				if quiet {
					dc = unwrap(dc)
				}
				rows, err = execOn(ctx, dc, query)
				if s.ours {
					return nil
				}
				if outer.Err() != nil {
					caller.leave()
				}
				if caller.stays() && !s.abandoned.Load() {
					return nil
				}
				switch state := sqlState(err); {
				case state == inFailedTransaction: // nothing was executed
					return nil
				case err == nil && rows == 1:
					_, err = execOn(ctx, dc, unlockStatement([]Key{k}, s.shared))
				case err == nil && rows == standbyRows, state != "" && !sessionGone(err):
					_, err = execOn(ctx, dc, unlockHeldStatement([]Key{k}, s.shared))
				}
				if err == nil {
					return nil
				}
				// It may hold the lock, and the caller may be about to hand it back to the pool.
				s.noted(err)
				if conn, ok := dc.(driver.Conn); ok {
					_ = conn.Close()
				}
				return driver.ErrBadConn
			})
			return rows, cmp.Or(err, rawErr)
		}, ctx, bound, query)
		return err
	})
	if err != nil {
		return 0, err
	}
	return rows, nil
}

// execLate sends a statement whose answer is waited for a little beyond the end of ctx.
func (s *session) execLate(ctx context.Context, deadline time.Time, query string) (int64, error) {
	late, cancel := lateContext(ctx)
	defer cancel()
	return s.exec(late, answerWithin(0, deadline), query)
}

// A caller waits for a statement, or leaves it.
type caller struct{ state atomic.Int32 }

const (
	callerStays int32 = iota + 1
	callerLeft
)

// stays tells whether the caller has not left. It does not, from then on.
func (c *caller) stays() bool {
	return c.state.CompareAndSwap(0, callerStays) || c.state.Load() == callerStays
}

// leave tells whether the caller may leave, and has.
func (c *caller) leave() bool { return c.state.CompareAndSwap(0, callerLeft) || c.hasLeft() }

func (c *caller) hasLeft() bool { return c.state.Load() == callerLeft }

// runLeft has f, which sends a statement, run when it is its turn. If ctx ends first, it returns at
// once, and f and its turn go on until the answer: to break off a statement would cost the
// connection.
func (s *session) runLeft(ctx context.Context, bound time.Duration, f func(context.Context, *caller) error) error {
	if err := s.take(ctx, bound); err != nil {
		return err
	}
	who := new(caller)
	if ctx.Done() == nil {
		defer s.give()
		return f(ctx, who)
	}
	type result struct {
		err      error
		panicked any
	}
	results := make(chan result, 1)
	go func() {
		var r result
		defer func() {
			r.panicked = recover()
			if !who.stays() && r.panicked != nil {
				panic(r.panicked)
			}
			s.give()
			results <- r
		}()
		r.err = f(context.WithoutCancel(ctx), who)
	}()
	var r result
	select {
	case r = <-results:
	case <-ctx.Done():
		if who.leave() {
			return ctx.Err()
		}
		r = <-results
	}
	if r.panicked != nil {
		panic(r.panicked)
	}
	if who.hasLeft() {
		return ctx.Err()
	}
	return r.err
}
