package keyqueue_test

import "testing"

func TestTheHoldersOfALostSessionHoldUpNobody(t *testing.T) {
	t.Parallel()
	script(t,
		"a in", "ask",
		"a granted", "",
		"b in", "await",
		"c in", "await",
		"lost", "b: ask",
		"a releases", "", // it is not b's lock that it unlocks
		"b granted", "",
		"b releases", "c: hold",
	)
	script(t,
		"a in", "ask",
		"a granted", "",
		"b in", "await",
		"20ms", "",
		"a releases", "unlock",
		"lost", "b: ask",
		"b granted", "",
		"a unlocked", "", // comes too late
		"c in", "await",
	)
}

func TestAnotherSessionsLossChangesNothing(t *testing.T) {
	t.Parallel()
	script(t,
		"a in", "ask",
		"another lost", "",
		"b in", "await",
		"a granted", "",
		"another lost", "",
		"a releases", "b: hold",
		"another lost", "",
		"b releases", "unlock",
		"another lost", "",
		"c in", "await",
		"b unlocked", "c: ask",
	)
}

// The number tells two grants on one session apart.
func TestASecondReleaseIsNotThatOfTheNext(t *testing.T) {
	t.Parallel()
	script(t,
		"a in shared", "ask",
		"a granted", "",
		"a releases", "unlock",
		"a unlocked", "",
		"a releases", "",
		"b in shared", "ask",
		"b granted", "", // on the same session
		"a releases", "",
		"a unlocked", "",
		"c in shared", "hold",
		"b releases", "",
		"c releases", "unlock",
		"c unlocked", "",
		"idle", "true",
	)
}

func TestALookAtAnotherGrantSaysNothingOfThisOne(t *testing.T) {
	t.Parallel()
	script(t,
		"a in shared", "ask",
		"a granted", "",
		"a releases", "unlock",
		"a unlocked", "",
		"b in shared", "ask",
		"b granted", "",
		"20ms", "",
		"c in shared", "look",
		"c sees others, as of a", "await; c: look", // b's is not closed
		"c sees nobody, as of a", "await; c: look", // and c does not have it
		"c sees nobody", "hold",
	)
}

// The old holders come back while the new one has the lock.
func TestTheReleaseOfALostGrantIsNotThatOfTheNext(t *testing.T) {
	t.Parallel()
	script(t,
		"a in shared", "ask",
		"a granted", "",
		"b in shared", "hold",
		"lost", "",
		"c in shared", "ask",
		"c granted", "",
		"a releases", "",
		"b releases", "",
		"c releases", "unlock",
		"b unlocked", "",
		"idle", "false",
		"c unlocked", "",
		"idle", "true",
	)
}
