package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
)

// A tool is the command advisory, which is compiled while the server starts.
type tool struct {
	dir string // for what belongs to it
	exe string

	cancel context.CancelFunc
	done   chan struct{} // closed when it is compiled, or cannot be
	err    error         // to be read after that
}

// A leftOut is why there cannot be the command here.
type leftOut struct{ error }

// buildTool begins to compile the command from the source beside the demo's.
func buildTool(ctx context.Context) *tool {
	t := &tool{done: make(chan struct{})}
	ctx, t.cancel = context.WithCancel(ctx)
	go func() {
		defer close(t.done)
		t.err = t.build(ctx)
	}()
	return t
}

func (t *tool) build(ctx context.Context) error {
	if runtime.GOOS == "windows" {
		return leftOut{errors.New("advisory run needs a Unix system")}
	}
	golang, err := exec.LookPath("go")
	if err != nil {
		return leftOut{errors.New("there is no Go here to compile the command with")}
	}
	_, self, _, _ := runtime.Caller(0)
	source := filepath.Join(filepath.Dir(self), "..", "..", "cmd", "advisory")
	// As go run does. Where programs may not be run from the directory for temporary files,
	// GOTMPDIR names another.
	if t.dir, err = os.MkdirTemp(os.Getenv("GOTMPDIR"), "advisory-demo-"); err != nil {
		return err
	}
	t.exe = t.path("advisory")
	cmd := exec.CommandContext(ctx, golang, "build", "-buildvcs=false", "-o", t.exe, ".")
	cmd.Dir, cmd.Env = source, append(os.Environ(), "GOWORK=") // its go.work
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) }
	cmd.WaitDelay = killAfter
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("go build of the command advisory: %w\n%s", err, out)
	}
	return nil
}

// path is that of a file in the tool's directory.
func (t *tool) path(name string) string { return filepath.Join(t.dir, name) }

// wait returns when the tool is compiled, or cannot be. It calls slow if that takes time.
func (t *tool) wait(slow func()) {
	select {
	case <-t.done:
		return
	default:
	}
	slow()
	<-t.done
}

// remove removes the tool. That a demo that is killed leaves it is the price of a SIGKILL.
func (t *tool) remove() error {
	t.cancel()
	<-t.done
	if t.dir == "" {
		return nil
	}
	return os.RemoveAll(t.dir)
}
