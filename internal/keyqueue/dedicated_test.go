package keyqueue_test

import "testing"

func TestADedicatedOneHoldsUpOnlyThoseItConflictsWith(t *testing.T) {
	t.Parallel()
	script(t,
		"a in shared dedicated", "ask",
		"b in shared dedicated", "ask", // each for itself
		"c in shared", "ask",
		"w in dedicated", "await",
		"c granted", "",
		"c releases", "unlock",
		"c unlocked", "",
		"a releases", "",
		"b releases", "w: ask",
		"d in", "await",
		"e in nowait", "refuse",
		"w releases", "d: ask",
	)
	script(t,
		"a in shared", "ask",
		"b in shared dedicated", "ask", // it does not wait for a's answer
		"w in dedicated", "await",
		"a gives up", "",
		"b releases", "w: ask",
	)
	script(t,
		"a in dedicated", "ask",
		"b in shared dedicated", "await",
		"c in shared", "await",
		"a releases", "b: ask, c: ask",
	)
	script(t,
		"a in", "ask",
		"b in shared dedicated", "await",
		"c in idle", "false",
		"a gives up", "b: ask",
		"c in idle", "false",
		"b releases", "",
		"idle", "true",
	)
}

func TestADedicatedOneThatGivesUpIsNotInsideAnyMore(t *testing.T) {
	t.Parallel()
	script(t,
		"a in", "ask",
		"b in dedicated", "await",
		"c in", "await",
		"a gives up", "b: ask",
		"b cancels", "false",
		"b gives up", "c: ask",
		"c gives up", "",
		"idle", "true",
	)
}

// It takes the lock on another session than the grant is on.
func TestTheGrantGoesBackBeforeADedicatedOne(t *testing.T) {
	t.Parallel()
	script(t,
		"a in", "ask",
		"a granted", "",
		"b in dedicated", "await",
		"a releases", "unlock",
		"a unlocked", "b: ask",
		"b releases", "",
		"idle", "true",
	)
	// It may come in beside holders of the grant, which does not go back before they do.
	script(t,
		"a in shared", "ask",
		"a granted", "",
		"w in", "await",
		"b in shared dedicated", "await",
		"c in shared", "await",
		"w cancels", "true; b: ask, c: hold",
		"a releases", "",
		"c releases", "unlock",
		"d in shared dedicated", "await",
		"c unlocked", "d: ask",
	)
}

// w comes after the grant's holder and after the dedicated one, whichever goes first.
func TestAWriterWaitsForTheGrantAndForTheDedicatedOnes(t *testing.T) {
	t.Parallel()
	script(t,
		"a in shared", "ask",
		"a granted", "",
		"b in shared dedicated", "ask",
		"w in", "await",
		"c in shared", "await",
		"a releases", "unlock",
		"a unlocked", "",
		"b releases", "w: ask",
		"w granted", "",
		"w releases", "unlock",
		"w unlocked", "c: ask",
	)
	script(t,
		"a in shared", "ask",
		"a granted", "",
		"b in shared dedicated", "ask",
		"w in", "await",
		"b releases", "",
		"a releases", "unlock",
		"a unlocked", "w: ask",
	)
}
