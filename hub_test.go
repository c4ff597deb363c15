package advisory

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"math/rand/v2"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// wantIdle reports whatever a hub has kept although nobody uses it.
func wantIdle(t testing.TB, db *sql.DB) {
	t.Helper()
	h := hubOf(db)
	// The last one may have its answer before the session has been handed back.
	for range 1000 {
		if db.Stats().InUse == 0 {
			break
		}
		time.Sleep(time.Millisecond)
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if len(h.queues) > 0 || h.shared != nil || h.opening || h.opened != nil || h.sessions != 0 || h.polling != 0 {
		t.Errorf("the hub has kept %d queues, shared %p, opening %v, %d sessions, %d polling",
			len(h.queues), h.shared, h.opening, h.sessions, h.polling)
	}
	if n := db.Stats().InUse; n != 0 {
		t.Errorf("%d connections not handed back", n)
	}
}

// describe says what a hub is about.
func describe(db *sql.DB) string {
	h := hubOf(db)
	h.mu.Lock()
	defer h.mu.Unlock()
	stats := db.Stats()
	var b strings.Builder
	fmt.Fprintf(&b, "%d sessions, %d polling, shared %p, %d of %d connections in use\n", h.sessions, h.polling, h.shared, stats.InUse, stats.MaxOpenConnections)
	for id, q := range h.queues {
		n := 0
		for w := q.first; w != nil; w = w.next {
			n++
		}
		fmt.Fprintf(&b, "%v: on %p, %d holders, %d apart, asker %v, exclusive %v, closed %v, returning %v, %d in line\n",
			id, q.on, q.holders, q.apart, q.asker != nil, q.exclusive, q.closed, q.returning, n)
	}
	return b.String()
}

// inside is who is under which lock.
type inside struct {
	mu sync.Mutex
	by map[Key][]*insider
}

type insider struct {
	ctx    context.Context
	db     int
	shared bool
	apart  bool
}

// enter reports those who are inside and must not be.
func (in *inside) enter(t testing.TB, k Key, i *insider, lossy bool) (leave func()) {
	in.mu.Lock()
	defer in.mu.Unlock()
	if i.ctx.Err() != nil {
		return func() {} // lost before fn began
	}
	for _, o := range in.by[k] {
		if o.ctx.Err() != nil || o.shared && i.shared {
			continue
		}
		if lossy && o.db != i.db { // it may not know yet that it has lost it
			continue
		}
		t.Errorf("%v: two at a time: %+v and %+v", k, *o, *i)
	}
	in.by[k] = append(in.by[k], i)
	return func() {
		in.mu.Lock()
		defer in.mu.Unlock()
		in.by[k] = slices.DeleteFunc(in.by[k], func(o *insider) bool { return o == i })
	}
}

// Several processes, some with small pools, do at random all that can be done with a few
// locks; sessions die, and the server runs out of memory. Nobody is inside with another, and nothing
// is left.
func TestRandomSchedules(t *testing.T) {
	t.Parallel()
	for seed := range 100 {
		ok := t.Run(fmt.Sprint(seed), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) { randomSchedule(t, uint64(seed)) })
		})
		if !ok {
			return
		}
	}
}

