//go:build unix

package pgtest

import (
	"archive/zip"
	"bufio"
	"bytes"
	"context"
	"database/sql"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	embeddedpostgres "github.com/fergusstrange/embedded-postgres"
	"github.com/jackc/pgx/v5"
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

// poolerStarters start each of the poolers in front of a server.
func poolerStarters(s *Server) map[string]func(context.Context) (*Pooler, error) {
	return map[string]func(context.Context) (*Pooler, error){
		"pgbouncer": func(ctx context.Context) (*Pooler, error) { return s.Pooler(ctx, Session) },
		"haproxy":   func(ctx context.Context) (*Pooler, error) { return s.HAProxy(ctx) },
		"pgpool":    func(ctx context.Context) (*Pooler, error) { return s.Pgpool(ctx, nil) },
	}
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

func TestStartStop(t *testing.T) {
	s := start(t, Setting("max_connections", "42"), Setting("application_name", `it's a \ test`))
	if !s.Own() {
		t.Error("not our own")
	}
	wantQuery(t, s.DSN(), "show max_connections", "42")
	wantQuery(t, s.DSN(), "show application_name", `it's a \ test`)
	if s.SocketDSN() == "" {
		t.Error("no socket")
	} else {
		wantQuery(t, s.SocketDSN(), "select inet_server_addr() is null", "true")
	}
	if s.Host() != "127.0.0.1" || !strings.Contains(s.DSN(), ":"+strconv.Itoa(s.Port())+"/") {
		t.Errorf("host %s, port %d, DSN %s", s.Host(), s.Port(), s.DSN())
	}
	pid := s.proc.pid()
	children, err := childrenOf(pid)
	if err != nil || len(children) == 0 {
		t.Errorf("children of the postmaster: %v, %v", children, err)
	}
	for range 2 {
		if err := s.Stop(); err != nil {
			t.Fatal(err)
		}
	}
	for _, pid := range append(children, pid) {
		if alive(pid) {
			t.Errorf("process %d is alive", pid)
		}
	}
	if _, err := os.Lstat(s.box.dir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("%s: %v", s.box.dir, err)
	}
	if err := s.Restart(t.Context(), "fast"); !errors.Is(err, ErrStopped) {
		t.Errorf("restart: %v", err)
	}
}

// The processes and files are gone also if nobody stops the server.
func TestKilledProgram(t *testing.T) {
	for _, sig := range []syscall.Signal{syscall.SIGKILL, syscall.SIGINT} {
		t.Run(sig.String(), func(t *testing.T) {
			cmd := exec.Command(os.Args[0])
			cmd.Env = append(os.Environ(), childEnv+"=1")
			cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
			// An end of file here needs all of those who have the pipe as
			// their output to be gone, as for the go command.
			out, err := cmd.StdoutPipe()
			if err != nil {
				t.Fatal(err)
			}
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			dirs := map[string][]int{}
			lines := bufio.NewScanner(out)
			for lines.Scan() && lines.Text() != "ready" {
				var dir string
				var pid int
				if n, err := fmt.Sscan(lines.Text(), &dir, &pid); n != 2 || !alive(pid) {
					t.Fatal(lines.Text(), err)
				}
				dirs[dir] = append(dirs[dir], pid)
				children, err := childrenOf(pid)
				if err != nil {
					t.Fatal(err)
				}
				dirs[dir] = append(dirs[dir], children...)
			}
			if len(dirs) != 2 {
				t.Fatal("no servers started")
			}
			// As the terminal does: to the whole group.
			if err := syscall.Kill(-cmd.Process.Pid, sig); err != nil {
				t.Fatal(err)
			}
			if _, err := io.Copy(io.Discard, out); err != nil {
				t.Error(err)
			}
			_ = cmd.Wait()
			for dir, pids := range dirs {
				waitGone(t, dir, pids...)
			}
		})
	}
}

func TestRestartAndKill(t *testing.T) {
	s := start(t)
	ctx := t.Context()
	conn, err := pgx.Connect(ctx, s.DSN())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := conn.Exec(ctx, "create table t as select 1 as n"); err != nil {
		t.Fatal(err)
	}
	n := 1
	check := func() {
		t.Helper()
		if err := conn.Ping(ctx); err == nil {
			t.Error("the session is still there")
		}
		if conn, err = pgx.Connect(ctx, s.DSN()); err != nil {
			t.Fatal(err)
		}
		wantQuery(t, s.DSN(), "select max(n) from t", strconv.Itoa(n))
		n++
		if _, err := conn.Exec(ctx, "insert into t values ($1)", n); err != nil {
			t.Fatal(err)
		}
	}
	for _, mode := range []string{"fast", "immediate"} {
		if err := s.Restart(ctx, mode); err != nil {
			t.Fatal(err)
		}
		check()
	}

	children, err := childrenOf(s.proc.pid())
	if err != nil {
		t.Fatal(err)
	}
	pids := append(children, s.proc.pid())
	for range 2 {
		if err := s.Kill(); err != nil {
			t.Fatal(err)
		}
	}
	for _, pid := range pids {
		if alive(pid) {
			t.Errorf("process %d is alive", pid)
		}
	}
	if _, err := net.Dial("tcp", net.JoinHostPort(s.Host(), strconv.Itoa(s.Port()))); err == nil {
		t.Error("somebody listens")
	}
	if err := s.Restart(ctx, "fast"); err != nil {
		t.Fatal(err)
	}
	check()
	if err := s.Restart(ctx, "gently"); err == nil {
		t.Error("no error for an unknown mode")
	}
}

// A prefix may run the server as its child.
func TestPrefix(t *testing.T) {
	if _, err := exec.LookPath("setpriv"); err != nil && os.Geteuid() == 0 {
		t.Skip(err)
	}
	const addr = "127.0.0.2"
	l, err := net.Listen("tcp", addr+":0")
	if err != nil {
		t.Skip(err) // not every system has more than one loopback address
	}
	l.Close()
	s := start(t, Prefix("/bin/sh", "-c", `"$@"; exit $?`, "sh"), Listen(addr))
	if s.proc.pid() == s.proc.cmd.Process.Pid {
		t.Error("the prefix has not forked")
	}
	wantQuery(t, s.DSN(), "select host(inet_server_addr())", addr)
	if err := s.Kill(); err != nil {
		t.Fatal(err)
	}
	for _, mode := range []string{"fast", "immediate"} {
		if err := s.Restart(t.Context(), mode); err != nil {
			t.Fatal(err)
		}
	}
	wantQuery(t, s.DSN(), "select 1", "1")
}

func TestStartFails(t *testing.T) {
	s, err := Start(t.Context(), Local(), Setting("shared_buffers", "lots"))
	if err == nil {
		s.Stop()
		t.Fatal("no error")
	}
	if !strings.Contains(err.Error(), `invalid value for parameter "shared_buffers"`) {
		t.Errorf("the server's log is not in: %v", err)
	}
}

// A start that is cancelled, wherever it is, cleans up before it returns.
func TestStartCancelled(t *testing.T) {
	tmp := t.TempDir()
	// Servers that root starts run as another user.
	if err := os.Chmod(filepath.Dir(tmp), 0o755); err != nil {
		t.Fatal(err)
	}
	t.Setenv("TMPDIR", tmp)
	for timeout := time.Millisecond; ; timeout *= 2 {
		ctx, cancel := context.WithTimeout(t.Context(), timeout)
		s, err := Start(ctx, Local())
		cancel()
		if err == nil {
			if err := s.Stop(); err != nil {
				t.Error(err)
			}
		} else if !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("%s: %v", timeout, err)
		}
		if left, _ := filepath.Glob(filepath.Join(tmp, "pgtest-*")); left != nil {
			t.Errorf("%s: %s", timeout, left)
		}
		if err == nil {
			return
		}
	}
}

// A restart waits for the port, which a client may have taken meanwhile.
func TestRestartPortTaken(t *testing.T) {
	s := start(t)
	if err := s.Kill(); err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", net.JoinHostPort(s.Host(), strconv.Itoa(s.Port())))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 500*time.Millisecond)
	defer cancel()
	if err := s.Restart(ctx, "fast"); !errors.Is(err, errPortTaken) && !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("restart: %v", err)
	}
	time.AfterFunc(500*time.Millisecond, func() { l.Close() })
	if err := s.Restart(t.Context(), "fast"); err != nil {
		t.Fatal(err)
	}
	wantQuery(t, s.DSN(), "select 1", "1")
}

