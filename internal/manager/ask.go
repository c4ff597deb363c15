package manager

import (
	"errors"
	"time"

	"github.com/pgadvisory/advisory/internal/lockconn"
	"github.com/pgadvisory/advisory/internal/pgsql"
	"github.com/pgadvisory/advisory/internal/session"
)

// ask acquires the lock from the server. The queue has told the caller to.
func (a *acquisition) ask(keys []pgsql.Key, q *queue, w *waiter) (got []held, err error) {
	defer func() {
		if got == nil { // also if the driver panics, or the Logger
			a.m.gaveUp(a.at, w)
		}
	}()
	pause := session.PauseMin
	for {
		c, sent, err := a.try(keys)
		if errors.Is(err, session.ErrRefused) && !a.NoWait {
			a.refused = true
			a.noteWait()
			c, sent, err = a.wait(q)
		}
		if err == nil {
			return a.granted(keys, c, sent)
		}
		if !errors.Is(err, session.ErrYield) {
			return nil, err
		}
		if a.yielded {
			pause = session.PauseMax // it is others' turn
		}
		a.search()
		a.m.poll(1)
		session.Sleep(a.ctx, a.m.untilTick(pause))
		a.m.poll(-1)
		pause = min(2*pause, session.PauseMax)
	}
}

// granted notes the grant of keys on c, which was asked for at sent. It has c watched for the caller,
// and ends the caller's use of c.
func (a *acquisition) granted(keys []pgsql.Key, c *lockconn.Conn, sent time.Time) ([]held, error) {
	defer c.Leave()
	a.unproven = append(a.unproven, c)
	m := a.m
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := c.Hold(a.holder); err != nil {
		return nil, err
	}
	got := make([]held, len(keys))
	for i, k := range keys {
		q := m.queues[k.Lock()]
		got[i] = held{key: k, q: q, grant: q.Granted(c, sent, time.Now())}
	}
	return got, nil
}

// try tries to acquire the locks of keys, all or none, on the shared session. It returns the session,
// which the caller is to Leave, and when the locks were asked for.
func (a *acquisition) try(keys []pgsql.Key) (*lockconn.Conn, time.Time, error) {
	for {
		if err := session.Ended(a.ctx); err != nil {
			return nil, time.Time{}, err
		}
		if err := a.joinUnderWay(); err != nil {
			return nil, time.Time{}, err
		}
		c, at, err := a.session()
		if err == nil {
			r := &lockconn.Request{Op: lockconn.Try, Keys: keys, Shared: a.Shared}
			err = c.Ask(a.ctx, r)
			if err == nil && r.OK {
				return c, r.Sent, nil
			}
			c.Leave()
			if err == nil {
				a.missed = time.Time{} // the server has answered
				return nil, time.Time{}, session.ErrRefused
			}
		}
		if err = a.again(err, at); err != nil {
			return nil, time.Time{}, err
		}
	}
}

// yieldAfter is how long one waits in the server's queue while others cannot.
const yieldAfter = time.Second

// wait waits for the lock in the server's queue, on a session of its own. It returns the session,
// which has the lock and which the caller is to Leave, and when the lock was granted. ErrYield means
// that it cannot wait there, or has done so for long enough while others cannot.
func (a *acquisition) wait(q *queue) (*lockconn.Conn, time.Time, error) {
	m := a.m
	m.mu.Lock()
	q.Refused()
	m.mu.Unlock()
	if a.yielded = m.mayWait(a.pool); !a.yielded {
		return nil, time.Time{}, session.ErrYield
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
		s.Yield = func() bool { return time.Since(began) > yieldAfter && m.othersPoll() }
		if err := s.Wait(a.ctx, a.at, a.began); err != nil {
			return err
		}
		return session.Ended(a.ctx)
	})
	if errors.Is(err, session.ErrWaitRefused) {
		err = session.ErrYield
	}
	if err != nil {
		return nil, time.Time{}, err
	}
	c := lockconn.New(s, a.Log, []pgsql.Key{a.at}, a.Shared, m.lost)
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.shared == nil || m.shared.Empty() {
		m.shared = c
		m.openedLocked(m.opening, nil) // somebody may be about to open another
	}
	return c, time.Now(), nil
}
