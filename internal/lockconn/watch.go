package lockconn

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/pgadvisory/advisory/internal/pgsql"
	"github.com/pgadvisory/advisory/internal/session"
)

// A Holder holds locks, on one Conn or on several, and is told if one of them is lost.
type Holder struct {
	Heartbeat   time.Duration // how often the session is checked
	IdleTimeout time.Duration // after which the server ends a silent session

	mu   sync.Mutex // guards the rest
	lost error      // why
	tell func(cause error)
}

// Begin has tell called when a lock is lost, or if one has been.
func (h *Holder) Begin(tell func(cause error)) {
	h.mu.Lock()
	h.tell = tell
	lost := h.lost
	h.mu.Unlock()
	if lost != nil {
		tell(lost)
	}
}

func (h *Holder) lose(cause error) {
	h.mu.Lock()
	if h.lost == nil {
		h.lost = cause
	}
	tell := h.tell
	h.mu.Unlock()
	if tell != nil {
		tell(cause)
	}
}

// Lost returns why a lock has been lost, or nil.
func (h *Holder) Lost() error {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.lost
}

// A watch checks the session of held locks every heartbeat. If two heartbeats have passed since the
// last proof that the session has the locks, the watch gives it up, and the holders are told.
//
// The first heartbeat has the server watch, too, by an idle_session_timeout of at least three
// heartbeats. So the holders give up before the server frees the locks: they count from an earlier
// moment, in which a statement went out, and to a nearer one.
//
// Where several holders have locks on the session, the shortest Heartbeat and the shortest IdleTimeout
// count. Between heartbeats, a watch is one timer, which may fire once more after its end.
type watch struct {
	timer   *time.Timer   // calls tick
	proof   time.Time     // when a statement went out that the session has answered; see ProveFresh
	every   time.Duration // the pace: the shortest Heartbeat
	since   time.Time     // when that pace began
	next    time.Time     // when the next heartbeat is due; other answers do not postpone it
	beating bool          // one is under way
}

// Hold has the session watched for h, who holds locks on it.
func (c *Conn) Hold(h *Holder) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return LostError{c.lost}
	}
	w, now := &c.watch, time.Now()
	every, first := c.strictLocked(h.Heartbeat), len(c.holders) == 0
	c.holders[h] = struct{}{}
	next := now.Add(every)
	if fresh := w.proof.Add(every); first && fresh.After(now) { // ProveFresh renews an older proof
		next = fresh
	}
	if first || every < w.every {
		w.every, w.since = every, now
	}
	if first || next.Before(w.next) {
		w.next = next
	}
	c.setTimerLocked()
	return nil
}

// LetGo ends the watching for h.
func (c *Conn) LetGo(h *Holder) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.holders, h)
}

// strictLocked returns every, or a third of the time that the server has been told to wait for, if
// that is shorter: it may have been a holder's who has left.
func (c *Conn) strictLocked(every time.Duration) time.Duration {
	if idleTimeout := c.s.IdleTimeout(); idleTimeout > 0 {
		return min(every, idleTimeout/3)
	}
	return every
}

// paceLocked returns the shortest Heartbeat and the shortest IdleTimeout of the holders.
func (c *Conn) paceLocked() (every, idleTimeout time.Duration) {
	for h := range c.holders {
		if every == 0 || h.Heartbeat < every {
			every = h.Heartbeat
		}
		if idleTimeout == 0 || h.IdleTimeout < idleTimeout {
			idleTimeout = h.IdleTimeout
		}
	}
	return c.strictLocked(every), idleTimeout
}

// deadlineLocked returns when the locks cannot be shown to be held any more.
func (c *Conn) deadlineLocked() time.Time {
	w := &c.watch
	from := w.proof
	if w.since.After(from) { // the pace is newer than the proof
		from = w.since
	}
	deadline := from.Add(2 * w.every)
	if idleTimeout := c.s.IdleTimeout(); idleTimeout > 0 { // the server counts from the proof
		if server := w.proof.Add(2 * idleTimeout / 3); server.Before(deadline) {
			return server
		}
	}
	return deadline
}

