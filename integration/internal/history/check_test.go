package history

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// A story is a history told in milliseconds.
type story []Event

func (h *story) add(e Event) *story {
	*h = append(*h, e)
	return h
}

const ms = time.Millisecond

// did adds a section of key "k" that lasts from begin to end. Its name is
// PROCESS/NUMBER.
func (h *story) did(name string, begin, end int, rest ...func(*[]Event)) *story {
	process, number, _ := strings.Cut(name, "/")
	id := int64(number[0])
	events := []Event{
		{Kind: Begin, At: time.Duration(begin) * ms, Asked: time.Duration(begin-10) * ms, Process: process, Section: id, Key: "k"},
		{Kind: End, At: time.Duration(end) * ms, Process: process, Section: id},
		{Kind: Kept, At: time.Duration(end+1) * ms, Process: process, Section: id},
	}
	for _, f := range rest {
		f(&events)
	}
	*h = append(*h, events...)
	return h
}

func shared(e *[]Event)   { (*e)[0].Shared = true }
func tx(e *[]Event)       { (*e)[0].Tx = true }
func lost(e *[]Event)     { (*e)[2].Kind = Lost }
func otherKey(e *[]Event) { (*e)[0].Key = "other" }
func noOutcome(e *[]Event) {
	*e = (*e)[:2]
}
func noEnd(e *[]Event)           { *e = (*e)[:1] }
func told(at int) func(*[]Event) { return heard(Told, at) }
func deaf(at int) func(*[]Event) { return heard(Deaf, at) }

func heard(what Kind, at int) func(*[]Event) {
	return func(e *[]Event) {
		*e = append(*e, Event{Kind: what, At: time.Duration(at) * ms, Process: (*e)[0].Process, Section: (*e)[0].Section})
	}
}

func (h *story) freeze(p string, at int) *story {
	return h.add(Event{Kind: Freeze, Process: p, At: time.Duration(at) * ms})
}
func (h *story) thaw(p string, at int) *story {
	return h.add(Event{Kind: Thaw, Process: p, At: time.Duration(at) * ms})
}
func (h *story) kill(p string, at int) *story {
	return h.add(Event{Kind: Kill, Process: p, At: time.Duration(at) * ms})
}
func (h *story) cut(p, key string, from, to int) *story {
	return h.add(Event{Kind: Cut, Process: p, Key: key, From: time.Duration(from) * ms, At: time.Duration(to) * ms})
}

