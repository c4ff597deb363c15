package pgtest

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/jackc/pgx/v5"
)

// A PoolMode says when PgBouncer takes a server connection back from a client.
type PoolMode string

// The pool modes of PgBouncer.
const (
	Session     PoolMode = "session"
	Transaction PoolMode = "transaction"
	Statement   PoolMode = "statement"
)

// A PoolOption changes how a pooler is started.
type PoolOption func(*poolConfig)

type poolConfig struct{ settings []setting }

// PoolSetting sets a parameter in the [pgbouncer] section of PgBouncer's
// configuration. A later setting of the same parameter wins.
func PoolSetting(name, value string) PoolOption {
	return func(c *poolConfig) { c.settings = append(c.settings, setting{name, value}) }
}

// PoolSize limits the number of server connections, PgBouncer's
// default_pool_size.
func PoolSize(n int) PoolOption {
	return PoolSetting("default_pool_size", strconv.Itoa(n))
}

// A Pooler is a PgBouncer in front of a [Server].
type Pooler struct {
	dsn  string
	proc *process
}

// Pooler starts a PgBouncer in front of the server. It is stopped with the
// server at the latest. The error wraps [exec.ErrNotFound] if PgBouncer is not
// installed.
func (s *Server) Pooler(ctx context.Context, mode PoolMode, opts ...PoolOption) (*Pooler, error) {
	if err := s.lock(); err != nil {
		return nil, err
	}
	defer s.mu.Unlock()
	var cfg poolConfig
	for _, opt := range opts {
		opt(&cfg)
	}
	program, err := findPgBouncer(pgBouncers)
	if err != nil {
		return nil, err
	}
	for range portAttempts {
		var p *Pooler
		if p, err = s.startPooler(ctx, program, mode, cfg.settings); err == nil {
			s.poolers = append(s.poolers, p)
			return p, nil
		}
		if !errors.Is(err, errPortTaken) {
			break
		}
	}
	return nil, err
}

// pgBouncers is where PgBouncer may be. The directories of system programs are
// often not in the PATH of an ordinary user.
var pgBouncers = []string{"pgbouncer", "/usr/sbin/pgbouncer", "/usr/local/sbin/pgbouncer", "/opt/homebrew/bin/pgbouncer"}

// findPgBouncer returns the first of the paths that is a program.
func findPgBouncer(paths []string) (string, error) {
	for _, path := range paths {
		if path, err := exec.LookPath(path); err == nil {
			return path, nil
		}
	}
	return "", fmt.Errorf("pgtest: pgbouncer: %w", exec.ErrNotFound)
}

func (s *Server) startPooler(ctx context.Context, program string, mode PoolMode, extra []setting) (_ *Pooler, err error) {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	port, err := freePort()
	if err != nil {
		return nil, err
	}
	s.launches++
	name := fmt.Sprintf("pgbouncer-%d", s.launches)
	log := filepath.Join(s.box.dir, name+".log")
	ini := filepath.Join(s.box.dir, name+".ini")

	settings := append([]setting{
		{"listen_addr", "127.0.0.1"},
		{"listen_port", strconv.Itoa(port)},
		{"unix_socket_dir", ""},
		{"auth_type", "any"},
		{"pool_mode", string(mode)},
		{"max_client_conn", "1000"},
		// lib/pq sends it and PgBouncer would refuse it.
		{"ignore_startup_parameters", "extra_float_digits"},
		// A server that was restarted is tried again without a long wait.
		{"server_login_retry", "1"},
	}, extra...)
	var conf strings.Builder
	fmt.Fprintf(&conf, "[databases]\n* = host=%s port=%d user=postgres\n\n[pgbouncer]\n", s.host, s.port)
	for _, p := range settings {
		fmt.Fprintf(&conf, "%s = %s\n", p.name, p.value)
	}
	if err := s.box.writeFile(ini, conf.String()); err != nil {
		return nil, err
	}
	proc, err := s.box.start(name, log, nil, program, ini)
	if err != nil {
		return nil, err
	}
	p := &Pooler{
		dsn: (&url.URL{
			Scheme:   "postgres",
			User:     url.User("postgres"),
			Host:     net.JoinHostPort("127.0.0.1", strconv.Itoa(port)),
			Path:     "/postgres",
			RawQuery: "sslmode=disable",
		}).String(),
		proc: proc,
	}
	defer func() {
		if err != nil {
			_ = p.Stop()
		}
	}()
	fail := func(err error) error {
		tail := tailOf(log)
		if strings.Contains(tail, "Address already in use") {
			err = fmt.Errorf("%w: %w", errPortTaken, err)
		}
		return fmt.Errorf("pgtest: start PgBouncer: %w; the end of its log:\n%s", err, tail)
	}
	// As with a server: until it says so itself, another may be listening.
	listening := fmt.Sprintf("listening on 127.0.0.1:%d", port)
	for {
		b, _ := os.ReadFile(log)
		if strings.Contains(string(b), listening) {
			break
		}
		select {
		case <-proc.done:
			return nil, fail(errors.New("pgbouncer exited: " + proc.state()))
		case <-ctx.Done():
			return nil, fail(context.Cause(ctx))
		case <-time.After(pollInterval):
		}
	}
	if err := poll(ctx, func() error { return pingSimple(ctx, p.dsn) }); err != nil {
		return nil, fail(err)
	}
	return p, nil
}

// pingSimple is ping without prepared statements, which do not survive a
// transaction pooler.
func pingSimple(ctx context.Context, dsn string) error {
	cfg, err := pgx.ParseConfig(dsn)
	if err != nil {
		return err
	}
	cfg.DefaultQueryExecMode = pgx.QueryExecModeSimpleProtocol
	conn, err := pgx.ConnectConfig(ctx, cfg)
	if err != nil {
		return err
	}
	defer conn.Close(context.WithoutCancel(ctx))
	return conn.Ping(ctx)
}

// DSN returns a connection string for the pooler, like [Server.DSN]. A client
// behind a transaction or statement pooler must do without prepared
// statements, for pgx by default_query_exec_mode: see [WithParam].
func (p *Pooler) DSN() string { return p.dsn }

// Stop kills the pooler. It does nothing the second time.
func (p *Pooler) Stop() error {
	// What the softer signals mean has changed from version to version.
	p.proc.signal(syscall.SIGKILL)
	<-p.proc.done
	return nil
}
