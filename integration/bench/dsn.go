package main

import (
	"net"
	"net/url"

	"github.com/pgadvisory/advisory/integration/internal/pgtest"
)

// withAddress returns dsn, in either form, with another address.
func withAddress(dsn, addr string) (string, error) {
	if u, err := url.Parse(dsn); err == nil && u.Scheme != "" {
		u.Host = addr
		return u.String(), nil
	}
	host, port, err := net.SplitHostPort(addr)
	if err != nil {
		return "", err
	}
	if dsn, err = pgtest.WithParam(dsn, "host", host); err != nil {
		return "", err
	}
	return pgtest.WithParam(dsn, "port", port)
}
