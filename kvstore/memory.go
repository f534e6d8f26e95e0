package kvstore

import (
	"hash/maphash"
	"iter"
	"slices"
	"strings"
	"unsafe"
	"weak"
)

// Memory is a Store in memory alone: it ends with its process, and Commit has nothing to do. It is
// not safe for concurrent access, and starts no goroutine. NewMemory makes one.
//
// Short lists lie with their keys in slabs (slab.go), and an index finds them there (index.go).
// Slabs and the index's pages have no pointers that the garbage collector would have to follow.
// Large values and long lists have memory of their own (large.go). A list that was handed out is
// never changed: a Put appends beyond the end of every list handed out before, an Update that
// would change such a list makes a new one, and bytes that somebody else may see are written once.
type Memory struct {
	view // what a snapshot copies

	// How many snapshots were taken. Pages, lists and slabs of a lower epoch may be part of a
	// snapshot: pages and lists are copied before a change, and slabs are not reused.
	epoch  uint64
	latest weak.Pointer[snapshot] // the last one, if somebody still has it

	// The index.
	pages int
	keys  int

	// The slabs.
	accounts []account // of slabs, by their numbers
	cleaner
	unused []int    // numbers of slabs that were dropped
	free   [][]byte // memory of dropped slabs and large entries, to be reused
	head   int      // the slab to which entries are added; 0: there is none yet
	used   int      // bytes of all slabs
	live   int      // bytes of all entries in slabs that the index points to

	// Large entries, and long lists.
	largeBytes int64 // memory of the entries
	longValues int   // values in long lists
	longBytes  int64 // bytes of these values
	longGone   int64 // bytes of removed values that long lists keep in memory

	deadlines deadlines

	values     int // of all keys
	keyBytes   int64
	valueBytes int64

	edit    [maxShort + 1]string // the short list that is being read or changed
	touched byte                 // a sum of what Touch read, so that the compiler keeps the reads
}

// NewMemory returns an empty store.
func NewMemory() *Memory {
	m := &Memory{view: view{seed: maphash.MakeSeed(), shift: 64}, pages: 1}

	// The index begins as a single page for all hashes.
	m.dir.push(m.epoch)
	*m.dir.at(0) = &page{}

	// Number 0 means no slab. It counts as full, so the first entry opens a slab.
	m.slabs.push(m.epoch)
	m.accounts = []account{{written: slabSize}}
	return m
}

// Put appends value to key's list.
func (m *Memory) Put(key, value string) {
	at, e := m.find(key)
	m.tally(1, value)

	// A long list grows in place; its entry stays.
	values := m.edit[:0]
	if e == nil {
		m.keyBytes += int64(len(key))
	} else if l := m.ownLong(at.slot); l != nil {
		m.append(l, value)
		return
	} else {
		values = e.values(values)
	}

	// The entry of a new key or of a short list is written with the new value at its end.
	m.store(at, key, append(values, value))
}

// tally counts a value that is added (n is 1) or removed (n is -1).
func (m *Memory) tally(n int, value string) {
	m.values += n
	m.valueBytes += int64(n * len(value))
}

// store writes a new entry with the list of the key at a spot, and keeps its deadline.
func (m *Memory) store(at spot, key string, values []string) {
	m.storeUntil(at, key, values, m.deadline(at.slot))
}

// storeUntil is store with a new deadline; 0: none.
func (m *Memory) storeUntil(at spot, key string, values []string, deadline int64) {
	// A list with too many values or bytes becomes a long list; its entry has only the key.
	var l *longList
	if len(values) > maxShort || len(values) > 1 && SizeOf(values) > maxShortBytes {
		l, values = m.newList(values), nil
	}

	// The new entry is written before the old one dies, because values may be parts of the old one.
	addr, size := uint64(0), entrySize(key, values, deadline)
	if l != nil || size > ownSize {
		addr = m.writeLarge(at.slot, key, values, l, deadline)
	} else {
		var b []byte
		addr, b = m.grow(size)
		writeEntry(b, key, values, deadline)
	}

	// A large entry that replaces a large one keeps its number, so the index is right already.
	if addr != at.slot&addrMask {
		m.point(at, addr)
		if at.slot != 0 {
			size += m.die(at.slot)
		}
	}

	// Cleaning keeps pace with what is written and what dies.
	m.clean(size)
}

// Get returns key's list. A short list is copied, so that it keeps nothing else in memory.
func (m *Memory) Get(key string) []string {
	at, e := m.find(key)
	if e == nil {
		return nil
	}

	// A long list is shared, not copied: the store never changes the part that was handed out.
	if l := m.long(at.slot); l != nil {
		return m.handOut(l)
	}
	return CloneAll(e.values(nil))
}

