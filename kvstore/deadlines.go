package kvstore

import (
	"hash/maphash"
	"slices"
	"unsafe"
)

// deadlines tells which key ends next. A key's deadline itself is in its entry, or beside a large
// one, so a snapshot has it; here are the ends of all keys that have one, sorted, in chunks so that
// to add or remove one moves 4 KiB of them at most. They take 16 bytes an end in full chunks, and
// 43 where what was removed has left gaps.
//
//	chunks
//	+---+     +-----------+-----------+-----
//	| 0 | --> | at | hash | at | hash | ...       the next ends
//	+---+     +-----------+-----------+-----
//	| 1 | --> ...                                 later ones
//	+---+
type deadlines struct{ chunks [][]end }

// end is the end of a key with this hash.
type end struct {
	at   int64 // in milliseconds of Unix time
	hash uint64
}

const (
	chunkMost = 256               // ends in a chunk
	chunkLess = chunkMost / 4 * 3 // in two neighbours that become one
)

// before tells whether e comes before other.
func (e end) before(other end) bool {
	return e.at < other.at || e.at == other.at && e.hash < other.hash
}

// find returns the chunk that e belongs to, and its place there.
func (d *deadlines) find(e end) (chunk, i int) {
	if len(d.chunks) == 0 {
		return 0, 0
	}

	// The last chunk that does not begin behind e, or the first.
	for low, high := 1, len(d.chunks); low < high; {
		if middle := (low + high) / 2; e.before(d.chunks[middle][0]) {
			high = middle
		} else {
			low, chunk = middle+1, middle
		}
	}

	// The first end in it that does not come before e. (slices.BinarySearchFunc makes a call for
	// each comparison, which is a tenth of what an Expire takes.)
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
func (d *deadlines) add(e end) {
	chunk, i := d.find(e)

	// Where there is no room, the last of all begins a new chunk, for usually what comes next
	// is later still; another chunk is split.
	switch {
	case len(d.chunks) == 0 || i == chunkMost && chunk == len(d.chunks)-1:
		d.chunks = append(d.chunks, make([]end, 0, chunkMost))
		chunk, i = len(d.chunks)-1, 0
	case len(d.chunks[chunk]) == chunkMost:
		// The second half gets an array of its own, so both halves have room.
		const half = chunkMost / 2
		c := d.chunks[chunk]
		d.chunks = slices.Insert(d.chunks, chunk+1,
			append(make([]end, 0, chunkMost), c[half:]...))
		d.chunks[chunk] = c[:half]
		if i > half {
			chunk, i = chunk+1, i-half
		}
	}

	d.chunks[chunk] = slices.Insert(d.chunks[chunk], i, e)
}

// remove removes e, which is there.
func (d *deadlines) remove(e end) {
	chunk, i := d.find(e)
	c := slices.Delete(d.chunks[chunk], i, i+1)
	d.chunks[chunk] = c

	// No chunk stays empty, for find looks at the first end of each.
	if len(c) == 0 {
		d.chunks = slices.Delete(d.chunks, chunk, chunk+1)
		return
	}

	// Two neighbours that are nearly empty become one.
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

// bytes is how much memory the ends take.
func (d *deadlines) bytes() int {
	const head, chunk = int(unsafe.Sizeof([]end{})), chunkMost * int(unsafe.Sizeof(end{}))
	return cap(d.chunks)*head + len(d.chunks)*chunk
}

// Expire gives key a deadline, in milliseconds of Unix time; 0: none. It returns whether the
// key is there. The store does nothing when the time has come: its owner asks NextDue. A
// Set, a Delete, and what removes a key's last value end its deadline.
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

	// NextDue goes by the ends in m.deadlines.
	m.noteDeadline(at.h, old, deadline)

	// A snapshot keeps the old deadline: the page of a large entry is copied if the snapshot
	// has it, and the entry of a short list is written anew.
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

// noteDeadline puts one deadline of a key with hash h in the place of another; 0: none.
func (m *Memory) noteDeadline(h uint64, old, at int64) {
	if old != 0 {
		m.deadlines.remove(end{old, h})
		m.expiring--
	}

	if at != 0 {
		m.deadlines.add(end{at, h})
		m.expiring++
	}
}

// Deadline returns key's deadline; ok is false if it has none.
func (v *view) Deadline(key string) (deadline int64, ok bool) {
	// While no key has a deadline the search is saved.
	if v.expiring > 0 {
		at, _ := v.find(key)
		deadline = v.deadline(at.slot)
	}
	return deadline, deadline != 0
}

// deadline returns the deadline of a slot's key, 0 if it has none.
func (v *view) deadline(slot uint64) (deadline int64) {
	switch {
	case v.expiring == 0 || slot == 0:
	case slot&largeBit != 0:
		deadline = v.large.at(number(slot)).deadline
	default:
		_, deadline, _ = v.entry(slot).list()
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

	// An end has only the hash of its key, so the index is searched for that.
	earliest := m.deadlines.chunks[0][0]
	p, tag := m.page(earliest.hash), earliest.hash<<addrBits
	for i := home(tag); p.slots[i] != 0; i = next(i) {
		slot := p.slots[i]
		if (slot^tag)>>addrBits != 0 || m.deadline(slot) != earliest.at {
			continue
		}

		// Other hashes may have the same tag: the whole hash decides.
		if k := m.entry(slot).key(); maphash.Bytes(m.seed, k) == earliest.hash {
			return string(k), true
		}
	}

	// Each key with a deadline has one end, and loses it with the deadline.
	panic("kvstore: a deadline of no key")
}
