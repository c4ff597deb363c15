package advisoryotel_test

import (
	"context"
	"database/sql"
	"errors"
	"math"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/metric"
	metricnoop "go.opentelemetry.io/otel/metric/noop"
	sdkmetric "go.opentelemetry.io/otel/sdk/metric"
	"go.opentelemetry.io/otel/sdk/metric/metricdata"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/sdk/trace/tracetest"
	"go.opentelemetry.io/otel/trace"
	tracenoop "go.opentelemetry.io/otel/trace/noop"

	"github.com/pgadvisory/advisory"
	advisoryotel "github.com/pgadvisory/advisory/otel"
)

var key = advisory.ID(42)

// telemetry is the SDK, and an observer that reports to it.
type telemetry struct {
	t        *testing.T
	spans    *tracetest.InMemoryExporter
	tracer   trace.Tracer
	reader   *sdkmetric.ManualReader
	observer *advisory.Observer
	option   advisory.Option
}

func newTelemetry(t *testing.T, opts ...advisoryotel.Option) *telemetry {
	t.Helper()
	m := &telemetry{t: t, spans: tracetest.NewInMemoryExporter(), reader: sdkmetric.NewManualReader()}
	tracers := sdktrace.NewTracerProvider(sdktrace.WithSyncer(m.spans))
	meters := sdkmetric.NewMeterProvider(sdkmetric.WithReader(m.reader))
	m.tracer = tracers.Tracer("test")
	var err error
	m.observer, err = advisoryotel.NewObserver(append([]advisoryotel.Option{
		advisoryotel.WithTracerProvider(tracers), advisoryotel.WithMeterProvider(meters)}, opts...)...)
	if err != nil {
		t.Fatal(err)
	}
	m.option = advisory.Observe(m.observer)
	return m
}

// ended returns the spans of name that have ended, first ended first.
func (m *telemetry) ended(name string) []tracetest.SpanStub {
	return slices.DeleteFunc(m.spans.GetSpans(), func(s tracetest.SpanStub) bool { return s.Name != name })
}

// one returns the only span of name.
func (m *telemetry) one(name string) tracetest.SpanStub {
	m.t.Helper()
	spans := m.ended(name)
	if len(spans) != 1 {
		m.t.Fatalf("%d spans %s have ended, want 1", len(spans), name)
	}
	return spans[0]
}

func (m *telemetry) metrics() map[string]metricdata.Metrics {
	m.t.Helper()
	var rm metricdata.ResourceMetrics
	if err := m.reader.Collect(context.Background(), &rm); err != nil {
		m.t.Fatal(err)
	}
	byName := map[string]metricdata.Metrics{}
	for _, scope := range rm.ScopeMetrics {
		if scope.Scope.Name != advisoryotel.ScopeName {
			m.t.Errorf("scope %q", scope.Scope.Name)
		}
		for _, metric := range scope.Metrics {
			byName[metric.Name] = metric
		}
	}
	return byName
}

// sum is the total of a counter, over all attributes.
func (m *telemetry) sum(name string) (total int64) {
	m.t.Helper()
	if data, ok := m.metrics()[name].Data.(metricdata.Sum[int64]); ok {
		for _, p := range data.DataPoints {
			total += p.Value
		}
	}
	return total
}

// points are the data points of a histogram.
func (m *telemetry) points(name string) []metricdata.HistogramDataPoint[float64] {
	m.t.Helper()
	data, _ := m.metrics()[name].Data.(metricdata.Histogram[float64])
	return data.DataPoints
}

func (m *telemetry) point(name string) metricdata.HistogramDataPoint[float64] {
	m.t.Helper()
	points := m.points(name)
	if len(points) != 1 {
		m.t.Fatalf("%s has %d data points, want 1", name, len(points))
	}
	return points[0]
}

func checkSet(t *testing.T, what string, got attribute.Set, want ...attribute.KeyValue) {
	t.Helper()
	if w := attribute.NewSet(want...); !got.Equals(&w) {
		t.Errorf("%s: attributes\n got %s\nwant %s", what, got.Encoded(attribute.DefaultEncoder()), w.Encoded(attribute.DefaultEncoder()))
	}
}

