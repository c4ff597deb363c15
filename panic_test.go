package advisory

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/pgadvisory/advisory/internal/keyqueue"
	"github.com/pgadvisory/advisory/internal/pgsql"
	"github.com/pgadvisory/advisory/internal/session"
)

func TestFnsPanicReleasesAndGoesOnUnchanged(t *testing.T) {
	t.Parallel()
	for _, c := range closures {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			db, srv := newServer(t)
			value := new(int)
			wantPanic(t, value, func() {
				_ = c.run(t.Context(), db, key, func(context.Context) error { panic(value) })
			})
			srv.want(t, on(1, append(slices.Clip(c.acquires), c.undoes...)...)...)
		})
	}
}

func TestAPanicOnALostLockDiscardsAndSaysSoToTheLogger(t *testing.T) {
	t.Parallel()
	db, srv := newServer(t, granted, refused)
	var log logBuffer
	wantPanic(t, "mine", func() {
		_ = WithLock(t.Context(), db, key, func(context.Context) error { panic("mine") }, log.option())
	})
	srv.want(t, on(1, "open", tryQuery, unlockQuery, freeQuery, "close")...)
	if !strings.Contains(log.String(), "lock lost") {
		t.Errorf("log: %q", log.String())
	}
}

// A driver's panic while a session is opened is its caller's, and not the next one's trouble.
func TestADriversPanicWhileASessionIsOpened(t *testing.T) {
	t.Parallel()
	withConnLock := func(ctx context.Context, db *sql.DB) error {
		return WithConnLock(ctx, db, key, func(context.Context, *sql.Conn) error { return nil })
	}
	for name, call := range map[string]func(t *testing.T, db *sql.DB) error{
		"on the caller's goroutine": func(_ *testing.T, db *sql.DB) error { return WithLock(context.Background(), db, key, nothing) },
		"beside a ctx that may end": func(t *testing.T, db *sql.DB) error { return WithLock(t.Context(), db, key, nothing) },
		"WithConnLock":              func(t *testing.T, db *sql.DB) error { return withConnLock(t.Context(), db) },
		"WithConnLock, limited pool": func(t *testing.T, db *sql.DB) error {
			db.SetMaxOpenConns(2)
			return withConnLock(t.Context(), db)
		},
	} {
		bubble(t, name, func(t *testing.T) {
			db, srv := newServer(t)
			for range 2 { // on a new connection, and on one that lies ready
				wantError(t, WithLock(context.Background(), db, key, nothing))
			}
			srv.panicOnReset()
			wantPanic(t, "driver", func() { _ = call(t, db) })
			for range 3 {
				time.Sleep(time.Minute)
				wantError(t, call(t, db))
			}
		})
	}
}

// A driver's panic in a caller that recovers, as net/http does, takes nothing with it: the
// session is closed, and the next caller has the lock.
func TestADriversPanicLeavesNothingBehind(t *testing.T) {
	t.Parallel()
	second := ID(43)
	holdOnTwo := func(t *testing.T, _ *lockTable, here, there *sql.DB) {
		holdFor(t, here, ID(41), 2*time.Second) // so that the common session is another than that which waits
		holdFor(t, there, key, time.Second)
	}
	for _, test := range []struct {
		name  string
		on    string // the statement that panics
		setUp func(t *testing.T, p *lockTable, db, other *sql.DB)
		call  func(t *testing.T, db *sql.DB) error
	}{
		{name: "try", on: "pg_try_advisory_lock("},
		{name: "unlock", on: "pg_advisory_unlock("},
		{
			name: "several keys", on: "pg_try_advisory_lock(",
			call: func(t *testing.T, db *sql.DB) error {
				return WithLocks(t.Context(), db, []Key{key, second}, nothing)
			},
		},
		{
			name: "the second of several keys", on: "SELECT WHERE CASE WHEN pg_catalog.pg_is_in_recovery() THEN false ELSE pg_catalog.pg_try_advisory_lock(43) END",
			setUp: holdOnTwo,
			call: func(t *testing.T, db *sql.DB) error {
				return WithLocks(t.Context(), db, []Key{key, second}, nothing)
			},
		},
		{
			name: "one of two sessions' unlocks", on: "WHERE pg_catalog.pg_advisory_unlock(42)",
			setUp: holdOnTwo,
			call: func(t *testing.T, db *sql.DB) error {
				return WithLocks(t.Context(), db, []Key{key, second}, nothing)
			},
		},
		{
			name: "the second of two releases", on: "pg_advisory_unlock(",
			call: func(t *testing.T, db *sql.DB) error {
				l := take(t, db, key)
				defer func() { wantError(t, l.Release(), ErrLost, session.ErrPanicked) }()
				return l.Release()
			},
		},
		{
			name: "wait", on: "set_config('lock_timeout'",
			setUp: func(t *testing.T, _ *lockTable, _, there *sql.DB) { holdFor(t, there, key, time.Second) },
		},
		{
			name: "look", on: "NOT granted",
			setUp: func(t *testing.T, _ *lockTable, db, _ *sql.DB) {
				holdFor(t, db, key, time.Second, Shared())
				time.Sleep(2 * keyqueue.HandOffFor)
			},
			call: func(t *testing.T, db *sql.DB) error { return WithLock(t.Context(), db, key, nothing, Shared()) },
		},
	} {
		for _, late := range []bool{false, true} {
			bubble(t, fmt.Sprintf("%s, late %v", test.name, late), func(t *testing.T) {
				p, dbs, srvs := newTable(t, 2)
				db := dbs[0]
				srvs[0].direct = true
				if test.setUp != nil {
					test.setUp(t, p, db, dbs[1])
				}
				answer := srvs[0].script
				var panics atomic.Bool // heartbeats ask, too
				panics.Store(true)
				srvs[0].script = func(ctx context.Context, conn int, query string) (int64, error) {
					if strings.Contains(query, test.on) && panics.CompareAndSwap(true, false) {
						if late {
							_, _ = answer(ctx, conn, query)
						}
						panic("driver")
					}
					return answer(ctx, conn, query)
				}
				wantPanic(t, "driver", func() {
					if test.call != nil {
						wantError(t, test.call(t, db))
					} else {
						wantError(t, WithLock(t.Context(), db, key, nothing))
					}
				})
				for _, k := range []Key{key, second} {
					wantError(t, WithLock(t.Context(), db, k, nothing, Timeout(10*time.Second)))
					wantError(t, WithConnLock(t.Context(), db, k, func(context.Context, *sql.Conn) error { return nil }, Timeout(time.Second)))
				}
				time.Sleep(5 * time.Second)
				wantIdle(t, db)
				p.clean()
			})
		}
	}
}

