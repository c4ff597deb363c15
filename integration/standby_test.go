package integration

import (
	"context"
	"database/sql"
	"errors"
	"io"
	"log/slog"
	"net"
	"strconv"
	"strings"
	"sync"
	"testing"

	"github.com/pgadvisory/advisory"
	"github.com/pgadvisory/advisory/integration/internal/pgtest"
	"github.com/pgadvisory/advisory/integration/internal/testkit"
)

// An endpoint leads to one server, and then to another, as a name or a balancer does at a switch-over.
type endpoint struct {
	mu    sync.Mutex
	to    *pgtest.Server
	conns []net.Conn
	addr  net.Addr
}

func newEndpoint(t *testing.T, to *pgtest.Server) *endpoint {
	e := &endpoint{to: to}
	e.addr = testkit.Serve(t, func(client net.Conn) {
		e.mu.Lock()
		addr := net.JoinHostPort(e.to.Host(), strconv.Itoa(e.to.Port()))
		e.mu.Unlock()
		server, err := net.Dial("tcp", addr)
		if err != nil {
			return
		}
		defer server.Close()
		e.mu.Lock()
		e.conns = append(e.conns, client, server)
		e.mu.Unlock()
		go func() {
			_, _ = io.Copy(server, client)
			server.Close()
		}()
		_, _ = io.Copy(client, server)
	})
	t.Cleanup(e.cut)
	return e
}

// lead has new connections lead to a server, and ends those that there are.
func (e *endpoint) lead(to *pgtest.Server) {
	e.mu.Lock()
	e.to = to
	e.mu.Unlock()
	e.cut()
}

func (e *endpoint) cut() {
	e.mu.Lock()
	defer e.mu.Unlock()
	for _, c := range e.conns {
		c.Close()
	}
	e.conns = nil
}

func (e *endpoint) dsn(t *testing.T) string {
	_, port, err := net.SplitHostPort(e.addr.String())
	if err != nil {
		t.Fatal(err)
	}
	return "postgres://postgres@127.0.0.1:" + port + "/postgres?sslmode=disable"
}

func (b *syncBuffer) option() advisory.Option {
	return advisory.Logger(slog.New(slog.NewTextHandler(b, nil)))
}

// The locks of a standby would exclude nobody on the primary. There are none, and who asks for one is
// told why.
func TestStandbyIsNoPlaceForALock(t *testing.T) {
	primary := ownServer(t)
	standby := testkit.Standby(t, primary)
	bothDrivers(t, func(t *testing.T, d driver) {
		allowLog(t, "cannot set transaction read-write mode during recovery") // the BEGIN of lib/pq
		there := d.open(t, standby.DSN())

		t.Run("wait", func(t *testing.T) { testWaitAtTheStandby(t, there) })
		t.Run("a free lock", func(t *testing.T) { testFreeLockAtTheStandby(t, there) })
		t.Run("Lead", func(t *testing.T) { testLeadOverASwitchOver(t, d, primary, standby) })
		t.Run("wait over a switch-over", func(t *testing.T) {
			for _, w := range openers {
				testWaitOverASwitchOver(t, d, w, primary, standby, there)
			}
		})
	})
}

// saysStandby is what an error says, and the Logger, where the server is a standby.
const saysStandby = "hot standby"

// testWaitAtTheStandby waits for locks that are held at the standby.
func testWaitAtTheStandby(t *testing.T, there *sql.DB) {
	for _, w := range queuers {
		key := advisory.Name(t.Name() + w.name)
		hold(t, there, key)
		err := w.with(soon(t), there, key, noWork)
		if err == nil || !strings.Contains(err.Error(), saysStandby) || errors.Is(err, advisory.ErrNotAcquired) {
			t.Errorf("%s: error %v", w.name, err)
		}
	}
}

// testFreeLockAtTheStandby asks for locks that nobody holds.
func testFreeLockAtTheStandby(t *testing.T, there *sql.DB) {
	for _, w := range queuers {
		works := func(context.Context, querier) error {
			t.Errorf("%s works at the standby", w.name)
			return nil
		}
		key := advisory.Name(t.Name() + w.name)
		if err := w.with(soon(t), there, key, works); err == nil || !strings.Contains(err.Error(), saysStandby) {
			t.Errorf("%s: error %v", w.name, err)
		}
		if err := w.with(soon(t), there, key, works, advisory.NoWait()); err == nil {
			t.Errorf("%s, NoWait: no error", w.name)
		}
	}
}

// testLeadOverASwitchOver has a campaign begin at the standby, and go on at the primary.
func testLeadOverASwitchOver(t *testing.T, d driver, primary, standby *pgtest.Server) {
	e := newEndpoint(t, standby)
	db := d.open(t, e.dsn(t))
	var log syncBuffer
	led := make(chan bool, 1)
	ctx, cancel := context.WithCancel(soon(t))
	defer cancel()
	done := make(chan error, 1)
	go func() {
		done <- advisory.Lead(ctx, db, testKey(t), func(ctx context.Context) error {
			primary, err := isTrue(db, "SELECT NOT pg_is_in_recovery()")
			led <- primary && err == nil
			return err
		}, log.option())
	}()
	waitFor(t, "a campaign has failed at the standby", func() (bool, error) {
		return strings.Contains(log.String(), saysStandby), nil
	})
	e.lead(primary)
	if primary := <-led; !primary {
		t.Error("fn has run at the standby")
	}
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// testWaitOverASwitchOver has a wait begin at the primary, meet the standby, and go on at
// the primary.
func testWaitOverASwitchOver(t *testing.T, d driver, w way, primary, standby *pgtest.Server, there *sql.DB) {
	e := newEndpoint(t, primary)
	db := d.open(t, e.dsn(t))
	holder := d.open(t, primary.DSN())
	key := advisory.Name(t.Name() + w.name)
	release := hold(t, holder, key)
	var log syncBuffer
	done := make(chan error, 1)
	go func() { done <- w.with(soon(t), db, key, workAtThePrimary, log.option()) }()
	waitForWaiters(t, holder, key, 1)
	blocker := hold(t, there, key) // so that WithConnLock and WithTxLock wait there, too
	e.lead(standby)
	waitFor(t, w.name+" has met the standby", func() (bool, error) {
		return strings.Contains(log.String(), saysStandby), nil
	})
	e.lead(primary)
	waitForWaiters(t, holder, key, 1)
	release()
	if err := <-done; err != nil {
		t.Errorf("%s: %v", w.name, err)
	}
	blocker()
}

// workAtThePrimary fails at the standby.
func workAtThePrimary(ctx context.Context, q querier) error {
	var standby bool
	if err := q.QueryRowContext(ctx, "SELECT pg_is_in_recovery()").Scan(&standby); err != nil || standby {
		return errors.Join(err, errors.New("fn has run at the standby"))
	}
	return nil
}
