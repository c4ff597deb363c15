package advisory

import (
	"database/sql/driver"
	"math"
	"net"
	"reflect"
	"sync"
	"time"
)

// A guard breaks off a statement that is not answered in time. There is one for each
// session, with one timer.
//
// database/sql's way is to end the statement's context. But for that, lib/pq starts a
// goroutine for every statement, and then reads on for as long as the network keeps it
// waiting. A goroutine of our own beside each statement would return in time, and costs a
// third of an uncontended lock's time on two cores, because waking it takes the processor
// that the server needs. So where the driver is known, its connection is broken off
// instead, and the statement runs on the caller's goroutine.
type guard struct {
	breaker
	dc any // the driver's connection

	mu     sync.Mutex // guards the rest
	timer  *time.Timer
	fires  time.Time     // when the timer does; zero: it does not
	no     uint64        // of the statement
	under  bool          // it is under way
	until  time.Time     // zero: it is not bounded
	next   time.Duration // bounds the next ones; zero: it does not
	cancel func(error)   // breaks it off; nil: that is for breaks
	cause  error         // why it was broken off
}

// A breaker is how the statement under way on a driver's connection is broken off.
type breaker struct {
	// breaks breaks off dc, so that the statement returns with an error. nil: the driver is
	// not known.
	breaks func(dc any)

	// longest is the length of the longest statement, in bytes, for which that is certain.
	longest int
}

// begin begins to guard a statement. A bound of 0 is none.
func (g *guard) begin(bound time.Duration, cancel func(error)) (no uint64) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.no++
	g.under, g.until, g.cancel, g.cause = true, time.Time{}, cancel, nil
	if g.next > 0 && (bound == 0 || bound > g.next) {
		bound = g.next
	}
	if bound > 0 {
		g.bound(bound)
	}
	return g.no
}

// bound sees to it that expire is called at the end of d, or before. The timer is not stopped
// when a statement ends, nor put off for the next one: each time, that may have to wake a thread.
func (g *guard) bound(d time.Duration) {
	g.until = time.Now().Add(d)
	switch {
	case g.timer == nil:
		g.timer = time.AfterFunc(d, g.expire)
	case g.fires.IsZero() || g.until.Before(g.fires):
		g.timer.Reset(d)
	default:
		return
	}
	g.fires = g.until
}

// expire breaks off a statement that is not answered in time.
func (g *guard) expire() {
	g.mu.Lock()
	g.fires = time.Time{}
	if !g.under || g.until.IsZero() {
		g.mu.Unlock()
		return
	}
	left := time.Until(g.until)
	if left > 0 { // of an older statement
		g.bound(left)
	}
	no := g.no
	g.mu.Unlock()
	if left <= 0 {
		g.interrupt(no, errOverdue)
	}
}

// interrupt breaks off the statement under way, if there is one, and it is number no, or no is 0.
func (g *guard) interrupt(no uint64, cause error) {
	g.mu.Lock()
	if !g.under || g.cause != nil || no != 0 && no != g.no {
		g.mu.Unlock()
		return
	}
	g.cause = cause // nothing more is sent over the connection
	cancel, breaks, dc := g.cancel, g.breaks, g.dc
	g.mu.Unlock()
	if cancel != nil {
		cancel(cause)
	} else {
		breaks(dc) // the driver's: no lock is held
	}
}

// hurry leaves no more than d to the statement under way.
func (g *guard) hurry(d time.Duration) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.under && (g.until.IsZero() || time.Until(g.until) > d) {
		g.bound(d)
	}
}

// hurryAll is hurry for the next ones, too, until calm is called.
func (g *guard) hurryAll(d time.Duration) {
	g.mu.Lock()
	g.next = d
	g.mu.Unlock()
	g.hurry(d)
}

func (g *guard) calm() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.next = 0
}

// end ends the statement. It returns why it was broken off, if it was.
func (g *guard) end() error {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.under, g.until, g.cancel = false, time.Time{}, nil
	return g.cause
}

// breakers finds how a driver's connection is broken off, by the driver's type.
var breakers sync.Map // reflect.Type → breaker

// watchOver has the guard break off dc itself, if its driver is known.
func (g *guard) watchOver(dc any) {
	t := reflect.TypeOf(dc)
	found, ok := breakers.Load(t)
	if !ok {
		found, _ = breakers.LoadOrStore(t, findBreaker(t))
	}
	g.breaker, g.dc = found.(breaker), dc
}

// findBreaker knows drivers by their connections' types: no driver is imported, and a
// driver wrapped in another is not known. The names of methods are constants, so that the
// linker still drops what a program does not use.
func findBreaker(t reflect.Type) breaker {
	switch {
	case t.Kind() != reflect.Pointer:
	case t.Elem().PkgPath() == "github.com/lib/pq":
		// Close is made to be called while another goroutine reads. But it writes, and so
		// waits for one that writes: as a longer statement may for ever, once the
		// network's buffers are full.
		return breaker{longest: 4096, breaks: func(dc any) {
			if conn, ok := dc.(driver.Conn); ok {
				_ = conn.Close()
			}
		}}
	case isPgx(t):
		// The deadline of the network's connection may be set at any time, which is
		// what pgx itself does when a context ends.
		return breaker{longest: math.MaxInt, breaks: func(dc any) {
			v := reflect.ValueOf(dc).MethodByName("Conn").Call(nil)[0]
			v = v.MethodByName("PgConn").Call(nil)[0]
			v = v.MethodByName("Conn").Call(nil)[0]
			if conn, ok := v.Interface().(net.Conn); ok {
				_ = conn.SetDeadline(time.Unix(1, 0))
			}
		}}
	}
	return breaker{}
}

// pgxBusy tells whether rows are open on a connection of pgx, which hides that in driver.ErrBadConn. ok is
// false with another driver.
func pgxBusy(dc any) (busy, ok bool) {
	if t := reflect.TypeOf(dc); t.Kind() != reflect.Pointer || !isPgx(t) {
		return false, false
	}
	v := reflect.ValueOf(dc).MethodByName("Conn").Call(nil)[0]
	v = v.MethodByName("PgConn").Call(nil)[0]
	if v = v.MethodByName("IsBusy"); !v.IsValid() {
		return false, false
	}
	busy, ok = v.Call(nil)[0].Interface().(bool)
	return busy, ok
}

// isPgx tells whether t has pgx's Conn().PgConn().Conn(), a net.Conn.
func isPgx(t reflect.Type) bool {
	var ok bool
	for _, m := range [...]func(reflect.Type) (reflect.Method, bool){
		func(t reflect.Type) (reflect.Method, bool) { return t.MethodByName("Conn") },
		func(t reflect.Type) (reflect.Method, bool) { return t.MethodByName("PgConn") },
		func(t reflect.Type) (reflect.Method, bool) { return t.MethodByName("Conn") },
	} {
		var method reflect.Method
		if method, ok = m(t); !ok || method.Type.NumIn() != 1 || method.Type.NumOut() != 1 {
			return false
		}
		t = method.Type.Out(0)
	}
	return t == reflect.TypeFor[net.Conn]()
}
