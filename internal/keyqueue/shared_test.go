package keyqueue_test

import "testing"

func TestSharedOnesShareOneLockOfTheServer(t *testing.T) {
	t.Parallel()
	script(t,
		"a in shared", "ask",
		"b in shared", "await", // for the same answer
		"c in shared", "await",
		"a granted", "b: hold, c: hold",
		"d in shared", "hold",
		"a releases", "",
		"d releases", "",
		"b releases", "",
		"c releases", "unlock",
		"c unlocked", "",
		"idle", "true",
	)
}

func TestAReaderDoesNotOvertakeAWriterThatWaits(t *testing.T) {
	t.Parallel()
	script(t,
		"a in shared", "ask",
		"a granted", "",
		"w in", "await",
		"b in shared", "await",
		"c in shared nowait", "refuse",
		"a releases", "unlock",
		"a unlocked", "w: ask",
		"w granted", "",
		"w releases", "unlock",
		"w unlocked", "b: ask",
	)
}

func TestAWriterThatGivesUpLetsTheReadersIn(t *testing.T) {
	t.Parallel()
	script(t,
		"a in shared", "ask",
		"a granted", "",
		"w in", "await",
		"b in shared", "await",
		"c in shared", "await",
		"w cancels", "true; b: hold, c: hold",
	)
}

// A lock that readers take in turns would never go back to a writer of another process.
func TestAReaderLooksWhetherOthersWaitWhenTheTimeIsOver(t *testing.T) {
	t.Parallel()
	script(t,
		"a in shared", "ask",
		"a granted", "",
		"20ms", "",
		"b in shared", "look",
		"c in shared", "await", // for the same answer
		"b sees nobody", "hold; c: hold",
		"19ms", "",
		"d in shared", "hold",
		"1ms", "",
		"e in shared", "look",
		"f in shared", "await",
		"e sees others", "await",
		"g in shared", "await",
		"a releases", "",
		"b releases", "",
		"c releases", "",
		"d releases", "unlock",
		"d unlocked", "e: ask", // the first of them still
		"e granted", "f: hold, g: hold",
	)
}

// The next grant is not closed because others waited for the last one.
func TestOthersCloseOneGrantOnly(t *testing.T) {
	t.Parallel()
	for _, end := range [][2]string{{"a unlocked", "b: ask"}, {"lost", "b: ask"}} {
		script(t,
			"a in shared", "ask",
			"a granted", "",
			"20ms", "",
			"b in shared", "look",
			"b sees others", "await",
			"a releases", "unlock",
			end[0], end[1],
			"b granted", "",
			"c in shared", "hold",
		)
	}
}

func TestOneWhoLooksAsksWhenTheLockHasGoneMeanwhile(t *testing.T) {
	t.Parallel()
	t.Run("back", func(t *testing.T) {
		t.Parallel()
		script(t,
			"a in shared", "ask",
			"a granted", "",
			"20ms", "",
			"b in shared", "look",
			"c in", "await",
			"a releases", "unlock",
			"b sees nobody", "await",
			"a unlocked", "b: ask",
			"b granted", "",
			"b releases", "unlock",
			"b unlocked", "c: ask",
		)
	})
	t.Run("lost", func(t *testing.T) {
		t.Parallel()
		script(t,
			"a in shared", "ask",
			"a granted", "",
			"20ms", "",
			"b in shared", "look",
			"c in", "await",
			"lost", "",
			"b sees nobody", "await; b: ask",
			"b granted", "",
		)
	})
	// One who does not wait would be the first to get it.
	t.Run("back, NoWait", func(t *testing.T) {
		t.Parallel()
		script(t,
			"a in shared", "ask",
			"a granted", "",
			"20ms", "",
			"b in shared nowait", "look",
			"a releases", "unlock",
			"b sees nobody", "await",
			"a unlocked", "b: ask",
		)
	})
	// Others wait for a lock that this process does not have any more.
	t.Run("lost, and others wait", func(t *testing.T) {
		t.Parallel()
		script(t,
			"a in shared", "ask",
			"a granted", "",
			"20ms", "",
			"b in shared nowait", "look",
			"c in", "await",
			"lost", "",
			"b sees others", "refuse; c: ask",
		)
	})
}
