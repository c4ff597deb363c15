package integration

import (
	"context"
	"database/sql"
	sqldriver "database/sql/driver"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/pgadvisory/advisory"
	"github.com/pgadvisory/advisory/integration/internal/pgtest"
	"github.com/pgadvisory/advisory/integration/internal/testkit"
)

// checkRuns is how often Check must be right in a row.
const checkRuns = 25

// poolerDrivers are the drivers as they are set up behind a transaction pooler: pgx
// without named prepared statements. Check itself needs no such thing.
var poolerDrivers = []driver{drivers[0], drivers[1], drivers[3]}

// wantCheck runs Check again and again, each time on a new pool, and wants it to be
// silent (want is "") or to say what is wrong.
func wantCheck(t *testing.T, open func() *sql.DB, want string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	for run := range checkRuns {
		db := open()
		err := advisory.Check(ctx, db)
		db.Close()
		switch {
		case want == "" && err != nil:
			t.Fatalf("run %d: %v", run, err)
		case want != "" && err == nil:
			t.Fatalf("run %d: Check is content, and should say %q", run, want)
		case want != "" && !strings.Contains(err.Error(), want):
			t.Fatalf("run %d: Check says %q, and should say %q", run, err, want)
		}
	}
}

func mustOpen(t *testing.T, d driver, dsn string) func() *sql.DB {
	t.Helper()
	dsn = watchLog(t, dsn)
	return func() *sql.DB {
		db, err := d.openDB(dsn)
		if err != nil {
			t.Fatal(err)
		}
		return db
	}
}

// wantNoLocks fails the test if a session of the server holds an advisory lock before
// long. The server is the test's own.
func wantNoLocks(t *testing.T, s *pgtest.Server) {
	t.Helper()
	db := drivers[1].open(t, s.DSN())
	waitFor(t, "nothing is locked", func() (free bool, err error) {
		err = db.QueryRow(`SELECT count(*) = 0 FROM pg_locks WHERE locktype = 'advisory'`).Scan(&free)
		return free, err
	})
}

func TestCheckIsContentWithPostgreSQL(t *testing.T) {
	s := ownServer(t)
	eachDriver(t, func(t *testing.T, d driver) {
		wantCheck(t, mustOpen(t, d, s.DSN()), "")
	})
	t.Run("pool of two", func(t *testing.T) {
		wantCheck(t, func() *sql.DB {
			db := mustOpen(t, drivers[1], s.DSN())()
			db.SetMaxOpenConns(2)
			return db
		}, "")
	})
	t.Run("pool of one", func(t *testing.T) {
		wantCheck(t, func() *sql.DB {
			db := mustOpen(t, drivers[1], s.DSN())()
			db.SetMaxOpenConns(1)
			return db
		}, "limited to one connection")
	})
	wantNoLocks(t, s)
}

// Check hands its connections back as they were, dead ones among the pool's included.
func TestCheckPassesOverDeadConnections(t *testing.T) {
	s := ownServer(t)
	bothDrivers(t, func(t *testing.T, d driver) {
		db := d.open(t, s.DSN())
		db.SetMaxIdleConns(4)
		if err := advisory.Check(context.Background(), db); err != nil {
			t.Fatal(err)
		}
		if open := db.Stats().OpenConnections; open != 0 {
			t.Errorf("%d connections open after Check", open)
		}
		var idle []*sql.Conn
		for range 4 {
			conn, err := db.Conn(context.Background())
			if err != nil {
				t.Fatal(err)
			}
			idle = append(idle, conn)
		}
		for _, conn := range idle {
			conn.Close()
		}
		allowLog(t, terminated)
		if _, err := d.open(t, s.DSN()).Exec(`SELECT pg_terminate_backend(pid) FROM pg_stat_activity
			WHERE pid <> pg_backend_pid() AND backend_type = 'client backend'`); err != nil {
			t.Fatal(err)
		}
		if err := advisory.Check(context.Background(), db); err != nil {
			t.Fatal(err)
		}
	})
}

func TestCheckFindsAHotStandby(t *testing.T) {
	standby := testkit.Standby(t, ownServer(t))
	bothDrivers(t, func(t *testing.T, d driver) {
		wantCheck(t, mustOpen(t, d, standby.DSN()), "hot standby")
	})
}

func TestCheckFindsPooling(t *testing.T) {
	ctx := context.Background()
	for _, mode := range []struct {
		mode pgtest.PoolMode
		want string
	}{
		{pgtest.Session, ""},
		{pgtest.Transaction, "a pooler in transaction or statement mode"},
		{pgtest.Statement, "a pooler in transaction or statement mode"},
	} {
		t.Run(string(mode.mode), func(t *testing.T) {
			s := ownServer(t)
			pooler, err := s.Pooler(ctx, mode.mode, pgtest.PoolSize(12))
			require(t, "pgbouncer", err)
			for _, d := range poolerDrivers {
				t.Run(d.name, func(t *testing.T) {
					wantCheck(t, mustOpen(t, d, pooler.DSN()), mode.want)
				})
				t.Run(d.name+" among busy clients", func(t *testing.T) {
					stop := keepBusy(t, d, pooler.DSN(), 6)
					defer stop()
					wantCheck(t, mustOpen(t, d, pooler.DSN()), mode.want)
				})
			}
			wantNoLocks(t, s)
		})
	}
}

// keepBusy has n other clients send short statements through dsn, until stop.
func keepBusy(t *testing.T, d driver, dsn string, n int) (stop func()) {
	t.Helper()
	db := d.open(t, dsn)
	db.SetMaxIdleConns(n)
	ctx, cancel := context.WithCancel(context.Background())
	var clients sync.WaitGroup
	var sent atomic.Int64
	for range n {
		clients.Go(func() {
			for ctx.Err() == nil {
				// Without arguments, and by Exec, like the statements of the package.
				if _, err := db.Exec("SELECT pg_sleep(0.0005)"); err == nil {
					sent.Add(1)
				}
			}
		})
	}
	waitFor(t, "the other clients are busy", func() (bool, error) { return sent.Load() > int64(n), nil })
	return func() { cancel(); clients.Wait() }
}

// A pool whose connections lead to two servers in turn, as behind a load balancer.
func TestCheckFindsSeveralServers(t *testing.T) {
	one, two := ownServer(t), ownServer(t)
	bothDrivers(t, func(t *testing.T, d driver) {
		some := d.open(t, one.DSN())
		dsns := []string{watchLog(t, one.DSN()), watchLog(t, two.DSN())}
		wantCheck(t, func() *sql.DB {
			return sql.OpenDB(&inTurn{driver: some.Driver(), dsns: dsns})
		}, "different servers or databases")
	})
	wantNoLocks(t, one)
	wantNoLocks(t, two)
}

// inTurn connects to its DSNs in turn.
type inTurn struct {
	driver sqldriver.Driver
	dsns   []string
	next   atomic.Int64
}

func (c *inTurn) Driver() sqldriver.Driver { return c.driver }

func (c *inTurn) Connect(context.Context) (sqldriver.Conn, error) {
	return c.driver.Open(c.dsns[int(c.next.Add(1))%len(c.dsns)])
}
