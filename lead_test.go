package advisory

import (
	"context"
	"errors"
	"io"
	"net"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// A leader leads for long: the server watches it from the start.
func TestALeaderStepsDownWhenFnReturns(t *testing.T) {
	t.Parallel()
	for _, mine := range []error{nil, errors.New("mine")} {
		synctest.Test(t, func(t *testing.T) {
			db, srv := newServer(t)
			err := Lead(t.Context(), db, key, func(ctx context.Context) error {
				synctest.Wait()
				srv.want(t, on(1, "open", tryQuery, armQuery)...)
				wantError(t, Lead(ctx, db, key, nothing), ErrReentrant)
				wantError(t, WithLock(ctx, db, key, nothing), ErrReentrant)
				return mine
			})
			if err != mine {
				t.Errorf("error: %v", err)
			}
			srv.want(t, on(1, "open", tryQuery, armQuery, disarmQuery)...)
		})
	}
}

func TestALeaderThatLosesItsLockCampaignsAgainAfterFn(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		db, srv := newServer(t)
		srv.script = func(_ context.Context, conn int, query string) (int64, error) {
			if plainly(query) == beatQuery && conn < 3 { // the second one
				return 0, nil
			}
			return 1, nil
		}
		var log logBuffer
		running, terms := 0, 0
		err := Lead(t.Context(), db, key, func(ctx context.Context) error {
			if running++; running > 1 {
				t.Error("fn runs twice at a time")
			}
			defer func() { running-- }()
			if terms++; terms == 3 {
				time.Sleep(500 * time.Millisecond)
				return nil
			}
			<-ctx.Done()
			wantError(t, context.Cause(ctx), ErrLost)
			time.Sleep(10 * time.Second)
			return ctx.Err()
		}, log.option())
		wantError(t, err)
		synctest.Wait()
		srv.want(t, slices.Concat(
			on(1, "open", tryQuery, armQuery, beatQuery, resetQuery+freeQuery, "close"),
			on(2, "open", tryQuery, armQuery, beatQuery, resetQuery+freeQuery, "close"), on(3, "open", tryQuery, armQuery, disarmQuery),
		)...)
		if n := strings.Count(log.String(), "leadership lost"); n != 2 {
			t.Errorf("log: %q", log.String())
		}
	})
}

func TestALeaderThatGoesOnAfterALossIsWarnedOfEveryHolderTimeout(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		db, srv := newServer(t)
		srv.script = script(when(beatQuery, refused))
		var log logBuffer
		first := true
		wantError(t, Lead(t.Context(), db, key, func(ctx context.Context) error {
			if !first {
				return nil
			}
			first = false
			<-ctx.Done()
			time.Sleep(50 * time.Second)
			return nil
		}, log.option(), HolderTimeout(20*time.Second)))
		time.Sleep(time.Hour)
		if n := strings.Count(log.String(), "fn of a leader goes on"); n != 2 {
			t.Errorf("%d warnings in 50 s, want 2: %q", n, log.String())
		}
	})
}

func TestACampaignOutlivesTheServersErrorsWithGrowingPauses(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		db, srv := newServer(t)
		var last time.Time
		var pauses []time.Duration
		srv.dial = func(context.Context) error {
			if !last.IsZero() {
				pauses = append(pauses, time.Since(last))
			}
			if last = time.Now(); len(pauses) < 20 {
				return errors.New("connection refused")
			}
			return nil
		}
		var log logBuffer
		ran := 0
		wantError(t, Lead(t.Context(), db, key, func(context.Context) error { ran++; return nil }, log.option()))
		if ran != 1 {
			t.Errorf("fn ran %d times", ran)
		}
		for i, d := range pauses {
			mean := min(outagePauseMin<<i, outagePauseMax) * 3 / 4
			if d < mean/2 || d > mean*3/2 {
				t.Errorf("pause %d: %v, want about %v", i, d, mean)
			}
		}
		if n := strings.Count(log.String(), "\n"); n != 2 || !strings.Contains(log.String(), `cannot be reached; waits go on when it is back" error="connection refused"`) {
			t.Errorf("log: %s", log.String())
		}
	})
}

func TestACampaignEndsWithCtxOrTheDB(t *testing.T) {
	t.Parallel()
	bubble(t, "ctx", func(t *testing.T) {
		db, srv := newServer(t)
		srv.script = taken(t)
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		wantError(t, Lead(ctx, db, key, nothing), ErrNotAcquired, context.DeadlineExceeded)
		time.Sleep(sliceMax)
		if srv.opened != 1 || db.Stats().Idle != 1 {
			t.Errorf("the connection was not handed back: %+v", db.Stats())
		}
	})
	bubble(t, "ctx, during a pause", func(t *testing.T) {
		db, srv := newServer(t)
		srv.dial = func(context.Context) error { return errors.New("connection refused") }
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		start := time.Now()
		wantError(t, Lead(ctx, db, key, nothing), ErrNotAcquired, context.DeadlineExceeded)
		wantTook(t, start, time.Minute, time.Minute)
	})
	t.Run("a closed db", func(t *testing.T) {
		db, srv := newServer(t)
		if err := db.Close(); err != nil {
			t.Fatal(err)
		}
		wantError(t, Lead(t.Context(), db, key, nothing), "sql: database is closed")
		srv.want(t)
	})
	bubble(t, "a db closed while waiting", func(t *testing.T) {
		db, srv := newServer(t)
		srv.script = func(_ context.Context, _ int, query string) (int64, error) {
			if plainly(query) == armedWaitQuery {
				if err := db.Close(); err != nil {
					t.Error(err)
				}
				return 0, net.ErrClosed
			}
			return 0, nil
		}
		wantError(t, Lead(t.Context(), db, key, nothing), "sql: database is closed")
	})
	bubble(t, "after the leader's term", func(t *testing.T) {
		db, srv := newServer(t)
		ctx, cancel := context.WithCancel(t.Context())
		wantError(t, Lead(ctx, db, key, func(ctx context.Context) error {
			synctest.Wait()
			cancel()
			<-ctx.Done()
			return nil
		}))
		srv.want(t, on(1, "open", tryQuery, armQuery, disarmQuery)...)
	})
}

