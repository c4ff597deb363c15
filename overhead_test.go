package advisory

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"net"
	"runtime"
	"testing"
)

// An instant driver answers every statement at once, with one row. Its connections have pgx's shape.
type instant struct{}

func (instant) Connect(context.Context) (driver.Conn, error) { return new(instantConn), nil }
func (instant) Driver() driver.Driver                        { return nil }

type (
	instantConn   struct{ _ byte }
	instantPgx    struct{}
	instantPgConn struct{}
)

func (*instantConn) Conn() instantPgx                    { return instantPgx{} }
func (instantPgx) PgConn() instantPgConn                 { return instantPgConn{} }
func (instantPgConn) Conn() (network net.Conn)           { return network }
func (*instantConn) Prepare(string) (driver.Stmt, error) { return nil, driver.ErrSkip }
func (*instantConn) Close() error                        { return nil }
func (*instantConn) Begin() (driver.Tx, error)           { return nil, driver.ErrSkip }
func (*instantConn) ExecContext(context.Context, string, []driver.NamedValue) (driver.Result, error) {
	return driver.RowsAffected(1), nil
}

// BenchmarkFreeLock measures what is between the caller and the driver on a free lock, beside what a
// connection of the pool costs.
func BenchmarkFreeLock(b *testing.B) {
	db := sql.OpenDB(instant{})
	defer db.Close()
	canBeCanceled, cancel := context.WithCancel(context.Background())
	defer cancel()
	for name, ctx := range map[string]context.Context{"Background": context.Background(), "WithCancel": canBeCanceled} {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if err := WithLock(ctx, db, ID(1), noWork); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
	b.Run("Conn", func(b *testing.B) {
		for b.Loop() {
			conn, err := db.Conn(context.Background())
			if err != nil {
				b.Fatal(err)
			}
			conn.Close()
		}
	})
}

func noWork(context.Context) error { return nil }

// What a lock took of memory is free when it is released, and not when its timers would have fired.
func TestLocksThatAreReleasedTakeNoMemory(t *testing.T) {
	db := sql.OpenDB(instant{})
	defer db.Close()
	objects := func(locks int) uint64 {
		for range locks {
			if err := WithLock(t.Context(), db, ID(1), noWork); err != nil {
				t.Fatal(err)
			}
		}
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return m.HeapObjects
	}
	const locks = 10_000
	before := objects(100)
	if after := objects(locks); after > before+locks {
		t.Errorf("%d locks that are released have %d objects", locks, after-before)
	}
}
