package pgtest

import (
	"io"
	"os"
	"path/filepath"
)

// logfile is the same for every start of the server, which appends to it.
func (s *Server) logfile() string { return filepath.Join(s.box.dir, "postgres.log") }

// LogSize returns how much the server has written to its log, in bytes, since
// it was started for the first time.
func (s *Server) LogSize() (int64, error) {
	if err := s.lock(); err != nil {
		return 0, err
	}
	defer s.mu.Unlock()
	return s.logSize()
}

func (s *Server) logSize() (int64, error) {
	info, err := os.Stat(s.logfile())
	if err != nil {
		return 0, err
	}
	return info.Size(), nil
}

// LogSince returns what the server has written to its log after the first
// offset bytes. A standby has a log of its own.
//
// The process that serves a session writes each message itself, at once, and
// before it tells the client: what a client has been told is in the log. Each
// line begins with the time, the process id in brackets, and the session's
// application_name; the further lines of a message begin with a tab.
func (s *Server) LogSince(offset int64) (string, error) {
	if err := s.lock(); err != nil {
		return "", err
	}
	defer s.mu.Unlock()
	return s.logSince(offset)
}

func (s *Server) logSince(offset int64) (string, error) {
	f, err := os.Open(s.logfile())
	if err != nil {
		return "", err
	}
	defer f.Close()
	if _, err := f.Seek(offset, io.SeekStart); err != nil {
		return "", err
	}
	b, err := io.ReadAll(f)
	return string(b), err
}