func checkSpan(t *testing.T, s tracetest.SpanStub, status codes.Code, want ...attribute.KeyValue) {
	t.Helper()
	if s.Status.Code != status {
		t.Errorf("%s: status %v %q, want %v", s.Name, s.Status.Code, s.Status.Description, status)
	}
	checkSet(t, s.Name, attribute.NewSet(s.Attributes...), want...)
}

func ok(context.Context) error { return nil }

// about are the attributes that every span has.
func about(function, key string) []attribute.KeyValue {
	return []attribute.KeyValue{
		attribute.String("advisory.function", function),
		attribute.Bool("advisory.shared", false),
		attribute.String("advisory.key", key),
	}
}

func acquiring(function string, more ...attribute.KeyValue) []attribute.KeyValue {
	return slices.Concat(about(function, "bigint 42"), []attribute.KeyValue{
		attribute.String("db.system.name", "postgresql"),
		attribute.String("db.operation.name", "acquire"),
	}, more)
}

func measured(function string, more ...attribute.KeyValue) []attribute.KeyValue {
	return append([]attribute.KeyValue{
		attribute.String("db.system.name", "postgresql"),
		attribute.String("advisory.function", function),
		attribute.Bool("advisory.shared", false),
	}, more...)
}

func TestWithLock(t *testing.T) {
	m := newTelemetry(t)
	db := newServer().pool(t)
	ctx, caller := m.tracer.Start(context.Background(), "caller")
	err := advisory.WithLock(ctx, db, key, func(ctx context.Context) error {
		if got := m.sum("advisory.lock.count"); got != 1 {
			t.Errorf("advisory.lock.count = %d in fn", got)
		}
		if len(m.ended("advisory.acquire")) != 1 {
			t.Error("advisory.acquire has not ended in fn")
		}
		_, work := m.tracer.Start(ctx, "work")
		work.End()
		return errors.New("fn's own")
	}, m.option)
	if err == nil {
		t.Fatal("fn's error is gone")
	}
	caller.End()

	acquire, hold, work := m.one("advisory.acquire"), m.one("advisory.hold"), m.one("work")
	checkSpan(t, acquire, codes.Unset, acquiring("WithLock")...)
	checkSpan(t, hold, codes.Unset, about("WithLock", "bigint 42")...)
	if acquire.SpanKind != trace.SpanKindClient || hold.SpanKind != trace.SpanKindInternal {
		t.Errorf("kinds: %v and %v", acquire.SpanKind, hold.SpanKind)
	}
	id := caller.SpanContext().SpanID()
	if acquire.Parent.SpanID() != id || hold.Parent.SpanID() != id {
		t.Error("the parent of advisory.acquire and of advisory.hold is not the caller's span")
	}
	if work.Parent.SpanID() != hold.SpanContext.SpanID() {
		t.Error("the parent of fn's span is not advisory.hold")
	}
	if len(hold.Links) != 1 || hold.Links[0].SpanContext.SpanID() != acquire.SpanContext.SpanID() {
		t.Error("advisory.hold is not linked to advisory.acquire")
	}

	if got := m.sum("advisory.lock.count"); got != 0 {
		t.Errorf("advisory.lock.count = %d at the end", got)
	}
	metrics := m.metrics()
	for name, unit := range map[string]string{
		"advisory.acquire.duration": "s", "advisory.hold.duration": "s", "advisory.lock.count": "{lock}",
	} {
		if metrics[name].Unit != unit {
			t.Errorf("%s: unit %q, want %q", name, metrics[name].Unit, unit)
		}
	}
	for _, name := range []string{"advisory.acquire.duration", "advisory.hold.duration"} {
		p := m.point(name)
		checkSet(t, name, p.Attributes, measured("WithLock")...)
		if p.Count != 1 || p.Sum <= 0 || p.Sum > 10 || p.Bounds[0] != .001 || p.Bounds[len(p.Bounds)-1] != 3600 {
			t.Errorf("%s: count %d, sum %v, bounds %v", name, p.Count, p.Sum, p.Bounds)
		}
	}
	if _, any := metrics["advisory.lock.losses"]; any {
		t.Error("advisory.lock.losses was counted")
	}
}

