package session

import (
	"cmp"
	"context"
	"database/sql"
	"errors"
	"log/slog"
	"strconv"
	"strings"
	"time"

	"github.com/pgadvisory/advisory/internal/pgsql"
)

// A Querier is a *sql.DB, *sql.Conn or *sql.Tx.
type Querier interface {
	QueryContext(ctx context.Context, query string, args ...any) (*sql.Rows, error)
}

// A Backend is a session that holds a lock, or waits for it, as others see it.
type Backend struct {
	PID     int
	Granted bool
	Shared  bool

	User, ApplicationName, ClientAddr, State, Query string

	SessionStart, WaitStart time.Time
}

// Holders returns who holds the lock of k, and then who waits for it.
func Holders(ctx context.Context, q Querier, k pgsql.Key) (holders []Backend, err error) {
	classid, objid, subid := k.Columns()
	err = eachRow(ctx, q, func(rows *sql.Rows) error {
		var h Backend
		err := h.scan(rows)
		holders = append(holders, h)
		return err
	}, pgsql.Holders, int64(classid), int64(objid), subid)
	return holders, err
}

// A Lock is a lock, and a session that holds it or waits for it.
type Lock struct {
	Key pgsql.Key // without its name
	Backend
}

// Locks returns all advisory locks of a database: who holds one, and then who waits for one.
func Locks(ctx context.Context, q Querier) (locks []Lock, err error) {
	err = eachRow(ctx, q, func(rows *sql.Rows) error {
		var l Lock
		var classid, objid int64
		var subid int
		err := l.scan(rows, &classid, &objid, &subid)
		l.Key = pgsql.KeyOf(classid, objid, subid)
		locks = append(locks, l)
		return err
	}, pgsql.Locks)
	return locks, err
}

func eachRow(ctx context.Context, q Querier, scan func(*sql.Rows) error, query string, args ...any) (err error) {
	rows, err := q.QueryContext(ctx, query, args...)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, rows.Close()) }()
	for rows.Next() {
		if err := scan(rows); err != nil {
			return err
		}
	}
	return rows.Err()
}

// scan reads a row: others first, and then the columns of Holders.
func (h *Backend) scan(rows *sql.Rows, others ...any) error {
	var start, wait sql.NullTime
	err := rows.Scan(append(others, &h.PID, &h.Granted, &h.Shared, &h.User, &h.ApplicationName, &h.ClientAddr,
		&h.State, &h.Query, &start, &wait)...)
	h.SessionStart, h.WaitStart = start.Time, wait.Time
	return err
}

// Silent is the Logger that says nothing.
var Silent = slog.New(slog.DiscardHandler)

// HeldBy says who holds the lock of k, for the message of a Timeout that ended ctx, or returns "" if that
// cannot be told within Grace. A question that takes longer is left, and not broken off, which the server
// would log. done is called when it has ended.
func (p Pool) HeldBy(ctx context.Context, k pgsql.Key, done func()) string {
	end, _ := ctx.Deadline()
	who := make(chan string, 1)
	go func() {
		defer done()
		who <- p.heldBy(k)
	}()
	late := time.NewTimer(time.Until(end.Add(Grace)))
	defer late.Stop()
	select {
	case w := <-who:
		return w
	case <-late.C:
		return ""
	}
}

func (p Pool) heldBy(k pgsql.Key) string {
	soon, cancel := context.WithTimeout(context.Background(), Grace)
	defer cancel()
	s, err := p.Open(soon, Silent, ForLocks)
	if err != nil {
		return ""
	}
	var holders []Backend
	s.End(func() bool {
		holders, err = Run(context.Background(), &s.Sender, AnswerBound, 0, func(ctx context.Context) ([]Backend, error) { return Holders(ctx, s.conn, k) })
		return err == nil || pgsql.Answered(err)
	})
	if err != nil || len(holders) == 0 || !holders[0].Granted {
		return ""
	}
	return holders[0].describe(holders[1:])
}

// A Statement is one that waits for a lock, and begins with a comment of ours.
type Statement struct {
	PID             int
	ApplicationName string
	Query           string
}

// Waits returns the statements that wait for locks in the session's database. It returns at most Grace
// and abandonAfter past the end of ctx. The session itself waits for the lock of k, which others see
// meanwhile.
func (s *Session) Waits(ctx context.Context, k pgsql.Key) ([]Statement, error) {
	return s.waits(ctx, s.comment(k))
}

func (s *Session) waits(ctx context.Context, comment string) ([]Statement, error) {
	query := comment + pgsql.Waits
	all, err := Run(ctx, &s.Sender, AnswerBound, len(query), func(ctx context.Context) (all []Statement, err error) {
		rawErr := raw(s.conn, func(dc any) error {
			all, err = waitsOn(ctx, unwrap(dc), query)
			return nil
		})
		return all, cmp.Or(rawErr, err)
	})
	switch {
	case err == nil:
		return all, nil
	case s.place == pgsql.InTx && pgsql.Answered(err): // the transaction of the wait has failed
		_, undoErr := s.Exec(ctx, AnswerBound, s.undo(pgsql.Key{}))
		err = cmp.Or(undoErr, err)
	}
	return nil, err
}

// Waits is Session.Waits, on a connection of the pool.
func (p Pool) Waits(ctx context.Context) (all []Statement, err error) {
	soon, cancel := context.WithTimeout(ctx, Grace)
	defer cancel()
	s, err := p.Open(soon, Silent, ForLocks)
	if err != nil {
		return nil, err
	}
	s.End(func() bool {
		all, err = s.waits(ctx, "")
		return err == nil || pgsql.Answered(err)
	})
	return all, err
}

// describe says who holds a lock, together with others.
func (h Backend) describe(others []Backend) string {
	var known []string
	if h.ApplicationName != "" {
		known = append(known, "app "+strconv.Quote(h.ApplicationName))
	}
	if h.ClientAddr != "" {
		known = append(known, h.ClientAddr)
	}
	who := "pid " + strconv.Itoa(h.PID)
	if len(known) > 0 {
		who += " (" + strings.Join(known, ", ") + ")"
	}
	n := 0
	for _, h := range others {
		if h.Granted {
			n++
		}
	}
	if n > 0 {
		who += " and " + pgsql.Plural(n, "other")
	}
	return who
}
