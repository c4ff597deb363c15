//go:build unix

package main

import (
	"bufio"
	"bytes"
	"context"
	"database/sql"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/pgadvisory/advisory/integration/internal/pgtest"
)

// A demo is the program and a server for it.
type demo struct {
	exe  string
	temp string // its directory for temporary files
	dsn  string
	db   *sql.DB
}

func newDemo(t *testing.T) *demo {
	t.Helper()
	d := &demo{exe: build(t), temp: t.TempDir()}
	server, err := pgtest.Start(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := server.Stop(); err != nil {
			t.Error(err)
		}
	})
	d.dsn = server.DSN()
	if d.db, err = sql.Open("pgx", d.dsn); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.db.Close() })
	return d
}

func build(t *testing.T) (exe string) {
	t.Helper()
	exe = filepath.Join(t.TempDir(), "demo")
	if out, err := exec.Command("go", "build", "-o", exe, ".").CombinedOutput(); err != nil {
		t.Fatalf("go build: %v\n%s", err, out)
	}
	return exe
}

// command is the demo with the workers in its process group.
func (d *demo) command(args ...string) *exec.Cmd {
	cmd := exec.Command(d.exe, args...)
	cmd.Env = append(os.Environ(), pgtest.EnvDSN+"="+d.dsn, "TMPDIR="+d.temp, "GOTMPDIR=")
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	return cmd
}

// noProcessIsLeft fails the test unless the demo and its workers end within the
// time. The demo has been waited for.
func noProcessIsLeft(t *testing.T, cmd *exec.Cmd, within time.Duration) {
	t.Helper()
	for end := time.Now().Add(within); ; time.Sleep(10 * time.Millisecond) {
		err := syscall.Kill(-cmd.Process.Pid, 0)
		if errors.Is(err, syscall.ESRCH) {
			return
		}
		if time.Now().After(end) {
			t.Errorf("workers are left %v after the demo (%v)", within, err)
			_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL)
			return
		}
	}
}

// The names are those that the demo gives to its schema and its sessions.
const (
	schemas  = `SELECT nspname FROM pg_namespace WHERE nspname LIKE 'advisory\_demo\_%'`
	sessions = `SELECT pid::text FROM pg_stat_activity WHERE application_name LIKE 'advisory\_demo\_%'`
)

func (d *demo) query(t *testing.T, query string) (answer []string) {
	t.Helper()
	rows, err := d.db.QueryContext(context.WithoutCancel(t.Context()), query)
	if err != nil {
		t.Fatal(err)
	}
	defer rows.Close()
	for rows.Next() {
		var s string
		if err := rows.Scan(&s); err != nil {
			t.Fatal(err)
		}
		answer = append(answer, s)
	}
	if err := rows.Err(); err != nil {
		t.Fatal(err)
	}
	return answer
}

// tools returns the directories that the demo has made for the command advisory.
func (d *demo) tools(t *testing.T) []string {
	t.Helper()
	dirs, err := filepath.Glob(filepath.Join(d.temp, "advisory-demo-*"))
	if err != nil {
		t.Fatal(err)
	}
	return dirs
}

// nothingIsLeft fails the test unless the server, and the directory for temporary files, are as they were
// before the demo.
func (d *demo) nothingIsLeft(t *testing.T) {
	t.Helper()
	if left := d.tools(t); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
	if left := d.query(t, schemas); len(left) > 0 {
		t.Errorf("left on the server: schemas %v", left)
	}
	// A session ends a moment after its connection.
	for end := time.Now().Add(5 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		left := d.query(t, sessions)
		if len(left) == 0 {
			return
		}
		if time.Now().After(end) {
			t.Errorf("left on the server: sessions %v", left)
			return
		}
	}
}

func TestDemo(t *testing.T) {
	d := newDemo(t)
	t.Run("keeps its promises", d.testKeepsPromises)
	// Without their locks, the acts must break their promises, or they would prove
	// nothing.
	t.Run("notices broken locks", d.testNoticesBrokenLocks)
	t.Run("ends in time", d.testEndsInTime)
	// Both come while the workers are at work.
	for _, sig := range []syscall.Signal{syscall.SIGINT, syscall.SIGKILL} {
		t.Run("leaves nothing behind after "+sig.String(), func(t *testing.T) { d.testLeavesNothingBehind(t, sig) })
	}
}

