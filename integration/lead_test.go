package integration

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/pgadvisory/advisory"
)

// A leadership is one run of the fn of a Lead.
type leadership struct {
	ctx    context.Context
	begun  time.Time
	stepUp chan error // fn returns what is sent
}

// stepDown has fn return err.
func (l leadership) stepDown(err error) { l.stepUp <- err }

// A campaign is one call of Lead.
type campaign struct {
	runs    chan leadership // each run of fn
	running atomic.Int64    // runs of fn under way
	result  chan error      // Lead's
	cancel  context.CancelFunc
}

// runForLeader calls Lead. Its fn ends when it is told to, and not with its ctx.
func runForLeader(t testing.TB, db *sql.DB, key advisory.Key, opts ...advisory.Option) *campaign {
	ctx, cancel := context.WithCancel(t.Context())
	c := &campaign{runs: make(chan leadership, 1), result: make(chan error, 1), cancel: cancel}
	go func() {
		c.result <- advisory.Lead(ctx, db, key, func(ctx context.Context) error {
			l := leadership{ctx, time.Now(), make(chan error)}
			if n := c.running.Add(1); n > 1 {
				t.Errorf("fn runs %d times at once", n)
			}
			defer c.running.Add(-1)
			c.runs <- l
			select {
			case err := <-l.stepUp:
				return err
			case <-t.Context().Done():
				return t.Context().Err()
			}
		}, opts...)
	}()
	t.Cleanup(cancel)
	return c
}

// await receives from what the test waits for.
func await[T any](t testing.TB, what string, from <-chan T) (v T) {
	t.Helper()
	select {
	case v = <-from:
	case <-time.After(20 * time.Second):
		t.Fatalf("waited in vain until %s", what)
	}
	return v
}

func (c *campaign) leads(t testing.TB) leadership {
	t.Helper()
	return await(t, "the candidate leads", c.runs)
}

func (c *campaign) ended(t testing.TB) error {
	t.Helper()
	return await(t, "Lead returns", c.result)
}

// wantStandby fails the test if the candidate leads.
func (c *campaign) wantStandby(t testing.TB) {
	t.Helper()
	if n := c.running.Load(); n > 0 {
		t.Error("the candidate leads, and another does, too")
	}
}

// quick is a leader whose loss is noticed soon.
var quick = []advisory.Option{advisory.Heartbeat(shortHeartbeat), advisory.HolderTimeout(shortTimeout)}

// A logbook is a Logger that remembers.
type logbook struct {
	slog.Handler
	mu      sync.Mutex
	records []slog.Record
}

func newLogbook() *logbook { return &logbook{Handler: slog.DiscardHandler} }

func (l *logbook) Enabled(context.Context, slog.Level) bool { return true }

func (l *logbook) Handle(_ context.Context, r slog.Record) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.records = append(l.records, r)
	return nil
}

func (l *logbook) option() advisory.Option { return advisory.Logger(slog.New(l)) }

// times returns when it was told a message that contains text.
func (l *logbook) times(text string) (times []time.Time) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, r := range l.records {
		if strings.Contains(r.Message, text) {
			times = append(times, r.Time)
		}
	}
	return times
}

func (l *logbook) waitFor(t testing.TB, text string, n int) {
	t.Helper()
	waitFor(t, fmt.Sprintf("the Logger is told %q %d times", text, n), func() (bool, error) {
		return len(l.times(text)) >= n, nil
	})
}

// terminateHolder ends the session that holds key.
func terminateHolder(t testing.TB, db *sql.DB, key advisory.Key) {
	t.Helper()
	allowLog(t, terminated)
	holders, err := advisory.Holders(t.Context(), db, key)
	if err != nil || len(holders) == 0 || !holders[0].Granted {
		t.Fatalf("nobody holds %v: %v, %v", key, holders, err)
	}
	setUp(t, db, fmt.Sprintf("SELECT pg_terminate_backend(%d)", holders[0].PID))
}

var errStepDown = errors.New("step down")

