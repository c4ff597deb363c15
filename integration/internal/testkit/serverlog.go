package testkit

import (
	"context"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/pgadvisory/advisory/integration/internal/pgtest"
)

// An operator reads the server's log, and nothing that the package does in normal operation
// belongs there. So each test asserts what its applications have not written to it.

// logs is what is known of the servers of our own, and of the tests that are under way.
var logs struct {
	sync.Mutex
	kept    []keptLog
	watches map[testing.TB]*logWatch
	allowed map[string][]string // by the test's name
}

// A keptLog is the log of a server of the test with that name. All tests share the one of "".
type keptLog struct {
	test   string
	server *pgtest.Server
}

func keepLog(test string, server *pgtest.Server) {
	logs.Lock()
	defer logs.Unlock()
	if server.Own() {
		logs.kept = append(logs.kept, keptLog{test, server})
	}
}

// keepLogFor keeps the log of a server that ends with the test, and has it looked at before that.
func keepLogFor(t testing.TB, server *pgtest.Server) {
	keepLog(t.Name(), server)
	w := watchOf(t)
	t.Cleanup(func() {
		w.check()
		logs.Lock()
		defer logs.Unlock()
		logs.kept = slices.DeleteFunc(logs.kept, func(k keptLog) bool { return k.server == server })
	})
}

// ofTest reports whether the test of that name is another one's, or a part of it.
func ofTest(name, another string) bool {
	return another == "" || name == another || strings.HasPrefix(name, another+"/")
}

// A logWatch looks after the applications of one test.
type logWatch struct {
	t    testing.TB
	name string // of the application whose DSN has none
	mu   sync.Mutex
	apps []string
	seen map[*pgtest.Server]int64 // how much of the log
}

// watchOf returns the watch of the test, which is begun if there is none.
func watchOf(t testing.TB) *logWatch {
	logs.Lock()
	defer logs.Unlock()
	if w := logs.watches[t]; w != nil {
		return w
	}
	w := &logWatch{t: t, name: applicationName(t), seen: map[*pgtest.Server]int64{}}
	for _, k := range logs.kept {
		if ofTest(t.Name(), k.test) {
			w.seen[k.server], _ = k.server.LogSize() // 0 if that fails: more to read
		}
	}
	if logs.watches == nil {
		logs.watches = map[testing.TB]*logWatch{}
	}
	logs.watches[t] = w
	t.Cleanup(func() {
		w.check()
		logs.Lock()
		defer logs.Unlock()
		delete(logs.watches, t)
		delete(logs.allowed, t.Name())
	})
	return w
}

// applicationName returns one that no other test has, as the server will write it: the server
// cuts names at 63 bytes, and knows ASCII alone.
func applicationName(t testing.TB) string {
	ascii := strings.Map(func(r rune) rune {
		if r <= ' ' || r > '~' {
			return '_'
		}
		return r
	}, t.Name())
	number := Unique("")
	return ascii[:min(len(ascii), 63-len(number))] + number
}

