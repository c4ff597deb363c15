package manager

import (
	"context"
	"time"

	"github.com/pgadvisory/advisory/internal/keyqueue"
	"github.com/pgadvisory/advisory/internal/session"
)

// turnBound is how long a waiter keeps its turn while it waits for a connection of a limited pool: those
// who have the connections may wait for the turn.
const turnBound = 250 * time.Millisecond

// A dedicated is an acquisition of one lock on a session of its own.
type dedicated struct {
	*acquisition
	q   *queue
	w   *waiter
	has bool // it has its turn in q; openInTurn's timer may end that, and openInTurn waits for it
}

// Dedicated takes the lock of r's only key on a session of its own, for use. It waits in the key's
// queue first, without a connection. lock then takes the lock on the session; since is when Dedicated
// was called. The caller calls done when the session has ended. The error is a *Failure.
func Dedicated(ctx context.Context, r *Request, use session.Use, lock func(ctx context.Context, s *session.Session, since time.Time) error) (s *session.Session, done func(), err error) {
	d := &dedicated{acquisition: newAcquisition(ctx, r)}
	ctx, d.at = d.ctx, r.Keys[0]
	defer d.end(nil)
	defer func() {
		d.forgetWait()
		if s == nil { // also if the driver panics
			d.leave()
		}
		if err != nil {
			err = d.failure(err)
		}
	}()
	if err := d.enter(); err != nil {
		return nil, nil, err
	}
	s, err = d.keepTrying(
		func(ctx context.Context) (*session.Session, error) { return d.open(ctx, use) },
		func(s *session.Session) error {
			s.Shared = r.Shared
			d.equip(s)
			return lock(ctx, s, d.began)
		})
	if err == nil {
		d.own()
	}
	return s, d.leave, err
}

// own notes that the caller has the lock.
func (d *dedicated) own() {
	d.m.mu.Lock()
	defer d.m.mu.Unlock()
	d.q.GrantedDedicated(d.w)
}

// enter waits for the turn.
func (d *dedicated) enter() error {
	d.w = &waiter{Shared: d.Shared, NoWait: d.NoWait, Dedicated: true}
	var t turn
	var err error
	if d.q, t = d.m.enter(d.at, d.w); t.To == keyqueue.Await {
		t, err = d.awaitTurn(d.q, d.w)
	}
	d.has = t.To == keyqueue.Ask
	if t.To == keyqueue.Refuse {
		err = session.ErrRefused
	}
	return err
}

// leave ends the turn, or the hold.
func (d *dedicated) leave() {
	if d.has {
		d.has = false
		d.m.done(d.at, d.w, nil)
	}
}

// open opens a session. If a limited pool has no connection within turnBound, others have their turn.
func (d *dedicated) open(ctx context.Context, use session.Use) (*session.Session, error) {
	for {
		if !d.has { // it was left, by this attempt or by one that failed
			if err := d.enter(); err != nil {
				return nil, err
			}
		}
		if d.pool.DB.Stats().MaxOpenConnections == 0 {
			return d.pool.Open(ctx, d.Log, use) // which waits for nobody
		}
		s, inTurn, err := d.openInTurn(ctx, use)
		if err != nil || inTurn || d.enterNow() {
			return s, err
		}
		s.HandBack()
	}
}

// openInTurn opens a session, and leaves the turn after turnBound.
func (d *dedicated) openInTurn(ctx context.Context, use session.Use) (s *session.Session, inTurn bool, err error) {
	left := make(chan struct{})
	late := time.AfterFunc(turnBound, func() {
		defer close(left)
		d.leave()
	})
	defer func() { // also if the driver panics
		if inTurn = late.Stop(); !inTurn {
			<-left
		}
	}()
	s, err = d.pool.Open(ctx, d.Log, use)
	return s, inTurn, err
}

// enterNow takes the turn if it is to be had at once.
func (d *dedicated) enterNow() bool {
	d.w = &waiter{Shared: d.Shared, NoWait: true, Dedicated: true}
	d.m.mu.Lock()
	defer d.m.mu.Unlock()
	defer d.m.tidyLocked(d.at)
	d.q = d.m.queueLocked(d.at)
	d.has = d.q.Enter(d.w, time.Now()).To == keyqueue.Ask
	return d.has
}
