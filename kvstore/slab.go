package kvstore

import (
	"encoding/binary"
	"math/bits"
	"slices"
	"strings"
	"unsafe"
)

// An entry is a key with its list, as bytes that nobody changes any more:
//
//	| length | key | n | n lengths | n values |                  a short list
//	| length | key | n + expires | deadline | n lengths ...      one that has a deadline
//	| length | key | 0 |                             a long one: the values are elsewhere
//
// All numbers are uvarints, but for n, which is one byte. Entries lie in slabs, one behind the
// other, and an address is a slab's number and an offset in it. What is too large for that has
// memory of its own (large.go).
type entry []byte

const (
	maxShort      = 8   // values in an entry; a key with more has a long list
	maxShortBytes = 256 // of these together, unless there is only one
	expires       = 128 // added to their number: a deadline is behind it

	slabBits = 18
	slabSize = 1 << slabBits
	ownSize  = 2 << 10 // bytes of an entry above which it has memory of its own
	freeMost = 16      // pieces of memory that wait to be used again

	// Bytes of slabs that may be dead: deadMin, and one deadShare-th of all.
	deadMin   = 2 << 20
	deadShare = 4

	buckets    = 32                 // of slabs, by their dead bytes
	bucketSize = slabSize / buckets // dead bytes by which a bucket's slabs differ at most
	cleanFrom  = buckets / 8        // the first bucket whose slabs are worth cleaning
	cleanMost  = slabSize           // bytes that one operation cleans for, at most
)

// slab is a piece of memory without pointers. It is written once, from its start to its end. When
// nothing in it is alive, no string of it was handed out, and no snapshot was taken since it was
// made, its memory is used again at once: it is in the processor's cache still. Else it is left to
// the garbage collector, which waits for everybody who reads it.
type slab [slabSize]byte

// account is what a slab's owner alone knows of it.
type account struct {
	written int // bytes
	live    int // of these, in entries that the index points to

	epoch uint64 // Memory's when the slab was made: a snapshot taken since has it, too
	shown bool   // strings that are parts of it were handed out

	bucket int // which one it is in; 0: none
	place  int // in the bucket
}

// cleaner keeps the dead bytes of slabs in bounds. With more than may be, it walks through the slab
// that has most, and moves what lives there to a new one. For each byte that is written or dies it
// walks so far that about two bytes are given back.
//
//	bucket 31:  slab 7               nearly all of it is dead: cleaned first
//	...
//	bucket 4:   slab 2, slab 12
//	...
//	bucket 1:   slab 5, slab 3       8 KiB are dead: cleaned when memory is short
type cleaner struct {
	buckets [buckets][]int
	victim  int  // the slab that is being cleaned; 0: none is
	at      int  // how far
	rate    int  // bytes of it to walk past for one that is written or dies
	held    bool // the latest snapshot may be there still: slabs that it has are in no bucket
	short   int  // bytes that may be written until memory is not short any more (Reclaim)
}

// entry returns the entry that a slot points to, with what follows it.
func (v *view) entry(slot uint64) entry {
	if slot&largeBit != 0 {
		return v.large.at(number(slot)).data
	}
	return (*v.slabs.at(int(slot & addrMask >> slabBits)))[slot&(slabSize-1):]
}

// parts returns an entry's key, and what follows it.
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

func (e entry) hasKey(key string) bool { return string(e.key()) == key }

// list returns how many values a short list has, its deadline, 0 if it has none, and what
// follows them.
func (e entry) list() (n int, deadline int64, rest []byte) {
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
	if rest[0] == 1 && rest[1] < 0x80 { // the usual list
		return append(dst, viewOf(rest[2:2+rest[1]]))
	}

	// The values begin behind the last of their lengths.
	n, _, lengths := e.list()
	values := lengths
	for range n {
		_, size := binary.Uvarint(values)
		values = values[size:]
	}

	// Each length is taken with its value.
	for range n {
		length, size := binary.Uvarint(lengths)
		lengths = lengths[size:]
		dst = append(dst, viewOf(values[:length]))
		values = values[length:]
	}
	return dst
}

