package manager

import (
	"context"
	"database/sql"
	"errors"

	"github.com/pgadvisory/advisory/internal/pgsql"
	"github.com/pgadvisory/advisory/internal/session"
)

// OnConn takes the lock of r's only key on a connection of the caller's. Its wait takes part in finding
// deadlocks if the caller holds other locks, which are of r.DB. The error is a *Failure.
func OnConn(ctx context.Context, conn *sql.Conn, r *Request) error {
	a := newCallers(ctx, r)
	s := session.OnConn(conn, r.Log, r.Shared)
	s.Waiting = a.waiting
	if len(a.CallerHolds) > 0 { // otherwise nothing but the lock is asked for on conn
		a.equip(s)
	}
	return a.endCallers(func() error {
		err := s.Lock(a.ctx, a.at, a.NoWait, a.began)
		if err != nil {
			s.GiveUp(a.ctx, err)
		}
		return err
	})
}

// InTx is OnConn in a transaction of the caller's.
func InTx(ctx context.Context, tx *sql.Tx, r *Request) error {
	a := newCallers(ctx, r)
	return a.endCallers(func() error {
		return session.LockTx(a.ctx, tx, a.at, a.Shared, a.NoWait, func() {
			if len(a.CallerHolds) > 0 {
				a.search()
			} else { // r.DB is not known
				a.waiting()
			}
		})
	})
}

func newCallers(ctx context.Context, r *Request) *acquisition {
	a := newAcquisition(ctx, r)
	a.at = r.Keys[0]
	return a
}

// endCallers ends an acquisition with what lock returns. Nobody asks who holds the lock: a question that
// takes long would cost the caller's session or transaction.
func (a *acquisition) endCallers(lock func() error) error {
	defer a.end(nil)
	defer a.forgetWait()
	err := lock()
	if err == nil {
		return nil
	}
	f := &Failure{Cause: err}
	if cause := session.Ended(a.ctx); cause != nil && !errors.Is(err, cause) {
		f.Cause, f.Hint = errors.Join(cause, err), err.Error()
		a.unanswered = pgsql.Gone(err)
	}
	f.Held = errors.Is(err, session.ErrRefused) || errors.Is(f.Cause, session.ErrTimeout) && a.waited && !a.unanswered
	return f
}