// Without a span around it, the acquisition is not the parent of the hold either.
func TestNoCaller(t *testing.T) {
	m := newTelemetry(t)
	if err := advisory.WithLock(context.Background(), newServer().pool(t), key, ok, m.option); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"advisory.acquire", "advisory.hold"} {
		if parent := m.one(name).Parent; parent.IsValid() {
			t.Errorf("%s has the parent %v", name, parent.SpanID())
		}
	}
}

func TestFunctions(t *testing.T) {
	background := context.Background()
	for _, test := range []struct {
		function string
		holds    bool
		run      func(*sql.DB, advisory.Option) error
	}{
		{"WithLock", true, func(db *sql.DB, o advisory.Option) error {
			return advisory.WithLock(background, db, key, ok, o)
		}},
		{"Acquire", true, func(db *sql.DB, o advisory.Option) error {
			lock, err := advisory.Acquire(background, db, key, o)
			if err != nil {
				return err
			}
			return errors.Join(lock.Release(), lock.Release())
		}},
		{"WithConnLock", true, func(db *sql.DB, o advisory.Option) error {
			return advisory.WithConnLock(background, db, key, func(context.Context, *sql.Conn) error { return nil }, o)
		}},
		{"WithTxLock", true, func(db *sql.DB, o advisory.Option) error {
			return advisory.WithTxLock(background, db, key, func(context.Context, *sql.Tx) error { return nil }, o)
		}},
		{"Lead", true, func(db *sql.DB, o advisory.Option) error {
			return advisory.Lead(background, db, key, ok, o)
		}},
		{"AcquireConn", false, func(db *sql.DB, o advisory.Option) error {
			conn, err := db.Conn(background)
			if err != nil {
				return err
			}
			return errors.Join(advisory.AcquireConn(background, conn, key, o), advisory.ReleaseConn(background, conn, key), conn.Close())
		}},
		{"AcquireTx", false, func(db *sql.DB, o advisory.Option) error {
			tx, err := db.Begin()
			if err != nil {
				return err
			}
			return errors.Join(advisory.AcquireTx(background, tx, key, o), tx.Commit())
		}},
	} {
		t.Run(test.function, func(t *testing.T) {
			m := newTelemetry(t)
			if err := test.run(newServer().pool(t), m.option); err != nil {
				t.Fatal(err)
			}
			checkSpan(t, m.one("advisory.acquire"), codes.Unset, acquiring(test.function)...)
			checkSet(t, "acquire", m.point("advisory.acquire.duration").Attributes, measured(test.function)...)
			if test.holds {
				checkSpan(t, m.one("advisory.hold"), codes.Unset, about(test.function, "bigint 42")...)
				checkSet(t, "hold", m.point("advisory.hold.duration").Attributes, measured(test.function)...)
			} else if len(m.ended("advisory.hold"))+len(m.points("advisory.hold.duration")) > 0 {
				t.Error("a hold was reported")
			}
			if got := m.sum("advisory.lock.count"); got != 0 {
				t.Errorf("advisory.lock.count = %d at the end", got)
			}
		})
	}
}

