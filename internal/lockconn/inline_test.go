package lockconn_test

import (
	"context"
	"errors"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"

	"github.com/pgadvisory/advisory/internal/lockconn"
	"github.com/pgadvisory/advisory/internal/pgsql"
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

// The server's own error to a request is no loss where the session holds others' locks: what the request may
// have got, or still has, is unlocked. Where it holds none, it ends with the error.
func TestTheServersErrorToOneRequest(t *testing.T) {
	t.Parallel()
	const full = serverError("53200")
	held := pgsql.UnlockHeld(id(2), false)
	for _, test := range []struct {
		name   string
		op     lockconn.Op
		others bool
		ok     bool
		err    error
		sent   []string // after the statement of the request
	}{
		{"try", lockconn.Try, true, false, full, []string{held}},
		{"unlock", lockconn.Unlock, true, true, nil, []string{held}},
		{"look", lockconn.Look, true, false, full, nil},
		{"ping", lockconn.Ping, true, true, nil, nil},
		{"try, alone", lockconn.Try, false, false, full, []string{pgsql.UnlockAll, "close"}},
		{"unlock, alone", lockconn.Unlock, false, false, full, []string{pgsql.UnlockAll, "close"}},
		{"ping, alone", lockconn.Ping, false, true, nil, nil},
	} {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := newConn(t, 0)
				if test.others {
					f.must(t, lockconn.Try, id(1)...)
				}
				if test.op == lockconn.Unlock {
					f.must(t, lockconn.Try, id(2)...)
				}
				f.srv.clear()
				f.srv.answer = func(_ context.Context, query string) (int64, error) {
					if query == held || query == pgsql.UnlockAll {
						return 1, nil
					}
					return 0, full
				}
				ok, err := f.ask(t.Context(), test.op, id(2)...)
				if ok != test.ok || !errors.Is(err, test.err) {
					t.Errorf("%t, %v", ok, err)
				}
				synctest.Wait()
				if lines := f.srv.lines(); !slices.Equal(lines[1:], test.sent) {
					t.Errorf("log: %q", lines)
				}
				lost := f.Lost()
				if want := slices.Contains(test.sent, "close"); want != (lost != nil) {
					t.Errorf("lost: %v", lost)
				}
				if lost == nil {
					f.s.Discard()
				}
			})
		})
	}
}
