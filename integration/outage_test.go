package integration

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgconn"
	"github.com/lib/pq"
	"golang.org/x/sync/errgroup"

	"github.com/pgadvisory/advisory"
)

// leadOnce is Lead as a way to wait: it leads once, and steps down.
var leadOnce = way{name: "Lead", closure: true, opens: true, beats: true,
	run: func(ctx context.Context, db *sql.DB, key advisory.Key, fn work, o options) error {
		return advisory.Lead(ctx, db, key, func(ctx context.Context) error { return fn(ctx, db) }, o.acquire...)
	}}

// lines are the records that the Logger was given, each as a line of text.
func (l *logbook) lines() (lines []string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, r := range l.records {
		var b strings.Builder
		fmt.Fprintf(&b, "%v %q", r.Level, r.Message)
		r.Attrs(func(a slog.Attr) bool {
			fmt.Fprintf(&b, " %s=%q", a.Key, a.Value)
			return true
		})
		lines = append(lines, b.String())
	}
	return lines
}

// durations are those that a record of the Logger says.
func (l *logbook) durations(i int) (durations []time.Duration) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.records[i].Attrs(func(a slog.Attr) bool {
		if a.Value.Kind() == slog.KindDuration {
			durations = append(durations, a.Value.Duration())
		}
		return true
	})
	return durations
}

// wantOutage fails the test unless the Logger was told twice: that the server is missed, for one of the
// reasons, and that it is back, after about so long.
func (l *logbook) wantOutage(t testing.TB, lasted time.Duration, reasons ...string) {
	t.Helper()
	lines := l.lines()
	if len(lines) != 2 {
		t.Errorf("the Logger was told %d lines, want 2; the first:\n%s", len(lines), strings.Join(lines[:min(len(lines), 10)], "\n"))
		return
	}
	t.Log(strings.Join(lines, "\n"))
	if !slices.ContainsFunc(reasons, func(reason string) bool { return strings.Contains(lines[0], reason) }) {
		t.Errorf("the first line is %s, want one of the reasons %q", lines[0], reasons)
	}
	if strings.Contains(lines[0], "connection failed while waiting") {
		t.Errorf("the first line is %s, which is about one wait", lines[0])
	}
	if said := l.durations(1); len(said) != 1 || said[0] < lasted-time.Second || said[0] > lasted+4*time.Second {
		t.Errorf("the second line says %v, want about %v", said, lasted)
	}
}

// wantOneAtATime fails the test if two attempts to connect were under way at a time. It returns how long the pauses
// between them were. A driver that is told of a dead connection connects again without a pause, and that is
// one attempt of the package.
func wantOneAtATime(t testing.TB, dials []dial) (gaps []time.Duration) {
	t.Helper()
	slices.SortFunc(dials, func(a, b dial) int { return a.began.Compare(b.began) })
	overlaps := 0
	for i, d := range dials[min(1, len(dials)):] {
		gap := d.began.Sub(dials[i].ended)
		switch {
		case gap < 0:
			t.Logf("attempt %d began %v after the first, and %v before the end of the one before", i+2, d.began.Sub(dials[0].began), -gap)
			// Who was between two tries when the outage began finds out by one of its own.
			if d.began.Sub(dials[0].began) > time.Second {
				overlaps++
			}
		case gap > 15*time.Millisecond:
			gaps = append(gaps, gap.Round(time.Millisecond))
		}
	}
	if overlaps > 0 {
		t.Errorf("%d of %d attempts were begun while another was under way", overlaps, len(dials))
	}
	return gaps
}

// wantGrowingPauses fails the test unless pauses grow from first to last, at most. They are random, by half.
func wantGrowingPauses(t testing.TB, gaps []time.Duration, first, last time.Duration) {
	t.Helper()
	const slack = 1500 * time.Millisecond // to connect, on a busy machine
	switch {
	case len(gaps) < 3:
		t.Errorf("pauses %v, too few to show anything", gaps)
	case slices.Min(gaps[:3]) > 4*first:
		t.Errorf("pauses %v, want the first ones from %v", gaps, first)
	case slices.Max(gaps) > last+slack || gaps[len(gaps)-1] < gaps[0]:
		t.Errorf("pauses %v, want them to grow, to %v at most", gaps, last)
	}
}

