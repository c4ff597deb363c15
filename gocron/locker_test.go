package advisorygocron_test

import (
	"context"
	"errors"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/pgadvisory/advisory"
	advisorygocron "github.com/pgadvisory/advisory/gocron"
)

// The lock outlives the job, and the tick does not run again where the clock is behind.
func TestALockerKeepsItsLockForAtLeast(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var s server
		var lockers [2]*advisorygocron.Locker
		for i := range lockers {
			var err error
			if lockers[i], err = advisorygocron.NewLocker(s.pool(t), "billing", time.Minute); err != nil {
				t.Fatal(err)
			}
		}
		for range 2 { // ticks
			lock, err := lockers[0].Lock(t.Context(), "sweep")
			if err != nil {
				t.Fatal(err)
			}
			job, cancel := context.WithCancel(t.Context())
			cancel()
			if err := lock.Unlock(job); err != nil {
				t.Error(err)
			}
			for range 2 {
				for i, l := range lockers {
					if _, err := l.Lock(t.Context(), "sweep"); !errors.Is(err, advisory.ErrHeld) {
						t.Errorf("replica %d runs the tick, too: %v", i, err)
					}
				}
				time.Sleep(time.Minute - time.Second)
			}
			time.Sleep(time.Minute)
			synctest.Wait()
			if s.held() {
				t.Error("the lock stays for longer")
			}
		}
	})
}

func TestALockersKeyIsNamedByAppAndJob(t *testing.T) {
	var s server
	var key advisory.Key
	locker, err := advisorygocron.NewLocker(s.pool(t), "billing", 0, advisory.Observe(&advisory.Observer{
		HoldEnd: func(_ context.Context, lock advisory.LockInfo, _ time.Duration, _ error) { key = lock.Keys[0] },
	}))
	if err != nil {
		t.Fatal(err)
	}
	lock, err := locker.Lock(t.Context(), "sweep")
	if err != nil {
		t.Fatal(err)
	}
	if err := lock.Unlock(t.Context()); err != nil || s.held() {
		t.Errorf("the lock is held: %t; %v", s.held(), err)
	}
	if key != advisory.Name("billing/sweep") {
		t.Errorf("the key is %v", key)
	}
}

// Who waits for a connection for too long is too late for the tick.
func TestALockerWaitsForHalfOfAtLeast(t *testing.T) {
	var s server
	db := s.pool(t)
	db.SetMaxOpenConns(1)
	conn, err := db.Conn(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	locker, err := advisorygocron.NewLocker(db, "billing", 40*time.Millisecond)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := locker.Lock(t.Context(), "sweep"); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("want context.DeadlineExceeded, got %v", err)
	}
}

// Constructors that share a slice of options, with room for more, do not write into it: each has its own
// time, also if they are called side by side.
func TestConstructorsShareTheirOptions(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		opts := append(make([]advisory.Option, 0, 8), quiet)
		var all sync.WaitGroup
		for _, atLeast := range []time.Duration{time.Minute, 2 * time.Minute} {
			all.Go(func() {
				var s, other server
				locker, err := advisorygocron.NewLocker(s.pool(t), "billing", atLeast, opts...)
				if err != nil {
					t.Error(err)
					return
				}
				elector, err := advisorygocron.NewElector(other.pool(t), advisory.Name("scheduler"), opts...)
				if err != nil {
					t.Error(err)
					return
				}
				time.Sleep(time.Second) // until all have been made
				if err := elector.IsLeader(t.Context()); err != nil {
					t.Error(err)
				}
				closeElector(t, elector)
				began := time.Now()
				lock, err := locker.Lock(t.Context(), "sweep")
				if err != nil {
					t.Error(err)
					return
				}
				if err := lock.Unlock(t.Context()); err != nil {
					t.Error(err)
				}
				for s.held() {
					time.Sleep(time.Second)
				}
				if took := time.Since(began); took < atLeast || took > atLeast+time.Second {
					t.Errorf("the lock stays for %v, want %v", took, atLeast)
				}
			})
		}
		all.Wait()
	})
}

// What is wrong is known from the constructors, which send nothing.
func TestWhatIsWrongIsRefusedAtOnce(t *testing.T) {
	var s server
	db := s.pool(t)
	observer := advisory.Observe(&advisory.Observer{
		AcquireStart: func(context.Context, advisory.LockInfo) context.Context {
			t.Error("the Observer is called")
			return nil
		},
	})
	for _, test := range []struct {
		name string
		make func() error
		says string
	}{
		{"no db", func() error { _, err := advisorygocron.NewLocker(nil, "billing", time.Minute); return err }, "nil db"},
		{"a negative time", func() error { _, err := advisorygocron.NewLocker(db, "billing", -1); return err }, "AtLeast: -1ns is negative"},
		{"Timeout", func() error {
			_, err := advisorygocron.NewLocker(db, "billing", time.Minute, advisory.Timeout(time.Second))
			return err
		}, "NoWait and Timeout"},
		{"no option", func() error { _, err := advisorygocron.NewLocker(db, "billing", time.Minute, nil); return err }, "nil Option"},
		{"no db for an Elector", func() error { _, err := advisorygocron.NewElector(nil, advisory.ID(1)); return err }, "nil db"},
		{"the zero Key", func() error { _, err := advisorygocron.NewElector(db, advisory.Key{}); return err }, "zero Key"},
		{"Shared", func() error { _, err := advisorygocron.NewElector(db, advisory.ID(1), advisory.Shared()); return err }, "Shared does not apply to Lead"},
		{"fine", func() error { _, err := advisorygocron.NewLocker(db, "", 0, observer, advisory.Shared()); return err }, ""},
	} {
		err := test.make()
		switch {
		case test.says == "" && err != nil:
			t.Errorf("%s: %v", test.name, err)
		case test.says != "" && (err == nil || !strings.HasPrefix(err.Error(), "advisorygocron: ") || !strings.Contains(err.Error(), test.says)):
			t.Errorf("%s: error %v, want %q", test.name, err, test.says)
		}
	}
	if n := s.statements(); n > 0 {
		t.Errorf("%d statements were sent", n)
	}
}
