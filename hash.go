package advisory

import (
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"math"
	"slices"
	"strconv"
	"unicode"
)

// A Key names a lock. PostgreSQL has two key spaces that never collide: one
// bigint ([ID], [Name]) and two ints ([Pair]). Locks of one key exclude each
// other within one database of one server (PostgreSQL manual, section
// "Advisory Locks").
//
// Keys are comparable. The zero Key is invalid: every function refuses it
// rather than lock 0.
type Key struct {
	space keySpace
	id    int64  // the bigint, or class in the upper and object in the lower half
	name  string // what Name was given
}

type keySpace uint8

const (
	noSpace     keySpace = iota // the zero Key
	bigintSpace                 // pg_advisory_lock(bigint)
	pairSpace                   // pg_advisory_lock(int, int)
)

// ID is the key id of the bigint key space: pg_advisory_lock(id).
func ID(id int64) Key {
	return Key{space: bigintSpace, id: id}
}

// Pair is a key of the (int, int) key space: pg_advisory_lock(class, object).
// It never collides with an [ID] or a [Name].
func Pair(class, object int32) Key {
	return Key{space: pairSpace, id: int64(class)<<32 | int64(uint32(object))}
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
	return Key{space: bigintSpace, id: int64(binary.BigEndian.Uint64(sum[:])), name: name}
}

// String describes the key for people: the name, if it has one, and what stands
// in the server's pg_locks. It is not meant to be parsed.
func (k Key) String() string {
	switch {
	case k.space == noSpace:
		return "invalid key"
	case k.space == pairSpace:
		class, object := k.pair()
		return fmt.Sprintf("pair (%d, %d)", class, object)
	case k.name != "":
		return fmt.Sprintf("%s (bigint %d)", printable(k.name), k.id)
	default:
		return "bigint " + strconv.FormatInt(k.id, 10)
	}
}

// SQL is the key as the argument list of PostgreSQL's own advisory lock
// functions, "8675309" or "7, 42": safe to put into a statement, because it is
// made of integers alone. It is "" for an invalid Key.
func (k Key) SQL() string {
	var buf [48]byte
	return string(k.appendSQL(buf[:0]))
}

func (k Key) appendSQL(b []byte) []byte {
	switch k.space {
	case bigintSpace:
		// Where a cast follows, PostgreSQL reads a literal's digits before its sign, and
		// those of the smallest integer overflow.
		if k.id == math.MinInt64 {
			return append(b, "-9223372036854775807-1"...)
		}
		return strconv.AppendInt(b, k.id, 10)
	case pairSpace:
		class, object := k.pair()
		return appendInt4(append(appendInt4(b, class), ", "...), object)
	default:
		return b
	}
}

func appendInt4(b []byte, i int32) []byte {
	if i == math.MinInt32 { // as above
		return append(b, "-2147483647-1"...)
	}
	return strconv.AppendInt(b, int64(i), 10)
}

func (k Key) pair() (class, object int32) {
	return int32(k.id >> 32), int32(k.id)
}

// A lockID is what the server tells locks apart by: a Key without its name.
type lockID struct {
	space keySpace
	id    int64
}

func (k Key) lockID() lockID { return lockID{k.space, k.id} }

// compareKeys orders keys as every process orders them, whatever they are named.
func compareKeys(a, b Key) int {
	switch {
	case a.space != b.space:
		return int(a.space) - int(b.space)
	case a.id < b.id:
		return -1
	case a.id > b.id:
		return 1
	default:
		return 0
	}
}

// printable is name as it stands, unless it has something in it that would break
// a line of a log.
func printable(name string) string {
	for _, r := range name {
		if r == unicode.ReplacementChar || !unicode.IsPrint(r) {
			return strconv.Quote(name)
		}
	}
	return name
}

func sorted(keys []Key) []Key {
	slices.SortFunc(keys, compareKeys)
	return keys
}
