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
	mu        sync.Mutex  // guards the rest; no driver is called under it
	timer     *time.Timer // calls expire
	no        uint64      // of the statement
	under     bool        // it is under way
	until     time.Time   // zero: it is not bounded
	why       error       // what it is broken off with then; nil: NoAnswer after within
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
// nil. A no of 0 is the one under way.
func (g *guard) bound(no uint64, d time.Duration, why error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	until := time.Now().Add(d)
	if !g.under || no != 0 && no != g.no || !g.until.IsZero() && g.until.Before(until) {
		return
	}
	g.until, g.within, g.why = until, d, why
	if g.timer == nil {
		g.timer = time.AfterFunc(d, g.expire)
	} else {
		g.timer.Reset(d)
	}
}

// expire breaks off a statement that is not answered in time.
func (g *guard) expire() {
	g.mu.Lock()
	// The timer may be an older bound's, whose statement has ended just now.
	if !g.under || g.cause != nil || g.until.IsZero() || time.Now().Before(g.until) {
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
	if g.timer != nil {
		g.timer.Stop()
	}
	return g.cause
}
