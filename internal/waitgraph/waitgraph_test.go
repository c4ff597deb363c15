package waitgraph_test

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/pgadvisory/advisory/internal/waitgraph"
)

// wait returns the wait of one who came at the time since, holds keys, and wants another: "a b>c".
func wait(since int64, edges string) waitgraph.Wait {
	held, wanted, _ := strings.Cut(edges, ">")
	return waitgraph.Wait{ID: fmt.Sprint("w", since), Since: since, Wanted: wanted, Held: strings.Fields(held)}
}

func ids(waits []waitgraph.Wait) (ids []string) {
	for _, w := range waits {
		ids = append(ids, w.ID)
	}
	return ids
}

func TestCycle(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name   string
		wait   string // of w1
		others []string
		want   []string
	}{
		{"nobody else", "a>b", nil, nil},
		{"for oneself", "a>a", nil, []string{"w1"}},
		{"two", "a>b", []string{"b>a"}, []string{"w1", "w2"}},
		{"three", "a>b", []string{"c>a", "b>c"}, []string{"w1", "w3", "w2"}},
		{"no way back", "a>b", []string{"b>c", "c>d"}, nil},
		{"one of several keys", "x a y>b", []string{"z b>a"}, []string{"w1", "w2"}},
		{"a cycle of others", "a>b", []string{"b>c", "c>b"}, nil},
		{"the shortest", "a>b", []string{"b>c", "c>a", "b>a"}, []string{"w1", "w4"}},
		{"several hold the key", "a>b", []string{"b>x", "b>a"}, []string{"w1", "w3"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			var others []waitgraph.Wait
			for i, o := range test.others {
				others = append(others, wait(int64(i+2), o))
			}
			w := wait(1, test.wait)
			got := waitgraph.New(append(others, w)).Cycle(w)
			if diff := cmp.Diff(test.want, ids(got)); diff != "" {
				t.Errorf("cycle (-want +got):\n%s", diff)
			}
		})
	}
}

// Each of the waits of a cycle finds it, and exactly one is the youngest.
func TestOneOfACycleIsTheYoungest(t *testing.T) {
	t.Parallel()
	for _, since := range [][]int64{{1, 2, 3}, {3, 1, 2}, {2, 3, 1}, {7, 7, 7}, {1, 9, 9}} {
		waits := []waitgraph.Wait{wait(since[0], "a>b"), wait(since[1], "b>c"), wait(since[2], "c>a")}
		youngest := 0
		for i := range waits {
			waits[i].ID = fmt.Sprint("w", i)
		}
		for _, w := range waits {
			cycle := waitgraph.New(waits).Cycle(w)
			if len(cycle) != 3 {
				t.Fatalf("cycle: %v", cycle)
			}
			if waitgraph.Youngest(cycle) {
				youngest++
			}
			if !waitgraph.Same(cycle, waitgraph.New(waits).Cycle(w)) || waitgraph.Same(cycle, cycle[:2]) {
				t.Error("Same")
			}
		}
		if youngest != 1 {
			t.Errorf("since %v: %d are the youngest", since, youngest)
		}
	}
}

func TestTextIsParsed(t *testing.T) {
	t.Parallel()
	waits := []waitgraph.Wait{wait(1732612345678, "17 7.-42>8675309"), wait(2, "99>17")}
	const want = "w1732612345678 1732612345678 8675309 17 7.-42 < w2 2 17 99"
	got := waitgraph.Text(waits)
	if got != want {
		t.Errorf("%q, want %q", got, want)
	}
	if diff := cmp.Diff(waits, waitgraph.Parse(got)); diff != "" {
		t.Errorf("parsed (-want +got):\n%s", diff)
	}
	if got := waitgraph.Text(nil); got != "" || waitgraph.Parse(got) != nil {
		t.Errorf("%q for nobody who holds a key", got)
	}
}

func TestBehind(t *testing.T) {
	t.Parallel()
	waits := []waitgraph.Wait{wait(2, "b>a"), wait(3, "c>b"), wait(4, "x>y"), wait(5, "d>a"), wait(6, "a>c")}
	got := waitgraph.Behind(wait(1, "a>z"), waits)
	if diff := cmp.Diff([]string{"w2", "w5", "w3", "w6"}, ids(got)); diff != "" {
		t.Errorf("behind (-want +got):\n%s", diff)
	}
}

func TestWhatIsNoTextIsNotParsed(t *testing.T) {
	t.Parallel()
	for _, s := range []string{"", "1", "w 2 3", "w x 3 4", " 2 3 4", "w 2  3", "w 2 3 4 < ", "w 2 3 4 < v"} {
		if waits := waitgraph.Parse(s); waits != nil {
			t.Errorf("%q: %v", s, waits)
		}
	}
}

// However many waits and keys there are, the text has its bounds.
func TestLongTextsAreCut(t *testing.T) {
	t.Parallel()
	var waits []waitgraph.Wait
	for i := range 60 {
		w := wait(int64(i)+1732612345678, ">-9223372036854775808")
		for range 60 {
			w.Held = append(w.Held, "-9223372036854775807")
		}
		waits = append(waits, w)
	}
	for n := range waits {
		for _, keys := range []int{1, 2, 60} {
			some := slices.Clone(waits[:n+1])
			for i := range some {
				some[i].Held = some[i].Held[:keys]
			}
			text := waitgraph.Text(some)
			parsed := waitgraph.Parse(text)
			if len(text) > 930 || len(parsed) == 0 || len(parsed) > len(some) {
				t.Fatalf("%d waits of %d keys: %d bytes, %d waits parsed", len(some), keys, len(text), len(parsed))
			}
		}
	}
}

func FuzzParse(f *testing.F) {
	f.Add("w 2 1 3 4 < v 5 1 6")
	f.Add("w 2 3")
	f.Fuzz(func(t *testing.T, s string) {
		waits := waitgraph.Parse(s)
		if waits == nil {
			return
		}
		again := waitgraph.Parse(waitgraph.Text(waits))
		if len(again) == 0 {
			t.Errorf("%q is parsed, and its text is not", s)
		}
	})
}
