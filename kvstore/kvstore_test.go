package kvstore

import (
	"fmt"
	"hash/maphash"
	"maps"
	"math"
	"math/rand/v2"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
	"unsafe"
)

// Ensure that All stops at a break.
func TestAllStops(t *testing.T) {
	store := NewMemory()
	for i := range 10 {
		store.Put(fmt.Sprint(i), "v")
		store.Put(fmt.Sprint(i%5), "w")
	}

	for most := range 10 {
		n := 0
		for range store.All() {
			if n++; n > most {
				break
			}
		}
		if n != most+1 {
			t.Errorf("All yielded %d after a break at %d", n, most+1)
		}
	}
}

// Ensure that an Update copies a list that was handed out, and only once.
func TestUpdateCopiesOnlyOnce(t *testing.T) {
	store := NewMemory()
	for i := range 100 {
		store.Put("k", fmt.Sprint(i))
	}

	update := func() { store.Update("k", "50", "50") }
	if got := testing.AllocsPerRun(10, update); got != 1 { // the value
		t.Errorf("Update made %v allocations, want 1", got)
	}

	readAndUpdate := func() {
		store.Get("k")
		update()
		update()
	}
	if got := testing.AllocsPerRun(10, readAndUpdate); got != 3 { // the values, and the list
		t.Errorf("two Updates of a list that was handed out made %v allocations, want 3", got)
	}

	// While a reader has the array, it keeps what goes from its front.
	store.Get("k")
	store.Take("k")
	for i := range 100 { // the list is copied when it grows
		store.Put("k", fmt.Sprint("more", i))
	}

	at, _ := store.find("k")
	if l := store.long(at.slot); l.shared || store.longGone != 0 {
		t.Errorf("a list that has grown is shared: %v, and keeps %d bytes that went", l.shared,
			store.longGone)
	}
}

// What model_test.go uses from inside the package.
var (
	CheckInside  = checkInside
	CheckEmptied = checkEmptied
	MemorySteps  = memorySteps
)

// Fewer is storetest.Fewer. model_test.go sets it, because storetest imports this package.
var Fewer func(n, of int) int

// memorySteps returns how many random operations a test does: KVSTORE_STEPS if that is set, as in
// .ci/run. With the race detector a test does one in so many.
func memorySteps(t *testing.T, of int) (steps int) {
	steps = Fewer(50_000, of)
	if text := os.Getenv("KVSTORE_STEPS"); text != "" {
		var err error
		if steps, err = strconv.Atoi(text); err != nil {
			t.Fatal(err)
		}
	}
	return steps
}

// checkEmptied reports what is left in m, which was large before all its keys were deleted.
func checkEmptied(t *testing.T, m *Memory) {
	t.Helper()
	checkInside(t, m)
	if m.rate == 0 {
		t.Error("nothing was cleaned")
	}

	if keys, values, bytes := m.Size(); keys != 0 || values != 0 || bytes != 0 ||
		m.KeyBytes() != 0 || m.longValues != 0 || m.longBytes != 0 || m.pages != 1 ||
		m.expiring != 0 {
		t.Errorf("an empty store counts %d, %d, %d, %d, %d, %d and has %d pages", keys, values,
			bytes, m.KeyBytes(), m.longValues, m.longBytes, m.pages)
	}
}

// checkInside reports what is wrong with m's index, slabs and large entries.
func checkInside(t *testing.T, m *Memory) {
	t.Helper()
	catchUp(m)
	checkIndex(t, m)
	checkSlabs(t, m)
	checkLarge(t, m)
	checkDeadlines(t, m)
}

// checkDeadlines reports what is wrong with the ends of m's keys.
func checkDeadlines(t *testing.T, m *Memory) {
	t.Helper()
	n, last := 0, expiry{math.MinInt64, 0}
	for _, c := range m.deadlines.chunks {
		if len(c) == 0 || cap(c) != chunkMost {
			t.Fatalf("a chunk has %d ends and room for %d", len(c), cap(c))
		}
		for _, e := range c {
			if n++; e.before(last) {
				t.Fatalf("end %v is behind end %v", e, last)
			}
			last = e
		}
	}

	expiring := 0
	for slot := range m.slots {
		at := m.deadline(slot)
		if at == 0 {
			continue
		}
		expiring++
		e := expiry{at, maphash.Bytes(m.seed, m.entry(slot).key())}
		if chunk, i := m.deadlines.place(e); m.deadlines.chunks[chunk][i] != e {
			t.Fatalf("end %v is not where it should be", e)
		}
	}

	if n != expiring || n != m.expiring {
		t.Fatalf("%d keys have deadlines, of which %d ends are there, and %d are counted", expiring, n,
			m.expiring)
	}
}

// catchUp writes at most as many bytes as m holds, and removes them: only later writes clean slabs
// in which entries died while there was a snapshot.
func catchUp(m *Memory) {
	const key, size = "a key of nobody else", ownSize / 2
	for n := m.used / size; n > 0 && m.used-m.live > deadMin+m.used/deadShare; n-- {
		m.Set(key, strings.Repeat("v", size))
	}
	m.Delete(key)
}

