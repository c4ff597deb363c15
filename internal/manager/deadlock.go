package manager

import (
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/pgadvisory/advisory/internal/pgsql"
	"github.com/pgadvisory/advisory/internal/session"
	"github.com/pgadvisory/advisory/internal/waitgraph"
)

const (
	// detectEvery is how often the waits of other processes are read, once a nested wait is that old. A
	// cycle that lasts as long is a deadlock. A wait that has ended may still be read for up to 650 ms: until its
	// slice of 400 ms is over, and for 250 ms after that (pgsql.Waits).
	detectEvery = time.Second

	// sharedAfter is how old a shared wait is when it counts in a cycle of its process: see counts.
	sharedAfter = time.Second
)

// A Deadlock is the error of a wait that cannot end, because it waits for others who wait for what its
// caller holds. The server does not see it: waits end before its detector looks, and locks are held
// on other sessions than those that wait.
type Deadlock string

func (d Deadlock) Error() string { return string(d) }

// A nestedWait is a wait whose caller holds keys: only such a wait can be part of a deadlock.
type nestedWait struct {
	waitgraph.Wait
	of    *acquisition
	holds []pgsql.Key // what Held names
	wants pgsql.Key
	began time.Time
	cycle []waitgraph.Wait // that was seen last
	seen  time.Time        // when it was first seen
}

// noteWait is called when the acquisition begins to wait, and again and again while it does. It ends
// the acquisition if the wait is part of a cycle in this process.
func (a *acquisition) noteWait() {
	if a.nested != nil && !a.Shared {
		return // only a shared wait's cycle may come to count later
	}
	holds := a.holds()
	if len(holds) == 0 {
		return
	}
	m := a.m
	m.mu.Lock()
	defer m.mu.Unlock()
	if a.nested == nil {
		a.nested = newNestedWait(a, holds)
		m.nested[a.nested] = struct{}{}
	}
	if !a.nested.counts() {
		return
	}
	if cycle := waitgraph.New(m.waitsLocked((*nestedWait).counts)).Cycle(a.nested.currentLocked()); cycle != nil {
		a.end(a.nested.deadlock(cycle))
	}
}

// holds returns the keys that the caller holds, and then those that the acquisition has got.
func (a *acquisition) holds() []pgsql.Key {
	holds := slices.Clone(a.CallerHolds)
	if a.got != nil {
		for _, h := range a.got.held {
			holds = append(holds, h.key)
		}
	}
	return holds
}

func newNestedWait(a *acquisition, holds []pgsql.Key) *nestedWait {
	s := &nestedWait{of: a, holds: holds, wants: a.at, began: time.Now()}
	s.Wait = waitgraph.Wait{ID: strconv.FormatUint(rand.Uint64(), 36), Since: s.began.UnixMilli(), Wanted: a.at.Text()}
	if a.pool.RefusesWaits() {
		s.Since = math.MaxInt64 // no statement shows it, so that others do not see its cycles
	}
	for _, k := range s.holds {
		s.Held = append(s.Held, k.Text())
	}
	return s
}

// counts tells whether s counts in a cycle of this process. A shared wait may be over in a moment,
// though others hold the lock, because it may share it. Once it has lasted, an exclusive waiter stands
// between.
func (s *nestedWait) counts() bool { return !s.of.Shared || time.Since(s.began) >= sharedAfter }

// forgetWait is called when the wait has ended.
func (a *acquisition) forgetWait() {
	if a.nested != nil {
		a.m.mu.Lock()
		defer a.m.mu.Unlock()
		delete(a.m.nested, a.nested)
		a.nested = nil
	}
}

// waitsLocked returns those waits of this process that count, except one that is about to end.
func (m *Manager) waitsLocked(counts func(*nestedWait) bool) (waits []waitgraph.Wait) {
	for s := range m.nested {
		if w := s.currentLocked(); s.of.ctx.Err() == nil && len(w.Held) > 0 && counts(s) {
			waits = append(waits, w)
		}
	}
	return waits
}

