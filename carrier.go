package advisory

import (
	"context"
	"database/sql"
	"fmt"
	"math"
	"runtime"
	"slices"
	"strconv"
	"time"
)

// A carrier is a session of ours that carries locks for several holders, and tries and
// unlocks for several at a time: what is asked of it while a round trip is under way
// goes out together in the next one. A lone request goes out by itself, on the goroutine
// of its caller.
//
// It is closed, or handed back to the pool, by the last of those who have use for it.
type carrier struct {
	*session
	hub *hub

	// Guarded by hub.mu.

	users   int                // those who have use for it: requests, and the goroutine of work
	serving *request           // by its caller
	working bool               // somebody serves requests, and will look for pending ones
	pending []*request         // wait to be served
	lost    error              // why the session is lost; nothing more is asked of it
	locks   map[lock]string    // with the names of their keys
	holds   map[*hold]struct{} // to be told if the session is lost
	watch   watch

	// Belong to who serves requests, on whose turn it is on the session.

	turn   bool      // it has the turn
	batch  *sql.Stmt // prepared when it has paid
	alone  int       // requests that were served one by one though there were several; negative: for good
	reqs   []*request
	asks   []*request // of them, those that ask for more than an answer
	opText []byte
	noText []byte
}

// A lock is what a session holds on the server.
type lock struct {
	id     lockID
	shared bool
}

// A request is for one round trip.
type request struct {
	op     op
	keys   []Key
	shared bool
	every  time.Duration // the Heartbeat of who asks for a lock

	// The answer.
	ok   bool      // all the locks were granted, or were held
	err  error     // it is not known
	sent time.Time // when it was asked for

	done     chan struct{} // closed with the answer; nil while its caller serves it
	panicked any           // by the driver
}

// acquires tells whether r is an acquisition's, which may be left under way.
func (r *request) acquires() bool { return r.op == opTry || r.op == opLook }

type op uint8

const (
	opNone   op = iota // does the session live?
	opTry              // lock all the keys, or none
	opUnlock           // unlock all the keys
	opLook             // do others wait for the key?
)

const (
	// batchLimit is how many locks one statement is about.
	batchLimit = 1000

	// gatherBound is how long a batch waits at most for those who have just had an answer.
	gatherBound = 200 * time.Microsecond

	// prepareAfter is how many requests are served one by one before the statement that
	// serves them together is prepared, which costs two round trips.
	prepareAfter = 8
)

