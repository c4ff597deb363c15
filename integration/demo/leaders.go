package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"strings"
	"sync"
	"time"

	"github.com/pgadvisory/advisory"
	"github.com/pgadvisory/advisory/integration/examples/jobs"
)

// leaders is what a service with several replicas does in the background: each is ready
// for every job, and one of them does it. The hard part is what becomes of a job when
// its leader does not step down, but ends, or hangs, in the middle of it.
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

	// A term is reported to have ended after the lock was released: by then the next
	// may have begun.
	reportLag = 500 * time.Millisecond
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

// A term is one leadership.
type term struct {
	job, process int
	begun, end   time.Time // end is zero while it lasts
	lost         time.Time // when its process knew
}

// A board shows who leads what.
type board struct {
	s    *stage
	crew []*process // their numbers are from 1

	shown string // the live view; empty after other lines

	mu    sync.Mutex
	terms []*term
	gone  []bool // killed or frozen, by number - 1
	err   error  // of a process that ended by itself
}

func (b *board) follow(number int, p *process) {
	for m := range p.messages {
		var e leadersEvent
		if m.Event == nil || json.Unmarshal(m.Event, &e) != nil {
			continue
		}
		b.mu.Lock()
		last := b.last(e.Job, number)
		switch {
		case e.Kind == "leads":
			b.terms = append(b.terms, &term{job: e.Job, process: number, begun: e.At})
		case e.Kind == "lost":
			last.lost = e.At
		case last.end.IsZero():
			last.end = e.At
		}
		b.mu.Unlock()
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if !b.gone[number-1] && b.err == nil {
		b.err = p.err
	}
}

// last is the latest term of a job that its process, or any if number is 0, has begun.
func (b *board) last(job, number int) (last *term) {
	for _, t := range b.terms {
		if t.job == job && (number == 0 || t.process == number) && (last == nil || t.begun.After(last.begun)) {
			last = t
		}
	}
	return last
}

// leader is the term of a job that lasts, or nil.
func (b *board) leader(job int) *term {
	if t := b.last(job, 0); t != nil && t.end.IsZero() {
		return t
	}
	return nil
}

// String is the live view.
func (b *board) String() string {
	var columns []string
	for i, j := range demoJobs {
		who := "-"
		if t := b.leader(i); t != nil {
			who = fmt.Sprint(t.process)
		}
		columns = append(columns, j.short+" "+who)
	}
	return fmt.Sprintf("%-*s %s", labelWidth, "led by process", strings.Join(columns, ", "))
}

// await waits until condition holds, keeps the view alive, and then says what came of it.
func (b *board) await(ctx context.Context, within time.Duration, what string, condition func() bool) error {
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for end := time.Now().Add(within); ; {
		b.mu.Lock()
		met, err, now := condition(), b.err, b.String()
		b.mu.Unlock()
		if now != b.shown {
			b.s.view.live(now)
			b.shown = now
		}
		switch {
		case err != nil:
			return err
		case met:
			return nil
		case time.Now().After(end):
			return fmt.Errorf("%w within %s: %s", errNotSeen, seconds(within), what)
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

var errNotSeen = errors.New("not seen")

func (b *board) say(s string) {
	b.s.view.clear()
	b.s.view.say(s)
	b.shown = ""
}

// sayLeaders leaves the view as it is now.
func (b *board) sayLeaders() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.say(b.String())
}

// remove notes that a process is killed or frozen, and returns the jobs that it led. The
// caller holds mu.
func (b *board) remove(number int, at time.Time) (led []int) {
	b.gone[number-1] = true
	for i := range demoJobs {
		if t := b.leader(i); t != nil && t.process == number {
			t.end = at
			led = append(led, i)
		}
	}
	return led
}

// together counts the terms that were not over when another of the same job began.
func (b *board) together() (n int) {
	for i, t := range b.terms {
		for _, u := range b.terms[:i] {
			first, second := u, t
			if t.begun.Before(u.begun) {
				first, second = t, u
			}
			if t.job == u.job && (first.end.IsZero() || first.end.Sub(second.begun) > reportLag) {
				n++
			}
		}
	}
	return n
}

func (a leaders) play(ctx context.Context, s *stage) (promises []promise, err error) {
	n := max(minProcesses, s.processes)
	within := 2 * s.holderTimeout
	for _, j := range demoJobs {
		if err := errors.Join(j.Setup(ctx, s.db), j.Fill(ctx, s.db, j.pieces, within)); err != nil {
			return nil, err
		}
	}
	s.view.say(plural(n, "process") + " are ready to sweep tokens, deliver webhooks, apply changes of a stock,")
	s.view.say(fmt.Sprintf("and rebuild a search index, each under Lead, with a HolderTimeout of %s.", seconds(s.holderTimeout)))

	// The receiver does not answer one of the webhooks before its sender is killed.
	inFlight, release := make(chan struct{}), make(chan struct{})
	hold := sync.OnceFunc(func() { close(inFlight); <-release })
	var arrived int
	var mu sync.Mutex
	receiver := &jobs.Receiver{Taken: func(string) {
		mu.Lock()
		arrived++
		this := arrived == demoJobs[killed].pieces/4
		mu.Unlock()
		if this {
			hold()
		}
	}}
	answer := sync.OnceFunc(func() { close(release) })
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	web := &http.Server{Handler: receiver}
	go func() { _ = web.Serve(listener) }()
	defer web.Close()
	defer answer()

	crewCtx, end := context.WithCancel(ctx)
	b := &board{s: s, gone: make([]bool, n)}
	var following sync.WaitGroup
	defer func() {
		b.mu.Lock()
		for i := range b.gone {
			b.gone[i] = true
		}
		b.mu.Unlock()
		end()
		following.Wait()
	}()
	for i := range n {
		brief := leadersBrief{Webhook: "http://" + listener.Addr().String(), HolderTimeout: s.holderTimeout}
		for _, j := range demoJobs {
			lock := s.lockName(j.Name)
			if s.broken {
				lock += fmt.Sprint(i) // one for each process
			}
			brief.Locks = append(brief.Locks, lock)
		}
		p, err := s.start(crewCtx, a, i+1, brief)
		if err != nil {
			return nil, err
		}
		b.crew = append(b.crew, p)
		if err := p.waitReady(); err != nil {
			return nil, err
		}
	}
	for i, p := range b.crew {
		_ = p.tell(true)
		following.Go(func() { b.follow(i+1, p) })
	}

	direct := a.direct
	if s.broken {
		direct = a.leaveAlone
	}
	promises, err = direct(ctx, b, inFlight, answer)
	if err != nil && !errors.Is(err, errNotSeen) {
		return promises, err
	}
	b.say("the rest of the work is done by those who lead")
	workErr := a.finish(ctx, b)
	if workErr != nil && ctx.Err() != nil {
		return promises, workErr
	}
	s.view.clear()

	b.mu.Lock()
	together, terms := b.together(), len(b.terms)
	b.mu.Unlock()
	taken, repeated := receiver.Counts()
	webhooks := demoJobs[killed].pieces
	promises = append([]promise{{
		text: "Lead: a job has one leader at a time", kept: together == 0,
		numbers: fmt.Sprintf("%s of %s, %d beside another", plural(terms, "term"), plural(len(demoJobs), "job"), together),
	}}, promises...)
	done := promise{text: "Lead: every job is done, each piece once", kept: workErr == nil}
	for _, j := range demoJobs {
		done.numbers += fmt.Sprintf("%s %s, ", thousands(j.pieces), j.short)
	}
	done.numbers = strings.TrimSuffix(done.numbers, ", ")
	if workErr != nil {
		done.numbers = workErr.Error()
	}
	return append(promises, done, promise{
		// Those in flight at the kill and at the freeze may be sent again.
		text: "no webhook is taken twice", kept: taken == webhooks && repeated <= 2,
		numbers: fmt.Sprintf("%s of %s taken\n%s sent again, and known by the idempotency key", thousands(taken), thousands(webhooks), thousands(repeated)),
	}), err
}

// leaveAlone only looks on: without locks, nobody takes over from anybody.
func (leaders) leaveAlone(_ context.Context, _ *board, _ <-chan struct{}, answer func()) ([]promise, error) {
	answer()
	return nil, nil
}

// direct kills a leader and freezes another.
func (leaders) direct(ctx context.Context, b *board, inFlight <-chan struct{}, answer func()) (promises []promise, err error) {
	v, patience := b.s.view, b.s.holderTimeout+5*time.Second
	everyJobIsLed := func() bool {
		for i := range demoJobs {
			if b.leader(i) == nil {
				return false
			}
		}
		return true
	}
	if err := b.await(ctx, patience, "a leader of every job", everyJobIsLed); err != nil {
		return nil, err
	}
	b.sayLeaders()

	if err := b.await(ctx, patience, "a webhook in flight", func() bool {
		select {
		case <-inFlight:
			return true
		default:
			return false
		}
	}); err != nil {
		return nil, err
	}
	b.mu.Lock()
	victim := b.last(killed, 0).process
	b.say(called(victim) + " is killed with a webhook in flight (SIGKILL)")
	at := time.Now()
	led := b.remove(victim, at)
	b.mu.Unlock()
	if err := b.crew[victim-1].cmd.Process.Kill(); err != nil {
		return nil, err
	}
	answer()
	follow := promise{text: "Lead: a killed leader is followed at once"}
	if follow.numbers, follow.kept, err = b.succession(ctx, led, at, time.Second); err != nil {
		return append(promises, follow), err
	}
	promises = append(promises, follow)

	// Not before the server knows the HolderTimeout: from the first heartbeat on.
	settled := leadersBrief{HolderTimeout: b.s.holderTimeout}.heartbeat() * 2
	victim = 0
	if err := b.await(ctx, patience, "leaders that are settled", func() bool {
		victim = 0
		if t := b.leader(frozen); t != nil {
			victim = t.process
		}
		for i := range demoJobs {
			if t := b.leader(i); t != nil && t.process == victim && time.Since(t.begun) < settled {
				return false
			}
		}
		return victim > 0
	}); err != nil {
		return promises, err
	}
	b.mu.Lock()
	b.say(called(victim) + " is frozen (SIGSTOP)")
	at = time.Now()
	p := b.crew[victim-1].cmd.Process
	err = freeze(p)
	if errors.Is(err, errors.ErrUnsupported) {
		b.mu.Unlock()
		v.say("this system cannot freeze a process")
		return promises, nil
	}
	defer thaw(p)
	led = b.remove(victim, at)
	b.mu.Unlock()
	if err != nil {
		return promises, err
	}
	follow = promise{text: "Lead: a frozen leader is followed after HolderTimeout"}
	if follow.numbers, follow.kept, err = b.succession(ctx, led, at, b.s.holderTimeout+time.Second); err != nil {
		return append(promises, follow), err
	}
	at = time.Now()
	thaw(p)
	var knows time.Time
	err = b.await(ctx, patience, "the thawed leader's knowing that it has lost", func() bool {
		for _, i := range led {
			t := b.last(i, victim)
			if t.lost.IsZero() {
				return false
			}
			if t.lost.After(knows) {
				knows = t.lost
			}
		}
		return true
	})
	if err == nil {
		b.say(fmt.Sprintf("%s goes on (SIGCONT), and knows after %s that it has lost", called(victim), milliseconds(knows.Sub(at))))
		follow.numbers += "\ntold so " + milliseconds(knows.Sub(at)) + " after it went on"
	}
	follow.kept = follow.kept && err == nil
	return append(promises, follow), err
}

// succession waits until the jobs have other leaders, and says who and how soon.
func (b *board) succession(ctx context.Context, led []int, at time.Time, bound time.Duration) (numbers string, inTime bool, err error) {
	err = b.await(ctx, bound+5*time.Second, "other leaders", func() bool {
		for _, i := range led {
			if t := b.last(i, 0); t == nil || !t.begun.After(at) {
				return false
			}
		}
		return true
	})
	if err != nil {
		return err.Error(), false, err
	}
	inTime = true
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, i := range led {
		t := b.last(i, 0)
		took := t.begun.Sub(at)
		inTime = inTime && took <= bound
		b.say(fmt.Sprintf("%s leads %s %s later", called(t.process), demoJobs[i].short, milliseconds(took)))
		numbers += fmt.Sprintf("%s after %s\n", demoJobs[i].short, milliseconds(took))
	}
	return strings.TrimSuffix(numbers, "\n"), inTime, nil
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

func milliseconds(d time.Duration) string {
	if d >= time.Second {
		return seconds(d)
	}
	return fmt.Sprintf("%d ms", max(1, d.Milliseconds()))
}
