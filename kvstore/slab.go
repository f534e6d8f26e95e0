package kvstore

import (
	"encoding/binary"
	"hash/maphash"
	"math/bits"
	"slices"
	"strings"
	"unsafe"
)

// An entry is a key with its list, as bytes that nobody changes any more:
//
//	| length | key | n | n lengths | n values |      a short list
//	| length | key | 0 | number              |      a long one: its place in lists
//
// All numbers are uvarints. Entries lie in slabs, one behind the other, and an address
// is a slab's number and an offset in it.
type entry []byte

const (
	maxShort      = 8   // values in an entry; a key with more has a long list
	maxShortBytes = 256 // of these together, unless there is only one

	slabBits = 18
	slabSize = 1 << slabBits
	ownSize  = 2 << 10 // bytes of an entry above which it has a slab of its own
	freeMost = 16      // slabs whose memory waits to be used again

	// Bytes that may be dead: deadMin, and one deadShare-th of all slabs. With more, slabs are
	// cleaned: for each byte that is written or dies the cleaner walks past cleanRate bytes, and
	// moves what lives among them to a new slab. That keeps the bound.
	deadMin   = 2 << 20
	deadShare = 4
	cleanRate = deadShare

	cleanWindow = 1024 // slabs among which the one with most dead bytes is looked for
)

// slab is a piece of memory without pointers. It is written once, from its start to its
// end. When nothing in it is alive, and nobody else can have seen it, its memory is used
// again at once: it is in the processor's cache still. Else it is left to the garbage
// collector, which waits for everybody who reads it.
type slab struct {
	data []byte
	live int // bytes of entries that the index points to

	epoch uint64 // Memory's when the slab was made: a snapshot taken since has it, too
	shown bool   // strings that are parts of data were handed out
}

// entry returns the entry that a slot points to, with what follows it.
func (v *view) entry(slot uint64) entry {
	addr := slot & addrMask
	return v.slabs[addr>>slabBits].data[addr&(slabSize-1):]
}

