package storetest

import (
	"fmt"
	"slices"
	"strconv"
	"strings"

	"kvserver/kvstore"
)

// Request is a request about one list, as the protocol has it.
type Request struct {
	Verb, Old, New string
	Seconds        int // for which a Take waits
}

// Do does what q asks to a list of a store, and returns what is answered: the n of ":OK n", and
// values.
func (q Request) Do(store kvstore.Store, key string) (n int, got []string) {
	switch q.Verb {
	case "Put":
		store.Put(key, q.New)
		return 1, nil
	case "Delete":
		return store.Delete(key), nil
	case "Set":
		return store.Set(key, q.New), nil
	case "Remove":
		return once(store.Remove(key, q.Old)), nil
	case "Update":
		return once(store.Update(key, q.Old, q.New)), nil
	case "Swap":
		// An Update puts the new value there where it finds no old one; a Swap does not.
		return once(store.Has(key, q.Old) && store.Update(key, q.Old, q.New)), nil

	case "Add":
		if store.Count(key) > 0 {
			return 0, nil
		}
		store.Put(key, q.New)
		return 1, nil

	case "Take":
		value, ok := store.Take(key)
		if !ok {
			return 0, nil
		}
		return 1, []string{value}

	case "Count":
		return store.Count(key), nil
	case "Get":
		got = store.Get(key)
		return len(got), got
	}

	panic(fmt.Sprintf("no list is asked for %q", q.Verb))
}

// once returns how often a thing was done that was done or not.
func once(done bool) int {
	if done {
		return 1
	}
	return 0
}

// After returns what a list is after q, and what is answered.
func (q Request) After(list []string) (after []string, n int, got []string) {
	m := NewModel()
	if len(list) > 0 {
		// The list is clipped, so that what is put behind it leaves the caller's alone.
		m.lists[""] = slices.Clip(list)
	}
	n, got = q.Do(m, "")
	return m.Get(""), n, got
}

// Line returns the request as it is sent.
func (q Request) Line(key string) string {
	// A request has fewer fields than this: those that it lacks are empty here.
	fields := slices.DeleteFunc([]string{q.Verb, key, q.Old, q.New},
		func(s string) bool { return s == "" })
	if q.Seconds > 0 {
		fields = append(fields, strconv.Itoa(q.Seconds))
	}

	return strings.Join(fields, ":") + "\n"
}
