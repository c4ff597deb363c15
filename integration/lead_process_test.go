//go:build unix

package integration

import (
	"context"
	"database/sql"
	"encoding/json"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"os/signal"
	"slices"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/pgadvisory/advisory"
	"github.com/pgadvisory/advisory/integration/internal/proctest"
	"github.com/pgadvisory/advisory/integration/internal/testkit"
)

const (
	candidateEnv = "ADVISORY_TEST_CANDIDATE"

	// From the end of a leader's ctx to its successor is more than half a second, so that a machine
	// that stands still for so long does not make two leaders.
	candidateHeartbeat = 200 * time.Millisecond
	candidateTimeout   = time.Second // HolderTimeout
)

// A stamp is what a candidate process reports of its leadership, which is known by its
// token. Times are by the machine's clock, which all processes share.
type stamp struct {
	Token      int64
	Begun, End time.Time // of a piece of work; Begun alone: of the leadership
	Refused    bool      // by the resource
	Told       bool      // fn has seen that its ctx has ended
}

func init() { children["candidate"] = candidate }

// candidate campaigns for ever. What it does as the leader is in pieces that are long
// compared to its looks at ctx: most often, a freeze comes between the look and the write.
func candidate() int {
	proctest.EndWithParent()
	slog.SetDefault(slog.New(slog.DiscardHandler)) // losses are what is tested
	var a struct{ Driver, DSN, Key, Table string }
	if err := json.Unmarshal([]byte(os.Getenv(candidateEnv)), &a); err != nil {
		panic(err)
	}
	out := json.NewEncoder(os.Stdout)
	db, err := sql.Open(a.Driver, a.DSN)
	if err != nil {
		panic(err)
	}
	write := "WITH fence AS (UPDATE " + a.Table + "_fence SET token = $1 WHERE token <= $1 RETURNING token) " +
		"INSERT INTO " + a.Table + " (token) SELECT token FROM fence"
	err = advisory.Lead(context.Background(), db, advisory.Name(a.Key), func(ctx context.Context) error {
		token, err := advisory.Token(ctx)
		if err != nil {
			return fmt.Errorf("token: %w", err)
		}
		_ = out.Encode(stamp{Token: token, Begun: time.Now()})
		for ctx.Err() == nil {
			s := stamp{Token: token, Begun: time.Now()}
			time.Sleep(5 * time.Millisecond) // the work
			// Not under ctx: the worst that an fn can do that looks at it now and then.
			result, err := db.Exec(write, token)
			if err != nil {
				return err
			}
			n, err := result.RowsAffected()
			if err != nil {
				return err
			}
			s.End, s.Refused = time.Now(), n == 0
			_ = out.Encode(s)
		}
		_ = out.Encode(stamp{Token: token, End: time.Now(), Told: true})
		return nil
	}, advisory.Heartbeat(candidateHeartbeat), advisory.HolderTimeout(candidateTimeout))
	fmt.Fprintln(os.Stderr, "Lead has ended:", err)
	return 1
}

// A term is one leadership, as its process reported it.
type term struct {
	process    *proctest.Process
	token      int64
	begun, end time.Time // end: of the last piece of work, if not frozen in it
	told       time.Time
	frozen     time.Time // zero: it was not
	refused    int       // pieces of work
}

// terms are those of all processes.
type terms struct {
	t  testing.TB
	mu sync.Mutex
	of map[int64]*term
}

func (ts *terms) add(p *proctest.Process, line []byte) {
	var s stamp
	if err := json.Unmarshal(line, &s); err != nil {
		ts.t.Errorf("%s: %v", line, err)
		return
	}
	ts.mu.Lock()
	defer ts.mu.Unlock()
	l := ts.of[s.Token]
	switch {
	case l == nil:
		ts.of[s.Token] = &term{process: p, token: s.Token, begun: s.Begun, end: s.Begun}
	case s.Told:
		l.told = s.End
	case s.Refused:
		l.refused++
		if l.frozen.IsZero() {
			ts.t.Errorf("work of %d was refused, and its process was not frozen", s.Token)
		}
	case l.frozen.IsZero() || s.End.Before(l.frozen):
		l.end = s.End
	}
}

