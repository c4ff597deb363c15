package pgsql

import (
	"cmp"
	"fmt"
	"math"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"unicode"
)

// A Key is the argument of PostgreSQL's advisory lock functions. Name says where it comes from,
// for messages and comments; the server does not know it.
type Key struct {
	Space Space
	ID    int64 // the bigint, or the class in the upper and the object in the lower half
	Name  string
}

// A Space is one of PostgreSQL's two key spaces, which never collide.
type Space uint8

const (
	NoSpace Space = iota // the zero Key, which is invalid
	Bigint               // pg_advisory_lock(bigint)
	Pair                 // pg_advisory_lock(int, int)
)

// Unnamed is k without its name: what the server tells locks apart by.
func (k Key) Unnamed() Key {
	k.Name = ""
	return k
}

// Compare orders keys as every process orders them, whatever they are named.
func Compare(a, b Key) int {
	return cmp.Or(cmp.Compare(a.Space, b.Space), cmp.Compare(a.ID, b.ID))
}

// Pair returns the two ints of a key of the (int, int) space.
func (k Key) Pair() (class, object int32) { return int32(k.ID >> 32), int32(k.ID) }

// String describes k for people.
func (k Key) String() string {
	switch {
	case k.Space == NoSpace:
		return "invalid key"
	case k.Space == Pair:
		class, object := k.Pair()
		return fmt.Sprintf("pair (%d, %d)", class, object)
	case k.Name != "":
		return fmt.Sprintf("%s (bigint %d)", printable(k.Name), k.ID)
	default:
		return "bigint " + strconv.FormatInt(k.ID, 10)
	}
}

// printable returns name as it stands, or quoted if it would break a line of a log.
func printable(name string) string {
	for _, r := range name {
		if r == unicode.ReplacementChar || !unicode.IsPrint(r) {
			return strconv.Quote(name)
		}
	}
	return name
}

// List describes keys for people: all of them, or the first three and how many more.
func List(keys []Key) string { return list(keys, Key.String) }

// Names is List for the beginning of a message: a key that has a name is its name alone.
func Names(keys []Key) string {
	return list(keys, func(k Key) string {
		if k.Name != "" {
			return printable(k.Name)
		}
		return k.String()
	})
}

// Numbers ends a message that Names begins, with the numbers of the keys. It is "" if none has a name.
func Numbers(keys []Key) string {
	if !slices.ContainsFunc(keys, func(k Key) bool { return k.Name != "" }) {
		return ""
	}
	return " [" + list(keys, func(k Key) string { return k.Unnamed().String() }) + "]"
}

func list(keys []Key, describe func(Key) string) string {
	var b strings.Builder
	for i, k := range keys {
		if i == 3 && len(keys) > 4 {
			b.WriteString(" and " + Plural(len(keys)-i, "more key"))
			break
		}
		if i > 0 {
			b.WriteString(", ")
		}
		b.WriteString(describe(k))
	}
	return b.String()
}

// Plural returns n and what, with an s unless n is 1.
func Plural(n int, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return fmt.Sprintf("%d %ss", n, what)
}

// SQL returns the argument list of the lock functions, or "" for an invalid Key. Where a cast follows,
// PostgreSQL reads a literal's digits before its sign, and the digits of the smallest integer overflow: that
// one is a difference.
func (k Key) SQL() string {
	switch class, object := k.Pair(); {
	case k.Space == Pair:
		return int4(class) + ", " + int4(object)
	case k.Space == Bigint && k.ID == math.MinInt64:
		return "-9223372036854775807-1"
	default:
		return string(k.appendLiteral(nil))
	}
}

func int4(i int32) string {
	if i == math.MinInt32 {
		return "-2147483647-1"
	}
	return strconv.Itoa(int(i))
}

// appendLiteral appends what SQL returns, but without an operator, which could not be qualified. No cast may
// follow.
func (k Key) appendLiteral(b []byte) []byte {
	switch k.Space {
	case Bigint:
		return strconv.AppendInt(b, k.ID, 10)
	case Pair:
		class, object := k.Pair()
		return strconv.AppendInt(append(strconv.AppendInt(b, int64(class), 10), ", "...), int64(object), 10)
	default:
		return b
	}
}

// Columns returns the key as pg_locks spreads it over its columns (PostgreSQL manual, section
// "pg_locks").
func (k Key) Columns() (classid, objid uint32, objsubid int) {
	if k.Space == Pair {
		return uint32(uint64(k.ID) >> 32), uint32(k.ID), 2
	}
	return uint32(uint64(k.ID) >> 32), uint32(k.ID), 1
}

// KeyOf returns the key of a row of pg_locks: the opposite of Columns.
func KeyOf(classid, objid int64, objsubid int) Key {
	k := Key{Space: Bigint, ID: classid<<32 | objid}
	if objsubid == 2 {
		k.Space = Pair
	}
	return k
}

// Text returns k's number, or its two with a dot between.
func (k Key) Text() string { return k.Unnamed().Label() }

// Label returns k's name, percent-encoded and cut, or its number, or its two with a dot between.
func (k Key) Label() string {
	const longest = 64
	switch {
	case k.Name != "":
	case k.Space == Pair:
		class, object := k.Pair()
		return fmt.Sprintf("%d.%d", class, object)
	default:
		return strconv.FormatInt(k.ID, 10)
	}
	var b strings.Builder
	for i := range len(k.Name) {
		c := k.Name[i]
		s := string(rune(c))
		if !('a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || '0' <= c && c <= '9' || strings.IndexByte("-._~", c) >= 0) {
			s = fmt.Sprintf("%%%02X", c)
		}
		if b.Len()+len(s) > longest {
			break
		}
		b.WriteString(s)
	}
	return b.String()
}

// Comment begins a statement that waits, or a heartbeat: pg_stat_activity then says by name who
// waits, and who holds. edges, of waits, are for other processes.
func Comment(keys []Key, edges string) string {
	const most = 4
	var labels []string
	for _, k := range keys[:min(len(keys), most)] {
		labels = append(labels, k.Label())
	}
	if len(keys) > most {
		labels = append(labels, "+"+strconv.Itoa(len(keys)-most))
	}
	if edges != "" {
		edges = edgesBegin + edges
	}
	return commentBegins + strings.Join(labels, ", ") + edges + commentEnds + " "
}

const (
	commentBegins = "/* advisory: "
	edgesBegin    = " | "
	commentEnds   = " */"
)

// EdgesIn returns the edges in the Comment that a statement begins with. It returns "" if the server has cut
// the statement before the end of the comment.
func EdgesIn(statement string) string {
	rest, ours := strings.CutPrefix(statement, commentBegins)
	comment, _, whole := strings.Cut(rest, commentEnds)
	_, edges, _ := strings.Cut(comment, edgesBegin)
	if !ours || !whole {
		return ""
	}
	return edges
}

// NamesIn returns what may be names of keys in the Comment that a statement begins with: it may also be
// a number, or a part of a name.
func NamesIn(statement string) (names []string) {
	rest, more := strings.CutPrefix(statement, commentBegins)
	for more {
		end := strings.IndexAny(rest, ", ")
		if end < 0 {
			break // the server has cut the statement
		}
		if name, err := url.PathUnescape(rest[:end]); err == nil {
			names = append(names, name)
		}
		rest, more = strings.CutPrefix(rest[end:], ", ")
	}
	return names
}
