//go:build bugs

// Failing tests of what look like bugs: go test -race -tags bugs -run TestBug .

package advisory

import (
	"context"
	"database/sql"
	"errors"
	"io"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// A connection that dies between the bounded wait and its ROLLBACK: the error is
// 55P03, and the waiting ends.
func TestBugAWaitThatDiesInRollbackDoesNotGoOn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		db, _ := newServer(t, done, refused, fails(err55P03), fails(io.ErrUnexpectedEOF))
		wantError(t, WithTxLock(t.Context(), db, key, noTx))
	})
}

// beginLocked does not look at ctx after the BEGIN that follows a session-level lock.
func TestBugFnRunsUnderAnEndedCtxAtRepeatableRead(t *testing.T) {
	db, srv := newServer(t)
	ctx, cancel := context.WithCancel(t.Context())
	srv.script = func(_ context.Context, _ int, query string) (int64, error) {
		if strings.HasPrefix(query, "BEGIN") {
			cancel()
		}
		return 1, nil
	}
	wantError(t, WithTxLock(ctx, db, key, func(context.Context, *sql.Tx) error {
		t.Error("fn runs")
		return nil
	}, isolation(sql.LevelRepeatableRead)), ErrNotAcquired, context.Canceled)
}

// The error of a COMMIT that ctx ended has the cause, and not the context's own error.
func TestBugACommitEndedByCtxDoesNotMatchTheContextsError(t *testing.T) {
	for range 20 { // do chooses at random
		db, _ := newServer(t)
		cause := errors.New("cause")
		ctx, cancel := context.WithCancelCause(t.Context())
		wantError(t, WithTxLock(ctx, db, key, func(context.Context, *sql.Tx) error {
			cancel(cause)
			return nil
		}), context.Canceled, cause, "commit bigint 42")
	}
}

// The arming statement of WithConnLock asks whether the lock is held, and the answer
// is not looked at.
func TestBugWithConnLockIgnoresThatTheLockIsNotHeld(t *testing.T) {
	db, srv := newServer(t, granted, refused)
	_ = WithConnLock(t.Context(), db, key, func(context.Context, *sql.Conn) error {
		t.Error("fn runs")
		return nil
	}, HolderTimeout(time.Minute))
	if srv.open() != 0 {
		t.Error("the session was not discarded")
	}
}

// Without a Timeout, the first try goes past runner.do: no bound on the answer, and
// a driver that does not return keeps the caller beyond the end of ctx.
func TestBugATryIsNotAbandoned(t *testing.T) {
	for _, i := range []int{0, 3, 5} {
		db, srv := newServer(t)
		free := stuck(srv, "SELECT WHERE pg_catalog.pg_try")
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
		defer cancel()
		returned := make(chan error)
		go func() { returned <- closures[i].run(ctx, db, key, nothing) }()
		select {
		case err := <-returned:
			wantError(t, err, ErrNotAcquired, context.DeadlineExceeded)
			free()
		case <-time.After(3 * time.Second):
			t.Errorf("%s has not returned 3 s after the end of ctx", closures[i].name)
			free()
			<-returned
		}
	}
}

// errors.Unwrap gives nil for an error with Unwrap() []error: nil dereference.
func TestBugCheckOfANilDBPanics(t *testing.T) {
	defer func() {
		if r := recover(); r != nil {
			t.Errorf("panic: %v", r)
		}
	}()
	db, _ := newServer(t)
	wantError(t, Check(t.Context(), nil), "advisory: check: nil db")
	wantError(t, Check(noCtx, db), "advisory: check: nil ctx")
}

// get looks at mark.ended before its statement takes runner.busy, and not again: the
// token can be one that was asked for after the unlock, larger than the next holder's.
// Worse, it meets the Close of handBack, and database/sql's Conn looks whether it is
// closed before it takes its own lock: a nil dereference on a goroutine of the package,
// which ends the process. (Last in this file, because it ends the tests, too.)
func TestBugATokenIsAskedForAfterTheUnlock(t *testing.T) {
	bad := 0
	const n = 2000
	for range n {
		db, srv := newServer(t)
		unlocking, unlock := make(chan struct{}), make(chan struct{})
		srv.script = func(_ context.Context, _ int, query string) (int64, error) {
			if query == unlockQuery {
				close(unlocking)
				<-unlock
			}
			return 1, nil
		}
		l, err := Acquire(t.Context(), db, key)
		wantError(t, err)
		var wg sync.WaitGroup
		_, err = l.Token(errCtx{context.Background(), func() { // in the moment between
			wg.Go(func() { _ = l.Release() })
			<-unlocking
			time.AfterFunc(100*time.Microsecond, func() { close(unlock) })
		}})
		wg.Wait()
		if err == nil {
			bad++
		}
	}
	if bad > 0 {
		t.Errorf("%d of %d tokens were taken after the unlock", bad, n)
	}
}

type errCtx struct {
	context.Context
	asked func()
}

func (c errCtx) Err() error { c.asked(); return nil }
