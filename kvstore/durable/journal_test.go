package durable

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"kvserver/kvstore/storage"
	"kvserver/kvstore/storetest"
	"log/slog"
	"math"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

// Ensure that a rotation that fails is tried again, once in rotateTime, and that the store goes on
// in the old file until then.
func TestRotationIsTriedAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for _, failure := range []error{syscall.EMFILE, syscall.ENOSPC} {
			dir := storetest.New()
			var refuses atomic.Bool // to create a file; no other call fails
			tries := 0
			dir.Before = func(c storetest.Call) error {
				if c.What == "create" && refuses.Load() {
					tries++
					return &os.PathError{Op: "open", Path: c.Name, Err: failure}
				}
				return nil
			}

			var log bytes.Buffer
			d, err := openSmall(dir, Options{Log: slog.New(slog.NewTextHandler(&log, nil))})
			if err != nil {
				t.Fatal(err)
			}

			put := func() {
				d.Put("key", strings.Repeat("v", 100))
				if err := d.Room("", 200, 0); err != nil {
					t.Fatal(err)
				}
				if err := d.Commit(); err != nil {
					t.Fatalf("%v: %v", failure, err)
				}
			}

			for d.size+400 < d.segmentSize {
				put()
			}

			refuses.Store(true)
			for range 30 {
				put()
				put() // too soon for the next try
				<-time.After(rotateTime)
			}
			if d.number() != 1 || tries > 30 || strings.Count(log.String(), "cannot go on in a new file") != 1 ||
				strings.Count(log.String(), "level=ERROR") != 1 || !strings.Contains(log.String(),
				failure.Error()) {
				t.Errorf("%v: in file %d after %d tries, the log says\n%s", failure, d.number(), tries, &log)
			}

			refuses.Store(false)
			<-time.After(rotateTime)
			put()
			put()
			if d.number() != 2 || len(d.Get("key")) < 12 {
				t.Errorf("%v: later in file %d", failure, d.number())
			}

			if err := d.Close(); err != nil {
				t.Fatal(err)
			}
			if again, err := Open(context.Background(), dir, Options{}); err != nil ||
				!slices.Equal(again.Get("key"), d.Get("key")) {
				t.Errorf("%v: opened again: %v", failure, err)
			}
		}
	})
}

// Ensure that the log says of each failure to go on in a new file, and of each end of that, once.
func TestRotationFailsTwice(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir, refuses, log := storetest.New(), atomic.Bool{}, &strings.Builder{}
		dir.Before = func(c storetest.Call) error {
			if c.What == "create" && refuses.Load() {
				return syscall.EMFILE
			}
			return nil
		}
		d, err := openSmall(dir, Options{Log: slog.New(slog.NewTextHandler(log, nil))})
		if err != nil {
			t.Fatal(err)
		}

		for range 2 {
			for _, fails := range []bool{true, false} {
				refuses.Store(fails)
				for range 10 {
					d.Put("key", strings.Repeat("v", int(d.segmentSize)/2))
					if err := d.Commit(); err != nil {
						t.Fatal(err)
					}
					<-time.After(rotateTime)
				}
			}
		}
		for _, line := range []string{"cannot go on in a new file", "goes on in a new file again"} {
			if n := strings.Count(log.String(), line); n != 2 {
				t.Errorf("%q is logged %d times:\n%s", line, n, log)
			}
		}
		d.Close()
	})
}

// Ensure that a store whose rotation was killed at any call goes on, also after more
// rotations and restarts, and that a start does not take what it writes itself for a change.
func TestKilledRotation(t *testing.T) {
	for n := 1; ; n++ {
		dir := storetest.New()
		d, err := openSmall(dir, Options{})
		if err != nil {
			t.Fatal(err)
		}
		d.minCompact = 1 << 30
		for d.size < d.segmentSize-100 {
			d.Put("key", strings.Repeat("v", 50))
			d.Commit()
		}

		dir.FailAt, dir.Forever = dir.Calls+n, true
		for d.number() == 1 && d.failure() == nil && n < 40 {
			d.Put("key", strings.Repeat("v", 50))
			d.Commit()
			if dir.Calls >= dir.FailAt+20 {
				break
			}
		}

		reached := dir.Calls >= dir.FailAt
		d.stopTimer()
		dir.FailAt, dir.Locked = 0, false
		if !reached {
			break
		}

		for range 3 {
			if d, err = openSmall(dir, Options{}); err != nil {
				t.Fatalf("killed at call %d: %v", n, err)
			}
			if c, err := d.changed(); err != nil || len(c.spoiled) > 0 {
				t.Fatalf("killed at call %d: the start's own writes count as changes of %q, %v", n,
					c.spoiled, err)
			}
			d.minCompact = 1 << 30
			for number := d.number(); d.number() < number+2; {
				d.Put("key", strings.Repeat("v", 50))
				if err := d.Commit(); err != nil {
					t.Fatal(err)
				}
			}

			if err := d.Close(); err != nil {
				t.Fatal(err)
			}
			if r, err := check(dir); err != nil || r.Damaged {
				t.Fatalf("killed at call %d: check says %v, %v", n, r, err)
			}
		}
	}
}

