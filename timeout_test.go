package advisory

import (
	"context"
	"database/sql"
	"errors"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/pgadvisory/advisory/internal/pgsql"
	"github.com/pgadvisory/advisory/internal/session"
)

func TestTimeoutIsKeptByTheServerAndCostsNoConnection(t *testing.T) {
	t.Parallel()
	for i, c := range closures {
		bubble(t, c.name, func(t *testing.T) {
			db, srv := newServer(t)
			srv.script = taken(t)
			start := time.Now()
			err := c.run(t.Context(), db, key, nothing, Timeout(time.Second))
			wantError(t, err, ErrHeld, "advisory: acquire bigint 42: not acquired within 1s")
			wantTook(t, start, time.Second, time.Second)
			sent := [][]string{
				0: {"open", tryQuery, armedWaitQuery, holdersQuery},
				3: {"open", tryQuery, ownWaitQuery, holdersQuery},
				4: {"open", "BEGIN", tryTxQuery, waitTxQuery, "ROLLBACK", holdersQuery},
			}[[]int{0, 0, 0, 3, 4, 3}[i]]
			if diff := cmp.Diff(on(1, sent...), slices.Compact(srv.lines())); diff != "" {
				t.Errorf("log of the server, slices in a row as one (-want +got):\n%s", diff)
			}
			if stats := db.Stats(); stats.InUse != 0 || stats.Idle != 1 {
				t.Errorf("%+v", stats)
			}
		})
	}
}

func TestAServerThatDoesNotAnswerEndsATimeoutSoonAfter(t *testing.T) {
	t.Parallel()
	for _, c := range closures {
		bubble(t, c.name, func(t *testing.T) {
			db, srv := newServer(t)
			srv.script = script(when(has("lock"), hangs))
			start := time.Now()
			err := c.run(t.Context(), db, key, nothing, Timeout(2*time.Second))
			wantError(t, err, ErrNotAcquired, "not acquired within 2s", "no answer from the server")
			var idleTimeout pgsql.NoAnswer
			var is interface{ Timeout() bool }
			if !errors.As(err, &idleTimeout) || !errors.As(err, &is) || !is.Timeout() {
				t.Errorf("error %v", err)
			}
			wantTook(t, start, 2*time.Second, 2*time.Second+session.Grace+2*abandonAfter)
			synctest.Wait()
			if srv.open() != 0 {
				t.Error("the connection was not discarded")
			}
		})
	}
}

func TestAWaitThatIsNotAnsweredIsGivenUpWithoutATimeoutToo(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		db, srv := newServer(t)
		srv.script = func(ctx context.Context, conn int, query string) (int64, error) {
			if conn > 1 {
				return 1, nil
			}
			if plainly(query) == armedWaitQuery {
				<-ctx.Done()
				return 0, ctx.Err()
			}
			return 0, nil
		}
		start := time.Now()
		wantError(t, WithLock(t.Context(), db, key, nothing))
		wantTook(t, start, sliceMin+session.AnswerBound, sliceMin+session.AnswerBound+time.Second)
		srv.want(t, slices.Concat(on(1, "open", tryQuery, armedWaitQuery, "close"), on(2, "open", probeQuery, armedWaitQuery, disarmQuery))...)
	})
}

func TestATimeoutWithoutEndIsOne(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		db, srv := newServer(t, refused, refused)
		wantError(t, WithLock(t.Context(), db, key, nothing, Timeout(1<<63-1)))
		srv.want(t, on(1, "open", tryQuery, armedWaitQuery, armedWaitQuery, disarmQuery)...)
	})
}

// A Timeout in the process's own queue is kept, and its error says who holds the lock.
func TestATimeoutInTheLocalQueue(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		p, dbs, srvs := newTable(t, 1)
		l := take(t, dbs[0], key)
		for _, c := range closures {
			start := time.Now()
			wantError(t, c.run(t.Context(), dbs[0], key, nothing, Timeout(time.Second)), ErrHeld, "not acquired within 1s", "held by this process")
			if d := time.Since(start); d != time.Second {
				t.Errorf("%s: after %v", c.name, d)
			}
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			wantError(t, c.run(ctx, dbs[0], key, nothing), ErrNotAcquired, context.DeadlineExceeded)
			cancel()
		}
		if srvs[0].opened != 1 { // nobody else is asked who holds it
			t.Errorf("%d connections", srvs[0].opened)
		}
		wantError(t, l.Release())
		wantError(t, WithConnLock(t.Context(), dbs[0], key, func(context.Context, *sql.Conn) error {
			wantError(t, WithLock(t.Context(), dbs[0], key, nothing, Timeout(time.Second)), ErrHeld)
			return nil
		}))
		wantIdle(t, dbs[0])
		p.clean()
	})
}

// One that polls keeps its Timeout and its ctx.
func TestAPollEndsInTime(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		p, dbs, _ := newTable(t, 2)
		dbs[0].SetMaxOpenConns(1)
		l := take(t, dbs[1], key)
		start := time.Now()
		wantError(t, WithLock(t.Context(), dbs[0], key, nothing, Timeout(time.Second)), ErrHeld, "not acquired within 1s")
		wantTook(t, start, time.Second, time.Second)
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		wantError(t, WithLock(ctx, dbs[0], key, nothing), ErrNotAcquired, context.DeadlineExceeded)
		wantTook(t, start, 2*time.Second, 2*time.Second)
		wantError(t, l.Release())
		wantIdle(t, dbs[0])
		p.clean()
	})
}

func TestWaitingForAPooledConnectionCounts(t *testing.T) {
	t.Parallel()
	for _, c := range closures {
		for _, test := range []struct {
			name  string
			ctx   time.Duration
			opts  []Option
			wants []any
		}{
			{"Timeout", time.Hour, []Option{Timeout(2 * time.Second)}, []any{ErrNotAcquired, "not acquired within 2s"}},
			{"ctx", 2 * time.Second, nil, []any{ErrNotAcquired, context.DeadlineExceeded}},
			{"NoWait", 2 * time.Second, []Option{NoWait()}, []any{ErrNotAcquired, context.DeadlineExceeded}},
		} {
			bubble(t, c.name+" "+test.name, func(t *testing.T) {
				db, srv := newServer(t)
				db.SetMaxOpenConns(1)
				borrow(t, db)
				ctx, cancel := context.WithTimeout(t.Context(), test.ctx)
				defer cancel()
				start := time.Now()
				wantError(t, c.run(ctx, db, key, nothing, test.opts...), append(test.wants, "pool")...)
				wantTook(t, start, 2*time.Second, 2*time.Second)
				srv.want(t, on(1, "open")...)
			})
		}
	}
}
