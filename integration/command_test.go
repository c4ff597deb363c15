//go:build unix

package integration

import (
	"bufio"
	"context"
	"database/sql"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/pgadvisory/advisory"
)

// built builds the command advisory, once. TestMain removes it.
var built = sync.OnceValues(func() (path string, err error) {
	dir, err := os.MkdirTemp("", "advisory-command-")
	if err != nil {
		return "", err
	}
	removeCommand = func() { os.RemoveAll(dir) }
	path = filepath.Join(dir, "advisory")
	build := exec.Command("go", "build", "-o", path, ".")
	build.Dir = "../cmd/advisory"
	build.Env = append(os.Environ(), "GOWORK=") // its go.work
	if out, err := build.CombinedOutput(); err != nil {
		return "", fmt.Errorf("go build: %w\n%s", err, out)
	}
	return path, nil
})

// An advisoryRun is a process of the command advisory.
type advisoryRun struct {
	t      testing.TB
	cmd    *exec.Cmd
	stdin  io.Closer
	lines  chan string   // of its standard output, and of those whom it has started
	ended  chan struct{} // closed when it has exited
	stderr *syncBuffer
}

// advisoryCmd returns the command advisory with args, on the database of dsn.
func advisoryCmd(t testing.TB, dsn string, args ...string) *exec.Cmd {
	t.Helper()
	path, err := built()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(path, args...)
	cmd.Env = append(os.Environ(), "DATABASE_URL="+dsn)
	return cmd
}

// startAdvisory starts the command advisory. It ends with the test.
func startAdvisory(t testing.TB, dsn string, args ...string) *advisoryRun {
	t.Helper()
	return start(t, advisoryCmd(t, dsn, args...))
}

// start starts what advisoryCmd has returned.
func start(t testing.TB, cmd *exec.Cmd) *advisoryRun {
	t.Helper()
	a := &advisoryRun{t: t, cmd: cmd, lines: make(chan string, 100), ended: make(chan struct{}), stderr: &syncBuffer{}}
	if cmd.Stderr == nil {
		cmd.Stderr = a.stderr
	}
	var err error
	if a.stdin, err = a.cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	out, in, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	a.cmd.Stdout = in
	if err := a.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	in.Close()
	go func() {
		defer close(a.lines)
		defer out.Close()
		for s := bufio.NewScanner(out); s.Scan(); {
			a.lines <- s.Text()
		}
	}()
	go func() {
		defer close(a.ended)
		_ = a.cmd.Wait()
	}()
	t.Cleanup(func() {
		_ = a.cmd.Process.Signal(syscall.SIGTERM)
		select {
		case <-a.ended:
		case <-time.After(2 * time.Second): // its command goes on after that
			_ = a.cmd.Process.Kill()
			<-a.ended
		}
	})
	return a
}

// wantLine waits for a line of standard output.
func (a *advisoryRun) wantLine(want string) {
	a.t.Helper()
	select {
	case line := <-a.lines:
		if line != want {
			a.t.Fatalf("it printed %q, want %q; %s", line, want, a.stderr)
		}
	case <-time.After(20 * time.Second):
		a.t.Fatalf("it did not print %q: %s", want, a.stderr)
	}
}

// wantStatus waits for the end.
func (a *advisoryRun) wantStatus(want int) {
	a.t.Helper()
	select {
	case <-a.ended:
	case <-time.After(20 * time.Second):
		a.t.Fatalf("it does not end: %s", a.stderr)
	}
	if got := a.cmd.ProcessState.ExitCode(); got != want {
		a.t.Fatalf("exit status %d, want %d; %s", got, want, a.stderr)
	}
}

// wantAllDead waits until nobody holds its standard output any more: not it, and not what it has started.
func (a *advisoryRun) wantAllDead() {
	a.t.Helper()
	late := time.After(20 * time.Second)
	for {
		select {
		case _, ok := <-a.lines:
			if !ok {
				return
			}
		case <-late:
			a.t.Fatal("the command lives on")
		}
	}
}

