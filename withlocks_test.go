package advisory

import (
	"context"
	"io"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/DATA-DOG/go-sqlmock"
	"github.com/google/go-cmp/cmp"

	"github.com/pgadvisory/advisory/internal/session"
)

func TestWithLocksSortsAndDropsRepeats(t *testing.T) {
	t.Parallel()
	const (
		try = "SELECT FROM pg_catalog.generate_series(1, CASE" +
			" WHEN pg_catalog.pg_is_in_recovery() THEN 0 WHEN NOT pg_catalog.pg_try_advisory_lock(-5) THEN 0" +
			" WHEN NOT pg_catalog.pg_try_advisory_lock(3) THEN 1" +
			" WHEN NOT pg_catalog.pg_try_advisory_lock(7440995589958059143) THEN 2" +
			" WHEN NOT pg_catalog.pg_try_advisory_lock(-1, 9) THEN 3" +
			" WHEN NOT pg_catalog.pg_try_advisory_lock(1, 0) THEN 4" +
			" ELSE 5 END)"
		unlock = "SELECT WHERE pg_catalog.pg_advisory_unlock(-5) AND pg_catalog.pg_advisory_unlock(3)" +
			" AND pg_catalog.pg_advisory_unlock(7440995589958059143) AND pg_catalog.pg_advisory_unlock(-1, 9) AND pg_catalog.pg_advisory_unlock(1, 0)"
	)
	given := []Key{Pair(1, 0), ID(3), Name("nightly-report"), Pair(-1, 9), ID(-5), ID(3), ID(7440995589958059143), Pair(1, 0)}
	before := slices.Clone(given)
	for range 2 {
		db, mock := newMock(t)
		mock.ExpectExec(try).WithoutArgs().WillReturnResult(sqlmock.NewResult(0, 5))
		mock.ExpectExec(unlock).WithoutArgs().WillReturnResult(sqlmock.NewResult(0, 1))
		wantError(t, WithLocks(t.Context(), db, given, nothing))
		if diff := cmp.Diff(before, given, cmp.Comparer(func(a, b Key) bool { return a == b })); diff != "" {
			t.Errorf("the caller's keys were changed:\n%s", diff)
		}
		slices.Reverse(given)
		slices.Reverse(before)
	}
}

