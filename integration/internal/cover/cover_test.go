package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

const source1 = `package p

type t[K any] struct{}

func (*t[K]) m(ok bool) int {
	if ok {
		// Why.
		return 1
	}
	return 2
}
`

// The first block is reached in one of two runs.
const profile1 = `mode: atomic
example.com/p/p.go:5.31,6.8 1 0
example.com/p/p.go:6.8,9.3 1 0
example.com/p/p.go:10.2,10.10 2 1
example.com/p/p.go:5.31,6.8 1 4
`

func TestBlocks(t *testing.T) {
	blocks, err := parse(profile1)
	if err != nil || len(blocks) != 3 {
		t.Fatalf("%v, %v", blocks, err)
	}
	if b := blocks[0]; !b.reached || b.String() != "p.go:5-6" {
		t.Errorf("the first block: %v %+v", b, b)
	}
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "p.go"), []byte(source1), 0o600); err != nil {
		t.Fatal(err)
	}
	s, err := sources{dir: dir, files: map[string]*source{}}.of("p.go")
	if err != nil {
		t.Fatal(err)
	}
	b := blocks[1]
	if b.reached || b.String() != "p.go:6-9" || s.function(b.line) != "(*t).m" || s.text(b) != "if ok { return 1" {
		t.Errorf("the second block: %v %+v in %q: %q", b, b, s.function(b.line), s.text(b))
	}
}

func TestLeastShare(t *testing.T) {
	dir := t.TempDir()
	for name, text := range map[string]string{"p.go": source1, "cover.out": profile1} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	profile := filepath.Join(dir, "cover.out")
	if err := run(profile, "tests", 75, dir, true); err != nil { // 3 of 4 statements
		t.Error(err)
	}
	if err := run(profile, "tests", 75.1, dir, false); err == nil || !strings.Contains(err.Error(), "75.0 % is less than 75.1 %") {
		t.Errorf("error: %v", err)
	}
}
