//go:build !unix

package main

import (
	"errors"
	"log/slog"
	"os"
	"time"
)

var errUnsupported = errors.New("run needs process groups and signals, which this system does not have; the other commands work")

func supported() error { return errUnsupported }

// A child cannot be had here.
type child struct {
	pid  int
	done chan struct{}
}

func startChild(string, []string, []string, *slog.Logger) (*child, error) { return nil, errUnsupported }

func (c *child) forward(os.Signal) error       { return errUnsupported }
func (c *child) terminate()                    {}
func (c *child) kill() error                   { return errUnsupported }
func (c *child) endsWithin(time.Duration) bool { return true }
func (c *child) exitCode() int                 { return exitCannotStart }

func notify(chan<- os.Signal)    {}
func ends(os.Signal) bool        { return true }
func stops(os.Signal) bool       { return true }
func obey(os.Signal)             {}
func signalNumber(os.Signal) int { return 0 }
func isGuard() bool              { return false }
func guard()                     {}
