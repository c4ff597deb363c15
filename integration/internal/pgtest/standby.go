package pgtest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/jackc/pgx/v5"
)

// Standby starts a hot standby that streams from the server, and waits until
// it does. It has the server's settings and those given here. It is stopped
// with the server at the latest.
func (s *Server) Standby(ctx context.Context, opts ...Option) (*Server, error) {
	if err := s.lock(); err != nil {
		return nil, err
	}
	defer s.mu.Unlock()
	box, err := newSandbox()
	if err != nil {
		return nil, err
	}
	standby := &Server{cfg: newConfig(opts), bindir: s.bindir, box: box}
	// Some settings must not be lower on a standby than on its primary.
	standby.cfg.settings = append(append([]setting(nil), s.cfg.settings...), standby.cfg.settings...)
	if err := standby.follow(ctx, s); err != nil {
		return nil, errors.Join(err, standby.Stop())
	}
	s.standbys = append(s.standbys, standby)
	return standby, nil
}

func (s *Server) follow(ctx context.Context, primary *Server) error {
	if err := s.copyFrom(ctx, primary); err != nil {
		return fmt.Errorf("pgtest: standby: %w", err)
	}
	if err := s.box.writeFile(filepath.Join(s.datadir(), "standby.signal"), ""); err != nil {
		return err
	}
	conninfo := fmt.Sprintf("host=%s port=%d user=postgres sslmode=disable application_name=standby", primary.host, primary.port)
	if err := s.startOnFreePort(ctx, []setting{
		{"primary_conninfo", conninfo},
		// Tests that take a primary away and give it back should not wait
		// for the default 5 s.
		{"wal_retrieve_retry_interval", "100ms"},
	}); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	conn, err := pgx.Connect(ctx, s.dsn)
	if err != nil {
		return fmt.Errorf("pgtest: standby: %w", err)
	}
	defer conn.Close(context.WithoutCancel(ctx))
	if err := poll(ctx, func() error {
		return mustBeTrue(ctx, conn, "select exists (select from pg_stat_wal_receiver where status = 'streaming')")
	}); err != nil {
		return s.startError(err, 0)
	}
	return nil
}

// copyFrom copies the data of a running server, by PostgreSQL's low-level
// backup API: pg_basebackup, which does the same, is missing from the
// distributions that hold only what it takes to run a server.
func (s *Server) copyFrom(ctx context.Context, primary *Server) error {
	conn, err := pgx.Connect(ctx, primary.dsn)
	if err != nil {
		return err
	}
	// The backup lasts as long as this session.
	defer conn.Close(context.WithoutCancel(ctx))

	start, stop := "pg_backup_start(label => 'pgtest', fast => true)", "pg_backup_stop(wait_for_archive => false)"
	var version int
	if err := conn.QueryRow(ctx, "select current_setting('server_version_num')::int").Scan(&version); err != nil {
		return err
	}
	if version < 15_00_00 {
		start, stop = "pg_start_backup(label => 'pgtest', fast => true, exclusive => false)", "pg_stop_backup(exclusive => false, wait_for_archive => false)"
	}
	if _, err := conn.Exec(ctx, "select "+start); err != nil {
		return err
	}
	if err := s.copyTree(ctx, primary.datadir()); err != nil {
		return err
	}
	var label string
	if err := conn.QueryRow(ctx, "select labelfile from "+stop).Scan(&label); err != nil {
		return err
	}
	return s.box.writeFile(filepath.Join(s.datadir(), "backup_label"), label)
}

// copyTree copies a data directory in use, except for what belongs to the
// server that runs in it.
func (s *Server) copyTree(ctx context.Context, from string) error {
	return filepath.WalkDir(from, func(path string, d fs.DirEntry, err error) error {
		if err == nil {
			err = ctx.Err()
		}
		// A server deletes files as it runs.
		if err != nil && path != from && errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(from, path)
		if err != nil {
			return err
		}
		if isNotCopied(rel) {
			if d.IsDir() {
				return fs.SkipDir
			}
			return nil
		}
		return s.copyEntry(filepath.Join(s.datadir(), rel), path, d)
	})
}

// copyEntry makes a directory, or copies a file that the server may delete meanwhile.
func (s *Server) copyEntry(to, from string, d fs.DirEntry) error {
	switch {
	case d.IsDir():
		if err := os.Mkdir(to, 0o700); err != nil {
			return err
		}
	case d.Type().IsRegular():
		err := copyFile(to, from)
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil {
			return err
		}
	default:
		return fmt.Errorf("cannot copy %s: %s", from, d.Type())
	}
	return s.box.chown(to)
}

// isNotCopied tells whether a path in the data directory belongs to the server that runs
// there.
func isNotCopied(path string) bool {
	if path == "postmaster.pid" || path == "postmaster.opts" || strings.HasPrefix(filepath.Base(path), "pgsql_tmp") {
		return true
	}
	top, rest, _ := strings.Cut(filepath.ToSlash(path), "/")
	return emptyInCopies[top] && rest != "" && rest != "archive_status" && rest != "summaries"
}

// emptyInCopies lists the directories whose files a copy must not have, or has
// no use for.
var emptyInCopies = map[string]bool{
	"pg_dynshmem": true, "pg_notify": true, "pg_replslot": true, "pg_serial": true,
	"pg_snapshots": true, "pg_stat_tmp": true, "pg_subtrans": true, "pg_wal": true,
}

func copyFile(to, from string) error {
	src, err := os.Open(from)
	if err != nil {
		return err
	}
	defer src.Close()
	dst, err := os.OpenFile(to, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = io.Copy(dst, src)
	return errors.Join(err, dst.Close())
}
