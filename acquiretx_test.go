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

	"github.com/google/go-cmp/cmp"

	"github.com/pgadvisory/advisory/internal/session"
)

// beginTx returns a transaction of a server of its own.
func beginTx(t *testing.T) (*sql.Tx, *server) {
	t.Helper()
	db, srv := newServer(t)
	tx, err := db.BeginTx(context.Background(), nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = tx.Rollback() })
	return tx, srv
}

// tries is the times at which a server on which another holds the lock is asked for it.
func tries(srv *server) *[]time.Duration {
	start := time.Now()
	at := new([]time.Duration)
	srv.script = func(_ context.Context, _ int, query string) (int64, error) {
		switch query {
		case callersTryQuery:
			*at = append(*at, time.Since(start))
			return 0, nil
		case deadlockQuery:
			return 0, nil
		}
		return 1, nil
	}
	return at
}

// The caller's transaction goes on after whatever ends the wait.
func TestAcquireTx(t *testing.T) {
	t.Parallel()
	died := io.ErrUnexpectedEOF
	shared := strings.Replace(callersTryQuery, "xact_lock(", "xact_lock_shared(", 1)
	for _, test := range []struct {
		name    string
		replies []reply
		opts    []Option
		want    []string // after BEGIN
		wants   []any
	}{
		{"granted", nil, nil, []string{callersTryQuery}, nil},
		{"shared", nil, []Option{Shared()}, []string{shared}, nil},
		{"granted after waiting", []reply{refused, refused}, nil, []string{callersTryQuery, callersTryQuery, callersTryQuery}, nil},
		{"shared, granted after waiting", []reply{refused}, []Option{Shared()}, []string{shared, shared}, nil},
		{"NoWait refused", []reply{refused}, []Option{NoWait()}, []string{callersTryQuery}, []any{ErrHeld}},
		{
			"Timeout, with a last try", []reply{refused, refused}, []Option{Timeout(time.Millisecond)},
			[]string{callersTryQuery, callersTryQuery}, []any{ErrHeld, "not acquired within 1ms"},
		},
		{"the last try is granted", []reply{refused, granted}, []Option{Timeout(time.Millisecond)}, []string{callersTryQuery, callersTryQuery}, nil},
		{"the try fails", []reply{fails(died)}, nil, []string{callersTryQuery}, []any{died}},
		{"the second try fails", []reply{refused, fails(died)}, nil, []string{callersTryQuery, callersTryQuery}, []any{died}},
		{"the server refuses the second try", []reply{refused, fails(err57014)}, nil, []string{callersTryQuery, callersTryQuery}, []any{err57014}},
	} {
		bubble(t, test.name, func(t *testing.T) {
			tx, srv := beginTx(t)
			srv.script = inOrder(test.replies...)
			wantError(t, AcquireTx(t.Context(), tx, key, test.opts...), test.wants...)
			srv.want(t, on(1, append([]string{"open", "BEGIN"}, test.want...)...)...)
			if err := tx.Commit(); err != nil {
				t.Error(err)
			}
		})
	}
}

func TestTheTriesOfAcquireTxArePaced(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		tx, srv := beginTx(t)
		at := tries(srv)
		start := time.Now()
		wantError(t, AcquireTx(t.Context(), tx, key, Timeout(10*time.Second)), ErrHeld, "not acquired within 10s")
		wantTook(t, start, 10*time.Second, 10*time.Second)
		most := 5 * time.Millisecond
		for i := 1; i < len(*at); i++ {
			d, last := (*at)[i]-(*at)[i-1], i == len(*at)-1
			if d > most || d < most/2 && !last {
				t.Errorf("pause %d: %v, want %v to %v", i, d, most/2, most)
			}
			most = min(2*most, 100*time.Millisecond)
		}
		if last := (*at)[len(*at)-1]; last != 10*time.Second {
			t.Errorf("the last try is at %v", last)
		}
		if n := strings.Count(strings.Join(srv.lines(), "\n"), deadlockQuery); n != 9 {
			t.Errorf("asked for a deadlock %d times in 10 s", n)
		}
	})
}

func TestTheEndOfCtxEndsAWaitOfAcquireTxWithoutCancelling(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		tx, srv := beginTx(t)
		cause := errors.New("cause")
		ctx, cancel := context.WithCancelCause(t.Context())
		time.AfterFunc(time.Second, func() { cancel(cause) })
		srv.script = func(stmtCtx context.Context, _ int, _ string) (int64, error) {
			time.Sleep(60 * time.Millisecond)
			if stmtCtx.Err() != nil {
				t.Error("a statement was cancelled")
			}
			return 0, nil
		}
		start := time.Now()
		wantError(t, AcquireTx(ctx, tx, key), ErrNotAcquired, context.Canceled, cause)
		wantTook(t, start, time.Second, 1060*time.Millisecond)
		sent := srv.lines()
		wantError(t, AcquireTx(ctx, tx, key), ErrNotAcquired, cause) // sends nothing
		srv.want(t, sent...)
		if err := tx.Commit(); err != nil {
			t.Error(err)
		}
	})
}

