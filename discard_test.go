package advisory

import (
	"context"
	"database/sql"
	"io"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// What Close does is the driver's business: that of pgx on a pgxpool hands a sound
// session to the next user. None may have a lock then.
func TestADiscardedSessionLeavesNoLockEvenIfCloseDoesNotEndIt(t *testing.T) {
	t.Parallel()
	internal := pgError("XX000")
	for _, test := range []struct {
		name string
		run  func(t *testing.T, db *sql.DB, failing func(string, error))
	}{
		{"the release fails", func(t *testing.T, db *sql.DB, failing func(string, error)) {
			failing(unlockQuery, internal)
			wantError(t, WithLock(t.Context(), db, key, nothing), ErrLost, internal)
		}},
		{"the release of conn fails", func(t *testing.T, db *sql.DB, failing func(string, error)) {
			failing(unlockExposedQuery, internal)
			wantError(t, withConnLock(t.Context(), db), ErrLost, internal)
		}},
		{"the release of the caller's conn fails", func(t *testing.T, db *sql.DB, failing func(string, error)) {
			failing(unlockHeldQuery, internal)
			conn := borrow(t, db)
			wantError(t, AcquireConn(t.Context(), conn, key))
			wantError(t, ReleaseConn(t.Context(), conn, key), ErrLost, internal)
		}},
		{"the answer to the try is an error", func(t *testing.T, db *sql.DB, failing func(string, error)) {
			failing(tryQuery, internal)
			wantError(t, WithLock(t.Context(), db, key, nothing), internal)
		}},
		{"BEGIN fails under a session-level lock", func(t *testing.T, db *sql.DB, failing func(string, error)) {
			failing("BEGIN SERIALIZABLE", internal)
			wantError(t, WithTxLock(t.Context(), db, key, noTx, isolation(sql.LevelSerializable)), internal)
		}},
		{"a heartbeat fails", func(t *testing.T, db *sql.DB, failing func(string, error)) {
			failing(armQuery, internal)
			wantError(t, WithLock(t.Context(), db, key, untilDone), ErrLost, internal)
		}},
	} {
		bubble(t, test.name, func(t *testing.T) {
			db, srv := newServer(t)
			held, armed := false, false
			fails := map[string]error{}
			srv.script = func(_ context.Context, _ int, query string) (int64, error) {
				switch {
				case isTry(query):
					held = true
				case query == freeQuery || query == resetQuery+freeQuery:
					held = false
				}
				armed = setting.MatchString(query) || armed && !resetting.MatchString(query)
				return 1, fails[plainly(query)]
			}
			test.run(t, db, func(query string, err error) { fails[query] = err })
			synctest.Wait()
			if held || armed {
				t.Errorf("held: %v, armed: %v; log: %q", held, armed, srv.lines())
			}
			if lines := srv.lines(); lines[len(lines)-1] != "1 close" || db.Stats().OpenConnections != 0 {
				t.Errorf("not closed; log: %q", lines)
			}
		})
	}
}

// A session that is not to be cleared is closed, and that within a moment.
func TestADiscardThatIsNotAnsweredEndsInAClose(t *testing.T) {
	t.Parallel()
	for name, answer := range map[string]any{
		"an error":  fails(pgError("XX000")),
		"no answer": hangs,
	} {
		bubble(t, name, func(t *testing.T) {
			db, srv := newServer(t)
			srv.script = script(when(unlockQuery, refused), when(freeQuery, answer))
			start := time.Now()
			wantError(t, WithLock(t.Context(), db, key, nothing), ErrLost)
			wantTook(t, start, 0, abandonAfter)
			time.Sleep(clearBound)
			synctest.Wait()
			srv.want(t, on(1, "open", tryQuery, unlockQuery, freeQuery, "close")...)
		})
	}
}

// A session that cannot be cleaned is closed, and the Logger told, unless the session has ended itself.
func TestASessionThatCannotBeCleaned(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		dirty string
		err   error
		told  bool
	}{
		{"deallocate", pgError("57014"), true},
		{resetQuery, pgError("57014"), true},
		{"deallocate", io.EOF, false},
	} {
		synctest.Test(t, func(t *testing.T) {
			p, dbs, srvs := newTable(t, 1)
			p.takes(time.Millisecond)
			p.fail = failing(test.dirty, test.err)
			var log logBuffer
			atOnce(t, dbs[0], 100, 2*defaultHeartbeat, log.option())
			lines := srvs[0].lines()
			if last := lines[len(lines)-1]; last != "1 close" || strings.Contains(log.String(), "could not be cleaned") != test.told {
				t.Errorf("after %q failed with %v: %q; log: %s", test.dirty, test.err, last, log.String())
			}
			wantIdle(t, dbs[0])
		})
	}
}

// A lock that came after its caller had gone, and cannot be given back, costs the session.
func TestALateGrantThatCannotBeUndone(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		p, dbs, srvs := newTable(t, 1)
		p.takes(time.Second)
		undone := has("unlock")
		p.fail = failing(func(query string) bool { return undone(query) && strings.Contains(query, "43") }, pgError("57014"))
		l := take(t, dbs[0], key, Heartbeat(time.Minute), HolderTimeout(time.Hour))
		ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
		defer cancel()
		wantError(t, WithLock(ctx, dbs[0], ID(43), nothing), ErrNotAcquired, context.DeadlineExceeded)
		time.Sleep(10 * time.Second)
		wantError(t, context.Cause(l.Context()), ErrLost, pgError("57014"))
		wantError(t, l.Release(), ErrLost, pgError("57014"))
		wantIdle(t, dbs[0])
		if n := p.holders(ID(43)); n != 0 || srvs[0].open() != 0 {
			t.Errorf("%d holders, %d connections", n, srvs[0].open())
		}
	})
}
