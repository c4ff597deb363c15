package keyqueue_test

import (
	"errors"
	"slices"
	"strconv"
	"time"

	"github.com/pgadvisory/advisory/internal/keyqueue"
)

// What a client is at. The calls of the queue between which anything else may happen are steps of
// their own.
type phase uint8

const (
	atNothing  phase = iota // it has what it wanted, and is gone
	atLine                  // it waits in the queue
	atTurn                  // its turn has come, and it has not seen it
	atAsking                // it is to try on the common session
	atTrying                // which is under way
	atPause                 // it was refused, and will try again
	atServer                // it waits in the server's queue
	atGrant                 // the server has granted; the queue does not know
	atLate                  // it has given up while it tried, which is under way
	atUndoing               // that was granted
	atLooking               // it looks whether others wait
	atHold                  // it holds the lock
	atUnlock                // the queue has said so; the server does not know
	atUnlocked              // the server has it back; the queue does not know
	atLeaving               // it was dedicated and has unlocked; the queue does not know
)

// A client is a caller's request, and its hold.
type client struct {
	no      int
	w       waiter
	several bool // it wants several locks at once, or goes
	phase   phase
	turn    turn
	waited  bool // in line: its turn came by Turns
	asks    bool // it looks: the server is asked
	refused bool // the server has said no
	sent    time.Time
	on      *session
	claim   *claim // on a session of its own
	lock    *lock
}

func (c *client) String() string {
	s := strconv.Itoa(c.no)
	for _, a := range []struct {
		is   bool
		name string
	}{{c.w.Shared, "shared"}, {c.w.Dedicated, "dedicated"}, {c.w.NoWait, "nowait"}, {c.several, "several"}} {
		if a.is {
			s += " " + a.name
		}
	}
	return s
}

func (c *client) conflicts(d *client) bool { return c != d && (!c.w.Shared || !d.w.Shared) }

func (t *trial) arrive() {
	t.came++
	c := &client{no: t.came}
	c.w = waiter{Shared: t.of100(t.sharing), Dedicated: t.of100(t.dedicated), NoWait: t.of100(t.noWaits)}
	t.clients = append(t.clients, c)
	if !c.w.Dedicated && t.of100(10) {
		c.several, c.w.NoWait = true, true
		idle := t.idle()
		in := t.q.Idle() && t.q.Enter(&c.w, t.now).To == keyqueue.Ask
		t.say("%v enters: %v", c, in)
		t.must(in == idle, "the queue lets it in at once: %v; it is idle: %v", in, idle)
		if in {
			t.seen["several at once"]++
			t.requester, c.phase = c, atAsking
		} else {
			c.phase = atNothing
		}
		return
	}
	tn := t.q.Enter(&c.w, t.now)
	t.say("%v enters: %s", c, actionNames[tn.To])
	switch tn.To {
	case keyqueue.Await:
		t.line, c.phase = append(t.line, c), atLine
		if c.w.NoWait {
			t.seen["shared the answer, NoWait"]++
		}
	case keyqueue.Refuse:
		t.must(c.w.NoWait, "%v is refused, and would wait", c)
		t.must(t.maySayNo(c), "%v is refused, and there is no reason", c)
		t.seen["refused on entering"]++
		c.phase = atNothing
	default:
		t.must(len(t.line) == 0, "%v overtakes %v", c, t.line)
		if tn.To == keyqueue.Hold {
			t.seen["joined"]++
		}
		t.begin(c, tn)
	}
	t.collect()
}

// act is the next thing that a client does, or that happens to it.
func (t *trial) act(c *client) {
	givesUp := !t.calm && t.of100(12)
	slow := c.phase == atLooking || c.phase == atUnlocked && !c.lock.On.alive()
	if slow && !t.calm && t.of100(75) {
		return // what comes meanwhile is what matters
	}
	switch c.phase {
	case atLine:
		if givesUp {
			t.say("%v cancels", c)
			t.line = slices.DeleteFunc(t.line, func(d *client) bool { return d == c })
			c.phase = atNothing
			t.must(t.q.Cancel(&c.w, t.now), "%v cannot cancel, and its turn has not come", c)
			t.seen["cancelled in line"]++
			t.collect()
		}
	case atTurn:
		if c.waited && !t.calm && t.of100(25) {
			t.giveBack(c)
		} else {
			t.take(c)
		}
	case atAsking:
		t.try(c, givesUp)
	case atTrying:
		t.tried(c, givesUp)
	case atPause:
		if givesUp {
			t.giveUp(c)
		} else {
			c.phase = atAsking
		}
	case atServer:
		t.waits(c, givesUp)
	case atGrant:
		t.granted(c, givesUp)
	case atLate:
		if own := (&claim{c.w.Shared}); c.on.alive() && t.server.try(own) {
			c.on.claim = own
			c.phase = atUndoing
			return
		}
		t.seen["gave up late"]++
		t.giveUp(c)
	case atUndoing:
		t.unlockServer(c.on)
		t.giveUp(c)
	case atLooking:
		t.looked(c, givesUp)
	case atHold:
		if t.calm || t.of100(t.briefness) {
			t.release(c)
		}
	case atUnlock:
		t.unlock(c)
	case atUnlocked:
		t.say("%v unlocked", c)
		if t.lock == c.lock {
			t.lock = nil
		} else {
			t.seen["unlocked after the loss"]++
		}
		c.phase = atNothing
		t.q.Unlocked(c.lock.grant, t.now)
		t.collect()
	case atLeaving:
		t.releaseDedicated(c)
	}
}