// A leader that steps down is followed at once, not at the end of some poll interval.
func TestNextLeaderFollowsWithinAHandOff(t *testing.T) {
	t.Parallel()
	const stepDowns, candidates, bound = 15, 3, 100 * time.Millisecond
	eachDriver(t, func(t *testing.T, d driver) {
		t.Parallel()
		ctx, stop := context.WithCancel(soon(t))
		defer stop()
		s := &stepDownRecord{steppedBy: -1, enough: stepDowns, stop: stop}
		var g errgroup.Group
		for i := range candidates {
			db := d.open(t, server.DSN())
			g.Go(func() error { return s.campaign(ctx, t, i, db) })
		}
		if err := g.Wait(); err != nil {
			t.Fatal(err)
		}
		slices.Sort(s.took)
		if p50 := s.took[len(s.took)/2]; p50 > bound {
			t.Errorf("the next leader began after %v (p50 of %d), want under %v", p50, len(s.took), bound)
		} else {
			t.Logf("p50 %v, max %v", p50, s.took[len(s.took)-1])
		}
		wantFree(t, adminDB(t), testKey(t))
	})
}

// A stepDownRecord is how soon the next leader begins when one has stepped down.
type stepDownRecord struct {
	enough int // then stop is called
	stop   func()

	leaders atomic.Int64

	mu        sync.Mutex
	steppedBy int // who stepped down last, or -1
	steppedAt time.Time
	took      []time.Duration
}

// campaign calls Lead again and again, until ctx ends.
func (s *stepDownRecord) campaign(ctx context.Context, t *testing.T, candidate int, db *sql.DB) error {
	for turn := 0; ; turn++ {
		want := []error{nil, errStepDown}[turn%2]
		err := advisory.Lead(ctx, db, testKey(t), func(context.Context) error {
			s.lead(t, candidate)
			return want
		})
		if ctx.Err() != nil && (errors.Is(err, context.Canceled) || errors.Is(err, want)) {
			return nil
		}
		if !errors.Is(err, want) || want == nil && err != nil {
			return fmt.Errorf("Lead returned %v, want fn's %v", err, want)
		}
	}
}

// lead leads until another candidate waits, and for a moment more.
func (s *stepDownRecord) lead(t *testing.T, candidate int) {
	if n := s.leaders.Add(1); n > 1 {
		t.Errorf("%d lead", n)
	}
	begun := time.Now()
	waitForWaiters(t, adminDB(t), testKey(t), 1)
	time.Sleep(rand.N(100 * time.Millisecond)) // some term: the end of no poll interval
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.steppedBy >= 0 && s.steppedBy != candidate {
		s.took = append(s.took, begun.Sub(s.steppedAt))
	}
	if len(s.took) == s.enough {
		s.stop()
	}
	s.leaders.Add(-1)
	s.steppedBy, s.steppedAt = candidate, time.Now()
}

func TestLeadEndsWithItsContext(t *testing.T) {
	t.Parallel()
	eachDriver(t, func(t *testing.T, d driver) {
		key := testKey(t)
		leader := runForLeader(t, d.open(t, server.DSN()), key)
		l := leader.leads(t)
		standby := runForLeader(t, d.open(t, server.DSN()), key)
		waitForWaiters(t, adminDB(t), key, 1)

		standby.cancel()
		if err := standby.ended(t); !errors.Is(err, context.Canceled) || !errors.Is(err, advisory.ErrNotAcquired) {
			t.Errorf("standby: error is %v, want that of ctx and ErrNotAcquired", err)
		}
		standby.wantStandby(t)

		leader.cancel()
		await(t, "fn's ctx ends", l.ctx.Done())
		if cause := context.Cause(l.ctx); !errors.Is(cause, context.Canceled) || errors.Is(cause, advisory.ErrLost) {
			t.Errorf("leader: the cause is %v, want that of ctx", cause)
		}
		l.stepDown(errStepDown)
		if err := leader.ended(t); !errors.Is(err, errStepDown) || errors.Is(err, advisory.ErrLost) {
			t.Errorf("leader: error is %v, want fn's", err)
		}
		wantFree(t, adminDB(t), key)
	})
}