// checkIndex reports what is wrong with m's pages.
func checkIndex(t *testing.T, m *Memory) {
	t.Helper()
	seen, keys, pages, bytes := map[*page]bool{}, 0, 0, 0
	for i := range m.dir.len {
		p := *m.dir.at(i)
		// A page that is less deep than the directory has several places in a row.
		if first := i &^ (1<<(64-m.shift-p.depth) - 1); *m.dir.at(first) != p {
			t.Fatalf("place %d of the directory is another page than place %d, at depth %d", i,
				first, p.depth)
		}

		if seen[p] {
			continue
		}
		seen[p] = true
		pages++

		used := 0
		for j, slot := range p.slots {
			if slot == 0 {
				continue
			}
			used++
			key := string(m.entry(slot).key())
			if at, _ := m.find(key); m.page(at.h) != p || at.i != j || at.slot != slot {
				t.Fatalf("key %.40q in slot %d is found in %d", key, j, at.i)
			}
			bytes += len(key)
		}
		if keys += used; used != int(p.used) {
			t.Fatalf("a page counts %d slots and has %d", p.used, used)
		}
	}

	if keys != m.keys || pages != m.pages || int64(bytes) != m.KeyBytes() {
		t.Fatalf("%d keys, %d pages, %d bytes of keys are counted as %d, %d, %d", keys, pages,
			bytes, m.keys, m.pages, m.KeyBytes())
	}
}

// slots yields all slots of m's index.
func (m *Memory) slots(yield func(slot uint64) bool) {
	var last *page
	for i := range m.dir.len {
		p := *m.dir.at(i)
		if p == last {
			continue
		}
		last = p
		for _, slot := range p.slots {
			if slot != 0 && !yield(slot) {
				return
			}
		}
	}
}

// checkSlabs reports what is wrong with m's slabs, their buckets, and how much is dead.
func checkSlabs(t *testing.T, m *Memory) {
	t.Helper()
	alive := make([]int, len(m.accounts))
	for slot := range m.slots {
		if slot&largeBit == 0 {
			alive[slot&addrMask>>slabBits] += m.entry(slot).size()
		}
	}

	used, live, held := 0, 0, 0 // held: dead bytes in slabs that the latest snapshot has
	for k, a := range m.accounts {
		isThere := *m.slabs.at(k) != nil
		if isThere {
			used += slabSize
		}

		// The victim is in no bucket, and neither is a slab that the latest snapshot has.
		if isThere && m.held && a.epoch < m.epoch {
			held += slabSize - a.live
		} else if b := (a.written - a.live) / bucketSize; a.bucket > 0 &&
			m.buckets[a.bucket][a.place] != k || isThere && k != m.head && k != m.victim &&
			a.bucket != b {
			t.Fatalf("slab %d is in bucket %d, place %d, want %d", k, a.bucket, a.place, b)
		}

		if live += alive[k]; a.live != alive[k] ||
			slices.Contains(m.unused, k) != (k > 0 && !isThere) {
			t.Fatalf("slab %d counts %d live bytes and has %d, of %d", k, a.live, alive[k],
				a.written)
		}
	}

	for b, slabs := range m.buckets {
		for place, k := range slabs {
			if a := m.accounts[k]; a.bucket != b || a.place != place {
				t.Fatalf("bucket %d has slab %d at place %d, which is in bucket %d at place %d", b, k,
					place, a.bucket, a.place)
			}
		}
	}

	if len(m.free) > freeMost {
		t.Fatalf("%d pieces of memory are free, want at most %d", len(m.free), freeMost)
	}
	for _, data := range m.free {
		if cap(data) > slabSize {
			t.Fatalf("a piece of %d bytes waits to be reused", cap(data))
		}
	}
	if used != m.used || live != m.live {
		t.Fatalf("%d of %d bytes are counted as %d of %d", live, used, m.live, m.used)
	}
	if dead := used - live - held; dead > deadMin+used/deadShare+4*slabSize {
		t.Fatalf("%d of %d bytes are dead", dead, used)
	}
}

// checkLarge reports what is wrong with m's large entries and long lists.
func checkLarge(t *testing.T, m *Memory) {
	t.Helper()
	entries, memory, values, bytes, gone := 0, int64(0), 0, int64(0), int64(0)
	for slot := range m.slots {
		if slot&largeBit == 0 {
			continue
		}
		entries++
		r := m.large.at(number(slot))
		memory += int64(cap(r.data))

		if at := m.locate(slot & addrMask); at.slot != slot {
			t.Fatalf("large entry %d, of %.40q, is not found", number(slot), r.data.key())
		}
		if cap(r.data) > len(r.data)*5/4+ownSize {
			t.Fatalf("an entry of %d bytes has %d", len(r.data), cap(r.data))
		}

		if r.long == nil {
			continue
		}
		l := r.long
		if len(l.values) == 0 || l.bytes != SizeOf(l.values) ||
			len(l.hashes) != len(l.values) {
			t.Fatalf("a list of %d values counts %d bytes and has %d hashes", len(l.values), l.bytes,
				len(l.hashes))
		}
		for i, v := range l.values {
			if m.hash(v) != l.hashes[i] {
				t.Fatalf("value %d has the hash of another", i)
			}
		}

		values += len(l.values)
		bytes += l.bytes
		gone += l.gone
	}

	if entries != m.large.len || memory != m.largeBytes || values != m.longValues ||
		bytes != m.longBytes || gone != m.longGone {
		t.Fatalf("%d large entries of %d bytes and %d values of %d and %d are counted as %d, %d, "+
			"%d, %d, %d", entries, memory, values, bytes, gone, m.large.len, m.largeBytes,
			m.longValues, m.longBytes, m.longGone)
	}
	if pages := (entries + tableItems - 1) / tableItems; pages != len(m.large.pages) {
		t.Fatalf("%d large entries take %d pages, want %d", entries, len(m.large.pages), pages)
	}
	for _, p := range m.large.pages[len(m.large.pages):cap(m.large.pages)] {
		if p != nil {
			t.Fatal("a page that was given up is kept in memory")
		}
	}
}

