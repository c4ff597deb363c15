//go:build linux

package integration

import (
	"bufio"
	"bytes"
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"slices"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/pgadvisory/advisory"
	"github.com/pgadvisory/advisory/integration/internal/history"
)

// A child is a process that runs one of the children functions. It reports events on
// its standard output, and takes orders, a line each, on its standard input, whose end
// is the end of it.
type child struct {
	t     testing.TB
	cmd   *exec.Cmd
	stdin io.WriteCloser
	done  chan struct{} // closed when it has exited

	mu     sync.Mutex
	events []report
	stderr syncBuffer
}

// A report is an event of a child process.
type report struct {
	What string        `json:"what"`
	Key  string        `json:"key,omitempty"`
	At   time.Duration `json:"at"` // by history.Now
	Err  string        `json:"err,omitempty"`
	Lost bool          `json:"lost,omitempty"` // the error matches ErrLost
}

// argsEnv holds, as JSON, what a child function is called with.
const argsEnv = "ADVISORY_TEST_ARGS"

// startChild starts the child function name with args, in a process that is killed with
// this one at the latest. prefix is a command that runs another.
func startChild(t testing.TB, name string, args any, prefix ...string) *child {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	text, err := json.Marshal(args)
	if err != nil {
		t.Fatal(err)
	}
	argv := append(slices.Clone(prefix), exe)
	c := &child{t: t, cmd: exec.Command(argv[0], argv[1:]...), done: make(chan struct{})}
	c.cmd.Env = append(os.Environ(), childEnv+"="+name, argsEnv+"="+string(text))
	c.cmd.Stderr = &c.stderr
	// A frozen process does not see the end of its standard input.
	c.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	c.stdin, err = c.cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := c.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	allowLog(t, clientGone) // it is killed, whatever it has asked the server
	if err := c.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.kill)
	go func() {
		defer close(c.done)
		lines := json.NewDecoder(stdout)
		for {
			var e report
			if err := lines.Decode(&e); err != nil {
				break
			}
			c.mu.Lock()
			c.events = append(c.events, e)
			c.mu.Unlock()
		}
		_ = c.cmd.Wait()
	}()
	return c
}

func (c *child) kill() {
	c.signal(syscall.SIGKILL)
	<-c.done
}

func (c *child) signal(sig syscall.Signal) {
	select {
	case <-c.done: // its number may be another's
	default:
		_ = c.cmd.Process.Signal(sig)
	}
}

// freeze stops the process, and returns when all of its threads have stopped.
func (c *child) freeze() {
	c.signal(syscall.SIGSTOP)
	waitFor(c.t, "the process is stopped", func() (bool, error) {
		status, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", c.cmd.Process.Pid))
		if err != nil {
			return false, err
		}
		_, state, _ := bytes.Cut(status, []byte(") "))
		return bytes.HasPrefix(state, []byte("T")), nil
	})
}

func (c *child) order(what string) {
	c.t.Helper()
	if _, err := fmt.Fprintln(c.stdin, what); err != nil {
		c.t.Fatal(err)
	}
}

// find returns the event what of a key.
func (c *child) find(what, key string) (report, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	i := slices.IndexFunc(c.events, func(e report) bool { return e.What == what && e.Key == key })
	if i < 0 {
		return report{}, false
	}
	return c.events[i], true
}

// all returns what the process has reported.
func (c *child) all() []report {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.Clone(c.events)
}

// await waits until the event what of a key is reported.
func (c *child) await(what, key string) (e report) {
	c.t.Helper()
	waitFor(c.t, fmt.Sprintf("a child process reports %s %s", what, key), func() (ok bool, err error) {
		if e, ok = c.find(what, key); ok {
			return true, nil
		}
		select {
		case <-c.done:
			err = fmt.Errorf("it has exited: %s", c.stderr.String())
		default:
		}
		return false, err
	})
	return e
}

// childArgs reads what a child function was called with.
func childArgs(args any) {
	if err := json.Unmarshal([]byte(os.Getenv(argsEnv)), args); err != nil {
		panic(err)
	}
}

var reporting sync.Mutex

// tell reports an event of this child process.
func tell(what, key string, err error) {
	e := report{What: what, Key: key, At: history.Now(), Lost: errors.Is(err, advisory.ErrLost)}
	if err != nil {
		e.Err = err.Error()
	}
	reporting.Lock()
	defer reporting.Unlock()
	if err := json.NewEncoder(os.Stdout).Encode(e); err != nil {
		os.Exit(3) // there is nobody to report to
	}
}

// holderArgs is what the child function holder is called with.
type holderArgs struct {
	Driver, DSN              string
	Keys                     []string
	Stagger                  time.Duration // between the keys' heartbeats
	Sessions                 int           // that the keys are dealt out to, with a pool for each; 0: one
	Heartbeat, HolderTimeout time.Duration
}

