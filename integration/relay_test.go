package integration

import (
	"encoding/binary"
	"io"
	"net"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgproto3"

	"github.com/pgadvisory/advisory/integration/internal/pgtest"
	"github.com/pgadvisory/advisory/integration/internal/testkit"
)

// A relay stands between a pool and the server. It does to the pool what a network, a pooler or a
// server that is away does.
type relay struct {
	server *pgtest.Server
	dsn    string
	port   string
	closed chan struct{} // with the test

	mu       sync.Mutex
	links    map[*link]bool
	dials    []dial                   // that answerDials has answered
	dialing  func() []byte            // answers new connections; nil: the server does
	answer   func(text string) []byte // what a client gets instead of the server's answer, before its connection ends
	swallow  func(text string) bool   // begins the silence
	silentAt time.Time                // the moment from which nothing passes; zero: everything does
	seen     []string                 // what the clients have sent
}

// A link is a connection of a client.
type link struct {
	client, server net.Conn
	mu             sync.Mutex // guards writes to the client
}

// A dial is an attempt to connect.
type dial struct{ began, ended time.Time }

func newRelay(t testing.TB, server *pgtest.Server) *relay {
	t.Helper()
	r := &relay{server: server, closed: make(chan struct{}), links: map[*link]bool{}}
	_, r.port, _ = net.SplitHostPort(testkit.Serve(t, r.serve).String())
	r.dsn = withParams(t, server.DSN(), "host", "127.0.0.1", "port", r.port, "sslmode", "disable")
	t.Cleanup(r.close)
	return r
}

// close ends all connections, for good.
func (r *relay) close() {
	select {
	case <-r.closed:
	default:
		close(r.closed)
	}
	r.cut(nil)
}

// cut ends all connections. The clients get a last message.
func (r *relay) cut(last []byte) {
	r.mu.Lock()
	links := r.links
	r.links = map[*link]bool{}
	r.mu.Unlock()
	for l := range links {
		l.end(last)
	}
}

func (l *link) end(last []byte) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if last != nil {
		_, _ = l.client.Write(last)
	}
	l.client.Close()
	l.server.Close()
}

// answerDials has new connections get what f returns, and then their end. nil: the server answers them.
func (r *relay) answerDials(f func() []byte) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.dialing = f
}

// answerStatements has clients get what f returns for what they send, unless that is nil, and then the
// end of their connection. nil: everything passes.
func (r *relay) answerStatements(f func(text string) []byte) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.answer = f
}

// silenceAt has nothing pass, in either direction and on no connection, from the first statement that
// is one of those that which finds.
func (r *relay) silenceAt(which func(text string) bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.swallow = which
}

// silence has nothing pass from now on.
func (r *relay) silence() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.silentAt = time.Now()
}

// silent returns whether the silence has begun.
func (r *relay) silent() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return !r.silentAt.IsZero()
}

// dialed returns the attempts to connect that answerDials has answered.
func (r *relay) dialed() []dial {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.dials)
}

// sent returns what clients have sent: the texts of statements, and the arguments of prepared ones.
func (r *relay) sent() []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.seen)
}

const cancelRequest = 80877102 // PostgreSQL manual, "Message Formats"

func (r *relay) serve(client net.Conn) {
	began := time.Now()
	var head [5]byte
	startup, err := readMessage(client, head[1:])
	if err != nil {
		return
	}
	cancels := binary.BigEndian.Uint32(startup[4:]) == cancelRequest
	r.mu.Lock()
	dialing := r.dialing
	r.mu.Unlock()
	switch {
	case r.silent():
		<-r.closed
		return
	case dialing != nil && cancels:
		return
	case dialing != nil:
		last := dialing()
		r.mu.Lock()
		r.dials = append(r.dials, dial{began, time.Now()}) // before the client, told of it, begins another
		r.mu.Unlock()
		_, _ = client.Write(last)
		return
	}
	server, err := net.Dial("tcp", net.JoinHostPort(r.server.Host(), strconv.Itoa(r.server.Port())))
	if err != nil {
		return
	}
	l := &link{client: client, server: server}
	r.mu.Lock()
	r.links[l] = true
	r.mu.Unlock()
	defer func() {
		r.mu.Lock()
		delete(r.links, l)
		r.mu.Unlock()
		l.end(nil)
	}()
	select {
	case <-r.closed: // before the link was there to be cut
		return
	default:
	}
	go r.bringAnswers(l)
	prepared := make(map[string]string) // statements, by their names
	for message := startup; ; {
		if !r.silent() {
			if _, err := server.Write(message); err != nil {
				return
			}
		}
		if message, err = readMessage(client, head[:]); err != nil {
			return
		}
		if last := r.look(message, prepared); last != nil {
			l.end(last)
			return
		}
	}
}

