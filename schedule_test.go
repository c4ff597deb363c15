package advisory

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/pgadvisory/advisory/internal/pgsql"
	"github.com/pgadvisory/advisory/internal/session"
)

// inside is who is under which lock.
type inside struct {
	mu sync.Mutex
	by map[Key][]*insider
}

type insider struct {
	ctx       context.Context
	db        int
	shared    bool
	dedicated bool
}

// enter reports those who are inside and must not be.
func (in *inside) enter(t testing.TB, k Key, i *insider, lossy bool) (leave func()) {
	in.mu.Lock()
	defer in.mu.Unlock()
	if i.ctx.Err() != nil {
		return func() {} // lost before fn began
	}
	for _, o := range in.by[k] {
		if o.ctx.Err() != nil || o.shared && i.shared {
			continue
		}
		if lossy && o.db != i.db { // it may not know yet that it has lost it
			continue
		}
		t.Errorf("%v: two at a time: %+v and %+v", k, *o, *i)
	}
	in.by[k] = append(in.by[k], i)
	return func() {
		in.mu.Lock()
		defer in.mu.Unlock()
		in.by[k] = slices.DeleteFunc(in.by[k], func(o *insider) bool { return o == i })
	}
}

// Several processes, some with small pools, do at random all that can be done with a few
// locks; sessions die, and the server runs out of memory. Nobody is inside with another, and nothing
// is left.
func TestRandomSchedules(t *testing.T) {
	t.Parallel()
	for seed := range 100 {
		ok := t.Run(fmt.Sprint(seed), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) { randomSchedule(t, uint64(seed)) })
		})
		if !ok {
			return
		}
	}
}

func randomSchedule(t *testing.T, seed uint64) {
	rng := rand.New(rand.NewPCG(seed, 1))
	kills, errs, direct, dedicated := rng.IntN(3) == 0, rng.IntN(3) == 0, rng.IntN(2) == 0, rng.IntN(2) == 0
	processes := 1 + rng.IntN(3)
	p, dbs, srvs := newTable(t, processes)
	var mu sync.Mutex // of rng
	random := func(n int) int {
		mu.Lock()
		defer mu.Unlock()
		return rng.IntN(n)
	}
	slow := rng.IntN(3)
	p.rtt = func() time.Duration { return time.Duration(random(1+1000*slow)) * time.Microsecond }
	for i, db := range dbs {
		srvs[i].direct = direct
		db.SetMaxOpenConns([]int{0, 1, 2, 3, 5}[rng.IntN(5)])
	}
	over := make(chan struct{})
	if kills {
		go func() {
			for range 40 {
				select {
				case <-over:
					return
				case <-time.After(time.Duration(random(100)) * time.Millisecond):
				}
				i := random(processes)
				if n := srvs[i].open(); n > 0 {
					srvs[i].mu.Lock()
					no := srvs[i].opened - random(n)
					srvs[i].mu.Unlock()
					p.kill(backendID{srvs[i], no})
				}
			}
		}()
	}
	internal := pgError("53200")
	if errs {
		p.fail = func(_ int, query string) error {
			if strings.Contains(query, "_lock") && random(40) == 0 {
				return internal
			}
			return nil
		}
		p.failIn = func(op, _ int64) error {
			if op&1 != 0 && random(40) == 0 {
				return internal
			}
			return nil
		}
	}
	keys := []Key{ID(1), ID(2), Pair(-1, 2)}
	if random(2) == 0 {
		for i := range 20 {
			keys = append(keys, ID(int64(i+100)))
		}
	}
	in := inside{by: make(map[Key][]*insider)}
	var wg sync.WaitGroup
	for range 4 + random(40) {
		wg.Go(func() {
			for range 10 {
				i, choice := random(processes), random(len(closures)+1)
				if choice >= 3 && choice < len(closures) && !dedicated {
					choice = random(3)
				}
				// A statement that is broken off in a transaction has database/sql wait for
				// its own locks, during which virtual time stands still.
				tx := choice >= 4 && choice < len(closures)
				if tx && (kills || errs) {
					choice, tx = 3, false
				}
				db := dbs[i]
				ctx, cancel := context.WithCancel(t.Context())
				var opts []Option
				shared, bounded := random(4) == 0, true
				if shared {
					opts = append(opts, Shared())
				}
				switch random(6) {
				case 0:
					opts = append(opts, NoWait())
				case 1:
					opts = append(opts, Timeout(time.Duration(1+random(500))*time.Millisecond))
				case 2:
					if tx {
						break
					}
					time.AfterFunc(time.Duration(random(20000))*time.Microsecond, cancel)
				default:
					bounded = false
				}
				held := time.Duration(random(30)) * time.Millisecond
				switch random(30) {
				case 0:
					held = time.Duration(random(800)) * time.Millisecond
				case 1, 2, 3, 4, 5, 6, 7, 8, 9, 10:
					held = 0
				}
				ran := false
				under := func(keys ...Key) func(context.Context) error {
					return func(ctx context.Context) error {
						ran = true
						for _, k := range keys {
							who := &insider{ctx: ctx, db: i, shared: shared, dedicated: choice >= 3 && choice < len(closures)}
							defer in.enter(t, k, who, kills || errs)()
						}
						session.Sleep(ctx, held)
						return nil
					}
				}
				k := keys[random(len(keys))]
				var err error
				if choice == len(closures) {
					l := keys[random(len(keys))]
					err = WithLocks(ctx, db, []Key{k, l}, under(slices.Compact([]Key{k, l})...), opts...)
				} else {
					err = closures[choice].run(ctx, db, k, under(k), opts...)
				}
				cancel()
				switch {
				case err == nil:
					if !ran {
						t.Error("no error, and fn has not run")
					}
				case errors.Is(err, ErrNotAcquired) && bounded && !ran:
				case ran && bounded && errors.Is(err, context.Canceled): // a transaction's
				case kills && (errors.Is(err, ErrLost) || pgsql.Gone(err)):
				case errs && (errors.Is(err, internal) || errors.Is(err, ErrLost)):
				default:
					t.Errorf("choice %d: %v", choice, err)
				}
				time.Sleep(time.Duration(random(2000)) * time.Microsecond)
			}
		})
	}
	// A schedule that comes to nothing would go on for ever, in virtual time.
	stuck := time.AfterFunc(10*time.Minute, func() {
		state := ""
		for i, db := range dbs {
			lines := srvs[i].lines()
			state += describe(db) + strings.Join(lines[max(0, len(lines)-20):], "\n") + "\n"
		}
		panic("stuck: " + t.Name() + "\n" + state)
	})
	wg.Wait()
	stuck.Stop()
	close(over)
	time.Sleep(time.Minute)
	synctest.Wait()
	p.clean()
	for _, db := range dbs {
		wantIdle(t, db)
	}
}