func (a *advisoryRun) signal(s os.Signal) {
	a.t.Helper()
	if err := a.cmd.Process.Signal(s); err != nil {
		a.t.Fatal(err)
	}
}

// waitForEvent waits until text is on standard error.
func (a *advisoryRun) waitForEvent(text string) {
	a.t.Helper()
	waitFor(a.t, text, func() (bool, error) {
		if s := a.stderr.String(); !strings.Contains(s, text) {
			return false, errors.New(s)
		}
		return true, nil
	})
}

// stubborn is a command that goes on after SIGTERM, and so does what it has started.
const stubborn = `trap '' TERM; sleep 60 & echo ready; wait; wait; sleep 60`

// advisoryDSN is that of the test's database, for the command advisory, whose words in the server's log
// are watched.
func advisoryDSN(t testing.TB) string { return watchLog(t, server.DSN()) }

func TestCommandExitStatus(t *testing.T) {
	refuses := newRelay(t, server)
	refuses.answerDials(refusing("28P01", `password authentication failed for user "postgres"`))
	nobody := withParams(t, server.DSN(), "host", "127.0.0.1", "port", closedPort(t))
	held := testKey(t)
	hold(t, adminDB(t), held)
	plain := filepath.Join(t.TempDir(), "plain")
	if err := os.WriteFile(plain, []byte("text"), 0o600); err != nil {
		t.Fatal(err)
	}
	dsn := advisoryDSN(t)
	for _, c := range []struct {
		args   string
		dsn    string
		status int
		says   string // the one line on standard error has this; "": there is none
	}{
		{args: "run free -- true", status: 0},
		{args: "run free -- false", status: 1},
		{args: "run free -- sh -c exit${IFS}7", status: 7},
		{args: "run free -- sh -c kill${IFS}-9${IFS}$$", status: 137},
		{args: "run --id 1 --pair 2,-3 --hashtext old -- true", status: 0},
		{args: "run --no-wait HELD -- true", status: 75, says: "another holds the lock"},
		{args: "run --no-wait --quiet HELD -- true", status: 75},
		{args: "run --no-wait --conflict-exit-code 0 --quiet HELD -- true", status: 0},
		{args: "run --wait 500ms --conflict-exit-code 9 HELD -- true", status: 9, says: "held by pid"},
		{args: "run free -- " + plain, status: 126, says: "permission denied"},
		{args: "run free -- no-such-command", status: 127, says: "command not found"},
		{args: "run free -- ./no/such/command", status: 127, says: "no such file"},
		{args: "run free", status: 64, says: "no command"},
		{args: "run free --", status: 64, says: "no command"},
		{args: "run -- true", status: 64, says: "no lock"},
		{args: "run --nowait free -- true", status: 64, says: "unknown flag: --nowait"},
		{args: "run --no-wait --wait 1s free -- true", status: 64, says: "no-wait"},
		{args: "run --grace 13s free -- true", status: 64, says: "--grace: 13s is not under 13s"},
		{args: "run --pair 1 free -- true", status: 64, says: "--pair"},
		{args: "lock free", status: 64, says: "unknown command"},
		{args: "run free -- true", dsn: nobody, status: 69, says: "connection refused"},
		{args: "run free -- true", dsn: refuses.dsn, status: 69, says: "password authentication failed"},
		{args: "run free -- true", dsn: "postgres://:port", status: 64, says: "cannot parse"},
		{args: "ls", dsn: nobody, status: 69, says: "connection refused"},
		{args: "check", status: 0},
	} {
		t.Run(c.args, func(t *testing.T) {
			if c.dsn == "" {
				c.dsn = dsn
			}
			args := strings.Fields(c.args)
			for i := range args {
				args[i] = strings.ReplaceAll(args[i], "${IFS}", " ")
				if args[i] == "HELD" {
					args[i] = t.Name()[:strings.Index(t.Name(), "/")]
				}
			}
			cmd := advisoryCmd(t, c.dsn, args...)
			var stderr strings.Builder
			cmd.Stderr = &stderr
			_ = cmd.Run()
			if got := cmd.ProcessState.ExitCode(); got != c.status {
				t.Errorf("exit status %d, want %d", got, c.status)
			}
			line, more, _ := strings.Cut(stderr.String(), "\n")
			if more != "" || !strings.Contains(line, c.says) || (line == "") != (c.says == "") || line != "" && !strings.HasPrefix(line, "advisory: ") {
				t.Errorf("it says %q, want one line with %q", stderr.String(), c.says)
			}
		})
	}
}

