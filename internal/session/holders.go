package session

import (
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

// A Holder is a session that holds a lock, or waits for it.
type Holder struct {
	PID     int
	Granted bool
	Shared  bool

	User, ApplicationName, ClientAddr, State, Query string

	SessionStart, WaitStart time.Time
}

// Holders returns who holds the lock of k, and then who waits for it.
func Holders(ctx context.Context, q Querier, k pgsql.Key) (holders []Holder, err error) {
	classid, objid, subid := k.Columns()
	rows, err := q.QueryContext(ctx, pgsql.Holders, int64(classid), int64(objid), subid)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, rows.Close()) }()
	for rows.Next() {
		var h Holder
		var start, wait sql.NullTime
		if err := rows.Scan(&h.PID, &h.Granted, &h.Shared, &h.User, &h.ApplicationName, &h.ClientAddr,
			&h.State, &h.Query, &start, &wait); err != nil {
			return nil, err
		}
		h.SessionStart, h.WaitStart = start.Time, wait.Time
		holders = append(holders, h)
	}
	return holders, rows.Err()
}

var silent = slog.New(slog.DiscardHandler)

// HeldBy says who holds the lock of k, for the message of a Timeout that is over with ctx, or nothing if
// that cannot be told in time. It asks on a connection that lies ready in the pool. A question that is
// not answered in time is left, and not broken off, which the server would log. done is called when it
// has ended.
func (p *Pool) HeldBy(ctx context.Context, k pgsql.Key, done func()) string {
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

func (p *Pool) heldBy(k pgsql.Key) string {
	ctx, cancel := context.WithTimeout(context.Background(), Grace)
	defer cancel()
	s, err := p.Open(ctx, silent, ForLocks)
	if err != nil {
		return ""
	}
	var holders []Holder
	err = s.Do(context.Background(), AnswerBound, func(ctx context.Context) (err error) {
		holders, err = Holders(ctx, s.conn, k)
		return err
	})
	if err != nil && pgsql.State(err) == "" {
		s.Discard()
		return ""
	}
	s.HandBack()
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

// Waits returns the statements that wait for locks in the session's database.
func (s *Session) Waits() ([]Statement, error) {
	var all []Statement
	err := s.Do(context.Background(), Grace, func(ctx context.Context) error {
		rows, err := s.conn.QueryContext(ctx, pgsql.Waits)
		if err != nil {
			return err
		}
		defer rows.Close()
		for rows.Next() {
			var w Statement
			if err := rows.Scan(&w.PID, &w.ApplicationName, &w.Query); err != nil {
				return err
			}
			all = append(all, w)
		}
		return rows.Err()
	})
	if err != nil {
		return nil, err
	}
	return all, nil
}

// Waits is Session.Waits, on a connection of the pool.
func (p *Pool) Waits() ([]Statement, error) {
	ctx, cancel := context.WithTimeout(context.Background(), Grace)
	defer cancel()
	s, err := p.Open(ctx, silent, ForLocks)
	if err != nil {
		return nil, err
	}
	all, err := s.Waits()
	if err != nil && pgsql.State(err) == "" {
		s.Discard()
	} else {
		s.HandBack()
	}
	return all, err
}

// describe says who holds a lock, together with others.
func (h Holder) describe(others []Holder) string {
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