// If the holder waits for the transaction that waits for it, neither gets anywhere.
func TestADeadlockThatTheServerDoesNotSeeEndsAcquireTx(t *testing.T) {
	t.Parallel()
	question := []string{callersTryQuery, savepointQuery, deadlockQuery, rollbackToQuery}
	twice := slices.Concat(question, question)
	died := io.ErrUnexpectedEOF
	for _, test := range []struct {
		name    string
		failing string // the statement that fails, with err
		err     error
		rows    []int64 // the answers
		want    []string
		after   time.Duration
		wants   []any
	}{
		{"found twice", "", nil, []int64{1, 1}, twice, 2 * time.Second, []any{ErrDeadlock, "acquire bigint 42", "waits for this transaction"}},
		{"found by two holders", "", nil, []int64{2, 3}, twice, 2 * time.Second, []any{ErrDeadlock}},
		{"a moment in a hand-off", "", nil, []int64{1, 0, 1, 0, 1, 1}, slices.Concat(twice, twice, twice), 6 * time.Second, []any{ErrDeadlock}},
		{"the connection dies", deadlockQuery, died, nil, question[:3], time.Second, []any{died}},
		{"the savepoint fails", savepointQuery, pgError("53200"), nil, question[:2], time.Second, []any{pgError("53200")}},
		{"the rollback fails", rollbackToQuery, died, []int64{0}, question, time.Second, []any{died}},
		{"it may not be asked for", deadlockQuery, pgError("42501"), nil, append(slices.Clone(twice), callersTryQuery), 3 * time.Second, nil},
	} {
		bubble(t, test.name, func(t *testing.T) {
			tx, srv := beginTx(t)
			start := time.Now()
			answers := test.rows
			srv.script = func(_ context.Context, _ int, query string) (int64, error) {
				switch {
				case query == test.failing:
					return 0, test.err
				case query == callersTryQuery && time.Since(start) > 2900*time.Millisecond && test.wants == nil:
					return 1, nil
				case query == callersTryQuery:
					return 0, nil
				case query == deadlockQuery:
					rows := answers[0]
					answers = answers[1:]
					return rows, nil
				}
				return 1, nil
			}
			wantError(t, AcquireTx(t.Context(), tx, key), test.wants...)
			wantTook(t, start, test.after-100*time.Millisecond, test.after+time.Duration(len(test.want)/4+1)*100*time.Millisecond)
			if diff := cmp.Diff(on(1, append([]string{"open", "BEGIN"}, test.want...)...), slices.Compact(srv.lines())); diff != "" {
				t.Errorf("log of the server, tries in a row as one (-want +got):\n%s", diff)
			}
			srv.script = nil
			if err := tx.Commit(); err != nil {
				t.Error(err)
			}
		})
	}
}

func TestADriverThatDoesNotReturnFromTheQuestionForADeadlockIsAbandoned(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		tx, srv := beginTx(t)
		srv.script = func(_ context.Context, _ int, query string) (int64, error) {
			if query == deadlockQuery {
				time.Sleep(time.Minute)
				return 1, nil
			}
			return 0, nil
		}
		start := time.Now()
		wantError(t, AcquireTx(t.Context(), tx, key), "no answer from the server within 10s")
		wantTook(t, start, 0, deadlockPause+txPauseMax+session.AnswerBound+abandonAfter)
		time.Sleep(time.Hour)
	})
}

func TestAcquireTxOnATransactionThatHasEnded(t *testing.T) {
	t.Parallel()
	db, srv := newServer(t)
	tx, err := db.Begin()
	if err != nil {
		t.Fatal(err)
	}
	if err := tx.Commit(); err != nil {
		t.Fatal(err)
	}
	wantError(t, AcquireTx(t.Context(), tx, key), sql.ErrTxDone)
	srv.want(t, on(1, "open", "BEGIN", "COMMIT")...)
}

func TestAServerThatDoesNotAnswerAcquireTxIsGivenUp(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		db, srv := newServer(t)
		tx, err := db.Begin()
		if err != nil {
			t.Fatal(err)
		}
		srv.script = script(when(callersTryQuery, hangs))
		start := time.Now()
		wantError(t, AcquireTx(t.Context(), tx, key), "no answer from the server within 10s")
		wantTook(t, start, session.AnswerBound, session.AnswerBound)
		_ = tx.Rollback()
	})
}
