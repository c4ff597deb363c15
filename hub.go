package advisory

import (
	"context"
	"database/sql"
	"errors"
	"math/rand/v2"
	"runtime"
	"sync"
	"time"
	"weak"
)

var errPanicked = errors.New("the driver panicked")

// A hub is all that this process does with one *sql.DB's locks: the queue of each key, and
// the session that carries the locks which the process holds.
//
// A request goes from the key's queue to the shared session, which tries; if another
// process holds the lock, to the server's queue, on a session of its own, or, where there
// are more of those than the pool can spare, to trying again.
type hub struct {
	mu     sync.Mutex
	queues map[lockID]*queue
	shared *carrier // which new locks are tried on; nil: there is none at present

	opening bool     // somebody opens the shared session
	opened  *opening // told of how that went; nil: nobody asks

	sessions int  // carriers, and those that wait in the server's queue
	polling  int  // those who wait, and do not have such a session
	asking   bool // somebody asks who holds a lock
	seed     uint64

	outage *outage // that waits are in; nil: none are

	refused refusals

	checking chan struct{} // filled by the Check that is under way
}

// refusals are what the server has been found not to execute.
type refusals struct {
	wait  bool // the statement that waits
	check bool // the setting of checkCall
}

// An opening is what those wait for who find another opening the shared session.
type opening struct {
	done chan struct{}
	err  error // not that of the opener's own ctx
}

// hubs go with their *sql.DB: a hub that nobody uses knows nothing, and runs nothing.
var hubs struct {
	mu sync.Mutex
	of map[weak.Pointer[sql.DB]]*hub
}

func hubOf(db *sql.DB) *hub {
	p := weak.Make(db)
	hubs.mu.Lock()
	defer hubs.mu.Unlock()
	h := hubs.of[p]
	if h == nil {
		h = &hub{queues: make(map[lockID]*queue), seed: rand.Uint64(), checking: make(chan struct{}, 1)}
		if hubs.of == nil {
			hubs.of = make(map[weak.Pointer[sql.DB]]*hub)
		}
		hubs.of[p] = h
		runtime.AddCleanup(db, forget, p)
	}
	return h
}

func forget(p weak.Pointer[sql.DB]) {
	hubs.mu.Lock()
	defer hubs.mu.Unlock()
	delete(hubs.of, p)
}

// maxWaits is how many sessions wait in the server's queue at a time where the pool has no
// limit.
const maxWaits = 8

// How long a request that cannot wait in the server's queue pauses between two tries: at
// first, and at most.
const (
	pollMin = 5 * time.Millisecond
	pollMax = 250 * time.Millisecond
)

// yieldAfter is how long one waits in the server's queue while others cannot.
const yieldAfter = time.Second

// An acquisition is one caller's way to its locks.
type acquisition struct {
	attempts
	hub  *hub
	hold *hold // that the locks are for; nil: they are on a session of its own
	w    waiter

	yielded bool // it has waited in the server's queue, and let others

	// A request that was left while it was under way, and the session that it is on.
	late   *request
	lateOn *carrier
}

// A grant is one lock that a hold has.
type grant struct {
	key   Key
	q     *queue
	lease uint64
	on    *carrier

	unlock bool // its release asks the server to unlock it
}

// acquire acquires the locks of keys, which are sorted. After an error none is held.
func (a *acquisition) acquire(keys []Key) ([]grant, error) {
	for {
		all, err := a.acquireAll(keys)
		if err != nil {
			return nil, err
		}
		if a.hold.leads {
			all[0].on.beatNow(2 * a.cfg.heartbeat)
		}
		lost := a.hub.lostOf(a.hold)
		switch {
		case lost == nil:
			return all, nil
		case errors.Is(lost, errStandby):
			a.giveBack(all)
			return nil, lost
		}
		// The first of several, while the last were waited for, say.
		a.giveBack(all)
		if err := a.again(sessionLost{lost}, true, false); err != nil {
			return nil, err
		}
	}
}

