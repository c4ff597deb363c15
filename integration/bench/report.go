package main

import (
	"cmp"
	"fmt"
	"os"
	"slices"
	"time"
)

// A report is what has come out.
type report struct {
	about    []string // what it was measured on
	rows     []row
	results  []result
	notes    []string
	failures []string
	took     time.Duration
}

// A row of the table says one thing of our locks, on either driver.
type row struct {
	workload *workload
	measure  string
	against  string // whom it is compared with, if anybody
	cells    map[string]cell
}

// A cell is the number of one driver.
type cell struct {
	value   float64
	format  string // of the value, "" for a ratio
	text    string // instead of the formatted value
	failure string // why there is no value
	bound   bound
}

func (r *row) set(driver string, c cell) {
	if r.cells == nil {
		r.cells = make(map[string]cell)
	}
	r.cells[driver] = c
}

func (c cell) String() string {
	switch {
	case c.failure != "":
		return c.failure
	case c.text != "":
		return c.text
	case c.format != "":
		return fmt.Sprintf(c.format, c.value)
	default:
		return ratio(c.value)
	}
}

// ratio formats a ratio by its two or three leading digits.
func ratio(v float64) string {
	switch {
	case v < 10:
		return fmt.Sprintf("%.2f", v)
	case v < 100:
		return fmt.Sprintf("%.1f", v)
	default:
		return fmt.Sprintf("%.0f", v)
	}
}

// A bound is what a number must reach. The zero bound is none.
type bound struct {
	sign  string
	limit float64
}

func atLeast(v float64) bound  { return bound{"≥", v} }
func atMost(v float64) bound   { return bound{"≤", v} }
func moreThan(v float64) bound { return bound{">", v} }

// completes is the bound of what has to come to its end, and may take its time.
var completes = bound{sign: "completes"}

func (b bound) String() string {
	if b == completes || b == (bound{}) {
		return b.sign
	}
	return fmt.Sprintf("%s %v", b.sign, b.limit)
}

// reached reports whether c is within its bound.
func (c cell) reached() bool {
	if c.bound == (bound{}) {
		return true
	}
	if c.failure != "" {
		return false
	}
	switch c.bound.sign {
	case "≥":
		return c.value >= c.bound.limit
	case "≤":
		return c.value <= c.bound.limit
	case ">":
		return c.value > c.bound.limit
	default:
		return true
	}
}

// unmet is how many numbers have not reached what they must.
func (r *report) unmet() (n int) {
	for _, row := range r.rows {
		for _, c := range row.cells {
			if !c.reached() {
				n++
			}
		}
	}
	return n
}

func (r *report) note(format string, args ...any) {
	r.notes = append(r.notes, fmt.Sprintf(format, args...))
}

func (r *report) failed(format string, args ...any) {
	failure := fmt.Sprintf(format, args...)
	r.failures = append(r.failures, failure)
	fmt.Fprintf(os.Stderr, "\nbench: %s\n", failure)
}

// A result is what a contestant did in a workload.
type result struct {
	workload *workload
	contestant
	samples []sample        // of a throughput
	times   []time.Duration // of each hand-off, or of each lock of one goroutine
	shares  float64         // the smallest, of several processes
}

// rate is the median of locks per second.
func (r result) rate() float64 { return median(r.rates()) }

func (r result) rates() []float64 {
	rates := make([]float64, len(r.samples))
	for i, s := range r.samples {
		rates[i] = s.rate()
	}
	return rates
}

// perLock is the median of what a lock took of something.
func (r result) perLock(of func(sample) float64) float64 {
	values := make([]float64, len(r.samples))
	for i, s := range r.samples {
		values[i] = of(s) / float64(s.ops)
	}
	return median(values)
}

func (r *report) add(w *workload, e *entrant) {
	res := result{workload: w, contestant: e.contestant, samples: e.samples, times: e.times}
	if w.processes > 0 {
		res.shares = e.smallestShare()
	}
	r.results = append(r.results, res)
}

func (r *report) addTimes(w *workload, c contestant, times []time.Duration) {
	r.results = append(r.results, result{workload: w, contestant: c, times: times})
}

