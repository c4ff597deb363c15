package manager

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/pgadvisory/advisory/internal/pgsql"
	"github.com/pgadvisory/advisory/internal/session"
	"github.com/pgadvisory/advisory/internal/waitgraph"
)

// detectEvery is how old a wait is when other processes are first asked whom it waits for, and how
// often they are asked.
const detectEvery = time.Second

// A Deadlock is the error of a wait that cannot end, because it waits for others who wait for what its
// caller holds. The server does not see it: waits end before its detector looks, and locks are held
// on other sessions than those that wait.
type Deadlock string

func (d Deadlock) Error() string { return string(d) }

// A stuck is a wait whose caller holds keys.
type stuck struct {
	waitgraph.Wait
	holds []pgsql.Key
	wants pgsql.Key
	began time.Time
	end   context.CancelCauseFunc // ends the acquisition
	cycle []waitgraph.Wait        // that was last seen
}

// stick is called when the acquisition begins to wait, because another has the lock. It returns a
// Deadlock if that closes a cycle in this process.
func (a *acquisition) stick() error {
	a.waited = true
	if a.stuck != nil || len(a.holds) == 0 {
		return nil
	}
	s := &stuck{holds: slices.Clone(a.holds), wants: a.at, began: time.Now(), end: a.end}
	s.Wait = waitgraph.Wait{ID: strconv.FormatUint(rand.Uint64(), 36), Since: s.began.UnixMilli(), Wanted: a.at.Text()}
	for _, k := range s.holds {
		s.Held = append(s.Held, k.Text())
	}
	m := a.m
	m.mu.Lock()
	defer m.mu.Unlock()
	if cycle := waitgraph.Cycle(s.Wait, m.waitsLocked()); cycle != nil {
		return s.deadlock(cycle)
	}
	a.stuck = s
	m.stuck[s] = struct{}{}
	return nil
}

// unstick is called when the wait has ended.
func (a *acquisition) unstick() {
	if a.stuck != nil {
		a.m.mu.Lock()
		defer a.m.mu.Unlock()
		delete(a.m.stuck, a.stuck)
		a.stuck = nil
	}
}

// waitsLocked returns the waits of this process.
func (m *Manager) waitsLocked() (waits []waitgraph.Wait) {
	for s := range m.stuck {
		waits = append(waits, s.Wait)
	}
	return waits
}

// deadlock returns the error of a cycle that begins with s.
func (s *stuck) deadlock(cycle []waitgraph.Wait) Deadlock {
	name := func(text string) string {
		for _, k := range append(s.holds, s.wants) {
			if k.Text() == text && k.Name != "" {
				return strconv.Quote(k.Name)
			}
		}
		return text
	}
	var b strings.Builder
	fmt.Fprintf(&b, "deadlock: this caller holds %s and waits for %s", name(cycle[len(cycle)-1].Wanted), name(s.Wanted))
	for _, w := range cycle[1:] {
		who := "this process"
		if w.PID != 0 {
			who = fmt.Sprintf("pid %d (app %q)", w.PID, w.Name)
		}
		fmt.Fprintf(&b, ", which %s holds while it waits for %s", who, name(w.Wanted))
	}
	return Deadlock(b.String())
}

// equip has the waits of s carry the edges of the graph, and look for cycles.
func (a *acquisition) equip(s *session.Session) {
	s.Stuck = a.stick
	s.Comment = a.comment
	s.Between = func() { a.m.detect(s.Waits) }
}

// comment returns the comment of a statement that waits: its own edges, and those of the waits of this
// process that are stuck behind it.
func (a *acquisition) comment() string {
	m := a.m
	m.mu.Lock()
	defer m.mu.Unlock()
	w := waitgraph.Wait{Held: []string{a.at.Text()}} // others of this process may wait for that, too
	if a.stuck != nil {
		w.ID = a.stuck.ID
		w.Held = append(w.Held, a.stuck.Held...)
	}
	behind := waitgraph.Behind(w, m.waitsLocked())
	if behind = behind[1:]; a.stuck != nil {
		behind = slices.Insert(behind, 0, a.stuck.Wait)
	}
	return waitgraph.Comment(a.at.Label(), behind)
}

// detect looks for cycles of waits in several processes, if that is due: ask returns the statements
// that wait. A cycle that is seen twice ends its youngest wait.
func (m *Manager) detect(ask func() ([]session.Statement, error)) {
	m.mu.Lock()
	due := false
	for s := range m.stuck {
		due = due || time.Since(s.began) >= detectEvery
	}
	if due = due && time.Since(m.asked) >= detectEvery; due {
		m.asked = time.Now()
	}
	m.mu.Unlock()
	if !due {
		return
	}
	statements, err := ask()
	if err != nil {
		return // if the session has died, the next statement says so
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	waits := m.waitsLocked()
	for _, s := range statements {
		for _, w := range waitgraph.Parse(s.Query) {
			w.PID, w.Name = s.PID, s.ApplicationName
			waits = append(waits, w)
		}
	}
	for s := range m.stuck {
		cycle := waitgraph.Cycle(s.Wait, waits)
		if cycle != nil && waitgraph.Same(cycle, s.cycle) && waitgraph.Youngest(cycle) {
			s.end(s.deadlock(cycle))
		}
		s.cycle = cycle
	}
}

// A Callers is a wait on a session, or in a transaction, of the caller's. It takes part in finding
// deadlocks if the caller holds other locks, which are of db.
type Callers struct {
	acquisition
	Ctx context.Context // ends with the Timeout, or a deadlock
}

// NewCallers returns the wait that r asks for.
func NewCallers(ctx context.Context, db *sql.DB, r *Request) *Callers {
	c := &Callers{acquisition: newAcquisition(ctx, db, r, nil)} // db may be nil if nothing is held
	c.Ctx = c.ctx
	c.at = r.Keys[0]
	return c
}

// Stuck is called when the wait begins.
func (c *Callers) Stuck() error { return c.stick() }

// Equip has a session wait for the lock.
func (c *Callers) Equip(s *session.Session) {
	s.Stuck = c.stick
	if len(c.holds) > 0 {
		c.equip(s)
	}
}

// Failure returns the error of the wait. Nobody asks who holds the lock: a question that takes long
// would cost the caller's session or transaction.
func (c *Callers) Failure(err error) error {
	if cause := ended(c.ctx); cause != nil && !errors.Is(err, cause) {
		err = errors.Join(cause, err)
	}
	held := errors.Is(err, session.ErrRefused) || errors.Is(err, session.ErrTimeout) && c.waited
	return &Failure{Cause: err, Held: held}
}

// Done ends the wait.
func (c *Callers) Done() {
	c.unstick()
	c.end(nil)
}
