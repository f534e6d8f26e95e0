package storetest

import (
	"fmt"
	"iter"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
)

// Store is a part of kvstore.Store, which this package cannot import: that one's tests import it.
type Store = interface {
	Put(key, value string)
	Get(key string) []string
	Delete(key string) (removed int)
	Update(key, oldValue, newValue string) (replaced bool)
	Set(key, value string) (removed int)
	Remove(key, value string) (removed bool)
	Take(key string) (value string, ok bool)
	Count(key string) int
	Commit() error
}

// Model is what every store must do, in as few words as possible: the specification.
type Model map[string][]string

func (m Model) Put(key, value string)   { m[key] = append(m[key], value) }
func (m Model) Get(key string) []string { return m[key] }
func (m Model) Delete(key string) int {
	n := len(m[key])
	delete(m, key)
	return n
}
func (m Model) Update(key, oldValue, newValue string) bool {
	i := slices.Index(m[key], oldValue)
	if i >= 0 {
		m[key] = slices.Delete(slices.Clone(m[key]), i, i+1)
	}
	m.Put(key, newValue)
	return i >= 0
}

func (m Model) Set(key, value string) int {
	n := len(m[key])
	m[key] = []string{value}
	return n
}
func (m Model) Remove(key, value string) bool {
	i := slices.Index(m[key], value)
	if i >= 0 {
		m[key] = slices.Delete(slices.Clone(m[key]), i, i+1)
	}
	if len(m[key]) == 0 {
		delete(m, key)
	}
	return i >= 0
}

func (m Model) Take(key string) (value string, ok bool) {
	if ok = len(m[key]) > 0; ok {
		value = m[key][0]
		m.Remove(key, value)
	}
	return value, ok
}
func (m Model) Count(key string) int { return len(m[key]) }

// Size is what Size must return.
func (m Model) Size() (keys, values int, bytes int64) {
	for key, list := range m {
		keys++
		values += len(list)
		bytes += int64(len(key) + len(strings.Join(list, "")))
	}
	return keys, values, bytes
}

// RandomStep does one random thing to store and to m, and reports where they
// differ.
func RandomStep(t *testing.T, random *rand.Rand, store Store, m Model) {
	t.Helper()
	key := fmt.Sprint("key", random.IntN(20))
	value := strings.Repeat(string(rune('a'+random.IntN(3))), random.IntN(4))
	switch random.IntN(14) {
	case 13:
		got, _ := store.Take(key)
		if want, _ := m.Take(key); got != want {
			t.Fatalf("Take(%q) = %q, want %q", key, got, want)
		}
		if got, want := store.Count(key), m.Count(key); got != want {
			t.Fatalf("Count(%q) = %d, want %d", key, got, want)
		}
	case 10:
		if got, want := store.Set(key, value), m.Set(key, value); got != want {
			t.Fatalf("Set(%q, %q) = %d, want %d", key, value, got, want)
		}
	case 11, 12:
		if got, want := store.Remove(key, value), m.Remove(key, value); got != want {
			t.Fatalf("Remove(%q, %q) = %v, want %v", key, value, got, want)
		}
	case 0, 1, 2:
		store.Put(key, value)
		m.Put(key, value)
	case 3:
		if got, want := store.Delete(key), m.Delete(key); got != want {
			t.Fatalf("Delete(%q) = %d, want %d", key, got, want)
		}
	case 4, 5, 6, 7:
		other := strings.Repeat(string(rune('a'+random.IntN(3))), random.IntN(4))
		if got, want := store.Update(key, value, other), m.Update(key, value, other); got != want {
			t.Fatalf("Update(%q, %q, %q) = %v, want %v", key, value, other, got, want)
		}
	default:
		if got, want := store.Get(key), m.Get(key); !slices.Equal(got, want) {
			t.Fatalf("Get(%q) = %q, want %q", key, got, want)
		}
	}
}

// History is what a script has done to a store: what the last Commit that
// returned nil covers, and what the next would have.
type History struct{ Told, Done Model }

// Clone returns a copy of m that changes of m leave alone.
func (m Model) Clone() Model {
	c := Model{}
	for key, list := range m {
		c[key] = slices.Clone(list)
	}
	return c
}

// Compacting is a Store that compacts its log in the background.
type Compacting interface {
	Store
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
		h.Told = h.Done.Clone()
		d.AwaitCompaction()
	}
	return nil
}

// Equal tells whether d holds what m does.
func (m Model) Equal(d interface {
	All() iter.Seq2[string, []string]
}) bool {
	return maps.EqualFunc(maps.Collect(d.All()), m, slices.Equal[[]string])
}

// NewHistory returns one of a store in which nothing was done.
func NewHistory() *History { return &History{Model{}, Model{}} }

// CheckSame reports where all of store differs from m.
func CheckSame(t *testing.T, store interface {
	All() iter.Seq2[string, []string]
	Size() (keys, values int, bytes int64)
}, m Model) {
	t.Helper()
	if got := maps.Collect(store.All()); !maps.EqualFunc(got, m, slices.Equal[[]string]) {
		t.Fatalf("All yields %q, want %q", got, m)
	}
	keys, values, bytes := store.Size()
	if k, v, b := m.Size(); keys != k || values != v || bytes != b {
		t.Fatalf("Size() = %d, %d, %d, want %d, %d, %d", keys, values, bytes, k, v, b)
	}
}
