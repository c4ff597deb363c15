package main

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"time"

	"github.com/pgadvisory/advisory"
)

// lockWith takes the lock of key by c, runs body, and releases it. The recipe waits in
// the server's queue here.
func (c *crowd) lockWith(ctx context.Context, key int64, body func(context.Context) error) error {
	if c.Impl == ours {
		return advisory.WithLock(ctx, c.db, advisory.ID(key), body)
	}
	lock, err := recipeLocker{c.db, true}.worker(ctx, key)
	if err != nil {
		return err
	}
	return lock(ctx, body)
}

// waiters has 500 goroutines want one lock, on a pool of 3 connections that the holder
// needs one of, too.
func waiters(b *bench, ctx context.Context, w *workload) error {
	const members, pool = 500, 3
	for _, impl := range []string{ours, recipe} {
		took := row{workload: w, measure: impl + ", ms until all had it"}
		connections := row{workload: w, measure: impl + ", connections"}
		for _, driver := range drivers {
			c, err := b.newCrowd(contestant{impl, driver}, members, pool)
			if err != nil {
				return err
			}
			key, had := newKeys(), 0
			limited, cancel := context.WithTimeout(ctx, b.limit)
			start := time.Now()
			err = c.each(limited, func(ctx context.Context, _ int) error {
				return c.lockWith(ctx, key, func(ctx context.Context) error {
					had++
					return c.usePool(ctx)
				})
			})
			elapsed := time.Since(start)
			cancel()
			seen := c.watch.max()
			closeErr := c.Close()
			failure, err := incomplete(ctx, b.limit, err)
			if err == nil && failure == "" && had != members {
				err = fmt.Errorf("%d locks, but the number that they protect is %d", members, had)
			}
			if err := errors.Join(err, closeErr); err != nil {
				return fmt.Errorf("%v: %w", c.contestant, err)
			}
			completeBound, poolBound := completes, atMost(pool)
			if impl != ours {
				completeBound, poolBound = bound{}, bound{}
			}
			took.set(driver, cell{value: elapsed.Seconds() * 1000, format: "%.0f", failure: failure, bound: completeBound})
			connections.set(driver, cell{value: float64(seen), format: "%.0f", failure: failure, bound: poolBound})
		}
		b.report.rows = append(b.report.rows, took, connections)
	}
	return nil
}

func remoteKey(b *bench, ctx context.Context, w *workload) error  { return remote(b, ctx, w, 1) }
func remoteKeys(b *bench, ctx context.Context, w *workload) error { return remote(b, ctx, w, 1000) }

// remote has 1,000 goroutines wait for keys that another process holds, and looks at
// what the waiting costs; and then, how long it takes until all of them had their lock.
func remote(b *bench, ctx context.Context, w *workload, keys int) error {
	const members = 1000
	for _, impl := range []string{ours, recipe} {
		connections := row{workload: w, measure: impl + ", connections"}
		cpu := row{workload: w, measure: impl + ", % of a core that the server needs"}
		drain := row{workload: w, measure: impl + ", ms from the release until all had it"}
		for _, driver := range drivers {
			c, err := b.newCrowd(contestant{impl, driver}, members, poolSize)
			if err != nil {
				return err
			}
			r, err := b.remoteWait(ctx, c, keys)
			if err := errors.Join(err, c.Close()); err != nil {
				return fmt.Errorf("%v: %w", c.contestant, err)
			}
			failure, err := incomplete(ctx, b.limit, r.err)
			if err != nil {
				return fmt.Errorf("%v: %w", c.contestant, err)
			}
			connections.set(driver, cell{value: float64(r.connections), format: "%.0f"})
			cpu.set(driver, r.cpu)
			drain.set(driver, cell{value: r.drain.Seconds() * 1000, format: "%.0f", failure: failure})
		}
		b.report.rows = append(b.report.rows, connections, cpu, drain)
	}
	return nil
}

type remoteResult struct {
	connections int
	cpu         cell
	drain       time.Duration
	err         error // of the crowd
}

func (b *bench) remoteWait(ctx context.Context, c *crowd, keys int) (r remoteResult, err error) {
	holder, err := openPool(c.Driver, b.direct.Postgres, 1)
	if err != nil {
		return r, err
	}
	defer holder.Close()
	conn, err := holder.Conn(ctx)
	if err != nil {
		return r, err
	}
	defer conn.Close()
	key := newKeys()
	all := fmt.Sprintf("generate_series(%d::bigint, %d) AS key", key, key+int64(keys)-1)
	if _, err := conn.ExecContext(ctx, "SELECT count(pg_advisory_lock(key)) FROM "+all); err != nil {
		return r, err
	}

	waiting, cancel := context.WithTimeout(ctx, b.limit+2*b.watch)
	defer cancel()
	ended := make(chan error, 1)
	go func() {
		ended <- c.each(waiting, func(ctx context.Context, i int) error {
			return c.lockWith(ctx, key+int64(i%keys), func(context.Context) error { return nil })
		})
	}()
	select {
	case <-time.After(b.watch / 2): // they settle
	case err := <-ended:
		return r, errors.Join(errors.New("the waiting came to an end"), err)
	}
	if r.cpu, err = b.serverCPU(ctx, b.watch); err != nil {
		return r, err
	}
	r.connections = c.watch.max()
	start := time.Now()
	if _, err := conn.ExecContext(ctx, "SELECT pg_advisory_unlock_all()"); err != nil {
		return r, err
	}
	r.err = <-ended
	r.drain = time.Since(start)
	return r, nil
}

// A watch counts the connections of a process, as the server sees them.
type watch struct {
	cancel context.CancelFunc
	most   chan int
}

// watchConnections watches the connections that have the application name.
func watchConnections(admin *sql.DB, name string) *watch {
	ctx, cancel := context.WithCancel(context.Background())
	w := &watch{cancel, make(chan int, 1)}
	go func() {
		most := 0
		for ctx.Err() == nil {
			var n int
			err := admin.QueryRow("SELECT count(*) FROM pg_stat_activity WHERE application_name = $1", name).Scan(&n)
			if err == nil {
				most = max(most, n)
			}
			select {
			case <-ctx.Done():
			case <-time.After(25 * time.Millisecond):
			}
		}
		w.most <- most
	}()
	return w
}

// max ends the watch and returns the largest number that it saw.
func (w *watch) max() int {
	w.cancel()
	most := <-w.most
	w.most <- most
	return most
}

func (w *watch) stop() { w.cancel() }
