package main

import (
	"context"
	"fmt"
	"testing"
)

// allocs counts the allocations of an uncontended lock and its release. The floor's are
// the driver's own.
func allocs(b *bench, ctx context.Context, w *workload) error {
	const (
		runs      = 300
		allowance = 6
	)
	body := func(context.Context) error { return nil }
	count := func(c contestant) (n float64, err error) {
		l, err := c.open(ctx, b.direct, false, false)
		if err != nil {
			return 0, err
		}
		defer l.Close()
		lock, err := l.worker(ctx, newKeys())
		if err != nil {
			return 0, err
		}
		n = testing.AllocsPerRun(runs, func() {
			if e := lock(context.Background(), body); e != nil {
				err = e
			}
		})
		return n, err
	}
	row := row{workload: w, measure: "allocations", against: "beyond the driver's own"}
	for _, driver := range drivers {
		own, err := count(contestant{floor, driver})
		if err != nil {
			return fmt.Errorf("%s: %w", floor, err)
		}
		n, err := count(contestant{ours, driver})
		if err != nil {
			return fmt.Errorf("%s: %w", ours, err)
		}
		row.set(driver, cell{value: n - own, text: fmt.Sprintf("%+.0f (%.0f − %.0f)", n-own, n, own), bound: atMost(allowance)})
	}
	b.report.rows = append(b.report.rows, row)
	return nil
}
