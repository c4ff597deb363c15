package integration

import (
	"bytes"
	"context"
	"database/sql"
	"errors"
	"fmt"
	"log/slog"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/pgadvisory/advisory"
)

// logBound logs how long something took, each time that it was tried, and fails the
// test if it once took longer than it may.
func logBound(t testing.TB, fault, what string, limit time.Duration, took []time.Duration) {
	t.Helper()
	if len(took) == 0 {
		t.Errorf("%s: %s: not measured", fault, what)
		return
	}
	slices.Sort(took)
	p50, longest := took[len(took)/2], took[len(took)-1]
	t.Logf("bound: %-20s | %-32s | n %3d | p50 %7.0f ms | max %7.0f ms | limit %6.0f ms",
		fault, what, len(took), milliseconds(p50), milliseconds(longest), milliseconds(limit))
	if longest > limit {
		t.Errorf("%s: %s: took up to %v, want at most %v", fault, what, longest, limit)
	}
}

func milliseconds(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }

// terminateHolders ends the sessions of an application that hold an advisory lock.
func terminateHolders(t testing.TB, application string) (n int) {
	t.Helper()
	allowLog(t, terminated)
	if err := adminDB(t).QueryRow(`
		SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity
		WHERE application_name = $1 AND pid IN (SELECT pid FROM pg_locks WHERE locktype = 'advisory' AND granted)`,
		application).Scan(&n); err != nil {
		t.Fatal(err)
	}
	return n
}

func wantLost(t testing.TB, what string, err error) {
	t.Helper()
	if !errors.Is(err, advisory.ErrLost) {
		t.Errorf("%s: %v, want ErrLost", what, err)
	}
}

// awaitLoss waits until ctx, that of a held lock, has ended, and fails the test unless
// that is because the lock is lost.
func awaitLoss(t testing.TB, ctx context.Context) (told bool) {
	t.Helper()
	select {
	case <-ctx.Done():
		wantLost(t, "cause", context.Cause(ctx))
		return true
	case <-time.After(10 * time.Second):
		t.Error("the holder of a lock that is lost is not told")
		return false
	}
}

// awaitLosses is awaitLoss of several locks. It returns how long after since it was told of each.
func awaitLosses(t testing.TB, locks []*advisory.Lock, since time.Time) (told []time.Duration) {
	t.Helper()
	for _, lock := range locks {
		if !awaitLoss(t, lock.Context()) {
			t.FailNow()
		}
		told = append(told, time.Since(since))
	}
	return told
}

// wantLive fails the test if ctx has ended.
func wantLive(t testing.TB, ctx context.Context) {
	t.Helper()
	if err := ctx.Err(); err != nil {
		t.Errorf("the lock's context has ended: %v", context.Cause(ctx))
	}
}

