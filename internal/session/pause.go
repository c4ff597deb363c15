package session

import (
	"context"
	"math/rand/v2"
	"time"
)

// Sleep sleeps for d or until ctx ends.
func Sleep(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
}

// A Backoff is the pauses between attempts. Each is twice as long as the one before it, up to a limit. Up
// to half of it is left out, by chance, so that processes do not try in step.
type Backoff struct{ next, limit time.Duration }

// NewBackoff returns the pauses that begin with first.
func NewBackoff(first, limit time.Duration) *Backoff { return &Backoff{first, limit} }

// Pause sleeps for the next pause or until ctx ends.
func (b *Backoff) Pause(ctx context.Context) {
	Sleep(ctx, b.next/2+rand.N(b.next/2))
	b.next = min(2*b.next, b.limit)
}
