//go:build unix && !linux

package main

import "syscall"

// childAttr gives the command a process group. The guard kills it if this process dies.
func childAttr() *syscall.SysProcAttr { return &syscall.SysProcAttr{Setpgid: true} }

func adoptOrphans() {}
