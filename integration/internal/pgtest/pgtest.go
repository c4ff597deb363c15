// Package pgtest runs real PostgreSQL servers, streaming standbys, and what
// stands between them and their clients (PgBouncer, Pgpool-II, HAProxy), for tests
// and demonstrations.
//
// A server that [Start] creates is throw-away: its data, its log and its
// sockets live in one temporary directory, and both the processes and the
// directory are gone after [Server.Stop], and also when the program that
// started them crashes, is interrupted or is killed.
//
// Such a server trusts every connection that reaches it. It listens on a
// loopback address unless [Listen] says otherwise.
package pgtest

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/jackc/pgx/v5"
)

// Environment variables that tell [Start] which PostgreSQL to use.
const (
	// EnvDSN names a running server to use instead of starting one.
	EnvDSN = "ADVISORY_TEST_DSN"
	// EnvBinDir names the directory that holds initdb and postgres.
	EnvBinDir = "ADVISORY_TEST_BINDIR"
)

// Help says how to have a server found, in two lines.
const Help = "Set " + EnvDSN + " to the URL of a running server, or install one\n" +
	"(apt-get install postgresql), or set " + EnvBinDir + " to its programs."

var (
	// ErrNoServer is returned by [Start] when there is no PostgreSQL to be
	// had on this machine.
	ErrNoServer = errors.New("pgtest: no PostgreSQL server")
	// ErrNotOwn is returned by the methods that only make sense for a server
	// that this process started.
	ErrNotOwn = errors.New("pgtest: not a server of our own (it was given by " + EnvDSN + ")")
	// ErrStopped is returned by the methods of a stopped server.
	ErrStopped = errors.New("pgtest: server is stopped")
)

const (
	// startTimeout bounds the wait for a server to accept connections.
	// Restart's comment names it.
	startTimeout = 30 * time.Second
	// pollInterval is how often a condition that cannot be waited for is
	// looked at.
	pollInterval = 10 * time.Millisecond
	// portAttempts is how many ports are tried before giving up.
	portAttempts = 10
)

// An Option changes how a server is started.
type Option func(*config)

type config struct {
	local    bool
	addr     string
	prefix   []string
	settings []setting
}

type setting struct{ name, value string }

// Setting sets a parameter in postgresql.conf, for example max_connections. A
// later setting of the same parameter wins. It cannot change a server that is
// given by ADVISORY_TEST_DSN: a test that depends on it needs [Local] too.
func Setting(name, value string) Option {
	return func(c *config) { c.settings = append(c.settings, setting{name, value}) }
}

// Local asks for a server of our own, which can be restarted and killed, even
// if ADVISORY_TEST_DSN is set.
func Local() Option {
	return func(c *config) { c.local = true }
}

// Listen makes the server listen on an IP address other than 127.0.0.1. The
// server trusts whoever can reach that address. It implies [Local].
func Listen(addr string) Option {
	return func(c *config) { c.local, c.addr = true, addr }
}

// Prefix runs the server by a command that takes another command as its last
// arguments, such as "ip", "netns", "exec", NAME. The prefix runs as the
// current user, also where the server itself runs as an unprivileged one. It
// implies [Local].
func Prefix(argv ...string) Option {
	return func(c *config) { c.local, c.prefix = true, argv }
}

// A Server is a PostgreSQL server. Its methods may be called from several
// goroutines.
type Server struct {
	dsn  string
	host string
	port int

	// The rest is set for a server of our own only.
	cfg    config
	bindir string
	box    *sandbox
	socket string // directory of the Unix-domain socket, "" if there is none

	mu       sync.Mutex
	stopped  bool
	proc     *process // nil while the server is down
	standbys []*Server
	poolers  []*Pooler
	launches int
}

// Start returns a PostgreSQL server: the one that ADVISORY_TEST_DSN names, or
// else a throw-away one. The programs for that come from the directory that
// ADVISORY_TEST_BINDIR names, or else from wherever this machine has them, or
// else from a download. The context bounds Start alone.
func Start(ctx context.Context, opts ...Option) (*Server, error) {
	cfg := newConfig(opts)
	if dsn := os.Getenv(EnvDSN); dsn != "" && !cfg.local {
		return open(ctx, dsn)
	}
	box, err := newSandbox()
	if err != nil {
		return nil, err
	}
	s := &Server{cfg: cfg, box: box}
	if err := s.create(ctx); err != nil {
		return nil, errors.Join(err, s.Stop())
	}
	return s, nil
}

func newConfig(opts []Option) config {
	c := config{addr: "127.0.0.1"}
	for _, opt := range opts {
		opt(&c)
	}
	return c
}

