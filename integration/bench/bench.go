package main

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"strings"
	"time"

	"github.com/pgadvisory/advisory/integration/internal/pgtest"
)

// A bench is one run: the servers that it measures on, and what has come out.
type bench struct {
	options
	postgres *pgtest.Server
	admin    *sql.DB // for looking at the server from outside
	direct   servers
	delayed  servers // the same, behind delay
	stops    []func() error

	report report
}

// servers are the addresses of what the contestants run on, "" where there is none.
type servers struct {
	Postgres string // DSN
	Redis    string // host:port
	Etcd     string // host:port
}

// networkDelay is what the delayed servers' answers take longer: half of it on the way
// there, half on the way back.
const networkDelay = time.Millisecond

func newBench(ctx context.Context, o options) (b *bench, err error) {
	b = &bench{options: o}
	defer func() {
		if err != nil {
			err = errors.Join(err, b.close())
		}
	}()
	if b.postgres, err = pgtest.Start(ctx, pgtest.Setting("max_connections", "250")); err != nil {
		return b, err
	}
	b.stops = append(b.stops, b.postgres.Stop)
	b.direct.Postgres = b.postgres.DSN()
	if b.admin, err = sql.Open("pgx", b.direct.Postgres); err != nil {
		return b, err
	}
	b.stops = append(b.stops, b.admin.Close)
	b.admin.SetMaxOpenConns(2)
	if err := b.startPeers(ctx); err != nil {
		return b, err
	}
	if err := b.startDelays(ctx); err != nil {
		return b, err
	}
	return b, b.describe(ctx)
}

// startPeers starts the servers of the other libraries, where they are installed.
func (b *bench) startPeers(ctx context.Context) error {
	for _, p := range []struct {
		start   func(context.Context) (*peer, error)
		addr    *string
		library string
	}{
		{startRedis, &b.direct.Redis, "redislock"},
		{startEtcd, &b.direct.Etcd, "etcd's Mutex"},
	} {
		s, err := p.start(ctx)
		if errors.Is(err, exec.ErrNotFound) {
			b.report.note("%s is left out: %v.", p.library, err)
			fmt.Fprintf(os.Stderr, "bench: %s is left out: %v\n", p.library, err)
			continue
		}
		if err != nil {
			return err
		}
		b.stops = append(b.stops, s.stop)
		*p.addr = s.addr
		b.report.about = append(b.report.about, s.version)
	}
	return nil
}

// startDelays puts a delay in front of each server.
func (b *bench) startDelays(ctx context.Context) error {
	behind := func(target string) (string, error) {
		if target == "" {
			return "", nil
		}
		addr, stop, err := startDelay(ctx, target, networkDelay/2)
		if err == nil {
			b.stops = append(b.stops, stop)
		}
		return addr, err
	}
	host := b.postgres.Host()
	if strings.HasPrefix(host, "/") {
		b.report.note("Nothing is delayed: PostgreSQL is on a Unix-domain socket.")
		return nil
	}
	addr, err := behind(hostPort(host, b.postgres.Port()))
	if err != nil {
		return err
	}
	if b.delayed.Postgres, err = withAddress(b.direct.Postgres, addr); err != nil {
		return err
	}
	if b.delayed.Redis, err = behind(b.direct.Redis); err != nil {
		return err
	}
	b.delayed.Etcd, err = behind(b.direct.Etcd)
	return err
}

// close ends what the run has started.
func (b *bench) close() error {
	var errs []error
	for i := len(b.stops) - 1; i >= 0; i-- {
		errs = append(errs, b.stops[i]())
	}
	b.stops = nil
	return errors.Join(errs...)
}

// A workload is one thing that programs do with locks.
type workload struct {
	name  string // for -run and benchstat
	title string
	run   func(b *bench, ctx context.Context, w *workload) error

	// The rest is for throughputs.
	processes  int // 0: in this one
	goroutines int // of each process
	oneKey     bool
	delayed    bool
	traced     bool // behind otelsql
	inChart    bool
}

// workloads are all of them, in the order of the table.
var workloads = []*workload{
	{name: "OneGoroutine", title: "1 goroutine", run: throughput, goroutines: 1, inChart: true},
	{name: "OneGoroutineTraced", title: "1 goroutine behind otelsql", run: throughput, goroutines: 1, traced: true},
	{name: "Keys", title: "64 goroutines, 64 keys", run: throughput, goroutines: 64, inChart: true},
	{name: "KeysDelayed", title: "64 goroutines, 64 keys, 1 ms away", run: throughput, goroutines: 64, delayed: true, inChart: true},
	{name: "OneKey", title: "32 goroutines, one key", run: throughput, goroutines: 32, oneKey: true, inChart: true},
	{name: "Processes", title: "4 processes × 8, one key", run: throughput, processes: 4, goroutines: 8, oneKey: true, inChart: true},
	{name: "HandOff", title: "hand-off between processes", run: handOff},
	{name: "Heartbeats", title: "200 sessions hold, 9,000 locks on the server", run: heartbeats},
	{name: "Held", title: "1,000 locks held, pool of 2", run: held},
	{name: "Waiters", title: "500 waiters on one key, pool of 3", run: waiters},
	{name: "RemoteKey", title: "1,000 wait for another process's key", run: remoteKey},
	{name: "RemoteKeys", title: "1,000 wait for another process's 1,000 keys", run: remoteKeys},
	{name: "Allocs", title: "allocations, uncontended", run: allocs},
}

// all runs the workloads that were asked for. What fails is in the report, and does not
// keep the others from running.
func (b *bench) all(ctx context.Context) error {
	for _, w := range workloads {
		if !b.options.run.MatchString(w.name) {
			continue
		}
		start := time.Now()
		fmt.Fprintf(os.Stderr, "%-46s", w.title)
		err := w.run(b, ctx, w)
		if ctx.Err() != nil {
			return errors.New("interrupted")
		}
		if err != nil {
			b.report.failed("%s: %v", w.title, err)
		}
		fmt.Fprintf(os.Stderr, "%6.1f s\n", time.Since(start).Seconds())
	}
	return nil
}

// newKeys returns the first of 10,000 keys that nobody else uses.
func newKeys() int64 { return rand.Int64N(1<<48) * 10_000 }
