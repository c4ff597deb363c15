package main

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"
)

// direct kills a leader and freezes another.
func (leaders) direct(ctx context.Context, b *board, in *inbox) (promises []promise, err error) {
	if err := b.await(ctx, b.patience(), "a leader of every job", b.everyJobIsLed); err != nil {
		return nil, err
	}
	b.sayLeaders()
	promises, err = b.killLeader(ctx, in)
	if err != nil {
		return promises, err
	}
	more, err := b.freezeLeader(ctx)
	return append(promises, more...), err
}

// patience is how long the board waits for what should come.
func (b *board) patience() time.Duration { return b.s.holderTimeout + 5*time.Second }

// killLeader kills the leader that has a webhook in flight, and sees who follows.
func (b *board) killLeader(ctx context.Context, in *inbox) ([]promise, error) {
	if err := b.await(ctx, b.patience(), "a webhook in flight", in.oneInFlight); err != nil {
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
	in.answer()
	follow := promise{text: "Lead: a killed leader is followed at once"}
	var err error
	follow.numbers, follow.kept, err = b.succession(ctx, led, at, time.Second)
	return []promise{follow}, err
}

// freezeLeader freezes a leader, sees who follows, and has it go on. There is no promise
// where the system cannot freeze a process.
func (b *board) freezeLeader(ctx context.Context) ([]promise, error) {
	victim, err := b.settledLeader(ctx)
	if err != nil {
		return nil, err
	}
	b.mu.Lock()
	b.say(called(victim) + " is frozen (SIGSTOP)")
	at := time.Now()
	p := b.crew[victim-1].cmd.Process
	err = freeze(p)
	if errors.Is(err, errors.ErrUnsupported) {
		b.mu.Unlock()
		b.s.view.say("this system cannot freeze a process")
		return nil, nil
	}
	defer thaw(p)
	led := b.remove(victim, at)
	b.mu.Unlock()
	if err != nil {
		return nil, err
	}
	follow := promise{text: "Lead: a frozen leader is followed after HolderTimeout"}
	if follow.numbers, follow.kept, err = b.succession(ctx, led, at, b.s.holderTimeout+time.Second); err != nil {
		return []promise{follow}, err
	}
	follow.numbers += fmt.Sprintf("\nHolderTimeout (%s) counts from its last heartbeat before that", seconds(b.s.holderTimeout))
	thawed := time.Now()
	thaw(p)
	knows, err := b.awaitLosses(ctx, victim, led)
	if err == nil {
		took := milliseconds(knows.Sub(thawed))
		b.say(fmt.Sprintf("%s goes on (SIGCONT), and knows after %s that it has lost", called(victim), took))
		follow.numbers += "\nthe frozen one knows " + took + " after it went on"
	}
	follow.kept = follow.kept && err == nil
	return []promise{follow}, err
}

// settledLeader waits for a leader whose HolderTimeout the server knows in each of its
// terms. The server knows it from the first heartbeat on.
func (b *board) settledLeader(ctx context.Context) (number int, err error) {
	settled := leadersBrief{HolderTimeout: b.s.holderTimeout}.heartbeat() * 2
	err = b.await(ctx, b.patience(), "leaders that are settled", func() bool {
		number = 0
		if t := b.leader(frozen); t != nil {
			number = t.process
		}
		for i := range demoJobs {
			if t := b.leader(i); t != nil && t.process == number && time.Since(t.begun) < settled {
				return false
			}
		}
		return number > 0
	})
	return number, err
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
		numbers += fmt.Sprintf("%s after %s, ", demoJobs[i].short, milliseconds(took))
	}
	return strings.TrimSuffix(numbers, ", "), inTime, nil
}

// awaitLosses waits until a process knows that it leads none of the jobs any more, and
// returns when it knew of the last one.
func (b *board) awaitLosses(ctx context.Context, number int, led []int) (knows time.Time, err error) {
	err = b.await(ctx, b.patience(), "the thawed leader's knowing that it has lost", func() bool {
		for _, i := range led {
			t := b.last(i, number)
			if t.lost.IsZero() {
				return false
			}
			if t.lost.After(knows) {
				knows = t.lost
			}
		}
		return true
	})
	return knows, err
}