func (d *demo) testKeepsPromises(t *testing.T) {
	cmd := d.command("-updates=300", "-rows=50000", "-holder-timeout=2s")
	out, err := cmd.CombinedOutput()
	noProcessIsLeft(t, cmd, 0)
	d.nothingIsLeft(t)
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	wantOutput(t, out,
		"kept    WithLock: no update is lost\n          0 of 300 lost, ",
		"kept    WithConnLock: one migrates, the others find it done\n          process ",
		" applied 4, in ",
		"found applied by ",
		"(lib/pq)",
		"kept    WithConnLock: no deadlock with the index build\n          0 deadlocks\n",
		"kept    CREATE INDEX CONCURRENTLY leaves a valid index\n          50,000 rows\n",
		"kept    Lead: a job has one leader at a time\n",
		" 0 beside another\n",
		"kept    Lead: a killed leader is followed at once\n",
		"webhooks after ",
		"kept    Lead: a frozen leader is followed after HolderTimeout\n",
		"HolderTimeout (2.0 s) counts from its last heartbeat before that\n",
		"the frozen one knows ",
		"kept    Lead: every job is done, each piece once\n          400 tokens, 400 webhooks, 200 stock, 300 search\n",
		"kept    no webhook is taken twice\n          400 of 400 taken\n",
		" sent again, and known by the idempotency key\n",
		"Act 4: the command, for shells and crontabs\n",
		"4 at once: 1 ran it, 3 ended with exit status 75\n",
		"  KEY          MODE       STATE  PID\n",
		"  exclusive  holds  ",
		"\n               exclusive  waits  ",
		"kept    advisory run: of many at once, one runs its command\n",
		"kept    advisory run: one that is killed is followed, its command dead\n",
		"11 of 11 promises kept, in ",
	)
	if bytes.ContainsAny(out, "\r\x1b") {
		t.Error("control characters in output that is not for a terminal")
	}
	for line := range strings.Lines(string(out)) {
		if utf8.RuneCountInString(line) > 81 { // with its end
			t.Errorf("more than 80 columns: %s", line)
		}
	}
	if t.Failed() {
		t.Logf("the output:\n%s", out)
	}
}

func wantOutput(t *testing.T, out []byte, wants ...string) {
	t.Helper()
	for _, want := range wants {
		if !strings.Contains(string(out), want) {
			t.Errorf("no %q in the output", want)
		}
	}
}

func (d *demo) testNoticesBrokenLocks(t *testing.T) {
	cmd := d.command("-updates=1000", "-rows=50000", "-holder-timeout=1s")
	cmd.Env = append(cmd.Env, breakEnv+"=1")
	out, err := cmd.CombinedOutput()
	noProcessIsLeft(t, cmd, 0)
	d.nothingIsLeft(t)
	if status := cmd.ProcessState.ExitCode(); status != 1 {
		t.Errorf("exit status %d (%v), want 1", status, err)
	}
	wantOutput(t, out,
		"BROKEN  WithLock: no update is lost\n",
		"BROKEN  WithConnLock: one migrates, the others find it done\n",
		"BROKEN  Lead: a job has one leader at a time\n",
		"BROKEN  no webhook is taken twice\n",
		"BROKEN  advisory run: of many at once, one runs its command\n",
		errBroken.Error(),
	)
	if t.Failed() {
		t.Logf("the output:\n%s", out)
	}
}

func (d *demo) testEndsInTime(t *testing.T) {
	cmd := d.command("-updates=1000000", "-timeout=500ms")
	start := time.Now()
	out, _ := cmd.CombinedOutput()
	took := time.Since(start)
	noProcessIsLeft(t, cmd, 0)
	d.nothingIsLeft(t)
	if status := cmd.ProcessState.ExitCode(); status != 1 || !strings.Contains(string(out), "not done within 500ms") {
		t.Errorf("exit status %d, want 1; the output:\n%s", status, out)
	}
	if took > 10*time.Second {
		t.Errorf("took %v", took)
	}
}

func (d *demo) testLeavesNothingBehind(t *testing.T, sig syscall.Signal) {
	// The acts would go on for long.
	cmd := d.command("-updates=1000000")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	for end := time.Now().Add(20 * time.Second); len(d.query(t, sessions)) < 4; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Error("the workers do not begin")
			break
		}
	}
	// A terminal sends Ctrl-C to the workers, too.
	to := cmd.Process.Pid
	if sig == syscall.SIGINT {
		to = -to
	}
	if err := syscall.Kill(to, sig); err != nil {
		t.Error(err)
	}
	if err := cmd.Wait(); err == nil {
		t.Error("exit status 0")
	}
	if sig == syscall.SIGKILL {
		noProcessIsLeft(t, cmd, 5*time.Second)
		d.sweep(t)
	}
	noProcessIsLeft(t, cmd, 0)
	d.nothingIsLeft(t)
}

