package integration

import (
	"context"
	"database/sql"
	"errors"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/pgadvisory/advisory"
)

// What ends a wait does not end the caller's transaction.
func TestRefusedAcquireTxLeavesTheTransactionAlive(t *testing.T) {
	t.Parallel()
	eachDriver(t, func(t *testing.T, d driver) {
		db := d.open(t, server.DSN())
		for _, test := range txRefusals {
			t.Run(test.name, func(t *testing.T) { test.run(t, db) })
		}
	})
}

// A txRefusal is what ends a wait of AcquireTx.
type txRefusal struct {
	name string
	opts []advisory.Option
	ctx  func(t *testing.T, key advisory.Key) context.Context
	want []error
}

var txRefusals = []txRefusal{
	{
		name: "NoWait", want: []error{advisory.ErrNotAcquired},
		opts: []advisory.Option{advisory.NoWait()},
	},
	{
		name: "Timeout", want: []error{advisory.ErrNotAcquired},
		opts: []advisory.Option{advisory.Timeout(30 * time.Millisecond)},
	},
	{
		name: "ctx_cancelled_while_waiting", want: []error{advisory.ErrNotAcquired, context.Canceled},
		ctx: func(t *testing.T, key advisory.Key) context.Context {
			ctx, cancel := context.WithCancel(t.Context())
			go func() {
				defer cancel()
				waitForTriers(t, adminDB(t), key, 1)
			}()
			return ctx
		},
	},
	{
		name: "deadline_of_ctx", want: []error{advisory.ErrNotAcquired, context.DeadlineExceeded},
		ctx: func(t *testing.T, _ advisory.Key) context.Context {
			ctx, cancel := context.WithTimeout(t.Context(), 30*time.Millisecond)
			t.Cleanup(cancel)
			return ctx
		},
	},
	{
		name: "ctx_ended_before", want: []error{advisory.ErrNotAcquired, context.Canceled},
		ctx: func(t *testing.T, _ advisory.Key) context.Context {
			ctx, cancel := context.WithCancel(t.Context())
			cancel()
			return ctx
		},
	},
}

// run has AcquireTx refused in the middle of a transaction.
func (test txRefusal) run(t *testing.T, db *sql.DB) {
	key, c := testKey(t), newCounter(t, db)
	hold(t, adminDB(t), key)
	ctx := t.Context()
	if test.ctx != nil {
		ctx = test.ctx(t, key)
	}
	inTx(t, db, func(tx *sql.Tx) {
		if err := c.increment(t.Context(), tx); err != nil {
			t.Fatal(err)
		}
		err := advisory.AcquireTx(ctx, tx, key, test.opts...)
		for _, want := range test.want {
			if !errors.Is(err, want) {
				t.Errorf("error is %v, want %v", err, want)
			}
		}
		if err := c.increment(t.Context(), tx); err != nil {
			t.Errorf("the transaction after the refusal: %v", err)
		}
	})
	c.wantValue(t, db, 2)
	wantClean(t, db)
}

// A holds the row and wants the lock; B holds the lock and wants the row.
func TestDeadlockLeavesTheTransactionAlive(t *testing.T) {
	t.Parallel()
	eachDriver(t, func(t *testing.T, d driver) {
		t.Parallel()
		victim := d.open(t, withParams(t, server.DSN(), "deadlock_timeout", "20ms"))
		survivor := d.open(t, withParams(t, server.DSN(), "deadlock_timeout", "1min"))
		key, c := testKey(t), newCounter(t, victim)
		var others errgroup.Group
		inTx(t, victim, func(tx *sql.Tx) {
			if err := c.increment(t.Context(), tx); err != nil {
				t.Fatal(err)
			}
			locked := make(chan struct{})
			others.Go(func() error {
				return acquireTx.with(soon(t), survivor, key, func(ctx context.Context, q querier) error {
					close(locked)
					return c.increment(ctx, q)
				})
			})
			<-locked
			if err := advisory.AcquireTx(soon(t), tx, key); !errors.Is(err, advisory.ErrDeadlock) {
				t.Errorf("error is %v, want ErrDeadlock", err)
			}
			if err := c.increment(t.Context(), tx); err != nil {
				t.Errorf("the transaction after the deadlock: %v", err)
			}
		})
		if err := others.Wait(); err != nil {
			t.Error(err)
		}
	})
}

// The waiting sets lock_timeout. The statements that follow must not find it set.
func TestLockTimeoutIsTheCallersOwn(t *testing.T) {
	t.Parallel()
	tests := []lockTimeout{
		{name: "default", set: "SELECT 1", want: "0", wantAfter: "0"},
		{name: "of_the_transaction", set: "SET LOCAL lock_timeout = '1234ms'", want: "1234ms", wantAfter: "0"},
		{name: "of_the_session", dsn: []string{"lock_timeout", "4321ms"}, set: "SELECT 1", want: "4321ms", wantAfter: "4321ms"},
		{name: "set_in_the_transaction", set: "SET lock_timeout = '1234ms'", want: "1234ms", wantAfter: "1234ms"},
	}
	eachDriver(t, func(t *testing.T, d driver) {
		for _, test := range tests {
			t.Run(test.name, func(t *testing.T) { test.run(t, d) })
		}
		t.Run("WithTxLock", func(t *testing.T) {
			for lockTimeout, opts := range map[string][]advisory.Option{
				"0": nil, "4321ms": nil,
				"7s": {advisory.TxOptions(&sql.TxOptions{Isolation: sql.LevelSerializable})},
			} {
				testLockTimeoutOfWithTxLock(t, d, lockTimeout, opts)
			}
		})
	})
}

