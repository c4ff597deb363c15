// Package keyqueue is the first-come, first-served queue of one key in this process. It is a pure
// state machine: it sends nothing, waits for nothing, and each method says what the caller is to
// do. It knows nothing of sessions, but that a lock is granted on something that can be compared.
package keyqueue

import (
	"slices"
	"time"
)

// HandOffFor is for how long a lock is handed on within the process before it goes back to the server,
// in whose queue other processes wait. It counts from when the lock was asked for, by a try, or granted,
// after a wait; and anew from a look that has found nobody there. Whoever has come to the server's queue since
// a try went out waits for as long. So a lock whose try was answered only after that time is not handed on.
const HandOffFor = 20 * time.Millisecond

// A Queue is what this process knows of one key: who holds it, and who waits. One waiter at a
// time, the requester, asks the server for all that can share the answer. What the server grants
// is handed from one holder to the next, and shared by shared ones, without asking again.
//
// Holders are of two kinds: most hold the grant, which is on a session that they share. Those of
// WithTxLock and WithConnLock are dedicated: each has the server's lock on a session of its own,
// and is in the queue so as not to wait on a connection for others of this process.
//
// The zero Queue is empty. A Queue is not safe for concurrent use: its owner has a mutex.
type Queue[S comparable] struct {
	// A grant is granted until it is Unlocked or Lost. Before that it is handed on and shared until its time
	// is over, or it is closed; and it releases once its last holder has gone and nobody has taken it over.
	grant    Grant[S]  // the current one, or the last
	granted  bool      // there is a current one
	until    time.Time // the end of HandOffFor
	holders  int       // of the grant
	closed   bool      // others wait in the server's queue
	releases bool      // it is on its way back to the server

	// The requester asks the server for a grant, or whether others wait for it. Granted and Refused are called
	// only while there is one.
	requester *Waiter[S]
	refused   bool // the server has refused, and the requester waits there

	dedicated int // those who hold the lock, or ask for it, on sessions of their own
	owners    int // of these, those who hold it

	exclusive bool // those inside (holders, requester, dedicated) hold or want an exclusive lock; or it is the grant's
	waiters   []*Waiter[S]
}

// A Grant is what the server has granted, and on which session. The number tells it from older
// ones: a release of one that is over, because its session was lost, has no effect.
type Grant[S comparable] struct {
	On S
	No uint64
}

// A Waiter is one request for the lock of one key.
type Waiter[S comparable] struct {
	Shared    bool
	Dedicated bool
	NoWait    bool

	// Turns has the turn of a waiter that has been told to Await. It has room for one.
	Turns chan Turn[S]

	holds bool // it is dedicated, and has the lock
}

// A Turn is what a waiter gets.
type Turn[S comparable] struct {
	To    Action
	Grant Grant[S] // with Hold and Look
	Why   error    // with Refuse: the error of another who asks; nil: another holds the lock
}

// An Action is what a waiter is to do.
type Action uint8

const (
	Await  Action = iota // wait for Turns
	Hold                 // it holds the grant
	Ask                  // ask the server for the lock: see Granted
	Look                 // look whether others wait in the server's queue, and call Looked or Done
	Refuse               // another holds the lock, and the waiter does not wait
)

// Enter is a waiter's arrival.
func (q *Queue[S]) Enter(w *Waiter[S], now time.Time) Turn[S] {
	if len(q.waiters) == 0 {
		if t := q.start(w, now); t.To != Await {
			return t
		}
	}
	if w.NoWait && !q.sharesAnswer(w) {
		return Turn[S]{To: Refuse}
	}
	w.Turns = make(chan Turn[S], 1)
	q.waiters = append(q.waiters, w)
	return Turn[S]{To: Await}
}

// sharesAnswer tells whether the answer that the requester waits for will be that of w, too, who is shared.
func (q *Queue[S]) sharesAnswer(w *Waiter[S]) bool {
	return w.Shared && !w.Dedicated && q.requester != nil && q.requester.Shared && !q.refused &&
		!slices.ContainsFunc(q.waiters, func(w *Waiter[S]) bool { return !w.Shared })
}

// start lets in w, the first in line, if it can be there together with those inside. Otherwise it
// returns Await, and nothing has changed.
func (q *Queue[S]) start(w *Waiter[S], now time.Time) Turn[S] {
	await, ask := Turn[S]{To: Await}, Turn[S]{To: Ask}
	inside := q.holders > 0 || q.dedicated > 0 || q.requester != nil
	fits := !inside || w.Shared && !q.exclusive
	sameMode := q.exclusive != w.Shared // w's mode is that of the grant, if there is one
	switch {
	case q.releases:
		return await
	case !fits:
		return await // those inside go first
	case w.Dedicated && q.granted && q.holders == 0:
		return await // the grant goes back first (within Release alone)
	case w.Dedicated:
		q.dedicated++
		q.exclusive = !w.Shared
		return ask
	case q.requester != nil:
		return await // the requester's answer is w's, too
	case !q.granted:
		q.requester, q.exclusive = w, !w.Shared
		return ask
	case q.closed, !sameMode:
		return await // the grant goes back first
	case now.Before(q.until):
		q.holders++
		return Turn[S]{To: Hold, Grant: q.grant}
	case q.holders > 0:
		q.requester = w
		return Turn[S]{To: Look, Grant: q.grant}
	default:
		return await // its time is over: the grant goes back first (within Release alone)
	}
}

