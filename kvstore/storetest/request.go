package storetest

import (
	"fmt"
	"slices"
	"strconv"
	"strings"

	"kvserver/kvstore"
)

// Request is a request about one list, with the fields of the protocol.
type Request struct {
	Verb, Old, New string
	Seconds        int // how long a Take waits; 0: not at all
}

// Do runs q on the list of key, and returns the answer: the n of ":OK n", and values.
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
		// Where the old value is not there, an Update adds the new one; a Swap does not.
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

// once returns 1 for a thing that was done, else 0.
func once(done bool) int {
	if done {
		return 1
	}
	return 0
}

// After returns what a list becomes by q, and the answer.
func (q Request) After(list []string) (after []string, n int, got []string) {
	m := NewModel()
	if len(list) > 0 {
		// The list is clipped, so that an append does not write into the caller's array.
		m.lists[""] = slices.Clip(list)
	}
	n, got = q.Do(m, "")
	return m.Get(""), n, got
}

// Line returns the line that a client sends for q.
func (q Request) Line(key string) string {
	// No request has all of these fields; those that it lacks are empty.
	fields := slices.DeleteFunc([]string{q.Verb, key, q.Old, q.New},
		func(s string) bool { return s == "" })
	if q.Seconds > 0 {
		fields = append(fields, strconv.Itoa(q.Seconds))
	}

	return strings.Join(fields, ":") + "\n"
}
