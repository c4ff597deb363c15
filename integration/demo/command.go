package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"time"

	"github.com/pgadvisory/advisory/integration/internal/pgtest"
)

// command is what a shell script or a crontab has instead of the package: the program
// advisory. Its processes are not workers. command_build.go compiles it.
type command struct{}

const (
	script = "./report.sh"
	// The script ends with its standard input: none outlives the demo.
	scriptText = "#!/bin/sh\necho runs\nexec cat\n"

	exitHeld = 75 // of advisory: another holds the lock
)

func (command) name() string  { return "command" }
func (command) title() string { return "the command, for shells and crontabs" }

func (command) work(context.Context, *worker) (any, error) { return nil, errors.ErrUnsupported }

func (c command) play(ctx context.Context, s *stage) ([]promise, error) {
	switch err := s.tool.err; {
	case errors.As(err, new(leftOut)):
		s.view.say("left out: " + err.Error())
		return nil, nil
	case err != nil:
		return nil, err
	}
	dsn, err := pgtest.WithParam(s.dsn, "application_name", s.schema)
	if err != nil {
		return nil, err
	}
	err = errors.Join(
		os.WriteFile(s.tool.path("dsn"), []byte(dsn), 0o600), // which may hold a password
		os.WriteFile(s.tool.path(script), []byte(scriptText), 0o700),
	)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(ctx)
	var all []*shellRun
	defer func() {
		cancel()
		for _, r := range all {
			<-r.ended
		}
	}()
	start := func(args ...string) (*shellRun, error) {
		r, err := s.tool.run(ctx, append([]string{"run", "--dsn-file", "dsn"}, args...)...)
		if err == nil {
			all = append(all, r)
		}
		return r, err
	}

	lock := "report-" + s.schema[len(s.schema)-4:] // one for this run of the demo
	once, err := c.once(ctx, s, lock, start)
	if err != nil || s.broken {
		return []promise{once}, err
	}
	next, err := c.next(ctx, s, lock, start)
	return []promise{once, next}, err
}

// once has as many as there are processes run the script at once.
func (command) once(ctx context.Context, s *stage, lock string, start func(args ...string) (*shellRun, error)) (once promise, err error) {
	once.text = "advisory run: of many at once, one runs its command"
	s.view.say("$ advisory run --no-wait " + lock + " -- " + script)
	var all []*shellRun
	for i := range s.processes {
		name := lock
		if s.broken {
			name += fmt.Sprint(i)
		}
		r, err := start("--no-wait", name, "--", script)
		if err != nil {
			return once, err
		}
		all = append(all, r)
	}
	var ran, refused int
	for _, r := range all { // each runs, or has ended, before one may end
		switch began, err := r.begins(ctx); {
		case err != nil:
			return once, err
		case began:
			ran++
		case r.status() == exitHeld:
			refused++
		default:
			return once, r.idle()
		}
	}
	for _, r := range all {
		if err := r.end(); err != nil && r.status() != exitHeld {
			return once, err
		}
	}
	once.kept = ran == 1 && refused == s.processes-1
	once.numbers = fmt.Sprintf("%d ran it, %d ended with exit status %d", ran, refused, exitHeld)
	s.view.say(fmt.Sprintf("%d at once: %s", s.processes, once.numbers))
	return once, nil
}

// next kills one, and sees another follow.
func (c command) next(ctx context.Context, s *stage, lock string, start func(args ...string) (*shellRun, error)) (next promise, err error) {
	next.text = "advisory run: one that is killed is followed, its command dead"
	first, err := start(lock, "--", script)
	if err != nil {
		return next, err
	}
	if err := first.runs(ctx); err != nil {
		return next, err
	}
	second, err := start(lock, "--", script)
	if err != nil {
		return next, err
	}
	s.view.say("without --no-wait, one of two waits:")
	s.view.say("$ advisory ls (its first columns)")
	table, err := c.list(ctx, s, lock)
	if err != nil {
		return next, err
	}
	for _, line := range table {
		s.view.say(line)
	}
	at := time.Now()
	if err := first.cmd.Process.Kill(); err != nil {
		return next, err
	}
	if err := second.runs(ctx); err != nil {
		return next, err
	}
	took := second.at.Sub(at)
	select {
	case <-first.ended: // and so has the script
	case <-ctx.Done():
		return next, context.Cause(ctx)
	}
	next.kept = took <= time.Second
	next.numbers = "the next one ran it after " + milliseconds(took)
	s.view.say("the one that holds it is killed (SIGKILL): " + next.numbers)
	return next, second.end()
}

