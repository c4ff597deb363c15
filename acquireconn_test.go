package advisory

import (
	"context"
	"database/sql"
	"errors"
	"io"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/pgadvisory/advisory/internal/pgsql"
	"github.com/pgadvisory/advisory/internal/session"
)

// On the caller's connection, what it holds is known exactly, and nothing else on it is touched.
func TestAcquireConn(t *testing.T) {
	t.Parallel()
	died := io.ErrUnexpectedEOF
	sharedTry := strings.Replace(tryCalledQuery, "_lock(", "_lock_shared(", 1)
	sharedWait := commentedWait(pgsql.OnCallers, "", key.key, true, sliceMin, pgsql.Settings{})
	for _, test := range []struct {
		name    string
		replies []reply
		opts    []Option
		want    []string // after open
		wants   []any
	}{
		{"granted", nil, nil, []string{tryCalledQuery}, nil},
		{"shared", nil, []Option{Shared()}, []string{sharedTry}, nil},
		{"granted after waiting", []reply{refused}, nil, []string{tryCalledQuery, calledWaitQuery}, nil},
		{"granted after two slices", []reply{refused, refused}, nil, []string{tryCalledQuery, calledWaitQuery, calledWaitQuery}, nil},
		{"shared, after two slices", []reply{refused, refused}, []Option{Shared()}, []string{sharedTry, sharedWait, sharedWait}, nil},
		{"NoWait refused", []reply{refused}, []Option{NoWait()}, []string{tryCalledQuery}, []any{ErrHeld}},
		{
			"Timeout", []reply{refused, refused, refused}, []Option{Timeout(150 * time.Millisecond)},
			[]string{tryCalledQuery, calledWaitQuery, calledWaitQuery}, []any{ErrHeld, "not acquired within 150ms"},
		},
		{"the try fails", []reply{fails(died)}, nil, []string{tryCalledQuery, "close"}, []any{died}},
		{"the server refuses the try", []reply{fails(pgError("53200"))}, nil, []string{tryCalledQuery, freeQuery, "close"}, []any{pgError("53200")}},
		{"the wait fails", []reply{refused, fails(died)}, nil, []string{tryCalledQuery, calledWaitQuery, "close"}, []any{died}},
		{"a deadlock", []reply{refused, fails(pgError("40P01"))}, nil, []string{tryCalledQuery, calledWaitQuery, freeQuery, "close"}, []any{ErrDeadlock}},
		{
			"a slice that is cancelled outside of its block: what it got is unlocked", []reply{refused, fails(err57014)}, nil,
			[]string{tryCalledQuery, calledWaitQuery, unlockHeldQuery, calledWaitQuery}, nil,
		},
		{"in a transaction", []reply{{rows: 3}}, nil, []string{tryCalledQuery}, []any{"in a transaction"}},
		{"in one that has failed", []reply{fails(pgError("25P02"))}, nil, []string{tryCalledQuery}, []any{"in a transaction"}},
		{"twice", []reply{{rows: 4}}, nil, []string{tryCalledQuery}, []any{ErrReentrant}},
		{"a standby", []reply{refused, {rows: 2}}, nil, []string{tryCalledQuery, calledWaitQuery, freeQuery, "close"}, []any{"hot standby", "primary"}},
	} {
		bubble(t, test.name, func(t *testing.T) {
			db, srv := newServer(t)
			answers := inOrder(test.replies...)
			srv.script = func(ctx context.Context, conn int, query string) (int64, error) {
				rows, err := answers(ctx, conn, query)
				if rows == 0 && err == nil {
					_, err = taken(t)(ctx, conn, query)
				}
				return rows, err
			}
			conn := borrow(t, db)
			wantError(t, AcquireConn(t.Context(), conn, key, test.opts...), test.wants...)
			srv.want(t, on(1, append([]string{"open"}, test.want...)...)...)
			if test.want[len(test.want)-1] == "close" {
				if err := conn.PingContext(t.Context()); !errors.Is(err, sql.ErrConnDone) {
					t.Errorf("the caller can go on: %v", err)
				}
			} else if _, err := conn.ExecContext(t.Context(), "SELECT"); err != nil {
				t.Errorf("the caller cannot go on: %v", err)
			}
			_ = conn.Close()
		})
	}
}

func TestReleaseConn(t *testing.T) {
	t.Parallel()
	died := io.ErrUnexpectedEOF
	for _, test := range []struct {
		name  string
		reply reply
		opts  []Option
		want  []string
		wants []any
	}{
		{"held", granted, nil, []string{unlockHeldQuery}, nil},
		{"held shared", granted, []Option{Shared()}, []string{strings.NewReplacer("_unlock(", "_unlock_shared(", "ExclusiveLock", "ShareLock").Replace(unlockHeldQuery)}, nil},
		{"not held", refused, nil, []string{unlockHeldQuery}, []any{ErrLost, "release bigint 42"}},
		{"fails", fails(died), nil, []string{unlockHeldQuery, "close"}, []any{ErrLost, died}},
		{"refused", fails(pgError("25P02")), nil, []string{unlockHeldQuery, freeQuery, "close"}, []any{ErrLost, pgError("25P02")}},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			db, srv := newServer(t, granted, test.reply)
			conn := borrow(t, db)
			wantError(t, AcquireConn(t.Context(), conn, key, test.opts...))
			ended, cancel := context.WithCancel(t.Context())
			cancel() // and it is released nevertheless
			wantError(t, ReleaseConn(ended, conn, key, test.opts...), test.wants...)
			got := srv.lines()[2:]
			if !slices.Equal(got, on(1, test.want...)) {
				t.Errorf("log: %q", got)
			}
		})
	}
}

