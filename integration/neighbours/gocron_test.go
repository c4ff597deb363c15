package neighbours_test

import (
	"context"
	"database/sql"
	"errors"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/go-co-op/gocron/v2"
	"github.com/jonboulle/clockwork"

	"github.com/pgadvisory/advisory"
	advisorygocron "github.com/pgadvisory/advisory/gocron"
)

const interval = time.Minute // between two ticks, on the fake clocks

// A replica is a scheduler with one job, and a clock of its own that stands still between
// ticks: how far it is from the others' is up to the test.
type replica struct {
	clock    *clockwork.FakeClock
	shutdown func() error
	runs     atomic.Int32

	// What the Locker or the Elector has answered, and how many jobs with a lock are over.
	granted, refused, unlocked atomic.Int32
}

// newReplica starts a scheduler. option lets it use a Locker or an Elector.
func newReplica(t *testing.T, task func(context.Context) error, option func(*replica) gocron.SchedulerOption) *replica {
	t.Helper()
	r := &replica{clock: clockwork.NewFakeClock()}
	scheduler, err := gocron.NewScheduler(gocron.WithClock(r.clock), option(r))
	if err != nil {
		t.Fatal(err)
	}
	_, err = scheduler.NewJob(gocron.DurationJob(interval), gocron.NewTask(func(ctx context.Context) error {
		r.runs.Add(1)
		return task(ctx)
	}), gocron.WithName("job"))
	if err != nil {
		t.Fatal(err)
	}
	scheduler.Start()
	r.shutdown = sync.OnceValue(scheduler.Shutdown)
	t.Cleanup(func() {
		if err := r.shutdown(); err != nil {
			t.Error(err)
		}
	})
	return r
}

// tick lets the clock strike, and waits until the Locker or the Elector has answered.
func (r *replica) tick(t *testing.T) (granted bool) {
	t.Helper()
	yes, no := r.granted.Load(), r.refused.Load()
	r.strike(t)
	waitFor(t, "the Locker or the Elector has answered", func() (bool, error) {
		granted = r.granted.Load() > yes
		return granted || r.refused.Load() > no, nil
	})
	return granted
}

// strike lets the clock strike once the scheduler waits for it.
func (r *replica) strike(t *testing.T) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	if err := r.clock.BlockUntilContext(ctx, 1); err != nil {
		t.Fatal("the scheduler waits for no tick")
	}
	r.clock.Advance(interval)
}

// waitUnlocked waits until no job with a lock is under way.
func (r *replica) waitUnlocked(t *testing.T) {
	t.Helper()
	waitFor(t, "the job is over", func() (bool, error) { return r.unlocked.Load() == r.granted.Load(), nil })
}

func (r *replica) count(err error) {
	if err == nil {
		r.granted.Add(1)
	} else {
		r.refused.Add(1)
	}
}

func runs(replicas []*replica) (n int) {
	for _, r := range replicas {
		n += int(r.runs.Load())
	}
	return n
}

// countingLocker stands between gocron and the Locker.
type countingLocker struct {
	gocron.Locker
	r *replica
}

func (l countingLocker) Lock(ctx context.Context, job string) (gocron.Lock, error) {
	lock, err := l.Locker.Lock(ctx, job)
	l.r.count(err)
	return countingLock{lock, l.r}, err
}

type countingLock struct {
	gocron.Lock
	r *replica
}

func (l countingLock) Unlock(ctx context.Context) error {
	defer l.r.unlocked.Add(1)
	return l.Lock.Unlock(ctx)
}

// jobKey is the key of the test's job.
func jobKey(t *testing.T) advisory.Key { return advisory.Name(t.Name() + "/job") }

func newLocker(t *testing.T, db *sql.DB, atLeast time.Duration, opts ...advisory.Option) *advisorygocron.Locker {
	t.Helper()
	locker, err := advisorygocron.NewLocker(db, t.Name(), atLeast, opts...)
	if err != nil {
		t.Fatal(err)
	}
	return locker
}