// Several locks are tried together, and if they are not to be had, exactly those that were granted
// are unlocked.
func TestWithLocksContended(t *testing.T) {
	t.Parallel()
	const (
		tries   = "SELECT FROM pg_catalog.generate_series(1, CASE WHEN pg_catalog.pg_is_in_recovery() THEN 0 WHEN NOT pg_catalog.pg_try_advisory_lock(42) THEN 0 WHEN NOT pg_catalog.pg_try_advisory_lock(43) THEN 1 WHEN NOT pg_catalog.pg_try_advisory_lock(44) THEN 2 ELSE 3 END)"
		unlocks = "SELECT WHERE pg_catalog.pg_advisory_unlock(42) AND pg_catalog.pg_advisory_unlock(43) AND pg_catalog.pg_advisory_unlock(44)"
		first   = "SELECT WHERE pg_catalog.pg_advisory_unlock(42)"
		two     = "SELECT WHERE pg_catalog.pg_advisory_unlock(42) AND pg_catalog.pg_advisory_unlock(43)"
	)
	of43 := func(query string) string { return strings.ReplaceAll(query, "42", "43") }
	of44 := func(query string) string { return strings.ReplaceAll(query, "42", "44") }
	for _, test := range []struct {
		name    string
		replies []reply
		opts    []Option
		want    []string
		wants   []any
	}{
		{
			"the first is taken: there is nothing to unlock, and they are taken in order", []reply{refused}, nil,
			on(1, "open", tries, tryQuery, of43(tryQuery), of44(tryQuery), unlocks), nil,
		},
		{
			"the second is taken", []reply{{rows: 1}}, nil,
			on(1, "open", tries, first, tryQuery, of43(tryQuery), of44(tryQuery), unlocks), nil,
		},
		{
			"the third is taken", []reply{{rows: 2}}, nil,
			on(1, "open", tries, two, tryQuery, of43(tryQuery), of44(tryQuery), unlocks), nil,
		},
		{
			"waits for the first on a session that then carries all", []reply{refused, refused}, nil,
			on(1, "open", tries, tryQuery, armedWaitQuery, of43(tryQuery), of44(tryQuery), resetQuery+unlocks), nil,
		},
		{
			"waits for the second on a session of its own", []reply{{rows: 1}, done, granted, refused}, nil,
			slices.Concat(
				on(1, "open", tries, first, tryQuery, of43(tryQuery)), on(2, "open", of43(armedWaitQuery)),
				on(1, of44(tryQuery), "SELECT WHERE pg_catalog.pg_advisory_unlock(42) AND pg_catalog.pg_advisory_unlock(44)"), on(2, of43(disarmQuery)),
			), nil,
		},
		{
			"waits for the second twice", []reply{{rows: 1}, done, granted, refused, refused}, nil,
			slices.Concat(
				on(1, "open", tries, first, tryQuery, of43(tryQuery)), on(2, "open", of43(armedWaitQuery), of43(armedWaitQuery)),
				on(1, of44(tryQuery), "SELECT WHERE pg_catalog.pg_advisory_unlock(42) AND pg_catalog.pg_advisory_unlock(44)"), on(2, of43(disarmQuery)),
			), nil,
		},
		{
			"NoWait, and the first is taken", []reply{refused}, []Option{NoWait()},
			on(1, "open", tries), []any{ErrHeld},
		},
		{
			"NoWait, and the third is taken", []reply{{rows: 2}}, []Option{NoWait()},
			on(1, "open", tries, two), []any{ErrHeld},
		},
		{
			"what cannot be unlocked costs the session", []reply{{rows: 2}, fails(io.ErrUnexpectedEOF), {rows: 3}}, nil,
			slices.Concat(on(1, "open", tries, two, "close"), on(2, "open", tries, unlocks)), nil,
		},
		{
			"so does what was not held any more", []reply{{rows: 2}, refused, done, {rows: 3}}, []Option{NoWait()},
			slices.Concat(on(1, "open", tries, two, freeQuery, "close"), on(2, "open", tries, unlocks)), nil,
		},
		{
			"a deadlock", []reply{refused, granted, refused, fails(pgError("40P01"))}, nil,
			slices.Concat(
				on(1, "open", tries, tryQuery, of43(tryQuery)), on(2, "open", of43(armedWaitQuery), resetQuery+freeQuery, "close"),
				on(1, unlockQuery),
			), []any{ErrDeadlock},
		},
		{
			"one of them was not held any more", []reply{{rows: 3}, refused}, nil,
			on(1, "open", tries, unlocks, freeQuery, "close"), []any{ErrLost, "bigint 42, bigint 43, bigint 44"},
		},
	} {
		bubble(t, test.name, func(t *testing.T) {
			db, srv := newServer(t, test.replies...)
			wantError(t, WithLocks(t.Context(), db, []Key{ID(44), ID(43), key}, nothing, test.opts...), test.wants...)
			synctest.Wait()
			srv.want(t, test.want...)
			if n := db.Stats().InUse; n != 0 {
				t.Errorf("%d connections not handed back", n)
			}
		})
	}
}

