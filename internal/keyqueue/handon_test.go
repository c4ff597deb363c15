package keyqueue_test

import "testing"

func TestTheFirstOneAsksTheServerAndTheOthersWait(t *testing.T) {
	t.Parallel()
	script(t,
		"a in", "ask",
		"b in", "await",
		"c in shared", "await",
		"a granted", "",
		"d in", "await",
		"a releases", "b: hold",
	)
}

func TestAReleasedLockIsHandedToTheNextInLine(t *testing.T) {
	t.Parallel()
	script(t,
		"a in", "ask",
		"a granted", "",
		"b in", "await",
		"c in", "await",
		"a releases", "b: hold",
		"b releases", "c: hold",
		"c releases", "unlock", // nobody is left
		"idle", "false",
		"c unlocked", "",
		"idle", "true",
	)
}

// Other processes wait in the server's queue, and have no part in the hand-off.
func TestALockIsNotHandedOnAfterItsTime(t *testing.T) {
	t.Parallel()
	script(t,
		"a in", "ask",
		"a granted", "",
		"b in", "await",
		"c in", "await",
		"19ms", "",
		"a releases", "b: hold",
		"1ms", "",
		"b releases", "unlock",
		"d in", "await", // behind c, and after the unlock
		"b unlocked", "c: ask",
	)
}

func TestTheTimeOfTheHandOffCountsFromWhenTheGrantWasAskedFor(t *testing.T) {
	t.Parallel()
	script(t,
		"a in", "ask",
		"b in", "await",
		"a granted 20ms ago", "",
		"a releases", "unlock",
	)
}

func TestALockOfTheOtherModeIsNotHandedOn(t *testing.T) {
	t.Parallel()
	for _, test := range [][2]string{{"", " shared"}, {" shared", ""}} {
		script(t,
			"a in"+test[0], "ask",
			"a granted", "",
			"b in"+test[1], "await",
			"a releases", "unlock",
			"a unlocked", "b: ask",
		)
	}
}

func TestATurnThatIsGivenBackIsTheNextOnes(t *testing.T) {
	t.Parallel()
	t.Run("hold", func(t *testing.T) {
		t.Parallel()
		script(t,
			"a in", "ask",
			"a granted", "",
			"b in", "await",
			"c in", "await",
			"a releases", "b: hold",
			"b cancels", "false",
			"b releases", "c: hold",
		)
	})
	t.Run("ask", func(t *testing.T) {
		t.Parallel()
		script(t,
			"a in", "ask",
			"b in", "await",
			"c in", "await",
			"a gives up", "b: ask",
			"b cancels", "false",
			"b gives up", "c: ask",
		)
	})
	t.Run("look", func(t *testing.T) {
		t.Parallel()
		script(t,
			"a in shared", "ask",
			"a granted", "",
			"w in", "await",
			"b in shared", "await",
			"c in shared", "await",
			"20ms", "",
			"w cancels", "true; b: look",
			"b cancels", "false",
			"b gives up", "c: look",
			"c sees nobody", "hold",
		)
	})
}

// One who cancels in the middle of the line leaves the order of the others as it is.
func TestOneWhoCancelsHoldsUpNobody(t *testing.T) {
	t.Parallel()
	script(t,
		"a in", "ask",
		"b in", "await",
		"c in", "await",
		"d in", "await",
		"c cancels", "true",
		"c cancels", "false",
		"a granted", "",
		"a releases", "b: hold",
		"b releases", "d: hold",
		"d releases", "unlock",
		"d unlocked", "",
		"idle", "true",
	)
	script(t,
		"a in", "ask",
		"a granted", "",
		"b in", "await",
		"b cancels", "true", // the only one
		"c in", "await",
		"a releases", "c: hold",
	)
}

func TestOneForSeveralLocksEntersOnlyWhereNobodyIs(t *testing.T) {
	t.Parallel()
	script(t,
		"a in idle shared", "true",
		"b in idle", "false",
		"c in shared", "await",
		"a granted", "c: hold",
		"d in idle shared", "false",
		"a releases", "",
		"c releases", "unlock",
		"e in idle", "false",
		"c unlocked", "",
		"f in idle", "true",
		"g in shared", "await", // f asks for the other mode
		"f granted", "",
		"f releases", "unlock",
		"f unlocked", "g: ask",
	)
}

// A message that says "held by this process" stands on it.
func TestHeld(t *testing.T) {
	t.Parallel()
	script(t,
		"held", "false",
		"a in shared", "ask",
		"held", "false", // nobody knows yet
		"a granted", "",
		"held", "true",
		"a releases", "unlock",
		"held", "true", // the server has it still
		"a unlocked", "",
		"held", "false",
		"b in dedicated", "ask",
		"held", "false", // nobody knows yet
		"b granted", "",
		"held", "true",
		"b releases", "",
		"held", "false",
		"b in dedicated", "ask",
		"b gives up", "",
		"held", "false",
	)
}
