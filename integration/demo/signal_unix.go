//go:build unix

package main

import (
	"os"
	"syscall"
)

func freeze(p *os.Process) error { return p.Signal(syscall.SIGSTOP) }

// thaw has a frozen process go on. It does nothing to others.
func thaw(p *os.Process) { _ = p.Signal(syscall.SIGCONT) }
