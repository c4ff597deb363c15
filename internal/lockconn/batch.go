package lockconn

import (
	"context"
	"database/sql"
	"fmt"
	"runtime"
	"slices"
	"time"

	"github.com/pgadvisory/advisory/internal/pgsql"
	"github.com/pgadvisory/advisory/internal/session"
)

const (
	// batchLimit is how many locks one statement is about.
	batchLimit = 1000

	// prepareAfter is how many requests must wait for another's round trip before the statement that
	// serves them together is prepared, which costs two round trips.
	prepareAfter = 8

	// gatherBound is how long a batch waits at most for those who have just had an answer.
	gatherBound = 200 * time.Microsecond
)

// A batcher answers several requests by one statement.
type batcher struct {
	stmt    *sql.Stmt // prepared when it has paid
	waited  int       // requests that have waited for another's round trip, before that
	unknown bool      // the server does not know the statement
}

// take takes those of the pending requests that are served together.
func (c *Conn) take() []*Request {
	c.mu.Lock()
	defer c.mu.Unlock()
	n, waits := c.nextLocked()
	c.waited += waits
	reqs := slices.Clone(c.pending[:n])
	c.pending, c.first = slices.Delete(c.pending, 0, n), max(0, c.first-n)
	return reqs
}

// nextLocked returns how many of the pending requests are served together, and how many wait for another's round
// trip because the statement that would serve them, too, is not prepared.
func (c *Conn) nextLocked() (n, waits int) {
	locks, asks := 0, 0
	for n, r := range c.pending {
		locks += max(1, len(r.Keys))
		if r.Op != Ping { // a Ping accepts any answer
			asks++
		}
		switch {
		case n == 0:
		case locks > batchLimit, !r.joins(), !c.pending[0].joins():
			return n, 0
		case asks > 1 && c.stmt == nil && (c.unknown || c.waited < prepareAfter):
			return n, len(c.pending) - n
		}
	}
	return len(c.pending), 0
}

// joins tells whether r is answered together with others.
func (r *Request) joins() bool { return r.Op != Look && r.Op != prove && !r.alone }

// gather lets those n who have had an answer, after a round trip of rtt, come with their next
// request, so that it goes out with the others': otherwise each waits for the other half's trip as
// well as for its own. They need a moment of the processor, not of the network.
func (c *Conn) gather(n int, rtt time.Duration) {
	end := time.Now().Add(min(rtt/8, gatherBound))
	c.mu.Lock()
	want := len(c.pending) + n
	c.mu.Unlock()
	for range 1000 { // and no more, should the clock stand still
		runtime.Gosched()
		c.mu.Lock()
		all := len(c.pending) >= want
		c.mu.Unlock()
		if all || !time.Now().Before(end) {
			return
		}
	}
}

// asks returns those of requests that ask for more than an answer.
func asks(reqs []*Request) []*Request {
	return slices.DeleteFunc(slices.Clone(reqs), func(r *Request) bool { return r.Op == Ping })
}

// bound is how long the answer to requests may take.
func bound(reqs ...*Request) time.Duration {
	if slices.ContainsFunc(reqs, func(r *Request) bool { return !r.leavable() }) {
		return session.ReleaseBound
	}
	return session.AnswerBound
}

// answerAll answers requests. Pings have no answer of their own, unless there are no others. If it returns
// apart, the tries have no answer yet: each is to be answered alone. If it returns an error, the session is
// lost.
func (c *Conn) answerAll(reqs []*Request) (apart bool, err error) {
	ctx, bound, asks := context.Background(), bound(reqs...), asks(reqs)
	if len(asks) == 0 {
		asks = reqs[:1]
	}
	if len(asks) > 1 && c.prepareBatch(ctx, bound) {
		return c.answerTogether(ctx, asks, bound)
	}
	for _, r := range asks {
		if err := c.answer(ctx, r, bound); err != nil {
			return false, err
		}
	}
	return false, nil
}

