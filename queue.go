package advisory

import "time"

// handOffFor is how long after its grant a lock is handed on within the process, before
// it is given back to the server, in whose queue other processes wait.
const handOffFor = 20 * time.Millisecond

// A queue is what this process, through one *sql.DB, knows of one key: who holds it, and,
// first come first served, who waits. The server is asked for the lock by one of them for
// all that can share the answer; what it grants is the queue's lease, which is handed from
// one holder to the next, and shared by shared ones, without asking again.
//
// Holders are of two kinds: most hold the lease, which is on a shared session. Those of
// WithTxLock and WithConnLock stand apart: each has the server's lock on a session of its
// own, and is here so as not to wait on a connection for others of this process.
//
// It is guarded by its hub's mutex, and does nothing itself: each method says what the
// caller is to do.
type queue struct {
	id lockID

	lease   uint64   // names the lease, for those who may come back too late; grows
	on      *carrier // the session that has the lease; nil: there is none
	until   time.Time
	holders int // of the lease

	// closed: others wait in the server's queue. The lease is not handed on or shared any more.
	closed bool
	// returning: the lease has had its last holder and goes back to the server.
	returning bool

	asker   *waiter // asks the server for the lease, or whether others wait for it
	waiting bool    // the server has refused, and the asker waits there
	apart   int     // those who hold the lock, or ask for it, apart

	exclusive   bool // what those inside, asker, holders and apart, ask for or hold
	first, last *waiter
}

// A waiter is one request for the lock of one key.
type waiter struct {
	by     *acquisition
	shared bool
	apart  bool
	noWait bool

	turns  chan turn // made when it has to wait; has room for one
	next   *waiter
	queued bool
}

// A turn is what a waiter gets.
type turn struct {
	to    action
	on    *carrier // with held and look: the lease
	lease uint64
}

type action uint8

const (
	await  action = iota // its turn will come, by turns
	held                 // it holds the lease
	ask                  // it is to ask the server for the lock, and to call granted, refused or gaveUp
	look                 // it is to look whether others wait in the server's queue, and to call looked
	refuse               // NoWait: another holds the lock
)

// enter is a waiter's arrival.
func (q *queue) enter(w *waiter, now time.Time) turn {
	if q.first == nil {
		if t := q.start(w, now); t.to != await {
			return t
		}
	}
	if w.noWait {
		// The answer that a shared lock of this process waits for is this one's, too.
		sharesAnswer := w.shared && q.first == nil && q.asker != nil && q.asker.shared && !q.waiting
		if !sharesAnswer {
			return turn{to: refuse}
		}
	}
	w.turns = make(chan turn, 1)
	w.queued = true
	if q.first == nil {
		q.first = w
	} else {
		q.last.next = w
	}
	q.last = w
	return turn{to: await}
}

// enterNow is the arrival of one who goes away if it cannot be let in at once.
func (q *queue) enterNow(w *waiter, now time.Time) turn {
	if q.first == nil {
		return q.start(w, now)
	}
	return turn{to: await}
}

// enterIdle is the arrival of one who is to ask the server, if there is nobody else.
func (q *queue) enterIdle(w *waiter) bool {
	if !q.idle() {
		return false
	}
	q.asker = w
	q.exclusive = !w.shared
	return true
}

// start lets w in, which is the first in line, if it fits to those inside.
func (q *queue) start(w *waiter, now time.Time) turn {
	inside := q.holders > 0 || q.apart > 0 || q.asker != nil
	fits := !inside || w.shared && !q.exclusive
	switch {
	case q.returning || !fits:
		return turn{to: await}
	case w.apart && q.on != nil && q.holders == 0:
		return turn{to: await} // the lease goes back first
	case w.apart:
		q.apart++
		q.exclusive = !w.shared
		return turn{to: ask}
	case q.asker != nil:
		return turn{to: await} // for the same answer
	case q.on == nil:
		q.asker = w
		q.exclusive = !w.shared
		return turn{to: ask}
	case q.closed, q.exclusive == w.shared:
		return turn{to: await}
	case now.Before(q.until):
		q.holders++
		return turn{held, q.on, q.lease}
	case q.holders > 0:
		q.asker = w
		return turn{look, q.on, q.lease}
	default:
		return turn{to: await}
	}
}