// lostOf is why a session that carries locks of hd is lost, if one is. It is told only once.
func (h *hub) lostOf(hd *hold) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	lost := hd.lostBy
	hd.lostBy = nil
	return lost
}

func (a *acquisition) acquireAll(keys []Key) (all []grant, err error) {
	var grants []grant
	returned := false
	defer func() {
		if !returned { // the driver panicked, or the Logger
			a.stepAside(keys)
		}
		if !returned || err != nil {
			a.giveBack(grants)
		}
	}()
	if len(keys) > 1 {
		all, err = a.acquireAtOnce(keys)
	}
	if all == nil && err == nil {
		for i := range keys {
			var g grant
			if g, err = a.acquireOne(keys[i : i+1]); err != nil {
				break
			}
			grants = append(grants, g)
			// A grant that comes too late is not used.
			if err = a.ctx.Err(); err != nil {
				break
			}
		}
		all = grants
	}
	returned = true
	return all, err
}

// stepAside ends the turns of one who cannot go on.
func (a *acquisition) stepAside(keys []Key) {
	h := a.hub
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, k := range keys {
		if q := h.queues[k.lockID()]; q != nil && q.asker != nil && q.asker.by == a {
			q.gaveUp(q.asker, time.Now())
			h.tidy(q)
		}
	}
}

// acquireAtOnce acquires all the locks in one statement. If that cannot be, it returns nil:
// waiting for one lock while holding another is safe only in order.
func (a *acquisition) acquireAtOnce(keys []Key) (grants []grant, err error) {
	h := a.hub
	waiters := make([]waiter, len(keys))
	h.mu.Lock()
	in := 0
	for in < len(keys) {
		w := &waiters[in]
		w.by, w.shared, w.noWait = a, a.cfg.shared, true
		q := h.queue(keys[in].lockID())
		if !q.enterIdle(w) {
			break
		}
		in++
	}
	h.mu.Unlock()
	var c *carrier
	var sent time.Time
	if in < len(keys) {
		err = errTaken
	} else {
		c, sent, err = a.try(keys)
	}
	a.settle(func() {
		h.mu.Lock()
		defer h.mu.Unlock()
		now := time.Now()
		if err == nil && c.lost != nil {
			err = sessionLost{c.lost}
		}
		for i, k := range keys[:in] {
			q := h.queues[k.lockID()]
			if err == nil {
				grants = append(grants, grant{key: k, q: q, lease: q.granted(c, sent, now), on: c})
				c.watchFor(a.hold)
			} else {
				q.gaveUp(&waiters[i], now)
				h.tidy(q)
			}
		}
	})
	if c != nil {
		h.leave(c)
	}
	switch {
	case err == nil && a.ctx.Err() == nil:
		return grants, nil
	case err == nil:
		a.giveBack(grants)
		return nil, a.ctx.Err()
	case err == errTaken, errors.Is(err, errRefused) && !a.cfg.noWait, errors.As(err, new(sessionLost)):
		return nil, nil
	default:
		return nil, err
	}
}

var errTaken = errors.New("others of this process have it, or wait for it")

// acquireOne acquires the lock of one key.
func (a *acquisition) acquireOne(keys []Key) (grant, error) {
	a.w = waiter{by: a, shared: a.cfg.shared, noWait: a.cfg.noWait}
	q, t := a.enter(keys[0])
	for {
		var err error
		switch t.to {
		case held:
			a.hub.join(a.hold, q, t)
			return grant{key: keys[0], q: q, lease: t.lease, on: t.on}, nil
		case refuse:
			return grant{}, errRefused
		case ask:
			return a.askServer(keys, q)
		case look:
			t, err = a.look(keys, q, t)
		case await:
			t, err = a.awaitTurn(keys[0], q)
		}
		if err != nil {
			return grant{}, err
		}
	}
}

