package history

import (
	"cmp"
	"fmt"
	"math"
	"slices"
	"time"
)

// Limits say how late a section may learn that it has lost its lock, where the lock
// can have passed to another before that.
type Limits struct {
	// Notice is for a session that the server ended (Cut).
	Notice time.Duration
	// Grace is for a process that was frozen, from the thaw.
	Grace time.Duration
}

// A Report is what Check found.
type Report struct {
	Sections int
	Kept     int // were assured that they held the lock
	Lost     int // were not
	Killed   int // ended with their process

	// Overlaps of two sections of which one excludes the other, by what makes up for it.

	Told   int // the context of the earlier one had ended before the later one began
	Frozen int // the earlier one's process was frozen when the later one began, and it was told at the thaw
	Cut    int // the server had ended the session of one, and it was told within Notice
	Undone int // one was a transaction that came to nothing

	// Unaware is how long such sections went on beside another before they were told.
	UnawareFrozen, UnawareCut []time.Duration

	// Violations are all other overlaps, and whatever else must not be in a history.
	Violations []string
}

func (r *Report) violation(format string, args ...any) {
	r.Violations = append(r.Violations, fmt.Sprintf(format, args...))
}

const never = time.Duration(math.MaxInt64)

// A section is one time that a process believed to hold a lock.
type section struct {
	Event               // Begin
	told  time.Duration // never, if it was not
	deaf  time.Duration // never, if it was not
	end   time.Duration // never, if it had none
	kept  bool
	lost  bool
}

func (s *section) String() string {
	how := s.How
	if s.Shared {
		how += ", shared"
	}
	text := fmt.Sprintf("%s/%d (%s, %v", s.Process, s.Section, how, s.At)
	if s.end != never {
		text += fmt.Sprintf(" to %v", s.end)
	}
	if s.told != never {
		text += fmt.Sprintf(", told at %v", s.told)
	}
	if s.deaf != never {
		text += fmt.Sprintf(", deaf from %v", s.deaf)
	}
	switch {
	case s.kept:
		text += ", kept"
	case s.lost:
		text += ", lost"
	}
	return text + ")"
}

// A span is the time from freezing a process to thawing it, or of cutting a session.
type span struct{ from, to time.Duration }

type cut struct {
	span
	key string
}

// A lifetime is what was done to one process.
type lifetime struct {
	killed time.Duration // never, if it was not
	frozen []span
	cut    []cut
}

type sectionID struct {
	process string
	section int64
}

type checker struct {
	limits    Limits
	sections  map[sectionID]*section
	processes map[string]*lifetime
	report    Report
}

// Check checks a history, whose events are in any order.
//
// Sections of one key must not overlap, unless both are shared, with these
// exceptions, which are counted:
//
//   - The context of the earlier one had ended before the later one began.
//   - One of them is a transaction that was not committed.
//   - The earlier one's process was frozen when the later one began: nobody can
//     tell it anything. It must have been told, or have ended, by Grace after the thaw.
//   - The server had ended the session that held the lock: it tells nobody. The section
//     must have been told, or have ended, by Notice after that.
//
// A section that is Kept is excused by none of them. One whose process was killed
// ended with it.
func Check(events []Event, limits Limits) Report {
	c := &checker{limits: limits, sections: map[sectionID]*section{}, processes: map[string]*lifetime{}}
	events = slices.Clone(events)
	slices.SortStableFunc(events, func(a, b Event) int { return cmp.Compare(a.At, b.At) })
	for _, e := range events {
		if e.Kind == Begin {
			c.begin(e)
		}
	}
	for _, e := range events {
		c.add(e)
	}
	c.finish()
	byKey := map[string][]*section{}
	for _, s := range c.sections {
		byKey[s.Key] = append(byKey[s.Key], s)
	}
	for _, sections := range byKey {
		c.checkKey(sections)
	}
	slices.Sort(c.report.Violations)
	return c.report
}

func (c *checker) process(name string) *lifetime {
	p := c.processes[name]
	if p == nil {
		p = &lifetime{killed: never}
		c.processes[name] = p
	}
	return p
}

func (c *checker) begin(e Event) {
	id := sectionID{e.Process, e.Section}
	if c.sections[id] != nil {
		c.report.violation("%s/%d begins twice", e.Process, e.Section)
		return
	}
	c.sections[id] = &section{Event: e, told: never, deaf: never, end: never}
}

