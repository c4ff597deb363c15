package advisory

import (
	"context"
	"database/sql"
	"math"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// A target is what the functions are called on.
type target struct {
	db   *sql.DB
	conn *sql.Conn
	tx   *sql.Tx
}

// newTarget returns a target and its server. Whatever was sent to make it is in the
// log already.
func newTarget(t *testing.T) (target, *server) {
	t.Helper()
	db, srv := newServer(t)
	conn := borrow(t, db)
	tx, err := db.BeginTx(context.Background(), nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = tx.Rollback()
		_ = conn.Close()
	})
	return target{db, conn, tx}, srv
}

var (
	noCtx context.Context
	noFn  func(context.Context) error
)

// The functions that take options, and which.
var functions = []struct {
	name    string
	options string
	op      string // as errors have it
	call    func(ctx context.Context, on target, key Key, opts ...Option) error
}{
	{"WithLock", "Shared NoWait Timeout AtLeast Heartbeat HolderTimeout Logger Observe", "acquire", func(ctx context.Context, on target, key Key, opts ...Option) error {
		return WithLock(ctx, on.db, key, nothing, opts...)
	}},
	{"WithLocks", "Shared NoWait Timeout AtLeast Heartbeat HolderTimeout Logger Observe", "acquire", func(ctx context.Context, on target, key Key, opts ...Option) error {
		return WithLocks(ctx, on.db, []Key{ID(1), key}, nothing, opts...)
	}},
	{"Acquire", "Shared NoWait Timeout AtLeast Heartbeat HolderTimeout Logger Observe", "acquire", func(ctx context.Context, on target, key Key, opts ...Option) error {
		l, err := Acquire(ctx, on.db, key, opts...)
		if err != nil {
			return err
		}
		return l.Release()
	}},
	{"WithConnLock", "Shared NoWait Timeout HolderTimeout Logger Observe", "acquire", func(ctx context.Context, on target, key Key, opts ...Option) error {
		return WithConnLock(ctx, on.db, key, func(context.Context, *sql.Conn) error { return nil }, opts...)
	}},
	{"AcquireConn", "Shared NoWait Timeout Logger Observe", "acquire", func(ctx context.Context, on target, key Key, opts ...Option) error {
		return AcquireConn(ctx, on.conn, key, opts...)
	}},
	{"ReleaseConn", "Shared Logger", "release", func(ctx context.Context, on target, key Key, opts ...Option) error {
		return ReleaseConn(ctx, on.conn, key, opts...)
	}},
	{"WithTxLock", "Shared NoWait Timeout HolderTimeout TxOptions Logger Observe", "acquire", func(ctx context.Context, on target, key Key, opts ...Option) error {
		return WithTxLock(ctx, on.db, key, func(context.Context, *sql.Tx) error { return nil }, opts...)
	}},
	{"AcquireTx", "Shared NoWait Timeout Logger Observe", "acquire", func(ctx context.Context, on target, key Key, opts ...Option) error {
		return AcquireTx(ctx, on.tx, key, opts...)
	}},
	{"Lead", "Heartbeat HolderTimeout Logger Observe", "acquire", func(ctx context.Context, on target, key Key, opts ...Option) error {
		return Lead(ctx, on.db, key, nothing, opts...)
	}},
}

