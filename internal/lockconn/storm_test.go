package lockconn_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/pgadvisory/advisory/internal/lockconn"
	"github.com/pgadvisory/advisory/internal/pgsql"
)

var lockCalls = regexp.MustCompile(`pg_(try_)?advisory_(lock|unlock)(_shared)?\((\d+)\)`)

// lockRows are the keys that UnlockHeld looks for.
var lockRows = regexp.MustCompile(`objid OPERATOR\(pg_catalog.=\) '(\d+)'`)

// A stormServer counts each lock, answers at random times, and refuses a try now and then.
type stormServer struct {
	t    *testing.T
	fail func() error // returns the error of a statement, if it is to fail; nil: none does

	mu    sync.Mutex
	rnd   *rand.Rand
	held  map[int64]int
	armed bool
	dead  error
}

func (m *stormServer) do(lock bool, k int64) bool {
	if lock {
		if m.rnd.IntN(10) == 0 {
			return false
		}
		if m.held[k] > 0 {
			m.t.Errorf("key %d is taken twice", k)
		}
		m.held[k]++
		return true
	}
	if m.held[k] == 0 {
		return false
	}
	m.held[k]--
	return true
}

func (m *stormServer) answer(ctx context.Context, q string) (int64, error) {
	m.mu.Lock()
	d := time.Duration(m.rnd.IntN(1500)) * time.Microsecond
	m.mu.Unlock()
	time.Sleep(d)
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.dead != nil {
		return 0, m.dead
	}
	if m.fail != nil && q != "prepare" && q != "deallocate" && !strings.Contains(q, "OFFSET 0") && !strings.HasPrefix(q, "/* advisory") {
		if err := m.fail(); err != nil {
			if !strings.Contains(err.Error(), "server error") {
				m.dead = err
			}
			return 0, err
		}
	}
	if strings.Contains(q, "set_config('advisory.session'") {
		m.armed = true
	}
	if strings.HasPrefix(q, "RESET") {
		m.armed = false
	}
	if strings.Contains(q, "OFFSET 0") {
		n := int64(0)
		for _, row := range lockRows.FindAllStringSubmatch(q, -1) {
			k, _ := strconv.ParseInt(row[1], 10, 64)
			if m.do(false, k) {
				n++
			}
		}
		return n, nil
	}
	calls := lockCalls.FindAllStringSubmatch(q, -1)
	if len(calls) == 0 {
		if strings.Contains(q, "NOT granted") {
			return 0, nil
		}
		return 1, nil
	}
	n := int64(0)
	for _, c := range calls {
		k, _ := strconv.ParseInt(c[4], 10, 64)
		if !m.do(c[2] == "lock", k) {
			if len(calls) > 1 && c[2] == "lock" {
				return n, nil
			}
			return 0, nil
		}
		n++
	}
	if calls[0][2] == "unlock" {
		return 1, nil
	}
	return n, nil
}

func (m *stormServer) batch(ops, keys string) (string, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.dead != nil {
		return "", m.dead
	}
	o := strings.Split(strings.Trim(ops, "{}"), ",")
	k := strings.Split(strings.Trim(keys, "{}"), ",")
	s := ""
	if ops == "{}" {
		return s, nil
	}
	for i := range o {
		if m.fail != nil {
			if err := m.fail(); err != nil {
				if !strings.Contains(err.Error(), "server error") {
					m.dead = err
				}
				return "", err
			}
		}
		n, _ := strconv.ParseInt(k[i], 10, 64)
		if m.do(o[i] == "1", n) {
			s += "1"
		} else {
			s += "0"
		}
	}
	return s, nil
}

