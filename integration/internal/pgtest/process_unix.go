//go:build unix

package pgtest

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// killTimeout is how long a process is given to exit before it is killed, and
// how long the watchdog has after that.
const killTimeout = 10 * time.Second

// endInterval is how often the children are killed of a process that is to exit.
const endInterval = 500 * time.Millisecond

// A sandbox is a temporary directory and the processes that run in it. They
// do not outlive this process: a watchdog cleans up when this process closes
// its end of a pipe, or is no more.
type sandbox struct {
	dir  string
	cred *syscall.Credential // nil: the current user's

	lifeline io.WriteCloser // the pipe that the watchdog reads
	cleaned  chan error     // gets the watchdog's exit status
}

// watchdog is the script that cleans up the sandbox when its standard input
// ends. The last line of that is the sandbox's directory. Each process has an
// empty file run/NAME.PID in it, which it makes itself before it becomes what
// it is to be: once that directory has another name, no more can start.
//
// A PostgreSQL that is killed leaves shared memory behind, and so does a
// Pgpool-II. These get SIGQUIT, upon which they end their sessions and
// themselves, and initdb gets SIGTERM, upon which it waits for those that it
// runs. A Pgpool-II comes first: it does not end while it looks for its server.
const watchdog = `
trap '' HUP INT QUIT TERM
gone() {
	kill -s 0 "$1" || return 0
	# Those who adopt our zombies may take their time.
	read -r stat <"/proc/$1/stat" || return 1
	case $stat in *') Z '*) return 0 ;; esac
	return 1
}
await() {
	for f; do
		pid=${f##*.}
		n=0
		until gone "$pid"; do
			n=$((n + 1))
			# A Pgpool-II waits for its children, who may wait for one another.
			case $f:$((n % 10)) in */pgpool-*:0) pkill -KILL -P "$pid" ;; esac
			if [ $n -gt 200 ]; then
				kill -s KILL -- "-$pid" "$pid"
				break
			fi
			sleep 0.05
		done
	done
}
while IFS= read -r line; do dir=$line; done
[ -d "$dir" ] || exit 0
mv "$dir/run" "$dir/dead"
for f in "$dir"/dead/pgpool-*; do kill -s QUIT "${f##*.}"; done
await "$dir"/dead/pgpool-*
for f in "$dir"/dead/*; do
	case $f in
	*/pgpool-*) ;;
	*/postgres-*) kill -s QUIT "${f##*.}" ;;
	*/initdb.*) kill -s TERM "${f##*.}" ;;
	*) kill -s KILL "${f##*.}" ;;
	esac
done
await "$dir"/dead/*
for n in 1 2 3 4 5; do
	rm -rf "$dir" && exit
	sleep 0.2
done
`

// launcher is the script that makes the file for the watchdog, $1.PID, and
// then becomes the command in the other arguments. A shell whose redirection
// fails exits.
const launcher = `: >"$1.$$" || exit; shift; exec "$@"`

// newSandbox starts a watchdog and makes a directory.
func newSandbox() (*sandbox, error) {
	cred, err := credential()
	if err != nil {
		return nil, err
	}
	b := &sandbox{cred: cred, cleaned: make(chan error, 1)}
	cmd := exec.Command("/bin/sh", "-c", watchdog, "pgtest-watchdog")
	cmd.Dir = "/"
	// In a session of its own it does not get the terminal's signals.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	b.lifeline, err = cmd.StdinPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		return nil, fmt.Errorf("pgtest: start the watchdog: %w", err)
	}
	// Being waited for also keeps the pipe from the garbage collector, which
	// would close it for a program that drops its last reference to a server.
	go func() { b.cleaned <- cmd.Wait() }()

	err = b.mkdir()
	if err == nil {
		run := filepath.Join(b.dir, "run")
		err = errors.Join(os.Mkdir(run, 0o700), b.chown(run))
	}
	if err != nil {
		return nil, errors.Join(err, b.close())
	}
	return b, nil
}

// credential returns whom to run servers as: PostgreSQL does not run as root.
func credential() (*syscall.Credential, error) {
	if os.Geteuid() != 0 {
		return nil, nil
	}
	for _, name := range []string{"postgres", "nobody"} {
		u, err := user.Lookup(name)
		if err != nil {
			continue
		}
		uid, err1 := strconv.ParseUint(u.Uid, 10, 32)
		gid, err2 := strconv.ParseUint(u.Gid, 10, 32)
		if err1 == nil && err2 == nil && uid != 0 {
			return &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}, nil
		}
	}
	return nil, errors.New("pgtest: PostgreSQL does not run as root, and there is neither a user postgres nor a user nobody")
}