func TestWithLocks(t *testing.T) {
	m := newTelemetry(t, advisoryotel.WithKeyInMetrics(), advisoryotel.WithAttributes(attribute.String("db.namespace", "shop")))
	keys := []advisory.Key{advisory.ID(5), advisory.Pair(1, 2), advisory.ID(3), advisory.ID(4), advisory.ID(2)}
	err := advisory.WithLocks(context.Background(), newServer().pool(t), keys, func(context.Context) error {
		if got := m.sum("advisory.lock.count"); got != 5 {
			t.Errorf("advisory.lock.count = %d, want 5", got)
		}
		return nil
	}, m.option, advisory.Shared())
	if err != nil {
		t.Fatal(err)
	}
	want := []attribute.KeyValue{
		attribute.String("db.namespace", "shop"),
		attribute.String("advisory.function", "WithLocks"),
		attribute.Bool("advisory.shared", true),
		attribute.String("advisory.key", "bigint 2, bigint 3, bigint 4 and 2 more keys"),
	}
	checkSpan(t, m.one("advisory.hold"), codes.Unset, want...)
	want = append(want, attribute.String("db.system.name", "postgresql"))
	checkSet(t, "metric", m.point("advisory.hold.duration").Attributes, want...)
	checkSpan(t, m.one("advisory.acquire"), codes.Unset, append(want, attribute.String("db.operation.name", "acquire"))...)
}

type timeoutError struct{}

func (timeoutError) Error() string { return "dial: i/o timeout" }
func (timeoutError) Timeout() bool { return true }

func TestNotAcquired(t *testing.T) {
	canceled, cancel := context.WithCancel(context.Background())
	cancel()
	lostAround, cancelCause := context.WithCancelCause(context.Background())
	cancelCause(advisory.ErrLost)
	for _, test := range []notAcquired{
		{name: "refused", option: advisory.NoWait(), want: "not_acquired", status: codes.Unset},
		{name: "Timeout", option: advisory.Timeout(10 * time.Millisecond), want: "timeout", status: codes.Error},
		{name: "deadline", ctx: func() (context.Context, context.CancelFunc) {
			return context.WithTimeout(context.Background(), 10*time.Millisecond)
		}, want: "timeout", status: codes.Error},
		{name: "canceled", ctx: func() (context.Context, context.CancelFunc) { return canceled, cancel }, want: "canceled", status: codes.Error},
		{name: "canceled by another loss", ctx: func() (context.Context, context.CancelFunc) { return lostAround, cancel }, want: "canceled", status: codes.Error},
		{name: "deadlock", fail: sqlError("40P01"), want: "40P01", state: "40P01", status: codes.Error},
		{name: "lock table full", fail: sqlError("53200"), want: "53200", state: "53200", status: codes.Error},
		{name: "network timeout", fail: timeoutError{}, want: "timeout", status: codes.Error},
		{name: "other", fail: errors.New("it broke"), want: "_OTHER", status: codes.Error},
	} {
		t.Run(test.name, test.run)
	}
}

// A notAcquired is a request that fails.
type notAcquired struct {
	name   string
	ctx    func() (context.Context, context.CancelFunc)
	fail   error // the server's; else another holds the lock
	option advisory.Option
	want   string
	state  string // SQLSTATE
	status codes.Code
}

func (test notAcquired) run(t *testing.T) {
	m := newTelemetry(t)
	s := newServer()
	db := s.pool(t)
	if test.fail == nil {
		other, err := advisory.Acquire(context.Background(), db, key)
		if err != nil {
			t.Fatal(err)
		}
		defer other.Release()
	}
	s.fail(test.fail)
	ctx := context.Background()
	if test.ctx != nil {
		var cancel context.CancelFunc
		ctx, cancel = test.ctx()
		defer cancel()
	}
	options := []advisory.Option{m.option}
	if test.option != nil {
		options = append(options, test.option)
	}
	err := advisory.WithLock(ctx, db, key, ok, options...)
	if err == nil {
		t.Fatal("acquired")
	}
	if test.fail == nil && !errors.Is(err, advisory.ErrNotAcquired) {
		t.Fatal(err)
	}
	acquire := m.one("advisory.acquire")
	if len(m.ended("advisory.hold")) > 0 || m.sum("advisory.lock.count") != 0 {
		t.Error("a hold was reported")
	}
	want := []attribute.KeyValue{attribute.String("error.type", test.want)}
	checkSet(t, "metric", m.point("advisory.acquire.duration").Attributes, measured("WithLock", want...)...)
	if test.state != "" {
		want = append(want, attribute.String("db.response.status_code", test.state))
	}
	checkSpan(t, acquire, test.status, acquiring("WithLock", want...)...)
	if test.status == codes.Error && acquire.Status.Description != err.Error() {
		t.Errorf("status %q, want %q", acquire.Status.Description, err)
	}
}