// Ensure that a rotation loses nothing to a power failure at any of its calls, even if the timer
// has just written a frame whose fsync takes long.
func TestRotationBesideTheTimer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir, d := newSmall(t, Options{Fsync: time.Second})
		var mu sync.Mutex // guards images
		var images []*storetest.Dir
		var fsyncs atomic.Int32
		dir.Before = func(c storetest.Call) error {
			mu.Lock()
			images = append(images, dir.Crash(rand.New(unsynced{})))
			mu.Unlock()
			if c == (storetest.Call{What: "sync", Name: "seg-1.log"}) && fsyncs.Add(1) == 2 {
				<-time.After(10 * time.Second)
			}
			return nil
		}

		// The timer's first fsync is of the Put, the second of the frame that vouches for it.
		d.Put("key", "value")
		if err := d.Commit(); err != nil {
			t.Fatal(err)
		}
		<-time.After(3 * time.Second / 2)

		mu.Lock()
		images = nil
		mu.Unlock()

		// A heal, or a compaction on a full disk, begins with this.
		if isNew, err := d.rotate(); !isNew || err != nil || fsyncs.Load() < 2 {
			t.Fatalf("a new file: %v, %v; %d fsyncs of the old one", isNew, err, fsyncs.Load())
		}
		d.Close()

		for i, image := range images {
			wantAll(t, fmt.Sprintf("before call %d of %d", i+1, len(images)), image,
				map[string][]string{"key": {"value"}})
		}
	})
}

// Ensure that a rotation for which the disk has no room does not fail the store, however little is
// missing.
func TestRotationWithoutRoom(t *testing.T) {
	for free := 0; free < 200; free += 8 {
		dir, d := newSmall(t, Options{Fsync: FsyncNever})
		d.minCompact = 1 << 40
		for d.size < d.segmentSize-200 {
			d.Put("key"+fmt.Sprint(d.size), strings.Repeat("v", 50))
			if err := d.Commit(); err != nil {
				t.Fatal(err)
			}
		}

		// As if the process was killed before the zeros were on disk.
		dir = dir.Kill()
		f := dir.Names["seg-1.log"]
		f.Data = f.Data[:d.size]
		d, err := openSmall(dir, Options{})
		if err != nil {
			t.Fatal(err)
		}

		d.segmentSize = d.size // a rotation is due
		used := 0
		for _, f := range dir.Names {
			used += len(f.Data)
		}
		if dir.Room = used + free; free%16 > 0 {
			dir.Room, dir.Largest = 0, int(d.size)+free // only this file cannot grow
		}
		d.minCompact = -1 << 40 // the log counts as wasteful
		if err := d.Commit(); err != nil {
			t.Errorf("%d bytes free: %v", free, err)
		}
	}
}

// Ensure that a Commit whose write fails returns the error, whether or not it waits for the disk.
func TestFailedWriteFailsTheCommit(t *testing.T) {
	for _, fsync := range []time.Duration{FsyncAlways, time.Second, FsyncNever} {
		dir, d := newSmall(t, Options{Fsync: fsync})
		dir.Before = func(c storetest.Call) error {
			if c.What == "write" {
				return storetest.ErrDisk
			}
			return nil
		}
		d.Put("k", "v")
		if err := d.Commit(); !errors.Is(err, storetest.ErrDisk) {
			t.Errorf("with -fsync %v Commit returns %v", fsync, err)
		}
		d.Close()
	}
}

// Ensure that a Commit returns the error of each fsync of the file that it leaves, and closes the
// new one.
func TestFailedFsyncOfARotation(t *testing.T) {
	for n, failed := 1, true; failed; n++ {
		dir, d := newSmall(t, Options{})
		fsyncs := 0
		dir.Before = func(c storetest.Call) error {
			if c.What == "sync" && c.Name == "seg-1.log" {
				if fsyncs++; fsyncs == n {
					return storetest.ErrDisk
				}
			}
			return nil
		}

		d.Put("k", strings.Repeat("v", int(d.segmentSize)))
		err := d.Commit()
		failed = fsyncs >= n
		if d.Close(); errors.Is(err, storetest.ErrDisk) != failed || dir.Handles > 0 {
			t.Errorf("fsync %d fails: Commit returns %v, and %d files are open", n, err, dir.Handles)
		}
	}
}

