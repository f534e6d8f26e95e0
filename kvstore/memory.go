package kvstore

import (
	"hash/maphash"
	"iter"
	"slices"
	"strings"
	"unsafe"
	"weak"
)

// Memory is a Store in memory alone: it ends with its process, and
// Commit has nothing to do. It is not safe for concurrent access, and starts no
// goroutine. Make one with NewMemory.
//
// Short lists lie with their keys in slabs (slab.go), which an index finds (index.go): slabs and
// the index's pages have no pointers that the garbage collector would have to follow. Large values
// and long lists have memory of their own (large.go). A list that was handed out is never changed:
// a Put appends beyond the end of every list handed out before, an Update that would change one
// makes a new one, and bytes that somebody else may see are written once.
type Memory struct {
	view // what a snapshot copies

	// how many snapshots were taken. What has a lower epoch may be part of one: it is copied
	// before it is changed
	epoch  uint64
	latest weak.Pointer[snapshot] // the last of them, if somebody has it still

	// The index.
	pages int
	keys  int

	// The slabs.
	accounts []account // of slabs, by their numbers
	cleaner
	unused []int    // numbers of slabs that were dropped
	free   [][]byte // memory of these and of large entries, to be used again
	head   int      // where entries are added; 0: there is none yet
	used   int      // bytes of all slabs
	live   int      // bytes of all entries in them that the index points to

	// Large entries, and long lists.
	largeBytes int64 // memory of the entries
	longValues int   // in long lists
	longBytes  int64 // of these
	longGone   int64 // bytes of values that went, and that lists keep in memory

	deadlines deadlines

	values     int // in all
	keyBytes   int64
	valueBytes int64

	edit    [maxShort + 1]string // the short list that is being read or changed
	touched byte                 // by Touch
}

// NewMemory returns an empty store.
func NewMemory() *Memory {
	m := &Memory{view: view{seed: maphash.MakeSeed(), shift: 64}, pages: 1}

	// The index begins as one page, which every hash leads to.
	m.dir.push(m.epoch)
	*m.dir.at(0) = &page{}

	// Slab 0 is none. It counts as full, so the first entry opens a slab.
	m.slabs.push(m.epoch)
	m.accounts = []account{{written: slabSize}}
	return m
}

// Put appends value to key's list.
func (m *Memory) Put(key, value string) {
	at, e := m.find(key)
	m.tally(1, value)

	// A long list grows where it is; its entry stays.
	values := m.edit[:0]
	if e == nil {
		m.keyBytes += int64(len(key))
	} else if l := m.ownLong(at.slot); l != nil {
		m.append(l, value)
		return
	} else {
		values = e.values(values)
	}

	// The entry of a new key or of a short list is written, with one value more.
	m.store(at, key, append(values, value))
}

// tally counts a value that comes (n is 1) or goes (-1).
func (m *Memory) tally(n int, value string) {
	m.values += n
	m.valueBytes += int64(n * len(value))
}

// store writes the list of the key at a spot anew, and leaves its deadline.
func (m *Memory) store(at spot, key string, values []string) {
	m.storeUntil(at, key, values, m.deadline(at.slot))
}

// storeUntil is store with a new deadline; 0: none.
func (m *Memory) storeUntil(at spot, key string, values []string, deadline int64) {
	// A list of too many values or bytes becomes a long one; its entry has the key alone.
	var l *list
	if len(values) > maxShort || len(values) > 1 && SizeOf(values) > maxShortBytes {
		l, values = m.newList(values), nil
	}

	// The new entry is written before the old one goes: values may be parts of that.
	addr, size := uint64(0), entrySize(key, values, deadline)
	if l != nil || size > ownSize {
		addr = m.writeLarge(at.slot, key, values, l, deadline)
	} else {
		var b []byte
		addr, b = m.grow(size)
		writeEntry(b, key, values, deadline)
	}

	// A large entry that replaces a large one has its number: the index is right already.
	if addr != at.slot&addrMask {
		m.point(at, addr)
		if at.slot != 0 {
			size += m.die(at.slot)
		}
	}

	// Cleaning keeps pace with what is written and what dies.
	m.clean(size)
}

