package integration

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"os/exec"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/pgadvisory/advisory"
	"github.com/pgadvisory/advisory/integration/internal/pgtest"
	"github.com/pgadvisory/advisory/integration/internal/testkit"
)

// requirePooler returns the pooler that has been started, or skips the test if there is none.
func requirePooler(t *testing.T, name string) func(*pgtest.Pooler, error) *pgtest.Pooler {
	return func(p *pgtest.Pooler, err error) *pgtest.Pooler {
		t.Helper()
		if errors.Is(err, exec.ErrNotFound) {
			require(t, name, err)
		}
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if log, err := p.Log(); t.Failed() && err == nil {
				t.Logf("the end of %s's log:\n%s", name, log[max(0, len(log)-4000):])
			}
			if err := p.Stop(); err != nil {
				t.Error(err)
			}
		})
		return p
	}
}

// settings are parameters of a pooler: name, value, name, value...
func settings(params ...string) (opts []pgtest.PoolOption) {
	for i := 0; i < len(params); i += 2 {
		opts = append(opts, pgtest.PoolSetting(params[i], params[i+1]))
	}
	return opts
}

// A balancer cuts off who is silent for longer than its timeouts. Neither a holder nor a waiter is.
func TestSilenceThatABalancerCutsOff(t *testing.T) {
	t.Parallel()
	s := ownServer(t)
	dsn := requirePooler(t, "haproxy")(s.HAProxy(t.Context(), settings("timeout client", "3s", "timeout server", "3s")...)).DSN()
	const holds = 20 * time.Second
	// Not as parallel tests: all that it takes is time.
	var wg sync.WaitGroup
	for _, d := range drivers[:2] {
		silent, err := d.open(t, dsn).Conn(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		defer silent.Close()
		key, holder, waiter, direct := advisory.Name(t.Name()+d.name), d.open(t, dsn), d.open(t, dsn), d.open(t, s.DSN())
		wg.Go(func() {
			waited := make(chan error, 1)
			err := advisory.WithLock(t.Context(), holder, key, func(ctx context.Context) error {
				began := time.Now()
				go func() { waited <- waitInSilence(t.Context(), waiter, key, began, holds) }()
				sleep(ctx, holds/2)
				waitForWaiters(t, direct, key, 1)
				sleep(ctx, holds/2)
				return context.Cause(ctx)
			})
			if err != nil {
				t.Errorf("%s: holder: %v", d.name, err)
			}
			if err := <-waited; err != nil {
				t.Errorf("%s: waiter: %v", d.name, err)
			}
			if err := silent.PingContext(t.Context()); err == nil {
				t.Errorf("%s: the balancer has not cut off who was silent", d.name)
			}
		})
	}
	wg.Wait()
}

// waitInSilence waits for a lock that another holds. It returns an error if it has the lock
// before the holder is done, or not at all.
func waitInSilence(ctx context.Context, db *sql.DB, key advisory.Key, began time.Time, holds time.Duration) error {
	err := withLock.with(ctx, db, key, noWork, advisory.Timeout(2*holds))
	if took := time.Since(began); took < holds {
		err = errors.Join(err, fmt.Errorf("it was granted after %v", took))
	}
	return err
}

// sleep returns after d, or when ctx ends.
func sleep(ctx context.Context, d time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(d):
	}
}

// A wait goes on over a restart of the server, whatever a pooler says meanwhile.
func TestWaitOutlivesARestartBehindAPooler(t *testing.T) {
	t.Parallel()
	for _, pooler := range []struct {
		name  string
		start func(context.Context, *pgtest.Server) (*pgtest.Pooler, error)
	}{
		{"haproxy", func(ctx context.Context, s *pgtest.Server) (*pgtest.Pooler, error) { return s.HAProxy(ctx) }},
		{"pgbouncer", func(ctx context.Context, s *pgtest.Server) (*pgtest.Pooler, error) {
			return s.Pooler(ctx, pgtest.Session)
		}},
		// As it is by default, Pgpool-II detaches a server that is restarted, and says from then on,
		// until it is told otherwise, that all servers are down.
		{"pgpool", func(ctx context.Context, s *pgtest.Server) (*pgtest.Pooler, error) {
			return s.Pgpool(ctx, nil, settings("backend_flag0", "DISALLOW_TO_FAILOVER")...)
		}},
	} {
		t.Run(pooler.name, func(t *testing.T) {
			t.Parallel()
			s := ownServer(t)
			p := requirePooler(t, pooler.name)(pooler.start(t.Context(), s))
			for _, mode := range []string{"fast", "immediate"} {
				t.Run(mode, func(t *testing.T) {
					if mode == "fast" {
						allowLog(t, terminated)
					}
					testWaitOutlivesARestart(t, drivers[:2], s, p.DSN(), mode)
				})
			}
		})
	}
}

