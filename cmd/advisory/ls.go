package main

import (
	"context"
	"database/sql"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/pgadvisory/advisory"
)

// A row is one session that holds a lock, or waits for one.
type row struct {
	Key         string    `json:"key"` // its name, if that is known
	SQL         string    `json:"sql"` // the arguments of pg_advisory_lock
	Mode        string    `json:"mode"`
	State       string    `json:"state"` // "holds" or "waits"
	PID         int       `json:"pid"`   // 0: a prepared transaction
	User        string    `json:"user"`
	Application string    `json:"application"`
	Address     string    `json:"address"`
	Session     time.Time `json:"session_start,omitzero"`
	Wait        time.Time `json:"wait_start,omitzero"`
	Query       string    `json:"query"`

	sessionStart time.Time // as the server has it, to tell sessions apart
}

func newRow(key advisory.Key, h advisory.Holder) row {
	r := row{
		Key: display(key), SQL: key.SQL(), Mode: "exclusive", State: "waits", PID: h.PID, User: h.User,
		Application: h.ApplicationName, Address: h.ClientAddr, Session: h.SessionStart, Wait: h.WaitStart, Query: h.Query,
		sessionStart: h.SessionStart,
	}
	if h.Shared {
		r.Mode = "shared"
	}
	if h.Granted {
		r.State = "holds"
	}
	return r
}

