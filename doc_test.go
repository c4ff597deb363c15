package advisory

import (
	"os"
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
