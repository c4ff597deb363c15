package main

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"os/exec"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/pgadvisory/advisory"
)

// runFlags are the flags of "run".
type runFlags struct {
	keyFlags
	noWait, shared, lead, token             bool
	quiet, verbose, json                    bool
	wait, atLeast, heartbeat, holderTimeout time.Duration
	grace                                   time.Duration
	conflictExitCode                        int
}

const (
	defaultHeartbeat     = time.Second
	defaultHolderTimeout = 15 * time.Second
	maxGrace             = 10 * time.Second
	// graceMargin is how long before the server's own time-out the command is dead, by default.
	graceMargin = 3 * time.Second
)

func newRun(c *connection) *cobra.Command {
	var f runFlags
	cmd := &cobra.Command{
		Use:   "run [flags] NAME... -- COMMAND [ARG...]",
		Short: "Run a command while a lock is held",
		Long: `run waits for the locks of all NAMEs, runs COMMAND while they are held, and releases
them when COMMAND, and every process of its process group, has ended. No shell is
involved: for one, COMMAND is sh -c '...'.

COMMAND has run's standard input, output and error, and a process group of its own.
Where it would be interactive, it has the terminal. It finds what it was locked by in
ADVISORY_KEY and, with --token, the fencing token in ADVISORY_TOKEN.

Signals that can be caught are forwarded to COMMAND's process group; while there is no
COMMAND yet, they end the wait. COMMAND cannot be suspended (Ctrl-Z), because it would keep
its lock. If run itself is killed, the process group is killed.

If the lock is lost, because the server was restarted, say, or cannot be reached, COMMAND's
process group gets SIGTERM at once, and SIGKILL after --grace. A server that cannot be
reached frees the lock after --holder-timeout at the earliest, and by then COMMAND is dead:
so the grace must be shorter than the holder timeout minus two heartbeats. (The lock of a
session that the server itself ends, by a restart or by pg_terminate_backend, is free
at once: for what must not happen twice even then, there is --token.)

With --lead, COMMAND runs whenever this process leads: after a loss, run waits for the lock
and starts COMMAND again, and it waits for a database that is away. COMMAND's own end ends run.

Exit status:
    that of COMMAND
    64   a flag or an argument is wrong
    69   no database, or it refuses
    70   the lock was lost while COMMAND ran
    75   another holds the lock (--no-wait, --wait): see --conflict-exit-code
    126  COMMAND cannot be started
    127  COMMAND is not found
    128+n  signal n has ended COMMAND, or the wait`,
		Example: `  # from every machine's crontab: one of them runs it, the others are content
  advisory run --no-wait --at-least 30s --conflict-exit-code 0 nightly-report -- ./report.sh

  # a migration, one deploy at a time, for at most five minutes of waiting
  advisory run --wait 5m migrations -- ./migrate up

  # one worker of all machines, and another one if this machine dies
  advisory run --lead billing -- ./worker`,
		Args: func(cmd *cobra.Command, args []string) error {
			switch at := cmd.ArgsLenAtDash(); {
			case at < 0 || at == len(args):
				return errors.New("no command: it follows after --")
			case args[at] == "":
				return errors.New("no command: it is empty")
			default:
				return nil
			}
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			at := cmd.ArgsLenAtDash()
			keys, err := f.keys(args[:at])
			if err == nil {
				err = f.check(cmd.Flags().Changed)
			}
			if err != nil {
				return err
			}
			return f.run(cmd, c, keys, args[at:])
		},
	}
	flags := cmd.Flags()
	flags.SortFlags = false
	flags.BoolVar(&f.noWait, "no-wait", false, "give up at once if another holds the lock")
	flags.DurationVar(&f.wait, "wait", 0, "give up after `DURATION` (5m, 1h30m, 500ms)")
	flags.IntVar(&f.conflictExitCode, "conflict-exit-code", exitHeld, "exit status if another holds the lock; 0 is for cron")
	flags.DurationVar(&f.atLeast, "at-least", 0, "keep the lock for `DURATION` after the grant, even if COMMAND ends sooner")
	flags.BoolVar(&f.lead, "lead", false, "run COMMAND whenever this process leads, again after a loss")
	flags.BoolVar(&f.shared, "shared", false, "take a shared lock, which excludes exclusive ones alone")
	f.keyFlags.add(flags)
	flags.BoolVar(&f.token, "token", false, "give COMMAND a fencing token, ADVISORY_TOKEN")
	flags.DurationVar(&f.heartbeat, "heartbeat", defaultHeartbeat, "check the lock every `DURATION`; a loss is noticed within two")
	flags.DurationVar(&f.holderTimeout, "holder-timeout", defaultHolderTimeout, "have the server free the lock of a machine that is silent for `DURATION`")
	flags.DurationVar(&f.grace, "grace", maxGrace, "after a loss, give COMMAND `DURATION` between SIGTERM and SIGKILL; less by default where that would be too long")
	flags.BoolVarP(&f.quiet, "quiet", "q", false, "report errors alone, and not that another holds the lock")
	flags.BoolVarP(&f.verbose, "verbose", "v", false, "report what happens")
	flags.BoolVar(&f.json, "json", false, "report what happens as JSON, a line for each event")
	cmd.MarkFlagsMutuallyExclusive("no-wait", "wait")
	cmd.MarkFlagsMutuallyExclusive("quiet", "verbose")
	cmd.MarkFlagsMutuallyExclusive("quiet", "json")
	for _, other := range []string{"no-wait", "wait", "shared", "at-least"} {
		cmd.MarkFlagsMutuallyExclusive("lead", other)
	}
	return cmd
}