func (a *acquisition) enter(k Key) (*queue, turn) {
	h := a.hub
	h.mu.Lock()
	defer h.mu.Unlock()
	q := h.queue(k.lockID())
	return q, q.enter(&a.w, time.Now())
}

// awaitTurn waits in the process's own queue.
func (a *acquisition) awaitTurn(k Key, q *queue) (turn, error) {
	a.waited = true
	var end <-chan time.Time
	if !a.deadline.IsZero() {
		timer := time.NewTimer(time.Until(a.deadline))
		defer timer.Stop()
		end = timer.C
	}
	glance := time.NewTicker(sliceMax) // at the pool, which may have been closed
	defer glance.Stop()
	var err error
	for err == nil {
		select {
		case t := <-a.w.turns:
			a.outage = time.Time{}
			return t, nil
		case <-a.ctx.Done():
			err = a.ctx.Err()
		case <-end:
			err = errTimeout
		case <-glance.C:
			err = poolClosed(a.db)
		}
	}
	h := a.hub
	h.mu.Lock()
	now := time.Now()
	if q.cancel(&a.w, now) {
		h.tidy(q)
		h.mu.Unlock()
		if err == errTimeout {
			a.hint = a.who(k)
		}
		return turn{}, err
	}
	// Its turn has come nevertheless, and is the next one's.
	t := <-a.w.turns
	switch t.to {
	case ask:
		q.gaveUp(&a.w, now)
	case look:
		a.w.noWait = true
		q.looked(&a.w, 0, true, now)
	}
	h.tidy(q)
	h.mu.Unlock()
	if t.to == held {
		a.giveBack([]grant{{key: k, q: q, lease: t.lease, on: t.on}})
	}
	return turn{}, err
}

// look looks whether others wait for the lock that other shared holders of this process
// have, and which the caller would have at once.
func (a *acquisition) look(keys []Key, q *queue, t turn) (turn, error) {
	h := a.hub
	h.mu.Lock()
	r := request{op: opLook, keys: keys}
	var err error
	if t.lease == q.lease && t.on.lost == nil {
		t.on.users++
		h.mu.Unlock()
		err = t.on.ask(a.ctx, &r, answerWithin(0, a.deadline))
		h.leave(t.on)
		h.mu.Lock()
	}
	defer h.mu.Unlock()
	defer h.tidy(q)
	now := time.Now()
	switch {
	case errors.As(err, new(unanswered)):
		if a.over() {
			err = errors.Join(errTimeout, err)
		}
		q.gaveUp(&a.w, now)
		return turn{}, err
	case err == nil && t.on.lost == nil:
	case err == nil, errors.As(err, new(sessionLost)), sessionGone(err):
		q.lost(t.on, now)
	default:
		q.gaveUp(&a.w, now)
		return turn{}, err
	}
	return q.looked(&a.w, t.lease, r.ok, now), nil
}

// askServer acquires the lock from the server: it is the caller's turn to.
func (a *acquisition) askServer(keys []Key, q *queue) (grant, error) {
	h := a.hub
	pause := pollMin
	polled := false
	for {
		c, sent, err := a.try(keys)
		if errors.Is(err, errRefused) && !a.cfg.noWait {
			a.waited = true
			c, sent, err = a.wait(keys[0], q)
		}
		if err == nil {
			h.mu.Lock()
			if c.lost == nil {
				g := grant{key: keys[0], q: q, lease: q.granted(c, sent, time.Now()), on: c}
				c.watchFor(a.hold)
				h.mu.Unlock()
				h.leave(c)
				return g, nil
			}
			h.mu.Unlock()
			h.leave(c)
			err = a.again(sessionLost{c.lost}, true, false)
			if err == nil {
				continue
			}
		}
		if errors.Is(err, errYield) {
			if a.yielded {
				pause = pollMax // it is others' turn
			}
			h.poll(1)
			sleep(a.ctx, within(h.untilTick(pause), a.deadline))
			h.poll(-1)
			pause = min(2*pause, pollMax)
			if err = a.ctx.Err(); err == nil && within(1, a.deadline) <= 0 {
				err = errTimeout
				polled = true
			}
			if err == nil {
				continue
			}
		}
		a.settle(func() {
			h.mu.Lock()
			defer h.mu.Unlock()
			q.gaveUp(&a.w, time.Now())
			h.tidy(q)
		})
		if polled { // who waits in the server's queue has asked already
			a.hint = a.who(keys[0])
		}
		return grant{}, err
	}
}

