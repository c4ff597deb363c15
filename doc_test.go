package advisory

import (
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// The table of options in the package's documentation says what the functions take.
func TestTableOfOptionsIsWhatTheFunctionsTake(t *testing.T) {
	t.Parallel()
	source, err := os.ReadFile("doc.go")
	if err != nil {
		t.Fatal(err)
	}
	takes := map[string]optionSet{
		"WithLock": sessionOptions, "WithLocks": sessionOptions, "Acquire": sessionOptions, "Lead": leadOptions,
		"WithConnLock": withConnOptions, "WithTxLock": txOptions, "AcquireConn": acquireOptions, "AcquireTx": acquireOptions,
		"ReleaseConn": releaseConnOptions, "NewSessionLocker": acquireOptions,
	}
	head := regexp.MustCompile(`(?m)^//\t +(Shared .*)$`).FindSubmatch(source)
	if head == nil {
		t.Fatal("no table")
	}
	columns := strings.Fields(string(head[1]))
	if len(columns) != len(optionNames) {
		t.Errorf("columns %v, want %v", columns, optionNames)
	}
	for function, options := range takes {
		row := regexp.MustCompile(`(?m)^//\t` + function + ` +(.*)$`).FindSubmatch(source)
		if row == nil {
			t.Errorf("no row of %s", function)
			continue
		}
		cells := strings.Fields(string(row[1]))
		for i, name := range optionNames {
			if j := slices.Index(columns, name); j < 0 || j >= len(cells) || (cells[j] != "-") != options.has(1<<i) {
				t.Errorf("%s: the table is wrong about %s", function, name)
			}
		}
	}
}

// What the Logger is told, the operators' page explains.
func TestEveryLineOfTheLoggerIsExplained(t *testing.T) {
	t.Parallel()
	page, err := os.ReadFile("docs/operating.md")
	if err != nil {
		t.Fatal(err)
	}
	explained := func(line string) bool {
		before, _, cut := strings.Cut(line, ", ")
		return strings.Contains(string(page), "`"+line+"`") || cut && strings.Contains(string(page), "`"+before+", …`")
	}
	lines := 0
	for _, pattern := range []string{"*.go", "internal/*/*.go"} {
		files, err := filepath.Glob(pattern)
		if err != nil {
			t.Fatal(err)
		}
		for _, file := range files {
			if strings.HasSuffix(file, "_test.go") {
				continue
			}
			source, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			for _, m := range regexp.MustCompile(`(?:\.(?:Warn|Info|Error)|noteFact)\([^"\n]*"(advisory: [^"]*)"`).FindAllSubmatch(source, -1) {
				if lines++; !explained(string(m[1])) {
					t.Errorf("%s: docs/operating.md does not explain %q", file, m[1])
				}
			}
		}
	}
	if lines < 15 {
		t.Errorf("%d lines found", lines)
	}
}

// What CONTRIBUTING.md calls by a name is called so in the code, or in what runs its tests.
func TestTheNamesInContributingAreThoseOfTheCode(t *testing.T) {
	t.Parallel()
	words, word := map[string]bool{}, regexp.MustCompile(`\w+`)
	err := filepath.WalkDir(".", func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || filepath.Ext(path) != ".go" && filepath.Dir(path) != ".ci" && path != "Makefile" {
			return err
		}
		words[d.Name()] = true
		source, err := os.ReadFile(path)
		for _, w := range word.FindAllString(string(source), -1) {
			words[w] = true
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	page, err := os.ReadFile("CONTRIBUTING.md")
	if err != nil {
		t.Fatal(err)
	}
	names := regexp.MustCompile("`([A-Za-z_]*[a-z][\\w.]*)`").FindAllStringSubmatch(string(page), -1)
	for _, name := range names {
		for _, part := range strings.Split(name[1], ".") {
			if !words[name[1]] && !words[part] {
				t.Errorf("no code has %s", name[1])
			}
		}
	}
	if len(names) < 200 {
		t.Errorf("%d names", len(names))
	}
}
