package main

import (
	"context"
	"database/sql"
	"errors"
	"log/slog"
	"os"
	"os/signal"
	"strconv"
	"sync"
	"time"

	"github.com/pgadvisory/advisory"
)

const (
	// tellAfter is how long a wait lasts before it is reported.
	tellAfter = time.Second

	// immortal is how long a killed process group may take to be gone before that is reported.
	immortal = 5 * time.Second
)

// A runner runs a command under locks.
type runner struct {
	flags *runFlags
	keys  []namedKey
	log   *slog.Logger
	db    *sql.DB
	tells bool // somebody watches the wait

	path      string
	argv, env []string

	cancel context.CancelCauseFunc // of the wait

	mu      sync.Mutex
	child   *child    // nil: there is none
	stopped os.Signal // the last one that is to end the command; nil: none

	code int   // exit status of the last child
	lost error // the loss that has ended the last child, and has been reported; nil: none
}

// A stopError is a signal that ends the wait.
type stopError struct{ signal os.Signal }

func (e stopError) Error() string { return "ended by signal: " + e.signal.String() }

// run runs the command, and returns the exit status, and the error that it stands for.
func (r *runner) run(ctx context.Context) (code int, err error) {
	ctx, r.cancel = context.WithCancelCause(ctx)
	defer r.cancel(nil)
	signals := make(chan os.Signal, 16)
	notify(signals)
	defer signal.Stop(signals)
	go func() {
		for s := range signals {
			r.signal(s)
		}
	}()

	held, free := make(chan struct{}), make(chan struct{})
	granted, released := sync.OnceFunc(func() { close(held) }), sync.OnceFunc(func() { close(free) })
	opts := append(r.flags.options(), advisory.Logger(r.log), advisory.Observe(&advisory.Observer{
		AcquireEnd: func(_ context.Context, _ advisory.LockInfo, took time.Duration, err error) {
			if err == nil {
				granted()
				r.log.Info("acquired", "key", list(r.keys), "after", took)
			}
		},
		HoldEnd: func(_ context.Context, _ advisory.LockInfo, took time.Duration, err error) {
			if err == nil {
				r.log.Info("released", "key", list(r.keys), "after", took)
			}
			released()
		},
	}))
	go r.tellWait(ctx, held)

	if r.flags.lead {
		err = advisory.Lead(ctx, r.db, r.keys[0].key, r.lead, opts...)
	} else {
		err = advisory.WithLocks(ctx, r.db, bare(r.keys), r.hold, opts...)
	}
	r.mu.Lock()
	stopped := r.stopped != nil
	r.mu.Unlock()
	if err == nil && !stopped {
		select {
		case <-free:
		case <-ctx.Done(): // a signal, while the lock stays (--at-least)
			err = context.Cause(ctx)
		}
	}
	return r.result(ctx, err)
}

// result returns the exit status for what the package has returned.
func (r *runner) result(ctx context.Context, err error) (int, error) {
	var exit *exitError
	var stop stopError
	r.mu.Lock()
	lost := r.lost != nil
	r.mu.Unlock()
	switch {
	case errors.As(err, &exit):
		return exit.code, exit.err
	case lost:
		return exitLost, nil
	case errors.Is(err, advisory.ErrLost):
		return exitLost, err
	case errors.As(context.Cause(ctx), &stop):
		return exitSignal + signalNumber(stop.signal), nil
	case errors.Is(err, advisory.ErrHeld):
		return r.flags.conflictExitCode, err
	case err != nil:
		return exitNoDatabase, err
	default:
		return r.code, nil
	}
}

// tellWait reports a wait that takes long, once.
func (r *runner) tellWait(ctx context.Context, held <-chan struct{}) {
	after := time.NewTimer(tellAfter)
	defer after.Stop()
	select {
	case <-held:
		return
	case <-ctx.Done():
		return
	case <-after.C:
	}
	level := slog.LevelInfo
	if r.tells {
		level = slog.LevelWarn
	}
	if !r.log.Enabled(ctx, level) {
		return
	}
	soon, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	attrs := []any{"key", list(r.keys)}
	for _, k := range r.keys {
		holders, err := advisory.Holders(soon, r.db, k.key)
		if err == nil && len(holders) > 0 && holders[0].Granted {
			attrs = append(attrs, "holder", describe(holders[0]))
			break
		}
	}
	select {
	case <-held:
	default:
		r.log.Log(ctx, level, "waiting", attrs...)
	}
}

// describe says who holds a lock, in a few words.
func describe(h advisory.Holder) string {
	text := "pid " + strconv.Itoa(h.PID)
	if h.ApplicationName != "" {
		text += " (" + h.ApplicationName + ")"
	}
	if h.ClientAddr != "" {
		text += " at " + h.ClientAddr
	}
	return text
}

// signal forwards s to the command, or else obeys it.
func (r *runner) signal(s os.Signal) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if stops(s) {
		r.stopped = s
	}
	switch {
	case r.child != nil:
		if err := r.child.forward(s); err != nil {
			soon(func() { r.log.Warn("a signal is not forwarded", "signal", s.String(), "error", err) })
		}
	case ends(s):
		r.lost = nil // a loss before this wait is not what ends it
		r.cancel(stopError{s})
	default:
		obey(s)
	}
}

// hold runs the command while ctx, which ends with the lock, has not ended.
func (r *runner) hold(ctx context.Context) error {
	env := r.env
	if r.flags.token {
		token, err := advisory.Token(ctx)
		if err != nil {
			return err
		}
		env = append(env, "ADVISORY_TOKEN="+strconv.FormatInt(token, 10))
	}
	c, err := r.start(ctx, env)
	if err != nil {
		return err
	}
	select {
	case <-c.done:
	case <-ctx.Done():
		r.end(c, context.Cause(ctx))
	}
	r.mu.Lock()
	r.child = nil
	lost := r.lost != nil
	r.mu.Unlock()
	r.code = c.exitCode()
	exited := func() { r.log.Info("exited", "pid", c.pid, "status", r.code) }
	if lost {
		soon(exited)
	} else {
		exited()
	}
	return nil
}

// start starts the command, unless ctx has ended: by a signal, or by a loss.
func (r *runner) start(ctx context.Context, env []string) (*child, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	c, err := startChild(r.path, r.argv, env, r.log)
	if err != nil {
		return nil, startError(r.argv[0], err)
	}
	r.child, r.lost, r.stopped = c, nil, nil
	return c, nil
}

// end ends the command, whose lock is lost, and returns when it is dead.
func (r *runner) end(c *child, cause error) {
	r.mu.Lock()
	r.lost = cause
	r.mu.Unlock()
	c.terminate()
	soon(func() { r.log.Error(cause.Error(), "grace", r.flags.grace) })
	if c.endsWithin(r.flags.grace) {
		return
	}
	go r.log.Warn("the command goes on after SIGTERM, and is killed", "pid", c.pid)
	for err := c.kill(); !c.endsWithin(immortal); err = c.kill() {
		go r.log.Error("the command does not die", "pid", c.pid, "error", err)
	}
}

// soon runs f, which writes a line, and waits a moment for it: standard error may be a pipe that nobody
// reads, and a command whose lock is lost is to end in time all the same.
func soon(f func()) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		f()
	}()
	select {
	case <-done:
	case <-time.After(50 * time.Millisecond):
	}
}

// lead is hold for a leader.
func (r *runner) lead(ctx context.Context) error {
	err := r.hold(ctx)
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.stopped != nil && r.lost != nil { // not to campaign again
		r.cancel(stopError{r.stopped})
	}
	return err
}
