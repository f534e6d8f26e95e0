package durable

import (
	"errors"
	"math/rand/v2"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"kvserver/kvstore"
	"kvserver/kvstore/storage"
	"kvserver/kvstore/storetest"
)

// fullDir returns a directory in which, as in a cluster, no room is made ahead. Once isFull is set the
// next write fails for lack of room. (Later ones do not: a reload writes what is there already, which
// needs no room in a cluster.)
func fullDir() (dir *storetest.Dir, isFull *atomic.Bool) {
	dir, isFull = storetest.New(), new(atomic.Bool)
	dir.Reserve, dir.Segment, dir.Compact = 0, 4000, 4000
	dir.Before = func(call storetest.Call) error {
		if call.What == "write" && isFull.CompareAndSwap(true, false) {
			return syscall.ENOSPC
		}
		return nil
	}
	return dir, isFull
}

// Ensure that a Commit for which a cluster has no room undoes all that was done since the Commit
// before, and nothing else, in memory as well as in the log.
func TestCommitIsTakenBack(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 1))
	dir, isFull := fullDir()
	h := storetest.NewHistory()
	d, err := Open(t.Context(), dir, Options{})
	if err != nil {
		t.Fatal(err)
	}
	taken := 0
	for n := range 3000 {
		for range random.IntN(5) {
			storetest.RandomStep(t, random, d, h.Done)
		}
		if random.IntN(20) == 0 { // a frame that is written before the Commit
			value := strings.Repeat("x", 5000)
			d.Set("large", value)
			h.Done.Set("large", value)
		}
		isFull.Store(random.IntN(3) == 0)
		err := d.Commit()
		isFull.Store(false)
		switch {
		case errors.Is(err, kvstore.ErrTakenBack):
			h.Done = h.Told.Clone()
			taken++
		case err != nil:
			t.Fatal(err)
		}
		if h.Told = h.Done.Clone(); !h.Told.Equal(d) {
			t.Fatalf("after Commit number %d, %v, there is not what there should be", n, err)
		}
		d.AwaitCompaction()
	}
	if taken < 500 {
		t.Errorf("only %d Commits are taken back", taken)
	}

	again, err := Open(t.Context(), dir.Kill(), Options{})
	if err != nil {
		t.Fatal(err)
	}
	if !h.Told.Equal(again) {
		t.Error("after kill -9 there is not what there should be")
	}
	again.Close()
	d.Close()
}

// Ensure that a store is closed in order although there is no room for what nobody was told of.
func TestCloseTakesBack(t *testing.T) {
	dir, isFull := fullDir()
	d, err := Open(t.Context(), dir, Options{})
	if err != nil {
		t.Fatal(err)
	}
	d.Put("k", "v")
	isFull.Store(true)
	if err := d.Close(); err != nil {
		t.Errorf("Close: %v", err)
	}
	d, err = Open(t.Context(), dir, Options{})
	if err != nil {
		t.Fatal(err)
	}
	if d.Count("k") != 0 {
		t.Error("there is what there was no room for")
	}
	d.Close()
}

// Ensure that a Commit that has made all durable says so, although there is no room for the new file
// that is due then.
func TestCommitBeforeAFullRotation(t *testing.T) {
	ends, isReached := map[int]int{}, true
	for n := 1; isReached; n++ {
		dir, isFull := fullDir()
		d, err := Open(t.Context(), dir, Options{})
		if err != nil {
			t.Fatal(err)
		}
		calls := 0
		before := dir.Before
		dir.Before = func(call storetest.Call) error {
			if calls++; calls == n {
				isFull.Store(true)
			}
			return before(call)
		}
		d.Put("k", strings.Repeat("x", 3900))
		d.Put("k", strings.Repeat("y", 3900))
		d.Put("k", "z")
		err = d.Commit()
		want := 3
		if errors.Is(err, kvstore.ErrTakenBack) {
			want = 0
		} else if err != nil {
			t.Fatalf("call %d: %v", n, err)
		}
		isReached = calls >= n
		ends[want]++
		if got := d.Count("k"); got != want {
			t.Errorf("call %d: after %v there are %d values", n, err, got)
		}
		again, err := Open(t.Context(), dir.Kill(), Options{})
		if err != nil {
			t.Fatal(err)
		}
		if got := again.Count("k"); got != want {
			t.Errorf("call %d: after kill -9 there are %d values, want %d", n, got, want)
		}
		again.Close()
		isFull.Store(false)
		if err := d.Close(); err != nil {
			t.Errorf("call %d: Close: %v", n, err)
		}
	}
	if ends[0] == 0 || ends[3] < 3 {
		t.Errorf("by the number of values that stay, there were so many Commits: %v", ends)
	}
}

