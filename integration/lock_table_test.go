package integration

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/pgadvisory/advisory"
	"github.com/pgadvisory/advisory/integration/internal/pgtest"
)

// The server keeps its locks in shared memory, which can be full.
func TestLockTableIsFull(t *testing.T) {
	t.Parallel()
	s := ownServer(t, pgtest.Setting("max_connections", "16"), pgtest.Setting("max_locks_per_transaction", "10"))
	eachDriver(t, func(t *testing.T, d driver) {
		const before, room, asked = 20, 100, 300
		allowLog(t, "ERROR:  out of shared memory")
		admin := d.open(t, s.DSN())
		db := d.open(t, withParams(t, s.DSN(), "application_name", appName(t)))
		keys := keysNumbered(t, before+asked)
		held := make([]*advisory.Lock, len(keys))
		acquire := func(i int) (err error) {
			held[i], err = advisory.Acquire(soon(t), db, keys[i], advisory.Heartbeat(shortHeartbeat))
			return err
		}
		for i := range before {
			if err := acquire(i); err != nil {
				t.Fatal(err)
			}
		}

		// Another application has the rest of it, but for some.
		empty := fillLockTable(t, admin, room)
		if err := concurrently(asked, 1, func(i int) error { return fullOrNil(acquire(before+i), keys[before+i]) }); err != nil {
			t.Error(err)
		}
		// Those that are held are not disturbed, and have their heartbeats.
		time.Sleep(1300 * time.Millisecond)
		live := slices.DeleteFunc(slices.Clone(held), func(l *advisory.Lock) bool { return l == nil })
		for _, lock := range live {
			wantLive(t, lock.Context())
		}
		empty()
		have, _, holding := heldBy(t, admin, appName(t))
		if len(have) != len(live) || holding != 1 {
			t.Errorf("%d locks are held on %d sessions, want %d on 1", len(have), holding, len(live))
		}
		// How much room a lock takes, and who else takes some of it, is the server's business.
		if granted := len(live) - before; granted < room/2 || granted == asked {
			t.Errorf("%d locks were granted where there was room for about %d", granted, room)
		} else {
			t.Logf("%d of %d granted", granted, asked)
		}
		if err := concurrently(len(live), 1, func(i int) error { return live[i].Release() }); err != nil {
			t.Error(err)
		}
		if err := concurrently(len(held), 1, func(i int) error {
			if err := acquire(i); err != nil {
				return err
			}
			return held[i].Release()
		}); err != nil {
			t.Errorf("when there is room again: %v", err)
		}
		wantClean(t, db)
	})
}

// fillLockTable takes locks on a session of its own, and leaves room in the lock table for
// about that many.
func fillLockTable(t testing.TB, admin *sql.DB, room int) (empty func()) {
	t.Helper()
	filler, err := admin.Conn(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { filler.Close() })
	each := func(function string, n int) error {
		_, err := filler.ExecContext(t.Context(), fmt.Sprintf("SELECT count(%s(i)) FROM generate_series(1, %d) AS i", function, n))
		return err
	}
	// What the session has to know of the system's tables takes room, at first.
	if err := errors.Join(each("pg_advisory_lock", 1), each("pg_advisory_unlock", 1)); err != nil {
		t.Fatal(err)
	}
	if err := each("pg_advisory_lock", 1000000); sqlState(err) != "53200" {
		t.Fatalf("%v, want an error because the lock table is full", err)
	}
	if err := each("pg_advisory_unlock", room); err != nil {
		t.Fatal(err)
	}
	return func() {
		t.Helper()
		if _, err := filler.ExecContext(t.Context(), "SELECT pg_advisory_unlock_all()"); err != nil {
			t.Fatal(err)
		}
	}
}

// fullOrNil returns nil if a lock was granted, or refused with an error that says what to do.
func fullOrNil(err error, key advisory.Key) error {
	if err == nil {
		return nil
	}
	if sqlState(err) != "53200" || !strings.Contains(err.Error(), key.SQL()) || !strings.Contains(err.Error(), "max_locks_per_transaction") {
		return fmt.Errorf("want an error that says what to do: %w", err)
	}
	return nil
}

// Requests that fail one by one take their time, and holders have their heartbeats in it.
func TestFailuresInAFullLockTableDoNotHoldUpHeartbeats(t *testing.T) {
	t.Parallel()
	s := ownServer(t, pgtest.Setting("max_connections", "16"), pgtest.Setting("max_locks_per_transaction", "10"))
	bothDrivers(t, func(t *testing.T, d driver) {
		const asked = 400
		allowLog(t, "ERROR:  out of shared memory")
		admin := d.open(t, s.DSN())
		w := newWireTo(t, s, 3*time.Millisecond)
		db := d.open(t, w.dsn)
		lock, err := advisory.Acquire(soon(t), db, testKey(t))
		if err != nil {
			t.Fatal(err)
		}
		filler, err := admin.Conn(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		defer filler.Close()
		if _, err := filler.ExecContext(t.Context(), "SELECT count(pg_advisory_lock(i)) FROM generate_series(1, 1000000) AS i"); sqlState(err) != "53200" {
			t.Fatalf("%v, want an error because the lock table is full", err)
		}
		keys := keysNumbered(t, asked)
		ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
		defer cancel()
		if err := concurrently(asked, 1, func(i int) error {
			_, err := advisory.Acquire(ctx, db, keys[i])
			if sqlState(err) != "53200" {
				return err
			}
			return nil
		}); err != nil {
			t.Error(err)
		}
		wantLive(t, lock.Context())
		if err := lock.Release(); err != nil {
			sent := w.take()
			t.Errorf("%v; %d statements, the last of them:\n%s", err, len(sent), strings.Join(sent[max(0, len(sent)-5):], "\n"))
		}
		if _, err := filler.ExecContext(t.Context(), "SELECT pg_advisory_unlock_all()"); err != nil {
			t.Fatal(err)
		}
	})
}