// inOffice waits for a term that has begun after another, and of which the server has
// heard a heartbeat, so that it knows the HolderTimeout.
func (ts *terms) inOffice(after time.Time) (l *term) {
	ts.t.Helper()
	waitFor(ts.t, "there is a leader", func() (bool, error) {
		ts.mu.Lock()
		defer ts.mu.Unlock()
		for _, l = range ts.of {
			if l.begun.After(after) && l.told.IsZero() && l.end.Sub(l.begun) > 2*candidateHeartbeat {
				return true, nil
			}
		}
		return false, nil
	})
	return l
}

// next waits for the term that begins after at.
func (ts *terms) next(at time.Time) (l *term) {
	ts.t.Helper()
	waitFor(ts.t, "there is another leader", func() (bool, error) {
		ts.mu.Lock()
		defer ts.mu.Unlock()
		for _, l = range ts.of {
			if l.begun.After(at) {
				return true, nil
			}
		}
		return false, nil
	})
	return l
}

func (ts *terms) freeze(l *term) time.Time {
	ts.mu.Lock()
	defer ts.mu.Unlock()
	l.frozen = time.Now()
	l.process.Freeze()
	return l.frozen
}

func (ts *terms) waitUntilTold(l *term) (told time.Time) {
	ts.t.Helper()
	waitFor(ts.t, "the thawed leader is told", func() (bool, error) {
		ts.mu.Lock()
		defer ts.mu.Unlock()
		told = l.told
		return !told.IsZero(), nil
	})
	return told
}

func TestKilledAndFrozenLeadersNeverWorkBesideAnother(t *testing.T) {
	t.Parallel()
	const times, candidates = 20, 3
	bothDrivers(t, func(t *testing.T, d driver) {
		t.Parallel()
		table := testkit.Unique("work")
		setUp(t, adminDB(t), "CREATE TABLE "+table+" (id bigint GENERATED ALWAYS AS IDENTITY, token bigint)",
			"CREATE TABLE "+table+"_fence (token bigint)", "INSERT INTO "+table+"_fence VALUES (0)")
		t.Cleanup(func() { setUp(t, adminDB(t), "DROP TABLE "+table+", "+table+"_fence") })
		args, err := json.Marshal(map[string]string{"Driver": d.sql, "DSN": watchLog(t, server.DSN()), "Key": t.Name(), "Table": table})
		if err != nil {
			t.Fatal(err)
		}

		allowLog(t, silent, clientGone) // of those that are frozen, and killed
		all := &terms{t: t, of: map[int64]*term{}}
		for range candidates {
			all.startCandidate(string(args))
		}

		var (
			killed, frozen, told []time.Duration // how long until the next leader begins, or the old one knows
			last                 time.Time
		)
		for i := range times {
			l := all.inOffice(last)
			if i%2 == 0 {
				last = time.Now()
				l.process.Kill()
				killed = append(killed, all.next(last).begun.Sub(last))
				all.startCandidate(string(args))
				continue
			}
			last = all.freeze(l)
			next := all.inOffice(last) // and has worked before the other comes to
			frozen = append(frozen, next.begun.Sub(last))
			thawed := time.Now()
			l.process.Thaw()
			told = append(told, all.waitUntilTold(l).Sub(thawed))
		}

		all.wantOneAfterTheOther()
		wantNoLateWrite(t, table)
		wantMedian(t, "SIGKILL: the next leader begins", 100*time.Millisecond, killed)
		wantMedian(t, "SIGSTOP: the next leader begins", candidateTimeout+100*time.Millisecond, frozen)
		wantMedian(t, "SIGCONT: the thawed leader knows", candidateHeartbeat, told)
	})
}

// startCandidate starts a process, and adds what it says.
func (ts *terms) startCandidate(args string) {
	ts.t.Helper()
	var p *proctest.Process
	started := make(chan struct{})
	p = proctest.Start(ts.t, func(line []byte) {
		<-started
		ts.add(p, line)
	}, childEnv+"=candidate", candidateEnv+"="+args)
	close(started)
}

