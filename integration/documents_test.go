package integration

import (
	"encoding/json"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// A document is a Markdown file that people read.
type document struct {
	path string // from the root of the repository
	text string
}

// documents returns all of them.
func documents(t *testing.T) (docs []document) {
	t.Helper()
	for _, pattern := range []string{"*.md", "docs/*.md", "*/README.md", "cmd/*/README.md"} {
		paths, err := filepath.Glob(filepath.Join("..", pattern))
		if err != nil {
			t.Fatal(err)
		}
		for _, path := range paths {
			text, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			docs = append(docs, document{strings.TrimPrefix(filepath.ToSlash(path), "../"), string(text)})
		}
	}
	if len(docs) < 10 {
		t.Fatalf("%d documents", len(docs))
	}
	return docs
}

// blocks returns the code blocks of a document in a language.
func (d document) blocks(language string) (blocks []string) {
	for _, m := range regexp.MustCompile("(?s)```"+language+"\n(.*?)```").FindAllStringSubmatch(d.text, -1) {
		blocks = append(blocks, m[1])
	}
	return blocks
}

// The programs in the documents compile as they stand.
func TestProgramsInDocumentsCompile(t *testing.T) {
	t.Parallel()
	here, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	programs := 0
	for _, doc := range documents(t) {
		for _, program := range doc.blocks("go") {
			if !strings.HasPrefix(program, "package main\n") {
				continue // TestSnippetsInDocumentsAreRun
			}
			programs++
			if out, err := build(t, here, fmt.Sprintf("program%d", programs), program); err != nil {
				t.Errorf("program %d, of %s: %v\n%s", programs, doc.path, err, out)
			}
		}
	}
	if programs == 0 {
		t.Error("no program found")
	}
}

// build compiles a program as a part of this module. An overlay puts it there, and leaves no file.
func build(t *testing.T, here, name, program string) (out []byte, err error) {
	t.Helper()
	dir := t.TempDir()
	source := filepath.Join(dir, "main.go")
	overlay, err := json.Marshal(map[string]any{"Replace": map[string]string{filepath.Join(here, name, "main.go"): source}})
	if err != nil {
		t.Fatal(err)
	}
	for path, content := range map[string][]byte{source: []byte(program), filepath.Join(dir, "overlay.json"): overlay} {
		if err := os.WriteFile(path, content, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return exec.Command("go", "build", "-o", filepath.Join(dir, "program"), "-overlay", filepath.Join(dir, "overlay.json"), "./"+name).CombinedOutput()
}

// sources returns the Go files of all modules, by path from the root of the repository.
func sources(t *testing.T) map[string]string {
	t.Helper()
	files := map[string]string{}
	err := filepath.WalkDir("..", func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || !strings.HasSuffix(path, ".go") {
			return err
		}
		text, err := os.ReadFile(path)
		files[strings.TrimPrefix(filepath.ToSlash(path), "../")] = string(text)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return files
}

// The documents name tests, examples and benchmarks that there are, and link to what
// there is. In docs/, a test that is named is a link to the file that has it.
func TestDocumentsNameWhatExists(t *testing.T) {
	t.Parallel()
	files := testsAndBenchmarks(t)
	anchors := map[string]map[string]bool{}
	docs := documents(t)
	for _, doc := range docs {
		anchors[doc.path] = doc.anchors()
	}
	for _, doc := range docs {
		for _, name := range doc.names() {
			path, ok := files[name]
			if !ok {
				t.Errorf("%s names %s, which does not exist", doc.path, name)
				continue
			}
			link := "[`" + name + "`](../" + path + ")"
			if strings.HasPrefix(doc.path, "docs/") && !strings.Contains(doc.text, link) && docTest.MatchString(name) {
				t.Errorf("%s names %s, and should as %s", doc.path, name, link)
			}
		}
		wantLinks(t, doc, anchors)
	}
}

// testsAndBenchmarks are the names of all tests, examples and benchmarks, with the file of each.
func testsAndBenchmarks(t *testing.T) map[string]string {
	t.Helper()
	files := map[string]string{}
	function := regexp.MustCompile(`(?m)^func ((?:Test|Example|Benchmark)\w+)\(`)
	workload := regexp.MustCompile(`\{name: "(\w+)", title:`)
	for path, text := range sources(t) {
		re := function
		if filepath.Base(filepath.Dir(path)) == "bench" {
			re = workload
		} else if !strings.HasSuffix(path, "_test.go") {
			continue
		}
		for _, m := range re.FindAllStringSubmatch(text, -1) {
			files[m[1]] = path
		}
	}
	return files
}

var (
	docNamed    = regexp.MustCompile("`(?:Test|Example|Benchmark)[A-Z_]\\w+`|benchmarks?(?:(?:,| and)? `\\w+`)+")
	docQuoted   = regexp.MustCompile("`(\\w+)`")
	docTest     = regexp.MustCompile(`^(?:Test|Example)`)
	docLink     = regexp.MustCompile(`\]\(([^)\s]*)\)`)
	docHeading  = regexp.MustCompile("(?m)^#+ (.*)$")
	notInAnchor = regexp.MustCompile(`[^a-z0-9 _-]`)
)

// names returns the tests, examples and benchmarks that a document names.
func (d document) names() (names []string) {
	for _, m := range docNamed.FindAllString(d.text, -1) {
		for _, name := range docQuoted.FindAllStringSubmatch(m, -1) {
			names = append(names, name[1])
		}
	}
	return names
}

// anchors returns those of the document's sections, with the sign before them.
func (d document) anchors() map[string]bool {
	anchors := map[string]bool{}
	for _, m := range docHeading.FindAllStringSubmatch(d.text, -1) {
		anchors["#"+strings.ReplaceAll(notInAnchor.ReplaceAllString(strings.ToLower(m[1]), ""), " ", "-")] = true
	}
	return anchors
}

// wantLinks fails the test for each link of a document that leads nowhere. anchors has those of all
// documents.
func wantLinks(t *testing.T, doc document, anchors map[string]map[string]bool) {
	t.Helper()
	for _, m := range docLink.FindAllStringSubmatch(doc.text, -1) {
		if strings.Contains(m[1], "://") {
			continue
		}
		file, section, _ := strings.Cut(m[1], "#")
		target := doc.path
		if file != "" {
			target = filepath.ToSlash(filepath.Join(filepath.Dir(doc.path), file))
		}
		if _, err := os.Stat(filepath.Join("..", target)); err != nil {
			t.Errorf("%s links to %s: %v", doc.path, m[1], err)
		} else if section != "" && !anchors[target]["#"+section] {
			t.Errorf("%s links to %s, which has no such section", doc.path, m[1])
		}
	}
}

// What the documents show of Go, beside whole programs, stands as it is in a test or an
// example, which compiles and runs.
func TestSnippetsInDocumentsAreRun(t *testing.T) {
	t.Parallel()
	lines := func(text string) string {
		var b strings.Builder
		for line := range strings.Lines(text) {
			if line = strings.TrimSpace(line); line != "" {
				b.WriteString(line + "\n")
			}
		}
		return b.String()
	}
	var tests []string
	for path, text := range sources(t) {
		if strings.HasSuffix(path, "_test.go") {
			tests = append(tests, lines(text))
		}
	}
	for _, doc := range documents(t) {
		for _, snippet := range doc.blocks("go") {
			found := strings.HasPrefix(snippet, "package main\n") // TestProgramsInDocumentsCompile
			for _, text := range tests {
				found = found || strings.Contains(text, lines(snippet))
			}
			if !found {
				t.Errorf("%s: in no test or example:\n%s", doc.path, snippet)
			}
		}
	}
}

// The queries in the documents are ones that the server understands.
func TestQueriesInDocumentsRun(t *testing.T) {
	t.Parallel()
	queries := 0
	eachDriver(t, func(t *testing.T, d driver) {
		db := d.open(t, inDatabase(t))
		for _, doc := range documents(t) {
			for _, query := range doc.blocks("sql") {
				queries++
				rows, err := db.Query(query)
				if err != nil {
					t.Errorf("%s: %v\n%s", doc.path, err, query)
					continue
				}
				rows.Close()
			}
		}
	})
	if queries == 0 {
		t.Error("no query found")
	}
}

// The measurements in the documents are those of the last run of "make bench".
func TestMeasurementsInDocumentsAreTheResults(t *testing.T) {
	t.Parallel()
	results, err := os.ReadFile("bench/results.md")
	if err != nil {
		t.Fatal(err)
	}
	rows := 0
	for _, doc := range documents(t) {
		for _, m := range regexp.MustCompile("(?s)<!-- bench:begin -->(.*?)<!-- bench:end -->").FindAllStringSubmatch(doc.text, -1) {
			for line := range strings.Lines(m[1]) {
				if strings.HasPrefix(line, "| ") {
					rows++
					if !strings.Contains(string(results), "\n"+strings.TrimSuffix(line, "\n")) {
						t.Errorf("%s: not in results.md: %s", doc.path, line)
					}
				}
			}
		}
	}
	if rows == 0 {
		t.Error("no row found")
	}
}
