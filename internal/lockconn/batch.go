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
	n := c.portionLocked()
	reqs := slices.Clone(c.pending[:n])
	c.pending = slices.Delete(c.pending, 0, n)
	return reqs
}

func (c *Conn) portionLocked() int {
	n, locks := 0, 0
	for _, r := range c.pending {
		locks += max(1, len(r.Keys))
		if n > 0 && locks > batchLimit {
			break
		}
		n++
	}
	if n > 1 && c.stmt == nil {
		if c.waited += n - 1; c.unknown || c.waited < prepareAfter {
			return 1
		}
	}
	return n
}

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

// answer answers requests. If it returns an error, the session is lost.
func (c *Conn) answer(ctx context.Context, reqs []*Request) error {
	if len(reqs) == 1 {
		return c.answerAlone(ctx, reqs[0])
	}
	var together, alone, pings []*Request
	for _, r := range reqs {
		switch r.Op {
		case Try, Unlock:
			together = append(together, r)
		case Ping:
			pings = append(pings, r)
		default:
			alone = append(alone, r)
		}
	}
	if len(together) > 1 && c.batches(ctx) {
		if err := c.answerTogether(ctx, together); err != nil {
			return err
		}
	} else {
		alone = append(alone, together...)
	}
	asked := len(together) > 0 // a heartbeat does not count: it may have nothing to ask
	for _, r := range alone {
		asked = asked || r.Op != beat
		if err := c.answerAlone(ctx, r); err != nil {
			return err
		}
	}
	if !asked && len(pings) > 0 {
		if err := c.answerAlone(ctx, pings[0]); err != nil {
			return err
		}
	}
	for _, r := range pings {
		r.OK = true // any answer will do
	}
	return nil
}

// batches tells whether requests are answered together: the statement is prepared.
func (c *Conn) batches(ctx context.Context) bool {
	if c.stmt != nil || c.unknown {
		return c.stmt != nil
	}
	err := c.s.Run(ctx, session.AnswerBound, len(pgsql.Batch), func(ctx context.Context) (err error) {
		c.stmt, err = c.s.Conn().PrepareContext(ctx, pgsql.Batch)
		return err
	})
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
	return c.s.Run(context.Background(), session.ReleaseBound, 0, func(context.Context) error { return c.stmt.Close() })
}

// answerTogether answers requests in one statement.
func (c *Conn) answerTogether(ctx context.Context, reqs []*Request) error {
	var args pgsql.BatchArgs
	for _, r := range reqs {
		op := pgsql.OpTry
		if r.Op == Unlock {
			op = pgsql.OpUnlock
		}
		args.Add(op, r.Keys, r.Shared)
	}
	ops, keys := args.Args()
	bound := session.AnswerBound
	if slices.ContainsFunc(reqs, func(r *Request) bool { return r.Op == Unlock }) {
		bound = session.ReleaseBound
	}
	sent := time.Now()
	var answer string
	err := c.s.Run(ctx, bound, len(ops)+len(keys), func(ctx context.Context) error {
		return c.stmt.QueryRowContext(ctx, ops, keys).Scan(&answer)
	})
	if err != nil {
		return c.afterFailure(ctx, reqs, err)
	}
	c.alive(sent)
	for _, r := range reqs {
		if len(answer) < len(r.Keys) {
			return fmt.Errorf("an answer of the wrong length: %q", answer)
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
			return err
		}
	}
	return nil
}

// afterFailure answers requests one by one whose common statement has failed with err: session-level
// locks do not go with it, and how far it got is not known.
func (c *Conn) afterFailure(ctx context.Context, reqs []*Request, err error) error {
	if !pgsql.Answered(err) {
		return err
	}
	for _, r := range reqs {
		if err := c.afterError(ctx, r, err); err != nil {
			return err
		}
		if r.Op == Try {
			r.err = nil
			if err := c.answerAlone(ctx, r); err != nil {
				return err
			}
		}
	}
	return nil
}

