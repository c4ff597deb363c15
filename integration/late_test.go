package integration

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/pgadvisory/advisory"
)

// A server that stops answering, in whatever moment, makes nobody late: a Timeout, and the end of ctx,
// are kept within a second.

// A bounding is a way to bound a wait.
type bounding struct {
	name  string
	bound func(ctx context.Context, d time.Duration) (context.Context, context.CancelFunc, []advisory.Option)
	kept  func(error) bool
}

var boundings = []bounding{
	{"Timeout", func(ctx context.Context, d time.Duration) (context.Context, context.CancelFunc, []advisory.Option) {
		return ctx, func() {}, []advisory.Option{advisory.Timeout(d)}
	}, func(err error) bool { return errors.Is(err, advisory.ErrNotAcquired) }},
	{"deadline", func(ctx context.Context, d time.Duration) (context.Context, context.CancelFunc, []advisory.Option) {
		ctx, cancel := context.WithTimeout(ctx, d)
		return ctx, cancel, nil
	}, func(err error) bool { return errors.Is(err, context.DeadlineExceeded) }},
	// Drivers know a deadline beforehand, and this not.
	{"cancel", func(ctx context.Context, d time.Duration) (context.Context, context.CancelFunc, []advisory.Option) {
		ctx, cancel := context.WithCancel(ctx)
		time.AfterFunc(d, cancel)
		return ctx, cancel, nil
	}, func(err error) bool { return errors.Is(err, context.Canceled) }},
}

// A silence is a moment in which the server stops answering.
type silence struct {
	name      string
	contended bool // another holds the lock
	at        func(statement string) bool
	ways      []string // in which there is such a moment
	bounds    []string
}

func containing(part string) func(string) bool {
	return func(statement string) bool { return strings.Contains(strings.ToLower(statement), part) }
}

var silences = []silence{
	{name: "dial", contended: true, ways: []string{"WithLock", "WithLocks", "Acquire", "WithConnLock", "WithTxLock", "Lead", "Check"}},
	{name: "BEGIN", at: func(statement string) bool { return strings.HasPrefix(strings.ToLower(statement), "begin") }, ways: []string{"WithTxLock"}},
	{name: "try", at: containing("pg_try_advisory"), ways: []string{"WithLock", "WithLocks", "Acquire", "WithConnLock", "WithTxLock", "AcquireConn", "AcquireTx", "Lead", "Check"}},
	{name: "wait", contended: true, at: containing("do $advisory$"), ways: []string{"WithLock", "WithLocks", "Acquire", "WithConnLock", "WithTxLock", "AcquireConn", "Lead", "Check"}},
	{name: "hint", contended: true, at: containing("pg_stat_activity"), ways: []string{"WithLock", "WithLocks", "Acquire", "WithConnLock", "WithTxLock"}, bounds: []string{"Timeout"}},
}

// A lateness is one case.
type lateness struct {
	d      driver
	s      silence
	way    string
	b      bounding
	beside bool // other locks of the process are on the pool's common session
}

func (l lateness) name() string {
	name := fmt.Sprintf("%s %s %s %s", l.d.name, l.s.name, l.way, l.b.name)
	if l.beside {
		name += " beside others"
	}
	return name
}

func latenesses() (all []lateness) {
	onShared := []string{"WithLock", "Lead"}
	for _, d := range drivers[:2] {
		for _, s := range silences {
			for _, w := range s.ways {
				for _, b := range boundings {
					if !s.isBounded(w, b.name) {
						continue
					}
					all = append(all, lateness{d, s, w, b, false})
					if slices.Contains(onShared, w) && b.name != "deadline" {
						all = append(all, lateness{d, s, w, b, true})
					}
				}
			}
		}
	}
	return all
}

// isBounded tells whether a bound has something of its own to show in this silence.
func (s silence) isBounded(way, bound string) bool {
	withoutTimeout := []string{"Lead", "Check"}
	switch {
	case bound == "deadline" && way != "WithTxLock":
		return false // which is as the end of ctx
	case bound == "Timeout" && slices.Contains(withoutTimeout, way):
		return false
	default:
		return len(s.bounds) == 0 || slices.Contains(s.bounds, bound)
	}
}

