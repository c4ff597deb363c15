package integration

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
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
