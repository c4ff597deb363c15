package advisorygocron

import (
	"context"
	"errors"

	"github.com/pgadvisory/advisory"
)

// check returns the error of an acquisition that is wrong before anything is sent: its arguments, or its
// options. acquire makes it under a ctx that has ended, with which nothing is sent, and unobserved.
func check(acquire func(ctx context.Context, unobserved advisory.Option) error) error {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if err := acquire(ctx, advisory.Observe(nil)); !errors.Is(err, advisory.ErrNotAcquired) {
		return err
	}
	return nil
}
