package integration

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/pgadvisory/advisory"
)

// How often the server looks whether its client is still there while it works.
const checkInterval = "client_connection_check_interval"

func showCheckInterval(t testing.TB, q querier) (setting string) {
	t.Helper()
	if err := q.QueryRowContext(t.Context(), "SHOW "+checkInterval).Scan(&setting); err != nil {
		t.Error(err)
	}
	return setting
}

// What a session has before, and what fn finds.
var checkIntervals = []struct{ before, within string }{
	{"0", "1s"},
	{"5s", "1s"},
	{"500ms", "500ms"},
}

// The setting is the session's own again when the function has returned, however it has.
func TestCheckOfTheClientLastsAsLongAsTheLock(t *testing.T) {
	t.Parallel()
	allAtOnce(t, checkings(), checking.name, func(t *testing.T, c checking) {
		key := testKey(t)
		db := c.d.open(t, withParams(t, server.DSN(), checkInterval, c.before))
		db.SetMaxOpenConns(1)
		pid := backendPID(t, db)
		with := func(opts ...advisory.Option) error { return c.look(soon(t), t, db, opts...) }

		if err := with(); err != nil {
			t.Error(err)
		}
		c.wantBefore(t, db, "uncontended")
		failed := errors.New("failed")
		if err := c.w.with(soon(t), db, key, func(context.Context, querier) error { return failed }, c.options()...); !errors.Is(err, failed) {
			t.Error(err)
		}
		c.wantBefore(t, db, "fn failed")

		release := hold(t, adminDB(t), key)
		if err := with(advisory.NoWait()); !errors.Is(err, advisory.ErrNotAcquired) {
			t.Errorf("NoWait: %v", err)
		}
		c.wantBefore(t, db, "NoWait")
		if err := with(advisory.Timeout(30 * time.Millisecond)); !errors.Is(err, advisory.ErrNotAcquired) {
			t.Errorf("Timeout: %v", err)
		}
		c.wantBefore(t, db, "Timeout")
		ctx, cancel := context.WithCancel(t.Context())
		var g errgroup.Group
		g.Go(func() error { return c.look(ctx, t, db) })
		waitForWaiters(t, adminDB(t), key, 1)
		cancel()
		if err := g.Wait(); !errors.Is(err, context.Canceled) {
			t.Errorf("end of ctx: %v", err)
		}
		c.wantBefore(t, db, "end of ctx")

		g = errgroup.Group{}
		g.Go(func() error { return with() })
		waitForWaiters(t, adminDB(t), key, 1)
		release()
		if err := g.Wait(); err != nil {
			t.Error(err)
		}
		c.wantBefore(t, db, "contended")
		if backendPID(t, db) != pid {
			t.Log("the machine was too late for one of the statements, and the connection has been replaced")
		}
	})
}

func checkings() (cases []checking) {
	ways := []way{withConnLock, isolated(sql.LevelDefault), isolated(sql.LevelReadCommitted), isolated(sql.LevelRepeatableRead)}
	for _, d := range drivers[:2] {
		for i, setting := range checkIntervals {
			for _, w := range ways {
				cases = append(cases, checking{d: d, w: w, before: setting.before, within: setting.within})
				if i == 0 {
					cases = append(cases, checking{d: d, w: w, before: setting.before, within: setting.within, timeout: time.Minute})
				}
			}
		}
	}
	return cases
}

func (c checking) options() (opts []advisory.Option) {
	if c.timeout > 0 {
		opts = append(opts, advisory.HolderTimeout(c.timeout))
	}
	return opts
}

// look takes the lock, and looks at the setting under it.
func (c checking) look(ctx context.Context, t *testing.T, db *sql.DB, opts ...advisory.Option) error {
	return c.w.with(ctx, db, testKey(t), func(_ context.Context, q querier) error {
		if got := showCheckInterval(t, q); got != c.within {
			t.Errorf("%s in fn, want %s", got, c.within)
		}
		return nil
	}, append(c.options(), opts...)...)
}

// wantBefore fails the test unless the setting is what it was before.
func (c checking) wantBefore(t *testing.T, db *sql.DB, what string) {
	t.Helper()
	if got := showCheckInterval(t, db); got != c.before {
		t.Errorf("%s: %s afterwards, want %s", what, got, c.before)
	}
	wantClean(t, db)
}

// A checking is one way to have the server look after its client.
type checking struct {
	d              driver
	w              way
	before, within string
	timeout        time.Duration // HolderTimeout
}

func (c checking) name() string {
	return fmt.Sprintf("%s %s %s HolderTimeout %v", c.d.name, c.w.name, c.before, c.timeout)
}

// On the caller's own session, the settings are the caller's.
func TestCallersCheckOfTheClientStays(t *testing.T) {
	t.Parallel()
	bothAtOnce(t, func(t *testing.T, d driver) {
		for _, w := range []way{acquireConn, acquireTx} {
			for _, contended := range []bool{false, true} {
				t.Run(fmt.Sprintf("%s contended %t", w.name, contended), func(t *testing.T) {
					testCallersCheckOfTheClient(t, d, w, contended)
				})
			}
		}
	})
}

// testCallersCheckOfTheClient looks at the setting under the lock, and afterwards.
func testCallersCheckOfTheClient(t *testing.T, d driver, w way, contended bool) {
	key := testKey(t)
	db := d.open(t, withParams(t, server.DSN(), checkInterval, "7s"))
	db.SetMaxOpenConns(1)
	var g errgroup.Group
	release := func() {}
	if contended {
		release = hold(t, adminDB(t), key)
	}
	g.Go(func() error {
		return w.with(soon(t), db, key, func(_ context.Context, q querier) error {
			if got := showCheckInterval(t, q); got != "7s" {
				t.Errorf("%s under the lock, want the caller's 7s", got)
			}
			return nil
		})
	})
	switch {
	case contended && w.tries:
		waitForTriers(t, adminDB(t), key, 1)
	case contended:
		waitForWaiters(t, adminDB(t), key, 1)
	}
	release()
	if err := g.Wait(); err != nil {
		t.Error(err)
	}
	if got := showCheckInterval(t, db); got != "7s" {
		t.Errorf("%s afterwards, want the caller's 7s", got)
	}
}
