package integration

import (
	"context"
	"database/sql"
	"math"
	"math/rand/v2"
	"os"
	"regexp"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/pgadvisory/advisory"
)

// The one-liner is what people paste into psql, so the test takes it from the doc comment.
func TestNameIsWhatTheDocumentedStatementComputes(t *testing.T) {
	t.Parallel()
	source, err := os.ReadFile("../hash.go")
	if err != nil {
		t.Fatal(err)
	}
	statement := regexp.MustCompile(`(?m)^//\t(SELECT .*'nightly-report'.*);$`).FindSubmatch(source)
	if statement == nil {
		t.Fatal("no statement in the doc comment of Name")
	}
	query := strings.Replace(string(statement[1]), "'nightly-report'", "$1::text", 1)

	names := []string{
		"nightly-report", "a", " ", "Straße", "отчёт", "日報 🔒", "e\u0301 is not \u00e9",
		`it's "quoted" \ $1 -- %s`, "two\nlines", strings.Repeat("long ", 4000),
	}
	eachDriver(t, func(t *testing.T, d driver) {
		db := d.open(t, server.DSN())
		for _, name := range names {
			var want string
			if err := db.QueryRow("SELECT ("+query+")::text", name).Scan(&want); err != nil {
				t.Fatal(err)
			}
			if got := advisory.Name(name).SQL(); got != want {
				t.Errorf("Name(%.40q) is %s; the server says %s", name, got, want)
			}
		}
	})
}

// serversHashText is what the server computes.
func serversHashText(t testing.TB, db *sql.DB, name string) (hash string) {
	t.Helper()
	if err := db.QueryRow("SELECT pg_catalog.hashtext($1)::bigint::text", name).Scan(&hash); err != nil {
		t.Fatal(err)
	}
	return hash
}

func TestHashTextIsWhatTheServerComputes(t *testing.T) {
	t.Parallel()
	eachDriver(t, func(t *testing.T, d driver) {
		db := d.open(t, server.DSN())
		for n := 1; n < 300; n++ {
			var name strings.Builder
			for name.Len() < n { // mostly ASCII, so that all lengths come up
				name.WriteRune(rune(1 + rand.IntN(128+n%5)))
			}
			key := advisory.HashText(name.String())
			if want := serversHashText(t, db, name.String()); key.SQL() != want {
				t.Errorf("HashText(%q) is %s; the server says %s", name.String(), key.SQL(), want)
			}
		}
	})
}

func FuzzHashText(f *testing.F) {
	for _, name := range []string{"a", "nightly-report", "twelve bytes", "Straße", "отчёт", "日報 🔒", strings.Repeat("long ", 4000)} {
		f.Add(name)
	}
	f.Fuzz(func(t *testing.T, name string) {
		if name == "" || !utf8.ValidString(name) || strings.Contains(name, "\x00") {
			t.Skip("no text for the server")
		}
		if got, want := advisory.HashText(name).SQL(), serversHashText(t, adminDB(t), name); got != want {
			t.Errorf("HashText(%q) is %s; the server says %s", name, got, want)
		}
	})
}

// Programs that lock as the documentation of HashText says, and this one, exclude each other.
func TestHashTextExcludesProgramsThatLockByIt(t *testing.T) {
	t.Parallel()
	eachDriver(t, func(t *testing.T, d driver) {
		db, name := d.open(t, server.DSN()), t.Name()
		key := advisory.HashText(name)
		conn, err := adminDB(t).Conn(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		ask := func(function string) (yes bool) {
			t.Helper()
			if err := conn.QueryRowContext(t.Context(), "SELECT "+function+"(hashtext($1))", name).Scan(&yes); err != nil {
				t.Fatal(err)
			}
			return yes
		}
		if !ask("pg_try_advisory_lock") {
			t.Fatal("the lock is taken")
		}
		wantRefused(t, db, key)
		if !ask("pg_advisory_unlock") {
			t.Error("the lock was not held")
		}
		err = advisory.WithLock(t.Context(), db, key, func(context.Context) error {
			if ask("pg_try_advisory_lock") {
				t.Error("two hold the lock")
				ask("pg_advisory_unlock")
			}
			return nil
		})
		if err != nil {
			t.Error(err)
		}
	})
}

func TestKeyIsTheOneThatTheServerLocks(t *testing.T) {
	t.Parallel()
	type lock struct{ classID, objID, objSubID uint32 }
	tests := map[advisory.Key]lock{}
	for _, id := range []int64{math.MinInt64, math.MinInt64 + 1, math.MinInt32, -1, 0, 1, math.MaxInt32, 1 << 32, math.MaxInt64} {
		tests[advisory.ID(id)] = lock{uint32(uint64(id) >> 32), uint32(id), 1}
	}
	ints := []int32{math.MinInt32, -1, 0, 42, math.MaxInt32}
	for _, class := range ints {
		for _, object := range ints {
			tests[advisory.Pair(class, object)] = lock{uint32(class), uint32(object), 2}
		}
	}
	dsn := inDatabase(t) // these keys are anybody's
	eachDriver(t, func(t *testing.T, d driver) {
		db := d.open(t, dsn)
		for key, want := range tests {
			err := advisory.WithConnLock(t.Context(), db, key, func(ctx context.Context, conn *sql.Conn) error {
				var n int
				var got lock
				err := conn.QueryRowContext(ctx, `
					SELECT count(*), min(classid::bigint), min(objid::bigint), min(objsubid)
					FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid()`,
				).Scan(&n, &got.classID, &got.objID, &got.objSubID)
				if err == nil && (n != 1 || got != want) {
					t.Errorf("%v: the server holds %d locks, %v; want %v", key, n, got, want)
				}
				if err != nil {
					return err
				}
				// The session itself takes it once more, and the unlock finds it.
				var taken, released bool
				err = conn.QueryRowContext(ctx, "SELECT pg_try_advisory_lock("+key.SQL()+"), pg_advisory_unlock("+key.SQL()+")").
					Scan(&taken, &released)
				if err == nil && !(taken && released) {
					t.Errorf("%v: PostgreSQL's own functions with %s: %t, %t", key, key.SQL(), taken, released)
				}
				return err
			})
			if err != nil {
				t.Errorf("%v: %v", key, err)
			}
		}
	})
}

// Every bigint has the bits of a pair. They are different locks all the same.
func TestPairNeverExcludesID(t *testing.T) {
	t.Parallel()
	dsn := inDatabase(t)
	eachDriver(t, func(t *testing.T, d driver) {
		db, other := d.open(t, dsn), d.open(t, dsn)
		for _, pair := range [][2]int32{{0, 0}, {0, 42}, {7, 42}, {-1, -1}, {math.MinInt32, 0}} {
			id := advisory.ID(int64(pair[0])<<32 | int64(uint32(pair[1])))
			key := advisory.Pair(pair[0], pair[1])
			err := advisory.WithLock(t.Context(), db, id, func(context.Context) error {
				wantRefused(t, other, id)
				return advisory.WithLock(t.Context(), other, key, func(context.Context) error { return nil }, advisory.NoWait())
			})
			if err != nil {
				t.Errorf("%v while %v is held: %v", key, id, err)
			}
		}
	})
}
