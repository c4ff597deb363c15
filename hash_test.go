package advisory

import (
	"fmt"
	"math"
	"strings"
	"testing"
)

// The numbers are those of sha256sum(1).
func TestNameIsTheFirstEightBytesOfSHA256(t *testing.T) {
	t.Parallel()
	for name, want := range map[string]string{
		"nightly-report": "7440995589958059143",  // 6743ba10a2b2c487
		"a":              "-3848465438864589366", // ca978112ca1bbdca
		"migrations":     "-3058229681751119483", // d58efc4ec1ab2985
		"ключ":           "2153681812738117024",  // 1de36a32af798da0
		"two words":      "-6899763801285596333", // a03f1d611645eb53
	} {
		if got := Name(name).SQL(); got != want {
			t.Errorf("Name(%q).SQL() = %s, want %s", name, got, want)
		}
	}
}

func TestKeyAsTextAndAsSQL(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		key          Key
		text, server string
	}{
		{ID(8675309), "bigint 8675309", "8675309"},
		{ID(0), "bigint 0", "0"},
		{ID(-1), "bigint -1", "-1"},
		{ID(math.MaxInt64), "bigint 9223372036854775807", "9223372036854775807"},
		// PostgreSQL reads -9223372036854775808 as a numeric, negated.
		{ID(math.MinInt64), "bigint -9223372036854775808", "-9223372036854775807-1"},
		{ID(math.MinInt64 + 1), "bigint -9223372036854775807", "-9223372036854775807"},
		{Pair(7, 42), "pair (7, 42)", "7, 42"},
		{Pair(0, 0), "pair (0, 0)", "0, 0"},
		{Pair(-1, -2), "pair (-1, -2)", "-1, -2"},
		{Pair(math.MaxInt32, math.MinInt32), "pair (2147483647, -2147483648)", "2147483647, -2147483647-1"},
		{Pair(math.MinInt32, math.MaxInt32), "pair (-2147483648, 2147483647)", "-2147483647-1, 2147483647"},
		{Name("a"), "a (bigint -3848465438864589366)", "-3848465438864589366"},
		{Name("two words"), "two words (bigint -6899763801285596333)", "-6899763801285596333"},
		{Name("a\nb"), `"a\nb" (bigint ` + Name("a\nb").SQL() + ")", Name("a\nb").SQL()},
		{Name("\xff"), `"\xff" (bigint ` + Name("\xff").SQL() + ")", Name("\xff").SQL()},
		{HashText("nightly-report"), "nightly-report (bigint 759228614)", "759228614"},
		{HashText("abc"), "abc (bigint -785388649)", "-785388649"}, // an int4 that is extended by its sign
		{HashText(""), "invalid key", ""},
		{Key{}, "invalid key", ""},
		{Name(""), "invalid key", ""},
	} {
		if got := test.key.String(); got != test.text {
			t.Errorf("String() = %q, want %q", got, test.text)
		}
		if got := test.key.SQL(); got != test.server {
			t.Errorf("SQL() of %v = %q, want %q", test.key, got, test.server)
		}
	}
}

func TestKeysAreComparable(t *testing.T) {
	t.Parallel()
	same := map[Key]bool{ID(1): true, Pair(1, 2): true, Name("a"): true}
	for _, k := range []Key{ID(1), Pair(1, 2), Name("a")} {
		if !same[k] {
			t.Errorf("%v is not equal to itself, made anew", k)
		}
	}
	for _, k := range []Key{ID(2), Pair(2, 1), Pair(0, 1), ID(1<<32 | 2), Name("b"), {}, Name("")} {
		if same[k] {
			t.Errorf("%v is equal to another key", k)
		}
	}
	if Name("") != (Key{}) {
		t.Error(`Name("") is not the zero Key`)
	}
}

// The names of two keys say nothing about what the server sees.
func TestANameAndItsIDAreOneLock(t *testing.T) {
	t.Parallel()
	if Name("a").key.Unnamed() != ID(-3848465438864589366).key.Unnamed() {
		t.Error("a lock of their own each")
	}
}

func FuzzName(f *testing.F) {
	for _, name := range []string{"", "a", "nightly-report", "\x00", "ключ", strings.Repeat("x", 1000)} {
		f.Add(name)
	}
	f.Fuzz(func(t *testing.T, name string) {
		k := Name(name)
		if k != Name(name) {
			t.Fatal("two keys of one name")
		}
		if (name == "") != (k == Key{}) {
			t.Fatalf("Name(%q) = %v", name, k)
		}
		checkSQL(t, k)
		if s := k.String(); strings.ContainsAny(s, "\n\r\x00\x1b") {
			t.Fatalf("%q breaks the line of a log", s)
		}
	})
}

func FuzzKeySQL(f *testing.F) {
	for _, id := range []int64{0, 1, -1, 1 << 32, math.MinInt64, math.MaxInt64, math.MinInt32, math.MaxInt32} {
		f.Add(id)
	}
	f.Fuzz(func(t *testing.T, n int64) {
		class, object := int32(n>>32), int32(n)
		id, pair := ID(n), Pair(class, object)
		checkSQL(t, id)
		checkSQL(t, pair)
		if id == pair || id.key.Unnamed() == pair.key.Unnamed() {
			t.Fatalf("%v is %v", id, pair)
		}
		if got, want := pair.String(), fmt.Sprintf("pair (%d, %d)", class, object); got != want {
			t.Fatalf("String() = %q, want %q", got, want)
		}
		if n != math.MinInt64 && id.SQL() != fmt.Sprint(n) {
			t.Fatalf("SQL() = %q, want %d", id.SQL(), n)
		}
		if class != math.MinInt32 && object != math.MinInt32 && pair.SQL() != fmt.Sprintf("%d, %d", class, object) {
			t.Fatalf("SQL() = %q, want %d, %d", pair.SQL(), class, object)
		}
	})
}

// checkSQL checks that nothing but integers can come into a statement with k.
func checkSQL(t *testing.T, k Key) {
	t.Helper()
	for _, c := range k.SQL() {
		if !strings.ContainsRune("0123456789-, ", c) {
			t.Fatalf("SQL() of %v = %q", k, k.SQL())
		}
	}
	if (k.SQL() == "") != (k == Key{}) {
		t.Fatalf("SQL() of %v = %q", k, k.SQL())
	}
}