func TestLost(t *testing.T) {
	m := newTelemetry(t)
	s := newServer()
	err := advisory.WithLock(context.Background(), s.pool(t), key, func(ctx context.Context) error {
		s.kill("42")
		<-ctx.Done()
		for m.sum("advisory.lock.losses") == 0 { // the observer is told right after
			runtime.Gosched()
		}
		// Before fn has returned:
		if got := m.sum("advisory.lock.count"); got != 0 {
			t.Errorf("advisory.lock.count = %d after the loss", got)
		}
		span := trace.SpanFromContext(ctx).(sdktrace.ReadOnlySpan)
		for end := time.Now().Add(5 * time.Second); span.Status().Code != codes.Error; {
			if time.Now().After(end) {
				t.Fatal("the status of advisory.hold is not Error")
			}
			runtime.Gosched()
		}
		return ctx.Err()
	}, m.option, advisory.Heartbeat(10*time.Millisecond), advisory.HolderTimeout(time.Second))
	if !errors.Is(err, advisory.ErrLost) {
		t.Fatal(err)
	}
	checkLost(t, m, "WithLock", attribute.String("db.response.status_code", "57P01"))
}

// Where there is no heartbeat, the release finds out.
func TestLostAtRelease(t *testing.T) {
	m := newTelemetry(t)
	s := newServer()
	err := advisory.WithConnLock(context.Background(), s.pool(t), key, func(context.Context, *sql.Conn) error {
		s.kill("42")
		return nil
	}, m.option)
	if !errors.Is(err, advisory.ErrLost) {
		t.Fatal(err)
	}
	checkLost(t, m, "WithConnLock", attribute.String("db.response.status_code", "57P01"))
}

// A release and a heartbeat may find out at the same time.
func TestLostWhileReleasing(t *testing.T) {
	m := newTelemetry(t)
	info := advisory.LockInfo{Function: "WithLock", Keys: []advisory.Key{key}}
	const n = 100
	for range n {
		ctx := m.observer.AcquireStart(context.Background(), info)
		m.observer.AcquireEnd(ctx, info, time.Millisecond, nil)
		ctx = m.observer.HoldStart(ctx, info)
		var both sync.WaitGroup
		both.Go(func() { m.observer.Lost(ctx, info, advisory.ErrLost) })
		both.Go(func() { m.observer.HoldEnd(ctx, info, time.Millisecond, advisory.ErrLost) })
		both.Wait()
	}
	holds := m.ended("advisory.hold")
	if len(holds) != n || m.sum("advisory.lock.count") != 0 || m.sum("advisory.lock.losses") != n {
		t.Errorf("%d holds ended, %d remain, %d lost", len(holds), m.sum("advisory.lock.count"), m.sum("advisory.lock.losses"))
	}
	for _, s := range holds {
		if len(s.Events) != 1 || s.Status.Code != codes.Error {
			t.Fatalf("%d events, status %v", len(s.Events), s.Status.Code)
		}
	}
}

func checkLost(t *testing.T, m *telemetry, function string, more ...attribute.KeyValue) {
	t.Helper()
	lost := attribute.String("error.type", "lost")
	hold := m.one("advisory.hold")
	checkSpan(t, hold, codes.Error, slices.Concat(about(function, "bigint 42"), []attribute.KeyValue{lost}, more)...)
	if len(hold.Events) != 1 || hold.Events[0].Name != "advisory.lost" {
		t.Errorf("events: %v", hold.Events)
	}
	if got := m.sum("advisory.lock.losses"); got != 1 {
		t.Errorf("advisory.lock.losses = %d, want 1", got)
	}
	losses := m.metrics()["advisory.lock.losses"]
	if losses.Unit != "{lock}" {
		t.Errorf("advisory.lock.losses: unit %q", losses.Unit)
	}
	checkSet(t, "losses", losses.Data.(metricdata.Sum[int64]).DataPoints[0].Attributes, measured(function)...)
	if got := m.sum("advisory.lock.count"); got != 0 {
		t.Errorf("advisory.lock.count = %d at the end", got)
	}
	checkSet(t, "hold.duration", m.point("advisory.hold.duration").Attributes, measured(function, lost)...)
}

