package main

import (
	"database/sql"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/stdlib"
)

// A connection says which database is meant.
type connection struct {
	dsn, dsnFile string
}

// open returns a pool for the database. Nothing is sent yet. Its errors are errors of usage.
func (c *connection) open(application string, warn func(string)) (*sql.DB, error) {
	dsn, err := c.string(warn)
	if err != nil {
		return nil, err
	}
	// pgx reads libpq's environment, over which the connection string and the service file prevail.
	for name, value := range map[string]string{
		"PGTARGETSESSIONATTRS": "read-write",
		"PGCONNECT_TIMEOUT":    "10",
		"PGAPPNAME":            application,
	} {
		if os.Getenv(name) == "" {
			if err := os.Setenv(name, value); err != nil {
				return nil, err
			}
		}
	}
	config, err := pgx.ParseConfig(dsn)
	if err != nil {
		return nil, err
	}
	db := stdlib.OpenDB(*config)
	// What has asked for something once does not hold a session for as long as a command runs.
	db.SetConnMaxIdleTime(time.Minute)
	return db, nil
}

// string returns the connection string, which is empty if the environment says everything.
func (c *connection) string(warn func(string)) (string, error) {
	switch {
	case c.dsnFile != "":
		content, err := os.ReadFile(c.dsnFile)
		if err != nil {
			return "", fmt.Errorf("--dsn-file: %w", err)
		}
		dsn := strings.TrimSpace(string(content))
		if dsn == "" {
			return "", fmt.Errorf("--dsn-file: %s is empty", c.dsnFile)
		}
		return dsn, nil
	case c.dsn != "":
		warn("other users of this machine see --dsn in ps; use --dsn-file or DATABASE_URL")
		return c.dsn, nil
	default:
		return os.Getenv("DATABASE_URL"), nil
	}
}

// close closes db when its sessions are idle, so that the server does not complain of clients that
// leave in the middle of a statement. A wait that has been given up ends within half a second.
func closeDB(db *sql.DB) {
	db.Close()
	for end := time.Now().Add(time.Second); db.Stats().OpenConnections > 0 && time.Now().Before(end); {
		time.Sleep(5 * time.Millisecond)
	}
}
