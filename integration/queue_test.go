package integration

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/pgadvisory/advisory"
)

// Waiters of one pool queue in their process, and one of them on the server, where those of
// other processes are. Pools stand for processes here.

// contend takes the lock of key in n goroutines through db, again and again until ctx ends.
func contend(ctx context.Context, g *errgroup.Group, db *sql.DB, n int, key advisory.Key, fn func(), opts ...advisory.Option) {
	for range n {
		g.Go(func() error {
			for ctx.Err() == nil {
				// Not under ctx: a wait that is cancelled costs a connection.
				err := advisory.WithLock(context.WithoutCancel(ctx), db, key, func(context.Context) error { fn(); return nil }, opts...)
				if err != nil {
					return err
				}
			}
			return nil
		})
	}
}

// A lock is handed on within a process many times before it goes to another, which has its
// turn nevertheless.
func TestProcessesTakeTurns(t *testing.T) {
	bothDrivers(t, func(t *testing.T, d driver) {
		const goroutines = 8
		ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
		defer cancel()
		pools := []*sql.DB{d.open(t, server.DSN()), d.open(t, server.DSN())}
		key := testKey(t)
		var mu sync.Mutex
		var inside bool
		var sections [2]int
		last, turns := -1, 0
		var g errgroup.Group
		for i, db := range pools {
			contend(ctx, &g, db, goroutines, key, func() {
				mu.Lock()
				if inside {
					t.Error("two are inside")
				}
				inside = true
				sections[i]++
				if last != i {
					turns++
				}
				last = i
				mu.Unlock()
				mu.Lock()
				inside = false
				mu.Unlock()
			})
		}
		if err := g.Wait(); err != nil {
			t.Error(err)
		}
		all := sections[0] + sections[1]
		t.Logf("%d sections, %d %% of them by the first; %d turns", all, 100*sections[0]/max(1, all), turns)
		for i, n := range sections {
			if n < all/4 {
				t.Errorf("process %d had %d of %d sections, less than half of its share", i, n, all)
			}
		}
		if turns < 4 {
			t.Errorf("%d turns in 2 s", turns)
		}
		if all < 10*turns {
			t.Errorf("%d sections in %d turns: the lock is not handed on within a process", all, turns)
		}
		wantFree(t, adminDB(t), key)
	})
}

// However busy one process keeps a lock, another one waits for turns of 20 ms, and not for
// luck.
func TestWaiterIsNotStarvedByABusyProcess(t *testing.T) {
	bothDrivers(t, func(t *testing.T, d driver) {
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		busy, other := d.open(t, server.DSN()), d.open(t, server.DSN())
		var g errgroup.Group
		var sections atomic.Int64
		key := testKey(t)
		contend(ctx, &g, busy, 8, key, func() { sections.Add(1); time.Sleep(time.Millisecond) }) // there is always somebody in line
		waitFor(t, "the process is busy", func() (bool, error) { return sections.Load() > 20, nil })
		for _, w := range []way{withLock, withTxLock, withConnLock} {
			var took []time.Duration
			for range 10 {
				began := time.Now()
				if err := w.with(soon(t), other, key, func(context.Context, querier) error {
					took = append(took, time.Since(began))
					return nil
				}, advisory.Timeout(10*time.Second)); err != nil {
					t.Fatal(err)
				}
			}
			logBound(t, "busy "+d.name, w.name+": another's turn", time.Second, took)
		}
		cancel()
		if err := g.Wait(); err != nil {
			t.Error(err)
		}
	})
}

// Shared locks that overlap all the time do not keep a writer out.
func TestReadersDoNotStarveAWriter(t *testing.T) {
	t.Parallel()
	bothDrivers(t, func(t *testing.T, d driver) {
		dsn := withParams(t, server.DSN(), "application_name", appName(t))
		for name, where := range map[string]func(readers *sql.DB) *sql.DB{
			"in_the_same_process": func(readers *sql.DB) *sql.DB { return readers },
			"in_another_process":  func(*sql.DB) *sql.DB { return d.open(t, dsn) },
		} {
			t.Run(name, func(t *testing.T) {
				readers := d.open(t, dsn)
				writers := where(readers)
				ctx, cancel := context.WithCancel(t.Context())
				defer cancel()
				var r overlappingReaders
				var g errgroup.Group
				contend(ctx, &g, readers, 4, testKey(t), r.read, advisory.Shared())
				waitFor(t, "readers overlap", func() (bool, error) { return r.overlaps.Load() > 20, nil })
				logBound(t, "readers "+d.name, "writer begins, "+name, 5*time.Second, r.write(ctx, t, writers))
				cancel()
				if err := g.Wait(); err != nil {
					t.Error(err)
				}
			})
		}
	})
}

