package manager

import (
	"context"
	"errors"
	"time"

	"github.com/pgadvisory/advisory/internal/lockconn"
	"github.com/pgadvisory/advisory/internal/pgsql"
	"github.com/pgadvisory/advisory/internal/session"
)

// tryAll acquires all the locks in one statement. Their queues have told waiters to ask. If the server
// refuses one of them, none is taken: that is ErrRefused with NoWait, and otherwise the caller goes on key by
// key.
func (a *acquisition) tryAll(waiters []waiter) error {
	var why error
	defer func() {
		if len(a.got.held) == 0 { // also if the driver panics
			for i, k := range a.Keys {
				a.m.done(k, &waiters[i], why)
			}
		}
	}()
	refused, err := a.try(a.Keys)
	why = a.sharedError(err) // never a refusal: it may be about another key
	if refused && a.NoWait {
		return session.ErrRefused
	}
	return err
}

// ask acquires one lock from the server, and waits for it. The queue has told w to.
func (a *acquisition) ask(w *waiter) (err error) {
	before := len(a.got.held)
	defer func() {
		a.forgetWait()
		if len(a.got.held) == before { // also if the driver panics, or the Logger
			a.m.done(a.at, w, a.sharedError(err))
		}
	}()
	keys := []pgsql.Key{a.at}
	for pause := session.PauseMin; ; pause = min(2*pause, session.PauseMax) {
		refused, err := a.try(keys)
		switch {
		case !refused:
			return err
		case a.NoWait:
			return session.ErrRefused
		}
		a.refused = true
		a.waiting()
		err = a.wait()
		switch {
		case errors.Is(err, session.ErrYield):
			pause = session.PauseMax // it is others' turn
		case err != errNoPlace && !errors.Is(err, session.ErrWaitRefused):
			return err
		}
		a.search()
		a.m.polling.Add(1)
		session.Sleep(a.ctx, a.m.untilTick(pause))
		a.m.polling.Add(-1)
	}
}

// try tries to acquire the locks of keys, all or none, on the common session. It tells whether the server
// has refused them.
func (a *acquisition) try(keys []pgsql.Key) (refused bool, err error) {
	for {
		if err := a.ready(); err != nil {
			return false, err
		}
		c, by, err := a.lockConn()
		if err == nil {
			r := &lockconn.Request{Op: lockconn.Try, Keys: keys, Shared: a.Shared}
			if err = c.Ask(a.ctx, r); err == nil && r.OK { // OK is written for a request that was left, too
				return false, a.granted(keys, c, r.Sent)
			}
			c.Leave()
		}
		if err == nil {
			a.missedSince = time.Time{} // the server has answered
			return true, nil
		}
		if err = a.again(err, by); err != nil {
			return false, err
		}
	}
}

// granted notes the grant of keys on c, which was asked for at sent. It has c watched for the caller,
// and ends the caller's use of c.
func (a *acquisition) granted(keys []pgsql.Key, c *lockconn.Conn, sent time.Time) error {
	defer c.Leave()
	m := a.m
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := c.Hold(&a.got.holder); err != nil {
		return err
	}
	for _, k := range keys {
		q := m.queues[k.Unnamed()]
		a.got.held = append(a.got.held, held{key: k, q: q, grant: q.Granted(c, sent, time.Now())})
	}
	return nil
}

// yieldAfter is how long one waits in the server's queue while others cannot.
const yieldAfter = time.Second

// errNoPlace is the error of a wait for which there is no session.
var errNoPlace = errors.New("no session can be spared for a wait")

// wait waits for one lock in the server's queue, on a session of its own. Its error is errNoPlace or
// ErrWaitRefused if it cannot, and ErrYield if it has waited for long enough while others cannot.
func (a *acquisition) wait() error {
	m := a.m
	m.mu.Lock()
	m.queues[a.at.Unnamed()].Refused()
	m.mu.Unlock()
	began := time.Now()
	s, err := a.keepTrying(func(ctx context.Context) (*session.Session, error) {
		if !m.takeWait(a.pool) {
			return nil, errNoPlace
		}
		return a.openCounted(ctx)
	}, func(s *session.Session) error {
		s.Shared = a.Shared
		a.equip(s)
		s.SetIdleTimeout(a.IdleTimeout)
		s.Yield = func() bool { return time.Since(began) > yieldAfter && m.polling.Load() > 0 }
		if err := s.Wait(a.ctx, a.at, a.began); err != nil {
			return err
		}
		return session.Ended(a.ctx)
	})
	if err != nil {
		return err
	}
	s.Edges, s.Waiting, s.Yield = nil, nil, nil // which would keep this acquisition in memory
	keys := []pgsql.Key{a.at}
	c := lockconn.New(s, a.Log, keys, a.Shared, m.lost)
	m.mu.Lock()
	if m.conn == nil || m.conn.Empty() {
		m.conn = c
		m.openedLocked(m.opening, nil) // somebody may be about to open another
	}
	m.mu.Unlock()
	return a.granted(keys, c, time.Now())
}