// open returns the running server that dsn names.
func open(ctx context.Context, dsn string) (*Server, error) {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	c, err := pgx.ParseConfig(dsn)
	if err != nil {
		return nil, fmt.Errorf("pgtest: %s: %w", EnvDSN, err)
	}
	if err := ping(ctx, dsn); err != nil {
		return nil, fmt.Errorf("pgtest: %s: %w", EnvDSN, err)
	}
	return &Server{dsn: dsn, host: c.Host, port: int(c.Port)}, nil
}

// create makes a new cluster and starts it.
func (s *Server) create(ctx context.Context) error {
	bindir, err := findBinaries(ctx, s.box, machine{})
	if err != nil {
		return err
	}
	s.bindir = bindir
	if err := s.box.run(ctx, filepath.Join(bindir, "initdb"),
		"-D", s.datadir(), "-U", "postgres", "-A", "trust", "-E", "UTF8", "--locale=C", "--no-sync"); err != nil {
		return err
	}
	return s.startOnFreePort(ctx, nil)
}

// startOnFreePort configures the cluster in s.datadir and starts it.
func (s *Server) startOnFreePort(ctx context.Context, extra []setting) error {
	if err := s.configureAccess(); err != nil {
		return err
	}
	var err error
	for range portAttempts {
		if s.port, err = freePort(); err != nil {
			return err
		}
		if err := s.configure(extra); err != nil {
			return err
		}
		if err = s.launch(ctx); !errors.Is(err, errPortTaken) {
			return err
		}
	}
	return err
}

// configureAccess lets in whoever can reach the addresses the server listens
// on: initdb's own pg_hba.conf knows loopback addresses only.
func (s *Server) configureAccess() error {
	const hba = `local all         all     trust
host  all         all all trust
host  replication all all trust
local replication all     trust
`
	return s.box.writeFile(filepath.Join(s.datadir(), "pg_hba.conf"), hba)
}

// configure writes postgresql.conf for s.port, and with it s.dsn.
func (s *Server) configure(extra []setting) error {
	s.host = s.cfg.addr
	s.dsn = (&url.URL{
		Scheme:   "postgres",
		User:     url.User("postgres"),
		Host:     net.JoinHostPort(s.host, strconv.Itoa(s.port)),
		Path:     "/postgres",
		RawQuery: "sslmode=disable",
	}).String()

	// The address of a Unix-domain socket has room for about 104 bytes.
	s.socket = s.box.dir
	if len(s.socket)+len("/.s.PGSQL.12345.lock") > 103 {
		s.socket = ""
	}

	settings := []setting{
		{"listen_addresses", s.cfg.addr},
		{"port", strconv.Itoa(s.port)},
		{"unix_socket_directories", s.socket},
		{"max_connections", "200"},
		{"shared_buffers", "64MB"},
		// Nothing here has to survive a crash of the machine. A crash of the
		// server is another matter: synchronous_commit stays on, or Kill
		// would lose transactions that were reported as committed.
		{"fsync", "off"},
		{"full_page_writes", "off"},
		// Enough for a standby to catch up from its copy.
		{"wal_keep_size", "128MB"},
		{"log_line_prefix", "%m [%p] %a "},
		// A warning is only half of a message without the statement that it is about.
		{"log_min_error_statement", "warning"},
	}
	settings = append(settings, extra...)
	settings = append(settings, s.cfg.settings...)

	var conf strings.Builder
	for _, p := range settings {
		fmt.Fprintf(&conf, "%s = %s\n", p.name, quote(p.value))
	}
	return s.box.writeFile(filepath.Join(s.datadir(), "postgresql.conf"), conf.String())
}

var errPortTaken = errors.New("pgtest: port is taken")

// launch starts the server program and waits until it accepts connections.
func (s *Server) launch(ctx context.Context) (err error) {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()

	s.launches++
	logged, _ := s.logSize() // 0 at the first start
	before := s.postmaster()
	proc, err := s.box.start(fmt.Sprintf("postgres-%d", s.launches), s.logfile(), s.cfg.prefix,
		filepath.Join(s.bindir, "postgres"), "-D", s.datadir())
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			proc.signal(syscall.SIGQUIT)
			proc.waitOrKill()
		}
	}()
	// Its own word in postmaster.pid comes first: until then, whoever answers
	// on the port may be another server.
	for !s.ready(before) {
		select {
		case <-proc.done:
			return s.startError(errors.New("postgres exited: "+proc.state()), logged)
		case <-ctx.Done():
			return s.startError(context.Cause(ctx), logged)
		case <-time.After(pollInterval):
		}
	}
	dsn := s.dsn
	if socket := s.SocketDSN(); len(s.cfg.prefix) > 0 && socket != "" {
		dsn = socket // the prefix may have put the server into a network of its own
	}
	if err := poll(ctx, func() error { return ping(ctx, dsn) }); err != nil {
		return s.startError(err, logged)
	}
	s.proc = proc
	return nil
}