func TestStandby(t *testing.T) {
	s := start(t, Setting("max_connections", "250"))
	ctx := t.Context()
	query(t, "pgx", s.DSN(), "with x as (select 1) select count(*) from x")
	standby, err := s.Standby(ctx, Setting("application_name", "the standby"))
	if err != nil {
		t.Fatal(err)
	}
	wantQuery(t, standby.DSN(), "select pg_is_in_recovery()", "true")
	wantQuery(t, standby.DSN(), "show max_connections", "250")
	wantQuery(t, standby.DSN(), "show application_name", "the standby")

	conn, err := pgx.Connect(ctx, s.DSN())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(context.Background())
	if _, err := conn.Exec(ctx, "create table t as select 7 as n"); err != nil {
		t.Fatal(err)
	}
	replica, err := pgx.Connect(ctx, standby.DSN())
	if err != nil {
		t.Fatal(err)
	}
	defer replica.Close(context.Background())
	if err := poll(ctx, func() error { return mustBeTrue(ctx, replica, "select to_regclass('t') is not null") }); err != nil {
		t.Fatal(err)
	}
	if err := standby.Restart(ctx, "fast"); err != nil {
		t.Fatal(err)
	}

	if err := s.Kill(); err != nil {
		t.Fatal(err)
	}
	if err := standby.Promote(ctx); err != nil {
		t.Fatal(err)
	}
	wantQuery(t, standby.DSN(), "with new as (select n from t) select n from new", "7")
	query(t, "pgx", standby.DSN(), "select pg_current_xact_id()")

	dir := standby.box.dir
	if err := s.Stop(); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Lstat(dir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("standby: %v", err)
	}
}

