package pgsql_test

import (
	"math"
	"testing"

	"github.com/pgadvisory/advisory/internal/pgsql"
)

func TestBatch(t *testing.T) {
	t.Parallel()
	const (
		class  = "(key OPERATOR(pg_catalog.>>) 32)::pg_catalog.int4"
		object = "((key OPERATOR(pg_catalog.<<) 32) OPERATOR(pg_catalog.>>) 32)::pg_catalog.int4"
	)
	want := "SELECT pg_catalog.array_to_string(ARRAY(SELECT CASE" +
		" WHEN op OPERATOR(pg_catalog.%) 16 OPERATOR(pg_catalog.=) 1 AND pg_catalog.pg_is_in_recovery() THEN 0" +
		" WHEN op OPERATOR(pg_catalog.=) 1 THEN pg_catalog.pg_try_advisory_lock(key)::pg_catalog.int4" +
		" WHEN op OPERATOR(pg_catalog.=) 2 THEN pg_catalog.pg_advisory_unlock(key)::pg_catalog.int4" +
		" WHEN op OPERATOR(pg_catalog.=) 17 THEN pg_catalog.pg_try_advisory_lock_shared(key)::pg_catalog.int4" +
		" WHEN op OPERATOR(pg_catalog.=) 18 THEN pg_catalog.pg_advisory_unlock_shared(key)::pg_catalog.int4" +
		" WHEN op OPERATOR(pg_catalog.=) 33 THEN pg_catalog.pg_try_advisory_lock(" + class + ", " + object + ")::pg_catalog.int4" +
		" WHEN op OPERATOR(pg_catalog.=) 34 THEN pg_catalog.pg_advisory_unlock(" + class + ", " + object + ")::pg_catalog.int4" +
		" WHEN op OPERATOR(pg_catalog.=) 49 THEN pg_catalog.pg_try_advisory_lock_shared(" + class + ", " + object + ")::pg_catalog.int4" +
		" WHEN op OPERATOR(pg_catalog.=) 50 THEN pg_catalog.pg_advisory_unlock_shared(" + class + ", " + object + ")::pg_catalog.int4" +
		" ELSE 0 END FROM ROWS FROM (pg_catalog.unnest($1::pg_catalog.text::pg_catalog.int4[])," +
		" pg_catalog.unnest($2::pg_catalog.text::pg_catalog.int8[])) AS asked (op, key)), '')"
	if pgsql.Batch != want {
		t.Errorf("%s\nwant %s", pgsql.Batch, want)
	}
}

func TestTheArgumentsOfABatch(t *testing.T) {
	t.Parallel()
	var a pgsql.BatchArgs
	a.Add(pgsql.OpTry, []pgsql.Key{id(42), pair(1, 2)}, false)
	a.Add(pgsql.OpUnlock, []pgsql.Key{pair(-1, -2), named("a", math.MinInt64)}, true)
	a.Add(pgsql.OpTry, nil, false)
	a.Add(pgsql.OpUnlock, []pgsql.Key{id(0)}, false)
	a.Add(pgsql.OpTry, []pgsql.Key{id(-5), pair(0, math.MinInt32)}, true)
	a.Add(pgsql.OpUnlock, []pgsql.Key{pair(0, 0)}, false)
	ops, keys := a.Args()
	if want := "{1,33,50,18,2,17,49,34}"; ops != want {
		t.Errorf("ops %s, want %s", ops, want)
	}
	if want := "{42,4294967298,-2,-9223372036854775808,0,-5,2147483648,0}"; keys != want {
		t.Errorf("keys %s, want %s", keys, want)
	}
}