// startError adds the end of the log to err, of what is after the first logged bytes.
func (s *Server) startError(err error, logged int64) error {
	log, logErr := s.logSince(logged)
	if logErr != nil {
		log = logErr.Error()
	}
	tail := lastLines(log)
	if strings.Contains(tail, "could not bind") {
		err = fmt.Errorf("%w: %w", errPortTaken, err)
	}
	return fmt.Errorf("pgtest: start PostgreSQL: %w; the end of its log:\n%s", err, tail)
}

// ready reports whether the postmaster says that it accepts connections. The
// status is the eighth line of postmaster.pid. A server that crashed leaves
// that file behind: before is what was in it.
func (s *Server) ready(before []string) bool {
	lines := s.postmaster()
	if len(lines) < 8 || slices.Equal(lines, before) {
		return false
	}
	status := strings.TrimSpace(lines[7])
	return status == "ready" || status == "standby"
}

// postmaster returns the lines of postmaster.pid, nil if there is none.
func (s *Server) postmaster() []string {
	b, err := os.ReadFile(filepath.Join(s.datadir(), "postmaster.pid"))
	if err != nil {
		return nil
	}
	return strings.Split(string(b), "\n")
}

func (s *Server) datadir() string { return filepath.Join(s.box.dir, "data") }

// DSN returns the server's connection string, which both pgx and lib/pq
// understand: a URL for a server of our own, else ADVISORY_TEST_DSN as given.
func (s *Server) DSN() string { return s.dsn }

// SocketDSN is like DSN, but by way of the Unix-domain socket, so that it
// works also while the network does not. It returns "" if there is no socket.
func (s *Server) SocketDSN() string {
	if s.socket == "" {
		return ""
	}
	q := url.Values{"host": {s.socket}, "port": {strconv.Itoa(s.port)}, "sslmode": {"disable"}}
	return "postgres://postgres@/postgres?" + encode(q)
}

// Host returns the address that the server listens on.
func (s *Server) Host() string { return s.host }

// Port returns the port that the server listens on.
func (s *Server) Port() int { return s.port }

// Own reports whether this process started the server and may restart it.
func (s *Server) Own() bool { return s.box != nil }

// lock returns nil with s.mu held if the server is one of our own and not
// stopped.
func (s *Server) lock() error {
	if !s.Own() {
		return ErrNotOwn
	}
	s.mu.Lock()
	if s.stopped {
		s.mu.Unlock()
		return ErrStopped
	}
	return nil
}

// Restart shuts the server down, in one of the modes that pg_ctl knows
// ("smart", "fast" or "immediate"), and starts it again with the same data on
// the same port. It starts a server that was killed. The shutdown and the start
// together may take as long as ctx allows, but not more than 30 s.
func (s *Server) Restart(ctx context.Context, mode string) error {
	sig, ok := map[string]syscall.Signal{
		"smart":     syscall.SIGTERM,
		"fast":      syscall.SIGINT,
		"immediate": syscall.SIGQUIT,
	}[mode]
	if !ok {
		return fmt.Errorf("pgtest: unknown restart mode %q", mode)
	}
	if err := s.lock(); err != nil {
		return err
	}
	defer s.mu.Unlock()

	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	if s.proc != nil {
		s.proc.signal(sig)
		select {
		case <-s.proc.done:
		case <-ctx.Done():
			return fmt.Errorf("pgtest: %s shutdown: %w", mode, context.Cause(ctx))
		}
		s.proc = nil
	}
	for {
		err := s.launch(ctx)
		// The clients know this port: wait for whoever came in between.
		if !errors.Is(err, errPortTaken) {
			return err
		}
		select {
		case <-ctx.Done():
			return err
		case <-time.After(10 * pollInterval):
		}
	}
}

// Kill crashes the server: its sessions end without a word, and what it had
// not written to its log is lost. [Server.Restart] brings it back.
func (s *Server) Kill() error {
	if err := s.lock(); err != nil {
		return err
	}
	defer s.mu.Unlock()
	if s.proc == nil {
		return nil
	}
	err := s.proc.crash()
	s.proc = nil
	return err
}

