package kvstore

import (
	"encoding/binary"
	"math/bits"
	"slices"
	"strings"
	"unsafe"
)

// An entry is a key with its list, as bytes that are never changed:
//
//	| length | key | n | n lengths | n values |                  a short list
//	| length | key | n + expires | deadline | n lengths ...      a short list with a deadline
//	| length | key | 0 |                             a long list: its values are elsewhere
//
// All numbers are uvarints, except n, which is one byte. Entries lie in slabs, one after the
// other, and an address is a slab's number and an offset in it. An entry of over ownSize bytes, or
// of a long list, has memory of its own, and its deadline beside it (large.go).
type entry []byte

const (
	maxShort      = 8   // values in an entry; a key with more has a long list
	maxShortBytes = 256 // bytes of these values, unless it is only one; more are a long list, too
	expires       = 128 // added to the number of values: a deadline follows

	slabBits = 18
	slabSize = 1 << slabBits
	ownSize  = 2 << 10 // bytes of an entry above which it has memory of its own
	freeMost = 16      // pieces of memory that wait to be reused

	// The bytes of slabs that may be dead: deadMin, and one part in deadShare of all.
	deadMin   = 2 << 20
	deadShare = 4

	buckets    = 32                 // of slabs, by their dead bytes
	bucketSize = slabSize / buckets // dead bytes by which a bucket's slabs differ at most
	cleanFrom  = buckets / 8        // the first bucket whose slabs are usually worth cleaning
	cleanMost  = slabSize           // written or dead bytes that one operation cleans for, at most
)

// slab is a piece of memory without pointers. It is written once, from its start to its end. If
// nothing in it is alive, no string of it was handed out, and no snapshot was taken since it was
// made, its memory is reused at once: it is still in the processor's cache. Otherwise it is left to
// the garbage collector, which waits for all its readers.
type slab [slabSize]byte

// account is what Memory must know of a slab, but not its snapshots.
type account struct {
	written int // bytes
	live    int // of the written bytes, those in entries that the index points to

	epoch uint64 // Memory's when the slab was made: a snapshot taken since has the slab, too
	shown bool   // strings that are parts of the slab were handed out

	bucket int // which bucket the slab is in; 0: none
	place  int // in the bucket
}

// cleaner limits the dead bytes of slabs. If there are more than allowed, it walks through the slab
// that has most of them, and moves the live entries to the head. For each byte that is written or
// dies it walks so far that about two bytes are freed.
//
//	bucket 31:  slab 7               nearly all of it is dead: cleaned first
//	...
//	bucket 4:   slab 2, slab 12
//	...
//	bucket 1:   slab 5, slab 3       8 KiB are dead: cleaned only when memory is short
type cleaner struct {
	buckets [buckets][]int
	victim  int  // the slab that is being cleaned; 0: none
	at      int  // offset of the victim's next entry
	rate    int  // bytes of the victim to walk for each byte that is written or dies
	held    bool // somebody may still have the latest snapshot: its slabs are in no bucket
	short   int  // bytes to be written, or to die, before memory counts as not short (Reclaim)
}

// entry returns the entry that a slot points to, with the bytes that follow it.
func (v *view) entry(slot uint64) entry {
	if slot&largeBit != 0 {
		return v.large.at(number(slot)).data
	}
	return (*v.slabs.at(int(slot & addrMask >> slabBits)))[slot&(slabSize-1):]
}

// parts returns an entry's key, and the bytes after the key.
func (e entry) parts() (key, rest []byte) {
	// A length below 128 is one byte, and is read without a call.
	n, i := uint64(e[0]), 1
	if n >= 0x80 {
		n, i = binary.Uvarint(e)
	}
	end := i + int(n)
	return e[i:end], e[end:]
}

func (e entry) key() []byte {
	key, _ := e.parts()
	return key
}

func (e entry) hasKey(key string) bool {
	// A short key is compared without a call of parts, because most requests do this.
	if n := len(key); n < 0x80 {
		return int(e[0]) == n && string(e[1:n+1]) == key
	}
	return string(e.key()) == key
}

// head returns how many values a short list has, its deadline (0: none), and the bytes from the
// first length on.
func (e entry) head() (n int, deadline int64, rest []byte) {
	_, rest = e.parts()
	n, rest = int(rest[0]), rest[1:]

	if n >= expires {
		at, size := binary.Uvarint(rest)
		n, deadline, rest = n-expires, int64(at), rest[size:]
	}
	return n, deadline, rest
}

// values appends the values of a short list to dst. They share the entry's memory.
func (e entry) values(dst []string) []string {
	_, rest := e.parts()
	if rest[0] == 1 && rest[1] < 0x80 { // the usual list: one short value, no deadline
		return append(dst, viewOf(rest[2:2+rest[1]]))
	}

	// The values begin after the last of their lengths.
	n, _, lengths := e.head()
	values := lengths
	for range n {
		_, size := binary.Uvarint(values)
		values = values[size:]
	}

	// Each length says where its value ends.
	for range n {
		length, size := binary.Uvarint(lengths)
		lengths = lengths[size:]
		dst = append(dst, viewOf(values[:length]))
		values = values[length:]
	}
	return dst
}

