package storetest

import (
	"strings"
	"testing"
)

// Ensure that the checker finds what it is for.
func TestLinearizableChecker(t *testing.T) {
	ab := []string{"a", "b"}
	for what, c := range map[string]struct {
		history []Operation
		good    bool
	}{
		"in turn": {[]Operation{{"a", nil, 1, 2}, {"b", nil, 3, 4},
			{"", ab, 5, 6}}, true},
		"at once": {[]Operation{{"b", nil, 1, 6}, {"a", nil, 2, 5},
			{"", nil, 3, 4}}, true},
		"unanswered, but seen": {[]Operation{{"a", nil, 1, 0}, {"b", nil, 2, 3},
			{"", ab, 4, 5}}, true},
		"unanswered and not there": {[]Operation{{"a", nil, 1, 2}, {"b", nil, 3, 4},
			{"c", nil, 5, 0}}, true},
		"lost": {[]Operation{{"a", nil, 1, 2}, {"b", nil, 3, 4},
			{"c", nil, 5, 6}}, false},
		"wrong order": {[]Operation{{"b", nil, 1, 2}, {"a", nil, 3, 4}}, false},
		"stale Get": {[]Operation{{"a", nil, 1, 2}, {"b", nil, 3, 4},
			{"", []string{"a"}, 5, 6}}, false},
		"Gets go back": {[]Operation{{"a", nil, 1, 10}, {"b", nil, 2, 11},
			{"", ab, 3, 4}, {"", []string{"a"}, 5, 6}}, false},
		"from the future": {[]Operation{{"a", nil, 1, 2}, {"", ab, 3, 4},
			{"b", nil, 5, 6}}, false},
		"another list": {[]Operation{{"a", nil, 1, 2}, {"b", nil, 3, 4},
			{"", []string{"b"}, 5, 6}}, false},
	} {
		if err := CheckLinearizable(c.history, ab); (err == nil) != c.good {
			t.Errorf("%s: %v", what, err)
		}
	}
}

// Ensure that Explains finds what it is for.
func TestExplains(t *testing.T) {
	put := func(value string, from, to int64) Asked {
		return Asked{Request{Verb: "Put", New: value}, 1, nil, from, to}
	}
	take := func(from, to int64, got ...string) Asked {
		return Asked{Request{Verb: "Take"}, len(got), got, from, to}
	}
	request := func(verb, old, new string, n int, from, to int64) Asked {
		return Asked{Request{Verb: verb, Old: old, New: new}, n, nil, from, to}
	}
	for what, c := range map[string]struct {
		history []Asked
		final   string
		good    bool
	}{
		"in turn":  {[]Asked{put("a", 1, 2), put("b", 3, 4), take(5, 6, "a")}, "b", true},
		"a waiter": {[]Asked{take(1, 4, "a"), put("a", 2, 3)}, "", true},
		"one of two": {[]Asked{
			take(1, 4, "a"),
			take(2, 6, "b"),
			put("a", 3, 9),
			put("b", 3, 9)}, "", true},
		"taken twice": {[]Asked{put("a", 1, 2), take(3, 6, "a"), take(4, 5, "a")}, "", false},
		"not the first": {[]Asked{put("a", 1, 2), put("b", 3, 4), take(5, 6, "b")},
			"a", false},
		"lost":                 {[]Asked{put("a", 1, 2), take(3, 4)}, "", false},
		"a waiter forgotten":   {[]Asked{put("a", 1, 2), take(3, 4)}, "a", false}, // from its end on
		"taken, and not known": {[]Asked{put("a", 1, 2), take(3, 0)}, "", true},
		"not taken, nor known": {[]Asked{put("a", 1, 2), take(3, 0)}, "a", true},
		"taken before it came": {[]Asked{take(1, 2, "a"), put("a", 3, 4)}, "", false},
		"back again":           {[]Asked{put("a", 1, 2), take(3, 4, "a")}, "a", false},
		"two Adds": {[]Asked{
			request("Add", "", "a", 1, 1, 4),
			request("Add", "", "b", 1, 2, 3)}, "a", false},
		"an Add of two": {[]Asked{
			request("Add", "", "a", 0, 1, 4),
			request("Add", "", "b", 1, 2, 3)}, "b", true},
		"two Swaps of one": {[]Asked{
			put("a", 1, 2),
			request("Swap", "a", "b", 1, 3, 6),
			request("Swap", "a", "c", 1, 4, 5)}, "b", false},
		"a Swap that adds":    {[]Asked{request("Swap", "a", "b", 0, 1, 2)}, "b", false},
		"a Count before":      {[]Asked{put("a", 1, 4), request("Count", "", "", 0, 2, 3)}, "a", true},
		"a Count of the past": {[]Asked{put("a", 1, 2), request("Count", "", "", 0, 3, 4)}, "a", false},
		"a Remove by two": {[]Asked{
			put("a", 1, 2),
			request("Remove", "a", "", 1, 3, 6),
			request("Remove", "a", "", 1, 4, 5)}, "", false},
		"unanswered, then seen": {[]Asked{
			put("a", 1, 0),
			request("Count", "", "", 0, 2, 3),
			request("Count", "", "", 1, 4, 5)}, "a", true},
	} {
		if good := Explains(c.history, strings.Fields(c.final)); good != c.good {
			t.Errorf("%s: %v", what, good)
		}
	}
}