func randomSchedule(t *testing.T, seed uint64) {
	rng := rand.New(rand.NewPCG(seed, 1))
	kills, errs, direct, apart := rng.IntN(3) == 0, rng.IntN(3) == 0, rng.IntN(2) == 0, rng.IntN(2) == 0
	processes := 1 + rng.IntN(3)
	p, dbs, srvs := newTable(t, processes)
	var mu sync.Mutex // of rng
	random := func(n int) int {
		mu.Lock()
		defer mu.Unlock()
		return rng.IntN(n)
	}
	slow := rng.IntN(3)
	p.rtt = func() time.Duration { return time.Duration(random(1+1000*slow)) * time.Microsecond }
	for i, db := range dbs {
		srvs[i].direct = direct
		db.SetMaxOpenConns([]int{0, 1, 2, 3, 5}[rng.IntN(5)])
	}
	over := make(chan struct{})
	if kills {
		go func() {
			for range 40 {
				select {
				case <-over:
					return
				case <-time.After(time.Duration(random(100)) * time.Millisecond):
				}
				i := random(processes)
				if n := srvs[i].open(); n > 0 {
					srvs[i].mu.Lock()
					no := srvs[i].opened - random(n)
					srvs[i].mu.Unlock()
					p.kill(backendID{srvs[i], no})
				}
			}
		}()
	}
	internal := pgError("53200")
	if errs {
		p.fail = func(_ int, query string) error {
			if strings.Contains(query, "_lock") && random(40) == 0 {
				return internal
			}
			return nil
		}
		p.failIn = func(op, _ int64) error {
			if op&1 != 0 && random(40) == 0 {
				return internal
			}
			return nil
		}
	}
	keys := []Key{ID(1), ID(2), Pair(-1, 2)}
	if random(2) == 0 {
		for i := range 20 {
			keys = append(keys, ID(int64(i+100)))
		}
	}
	in := inside{by: make(map[Key][]*insider)}
	var wg sync.WaitGroup
	for range 4 + random(40) {
		wg.Go(func() {
			for range 10 {
				i, choice := random(processes), random(len(closures)+1)
				if choice >= 3 && choice < len(closures) && !apart {
					choice = random(3)
				}
				// A statement that is broken off in a transaction has database/sql wait for
				// its own locks, during which virtual time stands still.
				tx := choice >= 4 && choice < len(closures)
				if tx && (kills || errs) {
					choice, tx = 3, false
				}
				db := dbs[i]
				ctx, cancel := context.WithCancel(t.Context())
				var opts []Option
				shared, bounded := random(4) == 0, true
				if shared {
					opts = append(opts, Shared())
				}
				switch random(6) {
				case 0:
					opts = append(opts, NoWait())
				case 1:
					opts = append(opts, Timeout(time.Duration(1+random(500))*time.Millisecond))
				case 2:
					if tx {
						break
					}
					time.AfterFunc(time.Duration(random(20000))*time.Microsecond, cancel)
				default:
					bounded = false
				}
				held := time.Duration(random(30)) * time.Millisecond
				switch random(30) {
				case 0:
					held = time.Duration(random(800)) * time.Millisecond
				case 1, 2, 3, 4, 5, 6, 7, 8, 9, 10:
					held = 0
				}
				ran := false
				under := func(keys ...Key) func(context.Context) error {
					return func(ctx context.Context) error {
						ran = true
						for _, k := range keys {
							who := &insider{ctx: ctx, db: i, shared: shared, apart: choice >= 3 && choice < len(closures)}
							defer in.enter(t, k, who, kills || errs)()
						}
						sleep(ctx, held)
						return nil
					}
				}
				k := keys[random(len(keys))]
				var err error
				if choice == len(closures) {
					l := keys[random(len(keys))]
					err = WithLocks(ctx, db, []Key{k, l}, under(slices.Compact([]Key{k, l})...), opts...)
				} else {
					err = closures[choice].run(ctx, db, k, under(k), opts...)
				}
				cancel()
				switch {
				case err == nil:
					if !ran {
						t.Error("no error, and fn has not run")
					}
				case errors.Is(err, ErrNotAcquired) && bounded && !ran:
				case ran && bounded && errors.Is(err, context.Canceled): // a transaction's
				case kills && (errors.Is(err, ErrLost) || sessionGone(err) || errors.Is(err, errLostInTurn)):
				case errs && (errors.Is(err, internal) || errors.Is(err, ErrLost)):
				default:
					t.Errorf("choice %d: %v", choice, err)
				}
				time.Sleep(time.Duration(random(2000)) * time.Microsecond)
			}
		})
	}
	// A schedule that comes to nothing would go on for ever, in virtual time.
	stuck := time.AfterFunc(10*time.Minute, func() {
		state := ""
		for i, db := range dbs {
			lines := srvs[i].lines()
			state += describe(db) + strings.Join(lines[max(0, len(lines)-20):], "\n") + "\n"
		}
		panic("stuck: " + t.Name() + "\n" + state)
	})
	wg.Wait()
	stuck.Stop()
	close(over)
	time.Sleep(time.Minute)
	synctest.Wait()
	p.clean()
	for _, db := range dbs {
		wantIdle(t, db)
	}
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
					wantError(t, WithLock(t.Context(), dbs[1], k, func(context.Context) error {
						time.Sleep(d)
						return nil
					}))
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

// take acquires key k, and fails the test if it cannot.
func take(t *testing.T, db *sql.DB, k Key, opts ...Option) *Lock {
	t.Helper()
	l, err := Acquire(t.Context(), db, k, opts...)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// All that a process holds is on one connection, which it gives back with the last lock.
func TestOneSessionCarriesManyLocks(t *testing.T) {
	t.Parallel()
	p, dbs, srvs := newTable(t, 1)
	db := dbs[0]
	db.SetMaxOpenConns(2)
	var locks []*Lock
	for _, k := range append(ids(1000), Pair(1, 2), Name("a")) {
		locks = append(locks, take(t, db, k))
	}
	shared := take(t, db, key, Shared())
	if n := db.Stats().InUse; n != 1 {
		t.Errorf("%d connections in use", n)
	}
	// And there is another for the work.
	if _, err := db.ExecContext(t.Context(), "SELECT"); err != nil {
		t.Error(err)
	}
	for _, l := range locks {
		wantError(t, l.Release())
	}
	if n := db.Stats().InUse; n != 1 {
		t.Errorf("%d connections in use", n)
	}
	wantError(t, shared.Release())
	wantIdle(t, db)
	p.clean()
	if srvs[0].opened != 2 {
		t.Errorf("%d connections", srvs[0].opened)
	}
}

// The strictest Heartbeat and HolderTimeout of those on a session count, for as long as they are.
func TestTheStrictestHeartbeatAndHolderTimeoutCount(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		p, dbs, srvs := newTable(t, 1)
		start := time.Now()
		var at []string
		p.fail = func(_ int, query string) error {
			if beatOf.MatchString(query) {
				beat := fmt.Sprint(time.Since(start))
				if m := silenceOf.FindStringSubmatch(query); m != nil {
					beat += " sets " + m[1]
				}
				at = append(at, beat)
			}
			return nil
		}
		lenient := take(t, dbs[0], key, Heartbeat(2*time.Second), HolderTimeout(20*time.Second))
		time.Sleep(2100 * time.Millisecond)
		strict := take(t, dbs[0], ID(43), Heartbeat(200*time.Millisecond), HolderTimeout(time.Second))
		time.Sleep(500 * time.Millisecond)
		wantError(t, strict.Release())
		time.Sleep(5 * time.Second)
		other := take(t, dbs[0], ID(44), Heartbeat(3*time.Second), HolderTimeout(30*time.Second))
		wantError(t, lenient.Release())
		time.Sleep(5 * time.Second)
		wantError(t, other.Release())
		const arm = " sets "
		want := []string{
			"2s" + arm + "20000", "2.3s" + arm + "1000", "2.5s",
			// One that is not so strict any more takes effect with the next heartbeat.
			"2.7s" + arm + "20000", "4.7s", "6.7s", "8.7s" + arm + "30000", "11.7s",
		}
		if !slices.Equal(at, want) {
			t.Errorf("heartbeats: %q, want %q", at, want)
		}
		if lines := srvs[0].lines(); lines[len(lines)-1] != "1 "+resetQuery+"SELECT WHERE pg_catalog.pg_advisory_unlock(44)" {
			t.Errorf("last: %s", lines[len(lines)-1])
		}
		wantIdle(t, dbs[0])
		p.clean()
	})
}

