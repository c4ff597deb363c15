//go:build unix

package main

import (
	"context"
	"database/sql"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/pgadvisory/advisory"
	"github.com/pgadvisory/advisory/integration/internal/pgtest"
	"github.com/pgadvisory/advisory/integration/internal/proctest"
	"github.com/pgadvisory/advisory/integration/internal/testkit"
)

var server *pgtest.Server

// replicaEnv makes a process of this binary a replica of the service.
const replicaEnv = "ADVISORY_TEST_SERVICE"

func TestMain(m *testing.M) {
	switch os.Getenv(replicaEnv) {
	case "":
	case "as it is":
		main()
		os.Exit(0)
	case "deaf":
		slog.SetDefault(slog.New(slog.DiscardHandler)) // the loss is what is tested
		if err := serve(deaf); err != nil {
			panic(err)
		}
		os.Exit(0)
	}
	os.Exit(testkit.Main(func(s *pgtest.Server) (int, error) {
		server = s
		return m.Run(), nil
	}))
}

// deaf is work that does not look at its ctx.
func deaf(context.Context, *sql.DB) error {
	fmt.Println("at work")
	time.Sleep(4 * time.Second)
	fmt.Println("done")
	return nil
}

// database returns the DSN of one with the table of the job.
func database(t *testing.T) (dsn string, db *sql.DB) {
	t.Helper()
	dsn = testkit.WatchLog(t, testkit.Database(t, server))
	db, err := sql.Open("pgx", dsn)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { db.Close() })
	if _, err := db.Exec("CREATE TABLE api_token (expires_at timestamptz)"); err != nil {
		t.Fatal(err)
	}
	return dsn, db
}

// A replica is a process that runs the service, and what it prints.
type replica struct {
	*proctest.Process
	t     *testing.T
	addr  string
	lines chan string
}

func start(t *testing.T, how, dsn string) *replica {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	r := &replica{t: t, addr: l.Addr().String(), lines: make(chan string, 100)}
	l.Close() // the replica takes its place
	r.Process = proctest.Start(t, func(line []byte) { r.lines <- string(line) },
		replicaEnv+"="+how, "DATABASE_URL="+dsn, "LISTEN="+r.addr)
	return r
}

// says waits until the replica's endpoint says that it leads, or that it does not. It returns how long
// that took.
func (r *replica) says(leads bool) time.Duration {
	r.t.Helper()
	begun := time.Now()
	testkit.WaitFor(r.t, fmt.Sprintf("the endpoint says %t", leads), func() (bool, error) {
		resp, err := http.Get("http://" + r.addr + "/health")
		if err != nil {
			return false, err
		}
		defer resp.Body.Close()
		body, err := io.ReadAll(resp.Body)
		return string(body) == fmt.Sprintf("leader: %t\n", leads), err
	})
	r.t.Logf("it says %t after %v", leads, time.Since(begun))
	return time.Since(begun)
}

// end tells the replica to end, and wants it to, with status 0.
func (r *replica) end() {
	r.t.Helper()
	begun := time.Now()
	if err := syscall.Kill(r.PID(), syscall.SIGTERM); err != nil {
		r.t.Fatal(err)
	}
	select {
	case <-r.Ended():
	case <-time.After(10 * time.Second):
		r.t.Fatal("it does not end")
	}
	r.t.Logf("it ended after %v", time.Since(begun))
	if !r.Succeeded() {
		r.t.Error("it has failed")
	}
}

// Leaders and standbys end with status 0, and the lock is free at once.
func TestTheServiceEndsBySIGTERMWithStatus0(t *testing.T) {
	dsn, db := database(t)
	leader := start(t, "as it is", dsn)
	leader.says(true)
	standby, next := start(t, "as it is", dsn), start(t, "as it is", dsn)
	standby.says(false)
	next.says(false)
	standby.end()
	leader.end()
	next.says(true)
	next.end()
	err := advisory.WithLock(t.Context(), db, advisory.Name("sweep-tokens"), func(context.Context) error { return nil }, advisory.NoWait())
	if err != nil {
		t.Errorf("after the end of all: %v", err)
	}
}

// A leader that has lost its lock says so within two heartbeats, though its work goes on.
func TestTheServiceSaysThatItsLockIsLost(t *testing.T) {
	testkit.AllowLog(t, "FATAL:  terminating connection due to administrator command")
	dsn, db := database(t)
	r := start(t, "deaf", dsn)
	r.says(true)
	if line := <-r.lines; line != "at work" {
		t.Fatal(line)
	}
	holders, err := advisory.Holders(t.Context(), db, advisory.Name("sweep-tokens"))
	if err != nil || len(holders) != 1 {
		t.Fatalf("%d hold the lock, or wait for it: %v", len(holders), err)
	}
	if _, err := db.Exec("SELECT pg_terminate_backend($1)", holders[0].PID); err != nil {
		t.Fatal(err)
	}
	const twoHeartbeats = 2 * time.Second
	if took := r.says(false); took > twoHeartbeats {
		t.Errorf("it said so after %v", took)
	}
	select {
	case line := <-r.lines:
		t.Errorf("the work has ended, and nothing was shown: %q", line)
	default:
	}
	r.says(true) // when the work has ended, it campaigns again
	if line := strings.Join([]string{<-r.lines, <-r.lines}, ", "); line != "done, at work" {
		t.Error(line)
	}
}
