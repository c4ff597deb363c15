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

// A stage is where an attempt has failed.
type stage uint8

const (
	nowhere  stage = iota // there was no connection
	onOwn                 // on a session that it had opened
	onOthers              // on a session that others had opened
)

// keepTrying opens sessions until attempt succeeds on one, or fails for a reason that another
// session would not mend. It ends the sessions on which attempt failed.
func (a *acquisition) keepTrying(open func(context.Context) (*session.Session, error), attempt func(*session.Session) error) (*session.Session, error) {
	for {
		if err := a.ready(); err != nil {
			return nil, err
		}
		where := nowhere
		s, err := open(a.ctx)
		if err == nil {
			where = onOwn
			if err = s.Attempt(attempt); err == nil {
				return s, nil
			}
			s.GiveUp(a.ctx, err)
			if s.Refused() && !errors.Is(err, session.ErrStandby) {
				a.waited, a.refused, a.missed = true, true, time.Time{}
			}
		}
		if err = a.again(err, where); err != nil {
			return nil, err
		}
	}
}

// ready is called before each attempt. It returns an error if there is to be none.
func (a *acquisition) ready() error {
	if err := session.Ended(a.ctx); err != nil {
		return err
	}
	if a.stale < 0 {
		a.stale = a.pool.DB.Stats().Idle
	}
	return a.joinUnderWay()
}

// again returns nil, perhaps after a pause, if there is to be another attempt after one that has
// failed with err.
//
//   - A wait outlives a restart or a failover of the server: see outage.
//   - A session of several callers that dies is replaced.
//   - Connections in the pool may be dead, after a restart of the server, say: as database/sql
//     does, such a one is dropped and the next one tried.
//   - Anything else is final. So is a server that cannot be reached at first, except for Lead.
func (a *acquisition) again(err error, where stage) error {
	if errors.Is(err, session.ErrYield) { // the caller goes on, and finds the end of ctx itself
		return err
	}
	if a.ctx.Err() != nil {
		return a.late(err, where)
	}
	lost := errors.As(err, new(lockconn.LostError)) // by a request of another's, perhaps
	// database/sql closes a Conn that it has found dead.
	gone := lost || pgsql.Gone(err) || where != nowhere && errors.Is(err, sql.ErrConnDone)
	if errors.Is(err, session.ErrStandby) { // after a failover, the way may lead to one for a while
		gone = !a.missed.IsZero()
	}
	passes := gone || where == nowhere && (a.waited || a.Lead) && pgsql.MayPass(err)
	switch {
	case !passes || errors.Is(err, session.ErrRefused) || pgsql.PoolClosed(err):
		return err
	case a.waited:
		return a.outlive(err)
	case (lost || where == onOthers) && a.lives > 0:
		a.lives--
		return nil
	case a.stale > 0 && (where != nowhere || pgsql.IsNoAnswer(err)):
		a.stale--
		return nil
	case a.Lead:
		return a.outlive(err)
	default:
		return err
	}
}

// late returns the error of an attempt that has failed with err, after the end of ctx, and sets hint.
func (a *acquisition) late(err error, where stage) error {
	cause := context.Cause(a.ctx)
	switch {
	case where == nowhere && a.pool.Exhausted():
		a.hint = a.m.busy(a.pool)
	case !errors.Is(err, cause) && (pgsql.Gone(err) || where == nowhere):
		a.hint = err.Error() // why not even the server has answered
	}
	if errors.Is(err, cause) {
		return err
	}
	return errors.Join(cause, err)
}
