package manager_test

import (
	"context"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// Whose ctx ends in the moment in which the turn comes passes it on, or gives back the grant that was handed
// on with it.
func TestATurnThatComesAtTheEndOfCtxIsPassedOn(t *testing.T) {
	t.Parallel()
	for _, held := range []time.Duration{0, time.Second} { // handed on, and not any more
		synctest.Test(t, func(t *testing.T) {
			db, srv := newDB(t)
			for range 200 {
				ctx, cancel := context.WithCancel(t.Context())
				locks := take(t, db, key(1))
				var waits sync.WaitGroup
				waits.Go(func() {
					if locks, err := acquire(ctx, db, request(key(1))); err == nil {
						wantError(t, locks.Release(), nil)
					}
				})
				synctest.Wait()
				time.Sleep(held)
				if held == 0 {
					cancel()
				}
				srv.answer = func(_ context.Context, _ int, query string) (int64, error) {
					if strings.Contains(query, "unlock") {
						cancel()
					}
					return 1, nil
				}
				wantError(t, locks.Release(), nil)
				waits.Wait()
				synctest.Wait()
				if wantState(t, db, 0, 0); t.Failed() {
					break
				}
			}
		})
	}
}