// Ensure that while there is no room for what an fsync is to write, Commits say so, and that a
// Commit or a Close succeeds once there is.
func TestNoRoomIsAwaited(t *testing.T) {
	for _, fsync := range []time.Duration{FsyncAlways, time.Second} {
		synctest.Test(t, func(t *testing.T) {
			dir, d := newSmall(t, Options{Fsync: fsync})
			var refusals atomic.Int32 // how many fsyncs find no room from now on
			dir.Before = func(c storetest.Call) error {
				if c.What == "sync" && c.Name != "" && refusals.Add(-1) >= 0 {
					return storage.ErrNoRoom
				}
				return nil
			}

			// The timer's fsync, and each Commit's own, finds none.
			refusals.Store(1 << 20)
			d.Put("k", "v")
			d.Commit()
			<-time.After(fsync + time.Second/2)
			for range 2 {
				d.Put("k", "v")
				if err := d.Commit(); !errors.Is(err, storage.ErrNoRoom) {
					t.Errorf("fsync %v: without room a Commit returns %v", fsync, err)
				}
			}

			refusals.Store(0)
			if err := d.Commit(); err != nil {
				t.Errorf("fsync %v: with room a Commit returns %v", fsync, err)
			}

			d.Put("k", "w")
			refusals.Store(3)
			if err := d.Close(); err != nil || refusals.Load() >= 0 {
				t.Errorf("fsync %v: Close returns %v with %d refusals left", fsync, err, refusals.Load())
			}
			wantAll(t, "after a stop without room", dir,
				map[string][]string{"k": {"v", "v", "v", "w"}})
		})
	}
}

// Ensure that a frame for which the zeros are just enough needs no other room.
func TestFrameThatFitsExactly(t *testing.T) {
	dir, d := newSmall(t, Options{})
	d.zerosAhead = 800 // as frames, a multiple of 8
	d.Put("k", "v")
	if err := d.Commit(); err != nil {
		t.Fatal(err)
	}

	for _, f := range dir.Names {
		dir.Room += len(f.Data)
	}
	d.Put("k", strings.Repeat("v", int(d.room)-frameSize-8))
	if err := d.Commit(); err != nil || d.room > 0 {
		t.Errorf("Commit: %v, and %d bytes of zeros are left", err, d.room)
	}
}

// segment returns a directory with a store of one log file with this many commits, not
// closed, the file's name, and the offsets at which its frames begin and the last one ends.
func segment(t *testing.T, commits int) (dir *storetest.Dir, name string, starts []int) {
	dir, name = storetest.New(), "seg-1.log"
	d, err := openStill(dir, Options{})
	if err != nil {
		t.Fatal(err)
	}
	d.zerosAhead = 0

	for i := range commits {
		starts = append(starts, len(dir.Names[name].Data))
		d.Put("key", fmt.Sprint("value", i))
		d.Put(strings.Repeat("k", i%9), "")
		if err := d.Commit(); err != nil {
			t.Fatal(err)
		}
	}

	d.stopTimer()
	dir.Locked = false
	return dir, name, append(starts, len(dir.Names[name].Data))
}

// Ensure that the room behind the last frame is used, is not taken for a torn
// end, and is cut off when the file is full or the store closes.
func TestRoomForFrames(t *testing.T) {
	dir, d := newSmall(t, Options{})
	var sizes []int
	for i := range 5 {
		d.Put("key", fmt.Sprint("value", i))
		d.Commit()
		sizes = append(sizes, len(dir.Names["seg-1.log"].Data))
	}
	if sizes[0] < d.zerosAhead || sizes[4] != sizes[0] {
		t.Errorf("five commits made files of %d bytes, want one size", sizes)
	}

	killed := dir.Kill()
	var log bytes.Buffer
	d2, err := openStill(killed,
		Options{Log: slog.New(slog.NewTextHandler(&log, nil))})
	if err != nil || len(d2.Get("key")) != 5 || strings.Contains(log.String(), "incomplete") {
		t.Errorf("opened without a Close: %v, %v, the log says %s", d2.Get("key"), err,
			log.String())
	}

	for d.number() == 1 {
		d.Put("key", "more")
		d.Commit()
	}
	d.Put("key", "last")
	d.Close()

	for name, f := range dir.Names {
		if kind, _ := parseName(name); kind == kindSegment &&
			len(bytes.TrimRight(f.Data, "\x00"))+8+int(d.toDelete(0)) <= len(f.Data) {
			t.Errorf("%s of %d bytes ends in many zeros", name, len(f.Data))
		}
		if len(f.Data) != len(f.Disk) {
			t.Errorf("%s has %d bytes, and on disk %d", name, len(f.Data), len(f.Disk))
		}
	}
}

// Ensure that Syncing names a file whenever the store waits for the disk, so that an operator can
// understand a stall: at a Commit, at a rotation, at Close and, then it is a snapshot, in a heal.
func TestSyncingNamesTheFile(t *testing.T) {
	dir, d := newSmall(t, Options{})
	d.minCompact = 1 << 40 // a compaction would make calls of its own
	waits := map[string]int{}
	dir.Before = func(c storetest.Call) error {
		if slices.Contains([]string{"sync", "truncate", "create", "rename"}, c.What) {
			waits[c.What]++
			name := d.Syncing()
			if name == "" || strings.Contains(name, "snapshot") != d.IsHealing() {
				t.Errorf("in file %d %q is named while %q of %q is waited for", d.number(), name, c.What,
					c.Name)
			}
		}
		return nil
	}

	for i := 0; d.number() < 4; i++ {
		d.Put("k", strings.Repeat("v", i%200))
		if err := d.Commit(); err != nil {
			t.Fatal(err)
		}
	}

	dir.Remove(storage.StoreName)
	d.lookAfter = time.Time{}
	if err := d.Commit(); err != nil || d.Syncing() != "" {
		t.Errorf("a heal: %v, and after it %q is named", err, d.Syncing())
	}
	if err := d.Close(); err != nil || d.Syncing() == "" {
		t.Errorf("Close: %v, and names %q", err, d.Syncing())
	}
	none := (*Store)(nil)
	if none.Syncing() != "" || none.IsHealing() || none.Lost() != nil || none.Close() != nil {
		t.Error("without a store something is waited for")
	}
	if waits["sync"] < 10 || waits["truncate"] < 3 || waits["create"] != 6 || waits["rename"] != 6 {
		t.Errorf("it waits for %v", waits)
	}
}

