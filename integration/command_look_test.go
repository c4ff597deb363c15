//go:build unix

package integration

import (
	"bytes"
	"encoding/json"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/creack/pty"

	"github.com/pgadvisory/advisory"
)

// output runs the command advisory, and returns what it prints.
func output(t testing.TB, dsn string, args ...string) string {
	t.Helper()
	cmd := advisoryCmd(t, dsn, args...)
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%v: %v", args, err)
	}
	return string(out)
}

func TestCommandListsLocks(t *testing.T) {
	dsn := watchLog(t, inDatabase(t))
	holder := startAdvisory(t, dsn, "run", "--heartbeat", "500ms", "list-one", "list-two", "--", "sh", "-c", "echo ready; cat")
	holder.wantLine("ready")
	waiter := startAdvisory(t, dsn, "run", "list-one", "--", "true")
	type row struct {
		Key, SQL, Mode, State, Application string
		PID                                int
	}
	var rows []row
	waitFor(t, "three rows, with the names that a heartbeat tells", func() (bool, error) {
		listed := output(t, dsn, "ls", "--json")
		err := json.Unmarshal([]byte(listed), &rows)
		return len(rows) == 3 && !strings.Contains(listed, `"bigint`), err
	})
	states := map[string]int{}
	for _, r := range rows {
		states[r.Key+" "+r.Mode+" "+r.State]++
		if r.PID == 0 || r.SQL != advisory.Name(r.Key).SQL() {
			t.Errorf("%+v", r)
		}
	}
	for _, want := range []string{"list-one exclusive holds", "list-two exclusive holds", "list-one exclusive waits"} {
		if states[want] != 1 {
			t.Errorf("%v, want one %q", states, want)
		}
	}
	if table := output(t, dsn, "ls"); strings.Count(table, "\n") != 4 || !strings.Contains(table, "list-two") {
		t.Errorf("ls prints\n%s", table)
	}
	if table := output(t, dsn, "holders", "list-two"); strings.Count(table, "\n") != 2 {
		t.Errorf("holders prints\n%s", table)
	}

	allowLog(t, terminated)
	cmd := advisoryCmd(t, dsn, "break", "list-two")
	if out, err := cmd.CombinedOutput(); err == nil || !strings.Contains(string(out), "--yes") {
		t.Errorf("break without a terminal and without --yes: %v, %s", err, out)
	}
	if told := output(t, dsn, "break", "--yes", "list-two"); !strings.Contains(told, "also holds: list-one") || !strings.Contains(told, "is ended") {
		t.Errorf("break says\n%s", told)
	}
	holder.wantStatus(70)
	waiter.wantStatus(0)
	if told := output(t, dsn, "break", "--yes", "list-two"); told != "list-two is free\n" {
		t.Errorf("break of a free lock says %q", told)
	}
}

// A terminal is one in which the command advisory runs.
type terminalRun struct {
	t    testing.TB
	cmd  *exec.Cmd
	keys io.Writer
	mu   sync.Mutex
	text bytes.Buffer
	done chan struct{}
}

// inTerminal starts the command advisory in a terminal of its own.
func inTerminal(t testing.TB, args ...string) *terminalRun {
	t.Helper()
	r := &terminalRun{t: t, cmd: advisoryCmd(t, advisoryDSN(t), args...), done: make(chan struct{})}
	tty, err := pty.Start(r.cmd)
	if err != nil {
		t.Fatal(err)
	}
	r.keys = tty
	go func() {
		b := make([]byte, 1024)
		for {
			n, err := tty.Read(b)
			r.mu.Lock()
			r.text.Write(b[:n])
			r.mu.Unlock()
			if err != nil {
				return
			}
		}
	}()
	go func() {
		defer close(r.done)
		_ = r.cmd.Wait()
	}()
	t.Cleanup(func() {
		_ = r.cmd.Process.Signal(syscall.SIGTERM)
		select {
		case <-r.done:
		case <-time.After(2 * time.Second):
			_ = r.cmd.Process.Kill()
			<-r.done
		}
		tty.Close()
	})
	return r
}