func TestLossOfSessionIsNoticed(t *testing.T) {
	bothDrivers(t, func(t *testing.T, d driver) {
		const limit = 2500 * time.Millisecond // 2 default heartbeats, and some
		// The locks of one pool would share a session, and its loss.
		const each = 8
		var pools [3 * each]*sql.DB
		for i := range pools {
			pools[i] = d.open(t, withParams(t, server.DSN(), "application_name", appName(t)))
		}

		var wg sync.WaitGroup
		defer wg.Wait()
		var mu sync.Mutex
		var noticed []time.Duration
		var cut time.Time // guarded by terminated
		terminated := make(chan struct{})
		notice := func(ctx context.Context) {
			wantLive(t, ctx)
			<-terminated
			awaitLoss(t, ctx)
			mu.Lock()
			defer mu.Unlock()
			noticed = append(noticed, time.Since(cut))
		}
		key := func(i int) advisory.Key { return advisory.Name(fmt.Sprint(t.Name(), i)) }

		held := make(chan struct{}, 3*each)
		for i := range each {
			wg.Go(func() {
				wantLost(t, "WithLock", advisory.WithLock(t.Context(), pools[3*i], key(3*i), func(ctx context.Context) error {
					held <- struct{}{}
					notice(ctx)
					return nil
				}))
			})
			wg.Go(func() {
				lock, err := advisory.Acquire(t.Context(), pools[3*i+1], key(3*i+1))
				held <- struct{}{}
				if err != nil {
					t.Error(err)
					return
				}
				notice(lock.Context())
				wantLost(t, "Release", lock.Release())
				wantLost(t, "Release, again", lock.Release())
				_, err = lock.Token(t.Context())
				wantLost(t, "Token", err)
			})
			wg.Go(func() {
				// Its error does not depend on a heartbeat, nor on fn's looking.
				wantLost(t, "WithLock that did not look", advisory.WithLock(t.Context(), pools[3*i+2], key(3*i+2), func(context.Context) error {
					held <- struct{}{}
					<-terminated
					return nil
				}))
			})
			// The heartbeats of the locks are out of step.
			for range 3 {
				<-held
			}
			time.Sleep(time.Second / each)
		}
		cut = time.Now()
		if n := terminateHolders(t, appName(t)); n != 3*each {
			t.Errorf("%d sessions terminated, want %d", n, 3*each)
		}
		close(terminated)
		wg.Wait()
		if len(noticed) != 2*each {
			t.Errorf("%d holders told, want %d", len(noticed), 2*each)
		}
		logBound(t, "terminated "+d.name, "holder told", limit, noticed)
		for _, db := range pools {
			wantClean(t, db)
		}
	})
}

// A session that the server ends tells nobody: its lock passes on at once, and until
// its next heartbeat the old holder does not know. No lease bounds that from below.
func TestTerminatedSessionIsTakenOverAtOnce(t *testing.T) {
	bothDrivers(t, func(t *testing.T, d driver) {
		holders := d.open(t, withParams(t, server.DSN(), "application_name", appName(t)))
		others := d.open(t, server.DSN())
		var took []time.Duration
		for i := range 5 {
			key := advisory.Name(fmt.Sprint(t.Name(), i))
			lock, err := advisory.Acquire(t.Context(), holders, key)
			if err != nil {
				t.Fatal(err)
			}
			begun := make(chan time.Time)
			failed := make(chan error, 1)
			go func() {
				failed <- advisory.WithLock(t.Context(), others, key, func(context.Context) error {
					begun <- time.Now()
					return nil
				})
			}()
			waitForWaiters(t, adminDB(t), key, 1)
			cut := time.Now()
			terminateHolders(t, appName(t))
			took = append(took, (<-begun).Sub(cut))
			if err := <-failed; err != nil {
				t.Error(err)
			}
			wantLost(t, "Release", lock.Release())
		}
		logBound(t, "terminated "+d.name, "successor begins", time.Second, took)
	})
}

// waitForHeartbeats waits until each of n sessions of an application that holds an
// advisory lock has sent something since a time by the server's clock: a heartbeat.
func waitForHeartbeats(t testing.TB, db *sql.DB, application string, n int, since time.Time) {
	t.Helper()
	waitFor(t, fmt.Sprintf("%d holders have sent a heartbeat", n), func() (bool, error) {
		var got int
		err := db.QueryRow(`
			SELECT count(*) FROM pg_stat_activity
			WHERE application_name = $1 AND state = 'idle' AND query_start > $2
			  AND pid IN (SELECT pid FROM pg_locks WHERE locktype = 'advisory' AND granted)`, application, since).Scan(&got)
		if err == nil && got < n {
			err = fmt.Errorf("%d have", got)
		}
		return got >= n, err
	})
}

func serverTime(t testing.TB, db *sql.DB) (now time.Time) {
	t.Helper()
	if err := db.QueryRow("SELECT clock_timestamp()").Scan(&now); err != nil {
		t.Fatal(err)
	}
	return now
}