// size returns how many bytes the entry takes.
func (e entry) size() int {
	n, _, rest := e.head()

	// The lengths are enough; the values need not be read.
	sum := 0
	for range n {
		length, size := binary.Uvarint(rest)
		rest = rest[size:]
		sum += int(length)
	}

	// Other entries may follow in e, so the length of e is not the entry's.
	return len(e) - len(rest) + sum
}

// viewOf returns string(b) without a copy. Nobody may change b while there is such a string. That
// holds for the bytes of entries: memory of which a part was handed out is never reused.
func viewOf(b []byte) string { return unsafe.String(unsafe.SliceData(b), len(b)) }

// uvarintSize returns how many bytes the uvarint n takes.
func uvarintSize(n uint64) int { return (bits.Len64(n|1) + 6) / 7 }

// entrySize returns how many bytes an entry takes.
func entrySize(key string, values []string, deadline int64) int {
	size := uvarintSize(uint64(len(key))) + len(key) + 1
	if deadline != 0 {
		size += uvarintSize(uint64(deadline))
	}
	for _, v := range values {
		size += uvarintSize(uint64(len(v))) + len(v)
	}
	return size
}

// writeEntry writes an entry to the start of b, which has room for it (entrySize).
func writeEntry(b []byte, key string, values []string, deadline int64) {
	// As there is room, no append moves b to other memory.
	b = binary.AppendUvarint(b[:0], uint64(len(key)))
	b = append(b, key...)

	// A short list has few values, so a number from expires on says that a deadline follows.
	if deadline == 0 {
		b = append(b, byte(len(values)))
	} else {
		b = binary.AppendUvarint(append(b, byte(len(values)+expires)), uint64(deadline))
	}

	// All lengths come first, then all values.
	for _, v := range values {
		b = binary.AppendUvarint(b, uint64(len(v)))
	}
	for _, v := range values {
		b = append(b, v...)
	}
}

// grow makes room for an entry of size bytes in a slab, and returns its address and its memory.
func (m *Memory) grow(size int) (addr uint64, b []byte) {
	// An entry that does not fit into the head begins a new slab.
	if slabSize-m.accounts[m.head].written < size {
		full := m.head
		m.head = m.open()

		// The old head may be cleaned from now on.
		m.settle(full)
	}

	a := &m.accounts[m.head]
	n := a.written
	a.written += size
	a.live += size
	m.live += size
	return uint64(m.head)<<slabBits | uint64(n), (*m.slabs.at(m.head))[n : n+size]
}

// open makes a slab and returns its number.
func (m *Memory) open() (k int) {
	// Numbers are reused, so that the table grows only with the number of slabs in use.
	if n := len(m.unused); n > 0 {
		k, m.unused = m.unused[n-1], m.unused[:n-1]
	} else {
		k, m.accounts = m.slabs.push(m.epoch), append(m.accounts, account{})
	}

	// Snapshots have tables of their own, in which the number still means the old slab.
	*m.slabs.own(k, m.epoch) = (*slab)(m.allocate(slabSize)[:slabSize])
	m.accounts[k] = account{epoch: m.epoch}
	m.used += slabSize
	return k
}

// allocate returns memory for size bytes without pointers: a free piece, if one is large enough and
// not much larger.
func (m *Memory) allocate(size int) []byte {
	// The piece released last is tried first: it may still be in the processor's cache.
	for i := len(m.free) - 1; i >= 0; i-- {
		if data := m.free[i]; cap(data) >= size && cap(data) <= size+size/4 {
			m.free = slices.Delete(m.free, i, i+1)
			return data[:size]
		}
	}

	// A strings.Builder does not clear the memory, which saves time: it will be written anyway.
	var fresh strings.Builder
	fresh.Grow(size)
	fresh.WriteByte(0) // an empty string would have no memory
	return unsafe.Slice(unsafe.StringData(fresh.String()), fresh.Cap())[:size]
}

// release keeps memory for reuse if nobody can have seen it. It gives up the piece that has been
// free longest if there are too many.
func (m *Memory) release(data []byte, epoch uint64, shown bool) {
	// Memory that somebody may still read, or whose size is unusual, is the garbage collector's.
	if shown || epoch < m.epoch || cap(data) > slabSize || cap(data) <= ownSize {
		return
	}

	if len(m.free) == freeMost {
		m.free = slices.Delete(m.free, 0, 1)
	}
	m.free = append(m.free, data)
}

// die notes that nobody needs the entry of a slot any more. It returns the entry's size.
func (m *Memory) die(slot uint64) (size int) {
	if slot&largeBit != 0 {
		return m.dropLarge(number(slot))
	}

	k := int(slot & addrMask >> slabBits)
	size = m.entry(slot).size()
	m.live -= size
	m.accounts[k].live -= size

	// The slab has more dead bytes now: it may change its bucket, or be dropped.
	m.settle(k)
	return size
}

