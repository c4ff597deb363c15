package main

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"sync"
	"sync/atomic"
	"time"
)

// A lineup is what a process of a contestant is made of. Its fields are exported for
// their way to another process.
type lineup struct {
	Contestant contestant
	Servers    servers
	Key        int64 // the first, if there are several
	Goroutines int
	OneKey     bool
	Traced     bool // the driver is wrapped
}

// A team is the goroutines of a contestant, in one process or in several.
type team interface {
	// round has everyone take locks for the time d, and adds up what they did.
	round(ctx context.Context, d time.Duration) (tally, error)
	Close() error
}

// A tally is what came out of a round.
type tally struct {
	Ops     []int64 // of each process
	Elapsed time.Duration
	Mallocs uint64
	Bytes   uint64
	Times   []time.Duration // of each lock with its release, of a goroutine that is alone
}

func (t tally) ops() (sum int64) {
	for _, n := range t.Ops {
		sum += n
	}
	return sum
}

// drainTimeout is how long a round may go on when its time is over: the locks that
// others wait for by then are still to be had.
const drainTimeout = 20 * time.Second

var errStuck = fmt.Errorf("did not end within %v of its time", drainTimeout)

// A localTeam is the goroutines of this process.
type localTeam struct {
	lineup
	locker  locker
	locks   []lockFunc // of each goroutine
	counter *int64     // what the lock protects, if there is one lock; else nil
	stuck   bool
}

// newLocalTeam returns a team that is ready to begin. Under a lock that it shares, it
// increments counter.
func newLocalTeam(ctx context.Context, l lineup, counter *int64) (*localTeam, error) {
	locker, err := l.Contestant.open(ctx, l.Servers, l.OneKey && l.Goroutines > 1, l.Traced)
	if err != nil {
		return nil, err
	}
	t := &localTeam{lineup: l, locker: locker, counter: counter}
	for i := range l.Goroutines {
		key := l.Key
		if !l.OneKey {
			key += int64(i)
		}
		lock, err := locker.worker(ctx, key)
		if err != nil {
			return nil, errors.Join(err, locker.Close())
		}
		t.locks = append(t.locks, lock)
	}
	return t, nil
}

func (t *localTeam) Close() error {
	if t.stuck {
		return nil // whoever is stuck would hold this up, too
	}
	return t.locker.Close()
}

func (t *localTeam) round(ctx context.Context, d time.Duration) (tally, error) {
	var (
		stop  atomic.Bool
		total atomic.Int64
		group sync.WaitGroup
		errs  = make([]error, len(t.locks))
		begin = make(chan struct{})
		times []time.Duration
	)
	for i, lock := range t.locks {
		group.Go(func() {
			var ops, mine int64
			counter := t.counter
			if counter == nil {
				counter = &mine
			}
			body := func(context.Context) error { *counter++; return nil }
			<-begin
			for !stop.Load() {
				start := time.Now()
				// A context that can end costs each statement of lib/pq a goroutine,
				// which is not what is measured here.
				if errs[i] = lock(context.Background(), body); errs[i] != nil {
					stop.Store(true)
					break
				}
				ops++
				if len(t.locks) == 1 {
					times = append(times, time.Since(start))
				}
			}
			total.Add(ops)
		})
	}
	ended := make(chan struct{})
	go func() { group.Wait(); close(ended) }()

	// What another contestant left behind is not this one's to clear away.
	runtime.GC()
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	start := time.Now()
	close(begin)
	select {
	case <-time.After(d):
	case <-ended:
	case <-ctx.Done():
	}
	stop.Store(true)
	select {
	case <-ended:
	case <-time.After(drainTimeout):
		t.stuck = true
		return tally{}, errStuck
	}
	elapsed := time.Since(start)
	runtime.ReadMemStats(&after)
	return tally{
		Ops:     []int64{total.Load()},
		Elapsed: elapsed,
		Mallocs: after.Mallocs - before.Mallocs,
		Bytes:   after.TotalAlloc - before.TotalAlloc,
		Times:   times,
	}, errors.Join(append(errs, ctx.Err())...)
}
