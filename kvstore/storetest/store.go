package storetest

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"reflect"
	"slices"
	"strings"
	"testing"
	"unsafe"

	"kvserver/kvstore"
)

// Step is one operation on a store.
type Step struct {
	Op                string // a key of operations
	Key, Value, Other string
	At                int64
}

// operations are what can be done to a store, each with what it returns.
var operations = map[string]func(s kvstore.Store, x Step) []any{
	"Put":    func(s kvstore.Store, x Step) []any { s.Put(x.Key, x.Value); return nil },
	"Delete": func(s kvstore.Store, x Step) []any { return []any{s.Delete(x.Key)} },
	"Update": func(s kvstore.Store, x Step) []any { return []any{s.Update(x.Key, x.Value, x.Other)} },
	"Set":    func(s kvstore.Store, x Step) []any { return []any{s.Set(x.Key, x.Value)} },
	"Remove": func(s kvstore.Store, x Step) []any { return []any{s.Remove(x.Key, x.Value)} },
	"Take": func(s kvstore.Store, x Step) []any {
		value, ok := s.Take(x.Key)
		return []any{value, ok}
	},
	"look": func(s kvstore.Store, x Step) []any {
		return []any{s.Count(x.Key), s.Measure(x.Key), s.Has(x.Key, x.Value),
			slices.Concat(s.Get(x.Key)), slices.Concat(s.View(make([]string, 2), x.Key))}
	},
	"Expire":   func(s kvstore.Store, x Step) []any { return []any{s.Expire(x.Key, x.At)} },
	"PutUntil": func(s kvstore.Store, x Step) []any { s.PutUntil(x.Key, x.Value, x.At); return nil },
	"Deadline": func(s kvstore.Store, x Step) []any {
		at, ok := s.Deadline(x.Key)
		return []any{at, ok, s.Expiring()}
	},
	"NextDue": func(s kvstore.Store, x Step) []any {
		key, ok := s.NextDue(x.At) // which one, of several that go at that time, is the store's
		at, _ := s.Deadline(key)
		return []any{ok, ok && at <= x.At, at}
	},
}

// Those that are drawn, as often as they are there, and of these those with deadlines.
var (
	usual = strings.Fields("Put Put Put Update Update Remove Delete Set Take look look")
	timed = strings.Fields("Expire Expire PutUntil Deadline NextDue")
)

// Do does x to store and to m, and reports where they differ. The memory of what the store is given
// is used for something else then, as the server's is.
func (x Step) Do(t *testing.T, store kvstore.Store, m Model) {
	t.Helper()

	// A store that keeps a string without copying it is found out: its memory is overwritten below.
	lent, memory := x, []byte(x.Key+x.Value+x.Other)
	all := unsafe.String(unsafe.SliceData(memory), len(memory))
	lent.Key, all = all[:len(x.Key)], all[len(x.Key):]
	lent.Value, lent.Other = all[:len(x.Value)], all[len(x.Value):]

	got, want := operations[x.Op](store, lent), operations[x.Op](m, x)
	if !reflect.DeepEqual(got, want) {
		t.Fatalf("%s of %.40q, %.40q, %.40q, %d: %.100q, want %.100q", x.Op, x.Key, x.Value, x.Other,
			x.At, got, want)
	}

	for i := range memory {
		memory[i] = '!'
	}
}

// RandomStep does one random thing to store and to m, reports where they differ, and returns what
// it has done. Keys are few, and all is short.
func RandomStep(t *testing.T, random *rand.Rand, store kvstore.Store, m Model) {
	t.Helper()
	// There are few values, so that an Update or a Remove finds one now and then.
	value := func() string { return strings.Repeat(string(rune('a'+random.IntN(3))), random.IntN(4)) }
	draw(random, timed, fmt.Sprint("key", random.IntN(20)), value).Do(t, store, m)
}

// draw draws what to do with key: what is usual, or one of others.
func draw(random *rand.Rand, others []string, key string, value func() string) Step {
	op := random.IntN(len(usual) + len(others))
	name := slices.Concat(usual, others)[op]

	// There are few times, so that several keys have the same one; 0 is none.
	return Step{name, key, value(), value(), random.Int64N(5) * 1_000_000_000_000}
}

// TestStore reports where the stores that open makes, one after the other and each empty, do not
// what Model does, with keys and values of any size, and what they do to memory that they have
// handed out, or were given. A store may keep no deadlines, have no Snapshots, and not know its
// Size.
func TestStore(t *testing.T, open func() kvstore.Store) {
	t.Helper()
	for seed := 0; seed < 10; seed = Next(seed, 2) {
		testStore(t, rand.New(rand.NewPCG(uint64(seed), 11)), open())
	}
}

// handedOut is a list that a store has handed out, and a copy of what it was then.
type handedOut struct{ list, copy []string }

// taken is a snapshot, and what it should hold.
type taken struct {
	snapshot kvstore.Snapshot
	m        Model
}

