//go:build !race

package advisoryotel_test

const raceDetector = false
