// Package history checks, after the fact, that a lock excluded.
//
// Processes log what they do under a lock, and whoever disturbs them logs what
// it does to them, all by one clock. [Check] then looks for two sections of one
// key that overlap where they must not.
package history

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"
)

// A Kind says what happened.
type Kind string

const (
	// What a section logs.

	Begin Kind = "begin" // it has the lock, and begins to work
	Told  Kind = "told"  // its context has ended because the lock is lost
	Deaf  Kind = "deaf"  // its context has ended for another reason, and tells it nothing more
	End   Kind = "end"   // it has ended its work, and is about to let go of the lock
	Kept  Kind = "kept"  // it was assured that it had held the lock until End
	Lost  Kind = "lost"  // it was not assured of that

	// The faults, as logged by whoever makes them.

	Freeze Kind = "freeze" // the process is about to be frozen
	Thaw   Kind = "thaw"   // it has been thawed
	Kill   Kind = "kill"   // the process is about to be killed
	Cut    Kind = "cut"    // the server has ended a session of the process that held Key
)

// An Event is one line of a history.
type Event struct {
	Kind    Kind          `json:"kind"`
	At      time.Duration `json:"at"`                // the clock: see Now
	Process string        `json:"process"`           // never the name of an earlier process
	Section int64         `json:"section,omitempty"` // distinct within its process
	Key     string        `json:"key,omitempty"`     // of Begin and Cut

	// Of Begin.
	Asked  time.Duration `json:"asked,omitempty"`  // when it asked for the lock
	Shared bool          `json:"shared,omitempty"` // it excludes exclusive sections only
	Tx     bool          `json:"tx,omitempty"`     // unless it is Kept, nothing of it remains
	How    string        `json:"how,omitempty"`    // for people

	// Of Cut: when it was about to happen.
	From time.Duration `json:"from,omitempty"`
}

// A Log is the history of one process, a file of one line for each event. A line
// that was added survives the process, however that ends.
type Log struct {
	file    *os.File
	process string
}

// Create creates the log of a process in a directory.
func Create(dir, process string) (*Log, error) {
	f, err := os.OpenFile(filepath.Join(dir, process+".log"), os.O_WRONLY|os.O_CREATE|os.O_EXCL|os.O_APPEND, 0o600)
	if err != nil {
		return nil, err
	}
	return &Log{file: f, process: process}, nil
}

// Add adds an event, of this process unless it names another. It may be called
// from several goroutines.
func (l *Log) Add(e Event) error {
	if e.Process == "" {
		e.Process = l.process
	}
	line, err := json.Marshal(e)
	if err != nil {
		return err
	}
	_, err = l.file.Write(append(line, '\n')) // one write, and O_APPEND: lines do not mix
	return err
}

// Close closes the log.
func (l *Log) Close() error { return l.file.Close() }

// Read reads the logs in a directory.
func Read(dir string) ([]Event, error) {
	names, err := filepath.Glob(filepath.Join(dir, "*.log"))
	if err == nil && len(names) == 0 {
		err = &fs.PathError{Op: "read history", Path: dir, Err: fs.ErrNotExist}
	}
	if err != nil {
		return nil, err
	}
	var events []Event
	for _, name := range names {
		text, err := os.ReadFile(name)
		if err != nil {
			return nil, err
		}
		e, err := parse(text)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		events = append(events, e...)
	}
	return events, nil
}

func parse(text []byte) ([]Event, error) {
	// A process may be killed in the middle of its last write.
	text = text[:bytes.LastIndexByte(text, '\n')+1]
	var events []Event
	for line := range bytes.Lines(text) {
		var e Event
		if err := json.Unmarshal(line, &e); err != nil {
			return nil, fmt.Errorf("line %d: %w", len(events)+1, err)
		}
		if e.Process == "" {
			return nil, fmt.Errorf("line %d: %w", len(events)+1, errors.New("no process"))
		}
		events = append(events, e)
	}
	return events, nil
}
