package integration

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/pgadvisory/advisory"
)

// All session-level locks of a pool are on one session: these tests are about what its
// holders have to do with each other, and about what waits.

// keysNumbered returns n keys of the test, of both spaces.
func keysNumbered(t testing.TB, n int) (keys []advisory.Key) {
	for i := range n {
		key := advisory.Name(fmt.Sprint(t.Name(), " ", i))
		if i%2 == 1 {
			key = second(key)
		}
		keys = append(keys, key)
	}
	return keys
}

// openLimited opens a pool of at most n connections, whose application_name is
// appName(t).
func (d driver) openLimited(t testing.TB, n int) *sql.DB {
	t.Helper()
	db := d.open(t, withParams(t, server.DSN(), "application_name", appName(t)))
	db.SetMaxOpenConns(n)
	db.SetMaxIdleConns(n)
	return db
}

// heldBy returns, sorted, the advisory locks that the sessions of an application hold, and
// how many sessions it has, and how many of them hold locks.
func heldBy(t testing.TB, admin *sql.DB, application string) (held []string, sessions, holding int) {
	t.Helper()
	rows, err := admin.Query(`
		SELECT coalesce(CASE objsubid WHEN 1 THEN (classid::bigint << 32 | objid::bigint)::text
			ELSE (classid::bigint::bit(32)::int)::text || ', ' || (objid::bigint::bit(32)::int)::text END, '') ||
			CASE mode WHEN 'ShareLock' THEN ' shared' ELSE '' END,
			(SELECT count(*) FROM pg_stat_activity WHERE application_name = $1),
			count(*) OVER (PARTITION BY pid)
		FROM pg_locks WHERE locktype = 'advisory' AND granted
		AND pid IN (SELECT pid FROM pg_stat_activity WHERE application_name = $1)`, application)
	if err != nil {
		t.Fatal(err)
	}
	defer rows.Close()
	var share float64
	for rows.Next() {
		var lock string
		var n int
		if err := rows.Scan(&lock, &sessions, &n); err != nil {
			t.Fatal(err)
		}
		held = append(held, lock)
		share += 1 / float64(n)
	}
	if err := rows.Err(); err != nil {
		t.Fatal(err)
	}
	slices.Sort(held)
	return held, sessions, int(share + 0.5)
}

