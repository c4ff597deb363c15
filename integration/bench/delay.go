package main

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"sync"
	"time"
)

// A delay is a TCP proxy that hands on everything a while after it came. It adds to the
// latency and takes nothing from the throughput: while one chunk waits for its time,
// others come in.
type delay struct {
	listener net.Listener
	target   string
	time     time.Duration

	line  chan chunk
	done  chan struct{}
	group sync.WaitGroup

	mu    sync.Mutex
	conns map[net.Conn]struct{} // nil when closed
}

// A chunk is on its way.
type chunk struct {
	due  time.Time
	to   *net.TCPConn
	data []byte // nil: the end of the stream
}

// newDelay returns a proxy for target that delays what goes in either direction.
func newDelay(target string, d time.Duration) (*delay, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	p := &delay{
		listener: l, target: target, time: d,
		line: make(chan chunk, 1<<16), done: make(chan struct{}),
		conns: make(map[net.Conn]struct{}),
	}
	p.group.Go(p.accept)
	p.group.Go(p.deliver)
	return p, nil
}

func (p *delay) addr() string { return p.listener.Addr().String() }

// Close ends the proxy and its connections.
func (p *delay) Close() error {
	close(p.done)
	err := p.listener.Close()
	p.mu.Lock()
	for c := range p.conns {
		c.Close()
	}
	p.conns = nil
	p.mu.Unlock()
	p.group.Wait()
	return err
}

func (p *delay) accept() {
	for {
		client, err := p.listener.Accept()
		if err != nil {
			return
		}
		p.group.Go(func() { p.connect(client.(*net.TCPConn)) })
	}
}

// connect connects client with the target until both have said all they have to say.
func (p *delay) connect(client *net.TCPConn) {
	defer p.forget(client)
	if !p.remember(client) {
		return
	}
	conn, err := net.Dial("tcp", p.target)
	if err != nil {
		return
	}
	server := conn.(*net.TCPConn) // TCP_NODELAY is Go's default
	defer p.forget(server)
	if !p.remember(server) {
		return
	}
	var both sync.WaitGroup
	both.Go(func() { p.read(client, server) })
	both.Go(func() { p.read(server, client) })
	both.Wait()
	// What they said is still on its way.
	select {
	case <-time.After(p.time + time.Second):
	case <-p.done:
	}
}

func (p *delay) remember(c net.Conn) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.conns == nil {
		return false
	}
	p.conns[c] = struct{}{}
	return true
}

func (p *delay) forget(c net.Conn) {
	c.Close()
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.conns, c)
}

// read puts on the line what comes from one side.
func (p *delay) read(from, to *net.TCPConn) {
	buf := make([]byte, 32<<10)
	for {
		n, err := from.Read(buf)
		due := time.Now().Add(p.time)
		if n > 0 && !p.put(chunk{due, to, append([]byte(nil), buf[:n]...)}) {
			return
		}
		if err != nil {
			p.put(chunk{due: due, to: to})
			return
		}
	}
}

func (p *delay) put(c chunk) bool {
	select {
	case p.line <- c:
		return true
	case <-p.done:
		return false
	}
}

// deliver hands on what is on the line when it is due. There is one line for all the
// connections: what came first is due first. A side that does not read would hold up
// the others, but those that talk here all wait for their answers.
func (p *delay) deliver() {
	for {
		select {
		case c := <-p.line:
			if wait := time.Until(c.due); wait > 0 {
				sleep(wait)
			}
			// If the connection is broken, its reader finds that out.
			if c.data == nil {
				_ = c.to.CloseWrite()
			} else if _, err := c.to.Write(c.data); err != nil {
				_ = c.to.CloseRead()
			}
		case <-p.done:
			return
		}
	}
}

// A delayOrder tells a process what to delay.
type delayOrder struct {
	Target string
	Time   time.Duration
}

// startDelay starts a proxy in a process of its own, where it does not share the
// scheduler and the memory of what is measured, and returns its address.
func startDelay(ctx context.Context, target string, d time.Duration) (addr string, stop func() error, err error) {
	c, err := startChild("delay")
	if err != nil {
		return "", nil, err
	}
	if err := c.ask(delayOrder{target, d}, &addr); err != nil {
		return "", nil, errors.Join(err, c.Close())
	}
	return addr, c.Close, ctx.Err()
}

// delayJob is the process that startDelay starts.
func delayJob(_ context.Context, from *json.Decoder, to *json.Encoder) error {
	var o delayOrder
	if err := from.Decode(&o); err != nil {
		return err
	}
	p, err := newDelay(o.Target, o.Time)
	if err != nil {
		return err
	}
	defer p.Close()
	if err := to.Encode(p.addr()); err != nil {
		return err
	}
	if err := from.Decode(&o); !errors.Is(err, io.EOF) {
		return err
	}
	return nil
}
