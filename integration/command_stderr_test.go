//go:build unix

package integration

import (
	"os"
	"os/exec"
	"testing"
	"time"
)

// A standard error that nobody has open, or none at all, ends neither the command nor its child.
func TestCommandOutlivesItsStandardError(t *testing.T) {
	allowLog(t, terminated)
	for _, c := range []struct {
		name string
		take func(t *testing.T, cmd *exec.Cmd)
	}{
		{"closed", func(t *testing.T, cmd *exec.Cmd) {
			cmd.Args = append([]string{"sh", "-c", `exec "$0" "$@" 2>&-`}, cmd.Args...)
			var err error
			if cmd.Path, err = exec.LookPath("sh"); err != nil {
				t.Fatal(err)
			}
		}},
		{"without a reader", func(t *testing.T, cmd *exec.Cmd) {
			out, in := pipe(t)
			out.Close()
			cmd.Stderr = in
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			run := func(args ...string) *advisoryRun {
				cmd := advisoryCmd(t, advisoryDSN(t), append([]string{"run"}, args...)...)
				c.take(t, cmd)
				return start(t, cmd)
			}
			a := run("--verbose", t.Name(), "--", "sh", "-c", "echo ready; cat; exit 4")
			a.wantLine("ready")
			a.stdin.Close()
			a.wantStatus(4)

			a = run(t.Name(), "--", "sh", "-c", "trap 'sleep 0.5; echo bye; exit' TERM; echo ready; read x")
			a.wantLine("ready")
			endHolders(t, testKey(t)) // which is reported
			a.wantLine("bye")
			a.wantStatus(70)
		})
	}
}

// A command whose lock is lost is killed in time, though the line that says so cannot be written.
func TestCommandIsKilledThoughNobodyReadsItsStandardError(t *testing.T) {
	const heartbeat, grace = 400 * time.Millisecond, 200 * time.Millisecond
	allowLog(t, terminated)
	for _, c := range []struct {
		flag  string
		first string // the line that can be written
	}{
		{flag: "--verbose=false"},
		{flag: "--verbose", first: "advisory: acquired, key " + t.Name() + "/--verbose, after 10000ms\n"}, // but not the next one
	} {
		t.Run(c.flag, func(t *testing.T) {
			cmd := advisoryCmd(t, advisoryDSN(t), "run", c.flag, "--heartbeat", heartbeat.String(), "--grace", grace.String(),
				t.Name(), "--", "sh", "-c", stubborn)
			cmd.Stderr = pipeWithRoom(t, len(c.first))
			a := start(t, cmd)
			a.wantLine("ready")
			endHolders(t, testKey(t))
			lost := time.Now()
			a.wantStatus(70)
			a.wantAllDead()
			if took := time.Since(lost); took > 2*heartbeat+grace+3*time.Second {
				t.Errorf("killed after %v", took)
			}
		})
	}
}

// pipe returns a pipe, which is closed with the test.
func pipe(t *testing.T) (out, in *os.File) {
	t.Helper()
	out, in, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		out.Close()
		in.Close()
	})
	return out, in
}

// pipeWithRoom returns a pipe that has room for so many more bytes, and that nobody reads.
func pipeWithRoom(t *testing.T, room int) *os.File {
	t.Helper()
	fill := func(bytes int) (in *os.File, n int) {
		_, in = pipe(t)
		if err := in.SetWriteDeadline(time.Now().Add(200 * time.Millisecond)); err != nil {
			t.Fatal(err)
		}
		n, _ = in.Write(make([]byte, bytes))
		return in, n
	}
	_, all := fill(1 << 20)
	in, n := fill(all - room)
	if n != all-room {
		t.Fatalf("filled with %d bytes, want %d", n, all-room)
	}
	return in
}
