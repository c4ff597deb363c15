package integration

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/mod/module"
	"golang.org/x/mod/zip"
)

// The README's "go install" works once the modules are published: they are, here, on a proxy that is a
// directory.
func TestGoInstallAcceptsTheCommand(t *testing.T) {
	t.Parallel()
	proxy := t.TempDir()
	publish(t, proxy, "github.com/pgadvisory/advisory", "..")
	publish(t, proxy, "github.com/pgadvisory/advisory/cmd/advisory", "../cmd/advisory")
	others := goEnv(t, "GOMODCACHE")
	// It resolves and loads everything, and prints what it would build.
	cmd := exec.Command("go", "install", "-n", "github.com/pgadvisory/advisory/cmd/advisory@latest")
	cmd.Dir = t.TempDir()
	cmd.Env = append(os.Environ(),
		"GOPROXY=file://"+proxy+",file://"+filepath.Join(others, "cache", "download")+","+goEnv(t, "GOPROXY"),
		"GOSUMDB=off", "GOPRIVATE=", "GONOPROXY=none", "GOMODCACHE="+t.TempDir(), "GOFLAGS=-modcacherw", "GOWORK=off")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("%v\n%s", err, out)
	}
}

// publish publishes the module in dir as path on a proxy, in the version that the command requires.
func publish(t *testing.T, proxy, path, dir string) {
	t.Helper()
	v := module.Version{Path: path, Version: "v0.1.0"}
	to := filepath.Join(proxy, filepath.FromSlash(path), "@v")
	info, err := json.Marshal(map[string]string{"Version": v.Version, "Time": "2026-01-01T00:00:00Z"})
	require(t, "info", err)
	mod, err := os.ReadFile(filepath.Join(dir, "go.mod"))
	require(t, "go.mod", err)
	require(t, "mkdir", os.MkdirAll(to, 0o700))
	for name, text := range map[string]string{"list": v.Version + "\n", v.Version + ".info": string(info), v.Version + ".mod": string(mod)} {
		require(t, name, os.WriteFile(filepath.Join(to, name), []byte(text), 0o600))
	}
	f, err := os.Create(filepath.Join(to, v.Version+".zip"))
	require(t, "zip", err)
	defer f.Close()
	require(t, "zip", zip.CreateFromDir(f, v, dir))
}

// goEnv returns a setting of the go command.
func goEnv(t *testing.T, name string) string {
	t.Helper()
	out, err := exec.Command("go", "env", name).Output()
	require(t, "go env", err)
	return strings.TrimSpace(string(out))
}