// settle puts slab k into the bucket for its dead bytes if it may be
// cleaned, and drops it if nothing in it is alive.
func (m *Memory) settle(k int) {
	// Number 0 means no slab, and the head is still being written.
	if k == 0 || k == m.head {
		return
	}

	// The victim is in no bucket, and neither is a slab that is about to be dropped.
	a, bucket := &m.accounts[k], 0
	if a.live > 0 && k != m.victim {
		bucket = (a.written - a.live) / bucketSize
	}

	// Slabs that the latest snapshot has are in no bucket (hold).
	isHeld := m.held && a.epoch < m.epoch
	if bucket != a.bucket && !isHeld {
		m.move(k, bucket)
	}

	// release does not reuse the memory if a snapshot may have the slab.
	if a.live == 0 {
		m.drop(k)
	}
}

// drop gives up slab k, in which nothing is alive.
func (m *Memory) drop(k int) {
	a := &m.accounts[k]
	m.used -= slabSize

	// The memory is reused if nobody can have seen it, the number in any case.
	m.release((*m.slabs.at(k))[:], a.epoch, a.shown)
	*m.slabs.own(k, m.epoch) = nil
	*a = account{}
	m.unused = append(m.unused, k)

	// If that was the victim, clean chooses another one when it needs one.
	if k == m.victim {
		m.victim = 0
	}
}

// move takes slab k out of its bucket, if it is in one, and puts it into another; 0: none.
func (m *Memory) move(k, bucket int) {
	a := &m.accounts[k]

	// The bucket's last slab takes its place.
	if a.bucket > 0 {
		old := m.buckets[a.bucket]
		last := old[len(old)-1]
		old[a.place], m.accounts[last].place = last, a.place
		m.buckets[a.bucket] = old[:len(old)-1]
	}

	if a.bucket = bucket; bucket > 0 {
		a.place = len(m.buckets[bucket])
		m.buckets[bucket] = append(m.buckets[bucket], k)
	}
}

// hold takes all slabs out of their buckets when a snapshot is taken. While somebody has the
// snapshot, cleaning them would free nothing. Only the victim is still cleaned to its end.
func (m *Memory) hold() {
	m.buckets, m.held = [buckets][]int{}, true
}

// letGo ends hold if nobody has the snapshot any more.
func (m *Memory) letGo() {
	if !m.held || m.latest.Value() != nil {
		return
	}

	// The slabs that the snapshot had may be cleaned again.
	m.held = false
	for k := range m.accounts {
		if a := &m.accounts[k]; a.live > 0 && a.epoch < m.epoch {
			a.bucket = 0 // hold has emptied the bucket that this says
			m.settle(k)
		}
	}
}

// clean cleans slabs after this many bytes were written or have died.
func (m *Memory) clean(bytes int) {
	// This bounds the time that one operation spends, however much it has written.
	bytes = min(bytes, cleanMost)
	m.short = max(0, m.short-bytes)

	for bytes > 0 && (m.victim > 0 || m.choose()) {
		victim, rate := m.victim, m.rate
		walk := bytes * rate
		for walk > 0 && victim == m.victim {
			walk -= m.step()
		}
		bytes = walk / rate // if the victim was dropped, the rest is for the next one
	}
}

// step walks past the victim's next entry and returns its size; an entry that is alive moves to
// another slab. When the last live entry has moved, the victim is dropped.
func (m *Memory) step() (size int) {
	addr := uint64(m.victim)<<slabBits | uint64(m.at)
	e := m.entry(addr)
	size = e.size()
	m.at += size

	// The copy is made before the entry dies, because then the victim may be dropped.
	if at := m.locate(addr); at.slot != 0 {
		to, b := m.grow(size)
		copy(b, e)
		m.point(at, to)
		m.die(addr)
	}
	return size
}

// choose makes the slab with most dead bytes the victim, if more bytes are dead in all than allowed
// or memory is short. It reports whether there is a victim.
func (m *Memory) choose() bool {
	// While memory is short, slabs with few dead bytes are worth cleaning, too.
	least := 1
	if m.short == 0 {
		if m.used-m.live <= deadMin+m.used/deadShare {
			return false
		}
		least = cleanFrom
	}

	// If nobody has the latest snapshot any more, its slabs can be chosen, too.
	m.letGo()

	// At this rate about two bytes are freed for each byte that is written or dies.
	for b := buckets - 1; b >= least; b-- {
		if n := len(m.buckets[b]); n > 0 {
			m.victim, m.at, m.rate = m.buckets[b][n-1], 0, 2*buckets/b
			m.move(m.victim, 0)
			return true
		}
	}
	return false
}

// Reclaim tells the store that memory is short. It returns how many bytes of the Footprint are dead
// and can be counted as free: the next writes reuse them, because slabs with fewer dead bytes than
// usual are cleaned as well, until 256 KiB were written or have died.
func (m *Memory) Reclaim() (bytes int64) {
	m.letGo()
	m.short = slabSize
	for b, slabs := range m.buckets {
		bytes += int64(b * bucketSize * len(slabs))
	}

	return max(0, bytes-2*slabSize) // live entries take new room before their old slab goes
}
