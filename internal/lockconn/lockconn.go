// Package lockconn is a connection that holds locks for many callers. It answers their requests,
// several in one round trip, checks by a heartbeat that the session still has the locks, and tells
// the callers if it has not. It knows nothing of queues, nor of how a connection is made.
package lockconn

import (
	"cmp"
	"context"
	"log/slog"
	"slices"
	"sync"
	"time"

	"github.com/pgadvisory/advisory/internal/pgsql"
	"github.com/pgadvisory/advisory/internal/session"
)

// A Conn is a session that carries the locks of several holders, and tries and unlocks for several
// at a time: what is asked of it while a round trip is under way goes out together in the next one.
// A lone request goes out by itself: on the goroutine of its caller, unless that may leave it and the
// session holds locks.
//
// One goroutine at a time serves requests: that of a caller, or one that ends when there are no
// more. The last of those who use the Conn hands the connection back. All methods are safe for
// concurrent use.
type Conn struct {
	s      *session.Session
	log    *slog.Logger
	onLost func(*Conn) // is told that the session is lost: the holders know, and it is about to be closed

	batcher // belongs to who serves requests, and to who hands the connection back

	mu      sync.Mutex // guards what follows; nothing is sent under it
	closed  bool       // it takes no more requests: its last user has left, or it is lost
	lost    error      // why, if it is lost
	users   int        // those between Use and Leave
	serving bool
	pending []*Request // wait to be served: first the releases
	first   int        // how many of pending are releases
	locks   map[lock]string
	holders map[*Holder]struct{}
	watch   watch
}

// A lock is what the session holds on the server. Its name stands beside it.
type lock struct {
	key    pgsql.Key // without its name
	shared bool
}

// New returns the Conn of a session that holds the locks of keys, which its caller has use for. onLost
// is called when it is lost, under no mutex.
func New(s *session.Session, log *slog.Logger, keys []pgsql.Key, shared bool, onLost func(*Conn)) *Conn {
	c := &Conn{s: s, log: log, onLost: onLost, users: 1, locks: make(map[lock]string, 1), holders: make(map[*Holder]struct{}, 1)}
	c.watch.proof = s.Sent()
	for _, k := range keys {
		c.locks[lock{k.Unnamed(), shared}] = k.Name
	}
	return c
}

// Session returns the session.
func (c *Conn) Session() *session.Session { return c.s }

// Lost returns why the session is lost, or nil.
func (c *Conn) Lost() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.lost
}

// Empty tells whether the session holds no locks.
func (c *Conn) Empty() bool { return c.only(nil) }

// Use keeps the session open until Leave. It tells whether it is.
func (c *Conn) Use() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return false
	}
	c.users++
	return true
}

// Leave ends one use. The last one hands the connection back.
func (c *Conn) Leave() { c.leave(1) }

func (c *Conn) leave(uses int) {
	c.mu.Lock()
	c.users -= uses
	last := !c.closed && c.users == 0 && !c.serving && len(c.locks) == 0
	if last {
		c.closed = true
		c.watch.stopLocked()
	}
	c.mu.Unlock()
	switch {
	case !last:
	case c.stmt == nil && c.s.Reset() == "":
		c.handBack()
	default: // cleaning takes statements, and the caller may be late
		session.Soon(c.handBack)
	}
}

// handBack hands the connection back, if it can be cleaned.
func (c *Conn) handBack() {
	c.s.End(func() bool {
		err := c.clean()
		if err != nil && !pgsql.Gone(err) { // that the server is away is reported by those who wait for it
			c.log.Warn("advisory: session discarded, because it could not be cleaned", "error", err)
		}
		return err == nil
	})
}

// clean undoes what was made for the locks.
func (c *Conn) clean() error {
	if err := c.unprepare(); err != nil {
		return err
	}
	if reset := c.s.Reset(); reset != "" {
		if _, err := c.s.Exec(context.Background(), session.ReleaseBound, reset); err != nil {
			return err
		}
		c.s.WasReset()
	}
	return nil
}

// lose ends the session, once. The contexts of those who hold its locks end before others can have
// the locks.
func (c *Conn) lose(cause error) {
	c.mu.Lock()
	if c.closed {
		c.mu.Unlock()
		return
	}
	c.closed, c.lost = true, cause
	c.watch.stopLocked()
	holders, pending := c.holders, c.pending
	c.holders, c.pending, c.first = nil, nil, 0
	c.mu.Unlock()
	for h := range holders {
		h.lose(cause)
	}
	for _, r := range pending {
		r.lose(cause)
		close(r.done)
	}
	if pgsql.Gone(cause) {
		c.s.Interrupt(cause)
	}
	c.onLost(c)
	c.s.Discard()
}

// A LostError says that the session is lost. Only a request whose own statement has failed, and nobody else's
// with it, has the driver's error in its place.
type LostError struct{ Cause error }

func (e LostError) Error() string { return e.Cause.Error() }
func (e LostError) Unwrap() error { return e.Cause }

// A Request is for one round trip.
type Request struct {
	Op     Op
	Keys   []pgsql.Key
	Shared bool

	// The answer.
	OK   bool      // Try: all are granted; Unlock: all were held; Look: others wait
	Sent time.Time // when the request went out

	err      error // the server's error to this request alone, or why the session is lost: see LostError
	panicked any   // by the driver
	alone    bool  // it has failed together with others, and is answered by itself

	done chan struct{} // closed with the answer; nil: it is answered where it is asked for

	// Guarded by Conn.mu.
	left     bool // its caller has left
	answered bool // its caller cannot leave any more
}

