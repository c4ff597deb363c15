package main

import (
	"context"
	"database/sql"
	"encoding/json"
	"fmt"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/pgadvisory/advisory"
)

// increments is the oldest race there is: read a number, add one, write it back.
// What one writes between another's read and write is lost.
type increments struct{}

type incrementsBrief struct {
	Goroutines int
	Updates    int    // this process's share
	Lock       string // its name; none if empty
}

func (increments) name() string  { return "increments" }
func (increments) title() string { return "one number, counted up by all" }

func (a increments) play(ctx context.Context, s *stage) ([]promise, error) {
	s.view.say(fmt.Sprintf("%s × %s read it, add one and write it back:", plural(s.processes, "process"), plural(s.goroutines, "goroutine")))
	s.view.say(fmt.Sprintf("%s in all, first as they please, then under WithLock.", plural(s.updates, "update")))
	if _, err := s.db.ExecContext(ctx, "CREATE TABLE number AS SELECT 0 AS n"); err != nil {
		return nil, err
	}
	lostWithout, rateWithout, err := a.count(ctx, s, "without the lock", "")
	if err != nil {
		return nil, err
	}
	lock := s.lockName("number")
	if s.broken {
		lock = ""
	}
	lost, rate, err := a.count(ctx, s, "with the lock", lock)
	if err != nil {
		return nil, err
	}
	return []promise{{
		text: "WithLock: no update is lost",
		kept: lost == 0,
		numbers: fmt.Sprintf("%s of %s lost, %s\nwithout the lock: %s lost, %s",
			thousands(lost), thousands(s.updates), rate, thousands(lostWithout), rateWithout),
	}}, nil
}

// count has the number counted up and returns how many updates were lost.
func (a increments) count(ctx context.Context, s *stage, label, lock string) (lost int, speed string, err error) {
	if _, err := s.db.ExecContext(ctx, "UPDATE number SET n = 0"); err != nil {
		return 0, "", err
	}
	brief := func(number int) any {
		// The shares of all add up to s.updates.
		share := s.updates*number/s.processes - s.updates*(number-1)/s.processes
		return incrementsBrief{Goroutines: s.goroutines, Updates: share, Lock: lock}
	}
	bar := s.view.bar(label, s.updates)
	_, took, err := perform[struct{}](ctx, s, a, brief, func(done int, took time.Duration) {
		bar.set(done, rate(done, took))
	})
	if err != nil {
		return 0, "", err
	}
	var n int
	if err := s.db.QueryRowContext(ctx, "SELECT n FROM number").Scan(&n); err != nil {
		return 0, "", err
	}
	lost = s.updates - n
	speed = rate(s.updates, took)
	bar.finish(fmt.Sprintf("%s, %s lost", speed, thousands(lost)))
	return lost, speed, nil
}

func (increments) work(ctx context.Context, w *worker) (any, error) {
	var brief incrementsBrief
	if err := json.Unmarshal(w.Brief, &brief); err != nil {
		return nil, err
	}
	// As many connections as can be of use: without the lock, each goroutine works on
	// one. With it, the process waits for the lock and holds it on one, and the goroutine
	// whose turn it is works on another.
	if err := fillPool(ctx, w.db, brief.Goroutines+1); err != nil {
		return nil, err
	}
	key := advisory.Name(brief.Lock)
	w.begin()

	g, ctx := errgroup.WithContext(ctx)
	for i := range brief.Goroutines {
		updates := brief.Updates*(i+1)/brief.Goroutines - brief.Updates*i/brief.Goroutines
		g.Go(func() error {
			for range updates {
				update := func(ctx context.Context) error { return increment(ctx, w.db) }
				var err error
				if brief.Lock == "" {
					err = update(ctx)
				} else {
					err = advisory.WithLock(ctx, w.db, key, update)
				}
				if err != nil {
					return err
				}
				w.done.Add(1)
			}
			return nil
		})
	}
	return struct{}{}, g.Wait()
}

// increment adds one to the number, and is wrong on its own: nothing keeps others
// out between its two statements.
func increment(ctx context.Context, db *sql.DB) error {
	var n int
	if err := db.QueryRowContext(ctx, "SELECT n FROM number").Scan(&n); err != nil {
		return err
	}
	_, err := db.ExecContext(ctx, "UPDATE number SET n = $1", n+1)
	return err
}

// fillPool limits the pool to n connections and opens them all, so that none has to
// be opened while the clock runs.
func fillPool(ctx context.Context, db *sql.DB, n int) error {
	db.SetMaxOpenConns(n)
	db.SetMaxIdleConns(n)
	for range n {
		conn, err := db.Conn(ctx)
		if err != nil {
			return err
		}
		defer conn.Close() // not before all are open
	}
	return nil
}
