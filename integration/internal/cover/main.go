// Cover reads a coverage profile of one package, prints the share of its statements that
// tests reach, and the blocks that they do not reach, and fails if the share is too low:
//
//	go run ./internal/cover -what "unit tests" -min 90 [-list] -dir .. PROFILE
package main

import (
	"cmp"
	"errors"
	"flag"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
)

func main() {
	what := flag.String("what", "tests", "what the profile is of")
	least := flag.Float64("min", 0, "the least share, in per cent")
	dir := flag.String("dir", ".", "the directory of the package")
	list := flag.Bool("list", false, "list the blocks that are not reached")
	flag.Parse()
	if flag.NArg() != 1 {
		flag.Usage()
		os.Exit(2)
	}
	if err := run(flag.Arg(0), *what, *least, *dir, *list); err != nil {
		fmt.Fprintln(os.Stderr, "cover:", err)
		os.Exit(1)
	}
}

func run(profile, what string, least float64, dir string, list bool) error {
	text, err := os.ReadFile(profile)
	if err != nil {
		return err
	}
	blocks, err := parse(string(text))
	if err != nil {
		return fmt.Errorf("%s: %w", profile, err)
	}
	var missed []block
	total, reached := 0, 0
	for _, b := range blocks {
		total += b.statements
		if b.reached {
			reached += b.statements
		} else {
			missed = append(missed, b)
		}
	}
	if total == 0 {
		return fmt.Errorf("%s: no statements", profile)
	}
	if list {
		sources := sources{dir: dir, files: map[string]*source{}}
		for _, b := range missed {
			s, err := sources.of(b.file)
			if err != nil {
				return err
			}
			fmt.Printf("%-16s %-32s %s\n", b, s.function(b.line), s.text(b))
		}
	}
	share := 100 * float64(reached) / float64(total)
	fmt.Printf("%s: %.1f %% of %d statements, %d blocks not reached\n", what, share, total, len(missed))
	if share < least {
		return fmt.Errorf("%s: %.1f %% is less than %v %%", what, share, least)
	}
	return nil
}

// A block is a run of statements without a branch.
type block struct {
	file                       string // without the package's path
	line, column, endLine, end int
	statements                 int
	reached                    bool
}

// String is where the block is, as other tools say it.
func (b block) String() string {
	if b.endLine > b.line {
		return fmt.Sprintf("%s:%d-%d", b.file, b.line, b.endLine)
	}
	return fmt.Sprintf("%s:%d", b.file, b.line)
}

// parse returns the blocks of a profile, in order. A block may occur in it several times.
func parse(profile string) ([]block, error) {
	header, profile, _ := strings.Cut(profile, "\n")
	if !strings.HasPrefix(header, "mode: ") {
		return nil, errors.New("not a coverage profile")
	}
	merged := map[block]bool{}
	for line := range strings.Lines(profile) {
		// example.com/package/file.go:10.2,12.16 2 1
		name, rest, _ := strings.Cut(strings.TrimSpace(line), ":")
		b := block{file: path.Base(name)}
		if _, inside, ok := strings.Cut(name, "/internal/"); ok {
			b.file = "internal/" + inside
		}
		count := 0
		if _, err := fmt.Sscanf(rest, "%d.%d,%d.%d %d %d", &b.line, &b.column, &b.endLine, &b.end, &b.statements, &count); err != nil {
			return nil, fmt.Errorf("%q: %w", line, err)
		}
		merged[b] = merged[b] || count > 0
	}
	var blocks []block
	for b, reached := range merged {
		b.reached = reached
		blocks = append(blocks, b)
	}
	slices.SortFunc(blocks, func(a, b block) int {
		return cmp.Or(cmp.Compare(a.file, b.file), cmp.Compare(a.line, b.line), cmp.Compare(a.column, b.column))
	})
	return blocks, nil
}

// sources are the files of the package.
type sources struct {
	dir   string
	files map[string]*source
}

type source struct {
	lines     []string
	functions []function
}

type function struct {
	name        string
	first, last int
}

func (s sources) of(name string) (*source, error) {
	if f := s.files[name]; f != nil {
		return f, nil
	}
	file := filepath.Join(s.dir, name)
	text, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	positions := token.NewFileSet()
	tree, err := parser.ParseFile(positions, file, text, 0)
	if err != nil {
		return nil, err
	}
	f := &source{lines: strings.Split(string(text), "\n")}
	for _, d := range tree.Decls {
		if d, ok := d.(*ast.FuncDecl); ok {
			f.functions = append(f.functions, function{
				name:  nameOf(d),
				first: positions.Position(d.Pos()).Line,
				last:  positions.Position(d.End()).Line,
			})
		}
	}
	s.files[name] = f
	return f, nil
}

// nameOf is the name of a function or method, such as (*Lock).Release.
func nameOf(d *ast.FuncDecl) string {
	if d.Recv == nil {
		return d.Name.Name
	}
	receiver := d.Recv.List[0].Type
	format := "%s.%s"
	if star, ok := receiver.(*ast.StarExpr); ok {
		receiver, format = star.X, "(*%s).%s"
	}
	// A generic type's parameters do not matter here.
	switch generic := receiver.(type) {
	case *ast.IndexExpr:
		receiver = generic.X
	case *ast.IndexListExpr:
		receiver = generic.X
	}
	if id, ok := receiver.(*ast.Ident); ok {
		return fmt.Sprintf(format, id.Name, d.Name.Name)
	}
	return d.Name.Name
}

// function returns the name of the function that the line is in.
func (s *source) function(line int) string {
	for _, f := range s.functions {
		if f.first <= line && line <= f.last {
			return f.name
		}
	}
	return ""
}

// text returns the block's source in one line, and what leads to it.
func (s *source) text(b block) string {
	lines := slices.Clone(s.lines[b.line-1 : b.endLine])
	for i, line := range lines {
		if i == len(lines)-1 && b.endLine > b.line {
			line = line[:min(b.end-1, len(line))]
		}
		lines[i] = strings.TrimSpace(line)
	}
	text := strings.Join(slices.DeleteFunc(lines, func(line string) bool {
		return line == "" || line == "}" || strings.HasPrefix(line, "//")
	}), " ")
	const most = 100
	if runes := []rune(text); len(runes) > most {
		text = string(runes[:most]) + "…"
	}
	return text
}
