package advisoryotel

import (
	"errors"
	"slices"

	"go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/metric"
	"go.opentelemetry.io/otel/trace"
)

// An Option changes what [NewObserver] reports, or where.
type Option interface{ apply(*config) }

type optionFunc func(*config)

func (f optionFunc) apply(c *config) { f(c) }

type config struct {
	tracers      trace.TracerProvider
	meters       metric.MeterProvider
	attributes   []attribute.KeyValue
	keyInMetrics bool
}

func newConfig(opts []Option) (config, error) {
	var c config
	for _, o := range opts {
		if o == nil {
			return c, errors.New("advisoryotel: nil Option")
		}
		o.apply(&c)
	}
	if c.tracers == nil {
		c.tracers = otel.GetTracerProvider()
	}
	if c.meters == nil {
		c.meters = otel.GetMeterProvider()
	}
	return c, nil
}

// WithTracerProvider sets where the spans go. The default, and nil, is the global one.
func WithTracerProvider(p trace.TracerProvider) Option {
	return optionFunc(func(c *config) { c.tracers = p })
}

// WithMeterProvider sets where the metrics go. The default, and nil, is the global one.
func WithMeterProvider(p metric.MeterProvider) Option {
	return optionFunc(func(c *config) { c.meters = p })
}

// WithAttributes adds attributes to every span and metric: db.namespace and
// server.address, which database/sql does not tell. Given again, it adds to the others.
func WithAttributes(attributes ...attribute.KeyValue) Option {
	attributes = slices.Clone(attributes)
	return optionFunc(func(c *config) { c.attributes = append(c.attributes, attributes...) })
}

// WithKeyInMetrics adds advisory.key to every metric. It is for programs whose keys are
// few: every key is a time series, or a dozen of them for a histogram. Spans always have
// it.
func WithKeyInMetrics() Option {
	return optionFunc(func(c *config) { c.keyInMetrics = true })
}
