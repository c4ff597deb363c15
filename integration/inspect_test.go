package integration

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"math"
	"os"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/pgadvisory/advisory"
	"github.com/pgadvisory/advisory/integration/internal/testkit"
)

// A session is one session, with a name, that takes locks without the package under test. What it
// has in the server's log is its own affair.
type session struct {
	conn *sql.Conn
	pid  int
	addr string // as the server sees it
	name string
}

func newSession(t testing.TB, d driver, dsn, name string) session {
	t.Helper()
	db, err := d.openDB(withParams(t, dsn, "application_name", name))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { db.Close() })
	conn, err := db.Conn(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	s := session{conn: conn, name: name}
	if err := conn.QueryRowContext(t.Context(), "SELECT pg_backend_pid(), coalesce(host(inet_client_addr()), '')").Scan(&s.pid, &s.addr); err != nil {
		t.Fatal(err)
	}
	return s
}

// take takes key with PostgreSQL's function ("" or "_shared"), and holds it until the
// test ends.
func (s session) take(t testing.TB, key advisory.Key, shared string) {
	t.Helper()
	if _, err := s.conn.ExecContext(t.Context(), "SELECT pg_advisory_lock"+shared+"("+key.SQL()+")"); err != nil {
		t.Fatal(err)
	}
}

// wait is take, in the background: it returns when the session waits.
func (s session) wait(t testing.TB, key advisory.Key, shared string) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	var done sync.WaitGroup
	done.Go(func() {
		_, err := s.conn.ExecContext(ctx, "SELECT pg_advisory_lock"+shared+"("+key.SQL()+")")
		if err != nil && ctx.Err() == nil {
			t.Error(err)
		}
	})
	t.Cleanup(func() { cancel(); done.Wait() })
	// waitstart is written a moment after the row is there.
	waitFor(t, s.name+" waits", func() (ok bool, err error) {
		err = adminDB(t).QueryRow("SELECT EXISTS (SELECT FROM pg_locks WHERE pid = $1 AND NOT granted AND waitstart IS NOT NULL)", s.pid).Scan(&ok)
		return ok, err
	})
}

// brief is what the tests compare of a Holder.
func brief(h advisory.Holder) string {
	return fmt.Sprintf("%d granted=%t shared=%t app=%s", h.PID, h.Granted, h.Shared, h.ApplicationName)
}

func (s session) brief(granted, shared bool) string {
	return brief(advisory.Holder{PID: s.pid, Granted: granted, Shared: shared, ApplicationName: s.name})
}

func wantHolders(t testing.TB, q advisory.Querier, key advisory.Key, want ...string) []advisory.Holder {
	t.Helper()
	holders, err := advisory.Holders(t.Context(), q, key)
	if err != nil {
		t.Errorf("%v: %v", key, err)
		return nil
	}
	var got []string
	for _, h := range holders {
		got = append(got, brief(h))
	}
	if !slices.Equal(got, want) {
		t.Errorf("%v:\ngot  %s\nwant %s", key, strings.Join(got, "\n     "), strings.Join(want, "\n     "))
	}
	return holders
}

