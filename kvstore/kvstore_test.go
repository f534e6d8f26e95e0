package kvstore

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"unsafe"
)

// model is what every store must do, in as few words as possible.
type model map[string][]string

func (m model) Put(key, value string)   { m[key] = append(m[key], value) }
func (m model) Get(key string) []string { return m[key] }
func (m model) Delete(key string) int {
	n := len(m[key])
	delete(m, key)
	return n
}
func (m model) Update(key, oldValue, newValue string) bool {
	i := slices.Index(m[key], oldValue)
	if i >= 0 {
		m[key] = slices.Delete(slices.Clone(m[key]), i, i+1)
	}
	m.Put(key, newValue)
	return i >= 0
}

// size is what Size must return.
func (m model) size() (keys, values int, bytes int64) {
	for key, list := range m {
		keys++
		values += len(list)
		bytes += int64(len(key) + len(strings.Join(list, "")))
	}
	return keys, values, bytes
}

// randomStep does one random thing to store and to m, and reports where they
// differ.
func randomStep(t *testing.T, random *rand.Rand, store KVStore, m model) {
	t.Helper()
	key := fmt.Sprint("key", random.IntN(20))
	value := strings.Repeat(string(rune('a'+random.IntN(3))), random.IntN(4))
	switch random.IntN(10) {
	case 0, 1, 2:
		store.Put(key, value)
		m.Put(key, value)
	case 3:
		if got, want := store.Delete(key), m.Delete(key); got != want {
			t.Fatalf("Delete(%q) = %d, want %d", key, got, want)
		}
	case 4, 5, 6, 7:
		other := strings.Repeat(string(rune('a'+random.IntN(3))), random.IntN(4))
		if got, want := store.Update(key, value, other), m.Update(key, value, other); got != want {
			t.Fatalf("Update(%q, %q, %q) = %v, want %v", key, value, other, got, want)
		}
	default:
		if got, want := store.Get(key), m.Get(key); !slices.Equal(got, want) {
			t.Fatalf("Get(%q) = %q, want %q", key, got, want)
		}
	}
}

// checkSame reports where all of store differs from m.
func checkSame(t *testing.T, store interface {
	Sizer
	Lister
}, m model) {
	t.Helper()
	if got := maps.Collect(store.All()); !maps.EqualFunc(got, m, slices.Equal[[]string]) {
		t.Fatalf("All yields %q, want %q", got, m)
	}
	keys, values, bytes := store.Size()
	if k, v, b := m.size(); keys != k || values != v || bytes != b {
		t.Fatalf("Size() = %d, %d, %d, want %d, %d, %d", keys, values, bytes, k, v, b)
	}
}

// Ensure that the store does what the model does, and that no list it has handed
// out ever changes.
func TestMemoryIsLikeTheModel(t *testing.T) {
	for seed := range uint64(20) {
		random := rand.New(rand.NewPCG(seed, 0))
		store, m := NewMemory(), model{}
		type kept struct{ list, copy []string }
		var all []kept
		for range 2000 {
			randomStep(t, random, store, m)
			switch random.IntN(20) {
			case 0:
				for _, list := range store.All() {
					all = append(all, kept{list, slices.Clone(list)})
				}
			case 1, 2, 3, 4, 5, 6, 7:
				list := store.Get(fmt.Sprint("key", random.IntN(20)))
				all = append(all, kept{list, slices.Clone(list)})
			}
		}
		if err := store.Commit(); err != nil {
			t.Fatal(err)
		}
		checkSame(t, store, m)
		for _, k := range all {
			if !slices.Equal(k.list, k.copy) {
				t.Fatalf("a list that was %q became %q", k.copy, k.list)
			}
			if cap(k.list) > len(k.list) {
				t.Fatalf("a list of %d leaves room to append to", len(k.list))
			}
		}
	}
}

// Ensure that All stops when it is told to.
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
}

// Ensure that nothing kept is a substring of what the caller passed: that would
// pin a whole read buffer.
func TestMemoryClones(t *testing.T) {
	burst := strings.Repeat("key:value:other:", 10)
	key, value, other := burst[:3], burst[4:9], burst[10:15]
	inside := func(s string) bool {
		at := uintptr(unsafe.Pointer(unsafe.StringData(s)))
		start := uintptr(unsafe.Pointer(unsafe.StringData(burst)))
		return at >= start && at < start+uintptr(len(burst))
	}
	steps := []struct {
		name string
		do   func(m *Memory)
	}{
		{"Put", func(m *Memory) { m.Put(key, value) }},
		{"Update of one", func(m *Memory) { m.Update(key, value, other) }},
		{"second Put", func(m *Memory) { m.Put(key, value) }},
		{"third Put", func(m *Memory) { m.Put(key, value) }},
		{"Update of the first", func(m *Memory) { m.Update(key, other, value) }},
		{"Update of a later one", func(m *Memory) { m.Update(key, value, other); m.Update(key, other, value) }},
		{"Update without old", func(m *Memory) { m.Update(key, "none", other) }},
		{"Delete and Update", func(m *Memory) { m.Delete(key); m.Update(key, value, other) }},
	}
	m := NewMemory()
	for _, s := range steps {
		s.do(m)
		for k, list := range m.All() {
			if inside(k) || slices.ContainsFunc(list, inside) {
				t.Errorf("after %s the caller's memory is kept", s.name)
			}
		}
	}
}

// sizes are the numbers of keys that benchmarks try: in the caches, and not.
var sizes = []int{10_000, 1_000_000}

func benchmarkKeys(b *testing.B, do func(store *Memory, key string, i int)) {
	for _, size := range sizes {
		b.Run(fmt.Sprint("keys=", size), func(b *testing.B) {
			store := NewMemory()
			keys := make([]string, size)
			for i := range keys {
				keys[i] = fmt.Sprintf("key%09d", i)
				store.Put(keys[i], "vvvvvvvvvvvvvvvv")
			}
			rand.New(rand.NewPCG(1, 2)).Shuffle(size, func(i, j int) { keys[i], keys[j] = keys[j], keys[i] })
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
	benchmarkKeys(b, func(store *Memory, key string, _ int) { store.Get(key) })
}

func BenchmarkUpdate(b *testing.B) {
	values := [2]string{"vvvvvvvvvvvvvvvv", "wwwwwwwwwwwwwwww"}
	benchmarkKeys(b, func(store *Memory, key string, round int) {
		store.Update(key, values[round%2], values[(round+1)%2])
	})
}

// BenchmarkLong is what a list of so many values costs: an Update more where the
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
