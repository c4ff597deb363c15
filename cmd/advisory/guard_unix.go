//go:build unix

package main

import (
	"bufio"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"syscall"
)

// guardName is what the guard is called as. A guard is a process that kills the command's process group if
// this process is killed. On Linux, the kernel kills the command itself then, but not what that has started.
const guardName = "advisory-guard"

// A guardPipe leads to the guard's standard input.
type guardPipe struct {
	*os.File // nil: there is no guard
	log      *slog.Logger
}

// startGuard starts the guard. It does so before the command is started, because a kill between that and
// begin leaves alive what the command has started by then.
func startGuard(log *slog.Logger) guardPipe {
	g := guardPipe{log: log}
	in, out, err := os.Pipe()
	if err == nil {
		defer in.Close()
		if err = runGuard(in); err == nil {
			g.File = out
			return g
		}
		out.Close()
	}
	g.warn(err)
	return g
}

func (g guardPipe) warn(err error) {
	soon(func() {
		g.log.Warn("there is no guard: if this process is killed, what the command has started goes on", "error", err)
	})
}

// begin tells the guard which group to kill.
func (g guardPipe) begin(group int) {
	if g.File == nil {
		return
	}
	if _, err := fmt.Fprintln(g, group); err != nil {
		g.warn(err)
	}
}

// end ends the guard. The group, if there was one, is dead.
func (g guardPipe) end() {
	if g.File != nil {
		fmt.Fprintln(g)
		g.Close()
	}
}

func runGuard(in *os.File) error {
	self := "/proc/self/exe" // this very program, though another may lie in its place by now
	if _, err := os.Stat(self); err != nil {
		if self, err = os.Executable(); err != nil {
			return err
		}
	}
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer null.Close()
	p, err := os.StartProcess(self, []string{guardName}, &os.ProcAttr{
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
func isGuard() bool { return len(os.Args) == 1 && os.Args[0] == guardName }

// guard reads which group to guard, and waits until the other end of its standard input is closed. It then
// kills the group unless it was told that this is dead.
func guard() {
	signal.Ignore() // every signal: who ends a whole service ends its members one by one
	in := bufio.NewReader(os.Stdin)
	line, err := in.ReadString('\n')
	if err != nil { // the command was not started, or in this moment
		return
	}
	group, err := strconv.Atoi(strings.TrimSpace(line))
	if err != nil || group < 2 {
		return
	}
	if _, err := in.ReadByte(); err != nil {
		_ = syscall.Kill(-group, syscall.SIGKILL)
	}
}