// parts returns an entry's key, and what follows it.
func (e entry) parts() (key, rest []byte) {
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

// number is the number of the entry's long list, 0 if it has a short one.
func (e entry) number() int {
	_, rest := e.parts()
	if rest[0] != 0 {
		return 0
	}
	n, _ := binary.Uvarint(rest[1:])
	return int(n)
}

// values appends the values of a short list to dst. They share the entry's memory.
func (e entry) values(dst []string) []string {
	_, rest := e.parts()
	if rest[0] == 1 && rest[1] < 0x80 { // the usual list
		return append(dst, viewOf(rest[2:2+rest[1]]))
	}
	n, i := int(rest[0]), 1 // at most maxShort
	values := rest
	for range n + 1 {
		_, size := binary.Uvarint(values)
		values = values[size:]
	}
	for range n {
		length, size := binary.Uvarint(rest[i:])
		i += size
		dst = append(dst, viewOf(values[:length]))
		values = values[length:]
	}
	return dst
}

// size is how many bytes the entry takes.
func (e entry) size() int {
	_, rest := e.parts()
	n, i := max(1, int(rest[0])), 1
	sum := 0
	for range n {
		length, size := binary.Uvarint(rest[i:])
		i += size
		sum += int(length)
	}
	if rest[0] == 0 {
		sum = 0
	}
	return len(e) - len(rest) + i + sum
}

// viewOf is string(b) without a copy. What it needs holds for all bytes in slabs: nobody
// changes them while there is such a string. (A slab of which somebody outside was shown
// one is never used again.)
func viewOf(b []byte) string { return unsafe.String(unsafe.SliceData(b), len(b)) }

// uvarintSize is how many bytes n takes.
func uvarintSize(n int) int { return (bits.Len(uint(n|1)) + 6) / 7 }

// write adds an entry: of values, or if there are none, of the long list with a number.
func (m *Memory) write(key string, values []string, number int) (addr uint64) {
	size := uvarintSize(len(key)) + len(key) + 1
	for _, v := range values {
		size += uvarintSize(len(v)) + len(v)
	}
	if len(values) == 0 {
		size += uvarintSize(number)
	}
	addr, b := m.grow(size)
	b = binary.AppendUvarint(b, uint64(len(key)))
	b = append(b, key...)
	b = append(b, byte(len(values)))
	if len(values) == 0 {
		b = binary.AppendUvarint(b, uint64(number))
	}
	for _, v := range values {
		b = binary.AppendUvarint(b, uint64(len(v)))
	}
	for _, v := range values {
		b = append(b, v...)
	}
	return addr
}

// grow makes room for an entry. b is empty, and has size bytes of capacity.
func (m *Memory) grow(size int) (addr uint64, b []byte) {
	k := m.head
	if size > ownSize {
		k = m.open(size)
	} else if s := m.slabs[k]; cap(s.data)-len(s.data) < size {
		m.head = m.open(slabSize)
		m.drop(k)
		k = m.head
	}
	s := &m.slabs[k]
	n := len(s.data)
	s.data = s.data[:n+size]
	s.live += size
	m.live += size
	return uint64(k)<<slabBits | uint64(n), s.data[n : n : n+size]
}

// open makes a slab and returns its number.
func (m *Memory) open(size int) (k int) {
	if n := len(m.unused); n > 0 {
		k, m.unused = m.unused[n-1], m.unused[:n-1]
	} else {
		k, m.slabs = len(m.slabs), append(m.slabs, slab{})
	}
	data := m.reuse(size)
	if data == nil {
		var fresh strings.Builder // it does not clear memory that will be written anyway
		fresh.Grow(size)
		fresh.WriteByte(0) // or there would be no string to take the memory of
		data = unsafe.Slice(unsafe.StringData(fresh.String()), fresh.Cap())[:0]
	}
	m.slabs[k] = slab{data: data, epoch: m.epoch}
	m.used += cap(data)
	return k
}

// reuse returns free memory of at least size bytes, and not many more, nil if there is none.
func (m *Memory) reuse(size int) []byte {
	for i := len(m.free) - 1; i >= 0; i-- {
		if data := m.free[i]; cap(data) >= size && cap(data) <= size+size/4 {
			m.free = slices.Delete(m.free, i, i+1)
			return data[:0]
		}
	}
	return nil
}

// release keeps a slab's memory for reuse, in the place of what has been free longest.
func (m *Memory) release(s *slab) {
	if s.shown || s.epoch < m.epoch || cap(s.data) > slabSize {
		return
	}
	if len(m.free) == freeMost {
		m.free = slices.Delete(m.free, 0, 1)
	}
	m.free = append(m.free, s.data)
}

// drop leaves slab k to the garbage collector, unless it is of use.
func (m *Memory) drop(k int) {
	if k == 0 || k == m.head || m.slabs[k].live > 0 {
		return
	}
	m.used -= cap(m.slabs[k].data)
	m.release(&m.slabs[k])
	m.slabs[k] = slab{}
	m.unused = append(m.unused, k)
	if k == m.victim {
		m.victim = 0
	}
}

// die takes note that nobody needs the entry of a slot any more. It returns its size.
func (m *Memory) die(slot uint64) (size int) {
	k := int(slot & addrMask >> slabBits)
	size = m.entry(slot).size()
	m.live -= size
	m.slabs[k].live -= size
	m.drop(k)
	return size
}

// clean walks past so many bytes of the slab that has most dead ones, and moves what
// lives there, if more is dead in all than may be.
func (m *Memory) clean(bytes int) {
	if m.victim == 0 && m.used-m.live > deadMin+m.used/deadShare {
		if m.skip -= bytes; m.skip <= 0 {
			m.choose()
		}
	}
	for victim := m.victim; bytes > 0 && victim > 0 && victim == m.victim; {
		addr := uint64(victim)<<slabBits | uint64(m.at)
		e := m.entry(addr)
		e = e[:e.size()]
		m.at += len(e)
		bytes -= len(e)
		h := maphash.Bytes(m.seed, e.key())
		p, slot := m.page(h), h<<addrBits|addr
		for i := home(slot); p.slots[i] != 0; i = next(i) {
			if p.slots[i] == slot {
				addr, b := m.grow(len(e))
				copy(b[:len(e)], e)
				m.point(h, i, addr)
				m.die(slot) // with the last one the slab is dropped
				break
			}
		}
	}
}

// choose makes the slab with most dead bytes among the next ones the victim. One that the
// latest snapshot has is left alone: cleaning it would give nothing back.
func (m *Memory) choose() {
	isThere := m.latest.Value() != nil
	most := slabSize / (2 * deadShare)
	for range min(cleanWindow, len(m.slabs)) {
		if m.cursor++; m.cursor >= len(m.slabs) {
			m.cursor = 1
		}
		s := &m.slabs[m.cursor]
		if dead := len(s.data) - s.live; dead > most && m.cursor != m.head &&
			!(isThere && s.epoch < m.epoch) {
			m.victim, m.at, most = m.cursor, 0, dead
		}
	}
	if m.victim == 0 {
		m.skip = cleanRate * slabSize
	}
}
