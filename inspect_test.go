package advisory

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"errors"
	"io"
	"math"
	"testing"
	"testing/synctest"
	"time"

	"github.com/DATA-DOG/go-sqlmock"
	"github.com/google/go-cmp/cmp"

	"github.com/pgadvisory/advisory/internal/pgsql"
	"github.com/pgadvisory/advisory/internal/session"
)

var holdersColumns = make([]string, 10)

func TestHoldersAsksForTheKeyAsPgLocksSpreadsIt(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		key                   Key
		classid, objid, subid int64
	}{
		{ID(42), 0, 42, 1},
		{ID(-1), 4294967295, 4294967295, 1},
		{ID(1<<32 + 2), 1, 2, 1},
		{Name("a"), 0xca978112, 0xca1bbdca, 1},
		{Pair(7, 42), 7, 42, 2},
		{Pair(-7, -2147483648), 4294967289, 2147483648, 2},
	} {
		db, mock := newMock(t)
		mock.ExpectQuery(holdersQuery).WithArgs(test.classid, test.objid, test.subid).WillReturnRows(sqlmock.NewRows(holdersColumns))
		holders, err := Holders(t.Context(), struct{ *sql.DB }{db}, test.key) // a Querier of another's
		wantError(t, err)
		if len(holders) != 0 {
			t.Errorf("holders: %v", holders)
		}
	}
}

func TestHoldersReturnsEveryColumnWhereItBelongs(t *testing.T) {
	t.Parallel()
	start, wait := time.Unix(1e9, 0), time.Unix(1e9+60, 0)
	db, mock := newMock(t)
	mock.ExpectQuery(holdersQuery).WillReturnRows(sqlmock.NewRows(holdersColumns).
		AddRow(4711, true, false, "u", "app", "10.0.0.7", "idle", "SELECT 1", start, nil).
		AddRow(0, true, true, "", "", "", "", "", nil, nil).
		AddRow(4712, false, true, "v", "", "", "active", "", start, wait))
	holders, err := Holders(t.Context(), db, key)
	wantError(t, err)
	if diff := cmp.Diff([]Holder{
		{PID: 4711, Granted: true, User: "u", ApplicationName: "app", ClientAddr: "10.0.0.7", State: "idle", Query: "SELECT 1", SessionStart: start},
		{Granted: true, Shared: true},
		{PID: 4712, Shared: true, User: "v", State: "active", SessionStart: start, WaitStart: wait},
	}, holders); diff != "" {
		t.Errorf("holders (-want +got):\n%s", diff)
	}
}

func TestLocksReturnsEveryKeyWithItsHoldersAndWaiters(t *testing.T) {
	t.Parallel()
	start, wait := time.Unix(1e9, 0), time.Unix(1e9+60, 0)
	const classOfA, objectOfA = 0xca978112, 0xca1bbdca // as Name("a")
	comment := "/* advisory: another, a, 7.42, b, +3 */ SELECT"
	db, mock := newMock(t)
	mock.ExpectQuery(pgsql.Locks).WillReturnRows(sqlmock.NewRows(make([]string, 13)).
		AddRow(7, 42, 2, 1, true, false, "u", "app", "10.0.0.7", "idle", comment, start, nil).
		AddRow(classOfA, objectOfA, 2, 1, true, false, "", "", "", "", comment, nil, nil).
		AddRow(classOfA, objectOfA, 1, 1, true, true, "", "", "", "", comment, nil, nil).
		AddRow(classOfA, objectOfA, 1, 2, true, true, "", "", "", "", "", nil, nil).
		AddRow(0, 43, 1, 3, false, false, "", "", "", "", "/* advisory: cut", nil, wait).
		AddRow(classOfA, objectOfA, 1, 4, false, false, "", "", "", "", "", nil, wait).
		AddRow(classOfA, objectOfA, 1, 5, false, true, "", "", "", "", "", nil, wait).
		AddRow(math.MaxUint32, math.MaxUint32, 1, 0, true, false, "", "", "", "", "", nil, nil))
	locks, err := Locks(t.Context(), struct{ *sql.DB }{db}) // a Querier of another's
	wantError(t, err)
	a := Name("a")
	if diff := cmp.Diff([]LockState{
		{Key: a, Holders: []Holder{{PID: 1, Granted: true, Shared: true, Query: comment}, {PID: 2, Granted: true, Shared: true}},
			Waiters: []Holder{{PID: 4, WaitStart: wait}, {PID: 5, Shared: true, WaitStart: wait}}},
		{Key: ID(-1), Holders: []Holder{{Granted: true}}},
		{Key: ID(43), Waiters: []Holder{{PID: 3, Query: "/* advisory: cut", WaitStart: wait}}},
		// Another space: it has no names.
		{Key: Pair(-0x35687eee, -0x35e44236), Holders: []Holder{{PID: 1, Granted: true, Query: comment}}},
		{Key: Pair(7, 42), Holders: []Holder{{PID: 1, Granted: true, User: "u", ApplicationName: "app", ClientAddr: "10.0.0.7", State: "idle", Query: comment, SessionStart: start}}},
	}, locks, cmp.Comparer(func(a, b Key) bool { return a == b })); diff != "" {
		t.Errorf("locks (-want +got):\n%s", diff)
	}
}