// prepareBatch prepares the statement that answers requests together, once. It tells whether there is one.
func (c *Conn) prepareBatch(ctx context.Context, bound time.Duration) bool {
	if c.stmt != nil || c.unknown {
		return c.stmt != nil
	}
	stmt, err := session.Run(ctx, &c.s.Sender, bound, len(pgsql.Batch), func(ctx context.Context) (*sql.Stmt, error) {
		return c.s.Conn().PrepareContext(ctx, pgsql.Batch)
	})
	c.stmt = stmt
	if err != nil {
		// A server, or a driver, that does not know it: some call themselves compatible. If the session
		// is gone, the next statement says so.
		c.unknown = true
		if !pgsql.Gone(err) {
			c.log.Warn("advisory: locks are taken one by one, because they cannot be together", "error", err)
		}
	}
	return err == nil
}

// unprepare closes the statement.
func (c *Conn) unprepare() error {
	if c.stmt == nil {
		return nil
	}
	return c.s.Do(context.Background(), session.ReleaseBound, func(context.Context) error { return c.stmt.Close() })
}

// answerTogether answers requests in one statement, if the server does not refuse that.
func (c *Conn) answerTogether(ctx context.Context, reqs []*Request, bound time.Duration) (apart bool, err error) {
	var args pgsql.BatchArgs
	for _, r := range reqs {
		op := pgsql.OpTry
		if r.Op == Unlock {
			op = pgsql.OpUnlock
		}
		args.Add(op, r.Keys, r.Shared)
	}
	ops, keys := args.Args()
	sent := time.Now()
	answer, err := session.Run(ctx, &c.s.Sender, bound, len(ops)+len(keys), func(ctx context.Context) (answer string, err error) {
		err = c.stmt.QueryRowContext(ctx, ops, keys).Scan(&answer)
		return answer, err
	})
	if err != nil {
		err = c.afterFailure(ctx, reqs, err)
		return err == nil, err
	}
	c.alive(sent)
	for _, r := range reqs {
		if len(answer) < len(r.Keys) {
			return false, fmt.Errorf("an answer of the wrong length: %q", answer)
		}
		var yes []pgsql.Key
		for i, k := range r.Keys {
			if answer[i] == '1' {
				yes = append(yes, k)
			}
		}
		answer = answer[len(r.Keys):]
		r.Sent = sent
		if err := c.accept(ctx, r, yes); err != nil {
			return false, err
		}
	}
	c.note(reqs...)
	return false, nil
}

// afterFailure is for requests whose common statement has failed with err. Session-level locks do not go with
// it, and how far it got is not known: what they may have got, or still have, is unlocked.
func (c *Conn) afterFailure(ctx context.Context, reqs []*Request, err error) error {
	if !pgsql.Answered(err) {
		return err
	}
	for _, shared := range [...]bool{false, true} {
		var keys []pgsql.Key
		for _, r := range reqs {
			if r.Shared == shared {
				keys = append(keys, r.Keys...)
			}
		}
		if err := c.unlockHeld(ctx, keys, shared); err != nil {
			return err
		}
	}
	for _, r := range reqs {
		r.OK = r.Op == Unlock // until then the session has held them, for as long as it lives
	}
	c.note(reqs...)
	return nil
}

// unlockHeld unlocks those of keys that the session holds.
func (c *Conn) unlockHeld(ctx context.Context, keys []pgsql.Key, shared bool) error {
	if len(keys) == 0 {
		return nil
	}
	sent := time.Now()
	_, err := c.s.Exec(ctx, session.ReleaseBound, pgsql.UnlockHeld(keys, shared))
	if err == nil {
		c.alive(sent)
	}
	return err
}

// answer answers r by a statement of its own. If it returns an error, the session is lost.
func (c *Conn) answer(ctx context.Context, r *Request, bound time.Duration) error {
	if r.Op == prove {
		return c.answerProve(ctx)
	}
	reset := ""
	if r.Op == Unlock && c.only(r.Keys) {
		reset = c.s.Reset()
	}
	query, args := c.statement(r, reset)
	r.Sent = time.Now()
	rows, err := c.s.Exec(ctx, bound, query, args...)
	if args != nil && pgsql.NotPrepared(err) { // the server has forgotten it, as after DISCARD ALL
		rows, err = c.s.Exec(ctx, bound, literal(r))
	}
	switch {
	case pgsql.Answered(err) && (r.Op == Ping || c.carriesOthers(r)): // that is r's alone
		return c.afterError(ctx, r, err)
	case err != nil:
		r.err = err
		return err
	}
	c.alive(r.Sent)
	if r.Op == Look {
		r.OK = rows > 0
		return nil
	}
	yes := r.Keys[:min(int(rows), len(r.Keys))]
	if r.Op == Unlock && rows > 0 { // one row for all
		yes = r.Keys
		if reset != "" {
			c.s.WasReset()
		}
	}
	err = c.accept(ctx, r, yes)
	c.note(r)
	return err
}

