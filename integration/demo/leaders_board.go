package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"
)

// A term is reported to have ended after the lock was released: by then the next
// may have begun.
const reportLag = 500 * time.Millisecond

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

	end       context.CancelFunc // ends the crew
	following sync.WaitGroup     // of follow
}

// newBoard returns the board of a crew of n processes.
func newBoard(s *stage, n int) *board {
	return &board{s: s, gone: make([]bool, n), end: func() {}}
}

// assemble starts the crew, and returns when all of it is ready. Each process has the
// brief of its index.
func (b *board) assemble(ctx context.Context, a act, brief func(index int) any) error {
	ctx, b.end = context.WithCancel(ctx)
	for i := range b.gone {
		p, err := b.s.start(ctx, a, i+1, brief(i))
		if err != nil {
			return err
		}
		b.crew = append(b.crew, p)
		if err := p.waitReady(); err != nil {
			return err
		}
	}
	return nil
}

// beginAll has the crew begin, and follows what each process says.
func (b *board) beginAll() {
	for i, p := range b.crew {
		_ = p.tell(true)
		b.following.Go(func() { b.follow(i+1, p) })
	}
}

// dismiss ends the crew, and returns when nobody is followed any more.
func (b *board) dismiss() {
	b.mu.Lock()
	for i := range b.gone {
		b.gone[i] = true
	}
	b.mu.Unlock()
	b.end()
	b.following.Wait()
}

// follow notes the terms of a process, until the process has ended.
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

// everyJobIsLed tells whether each job has a leader. The caller holds mu.
func (b *board) everyJobIsLed() bool {
	for i := range demoJobs {
		if b.leader(i) == nil {
			return false
		}
	}
	return true
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

// oneLeaderAtATime is the promise about all terms.
func (b *board) oneLeaderAtATime() promise {
	b.mu.Lock()
	together, terms := b.together(), len(b.terms)
	b.mu.Unlock()
	return promise{
		text: "Lead: a job has one leader at a time", kept: together == 0,
		numbers: fmt.Sprintf("%s of %s, %d beside another", plural(terms, "term"), plural(len(demoJobs), "job"), together),
	}
}
