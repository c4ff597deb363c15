//go:build unix

package main

import (
	"log/slog"
	"os"
	"runtime"
	"sync"
	"syscall"
	"time"
)

const (
	// groupPoll is how often a process group is looked at whose leader has ended.
	groupPoll = 10 * time.Millisecond

	// terminalPoll is how often a command that waits for the terminal is offered it.
	terminalPoll = 100 * time.Millisecond
)

// A child is a running command, and its process group.
type child struct {
	pid  int // and the number of the group
	done chan struct{}
	log  *slog.Logger

	tty *terminal // nil: there is none

	mu     sync.Mutex
	dead   bool               // the group is
	asks   bool               // it is stopped until it has the terminal
	status syscall.WaitStatus // of the command; to be read when it is dead
}

// supported returns nil: commands can be run.
func supported() error { return nil }

// startChild starts a command as the leader of a process group.
func startChild(path string, argv, env []string, log *slog.Logger) (*child, error) {
	c := &child{done: make(chan struct{}), log: log}
	started := make(chan error)
	go c.live(path, argv, env, started)
	return c, <-started
}

// live starts the command, and returns when its group is dead.
func (c *child) live(path string, argv, env []string, started chan<- error) {
	// On Linux, the command is killed when the thread that has started it ends.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	adoptOrphans()
	g := startGuard(c.log)
	p, err := os.StartProcess(path, argv, &os.ProcAttr{
		Env:   env,
		Files: []*os.File{os.Stdin, os.Stdout, os.Stderr},
		Sys:   childAttr(),
	})
	if err != nil {
		g.end()
		started <- err
		return
	}
	g.begin(p.Pid)
	c.pid = p.Pid
	_ = p.Release() // wait waits for it
	if c.tty = openTerminal(); c.tty != nil && interactive() {
		c.tty.give(c.pid)
	}
	soon(func() { c.log.Info("started", "pid", c.pid) })
	started <- nil

	c.wait()
	c.waitForGroup()
	if c.tty != nil {
		c.tty.takeBack(c.pid)
	}
	g.end()
	close(c.done)
}

// wait waits for the command. It also reaps orphans of the group, which are this process's children
// on Linux, and everywhere if it is process 1.
func (c *child) wait() {
	for {
		var status syscall.WaitStatus
		pid, err := syscall.Wait4(-1, &status, syscall.WUNTRACED, nil)
		switch {
		case err == syscall.EINTR:
		case err != nil: // it is nobody's child any more, which cannot be
			return
		case pid != c.pid:
		case status.Stopped():
			c.suspended(status.StopSignal())
		default:
			c.mu.Lock()
			c.status = status
			c.mu.Unlock()
			return
		}
	}
}

// waitForGroup waits for those who outlive the leader of the group.
func (c *child) waitForGroup() {
	for begun := false; ; begun = true {
		for {
			pid, err := syscall.Wait4(-1, nil, syscall.WNOHANG, nil)
			if err != syscall.EINTR && pid <= 0 {
				break
			}
		}
		c.mu.Lock()
		c.dead = syscall.Kill(-c.pid, 0) == syscall.ESRCH
		dead := c.dead
		c.mu.Unlock()
		if dead {
			return
		}
		if !begun {
			soon(func() { c.log.Info("the command has ended, and processes of its group go on", "pid", c.pid) })
		}
		time.Sleep(groupPoll)
	}
}

// suspended has the command go on, which the terminal has stopped. A command that is suspended would
// keep its lock; one that needs the terminal gets it, if that is this job's.
func (c *child) suspended(by syscall.Signal) {
	switch by {
	case syscall.SIGTSTP:
		_ = c.send(syscall.SIGCONT)
		soon(func() { c.log.Warn("the command goes on, because it would keep its lock while suspended") })
	case syscall.SIGTTIN, syscall.SIGTTOU:
		if c.tty != nil {
			go c.waitForTerminal()
		}
	}
}

// waitForTerminal has the command go on when it has the terminal. A shell that brings this job to the
// foreground need not say so.
func (c *child) waitForTerminal() {
	if !c.tty.give(c.pid) {
		soon(func() { c.log.Warn("the command waits for the terminal, and keeps its lock", "pid", c.pid) })
	}
	c.setAsks(true)
	for !c.tty.give(c.pid) && c.setAsks(true) {
		time.Sleep(terminalPoll)
	}
	c.setAsks(false)
	_ = c.send(syscall.SIGCONT)
}

// setAsks notes whether the command is stopped until it has the terminal. It returns whether it lives.
func (c *child) setAsks(asks bool) (lives bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.asks = asks
	return !c.dead
}

// forward sends a signal that this process has got.
func (c *child) forward(s os.Signal) error {
	err := c.send(s.(syscall.Signal))
	c.mu.Lock()
	asks := c.asks
	c.mu.Unlock()
	if asks && ends(s) { // which it is to notice
		return c.send(syscall.SIGCONT)
	}
	return err
}

// send sends a signal to the group.
func (c *child) send(s syscall.Signal) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.dead { // its number may be another's by now
		return nil
	}
	if err := syscall.Kill(-c.pid, s); err != syscall.ESRCH {
		return err
	}
	return nil
}

// terminate asks the group to end.
func (c *child) terminate() {
	_ = c.send(syscall.SIGTERM)
	_ = c.send(syscall.SIGCONT) // for those that are stopped
}

// kill kills the group.
func (c *child) kill() error { return c.send(syscall.SIGKILL) }

// endsWithin returns whether the group is dead within d.
func (c *child) endsWithin(d time.Duration) bool {
	select {
	case <-c.done:
		return true
	case <-time.After(d):
		return false
	}
}

// exitCode returns the exit status of the command, as shells have it.
func (c *child) exitCode() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.status.Signaled() {
		return exitSignal + int(c.status.Signal())
	}
	return c.status.ExitStatus()
}
