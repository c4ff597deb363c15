package integration

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"math"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"golang.org/x/sync/errgroup"

	"github.com/pgadvisory/advisory"
	"github.com/pgadvisory/advisory/integration/internal/testkit"
)

// Whoever may create a function or an operator in a schema of the search path has it run by those
// who mean PostgreSQL's own, and do not say so: here, by the session that holds the lock.

// hostileSchema makes a schema that has a namesake of every function, operator, type and relation of
// pg_catalog that can have one, with the same arguments, so that the search path alone decides. No
// role but a superuser may execute one, or read one. The server checks that when it begins to
// execute a statement, for all parts of it, be they evaluated or not.
const hostileSchema = `
CREATE SCHEMA hostile;
GRANT USAGE ON SCHEMA hostile TO PUBLIC;
ALTER DEFAULT PRIVILEGES REVOKE EXECUTE ON FUNCTIONS FROM PUBLIC;
CREATE FUNCTION hostile.constraint_of_a_type() RETURNS bool LANGUAGE plpgsql AS 'BEGIN RAISE ''hostile''; END';
CREATE VIEW hostile.names AS
	SELECT oid AS of, typtype <> 'p' OR typname LIKE 'any_%' OR typname = 'record' AS can, format_type(oid, NULL) AS name FROM pg_type;
SET search_path = pg_catalog; -- format_type leaves it out
DO $$
DECLARE
	statement text;
	body CONSTANT text := ' LANGUAGE plpgsql AS ''BEGIN RAISE ''''hostile''''; END''';
BEGIN
	FOR statement IN
		SELECT format('CREATE FUNCTION hostile.%I(%s) RETURNS %s', p.proname, a.list, CASE WHEN p.proretset THEN 'SETOF ' ELSE '' END || r.name) || body
		FROM pg_proc p JOIN hostile.names r ON r.of = p.prorettype,
			LATERAL (SELECT coalesce(bool_and(n.can), true) AS can,
				string_agg(CASE WHEN p.provariadic <> 0 AND i = p.pronargs THEN 'VARIADIC ' ELSE '' END || n.name ||
					CASE WHEN i > p.pronargs - p.pronargdefaults THEN ' DEFAULT NULL' ELSE '' END, ', ' ORDER BY i) AS list
				FROM unnest(p.proargtypes) WITH ORDINALITY AS u (t, i) JOIN hostile.names n ON n.of = u.t) AS a
		WHERE p.pronamespace = 'pg_catalog'::regnamespace AND a.can AND (r.can OR r.name = 'void')
	LOOP EXECUTE statement; END LOOP;

	FOR statement IN
		SELECT format('CREATE FUNCTION hostile.%I(%s) RETURNS %s', 'operator ' || o.oprname, concat_ws(', ', l.name, r.name), t.name) || body
			|| format('; CREATE OPERATOR hostile.%s (FUNCTION = hostile.%I, %s)', o.oprname, 'operator ' || o.oprname,
				concat_ws(', ', 'LEFTARG = ' || l.name, 'RIGHTARG = ' || r.name))
		FROM pg_operator o LEFT JOIN hostile.names l ON l.of = o.oprleft JOIN hostile.names r ON r.of = o.oprright JOIN hostile.names t ON t.of = o.oprresult
		WHERE o.oprnamespace = 'pg_catalog'::regnamespace AND coalesce(l.can, true) AND r.can AND t.can
	LOOP EXECUTE statement; END LOOP;

	FOR statement IN
		SELECT format('CREATE DOMAIN hostile.%I AS pg_catalog.%I CHECK (hostile.constraint_of_a_type())', typname, typname)
		FROM pg_type WHERE typnamespace = 'pg_catalog'::regnamespace AND typtype IN ('b', 'r', 'm') AND typcategory <> 'A'
	LOOP EXECUTE statement; END LOOP;

	FOR statement IN
		SELECT format('CREATE VIEW hostile.%I AS SELECT %s FROM pg_catalog.%I', c.relname, string_agg(quote_ident(a.attname), ', '), c.relname)
		FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 JOIN pg_type t ON t.oid = a.atttypid AND t.typtype <> 'p' AND t.typname <> '_pg_statistic'
		WHERE c.relnamespace = 'pg_catalog'::regnamespace AND c.relkind IN ('r', 'v') GROUP BY c.oid
	LOOP EXECUTE statement; END LOOP;
END$$`

