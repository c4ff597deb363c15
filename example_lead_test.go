//go:build unix

package advisory_test

import (
	"context"
	"fmt"
	"log"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"os/signal"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/pgadvisory/advisory"
)

// enqueueDueJobs is the work of the leader. Meanwhile the process is told to end.
func enqueueDueJobs(context.Context) error {
	fmt.Println("leading")
	return syscall.Kill(os.Getpid(), syscall.SIGTERM)
}

// Each process campaigns, and one of them leads at a time, until SIGTERM ends it with status 0. The
// return of fn would end Lead, and so fn loops.
func ExampleLead() {
	ctx, stop := signal.NotifyContext(ctx, os.Interrupt, syscall.SIGTERM)
	defer stop()

	err := advisory.Lead(ctx, db, advisory.Name("scheduler"), func(ctx context.Context) error {
		for ctx.Err() == nil { // it ends with the process, and if the lock is lost
			if err := enqueueDueJobs(ctx); err != nil {
				slog.Error("enqueue; trying again", "error", err)
			}
			select {
			case <-time.After(time.Minute):
			case <-ctx.Done():
			}
		}
		return ctx.Err()
	})
	if err != nil && ctx.Err() == nil {
		log.Fatal(err)
	}
	fmt.Println("the end")
	// Output:
	// leading
	// the end
}

// An Observer tells who leads, as for a health check. Its HoldEnd comes when fn has returned: where fn
// may go on after a loss, ask fn's ctx, as the service in integration/examples/service does.
func ExampleLead_health() {
	var leads atomic.Bool
	observer := &advisory.Observer{
		HoldStart: func(ctx context.Context, _ advisory.LockInfo) context.Context {
			leads.Store(true)
			return ctx
		},
		HoldEnd: func(context.Context, advisory.LockInfo, time.Duration, error) {
			leads.Store(false)
		},
	}
	health := func(w http.ResponseWriter, _ *http.Request) {
		fmt.Fprintln(w, "leader:", leads.Load())
	}

	ask := func() {
		w := httptest.NewRecorder()
		health(w, httptest.NewRequest("GET", "/health", nil))
		fmt.Print(w.Body)
	}
	ask()
	err := advisory.Lead(ctx, db, advisory.Name("scheduler"), func(context.Context) error {
		ask()
		return nil // a planned step-down
	}, advisory.Observe(observer))
	if err != nil {
		log.Fatal(err)
	}
	ask()
	// Output:
	// leader: false
	// leader: true
	// leader: false
}
