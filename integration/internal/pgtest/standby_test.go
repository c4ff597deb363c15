//go:build unix

package pgtest

import (
	"context"
	"errors"
	"os"
	"testing"

	"github.com/jackc/pgx/v5"
)

func TestStandby(t *testing.T) {
	s := start(t, Setting("max_connections", "250"))
	ctx := t.Context()
	query(t, "pgx", s.DSN(), "with x as (select 1) select count(*) from x")
	standby, err := s.Standby(ctx, Setting("application_name", "the standby"))
	if err != nil {
		t.Fatal(err)
	}
	wantQuery(t, standby.DSN(), "select pg_is_in_recovery()", "true")
	wantQuery(t, standby.DSN(), "show max_connections", "250")
	wantQuery(t, standby.DSN(), "show application_name", "the standby")

	conn, err := pgx.Connect(ctx, s.DSN())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(context.Background())
	if _, err := conn.Exec(ctx, "create table t as select 7 as n"); err != nil {
		t.Fatal(err)
	}
	replica, err := pgx.Connect(ctx, standby.DSN())
	if err != nil {
		t.Fatal(err)
	}
	defer replica.Close(context.Background())
	if err := poll(ctx, func() error { return mustBeTrue(ctx, replica, "select to_regclass('t') is not null") }); err != nil {
		t.Fatal(err)
	}
	if err := standby.Restart(ctx, "fast"); err != nil {
		t.Fatal(err)
	}

	if err := s.Kill(); err != nil {
		t.Fatal(err)
	}
	if err := standby.Promote(ctx); err != nil {
		t.Fatal(err)
	}
	wantQuery(t, standby.DSN(), "with new as (select n from t) select n from new", "7")
	query(t, "pgx", standby.DSN(), "select pg_current_xact_id()")

	dir := standby.box.dir
	if err := s.Stop(); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Lstat(dir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("standby: %v", err)
	}
}