func TestAcquireConnAndReleaseConnOnAConnThatIsClosed(t *testing.T) {
	t.Parallel()
	db, srv := newServer(t)
	conn := borrow(t, db)
	if err := conn.Close(); err != nil {
		t.Fatal(err)
	}
	wantError(t, AcquireConn(t.Context(), conn, key), sql.ErrConnDone)
	wantError(t, ReleaseConn(t.Context(), conn, key), ErrLost, sql.ErrConnDone)
	srv.want(t, "1 open")
}

func TestAcquireConnUnderAnEndedCtxLeavesConnAsItWas(t *testing.T) {
	t.Parallel()
	db, srv := newServer(t)
	conn := borrow(t, db)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	wantError(t, AcquireConn(ctx, conn, key), ErrNotAcquired, context.Canceled)
	srv.want(t, "1 open")
}

// AcquireConn waits for the end of its statement when ctx ends: then conn is the caller's again.
func TestAtTheEndOfCtxAcquireConnsStatementIsWaitedFor(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name  string
		reply reply // to the wait
		sent  []string
		wants []any
	}{
		{"granted", granted, []string{"mine"}, nil},
		{"not granted", refused, []string{"mine"}, []any{ErrNotAcquired, context.Canceled}},
		{"cancelled outside of the block", fails(err57014), []string{unlockHeldQuery, "mine"}, []any{ErrNotAcquired, context.Canceled}},
		{"a standby", reply{rows: 2}, []string{freeQuery, "close"}, []any{ErrNotAcquired, context.Canceled}},
		{"the server's error", fails(pgError("XX000")), []string{freeQuery, "close"}, []any{ErrNotAcquired, context.Canceled, pgError("XX000")}},
		{"the session dies", fails(io.ErrUnexpectedEOF), []string{"close"}, []any{ErrNotAcquired, context.Canceled, io.ErrUnexpectedEOF}},
	} {
		bubble(t, test.name, func(t *testing.T) {
			db, srv := newServer(t)
			conn := borrow(t, db)
			ctx, cancel := context.WithCancel(t.Context())
			srv.script = func(_ context.Context, _ int, query string) (int64, error) {
				switch {
				case isWait(query):
					cancel()
					time.Sleep(sliceMax)
					return test.reply.rows, test.reply.err
				case query == tryCalledQuery:
					return 0, nil
				}
				return 1, nil
			}
			wantError(t, AcquireConn(ctx, conn, key), test.wants...)
			_, _ = conn.ExecContext(t.Context(), "mine")
			_ = conn.Close()
			srv.want(t, on(1, append([]string{"open", tryCalledQuery, calledWaitQuery}, test.sent...)...)...)
		})
	}
}

// Nothing is sent once AcquireConn has returned, on a conn that others use.
func TestNothingIsSentOnceTheCallerHasLeft(t *testing.T) {
	t.Parallel()
	db, srv := newServer(t)
	conn := borrow(t, db)
	used, free := make(chan struct{}), make(chan struct{})
	go func() {
		_ = conn.Raw(func(any) error { // which keeps others from the connection
			close(used)
			<-free
			return nil
		})
	}()
	<-used
	ctx, cancel := context.WithCancel(t.Context())
	time.AfterFunc(10*time.Millisecond, cancel)
	wantError(t, AcquireConn(ctx, conn, key), ErrNotAcquired, context.Canceled)
	close(free)
	_ = conn.Close()
	wantError(t, db.Close())
	for _, line := range srv.lines() {
		if strings.Contains(line, "advisory") {
			t.Errorf("sent: %s", line)
		}
	}
}

// The answer of a primary is no grant, for a caller who has left.
func TestTheEndOfCtxDuringTheQuestionForAPrimaryUnlocksNothing(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		db, srv := newServer(t)
		conn := borrow(t, db)
		ctx, cancel := context.WithCancel(t.Context())
		asked := false
		srv.script = func(_ context.Context, _ int, query string) (int64, error) {
			switch {
			case query == tryCalledQuery:
				return 0, nil
			case isWait(query):
				return 0, pgError("42501")
			case query == probeQuery:
				asked = true
				cancel()
				time.Sleep(10 * time.Millisecond)
			}
			return 1, nil
		}
		wantError(t, AcquireConn(ctx, conn, key), ErrNotAcquired, context.Canceled)
		wantError(t, conn.Close())
		if lines := srv.lines(); !asked || slices.Contains(lines, "1 "+unlockQuery) {
			t.Errorf("asked: %v; log: %q", asked, lines)
		}
	})
}

func TestADriverThatDoesNotReturnFromAWaitOfAcquireConnIsAbandoned(t *testing.T) {
	t.Parallel()
	for _, end := range []time.Duration{time.Second, session.AnswerBound - time.Second} {
		synctest.Test(t, func(t *testing.T) {
			db, srv := newServer(t)
			free := stuck(srv, calledWaitQuery)
			conn := borrow(t, db)
			ctx, cancel := context.WithTimeout(t.Context(), end)
			defer cancel()
			start := time.Now()
			wantError(t, AcquireConn(ctx, conn, key), ErrNotAcquired, context.DeadlineExceeded)
			wantTook(t, start, end, end+time.Second)
			time.Sleep(time.Hour)
			free()
			synctest.Wait()
			srv.want(t, on(1, "open", tryCalledQuery, calledWaitQuery, "close")...)
		})
	}
}