// checkFootprint fails if m takes more memory than its doc comment and the README say: more than a
// new store with the same data, a third more for dead bytes, and the index's slack.
func checkFootprint(t *testing.T, m *Memory) {
	t.Helper()
	fresh := NewMemory()
	for key, list := range (&snapshot{m.view}).All() {
		for _, v := range list {
			fresh.Put(key, v)
		}
	}

	keys, _, bytes := m.Size()
	if got, most := m.Footprint(), fresh.Footprint()*4/3+int64(28*keys)+4<<20; got > most {
		t.Fatalf("%d bytes of data take %d of memory, want at most %d", bytes, got, most)
	}
}

// Ensure that the bytes of dead memory are bounded, whatever was stored before.
func TestDeadMemoryIsBounded(t *testing.T) {
	many, value := Fewer(2000, 4), strings.Repeat("v", ownSize+100)
	var snapshot Snapshot
	for name, before := range map[string]func(*Memory){
		"nothing":                 func(*Memory) {},
		"a snapshot that is kept": func(m *Memory) { snapshot = m.Snapshot() },
		"large values": func(m *Memory) {
			for i := range many {
				m.Put(fmt.Sprint("large", i), value)
			}
		},
		"large values that went": func(m *Memory) {
			for i := range many {
				m.Put(fmt.Sprint("large", i), value)
			}
			for i := range many {
				m.Delete(fmt.Sprint("large", i))
			}
			m.Set("larger than a slab", strings.Repeat("v", 2*slabSize))
			m.Delete("larger than a slab")
			checkInside(t, m)
		},
		"long lists of which few stay": func(m *Memory) {
			for i := range 2 * many {
				for range maxShort + 1 {
					m.Put(fmt.Sprint("list", i), "v")
				}
			}
			for i := range 2 * many {
				// Of each page of the table one list stays.
				if i%tableItems > 0 {
					m.Delete(fmt.Sprint("list", i))
				}
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			store, random := NewMemory(), rand.New(rand.NewPCG(3, 3))
			before(store)

			for i := range Fewer(50_000, 4) {
				store.Set(fmt.Sprint("k", random.IntN(7000)), value[:200])
				if i%300 == 0 {
					store.Set(fmt.Sprint("stay", i), "1")
				}
				if i%10_000 == 0 {
					checkFootprint(t, store)
				}
			}

			checkFootprint(t, store)
			checkInside(t, store)
			runtime.KeepAlive(snapshot)
		})
	}
}

// Ensure that a list becomes a long one, which takes more memory, when it has more values or more
// bytes than an entry has at most, and not before.
func TestShortListsStayShort(t *testing.T) {
	for _, size := range []int{0, maxShortBytes / maxShort, maxShortBytes / 2, maxShortBytes} {
		store, n := NewMemory(), maxShort
		if size > 0 {
			n = maxShortBytes / size
		}
		for range n {
			store.Put("key", strings.Repeat("v", size))
		}
		if store.longValues != 0 {
			t.Errorf("a list of %d values of %d bytes is long", n, size)
		}
		if store.Put("key", "v"); store.longValues != n+1 {
			t.Errorf("a list of %d values of %d bytes, and one more, is short", n, size)
		}
	}
}

// Ensure that dead memory is bounded in any mix of sizes, lifetimes, deletes and snapshots.
func TestDeadMemoryIsBoundedInAnyMix(t *testing.T) {
	random := rand.New(rand.NewPCG(5, 5))
	all := strings.Repeat("v", 1<<20)
	store := NewMemory()
	var latest Snapshot
	steps := memorySteps(t, 5)

	for i := range steps {
		// In turn: small values mostly, large ones, lists, and little but Deletes.
		phase := i / (steps / 40)
		size, key := random.IntN(300), fmt.Sprint(random.IntN(1<<(4+random.IntN(11))))
		switch n := random.IntN(1000); {
		case n == 0:
			size = random.IntN(len(all) + 1)
		case n < 20 || phase%4 == 1 && n < 300:
			size = random.IntN(4 * ownSize)
		}

		switch n := random.IntN(10); {
		case n == 0 || phase%4 == 3 && n < 8:
			store.Delete(key)
		case phase%4 == 2 && n < 6:
			store.Put(key, all[:size%20])
		case n < 8:
			store.Set(key, all[:size])
		default:
			store.Update(key, all[:random.IntN(300)], all[:size])
		}

		// A snapshot lives for a while. Later writes free what died meanwhile.
		switch at := i % (steps / 20); {
		case at < steps/100 && random.IntN(steps/500) == 0:
			latest = store.Snapshot()
		case at == steps/100:
			latest = nil
			runtime.GC()
		case at == steps/20-1:
			checkFootprint(t, store)
			checkInside(t, store)
		case at >= steps/50 && at%(steps/100) == 0:
			checkFootprint(t, store)
		}
	}
	runtime.KeepAlive(latest)
}

