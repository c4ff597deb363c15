package jobs

import (
	"context"
	"database/sql"
	"fmt"
	"time"
)

// A Sample is work for a job, and how to tell that it was done.
type Sample struct {
	// Fill makes n pieces of work. Where the job knows of times, they become due within
	// the time, evenly.
	Fill func(ctx context.Context, db *sql.DB, n int, within time.Duration) error

	// Left counts the pieces that are still to be done.
	Left func(ctx context.Context, db *sql.DB) (int, error)

	// Check returns an error unless each of the n pieces was done, and once.
	Check func(ctx context.Context, db *sql.DB, n int) error
}

var tokenSample = Sample{
	Fill: fill(
		`INSERT INTO api_tokens (owner, expires_at)
		 SELECT 'user ' || n, now() + n * $2::float8 / $1 * interval '1 second' FROM generate_series(1, $1::int) AS n`,
		// And as many that are still valid.
		`INSERT INTO api_tokens (owner, expires_at) SELECT 'user ' || n, now() + interval '1 day' FROM generate_series(1, $1::int) AS n
		 WHERE $2::float8 IS NOT NULL`,
	),
	Left: count(`SELECT count(*) FROM api_tokens WHERE expires_at < now() + interval '1 hour'`),
	Check: check(`
		SELECT (SELECT count(*) FROM swept_tokens), (SELECT count(DISTINCT token_id) FROM swept_tokens),
		       (SELECT count(*) FROM api_tokens)`,
		"tokens swept", "of them different", "left valid"),
}

var webhookSample = Sample{
	Fill: fill(`INSERT INTO scheduled_tasks (payload, due_at)
		SELECT '{"task": ' || n || '}', now() + n * $2::float8 / $1 * interval '1 second' FROM generate_series(1, $1::int) AS n`),
	Left: count(`SELECT count(*) FROM scheduled_tasks WHERE delivered_at IS NULL`),
	Check: check(`SELECT count(*), count(delivered_at), sum(attempts) FROM scheduled_tasks`,
		"webhooks", "delivered", "attempts"),
}

// SampleProduct is the one product whose quantity the sample changes, each time by 1.
const SampleProduct = "lamp"

var stockSample = Sample{
	Fill: fill(`INSERT INTO stock_changes (product, delta)
		SELECT 'lamp', 1 FROM generate_series(1, $1::int) WHERE $2::float8 IS NOT NULL`),
	Left:  count(`SELECT count(*) FROM stock_changes`),
	Check: check(`SELECT coalesce(sum(quantity), 0) FROM stock`, "changes applied"),
}

var searchSample = Sample{
	Fill: fill(`INSERT INTO articles (title, body)
		SELECT 'Article ' || n, 'The quick brown fox jumps over ' || n || ' lazy dogs' FROM generate_series(1, $1::int) AS n
		WHERE $2::float8 IS NOT NULL`),
	Left: count(`SELECT count(*) FROM articles, search_rebuild WHERE id > last_article`),
	Check: check(`SELECT count(*), (SELECT count(*) FROM article_search WHERE document @@ to_tsquery('english', 'fox & dog')) FROM articles`,
		"articles", "found by search"),
}

func fill(statements ...string) func(context.Context, *sql.DB, int, time.Duration) error {
	return func(ctx context.Context, db *sql.DB, n int, within time.Duration) error {
		for _, s := range statements {
			if _, err := db.ExecContext(ctx, s, n, within.Seconds()); err != nil {
				return err
			}
		}
		return nil
	}
}

func count(query string) func(context.Context, *sql.DB) (int, error) {
	return func(ctx context.Context, db *sql.DB) (n int, err error) {
		err = db.QueryRowContext(ctx, query).Scan(&n)
		return n, err
	}
}

// check wants every column of query to be n.
func check(query string, what ...string) func(context.Context, *sql.DB, int) error {
	return func(ctx context.Context, db *sql.DB, n int) error {
		got := make([]int, len(what))
		dest := make([]any, len(what))
		for i := range got {
			dest[i] = &got[i]
		}
		if err := db.QueryRowContext(ctx, query).Scan(dest...); err != nil {
			return err
		}
		for i, w := range what {
			if got[i] != n {
				return fmt.Errorf("%d %s, want %d", got[i], w, n)
			}
		}
		return nil
	}
}
