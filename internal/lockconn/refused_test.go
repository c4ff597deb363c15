package lockconn_test

import (
	"context"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/pgadvisory/advisory/internal/lockconn"
	"github.com/pgadvisory/advisory/internal/pgsql"
)

// refusing has the server of f refuse all batches, and the statements of which refuse is true.
func refusing(f *fixture, refuse func(query string) bool) *fixture {
	f.srv.batch = func(string, string) (string, error) { return "", serverError("53200") }
	f.srv.answer = func(_ context.Context, query string) (int64, error) {
		if refuse(query) {
			return 0, serverError("53200")
		}
		return 1, nil
	}
	return f
}

func none(string) bool { return false }

// If the server refuses a batch, how far it got is not known: what it may have got is unlocked, and
// each request is answered by itself.
func TestABatchThatIsRefused(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		f := refusing(prepared(t), func(query string) bool { return query == try(2) })
		oks, errs := f.together(t, lockconn.Try, 1, 3)
		if !slices.Equal(oks, []bool{true, false, true}) || errs[0] != nil || errs[1] != serverError("53200") || errs[2] != nil {
			t.Errorf("%v, %v", oks, errs)
		}
		f.srv.want(t, pgsql.Ping, "batch {1,1,1} {1,2,3}", held(1, 2, 3), try(1), try(2), held(2), try(3))
		f.s.Discard()
	})
}

// What is answered by itself after that does not go through the driver's cache, out of which a failure would
// throw it.
func TestABatchThatIsRefusedWhereTheDriverCaches(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		f := refusing(preparedOn(t, &server{caches: true}), none)
		f.together(t, lockconn.Try, 1, 2)
		f.srv.want(t, pgsql.Ping, "batch {1,1} {1,2}", held(1, 2), try(1), try(2))
		f.s.Discard()
	})
}

// held unlocks those of the keys that are held.
func held(of ...int64) string {
	var keys []pgsql.Key
	for _, n := range of {
		keys = append(keys, id(n)...)
	}
	return pgsql.UnlockHeld(keys, false)
}

// A release of a batch that is refused is over with the statement that unlocks all.
func TestAReleaseInABatchThatIsRefused(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		f := refusing(prepared(t), none)
		f.must(t, lockconn.Try, id(4)...)
		f.srv.clear()
		start := time.Now()
		f.duringATrip(t, 4, func(i int) {
			switch i {
			case 0, 1:
				f.must(t, lockconn.Try, id(int64(1+i))...)
			case 2:
				f.must(t, lockconn.Unlock, id(4)...)
				wantTook(t, start, 3*f.srv.rtt)
			case 3:
				f.must(t, lockconn.Ping)
				wantTook(t, start, 3*f.srv.rtt)
			}
		})
		f.srv.want(t, pgsql.Ping, "batch {2,1,1} {4,1,2}", held(4, 1, 2), try(1), try(2))
		f.s.Discard()
	})
}

// Shared locks are unlocked by a statement of their own.
func TestABatchOfBothModesThatIsRefused(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		f := refusing(prepared(t), none)
		f.duringATrip(t, 2, func(i int) {
			r := &lockconn.Request{Op: lockconn.Try, Keys: id(int64(1 + i)), Shared: i == 1}
			if err := f.Ask(t.Context(), r); err != nil || !r.OK {
				t.Errorf("%v, %v", r.OK, err)
			}
		})
		f.srv.want(t, pgsql.Ping, "batch {1,17} {1,2}", held(1), pgsql.UnlockHeld(id(2), true), try(1), pgsql.Try(id(2), true))
		f.s.Discard()
	})
}

// Releases go before the tries that are put back, and a try that is left by then is not sent.
func TestReleasesGoBeforeWhatIsPutBack(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		var f *fixture
		var release sync.WaitGroup
		f = refusing(prepared(t), func(query string) bool {
			if query == try(1) {
				cancel()
				release.Go(func() { f.must(t, lockconn.Unlock, id(0)...) })
				synctest.Wait()
			}
			return false
		})
		f.duringATrip(t, 3, func(i int) {
			if i == 1 {
				_, err := f.ask(ctx, lockconn.Try, id(2)...)
				wantError(t, err, context.Canceled)
				return
			}
			f.must(t, lockconn.Try, id(int64(1+i))...)
		})
		release.Wait()
		f.srv.want(t, pgsql.Ping, "batch {1,1,1} {1,2,3}", held(1, 2, 3), try(1), unlock(0), try(3))
		f.s.Discard()
	})
}

// The same, where the caller leaves while the batch is under way: what it got is unlocked with the rest.
func TestATryOfABatchThatIsRefusedIsLeft(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		f := refusing(prepared(t), none)
		ctx, cancel := context.WithTimeout(t.Context(), f.srv.rtt+f.srv.rtt/2)
		defer cancel()
		f.duringATrip(t, 3, func(i int) {
			if i == 1 {
				_, err := f.ask(ctx, lockconn.Try, id(2)...)
				wantError(t, err, context.DeadlineExceeded)
				return
			}
			f.must(t, lockconn.Try, id(int64(1+i))...)
		})
		f.srv.want(t, pgsql.Ping, "batch {1,1,1} {1,2,3}", held(1, 2, 3), try(1), try(3))
		f.s.Discard()
	})
}

// If what unlocks all of a batch fails, the session is lost, and each try has a LostError or the cause.
func TestABatchThatIsRefusedAndNotUndone(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		f := refusing(prepared(t), func(query string) bool { return query == held(1, 2) })
		oks, errs := f.together(t, lockconn.Try, 1, 2)
		if slices.Contains(oks, true) {
			t.Errorf("answers: %v", oks)
		}
		for _, err := range errs {
			wantError(t, err, serverError("53200"))
		}
		wantError(t, <-f.lost, serverError("53200"))
	})
}

// Tries that fail one by one take their time. What unlocks them proves the session meanwhile.
func TestWhatIsPutBackCostsNobodyTheSession(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		const asked = 10
		f := refusing(prepared(t), func(query string) bool { return strings.Contains(query, "try") })
		h, lost := f.hold(t, time.Second, 15*time.Second)
		f.srv.rtt = time.Second / 5
		start := time.Now()
		if oks, errs := f.together(t, lockconn.Try, 1, asked); slices.Contains(oks, true) || slices.Contains(errs, nil) {
			t.Errorf("answers: %v, %v", oks, errs)
		}
		if took := time.Since(start); took < 4*time.Second || len(lost) > 0 {
			t.Errorf("after %v, lost: %v", took, f.Lost())
		}
		f.LetGo(h)
		time.Sleep(time.Second) // for the heartbeat under way
		f.s.Discard()
	})
}
