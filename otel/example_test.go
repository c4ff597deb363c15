package advisoryotel_test

import (
	"context"
	"database/sql"
	"fmt"
	"log"

	"go.opentelemetry.io/otel/attribute"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/sdk/trace/tracetest"

	"github.com/pgadvisory/advisory"
	advisoryotel "github.com/pgadvisory/advisory/otel"
)

func ExampleNewObserver() {
	// In a program, db is what sql.Open returned, and the exporter sends to a collector.
	db := sql.OpenDB(newServer())
	defer db.Close()
	exporter := tracetest.NewInMemoryExporter()
	tracers := sdktrace.NewTracerProvider(sdktrace.WithSyncer(exporter))

	observer, err := advisoryotel.NewObserver(
		advisoryotel.WithTracerProvider(tracers), // the default is the global one
		advisoryotel.WithAttributes(
			attribute.String("db.namespace", "shop"),
			attribute.String("server.address", "db.example.com"),
		),
	)
	if err != nil {
		log.Fatal(err)
	}

	err = advisory.WithLock(context.Background(), db, advisory.ID(42), func(ctx context.Context) error {
		_, span := tracers.Tracer("example").Start(ctx, "build report")
		defer span.End()
		return nil
	}, advisory.Observe(observer))
	if err != nil {
		log.Fatal(err)
	}

	for _, span := range exporter.GetSpans() {
		fmt.Println(span.SpanKind, span.Name)
	}
	// Output:
	// client advisory.acquire
	// internal build report
	// internal advisory.hold
}
