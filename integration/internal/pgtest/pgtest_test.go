//go:build unix

package pgtest

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	_ "github.com/jackc/pgx/v5/stdlib"
	_ "github.com/lib/pq"
)

// childEnv makes the test binary a program that starts servers and then waits
// to be killed.
const childEnv = "PGTEST_CHILD"

func TestMain(m *testing.M) {
	if os.Getenv(childEnv) != "" {
		if err := child(); err != nil {
			fmt.Println(err)
		}
		os.Exit(1)
	}
	os.Exit(m.Run())
}

func child() error {
	ctx := context.Background()
	s, err := Start(ctx, Local())
	if err != nil {
		return err
	}
	standby, err := s.Standby(ctx)
	if err != nil {
		return err
	}
	for _, start := range poolerStarters(s) {
		p, err := start(ctx)
		if err == nil {
			children, err := childrenOf(p.proc.pid())
			if err != nil {
				return err
			}
			for _, pid := range append(children, p.proc.pid()) {
				fmt.Println(s.box.dir, pid)
			}
		} else if !errors.Is(err, exec.ErrNotFound) {
			return err
		}
	}
	fmt.Println(s.box.dir, s.proc.pid())
	fmt.Println(standby.box.dir, standby.proc.pid())
	fmt.Println("ready")
	// A busy session must not keep the server.
	return pingForever(s.DSN())
}

func pingForever(dsn string) error {
	db, err := sql.Open("pgx", dsn)
	if err != nil {
		return err
	}
	_, err = db.Exec("select pg_sleep(3600)")
	return err
}

func start(t *testing.T, opts ...Option) *Server {
	t.Helper()
	s, err := Start(t.Context(), append(opts, Local())...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Stop(); err != nil {
			t.Error(err)
		}
	})
	return s
}

// query returns the query's single value.
func query(t *testing.T, driver, dsn, q string) string {
	t.Helper()
	db, err := sql.Open(driver, dsn)
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	var v string
	if err := db.QueryRowContext(t.Context(), q).Scan(&v); err != nil {
		t.Fatalf("%s, %s: %s: %v", driver, dsn, q, err)
	}
	return v
}

func wantQuery(t *testing.T, dsn, q, want string) {
	t.Helper()
	for _, driver := range []string{"pgx", "postgres"} {
		if got := query(t, driver, dsn, q); got != want {
			t.Errorf("%s: %s is %q, want %q", driver, q, got, want)
		}
	}
}

func alive(pid int) bool {
	// A zombie is not alive: whoever adopted it may be slow.
	if b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid)); err == nil {
		if _, rest, ok := strings.Cut(string(b), ") "); ok && strings.HasPrefix(rest, "Z") {
			return false
		}
	}
	return syscall.Kill(pid, 0) == nil
}

func waitGone(t *testing.T, dir string, pids ...int) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	if err := poll(ctx, func() error {
		for _, pid := range pids {
			if alive(pid) {
				return fmt.Errorf("process %d is alive", pid)
			}
		}
		if _, err := os.Lstat(dir); !errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("%s exists: %v", dir, err)
		}
		return nil
	}); err != nil {
		t.Error(err)
	}
}

func TestWithParam(t *testing.T) {
	for _, test := range []struct{ dsn, key, value, want string }{
		{"postgres://u:p@localhost:5432/db?sslmode=disable", "host", "127.0.0.1", "postgres://u:p@127.0.0.1:5432/db?sslmode=disable"},
		{"postgres://u:p@localhost:5432/db?port=1", "port", "45000", "postgres://u:p@localhost:45000/db"},
		{"postgres://localhost/db", "host", "example.com", "postgres://example.com/db"},
		{"postgres://localhost/db", "host", "::1", "postgres://[::1]/db"},
		{"postgres://[::1]:1/db", "port", "2", "postgres://[::1]:2/db"},
		{"postgresql://localhost/db", "dbname", "other", "postgresql://localhost/other"},
		{"postgres://u@/db?host=%2Frun", "port", "2", "postgres://u@/db?host=%2Frun&port=2"},
		{"postgres://localhost", "dbname", "a b", "postgres://localhost?dbname=a%20b"},
		{"postgres://localhost:5432/db", "host", "/run", "postgres://localhost:5432/db?host=%2Frun"},
		{"host=localhost", "port", "2", "host=localhost port='2'"},
	} {
		got, err := WithParam(test.dsn, test.key, test.value)
		if err != nil || got != test.want {
			t.Errorf("%s with %s %s: %s, %v; want %s", test.dsn, test.key, test.value, got, err, test.want)
		}
	}
}

func newTestSandbox(t *testing.T) *sandbox {
	t.Helper()
	box, err := newSandbox()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := box.close(); err != nil {
			t.Error(err)
		}
	})
	return box
}
