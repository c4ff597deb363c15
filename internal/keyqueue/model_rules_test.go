package keyqueue_test

import (
	"slices"

	"github.com/pgadvisory/advisory/internal/keyqueue"
)

// The rules: what must be so after each step, and with each turn that the queue gives.

// check is what must be so after each step.
func (t *trial) check() {
	for i, c := range t.clients {
		if !t.counts(c) {
			continue
		}
		for _, d := range t.clients[:i] {
			t.must(!t.counts(d) || !c.conflicts(d), "%v and %v hold the lock", c, d)
		}
		has := c.claim
		if !c.w.Dedicated {
			has = c.lock.On.claim
		}
		t.must(has != nil && t.server.holds(has) && has.shared == c.w.Shared, "%v holds the lock, and the server does not know", c)
	}
	for _, s := range t.sessions {
		if s.claim == nil || !s.alive() || t.lock != nil && t.lock.On == s && (t.holders() > 0 || t.lock.releases) {
			continue
		}
		t.must(slices.ContainsFunc(t.clients, func(c *client) bool {
			return c.on == s && (c.phase == atGrant || c.phase == atUndoing)
		}), "a session has the lock, and nobody holds it")
	}
	if l := t.lock; l != nil && l.releases && !l.On.lost {
		t.must(slices.ContainsFunc(t.clients, func(c *client) bool {
			return c.lock == l && (c.phase == atUnlock || c.phase == atUnlocked)
		}), "the grant goes back, and nobody unlocks it")
	}
	for _, c := range t.line {
		t.must(!c.w.NoWait || t.answerComes(), "%v waits for more than an answer", c)
	}
	if len(t.line) > 0 {
		t.must(t.mustWait(t.line[0]), "nothing holds up %v", t.line[0])
	}
	t.must(t.q.Idle() == t.idle(), "the queue says that it is idle: %v", t.q.Idle())
	t.must(t.q.Held() == t.held(), "the queue says that the lock is held: %v", t.q.Held())
}

// collect takes the turns that a call of the queue has given. They are of those who came first.
func (t *trial) collect() {
	var served []*client
	var waits *client
	t.line = slices.DeleteFunc(t.line, func(c *client) bool {
		select {
		case c.turn = <-c.w.Turns:
		default:
			if waits == nil {
				waits = c
			}
			return false
		}
		c.waited = true
		if c.turn.To == keyqueue.Refuse {
			t.must(c.w.NoWait, "%v is refused, and would wait", c)
			t.must(c.turn.Why != nil || t.maySayNo(c), "%v is refused, and there is no reason", c)
			t.say("  %v: refuse", c)
			t.seen["refused: NoWait waited"]++
			c.phase = atTurn
			return true
		}
		t.must(waits == nil, "%v overtakes %v", c, waits)
		served = append(served, c)
		return true
	})
	for _, c := range served {
		t.say("  %v: %s", c, actionNames[c.turn.To])
		t.begin(c, c.turn)
	}
}

// begin is when a client is let in.
func (t *trial) begin(c *client, tn turn) {
	l := t.lock
	if d := t.conflicting(c); d != nil {
		t.fail("%v is told to %s, and %v is inside", c, actionNames[tn.To], d)
	}
	switch tn.To {
	case keyqueue.Ask:
		t.must(tn.Grant == grant{}, "%v is to ask, and has a grant", c)
		if c.w.Dedicated {
			t.must(l == nil || t.holders() > 0, "%v asks on its own session, and the grant has not gone back", c)
			break
		}
		t.must(t.requester == nil, "%v asks, and so does %v", c, t.requester)
		t.must(l == nil, "%v asks for a grant, and there is one", c)
		t.requester = c
	case keyqueue.Look, keyqueue.Hold:
		t.must(!c.w.Dedicated, "%v gets the grant", c)
		t.must(l != nil && !l.releases, "%v is told to %s, and there is no grant, or one that goes back", c, actionNames[tn.To])
		t.must(tn.Grant == l.grant, "%v gets another grant than there is", c)
		t.must(c.w.Shared == l.shared, "%v gets a grant of the other mode", c)
		t.must(!l.closed, "%v gets a grant that others wait for", c)
		if tn.To == keyqueue.Hold {
			t.must(t.now.Before(l.until), "%v gets a grant %v after its time", c, t.now.Sub(l.until))
			c.lock = l
			break
		}
		t.must(!t.now.Before(l.until), "%v looks, and need not yet", c)
		t.must(t.requester == nil, "%v looks, and %v is at it", c, t.requester)
		t.must(t.holders() > 0, "%v looks, and nobody holds the lock", c)
		t.requester = c
	default:
		t.fail("%v has the turn %d", c, tn.To)
	}
	c.turn, c.phase = tn, atTurn
}

// maySayNo tells whether c, who does not wait, cannot get the lock now, or not without others' leave.
func (t *trial) maySayNo(c *client) bool {
	l := t.lock
	return len(t.line) > 0 || t.conflicting(c) != nil || l != nil && l.releases ||
		!c.w.Dedicated && (l != nil && l.closed || t.requester != nil && (t.requester.refused || t.requester.phase == atLooking))
}

// holdsGrant: from the turn on, not only from when it is seen.
func (t *trial) holdsGrant(c *client) bool {
	return c.lock != nil && (c.phase == atHold || c.phase == atTurn && c.turn.To == keyqueue.Hold)
}

// holders is how many hold the grant that there is.
func (t *trial) holders() int {
	n := 0
	for _, c := range t.clients {
		if t.holdsGrant(c) && c.lock == t.lock {
			n++
		}
	}
	return n
}

// counts tells whether c holds the lock, on a session that lives.
func (t *trial) counts(c *client) bool {
	if c.w.Dedicated {
		return c.phase == atHold && c.claim != nil
	}
	return t.holdsGrant(c) && c.lock.On.alive()
}

// inside tells whether c holds the lock or asks for it. The holders of a lost grant do not.
func (t *trial) inside(c *client) bool {
	switch {
	case c == t.requester:
		return true
	case c.w.Dedicated:
		return c.phase != atLine && c.phase != atNothing && (c.phase != atTurn || c.turn.To == keyqueue.Ask)
	default:
		return t.lock != nil && t.holdsGrant(c) && c.lock == t.lock
	}
}

func (t *trial) conflicting(c *client) *client {
	for _, d := range t.clients {
		if t.inside(d) && c.conflicts(d) {
			return d
		}
	}
	return nil
}

func (t *trial) idle() bool {
	return len(t.line) == 0 && t.lock == nil && !slices.ContainsFunc(t.clients, t.inside)
}

func (t *trial) held() bool {
	return t.lock != nil || slices.ContainsFunc(t.clients, func(c *client) bool { return c.w.Dedicated && (c.phase == atHold || c.phase == atLeaving) })
}

// answerComes: the server has been asked, or is asked as soon as it has the grant back.
func (t *trial) answerComes() bool {
	r := t.requester
	return r != nil && r.w.Shared && r.phase != atServer && r.phase != atPause || t.lock != nil && t.lock.releases
}

// mustWait: there is a reason why c, the first in line, is not let in.
func (t *trial) mustWait(c *client) bool {
	l := t.lock
	switch {
	case t.conflicting(c) != nil, l != nil && l.releases:
		return true
	case c.w.Dedicated:
		// A refusal takes who does not wait from before it, and lets nobody in: it would wait behind
		// the same process.
		return t.requester != nil && t.requester.refused
	default:
		return t.requester != nil || l != nil && l.closed
	}
}
