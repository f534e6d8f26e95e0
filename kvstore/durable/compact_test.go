package durable

import (
	"bytes"
	"errors"
	"fmt"
	"kvserver/kvstore/storage"
	"kvserver/kvstore/storetest"
	"log/slog"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

// Ensure that a compaction that fails anywhere, or is stopped, loses nothing, leaves no
// temporary file, and is logged.
func TestCompactionMayFail(t *testing.T) {
	dir, d := newSmall(t, Options{})
	d.minCompact = 1 << 30
	h := storetest.NewHistory()
	storetest.Script(t, d, h)
	for i := range 3 { // so that the snapshot has several frames
		storetest.Step{Op: "Put", Key: fmt.Sprint("large", i),
			Value: strings.Repeat("v", maxFrameSnapshot)}.Do(t, d, h.Done)
	}
	if err := d.Commit(); err != nil {
		t.Fatal(err)
	}
	h.Told = h.Done.Clone()
	dir.Locked = false
	if _, err := d.rotate(); err != nil {
		t.Fatal(err)
	}

	c := d.newCompaction()
	stop := make(chan struct{})
	close(stop)
	c.dir, c.stop = dir.With(storage.LockName, nil), stop
	if c.run(); c.err != errStopped {
		t.Errorf("stopped, a compaction ends with %v", c.err)
	}

	c.stop = nil
	for n, failed := 1, true; failed; n++ {
		failing := dir.With(storage.LockName, nil)
		failing.FailAt = n
		c.dir = failing
		c.run()
		failed = failing.Calls >= n
		failing.FailAt = 0

		if failed && !errors.Is(c.err, storetest.ErrDisk) && c.err != nil {
			t.Fatalf("call %d: %v", n, c.err)
		}
		for name := range failing.Names { // perhaps the disk is full
			if strings.HasPrefix(name, "snap") && strings.HasSuffix(name, tmpSuffix) {
				t.Fatalf("call %d failed: %s is left", n, name)
			}
		}
		checkKept(t, h, failing, fmt.Sprint("compaction whose call failed: ", n))
	}

	var log bytes.Buffer
	d.log = slog.New(slog.NewTextHandler(&log, nil))
	d.noteCompaction(&compaction{err: storetest.ErrDisk})
	if !strings.Contains(log.String(), "cannot compact the log") {
		t.Errorf("the log says %q", log.String())
	}
}

// Ensure that a compaction that fails is tried again once a minute, and that the log goes on
// meanwhile.
func TestFailedCompactionWaits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir := storetest.New()
		var tries atomic.Int64
		dir.Before = func(c storetest.Call) error {
			if c.What != "create" || !strings.HasPrefix(c.Name, "snap") {
				return nil
			}
			tries.Add(1)
			return storetest.ErrDisk
		}

		d, err := openSmall(dir, Options{Fsync: FsyncNever})
		if err != nil {
			t.Fatal(err)
		}

		const minutes = 5
		for range minutes * 60 {
			for range 3 {
				d.Put("key", strings.Repeat("v", 300))
				d.Delete("key")
				if err := d.Commit(); err != nil {
					t.Fatal(err)
				}
				d.AwaitCompaction()
			}
			<-time.After(time.Second)
		}

		if got := tries.Load(); got < minutes || got > minutes+1 {
			t.Errorf("in %d minutes it was tried %d times", minutes, got)
		}
		d.Close()
	})
}

// Ensure that a snapshot is roughly as large as liveBytes says, also with long keys, which it has
// twice if they have deadlines.
func TestLiveBytes(t *testing.T) {
	for _, length := range []int{10, 500} {
		for _, every := range []int{1, 3, 1000} { // of so many keys one has a deadline
			_, d := newSmall(t, Options{Fsync: FsyncNever})
			for i := range 900 {
				key := fmt.Sprintf("%0*d", length, i)
				d.Put(key, "value")
				if i%every == 0 {
					d.Expire(key, time.Now().UnixMilli()+1000)
				}
			}

			if err := d.Commit(); err != nil {
				t.Fatal(err)
			}
			d.AwaitCompaction()
			if _, err := d.rotate(); err != nil {
				t.Fatal(err)
			}

			c := d.newCompaction()
			c.run()
			if live := d.liveBytes(); c.err != nil || c.bytes > live*11/10 || c.bytes < live/2 {
				t.Errorf("keys of %d bytes, one in %d with a deadline: a snapshot of %d bytes, %v, "+
					"and liveBytes says %d", length, every, c.bytes, c.err, live)
			}
			d.Close()
		}
	}
}

