package advisory

import (
	"context"
	"time"
)

// An Observer is told what happens to locks: how long acquisitions wait and how they end, how
// long locks are held, and when one is lost. It is a set of functions, each of which may be
// nil. They are called synchronously, except Lost, possibly from several goroutines at a time,
// and should be quick. HoldEnd must not release the lock that it is about.
//
// What a Start function returns is the context of what follows. That of AcquireStart is the
// context of the acquisition and of HoldStart, and that of HoldStart is the context of fn. So
// a span that HoldStart starts becomes the parent of fn's spans. One that AcquireStart starts
// would, too: a HoldStart that does not want that puts the span before it back.
type Observer struct {
	// AcquireStart is called before anything is sent. A nil result changes nothing.
	AcquireStart func(context.Context, LockInfo) context.Context

	// AcquireEnd is called with how long the acquisition took, and its error: it matches ErrHeld
	// where another holds the lock, and ErrNotAcquired where ctx has ended.
	AcquireEnd func(ctx context.Context, info LockInfo, took time.Duration, err error)

	// HoldStart is called when the lock is held, except by AcquireConn and AcquireTx,
	// whose caller alone knows when that ends. fn's ctx is made from its result.
	HoldStart func(context.Context, LockInfo) context.Context

	// Lost is called, on a goroutine of its own, when a held lock is found to be lost: by a
	// heartbeat, or by what another caller asks on the same session. HoldEnd may come at the
	// same time or before; a loss that is found by the release, or by fn's own statements on
	// the session, is HoldEnd's alone.
	Lost func(ctx context.Context, info LockInfo, err error)

	// HoldEnd is called after the release, with how long that is since the grant; with AtLeast,
	// that may be after the function has returned. err is that of the release, or the commit: it
	// matches ErrLost if the lock cannot be shown to have been held to the end.
	HoldEnd func(ctx context.Context, info LockInfo, held time.Duration, err error)
}

// LockInfo says what an [Observer]'s call is about.
type LockInfo struct {
	Function string // "WithLock", "Acquire", …
	Keys     []Key  // not to be changed
	Shared   bool
}

// Observe reports the lock's events to o. The default, and nil, is no Observer. Observe
// applies to all functions but [ReleaseConn].
func Observe(o *Observer) Option {
	return func(c *config) { c.given |= optObserve; c.observer = o }
}

// An observation is one call under an Observer. A nil one is under none.
type observation struct {
	*Observer
	info  LockInfo
	start time.Time       // of the acquisition, then of the hold
	hold  context.Context // the context of Lost and HoldEnd: what HoldStart returned
}

func observe(ctx context.Context, function string, keys []Key, cfg *config) (context.Context, *observation) {
	if cfg.observer == nil {
		return ctx, nil
	}
	o := &observation{Observer: cfg.observer, info: LockInfo{function, keys, cfg.shared}, start: time.Now()}
	if o.AcquireStart != nil {
		if c := o.AcquireStart(ctx, o.info); c != nil {
			ctx = c
		}
	}
	return ctx, o
}

// acquired tells that the lock is held, and returns the context to make fn's from. If the
// Observer panics, the lock is abandoned.
func (o *observation) acquired(ctx context.Context, abandon func()) context.Context {
	if o == nil {
		return ctx
	}
	told := false
	defer func() {
		if !told {
			abandon()
		}
	}()
	o.acquireEnd(ctx, nil)
	if o.HoldStart != nil {
		if c := o.HoldStart(ctx, o.info); c != nil {
			ctx = c
		}
	}
	o.hold = ctx
	told = true
	return ctx
}

// acquireEnd tells how the acquisition has ended.
func (o *observation) acquireEnd(ctx context.Context, err error) {
	if o == nil {
		return
	}
	now := time.Now()
	if o.AcquireEnd != nil {
		o.AcquireEnd(ctx, o.info, now.Sub(o.start), err)
	}
	o.start = now
}

// lost does not wait for Lost: other holders are still to be told.
func (o *observation) lost(err error) {
	if o != nil && o.Lost != nil {
		go o.Lost(o.hold, o.info, err)
	}
}

func (o *observation) holdEnd(err error) {
	if o != nil && o.HoldEnd != nil {
		o.HoldEnd(o.hold, o.info, time.Since(o.start), err)
	}
}
