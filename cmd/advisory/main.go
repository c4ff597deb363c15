// Command advisory runs commands under PostgreSQL advisory locks: flock for a database.
//
//	advisory run nightly-report -- ./report.sh
//
// It is a thin layer over the package github.com/pgadvisory/advisory. See README.md, or
// "advisory help".
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/spf13/cobra"
)

// Exit statuses. Those from 64 on are the ones of sysexits.h, and those from 126 on the ones of shells.
const (
	exitFailed      = 1   // "break" was not confirmed, or ended nothing
	exitUsage       = 64  // a flag or an argument is wrong
	exitNoDatabase  = 69  // the database cannot be reached, or refuses
	exitLost        = 70  // the lock was lost while the command ran
	exitHeld        = 75  // another holds the lock
	exitCannotStart = 126 // the command cannot be started
	exitNotFound    = 127 // there is no such command
	exitSignal      = 128 // plus the number of the signal that ended the command, or the wait
)

// An exitError is an error with the exit status that it stands for. Every other error is one of usage.
type exitError struct {
	code int
	err  error // nil: it has been reported, or there is nothing to say
}

func (e *exitError) Error() string {
	if e.err == nil {
		return fmt.Sprintf("exit status %d", e.code)
	}
	return e.err.Error()
}

func (e *exitError) Unwrap() error { return e.err }

// failed returns err as an error of the database, unless it has an exit status already.
func failed(err error) error {
	if err == nil || errors.As(err, new(*exitError)) {
		return err
	}
	return &exitError{exitNoDatabase, err}
}

func main() {
	if isGuard() {
		guard()
		return
	}
	os.Exit(execute(context.Background(), os.Args[1:], os.Stdin, os.Stdout, os.Stderr))
}

// execute runs the command line args, and returns the exit status.
func execute(ctx context.Context, args []string, stdin io.Reader, stdout, stderr io.Writer) int {
	root := newRoot()
	root.SetArgs(args)
	root.SetIn(stdin)
	root.SetOut(stdout)
	root.SetErr(stderr)
	cmd, err := root.ExecuteContextC(ctx)
	if err == nil {
		return 0
	}
	var exit *exitError
	if !errors.As(err, &exit) {
		exit = &exitError{exitUsage, fmt.Errorf("%w (see %s --help)", err, cmd.CommandPath())}
	}
	if exit.err != nil {
		fmt.Fprintln(stderr, message(exit.err.Error()))
	}
	return exit.code
}

// message returns text as one line that begins with the name of the program.
func message(text string) string { return "advisory: " + oneLine(text) }

// oneLine returns text without the name of the program, as one line. pgx repeats itself where it has
// tried to connect with and without TLS.
func oneLine(text string) string {
	var lines []string
	for line := range strings.Lines(strings.TrimPrefix(text, "advisory: ")) {
		line = strings.TrimSpace(line)
		if last := len(lines) - 1; last >= 0 && strings.HasPrefix(line, lines[last]) {
			lines[last] = line
		} else if line != "" {
			lines = append(lines, line)
		}
	}
	return strings.Join(lines, " ")
}

// newRoot returns the command line: every help text, man page and completion is made from it.
func newRoot() *cobra.Command {
	var c connection
	root := &cobra.Command{
		Use:   "advisory",
		Short: "Run commands under PostgreSQL advisory locks",
		Long: `advisory is flock for PostgreSQL: it runs a command on one machine at a time, of all
that use the same database.

    advisory run nightly-report -- ./report.sh

A name stands for the lock that advisory.Name of the Go package makes, so that this
command and Go programs exclude each other. "advisory key" prints what other programs
call PostgreSQL with.

The database is the one that --dsn-file or DATABASE_URL names, or else libpq's
environment: PGHOST, PGPORT, PGUSER, PGDATABASE, PGPASSWORD, PGPASSFILE, PGSERVICE,
PGSSLMODE and so on. Unless told otherwise, advisory connects only to a server that can
write (target_session_attrs=read-write), because the locks of a standby exclude nobody on
the primary, and gives up after 10 s (connect_timeout).

A session-level lock needs a session: behind PgBouncer in transaction mode there is none.
"advisory check" tells.`,
		Version:       version(),
		SilenceErrors: true,
		SilenceUsage:  true,
		Args:          cobra.NoArgs,
		RunE:          func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	root.PersistentFlags().StringVar(&c.dsnFile, "dsn-file", "", "read the connection string from `FILE`")
	root.PersistentFlags().StringVar(&c.dsn, "dsn", "", "connection `STRING`; others see it in ps, so prefer --dsn-file or DATABASE_URL")
	root.MarkFlagsMutuallyExclusive("dsn", "dsn-file")
	root.AddCommand(newRun(&c), newLs(&c), newHolders(&c), newCheck(&c), newKey(), newBreak(&c), newMan())
	return root
}
