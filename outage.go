package advisory

import (
	"context"
	"log/slog"
	"math/rand/v2"
	"time"
)

const (
	// reconnectFor is how long a wait goes on without a server: longer than a restart or a failover.
	reconnectFor = 30 * time.Second

	// How long a wait pauses between two attempts to reach the server: at first, and at most.
	outagePauseMin = 50 * time.Millisecond
	outagePauseMax = 2 * time.Second

	// probeBound is how long one attempt takes at most: what it waits for may never come, and the next one's may.
	probeBound = 2 * time.Second
)

// An outage lasts from the loss of a waiting session until the server answers again. All waits of a
// *sql.DB go through it together. One of them at a time tries to reach the server.
type outage struct {
	began time.Time
	turn  chan struct{} // filled by the wait that tries
	over  chan struct{} // closed at the end

	// Belong to the wait that has the turn.
	pause time.Duration
	next  time.Time // of the next attempt, whoever makes it

	// Guarded by hub.mu.
	waits   int
	loggers map[*slog.Logger]bool // of the waits: whether it has been told
	missed  error                 // why the server was last not reached; nil: it has not been tried yet
	final   error                 // that will not pass; set before over is closed
}

// outlive waits until the server answers again. The wait has lost its session by err, or could not open one.
func (a *attempts) outlive(err error) error {
	if a.outage.IsZero() {
		a.outage = time.Now()
	}
	h := hubOf(a.db)
	o := h.joinOutage(a.cfg.logger)
	defer h.leaveOutage(o)
	ctx, cancel := a.untilDeadline()
	defer cancel()
	if !a.patient {
		ctx, cancel = context.WithDeadline(ctx, a.outage.Add(reconnectFor))
		defer cancel()
	}
	select {
	case <-o.over:
	case o.turn <- struct{}{}:
		defer func() { <-o.turn }()
		a.reach(ctx, h, o, err)
	case <-ctx.Done():
	}
	h.mu.Lock()
	missed := o.missed
	h.mu.Unlock()
	select {
	case <-o.over:
		a.away = nil
		return o.final
	default:
	}
	if missed == nil {
		missed = err
	}
	a.away = missed
	switch {
	case a.ctx.Err() != nil:
		return a.ctx.Err()
	case a.over():
		return errTimeout
	default:
		return missed
	}
}

// reach tries to reach the server until it answers, or ctx ends.
func (a *attempts) reach(ctx context.Context, h *hub, o *outage, lost error) {
	for {
		select {
		case <-o.over:
			return
		default:
		}
		sleep(ctx, time.Until(o.next))
		if ctx.Err() != nil {
			return
		}
		if o.missed == nil && exhausted(a.db.Stats()) {
			h.endOutage(o, nil) // a wait for the pool is each wait's own
			return
		}
		err := a.probe(ctx)
		o.pause = min(2*o.pause, outagePauseMax)
		o.next = time.Now().Add(o.pause/2 + rand.N(o.pause/2))
		switch {
		case err == nil && o.missed == nil:
			a.cfg.logger.Warn("advisory: session lost while waiting, and replaced", "key", keyList(a.keys), "error", lost)
			h.endOutage(o, nil)
		case err == nil:
			h.endOutage(o, nil)
		case ctx.Err() != nil:
		case isClosed(err) || !mayPass(err):
			h.endOutage(o, err)
		default:
			h.missServer(o, err)
		}
	}
}

// probe returns nil if the server answers, and is a primary. It passes over dead connections of the pool.
func (a *attempts) probe(ctx context.Context) error {
	for dead := a.db.Stats().Idle; ; dead-- {
		soon, cancel := context.WithTimeoutCause(ctx, probeBound, noAnswer{probeBound})
		s, err := openSession(soon, a.db, a.cfg)
		cancel()
		if err != nil {
			return err
		}
		rows, err := s.execLeft(ctx, probeBound, probeStatement, Key{}, true)
		switch {
		case err == nil && rows == standbyRows:
			s.handBack()
			return errStandby
		case err == nil:
			s.handBack()
			return nil
		}
		s.giveUp(ctx, err, func() {})
		if dead <= 0 || ctx.Err() != nil {
			return err
		}
	}
}

// joinOutage counts a wait among those that wait for the server.
func (h *hub) joinOutage(log *slog.Logger) *outage {
	h.mu.Lock()
	if h.outage == nil {
		h.outage = &outage{
			began: time.Now(), pause: outagePauseMin, next: time.Now().Add(outagePauseMin/2 + rand.N(outagePauseMin/2)),
			turn: make(chan struct{}, 1), over: make(chan struct{}), loggers: make(map[*slog.Logger]bool),
		}
	}
	o := h.outage
	o.waits++
	missed := o.missed
	tell := missed != nil && !o.loggers[log]
	o.loggers[log] = missed != nil
	h.mu.Unlock()
	if tell {
		tellMissed(log, missed)
	}
	return o
}

// leaveOutage uncounts a wait. An outage that nobody waits out is forgotten.
func (h *hub) leaveOutage(o *outage) {
	h.mu.Lock()
	defer h.mu.Unlock()
	o.waits--
	if o.waits == 0 && h.outage == o {
		h.outage = nil
	}
}

// missServer notes why the server was not reached, and has it told once.
func (h *hub) missServer(o *outage, err error) {
	h.mu.Lock()
	var tell []*slog.Logger
	for log, told := range o.loggers {
		if !told {
			o.loggers[log] = true
			tell = append(tell, log)
		}
	}
	o.missed = err
	h.mu.Unlock()
	for _, log := range tell {
		tellMissed(log, err)
	}
}

func tellMissed(log *slog.Logger, err error) {
	log.Warn("advisory: the server cannot be reached; waits go on when it is back", "error", err)
}

// endOutage ends the outage. A final error ends its waits, too.
func (h *hub) endOutage(o *outage, final error) {
	h.mu.Lock()
	if h.outage == o {
		h.outage = nil
	}
	o.final = final
	loggers := o.loggers
	o.loggers = nil
	close(o.over)
	h.mu.Unlock()
	if final != nil {
		return // which each wait returns
	}
	for log, told := range loggers {
		if told {
			log.Info("advisory: the server is back", "after", time.Since(o.began).Round(time.Millisecond))
		}
	}
}

// joinUnderWay has a wait join an outage that others are in, rather than find out by itself.
func (a *attempts) joinUnderWay() error {
	if !a.waited && !a.patient {
		return nil
	}
	h := hubOf(a.db)
	h.mu.Lock()
	var missed error
	if h.outage != nil {
		missed = h.outage.missed
	}
	h.mu.Unlock()
	if missed == nil {
		return nil
	}
	return a.outlive(missed)
}
