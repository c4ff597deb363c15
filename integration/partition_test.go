//go:build linux

package integration

import (
	"database/sql"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/pgadvisory/advisory"
	"github.com/pgadvisory/advisory/integration/internal/history"
	"github.com/pgadvisory/advisory/integration/internal/pgtest"
)

// A network is two network namespaces, one for a server and one for its clients, joined
// by a bridge in a third one. They are connected to nothing else.
type network struct {
	t                      testing.TB
	server, client, middle string
}

// The addresses come from a range for documentation. Nobody outside sees them.
const (
	serverAddr = "192.0.2.1"
	clientAddr = "192.0.2.2"
	serverMAC  = "02:00:00:00:00:01"
	clientMAC  = "02:00:00:00:00:02"
)

const namespacePrefix = "advisory-test-" // then the process ID of the test, and a number

var networks struct {
	sync.Mutex
	n     int
	swept bool
}

// newNetwork makes a network that is removed with the test.
func newNetwork(t testing.TB) *network {
	t.Helper()
	networks.Lock()
	defer networks.Unlock()
	if !networks.swept {
		sweepNamespaces()
		networks.swept = true
	}
	networks.n++
	name := fmt.Sprintf("%s%d-%d", namespacePrefix, os.Getpid(), networks.n)
	n := &network{t: t, server: name + "-server", client: name + "-client", middle: name + "-middle"}

	t.Cleanup(func() {
		for _, ns := range []string{n.server, n.client, n.middle} {
			_ = ip("netns", "delete", ns) // which need not have come to exist
		}
	})
	// If even this is not allowed, nothing of it is.
	for _, ns := range []string{n.middle, n.server, n.client} {
		require(t, "netns", ip("netns", "add", ns))
	}
	require(t, "netns", ip("-n", n.middle, "link", "add", "bridge0", "type", "bridge"))
	n.ip("-n", n.middle, "link", "set", "bridge0", "up")
	for _, end := range []struct{ ns, port, addr, mac, peerAddr, peerMAC string }{
		{n.server, "server0", serverAddr, serverMAC, clientAddr, clientMAC},
		{n.client, "client0", clientAddr, clientMAC, serverAddr, serverMAC},
	} {
		n.ip("-n", n.middle, "link", "add", end.port, "type", "veth", "peer", "name", "eth0", "netns", end.ns)
		n.ip("-n", n.middle, "link", "set", end.port, "master", "bridge0", "up")
		n.ip("-n", end.ns, "link", "set", "lo", "up")
		n.ip("-n", end.ns, "link", "set", "eth0", "address", end.mac, "up")
		n.ip("-n", end.ns, "address", "add", end.addr+"/24", "dev", "eth0")
		// A neighbour that does not answer ARP any more would be an error that the
		// client's kernel reports, and no silence.
		n.ip("-n", end.ns, "neighbour", "add", end.peerAddr, "lladdr", end.peerMAC, "dev", "eth0", "nud", "permanent")
	}
	return n
}

// cut has all packets lost, both ways, without a word to either side: their links stay up.
func (n *network) cut() { n.ip("-n", n.middle, "link", "set", "client0", "nomaster") }

func (n *network) heal() { n.ip("-n", n.middle, "link", "set", "client0", "master", "bridge0") }

func (n *network) ip(args ...string) {
	n.t.Helper()
	if err := ip(args...); err != nil {
		n.t.Fatal(err)
	}
}

func ip(args ...string) error {
	out, err := exec.Command("ip", args...).CombinedOutput()
	if err != nil {
		err = fmt.Errorf("ip %s: %w: %s", strings.Join(args, " "), err, out)
	}
	return err
}

// sweepNamespaces removes what tests have left that were killed.
func sweepNamespaces() {
	list, err := exec.Command("ip", "netns", "list").Output()
	if err != nil {
		return
	}
	for line := range strings.Lines(string(list)) {
		name, _, _ := strings.Cut(strings.TrimSpace(line), " ")
		rest, ours := strings.CutPrefix(name, namespacePrefix)
		pid, _, _ := strings.Cut(rest, "-")
		if n, err := strconv.Atoi(pid); ours && err == nil && errors.Is(syscall.Kill(n, 0), syscall.ESRCH) {
			_ = ip("netns", "delete", name)
		}
	}
}

// startServer starts a server in the network. The test itself reaches it by way of its
// socket, which no cut concerns.
func (n *network) startServer() *pgtest.Server {
	n.t.Helper()
	s := ownServer(n.t, pgtest.Prefix("ip", "netns", "exec", n.server), pgtest.Listen(serverAddr))
	if s.SocketDSN() == "" {
		n.t.Skip("the server has no socket")
	}
	return s
}

