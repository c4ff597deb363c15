package session

import (
	"context"
	"database/sql/driver"
	"errors"
	"sync/atomic"
	"time"

	"github.com/pgadvisory/advisory/internal/pgsql"
)

const (
	// AnswerBound is how long past its own wait a statement may go unanswered before its session is
	// given up.
	AnswerBound = 10 * time.Second

	// ReleaseBound is how long the statement of a release may take, and what may be left then of the one before it.
	ReleaseBound = 5 * time.Second

	// Grace is how long past the end of ctx a statement may go unanswered: to break it off costs the
	// connection. It is also how long the message of a Timeout may take to find the holder.
	Grace = 400 * time.Millisecond

	// abandonAfter is how long a driver may take to return from a statement that has been broken
	// off. Drivers differ: lib/pq asks the server to cancel and reads on, for as long as the network
	// keeps it waiting. Grace and twice abandonAfter make less than a second.
	abandonAfter = 200 * time.Millisecond

	// clearBound is how long the last statement on a connection may take that is to be closed.
	clearBound = time.Second
)

// A condition is what is known of a session's state on the server. It only gets worse.
type condition = int32

const (
	known     condition = iota // what it holds is known
	doubtful                   // what it holds is not known: it can only be closed
	gone                       // the session has ended, or a statement's answer is missing
	abandoned                  // the driver has not returned from a statement: nothing more is sent
)

// A Sender sends statements over one connection: one at a time, from any goroutine, and each of them
// bounded. It knows nothing of what they are.
type Sender struct {
	// sending is full while somebody may send: take fills it, and give empties it. After an abandoned statement,
	// aside empties it, and after Discard nobody does. It is a channel, because a wait for it ends with a context.
	sending chan struct{}

	cond    atomic.Int32 // a condition
	guard   guard
	breaker breaker       // of the driver's connection dc; zero: statements go out on goroutines of their own
	dc      any           // the driver's connection
	grace   time.Duration // how long past the end of ctx a statement may go unanswered
}

func newSender() Sender { return Sender{sending: make(chan struct{}, 1), grace: Grace} }

func (s *Sender) worsen(to condition) {
	for {
		is := s.cond.Load()
		if is >= to || s.cond.CompareAndSwap(is, to) {
			return
		}
	}
}

// An abandonedError is that of a session whose driver has not returned.
type abandonedError struct{}

func (abandonedError) Error() string        { return "the driver has not returned from the statement before" }
func (abandonedError) Is(target error) bool { return target == driver.ErrBadConn }