// Many ask at random, and leave, on a server that is sound, that fails now and then, or that dies. Nothing is
// held twice, nothing is left over, and the connection ends once.
func TestStormOfRequests(t *testing.T) {
	t.Parallel()
	for _, mode := range []string{"sound", "base", "errors", "gone"} {
		for seed := range uint64(12) {
			t.Run(fmt.Sprint(mode, seed), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					m := &stormServer{t: t, rnd: rand.New(rand.NewPCG(seed, 7)), held: map[int64]int{}}
					srv := &server{rtt: 0, caches: false}
					srv.answer, srv.batch = m.answer, m.batch
					f := newConnOn(t, srv, 0)
					base := mode == "base" || mode == "errors"
					if base {
						for {
							if ok, _ := f.ask(t.Context(), lockconn.Try, id(1000)...); ok {
								break
							}
						}
					}
					switch mode {
					case "errors":
						m.fail = func() error {
							if m.rnd.IntN(15) == 0 {
								return serverError("53200")
							}
							return nil
						}
					case "gone":
						m.fail = func() error {
							if m.rnd.IntN(150) == 0 {
								return io.ErrUnexpectedEOF
							}
							return nil
						}
					}
					var wg sync.WaitGroup
					for w := range 14 {
						r := rand.New(rand.NewPCG(seed, uint64(w)+100))
						wg.Go(func() {
							mine := []int64{int64(10*w + 1), int64(10*w + 2)}
							for range 25 {
								func() {
									if !f.Use() {
										return
									}
									defer f.Leave()
									var keys []pgsql.Key
									for _, k := range mine[:1+r.IntN(2)] {
										keys = append(keys, id(k)...)
									}
									ctx, cancel := context.WithTimeout(t.Context(), time.Duration(r.IntN(3000))*time.Microsecond)
									defer cancel()
									switch r.IntN(8) {
									case 0:
										_, _ = f.ask(ctx, lockconn.Look, keys[:1]...)
										return
									case 1:
										_, err := f.ask(ctx, lockconn.Ping)
										if err != nil && mode != "gone" {
											t.Errorf("ping: %v", err)
										}
										return
									}
									ok, err := f.ask(ctx, lockconn.Try, keys...)
									if err != nil || !ok {
										return
									}
									h := &lockconn.Holder{Heartbeat: 5 * time.Millisecond, IdleTimeout: 15 * time.Millisecond}
									if f.Hold(h) != nil {
										return
									}
									time.Sleep(time.Duration(r.IntN(12000)) * time.Microsecond)
									f.LetGo(h)
									ok, err = f.ask(context.Background(), lockconn.Unlock, keys...)
									if (!ok || err != nil) && mode != "gone" && f.Lost() == nil {
										t.Errorf("unlock: %v, %v", ok, err)
									}
								}()
								time.Sleep(time.Duration(r.IntN(500)) * time.Microsecond)
							}
						})
					}
					wg.Wait()
					m.mu.Lock()
					m.fail = nil
					m.mu.Unlock()
					if base && f.Lost() == nil {
						f.must(t, lockconn.Unlock, id(1000)...)
					}
					f.Leave()
					time.Sleep(30 * time.Second)
					synctest.Wait()
					m.mu.Lock()
					defer m.mu.Unlock()
					if err := f.Lost(); err != nil {
						if mode == "errors" {
							l := srv.lines()
							t.Errorf("lost: %v\n%s", err, strings.Join(l[max(0, len(l)-6):], "\n"))
						}
						if mode == "sound" || mode == "base" {
							// the heartbeat may have been late by two
							if !errors.As(err, new(pgsql.NoAnswer)) && !strings.Contains(err.Error(), "no heartbeat") {
								t.Errorf("lost: %v", err)
							}
						}
						if n := f.db.Stats().OpenConnections; n != 0 {
							t.Errorf("%d open, lost: %v", n, err)
						}
						return
					}
					if s := f.db.Stats(); s.InUse != 0 || s.Idle != 1 {
						if mode != "errors" {
							t.Errorf("%+v", s)
						} else if s.InUse != 0 {
							t.Errorf("%+v", s)
						}
					}
					for k, n := range m.held {
						if n != 0 {
							t.Errorf("key %d held %d", k, n)
						}
					}
					if m.armed {
						t.Error("armed")
					}
					log := strings.Join(srv.lines(), "\n")
					if p, d := strings.Count(log, "prepare"), strings.Count(log, "deallocate"); p != d {
						t.Errorf("%d prepared, %d closed", p, d)
					}
				})
			})
		}
	}
}
