package advisory

import (
	"context"
	"database/sql"
)

// A SessionLocker takes one lock on connections that it is given, and releases it
// there. It is what github.com/pressly/goose/v3 asks for (its lock.SessionLocker, by
// shape: goose is not imported), so that migrations wait in the server's queue instead
// of polling:
//
//	goose.NewProvider(goose.DialectPostgres, db, migrations,
//		goose.WithSessionLocker(advisory.NewSessionLocker(advisory.Name("migrations"))))
//
// It is safe to use from several goroutines, on a connection each.
type SessionLocker struct {
	key  Key
	opts []Option
}

// NewSessionLocker returns a SessionLocker for key. It takes the options of
// [AcquireConn]; those that make no sense there are errors of SessionLock.
func NewSessionLocker(key Key, opts ...Option) *SessionLocker {
	return &SessionLocker{key: key, opts: opts}
}

// SessionLock is [AcquireConn].
func (l *SessionLocker) SessionLock(ctx context.Context, conn *sql.Conn) error {
	return AcquireConn(ctx, conn, l.key, l.opts...)
}

// SessionUnlock is [ReleaseConn].
func (l *SessionLocker) SessionUnlock(ctx context.Context, conn *sql.Conn) error {
	return releaseConn(ctx, conn, l.key, acquireOptions, l.opts)
}
