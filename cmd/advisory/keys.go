package main

import (
	"errors"
	"fmt"
	"strconv"
	"strings"

	"github.com/spf13/pflag"

	"github.com/pgadvisory/advisory"
)

// keyFlags are the keys that have no name of this package's.
type keyFlags struct {
	ids              []int64
	pairs, hashTexts []string
}

func (f *keyFlags) add(flags *pflag.FlagSet) {
	flags.Int64SliceVar(&f.ids, "id", nil, "the lock of pg_advisory_lock(`N`)")
	flags.StringArrayVar(&f.pairs, "pair", nil, "the lock of pg_advisory_lock(`A,B`)")
	flags.StringArrayVar(&f.hashTexts, "hashtext", nil, "the lock of pg_advisory_lock(hashtext('`NAME`')), which other programs take")
}

// A namedKey is a key, and what the user has called it.
type namedKey struct {
	key  advisory.Key
	name string
}

// keys returns the keys of names and flags. There is at least one.
func (f *keyFlags) keys(names []string) ([]namedKey, error) {
	var all []namedKey
	for _, name := range names {
		if name == "" {
			return nil, errors.New("the name of a lock is empty")
		}
		all = append(all, namedKey{advisory.Name(name), name})
	}
	for _, id := range f.ids {
		all = append(all, namedKey{advisory.ID(id), strconv.FormatInt(id, 10)})
	}
	for _, pair := range f.pairs {
		key, err := parsePair(pair)
		if err != nil {
			return nil, err
		}
		all = append(all, namedKey{key, key.SQL()})
	}
	for _, name := range f.hashTexts {
		if name == "" {
			return nil, errors.New("--hashtext: the name of a lock is empty")
		}
		all = append(all, namedKey{advisory.HashText(name), name})
	}
	if len(all) == 0 {
		return nil, errors.New("no lock: give a NAME, or --id, --pair or --hashtext")
	}
	return all, nil
}

func parsePair(s string) (advisory.Key, error) {
	a, b, ok := strings.Cut(s, ",")
	class, errA := strconv.ParseInt(strings.TrimSpace(a), 10, 32)
	object, errB := strconv.ParseInt(strings.TrimSpace(b), 10, 32)
	if !ok || errA != nil || errB != nil {
		return advisory.Key{}, fmt.Errorf("--pair: %q is not two integers of 32 bits, A,B", s)
	}
	return advisory.Pair(int32(class), int32(object)), nil
}

// one returns the only key of names and flags.
func (f *keyFlags) one(names []string) (namedKey, error) {
	all, err := f.keys(names)
	if err == nil && len(all) > 1 {
		err = errors.New("more than one lock")
	}
	if err != nil {
		return namedKey{}, err
	}
	return all[0], nil
}

// bare returns the keys alone.
func bare(keys []namedKey) (all []advisory.Key) {
	for _, k := range keys {
		all = append(all, k.key)
	}
	return all
}

// list returns what the user has called the keys.
func list(keys []namedKey) string {
	var names []string
	for _, k := range keys {
		names = append(names, k.name)
	}
	return strings.Join(names, " ")
}