// answerAlone answers r by a statement of its own. If it returns an error, the session is lost.
func (c *Conn) answerAlone(ctx context.Context, r *Request) error {
	bound := session.AnswerBound
	exec := c.exec
	query, resets := pgsql.Ping, false
	switch r.Op {
	case Try:
		exec = c.execKeys(r, pgsql.Try, pgsql.TryCached)
	case Ping:
		bound = session.ReleaseBound
	case Unlock:
		bound = session.ReleaseBound
		if resets = c.only(r.Keys) && c.s.Reset() != ""; resets {
			query = c.s.Reset() + pgsql.Unlock(r.Keys, r.Shared)
		} else {
			exec = c.execKeys(r, pgsql.Unlock, pgsql.UnlockCached)
		}
	case Look:
		query = pgsql.Look(r.Keys[0])
	case beat:
		if query, bound = c.heartbeat(); query == "" {
			return nil
		}
		exec = c.s.ExecQuiet
	}
	r.Sent = time.Now()
	rows, err := exec(ctx, bound, query)
	if r.Op == beat && pgsql.State(err) == pgsql.QueryCanceled { // pg_cancel_backend, say
		rows, err = exec(ctx, bound, query)
	}
	if err == nil && r.Op != beat {
		c.alive(r.Sent)
	}
	switch {
	case err != nil && (r.Op == beat || !pgsql.Answered(err) || r.Op != Ping && !c.carriesOthers(r)):
		r.err = err
		return err
	case err != nil:
		return c.afterError(ctx, r, err)
	case r.Op == beat && rows == pgsql.OnStandby:
		return session.ErrStandby
	case r.Op == beat && rows == 0:
		return session.ErrNotHeld
	case r.Op == Look:
		r.OK = rows > 0
		return nil
	case r.Op == Unlock && rows > 0:
		if resets {
			c.wasReset()
		}
		return c.accept(ctx, r, r.Keys)
	default:
		return c.accept(ctx, r, r.Keys[:min(int(rows), len(r.Keys))])
	}
}

func (c *Conn) exec(ctx context.Context, bound time.Duration, query string) (int64, error) {
	return c.s.Exec(ctx, bound, query)
}

// execKeys returns a function that sends the statement about the keys of r. For one key, that is one that
// the driver keeps prepared, if it does; unless the server has forgotten it, as after DISCARD ALL.
func (c *Conn) execKeys(r *Request, literal func([]pgsql.Key, bool) string, cached func(pgsql.Key, bool) (string, []int64)) func(context.Context, time.Duration, string) (int64, error) {
	return func(ctx context.Context, bound time.Duration, _ string) (int64, error) {
		if len(r.Keys) == 1 && c.s.Caches() {
			query, args := cached(r.Keys[0], r.Shared)
			rows, err := c.s.Exec(ctx, bound, query, args...)
			if !pgsql.NotPrepared(err) {
				return rows, err
			}
		}
		return c.s.Exec(ctx, bound, literal(r.Keys, r.Shared))
	}
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
	r.Sent = time.Now()
	if _, err := c.s.Exec(ctx, session.ReleaseBound, pgsql.UnlockHeld(r.Keys, r.Shared)); err != nil {
		return err
	}
	c.alive(r.Sent)
	if r.Op == Unlock { // until then the session has held them, for as long as it lives
		return c.accept(ctx, r, r.Keys)
	}
	r.err = err
	return nil
}

// accept notes the answer to r, which is yes for some of its keys.
func (c *Conn) accept(ctx context.Context, r *Request, yes []pgsql.Key) error {
	r.OK = len(yes) == len(r.Keys)
	switch {
	case r.OK:
		c.note(r)
		return nil
	case r.Op == Unlock:
		r.err = session.ErrNotHeld
		return session.ErrNotHeld
	case len(yes) == 0:
		return nil
	default: // those that it has got with others that it has not
		rows, err := c.s.Exec(ctx, session.ReleaseBound, pgsql.Unlock(yes, r.Shared))
		if err == nil && rows == 0 {
			err = session.ErrNotHeld
		}
		return err
	}
}

// note notes what r has changed, and that the session was alive when it was sent.
func (c *Conn) note(r *Request) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.watch.proof = r.Sent
	for _, k := range r.Keys {
		switch l := (lock{k.Lock(), r.Shared}); r.Op {
		case Try:
			c.locks[l] = k.Name
		case Unlock:
			delete(c.locks, l)
		}
	}
}

// alive notes that the session has answered what was sent then.
func (c *Conn) alive(sent time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.watch.proof = sent
}

// only tells whether the session holds no other locks than those of keys.
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

func (c *Conn) wasReset() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.silence = 0
	c.s.WasReset()
}
