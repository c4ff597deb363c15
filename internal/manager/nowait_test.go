package manager_test

import (
	"context"
	"errors"
	"io"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/pgadvisory/advisory/internal/pgsql"
	"github.com/pgadvisory/advisory/internal/session"
)

// Those who share an answer and do not wait share a refusal, too, and that the server does not answer. What
// else may befall the one who asks is no answer to the others.
func TestSharedNoWaitsShareOneAnswer(t *testing.T) {
	t.Parallel()
	const callers = 20
	canceled, down, refused := errors.New("canceled"), pgsql.NoAnswer{After: time.Second}, errors.New("connection refused")
	for _, test := range []struct {
		name  string
		dial  error
		rows  int64
		first error // the cause of the end of the first one's ctx
		wants error
		dials int
		tries int
	}{
		{name: "granted", rows: 1, dials: 1, tries: 1},
		{name: "refused", wants: session.ErrRefused, dials: 1, tries: 1},
		{name: "the server does not answer", dial: down, wants: down, dials: 1},
		{name: "the server cannot be reached", dial: refused, wants: refused, dials: callers},
		{name: "the first one's ctx ends", rows: 1, first: canceled, dials: 2, tries: 1},
	} {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				db, srv := newDB(t)
				tries, dials := 0, 0
				srv.dial = func() error {
					dials++
					time.Sleep(time.Second)
					return test.dial
				}
				srv.answer = func(_ context.Context, _ int, query string) (int64, error) {
					if strings.Contains(query, "pg_try_advisory_lock_shared(") {
						tries++
						time.Sleep(time.Millisecond)
						return test.rows, nil
					}
					return 1, nil
				}
				var wg sync.WaitGroup
				for i := range callers {
					ctx, wants := t.Context(), test.wants
					if i == 0 && test.first != nil {
						c, cancel := context.WithCancelCause(ctx)
						time.AfterFunc(time.Second/2, func() { cancel(test.first) })
						ctx, wants = c, test.first
					}
					wg.Go(func() {
						r := request(key(1))
						r.Shared, r.NoWait = true, true
						locks, err := acquire(ctx, db, r)
						wantError(t, err, wants)
						if err == nil {
							time.Sleep(time.Minute)
							wantError(t, locks.Release(), nil)
						}
					})
					synctest.Wait()
				}
				wg.Wait()
				if tries != test.tries || dials != test.dials {
					t.Errorf("%d tries, %d dials", tries, dials)
				}
			})
		})
	}
}

// While the one who asks waits for a server that is away, those who do not wait are told why.
func TestASharedNoWaitDoesNotWaitOutAnOutage(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		db, srv := newDB(t)
		var down atomic.Bool
		srv.dial = func() error {
			if down.Load() {
				time.Sleep(10 * time.Millisecond)
				return errDown
			}
			return nil
		}
		srv.answer = func(context.Context, int, string) (int64, error) {
			if down.Load() {
				return 0, io.ErrUnexpectedEOF
			}
			return 1, nil
		}
		wantTold := func(within time.Duration) {
			start := time.Now()
			r := request(key(1))
			r.Shared, r.NoWait = true, true
			_, err := acquire(t.Context(), db, r)
			wantError(t, err, errDown)
			if took := time.Since(start); took > within {
				t.Errorf("after %v", took)
			}
		}
		locks := take(t, db, key(1))
		var wg sync.WaitGroup
		wg.Go(func() { // waits for locks, and then for the server
			r := request(key(1))
			r.Shared = true
			locks, err := acquire(t.Context(), db, r)
			wantError(t, err, nil)
			time.Sleep(time.Millisecond)
			wantError(t, locks.Release(), nil)
		})
		synctest.Wait()
		down.Store(true)
		wantError(t, locks.Release(), io.ErrUnexpectedEOF)
		time.Sleep(5 * time.Millisecond)
		wantTold(time.Second) // it shares the answer of one that is asking
		time.Sleep(5 * time.Second)
		wantTold(0)
		down.Store(false)
		wg.Wait()
		wantState(t, db, 0, 0)
	})
}