// timedFor returns the operations with deadlines, or nothing if store keeps none. It leaves store
// without its key "key".
func timedFor(store kvstore.Store) []string {
	store.PutUntil("key", "value", 1)
	_, ok := store.Deadline("key")
	store.Delete("key")
	if !ok {
		return nil
	}

	return timed
}

// testStore is TestStore for one store.
func testStore(t *testing.T, random *rand.Rand, store kvstore.Store) {
	t.Helper()
	others := timedFor(store)

	// Some sizes are about ViewMost, behind which Memory keeps a list in another way.
	value := func() string {
		sizes := []int{0, 1, 1, 2, 40, 130, 300, kvstore.ViewMost - 8, kvstore.ViewMost, 6000}
		return strings.Repeat(string(rune('a'+random.IntN(3))), sizes[random.IntN(len(sizes))])
	}

	m := NewModel()
	var lists []handedOut
	var snapshots []taken
	for range 1500 {
		n := random.IntN(20)
		key := strings.Repeat(fmt.Sprint("key", n), []int{1, 1, 1, 60, 600}[n%5]) // up to 3,000 bytes

		x := draw(random, others, key, value)
		x.Do(t, store, m)

		switch random.IntN(20) {

		// A caller that appends to its list must not write into the store's memory.
		case 0, 1:
			list := store.Get(key)
			if cap(list) > len(list) {
				t.Fatalf("a list of %d leaves room to append to", len(list))
			}
			lists = append(lists, handedOut{list, slices.Clone(m.Get(key))})
		case 2, 3:
			lists = append(lists, handedOut{store.View(nil, key), slices.Clone(m.Get(key))})
		case 4:
			if s := store.Snapshot(); s != nil {
				// A few snapshots live at a time, while the store changes under them.
				snapshots = append(snapshots, taken{s, m.Clone()})
				snapshots = snapshots[max(0, len(snapshots)-3):]
			}

		// What the server does with a key whose time has come is a Delete.
		case 5:
			if due, ok := store.NextDue(x.At); ok {
				Step{Op: "Delete", Key: due}.Do(t, store, m)
			}
		case 6:
			store.Touch([]string{key, "none"})
		case 7:
			if err := store.Commit(); err != nil {
				t.Fatal(err)
			}
		}
	}

	CheckSame(t, store, m)
	for _, s := range snapshots {
		CheckSnapshot(t, s.snapshot, s.m)
	}
	checkLists(t, lists)
}

// checkLists wants that lists which a store has handed out are what they were, whatever it has done
// since.
func checkLists(t *testing.T, lists []handedOut) {
	t.Helper()
	for _, h := range lists {
		if !slices.Equal(h.list, h.copy) {
			t.Fatalf("a list that was %.100q became %.100q", h.copy, h.list)
		}
	}
}

// CheckSame reports where all of store differs from m.
func CheckSame(t *testing.T, store kvstore.Store, m Model) {
	t.Helper()
	for key := range m.lists {
		Step{Op: "look", Key: key}.Do(t, store, m)
	}

	// A store that does not know its size says -1.
	keys, values, bytes := store.Size()
	if k, v, b := m.Size(); keys >= 0 && (keys != k || values != v || bytes != b) {
		t.Fatalf("Size() = %d, %d, %d, want %d, %d, %d", keys, values, bytes, k, v, b)
	}

	if s := store.Snapshot(); s != nil {
		CheckSnapshot(t, s, m)
	}
}

// CheckSnapshot reports where a snapshot differs from m.
func CheckSnapshot(t *testing.T, s kvstore.Snapshot, m Model) {
	t.Helper()
	if !Same(s, m) || !Same(m, s) {
		t.Fatalf("a snapshot has\n%.1000q\nwant\n%.1000q", maps.Collect(s.All()), m)
	}

	if got := s.View(nil, "none"); got != nil {
		t.Fatalf("a snapshot has %q under no key", got)
	}
}

// History is what a script has done to a store: what the last Commit that
// returned nil covers, and what the next would have.
type History struct{ Told, Done Model }

// NewHistory returns one of a store in which nothing was done.
func NewHistory() *History { return &History{NewModel(), NewModel()} }

// Compacting is a Store that compacts its log in the background.
type Compacting interface {
	kvstore.Store
	AwaitCompaction()
}

// Script does the same things to a store each time, until one fails.
func Script(t *testing.T, d Compacting, h *History) error {
	random := rand.New(rand.NewPCG(7, 7))
	for range 60 {
		for range random.IntN(8) {
			RandomStep(t, random, d, h.Done)
		}

		if err := d.Commit(); err != nil {
			return err
		}

		// From here on nothing of this may be lost.
		h.Told = h.Done.Clone()

		// A compaction makes calls of its own: only with this their order is always the same.
		d.AwaitCompaction()
	}
	return nil
}
