package advisory

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"time"

	"github.com/pgadvisory/advisory/internal/manager"
	"github.com/pgadvisory/advisory/internal/session"
)

const (
	defaultHeartbeat     = time.Second
	defaultHolderTimeout = 15 * time.Second
)

// An Option changes how a lock is acquired or held. If an option is given twice, the last one
// counts. An option that makes no sense for a function, or beside another option, is an error
// before anything is sent. The package documentation has a table of functions and options.
type Option func(*config)

// Shared takes a shared lock: it excludes exclusive locks of the key, and not other shared
// ones.
//
// The default is an exclusive lock. Shared applies to all functions but [Lead]. [ReleaseConn]
// needs it for a lock that was taken with it.
//
// Within a process, the shared locks of a key are one lock of the server, and later shared
// callers do not overtake one who waits for an exclusive lock. Between processes, an exclusive
// waiter leaves the server's queue for a moment every 100 to 400 ms, and shared ones may pass
// then. Where shared locks of several processes overlap for longer than that, all the time, it
// may wait long.
func Shared() Option {
	return func(c *config) { c.given |= optShared; c.shared = true }
}

// NoWait gives up at once, with [ErrHeld], if another holds the lock.
//
// The default is to wait until ctx ends. NoWait applies to all functions but [Lead] and
// [ReleaseConn]. It excludes [Timeout].
//
// If another caller in this process holds the lock through the same *sql.DB, or asks for it,
// the answer comes without a round trip. Shared callers have the answer of the one who asks. A
// shared lock may still ask whether others wait for the one that it would share.
//
// NoWait is about the lock alone. If the pool is at its limit, the wait for a connection is
// bounded by ctx.
func NoWait() Option {
	return func(c *config) { c.given |= optNoWait; c.noWait = true }
}

// Timeout gives up after d, with [ErrHeld], or with [ErrNotAcquired] if it is not known
// whether another holds the lock.
//
// The default is to wait until ctx ends. d must be positive. Timeout applies to all functions
// but [Lead] and [ReleaseConn]. It excludes [NoWait].
//
// Everything counts: the wait for a pooled connection, BEGIN, an outage. If the server does
// not answer, Timeout is at most a second late. The error names who holds the lock, if one
// more query on an idle connection can tell in that time. With [AcquireConn] and [AcquireTx] it
// does not, because a query that takes long would cost the caller's session.
func Timeout(d time.Duration) Option {
	return func(c *config) { c.given |= optTimeout; c.timeout = d }
}

// AtLeast keeps the lock for at least d after its grant, even if fn ends, or Release is
// called, before that.
//
// The default is 0. d must not be negative. AtLeast applies to [WithLock], [WithLocks] and
// [Acquire].
//
// It is for a job that several processes start, each by its own clock, with [NoWait]. Without
// AtLeast, a job of 50 ms is over before the last clock strikes, and another process runs it
// again. d should be longer than the clocks differ. The time between two runs of the job
// should be longer than d by as much.
//
// The function returns as without AtLeast, and its error means the same. The lock is kept even
// if fn fails or panics, because its work may have been done. Nobody else gets it until d is
// over, in this process or another, unless it is lost. It keeps its connection, takes no
// goroutine, and survives [sql.DB.Close]. It ends with the process at the latest. If one of the
// locks is lost before fn has ended, all of them are released, and the error is [ErrLost].
//
// Heartbeats go on. A loss after the function has returned is reported to the [Logger] and to
// the [Observer], whose HoldEnd is called when the lock is released.
func AtLeast(d time.Duration) Option {
	return func(c *config) { c.given |= optAtLeast; c.atLeast = d }
}

// Heartbeat sets how often the session of a held lock is checked. A check must be answered
// within another d, so that a lost lock is noticed after 2d at the latest.
//
// The default is 1 s. d must be positive, and at most a third of [HolderTimeout]. Heartbeat
// applies to [WithLock], [WithLocks], [Acquire] and [Lead].
//
// A lock that is released before its first heartbeat costs none. One heartbeat is for all the
// locks on a session, at the shortest of their intervals.
func Heartbeat(d time.Duration) Option {
	return func(c *config) { c.given |= optHeartbeat; c.heartbeat = d }
}

// HolderTimeout sets how long a lock outlives a holder that falls silent (power loss,
// partition, SIGSTOP). The server ends a session that has waited for its next statement for d.
//
// The default is 15 s for [WithLock], [WithLocks], [Acquire] and [Lead]. d must be at least
// three heartbeats, so that the old holder's context has ended before the server lets a new
// holder begin. The server counts in milliseconds, up to 24 days. Where several locks are on
// one session, the shortest d counts for all of them.
//
// The first heartbeat sets d on the session, as idle_session_timeout. For a lock that was
// waited for in the server's queue, the grant does; for [Lead], a statement before fn. The last
// release takes it off, by RESET: a value that the program itself had SET is not restored.
// Before d is set, only the server's tcp_keepalives settings bound a holder that falls silent.
// They do not bound a frozen process, whose kernel answers them. A server whose own
// idle_session_timeout is shorter than a heartbeat frees locks too early.
//
// For [WithTxLock] and [WithConnLock], fn drives the session, so that there is no heartbeat and
// no default. If the option is given, the server ends the session once it has waited for fn's
// next statement for d, whether fn is at work or not. It does not count while a statement runs,
// but looks every second whether the process is still there (client_connection_check_interval).
// That finds a process that has died, and not a network that is cut: the server's
// tcp_keepalives settings are for that.
func HolderTimeout(d time.Duration) Option {
	return func(c *config) { c.given |= optHolderTimeout; c.holderTimeout = d }
}

