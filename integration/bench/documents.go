package main

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
)

// documents have rows of the table of ratios, between two comments.
var documents = []string{"README.md", "docs/performance.md"}

const (
	beginRows = "<!-- bench:begin -->"
	endRows   = "<!-- bench:end -->"

	keyCells = 3 // workload, measure, against
	docCells = 5 // and a cell for each driver
)

// updateDocuments brings the rows in the documents up to date. root is the repository.
func (r *report) updateDocuments(root string) error {
	ratios, _ := r.tables()
	var errs []error
	for _, name := range documents {
		path := filepath.Join(root, filepath.FromSlash(name))
		text, err := os.ReadFile(path)
		if err == nil {
			err = os.WriteFile(path, []byte(updateRows(string(text), ratios)), 0o644)
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// updateRows returns a document with those of its rows replaced that are in the table. A row that
// is not there stays: it has not been measured this time.
func updateRows(text string, table [][]string) string {
	rows := map[string]string{}
	for _, line := range table {
		var b strings.Builder
		markdownRow(&b, line[:docCells])
		rows[rowKey(b.String())] = b.String()
	}
	var out strings.Builder
	inside := false
	for line := range strings.Lines(text) {
		inside = (inside || strings.HasPrefix(line, beginRows)) && !strings.HasPrefix(line, endRows)
		if row, ok := rows[rowKey(line)]; ok && inside {
			line = row
		}
		out.WriteString(line)
	}
	return out.String()
}

// rowKey is what a row of a table is about.
func rowKey(row string) string {
	cells := strings.Split(row, "|")
	if len(cells) < 1+docCells {
		return ""
	}
	for i := range cells {
		cells[i] = strings.TrimSpace(cells[i])
	}
	return strings.Join(cells[1:1+keyCells], "|")
}
