package main

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"math/rand/v2"
	"strconv"
	"time"

	"github.com/pgadvisory/advisory"
)

// handOff measures the time from the moment at which a holder is done until a waiter of
// another process has the lock. The processes are two pools of this one, which know
// nothing of each other, so that one clock times both ends. What it is compared with is
// the least that the server offers: a waiter that blocks in pg_advisory_lock, with two
// connections that do nothing else.
func handOff(b *bench, ctx context.Context, w *workload) error {
	var entrants []*handOffEntrant
	for _, driver := range drivers {
		for _, impl := range []string{ours, floor} {
			e := &handOffEntrant{contestant: contestant{impl, driver}}
			defer e.close()
			if err := e.open(ctx, b.direct.Postgres); err != nil {
				return err
			}
			entrants = append(entrants, e)
		}
	}
	const unmeasured = 5
	for i := range b.handOffs + unmeasured {
		for _, e := range entrants {
			d, err := e.once(ctx)
			if err != nil {
				return fmt.Errorf("%v: %w", e.contestant, err)
			}
			if i >= unmeasured {
				e.times = append(e.times, d)
			}
		}
	}
	for _, e := range entrants {
		b.report.addTimes(w, e.contestant, e.times)
	}
	b.report.compareTimes(w)
	return nil
}

// A handOffEntrant is a contestant, as two processes.
type handOffEntrant struct {
	contestant
	holder, waiter *sql.DB
	once           func(context.Context) (time.Duration, error)
	times          []time.Duration
}

func (e *handOffEntrant) open(ctx context.Context, dsn string) (err error) {
	for _, pool := range []**sql.DB{&e.holder, &e.waiter} {
		if *pool, err = openPool(e.Driver, dsn, poolSize); err != nil {
			return err
		}
	}
	if e.Impl == ours {
		e.once = handOverOurs(e.holder, e.waiter)
		return nil
	}
	e.once, err = handOverRaw(ctx, e.holder, e.waiter)
	return err
}

func (e *handOffEntrant) close() {
	for _, pool := range []*sql.DB{e.holder, e.waiter} {
		if pool != nil {
			pool.Close()
		}
	}
}

// A handOver is one hand-off: hold takes a lock, calls held, and keeps it until release
// is closed; wait takes the same lock, and returns when it had it.
type handOver struct {
	hold func(ctx context.Context, held func(), release <-chan struct{}) (done time.Time, err error)
	wait func(ctx context.Context) (had time.Time, err error)
}

// once does it once.
func (h handOver) once(ctx context.Context) (time.Duration, error) {
	ctx, cancel := context.WithTimeout(ctx, drainTimeout)
	defer cancel()
	type moment struct {
		time.Time
		error
	}
	held, release := make(chan struct{}), make(chan struct{})
	done, had := make(chan moment, 1), make(chan moment, 1)
	go func() {
		t, err := h.hold(ctx, func() { close(held) }, release)
		done <- moment{t, err}
	}()
	select {
	case <-held:
	case m := <-done:
		return 0, errors.Join(errors.New("not held"), m.error)
	}
	go func() {
		t, err := h.wait(ctx)
		had <- moment{t, err}
	}()
	// Time enough to be in the queue, and no particular moment of its waiting.
	time.Sleep(10*time.Millisecond + rand.N(20*time.Millisecond))
	close(release)
	m1, m2 := <-done, <-had
	return m2.Sub(m1.Time), errors.Join(m1.error, m2.error)
}

func handOverOurs(holder, waiter *sql.DB) func(context.Context) (time.Duration, error) {
	key := advisory.ID(newKeys())
	return handOver{
		hold: func(_ context.Context, held func(), release <-chan struct{}) (done time.Time, err error) {
			err = advisory.WithLock(context.Background(), holder, key, func(context.Context) error {
				held()
				<-release
				done = time.Now()
				return nil
			})
			return done, err
		},
		wait: func(ctx context.Context) (had time.Time, err error) {
			err = advisory.WithLock(ctx, waiter, key, func(context.Context) error {
				had = time.Now()
				return nil
			})
			return had, err
		},
	}.once
}

func handOverRaw(ctx context.Context, holder, waiter *sql.DB) (func(context.Context) (time.Duration, error), error) {
	holderConn, err1 := holder.Conn(ctx)
	waiterConn, err2 := waiter.Conn(ctx)
	if err := errors.Join(err1, err2); err != nil {
		return nil, err
	}
	key := strconv.FormatInt(newKeys(), 10)
	lock, unlock := "SELECT pg_catalog.pg_advisory_lock("+key+")", "SELECT pg_catalog.pg_advisory_unlock("+key+")"
	return handOver{
		hold: func(_ context.Context, held func(), release <-chan struct{}) (time.Time, error) {
			if _, err := holderConn.ExecContext(context.Background(), lock); err != nil {
				return time.Time{}, err
			}
			held()
			<-release
			done := time.Now()
			_, err := holderConn.ExecContext(context.Background(), unlock)
			return done, err
		},
		wait: func(ctx context.Context) (time.Time, error) {
			if _, err := waiterConn.ExecContext(ctx, lock); err != nil {
				return time.Time{}, err
			}
			had := time.Now()
			_, err := waiterConn.ExecContext(ctx, unlock)
			return had, err
		},
	}.once, nil
}