// find returns a contestant's result in a workload. Whoever is on no driver is found
// whatever the driver.
func (r *report) find(w *workload, impl, driver string) (result, bool) {
	i := slices.IndexFunc(r.results, func(res result) bool {
		return res.workload == w && res.Impl == impl && (res.Driver == driver || res.Driver == "")
	})
	if i < 0 {
		return result{}, false
	}
	return r.results[i], true
}

// compareRates adds the rows of a throughput: how many times as many locks are ours.
func (r *report) compareRates(w *workload) {
	for _, impl := range []string{floor, recipe, goose, redislock, etcd} {
		row := row{workload: w, measure: "locks/s", against: impl}
		for _, driver := range drivers {
			our, ok1 := r.find(w, ours, driver)
			their, ok2 := r.find(w, impl, driver)
			if ok1 && ok2 {
				row.set(driver, cell{value: our.rate() / their.rate(), bound: target(w.name, impl, driver)})
			}
		}
		if len(row.cells) > 0 {
			r.rows = append(r.rows, row)
		}
	}
	if w.processes == 0 {
		return
	}
	for _, impl := range []string{ours, recipe} {
		row := row{workload: w, measure: impl + ", smallest process's part of a fair share"}
		for _, driver := range drivers {
			if res, ok := r.find(w, impl, driver); ok {
				c := cell{value: res.shares}
				if impl == ours {
					c.bound = atLeast(0.5)
				}
				row.set(driver, c)
			}
		}
		r.rows = append(r.rows, row)
	}
}

// listTimes adds the rows of what one lock and its release take.
func (r *report) listTimes(w *workload) {
	for _, percent := range []float64{50, 99} {
		for _, impl := range []string{ours, floor, recipe} {
			row := row{workload: w, measure: fmt.Sprintf("%s, µs of a lock and its release, p%.0f", impl, percent)}
			for _, driver := range drivers {
				if res, ok := r.find(w, impl, driver); ok && len(res.times) > 0 {
					row.set(driver, cell{value: float64(percentile(res.times, percent)) / float64(time.Microsecond), format: "%.0f"})
				}
			}
			r.rows = append(r.rows, row)
		}
	}
}

// closedLoop is whom a rate is compared with that nobody can exceed: every goroutine waits for two
// round trips, and for nothing else.
const closedLoop = "two round trips each"

// compareClosedLoop adds the row of how much of a closed loop's rate is ours.
func (r *report) compareClosedLoop(w *workload, roundTrip time.Duration) {
	allowed := float64(w.goroutines) / (2 * roundTrip).Seconds()
	row := row{workload: w, measure: "locks/s", against: closedLoop}
	for _, driver := range drivers {
		if our, ok := r.find(w, ours, driver); ok {
			row.set(driver, cell{value: our.rate() / allowed, bound: target(w.name, closedLoop, driver)})
		}
	}
	r.rows = append(r.rows, row)
}

// compareTimes adds the rows of a hand-off: how many times as long ours takes.
func (r *report) compareTimes(w *workload) {
	for _, p := range []struct {
		percent float64
		bound   bound
	}{{50, atMost(1.2)}, {99, bound{}}} {
		row := row{workload: w, measure: fmt.Sprintf("p%.0f", p.percent), against: "pg_advisory_lock"}
		for _, driver := range drivers {
			our, _ := r.find(w, ours, driver)
			their, _ := r.find(w, floor, driver)
			a, b := percentile(our.times, p.percent), percentile(their.times, p.percent)
			row.set(driver, cell{
				value: float64(a) / float64(b),
				text:  fmt.Sprintf("%s (%v / %v)", ratio(float64(a)/float64(b)), a.Round(time.Microsecond), b.Round(time.Microsecond)),
				bound: p.bound,
			})
		}
		r.rows = append(r.rows, row)
	}
}

// percentile returns the value that p percent of the values are not above.
func percentile[T cmp.Ordered](values []T, p float64) T {
	var zero T
	if len(values) == 0 {
		return zero
	}
	s := slices.Sorted(slices.Values(values))
	i := int(float64(len(s))*p/100+0.5) - 1
	return s[min(max(i, 0), len(s)-1)]
}

// median returns the value in the middle, or the mean of the two there.
func median(values []float64) float64 {
	if len(values) == 0 {
		return 0
	}
	s := slices.Sorted(slices.Values(values))
	return (s[(len(s)-1)/2] + s[len(s)/2]) / 2
}
