package keyqueue_test

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/pgadvisory/advisory/internal/keyqueue"
)

// seedEnv names a schedule to run alone, and to be told of step by step.
const seedEnv = "ADVISORY_QUEUE_SEED"

// Clients do to the queue what its owner does, in thousands of orders. A model looks on that knows
// the rules, and not how the queue keeps them.
func TestTheQueueKeepsItsRulesInAnyOrder(t *testing.T) {
	t.Parallel()
	seen := make(map[string]int)
	if s := os.Getenv(seedEnv); s != "" {
		seed, err := strconv.ParseUint(s, 10, 64)
		if err != nil {
			t.Fatal(err)
		}
		tr := newTrial(seed, seen)
		tr.told = true
		err = tr.run()
		t.Logf("%s", strings.Join(tr.log, "\n"))
		if err != nil {
			t.Error(err)
		}
		return
	}
	const schedules = 6000
	first := rand.Uint64() >> 16
	var worst *trial // the shortest of those that failed
	var reason error
	failed := 0
	for i := range uint64(schedules) {
		tr := newTrial(first+i, seen)
		err := tr.run()
		if err == nil {
			continue
		}
		failed++
		if worst == nil || tr.steps < worst.steps {
			worst, reason = tr, err
		}
	}
	if worst != nil {
		again := newTrial(worst.seed, seen)
		again.told = true
		_ = again.run()
		t.Fatalf("%d of %d schedules failed; the shortest, %s=%d, step %d: %v\n%s",
			failed, schedules, seedEnv, worst.seed, worst.steps, reason, strings.Join(again.log, "\n"))
	}
	// What never happens is not tested.
	for _, what := range []string{
		"handed on", "joined", "not handed on: too late", "not handed on: other mode", "looked, nobody", "looked, others",
		"looked, others: NoWait refused", "looked, lock gone", "looked, goes back", "looked, session lost", "look failed", "look given back",
		"ask given back", "hold given back", "ask given back, dedicated", "cancelled in line", "refused: NoWait asked", "refused: NoWait waited",
		"refused on entering", "shared the answer, NoWait", "granted from the server's queue", "granted, session lost", "gave up late",
		"lost: holders", "lost: requester", "lost: looker", "lost: goes back", "lost: dedicated inside", "unlocked after the loss", "several at once",
		"dedicated beside the grant", "released on a session known to be lost", "all served at the end",
	} {
		if seen[what] == 0 {
			t.Errorf("in %d schedules from %d on never: %s", schedules, first, what)
		}
	}
}

// A trial is one schedule: a queue, those who use it, and the model.
type trial struct {
	seed  uint64
	rng   *rand.Rand
	q     queue
	now   time.Time
	steps int
	calm  bool // nobody comes any more, gives up, or loses a session
	seen  map[string]int

	told bool
	log  []string

	server   server
	others   []*claim // of other processes
	sessions []*session
	shared   *session // which locks are tried on

	clients []*client // but for those that are gone
	came    int

	// The model's own.

	line      []*client
	requester *client // who asks for a grant, or looks
	lock      *lock   // the grant that there is
	last      uint64  // the number of the last grant

	most                                int // clients at a time
	sharing, dedicated, noWaits, losses int // of a hundred
	briefness                           int // of holds
	busy                                int // other processes
}

// A lock is what the model knows of a grant.
type lock struct {
	grant
	shared   bool
	until    time.Time
	closed   bool
	releases bool
}

func newTrial(seed uint64, seen map[string]int) *trial {
	rng := rand.New(rand.NewPCG(seed, 0))
	few := func(n ...int) int { return n[rng.IntN(len(n))] }
	return &trial{
		seed: seed, rng: rng, seen: seen, now: time.Unix(0, 0),
		most: few(2, 3, 4, 6, 8), sharing: few(0, 50, 50, 80, 100), dedicated: few(0, 0, 20, 50), noWaits: few(0, 20, 50),
		losses: few(0, 0, 1, 4), briefness: few(10, 30, 100), busy: few(0, 1, 2, 3),
	}
}

