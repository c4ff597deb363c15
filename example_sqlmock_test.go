package advisory_test

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"log"

	"github.com/DATA-DOG/go-sqlmock"

	"github.com/pgadvisory/advisory"
)

// sweep is code to be tested.
func sweep(ctx context.Context, db *sql.DB) error {
	return advisory.WithLock(ctx, db, advisory.Name("sweep-tokens"), func(ctx context.Context) error {
		_, err := db.ExecContext(ctx, "DELETE FROM api_token WHERE expires_at < now()")
		return err
	}, advisory.NoWait())
}

// A test without a server: an uncontended lock is two statements, each of which affects
// one row. To refuse the lock, the first one affects none.
func ExampleWithLock_sqlmock() {
	db, mock, err := sqlmock.New()
	if err != nil {
		log.Fatal(err)
	}
	mock.ExpectExec(`pg_try_advisory_lock\(`).WillReturnResult(sqlmock.NewResult(0, 1))
	mock.ExpectExec(`DELETE FROM api_token`).WillReturnResult(sqlmock.NewResult(0, 3))
	mock.ExpectExec(`SELECT WHERE pg_catalog\.pg_advisory_unlock\(`).WillReturnResult(sqlmock.NewResult(0, 1))
	fmt.Println("swept:", sweep(ctx, db))

	// Another holds the lock.
	mock.ExpectExec(`pg_try_advisory_lock\(`).WillReturnResult(sqlmock.NewResult(0, 0))
	fmt.Println("refused:", errors.Is(sweep(ctx, db), advisory.ErrHeld))

	fmt.Println(mock.ExpectationsWereMet())
	// Output:
	// swept: <nil>
	// refused: true
	// <nil>
}