func TestClosedDBEndsLead(t *testing.T) {
	t.Parallel()
	bothDrivers(t, func(t *testing.T, d driver) {
		t.Run("before", func(t *testing.T) {
			db := d.open(t, server.DSN())
			db.Close()
			if err := runForLeader(t, db, testKey(t)).ended(t); err == nil || !strings.Contains(err.Error(), "database is closed") {
				t.Errorf("error is %v", err)
			}
		})
		// A connection in use outlives the pool.
		t.Run("leader", func(t *testing.T) {
			db, key := d.open(t, server.DSN()), testKey(t)
			c := runForLeader(t, db, key, quick...)
			l := c.leads(t)
			db.Close()
			terminateHolder(t, adminDB(t), key)
			await(t, "fn's ctx ends", l.ctx.Done())
			l.stepDown(nil)
			if err := c.ended(t); err == nil || !strings.Contains(err.Error(), "database is closed") {
				t.Errorf("error is %v", err)
			}
		})
		t.Run("standby", func(t *testing.T) {
			db, key := d.open(t, server.DSN()), testKey(t)
			hold(t, adminDB(t), key)
			c := runForLeader(t, db, key)
			waitForWaiters(t, adminDB(t), key, 1)
			db.Close()
			if err := c.ended(t); err == nil || !strings.Contains(err.Error(), "database is closed") {
				t.Errorf("error is %v", err)
			}
		})
	})
}

func TestLeaderThatLosesItsLockCampaignsAgainAfterItsWork(t *testing.T) {
	t.Parallel()
	eachDriver(t, func(t *testing.T, d driver) {
		t.Parallel()
		key, log := testKey(t), newLogbook()
		first := runForLeader(t, d.open(t, server.DSN()), key, append(quick, log.option())...)
		l := first.leads(t)
		second := runForLeader(t, d.open(t, server.DSN()), key, quick...)
		waitForWaiters(t, adminDB(t), key, 1)

		terminateHolder(t, adminDB(t), key)
		await(t, "fn's ctx ends", l.ctx.Done())
		if cause := context.Cause(l.ctx); !errors.Is(cause, advisory.ErrLost) {
			t.Errorf("the cause is %v, want ErrLost", cause)
		}
		successor := second.leads(t)
		// The first goes on with its work. It may not even wait in the queue.
		if n, err := locks(t.Context(), adminDB(t), key, false); n > 0 || err != nil {
			t.Errorf("%d campaign beside their work (%v)", n, err)
		}
		l.stepDown(errStepDown)
		waitForWaiters(t, adminDB(t), key, 1)
		first.wantStandby(t)
		log.waitFor(t, "leadership lost", 1)

		successor.stepDown(nil)
		if err := second.ended(t); err != nil {
			t.Error(err)
		}
		first.leads(t).stepDown(nil)
		if err := first.ended(t); err != nil {
			t.Errorf("error is %v, of the lost leadership", err)
		}
		wantFree(t, adminDB(t), key)
	})
}

// An Observer tells who leads, over a loss, too.
func TestAnObserverTellsWhoLeads(t *testing.T) {
	t.Parallel()
	bothDrivers(t, func(t *testing.T, d driver) {
		t.Parallel()
		key := testKey(t)
		allowLog(t, terminated)
		type candidate struct {
			*campaign
			leads atomic.Bool
		}
		start := func() *candidate {
			c := new(candidate)
			o := &advisory.Observer{
				HoldStart: func(ctx context.Context, _ advisory.LockInfo) context.Context {
					c.leads.Store(true)
					return ctx
				},
				HoldEnd: func(context.Context, advisory.LockInfo, time.Duration, error) { c.leads.Store(false) },
			}
			c.campaign = runForLeader(t, d.open(t, server.DSN()), key, append(quick[:len(quick):len(quick)], advisory.Observe(o), newLogbook().option())...)
			return c
		}
		want := func(c *candidate, leads bool) {
			t.Helper()
			waitFor(t, fmt.Sprintf("the Observer says %v", leads), func() (bool, error) { return c.leads.Load() == leads, nil })
		}
		first := start()
		l := first.campaign.leads(t)
		want(first, true)
		second := start()
		waitForWaiters(t, adminDB(t), key, 1)
		want(second, false)
		terminateHolder(t, adminDB(t), key)
		successor := second.campaign.leads(t)
		want(second, true)
		await(t, "fn's ctx ends", l.ctx.Done())
		l.stepDown(nil)
		want(first, false)
		waitForWaiters(t, adminDB(t), key, 1)
		successor.stepDown(nil)
		want(second, false)
		l = first.campaign.leads(t)
		want(first, true)
		l.stepDown(nil)
		want(first, false)
		if err := errors.Join(first.ended(t), second.ended(t)); err != nil {
			t.Error(err)
		}
	})
}

