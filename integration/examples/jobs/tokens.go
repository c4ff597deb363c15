package jobs

import (
	"context"
	"database/sql"

	"github.com/pgadvisory/advisory"
)

// TokenSchema is what SweepTokens works on.
const TokenSchema = `
CREATE TABLE api_tokens (
	id         bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
	owner      text NOT NULL,
	expires_at timestamptz NOT NULL
);
CREATE INDEX api_tokens_expires_at ON api_tokens (expires_at);
CREATE TABLE swept_tokens (
	token_id bigint NOT NULL,
	owner    text NOT NULL,
	swept_at timestamptz NOT NULL DEFAULT now()
);`

// SweepTokens deletes expired API tokens and notes each of them, once.
//
// The statement alone makes that right, whoever runs it and how often. The leader's lock
// makes it cheap: one process looks for expired tokens, instead of all of them in turn,
// waiting for each other's row locks.
func SweepTokens(ctx context.Context, db *sql.DB, p Params) error {
	return advisory.Lead(ctx, db, p.Key, func(ctx context.Context) error {
		return p.rounds(ctx, func() (done bool, err error) {
			// In batches: one DELETE of a million rows would be one long transaction.
			_, err = db.ExecContext(ctx, `
				WITH swept AS (
					DELETE FROM api_tokens
					WHERE id IN (SELECT id FROM api_tokens WHERE expires_at <= now() ORDER BY expires_at LIMIT $1)
					RETURNING id, owner
				)
				INSERT INTO swept_tokens (token_id, owner) SELECT id, owner FROM swept`, p.Batch)
			return false, err
		})
	}, p.Options...)
}
