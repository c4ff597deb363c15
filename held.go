package advisory

import (
	"context"
	"database/sql"
	"sync/atomic"
)

// A mark is what a context knows of a lock that its caller holds. Each one points
// to the one outside it.
type mark struct {
	outer *mark
	db    *sql.DB
	keys  []Key
	token tokenSource
	ended atomic.Bool // the lock is not held any more
}

type markKey struct{}

func innermost(ctx context.Context) *mark {
	m, _ := ctx.Value(markKey{}).(*mark)
	return m
}

// withMark returns ctx with the mark of locks on keys.
func withMark(ctx context.Context, db *sql.DB, keys []Key) (context.Context, *mark) {
	m := &mark{outer: innermost(ctx), db: db, keys: keys}
	m.token.mark = m
	return context.WithValue(ctx, markKey{}, m), m
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
				if held.lockID() == k.lockID() {
					return &lockError{
						op: "acquire", key: k.String(),
						msg:  "already held by the caller: the ctx is one that a function holding this lock was given, and waiting would last for ever",
						errs: []error{ErrReentrant},
					}
				}
			}
		}
	}
	return nil
}
