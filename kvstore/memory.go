package kvstore

import (
	"hash/maphash"
	"iter"
	"slices"
	"strings"
	"weak"
)

// Memory is a KVStore in memory alone: a process that ends takes it along, and
// Commit has nothing to do. It is not safe for concurrent access, and starts no
// goroutine. Make one with NewMemory.
//
// Short lists lie with their keys in slabs (slab.go), which an index finds (index.go):
// neither has pointers that the garbage collector would have to follow. Long lists are
// slices. A list that was handed out is never changed: a Put appends beyond the end of
// every list handed out before, an Update that would change one makes a new one, and the
// bytes of a slab that somebody else may see are written once.
type Memory struct {
	view // what a snapshot copies

	// The index.
	// how many snapshots were taken. A page with a lower epoch may be part of one: it is copied
	// before it is changed
	epoch  uint64
	latest weak.Pointer[snapshot] // the last of them, if somebody has it still
	pages  int
	keys   int

	// The slabs.
	unused []int    // numbers of slabs that were dropped
	free   [][]byte // memory of these, to be used again
	head   int      // where entries are added; 0: there is none yet
	used   int      // bytes of all slabs
	live   int      // bytes of all entries that the index points to
	victim int      // the slab that is being cleaned; 0: none is
	at     int      // how far
	cursor int      // where the next is looked for
	skip   int      // bytes that need not be cleaned before that

	// The long lists.
	unusedLists []int // numbers of lists that are not in use
	longValues  int   // in them
	longBytes   int64 // of these

	values    int   // in all
	bytes     int64 // of keys and values
	pairBytes int64 // of values, each with its key

	edit    [maxShort + 1]string // a list in hand
	touched byte                 // by Touch
}

// list is the values of a key that has too many for an entry.
type list struct {
	values []string
	bytes  int64 // of the values, so that Delete need not walk through them
	most   int   // values, since values were last copied: those that went are there still
	shared bool  // values were handed out, so they stay as they are
}

// pageLists is how many long lists a page holds.
const pageLists = 64

// listPage is some of the long lists. Like a page of the index it is copied before a
// change if a snapshot has it.
type listPage struct {
	epoch uint64
	lists [pageLists]list
}

// NewMemory returns an empty store.
func NewMemory() *Memory {
	return &Memory{
		view:  view{seed: maphash.MakeSeed(), dir: []*page{{}}, shift: 64, slabs: make([]slab, 1)},
		pages: 1,
	}
}

// Put appends value to key's list.
func (m *Memory) Put(key, value string) {
	h, i, e := m.find(key)
	values := m.edit[:0]
	if e == nil {
		m.bytes += int64(len(key))
	} else if k := e.number(); k > 0 {
		m.tally(1, key, value)
		m.append(m.list(k), value)
		return
	} else {
		values = e.values(values)
	}
	m.tally(1, key, value)
	m.store(h, i, key, append(values, value))
}

// tally counts a value of key that comes (n is 1) or goes (-1).
func (m *Memory) tally(n int, key, value string) {
	m.values += n
	m.bytes += int64(n * len(value))
	m.pairBytes += int64(n * (len(key) + len(value)))
}

// store writes key's list anew. Slot i of h's page is the key's, or an empty one.
func (m *Memory) store(h uint64, i int, key string, values []string) {
	number := 0
	if len(values) > maxShort || len(values) > 1 && sizeOf(values) > maxShortBytes {
		number = m.newList(values)
		values = nil
	}
	old := m.page(h).slots[i]
	addr := m.write(key, values, number)
	size := m.entry(addr).size()
	m.point(h, i, addr)
	if old != 0 {
		size += m.die(old)
	}
	m.clean(cleanRate * size)
}

// Get returns key's list. A short one is a copy, so that it keeps nothing else in memory.
func (m *Memory) Get(key string) []string {
	_, _, e := m.find(key)
	switch {
	case e == nil:
		return nil
	case e.number() > 0:
		return m.handOut(e.number())
	}
	return CloneAll(e.values(nil))
}

