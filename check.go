package advisory

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"math/rand/v2"
	"time"

	"github.com/pgadvisory/advisory/internal/manager"
	"github.com/pgadvisory/advisory/internal/pgsql"
	"github.com/pgadvisory/advisory/internal/session"
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

// Check tells whether mutual exclusion works through db, by locking. It returns nil if a
// session-level lock on one connection excludes another, and a wait for it waits. Call it at
// program start, and in tests of a deployment.
//
// Check uses two connections at a time, of four that it takes from the pool, or makes, and closes,
// and sends about twenty statements. It leaves nothing behind. Several at a time, in one process
// or in many, do not wait for each other's connections for ever: one that does not get its second
// gives back its first, and begins anew.
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
// Behind a transaction pooler, [WithTxLock] at READ COMMITTED works.
func Check(ctx context.Context, db *sql.DB) error {
	c := call{function: "Check", db: db, missing: nilArg("db", db == nil)}
	cfg, err := c.check(ctx, "check", nil, nil)
	if err != nil {
		return err
	}
	if err := check(ctx, db, &cfg); err != nil {
		return &Error{Op: "check", msg: pgsql.Explain(err), errs: []error{err}}
	}
	return nil
}

func check(ctx context.Context, db *sql.DB, cfg *config) error {
	if db.Stats().MaxOpenConnections == 1 {
		return errors.New("the pool is limited to one connection, and it takes two to see whether they exclude each other (SetMaxOpenConns)")
	}
	m := manager.For(db)
	select {
	case m.Checking <- struct{}{}:
		defer func() { <-m.Checking }()
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	for patience := checkPatience; ; patience = min(2*patience, session.AnswerBound) {
		err := checkOnce(ctx, m.Pool(db), cfg, patience)
		if !errors.Is(err, errNoSecond) {
			return err
		}
		session.Sleep(ctx, rand.N(patience))
		if ctx.Err() != nil {
			return fmt.Errorf("%w: %w", err, context.Cause(ctx))
		}
	}
}

var errNoSecond = errors.New("no second connection was to be had, and it takes two to see whether they exclude each other")

// checkOnce checks with connections of its own. It waits for the second one, and for each one after
// that, for as long as patience.
func checkOnce(ctx context.Context, pool session.Pool, cfg *config, patience time.Duration) error {
	holder, err := openMarked(ctx, pool, cfg)
	if err != nil {
		return err
	}
	defer holder.Discard()
	keys := []pgsql.Key{{Space: pgsql.Bigint, ID: rand.Int64()}}
	for i := 0; i < checkOthers && err == nil; i++ {
		err = checkOther(ctx, pool, cfg, patience, holder, keys, i)
	}
	return err
}

// checkOther opens the session of the other number i, within patience, and checks that it has to
// wait for the lock of keys. The holder takes that lock when the first other is there, and releases
// it for the last one.
func checkOther(ctx context.Context, pool session.Pool, cfg *config, patience time.Duration, holder *session.Session, keys []pgsql.Key, i int) error {
	opening, cancel := context.WithTimeoutCause(ctx, patience, errNoSecond)
	defer cancel()
	other, err := openMarked(opening, pool, cfg)
	if err != nil {
		return err
	}
	defer other.Discard()
	if i == 0 {
		err = checkSame(ctx, holder, other)
		if err == nil {
			err = step(ctx, holder, pgsql.Try(keys, false), 1, "the server refuses a lock that nobody can hold: its advisory lock functions do not work")
		}
	}
	if err == nil {
		err = checkWait(ctx, other, keys[0], i)
	}
	if err == nil && i == checkOthers-1 {
		err = checkRelease(ctx, holder, other, keys)
	}
	return err
}

// openMarked opens a session, marks it, and checks that it leads to a primary. The mark, its first
// statement, also finds the dead connections of the pool.
func openMarked(ctx context.Context, pool session.Pool, cfg *config) (*session.Session, error) {
	for dead := pool.DB.Stats().OpenConnections; ; dead-- { // others may be about to hand back dead ones
		s, err := pool.Open(ctx, cfg.logger, session.ForLocks)
		if err != nil {
			return nil, err
		}
		err = s.Attempt(func(s *session.Session) error { return step(ctx, s, pgsql.Mark(s.Nonce()), 1, changes) })
		if err == nil {
			return s, nil
		}
		s.Discard()
		if dead <= 0 || ctx.Err() != nil || !pgsql.Gone(err) {
			return nil, err
		}
	}
}

// step sends a statement, and returns an error if its answer does not have as many rows as wanted.
func step(ctx context.Context, s *session.Session, query string, want int64, otherwise string) error {
	if err := session.Ended(ctx); err != nil {
		return err
	}
	rows, err := s.Exec(ctx, session.AnswerBound, query)
	switch {
	case err != nil:
		return err
	case rows == want:
		return nil
	case rows == pgsql.OnStandby:
		return session.ErrStandby
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
func checkSame(ctx context.Context, sessions ...*session.Session) error {
	for range checkRounds {
		for _, s := range sessions {
			if err := step(ctx, s, pgsql.Marked(s.Nonce()), 1, changes); err != nil {
				return err
			}
		}
	}
	return nil
}

// checkWait checks that the session of the other number i has to wait for the lock of k, which the
// first connection has.
func checkWait(ctx context.Context, s *session.Session, k pgsql.Key, i int) error {
	both := fmt.Sprintf("two connections (1 and %d) held the same lock: they lead to different servers or databases, and should to one; or its advisory lock functions do nothing", i+2)
	err := step(ctx, s, pgsql.Comment([]pgsql.Key{k}, "")+pgsql.Wait(pgsql.OnOwn, "", k, false, time.Millisecond, pgsql.Settings{}), 0, both)
	if pgsql.RefusesWait(err) {
		err = fmt.Errorf("the server does not execute the statement that waits, and waits would try again and again: %w", err)
	}
	return err
}

// checkRelease checks that a lock that is released is another's to have. What that gets goes
// with its session.
func checkRelease(ctx context.Context, holder, other *session.Session, keys []pgsql.Key) error {
	if err := step(ctx, holder, pgsql.Unlock(keys, false), 1, gone); err != nil {
		return err
	}
	return step(ctx, other, pgsql.Try(keys, false), 1, "a released lock was not free: "+pooled)
}