// Get returns key's list. A short one is a copy, so that it keeps nothing else in memory.
func (m *Memory) Get(key string) []string {
	at, e := m.find(key)
	if e == nil {
		return nil
	}

	// A long list is shared, not copied: the store leaves the part that is handed out as it is.
	if l := m.long(at.slot); l != nil {
		return m.handOut(l)
	}
	return CloneAll(e.values(nil))
}

// View is Get without a copy. A short list is made in scratch, and its strings may be
// parts of a piece of memory of 256 KiB, which stays as long as one of them does: a
// caller that keeps such a list for long clones it (CloneAll).
func (m *Memory) View(scratch []string, key string) []string {
	at, e := m.find(key)
	if e == nil {
		return nil
	}

	// Memory of which a part is shown is not used again, for the caller may still read it.
	if at.slot&largeBit == 0 {
		m.accounts[at.slot&addrMask>>slabBits].shown = true
	} else if r := m.large.at(number(at.slot)); r.list != nil {
		return m.handOut(r.list)
	} else if r.epoch == m.epoch { // else it is not used again anyway
		r.shown = true
	}

	return e.values(scratch[:0])
}

// CloneAll returns a copy of values, in one piece of memory.
func CloneAll(values []string) []string {
	all := strings.Join(values, "")
	if len(values) == 1 {
		all = strings.Clone(all) // Join has not copied it
	}

	// Each clone is a part of the one copy.
	clones := make([]string, len(values))
	for i, v := range values {
		clones[i], all = all[:len(v)], all[len(v):]
	}
	return clones
}

// Delete removes key and returns how many values it had.
func (m *Memory) Delete(key string) (removed int) {
	at, e := m.find(key)
	if e == nil {
		return 0
	}
	removed = m.forget(at, e)
	m.remove(at, key)
	return removed
}

// forget takes all values of the key at a spot out of what is counted, and its deadline.
func (m *Memory) forget(at spot, e entry) (removed int) {
	m.noteDeadline(at.h, m.deadline(at.slot), 0)

	// A long list knows its sums, so it is not walked through.
	bytes := int64(0)
	if l := m.long(at.slot); l != nil {
		removed, bytes = len(l.values), l.bytes
		m.longValues -= removed
		m.longBytes -= bytes
		m.longGone -= l.gone
	} else {
		values := e.values(m.edit[:0])
		removed, bytes = len(values), int64(SizeOf(values))
	}

	m.values -= removed
	m.valueBytes -= bytes
	return removed
}

// remove removes key, whose values are forgotten.
func (m *Memory) remove(at spot, key string) {
	m.keyBytes -= int64(len(key))
	m.unpoint(at)
	m.clean(m.die(at.slot))
}

// Set makes value key's only one, and returns how many there were.
func (m *Memory) Set(key, value string) (removed int) {
	at, e := m.find(key)
	if e == nil {
		m.keyBytes += int64(len(key))
	} else {
		removed = m.forget(at, e)
	}

	// The value is alone, and the key has no deadline any more: a Set ends it.
	m.tally(1, value)
	m.storeUntil(at, key, append(m.edit[:0], value), 0)
	return removed
}

// Remove removes the first value equal to value, and the key with its last. It takes as
// long as an Update.
func (m *Memory) Remove(key, value string) (removed bool) { return m.RemoveAt(key, value, -1) >= 0 }

// RemoveAt is Remove. It returns the place of the value, -1 if there is none. In a long list it
// looks at the place hint first: if that has the value it counts as the first.
func (m *Memory) RemoveAt(key, value string, hint int) (place int) {
	at, e := m.find(key)
	if e == nil {
		return -1
	}

	// A long list has hashes, so that few of its values are compared.
	if l := m.long(at.slot); l != nil {
		place = m.index(l, value, hint)
	} else {
		place = slices.Index(e.values(m.edit[:0]), value)
	}

	if place >= 0 {
		m.takeAt(at, key, e, place)
	}
	return place
}

// takeAt removes value n of the key at a spot, and the key with its last.
func (m *Memory) takeAt(at spot, key string, e entry, n int) {
	// While another value is left, the list becomes shorter and the key stays.
	if l := m.ownLong(at.slot); l != nil {
		if len(l.values) > 1 {
			m.takeOut(l, n)
			return
		}
	} else if values := e.values(m.edit[:0]); len(values) > 1 {
		m.tally(-1, values[n])
		m.store(at, key, slices.Delete(values, n, n+1))
		return
	}

	// That was the last value: the key goes, and its deadline with it.
	m.forget(at, e)
	m.remove(at, key)
}

