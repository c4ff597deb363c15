//go:build unix

package jobs_test

import (
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http/httptest"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	_ "github.com/jackc/pgx/v5/stdlib"
	_ "github.com/lib/pq"

	"github.com/pgadvisory/advisory"
	"github.com/pgadvisory/advisory/integration/examples/jobs"
	"github.com/pgadvisory/advisory/integration/internal/pgtest"
	"github.com/pgadvisory/advisory/integration/internal/proctest"
	"github.com/pgadvisory/advisory/integration/internal/testkit"
)

var server *pgtest.Server

func TestMain(m *testing.M) {
	if brief := os.Getenv(replicaEnv); brief != "" {
		os.Exit(replica(brief))
	}
	os.Exit(testkit.Main(func(s *pgtest.Server) (int, error) {
		server = s
		return m.Run(), nil
	}))
}

// replicaEnv makes a process of this binary a replica of a service with one job.
const replicaEnv = "ADVISORY_TEST_REPLICA"

type brief struct {
	Job, Driver, DSN, Key, Webhook string
	Every                          time.Duration
	Batch                          int
}

// A report is what a replica says of itself.
type report struct {
	Leads    bool
	Version  int64 // of the stock, as its cache sees it
	Quantity int
}

func replica(text string) int {
	proctest.EndWithParent()
	slog.SetDefault(slog.New(slog.DiscardHandler)) // losses are what is tested
	var b brief
	if err := json.Unmarshal([]byte(text), &b); err != nil {
		panic(err)
	}
	db, err := sql.Open(b.Driver, b.DSN)
	if err != nil {
		panic(err)
	}
	var (
		mu  sync.Mutex
		out = json.NewEncoder(os.Stdout)
		say = func(r report) {
			mu.Lock()
			defer mu.Unlock()
			_ = out.Encode(r)
		}
	)
	if b.Job == "invalidate-stock" {
		go func() {
			cache, last := jobs.NewStockCache(db), int64(0)
			for {
				quantity, version, err := cache.Quantity(context.Background(), jobs.SampleProduct)
				if err != nil {
					fmt.Fprintln(os.Stderr, err)
					os.Exit(1)
				}
				if version != last {
					last = version
					say(report{Version: version, Quantity: quantity})
				}
				time.Sleep(b.Every / 2)
			}
		}()
	}
	observer := &advisory.Observer{HoldStart: func(ctx context.Context, _ advisory.LockInfo) context.Context {
		say(report{Leads: true})
		return ctx
	}}
	err = job(b.Job).Run(context.Background(), db, jobs.Params{
		Key: advisory.Name(b.Key), Every: b.Every, Batch: b.Batch, Webhook: b.Webhook,
		Options: []advisory.Option{advisory.Observe(observer)},
	})
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

func job(name string) jobs.Job {
	return jobs.All[slices.IndexFunc(jobs.All, func(j jobs.Job) bool { return j.Name == name })]
}

// A service is three replicas, and what they report.
type service struct {
	t        *testing.T
	db       *sql.DB
	replicas []*proctest.Process

	mu      sync.Mutex
	reports [][]report // by replica
	leaders []int      // one after the other
}

// each runs body for a job on both drivers, with n pieces of work and the tables in a
// schema of their own.
func each(t *testing.T, name string, n int, body func(t *testing.T, s *service, b brief)) {
	for _, d := range []struct{ name, sql string }{{"pq", "postgres"}, {"pgx", "pgx"}} {
		t.Run(d.name, func(t *testing.T) {
			t.Parallel()
			ctx := context.Background()
			schema := testkit.Unique("advisory_jobs")
			dsn, err := pgtest.WithParam(server.DSN(), "search_path", schema)
			if err != nil {
				t.Fatal(err)
			}
			// Replicas are killed as they work, and the schema is dropped before the server may know.
			testkit.AllowLog(t, "FATAL:  connection to client lost", "does not exist")
			dsn = testkit.WatchLog(t, dsn) // which the replicas get, too
			db, err := sql.Open(d.sql, dsn)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { db.Close() })
			if _, err := db.Exec("CREATE SCHEMA " + schema); err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() {
				if _, err := db.Exec("DROP SCHEMA " + schema + " CASCADE"); err != nil {
					t.Error(err)
				}
			})
			j := job(name)
			if err := errors.Join(j.Setup(ctx, db), j.Fill(ctx, db, n, time.Second/2)); err != nil {
				t.Fatal(err)
			}
			s := &service{t: t, db: db}
			body(t, s, brief{Job: name, Driver: d.sql, DSN: dsn, Key: schema + "/" + name, Every: 2 * time.Millisecond, Batch: max(1, n/100)})
			if t.Failed() {
				return
			}
			if err := j.Check(ctx, db, n); err != nil {
				t.Error(err)
			}
		})
	}
}

func (s *service) start(b brief) {
	s.t.Helper()
	text, err := json.Marshal(b)
	if err != nil {
		s.t.Fatal(err)
	}
	for i := range 3 {
		s.mu.Lock()
		s.reports = append(s.reports, nil)
		s.mu.Unlock()
		s.replicas = append(s.replicas, proctest.Start(s.t, func(line []byte) {
			var r report
			if err := json.Unmarshal(line, &r); err != nil {
				s.t.Errorf("%s: %v", line, err)
				return
			}
			s.mu.Lock()
			defer s.mu.Unlock()
			s.reports[i] = append(s.reports[i], r)
			if r.Leads {
				s.leaders = append(s.leaders, i)
			}
		}, replicaEnv+"="+string(text)))
	}
}