// The error of COMMIT is that of the hold, and no loss.
func TestCommitFails(t *testing.T) {
	m := newTelemetry(t)
	err := advisory.WithTxLock(context.Background(), newServer().pool(t), key, func(_ context.Context, tx *sql.Tx) error {
		return tx.Rollback()
	}, m.option)
	if err == nil {
		t.Fatal("committed")
	}
	checkSpan(t, m.one("advisory.hold"), codes.Error, append(about("WithTxLock", "bigint 42"), attribute.String("error.type", "_OTHER"))...)
	if m.sum("advisory.lock.losses") != 0 || m.sum("advisory.lock.count") != 0 {
		t.Error("counted as lost, or held")
	}
}

func TestReentrantIsNotObserved(t *testing.T) {
	m := newTelemetry(t)
	db := newServer().pool(t)
	err := advisory.WithLock(context.Background(), db, key, func(ctx context.Context) error {
		return advisory.WithLock(ctx, db, key, ok, m.option)
	}, m.option)
	if !errors.Is(err, advisory.ErrReentrant) {
		t.Fatal(err)
	}
	m.one("advisory.acquire")
	m.one("advisory.hold")
	if got := m.point("advisory.acquire.duration").Count; got != 1 {
		t.Errorf("%d acquisitions, want 1", got)
	}
}

func TestPanic(t *testing.T) {
	for name, leave := range map[string]func(){"panic": func() { panic("fn") }, "Goexit": runtime.Goexit} {
		t.Run(name, func(t *testing.T) {
			m := newTelemetry(t)
			db := newServer().pool(t)
			var fn sync.WaitGroup
			fn.Go(func() {
				defer func() { _ = recover() }()
				_ = advisory.WithLock(context.Background(), db, key, func(context.Context) error { leave(); return nil }, m.option)
			})
			fn.Go(func() {
				defer func() { _ = recover() }()
				_ = advisory.WithTxLock(context.Background(), db, advisory.ID(43), func(context.Context, *sql.Tx) error { leave(); return nil }, m.option)
			})
			fn.Wait()
			if a, h := len(m.ended("advisory.acquire")), len(m.ended("advisory.hold")); a != 2 || h != 2 {
				t.Errorf("%d acquisitions and %d holds have ended, want 2 and 2", a, h)
			}
			if got := m.sum("advisory.lock.count"); got != 0 {
				t.Errorf("advisory.lock.count = %d at the end", got)
			}
		})
	}
}

func TestNested(t *testing.T) {
	m := newTelemetry(t)
	db := newServer().pool(t)
	err := advisory.WithLock(context.Background(), db, advisory.ID(1), func(ctx context.Context) error {
		return advisory.WithLock(ctx, db, advisory.ID(2), ok, m.option)
	}, m.option)
	if err != nil {
		t.Fatal(err)
	}
	holds := m.ended("advisory.hold") // inner, outer
	if len(holds) != 2 {
		t.Fatalf("%d holds have ended", len(holds))
	}
	outer := holds[1].SpanContext.SpanID()
	if holds[0].Parent.SpanID() != outer {
		t.Error("the parent of the inner advisory.hold is not the outer one")
	}
	if acquires := m.ended("advisory.acquire"); acquires[1].Parent.SpanID() != outer {
		t.Error("the parent of the inner advisory.acquire is not the outer advisory.hold")
	}
}