// lose notes that the session is lost, by the statement of r if r has an error.
func (r *Request) lose(cause error) {
	r.OK, r.err = false, cmp.Or(r.err, error(LostError{cause}))
}

// result returns the error of r, which is done, or has a panic propagate.
func (r *Request) result() error {
	if r.panicked != nil {
		panic(r.panicked)
	}
	return r.err
}

// An Op is what a Request is for.
type Op uint8

const (
	Ping   Op = iota // does the session live?
	Try              // lock all the keys, or none
	Unlock           // unlock all the keys
	Look             // do others wait for the key?
	prove            // does the session still have its locks?
)

// leavable tells whether the caller of r may leave it. A release is waited for.
func (r *Request) leavable() bool { return r.Op == Try || r.Op == Look || r.Op == prove }

// Ask has r answered. Its caller is between Use and Leave, or has a lock on the session. If ctx ends while
// another goroutine serves r, and r is leavable, Ask returns the cause of that, and what r gets is given back:
// to break r off would cost others their locks.
func (c *Conn) Ask(ctx context.Context, r *Request) error {
	c.mu.Lock()
	switch {
	case c.closed:
		defer c.mu.Unlock()
		return LostError{c.lost}
	case c.serving || r.leavable() && len(c.locks) > 0:
		c.queueLocked(r)
		c.mu.Unlock()
		return c.await(ctx, r)
	}
	c.serving = true // on this goroutine
	c.mu.Unlock()
	lost := session.ErrPanicked
	defer func() { // also if the driver panics
		if lost != nil {
			c.lose(lost)
		}
		c.mu.Lock()
		defer c.mu.Unlock()
		c.serving = false
		c.serveLocked()
	}()
	if lost = c.answer(ctx, r, bound(r)); lost != nil {
		r.lose(lost)
	}
	return r.err
}

// queueLocked has r answered by another goroutine.
func (c *Conn) queueLocked(r *Request) {
	r.done = make(chan struct{})
	if r.leavable() {
		c.pending = append(c.pending, r)
	} else { // it goes first, within the bounds of a release
		c.goesFirstLocked(r)
		c.s.Hasten(session.ReleaseBound)
	}
	c.serveLocked()
}

// goesFirstLocked puts a release behind the releases that are pending, and before all others.
func (c *Conn) goesFirstLocked(r *Request) {
	c.pending = slices.Insert(c.pending, c.first, r)
	c.first++
}

// serveLocked has the pending requests served, if nobody does.
func (c *Conn) serveLocked() {
	if !c.serving && len(c.pending) > 0 {
		c.serving = true
		go c.serveAll()
	}
}

// await waits for the answer to r, which another goroutine serves.
func (c *Conn) await(ctx context.Context, r *Request) error {
	if !r.leavable() {
		<-r.done // within the bounds of the statement under way, and of its own
		return r.result()
	}
	select {
	case <-r.done:
		return r.result()
	case <-ctx.Done():
	}
	c.mu.Lock()
	if !r.answered {
		r.left = true
		if i := slices.Index(c.pending, r); i >= 0 {
			c.pending = slices.Delete(c.pending, i, i+1)
		}
		c.mu.Unlock()
		return context.Cause(ctx)
	}
	c.mu.Unlock()
	<-r.done
	return r.result()
}

// serveAll serves requests until there are none.
func (c *Conn) serveAll() {
	for more := true; more; {
		began := time.Now()
		if reqs := c.take(); len(reqs) > 0 { // their callers have not left
			n := len(asks(reqs))
			c.serve(reqs)
			if n > 1 {
				c.gather(n, time.Since(began))
			}
		}
		c.mu.Lock()
		more = len(c.pending) > 0
		if !more {
			c.serving = false
		}
		c.mu.Unlock()
	}
	c.leave(0) // those who left their requests may have been the last
}

// serve answers requests, or puts them back. If it cannot, the session is lost. A panic of the driver's
// propagates on the goroutines of their callers.
func (c *Conn) serve(reqs []*Request) {
	apart, err := false, session.ErrPanicked
	defer func() {
		panicked := recover()
		c.mu.Lock()
		if apart {
			reqs = c.putBackLocked(reqs)
		}
		for _, r := range reqs {
			r.panicked = panicked
			switch {
			case r.Op == Ping && (err == nil || pgsql.Answered(err)): // a Ping accepts any answer
				r.OK = true
			case err != nil:
				r.lose(err)
			}
			if r.answered = !r.left; r.left && r.Op == Try && r.OK && !c.closed { // what it got is given back first
				c.goesFirstLocked(&Request{Op: Unlock, Keys: r.Keys, Shared: r.Shared, done: make(chan struct{})})
			}
		}
		c.mu.Unlock()
		if err != nil {
			c.lose(err)
		}
		for _, r := range reqs {
			close(r.done)
		}
	}()
	apart, err = c.answerAll(reqs)
}

// putBackLocked has the tries of reqs, which the server has refused together, answered alone, and later: others
// need not wait for all of them. It returns those that are done.
func (c *Conn) putBackLocked(reqs []*Request) []*Request {
	return slices.DeleteFunc(reqs, func(r *Request) bool {
		switch {
		case r.Op != Try || r.left:
			return false
		case c.closed:
			r.lose(c.lost)
			return false
		}
		r.alone = true
		c.pending = append(c.pending, r)
		return true
	})
}