// closedPort returns a port on which nobody listens.
func closedPort(t testing.TB) string {
	t.Helper()
	r := newRelay(t, server)
	port, err := strconv.Atoi(r.port)
	if err != nil {
		t.Fatal(err)
	}
	return strconv.Itoa(port%60000 + 1)
}

func TestCommandSignalsWhileWaitingEndTheWait(t *testing.T) {
	key := testKey(t)
	hold(t, adminDB(t), key)
	dsn := advisoryDSN(t)
	for _, s := range []syscall.Signal{syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP, syscall.SIGUSR1} {
		if signal.Ignored(s) { // as SIGHUP is under nohup, which the command leaves so
			continue
		}
		a := startAdvisory(t, dsn, "run", t.Name(), "--", "true")
		waitForWaiters(t, adminDB(t), key, 1)
		began := time.Now()
		a.signal(s)
		a.wantStatus(128 + int(s))
		if took := time.Since(began); took > 2*time.Second {
			t.Errorf("%v: the wait ended after %v", s, took)
		}
		if got := a.stderr.String(); got != "" {
			t.Errorf("%v: it says %q", s, got)
		}
	}
}

func init() {
	// It prints every signal that it gets, and ends by the second SIGTERM.
	children["signalled"] = func() int {
		signals := make(chan os.Signal, 10)
		signal.Notify(signals, syscall.SIGHUP, syscall.SIGINT, syscall.SIGQUIT, syscall.SIGTERM, syscall.SIGUSR1, syscall.SIGUSR2, syscall.SIGWINCH)
		fmt.Println("ready")
		terms := 0
		for s := range signals {
			fmt.Println(s)
			if s == syscall.SIGTERM {
				if terms++; terms == 2 {
					break
				}
			}
		}
		return 42
	}
}

// childCommand returns a command that runs a child function of this binary.
func childCommand(t testing.TB, name string) []string {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	return []string{"env", childEnv + "=" + name, exe}
}

func TestCommandForwardsSignals(t *testing.T) {
	a := startAdvisory(t, advisoryDSN(t), append([]string{"run", t.Name(), "--"}, childCommand(t, "signalled")...)...)
	a.wantLine("ready")
	for _, s := range []syscall.Signal{
		syscall.SIGHUP, syscall.SIGINT, syscall.SIGQUIT, syscall.SIGUSR1, syscall.SIGUSR2, syscall.SIGWINCH, syscall.SIGTERM,
	} {
		if signal.Ignored(s) {
			continue
		}
		a.signal(s)
		a.wantLine(s.String())
	}
	a.signal(syscall.SIGTERM)
	a.wantStatus(42)
	wantFree(t, adminDB(t), testKey(t))
}

// The lock is that of all that the command has started, for as long as any of it runs.
func TestCommandKeepsItsLockForWhatOutlivesIt(t *testing.T) {
	fifo := filepath.Join(t.TempDir(), "fifo")
	if err := syscall.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	a := startAdvisory(t, advisoryDSN(t), "run", "-v", t.Name(), "--", "sh", "-c", "cat <"+fifo+" & exit 3")
	a.waitForEvent("processes of its group go on")
	if n, err := locks(t.Context(), adminDB(t), testKey(t), true); n != 1 || err != nil {
		t.Errorf("%d hold the lock, want 1 (%v)", n, err)
	}
	if err := os.WriteFile(fifo, []byte("done\n"), 0); err != nil {
		t.Fatal(err)
	}
	a.wantLine("done")
	a.wantStatus(3)
	wantFree(t, adminDB(t), testKey(t))
}