// View is Get without a copy. A short list is made in scratch, and its strings may be
// parts of a slab of 256 KiB, which stays in memory while one of them does. So a
// caller that keeps such a list for long clones it (CloneAll).
func (m *Memory) View(scratch []string, key string) []string {
	at, e := m.find(key)
	if e == nil {
		return nil
	}

	// Memory of which the caller sees a part is marked: it must not be reused.
	if at.slot&largeBit == 0 {
		m.accounts[at.slot&addrMask>>slabBits].shown = true
	} else if r := m.large.at(number(at.slot)); r.long != nil {
		return m.handOut(r.long)
	} else {
		r.shown = true // no copy is needed for this: snapshots do not look at it
	}

	return e.values(scratch[:0])
}

// CloneAll returns a copy of values whose text is one piece of memory.
func CloneAll(values []string) []string {
	all := strings.Join(values, "")
	if len(values) == 1 {
		all = strings.Clone(all) // Join does not copy a single string
	}

	// Each clone is a part of that copy.
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

// forget removes the deadline of the key at a spot, and its values from the counts. It returns how
// many values there were.
func (m *Memory) forget(at spot, e entry) (removed int) {
	m.noteDeadline(at.h, m.deadline(at.slot), 0)

	// A long list has its sums, so its values are not read.
	bytes := int64(0)
	if l := m.long(at.slot); l != nil {
		removed, bytes = len(l.values), l.bytes
		m.longValues -= removed
		m.longBytes -= bytes
		m.longGone -= l.gone
	} else {
		values := e.values(m.edit[:0])
		removed, bytes = len(values), SizeOf(values)
	}

	m.values -= removed
	m.valueBytes -= bytes
	return removed
}

// remove removes key, after forget.
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

	// A Set also ends the key's deadline.
	m.tally(1, value)
	m.storeUntil(at, key, append(m.edit[:0], value), 0)
	return removed
}

// Remove removes the first value equal to value; a key that loses its last value is gone. It takes
// as long as an Update.
func (m *Memory) Remove(key, value string) (removed bool) { return m.RemoveAt(key, value, -1) >= 0 }

