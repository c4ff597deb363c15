package advisory

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"errors"
	"io"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/pgadvisory/advisory/internal/pgsql"
)

func TestFnRunsBetweenAcquisitionAndRelease(t *testing.T) {
	t.Parallel()
	for _, c := range closures {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			type value struct{}
			db, srv := newServer(t)
			var ctx context.Context
			err := c.run(context.WithValue(t.Context(), value{}, "kept"), db, key, func(fnCtx context.Context) error {
				ctx = fnCtx
				srv.want(t, on(1, c.acquires...)...)
				if fnCtx.Err() != nil || fnCtx.Value(value{}) != "kept" {
					t.Errorf("fn's ctx: %v", fnCtx)
				}
				return nil
			})
			wantError(t, err)
			srv.want(t, on(1, append(slices.Clip(c.acquires), c.releases...)...)...)
			if ctx.Err() == nil {
				t.Error("fn's ctx has not ended with it")
			}
			if n := db.Stats().InUse; n != 0 {
				t.Errorf("%d connections not handed back", n)
			}
			// The connection that is handed back is one to use again.
			wantError(t, c.run(t.Context(), db, key, nothing))
			if srv.opened != 1 {
				t.Errorf("%d connections were made", srv.opened)
			}
		})
	}
}

func TestFnsErrorIsReturnedAsItIsAndTheLockReleased(t *testing.T) {
	t.Parallel()
	for _, c := range closures {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			db, srv := newServer(t)
			mine := errors.New("mine")
			if err := c.run(t.Context(), db, key, func(context.Context) error { return mine }); err != mine {
				t.Errorf("error: %v", err)
			}
			srv.want(t, on(1, append(slices.Clip(c.acquires), c.undoes...)...)...)
		})
	}
}

func TestGoexitInFnReleases(t *testing.T) {
	t.Parallel()
	for _, c := range closures {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			db, srv := newServer(t)
			var wg sync.WaitGroup
			returned := false
			wg.Go(func() {
				_ = c.run(t.Context(), db, key, func(context.Context) error {
					runtime.Goexit() // as t.FailNow does
					return nil
				})
				returned = true
			})
			wg.Wait()
			if returned {
				t.Error("Goexit was stopped")
			}
			srv.want(t, on(1, append(slices.Clip(c.acquires), c.undoes...)...)...)
		})
	}
}

func TestFnDoesNotRunWithoutTheLock(t *testing.T) {
	t.Parallel()
	for _, c := range closures {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			db, srv := newServer(t)
			srv.script = script(when(isTry, refused))
			err := c.run(t.Context(), db, key, neverRuns(t), NoWait())
			wantError(t, err, ErrHeld, "acquire bigint 42")
			if db.Stats().InUse != 0 || srv.open() != 1 {
				t.Error("the connection is as good as before, and was not handed back")
			}
		})
	}
}

func TestAnUnlockThatIsRefusedOrFailsMakesTheErrorErrLostAndDiscards(t *testing.T) {
	t.Parallel()
	mine := errors.New("mine")
	for _, c := range closures {
		if c.name == "WithTxLock" || c.name == "WithTxLock at REPEATABLE READ" {
			continue // tx_test.go
		}
		for _, test := range []struct {
			name  string
			reply reply
			fn    error
			wants []any
		}{
			{"refused", refused, nil, []any{ErrLost, "release bigint 42"}},
			{"refused, and fn failed", refused, mine, []any{ErrLost, mine}},
			{"failed", fails(io.ErrUnexpectedEOF), nil, []any{ErrLost, io.ErrUnexpectedEOF}},
			{"failed, and fn failed", fails(io.ErrUnexpectedEOF), mine, []any{ErrLost, io.ErrUnexpectedEOF, mine}},
			{"the server's own error", fails(pgError("XX000")), nil, []any{ErrLost, pgError("XX000")}},
		} {
			t.Run(c.name+" "+test.name, func(t *testing.T) {
				t.Parallel()
				db, srv := newServer(t, granted, test.reply)
				err := c.run(t.Context(), db, key, func(context.Context) error { return test.fn })
				wantError(t, err, test.wants...)
				want := append(slices.Clip(c.acquires), c.releases...)
				if !pgsql.Gone(test.reply.err) {
					want = append(want, freeQuery)
				}
				srv.want(t, on(1, append(want, "close")...)...)
				if n := db.Stats().OpenConnections; n != 0 {
					t.Errorf("%d connections in the pool", n)
				}
			})
		}
	}
}

