package storetest

import (
	"context"
	"errors"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"kvserver/kvstore/storage"
)

// leaves returns the different results of look after 200 power failures, in order.
func leaves(d *Dir, look func(after *Dir) string) (seen []string) {
	for seed := range uint64(200) {
		what := look(d.Crash(rand.New(rand.NewPCG(seed, 1))))
		if !slices.Contains(seen, what) {
			seen = append(seen, what)
		}
	}
	slices.Sort(seen)
	return seen
}

// Ensure that data which is written while a Sync lasts is not part of it, also if it is in the same
// sector, and also if another Sync ends before that one.
func TestSyncIsOfWhatWasThere(t *testing.T) {
	for _, nested := range []bool{false, true} {
		d := New()
		f, _ := d.Create("file")
		d.Sync()
		f.WriteAt([]byte("old"), 0)

		d.Before = func(c Call) error {
			if c.What == "sync" {
				d.Before = nil
				f.WriteAt([]byte("new"), 0)
				f.WriteAt([]byte("more"), 3)
				if nested {
					f.Sync()
				}
			}
			return nil
		}

		ended := false
		d.After = func(c Call) { ended = ended || c.Name == "file" }
		if err := f.Sync(); err != nil || !ended {
			t.Fatalf("%v, and After was called: %v", err, ended)
		}

		got := leaves(d, func(after *Dir) string { return string(after.Names["file"].Data) })
		if nested && !slices.Equal(got, []string{"newmore"}) {
			t.Errorf("beside a later Sync it leaves %q", got)
		}
		if !nested && (!slices.Contains(got, "old") || !slices.Contains(got, "newmore")) {
			t.Errorf("of what was written beside the Sync it leaves %q", got)
		}
	}
}

// Ensure that a power failure may leave changes of names in any order, except that changes of one
// name keep theirs; that this holds after a kill as well; and that a Sync makes them all durable.
func TestOrderOfNames(t *testing.T) {
	d := New()
	d.Create("old")
	d.Sync()

	d.Create("tmp")
	d.Rename("tmp", "new")
	d.Remove("old")

	look := func(after *Dir) string {
		return strings.Join(slices.Sorted(maps.Keys(after.Names)), "")
	}
	want := []string{"", "new", "newold", "old", "oldtmp", "tmp"}
	for what, d := range map[string]*Dir{"running": d, "killed": d.Kill()} {
		if got := leaves(d, look); !slices.Equal(got, want) {
			t.Errorf("%s: a power failure leaves %q, want %q", what, got, want)
		}

		d.Sync()
		if got := leaves(d, look); !slices.Equal(got, []string{"new"}) {
			t.Errorf("%s: after a Sync a power failure leaves %q", what, got)
		}
	}
}

// Ensure that the lock can be held only once at a time.
func TestLockedTwice(t *testing.T) {
	d := New()
	lock, err := d.Lock(context.Background())
	if err != nil {
		t.Fatal(err)
	}

	second, err := d.Lock(context.Background())
	if second != nil || !errors.Is(err, storage.ErrLocked) {
		t.Errorf("a second lock: %v, %v", second, err)
	}

	lock.Close()
	_, err = d.Lock(context.Background())
	if err != nil {
		t.Errorf("after a Close: %v", err)
	}
}
