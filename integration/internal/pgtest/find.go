package pgtest

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	embeddedpostgres "github.com/fergusstrange/embedded-postgres"
)

// downloadTimeout bounds the download of PostgreSQL's programs.
const downloadTimeout = 2 * time.Minute

// A machine is where findBinaries looks. The zero machine is this one; tests
// replace parts of it.
type machine struct {
	getenv   func(string) string
	lookPath func(string) (string, error)
	glob     func(string) ([]string, error)
	download func(context.Context, *sandbox) (string, error)
}

func (m *machine) setDefaults() {
	if m.getenv == nil {
		m.getenv = os.Getenv
	}
	if m.lookPath == nil {
		m.lookPath = exec.LookPath
	}
	if m.glob == nil {
		m.glob = filepath.Glob
	}
	if m.download == nil {
		m.download = func(ctx context.Context, box *sandbox) (string, error) {
			return download(ctx, box, cacheDir(), embeddedpostgres.DefaultConfig())
		}
	}
}

// findBinaries returns the directory that holds initdb and postgres.
func findBinaries(ctx context.Context, box *sandbox, m machine) (string, error) {
	m.setDefaults()
	if dir := m.getenv(EnvBinDir); dir != "" {
		if err := usable(box, dir); err != nil {
			return "", fmt.Errorf("pgtest: %s: %w", EnvBinDir, err)
		}
		return dir, nil
	}
	for _, dir := range m.candidates(ctx) {
		if usable(box, dir) == nil {
			return dir, nil
		}
	}
	dir, err := m.download(ctx, box)
	if err == nil {
		err = usable(box, dir)
	}
	if err != nil {
		return "", fmt.Errorf("%w: download: %w\n%s", ErrNoServer, err, Help)
	}
	return dir, nil
}

// usable returns an error unless dir holds programs that may run in the
// sandbox.
func usable(box *sandbox, dir string) error {
	for _, name := range []string{"initdb", "postgres"} {
		if err := box.canExec(filepath.Join(dir, name)); err != nil {
			return err
		}
	}
	return nil
}

// CheckBinDir returns an error unless dir holds the programs of a server that
// [Start] could run, which as root is done as another user.
func CheckBinDir(dir string) error {
	box, err := newSandbox()
	if err != nil {
		return err
	}
	return errors.Join(usable(box, dir), box.close())
}

// candidates lists the directories that may hold a PostgreSQL, best first.
func (m *machine) candidates(ctx context.Context) []string {
	var dirs []string
	if path, err := m.lookPath("pg_config"); err == nil {
		if out, err := exec.CommandContext(ctx, path, "--bindir").Output(); err == nil {
			dirs = append(dirs, strings.TrimSpace(string(out)))
		}
	}
	for _, name := range []string{"postgres", "initdb"} {
		if path, err := m.lookPath(name); err == nil {
			// Systems that put a link here do not always put one to each
			// program, and the programs look for their files relative to
			// where they really are.
			if path, err := filepath.EvalSymlinks(path); err == nil {
				dirs = append(dirs, filepath.Dir(path))
			}
		}
	}
	for _, pattern := range []string{
		"/usr/lib/postgresql/*/bin", // Debian
		"/usr/pgsql-*/bin",          // Red Hat, PostgreSQL's own packages
		"/usr/libexec/postgresql*",  // Alpine
		"/opt/homebrew/opt/postgresql*/bin",
		"/usr/local/opt/postgresql*/bin", // Homebrew on Intel
		"/Applications/Postgres.app/Contents/Versions/*/bin",
	} {
		found, err := m.glob(pattern)
		if err != nil {
			continue
		}
		slices.SortStableFunc(found, func(a, b string) int {
			return cmp.Compare(versionIn(b), versionIn(a))
		})
		dirs = append(dirs, found...)
	}
	return dirs
}

var versionPattern = regexp.MustCompile(`\d+(\.\d+)?`)

// versionIn returns the version number in the name of a directory.
func versionIn(dir string) float64 {
	v, _ := strconv.ParseFloat(versionPattern.FindString(dir), 64)
	return v
}

// download gets PostgreSQL's programs by way of embedded-postgres, and returns
// their directory. They are kept in the directory cache, provided that the
// sandbox can read them there.
func download(ctx context.Context, box *sandbox, cache string, cfg embeddedpostgres.Config) (string, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, downloadTimeout, errors.New("the download takes too long"))
	defer cancel()

	home := box.dir
	if cache != "" && os.MkdirAll(cache, 0o755) == nil && box.canExec(cache) == nil {
		home = cache
	}
	dest := filepath.Join(home, "postgresql-"+string(embeddedpostgres.V18))
	bindir := filepath.Join(dest, "bin")
	if usable(box, bindir) == nil {
		return bindir, nil
	}

	done := make(chan error, 1)
	// The library's download knows no context and no timeout.
	go func() { done <- unpack(cfg, home, dest) }()
	select {
	case err := <-done:
		return bindir, err
	case <-ctx.Done():
		return "", context.Cause(ctx)
	}
}

// CacheDir makes and returns the directory in which downloaded programs are kept:
// in the user's cache directory, or for root, whose servers run as another user,
// in /var/cache.
func CacheDir() (string, error) {
	dir := cacheDir()
	if dir == "" {
		return "", errors.New("pgtest: this user has no cache directory")
	}
	err := os.MkdirAll(dir, 0o755)
	if err == nil && os.Geteuid() == 0 {
		err = os.Chmod(dir, 0o755) // whatever the umask
	}
	return dir, err
}

// cacheDir returns the directory for the programs, "" if there is none. Root's
// own cache is usually closed to the user that the servers run as.
func cacheDir() string {
	dir := "/var/cache"
	if os.Geteuid() != 0 {
		var err error
		if dir, err = os.UserCacheDir(); err != nil {
			return ""
		}
	}
	return filepath.Join(dir, "advisory-pgtest")
}

// unpack downloads and unpacks PostgreSQL's programs into dest, which appears
// all at once. home is dest's parent directory.
func unpack(cfg embeddedpostgres.Config, home, dest string) error {
	tmp, err := os.MkdirTemp(home, "download-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(tmp)
	if err := os.Chmod(tmp, 0o755); err != nil {
		return err
	}
	unpacked := filepath.Join(tmp, "postgresql")
	// The library runs servers, too, but not as root. Only its download is
	// wanted here, so what follows that is made to fail: no directory has a
	// NUL in its name.
	err = embeddedpostgres.NewDatabase(cfg.
		Version(embeddedpostgres.V18).
		Port(0).
		CachePath(tmp).
		RuntimePath(filepath.Join(tmp, "runtime")).
		BinariesPath(unpacked).
		DataPath("\x00").
		Logger(io.Discard)).Start()
	if _, statErr := os.Stat(filepath.Join(unpacked, "bin", "postgres")); statErr != nil {
		return cmp.Or(err, statErr)
	}
	if err := os.Rename(unpacked, dest); err != nil {
		// Another process may have been faster.
		if _, statErr := os.Stat(dest); statErr != nil {
			return err
		}
	}
	return nil
}
