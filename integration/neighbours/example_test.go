package neighbours_test

import (
	"context"
	"database/sql"
	"fmt"
	"log"
	"testing/fstest"
	"time"

	"github.com/go-co-op/gocron/v2"
	"github.com/pressly/goose/v3"

	"github.com/pgadvisory/advisory"
	"github.com/pgadvisory/advisory/integration/internal/testkit"
	"github.com/pgadvisory/advisory/integration/neighbours"
)

// What the examples take for given: main's ctx, a pool, the URL that it was opened with, and
// embedded migrations.
var (
	ctx             = context.Background()
	db              *sql.DB
	databaseURL     string
	gooseMigrations = sub("testdata/goose")
	migrations      = fstest.MapFS{"1_invoice.up.sql": {Data: []byte("CREATE TABLE invoice (id bigint)")}}
)

// openExamples opens a database for the examples.
func openExamples() (close func() error, err error) {
	dsn, drop, err := testkit.CreateDatabase(server)
	if err != nil {
		return nil, err
	}
	databaseURL = dsn
	db, err = sql.Open("pgx", dsn)
	return drop, err
}

func Example_goose() {
	provider, err := goose.NewProvider(goose.DialectPostgres, db, gooseMigrations,
		goose.WithSessionLocker(advisory.NewSessionLocker(advisory.Name("migrations"))))
	if err != nil {
		log.Fatal(err)
	}
	results, err := provider.Up(ctx)
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println("applied", len(results))
	// Output: applied 3
}

func ExampleMigrate() {
	if err := neighbours.Migrate(ctx, db, databaseURL, migrations); err != nil {
		log.Fatal(err)
	}
	// Output:
}

// One replica runs each tick.
func ExampleLocker() {
	// The job's ticks are 5 minutes apart, and the replicas' clocks not even seconds.
	locker := neighbours.NewLocker(db, "billing", time.Minute)
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
	locker.Close()
	// Output:
}

// One replica runs all jobs, for as long as it lives.
func ExampleElector() {
	elector := neighbours.NewElector(db, advisory.Name("billing-scheduler"))
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
