// Package jobs holds four jobs that every replica of a service is ready to do and one
// at a time does, as code to be copied: sweeping expired tokens, delivering webhooks,
// invalidating caches, and rebuilding a search index.
//
// They have in common what a leader needs to know:
//
//   - A leader may end at any moment, between any two lines. What is done, and the note
//     that it is done, therefore go into one statement; where that is impossible, as
//     with a webhook, the work is done again, and is such that this does no harm.
//   - A leader may be frozen at any moment, too, and not know that another has followed
//     it. A later leader's work is therefore told from its own by the database: by a
//     condition on the row that both write, or by [advisory.Token].
//   - One statement, not a transaction of several: a leader that is frozen between two of
//     them would keep its row locks, and its successor would wait for them.
//   - An error of one round does not end the leadership: fn's return would end Lead.
package jobs

import (
	"context"
	"database/sql"
	"log/slog"
	"time"

	"github.com/pgadvisory/advisory"
)

// A Job is one of the four.
type Job struct {
	Name string

	// Setup creates the job's tables.
	Setup func(ctx context.Context, db *sql.DB) error

	// Run campaigns, and does the job while it leads, until ctx ends or, if the job has
	// an end, that is reached. Every replica calls it.
	Run func(ctx context.Context, db *sql.DB, p Params) error

	Sample // for tests and demonstrations
}

// All are the four jobs.
var All = []Job{
	{"sweep-tokens", schema(TokenSchema), SweepTokens, tokenSample},
	{"deliver-webhooks", schema(WebhookSchema), DeliverWebhooks, webhookSample},
	{"invalidate-stock", schema(StockSchema), ApplyStockChanges, stockSample},
	{"rebuild-search", schema(SearchSchema), RebuildSearch, searchSample},
}

// Params is what a service would configure.
type Params struct {
	Key     advisory.Key      // of the leader's lock, the same in all replicas
	Options []advisory.Option // of Lead
	Every   time.Duration     // how often there is a round
	Batch   int               // the most that one round does
	Webhook string            // the URL that DeliverWebhooks posts to
	Log     *slog.Logger
}

func schema(statements string) func(context.Context, *sql.DB) error {
	return func(ctx context.Context, db *sql.DB) error {
		_, err := db.ExecContext(ctx, statements)
		return err
	}
}

// rounds calls round now and every p.Every, until it says that the job is done, or ctx
// ends: with the leadership, or because the process is to end.
func (p Params) rounds(ctx context.Context, round func() (done bool, err error)) error {
	for {
		done, err := round()
		switch {
		case ctx.Err() != nil:
			return context.Cause(ctx)
		case err != nil && p.Log != nil:
			p.Log.Warn("round failed; trying again", "lock", p.Key.String(), "error", err)
		case done:
			return nil
		}
		select {
		case <-time.After(p.Every):
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}
