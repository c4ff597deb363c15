package advisory

import (
	"context"
	"errors"
	"fmt"
	"time"
)

// A watch checks the session of held locks every heartbeat, and ends it when the
// locks cannot be shown to be held any more: by twice a heartbeat after the last
// proof that they were. With the first heartbeat it has the server watch, too: an
// idle_session_timeout of at least three heartbeats makes sure that the server
// does not let go of the locks of a holder that fell silent before the holder,
// counting from an earlier moment to a nearer one, has given up.
//
// Where locks of several holders are on the session, the strictest counts: the shortest
// Heartbeat, and the shortest HolderTimeout.
//
// Between heartbeats it is one timer; nothing runs. It ends with the last hold on the
// session, or with the session: the timer then fires once more, for nothing, because to stop it
// and start it again with each lock may have to wake a thread each time. It is guarded by the
// hub's mutex.
type watch struct {
	timer *time.Timer
	every time.Duration // the shortest Heartbeat of the holds; or one that was shorter, until the next
	since time.Time     // when that began to count
	next  time.Time     // heartbeat
	fires time.Time     // when the timer does: then, or before the next heartbeat; zero: it does not
}

// join has the session of a lease that hd was given watched for it, too.
func (h *hub) join(hd *hold, q *queue, t turn) {
	h.mu.Lock()
	defer h.mu.Unlock()
	switch {
	case q.on != t.on || q.lease != t.lease:
		hd.lostBy = errLostInTurn
	case t.on.lost != nil:
		hd.lostBy = t.on.lost
	default:
		t.on.watchFor(hd)
	}
}

var errLostInTurn = errors.New("the session was lost before the lock was handed on")

// begin is told that hd has its context, which a loss ends from now on.
func (h *hub) begin(hd *hold) {
	h.mu.Lock()
	hd.begun = true
	lost := hd.lostBy
	h.mu.Unlock()
	if lost != nil {
		hd.lost(lost)
	}
}

// watchFor has the session watched for h, which holds locks on it.
func (c *carrier) watchFor(h *hold) {
	w := &c.watch
	every := c.strict(h.cfg.heartbeat)
	first := len(c.holds) == 0
	c.holds[h] = struct{}{}
	next := c.proof.Add(every)
	if !first {
		next = time.Now().Add(every)
	}
	if first || every < w.every {
		w.every, w.since = every, time.Now()
	}
	if first || w.fires.IsZero() || next.Before(w.next) {
		w.set(c, next)
	}
}

// strict is every, or what is left of the silence that the server may have been told to put up
// with, for a lock that is not held any more: three heartbeats, as always.
func (c *carrier) strict(every time.Duration) time.Duration {
	if c.armed {
		return min(every, c.settings.silence/3)
	}
	return every
}

func (w *watch) set(c *carrier, next time.Time) {
	w.next = next
	switch {
	case w.timer == nil:
		w.timer = time.AfterFunc(time.Until(next), c.beat)
	case w.fires.IsZero() || next.Before(w.fires):
		w.timer.Reset(time.Until(next))
	default:
		return
	}
	w.fires = next
}

// unwatch ends the watching for h.
func (c *carrier) unwatch(h *hold) {
	delete(c.holds, h)
}

// beat is one heartbeat.
func (c *carrier) beat() {
	h, w := c.hub, &c.watch
	h.mu.Lock()
	w.fires = time.Time{}
	if len(c.holds) == 0 || c.lost != nil {
		h.mu.Unlock()
		return
	}
	sent := time.Now()
	if early := w.next.Sub(sent); early > 0 { // it was put off
		w.set(c, w.next)
		h.mu.Unlock()
		return
	}
	c.users++
	defer h.leave(c)
	w.every = c.shortest()
	proof := c.proof
	from := proof
	if w.since.After(from) { // nobody has counted from the proof at this pace
		from = w.since
	}
	answerIn := from.Add(2 * w.every).Sub(sent)
	if c.armed { // but the server has
		answerIn = min(answerIn, proof.Add(2*c.settings.silence/3).Sub(sent))
	}
	h.mu.Unlock()
	if answerIn <= 0 {
		// This process was frozen, and another may hold the lock by now.
		c.lose(fmt.Errorf("no heartbeat for %v", sent.Sub(proof).Round(time.Millisecond)))
		return
	}

	// The driver may not return in time. This does.
	overdue := time.AfterFunc(answerIn, func() { c.overdue(proof, noAnswer{answerIn.Round(time.Millisecond)}) })
	err := c.take(context.Background(), answerIn)
	if err == nil {
		err = c.check(answerIn)
		c.give()
	}
	overdue.Stop()
	h.mu.Lock()
	defer h.mu.Unlock()
	switch {
	case err == nil, errors.Is(err, errNothingHeld):
		if len(c.holds) > 0 && c.lost == nil {
			w.every = c.shortest()
			next := sent.Add(c.strict(w.every))
			if w.next.After(sent) && w.next.Before(next) {
				next = w.next // of one that has come meanwhile
			}
			w.set(c, next)
		}
	case errors.As(err, new(noAnswer)) && c.proof.After(proof) && c.lost == nil && !c.gone.Load():
		w.set(c, time.Now()) // others had the turn, and answers
	default:
		h.mu.Unlock()
		c.lose(err)
		h.mu.Lock()
	}
}

