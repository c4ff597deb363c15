package advisory

import (
	"context"
	"database/sql"
	"errors"
	"log/slog"
	"strconv"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/pgadvisory/advisory/internal/manager"
	"github.com/pgadvisory/advisory/internal/pgsql"
	"github.com/pgadvisory/advisory/internal/session"
)

// What these tests know of the floors below, which export no name for it.
const (
	abandonAfter   = 200 * time.Millisecond // session: run.go
	clearBound     = time.Second            // session: run.go
	dialBound      = 30 * time.Second       // session: pool.go
	sliceMin       = 100 * time.Millisecond // session: wait.go
	sliceMax       = 400 * time.Millisecond // session: wait.go
	txPauseMax     = 100 * time.Millisecond // session: callerstx.go
	deadlockPause  = time.Second            // session: callerstx.go
	batchLimit     = 1000                   // lockconn: batch.go
	maxWaits       = 8                      // manager: manager.go
	outagePauseMin = 50 * time.Millisecond  // manager: outage.go
	outagePauseMax = 2 * time.Second        // manager: outage.go
	reconnectFor   = 30 * time.Second       // manager: outage.go
)

// checkCall returns the call that makes the setting of pgsql.Settings.Check.
func checkCall(local bool) string {
	call := strings.TrimSuffix(strings.TrimPrefix(pgsql.Settings{Check: true}.SetCheck(), "SELECT "), "; ")
	return strings.TrimSuffix(call, "true)") + strconv.FormatBool(local) + ")"
}

var key = ID(42)

// statement_timeout, or pg_cancel_backend
var err57014 = pgError("57014")

// ids are n keys.
func ids(n int) []Key {
	keys := make([]Key, n)
	for i := range keys {
		keys[i] = ID(int64(100 + i))
	}
	return keys
}

func nothing(context.Context) error { return nil }

// untilDone waits for the end of ctx.
func untilDone(ctx context.Context) error {
	<-ctx.Done()
	return nil
}

// sleeps takes d, and fails if ctx has ended meanwhile.
func sleeps(d time.Duration) func(context.Context) error {
	return func(ctx context.Context) error {
		time.Sleep(d)
		return ctx.Err()
	}
}

// neverRuns is not to be called.
func neverRuns(t testing.TB) func(context.Context) error {
	return func(context.Context) error {
		t.Error("fn runs")
		return nil
	}
}

func noTx(context.Context, *sql.Tx) error { return nil }

func isolation(level sql.IsolationLevel) Option {
	return TxOptions(&sql.TxOptions{Isolation: level})
}

// The functions that hold a lock around fn, and what they send for key.
var closures = []struct {
	name             string
	run              func(ctx context.Context, db *sql.DB, key Key, fn func(context.Context) error, opts ...Option) error
	acquires         []string
	releases, undoes []string // after fn's success; after its failure
}{
	{
		"WithLock", WithLock,
		[]string{"open", tryQuery}, []string{unlockQuery}, []string{unlockQuery},
	},
	{
		"WithLocks", func(ctx context.Context, db *sql.DB, key Key, fn func(context.Context) error, opts ...Option) error {
			return WithLocks(ctx, db, []Key{key}, fn, opts...)
		},
		[]string{"open", tryQuery}, []string{unlockQuery}, []string{unlockQuery},
	},
	{
		"Acquire", func(ctx context.Context, db *sql.DB, key Key, fn func(context.Context) error, opts ...Option) (err error) {
			l, err := Acquire(ctx, db, key, opts...)
			if err != nil {
				return err
			}
			defer func() { err = join(err, l.Release()) }()
			return fn(l.Context())
		},
		[]string{"open", tryQuery}, []string{unlockQuery}, []string{unlockQuery},
	},
	{
		"WithConnLock", func(ctx context.Context, db *sql.DB, key Key, fn func(context.Context) error, opts ...Option) error {
			return WithConnLock(ctx, db, key, func(ctx context.Context, _ *sql.Conn) error { return fn(ctx) }, opts...)
		},
		[]string{"open", tryQuery}, []string{unlockExposedQuery}, []string{unlockExposedQuery},
	},
	{
		"WithTxLock", func(ctx context.Context, db *sql.DB, key Key, fn func(context.Context) error, opts ...Option) error {
			return WithTxLock(ctx, db, key, func(ctx context.Context, _ *sql.Tx) error { return fn(ctx) }, opts...)
		},
		[]string{"open", "BEGIN", tryTxQuery}, []string{"COMMIT"}, []string{"ROLLBACK"},
	},
	{
		"WithTxLock at REPEATABLE READ", func(ctx context.Context, db *sql.DB, key Key, fn func(context.Context) error, opts ...Option) error {
			opts = append(opts, TxOptions(&sql.TxOptions{Isolation: sql.LevelRepeatableRead}))
			return WithTxLock(ctx, db, key, func(ctx context.Context, _ *sql.Tx) error { return fn(ctx) }, opts...)
		},
		[]string{"open", tryQuery, "BEGIN REPEATABLE READ"}, []string{"COMMIT", unlockQuery}, []string{"ROLLBACK", unlockQuery},
	},
}

