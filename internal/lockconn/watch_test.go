package lockconn_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/pgadvisory/advisory/internal/lockconn"
	"github.com/pgadvisory/advisory/internal/pgsql"
	"github.com/pgadvisory/advisory/internal/session"
)

// hold has f watched for a holder, and returns it, and when and why it is told of a loss.
func (f *fixture) hold(t *testing.T, every, idleTimeout time.Duration) (*lockconn.Holder, <-chan told) {
	t.Helper()
	h, tells := &lockconn.Holder{Heartbeat: every, IdleTimeout: idleTimeout}, make(chan told, 1)
	h.Begin(func(cause error) { tells <- told{time.Now(), cause} })
	wantError(t, f.Hold(h), nil)
	return h, tells
}

type told struct {
	at    time.Time
	cause error
}

// beats answers heartbeats, the first one being number 1, by answer, and everything else with one row.
func beats(answer func(ctx context.Context, no int, query string) (int64, error)) func(context.Context, string) (int64, error) {
	no := 0
	return func(ctx context.Context, query string) (int64, error) {
		if !isBeat(query) {
			return 1, nil
		}
		no++
		return answer(ctx, no, query)
	}
}

// The session of held locks is checked every heartbeat. The first one has the server watch it.
func TestHeartbeats(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		f := newConn(t, 0)
		start := time.Now()
		f.srv.answer = beats(func(_ context.Context, no int, query string) (int64, error) {
			if sets := strings.Contains(query, "'idle_session_timeout', '15000'"); sets != (no == 1) {
				t.Errorf("heartbeat %d: %s", no, query)
			}
			return 1, nil
		})
		f.must(t, lockconn.Try, id(1)...)
		if f.Session().IdleTimeout() > 0 {
			t.Error("the server watches from the start")
		}
		h, tells := f.hold(t, time.Second, 15*time.Second)
		time.Sleep(2500 * time.Millisecond)
		if f.Session().IdleTimeout() == 0 {
			t.Error("the server does not watch")
		}
		f.must(t, lockconn.Ping) // an answer is a proof, too, but the pace stays
		time.Sleep(time.Second)
		f.LetGo(h)
		time.Sleep(time.Hour)
		if at := f.srv.beatsSince(start); !slices.Equal(at, []time.Duration{time.Second, 2 * time.Second, 3 * time.Second}) || len(tells) > 0 {
			t.Errorf("heartbeats at %v", at)
		}
		f.s.Discard()
	})
}

// A lock that cannot be shown to be held is lost, by two heartbeats after the last proof.
func TestAHeartbeatThatIsNotAnsweredIsALoss(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name   string
		second func(ctx context.Context) (int64, error)
		at     time.Duration
		cause  error
	}{
		{"gone", func(context.Context) (int64, error) { return 0, io.ErrUnexpectedEOF }, 2 * time.Second, io.ErrUnexpectedEOF},
		{"another session", func(context.Context) (int64, error) { return 0, nil }, 2 * time.Second, session.ErrNotHeld},
		{"a standby", func(context.Context) (int64, error) { return pgsql.OnStandby, nil }, 2 * time.Second, session.ErrStandby},
		{"the server's error", func(context.Context) (int64, error) { return 0, serverError("XX000") }, 2 * time.Second, serverError("XX000")},
		{"silence", func(ctx context.Context) (int64, error) { <-ctx.Done(); return 0, ctx.Err() }, 3 * time.Second, pgsql.NoAnswer{After: time.Second}},
		{"a driver that does not return", func(context.Context) (int64, error) { time.Sleep(time.Hour); return 1, nil }, 3 * time.Second, pgsql.NoAnswer{After: time.Second}},
		{"just in time", func(context.Context) (int64, error) { time.Sleep(time.Second - 1); return 1, nil }, 0, nil},
	} {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := newConn(t, 0)
				f.srv.answer = beats(func(ctx context.Context, no int, _ string) (int64, error) {
					if no != 2 {
						return 1, nil
					}
					return test.second(ctx)
				})
				start := time.Now()
				f.must(t, lockconn.Try, id(1)...)
				h, tells := f.hold(t, time.Second, 15*time.Second)
				time.Sleep(10500 * time.Millisecond) // between two heartbeats
				switch {
				case test.cause == nil && len(tells) == 0:
					f.LetGo(h)
					f.s.Discard()
				case len(tells) == 0:
					t.Error("not lost")
				default:
					loss := <-tells
					if !errors.Is(loss.cause, test.cause) || loss.at.Sub(start) != test.at {
						t.Errorf("lost after %v: %v", loss.at.Sub(start), loss.cause)
					}
				}
				time.Sleep(2 * time.Hour) // until the driver has returned
			})
		})
	}
}

