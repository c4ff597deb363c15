package main

import (
	"context"
	"encoding/xml"
	"errors"
	"io"
	"strings"
	"testing"
	"time"
)

// sampleReport is one of two workloads.
func sampleReport() *report {
	one, hand := workloads[0], workloads[6]
	r := &report{about: []string{"here"}, took: time.Minute}
	add := func(impl, driver string, ops ...int64) {
		res := result{workload: one, contestant: contestant{impl, driver}}
		for _, n := range ops {
			res.samples = append(res.samples, sample{ops: n, elapsed: time.Second, mallocs: uint64(10 * n), bytes: uint64(100 * n)})
		}
		r.results = append(r.results, res)
	}
	add(ours, pgx, 5000, 9000, 10000)
	add(ours, pq, 20000)
	add(floor, pgx, 10000)
	add(floor, pq, 25000)
	add(redislock, "", 10000)
	r.compareRates(one)
	r.addTimes(hand, contestant{ours, pgx}, []time.Duration{3000, 1000, 2000})
	r.addTimes(hand, contestant{floor, pgx}, []time.Duration{2000})
	r.note("noted")
	r.failed("broken")
	return r
}

// wantLines fails the test unless write's output of the sample has the lines.
func wantLines(t *testing.T, write func(*report, io.Writer), lines ...string) {
	t.Helper()
	var b strings.Builder
	write(sampleReport(), &b)
	for _, want := range lines {
		if got := b.String(); !strings.Contains(got, want) {
			t.Errorf("lacks %q:\n%s", want, got)
		}
	}
}

func TestMarkdown(t *testing.T) {
	wantLines(t, (*report).markdown,
		"here. Made by `make bench` in 60 s.\n",
		"| workload | measure | against | pgx | lib/pq | must reach | reached |\n|---|---|---|---|---|---|---|\n",
		"| 1 goroutine | locks/s | two prepared statements | 0.90 | 0.80 | ≥ 0.85 / ≥ 0.75 | yes |\n",
		"| 1 goroutine | locks/s | redislock | 0.90 | 2.00 | ≥ 1 / ≥ 0.85 | not on pgx |\n",
		"| 1 goroutine | advisory | pgx | 9,000 | 5,000 | 10,000 | 100 | 10 |\n",
		"| 1 goroutine | redislock | | 10,000 | 10,000 | 10,000 | 100 | 10 |\n",
		"- **Did not run:** broken\n- noted\n",
	)
}

func TestBenchstat(t *testing.T) {
	wantLines(t, (*report).benchstat,
		"\npkg: github.com/pgadvisory/advisory/integration/bench\n",
		"\nBenchmarkOneGoroutine/impl=advisory/driver=pgx\t5000\t200000 ns/op\t100 B/op\t10.0 allocs/op\n",
		"\nBenchmarkOneGoroutine/impl=two-prepared-statements/driver=lib-pq\t25000\t40000 ns/op\t100 B/op\t10.0 allocs/op\n",
		"\nBenchmarkOneGoroutine/impl=redislock\t10000\t100000 ns/op\t100 B/op\t10.0 allocs/op\n",
		"\nBenchmarkHandOff/impl=advisory/driver=pgx\t3\t2000 ns/op\n",
	)
}

func TestPrint(t *testing.T) {
	var b strings.Builder
	sampleReport().print(&b)
	if got := b.String(); strings.Count(got, "1 goroutine ") != 2 || !strings.Contains(got, "did not run: broken") {
		t.Errorf("a workload's name does not stand once in each table, or a failure is missing:\n%s", got)
	}
}

func TestChart(t *testing.T) {
	for name, r := range map[string]*report{"some": sampleReport(), "none": {}} {
		svg, err := r.chart()
		if err != nil {
			t.Fatal(err)
		}
		d := xml.NewDecoder(strings.NewReader(string(svg)))
		for err == nil {
			_, err = d.Token()
		}
		if !errors.Is(err, io.EOF) {
			t.Errorf("%s: %v", name, err)
		}
		if name == "some" && (!strings.Contains(string(svg), ">advisory, lib/pq<") || !strings.Contains(string(svg), ">20,000<")) {
			t.Errorf("a label is missing:\n%s", svg)
		}
	}
}

