package manager

import (
	"context"
	"fmt"
	"log/slog"
	"time"

	"github.com/pgadvisory/advisory/internal/pgsql"
	"github.com/pgadvisory/advisory/internal/session"
)

const (
	// reconnectFor is how long a wait goes on without a server: longer than a restart or a failover.
	reconnectFor = 30 * time.Second

	// How long the pause between two attempts to reach the server is: at first, and at most.
	outagePauseMin = 50 * time.Millisecond
	outagePauseMax = 2 * time.Second

	// probeBound is how long a connection may take to be made, and how long its answer: it may hang where the next
	// one would succeed.
	probeBound = 2 * time.Second
)

// An outage begins when a wait loses its session, or cannot open one, and lasts until the server answers
// again. All waits of a *sql.DB go through it together. One goroutine tries to reach the server, until it
// does or nobody waits any more.
type outage struct {
	began time.Time
	over  chan struct{}      // closed at the end
	stop  context.CancelFunc // ends the goroutine

	// Guarded by Manager.mu.
	waits   int
	loggers map[*slog.Logger]bool // of the waits: whether it has been told
	lastErr error                 // why the server was last not reached; nil: it has not been tried yet
	final   error                 // that will not pass; set before over is closed
}

// outlive waits until the server answers again. The wait has lost its session by err, or could not
// open one.
func (a *acquisition) outlive(err error) error {
	if a.missedSince.IsZero() {
		a.missedSince = time.Now()
	}
	o, untold := a.joinOutage(err)
	defer a.m.leaveOutage(o)
	if untold != nil {
		tellMissed(a.Log, untold)
	}
	ctx := a.ctx
	if !a.Lead {
		var cancel context.CancelFunc
		ctx, cancel = context.WithDeadline(ctx, a.missedSince.Add(reconnectFor))
		defer cancel()
	}
	select {
	case <-o.over:
		a.away = nil
		return o.final
	case <-ctx.Done():
	}
	a.m.mu.Lock()
	defer a.m.mu.Unlock()
	if a.away = o.lastErr; a.away == nil {
		a.away = err
	}
	if a.ctx.Err() != nil {
		return context.Cause(a.ctx)
	}
	return a.away
}

// joinUnderWay has a wait join the outage that others are in, if there is one.
func (a *acquisition) joinUnderWay() error {
	if !a.waited && !a.Lead {
		return nil
	}
	a.m.mu.Lock()
	err := a.m.missedLocked()
	a.m.mu.Unlock()
	if err == nil {
		return nil
	}
	return a.outlive(err)
}

// missedLocked returns why the server cannot be reached, if there is an outage and it has been tried.
func (m *Manager) missedLocked() error {
	if m.outage == nil {
		return nil
	}
	return m.outage.lastErr
}

// joinOutage counts a wait, whose connection has failed with err, among those that wait for the server. It
// returns why the server was missed, if the wait's Logger is to be told.
func (a *acquisition) joinOutage(err error) (*outage, error) {
	m, log := a.m, a.Log
	m.mu.Lock()
	defer m.mu.Unlock()
	o := m.outage
	if o == nil {
		ctx, stop := context.WithCancel(context.Background())
		o = &outage{began: time.Now(), over: make(chan struct{}), stop: stop, loggers: make(map[*slog.Logger]bool)}
		m.outage = o
		go m.reach(ctx, o, a.pool, func() {
			log.Warn("advisory: connection failed while waiting; going on with another", "key", pgsql.List(a.Keys), "error", err)
		})
	}
	o.waits++
	if o.loggers[log] {
		return o, nil
	}
	o.loggers[log] = o.lastErr != nil
	return o, o.lastErr
}

// leaveOutage uncounts a wait. An outage that nobody waits out is forgotten.
func (m *Manager) leaveOutage(o *outage) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if o.waits--; o.waits > 0 {
		return
	}
	o.stop()
	if m.outage == o {
		m.outage = nil
	}
}

// reach tries to reach the server until it answers, or ctx ends. If it answers at once, no more than a
// connection has failed: then reach calls noOutage.
func (m *Manager) reach(ctx context.Context, o *outage, pool session.Pool, noOutage func()) {
	defer func() {
		if p := recover(); p != nil { // the driver's, or a Logger's
			m.endOutage(o, fmt.Errorf("%w: %v", session.ErrPanicked, p))
		}
	}()
	pauses := session.NewBackoff(outagePauseMin, outagePauseMax)
	for first := true; ; first = false {
		pauses.Pause(ctx)
		if ctx.Err() != nil {
			return
		}
		if first && pool.Exhausted() {
			m.endOutage(o, nil) // a wait for the pool is each wait's own
			return
		}
		err := probe(ctx, pool)
		switch {
		case ctx.Err() != nil:
			return
		case err == nil:
			if first {
				noOutage()
			}
			m.endOutage(o, nil)
			return
		case pgsql.PoolClosed(err) || !pgsql.MayPass(err):
			m.endOutage(o, err)
			return
		}
		m.missServer(o, err)
	}
}

// probe returns nil if the server answers, and is a primary. It passes over the connections of the pool that are
// dead, or lead to a standby: those that are made from now on may lead elsewhere.
func probe(ctx context.Context, pool session.Pool) error {
	for idle := pool.DB.Stats().Idle; ; idle-- {
		soon, cancel := context.WithTimeoutCause(ctx, probeBound, pgsql.NoAnswer{After: probeBound})
		s, err := pool.Open(soon, session.Silent, session.ForLocks)
		cancel()
		if err != nil {
			return err
		}
		var rows int64
		s.End(func() bool {
			rows, err = s.ExecQuiet(ctx, probeBound, pgsql.Probe)
			if err == nil && rows == pgsql.OnStandby {
				err = session.ErrStandby
			}
			return err == nil
		})
		if err == nil || idle <= 0 || ctx.Err() != nil {
			return err
		}
	}
}

// missServer notes why the server was not reached, and has it told once. Those who do not wait are told, too.
func (m *Manager) missServer(o *outage, err error) {
	m.mu.Lock()
	var tell []*slog.Logger
	for log, told := range o.loggers {
		if !told {
			o.loggers[log] = true
			tell = append(tell, log)
		}
	}
	o.lastErr = err
	for _, q := range m.queues { // they share the answer of one that waits for the server
		q.Refuse(err)
	}
	m.mu.Unlock()
	for _, log := range tell {
		tellMissed(log, err)
	}
}

func tellMissed(log *slog.Logger, err error) {
	log.Warn("advisory: the server cannot be reached; waits go on when it is back", "error", err)
}

// endOutage ends the outage. A final error ends its waits, too.
func (m *Manager) endOutage(o *outage, final error) {
	m.mu.Lock()
	if o.loggers == nil { // it has ended
		m.mu.Unlock()
		return
	}
	if m.outage == o {
		m.outage = nil
	}
	o.final = final
	loggers := o.loggers
	o.loggers = nil
	close(o.over)
	m.mu.Unlock()
	o.stop()
	if final != nil {
		return // which each wait returns
	}
	for log, told := range loggers {
		if told {
			log.Info("advisory: the server is back", "after", time.Since(o.began).Round(time.Millisecond))
		}
	}
}
