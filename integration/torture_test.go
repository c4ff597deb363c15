//go:build linux

package integration

import (
	"bufio"
	"context"
	"database/sql"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/pgadvisory/advisory"
	"github.com/pgadvisory/advisory/integration/internal/history"
)

var tortureFor = flag.Duration("torture", 0, "how long the torture run lasts (default 10s; 60s where CI is set)")

const (
	tortureProcesses  = 4
	tortureGoroutines = 6
	tortureKeys       = 4
)

// tortureArgs is what the child function torture is called with.
type tortureArgs struct {
	Driver, DSN              string
	Dir, Process             string // of the history
	Heartbeat, HolderTimeout time.Duration
}

func init() {
	children["torture"] = torture
}

// torture takes locks, all the time and in all ways, and writes down when it holds
// them. It ends when it is ordered to.
func torture() int {
	var a tortureArgs
	childArgs(&a)
	i := slices.IndexFunc(drivers, func(d driver) bool { return d.name == a.Driver })
	db, err := drivers[i].openDB(a.DSN)
	if err != nil {
		panic(err)
	}
	db.SetMaxIdleConns(tortureGoroutines)
	log, err := history.Create(a.Dir, a.Process)
	if err != nil {
		panic(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	go func() {
		orders := bufio.NewScanner(os.Stdin)
		if orders.Scan() {
			stop()
		} else {
			os.Exit(0)
		}
	}()
	v := &victim{db: db, log: log, opts: []advisory.Option{advisory.Heartbeat(a.Heartbeat), advisory.HolderTimeout(a.HolderTimeout)}}
	var wg sync.WaitGroup
	for range tortureGoroutines {
		wg.Go(func() {
			for ctx.Err() == nil {
				v.section(ctx, 0)
			}
		})
	}
	wg.Wait()
	return 0
}

// A victim is a process under torture.
type victim struct {
	db   *sql.DB
	log  *history.Log
	opts []advisory.Option
	last atomic.Int64
}

func (v *victim) add(e history.Event) {
	if err := v.log.Add(e); err != nil {
		panic(err)
	}
}

// section takes a lock in some way and works under it, rarely with another section inside: of another
// key, in any order. outer is the key that the caller holds, or 0.
func (v *victim) section(ctx context.Context, outer int64) {
	key := 1 + rand.Int64N(tortureKeys)
	if key == outer {
		key = 1 + outer%tortureKeys
	}
	inside := func(ctx context.Context) error {
		busy()
		if outer == 0 && rand.IntN(8) == 0 {
			v.section(ctx, key)
		}
		return nil
	}
	begin := history.Event{
		Kind: history.Begin, Section: v.last.Add(1), Key: strconv.FormatInt(key, 10),
		Asked: history.Now(), Shared: rand.IntN(3) == 0,
	}
	opts := v.opts
	if rand.IntN(4) == 0 {
		// The monkey that cancels contexts is inside.
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, rand.N(300*time.Millisecond))
		defer cancel()
	}
	begun := false
	var outerLost atomic.Bool // the lock around this section, which another session may carry
	work := func(ctx context.Context, work func() error) error {
		begin.At = history.Now()
		begun = true
		v.add(begin)
		stop := context.AfterFunc(ctx, func() {
			heard := history.Event{Kind: history.Deaf, At: history.Now(), Section: begin.Section}
			var lost *advisory.Error
			switch cause := context.Cause(ctx); {
			case !errors.Is(cause, advisory.ErrLost):
			case errors.As(cause, &lost) && slices.Contains(lost.Keys, advisory.ID(key)):
				heard.Kind = history.Told
			default:
				outerLost.Store(true)
			}
			v.add(heard)
		})
		defer stop()
		err := work()
		v.add(history.Event{Kind: history.End, At: history.Now(), Section: begin.Section})
		return err
	}

	var err error
	switch begin.How = []string{"WithLock", "Acquire", "WithTxLock", "WithTxLock, REPEATABLE READ"}[rand.IntN(4)]; begin.How {
	case "WithLock":
		if begin.Shared {
			opts = append(slices.Clone(opts), advisory.Shared())
		}
		err = advisory.WithLock(ctx, v.db, advisory.ID(key), func(ctx context.Context) error {
			return work(ctx, func() error { return inside(ctx) })
		}, opts...)
	case "Acquire":
		if begin.Shared {
			opts = append(slices.Clone(opts), advisory.Shared())
		}
		var lock *advisory.Lock
		if lock, err = advisory.Acquire(ctx, v.db, advisory.ID(key), opts...); err == nil {
			_ = work(lock.Context(), func() error { return inside(lock.Context()) })
			err = lock.Release()
		}
	default:
		begin.Tx = true
		opts = opts[1:] // the HolderTimeout
		if begin.How != "WithTxLock" {
			opts = append(slices.Clone(opts), advisory.TxOptions(&sql.TxOptions{Isolation: sql.LevelRepeatableRead}))
		}
		if begin.Shared {
			opts = append(slices.Clone(opts), advisory.Shared())
		}
		err = advisory.WithTxLock(ctx, v.db, advisory.ID(key), func(ctx context.Context, tx *sql.Tx) error {
			return work(ctx, func() error { return v.transact(ctx, tx, begin) })
		}, opts...)
	}
	outcome := history.Event{Kind: history.Kept, At: history.Now(), Section: begin.Section}
	switch {
	case errors.Is(err, advisory.ErrReentrant), errors.Is(err, advisory.ErrDeadlock) && outer == 0:
		tell("violation", begin.How, err)
	case errors.Is(err, advisory.ErrDeadlock):
		tell("deadlock", begin.How, nil)
	case errors.Is(err, errLostUpdate):
		tell("violation", begin.How, err)
	}
	if err != nil {
		outcome.Kind = history.Lost
	}
	if begun {
		v.add(outcome)
	}
	if outerLost.Load() && err == nil {
		tell("kept inside", begin.How, nil)
	}
}

// busy works for a while: mostly over before the first heartbeat, sometimes long after
// it, and rarely for longer than it may take to be told of a loss.
func busy() {
	switch n := rand.IntN(100); {
	case n < 1:
		time.Sleep(rand.N(4 * time.Second))
	case n < 6:
		time.Sleep(rand.N(time.Second))
	default:
		time.Sleep(rand.N(20 * time.Millisecond))
	}
}

var errLostUpdate = errors.New("the row has changed under the lock")

// transact adds 1 to a row, and writes down that it did. Nothing but the lock keeps two
// from reading the same number. Under a shared lock it only sees that the number stays.
func (v *victim) transact(ctx context.Context, tx *sql.Tx, begin history.Event) error {
	read := func() (n int64, err error) {
		err = tx.QueryRowContext(ctx, "SELECT n FROM torture WHERE key = $1", begin.Key).Scan(&n)
		return n, err
	}
	n, err := read()
	if err != nil {
		return err
	}
	busy()
	again, err := read()
	if err != nil {
		return err
	}
	if again != n {
		return fmt.Errorf("%w: %d, then %d", errLostUpdate, n, again)
	}
	if begin.Shared {
		return nil
	}
	if _, err := tx.ExecContext(ctx, "INSERT INTO torture_log VALUES ($1, $2, current_setting('application_name'), $3)", begin.Key, n+1, begin.Section); err != nil {
		return err
	}
	_, err = tx.ExecContext(ctx, "UPDATE torture SET n = $2 WHERE key = $1", begin.Key, n+1)
	return err
}

// A monkey disturbs the processes and writes down what it does to them.
type monkey struct {
	t      *testing.T
	admin  *sql.DB
	log    *history.Log
	args   tortureArgs
	frozen sync.WaitGroup

	mu      sync.Mutex
	victims []*child // nil: frozen, and the affair of the one who thaws it
	names   []string
	started int
	faults  map[history.Kind]int
	told    []report // by those that are gone
}

func (m *monkey) add(e history.Event) {
	if err := m.log.Add(e); err != nil {
		m.t.Error(err)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.faults[e.Kind]++
}

// start starts a process in place i.
func (m *monkey) start(i int) {
	m.started++
	a := m.args
	a.Driver = drivers[i%2].name
	a.Process = fmt.Sprintf("p%d.%d", i, m.started)
	a.DSN = watchLog(m.t, withParams(m.t, a.DSN, "application_name", a.Process))
	m.victims[i], m.names[i] = startChild(m.t, "torture", a), a.Process
}

// act does one thing to one process.
func (m *monkey) act() {
	switch n := rand.IntN(10); {
	case n < 5:
		m.cut()
	case n < 6: // a process that is frozen has an excuse for everything
		m.freeze(rand.IntN(tortureProcesses))
	case n < 7:
		m.kill(rand.IntN(tortureProcesses))
	}
}

// cut ends a session that holds a lock.
func (m *monkey) cut() {
	from := history.Now()
	rows, err := m.admin.Query(`
		WITH one AS MATERIALIZED (
			SELECT pid, application_name FROM pg_stat_activity
			WHERE datname = current_database() AND pid IN (SELECT pid FROM pg_locks WHERE locktype = 'advisory' AND granted)
			ORDER BY random() LIMIT 1),
		held AS MATERIALIZED (
			SELECT one.*, l.objid::text AS key FROM one JOIN pg_locks AS l USING (pid)
			WHERE l.locktype = 'advisory' AND l.granted)
		SELECT application_name, key, pg_terminate_backend(pid) FROM held`)
	if err != nil {
		m.t.Error(err)
		return
	}
	defer rows.Close()
	var cuts []history.Event
	for rows.Next() {
		e := history.Event{Kind: history.Cut, From: from}
		var done bool
		if err := rows.Scan(&e.Process, &e.Key, &done); err != nil {
			m.t.Error(err)
		}
		cuts = append(cuts, e)
	}
	if err := rows.Err(); err != nil {
		m.t.Error(err)
	}
	at := history.Now()
	for _, e := range cuts {
		e.At = at
		m.add(e)
	}
}

// freeze stops a process for a while: most often for longer than its locks last.
func (m *monkey) freeze(i int) {
	m.mu.Lock()
	c, name := m.victims[i], m.names[i]
	m.victims[i] = nil
	m.mu.Unlock()
	if c == nil {
		return
	}
	m.add(history.Event{Kind: history.Freeze, At: history.Now(), Process: name})
	c.signal(syscall.SIGSTOP)
	m.frozen.Go(func() {
		time.Sleep(50*time.Millisecond + rand.N(5*m.args.HolderTimeout/2))
		c.signal(syscall.SIGCONT)
		m.add(history.Event{Kind: history.Thaw, At: history.Now(), Process: name})
		m.mu.Lock()
		defer m.mu.Unlock()
		m.victims[i] = c
	})
}

// kill kills a process, and starts another.
func (m *monkey) kill(i int) {
	m.mu.Lock()
	c, name := m.victims[i], m.names[i]
	m.mu.Unlock()
	if c == nil {
		return
	}
	m.add(history.Event{Kind: history.Kill, At: history.Now(), Process: name})
	c.kill()
	m.mu.Lock()
	defer m.mu.Unlock()
	m.told = append(m.told, c.all()...)
	m.start(i)
}

func TestTorture(t *testing.T) {
	lasts := 10 * time.Second
	if os.Getenv("CI") != "" {
		lasts = time.Minute
	}
	if *tortureFor > 0 {
		lasts = *tortureFor
	}
	dsn := inDatabase(t)
	admin := drivers[1].open(t, withParams(t, dsn, "application_name", "monkey"))
	setUp(t, admin,
		"CREATE TABLE torture (key text PRIMARY KEY, n bigint NOT NULL)",
		fmt.Sprintf("INSERT INTO torture SELECT i, 0 FROM generate_series(1, %d) AS i", tortureKeys),
		"CREATE TABLE torture_log (key text, n bigint, process text, section bigint)")

	dir := t.TempDir()
	log, err := history.Create(dir, "monkey")
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	m := &monkey{
		t: t, admin: admin, log: log,
		args:    tortureArgs{DSN: dsn, Dir: dir, Heartbeat: 200 * time.Millisecond, HolderTimeout: time.Second},
		victims: make([]*child, tortureProcesses), names: make([]string, tortureProcesses),
		faults: map[history.Kind]int{},
	}
	allowLog(t,
		terminated, "WARNING:  PID ", // a session that is cut, or has ended already
		silent, silentInTx, // those of a process that is frozen
		// A transaction's work ends with its ctx.
		"STATEMENT:  SELECT n FROM torture ", "STATEMENT:  INSERT INTO torture_log ", "STATEMENT:  UPDATE torture ")
	for i := range tortureProcesses {
		m.start(i)
	}
	for end := time.Now().Add(lasts); time.Now().Before(end) && !t.Failed(); {
		time.Sleep(rand.N(200 * time.Millisecond))
		m.act()
	}
	m.frozen.Wait()
	for i, c := range m.victims {
		c.order("stop")
		select {
		case <-c.done:
		case <-time.After(30 * time.Second):
			t.Fatalf("%s does not end", m.names[i])
		}
		if !c.cmd.ProcessState.Success() {
			t.Errorf("%s: %v\n%s", m.names[i], c.cmd.ProcessState, c.stderr.String())
		}
		m.told = append(m.told, c.all()...)
	}
	deadlocks, inside := 0, 0
	for _, e := range m.told {
		switch e.What {
		case "violation":
			t.Errorf("%s: %s", e.Key, e.Err)
		case "deadlock":
			deadlocks++
		case "kept inside":
			inside++
		}
	}

	events, err := history.Read(dir)
	if err != nil {
		t.Fatal(err)
	}
	r := history.Check(settle(t, admin, events), history.Limits{
		Notice: 2*m.args.Heartbeat + time.Second, // a second for processes that get no turn
		Grace:  500 * time.Millisecond,
	})
	t.Logf("torture: %v, %d processes: %d sections cut, %d freezes, %d kills",
		lasts, m.started, m.faults[history.Cut], m.faults[history.Freeze], m.faults[history.Kill])
	t.Logf("torture: %d sections: %d kept, %d lost, %d killed; %d deadlocks; %d kept inside a lock that was lost",
		r.Sections, r.Kept, r.Lost, r.Killed, deadlocks, inside)
	logBound(t, "torture", "nobody took a lock", 5*time.Second, standstills(events))
	t.Logf("torture: overlaps of which the context of the earlier section had ended before %d, was frozen %d (and told at the thaw), "+
		"was cut %d (and told in time); with transactions that came to nothing %d; others %d",
		r.Told, r.Frozen, r.Cut, r.Undone, len(r.Violations))
	for what, took := range map[string][]time.Duration{"unaware, frozen": r.UnawareFrozen, "unaware, cut": r.UnawareCut} {
		if len(took) > 0 {
			logBound(t, "torture", what, 10*time.Second, took)
		}
	}
	for _, v := range r.Violations {
		t.Error(v)
	}
	if perSecond := float64(r.Kept) / lasts.Seconds(); perSecond < 10 || m.faults[history.Cut] == 0 || m.faults[history.Freeze] == 0 {
		t.Errorf("%.0f sections a second, faults %v: that is no torture", perSecond, m.faults)
	}
}

// standstills returns the times in which nobody took a lock.
func standstills(events []history.Event) (still []time.Duration) {
	var at []time.Duration
	for _, e := range events {
		if e.Kind == history.Begin {
			at = append(at, e.At)
		}
	}
	slices.Sort(at)
	for i := range at[1:] {
		still = append(still, at[i+1]-at[i])
	}
	return still
}

// settle asks the tables what became of the transactions, which is the last word, and
// fails the test if an update is lost.
func settle(t *testing.T, db *sql.DB, events []history.Event) []history.Event {
	t.Helper()
	var rows, numbers, last int64
	if err := db.QueryRow(`
		SELECT (SELECT count(*) FROM torture_log), (SELECT count(*) FROM (SELECT DISTINCT key, n FROM torture_log) AS d), (SELECT sum(n) FROM torture)`,
	).Scan(&rows, &numbers, &last); err != nil {
		t.Fatal(err)
	}
	t.Logf("torture: %d transactions that wrote", rows)
	if rows != numbers || rows != last {
		t.Errorf("updates were lost: %d transactions wrote %d different numbers, and counted to %d", rows, numbers, last)
	}

	type section struct {
		process string
		section int64
	}
	committed := map[section]bool{}
	written, err := db.Query("SELECT process, section FROM torture_log")
	if err != nil {
		t.Fatal(err)
	}
	defer written.Close()
	for written.Next() {
		var s section
		if err := written.Scan(&s.process, &s.section); err != nil {
			t.Fatal(err)
		}
		committed[s] = true
	}
	if err := written.Err(); err != nil {
		t.Fatal(err)
	}

	// A COMMIT that got no answer is no loss if it is found in the table.
	writers, kept := map[section]bool{}, map[section]bool{}
	for i, e := range events {
		s := section{e.Process, e.Section}
		switch {
		case e.Kind == history.Begin && e.Tx && !e.Shared:
			writers[s] = true
		case e.Kind == history.Lost && committed[s]:
			events[i].Kind = history.Kept
			kept[s] = true
		case e.Kind == history.Kept:
			kept[s] = true
		}
	}
	for s := range writers {
		switch {
		case kept[s] && !committed[s]:
			t.Errorf("%s/%d was told that it committed, and it did not", s.process, s.section)
		case committed[s] && !kept[s]: // killed while it waited for the answer
			events = append(events, history.Event{Kind: history.Kept, Process: s.process, Section: s.section})
		}
	}
	return events
}
