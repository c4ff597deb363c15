package advisory

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"fmt"
	"io"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/pgadvisory/advisory/internal/pgsql"
	"github.com/pgadvisory/advisory/internal/session"
)

// A lockTable is the part of PostgreSQL that this package is about: advisory locks of
// sessions and transactions with their queues, lock_timeout, and idle_session_timeout. Servers
// that share one are the pools of several processes. It is for virtual time.
type lockTable struct {
	t   testing.TB
	rtt func() time.Duration // how long a statement takes; nil: no time

	// fail, if not nil, is asked before a statement is executed. A pgError is the server's;
	// anything else ends the session.
	fail func(conn int, query string) error
	// failIn, if not nil, is asked before each of the locks of the statement that serves many.
	failIn func(op, key int64) error

	mu       sync.Mutex
	locks    map[pgsql.Key]*tableLock
	backends map[backendID]*backend
}

type backendID struct {
	srv  *server
	conn int
}

type backend struct {
	busy  bool
	dead  bool
	armed time.Duration // idle_session_timeout
	nonce string        // advisory.session
	timer *time.Timer
	inTx  bool
}

type tableLock struct {
	granted []tableHold
	waiting []*tableWait
}

type tableHold struct {
	by     *backend
	shared bool
	inTx   bool
}

type tableWait struct {
	tableHold
	granted chan struct{}
}

// newTable returns a table, and n servers that share it.
func newTable(t testing.TB, n int) (*lockTable, []*sql.DB, []*server) {
	p := &lockTable{t: t, locks: make(map[pgsql.Key]*tableLock), backends: make(map[backendID]*backend)}
	var dbs []*sql.DB
	var srvs []*server
	for range n {
		db, srv := newServer(t)
		srv.script = func(ctx context.Context, conn int, query string) (int64, error) {
			return p.answer(ctx, backendID{srv, conn}, query)
		}
		srv.batch = func(ctx context.Context, conn int, ops, keys string) (string, error) {
			return p.answerBatch(ctx, backendID{srv, conn}, ops, keys)
		}
		srv.ended = func(conn int) { p.kill(backendID{srv, conn}) }
		dbs, srvs = append(dbs, db), append(srvs, srv)
	}
	return p, dbs, srvs
}

// takes has each statement take d.
func (p *lockTable) takes(d time.Duration) *lockTable {
	p.rtt = func() time.Duration { return d }
	return p
}

// kill ends a session, as its client's death, or pg_terminate_backend does.
func (p *lockTable) kill(id backendID) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.end(p.backend(id))
}

func (p *lockTable) end(b *backend) {
	b.dead = true
	if b.timer != nil {
		b.timer.Stop()
	}
	for id, l := range p.locks {
		l.granted = slices.DeleteFunc(l.granted, func(h tableHold) bool { return h.by == b })
		l.waiting = slices.DeleteFunc(l.waiting, func(w *tableWait) bool {
			if w.by == b {
				close(w.granted) // with nothing but the session's end
			}
			return w.by == b
		})
		p.advance(id)
	}
}

func (p *lockTable) backend(id backendID) *backend {
	b := p.backends[id]
	if b == nil {
		b = new(backend)
		p.backends[id] = b
	}
	return b
}

// clean reports locks that are held or waited for, and settings that connections have kept.
func (p *lockTable) clean() {
	p.t.Helper()
	p.mu.Lock()
	defer p.mu.Unlock()
	for id, l := range p.locks {
		if len(l.granted)+len(l.waiting) > 0 {
			p.t.Errorf("%v: %d holders and %d waiters are left", id, len(l.granted), len(l.waiting))
		}
	}
	for id, b := range p.backends {
		if !b.dead && (b.armed > 0 || b.nonce != "" || b.inTx || b.busy) {
			p.t.Errorf("connection %d: left %+v", id.conn, *b)
		}
	}
}

// holders is the number of sessions' holds of k.
func (p *lockTable) holders(k Key) int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.lock(k.key.Unnamed()).granted)
}

// waiters is the number of those in the queue of k.
func (p *lockTable) waiters(k Key) int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.lock(k.key.Unnamed()).waiting)
}

