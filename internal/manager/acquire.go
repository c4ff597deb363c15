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
	DB      *sql.DB     // nil: it is not known, and the caller holds nothing
	Keys    []pgsql.Key // sorted
	Shared  bool
	NoWait  bool
	Timeout time.Duration // 0: none
	Log     *slog.Logger

	// Acquire has the sessions of its locks watched.
	Heartbeat   time.Duration // how often
	IdleTimeout time.Duration // after which the server ends a silent session

	// Lead: the wait outlives any outage, even one at its start. Before the lock counts as acquired,
	// the server is asked whether it is a primary.
	Lead bool

	CallerHolds []pgsql.Key // through DB
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

// An acquisition is what one caller does to get its locks. Acquire collects them in got, and at is the key
// that it has come to. Those who want one lock on a session of its own, or of the caller's (Dedicated,
// OnConn, InTx), have no got, and at is that key.
type acquisition struct {
	*Request
	ctx   context.Context // ends with the Timeout, too
	end   func(error)     // ends ctx, with a cause
	m     *Manager
	pool  session.Pool
	began time.Time

	got     *Locks      // so far
	at      pgsql.Key   // the one that it asks for now; zero: it asks for several, or has them all
	refused bool        // the server has refused the lock: another has it
	waited  bool        // it has begun to wait: another has the lock, or asks for it
	nested  *nestedWait // nil: it does not wait, or its caller holds nothing

	deadLeft    int       // connections in the pool that may still be dead; -1: none has been taken yet
	lossesLeft  int       // how often a common session, or a lock just granted, may still be lost
	missedSince time.Time // when the server was first missed, while waiting
	away        error     // why it cannot be reached; nil: it can, as far as is known
	hint        string    // what to add to the error
	unanswered  bool      // the server did not answer before ctx ended
}

func newAcquisition(ctx context.Context, r *Request) *acquisition {
	end := func(error) {} // only who holds a key, or takes several, can be ended for a deadlock
	if len(r.CallerHolds) > 0 || len(r.Keys) > 1 {
		ctx, end = context.WithCancelCause(ctx)
	}
	if r.Timeout > 0 {
		cause := end
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeoutCause(ctx, r.Timeout, session.ErrTimeout)
		end = func(err error) { cause(err); cancel() }
	}
	m := For(r.DB)
	return &acquisition{Request: r, ctx: ctx, end: end, m: m, pool: m.Pool(r.DB), began: time.Now(), deadLeft: -1, lossesLeft: 3}
}

// Acquire acquires the locks that r asks for. After an error, which is a *Failure, none is held.
func Acquire(ctx context.Context, r *Request) (l *Locks, err error) {
	a := newAcquisition(ctx, r)
	defer a.end(nil)
	defer func() {
		if l == nil { // also if the driver panics, or the Logger
			a.giveBack()
		}
	}()
	for {
		// A new holder each time: the loss of a session may be told late.
		a.got = &Locks{m: a.m, holder: lockconn.Holder{Heartbeat: r.Heartbeat, IdleTimeout: r.IdleTimeout}, shared: r.Shared}
		err := a.all()
		if err == nil {
			return a.got, nil
		}
		a.giveBack()
		var lost lockconn.LostError
		if !errors.As(err, &lost) {
			return nil, a.failure(err)
		}
		if a.lossesLeft--; a.lossesLeft < 0 || errors.Is(err, session.ErrStandby) {
			return nil, a.failure(lost.Cause)
		}
	}
}

// all acquires all the locks: in one statement, if nobody else of this process has one of them or wants
// it, and otherwise one by one, in order. After an error, it may have some of them.
func (a *acquisition) all() (err error) {
	a.at, a.refused = pgsql.Key{}, false // if it begins again
	if waiters := a.enterIdle(); waiters != nil {
		err = a.tryAll(waiters)
	}
	for err == nil && len(a.got.held) < len(a.Keys) {
		err = a.one(a.Keys[len(a.got.held)])
	}
	if err != nil {
		return err
	}
	a.at = pgsql.Key{} // from here on, no other holder is to blame for a failure
	return a.prove()
}

// enterIdle enters the queues of several keys, to ask the server, if nobody else is in them.
func (a *acquisition) enterIdle() []waiter {
	if len(a.Keys) == 1 {
		return nil
	}
	m := a.m
	m.mu.Lock()
	defer m.mu.Unlock()
	if slices.ContainsFunc(a.Keys, func(k pgsql.Key) bool { q := m.queues[k.Unnamed()]; return q != nil && !q.Idle() }) {
		return nil
	}
	waiters := make([]waiter, len(a.Keys))
	for i, k := range a.Keys {
		waiters[i] = waiter{Shared: a.Shared, NoWait: a.NoWait}
		m.queueLocked(k).Enter(&waiters[i], time.Now())
	}
	return waiters
}

// one acquires the lock of k.
func (a *acquisition) one(k pgsql.Key) error {
	a.at = k
	w := &waiter{Shared: a.Shared, NoWait: a.NoWait}
	q, t := a.m.enter(a.at, w)
	for {
		var err error
		switch t.To {
		case keyqueue.Hold:
			return a.join(q, t.Grant)
		case keyqueue.Refuse:
			return cmp.Or(t.Why, session.ErrRefused)
		case keyqueue.Ask:
			return a.ask(w)
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

// prove returns an error if one of the locks has been lost since its grant, or ctx has ended. The
// first of several may have been granted long ago, while the last were waited for.
func (a *acquisition) prove() error {
	var err error
	for i := 0; err == nil && i < len(a.got.held); i++ {
		err = a.got.held[i].grant.On.ProveFresh(a.ctx, a.Heartbeat)
	}
	if err == nil && a.Lead {
		err = a.got.held[0].grant.On.Prove(a.ctx)
	}
	cause := a.got.holder.Lost()
	if err != nil && session.Ended(a.ctx) == nil {
		return err // a LostError
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
	f.Held = refused || timeout && a.waited && a.heldByAnother() && a.away == nil && !a.unanswered
	switch {
	case a.away != nil:
		f.Hint = ""
		if !errors.Is(err, a.away) {
			f.Hint, f.Cause = a.away.Error(), errors.Join(err, a.away)
		}
	case f.Hint != "" || a.at.Space == pgsql.NoSpace: // no holder is to blame
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
	q := a.m.queues[a.at.Unnamed()]
	return a.refused || q != nil && q.HeldAnywhere()
}

// ours returns "this process" if that is known to hold the lock.
func (a *acquisition) ours() string {
	a.m.mu.Lock()
	defer a.m.mu.Unlock()
	if q := a.m.queues[a.at.Unnamed()]; q != nil && q.Held() {
		return "this process"
	}
	return ""
}