// A lockTimeout is a lock_timeout of the caller's.
type lockTimeout struct {
	name      string
	dsn       []string
	set       string // in the transaction
	want      string // in the transaction
	wantAfter string // on the session, after it
}

// run has AcquireTx refused, and then granted after a wait.
func (test lockTimeout) run(t *testing.T, d driver) {
	db := d.open(t, withParams(t, server.DSN(), test.dsn...))
	db.SetMaxOpenConns(1)
	key := testKey(t)
	release := hold(t, adminDB(t), key)

	inTx(t, db, func(tx *sql.Tx) {
		if _, err := tx.Exec(test.set); err != nil {
			t.Fatal(err)
		}
		for _, opt := range []advisory.Option{advisory.NoWait(), advisory.Timeout(20 * time.Millisecond)} {
			if err := advisory.AcquireTx(t.Context(), tx, key, opt); !errors.Is(err, advisory.ErrNotAcquired) {
				t.Errorf("error is %v, want ErrNotAcquired", err)
			}
			wantLockTimeout(t, tx, test.want)
		}
		go func() {
			defer release()
			waitForTriers(t, adminDB(t), key, 1)
		}()
		if err := advisory.AcquireTx(t.Context(), tx, key); err != nil {
			t.Error(err)
		}
		wantLockTimeout(t, tx, test.want)
	})
	wantLockTimeout(t, db, test.wantAfter)
}

// testLockTimeoutOfWithTxLock waits for a lock on a session with a lock_timeout.
func testLockTimeoutOfWithTxLock(t *testing.T, d driver, want string, opts []advisory.Option) {
	db := d.open(t, withParams(t, server.DSN(), "lock_timeout", want))
	db.SetMaxOpenConns(1)
	key := testKey(t)
	release := hold(t, adminDB(t), key)
	go func() {
		defer release()
		waitForWaiters(t, adminDB(t), key, 1)
	}()
	err := advisory.WithTxLock(t.Context(), db, key, func(_ context.Context, tx *sql.Tx) error {
		wantLockTimeout(t, tx, want)
		return nil
	}, opts...)
	if err != nil {
		t.Error(err)
	}
	wantLockTimeout(t, db, want)
}

func wantLockTimeout(t *testing.T, q querier, want string) {
	t.Helper()
	var got string
	if err := q.QueryRowContext(t.Context(), "SHOW lock_timeout").Scan(&got); err != nil || got != want {
		t.Errorf("lock_timeout is %q, want %q (%v)", got, want, err)
	}
}

// The lock statement of a transaction that reads one snapshot must not be what fixes
// the snapshot: it would be older than the lock.
func TestTransactionsUnderTheLockDoNotFailToSerialize(t *testing.T) {
	t.Parallel()
	const goroutines, transactions = 8, 200
	type test struct {
		name string
		dsn  []string
		opts []advisory.Option
	}
	var tests []test
	for _, level := range []sql.IsolationLevel{sql.LevelRepeatableRead, sql.LevelSerializable} {
		tests = append(tests,
			test{name: level.String(), opts: []advisory.Option{advisory.TxOptions(&sql.TxOptions{Isolation: level})}},
			test{name: level.String() + " by default", dsn: []string{"default_transaction_isolation", level.String()}},
		)
	}
	eachDriver(t, func(t *testing.T, d driver) {
		t.Parallel()
		for _, test := range tests {
			t.Run(test.name, func(t *testing.T) {
				dsn := withParams(t, server.DSN(), test.dsn...)
				pools := []*sql.DB{d.open(t, dsn), d.open(t, dsn)}
				key, c := testKey(t), newCounter(t, pools[0])
				each := d.rounds(transactions) / goroutines
				err := concurrently(goroutines, each, func(i int) error {
					return withTxLock.with(soon(t), pools[i%2], key, c.increment, test.opts...)
				})
				if err != nil {
					t.Error(err)
				}
				c.wantValue(t, pools[0], goroutines*each)
				wantClean(t, pools[0])
			})
		}
	})
}

// What the test above would see without the care that it tests: the lock is waited for
// in the transaction, and the transaction reads what was there before the wait.
func TestNaiveTransactionUnderTheLockFailsToSerialize(t *testing.T) {
	t.Parallel()
	allowLog(t, "ERROR:  could not serialize access")
	db := drivers[0].open(t, withParams(t, server.DSN(), "default_transaction_isolation", "repeatable read"))
	key, c := testKey(t), newCounter(t, db)
	naive := func(then func()) error {
		tx, err := db.Begin()
		if err != nil {
			return err
		}
		defer tx.Rollback()
		if _, err := tx.Exec("SELECT pg_advisory_xact_lock(" + key.SQL() + ")"); err != nil {
			return err
		}
		then()
		if err := c.increment(t.Context(), tx); err != nil {
			return err
		}
		return tx.Commit()
	}
	late := make(chan error, 1)
	err := naive(func() {
		go func() { late <- naive(func() {}) }()
		waitForWaiters(t, adminDB(t), key, 1)
	})
	if err != nil {
		t.Error(err)
	}
	if err := <-late; sqlState(err) != "40001" {
		t.Errorf("error is %v, want a serialization failure", err)
	}
}

// inTx runs f in a transaction that has a ctx of its own, and commits it.
func inTx(t *testing.T, db *sql.DB, f func(tx *sql.Tx)) {
	t.Helper()
	tx, err := db.Begin()
	if err != nil {
		t.Fatal(err)
	}
	defer tx.Rollback()
	f(tx)
	if err := tx.Commit(); err != nil {
		t.Errorf("commit: %v", err)
	}
}

// sqlState is the SQLSTATE of the server's error, or "".
func sqlState(err error) string {
	var s interface{ SQLState() string }
	if errors.As(err, &s) {
		return s.SQLState()
	}
	return ""
}
