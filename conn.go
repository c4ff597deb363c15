package advisory

import (
	"cmp"
	"context"
	"database/sql"
	"database/sql/driver"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"reflect"
	"strconv"
	"strings"
	"sync/atomic"
	"time"
)

const (
	// answerBound is how long past its own wait a statement may go unanswered
	// before its session is given up.
	answerBound = 10 * time.Second

	// releaseBound is how long a release may take, whatever happens.
	releaseBound = 5 * time.Second

	// lateBound is how long past a Timeout a statement may go unanswered, and how long the message of
	// a Timeout may take to find the holder. With twice abandonAfter, it makes less than a second.
	lateBound = 400 * time.Millisecond

	// abandonAfter is how long a driver may take to return from a statement whose
	// context has ended. Drivers differ: lib/pq asks the server to cancel and reads
	// on, for as long as the network keeps it waiting.
	abandonAfter = 200 * time.Millisecond

	// clearBound is how long the last statement on a connection may take that is to be closed.
	clearBound = time.Second

	// answerGrace is how long the answer to a try may take after its caller's context has
	// ended: it costs nothing then, and breaking it off costs the session.
	answerGrace = 250 * time.Millisecond

	// dialBound is how long a connection may take to be made where the pool has no
	// limit, so that waiting for one cannot mean waiting for others.
	dialBound = 30 * time.Second
)

// A sender sends a statement without arguments, and returns the number of rows in its
// command tag.
type sender = func(ctx context.Context, query string) (int64, error)

// A runner sends statements over one connection or transaction, one at a time, from
// any goroutine.
type runner struct {
	send sender

	// busy is held by whose turn it is on the connection. A channel, because waiting for
	// it must end with a context: the lock inside database/sql waits for ever.
	busy chan struct{}

	guard guard

	// abandoned: the driver did not return from a statement. Nothing more is sent.
	abandoned atomic.Bool

	// gone: a statement ended with the session, or without its answer.
	gone atomic.Bool
}

// rawSend sends over the driver's connection itself. When that is found dead,
// Conn.ExecContext closes the Conn, and first waits, for ever, for its transactions and
// rows to be closed, which may be the caller's, or fn's to have left open.
func (s *session) rawSend(ctx context.Context, query string) (int64, error) {
	return s.sendTo(func(dc any) any { return dc }, ctx, query)
}

// quietSend is rawSend past the wrappers that trace statements: nobody has asked for this one.
func (s *session) quietSend(ctx context.Context, query string) (int64, error) {
	return s.sendTo(unwrap, ctx, query)
}

func (s *session) sendTo(which func(dc any) any, ctx context.Context, query string) (rows int64, err error) {
	rawErr := raw(s.conn, func(dc any) error {
		rows, err = execOn(ctx, which(dc), query)
		return nil
	})
	return rows, cmp.Or(rawErr, err)
}

// execOn executes query on a driver's connection.
func execOn(ctx context.Context, dc any, query string) (int64, error) {
	execer, ok := dc.(driver.ExecerContext)
	if !ok {
		return 0, noExec(dc)
	}
	rows, err := rowsAffected(execer.ExecContext(ctx, query, nil))
	if err == driver.ErrSkip { // of a wrapper around one that cannot
		return 0, noExec(dc)
	}
	return rows, err
}

func noExec(dc any) error {
	return fmt.Errorf("the driver's connection, a %T, does not execute statements without preparing them (driver.ExecerContext)", dc)
}

// unwrap is the driver's connection inside of those that wrap it to trace statements, if
// they hand it out, and it executes statements without them: otelsql's do so by Raw, and dd-trace-go's
// by WrappedConn.
func unwrap(dc any) any {
	for {
		var inner driver.Conn
		switch c := dc.(type) {
		case interface{ Raw() driver.Conn }:
			inner = c.Raw()
		case interface{ WrappedConn() driver.Conn }:
			inner = c.WrappedConn()
		}
		if _, ok := inner.(driver.ExecerContext); !ok {
			return dc
		}
		dc = inner
	}
}

// raw is Conn.Raw, which panics if database/sql closes the Conn at the wrong moment, as it
// does by itself when the context of a transaction ends: it looks whether the Conn is
// closed, and then takes its connection, without a lock around the two.
func raw(conn *sql.Conn, f func(dc any) error) (err error) {
	called := false
	defer func() {
		if !called && recover() != nil {
			err = sql.ErrConnDone
		}
	}()
	return conn.Raw(func(dc any) error {
		called = true
		return f(dc)
	})
}