func TestTimeoutOfSeveralKeysUnlocksThoseAlreadyHeld(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		db, srv := newServer(t)
		waits := taken(t)
		srv.script = func(ctx context.Context, conn int, query string) (int64, error) {
			if waitKey(query) == key {
				return 1, nil
			}
			return waits(ctx, conn, query)
		}
		err := WithLocks(t.Context(), db, []Key{ID(43), key}, nothing, Timeout(300*time.Millisecond))
		wantError(t, err, ErrHeld, "bigint 42, bigint 43: not acquired within 300ms")
		synctest.Wait()
		// Nobody waits for the unlocking of what comes too late: the holder is asked for beside it.
		lines := srv.lines()
		if last := lines[len(lines)-2:]; !slices.Contains(last, "1 "+disarmQuery) || count(last, holdersQuery) != 1 {
			t.Errorf("log: %q", lines)
		}
		wantIdle(t, db)
	})
}

// While one key is waited for, those that are held are watched: the session that has them
// says nothing otherwise.
func TestWithLocksThatWaitsForLongHasNotLostWhatItHolds(t *testing.T) {
	t.Parallel()
	for _, first := range []bool{false, true} { // has to be waited for, too: the server watches its session
		synctest.Test(t, func(t *testing.T) {
			p, dbs, _ := newTable(t, 2)
			var wg sync.WaitGroup
			hold := func(k Key, d time.Duration) {
				wg.Go(func() {
					wantError(t, WithLock(t.Context(), dbs[1], k, sleeps(d)))
				})
			}
			if first {
				hold(key, time.Second)
			}
			hold(ID(43), time.Minute)
			synctest.Wait()
			wantError(t, WithLocks(t.Context(), dbs[0], []Key{key, ID(43)}, func(ctx context.Context) error {
				for _, k := range []Key{key, ID(43)} {
					if n := p.holders(k); n != 1 {
						t.Errorf("%v: %d holders", k, n)
					}
				}
				time.Sleep(time.Second)
				return ctx.Err()
			}))
			wg.Wait()
			p.clean()
		})
	}
}

func TestNoWaitForSeveralSharedLocksOfWhichThisProcessHoldsOne(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		db, _ := newServer(t)
		wantError(t, WithLock(t.Context(), db, ID(1), func(context.Context) error {
			return WithLocks(t.Context(), db, []Key{ID(1), ID(2)}, nothing, Shared(), NoWait())
		}, Shared()))
	})
}

// A session is lost while two of its requests are not answered, and one of them is the
// first part of a release: the second part is on another session.
func TestAReleaseOnTwoSessionsOneOfWhichIsSilent(t *testing.T) {
	t.Parallel()
	for _, first := range []time.Duration{time.Hour, time.Second} { // that the one before it takes
		synctest.Test(t, func(t *testing.T) { releaseOnTwoSessions(t, first) })
	}
}

func releaseOnTwoSessions(t *testing.T, first time.Duration) {
	p, dbs, srvs := newTable(t, 2)
	held := make(chan struct{})
	free := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		wantError(t, WithLock(t.Context(), dbs[1], ID(43), func(context.Context) error {
			close(held)
			<-free
			return nil
		}))
	})
	<-held
	silent := false
	script := srvs[0].script
	srvs[0].script = func(ctx context.Context, conn int, query string) (int64, error) {
		if silent && conn == 1 {
			session.Sleep(ctx, first)
			if first = time.Hour; ctx.Err() != nil {
				return 0, ctx.Err()
			}
		}
		return script(ctx, conn, query)
	}
	time.AfterFunc(100*time.Millisecond, func() { close(free) })
	err := WithLocks(t.Context(), dbs[0], []Key{key, ID(43)}, func(context.Context) error {
		// Others are at work on the first session.
		silent = true
		for range 3 {
			wg.Go(func() { _ = WithLock(t.Context(), dbs[0], ID(44), nothing, NoWait(), Timeout(time.Minute)) })
			wg.Go(func() { _ = WithLock(t.Context(), dbs[0], ID(45), nothing, NoWait()) })
		}
		synctest.Wait()
		return nil
	}, Heartbeat(time.Hour), HolderTimeout(4*time.Hour))
	wantError(t, err, ErrLost)
	wg.Wait()
	time.Sleep(time.Minute)
	wantIdle(t, dbs[0])
	p.clean()
}