// A session of the package's own is handed back clean, or discarded.
func TestEveryWayASessionLockCanGo(t *testing.T) {
	t.Parallel()
	died := io.ErrUnexpectedEOF
	for _, test := range []struct {
		name    string
		replies []reply
		opts    []Option
		want    []string
		wants   []any
	}{
		{
			"granted", nil, nil,
			on(1, "open", tryQuery, unlockQuery), nil,
		},
		{
			"granted after waiting", []reply{refused, granted}, nil,
			on(1, "open", tryQuery, armedWaitQuery, disarmQuery), nil,
		},
		{
			"granted after three slices", []reply{refused, refused, refused, granted}, nil,
			on(1, "open", tryQuery, armedWaitQuery, armedWaitQuery, armedWaitQuery, disarmQuery), nil,
		},
		{
			"a cancelled slice ends no waiting; what it may have got is freed, and its settings have gone with it",
			[]reply{refused, fails(err57014), done, fails(err57014), done, granted}, nil,
			on(1, "open", tryQuery, armedWaitQuery, freeQuery, armedWaitQuery, freeQuery, armedWaitQuery, disarmQuery), nil,
		},
		{
			"a cancelled slice, and what it may have got is not to be freed",
			[]reply{refused, fails(err57014), fails(pgError("53200"))}, nil,
			on(1, "open", tryQuery, armedWaitQuery, freeQuery, freeQuery, "close"), []any{pgError("53200")},
		},
		{
			"NoWait refused", []reply{refused}, []Option{NoWait()},
			on(1, "open", tryQuery), []any{ErrHeld},
		},
		{
			"the try fails after it was sent", []reply{fails(died)}, nil,
			on(1, "open", tryQuery, "close"), []any{died},
		},
		{
			"the server refuses the try", []reply{fails(pgError("53200"))}, nil,
			on(1, "open", tryQuery, freeQuery, "close"), []any{pgError("53200")},
		},
		{
			"the try is cancelled by an administrator", []reply{fails(err57014)}, nil,
			on(1, "open", tryQuery, freeQuery, "close"), []any{err57014},
		},
		{
			"the wait fails", []reply{refused, fails(pgError("53200"))}, nil,
			on(1, "open", tryQuery, armedWaitQuery, resetQuery+freeQuery, "close"), []any{pgError("53200")},
		},
		{
			"the wait deadlocks", []reply{refused, refused, fails(pgError("40P01"))}, nil,
			on(1, "open", tryQuery, armedWaitQuery, armedWaitQuery, resetQuery+freeQuery, "close"), []any{ErrDeadlock, pgError("40P01")},
		},
		{
			"the session dies in the wait: the next one waits at once", []reply{refused, fails(died)}, nil,
			slices.Concat(on(1, "open", tryQuery, armedWaitQuery, "close"), on(2, "open", probeQuery, armedWaitQuery, disarmQuery)), nil,
		},
		{
			"the session dies between try and wait", []reply{refused, fails(driver.ErrBadConn)}, nil,
			slices.Concat(on(1, "open", tryQuery, armedWaitQuery, "close"), on(2, "open", probeQuery, armedWaitQuery, disarmQuery)), nil,
		},
		{
			"three sessions die", []reply{refused, fails(died), done, refused, fails(died), done, fails(died)}, nil,
			slices.Concat(
				on(1, "open", tryQuery, armedWaitQuery, "close"), on(2, "open", probeQuery, armedWaitQuery, armedWaitQuery, "close"),
				on(3, "open", probeQuery, armedWaitQuery, "close"), on(4, "open", probeQuery, armedWaitQuery, disarmQuery),
			), nil,
		},
		{
			"unlock refused", []reply{granted, refused}, nil,
			on(1, "open", tryQuery, unlockQuery, freeQuery, "close"), []any{ErrLost},
		},
		{
			"unlock refused after a wait", []reply{refused, refused, granted, refused}, nil,
			on(1, "open", tryQuery, armedWaitQuery, armedWaitQuery, disarmQuery, resetQuery+freeQuery, "close"), []any{ErrLost},
		},
		{
			"unlock fails", []reply{granted, fails(died)}, nil,
			on(1, "open", tryQuery, unlockQuery, "close"), []any{ErrLost, died},
		},
	} {
		bubble(t, test.name, func(t *testing.T) {
			db, srv := newServer(t, test.replies...)
			wantError(t, WithLock(t.Context(), db, key, nothing, test.opts...), test.wants...)
			srv.want(t, test.want...)
			if n := db.Stats().InUse; n != 0 {
				t.Errorf("%d connections not handed back", n)
			}
			if got, want := db.Stats().Idle, srv.open(); got != want {
				t.Errorf("%d connections idle of %d open", got, want)
			}
		})
	}
}