// A driver's panic in COMMIT or ROLLBACK frees the lock, and ends the transaction with its
// connection. database/sql never lets go of such a connection: so this is no bubble.
func TestADriversPanicAtTheEndOfATransaction(t *testing.T) {
	t.Parallel()
	for _, statement := range []string{"COMMIT", "ROLLBACK"} {
		for _, isolation := range []sql.IsolationLevel{sql.LevelDefault, sql.LevelSerializable} {
			t.Run(statement+" "+isolation.String(), func(t *testing.T) {
				t.Parallel()
				p, dbs, srvs := newTable(t, 2)
				answer := srvs[0].script
				srvs[0].script = func(ctx context.Context, conn int, query string) (int64, error) {
					if query == statement {
						panic("driver")
					}
					return answer(ctx, conn, query)
				}
				wantPanic(t, "driver", func() {
					_ = WithTxLock(t.Context(), dbs[0], key, func(context.Context, *sql.Tx) error {
						if statement == "ROLLBACK" {
							return errors.New("fn")
						}
						return nil
					}, TxOptions(&sql.TxOptions{Isolation: isolation}))
				})
				wantError(t, WithLock(t.Context(), dbs[1], key, nothing, Timeout(10*time.Second)))
				p.clean()
			})
		}
	}
}

// A driver's panic in Token, which fn recovers from, keeps no release for ever. No bubble: database/sql
// never lets go of such a connection.
func TestADriversPanicInToken(t *testing.T) {
	t.Parallel()
	for _, direct := range []bool{false, true} {
		for name, run := range map[string]func(ctx context.Context, db *sql.DB, fn func(context.Context) error) error{
			"WithLock": func(ctx context.Context, db *sql.DB, fn func(context.Context) error) error {
				return WithLock(ctx, db, key, fn)
			},
			"WithConnLock": func(ctx context.Context, db *sql.DB, fn func(context.Context) error) error {
				return WithConnLock(ctx, db, key, func(ctx context.Context, _ *sql.Conn) error { return fn(ctx) })
			},
			"WithTxLock": func(ctx context.Context, db *sql.DB, fn func(context.Context) error) error {
				return WithTxLock(ctx, db, key, func(ctx context.Context, _ *sql.Tx) error { return fn(ctx) })
			},
		} {
			t.Run(fmt.Sprintf("%s, direct %v", name, direct), func(t *testing.T) {
				t.Parallel()
				_, dbs, srvs := newTable(t, 1)
				srvs[0].direct = direct
				answer := srvs[0].script
				srvs[0].script = func(ctx context.Context, conn int, query string) (int64, error) {
					if query == pgsql.Token {
						panic("driver")
					}
					return answer(ctx, conn, query)
				}
				done := make(chan error, 1)
				go func() {
					done <- run(context.Background(), dbs[0], func(ctx context.Context) error {
						defer func() { _ = recover() }()
						_, _ = Token(ctx)
						return nil
					})
				}()
				select {
				case <-done:
				case <-time.After(20 * time.Second):
					t.Errorf("the release has not returned after 20s")
				}
			})
		}
	}
}
