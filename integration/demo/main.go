// Demo shows what the advisory package promises, on a real PostgreSQL and with
// real processes. It finds or starts a server, plays one act after the other,
// and ends with a table of the promises. Its exit status is 0 only if every one
// of them was kept.
//
//	go run ./demo
//
// The workers are processes of this same binary. They share nothing but the
// database: see worker.go. The command advisory, of the last act, is compiled
// from its source: see command_build.go.
package main

import (
	"context"
	"crypto/rand"
	"database/sql"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"syscall"
	"time"

	// Both register themselves with database/sql.
	_ "github.com/jackc/pgx/v5/stdlib"
	_ "github.com/lib/pq"

	"github.com/pgadvisory/advisory/integration/internal/pgtest"
)

// cleanupTimeout bounds what is done after the acts, also after Ctrl-C.
const cleanupTimeout = 10 * time.Second

// breakEnv makes the acts leave out their locks, so that a test can see the demo
// notice it.
const breakEnv = "DEMO_BREAK"

type options struct {
	processes  int
	goroutines int
	updates    int
	rows       int
	timeout    time.Duration

	holderTimeout time.Duration

	broken bool
}

func main() {
	if os.Getenv(workerEnv) != "" {
		os.Exit(work())
	}
	o := parseFlags()
	if err := run(o); err != nil {
		fmt.Fprintln(os.Stderr, "demo:", strings.ReplaceAll(err.Error(), "pgtest: ", ""))
		if errors.As(err, new(noServerError)) && !errors.Is(err, pgtest.ErrNoServer) {
			fmt.Fprintln(os.Stderr, pgtest.Help)
		}
		os.Exit(1)
	}
}

func parseFlags() options {
	var o options
	flag.IntVar(&o.processes, "processes", 4, "worker processes in each act")
	flag.IntVar(&o.goroutines, "goroutines", 8, "goroutines in each process of act 1")
	flag.IntVar(&o.updates, "updates", 2000, "updates of the shared number in act 1, in all")
	flag.IntVar(&o.rows, "rows", 200_000, "rows of the table that act 2 indexes")
	flag.DurationVar(&o.holderTimeout, "holder-timeout", 3*time.Second, "how long a frozen leader of act 3 keeps its jobs")
	flag.DurationVar(&o.timeout, "timeout", 30*time.Second, "how long the acts may take together")
	flag.Usage = func() {
		out := flag.CommandLine.Output()
		fmt.Fprintf(out, "Usage: demo [flags]\n\n"+
			"Demo shows what PostgreSQL advisory locks are good for, on a PostgreSQL of its\n"+
			"own, or on the one that %s names, where it works in a\n"+
			"schema of its own and leaves nothing behind. It exits with status 1 if one of\n"+
			"the promises it shows was broken.\n\n", pgtest.EnvDSN)
		flag.PrintDefaults()
	}
	flag.Parse()
	o.broken = os.Getenv(breakEnv) != ""
	switch {
	case flag.NArg() > 0:
		usageError("unexpected argument %q", flag.Arg(0))
	case o.processes < 1 || o.goroutines < 1 || o.updates < 1 || o.rows < 1:
		usageError("numbers must be positive")
	case o.timeout <= 0:
		usageError("-timeout must be positive")
	case o.holderTimeout < time.Second:
		usageError("-holder-timeout must be a second at least")
	}
	return o
}

func usageError(format string, args ...any) {
	fmt.Fprintf(os.Stderr, "demo: "+format+"\n", args...)
	flag.Usage()
	os.Exit(2)
}

var (
	errInterrupted = errors.New("interrupted")
	errBroken      = errors.New("not every promise was kept")
)

// A noServerError is why there is no server to play on.
type noServerError struct{ error }

func (e noServerError) Unwrap() error { return e.error }

