// Package testkit is what the tests of several packages share.
package testkit

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/pgadvisory/advisory"
	"github.com/pgadvisory/advisory/integration/internal/pgtest"
)

// Main calls run, which runs the tests of a package, with a server for all of them, and
// returns the exit status.
func Main(run func(*pgtest.Server) (status int, err error)) (status int) {
	server, err := pgtest.Start(context.Background())
	if err == nil {
		keepLog("", server)
		status, err = run(server)
		err = errors.Join(err, server.Stop())
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		status = 1
	}
	return status
}

// OwnServer starts a server for the test alone.
func OwnServer(t testing.TB, opts ...pgtest.Option) *pgtest.Server {
	t.Helper()
	s, err := pgtest.Start(context.Background(), append(opts, pgtest.Local())...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Stop() })
	keepLogFor(t, s)
	return s
}

// Standby starts a standby of a server of the test's own. It ends with that server.
func Standby(t testing.TB, primary *pgtest.Server) *pgtest.Server {
	t.Helper()
	s, err := primary.Standby(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	keepLogFor(t, s)
	return s
}

var names atomic.Int64

// Unique returns a name that no other test gives to anything on the server.
func Unique(prefix string) string {
	return fmt.Sprintf("%s_%d_%d", prefix, os.Getpid(), names.Add(1))
}

// Database creates a database for the test alone and returns a DSN for it.
func Database(t testing.TB, server *pgtest.Server) (dsn string) {
	t.Helper()
	dsn, drop, err := CreateDatabase(server)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := drop(); err != nil {
			t.Error(err)
		}
	})
	return dsn
}

// CreateDatabase is Database where there is no test.
func CreateDatabase(server *pgtest.Server) (dsn string, drop func() error, err error) {
	name := Unique("advisory")
	if err := execute(server, "CREATE DATABASE "+name); err != nil {
		return "", nil, err
	}
	dsn, err = pgtest.WithParam(server.DSN(), "dbname", name)
	drop = func() error {
		// Without FORCE, the server waits 5 s for sessions whose programs have closed them. With it, it ends them,
		// and says so in its log.
		if execute(server, "DROP DATABASE "+name) == nil {
			return nil
		}
		return execute(server, "DROP DATABASE "+name+" WITH (FORCE)")
	}
	return dsn, drop, err
}

func execute(server *pgtest.Server, statement string) error {
	ctx := context.Background()
	conn, err := pgx.Connect(ctx, server.DSN())
	if err != nil {
		return err
	}
	defer conn.Close(ctx)
	_, err = conn.Exec(ctx, statement)
	return err
}

// Hold holds key on a session of its own, without the package under test, until release
// is called or the test ends.
func Hold(t testing.TB, db *sql.DB, key advisory.Key) (release func()) {
	t.Helper()
	conn, err := db.Conn(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := conn.ExecContext(t.Context(), "SELECT pg_advisory_lock("+key.SQL()+")"); err != nil {
		t.Fatal(err)
	}
	release = sync.OnceFunc(func() {
		if _, err := conn.ExecContext(context.Background(), "SELECT pg_advisory_unlock("+key.SQL()+")"); err != nil {
			t.Error(err)
		}
		conn.Close()
	})
	t.Cleanup(release)
	return release
}

// WaitFor waits until condition holds, and fails the test if that takes too long.
func WaitFor(t testing.TB, what string, condition func() (bool, error)) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(2 * time.Millisecond) {
		ok, err := condition()
		if ok && err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("waited in vain until %s: %v", what, err)
		}
	}
}

// Serve answers each connection with f, and closes it after that.
func Serve(t testing.TB, f func(net.Conn)) net.Addr {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer conn.Close()
				f(conn)
			}()
		}
	}()
	return l.Addr()
}