func TestNonsenseIsRefusedBeforeAnythingIsSent(t *testing.T) {
	t.Parallel()
	type nonsense struct {
		name  string
		key   Key
		opts  []Option
		needs string // only for functions that take this
		says  string
	}
	tests := []nonsense{
		{"the zero Key", Key{}, nil, "", "zero Key"},
		{"an empty name", Name(""), nil, "", `Name("")`},
		{"a nil Option", key, []Option{nil}, "", "nil Option"},
		{"a nil Option among others", key, []Option{Shared(), nil}, "", "nil Option"},
		{"NoWait with Timeout", key, []Option{NoWait(), Timeout(time.Second)}, "NoWait", "NoWait and Timeout"},
		{"Timeout with NoWait", key, []Option{Timeout(time.Second), NoWait()}, "NoWait", "NoWait and Timeout"},
		{"Timeout 0", key, []Option{Timeout(0)}, "Timeout", "Timeout: 0s is not positive"},
		{"Timeout negative", key, []Option{Timeout(-time.Second)}, "Timeout", "Timeout: -1s is not positive"},
		{"AtLeast negative", key, []Option{AtLeast(-time.Second)}, "AtLeast", "AtLeast: -1s is negative"},
		{"Heartbeat 0", key, []Option{Heartbeat(0)}, "Heartbeat", "Heartbeat: 0s is not positive"},
		{"Heartbeat negative", key, []Option{Heartbeat(-1)}, "Heartbeat", "Heartbeat: -1ns is not positive"},
		{"HolderTimeout 0", key, []Option{HolderTimeout(0)}, "HolderTimeout", "HolderTimeout: 0s is not positive"},
		{"HolderTimeout negative", key, []Option{HolderTimeout(-time.Minute)}, "HolderTimeout", "HolderTimeout: -1m0s is not positive"},
		{
			"HolderTimeout under three default heartbeats", key, []Option{HolderTimeout(3*time.Second - 1)},
			"Heartbeat", "HolderTimeout: 2.999999999s is under three heartbeats of 1s (the default)",
		},
		{
			"HolderTimeout under three heartbeats", key, []Option{HolderTimeout(time.Minute), Heartbeat(21 * time.Second)},
			"Heartbeat", "HolderTimeout: 1m0s is under three heartbeats of 21s",
		},
		{
			"the default HolderTimeout under three heartbeats", key, []Option{Heartbeat(6 * time.Second)},
			"Heartbeat", "HolderTimeout: 15s (the default) is under three heartbeats of 6s",
		},
		{
			"three heartbeats overflow", key, []Option{Heartbeat(math.MaxInt64)},
			"Heartbeat", "HolderTimeout: 15s (the default) is under three heartbeats of ",
		},
		{
			"HolderTimeout over PostgreSQL's int", key, []Option{HolderTimeout(math.MaxInt32*time.Millisecond + 1)},
			"HolderTimeout", "HolderTimeout: 596h31m23.647000001s is more than PostgreSQL's limit",
		},
	}
	for _, o := range []struct {
		name   string
		option Option
	}{
		{"Shared", Shared()},
		{"NoWait", NoWait()},
		{"Timeout", Timeout(time.Second)},
		{"AtLeast", AtLeast(0)},
		{"Heartbeat", Heartbeat(time.Second)},
		{"HolderTimeout", HolderTimeout(time.Minute)},
		{"TxOptions", TxOptions(nil)},
		{"Logger", Logger(nil)},
		{"Observe", Observe(nil)},
	} {
		tests = append(tests, nonsense{o.name + " where it does not apply", key, []Option{o.option}, "!" + o.name, "option " + o.name + " does not apply to "})
		// And does apply elsewhere.
		for _, f := range functions {
			if takes(f.options, o.name) {
				on, _ := newTarget(t)
				if err := f.call(t.Context(), on, key, o.option); err != nil {
					t.Errorf("%s with %s: %v", f.name, o.name, err)
				}
			}
		}
	}
	for _, f := range functions {
		t.Run(f.name, func(t *testing.T) {
			t.Parallel()
			on, srv := newTarget(t)
			sent := srv.lines()
			wantError(t, f.call(noCtx, on, key), "advisory: "+f.op+" ", "nil ctx")
			for _, test := range tests {
				if not, ok := strings.CutPrefix(test.needs, "!"); ok && takes(f.options, not) || !ok && !takes(f.options, test.needs) {
					continue
				}
				err := f.call(t.Context(), on, test.key, test.opts...)
				if err == nil {
					t.Errorf("%s: no error", test.name)
					continue
				}
				wantError(t, err, "advisory: "+f.op+" ", test.says)
				if strings.HasPrefix(test.needs, "!") {
					wantError(t, err, "does not apply to "+f.name)
				}
			}
			srv.want(t, sent...)
		})
	}
}

func takes(options, name string) bool {
	return name == "" || strings.Contains(" "+options+" ", " "+name+" ")
}

