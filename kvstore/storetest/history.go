package storetest

import (
	"cmp"
	"fmt"
	"math"
	"slices"
	"strings"
)

// Operation is a request about a list, and its outcome. Invoked and Answered are times of one clock
// for all clients.
type Operation struct {
	Request
	N                 int      // the n of the ":OK n" that was answered
	Got               []string // the values that were answered
	Invoked, Answered int64    // Answered is 0 if there was no answer
	Failure           int      // number of the power failure that may have undone it; 0: none
}

// agrees reports whether o was answered with n and got, or not at all.
func (o Operation) agrees(n int, got []string) bool {
	return o.Answered == 0 || o.N == n && slices.Equal(o.Got, got)
}

// CheckLinearizable returns an error unless there is an order of the requests about a list that
// explains all answers and the list's final values, and in which each request has its place between
// its beginning and its answer. A request without an answer may have any place after its beginning,
// or none. A power failure may undo requests: the last ones of those that bear its number.
func CheckLinearizable(history []Operation, final []string) error {
	// Puts of unique values and Gets have an exact check; all other histories are searched.
	put := map[string]bool{}
	for _, o := range history {
		isPut := o.Verb == "Put"
		if !isPut && o.Verb != "Get" || isPut && put[o.New] {
			return search(history, final)
		}
		put[o.New] = put[o.New] || isPut
	}

	return checkAppends(history, final)
}

// mostSteps is how many steps a search takes before it gives up and accepts the history.
const mostSteps = 300_000

// searched is the state of a search for an order of a history.
type searched struct {
	operations []Operation // by Invoked
	done       []byte      // 1: it has its place, or a power failure has undone it
	been       map[string]bool
	steps      int
	furthest   int // index of the first operation that no order has explained so far
}

// search is the algorithm of Wing and Gong, "Testing and Verifying Concurrent Objects", 1993, with
// a memory of the states that it has been in (Lowe, "Testing for Linearizability", 2017).
func search(history []Operation, final []string) error {
	s := searched{been: map[string]bool{}}

	// The final values are the answer to a last Get, which begins when all others are over.
	s.operations = append(slices.Clone(history), Operation{Request: Request{Verb: "Get"},
		N: len(final), Got: final, Invoked: math.MaxInt64 - 1, Answered: math.MaxInt64})
	slices.SortFunc(s.operations, func(a, b Operation) int {
		return cmp.Compare(a.Invoked, b.Invoked)
	})
	s.done = make([]byte, len(s.operations))

	if !s.explain(0, nil) {
		o := s.operations[s.furthest]
		return fmt.Errorf("no order explains the answer to %.60q: %d, %.200q", o.Line(""), o.N, o.Got)
	}
	return nil
}

// explain reports whether some order of the operations that are not done yet explains their
// answers, starting with this list. All operations before first are done.
func (s *searched) explain(first int, list []string) bool {
	for first < len(s.done) && s.done[first] != 0 {
		first++
	}
	s.furthest = max(s.furthest, first)

	// In a state that it has been in, the search would fail again.
	place := fmt.Sprint(first) + string(s.done[first:]) + strings.Join(list, "\n")
	if s.steps++; s.been[place] || s.steps > mostSteps {
		return s.steps > mostSteps
	}
	s.been[place] = true

	// The next operation is one that began before any of the others was answered.
	soonest, owed := int64(math.MaxInt64), false
	for i := first; i < len(s.done) && s.operations[i].Invoked < soonest; i++ {
		if at := s.operations[i].Answered; s.done[i] == 0 && at > 0 {
			soonest, owed = min(soonest, at), true
		}
	}

	// The remaining operations were never answered, so they need not have been run.
	if !owed {
		return true
	}

	failure := 0
	for i := first; i < len(s.done) && s.operations[i].Invoked < soonest; i++ {
		if s.done[i] != 0 {
			continue
		}
		failure = max(failure, s.operations[i].Failure)
		after, n, got := s.operations[i].After(list)
		if !s.operations[i].agrees(n, got) {
			continue
		}

		// If this one does not lead to the end, it is taken back and the next one is tried.
		s.done[i] = 1
		if s.explain(first, after) {
			return true
		}
		s.done[i] = 0
	}
	return failure > 0 && s.fail(failure, first, list)
}

// fail is explain if the power fails now: the operations that it may undo, and that have no place
// yet, get none.
func (s *searched) fail(failure, first int, list []string) bool {
	before := slices.Clone(s.done)
	for i, o := range s.operations {
		if o.Failure == failure {
			s.done[i] = 1
		}
	}

	found := s.explain(first, list)
	s.done = before
	return found
}

// event is the beginning or the end of an operation in a history of Puts and Gets.
type event struct {
	time  int64
	place int // of a Put: in the final list, from 1; of a Get: how many values it saw
	put   bool
	begin bool
}

// checkAppends is CheckLinearizable for Puts of unique values and Gets, any number of them. The
// final list itself shows the order of the Puts, and the length of a Get its place among them, so
// the check is exact and needs no search (the idea is that of Elle's list-append: Kingsbury and
// Alvaro, VLDB 2020).
func checkAppends(history []Operation, final []string) error {
	place := map[string]int{}
	for i, v := range final {
		if place[v] > 0 {
			return fmt.Errorf("%q is there twice", v)
		}

		place[v] = i + 1
	}

	// Every operation has a place, except a Put that is not in the list and a Get without an
	// answer.
	var events []event
	for _, o := range history {
		// An operation that may have been undone counts as never answered.
		if o.Failure > 0 {
			o.Answered = 0
		}

		p := len(o.Got)
		switch isPut := o.Verb == "Put"; {
		case isPut && place[o.New] == 0 && o.Answered > 0:
			return fmt.Errorf("the answered Put of %q is lost", o.New)
		case isPut && place[o.New] == 0, !isPut && o.Answered == 0:
			continue
		case isPut:
			p = place[o.New]
		case p > len(final) || !slices.Equal(o.Got, final[:p]):
			return fmt.Errorf("a Get of %d values is no beginning of the final list", p)
		}

		events = append(events, event{o.Invoked, p, o.Verb == "Put", true})
		if o.Answered > 0 {
			events = append(events, event{o.Answered, p, o.Verb == "Put", false})
		}
	}

	slices.SortFunc(events, func(a, b event) int { return cmp.Compare(a.time, b.time) })
	return checkPlaces(events)
}

// checkPlaces wants that the place of an operation is not before that of any operation that was
// answered before it was invoked.
func checkPlaces(events []event) error {
	most := 0 // number of Puts that every operation invoked from now on must see
	begun := map[int]bool{}

	for _, e := range events {
		switch {
		case e.begin && e.put && e.place <= most:
			return fmt.Errorf("Put %d was invoked after a later one, or a Get that saw it, "+
				"was answered", e.place)
		case e.begin && e.put:
			begun[e.place] = true
		case e.begin && e.place < most:
			return fmt.Errorf("a Get sees %d Puts, but %d were answered or seen before", e.place, most)

		case !e.begin:
			// The answer shows all Puts up to this place, so all of them must have begun.
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
