package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/redis/go-redis/v9"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
)

// A peer is a throw-away server of another library.
type peer struct {
	addr    string
	version string

	lifeline io.Closer
	ended    chan error
}

// keeper runs a server until its standard input ends, which it does when this program
// ends, however that happens; and then removes the server's directory. It outlives what
// ends this program, such as the terminal's Ctrl-C.
const keeper = `
trap '' HUP INT TERM
dir=$1; shift
"$@" >"$dir/log" 2>&1 &
pid=$!
cat >/dev/null
kill "$pid"
wait "$pid"
rm -rf "$dir"
`

// startTimeout bounds the start of a server.
const startTimeout = 10 * time.Second

func startRedis(ctx context.Context) (*peer, error) {
	return startPeer(ctx, "redis-server", func(addr, dir string) ([]string, error) {
		host, port, err := net.SplitHostPort(addr)
		return []string{"--bind", host, "--port", port, "--dir", dir, "--save", "", "--appendonly", "no"}, err
	}, func(ctx context.Context, addr string) (string, error) {
		client := redis.NewClient(&redis.Options{Addr: addr})
		defer client.Close()
		info, err := client.Info(ctx, "server").Result()
		if err != nil {
			return "", err
		}
		_, version, _ := strings.Cut(info, "redis_version:")
		version, _, _ = strings.Cut(version, "\r\n")
		return "Redis " + version, nil
	})
}

func startEtcd(ctx context.Context) (*peer, error) {
	return startPeer(ctx, "etcd", func(addr, dir string) ([]string, error) {
		peerAddr, err := freeAddr()
		url, peerURL := "http://"+addr, "http://"+peerAddr
		return []string{
			"--data-dir", filepath.Join(dir, "data"), "--log-level", "error",
			"--listen-client-urls", url, "--advertise-client-urls", url,
			"--listen-peer-urls", peerURL, "--initial-advertise-peer-urls", peerURL,
			"--initial-cluster", "default=" + peerURL,
		}, err
	}, func(ctx context.Context, addr string) (string, error) {
		client, err := clientv3.New(clientv3.Config{Endpoints: []string{addr}, Logger: zap.NewNop()})
		if err != nil {
			return "", err
		}
		defer client.Close()
		status, err := client.Status(ctx, addr)
		if err != nil {
			return "", err
		}
		if status.Leader == 0 {
			return "", errors.New("no leader yet")
		}
		return "etcd " + status.Version, nil
	})
}

// startPeer starts the program with the arguments for an address and a directory, and
// waits until version has an answer.
func startPeer(ctx context.Context, program string, args func(addr, dir string) ([]string, error), version func(context.Context, string) (string, error)) (*peer, error) {
	path, err := exec.LookPath(program)
	if err != nil {
		return nil, err
	}
	dir, err := os.MkdirTemp("", "advisory-bench-")
	if err != nil {
		return nil, err
	}
	addr, err := freeAddr()
	if err != nil {
		return nil, errors.Join(err, os.RemoveAll(dir))
	}
	argv, err := args(addr, dir)
	if err != nil {
		return nil, errors.Join(err, os.RemoveAll(dir))
	}
	cmd := exec.Command("/bin/sh", append([]string{"-c", keeper, "sh", dir, path}, argv...)...)
	cmd.Env = append(os.Environ(), "ETCD_CONFIG_FILE=")
	stdin, err := cmd.StdinPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		return nil, errors.Join(err, os.RemoveAll(dir))
	}
	p := &peer{addr: addr, lifeline: stdin, ended: make(chan error, 1)}
	go func() { p.ended <- cmd.Wait() }()

	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	for {
		try, cancelTry := context.WithTimeout(ctx, time.Second)
		p.version, err = version(try, addr)
		cancelTry()
		if err == nil {
			return p, nil
		}
		select {
		case <-ctx.Done():
			log, _ := os.ReadFile(filepath.Join(dir, "log"))
			return nil, errors.Join(fmt.Errorf("%s does not answer: %w; its log:\n%s", program, err, log), p.stop())
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// stop ends the server, and waits until it is gone.
func (p *peer) stop() error {
	_ = p.lifeline.Close()
	return <-p.ended
}

// freeAddr returns a loopback address that nobody listens on.
func freeAddr() (string, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	return l.Addr().String(), l.Close()
}

func hostPort(host string, port int) string { return net.JoinHostPort(host, strconv.Itoa(port)) }
