//go:build !unix

package pgtest

import (
	"context"
	"fmt"
	"syscall"
)

// On systems without Unix's processes and signals, only a server that is given
// can be used.

type sandbox struct{ dir string }

func newSandbox() (*sandbox, error) {
	return nil, fmt.Errorf("%w: on this system, set %s to the connection string of a running one", ErrNoServer, EnvDSN)
}

func (*sandbox) canExec(string) error                 { return ErrNoServer }
func (*sandbox) chown(string) error                   { return ErrNoServer }
func (*sandbox) writeFile(_, _ string) error          { return ErrNoServer }
func (*sandbox) close() error                         { return nil }
func (*sandbox) run(context.Context, ...string) error { return ErrNoServer }
func (*sandbox) start(_, _ string, _ []string, _ ...string) (*process, error) {
	return nil, ErrNoServer
}

type process struct{ done chan struct{} }

func (*process) signal(syscall.Signal) {}
func (*process) end(syscall.Signal)    {}
func (*process) waitOrKill()           {}
func (*process) crash() error          { return ErrNoServer }
func (*process) state() string         { return "" }