func TestLeaderThatIgnoresItsLossIsWarnedAboutAndNeverDoubled(t *testing.T) {
	t.Parallel()
	const every = shortTimeout // quick's
	bothDrivers(t, func(t *testing.T, d driver) {
		t.Parallel()
		key, log := testKey(t), newLogbook()
		c := runForLeader(t, d.open(t, server.DSN()), key, append(quick, log.option())...)
		l := c.leads(t)
		terminateHolder(t, adminDB(t), key)
		await(t, "fn's ctx ends", l.ctx.Done())
		lost := time.Now()

		// The lock is free, and nobody takes it.
		const overdue = "goes on after its ctx has ended"
		log.waitFor(t, overdue, 3)
		if n := c.running.Load(); n != 1 {
			t.Errorf("fn runs %d times, want once", n)
		}
		wantFree(t, adminDB(t), key)
		for i, at := range log.times(overdue)[:3] {
			// Less than a heartbeat is between the loss and our notice of it.
			if early := time.Duration(i+1)*every - at.Sub(lost); early > 50*time.Millisecond {
				t.Errorf("warning %d came %v early", i+1, early)
			}
		}

		l.stepDown(nil)
		again := c.leads(t)
		warnings := len(log.times(overdue))
		again.stepDown(nil)
		if err := c.ended(t); err != nil {
			t.Error(err)
		}
		if n := len(log.times(overdue)); n != warnings {
			t.Error("a leader in office is warned about")
		}
	})
}

func TestLeadOutlivesAnOutageOfTheServer(t *testing.T) {
	t.Parallel()
	slow := []advisory.Option{advisory.Heartbeat(time.Second), advisory.HolderTimeout(15 * time.Second)} // beside other tests
	s := ownServer(t)
	bothDrivers(t, func(t *testing.T, d driver) {
		if err := s.Kill(); err != nil {
			t.Fatal(err)
		}
		db, key, log := d.open(t, s.DSN()), testKey(t), newLogbook()
		c := runForLeader(t, db, key, append(slow, log.option())...)

		// Nobody answers at first.
		const missed, back = "the server cannot be reached", "the server is back"
		log.waitFor(t, missed, 1)
		restart := func(mode string) {
			t.Helper()
			if err := s.Restart(t.Context(), mode); err != nil {
				t.Fatal(err)
			}
		}
		restart("fast")
		l := c.leads(t)
		if n, m := len(log.times(missed)), len(log.times(back)); n != 1 || m != 1 || len(log.times("")) != n+m {
			t.Errorf("the Logger is told %d times that the server is missed, %d times that it is back, %d times in all", n, m, len(log.times("")))
		}

		// And again, under a leader and a standby.
		standby := runForLeader(t, d.open(t, s.DSN()), key, slow...)
		watch := d.open(t, withParams(t, s.DSN(), "application_name", "watch"))
		waitForWaiters(t, watch, key, 1)
		restart("immediate")
		await(t, "fn's ctx ends", l.ctx.Done())
		if cause := context.Cause(l.ctx); !errors.Is(cause, advisory.ErrLost) {
			t.Errorf("the cause is %v, want ErrLost", cause)
		}
		l.stepDown(nil)
		select {
		case l = <-c.runs:
			l.stepDown(nil)
			standby.leads(t).stepDown(nil)
		case l = <-standby.runs:
			l.stepDown(nil)
			c.leads(t).stepDown(nil)
		case <-time.After(20 * time.Second):
			t.Fatal("nobody leads after the restart")
		}
		if err := errors.Join(c.ended(t), standby.ended(t)); err != nil {
			t.Error(err)
		}
	})
}