func run(o options) (err error) {
	// A reader that has seen enough (demo | head) must not end us before we have
	// cleaned up: with this, writing to it is just an error.
	signal.Notify(make(chan os.Signal, 1), syscall.SIGPIPE)
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	// The first Ctrl-C cleans up; the second one does not wait for that.
	context.AfterFunc(ctx, stop)

	tool := buildTool(ctx)
	defer func() { err = errors.Join(err, tool.remove()) }()
	s, closeStage, err := openStage(ctx, o)
	if err != nil {
		if ctx.Err() != nil {
			return errInterrupted
		}
		return err
	}
	defer func() { err = errors.Join(err, closeStage()) }()

	s.tool = tool
	s.tool.wait(func() { s.view.title("Compiling the command advisory …") })
	if ctx.Err() != nil {
		return errInterrupted
	}

	// Finding a server may have meant to download one. That does not count.
	start := time.Now()
	playCtx, cancel := context.WithTimeoutCause(ctx, o.timeout, fmt.Errorf("not done within %v", o.timeout))
	defer cancel()

	s.view.title(fmt.Sprintf("Advisory locks, %s of one program, PostgreSQL %s",
		plural(o.processes, "process"), s.version))
	var promises []promise
	for i, a := range acts {
		s.view.act(i+1, a.title())
		kept, err := a.play(playCtx, s)
		if ctx.Err() != nil {
			s.view.clear()
			return errInterrupted
		}
		if playCtx.Err() != nil {
			err = context.Cause(playCtx)
		}
		if err != nil {
			s.view.clear()
			kept = append(kept, promise{text: fmt.Sprintf("Act %d comes to its end", i+1), numbers: err.Error()})
		}
		promises = append(promises, kept...)
	}
	if s.view.summary(promises, time.Since(start)) < len(promises) {
		return errBroken
	}
	return nil
}

// A stage is what the acts share.
type stage struct {
	options
	view    *view
	db      *sql.DB // the demo's own, for preparing and checking
	dsn     string  // for the workers
	schema  string  // holds everything the demo creates
	version string  // of the server
	tool    *tool   // the command advisory
}

// openStage finds or starts a server and makes a schema on it.
func openStage(ctx context.Context, o options) (*stage, func() error, error) {
	s := &stage{options: o, view: newView(os.Stdout), schema: "advisory_demo_" + strings.ToLower(rand.Text())}
	if os.Getenv(pgtest.EnvDSN) != "" {
		s.view.title("Connecting to the PostgreSQL that " + pgtest.EnvDSN + " names …")
	} else {
		s.view.title("Starting a PostgreSQL of its own (without one installed, a download) …")
	}

	connections := max(o.processes, minProcesses)*max(o.goroutines+1, leaderConnections) + 20
	server, err := pgtest.Start(ctx, pgtest.Setting("max_connections", strconv.Itoa(connections)))
	if err != nil {
		return nil, nil, noServerError{err}
	}
	closeStage := server.Stop

	// Both drivers send what they do not know themselves to the server, as a
	// setting of the session.
	s.dsn, err = pgtest.WithParam(server.DSN(), "search_path", s.schema)
	if err == nil {
		s.db, err = sql.Open("pgx", s.dsn)
	}
	if err == nil {
		s.db.SetMaxOpenConns(2)
		closeStage = func() error { return errors.Join(s.clean(), s.db.Close(), server.Stop()) }
		err = s.db.QueryRowContext(ctx, "SELECT split_part(current_setting('server_version'), ' ', 1)").Scan(&s.version)
	}
	if err == nil {
		_, err = s.db.ExecContext(ctx, "CREATE SCHEMA "+s.schema)
	}
	if err != nil {
		return nil, nil, errors.Join(err, closeStage())
	}
	return s, closeStage, nil
}

// clean removes the schema. The workers have ended.
func (s *stage) clean() error {
	ctx, cancel := context.WithTimeout(context.Background(), cleanupTimeout)
	defer cancel()
	// A statement goes on in the server after its client was interrupted, until
	// the server has something to say to it.
	if _, err := s.db.ExecContext(ctx, `
		SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = $1`, s.schema); err != nil {
		return fmt.Errorf("end what is left of the workers' sessions: %w", err)
	}
	if _, err := s.db.ExecContext(ctx, "DROP SCHEMA IF EXISTS "+s.schema+" CASCADE"); err != nil {
		return fmt.Errorf("remove schema %s: %w", s.schema, err)
	}
	return nil
}

// lockName returns a name for a lock that this run of the demo has for itself,
// also where another one runs on the same server.
func (s *stage) lockName(what string) string {
	return "advisory-demo/" + s.schema + "/" + what
}