// Take removes key's oldest value, and the key with its last. Of a long list it takes a
// constant time, on the average of many.
func (m *Memory) Take(key string) (value string, ok bool) {
	at, e := m.find(key)
	if e == nil {
		return "", false
	}

	// A value of a short list is part of its entry, whose memory may be used again: clone it.
	if l := m.long(at.slot); l != nil {
		value = l.values[0]
	} else {
		value = strings.Clone(e.values(m.edit[:0])[0])
	}

	m.takeAt(at, key, e, 0)
	return value, true
}

// Count returns how many values key has.
func (m *Memory) Count(key string) (n int) {
	at, e := m.find(key)
	if e == nil {
		return 0
	}

	// The entry of a long list has no values: they are in the list.
	if l := m.long(at.slot); l != nil {
		return len(l.values)
	}
	n, _, _ = e.list()
	return n
}

// Update removes the first value equal to oldValue and appends newValue. On a
// list of n values that takes time in proportion to n, and about ten times as
// long where the list was handed out since the last one, for then it is copied.
// Where the first value goes it takes no longer than a Put.
func (m *Memory) Update(key, oldValue, newValue string) (replaced bool) {
	return m.UpdateAt(key, oldValue, newValue, -1) >= 0
}

// UpdateAt is Update. It returns the place of the value that it removed, -1 if there is none. In a
// long list it looks at the place hint before it searches: a caller that knows the place saves the
// search.
func (m *Memory) UpdateAt(key, oldValue, newValue string, hint int) (place int) {
	at, e := m.find(key)
	if e == nil {
		m.Put(key, newValue)
		return -1
	}

	m.tally(1, newValue)

	// A long list is changed where it is; its entry stays.
	if l := m.ownLong(at.slot); l != nil {
		if place = m.index(l, oldValue, hint); place >= 0 {
			m.takeOut(l, place)
		}
		m.append(l, newValue)
		return place
	}

	// A short list is written anew, with the deadline that it had.
	values := e.values(m.edit[:0])
	if place = slices.Index(values, oldValue); place >= 0 {
		m.tally(-1, oldValue)
		copy(values[place:], values[place+1:])
		values = values[:len(values)-1]
	}
	m.store(at, key, append(values, newValue))
	return place
}

// Commit does nothing: memory is as durable as this store gets.
func (m *Memory) Commit() error { return nil }

// Room returns nil: memory is the server's to ration.
func (m *Memory) Room(int64, bool) error { return nil }

// Size returns how much the store holds.
func (m *Memory) Size() (keys, values int, bytes int64) {
	return m.keys, m.values, m.keyBytes + m.valueBytes
}

// KeyBytes returns how many bytes all keys have, without their values.
func (m *Memory) KeyBytes() int64 { return m.keyBytes }

// Footprint returns how many bytes of memory the store takes, about: all that a snapshot
// shares with it counts once. What waits to be used again, 4 MiB at most, does not count.
func (m *Memory) Footprint() int64 {
	const pageSize = int(unsafe.Sizeof(page{}))
	const largePageSize = int(unsafe.Sizeof(tablePage[large]{}))

	// Values that went count as long as a list's array keeps them in memory (longGone).
	return int64(m.used+m.pages*pageSize+8*m.dir.len+len(m.large.pages)*largePageSize+
		m.longValues*perLongValue+m.deadlines.bytes()) + m.largeBytes + m.longBytes + m.longGone
}

// Measure returns how many bytes key's values have together.
func (m *Memory) Measure(key string) (bytes int64) {
	at, e := m.find(key)
	if e == nil {
		return 0
	}

	if l := m.long(at.slot); l != nil {
		return l.bytes
	}
	return int64(SizeOf(e.values(m.edit[:0])))
}

// Has tells whether key's list has value. It hands nothing out.
func (m *Memory) Has(key, value string) bool {
	at, e := m.find(key)
	if e == nil {
		return false
	}

	if l := m.long(at.slot); l != nil {
		return m.index(l, value, -1) >= 0
	}
	return slices.Contains(e.values(m.edit[:0]), value)
}