// The functions that wait in the server's queue: closures, and AcquireConn, with the ReleaseConn
// that belongs to it.
func waiters() []struct {
	name string
	run  runs
} {
	var all []struct {
		name string
		run  runs
	}
	for _, c := range closures {
		all = append(all, struct {
			name string
			run  runs
		}{c.name, c.run})
	}
	return append(all, struct {
		name string
		run  runs
	}{"AcquireConn", func(ctx context.Context, db *sql.DB, key Key, fn func(context.Context) error, opts ...Option) error {
		conn, err := db.Conn(ctx)
		if err != nil {
			return acquireError(ctx, []Key{key}, new(config), err)
		}
		// Close waits for the statement that AcquireConn has left, and that on a lock of database/sql's.
		defer func() { time.AfterFunc(sliceMax+session.Grace, func() { _ = conn.Close() }) }()
		if err := AcquireConn(ctx, conn, key, opts...); err != nil {
			return err
		}
		return join(fn(ctx), ReleaseConn(ctx, conn, key))
	}})
}

type runs = func(ctx context.Context, db *sql.DB, key Key, fn func(context.Context) error, opts ...Option) error

func withConnLock(ctx context.Context, db *sql.DB, opts ...Option) error {
	return WithConnLock(ctx, db, key, func(context.Context, *sql.Conn) error { return nil }, opts...)
}

// take acquires key k, and fails the test if it cannot.
func take(t *testing.T, db *sql.DB, k Key, opts ...Option) *Lock {
	t.Helper()
	l, err := Acquire(t.Context(), db, k, opts...)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// holdFor holds k for d.
func holdFor(t *testing.T, db *sql.DB, k Key, d time.Duration, opts ...Option) {
	l, err := Acquire(t.Context(), db, k, opts...)
	wantError(t, err)
	time.AfterFunc(d, func() { _ = l.Release() })
}

// idle fills db's pool with n idle connections.
func idle(t *testing.T, db *sql.DB, n int) {
	t.Helper()
	db.SetMaxIdleConns(n)
	var conns []*sql.Conn
	for range n {
		conn, err := db.Conn(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		conns = append(conns, conn)
	}
	for _, conn := range conns {
		if err := conn.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

// bubble runs a subtest in virtual time.
func bubble(t *testing.T, name string, f func(*testing.T)) {
	t.Helper()
	t.Run(name, func(t *testing.T) { synctest.Test(t, f) })
}

// wantTook reports it if the time since start is not from least to most.
func wantTook(t testing.TB, start time.Time, least, most time.Duration) {
	t.Helper()
	if d := time.Since(start); d < least || d > most {
		t.Errorf("after %v, want %v to %v", d, least, most)
	}
}

// wantPanic reports it if f does not panic with value.
func wantPanic(t testing.TB, value any, f func()) {
	t.Helper()
	defer func() {
		t.Helper()
		if r := recover(); r != value {
			t.Errorf("recovered %v, want %v", r, value)
		}
	}()
	f()
}

// borrow takes a connection out of db, until the end of the test or until it is closed.
func borrow(t testing.TB, db *sql.DB) *sql.Conn {
	t.Helper()
	conn, err := db.Conn(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return conn
}

// each calls f for all of keys at once, and returns when they have returned.
func each(keys []Key, f func(k Key)) {
	var wg sync.WaitGroup
	for _, k := range keys {
		wg.Go(func() { f(k) })
	}
	wg.Wait()
}

// wantError checks that err matches every error among wants and contains every
// string, and that it matches none of the package's errors that is not among them.
// No wants: no error.
func wantError(t testing.TB, err error, wants ...any) {
	t.Helper()
	if (err == nil) != (len(wants) == 0) {
		t.Errorf("error: %v, want %v", err, wants)
		return
	}
	if err == nil {
		return
	}
	expected := map[error]bool{}
	for _, want := range wants {
		switch want := want.(type) {
		case string:
			if !strings.Contains(err.Error(), want) {
				t.Errorf("error %q does not say %q", err, want)
			}
		case error:
			expected[want] = true
			if !errors.Is(err, want) {
				t.Errorf("error %q does not match %q", err, want)
			}
		default:
			t.Fatalf("%T", want)
		}
	}
	if expected[ErrHeld] {
		expected[ErrNotAcquired] = true
	}
	for _, sentinel := range []error{ErrNotAcquired, ErrHeld, ErrLost, ErrReentrant, ErrDeadlock} {
		if !expected[sentinel] && errors.Is(err, sentinel) {
			t.Errorf("error %q matches %q", err, sentinel)
		}
	}
}

// wantIdle reports whatever a manager has kept although nobody uses it.
func wantIdle(t testing.TB, db *sql.DB) {
	t.Helper()
	kept := describe(db)
	// The last one may have its answer before the session has been handed back.
	for range 1000 {
		if kept == "" && db.Stats().InUse == 0 {
			return
		}
		time.Sleep(time.Millisecond)
		kept = describe(db)
	}
	t.Errorf("the manager has kept %q, and %d connections are not handed back", kept, db.Stats().InUse)
}

// describe says what a manager is about.
func describe(db *sql.DB) string { return manager.For(db).String() }

// mostPerSecond checks that in no second there are more than most of at.
func mostPerSecond(t *testing.T, at []time.Duration, most int) {
	t.Helper()
	for i := range at {
		if j := i + most; j < len(at) && at[j]-at[i] < time.Second {
			t.Errorf("%d statements from %v to %v", most+1, at[i], at[j])
			return
		}
	}
}

func count(lines []string, part string) (n int) {
	for _, l := range lines {
		if strings.Contains(l, part) {
			n++
		}
	}
	return n
}

// logBuffer is what a Logger was given, as text.
type logBuffer struct {
	mu sync.Mutex
	b  strings.Builder
}

func (b *logBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *logBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

func (b *logBuffer) option() Option {
	return Logger(slog.New(slog.NewTextHandler(b, nil)))
}
