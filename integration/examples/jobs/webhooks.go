package jobs

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/pgadvisory/advisory"
)

// WebhookSchema is what DeliverWebhooks works on.
const WebhookSchema = `
CREATE TABLE scheduled_tasks (
	id           bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
	payload      text NOT NULL,
	due_at       timestamptz NOT NULL DEFAULT now(),
	attempts     int NOT NULL DEFAULT 0,
	delivered_at timestamptz
);
CREATE INDEX scheduled_tasks_due ON scheduled_tasks (due_at) WHERE delivered_at IS NULL;`

// IdempotencyKey is the header that tells a receiver which requests are one.
const IdempotencyKey = "Idempotency-Key"

// DeliverWebhooks posts each row of scheduled_tasks when it is due.
//
// One leader at a time posts, so no two processes post the same row. But between the
// receiver's answer and the note of it in the row, the leader may be killed. Its successor
// cannot know whether the one request in flight has arrived: to leave it out may lose
// it, so it is posted again. With the same idempotency key, the receiver knows it for the
// same, and takes it once. No lock can do that: the receiver is not in the database.
func DeliverWebhooks(ctx context.Context, db *sql.DB, p Params) error {
	return advisory.Lead(ctx, db, p.Key, func(ctx context.Context) error {
		return p.rounds(ctx, func() (done bool, err error) {
			tasks, err := dueTasks(ctx, db, p.Batch)
			if err != nil {
				return false, err
			}
			var errs []error
			for _, t := range tasks {
				// The end of the leadership ends ctx, and with it the request.
				if err := t.post(ctx, p.Webhook); err != nil {
					errs = append(errs, err, t.postpone(ctx, db))
				} else {
					errs = append(errs, t.delivered(ctx, db))
				}
				if ctx.Err() != nil {
					break
				}
			}
			return false, errors.Join(errs...)
		})
	}, p.Options...)
}

type task struct {
	id      int64
	payload string
}

func dueTasks(ctx context.Context, db *sql.DB, limit int) (tasks []task, err error) {
	rows, err := db.QueryContext(ctx, `
		SELECT id, payload FROM scheduled_tasks
		WHERE delivered_at IS NULL AND due_at <= now() ORDER BY due_at, id LIMIT $1`, limit)
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	for rows.Next() {
		var t task
		if err := rows.Scan(&t.id, &t.payload); err != nil {
			return nil, err
		}
		tasks = append(tasks, t)
	}
	return tasks, rows.Err()
}

var webhookClient = &http.Client{Timeout: 10 * time.Second}

func (t task) post(ctx context.Context, url string) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, url, strings.NewReader(t.payload))
	if err != nil {
		return err
	}
	// The same whenever and by whomever it is posted.
	req.Header.Set(IdempotencyKey, "scheduled-task-"+strconv.FormatInt(t.id, 10))
	resp, err := webhookClient.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode/100 != 2 {
		return fmt.Errorf("task %d: %s", t.id, resp.Status)
	}
	return nil
}

func (t task) delivered(ctx context.Context, db *sql.DB) error {
	_, err := db.ExecContext(ctx, `
		UPDATE scheduled_tasks SET delivered_at = now(), attempts = attempts + 1
		WHERE id = $1 AND delivered_at IS NULL`, t.id)
	return err
}

// postpone tries a task again after 1, 2, 4... seconds, an hour at most.
func (t task) postpone(ctx context.Context, db *sql.DB) error {
	_, err := db.ExecContext(ctx, `
		UPDATE scheduled_tasks
		SET due_at = now() + least(2 ^ least(attempts, 12), 3600) * interval '1 second', attempts = attempts + 1
		WHERE id = $1 AND delivered_at IS NULL`, t.id)
	return err
}

// A Receiver is the other side of a webhook. This one remembers the idempotency keys in
// memory; a real one stores each in the transaction that does what the request asks for,
// under a unique constraint.
type Receiver struct {
	// Taken, if it is not nil, is called after a request was taken, and before it is
	// answered.
	Taken func(key string)

	mu       sync.Mutex
	taken    map[string]bool
	repeated int
}

func (r *Receiver) ServeHTTP(w http.ResponseWriter, req *http.Request) {
	key := req.Header.Get(IdempotencyKey)
	if key == "" {
		http.Error(w, "no "+IdempotencyKey, http.StatusBadRequest)
		return
	}
	r.mu.Lock()
	known := r.taken[key]
	if known {
		r.repeated++ // and answered like the first time
	} else {
		if r.taken == nil {
			r.taken = map[string]bool{}
		}
		r.taken[key] = true // here is what the request asks for
	}
	r.mu.Unlock()
	if !known && r.Taken != nil {
		r.Taken(key)
	}
	w.WriteHeader(http.StatusNoContent)
}

// Counts returns how many requests were taken, and how many were known for repeats of
// those.
func (r *Receiver) Counts() (taken, repeated int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.taken), r.repeated
}