func TestLeadIsNotReentrant(t *testing.T) {
	t.Parallel()
	eachDriver(t, func(t *testing.T, d driver) {
		db, key := d.open(t, server.DSN()), testKey(t)
		nothing := func(context.Context) error { return nil }
		lead := func(ctx context.Context, fn func(context.Context) error) error {
			return advisory.Lead(ctx, db, key, fn)
		}
		with := func(ctx context.Context, fn func(context.Context) error) error {
			return advisory.WithLock(ctx, db, key, fn)
		}
		for i, ways := range [][2]func(context.Context, func(context.Context) error) error{{lead, lead}, {lead, with}, {with, lead}} {
			if err := ways[0](soon(t), func(ctx context.Context) error { return ways[1](ctx, nothing) }); !errors.Is(err, advisory.ErrReentrant) {
				t.Errorf("%d: error is %v, want ErrReentrant", i, err)
			}
		}
		if err := lead(soon(t), func(ctx context.Context) error {
			return advisory.Lead(ctx, db, advisory.Name("another "+t.Name()), nothing)
		}); err != nil {
			t.Errorf("another key: %v", err)
		}
		wantClean(t, db)
	})
}

func TestLeaderThatPanicsReleases(t *testing.T) {
	t.Parallel()
	eachDriver(t, func(t *testing.T, d driver) {
		db, key := d.open(t, server.DSN()), testKey(t)
		var panicked any
		func() {
			defer func() { panicked = recover() }()
			_ = advisory.Lead(t.Context(), db, key, func(context.Context) error { panic(errStepDown) })
		}()
		if panicked != errStepDown {
			t.Errorf("panic value is %v, want %v", panicked, errStepDown)
		}
		wantGranted(t, adminDB(t), key)

		exited := make(chan struct{})
		go func() {
			defer close(exited)
			_ = advisory.Lead(t.Context(), db, key, func(context.Context) error { runtime.Goexit(); return nil })
			t.Error("Goexit did not come through")
		}()
		await(t, "the goroutine ends", exited)
		wantGranted(t, adminDB(t), key)
		wantClean(t, db)
	})
}

func TestStandbyCostsNextToNothing(t *testing.T) {
	t.Parallel()
	const window, perSecond = 2500 * time.Millisecond, 10
	bothDrivers(t, func(t *testing.T, d driver) {
		t.Parallel()
		dsn := inDatabase(t) // for its own statistics
		key, name := testKey(t), databaseOf(t, dsn)
		count := func(query string) (n int) {
			t.Helper()
			if err := adminDB(t).QueryRow(query, name).Scan(&n); err != nil {
				t.Fatal(err)
			}
			return n
		}
		sessions := func() int {
			return count(`SELECT count(*) FROM pg_stat_activity WHERE datname = $1 AND backend_type = 'client backend'`)
		}
		transactions := func() int {
			return count(`SELECT xact_commit + xact_rollback FROM pg_stat_database WHERE datname = $1`)
		}
		hold(t, d.open(t, dsn), key)
		waitFor(t, "the holder is alone", func() (bool, error) { return sessions() == 1, nil })
		before := transactions()
		db := d.open(t, dsn)
		c := runForLeader(t, db, key)
		waitFor(t, "the standby waits", func() (bool, error) { return sessions() == 2, nil })
		<-time.After(window) // of the measurement
		if n := sessions() - 1; n != 1 {
			t.Errorf("the standby has %d connections, want 1", n)
		}
		c.cancel()
		if err := c.ended(t); !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
		// A session hands its counters over when it ends.
		db.Close()
		waitFor(t, "the standby's session has ended", func() (bool, error) { return sessions() == 1, nil })
		limit := int(perSecond*window.Seconds()) + 6 // for what opens the session
		if got := transactions() - before; got > limit {
			t.Errorf("%d transactions in %v, want %d at most", got, window, limit)
		} else {
			t.Logf("%d transactions in %v", got, window)
		}
		c.wantStandby(t)
	})
}

func databaseOf(t testing.TB, dsn string) (name string) {
	t.Helper()
	db, err := drivers[1].openDB(dsn)
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	if err := db.QueryRow("SELECT current_database()").Scan(&name); err != nil {
		t.Fatal(err)
	}
	return name
}
