//go:build race

package advisoryotel_test

// raceDetector: the race detector has a sync.Pool forget at random, so that nobody knows how often
// something allocates.
const raceDetector = true
