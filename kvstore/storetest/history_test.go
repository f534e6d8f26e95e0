package storetest

import (
	"strings"
	"testing"
)

// Ensure that the checkers find the faults that they are for, and that both agree about Puts and
// Gets.
func TestLinearizable(t *testing.T) {
	request := func(verb, old, new string, n int, from, to int64, got ...string) Operation {
		return Operation{Request{Verb: verb, Old: old, New: new}, n, got, from, to, 0}
	}
	put := func(value string, from, to int64) Operation {
		return request("Put", "", value, 1, from, to)
	}
	get := func(from, to int64, got ...string) Operation {
		return request("Get", "", "", len(got), from, to, got...)
	}
	take := func(from, to int64, got ...string) Operation {
		return request("Take", "", "", len(got), from, to, got...)
	}

	mayGo := func(o Operation) Operation {
		o.Failure = 1
		return o
	}

	type history []Operation
	ab := []string{"a", "b"}

	for what, c := range map[string]struct {
		history history
		final   string
		good    bool
	}{
		"in turn": {history{put("a", 1, 2), put("b", 3, 4), get(5, 6, ab...)},
			"a b", true},
		"at once": {history{put("b", 1, 6), put("a", 2, 5), get(3, 4)},
			"a b", true},
		"unanswered, but seen": {history{put("a", 1, 0), put("b", 2, 3), get(4, 5, ab...)},
			"a b", true},
		"unanswered and not there": {history{put("a", 1, 2), put("b", 3, 4), put("c", 5, 0)},
			"a b", true},

		"an unanswered Get": {history{put("a", 1, 2), get(3, 0)}, "a", true},
		"an answered Put lost": {history{put("a", 1, 2), put("b", 3, 4), put("c", 5, 6)},
			"a b", false},
		"put twice":   {history{put("a", 1, 2), put("a", 3, 4), get(5, 6, "a", "a")}, "a a", true},
		"there twice": {history{put("a", 1, 2)}, "a a", false},
		"wrong order": {history{put("b", 1, 2), put("a", 3, 4)}, "a b", false},
		"stale Get": {history{put("a", 1, 2), put("b", 3, 4), get(5, 6, "a")},
			"a b", false},
		"Gets go back": {history{put("a", 1, 10), put("b", 2, 11), get(3, 4, ab...), get(5, 6, "a")},
			"a b", false},
		"from the future": {history{put("a", 1, 2), get(3, 4, ab...), put("b", 5, 6)}, "a b", false},
		"another list":    {history{put("a", 1, 2), put("b", 3, 4), get(5, 6, "b")}, "a b", false},

		"taken in turn": {history{put("a", 1, 2), put("b", 3, 4), take(5, 6, "a")}, "b", true},
		"a waiter":      {history{take(1, 4, "a"), put("a", 2, 3)}, "", true},
		"one of two": {history{take(1, 4, "a"), take(2, 6, "b"), put("a", 3, 9), put("b", 3, 9)},
			"", true},
		"taken twice":          {history{put("a", 1, 2), take(3, 6, "a"), take(4, 5, "a")}, "", false},
		"not the first":        {history{put("a", 1, 2), put("b", 3, 4), take(5, 6, "b")}, "a", false},
		"lost":                 {history{put("a", 1, 2), take(3, 4)}, "", false},
		"a waiter forgotten":   {history{put("a", 1, 2), take(3, 4)}, "a", false}, // 3: its wait has ended
		"taken, and not known": {history{put("a", 1, 2), take(3, 0)}, "", true},
		"not taken, nor known": {history{put("a", 1, 2), take(3, 0)}, "a", true},
		"taken before it came": {history{take(1, 2, "a"), put("a", 3, 4)}, "", false},
		"back again":           {history{put("a", 1, 2), take(3, 4, "a")}, "a", false},

		// Adds, Swaps, Counts and Removes depend on what the list holds.
		"two Adds": {history{request("Add", "", "a", 1, 1, 4), request("Add", "", "b", 1, 2, 3)},
			"a", false},
		"an Add of two": {history{request("Add", "", "a", 0, 1, 4), request("Add", "", "b", 1, 2, 3)},
			"b", true},
		"two Swaps of one": {history{put("a", 1, 2), request("Swap", "a", "b", 1, 3, 6),
			request("Swap", "a", "c", 1, 4, 5)}, "b", false},
		"a Swap that adds":    {history{request("Swap", "a", "b", 0, 1, 2)}, "b", false},
		"a Count before":      {history{put("a", 1, 4), request("Count", "", "", 0, 2, 3)}, "a", true},
		"a Count of the past": {history{put("a", 1, 2), request("Count", "", "", 0, 3, 4)}, "a", false},
		"a Remove by two": {history{put("a", 1, 2), request("Remove", "a", "", 1, 3, 6),
			request("Remove", "a", "", 1, 4, 5)}, "", false},

		// A power failure may undo some of these.
		"a power failure": {history{put("a", 1, 2), mayGo(put("b", 3, 4)), mayGo(take(5, 6, "a")),
			get(7, 8, "a")}, "a", true},
		"none of power": {history{put("a", 1, 2), mayGo(put("b", 3, 4)), mayGo(take(5, 6, "a")),
			get(7, 8, ab...), get(9, 10, "b")}, "b", false},
		"none of the last": {history{put("a", 1, 2), mayGo(put("b", 3, 4)), mayGo(take(5, 6, "a"))},
			"", false},
		"none of what was kept": {history{take(1, 2), put("a", 3, 4), mayGo(put("b", 5, 6))},
			"", false},
		"unanswered, then seen": {history{put("a", 1, 0), request("Count", "", "", 0, 2, 3),
			request("Count", "", "", 1, 4, 5)}, "a", true},
	} {
		final := strings.Fields(c.final)
		if err := CheckLinearizable(c.history, final); (err == nil) != c.good {
			t.Errorf("%s: %v", what, err)
		}
		if err := search(c.history, final); (err == nil) != c.good {
			t.Errorf("%s, by search: %v", what, err)
		}
	}
}
