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

// Ensure that a Commit that is taken back waits for a compaction, which changes the files that are to be
// read again, and that what the compaction has done is not forgotten.
func TestTakenBackBesideCompaction(t *testing.T) {
	for _, what := range []string{"rename snap-2.log.tmp", "remove seg-1.log"} {
		synctest.Test(t, func(t *testing.T) {
			dir, isFull := fullDir()
			h := storetest.NewHistory()
			d, err := Open(t.Context(), dir, Options{})
			if err != nil {
				t.Fatal(err)
			}
			var isRefused atomic.Bool
			before := dir.Before
			dir.Before = func(call storetest.Call) error {
				switch {
				case call.What+" "+call.Name == what:
					<-time.After(time.Second)
				case call.What == "open" && call.Name != storage.StoreName && isRefused.Load():
					<-time.After(2 * time.Second) // while the log is read, the compaction could end
				}
				err := before(call)
				isRefused.Store(isRefused.Load() || err != nil)
				return err
			}
			for range 3 { // then it is time for a compaction
				d.Set("k", strings.Repeat("x", 5000))
				h.Done.Set("k", strings.Repeat("x", 5000))
				if err := d.Commit(); err != nil {
					t.Fatal(err)
				}
			}
			<-time.After(time.Second / 2) // the compaction waits for its call by now
			if d.compacted == nil {
				t.Fatal("there is no compaction")
			}
			isFull.Store(true)
			d.Put("k", "w")
			if err := d.Commit(); !errors.Is(err, kvstore.ErrTakenBack) || !h.Done.Equal(d) {
				t.Errorf("%s: Commit: %v", what, err)
			}
			d.AwaitCompaction()
			if c, err := d.changed(); err != nil || len(c.spoiled)+len(c.leftovers) > 0 {
				t.Errorf("%s: files are not as the store knows them: %v, %v", what, c, err)
			}
			if err := d.Close(); err != nil {
				t.Errorf("%s: Close: %v", what, err)
			}
		})
	}
}

// Ensure that bytes that were taken back do not count as waste: reads go on in the same file.
func TestTakenBackIsNoWaste(t *testing.T) {
	dir, isFull := fullDir()
	d, err := Open(t.Context(), dir, Options{})
	if err != nil {
		t.Fatal(err)
	}
	d.Put("k", "v")
	if err := d.Commit(); err != nil {
		t.Fatal(err)
	}
	isFull.Store(true)
	d.Put("k", strings.Repeat("x", 1<<20))
	if err := d.Commit(); !errors.Is(err, kvstore.ErrTakenBack) {
		t.Errorf("Commit: %v", err)
	}
	number := d.number()
	if err := d.Commit(); err != nil || d.number() != number {
		t.Errorf("a read goes on in file %d: %v", d.number(), err)
	}
	d.Close()
}

// Ensure that a Commit is not only taken back if another process has the directory by then, and that
// the status says that the log is read only while it is.
func TestTakenBackTooLate(t *testing.T) {
	for _, moved := range []error{nil, storage.ErrMoved} {
		synctest.Test(t, func(t *testing.T) {
			dir, isFull := fullDir()
			status := new(storage.Status)
			d, err := Open(t.Context(), dir, Options{Status: status})
			if err != nil {
				t.Fatal(err)
			}
			d.Put("k", strings.Repeat("x", 5000)) // the first of two files
			if err := d.Commit(); err != nil {
				t.Fatal(err)
			}
			d.AwaitCompaction()
			before := dir.Before
			dir.Before = func(call storetest.Call) error {
				if call.What == "read" {
					<-time.After(progressTime)
					dir.Moved = moved
				}
				return before(call)
			}
			d.Put("k", "v")
			isFull.Store(true)
			err = d.Commit()
			if errors.Is(err, kvstore.ErrTakenBack) != (moved == nil) || !errors.Is(err, moved) && moved != nil {
				t.Errorf("Commit: %v", err)
			}
			if status.Stage() != "" {
				t.Errorf("the status stays %q", status.Stage())
			}
			d.Close()
		})
	}
}