func (c *checker) add(e Event) {
	p := c.process(e.Process)
	switch e.Kind {
	case Begin:
	case Freeze:
		p.frozen = append(p.frozen, span{e.At, never})
	case Thaw:
		if n := len(p.frozen); n == 0 || p.frozen[n-1].to != never {
			c.report.violation("%s is thawed and was not frozen", e.Process)
		} else {
			p.frozen[n-1].to = e.At
		}
	case Kill:
		p.killed = e.At
	case Cut:
		p.cut = append(p.cut, cut{span{e.From, e.At}, e.Key})
	case Told, Deaf, End, Kept, Lost:
		s := c.sections[sectionID{e.Process, e.Section}]
		if s == nil {
			c.report.violation("%s/%d has not begun: %s", e.Process, e.Section, e.Kind)
			return
		}
		switch e.Kind {
		case Told:
			s.told = min(s.told, e.At)
		case Deaf:
			s.deaf = min(s.deaf, e.At)
		case End:
			s.end = e.At
		case Kept:
			s.kept = true
		case Lost:
			s.lost = true
		}
	default:
		c.report.violation("%s/%d: unknown event %q", e.Process, e.Section, e.Kind)
	}
}

// finish looks at each section by itself.
func (c *checker) finish() {
	r := &c.report
	for _, s := range c.sections {
		p := c.process(s.Process)
		r.Sections++
		switch {
		case s.kept && s.lost:
			r.violation("%v is both", s)
		case s.kept && s.told != never && !s.Tx:
			r.violation("%v was told that it lost the lock, and is assured that it did not", s)
		case s.kept:
			r.Kept++
		case s.lost:
			r.Lost++
		case p.killed != never:
			r.Killed++
		default:
			r.violation("%v has no outcome, and nobody killed its process", s)
		}
		if s.end == never {
			if p.killed == never {
				r.violation("%v has no end, and nobody killed its process", s)
			}
			s.end = p.killed
		}
	}
}

// checkKey looks for overlaps.
func (c *checker) checkKey(sections []*section) {
	slices.SortFunc(sections, func(a, b *section) int { return cmp.Compare(a.At, b.At) })
	var open []*section // those that may reach beyond the begin of the next one
	for _, later := range sections {
		open = slices.DeleteFunc(open, func(s *section) bool { return s.end <= later.At })
		for _, earlier := range open {
			if !(earlier.Shared && later.Shared) {
				c.overlap(earlier, later)
			}
		}
		open = append(open, later)
	}
}

// overlap judges a section that began before the end of an earlier one.
func (c *checker) overlap(earlier, later *section) {
	r := &c.report
	// The later one may itself have lost the lock, between the grant and its begin.
	isCut, late := c.cut(earlier, later.At), earlier
	if !isCut {
		isCut, late = c.cut(later, later.At), later
	}
	switch {
	case min(earlier.told, earlier.deaf) <= later.At && !earlier.kept:
		r.Told++
	case earlier.Tx && !earlier.kept, later.Tx && !later.kept:
		r.Undone++
	case c.frozen(earlier, later.At):
		r.Frozen++
		r.UnawareFrozen = append(r.UnawareFrozen, earlier.aware()-later.At)
	case isCut:
		r.Cut++
		r.UnawareCut = append(r.UnawareCut, late.aware()-later.At)
	default:
		r.violation("key %s: %v began %v before the end of %v", later.Key, later, earlier.end-later.At, earlier)
	}
}

// aware is when the section at last no longer had to believe that it held the lock.
func (s *section) aware() time.Duration { return min(s.told, s.deaf, s.end) }

// frozen tells whether s could not know at the time at that it had lost the lock,
// because its process was frozen.
func (c *checker) frozen(s *section, at time.Duration) bool {
	if s.kept {
		return false
	}
	return slices.ContainsFunc(c.process(s.Process).frozen, func(f span) bool {
		return f.from <= at && s.aware() <= later(f.to, c.limits.Grace)
	})
}

// cutMeant is for how long after a cut the session may have come to hold another key
// than the one that it was cut for: it got that in the very moment.
const cutMeant = 20 * time.Millisecond

// cut tells whether s could not know at the time at that it had lost the lock,
// because the server had just ended its session.
func (c *checker) cut(s *section, at time.Duration) bool {
	if s.kept {
		return false
	}
	p := c.process(s.Process)
	return slices.ContainsFunc(p.cut, func(cut cut) bool {
		if cut.to < s.Asked || at < cut.from {
			return false // another session's, or later
		}
		if cut.key != s.Key && (s.At < cut.from || s.At > cut.to+cutMeant) {
			return false // another session's
		}
		until := later(cut.to, c.limits.Notice)
		for _, f := range p.frozen { // in order
			if f.from <= until && f.to >= cut.from {
				until = max(until, later(f.to, c.limits.Grace))
			}
		}
		return s.aware() <= until
	})
}

// later is t + d, and never if t is.
func later(t, d time.Duration) time.Duration {
	if t > never-d {
		return never
	}
	return t + d
}