// currentLocked returns the wait, without what the acquisition has lost since it began.
func (s *nestedWait) currentLocked() waitgraph.Wait {
	w, a := s.Wait, s.of
	if a.got != nil && a.got.holder.Lost() != nil {
		w.Held = w.Held[:len(a.CallerHolds)]
	}
	return w
}

func anyWait(*nestedWait) bool { return true }

// deadlock returns the error of a cycle that begins with s.
func (s *nestedWait) deadlock(cycle []waitgraph.Wait) Deadlock {
	name := func(text string) string {
		for _, k := range append(slices.Clip(s.holds), s.wants) {
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
	s.Edges = a.edges
	s.Waiting = func() {
		a.waiting()
		a.m.detect(func() ([]session.Statement, error) { return s.Waits(a.ctx, a.at) })
	}
}

// search is called again and again by a wait that has no session of its own. Others do not see it, nor the
// cycles that it is in: it counts as the youngest, and ends itself.
func (a *acquisition) search() {
	a.waiting()
	a.m.mu.Lock()
	if a.nested != nil {
		a.nested.Since = math.MaxInt64
	}
	a.m.mu.Unlock()
	if !a.pool.Exhausted() {
		a.m.detect(func() ([]session.Statement, error) { return a.pool.Waits(a.ctx) })
	}
}

// edges returns what a statement that waits tells other processes: its own edges, and those of the waits of
// this process that are behind it.
func (a *acquisition) edges() string {
	m := a.m
	m.mu.Lock()
	defer m.mu.Unlock()
	var edges []waitgraph.Wait
	w := waitgraph.Wait{Held: []string{a.at.Text()}} // others of this process may wait for that, too
	if a.nested != nil {
		mine := a.nested.currentLocked()
		w.ID, w.Held = mine.ID, append(w.Held, mine.Held...)
		if len(mine.Held) > 0 {
			edges = append(edges, mine)
		}
	}
	return waitgraph.Text(append(edges, waitgraph.Behind(w, m.waitsLocked(anyWait))...))
}

// detect looks for cycles of waits in several processes, if that is due: ask returns the statements
// that wait.
func (m *Manager) detect(ask func() ([]session.Statement, error)) {
	asked := time.Now()
	m.mu.Lock()
	due := false
	for s := range m.nested {
		due = due || asked.Sub(s.began) >= detectEvery
	}
	due = due && !m.detecting && asked.Sub(m.detected) >= detectEvery
	m.detecting = m.detecting || due
	m.mu.Unlock()
	if !due {
		return
	}
	defer func() { // also if the driver panics
		m.mu.Lock()
		defer m.mu.Unlock()
		m.detecting, m.detected = false, time.Now()
	}()
	if statements, err := ask(); err == nil { // if the session has died, the next statement says so
		m.mu.Lock()
		defer m.mu.Unlock()
		m.endCyclesLocked(statements, asked)
	}
}

// endCyclesLocked looks for cycles among the waits of this process and those of statements, for which the
// server was asked at asked. A cycle that is seen a second time, detectEvery later, ends its youngest
// wait. It has been there all the time, because a wait does not change, and none has the ID of another.
func (m *Manager) endCyclesLocked(statements []session.Statement, asked time.Time) {
	ours := make(map[string]bool)
	for s := range m.nested {
		ours[s.ID] = true
	}
	var others []waitgraph.Wait
	for _, s := range statements {
		for _, w := range waitgraph.Parse(pgsql.EdgesIn(s.Query)) {
			if w.PID, w.Name = s.PID, s.ApplicationName; !ours[w.ID] {
				others = append(others, w)
			}
		}
	}
	graph := waitgraph.New(append(m.waitsLocked(anyWait), others...))
	for s := range m.nested {
		if s.of.ctx.Err() != nil {
			continue
		}
		switch cycle := graph.Cycle(s.currentLocked()); {
		case cycle == nil:
		case !waitgraph.Same(cycle, s.cycle):
			s.cycle, s.seen = cycle, time.Now()
		case asked.Sub(s.seen) >= detectEvery && waitgraph.Youngest(cycle):
			s.of.end(s.deadlock(cycle))
			graph = waitgraph.New(append(m.waitsLocked(anyWait), others...))
		}
	}
}
