package keyqueue_test

import "testing"

func TestNoWaitIsRefusedAtOnce(t *testing.T) {
	t.Parallel()
	script(t,
		"a in nowait", "ask", // nobody knows
		"b in nowait", "refuse",
		"c in shared nowait", "refuse",
		"a granted", "",
		"d in nowait", "refuse",
		"a releases", "unlock",
		"e in nowait", "refuse", // the server has it still
		"a unlocked", "",
		"f in nowait", "ask",
		"f gives up", "",
		"idle", "true",
	)
}

func TestASharedNoWaitWaitsForTheAnswerOfAnother(t *testing.T) {
	t.Parallel()
	script(t,
		"a in shared", "ask",
		"b in nowait", "refuse", // it could not share a's lock
		"c in shared nowait", "await",
		"a granted", "c: hold",
	)
	script(t,
		"a in shared", "ask",
		"b in shared nowait", "await",
		"c in shared", "await",
		"a refused", "b: refuse", // the others wait on
		"d in nowait", "refuse",
		"a granted", "c: hold",
	)
	script(t,
		"a in shared", "ask",
		"b in shared nowait", "await",
		"a gives up", "b: ask", // there was none
	)
}

// All of them go, wherever they are in line.
func TestARefusalIsForAllWhoDoNotWait(t *testing.T) {
	t.Parallel()
	script(t,
		"a in shared", "ask",
		"b in shared nowait", "await",
		"x in shared", "await",
		"c in shared nowait", "await",
		"y in", "await",
		"z in shared nowait", "refuse", // y goes first, and is exclusive
		"a refused", "b: refuse, c: refuse",
		"b cancels", "false",
		"y cancels", "true",
		"d in shared", "await",
		"a granted", "x: hold, d: hold",
	)
}

// The error of the one that asks is that of all who share its answer, a refusal too. None of them asks again.
func TestAFailureIsForAllWhoDoNotWait(t *testing.T) {
	t.Parallel()
	script(t,
		"a in shared nowait", "ask",
		"b in shared nowait", "await",
		"c in shared nowait", "await",
		"d in shared", "await",
		"a fails", "b: refuse: it fails, c: refuse: it fails, d: ask",
		"e in shared nowait", "await",
		"d gives up", "e: ask", // its own affair
	)
	script(t,
		"a in shared", "ask",
		"a granted", "",
		"20ms", "",
		"b in shared", "look",
		"c in shared nowait", "await",
		"d in shared nowait", "await",
		"lost", "",
		"b sees others", "await; b: ask, c: refuse, d: refuse",
	)
}

// A refusal from outside is for all who do not wait, and for nobody else.
func TestARefusalFromOutside(t *testing.T) {
	t.Parallel()
	script(t,
		"a in shared", "ask",
		"b in shared nowait", "await",
		"c in shared", "await",
		"d in shared nowait", "await",
		"away", "b: refuse: it fails, d: refuse: it fails",
		"a granted", "c: hold",
	)
}

// One on a session of its own has its own answer.
func TestADedicatedNoWaitSharesNoAnswer(t *testing.T) {
	t.Parallel()
	script(t,
		"a in shared", "ask",
		"b in shared", "await",
		"c in shared nowait dedicated", "refuse",
		"b cancels", "true",
		"d in shared nowait dedicated", "ask",
	)
}

// The server has answered: another process holds the lock, and for how long nobody knows.
func TestASharedNoWaitDoesNotWaitForOneInTheServersQueue(t *testing.T) {
	t.Parallel()
	script(t,
		"a in shared", "ask",
		"a refused", "",
		"b in shared nowait", "refuse",
	)
}

// A refusal says nothing of the next request.
func TestARefusalIsOfOneRequest(t *testing.T) {
	t.Parallel()
	script(t,
		"a in shared", "ask",
		"a refused", "",
		"a gives up", "",
		"b in shared", "ask",
		"c in shared nowait", "await",
		"b granted", "c: hold",
	)
	script(t,
		"a in shared", "ask",
		"a refused", "",
		"a granted", "",
		"20ms", "",
		"b in shared", "look",
		"c in shared nowait", "await",
		"b sees nobody", "hold; c: hold",
	)
}

// The answer is that others wait, behind the holders of this process.
func TestASharedNoWaitDoesNotWaitForTheHoldersOfALockThatOthersWaitFor(t *testing.T) {
	t.Parallel()
	for _, kind := range []struct{ looks, answer string }{
		{"b in shared", "await; c: refuse"},
		{"b in shared nowait", "refuse; c: refuse"},
	} {
		script(t,
			"a in shared", "ask",
			"a granted", "",
			"20ms", "",
			kind.looks, "look",
			"c in shared nowait", "await",
			"b sees others", kind.answer,
		)
	}
}