// A hostilePlace is a database with such a schema in its search path.
type hostilePlace struct {
	name    string  // of the database
	role    string  // that uses it
	limited string  // a role that may not use PL/pgSQL besides
	other   *sql.DB // for those who hold the locks, with a search path that is none
}

func newHostilePlace(t testing.TB) hostilePlace {
	t.Helper()
	dsn := inDatabase(t)
	h := hostilePlace{name: databaseOf(t, dsn), role: testkit.Unique("hostile"), limited: testkit.Unique("limited")}
	h.other = openPlain(t, withParams(t, dsn, "search_path", "pg_catalog"))
	h.other.SetMaxIdleConns(32)
	for _, role := range []string{h.role, h.limited} {
		setUp(t, adminDB(t), "CREATE ROLE "+role)
		t.Cleanup(func() {
			setUp(t, h.other, "DROP OWNED BY "+role)
			setUp(t, adminDB(t), "DROP ROLE "+role)
		})
	}
	conn, err := pgx.Connect(t.Context(), dsn)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(context.Background())
	began := time.Now()
	for _, script := range []string{
		hostileSchema,
		"ALTER DATABASE " + h.name + " SET search_path = hostile, pg_catalog",
		"REVOKE USAGE ON LANGUAGE plpgsql FROM PUBLIC; GRANT USAGE ON LANGUAGE plpgsql TO " + h.role,
	} {
		if _, err := conn.PgConn().Exec(t.Context(), script).ReadAll(); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("the schema is made in %v", time.Since(began))
	return h
}

// A hostilePool is what a program in such a place uses.
type hostilePool struct {
	hostilePlace
	d    driver
	sent *wire
	log  *logbook
	db   *sql.DB

	statements []string // that were sent
}

func (h hostilePlace) open(t testing.TB, d driver) *hostilePool {
	p := &hostilePool{hostilePlace: h, d: d, sent: newWire(t), log: newLogbook()}
	p.db = p.another(t)
	return p
}

// another opens a pool that stands for another process.
func (p *hostilePool) another(t testing.TB, params ...string) *sql.DB {
	t.Helper()
	dsn := withParams(t, p.sent.dsn, "dbname", p.name, "role", p.role)
	db := p.d.open(t, withParams(t, dsn, params...))
	db.SetMaxIdleConns(32)
	return db
}

// take adds what was sent since to p.statements.
func (p *hostilePool) take() []string {
	p.statements = append(p.statements, p.sent.take()...)
	return p.statements
}

func (p *hostilePool) waitUntilSent(t testing.TB, part string) {
	t.Helper()
	waitFor(t, fmt.Sprintf("%q is sent", part), func() (bool, error) {
		return slices.ContainsFunc(p.take(), func(s string) bool { return strings.Contains(s, part) }), nil
	})
}

func TestEveryStatementIgnoresTheSearchPath(t *testing.T) {
	t.Parallel()
	place := newHostilePlace(t)
	var mu sync.Mutex
	var sent []string
	t.Run("drivers", func(t *testing.T) {
		bothDrivers(t, func(t *testing.T, d driver) {
			t.Parallel()
			p := place.open(t, d)
			p.useEverything(t)
			if n := len(p.log.times("")); n > 0 {
				t.Errorf("the Logger was told of %d errors", n)
			}
			p.limit(t)
			mu.Lock()
			defer mu.Unlock()
			sent = append(sent, p.take()...)
		})
	})
	wantAllSent(t, sent)
	wantNoQualificationInVain(t, place, sent)
}

// isolated is WithTxLock in a transaction with that isolation.
func isolated(level sql.IsolationLevel) way {
	w := withTxLock
	w.name += ", " + level.String()
	w.run = func(ctx context.Context, db *sql.DB, key advisory.Key, fn work, o options) error {
		o.acquire = append(slices.Clone(o.acquire), advisory.TxOptions(&sql.TxOptions{Isolation: level}))
		return withTxLock.run(ctx, db, key, fn, o)
	}
	return w
}

// lead is Lead, until fn has returned.
var lead = way{name: "Lead", opens: true, beats: true,
	run: func(ctx context.Context, db *sql.DB, key advisory.Key, fn work, o options) error {
		ctx, cancel := context.WithCancel(ctx)
		defer cancel()
		done := errors.New("done")
		err := advisory.Lead(ctx, db, key, func(ctx context.Context) error {
			defer cancel()
			return errors.Join(fn(ctx, db), done)
		}, o.acquire...)
		if errors.Is(err, done) || errors.Is(err, context.Canceled) {
			return nil
		}
		return err
	}}

// useEverything uses all of the package.
func (p *hostilePool) useEverything(t *testing.T) {
	var g errgroup.Group
	g.SetLimit(8) // the server has other tests' sessions, too
	do := func(name string, f func(ctx context.Context) error) {
		g.Go(func() error {
			if err := f(soon(t)); err != nil {
				t.Errorf("%s: %v", name, err)
			}
			return nil
		})
	}
	all := append(slices.Clone(ways), isolated(sql.LevelReadCommitted), isolated(sql.LevelRepeatableRead), isolated(sql.LevelSerializable))
	for _, w := range all {
		for _, shared := range []bool{false, true} {
			w := w
			w.shared = shared
			name := fmt.Sprintf("%s %s, shared: %t", t.Name(), w.name, shared)
			key := advisory.Name(name)
			if shared && w.name != withLocks.name { // which takes a pair besides
				key = second(key)
			}
			do(name, func(ctx context.Context) error { return p.contend(ctx, t, w, key) })
		}
	}
	do("WithTxLock by default", func(ctx context.Context) error {
		db := p.another(t, "default_transaction_isolation", "repeatable read")
		return withTxLock.with(ctx, db, advisory.Name(t.Name()+"one snapshot"), noWork, p.log.option())
	})
	do("Lead", func(ctx context.Context) error {
		return lead.with(ctx, p.db, advisory.Name(t.Name()+"lead"), noWork, p.log.option())
	})
	do("heartbeats", func(ctx context.Context) error { return p.beat(ctx, t) })
	do("shared locks", func(ctx context.Context) error { return p.share(ctx, t) })
	do("nested locks", func(ctx context.Context) error { return p.nest(ctx, t) })
	do("the smallest keys", func(ctx context.Context) error {
		keys := []advisory.Key{advisory.ID(math.MinInt64), advisory.Pair(math.MinInt32, math.MinInt32)}
		return advisory.WithLocks(ctx, p.db, keys, func(context.Context) error { return nil }, p.log.option())
	})
	do("some of several locks", func(ctx context.Context) error { return p.fail(ctx, t) })
	do("Check", func(ctx context.Context) error { return advisory.Check(ctx, p.another(t)) })
	_ = g.Wait()
	p.crowd(t)
}

// contend takes the lock of key by w when it is free, when another holds it, and after that.
func (p *hostilePool) contend(ctx context.Context, t *testing.T, w way, key advisory.Key) error {
	if err := p.takeFree(ctx, w, key); err != nil {
		return err
	}
	conn, err := p.other.Conn(ctx)
	if err != nil {
		return err
	}
	defer conn.Close()
	if _, err := conn.ExecContext(ctx, "SELECT pg_advisory_lock("+key.SQL()+")"); err != nil {
		return err
	}
	if err := p.askInVain(ctx, w, key); err != nil {
		return err
	}
	waits := make(chan error, 1)
	go func() { waits <- w.with(ctx, p.db, key, noWork, p.watched(w)...) }()
	if w.tries {
		time.Sleep(1200 * time.Millisecond) // until it has asked whether it is a deadlock
	} else {
		waitForWaiters(t, p.other, key, 1)
	}
	if _, err := conn.ExecContext(ctx, "SELECT pg_advisory_unlock("+key.SQL()+")"); err != nil {
		return err
	}
	return <-waits
}

// watched are options with a HolderTimeout, where w may have one.
func (p *hostilePool) watched(w way) []advisory.Option {
	opts := []advisory.Option{p.log.option()}
	if w.opens {
		opts = append(opts, advisory.HolderTimeout(20*time.Second))
	}
	return opts
}

// takeFree takes the lock of key, which is free, and asks who holds it.
func (p *hostilePool) takeFree(ctx context.Context, w way, key advisory.Key) error {
	asks := func(ctx context.Context, q querier) error {
		holders, err := advisory.Holders(ctx, q.(advisory.Querier), key)
		if err == nil && (len(holders) == 0 || !holders[0].Granted) {
			err = fmt.Errorf("Holders: %v", holders)
		}
		if err == nil {
			_, err = advisory.Locks(ctx, q.(advisory.Querier))
		}
		if w.opens && err == nil {
			_, err = advisory.Token(ctx)
		}
		return err
	}
	err := w.with(ctx, p.db, key, asks, p.log.option())
	if w.opens && err == nil {
		err = w.with(ctx, p.db, key, noWork, p.watched(w)...)
	}
	return err
}

// askInVain asks for the lock of key, which another holds, with each kind of patience.
func (p *hostilePool) askInVain(ctx context.Context, w way, key advisory.Key) error {
	logger := p.log.option()
	if err := w.with(ctx, p.db, key, noWork, logger, advisory.NoWait()); !errors.Is(err, advisory.ErrNotAcquired) {
		return fmt.Errorf("NoWait: %w", err)
	}
	for timeout := 50 * time.Millisecond; ; timeout *= 2 {
		err := w.with(ctx, p.db, key, noWork, logger, advisory.Timeout(timeout))
		if errors.Is(err, advisory.ErrNotAcquired) && (!w.opens || strings.Contains(err.Error(), "held by pid ")) {
			break
		}
		// Where the machine is late, it may be over before there is a connection to ask on.
		if !errors.Is(err, advisory.ErrNotAcquired) || timeout > 3*time.Second {
			return fmt.Errorf("Timeout: %w, want who holds it", err)
		}
	}
	leaving, leave := context.WithCancel(ctx)
	defer leave()
	time.AfterFunc(50*time.Millisecond, leave)
	if err := w.with(leaving, p.db, key, noWork, logger); !errors.Is(err, context.Canceled) {
		return fmt.Errorf("cancelled: %w", err)
	}
	return nil
}

// beat holds locks for several heartbeats.
func (p *hostilePool) beat(ctx context.Context, t *testing.T) error {
	db := p.another(t)
	lock, err := advisory.Acquire(ctx, db, advisory.Name(t.Name()+"beat"), advisory.Heartbeat(shortHeartbeat), advisory.HolderTimeout(20*time.Second), p.log.option())
	if err != nil {
		return err
	}
	select {
	case <-lock.Context().Done():
	case <-time.After(5 * shortHeartbeat / 2):
	}
	return errors.Join(context.Cause(lock.Context()), lock.Release())
}

// share takes a shared lock that is held in this process for a while.
func (p *hostilePool) share(ctx context.Context, t *testing.T) error {
	for _, key := range []advisory.Key{advisory.Name(t.Name() + "share"), second(advisory.Name(t.Name() + "share"))} {
		lock, err := advisory.Acquire(ctx, p.db, key, advisory.Shared(), p.log.option())
		if err != nil {
			return err
		}
		time.Sleep(50 * time.Millisecond) // until it is not shared without a look
		err = advisory.WithLock(ctx, p.db, key, func(context.Context) error { return nil }, advisory.Shared(), p.log.option())
		if err := errors.Join(err, lock.Release()); err != nil {
			return err
		}
	}
	return nil
}

// nest waits for a lock under another for so long that it asks whether that is a deadlock.
func (p *hostilePool) nest(ctx context.Context, t *testing.T) error {
	inner, db := advisory.Name(t.Name()+"inner"), p.another(t)
	defer hold(t, p.other, inner)()
	return advisory.WithLock(ctx, db, advisory.Name(t.Name()+"outer"), func(ctx context.Context) error {
		ctx, cancel := context.WithCancel(ctx)
		defer cancel()
		waits := make(chan error, 1)
		go func() {
			waits <- advisory.WithLock(ctx, db, inner, func(context.Context) error { return nil }, p.log.option())
		}()
		p.waitUntilSent(t, "pg_catalog.starts_with(query")
		cancel()
		if err := <-waits; !errors.Is(err, context.Canceled) {
			return fmt.Errorf("%w, want context.Canceled", err)
		}
		return nil
	}, p.log.option())
}

// fail takes the first of two locks, of which another holds the second.
func (p *hostilePool) fail(ctx context.Context, t *testing.T) error {
	key := advisory.Name(t.Name() + "fail")
	defer hold(t, p.other, second(key))()
	err := withLocks.with(ctx, p.db, key, noWork, advisory.NoWait(), p.log.option())
	if !errors.Is(err, advisory.ErrNotAcquired) {
		return fmt.Errorf("%w, want ErrNotAcquired", err)
	}
	return nil
}

// crowd has many callers at a time, so that one statement answers several.
func (p *hostilePool) crowd(t *testing.T) {
	ctx, cancel := context.WithCancel(soon(t))
	defer cancel()
	db := p.another(t)
	var g errgroup.Group
	for i := range 16 {
		key := advisory.Name(fmt.Sprint(t.Name(), "crowd", i/2%4))
		if i%2 > 0 {
			key = second(key)
		}
		opts := []advisory.Option{p.log.option()}
		if i > 7 {
			opts = append(opts, advisory.Shared())
		}
		g.Go(func() error {
			for ctx.Err() == nil {
				if err := advisory.WithLock(context.WithoutCancel(ctx), db, key, func(context.Context) error { return nil }, opts...); err != nil {
					return err
				}
			}
			return nil
		})
	}
	p.waitUntilSent(t, "pg_catalog.unnest(")
	time.Sleep(100 * time.Millisecond) // for more than the first of them
	cancel()
	if err := g.Wait(); err != nil {
		t.Errorf("a crowd: %v", err)
	}
}

// limit waits where the statement that waits is refused.
func (p *hostilePool) limit(t *testing.T) {
	allowLog(t, "ERROR:  permission denied for language plpgsql")
	var g errgroup.Group
	g.SetLimit(8)
	for _, w := range queuers {
		for _, shared := range []bool{false, true} {
			w := w
			w.shared = shared
			key := advisory.Name(fmt.Sprint(t.Name(), "limit", w.name, shared))
			defer hold(t, p.other, key)()
			db := p.another(t, "role", p.limited)
			g.Go(func() error {
				err := w.with(soon(t), db, key, noWork, newLogbook().option(), advisory.Timeout(300*time.Millisecond))
				if !errors.Is(err, advisory.ErrNotAcquired) {
					t.Errorf("%s without PL/pgSQL: %v", w.name, err)
				}
				return nil
			})
		}
	}
	_ = g.Wait()
	p.waitUntilSent(t, "OFFSET 0) AS held") // the undoing, made of parts that others have, too
}

// wantAllSent fails the test unless every text in the package's source that looks like a part of a
// statement was sent.
func wantAllSent(t *testing.T, sent []string) {
	t.Helper()
	part := regexp.MustCompile(`\b(SELECT|FROM|WHERE|CASE|WHEN|THEN|AND|OR|PERFORM|WITH|SET|RESET|BEGIN|COMMIT|ROLLBACK|SAVEPOINT|OPERATOR)\b|\bpg_|::`)
	files, err := filepath.Glob("../internal/*/*.go")
	if err != nil || len(files) == 0 {
		t.Fatal("no source:", err)
	}
	all, parts := strings.Join(sent, "\n"), 0
	for _, file := range files {
		if strings.HasSuffix(file, "_test.go") {
			continue
		}
		syntax, err := parser.ParseFile(token.NewFileSet(), file, nil, 0)
		if err != nil {
			t.Fatal(err)
		}
		ast.Inspect(syntax, func(n ast.Node) bool {
			literal, ok := n.(*ast.BasicLit)
			if !ok || literal.Kind != token.STRING {
				return true
			}
			text, err := strconv.Unquote(literal.Value)
			if err != nil {
				t.Error(err)
			}
			if part.MatchString(text) {
				parts++
				if !strings.Contains(all, text) {
					t.Errorf("%s has %q, and nothing of the kind was sent: does the test not reach it?", file, text)
				}
			}
			return true
		})
	}
	t.Logf("%d statements, made of %d parts", len(sent), parts)
}

var (
	qualification = "pg_catalog."
	commentOfKeys = regexp.MustCompile(`^/\*.*?\*/ `)
	constants     = regexp.MustCompile(`'[^' ]*[0-9][^' ]*'|-?\b[0-9]+\b`) // keys, times, nonces
	waitBound     = regexp.MustCompile(`LEAST\([0-9]+`)
	parameter     = regexp.MustCompile(`\$[0-9]`)
	waitedFor     = regexp.MustCompile(`'advisory.key', '(-?\d+)'|'advisory.class', '(-?\d+)', true\), pg_catalog.set_config\('advisory.object', '(-?\d+)'`)
)

// wantNoQualificationInVain is the control: each of the statements fails as soon as one qualification
// is left out, whichever it is. So the names that they use are shadowed, each of them, and they are
// carried out with the whole of each statement.
func wantNoQualificationInVain(t *testing.T, place hostilePlace, sent []string) {
	t.Helper()
	began := time.Now()
	// The errors are the test's own, and not in the log that is watched.
	conn, err := pgx.Connect(t.Context(), withParams(t, server.DSN(), "dbname", place.name, "role", place.role))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(context.Background())
	c := hostileControl{t, place, conn}
	shapes, left := map[string]bool{}, 0
	for _, s := range sent {
		s = commentOfKeys.ReplaceAllString(s, "")
		shape := constants.ReplaceAllString(s, "?")
		if shapes[shape] || !strings.Contains(s, qualification) {
			continue
		}
		shapes[shape] = true
		left += c.leaveOutEach(s)
	}
	t.Logf("%d shapes with %d qualifications, in %v", len(shapes), left, time.Since(began))
	if len(shapes) < 20 {
		t.Errorf("%d shapes, too few to show anything", len(shapes))
	}
}

// A hostileControl carries out statements in a hostile place.
type hostileControl struct {
	t     *testing.T
	place hostilePlace
	conn  *pgx.Conn
}

func (c hostileControl) exec(statement string) error {
	_, err := c.conn.PgConn().Exec(c.t.Context(), statement).ReadAll()
	return err
}

// try carries out a statement, and leaves nothing of it.
func (c hostileControl) try(statement string) error {
	c.t.Helper()
	if err := c.exec("BEGIN"); err != nil {
		c.t.Fatal(err)
	}
	defer func() {
		if err := c.exec("ROLLBACK; SELECT pg_catalog.pg_advisory_unlock_all()"); err != nil {
			c.t.Fatal(err)
		}
	}()
	return c.exec(statement)
}

// leaveOutEach tries a statement, and tries it without each of its qualifications. It
// returns how many these are.
func (c hostileControl) leaveOutEach(s string) (left int) {
	c.t.Helper()
	if key := waitedFor.FindStringSubmatch(s); key != nil { // in vain
		s = waitBound.ReplaceAllString(s, "LEAST(1")
		release := hold(c.t, c.place.other, keyOf(c.t, key[1:]))
		defer release()
	}
	s = parameter.ReplaceAllStringFunc(s, func(string) string {
		if strings.Contains(s, "int4[]") {
			return "'{1}'"
		}
		return "'1'"
	})
	if err := c.try(s); err != nil {
		c.t.Errorf("%s: %v", s, err)
		return 0
	}
	for i := 0; ; i++ {
		next := strings.Index(s[i:], qualification)
		if next < 0 {
			return left
		}
		i += next
		if strings.HasPrefix(s[i+len(qualification):], "interval") {
			continue // a word of the language, which means PostgreSQL's own
		}
		left++
		denied := "42501"
		if strings.HasPrefix(s[i+len(qualification):], "refcursor") {
			denied = "42804" // PL/pgSQL looks at the type, and not at its functions
		}
		if err := c.try(s[:i] + s[i+len(qualification):]); err == nil || sqlState(err) != denied {
			c.t.Errorf("without a qualification: %v\n%s«»%s", err, s[:i], s[i+len(qualification):])
		}
	}
}

func keyOf(t *testing.T, numbers []string) advisory.Key {
	var n [3]int64
	for i, number := range numbers {
		if number == "" {
			continue
		}
		var err error
		if n[i], err = strconv.ParseInt(number, 10, 64); err != nil {
			t.Fatal(err)
		}
	}
	if numbers[0] != "" {
		return advisory.ID(n[0])
	}
	return advisory.Pair(int32(n[1]), int32(n[2]))
}