// Nothing that the command has started outlives a killed "advisory run", whatever it does about signals.
func TestCommandDiesWithAdvisoryRun(t *testing.T) {
	a := startAdvisory(t, advisoryDSN(t), "run", "-v", t.Name(), "--", "sh", "-c", stubborn)
	a.wantLine("ready")
	a.waitForEvent("started") // by then, the guard knows its group
	a.signal(syscall.SIGKILL)
	a.wantAllDead()
	wantFree(t, adminDB(t), testKey(t))
}

func TestCommandRunsOnceOfTwenty(t *testing.T) {
	dsn := advisoryDSN(t)
	var all []*advisoryRun
	for range 20 {
		all = append(all, startAdvisory(t, dsn, "run", "--no-wait", t.Name(), "--", "sh", "-c", "echo runs; cat"))
	}
	running := func() (left []*advisoryRun) {
		for _, a := range all {
			select {
			case <-a.ended:
			default:
				left = append(left, a)
			}
		}
		return left
	}
	waitFor(t, "one runs", func() (bool, error) { return len(running()) <= 1, nil })
	winners := running()
	if len(winners) != 1 {
		t.Fatalf("%d run, want 1", len(winners))
	}
	for _, a := range all {
		if a != winners[0] {
			a.wantStatus(75)
			a.wantAllDead()
		}
	}
	winners[0].wantLine("runs")
	winners[0].stdin.Close()
	winners[0].wantStatus(0)
}

// Whether the server ends the session or falls silent, a command that goes on after SIGTERM is killed.
func TestCommandIsKilledWhenItsLockIsLost(t *testing.T) {
	const grace = time.Second
	for _, c := range []struct {
		end  string // of the session
		lose func(t *testing.T, r *relay, key advisory.Key)
	}{
		{"ended", func(t *testing.T, _ *relay, key advisory.Key) { endHolders(t, key) }},
		{"silent", func(_ *testing.T, r *relay, _ advisory.Key) { r.part() }},
	} {
		t.Run(c.end, func(t *testing.T) {
			allowLog(t, silent, terminated)
			r := newRelay(t, server)
			args := []string{"run", "--heartbeat", "400ms", "--holder-timeout", "2s", "--grace", grace.String(), t.Name(), "--", "sh", "-c"}
			stubbornOne := startAdvisory(t, watchLog(t, r.dsn), append(args, stubborn)...)
			stubbornOne.wantLine("ready")
			key := advisory.Name(t.Name())
			waitForArmed(t, key)
			c.lose(t, r, key)
			stubbornOne.waitForEvent("lock lost")
			lost := time.Now()
			stubbornOne.wantStatus(70)
			if took := time.Since(lost); took < grace/2 { // by the test's clock, which may begin late
				t.Errorf("killed after %v, before the grace of %v was over", took, grace)
			}
			stubbornOne.wantAllDead()
			if c.end == "silent" {
				return
			}
			wantFree(t, adminDB(t), key)
			polite := startAdvisory(t, watchLog(t, r.dsn), append(args, "trap 'echo bye; exit 0' TERM; echo ready; read x")...)
			polite.wantLine("ready")
			c.lose(t, r, key)
			polite.wantLine("bye")
			polite.wantStatus(70)
		})
	}
}

// endHolders ends the sessions that hold key.
func endHolders(t testing.TB, key advisory.Key) {
	t.Helper()
	holders, err := advisory.Holders(t.Context(), adminDB(t), key)
	if err != nil || len(holders) == 0 {
		t.Fatalf("no holders: %v", err)
	}
	for _, h := range holders {
		if _, err := adminDB(t).Exec("SELECT pg_terminate_backend($1, 5000)", h.PID); err != nil {
			t.Fatal(err)
		}
	}
}

// waitForArmed waits until the session that holds key has had a heartbeat.
func waitForArmed(t testing.TB, key advisory.Key) {
	t.Helper()
	waitFor(t, "a heartbeat", func() (bool, error) {
		holders, err := advisory.Holders(context.Background(), adminDB(t), key)
		return len(holders) > 0 && holders[0].Granted && strings.HasPrefix(holders[0].Query, "/* advisory: "), err
	})
}

