package main

import (
	"context"
	"log/slog"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/pgadvisory/advisory"
)

// advisory runs the command line, and returns its exit status and what it has printed.
func advisoryCommand(t *testing.T, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	var out, errs strings.Builder
	code = execute(context.Background(), args, strings.NewReader(""), &out, &errs)
	return code, out.String(), errs.String()
}

func TestUsageErrorsAreOneLine(t *testing.T) {
	for _, c := range []struct{ args, says string }{
		{"run", "no command"},
		{"run name", "no command"},
		{"run name --", "no command"},
		{"run -- true", "no lock"},
		{"run --nowait name -- true", "unknown flag: --nowait"},
		{"run --wait soon name -- true", "--wait"},
		{"run --wait 0s name -- true", "--wait: 0s is not positive"},
		{"run --at-least -1s name -- true", "--at-least"},
		{"run --heartbeat 6s name -- true", "under three heartbeats"},
		{"run --grace 13s name -- true", "--grace: 13s is not under 13s"},
		{"run --grace -1s name -- true", "--grace"},
		{"run --pair 1 -- true", "--pair"},
		{"run --pair 1,3000000000 -- true", "--pair"},
		{"run --id x -- true", "--id"},
		{"run --conflict-exit-code 256 name -- true", "--conflict-exit-code"},
		{"run --lead one two -- true", "--lead takes one lock"},
		{"run --lead --no-wait name -- true", "lead"},
		{"run --no-wait --wait 1s name -- true", "no-wait"},
		{"run --quiet --json name -- true", "quiet"},
		{"--dsn-file /no/such/file run name -- true", "--dsn-file"},
		{"--dsn x --dsn-file y ls", "dsn"},
		{"holders", "no lock"},
		{"holders one two", "more than one lock"},
		{"break name", "--yes"},
		{"key", "no lock"},
		{"ls --watch --interval 0s", "--interval"},
		{"lock name", `unknown command "lock"`},
	} {
		code, _, stderr := advisoryCommand(t, strings.Fields(c.args)...)
		if code != exitUsage || strings.Count(stderr, "\n") != 1 || !strings.Contains(stderr, c.says) || !strings.HasPrefix(stderr, "advisory: ") {
			t.Errorf("%s: exit status %d, and %q, want %d and a line with %q", c.args, code, stderr, exitUsage, c.says)
		}
	}
}

// The grace that is not given leaves a margin, whatever the other times are.
func TestGraceEndsBeforeTheLockIsFree(t *testing.T) {
	for _, c := range []struct {
		heartbeat, holderTimeout, want time.Duration
	}{
		{time.Second, 15 * time.Second, 10 * time.Second},
		{time.Second, time.Minute, 10 * time.Second},
		{time.Second, 5 * time.Second, 1500 * time.Millisecond},
		{100 * time.Millisecond, time.Second, 400 * time.Millisecond},
	} {
		f := runFlags{heartbeat: c.heartbeat, holderTimeout: c.holderTimeout, grace: maxGrace}
		if err := f.check(func(string) bool { return false }); err != nil || f.grace != c.want {
			t.Errorf("%v, %v: the grace is %v, want %v (%v)", c.heartbeat, c.holderTimeout, f.grace, c.want, err)
		}
	}
}

func TestKeys(t *testing.T) {
	f := keyFlags{ids: []int64{-7}, pairs: []string{"1, -2"}, hashTexts: []string{"old"}}
	got, err := f.keys([]string{"name"})
	if err != nil {
		t.Fatal(err)
	}
	want := []advisory.Key{advisory.Name("name"), advisory.ID(-7), advisory.Pair(1, -2), advisory.HashText("old")}
	if !slices.Equal(bare(got), want) || list(got) != "name -7 1, -2 old" {
		t.Errorf("%v, called %q, want %v", bare(got), list(got), want)
	}
}

func TestKeyPrintsSQL(t *testing.T) {
	for _, c := range []struct{ args, want string }{
		{"key --id 7", "bigint 7\n  SELECT pg_advisory_lock(7);\n"},
		{"key --pair 7,42", "pair (7, 42)\n  SELECT pg_advisory_lock(7, 42);\n"},
		{"key --json o'hara", `{"name":"o'hara","sql":"` + advisory.Name("o'hara").SQL() + "\"}\n"},
		{"key o'hara", "convert_to('o''hara', 'UTF8')"},
	} {
		if code, stdout, stderr := advisoryCommand(t, strings.Fields(c.args)...); code != 0 || stderr != "" || !strings.Contains(stdout, c.want) {
			t.Errorf("%s: exit status %d, printed %q, %q", c.args, code, stdout, stderr)
		}
	}
}