// waitForLeaders waits until n replicas have led, one after the other.
func (s *service) waitForLeaders(n int) {
	s.t.Helper()
	testkit.WaitFor(s.t, fmt.Sprintf("%d have led", n), func() (bool, error) {
		s.mu.Lock()
		defer s.mu.Unlock()
		return len(s.leaders) >= n, nil
	})
}

// killLeader kills the leader and returns how long its successor takes to begin.
func (s *service) killLeader() {
	s.t.Helper()
	s.mu.Lock()
	led := len(s.leaders)
	leader := s.replicas[s.leaders[led-1]]
	s.mu.Unlock()
	killed := time.Now()
	leader.Kill()
	s.waitForLeaders(led + 1)
	s.t.Logf("the next leader began after %v", time.Since(killed))
}

// killLeaderWhen kills the leader when no more than half of the n pieces are left, and
// some are.
func (s *service) killLeaderInTheMiddle(name string, n int) {
	s.t.Helper()
	s.waitForLeaders(1)
	testkit.WaitFor(s.t, "half of the work is done", func() (bool, error) {
		left, err := job(name).Left(context.Background(), s.db)
		if left == 0 && err == nil {
			s.t.Fatal("all of the work is done already")
		}
		return left <= n/2, err
	})
	s.killLeader()
}

func (s *service) waitUntilDone(name string) {
	s.t.Helper()
	testkit.WaitFor(s.t, "all of the work is done", func() (bool, error) {
		left, err := job(name).Left(context.Background(), s.db)
		return left == 0, err
	})
}

func TestTokensAreSweptOnceThoughTheLeaderIsKilled(t *testing.T) {
	const n = 500
	each(t, "sweep-tokens", n, func(t *testing.T, s *service, b brief) {
		s.start(b)
		s.killLeaderInTheMiddle(b.Job, n)
		s.waitUntilDone(b.Job)
	})
}

func TestWebhooksAreTakenOnceThoughTheLeaderIsKilledWithOneInFlight(t *testing.T) {
	const n, killAt = 200, 100
	each(t, "deliver-webhooks", n, func(t *testing.T, s *service, b brief) {
		var taken atomic.Int64
		inFlight, killed := make(chan struct{}), make(chan struct{})
		receiver := &jobs.Receiver{Taken: func(string) {
			if taken.Add(1) == killAt {
				close(inFlight)
				<-killed
			}
		}}
		http := httptest.NewServer(receiver)
		defer http.Close()
		b.Webhook = http.URL
		s.start(b)
		select {
		case <-inFlight:
			s.killLeader()
		case <-time.After(20 * time.Second):
			t.Error("the webhooks do not arrive")
		}
		close(killed)
		s.waitUntilDone(b.Job)
		if taken, repeated := receiver.Counts(); taken != n || repeated != 1 {
			t.Errorf("%d webhooks taken, %d repeats, want %d, and 1 of the one in flight", taken, repeated, n)
		}
	})
}

func TestCachesOfAllReplicasFollowTheStockThoughTheLeaderIsKilled(t *testing.T) {
	const n = 300
	each(t, "invalidate-stock", n, func(t *testing.T, s *service, b brief) {
		s.start(b)
		s.killLeaderInTheMiddle(b.Job, n)
		s.waitUntilDone(b.Job)
		alive := 0
		for i, p := range s.replicas {
			select {
			case <-p.Ended():
				continue
			default:
				alive++
			}
			testkit.WaitFor(s.t, fmt.Sprintf("replica %d knows the stock", i), func() (bool, error) {
				if last := s.lastOfStock(i); last.Quantity != n {
					return false, fmt.Errorf("it knows %+v", last)
				}
				return true, nil
			})
		}
		if alive != 2 {
			t.Errorf("%d replicas are left, want 2", alive)
		}
	})
}

// lastOfStock is what a replica has reported last of the stock. It fails the test if a
// report came after a later one.
func (s *service) lastOfStock(replica int) (last report) {
	s.t.Helper()
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, r := range s.reports[replica] {
		if r.Leads {
			continue
		}
		if r.Version < last.Version || r.Quantity < last.Quantity {
			s.t.Fatalf("replica %d: %+v after %+v", replica, r, last)
		}
		last = r
	}
	return last
}

func TestSearchRebuildGoesOnWhereTheKilledLeaderStopped(t *testing.T) {
	const n = 2000
	each(t, "rebuild-search", n, func(t *testing.T, s *service, b brief) {
		s.start(b)
		s.killLeaderInTheMiddle(b.Job, n)
		// The job has an end, and all replicas come to it.
		for _, p := range s.replicas {
			select {
			case <-p.Ended():
			case <-time.After(20 * time.Second):
				t.Fatal("a replica does not end")
			}
		}
		ended := 0
		for _, p := range s.replicas {
			if p.Succeeded() {
				ended++
			}
		}
		if ended != 2 {
			t.Errorf("%d replicas ended well, want 2", ended)
		}
		// No batch was done twice: twice the batches would be twice the work.
		var batches int
		if err := s.db.QueryRow("SELECT batches FROM search_rebuild").Scan(&batches); err != nil || batches != n/b.Batch {
			t.Errorf("%d batches, want %d (%v)", batches, n/b.Batch, err)
		}
	})
}