// size is how many bytes the entry takes.
func (e entry) size() int {
	n, _, rest := e.list()

	// The lengths are enough: the values are not read.
	sum := 0
	for range n {
		length, size := binary.Uvarint(rest)
		rest = rest[size:]
		sum += int(length)
	}

	// What follows the entry may be in e, too, so the length of e is not the entry's.
	return len(e) - len(rest) + sum
}

// viewOf is string(b) without a copy. What it needs holds for all bytes of entries: nobody
// changes them while there is such a string. (Memory of which somebody outside was shown
// a part is never used again.)
func viewOf(b []byte) string { return unsafe.String(unsafe.SliceData(b), len(b)) }

// uvarintSize is how many bytes n takes.
func uvarintSize(n int) int { return (bits.Len(uint(n|1)) + 6) / 7 }

// entrySize is how many bytes an entry takes.
func entrySize(key string, values []string, deadline int64) int {
	size := uvarintSize(len(key)) + len(key) + 1
	if deadline != 0 {
		size += uvarintSize(int(deadline))
	}
	for _, v := range values {
		size += uvarintSize(len(v)) + len(v)
	}
	return size
}

// writeEntry writes an entry to the start of b.
func writeEntry(b []byte, key string, values []string, deadline int64) {
	// b has room for the entry (entrySize), so no append moves it to other memory.
	b = binary.AppendUvarint(b[:0], uint64(len(key)))
	b = append(b, key...)

	// A short list has few values: a number from expires up tells that a deadline follows.
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

// grow makes room for an entry of so many bytes in a slab.
func (m *Memory) grow(size int) (addr uint64, b []byte) {
	// The entry does not fit into the head, so it begins a new slab.
	if slabSize-m.accounts[m.head].written < size {
		full := m.head
		m.head = m.open()

		// The slab that was the head may be cleaned from now on.
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
	// A number is used again, so that the table grows only with the slabs in use.
	if n := len(m.unused); n > 0 {
		k, m.unused = m.unused[n-1], m.unused[:n-1]
	} else {
		k, m.accounts = m.slabs.push(m.epoch), append(m.accounts, account{})
	}

	// A snapshot has its own table, in which the number means what it meant before.
	*m.slabs.own(k, m.epoch) = (*slab)(m.allocate(slabSize)[:slabSize])
	m.accounts[k] = account{epoch: m.epoch}
	m.used += slabSize
	return k
}

// allocate returns memory for size bytes, which has no pointers: of what is free, if that
// is not much more.
func (m *Memory) allocate(size int) []byte {
	// What was released last is tried first, for it may be in the processor's cache still.
	for i := len(m.free) - 1; i >= 0; i-- {
		if data := m.free[i]; cap(data) >= size && cap(data) <= size+size/4 {
			m.free = slices.Delete(m.free, i, i+1)
			return data[:size]
		}
	}

	// A strings.Builder does not clear the memory, which will be written anyway.
	var fresh strings.Builder
	fresh.Grow(size)
	fresh.WriteByte(0) // or there would be no string to take the memory of
	return unsafe.Slice(unsafe.StringData(fresh.String()), fresh.Cap())[:size]
}

// release keeps memory that nobody has seen for the next, in the place of what has been
// free longest.
func (m *Memory) release(data []byte, epoch uint64, shown bool) {
	// The garbage collector gets what somebody may still read, and what is too large or small.
	if shown || epoch < m.epoch || cap(data) > slabSize || cap(data) <= ownSize {
		return
	}

	if len(m.free) == freeMost {
		m.free = slices.Delete(m.free, 0, 1)
	}
	m.free = append(m.free, data)
}

// die takes note that nobody needs the entry of a slot any more. It returns its size.
func (m *Memory) die(slot uint64) (size int) {
	if slot&largeBit != 0 {
		return m.dropLarge(number(slot))
	}

	k := int(slot & addrMask >> slabBits)
	size = m.entry(slot).size()
	m.live -= size
	m.accounts[k].live -= size

	// The slab has more dead bytes now: it may change its bucket, or go.
	m.settle(k)
	return size
}

// settle puts slab k where it belongs: into the bucket of its dead bytes if it may be
// cleaned, and away if nothing in it is alive.
func (m *Memory) settle(k int) {
	// Slab 0 is none, and the head is still being written.
	if k == 0 || k == m.head {
		return
	}

	// The victim is in no bucket, nor is a slab that is about to go.
	a, bucket := &m.accounts[k], 0
	if a.live > 0 && k != m.victim {
		bucket = (a.written - a.live) / bucketSize
	}

	// What the latest snapshot has is in no bucket (hold).
	isHeld := m.held && a.epoch < m.epoch
	if bucket != a.bucket && !isHeld {
		m.move(k, bucket)
	}

	// A snapshot that has the slab keeps its memory: it is not used again (release).
	if a.live == 0 {
		m.drop(k)
	}
}

// drop gives up slab k, in which nothing is alive.
func (m *Memory) drop(k int) {
	a := &m.accounts[k]
	m.used -= slabSize

	// The memory is used again if nobody can have seen it, and the number in any case.
	m.release((*m.slabs.at(k))[:], a.epoch, a.shown)
	*m.slabs.own(k, m.epoch) = nil
	*a = account{}
	m.unused = append(m.unused, k)

	// The victim has gone: clean chooses another one when it has to.
	if k == m.victim {
		m.victim = 0
	}
}

// move takes slab k out of its bucket, if it is in one, and puts it into another; 0: none.
func (m *Memory) move(k, bucket int) {
	a := &m.accounts[k]

	// The bucket's last slab takes the place that becomes free.
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

// hold leaves all slabs alone, but for the victim, as long as somebody has the snapshot that is
// being taken: cleaning them would give nothing back.
func (m *Memory) hold() {
	m.buckets, m.held = [buckets][]int{}, true
}

// letGo ends hold, once nobody has the snapshot any more.
func (m *Memory) letGo() {
	if !m.held || m.latest.Value() != nil {
		return
	}

	// The slabs that the snapshot had may be cleaned again.
	m.held = false
	for k := range m.accounts {
		if a := &m.accounts[k]; a.live > 0 && a.epoch < m.epoch {
			a.bucket = 0 // it was in one when the snapshot was taken
			m.settle(k)
		}
	}
}

// clean cleans slabs after so many bytes were written or have died.
func (m *Memory) clean(bytes int) {
	// One operation cleans no longer than this, whatever it has written.
	bytes = min(bytes, cleanMost)
	m.short = max(0, m.short-bytes)

	for bytes > 0 && (m.victim > 0 || m.choose()) {
		victim, rate := m.victim, m.rate
		walk := bytes * rate
		for walk > 0 && victim == m.victim {
			walk -= m.step()
		}
		bytes = walk / rate // the victim has gone: what is left is for the next
	}
}

// step moves the next entry of the victim to another slab, if it is alive, and returns its size.
// With the last one that is alive the victim is dropped.
func (m *Memory) step() (size int) {
	addr := uint64(m.victim)<<slabBits | uint64(m.at)
	e := m.entry(addr)
	size = e.size()
	m.at += size

	// The copy is made before the entry dies, for the victim may go with it.
	if at := m.locate(addr); at.slot != 0 {
		to, b := m.grow(size)
		copy(b, e)
		m.point(at, to)
		m.die(addr)
	}
	return size
}

// choose makes the slab with most dead bytes the victim, if more is dead in all than may be.
func (m *Memory) choose() bool {
	// While memory is short, slabs with few dead bytes are worth cleaning, too.
	least := 1
	if m.short == 0 {
		if m.used-m.live <= deadMin+m.used/deadShare {
			return false
		}
		least = cleanFrom
	}

	// Once nobody has the latest snapshot, its slabs can be chosen, too.
	m.letGo()

	// The rate is such that about two bytes are given back for each that is written or dies.
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
// and can be counted as free: what is written from now on gets them, for slabs with less dead bytes
// than usual are cleaned as well, until 256 KiB were written or have died.
func (m *Memory) Reclaim() (bytes int64) {
	m.letGo()
	m.short = slabSize
	for b, slabs := range m.buckets {
		bytes += int64(b * bucketSize * len(slabs))
	}

	return max(0, bytes-2*slabSize) // what is moved takes room before its slab goes
}
