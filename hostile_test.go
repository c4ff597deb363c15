package advisory

import (
	"context"
	"database/sql"
	"fmt"
	"log/slog"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/pgadvisory/advisory/internal/pgsql"
)

// A blockedHandler blocks whoever logs.
type blockedHandler struct {
	slog.Handler
	until chan struct{}
}

func (h blockedHandler) Handle(context.Context, slog.Record) error { <-h.until; return nil }

// A Logger that blocks does not keep other holders on the session from their loss.
func TestALoggerThatBlocksKeepsNobodyFromTheLoss(t *testing.T) {
	t.Parallel()
	bubble(t, "20 locks stay", func(t *testing.T) {
		p, dbs, srvs := newTable(t, 2)
		until := make(chan struct{})
		blocked := Logger(slog.New(blockedHandler{slog.Default().Handler(), until}))
		for i := range 20 {
			wantError(t, WithLock(t.Context(), dbs[0], ID(int64(100+i)), nothing, AtLeast(time.Hour), blocked))
		}
		l := take(t, dbs[0], key)
		p.kill(backendID{srvs[0], 1})
		began := time.Now()
		<-l.Context().Done()
		if took := time.Since(began); took > 2*defaultHeartbeat {
			t.Errorf("the ctx of another holder ended after %v", took)
		}
		close(until)
		wantError(t, l.Release(), ErrLost)
		time.Sleep(2 * time.Hour)
	})
}

// Who waits behind another of this process, which the server has not answered, does not know that the
// lock is held.
func TestAWaitBehindOneThatHasNoAnswerIsNotErrHeld(t *testing.T) {
	t.Parallel()
	bubble(t, "no server", func(t *testing.T) {
		db, srv := newServer(t)
		srv.dial = func(ctx context.Context) error { <-ctx.Done(); return ctx.Err() }
		errs := make(chan error, 2)
		for range 2 {
			go func() { errs <- WithLock(context.Background(), db, key, nothing, Timeout(time.Second)) }()
		}
		for range 2 {
			wantError(t, <-errs, ErrNotAcquired)
		}
		time.Sleep(time.Minute)
	})
}

// A driver that panics before a lock stays does not leave the others that were to stay.
func TestADriversPanicBeforeLocksStay(t *testing.T) {
	t.Parallel()
	bubble(t, "on two sessions", func(t *testing.T) {
		p, dbs, srvs := newTable(t, 2)
		other := take(t, dbs[1], ID(1))
		time.AfterFunc(time.Second, func() { _ = other.Release() })
		l := take(t, dbs[0], ID(3))
		script := srvs[0].script
		var armed atomic.Bool
		srvs[0].script = func(ctx context.Context, conn int, query string) (int64, error) {
			if query == pgsql.Ping && armed.CompareAndSwap(true, false) {
				p.kill(backendID{srvs[0], conn})
				panic("driver")
			}
			return script(ctx, conn, query)
		}
		func() {
			defer func() { _ = recover() }()
			_ = WithLocks(t.Context(), dbs[0], []Key{ID(1), ID(2)}, func(context.Context) error {
				armed.Store(true)
				return nil
			}, AtLeast(time.Minute))
		}()
		_ = l.Release()
		time.Sleep(time.Hour)
		for _, k := range []Key{ID(1), ID(2)} {
			if n := p.holders(k); n > 0 {
				t.Errorf("%v is held by %d", k, n)
			}
		}
	})
}

// A question for deadlocks that the server fails has failed the transaction in which it was asked. The
// wait goes on in a new one.
func TestAQuestionForDeadlocksThatFailsInATransaction(t *testing.T) {
	t.Parallel()
	for _, opts := range [][]Option{nil, {HolderTimeout(time.Minute)}} {
		bubble(t, fmt.Sprint(len(opts), " options"), func(t *testing.T) {
			p, dbs, srvs := newTable(t, 2)
			holdFor(t, dbs[1], key, 5*time.Second)
			answer := srvs[0].script
			asked, aborted := 0, map[int]bool{}
			srvs[0].script = func(ctx context.Context, conn int, query string) (int64, error) {
				switch {
				case strings.HasSuffix(query, pgsql.Waits):
					asked++
					aborted[conn] = true
					return 0, pgError("42501")
				case strings.HasPrefix(query, "ROLLBACK"):
					aborted[conn] = false
				case aborted[conn]:
					return 0, pgError("25P02")
				}
				return answer(ctx, conn, query)
			}
			ran := false
			wantError(t, WithLock(t.Context(), dbs[0], ID(1), func(ctx context.Context) error {
				return WithTxLock(ctx, dbs[0], key, func(ctx context.Context, tx *sql.Tx) error {
					ran = true
					_, err := tx.ExecContext(ctx, "INSERT")
					return err
				}, opts...)
			}))
			if !ran || asked < 2 {
				t.Errorf("fn has run: %t, after %d questions", ran, asked)
			}
			p.clean()
			wantIdle(t, dbs[0])
		})
	}
}
