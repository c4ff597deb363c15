package lockconn_test

import (
	"context"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/pgadvisory/advisory/internal/lockconn"
)

// A look is asked for alone, so that a release waits for one at most.
func TestAReleaseDoesNotWaitForLooks(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		f := prepared(t)
		f.srv.rtt = 0
		f.srv.answer = func(_ context.Context, q string) (int64, error) {
			if strings.Contains(q, "NOT granted") {
				time.Sleep(9 * time.Second)
			} else {
				time.Sleep(time.Second)
			}
			return 1, nil
		}
		var wg sync.WaitGroup
		wg.Go(func() { f.must(t, lockconn.Ping) })
		synctest.Wait()
		for n := range int64(4) {
			wg.Go(func() { _, _ = f.ask(t.Context(), lockconn.Look, id(10+n)...) })
		}
		synctest.Wait()
		start := time.Now()
		f.must(t, lockconn.Unlock, id(0)...)
		if took := time.Since(start); took > 10*time.Second {
			t.Errorf("a release took %v", took)
		}
		wg.Wait()
		f.s.Discard()
	})
}

// What a try got that is left is given back after the releases that wait already.
func TestAReleaseBehindATryThatIsLeft(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		f := newConn(t, 0)
		f.must(t, lockconn.Try, id(1)...)
		f.srv.rtt = 4900 * time.Millisecond
		ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
		defer cancel()
		_, _ = f.ask(ctx, lockconn.Try, id(2)...)
		start := time.Now()
		f.must(t, lockconn.Unlock, id(1)...)
		if took := time.Since(start); took > 10*time.Second {
			t.Errorf("a release took %v", took)
		}
		f.s.Discard()
	})
}

// The server's error to the unlock of what a try for several locks has got costs others nothing.
func TestAPartialGrantWhoseUnlockIsCanceled(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		f := newConn(t, 0)
		f.must(t, lockconn.Try, id(0)...)
		f.srv.answer = func(_ context.Context, q string) (int64, error) {
			if q == unlock(1) {
				return 0, serverError("57014")
			}
			return 1, nil
		}
		ok, err := f.ask(t.Context(), lockconn.Try, append(id(1), id(2)...)...)
		if ok || err != nil || f.Lost() != nil {
			t.Errorf("%v, %v; lost: %v", ok, err, f.Lost())
		}
		f.s.Discard()
	})
}
