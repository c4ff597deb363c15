// Package waitgraph is who waits for whom: waits as the edges of a graph of keys, the search for a
// cycle, and the text by which processes tell each other of their edges. It is pure: it asks nobody,
// and knows keys as text.
package waitgraph

import (
	"cmp"
	"slices"
	"strconv"
	"strings"
)

// A Wait is an edge from each key that a waiter holds to the one that it wants.
type Wait struct {
	Wanted string
	Held   []string // not empty for Text

	// Since is when the wait began, in milliseconds by the clock of the waiter's process, and ID tells
	// it from every other.
	Since int64
	ID    string

	PID  int    // of the server's process that waits; 0: of this process
	Name string // of the waiter's program
}

// younger tells whether w began after v: a rule that every process computes alike.
func (w Wait) younger(v Wait) bool {
	return cmp.Or(cmp.Compare(w.Since, v.Since), cmp.Compare(w.ID, v.ID)) > 0
}

// A Graph has, for each key, the waits of those who hold it.
type Graph map[string][]Wait

// New returns the graph of waits. Of several with one ID, it has the first. The same waits make the same
// graph, in whatever order they come.
func New(waits []Wait) Graph {
	waits = slices.Clone(waits)
	slices.SortStableFunc(waits, func(v, w Wait) int {
		return cmp.Or(cmp.Compare(v.Since, w.Since), cmp.Compare(v.ID, w.ID))
	})
	waits = slices.CompactFunc(waits, func(v, w Wait) bool { return v.ID == w.ID })
	g := make(Graph)
	for _, w := range waits {
		for _, k := range w.Held {
			g[k] = append(g[k], w)
		}
	}
	return g
}

// Cycle returns the waits of the shortest cycle through w, w first, or nil if there is none. Each
// wait of it wants a key that the next one holds.
func (g Graph) Cycle(w Wait) []Wait {
	type step struct {
		wait Wait
		from *step
	}
	seen := map[string]bool{w.ID: true}
	for steps := []*step{{wait: w}}; len(steps) > 0; steps = steps[1:] {
		s := steps[0]
		if slices.Contains(w.Held, s.wait.Wanted) {
			var cycle []Wait
			for ; s != nil; s = s.from {
				cycle = append(cycle, s.wait)
			}
			slices.Reverse(cycle)
			return cycle
		}
		for _, o := range g[s.wait.Wanted] {
			if !seen[o.ID] {
				seen[o.ID] = true
				steps = append(steps, &step{o, s})
			}
		}
	}
	return nil
}

// Youngest tells whether the first wait of a cycle is its youngest, which is the one that ends.
func Youngest(cycle []Wait) bool {
	return !slices.ContainsFunc(cycle[1:], func(w Wait) bool { return w.younger(cycle[0]) })
}

// Same tells whether two cycles are the same waits.
func Same(a, b []Wait) bool {
	return slices.EqualFunc(a, b, func(v, w Wait) bool { return v.ID == w.ID && v.Wanted == w.Wanted })
}

// The text of waits has of each its ID, since when it waits, what it wants and what it holds. It stands in
// the comment of a statement. Of that, a server shows the first 1,023 bytes by default
// (track_activity_query_size), and so the text has fewer.
const (
	next    = " < "
	longest = 930
)

// Text returns the text of waits: of as many of them, and of the keys of each, as there is room for.
func Text(waits []Wait) string {
	var b strings.Builder
	for _, w := range waits {
		head := w.ID + " " + strconv.FormatInt(w.Since, 10) + " " + w.Wanted
		if b.Len() > 0 {
			head = next + head
		}
		if b.Len()+len(head)+1+len(w.Held[0]) > longest {
			break
		}
		b.WriteString(head)
		for _, k := range w.Held {
			if b.Len()+1+len(k) <= longest {
				b.WriteString(" " + k)
			}
		}
	}
	return b.String()
}

// Parse returns the waits of a text that Text has written, and nil if it is none.
func Parse(text string) []Wait {
	var waits []Wait
	for edge := range strings.SplitSeq(text, next) {
		words := strings.Split(edge, " ")
		if len(words) < 4 || slices.Contains(words, "") || slices.Contains(words, "<") {
			return nil
		}
		since, err := strconv.ParseInt(words[1], 10, 64)
		if err != nil {
			return nil
		}
		waits = append(waits, Wait{ID: words[0], Since: since, Wanted: words[2], Held: words[3:]})
	}
	return waits
}

// mostBehind is how many waits Behind returns at most: a text has no room for more.
const mostBehind = 16

// Behind returns those of waits that wait for w: they want a key that w holds, or one that another of
// them holds.
func Behind(w Wait, waits []Wait) []Wait {
	behind, seen := []Wait{w}, map[string]bool{w.ID: true}
	for i := 0; i < len(behind); i++ {
		for _, o := range waits {
			if len(behind) <= mostBehind && !seen[o.ID] && slices.Contains(behind[i].Held, o.Wanted) {
				seen[o.ID] = true
				behind = append(behind, o)
			}
		}
	}
	return behind[1:]
}