// Ensure that nothing is compacted if that would save nothing, and that the log is compacted when
// everything was deleted.
func TestCompactionIsWorthIt(t *testing.T) {
	d, err := openSmall(storetest.New(), Options{Fsync: FsyncNever})
	if err != nil {
		t.Fatal(err)
	}
	d.segmentSize, d.minCompact = 10_000, 10_000

	runs := 0
	for i := range 5000 {
		d.Put(fmt.Sprint("key", i), strings.Repeat("v", 100))
		d.Commit()
		if d.compacted != nil {
			runs++
			d.AwaitCompaction()
		}
	}
	if runs > 0 {
		t.Errorf("%d compactions in %d files with nothing to leave out", runs, d.number())
	}

	for i := range 5000 {
		d.Delete(fmt.Sprint("key", i))
	}
	d.Commit()
	d.AwaitCompaction()
	if disk := d.fullBytes + d.size; disk > 2*10_000 {
		t.Errorf("%d bytes on disk for no data", disk)
	}
	d.Close()
}

// Ensure that the log is bounded by the data even if a long key has many values: a snapshot has the
// key once with all of them.
func TestCompactionOfALongKey(t *testing.T) {
	dir, d := newSmall(t, Options{Fsync: FsyncNever})
	key := strings.Repeat("k", 3000)

	for i := range 400 {
		d.Put(key, fmt.Sprint(i%10))
		if err := d.Commit(); err != nil {
			t.Fatal(err)
		}
		d.AwaitCompaction()
		if disk, most := d.fullBytes+d.size, maxWaste*d.liveBytes()+d.minCompact+
			d.segmentSize+int64(len(key)+frameMost); disk > most {
			t.Fatalf("%d bytes on disk for %d of data, want at most %d", disk, d.liveBytes(), most)
		}
	}

	want := d.Get(key)
	d.Close()
	again, err := openSmall(dir, Options{})
	if err != nil || !slices.Equal(again.Get(key), want) {
		t.Errorf("opened again: %v", err)
	}
}

// Ensure that a snapshot is not much larger than the data even if a very long key has values for
// many records, and a deadline.
func TestSnapshotOfLongKeys(t *testing.T) {
	_, d := newSmall(t, Options{})
	key := strings.Repeat("k", maxFrameSnapshot)
	for range 160 {
		d.Put(key, strings.Repeat("v", maxFrameSnapshot/2))
	}
	d.Expire(key, 1<<50)
	if err := d.Commit(); err != nil {
		t.Fatal(err)
	}
	d.AwaitCompaction()
	if _, err := d.rotate(); err != nil {
		t.Fatal(err)
	}

	c := d.newCompaction()
	c.run()
	if _, _, bytes := d.Size(); c.err != nil || c.bytes > bytes*6/5 {
		t.Errorf("a snapshot of %d bytes has %d, %v", bytes, c.bytes, c.err)
	}
	d.noteSnapshot(c)
	d.Close()

	// A record has at least one value, however large that is.
	if n := listPart("k", []string{strings.Repeat("v", 2*maxFrameSnapshot), "w"}); n != 1 {
		t.Errorf("a record with a huge value has %d values", n)
	}
}

// Ensure that files which a compaction could not remove are removed later, and that its snapshot
// stays.
func TestCompactionRemovesLater(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir := storetest.New()
		var refuses atomic.Bool
		dir.Before = func(c storetest.Call) error {
			if c.What == "remove" && strings.HasPrefix(c.Name, "seg-") && refuses.Load() {
				return storetest.ErrDisk
			}
			return nil
		}
		d, err := openSmall(dir, Options{})
		if err != nil {
			t.Fatal(err)
		}

		d.Put("kept", "value")
		refuses.Store(true)

		// The first compaction comes only in the tenth file, so it has many to remove.
		least := d.minCompact
		for d.minCompact = 1 << 40; d.compacted == nil; {
			d.Put("key", "value")
			d.Delete("key")
			if err := d.Commit(); err != nil {
				t.Fatal(err)
			}
			if d.number() == 10 {
				d.minCompact = least
			}
		}
		d.AwaitCompaction()

		refuses.Store(false)
		<-time.After(2 * lookTime)
		if err := d.Commit(); err != nil {
			t.Fatal(err)
		}

		if l, err := readLayout(dir); err != nil || len(l.obsolete) > 0 || l.snapshot == 0 {
			t.Errorf("there is still %q, %v", l.obsolete, err)
		}
		again, err := openSmall(dir.Kill(), Options{})
		if err != nil || len(again.Get("kept")) != 1 {
			t.Errorf("opened again: %v", err)
		}
		d.Close()
	})
}