// list returns what "advisory ls" prints of a lock that one holds and one waits for: as
// many columns as there is room for.
func (command) list(ctx context.Context, s *stage, lock string) (table []string, err error) {
	ctx, cancel := context.WithTimeoutCause(ctx, 5*time.Second, errors.New("advisory ls does not list the lock"))
	defer cancel()
	for {
		cmd := exec.CommandContext(ctx, s.tool.exe, "ls", "--dsn-file", s.tool.path("dsn"))
		out, err := cmd.Output()
		switch {
		case ctx.Err() != nil:
			return nil, context.Cause(ctx)
		case err != nil:
			return nil, fmt.Errorf("advisory ls: %w", err)
		}
		if table = rowsOf(string(out), lock); len(table) == 3 {
			return table, nil
		}
		// The lock has no name there yet, or a wait begins anew.
		time.Sleep(50 * time.Millisecond)
	}
}

// rowsOf returns the first columns of the head and of the rows of a lock: those that begin
// with its name, and with none after that.
func rowsOf(table, lock string) (rows []string) {
	head, rest, _ := strings.Cut(table, "\n")
	width := strings.Index(head, "USER")
	if width < 0 {
		return nil
	}
	rows = []string{head[:width]}
	for line := range strings.Lines(rest) {
		if strings.HasPrefix(line, lock+" ") || len(rows) > 1 && strings.HasPrefix(line, " ") {
			rows = append(rows, strings.TrimRight(line[:min(width, len(line))], " \n"))
		} else if len(rows) > 1 {
			break
		}
	}
	rows[0] = strings.TrimRight(rows[0], " ")
	return rows
}

// A shellRun is a process of "advisory run" with the script.
type shellRun struct {
	cmd    *exec.Cmd
	stdin  io.Closer
	stderr bytes.Buffer // to be read when it has ended

	began chan struct{} // closed when the script runs
	at    time.Time     // when it did
	ended chan struct{} // closed when it and the script have ended
	err   error         // how; to be read after that
}

// run starts the command advisory, which ends with ctx.
func (t *tool) run(ctx context.Context, args ...string) (*shellRun, error) {
	r := &shellRun{cmd: exec.CommandContext(ctx, t.exe, args...), began: make(chan struct{}), ended: make(chan struct{})}
	r.cmd.Dir = t.dir
	r.cmd.Stderr = &r.stderr
	r.cmd.Cancel = func() error { return r.cmd.Process.Signal(syscall.SIGTERM) }
	r.cmd.WaitDelay = killAfter
	var err error
	if r.stdin, err = r.cmd.StdinPipe(); err != nil {
		return nil, err
	}
	stdout, err := r.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := r.cmd.Start(); err != nil {
		return nil, err
	}
	go func() {
		defer close(r.ended)
		lines := bufio.NewScanner(stdout)
		if lines.Scan() {
			r.at = time.Now()
			close(r.began)
		}
		for lines.Scan() {
		}
		r.err = r.cmd.Wait()
	}()
	return r, nil
}

// begins waits until the script runs, or the process has ended without that.
func (r *shellRun) begins(ctx context.Context) (began bool, err error) {
	select {
	case <-r.began:
		return true, nil
	case <-r.ended:
		select {
		case <-r.began:
			return true, nil
		default:
			return false, nil
		}
	case <-ctx.Done():
		return false, context.Cause(ctx)
	}
}

// runs is begins where the script must run.
func (r *shellRun) runs(ctx context.Context) error {
	began, err := r.begins(ctx)
	if err == nil && !began {
		err = r.idle()
	}
	return err
}

// idle is the error of a process that has ended without running the script.
func (r *shellRun) idle() error {
	return errors.Join(errors.New("advisory run does not run "+script), r.failure())
}

// end ends the script, and returns when that and the process have ended.
func (r *shellRun) end() error {
	_ = r.stdin.Close()
	<-r.ended
	return r.failure()
}

// status is the exit status of a process that has ended.
func (r *shellRun) status() int { return r.cmd.ProcessState.ExitCode() }

// failure says how a process that has ended has failed, if it has.
func (r *shellRun) failure() error {
	if r.err == nil {
		return nil
	}
	return fmt.Errorf("advisory run: %w: %s", r.err, bytes.TrimSpace(r.stderr.Bytes()))
}