// Pgpool-II sends to the primary what calls a volatile function, unless its lists of functions say
// otherwise. Then it sends some statements of a lock to a standby, and others to the primary.
func TestPgpool(t *testing.T) {
	t.Parallel()
	primary := ownServer(t)
	standbys := []*pgtest.Server{testkit.Standby(t, primary)}
	// Nothing is sent to the primary that may be sent to the standby.
	balanced := func(params ...string) []pgtest.PoolOption {
		return settings(append([]string{"backend_weight0", "0"}, params...)...)
	}
	listed := []string{"write_function_list", "nextval,setval"}
	for i, test := range []struct {
		name     string
		standbys []*pgtest.Server
		opts     []pgtest.PoolOption
		holds    time.Duration
		wrong    bool // Check may say so
	}{
		{name: "one server", opts: settings("load_balance_mode", "off"), holds: 3 * time.Second},
		{name: "balanced", standbys: standbys, holds: 3 * time.Second,
			opts: balanced("statement_level_load_balance", "on", "allow_sql_comments", "on", "disable_load_balance_on_write", "off")},
		{name: "listed functions", standbys: standbys, opts: balanced(listed...), wrong: true},
		{name: "listed functions and patterns", standbys: standbys,
			opts: balanced(append(listed, "primary_routing_query_pattern_list", ".*advisory.*;.*pg_is_in_recovery.*")...)},
		{name: "listed functions of locks", standbys: standbys,
			opts: balanced("write_function_list", "nextval,setval,.*advisory.*,.*pg_is_in_recovery")},
		{name: "listed functions and applications", standbys: standbys,
			opts: balanced(append(listed, "app_name_redirect_preference_list", "TestPgpool.*:primary")...)},
	} {
		ds := drivers[:2]
		if test.holds == 0 {
			ds = ds[i%2 : i%2+1] // both would show the same
		}
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			p := requirePooler(t, "pgpool")(primary.Pgpool(t.Context(), test.standbys, test.opts...))
			for _, d := range ds {
				t.Run(d.name, func(t *testing.T) {
					t.Parallel()
					if err := advisory.Check(soon(t), d.open(t, p.DSN())); err != nil && !(test.wrong && strings.Contains(err.Error(), "hot standby")) {
						t.Errorf("Check: %v", err)
					}
					testLocksBehindPgpool(t, d, primary, p, max(test.holds, 100*time.Millisecond))
				})
			}
		})
	}
}

// testLocksBehindPgpool wants no two holders at a time, or to be told that a lock is on a standby.
func testLocksBehindPgpool(t *testing.T, d driver, primary *pgtest.Server, p *pgtest.Pooler, holds time.Duration) {
	const goroutines, increments = 4, 4
	direct := d.open(t, primary.DSN())
	pools := []*sql.DB{d.open(t, p.DSN()), d.open(t, p.DSN())}
	for _, db := range pools {
		db.SetMaxOpenConns(6) // of Pgpool-II's 32
	}
	serializable := withTxLock
	serializable.name += ", serializable"
	serializable.run = func(ctx context.Context, db *sql.DB, key advisory.Key, fn work, o options) error {
		o.acquire = append(o.acquire, advisory.TxOptions(&sql.TxOptions{Isolation: sql.LevelSerializable}))
		return withTxLock.run(ctx, db, key, fn, o)
	}
	told := func(err error) bool { return err != nil && strings.Contains(err.Error(), "hot standby") }

	// The holder's heartbeats go on while others come and go.
	held, release := make(chan error, 1), make(chan error, 1)
	key, granted := testKey(t), make(chan struct{})
	go func() {
		held <- advisory.WithLock(t.Context(), pools[0], key, func(ctx context.Context) error {
			close(granted)
			select {
			case <-ctx.Done():
				return context.Cause(ctx)
			case err := <-release:
				return err
			}
		})
		close(held)
	}()
	began, waited := time.Now(), make(chan error, 1)
	select {
	case <-granted:
		go func() { waited <- withLock.with(soon(t), pools[1], key, noWork) }()
	case <-time.After(10 * time.Second):
		t.Error("no lock")
	}

	eachWay(t, []way{withLock, withConnLock, withTxLock, serializable}, func(t *testing.T, w way) {
		key, c := testKey(t), newCounter(t, direct)
		var done atomic.Int64
		err := concurrently(goroutines, increments, func(i int) error {
			err := w.with(soon(t), pools[i%2], key, func(ctx context.Context, _ querier) error {
				done.Add(1)
				return c.increment(ctx, direct) // a standby would be behind
			})
			if told(err) {
				return nil
			}
			return err
		})
		if err != nil {
			t.Error(err)
		}
		c.wantValue(t, direct, int(done.Load()))
		wantFree(t, direct, key)
	})
	t.Run("Lead", func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), 500*time.Millisecond)
		defer cancel()
		key := testKey(t)
		var leaders, most atomic.Int64
		var wg sync.WaitGroup
		for _, db := range pools {
			wg.Go(func() {
				_ = advisory.Lead(ctx, db, key, func(ctx context.Context) error {
					n := leaders.Add(1)
					defer leaders.Add(-1)
					most.Store(max(most.Load(), n))
					<-ctx.Done()
					return nil
				})
			})
		}
		wg.Wait()
		if n := most.Load(); n > 1 {
			t.Errorf("%d leaders at a time", n)
		}
		wantFree(t, direct, key)
	})

	select {
	case err := <-waited:
		t.Errorf("another has got the lock, too (%v)", err)
	case err := <-held:
		if !told(err) {
			t.Errorf("holder: %v", err)
		}
	case <-time.After(time.Until(began.Add(holds))):
	}
	release <- nil
	for who, errs := range map[string]chan error{"holder": held, "waiter": waited} {
		select {
		case err := <-errs:
			if err != nil && !told(err) {
				t.Errorf("%s: %v", who, err)
			}
		case <-time.After(10 * time.Second):
			t.Errorf("%s: no end", who)
		}
	}
}

