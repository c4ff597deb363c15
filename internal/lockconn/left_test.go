package lockconn_test

import (
	"context"
	"errors"
	"io"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/pgadvisory/advisory/internal/lockconn"
	"github.com/pgadvisory/advisory/internal/pgsql"
	"github.com/pgadvisory/advisory/internal/session"
)

// Where others have locks on the session, a request is left at the end of ctx, at once. What it gets is
// unlocked before anybody else's request goes out.
func TestARequestThatIsLeftIsUndoneFirst(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		f := newConn(t, 0)
		f.must(t, lockconn.Try, id(1)...)
		f.srv.rtt = time.Second
		ctx, cancel := context.WithTimeout(t.Context(), time.Second/2)
		defer cancel()
		var others sync.WaitGroup
		time.AfterFunc(time.Second/4, func() {
			others.Go(func() { f.must(t, lockconn.Try, id(3)...) })
		})
		start := time.Now()
		_, err := f.ask(ctx, lockconn.Try, id(2)...)
		wantTook(t, start, time.Second/2)
		wantError(t, err, context.DeadlineExceeded)
		others.Wait()
		f.srv.want(t, try(1), try(2), unlock(2), try(3))
		f.s.Discard()
	})
}

// A request that has not gone out yet when it is left never does.
func TestARequestThatIsLeftBeforeItIsSent(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		f := newConn(t, 0)
		f.must(t, lockconn.Try, id(1)...)
		f.srv.rtt = time.Second
		var other sync.WaitGroup
		other.Go(func() { f.must(t, lockconn.Ping) })
		synctest.Wait()
		ctx, cancel := context.WithTimeout(t.Context(), time.Second/2)
		defer cancel()
		_, err := f.ask(ctx, lockconn.Try, id(2)...)
		wantError(t, err, context.DeadlineExceeded)
		other.Wait()
		f.must(t, lockconn.Unlock, id(1)...)
		f.srv.want(t, try(1), pgsql.Ping, unlock(1))
		f.Leave()
		f.wantHandedBack(t)
	})
}

// A release is not left: it has to happen when its caller's ctx has ended.
func TestAReleaseIsNotLeft(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		f := newConn(t, 0)
		f.must(t, lockconn.Try, id(1)...)
		f.must(t, lockconn.Try, id(2)...)
		f.srv.rtt = time.Second
		go func() { _, _ = f.ask(t.Context(), lockconn.Try, id(3)...) }()
		synctest.Wait()
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		start := time.Now()
		ok, err := f.ask(ctx, lockconn.Unlock, id(1)...)
		if !ok || err != nil {
			t.Errorf("%v, %v", ok, err)
		}
		wantTook(t, start, 2*time.Second)
		f.s.Discard()
	})
}

// Where nobody has locks on the session, a try is broken off, which is its end.
func TestALoneTryIsBrokenOff(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		f := newConn(t, 0)
		f.srv.answer = func(ctx context.Context, _ string) (int64, error) { <-ctx.Done(); return 0, ctx.Err() }
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		start := time.Now()
		_, err := f.ask(ctx, lockconn.Try, id(1)...)
		wantError(t, err, context.DeadlineExceeded)
		wantTook(t, start, time.Second+session.Grace)
		wantError(t, <-f.lost, context.DeadlineExceeded)
		f.srv.want(t, try(1), "close")
	})
}

// Who has opened the session is told that it was lost to another's request, whether his own was
// behind that, or comes later: it may be asked for again on another session.
func TestTheOpenersSessionIsLostToAnother(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		f := newConn(t, 0)
		if !f.Use() { // another does, and asks first
			t.Fatal("not open")
		}
		f.srv.answer = func(context.Context, string) (int64, error) {
			time.Sleep(time.Second)
			return 0, io.ErrUnexpectedEOF
		}
		var other sync.WaitGroup
		other.Go(func() {
			_, err := f.ask(t.Context(), lockconn.Try, id(2)...)
			if errors.As(err, new(lockconn.LostError)) || !errors.Is(err, io.ErrUnexpectedEOF) {
				t.Errorf("the other's error: %v", err)
			}
			f.Leave()
		})
		synctest.Wait()
		for range 2 {
			_, err := f.ask(t.Context(), lockconn.Try, id(1)...)
			if !errors.As(err, new(lockconn.LostError)) || !errors.Is(err, io.ErrUnexpectedEOF) {
				t.Errorf("the opener's error: %v", err)
			}
		}
		other.Wait()
		wantError(t, f.Lost(), io.ErrUnexpectedEOF)
		if f.Use() {
			t.Error("it is open")
		}
		f.Leave()
		synctest.Wait()
		f.srv.want(t, try(2), "close") // once
	})
}