// txSend sends over a transaction.
func txSend(tx *sql.Tx) func(context.Context, string) (int64, error) {
	return func(ctx context.Context, query string) (int64, error) {
		return rowsAffected(tx.ExecContext(ctx, query))
	}
}

func rowsAffected(result driver.Result, err error) (int64, error) {
	if err != nil {
		return 0, err
	}
	return result.RowsAffected()
}

// exec sends one statement, when it is its turn; a bound of 0 is none. It returns at most
// abandonAfter past bound or the end of ctx, even if the driver does not. After an error
// that is not the server's, nothing but discard may follow.
func (r *runner) exec(ctx context.Context, bound time.Duration, query string) (rows int64, err error) {
	if err := r.take(ctx, bound); err != nil {
		return 0, err
	}
	defer r.give()
	return r.execNow(ctx, bound, query)
}

// execNow is exec for one whose turn it is.
func (r *runner) execNow(ctx context.Context, bound time.Duration, query string) (rows int64, err error) {
	return r.execBy(r.send, ctx, bound, query)
}

// execBy is execNow by another way of sending.
func (r *runner) execBy(send sender, ctx context.Context, bound time.Duration, query string) (rows int64, err error) {
	if r.breakable(len(query)) {
		err = r.run(ctx, bound, func(ctx context.Context) (err error) {
			rows, err = send(ctx, query)
			return err
		})
		return rows, err
	}
	var n int64 // the statement's until runAside returns nil: it may outlive this call
	err = r.runAside(ctx, bound, func(ctx context.Context) (err error) {
		n, err = send(ctx, query)
		return err
	})
	if err == nil {
		rows = n
	}
	return rows, err
}

// breakable tells whether the guard can break off a statement of so many bytes.
func (r *runner) breakable(length int) bool {
	return r.guard.breaks != nil && length <= r.guard.longest && !r.abandoned.Load()
}

// do has f, which sends one statement, run when it is its turn, as exec does.
func (r *runner) do(ctx context.Context, bound time.Duration, f func(context.Context) error) error {
	if err := r.take(ctx, bound); err != nil {
		return err
	}
	defer r.give()
	return r.runAside(ctx, bound, f)
}

