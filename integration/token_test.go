package integration

import (
	"context"
	"database/sql"
	"errors"
	"testing"

	"github.com/pgadvisory/advisory"
)

func TestTokenGrowsFromHolderToHolder(t *testing.T) {
	bothDrivers(t, func(t *testing.T, d driver) {
		pools := []*sql.DB{d.open(t, server.DSN()), d.open(t, server.DSN())}
		key := testKey(t)
		serializable := advisory.TxOptions(&sql.TxOptions{Isolation: sql.LevelSerializable})
		ways := []func(ctx context.Context, db *sql.DB, fn func(context.Context) error) error{
			func(ctx context.Context, db *sql.DB, fn func(context.Context) error) error {
				return advisory.WithLock(ctx, db, key, fn)
			},
			func(ctx context.Context, db *sql.DB, fn func(context.Context) error) error {
				return advisory.WithLocks(ctx, db, []advisory.Key{key, second(key)}, fn)
			},
			func(ctx context.Context, db *sql.DB, fn func(context.Context) error) error {
				return advisory.WithConnLock(ctx, db, key, func(ctx context.Context, _ *sql.Conn) error { return fn(ctx) })
			},
			func(ctx context.Context, db *sql.DB, fn func(context.Context) error) error {
				return advisory.WithTxLock(ctx, db, key, func(ctx context.Context, _ *sql.Tx) error { return fn(ctx) })
			},
			func(ctx context.Context, db *sql.DB, fn func(context.Context) error) error {
				return advisory.WithTxLock(ctx, db, key, func(ctx context.Context, _ *sql.Tx) error { return fn(ctx) }, serializable)
			},
			func(ctx context.Context, db *sql.DB, fn func(context.Context) error) error {
				lock, err := advisory.Acquire(ctx, db, key)
				if err != nil {
					return err
				}
				return errors.Join(fn(lock.Context()), lock.Release())
			},
		}
		last, handovers := int64(0), 0 // guarded by the lock
		if err := concurrently(len(ways), 20, func(i int) error {
			return ways[i](soon(t), pools[i%len(pools)], func(ctx context.Context) error {
				token, err := advisory.Token(ctx)
				if err != nil {
					return err
				}
				if token <= last {
					t.Errorf("token %d after %d", token, last)
				}
				last = token
				handovers++
				if again, err := advisory.Token(context.WithoutCancel(ctx)); err != nil || again != token {
					t.Errorf("asked again: %d, %v, want %d", again, err, token)
				}
				return nil
			})
		}); err != nil {
			t.Fatal(err)
		}
		if handovers < 100 {
			t.Errorf("%d handovers", handovers)
		}
	})
}

func TestTokenFencesOffAStaleWrite(t *testing.T) {
	bothDrivers(t, func(t *testing.T, d driver) {
		dsn := withParams(t, inDatabase(t), "application_name", appName(t))
		db := d.open(t, dsn)
		var counter fencedCounter
		counter.create(t, db)
		key := testKey(t)
		old, err := advisory.Acquire(t.Context(), db, key)
		if err != nil {
			t.Fatal(err)
		}
		stale, err := old.Token(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if err := counter.write(t.Context(), db, stale); err != nil {
			t.Fatal(err)
		}
		// The old holder is not told in time.
		if n := terminateHolders(t, appName(t)); n != 1 {
			t.Fatalf("%d sessions terminated", n)
		}
		if err := advisory.WithLock(t.Context(), db, key, func(ctx context.Context) error {
			token, err := advisory.Token(ctx)
			return errors.Join(err, counter.write(ctx, db, token), counter.write(ctx, db, token))
		}); err != nil {
			t.Fatal(err)
		}
		if err := counter.write(t.Context(), db, stale); !errors.Is(err, errStale) {
			t.Errorf("a stale write: %v, want it refused", err)
		}
		wantLost(t, "Release", old.Release())
		if writes := counter.wantNoStale(t, db); writes != 3 {
			t.Errorf("%d writes, want 3", writes)
		}
	})
}

// A server that crashes forgets the transactions whose commit it had not yet written
// down. It must not forget a token that it has given out.
func TestTokenGrowsOverACrash(t *testing.T) {
	t.Parallel()
	s := ownServer(t)
	bothDrivers(t, func(t *testing.T, d driver) {
		for range 3 {
			before := takeTokens(t, d.open(t, s.DSN()), 10)
			if err := s.Restart(t.Context(), "immediate"); err != nil {
				t.Fatal(err)
			}
			after := takeTokens(t, d.open(t, s.DSN()), 10)
			if last := before[len(before)-1]; after[0] <= last {
				t.Errorf("token %d before the crash, %d after it", last, after[0])
			}
		}
	})
}

// takeTokens takes the lock of the test n times, and returns its tokens.
func takeTokens(t *testing.T, db *sql.DB, n int) (tokens []int64) {
	t.Helper()
	for range n {
		if err := advisory.WithLock(t.Context(), db, testKey(t), func(ctx context.Context) error {
			token, err := advisory.Token(ctx)
			tokens = append(tokens, token)
			return err
		}); err != nil {
			t.Fatal(err)
		}
	}
	return tokens
}
