package advisory

import (
	"cmp"
	"context"
	"database/sql"
	"errors"
	"log/slog"
	"time"

	"github.com/pgadvisory/advisory/internal/manager"
	"github.com/pgadvisory/advisory/internal/pgsql"
	"github.com/pgadvisory/advisory/internal/session"
)

// How long Lead pauses after an error of the database, or a loss within 5 s: at first, and at most.
const (
	leadPauseMin = 100 * time.Millisecond
	leadPauseMax = 5 * time.Second

	// leadTellAgain is how often Lead reports an error that stays the same.
	leadTellAgain = time.Minute
)

// Lead runs fn on one of all processes that call Lead with the same key: the leader. The
// others stand by in the server's queue. When the leader's lock is free, one of them leads at
// once.
//
// # fn's return ends Lead
//
// When fn returns, and the lock has not been lost, Lead releases the lock and returns fn's
// error. That is how a leader steps down. To lead for as long as the process lives, fn loops
// until its ctx ends, and tries again what fails for a moment. See the examples.
//
// # What ends the ctx of fn
//
// If the lock is lost, the ctx of fn ends, with a cause that matches [ErrLost]. After fn has
// returned, Lead campaigns again: in one process, fn never runs twice at a time. A loss that is
// not noticed before fn returns ends Lead: with fn's error, say of a statement that has met the
// same failure, or with ErrLost. If fn goes on after a loss, Lead waits for it, and warns the
// Logger once every HolderTimeout.
//
// Lead campaigns until its ctx ends. If that happens while fn runs, the ctx of fn ends, too,
// and Lead returns fn's error. Otherwise the error matches ctx's, and also that of the database
// if one has kept fn from running. A program that shuts down looks at ctx, and not at the
// error.
//
// Lead also returns if db is closed; with [ErrReentrant], if ctx already carries the key; and
// with [ErrDeadlock], if the holder of the lock waits for one that ctx carries.
//
// Lead waits for as long as the server is away. The Logger is told when that begins and ends.
// After any other error of the database, Lead tries again, after pauses that grow to 5 s. The
// Logger is told of an error when it is new, and then once a minute. Lead also pauses after it
// has lost the lock within 5 s.
//
// # Who leads
//
// An [Observer] tells: HoldStart is called before fn begins, and HoldEnd after fn has returned
// and the lock is released. Before fn begins, Lead asks whether the server is a primary: a
// leader on a standby would lead beside that of the primary.
//
// A process that stands by holds one connection of the pool. If the pool has none to spare for
// that (see "Connections" in the package documentation), it holds none, and tries again after
// pauses that grow to 250 ms.
//
// Lead takes the options Heartbeat, HolderTimeout, Logger and Observe. The default Logger is
// [slog.Default].
func Lead(ctx context.Context, db *sql.DB, key Key, fn func(context.Context) error, opts ...Option) error {
	keys := []Key{key}
	c := call{function: "Lead", options: leadOptions, db: db, leads: true, missing: cmp.Or(nilArg("db", db == nil), nilArg("fn", fn == nil))}
	cfg, err := c.prepare(ctx, keys, opts)
	if err != nil {
		return err
	}
	if cfg.logger == session.Silent {
		cfg.logger = slog.Default()
	}
	pauses := session.NewBackoff(leadPauseMin, leadPauseMax)
	var failed error // the last campaign
	var told time.Time
	for {
		h := &hold{cfg: cfg}
		began := time.Now()
		err := h.acquire(ctx, c, keys)
		ended := time.Now()
		switch {
		case err == nil:
			failed = nil
			again, fnErr, heldErr := h.lead(fn)
			switch {
			case !again:
				return heldErr
			case ctx.Err() != nil:
				return join(fnErr, ctx.Err())
			case time.Since(ended) > leadPauseMax:
				pauses = session.NewBackoff(leadPauseMin, leadPauseMax)
				continue
			}
		case ctx.Err() != nil && ended.Sub(began) < leadPauseMax:
			return join(err, failed) // after a short campaign, what failed before it may be why this process did not lead
		case ctx.Err() != nil || pgsql.PoolClosed(err) || errors.As(err, new(manager.Deadlock)):
			return err
		default:
			if failed == nil || failed.Error() != err.Error() || time.Since(told) > leadTellAgain {
				cfg.logger.Warn("advisory: campaign failed; trying again", "key", key.String(), "error", err)
				told = time.Now()
			}
			failed = err
		}
		pauses.Pause(ctx)
	}
}

// lead runs fn as the leader. It tells whether to campaign again: the lock was lost
// before fn returned.
func (h *hold) lead(fn func(context.Context) error) (again bool, fnErr, err error) {
	returned := make(chan struct{})
	stopWarning := context.AfterFunc(&h.marked, func() { warnOverdue(returned, &h.cfg, h.keys) })
	err = h.run(func(ctx context.Context) error {
		defer close(returned)
		defer stopWarning()
		fnErr = fn(ctx)
		again = h.ended.Load()
		return fnErr
	})
	if again {
		h.cfg.logger.Warn("advisory: leadership lost; campaigning again", "error", context.Cause(&h.marked))
	}
	return again, fnErr, err
}

// warnOverdue warns while a leader's fn does not return though its ctx has ended.
func warnOverdue(returned <-chan struct{}, cfg *config, keys []Key) {
	since := time.Now()
	every := time.NewTicker(cfg.holderTimeout)
	defer every.Stop()
	for {
		select {
		case <-returned:
			return
		case <-every.C:
			cfg.logger.Warn("advisory: fn of a leader goes on after its ctx has ended", "key", keyList(keys), "for", time.Since(since))
		}
	}
}
