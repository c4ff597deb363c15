package advisorygocron

import (
	"context"
	"database/sql"
	"fmt"
	"slices"
	"time"

	"github.com/go-co-op/gocron/v2"

	"github.com/pgadvisory/advisory"
)

// A Locker is a [gocron.Locker]: of the schedulers that share a database, one runs each tick of a job.
//
// A job that runs past its next tick keeps its lock, and that tick is left out everywhere. So is one
// for which the database is out of reach. gocron's event listener AfterLockError has the error, which
// matches [advisory.ErrHeld] where another scheduler runs the tick.
//
// gocron drops the error of a lock that was lost during a job. [advisory.Observe] has it.
type Locker struct {
	db    *sql.DB
	app   string
	bound time.Duration // of the wait for a connection; 0: none
	opts  []advisory.Option
}

var _ gocron.Locker = (*Locker)(nil)

// NewLocker returns a Locker whose locks are named app/job. Give jobs names that are the same in
// every process (gocron.WithName).
//
// A lock is kept for atLeast, even if its job ends sooner. That must be longer than the schedulers are
// apart (the difference of their clocks, and the delays of a busy machine), or a tick may run twice. It
// must be shorter than the time between two ticks, less the same difference, or the next tick
// finds the lock taken and is left out. Half the time between two ticks is as far from the one
// as from the other. A process that exits sooner gives its locks up, and a scheduler whose clock is
// behind by more than that runs the last tick again.
//
// NewLocker takes the options of [advisory.Acquire] but for Timeout, NoWait and AtLeast, which it gives
// itself. An option that is wrong is an error.
func NewLocker(db *sql.DB, app string, atLeast time.Duration, opts ...advisory.Option) (*Locker, error) {
	l := &Locker{db: db, app: app, bound: atLeast / 2}
	l.opts = append(slices.Clip(opts), advisory.NoWait(), advisory.AtLeast(atLeast))
	err := check(func(ctx context.Context, unobserved advisory.Option) error {
		_, err := advisory.Acquire(ctx, db, advisory.Name(app+"/"), append(slices.Clip(l.opts), unobserved)...)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("advisorygocron: %w", err)
	}
	return l, nil
}

// Lock implements [gocron.Locker].
func (l *Locker) Lock(ctx context.Context, job string) (gocron.Lock, error) {
	if l.bound > 0 {
		// Who has to wait too long for a connection is too late for this tick: the scheduler that ran
		// it may not hold the lock any more.
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, l.bound)
		defer cancel()
	}
	lock, err := advisory.Acquire(ctx, l.db, advisory.Name(l.app+"/"+job), l.opts...)
	if err != nil {
		return nil, err
	}
	return jobLock{lock}, nil
}

type jobLock struct{ lock *advisory.Lock }

// Unlock implements [gocron.Lock]. Its ctx is the job's, which has ended if the scheduler shuts down.
func (l jobLock) Unlock(context.Context) error { return l.lock.Release() }