// Promote makes a standby a primary and waits until it is one.
func (s *Server) Promote(ctx context.Context) error {
	if err := s.lock(); err != nil {
		return err
	}
	defer s.mu.Unlock()
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	conn, err := pgx.Connect(ctx, s.dsn)
	if err != nil {
		return fmt.Errorf("pgtest: promote: %w", err)
	}
	defer conn.Close(context.WithoutCancel(ctx))
	if _, err := conn.Exec(ctx, "select pg_promote(wait => false)"); err != nil {
		return fmt.Errorf("pgtest: promote: %w", err)
	}
	if err := poll(ctx, func() error {
		return mustBeTrue(ctx, conn, "select not pg_is_in_recovery()")
	}); err != nil {
		return fmt.Errorf("pgtest: promote: %w", err)
	}
	return nil
}

// Stop stops the server, its standbys and its poolers, and removes everything
// they wrote. It does nothing to a server that is not our own, nor the second
// time.
func (s *Server) Stop() error {
	if !s.Own() {
		return nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.stopped {
		return nil
	}
	s.stopped = true
	var errs []error
	for _, standby := range s.standbys {
		errs = append(errs, standby.Stop())
	}
	for _, pooler := range s.poolers {
		errs = append(errs, pooler.Stop())
	}
	errs = append(errs, s.box.close())
	if s.proc != nil {
		s.proc.waitOrKill()
		s.proc = nil
	}
	return errors.Join(errs...)
}

// freePort returns a TCP port that nobody listens on right now.
//
// It comes from below the range that systems take the ports of outgoing
// connections from: else, while the server is down, a client that keeps
// trying to connect may be given the very port as its own and then be
// connected to itself.
func freePort() (int, error) {
	const low, high = 10000, 30000
	var err error
	for range 100 {
		port := low + rand.IntN(high-low)
		var l net.Listener
		if l, err = net.Listen("tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(port))); err == nil {
			return port, l.Close()
		}
	}
	return 0, fmt.Errorf("pgtest: no free port: %w", err)
}

// ping connects to the server once.
func ping(ctx context.Context, dsn string) error {
	conn, err := pgx.Connect(ctx, dsn)
	if err != nil {
		return err
	}
	defer conn.Close(context.WithoutCancel(ctx))
	return conn.Ping(ctx)
}

// poll calls f until it returns nil or ctx is done.
func poll(ctx context.Context, f func() error) error {
	for {
		err := f()
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%w: %w", context.Cause(ctx), err)
		case <-time.After(pollInterval):
		}
	}
}

// mustBeTrue returns an error unless the query's answer is true.
func mustBeTrue(ctx context.Context, conn *pgx.Conn, query string) error {
	var ok bool
	if err := conn.QueryRow(ctx, query).Scan(&ok); err != nil {
		return err
	}
	if !ok {
		return fmt.Errorf("not yet: %s", query)
	}
	return nil
}

// quote quotes a value, for postgresql.conf and for a connection string alike.
func quote(v string) string {
	return "'" + strings.NewReplacer(`\`, `\\`, `'`, `\'`).Replace(v) + "'"
}

// encode encodes parameters for a URL that is a DSN. Like libpq, pgx takes a
// plus sign for a plus sign.
func encode(q url.Values) string {
	return strings.ReplaceAll(q.Encode(), "+", "%20")
}

// tailOf returns the last lines of a file.
func tailOf(name string) string {
	b, err := os.ReadFile(name)
	if err != nil {
		return err.Error()
	}
	return lastLines(string(b))
}

func lastLines(text string) string {
	lines := strings.Split(strings.TrimSpace(text), "\n")
	return strings.Join(lines[max(0, len(lines)-20):], "\n")
}

// WithParam returns dsn, in either form, with a connection parameter set, such
// as application_name.
func WithParam(dsn, key, value string) (string, error) {
	if !strings.HasPrefix(dsn, "postgres://") && !strings.HasPrefix(dsn, "postgresql://") {
		return strings.TrimSpace(dsn + " " + key + "=" + quote(value)), nil
	}
	u, err := url.Parse(dsn)
	if err != nil {
		return "", fmt.Errorf("pgtest: DSN: %w", err)
	}
	q := u.Query()
	// What is in the first part of a URL must be changed there: which of two values
	// counts is the driver's secret.
	switch {
	case key == "host" && u.Host != "" && !strings.HasPrefix(value, "/"):
		u.Host = hostPort(value, u.Port())
		q.Del(key)
	case key == "port" && u.Host != "":
		u.Host = hostPort(u.Hostname(), value)
		q.Del(key)
	case key == "dbname" && len(u.Path) > 1:
		u.Path = "/" + value
		q.Del(key)
	default:
		q.Set(key, value)
	}
	u.RawQuery = encode(q)
	return u.String(), nil
}

// hostPort is net.JoinHostPort for a port that may be missing.
func hostPort(host, port string) string {
	if port == "" && !strings.Contains(host, ":") {
		return host
	}
	return strings.TrimSuffix(net.JoinHostPort(host, port), ":")
}
