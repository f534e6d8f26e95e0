package kvstore

import (
	"hash/maphash"
	"slices"
	"unsafe"
)

// deadlines tells which key expires next. A key's deadline itself is in its entry, or beside its
// large entry, so that snapshots have it. Here are the expiries of all keys with a deadline, in
// order. They lie in chunks, so that adding or removing an expiry moves at most 4 KiB, and the list
// of chunks if one comes or goes. Of many expiries each takes 16 bytes where chunks are full, and
// up to 48 where removals have left gaps.
//
//	chunks
//	+---+     +-----------+-----------+-----
//	| 0 | --> | at | hash | at | hash | ...       the earliest expiries
//	+---+     +-----------+-----------+-----
//	| 1 | --> ...                                 later ones
//	+---+
type deadlines struct{ chunks [][]expiry }

// expiry is the deadline of a key with this hash.
type expiry struct {
	at   int64 // in milliseconds of Unix time
	hash uint64
}

const (
	chunkMost = 256               // expiries in a chunk
	chunkLess = chunkMost / 4 * 3 // expiries in two neighbours, at most, that are merged
)

// before reports whether e comes before other.
func (e expiry) before(other expiry) bool {
	return e.at < other.at || e.at == other.at && e.hash < other.hash
}

// place returns the chunk that e belongs to, and its place there.
func (d *deadlines) place(e expiry) (chunk, i int) {
	if len(d.chunks) == 0 {
		return 0, 0
	}

	// The last chunk that does not begin after e, or the first.
	for low, high := 1, len(d.chunks); low < high; {
		if middle := (low + high) / 2; e.before(d.chunks[middle][0]) {
			high = middle
		} else {
			low, chunk = middle+1, middle
		}
	}

	// The first expiry in it that does not come before e. (slices.BinarySearchFunc calls a function
	// for each comparison, which would be a tenth of an Expire's time.)
	c := d.chunks[chunk]
	for high := len(c); i < high; {
		if middle := (i + high) / 2; c[middle].before(e) {
			i = middle + 1
		} else {
			high = middle
		}
	}
	return chunk, i
}

// add adds e.
func (d *deadlines) add(e expiry) {
	chunk, i := d.place(e)

	// If the chunk is full: after the last expiry of all a new chunk begins, because the next
	// deadlines are usually later still. Any other chunk is split.
	switch {
	case len(d.chunks) == 0 || i == chunkMost && chunk == len(d.chunks)-1:
		d.chunks = append(d.chunks, make([]expiry, 0, chunkMost))
		chunk, i = len(d.chunks)-1, 0
	case len(d.chunks[chunk]) == chunkMost:
		// The second half gets an array of its own, so both halves have room.
		const half = chunkMost / 2
		c := d.chunks[chunk]
		d.chunks = slices.Insert(d.chunks, chunk+1,
			append(make([]expiry, 0, chunkMost), c[half:]...))
		d.chunks[chunk] = c[:half]
		if i > half {
			chunk, i = chunk+1, i-half
		}
	}

	d.chunks[chunk] = slices.Insert(d.chunks[chunk], i, e)
}

// remove removes e, which must be there.
func (d *deadlines) remove(e expiry) {
	chunk, i := d.place(e)
	c := slices.Delete(d.chunks[chunk], i, i+1)
	d.chunks[chunk] = c

	// No chunk stays empty, because place looks at the first expiry of each.
	if len(c) == 0 {
		d.chunks = slices.Delete(d.chunks, chunk, chunk+1)
		return
	}

	// Neighbours with few expiries are merged.
	for _, left := range []int{chunk - 1, chunk} {
		if left < 0 || left+1 >= len(d.chunks) {
			continue
		}

		a, b := d.chunks[left], d.chunks[left+1]
		if len(a)+len(b) <= chunkLess {
			d.chunks[left] = append(a, b...)
			d.chunks = slices.Delete(d.chunks, left+1, left+2)
			return
		}
	}
}

// bytes returns how many bytes of memory the expiries take.
func (d *deadlines) bytes() int {
	const head, chunk = int(unsafe.Sizeof([]expiry{})), chunkMost * int(unsafe.Sizeof(expiry{}))
	return cap(d.chunks)*head + len(d.chunks)*chunk
}

// Expire gives key a deadline, in milliseconds of Unix time; 0 takes it away. It reports whether
// the key is there. A Set, a Delete and the removal of a key's last value end its deadline. The
// store itself does nothing when the time has come: its owner asks NextDue.
func (m *Memory) Expire(key string, deadline int64) (ok bool) {
	at, e := m.find(key)
	if e == nil {
		return false
	}

	// Nothing is written for a deadline that stays the same.
	old := m.deadline(at.slot)
	if deadline == old {
		return true
	}

	// NextDue reads the expiries in m.deadlines.
	m.noteDeadline(at.h, old, deadline)

	// A snapshot keeps the old deadline: own copies the page of a large entry if a snapshot has it,
	// and the entry of a short list is written again at another place.
	if at.slot&largeBit != 0 {
		m.large.own(number(at.slot), m.epoch).deadline = deadline
	} else {
		m.storeUntil(at, key, e.values(m.edit[:0]), deadline)
	}
	return true
}

// PutUntil is Put and Expire in one step.
func (m *Memory) PutUntil(key, value string, at int64) {
	m.Put(key, value)
	m.Expire(key, at)
}

// noteDeadline replaces the deadline old of a key with hash h by at; for both, 0 means none.
func (m *Memory) noteDeadline(h uint64, old, at int64) {
	if old != 0 {
		m.deadlines.remove(expiry{old, h})
		m.expiring--
	}

	if at != 0 {
		m.deadlines.add(expiry{at, h})
		m.expiring++
	}
}

// Deadline returns key's deadline; ok is false if it has none.
func (v *view) Deadline(key string) (deadline int64, ok bool) {
	// While no key has a deadline, no search is needed.
	if v.expiring > 0 {
		at, _ := v.find(key)
		deadline = v.deadline(at.slot)
	}
	return deadline, deadline != 0
}

// deadline returns the deadline of a slot's key; 0 if it has none, or if the slot is empty.
func (v *view) deadline(slot uint64) (deadline int64) {
	switch {
	case v.expiring == 0 || slot == 0:
	case slot&largeBit != 0:
		deadline = v.large.at(number(slot)).deadline
	default:
		_, deadline, _ = v.entry(slot).head()
	}
	return deadline
}

// Expiring returns how many keys have a deadline.
func (m *Memory) Expiring() int { return m.expiring }

// NextDue returns the key with the earliest deadline, if that is not after now.
func (m *Memory) NextDue(now int64) (key string, ok bool) {
	if len(m.deadlines.chunks) == 0 || m.deadlines.chunks[0][0].at > now {
		return "", false
	}

	// An expiry has only its key's hash, so the index is searched for a key with that hash.
	earliest := m.deadlines.chunks[0][0]
	p, tag := m.page(earliest.hash), earliest.hash<<addrBits
	for i := home(tag); p.slots[i] != 0; i = next(i) {
		slot := p.slots[i]
		if (slot^tag)>>addrBits != 0 || m.deadline(slot) != earliest.at {
			continue
		}

		// Different hashes may have the same tag: the whole hash decides.
		if k := m.entry(slot).key(); maphash.Bytes(m.seed, k) == earliest.hash {
			return string(k), true
		}
	}

	// This cannot happen: a key's expiry is added and removed together with its deadline.
	panic("kvstore: a deadline of no key")
}
