package advisorygocron

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"

	"github.com/go-co-op/gocron/v2"

	"github.com/pgadvisory/advisory"
)

// ErrNotLeader is why a job does not run here.
var ErrNotLeader = errors.New("advisorygocron: not the leader")

// An Elector is a [gocron.Elector]: of the schedulers that share a database, the leader runs
// all jobs. It holds its lock from one tick to the next, so that clocks may differ.
//
// gocron asks it before each run, and never again. A leader finds out that its lock is lost
// within two heartbeats, and by then another may lead: wrap what must not run beside
// the new leader's in [Elector.Task]. A tick at the moment of the change may run nowhere,
// or on both leaders if their clocks differ.
type Elector struct {
	cancel context.CancelFunc
	first  chan struct{} // closed when the first campaign has its outcome
	done   chan struct{} // closed when Lead has returned
	err    error         // Lead's, once done is closed

	answered func() // closes first, once

	mu    sync.Mutex
	term  context.Context // ends with the leadership; nil if another leads
	tasks sync.WaitGroup  // those that run in this term; Add is under mu
}

var _ gocron.Elector = (*Elector)(nil)

// NewElector starts to campaign for the leadership that key stands for. It takes the
// options of [advisory.Lead]. An argument or an option that is wrong is an error. The caller must
// call Close.
//
// A leadership that is lost is reported as by Lead; the first one to [slog.Default], whatever the Logger.
func NewElector(db *sql.DB, key advisory.Key, opts ...advisory.Option) (*Elector, error) {
	ctx, cancel := context.WithCancel(context.Background())
	e := &Elector{cancel: cancel, first: make(chan struct{}), done: make(chan struct{})}
	e.answered = sync.OnceFunc(func() { close(e.first) })
	err := check(func(ctx context.Context, unobserved advisory.Option) error {
		return advisory.Lead(ctx, db, key, e.lead, append(slices.Clip(opts), unobserved)...)
	})
	if err != nil {
		cancel()
		return nil, fmt.Errorf("advisorygocron: %w", err)
	}
	go e.campaign(ctx, db, key, opts)
	return e, nil
}

// campaign leads whenever it can. The first time, it does not wait: it leads, or knows that another does.
// Otherwise all schedulers would still wait for that when their first tick comes, and nobody would run it.
func (e *Elector) campaign(ctx context.Context, db *sql.DB, key advisory.Key, opts []advisory.Option) {
	defer close(e.done)
	defer e.answered()
	err := advisory.WithLock(ctx, db, key, e.lead, append(slices.Clip(opts), advisory.NoWait())...)
	e.answered() // Lead deals with what went wrong, if anything did
	if errors.Is(err, advisory.ErrLost) && ctx.Err() == nil {
		// Lead has not begun, and cannot say so. The Logger among opts is known to the package alone.
		slog.Warn("advisory: leadership lost; campaigning again", "error", err)
	}
	if err := advisory.Lead(ctx, db, key, e.lead, opts...); !errors.Is(err, context.Canceled) {
		e.err = err
	}
}

// lead is one term. Lead waits for it before it lets go of the lock, or asks for it again.
func (e *Elector) lead(ctx context.Context) error {
	e.mu.Lock()
	e.term = ctx
	e.mu.Unlock()
	e.answered()
	<-ctx.Done()
	e.mu.Lock()
	e.term = nil // no task joins any more
	e.mu.Unlock()
	e.tasks.Wait()
	return nil
}

// IsLeader implements [gocron.Elector]. Before the first campaign has its outcome, after one round
// trip, IsLeader waits for that: so the first run of a job happens on one of the schedulers.
func (e *Elector) IsLeader(ctx context.Context) error {
	select {
	case <-e.first:
	case <-ctx.Done():
		return errors.Join(ErrNotLeader, context.Cause(ctx))
	}
	select {
	case <-e.done: // by Close, or because db is closed
		return errors.Join(ErrNotLeader, e.err)
	default:
	}
	_, err := e.current(0)
	return err
}

// Task makes a function for gocron.NewTask from fn. Its ctx ends when the scheduler shuts
// down, and also when the leadership ends: with a cause that matches [advisory.ErrLost] if it
// was lost. If it was given up, by Close, no other leads before fn has returned. fn can
// ask [advisory.Token] for the fencing token of the leader.
func (e *Elector) Task(fn func(context.Context) error) func(context.Context) error {
	return func(job context.Context) error {
		term, err := e.current(1)
		if err != nil {
			return err
		}
		defer e.tasks.Done()
		ctx, cancel := context.WithCancelCause(term)
		defer cancel(nil)
		defer context.AfterFunc(job, func() { cancel(context.Cause(job)) })()
		return fn(ctx)
	}
}

// current returns the context of the term, of which tasks more are counted.
func (e *Elector) current(tasks int) (term context.Context, err error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.term == nil || e.term.Err() != nil {
		return nil, ErrNotLeader
	}
	e.tasks.Add(tasks)
	return e.term, nil
}

// Close gives the leadership up, or the candidacy, and waits until that is done.
func (e *Elector) Close() error {
	e.cancel()
	<-e.done
	return e.err
}
