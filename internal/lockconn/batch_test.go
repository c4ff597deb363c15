package lockconn_test

import (
	"context"
	"errors"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/pgadvisory/advisory/internal/lockconn"
	"github.com/pgadvisory/advisory/internal/pgsql"
	"github.com/pgadvisory/advisory/internal/session"
)

// prepareAfter is that of batch.go.
const prepareAfter = 8

// together asks for op of the keys from first to last at once, while a round trip is under way.
func (f *fixture) together(t *testing.T, op lockconn.Op, first, last int64) (oks []bool, errs []error) {
	oks, errs = make([]bool, last-first+1), make([]error, last-first+1)
	f.duringATrip(t, len(oks), func(i int) { oks[i], errs[i] = f.ask(t.Context(), op, id(first+int64(i))...) })
	return oks, errs
}

// duringATrip calls ask n times at once, in order, while a round trip is under way.
func (f *fixture) duringATrip(t *testing.T, n int, ask func(i int)) {
	var wg sync.WaitGroup
	wg.Go(func() { f.must(t, lockconn.Ping) })
	synctest.Wait()
	for i := range n {
		wg.Go(func() { ask(i) })
		synctest.Wait() // in order
	}
	wg.Wait()
	synctest.Wait()
}

// prepared returns a Conn that has the prepared statement. It holds the lock of id(0).
func prepared(t *testing.T) *fixture { return preparedOn(t, new(server)) }

func preparedOn(t *testing.T, srv *server) *fixture {
	f := newConnOn(t, srv, 0)
	f.srv.rtt = time.Millisecond
	f.must(t, lockconn.Try, id(0)...)
	f.together(t, lockconn.Try, 1, prepareAfter+2)
	f.together(t, lockconn.Unlock, 1, prepareAfter+2)
	f.srv.clear()
	return f
}

// What is asked for while a round trip is under way goes out together in the next one, once there has
// been so much of that that it pays to prepare the statement.
func TestRequestsDuringARoundTripGoOutTogether(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		f := newConn(t, 0)
		f.srv.rtt = time.Millisecond
		f.must(t, lockconn.Try, id(0)...)
		f.together(t, lockconn.Try, 1, 4) // 3, 2 and 1 of them have waited for others
		f.together(t, lockconn.Try, 5, 8) // and 3 more
		f.srv.want(t, try(0), pgsql.Ping, try(1), try(2), try(3), try(4), pgsql.Ping, try(5), "prepare", "batch {1,1,1} {6,7,8}")
		f.srv.clear()
		f.together(t, lockconn.Unlock, 1, 3)
		if lines := f.srv.lines(); len(lines) != 2 || !strings.HasPrefix(lines[1], "batch {2,2,2} ") {
			t.Errorf("log: %q", lines)
		}

		// Alone, a request is a statement of its own.
		f.must(t, lockconn.Unlock, id(4)...)
		if lines := f.srv.lines(); lines[len(lines)-1] != unlock(4) {
			t.Errorf("last: %s", lines[len(lines)-1])
		}
		f.s.Discard()
	})
}

// Each request of a batch has its own answer. Of a request for several locks that has got some, those
// are unlocked.
func TestEachRequestOfABatchHasItsAnswer(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		f := prepared(t)
		f.srv.batch = func(string, string) (string, error) { return "1011001", nil }
		var wg sync.WaitGroup
		wg.Go(func() { f.must(t, lockconn.Ping) })
		synctest.Wait()
		for i, keys := range [][]pgsql.Key{id(1), id(2), slices.Concat(id(3), id(4), id(5)), slices.Concat(id(6), id(7))} {
			wg.Go(func() {
				ok, err := f.ask(t.Context(), lockconn.Try, keys...)
				if ok != (i == 0) || err != nil {
					t.Errorf("%v: %v, %v", keys, ok, err)
				}
			})
			synctest.Wait()
		}
		wg.Wait()
		f.srv.want(t, pgsql.Ping, "batch {1,1,1,1,1,1,1} {1,2,3,4,5,6,7}", pgsql.Unlock(slices.Concat(id(3), id(4)), false), unlock(7))
		f.s.Discard()
	})
}

