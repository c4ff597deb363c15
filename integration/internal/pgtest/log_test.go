//go:build unix

package pgtest

import (
	"context"
	"errors"
	"regexp"
	"strings"
	"testing"

	"github.com/jackc/pgx/v5"
)

func TestLog(t *testing.T) {
	s := start(t)
	standby, err := s.Standby(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	message := func(n string) string {
		return "app " + n + " ERROR:  division by zero\napp " + n + " STATEMENT:  select 1 /\n\t 0\n"
	}

	logError(t, s, "app 1")
	between := logSize(t, s)
	logError(t, s, "app 2")
	logError(t, standby, "app 3")
	wantLog(t, s, 0, message("1")+message("2"))
	wantLog(t, s, between, message("2"))
	wantLog(t, s, logSize(t, s), "")
	wantLog(t, standby, 0, message("3"))

	// It is one log, however often the server starts, and there when it does not run.
	before := logSize(t, s)
	for range 2 {
		if err := s.Kill(); err != nil {
			t.Fatal(err)
		}
		wantLog(t, s, between, message("2"))
		if err := s.Restart(t.Context(), "fast"); err != nil {
			t.Fatal(err)
		}
	}
	logError(t, s, "app 4")
	wantLog(t, s, between, message("2")+message("4"))
	wantLog(t, s, before, message("4"))

	if err := s.Stop(); err != nil {
		t.Fatal(err)
	}
	if _, err := s.LogSince(0); !errors.Is(err, ErrStopped) {
		t.Errorf("of a stopped server: %v", err)
	}
}

// logError has an application write an error to the server's log.
func logError(t *testing.T, s *Server, application string) {
	t.Helper()
	dsn, err := WithParam(s.DSN(), "application_name", application)
	if err != nil {
		t.Fatal(err)
	}
	conn, err := pgx.Connect(t.Context(), dsn)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(context.Background())
	if _, err := conn.Exec(t.Context(), "select 1 /\n 0"); err == nil {
		t.Error("no error")
	}
}

func logSize(t *testing.T, s *Server) int64 {
	t.Helper()
	n, err := s.LogSize()
	if err != nil {
		t.Fatal(err)
	}
	return n
}

var logPrefix = regexp.MustCompile(`(?m)^[\d-]+ [\d:.]+ \w+ \[\d+\] `)

// wantLog compares the log without the times, and without what is not a session's.
func wantLog(t *testing.T, s *Server, offset int64, want string) {
	t.Helper()
	log, err := s.LogSince(offset)
	if err != nil {
		t.Fatal(err)
	}
	var got strings.Builder
	for line := range strings.Lines(logPrefix.ReplaceAllString(log, "")) {
		if strings.HasPrefix(line, "app ") || strings.HasPrefix(line, "\t") {
			got.WriteString(line)
		}
	}
	if got.String() != want {
		t.Errorf("the log is\n%s\nwant of it\n%s", log, want)
	}
}
