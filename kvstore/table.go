package kvstore

import "slices"

// tableItems is how many items a page of a table holds.
const tableItems = 64

// table is an array that a snapshot copies in little time: it copies only the list of pages.
// From then on the table copies a page before the first change in it.
//
//	Memory's table      pages       snapshot's table
//	    +---+         +-------+         +---+
//	    | 0 | ------> | items | <------ | 0 |
//	    +---+         +-------+         +---+
//	    | 1 | -+      +-------+ <------ | 1 |
//	    +---+  |      +-------+         +---+
//	           +----> +-------+
//	                  +-------+  a copy: an item in it was changed
type table[T any] struct {
	pages []*tablePage[T]
	len   int // items
}

// tablePage holds some items of a table.
type tablePage[T any] struct {
	epoch uint64 // Memory's when the page was made: a snapshot taken since has it, too
	items [tableItems]T
}

// at returns item i for reading.
func (t *table[T]) at(i int) *T { return &t.pages[uint(i)/tableItems].items[uint(i)%tableItems] }

// own returns item i for a change, in a copy of its page if a snapshot may have the page.
func (t *table[T]) own(i int, epoch uint64) *T {
	p := t.pages[i/tableItems]

	// A snapshot may have a page of an earlier epoch and keeps that; this table gets a copy.
	if p.epoch != epoch {
		mine := *p
		mine.epoch = epoch
		p = &mine
		t.pages[i/tableItems] = p
	}

	return &p.items[i%tableItems]
}

// push adds a zero item and returns its place.
func (t *table[T]) push(epoch uint64) (i int) {
	if t.len == len(t.pages)*tableItems {
		t.pages = append(t.pages, &tablePage[T]{epoch: epoch})
	}
	t.len++
	return t.len - 1
}

// pop removes the last item, and its page if it was the page's only one.
func (t *table[T]) pop(epoch uint64) {
	// The item is cleared, because push adds a zero item without writing it.
	var none T
	*t.own(t.len-1, epoch) = none

	// The nil leaves an empty page to the garbage collector.
	if t.len--; t.len%tableItems == 0 {
		t.pages[len(t.pages)-1] = nil
		t.pages = t.pages[:len(t.pages)-1]
	}
}

// clone returns a copy with the same pages. The owner of t must begin a new epoch, so that t copies
// them before a change.
func (t *table[T]) clone() table[T] { return table[T]{slices.Clone(t.pages), t.len} }
