package manager_test

import (
	"bytes"
	"context"
	"database/sql"
	"errors"
	"io"
	"log/slog"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/pgadvisory/advisory/internal/pgsql"
	"github.com/pgadvisory/advisory/internal/session"
)

// errDown is that of a server that is away.
var errDown = errors.New("connection refused")

// An outage is a server that goes away while five of a process wait for locks that another has.
type outage struct {
	*server
	db             *sql.DB
	down, back     atomic.Bool
	dials, atOnce  atomic.Int32
	waits          sync.WaitGroup
	cancels        []context.CancelFunc // of the waits
	granted, ended atomic.Int32
	log            buffer
}

// goDown begins one, after a second of waiting.
func goDown(t *testing.T) *outage {
	db, srv := newDB(t)
	db.SetMaxIdleConns(0)
	o := &outage{server: srv, db: db}
	srv.dial = func() error {
		if !o.down.Load() {
			return nil
		}
		o.dials.Add(1)
		if o.atOnce.Add(1) > 1 {
			t.Error("two try to reach the server")
		}
		time.Sleep(10 * time.Millisecond)
		o.atOnce.Add(-1)
		return errDown
	}
	srv.answer = func(_ context.Context, _ int, query string) (int64, error) {
		if isWait(query) && !o.down.Load() && !o.back.Load() {
			time.Sleep(100 * time.Millisecond)
		}
		switch {
		case o.down.Load():
			return 0, io.ErrUnexpectedEOF
		case o.back.Load(): // and the locks are free
			return 1, nil
		case isWait(query), isTry(query):
			return 0, nil
		}
		return 1, nil
	}
	log := slog.New(slog.NewTextHandler(&o.log, nil))
	for n := range int64(5) {
		ctx, cancel := context.WithCancel(t.Context())
		o.cancels = append(o.cancels, cancel)
		o.waits.Go(func() {
			r := request(key(n))
			r.Log = log
			locks, err := acquire(ctx, db, r)
			if err != nil {
				if !errors.Is(err, errDown) {
					wantError(t, err, context.Canceled)
				}
				o.ended.Add(1)
				return
			}
			wantError(t, locks.Release(), nil)
			o.granted.Add(1)
		})
	}
	time.Sleep(time.Second)
	o.down.Store(true)
	t.Cleanup(func() {
		time.Sleep(time.Second)
		wantState(t, db, 0, 0)
	})
	return o
}

// All waits go through an outage together: one goroutine tries to reach the server, after pauses that
// grow, and the Logger is told once that it is away, and once that it is back.
func TestWaitsGoThroughAnOutageTogether(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		o := goDown(t)
		time.Sleep(20 * time.Second)
		if n := o.dials.Load(); n < 8 || n > 24 { // with pauses of 50 ms at first, and of 2 s in the end
			t.Errorf("tried %d times in 20 s", n)
		}
		o.back.Store(true)
		o.down.Store(false)
		start := time.Now()
		o.waits.Wait()
		if d := time.Since(start); d > 2*time.Second || o.granted.Load() != 5 {
			t.Errorf("%d granted, after %v", o.granted.Load(), d)
		}
		log := o.log.String()
		if strings.Count(log, "cannot be reached") != 1 || strings.Count(log, "the server is back") != 1 || strings.Count(log, "\n") != 2 {
			t.Errorf("log: %s", log)
		}
	})
}

// A Lead that comes during an outage joins those that wait for the server, and does not try to reach it by
// itself.
func TestLeadJoinsAnOutage(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		o := goDown(t)
		time.Sleep(10 * time.Second)
		synctest.Wait()
		before := o.dials.Load()
		o.waits.Go(func() {
			r := request(key(6))
			r.Lead = true
			locks, err := acquire(t.Context(), o.db, r)
			wantError(t, err, nil)
			if err == nil {
				wantError(t, locks.Release(), nil)
			}
		})
		synctest.Wait()
		if n := o.dials.Load() - before; n != 0 {
			t.Errorf("tried %d times by itself", n)
		}
		time.Sleep(time.Minute) // the others give up, and Lead does not
		if n := o.ended.Load() + o.granted.Load(); n != 5 {
			t.Errorf("%d have ended", n)
		}
		o.back.Store(true)
		o.down.Store(false)
		o.waits.Wait()
	})
}

// One who does not wait is told of the outage, and not that another holds the lock: others only wait for it.
func TestNoWaitInAnOutage(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		o := goDown(t)
		time.Sleep(10 * time.Second)
		for _, shared := range []bool{false, true} {
			r := request(key(0))
			r.NoWait, r.Shared = true, shared
			start := time.Now()
			_, err := acquire(t.Context(), o.db, r)
			wantError(t, err, errDown)
			wantTook(t, start, 0)
		}
		for _, cancel := range o.cancels {
			cancel()
		}
		o.waits.Wait()
	})
}

