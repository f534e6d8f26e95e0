package kvstore_test

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"kvserver/kvstore"
	"kvserver/kvstore/storetest"
)

func init() { kvstore.Fewer = storetest.Fewer }

// Ensure that a Memory does what every store must do, and that a Store made of a mere KVStore does
// so, too.
func TestMemoryIsAStore(t *testing.T) {
	storetest.TestStore(t, func() kvstore.Store { return kvstore.NewMemory() })
}

func TestPlainIsAStore(t *testing.T) {
	storetest.TestStore(t, func() kvstore.Store {
		return kvstore.StoreOf(struct{ kvstore.KVStore }{kvstore.NewMemory()})
	})
}

// Ensure that a store with many keys, and with large and small lists, does what the model does
// while it grows and shrinks, that its dead memory is bounded, and that neither a snapshot nor what
// View returned ever changes.
func TestMemoryInside(t *testing.T) {
	random := rand.New(rand.NewPCG(3, 3))
	store, m := kvstore.NewMemory(), storetest.NewModel()

	value := func() string {
		size := random.IntN(20)
		switch what := random.IntN(100); {
		case what < 50:
			size = random.IntN(kvstore.ViewMost * 3 / 2)
		case what < 55:
			size = random.IntN(500)
		}
		if random.IntN(10_000) == 0 {
			size = 1<<18 + random.IntN(1<<18) // too large for a slab
		}
		return strings.Repeat(string(rune('a'+random.IntN(3))), size)
	}

	type kept struct {
		snapshot kvstore.Snapshot
		held     storetest.Model
	}
	var snapshots []kept
	type shown struct{ got, want []string }
	var views []shown

	steps := kvstore.MemorySteps(t, 1)
	for i := range steps {
		many := 20_000
		if i/(steps/10)%2 == 1 {
			many = 500 // so most keys are deleted
		}

		x := storetest.Step{Key: fmt.Sprint(random.IntN(20_000)), Value: value(), Other: value(),
			At: int64(i + random.IntN(steps/5))}
		if random.IntN(50) == 0 {
			x.Key = strings.Repeat(x.Key, 40)
		}
		if list := m.Get(x.Key); len(list) > 0 && random.IntN(3) > 0 {
			x.Value = list[random.IntN(len(list))]
		}

		// While there are too many keys, most steps delete one.
		keys, _, _ := store.Size()
		switch what := random.IntN(17); {
		case keys > many && what < 10, what == 0:
			x.Op = "Delete"
		case what < 4:
			x.Op, x.Value = "Put", x.Other
		case what < 8:
			x.Op = "Update"
		case what < 10:
			x.Op = "look"
		case what < 15:
			x.Op = []string{"Set", "Remove", "Take", "Expire", "PutUntil"}[what-10]
		case what == 15:
			x.Op, x.At = "Expire", 0
		case i%10 == 0:
			x.Op, x.At = "NextDue", int64(i)
		default:
			x.Op = "Deadline"
		}

		x.Do(t, store, m)

		// Now and then keys that are due are deleted. Snapshots and views are kept for a while.
		if random.IntN(2000) == 0 {
			for random.IntN(10) > 0 {
				if key, ok := store.NextDue(int64(i)); ok {
					storetest.Step{Op: "Delete", Key: key}.Do(t, store, m)
				}
			}
		}

		if random.IntN(2) == 0 {
			views = append(views, shown{store.View(nil, x.Key), slices.Clone(m.Get(x.Key))})
		}
		if random.IntN(steps/20) == 0 {
			snapshots = append(snapshots, kept{store.Snapshot(), m.Clone()})
			snapshots = snapshots[max(0, len(snapshots)-3):]
		}
		if i%(steps/10) > 0 {
			continue
		}

		kvstore.CheckInside(t, store)
		storetest.CheckSame(t, store, m)
		for _, k := range snapshots {
			storetest.CheckSnapshot(t, k.snapshot, k.held)
		}
		for _, v := range views {
			if !slices.Equal(v.got, v.want) {
				t.Fatalf("what View returned, %.100q, has become %.100q", v.want, v.got)
			}
		}
		views = nil
	}

	for key := range m.Clone().All() {
		store.Delete(key)
	}
	kvstore.CheckEmptied(t, store)
}

// Ensure that Take, Count and deadlines are as in the model, on short lists, long lists and large
// values, and that snapshots have deadlines.
func TestDeadlinesAreLikeTheModel(t *testing.T) {
	for seed := 0; seed < 8; seed = storetest.Next(seed, 3) {
		random := rand.New(rand.NewPCG(uint64(seed), 0))
		var script []byte
		for range 3000 {
			what := byte(random.IntN(11))
			if what == 5 && random.IntN(20) > 0 {
				continue
			}
			script = append(script, what, byte(random.IntN(30)), byte(random.IntN(256)))
		}
		play(t, script)
	}
}

// FuzzMemory plays a script of bytes to a store and to the model.
func FuzzMemory(f *testing.F) {
	f.Add([]byte("put a lot, \x00\x01\x02\x03, and delete it"))
	f.Add([]byte("\x00kv\x09k1\x05--\x00kw\x08k-\x0a-9"))
	f.Fuzz(play)
}

// play plays a script of bytes to a store and to the model, and reports where they differ.
func play(t *testing.T, script []byte) {
	store, m := kvstore.NewMemory(), storetest.NewModel()
	var snapshots []kvstore.Snapshot
	var held []storetest.Model

	for ; len(script) >= 3; script = script[3:] {
		what, key, size := script[0]%11, strings.Repeat("k", int(script[1])), int(script[2])
		x := storetest.Step{Key: key, Value: strings.Repeat("v", len(key)), At: int64(size)}
		if what&1 == 1 {
			size *= size
		}
		x.Other = strings.Repeat("v", size)

		switch what {
		case 2, 3:
			x.Op = "Update"
		case 5:
			snapshots, held = append(snapshots, store.Snapshot()), append(held, m.Clone())
			continue
		case 10:
			if due, ok := store.NextDue(x.At); ok {
				x.Op, x.Key = "Delete", due
				break
			}
			x.Op = "NextDue"
		default:
			x.Op = map[byte]string{0: "Put", 1: "Put", 4: "Delete", 6: "Set", 7: "Remove", 8: "Take",
				9: "Expire"}[what]
			x.Value = x.Other
		}

		x.Do(t, store, m)
	}

	storetest.CheckSame(t, store, m)
	kvstore.CheckInside(t, store)
	for i, s := range snapshots {
		storetest.CheckSnapshot(t, s, held[i])
	}
}