// A server that does not know the statement is asked for it once.
func TestAServerThatDoesNotKnowTheStatement(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		f := newConn(t, 0)
		f.srv.rtt = time.Millisecond
		f.srv.answer = func(_ context.Context, query string) (int64, error) {
			if query == "prepare" {
				return 0, serverError("42883")
			}
			return 1, nil
		}
		f.must(t, lockconn.Try, id(0)...)
		for range 2 {
			oks, _ := f.together(t, lockconn.Try, 1, 2*prepareAfter)
			if slices.Contains(oks, false) {
				t.Errorf("answers: %v", oks)
			}
		}
		sent := strings.Join(f.srv.lines(), "\n")
		if n := strings.Count(sent, "prepare"); n != 1 || strings.Contains(sent, "batch") {
			t.Errorf("asked %d times: %s", n, sent)
		}
		f.s.Discard()
	})
}

// An unlock in a batch that finds a lock not held is the end of the session. The others are told that
// it was lost to another's request.
func TestAnUnlockInABatchThatFindsNothing(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		f := prepared(t)
		f.srv.batch = func(string, string) (string, error) { return "10", nil }
		_, errs := f.together(t, lockconn.Unlock, 1, 2)
		lost := 0
		for _, err := range errs {
			wantError(t, err, session.ErrNotHeld)
			if errors.As(err, new(lockconn.LostError)) {
				lost++
			}
		}
		if lost != 1 {
			t.Errorf("errors: %v", errs)
		}
		wantError(t, <-f.lost, session.ErrNotHeld)
	})
}

// Any answer will do for a Ping: it goes with what is asked for next, and needs no common statement.
func TestPingsGoWithOthers(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		f := newConn(t, 0)
		f.must(t, lockconn.Try, id(1)...)
		f.srv.rtt = time.Millisecond
		f.srv.clear()
		f.mixed(t, lockconn.Ping, lockconn.Ping, lockconn.Unlock, lockconn.Ping, lockconn.Try, lockconn.Try)
		f.srv.want(t, pgsql.Ping, unlock(1), try(1), try(1))
		f.s.Discard()
	})
}

// mixed asks for all of ops while a round trip is under way. The locks are those of id(1).
func (f *fixture) mixed(t *testing.T, ops ...lockconn.Op) (errs []error) {
	errs = make([]error, len(ops))
	f.duringATrip(t, len(ops), func(i int) { _, errs[i] = f.ask(t.Context(), ops[i], id(1)...) })
	return errs
}

// The error of the request that a Ping has gone with is not the Ping's, even if it costs the session.
func TestAPingThatGoesWithARequestThatFails(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		f := newConn(t, 0)
		f.srv.rtt = time.Millisecond
		f.srv.answer = func(_ context.Context, q string) (int64, error) {
			if q == try(1) {
				return 0, serverError("53200")
			}
			return 1, nil
		}
		errs := f.mixed(t, lockconn.Ping, lockconn.Try)
		wantError(t, errs[0], nil)
		wantError(t, errs[1], serverError("53200"))
		wantError(t, <-f.lost, serverError("53200"))
	})
}

// A Ping has the bounds of a release, whatever it goes with.
func TestAPingThatGoesWithARequestWithoutAnAnswer(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		f := newConn(t, 0)
		f.srv.rtt = time.Millisecond
		f.srv.answer = func(ctx context.Context, q string) (int64, error) {
			if q == try(1) {
				<-ctx.Done()
				return 0, ctx.Err()
			}
			return 1, nil
		}
		start := time.Now()
		errs := f.mixed(t, lockconn.Ping, lockconn.Try)
		if took := time.Since(start); errs[0] == nil || took > session.ReleaseBound+time.Second {
			t.Errorf("after %v: %v", took, errs)
		}
		<-f.lost
	})
}
