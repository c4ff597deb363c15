// Bench measures what a lock costs: this package's, against two raw statements, the
// recipe that people copy, and other libraries, side by side in one run. The
// contestants take turns, in many short rounds, and what is compared is the medians of
// their rounds: so that whatever else the machine does meets all of them alike.
//
//	go run ./bench -out bench -docs ..   # everything, and write it down
//	go run ./bench -run OneKey           # some workloads, and only print
//	go run ./bench -run OneKey -impl advisory -cpuprofile cpu.out
//
// It prints a table of ratios, and with -out writes it as Markdown (results.md), draws
// it (results.svg) and leaves the samples in the format of Go's benchmarks, for
// benchstat (results.txt). With -docs it brings the tables in README.md and docs/performance.md up
// to date.
//
// PostgreSQL is found as by the tests; Redis and etcd are started where their servers
// are installed ("apt-get install redis-server etcd-server"), and left out elsewhere.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"regexp"
	"runtime/pprof"
	"syscall"
	"time"

	// Both register themselves with database/sql.
	_ "github.com/jackc/pgx/v5/stdlib"
	_ "github.com/lib/pq"
)

// options say how much is measured.
type options struct {
	round  time.Duration // how long one round of a throughput takes
	rounds int
	run    *regexp.Regexp // workloads
	impl   *regexp.Regexp // contestants of a throughput
	quick  bool
	check  bool
	out    string // directory, "" for none
	docs   string // directory, "" for none

	cpuProfile string // file, "" for none

	handOffs int           // samples of the time between two holders
	watch    time.Duration // how long waiters are watched
	limit    time.Duration // for what may not come to its end
}

func main() {
	if job := os.Getenv(childEnv); job != "" {
		os.Exit(childMain(job))
	}
	o, err := parseFlags(os.Args[1:])
	if err != nil {
		if errors.Is(err, flag.ErrHelp) {
			os.Exit(0)
		}
		os.Exit(2)
	}
	if err := run(o); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func parseFlags(args []string) (options, error) {
	o := options{handOffs: 300, watch: 3 * time.Second, limit: 10 * time.Second}
	fs := flag.NewFlagSet("bench", flag.ContinueOnError)
	fs.DurationVar(&o.round, "round", 100*time.Millisecond, "how long a round takes")
	fs.IntVar(&o.rounds, "rounds", 30, "rounds of each contestant")
	run := fs.String("run", "", "run the workloads whose `name` matches this regular expression")
	impl := fs.String("impl", "", "let those take part in a throughput whose `name` matches this regular expression")
	fs.BoolVar(&o.quick, "quick", false, "short and rough: to see whether it works")
	fs.BoolVar(&o.check, "check", false, "exit with status 1 if a target is not reached")
	fs.StringVar(&o.out, "out", "", "write results.md, results.svg and results.txt to this `directory`")
	fs.StringVar(&o.docs, "docs", "", "update the rows of README.md and docs/performance.md in this `directory`")
	fs.StringVar(&o.cpuProfile, "cpuprofile", "", "write a CPU profile of this process to this `file`")
	fs.Usage = func() {
		fmt.Fprintln(fs.Output(), "Usage: bench [flags]\n\nFlags:")
		fs.PrintDefaults()
		fmt.Fprintln(fs.Output(), "\nWorkloads:")
		for _, w := range workloads {
			fmt.Fprintf(fs.Output(), "  %-18s %s\n", w.name, w.title)
		}
	}
	if err := fs.Parse(args); err != nil {
		return o, err
	}
	var err error
	if o.run, err = regexp.Compile(*run); err == nil {
		o.impl, err = regexp.Compile(*impl)
	}
	if err == nil {
		switch {
		case fs.NArg() > 0:
			err = fmt.Errorf("unexpected argument %q", fs.Arg(0))
		case o.round <= 0 || o.rounds <= 0:
			err = errors.New("-round and -rounds must be positive")
		}
	}
	if err != nil {
		fmt.Fprintln(fs.Output(), err)
		fs.Usage()
		return o, err
	}
	if o.quick {
		o.round, o.rounds = 60*time.Millisecond, 3
		o.handOffs, o.watch, o.limit = 40, 500*time.Millisecond, 4*time.Second
	}
	return o, nil
}

// makeWritable makes the directory, unless it is "", and returns an error if files cannot be made in it:
// before the run, which takes minutes.
func makeWritable(dir string) error {
	if dir == "" {
		return nil
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return fmt.Errorf("-out: %w", err)
	}
	f, err := os.CreateTemp(dir, ".bench")
	if err != nil {
		return fmt.Errorf("-out: %w", err)
	}
	return errors.Join(f.Close(), os.Remove(f.Name()))
}

func run(o options) (err error) {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	// The first Ctrl-C cleans up; the second one does not wait for that.
	context.AfterFunc(ctx, stop)

	if err := makeWritable(o.out); err != nil {
		return err
	}
	start := time.Now()
	b, err := newBench(ctx, o)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, b.close()) }()
	if o.cpuProfile != "" {
		f, err := os.Create(o.cpuProfile)
		if err != nil {
			return err
		}
		defer f.Close()
		if err := pprof.StartCPUProfile(f); err != nil {
			return err
		}
		defer pprof.StopCPUProfile()
	}
	if err := b.all(ctx); err != nil {
		return err
	}
	r := &b.report
	r.took = time.Since(start)
	r.print(os.Stdout)
	if o.out != "" {
		if err := r.write(o.out); err != nil {
			return err
		}
	}
	if o.docs != "" {
		if err := r.updateDocuments(o.docs); err != nil {
			return err
		}
	}
	if len(r.failures) > 0 {
		return fmt.Errorf("%d did not run", len(r.failures))
	}
	if n := r.unmet(); o.check && n > 0 {
		return fmt.Errorf("%d targets are not reached", n)
	}
	return nil
}
