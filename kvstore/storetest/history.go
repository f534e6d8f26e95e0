package storetest

import (
	"cmp"
	"fmt"
	"math"
	"slices"
	"strings"
)

// Operation is a request about a list, and what became of it. Invoked and Answered are times of a
// clock that all clients share.
type Operation struct {
	Request
	N                 int      // of the ":OK n" that was answered
	Got               []string // and the values
	Invoked, Answered int64    // Answered is 0 if it never was
	Failure           int      // of power, which may have taken it back; 0: none
}

// agrees tells whether what was answered is this.
func (o Operation) agrees(n int, got []string) bool {
	return o.Answered == 0 || o.N == n && slices.Equal(o.Got, got)
}

// CheckLinearizable returns an error unless one order of what was asked about a list, in which each
// request has its place between its beginning and its answer, explains all answers, and what the
// list holds in the end. A request without an answer may have any place behind its beginning, or
// none. A power failure may take requests back: the last ones of those that bear its number.
func CheckLinearizable(history []Operation, final []string) error {
	// Puts of unique values and Gets have an exact check; all else has to be searched.
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

// mostSteps is how many steps a search takes until it believes what it has not refuted.
const mostSteps = 300_000

// searched is a history that is searched for an order.
type searched struct {
	operations []Operation // by Invoked
	done       []byte      // 1: it has its place, or a power failure has taken it back
	been       map[string]bool
	steps      int
	furthest   int // of operations, to which an order was found
}

// search is the search of Wing and Gong, "Testing and Verifying Concurrent Objects", 1993, which
// goes nowhere twice (Lowe, "Testing for Linearizability", 2017).
func search(history []Operation, final []string) error {
	s := searched{been: map[string]bool{}}

	// What the list holds in the end is a last Get, which begins when all others are over.
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

// explain tells whether an order of the operations that are not done yet explains them, if the list
// is this. None of them is before first.
func (s *searched) explain(first int, list []string) bool {
	for first < len(s.done) && s.done[first] != 0 {
		first++
	}
	s.furthest = max(s.furthest, first)

	// From the same place with the same list the search finds nothing that it has not found.
	place := fmt.Sprint(first) + string(s.done[first:]) + strings.Join(list, "\n")
	if s.steps++; s.been[place] || s.steps > mostSteps {
		return s.steps > mostSteps
	}
	s.been[place] = true

	// The next is one that had begun before any other of them was answered.
	soonest, owed := int64(math.MaxInt64), false
	for i := first; i < len(s.done) && s.operations[i].Invoked < soonest; i++ {
		if at := s.operations[i].Answered; s.done[i] == 0 && at > 0 {
			soonest, owed = min(soonest, at), true
		}
	}

	// What is left was never answered, and so need not have been run.
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

		// One that does not lead to the end is taken back, and the next is tried.
		s.done[i] = 1
		if s.explain(first, after) {
			return true
		}
		s.done[i] = 0
	}
	return failure > 0 && s.fail(failure, first, list)
}

// fail is explain where the power fails now: what it may take back, and has no place yet, has none.
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

// event is the beginning or the end of an operation of a history of Puts and Gets.
type event struct {
	time  int64
	place int // of a Put in the final list, of a Get behind the last value that it saw
	put   bool
	begin bool
}

// checkAppends is CheckLinearizable for any number of Puts of unique values, and Gets. Such a list
// names the order of its Puts itself, and a Get's length its place among them, so the check is
// exact and needs no search (the idea of Elle's list-append: Kingsbury and Alvaro, VLDB 2020).
func checkAppends(history []Operation, final []string) error {
	place := map[string]int{}
	for i, v := range final {
		if place[v] > 0 {
			return fmt.Errorf("%q is there twice", v)
		}

		place[v] = i + 1
	}

	// Each operation has its place, but for a Put that is not there, and a Get that saw nothing.
	var events []event
	for _, o := range history {
		// What may have been taken back counts as what was never answered.
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

// checkPlaces wants, in the order of invocation, that an operation's place is not before that of
// any operation that was answered before.
func checkPlaces(events []event) error {
	most := 0 // Puts that everybody invoked from now on must see
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
			// The answer showed all Puts up to this place, so all of them must have begun.
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
