package manager

import (
	"context"
	"database/sql"
	"log/slog"

	"github.com/pgadvisory/advisory/internal/pgsql"
	"github.com/pgadvisory/advisory/internal/session"
)

// The session that carries locks is a connection of the pool. If the pool is limited to one, there is
// none for fn while a lock is held, and a fn that wants one waits until its ctx ends.

// tookOnly is called when a session for locks has been opened. If the pool has no other, log is warned,
// once for each *sql.DB.
func (m *Manager) tookOnly(pool session.Pool, log *slog.Logger) {
	stats := pool.DB.Stats()
	if stats.MaxOpenConnections != 1 {
		return
	}
	if log.Enabled(context.Background(), slog.LevelWarn) && !m.warned.Swap(true) {
		log.Warn("advisory: fn cannot get a connection while the lock is held, because the pool is limited to one (SetMaxOpenConns)")
	}
}

// Starved tells whether somebody has waited for the only connection of db's pool, which carries locks,
// since the pool's WaitCount was waits.
func Starved(db *sql.DB, waits int64) bool {
	stats := db.Stats()
	if stats.MaxOpenConnections != 1 {
		return false
	}
	m := For(db)
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.conn != nil && stats.WaitCount > waits
}

// busy says that all connections of a limited pool are in use.
func (m *Manager) busy(pool session.Pool) string {
	n := pool.DB.Stats().MaxOpenConnections
	m.mu.Lock()
	defer m.mu.Unlock()
	switch {
	case n > 1:
		return "all " + pgsql.Plural(n, "connection") + " of the pool are in use"
	case m.conn != nil:
		return "the pool's only connection carries locks of this process, and fn cannot get one while they are held (SetMaxOpenConns)"
	default:
		return "the pool's only connection is in use"
	}
}
