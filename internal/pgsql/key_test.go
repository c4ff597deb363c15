package pgsql_test

import (
	"fmt"
	"math"
	"slices"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/google/go-cmp/cmp"

	"github.com/pgadvisory/advisory/internal/pgsql"
)

func id(id int64) pgsql.Key { return pgsql.Key{Space: pgsql.Bigint, ID: id} }

func pair(class, object int32) pgsql.Key {
	return pgsql.Key{Space: pgsql.Pair, ID: int64(class)<<32 | int64(uint32(object))}
}

func named(name string, id int64) pgsql.Key {
	return pgsql.Key{Space: pgsql.Bigint, ID: id, Name: name}
}

// ids returns n keys, of the numbers from 100 on.
func ids(n int) []pgsql.Key {
	keys := make([]pgsql.Key, n)
	for i := range keys {
		keys[i] = id(int64(100 + i))
	}
	return keys
}

func TestKeyAsTextAndAsSQL(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		key          pgsql.Key
		text, server string
	}{
		{id(8675309), "bigint 8675309", "8675309"},
		{id(0), "bigint 0", "0"},
		{id(-1), "bigint -1", "-1"},
		{id(math.MaxInt64), "bigint 9223372036854775807", "9223372036854775807"},
		// PostgreSQL reads -9223372036854775808 as a numeric, negated.
		{id(math.MinInt64), "bigint -9223372036854775808", "-9223372036854775807-1"},
		{id(math.MinInt64 + 1), "bigint -9223372036854775807", "-9223372036854775807"},
		{pair(7, 42), "pair (7, 42)", "7, 42"},
		{pair(0, 0), "pair (0, 0)", "0, 0"},
		{pair(-1, -2), "pair (-1, -2)", "-1, -2"},
		{pair(math.MaxInt32, math.MinInt32), "pair (2147483647, -2147483648)", "2147483647, -2147483647-1"},
		{pair(math.MinInt32, math.MaxInt32), "pair (-2147483648, 2147483647)", "-2147483647-1, 2147483647"},
		{named("a", -3848465438864589366), "a (bigint -3848465438864589366)", "-3848465438864589366"},
		{named("two words", -5), "two words (bigint -5)", "-5"},
		{named("größe", 5), "größe (bigint 5)", "5"},
		{named("a\nb", 5), `"a\nb" (bigint 5)`, "5"},
		{named("\xff", 5), `"\xff" (bigint 5)`, "5"},
		{named("\ufffd", 5), `"�" (bigint 5)`, "5"},
		{pgsql.Key{}, "invalid key", ""},
	} {
		if got := test.key.String(); got != test.text {
			t.Errorf("String() = %q, want %q", got, test.text)
		}
		if got := test.key.SQL(); got != test.server {
			t.Errorf("SQL() of %v = %q, want %q", test.key, got, test.server)
		}
	}
}

// The names of two keys say nothing about what the server sees.
func TestANameAndItsIDAreOneLock(t *testing.T) {
	t.Parallel()
	a, b := named("a", 5), id(5)
	if a == b || a.Unnamed() != b.Unnamed() || a.Unnamed() != b {
		t.Errorf("%+v and %+v", a.Unnamed(), b.Unnamed())
	}
	if pgsql.Compare(a, b) != 0 || a.SQL() != b.SQL() {
		t.Errorf("%v and %v are two", a, b)
	}
}

