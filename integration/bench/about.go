package main

import (
	"context"
	"fmt"
	"runtime"
	"time"
)

// describe notes what is measured on, and how.
func (b *bench) describe(ctx context.Context) error {
	var version string
	if err := b.admin.QueryRowContext(ctx, "SELECT current_setting('server_version')").Scan(&version); err != nil {
		return err
	}
	b.report.about = append([]string{
		fmt.Sprintf("%s, %s/%s, %d cores", runtime.Version(), runtime.GOOS, runtime.GOARCH, runtime.NumCPU()),
		"PostgreSQL " + version,
	}, b.report.about...)
	b.report.about = append(b.report.about, fmt.Sprintf("%d rounds of %v", b.rounds, b.round))

	if b.delayed.Postgres != "" {
		near, err := b.roundTrip(ctx, b.direct)
		if err != nil {
			return err
		}
		far, err := b.roundTrip(ctx, b.delayed)
		if err != nil {
			return err
		}
		b.report.note("Everything goes over loopback TCP. \"1 ms away\" is a proxy in between: a round trip of %v instead of %v.",
			far.Round(10*time.Microsecond), near.Round(10*time.Microsecond))
	}
	for _, n := range []string{
		"A ratio is that of the medians of all rounds. The contestants take turns, round by round.",
		"*two prepared statements*: `SELECT WHERE pg_try_advisory_lock($1)` and `SELECT WHERE pg_advisory_unlock($1)`, prepared, on a connection that does nothing else.",
		"*two round trips each*: what 64 goroutines could do if they waited for the network alone.",
		"*behind otelsql*: the driver is wrapped, and makes a span of each statement that the program asks for.",
		"*recipe*: the two queries with a parameter that people copy, but both on one connection, taken for each lock from a pool of " + fmt.Sprint(poolSize) + ". Where the lock is contended it does not sleep between tries, but blocks in `pg_advisory_lock($1)`, the fastest that it could do. Our pool is as large.",
		"*goose* is here where the lock is free. Where it is not, goose sleeps between tries, for 5 s by default and for 1 s at least.",
		"*redislock* is told to try again every millisecond, where its default is not to wait, and has a connection for each goroutine.",
		"*etcd*: one session for each goroutine, opened beforehand. It writes every lock to its log on disk.",
		"The \"processes\" of the hand-off and of the waiting for another process are pools of one program that know nothing of each other. The other 4 processes are real ones.",
	} {
		b.report.note("%s", n)
	}
	return nil
}

// roundTrip is how long the server's answer takes.
func (b *bench) roundTrip(ctx context.Context, s servers) (time.Duration, error) {
	db, err := openPool(pgx, s.Postgres, 1)
	if err != nil {
		return 0, err
	}
	defer db.Close()
	var times []time.Duration
	for range 50 {
		start := time.Now()
		if _, err := db.ExecContext(ctx, "SELECT 1"); err != nil {
			return 0, err
		}
		times = append(times, time.Since(start))
	}
	return percentile(times, 50), nil
}