func TestALeaderThatLosesItsLockAndItsCtxReturnsFnsError(t *testing.T) {
	t.Parallel()
	mine := errors.New("mine")
	for _, fnErr := range []error{nil, mine} {
		synctest.Test(t, func(t *testing.T) {
			db, srv := newServer(t)
			srv.script = script(when(beatQuery, refused))
			wants := []any{context.Canceled}
			if fnErr != nil {
				wants = append(wants, fnErr)
			}
			ctx, cancel := context.WithCancel(t.Context())
			wantError(t, Lead(ctx, db, key, func(ctx context.Context) error {
				<-ctx.Done()
				cancel()
				return fnErr
			}), wants...)
			synctest.Wait()
			srv.want(t, on(1, "open", tryQuery, armQuery, beatQuery, resetQuery+freeQuery, "close")...)
		})
	}
}

// A leader's ctx that ends for a loss of another lock is no loss of its own.
func TestALeaderUnderALockThatIsLostStepsDown(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		db, srv := newServer(t)
		ctx, cancel := context.WithCancelCause(t.Context())
		wantError(t, Lead(ctx, db, key, func(ctx context.Context) error {
			synctest.Wait()
			cancel(ErrLost)
			<-ctx.Done()
			return nil
		}))
		srv.want(t, on(1, "open", tryQuery, armQuery, disarmQuery)...)
	})
}

// The loss is noticed while fn ends by itself.
func TestALeaderWhoseUnlockIsRefusedIsToldSo(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		db, srv := newServer(t, granted, granted, refused)
		wantError(t, Lead(t.Context(), db, key, func(context.Context) error {
			synctest.Wait()
			return nil
		}), ErrLost)
		srv.want(t, on(1, "open", tryQuery, armQuery, disarmQuery, resetQuery+freeQuery, "close")...)
	})
}

// A standby is found before fn runs, and the campaign goes on.
func TestALeaderOnAStandbyDoesNotLead(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		db, srv := newServer(t)
		start := time.Now()
		srv.script = func(_ context.Context, _ int, query string) (int64, error) {
			if isBeat(query) && time.Since(start) < time.Minute {
				return 2, nil
			}
			return 1, nil
		}
		var log logBuffer
		wantError(t, Lead(t.Context(), db, key, func(context.Context) error {
			if d := time.Since(start); d < time.Minute {
				t.Errorf("fn runs after %v", d)
			}
			return nil
		}, log.option()))
		if n := strings.Count(log.String(), "hot standby"); n < 1 || n > 2 || n != strings.Count(log.String(), "\n") {
			t.Errorf("log: %s", log.String())
		}
		if n := srv.opened; n < 10 || n > 30 {
			t.Errorf("%d connections", n)
		}
		wantIdle(t, db)
	})
}

// So is one that the first heartbeat cannot be sent to.
func TestALeaderWhoseFirstHeartbeatFailsDoesNotLead(t *testing.T) {
	t.Parallel()
	for name, answer := range map[string]func(ctx context.Context) (int64, error){
		"gone":        func(context.Context) (int64, error) { return 0, io.ErrUnexpectedEOF },
		"refused":     func(context.Context) (int64, error) { return 0, pgError("XX000") },
		"not its own": func(context.Context) (int64, error) { return 0, nil },
		"no answer":   func(ctx context.Context) (int64, error) { <-ctx.Done(); return 0, ctx.Err() },
	} {
		bubble(t, name, func(t *testing.T) {
			db, srv := newServer(t)
			var failed atomic.Int64
			srv.script = func(ctx context.Context, conn int, query string) (int64, error) {
				if isBeat(query) && failed.Load() < 6 {
					failed.Add(1)
					return answer(ctx)
				}
				return 1, nil
			}
			ran := 0
			wantError(t, Lead(t.Context(), db, key, func(context.Context) error { ran++; return nil }))
			if ran != 1 || failed.Load() != 6 {
				t.Errorf("fn ran %d times, %d heartbeats failed", ran, failed.Load())
			}
			wantIdle(t, db)
			if srv.open() != 1 {
				t.Errorf("%d connections of %d open", srv.open(), srv.opened)
			}
		})
	}
}

// A lock that never lasts, as behind a pooler in transaction mode, does not become a busy loop.
func TestALeadershipThatIsLostAtOnceIsRetriedWithGrowingPauses(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		db, srv := newServer(t)
		srv.script = func(_ context.Context, _ int, query string) (int64, error) {
			time.Sleep(time.Millisecond)
			if plainly(query) == beatQuery {
				return 0, nil
			}
			return 1, nil
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		terms := 0
		_ = Lead(ctx, db, key, func(ctx context.Context) error { // ends in a pause, or in a term
			terms++
			<-ctx.Done()
			return nil
		})
		if terms < 10 || terms > 40 {
			t.Errorf("%d terms in a minute", terms)
		}
	})
}
