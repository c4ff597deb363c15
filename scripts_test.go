package advisory

import (
	"context"
	"fmt"
	"io"
	"strconv"
	"strings"
	"testing"
	"time"
)

// A rule is how a server answers some statements.
type rule struct {
	fits   func(query string) bool
	answer func(ctx context.Context) (int64, error)
}

// when is the rule for the statements that matching names. The answer is a reply, a
// func(context.Context) (int64, error), or a func() that is called before the answer of one row.
func when(statement, answer any) rule {
	r := rule{fits: matching(statement)}
	switch answer := answer.(type) {
	case reply:
		r.answer = func(context.Context) (int64, error) { return answer.rows, answer.err }
	case func(context.Context) (int64, error):
		r.answer = answer
	case func():
		r.answer = func(context.Context) (int64, error) { answer(); return 1, nil }
	default:
		panic(fmt.Sprintf("an answer of the type %T", answer))
	}
	return r
}

// matching is the one statement that a string is, but for nonce and bound, or those that a
// func(string) bool names.
func matching(statement any) func(query string) bool {
	if text, ok := statement.(string); ok {
		return func(query string) bool { return plainly(query) == text }
	}
	return statement.(func(string) bool)
}

// has names the statements that have part in them.
func has(part string) func(query string) bool {
	return func(query string) bool { return strings.Contains(query, part) }
}

// failing fails with err, as lockTable.fail, the statements that matching names.
func failing(statement any, err error) func(int, string) error {
	fits := matching(statement)
	return func(_ int, query string) error {
		if fits(query) {
			return err
		}
		return nil
	}
}

// script is a server that answers by the first rule that fits, and with one row where none does.
func script(rules ...rule) func(context.Context, int, string) (int64, error) {
	return func(ctx context.Context, _ int, query string) (int64, error) {
		for _, r := range rules {
			if r.fits(query) {
				return r.answer(ctx)
			}
		}
		return 1, nil
	}
}

// hangs is the answer that never comes.
func hangs(ctx context.Context) (int64, error) {
	<-ctx.Done()
	return 0, ctx.Err()
}

// noDial is a connection that is never made.
func noDial(ctx context.Context) error {
	<-ctx.Done()
	return ctx.Err()
}

// isTry tells whether a statement tries to take a lock.
func isTry(query string) bool { return strings.Contains(query, "_try_") }

// taken is a server on which another holds the lock for good. Its waits take what they were told to.
func taken(t testing.TB) func(context.Context, int, string) (int64, error) {
	return func(_ context.Context, _ int, query string) (int64, error) {
		switch {
		case isWait(query):
			time.Sleep(boundIn(t, query))
			return 0, nil
		case isTry(query):
			return 0, nil
		}
		return 1, nil
	}
}

// awayFor is a server on which another holds the lock. It goes down during the first
// wait, and is up again after d: then it is granted.
func awayFor(srv *server, d time.Duration, down error) {
	var back time.Time
	srv.script = func(_ context.Context, conn int, query string) (int64, error) {
		switch {
		case conn > 1:
			return 1, nil
		case isTry(query):
			return 0, nil
		case isWait(query):
			back = time.Now().Add(d)
			return 0, io.ErrUnexpectedEOF
		}
		return 1, nil
	}
	srv.dial = func(context.Context) error {
		if time.Now().Before(back) {
			return down
		}
		return nil
	}
}

// stuck is a driver that does not return from the statement that begins with prefix
// before it is told to, whatever becomes of ctx. Another holds the lock.
func stuck(srv *server, prefix string) (free func()) {
	back := make(chan struct{})
	srv.script = func(_ context.Context, _ int, query string) (int64, error) {
		if strings.HasPrefix(plainly(query), prefix) {
			<-back
		}
		if isTry(query) {
			return 0, nil
		}
		return 1, nil
	}
	return func() { close(back) }
}

// isWait tells whether a statement waits for a lock.
func isWait(query string) bool { return waitCall.MatchString(query) }

// isBeat tells whether a statement is a heartbeat.
func isBeat(query string) bool { return beatOf.MatchString(query) }

// boundIn is how long a statement that waits does so at most.
func boundIn(t testing.TB, query string) time.Duration {
	t.Helper()
	ms, err := strconv.Atoi(boundOf.FindStringSubmatch(query)[1])
	if err != nil {
		t.Error(err)
	}
	return time.Duration(ms) * time.Millisecond
}
