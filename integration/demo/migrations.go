package main

import (
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/pgadvisory/advisory"
)

// migrations is what happens when a new version of a service is rolled out: all its
// processes start at once, and each wants to migrate the database first. The hard
// part is CREATE INDEX CONCURRENTLY, which waits for the transactions of the others,
// while they wait for the lock.
type migrations struct{}

// A migration is a change of the schema, made once, in the order of the versions.
type migration struct {
	version    int
	name       string
	statements []string
	// outside: not in a transaction. Such a migration may end half-way, and be
	// begun again, so it has to clear away what an earlier attempt left behind.
	outside bool
}

func allMigrations(rows int) []migration {
	return []migration{
		{version: 1, name: "create accounts", statements: []string{
			"CREATE TABLE accounts (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, email text NOT NULL)",
		}},
		{version: 2, name: "fill accounts", statements: []string{
			fmt.Sprintf("INSERT INTO accounts (email) SELECT md5(n::text) || '@example.org' FROM generate_series(1, %d) AS n", rows),
		}},
		{version: 3, name: "index emails", outside: true, statements: []string{
			"DROP INDEX CONCURRENTLY IF EXISTS accounts_email",
			"CREATE UNIQUE INDEX CONCURRENTLY accounts_email ON accounts (email)",
		}},
		{version: 4, name: "add created_at", statements: []string{
			"ALTER TABLE accounts ADD COLUMN created_at timestamptz NOT NULL DEFAULT now()",
		}},
	}
}

type migrationsBrief struct {
	Rows int
	Lock string // its name; none if empty
}

type migrationsResult struct {
	Applied, Found int
	Error          string
	Deadlock       bool
	Held, Took     time.Duration // Took: the wait for the lock included
}

func (migrations) name() string  { return "migrations" }
func (migrations) title() string { return "everyone migrates" }

func (a migrations) play(ctx context.Context, s *stage) ([]promise, error) {
	steps := allMigrations(s.rows)
	s.view.say(fmt.Sprintf("%s start at once and run the same %s under WithConnLock,", plural(s.processes, "process"), plural(len(steps), "migration")))
	s.view.say(fmt.Sprintf("one of them CREATE INDEX CONCURRENTLY on %s.", plural(s.rows, "row")))
	brief := migrationsBrief{Rows: s.rows, Lock: s.lockName("migrations")}
	if s.broken {
		brief.Lock = ""
	}
	bar := s.view.bar("migrating", len(steps))
	results, took, err := perform[migrationsResult](ctx, s, a, func(int) any { return brief },
		func(done int, took time.Duration) {
			bar.set(done, fmt.Sprintf("%d of %d, %s", done, len(steps), seconds(took)))
		})
	if err != nil {
		return nil, err
	}
	bar.finish(seconds(took))

	var appliers, finders []int
	once := promise{text: "WithConnLock: one migrates, the others find it done", kept: true}
	alive := promise{text: "WithConnLock: no deadlock with the index build", kept: true}
	deadlocks := 0
	for i, r := range results {
		switch number := i + 1; {
		case r.Error != "":
			once.kept = false
			once.numbers += fmt.Sprintf("process %d: %s\n", number, r.Error)
			if r.Deadlock {
				deadlocks++
			}
			s.view.say(called(number) + " failed")
		case r.Found == len(steps):
			finders = append(finders, number)
			s.view.say(fmt.Sprintf("%s found all %d applied, after %s", called(number), r.Found, seconds(r.Took)))
		default:
			appliers = append(appliers, number)
			once.numbers += fmt.Sprintf("process %d applied %d, in %s\n", number, r.Applied, seconds(r.Held))
			s.view.say(fmt.Sprintf("%s applied %d, in %s", called(number), r.Applied, seconds(r.Held)))
		}
	}
	once.kept = once.kept && len(appliers) == 1 && len(finders) == s.processes-1
	once.numbers += "found applied by " + list(finders)
	alive.kept = deadlocks == 0
	alive.numbers = plural(deadlocks, "deadlock")

	index := promise{text: "CREATE INDEX CONCURRENTLY leaves a valid index"}
	err = s.db.QueryRowContext(ctx, "SELECT indisvalid FROM pg_index WHERE indexrelid = to_regclass('accounts_email')").Scan(&index.kept)
	switch {
	case errors.Is(err, sql.ErrNoRows):
		index.numbers = "no index"
	case err != nil:
		return nil, err
	default:
		index.numbers = plural(s.rows, "row")
	}
	return []promise{once, alive, index}, nil
}

