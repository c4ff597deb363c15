package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"text/tabwriter"
)

// tableHead is that of the table of ratios.
var tableHead = []string{"workload", "measure", "against", "pgx", "lib/pq", "must reach", "reached"}

// line returns a row's cells as text.
func (r row) line() []string {
	var values, bounds []string
	var missed []string
	bounded := false
	for _, driver := range drivers {
		c, ok := r.cells[driver]
		if !ok {
			values = append(values, "")
			continue
		}
		values = append(values, c.String())
		if c.bound == (bound{}) {
			continue
		}
		if text := c.bound.String(); !slices.Contains(bounds, text) {
			bounds = append(bounds, text)
		}
		bounded = true
		if !c.reached() {
			missed = append(missed, driver)
		}
	}
	reached := ""
	switch {
	case len(missed) == len(drivers):
		reached = "no"
	case len(missed) > 0:
		reached = "not on " + missed[0]
	case bounded:
		reached = "yes"
	}
	return append([]string{r.workload.title, r.measure, r.against}, append(values, strings.Join(bounds, " / "), reached)...)
}

var rateHead = []string{"workload", "implementation", "driver", "locks/s", "least", "most", "B/lock", "allocs/lock"}

// line returns the medians of a throughput as text.
func (r result) line() []string {
	rates := r.rates()
	number := func(v float64) string { return thousands(v) }
	return []string{
		r.workload.title, r.Impl, r.Driver,
		number(r.rate()), number(slices.Min(rates)), number(slices.Max(rates)),
		number(r.perLock(func(s sample) float64 { return float64(s.bytes) })),
		number(r.perLock(func(s sample) float64 { return float64(s.mallocs) })),
	}
}

// thousands formats a number for people.
func thousands(v float64) string {
	s := fmt.Sprintf("%.0f", v)
	for i := len(s) - 3; i > 0; i -= 3 {
		s = s[:i] + "," + s[i:]
	}
	return s
}

// tables returns the report's tables, each with its head.
func (r *report) tables() (ratios, rates [][]string) {
	ratios, rates = [][]string{tableHead}, [][]string{rateHead}
	for _, row := range r.rows {
		ratios = append(ratios, row.line())
	}
	for _, res := range r.results {
		if len(res.samples) > 0 {
			rates = append(rates, res.line())
		}
	}
	return ratios, rates
}

// print prints the report for people.
func (r *report) print(w io.Writer) {
	ratios, rates := r.tables()
	for _, table := range [][][]string{ratios, rates} {
		if len(table) == 1 {
			continue
		}
		tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
		last := ""
		for _, line := range table {
			line = slices.Clone(line)
			// A workload's name stands before its first line only.
			if line[0] == last {
				line[0] = ""
			} else {
				last = line[0]
			}
			fmt.Fprintln(tw, strings.Join(line, "\t"))
		}
		tw.Flush()
		fmt.Fprintln(w)
	}
	for _, f := range r.failures {
		fmt.Fprintln(w, "did not run:", f)
	}
	fmt.Fprintf(w, "%s; %.0f s\n", strings.Join(r.about, "; "), r.took.Seconds())
}

// markdown writes the report for a page.
func (r *report) markdown(w io.Writer) {
	fmt.Fprintf(w, "# What a lock costs\n\n%s. Made by `make bench` in %.0f s.\n\n", strings.Join(r.about, "; "), r.took.Seconds())
	fmt.Fprint(w, "![Locks per second](results.svg)\n\n")
	ratios, rates := r.tables()
	markdownTable(w, ratios)
	if len(rates) > 1 {
		fmt.Fprint(w, "\nThe medians that the ratios are of, with the slowest and the fastest round:\n\n")
		markdownTable(w, rates)
	}
	fmt.Fprint(w, "\n")
	for _, f := range r.failures {
		fmt.Fprintf(w, "- **Did not run:** %s\n", f)
	}
	for _, n := range r.notes {
		fmt.Fprintf(w, "- %s\n", n)
	}
}

func markdownRow(w io.Writer, line []string) {
	fmt.Fprintln(w, "|", strings.ReplaceAll(strings.Join(line, " | "), "|  |", "| |"), "|")
}

func markdownTable(w io.Writer, table [][]string) {
	for i, line := range table {
		markdownRow(w, line)
		if i == 0 {
			fmt.Fprintln(w, "|"+strings.Repeat("---|", len(line)))
		}
	}
}

// benchstat writes the samples in the format of Go's benchmarks.
func (r *report) benchstat(w io.Writer) {
	fmt.Fprintf(w, "goos: %s\ngoarch: %s\npkg: github.com/pgadvisory/advisory/integration/bench\n", runtime.GOOS, runtime.GOARCH)
	for _, res := range r.results {
		name := "Benchmark" + res.workload.name + "/impl=" + strings.ReplaceAll(res.Impl, " ", "-")
		if res.Driver != "" {
			name += "/driver=" + strings.ReplaceAll(res.Driver, "/", "-")
		}
		for _, s := range res.samples {
			fmt.Fprintf(w, "%s\t%d\t%.0f ns/op\t%.0f B/op\t%.1f allocs/op\n", name, s.ops,
				float64(s.elapsed)/float64(s.ops), float64(s.bytes)/float64(s.ops), float64(s.mallocs)/float64(s.ops))
		}
		const perLine = 30
		for times := range slices.Chunk(res.times, perLine) {
			fmt.Fprintf(w, "%s\t%d\t%d ns/op\n", name, len(times), percentile(times, 50))
		}
	}
}

// write writes the report's files to a directory.
func (r *report) write(dir string) error {
	var text, samples bytes.Buffer
	r.markdown(&text)
	r.benchstat(&samples)
	chart, err := r.chart()
	return errors.Join(err,
		os.WriteFile(filepath.Join(dir, "results.md"), text.Bytes(), 0o644),
		os.WriteFile(filepath.Join(dir, "results.txt"), samples.Bytes(), 0o644),
		os.WriteFile(filepath.Join(dir, "results.svg"), chart, 0o644))
}
