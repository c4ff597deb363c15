package advisory

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"io"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/pgadvisory/advisory/internal/session"
)

type spanKey struct{}

// record is an Observer that writes down its calls, and which contexts they get.
func record(calls *[]string) *Observer {
	var mu sync.Mutex
	write := func(ctx context.Context, i LockInfo, format string, args ...any) {
		line := fmt.Sprintf(format, args...) + fmt.Sprintf(" %s %s in %v", i.Function, keyList(i.Keys), ctx.Value(spanKey{}))
		if i.Shared {
			line += " shared"
		}
		mu.Lock()
		defer mu.Unlock()
		*calls = append(*calls, line)
	}
	return &Observer{
		AcquireStart: func(ctx context.Context, i LockInfo) context.Context {
			write(ctx, i, "AcquireStart")
			return context.WithValue(ctx, spanKey{}, "acquire")
		},
		AcquireEnd: func(ctx context.Context, i LockInfo, took time.Duration, err error) {
			write(ctx, i, "AcquireEnd %v %v", took, err)
		},
		HoldStart: func(ctx context.Context, i LockInfo) context.Context {
			write(ctx, i, "HoldStart")
			return context.WithValue(ctx, spanKey{}, "hold")
		},
		Lost: func(ctx context.Context, i LockInfo, err error) { write(ctx, i, "Lost %v", err) },
		HoldEnd: func(ctx context.Context, i LockInfo, held time.Duration, err error) {
			write(ctx, i, "HoldEnd %v %v", held, err)
		},
	}
}

func TestAnObserverIsToldOfAcquisitionAndHold(t *testing.T) {
	t.Parallel()
	for _, c := range closures {
		bubble(t, c.name, func(t *testing.T) {
			db, srv := newServer(t)
			srv.script = script(when(isTry, func() { time.Sleep(time.Millisecond) }))
			var calls []string
			wantError(t, c.run(context.WithValue(t.Context(), spanKey{}, "mine"), db, key, func(ctx context.Context) error {
				if got := ctx.Value(spanKey{}); got != "hold" {
					t.Errorf("fn's ctx is of %v", got)
				}
				time.Sleep(2 * time.Millisecond)
				return nil
			}, Shared(), Observe(record(&calls))))
			name, _, _ := strings.Cut(c.name, " ")
			if diff := cmp.Diff([]string{
				"AcquireStart " + name + " bigint 42 in mine shared",
				"AcquireEnd 1ms <nil> " + name + " bigint 42 in acquire shared",
				"HoldStart " + name + " bigint 42 in acquire shared",
				"HoldEnd 2ms <nil> " + name + " bigint 42 in hold shared",
			}, calls); diff != "" {
				t.Errorf("calls (-want +got):\n%s", diff)
			}
		})
	}
}

func TestAnObserverIsToldOfFailures(t *testing.T) {
	t.Parallel()
	const (
		start = "AcquireStart WithLock bigint 42 in <nil>"
		end   = "AcquireEnd 0s <nil> WithLock bigint 42 in acquire"
		held  = "HoldStart WithLock bigint 42 in acquire"
	)
	for _, test := range []struct {
		name    string
		replies []reply
		opts    []Option
		want    []string
	}{
		{"refused", []reply{refused}, []Option{NoWait()}, []string{
			start, "AcquireEnd 0s advisory: acquire bigint 42: not acquired: another holds the lock WithLock bigint 42 in acquire",
		}},
		{"unlock refused", []reply{granted, granted, refused}, nil, []string{
			start, end, held, "HoldEnd 1.5s advisory: release bigint 42: lock lost: " + session.ErrNotHeld.Error() + " WithLock bigint 42 in hold",
		}},
		{"lost", []reply{granted, fails(io.ErrUnexpectedEOF)}, nil, []string{
			start, end, held, "Lost advisory: hold bigint 42: lock lost: unexpected EOF WithLock bigint 42 in hold",
			"HoldEnd 1.5s advisory: release bigint 42: lock lost: unexpected EOF WithLock bigint 42 in hold",
		}},
	} {
		bubble(t, test.name, func(t *testing.T) {
			db, _ := newServer(t, test.replies...)
			var calls []string
			if err := WithLock(t.Context(), db, key, sleeps(1500*time.Millisecond), append(test.opts, Observe(record(&calls)))...); err == nil {
				t.Error("no error")
			}
			if diff := cmp.Diff(test.want, calls); diff != "" {
				t.Errorf("calls (-want +got):\n%s", diff)
			}
		})
	}
}