// check checks the flags, and chooses the grace that is not given.
func (f *runFlags) check(given func(name string) bool) error {
	for _, d := range []struct {
		name  string
		value time.Duration
	}{{"wait", f.wait}, {"at-least", f.atLeast}, {"heartbeat", f.heartbeat}, {"holder-timeout", f.holderTimeout}} {
		if given(d.name) && d.value <= 0 {
			return fmt.Errorf("--%s: %v is not positive", d.name, d.value)
		}
	}
	if f.holderTimeout/3 < f.heartbeat {
		return fmt.Errorf("--holder-timeout: %v is under three heartbeats of %v", f.holderTimeout, f.heartbeat)
	}
	if f.conflictExitCode < 0 || f.conflictExitCode > 255 {
		return fmt.Errorf("--conflict-exit-code: %d is not between 0 and 255", f.conflictExitCode)
	}
	// A silent server frees the lock a holder timeout after the last heartbeat that it has answered. The
	// loss is noticed two heartbeats after that at the latest.
	limit := f.holderTimeout - 2*f.heartbeat
	if !given("grace") {
		f.grace = min(maxGrace, max(limit/2, limit-graceMargin))
	}
	if f.grace < 0 || f.grace >= limit {
		return fmt.Errorf("--grace: %v is not under %v (--holder-timeout minus two of --heartbeat): the command could live on when another has the lock", f.grace, limit)
	}
	return nil
}

// log returns the logger of events.
func (f *runFlags) log(cmd *cobra.Command) *slog.Logger {
	level := slog.LevelWarn
	switch {
	case f.quiet:
		level = slog.LevelError
	case f.verbose || f.json:
		level = slog.LevelInfo
	}
	return newLog(cmd.ErrOrStderr(), level, f.json)
}

// options returns what the package is asked for.
func (f *runFlags) options() []advisory.Option {
	opts := []advisory.Option{advisory.Heartbeat(f.heartbeat), advisory.HolderTimeout(f.holderTimeout)}
	if f.noWait {
		opts = append(opts, advisory.NoWait())
	}
	if f.wait > 0 {
		opts = append(opts, advisory.Timeout(f.wait))
	}
	if f.shared {
		opts = append(opts, advisory.Shared())
	}
	if f.atLeast > 0 {
		opts = append(opts, advisory.AtLeast(f.atLeast))
	}
	return opts
}

// run runs argv under the locks of keys.
func (f *runFlags) run(cmd *cobra.Command, c *connection, keys []namedKey, argv []string) error {
	log := f.log(cmd)
	if f.lead && len(keys) > 1 {
		return errors.New("--lead takes one lock")
	}
	if err := supported(); err != nil {
		return err
	}
	path, err := lookPath(argv[0])
	if err != nil {
		return err
	}
	env := append(os.Environ(), "ADVISORY_KEY="+list(keys)) // as it was before open
	db, err := c.open("advisory run "+list(keys), func(text string) { log.Warn(text) })
	if err != nil {
		return err
	}
	r := &runner{
		flags: f, keys: keys, log: log, db: db,
		path: path, argv: argv, env: env,
		tells: !f.quiet && !f.json && term.IsTerminal(int(os.Stderr.Fd())),
	}
	code, err := r.run(cmd.Context())
	closeDB(db)
	switch {
	case err == nil:
	case errors.Is(err, advisory.ErrHeld):
		log.Warn(err.Error())
	default:
		log.Error(err.Error())
	}
	if code == 0 {
		return nil
	}
	return &exitError{code: code}
}

// lookPath finds a command as a shell does.
func lookPath(name string) (string, error) {
	path, err := exec.LookPath(name)
	if err != nil {
		return "", startError(name, err)
	}
	return path, nil
}

// startError is the error of a command that cannot be started.
func startError(name string, err error) error {
	if e := (*exec.Error)(nil); errors.As(err, &e) {
		err = e.Err
	}
	if e := (*fs.PathError)(nil); errors.As(err, &e) {
		err = e.Err
	}
	switch {
	case errors.Is(err, exec.ErrNotFound):
		return &exitError{exitNotFound, fmt.Errorf("%s: command not found", name)}
	case errors.Is(err, fs.ErrNotExist):
		return &exitError{exitNotFound, fmt.Errorf("%s: %w", name, err)}
	default:
		return &exitError{exitCannotStart, fmt.Errorf("%s: %w", name, err)}
	}
}
