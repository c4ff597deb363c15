package manager

import (
	"errors"
	"time"

	"github.com/pgadvisory/advisory/internal/lockconn"
	"github.com/pgadvisory/advisory/internal/pgsql"
	"github.com/pgadvisory/advisory/internal/session"
)

// ask acquires the lock from the server. The queue has told the caller to.
func (a *acquisition) ask(keys []pgsql.Key, q *queue, w *waiter) (err error) {
	err = session.ErrPanicked
	defer func() {
		if err != nil { // also if the driver panics, or the Logger
			a.m.gaveUp(a.at, w)
		}
	}()
	pause := session.PauseMin
	for {
		err := a.try(keys)
		if errors.Is(err, session.ErrRefused) && !a.NoWait {
			a.refused = true
			a.noteWait()
			err = a.wait(keys, q)
		}
		if !errors.Is(err, session.ErrYield) {
			return err
		}
		if a.yielded {
			pause = session.PauseMax // it is others' turn
		}
		a.search()
		a.m.polling.Add(1)
		session.Sleep(a.ctx, a.m.untilTick(pause))
		a.m.polling.Add(-1)
		pause = min(2*pause, session.PauseMax)
	}
}

// granted notes the grant of keys on c, which was asked for at sent. It has c watched for the caller,
// and ends the caller's use of c.
func (a *acquisition) granted(keys []pgsql.Key, c *lockconn.Conn, sent time.Time) error {
	defer c.Leave()
	m := a.m
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := c.Hold(a.got.holder); err != nil {
		return err
	}
	for _, k := range keys {
		q := m.queues[k.Lock()]
		a.got.held = append(a.got.held, held{key: k, q: q, grant: q.Granted(c, sent, time.Now())})
	}
	return nil
}

// try tries to acquire the locks of keys, all or none, on the shared session.
func (a *acquisition) try(keys []pgsql.Key) error {
	for {
		if err := session.Ended(a.ctx); err != nil {
			return err
		}
		if err := a.joinUnderWay(); err != nil {
			return err
		}
		c, at, err := a.session()
		if err == nil {
			r := &lockconn.Request{Op: lockconn.Try, Keys: keys, Shared: a.Shared}
			err = c.Ask(a.ctx, r)
			if err == nil && r.OK {
				return a.granted(keys, c, r.Sent)
			}
			c.Leave()
			if err == nil {
				a.missed = time.Time{} // the server has answered
				return session.ErrRefused
			}
		}
		if err = a.again(err, at); err != nil {
			return err
		}
	}
}

// yieldAfter is how long one waits in the server's queue while others cannot.
const yieldAfter = time.Second

// wait waits for the lock in the server's queue, on a session of its own. ErrYield means that it
// cannot wait there, or has done so for long enough while others cannot.
func (a *acquisition) wait(keys []pgsql.Key, q *queue) error {
	m := a.m
	m.mu.Lock()
	q.Refused()
	m.mu.Unlock()
	if a.yielded = m.mayWait(a.pool); !a.yielded {
		return session.ErrYield
	}
	a.slot = true
	defer func() {
		if a.slot {
			a.slot = false
			m.count(-1)
		}
	}()
	began := time.Now()
	s, err := a.keepTrying(a.open, func(s *session.Session) error {
		s.Shared = a.Shared
		a.equip(s)
		s.SetSilence(a.Silence)
		s.Yield = func() bool { return time.Since(began) > yieldAfter && m.polling.Load() > 0 }
		if err := s.Wait(a.ctx, a.at, a.began); err != nil {
			return err
		}
		return session.Ended(a.ctx)
	})
	if errors.Is(err, session.ErrWaitRefused) {
		err = session.ErrYield
	}
	if err != nil {
		return err
	}
	c := lockconn.New(s, a.Log, keys, a.Shared, m.lost)
	m.mu.Lock()
	if m.shared == nil || m.shared.Empty() {
		m.shared = c
		m.openedLocked(m.opening, nil) // somebody may be about to open another
	}
	m.mu.Unlock()
	return a.granted(keys, c, time.Now())
}
