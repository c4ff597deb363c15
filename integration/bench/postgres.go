package main

import (
	"context"
	"database/sql"
	"errors"

	"github.com/XSAM/otelsql"
	gooselock "github.com/pressly/goose/v3/lock"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"

	"github.com/pgadvisory/advisory"
)

// openPool opens a pool that stands for one process.
func openPool(driver, dsn string, size int) (*sql.DB, error) {
	return openPoolWith(sql.Open, driver, dsn, size)
}

// openTraced opens a connection whose driver is wrapped by otelsql. The spans are made, and go nowhere.
func openTraced(driver, dsn string) (*sql.DB, error) {
	return otelsql.Open(driver, dsn, otelsql.WithTracerProvider(sdktrace.NewTracerProvider()))
}

func openPoolWith(open func(driver, dsn string) (*sql.DB, error), driver, dsn string, size int) (*sql.DB, error) {
	db, err := open(registered[driver], dsn)
	if err != nil {
		return nil, err
	}
	db.SetMaxOpenConns(size)
	db.SetMaxIdleConns(size)
	return db, nil
}

// ourLocker is this package.
type ourLocker struct{ *sql.DB }

func (l ourLocker) worker(_ context.Context, key int64) (lockFunc, error) {
	k := advisory.ID(key)
	return func(ctx context.Context, body func(context.Context) error) error {
		return advisory.WithLock(ctx, l.DB, k, body)
	}, nil
}

// floorLocker does the least that a lock can cost on its own: two prepared statements, one
// round trip each, on a connection that is its goroutine's for good.
type floorLocker struct{ *sql.DB }

func (l floorLocker) worker(ctx context.Context, key int64) (lockFunc, error) {
	conn, err := l.Conn(ctx)
	if err != nil {
		return nil, err
	}
	lock, err1 := conn.PrepareContext(ctx, "SELECT WHERE pg_catalog.pg_try_advisory_lock($1)")
	unlock, err2 := conn.PrepareContext(ctx, "SELECT WHERE pg_catalog.pg_advisory_unlock($1)")
	if err := errors.Join(err1, err2); err != nil {
		return nil, err
	}
	return func(ctx context.Context, body func(context.Context) error) error {
		if err := mustAffectOne(lock.ExecContext(ctx, key)); err != nil {
			return err
		}
		if err := body(ctx); err != nil {
			return err
		}
		return mustAffectOne(unlock.ExecContext(ctx, key))
	}, nil
}

func mustAffectOne(r sql.Result, err error) error {
	if err != nil {
		return err
	}
	if n, err := r.RowsAffected(); n != 1 {
		return errors.Join(errors.New("refused"), err)
	}
	return nil
}

// recipeLocker is what people copy: a query with a parameter takes the lock, and another
// releases it. The copied one has each of them on whichever connection the pool gives
// out, so that it does not lock; here they are on the same one, taken from the pool for
// each lock. Nor does it sleep for 5 s between tries: where the lock is contended it
// waits in the server's queue, by pg_advisory_lock, which is the fastest that it could.
type recipeLocker struct {
	*sql.DB
	contended bool
}

func (l recipeLocker) worker(_ context.Context, key int64) (lockFunc, error) {
	return func(ctx context.Context, body func(context.Context) error) error {
		conn, err := l.Conn(ctx)
		if err != nil {
			return err
		}
		defer conn.Close()
		if l.contended {
			if _, err := conn.ExecContext(ctx, "SELECT pg_advisory_lock($1)", key); err != nil {
				return err
			}
		} else if err := mustBeTrue(conn.QueryRowContext(ctx, "SELECT pg_try_advisory_lock($1)", key)); err != nil {
			return err
		}
		if err := body(ctx); err != nil {
			return err
		}
		return mustBeTrue(conn.QueryRowContext(ctx, "SELECT pg_advisory_unlock($1)", key))
	}, nil
}

func mustBeTrue(row *sql.Row) error {
	var ok bool
	if err := row.Scan(&ok); err != nil {
		return err
	}
	if !ok {
		return errors.New("refused")
	}
	return nil
}

// gooseLocker is the session locker of goose.
type gooseLocker struct{ *sql.DB }

func (l gooseLocker) worker(_ context.Context, key int64) (lockFunc, error) {
	locker, err := gooselock.NewPostgresSessionLocker(gooselock.WithLockID(key))
	if err != nil {
		return nil, err
	}
	return func(ctx context.Context, body func(context.Context) error) error {
		conn, err := l.Conn(ctx)
		if err != nil {
			return err
		}
		defer conn.Close()
		if err := locker.SessionLock(ctx, conn); err != nil {
			return err
		}
		if err := body(ctx); err != nil {
			return err
		}
		return locker.SessionUnlock(ctx, conn)
	}, nil
}