func TestLocksErrors(t *testing.T) {
	t.Parallel()
	one := func(pid any) *sqlmock.Rows {
		return sqlmock.NewRows(make([]string, 13)).AddRow(0, 42, 1, pid, true, false, "", "", "", "", "", nil, nil)
	}
	for _, test := range []struct {
		name   string
		expect func(*sqlmock.ExpectedQuery)
		wants  []any
	}{
		{"the query fails", func(q *sqlmock.ExpectedQuery) { q.WillReturnError(pgError("42703")) }, []any{pgError("42703"), "advisory: look up locks: "}},
		{"another kind of server", func(q *sqlmock.ExpectedQuery) { q.WillReturnError(pgError("42883")) }, []any{pgError("42883"), "PostgreSQL 14"}},
		{"a row is nonsense", func(q *sqlmock.ExpectedQuery) { q.WillReturnRows(one("x")) }, []any{"advisory: look up locks: "}},
		{"the connection dies between rows", func(q *sqlmock.ExpectedQuery) {
			q.WillReturnRows(one(1).AddRow(0, 42, 1, 2, true, false, "", "", "", "", "", nil, nil).RowError(1, io.ErrUnexpectedEOF))
		}, []any{io.ErrUnexpectedEOF}},
		{"none", func(q *sqlmock.ExpectedQuery) { q.WillReturnRows(sqlmock.NewRows(make([]string, 13))) }, nil},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			db, mock := newMock(t)
			test.expect(mock.ExpectQuery(pgsql.Locks))
			locks, err := Locks(t.Context(), db)
			wantError(t, err, test.wants...)
			if len(locks) > 0 {
				t.Errorf("locks: %v", locks)
			}
		})
	}
}

func TestHoldersErrors(t *testing.T) {
	t.Parallel()
	one := func(pid any) *sqlmock.Rows {
		return sqlmock.NewRows(holdersColumns).AddRow(pid, true, false, "", "", "", "", "", nil, nil)
	}
	for _, test := range []struct {
		name   string
		expect func(*sqlmock.ExpectedQuery)
		wants  []any
	}{
		{"the query fails", func(q *sqlmock.ExpectedQuery) { q.WillReturnError(pgError("42703")) }, []any{pgError("42703"), "advisory: look up bigint 42: "}},
		{"another kind of server", func(q *sqlmock.ExpectedQuery) { q.WillReturnError(pgError("42883")) }, []any{pgError("42883"), "PostgreSQL 14"}},
		{"a row is nonsense", func(q *sqlmock.ExpectedQuery) { q.WillReturnRows(one("x")) }, []any{"advisory: look up bigint 42: "}},
		{"the connection dies between rows", func(q *sqlmock.ExpectedQuery) {
			q.WillReturnRows(one(1).AddRow(2, true, false, "", "", "", "", "", nil, nil).RowError(1, io.ErrUnexpectedEOF))
		}, []any{io.ErrUnexpectedEOF}},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			db, mock := newMock(t)
			test.expect(mock.ExpectQuery(holdersQuery))
			_, err := Holders(t.Context(), db, key)
			wantError(t, err, test.wants...)
		})
	}
}

// row is a row of Holders.
func row(pid int64, granted bool, app, addr string) []driver.Value {
	return []driver.Value{pid, granted, false, "", app, addr, "", "", nil, nil}
}

func TestTheMessageOfATimeoutNamesTheHolder(t *testing.T) {
	t.Parallel()
	holder := row(4711, true, "billing", "10.0.0.7")
	for _, test := range []struct {
		name string
		rows [][]driver.Value
		err  error
		says string // after "not acquired within 1s"
		open int
	}{
		{"one", [][]driver.Value{holder, row(1, false, "", "")}, nil, `: held by pid 4711 (app "billing", 10.0.0.7)`, 1},
		{"unknown", [][]driver.Value{row(4711, true, "", "")}, nil, ": held by pid 4711", 1},
		{"unnamed", [][]driver.Value{row(4711, true, "", "10.0.0.7")}, nil, ": held by pid 4711 (10.0.0.7)", 1},
		{"local", [][]driver.Value{row(4711, true, "a\nb", "")}, nil, `: held by pid 4711 (app "a\nb")`, 1},
		{"two", [][]driver.Value{holder, row(1, true, "", "")}, nil, `: held by pid 4711 (app "billing", 10.0.0.7) and 1 other`, 1},
		{"three", [][]driver.Value{holder, row(1, true, "", ""), row(2, true, "", ""), row(3, false, "", "")}, nil, `: held by pid 4711 (app "billing", 10.0.0.7) and 2 others`, 1},
		{"gone by now", [][]driver.Value{row(1, false, "", "")}, nil, "", 1},
		{"nobody", nil, nil, "", 1},
		{"not to be seen", nil, pgError("42501"), "", 1},
		{"the connection dies", nil, io.ErrUnexpectedEOF, "", 0},
	} {
		for _, c := range closures {
			bubble(t, c.name+" "+test.name, func(t *testing.T) {
				db, srv := newServer(t)
				srv.script = taken(t)
				srv.rows = func(int, []driver.NamedValue) ([][]driver.Value, error) { return test.rows, test.err }
				err := c.run(t.Context(), db, key, nothing, Timeout(time.Second))
				wantError(t, err, ErrHeld)
				if got, want := err.Error(), "advisory: acquire bigint 42: not acquired within 1s"+test.says; got != want {
					t.Errorf("error %q, want %q", got, want)
				}
				if srv.open() != test.open {
					t.Errorf("%d connections open, want %d", srv.open(), test.open)
				}
			})
		}
	}
}

