// Command service is a whole service around a leader's job, as a main.go to be copied. Every replica
// runs it, and one of them leads. DATABASE_URL says where the database is, and LISTEN where to listen.
//
// On SIGTERM, it ends with status 0, and its parts in this order:
//
//  1. The ctx of the work, and then the work.
//  2. Lead, which has released the lock by then. Another replica leads from then on.
//  3. The HTTP server, which has answered the requests under way.
//  4. The pool, which all of them use.
package main

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"os"
	"os/signal"
	"sync/atomic"
	"syscall"
	"time"

	_ "github.com/jackc/pgx/v5/stdlib"

	"github.com/pgadvisory/advisory"
)

func main() {
	if err := serve(sweepTokens); err != nil {
		slog.Error("the service has failed", "error", err)
		os.Exit(1)
	}
}

// serve runs the service until SIGTERM. Its leader does the work every minute.
func serve(work func(context.Context, *sql.DB) error) error {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // a second signal ends the process at once

	db, err := sql.Open("pgx", os.Getenv("DATABASE_URL"))
	if err != nil {
		return err
	}
	defer db.Close()
	db.SetMaxOpenConns(8) // for locks and work; locks take at most half of them
	db.SetMaxIdleConns(8)

	checkCtx, cancel := context.WithTimeout(ctx, 15*time.Second)
	defer cancel()
	if err := advisory.Check(checkCtx, db); err != nil && ctx.Err() == nil {
		return err // locks exclude nobody here, or the server is away
	}

	// The ctx of the last term in which this replica led. It ends within two heartbeats of a loss, even
	// if the work goes on.
	var term atomic.Pointer[context.Context]
	http.HandleFunc("GET /health", func(w http.ResponseWriter, _ *http.Request) {
		last := term.Load()
		fmt.Fprintln(w, "leader:", last != nil && (*last).Err() == nil)
	})
	server := &http.Server{Addr: os.Getenv("LISTEN"), ReadHeaderTimeout: 5 * time.Second}
	served := make(chan error, 1)
	go func() {
		if err := server.ListenAndServe(); err != http.ErrServerClosed {
			served <- err
			stop() // what cannot be asked for its health ends
		}
		close(served)
	}()

	err = advisory.Lead(ctx, db, advisory.Name("sweep-tokens"), func(ctx context.Context) error {
		term.Store(&ctx)
		for ctx.Err() == nil { // if this function returned, Lead would end
			if err := work(ctx, db); err != nil && ctx.Err() == nil {
				slog.Error("work; trying again", "error", err)
			}
			select {
			case <-time.After(time.Minute):
			case <-ctx.Done():
			}
		}
		return ctx.Err()
	})
	if ctx.Err() != nil {
		err = nil // it was told to end
	}
	soon, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	return errors.Join(err, server.Shutdown(soon), <-served)
}

func sweepTokens(ctx context.Context, db *sql.DB) error {
	_, err := db.ExecContext(ctx, "DELETE FROM api_token WHERE expires_at < now()")
	return err
}