func (migrations) work(ctx context.Context, w *worker) (any, error) {
	var brief migrationsBrief
	if err := json.Unmarshal(w.Brief, &brief); err != nil {
		return nil, err
	}
	// The migrations run on the connection that holds the lock. It takes no more.
	if err := fillPool(ctx, w.db, 1); err != nil {
		return nil, err
	}
	w.begin()

	var r migrationsResult
	start := time.Now()
	migrate := func(ctx context.Context, conn *sql.Conn) (err error) {
		held := time.Now()
		r.Applied, r.Found, err = migrate(ctx, conn, allMigrations(brief.Rows), func() { w.done.Add(1) })
		r.Held = time.Since(held)
		return err
	}
	var err error
	if brief.Lock == "" {
		err = withConn(ctx, w.db, migrate)
	} else {
		err = advisory.WithConnLock(ctx, w.db, advisory.Name(brief.Lock), migrate)
	}
	r.Took = time.Since(start)
	if err != nil {
		r.Error = err.Error()
		r.Deadlock = isDeadlock(err)
	}
	return r, nil
}

// migrate applies the migrations that have not been applied. It relies on being the
// only one.
func migrate(ctx context.Context, conn *sql.Conn, all []migration, step func()) (applied, found int, err error) {
	if _, err := conn.ExecContext(ctx, "CREATE TABLE IF NOT EXISTS migrations (version int PRIMARY KEY, name text NOT NULL)"); err != nil {
		return 0, 0, err
	}
	var last int
	if err := conn.QueryRowContext(ctx, "SELECT coalesce(max(version), 0) FROM migrations").Scan(&last); err != nil {
		return 0, 0, err
	}
	for _, m := range all {
		if m.version <= last {
			found++
			continue
		}
		if err := m.apply(ctx, conn); err != nil {
			return applied, found, fmt.Errorf("migration %d, %s: %w", m.version, m.name, err)
		}
		applied++
		step()
	}
	return applied, found, nil
}

func (m *migration) apply(ctx context.Context, conn *sql.Conn) error {
	if m.outside {
		return m.exec(ctx, conn)
	}
	tx, err := conn.BeginTx(ctx, nil)
	if err != nil {
		return err
	}
	defer tx.Rollback() // does nothing after Commit
	if err := m.exec(ctx, tx); err != nil {
		return err
	}
	return tx.Commit()
}

func (m *migration) exec(ctx context.Context, on interface {
	ExecContext(ctx context.Context, query string, args ...any) (sql.Result, error)
}) error {
	for _, statement := range m.statements {
		if _, err := on.ExecContext(ctx, statement); err != nil {
			return err
		}
	}
	_, err := on.ExecContext(ctx, "INSERT INTO migrations (version, name) VALUES ($1, $2)", m.version, m.name)
	return err
}

func withConn(ctx context.Context, db *sql.DB, fn func(context.Context, *sql.Conn) error) error {
	conn, err := db.Conn(ctx)
	if err != nil {
		return err
	}
	defer conn.Close()
	return fn(ctx, conn)
}

// isDeadlock tells whether the server ended a statement because of a deadlock: the
// wait for the lock, or one of fn's own.
func isDeadlock(err error) bool {
	var state interface{ SQLState() string }
	return errors.Is(err, advisory.ErrDeadlock) || errors.As(err, &state) && state.SQLState() == "40P01"
}
