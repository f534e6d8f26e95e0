package storetest

import (
	"iter"
	"kvserver/kvstore"
	"maps"
	"slices"
	"strings"
)

// Model is a Store that does what every store must do, in as few lines as possible: it is the
// specification. It never changes a list in place, so it may hand lists out.
type Model struct {
	lists map[string][]string
	ends  map[string]int64 // the deadlines of keys that have one
}

// NewModel returns an empty Model.
func NewModel() Model { return Model{map[string][]string{}, map[string]int64{}} }

// Clone returns a copy of m that later changes of m do not affect.
func (m Model) Clone() Model {
	c := Model{map[string][]string{}, maps.Clone(m.ends)}

	for key, list := range m.lists {
		c.lists[key] = slices.Clone(list)
	}
	return c
}

func (m Model) Put(key, value string)   { m.lists[key] = append(m.lists[key], value) }
func (m Model) Get(key string) []string { return slices.Clip(m.lists[key]) }

func (m Model) Delete(key string) (removed int) {
	removed = m.Count(key)
	delete(m.lists, key)
	delete(m.ends, key)
	return removed
}

func (m Model) Update(key, oldValue, newValue string) (replaced bool) {
	// Update adds the new value even if the old one is not there.
	replaced = m.cut(key, oldValue)
	m.Put(key, newValue)
	return replaced
}

func (m Model) Set(key, value string) (removed int) {
	removed = m.Delete(key)
	m.Put(key, value)
	return removed
}

func (m Model) Remove(key, value string) (removed bool) {
	// A key without values does not exist, and has no deadline.
	removed = m.cut(key, value)
	if m.Count(key) == 0 {
		m.Delete(key)
	}
	return removed
}

// cut removes the first value of key's list that is equal to value.
func (m Model) cut(key, value string) (found bool) {
	i := slices.Index(m.lists[key], value)
	if i >= 0 {
		// The list is copied because a Get may have handed it out.
		m.lists[key] = slices.Delete(slices.Clone(m.lists[key]), i, i+1)
	}
	return i >= 0
}

func (m Model) Take(key string) (value string, ok bool) {
	if m.Count(key) == 0 {
		return "", false
	}

	value = m.lists[key][0]
	return value, m.Remove(key, value)
}

func (m Model) Expire(key string, at int64) (ok bool) {
	if m.Count(key) == 0 {
		return false
	}

	if m.ends[key] = at; at == 0 {
		delete(m.ends, key)
	}
	return true
}

func (m Model) PutUntil(key, value string, at int64) {
	m.Put(key, value)
	m.Expire(key, at)
}

func (m Model) Deadline(key string) (at int64, ok bool) {
	at, ok = m.ends[key]
	return at, ok
}

func (m Model) NextDue(now int64) (key string, ok bool) {
	for k, at := range m.ends {
		// Of several keys with the same deadline any may be the first.
		if at <= now && (!ok || at < m.ends[key]) {
			key, ok = k, true
		}
	}
	return key, ok
}

func (m Model) Size() (keys, values int, bytes int64) {
	for key, list := range m.lists {
		keys++
		values += len(list)
		bytes += int64(len(key)) + m.Measure(key)
	}
	return keys, values, bytes
}

func (m Model) Count(key string) int               { return len(m.lists[key]) }
func (m Model) Has(key, value string) bool         { return slices.Contains(m.lists[key], value) }
func (m Model) Measure(key string) int64           { return int64(len(strings.Join(m.lists[key], ""))) }
func (m Model) View(_ []string, k string) []string { return m.Get(k) }
func (m Model) All() iter.Seq2[string, []string]   { return maps.All(m.lists) }
func (m Model) Snapshot() kvstore.Snapshot         { return m.Clone() }
func (m Model) Expiring() int                      { return len(m.ends) }
func (m Model) Commit() error                      { return nil }
func (m Model) Room(string, int64, int) error      { return nil }
func (m Model) Footprint() int64                   { return 0 }
func (m Model) Reclaim() int64                     { return 0 }
func (m Model) TouchPays() bool                    { return false }
func (m Model) Touch([]string)                     {}

// Equal reports whether a store, or a snapshot, holds what m does.
func (m Model) Equal(s kvstore.Snapshot) bool { return Same(m, s) }

// Same reports whether two stores, or snapshots, hold the same.
func Same(a, b kvstore.Snapshot) bool {
	keys := 0
	for key, list := range a.All() {
		at, ok := a.Deadline(key)
		end, has := b.Deadline(key)
		if keys++; !slices.Equal(list, b.View(nil, key)) || at != end || ok != has {
			return false
		}
	}

	// The loop above misses a key that only b has, but the number of keys shows it.
	for range b.All() {
		keys--
	}
	return keys == 0
}