// needInterrupt skips a test in which Ctrl-C is to end what leaves an ignored SIGINT ignored.
func needInterrupt(t testing.TB) {
	t.Helper()
	if signal.Ignored(os.Interrupt) {
		t.Skip("SIGINT is ignored")
	}
}

func (r *terminalRun) wantText(text string) {
	r.t.Helper()
	waitFor(r.t, "the terminal shows "+text, func() (bool, error) {
		r.mu.Lock()
		defer r.mu.Unlock()
		return strings.Contains(r.text.String(), text), nil
	})
}

func (r *terminalRun) press(keys string) {
	r.t.Helper()
	if _, err := io.WriteString(r.keys, keys); err != nil {
		r.t.Fatal(err)
	}
}

func (r *terminalRun) wantStatus(want int) {
	r.t.Helper()
	select {
	case <-r.done:
	case <-time.After(20 * time.Second):
		r.t.Fatalf("it does not end: %s", &r.text)
	}
	if got := r.cmd.ProcessState.ExitCode(); got != want {
		r.mu.Lock()
		defer r.mu.Unlock()
		r.t.Fatalf("exit status %d, want %d: %s", got, want, &r.text)
	}
}

const ctrlC, ctrlD, ctrlZ = "\x03", "\x04", "\x1a"

func TestCommandInATerminalWaits(t *testing.T) {
	needInterrupt(t)
	hold(t, adminDB(t), testKey(t))
	r := inTerminal(t, "run", t.Name(), "--", "true")
	waitForWaiters(t, adminDB(t), testKey(t), 1)
	r.wantText("waiting") // who looks on is told after a second
	r.press(ctrlC)
	r.wantStatus(130)
}

// An interactive command has the terminal: it reads what is typed, and gets the signals of the keys.
func TestCommandInATerminalRuns(t *testing.T) {
	needInterrupt(t)
	r := inTerminal(t, "run", t.Name(), "--", "sh", "-c", `trap 'exit 5' INT; echo ready; read x; echo "got <$x>"; while :; do read x; done`)
	r.wantText("ready")
	r.press("typed\n")
	r.wantText("got <typed>")
	r.press(ctrlZ) // it would keep its lock while suspended
	r.wantText("goes on")
	r.press(ctrlC)
	r.wantStatus(5)
	wantFree(t, adminDB(t), testKey(t))

	r = inTerminal(t, "run", t.Name(), "--", "sleep", "60")
	waitFor(t, "it runs", func() (bool, error) {
		n, err := locks(t.Context(), adminDB(t), testKey(t), true)
		return n == 1, err
	})
	time.Sleep(100 * time.Millisecond) // for sleep to be there: it prints nothing
	r.press(ctrlC)
	r.wantStatus(130)
}

func TestCommandWatchesLocksInATerminal(t *testing.T) {
	hold(t, adminDB(t), testKey(t))
	r := inTerminal(t, "ls", "--watch", "--interval", "50ms")
	r.wantText("advisory locks, every 50ms")
	r.wantText("exclusive")
	r.press(ctrlC)
	r.wantStatus(0)
}

// Who does not say yes leaves the lock alone.
func TestCommandBreaksALockAfterAsking(t *testing.T) {
	allowLog(t, terminated)
	holder := startAdvisory(t, advisoryDSN(t), "run", t.Name(), "--", "sh", "-c", "echo ready; cat")
	holder.wantLine("ready")
	for _, no := range []string{"n\n", "\n", "yesterday\n", ctrlD} {
		r := inTerminal(t, "break", t.Name())
		r.wantText("End it? [y/N] ")
		r.press(no)
		r.wantText("nothing was ended")
		r.wantStatus(1)
		if n, err := locks(t.Context(), adminDB(t), testKey(t), true); n != 1 || err != nil {
			t.Fatalf("after %q: %d hold the lock, want 1 (%v)", no, n, err)
		}
	}
	r := inTerminal(t, "break", t.Name())
	r.wantText("End it? [y/N] ")
	r.press("Y\n")
	r.wantText("is ended")
	r.wantStatus(0)
	holder.wantStatus(70)
	wantFree(t, adminDB(t), testKey(t))
}