// Ensure that files which a compaction could not remove are removed by the next one.
func TestCompactionRemovesLeftovers(t *testing.T) {
	dir := storetest.New()
	var refuses atomic.Bool
	dir.Before = func(c storetest.Call) error {
		if c.What == "remove" && refuses.Load() {
			return storetest.ErrDisk
		}
		return nil
	}
	d, err := openSmall(dir, Options{Fsync: FsyncNever})
	if err != nil {
		t.Fatal(err)
	}

	churn := func() {
		for number := d.number(); d.number() < number+5; {
			d.Put("key", "value")
			d.Delete("key")
			if err := d.Commit(); err != nil {
				t.Fatal(err)
			}
		}
		d.AwaitCompaction()
	}

	refuses.Store(true)
	churn()
	refuses.Store(false)
	d.compactAfter = time.Time{}
	churn()
	churn()

	l, err := readLayout(dir)
	if err != nil || l.snapshot == 0 || len(l.obsolete) > 0 {
		t.Errorf("beside snapshot %d these are left: %q, %v", l.snapshot, l.obsolete, err)
	}
	d.Close()
}

// Ensure that a start removes an older snapshot, as a crash in a compaction leaves it.
func TestStartRemovesAnOlderSnapshot(t *testing.T) {
	dir, d := fourSegments(t, Options{})
	for d.size > headerSize { // what is compacted is all that there is
		d.Put("key", "value")
		if err := d.Commit(); err != nil {
			t.Fatal(err)
		}
	}
	if err := d.compactNow(); err != nil {
		t.Fatal(err)
	}
	d.Close()

	image := dir.With("snap-1.log", []byte("it is not read"))
	again, err := openSmall(image, Options{})
	if err != nil || keysOf(again) != keysOf(d) || image.Names["snap-1.log"] != nil {
		t.Errorf("of %q there is still %q, %v", slices.Sorted(maps.Keys(dir.Names)),
			slices.Sorted(maps.Keys(image.Names)), err)
	}
}

// Ensure that without writes neither stops and starts nor a compaction that fails, and is tried
// again every minute, make one file after the other.
func TestNoFilesForNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir := storetest.New()
		var refuses atomic.Bool
		var tries atomic.Int64
		refuses.Store(true)
		dir.Before = func(c storetest.Call) error {
			if refuses.Load() && c.What == "create" && strings.HasPrefix(c.Name, "snap") {
				tries.Add(1)
				return storetest.ErrDisk
			}
			return nil
		}
		d, err := openSmall(dir, Options{Fsync: FsyncNever})
		if err != nil {
			t.Fatal(err)
		}

		for d.number() < 10 {
			d.Put("key", "value")
			d.Delete("key")
			if err := d.Commit(); err != nil {
				t.Fatal(err)
			}
		}

		var number uint64
		tries.Store(0)
		for round := range 10 {
			<-time.After(retryTime)
			if err := d.Commit(); err != nil {
				t.Fatal(err)
			}
			d.AwaitCompaction()
			if round == 2 {
				number = d.number()
			}
		}
		if n := tries.Load(); n != 10 {
			t.Errorf("in 10 minutes the compaction was tried %d times", n)
		}

		for range 5 {
			if err := d.Close(); err != nil {
				t.Fatal(err)
			}
			if d, err = openSmall(dir, Options{Fsync: FsyncNever}); err != nil {
				t.Fatal(err)
			}
		}
		if d.number() > number {
			t.Errorf("file %d after file %d, and nothing was written", d.number(), number)
		}

		refuses.Store(false)
		<-time.After(retryTime)
		d.Commit()
		d.AwaitCompaction()
		if disk := d.fullBytes + d.size; disk > 1000 {
			t.Errorf("%d bytes on disk for no data", disk)
		}
		d.Close()
	})
}

