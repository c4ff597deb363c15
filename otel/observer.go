package advisoryotel

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/metric"
	semconv "go.opentelemetry.io/otel/semconv/v1.43.0"
	"go.opentelemetry.io/otel/trace"

	"github.com/pgadvisory/advisory"
)

// ScopeName is the name of the instrumentation scope of every span and metric.
const ScopeName = "github.com/pgadvisory/advisory/otel"

const version = "0.1.0"

const (
	functionKey = attribute.Key("advisory.function")
	sharedKey   = attribute.Key("advisory.shared")
	keyKey      = attribute.Key("advisory.key")
)

// boundaries are those of db.client.operation.duration, and go on to an hour: locks are
// waited for, and held, for longer than a statement takes.
var boundaries = []float64{.001, .005, .01, .05, .1, .5, 1, 5, 10, 60, 600, 3600}

// NewObserver returns an observer for [advisory.Observe]. It fails if an option is
// nil, or the MeterProvider refuses an instrument.
func NewObserver(opts ...Option) (*advisory.Observer, error) {
	cfg, err := newConfig(opts)
	if err != nil {
		return nil, err
	}
	o := &observer{config: cfg}
	o.tracer = o.tracers.Tracer(ScopeName,
		trace.WithInstrumentationVersion(version), trace.WithSchemaURL(semconv.SchemaURL))
	meter := o.meters.Meter(ScopeName,
		metric.WithInstrumentationVersion(version), metric.WithSchemaURL(semconv.SchemaURL))
	var errs [4]error
	o.acquireDuration, errs[0] = meter.Float64Histogram("advisory.acquire.duration",
		metric.WithUnit("s"),
		metric.WithDescription("How long acquisitions of advisory locks took, whether or not they succeeded."),
		metric.WithExplicitBucketBoundaries(boundaries...))
	o.holdDuration, errs[1] = meter.Float64Histogram("advisory.hold.duration",
		metric.WithUnit("s"),
		metric.WithDescription("How long advisory locks were held."),
		metric.WithExplicitBucketBoundaries(boundaries...))
	o.count, errs[2] = meter.Int64UpDownCounter("advisory.lock.count",
		metric.WithUnit("{lock}"),
		metric.WithDescription("Advisory locks that are held now."))
	o.losses, errs[3] = meter.Int64Counter("advisory.lock.losses",
		metric.WithUnit("{lock}"),
		metric.WithDescription("Advisory locks that were lost while they were held."))
	if err := errors.Join(errs[:]...); err != nil {
		return nil, fmt.Errorf("advisoryotel: %w", err)
	}
	return &advisory.Observer{
		AcquireStart: o.acquireStart,
		AcquireEnd:   o.acquireEnd,
		HoldStart:    o.holdStart,
		Lost:         o.lost,
		HoldEnd:      o.holdEnd,
	}, nil
}

type observer struct {
	config
	tracer trace.Tracer

	acquireDuration, holdDuration metric.Float64Histogram
	count                         metric.Int64UpDownCounter
	losses                        metric.Int64Counter
}

// An acquisition is what the context says of the lock that is being acquired.
type acquisition struct{ caller, span trace.Span }

// A hold is what the context says of a held lock.
type hold struct {
	span trace.Span

	// uncount takes the lock out of the count, once: at its loss, or else at its
	// release. A loss may be noticed on another goroutine while the release is under
	// way, which then waits here before it ends the span.
	uncount sync.Once
}

type (
	acquisitionKey struct{}
	holdKey        struct{}
)

func (o *observer) acquireStart(ctx context.Context, info advisory.LockInfo) context.Context {
	a := &acquisition{caller: trace.SpanFromContext(ctx)}
	ctx, a.span = o.tracer.Start(ctx, "advisory.acquire",
		trace.WithSpanKind(trace.SpanKindClient),
		trace.WithAttributes(o.spanAttributes(info, semconv.DBSystemNamePostgreSQL, semconv.DBOperationName("acquire"))...))
	return context.WithValue(ctx, acquisitionKey{}, a)
}

func (o *observer) acquireEnd(ctx context.Context, info advisory.LockInfo, took time.Duration, err error) {
	if o.acquireDuration.Enabled(ctx) {
		o.acquireDuration.Record(ctx, took.Seconds(), o.metricAttributes(info, err))
	}
	// Not SpanFromContext: without an AcquireStart, that would be the caller's.
	if a, ok := ctx.Value(acquisitionKey{}).(*acquisition); ok {
		fail(a.span, err)
		a.span.End()
	}
}

func (o *observer) holdStart(ctx context.Context, info advisory.LockInfo) context.Context {
	o.add(ctx, info, 1)
	options := []trace.SpanStartOption{trace.WithAttributes(o.spanAttributes(info)...)}
	if a, ok := ctx.Value(acquisitionKey{}).(*acquisition); ok {
		// ctx is made from acquireStart's. The acquisition has ended, and is no parent
		// of what follows.
		ctx = trace.ContextWithSpan(ctx, a.caller)
		options = append(options, trace.WithLinks(trace.Link{SpanContext: a.span.SpanContext()}))
	}
	h := &hold{}
	ctx, h.span = o.tracer.Start(ctx, "advisory.hold", options...)
	return context.WithValue(ctx, holdKey{}, h)
}