func TestReached(t *testing.T) {
	for _, tt := range []struct {
		cell cell
		want bool
	}{
		{cell{value: 1}, true},
		{cell{failure: "did not complete"}, true}, // nothing was demanded
		{cell{value: 2, bound: atMost(2)}, true},
		{cell{value: 3, bound: atMost(2)}, false},
		{cell{value: 2, bound: atLeast(2)}, true},
		{cell{value: 1.9, bound: atLeast(2)}, false},
		{cell{value: 1, bound: moreThan(1)}, false},
		{cell{value: 1.1, bound: moreThan(1)}, true},
		{cell{value: 100, bound: completes}, true},
		{cell{failure: "did not complete", bound: completes}, false},
		{cell{failure: "did not complete", bound: atMost(2)}, false},
	} {
		if got := tt.cell.reached(); got != tt.want {
			t.Errorf("%+v: %v", tt.cell, got)
		}
	}
}

func TestEveryTargetHasAWorkload(t *testing.T) {
	for _, tt := range targets {
		found := false
		for _, w := range workloads {
			found = found || w.name == tt.workload
		}
		if !found {
			t.Errorf("no workload %q", tt.workload)
		}
	}
}

func TestMedianAndPercentile(t *testing.T) {
	if got := median([]float64{4, 1, 3}); got != 3 {
		t.Errorf("median of three: %v", got)
	}
	if got := median([]float64{4, 1, 3, 2}); got != 2.5 {
		t.Errorf("median of four: %v", got)
	}
	values := make([]int, 200)
	for i := range values {
		values[i] = 200 - i
	}
	for p, want := range map[float64]int{0: 1, 50: 100, 99: 198, 100: 200} {
		if got := percentile(values, p); got != want {
			t.Errorf("p%v: %v, want %v", p, got, want)
		}
	}
}

// brokenTeam says that it took ten locks.
type brokenTeam struct{}

func (brokenTeam) round(context.Context, time.Duration) (tally, error) {
	return tally{Ops: []int64{10}, Elapsed: 1}, nil
}
func (brokenTeam) Close() error { return nil }

func TestLostUpdatesAreAnError(t *testing.T) {
	e := &entrant{team: brokenTeam{}, counter: new(int64)}
	if err := e.round(t.Context(), 0, true); err == nil || len(e.samples) != 0 {
		t.Errorf("ten locks that protected nothing: %v", err)
	}
}

func TestSmallestShare(t *testing.T) {
	e := &entrant{shares: []int64{10, 30, 30, 30}}
	if got := e.smallestShare(); got != 0.4 {
		t.Errorf("%v, want 0.4", got)
	}
}

func TestParseProcess(t *testing.T) {
	p, err := parseProcess([]byte("42 (a ) (b) S 7 42 42 0 -1 4194560 11 0 0 0 150 50 3 4 20 0 1 0 100 0 0"))
	want := processTime{parent: 7, own: 2 * time.Second, waitedFor: 70 * time.Millisecond}
	if err != nil || p != want {
		t.Errorf("%+v, %v; want %+v", p, err, want)
	}
	if _, err := parseProcess([]byte("42 (x) S 7")); err == nil {
		t.Error("no error of a short line")
	}
}

func TestWithAddress(t *testing.T) {
	for dsn, want := range map[string]string{
		"postgres://me@db:5432/app?sslmode=disable": "postgres://me@127.0.0.1:99/app?sslmode=disable",
		"host=db dbname=app":                        "host=db dbname=app host='127.0.0.1' port='99'",
	} {
		if got, err := withAddress(dsn, "127.0.0.1:99"); got != want || err != nil {
			t.Errorf("%s: %s, %v", dsn, got, err)
		}
	}
}

func TestUpdateRows(t *testing.T) {
	const old = "| 1 goroutine | locks/s | redislock | 1 | 2 |\n" +
		"<!-- bench:begin -->\n" +
		"| workload | measure | against | pgx | lib/pq |\n" +
		"| 1 goroutine | locks/s | redislock | 1 | 2 |\n" +
		"| 1 goroutine | locks/s | recipe | 1 | 2 |\n" +
		"<!-- bench:end -->\n" +
		"| 1 goroutine | locks/s | redislock | 1 | 2 |\n"
	ratios, _ := sampleReport().tables()
	want := strings.Replace(old, "n -->\n| workload | measure | against | pgx | lib/pq |\n| 1 goroutine | locks/s | redislock | 1 | 2 |",
		"n -->\n| workload | measure | against | pgx | lib/pq |\n| 1 goroutine | locks/s | redislock | 0.90 | 2.00 |", 1)
	if got := updateRows(old, ratios); got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
}