// readMessage reads a message that begins with head, the last four bytes of which are its length.
func readMessage(from net.Conn, head []byte) ([]byte, error) {
	if _, err := io.ReadFull(from, head); err != nil {
		return nil, err
	}
	length := int(binary.BigEndian.Uint32(head[len(head)-4:])) - 4
	message := append(slices.Clone(head), make([]byte, max(0, length))...)
	_, err := io.ReadFull(from, message[len(head):])
	return message, err
}

// look notes a message, and returns what is the answer to it, if that is not the server's.
func (r *relay) look(message []byte, prepared map[string]string) []byte {
	text := string(message[5:])
	switch message[0] {
	case 'Q':
	case 'P':
		name, query, _ := strings.Cut(text, "\x00")
		prepared[name] = query
	case 'B':
		_, name, _ := strings.Cut(text, "\x00")
		name, _, _ = strings.Cut(name, "\x00")
		text += prepared[name]
	default:
		return nil
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.seen = append(r.seen, text)
	if r.silentAt.IsZero() && r.swallow != nil && r.swallow(text) {
		r.silentAt = time.Now()
	}
	if r.answer != nil {
		return r.answer(text)
	}
	return nil
}

func (r *relay) bringAnswers(l *link) {
	defer l.end(nil)
	b := make([]byte, 1<<16)
	for {
		n, err := l.server.Read(b)
		if !r.silent() {
			l.mu.Lock()
			_, werr := l.client.Write(b[:n])
			l.mu.Unlock()
			if werr != nil {
				return
			}
		}
		if err != nil {
			if r.silent() { // the client is not told
				<-r.closed
			}
			return
		}
	}
}

// fatal is the message with which a server, or a pooler, ends a connection.
func fatal(code, text string) []byte {
	b, err := (&pgproto3.ErrorResponse{Severity: "FATAL", SeverityUnlocalized: "FATAL", Code: code, Message: text}).Encode(nil)
	if err != nil {
		panic(err)
	}
	return b
}

// refusing answers a new connection with a fatal error.
func refusing(code, text string) func() []byte {
	return func() []byte { return fatal(code, text) }
}

// allAtOnce runs a part of the test for each of cases, all at the same time, whatever -parallel says:
// they wait, most of the time.
func allAtOnce[C any](t *testing.T, cases []C, name func(C) string, body func(t *testing.T, c C)) {
	t.Helper()
	allTogether(t, cases, name, func(t *testing.T, c C, _ func()) { body(t, c) })
}

// allTogether is allAtOnce. Each part may call meet, which returns when all have called it or have ended.
func allTogether[C any](t *testing.T, cases []C, name func(C) string, body func(t *testing.T, c C, meet func())) {
	t.Helper()
	var parts, missing sync.WaitGroup
	missing.Add(len(cases))
	for _, c := range cases {
		parts.Go(func() {
			come := sync.OnceFunc(missing.Done)
			defer come() // also if -run leaves it out
			t.Run(name(c), func(t *testing.T) {
				defer come()
				body(t, c, func() {
					come()
					missing.Wait()
				})
			})
		})
	}
	parts.Wait()
}

// bothAtOnce is bothDrivers, both at the same time.
func bothAtOnce(t *testing.T, body func(t *testing.T, d driver)) {
	t.Helper()
	allAtOnce(t, drivers[:2], func(d driver) string { return d.name }, body)
}
