package main

import (
	"bytes"
	"crypto/rand"
	"io"
	"net"
	"testing"
	"time"

	"github.com/pgadvisory/advisory/integration/internal/testkit"
)

// echo listens for connections and sends back what comes over them.
func echo(t *testing.T) (addr string) {
	t.Helper()
	return testkit.Serve(t, func(c net.Conn) { _, _ = io.Copy(c, c) }).String()
}

// delayed connects with an echo behind a delay.
func delayed(t *testing.T, d time.Duration) *net.TCPConn {
	t.Helper()
	p, err := newDelay(echo(t), d)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.Close() })
	c, err := net.Dial("tcp", p.addr())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c.(*net.TCPConn)
}

func TestDelayAddsToEachDirection(t *testing.T) {
	const d = 20 * time.Millisecond
	c := delayed(t, d)
	for range 3 {
		start := time.Now()
		if _, err := c.Write([]byte("x")); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(c, make([]byte, 1)); err != nil {
			t.Fatal(err)
		}
		// A machine may be slow, but not that slow.
		if took := time.Since(start); took < 2*d || took > 2*d+time.Second {
			t.Errorf("a round trip took %v, want %v", took, 2*d)
		}
	}
}

// What is sent while something waits for its time does not wait for that, too; and it
// all arrives, and in order.
func TestDelayKeepsThroughput(t *testing.T) {
	const d, chunks = 20 * time.Millisecond, 200
	c := delayed(t, d)
	want := make([]byte, 1000*chunks)
	rand.Read(want)
	start := time.Now()
	go func() {
		for part := want; len(part) > 0; part = part[1000:] {
			if _, err := c.Write(part[:1000]); err != nil {
				return // and the other side gets less than it wants
			}
		}
		_ = c.CloseWrite()
	}()
	got, err := io.ReadAll(c)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Errorf("got %d bytes that differ from the %d that were sent", len(got), len(want))
	}
	if took := time.Since(start); took > chunks*d/4 {
		t.Errorf("took %v: the chunks waited for each other", took)
	}
}

func TestDelayEndsItsConnections(t *testing.T) {
	p, err := newDelay(echo(t), time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	c, err := net.Dial("tcp", p.addr())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}
	_ = c.SetReadDeadline(time.Now().Add(10 * time.Second))
	if _, err := c.Read(make([]byte, 1)); err == nil {
		t.Error("the connection is still there")
	} else if e, ok := err.(net.Error); ok && e.Timeout() {
		t.Error("the connection is still open")
	}
}
