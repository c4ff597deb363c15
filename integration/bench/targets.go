package main

// target is how many times as many locks as impl ours must take, at least.
func target(workload, impl, driver string) bound {
	for _, t := range targets {
		if t.workload == workload && t.impl == impl {
			if driver == pgx {
				return t.pgx
			}
			return t.pq
		}
	}
	return bound{}
}

var targets = []struct {
	workload, impl string
	pgx, pq        bound
}{
	{"OneGoroutine", floor, atLeast(0.85), atLeast(0.75)},
	{"OneGoroutine", recipe, atLeast(1.05), atLeast(2)},
	{"OneGoroutine", redislock, atLeast(1), atLeast(0.85)},
	{"OneGoroutineTraced", recipe, atLeast(0.95), atLeast(1.8)},
	{"Keys", recipe, atLeast(3), atLeast(7)},
	{"KeysDelayed", closedLoop, atLeast(0.9), atLeast(0.9)},

	{"OneGoroutine", etcd, moreThan(1), moreThan(1)},
	{"Keys", redislock, moreThan(1), moreThan(1)},
	{"Keys", etcd, moreThan(1), moreThan(1)},
	{"OneKey", redislock, moreThan(1), moreThan(1)},
	{"OneKey", etcd, moreThan(1), moreThan(1)},
	{"Processes", redislock, moreThan(1), moreThan(1)},
	{"Processes", etcd, moreThan(1), moreThan(1)},
}