// statement returns the statement of r, with reset before it.
func (c *Conn) statement(r *Request, reset string) (query string, args []int64) {
	// A statement that fails is thrown out of the driver's cache, which costs two round trips.
	cached := len(r.Keys) == 1 && c.s.Caches() && reset == "" && !r.alone
	switch {
	case r.Op == Ping:
		return pgsql.Ping, nil
	case r.Op == Look:
		return pgsql.Look(r.Keys[0]), nil
	case r.Op == Try && cached:
		return pgsql.TryCached(r.Keys[0], r.Shared)
	case r.Op == Unlock && cached:
		return pgsql.UnlockCached(r.Keys[0], r.Shared)
	default:
		return reset + literal(r), nil
	}
}

// literal returns the statement of a try or an unlock that has its keys in its text.
func literal(r *Request) string {
	if r.Op == Try {
		return pgsql.Try(r.Keys, r.Shared)
	}
	return pgsql.Unlock(r.Keys, r.Shared)
}

// answerProve sends a heartbeat. If it returns an error, the session is lost.
func (c *Conn) answerProve(ctx context.Context) error {
	query, bound := c.heartbeatStatement()
	if query == "" {
		return nil
	}
	sent := time.Now()
	rows, err := c.s.ExecQuiet(ctx, bound, query)
	if pgsql.State(err) == pgsql.QueryCanceled { // pg_cancel_backend, say
		rows, err = c.s.ExecQuiet(ctx, bound, query)
	}
	switch {
	case err != nil:
		return err
	case rows == pgsql.OnStandby:
		return session.ErrStandby
	case rows == 0:
		return session.ErrNotHeld
	}
	c.alive(sent)
	return nil
}

// afterError answers r, which the server has answered with an error. It unlocks what r may have got, or
// still has, and no other locks of the session.
func (c *Conn) afterError(ctx context.Context, r *Request, err error) error {
	switch r.Op {
	case Ping: // an answer it is
		r.OK = true
		return nil
	case Look:
		r.err = err
		return nil
	}
	if err := c.unlockHeld(ctx, r.Keys, r.Shared); err != nil {
		return err
	}
	if r.Op == Unlock { // until then the session has held them, for as long as it lives
		r.OK = true
		c.note(r)
		return nil
	}
	r.err = err
	return nil
}

// accept takes the answer to r, which is yes for some of its keys. If that is all of them, the caller is to
// call note.
func (c *Conn) accept(ctx context.Context, r *Request, yes []pgsql.Key) error {
	r.OK = len(yes) == len(r.Keys)
	switch {
	case r.OK:
		return nil
	case r.Op == Unlock:
		r.err = session.ErrNotHeld
		return session.ErrNotHeld
	case len(yes) == 0:
		return nil
	default: // those that it has got with others that it has not
		rows, err := c.s.Exec(ctx, session.ReleaseBound, pgsql.Unlock(yes, r.Shared))
		if pgsql.Answered(err) { // pg_cancel_backend, say
			return c.unlockHeld(ctx, yes, r.Shared)
		}
		if err == nil && rows == 0 {
			err = session.ErrNotHeld
		}
		return err
	}
}

// note notes what those of reqs have changed that are OK. It takes the mutex once for all: thousands who
// release at a time may be waiting for that.
func (c *Conn) note(reqs ...*Request) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, r := range reqs {
		if !r.OK {
			continue
		}
		for _, k := range r.Keys {
			switch l := (lock{k.Unnamed(), r.Shared}); r.Op {
			case Try:
				c.locks[l] = k.Name
			case Unlock:
				delete(c.locks, l)
			}
		}
	}
}

// alive notes that the session has answered what was sent then.
func (c *Conn) alive(sent time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.watch.proof = sent
}

// only tells whether the session holds no other locks than those of keys, all of which it holds.
func (c *Conn) only(keys []pgsql.Key) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.locks) <= len(keys)
}

// carriesOthers tells whether the session holds locks that r is not about.
func (c *Conn) carriesOthers(r *Request) bool {
	if r.Op == Unlock {
		return !c.only(r.Keys)
	}
	return !c.only(nil)
}
