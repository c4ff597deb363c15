package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"time"
)

// The bench and its processes talk over pipes, in JSON values: what to do comes on the
// standard input, whose end is the process's end, so that none outlives the bench; the
// answers go to the standard output.

// childEnv makes this program a process of the bench: its value names the job.
const childEnv = "ADVISORY_BENCH_CHILD"

var jobs = map[string]func(context.Context, *json.Decoder, *json.Encoder) error{
	"team":  teamJob,
	"delay": delayJob,
}

func childMain(job string) int {
	f := jobs[job]
	if f == nil {
		fmt.Fprintf(os.Stderr, "bench: no job %q\n", job)
		return 2
	}
	// Ctrl-C goes to all processes of the terminal, but the bench ends its own.
	signal.Ignore(os.Interrupt)
	if err := f(context.Background(), json.NewDecoder(os.Stdin), json.NewEncoder(os.Stdout)); err != nil && !errors.Is(err, io.EOF) {
		fmt.Fprintf(os.Stderr, "bench: %s: %v\n", job, err)
		return 1
	}
	return 0
}

// A child is a process of the bench.
type child struct {
	cmd   *exec.Cmd
	stdin io.WriteCloser
	to    *json.Encoder
	from  *json.Decoder
}

// startChild starts a process with a job.
func startChild(job string) (*child, error) {
	exe, err := os.Executable()
	if err != nil {
		return nil, err
	}
	c := &child{cmd: exec.Command(exe)}
	c.cmd.Env = append(os.Environ(), childEnv+"="+job)
	c.cmd.Stderr = os.Stderr
	stdout, err := c.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if c.stdin, err = c.cmd.StdinPipe(); err != nil {
		return nil, err
	}
	c.to, c.from = json.NewEncoder(c.stdin), json.NewDecoder(stdout)
	return c, c.cmd.Start()
}

// ask tells the process something and waits for its answer.
func (c *child) ask(question, answer any) error {
	if err := c.to.Encode(question); err != nil {
		return err
	}
	return c.from.Decode(answer)
}

// end tells the process to end. Close does that, too.
func (c *child) end() { _ = c.stdin.Close() }

// Close ends the process, and waits until it is gone.
func (c *child) Close() error {
	c.end()
	kill := time.AfterFunc(drainTimeout, func() { _ = c.cmd.Process.Kill() })
	defer kill.Stop()
	return c.cmd.Wait()
}

// An order tells a process what team it is.
type order struct {
	Lineup  lineup
	Counter string // file that holds the number which the lock protects
}

// A reply is a process's answer, to its order and to each round.
type reply struct {
	Tally tally
	Error string
}

// A processTeam is several processes' goroutines.
type processTeam struct {
	children []*child
	file     string
	counter  *int64
	unmap    func() error
}

// newProcessTeam starts processes that each have l's goroutines.
func newProcessTeam(ctx context.Context, l lineup, processes int) (t *processTeam, err error) {
	t = &processTeam{unmap: func() error { return nil }}
	defer func() {
		if err != nil {
			err = errors.Join(err, t.Close())
		}
	}()
	dir, err := os.MkdirTemp("", "advisory-bench-")
	if err != nil {
		return t, err
	}
	t.file = filepath.Join(dir, "counter")
	if err := os.WriteFile(t.file, make([]byte, 8), 0o600); err != nil {
		return t, err
	}
	if t.counter, t.unmap, err = sharedCounter(t.file); err != nil {
		return t, err
	}
	for range processes {
		c, err := startChild("team")
		if err != nil {
			return t, err
		}
		t.children = append(t.children, c)
		var r reply
		if err := c.ask(order{l, t.file}, &r); err != nil {
			return t, err
		}
		if r.Error != "" {
			return t, errors.New(r.Error)
		}
	}
	return t, ctx.Err()
}

func (t *processTeam) Close() error {
	for _, c := range t.children {
		c.end()
	}
	var errs []error
	for _, c := range t.children {
		errs = append(errs, c.Close())
	}
	errs = append(errs, t.unmap())
	if t.file != "" {
		errs = append(errs, os.RemoveAll(filepath.Dir(t.file)))
	}
	return errors.Join(errs...)
}

func (t *processTeam) round(ctx context.Context, d time.Duration) (sum tally, err error) {
	for _, c := range t.children {
		if err := c.to.Encode(d); err != nil {
			return sum, err
		}
	}
	for _, c := range t.children {
		var r reply
		if err := c.from.Decode(&r); err != nil {
			return sum, err
		}
		if r.Error != "" {
			return sum, errors.New(r.Error)
		}
		sum.Ops = append(sum.Ops, r.Tally.ops())
		sum.Elapsed = max(sum.Elapsed, r.Tally.Elapsed)
		sum.Mallocs += r.Tally.Mallocs
		sum.Bytes += r.Tally.Bytes
	}
	return sum, ctx.Err()
}

// teamJob is the other end of a processTeam.
func teamJob(ctx context.Context, from *json.Decoder, to *json.Encoder) error {
	var o order
	if err := from.Decode(&o); err != nil {
		return err
	}
	counter, unmap, err := sharedCounter(o.Counter)
	if err != nil {
		return errors.Join(err, to.Encode(reply{Error: err.Error()}))
	}
	defer unmap()
	t, err := newLocalTeam(ctx, o.Lineup, counter)
	if err != nil {
		return errors.Join(err, to.Encode(reply{Error: err.Error()}))
	}
	defer t.Close()
	if err := to.Encode(reply{}); err != nil {
		return err
	}
	for {
		var d time.Duration
		if err := from.Decode(&d); err != nil {
			return err
		}
		var r reply
		if r.Tally, err = t.round(ctx, d); err != nil {
			r.Error = err.Error()
		}
		if err := to.Encode(r); err != nil {
			return err
		}
	}
}