// tick is called by the timer: a heartbeat is due, or the last one is overdue.
func (c *Conn) tick() {
	c.mu.Lock()
	w, now := &c.watch, time.Now()
	if c.closed || len(c.holders) == 0 {
		c.mu.Unlock()
		return
	}
	deadline := c.deadlineLocked()
	if !now.Before(deadline) {
		cause := error(pgsql.NoAnswer{After: deadline.Sub(w.next).Round(time.Millisecond)})
		if !w.beating { // this process was frozen, and another may hold the lock by now
			cause = fmt.Errorf("no heartbeat for %v", now.Sub(w.proof).Round(time.Millisecond))
		}
		c.mu.Unlock()
		c.lose(cause)
		return
	}
	if !w.beating && !now.Before(w.next) {
		w.beating = true
		w.every, _ = c.paceLocked()
		c.users++
		go c.beat()
	}
	c.setTimerLocked()
	c.mu.Unlock()
}

// setTimerLocked has tick called when the next heartbeat is due, or the one under way is overdue.
func (c *Conn) setTimerLocked() {
	at := c.watch.next
	if c.watch.beating {
		at = c.deadlineLocked()
	}
	if c.watch.timer == nil {
		c.watch.timer = time.AfterFunc(time.Until(at), c.tick)
	} else {
		c.watch.timer.Reset(time.Until(at))
	}
}

// stopLocked stops the timer. One that runs would keep its Conn in memory.
func (w *watch) stopLocked() {
	if w.timer != nil {
		w.timer.Stop()
	}
}

// beat is one heartbeat.
func (c *Conn) beat() {
	defer c.Leave()
	sent := time.Now()
	err := c.Prove(context.Background())
	c.mu.Lock()
	defer c.mu.Unlock()
	w := &c.watch
	w.beating = false
	if err != nil || c.closed || len(c.holders) == 0 {
		return
	}
	w.every, _ = c.paceLocked()
	if next := sent.Add(w.every); !w.next.After(sent) || next.Before(w.next) {
		w.next = next // unless somebody has come meanwhile who is stricter
	}
	c.setTimerLocked()
}

// Prove asks the server whether the session still has its locks, and has it watch the session as
// the holders' IdleTimeout asks. After an error, the session is lost, or ctx has ended.
func (c *Conn) Prove(ctx context.Context) error { return c.Ask(ctx, &Request{Op: prove}) }

// ProveFresh is Prove if the last proof is a heartbeat old, and the server watches the session: the answer to
// a grant may have been so long on its way that the server has ended the session since. A server that does not
// watch has not: then the proof counts from now.
func (c *Conn) ProveFresh(ctx context.Context, every time.Duration) error {
	c.mu.Lock()
	watched := c.s.IdleTimeout() > 0
	stale := time.Since(c.watch.proof) >= c.strictLocked(every)
	if stale && !watched {
		c.watch.proof = time.Now()
	}
	c.mu.Unlock()
	if stale && watched {
		return c.Prove(ctx)
	}
	return nil
}

// heartbeatStatement returns the statement of a heartbeat, and how long its answer may take; or "" if a release
// has left nothing to ask for. It notes the new IdleTimeout, so that the caller must send it.
func (c *Conn) heartbeatStatement() (query string, bound time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	set := ""
	if _, idleTimeout := c.paceLocked(); idleTimeout > 0 && len(c.locks) > 0 {
		set = c.s.ChangeIdleTimeout(idleTimeout)
	}
	if c.s.IdleTimeout() == 0 || len(c.locks) == 0 {
		return "", 0
	}
	bound = session.AnswerBound
	if len(c.holders) > 0 {
		bound = max(time.Millisecond, time.Until(c.deadlineLocked()))
	}
	keys := make([]pgsql.Key, 0, len(c.locks))
	for l, name := range c.locks {
		l.key.Name = name
		keys = append(keys, l.key)
	}
	slices.SortFunc(keys, pgsql.Compare)
	return pgsql.Heartbeat(keys, set, c.s.Nonce()), bound
}