// mkdir makes a directory that the sandbox's user can get at, which need not
// be true for root's own TMPDIR.
func (b *sandbox) mkdir() error {
	var errs []error
	for _, parent := range []string{os.TempDir(), "/tmp", "/var/tmp"} {
		b.dir = filepath.Join(parent, "pgtest-"+strings.ToLower(rand.Text()[:12]))
		// The watchdog has to know the directory before there is one.
		if _, err := fmt.Fprintln(b.lifeline, b.dir); err != nil {
			return fmt.Errorf("pgtest: watchdog: %w", err)
		}
		err := os.Mkdir(b.dir, 0o700)
		if err == nil {
			if err = b.chown(b.dir); err == nil {
				err = b.canExec(b.dir)
			}
			if err == nil {
				return nil
			}
			_ = os.Remove(b.dir)
		}
		errs = append(errs, err)
	}
	return fmt.Errorf("pgtest: no temporary directory: %w", errors.Join(errs...))
}

// canExec returns an error unless the sandbox's user may execute the file or
// enter the directory.
func (b *sandbox) canExec(path string) error {
	if _, err := os.Stat(path); err != nil {
		return err
	}
	cmd := exec.Command("/bin/sh", "-c", `test -x "$1"`, "sh", path)
	cmd.Dir = "/"
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: b.cred}
	if err := cmd.Run(); err != nil {
		var exit *exec.ExitError
		if !errors.As(err, &exit) {
			return err
		}
		err := &os.PathError{Op: "execute", Path: path, Err: os.ErrPermission}
		if b.cred != nil {
			return fmt.Errorf("%w for uid %d", err, b.cred.Uid)
		}
		return err
	}
	return nil
}

// chown gives the file to the sandbox's user.
func (b *sandbox) chown(path string) error {
	if b.cred == nil {
		return nil
	}
	return os.Lchown(path, int(b.cred.Uid), int(b.cred.Gid))
}

// writeFile writes a file that the sandbox's user can read and write.
func (b *sandbox) writeFile(path, content string) error {
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		return err
	}
	return b.chown(path)
}

// close ends the processes and removes the directory.
func (b *sandbox) close() error {
	_ = b.lifeline.Close()
	err := <-b.cleaned
	if _, statErr := os.Lstat(b.dir); !errors.Is(statErr, os.ErrNotExist) {
		return fmt.Errorf("pgtest: %s is still there: %w", b.dir, errors.Join(err, statErr))
	}
	return nil
}

// A process is one that runs in a sandbox, in a session of its own.
type process struct {
	cmd  *exec.Cmd
	file string        // of the watchdog, without the process id
	done chan struct{} // closed when it has exited
}

// start starts a program. Its output goes to the file log, and name must be
// unique in the sandbox.
func (b *sandbox) start(name, log string, prefix []string, argv ...string) (*process, error) {
	out, err := os.OpenFile(log, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return nil, err
	}
	defer out.Close()

	file := filepath.Join(b.dir, "run", name)
	argv = append([]string{"/bin/sh", "-c", launcher, "sh", file}, argv...)
	attr := &syscall.SysProcAttr{Setsid: true, Credential: b.cred}
	if len(prefix) > 0 {
		// The prefix may need the privileges that the server must not have.
		if b.cred != nil {
			attr.Credential = nil
			argv = append([]string{"setpriv", fmt.Sprintf("--reuid=%d", b.cred.Uid), fmt.Sprintf("--regid=%d", b.cred.Gid), "--clear-groups", "--"}, argv...)
		}
		argv = append(slices.Clone(prefix), argv...)
	}
	cmd := exec.Command(argv[0], argv[1:]...)
	cmd.Dir = b.dir
	cmd.Env = b.environ()
	cmd.Stdout, cmd.Stderr = out, out
	cmd.SysProcAttr = attr
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("pgtest: start %s: %w", name, err)
	}
	p := &process{cmd: cmd, file: file, done: make(chan struct{})}
	go func() {
		_ = cmd.Wait()
		// From now on the number may be another process's.
		_ = os.Remove(fmt.Sprintf("%s.%d", file, p.pid()))
		close(p.done)
	}()
	return p, nil
}