// Ensure that while an fsync finds no room, each Commit tries it again and says so, and Syncing
// names the file, until there is room.
func TestNoRoomIsTriedAgain(t *testing.T) {
	dir, d := newSmall(t, Options{})
	isFull := true
	dir.Before = func(c storetest.Call) error {
		if c.What == "sync" && isFull {
			return storage.ErrNoRoom
		}
		return nil
	}

	d.Put("key", "value")
	for range 3 {
		if err := d.Commit(); !errors.Is(err, storage.ErrNoRoom) || d.Syncing() == "" {
			t.Errorf("without room: %v, and %q is named", err, d.Syncing())
		}
	}
	isFull = false
	if err := d.Commit(); err != nil || d.Syncing() != "" {
		t.Errorf("with room: %v, and %q is named", err, d.Syncing())
	}
	d.Close()
}

// Ensure that while Close waits for a compaction that the disk holds up, Syncing names the
// compaction's snapshot, even after the timer has synced something.
func TestSyncingNamesTheSnapshot(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir, d := newSmall(t, Options{})
		stall := make(chan struct{})
		dir.Before = func(c storetest.Call) error {
			if c.What == "sync" && strings.HasPrefix(c.Name, "snap-") {
				<-stall
			}
			return nil
		}

		for i := 0; d.compacted == nil; i++ {
			d.Set("key", strings.Repeat("v", i%200))
			if err := d.Commit(); err != nil {
				t.Fatal(err)
			}
		}

		d.Put("key", "value")
		synctest.Wait() // for the compaction to be held up
		closed := make(chan error)
		go func() { closed <- d.Close() }()

		for range 3 {
			synctest.Wait()
			if name := d.Syncing(); !strings.Contains(name, "snapshot") {
				t.Errorf("a compaction is waited for, and Syncing names %q", name)
			}
			<-time.After(vouchTime)
		}

		close(stall)
		if err := <-closed; err != nil {
			t.Error(err)
		}
	})
}

// Ensure that during a stalled fsync Commits return only for a bounded time, and that no second
// fsync begins.
func TestStalledFsyncHoldsCommitsBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir := &slowDir{Dir: storetest.New()}
		d, err := openSmall(dir, Options{Fsync: time.Second})
		if err != nil {
			t.Fatal(err)
		}
		d.segmentSize = 1 << 30

		const stall = 15 * time.Second
		dir.syncing.Store(int64(stall))
		start := time.Now()
		var waited time.Duration
		for time.Since(start) < 10*time.Second {
			<-time.After(100 * time.Millisecond)
			began := time.Now()
			d.Put("k", "v")
			if err := d.Commit(); err != nil {
				t.Fatal(err)
			}
			if waited = time.Since(began); waited > 0 {
				break
			}
		}

		if most := dir.most.Load(); most != 1 {
			t.Errorf("%d fsyncs at a time", most)
		}

		// The timer's fsync begins after a second, and Commits wait for it once it has lasted
		// another.
		after := time.Since(start) - waited
		if waited == 0 || after < 2*time.Second || after > 2200*time.Millisecond {
			t.Errorf("Commits went on for %v beside a stalled fsync, then waited %v", after, waited)
		}
		dir.syncing.Store(0)
		d.Close()
	})
}

// Ensure that a stop that loses the directory with its last sync is not called a clean one.
func TestCloseLosesItsDirectory(t *testing.T) {
	dir := storetest.New()
	d, err := openSmall(dir, Options{})
	if err != nil {
		t.Fatal(err)
	}
	d.Put("k", "v")
	if err := d.Commit(); err != nil {
		t.Fatal(err)
	}

	dir.After = func(storetest.Call) {
		dir.Mu.Lock()
		defer dir.Mu.Unlock()
		dir.Moved = storage.ErrMoved
	}

	if err := d.Close(); !errors.Is(err, storage.ErrMoved) {
		t.Errorf("Close returns %v", err)
	}
}

