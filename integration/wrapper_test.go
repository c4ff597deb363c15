package integration

import (
	"context"
	"database/sql"
	sqldriver "database/sql/driver"
	"strings"
	"sync"
	"testing"

	"github.com/XSAM/otelsql"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/stdlib"
	"github.com/lib/pq"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/sdk/trace/tracetest"

	"github.com/pgadvisory/advisory"
)

// connector is the driver's own, which wrappers wrap.
func (d driver) connector(t *testing.T, dsn string) sqldriver.Connector {
	t.Helper()
	if d.sql == "postgres" {
		c, err := pq.NewConnector(dsn)
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	cfg, err := pgx.ParseConfig(dsn)
	if err != nil {
		t.Fatal(err)
	}
	// pgx asks a connection that has been idle for a second whether it lives.
	return stdlib.GetConnector(*cfg, stdlib.OptionShouldPing(func(context.Context, stdlib.ShouldPingParams) bool { return false }))
}

// A traced connector makes connections as those of dd-trace-go (contrib/database/sql), which
// hand out what they wrap by WrappedConn.
type traced struct {
	sqldriver.Connector
	mu         sync.Mutex
	statements []string
}

func (c *traced) Connect(ctx context.Context) (sqldriver.Conn, error) {
	conn, err := c.Connector.Connect(ctx)
	if err != nil {
		return nil, err
	}
	return &tracedConn{conn, c}, nil
}

type tracedConn struct {
	sqldriver.Conn
	c *traced
}

func (c *tracedConn) WrappedConn() sqldriver.Conn { return c.Conn }

func (c *tracedConn) ExecContext(ctx context.Context, query string, args []sqldriver.NamedValue) (sqldriver.Result, error) {
	c.c.mu.Lock()
	c.c.statements = append(c.c.statements, query)
	c.c.mu.Unlock()
	return c.Conn.(sqldriver.ExecerContext).ExecContext(ctx, query, args)
}

func (c *tracedConn) BeginTx(ctx context.Context, opts sqldriver.TxOptions) (sqldriver.Tx, error) {
	return c.Conn.(sqldriver.ConnBeginTx).BeginTx(ctx, opts)
}

// A program that traces its statements sees those that it has asked for. A wait for a lock is not
// some failed statements in each second, and a heartbeat not a trace.
func TestTracesHaveNoWaitsAndNoHeartbeats(t *testing.T) {
	t.Parallel()
	bothDrivers(t, func(t *testing.T, d driver) {
		dsn := watchLog(t, server.DSN())
		for name, open := range map[string]func(*testing.T, sqldriver.Connector) (*sql.DB, func() []string){
			"otelsql":     openOtelsql,
			"dd-trace-go": openTraced,
		} {
			t.Run(name, func(t *testing.T) {
				for _, w := range openers {
					db, statements := open(t, d.connector(t, dsn))
					traceWaitAndHeartbeat(t, w, db)
					wantOnlyTries(t, w, statements())
					db.Close()
				}
			})
		}
	})
}

// openOtelsql opens a pool whose statements are spans. It fails the test for each span
// that has failed.
func openOtelsql(t *testing.T, c sqldriver.Connector) (db *sql.DB, statements func() []string) {
	spans := tracetest.NewInMemoryExporter()
	provider := trace.NewTracerProvider(trace.WithSyncer(spans))
	return otelsql.OpenDB(c, otelsql.WithTracerProvider(provider)), func() (statements []string) {
		for _, s := range spans.GetSpans() {
			statement := s.Name
			for _, a := range s.Attributes {
				statement += " " + a.Value.String()
			}
			if s.Status.Code == codes.Error {
				t.Errorf("a failed span: %s: %s", statement, s.Status.Description)
			}
			statements = append(statements, statement)
		}
		return statements
	}
}

// openTraced opens a pool of traced connections.
func openTraced(_ *testing.T, connector sqldriver.Connector) (db *sql.DB, statements func() []string) {
	c := &traced{Connector: connector}
	return sql.OpenDB(c), func() []string {
		c.mu.Lock()
		defer c.mu.Unlock()
		return c.statements
	}
}

// traceWaitAndHeartbeat waits for a lock, and holds it until its first heartbeat.
func traceWaitAndHeartbeat(t *testing.T, w way, db *sql.DB) {
	t.Helper()
	key := advisory.Name(t.Name() + w.name)
	release := hold(t, adminDB(t), key)
	var opts []advisory.Option
	if w.beats {
		opts = append(opts, advisory.Heartbeat(shortHeartbeat))
	}
	go func() {
		waitForWaiters(t, adminDB(t), key, 1)
		release()
	}()
	err := w.with(soon(t), db, key, func(ctx context.Context, _ querier) error {
		if w.beats {
			waitFor(t, "a heartbeat", func() (bool, error) {
				return isTrue(adminDB(t), `SELECT EXISTS (SELECT FROM pg_locks JOIN pg_stat_activity USING (pid)
					WHERE locktype = 'advisory' AND granted AND (classid::bigint << 32 | objid::bigint)::text = $1
					AND query LIKE '/* advisory: %current_setting(''advisory.session''%')`, key.SQL())
			})
		}
		return ctx.Err()
	}, opts...)
	if err != nil {
		t.Errorf("%s: %v", w.name, err)
	}
}

// wantOnlyTries fails the test if the trace has a wait or a heartbeat, or no try.
func wantOnlyTries(t *testing.T, w way, statements []string) {
	t.Helper()
	tries := 0
	for _, s := range statements {
		if strings.Contains(s, "/* advisory") || strings.Contains(s, "advisory.session', ") {
			t.Errorf("%s: the trace has %s", w.name, s)
		}
		if strings.Contains(s, "pg_try_advisory_") {
			tries++
		}
	}
	if tries == 0 {
		t.Errorf("%s: the trace has no try: %q", w.name, statements)
	}
}
