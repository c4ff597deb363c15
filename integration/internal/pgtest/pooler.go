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

// PoolSetting sets a parameter in the pooler's configuration: in the
// [pgbouncer] section of PgBouncer's, in Pgpool-II's, or in the defaults section
// of HAProxy's. A later setting of the same parameter wins.
func PoolSetting(name, value string) PoolOption {
	return func(c *poolConfig) { c.settings = append(c.settings, setting{name, value}) }
}

// PoolSize limits the number of server connections, PgBouncer's
// default_pool_size.
func PoolSize(n int) PoolOption {
	return PoolSetting("default_pool_size", strconv.Itoa(n))
}

// A Pooler is a program in front of a [Server]: PgBouncer, Pgpool-II or HAProxy.
type Pooler struct {
	dsn  string
	log  string
	stop syscall.Signal
	proc *process
}

// Pooler starts a PgBouncer in front of the server. It is stopped with the
// server at the latest. The error wraps [exec.ErrNotFound] if PgBouncer is not
// installed.
func (s *Server) Pooler(ctx context.Context, mode PoolMode, opts ...PoolOption) (*Pooler, error) {
	return s.between(ctx, poolerKind{
		name:     "pgbouncer",
		programs: sbin("pgbouncer"),
		// What the softer signals mean has changed from version to version.
		stop: syscall.SIGKILL,
		configure: func(name string, port int, extra []setting) (args []string, err error) {
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
			ini := filepath.Join(s.box.dir, name+".ini")
			return []string{ini}, s.box.writeFile(ini, conf.String())
		},
		listening: func(port int) string { return fmt.Sprintf("listening on 127.0.0.1:%d", port) },
	}, opts)
}

// HAProxy starts a HAProxy that passes each connection on to the server. It is
// stopped with the server at the latest. The error wraps [exec.ErrNotFound] if
// HAProxy is not installed.
func (s *Server) HAProxy(ctx context.Context, opts ...PoolOption) (*Pooler, error) {
	return s.between(ctx, poolerKind{
		name:     "haproxy",
		programs: sbin("haproxy"),
		stop:     syscall.SIGTERM,
		configure: func(name string, port int, extra []setting) (args []string, err error) {
			settings := append([]setting{
				{"mode", "tcp"},
				{"timeout connect", "5s"},
				{"timeout client", "1m"},
				{"timeout server", "1m"},
			}, extra...)
			var conf strings.Builder
			// Without noreuseport, two of them can listen on one port.
			conf.WriteString("global\n\tnoreuseport\ndefaults\n")
			for _, p := range settings {
				fmt.Fprintf(&conf, "\t%s %s\n", p.name, p.value)
			}
			fmt.Fprintf(&conf, "listen %s\n\tbind 127.0.0.1:%d\n\tserver postgres %s\n",
				name, port, net.JoinHostPort(s.host, strconv.Itoa(s.port)))
			cfg := filepath.Join(s.box.dir, name+".cfg")
			// With a master, it says when it has the port, and why not.
			return []string{"-W", "-db", "-f", cfg}, s.box.writeFile(cfg, conf.String())
		},
		listening: func(int) string { return "Loading success" },
	}, opts)
}

