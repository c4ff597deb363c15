package manager

import (
	"context"
	"database/sql"
	"errors"
	"time"

	"github.com/pgadvisory/advisory/internal/lockconn"
	"github.com/pgadvisory/advisory/internal/pgsql"
	"github.com/pgadvisory/advisory/internal/session"
)

// attempts decides whether an acquisition, after a failed attempt, makes another.
//
//   - Connections in the pool may be dead, after a restart of the server, say: as database/sql
//     does, such a one is dropped and the next one tried.
//   - A wait outlives a restart or a failover of the server: see outage.
//   - A session of several callers that dies is replaced.
//   - Anything else is final. So is a server that cannot be reached at first, except for Lead.
type attempts struct {
	*Request
	ctx   context.Context // ends with the Timeout, too
	m     *Manager
	pool  session.Pool
	began time.Time

	stale   int       // connections in the pool that may be dead; -1: none has been taken yet
	lives   int       // how often a shared session, or a lock just granted, may still be lost
	waited  bool      // it has begun to wait: another has the lock, or asks for it
	missed  time.Time // when the server was first missed, while waiting
	away    error     // why it cannot be reached; nil: it can, as far as is known
	refused bool      // the server has refused the lock: another has it
	hint    string    // what to add to the error of the acquisition
}

func newAttempts(ctx context.Context, db *sql.DB, r *Request) attempts {
	m := For(db)
	return attempts{Request: r, ctx: ctx, m: m, pool: m.Pool(db), began: time.Now(), stale: -1, lives: 3}
}

// A stage is where an attempt has failed.
type stage uint8

const (
	nowhere  stage = iota // there was no connection
	onOwn                 // on a session that it had opened
	onShared              // on a session that others had opened
)

// keepTrying opens sessions until attempt succeeds on one, or fails for a reason that another
// session would not mend. It ends the sessions on which attempt failed.
func (a *attempts) keepTrying(open func(context.Context) (*session.Session, error), attempt func(*session.Session) error) (*session.Session, error) {
	for {
		if err := session.Ended(a.ctx); err != nil {
			return nil, err
		}
		if err := a.joinUnderWay(); err != nil {
			return nil, err
		}
		if a.stale < 0 {
			a.stale = a.pool.DB.Stats().Idle
		}
		at := nowhere
		s, err := open(a.ctx)
		if err == nil {
			at = onOwn
			if err = attemptOn(s, attempt); err == nil {
				return s, nil
			}
			s.GiveUp(a.ctx, err)
			if s.Refused() && !errors.Is(err, session.ErrStandby) {
				a.waited, a.refused, a.missed = true, true, time.Time{}
			}
		}
		if err = a.again(err, at); err != nil {
			return nil, err
		}
	}
}

// attemptOn has attempt run on s, which is closed if the driver panics.
func attemptOn(s *session.Session, attempt func(*session.Session) error) error {
	ok := false
	defer func() {
		if !ok {
			s.Discard()
		}
	}()
	err := attempt(s)
	ok = true
	return err
}

// again returns nil, perhaps after a pause, if there is to be another attempt after one that has
// failed with err.
func (a *attempts) again(err error, at stage) error {
	if a.ctx.Err() != nil {
		return a.late(err, at)
	}
	lost := errors.As(err, new(lockconn.LostError)) // by a request of another's, perhaps
	// database/sql closes a Conn that it has found dead.
	gone := lost || pgsql.Gone(err) || at != nowhere && errors.Is(err, sql.ErrConnDone)
	if errors.Is(err, session.ErrStandby) { // after a failover, the way may lead to one for a while
		gone = !a.missed.IsZero()
	}
	passes := gone || at == nowhere && (a.waited || a.Lead) && pgsql.MayPass(err)
	switch {
	case !passes || errors.Is(err, session.ErrRefused) || pgsql.PoolClosed(err):
		return err
	case a.waited:
		return a.outlive(err)
	case (lost || at == onShared) && a.lives > 0:
		a.lives--
		return nil
	case a.stale > 0 && (at != nowhere || pgsql.IsNoAnswer(err)):
		a.stale--
		return nil
	case a.Lead:
		return a.outlive(err)
	default:
		return err
	}
}

// late returns the error of an attempt that has failed with err, after the end of ctx, and sets hint.
func (a *attempts) late(err error, at stage) error {
	cause := context.Cause(a.ctx)
	switch {
	case at == nowhere && a.pool.Exhausted():
		a.hint = a.m.busy(a.pool)
	case !errors.Is(err, cause) && (pgsql.Gone(err) || at == nowhere):
		a.hint = err.Error() // why not even the server has answered
	}
	if errors.Is(err, cause) {
		return err
	}
	return errors.Join(cause, err)
}