func TestMessageIsOneLine(t *testing.T) {
	const text = "advisory: cannot connect:\n\ta: refused\n\ta: refused [bigint 1]\n"
	if got, want := message(text), "advisory: cannot connect: a: refused [bigint 1]"; got != want {
		t.Errorf("%q, want %q", got, want)
	}
}

func TestEventsAreLines(t *testing.T) {
	var text, json strings.Builder
	for _, log := range []*slog.Logger{newLog(&text, slog.LevelInfo, false), newLog(&json, slog.LevelInfo, true)} {
		log.Debug("no")
		log.With("key", "k").Info("advisory: lost\nall", "after", 1500*time.Millisecond)
	}
	if got, want := text.String(), "advisory: lost all, key k, after 1.5s\n"; got != want {
		t.Errorf("%q, want %q", got, want)
	}
	if got, want := json.String(), `"msg":"lost all","key":"k","after":1.5}`+"\n"; !strings.HasSuffix(got, want) || strings.Count(got, "\n") != 1 {
		t.Errorf("%q, want %q at its end", got, want)
	}
}

func TestTable(t *testing.T) {
	now := time.Now()
	key := advisory.Name("n")
	rows := []row{
		newRow(key, advisory.Holder{PID: 1, Granted: true, ApplicationName: "app", SessionStart: now.Add(-50 * time.Hour)}),
		newRow(key, advisory.Holder{PID: 2, Shared: true, WaitStart: now.Add(-90 * time.Second), SessionStart: now.Add(-100 * time.Second)}),
	}
	var b strings.Builder
	if err := writeTable(&b, rows, now); err != nil {
		t.Fatal(err)
	}
	want := `KEY  MODE       STATE  PID  USER  APPLICATION  ADDRESS  SESSION  WAIT
n    exclusive  holds  1    -     app          -        2d2h     -
     shared     waits  2    -     -            -        1m40s    1m30s
`
	if b.String() != want {
		t.Errorf("got\n%swant\n%s", &b, want)
	}
}

// Every command, and every flag, has a help text, from which the man pages are made.
func TestEveryFlagIsDescribed(t *testing.T) {
	root := newRoot()
	for _, c := range append(root.Commands(), root) {
		if c.Short == "" {
			t.Errorf("%s has no description", c.Name())
		}
		if !strings.Contains(c.LocalFlags().FlagUsages()+"  ", "  ") {
			t.Errorf("%s has a flag without a description", c.Name())
		}
	}
	for _, status := range []string{"64 ", "69 ", "70 ", "75 ", "126 ", "127 ", "128+n "} {
		if run, _, err := root.Find([]string{"run"}); err != nil || !strings.Contains(run.Long, "\n    "+status) {
			t.Errorf("the help of run does not explain exit status %s (%v)", status, err)
		}
	}
	code, page, _ := advisoryCommand(t, "man", "run")
	if code != 0 || !strings.Contains(page, ".TH") || !strings.Contains(page, "holder-timeout") {
		t.Errorf("man run: exit status %d, %d bytes", code, len(page))
	}
	dir := t.TempDir()
	if code, _, stderr := advisoryCommand(t, "man", "--dir", dir); code != 0 {
		t.Errorf("man --dir: exit status %d, %s", code, stderr)
	}
	for _, shell := range []string{"bash", "zsh", "fish"} {
		if code, script, _ := advisoryCommand(t, "completion", shell); code != 0 || script == "" {
			t.Errorf("completion %s: exit status %d", shell, code)
		}
	}
}

func TestConnectionString(t *testing.T) {
	t.Setenv("DATABASE_URL", "from-url")
	warned := 0
	for _, c := range []struct {
		connection
		want  string
		warns int
	}{
		{connection{}, "from-url", 0},
		{connection{dsn: "from-flag"}, "from-flag", 1},
	} {
		warned = 0
		if got, err := c.string(func(string) { warned++ }); got != c.want || warned != c.warns || err != nil {
			t.Errorf("%q with %d warnings (%v), want %q with %d", got, warned, err, c.want, c.warns)
		}
	}
}
