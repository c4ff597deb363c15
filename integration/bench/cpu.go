package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"time"
)

// serverCPU is how much of a core the server needs while d goes by.
func (b *bench) serverCPU(ctx context.Context, d time.Duration) (cell, error) {
	wait := func() error {
		select {
		case <-time.After(d):
			return nil
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	unknown := cell{failure: "?"}
	if !b.postgres.Own() {
		return unknown, wait()
	}
	var backend int
	if err := b.admin.QueryRowContext(ctx, "SELECT pg_backend_pid()").Scan(&backend); err != nil {
		return unknown, err
	}
	self, err := readProcess(backend)
	if err != nil {
		return unknown, wait() // no /proc here
	}
	start := time.Now()
	before, err1 := processTreeTime(self.parent)
	err2 := wait()
	after, err3 := processTreeTime(self.parent)
	if err := errors.Join(err1, err2, err3); err != nil {
		return unknown, err
	}
	return cell{value: 100 * (after - before).Seconds() / time.Since(start).Seconds(), format: "%.1f"}, nil
}

// processTreeTime is the CPU time of a process and its children, dead ones included.
func processTreeTime(pid int) (sum time.Duration, err error) {
	stats, err := filepath.Glob("/proc/[0-9]*/stat")
	if err != nil {
		return 0, err
	}
	for _, stat := range stats {
		id, err := strconv.Atoi(filepath.Base(filepath.Dir(stat)))
		if err != nil {
			continue
		}
		p, err := readProcess(id)
		if err != nil {
			continue // it has exited
		}
		switch pid {
		case id:
			sum += p.own + p.waitedFor
		case p.parent:
			sum += p.own
		}
	}
	return sum, nil
}

// A processTime is what the kernel says of a process.
type processTime struct {
	parent         int
	own, waitedFor time.Duration
}

func readProcess(pid int) (p processTime, err error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return p, err
	}
	return parseProcess(b)
}

// parseProcess reads a line of /proc/PID/stat.
func parseProcess(stat []byte) (p processTime, err error) {
	const tick = time.Second / 100 // USER_HZ, on every architecture that Go knows
	// PID (NAME) STATE PARENT ..., and any byte may be in the name.
	fields := bytes.Fields(stat[bytes.LastIndexByte(stat, ')')+1:])
	const parent, utime, stime, cutime, cstime = 1, 11, 12, 13, 14
	if len(fields) <= cstime {
		return p, fmt.Errorf("/proc: %d fields", len(fields))
	}
	var errs []error
	number := func(i int) int {
		n, err := strconv.Atoi(string(fields[i]))
		errs = append(errs, err)
		return n
	}
	p.parent = number(parent)
	p.own = time.Duration(number(utime)+number(stime)) * tick
	p.waitedFor = time.Duration(number(cutime)+number(cstime)) * tick
	return p, errors.Join(errs...)
}
