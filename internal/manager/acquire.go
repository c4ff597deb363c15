package manager

import (
	"cmp"
	"context"
	"database/sql"
	"errors"
	"log/slog"
	"slices"
	"time"

	"github.com/pgadvisory/advisory/internal/keyqueue"
	"github.com/pgadvisory/advisory/internal/lockconn"
	"github.com/pgadvisory/advisory/internal/pgsql"
	"github.com/pgadvisory/advisory/internal/session"
)

// A Request is what a caller wants.
type Request struct {
	Keys      []pgsql.Key // sorted
	Shared    bool
	NoWait    bool
	Timeout   time.Duration // 0: none
	Heartbeat time.Duration
	Silence   time.Duration // HolderTimeout
	Log       *slog.Logger

	// Lead: the wait outlives any outage, even one at its start. Before the lock counts as acquired,
	// the server is asked whether it is a primary.
	Lead bool

	Held []pgsql.Key // by the caller
}

// A Failure is the error of an acquisition, with what more is known of its reason.
type Failure struct {
	Cause  error
	Held   bool   // another holds the lock
	Holder string // who does; "": that is not known
	Hint   string
}

func (f *Failure) Error() string { return f.Cause.Error() }
func (f *Failure) Unwrap() error { return f.Cause }

// An acquisition is what one caller does to get its locks.
type acquisition struct {
	attempts
	got     *Locks      // nil: the lock is on a session of the caller's own
	at      pgsql.Key   // the one that it asks for now
	holds   []pgsql.Key // what its caller holds, and what it has acquired
	nested  *nestedWait // nil: it does not wait, or its caller holds nothing
	tries   bool        // it waits by trying again and again, which no statement shows
	end     func(error) // ends ctx, with a cause
	yielded bool        // it has waited in the server's queue, and let others
	slot    bool        // a session has been counted that is not open yet
}

func newAcquisition(ctx context.Context, db *sql.DB, r *Request) *acquisition {
	end := func(error) {}
	if len(r.Held) > 0 || len(r.Keys) > 1 {
		ctx, end = context.WithCancelCause(ctx)
	}
	if r.Timeout > 0 {
		cause := end
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeoutCause(ctx, r.Timeout, session.ErrTimeout)
		end = func(err error) { cause(err); cancel() }
	}
	return &acquisition{attempts: newAttempts(ctx, db, r), holds: r.Held, end: end}
}

// Acquire acquires the locks that r asks for. After an error, which is a *Failure, none is held.
func Acquire(ctx context.Context, db *sql.DB, r *Request, h *lockconn.Holder) (*Locks, error) {
	a := newAcquisition(ctx, db, r)
	a.got = &Locks{m: a.m, holder: h, shared: r.Shared}
	defer a.end(nil)
	for {
		err := a.all()
		if err == nil {
			return a.got, nil
		}
		var lost lockconn.LostError
		if !errors.As(err, &lost) {
			return nil, a.failure(err)
		}
		if a.lives--; a.lives < 0 || errors.Is(err, session.ErrStandby) {
			return nil, a.failure(lost.Cause)
		}
	}
}

// prove returns an error if one of the locks has been lost since its grant, or ctx has ended. The
// first of several may have been granted long ago, while the last were waited for.
func (a *acquisition) prove() error {
	var err error
	for _, h := range a.got.held {
		err = errors.Join(err, h.grant.On.ProveFresh(a.ctx, a.Heartbeat))
	}
	if c := a.got.held[0].grant.On; a.Lead && !c.Watched() {
		err = errors.Join(err, c.Prove(a.ctx))
	}
	cause := a.got.holder.TakeLoss()
	if err != nil && session.Ended(a.ctx) == nil {
		return lockconn.LostError{Cause: err}
	}
	if cause != nil {
		return lockconn.LostError{Cause: cause}
	}
	return session.Ended(a.ctx)
}