// overlappingReaders counts readers, and how often one comes before another has left.
type overlappingReaders struct{ inside, entries, overlaps atomic.Int64 }

// read stays until another reader has come, so that there is always one. Or it stays until
// it has waited in vain, because others are kept out.
func (r *overlappingReaders) read() {
	r.inside.Add(1)
	defer r.inside.Add(-1)
	entry := r.entries.Add(1)
	for began := time.Now(); time.Since(began) < 100*time.Millisecond; {
		time.Sleep(time.Millisecond)
		if r.entries.Load() > entry {
			r.overlaps.Add(1)
			break
		}
	}
}

// write takes the lock several times, when no reader has it, and returns how long each
// took to begin.
func (r *overlappingReaders) write(ctx context.Context, t *testing.T, db *sql.DB) (took []time.Duration) {
	t.Helper()
	for range 3 {
		began := time.Now()
		err := advisory.WithLock(ctx, db, testKey(t), func(context.Context) error {
			took = append(took, time.Since(began))
			if n := r.inside.Load(); n > 0 {
				t.Errorf("%d readers are inside beside the writer", n)
			}
			return nil
		}, advisory.Timeout(10*time.Second))
		if err != nil {
			t.Error(err)
		}
	}
	return took
}

// Waits for other processes leave half of a limited pool to the work.
func TestWaitsTakeNoMoreThanHalfOfThePool(t *testing.T) {
	t.Parallel()
	const limit, n = 6, 20
	eachDriver(t, func(t *testing.T, d driver) {
		db := d.openLimited(t, limit)
		var releases []func()
		var keys []advisory.Key
		for i := range n {
			key := advisory.Name(fmt.Sprint(t.Name(), i))
			keys = append(keys, key)
			releases = append(releases, hold(t, adminDB(t), key))
		}
		// A lock that is held, so that all of it comes together: the common session too.
		lock, err := advisory.Acquire(soon(t), db, testKey(t))
		if err != nil {
			t.Fatal(err)
		}
		var g errgroup.Group
		var granted atomic.Int64
		for _, key := range keys {
			g.Go(func() error {
				return advisory.WithLock(soon(t), db, key, func(ctx context.Context) error {
					granted.Add(1)
					_, err := db.ExecContext(ctx, "SELECT")
					return err
				})
			})
		}
		waiting := func() (n int) {
			if err := adminDB(t).QueryRow(`SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted
				AND pid IN (SELECT pid FROM pg_stat_activity WHERE application_name = $1)`, appName(t)).Scan(&n); err != nil {
				t.Fatal(err)
			}
			return n
		}
		waitFor(t, "some wait in the server's queue", func() (bool, error) { return waiting() == limit/2-1, nil })
		// For long enough that those who wait there take turns with the others.
		for began := time.Now(); time.Since(began) < 1500*time.Millisecond; time.Sleep(time.Millisecond) {
			if n := db.Stats().InUse; n > limit/2 {
				t.Fatalf("%d connections are in use, want %d at most", n, limit/2)
			}
		}
		if n := db.Stats().OpenConnections; n > limit/2 {
			t.Errorf("%d connections were opened, want %d at most", n, limit/2)
		}
		for _, release := range releases {
			release()
		}
		if err := g.Wait(); err != nil {
			t.Error(err)
		}
		if granted.Load() != n {
			t.Errorf("%d locks were granted, want %d", granted.Load(), n)
		}
		if err := lock.Release(); err != nil {
			t.Error(err)
		}
		wantClean(t, db)
		wantNoStatement(t, db)
	})
}

