package lockconn_test

import (
	"context"
	"strings"
	"sync"
	"testing"
	"testing/synctest"

	"github.com/pgadvisory/advisory/internal/lockconn"
)

// A release has been answered when it returns, also of several that begin in one moment.
func TestReleasesOfOneMoment(t *testing.T) {
	t.Parallel()
	const rounds, releases = 2000, 4
	synctest.Test(t, func(t *testing.T) {
		f := newConn(t, 0)
		for i := range releases {
			f.must(t, lockconn.Try, id(int64(i))...)
		}
		for range rounds {
			for i := 1; i < releases; i++ {
				f.must(t, lockconn.Try, id(int64(i))...)
			}
			f.srv.clear()
			var wg sync.WaitGroup
			for i := 1; i < releases; i++ {
				wg.Go(func() {
					r := &lockconn.Request{Op: lockconn.Unlock, Keys: id(int64(i))}
					if err := f.Ask(context.Background(), r); err != nil || !r.OK {
						t.Errorf("release %d: answered with %t, %v", i, r.OK, err)
					}
				})
			}
			wg.Wait()
		}
		_, _ = f.ask(t.Context(), lockconn.Unlock, id(0)...)
		f.Leave()
	})
}

// A statement that the driver keeps prepared is sent as it stands if the server has forgotten it.
func TestAForgottenStatementIsSentAsItStands(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		state string
		lost  bool
	}{{"26000", false}, {"42P05", false}, {"42883", true}} {
		synctest.Test(t, func(t *testing.T) {
			f := newConnOn(t, &server{caches: true}, 0)
			f.srv.answer = func(_ context.Context, query string) (int64, error) {
				if strings.Contains(query, "$1") {
					return 0, serverError(test.state)
				}
				return 1, nil
			}
			ok, err := f.ask(t.Context(), lockconn.Try, id(7)...)
			if test.lost {
				wantError(t, err, serverError(test.state))
				f.Leave()
				return
			}
			if !ok || err != nil {
				t.Errorf("%s: try: %t, %v", test.state, ok, err)
			}
			f.must(t, lockconn.Unlock, id(7)...)
			f.srv.want(t,
				"SELECT WHERE CASE WHEN pg_catalog.pg_is_in_recovery() THEN false ELSE pg_catalog.pg_try_advisory_lock($1) END",
				"SELECT WHERE CASE WHEN pg_catalog.pg_is_in_recovery() THEN false ELSE pg_catalog.pg_try_advisory_lock(7) END",
				"SELECT WHERE pg_catalog.pg_advisory_unlock($1)",
				"SELECT WHERE pg_catalog.pg_advisory_unlock(7)")
			f.Leave()
		})
	}
}
