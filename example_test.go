package advisory_test

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"log"
	"log/slog"
	"os"
	"time"

	"github.com/pgadvisory/advisory"
)

func buildReport(context.Context) error { return nil }

func ExampleWithLock() {
	key := advisory.Name("nightly-report")
	err := advisory.WithLock(ctx, db, key, func(ctx context.Context) error {
		// Of all processes, only this one is here. ctx ends if the lock is lost.
		fmt.Println("building the report")
		return buildReport(ctx)
	})
	if err != nil {
		log.Fatal(err)
	}
	// Output: building the report
}

// Skip the work if another process is at it.
func ExampleWithLock_noWait() {
	err := advisory.WithLock(ctx, db, advisory.Name("sweep-tokens"), func(ctx context.Context) error {
		fmt.Println("sweeping")
		return nil
	}, advisory.NoWait())
	switch {
	case errors.Is(err, advisory.ErrHeld):
		fmt.Println("another process sweeps")
	case err != nil && ctx.Err() == nil: // otherwise this process shuts down
		log.Fatal(err)
	}
	// Output: sweeping
}

// Of nested locks, the Error tells which was refused.
func ExampleError() {
	account, ledger := advisory.Pair(1, 42), advisory.Name("ledger")
	err := advisory.WithLock(ctx, db, account, func(ctx context.Context) error {
		// Another program holds this one.
		return advisory.WithLock(ctx, takenDB, ledger, func(ctx context.Context) error {
			return nil
		}, advisory.NoWait())
	}, advisory.NoWait())
	var e *advisory.Error
	if errors.Is(err, advisory.ErrHeld) && errors.As(err, &e) && e.Keys[0] == ledger {
		fmt.Println("the ledger is in use")
	}
	// Output: the ledger is in use
}

// A caller who names the same locks in another order does not deadlock with this one.
func ExampleWithLocks() {
	from, to := advisory.Pair(1, 42), advisory.Pair(1, 7)
	err := advisory.WithLocks(ctx, db, []advisory.Key{from, to}, func(ctx context.Context) error {
		fmt.Println("moving between two accounts")
		return nil
	})
	fmt.Println(err)
	// Output:
	// moving between two accounts
	// <nil>
}

func ExampleAcquire() {
	lock, err := advisory.Acquire(ctx, db, advisory.Name("import"), advisory.Timeout(5*time.Second))
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println("holding", lock.Key())

	// Work under lock.Context(), which ends if the lock is lost.

	if err := lock.Release(); err != nil {
		log.Fatal(err) // errors.Is(err, advisory.ErrLost): it may not have been ours to the end
	}
	// Output: holding import (bigint -2791398027664323193)
}

func ExampleLock_Context() {
	lock, err := advisory.Acquire(ctx, db, advisory.Name("import"))
	if err != nil {
		log.Fatal(err)
	}
	work := lock.Context()
	lock.Release()
	<-work.Done()
	fmt.Println("lost:", errors.Is(context.Cause(work), advisory.ErrLost))
	// Output: lost: false
}

func ExampleLock_Key() {
	lock, err := advisory.Acquire(ctx, db, advisory.ID(8675309))
	if err != nil {
		log.Fatal(err)
	}
	defer lock.Release()
	fmt.Println(lock.Key())
	// Output: bigint 8675309
}

func ExampleLock_Token() {
	lock, err := advisory.Acquire(ctx, db, advisory.Name("import"))
	if err != nil {
		log.Fatal(err)
	}
	defer lock.Release()
	token, err := lock.Token(ctx)
	fmt.Println(token, err)
	// Output: 4711 <nil>
}

func ExampleLock_Release() {
	lock, err := advisory.Acquire(ctx, db, advisory.Name("import"))
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(lock.Release())
	fmt.Println(lock.Release()) // the same answer again
	// Output:
	// <nil>
	// <nil>
}

// The table remembers the largest token that it has seen and refuses a smaller one: a
// holder that lost its lock without knowing it cannot overwrite its successor's work.
func ExampleToken() {
	err := advisory.WithLock(ctx, db, advisory.Name("report"), func(ctx context.Context) error {
		token, err := advisory.Token(ctx)
		if err != nil {
			return err
		}
		res, err := db.ExecContext(ctx,
			`UPDATE report SET body = $1, token = $2 WHERE id = 1 AND token <= $2`, "…", token)
		if err != nil {
			return err
		}
		if n, err := res.RowsAffected(); err != nil || n == 0 {
			return errors.Join(err, errors.New("a later holder has written"))
		}
		fmt.Println("written")
		return nil
	})
	fmt.Println(err)
	// Output:
	// written
	// <nil>
}

// Migrations run on the session that holds the lock: they cannot go on without it.
// CREATE INDEX CONCURRENTLY does not deadlock with those who wait.
func ExampleWithConnLock() {
	err := advisory.WithConnLock(ctx, db, advisory.Name("migrations"), func(ctx context.Context, conn *sql.Conn) error {
		_, err := conn.ExecContext(ctx, `CREATE INDEX CONCURRENTLY IF NOT EXISTS users_email ON users (email)`)
		return err
	})
	fmt.Println(err)
	// Output: <nil>
}