// take waits for a turn, which ends with give.
func (r *runner) take(ctx context.Context, bound time.Duration) error {
	if r.abandoned.Load() {
		return errAbandoned
	}
	select {
	case r.busy <- struct{}{}:
		return r.taken()
	default:
	}
	if bound > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeoutCause(ctx, bound, noAnswer{bound})
		defer cancel()
	}
	select {
	case r.busy <- struct{}{}:
		return r.taken()
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// taken gives the turn back if the statement that had it before has been abandoned.
func (r *runner) taken() error {
	if r.abandoned.Load() {
		<-r.busy
		return errAbandoned
	}
	return nil
}

// give ends a turn; not that of a statement that has been abandoned, which lasts until
// the driver returns.
func (r *runner) give() {
	if !r.abandoned.Load() {
		<-r.busy
	}
}

// run runs f, which sends one statement, on this goroutine. If it takes too long, the
// driver's connection is broken off. It is for whose turn it is, and for a driver that is known.
func (r *runner) run(ctx context.Context, bound time.Duration, f func(context.Context) error) error {
	no := r.guard.begin(bound, nil)
	if ctx.Done() != nil {
		ended := ctx
		stop := context.AfterFunc(ended, func() { r.guard.interrupt(no, context.Cause(ended)) })
		defer stop()
		ctx = context.WithoutCancel(ctx)
	}
	err := f(ctx)
	if cause := r.guard.end(); cause != nil {
		r.gone.Store(true) // even if the answer came: the connection is of no use
		if err != nil {
			err = cause
			if cause == errOverdue {
				err = noAnswer{bound}
			}
		}
	}
	return r.noted(err)
}

// errOverdue is the guard's own reason to break off a statement.
var errOverdue = errors.New("overdue")

// runAside runs f, which sends one statement, on a goroutine of its own. It returns at most
// abandonAfter past bound or the end of ctx, even if the driver does not: f is then still
// under way, and its goroutine, and its turn, end when the driver returns.
func (r *runner) runAside(ctx context.Context, bound time.Duration, f func(context.Context) error) (err error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	r.guard.begin(bound, cancel)
	defer r.guard.end()
	const (
		returned = iota + 1
		abandoned
	)
	var end atomic.Int32
	answered, noted := make(chan error, 1), make(chan struct{})
	go func() {
		answered <- f(ctx)
		if !end.CompareAndSwap(0, returned) {
			<-noted
			<-r.busy
		}
	}()
	select {
	case err = <-answered:
	case <-ctx.Done():
		grace := time.NewTimer(abandonAfter)
		defer grace.Stop()
		select {
		case err = <-answered:
		case <-grace.C:
			if end.CompareAndSwap(0, abandoned) {
				r.abandoned.Store(true)
				r.gone.Store(true)
				close(noted)
				return broken(ctx, bound)
			}
			err = <-answered
		}
	}
	if err != nil && ctx.Err() != nil {
		// Whatever the driver makes of it: it may report a statement that it has
		// cancelled as the server's error, on a connection that it has closed.
		err = broken(ctx, bound)
	}
	return r.noted(err)
}

// broken is why the statement under ctx was broken off.
func broken(ctx context.Context, bound time.Duration) error {
	if cause := context.Cause(ctx); cause != errOverdue {
		return cause
	}
	return noAnswer{bound}
}

// noted notes an error that says that the session has ended.
func (r *runner) noted(err error) error {
	if err != nil && sessionGone(err) {
		r.gone.Store(true)
	}
	return err
}

var errAbandoned = errors.New("the driver has not returned from the statement before")

// A session is one connection and the session-level locks that it carries. It is
// either ours alone, borrowed from the pool, or the caller's *sql.Conn (ours is
// false). Ours ends with exactly one of handBack and discard.
type session struct {
	runner
	conn *sql.Conn
	db   *sql.DB // whose pool conn is from; nil: it is not ours
	ours bool
	log  *slog.Logger

	// settings are those that a grant, or the first heartbeat, makes.
	settings sessionSettings
	dc       any // the driver's connection that is lent

	// The rest belongs to the goroutine that acquires or releases, but for armed,
	// which is the watch's until that has stopped.

	on         place
	restart    string // begins a new transaction, in one
	shared     bool
	held       []Key
	waited     bool // the server has answered, and the lock was taken
	waitingFor Key
	enough     func() bool // whether a wait should yield to others; nil: never
	armed      bool        // the settings may be made
	proof      time.Time   // when the last statement of the acquisition went out
	unwind     func()      // ends what was begun before the lock was asked for; nil: nothing was
	broken     bool        // its state is unknown, whatever the last error says
}

// openSession borrows a connection.
func openSession(ctx context.Context, db *sql.DB, cfg *config) (*session, error) {
	conn, err := openConn(ctx, db)
	if err != nil {
		return nil, err
	}
	return newSession(conn, db, cfg), nil
}

// openConn borrows a connection. It returns when ctx ends, even if a driver that is making a
// connection does not. What comes later goes to the pool: to break off the making of a connection
// would cost the server a session, and the next one another.
func openConn(ctx context.Context, db *sql.DB) (*sql.Conn, error) {
	stats := db.Stats()
	// One that lies ready may have to be asked whether it lives; one that must be made
	// takes longer. But if others have all of a limited pool, the wait is for them.
	bound := answerBound
	if stats.Idle == 0 {
		bound = dialBound
	}
	making, cancel := ctx, func() {}
	if !exhausted(stats) {
		making, cancel = context.WithTimeoutCause(context.WithoutCancel(ctx), bound, noAnswer{bound})
	}
	type result struct {
		conn *sql.Conn
		err  error
	}
	var r result
	if stats.Idle > 0 && ctx.Done() == nil {
		r.conn, r.err = db.Conn(making)
		if r.err != nil && making.Err() != nil {
			r.err = context.Cause(making)
		}
		cancel()
	} else {
		results, left := make(chan result), make(chan struct{})
		defer close(left)
		go func() {
			defer cancel()
			conn, err := db.Conn(making)
			if err != nil && making.Err() != nil {
				err = context.Cause(making)
			}
			select {
			case results <- result{conn, err}:
			case <-left:
				if err == nil {
					_ = conn.Close()
				}
			}
		}()
		select {
		case r = <-results:
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		case <-making.Done():
			return nil, context.Cause(making)
		}
	}
	return r.conn, r.err
}

// watchOver has the statements of a session that is ours alone run on their callers'
// goroutines, if the driver is known.
func (s *session) watchOver() {
	_ = raw(s.conn, func(dc any) error {
		s.guard.watchOver(unwrap(dc))
		return nil
	})
}

// newSession returns the session of conn, which is db's, or the caller's: db is nil then.
func newSession(conn *sql.Conn, db *sql.DB, cfg *config) *session {
	s := &session{conn: conn, db: db, ours: db != nil, log: cfg.logger, shared: cfg.shared}
	if !s.ours {
		s.on = onCalled
	}
	s.send, s.busy = s.rawSend, make(chan struct{}, 1)
	s.settings.nonce = strconv.FormatUint(rand.Uint64(), 36)
	return s
}

// poolClosed returns an error if the pool has been closed: a connection in use outlives
// it, and so would a wait.
func poolClosed(db *sql.DB) error {
	if db == nil {
		return nil
	}
	if _, err := db.Conn(endedCtx); isClosed(err) {
		return err
	}
	return nil
}

// endedCtx asks for a connection without taking one.
var endedCtx = func() context.Context {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	return ctx
}()

// sleep sleeps for d or until ctx ends.
func sleep(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
}

// within is bound, or what is left until deadline if that is set and sooner.
func within(bound time.Duration, deadline time.Time) time.Duration {
	if deadline.IsZero() {
		return bound
	}
	return min(bound, time.Until(deadline))
}

// answerWithin is how long a statement that itself waits for at most wait may go
// unanswered. A Timeout is kept without cancelling statements, which would cost
// the connection, but a server that is out of reach must not outlast it by much.
func answerWithin(wait time.Duration, deadline time.Time) time.Duration {
	if deadline.IsZero() {
		return wait + answerBound
	}
	return max(time.Millisecond, min(wait+answerBound, time.Until(deadline)+lateBound))
}

// confirm asks the server whether the session still has its locks, if its grant was so
// long on its way that the server, which counts from the grant, may have ended it since.
func (s *session) confirm(ctx context.Context, every time.Duration, deadline time.Time) error {
	if time.Since(s.proof) < every {
		return nil
	}
	s.proof = time.Now() // of the answer, if the server has no clock to be ahead of
	if !s.armed {
		return nil
	}
	rows, err := s.execLeft(ctx, answerWithin(0, deadline), beatStatement(s.held, "", s.settings.nonce), s.held[0], true)
	switch {
	case err != nil:
		return err
	case rows == standbyRows:
		return errStandby
	case rows == 0:
		return errLostBeforeUse
	default:
		return ctx.Err()
	}
}

// release unlocks what the session holds in one round trip, and hands it back. It
// returns nil only if the server says that every lock was still held; otherwise
// the session is discarded. It takes no context, because it must happen when the
// caller's has ended.
func (s *session) release() error {
	query := unlockStatement
	if s.settings.lent {
		query = unlockLentStatement
	}
	rows, err := s.exec(context.Background(), releaseBound, s.disarm()+query(s.held, s.shared))
	switch {
	case err == nil && rows == 0:
		err = errNotHeld
	case err == nil && rows > 1, s.settings.lent && sqlState(err) == inFailedTransaction:
		// Closing it properly would wait for the transaction.
		s.gone.Store(true)
		err = errLeftOpen
	}
	if err != nil {
		if s.settings.lent && errors.Is(err, sql.ErrConnDone) && s.reclaim() {
			err = errConnClosed
		}
		s.discard()
		return err
	}
	s.handBack()
	return nil
}

// leftOpen tells whether fn has left rows open on its conn. It asks for that before fn's ctx ends: then
// database/sql closes them, and the driver the connection.
func (s *session) leftOpen() bool {
	if s.take(context.Background(), releaseBound) != nil {
		return false
	}
	defer s.give()
	var busy, known bool
	_ = raw(s.conn, func(dc any) error {
		busy, known = pgxBusy(unwrap(dc))
		return nil
	})
	if !known {
		_, err := s.execBy(s.quietSend, context.Background(), releaseBound, leftOpenStatement)
		busy = err != nil && strings.Contains(err.Error(), "already a query being processed") // lib/pq
	}
	return busy
}

// reclaim closes the driver's connection if fn has closed the Conn, and it lies in the pool, with
// the lock on it. (database/sql also closes the Conn, together with that, if it finds it dead.) It tells whether
// the lock was on it until then.
func (s *session) reclaim() (held bool) {
	ctx, cancel := context.WithTimeout(context.Background(), clearBound)
	defer cancel()
	found := false
	for n := s.db.Stats().Idle; n > 0 && s.db.Stats().Idle > 0; n-- {
		conn, err := openConn(ctx, s.db)
		if err != nil {
			break
		}
		_ = raw(conn, func(dc any) error {
			if found = reflect.TypeOf(dc).Comparable() && dc == s.dc; found {
				rows, err := execOn(ctx, dc, s.disarm()+unlockLentStatement(s.held, s.shared))
				held = err == nil && rows == 1
				s.clear(dc)
				return driver.ErrBadConn
			}
			return nil
		})
		if found {
			return held
		}
		defer conn.Close() // when all have been looked at
	}
	s.log.Warn("advisory: conn was closed while fn ran, by fn or because its session died; if by fn, the pool still has the lock",
		"key", keyList(s.held))
	return false
}

// errLostBeforeUse is for keepTrying: another session may do.
var errLostBeforeUse = fmt.Errorf("the lock was lost as soon as it was granted: %w", driver.ErrBadConn)

var (
	errNotHeld = errors.New("this session did not hold it (behind a transaction pooler, use WithTxLock; Check tells)")

	// What fn must not do on a conn that it is lent.
	errLeftOpen   = errors.New("fn left rows or a transaction open on its conn, which has been closed")
	errConnClosed = errors.New("fn closed its conn, with the lock on it; the session has been ended")
)

// disarm is put before the last statement on the session.
func (s *session) disarm() string {
	if !s.armed {
		return ""
	}
	return s.settings.resetStatement()
}

// giveUp ends a session of ours on which an acquisition under ctx failed with err: clean if that
// can be, for good otherwise. It returns at once if ctx has ended, and soon if something must be sent; it calls
// ended when the session has ended.
func (s *session) giveUp(ctx context.Context, err error, ended func()) {
	done := make(chan struct{})
	end := func() {
		defer close(done)
		defer ended()
		if s.unwind != nil {
			s.unwind()
		}
		if !s.broken && usable(ctx, err) {
			// What a transaction held has gone with it. At the end of ctx, a driver may have reported it for
			// a statement of ours, whose outcome is not known then.
			if len(s.held) == 0 && !s.armed && (ctx.Err() == nil || s.on == inTx) {
				s.handBack()
				return
			}
			if _, err := s.exec(context.Background(), answerBound, s.disarm()+freeStatement); err == nil {
				s.handBack()
				return
			}
		}
		s.discard()
	}
	go end()
	if ctx.Err() == nil {
		soon := time.NewTimer(abandonAfter)
		defer soon.Stop()
		select {
		case <-done:
		case <-soon.C:
		}
	}
}

// usable tells whether an acquisition under ctx that failed with err has left a session that is known.
func usable(ctx context.Context, err error) bool {
	return errors.Is(err, errRefused) || errors.Is(err, errTimeout) || errors.Is(err, ErrReentrant) || errors.Is(err, errInTransaction) || errors.Is(err, errYield) || errors.As(err, new(waitRefused)) ||
		ctx.Err() != nil && errors.Is(err, ctx.Err()) // which statements do not see
}

// handBack returns the connection to the pool. It is clean.
func (s *session) handBack() {
	if !s.ours {
		return
	}
	if err := s.conn.Close(); err != nil && !errors.Is(err, sql.ErrConnDone) {
		s.log.Warn("advisory: connection not handed back to the pool", "error", err)
	}
}

// discard closes the connection for good: the server then frees its locks. It
// waits a moment, so that the pool's place is usually free when it returns; if the
// driver is slower than that, a goroutine of its own goes on until the driver
// returns, and until what fn has left open on its conn is closed.
func (s *session) discard() {
	done := make(chan struct{})
	go func() {
		defer close(done)
		s.busy <- struct{}{} // not given back: nothing is sent any more
		err := raw(s.conn, func(dc any) error {
			s.clear(dc)
			// database/sql's word for "do not use it again".
			return driver.ErrBadConn
		})
		if !errors.Is(err, driver.ErrBadConn) && !errors.Is(err, sql.ErrConnDone) {
			s.log.Warn("advisory: connection not discarded", "error", err)
		}
		if s.ours {
			_ = s.conn.Close() // sql.ErrConnDone by now
		}
	}()
	t := time.NewTimer(abandonAfter)
	defer t.Stop()
	select {
	case <-done:
	case <-t.C:
	}
}

// clear leaves no lock on the driver's connection. Those of a transaction go with it, and behind a
// transaction pooler, the locks of the session are another's. What its Close does is not certain:
// that of pgx on a pgxpool returns a sound connection to that pool (one with an open transaction, it
// closes), and database/sql does not call it as long as a transaction or rows are open.
func (s *session) clear(dc any) {
	if execer, ok := dc.(driver.ExecerContext); ok && s.on != inTx && !s.gone.Load() && !s.abandoned.Load() {
		ctx, cancel := context.WithTimeout(context.Background(), clearBound)
		defer cancel()
		if _, err := execer.ExecContext(ctx, s.disarm()+freeStatement, nil); err == nil {
			return
		}
	}
	if conn, ok := dc.(driver.Conn); ok {
		_ = conn.Close() // database/sql calls it again, and has the error
	}
}

// attempts is the attempts of one acquisition, and when they end.
//
//   - Connections in the pool may be dead, after a restart of the server, say: as
//     database/sql does, such a one is dropped and the next one tried.
//   - A wait outlives a restart or a failover of the server: see outage.
//   - A session of several callers that dies is replaced.
//   - Anything else is final. So is a server that cannot be reached at first, but for Lead.
type attempts struct {
	ctx      context.Context
	db       *sql.DB
	keys     []Key
	cfg      *config
	began    time.Time
	deadline time.Time // of a Timeout, or zero

	stale   int       // connections in the pool that may be dead; -1: none has been taken yet
	lives   int       // times to lose a session to others, or a lock as soon as it is granted
	patient bool      // the server may be away from the start, and for ever
	waited  bool      // the server has answered, and the lock was taken
	outage  time.Time // when the server was first missed, while waiting
	away    error     // why it cannot be reached; nil: it can, as far as is known
	hint    string    // why the acquisition failed, beside its error

	turn *apartTurn // what is to be had before a session is; nil: nothing

	ended chan struct{} // closed when the last session that was given up has ended; nil: none was
}

func newAttempts(ctx context.Context, db *sql.DB, keys []Key, cfg *config) attempts {
	return attempts{ctx: ctx, db: db, keys: keys, cfg: cfg, began: time.Now(), deadline: cfg.deadline(), stale: -1, lives: 3}
}

// untilDeadline is ctx until the deadline.
func (a *attempts) untilDeadline() (context.Context, context.CancelFunc) {
	if a.deadline.IsZero() {
		return a.ctx, func() {}
	}
	return context.WithDeadline(a.ctx, a.deadline)
}

// over tells whether the Timeout is over.
func (a *attempts) over() bool {
	return !a.deadline.IsZero() && !time.Now().Before(a.deadline)
}

// keepTrying opens sessions until attempt succeeds on one, or fails for a reason
// that another session would not mend. On a failed one, attempt leaves no
// transaction open; the session is ended here.
func (a *attempts) keepTrying(attempt func(*session) error) (*session, error) {
	for {
		if err := a.ctx.Err(); err != nil {
			return nil, err
		}
		if err := a.joinUnderWay(); err != nil {
			return nil, err
		}
		if a.stale < 0 {
			a.stale = a.db.Stats().Idle
		}
		ctx, cancel := a.untilDeadline()
		var s *session
		var err error
		if a.turn != nil {
			s, err = a.turn.open(ctx)
		} else {
			s, err = openSession(ctx, a.db, a.cfg)
		}
		cancel()
		opened := err == nil
		if opened {
			if err = attempt(s); err == nil {
				return s, nil
			}
			a.hint = s.heldBy(err)
			ended := make(chan struct{})
			a.ended = ended
			s.giveUp(a.ctx, err, func() { close(ended) })
			if s.waited && !errors.Is(err, errStandby) {
				a.waited, a.outage = true, time.Time{}
			}
		}
		if err = a.again(err, opened, true); err != nil {
			return nil, err
		}
	}
}

// again returns nil, perhaps after a pause, if there is to be another attempt after one
// that has failed with err: on a session if one was opened, its own or one of others.
func (a *attempts) again(err error, opened, own bool) error {
	if a.ctx.Err() == nil && a.over() && (!opened || sessionGone(err)) {
		if !errors.Is(err, context.DeadlineExceeded) {
			a.hint = err.Error() // why not even the server has answered
		}
		err = errors.Join(errTimeout, err)
	}
	own = own && !errors.As(err, new(sessionLost)) // by a request of another's
	early := errors.Is(err, errLostBeforeUse)
	// database/sql closes a Conn that it has found dead.
	gone := sessionGone(err) || errors.As(err, new(sessionLost)) || opened && errors.Is(err, sql.ErrConnDone) ||
		// After a failover, the way to the new primary may lead to a standby for a while.
		errors.Is(err, errStandby) && !a.outage.IsZero()
	switch {
	case a.ctx.Err() != nil || errors.Is(err, errRefused) || errors.Is(err, errTimeout):
		if !opened && a.hint == "" {
			a.hint = poolHint(a.db)
		}
		return err
	case isClosed(err), !gone && !((a.waited || a.patient) && !opened && mayPass(err)):
		return err
	case early && a.lives == 0:
		return err
	case a.waited:
		if early {
			a.lives--
		}
		return a.outlive(err)
	case opened && !own && a.lives > 0:
		a.lives--
		return nil
	case a.stale > 0 && (opened || errors.As(err, new(noAnswer))):
		a.stale--
		return nil
	case a.patient:
		return a.outlive(err)
	default:
		return err
	}
}

// error is what the caller is told of err, which has ended the acquisition.
func (a *attempts) error(err error) error {
	if err == nil {
		return nil
	}
	if a.away != nil {
		a.hint = ""
		if !errors.Is(err, a.away) {
			a.hint, err = a.away.Error(), errors.Join(err, a.away)
		}
	}
	return acquireError(a.ctx, a.keys, a.cfg, err, a.hint)
}

// poolHint says that the pool's limit is why no connection was to be had, if it is.
func poolHint(db *sql.DB) string {
	if stats := db.Stats(); exhausted(stats) {
		return "all " + plural(stats.MaxOpenConnections, "connection") + " of the pool are in use"
	}
	return ""
}

// exhausted tells whether all connections of a limited pool are in use.
func exhausted(stats sql.DBStats) bool {
	return stats.MaxOpenConnections > 0 && stats.InUse >= stats.MaxOpenConnections
}

// heldBy says who holds the lock that a Timeout has just given up, if one query can
// tell.
func (s *session) heldBy(err error) string {
	if !errors.Is(err, errTimeout) || s.broken {
		return ""
	}
	return s.whoHolds(s.waitingFor)
}

func (s *session) whoHolds(k Key) string {
	var who string
	err := s.do(context.Background(), lateBound, func(ctx context.Context) (err error) {
		who, err = heldBy(ctx, s.conn, k)
		return err
	})
	if err == nil {
		return who
	}
	s.broken = sqlState(err) == ""
	return ""
}

// WithConnLock is [WithLock] for work that has to run on the very session that
// holds the lock, like migrations: fn is given the connection. What fn does on conn
// cannot happen after the lock is lost, because the lock is lost with the session.
// Therefore there is no heartbeat. [HolderTimeout] has no default here, because
// the server counts as silence whatever fn does between two statements; if the
// option is given, the server ends the session, and with it the lock, after such a
// silence, in a transaction or not. If the process dies while a statement runs, the server
// notices within about a second (client_connection_check_interval), and ends both.
//
// conn is handed back to the pool after fn, without any advisory lock on it. fn must
// not close it, nor leave rows or a transaction open or a setting changed on it. If it does one of the
// first three, the session is ended, and that is an error.
//
// It uses one connection, which it takes when no other caller in this process holds key
// through db, or asks for it: until then it waits without one.
//
// It takes the options Shared, NoWait, Timeout, HolderTimeout, Logger and Observe.
// Errors and panics are as with WithLock.
func WithConnLock(ctx context.Context, db *sql.DB, key Key, fn func(context.Context, *sql.Conn) error, opts ...Option) error {
	keys := []Key{key}
	c := call{function: "WithConnLock", options: withConnOptions, db: db, missing: missing("db", db == nil, "fn", fn == nil)}
	cfg, err := c.prepare(ctx, keys, opts)
	if err != nil {
		return err
	}
	ctx, o := observe(ctx, c.function, keys, &cfg)
	a := acquisition{attempts: newAttempts(ctx, db, keys, &cfg), hub: hubOf(db)}
	turn, err := a.enterApart(key)
	if err != nil {
		_, err = o.acquired(ctx, a.error(err), nil)
		return err
	}
	defer turn.leave()
	a.turn = turn
	s, err := a.keepTrying(func(s *session) error {
		s.settings.lent, s.settings.checks = true, !s.refusals().check
		_ = raw(s.conn, func(dc any) error {
			s.dc = dc
			return nil
		})
		if cfg.given.has(optHolderTimeout) {
			s.settings.silence = cfg.holderTimeout
		}
		return s.acquire(ctx, key, cfg.noWait, a.began, a.deadline)
	})
	ctx, err = o.acquired(ctx, a.error(err), func() { s.discard() })
	if err != nil {
		return err
	}
	h := &hold{session: s, cfg: cfg, observed: o}
	h.begin(ctx, db, keys, s)
	return h.run(func(ctx context.Context) error { return fn(ctx, s.conn) })
}

// AcquireConn takes the session-level lock of key on the caller's conn, where it
// stays until [ReleaseConn], or until the session ends; the end of ctx does not end it.
// Nothing watches the session: a lost lock is noticed by the next statement on it.
// conn must not be used by others until AcquireConn returns. It waits in the server's queue.
//
// In a transaction, AcquireConn refuses: take the lock before BEGIN, or use [AcquireTx]. If conn's session
// holds a lock of key already, shared or not, the error matches [ErrReentrant]: the server would count the two,
// and one ReleaseConn would leave one behind. To see that, it reads pg_locks, as ReleaseConn does.
//
// It takes the options Shared, NoWait, Timeout, Logger and Observe. After an error that
// matches [ErrReentrant] or [ErrNotAcquired], or in a transaction, conn is as it was before. If ctx ends during the wait,
// AcquireConn returns at once, and the next statement on conn, or its Close, may have to wait for
// up to 400 ms, until the server's is over. After any other error, the state of the session would be in
// doubt, and conn has been closed for good.
//
// If ctx carries key already, the result is ErrReentrant even if that was acquired
// on another database: conn does not tell.
func AcquireConn(ctx context.Context, conn *sql.Conn, key Key, opts ...Option) error {
	keys := []Key{key}
	c := call{function: "AcquireConn", options: acquireOptions, missing: missing("conn", conn == nil, "", false)}
	cfg, err := c.prepare(ctx, keys, opts)
	if err != nil {
		return err
	}
	ctx, o := observe(ctx, c.function, keys, &cfg)
	err = acquireConn(ctx, conn, keys, &cfg)
	o.acquireEnd(ctx, err)
	return err
}

func acquireConn(ctx context.Context, conn *sql.Conn, keys []Key, cfg *config) error {
	if err := ctx.Err(); err != nil {
		return acquireError(ctx, keys, cfg, err, "") // nothing was sent
	}
	s := newSession(conn, nil, cfg)
	err := s.acquire(ctx, keys[0], cfg.noWait, time.Now(), cfg.deadline())
	if err == nil {
		return nil
	}
	if !usable(ctx, err) {
		s.discard()
	}
	if errors.Is(err, ErrReentrant) {
		return &lockError{op: "acquire", key: keyList(keys), msg: "conn's session holds it already, and one ReleaseConn would leave it behind", errs: []error{ErrReentrant}}
	}
	// No question for the message: one that takes long would cost conn, with its other locks.
	return acquireError(ctx, keys, cfg, err, "")
}

// ReleaseConn releases what [AcquireConn] took on conn, once. It needs the same
// [Shared] option, and takes Logger. It is not bounded by ctx, which may have ended,
// but takes no more than a few seconds.
//
// If the session does not hold the lock, the error matches [ErrLost], and conn is as it was. If the
// server does not answer, or with an error, it matches ErrLost, too, and conn has been closed for good: whatever it
// still held is free.
func ReleaseConn(ctx context.Context, conn *sql.Conn, key Key, opts ...Option) error {
	return releaseConn(ctx, conn, key, releaseConnOptions, opts)
}

func releaseConn(ctx context.Context, conn *sql.Conn, key Key, allowed optionSet, opts []Option) error {
	keys := []Key{key}
	c := call{function: "ReleaseConn", options: allowed, missing: missing("conn", conn == nil, "", false)}
	cfg, err := c.check(ctx, "release", keys, opts)
	if err != nil {
		return err
	}
	s := newSession(conn, nil, &cfg)
	rows, err := s.exec(context.Background(), releaseBound, unlockHeldStatement(keys, cfg.shared))
	switch {
	case err != nil:
		s.discard()
	case rows == 0:
		err = errNotHeld
	default:
		return nil
	}
	return lostError("release", keys, err)
}