// A machine that is cut off has killed its command before another machine's begins. The times are long
// because 80 processes start at once.
func TestCommandIsDeadBeforeItsSuccessorBegins(t *testing.T) {
	const events = 20
	allowLog(t, silent, clientGone)
	dir := t.TempDir()
	r := newRelay(t, server)
	cutOff, direct := watchLog(t, r.dsn), advisoryDSN(t)
	name := func(i int) string { return fmt.Sprintf("%s-%d", t.Name(), i) }
	var holders, successors []*advisoryRun
	for i := range events {
		holders = append(holders, startAdvisory(t, cutOff, "run", "--heartbeat", "3s", "--holder-timeout", "12s", "--grace", "5400ms",
			name(i), "--", "sh", "-c", "trap '' TERM; echo $$ >"+filepath.Join(dir, name(i))+"; echo ready; exec sleep 60"))
	}
	for i, h := range holders {
		h.wantLine("ready")
		successors = append(successors, startAdvisory(t, direct, "run", "--heartbeat", "10s", "--holder-timeout", "60s", "--grace", "30s",
			name(i), "--", "sh", "-c", "kill -0 $(cat "+filepath.Join(dir, name(i))+") 2>/dev/null && echo two run || echo alone"))
	}
	for i := range events {
		waitForWaiters(t, adminDB(t), advisory.Name(name(i)), 1)
		waitForArmed(t, advisory.Name(name(i)))
	}
	r.part()
	for i, s := range successors {
		s.wantLine("alone")
		s.wantStatus(0)
		holders[i].wantStatus(70)
	}
}

func TestCommandLeadsAgainAfterALoss(t *testing.T) {
	allowLog(t, terminated)
	a := startAdvisory(t, advisoryDSN(t), "run", "--lead", "--quiet", t.Name(), "--", "sh", "-c", "echo leads; exec sleep 60")
	for range 2 {
		a.wantLine("leads")
		endHolders(t, testKey(t))
	}
	a.wantLine("leads")
	a.signal(syscall.SIGTERM)
	a.wantStatus(128 + int(syscall.SIGTERM))
}

// A leader that was asked to stop, and goes on, does not lead again after a loss. SIGHUP asks for something
// else, such as a reload.
func TestCommandLeadsAgainUnlessItWasAskedToStop(t *testing.T) {
	allowLog(t, terminated)
	for _, c := range []struct {
		asked syscall.Signal
		again bool
	}{{syscall.SIGHUP, true}, {syscall.SIGINT, false}, {syscall.SIGTERM, false}} {
		t.Run(c.asked.String(), func(t *testing.T) {
			if signal.Ignored(c.asked) {
				t.Skip("the signal is ignored")
			}
			args := append([]string{"run", "--lead", "--quiet", "--grace", "1s", t.Name(), "--"}, childCommand(t, "signalled")...)
			a := startAdvisory(t, advisoryDSN(t), args...)
			a.wantLine("ready")
			a.signal(c.asked)
			a.wantLine(c.asked.String())
			endHolders(t, testKey(t))
			a.wantLine(syscall.SIGTERM.String()) // of the loss
			if !c.again {
				a.wantStatus(70)
				a.wantAllDead()
				return
			}
			a.wantLine("ready")
			for range 2 {
				a.signal(syscall.SIGTERM)
				a.wantLine(syscall.SIGTERM.String())
			}
			a.wantStatus(42)
		})
	}
}

func TestCommandSignalsWhileCampaigningEndTheCampaign(t *testing.T) {
	key := testKey(t)
	hold(t, adminDB(t), key)
	for _, s := range []syscall.Signal{syscall.SIGTERM, syscall.SIGHUP} {
		if signal.Ignored(s) {
			continue
		}
		a := startAdvisory(t, advisoryDSN(t), "run", "--lead", t.Name(), "--", "true")
		waitForWaiters(t, adminDB(t), key, 1)
		a.signal(s)
		a.wantStatus(128 + int(s))
	}
}

