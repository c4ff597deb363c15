package advisorygocron_test

import (
	"context"
	"database/sql"
	"log"
	"time"

	"github.com/go-co-op/gocron/v2"

	"github.com/pgadvisory/advisory"
	advisorygocron "github.com/pgadvisory/advisory/gocron"
)

// In a program, db is what sql.Open returned.
var db = sql.OpenDB(&server{})

// One replica runs each tick.
func ExampleLocker() {
	// The job's ticks are 5 minutes apart, and the replicas' clocks not even seconds.
	locker, err := advisorygocron.NewLocker(db, "billing", time.Minute)
	if err != nil {
		log.Fatal(err)
	}
	scheduler, err := gocron.NewScheduler(gocron.WithDistributedLocker(locker))
	if err != nil {
		log.Fatal(err)
	}
	_, err = scheduler.NewJob(gocron.CronJob("*/5 * * * *", false), gocron.NewTask(sweepTokens), gocron.WithName("sweep-tokens"))
	if err != nil {
		log.Fatal(err)
	}
	scheduler.Start()

	// At the end of the program:
	if err := scheduler.Shutdown(); err != nil {
		log.Fatal(err)
	}
	// Output:
}

// One replica runs all jobs, for as long as it lives.
func ExampleElector() {
	elector, err := advisorygocron.NewElector(db, advisory.Name("billing-scheduler"))
	if err != nil {
		log.Fatal(err)
	}
	defer elector.Close()
	scheduler, err := gocron.NewScheduler(gocron.WithDistributedElector(elector))
	if err != nil {
		log.Fatal(err)
	}
	// The ctx of a Task ends if the leadership does.
	_, err = scheduler.NewJob(gocron.CronJob("*/5 * * * *", false), gocron.NewTask(elector.Task(sweepTokens)))
	if err != nil {
		log.Fatal(err)
	}
	scheduler.Start()

	// At the end of the program:
	if err := scheduler.Shutdown(); err != nil {
		log.Fatal(err)
	}
	// Output:
}

func sweepTokens(ctx context.Context) error {
	_, err := db.ExecContext(ctx, "DELETE FROM api_token WHERE expires_at < now()")
	return err
}