// Every answer is a proof that the session has lived when it was asked, also that to a request that
// got nothing: the time that is left to a heartbeat counts from there.
func TestEveryAnswerIsAProof(t *testing.T) {
	t.Parallel()
	for _, op := range []lockconn.Op{lockconn.Ping, lockconn.Try, lockconn.Look} {
		synctest.Test(t, func(t *testing.T) {
			f := newConn(t, 0)
			start := time.Now()
			f.must(t, lockconn.Try, id(1)...)
			f.srv.answer = func(ctx context.Context, query string) (int64, error) {
				if isBeat(query) {
					<-ctx.Done()
				}
				return 0, ctx.Err() // refused
			}
			_, tells := f.hold(t, time.Second, time.Minute)
			time.Sleep(900 * time.Millisecond)
			_, err := f.ask(t.Context(), op, id(2)...)
			wantError(t, err, nil)
			<-tells
			wantTook(t, start, 2900*time.Millisecond)
		})
	}
}

// A proof is as old as the statement that was answered, and not as its answer: the server may have ended
// the session meanwhile. So a slow answer puts off no loss.
func TestAProofIsAsOldAsItsStatement(t *testing.T) {
	t.Parallel()
	const slow, idleTimeout = 900 * time.Millisecond, 3 * time.Second // of which two thirds count
	silent := func(ctx context.Context, _ int, _ string) (int64, error) { <-ctx.Done(); return 0, ctx.Err() }
	asked := func(t *testing.T) *fixture {
		f := newConn(t, 0)
		f.must(t, lockconn.Try, id(1)...)
		f.srv.rtt = slow
		return f
	}
	batches := func(t *testing.T) *fixture {
		f := prepared(t)
		f.srv.rtt = slow / 2
		return f
	}
	refused := func(ops, _ string) (string, error) { return strings.Repeat("0", 1+strings.Count(ops, ",")), nil }
	together := func(t *testing.T, f *fixture) { f.together(t, lockconn.Try, 1, 2) } // behind a Ping
	for _, test := range []struct {
		name   string
		conn   func(*testing.T) *fixture // that holds a lock
		answer func(ctx context.Context, query string) (int64, error)
		batch  func(ops, keys string) (string, error)
		ask    func(*testing.T, *fixture)
		sent   time.Duration // when the last proof went out, since the lock is watched
	}{
		{"a heartbeat", asked, beats(func(ctx context.Context, no int, query string) (int64, error) {
			if no > 1 {
				return silent(ctx, no, query)
			}
			return 1, nil
		}), nil, nil, time.Second},
		{"a grant after a wait", func(t *testing.T) *fixture { return newConnOn(t, &server{rtt: slow}, idleTimeout) }, beats(silent), nil, nil, -slow},
		{"a request", asked, beats(silent), nil, func(t *testing.T, f *fixture) { f.must(t, lockconn.Try, id(2)...) }, 0},
		{"a request that is refused", asked, func(ctx context.Context, query string) (int64, error) {
			if isBeat(query) {
				return silent(ctx, 1, query)
			}
			return 0, nil
		}, nil, func(t *testing.T, f *fixture) {
			_, err := f.ask(t.Context(), lockconn.Try, id(2)...)
			wantError(t, err, nil)
		}, 0},
		{"a batch", batches, beats(silent), nil, together, slow / 2},
		{"a batch that is refused", batches, beats(silent), refused, together, slow / 2},
	} {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := test.conn(t)
				f.srv.answer, f.srv.batch = test.answer, test.batch
				start := time.Now()
				_, tells := f.hold(t, time.Second, idleTimeout)
				if test.ask != nil {
					test.ask(t, f)
				}
				<-tells
				wantTook(t, start, test.sent+2*time.Second)
			})
		})
	}
}

// A process that was frozen for so long that the server may have let go of its locks knows that by
// its clock alone. It sends no heartbeat, which might come back well.
func TestAProcessThatWasFrozenHasLostItsLock(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		f := newConn(t, 3*time.Second) // since then
		f.srv.answer = beats(func(context.Context, int, string) (int64, error) {
			t.Error("a heartbeat")
			return 1, nil
		})
		time.Sleep(1500 * time.Millisecond)
		_, tells := f.hold(t, time.Second, 3*time.Second)
		loss := <-tells
		if want := "no heartbeat for 2.5s"; loss.cause.Error() != want {
			t.Errorf("cause: %v, want %s", loss.cause, want)
		}
		wantError(t, <-f.lost, loss.cause)
	})
}