func TestACtxThatHasEndedSendsNothing(t *testing.T) {
	t.Parallel()
	for _, c := range closures {
		db, srv := newServer(t)
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		wantError(t, c.run(ctx, db, key, nothing), ErrNotAcquired, context.Canceled)
		srv.want(t)
	}
}

func TestTheEndOfCtxWhileFnRunsEndsFnsCtxAndTheReleaseIsClean(t *testing.T) {
	t.Parallel()
	cause := errors.New("cause")
	for _, i := range []int{0, 1, 3} {
		c := closures[i]
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			db, srv := newServer(t)
			ctx, cancel := context.WithCancelCause(t.Context())
			err := c.run(ctx, db, key, func(fnCtx context.Context) error {
				cancel(cause)
				<-fnCtx.Done()
				return context.Cause(fnCtx)
			})
			if err != cause {
				t.Errorf("error: %v", err)
			}
			srv.want(t, on(1, append(slices.Clip(c.acquires), c.releases...)...)...)
		})
	}
}

func TestTakingAKeyAgainIsErrReentrant(t *testing.T) {
	t.Parallel()
	type acquirer func(ctx context.Context, db *sql.DB, conn *sql.Conn, tx *sql.Tx, key Key) error
	inner := map[string]acquirer{
		"AcquireConn": func(ctx context.Context, _ *sql.DB, conn *sql.Conn, _ *sql.Tx, key Key) error {
			return AcquireConn(ctx, conn, key)
		},
		"AcquireTx": func(ctx context.Context, _ *sql.DB, _ *sql.Conn, tx *sql.Tx, key Key) error {
			return AcquireTx(ctx, tx, key)
		},
		"Lead": func(ctx context.Context, db *sql.DB, _ *sql.Conn, _ *sql.Tx, key Key) error {
			return Lead(ctx, db, key, nothing)
		},
		"WithLocks, among others": func(ctx context.Context, db *sql.DB, _ *sql.Conn, _ *sql.Tx, key Key) error {
			return WithLocks(ctx, db, []Key{ID(1), ID(2), key}, nothing)
		},
	}
	for _, c := range closures {
		inner[c.name] = func(ctx context.Context, db *sql.DB, _ *sql.Conn, _ *sql.Tx, key Key) error {
			return c.run(ctx, db, key, nothing)
		}
	}
	for _, outer := range closures {
		for name, acquire := range inner {
			t.Run(outer.name+" then "+name, func(t *testing.T) {
				t.Parallel()
				db, srv := newServer(t)
				other, _ := newServer(t)
				conn := borrow(t, other)
				tx, err := other.Begin()
				if err != nil {
					t.Fatal(err)
				}
				defer func() { _ = tx.Rollback() }()

				var ended context.Context
				err = outer.run(t.Context(), db, key, func(ctx context.Context) error {
					ended = ctx
					sent := srv.lines()
					wantError(t, acquire(ctx, db, conn, tx, key), ErrReentrant, "acquire bigint 42")
					derived, cancel := context.WithCancel(ctx)
					defer cancel()
					wantError(t, acquire(derived, db, conn, tx, key), ErrReentrant)
					srv.want(t, sent...)

					wantError(t, acquire(ctx, db, conn, tx, ID(43)))
					wantError(t, acquire(ctx, db, conn, tx, Pair(0, 42)))
					if !strings.HasPrefix(name, "Acquire") || name == "Acquire" {
						wantError(t, acquire(ctx, other, nil, nil, key)) // of another database
					}
					// Two locks deep, the outer one counts as well.
					return WithLock(ctx, db, ID(44), func(ctx context.Context) error {
						wantError(t, acquire(ctx, db, conn, tx, key), ErrReentrant)
						return nil
					})
				})
				wantError(t, err)

				// The lock is released, and what the ctx says of it is history. The
				// ctx itself has ended, too.
				wantError(t, acquire(context.WithoutCancel(ended), db, conn, tx, key))
			})
		}
	}
}

func TestANameIsTheSameLockAsItsNumber(t *testing.T) {
	t.Parallel()
	db, _ := newServer(t)
	wantError(t, WithLock(t.Context(), db, Name("a"), func(ctx context.Context) error {
		wantError(t, WithLock(ctx, db, ID(-3848465438864589366), nothing), ErrReentrant)
		return nil
	}))
}