func TestLog(t *testing.T) {
	s := start(t)
	standby, err := s.Standby(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	// fail has an application write an error to the server's log.
	fail := func(s *Server, application string) {
		t.Helper()
		dsn, err := WithParam(s.DSN(), "application_name", application)
		if err != nil {
			t.Fatal(err)
		}
		conn, err := pgx.Connect(t.Context(), dsn)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close(context.Background())
		if _, err := conn.Exec(t.Context(), "select 1 /\n 0"); err == nil {
			t.Error("no error")
		}
	}
	size := func() int64 {
		t.Helper()
		n, err := s.LogSize()
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	// wantLog compares the log without the times, and without what is not a session's.
	prefix := regexp.MustCompile(`(?m)^[\d-]+ [\d:.]+ \w+ \[\d+\] `)
	wantLog := func(s *Server, offset int64, want string) {
		t.Helper()
		log, err := s.LogSince(offset)
		if err != nil {
			t.Fatal(err)
		}
		var got strings.Builder
		for line := range strings.Lines(prefix.ReplaceAllString(log, "")) {
			if strings.HasPrefix(line, "app ") || strings.HasPrefix(line, "\t") {
				got.WriteString(line)
			}
		}
		if got.String() != want {
			t.Errorf("the log is\n%s\nwant of it\n%s", log, want)
		}
	}

	fail(s, "app 1")
	between := size()
	fail(s, "app 2")
	fail(standby, "app 3")
	message := func(n string) string {
		return "app " + n + " ERROR:  division by zero\napp " + n + " STATEMENT:  select 1 /\n\t 0\n"
	}
	wantLog(s, 0, message("1")+message("2"))
	wantLog(s, between, message("2"))
	wantLog(s, size(), "")
	wantLog(standby, 0, message("3"))

	// It is one log, however often the server starts, and there when it does not run.
	before := size()
	for range 2 {
		if err := s.Kill(); err != nil {
			t.Fatal(err)
		}
		wantLog(s, between, message("2"))
		if err := s.Restart(t.Context(), "fast"); err != nil {
			t.Fatal(err)
		}
	}
	fail(s, "app 4")
	wantLog(s, between, message("2")+message("4"))
	wantLog(s, before, message("4"))

	if err := s.Stop(); err != nil {
		t.Fatal(err)
	}
	if _, err := s.LogSince(0); !errors.Is(err, ErrStopped) {
		t.Errorf("of a stopped server: %v", err)
	}
}

func TestPooler(t *testing.T) {
	s := start(t)
	for _, mode := range []PoolMode{Session, Transaction, Statement} {
		p, err := s.Pooler(t.Context(), mode, PoolSize(3))
		if errors.Is(err, exec.ErrNotFound) {
			t.Skip(err)
		}
		if err != nil {
			t.Fatal(err)
		}
		dsn, err := WithParam(p.DSN(), "default_query_exec_mode", "simple_protocol")
		if err != nil {
			t.Fatal(err)
		}
		if got := query(t, "pgx", dsn, "select 1"); got != "1" {
			t.Errorf("%s: select 1 is %s", mode, got)
		}
		if got := query(t, "postgres", p.DSN(), "select 1"); got != "1" {
			t.Errorf("%s: select 1 is %s", mode, got)
		}
		cfg, err := pgx.ParseConfig(dsn)
		if err != nil {
			t.Fatal(err)
		}
		cfg.Database = "pgbouncer"
		conn, err := pgx.ConnectConfig(t.Context(), cfg)
		if err != nil {
			t.Fatal(err)
		}
		rows, err := conn.Query(t.Context(), "show config")
		if err != nil {
			t.Fatal(err)
		}
		settings := map[string]string{}
		for rows.Next() {
			v, err := rows.Values()
			if err != nil {
				t.Fatal(err)
			}
			settings[fmt.Sprint(v[0])] = fmt.Sprint(v[1])
		}
		conn.Close(t.Context())
		if settings["pool_mode"] != string(mode) || settings["default_pool_size"] != "3" {
			t.Errorf("pool_mode %s, default_pool_size %s", settings["pool_mode"], settings["default_pool_size"])
		}
		pid := p.proc.pid()
		for range 2 {
			if err := p.Stop(); err != nil {
				t.Error(err)
			}
		}
		if alive(pid) {
			t.Error("the pooler is alive")
		}
	}
	if _, err := s.Pooler(t.Context(), "no such mode"); err == nil || errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("unknown mode: %v", err)
	}
}

func TestEveryPooler(t *testing.T) {
	s := start(t)
	for name, start := range poolerStarters(s) {
		t.Run(name, func(t *testing.T) {
			p, err := start(t.Context())
			if errors.Is(err, exec.ErrNotFound) {
				t.Skip(err)
			}
			if err != nil {
				t.Fatal(err)
			}
			wantQuery(t, p.DSN(), "select inet_server_port()", fmt.Sprint(s.Port()))
			if log, err := p.Log(); err != nil || log == "" {
				t.Errorf("its log is %q, %v", log, err)
			}
			pids, err := childrenOf(p.proc.pid())
			if err != nil {
				t.Fatal(err)
			}
			for range 2 {
				if err := p.Stop(); err != nil {
					t.Error(err)
				}
			}
			for _, pid := range append(pids, p.proc.pid()) {
				if alive(pid) {
					t.Errorf("process %d is alive", pid)
				}
			}
		})
	}
	for what, start := range map[string]func() (*Pooler, error){
		"HAProxy's setting":   func() (*Pooler, error) { return s.HAProxy(t.Context(), PoolSetting("no such", "setting")) },
		"Pgpool-II's setting": func() (*Pooler, error) { return s.Pgpool(t.Context(), nil, PoolSetting("port", "no port")) },
	} {
		if _, err := start(); err == nil || errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("%s: %v", what, err)
		}
	}
}

