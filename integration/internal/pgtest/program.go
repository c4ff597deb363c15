package pgtest

import (
	"os/exec"
	"path/filepath"
)

// Program returns the path of one of PostgreSQL's programs, such as pg_dump:
// the one that is installed with a server of our own, else the one in PATH. A
// download has the server's alone.
func (s *Server) Program(name string) (string, error) {
	if s.bindir != "" {
		name = filepath.Join(s.bindir, name)
	}
	return exec.LookPath(name)
}
