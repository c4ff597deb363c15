package main

import (
	"syscall"

	"golang.org/x/sys/unix"
)

// childAttr gives the command a process group, and has the kernel kill it if this process dies.
func childAttr() *syscall.SysProcAttr {
	return &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
}

// adoptOrphans makes this process the parent of the command's orphans. Where process 1 does not reap
// them, as in many a container, they would be in the group for ever.
func adoptOrphans() { _ = unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) }