// Ensure that the next compaction removes a bit that has rotted in a full file.
func TestCompactionHeals(t *testing.T) {
	dir := storetest.New()
	d, err := openSmall(dir, Options{})
	if err != nil {
		t.Fatal(err)
	}
	d.minCompact = 1 << 30
	for i := range 100 {
		d.Put("key", fmt.Sprint(i))
		d.Commit()
	}

	dir.Names["seg-1.log"].Data[headerSize+10] ^= 1
	if r, err := Check(dir); err != nil || !r.Damaged {
		t.Fatalf("a rotten file: %v, %v", r, err)
	}

	d.minCompact = 0
	d.Delete("key")
	d.Put("key", "value")
	for number := d.number(); d.number() == number; {
		d.Put("other", "value")
		d.Commit()
	}
	d.AwaitCompaction()
	d.Close()

	if r, err := Check(dir); err != nil || r.Damaged {
		t.Errorf("after a compaction: %v, %v", r, err)
	}
	if d, err = openStill(dir, Options{}); err != nil ||
		!slices.Equal(d.Get("key"), []string{"value"}) {
		t.Errorf("opened again: %v", err)
	}
}

// Ensure that the disk holds no more than twice the live data and what two files may have,
// whatever happens: only Deletes, a huge key, no writes any more during a compaction,
// and a compaction that fails.
func TestDiskUseIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir := storetest.New()
		d, err := openSmall(dir, Options{Fsync: FsyncNever})
		if err != nil {
			t.Fatal(err)
		}

		check := func(what string) {
			t.Helper()
			disk := int64(0)
			for _, f := range dir.Names {
				disk += int64(len(f.Data))
			}
			if most := 2*d.liveBytes() + d.minCompact + d.segmentSize +
				2000; disk > most { // for zeros, and for the last write
				t.Fatalf("%s: %d bytes on disk, want at most %d for %d of data", what, disk, most,
					d.liveBytes())
			}
		}

		commit := func(what string) {
			t.Helper()
			if err := d.Commit(); err != nil {
				t.Fatal(err)
			}
			d.AwaitCompaction()
			check(what)
		}

		for i := range 500 {
			d.Put(fmt.Sprint(i), strings.Repeat("v", 100))
			commit("Puts")
		}
		for i := range 500 {
			d.Delete(fmt.Sprint(i))
			commit("Deletes")
		}

		huge := strings.Repeat("k", 1000)
		for i := range 100 {
			d.Put(huge, fmt.Sprint(i))
			commit("a huge key")
		}

		d.Delete(huge)
		// Perhaps this begins a compaction. From then on the store is only read.
		if err := d.Commit(); err != nil {
			t.Fatal(err)
		}
		d.AwaitCompaction()
		commit("a store that is only read")

		dir.Mu.Lock()
		dir.FailAt, dir.Failure, dir.Forever = dir.Calls+1, syscall.EMFILE, true
		dir.Mu.Unlock()
		for i := range 100 {
			d.Put("a", strings.Repeat("v", 100))
			d.Delete("a")
			if err := d.Commit(); err != nil {
				t.Fatalf("Commit %d without descriptors: %v", i, err)
			}
		}

		d.AwaitCompaction()
		dir.Mu.Lock()
		dir.FailAt = 0
		dir.Mu.Unlock()
		<-time.After(retryTime)
		commit("after a failure")
		d.Close()
	})
}

// Ensure that an emptied file which a compaction has removed does not come back when the power
// fails: the next start would refuse it.
func TestCompactionRemovesForGood(t *testing.T) {
	for seed := range uint64(20) {
		dir, d := newSmall(t, Options{})
		d.Put("kept", "value")
		d.minCompact = 1 << 40
		for d.number() < 4 {
			d.Set("key", strings.Repeat("v", 100))
			if err := d.Commit(); err != nil {
				t.Fatal(err)
			}
		}

		dir.Empty("seg-2.log")
		d.minCompact = 0
		for number := d.number(); d.number() == number; {
			d.Set("key", strings.Repeat("v", 100))
			if err := d.Commit(); err != nil {
				t.Fatal(err)
			}
		}
		d.AwaitCompaction()

		again, err := openSmall(dir.Crash(rand.New(rand.NewPCG(seed, 1))), Options{})
		if err != nil || len(again.Get("kept")) != 1 {
			t.Fatalf("after a power failure: %v", err)
		}
		again.Close()
		d.Close()
	}
}