// Those who wait in the server's queue make room for those who cannot: no key has to
// rely on being met free.
func TestWaitersTakeTurnsInTheServersQueue(t *testing.T) {
	t.Parallel()
	const limit, n = 4, 2
	bothDrivers(t, func(t *testing.T, d driver) {
		db := d.openLimited(t, limit)
		// With the session that has this one, there is room for one in the server's queue.
		lock, err := advisory.Acquire(soon(t), db, testKey(t))
		if err != nil {
			t.Fatal(err)
		}
		var g errgroup.Group
		waited := make(map[string]bool)
		var releases []func()
		for i := range n {
			key := advisory.Name(fmt.Sprint(t.Name(), i))
			releases = append(releases, hold(t, adminDB(t), key))
			waited[key.SQL()] = false
			g.Go(func() error { return withLock.with(soon(t), db, key, noWork) })
		}
		waitFor(t, "each one has waited in the server's queue", func() (bool, error) {
			all := true
			for i := range n {
				key := advisory.Name(fmt.Sprint(t.Name(), i))
				got, err := locks(t.Context(), adminDB(t), key, false)
				if err != nil {
					return false, err
				}
				waited[key.SQL()] = waited[key.SQL()] || got > 0
				all = all && waited[key.SQL()]
			}
			return all, nil
		})
		for _, release := range releases {
			release()
		}
		if err := errors.Join(g.Wait(), lock.Release()); err != nil {
			t.Error(err)
		}
	})
}

// Those who take the lock on a connection of their own take none while others of their
// process are before them.
func TestWaitersForATransactionHoldNoConnection(t *testing.T) {
	t.Parallel()
	const n = 50
	eachDriver(t, func(t *testing.T, d driver) {
		for _, w := range []way{withTxLock, withConnLock} {
			db := d.openLimited(t, 2)
			ctx := soon(t)
			key, c := advisory.Name(t.Name()+w.name), newCounter(t, adminDB(t))
			begun, end := make(chan struct{}), make(chan struct{})
			var g errgroup.Group
			g.Go(func() error {
				return w.with(ctx, db, key, func(ctx context.Context, _ querier) error {
					close(begun)
					<-end
					return c.increment(ctx, db) // which takes the other connection
				})
			})
			<-begun
			var asked sync.WaitGroup
			for range n {
				asked.Add(1)
				g.Go(func() error {
					asked.Done()
					return w.with(ctx, db, key, func(ctx context.Context, _ querier) error { return c.increment(ctx, db) })
				})
			}
			asked.Wait()
			for range 20 {
				if n := db.Stats().InUse; n > 1 {
					t.Fatalf("%s: %d connections are in use, want 1", w.name, n)
				}
				time.Sleep(time.Millisecond) // there is no condition for what must not happen
			}
			close(end)
			if err := g.Wait(); err != nil {
				t.Errorf("%s: %v", w.name, err)
			}
			c.wantValue(t, adminDB(t), n+1)
			wantClean(t, db)
		}
	})
}

// A process knows of its own locks without asking.
func TestNoWaitAgainstTheOwnProcessSendsNothing(t *testing.T) {
	t.Parallel()
	bothDrivers(t, func(t *testing.T, d driver) {
		w := newWire(t)
		db := d.open(t, w.dsn)
		key := testKey(t)
		lock, err := advisory.Acquire(t.Context(), db, key)
		if err != nil {
			t.Fatal(err)
		}
		w.take()
		for _, way := range openers {
			wantRefusal := way.with(t.Context(), db, key, noWork, advisory.NoWait())
			if !errors.Is(wantRefusal, advisory.ErrNotAcquired) {
				t.Errorf("%s: %v, want ErrNotAcquired", way.name, wantRefusal)
			}
			for _, s := range w.take() {
				if !strings.Contains(s, "pg_catalog.pg_locks") { // a heartbeat
					t.Errorf("%s: sent %q", way.name, s)
				}
			}
		}
		if err := lock.Release(); err != nil {
			t.Error(err)
		}
	})
}

// A ledger knows who is inside the section of a key.
type ledger struct{ readers, writers atomic.Int64 }

func (l *ledger) enter(shared bool) error {
	if shared {
		l.readers.Add(1)
	} else if l.writers.Add(1) > 1 {
		return errors.New("two writers")
	}
	if l.readers.Load() > 0 && l.writers.Load() > 0 {
		return errors.New("readers and a writer")
	}
	return nil
}