// Ensure that when memory is short, new values reuse the memory of deleted ones, also values of
// another size, and that the store takes no more memory than before meanwhile.
func TestReclaim(t *testing.T) {
	const limit, size = 14_000_000, 100
	value := strings.Repeat("v", 100*size)
	for _, next := range []int{size / 10, 2 * size, 100 * size} {
		store, keys := NewMemory(), 0

		fits := func(size int) bool {
			needed := store.Footprint() + int64(size)
			return needed <= limit || needed-store.Reclaim() <= limit
		}

		for ; fits(2 * size); keys++ {
			store.Put(fmt.Sprint("key", keys), value[:size])
		}

		_, _, full := store.Size()
		for i := 0; i < keys; i += 4 {
			store.Delete(fmt.Sprint("key", i))
		}

		for i := 0; fits(2 * next); i++ {
			store.Put(fmt.Sprint("next", i), value[:next])
			if got := store.Footprint(); got > limit+8*slabSize {
				t.Fatalf("%d bytes are taken by values of %d, want at most %d", got, next, limit)
			}
		}

		checkInside(t, store)
		_, _, bytes := store.Size()
		if next >= size && bytes < full*93/100 || bytes < full*80/100 {
			t.Errorf("of %d bytes a quarter was deleted, and %d are there once it is filled with "+
				"values of %d", full, bytes, next)
		}
	}
}

// Ensure that what died beside a snapshot can be reclaimed once the snapshot has gone.
func TestReclaimAfterASnapshot(t *testing.T) {
	const keys, size = 20_000, 200
	store := NewMemory()
	for i := range keys {
		store.Put(fmt.Sprint(i), strings.Repeat("v", size))
	}

	snapshot := store.Snapshot()
	for i := range keys / 4 * 3 {
		store.Delete(fmt.Sprint(i * 7 % keys))
	}
	if got := store.Reclaim(); got > 0 {
		t.Errorf("%d bytes can be reclaimed beside a snapshot", got)
	}

	// The store's reference to the snapshot is weak: the collector ends it.
	runtime.KeepAlive(snapshot)
	runtime.GC()
	if got := store.Reclaim(); got < keys/2*size {
		t.Errorf("%d bytes can be reclaimed after a snapshot", got)
	}
}

// Ensure that a snapshot copies next to nothing, whatever is stored, and that a later change copies
// only the pages in which it is.
func TestSnapshotCopiesLittle(t *testing.T) {
	store := NewMemory()
	for i := range 100_000 {
		store.Put(fmt.Sprint("small", i), "v")
	}
	for i := range 20_000 {
		store.Put(fmt.Sprint("large", i), strings.Repeat("v", ownSize))
	}
	for i := range 5000 * (maxShort + 1) {
		store.Put(fmt.Sprint("list", i%5000), "v")
	}

	allocated := func(do func()) (bytes uint64) {
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		do()
		runtime.ReadMemStats(&after)
		return after.TotalAlloc - before.TotalAlloc
	}

	var s Snapshot
	if got := allocated(func() { s = store.Snapshot() }); got > 16<<10 {
		t.Errorf("a snapshot takes %d bytes", got)
	}

	if got := allocated(func() {
		store.Put("list7", "w")
		store.Put("large7", "w")
		store.Delete("small7")
	}); got > 100<<10 {
		t.Errorf("three changes beside a snapshot take %d bytes", got)
	}
	runtime.KeepAlive(s)
}

// Ensure that a snapshot can be walked while its store is changed. With the race
// detector: that neither reads what the other writes.
func TestSnapshotBesideChanges(t *testing.T) {
	store := NewMemory()
	for i := range 20_000 {
		store.Put(fmt.Sprint(i), "v")
		if i%10 == 0 {
			for j := range 2 * maxShort {
				store.Put(fmt.Sprint(i), fmt.Sprint(j))
			}
		}
	}

	want := 0
	for key, list := range maps.Collect(store.All()) {
		want += len(key) + int(SizeOf(list)) + len(list)
	}

	s := store.Snapshot()
	walked := make(chan int)
	go func() {
		sum := 0
		for key, list := range s.All() {
			if sum += len(key) + int(SizeOf(list)) + len(s.View(nil, key)); sum%1000 == 0 {
				runtime.Gosched()
			}
		}
		walked <- sum
	}()

	for i := range 20_000 {
		key := fmt.Sprint(i)
		store.Get(key)
		store.Update(key, "v", "w")
		store.Put(fmt.Sprint("new", i), "v")
		if i%3 == 0 {
			store.Delete(key)
		}
	}

	if got := <-walked; got != want {
		t.Errorf("the snapshot's sizes add up to %d, want %d", got, want)
	}
}