// beatNow is the first heartbeat of a session that the server does not watch yet. It is answered
// before it returns, within bound, or the session is lost.
func (c *carrier) beatNow(bound time.Duration) {
	c.hub.mu.Lock()
	armed := c.armed
	c.hub.mu.Unlock()
	if armed {
		return
	}
	err := c.take(context.Background(), bound)
	if err == nil {
		err = c.check(bound)
		c.give()
	}
	if err != nil && !errors.Is(err, errNothingHeld) {
		c.lose(err)
	}
}

// shortest is the shortest Heartbeat of the holds.
func (c *carrier) shortest() (every time.Duration) {
	for hold := range c.holds {
		if every == 0 || hold.cfg.heartbeat < every {
			every = hold.cfg.heartbeat
		}
	}
	return every
}

// overdue loses the session if it is still waited for an answer since proof.
func (c *carrier) overdue(proof time.Time, cause error) {
	c.hub.mu.Lock()
	waited := len(c.holds) > 0 && !c.proof.After(proof)
	c.hub.mu.Unlock()
	if waited {
		c.lose(cause)
	}
}

var errNothingHeld = errors.New("nothing is held")

// check asks the server whether the session is still the one that took the locks, and has it
// watch the session as the holders' HolderTimeout asks. It is for whose turn it is on the session.
//
// The question costs the same however many locks there are. To look for them in pg_locks would
// cost as much as all databases of the server have locks.
func (c *carrier) check(bound time.Duration) error {
	h := c.hub
	h.mu.Lock()
	silence := time.Duration(0)
	for hold := range c.holds {
		if silence == 0 || hold.cfg.holderTimeout < silence {
			silence = hold.cfg.holderTimeout
		}
	}
	// A release may have had its turn just before, and then nothing must follow: the
	// connection may be the pool's.
	if len(c.locks) == 0 || silence == 0 && !c.armed {
		h.mu.Unlock()
		return errNothingHeld
	}
	set := ""
	if silence > 0 && (!c.armed || silence != c.settings.silence) {
		c.settings.silence = silence
		set = c.settings.setStatement(!c.armed)
		c.armed = true
	}
	query := beatStatement(c.keys(), set, c.settings.nonce)
	h.mu.Unlock()
	sent := time.Now()
	rows, err := c.execBy(c.quietSend, context.Background(), bound, query)
	if sqlState(err) == queryCanceled { // pg_cancel_backend, say: the server has answered
		rows, err = c.execBy(c.quietSend, context.Background(), bound, query)
	}
	switch {
	case err != nil:
		return err
	case rows == standbyRows:
		return errStandby
	case rows == 0:
		return errNotHeld
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	c.proof = sent
	return nil
}

// keys is the keys of the locks that the session holds, in order.
func (c *carrier) keys() []Key {
	keys := make([]Key, 0, len(c.locks))
	for l, name := range c.locks {
		keys = append(keys, Key{space: l.id.space, id: l.id.id, name: name})
	}
	return sorted(keys)
}

// lostError is the error of locks that were held and are lost.
func lostError(op string, keys []Key, cause error) error {
	errs := []error{ErrLost, cause}
	if errors.Is(cause, errNotHeld) {
		errs = errs[:1]
	}
	return &lockError{op: op, key: keyList(keys), msg: "lock lost: " + explain(cause), errs: errs}
}
