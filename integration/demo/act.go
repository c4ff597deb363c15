package main

import "context"

// An act is one part of the demo, in files of its own. It shows one thing and
// checks what the package promises about it.
type act interface {
	name() string
	title() string // in a few words

	// play directs the act, in the demo's own process, and returns the promises
	// that it has checked. An error means that the act could not be played to
	// its end.
	play(ctx context.Context, s *stage) ([]promise, error)

	// work is what the act's worker processes do. The result goes to play, as
	// JSON.
	work(ctx context.Context, w *worker) (result any, err error)
}

// acts are played in this order.
var acts = []act{increments{}, migrations{}, leaders{}, command{}}

// A promise is one line of the summary.
type promise struct {
	text    string
	kept    bool
	numbers string // what was measured, in one or more lines
}
