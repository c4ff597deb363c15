package main

import (
	"os"
	"path/filepath"
	"regexp"
	"testing"
	"time"
)

func TestMain(m *testing.M) {
	// The bench starts processes of its own binary, which is this one here.
	if job := os.Getenv(childEnv); job != "" {
		os.Exit(childMain(job))
	}
	os.Exit(m.Run())
}

func TestParseFlags(t *testing.T) {
	o, err := parseFlags([]string{"-quick", "-run", "OneKey", "-out", "dir"})
	if err != nil {
		t.Fatal(err)
	}
	if o.round >= 400*time.Millisecond || !o.run.MatchString("OneKey") || o.run.MatchString("Keys") || o.out != "dir" {
		t.Errorf("%+v", o)
	}
	for _, args := range [][]string{{"-run", "("}, {"-rounds", "0"}, {"file"}} {
		if _, err := parseFlags(args); err == nil {
			t.Errorf("%q: no error", args)
		}
	}
}

// A short run of some workloads comes to its end, and finds what it should find on any
// machine, whatever the numbers are.
func TestRun(t *testing.T) {
	// The race detector lets each process wait for a second at its end.
	t.Setenv("GORACE", os.Getenv("GORACE")+" atexit_sleep_ms=0")
	o, err := parseFlags([]string{"-quick"})
	if err != nil {
		t.Fatal(err)
	}
	o.round, o.rounds, o.handOffs = 20*time.Millisecond, 1, 5
	o.run = regexp.MustCompile("^(OneGoroutine|Processes|HandOff|Allocs)$")
	ctx := t.Context()
	b, err := newBench(ctx, o)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := b.close(); err != nil {
			t.Error(err)
		}
	}()
	if err := b.all(ctx); err != nil {
		t.Fatal(err)
	}
	r := &b.report
	for _, f := range r.failures {
		t.Error(f)
	}
	for _, w := range workloads {
		if o.run.MatchString(w.name) {
			wantRows(t, r, w)
		}
	}
	dir := t.TempDir()
	if err := r.write(dir); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"results.md", "results.svg", "results.txt"} {
		if info, err := os.Stat(filepath.Join(dir, name)); err != nil || info.Size() == 0 {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// wantRows fails the test unless the report has rows of the workload, and in each of them
// a number for each driver.
func wantRows(t *testing.T, r *report, w *workload) {
	t.Helper()
	n := 0
	for _, row := range r.rows {
		if row.workload != w {
			continue
		}
		n++
		for _, driver := range drivers {
			if c, ok := row.cells[driver]; !ok || c.failure != "" {
				t.Errorf("%s, %s %s, %s: %q", w.title, row.measure, row.against, driver, c.failure)
			}
		}
	}
	if n == 0 {
		t.Errorf("%s: no row", w.title)
	}
}

// A directory that cannot be written to is found before the run.
func TestTheDirectoryOfTheResultsIsMadeFirst(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "a", "b")
	if err := makeWritable(dir); err != nil {
		t.Fatal(err)
	}
	left, err := os.ReadDir(dir)
	if err != nil || len(left) > 0 {
		t.Errorf("left: %v, %v", left, err)
	}
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	if err := run(options{out: file}); err == nil || time.Since(began) > time.Second {
		t.Errorf("%v after %v", err, time.Since(began))
	}
}