// Ensure that what Get returns keeps no slab in memory, and that a View of more than ViewMost
// bytes keeps none either.
func TestWhatIsHandedOut(t *testing.T) {
	store := NewMemory()
	inSlab := func(s string) bool {
		at := uintptr(unsafe.Pointer(unsafe.StringData(s)))
		for k := range store.slabs.len {
			start := uintptr(unsafe.Pointer(*store.slabs.at(k)))
			if start > 0 && at >= start && at < start+slabSize {
				return true
			}
		}
		return false
	}

	for _, size := range []int{1, 100, ViewMost - 100, ViewMost, ViewMost + 1, 100_000} {
		key := fmt.Sprint(size)
		store.Put(key, strings.Repeat("v", size))
		if inSlab(store.Get(key)[0]) {
			t.Errorf("a Get of %d bytes keeps a slab", size)
		}
		if inSlab(store.View(nil, key)[0]) && size > ViewMost {
			t.Errorf("a View of %d bytes keeps a slab", size)
		}
	}

	for n := range 3 * maxShort {
		store.Put("many", strings.Repeat("v", n))
		if values := store.Get("many"); slices.ContainsFunc(values, inSlab) {
			t.Errorf("a Get of %d values keeps a slab", n)
		}
		if values := store.View(nil, "many"); slices.ContainsFunc(values, inSlab) &&
			SizeOf(values) > ViewMost {
			t.Errorf("a View of %d values keeps a slab", n)
		}
	}
}

// Ensure that values that were removed from a long list do not stay in memory, whether
// it was handed out or not, and that the Footprint counts those that still do.
func TestRemovedValuesGo(t *testing.T) {
	inUse := func() int64 {
		var stats runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&stats)
		return int64(stats.HeapAlloc)
	}

	for _, every := range []int{0, 1, 7, 300} { // Removes, between two Gets
		before, store := inUse(), NewMemory()
		const values, size = 600, 10_000
		long := strings.Repeat("v", size)
		for i := range values {
			store.Put("key", fmt.Sprint(i, long))
		}

		for i := range values - 10 {
			if every > 0 && i%every == 0 {
				store.Get("key")
			}
			if !store.Remove("key", fmt.Sprint(i, long)) {
				t.Fatalf("value %d is not there", i)
			}

			if i%50 > 0 && i < values-20 {
				continue
			}

			_, _, live := store.Size()
			// Every store begins with a slab, and that is no part of the list.
			got := inUse() - before - slabSize
			if got > live*4/3+5*size {
				t.Fatalf("a Get each %d Removes: %d bytes keep %d after %d Removes", every, live, got, i+1)
			}
			if most := store.Footprint() + 5*size; got > most {
				t.Fatalf("a Get each %d Removes: %d bytes are counted as %d", every, got, most)
			}
		}

		checkInside(t, store)
		store.Delete("key")
		checkInside(t, store)
	}
}

// Ensure that an entry is found by its whole key only, also at the length from which a length takes
// two bytes.
func TestEntryHasKey(t *testing.T) {
	for _, n := range []int{1, 2, 126, 127, 128, 129, 300} {
		key := strings.Repeat("k", n)
		e := make(entry, entrySize(key, []string{"kk"}, 0))
		writeEntry(e, key, []string{"kk"}, 0)
		for _, other := range []string{key, key[1:], key + "k", key[1:] + "x", "x" + key[1:]} {
			if got := e.hasKey(other); got != (other == key) {
				t.Errorf("the entry of %d bytes: hasKey(%.9q of %d) = %v", n, other, len(other), got)
			}
		}
	}
}

// Ensure that a search compares only values with the same hash, however long and alike the others
// are.
func TestSearchComparesLittle(t *testing.T) {
	const values, size = 100, 10_000
	store, long := NewMemory(), strings.Repeat("v", size)
	for i := range values {
		store.Put("key", fmt.Sprintf("%s%04d%s", long, i, long))
	}

	// The list's values are replaced behind its back, but its hashes are not: if a value were
	// compared, it would be found.
	none := long + "none" + long
	at, _ := store.find("key")
	list := store.ownLong(at.slot).values
	for i := range list {
		list[i] = none
	}

	if store.Has("key", none) || store.Remove("key", none) ||
		store.Update("key", none, "new") || store.Has("other", none) {
		t.Error("a value was compared that has another hash")
	}
	if !store.Has("key", "new") || !store.Update("key", "new", none) || !store.Remove("key", none) {
		t.Error("a value that is there is not found")
	}
}

// Ensure that a hint which is wrong, as behind damage in the log, costs no more than a search.
func TestHintMayBeWrong(t *testing.T) {
	const values = maxShort + 1
	for _, hint := range []int{0, values - 1, values, math.MaxInt32} {
		store := NewMemory()
		for i := range values {
			store.Put("key", fmt.Sprint(i))
		}

		updated, removed := store.UpdateAt("key", "3", "new", hint), store.RemoveAt("key", "4", hint)
		if updated != 3 || removed != 3 {
			t.Errorf("with the hint %d the values at %d and %d went, want 3 and 3", hint, updated, removed)
		}
	}
}