func TestTheOrderOfKeys(t *testing.T) {
	t.Parallel()
	want := []pgsql.Key{
		{}, id(math.MinInt64), id(-1), id(0), named("z", 1), named("a", 2), id(1 << 32), id(math.MaxInt64),
		pair(math.MinInt32, 5), pair(-1, 0), pair(-1, 1), pair(-1, -1), pair(0, 0), pair(0, 1), pair(0, -1), pair(1, 0),
	}
	for i, a := range want {
		for j, b := range want {
			if got, want := pgsql.Compare(a, b), min(1, max(-1, i-j)); got != want {
				t.Errorf("Compare(%v, %v) = %d, want %d", a, b, got, want)
			}
		}
	}
	got := slices.Clone(want)
	slices.Reverse(got)
	slices.SortFunc(got, pgsql.Compare)
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

func TestKeyInTheColumnsOfPgLocks(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		key            pgsql.Key
		classid, objid uint32
		objsubid       int
	}{
		{id(42), 0, 42, 1},
		{id(-1), math.MaxUint32, math.MaxUint32, 1},
		{id(1<<32 + 2), 1, 2, 1},
		{id(math.MinInt64), 1 << 31, 0, 1},
		{pair(-7, 42), 4294967289, 42, 2},
		{pair(0, -1), 0, math.MaxUint32, 2},
	} {
		classid, objid, objsubid := test.key.Columns()
		if classid != test.classid || objid != test.objid || objsubid != test.objsubid {
			t.Errorf("%v: %d, %d, %d, want %d, %d, %d", test.key, classid, objid, objsubid, test.classid, test.objid, test.objsubid)
		}
		if k := pgsql.KeyOf(int64(classid), int64(objid), objsubid); k != test.key {
			t.Errorf("%v comes back as %v", test.key, k)
		}
	}
	if class, object := pair(-7, math.MinInt32).Pair(); class != -7 || object != math.MinInt32 {
		t.Errorf("%d, %d", class, object)
	}
}

func TestAMessageHasTheNameFirstAndTheNumberLast(t *testing.T) {
	t.Parallel()
	a, b := named("a", 1), named("b", 2)
	for _, test := range []struct {
		keys           []pgsql.Key
		names, numbers string
	}{
		{nil, "", ""},
		{[]pgsql.Key{a}, "a", " [bigint 1]"},
		{[]pgsql.Key{named("a\nb", 3)}, `"a\nb"`, " [bigint 3]"},
		{[]pgsql.Key{id(7)}, "bigint 7", ""},
		{[]pgsql.Key{pair(7, 42), id(8)}, "pair (7, 42), bigint 8", ""},
		{[]pgsql.Key{a, id(7)}, "a, bigint 7", " [bigint 1, bigint 7]"},
		{[]pgsql.Key{a, b, a, b, a}, "a, b, a and 2 more keys", " [bigint 1, bigint 2, bigint 1 and 2 more keys]"},
		{[]pgsql.Key{{}}, "invalid key", ""},
	} {
		if names, numbers := pgsql.Names(test.keys), pgsql.Numbers(test.keys); names != test.names || numbers != test.numbers {
			t.Errorf("%v: %q and %q, want %q and %q", test.keys, names, numbers, test.names, test.numbers)
		}
	}
}

// The numbers are those of a server.
func TestHashText(t *testing.T) {
	t.Parallel()
	for s, want := range map[string]int32{
		"a":                         1075015857,
		"ab":                        1718550461,
		"abc":                       -785388649,
		"abcd":                      -393934804,
		"abcde":                     -445659580,
		"nightly":                   2091003772,
		"nightly-rep":               1320977367,
		"nightly-repo":              1292013160,
		"nightly-report":            759228614,
		"отчёт":                     45267027,
		"the quick brown fox jumps": 84238858,
	} {
		if got := pgsql.HashText(s); got != want {
			t.Errorf("HashText(%q) = %d, want %d", s, got, want)
		}
	}
}

func TestAListOfManyKeysStaysShort(t *testing.T) {
	t.Parallel()
	for n, want := range map[int]string{
		0:  "",
		1:  "bigint 100",
		2:  "bigint 100, bigint 101",
		4:  "bigint 100, bigint 101, bigint 102, bigint 103",
		5:  "bigint 100, bigint 101, bigint 102 and 2 more keys",
		16: "bigint 100, bigint 101, bigint 102 and 13 more keys",
	} {
		if got := pgsql.List(ids(n)); got != want {
			t.Errorf("%d keys: %q, want %q", n, got, want)
		}
	}
	if got, want := pgsql.List([]pgsql.Key{named("a b", 1), pair(2, 3)}), "a b (bigint 1), pair (2, 3)"; got != want {
		t.Errorf("%q, want %q", got, want)
	}
	for n, want := range map[int]string{0: "0 keys", 1: "1 key", 2: "2 keys"} {
		if got := pgsql.Plural(n, "key"); got != want {
			t.Errorf("%q, want %q", got, want)
		}
	}
}