// take is when a client sees its turn.
func (t *trial) take(c *client) {
	switch c.turn.To {
	case keyqueue.Ask:
		c.phase = atAsking
	case keyqueue.Hold:
		c.phase = atHold
	case keyqueue.Look:
		c.asks = !c.turn.Grant.On.lost
		c.phase = atLooking
	case keyqueue.Refuse:
		c.phase = atNothing
	}
}

// giveBack is when a client stops waiting in the moment that its turn comes.
func (t *trial) giveBack(c *client) {
	t.say("%v gives back its turn: %s", c, actionNames[c.turn.To])
	t.must(!t.q.Cancel(&c.w, t.now), "%v can cancel, and its turn has come", c)
	switch c.turn.To {
	case keyqueue.Ask:
		if c.w.Dedicated {
			t.seen["ask given back, dedicated"]++
		} else {
			t.seen["ask given back"]++
		}
		t.giveUp(c)
	case keyqueue.Look:
		t.seen["look given back"]++
		t.giveUp(c)
	case keyqueue.Hold:
		t.seen["hold given back"]++
		t.release(c)
	case keyqueue.Refuse:
		c.phase = atNothing
	}
}

// try is when a request goes out.
func (t *trial) try(c *client, givesUp bool) {
	if givesUp {
		t.giveUp(c)
		return
	}
	if c.w.Dedicated {
		c.claim = &claim{c.w.Shared}
		switch {
		case t.server.try(c.claim):
			c.phase = atHold
			t.q.GrantedDedicated(&c.w)
			if t.lock != nil {
				t.seen["dedicated beside the grant"]++
			}
		case c.w.NoWait:
			c.claim = nil
			t.giveUp(c)
		default:
			c.phase = atServer
			t.server.wait(c.claim)
		}
		return
	}
	c.on = t.shared
	if c.on == nil {
		c.on = t.newSession(nil)
	}
	t.must(c.on.claim == nil, "%v asks for a lock that the session has", c)
	c.sent = t.now
	c.phase = atTrying
}

// tried is the server's answer to it.
func (t *trial) tried(c *client, givesUp bool) {
	if givesUp && t.of100(50) {
		t.say("%v gives up before the answer", c)
		c.phase = atLate
		return
	}
	if !c.on.alive() {
		t.mark(c.on)
		switch {
		case givesUp && !c.several && t.of100(50):
			t.fails(c, errors.New("no answer"))
		case givesUp || c.several:
			t.giveUp(c)
		default:
			c.phase = atAsking
		}
		return
	}
	own := &claim{c.w.Shared}
	if t.server.try(own) {
		c.on.claim = own
		c.phase = atGrant
		return
	}
	t.say("%v is refused by the server", c)
	if c.w.NoWait {
		t.seen["refused: NoWait asked"]++
		if c.several { // it does not know of which key
			t.giveUp(c)
		} else {
			t.fails(c, errors.New("another holds the lock"))
		}
		return
	}
	c.refused = true
	if t.of100(70) {
		c.phase, c.sent = atServer, t.now
		c.claim = own
		t.server.wait(own)
	} else {
		c.phase = atPause // no connection can be spared
	}
	t.q.Refused()
	t.collect()
}

// waits is one who waits in the server's queue.
func (t *trial) waits(c *client, givesUp bool) {
	switch {
	case givesUp:
		t.server.drop(c.claim)
		c.claim = nil
		if !c.w.Dedicated && t.of100(50) {
			t.say("%v makes room for others", c)
			c.phase = atPause
			return
		}
		t.giveUp(c)
	case !t.server.holds(c.claim):
	case c.w.Dedicated:
		c.phase = atHold
		t.q.GrantedDedicated(&c.w)
	default:
		t.seen["granted from the server's queue"]++
		c.on, c.claim = t.newSession(c.claim), nil
		c.phase = atGrant
	}
}