// try tries to acquire the locks of keys, all or none, on the shared session. If it does,
// the caller has use for the session until it calls leave.
func (a *acquisition) try(keys []Key) (c *carrier, sent time.Time, err error) {
	h := a.hub
	for {
		if err := a.ctx.Err(); err != nil {
			return nil, time.Time{}, err
		}
		if err := a.joinUnderWay(); err != nil {
			return nil, time.Time{}, err
		}
		c, own, err := a.session()
		opened := err == nil
		if opened {
			r := &request{op: opTry, keys: keys, shared: a.cfg.shared, every: a.cfg.heartbeat}
			err = c.ask(a.ctx, r, answerWithin(0, a.deadline))
			switch {
			case err == nil && r.ok && a.ctx.Err() == nil:
				return c, r.sent, nil
			case err == nil && r.ok:
				// A grant that comes too late is not used.
				a.late, a.lateOn = r, c
				return nil, time.Time{}, a.ctx.Err()
			case errors.As(err, new(unanswered)):
				a.late, a.lateOn = r, c
				if a.over() {
					err = errors.Join(errTimeout, err)
				}
				return nil, time.Time{}, err
			}
			h.leave(c)
			if err == nil {
				a.outage = time.Time{} // the server has answered
				return nil, time.Time{}, errRefused
			}
		}
		if err = a.again(err, opened, own); err != nil {
			return nil, time.Time{}, err
		}
	}
}

// settle runs then when the session is certain to hold nothing that nobody has asked for:
// now, or, if a request was left while it was under way, when that has come back.
func (a *acquisition) settle(then func()) {
	r, c := a.late, a.lateOn
	if r == nil {
		then()
		return
	}
	a.late, a.lateOn = nil, nil
	undo := func() {
		if r.ok { // if this fails, the session is lost
			_ = c.ask(context.Background(), &request{op: opUnlock, keys: r.keys, shared: r.shared}, releaseBound)
		}
		then()
		a.hub.leave(c)
	}
	if r.done == nil {
		undo()
		return
	}
	go func() {
		<-r.done // closed at answerBound, if not before
		undo()
	}()
}

