package keyqueue_test

import (
	"errors"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/pgadvisory/advisory/internal/keyqueue"
)

type (
	queue  = keyqueue.Queue[*session]
	waiter = keyqueue.Waiter[*session]
	turn   = keyqueue.Turn[*session]
	grant  = keyqueue.Grant[*session]
)

// script has a queue do what the first of each two strings says, and compares the queue's answer
// with the second. desk.do has the words.
func script(t *testing.T, steps ...string) {
	t.Helper()
	if diff := cmp.Diff(play(new(queue), time.Unix(0, 0), steps)); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

// play has q do the steps of a script. It returns what the script wants, and what q answers.
func play(q *queue, now time.Time, steps []string) (want, got []string) {
	d := &desk{q: q, now: now, on: new(session), waiters: make(map[string]*waiter), grants: make(map[string]grant)}
	for i := 0; i < len(steps); i += 2 {
		want = append(want, steps[i]+" -> "+steps[i+1])
		got = append(got, steps[i]+" -> "+d.do(steps[i]))
	}
	return want, got
}

// A desk tells a queue in words what happens.
type desk struct {
	q       *queue
	now     time.Time
	on      *session // the next grant is on it
	waiters map[string]*waiter
	names   []string         // of the waiters, in the order in which they came
	grants  map[string]grant // that each waiter has, or looks at
}

var actionNames = map[keyqueue.Action]string{
	keyqueue.Await: "await", keyqueue.Hold: "hold", keyqueue.Ask: "ask", keyqueue.Look: "look", keyqueue.Refuse: "refuse",
}

// do does one step. It returns the queue's answer, and the turns that others get.
//
//	19ms                         time goes by
//	a in [shared] [dedicated] [nowait]
//	a in idle [shared]           Enter, if the queue is Idle
//	a granted [20ms ago]         Granted, of what was asked for now or then, or GrantedDedicated
//	a refused                    the server refuses it
//	a gives up                   Done
//	a fails                      the same, with an error
//	away                         Refuse, with an error
//	a sees others                Looked; a sees nobody: there are no others
//	a sees others, as of b       the same, of the grant that b has or had
//	a cancels                    Cancel
//	a releases                   Release, or Done of a dedicated one
//	a unlocked                   Unlocked
//	lost                         the session with the grant dies
//	another lost                 another session dies
//	idle, held                   Idle, Held
func (d *desk) do(step string) string {
	answer := d.tell(strings.Fields(step))
	var turns []string
	for _, name := range d.names {
		select {
		case tn := <-d.waiters[name].Turns:
			turns = append(turns, name+": "+d.turn(name, tn))
		default:
		}
	}
	if answer != "" && len(turns) > 0 {
		answer += "; "
	}
	return answer + strings.Join(turns, ", ")
}

func (d *desk) tell(words []string) string {
	if pause, err := time.ParseDuration(words[0]); err == nil {
		d.now = d.now.Add(pause)
		return ""
	}
	switch strings.Join(words, " ") {
	case "lost":
		d.q.Lost(d.on, d.now)
		d.on = new(session)
		return ""
	case "another lost":
		d.q.Lost(new(session), d.now)
		return ""
	case "away":
		d.q.Refuse(errFails)
		return ""
	case "idle":
		return strconv.FormatBool(d.q.Idle())
	case "held":
		return strconv.FormatBool(d.q.Held())
	}
	name, verb := words[0], words[1]
	has := func(word string) bool { return slices.Contains(words, word) }
	w := d.waiters[name]
	switch verb {
	case "in":
		w = &waiter{Shared: has("shared"), Dedicated: has("dedicated"), NoWait: has("nowait")}
		d.waiters[name] = w
		d.names = append(d.names, name)
		if has("idle") {
			return strconv.FormatBool(d.q.Idle() && d.q.Enter(w, d.now).To == keyqueue.Ask)
		}
		return d.turn(name, d.q.Enter(w, d.now))
	case "granted":
		if w.Dedicated {
			d.q.GrantedDedicated(w)
			return ""
		}
		at := d.now
		if has("ago") {
			ago, _ := time.ParseDuration(words[2])
			at = at.Add(-ago)
		}
		d.grants[name] = d.q.Granted(d.on, at, d.now)
	case "refused":
		d.q.Refused()
	case "gives":
		d.q.Done(w, d.now, nil)
	case "fails":
		d.q.Done(w, d.now, errFails)
	case "sees":
		of := name
		if has("of") {
			of = words[len(words)-1]
		}
		return d.turn(name, d.q.Looked(w, d.grants[of], strings.HasPrefix(words[2], "others"), d.now))
	case "cancels":
		return strconv.FormatBool(d.q.Cancel(w, d.now))
	case "releases":
		if w.Dedicated {
			d.q.Done(w, d.now, nil)
		} else if d.q.Release(d.grants[name], d.now) {
			return "unlock"
		}
	case "unlocked":
		d.q.Unlocked(d.grants[name], d.now)
	default:
		return "the desk does not know: " + verb
	}
	return ""
}

var errFails = errors.New("it fails")

// turn notes the turn that a waiter gets.
func (d *desk) turn(name string, tn turn) string {
	if tn.To == keyqueue.Hold || tn.To == keyqueue.Look {
		d.grants[name] = tn.Grant
	}
	if tn.Why != nil {
		return "refuse: " + tn.Why.Error()
	}
	return actionNames[tn.To]
}