func newElector(t *testing.T, db *sql.DB) *advisorygocron.Elector {
	t.Helper()
	elector, err := advisorygocron.NewElector(db, leaderKey(t))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { elector.Close() })
	return elector
}

// threeWithLockers returns replicas with a pool and a Locker each.
func threeWithLockers(t *testing.T, d driver, atLeast time.Duration, task func(context.Context) error) (replicas []*replica) {
	t.Helper()
	for range 3 {
		locker := newLocker(t, d.open(t, server.DSN()), atLeast)
		replicas = append(replicas, newReplica(t, task, func(r *replica) gocron.SchedulerOption {
			return gocron.WithDistributedLocker(countingLocker{locker, r})
		}))
	}
	return replicas
}

func noTask(context.Context) error { return nil }

// inTurn lets a tick strike on one replica after the other, when the job is over on those
// before, and returns how often the job ran.
func inTurn(t *testing.T, replicas []*replica, first int) (ran int) {
	t.Helper()
	before := runs(replicas)
	for i := range replicas {
		r := replicas[(first+i)%len(replicas)]
		r.tick(t)
		r.waitUnlocked(t)
	}
	return runs(replicas) - before
}

// Clocks that differ, and a job that is over at once.
func TestLockerSkewedClocks(t *testing.T) {
	const atLeast = time.Second // in which three replicas ask
	bothDrivers(t, func(t *testing.T, d driver) {
		db := d.open(t, server.DSN())
		replicas := threeWithLockers(t, d, atLeast, noTask)
		for first := range replicas {
			for attempt := 0; ; attempt++ {
				start := time.Now()
				n := inTurn(t, replicas, first)
				took := time.Since(start)
				waitUntilFree(t, db, jobKey(t))
				if took < atLeast {
					if n != 1 {
						t.Errorf("the job ran %d times in one tick", n)
					}
					break
				}
				if attempt == 5 {
					t.Fatalf("the clocks were further apart than they may be: %v", took)
				}
			}
			if replicas[first].runs.Load() == 0 {
				t.Error("the job never ran where the clock struck first")
			}
		}
	})
}

// The same with locks that are held for the run alone: what atLeast is for.
func TestLockerWithoutAtLeast(t *testing.T) {
	bothDrivers(t, func(t *testing.T, d driver) {
		if n := inTurn(t, threeWithLockers(t, d, 0, noTask), 0); n != 3 {
			t.Errorf("the job ran %d times; want 3, or the test of skewed clocks shows nothing", n)
		}
	})
}

// A tick that strikes on all replicas at the same moment, and a job that takes its time.
func TestLockerSameMoment(t *testing.T) {
	bothDrivers(t, func(t *testing.T, d driver) {
		proceed := make(chan struct{})
		replicas := threeWithLockers(t, d, 0, func(ctx context.Context) error {
			select {
			case <-proceed:
			case <-ctx.Done():
			}
			return nil
		})
		for tick := 1; tick <= 5; tick++ {
			for _, r := range replicas {
				r.strike(t)
			}
			waitFor(t, "all have asked", func() (bool, error) {
				answers := int32(0)
				for _, r := range replicas {
					answers += r.granted.Load() + r.refused.Load()
				}
				return answers == int32(tick*len(replicas)), nil
			})
			proceed <- struct{}{}
			for _, r := range replicas {
				r.waitUnlocked(t)
			}
			if n := runs(replicas); n != tick {
				t.Fatalf("the job ran %d times in %d ticks", n, tick)
			}
		}
	})
}

