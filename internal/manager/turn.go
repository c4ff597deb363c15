package manager

import (
	"cmp"
	"context"
	"errors"
	"time"

	"github.com/pgadvisory/advisory/internal/keyqueue"
	"github.com/pgadvisory/advisory/internal/lockconn"
	"github.com/pgadvisory/advisory/internal/pgsql"
	"github.com/pgadvisory/advisory/internal/session"
)

func (m *Manager) enter(k pgsql.Key, w *waiter) (*queue, turn) {
	m.mu.Lock()
	defer m.mu.Unlock()
	q, now := m.queueLocked(k), time.Now()
	t := q.Enter(w, now)
	missed := m.missedLocked()
	switch {
	case missed == nil || !w.NoWait:
	case t.To == keyqueue.Await:
		q.Cancel(w, now) // who does not wait does not wait for the server
		return q, turn{To: keyqueue.Refuse, Why: missed}
	case t.To == keyqueue.Refuse && !q.Held(): // by others who wait for the server
		t.Why = missed
	}
	return q, t
}

// done ends the turn of w, who does not hold the grant, or its dedicated hold. why is for those who share its
// answer.
func (m *Manager) done(k pgsql.Key, w *waiter, why error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.queues[k.Unnamed()].Done(w, time.Now(), why)
	m.tidyLocked(k)
}

// sharedError returns err if those who share the answer should have it, too: a refusal, or a time-out, which is not
// for each of them to sit out. Otherwise it returns nil, and the next one asks.
func (a *acquisition) sharedError(err error) error {
	var late interface{ Timeout() bool }
	switch {
	case session.Ended(a.ctx) != nil, errors.As(err, new(lockconn.LostError)): // its own affair
		return nil
	case errors.Is(err, session.ErrRefused), pgsql.IsNoAnswer(err), errors.As(err, &late) && late.Timeout():
		return err
	default:
		return nil
	}
}

// waiting notes that the acquisition has begun to wait: another has the lock, or asks for it. It is called
// again and again while that lasts. A NoWait that shares another's answer does not wait for the lock.
func (a *acquisition) waiting() {
	if !a.NoWait {
		a.waited = true
		a.noteWait()
	}
}

// awaitTurn waits in the queue, without a connection.
func (a *acquisition) awaitTurn(q *queue, w *waiter) (turn, error) {
	glance := time.NewTicker(glanceEvery)
	defer glance.Stop()
	defer a.forgetWait()
	a.waiting()
	var err error
	for err == nil {
		select {
		case t := <-w.Turns:
			a.missedSince = time.Time{}
			return t, nil
		case <-a.ctx.Done():
			err = context.Cause(a.ctx)
		case <-glance.C:
			err = a.pool.Closed()
			a.waiting()
		}
	}
	m := a.m
	m.mu.Lock()
	defer m.mu.Unlock()
	defer m.tidyLocked(a.at)
	now := time.Now()
	if q.Cancel(w, now) {
		return turn{}, err
	}
	// Its turn has come meanwhile, and is passed on.
	switch t := <-w.Turns; t.To {
	case keyqueue.Ask, keyqueue.Look:
		q.Done(w, now, nil)
	case keyqueue.Hold:
		a.got.held = append(a.got.held, held{key: a.at, q: q, grant: t.Grant}) // to be given back
	}
	return turn{}, err
}

// glanceEvery is how often one who waits in the queue looks whether the pool has been closed.
const glanceEvery = 400 * time.Millisecond

// join has the session of a grant that was handed on watched for the caller, too.
func (a *acquisition) join(q *queue, g keyqueue.Grant[*lockconn.Conn]) error {
	a.m.mu.Lock()
	defer a.m.mu.Unlock()
	if err := g.On.Hold(&a.got.holder); err != nil {
		q.Lost(g.On, time.Now()) // which g.On may not have said yet
		a.m.tidyLocked(a.at)
		return err
	}
	a.got.held = append(a.got.held, held{key: a.at, q: q, grant: g})
	return nil
}

// look asks whether anybody waits in the server's queue for a lock that shared holders of this process
// have. If nobody does, the caller shares it.
func (a *acquisition) look(q *queue, w *waiter, g keyqueue.Grant[*lockconn.Conn]) (turn, error) {
	m, c := a.m, g.On
	r := lockconn.Request{Op: lockconn.Look, Keys: []pgsql.Key{a.at}}
	err, asked := error(lockconn.LostError{}), false
	defer func() {
		if !asked { // the driver panicked
			m.done(a.at, w, nil)
		}
	}()
	if c.Use() {
		defer c.Leave()
		err = c.Ask(a.ctx, &r)
	}
	asked = true
	m.mu.Lock()
	defer m.mu.Unlock()
	defer m.tidyLocked(a.at)
	now := time.Now()
	switch {
	case err == nil:
	case session.Ended(a.ctx) == nil && (errors.As(err, new(lockconn.LostError)) || pgsql.Gone(err)):
		q.Lost(c, now) // which c may not have said yet
	default:
		q.Done(w, now, nil)
		return turn{}, cmp.Or(session.Ended(a.ctx), err)
	}
	return q.Looked(w, g, r.OK, now), nil
}
