package main

import (
	"bufio"
	"context"
	"database/sql"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/pgadvisory/advisory"
)

func newBreak(c *connection) *cobra.Command {
	var keys keyFlags
	var yes bool
	cmd := &cobra.Command{
		Use:   "break NAME",
		Short: "End the session that holds a lock",
		Long: `break ends the server's session that holds a lock, or the sessions that share it, after asking.
That ends every lock on the session, and the transaction that is open on it. Holders of this package
know within two heartbeats, 2 s by default; those of "advisory run" then end their command.

It takes the right to end the session: one has it for those of one's own roles, and else as a
member of pg_signal_backend.`,
		RunE: func(cmd *cobra.Command, args []string) error {
			k, err := keys.one(args)
			if err != nil {
				return err
			}
			if !yes && !term.IsTerminal(int(os.Stdin.Fd())) {
				return errors.New("nobody can be asked, because standard input is no terminal: confirm with --yes")
			}
			return withDB(cmd, c, func(ctx context.Context, db *sql.DB) error {
				return breakLock(ctx, cmd, db, k, yes)
			})
		},
		ValidArgsFunction: completeNames(c),
	}
	keys.add(cmd.Flags())
	cmd.Flags().BoolVarP(&yes, "yes", "y", false, "do not ask")
	return cmd
}

func breakLock(ctx context.Context, cmd *cobra.Command, db *sql.DB, k namedKey, yes bool) error {
	rows, err := allRows(ctx, db)
	if err != nil {
		return err
	}
	out := cmd.OutOrStdout()
	holds := func(r row) bool { return r.State == "holds" && r.SQL == k.key.SQL() }
	if !slices.ContainsFunc(rows, holds) {
		fmt.Fprintf(out, "%s is free\n", k.name)
		return nil
	}
	answers := bufio.NewScanner(cmd.InOrStdin())
	for _, r := range rows {
		if !holds(r) {
			continue
		}
		if r.PID == 0 {
			return &exitError{exitFailed, fmt.Errorf("%s is held by a prepared transaction: see pg_prepared_xacts, and ROLLBACK PREPARED", k.name)}
		}
		fmt.Fprintf(out, "%s is held by session %d: application %s, user %s, address %s\n", k.name, r.PID, orDash(r.Application), orDash(r.User), orDash(r.Address))
		if others := othersOf(rows, r); len(others) > 0 {
			fmt.Fprintf(out, "The same session also holds: %s\n", strings.Join(others, ", "))
		}
		if !yes {
			fmt.Fprint(out, "End it? [y/N] ")
			if !answers.Scan() || !slices.Contains([]string{"y", "yes"}, strings.ToLower(strings.TrimSpace(answers.Text()))) {
				return &exitError{exitFailed, errors.New("nothing was ended")}
			}
		}
		ended, err := endSession(ctx, db, k.key, r)
		switch {
		case err != nil:
			return err
		case !ended:
			return &exitError{exitFailed, fmt.Errorf("session %d does not hold %s any more, or does not end; nothing is known to have been broken", r.PID, k.name)}
		}
		fmt.Fprintf(out, "session %d is ended\n", r.PID)
	}
	return nil
}

// othersOf returns the other locks that the session of r holds.
func othersOf(rows []row, r row) (others []string) {
	for _, other := range rows {
		if other.PID == r.PID && other.SQL != r.SQL && other.State == "holds" {
			others = append(others, other.Key)
		}
	}
	return others
}

// endSession ends the session of r, if it is still the one that holds the lock, and waits until it has ended.
func endSession(ctx context.Context, db *sql.DB, key advisory.Key, r row) (ended bool, err error) {
	holders, err := advisory.Holders(ctx, db, key)
	if err != nil {
		return false, err
	}
	if !slices.ContainsFunc(holders, func(h advisory.Holder) bool {
		return h.Granted && h.PID == r.PID && h.SessionStart.Equal(r.sessionStart)
	}) {
		return false, nil
	}
	err = db.QueryRowContext(ctx, "SELECT pg_catalog.pg_terminate_backend($1, 5000)", r.PID).Scan(&ended)
	return ended, err
}