// TxOptions sets the isolation level and access mode of the transaction of [WithTxLock], the
// only function that it applies to. The default, and nil, is the server's default.
func TxOptions(o *sql.TxOptions) Option {
	return func(c *config) { c.given |= optTxOptions; c.txOptions = o }
}

// Logger sets where the package reports what it cannot return as an error. Among that are the
// beginning and the end of an outage that waits go through; a connection that failed while
// waiting; a pool that is too small for fn; a release that failed while fn panicked; a lock
// that was lost under [AtLeast]; a [Lock] that was never released.
//
// The default, and nil, is silent, except for [Lead], where it is [slog.Default]. Logger
// applies to all functions.
func Logger(l *slog.Logger) Option {
	return func(c *config) { c.given |= optLogger; c.logger = l }
}

type optionSet uint16

const (
	optShared optionSet = 1 << iota
	optNoWait
	optTimeout
	optHeartbeat
	optHolderTimeout
	optTxOptions
	optLogger
	optObserve
	optAtLeast

	optionCount = iota
)

// optionNames has the name of each option, in the order of the constants above. One too many or too
// few does not compile.
var optionNames [optionCount]string = [...]string{"Shared", "NoWait", "Timeout", "Heartbeat", "HolderTimeout", "TxOptions", "Logger", "Observe", "AtLeast"}

// What each function takes.
const (
	acquireOptions     = optShared | optNoWait | optTimeout | optLogger | optObserve
	leadOptions        = optHeartbeat | optHolderTimeout | optLogger | optObserve
	sessionOptions     = acquireOptions | optHeartbeat | optHolderTimeout | optAtLeast
	withConnOptions    = acquireOptions | optHolderTimeout
	txOptions          = acquireOptions | optHolderTimeout | optTxOptions
	releaseConnOptions = optShared | optLogger
)

type config struct {
	given         optionSet
	shared        bool
	noWait        bool
	timeout       time.Duration // 0: none
	atLeast       time.Duration
	heartbeat     time.Duration
	holderTimeout time.Duration
	txOptions     *sql.TxOptions
	logger        *slog.Logger // never nil
	observer      *Observer    // nil: none
}

var defaultTx sql.TxOptions

// newConfig reads opts for the function called fn, which takes those in allowed.
func newConfig(fn string, allowed optionSet, opts []Option) (config, error) {
	c := config{heartbeat: defaultHeartbeat, holderTimeout: defaultHolderTimeout}
	for _, o := range opts {
		if o == nil {
			return c, errors.New("nil Option")
		}
		o(&c)
	}
	if c.logger == nil {
		c.logger = session.Silent
	}
	for i, name := range optionNames {
		if c.given&^allowed&(1<<i) != 0 {
			return c, fmt.Errorf("option %s does not apply to %s", name, fn)
		}
	}
	if c.given.has(optNoWait | optTimeout) {
		return c, errors.New("options NoWait and Timeout exclude each other")
	}
	for _, o := range [...]struct {
		option optionSet
		name   string
		d      time.Duration
	}{
		{optTimeout, "Timeout", c.timeout},
		{optHeartbeat, "Heartbeat", c.heartbeat},
		{optHolderTimeout, "HolderTimeout", c.holderTimeout},
	} {
		if c.given.has(o.option) && o.d <= 0 {
			return c, fmt.Errorf("option %s: %v is not positive", o.name, o.d)
		}
	}
	if c.atLeast < 0 {
		return c, fmt.Errorf("option AtLeast: %v is negative", c.atLeast)
	}
	if c.holderTimeout > math.MaxInt32*time.Millisecond {
		return c, fmt.Errorf("option HolderTimeout: %v is more than PostgreSQL's limit of %v", c.holderTimeout, math.MaxInt32*time.Millisecond)
	}
	// Division, because three times a long heartbeat may overflow.
	if allowed.has(optHeartbeat) && c.holderTimeout/3 < c.heartbeat {
		return c, fmt.Errorf("option HolderTimeout: %s is under three heartbeats of %s",
			c.describe(optHolderTimeout, c.holderTimeout), c.describe(optHeartbeat, c.heartbeat))
	}
	if c.txOptions == nil {
		c.txOptions = &defaultTx
	}
	switch c.txOptions.Isolation {
	case sql.LevelDefault, sql.LevelReadUncommitted, sql.LevelReadCommitted, sql.LevelRepeatableRead, sql.LevelSerializable:
	default:
		return c, fmt.Errorf("option TxOptions: PostgreSQL has no isolation level %v", c.txOptions.Isolation)
	}
	return c, nil
}

// request returns the request for keys by the caller of ctx. If db is nil, it is taken for that
// of the innermost lock that ctx carries.
func (c *config) request(ctx context.Context, db *sql.DB, keys []Key) *manager.Request {
	db, held := held(ctx, db)
	return &manager.Request{
		DB: db, Keys: bare(keys), Shared: c.shared, NoWait: c.noWait, Timeout: c.timeout, Log: c.logger, CallerHolds: held,
	}
}

// givenHolderTimeout returns the HolderTimeout where it has no default: 0 if it is not given.
func (c *config) givenHolderTimeout() time.Duration {
	if !c.given.has(optHolderTimeout) {
		return 0
	}
	return c.holderTimeout
}

// describe returns d, which is that of option o, for a message.
func (c *config) describe(o optionSet, d time.Duration) string {
	if !c.given.has(o) {
		return d.String() + " (the default)"
	}
	return d.String()
}

func (s optionSet) has(o optionSet) bool { return s&o == o }