// A lost session ends every hold on it before anybody else can have the lock; who waits goes
// on over a new session.
func TestALostSessionEndsAllItsHolds(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		p, dbs, srvs := newTable(t, 1)
		db := dbs[0]
		var locks []*Lock
		for _, k := range ids(5) {
			locks = append(locks, take(t, db, k))
		}
		locks = append(locks, take(t, db, key, Shared()), take(t, db, key, Shared()))
		var wg sync.WaitGroup
		for i, k := range append(ids(5), key) {
			wg.Go(func() {
				wantError(t, WithLock(t.Context(), db, k, func(ctx context.Context) error {
					if locks[i].Context().Err() == nil || p.holders(k) != 1 {
						t.Errorf("%v: %d holders, and the one before goes on", k, p.holders(k))
					}
					return ctx.Err()
				}))
			})
		}
		synctest.Wait()
		p.kill(backendID{srvs[0], 1})
		// It is noticed by whoever asks something first.
		wantError(t, WithLock(t.Context(), db, ID(1), nothing))
		wg.Wait()
		for _, l := range locks {
			wantError(t, context.Cause(l.Context()), ErrLost, "lock lost")
			wantError(t, l.Release(), ErrLost)
		}
		if srvs[0].opened != 2 || srvs[0].open() != 1 {
			t.Errorf("%d connections of %d open", srvs[0].open(), srvs[0].opened)
		}
		wantIdle(t, db)
		p.clean()
	})
}

// A caller that goes away leaves nothing behind, wherever its request is: in the line for the
// session, under way alone or among others, or answered too late.
func TestACallerThatGoesAwayLeavesNoLock(t *testing.T) {
	t.Parallel()
	for _, others := range []int{0, 2, 30} {
		for after := time.Duration(0); after <= 20*time.Millisecond; after += time.Millisecond / 2 {
			synctest.Test(t, func(t *testing.T) {
				p, dbs, srvs := newTable(t, 1)
				p.takes(3 * time.Millisecond)
				db := dbs[0]
				var wg sync.WaitGroup
				for i, k := range ids(others) {
					wg.Go(func() {
						time.Sleep(time.Duration(i%3) * time.Millisecond)
						wantError(t, WithLock(t.Context(), db, k, func(ctx context.Context) error {
							time.Sleep(5 * time.Millisecond)
							return ctx.Err()
						}))
					})
				}
				ctx, cancel := context.WithTimeout(t.Context(), after)
				defer cancel()
				var ran bool
				wg.Go(func() {
					err := WithLock(ctx, db, key, func(context.Context) error { ran = true; return nil })
					if !ran {
						wantError(t, err, ErrNotAcquired, context.DeadlineExceeded)
					} else {
						wantError(t, err)
					}
					if d := time.Duration(0); !ran && p.holders(key) > 0 && d > 0 {
						t.Error("held")
					}
				})
				// The next in line gets it when it is certain that the first has not.
				wg.Go(func() {
					time.Sleep(time.Millisecond)
					wantError(t, WithLock(t.Context(), db, key, func(ctx context.Context) error {
						if p.holders(key) != 1 {
							t.Errorf("%d holders", p.holders(key))
						}
						return ctx.Err()
					}))
				})
				wg.Wait()
				time.Sleep(time.Minute)
				wantIdle(t, db)
				p.clean()
				if srvs[0].opened > 1 {
					t.Errorf("%d connections", srvs[0].opened)
				}
			})
		}
	}
}

// Within 20 ms of the grant a lock is handed on without the server, which is asked by the
// release whether it was held; then it goes back to the server's queue.
func TestALockIsHandedOnForAMoment(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		p, dbs, srvs := newTable(t, 1)
		var order []int
		var wg sync.WaitGroup
		l := take(t, dbs[0], key)
		for i := range 6 {
			wg.Go(func() {
				wantError(t, WithLock(t.Context(), dbs[0], key, func(context.Context) error {
					order = append(order, i)
					time.Sleep(6 * time.Millisecond)
					return nil
				}))
			})
			synctest.Wait()
		}
		wantError(t, l.Release())
		wg.Wait()
		if !slices.Equal(order, []int{0, 1, 2, 3, 4, 5}) {
			t.Errorf("order: %v", order)
		}
		// Each release asks, but for those that unlock.
		const asks = "SELECT"
		srvs[0].want(t, on(1, "open", tryQuery, asks, asks, asks, asks, unlockQuery, tryQuery, asks, unlockQuery)...)
		wantIdle(t, dbs[0])
		p.clean()
	})
}

// The release of a lock that was handed on is not nil if the session was gone by then.
func TestAHandedOnLockThatIsLostIsNoSuccess(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		p, dbs, srvs := newTable(t, 1)
		l := take(t, dbs[0], key)
		var wg sync.WaitGroup
		wg.Go(func() {
			// It may be handed on before the loss is known, but not be held in the end.
			err := WithLock(t.Context(), dbs[0], key, func(ctx context.Context) error { sleep(ctx, time.Second); return nil })
			if err != nil {
				wantError(t, err, ErrLost)
			}
		})
		synctest.Wait()
		p.kill(backendID{srvs[0], 1})
		wantError(t, l.Release(), ErrLost)
		wg.Wait()
		wantIdle(t, dbs[0])
		p.clean()
	})
}

