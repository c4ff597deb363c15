package advisory

import (
	"context"
	"database/sql"
	"sync/atomic"

	"github.com/pgadvisory/advisory/internal/pgsql"
)

// A marked context is one whose caller holds a lock, and what it knows of that. Each one
// points to the one outside it.
type marked struct {
	context.Context
	outer *marked
	db    *sql.DB
	keys  []Key
	token tokenSource
	ended atomic.Bool // the lock is not held any more
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

// mark makes m the context of one who holds locks on keys, made from ctx.
func (m *marked) mark(ctx context.Context, db *sql.DB, keys []Key) {
	m.Context, m.outer, m.db, m.keys = ctx, innermost(ctx), db, keys
	m.token.mark = m
}

// checkReentrant returns an error if ctx says that its caller holds one of keys
// already. The same key on another *sql.DB is taken for a lock of another database;
// where db is not known (nil), for the same.
func checkReentrant(ctx context.Context, db *sql.DB, keys []Key) error {
	for m := innermost(ctx); m != nil; m = m.outer {
		if m.ended.Load() || db != nil && m.db != db {
			continue
		}
		for _, held := range m.keys {
			for _, k := range keys {
				if held.key.Lock() == k.key.Lock() {
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

// held returns the keys that the caller of ctx holds in db's database. If db is nil, it is
// that of the innermost one, which held also returns.
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