// environ returns an environment for the servers: what is set for PostgreSQL's
// clients does not concern them, and their messages must be in English to be
// understood here.
func (b *sandbox) environ() []string {
	env := slices.DeleteFunc(os.Environ(), func(kv string) bool {
		return strings.HasPrefix(kv, "PG") || strings.HasPrefix(kv, "LC_") || strings.HasPrefix(kv, "LANG")
	})
	return append(env, "LC_ALL=C", "HOME="+b.dir)
}

// run runs a program to its end. If the context ends first, it is left to run
// until the sandbox is closed.
func (b *sandbox) run(ctx context.Context, argv ...string) error {
	name := filepath.Base(argv[0])
	log := filepath.Join(b.dir, name+".log")
	p, err := b.start(name, log, nil, argv...)
	if err != nil {
		return err
	}
	select {
	case <-p.done:
	case <-ctx.Done():
		return fmt.Errorf("pgtest: %s: %w", name, context.Cause(ctx))
	}
	if !p.cmd.ProcessState.Success() {
		return fmt.Errorf("pgtest: %s: %s; the end of its output:\n%s", name, p.state(), tailOf(log))
	}
	return nil
}

func (p *process) exited() bool {
	select {
	case <-p.done:
		return true
	default:
		return false
	}
}

// state says how the process exited.
func (p *process) state() string { return p.cmd.ProcessState.String() }

// waitOrKill waits for a process that was told to exit.
func (p *process) waitOrKill() {
	select {
	case <-p.done:
	case <-time.After(killTimeout):
		p.signal(syscall.SIGKILL)
		_ = syscall.Kill(-p.cmd.Process.Pid, syscall.SIGKILL)
		<-p.done
	}
}

// end sends sig to the process, and then kills its children until it exits: a
// Pgpool-II waits for its children, who may wait for one another.
func (p *process) end(sig syscall.Signal) {
	p.signal(sig)
	for range killTimeout / endInterval {
		select {
		case <-p.done:
			return
		case <-time.After(endInterval):
		}
		children, _ := childrenOf(p.pid())
		for _, child := range children {
			_ = syscall.Kill(child, syscall.SIGKILL)
		}
	}
	p.waitOrKill()
}

// pid returns the id of the process, which the prefix may have forked.
func (p *process) pid() int {
	if files, err := filepath.Glob(p.file + ".*"); err == nil && len(files) == 1 {
		if pid, err := strconv.Atoi(strings.TrimPrefix(files[0], p.file+".")); err == nil {
			return pid
		}
	}
	return p.cmd.Process.Pid
}

// signal sends sig to the process unless it has exited.
func (p *process) signal(sig syscall.Signal) {
	if !p.exited() {
		_ = syscall.Kill(p.pid(), sig)
	}
}

// crash ends a postmaster and its children without giving them the time to say
// goodbye.
func (p *process) crash() error {
	if p.exited() {
		return nil
	}
	// A postmaster that is killed leaves shared memory behind. So it is only
	// frozen, to start no new sessions while the present ones are killed, and
	// then shut down in the way that saves nothing.
	pid := p.pid()
	if err := syscall.Kill(pid, syscall.SIGSTOP); err != nil {
		return fmt.Errorf("pgtest: freeze the postmaster: %w", err)
	}
	children, err := childrenOf(pid)
	for _, child := range children {
		_ = syscall.Kill(child, syscall.SIGKILL)
	}
	p.signal(syscall.SIGQUIT)
	p.signal(syscall.SIGCONT)
	p.waitOrKill()
	return err
}

// childrenOf returns the children of a process.
func childrenOf(pid int) ([]int, error) {
	var parents []byte // lines of two numbers: a process and its parent
	stats, err := filepath.Glob("/proc/[0-9]*/stat")
	if err == nil && len(stats) > 0 {
		for _, stat := range stats {
			b, err := os.ReadFile(stat)
			if err != nil {
				continue // it has exited
			}
			// PID (NAME) STATE PARENT ..., and any byte may be in the name.
			fields := bytes.Fields(b[bytes.LastIndexByte(b, ')')+1:])
			if len(fields) > 1 {
				parents = fmt.Appendf(parents, "%s %s\n", filepath.Base(filepath.Dir(stat)), fields[1])
			}
		}
	} else if parents, err = exec.Command("ps", "-A", "-o", "pid=", "-o", "ppid=").Output(); err != nil {
		return nil, fmt.Errorf("pgtest: list processes: %w", err)
	}
	var children []int
	for line := range bytes.Lines(parents) {
		var child, parent int
		if n, _ := fmt.Sscan(string(line), &child, &parent); n == 2 && parent == pid {
			children = append(children, child)
		}
	}
	return children, nil
}
