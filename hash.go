package advisory

import (
	"crypto/sha256"
	"encoding/binary"

	"github.com/pgadvisory/advisory/internal/pgsql"
)

// A Key names a lock. PostgreSQL has two key spaces that never collide: one bigint ([ID],
// [Name], [HashText]) and two ints ([Pair]). Locks of one key exclude each other within one
// database of one server (PostgreSQL manual, section "Advisory Locks").
//
// Keys are comparable, but a [Name] is another Key than the [ID] of the same number, though the
// two are one lock: SQL is the same for both. The zero Key is invalid: every function refuses it
// rather than lock 0.
type Key struct{ key pgsql.Key }

// ID is the key id of the bigint key space: pg_advisory_lock(id).
func ID(id int64) Key { return Key{pgsql.Key{Space: pgsql.Bigint, ID: id}} }

// Pair is a key of the (int, int) key space: pg_advisory_lock(class, object).
// It never collides with an [ID], a [Name] or a [HashText].
func Pair(class, object int32) Key {
	return Key{pgsql.Key{Space: pgsql.Pair, ID: int64(class)<<32 | int64(uint32(object))}}
}

// Name is the key of the bigint key space that is derived from name: the first
// 8 bytes, big-endian, of its SHA-256. The same name gives the same key in every
// process and every version of this package, and the Key remembers the name for
// messages. Name("") is invalid, like the zero Key.
//
// In psql, the same key is
//
//	SELECT ('x' || left(encode(sha256(convert_to('nightly-report', 'UTF8')), 'hex'), 16))::bit(64)::bigint;
//
// Two names share a key with a chance of 1 in 2^64: among a million names, one
// in 37 million.
func Name(name string) Key {
	if name == "" {
		return Key{}
	}
	sum := sha256.Sum256([]byte(name))
	return Key{pgsql.Key{Space: pgsql.Bigint, ID: int64(binary.BigEndian.Uint64(sum[:])), Name: name}}
}

// HashText is the key that other programs lock with
//
//	SELECT pg_advisory_lock(hashtext('nightly-report'));
//
// It is for work beside such programs. Everywhere else, [Name] is better. PostgreSQL does not
// document hashtext, nor promise that it stays as it is; it has been the same from version 14
// to 18. And it has 32 bits: among a thousand names, two share a key with a chance of 1 in
// 8,600.
//
// HashText is computed here, for the bytes of name in UTF-8, as a little-endian server does. A
// database with another encoding has the same key for ASCII names only. On a big-endian server
// (s390x), all keys differ: ask the server there, and use [ID].
//
// HashText("") is invalid, like the zero Key.
func HashText(name string) Key {
	if name == "" {
		return Key{}
	}
	return Key{pgsql.Key{Space: pgsql.Bigint, ID: int64(pgsql.HashText(name)), Name: name}}
}

// String describes the key for people: the name, if it has one, and what stands
// in the server's pg_locks. It is not meant to be parsed.
func (k Key) String() string { return k.key.String() }

// SQL is the key as the argument list of PostgreSQL's own advisory lock
// functions, "8675309" or "7, 42": safe to put into a statement, because it is
// made of integers alone. It is "" for an invalid Key.
func (k Key) SQL() string { return k.key.SQL() }

// bare returns keys as the floors below know them.
func bare(keys []Key) []pgsql.Key {
	b := make([]pgsql.Key, len(keys))
	for i, k := range keys {
		b[i] = k.key
	}
	return b
}

func keyList(keys []Key) string { return pgsql.List(bare(keys)) }
