package advisory

import (
	"context"
	"errors"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"
)

func TestALockOutlivesTheCtxOfItsAcquisition(t *testing.T) {
	t.Parallel()
	db, srv := newServer(t)
	type value struct{}
	ctx, cancel := context.WithCancel(context.WithValue(t.Context(), value{}, "kept"))
	l, err := Acquire(ctx, db, key)
	wantError(t, err)
	cancel()
	if l.Key() != key {
		t.Errorf("Key() = %v", l.Key())
	}
	if err := l.Context().Err(); err != nil {
		t.Errorf("Context has ended with Acquire's: %v", err)
	}
	if l.Context().Value(value{}) != "kept" {
		t.Error("Context does not carry the values of Acquire's")
	}
	wantError(t, WithLock(l.Context(), db, key, nothing), ErrReentrant)
	wantError(t, l.Release())
	if !errors.Is(context.Cause(l.Context()), context.Canceled) || errors.Is(context.Cause(l.Context()), ErrLost) {
		t.Errorf("cause after Release: %v", context.Cause(l.Context()))
	}
	srv.want(t, on(1, "open", tryQuery, unlockQuery)...)
}

// defer l.Release() before the check of Acquire's error is a common slip.
func TestReleaseOfANilLockIsAnError(t *testing.T) {
	t.Parallel()
	db, _ := newServer(t, refused)
	release := func() (err error) {
		l, _ := Acquire(t.Context(), db, key, NoWait())
		defer func() { err = l.Release() }()
		return nil
	}
	wantError(t, release(), "advisory: release: nil Lock: Acquire has failed")
}

func TestReleaseTwiceIsReleaseOnce(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name  string
		reply reply
		log   []string
		wants []any
	}{
		{"held", granted, on(1, "open", tryQuery, unlockQuery), nil},
		{"lost", refused, on(1, "open", tryQuery, unlockQuery, freeQuery, "close"), []any{ErrLost}},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			db, srv := newServer(t, granted, test.reply)
			l := take(t, db, key)
			var wg sync.WaitGroup
			for range 8 {
				wg.Go(func() { wantError(t, l.Release(), test.wants...) })
			}
			wg.Wait()
			wantError(t, l.Release(), test.wants...)
			srv.want(t, test.log...)
		})
	}
}

// Whoever works by the context has ended before another can begin.
func TestTheContextEndsBeforeTheUnlockIsSent(t *testing.T) {
	t.Parallel()
	db, srv := newServer(t)
	l := take(t, db, key)
	srv.script = func(_ context.Context, _ int, query string) (int64, error) {
		if query == unlockQuery && l.Context().Err() == nil {
			t.Error("unlock under a living context")
		}
		return 1, nil
	}
	wantError(t, l.Release())
}

func TestALockThatIsGarbageIsReleasedWithAWarning(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name  string
		reply reply
		log   string
	}{
		{"held", granted, "garbage-collected without Release"},
		{"lost", refused, "lock lost"},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			db, srv := newServer(t)
			released := make(chan struct{})
			srv.script = func(_ context.Context, _ int, query string) (int64, error) {
				if query == unlockQuery {
					defer close(released)
					return test.reply.rows, test.reply.err
				}
				return 1, nil
			}
			var log logBuffer
			ctx := func() context.Context {
				l := take(t, db, key, log.option())
				runtime.GC() // not while it is in use
				if err := l.Context().Err(); err != nil {
					t.Error(err)
				}
				runtime.KeepAlive(l)
				return l.Context()
			}()
			tick := time.NewTicker(5 * time.Millisecond)
			defer tick.Stop()
			for waiting := true; waiting; {
				select {
				case <-released:
					waiting = false
				case <-tick.C:
					runtime.GC()
				case <-time.After(10 * time.Second):
					t.Fatal("not released")
				}
			}
			<-ctx.Done()
			for range 2000 {
				if strings.Contains(log.String(), test.log) {
					return
				}
				<-tick.C
			}
			t.Errorf("log: %q", log.String())
		})
	}
}

func TestReleaseStopsTheWarning(t *testing.T) {
	t.Parallel()
	db, srv := newServer(t)
	var log logBuffer
	func() {
		l := take(t, db, key, log.option())
		wantError(t, l.Release())
	}()
	runtime.GC()
	runtime.GC()
	srv.want(t, on(1, "open", tryQuery, unlockQuery)...)
	if log.String() != "" {
		t.Errorf("log: %q", log.String())
	}
}
