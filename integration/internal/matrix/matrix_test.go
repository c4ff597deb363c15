//go:build unix

package main

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"io"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/pgadvisory/advisory/integration/internal/pgtest"
)

// script writes a shell script.
func script(t *testing.T, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte("#!/bin/sh\n"+text+"\n"), 0o755); err != nil {
		t.Fatal(err)
	}
}

// fakeServer makes a directory of programs that say to be of a version.
func fakeServer(t *testing.T, version string) (bindir string) {
	t.Helper()
	dir := t.TempDir()
	script(t, filepath.Join(dir, "initdb"), "exit 1")
	script(t, filepath.Join(dir, "postgres"), "echo 'postgres (PostgreSQL) "+version+" (Fake "+version+"-1)'")
	if err := pgtest.CheckBinDir(dir); err != nil {
		t.Skip(err) // a TMPDIR of root's own, for one
	}
	return dir
}

func TestEachVersionIsTested(t *testing.T) {
	t.Setenv(envBin+"101", fakeServer(t, "101.2"))
	t.Setenv(envBin+"102", fakeServer(t, "102beta1"))
	t.Setenv(pgtest.EnvDSN, "postgres://elsewhere")
	var out bytes.Buffer
	err := run([]string{"101", "102", "--", "sh", "-c", `"$ADVISORY_TEST_BINDIR/postgres"; test "$1" = argument || echo "no $1"; ` +
		`test -z "$ADVISORY_TEST_DSN" || echo $ADVISORY_TEST_DSN; case $ADVISORY_TEST_BINDIR in *002) exit 3; esac`, "sh", "argument"}, &out, &out)
	if err == nil || err.Error() != "failed with PostgreSQL 102beta1" {
		t.Errorf("error: %v", err)
	}
	const want = `
=== PostgreSQL 101.2
postgres (PostgreSQL) 101.2 (Fake 101.2-1)

=== PostgreSQL 102beta1
postgres (PostgreSQL) 102beta1 (Fake 102beta1-1)

PostgreSQL 101.2    ok           0s
PostgreSQL 102beta1 FAILED       0s  (exit status 3)
`
	if _, got, _ := strings.Cut(out.String(), "\n\n"); "\n"+got != want {
		t.Errorf("got\n%s\nwant\n%s", out.String(), want)
	}
}

func TestMissingVersionIsKnownBeforeTheTests(t *testing.T) {
	t.Setenv(envBin+"101", fakeServer(t, "101.2"))
	t.Setenv(envBin+"10", fakeServer(t, "101.2"))
	var out bytes.Buffer
	err := run([]string{"101", "102", "10", "--", "echo", "test"}, &out, &out)
	if err == nil || !strings.Contains(err.Error(), "PostgreSQL 102: none is installed") ||
		!strings.Contains(err.Error(), "PostgreSQL 10: "+envBin+"10: ") || !strings.Contains(err.Error(), "is PostgreSQL 101.2") {
		t.Errorf("error: %v", err)
	}
	if strings.Contains(out.String(), "===") {
		t.Errorf("tests were run:\n%s", out.String())
	}
}

