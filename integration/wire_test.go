package integration

import (
	"bytes"
	"encoding/binary"
	"io"
	"net"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/pgadvisory/advisory/integration/internal/pgtest"
	"github.com/pgadvisory/advisory/integration/internal/testkit"
)

// A wire stands between a pool and the server and records the statements that pass.
type wire struct {
	dsn    string
	server *pgtest.Server
	delay  time.Duration // of the answers

	mu         sync.Mutex
	statements []string
}

func newWire(t testing.TB) *wire { return newWireTo(t, server, 0) }

func newWireTo(t testing.TB, server *pgtest.Server, delay time.Duration) *wire {
	t.Helper()
	w := &wire{server: server, delay: delay}
	_, port, _ := net.SplitHostPort(testkit.Serve(t, w.serve).String())
	w.dsn = withParams(t, server.DSN(), "host", "127.0.0.1", "port", port, "sslmode", "disable")
	return w
}

func (w *wire) serve(client net.Conn) {
	backend, err := net.Dial("tcp", net.JoinHostPort(w.server.Host(), strconv.Itoa(w.server.Port())))
	if err != nil {
		return
	}
	defer backend.Close()
	go func() {
		defer client.Close()
		answer := make([]byte, 1<<16)
		for {
			n, err := backend.Read(answer)
			time.Sleep(w.delay)
			if _, werr := client.Write(answer[:n]); err != nil || werr != nil {
				return
			}
		}
	}()
	prepared := make(map[string]string)
	for first := true; ; first = false {
		// The first message has no type (PostgreSQL manual, "Message Formats").
		var head [5]byte
		from := 0
		if first {
			from = 1
		}
		if _, err := io.ReadFull(client, head[from:]); err != nil {
			return
		}
		body := make([]byte, binary.BigEndian.Uint32(head[1:])-4)
		if _, err := io.ReadFull(client, body); err != nil {
			return
		}
		switch head[0] {
		case 'Q':
			w.record(string(bytes.TrimRight(body, "\x00")))
		case 'P': // a statement is prepared
			name, query, _ := bytes.Cut(body, []byte{0})
			query, _, _ = bytes.Cut(query, []byte{0})
			prepared[string(name)] = string(query)
		case 'B': // and executed
			_, name, _ := bytes.Cut(body, []byte{0})
			name, _, _ = bytes.Cut(name, []byte{0})
			w.record(prepared[string(name)])
		}
		if _, err := backend.Write(append(head[from:], body...)); err != nil {
			return
		}
	}
}

func (w *wire) record(statement string) {
	if statement == "-- ping" {
		return // pgx looks after connections that were idle
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.statements = append(w.statements, statement)
}

// take returns what passed since it was called last.
func (w *wire) take() []string {
	w.mu.Lock()
	defer w.mu.Unlock()
	s := w.statements
	w.statements = nil
	return s
}
