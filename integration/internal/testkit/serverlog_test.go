//go:build unix

package testkit

import (
	"context"
	"fmt"
	"strings"
	"testing"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgproto3"

	"github.com/pgadvisory/advisory/integration/internal/pgtest"
)

// A trial is a test under test: its errors are not those of the test that it is a part of.
type trial struct {
	testing.TB
	cleanups []func()
	errors   []string
}

func (t *trial) Cleanup(f func())                  { t.cleanups = append(t.cleanups, f) }
func (t *trial) Error(args ...any)                 { t.errors = append(t.errors, fmt.Sprint(args...)) }
func (t *trial) Errorf(format string, args ...any) { t.Error(fmt.Sprintf(format, args...)) }

func (t *trial) connect(server *pgtest.Server, params ...string) *pgx.Conn {
	t.Helper()
	dsn := server.DSN()
	for i := 0; i < len(params); i += 2 {
		var err error
		if dsn, err = pgtest.WithParam(dsn, params[i], params[i+1]); err != nil {
			t.Fatal(err)
		}
	}
	conn, err := pgx.Connect(t.Context(), WatchLog(t, dsn))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close(context.Background()) })
	return conn
}

// end ends the trial, and returns its error.
func (t *trial) end() string {
	for i := len(t.cleanups) - 1; i >= 0; i-- {
		t.cleanups[i]()
	}
	return strings.Join(t.errors, "\n")
}

func TestWhatATestWritesToTheLogIsItsError(t *testing.T) {
	const failing, warning = "SELECT 1 /\n 0", "DO $$ BEGIN RAISE WARNING 'take care'; END $$"
	server := OwnServer(t)
	exec := func(conn *pgx.Conn, statements ...string) {
		for _, s := range statements {
			_, _ = conn.Exec(t.Context(), s)
		}
	}
	for name, test := range map[string]struct {
		does func(t *trial)
		want []string // in the error; none: there is none
	}{
		"nothing": {does: func(t *trial) { exec(t.connect(server), "SELECT", strings.Replace(warning, "WARNING", "LOG", 1)) }},
		"error": {
			does: func(t *trial) { exec(t.connect(server), failing) },
			want: []string{" 1 messages", "ERROR:  division by zero\n", "STATEMENT:  SELECT 1 /\n\t 0\n"},
		},
		"warning": {
			does: func(t *trial) { exec(t.connect(server), warning) },
			want: []string{" 1 messages", "WARNING:  take care\n", "STATEMENT:  DO"},
		},
		"name of its own": {
			does: func(t *trial) {
				exec(t.connect(server, "application_name", "its own"), failing)
				exec(t.connect(server), warning)
			},
			want: []string{" 2 messages", "] its own ERROR:  division", "take care"},
		},
		"many": {
			does: func(t *trial) { exec(t.connect(server), strings.Split(strings.Repeat(failing+";", 20), ";")...) },
			want: []string{" 20 messages"},
		},
		"allowed": {does: func(t *trial) { AllowLog(t, "by zero"); exec(t.connect(server), failing) }},
		"another allowed": {
			does: func(t *trial) { AllowLog(t, "ERROR:  division"); exec(t.connect(server), failing, warning) },
			want: []string{" 1 messages", "take care"},
		},
		"statement allowed": {
			does: func(t *trial) { AllowLog(t, "STATEMENT:  SELECT 1"); exec(t.connect(server), failing, "SELECT 2/0") },
			want: []string{" 1 messages", "STATEMENT:  SELECT 2/0"},
		},
		// The client has gone, and the server goes on.
		"late": {
			does: func(t *trial) {
				c := t.connect(server).PgConn()
				c.Frontend().SendQuery(&pgproto3.Query{String: strings.Replace(warning, "RAISE", "PERFORM pg_sleep(0.2); RAISE", 1)})
				if err := c.Frontend().Flush(); err != nil {
					t.Error(err)
				}
				c.Conn().Close()
			},
			want: []string{"take care"},
		},
		"terminated": {
			does: func(t *trial) {
				exec(t.connect(server), "SELECT pg_terminate_backend(pg_backend_pid())")
			},
			want: []string{" 1 messages", "FATAL:  terminating connection"},
		},
	} {
		// The name is longer than one on the server may be, and not what the server would write.
		t.Run(name+strings.Repeat(" → ", 30), func(t *testing.T) {
			before, other, one := &trial{TB: t}, &trial{TB: t}, &trial{TB: t}
			exec(before.connect(server, "application_name", "its own"), failing)
			if before.end() == "" {
				t.Error("no error")
			}
			exec(other.connect(server), failing)
			test.does(one)
			got := one.end()
			if len(test.want) == 0 && got != "" {
				t.Errorf("error %q, want none", got)
			}
			for _, want := range test.want {
				if !strings.Contains(got, want) {
					t.Errorf("no %q in the error %q", want, got)
				}
			}
			if n := strings.Count(got, " ERROR:  "); n > shownMessages {
				t.Errorf("%d messages are shown", n)
			}
			if other.end() == "" {
				t.Error("no error of another test")
			}
		})
	}
}

// A test may allow what its subtests do.
func TestAllowedForSubtests(t *testing.T) {
	server := OwnServer(t)
	for _, allowed := range []bool{false, true} {
		t.Run(fmt.Sprint(allowed), func(t *testing.T) {
			if allowed {
				AllowLog(t, "by zero")
			}
			t.Run("part", func(t *testing.T) {
				part := &trial{TB: t}
				_, _ = part.connect(server).Exec(t.Context(), "SELECT 1/0")
				if got := part.end(); (got == "") != allowed {
					t.Errorf("error %q", got)
				}
			})
		})
	}
}
