package kvstore

import (
	"iter"
	"slices"
	"strings"
)

// Memory is a KVStore in memory alone: a process that ends takes it along, and
// Commit has nothing to do. It is not safe for concurrent access, and starts no
// goroutine. Make one with NewMemory.
//
// A list that was handed out is never changed. A Put appends beyond the end of
// every list handed out before; an Update that would change one makes a new one.
type Memory struct {
	one    map[string]*[1]string // the usual key has one value: a list of one needs no slice header and no spare room
	many   map[string]*list      // keys that had two values once; no key is in both maps
	values int                   // in all
	bytes  int64                 // of keys and values
}

// list is the values of a key that has had more than one.
type list struct {
	values []string
	bytes  int64 // of the values, so that Delete need not walk through them
	shared bool  // values were handed out, so they stay as they are
}

// NewMemory returns an empty store.
func NewMemory() *Memory {
	return &Memory{one: make(map[string]*[1]string), many: make(map[string]*list)}
}

// Put appends value to key's list.
func (m *Memory) Put(key, value string) {
	if l := m.long(key); l != nil {
		m.append(l, value)
	} else if first := m.one[key]; first == nil {
		m.setOne(key, value)
		m.values++
		m.bytes += int64(len(key) + len(value))
	} else {
		delete(m.one, key)
		l := &list{values: []string{first[0]}, bytes: int64(len(first[0]))}
		m.many[strings.Clone(key)] = l
		m.append(l, value)
	}
}

// Get returns key's list.
func (m *Memory) Get(key string) []string {
	if first := m.one[key]; first != nil {
		return first[:]
	}
	if l := m.long(key); l != nil {
		l.shared = true
		return slices.Clip(l.values)
	}
	return nil
}

// Delete removes key and returns how many values it had.
func (m *Memory) Delete(key string) (removed int) {
	var bytes int64
	if first := m.one[key]; first != nil {
		removed, bytes = 1, int64(len(first[0]))
		delete(m.one, key)
	} else if l := m.long(key); l != nil {
		removed, bytes = len(l.values), l.bytes
		delete(m.many, key)
	} else {
		return 0
	}
	m.values -= removed
	m.bytes -= bytes + int64(len(key))
	return removed
}

// Update removes the first value equal to oldValue and appends newValue. On a
// list of n values that takes time in proportion to n, and about ten times as
// long where the list was handed out since the last one, for then it is copied.
// Where the first value goes it takes no longer than a Put.
func (m *Memory) Update(key, oldValue, newValue string) (replaced bool) {
	return m.update(key, oldValue, newValue, -1) >= 0
}

// update is Update. It returns the place of the value that it removed, -1 if there is
// none. It looks at the place hint before it searches: a log that says the place makes
// long lists cheap to load.
func (m *Memory) update(key, oldValue, newValue string, hint int) (place int) {
	if first := m.one[key]; first != nil {
		if first[0] != oldValue {
			m.Put(key, newValue)
			return -1
		}
		m.setOne(key, newValue)
		m.bytes += int64(len(newValue) - len(oldValue))
		return 0
	}
	l := m.long(key)
	if l == nil {
		m.Put(key, newValue)
		return -1
	}
	i := hint
	if i < 0 || i >= len(l.values) || l.values[i] != oldValue {
		i = slices.Index(l.values, oldValue)
	}
	switch {
	case i == 0:
		l.values = l.values[1:]
	case i > 0 && l.shared:
		// A new list, with the room that append would leave beside the new value.
		l.values = append(append(make([]string, 0, len(l.values)), l.values[:i]...), l.values[i+1:]...)
		l.shared = false
	case i > 0:
		l.values = slices.Delete(l.values, i, i+1)
	}
	if i >= 0 {
		m.values--
		m.bytes -= int64(len(oldValue))
		l.bytes -= int64(len(oldValue))
	}
	m.append(l, newValue)
	return i
}

// Commit does nothing: memory is as durable as this store gets.
func (m *Memory) Commit() error { return nil }

// Size returns how much the store holds.
func (m *Memory) Size() (keys, values int, bytes int64) {
	return len(m.one) + len(m.many), m.values, m.bytes
}

// Measure returns how many bytes key's values have together.
func (m *Memory) Measure(key string) (bytes int64) {
	if first := m.one[key]; first != nil {
		return int64(len(first[0]))
	}
	if l := m.long(key); l != nil {
		return l.bytes
	}
	return 0
}

// All yields every key with its list.
func (m *Memory) All() iter.Seq2[string, []string] {
	return func(yield func(string, []string) bool) {
		for key, first := range m.one {
			if !yield(key, first[:]) {
				return
			}
		}
		for key, l := range m.many {
			l.shared = true
			if !yield(key, slices.Clip(l.values)) {
				return
			}
		}
	}
}

// long returns the list of a key that has had more than one value, or nil.
func (m *Memory) long(key string) *list {
	if len(m.many) == 0 {
		return nil // spare the usual store the hashing
	}
	return m.many[key]
}

// setOne makes value key's only one. Key and value share one allocation, and
// the map takes the new key even where it has an equal one.
func (m *Memory) setOne(key, value string) {
	both := key + value
	m.one[both[:len(key)]] = &[1]string{both[len(key):]}
}

// append adds a clone of value to the end of l.
func (m *Memory) append(l *list, value string) {
	l.values = append(l.values, strings.Clone(value))
	l.bytes += int64(len(value))
	m.values++
	m.bytes += int64(len(value))
}
