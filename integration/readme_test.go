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

// The programs in the README compile as they stand.
func TestReadmeProgramsCompile(t *testing.T) {
	readme, err := os.ReadFile("../README.md")
	if err != nil {
		t.Fatal(err)
	}
	here, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	programs := regexp.MustCompile("(?s)```go\n(package main\n.*?)```").FindAllSubmatch(readme, -1)
	if len(programs) == 0 {
		t.Fatal("no program found in the README")
	}
	for i, program := range programs {
		// An overlay puts the program into this module, and leaves no file here.
		dir := t.TempDir()
		source := filepath.Join(dir, "main.go")
		name := fmt.Sprintf("readme%d", i)
		overlay, err := json.Marshal(map[string]any{"Replace": map[string]string{filepath.Join(here, name, "main.go"): source}})
		if err != nil {
			t.Fatal(err)
		}
		for path, content := range map[string][]byte{source: program[1], filepath.Join(dir, "overlay.json"): overlay} {
			if err := os.WriteFile(path, content, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		cmd := exec.Command("go", "build", "-o", filepath.Join(dir, "program"), "-overlay", filepath.Join(dir, "overlay.json"), "./"+name)
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Errorf("program %d of the README: %v\n%s", i+1, err, out)
		}
	}
}

// sources returns the Go files of all modules, by path.
func sources(t *testing.T) map[string]string {
	t.Helper()
	files := map[string]string{}
	err := filepath.WalkDir("..", func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || !strings.HasSuffix(path, ".go") {
			return err
		}
		text, err := os.ReadFile(path)
		files[path] = string(text)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return files
}

// The documents name tests, examples and benchmarks that there are, and link to what
// there is.
func TestDocumentsNameWhatExists(t *testing.T) {
	t.Parallel()
	exists := testsAndBenchmarks(t)
	for _, doc := range []string{"README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md"} {
		content, err := os.ReadFile(filepath.Join("..", doc))
		if err != nil {
			t.Fatal(err)
		}
		text := string(content)
		for _, name := range namesIn(text) {
			if !exists[name] {
				t.Errorf("%s names %s, which does not exist", doc, name)
			}
		}
		wantLinks(t, doc, text)
	}
}

// testsAndBenchmarks are the names of all tests, examples and benchmarks.
func testsAndBenchmarks(t *testing.T) map[string]bool {
	t.Helper()
	exists := map[string]bool{}
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
			exists[m[1]] = true
		}
	}
	return exists
}

var (
	docNamed    = regexp.MustCompile("`(?:Test|Example|Benchmark)[A-Z_]\\w+`|benchmarks?(?:(?:,| and)? `\\w+`)+")
	docQuoted   = regexp.MustCompile("`(\\w+)`")
	docLink     = regexp.MustCompile(`\]\(([^)\s]*)\)`)
	docHeading  = regexp.MustCompile("(?m)^#+ (.*)$")
	notInAnchor = regexp.MustCompile(`[^a-z0-9 _-]`)
)

// namesIn returns the tests, examples and benchmarks that a document names.
func namesIn(text string) (names []string) {
	for _, m := range docNamed.FindAllString(text, -1) {
		for _, name := range docQuoted.FindAllStringSubmatch(m, -1) {
			names = append(names, name[1])
		}
	}
	return names
}

// wantLinks fails the test for each link of a document that leads nowhere.
func wantLinks(t *testing.T, doc, text string) {
	t.Helper()
	anchors := map[string]bool{}
	for _, m := range docHeading.FindAllStringSubmatch(text, -1) {
		anchors["#"+strings.ReplaceAll(notInAnchor.ReplaceAllString(strings.ToLower(m[1]), ""), " ", "-")] = true
	}
	for _, m := range docLink.FindAllStringSubmatch(text, -1) {
		switch target := m[1]; {
		case strings.Contains(target, "://"):
		case strings.HasPrefix(target, "#"):
			if !anchors[target] {
				t.Errorf("%s links to its section %s, which does not exist", doc, target)
			}
		default:
			if _, err := os.Stat(filepath.Join("..", target)); err != nil {
				t.Errorf("%s links to %s: %v", doc, target, err)
			}
		}
	}
}

// What the README shows of Go, beside whole programs, stands as it is in a test or an
// example, which compiles and runs.
func TestReadmeSnippetsAreRun(t *testing.T) {
	t.Parallel()
	readme, err := os.ReadFile("../README.md")
	if err != nil {
		t.Fatal(err)
	}
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
	snippets := regexp.MustCompile("(?s)```go\n(.*?)```").FindAllSubmatch(readme, -1)
	for _, m := range snippets {
		snippet := string(m[1])
		if strings.HasPrefix(snippet, "package main\n") {
			continue // TestReadmeProgramsCompile
		}
		found := false
		for _, text := range tests {
			found = found || strings.Contains(text, lines(snippet))
		}
		if !found {
			t.Errorf("in no test or example:\n%s", snippet)
		}
	}
}
