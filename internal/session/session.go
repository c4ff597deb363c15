// Package session is one connection to the server, on which locks are taken: it sends one bounded
// statement at a time, from any goroutine, and sees to it that the connection goes back to its
// pool clean, or is closed. It knows nothing of other sessions, nor of who else wants a lock.
//
// A Session is borrowed from a pool, or it is the caller's. One that is borrowed ends with exactly
// one of HandBack and Discard, to which End, Release, GiveUp and Tx.End come. The server frees the
// locks of a closed session, so that in doubt it is closed.
package session

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"errors"
	"log/slog"
	"math/rand/v2"
	"reflect"
	"strconv"
	"sync"
	"time"

	"github.com/pgadvisory/advisory/internal/pgsql"
)

// A Use is what a borrowed session is for.
type Use uint8

const (
	ForLocks Use = iota // it holds locks, and nobody else sends statements
	ForConn             // fn uses the connection: WithConnLock
	ForTx               // fn uses a transaction on it: WithTxLock
)

// A Session is one connection, and the locks on it. What sends (Exec, ExecQuiet, Do, Run), Hasten, Interrupt,
// Discard, and the settings (IdleTimeout, ChangeIdleTimeout, Reset, WasReset) are safe to call from several
// goroutines. The rest is for the goroutine that takes or releases the lock.
//
// These are all kinds of sessions:
//
//	for                        use       place      pool.DB
//	locks, waits, questions    ForLocks  OnOwn      set
//	WithConnLock               ForConn   OnOwn      set
//	WithTxLock                 ForTx     InTx       set
//	  above READ COMMITTED     ForTx     OnOwn      set
//	AcquireConn, ReleaseConn   ForConn   OnCallers  nil
type Session struct {
	Sender
	Shared bool // the lock is shared

	// Edges returns what the comment of a wait tells other processes. Waiting is called when a wait begins,
	// and again and again while it lasts; it may end ctx. Both may be nil.
	Edges   func() string
	Waiting func()

	Yield  func() bool // tells whether a wait yields to others; nil: it does not
	OnEnd  func()      // is told when a borrowed connection has been handed back or closed
	conn   *sql.Conn
	pool   Pool // without a DB if the connection is the caller's
	use    Use
	log    *slog.Logger
	caches bool // the driver keeps statements that have arguments prepared

	settingsMu sync.Mutex // guards settings and made, once several use the session: on a lock connection
	settings   pgsql.Settings
	made       bool // the settings may have been made

	place         pgsql.Place
	txIdleTimeout string      // in a transaction: put before its first statement
	held          []pgsql.Key // what Lock or Wait has taken
	refused       bool        // the server has refused the lock: another has it
	sent          time.Time   // when the last statement that takes a lock went out
	left          bool        // the caller has left a statement that takes the lock
	rowsOpen      bool        // fn has left rows open
	unwind        func()      // ends what was begun before the lock was asked for; nil: nothing was
}

// OnConn returns the session of a connection of the caller's.
func OnConn(conn *sql.Conn, log *slog.Logger, shared bool) *Session {
	s := newSession(conn, Pool{Facts: new(Facts)}, log, ForConn)
	s.place, s.Shared = pgsql.OnCallers, shared
	s.grace += sliceMin // its waits are not left, and most end within their slice
	return s
}

// borrowed returns the session of a connection of pool.
func borrowed(conn *sql.Conn, pool Pool, log *slog.Logger, use Use) *Session {
	s := newSession(conn, pool, log, use)
	s.settings = pgsql.Settings{Nonce: strconv.FormatUint(rand.Uint64(), 36), Exposed: use == ForConn}
	s.settings.Check = use != ForLocks && !pool.Facts.noChecks.Load()
	_ = raw(conn, func(dc any) error {
		s.dc = dc
		if use == ForLocks {
			s.dc = unwrap(dc)
			s.breaker, s.caches = pool.Facts.ofDriver(s.dc)
		}
		return nil
	})
	return s
}

func newSession(conn *sql.Conn, pool Pool, log *slog.Logger, use Use) *Session {
	return &Session{Sender: newSender(), conn: conn, pool: pool, log: log, use: use}
}

// callers tells whether the connection is the caller's.
func (s *Session) callers() bool { return s.place == pgsql.OnCallers }

// Conn returns the connection.
func (s *Session) Conn() *sql.Conn { return s.conn }

// Nonce returns what tells the session from every other.
func (s *Session) Nonce() string { return s.settings.Nonce }

// Caches tells whether the driver keeps statements that have arguments prepared.
func (s *Session) Caches() bool { return s.caches }