// Ensure that Close makes durable what was answered before it waits for a compaction.
func TestCloseSyncsFirst(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir := storetest.New()
		d, err := openSmall(dir, Options{Fsync: time.Hour})
		if err != nil {
			t.Fatal(err)
		}
		d.Put("k", "v")
		d.Commit()

		d.compacted = make(chan *compaction, 1)
		go d.Close()
		synctest.Wait() // for the compaction, which does not end

		if again, err := Open(context.Background(), dir.Crash(rand.New(rand.NewPCG(1, 1))),
			Options{}); err != nil || len(again.Get("k")) != 1 {
			t.Errorf("while Close waits a power failure leaves %v", err)
		}
		d.compacted <- &compaction{err: errStopped}
	})
}

// Ensure that a second after the last Commit a flipped bit is damage, not a torn end, even in the
// last frame, and even if that frame was written during an fsync.
func TestIdleLogIsVouchedFor(t *testing.T) {
	for i, fsync := range []time.Duration{FsyncAlways, time.Second, time.Second} {
		synctest.Test(t, func(t *testing.T) {
			dir := storetest.New()
			dir.Reserve *= 1 - i/2 // the last one has no zeros, as in etcd
			dir.Before = func(c storetest.Call) error {
				if c.What == "sync" {
					<-time.After(time.Second / 2)
				}
				return nil
			}
			d, err := Open(context.Background(), dir, Options{Fsync: fsync})
			if err != nil {
				t.Fatal(err)
			}

			for i := range 10 {
				d.Put("key", fmt.Sprint(i))
				d.Commit()
			}

			<-time.After(vouchTime + time.Second/4)
			d.Put("key", "beside the timer's fsync")
			d.Commit()
			last := d.size - 20

			<-time.After(5 * time.Second)
			synctest.Wait()
			calls := dir.Calls
			if <-time.After(time.Hour); dir.Calls != calls {
				t.Errorf("fsync %v: %d calls in an idle hour", fsync, dir.Calls-calls)
			}

			for _, at := range []int64{200, last} {
				image := dir.Crash(rand.New(rand.NewPCG(1, 1)))
				data := slices.Clone(image.Names["seg-1.log"].Data)
				data[at] ^= 1
				var damage *storage.DamageError
				if _, err := Open(context.Background(), image.With("seg-1.log", data),
					Options{}); !errors.As(err, &damage) {
					t.Errorf("fsync %v: with a flipped bit at %d: %v", fsync, at, err)
				}
			}

			// After a clean stop a start has nothing to write.
			if err := d.Close(); err != nil {
				t.Error(err)
			}
			d, err = Open(context.Background(), dir, Options{Fsync: fsync})
			if err != nil {
				t.Fatal(err)
			}
			calls = dir.Calls
			if <-time.After(time.Hour); dir.Calls != calls || d.Close() != nil {
				t.Errorf("fsync %v: %d calls in an idle hour after a start", fsync, dir.Calls-calls)
			}
		})
	}
}

// Ensure that an idle log is vouched for after a start, too.
func TestIdleAfterARestart(t *testing.T) {
	for _, restart := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			dir := storetest.New()
			d, err := Open(context.Background(), dir, Options{})
			if err != nil {
				t.Fatal(err)
			}

			d.Put("key", "answered")
			if err := d.Commit(); err != nil {
				t.Fatal(err)
			}
			last := d.size - 20

			if restart {
				dir = dir.Kill()
				d.Close()
				if d, err = Open(context.Background(), dir, Options{}); err != nil {
					t.Fatal(err)
				}
			}

			<-time.After(time.Hour)
			image := dir.Crash(rand.New(rand.NewPCG(1, 1)))
			data := slices.Clone(image.Names["seg-1.log"].Data)
			data[last] ^= 1
			var damage *storage.DamageError
			again, err := Open(context.Background(), image.With("seg-1.log", data), Options{})
			if !errors.As(err, &damage) {
				t.Errorf("restart %v: a flipped bit in an old commit: %v, it has %d values",
					restart, err, len(again.Get("key")))
			}
			d.Close()
		})
	}
}

// Ensure that on a full disk the timer of an idle store writes nothing, and does not try again and
// again.
func TestFullDiskIsNotVouchedFor(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir, d := newSmall(t, Options{})
		d.Put("key", "value")
		if err := d.Commit(); err != nil {
			t.Fatal(err)
		}

		// The file has no zeros left, and the disk no room, so the timer cannot write its frame.
		image := dir.Kill()
		size := d.size
		d.Close()
		f := image.Names["seg-1.log"]
		f.Data = f.Data[:size]
		image.Room = 1
		for _, f := range image.Names {
			image.Room += len(f.Data)
		}

		d, err := openSmall(image, Options{})
		if err != nil {
			t.Fatal(err)
		}

		<-time.After(3 * time.Second)
		calls := image.Calls
		<-time.After(time.Hour)
		d.mu.Lock()
		if image.Calls != calls || d.timer != nil {
			t.Errorf("%d calls in an idle hour, and the timer runs: %v", image.Calls-calls,
				d.timer != nil)
		}
		d.mu.Unlock()

		if err := errors.Join(d.failure(), d.Close()); err != nil {
			t.Errorf("after an idle hour: %v", err)
		}
	})
}

