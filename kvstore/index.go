package kvstore

import "hash/maphash"

// The index tells where a key's entry is. It uses extendible hashing (Fagin et al., TODS 1979): a
// directory of pages, in which the first bits of a key's hash choose the page. A page that becomes
// full is split in two, so the index grows by 4 KiB at a time. Only the directory, of 8 bytes a
// place (a page has one or more), is ever copied as a whole: when it doubles.
//
//	directory            page                        slab
//	+-----+     +------------------------+     +---------------------
//	| 00. | --> | head | slot | slot | - |     | entry | entry | ...
//	| 01. | --> +------------------------+     +---------------------
//	| 10. | \            |                              ^
//	| 11. | --> page     +-- tag, 20 bits of the hash   |
//	+-----+                  address, 44 bits ----------+ or a large entry (large.go)
//
// Pages have no pointers: the garbage collector sees about 4,300 objects for a million keys.
const (
	tagBits   = 20
	addrBits  = 64 - tagBits
	addrMask  = 1<<addrBits - 1
	pageSlots = 510 // with its head a page takes 4 KiB
	pageFull  = 384 // slots in use at which a page is split
	pageEmpty = 192 // slots that two halves use together, at most, when they are merged again
)

// page holds the slots of all keys whose hashes have the same first depth bits. A slot
// is 0, or a tag and an address. The search for a key begins at the place that its tag
// gives (home), and goes on until it meets an empty slot.
type page struct {
	epoch uint64 // Memory's when the page was made: a snapshot taken since has it, too
	used  uint16
	depth uint8
	slots [pageSlots]uint64
}

// home returns where the search for a slot's key begins.
func home(slot uint64) int { return int(slot >> addrBits * pageSlots >> tagBits) }

// next returns the slot after i; the page is a ring.
func next(i int) int {
	if i++; i < pageSlots {
		return i
	}
	return 0
}

// insert adds a slot.
func (p *page) insert(slot uint64) {
	i := home(slot)
	for p.slots[i] != 0 {
		i = next(i)
	}
	p.slots[i] = slot
	p.used++
}

// remove empties slot i, and closes the gap so that no search ends there too early: a later slot
// moves into the gap unless it would then lie before its home (Knuth, TAOCP 3, 6.4, R).
func (p *page) remove(i int) {
	// i is the gap, and j goes through the slots after it.
	for j := next(i); p.slots[j] != 0; j = next(j) {
		// How far j is behind its home and behind the gap: the page is a ring.
		fromHome, fromGap := j-home(p.slots[j]), j-i
		if fromHome < 0 {
			fromHome += pageSlots
		}
		if fromGap < 0 {
			fromGap += pageSlots
		}

		// The gap does not lie before j's home, so a search for j's key finds it in the gap, too.
		if fromHome >= fromGap {
			p.slots[i] = p.slots[j]
			i = j
		}
	}

	p.slots[i] = 0
	p.used--
}

// view is the part of a Memory with which keys and values are found. A snapshot is a copy of it:
// the Memory replaces what a snapshot may read, and does not change it.
type view struct {
	seed maphash.Seed
	// by the first bits of the hash; a page of lower depth has several places
	dir   table[*page]
	shift uint8 // 64 minus the number of these bits
	slabs table[*slab]
	large table[large]

	expiring int // keys that have a deadline
}

func (v *view) page(h uint64) *page { return *v.dir.at(int(h >> v.shift)) }

// spot is where the index has a key, or would have it.
type spot struct {
	h    uint64 // the key's hash
	i    int    // the slot's number in h's page
	slot uint64 // 0: the key is not there
}

// find looks for key. e is its entry; nil if it is not there.
func (v *view) find(key string) (at spot, e entry) {
	h := maphash.String(v.seed, key)
	p := v.page(h)
	tag := h << addrBits
	i := home(tag)

	// Other keys may have the same tag: the key in the entry decides.
	for ; p.slots[i] != 0; i = next(i) {
		if (p.slots[i]^tag)>>addrBits == 0 {
			if e := v.entry(p.slots[i]); e.hasKey(key) {
				return spot{h, i, p.slots[i]}, e
			}
		}
	}

	// The key is not there; it would get the empty slot i.
	return spot{h, i, 0}, nil
}