// touchMost is how many keys are touched at a time: what they need stays in the cache.
const touchMost = 256

// touchSize is how many bytes of store a processor's cache holds anyway.
const touchSize = 4 << 20

// TouchPays tells whether the store is larger than a processor's cache.
func (m *Memory) TouchPays() bool { return m.used+m.pages<<12 >= touchSize }

// Touch brings what a find of each of these keys needs into the processor's cache, for
// requests that follow. One after the other each would wait for memory three times; here
// those waits overlap, for no step of a loop needs the one before. (Valkey 8 calls this
// memory access amortization.)
func (m *Memory) Touch(keys []string) {
	var hashes, slots [touchMost]uint64
	for len(keys) > 0 {
		n := min(len(keys), touchMost)

		// First the hashes, which need nothing of the store but its seed.
		for i, key := range keys[:n] {
			hashes[i] = maphash.String(m.seed, key)
		}

		// Then the slots where the searches begin: the waits for their pages overlap.
		for i, h := range hashes[:n] {
			slots[i] = m.page(h).slots[home(h<<addrBits)]
		}

		// Then the entries that these slots point to, as their addresses are known now.
		sum := byte(0)
		for _, slot := range slots[:n] {
			if slot != 0 {
				sum += m.entry(slot)[0]
			}
		}

		// Without a use of the sum the compiler could leave out what is read for it.
		m.touched += sum
		keys = keys[n:]
	}
}

// All yields every key with its list, as they are when All is called. They may be kept.
func (m *Memory) All() iter.Seq2[string, []string] {
	now := m.snapshot()
	return func(yield func(string, []string) bool) {
		for key, values := range now.All() {
			// The snapshot overwrites its list with the next one, so the caller gets a copy.
			if !yield(key, slices.Clip(slices.Clone(values))) {
				return
			}
		}
	}
}

// snapshot is what a Memory held at one moment. Any goroutine may look at it, while the
// Memory's owner goes on.
type snapshot struct{ view }

// Snapshot takes one: a copy of three lists of pages, which have a pointer for 64 items. That takes
// a fraction of a millisecond for some million keys. From then on the Memory copies each page
// before it changes it for the first time; what the snapshot alone still needs stays in memory as
// long as somebody has the snapshot.
func (m *Memory) Snapshot() Snapshot { return m.snapshot() }

func (m *Memory) snapshot() *snapshot {
	// All that there is has a lower epoch now, so the Memory copies it before a change.
	m.epoch++
	s := &snapshot{m.view}
	s.dir, s.slabs, s.large = s.dir.clone(), s.slabs.clone(), s.large.clone()

	// Cleaning slabs that the snapshot has gives nothing back: they are left alone.
	m.latest = weak.Make(s)
	m.hold()
	return s
}

// View returns key's list. Like Memory's it makes a short one in scratch.
func (s *snapshot) View(scratch []string, key string) []string {
	at, e := s.find(key)
	if e == nil {
		return nil
	}
	return s.list(at.slot, scratch)
}

// list returns the list of a slot.
func (s *snapshot) list(slot uint64, scratch []string) []string {
	if slot&largeBit != 0 {
		if l := s.large.at(number(slot)).list; l != nil {
			return slices.Clip(l.values)
		}
	}

	return s.entry(slot).values(scratch[:0])
}

// All yields every key with its list, which is overwritten with the next one.
func (s *snapshot) All() iter.Seq2[string, []string] {
	return func(yield func(string, []string) bool) {
		var last *page
		var scratch [maxShort]string
		for i := range s.dir.len {
			// A page of lower depth is in the directory several times in a row: it is listed once.
			p := *s.dir.at(i)
			if p == last {
				continue
			}
			last = p

			for _, slot := range p.slots {
				if slot == 0 {
					continue
				}

				// A short list is made in scratch, so it is good until the next one.
				if !yield(viewOf(s.entry(slot).key()), s.list(slot, scratch[:])) {
					return
				}
			}
		}
	}
}

// SizeOf returns how many bytes the text of values takes together.
func SizeOf(values []string) (bytes int) {
	for _, v := range values {
		bytes += len(v)
	}
	return bytes
}
