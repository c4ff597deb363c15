package manager_test

import (
	"context"
	"errors"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/pgadvisory/advisory/internal/session"
)

// Those who share an answer and do not wait share it whatever it is, and none of them asks again. Only
// the end of the asker's own ctx is no answer.
func TestSharedNoWaitsShareOneAnswer(t *testing.T) {
	t.Parallel()
	const callers = 20
	canceled, down := errors.New("canceled"), errors.New("connection refused")
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
		{name: "the server cannot be reached", dial: down, wants: down, dials: 1},
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
