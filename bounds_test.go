package advisory

import (
	"context"
	"io"
	"log/slog"
	"math/rand/v2"
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/pgadvisory/advisory/internal/lockconn"
	"github.com/pgadvisory/advisory/internal/pgsql"
)

// A panicking Logger does.
type panicking struct{ slog.Handler }

func (panicking) Enabled(context.Context, slog.Level) bool  { return true }
func (panicking) Handle(context.Context, slog.Record) error { panic("the Logger") }

// A Logger that panics in an outage does not end the process.
func TestALoggerThatPanicsInAnOutage(t *testing.T) {
	if os.Getenv("ADVISORY_TEST_PANICS") == "" {
		cmd := exec.Command(os.Args[0], "-test.run=^TestALoggerThatPanicsInAnOutage$")
		cmd.Env = append(os.Environ(), "ADVISORY_TEST_PANICS=1")
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Errorf("the process ends, though its caller recovers: %v: %.300s", err, out)
		}
		return
	}
	db, srv := newServer(t)
	srv.script = func(_ context.Context, _ int, query string) (int64, error) {
		switch {
		case isWait(query):
			return 0, io.ErrUnexpectedEOF
		case strings.Contains(query, "_try_"):
			return 0, nil
		}
		return 1, nil
	}
	defer func() { _ = recover() }()
	_ = WithLock(t.Context(), db, key, nothing, Timeout(time.Second), Logger(slog.New(panicking{})))
}

// The last who leaves a session cleans it; but a Timeout does not wait for that.
func TestATimeoutOfTheLastWhoLeaves(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p, dbs, srvs := newTable(t, 2)
		srvs[0].direct = true
		there := take(t, dbs[1], ID(2))
		p.takes(10 * time.Millisecond)
		answer := srvs[0].script
		srvs[0].script = func(ctx context.Context, conn int, query string) (int64, error) {
			if query == "deallocate" {
				<-ctx.Done() // no answer
				return 0, ctx.Err()
			}
			return answer(ctx, conn, query)
		}
		l := take(t, dbs[0], ID(1))
		var wg sync.WaitGroup
		for _, k := range ids(20) { // so many that the statement is prepared
			wg.Go(func() { wantError(t, WithLock(t.Context(), dbs[0], k, nothing)) })
		}
		wg.Wait()
		go func() { _ = l.Release() }()
		time.Sleep(time.Millisecond)
		start := time.Now()
		err := WithLock(t.Context(), dbs[0], ID(2), nothing, Timeout(200*time.Millisecond))
		if d := time.Since(start); d > 1200*time.Millisecond {
			t.Errorf("after %v: %v", d, err)
		}
		_ = there.Release()
		time.Sleep(time.Minute)
	})
}

// What a try of several keys has got in vain is given back; but a Timeout does not wait for that.
func TestATimeoutWhileAPartIsGivenBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p, dbs, srvs := newTable(t, 2)
		srvs[0].direct = true
		there := take(t, dbs[1], ID(2))
		p.takes(time.Millisecond)
		answer := srvs[0].script
		srvs[0].script = func(ctx context.Context, conn int, query string) (int64, error) {
			if strings.HasSuffix(query, "SELECT WHERE pg_catalog.pg_advisory_unlock(1)") {
				<-ctx.Done() // no answer
				return 0, ctx.Err()
			}
			return answer(ctx, conn, query)
		}
		start := time.Now()
		err := WithLocks(t.Context(), dbs[0], []Key{ID(1), ID(2)}, nothing, Timeout(300*time.Millisecond))
		if d := time.Since(start); d > 1300*time.Millisecond {
			t.Errorf("after %v: %v", d, err)
		}
		_ = there.Release()
		time.Sleep(time.Minute)
	})
}

// The settings of a session belong to whose turn it is, also while it is lost. (With -race.)
func TestALossDuringARelease(t *testing.T) {
	for range 300 {
		_, dbs, _ := newTable(t, 1)
		c := newConn(t, dbs[0])
		h := &lockconn.Holder{Heartbeat: 50 * time.Microsecond, IdleTimeout: time.Hour}
		h.Begin(func(error) {})
		wantError(t, c.Hold(h))
		time.Sleep(time.Duration(100+rand.N(300)) * time.Microsecond)
		_ = c.Ask(t.Context(), &lockconn.Request{Op: lockconn.Unlock, Keys: []pgsql.Key{key.key}})
		c.LetGo(h)
		c.Leave()
	}
}

// A Release does not wait for a heartbeat, or for another's try, that is not answered.
func TestAReleaseBehindAStatementWithoutAnAnswer(t *testing.T) {
	for _, on := range []string{"heartbeat", "try"} {
		t.Run(on, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				db, srv := newServer(t)
				srv.direct = true
				srv.script = func(ctx context.Context, _ int, query string) (int64, error) {
					if on == "heartbeat" && isBeat(query) || strings.Contains(query, "try_advisory_lock(43)") {
						<-ctx.Done() // no answer
						return 0, ctx.Err()
					}
					return 1, nil
				}
				l := take(t, db, key, Heartbeat(time.Minute), HolderTimeout(time.Hour))
				if on == "heartbeat" {
					time.Sleep(time.Minute + time.Second)
				} else {
					go func() { _ = WithLock(t.Context(), db, ID(43), nothing) }()
					time.Sleep(time.Millisecond)
				}
				start := time.Now()
				err := l.Release()
				if d := time.Since(start); d > 10500*time.Millisecond {
					t.Errorf("after %v: %v", d, err)
				}
				time.Sleep(time.Hour)
			})
		})
	}
}

// Lead returns at the end of ctx, also while it proves that it leads.
func TestTheEndOfCtxWhileALeaderIsConfirmed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		db, srv := newServer(t)
		srv.direct = true
		srv.script = func(ctx context.Context, _ int, query string) (int64, error) {
			if isBeat(query) {
				<-ctx.Done() // no answer
				return 0, ctx.Err()
			}
			return 1, nil
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		start := time.Now()
		err := Lead(ctx, db, key, nothing, Heartbeat(time.Minute), HolderTimeout(time.Hour))
		if d := time.Since(start); d > 2*time.Second {
			t.Errorf("after %v: %v", d, err)
		}
		time.Sleep(time.Hour)
	})
}