// A violation is a rule that was not kept.
type violation string

func (t *trial) fail(format string, args ...any) { panic(violation(fmt.Sprintf(format, args...))) }

func (t *trial) must(ok bool, format string, args ...any) {
	if !ok {
		t.fail(format, args...)
	}
}

func (t *trial) say(format string, args ...any) {
	if t.told {
		t.log = append(t.log, fmt.Sprintf("%4d %6v  ", t.steps, t.now.Sub(time.Unix(0, 0)))+fmt.Sprintf(format, args...))
	}
}

func (t *trial) of100(n int) bool { return t.rng.IntN(100) < n }

func (t *trial) run() (err error) {
	defer func() {
		switch v := recover().(type) {
		case nil:
		case violation:
			err = errors.New(string(v))
		default:
			err = fmt.Errorf("the queue panicked: %v", v)
		}
		if err != nil {
			t.say("%v", err)
		}
	}()
	for n := 100 + t.rng.IntN(200); t.steps < n; {
		t.steps++
		t.step()
		t.check()
	}
	t.end()
	return nil
}

func (t *trial) step() {
	switch r := t.rng.IntN(100); {
	case r < 20:
		if len(t.clients) < t.most {
			t.arrive()
		}
	case r < 30:
		t.pass()
	case r < 42:
		t.other()
	case r < 42+t.losses:
		t.lose()
	case len(t.clients) > 0:
		t.act(t.clients[t.rng.IntN(len(t.clients))])
	}
	t.sweep()
}

func (t *trial) sweep() {
	t.clients = slices.DeleteFunc(t.clients, func(c *client) bool { return c.phase == atNothing })
}

func (t *trial) pass() {
	d := time.Duration(t.rng.IntN(8)) * time.Millisecond
	if t.of100(30) {
		d += keyqueue.HandOffFor
	}
	t.now = t.now.Add(d)
}

// end has everybody finish what they are at. All who still wait get their turn.
func (t *trial) end() {
	t.say("nobody comes any more")
	t.calm = true
	waited := len(t.line)
	for len(t.others) > 0 {
		t.other()
	}
	for range 1000 {
		if len(t.clients) == 0 && len(t.sessions) == 0 {
			break
		}
		t.steps++
		for _, s := range slices.Clone(t.sessions) {
			switch {
			case s.dead && !s.lost:
				t.mark(s)
			case s.lost && !s.told:
				t.tell(s)
			case s.told && !s.dead:
				t.free(s)
			case len(t.clients) == 0:
				t.must(s.claim == nil, "a session keeps the lock")
				t.mark(s)
			}
			t.check()
		}
		for _, c := range slices.Clone(t.clients) {
			t.act(c)
			t.sweep()
			t.check()
		}
		t.pass()
	}
	t.must(len(t.clients) == 0, "everybody has gone, but for %v: nobody wakes them", t.clients)
	t.must(len(t.server.holders)+len(t.server.line) == 0, "at the end the server has %v and %v", t.server.holders, t.server.line)
	t.asNew()
	if waited > 0 {
		t.seen["all served at the end"]++
	}
}

// asNew checks that the queue, which is idle, answers as a new one does.
func (t *trial) asNew() {
	want, got := play(&t.q, t.now, []string{
		"idle", "true",
		"a in shared", "ask",
		"b in shared nowait", "await",
		"a granted", "b: hold",
		"c in shared", "hold",
		"a releases", "",
		"b releases", "",
		"c releases", "unlock",
		"c unlocked", "",
		"w in", "ask",
		"w granted", "",
		"w releases", "unlock",
		"w unlocked", "",
		"idle", "true",
	})
	t.must(slices.Equal(got, want), "at the end the queue is not as new: %q, want %q", got, want)
}