// The span of a Lock is the parent of what is made from its Context, though the ctx of
// Acquire, and its span, have ended.
func TestLockContext(t *testing.T) {
	m := newTelemetry(t)
	ctx, cancel := context.WithCancel(context.Background())
	lock, err := advisory.Acquire(ctx, newServer().pool(t), key, m.option)
	if err != nil {
		t.Fatal(err)
	}
	cancel()
	_, work := m.tracer.Start(lock.Context(), "work")
	work.End()
	if len(m.ended("advisory.hold")) > 0 {
		t.Error("advisory.hold has ended before Release")
	}
	if err := lock.Release(); err != nil {
		t.Fatal(err)
	}
	if m.one("work").Parent.SpanID() != m.one("advisory.hold").SpanContext.SpanID() {
		t.Error("the parent of the work is not advisory.hold")
	}
}

func TestLeadAgain(t *testing.T) {
	m := newTelemetry(t)
	s := newServer()
	terms := 0
	err := advisory.Lead(context.Background(), s.pool(t), key, func(ctx context.Context) error {
		if terms++; terms == 1 {
			s.kill("42")
			<-ctx.Done()
		}
		return nil
	}, m.option, advisory.Heartbeat(10*time.Millisecond), advisory.HolderTimeout(time.Second))
	if err != nil {
		t.Fatal(err)
	}
	if a, h, l := len(m.ended("advisory.acquire")), len(m.ended("advisory.hold")), m.sum("advisory.lock.losses"); a != 2 || h != 2 || l != 1 {
		t.Errorf("%d acquisitions, %d holds, %d losses; want 2, 2, 1", a, h, l)
	}
}

func TestConcurrent(t *testing.T) {
	m := newTelemetry(t)
	db := newServer().pool(t)
	const goroutines, rounds = 8, 20
	var all sync.WaitGroup
	for i := range goroutines {
		all.Go(func() {
			for range rounds {
				if err := advisory.WithLock(context.Background(), db, advisory.ID(int64(i%4)), ok, m.option); err != nil {
					t.Error(err)
				}
			}
		})
	}
	all.Wait()
	const n = goroutines * rounds
	if a, h := len(m.ended("advisory.acquire")), len(m.ended("advisory.hold")); a != n || h != n {
		t.Errorf("%d acquisitions and %d holds have ended, want %d", a, h, n)
	}
	if got := m.point("advisory.hold.duration").Count; got != n {
		t.Errorf("advisory.hold.duration counts %d, want %d", got, n)
	}
	if got := m.sum("advisory.lock.count"); got != 0 {
		t.Errorf("advisory.lock.count = %d at the end", got)
	}
}

// Any of the functions may be taken out of the observer.
func TestUnsetFunctions(t *testing.T) {
	for name, unset := range map[string]func(*advisory.Observer){
		"AcquireStart": func(o *advisory.Observer) { o.AcquireStart = nil },
		"AcquireEnd":   func(o *advisory.Observer) { o.AcquireEnd = nil },
		"HoldStart":    func(o *advisory.Observer) { o.HoldStart = nil },
		"Lost":         func(o *advisory.Observer) { o.Lost = nil },
		"HoldEnd":      func(o *advisory.Observer) { o.HoldEnd = nil },
		"all":          func(o *advisory.Observer) { *o = advisory.Observer{} },
	} {
		t.Run(name, func(t *testing.T) {
			m := newTelemetry(t)
			unset(m.observer)
			ctx, caller := m.tracer.Start(context.Background(), "caller")
			err := advisory.WithLock(ctx, newServer().pool(t), key, ok, m.option)
			if err != nil {
				t.Fatal(err)
			}
			if !caller.IsRecording() {
				t.Error("the caller's span has been ended")
			}
		})
	}
}