// wantNoStatement fails the test if a pooled connection has a statement prepared that is
// not the program's own.
func wantNoStatement(t testing.TB, db *sql.DB) {
	t.Helper()
	waitFor(t, "no connection is in use", func() (bool, error) { return db.Stats().InUse == 0, nil })
	for range db.Stats().Idle {
		conn, err := db.Conn(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close() // not before: each one once
		if n := countPrepared(t, conn, "statement LIKE '%pg_advisory_unlock%' AND name NOT LIKE 'stmtcache%'"); n > 0 {
			t.Errorf("%d statements are left on a pooled connection", n)
		}
	}
}

// countPrepared counts those of the statements prepared on conn's session for which condition is true.
func countPrepared(t testing.TB, conn *sql.Conn, condition string) (n int) {
	t.Helper()
	query := "SELECT count(*) FROM pg_prepared_statements WHERE statement NOT LIKE '%pg_prepared_statements%' AND " + condition
	if err := conn.QueryRowContext(t.Context(), query).Scan(&n); err != nil {
		t.Fatal(err)
	}
	return n
}

func TestThousandLocksOnTwoConnections(t *testing.T) {
	t.Parallel()
	const n = 1000
	eachDriver(t, func(t *testing.T, d driver) {
		db := d.openLimited(t, 2)
		ctx := soon(t)
		all := newMeeting(n)
		var g errgroup.Group
		for _, key := range keysNumbered(t, n) {
			g.Go(func() error {
				return advisory.WithLock(ctx, db, key, func(ctx context.Context) error { return all.workAround(ctx, db) })
			})
		}
		select {
		case <-all.begun:
			// Those who release by now are slower than one query: or they would not be
			// counted, which is not what is asked here.
			if _, sessions, holding := heldBy(t, adminDB(t), appName(t)); sessions > 2 || holding > 1 {
				t.Errorf("%d sessions, %d of which hold locks; want 2 at most, and 1", sessions, holding)
			}
		case <-ctx.Done():
			t.Errorf("%d hold their locks", all.inside.Load())
		}
		if err := g.Wait(); err != nil {
			t.Error(err)
		}
		wantNoneHeldBy(t, appName(t))
		wantClean(t, db)
		wantNoStatement(t, db)
	})
}

// A meeting begins when n are inside.
type meeting struct {
	n      int64
	inside atomic.Int64
	begun  chan struct{} // closed
}

func newMeeting(n int64) *meeting { return &meeting{n: n, begun: make(chan struct{})} }

// workAround does some work before the meeting begins, and some after that.
func (m *meeting) workAround(ctx context.Context, db *sql.DB) error {
	if _, err := db.ExecContext(ctx, "SELECT"); err != nil {
		return err
	}
	if m.inside.Add(1) == m.n {
		close(m.begun)
	}
	select {
	case <-m.begun:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	_, err := db.ExecContext(ctx, "SELECT")
	return err
}

// wantNoneHeldBy fails the test if the sessions of an application hold locks.
func wantNoneHeldBy(t testing.TB, application string) {
	t.Helper()
	if held, _, _ := heldBy(t, adminDB(t), application); len(held) > 0 {
		t.Errorf("%d locks are still held, as %q", len(held), held[0])
	}
}

// Waiters hold no connection while others of their process are before them, and the first
// one none of those that the work needs.
func TestHundredsOfWaitersOnAPoolOfThree(t *testing.T) {
	t.Parallel()
	const n = 500
	eachDriver(t, func(t *testing.T, d driver) {
		db := d.openLimited(t, 3)
		ctx := soon(t)
		key, c := testKey(t), newCounter(t, adminDB(t))
		release := hold(t, adminDB(t), key)
		var g errgroup.Group
		var asked sync.WaitGroup
		for range n {
			asked.Add(1)
			g.Go(func() error {
				asked.Done()
				return advisory.WithLock(ctx, db, key, func(ctx context.Context) error { return c.increment(ctx, db) })
			})
		}
		asked.Wait()
		for range 50 {
			if inUse := db.Stats().InUse; inUse > 1 {
				t.Fatalf("the waiters use %d connections, want 1 at most", inUse)
			}
			// The rest is the work's.
			if _, err := db.ExecContext(ctx, "SELECT"); err != nil {
				t.Fatal(err)
			}
			time.Sleep(time.Millisecond) // there is no condition for what must not happen
		}
		release()
		if err := g.Wait(); err != nil {
			t.Error(err)
		}
		c.wantValue(t, adminDB(t), n)
		wantClean(t, db)
	})
}

// A turnout is one who holds a lock at times.
type turnout struct {
	key    advisory.Key
	shared bool
	lock   *advisory.Lock
}

// Locks of all kinds are taken and released in the same statements.
func TestBatchesLockExactlyWhatIsAsked(t *testing.T) {
	t.Parallel()
	const (
		n      = 60 // keys
		rounds = 12
		old    = "77000"
	)
	eachDriver(t, func(t *testing.T, d driver) {
		db := d.open(t, withParams(t, server.DSN(), "application_name", appName(t), "idle_session_timeout", old))
		keys := keysNumbered(t, n+1)
		taken := keys[n]
		hold(t, adminDB(t), advisory.Name(fmt.Sprint(t.Name(), " ", n))) // n is even: a key of one number
		members := turnoutsOf(keys[:n])
		holds := func(m *turnout) bool { return m.lock != nil }
		for round := range rounds {
			var g errgroup.Group
			changeTogether(t, &g, db, members, func(m *turnout) bool { return rand.IntN(2) == 0 || round == rounds-1 && holds(m) })
			for i := range 10 {
				// Half of it may be granted, and must not stay.
				free := advisory.Name(fmt.Sprint(t.Name(), " free ", i))
				g.Go(func() error { return refusedLocks(soon(t), db, free, second(free), taken) })
			}
			if err := g.Wait(); err != nil {
				t.Fatal(err)
			}
			want := heldByMembers(t, members)
			held, _, holding := heldBy(t, adminDB(t), appName(t))
			if !slices.Equal(held, want) || holding > 1 {
				t.Fatalf("round %d: %d sessions hold\n%q\nwant one with\n%q", round, holding, held, want)
			}
		}
		var g errgroup.Group
		changeTogether(t, &g, db, members, holds)
		if err := g.Wait(); err != nil {
			t.Fatal(err)
		}
		wantNoneHeldBy(t, appName(t))
		wantNoStatement(t, db)
		wantTimeouts(t, db, old)
	})
}

// changeTogether has the chosen members change, each in a goroutine of g.
func changeTogether(t testing.TB, g *errgroup.Group, db *sql.DB, members []*turnout, chosen func(*turnout) bool) {
	for _, m := range members {
		if chosen(m) {
			g.Go(func() error { return m.change(soon(t), db) })
		}
	}
}

// turnoutsOf returns one for each key, or several, where they share it.
func turnoutsOf(keys []advisory.Key) (members []*turnout) {
	for i, key := range keys {
		members = append(members, &turnout{key: key, shared: i%4 > 1})
		if i%4 > 1 { // others share it
			members = append(members, &turnout{key: key, shared: true}, &turnout{key: key, shared: true})
		}
	}
	return members
}

// change releases the lock, or takes it if it is not held.
func (m *turnout) change(ctx context.Context, db *sql.DB) (err error) {
	if m.lock != nil {
		err = m.lock.Release()
		m.lock = nil
		return err
	}
	opts := []advisory.Option{advisory.Heartbeat(3 * time.Second), advisory.HolderTimeout(20 * time.Second)}
	if m.shared {
		opts = append(opts, advisory.Shared())
	}
	m.lock, err = advisory.Acquire(ctx, db, m.key, opts...)
	return err
}

// heldByMembers returns the locks that the members hold, as heldBy does.
func heldByMembers(t testing.TB, members []*turnout) []string {
	t.Helper()
	held := []string{}
	for _, m := range members {
		if m.lock == nil {
			continue
		}
		wantLive(t, m.lock.Context())
		name := m.key.SQL()
		if m.shared {
			name += " shared"
		}
		held = append(held, name)
	}
	slices.Sort(held)
	return slices.Compact(held)
}

// refusedLocks asks for several locks at once, one of which is taken.
func refusedLocks(ctx context.Context, db *sql.DB, keys ...advisory.Key) error {
	err := advisory.WithLocks(ctx, db, keys, func(context.Context) error { return nil }, advisory.NoWait())
	if !errors.Is(err, advisory.ErrNotAcquired) {
		return fmt.Errorf("WithLocks of a key that is taken: %w", err)
	}
	return nil
}

// wantTimeouts fails the test if a pooled connection has another idle_session_timeout, or
// another timeout.
func wantTimeouts(t testing.TB, db *sql.DB, idleSession string) {
	t.Helper()
	for _, s := range pooledSettings(t, db) {
		if s != idleSession+" 0 0" {
			t.Errorf("a pooled connection has the timeouts %q", s)
		}
	}
}

// Where many release at once, the last one's release is not alone in its statement.
func TestNoSettingIsLeftByReleasesThatGoTogether(t *testing.T) {
	t.Parallel()
	const n = 40
	bothDrivers(t, func(t *testing.T, d driver) {
		db := d.open(t, withParams(t, server.DSN(), "application_name", appName(t), "idle_session_timeout", "77000"))
		for range 3 {
			var locks []*advisory.Lock
			for _, key := range keysNumbered(t, n) {
				lock, err := advisory.Acquire(soon(t), db, key, advisory.Heartbeat(shortHeartbeat), advisory.HolderTimeout(20*time.Second))
				if err != nil {
					t.Fatal(err)
				}
				locks = append(locks, lock)
			}
			waitForHeartbeats(t, adminDB(t), appName(t), 1, serverTime(t, adminDB(t)))
			if err := concurrently(n, 1, func(i int) error { return locks[i].Release() }); err != nil {
				t.Fatal(err)
			}
			wantTimeouts(t, db, "77000")
			wantNoStatement(t, db)
		}
	})
}

func TestLossOfTheSharedSession(t *testing.T) {
	t.Parallel()
	const n, waiting = 100, 20
	eachDriver(t, func(t *testing.T, d driver) {
		db := d.open(t, withParams(t, server.DSN(), "application_name", appName(t)))
		keys := keysNumbered(t, n)
		held := make([]*advisory.Lock, n)
		if err := concurrently(n, 1, func(i int) (err error) {
			held[i], err = advisory.Acquire(soon(t), db, keys[i], advisory.Heartbeat(shortHeartbeat))
			return err
		}); err != nil {
			t.Fatal(err)
		}
		// These wait for holders of their own process, and one for another process.
		var g errgroup.Group
		for i := range waiting {
			g.Go(func() error {
				return advisory.WithLock(soon(t), db, keys[i], func(context.Context) error {
					if held[i].Context().Err() == nil {
						return errors.New("begun before the holder was told of the loss")
					}
					_, err := db.ExecContext(t.Context(), "SELECT")
					return err
				})
			})
		}
		key := testKey(t)
		release := hold(t, adminDB(t), key)
		g.Go(func() error {
			return advisory.WithLock(soon(t), db, key, func(context.Context) error { return nil })
		})
		waitForWaiters(t, adminDB(t), key, 1)

		if n := terminateHolders(t, appName(t)); n != 1 {
			t.Errorf("%d sessions held the locks, want 1", n)
		}
		awaitLosses(t, held, time.Now())
		release()
		if err := g.Wait(); err != nil {
			t.Error(err)
		}
		for _, lock := range held {
			wantLost(t, "Release", lock.Release())
		}
		wantNoneHeldBy(t, appName(t))
		wantClean(t, db)
	})
}

// A request whose caller has gone may be granted all the same.
func TestNoGrantIsLeftByThoseWhoGaveUp(t *testing.T) {
	t.Parallel()
	const goroutines, each = 24, 60
	eachDriver(t, func(t *testing.T, d driver) {
		allowLog(t, brokenOff)
		dsn := withParams(t, server.DSN(), "application_name", appName(t))
		pools := []*sql.DB{d.open(t, dsn), d.open(t, dsn)}
		pools[0].SetMaxOpenConns(4)
		for _, db := range pools {
			fill(t, db, 4) // few have the time to open one
		}
		keys := keysNumbered(t, 3)
		var s impatientStorm
		err := concurrently(goroutines, d.rounds(each), func(i int) error { return s.ask(soon(t), pools[i%2], keys) })
		if err != nil {
			t.Error(err)
		}
		t.Logf("%d granted, %d gave up", s.granted.Load(), s.gaveUp.Load())
		if s.granted.Load() == 0 || s.gaveUp.Load() == 0 {
			t.Error("no storm")
		}
		for _, key := range keys {
			wantFree(t, adminDB(t), key)
		}
		for _, db := range pools {
			wantClean(t, db)
			wantNoStatement(t, db)
		}
		other := d.open(t, server.DSN())
		for _, db := range append(pools, other) {
			for _, key := range keys {
				if err := advisory.WithLock(soon(t), db, key, func(context.Context) error { return nil }, advisory.NoWait()); err != nil {
					t.Error(err)
				}
			}
		}
	})
}

// An impatientStorm counts what becomes of requests whose callers leave before long.
type impatientStorm struct{ granted, gaveUp atomic.Int64 }

// ask asks for one of the keys, or two, as long as its patience lasts.
func (s *impatientStorm) ask(ctx context.Context, db *sql.DB, keys []advisory.Key) error {
	patience := []time.Duration{500 * time.Microsecond, 1500 * time.Microsecond, 15 * time.Millisecond, 150 * time.Millisecond}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer time.AfterFunc(rand.N(patience[rand.IntN(len(patience))]), cancel).Stop()
	var opts []advisory.Option
	if rand.IntN(2) == 0 {
		opts = append(opts, advisory.Shared())
	}
	asked := []advisory.Key{keys[rand.IntN(len(keys))], keys[rand.IntN(len(keys))]}
	if rand.IntN(3) > 0 {
		asked = asked[:1]
	}
	err := advisory.WithLocks(ctx, db, asked, func(context.Context) error { return nil }, opts...)
	switch {
	case err == nil:
		s.granted.Add(1)
	case ctx.Err() != nil && !errors.Is(err, advisory.ErrLost):
		s.gaveUp.Add(1)
	default:
		return err
	}
	return nil
}

// The locks of one session may ask for different Heartbeats and HolderTimeouts.
func TestStrictestOfTheHoldersCounts(t *testing.T) {
	t.Parallel()
	bothDrivers(t, func(t *testing.T, d driver) {
		w := newWire(t)
		db := d.open(t, w.dsn)
		keys := keysNumbered(t, 2)
		lax, err := advisory.Acquire(soon(t), db, keys[0], advisory.Heartbeat(time.Minute), advisory.HolderTimeout(time.Hour))
		if err != nil {
			t.Fatal(err)
		}
		strict, err := advisory.Acquire(soon(t), db, keys[1], advisory.Heartbeat(shortHeartbeat), advisory.HolderTimeout(20*time.Second))
		if err != nil {
			t.Fatal(err)
		}
		var sent []string
		sends := func(what string) {
			t.Helper()
			waitFor(t, fmt.Sprintf("%q is sent", what), func() (bool, error) {
				sent = append(sent, w.take()...)
				return slices.ContainsFunc(sent, func(s string) bool { return strings.Contains(s, what) }), nil
			})
		}
		sends("'idle_session_timeout', '20000'")
		if err := strict.Release(); err != nil {
			t.Error(err)
		}
		sends("'idle_session_timeout', '3600000'") // with the heartbeat that was due
		wantLive(t, lax.Context())
		w.take()
		time.Sleep(time.Second) // for what must not happen, there is no condition
		if sent := w.take(); len(sent) > 0 {
			t.Errorf("within a second of a Heartbeat of a minute: %q", sent)
		}
		if err := lax.Release(); err != nil {
			t.Error(err)
		}
		wantClean(t, db)
	})
}

// A lock that is granted as another one, which is stricter, is released is not its heir.
func TestStrictHolderLeavesNothingToTheNext(t *testing.T) {
	t.Parallel()
	bothDrivers(t, func(t *testing.T, d driver) {
		const n = 30
		dsn := watchLog(t, server.DSN())
		err := concurrently(n, 1, func(i int) error {
			db, err := d.openDB(dsn)
			if err != nil {
				return err
			}
			defer db.Close()
			keys := []advisory.Key{advisory.Name(fmt.Sprint(t.Name(), i)), advisory.Name(fmt.Sprint(t.Name(), i, "next"))}
			strict, err := advisory.Acquire(soon(t), db, keys[0], advisory.Heartbeat(250*time.Millisecond), advisory.HolderTimeout(750*time.Millisecond))
			if err != nil {
				return err
			}
			time.Sleep(300 * time.Millisecond) // its first heartbeat
			var g errgroup.Group
			g.Go(func() error {
				if err := strict.Release(); err != nil && !errors.Is(err, advisory.ErrLost) {
					return err
				}
				return nil
			})
			lax, err := advisory.Acquire(soon(t), db, keys[1], advisory.Heartbeat(4*time.Second))
			if err := errors.Join(err, g.Wait()); err != nil {
				return err
			}
			select {
			case <-lax.Context().Done():
			case <-time.After(1500 * time.Millisecond):
			}
			return lax.Release()
		})
		if err != nil {
			t.Error(err)
		}
	})
}

// Shared locks go together, however they are asked for.
func TestSharedLocksOfAProcessGoTogether(t *testing.T) {
	t.Parallel()
	eachDriver(t, func(t *testing.T, d driver) {
		db := d.open(t, server.DSN())
		key := testKey(t)
		lock, err := advisory.Acquire(t.Context(), db, key, advisory.Shared())
		if err != nil {
			t.Fatal(err)
		}
		for _, w := range ways {
			w.shared = true
			for name, opts := range someOptions {
				if err := w.with(soon(t), db, key, noWork, opts...); err != nil {
					t.Errorf("%s, %s: %v", w.name, name, err)
				}
			}
		}
		// Later, others may wait for the lock: the server has to be asked.
		time.Sleep(50 * time.Millisecond)
		for _, w := range ways {
			w.shared = true
			for name, opts := range someOptions {
				if err := w.with(soon(t), db, key, noWork, opts...); err != nil {
					t.Errorf("%s, %s: %v", w.name, name, err)
				}
			}
		}
		if err := lock.Release(); err != nil {
			t.Error(err)
		}
		wantClean(t, db)
	})
}
