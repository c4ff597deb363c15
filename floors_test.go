package advisory

import (
	"go/parser"
	"go/token"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// floors are the packages, from the top down. Each imports only those below it, and the last ones
// import none.
var floors = []string{"manager", "lockconn", "session", "pgsql", "keyqueue", "waitgraph"}

func TestFloorsImportOnlyThoseBelow(t *testing.T) {
	t.Parallel()
	const module = "github.com/pgadvisory/advisory"
	files, err := filepath.Glob("internal/*/*.go")
	if err != nil || len(files) == 0 {
		t.Fatalf("no files: %v", err)
	}
	for _, name := range files {
		f, err := parser.ParseFile(token.NewFileSet(), name, nil, parser.ImportsOnly)
		if err != nil {
			t.Fatal(err)
		}
		own := slices.Index(floors, filepath.Base(filepath.Dir(name)))
		for _, i := range f.Imports {
			imported, _ := strconv.Unquote(i.Path.Value)
			if !strings.HasPrefix(imported, module) || strings.HasSuffix(name, "_test.go") {
				continue
			}
			below := slices.Index(floors, path.Base(imported))
			if own < 0 || below <= own || own >= slices.Index(floors, "pgsql") {
				t.Errorf("%s imports %s", name, imported)
			}
		}
	}
}