func (p *lockTable) lock(id pgsql.Key) *tableLock {
	l := p.locks[id]
	if l == nil {
		l = new(tableLock)
		p.locks[id] = l
	}
	return l
}

var errSessionEnded = fmt.Errorf("the session has ended: %w", io.ErrUnexpectedEOF)

// begin begins a statement. It fails with the session's end.
func (p *lockTable) begin(ctx context.Context, id backendID, query string) (b *backend, end func(), err error) {
	var d time.Duration
	// A rollback is waited for on a lock, also of database/sql's, and there virtual time stands still.
	if p.rtt != nil && query != "ROLLBACK" {
		d = p.rtt()
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	b = p.backend(id)
	if b.busy {
		p.t.Errorf("two statements at once on connection %d: %s", id.conn, query)
	}
	if b.dead {
		return nil, nil, driver.ErrBadConn
	}
	b.busy = true
	if b.timer != nil {
		b.timer.Stop()
	}
	end = func() { // with the mutex held
		b.busy = false
		if b.armed > 0 && !b.inTx && !b.dead {
			b.timer = time.AfterFunc(b.armed, func() { p.kill(id) })
		}
	}
	if p.fail != nil {
		if err := p.fail(id.conn, query); err != nil {
			if pgsql.State(err) == "" {
				p.end(b)
			}
			end()
			return nil, nil, err
		}
	}
	if d > 0 {
		p.mu.Unlock()
		session.Sleep(ctx, d)
		p.mu.Lock()
	}
	switch {
	case ctx.Err() != nil: // as a driver does
		p.end(b)
		err = ctx.Err()
	case b.dead:
		err = errSessionEnded
	}
	if err != nil {
		end()
		return nil, nil, err
	}
	return b, end, nil
}

var (
	lockCall      = regexp.MustCompile(`pg_catalog\.pg_(try_)?advisory_(xact_)?(lock|unlock)(_shared)?\(([^()]*)\)`)
	waitCall      = regexp.MustCompile(`, pg_catalog\.pg_advisory_(xact_)?lock(_shared)?\(`)
	boundOf       = regexp.MustCompile(`LEAST\((\d+),`)
	keyOf         = regexp.MustCompile(`'advisory\.(key|class|object)', '(-?\d+)'`)
	idleTimeoutOf = regexp.MustCompile(`'(?:advisory\.idle_timeout|idle_session_timeout)', '(\d+)'`)
	nonceOf       = regexp.MustCompile(`'advisory\.(?:nonce|session)', '([0-9a-z]+)'`)
	beatOf        = regexp.MustCompile(`'advisory\.session', true\) OPERATOR\(pg_catalog\.=\) '([0-9a-z]+)'`)
	setting       = regexp.MustCompile(`^(?:/\*[^*]*\*/ )?SELECT pg_catalog\.set_config\('advisory\.session', [^;]*; `)
	resetting     = regexp.MustCompile(`^RESET advisory\.session; RESET idle_session_timeout; (RESET idle_in_transaction_session_timeout; )?`)
)

// arm makes the settings of a session that query names, if it does.
func (b *backend) arm(query string) {
	if m := idleTimeoutOf.FindStringSubmatch(query); m != nil {
		ms, _ := strconv.Atoi(m[1])
		b.armed = time.Duration(ms) * time.Millisecond
		b.nonce = nonceOf.FindStringSubmatch(query)[1]
	}
}

func (p *lockTable) answer(ctx context.Context, id backendID, query string) (int64, error) {
	b, end, err := p.begin(ctx, id, query)
	if err != nil {
		return 0, err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	defer end()
	armed, nonce := b.armed, b.nonce
	if strings.Contains(query, pgsql.Restart) {
		p.endTx(b)
	}
	if m := setting.FindString(query); m != "" {
		b.arm(m)
		query = query[len(m):]
	} else if m := resetting.FindString(query); m != "" {
		b.armed, b.nonce = 0, ""
		query = query[len(m):]
	}
	rows, err := p.execute(ctx, b, query)
	if err != nil {
		b.armed, b.nonce = armed, nonce // one transaction
	}
	return rows, err
}

func (p *lockTable) execute(ctx context.Context, b *backend, query string) (int64, error) {
	all := func() {
		for id, l := range p.locks {
			l.granted = slices.DeleteFunc(l.granted, func(h tableHold) bool { return h.by == b && !h.inTx })
			p.advance(id)
		}
	}
	one := func(ok bool) (int64, error) {
		if ok {
			return 1, nil
		}
		return 0, nil
	}
	calls := lockCall.FindAllStringSubmatch(query, -1)
	switch {
	case strings.HasPrefix(query, "BEGIN"):
		b.inTx = true
		return 1, nil
	case query == "COMMIT", query == "ROLLBACK":
		b.inTx = false
		p.endTx(b)
		return 1, nil
	case waitCall.MatchString(query):
		ms, err := strconv.Atoi(boundOf.FindStringSubmatch(query)[1])
		if err != nil {
			p.t.Error(err)
		}
		m := waitCall.FindStringSubmatch(query)
		granted, err := p.wait(ctx, b, waitKey(query), m[2] != "", m[1] != "", time.Duration(ms)*time.Millisecond)
		if granted {
			b.arm(query)
		}
		if err != nil {
			return 0, err
		}
		return one(granted)
	case beatOf.MatchString(query):
		return one(beatOf.FindStringSubmatch(query)[1] == b.nonce)
	case strings.Contains(query, "statement_timestamp() THEN 3 "):
		k, _ := callKey(calls[0])
		switch {
		case b.inTx:
			return pgsql.CallersInTx, nil
		case len(modes(p.lock(k.key.Unnamed()), b)) > 0:
			return pgsql.CallersHeld, nil
		}
		return one(p.do(b, k.key.Unnamed(), true, calls[0][4] != "", false))
	case strings.Contains(query, " OFFSET 0) AS held"): // unlocks what is held
		n := int64(0)
		for id := range p.locks {
			if strings.Contains(query, id.Row()) && p.do(b, id, false, strings.Contains(query, "'ShareLock'"), false) {
				n++
			}
		}
		return n, nil
	case strings.Contains(query, "CASE WHEN pg_catalog.pg_is_in_recovery() THEN 0 WHEN NOT pg_catalog.pg_try_advisory_lock"):
		for i, call := range calls {
			k, _ := callKey(call)
			if !p.do(b, k.key.Unnamed(), true, call[4] != "", false) {
				return int64(i), nil
			}
		}
		return int64(len(calls)), nil
	case strings.Contains(query, "pg_locks") && strings.Contains(query, "NOT granted"):
		for id, l := range p.locks {
			if strings.Contains(query, id.Row()) {
				return one(len(l.waiting) > 0)
			}
		}
		return 0, nil
	case strings.Contains(query, "pg_locks"):
		n := int64(0)
		for id, l := range p.locks {
			if strings.Contains(query, id.Row()) &&
				slices.Contains(modes(l, b), strings.Contains(query, "'ShareLock'")) {
				n++
			}
		}
		return n, nil
	case len(calls) > 0:
		ok := true
		for _, call := range calls {
			if ok {
				k, _ := callKey(call)
				ok = p.do(b, k.key.Unnamed(), call[3] == "lock", call[4] != "", call[2] != "")
			}
		}
		if strings.Contains(query, "pg_advisory_unlock_all()") && ok {
			all()
		}
		return one(ok)
	case strings.Contains(query, "pg_advisory_unlock_all()"):
		all()
		return 1, nil
	case query == "SELECT":
		return 1, nil
	default:
		return 1, nil
	}
}

// endTx ends the locks of b's transaction.
func (p *lockTable) endTx(b *backend) {
	for id, l := range p.locks {
		l.granted = slices.DeleteFunc(l.granted, func(h tableHold) bool { return h.by == b && h.inTx })
		p.advance(id)
	}
}

// modes are those in which b holds l, each once.
func modes(l *tableLock, b *backend) []bool {
	var m []bool
	for _, h := range l.granted {
		if h.by == b && !slices.Contains(m, h.shared) {
			m = append(m, h.shared)
		}
	}
	return m
}

func callKey(call []string) (Key, error) {
	a, b, pair := strings.Cut(call[5], ", ")
	x, err := strconv.ParseInt(a, 10, 64)
	if err == nil && pair {
		var y int64
		y, err = strconv.ParseInt(b, 10, 32)
		return Pair(int32(x), int32(y)), err
	}
	return ID(x), err
}

// do tries a lock, or unlocks.
func (p *lockTable) do(b *backend, id pgsql.Key, lock, shared, inTx bool) bool {
	l := p.lock(id)
	h := tableHold{b, shared, inTx}
	if !lock {
		i := slices.Index(l.granted, h)
		if i < 0 {
			return false
		}
		l.granted = slices.Delete(l.granted, i, i+1)
		p.advance(id)
		return true
	}
	if !slices.Contains(modes(l, b), shared) && slices.ContainsFunc(l.waiting, func(w *tableWait) bool { return conflict(w.tableHold, h) }) {
		return false
	}
	if slices.ContainsFunc(l.granted, func(g tableHold) bool { return conflict(g, h) }) {
		return false
	}
	l.granted = append(l.granted, h)
	return true
}

func conflict(a, b tableHold) bool { return a.by != b.by && !(a.shared && b.shared) }

// advance grants what can be, first come first served.
func (p *lockTable) advance(id pgsql.Key) {
	l := p.locks[id]
	for len(l.waiting) > 0 {
		w := l.waiting[0]
		if slices.ContainsFunc(l.granted, func(g tableHold) bool { return conflict(g, w.tableHold) }) {
			return
		}
		l.granted = append(l.granted, w.tableHold)
		l.waiting = l.waiting[1:]
		close(w.granted)
	}
}

// waitKey is the key that a statement waits for.
func waitKey(query string) Key {
	n := make(map[string]int64)
	for _, m := range keyOf.FindAllStringSubmatch(query, -1) {
		n[m[1]], _ = strconv.ParseInt(m[2], 10, 64)
	}
	if _, pair := n["class"]; pair {
		return Pair(int32(n["class"]), int32(n["object"]))
	}
	return ID(n["key"])
}

func (p *lockTable) wait(ctx context.Context, b *backend, k Key, shared, inTx bool, timeout time.Duration) (granted bool, err error) {
	id := k.key.Unnamed()
	h := tableHold{b, shared, inTx}
	if p.do(b, id, true, h.shared, h.inTx) {
		return true, nil
	}
	l := p.lock(id)
	w := &tableWait{h, make(chan struct{})}
	l.waiting = append(l.waiting, w)
	p.mu.Unlock()
	t := time.NewTimer(timeout)
	defer t.Stop()
	select {
	case <-w.granted:
	case <-ctx.Done():
	case <-t.C:
	}
	p.mu.Lock()
	ended := false
	if i := slices.Index(l.waiting, w); i >= 0 {
		l.waiting = slices.Delete(l.waiting, i, i+1)
		p.advance(id)
		ended = true
	}
	switch {
	case ctx.Err() != nil:
		p.end(b)
		return false, ctx.Err()
	case b.dead:
		return false, errSessionEnded
	}
	return !ended, nil
}

func (p *lockTable) answerBatch(ctx context.Context, id backendID, ops, keys string) (string, error) {
	b, end, err := p.begin(ctx, id, "batch "+ops+" "+keys)
	if err != nil {
		return "", err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	defer end()
	numbers := func(array string) (ns []int64) {
		for s := range strings.FieldsFuncSeq(strings.Trim(array, "{}"), func(r rune) bool { return r == ',' }) {
			n, err := strconv.ParseInt(s, 10, 64)
			if err != nil {
				p.t.Error(err)
			}
			ns = append(ns, n)
		}
		return ns
	}
	answer := ""
	nos := numbers(keys)
	for i, op := range numbers(ops) {
		if p.failIn != nil {
			if err := p.failIn(op, nos[i]); err != nil {
				return "", err // session-level locks do not go with it
			}
		}
		ok := op == 0
		if !ok {
			k := pgsql.Key{Space: pgsql.Bigint, ID: nos[i]}
			if op&32 != 0 {
				k.Space = pgsql.Pair
			}
			ok = p.do(b, k, op&1 != 0, op&16 != 0, false)
		}
		answer += map[bool]string{true: "1", false: "0"}[ok]
	}
	return answer, nil
}
