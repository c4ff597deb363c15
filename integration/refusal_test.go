package integration

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/pgadvisory/advisory"
)

// A refused client is told an SQLSTATE and a text.
type refused struct{ code, says string }

func (r refused) name() string { return r.code }

// Poolers have words of their own for a server that is away, and a server that restarts or fails over
// has several.
var passing = []refused{
	{"XX000", "server conn crashed?"},
	{"58000", "could not receive data from server"},
	{"08P01", "server login has been failing, try again later (server_login_retry)"},
	{"57P03", "the database system is in recovery mode"},
	{"53300", "sorry, too many clients already"},
}

// These are true until somebody changes something.
var staying = []refused{
	{"28P01", "password authentication failed"},
	{"28000", "no pg_hba.conf entry for host"},
	{"3D000", "database does not exist"},
}

// refusalWays are those whose waits go on over a lost session.
var refusalWays = []way{withLock, withConnLock, withTxLock, leadOnce}

// A refusal is a way to refuse: it returns how often it has.
type refusal struct {
	name  string
	begin func(r *relay, code, says string) (times func() int)
}

var refusals = []refusal{
	{"new connections", func(r *relay, code, says string) func() int {
		r.answerDials(refusing(code, says))
		r.cut(nil)
		return func() int { return len(r.dialed()) }
	}},
	// As a pooler does that has let the client in, and has no server for it.
	{"statements", func(r *relay, code, says string) func() int {
		told := make(chan bool, 1<<16)
		r.answerStatements(func(string) []byte {
			told <- true
			return fatal(code, says)
		})
		r.cut(fatal(code, says))
		return func() int { return len(told) }
	}},
}

func (r *relay) heal() {
	r.answerDials(nil)
	r.answerStatements(nil)
}

// waitThrough has all refusalWays wait for a key each, through the relay, and returns when they do. Each has a
// pool of its own, so that it is its own wait that goes on.
func waitThrough(t *testing.T, d driver, r *relay, logger advisory.Option) *refusedWaits {
	t.Helper()
	waits := &refusedWaits{ended: map[string]chan error{}}
	for _, w := range refusalWays {
		waits.keys = append(waits.keys, advisory.Name(t.Name()+w.name))
	}
	waits.release = holdAll(t, adminDB(t), waits.keys)
	ctx := soon(t)
	for i, w := range refusalWays {
		result := make(chan error, 1)
		waits.ended[w.name] = result
		db := d.open(t, r.dsn)
		go func() { result <- w.with(ctx, db, waits.keys[i], noWork, logger) }()
	}
	for _, key := range waits.keys {
		waitForWaiters(t, adminDB(t), key, 1)
	}
	return waits
}

// refusedWaits are the waits of all refusalWays.
type refusedWaits struct {
	keys    []advisory.Key        // of each way
	ended   map[string]chan error // by the way's name
	release func()                // lets them have their locks
}

// over counts those that have ended.
func (waits *refusedWaits) over() (n int) {
	for _, result := range waits.ended {
		n += len(result)
	}
	return n
}

// wantNoneOver fails the test for each that has ended.
func (waits *refusedWaits) wantNoneOver(t *testing.T) {
	t.Helper()
	for name, result := range waits.ended {
		select {
		case err := <-result:
			t.Errorf("%s has not gone on: %v", name, err)
			result <- err
		default:
		}
	}
}

// wantGranted fails the test unless all of them end well.
func (waits *refusedWaits) wantGranted(t *testing.T) {
	t.Helper()
	for name, result := range waits.ended {
		if err := await(t, name+" returns", result); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestWaitGoesOnOverWhatPoolersSay(t *testing.T) {
	t.Parallel()
	bothAtOnce(t, func(t *testing.T, d driver) {
		for _, how := range refusals {
			t.Run(how.name, func(t *testing.T) {
				allAtOnce(t, passing, refused.name, func(t *testing.T, p refused) {
					testWaitGoesOn(t, d, how, p)
				})
			})
		}
	})
}

// testWaitGoesOn refuses the waits for some time.
func testWaitGoesOn(t *testing.T, d driver, how refusal, p refused) {
	allowLog(t, clientGone)
	r := newRelay(t, server)
	log := newLogbook()
	waits := waitThrough(t, d, r, log.option())
	times := how.begin(r, p.code, p.says)
	waitFor(t, "they are refused", func() (bool, error) {
		return times() >= 3*len(refusalWays) || waits.over() > 0, nil
	})
	waits.wantNoneOver(t)
	r.heal()
	healed := time.Now()
	for i, w := range refusalWays {
		if len(waits.ended[w.name]) == 0 {
			waitForWaiters(t, adminDB(t), waits.keys[i], 1)
		}
	}
	if took := time.Since(healed); took > 10*time.Second {
		t.Errorf("they wait again only after %v", took)
	}
	waits.release()
	waits.wantGranted(t)
	if t.Failed() {
		t.Log(strings.Join(log.lines(), "\n"))
	}
	for _, key := range waits.keys {
		wantFree(t, adminDB(t), key)
	}
}

// A wait has nothing to wait for if the server will say the same for ever. Lead, which a program
// calls once, goes on.
func TestWaitEndsWithWhatWillNotPass(t *testing.T) {
	t.Parallel()
	bothAtOnce(t, func(t *testing.T, d driver) {
		allAtOnce(t, staying, refused.name, func(t *testing.T, s refused) {
			allowLog(t, clientGone)
			r := newRelay(t, server)
			waits := waitThrough(t, d, r, newLogbook().option())
			refusals[0].begin(r, s.code, s.says)
			began := time.Now()
			var g errgroup.Group
			for name, result := range waits.ended {
				if name != leadOnce.name {
					g.Go(func() error { return s.awaitEnd(name, result, began) })
				}
			}
			if err := g.Wait(); err != nil {
				t.Error(err)
			}
			lead := waits.ended[leadOnce.name]
			if len(lead) > 0 {
				t.Errorf("Lead: %v", <-lead)
			}
			r.heal()
			waitForWaiters(t, adminDB(t), advisory.Name(t.Name()+leadOnce.name), 1)
		})
	})
}

// awaitEnd returns an error unless the wait of this name ends before long, and says why it
// was refused.
func (r refused) awaitEnd(name string, result <-chan error, began time.Time) error {
	select {
	case err := <-result:
		if !isDriverError(err, r.code) || !strings.Contains(err.Error(), r.says) || errors.Is(err, advisory.ErrNotAcquired) {
			return fmt.Errorf("%s: error %v, want the server's", name, err)
		}
	case <-time.After(5 * time.Second):
		return fmt.Errorf("%s goes on", name)
	}
	if took := time.Since(began); took > 4*time.Second {
		return fmt.Errorf("%s ended only after %v", name, took)
	}
	return nil
}