// View is Get without a copy. A short list is made in scratch, and its strings may be
// parts of a piece of memory of 256 KiB, which stays as long as one of them does: who
// keeps such a list for long clones it (CloneAll).
func (m *Memory) View(scratch []string, key string) []string {
	h, i, e := m.find(key)
	if e == nil {
		return nil
	}
	m.slabs[m.page(h).slots[i]&addrMask>>slabBits].shown = true
	if _, rest := e.parts(); rest[0] == 1 && rest[1] < 0x80 { // the usual list
		return append(scratch[:0], viewOf(rest[2:2+rest[1]]))
	}
	if k := e.number(); k > 0 {
		return m.handOut(k)
	}
	return e.values(scratch[:0])
}

// CloneAll returns a copy of values, in one piece of memory.
func CloneAll(values []string) []string {
	all := strings.Join(values, "")
	if len(values) == 1 {
		all = strings.Clone(all) // Join has not copied it
	}
	clones := make([]string, len(values))
	for i, v := range values {
		clones[i], all = all[:len(v)], all[len(v):]
	}
	return clones
}

// Delete removes key and returns how many values it had.
func (m *Memory) Delete(key string) (removed int) {
	h, i, e := m.find(key)
	if e == nil {
		return 0
	}
	removed = m.forget(key, e)
	m.remove(h, i, key)
	return removed
}

// forget takes all of key's values out of what is counted, and gives up a long list.
func (m *Memory) forget(key string, e entry) (removed int) {
	bytes := int64(0)
	if k := e.number(); k > 0 {
		l := m.list(k)
		removed, bytes = len(l.values), l.bytes
		m.longValues -= removed
		m.longBytes -= bytes
		*l = list{}
		m.unusedLists = append(m.unusedLists, k)
	} else {
		values := e.values(m.edit[:0])
		removed, bytes = len(values), int64(sizeOf(values))
	}
	m.values -= removed
	m.bytes -= bytes
	m.pairBytes -= bytes + int64(removed*len(key))
	return removed
}

// remove removes key, whose values are forgotten, from slot i of h's page.
func (m *Memory) remove(h uint64, i int, key string) {
	m.bytes -= int64(len(key))
	slot := m.page(h).slots[i]
	m.unpoint(h, i)
	m.clean(cleanRate * m.die(slot))
}

// Set makes value key's only one, and returns how many there were.
func (m *Memory) Set(key, value string) (removed int) {
	h, i, e := m.find(key)
	if e == nil {
		m.bytes += int64(len(key))
	} else {
		removed = m.forget(key, e)
	}
	m.tally(1, key, value)
	m.store(h, i, key, append(m.edit[:0], value))
	return removed
}

// Remove removes the first value equal to value, and the key with its last. It takes as
// long as an Update.
func (m *Memory) Remove(key, value string) (removed bool) { return m.RemoveAt(key, value, -1) >= 0 }

// RemoveAt is Remove. It returns the place of the value, -1 if there is none, and looks at
// the place hint first.
func (m *Memory) RemoveAt(key, value string, hint int) (place int) {
	h, i, e := m.find(key)
	if e == nil {
		return -1
	}
	k := e.number()
	if k > 0 {
		place = m.takeOutLong(m.list(k), key, value, hint)
	} else {
		values := e.values(m.edit[:0])
		if place = slices.Index(values, value); place >= 0 && len(values) > 1 {
			m.tally(-1, key, value)
			m.store(h, i, key, slices.Delete(values, place, place+1))
			return place
		}
	}
	if k == 0 && place >= 0 || k > 0 && len(m.list(k).values) == 0 {
		m.forget(key, e)
		m.remove(h, i, key)
	}
	return place
}

// Update removes the first value equal to oldValue and appends newValue. On a
// list of n values that takes time in proportion to n, and about ten times as
// long where the list was handed out since the last one, for then it is copied.
// Where the first value goes it takes no longer than a Put.
func (m *Memory) Update(key, oldValue, newValue string) (replaced bool) {
	return m.UpdateAt(key, oldValue, newValue, -1) >= 0
}