// Ensure that nothing is lost if there is no room while all data is written again, whichever call finds
// that.
func TestHealWithoutRoom(t *testing.T) {
	for n, isReached := 1, true; isReached; n++ {
		dir, isFull := fullDir()
		d, err := Open(t.Context(), dir, Options{})
		if err != nil {
			t.Fatal(err)
		}
		d.Put("k", "v")
		if err := d.Commit(); err != nil {
			t.Fatal(err)
		}

		// What is tried again later has room.
		dir.Remove("seg-1.log")
		calls, before := 0, dir.Before
		dir.Before = func(call storetest.Call) error {
			if calls++; calls == n {
				isFull.Store(true)
			}
			return before(call)
		}
		for range 2 {
			d.lookAfter = time.Time{}
			if err := d.Commit(); err != nil {
				t.Errorf("call %d: %v", n, err)
			}
		}
		isReached = calls >= n
		if got := d.Get("k"); len(got) != 1 {
			t.Errorf("call %d: memory has %q", n, got)
		}
		again, err := Open(t.Context(), dir.Kill(), Options{})
		if err != nil {
			t.Fatalf("call %d: %v", n, err)
		}
		if got := again.Get("k"); len(got) != 1 {
			t.Errorf("call %d: after kill -9 there is %q", n, got)
		}
		again.Close()
		isFull.Store(false)
		d.Close()
	}
}

// Ensure that a log that has become shorter does not take the place of memory, and that the error says
// if another process has the directory by then.
func TestReloadOfAShorterLog(t *testing.T) {
	for _, moved := range []error{nil, storage.ErrMoved} {
		dir, isFull := fullDir()
		d, err := Open(t.Context(), dir, Options{})
		if err != nil {
			t.Fatal(err)
		}
		d.Put("k", "v")
		if err := d.Commit(); err != nil {
			t.Fatal(err)
		}
		before := dir.Before
		dir.Before = func(call storetest.Call) error {
			if call.What == "open" && call.Name == "seg-1.log" {
				data, _ := dir.Read("seg-1.log")
				dir.Replace("seg-1.log", data[:headerSize])
				dir.Moved = moved
			}
			return before(call)
		}
		d.Put("k", "w")
		isFull.Store(true)
		err = d.Commit()
		var damage *storage.DamageError
		if moved == nil && !errors.As(err, &damage) || !errors.Is(err, moved) && moved != nil {
			t.Errorf("Commit: %v", err)
		}
		if got := d.Get("k"); len(got) != 2 {
			t.Errorf("memory has %q", got)
		}
		d.Close()
	}
}

// Ensure that nobody hears of it if there is no room for the timer's frame.
func TestTimerWithoutRoom(t *testing.T) {
	for _, what := range []string{"later", "meanwhile"} {
		synctest.Test(t, func(t *testing.T) {
			dir, isFull := fullDir()
			d, err := Open(t.Context(), dir, Options{})
			if err != nil {
				t.Fatal(err)
			}
			before := dir.Before
			dir.Before = func(call storetest.Call) error {
				if call.What == "truncate" {
					<-time.After(time.Second)
				}
				return before(call)
			}
			d.Put("k", "v")
			if err := d.Commit(); err != nil {
				t.Fatal(err)
			}
			isFull.Store(true)
			<-time.After(vouchTime + time.Second/2)
			if isFull.Load() {
				t.Error("the timer has written nothing")
			}
			if what == "later" {
				<-time.After(time.Second)
				d.Put("k", "w")
			}
			want := d.Get("k")
			if err := d.Commit(); err != nil {
				t.Errorf("%s: Commit: %v", what, err)
			}
			again, err := Open(t.Context(), dir.Kill(), Options{})
			if err != nil {
				t.Fatal(err)
			}
			if got := again.Get("k"); !slices.Equal(got, want) {
				t.Errorf("%s: after kill -9 there is %q, want %q", what, got, want)
			}
			again.Close()
			d.Close()
		})
	}
}

// Ensure that no frame of a Commit that is yet to come is written while the timer syncs: it could be
// synced together with the timer's frame, and without the rest of its Commit.
func TestTimerSyncsNoEarlyFrame(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir := storetest.New()
		dir.Reserve = 0
		var isSlow atomic.Bool
		syncs := 0
		dir.Before = func(call storetest.Call) error {
			if call.What == "sync" && isSlow.Load() {
				syncs++
				<-time.After(time.Second)
			}
			return nil
		}
		d, err := Open(t.Context(), dir, Options{})
		if err != nil {
			t.Fatal(err)
		}
		d.Put("k", "v")
		if err := d.Commit(); err != nil {
			t.Fatal(err)
		}
		isSlow.Store(true)
		<-time.After(vouchTime + time.Second/2)
		began := time.Now()
		d.Put("large", strings.Repeat("x", 2*maxFramePut))
		if took := time.Since(began); took != time.Second/2 || syncs != 1 {
			t.Errorf("the Put returns after %v, and there were %d syncs", took, syncs)
		}

		// Nor does the timer sync such a frame.
		<-time.After(3 * vouchTime)
		if syncs != 1 {
			t.Errorf("then there were %d syncs", syncs)
		}
		isSlow.Store(false)
		d.Close()
	})
}