// sweep removes what a demo that was killed has left: its schema, and the command advisory. That is the
// price of a SIGKILL.
func (d *demo) sweep(t *testing.T) {
	t.Helper()
	for _, dir := range d.tools(t) {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	}
	for _, schema := range d.query(t, schemas) {
		d.query(t, "DROP SCHEMA "+schema+" CASCADE")
	}
}

// A frozen process does not notice that it is to end.
func TestDemoLeavesNoFrozenProcessBehind(t *testing.T) {
	d := newDemo(t)
	for _, sig := range []syscall.Signal{syscall.SIGINT, syscall.SIGKILL} {
		t.Run(sig.String(), func(t *testing.T) { d.testLeavesNoFrozenProcess(t, sig) })
	}
}

func (d *demo) testLeavesNoFrozenProcess(t *testing.T, sig syscall.Signal) {
	cmd := d.command("-updates=1", "-rows=1", "-holder-timeout=3s")
	// The killed demo's workers have it open, too, for a moment.
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	frozen := false
	for lines := bufio.NewScanner(out); !frozen && lines.Scan(); {
		frozen = strings.Contains(lines.Text(), "is frozen")
	}
	if !frozen {
		t.Error("no process is frozen")
	}
	if err := cmd.Process.Signal(sig); err != nil {
		t.Error(err)
	}
	_, _ = io.Copy(io.Discard, out)
	if err := cmd.Wait(); err == nil {
		t.Error("exit status 0")
	}
	noProcessIsLeft(t, cmd, 5*time.Second)
	if sig == syscall.SIGKILL {
		d.sweep(t)
	}
	d.nothingIsLeft(t)
}

func TestDemoWithoutServer(t *testing.T) {
	// Nobody listens on port 1.
	d := &demo{exe: build(t), temp: t.TempDir(), dsn: "postgres://postgres@127.0.0.1:1/postgres?sslmode=disable"}
	cmd := d.command()
	out, err := cmd.CombinedOutput()
	_, failure, _ := strings.Cut(string(out), "\n") // the first line says what it waits for
	if cmd.ProcessState.ExitCode() != 1 || !strings.HasPrefix(failure, "demo: "+pgtest.EnvDSN+": ") || strings.Count(failure, "\n") != 3 {
		t.Errorf("%v, want exit status 1 and three lines, the failure first; the output:\n%s", err, out)
	}
}

func TestBar(t *testing.T) {
	var out bytes.Buffer
	v := &view{w: &out, terminal: true}
	b := v.bar("counting", 1000)
	b.set(500, "5/s")
	b.set(501, "5/s") // too soon to be seen
	b.finish("done")
	want := "\r\x1b[K  counting          ━━━━━━━━━━━━╌╌╌╌╌╌╌╌╌╌╌╌  5/s" +
		"\r\x1b[K  counting          ━━━━━━━━━━━━━━━━━━━━━━━━  done\n"
	if got := out.String(); got != want {
		t.Errorf("got  %q\nwant %q", got, want)
	}
}

func TestRowsOfALock(t *testing.T) {
	const table = `KEY   MODE       STATE  PID   USER
five  exclusive  holds  1001  postgres
four  exclusive  holds  7     postgres
      exclusive  waits  8     postgres
fow   shared     holds  9     postgres
      shared     holds  9     postgres
`
	for lock, want := range map[string]string{
		"four": "KEY   MODE       STATE  PID\nfour  exclusive  holds  7\n      exclusive  waits  8",
		"five": "KEY   MODE       STATE  PID\nfive  exclusive  holds  1001",
		"fo":   "KEY   MODE       STATE  PID",
	} {
		if got := strings.Join(rowsOf(table, lock), "\n"); got != want {
			t.Errorf("%s: got\n%s\nwant\n%s", lock, got, want)
		}
	}
	if got := rowsOf("no advisory lock is held or waited for\n", "four"); len(got) > 0 {
		t.Errorf("got %q", got)
	}
}

func TestNumbers(t *testing.T) {
	for _, test := range []struct{ got, want string }{
		{thousands(0), "0"},
		{thousands(999), "999"},
		{thousands(1000), "1,000"},
		{thousands(-123456), "-123,456"},
		{thousands(1234567), "1,234,567"},
		{rate(7, time.Second), "7/s"},
		{rate(1234, time.Second), "1,230/s"},
		{rate(375_432, time.Second), "375,000/s"},
		{rate(3, 0), "3,000/s"},
		{plural(1, "process"), "1 process"},
		{plural(2000, "process"), "2,000 processes"},
		{plural(2, "row"), "2 rows"},
		{list(nil), "none"},
		{list([]int{3}), "3"},
		{list([]int{1, 2, 4}), "1, 2 and 4"},
	} {
		if test.got != test.want {
			t.Errorf("got %q, want %q", test.got, test.want)
		}
	}
}
