// Package neighbours holds what it takes to use advisory with the libraries next to it:
// adapters for github.com/go-co-op/gocron/v2, and a wrapper for
// github.com/golang-migrate/migrate/v4. It is not meant to be imported, but to be copied
// from: each file stands alone. (github.com/pressly/goose/v3 needs no adapter: see
// advisory.NewSessionLocker.)
package neighbours

import (
	"context"
	"database/sql"
	"errors"
	"slices"
	"sync"
	"time"

	"github.com/go-co-op/gocron/v2"

	"github.com/pgadvisory/advisory"
)

// A Locker is a gocron.Locker: of the schedulers that share a database, one runs each
// tick of a job.
//
// A lock that is held for the job's run alone does not do that. The schedulers' clocks
// differ, and a job may be over before the next scheduler's clock strikes: it would
// find the lock free, and run the same tick again (go-co-op/gocron#841). gocron does not
// tell a Locker which tick it asks for. So a lock is kept for some time even if the job
// ends sooner.
//
// That time, atLeast, must be longer than the schedulers are apart (the difference of
// their clocks, and the delays of a busy machine), or a tick may run twice. It must be
// shorter than the time between two ticks, less the same difference, or the next tick
// finds the lock taken and is left out. Half the time between two ticks is as far from
// the one as from the other. The ticks themselves must be meant to coincide: by
// CronJob, or by DurationJob with WithStartAt.
//
// A job that runs past its next tick keeps the lock, and that tick is left out everywhere.
// So is one for which the database is out of reach. See gocron.AfterLockError.
type Locker struct {
	db      *sql.DB
	app     string
	atLeast time.Duration
	opts    []advisory.Option
	held    sync.WaitGroup
}

var _ gocron.Locker = (*Locker)(nil)

// NewLocker returns a Locker whose locks are named app/job: give jobs names that are the
// same in every process (gocron.WithName). It takes the options of advisory.Acquire but for
// NoWait and Timeout. gocron drops the error of a lock that was lost during a job: Observe
// has it.
func NewLocker(db *sql.DB, app string, atLeast time.Duration, opts ...advisory.Option) *Locker {
	return &Locker{db: db, app: app, atLeast: atLeast, opts: append(slices.Clip(opts), advisory.NoWait())}
}

// Lock implements gocron.Locker.
func (l *Locker) Lock(ctx context.Context, job string) (gocron.Lock, error) {
	if l.atLeast > 0 {
		// Who has to wait too long for a connection is too late for this tick: the
		// scheduler that ran it may not hold the lock any more.
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, l.atLeast/2)
		defer cancel()
	}
	lock, err := advisory.Acquire(ctx, l.db, advisory.Name(l.app+"/"+job), l.opts...)
	if err != nil {
		return nil, err
	}
	l.held.Add(1)
	return &jobLock{locker: l, lock: lock, until: time.Now().Add(l.atLeast)}, nil
}

// Close returns when the last lock has been released. Call it after the scheduler's
// Shutdown and before db.Close: a process that exits gives its locks up, and a scheduler
// whose clock is behind would run the last tick again.
func (l *Locker) Close() { l.held.Wait() }

type jobLock struct {
	locker *Locker
	lock   *advisory.Lock
	until  time.Time
}

// Unlock implements gocron.Lock. Its ctx is the job's, which has ended if the scheduler
// shuts down.
func (j *jobLock) Unlock(context.Context) error {
	if early := time.Until(j.until); early > 0 {
		time.AfterFunc(early, func() { _ = j.release() })
		return nil
	}
	return j.release()
}

func (j *jobLock) release() error {
	defer j.locker.held.Done()
	return j.lock.Release()
}

// ErrNotLeader is why a job does not run here.
var ErrNotLeader = errors.New("not the leader")

// An Elector is a gocron.Elector: of the schedulers that share a database, the leader runs
// all jobs. It holds its lock from one tick to the next, so that clocks may differ.
//
// gocron asks it before each run, and never again. A leader finds out that its lock is lost
// within two heartbeats, and by then another may lead: wrap what must not run beside
// the new leader's in [Elector.Task]. A tick at the moment of the change may run nowhere,
// or on both leaders if their clocks differ.
type Elector struct {
	cancel context.CancelFunc
	done   chan struct{} // closed when Lead has returned
	err    error         // Lead's, once done is closed

	mu    sync.Mutex
	term  context.Context // ends with the leadership; nil if another leads
	tasks sync.WaitGroup  // those that run in this term; Add is under mu
}

var _ gocron.Elector = (*Elector)(nil)

// NewElector starts to campaign for the leadership that key stands for. It takes the
// options of advisory.Lead. The caller must call Close.
func NewElector(db *sql.DB, key advisory.Key, opts ...advisory.Option) *Elector {
	ctx, cancel := context.WithCancel(context.Background())
	e := &Elector{cancel: cancel, done: make(chan struct{})}
	go func() {
		defer close(e.done)
		if err := advisory.Lead(ctx, db, key, e.lead, opts...); !errors.Is(err, context.Canceled) {
			e.err = err
		}
	}()
	return e
}

// lead is one term. Lead waits for it before it lets go of the lock, or asks for it again.
func (e *Elector) lead(ctx context.Context) error {
	e.mu.Lock()
	e.term = ctx
	e.mu.Unlock()
	<-ctx.Done()
	e.mu.Lock()
	e.term = nil // no task joins any more
	e.mu.Unlock()
	e.tasks.Wait()
	return nil
}

// IsLeader implements gocron.Elector.
func (e *Elector) IsLeader(context.Context) error {
	select {
	case <-e.done: // the options are wrong, or db is closed
		return errors.Join(ErrNotLeader, e.err)
	default:
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.term == nil || e.term.Err() != nil {
		return ErrNotLeader
	}
	return nil
}

// Task makes a function for gocron.NewTask from fn. Its ctx ends when the scheduler shuts
// down, and also when the leadership ends: with a cause that matches advisory.ErrLost if it
// was lost. If it was given up, by Close, no other leads before fn has returned. fn can
// ask advisory.Token for the fencing token of the leader.
func (e *Elector) Task(fn func(context.Context) error) func(context.Context) error {
	return func(job context.Context) error {
		term, err := e.join()
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

// join counts one more task of the term.
func (e *Elector) join() (term context.Context, err error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.term == nil || e.term.Err() != nil {
		return nil, ErrNotLeader
	}
	e.tasks.Add(1)
	return e.term, nil
}

// Close gives the leadership up, or the candidacy, and waits until that is done.
func (e *Elector) Close() error {
	e.cancel()
	<-e.done
	return e.err
}