func (o *observer) lost(ctx context.Context, info advisory.LockInfo, err error) {
	if h, ok := ctx.Value(holdKey{}).(*hold); ok {
		h.uncount.Do(func() { o.lose(ctx, h, info, err) })
	}
}

func (o *observer) lose(ctx context.Context, h *hold, info advisory.LockInfo, err error) {
	o.add(ctx, info, -1)
	if o.losses.Enabled(ctx) {
		o.losses.Add(ctx, int64(len(info.Keys)), o.metricAttributes(info, nil))
	}
	h.span.AddEvent("advisory.lost")
	fail(h.span, err)
}

func (o *observer) holdEnd(ctx context.Context, info advisory.LockInfo, held time.Duration, err error) {
	if o.holdDuration.Enabled(ctx) {
		o.holdDuration.Record(ctx, held.Seconds(), o.metricAttributes(info, err))
	}
	h, ok := ctx.Value(holdKey{}).(*hold)
	if !ok {
		return
	}
	h.uncount.Do(func() {
		// Where there is no heartbeat, the release is the first to notice.
		if errors.Is(err, advisory.ErrLost) {
			o.lose(ctx, h, info, err)
			return
		}
		o.add(ctx, info, -1)
		fail(h.span, err)
	})
	h.span.End()
}

// add adds the locks of one holder to the count, sign times.
func (o *observer) add(ctx context.Context, info advisory.LockInfo, sign int) {
	if o.count.Enabled(ctx) {
		o.count.Add(ctx, int64(sign*len(info.Keys)), o.metricAttributes(info, nil))
	}
}

// fail marks span as failed, if err says so.
func fail(span trace.Span, err error) {
	if err == nil || !span.IsRecording() {
		return
	}
	kind := errorType(err)
	span.SetAttributes(semconv.ErrorTypeKey.String(kind))
	if state := sqlState(err); state != "" {
		span.SetAttributes(semconv.DBResponseStatusCode(state))
	}
	if kind != notAcquired {
		span.SetStatus(codes.Error, err.Error())
	}
}

func (o *observer) spanAttributes(info advisory.LockInfo, more ...attribute.KeyValue) []attribute.KeyValue {
	as := make([]attribute.KeyValue, 0, len(o.attributes)+len(more)+5) // 2 for fail
	as = append(as, o.attributes...)
	as = append(as, more...)
	return append(as, functionKey.String(info.Function), sharedKey.Bool(info.Shared), keyKey.String(keyList(info.Keys)))
}

func (o *observer) metricAttributes(info advisory.LockInfo, err error) metric.MeasurementOption {
	as := make([]attribute.KeyValue, 0, len(o.attributes)+5)
	as = append(as, o.attributes...)
	as = append(as, semconv.DBSystemNamePostgreSQL, functionKey.String(info.Function), sharedKey.Bool(info.Shared))
	if o.keyInMetrics {
		as = append(as, keyKey.String(keyList(info.Keys)))
	}
	if err != nil {
		as = append(as, semconv.ErrorTypeKey.String(errorType(err)))
	}
	return metric.WithAttributeSet(attribute.NewSet(as...))
}

// keyList is keys as the errors of advisory have them.
func keyList(keys []advisory.Key) string {
	if len(keys) == 1 {
		return keys[0].String()
	}
	var b strings.Builder
	for i, k := range keys {
		if i == 3 && len(keys) > 4 {
			fmt.Fprintf(&b, " and %d more keys", len(keys)-i)
			break
		}
		if i > 0 {
			b.WriteString(", ")
		}
		b.WriteString(k.String())
	}
	return b.String()
}

const notAcquired = "not_acquired"

// errorType is the error.type of err: of low cardinality, whatever err says.
func errorType(err error) string {
	// Before ErrLost: the context that ended a wait may have ended because another lock,
	// around this one, was lost.
	waited := errors.Is(err, advisory.ErrNotAcquired)
	if !waited {
		if errors.Is(err, advisory.ErrLost) {
			return "lost"
		}
		if state := sqlState(err); state != "" {
			return state
		}
	}
	var timeout interface{ Timeout() bool } // of context.DeadlineExceeded, and net.Error
	switch {
	case errors.Is(err, context.Canceled):
		return "canceled"
	case errors.As(err, &timeout) && timeout.Timeout():
		return "timeout"
	case waited:
		return notAcquired
	default:
		return semconv.ErrorTypeOther.Value.AsString()
	}
}

// sqlState is the SQLSTATE of the server's error, or "". The errors of pgx and pq have
// the method.
func sqlState(err error) string {
	var s interface{ SQLState() string }
	if errors.As(err, &s) {
		return s.SQLState()
	}
	return ""
}
