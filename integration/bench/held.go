package main

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"runtime"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/pgadvisory/advisory"
	"github.com/pgadvisory/advisory/integration/internal/pgtest"
)

// A crowd is many goroutines of one process that want locks at the same time.
type crowd struct {
	contestant
	db      *sql.DB
	members int
	watch   *watch
}

// newCrowd opens a pool of the given size for a crowd, and watches its connections.
func (b *bench) newCrowd(c contestant, members, pool int) (*crowd, error) {
	name := fmt.Sprintf("advisory-bench-%x", newKeys())
	dsn, err := pgtest.WithParam(b.direct.Postgres, "application_name", name)
	if err != nil {
		return nil, err
	}
	db, err := openPool(c.Driver, dsn, pool)
	if err != nil {
		return nil, err
	}
	return &crowd{c, db, members, watchConnections(b.admin, name)}, nil
}

func (c *crowd) Close() error {
	c.watch.stop()
	return c.db.Close()
}

// each calls f for every member at the same time.
func (c *crowd) each(ctx context.Context, f func(ctx context.Context, i int) error) error {
	g, ctx := errgroup.WithContext(ctx)
	for i := range c.members {
		g.Go(func() error { return f(ctx, i) })
	}
	return g.Wait()
}

// usePool is what a holder does with its pool: it needs a connection of it.
func (c *crowd) usePool(ctx context.Context) error {
	_, err := c.db.ExecContext(ctx, "SELECT 1")
	return err
}

// incomplete says that what should come to its end did not, or returns err if that is
// not what happened.
func incomplete(ctx context.Context, limit time.Duration, err error) (string, error) {
	if errors.Is(err, context.DeadlineExceeded) && ctx.Err() == nil {
		return fmt.Sprintf("did not complete in %v", limit), nil
	}
	return "", err
}

// held has a program hold 1,000 locks on a pool of 2 connections, which every holder
// uses, too: when it has got its lock, and before it releases it.
func held(b *bench, ctx context.Context, w *workload) error {
	const locks, pool = 1000, 2
	time := row{workload: w, measure: "ms to take and release all"}
	connections := row{workload: w, measure: "connections"}
	memory := row{workload: w, measure: "bytes of memory per held lock"}
	for _, driver := range drivers {
		c, err := b.newCrowd(contestant{ours, driver}, locks, pool)
		if err != nil {
			return err
		}
		r, err := c.holdAll(ctx, b.limit, b.watch)
		seen := c.watch.max()
		closeErr := c.Close()
		failure, err := incomplete(ctx, b.limit, err)
		if err := errors.Join(err, closeErr); err != nil {
			return fmt.Errorf("%v: %w", c.contestant, err)
		}
		time.set(driver, cell{value: r.took.Seconds() * 1000, format: "%.0f", failure: failure, bound: completes})
		connections.set(driver, cell{value: float64(seen), format: "%.0f", failure: failure, bound: atMost(pool)})
		memory.set(driver, cell{value: r.memory, format: "%.0f", failure: failure})
	}
	b.report.rows = append(b.report.rows, time, connections, memory)
	return nil
}

// A holding is how it went.
type holding struct {
	took   time.Duration // without the time in which the locks are just held
	memory float64       // of each lock
}

func (c *crowd) holdAll(ctx context.Context, limit, hold time.Duration) (h holding, err error) {
	ctx, cancel := context.WithTimeout(ctx, limit+hold)
	defer cancel()
	if err := c.usePool(ctx); err != nil {
		return h, err
	}
	locks := make([]*advisory.Lock, c.members)
	key := newKeys()
	before := memoryInUse()
	start := time.Now()
	err = c.each(ctx, func(ctx context.Context, i int) (err error) {
		if locks[i], err = advisory.Acquire(ctx, c.db, advisory.ID(key+int64(i))); err != nil {
			return err
		}
		return c.usePool(ctx)
	})
	h.took = time.Since(start)
	if err == nil {
		h.memory = float64(memoryInUse()-before) / float64(c.members)
		time.Sleep(hold) // they are checked meanwhile
	}
	start = time.Now()
	releaseErr := c.each(ctx, func(ctx context.Context, i int) error {
		if locks[i] == nil {
			return nil
		}
		var useErr error
		if err == nil {
			useErr = c.usePool(ctx)
		}
		return errors.Join(useErr, locks[i].Release())
	})
	h.took += time.Since(start)
	return h, errors.Join(err, releaseErr)
}

// memoryInUse is what the program needs for its data and its goroutines.
func memoryInUse() int64 {
	runtime.GC()
	runtime.GC() // what has a finalizer goes the second time
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc + m.StackInuse)
}
