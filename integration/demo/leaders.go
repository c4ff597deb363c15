package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/pgadvisory/advisory"
	"github.com/pgadvisory/advisory/integration/examples/jobs"
)

// leaders is what a service with several replicas does in the background: each is ready
// for every job, and one of them does it. The hard part is what becomes of a job when
// its leader does not step down, but ends, or hangs, in the middle of it.
//
// The act is in several files. leaders_board.go sees who leads, leaders_takeover.go kills
// one leader and freezes another, and leaders_inbox.go receives the webhooks.
type leaders struct{}

// A demoJob is one of the four, and how much of it there is. Those who know due times
// have all of it due in time; the others have a round for each piece.
type demoJob struct {
	jobs.Job
	short  string
	pieces int
	batch  int
}

var demoJobs = []demoJob{
	{jobs.All[0], "tokens", 400, 20},
	{jobs.All[1], "webhooks", 400, 20},
	{jobs.All[2], "stock", 200, 1},
	{jobs.All[3], "search", 300, 1},
}

var leaderConnections = 2 * (1 + len(demoJobs))

const (
	killed = 1 // the index of the job whose leader is killed
	frozen = 2

	leadersRound = 15 * time.Millisecond

	// minProcesses are needed to see one killed and another one frozen.
	minProcesses = 3
)

type leadersBrief struct {
	Locks         []string // their names, one for each job
	Webhook       string
	HolderTimeout time.Duration
}

// heartbeat is well below what HolderTimeout demands, a third of it.
func (b leadersBrief) heartbeat() time.Duration { return b.HolderTimeout / 6 }

// A leadersEvent is what a worker says of one job.
type leadersEvent struct {
	Job  int
	Kind string // leads, lost or ended
	At   time.Time
}

func (leaders) name() string  { return "leaders" }
func (leaders) title() string { return "four jobs, one leader each" }

// work runs the jobs until the process ends.
func (leaders) work(ctx context.Context, w *worker) (any, error) {
	var brief leadersBrief
	if err := json.Unmarshal(w.Brief, &brief); err != nil {
		return nil, err
	}
	// One half is for locks: a connection for all that are held, and one for each that is
	// waited for. The other is for the jobs' work.
	w.db.SetMaxOpenConns(leaderConnections)
	w.begin()

	failed := make(chan error)
	campaign := func(i int) {
		tell := func(kind string) {
			event, _ := json.Marshal(leadersEvent{Job: i, Kind: kind, At: time.Now()})
			w.send(message{Event: event})
		}
		err := demoJobs[i].Run(ctx, w.db, jobs.Params{
			Key: advisory.Name(brief.Locks[i]), Every: leadersRound, Batch: demoJobs[i].batch, Webhook: brief.Webhook,
			Options: []advisory.Option{
				advisory.Heartbeat(brief.heartbeat()), advisory.HolderTimeout(brief.HolderTimeout),
				advisory.Observe(&advisory.Observer{
					HoldStart: func(ctx context.Context, _ advisory.LockInfo) context.Context { tell("leads"); return ctx },
					Lost:      func(context.Context, advisory.LockInfo, error) { tell("lost") },
					HoldEnd:   func(context.Context, advisory.LockInfo, time.Duration, error) { tell("ended") },
				}),
			},
		})
		if err != nil {
			failed <- fmt.Errorf("%s: %w", demoJobs[i].short, err)
		}
	}
	// Each first campaigns for another job, so that each has one to lead.
	own := (w.Number - 1) % len(demoJobs)
	go campaign(own)
	time.Sleep(200 * time.Millisecond)
	for i := range demoJobs {
		if i != own {
			go campaign(i)
		}
	}
	return nil, <-failed
}

func (a leaders) play(ctx context.Context, s *stage) (promises []promise, err error) {
	n := max(minProcesses, s.processes)
	for _, j := range demoJobs {
		if err := errors.Join(j.Setup(ctx, s.db), j.Fill(ctx, s.db, j.pieces, 2*s.holderTimeout)); err != nil {
			return nil, err
		}
	}
	s.view.say(plural(n, "process") + " are ready to sweep tokens, deliver webhooks, apply changes")
	s.view.say("of a stock, and rebuild a search index, each under Lead.")
	s.view.say(fmt.Sprintf("HolderTimeout is %s, and counts from a leader's last heartbeat,", seconds(s.holderTimeout)))
	s.view.say(fmt.Sprintf("of which there is one every %s.", seconds(leadersBrief{HolderTimeout: s.holderTimeout}.heartbeat())))

	in, err := openInbox(demoJobs[killed].pieces / 4)
	if err != nil {
		return nil, err
	}
	defer in.close()

	b := newBoard(s, n)
	defer b.dismiss()
	if err := b.assemble(ctx, a, func(i int) any { return a.brief(s, i, in.url) }); err != nil {
		return nil, err
	}
	b.beginAll()

	direct := a.direct
	if s.broken {
		direct = a.leaveAlone
	}
	promises, err = direct(ctx, b, in)
	if err != nil && !errors.Is(err, errNotSeen) {
		return promises, err
	}
	b.say("the rest of the work is done by those who lead")
	workErr := a.finish(ctx, b)
	if workErr != nil && ctx.Err() != nil {
		return promises, workErr
	}
	s.view.clear()
	promises = append([]promise{b.oneLeaderAtATime()}, promises...)
	return append(promises, a.everyJobIsDone(workErr), in.noneTwice(demoJobs[killed].pieces)), err
}

// brief tells the process of an index what to do.
func (leaders) brief(s *stage, index int, webhook string) leadersBrief {
	brief := leadersBrief{Webhook: webhook, HolderTimeout: s.holderTimeout}
	for _, j := range demoJobs {
		lock := s.lockName(j.Name)
		if s.broken {
			lock += fmt.Sprint(index) // one for each process
		}
		brief.Locks = append(brief.Locks, lock)
	}
	return brief
}

// leaveAlone only looks on: without locks, nobody takes over from anybody.
func (leaders) leaveAlone(_ context.Context, _ *board, in *inbox) ([]promise, error) {
	in.answer()
	return nil, nil
}

// finish waits until nothing is left to do, and checks that it was done once.
func (leaders) finish(ctx context.Context, b *board) error {
	var errs []error
	for _, j := range demoJobs {
		// Asked from the view's loop: a query each time is what the demo can afford.
		err := b.await(ctx, 20*time.Second, "the end of "+j.Name, func() bool {
			left, err := j.Left(ctx, b.s.db)
			return err == nil && left == 0
		})
		if err == nil {
			err = j.Check(ctx, b.s.db, j.pieces)
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", j.short, err))
		}
	}
	return errors.Join(errs...)
}

// everyJobIsDone is the promise about the work. err says what finish found.
func (leaders) everyJobIsDone(err error) promise {
	done := promise{text: "Lead: every job is done, each piece once", kept: err == nil}
	for _, j := range demoJobs {
		done.numbers += fmt.Sprintf("%s %s, ", thousands(j.pieces), j.short)
	}
	done.numbers = strings.TrimSuffix(done.numbers, ", ")
	if err != nil {
		done.numbers = err.Error()
	}
	return done
}