// The package has no links in it, and its files may be needed by another user.
func TestPackageIsUnpacked(t *testing.T) {
	tarball := filepath.Join(t.TempDir(), "package.tgz")
	writeTarball(t, tarball, map[string]string{
		"package/package.json":             "{}",
		"package/native/bin/postgres":      "program",
		"package/native/lib/libpq.so.5.18": "library",
		"package/native/pg-symlinks.json":  `[{"source":"native/lib/libpq.so.5.18","target":"native/lib/libpq.so.5"}]`,
	})
	dest := filepath.Join(t.TempDir(), "unpacked")
	if err := unpack(tarball, dest); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]string{"bin/postgres": "program", "lib/libpq.so.5": "library"} {
		got, err := os.ReadFile(filepath.Join(dest, name))
		if err != nil || string(got) != want {
			t.Errorf("%s: %q, %v", name, got, err)
		}
	}
	for name, want := range map[string]os.FileMode{"bin": 0o755, "bin/postgres": 0o755, "lib/libpq.so.5.18": 0o644} {
		info, err := os.Stat(filepath.Join(dest, name))
		if err != nil || info.Mode().Perm() != want {
			t.Errorf("%s: %v, %v", name, info, err)
		}
	}
	if target, err := os.Readlink(filepath.Join(dest, "lib/libpq.so.5")); target != "libpq.so.5.18" {
		t.Errorf("link to %q, %v", target, err)
	}
	if entries, _ := os.ReadDir(dest); len(entries) != 3 {
		t.Errorf("unpacked: %v", entries)
	}
}

func TestPackageStaysInItsDirectory(t *testing.T) {
	for _, files := range []map[string]string{
		{"package/native/../../outside": "file"},
		{"package/native/pg-symlinks.json": `[{"source":"native/x","target":"native/../../outside"}]`},
		{"package/native/pg-symlinks.json": `[{"source":"native/../../outside","target":"native/x"}]`},
	} {
		dir := t.TempDir()
		writeTarball(t, filepath.Join(dir, "package.tgz"), files)
		if err := unpack(filepath.Join(dir, "package.tgz"), filepath.Join(dir, "in", "unpacked")); err == nil {
			t.Errorf("no error for %v", files)
		}
	}
}

func writeTarball(t *testing.T, path string, files map[string]string) {
	t.Helper()
	var b bytes.Buffer
	gz := gzip.NewWriter(&b)
	w := tar.NewWriter(gz)
	for name, content := range files {
		mode := int64(0o600)
		if strings.Contains(name, "/bin/") {
			mode = 0o700
		}
		if err := w.WriteHeader(&tar.Header{Name: name, Mode: mode, Size: int64(len(content)), Typeflag: tar.TypeReg}); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(w, content); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	if err := gz.Close(); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, b.Bytes(), 0o600); err != nil {
		t.Fatal(err)
	}
}

func TestNpmPack(t *testing.T) {
	dir, bin := t.TempDir(), t.TempDir()
	t.Setenv("PATH", bin)
	if _, err := npmPack("it", dir); err == nil || !strings.Contains(err.Error(), "npm, which would fetch it, is not here") {
		t.Errorf("without npm: %v", err)
	}
	npm := filepath.Join(bin, "npm")
	script(t, npm, `test "$1 $2 $3" = "pack it --pack-destination" && : >"$4/it.tgz"`)
	if tarball, err := npmPack("it", dir); err != nil || tarball != filepath.Join(dir, "it.tgz") {
		t.Errorf("%s, %v", tarball, err)
	}
	script(t, npm, "echo no such package; exit 1")
	if _, err := npmPack("it", dir); err == nil || !strings.Contains(err.Error(), "no such package") {
		t.Errorf("npm's error: %v", err)
	}
}

// The versions that are tested by default, here and by the workflow, can be fetched.
func TestVersionsAgree(t *testing.T) {
	want := strings.Join(slices.Sorted(maps.Keys(releases)), " ")
	for file, pattern := range map[string]string{
		"../../../Makefile":                 `(?m)^VERSIONS \?= (.*)$`,
		"../../../.github/workflows/ci.yml": `(?m)^ +postgres: \[(.*)\]$`,
	} {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		match := regexp.MustCompile(pattern).FindSubmatch(text)
		if match == nil {
			t.Errorf("%s: no versions", file)
		} else if got := strings.ReplaceAll(string(match[1]), ",", ""); got != want {
			t.Errorf("%s: versions %s, and releases of %s", file, got, want)
		}
	}
	for v, release := range releases {
		if !strings.HasPrefix(release, v+".") {
			t.Errorf("release for %s: %s", v, release)
		}
	}
}
