package main

import (
	"context"
	"io"
	"log/slog"
	"strings"
	"sync"
	"time"
)

// newLog returns a logger of events, each in one line: as text, or as JSON.
func newLog(w io.Writer, level slog.Level, json bool) *slog.Logger {
	if json {
		return slog.New(slog.NewJSONHandler(w, &slog.HandlerOptions{Level: level, ReplaceAttr: forJSON}))
	}
	return slog.New(&textHandler{w: w, level: level, mu: new(sync.Mutex)})
}

// forJSON writes durations in seconds, and messages in one line.
func forJSON(_ []string, a slog.Attr) slog.Attr {
	switch {
	case a.Value.Kind() == slog.KindDuration:
		a.Value = slog.Float64Value(a.Value.Duration().Seconds())
	case a.Key == slog.MessageKey:
		a.Value = slog.StringValue(oneLine(a.Value.String()))
	}
	return a
}

// A textHandler writes lines for people, without a time, which cron and the journal add.
type textHandler struct {
	w     io.Writer
	level slog.Level
	attrs []slog.Attr
	mu    *sync.Mutex // guards w
}

func (h *textHandler) Enabled(_ context.Context, level slog.Level) bool { return level >= h.level }

func (h *textHandler) Handle(_ context.Context, r slog.Record) error {
	var b strings.Builder
	b.WriteString(r.Message)
	attr := func(a slog.Attr) bool {
		value := a.Value.Resolve()
		if value.Kind() == slog.KindDuration {
			value = slog.DurationValue(value.Duration().Round(time.Millisecond))
		}
		b.WriteString(", " + a.Key + " " + value.String())
		return true
	}
	for _, a := range h.attrs {
		attr(a)
	}
	r.Attrs(attr)
	h.mu.Lock()
	defer h.mu.Unlock()
	_, err := io.WriteString(h.w, message(b.String())+"\n")
	return err
}

func (h *textHandler) WithAttrs(attrs []slog.Attr) slog.Handler {
	with := *h
	with.attrs = append(h.attrs[:len(h.attrs):len(h.attrs)], attrs...)
	return &with
}

// WithGroup ignores the group: nothing here uses one.
func (h *textHandler) WithGroup(string) slog.Handler { return h }
