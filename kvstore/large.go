package kvstore

import (
	"hash/maphash"
	"slices"
	"strings"
)

// largeBit is set in the address of a large entry; the other bits are the entry's number.
const largeBit = 1 << (addrBits - 1)

// perLongValue is how many bytes a value of a long list takes beside its text: the string header,
// its hash, unused capacity of the arrays, and the allocator's rounding.
const perLongValue = 45

// large is an entry that has memory of its own, because it has over ownSize bytes or its list is
// long. Large entries are numbered without gaps: when one is dropped, the last one takes its
// number, so their table has no empty places.
type large struct {
	data     entry
	long     *longList // nil: the values are in data
	deadline int64     // 0: none. data itself never has one
	epoch    uint64    // Memory's when data was made: a snapshot taken since has data, too
	shown    bool      // strings that are parts of data were handed out
}

// longList holds the values of a key that has too many for an entry, or too many bytes in them.
//
//	array     | gone | gone | b    | c | d | room |      gone: taken from the front while a
//	values                  [ b    , c , d ]             reader had the array
//	hashes                  [ h(b) , ...   ]
type longList struct {
	values []string
	hashes []uint32 // of the values: a search compares only values whose hash is equal
	bytes  int64    // of the values, so that Delete need not walk through them
	gone   int64    // bytes of removed values that the array keeps in memory
	places int      // of the array, also those in front of values
	shared bool     // readers or a snapshot have the array, so what is in it must not change
	epoch  uint64   // Memory's when this was made: a snapshot taken since has it, too
}

// number returns the number of the large entry that a slot points to.
func number(slot uint64) int { return int(slot & (largeBit - 1)) }

// long returns the long list of a slot for reading; nil if the slot's list is short.
func (v *view) long(slot uint64) *longList {
	if slot&largeBit == 0 {
		return nil
	}
	return v.large.at(number(slot)).long
}

// ownLong returns the long list of a slot for a change: a copy, if a snapshot may have the list. It
// is nil if the slot's list is short.
func (m *Memory) ownLong(slot uint64) *longList {
	l := m.long(slot)

	// A snapshot may have a list of an earlier epoch and keeps that. The copy shares its array.
	if l != nil && l.epoch != m.epoch {
		mine := *l
		mine.epoch, mine.shared = m.epoch, true
		l = &mine
		m.large.own(number(slot), m.epoch).long = l
	}

	return l
}

// handOut returns the values of a long list for a reader. Nobody changes them from now on.
func (m *Memory) handOut(l *longList) []string {
	l.shared = true // no copy is needed for this: snapshots do not look at it
	return slices.Clip(l.values)
}

// writeLarge makes a large entry of values, or of the long list l if that is not nil. It replaces
// the entry that a slot points to if that is large, and returns the new one's address.
func (m *Memory) writeLarge(slot uint64, key string, values []string, l *longList,
	deadline int64) (addr uint64) {
	// The deadline is kept beside data, where Expire can change it.
	data := m.allocate(entrySize(key, values, 0))
	writeEntry(data, key, values, 0)

	// A large entry keeps its number, so the index need not be changed.
	k := number(slot)
	if slot&largeBit == 0 {
		k = m.large.push(m.epoch)
	}

	// The memory of the old data is reused if nobody can have seen it.
	r := m.large.own(k, m.epoch)
	m.largeBytes += int64(cap(data) - cap(r.data))
	m.release(r.data, r.epoch, r.shown)
	*r = large{data: data, long: l, deadline: deadline, epoch: m.epoch}
	return largeBit | uint64(k)
}

// dropLarge removes large entry k, which no slot points to any more, and returns its size in bytes.
func (m *Memory) dropLarge(k int) (size int) {
	r := m.large.own(k, m.epoch)
	size = len(r.data)
	m.largeBytes -= int64(cap(r.data))
	m.release(r.data, r.epoch, r.shown)

	// The last entry takes this one's number, so that there is no gap.
	if last := m.large.len - 1; last != k {
		m.point(m.locate(largeBit|uint64(last)), largeBit|uint64(k))
		*r = *m.large.at(last)
	}

	m.large.pop(m.epoch)
	return size
}

// newList makes a long list of clones of values.
func (m *Memory) newList(values []string) *longList {
	l := &longList{epoch: m.epoch}
	for _, v := range values {
		m.append(l, v)
	}
	return l
}

// append adds a clone of value to the end of l.
func (m *Memory) append(l *longList, value string) {
	// Readers and snapshots see nothing after the old end, so even a shared array can be extended.
	// If the array is full, the values move to a new array, which no reader has.
	isFull := len(l.values) == cap(l.values)
	l.values = append(l.values, strings.Clone(value))
	if isFull {
		m.copied(l)
	}

	l.hashes = append(l.hashes, m.hash(value))
	l.bytes += int64(len(value))
	m.longValues++
	m.longBytes += int64(len(value))
}

// copied notes that l's values are in a new array.
func (m *Memory) copied(l *longList) {
	m.longGone -= l.gone
	l.gone, l.places, l.shared = 0, cap(l.values), false
}

// hash returns the hash of a value in a long list. Its seed is random, so no client can choose
// values with equal hashes.
func (m *Memory) hash(value string) uint32 { return uint32(maphash.String(m.seed, value)) }

// index returns the place of the first value equal to value, -1 if there is none. A value that is
// equal at the place hint counts as the first. Values with other hashes are not compared, however
// long they are.
func (m *Memory) index(l *longList, value string, hint int) (place int) {
	if hint >= 0 && hint < len(l.values) && l.values[hint] == value {
		return hint
	}

	hash := m.hash(value)
	for i, h := range l.hashes {
		if h == hash && l.values[i] == value {
			return i
		}
	}
	return -1
}

// takeOut removes the value at place from l.
func (m *Memory) takeOut(l *longList, place int) {
	value := l.values[place]
	bytes := int64(len(value))
	m.tally(-1, value)
	l.bytes -= bytes
	m.longValues--
	m.longBytes -= bytes

	// The values in an array that readers have must not move.
	switch {
	case place == 0 && l.shared:
		l.values = l.values[1:]
		l.gone += bytes
		m.longGone += bytes
	case place == 0:
		l.values[0] = "" // otherwise it would stay in memory
		l.values = l.values[1:]
	case l.shared: // a new array, with room for the value that an Update then appends
		l.values = append(append(make([]string, 0, len(l.values)), l.values[:place]...),
			l.values[place+1:]...)
		m.copied(l)
	default:
		l.values = slices.Delete(l.values, place, place+1)
	}

	// Readers do not look at the hashes, so these are changed in place.
	if place == 0 {
		l.hashes = l.hashes[1:]
	} else {
		l.hashes = slices.Delete(l.hashes, place, place+1)
	}

	// The array is copied when the removed values that it keeps have over a quarter of the memory
	// of the list, or when it is not small and over three quarters of its places are unused. So the
	// cost of all copies stays in proportion to what is removed.
	n := len(l.values)
	if l.gone > (l.bytes+int64(n)*perLongValue)/4 || n < l.places/4 && l.places > 4*maxShort {
		l.values, l.hashes = slices.Clone(l.values), slices.Clone(l.hashes)
		m.copied(l)
	}
}