func (l *ledger) leave(shared bool) {
	if shared {
		l.readers.Add(-1)
	} else {
		l.writers.Add(-1)
	}
}

// All ways at once, over pools large and small, with all kinds of patience.
func TestMixedStormExcludes(t *testing.T) {
	t.Parallel()
	const goroutines, each = 32, 25
	eachDriver(t, func(t *testing.T, d driver) {
		allowLog(t, brokenOff)
		dsn := withParams(t, server.DSN(), "application_name", appName(t))
		pools := []*sql.DB{d.open(t, dsn), d.open(t, dsn), d.open(t, dsn)}
		pools[1].SetMaxOpenConns(8)
		pools[2].SetMaxOpenConns(3)
		for _, db := range pools {
			fill(t, db, 3)
		}
		s := &mixedStorm{ledgers: map[string]*ledger{}}
		for i := range 3 {
			key := advisory.Name(fmt.Sprint(t.Name(), i))
			s.keys = append(s.keys, key)
			s.ledgers[key.SQL()] = new(ledger)
			s.ledgers[second(key).SQL()] = new(ledger)
		}
		if err := concurrently(goroutines, d.rounds(each), func(i int) error { return s.ask(soon(t), pools[i%len(pools)]) }); err != nil {
			t.Error(err)
		}
		t.Logf("%d granted, %d refused, %d cancelled", s.granted.Load(), s.refused.Load(), s.canceled.Load())
		if s.granted.Load() == 0 || s.refused.Load() == 0 || s.canceled.Load() == 0 {
			t.Error("no storm")
		}
		for _, key := range s.keys {
			wantFree(t, adminDB(t), key)
			wantFree(t, adminDB(t), second(key))
		}
		for _, db := range pools {
			wantClean(t, db)
			wantNoStatement(t, db)
		}
	})
}

// A mixedStorm counts what becomes of requests of all kinds.
type mixedStorm struct {
	keys                       []advisory.Key
	ledgers                    map[string]*ledger // by the text of the key
	granted, refused, canceled atomic.Int64
}

// ask asks for a key in some way, with some patience. It returns an error if the lock does
// not exclude others.
func (s *mixedStorm) ask(ctx context.Context, db *sql.DB) error {
	w, key := ways[rand.IntN(len(ways))], s.keys[rand.IntN(len(s.keys))]
	w.shared = rand.IntN(2) == 0
	var opts []advisory.Option
	patient := func() bool { return true }
	switch rand.IntN(5) {
	case 0:
		opts = append(opts, advisory.NoWait())
	case 1:
		opts = append(opts, advisory.Timeout(time.Millisecond+rand.N(50*time.Millisecond)))
	case 2:
		var cancel context.CancelFunc
		ctx, cancel = context.WithCancel(ctx)
		defer cancel()
		patient = time.AfterFunc(rand.N(20*time.Millisecond), cancel).Stop
	}
	err := w.with(ctx, db, key, func(ctx context.Context, _ querier) error {
		if !patient() {
			return ctx.Err() // a transaction, and its lock, end with it
		}
		return s.enter(w, key)
	}, opts...)
	switch {
	case err == nil:
		s.granted.Add(1)
	case strings.Contains(err.Error(), "not excluded"):
		return fmt.Errorf("%s, shared: %t: %w", w.name, w.shared, err)
	case ctx.Err() != nil && !errors.Is(err, advisory.ErrLost):
		s.canceled.Add(1)
	case errors.Is(err, advisory.ErrNotAcquired):
		s.refused.Add(1)
	default:
		return fmt.Errorf("%s, shared: %t: %w", w.name, w.shared, err)
	}
	return nil
}

// enter enters what the lock guards, and stays there for a moment.
func (s *mixedStorm) enter(w way, key advisory.Key) (err error) {
	entered := []advisory.Key{key}
	if w.name == withLocks.name {
		entered = append(entered, second(key))
	}
	for _, k := range entered {
		l := s.ledgers[k.SQL()]
		defer l.leave(w.shared)
		err = errors.Join(err, l.enter(w.shared))
	}
	if err != nil {
		return fmt.Errorf("not excluded: %w", err)
	}
	if rand.IntN(2) == 0 {
		time.Sleep(rand.N(2 * time.Millisecond))
	}
	return nil
}
