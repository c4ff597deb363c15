package integration

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/pgadvisory/advisory"
	"github.com/pgadvisory/advisory/integration/internal/testkit"
)

func TestClosedPortIsAnErrorAtOnce(t *testing.T) {
	t.Parallel()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	addr := l.Addr()
	l.Close()
	eachDriver(t, func(t *testing.T, d driver) {
		db := d.open(t, dsnOf(addr))
		for _, w := range openers {
			for name, opts := range someOptions {
				err := inShort(t, w, db, opts)
				if !errors.Is(err, syscall.ECONNREFUSED) || errors.Is(err, advisory.ErrNotAcquired) {
					t.Errorf("%s, %s: error is %v, want that of the driver", w.name, name, err)
				}
			}
		}
	})
}

// inShort returns the error of taking a lock, which must come at once, and must say what
// was tried.
func inShort(t *testing.T, w way, db *sql.DB, opts []advisory.Option) error {
	t.Helper()
	key, began := testKey(t), time.Now()
	err := w.with(soon(t), db, key, noWork, opts...)
	switch took := time.Since(began); {
	case err == nil:
		t.Errorf("%s: no error", w.name)
	case took > 5*time.Second:
		t.Errorf("%s: took %v: %v", w.name, took, err)
	case !strings.HasPrefix(err.Error(), "advisory: acquire "+t.Name()) || !strings.Contains(err.Error(), key.SQL()):
		t.Errorf("%s: the error does not say the operation and the key: %v", w.name, err)
	}
	return err
}

func TestServerOfAnotherKindIsAnErrorAtOnce(t *testing.T) {
	web := httptest.NewUnstartedServer(http.NotFoundHandler())
	web.Config.ReadHeaderTimeout = 100 * time.Millisecond
	web.Start()
	t.Cleanup(web.Close)

	addrs := map[string]net.Addr{
		"HTTP": web.Listener.Addr(),
		"HTTP_that_complains": testkit.Serve(t, func(conn net.Conn) {
			_, _ = conn.Read(make([]byte, 1024))
			fmt.Fprint(conn, "HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n400 Bad Request")
		}),
		"MySQL": testkit.Serve(t, func(conn net.Conn) {
			fmt.Fprint(conn, "J\x00\x00\x00\n8.0.36\x00\x08\x00\x00\x00abcdefgh\x00\xff\xf7\xff\x02\x00\xff\xdf\x15")
		}),
		"SSH": testkit.Serve(t, func(conn net.Conn) {
			fmt.Fprint(conn, "SSH-2.0-OpenSSH_9.6\r\n")
			_, _ = conn.Read(make([]byte, 1024))
		}),
		"echo": testkit.Serve(t, func(conn net.Conn) {
			b := make([]byte, 1024)
			n, _ := conn.Read(b)
			_, _ = conn.Write(b[:n])
		}),
		"nothing": testkit.Serve(t, func(net.Conn) {}),
	}
	eachDriver(t, func(t *testing.T, d driver) {
		for name, addr := range addrs {
			t.Run(name, func(t *testing.T) {
				if d.sql == "postgres" && (name == "SSH" || strings.HasPrefix(name, "HTTP")) {
					t.Skip("to lib/pq, SSH- and HTTP begin a message of 1.4 GB, which it makes room for")
				}
				db := d.open(t, dsnOf(addr))
				if err := inShort(t, withLock, db, nil); errors.Is(err, advisory.ErrNotAcquired) {
					t.Errorf("%v: that is not for the lock to say", err)
				}
			})
		}
	})
}

// A server that accepts connections and says nothing is out of reach for as long as the
// caller is willing to wait, even if the driver waits on.
func TestSilentServerIsWaitedForNoLongerThanAsked(t *testing.T) {
	t.Parallel()
	const patience = 200 * time.Millisecond
	eachDriver(t, func(t *testing.T, d driver) {
		t.Parallel()
		end := make(chan struct{})
		addr := testkit.Serve(t, func(net.Conn) { <-end })
		defer close(end) // has the driver return, too
		key := testKey(t)
		_ = concurrently(len(openers), 1, func(i int) error {
			w, db := openers[i], d.open(t, dsnOf(addr))
			for name, wait := range map[string]func() error{
				"ctx": func() error {
					ctx, cancel := context.WithTimeout(t.Context(), patience)
					defer cancel()
					return w.with(ctx, db, key, noWork)
				},
				"Timeout": func() error {
					return w.with(t.Context(), db, key, noWork, advisory.Timeout(patience))
				},
			} {
				began, result := time.Now(), make(chan error, 1)
				go func() { result <- wait() }()
				select {
				case err := <-result:
					if took := time.Since(began); took < patience || !errors.Is(err, advisory.ErrNotAcquired) {
						t.Errorf("%s, %s: %v after %v, want ErrNotAcquired after %v", w.name, name, err, took, patience)
					}
				case <-time.After(patience + 3*time.Second):
					t.Errorf("%s, %s: still waits after %v", w.name, name, time.Since(began))
				}
			}
			return nil
		})
	})
}

func dsnOf(addr net.Addr) string {
	return "postgres://postgres@" + addr.String() + "/postgres?sslmode=disable"
}