// wait waits for the lock in the server's queue, on a session of its own, which then has
// the lock. It returns errYield if that cannot be, or for longer than others should wait.
func (a *acquisition) wait(k Key, q *queue) (*carrier, time.Time, error) {
	h := a.hub
	h.mu.Lock()
	q.refused()
	h.mu.Unlock()
	if a.yielded = h.mayWait(a.db); !a.yielded {
		return nil, time.Time{}, errYield
	}
	began := time.Now()
	carries := false
	defer func() {
		if !carries { // also if the driver panics
			h.waitEnded(a.ended)
		}
	}()
	s, err := a.keepTrying(func(s *session) error {
		s.watchOver()
		s.settings.silence = a.cfg.holderTimeout
		s.enough = func() bool { return time.Since(began) > yieldAfter && h.othersPoll() }
		if err := s.wait(a.ctx, k, a.began, a.deadline); err != nil {
			if s.refused(err) {
				err = errYield
			}
			return err
		}
		s.held = []Key{k}
		if err := a.ctx.Err(); err != nil {
			return err
		}
		return s.confirm(a.ctx, a.cfg.heartbeat, a.deadline)
	})
	if err != nil {
		return nil, time.Time{}, err
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	carries = true
	c := newCarrier(h, s)
	c.users = 1
	c.locks[lock{k.lockID(), a.cfg.shared}] = k.name
	if h.shared == nil || len(h.shared.locks) == 0 {
		h.shared = c
		h.tellOpened(nil) // somebody may be about to open another
	}
	return c, time.Now(), nil // it was asked for long before it was granted
}

// waitEnded uncounts a session that waited, when that has ended.
func (h *hub) waitEnded(ended <-chan struct{}) {
	uncount := func() {
		h.mu.Lock()
		defer h.mu.Unlock()
		h.sessions--
	}
	select {
	case <-ended:
	default:
		if ended != nil { // its caller has left it
			go func() {
				<-ended
				uncount()
			}()
			return
		}
	}
	uncount()
}

// mayWait tells whether one more session may wait in the server's queue, and counts it. All
// sessions of the hub, the shared one included, take no more than half of a limited pool.
func (h *hub) mayWait(db *sql.DB) bool {
	stats := db.Stats()
	limit := 1 + maxWaits
	if stats.MaxOpenConnections > 0 {
		limit = min(limit, stats.MaxOpenConnections/2)
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	sessions := h.sessions
	if h.shared == nil {
		sessions++ // there is always room for that
	}
	if h.refused.wait || exhausted(stats) || sessions >= limit {
		return false
	}
	h.sessions++
	return true
}

// othersPoll tells whether others cannot wait in the server's queue, and try again and again.
func (h *hub) othersPoll() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.polling > 0
}

// untilTick is a pause of up to pause and some: to the next tick of a clock that is the same
// for all of this process, so that they try together, and another one in others.
func (h *hub) untilTick(pause time.Duration) time.Duration {
	now := time.Now()
	tick := now.UnixNano()/int64(pause) + 1
	jitter := rand.New(rand.NewPCG(h.seed, uint64(tick))).Int64N(int64(pause / 8))
	return time.Unix(0, tick*int64(pause)+jitter).Sub(now)
}

func (h *hub) poll(n int) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.polling += n
}

// tellOpened tells those who wait for the shared session that it has been opened, or has not.
func (h *hub) tellOpened(err error) {
	if h.opened != nil {
		h.opened.err = err
		close(h.opened.done)
		h.opened = nil
	}
}

// session returns the shared session, which the caller has use for until it calls leave.
// If there is none, it opens one, which own tells, or waits for who does.
func (a *acquisition) session() (c *carrier, own bool, err error) {
	h := a.hub
	if a.stale < 0 {
		a.stale = a.db.Stats().Idle
	}
	h.mu.Lock()
	for h.shared == nil && h.opening {
		if h.opened == nil {
			h.opened = &opening{done: make(chan struct{})}
		}
		o := h.opened
		h.mu.Unlock()
		ctx, cancel := a.untilDeadline()
		select {
		case <-o.done:
			err = o.err
		case <-ctx.Done():
			err = ctx.Err()
		}
		cancel()
		if err != nil {
			return nil, false, err
		}
		h.mu.Lock()
	}
	if c := h.shared; c != nil {
		c.users++
		h.mu.Unlock()
		if err := poolClosed(a.db); err != nil {
			h.leave(c)
			return nil, false, err
		}
		return c, false, nil
	}
	h.opening = true
	h.mu.Unlock()
	err = errPanicked
	defer func() {
		h.mu.Lock()
		defer h.mu.Unlock()
		h.opening = false
		if a.ctx.Err() != nil || a.over() {
			h.tellOpened(nil) // that is no news for others
		} else {
			h.tellOpened(err)
		}
	}()
	ctx, cancel := a.untilDeadline()
	defer cancel()
	s, err := openSession(ctx, a.db, a.cfg)
	if err == nil {
		s.watchOver()
	}
	h.mu.Lock()
	if c := h.shared; c != nil && !isClosed(err) { // one that waited has been granted its lock meanwhile
		c.users++
		h.mu.Unlock()
		if err == nil {
			s.handBack()
		}
		return c, false, nil
	}
	defer h.mu.Unlock()
	if err != nil {
		return nil, true, err
	}
	c = newCarrier(h, s)
	c.users = 1
	h.sessions++
	h.shared = c
	return c, true, nil
}