func TestCheck(t *testing.T) {
	limits := Limits{Notice: 400 * ms, Grace: 50 * ms}
	type counts struct{ told, frozen, cut, undone int }
	for _, tt := range []struct {
		name  string
		story *story
		want  counts
		wrong string // part of the violation, "" if there is none
	}{
		{name: "one after the other",
			story: new(story).did("a/1", 100, 200).did("b/1", 200, 300).did("a/2", 300, 400)},
		{name: "overlap", wrong: "began 1ms before the end of a/49",
			story: new(story).did("a/1", 100, 200).did("b/1", 199, 300)},
		{name: "overlap with one that began long ago", wrong: "began 300ms before the end of a/49",
			story: new(story).did("a/1", 100, 800, shared).did("b/1", 200, 300, shared).did("c/1", 500, 600)},
		{name: "one inside the other", wrong: "began 100ms before the end of a/49",
			story: new(story).did("a/1", 100, 400).did("b/1", 300, 310)},
		{name: "overlap within one process", wrong: "began",
			story: new(story).did("a/1", 100, 200).did("a/2", 150, 300)},
		{name: "overlap of lost ones for which nothing can be blamed", wrong: "began",
			story: new(story).did("a/1", 100, 200, lost).did("b/1", 150, 300, lost)},
		{name: "another key",
			story: new(story).did("a/1", 100, 200).did("b/1", 150, 300, otherKey)},

		{name: "readers",
			story: new(story).did("a/1", 100, 200, shared).did("b/1", 150, 300, shared).did("c/1", 160, 170, shared)},
		{name: "writer beside a reader", wrong: "began",
			story: new(story).did("a/1", 100, 200, shared).did("b/1", 150, 300)},
		{name: "reader beside a writer", wrong: "began",
			story: new(story).did("a/1", 100, 200).did("b/1", 150, 300, shared)},

		{name: "told before", want: counts{told: 1},
			story: new(story).did("a/1", 100, 200, lost, told(149)).did("b/1", 150, 300)},
		{name: "lost after its context had ended", want: counts{told: 1},
			story: new(story).did("a/1", 100, 200, lost, deaf(149)).did("b/1", 150, 300)},
		{name: "kept though its context had ended", wrong: "began",
			story: new(story).did("a/1", 100, 200, deaf(149)).did("b/1", 150, 300)},
		{name: "lost before its context ended", wrong: "began",
			story: new(story).did("a/1", 100, 200, lost, deaf(151)).did("b/1", 150, 300)},
		{name: "told after", wrong: "began",
			story: new(story).did("a/1", 100, 200, lost, told(151)).did("b/1", 150, 300)},
		{name: "told before, and assured of the contrary", wrong: "assured that it did not",
			story: new(story).did("a/1", 100, 200, told(149)).did("b/1", 150, 300)},

		{name: "frozen, and told at the thaw", want: counts{frozen: 1},
			story: new(story).did("a/1", 100, 500, lost, told(420)).freeze("a", 120).thaw("a", 400).did("b/1", 150, 300)},
		{name: "frozen, and at an end after the thaw", want: counts{frozen: 1},
			story: new(story).did("a/1", 100, 410, lost).freeze("a", 120).thaw("a", 400).did("b/1", 150, 300)},
		{name: "frozen, and told late", wrong: "began",
			story: new(story).did("a/1", 100, 500, lost, told(451)).freeze("a", 120).thaw("a", 400).did("b/1", 150, 300)},
		{name: "frozen, and never told", wrong: "began",
			story: new(story).did("a/1", 100, 500).freeze("a", 120).thaw("a", 400).did("b/1", 150, 300)},
		{name: "frozen, and assured to have kept it", wrong: "began",
			story: new(story).did("a/1", 100, 410).freeze("a", 120).thaw("a", 400).did("b/1", 150, 300)},
		{name: "frozen later", wrong: "began",
			story: new(story).did("a/1", 100, 500, lost, told(420)).freeze("a", 160).thaw("a", 400).did("b/1", 150, 300)},
		{name: "another frozen", wrong: "began",
			story: new(story).did("a/1", 100, 500, lost, told(420)).freeze("c", 120).thaw("c", 400).did("b/1", 150, 300)},
		{name: "frozen for good", want: counts{frozen: 1},
			story: new(story).did("a/1", 100, 500, noEnd).freeze("a", 120).kill("a", 400).did("b/1", 150, 300)},

		{name: "killed",
			story: new(story).did("a/1", 100, 500, noEnd).kill("a", 140).did("b/1", 150, 300)},
		{name: "killed later", wrong: "began",
			story: new(story).did("a/1", 100, 500, noEnd).kill("a", 160).did("b/1", 150, 300)},
		{name: "killed between its end and the outcome",
			story: new(story).did("a/1", 100, 140, noOutcome).kill("a", 145).did("b/1", 150, 300)},

		{name: "cut, and told in time", want: counts{cut: 1},
			story: new(story).did("a/1", 100, 900, lost, told(540)).cut("a", "k", 140, 145).did("b/1", 150, 300)},
		{name: "cut, and at an end in time", want: counts{cut: 1},
			story: new(story).did("a/1", 100, 540, lost).cut("a", "k", 140, 145).did("b/1", 150, 300)},
		{name: "cut, and told late", wrong: "began",
			story: new(story).did("a/1", 100, 900, lost, told(546)).cut("a", "k", 140, 145).did("b/1", 150, 300)},
		{name: "cut, and told late because it was frozen", want: counts{cut: 1},
			story: new(story).did("a/1", 100, 900, lost, told(810)).cut("a", "k", 140, 145).freeze("a", 160).thaw("a", 800).did("b/1", 150, 300)},
		{name: "cut, and assured to have kept it", wrong: "began",
			story: new(story).did("a/1", 100, 500).cut("a", "k", 140, 145).did("b/1", 150, 300)},
		{name: "cut after the overlap", wrong: "began",
			story: new(story).did("a/1", 100, 500, lost).cut("a", "k", 151, 155).did("b/1", 150, 300)},
		{name: "cut before it asked", wrong: "began",
			story: new(story).did("a/1", 100, 500, lost).cut("a", "k", 80, 85).did("b/1", 150, 300)},
		{name: "another key cut", wrong: "began",
			story: new(story).did("a/1", 100, 500, lost).cut("a", "other", 140, 145).did("b/1", 150, 300)},
		{name: "cut for another key, in the moment in which it got this one", want: counts{cut: 1},
			story: new(story).did("a/1", 100, 500, lost).cut("a", "other", 99, 101).did("b/1", 150, 300)},
		{name: "cut between the grant and the begin", want: counts{cut: 1},
			story: new(story).did("a/1", 100, 200).did("b/1", 150, 300, lost, told(290)).cut("b", "k", 144, 146)},

		{name: "transactions that come to nothing", want: counts{undone: 2},
			story: new(story).did("a/1", 100, 200, tx, lost).did("b/1", 150, 300).did("c/1", 299, 310, tx, lost)},
		{name: "transaction that was committed, cut or not", wrong: "began",
			story: new(story).did("a/1", 100, 200, tx).cut("a", "k", 140, 145).did("b/1", 150, 300)},

		{name: "no outcome", wrong: "no outcome",
			story: new(story).did("a/1", 100, 200, noOutcome)},
		{name: "no end", wrong: "no end",
			story: new(story).did("a/1", 100, 200, noEnd)},
		{name: "no begin", wrong: "has not begun",
			story: new(story).add(Event{Kind: End, Process: "a", Section: 1})},
		{name: "begins twice", wrong: "begins twice",
			story: new(story).did("a/1", 100, 200).did("a/1", 300, 400)},
		{name: "thawed only", wrong: "was not frozen",
			story: new(story).thaw("a", 100)},
		{name: "unknown event", wrong: "unknown event",
			story: new(story).add(Event{Kind: "sneeze", Process: "a"})},
	} {
		t.Run(tt.name, func(t *testing.T) {
			events := *tt.story
			for range 2 {
				r := Check(events, limits)
				if got := (counts{r.Told, r.Frozen, r.Cut, r.Undone}); tt.wrong == "" && got != tt.want {
					t.Errorf("overlaps excused: %+v, want %+v", got, tt.want)
				}
				switch all := strings.Join(r.Violations, "\n"); {
				case tt.wrong == "" && all != "":
					t.Errorf("violations:\n%s", all)
				case !strings.Contains(all, tt.wrong):
					t.Errorf("violations %q, want %q", all, tt.wrong)
				}
				slices.Reverse(events) // their order in the files means nothing
			}
		})
	}
}

