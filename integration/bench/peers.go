package main

import (
	"context"
	"errors"
	"strconv"
	"time"

	bsm "github.com/bsm/redislock"
	"github.com/redis/go-redis/v9"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/client/v3/concurrency"
	"go.uber.org/zap"
)

// leaseTime is how long the locks of Redis and etcd outlive their holder: as long as
// ours, by default.
const leaseTime = 15 * time.Second

// redisLocker is redislock. It is told to try again every millisecond, where its default
// is not to wait at all, and has a connection for each goroutine: with fewer it is slower.
type redisLocker struct {
	client *redis.Client
	lock   *bsm.Client
}

func openRedislock(addr string) (locker, error) {
	client := redis.NewClient(&redis.Options{Addr: addr, PoolSize: 64})
	return redisLocker{client, bsm.New(client)}, nil
}

func (l redisLocker) worker(_ context.Context, key int64) (lockFunc, error) {
	name := "bench/" + strconv.FormatInt(key, 10)
	options := &bsm.Options{RetryStrategy: bsm.LinearBackoff(time.Millisecond)}
	return func(ctx context.Context, body func(context.Context) error) error {
		lock, err := l.lock.Obtain(ctx, name, leaseTime, options)
		if err != nil {
			return err
		}
		return errors.Join(body(ctx), lock.Release(ctx))
	}, nil
}

func (l redisLocker) Close() error { return l.client.Close() }

// etcdLocker is the Mutex of etcd's client. A Mutex excludes sessions, so that every
// goroutine has one of its own. It is kept, for all of the goroutine's locks.
type etcdLocker struct{ client *clientv3.Client }

func openEtcd(addr string) (locker, error) {
	client, err := clientv3.New(clientv3.Config{
		Endpoints:   []string{addr},
		DialTimeout: 5 * time.Second,
		Logger:      zap.NewNop(),
	})
	return etcdLocker{client}, err
}

func (l etcdLocker) worker(ctx context.Context, key int64) (lockFunc, error) {
	session, err := concurrency.NewSession(l.client, concurrency.WithTTL(int(leaseTime/time.Second)))
	if err != nil {
		return nil, err
	}
	name := "bench/" + strconv.FormatInt(key, 10)
	return func(ctx context.Context, body func(context.Context) error) error {
		mutex := concurrency.NewMutex(session, name)
		if err := mutex.Lock(ctx); err != nil {
			return err
		}
		return errors.Join(body(ctx), mutex.Unlock(ctx))
	}, nil
}

func (l etcdLocker) Close() error { return l.client.Close() }