// granted is when the requester tells the queue of its grant.
func (t *trial) granted(c *client, givesUp bool) {
	if c.on.lost {
		t.seen["granted, session lost"]++
		if givesUp || c.several {
			t.giveUp(c)
		} else {
			c.phase = atAsking
		}
		return
	}
	t.must(t.lock == nil, "%v is granted a lock, and there is one", c)
	t.requester, c.phase = nil, atHold
	t.lock = &lock{shared: c.w.Shared, until: c.sent.Add(keyqueue.HandOffFor)}
	c.lock = t.lock
	t.lock.grant = t.q.Granted(c.on, c.sent, t.now)
	t.say("%v granted", c)
	t.must(t.lock.On == c.on && t.lock.No > t.last, "the grant after number %d is %+v", t.last, t.lock.grant)
	t.last = t.lock.No
	t.collect()
}

func (t *trial) giveUp(c *client) { t.fails(c, nil) }

// fails is giveUp for a reason that is also one for those who share its answer.
func (t *trial) fails(c *client, why error) {
	t.say("%v gives up: %v", c, why)
	c.phase = atNothing
	if !c.w.Dedicated {
		t.requester = nil
	}
	t.q.Done(&c.w, t.now, why)
	t.collect()
	t.must(why == nil || !slices.ContainsFunc(t.line, func(c *client) bool { return c.w.NoWait }), "somebody waits for another answer")
}

func (t *trial) releaseDedicated(c *client) {
	t.say("%v leaves", c)
	c.phase = atNothing
	t.q.Done(&c.w, t.now, nil)
	t.collect()
}

// looked is the end of a look.
func (t *trial) looked(c *client, fails bool) {
	on := c.turn.Grant.On
	others := false
	if t.busy > 0 && !t.calm && t.of100(40) {
		t.comes(&claim{}) // in the same moment
	}
	switch {
	case !c.asks || !on.alive():
		t.seen["looked, session lost"]++
		t.mark(on)
		if !on.told {
			t.tell(on)
		}
	case fails:
		t.seen["look failed"]++
		t.giveUp(c)
		return
	default:
		others = len(t.server.line) > 0
		if t.of100(t.losses) {
			t.mark(on) // after the answer
		}
	}
	l := t.lock
	current := l != nil && l.grant == c.turn.Grant && !l.releases
	want := keyqueue.Await
	switch {
	case current && !others:
		t.seen["looked, nobody"]++
		want = keyqueue.Hold
		l.until = t.now.Add(keyqueue.HandOffFor)
	case current:
		t.seen["looked, others"]++
		l.closed = true
	case l == nil:
		t.seen["looked, lock gone"]++
	default:
		t.seen["looked, goes back"]++
	}
	if others && c.w.NoWait {
		t.seen["looked, others: NoWait refused"]++
		want = keyqueue.Refuse
	}
	t.requester = nil
	tn := t.q.Looked(&c.w, c.turn.Grant, others, t.now)
	t.say("%v looks, others %v: %s", c, others, actionNames[tn.To])
	t.must(tn.To == want, "%v is told %s after its look, want %s", c, actionNames[tn.To], actionNames[want])
	switch tn.To {
	case keyqueue.Hold:
		t.must(tn.Grant == l.grant, "%v gets another grant than there is", c)
		c.phase, c.lock = atHold, l
	case keyqueue.Await:
		t.line, c.phase = append([]*client{c}, t.line...), atLine
	default:
		c.phase = atNothing
	}
	t.collect()
}

func (t *trial) release(c *client) {
	if c.w.Dedicated {
		if c.claim != nil {
			t.server.drop(c.claim)
			c.claim = nil
		}
		c.phase = atLeaving
		return
	}
	c.phase = atNothing
	l := c.lock
	next := len(t.line)
	unlock := t.q.Release(l.grant, t.now)
	t.say("%v releases: unlock %v", c, unlock)
	if l != t.lock {
		t.must(!unlock, "%v is to unlock a grant that it has lost", c)
		t.collect()
		return
	}
	t.collect()
	t.must(unlock == (t.holders() == 0), "%v is told to unlock: %v, and there are %d holders left", c, unlock, t.holders())
	switch {
	case !unlock:
		if len(t.line) < next {
			t.seen["handed on"]++
		}
	case next > 0 && t.line[0].w.Shared != l.shared:
		t.seen["not handed on: other mode"]++
	case next > 0 && !t.now.Before(l.until):
		t.seen["not handed on: too late"]++
	}
	if unlock {
		dedicated := slices.ContainsFunc(t.clients, func(c *client) bool { return c.w.Dedicated && t.inside(c) })
		t.must(next == 0 || t.line[0].w.Dedicated || t.line[0].w.Shared != l.shared || l.closed || !t.now.Before(l.until) || dedicated || t.requester != nil,
			"the grant is not handed on to %v", t.line)
		l.releases = true
		c.phase = atUnlock
	}
	if l.On.lost {
		t.seen["released on a session known to be lost"]++
		c.phase = atNothing
	}
}

func (t *trial) unlock(c *client) {
	s := c.lock.On
	c.phase = atUnlocked
	if !t.calm && t.of100(5*t.losses) { // there is no answer
		t.mark(s)
		return
	}
	t.unlockServer(s)
}