// comment returns the comment that a statement about keys begins with.
func comment(keys []pgsql.Key) string {
	return strings.TrimSuffix(pgsql.Heartbeat(keys, "", "N"), pgsql.Marked("N"))
}

func TestTheCommentNamesTheKeys(t *testing.T) {
	t.Parallel()
	long := strings.Repeat("x", 70)
	one := func(name string) []pgsql.Key { return []pgsql.Key{named(name, 5)} }
	for _, test := range []struct {
		keys []pgsql.Key
		want string
	}{
		{one("nightly-report"), "nightly-report"},
		{one("AZaz09-._~"), "AZaz09-._~"},
		{one("a b%c"), "a%20b%25c"},
		{one("*/ DROP TABLE t; /*"), "%2A%2F%20DROP%20TABLE%20t%3B%20%2F%2A"},
		{one("$1 ? :x \x00\n'\"\\"), "%241%20%3F%20%3Ax%20%00%0A%27%22%5C"},
		{one("größe"), "gr%C3%B6%C3%9Fe"},
		{one("@[`{/:"), "%40%5B%60%7B%2F%3A"}, // they stand beside the letters and the digits
		{one(long), long[:64]},
		{one(long[:64]), long[:64]},
		{one(long[:62] + "%"), long[:62]}, // no half of what is encoded
		{one(long[:61] + "%"), long[:61] + "%25"},
		{one(long[:63] + "%y"), long[:63]}, // nor what comes after it
		{one(strings.Repeat("%", 30)), strings.Repeat("%25", 21)},
		{[]pgsql.Key{id(8675309)}, "8675309"},
		{[]pgsql.Key{id(math.MinInt64)}, "-9223372036854775808"},
		{[]pgsql.Key{pair(-7, 42)}, "-7.42"},
		{[]pgsql.Key{pair(-7, 42), named("a", 5), id(6)}, "-7.42, a, 6"},
		{ids(2), "100, 101"},
		{ids(4), "100, 101, 102, 103"},
		{ids(5), "100, 101, 102, 103, +1"},
		{ids(16), "100, 101, 102, 103, +12"},
	} {
		got := comment(test.keys)
		if want := "/* advisory: " + test.want + " */ "; got != want {
			t.Errorf("comment of %s: %q, want %q", pgsql.List(test.keys), got, want)
		}
	}
}

func TestTheNamesInAComment(t *testing.T) {
	t.Parallel()
	long := strings.Repeat("x", 63) + "%yz"
	for _, test := range []struct {
		statement string
		want      []string
	}{
		{comment([]pgsql.Key{named("nightly-report", 5)}) + "SELECT", []string{"nightly-report"}},
		{comment([]pgsql.Key{named("a, b | c */ +%20", 5), named("größe", 6), pair(-7, 42), id(8)}), []string{"a, b | c */ +%20", "größe", "-7.42", "8"}},
		{comment(ids(5)), []string{"100", "101", "102", "103", "+1"}},
		{comment([]pgsql.Key{named(long, 5)}), []string{long[:63]}},
		{"/* advisory: b%20c | 1x 1700000000000 5 6 7 < 2y 1700000000001 8 9 */ SELECT", []string{"b c"}}, // a waiter that holds locks
		{"/* advisory: whole, cut", []string{"whole"}},
		{"/* advisory: %zz, fine */", []string{"fine"}},
		{"/* advisory: ", nil},
		{"/* advisory:", nil},
		{"SELECT '/* advisory: no */'", nil},
		{"", nil},
	} {
		if diff := cmp.Diff(test.want, pgsql.NamesIn(test.statement)); diff != "" {
			t.Errorf("%q (-want +got):\n%s", test.statement, diff)
		}
	}
}