// WatchLog returns dsn with an application_name that is the test's alone, unless it has one. When
// the test ends, and what it opened is closed, what was opened with that name must not have
// written anything to the log of a server of ours at WARNING or above, but for what AllowLog
// allows. Processes that the test starts are watched if this is the DSN that they get.
//
// It comes before what is opened: cleanups run in reverse order.
func WatchLog(t testing.TB, dsn string) (watched string) {
	t.Helper()
	config, err := pgx.ParseConfig(dsn)
	if err != nil {
		t.Fatal(err)
	}
	w := watchOf(t)
	name := config.RuntimeParams["application_name"]
	if name == "" {
		name = w.name
		if dsn, err = pgtest.WithParam(dsn, "application_name", name); err != nil {
			t.Fatal(err)
		}
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if !slices.Contains(w.apps, name) {
		w.apps = append(w.apps, name)
	}
	return dsn
}

// AllowLog says which messages are the test's own doing, or that of its subtests: those with one of
// the parts in any of their lines, be it the statement that they are about.
func AllowLog(t testing.TB, parts ...string) {
	t.Helper()
	watchOf(t)
	logs.Lock()
	defer logs.Unlock()
	if logs.allowed == nil {
		logs.allowed = map[string][]string{}
	}
	logs.allowed[t.Name()] = append(logs.allowed[t.Name()], parts...)
}

// shownMessages is how many messages a failure shows, and shownBytes how much of each.
const shownMessages, shownBytes = 10, 1000

// check fails the test if there is anything in the logs that was not there before. It may be
// called again.
func (w *logWatch) check() {
	w.t.Helper()
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.apps) == 0 {
		return
	}
	logs.Lock()
	var servers []*pgtest.Server
	for _, k := range logs.kept {
		if ofTest(w.t.Name(), k.test) {
			servers = append(servers, k.server)
		}
	}
	var allowed []string
	for test, parts := range logs.allowed {
		if ofTest(w.t.Name(), test) {
			allowed = append(allowed, parts...)
		}
	}
	logs.Unlock()

	var found []string
	for _, s := range servers {
		if err := awaitEnd(s, w.apps); err != nil {
			w.t.Error(err)
		}
		log, err := s.LogSince(w.seen[s])
		if err != nil {
			w.t.Error(err)
		}
		w.seen[s] += int64(len(log))
		found = append(found, complaints(log, w.apps)...)
	}
	found = slices.DeleteFunc(found, func(message string) bool {
		return slices.ContainsFunc(allowed, func(part string) bool { return strings.Contains(message, part) })
	})
	if n := len(found); n > 0 {
		var shown strings.Builder
		for _, message := range found[:min(n, shownMessages)] {
			shown.WriteString(strings.TrimSpace(message[:min(len(message), shownBytes)]) + "\n")
		}
		w.t.Errorf("the test's applications have written %d messages at WARNING or above to the server's log; the first of them:\n%s", n, &shown)
	}
}

// awaitEnd waits until the sessions of the applications have ended, or have nothing more to say.
// The server may notice later than the client that a connection is closed.
func awaitEnd(s *pgtest.Server, apps []string) error {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	dsn := s.SocketDSN() // which is there also if the network is not
	if dsn == "" {
		dsn = s.DSN()
	}
	conn, err := pgx.Connect(ctx, dsn)
	if err != nil {
		return nil // a server that is down has no sessions
	}
	defer conn.Close(context.WithoutCancel(ctx))
	for {
		// Sessions that have been idle for a while are a pooler's, or those of a process that
		// was frozen or cut off.
		var query string
		err := conn.QueryRow(ctx, `SELECT query FROM pg_stat_activity WHERE application_name = ANY($1)
			AND NOT coalesce(state LIKE 'idle%' AND state_change < clock_timestamp() - interval '100 ms', false) LIMIT 1`, apps).Scan(&query)
		switch {
		case errors.Is(err, pgx.ErrNoRows):
			return nil
		case ctx.Err() != nil:
			return fmt.Errorf("a session of the test goes on after its end: %s", query)
		case err != nil:
			return err
		}
		time.Sleep(2 * time.Millisecond)
	}
}

// level is how a message begins, or a line that adds to it.
var level = regexp.MustCompile(`^(?:(WARNING|ERROR|FATAL|PANIC)|DETAIL|HINT|QUERY|CONTEXT|LOCATION|BACKTRACE|STATEMENT):  `)

// complaints returns the messages at WARNING or above that the applications have written to a log,
// with all lines of each. The server writes a message in one piece.
func complaints(log string, apps []string) (found []string) {
	inside := false
	for line := range strings.Lines(log) {
		begins, adds := ofApplication(line, apps)
		inside = begins || inside && (adds || strings.HasPrefix(line, "\t"))
		switch {
		case begins:
			found = append(found, line)
		case inside:
			found[len(found)-1] += line
		}
	}
	return found
}

// ofApplication reports whether a line begins such a message of one of the applications, or adds
// to one.
func ofApplication(line string, apps []string) (begins, adds bool) {
	_, text, _ := strings.Cut(line, "] ") // after the process id
	for _, app := range apps {
		text, ok := strings.CutPrefix(text, app+" ")
		if m := level.FindStringSubmatch(text); ok && m != nil {
			return m[1] != "", m[1] == ""
		}
	}
	return false, false
}
