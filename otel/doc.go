// Package advisoryotel turns what happens to the locks of
// [github.com/pgadvisory/advisory] into OpenTelemetry metrics and spans.
//
//	observer, err := advisoryotel.NewObserver()
//	…
//	err = advisory.WithLock(ctx, db, key, fn, advisory.Observe(observer))
//
// One observer is for any number of locks, keys and goroutines. By default it reports to
// the global providers, also to those that are set after it was made. What the package
// refuses before it sends anything, like ErrReentrant or a nil db, is not observed.
//
// # Metrics
//
//	name                       instrument     unit    attributes
//	advisory.acquire.duration  histogram      s       error.type
//	advisory.hold.duration     histogram      s       error.type
//	advisory.lock.count        updowncounter  {lock}
//	advisory.lock.losses       counter        {lock}
//
//	advisory.acquire.duration  from the call to the lock, or to its error
//	advisory.hold.duration     from the lock to the end of its release
//	advisory.lock.count        locks held now
//	advisory.lock.losses       locks that were held and could not be shown to be held to the
//	                           end; counted when that is noticed, by a heartbeat or the release
//
// All of them also have db.system.name, advisory.function, advisory.shared, what
// [WithAttributes] adds, and advisory.key with [WithKeyInMetrics]. The last two metrics
// count keys: WithLocks of three counts three.
//
// AcquireConn and AcquireTx are seen to acquire only, because it is the caller who knows
// when their hold ends.
//
// The histograms suggest bucket boundaries from 1 ms to 1 h. A view in the SDK replaces
// them; its scope is [ScopeName].
//
// # Spans
//
//	name              kind      parent           attributes
//	advisory.acquire  CLIENT    that of the ctx  db.system.name, db.operation.name, error.type,
//	                                             db.response.status_code
//	advisory.hold     INTERNAL  that of the ctx  error.type, db.response.status_code
//
// Both also have advisory.function, advisory.shared, advisory.key, and what WithAttributes
// adds. The spans of an instrumented driver are children of advisory.acquire; those of fn,
// or made from [advisory.Lock.Context], are children of advisory.hold, which is linked to
// its acquisition.
//
// A loss is an event advisory.lost of advisory.hold, and sets its status to Error, at the
// moment at which it is noticed. advisory.hold does not record the error or panic of fn.
//
// The status of a failed acquisition is Error, except where error.type is not_acquired:
// to be refused is one of the two answers that NoWait asks for.
//
// With Lead, the advisory.acquire of a standby lasts until it leads or its campaign fails,
// and the advisory.hold of a leader as long as it leads. So would the trace of all its
// work: a fn of Lead does better to begin a trace for each piece of work, with
// [go.opentelemetry.io/otel/trace.WithNewRoot].
//
// # Attributes
//
//	db.system.name           postgresql
//	db.operation.name        acquire
//	db.response.status_code  the SQLSTATE, if the server gave one
//	error.type               why it failed; absent if it did not:
//	                         not_acquired  another holds the lock, and NoWait
//	                         timeout       a deadline was over: Timeout's, ctx's or the network's
//	                         canceled      ctx was canceled
//	                         lost          the lock was acquired, and lost
//	                         40P01, …      the SQLSTATE of any other error of the server
//	                         _OTHER        anything else
//	advisory.function        WithLock, WithLocks, Acquire, WithConnLock, AcquireConn,
//	                         WithTxLock, AcquireTx or Lead
//	advisory.shared          whether the lock is a shared one
//	advisory.key             the key as messages have it; of more than four, three
//
// The names that begin with db. and error. are those of the semantic conventions for
// databases. There is no db.client.operation.duration: an acquisition may be many
// statements, or none, and an instrumented driver reports those.
package advisoryotel
