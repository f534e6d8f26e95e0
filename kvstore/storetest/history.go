package storetest

import (
	"cmp"
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"
)

// Request is a request that changes a list.
type Request struct {
	Verb, Old, New string
	Seconds        int // for which a Take waits
}

// Apply returns list after the request, and what is answered: the n of ":OK n", and values.
func (q Request) Apply(list []string) (after []string, n int, got []string) {
	list = slices.Clone(list)
	i := slices.Index(list, q.Old)
	switch q.Verb {
	case "Put":
		return append(list, q.New), 1, nil
	case "Delete":
		return nil, len(list), nil
	case "Set":
		return []string{q.New}, len(list), nil
	case "Remove", "Update", "Swap":
		if i >= 0 {
			list, n = slices.Delete(list, i, i+1), 1
		}
		if q.Verb == "Update" || q.Verb == "Swap" && n == 1 {
			list = append(list, q.New)
		}
		return list, n, nil
	case "Add":
		if len(list) == 0 {
			return []string{q.New}, 1, nil
		}
		return list, 0, nil
	case "Take":
		n = min(len(list), 1)
		return list[n:], n, list[:n]
	case "Count":
		return list, len(list), nil
	}
	return list, len(list), list
}

// Line is the request as it is sent.
func (q Request) Line(key string) string {
	fields := slices.DeleteFunc([]string{q.Verb, key, q.Old, q.New},
		func(s string) bool { return s == "" })
	if q.Seconds > 0 {
		fields = append(fields, strconv.Itoa(q.Seconds))
	}
	return strings.Join(fields, ":") + "\n"
}

// Asked is a request about one list, and what was answered: all that kvstore's lists can be asked,
// where operation is enough for Puts and Gets, of which it can check any number.
type Asked struct {
	Request
	N                 int      // of the ":OK n"
	Got               []string // values
	Invoked, Answered int64    // Answered is 0 if it was never
}

// agrees tells whether an answer is what the list says.
func (a Asked) agrees(n int, got []string) bool {
	return a.Answered == 0 || a.N == n && slices.Equal(a.Got, got)
}

// Explains tells whether one order of what was asked about a list, in which each request has its
// place between its beginning and its answer, explains all answers, and what the list holds in the
// end. A request without an answer may have any place behind its beginning, or none. This is the
// search of Wing and Gong, "Testing and Verifying Concurrent Objects", 1993, which goes nowhere
// twice (Lowe, "Testing for Linearizability", 2017); after so many steps it believes what it has
// not refuted.
func Explains(history []Asked, final []string) bool {
	const mostSteps = 300_000
	history = append(slices.Clone(history),
		Asked{Request{Verb: "Get"}, len(final), final, math.MaxInt64 - 1, math.MaxInt64})
	slices.SortFunc(history, func(a, b Asked) int { return cmp.Compare(a.Invoked, b.Invoked) })
	been := map[string]bool{}
	done := make([]byte, len(history))
	steps := 0

	var search func(first int, list []string) bool
	search = func(first int, list []string) bool {
		for first < len(history) && done[first] != 0 {
			first++
		}
		place := fmt.Sprint(first) + string(done[first:]) + strings.Join(list, "\n")
		if steps++; been[place] || steps > mostSteps {
			return steps > mostSteps
		}
		been[place] = true

		// The next is one that had begun before any other of them was answered.
		soonest, owed := int64(math.MaxInt64), false
		for i := first; i < len(history) && history[i].Invoked < soonest; i++ {
			if at := history[i].Answered; done[i] == 0 && at > 0 {
				soonest, owed = min(soonest, at), true
			}
		}
		if !owed {
			return true
		}
		for i := first; i < len(history) && history[i].Invoked < soonest; i++ {
			if done[i] != 0 {
				continue
			}
			after, n, got := history[i].Apply(list)
			if !history[i].agrees(n, got) {
				continue
			}
			done[i] = 1
			if search(first, after) {
				return true
			}
			done[i] = 0
		}
		return false
	}
	return search(0, nil)
}

// Operation is one of a history: Invoked and Answered are times of a clock that
// all clients share; a Put that was never answered has none.
type Operation struct {
	Put               string   // the value, unique in the history; "": a Get
	Got               []string // the Get's
	Invoked, Answered int64
}

// CheckLinearizable tells what in a history of one list no order of its
// operations explains; final is what the list holds in the end. A list to which
// unique values are appended names the order of its Puts itself, and a Get's
// length its place among them, so the check is exact and needs no search (the
// idea of Elle's list-append: Kingsbury and Alvaro, VLDB 2020).
func CheckLinearizable(history []Operation, final []string) error {
	place := map[string]int{}
	for i, v := range final {
		if _, twice := place[v]; twice {
			return fmt.Errorf("%q is there twice", v)
		}
		place[v] = i + 1
	}
	for i, a := range history {
		if a.Put != "" && a.Answered > 0 && place[a.Put] == 0 {
			return fmt.Errorf("the answered Put of %q is lost", a.Put)
		}
		if a.Put == "" && (len(a.Got) > len(final) || !slices.Equal(a.Got, final[:len(a.Got)])) {
			return fmt.Errorf("Get %d is no beginning of the final list", i)
		}
	}
	// In the order of invocation, an operation's place must not be below that of
	// any operation answered before.
	type event struct {
		time  int64
		place int
		put   bool
		begin bool
	}
	var events []event
	for _, a := range history {
		p := len(a.Got)
		if a.Put != "" {
			if p = place[a.Put]; p == 0 {
				continue // never answered, never there
			}
		}
		events = append(events, event{a.Invoked, p, a.Put != "", true})
		if a.Answered > 0 {
			events = append(events, event{a.Answered, p, a.Put != "", false})
		}
	}
	slices.SortFunc(events, func(a, b event) int { return cmp.Compare(a.time, b.time) })
	most := 0 // Puts that everybody invoked from now on must see
	begun := map[int]bool{}
	for _, e := range events {
		switch {
		case e.begin && e.put:
			begun[e.place] = true
			if e.place <= most {
				return fmt.Errorf("Put %d was invoked after a later one, or a Get that saw it, "+
					"was answered", e.place)
			}
		case e.begin && e.place < most:
			return fmt.Errorf("a Get sees %d Puts, but %d were answered or seen before", e.place,
				most)
		case !e.begin:
			for p := e.place; p > most; p-- {
				if !begun[p] {
					return fmt.Errorf("Put %d was seen before it was invoked", p)
				}
			}
			most = max(most, e.place)
		}
	}
	return nil
}
