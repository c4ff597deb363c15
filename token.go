package advisory

import (
	"context"
	"database/sql"
	"errors"
	"strconv"

	"github.com/pgadvisory/advisory/internal/pgsql"
	"github.com/pgadvisory/advisory/internal/session"
)

// Token returns the fencing token of the innermost lock that ctx carries: a number that is
// larger than the token of every earlier holder of the lock on this server.
//
// A token is for what no lock can promise. A process that was frozen together with its clock,
// while the server let another take the lock, does not know it yet when it goes on. One of its
// writes may also still be under way in a network. Let the protected resource remember the
// largest token that it has seen, and refuse a smaller one:
//
//	UPDATE report SET body = $1, token = $2 WHERE id = $3 AND token <= $2
//
// Token asks the server once, in one round trip on the session that holds the lock
// (pg_current_xact_id, PostgreSQL manual, section "System Information Functions and
// Operators"), and returns the same number for as long as that lock is held. The question uses
// up one transaction ID, and waits for the disk as a commit does, so that numbers grow over a
// crash, too. Inside a transaction, that of [WithTxLock] or one that fn of [WithConnLock] has
// begun, it is the COMMIT that waits: until then, use the number in that transaction alone. A
// standby that is promoted without having received the last transactions may give out some
// numbers again.
//
// If that takes longer than two heartbeats, because a synchronous standby is away, say, the
// session cannot be shown to live meanwhile, and its locks are lost.
//
// ctx must be the one that fn was given, or be made from it. Otherwise Token returns an error,
// which matches [ErrLost] if the lock is not held any more.
func Token(ctx context.Context) (int64, error) {
	m := innermost(ctx)
	if m == nil {
		return 0, &Error{Op: "token of", msg: "ctx carries no lock; use the one that fn was given"}
	}
	return m.askToken(ctx)
}

var errHoldEnded = errors.New("it is not held any more")

// askToken returns the token of m's locks, and asks the server for it once.
func (m *marked) askToken(ctx context.Context) (int64, error) {
	m.tokenMu.Lock()
	defer m.tokenMu.Unlock()
	if m.ended.Load() {
		return 0, lostError("token of", m.keys, errHoldEnded)
	}
	if m.token != 0 {
		return m.token, nil
	}
	if err := ctx.Err(); err != nil {
		return 0, &Error{Op: "token of", Keys: m.keys, msg: context.Cause(ctx).Error(), errs: []error{err, context.Cause(ctx)}}
	}
	// Not under ctx: a driver that breaks off a statement closes the session.
	ask := m.on.Conn().QueryRowContext
	if m.tx != nil {
		ask = m.tx.QueryRowContext
	}
	text, err := session.Run(context.WithoutCancel(ctx), &m.on.Sender, session.AnswerBound, len(pgsql.Token), func(ctx context.Context) (text string, err error) {
		if m.ended.Load() { // by a release before this question's turn on the session
			return "", errHoldEnded
		}
		err = ask(ctx, pgsql.Token).Scan(&text)
		return text, err
	})
	var no int64
	if err == nil {
		no, err = strconv.ParseInt(text, 10, 64)
	}
	switch {
	case err == nil:
		m.token = no
		return no, nil
	case pgsql.Gone(err), errors.Is(err, errHoldEnded), errors.Is(err, sql.ErrTxDone), errors.Is(err, sql.ErrConnDone):
		return 0, lostError("token of", m.keys, err)
	default:
		return 0, &Error{Op: "token of", Keys: m.keys, msg: pgsql.Explain(err), errs: []error{err}}
	}
}
