package advisory

import (
	"context"
	"database/sql"
	"errors"
	"strconv"
	"strings"
	"time"
)

// A Querier is what [Holders] asks: a *sql.DB, *sql.Conn or *sql.Tx.
type Querier interface {
	QueryContext(ctx context.Context, query string, args ...any) (*sql.Rows, error)
}

// A Holder is a session that holds a lock, or waits for it.
type Holder struct {
	PID     int  // of the server's process; 0 for a prepared transaction
	Granted bool // false: it waits
	Shared  bool

	// From pg_stat_activity. Empty where this role may not see them: it needs
	// pg_read_all_stats for the sessions of other roles.
	User, ApplicationName, ClientAddr, State, Query string

	// By the server's clock. WaitStart is zero for a holder, and for a moment after
	// a wait has begun. The server does not record when a lock was granted.
	SessionStart, WaitStart time.Time
}

// holdersStatement compares as pg_locks spreads a bigint, or two ints, over its
// columns: the manual's section "pg_locks".
const holdersStatement = `SELECT COALESCE(l.pid, 0), l.granted, l.mode OPERATOR(pg_catalog.=) 'ShareLock',
	COALESCE(a.usename::pg_catalog.text, ''), COALESCE(a.application_name, ''), COALESCE(pg_catalog.host(a.client_addr), ''), COALESCE(a.state, ''),
	CASE WHEN a.query OPERATOR(pg_catalog.=) '<insufficient privilege>' THEN '' ELSE COALESCE(a.query, '') END,
	a.backend_start, l.waitstart
FROM pg_catalog.pg_locks l LEFT JOIN pg_catalog.pg_stat_activity a ON a.pid OPERATOR(pg_catalog.=) l.pid
WHERE l.locktype OPERATOR(pg_catalog.=) 'advisory'
	AND l.classid OPERATOR(pg_catalog.=) $1::pg_catalog.int8::pg_catalog.oid
	AND l.objid OPERATOR(pg_catalog.=) $2::pg_catalog.int8::pg_catalog.oid
	AND l.objsubid OPERATOR(pg_catalog.=) $3::pg_catalog.int4
	AND l.database OPERATOR(pg_catalog.=) (SELECT oid FROM pg_catalog.pg_database WHERE datname OPERATOR(pg_catalog.=) pg_catalog.current_database())
ORDER BY l.granted DESC, l.waitstart, a.backend_start, l.pid`

// Holders returns who holds the lock of key in q's database, and then who waits for it,
// longest first. One session may hold many locks: see the package documentation. Waits of
// this package begin anew every 100 to 400 ms, so that their WaitStart is recent; those who wait
// behind another caller of their own process, or try with pauses, are not in the server's
// queue, and not seen.
//
// An operator sees the same in psql, for the key of, say, Name("nightly-report"), with
//
//	SELECT l.pid, l.granted, l.mode, l.waitstart, a.usename, a.application_name, a.client_addr, a.state, a.query
//	FROM pg_locks l LEFT JOIN pg_stat_activity a USING (pid)
//	WHERE locktype = 'advisory' AND objsubid = 1
//	  AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
//	  AND (classid::bigint << 32 | objid::bigint) = ('x' || left(encode(sha256(convert_to('nightly-report', 'UTF8')), 'hex'), 16))::bit(64)::bigint
//	ORDER BY granted DESC, waitstart;
//
// (objsubid is 2 for a [Pair], whose ints are classid and objid), and breaks the lock
// by ending the session that holds it: SELECT pg_terminate_backend(pid). That ends all the
// locks on the session. Their holders find out within two heartbeats.
func Holders(ctx context.Context, q Querier, key Key) ([]Holder, error) {
	c := call{function: "Holders", missing: missing("q", isNil(q), "", false)}
	if _, err := c.check(ctx, "look up", []Key{key}, nil); err != nil {
		return nil, err
	}
	holders, err := queryHolders(ctx, q, key)
	if err != nil {
		return nil, &lockError{op: "look up", key: key.String(), msg: explain(err), errs: []error{err}}
	}
	return holders, nil
}

// isNil finds the nil pointers of database/sql in q, too.
func isNil(q Querier) bool {
	switch q := q.(type) {
	case nil:
		return true
	case *sql.DB:
		return q == nil
	case *sql.Conn:
		return q == nil
	case *sql.Tx:
		return q == nil
	}
	return false
}

func queryHolders(ctx context.Context, q Querier, key Key) (holders []Holder, err error) {
	subid := 1
	if key.space == pairSpace {
		subid = 2
	}
	rows, err := q.QueryContext(ctx, holdersStatement, int64(uint64(key.id)>>32), int64(uint32(key.id)), subid)
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

// heldBy says who holds the lock of key, for the message of a Timeout, or nothing if
// that cannot be told.
func heldBy(ctx context.Context, q Querier, key Key) (string, error) {
	holders, err := queryHolders(ctx, q, key)
	if err != nil || len(holders) == 0 || !holders[0].Granted {
		return "", err
	}
	h := holders[0]
	var known []string
	if h.ApplicationName != "" {
		known = append(known, "app "+strconv.Quote(h.ApplicationName))
	}
	if h.ClientAddr != "" {
		known = append(known, h.ClientAddr)
	}
	who := "held by pid " + strconv.Itoa(h.PID)
	if len(known) > 0 {
		who += " (" + strings.Join(known, ", ") + ")"
	}
	others := 0
	for _, h := range holders[1:] {
		if h.Granted {
			others++
		}
	}
	if others > 0 {
		who += " and " + plural(others, "other")
	}
	return who, nil
}