func TestGlobals(t *testing.T) {
	m := &telemetry{t: t, spans: tracetest.NewInMemoryExporter(), reader: sdkmetric.NewManualReader()}
	otel.SetTracerProvider(sdktrace.NewTracerProvider(sdktrace.WithSyncer(m.spans)))
	otel.SetMeterProvider(sdkmetric.NewMeterProvider(sdkmetric.WithReader(m.reader)))
	t.Cleanup(func() {
		otel.SetTracerProvider(tracenoop.NewTracerProvider())
		otel.SetMeterProvider(metricnoop.NewMeterProvider())
	})
	observer, err := advisoryotel.NewObserver(advisoryotel.WithTracerProvider(nil), advisoryotel.WithMeterProvider(nil))
	if err != nil {
		t.Fatal(err)
	}
	if err := advisory.WithLock(context.Background(), newServer().pool(t), key, ok, advisory.Observe(observer)); err != nil {
		t.Fatal(err)
	}
	m.one("advisory.acquire")
	m.one("advisory.hold")
	m.point("advisory.hold.duration")
}

func TestNewObserverErrors(t *testing.T) {
	if _, err := advisoryotel.NewObserver(nil); err == nil {
		t.Error("a nil Option was taken")
	}
	_, err := advisoryotel.NewObserver(advisoryotel.WithMeterProvider(refusingProvider{}))
	if !errors.Is(err, errRefusing) || !strings.HasPrefix(err.Error(), "advisoryotel: ") {
		t.Errorf("error %v", err)
	}
}

var errRefusing = errors.New("no counters here")

type refusingProvider struct{ metricnoop.MeterProvider }

func (refusingProvider) Meter(string, ...metric.MeterOption) metric.Meter { return refusingMeter{} }

type refusingMeter struct{ metricnoop.Meter }

func (refusingMeter) Int64Counter(string, ...metric.Int64CounterOption) (metric.Int64Counter, error) {
	return nil, errRefusing
}

// An Observer that is not set costs no allocation: no more than another option that is nil.
func TestUnsetObserverAllocatesNothing(t *testing.T) {
	if raceDetector {
		t.Skip("without the race detector")
	}
	db := newServer().pool(t)
	allocs := func(opt advisory.Option) float64 {
		opts := []advisory.Option{opt}
		least := math.Inf(1)
		for range 5 { // the least, because the runtime and the timers allocate, too
			least = min(least, testing.AllocsPerRun(100, func() {
				if err := advisory.WithLock(context.Background(), db, key, ok, opts...); err != nil {
					t.Fatal(err)
				}
			}))
		}
		return least
	}
	without, unset, set := allocs(advisory.Logger(nil)), allocs(advisory.Observe(nil)), allocs(advisory.Observe(&advisory.Observer{}))
	t.Logf("allocations of WithLock: %v without an Observer, %v with nil, %v with an empty one", without, unset, set)
	if unset > without {
		t.Errorf("%v allocations with a nil Observer, %v without", unset, without)
	}
}

func BenchmarkWithLock(b *testing.B) {
	disabled, err := advisoryotel.NewObserver(
		advisoryotel.WithTracerProvider(tracenoop.NewTracerProvider()), advisoryotel.WithMeterProvider(metricnoop.NewMeterProvider()))
	if err != nil {
		b.Fatal(err)
	}
	enabled, err := advisoryotel.NewObserver(
		advisoryotel.WithTracerProvider(sdktrace.NewTracerProvider()), // samples everything, exports nothing
		advisoryotel.WithMeterProvider(sdkmetric.NewMeterProvider(sdkmetric.WithReader(sdkmetric.NewManualReader()))))
	if err != nil {
		b.Fatal(err)
	}
	for _, bench := range []struct {
		name    string
		options []advisory.Option
	}{
		{"unset", nil},
		{"empty", []advisory.Option{advisory.Observe(&advisory.Observer{})}},
		{"noop", []advisory.Option{advisory.Observe(disabled)}},
		{"sdk", []advisory.Option{advisory.Observe(enabled)}},
	} {
		b.Run(bench.name, func(b *testing.B) {
			db := newServer().pool(b)
			b.ReportAllocs()
			for b.Loop() {
				if err := advisory.WithLock(context.Background(), db, key, ok, bench.options...); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