// take waits for the right to send a statement. The caller gives it back by give.
func (s *Sender) take(ctx context.Context, bound time.Duration) error {
	select {
	case s.sending <- struct{}{}:
		return s.usable()
	default:
	}
	if s.cond.Load() == abandoned {
		return abandonedError{}
	}
	if bound > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeoutCause(ctx, bound, pgsql.NoAnswer{After: bound})
		defer cancel()
	}
	select {
	case s.sending <- struct{}{}:
		return s.usable()
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// usable gives the right to send back if the statement before was abandoned.
func (s *Sender) usable() error {
	if s.cond.Load() == abandoned {
		<-s.sending
		return abandonedError{}
	}
	return nil
}

// give gives back the right to send. That of an abandoned statement comes back when the driver returns.
func (s *Sender) give() {
	if s.cond.Load() != abandoned {
		<-s.sending
	}
}

// Exec sends one statement, when nobody else sends. It returns at most Grace and abandonAfter past
// the end of ctx, or abandonAfter past bound, even if the driver does not; a driver that driver.go knows is
// made to return. A bound of 0 is none. On a connection of the caller's, Grace is longer: see OnConn.
// After an error that is not the server's, the session can only be given up.
func (s *Session) Exec(ctx context.Context, bound time.Duration, query string, args ...int64) (rows int64, err error) {
	return Run(ctx, &s.Sender, bound, len(query), func(ctx context.Context) (int64, error) { return s.send(ctx, direct, query, args) })
}

// ExecQuiet is Exec past the wrappers that trace statements: nobody has asked for this one.
func (s *Session) ExecQuiet(ctx context.Context, bound time.Duration, query string) (rows int64, err error) {
	return Run(ctx, &s.Sender, bound, len(query), func(ctx context.Context) (int64, error) { return s.send(ctx, unwrap, query, nil) })
}

// Run runs f, which sends one statement of length bytes, when nobody else sends. It is bounded like Exec.
func Run[T any](ctx context.Context, s *Sender, bound time.Duration, length int, f func(context.Context) (T, error)) (t T, err error) {
	if err := s.take(ctx, bound); err != nil {
		return t, err
	}
	defer s.give()
	return run(ctx, s, bound, length, f)
}

// Do is Run for an f without a result.
func (s *Session) Do(ctx context.Context, bound time.Duration, f func(context.Context) error) error {
	_, err := Run(ctx, &s.Sender, bound, 0, func(ctx context.Context) (struct{}, error) { return struct{}{}, f(ctx) })
	return err
}

// run is Run for one who has the right to send: on this goroutine, if the statement can be broken off.
func run[T any](ctx context.Context, s *Sender, bound time.Duration, length int, f func(context.Context) (T, error)) (t T, err error) {
	err = ErrPanicked
	defer func() {
		if err == ErrPanicked { // database/sql may never let go of the Conn, so that it cannot be handed back
			s.guard.end()
			s.worsen(gone)
		}
	}()
	if s.breaker.breaks == nil || length > s.breaker.longest {
		return aside(ctx, s, bound, f)
	}
	no := s.guard.begin(func(error) { s.breaker.breaks(s.dc) })
	defer s.guardOver(ctx, no, bound)()
	t, err = f(context.WithoutCancel(ctx))
	if cause := s.guard.end(); cause != nil {
		s.worsen(gone) // even if the answer came: the connection is of no use
		if err != nil {
			err = cause
		}
	}
	return t, s.noted(err)
}

// aside runs f on a goroutine of its own, whose context is ended to break the statement off. If f
// does not return even then, the session is abandoned.
func aside[T any](ctx context.Context, s *Sender, bound time.Duration, f func(context.Context) (T, error)) (t T, err error) {
	inner, cancel := context.WithCancelCause(context.WithoutCancel(ctx))
	defer cancel(nil)
	no := s.guard.begin(cancel)
	defer s.guardOver(ctx, no, bound)()
	defer s.guard.end()
	done := spawn(func() (T, error) { return f(inner) })
	o, returned := outcome[T]{}, true
	select {
	case o = <-done:
	case <-inner.Done():
		o, returned = done.soon()
	}
	if !returned {
		s.worsen(abandoned)
		go func() {
			<-done
			<-s.sending
		}()
		return t, context.Cause(inner)
	}
	t, err = o.result()
	if err != nil && inner.Err() != nil { // otherwise the driver has not cancelled the statement
		// Whatever the driver makes of it: it may report a statement that it has cancelled as the
		// server's error, on a connection that it has closed.
		err = context.Cause(inner)
		s.worsen(gone)
	}
	return t, s.noted(err)
}

// guardOver bounds statement no, more narrowly once ctx ends. end stops it from waiting for that.
func (s *Sender) guardOver(ctx context.Context, no uint64, bound time.Duration) (end func() bool) {
	if bound > 0 {
		s.guard.bound(no, bound, nil)
	}
	if ctx.Done() == nil {
		return func() bool { return true }
	}
	return context.AfterFunc(ctx, func() {
		why := context.Cause(ctx)
		if timedOut(ctx) {
			why = nil
		}
		s.guard.bound(no, s.grace, why)
	})
}

// noted notes an error that says that the session has ended.
func (s *Sender) noted(err error) error {
	if err != nil && pgsql.Gone(err) {
		s.worsen(gone)
	}
	return err
}

// Hasten leaves no more than d to the statement under way.
func (s *Sender) Hasten(d time.Duration) { s.guard.bound(0, d, nil) }

// Interrupt breaks off the statement under way: the session is lost.
func (s *Sender) Interrupt(cause error) {
	s.worsen(gone)
	s.guard.bound(0, 0, cause)
}

// An outcome is how a function on a goroutine of its own has ended.
type outcome[T any] struct {
	value    T
	err      error
	panicked any
}

// ErrPanicked is the error of a driver that panicked, until the panic has propagated.
var ErrPanicked = errors.New("the driver panicked")

// A spawned function's outcome comes when it has ended.
type spawned[T any] chan outcome[T]

// spawn runs f on a goroutine of its own.
func spawn[T any](f func() (T, error)) spawned[T] {
	done := make(spawned[T], 1)
	go func() {
		o := outcome[T]{err: ErrPanicked}
		defer func() {
			o.panicked = recover()
			done <- o
		}()
		o.value, o.err = f()
	}()
	return done
}

// soon waits a moment for the outcome.
func (s spawned[T]) soon() (o outcome[T], ok bool) {
	t := time.NewTimer(abandonAfter)
	defer t.Stop()
	select {
	case o = <-s:
		return o, true
	case <-t.C:
		return o, false
	}
}

// Soon runs f on a goroutine of its own, and waits a moment for it.
func Soon(f func()) {
	done := spawn(func() (struct{}, error) { f(); return struct{}{}, nil })
	o, ok := done.soon()
	if !ok {
		go func() { _, _ = (<-done).result() }() // a panic is not swallowed
	}
	_, _ = o.result()
}

// result returns what the function has, or has the panic propagate.
func (o outcome[T]) result() (T, error) {
	if o.panicked != nil {
		panic(o.panicked)
	}
	return o.value, o.err
}

// execLeavable is ExecQuiet, but returns at once if ctx is canceled. The statement then goes on until
// the answer, and nobody else sends: to break it off would cost the connection. On a connection of
// the caller's, it is ExecQuiet.
func (s *Session) execLeavable(ctx context.Context, bound time.Duration, query string) (int64, error) {
	if ctx.Done() == nil || s.callers() {
		return s.ExecQuiet(ctx, bound, query)
	}
	if err := s.take(ctx, bound); err != nil {
		return 0, err
	}
	// The end of a Timeout is also that of the statement, whose answer is waited for.
	inner, stop := context.WithoutCancel(ctx), func() {}
	if deadline, ok := ctx.Deadline(); ok {
		inner, stop = context.WithDeadlineCause(inner, deadline, pgsql.NoAnswer{After: Grace})
	}
	done := spawn(func() (int64, error) {
		defer s.give()
		defer stop()
		return run(inner, &s.Sender, bound, len(query), func(ctx context.Context) (int64, error) { return s.send(ctx, unwrap, query, nil) })
	})
	select {
	case o := <-done:
		return o.result()
	case <-ctx.Done():
	}
	if ctx.Err() == context.DeadlineExceeded {
		return (<-done).result()
	}
	s.left = true
	go func() { _, _ = (<-done).result() }() // a panic is not swallowed
	return 0, context.Cause(ctx)
}