func newCarrier(h *hub, s *session) *carrier {
	return &carrier{hub: h, session: s, locks: make(map[lock]string, 1), holds: make(map[*hold]struct{}, 1)}
}

// leave ends one use of c. The last one hands its connection back.
func (h *hub) leave(c *carrier) {
	h.mu.Lock()
	last := c.users == 1 && len(c.locks) == 0 && c.lost == nil
	if last && c.batch != nil {
		// Those who have just had an answer may have another request.
		h.mu.Unlock()
		runtime.Gosched()
		h.mu.Lock()
		last = c.users == 1 && len(c.locks) == 0 && c.lost == nil
	}
	c.users--
	if !last {
		h.mu.Unlock()
		return
	}
	c.lost = errFinished
	if h.shared == c {
		h.shared = nil
	}
	h.mu.Unlock()
	defer func() {
		h.mu.Lock()
		defer h.mu.Unlock()
		h.sessions--
	}()
	if err := c.finish(); err != nil {
		c.log.Warn("advisory: session discarded, because it could not be cleaned", "error", err)
	}
}

var errFinished = errors.New("the session has been handed back")

// release ends hd's hold of grants. It returns nil if each lock was held until then, which the
// server says: also of a lock that is handed on.
func (h *hub) release(hd *hold, grants []grant) (err error) {
	if len(grants) == 0 {
		return nil
	}
	c := grants[0].on
	n := 1 // of those that c carries, which go first
	for i := 1; i < len(grants); i++ {
		if grants[i].on == c {
			grants[n], grants[i] = grants[i], grants[n]
			n++
		}
	}
	defer func() { err = join(err, h.release(hd, grants[n:])) }() // even if the driver panics
	return h.releaseOn(c, hd, grants[:n])
}

// lostCause is err, or if that says that a session was lost, why.
func lostCause(err error) error {
	if err != nil {
		var lost sessionLost
		if errors.As(err, &lost) {
			return lost.cause
		}
	}
	return err
}

// giveBack releases what an acquisition got in vain. One that is late does not wait for that.
func (a *acquisition) giveBack(grants []grant) {
	if len(grants) > 0 && (a.ctx.Err() != nil || a.over()) {
		go func() { _ = a.hub.release(a.hold, grants) }()
		return
	}
	_ = a.hub.release(a.hold, grants)
}

// releaseOn releases those locks of hd that c carries.
func (h *hub) releaseOn(c *carrier, hd *hold, grants []grant) error {
	r := &request{shared: hd.cfg.shared}
	h.mu.Lock()
	now := time.Now()
	for i := range grants {
		g := &grants[i]
		if g.unlock = g.q.leave(g.lease, now); g.unlock {
			r.op = opUnlock
			r.keys = append(r.keys, g.key)
		}
	}
	if c.lost != nil {
		err := c.lost
		h.mu.Unlock()
		return err
	}
	c.unwatch(hd)
	c.users++
	h.mu.Unlock()
	// The answer says that the locks were held until now, also those that are handed on.
	err := lostCause(c.ask(context.Background(), r, releaseBound))
	h.mu.Lock()
	now = time.Now()
	for _, g := range grants {
		if g.unlock {
			g.q.unlocked(g.lease, now)
			h.tidy(g.q)
		}
	}
	h.mu.Unlock()
	h.leave(c)
	return err
}

// queue returns the queue of a key.
func (h *hub) queue(id lockID) *queue {
	q := h.queues[id]
	if q == nil {
		q = &queue{id: id}
		h.queues[id] = q
	}
	return q
}