// prepare returns the call that may be late, and what undoes what was done for it.
func (l lateness) prepare(t *testing.T, db *sql.DB, key advisory.Key) (call func(context.Context, []advisory.Option) error, undo func()) {
	t.Helper()
	undo = func() {}
	switch l.way {
	case "AcquireConn":
		conn, err := db.Conn(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		return func(ctx context.Context, opts []advisory.Option) error {
			return advisory.AcquireConn(ctx, conn, key, opts...)
		}, func() { conn.Close() }
	case "AcquireTx":
		tx, err := db.BeginTx(t.Context(), nil)
		if err != nil {
			t.Fatal(err)
		}
		return func(ctx context.Context, opts []advisory.Option) error {
			return advisory.AcquireTx(ctx, tx, key, opts...)
		}, func() { _ = tx.Rollback() }
	case "Check":
		return func(ctx context.Context, _ []advisory.Option) error { return advisory.Check(ctx, db) }, undo
	default:
		all := append(slices.Clone(openers), leadOnce)
		w := all[slices.IndexFunc(all, func(w way) bool { return w.name == l.way })]
		return func(ctx context.Context, opts []advisory.Option) error { return w.with(ctx, db, key, noWork, opts...) }, undo
	}
}

func TestNobodyIsLateWhateverDoesNotAnswer(t *testing.T) {
	t.Parallel()
	const atATime = 16 // more would be late by themselves
	const most = 40
	// The server finds its clients gone, in whatever they were.
	allowLog(t, clientGone, brokenOff)
	watched := watchLog(t, server.DSN())
	var mu sync.Mutex
	all, reached := 0, 0
	var late []lateness
	for some := range slices.Chunk(latenesses(), atATime) {
		allTogether(t, some, lateness.name, func(t *testing.T, l lateness, meet func()) {
			took, silent := l.measure(t, watched, meet)
			mu.Lock()
			defer mu.Unlock()
			all++
			if silent {
				reached++
			}
			if took > lateBound+lateLimit {
				late = append(late, l)
			}
		})
	}
	t.Logf("%d of %d moments were reached", reached, all)
	if reached < all*3/4 {
		t.Error("too few to show anything")
	}
	if len(late) > most {
		t.Errorf("%d of %d were late", len(late), all)
	}
	// It may have been the machine that was late. It is not so each time, among few.
	for few := range slices.Chunk(late[:min(len(late), most)], 4) {
		allTogether(t, few, func(l lateness) string { return l.name() + " among few" }, func(t *testing.T, l lateness, _ func()) {
			var took time.Duration
			for range 3 {
				if took, _ = l.measure(t, watched, func() {}); took <= lateBound+lateLimit {
					return
				}
			}
			t.Errorf("returned after %v, want %v at most", took, lateBound+lateLimit)
		})
	}
}

// lateBound is how long the calls may wait, and lateLimit how much later they may return.
const lateBound, lateLimit = time.Second, time.Second

// measure returns how long the call took, and whether there was the moment in which the server stops
// answering.
func (l lateness) measure(t *testing.T, watched string, meet func()) (took time.Duration, silent bool) {
	t.Helper()
	r := newRelay(t, server)
	defer r.close()
	db, err := l.d.openDB(withParams(t, watched, "host", "127.0.0.1", "port", r.port, "sslmode", "disable"))
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	key := advisory.Name(l.name())
	if l.s.contended {
		release := holdAll(t, adminDB(t), []advisory.Key{key})
		defer release()
	}
	var others []*advisory.Lock
	if l.beside {
		for i := range 3 {
			lock, err := advisory.Acquire(t.Context(), db, advisory.Name(fmt.Sprint(l.name(), " ", i)),
				advisory.Heartbeat(time.Minute), advisory.HolderTimeout(time.Hour)) // they find out nothing
			if err != nil {
				t.Fatal(err)
			}
			others = append(others, lock)
		}
	}
	call, undo := l.prepare(t, db, key)
	if l.s.at != nil {
		fill(t, db, 2)
	}
	meet()
	if l.s.at == nil {
		r.silence()
	} else {
		r.silenceAt(l.s.at)
	}

	began := time.Now()
	ctx, cancel, opts := l.b.bound(t.Context(), lateBound)
	defer cancel()
	returned := make(chan error, 1)
	go func() { returned <- call(ctx, opts) }()
	select {
	case err := <-returned:
		took = time.Since(began)
		// An AcquireConn whose statement is not answered closes the conn, and says why.
		closed := err != nil && l.way == acquireConn.name && l.b.name == "Timeout"
		if !l.b.kept(err) && !closed || took < lateBound {
			t.Errorf("after %v: %v", took, err)
		}
	case <-time.After(15 * time.Second):
		t.Error("has not returned after 15s")
	}
	t.Logf("returned after %v", took.Round(time.Millisecond))
	silent = r.silent()
	r.close()
	undo()
	for _, lock := range others {
		_ = lock.Release() // whose session is lost
	}
	return took, silent
}