// locate looks for the entry at addr. at.slot is 0 if the index does not point to it: then the
// entry is dead.
func (v *view) locate(addr uint64) (at spot) {
	h := maphash.Bytes(v.seed, v.entry(addr).key())
	p, slot := v.page(h), h<<addrBits|addr

	// No two entries have the same address, so the slot with this one is the entry's.
	i := home(slot)
	for ; p.slots[i] != 0 && p.slots[i] != slot; i = next(i) {
	}
	return spot{h, i, p.slots[i]}
}

// own returns h's page for a change: a copy, if a snapshot may have the page.
func (m *Memory) own(h uint64) *page {
	p := m.page(h)

	// A snapshot may have a page of an earlier epoch and keeps that; the directory gets a copy.
	if p.epoch != m.epoch {
		mine := *p
		mine.epoch = m.epoch
		p = &mine
		m.enter(h, p)
	}

	return p
}

// enter puts p in all places of the directory whose first bits are h's: p.depth bits count.
func (m *Memory) enter(h uint64, p *page) {
	// A page of lower depth than the directory has several places in a row.
	n := 1 << (64 - m.shift - p.depth)
	start := int(h>>m.shift) &^ (n - 1)
	for i := range n {
		*m.dir.own(start+i, m.epoch) = p
	}
}

// point makes the slot of a spot point to addr.
func (m *Memory) point(at spot, addr uint64) {
	p := m.own(at.h)
	if at.slot == 0 {
		p.used++
		m.keys++
	}

	p.slots[at.i] = at.h<<addrBits | addr

	// A page is split before the searches in it become long.
	if p.used >= pageFull {
		m.split(at.h)
	}
}

// split replaces h's page by two. It reads and hashes the page's keys again, because a
// slot does not have the bit of the hash that chooses between the two.
func (m *Memory) split(h uint64) {
	old := m.page(h)

	// The directory uses no more bits than the page: it needs one more, and becomes twice as long.
	if 64-m.shift == old.depth {
		var dir table[*page]
		for i := range 2 * m.dir.len {
			*dir.at(dir.push(m.epoch)) = *m.dir.at(i / 2)
		}
		m.dir, m.shift = dir, m.shift-1
	}

	// The next bit of a key's hash chooses between the new pages.
	bit := uint64(1) << (63 - old.depth)
	low, high := &page{epoch: m.epoch, depth: old.depth + 1}, &page{epoch: m.epoch,
		depth: old.depth + 1}
	for _, slot := range old.slots {
		switch {
		case slot == 0:
		case maphash.Bytes(m.seed, m.entry(slot).key())&bit == 0:
			low.insert(slot)
		default:
			high.insert(slot)
		}
	}

	// A snapshot still has the old page in its own directory.
	m.enter(h&^bit, low)
	m.enter(h|bit, high)
	m.pages++
}

// unpoint empties the slot of a spot, and merges its page with the other half if
// both have few keys.
func (m *Memory) unpoint(at spot) {
	h, p := at.h, m.own(at.h)
	p.remove(at.i)
	m.keys--

	// A page of depth 0 has no other half, and a page with many keys stays as it is.
	if p.depth == 0 || p.used > pageEmpty {
		return
	}

	// The other half's hashes differ in the last of the depth's bits. It may have been split
	// further.
	other := m.page(h ^ 1<<(64-p.depth))
	if other.depth != p.depth || p.used+other.used > pageEmpty {
		return
	}

	// Both are copied to a new page, because a snapshot may have the old ones.
	both := &page{epoch: m.epoch, depth: p.depth - 1}
	for _, half := range []*page{p, other} {
		for _, slot := range half.slots {
			if slot != 0 {
				both.insert(slot)
			}
		}
	}

	m.enter(h, both)
	m.pages--
}
