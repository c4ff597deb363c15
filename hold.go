package advisory

import (
	"cmp"
	"context"
	"database/sql"
	"errors"
	"slices"
	"sync"
	"time"

	"github.com/pgadvisory/advisory/internal/manager"
	"github.com/pgadvisory/advisory/internal/pgsql"
	"github.com/pgadvisory/advisory/internal/session"
)

// A hold is the locks that one caller holds, and what ends with them.
type hold struct {
	marked // fn's ctx
	cancel context.CancelCauseFunc
	cfg    config

	locks   *manager.Locks   // nil: the lock is on session
	until   time.Time        // AtLeast: locks are kept until then
	waits   int64            // the pool's WaitCount when the hold began
	session *session.Session // that of WithConnLock, which its caller drives

	observed *observation

	once sync.Once // the release
	err  error     // its result
}

// with runs fn while h holds the locks of keys.
func (h *hold) with(ctx context.Context, function string, db *sql.DB, keys []Key, fn func(context.Context) error, opts []Option) (err error) {
	c := call{function: function, options: sessionOptions, db: db, missing: cmp.Or(nilArg("db", db == nil), nilArg("fn", fn == nil))}
	if h.cfg, err = c.prepare(ctx, keys, opts); err != nil {
		return err
	}
	if err := h.acquire(ctx, c, keys); err != nil {
		return err
	}
	return h.run(fn)
}

// acquire acquires keys, and has them watched.
func (h *hold) acquire(ctx context.Context, c call, keys []Key) error {
	ctx, h.observed = observe(ctx, c.function, keys, &h.cfg)
	r := h.cfg.request(ctx, c.db, keys)
	r.Heartbeat, r.IdleTimeout, r.Lead = h.cfg.heartbeat, h.cfg.holderTimeout, c.leads
	locks, err := manager.Acquire(ctx, r)
	h.until = time.Now().Add(h.cfg.atLeast)
	if err != nil {
		err = acquireError(ctx, keys, &h.cfg, err)
	}
	if c.detached {
		ctx = context.WithoutCancel(ctx)
	}
	if err != nil {
		h.observed.acquireEnd(ctx, err)
		return err
	}
	ctx = h.observed.acquired(ctx, func() { _ = locks.Release() })
	h.locks, h.waits = locks, c.db.Stats().WaitCount
	h.begin(ctx, c.db, keys, locks.Session())
	locks.Begin(h.lost)
	return nil
}

// begin makes the hold's context.
func (h *hold) begin(ctx context.Context, db *sql.DB, keys []Key, s *session.Session) {
	var inner context.Context
	inner, h.cancel = context.WithCancelCause(ctx)
	h.mark(inner, db, keys, s, nil)
}

// lost ends the hold's context. The release is still to come.
func (h *hold) lost(cause error) {
	if h.ended.Swap(true) {
		return
	}
	err := lostError("hold", h.keys, cause)
	h.cancel(err)
	h.observed.lost(err)
}

// run runs fn under the locks, and releases them whatever becomes of fn.
func (h *hold) run(fn func(context.Context) error) (err error) {
	returned := false
	defer func() {
		lost := h.release()
		switch {
		case returned:
			err = join(err, lost)
		case lost != nil: // a panic or Goexit is on its way, and no error can be
			h.cfg.logger.Error("advisory: while fn panicked", "error", lost)
		}
	}()
	err = fn(&h.marked)
	err = join(err, h.starved(err))
	returned = true
	return err
}

// starved returns an error if fn may have waited in vain for the pool's only connection, which the
// lock has.
func (h *hold) starved(err error) error {
	ended := errors.Is(err, context.DeadlineExceeded) || errors.Is(err, context.Canceled)
	if !ended || errors.As(err, new(*Error)) || h.session != nil || !manager.Starved(h.db, h.waits) {
		return nil
	}
	return &Error{Op: "hold", Keys: h.keys, msg: "fn cannot get a connection while the lock is held, because the pool is limited to one (SetMaxOpenConns)"}
}

// release ends the hold, once.
func (h *hold) release() error {
	h.once.Do(func() {
		err, kept := session.ErrPanicked, false
		defer func() { // also if the driver panics
			if !kept {
				h.err = h.releaseError(err)
				h.observed.holdEnd(h.err)
			}
		}()
		if h.session != nil {
			h.session.FindRows()
		}
		// Work that goes by the context ends before another holder's begins.
		h.ended.Store(true)
		h.cancel(nil)
		kept = h.keep()
		switch {
		case kept:
		case h.session != nil:
			err = h.session.Release()
		default:
			err = h.locks.Release()
		}
	})
	return h.err
}

// keep keeps the locks until AtLeast is over, and then releases them, by a timer. It returns false
// if AtLeast is over already, or a lock is lost.
func (h *hold) keep() bool {
	if time.Until(h.until) <= 0 {
		return false
	}
	pinged := false
	defer func() {
		if !pinged { // the driver has panicked
			go func() { _ = h.locks.Release() }()
		}
	}()
	err := h.locks.Ping()
	pinged = true
	if err != nil {
		return false
	}
	// The caller has its result, so that a loss is for the Logger and the Observer. They are told on
	// another goroutine, because this one tells other holders.
	var told sync.Once
	warn := func(err error) { h.cfg.logger.Warn("advisory: lock lost before AtLeast was over", "error", err) }
	h.locks.Begin(func(cause error) {
		go told.Do(func() {
			err := lostError("hold", h.keys, cause)
			warn(err)
			h.observed.lost(err)
		})
	})
	time.AfterFunc(time.Until(h.until), func() {
		err := h.releaseError(h.locks.Release())
		if err != nil {
			told.Do(func() { warn(err) })
		}
		h.observed.holdEnd(err)
	})
	return true
}

// releaseError returns the error of a release that has ended with err.
func (h *hold) releaseError(err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, session.ErrLeftOpen), errors.Is(err, session.ErrConnClosed):
		return &Error{Op: "release", Keys: h.keys, msg: err.Error(), errs: []error{err}}
	default:
		return lostError("release", h.keys, err)
	}
}

// A call is a call of an exported function, which is checked before anything is sent.
type call struct {
	function string
	options  optionSet // those that apply
	db       *sql.DB   // nil where the function is not given one
	missing  string    // the first argument that is nil, or ""
	detached bool      // the hold outlives ctx
	leads    bool      // it is Lead
}

// nilArg returns the name of an argument that is nil, or "".
func nilArg(name string, isNil bool) string {
	if isNil {
		return name
	}
	return ""
}

// prepare checks the call of an acquiring function, and reads its options.
func (c call) prepare(ctx context.Context, keys []Key, opts []Option) (config, error) {
	cfg, err := c.check(ctx, "acquire", keys, opts)
	if err == nil && len(keys) == 0 {
		err = &Error{Op: "acquire", msg: "no keys"}
	}
	if err != nil {
		return cfg, err
	}
	return cfg, checkReentrant(ctx, c.db, keys)
}

func (c call) check(ctx context.Context, op string, keys []Key, opts []Option) (config, error) {
	cfg, err := newConfig(c.function, c.options, opts)
	switch {
	case ctx == nil:
		err = errors.New("nil ctx")
	case c.missing != "":
		err = errors.New("nil " + c.missing)
	case slices.ContainsFunc(keys, func(k Key) bool { return k.key.Space == pgsql.NoSpace }):
		err = errors.New(`the zero Key, Name("") and HashText("") are no keys`)
	}
	if err != nil {
		return cfg, &Error{Op: op, Keys: keys, msg: err.Error(), errs: []error{err}}
	}
	return cfg, nil
}