// UpdateAt is Update. It returns the place of the value that it removed, -1 if there is
// none. It looks at the place hint before it searches: who knows the place makes long
// lists cheap.
func (m *Memory) UpdateAt(key, oldValue, newValue string, hint int) (place int) {
	h, i, e := m.find(key)
	if e == nil {
		m.Put(key, newValue)
		return -1
	}
	if k := e.number(); k > 0 {
		l := m.list(k)
		place = m.takeOutLong(l, key, oldValue, hint)
		m.tally(1, key, newValue)
		m.append(l, newValue)
		return place
	}
	values := e.values(m.edit[:0])
	if place = slices.Index(values, oldValue); place >= 0 {
		m.tally(-1, key, oldValue)
		values = slices.Delete(values, place, place+1)
	}
	m.tally(1, key, newValue)
	m.store(h, i, key, append(values, newValue))
	return place
}

// takeOutLong takes the first value equal to oldValue out of a long list, and returns
// its place.
func (m *Memory) takeOutLong(l *list, key, oldValue string, hint int) (place int) {
	if place = hint; place < 0 || place >= len(l.values) || l.values[place] != oldValue {
		place = slices.Index(l.values, oldValue)
	}
	switch {
	case place == 0:
		if !l.shared {
			l.values[0] = "" // or it would stay in memory
		}
		l.values = l.values[1:]
	case place > 0 && l.shared:
		// A new list, with the room that append would leave beside the new value.
		l.values = append(append(make([]string, 0, len(l.values)), l.values[:place]...),
			l.values[place+1:]...)
		l.shared = false
	case place > 0:
		l.values = slices.Delete(l.values, place, place+1)
	}
	if place >= 0 {
		m.tally(-1, key, oldValue)
		l.bytes -= int64(len(oldValue))
		m.longValues--
		m.longBytes -= int64(len(oldValue))
	}
	if len(l.values) < l.most/4 && l.most > 4*maxShort {
		l.values, l.shared, l.most = slices.Clone(l.values), false, len(l.values)
	}
	return place
}

// Commit does nothing: memory is as durable as this store gets.
func (m *Memory) Commit() error { return nil }

// Size returns how much the store holds.
func (m *Memory) Size() (keys, values int, bytes int64) { return m.keys, m.values, m.bytes }

// PairBytes returns how many bytes all values have, each with its key.
func (m *Memory) PairBytes() int64 { return m.pairBytes }

// Footprint returns how many bytes of memory the store takes, about: all that a snapshot
// shares with it counts once. What waits to be used again, 4 MiB at most, does not count.
func (m *Memory) Footprint() int64 {
	// A string's head, what append leaves free, and what malloc rounds up.
	const pageSize, perLongValue = 4 << 10, 40
	return int64(m.used) + int64(m.pages*pageSize+8*len(m.dir)) + m.longBytes +
		int64(m.longValues*perLongValue)
}

// Measure returns how many bytes key's values have together.
func (m *Memory) Measure(key string) (bytes int64) {
	_, _, e := m.find(key)
	switch {
	case e == nil:
		return 0
	case e.number() > 0:
		return m.long(e.number()).bytes
	}
	return int64(sizeOf(e.values(m.edit[:0])))
}

// Has tells whether key's list has value. It hands nothing out.
func (m *Memory) Has(key, value string) bool {
	_, _, e := m.find(key)
	switch {
	case e == nil:
		return false
	case e.number() > 0:
		return slices.Contains(m.long(e.number()).values, value)
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
		for i, key := range keys[:n] {
			hashes[i] = maphash.String(m.seed, key)
		}
		for i, h := range hashes[:n] {
			slots[i] = m.page(h).slots[home(h<<addrBits)]
		}
		sum := byte(0)
		for _, slot := range slots[:n] {
			if slot != 0 {
				sum += m.entry(slot)[0]
			}
		}
		m.touched += sum // or the compiler would see that nobody needs it
		keys = keys[n:]
	}
}

