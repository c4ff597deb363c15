package advisory

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"math/rand/v2"
)

const (
	// checkConns is how many connections Check compares, if the pool has as many.
	// Two would do, but for a balancer that picks servers at random.
	checkConns = 4

	// checkRounds is how often Check asks each of them which session it is. Behind a
	// busy pooler, a client may get the same session back a few times by chance.
	checkRounds = 12
)

// Check tells whether mutual exclusion really works through db, by locking: it
// returns nil if a session-level lock that is taken on one connection is held by it
// and excludes another. It is meant for program start, and for tests of a
// deployment. It needs two connections of the pool for a moment, uses up to four,
// and leaves nothing behind.
//
// It finds, and its error explains,
//
//   - a pooler in transaction or statement mode, where a session-level lock belongs
//     to a server connection that others use next,
//   - a hot standby, whose locks exclude nobody on the primary,
//   - a db whose connections lead to several servers or databases,
//   - a server whose advisory lock functions do nothing.
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

func check(ctx context.Context, db *sql.DB, cfg *config) (err error) {
	limit := db.Stats().MaxOpenConnections
	if limit == 1 {
		return errors.New("the pool is limited to one connection, and it takes two to see whether they exclude each other (SetMaxOpenConns)")
	}
	n := checkConns
	if limit > 0 {
		n = min(n, max(2, limit/2))
	}
	sessions := make([]*session, 0, n)
	defer func() {
		for _, s := range sessions {
			if err != nil {
				s.discard()
			} else {
				s.handBack()
			}
		}
	}()
	for range n {
		s, err := openChecked(ctx, db, cfg)
		if err != nil {
			return err
		}
		sessions = append(sessions, s)
	}
	if err := checkSessions(ctx, sessions); err != nil {
		return err
	}
	return checkExclusion(ctx, sessions)
}

// openChecked opens a session and checks that it leads to a primary. Its first
// statement also finds the dead connections of the pool.
func openChecked(ctx context.Context, db *sql.DB, cfg *config) (*session, error) {
	for stale := db.Stats().OpenConnections; ; stale-- {
		s, err := openSession(ctx, db, cfg)
		if err != nil {
			return nil, err
		}
		standby, err := s.exec(ctx, answerBound, inRecoveryStatement)
		switch {
		case err == nil && standby == 0:
			return s, nil
		case err == nil:
			s.handBack()
			return nil, errStandby
		}
		s.discard()
		if stale <= 0 || ctx.Err() != nil || !sessionGone(err) {
			return nil, err
		}
	}
}

// checkSessions checks that each session stays the same and no two are one, without
// locking anything.
func checkSessions(ctx context.Context, sessions []*session) error {
	low, high := make([]int64, len(sessions)), make([]int64, len(sessions))
	for round := range checkRounds {
		for i, s := range sessions {
			digit, err := s.exec(ctx, answerBound, pidLowStatement)
			if err != nil {
				return err
			}
			if round > 0 && digit != low[i] {
				return errors.New("the session of a connection changes between statements: " + pooled)
			}
			low[i] = digit
		}
	}
	for i, s := range sessions {
		var err error
		if high[i], err = s.exec(ctx, answerBound, pidHighStatement); err != nil {
			return err
		}
		for j := range i {
			// Where there are no process IDs, there is nothing to tell by.
			if low[i] == low[j] && high[i] == high[j] && low[i]+high[i] > 0 {
				return errors.New("two connections share a session: " + pooled)
			}
		}
	}
	return nil
}

const pooled = "a pooler in transaction or statement mode stands between, and session-level locks mean nothing there: use its session mode, connect directly, or use WithTxLock"

// checkExclusion locks a random key on the first session and tries it on the others.
func checkExclusion(ctx context.Context, sessions []*session) error {
	const gone = "a lock was gone when it was to be released: " + pooled
	keys := []Key{ID(rand.Int64())}
	holder := sessions[0]
	step := func(s *session, query string, want int64, otherwise string) error {
		rows, err := s.exec(ctx, answerBound, query)
		if err == nil && rows != want {
			err = errors.New(otherwise)
		}
		return err
	}
	if err := step(holder, tryStatement(keys, false), 1, "the server refuses a lock that nobody can hold: its advisory lock functions do not work"); err != nil {
		return err
	}
	if err := step(holder, heldStatement(keys[0], false), 1, "the server grants a lock and does not hold it: its advisory lock functions do nothing, or "+pooled); err != nil {
		return err
	}
	for i, s := range sessions[1:] {
		if err := step(s, tryStatement(keys, false), 0, fmt.Sprintf("two connections (1 and %d) held the same lock: they lead to different servers or databases; connect to one", i+2)); err != nil {
			return err
		}
	}
	if err := step(holder, unlockStatement(keys, false), 1, gone); err != nil {
		return err
	}
	other := sessions[1]
	if err := step(other, tryStatement(keys, false), 1, "a released lock was not free: "+pooled); err != nil {
		return err
	}
	return step(other, unlockStatement(keys, false), 1, gone)
}