// Pgpool starts a Pgpool-II in front of the server and, if there are any, its
// standbys. What is not set is as Pgpool-II has it by default: above all,
// load_balance_mode is on. It is stopped with the server at the latest. The error
// wraps [exec.ErrNotFound] if Pgpool-II is not installed.
func (s *Server) Pgpool(ctx context.Context, standbys []*Server, opts ...PoolOption) (*Pooler, error) {
	return s.between(ctx, poolerKind{
		name:     "pgpool",
		programs: sbin("pgpool"),
		// A Pgpool-II that is killed leaves its children and shared memory behind.
		stop: syscall.SIGQUIT,
		configure: func(name string, port int, extra []setting) (args []string, err error) {
			dir := filepath.Join(s.box.dir, name)
			if err := errors.Join(os.Mkdir(dir, 0o700), s.box.chown(dir)); err != nil {
				return nil, err
			}
			settings := []setting{
				{"backend_clustering_mode", "streaming_replication"},
				{"listen_addresses", "127.0.0.1"},
				{"port", strconv.Itoa(port)},
				{"socket_dir", dir},
				{"pcp_listen_addresses", ""},
				{"pcp_socket_dir", dir},
				{"wd_ipc_socket_dir", dir},
				{"pid_file_name", filepath.Join(dir, "pid")},
				{"logdir", dir},
				{"pool_passwd", ""},
				{"sr_check_user", "postgres"},
				{"health_check_period", "0"},
				// The cache of query results is off, and has its memory all the same.
				{"memqcache_total_size", "1MB"},
			}
			for i, b := range append([]*Server{s}, standbys...) {
				settings = append(settings,
					setting{fmt.Sprint("backend_hostname", i), b.host},
					setting{fmt.Sprint("backend_port", i), strconv.Itoa(b.port)},
					setting{fmt.Sprint("backend_weight", i), "1"},
				)
			}
			var conf strings.Builder
			for _, p := range append(settings, extra...) {
				fmt.Fprintf(&conf, "%s = %s\n", p.name, quote(p.value))
			}
			args = []string{"-n", "-D"}
			for _, f := range []struct{ flag, name, content string }{
				{"-f", "pgpool.conf", conf.String()},
				{"-F", "pcp.conf", ""},
				{"-a", "pool_hba.conf", ""},
			} {
				path := filepath.Join(dir, f.name)
				if err := s.box.writeFile(path, f.content); err != nil {
					return nil, err
				}
				args = append(args, f.flag, path)
			}
			return args, nil
		},
		listening: func(int) string { return "pgpool-II successfully started" },
	}, opts)
}

// A poolerKind is how one program is started between the clients and a server.
type poolerKind struct {
	name     string
	programs []string // where it may be
	stop     syscall.Signal

	// configure writes the configuration, and returns the arguments of the program.
	configure func(name string, port int, extra []setting) (args []string, err error)

	// listening is what the program writes once it has the port to itself.
	listening func(port int) string
}

// between starts a program between the clients and the server.
func (s *Server) between(ctx context.Context, kind poolerKind, opts []PoolOption) (*Pooler, error) {
	if err := s.lock(); err != nil {
		return nil, err
	}
	defer s.mu.Unlock()
	var cfg poolConfig
	for _, opt := range opts {
		opt(&cfg)
	}
	program, err := findProgram(kind.programs)
	if err != nil {
		return nil, err
	}
	for range portAttempts {
		var p *Pooler
		if p, err = s.startPooler(ctx, program, kind, cfg.settings); err == nil {
			s.poolers = append(s.poolers, p)
			return p, nil
		}
		if !errors.Is(err, errPortTaken) {
			break
		}
	}
	return nil, err
}

// sbin is where a system program may be. The directories of these are often not
// in the PATH of an ordinary user.
func sbin(name string) []string {
	return []string{name, "/usr/sbin/" + name, "/usr/local/sbin/" + name, "/opt/homebrew/bin/" + name}
}

// findProgram returns the first of the paths that is a program.
func findProgram(paths []string) (string, error) {
	for _, path := range paths {
		if path, err := exec.LookPath(path); err == nil {
			return path, nil
		}
	}
	return "", fmt.Errorf("pgtest: %s: %w", paths[0], exec.ErrNotFound)
}

func (s *Server) startPooler(ctx context.Context, program string, kind poolerKind, extra []setting) (_ *Pooler, err error) {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	port, err := freePort()
	if err != nil {
		return nil, err
	}
	s.launches++
	name := fmt.Sprintf("%s-%d", kind.name, s.launches)
	log := filepath.Join(s.box.dir, name+".log")
	args, err := kind.configure(name, port, extra)
	if err != nil {
		return nil, err
	}
	proc, err := s.box.start(name, log, nil, append([]string{program}, args...)...)
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
		log:  log,
		stop: kind.stop,
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
		return fmt.Errorf("pgtest: start %s: %w; the end of its log:\n%s", kind.name, err, tail)
	}
	// As with a server: until it says so itself, another may be listening.
	for {
		b, _ := os.ReadFile(log)
		if strings.Contains(string(b), kind.listening(port)) {
			break
		}
		select {
		case <-proc.done:
			return nil, fail(errors.New(kind.name + " exited: " + proc.state()))
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

// Log returns what the pooler has written to its log.
func (p *Pooler) Log() (string, error) {
	b, err := os.ReadFile(p.log)
	return string(b), err
}

// Stop ends the pooler. It does nothing the second time.
func (p *Pooler) Stop() error {
	p.proc.end(p.stop)
	return nil
}
