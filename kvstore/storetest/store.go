package storetest

import (
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"
	"unsafe"

	"kvserver/kvstore"
	"kvserver/kvstore/storage"
)

// Step is one operation on a store.
type Step struct {
	Op                string // a key of operations
	Key, Value, Other string
	At                int64
}

// operations are the operations on a store, each with what it returns.
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
		key, ok := s.NextDue(x.At) // which one of several that are due is up to the store
		at, _ := s.Deadline(key)
		return []any{ok, ok && at <= x.At, at}
	},
}

// The operations that draw chooses from, with their frequencies; timed are those with deadlines.
var (
	usual = strings.Fields("Put Put Put Update Update Remove Delete Set Take look look")
	timed = strings.Fields("Expire Expire PutUntil Deadline NextDue")
)

// Do does x to store and to m, and reports a difference. The memory of the strings that the store
// was given is overwritten afterwards, as the server reuses its own.
func (x Step) Do(t *testing.T, store kvstore.Store, m Model) {
	t.Helper()

	// The strings share memory that is overwritten below, to detect a store that keeps them
	// uncopied.
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

// RandomStep does one random thing to store and to m, and reports a difference. There are few keys,
// and all strings are short.
func RandomStep(t *testing.T, random *rand.Rand, store kvstore.Store, m Model) {
	t.Helper()
	// There are few values, so that an Update or a Remove sometimes finds one.
	value := func() string { return strings.Repeat(string(rune('a'+random.IntN(3))), random.IntN(4)) }
	draw(random, timed, fmt.Sprint("key", random.IntN(20)), value).Do(t, store, m)
}

// draw draws an operation on key from the usual ones and others.
func draw(random *rand.Rand, others []string, key string, value func() string) Step {
	op := random.IntN(len(usual) + len(others))
	name := slices.Concat(usual, others)[op]

	// There are few times, so that several keys have the same one; 0 means none.
	return Step{name, key, value(), value(), random.Int64N(5) * 1_000_000_000_000}
}

// TestStore opens several stores, each of which must be empty, and reports where they behave
// differently from Model, with keys and values of any size, and where they change memory that they
// have handed out or keep memory that they were given. A store need not keep deadlines, make
// Snapshots or know its Size.
func TestStore(t *testing.T, open func() kvstore.Store) {
	t.Helper()
	for seed := 0; seed < 10; seed = Next(seed, 2) {
		testStore(t, rand.New(rand.NewPCG(uint64(seed), 11)), open())
	}
}

// handedOut is a list that a store has handed out, and a copy made at that time.
type handedOut struct{ list, copy []string }

// taken is a snapshot, and what it should hold.
type taken struct {
	snapshot kvstore.Snapshot
	m        Model
}

// timedFor returns the operations with deadlines, or nil if store keeps none. It removes the key
// "key" from store.
func timedFor(store kvstore.Store) []string {
	store.PutUntil("key", "value", 1)
	_, ok := store.Deadline("key")
	store.Delete("key")
	if !ok {
		return nil
	}

	return timed
}

// drawValue draws a value. Some sizes are near ViewMost, because Memory keeps lists above it in
// another way.
func drawValue(random *rand.Rand) string {
	sizes := []int{0, 1, 1, 2, 40, 130, 300, kvstore.ViewMost - 8, kvstore.ViewMost, 6000}
	return strings.Repeat(string(rune('a'+random.IntN(3))), sizes[random.IntN(len(sizes))])
}

// testStore is TestStore for one store.
func testStore(t *testing.T, random *rand.Rand, store kvstore.Store) {
	t.Helper()
	others := timedFor(store)

	m := NewModel()
	var lists []handedOut
	var snapshots []taken
	for range 1500 {
		n := random.IntN(20)
		key := strings.Repeat(fmt.Sprint("key", n), []int{1, 1, 1, 60, 600}[n%5]) // up to 3,000 bytes

		x := draw(random, others, key, func() string { return drawValue(random) })
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
				// Up to three snapshots live at a time, while the store changes under them.
				snapshots = append(snapshots, taken{s, m.Clone()})
				snapshots = snapshots[max(0, len(snapshots)-3):]
			}

		// The server deletes a key that is due.
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
		case 8:
			value, _ := store.Take(key)
			m.Take(key)
			lists = append(lists, handedOut{[]string{value}, []string{strings.Clone(value)}})
		}
	}

	CheckSame(t, store, m)
	for _, s := range snapshots {
		CheckSnapshot(t, s.snapshot, s.m)
	}
	checkLists(t, lists)
}

// checkLists wants that lists which a store has handed out have not changed since.
func checkLists(t *testing.T, lists []handedOut) {
	t.Helper()
	for _, h := range lists {
		if !slices.Equal(h.list, h.copy) {
			t.Fatalf("a list that was %.100q became %.100q", h.copy, h.list)
		}
	}
}

// CheckSame reports where store differs from m, looking at every key of m and at Size and Snapshot.
func CheckSame(t *testing.T, store kvstore.Store, m Model) {
	t.Helper()
	for key := range m.lists {
		Step{Op: "look", Key: key}.Do(t, store, m)
	}

	// A store that does not know its size returns -1.
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

// History is what a script has done to a store: Told is what the last Commit without an error
// covers, and Done what the next one would cover.
type History struct{ Told, Done Model }

// NewHistory returns the History of an empty store.
func NewHistory() *History { return &History{NewModel(), NewModel()} }

// Compacting is a Store that compacts its log in the background.
type Compacting interface {
	kvstore.Store
	AwaitCompaction()
}

// Commit commits a store, and while there is no room it tries again, as a server does.
func Commit(d kvstore.KVStore) error {
	for {
		err := d.Commit()
		if !errors.Is(err, storage.ErrNoRoom) {
			return err
		}
		<-time.After(time.Second)
	}
}

// Script does the same random things to a store in each run, and ends at the first error of a
// Commit.
func Script(t *testing.T, d Compacting, h *History) error {
	random := rand.New(rand.NewPCG(7, 7))
	for range 60 {
		for range random.IntN(8) {
			RandomStep(t, random, d, h.Done)
		}

		if err := Commit(d); err != nil {
			return err
		}

		// From here on nothing of this may be lost.
		h.Told = h.Done.Clone()

		// A compaction makes calls of its own: unless each is awaited, their order differs between
		// runs.
		d.AwaitCompaction()
	}
	return nil
}