// An outage is one event, however many wait: they share the attempts to reach the server, and the
// Logger is told of its beginning and its end.
func TestOutageIsOneEventForAllWaits(t *testing.T) {
	t.Parallel()
	const lasts, waits, most = 10 * time.Second, 20, 100
	bothAtOnce(t, func(t *testing.T, d driver) {
		allowLog(t, clientGone)
		r := newRelay(t, server)
		db := d.open(t, r.dsn)
		log := newLogbook()
		logger := log.option()

		var keys []advisory.Key
		for i := range waits {
			keys = append(keys, advisory.Name(fmt.Sprint(t.Name(), i)))
		}
		release := holdAll(t, adminDB(t), keys)
		ctx := soon(t)
		var g errgroup.Group
		for i, key := range keys {
			w := []way{withLock, withLock, leadOnce, withTxLock, withLock, withConnLock, withLocks, acquire, withLock, withLock}[i%10]
			g.Go(func() error {
				if err := w.with(ctx, db, key, noWork, logger); err != nil {
					return fmt.Errorf("%s: %w", w.name, err)
				}
				return nil
			})
		}
		// Each has been refused once and asks again.
		waitFor(t, "all wait", func() (bool, error) { return askedTwice(r.sent(), keys) })

		r.answerDials(func() []byte { time.Sleep(10 * time.Millisecond); return nil })
		began := time.Now()
		r.cut(nil)
		waitFor(t, "the Logger is told", func() (bool, error) { return len(log.lines()) > 0, nil })
		if took := time.Since(began); took > 4*time.Second {
			t.Errorf("the Logger is told after %v", took)
		}
		time.Sleep(time.Until(began.Add(lasts)))
		r.answerDials(nil)
		wantFewAttempts(t, r, lasts, most)
		waitFor(t, "the Logger is told of the end", func() (bool, error) { return len(log.lines()) > 1, nil })

		back := time.Now()
		release()
		if err := g.Wait(); err != nil {
			t.Error(err)
		}
		if took := time.Since(back); took > 5*time.Second {
			t.Errorf("all had their locks only after %v", took)
		}
		log.wantOutage(t, lasts, "EOF", "bad connection", "reset", "closed", "broken pipe")
		for _, key := range keys {
			wantFree(t, adminDB(t), key)
		}
		wantClean(t, db)
	})
}

// askedTwice tells whether two of the statements or more ask for each key.
func askedTwice(statements []string, keys []advisory.Key) (bool, error) {
	for _, key := range keys {
		n := 0
		for _, s := range statements {
			if strings.Contains(s, key.SQL()) {
				n++
			}
		}
		if n < 2 {
			return false, fmt.Errorf("%v has been asked for %d times", key, n)
		}
	}
	return true, nil
}

// wantFewAttempts fails the test unless there were fewer than most attempts in an outage, one at a time, with
// pauses that grow.
func wantFewAttempts(t *testing.T, r *relay, lasts time.Duration, most int) {
	t.Helper()
	dials := r.dialed()
	gaps := wantOneAtATime(t, dials)
	t.Logf("%d attempts in %v, with pauses of %v", len(dials), lasts, gaps)
	if len(dials) >= most {
		t.Errorf("%d attempts in %v, want fewer than %d", len(dials), lasts, most)
	}
	wantGrowingPauses(t, gaps, 50*time.Millisecond, 2*time.Second)
}

// A server that starts up says so to everybody who connects.
func TestFollowersOfAServerThatStartsUp(t *testing.T) {
	t.Parallel()
	const lasts, followers, most = 5 * time.Second, 50, 40
	const says = "the database system is starting up"
	bothAtOnce(t, func(t *testing.T, d driver) {
		r := newRelay(t, server)
		r.answerDials(func() []byte { time.Sleep(10 * time.Millisecond); return fatal("57P03", says) })
		db := d.open(t, r.dsn)
		log := newLogbook()
		logger := log.option()
		ctx := soon(t)
		began := time.Now()
		var g errgroup.Group
		for i := range followers {
			g.Go(func() error { return leadOnce.with(ctx, db, advisory.Name(fmt.Sprint(t.Name(), i)), noWork, logger) })
		}
		time.Sleep(time.Until(began.Add(lasts)))
		r.answerDials(nil)
		wantFewAttempts(t, r, lasts, most)
		if err := g.Wait(); err != nil {
			t.Error(err)
		}
		if took := time.Since(began); took > lasts+5*time.Second {
			t.Errorf("all have led only after %v", took)
		}
		log.wantOutage(t, lasts, says)
		wantClean(t, db)
	})
}

// isDriverError tells whether errors.As finds the driver's own error, and the SQLSTATE in it.
func isDriverError(err error, state string) bool {
	var ofPq *pq.Error
	var ofPgx *pgconn.PgError
	return errors.As(err, &ofPq) && string(ofPq.Code) == state || errors.As(err, &ofPgx) && ofPgx.Code == state
}

// A mistake is the administrator's.
type mistake struct {
	name, state, says string
	database          string // that the server does not know; "": it is the relay that refuses
}