// failure returns the error of the acquisition, with the name of the holder where that can be told.
func (a *acquisition) failure(err error) error {
	f := &Failure{Cause: err, Hint: a.hint}
	refused, timeout := errors.Is(err, session.ErrRefused), errors.Is(err, session.ErrTimeout)
	f.Held = refused || timeout && a.waited && a.heldByAnother() && a.away == nil
	switch {
	case a.away != nil:
		f.Hint = ""
		if !errors.Is(err, a.away) {
			f.Hint, f.Cause = a.away.Error(), errors.Join(err, a.away)
		}
	case f.Hint != "" || a.at.Space == pgsql.NoSpace:
	case timeout:
		f.Holder = a.who()
	case refused || session.Ended(a.ctx) != nil:
		f.Holder = a.ours()
	}
	return f
}

// who says who holds the lock, if one query can tell. One is sent at a time, on an idle connection: a
// slow answer would cost a session that holds locks.
func (a *acquisition) who() string {
	ours := a.ours() // before the question, during which it may be released
	var who string
	if a.pool.DB.Stats().Idle > 0 && !a.m.asking.Swap(true) {
		who = a.pool.HeldBy(a.ctx, a.at, func() { a.m.asking.Store(false) })
	}
	return cmp.Or(who, ours)
}

// heldByAnother tells whether another is known to hold the lock.
func (a *acquisition) heldByAnother() bool {
	a.m.mu.Lock()
	defer a.m.mu.Unlock()
	q := a.m.queues[a.at.Lock()]
	return a.refused || q != nil && q.HeldAnywhere()
}

// ours returns "this process" if that is known to hold the lock.
func (a *acquisition) ours() string {
	a.m.mu.Lock()
	defer a.m.mu.Unlock()
	if q := a.m.queues[a.at.Lock()]; q != nil && q.Held() {
		return "this process"
	}
	return ""
}

// all acquires all the locks, or none. A grant that comes too late is not used.
func (a *acquisition) all() (err error) {
	err = session.ErrPanicked
	defer func() {
		if err != nil { // also if the driver panics, or the Logger
			a.giveBack()
		}
	}()
	if len(a.Keys) > 1 {
		if err := a.together(); err != nil {
			return err
		}
	}
	for n := len(a.got.held); n < len(a.Keys); n++ {
		a.holds = append(slices.Clip(a.Held), a.Keys[:n]...)
		if err := a.one(a.Keys[n : n+1]); err != nil {
			return err
		}
	}
	a.at = pgsql.Key{} // it holds them all: a failure from here on has no other holder
	return a.prove()
}

// together tries to acquire all the locks in one statement. If another has one of them, or the session
// is lost, it acquires none and returns nil: the locks are then acquired one by one, in order.
func (a *acquisition) together() error {
	m := a.m
	waiters := make([]waiter, len(a.Keys))
	m.mu.Lock()
	in := 0
	for ; in < len(a.Keys); in++ {
		waiters[in] = waiter{Shared: a.Shared, NoWait: true}
		if !m.queueLocked(a.Keys[in]).EnterIdle(&waiters[in]) {
			break
		}
	}
	m.mu.Unlock()
	defer func() {
		if len(a.got.held) == 0 {
			for i := range in {
				m.gaveUp(a.Keys[i], &waiters[i])
			}
		}
	}()
	if in < len(a.Keys) {
		return nil // others of this process have it, or wait for it
	}
	err := a.try(a.Keys)
	if errors.Is(err, session.ErrRefused) && !a.NoWait || errors.As(err, new(lockconn.LostError)) {
		return nil
	}
	return err
}

// one acquires the lock of one key.
func (a *acquisition) one(keys []pgsql.Key) error {
	a.at = keys[0]
	defer a.forgetWait()
	w := &waiter{Shared: a.Shared, NoWait: a.NoWait}
	q, t := a.m.enter(a.at, w)
	for {
		var err error
		switch t.To {
		case keyqueue.Hold:
			return a.join(q, t.Grant)
		case keyqueue.Refuse:
			return session.ErrRefused
		case keyqueue.Ask:
			return a.ask(keys, q, w)
		case keyqueue.Look:
			t, err = a.look(q, w, t.Grant)
		case keyqueue.Await:
			t, err = a.awaitTurn(q, w)
		}
		if err != nil {
			return err
		}
	}
}
