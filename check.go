package advisory

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"math/rand/v2"
	"time"
)

const (
	// checkOthers is how many sessions Check compares with the first. One would do, but for a balancer
	// that picks servers at random.
	checkOthers = 3

	// checkRounds is how often Check asks two sessions in turn whether they are still the same. Behind
	// a busy pooler, a client may get the same session back by chance.
	checkRounds = 3

	// checkPatience is how long Check waits for its second connection at first, before it gives the
	// first one back for others that may wait for theirs.
	checkPatience = time.Second
)

// Check tells whether mutual exclusion really works through db, by locking: it
// returns nil if a session-level lock that is taken on one connection excludes another, and a wait for
// it waits. It is meant for program start, and for tests of a deployment.
//
// It uses two connections at a time, of four that it makes and closes again, and sends about a dozen
// statements. It leaves nothing behind. Several at a time, in one process or in many, do not wait for each other's
// connections for ever: one that does not get its second gives back its first, and begins anew.
//
// It finds, and its error explains,
//
//   - a pooler in transaction or statement mode, where a session-level lock belongs
//     to a server connection that others use next,
//   - a hot standby, whose locks exclude nobody on the primary,
//   - a db whose connections lead to several servers or databases,
//   - a server whose advisory lock functions do nothing,
//   - a role that may not execute them, or may not use PL/pgSQL, in which the waits are written.
//
// What works behind a transaction pooler is [WithTxLock], at READ COMMITTED.
func Check(ctx context.Context, db *sql.DB) error {
	c := call{function: "Check", db: db, missing: missing("db", db == nil, "", false)}
	cfg, err := c.check(ctx, "check", nil, nil)
	if err != nil {
		return err
	}
	if err := check(ctx, db, &cfg); err != nil {
		return &lockError{op: "check", msg: explain(err), errs: []error{err}}
	}
	return nil
}

func check(ctx context.Context, db *sql.DB, cfg *config) error {
	if db.Stats().MaxOpenConnections == 1 {
		return errors.New("the pool is limited to one connection, and it takes two to see whether they exclude each other (SetMaxOpenConns)")
	}
	h := hubOf(db)
	select {
	case h.checking <- struct{}{}:
		defer func() { <-h.checking }()
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	for patience := checkPatience; ; patience = min(2*patience, answerBound) {
		err := checkOnce(ctx, db, cfg, patience)
		if !errors.Is(err, errNoSecond) {
			return err
		}
		sleep(ctx, rand.N(patience))
		if ctx.Err() != nil {
			return fmt.Errorf("%w: %w", err, context.Cause(ctx))
		}
	}
}

var errNoSecond = errors.New("no second connection was to be had, and it takes two to see whether they exclude each other")

// checkOnce checks with connections of its own. It waits for the second one, and for each one after
// that, for as long as patience.
func checkOnce(ctx context.Context, db *sql.DB, cfg *config, patience time.Duration) error {
	holder, err := openHolder(ctx, db, cfg)
	if err != nil {
		return err
	}
	defer holder.discard()
	keys := []Key{ID(rand.Int64())}
	for i := range checkOthers {
		other, err := openOther(ctx, db, cfg, patience, keys[0], i)
		if err != nil {
			return err
		}
		if i == 0 {
			err = checkSame(ctx, holder, other)
			if err == nil {
				err = holder.step(ctx, tryStatement(keys, false), 1, "the server refuses a lock that nobody can hold: its advisory lock functions do not work")
			}
		}
		if err == nil && i == 0 {
			err = checkWait(ctx, other, keys[0])
		}
		if err == nil && i == checkOthers-1 {
			err = checkRelease(ctx, holder, other, keys)
		}
		other.discard()
		if err != nil {
			return err
		}
	}
	return nil
}

// openHolder opens a session, marks it, and checks that it leads to a primary.
func openHolder(ctx context.Context, db *sql.DB, cfg *config) (*session, error) {
	return openChecked(ctx, db, cfg, func(s *session) error {
		return s.step(ctx, markStatement(s.settings.nonce), 1, changes)
	})
}

// openOther opens the session of the other number i, for as long as patience. The first one is marked. The
// lock of k, which the holder has, is tried on the others.
func openOther(ctx context.Context, db *sql.DB, cfg *config, patience time.Duration, k Key, i int) (*session, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, patience, errNoSecond)
	defer cancel()
	if i == 0 {
		return openHolder(ctx, db, cfg)
	}
	return openChecked(ctx, db, cfg, func(s *session) error {
		return s.step(ctx, answer("pg_catalog.pg_try_advisory_lock("+k.SQL()+")"), 0, both(i))
	})
}

// both is what is said if the first connection and the other number i have the same lock.
func both(i int) string {
	return fmt.Sprintf("two connections (1 and %d) held the same lock: they lead to different servers or databases, and should to one; or its advisory lock functions do nothing", i+2)
}

// openChecked opens a session. Its first statement also finds the dead connections of the pool.
func openChecked(ctx context.Context, db *sql.DB, cfg *config, first func(*session) error) (*session, error) {
	for stale := db.Stats().OpenConnections; ; stale-- {
		s, err := openSession(ctx, db, cfg)
		if err != nil {
			return nil, err
		}
		if err = first(s); err == nil {
			return s, nil
		}
		s.discard()
		if stale <= 0 || ctx.Err() != nil || !sessionGone(err) {
			return nil, err
		}
	}
}

// step sends a statement, and returns an error if its answer does not have as many rows as wanted.
func (s *session) step(ctx context.Context, query string, want int64, otherwise string) error {
	rows, err := s.exec(ctx, answerBound, query)
	switch {
	case err != nil:
		return err
	case rows == want:
		return nil
	case rows == standbyRows:
		return errStandby
	default:
		return errors.New(otherwise)
	}
}

const (
	changes = "the session of a connection changes between statements: " + pooled
	gone    = "a lock was gone when it was to be released: " + pooled
	pooled  = "a pooler in transaction or statement mode stands between, and session-level locks mean nothing there: use its session mode, connect directly, or use WithTxLock"
)

// checkSame checks that two sessions stay the same, and are not one, without locking anything.
func checkSame(ctx context.Context, sessions ...*session) error {
	for range checkRounds {
		for _, s := range sessions {
			if err := s.step(ctx, markedStatement(s.settings.nonce), 1, changes); err != nil {
				return err
			}
		}
	}
	return nil
}

// checkWait checks that a session has to wait for the lock that another has.
func checkWait(ctx context.Context, s *session, k Key) error {
	err := s.step(ctx, waitStatement(onOwn, "", k, false, time.Millisecond, sessionSettings{}), 0, both(0))
	if refusesWait(err) {
		err = fmt.Errorf("the server does not execute the statement that waits, and waits would try again and again: %w", err)
	}
	return err
}

// checkRelease checks that a lock that is released is another's to have. What that gets goes with its session.
func checkRelease(ctx context.Context, holder, other *session, keys []Key) error {
	if err := holder.step(ctx, unlockStatement(keys, false), 1, gone); err != nil {
		return err
	}
	return other.step(ctx, tryStatement(keys, false), 1, "a released lock was not free: "+pooled)
}
