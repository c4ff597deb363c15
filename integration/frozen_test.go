//go:build unix

package integration

import (
	"context"
	"database/sql"
	"errors"
	"syscall"
	"testing"
	"time"

	"github.com/pgadvisory/advisory"
)

// A server's process that does not even read any more holds up a statement that is longer than the
// network's buffers while it is being sent. That is broken off all the same, and others of the
// same pool are not held up.
func TestServerThatStopsReadingHoldsUpNobody(t *testing.T) {
	if !server.Own() {
		t.Skip("it stops processes of the server, which must be this test's own")
	}
	nothing := func(context.Context) error { return nil }
	keys := make([]advisory.Key, 300_000) // 18 MB
	for i := range keys {
		keys[i] = advisory.ID(1<<40 + int64(i))
	}
	bothDrivers(t, func(t *testing.T, d driver) {
		allowLog(t, "ERROR:  out of shared memory")                 // these are more locks than the server has room for
		db := sql.OpenDB(d.connector(t, watchLog(t, server.DSN()))) // which does not ping
		defer db.Close()
		var pid int
		require(t, "a connection that lies ready", db.QueryRow("SELECT pg_backend_pid()").Scan(&pid))
		require(t, "a server on this machine", syscall.Kill(pid, syscall.SIGSTOP))
		defer func() { _ = syscall.Kill(pid, syscall.SIGCONT) }()

		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		ended := make(chan error, 1)
		go func() { ended <- advisory.WithLocks(ctx, db, keys, nothing) }()
		waitFor(t, "it asks", func() (bool, error) { return db.Stats().InUse == 1, nil })
		if err := advisory.WithLock(soon(t), db, keys[0], nothing, advisory.NoWait()); !errors.Is(err, advisory.ErrNotAcquired) {
			t.Errorf("beside it: %.200v", err)
		}
		began := time.Now()
		cancel()
		if err := <-ended; !errors.Is(err, context.Canceled) {
			t.Errorf("error is %.200v", err)
		}
		if took := time.Since(began); took > 8*time.Second {
			t.Errorf("it returned %v after its ctx had ended", took)
		}
		// Others go on meanwhile.
		wantGranted(t, db, keys[0])
		require(t, "it goes on", syscall.Kill(pid, syscall.SIGCONT))
		waitFor(t, "the session is gone", func() (bool, error) {
			var n int
			err := adminDB(t).QueryRow("SELECT count(*) FROM pg_stat_activity WHERE pid = $1", pid).Scan(&n)
			return n == 0, err
		})
		wantClean(t, db)
	})
}