// Ensure that a View with room for its values allocates nothing.
func TestViewAllocatesNothing(t *testing.T) {
	store := NewMemory()
	store.Put("one", "v")
	store.Put("two", "v")
	store.Put("two", "w")
	for i := range 100 {
		store.Put("long", fmt.Sprint(i))
	}

	var scratch [2]string
	for _, key := range []string{"none", "one", "two", "long"} {
		if got := testing.AllocsPerRun(100, func() { store.View(scratch[:], key) }); got != 0 {
			t.Errorf("a View of %s allocates %v times", key, got)
		}
	}
}

// Ensure that the memory of a large value, or of many small ones, is reused for the next, but not
// if somebody may have seen it.
func TestMemoryIsUsedAgain(t *testing.T) {
	for _, size := range []int{1000, ownSize, 4 << 10, 64 << 10, slabSize - 100} {
		store, value, n := NewMemory(), strings.Repeat("v", size), 0
		set := func() {
			n++
			key := fmt.Sprint(n % 10)
			if n%3 == 0 {
				store.Delete(key)
			}
			store.Set(key, value)
		}

		for range 8_000_000 / size {
			set() // until slabs are cleaned
		}

		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		const rounds = 300
		for range rounds {
			set()
		}
		runtime.ReadMemStats(&after)
		if got := int(after.TotalAlloc - before.TotalAlloc); got > rounds*size/10 {
			t.Errorf("%d Sets of %d bytes took %d bytes of new memory", rounds, size, got)
		}

		for i, show := range []func() string{
			func() string { return store.View(nil, "1")[0] },
			func() string { return store.Snapshot().View(nil, "1")[0] },
		} {
			store.Set("1", value)
			got, other := show(), strings.Repeat("w", size)
			for range 100 {
				store.Set("1", other)
				store.Set("2", other)
			}
			if got != value {
				t.Errorf("%d: a value of %d bytes was overwritten: %.100q", i, size, got)
			}
		}
	}
}

// Ensure that no entry is moved out of a slab that a snapshot has, because its dead bytes must stay
// and nothing would be gained, nor out of one with few dead bytes. Once the snapshot has gone,
// entries are moved, but only some of them in one operation.
func TestNothingIsMovedForNothing(t *testing.T) {
	const keys = 100_000
	store, value := NewMemory(), strings.Repeat("v", 100)
	for i := range keys {
		store.Set(fmt.Sprint("key", i), value)
	}

	snapshot := store.Snapshot()
	for i := range keys {
		if i%4 > 0 {
			store.Delete(fmt.Sprint("key", i))
		} else if store.Set(fmt.Sprint("later", i), value); i%80 == 4 {
			store.Delete(fmt.Sprint("later", i))
		}
	}

	places := func() (at [keys / 2]uint64) {
		for i := range keys / 4 {
			found, _ := store.find(fmt.Sprint("key", 4*i))
			later, _ := store.find(fmt.Sprint("later", 4*i))
			at[2*i], at[2*i+1] = found.slot, later.slot
		}
		return at
	}
	moved := func(change func()) (n int) {
		before := places()
		change()
		for i, at := range places() {
			if at != before[i] {
				n++
			}
		}
		return n
	}
	write := func() {
		for i := range 20_000 { // several slabs, in which entries die
			store.Set(fmt.Sprint("new", i%5000), value)
		}
	}

	if n := moved(write); n > 500 { // a few are in a slab with what dies
		t.Errorf("%d entries were moved beside the snapshot", n)
	}
	checkInside(t, store)

	// The store's reference to the snapshot is weak: the collector ends it.
	runtime.KeepAlive(snapshot)
	runtime.GC()
	small := moved(func() { store.Set("small", value) })
	large := moved(func() { store.Set("large", strings.Repeat(value, keys)) })
	if small > 50 || large > 4000 || moved(write) == 0 {
		t.Errorf("one Set moves %d entries, a large one %d, and later ones perhaps none", small, large)
	}
	checkInside(t, store)
}

// Ensure that touching keys changes nothing, however many they are.
func TestTouch(t *testing.T) {
	store := NewMemory()
	var keys []string
	for i := range 150_000 {
		keys = append(keys, fmt.Sprint(i))
		store.Put(keys[i], "value")
	}

	for _, n := range []int{0, 1, touchMost, touchMost + 1, 10 * touchMost} {
		store.Touch(append(slices.Clone(keys[:n]), "none"))
	}

	if !store.TouchPays() || NewMemory().TouchPays() {
		t.Error("a large store is not to be touched, or an empty one is")
	}
	checkInside(t, store)
}

