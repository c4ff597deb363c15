//go:build unix

// Package proctest lets a test run its own binary again, as processes that it kills
// and freezes.
package proctest

import (
	"bufio"
	"bytes"
	"io"
	"os"
	"os/exec"
	"syscall"
	"testing"
)

// A Process is a child of the test.
type Process struct {
	cmd    *exec.Cmd
	stdin  io.Closer
	done   chan struct{} // closed when it has exited
	stderr bytes.Buffer  // to be read after that
}

// Start runs the test's binary with env added to its environment, until the test ends
// at the latest. Each line that it prints goes to line, one after the other.
func Start(t testing.TB, line func([]byte), env ...string) *Process {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	p := &Process{cmd: exec.Command(exe), done: make(chan struct{})}
	p.cmd.Env = append(os.Environ(), env...)
	p.cmd.Stderr = &p.stderr
	// If the test dies, the kernel hangs up on a process group that is left with nobody
	// to continue it (POSIX, "orphaned process group"), and so ends a frozen process.
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if p.stdin, err = p.cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	stdout, err := p.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		defer close(p.done)
		for lines := bufio.NewScanner(stdout); lines.Scan(); {
			line(lines.Bytes())
		}
		_ = p.cmd.Wait()
	}()
	t.Cleanup(func() {
		p.Kill()
		if p.stderr.Len() > 0 {
			t.Errorf("process %d: %s", p.PID(), &p.stderr)
		}
	})
	return p
}

// EndWithParent ends the child that calls it when its parent ends, or calls Stop.
func EndWithParent() {
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin)
		os.Exit(0)
	}()
}

// PID returns the process id.
func (p *Process) PID() int { return p.cmd.Process.Pid }

// Kill ends the process by SIGKILL, frozen or not, and waits until it has ended.
func (p *Process) Kill() {
	_ = p.cmd.Process.Kill()
	<-p.done
}

// Stop has the process end itself, and waits until it has.
func (p *Process) Stop() {
	_ = p.stdin.Close()
	<-p.done
}

// Freeze stops the process by SIGSTOP, and Thaw has it go on.
func (p *Process) Freeze() { _ = p.cmd.Process.Signal(syscall.SIGSTOP) }
func (p *Process) Thaw()   { _ = p.cmd.Process.Signal(syscall.SIGCONT) }

// Ended is closed when the process has ended, and what it printed has been handed on.
func (p *Process) Ended() <-chan struct{} { return p.done }

// Succeeded tells whether the process, which has ended, ended with status 0.
func (p *Process) Succeeded() bool { return p.cmd.ProcessState.Success() }