func newLs(c *connection) *cobra.Command {
	var asJSON, watch bool
	var every time.Duration
	cmd := &cobra.Command{
		Use:   "ls",
		Short: "List every advisory lock of the database",
		Long: `ls lists every advisory lock of the database, by this program or any other: who holds it,
and who waits for it.

A lock is listed by its name where that is known: the server knows numbers alone, and finds
names in the comments that this package's statements begin with, a heartbeat after the
grant at the latest.

SESSION is the age of the connection: the server does not record when a lock was granted.
WAIT is the age of the wait as the server sees it. Waits of this package begin anew every
100 to 400 ms there.

What other users' sessions do is shown to members of pg_read_all_stats alone.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if every <= 0 {
				return fmt.Errorf("--interval: %v is not positive", every)
			}
			return withDB(cmd, c, func(ctx context.Context, db *sql.DB) error {
				rows := func() ([]row, error) { return allRows(ctx, db) }
				if watch {
					return watchRows(ctx, cmd.OutOrStdout(), every, asJSON, rows)
				}
				return printRows(cmd.OutOrStdout(), asJSON, rows)
			})
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON: an array of the sessions that hold or wait")
	cmd.Flags().BoolVarP(&watch, "watch", "w", false, "list again and again, until Ctrl-C")
	cmd.Flags().DurationVar(&every, "interval", 2*time.Second, "how often --watch lists")
	return cmd
}

func newHolders(c *connection) *cobra.Command {
	var keys keyFlags
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "holders NAME",
		Short: "Show who holds a lock, and who waits for it",
		Long:  `holders shows of one lock what "advisory ls" shows of all.`,
		RunE: func(cmd *cobra.Command, args []string) error {
			k, err := keys.one(args)
			if err != nil {
				return err
			}
			return withDB(cmd, c, func(ctx context.Context, db *sql.DB) error {
				return printRows(cmd.OutOrStdout(), asJSON, func() ([]row, error) {
					holders, err := advisory.Holders(ctx, db, k.key)
					return rowsOf(k.key, holders), err
				})
			})
		},
		ValidArgsFunction: completeNames(c),
	}
	keys.add(cmd.Flags())
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON: an array of the sessions that hold or wait")
	return cmd
}

// withDB calls f with a pool, and with a context that ends by Ctrl-C.
func withDB(cmd *cobra.Command, c *connection, f func(context.Context, *sql.DB) error) error {
	ctx, stop := signal.NotifyContext(cmd.Context(), os.Interrupt)
	defer stop()
	db, err := c.open(cmd.CommandPath(), func(text string) { fmt.Fprintln(cmd.ErrOrStderr(), message(text)) })
	if err != nil {
		return err
	}
	defer closeDB(db)
	return failed(f(ctx, db))
}

// completeNames completes the names of the locks that there are.
func completeNames(c *connection) cobra.CompletionFunc {
	return func(cmd *cobra.Command, args []string, _ string) ([]cobra.Completion, cobra.ShellCompDirective) {
		var names []cobra.Completion
		if len(args) > 0 {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
		defer cancel()
		db, err := c.open(cmd.CommandPath(), func(string) {})
		if err != nil {
			return nil, cobra.ShellCompDirectiveError
		}
		defer db.Close()
		locks, err := advisory.Locks(ctx, db)
		if err != nil {
			return nil, cobra.ShellCompDirectiveError
		}
		for _, l := range locks {
			if name, ok := nameOf(l.Key); ok {
				names = append(names, name)
			}
		}
		return names, cobra.ShellCompDirectiveNoFileComp
	}
}

// display returns the name of key, if that is known, and otherwise what it is.
func display(key advisory.Key) string {
	if name, ok := nameOf(key); ok {
		return name
	}
	return key.String()
}

// nameOf returns the name that key was made from by advisory.Name, if it was.
func nameOf(key advisory.Key) (name string, ok bool) {
	name, _, _ = strings.Cut(key.String(), " (bigint ")
	return name, advisory.Name(name) == key
}

// allRows returns the sessions of all locks.
func allRows(ctx context.Context, db *sql.DB) ([]row, error) {
	locks, err := advisory.Locks(ctx, db)
	if err != nil {
		return nil, err
	}
	rows := []row{}
	for _, l := range locks {
		rows = append(rows, rowsOf(l.Key, l.Holders)...)
		rows = append(rows, rowsOf(l.Key, l.Waiters)...)
	}
	return rows, nil
}

func rowsOf(key advisory.Key, holders []advisory.Holder) []row {
	rows := []row{}
	for _, h := range holders {
		rows = append(rows, newRow(key, h))
	}
	return rows
}

func printRows(w io.Writer, asJSON bool, get func() ([]row, error)) error {
	rows, err := get()
	switch {
	case err != nil:
		return err
	case asJSON:
		return json.NewEncoder(w).Encode(rows)
	default:
		return writeTable(w, rows, time.Now())
	}
}

// writeTable writes a line for each session. A lock is named once.
func writeTable(w io.Writer, rows []row, now time.Time) error {
	if len(rows) == 0 {
		_, err := fmt.Fprintln(w, "no advisory lock is held or waited for")
		return err
	}
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "KEY\tMODE\tSTATE\tPID\tUSER\tAPPLICATION\tADDRESS\tSESSION\tWAIT")
	for i, r := range rows {
		key := r.Key
		if i > 0 && rows[i-1].SQL == r.SQL {
			key = ""
		}
		fmt.Fprintf(t, "%s\t%s\t%s\t%d\t%s\t%s\t%s\t%s\t%s\n", key, r.Mode, r.State, r.PID, orDash(r.User),
			orDash(r.Application), orDash(r.Address), age(r.Session, now), age(r.Wait, now))
	}
	return t.Flush()
}

func orDash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}

// age returns how long ago t was, by this machine's clock.
func age(t, now time.Time) string {
	if t.IsZero() {
		return "-"
	}
	d := max(0, now.Sub(t))
	switch {
	case d < 10*time.Second:
		return d.Round(100 * time.Millisecond).String()
	case d < 24*time.Hour:
		return d.Round(time.Second).String()
	default:
		return fmt.Sprintf("%dd%dh", int(d.Hours())/24, int(d.Hours())%24)
	}
}

// watchRows prints rows again and again, until ctx ends. On a terminal it draws them in one place.
func watchRows(ctx context.Context, w io.Writer, every time.Duration, asJSON bool, get func() ([]row, error)) error {
	file, ok := w.(*os.File)
	draws := ok && !asJSON && term.IsTerminal(int(file.Fd()))
	tick := time.NewTicker(every)
	defer tick.Stop()
	for first := true; ; first = false {
		var page strings.Builder
		err := printRows(&page, asJSON, get)
		switch {
		case ctx.Err() != nil:
			return nil
		case err != nil && first:
			return err
		case err != nil: // it may be back for the next one
			page.WriteString(message(err.Error()) + "\n")
		}
		if draws {
			title := fmt.Sprintf("advisory locks, every %v: %s\n\n", every, time.Now().Format(time.DateTime))
			draw(file, title+page.String())
		} else if _, err := io.WriteString(w, page.String()); err != nil {
			return err
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil
		}
	}
}

// draw writes as much of page as the terminal has room for, over what is there.
func draw(terminal *os.File, page string) {
	width, height, err := term.GetSize(int(terminal.Fd()))
	if err != nil || width <= 0 || height <= 0 {
		width, height = 80, 24
	}
	const home, clearLine, clearBelow = "\x1b[H", "\x1b[K", "\x1b[J"
	lines := strings.Split(strings.TrimSuffix(page, "\n"), "\n")
	if len(lines) > height-1 {
		lines = append(lines[:max(0, height-2)], fmt.Sprintf("and %d more lines", len(lines)-max(0, height-2)))
	}
	var b strings.Builder
	b.WriteString(home)
	for _, line := range lines {
		if r := []rune(line); len(r) > width {
			line = string(r[:width])
		}
		b.WriteString(line + clearLine + "\r\n")
	}
	b.WriteString(clearBelow)
	_, _ = terminal.WriteString(b.String())
}