// Other processes get their turn: two of them share a lock that both always want.
func TestProcessesShareALockThatBothAlwaysWant(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		p, dbs, _ := newTable(t, 2)
		p.takes(time.Millisecond)
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		defer cancel()
		var turns [2]int
		var wg sync.WaitGroup
		for i, db := range dbs {
			for range 8 {
				wg.Go(func() {
					for ctx.Err() == nil {
						_ = WithLock(ctx, db, key, func(context.Context) error {
							turns[i]++
							time.Sleep(time.Millisecond)
							return nil
						})
					}
				})
			}
		}
		wg.Wait()
		if min(turns[0], turns[1])*2 < max(turns[0], turns[1]) || turns[0]+turns[1] < 1000 {
			t.Errorf("turns: %v", turns)
		}
		time.Sleep(time.Minute)
		p.clean()
	})
}

// Shared holders of a process have one lock of the server, and look whether others wait for it
// once it is old.
func TestSharedHoldersShareTheServersLock(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		p, dbs, srvs := newTable(t, 2)
		db := dbs[0]
		tryShared, unlockShared := "SELECT WHERE CASE WHEN pg_catalog.pg_is_in_recovery() THEN false ELSE pg_catalog.pg_try_advisory_lock_shared(42) END", "SELECT WHERE pg_catalog.pg_advisory_unlock_shared(42)"
		look := lookStatement(key)
		first, second := take(t, db, key, Shared()), take(t, db, key, Shared())
		if n := p.holders(key); n != 1 {
			t.Errorf("%d locks of the server", n)
		}
		time.Sleep(handOffFor)
		third := take(t, db, key, Shared(), NoWait())
		fourth := take(t, db, key, Shared()) // for another moment without a look
		srvs[0].want(t, on(1, "open", tryShared, look)...)

		var wg sync.WaitGroup
		wg.Go(func() { wantError(t, WithLock(t.Context(), dbs[1], key, nothing)) })
		time.Sleep(handOffFor)
		if p.waiters(key) != 1 {
			t.Errorf("%d wait", p.waiters(key))
		}
		_, err := Acquire(t.Context(), db, key, Shared(), NoWait())
		wantError(t, err, ErrNotAcquired)
		// One who may wait does so behind the other process.
		wg.Go(func() {
			wantError(t, WithLock(t.Context(), db, key, func(context.Context) error {
				if p.waiters(key) != 0 {
					t.Error("before the other process")
				}
				return nil
			}, Shared()))
		})
		synctest.Wait()
		for _, l := range []*Lock{first, second, third, fourth} {
			wantError(t, l.Release())
		}
		wg.Wait()
		synctest.Wait()
		if lines := srvs[0].lines(); count(lines, unlockShared) != 1+count(lines, "RESET")-0 && count(lines, unlockShared) != 2 {
			t.Errorf("log: %q", lines)
		}
		wantIdle(t, db)
		p.clean()
	})
}

// The look fails with the server's error, or finds the session lost.
func TestALookThatFails(t *testing.T) {
	t.Parallel()
	for _, failure := range []error{pgError("53200"), errSessionEnded} {
		synctest.Test(t, func(t *testing.T) {
			p, dbs, _ := newTable(t, 1)
			p.fail = func(_ int, query string) error {
				if query == lookStatement(key) {
					return failure
				}
				return nil
			}
			l := take(t, dbs[0], key, Shared())
			time.Sleep(2 * handOffFor)
			err := WithLock(t.Context(), dbs[0], key, nothing, Shared())
			if sqlState(failure) != "" {
				wantError(t, err, failure)
				wantError(t, l.Release())
			} else {
				wantError(t, err) // on a new session
				wantError(t, l.Release(), ErrLost)
			}
			wantIdle(t, dbs[0])
			p.clean()
		})
	}
}

func TestNoWaitAgainstALockOfTheProcessSendsNothing(t *testing.T) {
	t.Parallel()
	db, srv := newServer(t)
	l := take(t, db, key)
	sent := srv.lines()
	for _, c := range closures {
		wantError(t, c.run(t.Context(), db, key, nothing, NoWait()), ErrNotAcquired, "another holds the lock")
		wantError(t, c.run(t.Context(), db, key, nothing, NoWait(), Shared()), ErrNotAcquired)
	}
	wantError(t, WithLocks(t.Context(), db, []Key{key, ID(43)}, nothing, NoWait()), ErrNotAcquired)
	if diff := srv.lines(); !slices.Equal(diff, sent) && count(diff[len(sent):], "42") > 0 {
		t.Errorf("sent: %q", diff[len(sent):])
	}
	wantError(t, l.Release())
}

