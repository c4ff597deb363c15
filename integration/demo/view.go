package main

import (
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"time"
)

// A view prints for a person to read: on a terminal with bars that move, elsewhere
// in plain lines.
type view struct {
	w        io.Writer
	terminal bool
	color    bool
}

func newView(f *os.File) *view {
	info, err := f.Stat()
	terminal := err == nil && info.Mode()&os.ModeCharDevice != 0 && os.Getenv("TERM") != "dumb"
	return &view{w: f, terminal: terminal, color: terminal && os.Getenv("NO_COLOR") == ""}
}

const (
	bold    = "1"
	green   = "32"
	boldRed = "1;31"
)

func (v *view) paint(style, s string) string {
	if !v.color {
		return s
	}
	return "\x1b[" + style + "m" + s + "\x1b[0m"
}

func (v *view) title(s string) { fmt.Fprintln(v.w, v.paint(bold, s)) }
func (v *view) act(n int, s string) {
	fmt.Fprintf(v.w, "\n%s\n", v.paint(bold, fmt.Sprintf("Act %d: %s", n, s)))
}
func (v *view) say(s string) { fmt.Fprintln(v.w, "  "+s) }

// clear removes a bar that has not been finished, or a live line.
func (v *view) clear() {
	if v.terminal {
		fmt.Fprint(v.w, "\r\x1b[K")
	}
}

// live shows a line in the place of the last one, on a terminal only.
func (v *view) live(s string) {
	if v.terminal {
		v.clear()
		fmt.Fprint(v.w, "  "+s)
	}
}

// A bar shows how far something is.
type bar struct {
	v     *view
	label string
	total int
	drawn time.Time
}

const (
	labelWidth  = 17
	barWidth    = 24
	redrawEvery = 50 * time.Millisecond
)

func (v *view) bar(label string, total int) *bar { return &bar{v: v, label: label, total: total} }

// set moves the bar, with a note beside it.
func (b *bar) set(n int, note string) {
	if !b.v.terminal || time.Since(b.drawn) < redrawEvery {
		return
	}
	b.drawn = time.Now()
	b.draw(n, note)
}

func (b *bar) draw(n int, note string) {
	full := barWidth * min(n, b.total) / b.total
	b.v.clear()
	fmt.Fprintf(b.v.w, "  %-*s %s%s  %s", labelWidth, b.label,
		strings.Repeat("━", full), strings.Repeat("╌", barWidth-full), note)
}

// finish leaves the full bar, or a line in its place.
func (b *bar) finish(note string) {
	if b.v.terminal {
		b.draw(b.total, note)
		fmt.Fprintln(b.v.w)
		return
	}
	fmt.Fprintf(b.v.w, "  %-*s %s\n", labelWidth, b.label, note)
}

// summary prints the promises, each with its numbers below it, and returns how many were kept.
func (v *view) summary(promises []promise, took time.Duration) (kept int) {
	fmt.Fprintf(v.w, "\n%s\n", v.paint(bold, "Promises"))
	for _, p := range promises {
		result := v.paint(boldRed, "BROKEN")
		if p.kept {
			kept++
			result = v.paint(green, "kept  ")
		}
		fmt.Fprintf(v.w, "  %s  %s\n", result, p.text)
		for line := range strings.SplitSeq(p.numbers, "\n") {
			fmt.Fprintf(v.w, "          %s\n", line)
		}
	}
	fmt.Fprintf(v.w, "\n%d of %d promises kept, in %s\n", kept, len(promises), seconds(took))
	return kept
}

// thousands writes 1234567 as 1,234,567.
func thousands(n int) string {
	s := strconv.Itoa(n)
	for i := len(s) - 3; i > 0 && s[i-1] != '-'; i -= 3 {
		s = s[:i] + "," + s[i:]
	}
	return s
}

func seconds(d time.Duration) string { return fmt.Sprintf("%.1f s", d.Seconds()) }

func milliseconds(d time.Duration) string {
	if d >= time.Second {
		return seconds(d)
	}
	return fmt.Sprintf("%d ms", max(1, d.Milliseconds()))
}

// rate is n per second, to three digits.
func rate(n int, d time.Duration) string {
	r := float64(n) / max(d.Seconds(), 0.001)
	unit := 1
	for r >= 1000*float64(unit) {
		unit *= 10
	}
	return thousands((int(r)+unit/2)/unit*unit) + "/s"
}

func plural(n int, noun string) string {
	switch {
	case n == 1:
	case strings.HasSuffix(noun, "s"):
		noun += "es"
	default:
		noun += "s"
	}
	return thousands(n) + " " + noun
}

// list writes numbers as "1, 2 and 4".
func list(numbers []int) string {
	if len(numbers) == 0 {
		return "none"
	}
	var b strings.Builder
	for i, n := range numbers {
		switch {
		case i == 0:
		case i == len(numbers)-1:
			b.WriteString(" and ")
		default:
			b.WriteString(", ")
		}
		b.WriteString(strconv.Itoa(n))
	}
	return b.String()
}
