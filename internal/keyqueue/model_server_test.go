package keyqueue_test

import "slices"

// A claim is what a session has of the server's lock, or waits for.
type claim struct{ shared bool }

func (c *claim) conflicts(d *claim) bool { return !c.shared || !d.shared }

// A server is the server's lock of one key, and its queue.
type server struct{ holders, line []*claim }

func (s *server) try(c *claim) bool {
	if slices.ContainsFunc(s.holders, c.conflicts) || slices.ContainsFunc(s.line, c.conflicts) {
		return false
	}
	s.holders = append(s.holders, c)
	return true
}

func (s *server) wait(c *claim) {
	s.line = append(s.line, c)
	s.serve()
}

func (s *server) serve() {
	for i := 0; i < len(s.line); {
		c := s.line[i]
		if slices.ContainsFunc(s.holders, c.conflicts) || slices.ContainsFunc(s.line[:i], c.conflicts) {
			i++
			continue
		}
		s.line = slices.Delete(s.line, i, i+1)
		s.holders = append(s.holders, c)
	}
}

func (s *server) holds(c *claim) bool { return slices.Contains(s.holders, c) }

func (s *server) drop(c *claim) {
	is := func(d *claim) bool { return d == c }
	s.holders = slices.DeleteFunc(s.holders, is)
	s.line = slices.DeleteFunc(s.line, is)
	s.serve()
}

// A session is what a lock is granted on. It has at most one lock of the key. It dies in three
// steps, in any order that the clients can bring about.
type session struct {
	claim *claim // nil: it has none
	dead  bool   // the server knows, and has freed the lock
	lost  bool   // its owner knows
	told  bool   // the queue knows
}

func (s *session) alive() bool { return !s.dead && !s.lost }

// other is what another process does.
func (t *trial) other() {
	if len(t.others) < t.busy && !t.calm && t.of100(40) {
		t.comes(&claim{shared: t.of100(t.sharing)})
		return
	}
	if len(t.others) > 0 && (t.calm || t.of100(30)) { // it releases, or gives up
		i := t.rng.IntN(len(t.others))
		t.server.drop(t.others[i])
		t.others = slices.Delete(t.others, i, i+1)
		t.say("another process goes")
	}
}

func (t *trial) comes(c *claim) {
	t.others = append(t.others, c)
	t.server.wait(c)
	t.say("another process comes, shared %v", c.shared)
}

// lose takes one step in a session's death.
func (t *trial) lose() {
	for _, c := range t.clients {
		if c.w.Dedicated && c.phase == atHold && c.claim != nil && t.of100(30) {
			t.server.drop(c.claim)
			c.claim = nil
			t.say("%v loses its session", c)
			return
		}
	}
	if len(t.sessions) == 0 {
		return
	}
	s := t.sessions[t.rng.IntN(len(t.sessions))]
	switch {
	case !s.dead && t.of100(50):
		t.free(s)
	case !s.lost:
		t.mark(s)
	case !s.told:
		t.tell(s)
	case !s.dead:
		t.free(s)
	}
}

// free has the server end s.
func (t *trial) free(s *session) {
	t.say("the server ends a session")
	s.dead = true
	if s.claim != nil {
		t.server.drop(s.claim)
		s.claim = nil
	}
	t.forget(s)
}

// mark has the owner of s know.
func (t *trial) mark(s *session) {
	if s.lost {
		return
	}
	t.say("a session is lost")
	s.lost = true
	if t.shared == s {
		t.shared = nil
	}
}

// tell has the queue know.
func (t *trial) tell(s *session) {
	t.say("lost")
	s.told = true
	if t.lock != nil && t.lock.On == s {
		if t.holders() > 0 {
			t.seen["lost: holders"]++
		}
		if t.lock.releases {
			t.seen["lost: goes back"]++
		}
		if t.requester != nil {
			t.seen["lost: looker"]++
		}
		if slices.ContainsFunc(t.clients, func(c *client) bool { return c.w.Dedicated && t.inside(c) }) {
			t.seen["lost: dedicated inside"]++
		}
		t.lock = nil
	} else if t.requester != nil {
		t.seen["lost: requester"]++
	}
	t.q.Lost(s, t.now)
	t.collect()
	t.forget(s)
}

func (t *trial) forget(s *session) {
	if s.dead && s.told {
		t.sessions = slices.DeleteFunc(t.sessions, func(o *session) bool { return o == s })
	}
}

func (t *trial) newSession(c *claim) *session {
	s := &session{claim: c}
	t.sessions = append(t.sessions, s)
	if t.shared == nil {
		t.shared = s
	}
	return s
}

// unlockServer gives the server its lock back.
func (t *trial) unlockServer(s *session) {
	if !s.alive() {
		t.mark(s)
		return
	}
	t.must(s.claim != nil && t.server.holds(s.claim), "a lock is unlocked that is not held")
	for _, c := range t.clients {
		t.must(!t.holdsGrant(c) || c.lock.On != s, "the lock is unlocked while %v holds it", c)
	}
	t.server.drop(s.claim)
	s.claim = nil
	if t.shared == s && t.of100(30) { // it was the last lock on it
		used := slices.ContainsFunc(t.clients, func(c *client) bool { return c.on == s && (c.phase == atTrying || c.phase == atLate) })
		if !used {
			t.shared = nil
		}
	}
}