func TestPoolerNotInstalled(t *testing.T) {
	if path, err := findProgram([]string{"no-such-pgbouncer", "/no/such/pgbouncer"}); !errors.Is(err, exec.ErrNotFound) {
		t.Errorf("%s, %v; want exec.ErrNotFound", path, err)
	}
}

func TestGivenDSN(t *testing.T) {
	ours := start(t)
	ctx := t.Context()
	for _, dsn := range []string{
		ours.DSN(),
		fmt.Sprintf("host=%s port=%d user=postgres dbname=postgres sslmode=disable", ours.Host(), ours.Port()),
	} {
		t.Setenv(EnvDSN, dsn)
		s, err := Start(ctx, Setting("max_connections", "9"))
		if err != nil {
			t.Fatal(err)
		}
		if s.Own() || s.DSN() != dsn || s.Host() != ours.Host() || s.Port() != ours.Port() {
			t.Errorf("%+v", s)
		}
		named, err := WithParam(dsn, "application_name", `it's a \ test`)
		if err != nil {
			t.Fatal(err)
		}
		wantQuery(t, named, "show application_name", `it's a \ test`)
		_, errStandby := s.Standby(ctx)
		var errPooler error
		for _, start := range poolerStarters(s) {
			if _, errPooler = start(ctx); !errors.Is(errPooler, ErrNotOwn) {
				break
			}
		}
		_, errLogSize := s.LogSize()
		_, errLogSince := s.LogSince(0)
		for _, err := range []error{s.Restart(ctx, "fast"), s.Kill(), s.Promote(ctx), errStandby, errPooler, errLogSize, errLogSince} {
			if !errors.Is(err, ErrNotOwn) {
				t.Errorf("%v, want ErrNotOwn", err)
			}
		}
		if err := s.Stop(); err != nil {
			t.Error(err)
		}
		wantQuery(t, dsn, "select 1", "1")
	}

	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	l.Close()
	t.Setenv(EnvDSN, "postgres://postgres@"+l.Addr().String()+"/postgres?sslmode=disable")
	if s, err := Start(ctx); err == nil || !strings.Contains(err.Error(), EnvDSN) {
		t.Errorf("unreachable server: %v, %v", s, err)
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

// bare is a machine without PostgreSQL.
func bare() machine {
	return machine{
		getenv:   func(string) string { return "" },
		lookPath: func(string) (string, error) { return "", exec.ErrNotFound },
		glob:     func(string) ([]string, error) { return nil, nil },
		download: func(context.Context, *sandbox) (string, error) { return "", errors.New("no network") },
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

func TestNoBinaries(t *testing.T) {
	_, err := findBinaries(t.Context(), newTestSandbox(t), bare())
	if !errors.Is(err, ErrNoServer) {
		t.Errorf("%v, want ErrNoServer", err)
	}
	for _, want := range []string{EnvDSN, EnvBinDir, "apt-get install postgresql", "download", "no network"} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("no %q in: %v", want, err)
		}
	}
}

func TestFindBinaries(t *testing.T) {
	box := newTestSandbox(t)
	// What is in the sandbox is not looked at: it only has to be executable.
	install := func(dir string, names ...string) string {
		dir = filepath.Join(box.dir, dir)
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		for _, name := range names {
			if err := os.WriteFile(filepath.Join(dir, name), nil, 0o755); err != nil {
				t.Fatal(err)
			}
		}
		return dir
	}
	find := func(m machine, want string) {
		t.Helper()
		if got, err := findBinaries(t.Context(), box, m); err != nil || got != want {
			t.Errorf("%s, %v; want %s", got, err, want)
		}
	}
	v9, v16 := install("9.6", "initdb", "postgres"), install("16", "initdb", "postgres")
	clients := install("17", "psql")

	m := bare()
	m.glob = func(pattern string) ([]string, error) {
		if pattern != "/usr/lib/postgresql/*/bin" {
			return nil, nil
		}
		return []string{v16, clients, v9}, nil
	}
	find(m, v16)

	links := install("links")
	if err := os.Symlink(filepath.Join(v9, "postgres"), filepath.Join(links, "postgres")); err != nil {
		t.Fatal(err)
	}
	m.lookPath = func(name string) (string, error) {
		if name != "postgres" {
			return "", exec.ErrNotFound
		}
		return filepath.Join(links, name), nil
	}
	find(m, v9)

	m.getenv = func(name string) string {
		if name != EnvBinDir {
			return ""
		}
		return clients
	}
	if dir, err := findBinaries(t.Context(), box, m); err == nil || !strings.Contains(err.Error(), EnvBinDir) {
		t.Errorf("%s, %v; want an error", dir, err)
	}
}

// The download is tried with an archive of this machine's own programs.
func TestDownload(t *testing.T) {
	box := newTestSandbox(t)
	m := machine{download: bare().download}
	bindir, err := findBinaries(t.Context(), box, m)
	if err != nil {
		t.Skip(err)
	}
	jar := makeJar(t, bindir)
	var requests int
	repository := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		requests++
		if !strings.HasSuffix(r.URL.Path, ".jar") {
			http.NotFound(w, r)
			return
		}
		w.Write(jar)
	}))
	defer repository.Close()
	cache := filepath.Join(box.dir, "cache")
	// The library does not remove its log.
	t.Setenv("TMPDIR", t.TempDir())
	cfg := embeddedpostgres.DefaultConfig().BinaryRepositoryURL(repository.URL)
	for range 2 {
		got, err := download(t.Context(), box, cache, cfg)
		if err != nil {
			t.Fatal(err)
		}
		if err := usable(box, got); err != nil {
			t.Error(err)
		}
		if leftovers, _ := filepath.Glob(filepath.Join(filepath.Dir(filepath.Dir(got)), "download-*")); leftovers != nil {
			t.Error(leftovers)
		}
	}
	if requests != 2 {
		t.Errorf("%d requests, want one for the archive and one for its checksum", requests)
	}

	hung := make(chan struct{})
	repository.Config.Handler = http.HandlerFunc(func(http.ResponseWriter, *http.Request) { <-hung })
	defer close(hung)
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if _, err := download(ctx, box, cache+"2", cfg); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("download that hangs: %v", err)
	}
}

// makeJar returns an archive such as embedded-postgres downloads: a .jar with
// a .txz in it.
func makeJar(t *testing.T, bindir string) []byte {
	t.Helper()
	for _, name := range []string{"tar", "xz"} {
		if _, err := exec.LookPath(name); err != nil {
			t.Skip(err)
		}
	}
	dir := t.TempDir()
	if err := os.Mkdir(filepath.Join(dir, "bin"), 0o755); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"initdb", "pg_ctl", "postgres"} {
		if err := os.WriteFile(filepath.Join(dir, "bin", name), []byte("#!"+filepath.Join(bindir, name)), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	txz, err := exec.Command("tar", "-C", dir, "-cJf", "-", "bin").Output()
	if err != nil {
		t.Fatal(err)
	}
	var jar bytes.Buffer
	w := zip.NewWriter(&jar)
	f, err := w.Create("postgres.txz")
	if err == nil {
		_, err = f.Write(txz)
	}
	if err == nil {
		err = w.Close()
	}
	if err != nil {
		t.Fatal(err)
	}
	return jar.Bytes()
}
