package main

import (
	"bytes"
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/pgadvisory/advisory/integration/internal/pgtest"
)

// The demo and its workers talk over pipes, in JSON values. On its standard input
// a worker is told what to do (an order), and then when to begin (true); the end
// of that input is the end of the worker, so that none outlives the demo, however
// that ends. On its standard output it sends messages.

const (
	// workerEnv makes this program a worker.
	workerEnv = "ADVISORY_DEMO_WORKER"
	// reportEvery is how often a worker says how far it is.
	reportEvery = 50 * time.Millisecond
	// killAfter is how long a worker that was told to end may take.
	killAfter = 2 * time.Second
)

// An order tells a worker what to do. It comes over the pipe, because a DSN may
// hold a password, and arguments and environments can be seen by others.
type order struct {
	Act    string          `json:"act"`
	Number int             `json:"number"` // of the worker, from 1
	Driver string          `json:"driver"`
	DSN    string          `json:"dsn"`
	Brief  json.RawMessage `json:"brief"` // of the act
}

type message struct {
	Ready  bool            `json:"ready,omitempty"`
	Done   int64           `json:"done,omitempty"` // steps so far
	Event  json.RawMessage `json:"event,omitempty"`
	Result json.RawMessage `json:"result,omitempty"`
	Error  string          `json:"error,omitempty"`
}

// drivers are mixed: a lock is the server's, which does not care who asks for it.
var drivers = []struct{ name, registered string }{
	{"pgx", "pgx"}, {"pgx", "pgx"}, {"pgx", "pgx"}, {"lib/pq", "postgres"},
}

// called is what the worker of this number is called in the output.
func called(number int) string {
	return fmt.Sprintf("process %d (%s)", number, drivers[(number-1)%len(drivers)].name)
}

// A process is a worker, seen from the demo.
type process struct {
	cmd      *exec.Cmd
	stdin    io.WriteCloser
	messages chan message // closed when the process has ended
	err      error        // how it ended; to be read after that
}

// start starts a worker, which lives until it is done or ctx ends.
func (s *stage) start(ctx context.Context, a act, number int, brief any) (*process, error) {
	exe, err := os.Executable()
	if err != nil {
		return nil, err
	}
	dsn, err := pgtest.WithParam(s.dsn, "application_name", s.schema)
	if err != nil {
		return nil, err
	}
	o := order{Act: a.name(), Number: number, Driver: drivers[(number-1)%len(drivers)].registered, DSN: dsn}
	if o.Brief, err = json.Marshal(brief); err != nil {
		return nil, err
	}

	p := &process{cmd: exec.CommandContext(ctx, exe), messages: make(chan message)}
	p.cmd.Env = append(os.Environ(), workerEnv+"=1")
	var stderr bytes.Buffer
	p.cmd.Stderr = &stderr
	if p.stdin, err = p.cmd.StdinPipe(); err != nil {
		return nil, err
	}
	stdout, err := p.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	p.cmd.Cancel = p.stdin.Close
	p.cmd.WaitDelay = killAfter
	if err := p.cmd.Start(); err != nil {
		return nil, err
	}
	go func() {
		defer close(p.messages)
		var (
			said     error
			finished bool
		)
		for in := json.NewDecoder(stdout); ; {
			var m message
			if in.Decode(&m) != nil {
				break
			}
			if m.Error != "" {
				said = errors.New(m.Error)
			}
			finished = finished || m.Result != nil
			p.messages <- m
		}
		err := p.cmd.Wait()
		switch {
		case ctx.Err() != nil:
			p.err = context.Cause(ctx)
		case said != nil:
			p.err = fmt.Errorf("%s: %w", called(number), said)
		case err != nil:
			p.err = fmt.Errorf("%s: %w: %s", called(number), err, bytes.TrimSpace(stderr.Bytes()))
		case !finished:
			p.err = fmt.Errorf("%s ended without a result", called(number))
		}
	}()
	// If this fails, the process has ended, and its own error says more.
	_ = p.tell(o)
	return p, nil
}

func (p *process) tell(v any) error { return json.NewEncoder(p.stdin).Encode(v) }

// waitReady waits until the process could begin.
func (p *process) waitReady() error {
	for m := range p.messages {
		if m.Ready {
			return nil
		}
	}
	return p.err
}

