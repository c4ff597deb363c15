//go:build unix

package pgtest

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
)

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
			dirs := startedByChild(t, out)
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

// startedByChild reads what a child prints until it is ready. It returns the child's
// directories, and the processes of each.
func startedByChild(t *testing.T, out io.Reader) map[string][]int {
	t.Helper()
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
	return dirs
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
