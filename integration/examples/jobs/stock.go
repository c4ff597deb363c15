package jobs

import (
	"context"
	"database/sql"
	"sync"

	"github.com/pgadvisory/advisory"
)

// StockSchema is what ApplyStockChanges and StockCache work on.
const StockSchema = `
CREATE TABLE stock (product text PRIMARY KEY, quantity int NOT NULL);
CREATE TABLE stock_changes (
	id      bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
	product text NOT NULL,
	delta   int NOT NULL
);
CREATE TABLE stock_version (version bigint NOT NULL, token bigint NOT NULL);
INSERT INTO stock_version VALUES (1, 0);`

// ApplyStockChanges adds up what has been put into stock_changes, in batches, and counts
// up the version with each: which invalidates every StockCache.
//
// The version row remembers the largest token and refuses a smaller one, so that what a
// former leader, frozen and thawed, still sends is not applied beside its successor's.
func ApplyStockChanges(ctx context.Context, db *sql.DB, p Params) error {
	return advisory.Lead(ctx, db, p.Key, func(ctx context.Context) error {
		return p.rounds(ctx, func() (done bool, err error) {
			token, err := advisory.Token(ctx) // asks the server the first time only
			if err != nil {
				return false, err
			}
			_, err = db.ExecContext(ctx, `
				WITH invalidated AS (
					UPDATE stock_version SET version = version + 1, token = $1
					WHERE token <= $1 AND EXISTS (SELECT FROM stock_changes)
					RETURNING version
				), change AS (
					DELETE FROM stock_changes
					WHERE id IN (SELECT id FROM stock_changes ORDER BY id LIMIT $2) AND EXISTS (SELECT FROM invalidated)
					RETURNING product, delta
				)
				INSERT INTO stock (product, quantity) SELECT product, sum(delta) FROM change GROUP BY product
				ON CONFLICT (product) DO UPDATE SET quantity = stock.quantity + excluded.quantity`, token, p.Batch)
			return false, err
		})
	}, p.Options...)
}

// A StockCache is a replica's copy of the table stock. It is as good as a query of the
// table, for the price of one that reads a single row.
type StockCache struct {
	db *sql.DB

	mu       sync.Mutex
	version  int64
	quantity map[string]int
}

// NewStockCache returns an empty cache.
func NewStockCache(db *sql.DB) *StockCache { return &StockCache{db: db} }

// Quantity returns the quantity of a product that is in stock, and the version of the
// stock that this was in.
func (c *StockCache) Quantity(ctx context.Context, product string) (quantity int, version int64, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if err := c.db.QueryRowContext(ctx, `SELECT version FROM stock_version`).Scan(&version); err != nil {
		return 0, 0, err
	}
	if version != c.version {
		if err := c.load(ctx); err != nil {
			return 0, 0, err
		}
	}
	return c.quantity[product], c.version, nil
}

// load reads the version and the rows in one statement: from one snapshot, so that they
// belong together.
func (c *StockCache) load(ctx context.Context) error {
	rows, err := c.db.QueryContext(ctx, `
		SELECT version, coalesce(product, ''), coalesce(quantity, 0) FROM stock_version LEFT JOIN stock ON true`)
	if err != nil {
		return err
	}
	defer rows.Close()
	var version int64
	quantities := map[string]int{}
	for rows.Next() {
		var product string
		var quantity int
		if err := rows.Scan(&version, &product, &quantity); err != nil {
			return err
		}
		quantities[product] = quantity
	}
	if err := rows.Err(); err != nil {
		return err
	}
	c.version, c.quantity = version, quantities
	return nil
}
