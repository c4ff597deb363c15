package advisory

import (
	"context"
	"database/sql"
	"io"
	"log/slog"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/pgadvisory/advisory/internal/manager"
)

// A callingHandler calls back into the package whenever it is asked whether it is enabled, and waits for
// another goroutine that does. It does so once at a time: what it calls may log, too.
type callingHandler struct {
	slog.Handler
	db      *sql.DB
	calling *atomic.Bool
	called  *atomic.Int32
}

func (h callingHandler) Enabled(context.Context, slog.Level) bool {
	if h.calling.Swap(true) {
		return false
	}
	defer h.calling.Store(false)
	done := make(chan struct{})
	go func() {
		defer close(done)
		h.callBack()
	}()
	<-done
	h.callBack()
	h.called.Add(1)
	return true
}

// callBack takes the mutexes of what the package knows of a *sql.DB. Its lock may be refused, or not be
// had in time: that is not what it is for.
func (h callingHandler) callBack() {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Millisecond)
	defer cancel()
	_ = WithLock(ctx, h.db, ID(99), nothing, NoWait())
	_ = describe(h.db)
	_ = manager.For(h.db).Pool(h.db).RefusesWaits()
}

func (h callingHandler) Handle(context.Context, slog.Record) error { return nil }

// A Logger is called under no mutex of the package: also if it is asked whether it is enabled, it may
// call the package, and wait for others who do.
func TestALoggerThatCallsBack(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name   string
		called int32
		run    func(t *testing.T, db *sql.DB, srv *server, log func() Option)
	}{
		{"a pool of one", 1, func(t *testing.T, db *sql.DB, _ *server, log func() Option) {
			db.SetMaxOpenConns(1)
			wantError(t, WithLock(t.Context(), db, key, nothing, log()))
		}},
		{"an outage", 4, func(t *testing.T, db *sql.DB, srv *server, log func() Option) { // two Loggers, two lines each
			awayFor(srv, time.Second, io.ErrClosedPipe)
			var other sync.WaitGroup
			other.Go(func() {
				time.Sleep(300 * time.Millisecond)
				wantError(t, Lead(t.Context(), db, ID(1), nothing, log()))
			})
			wantError(t, WithLock(t.Context(), db, key, nothing, log()))
			other.Wait()
		}},
		{"a session that is replaced", 1, func(t *testing.T, db *sql.DB, srv *server, log func() Option) {
			awayFor(srv, 0, nil)
			wantError(t, WithLock(t.Context(), db, key, nothing, log()))
		}},
		{"waits that are refused", 1, func(t *testing.T, db *sql.DB, srv *server, log func() Option) {
			var tries atomic.Int32
			srv.script = func(_ context.Context, _ int, query string) (int64, error) {
				switch {
				case isWait(query):
					return 0, pgError("42501")
				case strings.Contains(query, "(42)") && isTry(query) && tries.Add(1) < 3:
					return 0, nil
				}
				return 1, nil
			}
			wantError(t, WithLock(t.Context(), db, key, nothing, log()))
		}},
		{"a batch that is refused", 1, func(t *testing.T, db *sql.DB, srv *server, log func() Option) {
			srv.script = func(_ context.Context, _ int, query string) (int64, error) {
				time.Sleep(time.Millisecond)
				if query == "prepare" {
					return 0, pgError("42601")
				}
				return 1, nil
			}
			opt := log()
			each(ids(50), func(k Key) { wantError(t, WithLock(t.Context(), db, k, nothing, opt)) })
		}},
		{"a lock that is lost while it stays", 1, func(t *testing.T, db *sql.DB, srv *server, log func() Option) {
			srv.script = script(when(isBeat, fails(io.ErrUnexpectedEOF)))
			wantError(t, WithLock(t.Context(), db, key, nothing, AtLeast(time.Second/2), Heartbeat(20*time.Millisecond), log()))
		}},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			db, srv := newServer(t)
			var called atomic.Int32
			log := func() Option {
				return Logger(slog.New(callingHandler{slog.DiscardHandler, db, new(atomic.Bool), &called}))
			}
			done := make(chan struct{})
			go func() {
				defer close(done)
				test.run(t, db, srv, log)
				for called.Load() < test.called { // some goes on when the call has returned
					time.Sleep(time.Millisecond)
				}
			}()
			select {
			case <-done:
			case <-time.After(20 * time.Second):
				t.Fatalf("it does not return, after %d calls of the Logger", called.Load())
			}
		})
	}
}