// Of several keys, the one that was waited for.
func TestTheHolderThatIsNamedIsThatOfTheKeyInTheWay(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		db, srv := newServer(t)
		waits := taken(t)
		srv.script = func(ctx context.Context, conn int, query string) (int64, error) {
			if isWait(query) && waitKey(query) == key {
				return 1, nil
			}
			return waits(ctx, conn, query)
		}
		srv.rows = func(_ int, args []driver.NamedValue) ([][]driver.Value, error) {
			if args[1].Value != int64(43) {
				t.Errorf("asked for %v", args[1].Value)
			}
			return [][]driver.Value{row(7, true, "", "")}, nil
		}
		err := WithLocks(t.Context(), db, []Key{ID(43), key}, nothing, Timeout(time.Second))
		wantError(t, err, ErrHeld, "held by pid 7")
	})
}

// A question that takes long must not cost the caller's conn, with its other locks, or transaction.
func TestTheHolderIsNotAskedForOnTheCallersSession(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		p, dbs, srvs := newTable(t, 2)
		srvs[0].rows = func(int, []driver.NamedValue) ([][]driver.Value, error) {
			t.Error("asked")
			return nil, nil
		}
		there := take(t, dbs[1], ID(2))
		conn := borrow(t, dbs[0])
		wantError(t, AcquireConn(t.Context(), conn, ID(1)))
		wantError(t, AcquireConn(t.Context(), conn, ID(2), Timeout(time.Second)), ErrHeld, "not acquired within 1s")
		tx, err := dbs[0].BeginTx(t.Context(), nil)
		wantError(t, err)
		wantError(t, AcquireTx(t.Context(), tx, ID(2), Timeout(time.Second)), ErrHeld, "not acquired within 1s")
		wantError(t, tx.Commit())
		wantError(t, ReleaseConn(t.Context(), conn, ID(1)))
		wantError(t, conn.Close())
		wantError(t, there.Release())
		p.clean()
	})
}

func TestAHolderThatCannotBeAskedForIsLeftOutInTime(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		db, srv := newServer(t)
		srv.script = taken(t)
		srv.rows = func(int, []driver.NamedValue) ([][]driver.Value, error) {
			time.Sleep(time.Hour)
			return nil, nil
		}
		start := time.Now()
		err := WithLock(t.Context(), db, key, nothing, Timeout(time.Second))
		wantError(t, err, ErrHeld, "not acquired within 1s")
		if d := time.Since(start) - time.Second; d > session.Grace+2*abandonAfter {
			t.Errorf("%v over the Timeout", d)
		}
		time.Sleep(2 * time.Hour)
		if srv.open() != 0 {
			t.Error("the connection was not discarded")
		}
	})
}

func TestTheSavepointOfTheQuestionFails(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		on, srv := newTarget(t)
		waits := taken(t)
		srv.script = func(ctx context.Context, conn int, query string) (int64, error) {
			if query == savepointQuery {
				return 0, errors.New("conn closed")
			}
			return waits(ctx, conn, query)
		}
		wantError(t, AcquireTx(t.Context(), on.tx, key, Timeout(time.Second)), ErrHeld)
	})
}

func TestTheHolderOfTheKeyIsAskedFor(t *testing.T) {
	t.Parallel()
	for _, c := range closures {
		bubble(t, c.name, func(t *testing.T) {
			db, srv := newServer(t)
			srv.script = taken(t)
			srv.rows = func(_ int, args []driver.NamedValue) ([][]driver.Value, error) {
				for i, want := range []int64{1, 2, 1} {
					if got := args[i].Value; got != want {
						t.Errorf("%s: argument %d: %v, want %d", c.name, i, got, want)
					}
				}
				return [][]driver.Value{row(7, true, "", "")}, nil
			}
			wantError(t, c.run(t.Context(), db, ID(1<<32+2), nothing, Timeout(time.Second)), ErrHeld, "held by pid 7")
		})
	}
}