// perform has the workers of an act begin together and waits until they have ended.
// It calls progress with the number of steps that they have done so far. The time
// is counted from their common beginning.
func perform[Result any](
	ctx context.Context, s *stage, a act,
	brief func(number int) any, progress func(done int, took time.Duration),
) (results []Result, took time.Duration, err error) {
	ctx, cancel := context.WithCancelCause(ctx)
	var crew []*process
	defer func() {
		cancel(nil)
		for _, p := range crew {
			for range p.messages {
			}
		}
	}()
	if crew, err = s.startCrew(ctx, a, brief); err != nil {
		return nil, 0, err
	}

	begin := time.Now()
	for _, p := range crew {
		_ = p.tell(true)
	}
	results = make([]Result, len(crew))
	all := &steps{
		of:       make([]int64, len(crew)),
		progress: func(done int) { progress(done, time.Since(begin)) },
	}
	var g errgroup.Group
	for i, p := range crew {
		g.Go(func() error {
			for m := range p.messages {
				if err := m.decodeResult(&results[i]); err != nil {
					return err
				}
				all.update(i, m.Done)
			}
			if p.err != nil {
				cancel(p.err) // the others need not go on
			}
			return p.err
		})
	}
	err = g.Wait()
	return results, time.Since(begin), err
}

// startCrew starts the workers of an act, and returns when all of them are ready. It
// returns those that it has started, also with an error.
func (s *stage) startCrew(ctx context.Context, a act, brief func(number int) any) (crew []*process, err error) {
	for i := range s.processes {
		p, err := s.start(ctx, a, i+1, brief(i+1))
		if err != nil {
			return crew, err
		}
		crew = append(crew, p)
	}
	for _, p := range crew {
		if err := p.waitReady(); err != nil {
			return crew, err
		}
	}
	return crew, nil
}

// decodeResult stores the message's result, if it has one, in the value to which result
// points.
func (m message) decodeResult(result any) error {
	if m.Result == nil {
		return nil
	}
	return json.Unmarshal(m.Result, result)
}

// steps counts the steps of all workers of an act.
type steps struct {
	progress func(done int)

	mu sync.Mutex
	of []int64 // the steps of each worker
}

// update notes how many steps a worker has done, and calls progress with the sum.
func (s *steps) update(worker int, done int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.of[worker] = max(s.of[worker], done)
	var all int64
	for _, n := range s.of {
		all += n
	}
	s.progress(int(all))
}

// A worker is a worker process, seen from inside.
type worker struct {
	order
	db   *sql.DB
	done atomic.Int64 // steps so far

	gate chan struct{} // closed when all may begin
	mu   sync.Mutex
	out  *json.Encoder
}

// work is the main function of a worker.
func work() (status int) {
	// Ctrl-C goes to all processes of a terminal. The demo decides when its
	// workers end.
	signal.Ignore(os.Interrupt)

	w := &worker{gate: make(chan struct{}), out: json.NewEncoder(os.Stdout)}
	in := json.NewDecoder(os.Stdin)
	if err := in.Decode(&w.order); err != nil {
		return 1
	}
	go func() {
		var begin bool
		for in.Decode(&begin) == nil {
			if begin {
				close(w.gate)
			}
		}
		os.Exit(1)
	}()

	result, err := w.work()
	m := message{Done: w.done.Load()}
	if err == nil {
		m.Result, err = json.Marshal(result)
	}
	if err != nil {
		m.Error = err.Error()
		status = 1
	}
	w.send(m)
	return status
}

func (w *worker) work() (result any, err error) {
	w.db, err = sql.Open(w.Driver, w.DSN)
	if err != nil {
		return nil, err
	}
	defer w.db.Close()
	for _, a := range acts {
		if a.name() == w.Act {
			return a.work(context.Background(), w)
		}
	}
	return nil, fmt.Errorf("no act %q", w.Act)
}

// begin waits until all workers are ready to begin.
func (w *worker) begin() {
	w.send(message{Ready: true})
	<-w.gate
	go func() {
		for range time.Tick(reportEvery) {
			w.send(message{Done: w.done.Load()})
		}
	}()
}

func (w *worker) send(m message) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if err := w.out.Encode(m); err != nil {
		os.Exit(1) // there is nobody to work for
	}
}