// long returns long list k to be looked at.
func (v *view) long(k int) *list { return &v.lists[k/pageLists].lists[k%pageLists] }

// list returns long list k to be changed: in a copy of its page, if a snapshot has that.
func (m *Memory) list(k int) *list {
	p := m.lists[k/pageLists]
	if p.epoch != m.epoch {
		mine := *p
		p = &mine
		p.epoch = m.epoch
		for i := range p.lists {
			p.lists[i].shared = true
		}
		m.lists[k/pageLists] = p
	}
	return &p.lists[k%pageLists]
}

// handOut returns the values of long list k, which stay as they are from now on.
func (m *Memory) handOut(k int) []string {
	l := m.list(k)
	l.shared = true
	return slices.Clip(l.values)
}

// newList makes a long list and returns its number, which is never 0.
func (m *Memory) newList(values []string) (k int) {
	if len(m.unusedLists) == 0 {
		first := pageLists * len(m.lists)
		m.lists = append(m.lists, &listPage{epoch: m.epoch})
		for k := first + pageLists - 1; k >= max(first, 1); k-- {
			m.unusedLists = append(m.unusedLists, k)
		}
	}
	k = m.unusedLists[len(m.unusedLists)-1]
	m.unusedLists = m.unusedLists[:len(m.unusedLists)-1]
	l := m.list(k)
	for _, v := range values {
		m.append(l, v)
	}
	return k
}

// append adds a clone of value to the end of l.
func (m *Memory) append(l *list, value string) {
	l.values = append(l.values, strings.Clone(value))
	l.most = max(l.most, len(l.values))
	l.bytes += int64(len(value))
	m.longValues++
	m.longBytes += int64(len(value))
}

// All yields every key with its list, as they are when All is called. They may be kept.
func (m *Memory) All() iter.Seq2[string, []string] {
	now := m.snapshot()
	return func(yield func(string, []string) bool) {
		for key, values := range now.All() {
			if !yield(key, slices.Clip(slices.Clone(values))) {
				return
			}
		}
	}
}

// snapshot is what a Memory held at one moment. Any goroutine may look at it, while the
// Memory's owner goes on.
type snapshot struct{ view }

// Snapshot takes one: a copy of the directory and of the table of slabs, which takes a
// fraction of a millisecond for a million keys. From then on the Memory copies each page
// of its index before it changes it for the first time; what the snapshot alone still
// needs stays in memory as long as somebody has the snapshot.
func (m *Memory) Snapshot() Snapshot { return m.snapshot() }

func (m *Memory) snapshot() *snapshot {
	m.epoch++
	v := m.view
	v.dir, v.slabs, v.lists = slices.Clone(v.dir), slices.Clone(v.slabs), slices.Clone(v.lists)
	s := &snapshot{v}
	m.latest = weak.Make(s)
	return s
}

// View returns key's list. Like Memory's it makes a short one in scratch.
func (s *snapshot) View(scratch []string, key string) []string {
	_, _, e := s.find(key)
	if e == nil {
		return nil
	}
	return s.list(e, scratch)
}

// list returns the list of an entry.
func (s *snapshot) list(e entry, scratch []string) []string {
	if k := e.number(); k > 0 {
		return slices.Clip(s.long(k).values)
	}
	return e.values(scratch[:0])
}

// All yields every key with its list, which is overwritten with the next one.
func (s *snapshot) All() iter.Seq2[string, []string] {
	return func(yield func(string, []string) bool) {
		var last *page
		var scratch [maxShort]string
		for _, p := range s.dir {
			if p == last {
				continue
			}
			last = p
			for _, slot := range p.slots {
				if slot == 0 {
					continue
				}
				e := s.entry(slot)
				if !yield(viewOf(e.key()), s.list(e, scratch[:])) {
					return
				}
			}
		}
	}
}

// sizeOf is how many bytes fields have together.
func sizeOf(fields []string) (bytes int) {
	for _, f := range fields {
		bytes += len(f)
	}
	return bytes
}