func ExampleAcquireConn() {
	conn, err := db.Conn(ctx)
	if err != nil {
		log.Fatal(err)
	}
	defer conn.Close()

	key := advisory.Name("migrations")
	if err := advisory.AcquireConn(ctx, conn, key); err != nil {
		log.Fatal(err)
	}
	fmt.Println("migrating")
	if err := advisory.ReleaseConn(ctx, conn, key); err != nil {
		log.Fatal(err)
	}
	// Output: migrating
}

func ExampleReleaseConn() {
	conn, err := db.Conn(ctx)
	if err != nil {
		log.Fatal(err)
	}
	defer conn.Close()

	key := advisory.ID(7)
	if err := advisory.AcquireConn(ctx, conn, key, advisory.Shared()); err != nil {
		log.Fatal(err)
	}
	// A shared lock is released as a shared lock.
	fmt.Println(advisory.ReleaseConn(ctx, conn, key, advisory.Shared()))
	// Output: <nil>
}

// The lock and the work end together, with COMMIT. It works behind a transaction pooler.
func ExampleWithTxLock() {
	err := advisory.WithTxLock(ctx, db, advisory.Name("invoice-numbers"), func(ctx context.Context, tx *sql.Tx) error {
		_, err := tx.ExecContext(ctx, `UPDATE counter SET n = n + 1 WHERE name = 'invoice'`)
		return err
	}, advisory.TxOptions(&sql.TxOptions{Isolation: sql.LevelSerializable}))
	fmt.Println(err)
	// Output: <nil>
}

func ExampleAcquireTx() {
	tx, err := db.BeginTx(ctx, nil)
	if err != nil {
		log.Fatal(err)
	}
	defer tx.Rollback()

	err = advisory.AcquireTx(ctx, tx, advisory.Name("invoice-numbers"), advisory.NoWait())
	if errors.Is(err, advisory.ErrHeld) {
		return // tx is still usable
	}
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(tx.Commit()) // releases the lock
	// Output: <nil>
}

// At program start: does a lock through this db exclude anybody?
func ExampleCheck() {
	if err := advisory.Check(ctx, db); err != nil {
		log.Fatal(err) // says what is wrong, and what to do
	}
	fmt.Println("locks exclude")
	// Output: locks exclude
}

func ExampleID() {
	fmt.Println(advisory.ID(8675309).SQL())
	// Output: 8675309
}

func ExamplePair() {
	const tenantClass = 7
	fmt.Println(advisory.Pair(tenantClass, 42).SQL())
	// Output: 7, 42
}

func ExampleName() {
	fmt.Println(advisory.Name("nightly-report"))
	// Output: nightly-report (bigint 7440995589958059143)
}

// Another program runs SELECT pg_advisory_lock(hashtext('nightly-report')).
func ExampleHashText() {
	fmt.Println(advisory.HashText("nightly-report"))
	// Output: nightly-report (bigint 759228614)
}

func ExampleKey_SQL() {
	key := advisory.Name("nightly-report")
	fmt.Printf("SELECT pg_try_advisory_lock(%s)\n", key.SQL())
	// Output: SELECT pg_try_advisory_lock(7440995589958059143)
}

func ExampleKey_String() {
	fmt.Println(advisory.Name("nightly-report"))
	fmt.Println(advisory.ID(7))
	fmt.Println(advisory.Pair(7, 42))
	// Output:
	// nightly-report (bigint 7440995589958059143)
	// bigint 7
	// pair (7, 42)
}

func ExampleShared() {
	err := advisory.WithLock(ctx, db, advisory.Name("catalog"), func(ctx context.Context) error {
		fmt.Println("reading, beside other readers")
		return nil
	}, advisory.Shared())
	fmt.Println(err)
	// Output:
	// reading, beside other readers
	// <nil>
}

func ExampleNoWait() {
	key := advisory.Name("sweep-tokens")
	lock, err := advisory.Acquire(ctx, db, key)
	if err != nil {
		log.Fatal(err)
	}
	defer lock.Release()

	_, err = advisory.Acquire(ctx, db, key, advisory.NoWait())
	fmt.Println(errors.Is(err, advisory.ErrHeld))
	// Output: true
}

// The error names who holds the lock.
func ExampleTimeout() {
	db := takenDB // another program holds the lock
	_, err := advisory.Acquire(ctx, db, advisory.Name("import"), advisory.Timeout(20*time.Millisecond))
	fmt.Println(err)
	// Output: advisory: acquire import: not acquired within 20ms: held by pid 4711 (app "billing", 10.0.0.7) [bigint -2791398027664323193]
}

// Each replica calls tick every five minutes, by its own clock. The job is over in no time, and runs
// once.
func ExampleAtLeast() {
	tick := func(db *sql.DB) error {
		return advisory.WithLock(ctx, db, advisory.Name("sweep-tokens"), func(context.Context) error {
			fmt.Println("sweeping")
			return nil
		}, advisory.NoWait(), advisory.AtLeast(time.Minute)) // the clocks differ by less
	}
	fmt.Println(tick(firstDB))
	fmt.Println(errors.Is(tick(lateDB), advisory.ErrHeld))
	// Output:
	// sweeping
	// <nil>
	// true
}