// advance lets in whoever can be.
func (q *Queue[S]) advance(now time.Time) {
	for len(q.waiters) > 0 {
		w := q.waiters[0]
		t := q.start(w, now)
		if t.To == Await {
			return
		}
		q.waiters = q.waiters[1:]
		w.Turns <- t
	}
}

// Granted is the server's grant to the requester, who holds it from then on. HandOffFor counts from
// since: when the lock was asked for, or, after a wait, granted.
//
// Who was told to Ask calls either Granted or Done; before that, Refused may come. One that is dedicated calls
// GrantedDedicated if it has the lock, and Done at the end in any case.
func (q *Queue[S]) Granted(on S, since, now time.Time) Grant[S] {
	q.requester, q.refused = nil, false
	q.grant = Grant[S]{on, q.grant.No + 1}
	q.granted, q.until, q.holders = true, since.Add(HandOffFor), 1
	q.advance(now)
	return q.grant
}

// Refused is the server's refusal to the requester, who waits in the server's queue from then on.
func (q *Queue[S]) Refused() {
	q.refused = true
	q.Refuse(nil)
}

// Refuse refuses all in line who do not wait: they are there for the requester's answer alone. why is nil if
// another holds the lock.
func (q *Queue[S]) Refuse(why error) {
	q.waiters = slices.DeleteFunc(q.waiters, func(w *Waiter[S]) bool {
		if w.NoWait {
			w.Turns <- Turn[S]{To: Refuse, Why: why}
		}
		return w.NoWait
	})
}

// Looked is the answer to Look: whether others wait in the server's queue.
func (q *Queue[S]) Looked(w *Waiter[S], looked Grant[S], others bool, now time.Time) Turn[S] {
	q.requester = nil
	held := q.current(looked) && q.holders > 0
	if held && !others {
		q.until = now.Add(HandOffFor)
		q.holders++
		q.advance(now)
		return Turn[S]{To: Hold, Grant: q.grant}
	}
	if others {
		q.closed = q.closed || held
		q.Refuse(nil)
	}
	if w.NoWait && others {
		q.advance(now)
		return Turn[S]{To: Refuse}
	}
	// It goes first when the grant is back.
	w.Turns = make(chan Turn[S], 1)
	q.waiters = slices.Insert(q.waiters, 0, w)
	q.advance(now)
	return Turn[S]{To: Await}
}

// GrantedDedicated is the server's grant to w, who is dedicated and was to Ask.
func (q *Queue[S]) GrantedDedicated(w *Waiter[S]) {
	w.holds = true
	q.owners++
}

// Done ends a turn to Ask or to Look that has brought w no grant. If w is dedicated, it also ends its hold. A
// why that is not nil is given to all who do not wait: they share w's answer.
func (q *Queue[S]) Done(w *Waiter[S], now time.Time, why error) {
	if w.holds {
		w.holds = false
		q.owners--
	}
	if w.Dedicated {
		q.dedicated--
	} else {
		q.requester, q.refused = nil, false
	}
	if why != nil {
		q.Refuse(why)
	}
	q.advance(now)
}

// Release ends one holder's hold of the grant. If it returns true, the grant goes back to the
// server: the caller is to unlock it, and to call Unlocked.
func (q *Queue[S]) Release(g Grant[S], now time.Time) (unlock bool) {
	if !q.current(g) {
		return false // it was lost
	}
	q.holders--
	if q.holders > 0 {
		return false
	}
	q.advance(now) // the next one takes it over, if it can
	q.releases = q.holders == 0
	return q.releases
}

// Unlocked says that the server has the grant back.
func (q *Queue[S]) Unlocked(g Grant[S], now time.Time) {
	if q.current(g) {
		q.end(now)
	}
}

// Lost says that a session has died. A grant that was on it is over.
func (q *Queue[S]) Lost(on S, now time.Time) {
	if q.granted && q.grant.On == on {
		q.end(now)
	}
}

func (q *Queue[S]) end(now time.Time) {
	q.granted, q.holders, q.closed, q.releases = false, 0, false, false
	q.advance(now)
}

// current tells whether g is not over.
func (q *Queue[S]) current(g Grant[S]) bool { return q.granted && q.grant == g }

// Cancel takes w out of the line. It returns false if w's turn has come: Turns has it.
func (q *Queue[S]) Cancel(w *Waiter[S], now time.Time) bool {
	i := slices.Index(q.waiters, w)
	if i < 0 {
		return false
	}
	q.waiters = slices.Delete(q.waiters, i, i+1)
	q.advance(now) // those behind may be let in
	return true
}

// Held tells whether this process holds the lock. One who still asks for it does not count.
func (q *Queue[S]) Held() bool { return q.granted || q.owners > 0 }

// HeldAnywhere tells whether the lock is known to be held, by this process or by another.
func (q *Queue[S]) HeldAnywhere() bool { return q.Held() || q.refused }

// Idle tells whether nobody holds the lock, asks for it or waits for it.
func (q *Queue[S]) Idle() bool {
	return len(q.waiters) == 0 && !q.granted && q.requester == nil && q.dedicated == 0
}
