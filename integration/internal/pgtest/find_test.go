//go:build unix

package pgtest

import (
	"archive/zip"
	"bytes"
	"context"
	"errors"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	embeddedpostgres "github.com/fergusstrange/embedded-postgres"
)

// bare is a machine without PostgreSQL.
func bare() machine {
	return machine{
		getenv:   func(string) string { return "" },
		lookPath: func(string) (string, error) { return "", exec.ErrNotFound },
		glob:     func(string) ([]string, error) { return nil, nil },
		download: func(context.Context, *sandbox) (string, error) { return "", errors.New("no network") },
	}
}

func TestNoBinaries(t *testing.T) {
	_, err := findBinaries(t.Context(), newTestSandbox(t), bare())
	if !errors.Is(err, ErrNoServer) {
		t.Errorf("%v, want ErrNoServer", err)
	}
	for _, want := range []string{EnvDSN, EnvBinDir, "apt-get install postgresql", "download", "no network"} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("no %q in: %v", want, err)
		}
	}
}

func TestFindBinaries(t *testing.T) {
	box := newTestSandbox(t)
	// What is in the sandbox is not looked at: it only has to be executable.
	install := func(dir string, names ...string) string {
		dir = filepath.Join(box.dir, dir)
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		for _, name := range names {
			if err := os.WriteFile(filepath.Join(dir, name), nil, 0o755); err != nil {
				t.Fatal(err)
			}
		}
		return dir
	}
	find := func(m machine, want string) {
		t.Helper()
		if got, err := findBinaries(t.Context(), box, m); err != nil || got != want {
			t.Errorf("%s, %v; want %s", got, err, want)
		}
	}
	v9, v16 := install("9.6", "initdb", "postgres"), install("16", "initdb", "postgres")
	clients := install("17", "psql")

	m := bare()
	m.glob = func(pattern string) ([]string, error) {
		if pattern != "/usr/lib/postgresql/*/bin" {
			return nil, nil
		}
		return []string{v16, clients, v9}, nil
	}
	find(m, v16)

	links := install("links")
	if err := os.Symlink(filepath.Join(v9, "postgres"), filepath.Join(links, "postgres")); err != nil {
		t.Fatal(err)
	}
	m.lookPath = func(name string) (string, error) {
		if name != "postgres" {
			return "", exec.ErrNotFound
		}
		return filepath.Join(links, name), nil
	}
	find(m, v9)

	m.getenv = func(name string) string {
		if name != EnvBinDir {
			return ""
		}
		return clients
	}
	if dir, err := findBinaries(t.Context(), box, m); err == nil || !strings.Contains(err.Error(), EnvBinDir) {
		t.Errorf("%s, %v; want an error", dir, err)
	}
}

// The download is tried with an archive of this machine's own programs.
func TestDownload(t *testing.T) {
	box := newTestSandbox(t)
	m := machine{download: bare().download}
	bindir, err := findBinaries(t.Context(), box, m)
	if err != nil {
		t.Skip(err)
	}
	jar := makeJar(t, bindir)
	var requests int
	repository := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		requests++
		if !strings.HasSuffix(r.URL.Path, ".jar") {
			http.NotFound(w, r)
			return
		}
		w.Write(jar)
	}))
	defer repository.Close()
	cache := filepath.Join(box.dir, "cache")
	// The library does not remove its log.
	t.Setenv("TMPDIR", t.TempDir())
	cfg := embeddedpostgres.DefaultConfig().BinaryRepositoryURL(repository.URL)
	for range 2 {
		got, err := download(t.Context(), box, cache, cfg)
		if err != nil {
			t.Fatal(err)
		}
		if err := usable(box, got); err != nil {
			t.Error(err)
		}
		if leftovers, _ := filepath.Glob(filepath.Join(filepath.Dir(filepath.Dir(got)), "download-*")); leftovers != nil {
			t.Error(leftovers)
		}
	}
	if requests != 2 {
		t.Errorf("%d requests, want one for the archive and one for its checksum", requests)
	}

	hung := make(chan struct{})
	repository.Config.Handler = http.HandlerFunc(func(http.ResponseWriter, *http.Request) { <-hung })
	defer close(hung)
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if _, err := download(ctx, box, cache+"2", cfg); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("download that hangs: %v", err)
	}
}

// makeJar returns an archive such as embedded-postgres downloads: a .jar with
// a .txz in it.
func makeJar(t *testing.T, bindir string) []byte {
	t.Helper()
	for _, name := range []string{"tar", "xz"} {
		if _, err := exec.LookPath(name); err != nil {
			t.Skip(err)
		}
	}
	dir := t.TempDir()
	if err := os.Mkdir(filepath.Join(dir, "bin"), 0o755); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"initdb", "pg_ctl", "postgres"} {
		if err := os.WriteFile(filepath.Join(dir, "bin", name), []byte("#!"+filepath.Join(bindir, name)), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	txz, err := exec.Command("tar", "-C", dir, "-cJf", "-", "bin").Output()
	if err != nil {
		t.Fatal(err)
	}
	var jar bytes.Buffer
	w := zip.NewWriter(&jar)
	f, err := w.Create("postgres.txz")
	if err == nil {
		_, err = f.Write(txz)
	}
	if err == nil {
		err = w.Close()
	}
	if err != nil {
		t.Fatal(err)
	}
	return jar.Bytes()
}