// errseqDir reports a failed fsync only once, to the first caller, whom it lets wait. Linux, too,
// reports a failed write only once for each open file.
type errseqDir struct {
	*storetest.Dir
	armed, failed atomic.Bool
	hold          chan struct{}
}

type errseqFile struct {
	storage.File
	d *errseqDir
}

func (d *errseqDir) Extend(name string) (storage.File, error) {
	f, err := d.Dir.Extend(name)
	return errseqFile{f, d}, err
}

func (f errseqFile) Sync() error {
	if f.d.armed.CompareAndSwap(true, false) {
		f.d.failed.Store(true)
		<-f.d.hold
		return storetest.ErrDisk
	}
	if f.d.failed.Load() {
		return nil // and nothing was written
	}
	return f.File.Sync()
}

// Ensure that when the timer's fsync fails, a Commit at the same time does not take the success of
// a second fsync for its own.
func TestFsyncErrorIsToldOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir := &errseqDir{Dir: storetest.New(), hold: make(chan struct{})}
		d, err := Open(context.Background(), dir, Options{Fsync: time.Second})
		if err != nil {
			t.Fatal(err)
		}

		d.Put("k", "v")
		d.Commit()

		dir.armed.Store(true)
		<-time.After(time.Second)
		synctest.Wait() // the timer's fsync has failed, but has not returned yet

		ended := make(chan error, 1)
		go func() { ended <- d.syncRest() }() // as in a Commit
		synctest.Wait()
		close(dir.hold)
		if err := <-ended; !errors.Is(err, storetest.ErrDisk) {
			t.Errorf("beside a failed fsync another returns %v, want %v", err, storetest.ErrDisk)
		}
		d.Close()
	})
}

// Ensure that a Commit also makes durable what was written early, because a frame was full.
func TestCommitAfterAFullFrame(t *testing.T) {
	for _, fsync := range []time.Duration{FsyncAlways, time.Second} {
		synctest.Test(t, func(t *testing.T) {
			dir := storetest.New()
			d, err := Open(context.Background(), dir, Options{Fsync: fsync})
			if err != nil {
				t.Fatal(err)
			}

			d.Put("k", strings.Repeat("v", maxFramePut)) // a frame of its own
			if err := d.Commit(); err != nil {
				t.Fatal(err)
			}
			<-time.After(fsync)
			synctest.Wait()

			for seed := range uint64(3) {
				after, err := Open(context.Background(),
					dir.Crash(rand.New(rand.NewPCG(seed, 1))), Options{})
				if err != nil || len(after.Get("k")) != 1 {
					t.Fatalf("fsync %v: a power failure leaves %d values, %v", fsync,
						len(after.Get("k")), err)
				}
			}
			d.Close()
		})
	}
}

// Ensure that reads alone cost no I/O, and that a Commit costs one write, one read
// of the frame before, and one fsync, whatever it holds.
func TestCommitCosts(t *testing.T) {
	dir := storetest.New()
	d, err := openStill(dir, Options{})
	if err != nil {
		t.Fatal(err)
	}
	d.lookAfter = time.Now().Add(time.Hour) // so that no check of the files comes between

	for _, c := range []struct {
		do   func()
		want int
	}{
		{func() {}, 0},
		{func() { d.Get("k"); d.Delete("k") }, 0},
		{func() { d.Put("k", "v") }, 3},
		{func() { d.Get("k") }, 0},
		{func() {
			for range 1000 {
				d.Put("k", "v")
				d.Update("k", "v", "w")
			}
			d.Delete("k")
		}, 3},
	} {
		before := dir.Calls
		c.do()
		if err := d.Commit(); err != nil || dir.Calls-before != c.want {
			t.Errorf("%d I/O calls, want %d (%v)", dir.Calls-before, c.want, err)
		}
	}
}

// Ensure that what was answered before the directory was moved is on disk once the store is closed,
// even if the timer's fsync had not come yet.
func TestMovedStoreIsSynced(t *testing.T) {
	for seed := range uint64(10) {
		dir, d := newSmall(t, Options{Fsync: time.Hour})
		d.Put("key", "answered")
		if err := d.Commit(); err != nil {
			t.Fatal(err)
		}

		dir.Mu.Lock()
		dir.Moved = storage.ErrMoved
		dir.Mu.Unlock()
		if err := d.Commit(); !errors.Is(err, storage.ErrMoved) {
			t.Fatal(err)
		}

		d.Close()
		wantAll(t, fmt.Sprint("seed ", seed), dir.Crash(rand.New(rand.NewPCG(seed, 1))),
			map[string][]string{"key": {"answered"}})
	}
}