// A Timeout in the process's own queue is kept, and its error says who holds the lock.
func TestATimeoutInTheLocalQueue(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		p, dbs, srvs := newTable(t, 1)
		l := take(t, dbs[0], key)
		for _, c := range closures {
			start := time.Now()
			wantError(t, c.run(t.Context(), dbs[0], key, nothing, Timeout(time.Second)), ErrNotAcquired, "not acquired within 1s", "held by this process")
			if d := time.Since(start); d != time.Second {
				t.Errorf("%s: after %v", c.name, d)
			}
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			wantError(t, c.run(ctx, dbs[0], key, nothing), ErrNotAcquired, context.DeadlineExceeded)
			cancel()
		}
		if srvs[0].opened != 1 { // nobody else is asked who holds it
			t.Errorf("%d connections", srvs[0].opened)
		}
		wantError(t, l.Release())
		wantError(t, WithConnLock(t.Context(), dbs[0], key, func(context.Context, *sql.Conn) error {
			wantError(t, WithLock(t.Context(), dbs[0], key, nothing, Timeout(time.Second)), ErrNotAcquired)
			return nil
		}))
		wantIdle(t, dbs[0])
		p.clean()
	})
}

// Those that take the lock on a session of their own wait for others of the process without
// a connection.
func TestWaitersForOwnSessionsHoldNoConnection(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		p, dbs, srvs := newTable(t, 1)
		db := dbs[0]
		db.SetMaxOpenConns(2)
		var wg sync.WaitGroup
		running := 0
		for range 30 {
			for _, c := range closures {
				wg.Go(func() {
					wantError(t, c.run(t.Context(), db, key, func(context.Context) error {
						if running++; running > 1 {
							t.Error("two at a time")
						}
						time.Sleep(time.Millisecond)
						// The work has a connection.
						_, err := db.ExecContext(t.Context(), "SELECT")
						running--
						return err
					}))
				})
			}
		}
		wg.Wait()
		if srvs[0].opened > 2 {
			t.Errorf("%d connections", srvs[0].opened)
		}
		wantIdle(t, db)
		p.clean()
	})
}

// Waits for other processes take no more than half of a limited pool, and a few of one without
// a limit; the other requests are tried again and again, with pauses that grow.
func TestWaitsTakeHalfOfThePool(t *testing.T) {
	t.Parallel()
	for _, test := range []struct{ limit, most int }{{1, 1}, {2, 1}, {3, 1}, {6, 3}, {0, 1 + maxWaits}} {
		synctest.Test(t, func(t *testing.T) {
			p, dbs, srvs := newTable(t, 2)
			p.takes(100 * time.Microsecond)
			dbs[0].SetMaxOpenConns(test.limit)
			keys := ids(40)
			var others []*Lock
			for _, k := range keys {
				others = append(others, take(t, dbs[1], k))
			}
			var wg sync.WaitGroup
			for _, k := range keys {
				wg.Go(func() {
					wantError(t, WithLock(t.Context(), dbs[0], k, func(ctx context.Context) error {
						if p.holders(k) != 1 {
							t.Errorf("%v: %d holders", k, p.holders(k))
						}
						return ctx.Err()
					}))
				})
			}
			for range 100 {
				time.Sleep(100 * time.Millisecond)
				n := dbs[0].Stats().InUse
				if n > test.most { // those that try again open the shared session for a moment
					time.Sleep(20 * millisecond)
					n = dbs[0].Stats().InUse
				}
				if n > test.most {
					t.Fatalf("%d connections of %d are in use", n, test.limit)
				}
			}
			before := len(srvs[0].lines())
			time.Sleep(10 * time.Second)
			if n := len(srvs[0].lines()) - before; n > 10*4*len(keys)+200 { // four times a second
				t.Errorf("limit %d: %d statements in 10 s", test.limit, n)
			}
			wantError(t, WithLock(t.Context(), dbs[0], keys[39], nothing, Timeout(time.Second)), ErrNotAcquired, "within 1s")
			for _, l := range others {
				wantError(t, l.Release())
			}
			start := time.Now()
			wg.Wait()
			if d := time.Since(start); d > 2*time.Second {
				t.Errorf("limit %d: after %v", test.limit, d)
			}
			time.Sleep(time.Second)
			wantIdle(t, dbs[0])
			p.clean()
		})
	}
}

// That the pool is busy is no reason to give up: not for who opens the shared session, nor for
// those who wait for it to be open.
func TestThePoolIsBusyForLong(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		p, dbs, _ := newTable(t, 2)
		db := dbs[0]
		db.SetMaxOpenConns(1)
		there := take(t, dbs[1], key)
		wantError(t, db.Ping()) // one lies ready
		var wg sync.WaitGroup
		wg.Go(func() { wantError(t, WithLock(context.Background(), db, key, nothing)) })
		time.Sleep(time.Second)
		conn, err := db.Conn(t.Context())
		wantError(t, err)
		time.Sleep(time.Second)
		wg.Go(func() {
			ctx, cancel := context.WithTimeout(t.Context(), time.Hour)
			defer cancel()
			wantError(t, WithLock(ctx, db, ID(43), nothing))
		})
		wantError(t, there.Release())
		time.Sleep(45 * time.Second)
		wantError(t, conn.Close())
		wg.Wait()
		wantIdle(t, db)
		p.clean()
	})
}

// A driver's panic while a session is opened is not the next one's trouble.
func TestADriversPanicWhileASessionIsOpened(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		db, srv := newServer(t)
		for range 2 { // on a new connection, and on one that lies ready
			wantError(t, WithLock(context.Background(), db, key, nothing))
		}
		panics := true
		srv.reset = func(context.Context, int) error {
			if panics {
				panics = false
				panic("driver")
			}
			return nil
		}
		func() {
			defer func() {
				if recover() != "driver" {
					t.Error("no panic")
				}
			}()
			_ = WithLock(context.Background(), db, key, nothing)
		}()
		for range 3 {
			time.Sleep(time.Minute)
			wantError(t, WithLock(context.Background(), db, key, nothing))
		}
	})
}

