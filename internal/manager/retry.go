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

// An opener is who has opened the session of an attempt.
type opener uint8

const (
	nobody opener = iota // there was no connection
	itself               // the acquisition
	others               // others, for a common session
)

// keepTrying opens sessions until attempt succeeds on one, or fails for a reason that another
// session would not mend. It ends the sessions on which attempt failed.
func (a *acquisition) keepTrying(open func(context.Context) (*session.Session, error), attempt func(*session.Session) error) (*session.Session, error) {
	for {
		if err := a.ready(); err != nil {
			return nil, err
		}
		by := nobody
		s, err := open(a.ctx)
		if err == nil {
			by = itself
			if err = s.Attempt(attempt); err == nil {
				return s, nil
			}
			s.GiveUp(a.ctx, err)
			if s.Refused() && !errors.Is(err, session.ErrStandby) {
				a.waited, a.refused, a.missedSince = true, true, time.Time{}
			}
		}
		if err = a.again(err, by); err != nil {
			return nil, err
		}
	}
}

// ready is called before each attempt. It returns an error if there is to be none.
func (a *acquisition) ready() error {
	if err := session.Ended(a.ctx); err != nil {
		return err
	}
	if a.deadLeft < 0 {
		a.deadLeft = a.pool.DB.Stats().Idle
	}
	return a.joinUnderWay()
}

// again returns nil, perhaps after a pause, if there is to be another attempt after one that has
// failed with err.
//
//   - A wait outlives a restart or a failover of the server: see outage.
//   - A session of several callers that dies is replaced, three times at most (lossesLeft).
//   - Connections in the pool may be dead, after a restart of the server, say: as database/sql
//     does, such a one is dropped and the next one tried, for as many as there were (deadLeft).
//   - Anything else is final. So is a server that cannot be reached at first, except for Lead.
func (a *acquisition) again(err error, by opener) error {
	if err == errNoPlace || errors.Is(err, session.ErrYield) { // the caller goes on, and finds the end of ctx itself
		return err
	}
	if a.ctx.Err() != nil {
		return a.late(err, by)
	}
	lost := errors.As(err, new(lockconn.LostError)) // by a request of another's, perhaps
	// database/sql closes a Conn that it has found dead.
	gone := lost || pgsql.Gone(err) || by != nobody && errors.Is(err, sql.ErrConnDone)
	if errors.Is(err, session.ErrStandby) { // after a failover, the way may lead to one for a while
		gone = !a.missedSince.IsZero()
	}
	passes := gone || by == nobody && (a.waited || a.Lead) && pgsql.MayPass(err)
	switch {
	case !passes || errors.Is(err, session.ErrRefused) || pgsql.PoolClosed(err):
		return err
	case a.waited:
		return a.outlive(err)
	case (lost || by == others) && a.lossesLeft > 0:
		a.lossesLeft--
		return nil
	case a.deadLeft > 0 && (by != nobody || pgsql.IsNoAnswer(err)):
		a.deadLeft--
		return nil
	case a.Lead:
		return a.outlive(err)
	default:
		return err
	}
}

// late returns the error of an attempt that has failed with err, after the end of ctx, and sets hint and
// unanswered.
func (a *acquisition) late(err error, by opener) error {
	cause := context.Cause(a.ctx)
	switch {
	case by == nobody && a.pool.Exhausted():
		a.hint = a.m.busy(a.pool)
	case !errors.Is(err, cause) && (pgsql.Gone(err) || by == nobody):
		a.hint, a.unanswered = err.Error(), true // why not even the server has answered
	}
	if errors.Is(err, cause) {
		return err
	}
	return errors.Join(cause, err)
}