func TestCheckCounts(t *testing.T) {
	h := new(story).did("a/1", 100, 200).did("b/1", 200, 300, lost).did("c/1", 300, 400, noEnd).kill("c", 350).
		did("d/1", 400, 900, lost, told(700)).freeze("d", 410).thaw("d", 690).did("a/2", 500, 600)
	r := Check(*h, Limits{Grace: 50 * ms})
	if r.Sections != 5 || r.Kept != 2 || r.Lost != 2 || r.Killed != 1 || len(r.Violations) != 0 {
		t.Errorf("%+v", r)
	}
	if want := []time.Duration{200 * ms}; !slices.Equal(r.UnawareFrozen, want) {
		t.Errorf("UnawareFrozen %v, want %v", r.UnawareFrozen, want)
	}
}

func TestLog(t *testing.T) {
	dir := t.TempDir()
	if _, err := Read(dir); err == nil {
		t.Error("no error for a directory without logs")
	}
	var want []Event
	for _, process := range []string{"a", "b"} {
		l, err := Create(dir, process)
		if err != nil {
			t.Fatal(err)
		}
		for i := range int64(3) {
			e := Event{Kind: Begin, At: time.Duration(i + 1), Process: process, Section: i, Key: "k", Asked: 1, Shared: true, Tx: true, How: "WithTxLock"}
			want = append(want, e)
			e.Process = "" // the log's
			if err := l.Add(e); err != nil {
				t.Fatal(err)
			}
		}
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := Create(dir, "a"); err == nil {
		t.Error("a second log of one process")
	}
	got, err := Read(dir)
	if err != nil || !slices.Equal(got, want) {
		t.Errorf("read %+v, %v", got, err)
	}

	// The last line may be torn. No other may.
	file := filepath.Join(dir, "a.log")
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, text[:len(text)-3], 0o600); err != nil {
		t.Fatal(err)
	}
	if got, err := Read(dir); err != nil || len(got) != len(want)-1 {
		t.Errorf("torn at the end: read %+v, %v", got, err)
	}
	if err := os.WriteFile(file, text[3:], 0o600); err != nil {
		t.Fatal(err)
	}
	if got, err := Read(dir); err == nil {
		t.Errorf("torn in the middle: read %+v", got)
	}
}