// Ensure that with a time between fsyncs the first one comes in time, without
// another Commit, and that Commit and Close return the error of one that fails.
func TestFsyncInTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir := storetest.New()
		d, err := Open(context.Background(), dir, Options{Fsync: time.Second})
		if err != nil {
			t.Fatal(err)
		}

		f := dir.Names["seg-1.log"]
		unsynced := func() int {
			dir.Mu.Lock()
			defer dir.Mu.Unlock()
			return len(f.Data) - len(f.Disk)
		}

		d.Put("k", "v")
		d.Commit()
		<-time.After(time.Second - 1)
		synctest.Wait()
		if unsynced() == 0 {
			t.Error("synced too early")
		}
		<-time.After(1)
		synctest.Wait()
		if unsynced() > 0 {
			t.Error("not synced in time")
		}

		d.Put("k", "w")
		d.Commit()
		dir.Mu.Lock()
		dir.FailAt = dir.Calls + 1
		dir.Mu.Unlock()
		<-time.After(time.Second)
		synctest.Wait()

		if err := d.Commit(); !errors.Is(err, storetest.ErrDisk) {
			t.Errorf("Commit after a failed fsync: %v", err)
		}
		if err := d.Close(); !errors.Is(err, storetest.ErrDisk) {
			t.Errorf("Close after a failed fsync: %v", err)
		}
	})
}

// slowDir is a storetest.Dir whose writes and Syncs take as long as its fields say.
type slowDir struct {
	*storetest.Dir
	writing, syncing atomic.Int64 // how long each takes, as a time.Duration
	running, most    atomic.Int32 // Syncs at a time
}

type slowFile struct {
	storage.File
	d *slowDir
}

func (d *slowDir) Extend(name string) (storage.File, error) {
	f, err := d.Dir.Extend(name)
	return slowFile{f, d}, err
}

func (f slowFile) WriteAt(p []byte, off int64) (int, error) {
	<-time.After(time.Duration(f.d.writing.Load()))
	return f.File.WriteAt(p, off)
}

func (f slowFile) Sync() error {
	f.d.most.Store(max(f.d.most.Load(), f.d.running.Add(1)))
	defer f.d.running.Add(-1)
	err := f.File.Sync()
	<-time.After(time.Duration(f.d.syncing.Load()))
	return err
}

// Ensure that the timer's fsync does not count for what is written while it lasts: it is synced
// soon, and until then no frame says that it is.
func TestWriteDuringFsync(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir, d := newSmall(t, Options{Fsync: time.Second})
		dir.Before = func(c storetest.Call) error {
			if c.What == "sync" {
				<-time.After(time.Second)
			}
			return nil
		}

		d.Put("a", "1")
		d.Commit()

		// The fsync begins after a second and lasts one, so b is written in its middle.
		<-time.After(3 * time.Second / 2)
		d.Put("b", strings.Repeat("v", 700)) // it begins in another sector than the next frame
		d.Commit()

		for _, pause := range []time.Duration{time.Second, 5 * time.Second} {
			<-time.After(pause)
			for seed := range uint64(20) {
				after, err := Open(context.Background(), dir.Crash(rand.New(rand.NewPCG(seed, 1))),
					Options{})
				if err != nil {
					t.Fatalf("%v later what a power failure leaves is refused: %v", pause, err)
				}
				if pause > time.Second && after.Count("b") != 1 {
					t.Fatal("long after the fsync was due a power failure takes what was answered")
				}
			}
		}
		d.Close()
	})
}

// Ensure that a large Commit is written in frames of a bounded size.
func TestLargeCommitIsSplit(t *testing.T) {
	dir := storetest.New()
	d, err := openStill(dir, Options{})
	if err != nil {
		t.Fatal(err)
	}
	d.zerosAhead = 0

	value := strings.Repeat("v", 1000)
	for i := range 5000 {
		d.Put(fmt.Sprint(i), value)
	}

	if cap(d.pending) > 2*maxFramePut {
		t.Errorf("%d bytes wait for Commit", cap(d.pending))
	}
	if err := d.Commit(); err != nil {
		t.Fatal(err)
	}
	d.Close()

	l, err := openLog(dir, "seg-1.log")
	if err != nil {
		t.Fatal(err)
	}
	end, err := l.scan(func(_ *logReader, f frame, _ []byte) error {
		if f.length > maxFramePut+2000 {
			t.Errorf("a frame has %d bytes", f.length)
		}
		return nil
	})
	if err != nil || end.tail != nothing || end.frames < 5 {
		t.Errorf("after %d frames: %v, %v", end.frames, err, end.bad)
	}
}

// Ensure that a huge record does not keep its memory.
func TestHugeRecordKeepsNoMemory(t *testing.T) {
	_, d := newSmall(t, Options{})
	d.segmentSize = 1 << 40 // otherwise the next file has other memory
	d.Set("key", strings.Repeat("v", 12<<20))
	for range 2 {
		if err := d.Commit(); err != nil {
			t.Fatal(err)
		}
		d.Set("key", "v")
	}
	if pending, frame := cap(d.pending), cap(d.current.buf); pending+frame > 8*maxFramePut {
		t.Errorf("%d bytes of memory are kept for records, and %d for a frame", pending, frame)
	}
	d.Close()
}