func TestAnObserverIsToldOfTheEndOfATransaction(t *testing.T) {
	t.Parallel()
	db, _ := newServer(t, done, granted, fails(pgError("40001")))
	var calls []string
	wantError(t, WithTxLock(t.Context(), db, key, noTx, Observe(record(&calls))), pgError("40001"))
	if last := calls[len(calls)-1]; !strings.Contains(last, "HoldEnd") || !strings.Contains(last, "commit bigint 42: server error 40001") {
		t.Errorf("last call: %s", last)
	}
}

func TestAnObserverOfTheCallersSessionIsToldOfTheAcquisitionAlone(t *testing.T) {
	t.Parallel()
	for name, acquire := range map[string]func(target, ...Option) error{
		"AcquireConn": func(on target, opts ...Option) error { return AcquireConn(t.Context(), on.conn, key, opts...) },
		"AcquireTx":   func(on target, opts ...Option) error { return AcquireTx(t.Context(), on.tx, key, opts...) },
	} {
		on, srv := newTarget(t)
		for _, test := range []struct {
			reply reply
			err   string
		}{
			{granted, "<nil>"},
			{refused, "advisory: acquire bigint 42: not acquired: another holds the lock"},
		} {
			srv.script = inOrder(test.reply)
			var calls []string
			_ = acquire(on, NoWait(), Observe(record(&calls)))
			if len(calls) != 2 || calls[0] != "AcquireStart "+name+" bigint 42 in <nil>" || !strings.Contains(calls[1], " "+test.err+" "+name) {
				t.Errorf("calls: %q", calls)
			}
		}
	}
}

func TestAnObserversFunctionsMayBeNil(t *testing.T) {
	t.Parallel()
	for _, o := range []*Observer{nil, {}} {
		synctest.Test(t, func(t *testing.T) {
			db, _ := newServer(t, granted, fails(io.ErrUnexpectedEOF))
			wantError(t, WithLock(t.Context(), db, key, untilDone, Observe(o)), ErrLost, io.ErrUnexpectedEOF)
			wantError(t, WithTxLock(t.Context(), db, key, noTx, Observe(o)))
		})
	}
}

func TestNonsenseIsNotObserved(t *testing.T) {
	t.Parallel()
	db, _ := newServer(t)
	var calls []string
	wantError(t, WithTxLock(t.Context(), db, key, noTx, Heartbeat(time.Second), Observe(record(&calls))), "Heartbeat")
	wantError(t, WithLock(t.Context(), db, Key{}, nothing, Observe(record(&calls))), "zero Key")
	if len(calls) > 0 {
		t.Errorf("calls: %q", calls)
	}
}

func TestSessionLocker(t *testing.T) {
	t.Parallel()
	db, srv := newServer(t)
	l := NewSessionLocker(key, Shared(), NoWait())
	conn := borrow(t, db)
	try := strings.Replace(tryCalledQuery, "_lock(", "_lock_shared(", 1)
	unlock := strings.NewReplacer("_unlock(", "_unlock_shared(", "ExclusiveLock", "ShareLock").Replace(unlockHeldQuery)
	wantError(t, l.SessionLock(t.Context(), conn))
	wantError(t, l.SessionUnlock(t.Context(), conn))
	wantError(t, NewSessionLocker(key, isolation(sql.LevelSerializable)).SessionLock(t.Context(), conn), "TxOptions does not apply to AcquireConn")
	srv.script = inOrder(refused, refused)
	wantError(t, l.SessionLock(t.Context(), conn), ErrHeld)
	wantError(t, l.SessionUnlock(t.Context(), conn), ErrLost)
	srv.want(t, slices.Concat(on(1, "open", try, unlock), on(1, try, unlock))...)
}

