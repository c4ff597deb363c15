//go:build unix

package pgtest

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
	"testing"

	"github.com/jackc/pgx/v5"
)

// poolerStarters start each of the poolers in front of a server.
func poolerStarters(s *Server) map[string]func(context.Context) (*Pooler, error) {
	return map[string]func(context.Context) (*Pooler, error){
		"pgbouncer": func(ctx context.Context) (*Pooler, error) { return s.Pooler(ctx, Session) },
		"haproxy":   func(ctx context.Context) (*Pooler, error) { return s.HAProxy(ctx) },
		"pgpool":    func(ctx context.Context) (*Pooler, error) { return s.Pgpool(ctx, nil) },
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
		settings := poolerSettings(t, dsn)
		if settings["pool_mode"] != string(mode) || settings["default_pool_size"] != "3" {
			t.Errorf("pool_mode %s, default_pool_size %s", settings["pool_mode"], settings["default_pool_size"])
		}
		wantStopped(t, p)
	}
	if _, err := s.Pooler(t.Context(), "no such mode"); err == nil || errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("unknown mode: %v", err)
	}
}

// poolerSettings asks PgBouncer, which a DSN leads to, for its settings.
func poolerSettings(t *testing.T, dsn string) map[string]string {
	t.Helper()
	cfg, err := pgx.ParseConfig(dsn)
	if err != nil {
		t.Fatal(err)
	}
	cfg.Database = "pgbouncer"
	conn, err := pgx.ConnectConfig(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(t.Context())
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
	return settings
}

// wantStopped stops a pooler twice, and fails the test unless its processes have ended.
func wantStopped(t *testing.T, p *Pooler) {
	t.Helper()
	pids, err := childrenOf(p.proc.pid())
	if err != nil {
		t.Fatal(err)
	}
	pids = append(pids, p.proc.pid())
	for range 2 {
		if err := p.Stop(); err != nil {
			t.Error(err)
		}
	}
	for _, pid := range pids {
		if alive(pid) {
			t.Errorf("process %d is alive", pid)
		}
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
			wantStopped(t, p)
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