// The edges are whole, or there are none. With the longest of names, the server shows all of the comment.
func TestTheEdgesInAComment(t *testing.T) {
	t.Parallel()
	for statement, want := range map[string]string{
		pgsql.Comment([]pgsql.Key{named("a | b */", 5)}, "1 < 2") + "SELECT": "1 < 2",
		pgsql.Comment(ids(9), "1") + "SELECT":                                "1",
		pgsql.Comment(ids(1), "") + "SELECT":                                 "",
		"/* advisory: a | 1":                                                 "",
		"/* advisory: a | 1 *":                                               "",
		" /* advisory: a | 1 */ SELECT":                                      "",
		"/* other: a | 1 */ SELECT":                                          "",
		"SELECT '/* advisory: a | 1 */'":                                     "",
		"":                                                                   "",
	} {
		if got := pgsql.EdgesIn(statement); got != want {
			t.Errorf("%q: %q, want %q", statement, got, want)
		}
	}
	const edges, shown = 930, 1023 // of waitgraph.Text; of the server
	if c := pgsql.Comment([]pgsql.Key{named(strings.Repeat("x", 1000), 5)}, strings.Repeat("1", edges)); len(c) > shown {
		t.Errorf("%d bytes", len(c))
	}
}

func FuzzName(f *testing.F) {
	for _, name := range []string{"a", "nightly-report", "\x00", "ключ", "*/", strings.Repeat("x", 1000), strings.Repeat("\xff", 100)} {
		f.Add(name)
	}
	f.Fuzz(func(t *testing.T, name string) {
		if name == "" {
			return
		}
		k := named(name, 5)
		checkSQL(t, k)
		if s := k.String(); strings.ContainsAny(s, "\n\r\x00\x1b") || !utf8.ValidString(s) {
			t.Fatalf("%q breaks the line of a log", s)
		}
		text, begins := strings.CutPrefix(comment([]pgsql.Key{k}), "/* advisory: ")
		text, ends := strings.CutSuffix(text, " */ ")
		if !begins || !ends || len(text) > 64 || len(text) < min(len(name), 62) {
			t.Fatalf("the comment of %q: %q", name, text)
		}
		if strings.Trim(text, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-._~%") != "" {
			t.Fatalf("the comment of %q has %q in it", name, text)
		}
		if names := pgsql.NamesIn(comment([]pgsql.Key{k})); len(names) != 1 || !strings.HasPrefix(name, names[0]) || len(text) < 62 && names[0] != name {
			t.Fatalf("the comment of %q tells %q", name, names)
		}
	})
}

func FuzzKeySQL(f *testing.F) {
	for _, n := range []int64{0, 1, -1, 1 << 32, math.MinInt64, math.MaxInt64, math.MinInt32, math.MaxInt32} {
		f.Add(n)
	}
	f.Fuzz(func(t *testing.T, n int64) {
		class, object := int32(n>>32), int32(n)
		i, p := id(n), pair(class, object)
		checkSQL(t, i)
		checkSQL(t, p)
		if i == p || pgsql.Compare(i, p) == 0 {
			t.Fatalf("%v is %v", i, p)
		}
		if c, o := p.Pair(); c != class || o != object {
			t.Fatalf("%v has %d and %d", p, c, o)
		}
		if got, want := p.String(), fmt.Sprintf("pair (%d, %d)", class, object); got != want {
			t.Fatalf("String() = %q, want %q", got, want)
		}
		if n != math.MinInt64 && i.SQL() != fmt.Sprint(n) {
			t.Fatalf("SQL() = %q, want %d", i.SQL(), n)
		}
		if class != math.MinInt32 && object != math.MinInt32 && p.SQL() != fmt.Sprintf("%d, %d", class, object) {
			t.Fatalf("SQL() = %q, want %d, %d", p.SQL(), class, object)
		}
	})
}

// checkSQL checks that nothing but integers can come into a statement with k.
func checkSQL(t *testing.T, k pgsql.Key) {
	t.Helper()
	if strings.Trim(k.SQL(), "0123456789-, ") != "" || k.SQL() == "" {
		t.Fatalf("SQL() of %v = %q", k, k.SQL())
	}
}