func TestNilArgumentsAndNoKeysAreRefused(t *testing.T) {
	t.Parallel()
	on, srv := newTarget(t)
	sent := srv.lines()
	ctx := t.Context()
	_, acquireErr := Acquire(ctx, nil, key)
	for _, test := range []struct {
		err  error
		says string
	}{
		{WithLock(ctx, nil, key, nothing), "acquire bigint 42: nil db"},
		{WithLock(ctx, on.db, key, nil), "acquire bigint 42: nil fn"},
		{WithLock(ctx, nil, key, noFn), "acquire bigint 42: nil db"},
		{WithLocks(ctx, nil, []Key{key}, nothing), "acquire bigint 42: nil db"},
		{WithLocks(ctx, on.db, []Key{key}, nil), "acquire bigint 42: nil fn"},
		{WithLocks(ctx, on.db, nil, nothing), "acquire: no keys"},
		{WithLocks(ctx, on.db, []Key{}, nothing), "acquire: no keys"},
		{WithLocks(ctx, on.db, []Key{ID(1), {}}, nothing), "zero Key"},
		{acquireErr, "acquire bigint 42: nil db"},
		{WithConnLock(ctx, nil, key, func(context.Context, *sql.Conn) error { return nil }), "acquire bigint 42: nil db"},
		{WithConnLock(ctx, on.db, key, nil), "acquire bigint 42: nil fn"},
		{AcquireConn(ctx, nil, key), "acquire bigint 42: nil conn"},
		{ReleaseConn(ctx, nil, key), "release bigint 42: nil conn"},
		{WithTxLock(ctx, nil, key, func(context.Context, *sql.Tx) error { return nil }), "acquire bigint 42: nil db"},
		{WithTxLock(ctx, on.db, key, nil), "acquire bigint 42: nil fn"},
		{AcquireTx(ctx, nil, key), "acquire bigint 42: nil tx"},
		{Lead(ctx, nil, key, nothing), "acquire bigint 42: nil db"},
		{Lead(ctx, on.db, key, nil), "acquire bigint 42: nil fn"},
		{holdersErr(ctx, nil, key), "look up bigint 42: nil q"},
		{holdersErr(ctx, (*sql.DB)(nil), key), "look up bigint 42: nil q"},
		{holdersErr(ctx, (*sql.Conn)(nil), key), "look up bigint 42: nil q"},
		{holdersErr(ctx, (*sql.Tx)(nil), key), "look up bigint 42: nil q"},
		{holdersErr(ctx, on.db, Key{}), "look up invalid key: the zero Key"},
		{holdersErr(noCtx, on.db, key), "look up bigint 42: nil ctx"},
		{locksErr(ctx, nil), "look up locks: nil q"},
		{locksErr(ctx, (*sql.Tx)(nil)), "look up locks: nil q"},
		{locksErr(noCtx, on.db), "look up locks: nil ctx"},
	} {
		wantError(t, test.err, test.says)
	}
	srv.want(t, sent...)
}

func holdersErr(ctx context.Context, q Querier, key Key) error {
	_, err := Holders(ctx, q, key)
	return err
}

func locksErr(ctx context.Context, q Querier) error {
	_, err := Locks(ctx, q)
	return err
}

func TestNonsenseMakesNoConnection(t *testing.T) {
	t.Parallel()
	for _, c := range closures {
		db, srv := newServer(t)
		wantError(t, c.run(t.Context(), db, Key{}, nothing), "zero Key")
		wantError(t, c.run(t.Context(), db, key, nothing, Timeout(-1)), "Timeout")
		srv.want(t)
	}
}

func TestTheLastOfARepeatedOptionCounts(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		db, srv := newServer(t)
		srv.script = func(context.Context, int, string) (int64, error) {
			time.Sleep(2 * time.Second)
			return 0, nil
		}
		wantError(t, WithLock(t.Context(), db, key, nothing, Timeout(time.Hour), Timeout(time.Second)), ErrNotAcquired, "within 1s")
		time.Sleep(time.Minute) // until the driver has returned
	})
}

// The server counts in milliseconds, and 0 would be no limit at all.
func TestTimesAreSentInMillisecondsRoundedUp(t *testing.T) {
	t.Parallel()
	for d, want := range map[time.Duration]string{
		1:                                "1",
		time.Millisecond:                 "1",
		time.Millisecond + 1:             "2",
		math.MaxInt32 * time.Millisecond: "2147483647",
	} {
		db, srv := newServer(t)
		wantError(t, WithConnLock(t.Context(), db, key, func(context.Context, *sql.Conn) error { return nil }, HolderTimeout(d)))
		srv.want(t, on(1, "open", strings.ReplaceAll(tryExposedQuery, "60000", want), disarmExposedQuery+unlockExposedQuery)...)
	}
}

func TestAnIsolationLevelThatPostgreSQLHasNotIsNonsense(t *testing.T) {
	t.Parallel()
	for _, level := range []sql.IsolationLevel{sql.LevelWriteCommitted, sql.LevelSnapshot, sql.LevelLinearizable, 99, -1} {
		db, srv := newServer(t)
		wantError(t, WithTxLock(t.Context(), db, key, noTx, isolation(level)), "option TxOptions: PostgreSQL has no isolation level "+level.String())
		srv.want(t)
	}
}