func TestAnObserverThatPanicsLeavesNoLock(t *testing.T) {
	t.Parallel()
	for _, c := range closures {
		for name, o := range map[string]*Observer{
			"AcquireEnd": {AcquireEnd: func(context.Context, LockInfo, time.Duration, error) { panic("mine") }},
			"HoldStart":  {HoldStart: func(context.Context, LockInfo) context.Context { panic("mine") }},
			"HoldEnd":    {HoldEnd: func(context.Context, LockInfo, time.Duration, error) { panic("mine") }},
		} {
			t.Run(c.name+" "+name, func(t *testing.T) {
				t.Parallel()
				db, srv := newServer(t)
				wantPanic(t, "mine", func() {
					_ = c.run(t.Context(), db, key, func(context.Context) error {
						if name != "HoldEnd" {
							t.Error("fn runs")
						}
						return nil
					}, Observe(o))
				})
				want := slices.Clone(c.acquires)
				switch {
				case name == "HoldEnd":
					want = append(want, c.releases...)
				case c.name == "WithTxLock":
					want = append(want, "ROLLBACK", "close")
				case strings.HasPrefix(c.name, "WithTxLock"): // at REPEATABLE READ
					want = append(want, "ROLLBACK", freeQuery, "close")
				case c.name == "WithConnLock":
					want = append(want, freeQuery, "close")
				default:
					want = append(want, c.undoes...) // others may have locks on the session
				}
				srv.want(t, on(1, want...)...)
				if n := db.Stats().InUse; n != 0 {
					t.Errorf("%d connections not handed back", n)
				}
			})
		}
	}
}

func TestAnObserversNilCtxIsIgnored(t *testing.T) {
	t.Parallel()
	for _, c := range closures {
		db, _ := newServer(t)
		wantError(t, c.run(context.WithValue(t.Context(), spanKey{}, "mine"), db, key, func(ctx context.Context) error {
			if got := ctx.Value(spanKey{}); got != "mine" {
				t.Errorf("fn's ctx is of %v", got)
			}
			return ctx.Err()
		}, Observe(&Observer{
			AcquireStart: func(context.Context, LockInfo) context.Context { return noCtx },
			HoldStart:    func(context.Context, LockInfo) context.Context { return noCtx },
		})))
	}
}

// A Lost that takes long, ends its goroutine, or releases another lock holds up nobody: the
// contexts of all who have locks on the session end at once.
func TestLostHoldsUpNobody(t *testing.T) {
	t.Parallel()
	for name, does := range map[string]func(first *Lock){
		"takes long": func(*Lock) { time.Sleep(time.Hour) },
		"Goexit":     func(*Lock) { runtime.Goexit() },
		"releases":   func(first *Lock) { _ = first.Release() },
	} {
		for _, found := range []string{"by a heartbeat", "by another's release", "by another's try"} {
			bubble(t, name+", found "+found, func(t *testing.T) {
				p, dbs, srvs := newTable(t, 2)
				var locks []*Lock
				lost := &Observer{Lost: func(context.Context, LockInfo, error) { does(locks[0]) }}
				for _, k := range ids(8) {
					locks = append(locks, take(t, dbs[0], k, Observe(lost)))
				}
				p.kill(backendID{srvs[0], 1})
				switch found {
				case "by a heartbeat":
					time.Sleep(2 * defaultHeartbeat)
				case "by another's release":
					wantError(t, locks[0].Release(), ErrLost)
				case "by another's try":
					wantError(t, WithLock(t.Context(), dbs[0], key, nothing))
				}
				for i, l := range locks {
					wantError(t, WithLock(t.Context(), dbs[1], l.Key(), nothing, NoWait()))
					if l.Context().Err() == nil {
						t.Errorf("the ctx of lock %d lives on", i)
					}
					if err := l.Release(); !errors.Is(err, ErrLost) {
						t.Errorf("release of lock %d: %v", i, err)
					}
				}
				wantIdle(t, dbs[0])
				p.clean()
				time.Sleep(time.Hour) // of Lost
			})
		}
	}
}