// A driver's panic while a session is cleaned, behind its last use, is not the pool's trouble.
func TestADriversPanicWhileASessionIsCleaned(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		db, srv := newServer(t)
		srv.direct = true
		srv.script = func(_ context.Context, _ int, query string) (int64, error) {
			if query == resetQuery {
				panic("driver")
			}
			return 1, nil
		}
		a := newAcquisition(t, db)
		c, _, err := a.session()
		wantError(t, err)
		c.armed, c.settings.silence = true, time.Second
		func() {
			defer func() {
				if recover() != "driver" {
					t.Error("no panic")
				}
			}()
			a.hub.leave(c)
		}()
		synctest.Wait()
		wantIdle(t, db)
		srv.want(t, on(1, "open", resetQuery, "close")...)
	})
}

// newAcquisition returns the way of a WithLock of key.
func newAcquisition(t *testing.T, db *sql.DB) *acquisition {
	cfg, err := newConfig("WithLock", sessionOptions, nil)
	wantError(t, err)
	return &acquisition{attempts: newAttempts(t.Context(), db, []Key{key}, &cfg), hub: hubOf(db), hold: &hold{cfg: cfg}}
}

// Dead connections in the pool, as many as there may be, are no reason to fail: neither for who
// opens the shared session nor for those who share it.
func TestDeadConnectionsInThePool(t *testing.T) {
	t.Parallel()
	for _, dead := range []int{1, 3, 4, 12} {
		synctest.Test(t, func(t *testing.T) {
			p, dbs, srvs := newTable(t, 1)
			db := dbs[0]
			db.SetMaxIdleConns(dead)
			var conns []*sql.Conn
			for range dead {
				conn, err := db.Conn(t.Context())
				wantError(t, err)
				conns = append(conns, conn)
			}
			for i, conn := range conns {
				wantError(t, conn.Close())
				p.kill(backendID{srvs[0], i + 1})
			}
			answer := srvs[0].script
			srvs[0].script = func(ctx context.Context, conn int, query string) (int64, error) {
				sleep(ctx, millisecond) // also to find out that it is dead
				return answer(ctx, conn, query)
			}
			var wg sync.WaitGroup
			for _, k := range ids(20) {
				wg.Go(func() { wantError(t, WithLock(t.Context(), db, k, nothing)) })
			}
			wg.Wait()
			time.Sleep(time.Second)
			wantIdle(t, db)
			p.clean()
		})
	}
}

// A connection that is not made in time is an error, also if it would be the pool's last.
func TestAConnectionIsNotMadeInTime(t *testing.T) {
	t.Parallel()
	for _, honours := range []bool{true, false} {
		synctest.Test(t, func(t *testing.T) {
			db, srv := newServer(t)
			db.SetMaxOpenConns(1)
			srv.dial = func(ctx context.Context) error {
				if !honours {
					ctx = context.WithoutCancel(ctx)
				}
				sleep(ctx, time.Hour)
				return errors.New("connection timed out")
			}
			start := time.Now()
			wantError(t, WithLock(context.Background(), db, key, nothing), "no answer from the server within 30s")
			if d := time.Since(start); d > dialBound+time.Second {
				t.Errorf("after %v", d)
			}
			time.Sleep(2 * time.Hour)
		})
	}
}

// Who has opened the shared session does not fail because another's request was its end.
func TestTheOpenersSessionIsLostToAnother(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		db, srv := newServer(t)
		srv.direct = true
		srv.script = func(ctx context.Context, conn int, query string) (int64, error) {
			if conn == 1 && strings.Contains(query, "(43)") {
				sleep(ctx, 5*time.Second)
				if ctx.Err() != nil {
					return 0, errSessionEnded
				}
			}
			return 1, nil
		}
		a := newAcquisition(t, db)
		c, own, err := a.session()
		wantError(t, err)
		// Before it has asked, another does, and goes away.
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		var wg sync.WaitGroup
		wg.Go(func() { wantError(t, WithLock(ctx, db, ID(43), nothing), ErrNotAcquired, context.DeadlineExceeded) })
		time.Sleep(100 * millisecond)
		r := &request{op: opTry, keys: a.keys, every: a.cfg.heartbeat}
		err = c.ask(a.ctx, r, answerWithin(0, a.deadline))
		wantError(t, err, "no answer from the server")
		a.hub.leave(c)
		wantError(t, a.again(err, true, own))
		wg.Wait()
	})
}

// A ctx that ends before the statement has gone out, because it is long, say, ends the wait for
// the answer all the same; and the next one's has its own time.
func TestACtxEndsBeforeTheStatementGoesOut(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		db, srv := newServer(t)
		srv.direct = true
		srv.script = func(ctx context.Context, _ int, query string) (int64, error) {
			switch {
			case strings.Contains(query, "try_advisory_lock(42)"):
				<-ctx.Done()
				return 0, errSessionEnded
			case strings.Contains(query, "try_advisory_lock(43)"):
				sleep(ctx, time.Second)
			}
			return 1, ctx.Err()
		}
		a := newAcquisition(t, db)
		c, _, err := a.session()
		wantError(t, err)
		wantError(t, c.take(t.Context(), 0))
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		start := time.Now()
		time.AfterFunc(2*time.Second, c.give)
		wantError(t, WithLock(ctx, db, key, nothing), ErrNotAcquired, context.DeadlineExceeded)
		if d := time.Since(start); d > 3*time.Second {
			t.Errorf("after %v", d)
		}
		a.hub.leave(c)
		wantError(t, WithLock(t.Context(), db, ID(43), nothing))

		// It ends, and the answer comes in time.
		c, _, err = a.session()
		wantError(t, err)
		wantError(t, c.take(t.Context(), 0))
		ctx, cancel = context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		time.AfterFunc(2*time.Second, c.give)
		wantError(t, WithLock(ctx, db, ID(44), nothing), ErrNotAcquired, context.DeadlineExceeded)
		opened := srv.opened
		wantError(t, WithLock(t.Context(), db, ID(43), nothing))
		a.hub.leave(c)
		if srv.opened != opened {
			t.Error("the session was lost")
		}
		wantIdle(t, db)
	})
}

