//go:build unix

package main

import (
	"log/slog"
	"os"
	"os/signal"
	"strconv"
	"syscall"
)

// A guard is a process that kills the command's process group if this process is killed. On Linux, the
// kernel kills the command itself then, but not what that has started.
const guardName = "advisory-guard"

// startGuard starts the guard of a process group, and returns what ends it.
func startGuard(group int, log *slog.Logger) (stop func()) {
	in, out, err := os.Pipe()
	if err == nil {
		defer in.Close()
		err = runGuard(in, group)
	}
	if err != nil {
		soon(func() {
			log.Warn("there is no guard: if this process is killed, what the command has started goes on", "error", err)
		})
		return func() {}
	}
	return func() {
		_, _ = out.Write([]byte{1})
		out.Close()
	}
}

func runGuard(in *os.File, group int) error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer null.Close()
	p, err := os.StartProcess(self, []string{guardName, strconv.Itoa(group)}, &os.ProcAttr{
		Dir:   "/",
		Files: []*os.File{in, null, null},
		Sys:   &syscall.SysProcAttr{Setsid: true}, // away from the terminal, and from signals to the group
	})
	if err != nil {
		return err
	}
	return p.Release() // child.wait reaps it
}

// isGuard returns whether this process is a guard.
func isGuard() bool { return len(os.Args) == 2 && os.Args[0] == guardName }

// guard waits until the other end of its standard input is closed, and kills the group unless it was told
// that this is dead.
func guard() {
	signal.Ignore() // every signal: who ends a whole service ends its members one by one
	group, err := strconv.Atoi(os.Args[1])
	if err != nil || group < 2 {
		return
	}
	if n, _ := os.Stdin.Read(make([]byte, 1)); n == 0 {
		_ = syscall.Kill(-group, syscall.SIGKILL)
	}
}