// SetIdleTimeout has the server end the session once it has heard nothing for d, when the next lock is
// granted. 0 is never.
func (s *Session) SetIdleTimeout(d time.Duration) { s.settings.IdleTimeout = d }

// IdleTimeout returns how long the server waits for the next statement. 0 is for ever.
func (s *Session) IdleTimeout() time.Duration {
	s.settingsMu.Lock()
	defer s.settingsMu.Unlock()
	return s.idleTimeoutLocked()
}

func (s *Session) idleTimeoutLocked() time.Duration {
	if !s.made {
		return 0
	}
	return s.settings.IdleTimeout
}

// ChangeIdleTimeout returns the statement that makes the server wait for d, or "" if the server does so already.
// The caller is to send it: from now on, IdleTimeout returns d.
func (s *Session) ChangeIdleTimeout(d time.Duration) (set string) {
	s.settingsMu.Lock()
	defer s.settingsMu.Unlock()
	if d == s.idleTimeoutLocked() {
		return ""
	}
	first := !s.made
	s.settings.IdleTimeout, s.made = d, true
	return s.settings.Set(first)
}

// Reset returns the statement that undoes the settings, or "" if there are none. WasReset says that
// it has been sent.
func (s *Session) Reset() string {
	s.settingsMu.Lock()
	defer s.settingsMu.Unlock()
	if !s.made {
		return ""
	}
	return s.settings.Reset()
}

// WasReset says that the settings are undone.
func (s *Session) WasReset() {
	s.settingsMu.Lock()
	defer s.settingsMu.Unlock()
	s.made = false
}

// HandBack returns the connection, which is clean, to the pool. One that has been broken off is discarded,
// even if its answer came in that moment.
func (s *Session) HandBack() {
	if s.cond.Load() != known {
		s.Discard()
		return
	}
	defer s.ended() // also if the driver panics
	if err := s.conn.Close(); err != nil && !errors.Is(err, sql.ErrConnDone) {
		s.log.Warn("advisory: connection not handed back to the pool", "error", err)
	}
}

// End runs clean. It hands the connection back if clean returns true, and otherwise, or if clean panics,
// discards it.
func (s *Session) End(clean func() bool) {
	cleaned := false
	defer func() {
		if cleaned {
			s.HandBack()
		} else {
			s.Discard()
		}
	}()
	cleaned = clean()
}

func (s *Session) ended() {
	if s.OnEnd != nil {
		s.OnEnd()
	}
}

// Discard closes the connection for good: the server then frees its locks. It waits a moment, so
// that the pool's place is usually free when it returns. If the driver is slower than that, a
// goroutine of its own goes on until the driver returns, and until what fn has left open on its
// conn is closed.
func (s *Session) Discard() {
	Soon(func() {
		s.sending <- struct{}{} // not given back: nothing is sent any more
		if !s.callers() {
			defer func() { // also if the driver panics
				_ = s.conn.Close() // sql.ErrConnDone by now
				s.ended()
			}()
		}
		err := raw(s.conn, func(dc any) error {
			s.clear(dc)
			return driver.ErrBadConn // database/sql's word for "do not use it again"
		})
		if !errors.Is(err, driver.ErrBadConn) && !errors.Is(err, sql.ErrConnDone) {
			s.log.Warn("advisory: connection not discarded", "error", err)
		}
	})
}

// clear leaves no lock on the driver's connection. Those of a transaction go with it, and behind a
// transaction pooler, the locks of the session are another's. What its Close does is not certain:
// that of pgx on a pgxpool returns a sound connection to that pool (one with an open transaction,
// it closes), and database/sql does not call it as long as a transaction or rows are open. So a
// session that is for a transaction is closed here.
func (s *Session) clear(dc any) {
	if s.place != pgsql.InTx && s.cond.Load() < gone {
		ctx, cancel := context.WithTimeout(context.Background(), clearBound)
		defer cancel()
		if _, err := execOn(ctx, dc, s.Reset()+pgsql.UnlockAll); err == nil && s.use != ForTx {
			return
		}
	}
	if conn, ok := dc.(driver.Conn); ok {
		_ = conn.Close() // database/sql calls it again, and has the error
	}
}

// Attempt runs f. If the driver panics, the session is discarded.
func (s *Session) Attempt(f func(*Session) error) error {
	returned := false
	defer func() {
		if !returned {
			s.Discard()
		}
	}()
	err := f(s)
	returned = true
	return err
}