// A loss is noticed after 400 ms at the latest.
func ExampleHeartbeat() {
	err := advisory.WithLock(ctx, db, advisory.Name("webhooks"), func(ctx context.Context) error {
		fmt.Println("delivering")
		return nil
	}, advisory.Heartbeat(200*time.Millisecond))
	fmt.Println(err)
	// Output:
	// delivering
	// <nil>
}

// Everything is read as of one moment, and that is after the lock was granted.
func ExampleTxOptions() {
	err := advisory.WithTxLock(ctx, db, advisory.Name("balance"), func(ctx context.Context, tx *sql.Tx) error {
		_, err := tx.ExecContext(ctx, `INSERT INTO balance SELECT account, sum(amount) FROM entry GROUP BY account`)
		return err
	}, advisory.TxOptions(&sql.TxOptions{Isolation: sql.LevelRepeatableRead}))
	fmt.Println(err)
	// Output: <nil>
}

func ExampleHolderTimeout() {
	err := advisory.WithLock(ctx, db, advisory.Name("webhooks"), func(ctx context.Context) error {
		fmt.Println("if this machine loses power, another takes over after 6 s")
		return nil
	}, advisory.Heartbeat(2*time.Second), advisory.HolderTimeout(6*time.Second))
	fmt.Println(err)
	// Output:
	// if this machine loses power, another takes over after 6 s
	// <nil>
}

func ExampleLogger() {
	logger := slog.New(slog.NewTextHandler(os.Stderr, nil))
	err := advisory.WithLock(ctx, db, advisory.ID(1), func(context.Context) error { return nil }, advisory.Logger(logger))
	fmt.Println(err)
	// Output: <nil>
}

func ExampleHolders() {
	holders, err := advisory.Holders(ctx, db, advisory.Name("nightly-report"))
	if err != nil {
		log.Fatal(err)
	}
	for _, h := range holders {
		if h.Granted {
			fmt.Println("held by", h.PID, h.ApplicationName)
		} else {
			fmt.Println("waiting:", h.PID, h.ApplicationName)
		}
	}
	// Output: held by 4711 billing
}

func ExampleLocks() {
	locks, err := advisory.Locks(ctx, db)
	if err != nil {
		log.Fatal(err)
	}
	for _, l := range locks {
		fmt.Println(l.Key)
		for _, h := range l.Holders {
			fmt.Println("  held by", h.PID, h.ApplicationName)
		}
		for _, h := range l.Waiters {
			fmt.Println("  waiting:", h.PID, h.ApplicationName, "since", h.WaitStart)
		}
	}
	// Output:
	// nightly-report (bigint 7440995589958059143)
	//   held by 4711 billing
}

func ExampleObserve() {
	observer := &advisory.Observer{
		AcquireEnd: func(_ context.Context, lock advisory.LockInfo, took time.Duration, err error) {
			fmt.Println("acquired", lock.Keys[0], "by", lock.Function, err)
		},
		HoldEnd: func(_ context.Context, lock advisory.LockInfo, held time.Duration, err error) {
			fmt.Println("released", lock.Keys[0], err)
		},
	}
	err := advisory.WithLock(ctx, db, advisory.ID(7), func(context.Context) error { return nil }, advisory.Observe(observer))
	fmt.Println(err)
	// Output:
	// acquired bigint 7 by WithLock <nil>
	// released bigint 7 <nil>
	// <nil>
}

// What goose does with it.
func ExampleNewSessionLocker() {
	locker := advisory.NewSessionLocker(advisory.Name("migrations"), advisory.Timeout(time.Minute))
	// goose.NewProvider(goose.DialectPostgres, db, migrations, goose.WithSessionLocker(locker))

	conn, err := db.Conn(ctx)
	if err != nil {
		log.Fatal(err)
	}
	defer conn.Close()
	fmt.Println(locker.SessionLock(ctx, conn))
	fmt.Println(locker.SessionUnlock(ctx, conn))
	// Output:
	// <nil>
	// <nil>
}

func ExampleSessionLocker_SessionLock() {
	conn, err := db.Conn(ctx)
	if err != nil {
		log.Fatal(err)
	}
	defer conn.Close()

	locker := advisory.NewSessionLocker(advisory.Name("migrations"))
	if err := locker.SessionLock(ctx, conn); err != nil {
		log.Fatal(err)
	}
	defer locker.SessionUnlock(ctx, conn)
	fmt.Println("migrating")
	// Output: migrating
}

func ExampleSessionLocker_SessionUnlock() {
	conn, err := db.Conn(ctx)
	if err != nil {
		log.Fatal(err)
	}
	defer conn.Close()

	locker := advisory.NewSessionLocker(advisory.Name("migrations"))
	if err := locker.SessionLock(ctx, conn); err != nil {
		log.Fatal(err)
	}
	fmt.Println(locker.SessionUnlock(ctx, conn))
	// Output: <nil>
}