// wantOneAfterTheOther fails the test if the work of one term, or its token, came after
// that of a later one.
func (ts *terms) wantOneAfterTheOther() {
	ts.t.Helper()
	ts.mu.Lock()
	defer ts.mu.Unlock()
	inOrder := slices.SortedFunc(maps.Values(ts.of), func(a, b *term) int { return a.begun.Compare(b.begun) })
	refused := 0
	for i, l := range inOrder {
		refused += l.refused
		if i == 0 {
			continue
		}
		before := inOrder[i-1]
		if l.begun.Before(before.end) {
			ts.t.Errorf("term %d began %v before the work of term %d ended", i, before.end.Sub(l.begun), i-1)
		}
		if l.token <= before.token {
			ts.t.Errorf("term %d has token %d, after %d", i, l.token, before.token)
		}
	}
	if refused == 0 {
		ts.t.Error("no thawed leader wrote: nothing was shown about tokens")
	}
	ts.t.Logf("%d terms, %d late writes refused", len(inOrder), refused)
}

// wantNoLateWrite asks the resource, which is the judge of what was done by those who could
// not be told in time.
func wantNoLateWrite(t testing.TB, table string) {
	t.Helper()
	var late int
	if err := adminDB(t).QueryRow("SELECT count(*) FROM (SELECT token < lag(token) OVER (ORDER BY id) AS late FROM " + table + ") AS w WHERE late").
		Scan(&late); err != nil || late > 0 {
		t.Errorf("the resource has taken %d writes of former leaders (%v)", late, err)
	}
}

// wantMedian fails the test if the median of what was measured is over the bound.
func wantMedian(t testing.TB, what string, bound time.Duration, took []time.Duration) {
	t.Helper()
	slices.Sort(took)
	p50, most := took[len(took)/2], took[len(took)-1]
	t.Logf("%s after %v (p50), %v (max)", what, p50, most)
	if p50 > bound {
		t.Errorf("%s after %v (p50), want under %v", what, p50, bound)
	}
}

func init() { children["scheduler"] = scheduler }

// scheduler is the program of the example of Lead.
func scheduler() int {
	proctest.EndWithParent()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	var a struct{ Driver, DSN, Key string }
	if err := json.Unmarshal([]byte(os.Getenv(candidateEnv)), &a); err != nil {
		panic(err)
	}
	db, err := sql.Open(a.Driver, a.DSN)
	if err != nil {
		panic(err)
	}
	fmt.Println("candidate")
	err = advisory.Lead(ctx, db, advisory.Name(a.Key), func(ctx context.Context) error {
		fmt.Println("leader")
		for ctx.Err() == nil {
			select {
			case <-time.After(time.Minute):
			case <-ctx.Done():
			}
		}
		return ctx.Err()
	})
	if err != nil && ctx.Err() == nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

func TestLeadersAndStandbysEndBySIGTERMWithStatus0(t *testing.T) {
	t.Parallel()
	bothDrivers(t, func(t *testing.T, d driver) {
		t.Parallel()
		args, err := json.Marshal(map[string]string{"Driver": d.sql, "DSN": watchLog(t, server.DSN()), "Key": t.Name()})
		if err != nil {
			t.Fatal(err)
		}
		start := func() (*proctest.Process, chan string) {
			lines := make(chan string, 10)
			return proctest.Start(t, func(line []byte) { lines <- string(line) }, childEnv+"=scheduler", candidateEnv+"="+string(args)), lines
		}
		end := func(who string, p *proctest.Process) {
			t.Helper()
			if err := syscall.Kill(p.PID(), syscall.SIGTERM); err != nil {
				t.Fatal(err)
			}
			await(t, "the "+who+" ends", p.Ended())
			if !p.Succeeded() {
				t.Errorf("the %s has failed", who)
			}
		}
		says := func(want string, lines chan string) {
			t.Helper()
			if got := await(t, "a process says "+want, lines); got != want {
				t.Errorf("a process says %q, want %q", got, want)
			}
		}
		leader, lines := start()
		says("candidate", lines)
		says("leader", lines)
		standby, lines := start()
		says("candidate", lines)
		waitForWaiters(t, adminDB(t), testKey(t), 1)
		end("standby", standby)
		next, lines := start()
		says("candidate", lines)
		waitForWaiters(t, adminDB(t), testKey(t), 1)
		end("leader", leader)
		says("leader", lines)
		end("next leader", next)
		wantFree(t, adminDB(t), testKey(t))
	})
}