// The status is that of what ends the campaign, and not of the loss before it.
func TestCommandSignalWhileCampaigningAfterALoss(t *testing.T) {
	allowLog(t, terminated)
	if signal.Ignored(syscall.SIGTERM) {
		t.Skip("the signal is ignored")
	}
	a := startAdvisory(t, advisoryDSN(t), "run", "--lead", "--json", t.Name(), "--", "sleep", "1h")
	a.waitForEvent(`"msg":"started"`)
	waitForArmed(t, testKey(t))
	endHolders(t, testKey(t))
	hold(t, adminDB(t), testKey(t))
	a.waitForEvent(`"msg":"exited"`)
	waitForWaiters(t, adminDB(t), testKey(t), 1)
	a.signal(syscall.SIGTERM)
	a.wantStatus(128 + int(syscall.SIGTERM))
}

func TestCommandKeepsItsLockForAtLeast(t *testing.T) {
	a := startAdvisory(t, advisoryDSN(t), "run", "--json", "--at-least", "700ms", t.Name(), "--", "true")
	a.waitForEvent(`"msg":"exited"`)
	if n, err := locks(t.Context(), adminDB(t), testKey(t), true); n != 1 || err != nil {
		t.Errorf("%d hold the lock, want 1 (%v)", n, err)
	}
	a.wantStatus(0)
	if got := a.stderr.String(); !strings.Contains(got, `"msg":"released"`) {
		t.Errorf("no event of the release: %s", got)
	}
}

// The lock stays for those whose command ends by itself. Who is told to stop does not wait for the rest of
// the time.
func TestCommandSignalsEndTheStay(t *testing.T) {
	key := testKey(t)
	for _, s := range []syscall.Signal{syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP} {
		if signal.Ignored(s) {
			continue
		}
		a := startAdvisory(t, advisoryDSN(t), "run", "--json", "--at-least", "1h", t.Name(), "--", "sh", "-c", "exit 3")
		a.waitForEvent(`"msg":"exited"`)
		if n, err := locks(t.Context(), adminDB(t), key, true); n != 1 || err != nil {
			t.Errorf("%d hold the lock, want 1 (%v)", n, err)
		}
		a.signal(s)
		a.wantStatus(128 + int(s))
		wantFree(t, adminDB(t), key)
	}
	a := startAdvisory(t, advisoryDSN(t), append([]string{"run", "--at-least", "1h", t.Name(), "--"}, childCommand(t, "signalled")...)...)
	a.wantLine("ready")
	for range 2 {
		a.signal(syscall.SIGTERM)
		a.wantLine(syscall.SIGTERM.String())
	}
	a.wantStatus(42)
	wantFree(t, adminDB(t), key)
}

func TestCommandTellsItsChildByWhatItIsLocked(t *testing.T) {
	a := startAdvisory(t, advisoryDSN(t), "run", "--token", "--pair", "1,2", t.Name(), "--", "sh", "-c", `echo "$ADVISORY_KEY"; test "$ADVISORY_TOKEN" -gt 0`)
	a.wantLine(t.Name() + " 1, 2")
	a.wantStatus(0)
}

// Who locks by hashtext, in SQL, and who runs with --hashtext, exclude each other.
func TestCommandLocksByHashText(t *testing.T) {
	err := inTransaction(adminDB(t), "SELECT pg_advisory_xact_lock(hashtext('"+t.Name()+"'))", func() {
		a := startAdvisory(t, advisoryDSN(t), "run", "--no-wait", "--hashtext", t.Name(), "--", "true")
		a.wantStatus(75)
	})
	if err != nil {
		t.Fatal(err)
	}
}

func inTransaction(db *sql.DB, statement string, f func()) error {
	tx, err := db.Begin()
	if err != nil {
		return err
	}
	defer func() { _ = tx.Rollback() }()
	if _, err := tx.Exec(statement); err != nil {
		return err
	}
	f()
	return nil
}