// A look ends with its ctx and its Timeout, whatever the holders' Heartbeat is.
func TestALookThatIsNotAnswered(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		db, srv := newServer(t)
		srv.direct = true
		srv.script = func(ctx context.Context, _ int, query string) (int64, error) {
			if strings.Contains(query, "NOT granted") {
				<-ctx.Done()
				return 0, errSessionEnded
			}
			return 1, nil
		}
		l := take(t, db, key, Shared(), Heartbeat(time.Hour), HolderTimeout(4*time.Hour))
		time.Sleep(time.Second)
		start := time.Now()
		wantError(t, WithLock(t.Context(), db, key, nothing, Shared(), Timeout(100*millisecond)), ErrNotAcquired, "within 100ms")
		ctx, cancel := context.WithTimeout(t.Context(), 100*millisecond)
		defer cancel()
		wantError(t, WithLock(ctx, db, key, nothing, Shared()), ErrNotAcquired, context.DeadlineExceeded)
		if d := time.Since(start); d > 3*time.Second {
			t.Errorf("after %v", d)
		}
		wantError(t, l.Release(), ErrLost) // the session never answered again
	})
}

// One who waits after a look is told that the pool has been closed.
func TestThePoolIsClosedAfterALook(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		_, dbs, _ := newTable(t, 2)
		l := take(t, dbs[0], key, Shared())
		var wg sync.WaitGroup
		wg.Go(func() { wantError(t, WithLock(t.Context(), dbs[1], key, nothing)) })
		time.Sleep(50 * millisecond)
		looked := make(chan error)
		go func() { looked <- WithLock(t.Context(), dbs[0], key, nothing, Shared()) }()
		time.Sleep(100 * millisecond)
		wantError(t, dbs[0].Close())
		select {
		case err := <-looked:
			wantError(t, err, "database is closed")
		case <-time.After(time.Second):
			t.Error("it still waits")
		}
		wantError(t, l.Release())
		wg.Wait()
	})
}

// One that polls keeps its Timeout and its ctx.
func TestAPollEndsInTime(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		p, dbs, _ := newTable(t, 2)
		dbs[0].SetMaxOpenConns(1)
		l := take(t, dbs[1], key)
		start := time.Now()
		wantError(t, WithLock(t.Context(), dbs[0], key, nothing, Timeout(time.Second)), ErrNotAcquired, "not acquired within 1s")
		if d := time.Since(start); d != time.Second {
			t.Errorf("after %v", d)
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		wantError(t, WithLock(ctx, dbs[0], key, nothing), ErrNotAcquired, context.DeadlineExceeded)
		if d := time.Since(start); d != 2*time.Second {
			t.Errorf("after %v", d)
		}
		wantError(t, l.Release())
		wantIdle(t, dbs[0])
		p.clean()
	})
}

// All of the pool is in use: those who wait for the session wait together, and the end of one's
// ctx or Timeout is not the others'.
func TestThePoolIsExhausted(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		_, dbs, srvs := newTable(t, 1)
		db := dbs[0]
		db.SetMaxOpenConns(1)
		conn, err := db.Conn(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		var wg sync.WaitGroup
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		wg.Go(func() {
			wantError(t, WithLock(ctx, db, key, nothing), ErrNotAcquired, context.DeadlineExceeded, "all 1 connection of the pool are in use")
		})
		synctest.Wait()
		wg.Go(func() {
			wantError(t, WithLock(t.Context(), db, ID(44), nothing, Timeout(2*time.Second)), ErrNotAcquired, "within 2s", "of the pool are in use")
		})
		for _, k := range ids(5) {
			wg.Go(func() { wantError(t, WithLock(t.Context(), db, k, nothing)) })
		}
		time.Sleep(3 * time.Second)
		if err := conn.Close(); err != nil {
			t.Error(err)
		}
		wg.Wait()
		time.Sleep(time.Second)
		if srvs[0].opened != 1 {
			t.Errorf("%d connections", srvs[0].opened)
		}
		wantIdle(t, db)
	})
}

// A server that is down is an error at once for all who wait for the one who asks.
func TestOneOpensTheSessionForAll(t *testing.T) {
	t.Parallel()
	for _, fails := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			_, dbs, srvs := newTable(t, 1)
			down := errors.New("connection refused")
			dials := 0
			srvs[0].dial = func(context.Context) error {
				dials++
				time.Sleep(time.Second)
				if fails {
					return down
				}
				return nil
			}
			var wants []any
			if fails {
				wants = []any{down}
			}
			var wg sync.WaitGroup
			for _, k := range ids(20) {
				wg.Go(func() { wantError(t, WithLock(t.Context(), dbs[0], k, nothing), wants...) })
			}
			wg.Wait()
			if dials != 1 {
				t.Errorf("%d connections were asked for", dials)
			}
			time.Sleep(time.Second)
			wantIdle(t, dbs[0])
		})
	}
}