// Ensure that many deadlines take little memory, in whatever order they are set, and that
// NextDue returns keys in the order of their deadlines.
func TestDeadlinesTakeLittle(t *testing.T) {
	const keys = 15_000
	random := rand.New(rand.NewPCG(1, 1))
	for name, at := range map[string]func(i int) int64{
		"one after the other": func(i int) int64 { return int64(1e12) + int64(i) },
		"in any order":        func(int) int64 { return int64(1e12) + random.Int64N(1e9) },
		"all at once":         func(int) int64 { return 1e12 },
	} {
		store := NewMemory()
		for i := range keys {
			store.Put(fmt.Sprint("key", i), "v")
		}

		before := store.Footprint()
		for i := range keys {
			store.Expire(fmt.Sprint("key", i), at(i))
		}
		if got := (store.Footprint() - before) / keys; got > 46 { // and pages that are not full
			t.Errorf("%s: a deadline takes %d bytes", name, got)
		}

		for i := range keys { // nine of ten deadlines go, and leave gaps
			if i%10 > 0 {
				store.Expire(fmt.Sprint("key", i), 0)
			}
		}
		if got := store.deadlines.bytes() / (keys / 10); got > 60 {
			t.Errorf("%s: the end of a key that is left takes %d bytes", name, got)
		}

		last := int64(0)
		for n := 0; n < keys/10; n++ {
			key, ok := store.NextDue(math.MaxInt64)
			at, _ := store.Deadline(key)
			if !ok || at < last {
				t.Fatalf("%s: key %d, %q, %v, ends at %d, and the one before did at %d", name, n, key,
					ok, at, last)
			}
			last = at
			store.Delete(key)
		}

		if key, ok := store.NextDue(math.MaxInt64); ok {
			t.Fatalf("%s: %q is due, and has no deadline", name, key)
		}
		checkInside(t, store)
	}
}

// Ensure that a Take from a long list copies next to nothing, even if readers have the list.
func TestTakeFromALongList(t *testing.T) {
	const values = 50_000
	for _, every := range []int{0, 1} { // Takes, between two Gets
		store := NewMemory()
		for i := range values {
			store.Put("key", fmt.Sprint(i))
		}

		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		for i := range values {
			if every > 0 {
				store.Get("key")
			}
			if got, ok := store.Take("key"); !ok || got != fmt.Sprint(i) {
				t.Fatalf("Take %d = %q, %v", i, got, ok)
			}
		}

		runtime.ReadMemStats(&after)
		if got := (after.TotalAlloc - before.TotalAlloc) / values; got > 200 {
			t.Errorf("a Take copies %d bytes", got)
		}

		if _, ok := store.Take("key"); ok || store.Count("key") != 0 {
			t.Error("more was taken than there was")
		}
	}
}

// sizes are the numbers of keys that benchmarks try: few enough for the processor's caches, and
// more.
var sizes = []int{10_000, 1_000_000, 5_000_000}

// fill returns a store with this many keys of 12 bytes, each with a value of 16 bytes, and the
// keys.
func fill(size int) (store *Memory, keys []string) {
	store, keys = NewMemory(), make([]string, size)
	for i := range keys {
		keys[i] = fmt.Sprintf("key%09d", i)
		store.Put(keys[i], "vvvvvvvvvvvvvvvv")
	}
	return store, keys
}

// BenchmarkMemory measures what a store takes and costs beside its requests, for each
// number of keys: bytes a key when it is full and after five Updates a key, the time of a
// full collection and of a snapshot, the memory that a snapshot takes after a million
// Updates, and the slowest Put while the store grew. The slowest one in a hundred
// thousand is left out, because the machine may have preempted it.
func BenchmarkMemory(b *testing.B) {
	for _, size := range sizes[1:] {
		b.Run(fmt.Sprint("keys=", size), func(b *testing.B) {
			for range b.N {
				measureMemory(b, size)
			}
		})
	}
}

func measureMemory(b *testing.B, size int) {
	random := rand.New(rand.NewPCG(1, 1))
	took := make([]time.Duration, size)
	store := NewMemory()
	key := make([]byte, 0, 12)

	for i := range size {
		key = fmt.Appendf(key[:0], "key%09d", i)
		start := time.Now()
		store.Put(string(key), "vvvvvvvvvvvvvvvv")
		took[i] = time.Since(start)
	}

	slices.Sort(took)
	b.ReportMetric(float64(took[size-1-size/100_000].Microseconds()), "µs/slowest-put")
	took = nil
	b.ReportMetric(float64(store.Footprint())/float64(size), "B/key")

	update := func() {
		key = fmt.Appendf(key[:0], "key%09d", random.IntN(size))
		store.Update(string(key), "vvvvvvvvvvvvvvvv", "vvvvvvvvvvvvvvvv")
	}
	for range 5 * size {
		update()
	}
	b.ReportMetric(float64(store.Footprint())/float64(size), "B/key-updated")

	// The garbage of the updates is no part of what is measured.
	runtime.GC()
	start := time.Now()
	runtime.GC()
	b.ReportMetric(float64(time.Since(start).Microseconds()), "µs/collection")

	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	start = time.Now()
	snapshot := store.Snapshot()
	b.ReportMetric(float64(time.Since(start).Microseconds()), "µs/snapshot")
	for range 1_000_000 {
		update()
	}
	runtime.GC()
	runtime.ReadMemStats(&after)
	b.ReportMetric(100*(float64(after.HeapAlloc)/float64(before.HeapAlloc)-1), "%/snapshot-memory")

	n := 0
	for range snapshot.All() {
		n++
	}
	if n != size {
		b.Errorf("the snapshot has %d keys", n)
	}
	runtime.KeepAlive(store)
}

