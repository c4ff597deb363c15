package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"time"
)

// contestants are those of a throughput, with what there is on this machine.
func (b *bench) contestants(w *workload, s servers) []contestant {
	var all []contestant
	for _, impl := range []string{ours, floor, recipe, goose, redislock, etcd} {
		switch {
		case w.traced && impl != ours && impl != recipe:
			continue
		case impl == floor && w.goroutines > 1:
			continue // on so many connections, or waiting, it would be another thing
		case impl == goose && w.oneKey && w.goroutines > 1:
			continue // it sleeps for longer than a round
		case impl == redislock && s.Redis == "", impl == etcd && s.Etcd == "":
			continue
		case impl == redislock || impl == etcd:
			all = append(all, contestant{Impl: impl})
		default:
			for _, driver := range drivers {
				all = append(all, contestant{Impl: impl, Driver: driver})
			}
		}
	}
	return slices.DeleteFunc(all, func(c contestant) bool { return !b.impl.MatchString(c.String()) })
}

// throughput measures how many locks per second each contestant takes and releases.
func throughput(b *bench, ctx context.Context, w *workload) (err error) {
	s := b.direct
	if w.delayed {
		if s = b.delayed; s.Postgres == "" {
			return nil // the notes say why
		}
	}
	entrants, err := b.entrants(ctx, w, s)
	defer func() {
		for _, e := range entrants {
			err = errors.Join(err, e.team.Close())
		}
	}()
	if err != nil {
		return err
	}
	if err := b.takeTurns(ctx, w, entrants); err != nil {
		return err
	}
	for _, e := range entrants {
		if !e.failed {
			b.report.add(w, e)
		}
	}
	b.report.compareRates(w)
	if w.goroutines == 1 && !w.traced {
		b.report.listTimes(w)
	}
	if w.delayed {
		far, err := b.roundTrip(ctx, s)
		if err != nil {
			return err
		}
		b.report.compareClosedLoop(w, far)
	}
	return nil
}

// entrants are the contestants that are ready for the workload. The report has the
// others. The error is that of ctx.
func (b *bench) entrants(ctx context.Context, w *workload, s servers) (entrants []*entrant, err error) {
	for _, c := range b.contestants(w, s) {
		e, err := enter(ctx, w, c, s)
		if ctx.Err() != nil {
			return entrants, ctx.Err()
		}
		if err != nil {
			b.report.failed("%s: %v: %v", w.title, c, err)
			continue
		}
		entrants = append(entrants, e)
	}
	return entrants, nil
}

// takeTurns has the entrants do all rounds. The rounds are many and short: so the
// contestants get the same of the machine's good and bad moments. The error is that of ctx.
func (b *bench) takeTurns(ctx context.Context, w *workload, entrants []*entrant) error {
	round, rounds := b.round, b.rounds
	if w.processes > 0 { // which take turns, and need longer rounds for each to have its own
		round, rounds = 3*round, max(1, rounds/3)
	}
	turns := slices.Clone(entrants)
	for i := range rounds + 1 {
		warmUp := i == 0 // opens connections, and prepares statements
		// Nobody always comes after the same one, who may have left something behind.
		rand.Shuffle(len(turns), func(i, j int) { turns[i], turns[j] = turns[j], turns[i] })
		for _, e := range turns {
			if err := b.takeTurn(ctx, w, e, round, !warmUp); err != nil {
				return err
			}
		}
	}
	return nil
}

// takeTurn has an entrant do a round, unless it has failed before. If it fails now, the
// report says so. The error is that of ctx.
func (b *bench) takeTurn(ctx context.Context, w *workload, e *entrant, d time.Duration, counts bool) error {
	if e.failed {
		return nil
	}
	err := e.round(ctx, d, counts)
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if err != nil {
		e.failed = true
		b.report.failed("%s: %v: %v", w.title, e.contestant, err)
	}
	return nil
}

// An entrant is a contestant in a workload.
type entrant struct {
	contestant
	team    team
	counter *int64 // what the lock protects, or nil
	samples []sample
	times   []time.Duration // of each lock, of one goroutine
	shares  []int64         // locks of each process, in all rounds
	failed  bool
}

// A sample is a round's result.
type sample struct {
	ops     int64
	elapsed time.Duration
	mallocs uint64
	bytes   uint64
}

// rate is locks per second.
func (s sample) rate() float64 { return float64(s.ops) / s.elapsed.Seconds() }

func enter(ctx context.Context, w *workload, c contestant, s servers) (*entrant, error) {
	e := &entrant{contestant: c}
	l := lineup{Contestant: c, Servers: s, Key: newKeys(), Goroutines: w.goroutines, OneKey: w.oneKey, Traced: w.traced}
	var err error
	if w.processes > 0 {
		var t *processTeam
		if t, err = newProcessTeam(ctx, l, w.processes); err == nil {
			e.team, e.counter = t, t.counter
		}
		return e, err
	}
	if w.oneKey {
		e.counter = new(int64)
	}
	e.team, err = newLocalTeam(ctx, l, e.counter)
	return e, err
}

// round has e's team do a round, and sees whether the lock excluded anybody.
func (e *entrant) round(ctx context.Context, d time.Duration, counts bool) error {
	var before int64
	if e.counter != nil {
		before = *e.counter
	}
	t, err := e.team.round(ctx, d)
	if err != nil {
		return err
	}
	n := t.ops()
	if e.counter != nil && *e.counter-before != n {
		return fmt.Errorf("%d locks, but the number that they protect grew by %d", n, *e.counter-before)
	}
	if n == 0 {
		return errors.New("not one lock in a round")
	}
	if !counts {
		return nil
	}
	e.samples = append(e.samples, sample{n, t.Elapsed, t.Mallocs, t.Bytes})
	e.times = append(e.times, t.Times...)
	if e.shares == nil {
		e.shares = make([]int64, len(t.Ops))
	}
	for i, n := range t.Ops {
		e.shares[i] += n
	}
	return nil
}

// smallestShare is the smallest process's part of the locks, where 1 is a fair one.
func (e *entrant) smallestShare() float64 {
	var sum int64
	for _, n := range e.shares {
		sum += n
	}
	return float64(slices.Min(e.shares)) * float64(len(e.shares)) / float64(sum)
}
