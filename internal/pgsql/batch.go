package pgsql

import "strconv"

// An Op is what a Batch does to a key.
type Op uint8

const (
	OpTry    Op = 1
	OpUnlock Op = 2
)

// Batch does for each of two arrays' elements, in order, what the first asks for (the Op, with 16
// for a shared lock and 32 for a Pair) to the key in the second. Its answer is a string of ones and
// zeros. The arrays are text, which every driver can send.
const Batch = "SELECT pg_catalog.array_to_string(ARRAY(SELECT CASE" +
	" WHEN op OPERATOR(pg_catalog.%) 16 OPERATOR(pg_catalog.=) 1 AND pg_catalog.pg_is_in_recovery() THEN 0" +
	" WHEN op OPERATOR(pg_catalog.=) 1 THEN pg_catalog.pg_try_advisory_lock(key)::pg_catalog.int4" +
	" WHEN op OPERATOR(pg_catalog.=) 2 THEN pg_catalog.pg_advisory_unlock(key)::pg_catalog.int4" +
	" WHEN op OPERATOR(pg_catalog.=) 17 THEN pg_catalog.pg_try_advisory_lock_shared(key)::pg_catalog.int4" +
	" WHEN op OPERATOR(pg_catalog.=) 18 THEN pg_catalog.pg_advisory_unlock_shared(key)::pg_catalog.int4" +
	" WHEN op OPERATOR(pg_catalog.=) 33 THEN pg_catalog.pg_try_advisory_lock(" + batchPair + ")::pg_catalog.int4" +
	" WHEN op OPERATOR(pg_catalog.=) 34 THEN pg_catalog.pg_advisory_unlock(" + batchPair + ")::pg_catalog.int4" +
	" WHEN op OPERATOR(pg_catalog.=) 49 THEN pg_catalog.pg_try_advisory_lock_shared(" + batchPair + ")::pg_catalog.int4" +
	" WHEN op OPERATOR(pg_catalog.=) 50 THEN pg_catalog.pg_advisory_unlock_shared(" + batchPair + ")::pg_catalog.int4" +
	" ELSE 0 END FROM ROWS FROM (pg_catalog.unnest($1::pg_catalog.text::pg_catalog.int4[])," +
	" pg_catalog.unnest($2::pg_catalog.text::pg_catalog.int8[])) AS asked (op, key)), '')"

const batchPair = "(key OPERATOR(pg_catalog.>>) 32)::pg_catalog.int4," +
	" ((key OPERATOR(pg_catalog.<<) 32) OPERATOR(pg_catalog.>>) 32)::pg_catalog.int4"

// BatchArgs are the arguments of a Batch in the making.
type BatchArgs struct{ ops, keys []byte }

// Add adds an element for each of keys.
func (a *BatchArgs) Add(op Op, keys []Key, shared bool) {
	code := int64(op)
	if shared {
		code += 16
	}
	for _, k := range keys {
		code := code
		if k.Space == Pair {
			code += 32
		}
		a.ops = strconv.AppendInt(append(a.ops, ','), code, 10)
		a.keys = strconv.AppendInt(append(a.keys, ','), k.ID, 10)
	}
}

// Args returns the two arrays, of one element at least.
func (a *BatchArgs) Args() (ops, keys string) {
	return "{" + string(a.ops[1:]) + "}", "{" + string(a.keys[1:]) + "}"
}
