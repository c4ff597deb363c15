package advisory

import (
	"context"
	"errors"
	"io"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/pgadvisory/advisory/internal/session"
)

// The heartbeats count from when the grant was asked for, because a server that is armed
// with it counts from the grant. One that took a heartbeat or longer is no reason to give
// up the lock: it is confirmed, or, if nobody else counts, the first one is from the answer.
func TestTheFirstHeartbeat(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		waits       bool
		took, first time.Duration
	}{
		{false, 0, time.Second},
		{false, 600 * time.Millisecond, time.Second},
		{false, 5 * time.Second, 6 * time.Second},
		{true, 600 * time.Millisecond, time.Second},
		{true, 999 * time.Millisecond, time.Second},
		{true, 5 * time.Second, 6 * time.Second}, // it was confirmed at 5 s
	} {
		synctest.Test(t, func(t *testing.T) {
			db, srv := newServer(t)
			start := time.Now()
			var at []time.Duration
			srv.script = func(_ context.Context, _ int, query string) (int64, error) {
				switch {
				case query == tryQuery && test.waits:
					return 0, nil
				case query == tryQuery || plainly(query) == armedWaitQuery:
					time.Sleep(test.took)
				case isBeat(query):
					at = append(at, time.Since(start))
				}
				return 1, nil
			}
			wantError(t, WithLock(t.Context(), db, key, sleeps(1100*time.Millisecond)))
			if len(at) == 0 || !slices.Contains(at, test.first) || at[0] != test.first && at[0] != test.took {
				t.Errorf("waits %v, grant after %v: heartbeats at %v, want %v", test.waits, test.took, at, test.first)
			}
		})
	}
}

// The server counts from a grant that may have been long on its way.
func TestAnArmedGrantThatTookAHeartbeatIsConfirmed(t *testing.T) {
	t.Parallel()
	wait := strings.Replace(armedWaitQuery, "'15000'", "'600'", 1)
	for _, test := range []struct {
		name  string
		took  time.Duration
		reply reply // to the question
		want  []string
		wants []any
	}{
		{"quick", 199 * time.Millisecond, done, on(1, "open", tryQuery, wait, disarmQuery), nil},
		{"slow", 200 * time.Millisecond, granted, on(1, "open", tryQuery, wait, beatQuery, disarmQuery), nil},
		{
			"too slow", time.Second, refused,
			slices.Concat(on(1, "open", tryQuery, wait, beatQuery, resetQuery+freeQuery, "close"), on(2, "open", tryQuery, unlockQuery)), nil,
		},
		{
			"gone", time.Second, fails(io.ErrUnexpectedEOF),
			slices.Concat(on(1, "open", tryQuery, wait, beatQuery, "close"), on(2, "open", tryQuery, unlockQuery)), nil,
		},
		{
			"refused", time.Second, fails(pgError("53200")),
			slices.Concat(on(1, "open", tryQuery, wait, beatQuery, resetQuery+freeQuery, "close"), on(2, "open", tryQuery, unlockQuery)), nil,
		},
	} {
		for _, c := range closures[:3] {
			bubble(t, c.name+" "+test.name, func(t *testing.T) {
				db, srv := newServer(t)
				srv.script = func(_ context.Context, conn int, query string) (int64, error) {
					switch {
					case conn > 1:
					case query == tryQuery:
						return 0, nil
					case plainly(query) == wait:
						time.Sleep(test.took)
					case plainly(query) == beatQuery:
						return test.reply.rows, test.reply.err
					}
					return 1, nil
				}
				wantError(t, c.run(t.Context(), db, key, func(ctx context.Context) error { return ctx.Err() },
					Heartbeat(200*time.Millisecond), HolderTimeout(600*time.Millisecond)), test.wants...)
				synctest.Wait()
				srv.want(t, test.want...)
			})
		}
	}
}

// A grant that was so long on its way that the server, told to, may have ended the session since,
// is asked for again.
func TestAGrantThatWasLongOnItsWayIsConfirmed(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		p, dbs, srvs := newTable(t, 1)
		answer := srvs[0].script
		srvs[0].script = func(ctx context.Context, conn int, query string) (int64, error) {
			n, err := answer(ctx, conn, query)
			if strings.Contains(query, "try_advisory_lock(43)") {
				session.Sleep(ctx, 1200*time.Millisecond)
			}
			return n, err
		}
		l := take(t, dbs[0], key)
		time.Sleep(defaultHeartbeat + 100*time.Millisecond) // armed
		before := count(srvs[0].lines(), "'advisory.session', true)")
		wantError(t, WithLock(t.Context(), dbs[0], ID(43), func(ctx context.Context) error {
			if count(srvs[0].lines(), "'advisory.session', true)") == before {
				t.Error("nobody has asked")
			}
			return ctx.Err()
		}))
		wantError(t, l.Release())
		wantIdle(t, dbs[0])
		p.clean()
	})
}

func TestAGrantThatIsConfirmedTooLateIsNotUsed(t *testing.T) {
	t.Parallel()
	for _, c := range closures[:3] {
		bubble(t, c.name, func(t *testing.T) {
			db, srv := newServer(t)
			ctx, cancel := context.WithCancel(t.Context())
			srv.script = func(_ context.Context, _ int, query string) (int64, error) {
				switch {
				case isTry(query):
					return 0, nil
				case isWait(query):
					time.Sleep(time.Second)
				case isBeat(query):
					cancel()
				}
				return 1, nil
			}
			err := c.run(ctx, db, key, neverRuns(t), HolderTimeout(time.Minute))
			wantError(t, err, ErrNotAcquired, context.Canceled)
			if e := new(Error); !errors.As(err, &e) || e.Holder != "" {
				t.Errorf("held by %q: %v", e.Holder, err)
			}
		})
	}
}