// pg_terminate_backend is how a lock is broken by hand. To Pgpool-II it is a failure of the server, if
// it may detach the server. Then nobody gets a lock, until it is told to attach the server.
func TestLockThatIsBrokenBehindPgpool(t *testing.T) {
	t.Parallel()
	allowLog(t, terminated)
	for i, test := range []struct {
		name     string
		opts     []pgtest.PoolOption
		detached bool // Pgpool-II detaches the server
		orNot    bool // or does not
	}{
		{name: "default", detached: true},
		// Most often. It depends on which of its processes finds the loss first, and how.
		{name: "no failover on shutdown", opts: settings("failover_on_backend_shutdown", "off"), detached: true, orNot: true},
		{name: "no failover", opts: settings("failover_on_backend_shutdown", "off", "failover_on_backend_error", "off")},
		{name: "disallowed", opts: settings("backend_flag0", "DISALLOW_TO_FAILOVER")},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			s := ownServer(t)
			p := requirePooler(t, "pgpool")(s.Pgpool(t.Context(), nil, test.opts...))
			ds := drivers[:2]
			wait := 10 * time.Second
			if test.detached {
				ds, wait = ds[i:i+1], 2*time.Second // there will be no second one
			}
			for _, d := range ds {
				waiter, another := breakLockBehindPgpool(t, d, s, p, wait)
				const says = "pgpool is not accepting any new connections"
				detached := waiter != nil && another != nil && strings.Contains(another.Error(), says)
				// The session on which the waiter is granted the lock may be one that Pgpool-II is about to end.
				goesOn := (waiter == nil || errors.Is(waiter, advisory.ErrLost)) && another == nil
				if detached != test.detached && !test.orNot || !detached && !goesOn {
					t.Errorf("the waiter: %v; a new connection: %v", waiter, another)
				}
			}
		})
	}
}

// breakLockBehindPgpool ends a holder's session. It returns what becomes of the one who
// waits for the lock, and of a new connection.
func breakLockBehindPgpool(t *testing.T, d driver, s *pgtest.Server, p *pgtest.Pooler, wait time.Duration) (waiter, another error) {
	t.Helper()
	key, direct := advisory.Name(t.Name()+d.name), d.open(t, s.DSN())
	db := d.open(t, p.DSN())
	lock, err := advisory.Acquire(t.Context(), db, key)
	if err != nil {
		t.Fatal(err)
	}
	result := make(chan error, 1)
	ctx, cancel := context.WithTimeout(t.Context(), wait)
	defer cancel()
	other := d.open(t, p.DSN())
	go func() { result <- withLock.with(ctx, other, key, noWork) }()
	waitForWaiters(t, direct, key, 1)
	if _, err := direct.Exec(`SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory'`); err != nil {
		t.Fatal(err)
	}
	if !awaitLoss(t, lock.Context()) {
		t.Error("the holder is not told")
	}
	wantLost(t, "Release", lock.Release())
	waiter = <-result
	_, another = d.open(t, p.DSN()).Exec("SELECT")
	return waiter, another
}