// db.Close is under way while locks are held: they stay, and no new one is taken.
func TestAPoolThatIsClosedUnderneath(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		p, dbs, srvs := newTable(t, 1)
		l := take(t, dbs[0], key)
		if err := dbs[0].Close(); err != nil {
			t.Error(err)
		}
		wantError(t, WithLock(t.Context(), dbs[0], ID(43), nothing), "database is closed")
		time.Sleep(10 * time.Second)
		if err := l.Context().Err(); err != nil {
			t.Error(err)
		}
		wantError(t, l.Release())
		synctest.Wait()
		if srvs[0].open() != 0 {
			t.Error("the connection is still open")
		}
		wantIdle(t, dbs[0])
		p.clean()
	})
}

// A hub goes with its *sql.DB.
func TestTheHubOfAGarbageDBIsForgotten(t *testing.T) {
	known := func(h *hub) bool {
		hubs.mu.Lock()
		defer hubs.mu.Unlock()
		for _, o := range hubs.of {
			if o == h {
				return true
			}
		}
		return false
	}
	h := func() *hub {
		db := sql.OpenDB(&server{})
		wantError(t, WithLock(t.Context(), db, key, nothing))
		if err := db.Close(); err != nil {
			t.Error(err)
		}
		return hubOf(db)
	}()
	for range 2000 {
		if runtime.GC(); !known(h) {
			return
		}
		time.Sleep(5 * time.Millisecond)
	}
	t.Error("it is still known")
}

// A driver's panic in a caller that recovers, as net/http does, takes nothing with it: the
// session is closed, and the next caller has the lock.
func TestADriversPanicLeavesNothingBehind(t *testing.T) {
	t.Parallel()
	second := ID(43)
	holdOnTwo := func(t *testing.T, _ *lockTable, here, there *sql.DB) {
		holdFor(t, here, ID(41), 2*time.Second) // so that the shared session is another than that which waits
		holdFor(t, there, key, time.Second)
	}
	for _, test := range []struct {
		name  string
		on    string // the statement that panics
		setUp func(t *testing.T, p *lockTable, db, other *sql.DB)
		call  func(t *testing.T, db *sql.DB) error
	}{
		{name: "try", on: "pg_try_advisory_lock("},
		{name: "unlock", on: "pg_advisory_unlock("},
		{
			name: "several keys", on: "pg_try_advisory_lock(",
			call: func(t *testing.T, db *sql.DB) error {
				return WithLocks(t.Context(), db, []Key{key, second}, nothing)
			},
		},
		{
			name: "the second of several keys", on: "SELECT WHERE CASE WHEN pg_catalog.pg_is_in_recovery() THEN false ELSE pg_catalog.pg_try_advisory_lock(43) END",
			setUp: holdOnTwo,
			call: func(t *testing.T, db *sql.DB) error {
				return WithLocks(t.Context(), db, []Key{key, second}, nothing)
			},
		},
		{
			name: "one of two sessions' unlocks", on: "WHERE pg_catalog.pg_advisory_unlock(42)",
			setUp: holdOnTwo,
			call: func(t *testing.T, db *sql.DB) error {
				return WithLocks(t.Context(), db, []Key{key, second}, nothing)
			},
		},
		{
			name: "the second of two releases", on: "pg_advisory_unlock(",
			call: func(t *testing.T, db *sql.DB) error {
				l, err := Acquire(t.Context(), db, key)
				wantError(t, err)
				defer func() { wantError(t, l.Release(), ErrLost, errPanicked) }()
				return l.Release()
			},
		},
		{
			name: "wait", on: "set_config('lock_timeout'",
			setUp: func(t *testing.T, _ *lockTable, _, there *sql.DB) { holdFor(t, there, key, time.Second) },
		},
		{
			name: "look", on: "NOT granted",
			setUp: func(t *testing.T, _ *lockTable, db, _ *sql.DB) {
				holdFor(t, db, key, time.Second, Shared())
				time.Sleep(2 * handOffFor)
			},
			call: func(t *testing.T, db *sql.DB) error { return WithLock(t.Context(), db, key, nothing, Shared()) },
		},
	} {
		for _, late := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, late %v", test.name, late), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					p, dbs, srvs := newTable(t, 2)
					db := dbs[0]
					srvs[0].direct = true
					if test.setUp != nil {
						test.setUp(t, p, db, dbs[1])
					}
					answer := srvs[0].script
					panics := true
					srvs[0].script = func(ctx context.Context, conn int, query string) (int64, error) {
						if panics && strings.Contains(query, test.on) {
							panics = false
							if late {
								_, _ = answer(ctx, conn, query)
							}
							panic("driver")
						}
						return answer(ctx, conn, query)
					}
					func() {
						defer func() {
							if got := recover(); got != "driver" {
								t.Errorf("recovered %v", got)
							}
						}()
						if test.call != nil {
							wantError(t, test.call(t, db))
						} else {
							wantError(t, WithLock(t.Context(), db, key, nothing))
						}
					}()
					for _, k := range []Key{key, second} {
						wantError(t, WithLock(t.Context(), db, k, nothing, Timeout(10*time.Second)))
						wantError(t, WithConnLock(t.Context(), db, k, func(context.Context, *sql.Conn) error { return nil }, Timeout(time.Second)))
					}
					time.Sleep(5 * time.Second)
					wantIdle(t, db)
					p.clean()
				})
			})
		}
	}
}

// holdFor holds k for d.
func holdFor(t *testing.T, db *sql.DB, k Key, d time.Duration, opts ...Option) {
	l, err := Acquire(t.Context(), db, k, opts...)
	wantError(t, err)
	time.AfterFunc(d, func() { _ = l.Release() })
}
