package main

import (
	"context"
	"database/sql"
	"fmt"
)

// The drivers that everything on PostgreSQL runs over, as the table names them.
const (
	pgx = "pgx"
	pq  = "lib/pq"
)

var drivers = []string{pgx, pq}

// registered are the drivers' names in database/sql.
var registered = map[string]string{pgx: "pgx", pq: "postgres"}

// The implementations, as the table names them.
const (
	ours      = "advisory"
	floor     = "two prepared statements"
	recipe    = "recipe"
	goose     = "goose"
	redislock = "redislock"
	etcd      = "etcd"
)

// A contestant is an implementation on a driver, or, if it is not PostgreSQL's, on its
// own client.
type contestant struct {
	Impl   string
	Driver string // "" for its own
}

func (c contestant) String() string {
	if c.Driver == "" {
		return c.Impl
	}
	return c.Impl + ", " + c.Driver
}

// A locker is what a process has of an implementation.
type locker interface {
	// worker returns what one goroutine takes the lock of key with.
	worker(ctx context.Context, key int64) (lockFunc, error)
	Close() error
}

// A lockFunc takes the lock, waiting for it, runs body, and releases the lock.
type lockFunc func(ctx context.Context, body func(context.Context) error) error

// poolSize is how many connections a process has, whatever the implementation.
const poolSize = 16

// open opens what a process has of c. contended says that others want its locks, and traced that its
// driver is wrapped.
func (c contestant) open(ctx context.Context, s servers, contended, traced bool) (locker, error) {
	switch c.Impl {
	case redislock:
		return openRedislock(s.Redis)
	case etcd:
		return openEtcd(s.Etcd)
	}
	open := sql.Open
	if traced {
		open = openTraced
	}
	db, err := openPoolWith(open, c.Driver, s.Postgres, poolSize)
	if err != nil {
		return nil, err
	}
	switch c.Impl {
	case ours:
		return ourLocker{db}, nil
	case floor:
		return floorLocker{db}, nil
	case recipe:
		return recipeLocker{db, contended}, nil
	case goose:
		return gooseLocker{db}, nil
	default:
		return nil, fmt.Errorf("unknown implementation %q", c.Impl)
	}
}
