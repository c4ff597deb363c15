package advisory

import (
	"context"
	"database/sql"
	"slices"
	"time"

	"github.com/pgadvisory/advisory/internal/pgsql"
	"github.com/pgadvisory/advisory/internal/session"
)

// A Querier is what [Holders] and [Locks] ask: a *sql.DB, *sql.Conn or *sql.Tx.
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

// Holders returns who holds the lock of key in q's database, and then who waits for it,
// longest first. One session may hold many locks: see "Connections" in the package
// documentation.
//
// Waits of this package begin anew every 100 to 400 ms, so their WaitStart is recent. Callers
// who wait behind another caller of their own process, or who try with pauses, are not in the
// server's queue, and are not seen.
//
// An operator sees the same in psql, for the key of Name("nightly-report"), with
//
//	SELECT l.pid, l.granted, l.mode, l.waitstart, a.usename, a.application_name, a.client_addr, a.state, a.query
//	FROM pg_locks l LEFT JOIN pg_stat_activity a USING (pid)
//	WHERE locktype = 'advisory' AND objsubid = 1
//	  AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
//	  AND (classid::bigint << 32 | objid::bigint) = ('x' || left(encode(sha256(convert_to('nightly-report', 'UTF8')), 'hex'), 16))::bit(64)::bigint
//	ORDER BY granted DESC, waitstart;
//
// For a [Pair], objsubid is 2, and its ints are classid and objid. To break the lock, the
// operator ends the session that holds it: SELECT pg_terminate_backend(pid). That ends all the
// locks on the session, and their holders find out within two heartbeats.
func Holders(ctx context.Context, q Querier, key Key) ([]Holder, error) {
	c := call{function: "Holders", missing: nilArg("q", isNil(q))}
	if _, err := c.check(ctx, "look up", []Key{key}, nil); err != nil {
		return nil, err
	}
	found, err := session.Holders(ctx, q, key.key)
	if err != nil {
		return nil, &Error{Op: "look up", Keys: []Key{key}, msg: pgsql.Explain(err), errs: []error{err}}
	}
	var holders []Holder
	for _, h := range found {
		holders = append(holders, Holder(h))
	}
	return holders, nil
}

// A LockState is a lock, and the sessions that hold it or wait for it.
type LockState struct {
	// Key has its name where that is known: see [Locks]. It equals the Key that [Name] or
	// [HashText] makes then, and otherwise the one of [ID] or [Pair].
	Key     Key
	Holders []Holder // none if it has just become free, and goes to the first of the Waiters
	Waiters []Holder // longest first
}

// Locks returns every advisory lock that is held or waited for in q's database, by this
// package or by any other program, in the order of their keys.
//
// The server knows a lock by its number. Statements of this package that wait, and heartbeats,
// begin with a comment that has the names of the keys. Locks takes a name from there if the
// name makes that number. So the name of a held lock is known after its first heartbeat, or
// while another waits for it. It is not known if it is long (over 64 bytes, percent-encoded),
// if it is not among the first four on its session, or if this role may not see the statements
// of others: that needs pg_read_all_stats.
//
// As with [Holders], callers who wait behind another caller of their own process, or who try
// with pauses, are not in the server's queue, and are not seen.
func Locks(ctx context.Context, q Querier) ([]LockState, error) {
	c := call{function: "Locks", missing: nilArg("q", isNil(q))}
	if _, err := c.check(ctx, "look up locks", nil, nil); err != nil {
		return nil, err
	}
	found, err := session.Locks(ctx, q)
	if err != nil {
		return nil, &Error{Op: "look up locks", msg: pgsql.Explain(err), errs: []error{err}}
	}
	names := make(map[pgsql.Key]Key)
	for _, l := range found {
		for _, name := range pgsql.NamesIn(l.Query) {
			for _, k := range []Key{Name(name), HashText(name)} {
				names[k.key.Unnamed()] = k
			}
		}
	}
	slices.SortStableFunc(found, func(a, b session.Lock) int { return pgsql.Compare(a.Key, b.Key) })
	var locks []LockState
	for i, l := range found {
		if i == 0 || l.Key != found[i-1].Key {
			key, named := names[l.Key]
			if !named {
				key = Key{l.Key}
			}
			locks = append(locks, LockState{Key: key})
		}
		s := &locks[len(locks)-1]
		if l.Granted {
			s.Holders = append(s.Holders, Holder(l.Backend))
		} else {
			s.Waiters = append(s.Waiters, Holder(l.Backend))
		}
	}
	return locks, nil
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
