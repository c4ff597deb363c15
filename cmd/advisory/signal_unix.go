//go:build unix

package main

import (
	"os"
	"os/signal"
	"slices"
	"syscall"
)

// kept are the signals that are not forwarded: they are about this process itself, or a fault in it.
var kept = []syscall.Signal{
	syscall.SIGCHLD, syscall.SIGPIPE, syscall.SIGTTIN, syscall.SIGTTOU,
	syscall.SIGURG,                     // the Go runtime sends it to itself
	syscall.SIGPROF, syscall.SIGVTALRM, // timers of this process
	syscall.SIGSEGV, syscall.SIGBUS, syscall.SIGFPE, syscall.SIGILL, // faults
	syscall.SIGTRAP, syscall.SIGSYS, syscall.SIGABRT,
	syscall.SIGKILL, syscall.SIGSTOP, // cannot be caught
}

// notify has the signals that can be forwarded sent to signals. One that is ignored, as SIGHUP is after
// nohup, stays so for the command, too.
func notify(signals chan<- os.Signal) {
	// A write to a standard error that has been closed is an error, and does not end this process.
	signal.Notify(make(chan os.Signal, 1), syscall.SIGPIPE)
	for s := syscall.Signal(1); s < 32; s++ {
		if !slices.Contains(kept, s) && !signal.Ignored(s) {
			signal.Notify(signals, s)
		}
	}
}

// ends returns whether a signal ends a process that does nothing about it.
func ends(s os.Signal) bool {
	switch s {
	case syscall.SIGWINCH, syscall.SIGCONT, syscall.SIGTSTP, syscall.SIGIO:
		return false
	default:
		return true
	}
}

// stops returns whether a signal asks a process to stop, and not for something else, such as a reload.
func stops(s os.Signal) bool {
	return s == syscall.SIGINT || s == syscall.SIGTERM || s == syscall.SIGQUIT
}

// obey does what a signal that ends nothing does to a process.
func obey(s os.Signal) {
	if s == syscall.SIGTSTP {
		_ = syscall.Kill(os.Getpid(), syscall.SIGSTOP)
	}
}

func signalNumber(s os.Signal) int { return int(s.(syscall.Signal)) }
