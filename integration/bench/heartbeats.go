package main

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"time"

	"github.com/pgadvisory/advisory"
)

// heartbeats has 200 processes hold one lock each, with the default Heartbeat, on a server that has
// 9,000 other locks. The processes are pools of this one.
func heartbeats(b *bench, ctx context.Context, w *workload) error {
	const sessions, others = 200, 9000
	conn, err := b.admin.Conn(ctx)
	if err != nil {
		return err
	}
	defer conn.Close()
	if _, err := conn.ExecContext(ctx, "SELECT pg_advisory_lock(g) FROM generate_series(1, $1::int) g", others); err != nil {
		return err
	}
	defer conn.ExecContext(context.Background(), "SELECT pg_advisory_unlock_all()") // or the server ends
	row := row{workload: w, measure: "% of a core that the server needs"}
	for _, driver := range drivers {
		c, err := b.holdByMany(ctx, driver, sessions)
		if err != nil {
			return fmt.Errorf("%s: %w", driver, err)
		}
		if c.failure == "" {
			c.bound = atMost(10)
		}
		row.set(driver, c)
	}
	b.report.rows = append(b.report.rows, row)
	return nil
}

// holdByMany has so many pools hold a lock each, and returns what that costs the server.
func (b *bench) holdByMany(ctx context.Context, driver string, sessions int) (c cell, err error) {
	var pools []*sql.DB
	var locks []*advisory.Lock
	defer func() {
		for _, l := range locks {
			err = errors.Join(err, l.Release())
		}
		for _, db := range pools {
			err = errors.Join(err, db.Close())
		}
	}()
	for range sessions {
		db, err := openPool(driver, b.direct.Postgres, 1)
		if err != nil {
			return c, err
		}
		pools = append(pools, db)
		lock, err := advisory.Acquire(ctx, db, advisory.ID(newKeys()))
		if err != nil {
			return c, err
		}
		locks = append(locks, lock)
	}
	if c, err = b.serverCPU(ctx, max(b.watch, 10*time.Second*time.Duration(b.rounds)/30)); err != nil {
		return c, err
	}
	for _, l := range locks {
		if err := context.Cause(l.Context()); err != nil {
			return c, err
		}
	}
	return c, nil
}
