package manager

import (
	"context"

	"github.com/pgadvisory/advisory/internal/lockconn"
	"github.com/pgadvisory/advisory/internal/pgsql"
	"github.com/pgadvisory/advisory/internal/session"
)

// openCounted opens a session, which the caller has counted in Manager.sessions. It is uncounted when it has
// ended, or at once if there is none.
func (a *acquisition) openCounted(ctx context.Context) (*session.Session, error) {
	opened := false
	var s *session.Session
	defer func() {
		if opened {
			return
		}
		a.m.uncount() // also if the driver panics
		if s != nil { // the Logger has
			s.Discard()
		}
	}()
	s, err := a.pool.Open(ctx, a.Log, session.ForLocks)
	if err != nil {
		return nil, err
	}
	a.m.tookOnly(a.pool, a.Log)
	opened = true
	m := a.m // alone: the session may outlive the acquisition by months
	s.OnEnd = func() { m.ended(s) }
	return s, nil
}

// An opening is one caller's opening of the common session, for which others wait.
type opening struct {
	done chan struct{}
	err  error // not that of the opener's own ctx
}

// openedLocked tells those who wait for o.
func (m *Manager) openedLocked(o *opening, err error) {
	if o != nil && m.opening == o {
		m.opening = nil
		o.err = err
		close(o.done)
	}
}

// lockConn returns the common session, which the caller is to Leave, and who has opened it. If there is none, it
// opens one, or waits for another who does.
func (a *acquisition) lockConn() (*lockconn.Conn, opener, error) {
	m := a.m
	for {
		m.mu.Lock()
		if c := m.conn; c != nil && c.Use() {
			m.mu.Unlock()
			if err := a.pool.Closed(); err != nil {
				c.Leave()
				return nil, nobody, err
			}
			return c, others, nil
		}
		o := m.opening
		if o == nil {
			o = &opening{done: make(chan struct{})}
			m.opening = o
			m.sessions++
			m.mu.Unlock()
			return a.openConn(o)
		}
		m.mu.Unlock()
		select {
		case <-o.done:
			if o.err != nil {
				return nil, nobody, o.err
			}
		case <-a.ctx.Done():
			return nil, nobody, context.Cause(a.ctx)
		}
	}
}

func (a *acquisition) openConn(o *opening) (*lockconn.Conn, opener, error) {
	m := a.m
	told := session.ErrPanicked // for those who wait for o
	defer func() {
		m.mu.Lock()
		defer m.mu.Unlock()
		if session.Ended(a.ctx) != nil {
			told = nil // they are not told of the end of this ctx
		}
		m.openedLocked(o, told)
	}()
	s, err := a.openCounted(a.ctx)
	told = err
	m.mu.Lock()
	defer m.mu.Unlock()
	if c := m.conn; c != nil && !pgsql.PoolClosed(err) && c.Use() { // a waiter's session has become the common one meanwhile
		if err == nil {
			go s.HandBack()
		}
		told = nil
		return c, others, nil
	}
	if err != nil {
		return nil, nobody, err
	}
	m.conn = lockconn.New(s, a.Log, nil, false, m.lost)
	return m.conn, itself, nil
}