// BenchmarkSnapshot measures a snapshot of many small values, of many large ones, and of long
// lists.
func BenchmarkSnapshot(b *testing.B) {
	for _, what := range []struct {
		name               string
		keys, values, size int
	}{{"small", 1_000_000, 1, 16}, {"large", 300_000, 1, ownSize + 1}, {"lists", 300_000, 9, 1}} {
		b.Run(what.name, func(b *testing.B) {
			store, value := NewMemory(), strings.Repeat("v", what.size)
			for i := range what.keys * what.values {
				store.Put(fmt.Sprint("key", i%what.keys), value)
			}

			for b.Loop() {
				store.Snapshot()
			}
		})
	}
}

// BenchmarkChain measures a request in a chain of 256 for random keys, which the store was told
// before (Touch) or not.
func BenchmarkChain(b *testing.B) {
	for _, size := range sizes {
		store, keys := fill(size)
		random := rand.New(rand.NewPCG(1, 2))
		for _, touched := range []bool{false, true} {
			b.Run(fmt.Sprintf("keys=%d/touched=%v", size, touched), func(b *testing.B) {
				var chain [256]string
				var scratch [2]string

				for i := 0; b.Loop(); i++ {
					if i%len(chain) == 0 {
						for j := range chain {
							chain[j] = keys[random.IntN(size)]
						}
						if touched {
							store.Touch(chain[:])
						}
					}
					store.View(scratch[:], chain[i%len(chain)])
				}
			})
		}
	}
}

func benchmarkKeys(b *testing.B, do func(store *Memory, key string, i int)) {
	for _, size := range sizes {
		b.Run(fmt.Sprint("keys=", size), func(b *testing.B) {
			store, keys := fill(size)
			rand.New(rand.NewPCG(1, 2)).Shuffle(size,
				func(i, j int) { keys[i], keys[j] = keys[j], keys[i] })

			b.ReportAllocs()
			i := 0
			for b.Loop() {
				do(store, keys[i%size], i/size)
				i++
			}
		})
	}
}

func BenchmarkGet(b *testing.B) {
	var scratch [2]string
	benchmarkKeys(b, func(store *Memory, key string, _ int) { store.View(scratch[:], key) })
}

func BenchmarkUpdate(b *testing.B) {
	values := [2]string{"vvvvvvvvvvvvvvvv", "wwwwwwwwwwwwwwww"}
	benchmarkKeys(b, func(store *Memory, key string, round int) {
		store.Update(key, values[round%2], values[(round+1)%2])
	})
}

// BenchmarkLong measures what a list of this many values costs. An Update costs more if the
// list was read since the last one.
func BenchmarkLong(b *testing.B) {
	for _, size := range []int{1, 100, 10_000, 100_000} {
		store := NewMemory()
		for i := range size {
			store.Put("key", fmt.Sprint(i))
		}

		b.Run(fmt.Sprint("Get/values=", size), func(b *testing.B) {
			for b.Loop() {
				store.Get("key")
			}
		})

		next := size
		update := func(place int) {
			store.Update("key", fmt.Sprint(next-size+place), fmt.Sprint(next))
			next++
		}

		b.Run(fmt.Sprint("UpdateFirst/values=", size), func(b *testing.B) {
			for b.Loop() {
				update(0)
			}
		})
		b.Run(fmt.Sprint("UpdateMiddle/values=", size), func(b *testing.B) {
			for b.Loop() {
				update(size / 2)
			}
		})
		b.Run(fmt.Sprint("GetAndUpdateMiddle/values=", size), func(b *testing.B) {
			for b.Loop() {
				store.Get("key")
				update(size / 2)
			}
		})
	}
}

// Ensure that StoreOf makes a Store of a mere KVStore, and returns a Store as it is.
func TestStoreOf(t *testing.T) {
	memory := NewMemory()
	if got := StoreOf(memory); got != Store(memory) {
		t.Errorf("of a Memory StoreOf makes a %T", got)
	}
	if got := StoreOf(nil); got != nil {
		t.Errorf("of nothing StoreOf makes a %T", got)
	}

	store := StoreOf(struct{ KVStore }{memory})
	store.Put("k", "first")
	store.Put("k", "second")
	if got := store.View(nil, "k"); !slices.Equal(got, []string{"first", "second"}) {
		t.Errorf("View returns %q", got)
	}
	if got := store.Measure("k"); got != int64(len("firstsecond")) {
		t.Errorf("Measure returns %d", got)
	}
	if !store.Has("k", "second") || store.Has("k", "third") || store.Has("none", "") {
		t.Error("Has is wrong about what is there")
	}

	if !store.Expire("k", 1) || store.Expire("none", 1) {
		t.Error("Expire is wrong about what is there")
	}
	if keys, values, bytes := store.Size(); keys >= 0 || values >= 0 || bytes >= 0 {
		t.Errorf("Size claims %d, %d, %d", keys, values, bytes)
	}
	if store.Snapshot() != nil || store.TouchPays() || store.Room("", 1, 0) != nil {
		t.Error("it does what it cannot do")
	}
}