// Nobody tries to reach the server any more when the last one has left who waits for it.
func TestAnOutageEndsWithTheLastWait(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		o := goDown(t)
		time.Sleep(10 * time.Second)
		for i, cancel := range o.cancels {
			before := o.dials.Load()
			time.Sleep(3 * time.Second)
			if n := o.dials.Load() - before; n == 0 {
				t.Errorf("with %d that wait, nobody tries", 5-i)
			}
			cancel()
			synctest.Wait()
			if n := o.ended.Load(); n != int32(i+1) {
				t.Errorf("%d have left, want %d", n, i+1)
			}
		}
		before := o.dials.Load()
		time.Sleep(time.Hour)
		if n := o.dials.Load() - before; n > 1 { // one may have been under way
			t.Errorf("tried %d times after the last one had left", n)
		}
		o.waits.Wait()
	})
}

// A wait that is not Lead's ends when the server has been away for too long, and says why.
func TestAnOutageIsNotWaitedOutForEver(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		db, srv := newDB(t)
		srv.answer = func(_ context.Context, _ int, query string) (int64, error) {
			if isWait(query) {
				srv.dial = func() error { return errDown }
				return 0, io.ErrUnexpectedEOF
			}
			return 0, nil
		}
		start := time.Now()
		_, err := acquire(t.Context(), db, request(key(1)))
		wantError(t, err, errDown)
		wantTook(t, start, 30*time.Second)
		synctest.Wait()
		wantState(t, db, 0, 0)
	})
}

// A wait that loses its session goes on, without an outage, though connections that lie in the pool do not
// answer, or answer with an error, and though the server is slow.
func TestWhatIsNoOutage(t *testing.T) {
	t.Parallel()
	const hang, refuse = 2, 5 // from which connection on: the first one is the wait's
	for name, test := range map[string]struct {
		idle   int
		dial   time.Duration
		answer time.Duration
	}{
		"connections that hang and refuse": {idle: 6},
		"a slow server":                    {dial: 1900 * time.Millisecond, answer: 600 * time.Millisecond},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				db, srv := newDB(t)
				db.SetMaxIdleConns(test.idle)
				var failed atomic.Bool
				var waits atomic.Int64 // which connection
				srv.dial = func() error {
					if failed.Load() {
						time.Sleep(test.dial)
					}
					return nil
				}
				elsewhere := taken(key(1), 100*time.Millisecond)
				srv.answer = func(ctx context.Context, conn int, query string) (int64, error) {
					switch {
					case !failed.Load():
						if isWait(query) {
							waits.Store(int64(conn))
						}
						return elsewhere(ctx, conn, query)
					case int64(conn) == waits.Load():
						return 0, io.ErrUnexpectedEOF
					case conn >= hang && conn < refuse && test.idle > 0:
						<-ctx.Done()
						return 0, ctx.Err()
					case conn >= refuse && conn < hang+test.idle && query == pgsql.Probe:
						return 0, serverError("25P02")
					}
					session.Sleep(ctx, test.answer)
					return 1, ctx.Err()
				}
				var log buffer
				r := request(key(1))
				r.Log = slog.New(slog.NewTextHandler(&log, nil))
				waited := waitFor(t.Context(), db, r)
				time.Sleep(time.Second)
				var idle []*sql.Conn
				for range test.idle {
					conn, err := db.Conn(t.Context())
					wantError(t, err, nil)
					idle = append(idle, conn)
				}
				for _, conn := range idle {
					wantError(t, conn.Close(), nil)
				}
				start := time.Now()
				failed.Store(true)
				wantError(t, <-waited, nil)
				if d := time.Since(start); d > 10*time.Second {
					t.Errorf("after %v", d)
				}
				if log := log.String(); strings.Count(log, "\n") != 1 || !strings.Contains(log, "connection failed while waiting") {
					t.Errorf("log: %s", log)
				}
			})
		})
	}
}

// After a switch-over, the way may lead to a standby for a while. The connections that were made then are not
// asked again and again.
func TestAnOutageEndsThoughThePoolHasAConnectionToAStandby(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		db, srv := newDB(t)
		var failed atomic.Bool
		var toStandby atomic.Int64 // the last connection that led there
		elsewhere := taken(key(1), 100*time.Millisecond)
		srv.answer = func(ctx context.Context, conn int, query string) (int64, error) {
			switch {
			case !failed.Load():
				return elsewhere(ctx, conn, query)
			case conn == 1:
				return 0, io.ErrUnexpectedEOF
			case int64(conn) <= toStandby.Load():
				return pgsql.OnStandby, nil
			}
			return 1, nil
		}
		waited := waitFor(t.Context(), db, request(key(1)))
		time.Sleep(time.Second)
		toStandby.Store(1000)
		failed.Store(true)
		time.Sleep(5 * time.Second)
		toStandby.Store(int64(srv.opened.Load()))
		start := time.Now()
		wantError(t, <-waited, nil)
		if d := time.Since(start); d > 3*time.Second {
			t.Errorf("after %v", d)
		}
	})
}

// A buffer is what a Logger was given.
type buffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *buffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *buffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}
