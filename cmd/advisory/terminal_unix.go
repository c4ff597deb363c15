//go:build unix

package main

import (
	"os"
	"os/signal"
	"syscall"

	"golang.org/x/sys/unix"
	"golang.org/x/term"
)

// A terminal is the one that controls this process. The process group in its foreground may read from
// it, and gets the signals of its keys.
type terminal struct {
	fd    int
	group int // of this process
}

// interactive returns whether a command would talk to a user.
func interactive() bool {
	return term.IsTerminal(int(os.Stdin.Fd())) && term.IsTerminal(int(os.Stdout.Fd()))
}

// openTerminal returns the controlling terminal, or nil if there is none.
func openTerminal() *terminal {
	fd, err := unix.Open("/dev/tty", unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil
	}
	return &terminal{fd: fd, group: unix.Getpgrp()}
}

func (t *terminal) close() { _ = unix.Close(t.fd) }

// give puts the group of a child into the foreground, if this process's own is there. It returns
// whether the child's is there now.
func (t *terminal) give(child int) bool {
	return t.pass(t.group, child)
}

// takeBack is the reverse of give.
func (t *terminal) takeBack(child int) { t.pass(child, t.group) }

func (t *terminal) pass(from, to int) bool {
	front, err := unix.IoctlGetInt(t.fd, unix.TIOCGPGRP)
	switch {
	case err != nil:
		return false
	case front != from:
		return front == to
	}
	// A process in the background that changes the foreground is stopped, unless it ignores that.
	signal.Ignore(syscall.SIGTTOU)
	defer signal.Reset(syscall.SIGTTOU)
	return unix.IoctlSetPointerInt(t.fd, unix.TIOCSPGRP, to) == nil
}
