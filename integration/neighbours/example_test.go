package neighbours_test

import (
	"context"
	"database/sql"
	"fmt"
	"log"

	"github.com/pressly/goose/v3"

	"github.com/pgadvisory/advisory"
	"github.com/pgadvisory/advisory/integration/internal/testkit"
)

// What the example takes for given: main's ctx, a pool, and embedded migrations.
var (
	ctx             = context.Background()
	db              *sql.DB
	gooseMigrations = sub("testdata/goose")
)

// openExamples opens a database for the example.
func openExamples() (close func() error, err error) {
	dsn, drop, err := testkit.CreateDatabase(server)
	if err != nil {
		return nil, err
	}
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