// A partition is the fault for which a lock has to be a lease: neither side can tell it
// from a slow network. The old holder must give up before the server does.
func TestPartitionedHolderGivesUpBeforeItsSuccessorBegins(t *testing.T) {
	const (
		events = 5 // partitions
		each   = 4 // sessions with a lock in each, their heartbeats out of step
	)
	t.Parallel()
	n := newNetwork(t)
	s := n.startServer()
	admin, err := sql.Open("pgx", s.SocketDSN())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { admin.Close() })

	bothDrivers(t, func(t *testing.T, d driver) {
		allowLog(t, silent)
		a := holderArgs{
			Driver: d.name, DSN: watchLog(t, withParams(t, s.DSN(), "application_name", appName(t))), Sessions: each,
			Heartbeat: shortHeartbeat, HolderTimeout: shortTimeout, Stagger: 53 * time.Millisecond,
		}
		t.Cleanup(n.heal)
		var p partitions
		for event := range events {
			for i := range each {
				a.Keys = append(a.Keys[:i], fmt.Sprintf("%s %d %d", t.Name(), event, i))
			}
			c := startChild(t, "holder", a, "ip", "netns", "exec", n.client)
			for _, key := range a.Keys {
				c.await("held", key)
			}
			waitForHeartbeats(t, admin, appName(t), each, serverTime(t, admin))
			succession := succeed(t, d, s.SocketDSN(), a.Keys)
			for _, key := range a.Keys {
				waitForWaiters(t, admin, advisory.Name(key), 1)
			}
			succession.wantNone()

			cut := history.Now()
			n.cut()
			for _, key := range a.Keys {
				p.succeed(t, c, key, cut, succession.await(key))
			}
			for _, key := range a.Keys {
				if e := c.await("returned", key); !e.Lost {
					t.Errorf("the old holder's error: %q, want ErrLost", e.Err)
				}
			}
			c.kill()
			succession.end()
			n.heal()
		}
		if len(p.took) != 20 {
			t.Errorf("%d runs, want 20", len(p.took))
		}
		logBound(t, "partition "+d.name, "holder told", 2*a.Heartbeat+600*time.Millisecond, p.told)
		logBound(t, "partition "+d.name, "successor begins", a.HolderTimeout+time.Second, p.took)
		t.Logf("bound: %-20s | %-32s | n %3d | min %7.0f ms", "partition "+d.name, "from told to begins", len(p.lead), milliseconds(slices.Min(p.lead)))
	})
}

// partitions are the times of each lock whose holder was cut off.
type partitions struct {
	told []time.Duration // from the cut until the holder was told
	took []time.Duration // from the cut until its successor began
	lead []time.Duration // from the one to the other
}

// succeed notes when a successor began, and fails the test unless the old holder c was told
// before.
func (p *partitions) succeed(t *testing.T, c *child, key string, cut, begun time.Duration) {
	t.Helper()
	p.took = append(p.took, begun-cut)
	e, ok := c.find("told", key)
	if !ok {
		t.Fatalf("a successor has begun, and the old holder has not been told")
	}
	p.told = append(p.told, e.At-cut)
	p.lead = append(p.lead, begun-e.At)
	if begun <= e.At {
		t.Errorf("a successor began %v before the old holder was told", e.At-begun)
	}
	if !e.Lost {
		t.Errorf("the old holder was told %q, want ErrLost", e.Err)
	}
}

// A release has its own bound, also with a driver that does not return from a
// statement that nobody answers.
func TestReleaseIsBoundedInAPartition(t *testing.T) {
	t.Parallel()
	n := newNetwork(t)
	s := n.startServer()

	const bound = 8 * time.Second
	holders := map[string]*child{}
	var key []string
	for _, d := range drivers[:2] {
		key = keysOf(t, 1)
		a := holderArgs{
			Driver: d.name, DSN: watchLog(t, s.DSN()), Keys: []string{key[0] + d.name},
			Heartbeat: time.Minute, HolderTimeout: time.Hour, // the release alone notices
		}
		holders[d.name] = startChild(t, "holder", a, "ip", "netns", "exec", n.client)
		holders[d.name].await("held", a.Keys[0])
	}
	n.cut()
	for _, c := range holders {
		c.order("release")
	}
	for name, c := range holders {
		e := c.await("returned", key[0]+name)
		if !e.Lost {
			t.Errorf("%s: %q, want ErrLost", name, e.Err)
		}
		begun, _ := c.find("releasing", key[0]+name)
		logBound(t, "partition "+name, "release returns", bound, []time.Duration{e.At - begun.At})
	}
}
