package main

import (
	"fmt"
	"net"
	"net/http"
	"sync"

	"github.com/pgadvisory/advisory/integration/examples/jobs"
)

// An inbox receives the webhooks. It does not answer one of them before answer is called.
// So the sender of that one can be killed while it is in flight.
type inbox struct {
	url      string
	inFlight chan struct{} // closed when that one has arrived
	answer   func()        // may be called again

	receiver *jobs.Receiver
	web      *http.Server

	mu      sync.Mutex
	arrived int
}

// openInbox opens an inbox. The webhook that it does not answer is the nth to arrive.
func openInbox(nth int) (*inbox, error) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	release := make(chan struct{})
	in := &inbox{
		url:      "http://" + listener.Addr().String(),
		inFlight: make(chan struct{}),
		answer:   sync.OnceFunc(func() { close(release) }),
	}
	in.receiver = &jobs.Receiver{Taken: func(string) {
		if in.count() == nth {
			close(in.inFlight)
			<-release
		}
	}}
	in.web = &http.Server{Handler: in.receiver}
	go func() { _ = in.web.Serve(listener) }()
	return in, nil
}

// count counts a webhook, and returns how many have arrived.
func (in *inbox) count() int {
	in.mu.Lock()
	defer in.mu.Unlock()
	in.arrived++
	return in.arrived
}

func (in *inbox) close() {
	in.answer()
	_ = in.web.Close()
}

// oneInFlight tells whether the webhook that is not answered has arrived.
func (in *inbox) oneInFlight() bool {
	select {
	case <-in.inFlight:
		return true
	default:
		return false
	}
}

// noneTwice is the promise about all webhooks, of which there are n.
func (in *inbox) noneTwice(n int) promise {
	taken, repeated := in.receiver.Counts()
	return promise{
		// Those in flight at the kill and at the freeze may be sent again.
		text: "no webhook is taken twice", kept: taken == n && repeated <= 2,
		numbers: fmt.Sprintf("%s of %s taken\n%s sent again, and known by the idempotency key", thousands(taken), thousands(n), thousands(repeated)),
	}
}