// A release resets what the first heartbeat has set, however the lock is released.
func TestNoSettingIsLeftOnPooledConnections(t *testing.T) {
	bothDrivers(t, func(t *testing.T, d driver) {
		// The session's own setting is what a reset goes back to.
		db := d.open(t, withParams(t, server.DSN(), "application_name", appName(t), "idle_session_timeout", "77000"))
		db.SetMaxIdleConns(100)
		for name, use := range leaseUses {
			if err := use(soon(t), leaseTest{t, db, testKey(t)}); err != nil {
				t.Errorf("%s: %v", name, err)
			}
			wantFree(t, adminDB(t), testKey(t))
			settings := pooledSettings(t, db)
			if len(settings) == 0 {
				t.Errorf("%s: no pooled connection", name)
			}
			for _, s := range settings {
				if s != "77000 0 0" {
					t.Errorf("%s: a pooled connection has the timeouts %q", name, s)
				}
			}
			if t.Failed() {
				return
			}
		}
	})
}

// A leaseTest takes a lock whose session the server is told to watch.
type leaseTest struct {
	t   *testing.T
	db  *sql.DB
	key advisory.Key
}

var (
	leaseTimeout = advisory.HolderTimeout(10 * time.Second)
	leaseOptions = []advisory.Option{advisory.Heartbeat(shortHeartbeat), leaseTimeout}
	errInLease   = errors.New("fn's error")
)

// leaseUses take the lock and release it, each in another way.
var leaseUses = map[string]func(ctx context.Context, l leaseTest) error{
	"WithLock": func(ctx context.Context, l leaseTest) error {
		return l.withLock(ctx, l.beat, leaseOptions...)
	},
	"WithLock shared": func(ctx context.Context, l leaseTest) error {
		return l.withLock(ctx, l.beat, append(slices.Clone(leaseOptions), advisory.Shared())...)
	},
	"WithLocks": func(ctx context.Context, l leaseTest) error {
		return advisory.WithLocks(ctx, l.db, []advisory.Key{l.key, advisory.ID(7)}, func(context.Context) error { return l.beat() }, leaseOptions...)
	},
	"error": func(ctx context.Context, l leaseTest) error {
		err := l.withLock(ctx, func() error { return errors.Join(l.beat(), errInLease) }, leaseOptions...)
		if !errors.Is(err, errInLease) || errors.Is(err, advisory.ErrLost) {
			l.t.Errorf("%v, want fn's error alone", err)
		}
		return nil
	},
	"end of ctx": func(ctx context.Context, l leaseTest) error {
		ctx, cancel := context.WithCancel(ctx)
		return l.withLock(ctx, func() error { defer cancel(); return l.beat() }, leaseOptions...)
	},
	"panic": func(ctx context.Context, l leaseTest) error {
		defer func() {
			if p := recover(); p != errInLease {
				l.t.Errorf("recovered %v", p)
			}
		}()
		return l.withLock(ctx, func() error { l.beat(); panic(errInLease) }, leaseOptions...)
	},
	"Goexit": func(ctx context.Context, l leaseTest) error {
		var wg sync.WaitGroup
		wg.Go(func() {
			_ = l.withLock(ctx, func() error { l.beat(); runtime.Goexit(); return nil }, leaseOptions...)
		})
		wg.Wait()
		return nil
	},
	"Release": func(ctx context.Context, l leaseTest) error {
		lock, err := advisory.Acquire(ctx, l.db, l.key, leaseOptions...)
		if err != nil {
			return err
		}
		return errors.Join(l.beat(), lock.Release())
	},
	"no Release": func(ctx context.Context, l leaseTest) error {
		if _, err := advisory.Acquire(ctx, l.db, l.key, leaseOptions...); err != nil {
			return err
		}
		_ = l.beat()
		collect(l.t, adminDB(l.t), l.key)
		return nil
	},
	"after a wait": func(ctx context.Context, l leaseTest) error {
		release := hold(l.t, adminDB(l.t), l.key)
		go func() {
			waitForWaiters(l.t, adminDB(l.t), l.key, 1)
			release()
		}()
		return l.withLock(ctx, l.beat, leaseOptions...)
	},
	"WithConnLock": func(ctx context.Context, l leaseTest) error {
		return l.withConnLock(ctx, "10000", leaseTimeout)
	},
	"WithConnLock, not given": func(ctx context.Context, l leaseTest) error {
		return l.withConnLock(ctx, "77000")
	},
	"WithTxLock": func(ctx context.Context, l leaseTest) error {
		return l.withTxLock(ctx, "10000", leaseTimeout)
	},
	"WithTxLock, REPEATABLE READ": func(ctx context.Context, l leaseTest) error {
		return l.withTxLock(ctx, "10000", leaseTimeout, advisory.TxOptions(&sql.TxOptions{Isolation: sql.LevelRepeatableRead}))
	},
	"WithTxLock, not given": func(ctx context.Context, l leaseTest) error {
		return l.withTxLock(ctx, "0")
	},
	"WithTxLock, rolled back": func(ctx context.Context, l leaseTest) error {
		err := advisory.WithTxLock(ctx, l.db, l.key, func(context.Context, *sql.Tx) error { return errInLease }, leaseTimeout)
		if !errors.Is(err, errInLease) {
			l.t.Errorf("%v, want fn's error", err)
		}
		return nil
	},
}