func (a holderArgs) options() []advisory.Option {
	return []advisory.Option{advisory.Heartbeat(a.Heartbeat), advisory.HolderTimeout(a.HolderTimeout)}
}

func init() {
	children["holder"] = holder
}

// holder holds locks until it is ordered to release them or loses them. It reports
// "held", then "told" or "releasing", then "returned".
func holder() int {
	var a holderArgs
	childArgs(&a)
	i := slices.IndexFunc(drivers, func(d driver) bool { return d.name == a.Driver })
	pools := make([]*sql.DB, max(1, a.Sessions))
	for p := range pools {
		var err error
		if pools[p], err = drivers[i].openDB(a.DSN); err != nil {
			tell("failed", "", err)
			return 1
		}
	}
	release := make(chan struct{})
	go func() {
		orders := bufio.NewScanner(os.Stdin)
		for orders.Scan() {
			if orders.Text() == "release" {
				close(release)
			}
		}
		os.Exit(0)
	}()
	for i, key := range a.Keys {
		db := pools[i%len(pools)]
		held := make(chan struct{})
		go func() {
			err := advisory.WithLock(context.Background(), db, advisory.Name(key), func(ctx context.Context) error {
				tell("held", key, nil)
				close(held)
				select {
				case <-ctx.Done():
					tell("told", key, context.Cause(ctx))
				case <-release:
					tell("releasing", key, nil)
				}
				return nil
			}, a.options()...)
			tell("returned", key, err)
		}()
		<-held
		time.Sleep(a.Stagger)
	}
	select {}
}

// keysOf returns n keys of the test, as the child function holder takes them.
func keysOf(t testing.TB, n int) (keys []string) {
	for i := range n {
		keys = append(keys, fmt.Sprintf("%s %d", t.Name(), i))
	}
	return keys
}

// A succession is the attempts to take the locks of holders that fail.
type succession struct {
	t       testing.TB
	wg      sync.WaitGroup
	release context.CancelFunc

	mu    sync.Mutex
	begun map[string]time.Duration
}

// succeed waits for each of keys, from this process with a pool for each, and holds it.
func succeed(t testing.TB, d driver, dsn string, keys []string) *succession {
	t.Helper()
	ctx, release := context.WithCancel(context.Background())
	s := &succession{t: t, release: release, begun: map[string]time.Duration{}}
	t.Cleanup(s.end)
	for _, key := range keys {
		db := d.open(t, dsn)
		s.wg.Go(func() {
			if err := advisory.WithLock(ctx, db, advisory.Name(key), func(context.Context) error {
				now := history.Now()
				s.mu.Lock()
				s.begun[key] = now
				s.mu.Unlock()
				<-ctx.Done()
				return nil
			}); err != nil && ctx.Err() == nil {
				t.Errorf("successor: %v", err)
			}
		})
	}
	return s
}

// await returns when the successor for key began, once it has.
func (s *succession) await(key string) (at time.Duration) {
	s.t.Helper()
	waitFor(s.t, "a successor begins with "+key, func() (ok bool, err error) {
		s.mu.Lock()
		defer s.mu.Unlock()
		at, ok = s.begun[key]
		return ok, nil
	})
	return at
}

// wantNone fails the test if a successor has begun.
func (s *succession) wantNone() {
	s.t.Helper()
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.begun) > 0 {
		s.t.Errorf("successors have begun: %v", s.begun)
	}
}

func (s *succession) end() {
	s.release()
	s.wg.Wait()
}

// startHolder starts a child that holds n keys on so many sessions, waits until the server
// has heard a heartbeat of each, and has successors wait for them.
func startHolder(t testing.TB, d driver, n, sessions int) (*child, holderArgs, *succession) {
	t.Helper()
	a := holderArgs{
		Driver: d.name, DSN: watchLog(t, withParams(t, server.DSN(), "application_name", appName(t))),
		Keys: keysOf(t, n), Sessions: sessions, Stagger: 31 * time.Millisecond,
		Heartbeat: shortHeartbeat, HolderTimeout: shortTimeout,
	}
	c := startChild(t, "holder", a)
	for _, key := range a.Keys {
		c.await("held", key)
	}
	waitForHeartbeats(t, adminDB(t), appName(t), sessions, serverTime(t, adminDB(t)))
	s := succeed(t, d, server.DSN(), a.Keys)
	for _, key := range a.Keys {
		waitForWaiters(t, adminDB(t), advisory.Name(key), 1)
	}
	return c, a, s
}

