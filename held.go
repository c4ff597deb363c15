package advisory

import (
	"context"
	"database/sql"
	"sync"
	"sync/atomic"

	"github.com/pgadvisory/advisory/internal/pgsql"
	"github.com/pgadvisory/advisory/internal/session"
)

// A marked is a context whose caller holds locks, and what it knows of them.
type marked struct {
	context.Context
	outer *marked // the next one that the context is made from; nil: none
	db    *sql.DB
	keys  []Key
	ended atomic.Bool // the locks are not held any more

	on      *session.Session // the session that has the locks
	tx      *sql.Tx          // that of WithTxLock; nil: none
	tokenMu sync.Mutex       // guards token, and is held while it is asked for
	token   int64            // 0: not asked for yet
}

type markKey struct{}

// Value makes m known to contexts that are made from it.
func (m *marked) Value(key any) any {
	if key == (markKey{}) {
		return m
	}
	return m.Context.Value(key)
}

func innermost(ctx context.Context) *marked {
	m, _ := ctx.Value(markKey{}).(*marked)
	return m
}

// mark makes m the context of one who holds locks on keys, made from ctx. The locks are on the
// session on, and in tx unless that is nil.
func (m *marked) mark(ctx context.Context, db *sql.DB, keys []Key, on *session.Session, tx *sql.Tx) {
	m.Context, m.outer, m.db, m.keys, m.on, m.tx = ctx, innermost(ctx), db, keys, on, tx
}

// checkReentrant returns an error if ctx says that its caller holds one of keys already. A
// key that is held through another *sql.DB counts as one of another database, unless db is
// nil, which means that it is not known.
func checkReentrant(ctx context.Context, db *sql.DB, keys []Key) error {
	for m := innermost(ctx); m != nil; m = m.outer {
		if m.ended.Load() || db != nil && m.db != db {
			continue
		}
		for _, held := range m.keys {
			for _, k := range keys {
				if held.key.Unnamed() == k.key.Unnamed() {
					return &Error{
						Op: "acquire", Keys: []Key{k},
						msg:  "already held by the caller: the ctx is one that a function holding this lock was given, and waiting would last for ever",
						errs: []error{ErrReentrant},
					}
				}
			}
		}
	}
	return nil
}

// held returns the keys that, as ctx says, its caller holds through db. If db is nil, it is
// that of the innermost lock. held also returns db.
func held(ctx context.Context, db *sql.DB) (*sql.DB, []pgsql.Key) {
	var keys []pgsql.Key
	for m := innermost(ctx); m != nil; m = m.outer {
		if db == nil {
			db = m.db
		}
		if !m.ended.Load() && m.db == db {
			keys = append(keys, bare(m.keys)...)
		}
	}
	return db, keys
}