// The holders know of a loss before anybody else can have their locks: before the owner of the Conn is
// told, and before the connection is closed. Requests that wait fail then, too.
func TestALossTellsTheHoldersFirst(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		f := newConn(t, 0)
		f.srv.answer = beats(func(context.Context, int, string) (int64, error) {
			time.Sleep(time.Second / 2)
			return 0, nil
		})
		// A Conn of its own, to have the order of all.
		c := lockconn.New(f.s, nil, nil, false, func(c *lockconn.Conn) { f.srv.write(fmt.Sprint("onLost: ", c.Lost() != nil)) })
		wantError(t, c.Ask(t.Context(), &lockconn.Request{Op: lockconn.Try, Keys: id(1)}), nil)
		for range 2 {
			h := &lockconn.Holder{Heartbeat: time.Second, IdleTimeout: time.Minute}
			h.Begin(func(error) { f.srv.write("holder") })
			wantError(t, c.Hold(h), nil)
		}
		var waits sync.WaitGroup
		time.AfterFunc(1100*time.Millisecond, func() {
			waits.Go(func() {
				if err := c.Ask(t.Context(), &lockconn.Request{Op: lockconn.Ping}); !errors.As(err, new(lockconn.LostError)) {
					t.Errorf("a request that waits: %v", err)
				}
			})
		})
		time.Sleep(2 * time.Second)
		waits.Wait()
		lines := f.srv.lines()
		want := []string{"holder", "holder", "onLost: true", f.s.Reset() + pgsql.UnlockAll, "close"}
		if len(lines) < 2 || !slices.Equal(lines[2:], want) {
			t.Errorf("log: %q", lines)
		}
	})
}

// A loss breaks off the statement that is under way: its caller is told at once, and the connection is closed
// at once, which frees the locks.
func TestALossBreaksOffTheStatementUnderWay(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		f := newConn(t, 0)
		start := time.Now()
		f.must(t, lockconn.Try, id(1)...)
		f.srv.answer = func(ctx context.Context, _ string) (int64, error) { <-ctx.Done(); return 0, ctx.Err() }
		_, tells := f.hold(t, time.Second, time.Minute)
		if _, err := f.ask(t.Context(), lockconn.Try, id(2)...); !pgsql.IsNoAnswer(err) {
			t.Errorf("error: %v", err)
		}
		wantTook(t, start, 2*time.Second)
		if loss := <-tells; loss.at.Sub(start) != 2*time.Second {
			t.Errorf("lost after %v", loss.at.Sub(start))
		}
		synctest.Wait()
		f.srv.want(t, try(1), try(2), "close")
	})
}

// A holder that begins after a loss is told at once.
func TestAHolderThatBeginsAfterALoss(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		f := newConn(t, 0)
		f.must(t, lockconn.Try, id(1)...)
		h := &lockconn.Holder{Heartbeat: time.Second, IdleTimeout: time.Minute}
		wantError(t, f.Hold(h), nil)
		f.srv.answer = func(context.Context, string) (int64, error) { return 0, io.ErrUnexpectedEOF }
		wantError(t, f.Prove(t.Context()), io.ErrUnexpectedEOF)
		wantError(t, h.Lost(), io.ErrUnexpectedEOF)
		var cause error
		h.Begin(func(err error) { cause = err })
		wantError(t, cause, io.ErrUnexpectedEOF)
		if err := f.Hold(h); !errors.As(err, new(lockconn.LostError)) {
			t.Errorf("it is watched: %v", err)
		}
	})
}

// ProveFresh asks only where the server watches, and the grant has been on its way for a heartbeat.
// Where it does not watch, it has no clock to be ahead of: the heartbeats count from the answer.
func TestProveFresh(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name    string
		watched bool
		age     time.Duration
		asks    bool
		next    time.Duration // until the next heartbeat
	}{
		{"watched, and fresh", true, time.Second - 1, false, 1},
		{"watched, and old", true, time.Second, true, time.Second},
		{"not watched, and fresh", false, time.Second - 1, false, 1},
		{"not watched, and old", false, time.Second, false, time.Second},
	} {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				idleTimeout := time.Duration(0)
				if test.watched {
					idleTimeout = time.Minute
				}
				f := newConn(t, idleTimeout)
				if !test.watched {
					f.must(t, lockconn.Try, id(0)...)
				}
				time.Sleep(test.age)
				start := time.Now()
				h, _ := f.hold(t, time.Second, time.Minute)
				wantError(t, f.ProveFresh(t.Context(), time.Second), nil)
				want := []time.Duration{test.next}
				if test.asks {
					want = []time.Duration{0, test.next}
				}
				time.Sleep(test.next)
				synctest.Wait()
				f.LetGo(h)
				if at := f.srv.beatsSince(start); !slices.Equal(at, want) {
					t.Errorf("heartbeats at %v, want %v", at, want)
				}
				f.s.Discard()
			})
		})
	}
}

// Prove ends with ctx, and then costs nobody the session.
func TestProveEndsWithCtx(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		f := newConn(t, time.Minute)
		f.srv.rtt = time.Second
		ctx, cancel := context.WithTimeout(t.Context(), time.Second/2)
		defer cancel()
		start := time.Now()
		wantError(t, f.Prove(ctx), context.DeadlineExceeded)
		wantTook(t, start, time.Second/2)
		time.Sleep(time.Second)
		wantError(t, f.Prove(t.Context()), nil)
		f.s.Discard()
	})
}