func TestHoldersNamesWhoHoldsAndThenWhoWaitsLongestFirst(t *testing.T) {
	t.Parallel()
	eachDriver(t, func(t *testing.T, d driver) {
		t.Parallel()
		dsn, key := server.DSN(), testKey(t)
		db := d.open(t, dsn)
		wantHolders(t, db, key)

		// The oldest session waits last: it is not their age that counts.
		third := newSession(t, d, dsn, "third")
		billing := newSession(t, d, dsn, `bil"ling`)
		first, second := newSession(t, d, dsn, "first"), newSession(t, d, dsn, "second")
		billing.take(t, key, "")
		first.wait(t, key, "")
		second.wait(t, key, "_shared")
		third.wait(t, key, "")
		want := []string{billing.brief(true, false), first.brief(false, false), second.brief(false, true), third.brief(false, false)}

		conn, err := db.Conn(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		tx, err := db.BeginTx(t.Context(), nil)
		if err != nil {
			t.Fatal(err)
		}
		defer tx.Rollback()
		wantHolders(t, db, key, want...)
		wantHolders(t, conn, key, want...)
		holders := wantHolders(t, tx, key, want...)
		if !t.Failed() {
			wantDetails(t, tx, holders)
		}
	})
}

// wantDetails looks at what Holders says of each session besides: one holds the lock, the
// others wait for it.
func wantDetails(t *testing.T, tx *sql.Tx, holders []advisory.Holder) {
	t.Helper()
	var now time.Time
	var user, addr string
	if err := tx.QueryRow("SELECT clock_timestamp(), current_user, coalesce(host(inet_client_addr()), '')").Scan(&now, &user, &addr); err != nil {
		t.Fatal(err)
	}
	recent := func(at time.Time) bool { return at.Before(now) && at.After(now.Add(-time.Minute)) }
	for i, h := range holders {
		state, query := "active", "pg_advisory_lock"
		if h.Granted {
			state = "idle"
		}
		if h.User != user || h.ClientAddr != addr || h.State != state || !strings.Contains(h.Query, query) || !recent(h.SessionStart) {
			t.Errorf("%d: %+v", i, h)
		}
		if h.Granted != h.WaitStart.IsZero() || !h.Granted && !recent(h.WaitStart) {
			t.Errorf("%d: WaitStart is %v", i, h.WaitStart)
		}
		if i > 1 && h.WaitStart.Before(holders[i-1].WaitStart) {
			t.Errorf("%d has waited longer than %d", i, i-1)
		}
	}
}

func TestHoldersOfSharedLock(t *testing.T) {
	t.Parallel()
	eachDriver(t, func(t *testing.T, d driver) {
		dsn, key := server.DSN(), testKey(t)
		a, b, writer := newSession(t, d, dsn, "a"), newSession(t, d, dsn, "b"), newSession(t, d, dsn, "writer")
		a.take(t, key, "_shared")
		b.take(t, key, "_shared")
		writer.wait(t, key, "")
		wantHolders(t, d.open(t, dsn), key, a.brief(true, true), b.brief(true, true), writer.brief(false, false))
	})
}

// Keys with the same bits, in the other space or in another database, are other locks.
func TestHoldersOfEveryKey(t *testing.T) {
	t.Parallel()
	dsn, elsewhere := inDatabase(t), inDatabase(t)
	eachDriver(t, func(t *testing.T, d driver) {
		db, other := d.open(t, dsn), newSession(t, d, elsewhere, "other")
		ofID, ofPair := newSession(t, d, dsn, "id"), newSession(t, d, dsn, "pair")
		for _, pair := range [][2]int32{{0, 0}, {7, 42}, {-1, -1}, {7, -42}, {math.MinInt32, math.MaxInt32}} {
			id := advisory.ID(int64(pair[0])<<32 | int64(uint32(pair[1])))
			key := advisory.Pair(pair[0], pair[1])
			ofID.take(t, id, "")
			wantHolders(t, db, key)
			ofPair.take(t, key, "")
			other.take(t, id, "")
			wantHolders(t, db, id, ofID.brief(true, false))
			wantHolders(t, db, key, ofPair.brief(true, false))
		}
	})
}

// A role that may not see the sessions of others is told what it may see.
func TestHoldersForAnUnprivilegedRole(t *testing.T) {
	t.Parallel()
	eachDriver(t, func(t *testing.T, d driver) {
		dsn, key := server.DSN(), testKey(t)
		role := testkit.Unique("advisory_nobody")
		setUp(t, adminDB(t), "CREATE ROLE "+role)
		t.Cleanup(func() { setUp(t, adminDB(t), "DROP ROLE "+role) })
		holder, waiter := newSession(t, d, dsn, "holder"), newSession(t, d, dsn, "waiter")
		holder.take(t, key, "")
		waiter.wait(t, key, "")

		nobody := newSession(t, d, watchLog(t, withParams(t, dsn, "application_name", "nobody")), "nobody")
		if _, err := nobody.conn.ExecContext(t.Context(), "SET ROLE "+role); err != nil {
			t.Fatal(err)
		}
		holders, err := advisory.Holders(t.Context(), nobody.conn, key)
		if err != nil || len(holders) != 2 {
			t.Fatalf("got %v, %v, want two rows", holders, err)
		}
		for i, want := range []session{holder, waiter} {
			h := holders[i]
			if h.PID != want.pid || h.Granted != (i == 0) || h.Shared || h.WaitStart.IsZero() != h.Granted {
				t.Errorf("got %+v, want pid %d", h, want.pid)
			}
			if h.Query != "" || h.State != "" || h.ClientAddr != "" {
				t.Errorf("more than the role may see: %+v", h)
			}
		}
	})
}

func TestHoldersQueryOfTheDocumentationSeesTheSame(t *testing.T) {
	t.Parallel()
	source, err := os.ReadFile("../inspect.go")
	if err != nil {
		t.Fatal(err)
	}
	query := regexp.MustCompile(`(?s)//\t(SELECT [^;]*'nightly-report'[^;]*);`).FindSubmatch(source)
	if query == nil {
		t.Fatal("no query in the doc comment of Holders")
	}
	text := strings.ReplaceAll(string(query[1]), "//\t", "")
	eachDriver(t, func(t *testing.T, d driver) {
		key, dsn := advisory.Name("nightly-report"), inDatabase(t) // the key is anybody's
		holder, waiter := newSession(t, d, dsn, "holder"), newSession(t, d, dsn, "waiter")
		holder.take(t, key, "_shared")
		waiter.wait(t, key, "")
		newSession(t, d, dsn, "of another lock").take(t, advisory.Name("other"), "")
		newSession(t, d, inDatabase(t), "in another database").take(t, key, "")

		db := d.open(t, dsn)
		rows, err := db.Query(text)
		if err != nil {
			t.Fatal(err)
		}
		defer rows.Close()
		var got []string
		for rows.Next() {
			var h advisory.Holder
			var mode string
			var waitStart, user, addr, state, query any
			if err := rows.Scan(&h.PID, &h.Granted, &mode, &waitStart, &user, &h.ApplicationName, &addr, &state, &query); err != nil {
				t.Fatal(err)
			}
			h.Shared = mode == "ShareLock"
			got = append(got, brief(h))
		}
		if err := rows.Err(); err != nil {
			t.Fatal(err)
		}
		wantHolders(t, db, key, got...)
		wantHolders(t, db, key, holder.brief(true, true), waiter.brief(false, false))
	})
}

func TestTimeoutNamesTheHolder(t *testing.T) {
	t.Parallel()
	eachDriver(t, func(t *testing.T, d driver) {
		t.Parallel()
		db := d.open(t, server.DSN())
		if err := db.Ping(); err != nil { // opening a connection takes from the Timeout
			t.Fatal(err)
		}
		holder, another := newSession(t, d, server.DSN(), "billing"), newSession(t, d, server.DSN(), "another")
		held := fmt.Sprintf(`pid %d (app "billing", %s)`, holder.pid, holder.addr)
		wantHolder := func(t *testing.T, err error, want string) {
			t.Helper()
			var e *advisory.Error
			if !errors.As(err, &e) || e.Holder != want || !strings.Contains(err.Error(), ": held by "+want+" [") {
				t.Errorf("error is %v, want it to name %q", err, want)
			}
		}
		// Not on a conn or a transaction of the caller's, which the question could cost.
		eachWay(t, openers, func(t *testing.T, w way) {
			key := testKey(t)
			holder.take(t, key, "")
			wantHolder(t, tooLate(t, w, db, key), held)
			shared := advisory.Name("shared " + t.Name())
			holder.take(t, shared, "_shared")
			another.take(t, shared, "_shared")
			wantHolder(t, tooLate(t, w, db, shared), held+" and 1 other")
		})
		wantClean(t, db)
	})
}

// tooLate waits for the lock of key in vain. The holder is asked for within 400 ms, which is too short
// for a machine that stands still: there is another try then.
func tooLate(t *testing.T, w way, db *sql.DB, key advisory.Key) (err error) {
	t.Helper()
	for range 3 {
		err = w.with(t.Context(), db, key, noWork, advisory.Timeout(100*time.Millisecond))
		if !errors.Is(err, advisory.ErrNotAcquired) || strings.Contains(err.Error(), "held by") {
			break
		}
	}
	return err
}

// events are what an Observer is told.
type events struct {
	mu   sync.Mutex
	list []string
}

func (e *events) add(event string, info advisory.LockInfo, took time.Duration, err error) {
	what := "ok"
	switch {
	case errors.Is(err, advisory.ErrLost):
		what = "lost"
	case errors.Is(err, advisory.ErrNotAcquired):
		what = "not acquired"
	case err != nil:
		what = err.Error()
	}
	if took < 0 || took > time.Minute {
		what += fmt.Sprintf(" after %v", took)
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	e.list = append(e.list, fmt.Sprintf("%s %s: %s", info.Function, event, what))
}

func (e *events) option() advisory.Option {
	return advisory.Observe(&advisory.Observer{
		AcquireStart: func(ctx context.Context, i advisory.LockInfo) context.Context {
			e.add("acquiring", i, 0, nil)
			return ctx
		},
		AcquireEnd: func(_ context.Context, i advisory.LockInfo, took time.Duration, err error) {
			e.add("acquired", i, took, err)
		},
		HoldStart: func(ctx context.Context, i advisory.LockInfo) context.Context {
			e.add("holding", i, 0, nil)
			return context.WithValue(ctx, observedKey{}, e)
		},
		Lost: func(_ context.Context, i advisory.LockInfo, err error) { e.add("lost", i, 0, err) },
		HoldEnd: func(_ context.Context, i advisory.LockInfo, held time.Duration, err error) {
			e.add("released", i, held, err)
		},
	})
}

func (e *events) has(event string) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	return slices.Contains(e.list, event)
}

func (e *events) want(t testing.TB, want ...string) {
	t.Helper()
	e.mu.Lock()
	defer e.mu.Unlock()
	if !slices.Equal(e.list, want) {
		t.Errorf("the Observer is told\n%s\nwant\n%s", strings.Join(e.list, "\n"), strings.Join(want, "\n"))
	}
	e.list = nil
}

func TestObserverIsToldWhatHappens(t *testing.T) {
	t.Parallel()
	bothDrivers(t, func(t *testing.T, d driver) {
		db, key := d.open(t, server.DSN()), testKey(t)
		var told events
		err := advisory.WithLock(t.Context(), db, key, func(ctx context.Context) error {
			if ctx.Value(observedKey{}) != &told {
				t.Error("fn's ctx is not made from HoldStart's")
			}
			return nil
		}, told.option())
		if err != nil {
			t.Error(err)
		}
		told.want(t, "WithLock acquiring: ok", "WithLock acquired: ok", "WithLock holding: ok", "WithLock released: ok")

		release := hold(t, adminDB(t), key)
		_ = withLock.with(t.Context(), db, key, noWork, advisory.NoWait(), told.option())
		told.want(t, "WithLock acquiring: ok", "WithLock acquired: not acquired")
		_ = withTxLock.with(t.Context(), db, key, noWork, advisory.Timeout(20*time.Millisecond), told.option())
		told.want(t, "WithTxLock acquiring: ok", "WithTxLock acquired: not acquired")
		release()

		c := runForLeader(t, db, key, append(quick, told.option())...)
		l := c.leads(t)
		terminateHolder(t, adminDB(t), key)
		await(t, "fn's ctx ends", l.ctx.Done())
		// Lost is called after fn's ctx has ended.
		waitFor(t, "the Observer is told of the loss", func() (bool, error) { return told.has("Lead lost: lost"), nil })
		l.stepDown(nil)
		c.leads(t).stepDown(nil)
		if err := c.ended(t); err != nil {
			t.Error(err)
		}
		told.want(t,
			"Lead acquiring: ok", "Lead acquired: ok", "Lead holding: ok", "Lead lost: lost", "Lead released: lost",
			"Lead acquiring: ok", "Lead acquired: ok", "Lead holding: ok", "Lead released: ok")
	})
}

type observedKey struct{}
