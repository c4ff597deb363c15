package main

import (
	"context"
	"database/sql"
	"encoding/json"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"github.com/pgadvisory/advisory"
)

func newKey() *cobra.Command {
	var keys keyFlags
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "key NAME...",
		Short: "Print the number of a lock, and its SQL",
		Long: `key prints what a name is to PostgreSQL, so that programs in any language can take the same
lock. It asks no database.`,
		RunE: func(cmd *cobra.Command, args []string) error {
			all, err := keys.keys(args)
			if err != nil {
				return err
			}
			for _, k := range all {
				if asJSON {
					err = json.NewEncoder(cmd.OutOrStdout()).Encode(map[string]string{"name": k.name, "sql": k.key.SQL()})
				} else {
					_, err = fmt.Fprintf(cmd.OutOrStdout(), "%s\n  SELECT pg_advisory_lock(%s);\n", k.key, sqlOf(k, args))
				}
				if err != nil {
					return failed(err)
				}
			}
			return nil
		},
		ValidArgsFunction: cobra.NoFileCompletions,
	}
	keys.add(cmd.Flags())
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON: an object for each lock")
	return cmd
}

// sqlOf is the argument of pg_advisory_lock for k, with a comment where that is not the whole story.
func sqlOf(k namedKey, names []string) string {
	for _, name := range names {
		if advisory.Name(name) == k.key {
			quoted := strings.ReplaceAll(name, "'", "''")
			return k.key.SQL() + "); -- or, for any name:\n  SELECT pg_advisory_lock(('x' || left(encode(sha256(convert_to('" +
				quoted + "', 'UTF8')), 'hex'), 16))::bit(64)::bigint"
		}
	}
	return k.key.SQL()
}

func newCheck(c *connection) *cobra.Command {
	return &cobra.Command{
		Use:   "check",
		Short: "Check that locks exclude each other through this connection",
		Long: `check takes locks on connections of its own, and sees whether they exclude each other. It finds
a pooler in transaction mode, a standby, a balancer between several servers, and a role
that lacks a right.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return withDB(cmd, c, func(ctx context.Context, db *sql.DB) error {
				if err := advisory.Check(ctx, db); err != nil {
					return err
				}
				_, err := fmt.Fprintln(cmd.OutOrStdout(), "ok: locks exclude each other through this connection")
				return err
			})
		},
	}
}
