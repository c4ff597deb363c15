package session

import (
	"cmp"
	"sync"
	"time"

	"github.com/pgadvisory/advisory/internal/pgsql"
)

// A guard bounds the statement under way on a session, by one timer.
//
// database/sql's way is to end the statement's context. But for that, lib/pq starts a goroutine
// for every statement, and then reads on for as long as the network keeps it waiting. A goroutine
// of our own beside each statement would return in time, and costs a third of an uncontended
// lock's time on two cores, because waking it takes the processor that the server needs. So where
// the driver is known, its connection is broken off instead, and the statement runs on the
// caller's goroutine.
type guard struct {
	mu        sync.Mutex // guards the rest; no driver is called under it
	timer     Alarm      // calls expire
	no        uint64     // of the statement
	under     bool       // it is under way
	until     time.Time  // zero: it is not bounded
	why       error      // what it is broken off with then; nil: NoAnswer after within
	within    time.Duration
	interrupt func(cause error)
	cause     error // why it was broken off
}

// begin begins to guard a statement, which interrupt breaks off.
func (g *guard) begin(interrupt func(error)) (no uint64) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.no++
	g.under, g.until, g.interrupt, g.cause = true, time.Time{}, interrupt, nil
	return g.no
}

// bound leaves no more than d to statement no, and breaks it off with why, or with NoAnswer if that is
// nil. No 0 is the one under way.
func (g *guard) bound(no uint64, d time.Duration, why error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	until := time.Now().Add(d)
	if !g.under || no != 0 && no != g.no || !g.until.IsZero() && g.until.Before(until) {
		return
	}
	g.until, g.within, g.why = until, d, why
	if g.timer.F == nil {
		g.timer.F = g.expire
	}
	g.timer.Set(until)
}

// expire breaks off a statement that is not answered in time.
func (g *guard) expire() {
	g.mu.Lock()
	g.timer.Fired()
	if !g.under || g.until.IsZero() || g.cause != nil {
		g.mu.Unlock()
		return
	}
	if time.Now().Before(g.until) { // the timer was an older statement's
		g.timer.Set(g.until)
		g.mu.Unlock()
		return
	}
	g.cause = cmp.Or(g.why, error(pgsql.NoAnswer{After: g.within})) // nothing more is sent over the connection
	interrupt, cause := g.interrupt, g.cause
	g.mu.Unlock()
	interrupt(cause)
}

// end ends the statement. It returns why it was broken off, if it was.
func (g *guard) end() error {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.under, g.interrupt = false, nil
	return g.cause
}

// stop ends the guard's timer, with the session.
func (g *guard) stop() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.timer.Stop()
}

// An Alarm is a timer that is never put off, because that may have to wake a thread each time. So it may
// fire for nothing. Its owner's mutex guards it.
type Alarm struct {
	F func() // is called when it fires, and calls Fired

	timer *time.Timer
	fires time.Time // zero: it does not
}

// Set sees to it that F is called at the time at, or before.
func (a *Alarm) Set(at time.Time) {
	switch {
	case a.timer == nil:
		a.timer = time.AfterFunc(time.Until(at), a.F)
	case a.fires.IsZero() || at.Before(a.fires):
		a.timer.Reset(time.Until(at))
	default:
		return
	}
	a.fires = at
}

// Stop is called when there is nothing more to wait for. A timer that runs would keep its owner in memory.
func (a *Alarm) Stop() {
	if a.timer != nil {
		a.timer.Stop()
	}
}

// Fired notes that the timer has fired.
func (a *Alarm) Fired() { a.fires = time.Time{} }