func TestKilledHolderIsSucceededAtOnce(t *testing.T) {
	bothDrivers(t, func(t *testing.T, d driver) {
		c, a, s := startHolder(t, d, 9, 6)
		s.wantNone()
		killed := history.Now()
		c.signal(syscall.SIGKILL)
		var took []time.Duration
		for _, key := range a.Keys {
			took = append(took, s.await(key)-killed)
		}
		logBound(t, "SIGKILL "+d.name, "successor begins", time.Second, took)
	})
}

func TestFrozenHolderIsSucceededAfterHolderTimeout(t *testing.T) {
	bothDrivers(t, func(t *testing.T, d driver) {
		allowLog(t, silent)
		c, a, s := startHolder(t, d, 9, 6)
		s.wantNone()
		frozen := history.Now()
		c.freeze()
		oldest := lastHeard(t, a.Sessions)

		var took []time.Duration
		for _, key := range a.Keys {
			begun := s.await(key)
			took = append(took, begun-frozen)
			// The query of lastHeard takes a few milliseconds.
			if early := oldest + a.HolderTimeout - begun; early > 20*time.Millisecond {
				t.Errorf("succeeded %v before HolderTimeout was over", early)
			}
		}
		logBound(t, "SIGSTOP "+d.name, "successor begins", a.HolderTimeout+time.Second, took)
		for _, key := range a.Keys {
			if e, ok := c.find("told", key); ok {
				t.Fatalf("the process was not frozen: %+v", e)
			}
		}

		thawed := history.Now()
		c.signal(syscall.SIGCONT)
		took = nil
		for _, key := range a.Keys {
			e := c.await("told", key)
			took = append(took, e.At-thawed)
			if r := c.await("returned", key); !e.Lost || !r.Lost {
				t.Errorf("cause %q, then error %q, want ErrLost", e.Err, r.Err)
			}
		}
		logBound(t, "SIGCONT "+d.name, "holder told", 500*time.Millisecond, took)
	})
}

// lastHeard returns the earliest moment at which the server heard last of one of the
// holders. The holders are so many sessions of the test's application.
func lastHeard(t *testing.T, sessions int) time.Duration {
	t.Helper()
	rows, err := adminDB(t).Query(`
		SELECT extract(epoch FROM clock_timestamp() - state_change)::float8 FROM pg_stat_activity
		WHERE application_name = $1 AND pid IN (SELECT pid FROM pg_locks WHERE locktype = 'advisory' AND granted)`, appName(t))
	if err != nil {
		t.Fatal(err)
	}
	defer rows.Close()
	asked := history.Now()
	oldest := asked
	n := 0
	for ; rows.Next(); n++ {
		var age float64
		if err := rows.Scan(&age); err != nil {
			t.Fatal(err)
		}
		oldest = min(oldest, asked-time.Duration(age*float64(time.Second)))
	}
	if n != sessions || rows.Err() != nil {
		t.Fatalf("%d sessions hold the locks, want %d (%v)", n, sessions, rows.Err())
	}
	return oldest
}

// A process may fall silent while it waits, and be given the lock then.
func TestFrozenWaiterIsSucceededAfterHolderTimeout(t *testing.T) {
	bothDrivers(t, func(t *testing.T, d driver) {
		const silence = time.Second
		allowLog(t, silent)
		successor := d.open(t, server.DSN())
		var took []time.Duration
		for i := range 2 {
			name := fmt.Sprint(t.Name(), i)
			key := advisory.Name(name)
			release := hold(t, adminDB(t), key)
			c := startChild(t, "holder", holderArgs{
				Driver: d.name, DSN: watchLog(t, server.DSN()), Keys: []string{name}, Heartbeat: 300 * time.Millisecond, HolderTimeout: silence,
			})
			waitForWaiters(t, adminDB(t), key, 1)
			c.freeze()
			release()
			released := history.Now()
			if err := advisory.WithLock(soon(t), successor, key, func(context.Context) error { return nil }); err != nil {
				t.Fatal(err)
			}
			took = append(took, history.Now()-released)
			c.signal(syscall.SIGCONT)
			c.kill()
		}
		logBound(t, "SIGSTOP waiter "+d.name, "successor begins", silence+time.Second, took)
	})
}

// A holder that is frozen for less than a heartbeat keeps its lock.
func TestShortFreezeLosesNothing(t *testing.T) {
	bothDrivers(t, func(t *testing.T, d driver) {
		c, a, s := startHolder(t, d, 1, 1)
		for range 3 {
			c.freeze()
			time.Sleep(a.Heartbeat / 4)
			c.signal(syscall.SIGCONT)
			waitForHeartbeats(t, adminDB(t), appName(t), 1, serverTime(t, adminDB(t)))
		}
		s.wantNone()
		c.order("release")
		if e := c.await("returned", a.Keys[0]); e.Err != "" {
			t.Error(e.Err)
		}
		s.await(a.Keys[0])
	})
}
