package advisorygocron_test

import (
	"context"
	"errors"
	"log/slog"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/pgadvisory/advisory"
	advisorygocron "github.com/pgadvisory/advisory/gocron"
)

var quiet = advisory.Logger(slog.New(slog.DiscardHandler))

func newElector(t *testing.T, s *server) *advisorygocron.Elector {
	t.Helper()
	e, err := advisorygocron.NewElector(s.pool(t), advisory.Name("scheduler"), quiet)
	if err != nil {
		t.Fatal(err)
	}
	return e
}

func closeElector(t *testing.T, e *advisorygocron.Elector) {
	t.Helper()
	if err := e.Close(); err != nil {
		t.Error(err)
	}
	time.Sleep(time.Second) // until the statement of a standby has ended, which Close leaves
}

func wantNotLeader(t *testing.T, e *advisorygocron.Elector) {
	t.Helper()
	if err := e.IsLeader(t.Context()); !errors.Is(err, advisorygocron.ErrNotLeader) {
		t.Errorf("want ErrNotLeader, got %v", err)
	}
}

// The first question is answered when the first campaign is: of several, one leads.
func TestTheFirstAnswerWaitsForTheFirstCampaign(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var s server
		var electors [3]*advisorygocron.Elector
		for i := range electors {
			electors[i] = newElector(t, &s)
		}
		leaders := 0
		for _, e := range electors {
			if e.IsLeader(t.Context()) == nil {
				leaders++
			}
		}
		if leaders != 1 {
			t.Errorf("%d lead", leaders)
		}
		for _, e := range electors {
			closeElector(t, e)
			wantNotLeader(t, e)
		}
	})
}

// A job that ends before there is an answer gets none.
func TestTheFirstAnswerIsNotWaitedForBeyondTheJob(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var s server
		db := s.pool(t)
		db.SetMaxOpenConns(1)
		conn, err := db.Conn(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		e, err := advisorygocron.NewElector(db, advisory.Name("scheduler"), quiet)
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		if err := e.IsLeader(ctx); !errors.Is(err, advisorygocron.ErrNotLeader) || !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("want ErrNotLeader and context.DeadlineExceeded, got %v", err)
		}
		conn.Close()
		if err := e.IsLeader(t.Context()); err != nil {
			t.Error(err)
		}
		closeElector(t, e)
	})
}

// One that stands by leads when the leader is gone.
func TestAStandbyFollows(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var s server
		release := s.take()
		e := newElector(t, &s)
		wantNotLeader(t, e)
		if err := e.Task(func(context.Context) error { t.Error("the task runs"); return nil })(t.Context()); !errors.Is(err, advisorygocron.ErrNotLeader) {
			t.Errorf("want ErrNotLeader, got %v", err)
		}
		release()
		time.Sleep(time.Second)
		if err := e.IsLeader(t.Context()); err != nil {
			t.Error(err)
		}
		closeElector(t, e)
	})
}

// A server that is away is no leader elsewhere, and no end.
func TestTheServerIsAwayAtFirst(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := server{away: errors.New("away")}
		e := newElector(t, &s)
		wantNotLeader(t, e)
		closeElector(t, e)
	})
}

// A task's ctx ends with the job and with the term, and Close waits for the task.
func TestATasksCtxEndsWithTheTerm(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var s server
		e := newElector(t, &s)
		task := e.Task(func(ctx context.Context) error {
			<-ctx.Done()
			time.Sleep(time.Second)
			return context.Cause(ctx)
		})
		if err := e.IsLeader(t.Context()); err != nil {
			t.Fatal(err)
		}
		job, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if err := task(job); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("want context.DeadlineExceeded, got %v", err)
		}
		done := make(chan error, 1)
		go func() { done <- task(t.Context()) }()
		synctest.Wait()
		began := time.Now()
		closeElector(t, e)
		if took := time.Since(began); took < 2*time.Second {
			t.Errorf("Close returned after %v, before the task", took)
		}
		if err := <-done; !errors.Is(err, context.Canceled) {
			t.Errorf("want context.Canceled, got %v", err)
		}
		if s.held() {
			t.Error("the lock is held")
		}
	})
}

// The loss of a leadership is in a log, also that of the first term; and its end by Close is not.
func TestALossIsLogged(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log strings.Builder // of one after the other
		before := slog.Default()
		defer slog.SetDefault(before)
		slog.SetDefault(slog.New(slog.NewTextHandler(&log, nil)))
		var s server
		e, err := advisorygocron.NewElector(s.pool(t), advisory.Name("scheduler"))
		if err != nil {
			t.Fatal(err)
		}
		for terms := range 3 {
			if err := e.IsLeader(t.Context()); err != nil {
				t.Error(err)
			}
			if n := strings.Count(log.String(), "advisory: leadership lost; campaigning again"); n != terms {
				t.Errorf("%d times in the log, after %d losses: %s", n, terms, log.String())
			}
			if terms < 2 {
				s.kill()
				time.Sleep(10 * time.Second)
			}
		}
		closeElector(t, e)
		if n := strings.Count(log.String(), "\n"); n != 2 {
			t.Errorf("log: %s", log.String())
		}
	})
}

// A closed pool is the error of IsLeader and of Close.
func TestAClosedPoolEndsTheCandidacy(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var s server
		db := s.pool(t)
		db.Close()
		e, err := advisorygocron.NewElector(db, advisory.Name("scheduler"), quiet)
		if err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Second)
		if err := e.IsLeader(t.Context()); !errors.Is(err, advisorygocron.ErrNotLeader) || err.Error() == advisorygocron.ErrNotLeader.Error() {
			t.Errorf("want ErrNotLeader and why, got %v", err)
		}
		if err := e.Close(); err == nil {
			t.Error("no error of Close")
		}
	})
}