// GiveUp ends a session on which an acquisition under ctx has failed with err. If its state is known, it
// is cleaned and handed back, or left to the caller whose it is. Otherwise it is discarded.
func (s *Session) GiveUp(ctx context.Context, err error) {
	if s.callers() {
		if !s.stateKnown(ctx, err) {
			s.Discard()
		}
		return
	}
	clean := func() bool {
		if s.unwind != nil {
			s.unwind()
		}
		if !s.stateKnown(ctx, err) {
			return false
		}
		// What a transaction held has gone with it. A statement that was left may have got its lock.
		if len(s.held) == 0 && !s.made && !s.left || s.place == pgsql.InTx {
			return true
		}
		_, err := s.Exec(context.Background(), AnswerBound, s.Reset()+pgsql.UnlockAll)
		return err == nil
	}
	if ctx.Err() == context.Canceled { // nobody waits, so that a panic of the driver's stays with the session
		spawn(func() (struct{}, error) { s.End(clean); return struct{}{}, nil })
		return
	}
	Soon(func() { s.End(clean) })
}

// stateKnown tells whether an acquisition under ctx that has failed with err has left a session
// that is known.
func (s *Session) stateKnown(ctx context.Context, err error) bool {
	return s.cond.Load() == known && (errors.As(err, new(verdict)) || ctx.Err() != nil && errors.Is(err, context.Cause(ctx)))
}

// Release unlocks the lock in one round trip, and hands the connection back. It returns nil only
// if the server says that the lock was still held; otherwise it discards the connection. It takes
// no context, because it must happen when the caller's has ended.
func (s *Session) Release() error {
	if s.rowsOpen {
		s.worsen(gone) // closing it properly would wait for the rows
		s.Discard()
		return ErrLeftOpen
	}
	unlock := pgsql.Unlock
	if s.use == ForConn {
		unlock = pgsql.UnlockExposed
	}
	rows, err := s.Exec(context.Background(), ReleaseBound, s.Reset()+unlock(s.held, s.Shared))
	switch {
	case err == nil && rows == 0:
		err = ErrNotHeld
	case err == nil && rows > 1, s.use == ForConn && pgsql.State(err) == pgsql.InFailedTransaction:
		s.worsen(gone) // closing it properly would wait for the transaction
		err = ErrLeftOpen
	}
	if err == nil {
		s.HandBack()
		return nil
	}
	if s.use == ForConn && errors.Is(err, sql.ErrConnDone) && s.reclaim() {
		err = ErrConnClosed
	}
	s.Discard()
	return err
}

// FindRows finds out whether fn has left rows open on the connection, for Release. It is called
// before fn's ctx ends: then database/sql closes them, and the driver the connection.
func (s *Session) FindRows() {
	open, err := Run(context.Background(), &s.Sender, ReleaseBound, 0, func(ctx context.Context) (open bool, err error) {
		err = raw(s.conn, func(dc any) error {
			open = rowsOpen(ctx, unwrap(dc))
			return nil
		})
		return open, err
	})
	s.rowsOpen = err == nil && open
}

// reclaim closes the driver's connection if fn has closed the Conn, and it lies in the pool, with
// the lock on it. (database/sql also closes the Conn, together with that, if it finds it dead.) It
// tells whether the lock was on it until then.
func (s *Session) reclaim() (held bool) {
	ctx, cancel := context.WithTimeout(context.Background(), clearBound)
	defer cancel()
	for n := s.pool.DB.Stats().Idle; n > 0 && s.pool.DB.Stats().Idle > 0; n-- {
		conn, err := s.pool.conn(ctx)
		if err != nil {
			break
		}
		found := false
		_ = raw(conn, func(dc any) error {
			found = reflect.TypeOf(dc).Comparable() && dc == s.dc
			return nil
		})
		if found {
			rows, err := Run(ctx, &s.Sender, clearBound, 0, func(ctx context.Context) (rows int64, err error) {
				_ = raw(conn, func(dc any) error {
					if rows, err = execOn(ctx, dc, s.Reset()+pgsql.UnlockExposed(s.held, s.Shared)); err != nil || rows == 0 {
						s.clear(dc)
					}
					return driver.ErrBadConn
				})
				return rows, err
			})
			return err == nil && rows == 1
		}
		defer conn.Close() // when all have been looked at
	}
	s.log.Warn("advisory: conn was closed while fn ran, by fn or because its session died; if by fn, the pool still has the lock",
		"key", pgsql.List(s.held))
	return false
}

// Unlock unlocks the lock of k on a session of the caller's, if it holds it.
func (s *Session) Unlock(k pgsql.Key) error {
	rows, err := s.Exec(context.Background(), ReleaseBound, pgsql.UnlockHeld([]pgsql.Key{k}, s.Shared))
	switch {
	case err != nil:
		s.Discard()
		return err
	case rows == 0:
		return ErrNotHeld
	default:
		return nil
	}
}
