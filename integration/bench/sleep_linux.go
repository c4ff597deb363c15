package main

import (
	"syscall"
	"time"
)

// sleep sleeps for d, to a tenth of a millisecond: the runtime's own timers, in a
// program that has nothing else to do, go by whole milliseconds.
func sleep(d time.Duration) {
	t := syscall.NsecToTimespec(int64(d))
	_ = syscall.Nanosleep(&t, nil) // interrupted, it is early
}