// ask has r served. If the answer takes longer than bound, or ctx ends before, the error is
// an unanswered: r may then still be under way, until it is done.
func (c *carrier) ask(ctx context.Context, r *request, bound time.Duration) error {
	h := c.hub
	h.mu.Lock()
	if c.lost != nil {
		h.mu.Unlock()
		return sessionLost{c.lost}
	}
	// Who serves its own request cannot leave before the answer, or the end of the session. Where others'
	// locks are on it, that would be theirs.
	others := r.acquires() && len(c.holds) > 0
	if !c.working && !others {
		c.working = true
		c.serving = r
		h.mu.Unlock()
		return c.serveOne(ctx, r, bound)
	}
	r.done = make(chan struct{})
	if c.working {
		c.pending = append(c.pending, r)
	} else {
		c.working = true
		c.users++
		go func() {
			defer close(r.done)
			defer h.leave(c)
			defer func() { r.panicked = recover() }()
			_ = c.serveOne(context.Background(), r, answerBound)
		}()
	}
	h.mu.Unlock()
	if !r.acquires() {
		c.guard.hurry(bound)
	}
	// The statement under way, and the next one, are bounded: a timer is for less than that.
	var end <-chan time.Time
	if r.acquires() && bound < answerBound {
		t := time.NewTimer(bound)
		defer t.Stop()
		end = t.C
	}
	var err error
	select {
	case <-r.done:
		if r.panicked != nil {
			panic(r.panicked)
		}
		return r.err
	case <-ctx.Done():
		err = context.Cause(ctx)
	case <-end:
		err = noAnswer{bound}
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if i := slices.Index(c.pending, r); i >= 0 {
		c.pending = slices.Delete(c.pending, i, i+1)
		close(r.done) // with nothing done
	}
	return unanswered{err}
}

// An unanswered is the error of a request that was not waited for to the end.
type unanswered struct{ cause error }

func (e unanswered) Error() string { return e.cause.Error() }
func (e unanswered) Unwrap() error { return e.cause }

// serveOne serves the caller's request on the caller's goroutine, and leaves what has come
// meanwhile to another.
func (c *carrier) serveOne(ctx context.Context, r *request, bound time.Duration) error {
	h := c.hub
	outer := ctx
	if ctx.Done() != nil {
		// An answer is on its way, and comes in a moment. If it does not, and nobody
		// else has locks on the session, that is not waited for.
		stop := context.AfterFunc(ctx, func() {
			h.mu.Lock()
			defer h.mu.Unlock()
			if c.serving == r && len(c.holds) == 0 {
				c.guard.hurryAll(answerGrace) // it may not even have gone out
			}
		})
		defer stop()
		ctx = context.WithoutCancel(ctx)
	}
	returned := false
	defer func() {
		if !returned { // the driver panicked
			c.lose(errPanicked)
		}
	}()
	lost := c.serve(ctx, []*request{r}, bound)
	returned = true
	h.mu.Lock()
	c.serving = nil
	if outer.Err() != nil {
		c.guard.calm()
	}
	c.working = len(c.pending) > 0
	if c.working {
		c.users++
		go c.work()
	}
	h.mu.Unlock()
	if lost != nil {
		c.lose(lost)
	}
	return r.err
}

// work serves requests until there are none.
func (c *carrier) work() {
	h := c.hub
	for {
		h.mu.Lock()
		n, locks, bound := 0, 0, answerBound
		for n < len(c.pending) && (n == 0 || locks+len(c.pending[n].keys) <= batchLimit) {
			r := c.pending[n]
			locks += max(1, len(r.keys))
			if !r.acquires() {
				bound = releaseBound
			}
			n++
		}
		c.reqs = append(c.reqs[:0], c.pending[:n]...)
		c.pending = slices.Delete(c.pending, 0, n)
		c.working = n > 0
		h.mu.Unlock()
		if n == 0 {
			h.leave(c)
			return
		}
		began := time.Now()
		lost := c.serve(context.Background(), c.reqs, bound)
		for _, r := range c.reqs {
			close(r.done)
		}
		clear(c.reqs)
		if lost != nil {
			c.lose(lost)
		}
		c.gather(n, time.Since(began))
	}
}

// gather lets those n who have had an answer, after a round trip of rtt, come with their next
// request, so that it goes out with the others': otherwise each waits for the other half's
// trip as well as for its own. They need a moment of the processor, not of the network.
func (c *carrier) gather(n int, rtt time.Duration) {
	end := time.Now().Add(min(rtt/8, gatherBound))
	c.hub.mu.Lock()
	want := len(c.pending) + n
	c.hub.mu.Unlock()
	for range 1000 { // and no more, should the clock stand still
		runtime.Gosched()
		c.hub.mu.Lock()
		all := len(c.pending) >= want
		c.hub.mu.Unlock()
		if all || !time.Now().Before(end) {
			return
		}
	}
}

// serve answers requests, when it is their turn. If it returns an error, the session is
// lost; the requests have errors then.
func (c *carrier) serve(ctx context.Context, reqs []*request, bound time.Duration) (lost error) {
	err := c.takeTurn(ctx, bound)
	defer c.giveTurn()
	if err == nil {
		err = c.answer(ctx, reqs, bound)
	}
	if err == nil {
		err = c.stillHeld(reqs)
	}
	if err != nil {
		for _, r := range reqs {
			r.ok = false
			if r.err == nil {
				r.err = sessionLost{err}
			}
		}
	}
	return err
}

func (c *carrier) takeTurn(ctx context.Context, bound time.Duration) error {
	err := c.take(ctx, bound)
	c.turn = err == nil
	return err
}

func (c *carrier) giveTurn() {
	if c.turn {
		c.turn = false
		c.give()
	}
}

// passTurn lets a heartbeat come between two statements.
func (c *carrier) passTurn(ctx context.Context, bound time.Duration) error {
	c.giveTurn()
	return c.takeTurn(ctx, bound)
}

// answer answers requests. If it returns an error, the session is lost.
func (c *carrier) answer(ctx context.Context, reqs []*request, bound time.Duration) (err error) {
	if len(reqs) == 1 {
		return c.answerAlone(ctx, reqs[0], bound)
	}
	c.asks = c.asks[:0]
	for _, r := range reqs {
		if r.op != opNone {
			c.asks = append(c.asks, r)
		}
	}
	defer clear(c.asks)
	switch len(c.asks) {
	case 0:
		err = c.answerAlone(ctx, reqs[0], bound)
	case 1:
		err = c.answerAlone(ctx, c.asks[0], bound)
	default:
		err = c.answerAll(ctx, c.asks, bound)
	}
	if err == nil {
		for _, r := range reqs {
			r.ok = r.ok || r.op == opNone // any answer is one to that
		}
	}
	return err
}

// answerAlone answers r in one statement. If it returns an error, the session is lost.
func (c *carrier) answerAlone(ctx context.Context, r *request, bound time.Duration) error {
	var query string
	disarms := false
	switch r.op {
	case opNone:
		query = "SELECT"
	case opTry:
		query = tryStatement(r.keys, r.shared)
	case opUnlock:
		query = unlockStatement(r.keys, r.shared)
		if disarms = c.armed && c.only(r.keys); disarms {
			query = c.disarm() + query
		}
	case opLook:
		query = lookStatement(r.keys[0])
	}
	r.sent = time.Now()
	rows, err := c.execNow(ctx, bound, query)
	switch {
	case err == nil:
		r.ok = rows > 0
		if r.op == opTry && rows < int64(len(r.keys)) {
			r.ok = false
			if err := c.undo(ctx, r.keys[:rows], r.shared); err != nil {
				return err
			}
		}
		if r.op == opUnlock && !r.ok {
			r.err = errNotHeld
			return errNotHeld
		}
		c.note(r)
		if disarms {
			c.disarmed()
		}
		return nil
	case c.gone.Load() || sqlState(err) == "" || r.op != opNone && !c.carriesOthers(r):
		r.err = err
		return err
	case r.op == opNone: // an answer it is
		r.ok = true
		c.note(r)
		return nil
	default:
		// The server's error, on a session that others have locks on.
		r.err = err
		if r.op == opTry {
			return c.free(ctx, r)
		}
		if r.op == opUnlock {
			return c.unlockAgain(ctx, r)
		}
		return nil
	}
}

// answerAll answers several requests, in one statement if that pays.
func (c *carrier) answerAll(ctx context.Context, reqs []*request, bound time.Duration) error {
	if c.batch == nil && c.alone+len(reqs) <= prepareAfter {
		if c.alone >= 0 {
			c.alone += len(reqs)
		}
		return c.answerEach(ctx, reqs, bound)
	}
	if c.batch == nil {
		if err := c.prepare(ctx, bound); err != nil {
			if c.gone.Load() || c.abandoned.Load() || sessionGone(err) {
				return err
			}
			// A server, or a driver, that does not know it: some call themselves compatible.
			c.log.Warn("advisory: locks are taken one by one, because they cannot be together", "error", err)
			c.alone = math.MinInt
			return c.answerEach(ctx, reqs, bound)
		}
	}
	c.opText, c.noText = append(c.opText[:0], '{'), append(c.noText[:0], '{')
	for _, r := range reqs {
		if r.op == opLook {
			continue
		}
		for _, k := range r.keys {
			code := int64(r.op)
			if r.shared {
				code += 16
			}
			if k.space == pairSpace {
				code += 32
			}
			c.opText = append(strconv.AppendInt(c.opText, code, 10), ',')
			c.noText = append(strconv.AppendInt(c.noText, k.id, 10), ',')
		}
	}
	if len(c.opText) == 1 { // nobody wants more than to look
		return c.answerEach(ctx, reqs, bound)
	}
	c.opText[len(c.opText)-1], c.noText[len(c.noText)-1] = '}', '}'

	sent := time.Now()
	var answer string
	err := c.runNow(ctx, bound, len(c.opText)+len(c.noText), func(ctx context.Context) error {
		return c.batch.QueryRowContext(ctx, string(c.opText), string(c.noText)).Scan(&answer)
	})
	if err != nil {
		if c.gone.Load() || sqlState(err) == "" {
			return err
		}
		return c.afterFailure(ctx, reqs, bound)
	}
	for _, r := range reqs {
		if r.op == opLook {
			if err := c.answerAlone(ctx, r, bound); err != nil {
				return err
			}
			continue
		}
		if len(answer) < len(r.keys) {
			return fmt.Errorf("an answer of the wrong length: %q", answer)
		}
		var yes []Key
		for i, k := range r.keys {
			if answer[i] == '1' {
				yes = append(yes, k)
			}
		}
		answer = answer[len(r.keys):]
		r.sent = sent
		r.ok = len(yes) == len(r.keys)
		switch {
		case r.ok:
			c.note(r)
		case r.op == opUnlock:
			r.err = errNotHeld
			err = errNotHeld
		default:
			if err := c.undo(ctx, yes, r.shared); err != nil {
				return err
			}
		}
	}
	return err
}

// answerEach answers requests one by one.
func (c *carrier) answerEach(ctx context.Context, reqs []*request, bound time.Duration) error {
	for i, r := range reqs {
		if i > 0 {
			if err := c.passTurn(ctx, bound); err != nil {
				return err
			}
		}
		if err := c.answerAlone(ctx, r, bound); err != nil {
			return err
		}
	}
	return nil
}

// afterFailure answers the requests of a statement that failed: session-level locks do not
// go with it, and how far it got is not known.
func (c *carrier) afterFailure(ctx context.Context, reqs []*request, bound time.Duration) error {
	for _, r := range reqs {
		var err error
		switch r.op {
		case opTry:
			err = c.free(ctx, r)
		case opUnlock:
			err = c.unlockAgain(ctx, r)
		}
		if err == nil {
			err = c.passTurn(ctx, bound)
		}
		if err == nil && r.op != opUnlock {
			err = c.answerAlone(ctx, r, bound)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// unlockAgain unlocks r's keys after a statement that failed, and may have unlocked them.
// Until then the session has held them, for as long as it lives.
func (c *carrier) unlockAgain(ctx context.Context, r *request) error {
	r.sent = time.Now()
	if err := c.free(ctx, r); err != nil {
		return err
	}
	r.ok, r.err = true, nil
	c.note(r)
	return nil
}

// free unlocks whichever of r's keys the session holds, after a statement that failed.
func (c *carrier) free(ctx context.Context, r *request) error {
	_, err := c.execNow(ctx, releaseBound, unlockHeldStatement(r.keys, r.shared))
	return err
}

// undo unlocks the locks of keys, which the session has got with others that it has not.
func (c *carrier) undo(ctx context.Context, keys []Key, shared bool) error {
	if len(keys) == 0 {
		return nil
	}
	rows, err := c.execNow(ctx, releaseBound, unlockStatement(keys, shared))
	if err == nil && rows == 0 {
		err = errNotHeld
	}
	return err
}

// prepare prepares the statement that answers many requests.
func (c *carrier) prepare(ctx context.Context, bound time.Duration) error {
	return c.runNow(ctx, bound, len(batchStatement), func(ctx context.Context) (err error) {
		c.batch, err = c.conn.PrepareContext(ctx, batchStatement)
		return err
	})
}

// runNow is execNow for a statement of so many bytes that f sends.
func (c *carrier) runNow(ctx context.Context, bound time.Duration, length int, f func(context.Context) error) error {
	if c.breakable(length) {
		return c.run(ctx, bound, f)
	}
	return c.runAside(ctx, bound, f)
}

// note notes what r has changed, and that the session was alive when it was sent.
func (c *carrier) note(r *request) {
	h := c.hub
	h.mu.Lock()
	defer h.mu.Unlock()
	c.proof = r.sent
	if !c.armed && r.op == opTry && time.Since(r.sent) >= r.every {
		c.proof = time.Now() // the server has no clock to be ahead of
	}
	for _, k := range r.keys {
		switch l := (lock{k.lockID(), r.shared}); {
		case r.op == opTry && r.ok:
			c.locks[l] = k.name
		case r.op == opUnlock:
			delete(c.locks, l)
		}
	}
}

// stillHeld asks whether the locks are still held if the answer to reqs was so long on its
// way that the server may have ended the session since.
func (c *carrier) stillHeld(reqs []*request) error {
	h := c.hub
	h.mu.Lock()
	stale := false
	for _, r := range reqs {
		stale = stale || r.op == opTry && r.ok && c.armed && time.Since(r.sent) >= c.strict(r.every)
	}
	h.mu.Unlock()
	if !stale {
		return nil
	}
	return c.check(answerBound)
}

// carriesOthers tells whether the session holds locks that r is not about.
func (c *carrier) carriesOthers(r *request) bool {
	if r.op == opUnlock {
		return !c.only(r.keys)
	}
	return !c.only(nil)
}

// only tells whether the session holds no other locks than those of keys.
func (c *carrier) only(keys []Key) bool {
	c.hub.mu.Lock()
	defer c.hub.mu.Unlock()
	return len(c.locks) <= len(keys)
}

func (c *carrier) disarmed() {
	c.hub.mu.Lock()
	defer c.hub.mu.Unlock()
	c.armed = false
}

// lose ends the session, and everything that goes with it: once.
func (c *carrier) lose(cause error) {
	h := c.hub
	h.mu.Lock()
	if c.lost != nil {
		h.mu.Unlock()
		return
	}
	c.lost = cause
	if h.shared == c {
		h.shared = nil
	}
	var holds []*hold
	for hd := range c.holds {
		if hd.lostBy == nil {
			hd.lostBy = cause
		}
		if hd.begun {
			holds = append(holds, hd)
		}
	}
	pending := c.pending
	c.holds, c.pending = nil, nil
	h.mu.Unlock()
	if sessionGone(cause) {
		c.gone.Store(true)
	}
	// The contexts of those who held its locks end before others can have them.
	for _, hd := range holds {
		hd.lost(cause)
	}
	for _, r := range pending {
		r.err = sessionLost{cause}
		close(r.done)
	}
	c.guard.interrupt(0, cause)
	h.mu.Lock()
	now := time.Now()
	for _, q := range h.queues {
		q.lost(c, now)
		h.tidy(q)
	}
	h.sessions--
	h.mu.Unlock()
	c.discard()
}

// A sessionLost is the error of a request whose session was lost.
type sessionLost struct{ cause error }

func (e sessionLost) Error() string { return e.cause.Error() }
func (e sessionLost) Unwrap() error { return e.cause }

// finish hands back the connection of a session on which nothing is held or asked, if that can
// be cleaned.
func (c *carrier) finish() (err error) {
	clean := false
	defer func() {
		if clean && !c.gone.Load() && !c.abandoned.Load() {
			c.handBack()
		} else { // also if the driver panics
			c.discard()
		}
	}()
	if c.batch != nil || c.armed {
		err = c.clean()
	}
	clean = err == nil
	return err
}

func (c *carrier) clean() error {
	if err := c.take(context.Background(), releaseBound); err != nil {
		return err
	}
	defer c.give()
	if c.batch != nil {
		if err := c.runNow(context.Background(), releaseBound, 0, func(context.Context) error { return c.batch.Close() }); err != nil {
			return err
		}
	}
	if c.armed {
		if _, err := c.execNow(context.Background(), releaseBound, c.disarm()); err != nil {
			return err
		}
		c.disarmed()
	}
	return nil
}