// RemoveAt is Remove, and returns the place of the value, -1 if there is none. In a long list it
// looks at the place hint first: an equal value there counts as the first.
func (m *Memory) RemoveAt(key, value string, hint int) (place int) {
	at, e := m.find(key)
	if e == nil {
		return -1
	}

	// Of a long list only values with an equal hash are compared.
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

// takeAt removes value n of the key at a spot; a key that loses its last value is gone.
func (m *Memory) takeAt(at spot, key string, e entry, n int) {
	// If other values are left, the list becomes shorter and the key stays.
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

	// That was the last value: the key and its deadline go.
	m.forget(at, e)
	m.remove(at, key)
}

// Take removes and returns key's oldest value; a key that loses its last value is gone. It
// takes amortized constant time, however long the list is.
func (m *Memory) Take(key string) (value string, ok bool) {
	at, e := m.find(key)
	if e == nil {
		return "", false
	}

	// A value of a short list is part of its entry, whose memory may be reused: clone it.
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
	n, _, _ = e.head()
	return n
}

// Update removes the first value equal to oldValue and appends newValue. On a
// list of n values that takes time in proportion to n, and about ten times as
// long if a reader or a snapshot got its array, because then that is copied.
// An Update that replaces the oldest value takes no longer than a Put.
func (m *Memory) Update(key, oldValue, newValue string) (replaced bool) {
	return m.UpdateAt(key, oldValue, newValue, -1) >= 0
}

// UpdateAt is Update, and returns the place of the value that it removed, -1 if there was none. In
// a long list it looks at the place hint before it searches: a caller that knows the place saves
// the search.
func (m *Memory) UpdateAt(key, oldValue, newValue string, hint int) (place int) {
	at, e := m.find(key)
	if e == nil {
		m.Put(key, newValue)
		return -1
	}

	m.tally(1, newValue)

	// A long list is changed in place; its entry stays.
	if l := m.ownLong(at.slot); l != nil {
		if place = m.index(l, oldValue, hint); place >= 0 {
			m.takeOut(l, place)
		}
		m.append(l, newValue)
		return place
	}

	// A short list gets a new entry, which keeps the deadline.
	values := e.values(m.edit[:0])
	if place = slices.Index(values, oldValue); place >= 0 {
		m.tally(-1, oldValue)
		values = slices.Delete(values, place, place+1)
	}
	m.store(at, key, append(values, newValue))
	return place
}

// Commit does nothing: memory is as durable as this store gets.
func (m *Memory) Commit() error { return nil }

// Room returns nil: the server itself limits memory.
func (m *Memory) Room(string, int64, int) error { return nil }

// Size returns how much the store holds.
func (m *Memory) Size() (keys, values int, bytes int64) {
	return m.keys, m.values, m.keyBytes + m.valueBytes
}

// KeyBytes returns how many bytes all keys have, without their values.
func (m *Memory) KeyBytes() int64 { return m.keyBytes }

// Footprint returns roughly how many bytes of memory the store takes. Memory that snapshots share
// with it counts once. Memory that only snapshots have, and memory that waits to be reused, at most
// 4 MiB, does not count.
func (m *Memory) Footprint() int64 {
	const pageSize = int(unsafe.Sizeof(page{}))
	const largePageSize = int(unsafe.Sizeof(tablePage[large]{}))

	// Removed values count while a list's array keeps them in memory (longGone).
	tables := m.pages*pageSize + 8*m.dir.len + len(m.large.pages)*largePageSize + m.deadlines.bytes()
	return int64(m.used) + int64(tables) + int64(m.longValues)*perLongValue + m.largeBytes +
		m.longBytes + m.longGone
}

// Measure returns the total bytes of key's values.
func (m *Memory) Measure(key string) (bytes int64) {
	at, e := m.find(key)
	if e == nil {
		return 0
	}

	if l := m.long(at.slot); l != nil {
		return l.bytes
	}
	return SizeOf(e.values(m.edit[:0]))
}

// Has reports whether key's list has value. It hands no memory out.
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

// touchMost is how many keys are touched at a time, so that what they need stays in the cache.
const touchMost = 256

// touchSize is how many bytes of a store stay in a processor's cache anyway.
const touchSize = 4 << 20

// TouchPays reports whether the store is larger than a processor's cache.
func (m *Memory) TouchPays() bool { return m.used+m.pages<<12 >= touchSize }

// Touch loads most of what a find of each of these keys needs into the processor's cache, for
// the requests that follow. One after the other, each request would wait for memory three times.
// Here those waits overlap, because no step of a loop needs the one before it. (Valkey 8
// calls this memory access amortization.)
func (m *Memory) Touch(keys []string) {
	var hashes, slots [touchMost]uint64
	for len(keys) > 0 {
		n := min(len(keys), touchMost)

		// First the hashes, which need only the store's seed.
		for i, key := range keys[:n] {
			hashes[i] = maphash.String(m.seed, key)
		}

		// Then the slots where the searches begin: the waits for their pages overlap.
		for i, h := range hashes[:n] {
			slots[i] = m.page(h).slots[home(h<<addrBits)]
		}

		// Then the entries that these slots point to.
		sum := byte(0)
		for _, slot := range slots[:n] {
			if slot != 0 {
				sum += m.entry(slot)[0]
			}
		}

		// Without a use of the sum the compiler could leave out the reads.
		m.touched += sum
		keys = keys[n:]
	}
}

// All yields every key with its list, as they are when All is called. The caller may keep them.
func (m *Memory) All() iter.Seq2[string, []string] {
	now := m.snapshot()
	return func(yield func(string, []string) bool) {
		for key, values := range now.All() {
			// The snapshot overwrites a short list with the next one, so the caller gets a copy.
			if !yield(key, slices.Clip(slices.Clone(values))) {
				return
			}
		}
	}
}

// snapshot is what a Memory held at one moment. Any goroutine may read it while the
// Memory's owner goes on.
type snapshot struct{ view }

// Snapshot takes a snapshot: a copy of three lists of pages, with one pointer for 64 items. That
// takes a fraction of a millisecond for several million keys. From then on the Memory copies each
// page before its first change. What only the snapshot still needs stays in memory while somebody
// has the snapshot.
func (m *Memory) Snapshot() Snapshot { return m.snapshot() }

func (m *Memory) snapshot() *snapshot {
	// Everything has a lower epoch from now on, so the Memory copies it before a change.
	m.epoch++
	s := &snapshot{m.view}
	s.dir, s.slabs, s.large = s.dir.clone(), s.slabs.clone(), s.large.clone()

	// Cleaning slabs that the snapshot has would free nothing, so they are left alone.
	m.latest = weak.Make(s)
	m.hold()
	return s
}

// View returns key's list. Like Memory's View it makes a short list in scratch.
func (s *snapshot) View(scratch []string, key string) []string {
	at, e := s.find(key)
	if e == nil {
		return nil
	}
	return s.valuesAt(at.slot, scratch)
}

// valuesAt returns the list of a slot.
func (s *snapshot) valuesAt(slot uint64, scratch []string) []string {
	if slot&largeBit != 0 {
		if l := s.large.at(number(slot)).long; l != nil {
			return slices.Clip(l.values)
		}
	}

	return s.entry(slot).values(scratch[:0])
}

// All yields every key with its list, which is valid until the next one is yielded.
func (s *snapshot) All() iter.Seq2[string, []string] {
	return func(yield func(string, []string) bool) {
		var last *page
		var scratch [maxShort]string
		for i := range s.dir.len {
			// A page of lower depth has several places in a row: it is listed once.
			p := *s.dir.at(i)
			if p == last {
				continue
			}
			last = p

			for _, slot := range p.slots {
				if slot == 0 {
					continue
				}

				// The next short list overwrites this one in scratch.
				if !yield(viewOf(s.entry(slot).key()), s.valuesAt(slot, scratch[:])) {
					return
				}
			}
		}
	}
}

// SizeOf returns the total bytes of values.
func SizeOf(values []string) (bytes int64) {
	for _, v := range values {
		bytes += int64(len(v))
	}
	return bytes
}
