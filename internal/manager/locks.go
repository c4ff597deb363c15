package manager

import (
	"context"
	"errors"
	"time"

	"github.com/pgadvisory/advisory/internal/keyqueue"
	"github.com/pgadvisory/advisory/internal/lockconn"
	"github.com/pgadvisory/advisory/internal/pgsql"
	"github.com/pgadvisory/advisory/internal/session"
)

// Locks are what Acquire has acquired.
type Locks struct {
	m      *Manager
	holder lockconn.Holder
	shared bool
	held   []held
}

// A held is one lock that a holder has.
type held struct {
	key    pgsql.Key
	q      *queue
	grant  keyqueue.Grant[*lockconn.Conn]
	unlock bool // its release asks the server to unlock it
}

// Session returns the session that holds the first of the locks.
func (l *Locks) Session() *session.Session { return l.held[0].grant.On.Session() }

// Begin has tell called when a lock is lost, or if one has been.
func (l *Locks) Begin(tell func(cause error)) { l.holder.Begin(tell) }

// Ping returns nil if the server answers on each session that carries the locks. It does not ask
// whether the locks are there: they are for as long as their session lives.
func (l *Locks) Ping() (err error) {
	asked := make(map[*lockconn.Conn]bool, 1)
	for _, h := range l.held {
		if c := h.grant.On; !asked[c] {
			asked[c] = true
			err = errors.Join(err, c.Ask(context.Background(), &lockconn.Request{Op: lockconn.Ping}))
		}
	}
	return err
}

// Release releases the locks. It returns nil if each of them was held until then. Of a lock that is
// unlocked the server says so; of one that is handed on, it says that the session lives.
func (l *Locks) Release() error { return l.release(l.held) }

func (l *Locks) release(rest []held) (err error) {
	if len(rest) == 0 {
		return nil
	}
	c, on := rest[0].grant.On, 0
	for i := range rest { // those on c come first
		if rest[i].grant.On == c {
			rest[on], rest[i] = rest[i], rest[on]
			on++
		}
	}
	defer func() { // even if the driver panics
		err = errors.Join(err, l.release(rest[on:]))
	}()
	return l.releaseOn(c, rest[:on])
}

// releaseOn releases those locks that c carries.
func (l *Locks) releaseOn(c *lockconn.Conn, on []held) error {
	m := l.m
	r := &lockconn.Request{Op: lockconn.Ping, Shared: l.shared}
	m.mu.Lock()
	now := time.Now()
	for i := range on {
		h := &on[i]
		if h.unlock = h.q.Release(h.grant, now); h.unlock {
			r.Op = lockconn.Unlock
			r.Keys = append(r.Keys, h.key)
		}
	}
	c.LetGo(&l.holder)
	alive := c.Use()
	m.mu.Unlock()
	if !alive {
		return c.Lost()
	}
	defer c.Leave()
	err := c.Ask(context.Background(), r)
	m.mu.Lock()
	defer m.mu.Unlock()
	now = time.Now()
	for _, h := range on {
		if h.unlock {
			h.q.Unlocked(h.grant, now)
			m.tidyLocked(h.key)
		}
	}
	if err == nil {
		return nil
	}
	var lost lockconn.LostError
	if errors.As(err, &lost) { // which to Acquire means that it is to begin again
		return lost.Cause
	}
	return err
}

// giveBack releases what an acquisition got in vain. After the end of ctx, it does not wait for that.
func (a *acquisition) giveBack() {
	l, held := a.got, a.got.held
	l.held = nil
	if len(held) > 0 && a.ctx.Err() != nil {
		go func() { _ = l.release(held) }()
		return
	}
	_ = l.release(held)
}