// tidy forgets a queue that is of no use.
func (h *hub) tidy(q *queue) {
	if q.idle() && h.queues[q.id] == q {
		delete(h.queues, q.id)
	}
}

// who says who holds the lock, if one query can tell: on a connection that lies ready, one at
// a time, and not on a session that carries locks, which a slow answer would cost.
func (a *acquisition) who(k Key) string {
	h := a.hub
	idle := a.db.Stats().Idle > 0
	h.mu.Lock()
	q := h.queues[k.lockID()]
	ours := q != nil && (q.on != nil || q.apart > 0)
	ask := !h.asking && idle
	h.asking = h.asking || ask
	h.mu.Unlock()
	var who string
	if ask {
		who = a.askWho(k)
	}
	if who == "" && ours {
		who = "held by this process"
	}
	return who
}

func (a *acquisition) askWho(k Key) string {
	defer func() {
		a.hub.mu.Lock()
		defer a.hub.mu.Unlock()
		a.hub.asking = false
	}()
	ctx, cancel := context.WithTimeout(a.ctx, lateBound)
	defer cancel()
	s, err := openSession(ctx, a.db, a.cfg)
	if err != nil {
		return ""
	}
	who := s.whoHolds(k)
	if s.broken {
		s.discard()
	} else {
		s.handBack()
	}
	return who
}

// An apartTurn is the turn, in the process's own queue, of one that takes the lock on a
// session of its own.
type apartTurn struct {
	a   *acquisition
	q   *queue
	key Key
	has bool // the turn
}

// turnBound is how long one who has the turn waits for a connection: others may wait for the
// turn who have one.
const turnBound = 250 * time.Millisecond

// enterApart waits for the turn.
func (a *acquisition) enterApart(k Key) (*apartTurn, error) {
	t := &apartTurn{a: a, key: k}
	return t, t.await()
}

// await waits for the turn.
func (t *apartTurn) await() error {
	a := t.a
	a.w = waiter{shared: a.cfg.shared, noWait: a.cfg.noWait, apart: true}
	q, turn := a.enter(t.key)
	t.q = q
	if turn.to == await {
		var err error
		if turn, err = a.awaitTurn(t.key, q); err != nil {
			return err
		}
	}
	if t.has = turn.to == ask; !t.has {
		return errRefused
	}
	return nil
}

// take takes the turn if it is to be had at once.
func (t *apartTurn) take() bool {
	a, h := t.a, t.a.hub
	a.w = waiter{shared: a.cfg.shared, apart: true}
	h.mu.Lock()
	defer h.mu.Unlock()
	t.q = h.queue(t.key.lockID())
	t.has = t.q.enterNow(&a.w, time.Now()).to == ask
	h.tidy(t.q)
	return t.has
}

// open opens a session for one who has the turn; but waits for one only without.
func (t *apartTurn) open(ctx context.Context) (*session, error) {
	a := t.a
	if !t.has {
		if err := t.await(); err != nil {
			return nil, err
		}
	}
	if a.db.Stats().MaxOpenConnections == 0 {
		return openSession(ctx, a.db, a.cfg) // which waits for nobody
	}
	for {
		short, cancel := context.WithTimeoutCause(ctx, turnBound, errTurnBound)
		s, err := openSession(short, a.db, a.cfg)
		cancel()
		if err == nil || !errors.Is(err, errTurnBound) {
			return s, err
		}
		t.leave()
		if s, err = openSession(ctx, a.db, a.cfg); err != nil {
			return nil, err
		}
		if t.take() {
			return s, nil
		}
		s.handBack()
		if err := t.await(); err != nil {
			return nil, err
		}
	}
}

var errTurnBound = errors.New("no connection at once")

// leave ends the turn.
func (t *apartTurn) leave() {
	h := t.a.hub
	h.mu.Lock()
	defer h.mu.Unlock()
	if t.has {
		t.has = false
		t.q.leaveApart(time.Now())
		h.tidy(t.q)
	}
}
