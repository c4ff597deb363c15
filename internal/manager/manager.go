// Package manager acquires and releases locks. It takes a request through the queue of its key to a
// session that tries, and into the server's queue, and tries again what may pass. There is one Manager
// for each *sql.DB, which decides how many sessions there are.
package manager

import (
	"database/sql"
	"fmt"
	"math/rand/v2"
	"runtime"
	"sync"
	"sync/atomic"
	"time"
	"weak"

	"github.com/pgadvisory/advisory/internal/keyqueue"
	"github.com/pgadvisory/advisory/internal/lockconn"
	"github.com/pgadvisory/advisory/internal/pgsql"
	"github.com/pgadvisory/advisory/internal/session"
)

type (
	queue  = keyqueue.Queue[*lockconn.Conn]
	waiter = keyqueue.Waiter[*lockconn.Conn]
	turn   = keyqueue.Turn[*lockconn.Conn]
)

// A Manager is all that this process does with the locks of one *sql.DB.
type Manager struct {
	// Checking is filled by the Check that is under way.
	Checking chan struct{}

	facts   session.Facts
	seed    uint64
	polling atomic.Int32 // those who wait, and cannot in the server's queue
	asking  atomic.Bool  // somebody asks who holds a lock
	warned  atomic.Bool  // a Logger has been warned of a pool of one connection

	// mu guards the rest, and the queues. It is taken before lockconn.Conn's. Nothing is sent under it.
	mu        sync.Mutex
	queues    map[pgsql.Key]*queue     // by keys without names
	conn      *lockconn.Conn           // which new locks are tried on; nil: there is none at present
	opening   *opening                 // of conn; nil: nobody opens it
	sessions  int                      // the common one, and those that wait in the server's queue or did
	outage    *outage                  // that waits are in; nil: none are
	nested    map[*nestedWait]struct{} // waits whose callers hold keys
	detecting bool                     // somebody asks others for their waits
	detected  time.Time                // when that last ended
}

// managers has the Manager of each *sql.DB. It does not keep the *sql.DB in memory. A Manager that
// nobody uses has nothing to remember, and runs nothing.
var managers struct {
	mu sync.Mutex
	of map[weak.Pointer[sql.DB]]*Manager
}

func newManager() *Manager {
	return &Manager{seed: rand.Uint64(), queues: make(map[pgsql.Key]*queue), nested: make(map[*nestedWait]struct{}), Checking: make(chan struct{}, 1)}
}

// For returns the Manager of db: a new one if that is nil.
func For(db *sql.DB) *Manager {
	if db == nil {
		return newManager()
	}
	p := weak.Make(db)
	managers.mu.Lock()
	defer managers.mu.Unlock()
	m := managers.of[p]
	if m == nil {
		m = newManager()
		if managers.of == nil {
			managers.of = make(map[weak.Pointer[sql.DB]]*Manager)
		}
		managers.of[p] = m
		runtime.AddCleanup(db, forget, p)
	}
	return m
}

func forget(p weak.Pointer[sql.DB]) {
	managers.mu.Lock()
	defer managers.mu.Unlock()
	delete(managers.of, p)
}

// Pool returns the pool of db, whose Manager this is.
func (m *Manager) Pool(db *sql.DB) session.Pool {
	return session.Pool{DB: db, Facts: &m.facts}
}

// queueLocked returns the queue of k.
func (m *Manager) queueLocked(k pgsql.Key) *queue {
	q := m.queues[k.Unnamed()]
	if q == nil {
		q = new(queue)
		m.queues[k.Unnamed()] = q
	}
	return q
}

// tidyLocked forgets the queue of k if it is of no use.
func (m *Manager) tidyLocked(k pgsql.Key) {
	if q := m.queues[k.Unnamed()]; q != nil && q.Idle() {
		delete(m.queues, k.Unnamed())
	}
}

// lost is told by c that its session is lost. Nobody holds its locks any more.
func (m *Manager) lost(c *lockconn.Conn) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.conn == c {
		m.conn = nil
	}
	now := time.Now()
	for k, q := range m.queues {
		q.Lost(c, now)
		m.tidyLocked(k)
	}
}

// uncount uncounts a session that was not opened.
func (m *Manager) uncount() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.sessions--
}

// ended is told that a session has ended.
func (m *Manager) ended(s *session.Session) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.sessions--
	if m.conn != nil && m.conn.Session() == s {
		m.conn = nil
	}
}

// maxWaits is how many sessions at most wait in the server's queue, or hold what they waited for. A limited
// pool may allow fewer.
const maxWaits = 8

// takeWait counts one more session that waits in the server's queue, if there may be one more. All
// sessions, the common one included, take no more than half of a limited pool.
func (m *Manager) takeWait(pool session.Pool) bool {
	limit := 1 + maxWaits
	if most := pool.DB.Stats().MaxOpenConnections; most > 0 {
		limit = min(limit, most/2)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	sessions := m.sessions
	if m.conn == nil {
		sessions++ // there is always room for the common one; while it is opened, it counts twice
	}
	if pool.RefusesWaits() || pool.Exhausted() || sessions >= limit {
		return false
	}
	m.sessions++
	return true
}

// untilTick returns the time until the next tick of a clock that ticks every pause. All waits of m share it, so
// that they try together. Each tick is late by up to an eighth, by chance, so that processes differ.
func (m *Manager) untilTick(pause time.Duration) time.Duration {
	now := time.Now()
	tick := now.UnixNano()/int64(pause) + 1
	jitter := rand.New(rand.NewPCG(m.seed, uint64(tick))).Int64N(int64(pause / 8))
	return time.Unix(0, tick*int64(pause)+jitter).Sub(now)
}

// String describes what the Manager has to do, for tests: "" is nothing.
func (m *Manager) String() string {
	m.mu.Lock()
	defer m.mu.Unlock()
	if len(m.queues) == 0 && m.conn == nil && m.opening == nil && m.sessions == 0 && m.polling.Load() == 0 && len(m.nested) == 0 {
		return ""
	}
	return fmt.Sprintf("%d queues, %d sessions, shared: %t, opening: %t, %d polling, %d nested waits",
		len(m.queues), m.sessions, m.conn != nil, m.opening != nil, m.polling.Load(), len(m.nested))
}