// mistakes are those that no pause mends: what is said for them is the administrator's to read.
var mistakes = []mistake{
	{name: "database", state: "3D000", says: "does not exist", database: "advisory_no_such_database"},
	{name: "role", state: "28000", says: "role does not exist"},
	{name: "password", state: "28P01", says: "password authentication failed"},
}

func TestLeadOnAWrongDatabaseGoesOnAndSaysWhy(t *testing.T) {
	t.Parallel()
	const lasts, most = 3 * time.Second, 12
	allowLog(t, `FATAL:  database "advisory_no_such_database" does not exist`)
	bothAtOnce(t, func(t *testing.T, d driver) {
		allAtOnce(t, mistakes, func(m mistake) string { return m.name }, func(t *testing.T, m mistake) {
			r := newRelay(t, server)
			dsn := r.dsn
			if m.database != "" {
				dsn = withParams(t, dsn, "dbname", m.database)
			} else {
				r.answerDials(refusing(m.state, m.says))
			}
			db := d.open(t, dsn)
			log := newLogbook()
			began := time.Now()
			ctx, cancel := context.WithTimeout(t.Context(), lasts)
			defer cancel()
			err := leadOnce.with(ctx, db, testKey(t), noWork, log.option())
			if took := time.Since(began); took < lasts || took > lasts+3*time.Second {
				t.Errorf("Lead returned after %v, want %v", took, lasts)
			}
			if !errors.Is(err, context.DeadlineExceeded) || !isDriverError(err, m.state) || !strings.Contains(fmt.Sprint(err), m.says) {
				t.Errorf("error %v, want the end of ctx, and the server's %s", err, m.state)
			}
			lines := log.lines()
			if len(lines) == 0 || !strings.Contains(lines[0], m.says) {
				t.Errorf("the Logger was told %q, want why", lines)
			}
			if dials := r.dialed(); m.database == "" {
				gaps := wantOneAtATime(t, dials)
				t.Logf("%d attempts, with pauses of %v", len(dials), gaps)
				// lib/pq may connect twice for one attempt.
				if len(dials) < 4 || len(dials) > 2*most {
					t.Errorf("%d attempts in %v, want a few", len(dials), lasts)
				}
			}
		})
	})
}

// Not in parallel with other tests: the default Logger is that of all of them.
func TestLeadLogsToTheDefaultLogger(t *testing.T) {
	before := slog.Default()
	defer slog.SetDefault(before)
	bothDrivers(t, func(t *testing.T, d driver) {
		log := newLogbook()
		slog.SetDefault(slog.New(log))
		r := newRelay(t, server)
		const says = "password authentication failed"
		r.answerDials(refusing("28P01", says))
		ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
		defer cancel()
		if err := leadOnce.with(ctx, d.open(t, r.dsn), testKey(t), noWork); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("error %v, want the end of ctx", err)
		}
		if lines := log.lines(); len(lines) == 0 || !strings.Contains(lines[0], says) {
			t.Errorf("the default Logger was told %q, want %q", lines, says)
		}

		// The others are silent.
		log = newLogbook()
		slog.SetDefault(slog.New(log))
		if err := withLock.with(t.Context(), d.open(t, r.dsn), testKey(t), noWork); !isDriverError(err, "28P01") {
			t.Errorf("error %v", err)
		}
		if lines := log.lines(); len(lines) > 0 {
			t.Errorf("WithLock told the default Logger %q", lines)
		}
	})
}

// longestRepeat returns the longest part of a line that is in it twice.
func longestRepeat(line string) (longest string) {
	for i := range line {
		for strings.Contains(line[min(i+1, len(line)):], line[i:min(i+len(longest)+1, len(line))]) && i+len(longest)+1 < len(line) {
			longest = line[i : i+len(longest)+1]
		}
	}
	return longest
}

func TestLineOfALostLeadershipSaysItsCauseOnce(t *testing.T) {
	t.Parallel()
	bothDrivers(t, func(t *testing.T, d driver) {
		db := d.open(t, server.DSN())
		log := newLogbook()
		c := runForLeader(t, db, testKey(t), append(slices.Clone(quick), log.option())...)
		l := c.leads(t)
		terminateHolder(t, adminDB(t), testKey(t))
		await(t, "the leader is told", l.ctx.Done())
		l.stepDown(nil)
		log.waitFor(t, "leadership lost", 1)
		for _, line := range log.lines() {
			t.Log(line)
			if twice := longestRepeat(line); len(twice) > 20 {
				t.Errorf("%q is twice in the line %s", twice, line)
			}
		}
		c.leads(t).stepDown(nil)
		if err := c.ended(t); err != nil {
			t.Error(err)
		}
	})
}