// Ensure that if there is no room for the frame that says that another file follows, nobody waits,
// whatever Options.Fsync says, and a new file is tried only once in a while.
func TestNoRoomForTheNextFile(t *testing.T) {
	for _, fsync := range []time.Duration{FsyncAlways, time.Second} {
		synctest.Test(t, func(t *testing.T) {
			dir, _ := fullDir()
			d, err := Open(t.Context(), dir, Options{Fsync: fsync})
			if err != nil {
				t.Fatal(err)
			}
			creates, isFull := 0, false
			dir.Before = func(call storetest.Call) error {
				switch {
				case call.What == "create":
					creates++
					isFull = true // until the first file is synced once more, with this frame
				case call.What == "sync" && call.Name == "seg-1.log" && isFull:
					isFull = false
					return syscall.ENOSPC
				}
				return nil
			}
			d.Put("k", strings.Repeat("x", 5000))
			began := time.Now()
			for range 3 {
				if err := d.Commit(); err != nil {
					t.Errorf("%v: Commit: %v", fsync, err)
				}
				d.Put("k", "y")
			}
			if took := time.Since(began); took > 0 || creates != 1 {
				t.Errorf("%v: it takes %v, and a file is tried %d times", fsync, took, creates)
			}
			d.Close()
		})
	}
}

// Ensure that a start that cannot cut a torn end off leaves no open file.
func TestTornEndStays(t *testing.T) {
	dir, _ := fullDir()
	d, err := Open(t.Context(), dir, Options{})
	if err != nil {
		t.Fatal(err)
	}
	d.Put("k", "v")
	if err := d.Commit(); err != nil {
		t.Fatal(err)
	}
	after := dir.Kill()
	data, _ := after.Read("seg-1.log")
	after.Replace("seg-1.log", append(data, "torn"...))
	after.Before = func(call storetest.Call) error {
		if call.What == "truncate" {
			return syscall.EIO
		}
		return nil
	}
	_, err = Open(t.Context(), after, Options{})
	if !errors.Is(err, syscall.EIO) || after.Handles != 0 {
		t.Errorf("%d files stay open: %v", after.Handles, err)
	}
	d.Close()
}

// Ensure that the timer, when it stands still for a moment between its fsync and its end, syncs no frame
// that the owner has written early: such a frame could not be taken back any more.
func TestTimerThatStandsStillSyncsNoEarlyFrame(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir := storetest.New()
		dir.Reserve = 0
		var isSlow, isFull atomic.Bool
		dir.Before = func(call storetest.Call) error {
			if call.What == "sync" && isSlow.Load() {
				<-time.After(time.Second)
			}
			if call.What == "write" && isFull.CompareAndSwap(true, false) {
				return syscall.ENOSPC
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
		<-time.After(vouchTime + time.Second/2) // now the timer syncs its frame

		// The timer's goroutine stands still behind that fsync, as if it had lost its processor: here it
		// waits for fsyncs.
		stands := make(chan bool)
		go func() {
			d.fsyncs <- struct{}{}
			<-stands
			<-d.fsyncs
		}()
		synctest.Wait()
		d.Put("large", strings.Repeat("x", 2*maxFramePut)) // a frame that is written early
		close(stands)
		synctest.Wait()
		isSlow.Store(false)
		<-time.After(2 * time.Second)

		isFull.Store(true)
		d.Put("k", "w")
		if err := d.Commit(); !errors.Is(err, kvstore.ErrTakenBack) {
			t.Fatalf("Commit: %v", err)
		}
		if d.Count("large") != 0 {
			t.Error("memory has what was refused")
		}
		again, err := Open(t.Context(), dir.Kill(), Options{})
		if err != nil {
			t.Fatal(err)
		}
		if again.Count("large") != 0 {
			t.Error("after kill -9 there is what was refused")
		}
		again.Close()
		d.Close()
	})
}
