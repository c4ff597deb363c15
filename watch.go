package advisory

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"
)

// A watch checks the session of held locks every heartbeat, and ends it when the
// locks cannot be shown to be held any more: by twice a heartbeat after the last
// proof that they were. With the first heartbeat it has the server watch, too: an
// idle_session_timeout of at least three heartbeats makes sure that the server
// does not let go of the locks of a holder that fell silent before the holder,
// counting from an earlier moment to a nearer one, has given up.
//
// Between heartbeats it is one timer; nothing runs. It ends with stop, or with the
// loss of the session.
type watch struct {
	s     *session
	every time.Duration // Heartbeat
	lost  func(error)   // called at most once, before the session is discarded

	mu    sync.Mutex // guards the rest, and s.armed
	timer *time.Timer
	proof time.Time // when the last statement went out that proved the locks held
	ended bool
	cause error // why the session is lost
}

// start begins to watch s, which has just acquired its locks.
func (w *watch) start() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.proof = w.s.proof
	w.timer = time.AfterFunc(time.Until(w.proof.Add(w.every)), w.beat)
}

// lostBy returns why the session is lost, if that has been noticed.
func (w *watch) lostBy() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.cause
}

// stop ends the watch and returns why the session is lost, if it is. A heartbeat may
// still be under way on the session; none follows.
func (w *watch) stop() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.ended = true
	w.timer.Stop()
	return w.cause
}

// beat is one heartbeat.
func (w *watch) beat() {
	w.mu.Lock()
	if w.ended {
		w.mu.Unlock()
		return
	}
	sent := time.Now()
	answerIn := w.proof.Add(2 * w.every).Sub(sent)
	if answerIn <= 0 {
		// This process was frozen, and another may hold the lock by now.
		w.mu.Unlock()
		w.lose(fmt.Errorf("no heartbeat for %v", sent.Sub(w.proof).Round(time.Millisecond)))
		return
	}
	w.mu.Unlock()

	// The driver may not return in time. This does.
	overdue := time.AfterFunc(answerIn, func() { w.lose(noAnswer{answerIn.Round(time.Millisecond)}) })
	rows, err := w.ask(answerIn)
	overdue.Stop()
	switch {
	case errors.Is(err, errWatchEnded):
		return
	case err != nil:
		w.lose(err)
		return
	case rows < int64(len(w.s.held)):
		w.lose(errNotHeld)
		return
	}

	w.mu.Lock()
	defer w.mu.Unlock()
	if !w.ended {
		w.proof = sent
		w.timer.Reset(time.Until(sent.Add(w.every)))
	}
}

var errWatchEnded = errors.New("the watch has ended")

// ask has the server count the locks that the session holds, and arms it the first time.
func (w *watch) ask(bound time.Duration) (rows int64, err error) {
	var n int64 // as in exec
	err = w.s.do(context.Background(), bound, func(ctx context.Context) error {
		// It is this statement's turn on the session. A release may have had its turn
		// just before, and then nothing must follow: the connection is the pool's.
		w.mu.Lock()
		if w.ended {
			w.mu.Unlock()
			return errWatchEnded
		}
		query := heldStatement(w.s.held, w.s.shared)
		if !w.s.armed {
			query = w.s.arm() + query
			w.s.armed = true // before the release, which undoes it, can look
		}
		w.mu.Unlock()
		var err error
		n, err = w.s.send(ctx, query)
		return err
	})
	if err == nil {
		rows = n
	}
	return rows, err
}

// lose ends the watch and the session, unless it has ended.
func (w *watch) lose(cause error) {
	w.mu.Lock()
	if w.ended {
		w.mu.Unlock()
		return
	}
	w.ended = true
	w.cause = cause
	w.mu.Unlock()
	if sessionGone(cause) {
		w.s.gone.Store(true)
	}
	defer w.s.discard()
	w.lost(cause)
}

// lostError is the error of locks that were held and are lost.
func lostError(op string, keys []Key, cause error) error {
	errs := []error{ErrLost, cause}
	if errors.Is(cause, errNotHeld) {
		errs = errs[:1]
	}
	return &lockError{op: op, key: keyList(keys), msg: "lock lost: " + explain(cause), errs: errs}
}