// Ensure that the timer's fsync during a write does not count for the bytes of that write.
func TestFsyncDuringWrite(t *testing.T) {
	for _, value := range []string{"small", strings.Repeat("fills the file", 100)} {
		synctest.Test(t, func(t *testing.T) {
			dir := &slowDir{Dir: storetest.New()}
			d, err := openSmall(dir, Options{Fsync: time.Second})
			if err != nil {
				t.Fatal(err)
			}

			d.Put("a", "1")
			d.Commit() // from here the timer's second counts

			// The write takes two seconds, and the timer's fsync begins after one.
			dir.writing.Store(int64(2 * time.Second))
			d.Put("b", value)
			if err := d.Commit(); err != nil {
				t.Fatal(err)
			}
			<-time.After(5 * time.Second)

			for seed := range uint64(20) {
				after, err := Open(context.Background(),
					dir.Crash(rand.New(rand.NewPCG(seed, 1))), Options{})
				if err != nil || len(after.Get("b")) != 1 {
					t.Fatalf("long after the fsync was due a power failure leaves %q, %v",
						after.Get("b"), err)
				}
			}
			d.Close()
		})
	}
}

// unsynced is a random source for Dir.Crash with which nothing is left that was not synced.
type unsynced struct{}

func (unsynced) Uint64() uint64 { return math.MaxUint64 }

// Ensure that a power failure loses no more answers than are given in twice the time between
// fsyncs, even if every fsync stalls, however long.
func TestStallsInARow(t *testing.T) {
	for _, stall := range []time.Duration{0, time.Second / 2, 3 * time.Second / 2,
		7 * time.Second} {
		synctest.Test(t, func(t *testing.T) {
			dir, d := newSmall(t, Options{Fsync: time.Second})
			d.segmentSize = 1 << 30
			dir.Before = func(c storetest.Call) error {
				if c.What == "sync" {
					<-time.After(stall)
				}
				return nil
			}

			const pause = time.Second / 10
			var answered atomic.Int64
			ended := make(chan struct{})
			go func() {
				defer close(ended)
				for range 120 {
					d.Put("key", "value")
					if err := d.Commit(); err != nil {
						t.Error(err)
					}
					answered.Add(1)
					<-time.After(pause)
				}
			}()

			worst := 0
			for running := true; running; {
				select {
				case <-ended:
					running = false
				case <-time.After(pause):
				}
				told := int(answered.Load())
				after, err := openSmall(dir.Crash(rand.New(unsynced{})), Options{Fsync: FsyncNever})
				if err != nil {
					t.Fatal(err)
				}
				worst = max(worst, told-after.Count("key"))
			}

			d.Close()
			most := 2 * int(time.Second/pause)
			// Without stalls nothing waits for an fsync that runs already.
			if stall == 0 {
				most /= 2
			}
			if worst > most+2 { // one more at each end
				t.Errorf("with stalls of %v a power failure takes %d answers, want at most %d",
					stall, worst, most)
			}
		})
	}
}

// Ensure that the numbers of a store's status are exact: each fsync of the log and how long it
// took, also the timer's, and each compaction that has succeeded.
func TestStatusNumbers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		status := &storage.Status{}
		dir, d := newSmall(t, Options{Status: status})
		if status.Stage() != "" {
			t.Errorf("once it is open the store is %q", status.Stage())
		}

		dir.Mu.Lock()
		dir.Before = func(c storetest.Call) error {
			if c.What == "sync" && c.Name == "seg-1.log" {
				<-time.After(time.Second / 2)
			}
			return nil
		}
		dir.Mu.Unlock()

		for range 3 {
			d.Put("key", "value")
			d.Get("key")
			// The second Commit has nothing to sync, and counts no fsync.
			if err := errors.Join(d.Commit(), d.Commit()); err != nil {
				t.Fatal(err)
			}
		}
		if _, all, sum := status.Fsyncs.Read(); all != 3 || sum != 1.5 {
			t.Errorf("after three Commits %d fsyncs took %v s", all, sum)
		}

		<-time.After(time.Minute) // meanwhile one frame that vouches for them is synced
		if atMost, all, sum := status.Fsyncs.Read(); all != 4 || sum != 2 || atMost[6] != 0 ||
			atMost[7] != 4 {
			t.Errorf("a minute later %d fsyncs took %v s, %v at most", all, sum, atMost)
		}

		for n := range 3 {
			_, err := d.rotate()
			if err := errors.Join(err, d.compactNow()); err != nil {
				t.Fatal(err)
			}
			if got := status.Compactions.Load(); got != int64(n+1) {
				t.Errorf("%d compactions, want %d", got, n+1)
			}
		}

		d.noteCompaction(&compaction{err: storetest.ErrDisk})
		if got := status.Compactions.Load(); got != 3 {
			t.Errorf("%d compactions, and one of them has failed", got)
		}
		d.Close()
	})
}

// Ensure that Room refuses a record that would be too large for a frame only with its own bytes
// beside key and value.
func TestRoomForTheLargestRecord(t *testing.T) {
	dir, d := newSmall(t, Options{})
	defer d.Close()
	dir.Room = 100_000
	if err := d.Room("", maxRecord-1, math.MaxInt); err == nil || !strings.Contains(err.Error(), "too large") {
		t.Errorf("a record of 2 GiB but for a byte: %v", err)
	}
}
