package lockconn_test

import (
	"context"
	"testing"
	"testing/synctest"
	"time"

	"github.com/pgadvisory/advisory/internal/lockconn"
	"github.com/pgadvisory/advisory/internal/session"
)

// The last one to leave hands the connection back, as it was: without the prepared statement, and
// without settings. Those go with the last unlock, if it is alone.
func TestTheLastOneToLeaveCleansAndHandsBack(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		f := prepared(t)
		f.Use()
		h := &lockconn.Holder{Heartbeat: time.Second, IdleTimeout: time.Minute}
		wantError(t, f.Hold(h), nil)
		wantError(t, f.Prove(t.Context()), nil)
		f.LetGo(h)
		f.srv.clear()
		reset := f.s.Reset()
		f.must(t, lockconn.Unlock, id(0)...)
		f.Leave()
		f.srv.want(t, reset+unlock(0))
		if n := f.db.Stats().InUse; n != 1 || !f.Empty() {
			t.Errorf("%d connections in use", n)
		}
		f.s.ChangeIdleTimeout(time.Second) // as is left when the last unlock goes out with others
		f.Leave()
		f.srv.want(t, reset+unlock(0), "deallocate", reset)
		f.wantHandedBack(t)
		if f.Use() {
			t.Error("it is open")
		}
	})
}

// While there is a lock on the session, it is not handed back.
func TestALockKeepsTheConnection(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		f := newConn(t, 0)
		f.must(t, lockconn.Try, id(1)...)
		f.Leave()
		if f.Empty() || f.db.Stats().InUse != 1 || !f.Use() {
			t.Errorf("%+v", f.db.Stats())
		}
		f.must(t, lockconn.Unlock, id(1)...)
		f.Leave()
		f.wantHandedBack(t)
	})
}

// Nor is it while a request that was left is under way: what it gets is unlocked before.
func TestARequestThatIsLeftKeepsTheConnection(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		f := newConn(t, 0)
		f.must(t, lockconn.Try, id(1)...)
		f.srv.rtt = time.Second
		ctx, cancel := context.WithCancel(t.Context())
		time.AfterFunc(time.Second/2, cancel)
		go func() { f.must(t, lockconn.Unlock, id(1)...) }()
		synctest.Wait()
		_, err := f.ask(ctx, lockconn.Look, id(2)...) // behind it
		wantError(t, err, context.Canceled)
		ctx, cancel = context.WithCancel(t.Context())
		time.AfterFunc(time.Second, cancel)
		_, err = f.ask(ctx, lockconn.Try, id(3)...)
		wantError(t, err, context.Canceled)
		f.Leave()
		if n := f.db.Stats().InUse; n != 1 {
			t.Errorf("%d connections in use", n)
		}
		time.Sleep(time.Minute)
		f.srv.want(t, try(1), unlock(1), try(3), unlock(3))
		f.wantHandedBack(t)
	})
}

// A session that cannot be cleaned is discarded.
func TestASessionThatCannotBeCleanedIsDiscarded(t *testing.T) {
	t.Parallel()
	for _, dirty := range []string{"deallocate", "reset"} {
		synctest.Test(t, func(t *testing.T) {
			f := prepared(t)
			f.must(t, lockconn.Unlock, id(0)...)
			f.s.ChangeIdleTimeout(time.Second)
			if dirty == "reset" {
				dirty = f.s.Reset()
			}
			f.srv.answer = func(_ context.Context, query string) (int64, error) {
				if query == dirty {
					return 0, serverError("XX000")
				}
				return 1, nil
			}
			f.Leave()
			synctest.Wait()
			if lines := f.srv.lines(); lines[len(lines)-1] != "close" {
				t.Errorf("%s: %q", dirty, lines)
			}
			if n := f.db.Stats().OpenConnections; n != 0 {
				t.Errorf("%d connections open", n)
			}
		})
	}
}

// A driver's panic while a session is cleaned, behind its last use, is not the pool's trouble.
func TestADriversPanicWhileASessionIsCleaned(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		f := newConn(t, 0)
		ended := make(chan struct{})
		f.s.OnEnd = func() { close(ended) }
		f.s.ChangeIdleTimeout(time.Second)
		reset := f.s.Reset()
		f.srv.answer = func(context.Context, string) (int64, error) { panic("driver") }
		func() {
			defer func() {
				if r := recover(); r != "driver" {
					t.Errorf("recovered %v", r)
				}
			}()
			f.Leave()
		}()
		<-ended
		f.srv.want(t, reset, "close")
		if n := f.db.Stats().OpenConnections; n != 0 {
			t.Errorf("%d connections open", n)
		}
	})
}

// The driver's panic is that of whose request it was in. The session is lost for all.
func TestADriversPanicInARequest(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		f := newConn(t, 0)
		f.must(t, lockconn.Try, id(1)...)
		told := make(chan error, 1)
		h := &lockconn.Holder{Heartbeat: time.Second, IdleTimeout: time.Minute}
		h.Begin(func(cause error) { told <- cause })
		wantError(t, f.Hold(h), nil)
		f.srv.answer = func(context.Context, string) (int64, error) { panic("driver") }
		func() {
			defer func() {
				if r := recover(); r != "driver" {
					t.Errorf("recovered %v", r)
				}
			}()
			_, _ = f.ask(t.Context(), lockconn.Try, id(2)...)
		}()
		wantError(t, <-told, session.ErrPanicked)
		wantError(t, <-f.lost, session.ErrPanicked)
	})
}