// advance lets in whoever can be.
func (q *queue) advance(now time.Time) {
	for q.first != nil {
		w := q.first
		t := q.start(w, now)
		if t.to == await {
			return
		}
		q.remove(w)
		w.turns <- t
	}
}

// granted is the server's grant to the asker, which holds the lease from then on.
func (q *queue) granted(on *carrier, at, now time.Time) (lease uint64) {
	q.asker, q.waiting = nil, false
	q.lease++
	q.on, q.until = on, at.Add(handOffFor)
	q.holders = 1
	q.advance(now)
	return q.lease
}

// refused is the server's refusal to the asker, which waits in the server's queue now, as
// one who said NoWait does not.
func (q *queue) refused() {
	q.waiting = true
	q.refuseAll()
}

// refuseAll refuses all who said NoWait.
func (q *queue) refuseAll() {
	for w := q.first; w != nil; {
		next := w.next
		if w.noWait {
			q.remove(w)
			w.turns <- turn{to: refuse}
		}
		w = next
	}
}

// looked is the answer to look.
func (q *queue) looked(w *waiter, lease uint64, others bool, now time.Time) turn {
	q.asker = nil
	if lease == q.lease && q.on != nil && !q.returning && q.holders > 0 {
		if !others {
			q.until = now.Add(handOffFor)
			q.holders++
			q.advance(now)
			return turn{held, q.on, q.lease}
		}
		q.closed = true
		q.refuseAll()
	}
	if w.noWait && others {
		q.advance(now)
		return turn{to: refuse}
	}
	// It goes first when the lease is back.
	w.turns = make(chan turn, 1)
	w.queued = true
	w.next = q.first
	q.first = w
	if q.last == nil {
		q.last = w
	}
	q.advance(now)
	return turn{to: await}
}

// gaveUp ends the turn of one who was to ask, or to look, and does not hold the lock.
func (q *queue) gaveUp(w *waiter, now time.Time) {
	if w.apart {
		q.apart--
	} else {
		q.asker, q.waiting = nil, false
	}
	q.advance(now)
}

// leave ends one holder's hold of the lease. If it returns true, the lease goes back to the
// server: the caller is to unlock it, and to call unlocked.
func (q *queue) leave(lease uint64, now time.Time) (unlock bool) {
	if q.lease != lease || q.on == nil {
		return false // it was lost
	}
	q.holders--
	if q.holders > 0 {
		return false
	}
	if q.asker == nil && q.apart == 0 {
		q.advance(now) // the next one takes it over, if it can
	}
	q.returning = q.holders == 0
	return q.returning
}

// unlocked: the server has the lease back.
func (q *queue) unlocked(lease uint64, now time.Time) {
	if q.lease == lease {
		q.end(now)
	}
}

// leaveApart ends the hold of one who held the lock on a session of its own.
func (q *queue) leaveApart(now time.Time) {
	q.apart--
	q.advance(now)
}

// lost: the session has died that had the lease.
func (q *queue) lost(on *carrier, now time.Time) {
	if q.on == on {
		q.end(now)
	}
}

func (q *queue) end(now time.Time) {
	q.lease++
	q.on = nil
	q.holders = 0
	q.closed, q.returning = false, false
	q.advance(now)
}

// cancel takes w out of the line. It returns false if its turn has come: turns has it.
func (q *queue) cancel(w *waiter, now time.Time) bool {
	if !w.queued {
		return false
	}
	q.remove(w)
	q.advance(now) // those behind may fit to those inside
	return true
}

func (q *queue) remove(w *waiter) {
	w.queued = false
	var before *waiter
	for v := q.first; v != w; v = v.next {
		before = v
	}
	if before == nil {
		q.first = w.next
	} else {
		before.next = w.next
	}
	if q.last == w {
		q.last = before
	}
	w.next = nil
}

// idle: there is nothing left to know.
func (q *queue) idle() bool {
	return q.first == nil && q.on == nil && q.asker == nil && q.apart == 0
}