// Who does not get a connection in time does not run the tick.
func TestLockerLate(t *testing.T) {
	bothDrivers(t, func(t *testing.T, d driver) {
		db := d.open(t, server.DSN())
		db.SetMaxOpenConns(1)
		conn, err := db.Conn(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		locker := newLocker(t, db, 100*time.Millisecond)
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
		defer cancel()
		if _, err := locker.Lock(ctx, "job"); !errors.Is(err, advisory.ErrNotAcquired) || ctx.Err() != nil {
			t.Errorf("want ErrNotAcquired in time, got %v", err)
		}
	})
}

// A lost lock is the error of Unlock, and that of Observe; the next tick finds the lock free.
func TestLockerSessionDies(t *testing.T) {
	bothDrivers(t, func(t *testing.T, d driver) {
		lost := make(chan error, 1)
		locker := newLocker(t, d.open(t, server.DSN()), 0, advisory.Observe(&advisory.Observer{
			Lost: func(_ context.Context, _ advisory.LockInfo, err error) { lost <- err },
		}))
		lock, err := locker.Lock(t.Context(), "job")
		if err != nil {
			t.Fatal(err)
		}
		db := d.open(t, server.DSN())
		terminate(t, db, holder(t, db, jobKey(t)))
		if err := <-lost; !errors.Is(err, advisory.ErrLost) {
			t.Errorf("want ErrLost, got %v", err)
		}
		if err := lock.Unlock(t.Context()); !errors.Is(err, advisory.ErrLost) {
			t.Errorf("want ErrLost, got %v", err)
		}
		waitUntilFree(t, db, jobKey(t)) // the session ends in its own time
		if lock, err = locker.Lock(t.Context(), "job"); err != nil {
			t.Fatal(err)
		}
		if err := lock.Unlock(t.Context()); err != nil {
			t.Error(err)
		}
	})
}

// countingElector stands between gocron and the Elector.
type countingElector struct {
	*advisorygocron.Elector
	r *replica
}

func (e countingElector) IsLeader(ctx context.Context) error {
	err := e.Elector.IsLeader(ctx)
	e.r.count(err)
	return err
}

// candidates are replicas with a pool and an Elector each.
type candidates struct {
	replicas []*replica
	electors []*advisorygocron.Elector
}

func newCandidates(t *testing.T, d driver, task func(context.Context) error) (c candidates) {
	t.Helper()
	for range 3 {
		elector := newElector(t, d.open(t, server.DSN()))
		c.electors = append(c.electors, elector)
		c.replicas = append(c.replicas, newReplica(t, elector.Task(task), func(r *replica) gocron.SchedulerOption {
			return gocron.WithDistributedElector(countingElector{elector, r})
		}))
	}
	return c
}

func leaderKey(t *testing.T) advisory.Key { return advisory.Name(t.Name()) }

// leaders returns which of the candidates say that they lead.
func (c candidates) leaders(t *testing.T) (leaders []int) {
	t.Helper()
	for i, e := range c.electors {
		err := e.IsLeader(t.Context())
		if err == nil {
			leaders = append(leaders, i)
		} else if !errors.Is(err, advisorygocron.ErrNotLeader) {
			t.Errorf("want ErrNotLeader, got %v", err)
		}
	}
	return leaders
}

// waitForLeader waits until one of the candidates leads, and it is not the one before.
func (c candidates) waitForLeader(t *testing.T, before int) (leader int) {
	t.Helper()
	waitFor(t, "another leads", func() (bool, error) {
		leaders := c.leaders(t)
		if len(leaders) != 1 || leaders[0] == before {
			return false, nil
		}
		leader = leaders[0]
		return true, nil
	})
	return leader
}

// wantRunsOn fails the test unless the leader alone runs the next tick.
func (c candidates) wantRunsOn(t *testing.T, leader int) {
	t.Helper()
	for i, r := range c.replicas {
		before := r.runs.Load()
		if granted := r.tick(t); granted != (i == leader) {
			t.Errorf("replica %d runs the tick: %t; the leader is %d", i, granted, leader)
		} else if granted {
			waitFor(t, "the job runs", func() (bool, error) { return r.runs.Load() == before+1, nil })
		}
	}
}

// The first tick runs on one of the replicas, though it strikes as soon as there are Electors.
func TestElectorFirstRun(t *testing.T) {
	bothDrivers(t, func(t *testing.T, d driver) {
		for range 5 {
			c := newCandidates(t, d, noTask)
			for _, r := range c.replicas {
				r.tick(t)
			}
			waitFor(t, "the tick has run", func() (bool, error) { return runs(c.replicas) > 0, nil })
			if n := runs(c.replicas); n != 1 {
				t.Errorf("the tick ran %d times", n)
			}
			for _, e := range c.electors {
				if err := e.Close(); err != nil {
					t.Error(err)
				}
			}
			waitUntilFree(t, d.open(t, server.DSN()), leaderKey(t))
		}
	})
}

// The leader runs each tick, and after a loss the next leader does.
func TestElectorLost(t *testing.T) {
	bothDrivers(t, func(t *testing.T, d driver) {
		db := d.open(t, server.DSN())
		c := newCandidates(t, d, noTask)
		leader := -1
		for range 3 {
			leader = c.waitForLeader(t, leader)
			for range 2 {
				c.wantRunsOn(t, leader)
			}
			terminate(t, db, holder(t, db, leaderKey(t)))
		}
	})
}

// A task's ctx ends with the leadership, and says whether that was lost or given up. If it
// was given up, nobody leads before the task has ended.
func TestElectorTask(t *testing.T) {
	bothDrivers(t, func(t *testing.T, d driver) {
		db := d.open(t, server.DSN())
		tokens, ended, proceed := make(chan int64, 1), make(chan error, 1), make(chan struct{})
		c := newCandidates(t, d, func(ctx context.Context) error {
			token, err := advisory.Token(ctx)
			if err != nil {
				t.Error(err)
			}
			tokens <- token
			<-ctx.Done()
			ended <- context.Cause(ctx)
			<-proceed
			return nil
		})

		leader := c.waitForLeader(t, -1)
		c.wantRunsOn(t, leader)
		token := <-tokens
		terminate(t, db, holder(t, db, leaderKey(t)))
		if cause := <-ended; !errors.Is(cause, advisory.ErrLost) {
			t.Errorf("want ErrLost, got %v", cause)
		}
		proceed <- struct{}{}

		leader = c.waitForLeader(t, leader)
		c.wantRunsOn(t, leader)
		if next := <-tokens; next <= token {
			t.Errorf("fencing token %d after %d", next, token)
		}
		session := holder(t, db, leaderKey(t))
		closed := make(chan error, 1)
		go func() { closed <- c.electors[leader].Close() }()
		if cause := <-ended; errors.Is(cause, advisory.ErrLost) {
			t.Errorf("want no loss, got %v", cause)
		}
		if leaders := c.leaders(t); len(leaders) > 0 || holder(t, db, leaderKey(t)) != session {
			t.Errorf("%v lead while the task of %d goes on", leaders, leader)
		}
		proceed <- struct{}{}
		if err := <-closed; err != nil {
			t.Error(err)
		}

		// The end of the scheduler ends the task, and not the leadership.
		leader = c.waitForLeader(t, leader)
		c.wantRunsOn(t, leader)
		<-tokens
		close(proceed)
		if err := c.replicas[leader].shutdown(); err != nil {
			t.Error(err)
		}
		if cause := <-ended; !errors.Is(cause, context.Canceled) {
			t.Errorf("want context.Canceled, got %v", cause)
		}
		if err := c.electors[leader].IsLeader(t.Context()); err != nil {
			t.Error(err)
		}
	})
}

// Close frees the leadership, and a candidacy.
func TestElectorClose(t *testing.T) {
	bothDrivers(t, func(t *testing.T, d driver) {
		db := d.open(t, server.DSN())
		release := hold(t, db, leaderKey(t))
		standby := newElector(t, d.open(t, server.DSN()))
		waitForWaiters(t, db, leaderKey(t), 1)
		if err := standby.Close(); err != nil {
			t.Error(err)
		}
		release()

		leader := newElector(t, d.open(t, server.DSN()))
		if err := leader.IsLeader(t.Context()); err != nil { // the lock was free
			t.Error(err)
		}
		if err := leader.Close(); err != nil {
			t.Error(err)
		}
		waitUntilFree(t, db, leaderKey(t))
		if err := leader.IsLeader(t.Context()); !errors.Is(err, advisorygocron.ErrNotLeader) {
			t.Errorf("want ErrNotLeader, got %v", err)
		}
	})
}
