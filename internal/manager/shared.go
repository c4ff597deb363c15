package manager

import (
	"context"

	"github.com/pgadvisory/advisory/internal/lockconn"
	"github.com/pgadvisory/advisory/internal/pgsql"
	"github.com/pgadvisory/advisory/internal/session"
)

// open opens a session, which has been counted, and is until it has ended.
func (a *acquisition) open(ctx context.Context) (*session.Session, error) {
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
	s.OnEnd = func() { a.m.ended(s) }
	return s, nil
}

// An opening is one caller's opening of the shared session, for which others wait.
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

// session returns the shared session, which the caller is to Leave, and whose it is. If there is none,
// it opens one, or waits for another who does.
func (a *acquisition) session() (*lockconn.Conn, stage, error) {
	m := a.m
	for {
		m.mu.Lock()
		if c := m.shared; c != nil && c.Use() {
			m.mu.Unlock()
			if err := a.pool.Closed(); err != nil {
				c.Leave()
				return nil, nowhere, err
			}
			return c, onShared, nil
		}
		o := m.opening
		if o == nil {
			o = &opening{done: make(chan struct{})}
			m.opening = o
			m.sessions++
			m.mu.Unlock()
			return a.openShared(o)
		}
		m.mu.Unlock()
		select {
		case <-o.done:
			if o.err != nil {
				return nil, nowhere, o.err
			}
		case <-a.ctx.Done():
			return nil, nowhere, context.Cause(a.ctx)
		}
	}
}

func (a *acquisition) openShared(o *opening) (*lockconn.Conn, stage, error) {
	m := a.m
	err := session.ErrPanicked
	defer func() {
		m.mu.Lock()
		defer m.mu.Unlock()
		if session.Ended(a.ctx) != nil {
			err = nil // that is no news for others
		}
		m.openedLocked(o, err)
	}()
	var s *session.Session
	s, err = a.open(a.ctx)
	m.mu.Lock()
	defer m.mu.Unlock()
	if c := m.shared; c != nil && !pgsql.PoolClosed(err) && c.Use() { // one that waited has been granted its lock meanwhile
		if err == nil {
			go s.HandBack()
		}
		err = nil
		return c, onShared, nil
	}
	if err != nil {
		return nil, nowhere, err
	}
	m.shared = lockconn.New(s, a.Log, nil, false, m.lost)
	return m.shared, onOwn, nil
}