// beat returns after the first heartbeat of the lock, or several.
func (l leaseTest) beat() error {
	waitForHeartbeats(l.t, adminDB(l.t), appName(l.t), 1, serverTime(l.t, adminDB(l.t)))
	return nil
}

func (l leaseTest) withLock(ctx context.Context, fn func() error, opts ...advisory.Option) error {
	return advisory.WithLock(ctx, l.db, l.key, func(context.Context) error { return fn() }, opts...)
}

// withConnLock wants a setting under the lock, as withTxLock does.
func (l leaseTest) withConnLock(ctx context.Context, want string, opts ...advisory.Option) error {
	return advisory.WithConnLock(ctx, l.db, l.key, func(_ context.Context, conn *sql.Conn) error {
		wantSetting(l.t, conn, "idle_session_timeout", want)
		return nil
	}, opts...)
}

func (l leaseTest) withTxLock(ctx context.Context, want string, opts ...advisory.Option) error {
	return advisory.WithTxLock(ctx, l.db, l.key, func(_ context.Context, tx *sql.Tx) error {
		wantSetting(l.t, tx, "idle_in_transaction_session_timeout", want)
		return nil
	}, opts...)
}

// pooledSettings returns, of each connection in the pool, idle_session_timeout,
// idle_in_transaction_session_timeout and lock_timeout.
func pooledSettings(t testing.TB, db *sql.DB) (settings []string) {
	t.Helper()
	waitFor(t, "no connection is in use", func() (bool, error) { return db.Stats().InUse == 0, nil })
	for range db.Stats().Idle {
		conn, err := db.Conn(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close() // not before: each one once
		var s string
		// As a number, not "77s".
		if err := conn.QueryRowContext(t.Context(), `
			SELECT concat_ws(' ', max(setting) FILTER (WHERE name = 'idle_session_timeout'),
				max(setting) FILTER (WHERE name = 'idle_in_transaction_session_timeout'),
				max(setting) FILTER (WHERE name = 'lock_timeout')) FROM pg_settings`).Scan(&s); err != nil {
			t.Fatal(err)
		}
		settings = append(settings, s)
	}
	return settings
}

func wantSetting(t testing.TB, q querier, name, want string) {
	t.Helper()
	var got string
	if err := q.QueryRowContext(t.Context(), "SELECT setting FROM pg_settings WHERE name = $1", name).Scan(&got); err != nil || got != want {
		t.Errorf("%s is %q (%v), want %q", name, got, err, want)
	}
}

// A release and a heartbeat may fall on the same moment. The heartbeat must not be
// the last to speak.
func TestReleaseAtTheMomentOfAHeartbeatLeavesNoSetting(t *testing.T) {
	bothDrivers(t, func(t *testing.T, d driver) {
		dsn := watchLog(t, server.DSN())
		allowLog(t, brokenOff) // a heartbeat of 2 ms that is late
		r := &releasesAtHeartbeats{deadline: time.Now().Add(1500 * time.Millisecond)}
		if err := concurrently(8, 1, func(g int) error {
			db, err := d.openDB(dsn)
			if err != nil {
				return err
			}
			defer db.Close()
			db.SetMaxOpenConns(1)
			return r.run(soon(t), db, advisory.Name(fmt.Sprint(t.Name(), g)))
		}); err != nil {
			t.Fatal(err)
		}
		t.Logf("%d rounds", r.rounds)
		if r.armed > 0 {
			t.Errorf("after %d of %d releases, the pooled connection had an idle_session_timeout", r.armed, r.rounds)
		}
	})
}

// releasesAtHeartbeats counts releases, and those that left a setting.
type releasesAtHeartbeats struct {
	deadline time.Time

	mu            sync.Mutex
	rounds, armed int
}

// run takes and releases a lock until the deadline, over a pool of one connection.
func (r *releasesAtHeartbeats) run(ctx context.Context, db *sql.DB, key advisory.Key) error {
	const heartbeat = 2 * time.Millisecond
	for i := 0; time.Now().Before(r.deadline); i++ {
		lock, err := advisory.Acquire(ctx, db, key, advisory.Heartbeat(heartbeat), advisory.HolderTimeout(time.Minute))
		if err != nil {
			return err
		}
		time.Sleep(heartbeat + time.Duration(i%40-30)*10*time.Microsecond)
		// A heartbeat of 2 ms may well be late.
		if err := lock.Release(); err != nil && !errors.Is(err, advisory.ErrLost) {
			return err
		}
		var setting string
		if err := db.QueryRowContext(ctx, "SHOW idle_session_timeout").Scan(&setting); err != nil {
			return err
		}
		r.mu.Lock()
		r.rounds++
		if setting != "0" {
			r.armed++
		}
		r.mu.Unlock()
	}
	return nil
}

func TestShortSectionsSendTwoStatements(t *testing.T) {
	bothDrivers(t, func(t *testing.T, d driver) {
		w := newWire(t)
		db := d.open(t, w.dsn)
		for range 10 {
			if err := advisory.WithLock(t.Context(), db, testKey(t), func(context.Context) error { return nil }); err != nil {
				t.Fatal(err)
			}
			sent := w.take()
			if len(sent) != 2 || !strings.Contains(sent[0], "pg_try_advisory_lock") || !strings.Contains(sent[1], "pg_advisory_unlock") ||
				strings.Contains(strings.Join(sent, ""), "idle_session_timeout") {
				t.Errorf("sent %q, want the lock and the unlock", sent)
			}
		}
	})
}

func TestHeartbeatsEndWithTheRelease(t *testing.T) {
	bothDrivers(t, func(t *testing.T, d driver) {
		w := newWire(t)
		db := d.open(t, w.dsn)
		lock, err := advisory.Acquire(t.Context(), db, testKey(t), advisory.Heartbeat(shortHeartbeat))
		if err != nil {
			t.Fatal(err)
		}
		defer lock.Release()
		w.take()
		var sent []string
		waitFor(t, "three heartbeats are sent", func() (bool, error) {
			sent = append(sent, w.take()...)
			return len(sent) >= 3, nil
		})
		for i, s := range sent {
			if arms := strings.Contains(s, "idle_session_timeout"); arms != (i == 0) {
				t.Errorf("heartbeat %d: %q; the first one, and no other, sets idle_session_timeout", i+1, s)
			}
		}
		if err := lock.Release(); err != nil {
			t.Error(err)
		}
		sent = w.take()
		if last := sent[len(sent)-1]; !strings.Contains(last, "RESET idle_session_timeout") || !strings.Contains(last, "pg_advisory_unlock") {
			t.Errorf("released with %q, want the reset in the same round trip", last)
		}
		time.Sleep(2 * shortHeartbeat) // for what must not happen, there is no condition
		if sent := w.take(); len(sent) > 0 {
			t.Errorf("sent after the release: %q", sent)
		}
	})
}

// Where the caller drives the session, the option alone makes a lease of the lock.
func TestHolderTimeoutWhereTheCallerDrivesTheSession(t *testing.T) {
	const silence = 300 * time.Millisecond
	given := advisory.HolderTimeout(silence)
	bothDrivers(t, func(t *testing.T, d driver) {
		allowLog(t, silent, silentInTx)
		holders, others := d.open(t, server.DSN()), d.open(t, server.DSN())
		for name, withLock := range map[string]func(advisory.Key, func()) error{
			"WithTxLock": func(key advisory.Key, fn func()) error {
				return advisory.WithTxLock(t.Context(), holders, key, func(context.Context, *sql.Tx) error { fn(); return nil }, given)
			},
			"WithTxLock, SERIALIZABLE": func(key advisory.Key, fn func()) error {
				return advisory.WithTxLock(t.Context(), holders, key, func(context.Context, *sql.Tx) error { fn(); return nil }, given,
					advisory.TxOptions(&sql.TxOptions{Isolation: sql.LevelSerializable}))
			},
			"WithConnLock": func(key advisory.Key, fn func()) error {
				return advisory.WithConnLock(t.Context(), holders, key, func(context.Context, *sql.Conn) error { fn(); return nil }, given)
			},
		} {
			var mu sync.Mutex
			var took []time.Duration
			var wg sync.WaitGroup
			for i := range 3 {
				wg.Go(func() {
					key := advisory.Name(fmt.Sprint(t.Name(), name, i))
					err := withLock(key, func() {
						begin := time.Now()
						if err := advisory.WithLock(soon(t), others, key, func(context.Context) error { return nil }); err != nil {
							t.Error(err)
						}
						mu.Lock()
						defer mu.Unlock()
						took = append(took, time.Since(begin))
					})
					if err == nil {
						t.Errorf("%s: no error, though the lock had passed to another", name)
					}
					if name == "WithConnLock" {
						wantLost(t, name, err)
					}
				})
			}
			wg.Wait()
			logBound(t, "silent "+d.name, name+": successor begins", silence+time.Second, took)
			if shortest := slices.Min(took); shortest < silence-50*time.Millisecond {
				t.Errorf("%s: the lock passed on after %v already", name, shortest)
			}
		}
		wantClean(t, holders)
	})
}

// collect has the garbage collector run until key is free.
func collect(t testing.TB, db *sql.DB, key advisory.Key) {
	t.Helper()
	waitFor(t, "the abandoned lock is free", func() (bool, error) {
		runtime.GC()
		n, err := locks(t.Context(), db, key, true)
		return n == 0, err
	})
}

func TestAbandonedLockIsReleasedWithAWarning(t *testing.T) {
	bothDrivers(t, func(t *testing.T, d driver) {
		db := d.open(t, server.DSN())
		var log syncBuffer
		key := testKey(t)
		acquire := func() context.Context {
			lock, err := advisory.Acquire(t.Context(), db, key, advisory.Heartbeat(shortHeartbeat),
				advisory.Logger(slog.New(slog.NewTextHandler(&log, nil))))
			if err != nil {
				t.Fatal(err)
			}
			return lock.Context()
		}
		ctx := acquire() // which does not keep the Lock
		collect(t, adminDB(t), key)
		<-ctx.Done()
		if cause := context.Cause(ctx); !errors.Is(cause, context.Canceled) || errors.Is(cause, advisory.ErrLost) {
			t.Errorf("cause %v, want that of a release", cause)
		}
		if text := log.String(); strings.Count(text, "level=WARN") != 1 || !strings.Contains(text, t.Name()) {
			t.Errorf("logged %q, want one warning that names the key", text)
		}
		wantClean(t, db)

		// A Lock that is in use is not collected.
		lock, err := advisory.Acquire(t.Context(), db, key)
		if err != nil {
			t.Fatal(err)
		}
		for range 5 {
			runtime.GC()
		}
		wantLive(t, lock.Context())
		if err := lock.Release(); err != nil {
			t.Error(err)
		}
	})
}

// A syncBuffer is a bytes.Buffer for several goroutines.
type syncBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *syncBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *syncBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}
