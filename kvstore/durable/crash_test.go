package durable

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"kvserver/kvstore/storage"
	"kvserver/kvstore/storetest"
	"log/slog"
	"maps"
	"math"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

// Ensure that after a power failure after any I/O call, and another one during
// the recovery, everything that was told is there and nothing that was deleted is back.
func TestCrashAfterEveryCall(t *testing.T) {
	total := storetest.New()
	d, err := openSmall(total, Options{})
	if err != nil {
		t.Fatal(err)
	}
	storetest.Script(t, d, storetest.NewHistory())
	if l, _ := readLayout(total); l.snapshot < 2 {
		t.Fatalf("the script compacts too little: %+v", l)
	}

	for n := 0; n < total.Calls; n = storetest.Next(n, 3) {
		random := rand.New(rand.NewPCG(uint64(n), 1))
		dir := storetest.New()
		dir.FailAt, dir.Forever = n+1, true
		h := storetest.NewHistory()
		if d, err := openSmall(dir, Options{}); err == nil {
			storetest.Script(t, d, h)
		}

		image := dir.Crash(random)
		checkKept(t, h, image.Crash(random), fmt.Sprint("crash after call ", n))
		for m := 1; m < 40; m += 1 + random.IntN(8) {
			again := image.Crash(random)
			again.FailAt, again.Forever = m, true
			if d, err := openSmall(again, Options{}); err == nil {
				d.Close()
			}
			checkKept(t, h, again.Crash(random),
				fmt.Sprintf("crash after call %d, then %d of the recovery", n, m))
		}
	}
}

// Ensure that after a power failure at any moment everything that was answered is there, and of
// what was done since, everything up to some point. All of these go on at the same time: fsyncs
// that last long, before their effect and after it, Commits of several frames, the timer's frames,
// and compactions while files become full.
func TestPowerFailsBesideEverything(t *testing.T) {
	for seed := 0; seed < 30; seed = storetest.Next(seed, 3) {
		for _, fsync := range []time.Duration{FsyncAlways, time.Second} {
			synctest.Test(t, func(t *testing.T) { powerFails(t, uint64(seed), fsync) })
		}
	}
}

// powerFails does random things to a store, and checks what power failures meanwhile leave.
func powerFails(t *testing.T, seed uint64, fsync time.Duration) {
	random := rand.New(rand.NewPCG(seed, 21))
	dir, d := newSmall(t, Options{Fsync: fsync})
	const stall = time.Second / 2
	var calls atomic.Uint64
	wait := func(c storetest.Call) { // some Syncs take long, and so do compactions
		n := crc(uint32(seed), binary.LittleEndian.AppendUint64(nil, calls.Add(1)))
		isLong := c.What == "sync" && n%16 == 0 || strings.HasPrefix(c.Name, "snap-")
		if isLong {
			<-time.After(stall)
		} else if n%4 == 0 {
			<-time.After(time.Millisecond)
		}
	}
	dir.Before = func(c storetest.Call) error { wait(c); return nil }
	dir.After = wait

	// The power fails again and again. What each failure leaves is checked later.
	type failure struct {
		at               time.Time
		answered, before int // states: at least what was answered, at most what is being done
		image            *storetest.Dir
	}
	var failures []failure
	var answered, before atomic.Int64

	stop, stopped := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(stopped)
		random := rand.New(rand.NewPCG(seed, 22))
		for {
			f := failure{at: time.Now(), answered: int(answered.Load())}
			f.image = dir.Crash(random)
			f.before = int(before.Load())
			failures = append(failures, f)
			select {
			case <-time.After(time.Duration(random.Int64N(int64(stall)))):
			case <-stop:
				return
			}
		}
	}()

	// states has the store before each step, and answers when those after a Commit were answered.
	m := storetest.NewModel()
	states, answers := []storetest.Model{m.Clone()}, map[int]time.Time{}
	step := func(x func()) {
		before.Store(int64(len(states)))
		x()
		states = append(states, m.Clone())
	}

	for range 40 {
		for range random.IntN(6) {
			step(func() { storetest.RandomStep(t, random, d, m) })
		}
		if random.IntN(3) == 0 { // several frames
			for range random.IntN(8) {
				key, value := fmt.Sprint("key", random.IntN(3)), strings.Repeat("v", 700)
				step(func() { storetest.Step{Op: "Set", Key: key, Value: value}.Do(t, d, m) })
			}
		}

		if err := d.Commit(); err != nil {
			t.Fatal(err)
		}
		answered.Store(int64(len(states) - 1))
		answers[len(states)-1] = time.Now()
		<-time.After(time.Duration(random.IntN(2)) * time.Duration(random.Int64N(int64(3*stall))))
	}

	close(stop)
	<-stopped
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}

	for _, f := range failures {
		if fsync > 0 { // lost: what came after the fsync before the one that runs, or a rotation's
			least := 0
			for state, at := range answers {
				if f.at.Sub(at) >= 2*fsync+6*stall {
					least = max(least, state)
				}
			}
			f.answered = min(f.answered, least)
		}

		again, err := openSmall(f.image, Options{Fsync: FsyncNever})
		if err != nil {
			t.Fatalf("seed %d, fsync %v: what a power failure leaves is refused: %v", seed, fsync,
				err)
		}
		isThis := func(m storetest.Model) bool { return m.Equal(again) }
		if !slices.ContainsFunc(states[f.answered:f.before+1], isThis) {
			t.Fatalf("seed %d, fsync %v: a power failure leaves state %d (-1: none), want %d to %d",
				seed, fsync, slices.IndexFunc(states, isThis), f.answered, f.before)
		}
	}
}

// Ensure that when any one call fails, once or from then on, no Commit returns nil for
// data that is not on disk, and that everything that was told is there at the next start.
func TestEveryCallFails(t *testing.T) {
	for _, forever := range []bool{false, true} {
		for n, failed := 1, true; failed; n = storetest.Next(n, 3) {
			dir := storetest.New()
			dir.FailAt, dir.Forever = n, forever
			h := storetest.NewHistory()

			d, err := openSmall(dir, Options{})
			if err == nil {
				if err = storetest.Script(t, d, h); err != nil {
					if again := d.Commit(); again == nil {
						t.Fatalf("call %d: Commit fails with %v, then returns nil", n, err)
					}
				}
				closeErr := d.Close()
				if err != nil && closeErr == nil {
					t.Fatalf("call %d: Close after %v returns nil", n, err)
				}
				err = closeErr
			} else if !errors.Is(err, storetest.ErrDisk) {
				t.Fatalf("call %d: Open: %v", n, err)
			}

			failed = dir.Calls >= n
			dir.FailAt = 0
			checkKept(t, h, dir.Crash(rand.New(rand.NewPCG(uint64(n), 2))),
				fmt.Sprintf("call %d failed (for ever: %v), then the power", n, forever))
			if err == nil {
				continue
			}

			// Now without a power failure: the kernel still has what was written.
			dir.Locked = false
			what := fmt.Sprintf("call %d failed (for ever: %v), then", n, forever)
			checkKept(t, h, dir, what)

			// The start must not rely on data that a failed Sync left only in the kernel's memory.
			if d, err = openSmall(dir, Options{}); err != nil {
				t.Fatalf("%s: %v", what, err)
			}
			d.Put("after", "all")
			if err := d.Commit(); err != nil {
				t.Fatalf("%s: Commit: %v", what, err)
			}

			if d, err = openSmall(dir.Crash(rand.New(rand.NewPCG(uint64(n), 3))),
				Options{}); err != nil || len(d.Get("after")) != 1 {
				t.Fatalf("%s: a Put committed after the restart is lost to a power failure: %v",
					what, err)
			}
		}
	}
}

// Ensure that a missing descriptor does not end the store, whichever call lacks it.
func TestMissingDescriptors(t *testing.T) {
	for n, failed := 1, true; failed; n = storetest.Next(n, 3) {
		dir := storetest.New()
		h := storetest.NewHistory()
		d, err := openSmall(dir, Options{})
		if err != nil {
			t.Fatal(err)
		}

		dir.FailAt, dir.Failure = dir.Calls+n, syscall.EMFILE
		if err := storetest.Script(t, d, h); err != nil {
			t.Fatalf("call %d lacks a descriptor: %v", n, err)
		}
		failed = dir.Calls >= dir.FailAt
		if d.Close(); d.failure() != nil {
			t.Fatalf("call %d lacks a descriptor: %v", n, d.failure())
		}

		dir.FailAt = 0
		checkKept(t, h, dir, fmt.Sprintf("call %d lacked a descriptor, then", n))
	}
}

// Ensure that a full disk lets a store start, read and Delete, that a write is
// refused before anything has changed, and that nothing is lost when room comes back.
func TestFullDisk(t *testing.T) {
	dir := storetest.New()
	d, err := openStill(dir, Options{})
	if err != nil {
		t.Fatal(err)
	}
	d.zerosAhead = 4096
	for i := range 100 {
		if err := d.Room("", 110, 0); err != nil {
			t.Fatal(err)
		}
		d.Put(fmt.Sprint("key", i), strings.Repeat("v", 100))
		d.Commit()
	}
	d.Close()
	size := sizeOf(dir)

	for _, crashed := range []bool{false, true} {
		full := dir.With(storage.LockName, nil)
		if full.Room = size; crashed {
			f := full.Names["seg-1.log"] // so that the frame of a clean stop is gone
			clear(f.Data[d.size-frameSize : d.size])
			copy(f.Disk, f.Data)
		}

		d, err := openStill(full, Options{})
		if err != nil {
			t.Fatalf("crashed: %v: a start on a full disk: %v", crashed, err)
		}
		d.zerosAhead = 4096

		held := len(d.Get("key7"))
		if err := d.Room("", 2000, 0); !errors.Is(err, syscall.ENOSPC) {
			t.Errorf("room for a Put: %v", err)
		}
		if err := d.Room("", 100, 0); !errors.Is(err, syscall.ENOSPC) {
			t.Errorf("a Put may take the room that is kept for Deletes: %v", err)
		}

		deleted := 0
		for i := range 5 {
			if err := roomToDelete(d, fmt.Sprint("key", i)); err != nil {
				t.Fatalf("room for a Delete: %v", err)
			}
			deleted += d.Delete(fmt.Sprint("key", i))
			if err := d.Commit(); err != nil {
				t.Fatal(err)
			}
		}

		// There is room again, and Room asks the disk at once.
		full.Room, d.roomAfter = 0, time.Time{}
		if err := d.Room("", 2000, 0); err != nil {
			t.Errorf("with room again: %v", err)
		}
		d.Put("more", strings.Repeat("v", 2000))
		if err := d.Close(); err != nil {
			t.Fatal(err)
		}

		again, err := openStill(full, Options{})
		if err != nil || held != 1 || deleted != 5 || len(again.Get("key1")) != 0 ||
			len(again.Get("key7")) != 1 || len(again.Get("more")) != 1 {
			t.Errorf("crashed: %v: in the end: %v, %d keys", crashed, err, keysOf(again))
		}
	}
}

// Ensure that a store on a disk that is full to the last byte stops without an error, and has all
// its data at the next start.
func TestStopOnAFullDisk(t *testing.T) {
	dir, name, starts := segment(t, 3)
	full := dir.With(name,
		dir.Names[name].Data[:starts[3]]) // as a power failure leaves it, without the zeros
	for _, f := range full.Names {
		full.Room += len(f.Data)
	}

	d, err := openStill(full, Options{})
	if err != nil {
		t.Fatal(err)
	}
	if err := d.Close(); err != nil {
		t.Errorf("a stop: %v", err)
	}

	if d, err = openStill(full, Options{}); err != nil ||
		len(d.Get("key")) != 3 {
		t.Errorf("after it: %v", err)
	}
}

// Ensure that everything can be deleted after a stop on a full disk, even if all room for Deletes
// was in the log, and another program takes what is free then.
func TestStopKeepsRoomForDeletes(t *testing.T) {
	dir, d := newSmall(t, Options{Fsync: FsyncNever})
	d.zerosAhead, d.segmentSize = 30_000, 1<<20
	d.Put("key", "value")
	if err := d.Commit(); err != nil {
		t.Fatal(err)
	}

	// The disk is full, except for the room in the log.
	dir.Room = sizeOf(dir)
	fillDisk(t, d, 20, 1, 1)
	if err := d.Close(); err != nil || dir.Handles > 0 {
		t.Fatalf("Close: %v, and %d files are open", err, dir.Handles)
	}

	dir.Room = sizeOf(dir)
	d, err := openSmall(dir, Options{Fsync: FsyncNever})
	if err != nil {
		t.Fatal(err)
	}

	// While SPARE cannot be shortened, there is no room.
	dir.Before = func(c storetest.Call) error {
		if c == (storetest.Call{What: "truncate", Name: spareName}) {
			return storetest.ErrDisk
		}
		return nil
	}
	if err := roomToDelete(d, "key"); !errors.Is(err, storetest.ErrDisk) {
		t.Errorf("SPARE cannot be shortened: %v", err)
	}
	dir.Before, d.noDelete = nil, refusal{}

	for i, key := range slices.Sorted(maps.Keys(maps.Collect(d.All()))) {
		if err := roomToDelete(d, key); err != nil {
			t.Fatalf("no room for Delete %d: %v", i, err)
		}
		d.Delete(key)
		if err := d.Commit(); err != nil {
			t.Fatal(err)
		}
	}
	if !d.diskIsFull.Load() {
		t.Error("the disk counts as not full: the timer may use room that Deletes need")
	}
	d.Close()
}

// Ensure that a full disk keeps room to delete everything in the log if SPARE cannot be made.
func TestDeletesWithoutSpare(t *testing.T) {
	dir, d := newSmall(t, Options{Fsync: FsyncNever})
	d.minCompact = 1 << 40
	dir.Room = 40_000
	dir.Before = func(c storetest.Call) error {
		if c == (storetest.Call{What: "create", Name: spareName}) {
			return storetest.ErrDisk
		}
		return nil
	}
	pairs := fillDisk(t, d, 20, 1, 1)
	if len(pairs) < 10 {
		t.Fatalf("only %d writes are taken", len(pairs))
	}

	// Nothing but the log has room now.
	for i, p := range pairs {
		if err := roomToDelete(d, p[0]); err != nil {
			t.Fatalf("no room for Delete %d of %d: %v", i, len(pairs), err)
		}
		d.Delete(p[0])
		if err := d.Commit(); err != nil {
			t.Fatal(err)
		}
	}
	d.Close()
}

// Ensure that no log is compacted for a request that finds room without that, and that a store that
// has failed asks for no room at all: it may be another process's by then.
func TestRoomIsAskedFirst(t *testing.T) {
	dir, d := newSmall(t, Options{Fsync: FsyncNever})
	d.minCompact = 1 << 40

	// The log is much larger than the data.
	d.Put("key", "value")
	for range 50 {
		d.Set("more", strings.Repeat("v", 200))
		if err := errors.Join(d.Room("", 300, 0), d.Commit()); err != nil {
			t.Fatal(err)
		}
	}
	d.Put("key", "value")
	if err := errors.Join(d.Room("", 3000, 0), d.Room("key", 6000, 1)); err != nil || d.snapshot > 0 {
		t.Errorf("there is room: %v; it has snapshot %d", err, d.snapshot)
	}

	// From here on the directory is another process's.
	dir.Moved = storage.ErrMoved
	if err := d.Commit(); !errors.Is(err, storage.ErrMoved) {
		t.Errorf("a Commit after the loss of the directory: %v", err)
	}
	calls := dir.Calls
	if err := errors.Join(d.Room("", 9000, 0), d.Room("key", 9000, 1)); err != nil || dir.Calls > calls {
		t.Errorf("after a failure %d calls for room: %v", dir.Calls-calls, err)
	}
	d.Close()
}

// Ensure that a start that fails leaves no file open.
func TestFailedStartClosesItsFiles(t *testing.T) {
	for n := 1; ; n++ {
		dir := storetest.New()
		dir.FailAt = n
		d, err := openStill(dir, Options{})
		if dir.Calls < n {
			break
		}
		if err == nil {
			d.Close()
		}
		if dir.Handles != 0 {
			t.Errorf("call %d failed: %v, and %d files are open", n, err, dir.Handles)
		}
	}
}

// Ensure that on a full disk everything can be deleted, one key at a time, whatever the sizes of
// keys and values, and that writes are taken again when there is room.
func TestFullDiskDeletesEverything(t *testing.T) {
	for what, sizes := range map[string][2]int{"small": {5, 10}, "large keys": {500, 1},
		"large values": {10, 3000}, "one key": {20_000, 500}} {
		for _, restarted := range []bool{false, true} {
			synctest.Test(t, func(t *testing.T) {
				log := &strings.Builder{}
				opts := Options{Log: slog.New(slog.NewTextHandler(log, nil))}
				dir, d := newSmall(t, opts)
				dir.Room = 300_000

				// Fill the disk.
				value, n := strings.Repeat("v", sizes[1]), 0
				key := func(i int) string { return fmt.Sprintf("%0*d", sizes[0], i) }
				var err error

				for ; n < 3000; n++ {
					k := key(n)
					if what == "one key" {
						k = key(0)
					}
					if err = d.Room("", int64(len(k)+len(value)), 0); err != nil {
						break
					}
					d.Put(k, value)
					if err := d.Commit(); err != nil {
						t.Fatal(err)
					}
					d.AwaitCompaction()
				}
				if !errors.Is(err, syscall.ENOSPC) {
					t.Fatalf("%s: the disk is not full after %d: %v", what, n, err)
				}

				if restarted {
					d.Close()
					if d, err = openSmall(dir, opts); err != nil {
						t.Fatalf("%s: a start on a full disk: %v", what, err)
					}
				}

				// Delete everything. Time passes meanwhile, so that the timer ticks.
				keys := slices.Sorted(maps.Keys(maps.Collect(d.All())))
				for i, k := range keys {
					if err := roomToDelete(d, k); err != nil {
						t.Fatalf("%s: no room for Delete %d of %d: %v", what, i, len(keys), err)
					}
					d.Delete(k)
					if err := d.Commit(); err != nil {
						t.Fatalf("%s: Delete %d of %d: %v", what, i, len(keys), err)
					}
					if i%3 == 0 {
						<-time.After(2 * vouchTime)
					}
				}
				d.AwaitCompaction()

				dir.Room = 0
				<-time.After(roomTime)
				if err := d.Room("", int64(sizes[0]+sizes[1]), 0); err != nil {
					t.Errorf("%s: with room again: %v", what, err)
				}
				d.Put("k", "v")
				if err := d.Close(); err != nil {
					t.Errorf("%s: %v", what, err)
				}

				again, err := openSmall(dir, Options{})
				if err != nil || keysOf(again) != 1 {
					t.Errorf("%s: opened again: %v, %d keys", what, err, keysOf(again))
				}
				if !restarted && strings.Count(log.String(), "writes are taken") != 1 {
					t.Errorf("%s: the log says\n%s", what, log)
				}
			})
		}
	}
}

// Ensure that everything can be deleted on a full disk, whatever was written, refused and deleted
// before.
func TestFullDiskDeletesEverythingInAnyMix(t *testing.T) {
	for seed := 0; seed < 100; seed = storetest.Next(seed, 3) {
		random := rand.New(rand.NewPCG(uint64(seed), 1))
		dir, d := newSmall(t, Options{Fsync: FsyncNever})
		dir.Room, d.zerosAhead = 30_000+random.IntN(200_000), 16*300 // SPARE has a frame to spare
		commit := func() {
			if err := d.Commit(); err != nil {
				t.Fatalf("seed %d: %v", seed, err)
			}
		}
		remove := func(key string) {
			if err := roomToDelete(d, key); err != nil {
				t.Fatalf("seed %d: no room for a Delete: %v", seed, err)
			}
			d.Delete(key)
			commit()
		}

		refused := 0
		for range 400 {
			// Otherwise Room would repeat a refusal without asking the disk.
			d.roomAfter = time.Time{}
			key := fmt.Sprintf("%0*d", 1+random.IntN(1+random.IntN(500)), random.IntN(50))
			value := strings.Repeat("v", random.IntN(1+random.IntN(20_000)))
			if random.IntN(5) == 0 {
				remove(key)
			} else if d.Room("", int64(len(key)+len(value)), 0) != nil {
				refused++
			} else {
				d.Put(key, value)
				commit()
			}
		}

		d.AwaitCompaction()
		for key := range maps.Collect(d.All()) {
			remove(key)
		}
		if err := d.Close(); err != nil || refused == 0 {
			t.Errorf("seed %d: %d writes were refused; Close: %v", seed, refused, err)
		}
	}
}

// Ensure that everything can be deleted when no file may become larger: after several starts, which
// must not use up the room that it takes to go on in the next file, and also when the disk is full.
func TestLargestFileDeletesEverything(t *testing.T) {
	type limits struct{ starts, room int }
	cases := []limits{{0, 0}, {1, 0}, {5, 0}, {20, 0}}
	for n := 0; n < 48; n = storetest.Next(n, 3) {
		cases = append(cases, limits{0, 104_000 + n*168})
	}
	for _, c := range cases {
		dir, d := newSmall(t, Options{})
		d.segmentSize, dir.Segment, dir.Largest, dir.Room = 1<<20, 1<<20, 100_000, c.room
		commit := func() {
			if err := d.Commit(); err != nil {
				t.Fatalf("%+v: %v", c, err)
			}
		}

		var keys []string
		for d.Room("", 1010, 0) == nil {
			keys = append(keys, fmt.Sprintf("key%07d", len(keys)))
			d.Put(keys[len(keys)-1], strings.Repeat("v", 1000))
			commit()
		}
		if err := d.Room("", 1010, 0); !storage.IsFull(err) || len(keys) < 50 {
			t.Fatalf("%+v: full after %d: %v", c, len(keys), err)
		}

		for range c.starts {
			var err error
			if err = d.Close(); err == nil {
				d, err = openSmall(dir, Options{})
			}
			if err != nil {
				t.Fatalf("%+v: a restart: %v", c, err)
			}
			d.segmentSize = 1 << 20
		}

		for i, key := range keys {
			if err := roomToDelete(d, key); err != nil {
				t.Fatalf("%+v: Delete %d of %d: %v", c, i, len(keys), err)
			}
			d.Delete(key)
			if i%3 == 0 { // the others are committed together with the next one
				commit()
			}
		}

		if err := d.Close(); err != nil {
			t.Fatalf("%+v: %v", c, err)
		}
		if again, err := openSmall(dir, Options{}); err != nil || keysOf(again) != 0 {
			t.Errorf("%+v: opened again: %v, %d keys", c, err, keysOf(again))
		}
	}
}

// Ensure that a write that Room admits succeeds, however little room there is.
func TestRoomIsThere(t *testing.T) {
	for room := 500; room < 12_000; room += 37 {
		dir, d := newSmall(t, Options{})
		dir.Room, d.zerosAhead = room, 3000
		for i := range 40 {
			if d.Room("", 300, 0) != nil {
				break
			}
			d.Put(fmt.Sprint("key", i), strings.Repeat("v", 290))
			if err := d.Commit(); err != nil {
				t.Fatalf("with %d bytes, Put %d: %v", room, i, err)
			}
			d.AwaitCompaction()
		}

		if err := d.Close(); err != nil {
			t.Fatalf("with %d bytes: %v", room, err)
		}
	}
}

// roomToDelete is Room for a Delete of key.
func roomToDelete(d *Store, key string) error {
	return d.Room(key, int64(len(key)), math.MaxInt)
}

// sizeOf returns how many bytes all files have.
func sizeOf(dir *storetest.Dir) (size int) {
	for _, f := range dir.Names {
		size += len(f.Data)
	}
	return size
}

// Ensure that while small writes find room, and large ones do not, the log does not say that there
// is room again, and that one that comes again soon does not ask the disk.
func TestNearlyFullDisk(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		log := &strings.Builder{}
		dir, d := newSmall(t, Options{Fsync: FsyncNever,
			Log: slog.New(slog.NewTextHandler(log, nil))})
		d.zerosAhead, d.minCompact = 31_000, 1<<40

		put := func(large bool) {
			t.Helper()
			const size = 30_000
			if err := d.Room("", size, 0); (err == nil) != large {
				t.Fatalf("a large write: %v, the log says\n%s", err, log)
			}
			calls := dir.Calls
			if d.Room("", size, 0); dir.Calls != calls {
				t.Errorf("asked again, a large write makes %d calls", dir.Calls-calls)
			}
			if err := d.Room("", 10, 0); err != nil {
				t.Fatalf("a small one: %v", err)
			}
			<-time.After(roomTime)
			calls = dir.Calls
			if d.Room("", 10, 0); dir.Calls != calls {
				t.Errorf("asked again, a small write makes %d calls", dir.Calls-calls)
			}
			d.Set("key", "value")
			if err := d.Commit(); err != nil {
				t.Fatal(err)
			}
		}

		put(true)
		d.Put("filler", strings.Repeat("v", 20_000))
		d.Commit()
		dir.Room = sizeOf(dir) + 4000 // others fill the disk
		for range 20 {
			put(false)
		}

		// Room for a smaller write that was refused, too, is not enough.
		const middle = 20_000
		if d.Room("", middle, 0) == nil {
			t.Fatal("there is room for a smaller write")
		}
		dir.Room += middle
		<-time.After(rotateTime)
		if err := d.Room("", middle, 0); err != nil {
			t.Fatalf("a smaller write: %v", err)
		}
		if strings.Contains(log.String(), "writes are taken") {
			t.Errorf("the log says\n%s", log)
		}

		dir.Room = 0
		<-time.After(rotateTime)
		if err := d.Room("", 10, 0); err != nil || strings.Count(log.String(), "writes are taken") != 1 {
			t.Errorf("with room again: %v, the log says\n%s", err, log)
		}
		put(true)
		if d.Close(); strings.Count(log.String(), "writes are taken") != 1 {
			t.Errorf("in the end the log says\n%s", log)
		}
	})
}

// Ensure that a large write that is refused takes no room from small ones.
func TestRefusedWriteTakesNoRoom(t *testing.T) {
	dir, d := newSmall(t, Options{Fsync: FsyncNever})
	d.minCompact = 1 << 40
	dir.Room = sizeOf(dir) + 40_000

	for i := range 100 {
		if err := d.Room("", 60_000, 0); !storage.IsFull(err) {
			t.Fatalf("a large write: %v", err)
		}
		if err := d.Room("", 110, 0); err != nil {
			t.Fatalf("small write %d: %v", i, err)
		}
		d.Put("key", strings.Repeat("v", 100))
		if err := d.Commit(); err != nil {
			t.Fatal(err)
		}
	}
	d.Close()
}

// Ensure that a write that fits into the log's room is taken if SPARE gets as much as it must have
// for it, though the disk has no room for the whole step in which SPARE grows.
func TestSpareGetsTheLastBytes(t *testing.T) {
	for _, missing := range []int{0, 1} {
		dir, d := newSmall(t, Options{Fsync: FsyncNever})
		if err := d.Room("", 100, 0); err != nil {
			t.Fatal(err)
		}

		// SPARE has whole steps so far. If a step does not fit, half of it is tried.
		half := d.zerosAhead / 2
		dir.Room = sizeOf(dir) + half - missing
		err := d.roomBeside(d.room, d.spare.fileSize+int64(half))
		if storage.IsFull(err) != (missing > 0) {
			t.Errorf("%d bytes are missing: %v", missing, err)
		}
		d.Close()
	}
}

// Ensure that requests that free room, and are refused on a full disk again and again, ask the disk
// only ten times a second; that smaller ones are tried; and that they are taken soon after there is
// room again, at once after a compaction.
func TestRefusedRemovesAskSeldom(t *testing.T) {
	for _, removes := range []int{1, 1000} { // of a list of 20
		synctest.Test(t, func(t *testing.T) {
			dir, d := newSmall(t, Options{Fsync: FsyncNever})
			dir.Room = 200_000
			d.minCompact = 1 << 40
			d.compactAfter = time.Now().Add(time.Hour) // or it may be compacted into SPARE
			pairs := fillDisk(t, d, 500, 9, 20)
			if removes > 1 { // a Delete finds no room only if SPARE is gone
				d.spare.cut(0)
				dir.Room = sizeOf(dir)
			}

			ask := func(bytes int64) error { return d.Room(pairs[0][0], bytes, removes) }
			for ask(700) == nil {
				d.Update(pairs[0][0], pairs[0][1], pairs[0][1])
				if err := d.Commit(); err != nil {
					t.Fatal(err)
				}
			}

			for range 5 {
				before := dir.Calls
				for i := range int64(1000) {
					if err := ask(700 + i%2); !storage.IsFull(err) {
						t.Fatalf("removes %d: a request on a full disk: %v", removes, err)
					}
				}
				if n := dir.Calls - before; n > 40 {
					t.Errorf("removes %d: 1000 refused requests make %d calls", removes, n)
				}
				<-time.After(roomTime)
			}

			// A refused Remove is no reason to refuse a Delete, which may use all of SPARE.
			ask(700)
			if long := strings.Repeat("k", 500); removes == 1 {
				if err := d.Room(long, 1000, 1); err != nil {
					t.Errorf("a Delete behind a refused Remove: %v", err)
				}
			}

			// Less may fit, and so it is tried.
			ask(700)
			before := dir.Calls
			if ask(699); dir.Calls == before {
				t.Errorf("removes %d: a smaller request is not tried", removes)
			}
			ask(700)

			// What another program leaves is noticed later, but what a compaction frees at once.
			dir.Room = 0
			if err := ask(700); !storage.IsFull(err) {
				t.Errorf("removes %d: just after it was refused: %v", removes, err)
			}
			if removes == 1 {
				<-time.After(roomTime)
			} else if !d.rotateEarly() || d.compactNow() != nil {
				t.Fatal("no compaction")
			}
			if err := ask(700); err != nil {
				t.Errorf("removes %d: with room again: %v", removes, err)
			}
			d.Close()
		})
	}
}

// Ensure that a store on a full disk takes writes again once everything was deleted, even if its
// log is too small for an ordinary compaction, and after a restart; and that what is not committed
// yet, when the log is compacted for that, is in the log once.
func TestDeletedRoomIsWrittenAgain(t *testing.T) {
	for _, restarted := range []bool{false, true} {
		dir, d := newSmall(t, Options{Fsync: FsyncNever})
		dir.Room, dir.Block, d.zerosAhead, d.minCompact = 1<<20, 4<<10, 16*12<<10, 1<<40
		write := func() int {
			n := 0
			for ; d.Room("", 50_010, 0) == nil; n++ {
				d.Put(fmt.Sprint("key", n), strings.Repeat("v", 50_000))
				if err := d.Commit(); err != nil {
					t.Fatal(err)
				}
			}
			return n
		}

		written := write()
		for i := range written {
			if err := roomToDelete(d, fmt.Sprint("key", i)); err != nil {
				t.Fatal(err)
			}
			d.Delete(fmt.Sprint("key", i))
			if err := d.Commit(); err != nil {
				t.Fatal(err)
			}
		}

		if restarted {
			err := d.Close()
			if err == nil {
				d, err = openSmall(dir, Options{Fsync: FsyncNever})
			}
			if err != nil {
				t.Fatal(err)
			}
			d.zerosAhead, d.minCompact = 16*12<<10, 1<<40
		}

		d.roomAfter = time.Time{}
		d.Put("pending", "v")
		if again := write(); written < 10 || again < written-2 {
			t.Errorf("restarted: %v: %d were written, and %d when all was deleted", restarted, written, again)
		}
		if err := d.Close(); err != nil {
			t.Error(err)
		}
		wantAll(t, fmt.Sprintf("restarted: %v: opened again", restarted), dir, maps.Collect(d.All()))
	}
}

// Ensure that if SPARE cannot get all the room to delete everything, the rest is kept in the log.
func TestLogIsSpared(t *testing.T) {
	dir, d := newSmall(t, Options{Fsync: FsyncNever})
	d.segmentSize, d.minCompact = 1<<20, 1<<40
	d.compactAfter = time.Now().Add(time.Hour) // otherwise the log may be compacted into SPARE
	if err := errors.Join(d.Room("", 10, 0), d.makeRoom(50_000)); err != nil {
		t.Fatal(err)
	}

	// The log has room, and from now on SPARE gets none.
	dir.Room = sizeOf(dir)
	key := func(i int) string { return fmt.Sprintf("%01000d", i) }
	n := 0
	for ; d.Room("", 1001, 0) == nil; n++ {
		d.Put(key(n), "v")
		if err := d.Commit(); err != nil {
			t.Fatal(err)
		}
	}
	if n < 20 {
		t.Fatalf("the disk is full after %d", n)
	}

	for i := range n {
		if err := roomToDelete(d, key(i)); err != nil {
			t.Fatalf("no room for Delete %d of %d: %v", i, n, err)
		}
		d.Delete(key(i))
		if err := d.Commit(); err != nil {
			t.Fatal(err)
		}
	}
	if err := d.Close(); err != nil {
		t.Error(err)
	}
}

// fillDisk puts n values under each of several keys of this many bytes, until the disk is full, and
// returns all of them, in the order in which they were put.
func fillDisk(t *testing.T, d *Store, keySize, valueSize, n int) (pairs [][2]string) {
	t.Helper()
	for i := 0; ; i++ {
		key := fmt.Sprintf("%0*d", keySize, i/n)
		value := fmt.Sprintf("%0*d", valueSize, i)
		if d.Room(key, int64(len(key)+len(value)), 0) != nil {
			return pairs
		}
		d.Put(key, value)
		if err := d.Commit(); err != nil {
			t.Fatalf("it fails before the disk is full: %v", err)
		}
		pairs = append(pairs, [2]string{key, value})
	}
}

// Ensure that on a full disk all values of long keys, and all large values of short ones, can be
// removed, one at a time.
func TestFullDiskRemovesEverything(t *testing.T) {
	for _, c := range []struct{ key, value, n int }{{2000, 9, 1000}, {2000, 3, 20}, {9, 90_000, 1}} {
		dir, d := newSmall(t, Options{})
		d.minCompact = 1 << 40
		dir.Room = 200_000
		pairs := fillDisk(t, d, c.key, c.value, c.n)
		if len(pairs) == 0 {
			t.Fatalf("%+v: no value fits", c)
		}
		pairs = append(pairs, fillDisk(t, d, c.key+1, 1, 1)...) // the last room

		for i, p := range pairs {
			key, value := p[0], p[1]
			if err := d.Room(key, int64(len(key)+len(value)), 1); err != nil {
				t.Fatalf("%+v: no room for Remove %d of %d: %v", c, i, len(pairs), err)
			}
			if !d.Remove(key, value) {
				t.Fatalf("%+v: %s is not there", c, value)
			}
			if err := d.Commit(); err != nil {
				t.Fatal(err)
			}
		}

		if err := d.Close(); err != nil {
			t.Error(err)
		}
		if again, err := openSmall(dir, Options{}); err != nil || keysOf(again) != 0 {
			t.Errorf("%+v: opened again: %v", c, err)
		}
	}
}

// Ensure that on a full disk the only value of a key can be removed even if it is larger than all
// the room that is kept: the log gets the key alone.
func TestFullDiskRemovesAnOnlyValue(t *testing.T) {
	dir, d := newSmall(t, Options{})
	d.minCompact = 1 << 40

	value := strings.Repeat("v", 10*d.zerosAhead)
	if err := d.Room("key", int64(3+len(value)), 0); err != nil {
		t.Fatal(err)
	}
	d.Put("key", value)
	if err := d.Commit(); err != nil {
		t.Fatal(err)
	}

	// Afterwards SPARE is as long as Deletes need, and not as this write needed.
	if !d.rotateEarly() || d.compactNow() != nil {
		t.Fatal("nothing is compacted")
	}
	dir.Room = sizeOf(dir)
	if err := d.Room("key", int64(3+len(value)), 1); err != nil || !d.Remove("key", value) {
		t.Errorf("no room to remove a key's only value: %v", err)
	}

	if err := d.Close(); err != nil {
		t.Error(err)
	}
	if again, err := openSmall(dir, Options{}); err != nil || keysOf(again) != 0 {
		t.Errorf("opened again: %v", err)
	}
}

// Ensure that on a full disk Removes and Takes, however many come, leave the room that it takes to
// delete every key.
func TestFullDiskKeepsRoomForDeletes(t *testing.T) {
	for _, takes := range []bool{false, true} {
		dir, d := newSmall(t, Options{})
		d.minCompact = 1 << 40
		dir.Room = 200_000
		keySize := 20
		if takes {
			keySize = 1000 // the log of a Take has no value
		}
		pairs := fillDisk(t, d, keySize, 1000, 2)

		refused := 0
		for _, p := range pairs {
			key, value := p[0], p[1]
			bytes := int64(len(key) + len(value))
			switch {
			case d.Room(key, bytes, 1) != nil:
				refused++
			case takes:
				d.Take(key)
			default:
				d.Remove(key, value)
			}
			if err := d.Commit(); err != nil {
				t.Fatal(err)
			}
		}

		keys := slices.Sorted(maps.Keys(maps.Collect(d.All())))
		if refused == 0 || len(keys) == 0 {
			t.Fatalf("takes %v: %d were refused, and %d keys are left", takes, refused, len(keys))
		}

		for i, key := range keys {
			if err := roomToDelete(d, key); err != nil {
				t.Fatalf("takes %v: no room for Delete %d of %d: %v", takes, i, len(keys), err)
			}
			d.Delete(key)
			if err := d.Commit(); err != nil {
				t.Fatal(err)
			}
		}

		if err := d.Close(); err != nil {
			t.Error(err)
		}
		if again, err := openSmall(dir, Options{}); err != nil || keysOf(again) != 0 {
			t.Errorf("takes %v: opened again: %v", takes, err)
		}
	}
}

// Ensure that everything can be deleted on a full disk, even if another program takes all room that
// a compaction gives back.
func TestFullDiskKeepsRoomOfACompaction(t *testing.T) {
	dir, d := newSmall(t, Options{})
	d.minCompact = 1 << 40
	dir.Room = 200_000
	pairs := fillDisk(t, d, 1000, 1, 3)
	snapshot := d.snapshot

	for i, p := range pairs {
		if err := roomToDelete(d, p[0]); err != nil {
			t.Fatalf("no room for Delete %d of %d: %v", i, len(pairs), err)
		}

		// Another program takes what the compaction has given back.
		if d.snapshot > snapshot {
			dir.Room, snapshot = sizeOf(dir), d.snapshot
		}

		d.Delete(p[0])
		if err := d.Commit(); err != nil {
			t.Fatal(err)
		}
	}

	if snapshot == 0 {
		t.Error("nothing was compacted")
	}
	d.Close()
}

// Ensure that a rotation that fails while room is made for a Remove ends the store with its error:
// a frame behind the one that says that another file follows would be damage.
func TestFailedRotationOnAFullDisk(t *testing.T) {
	dir, d := newSmall(t, Options{})
	d.minCompact = 1 << 40
	dir.Room = 200_000
	pairs := fillDisk(t, d, 2000, 9, 1000)

	// A file is cut to its size after the frame that says that another file follows.
	dir.Before = func(c storetest.Call) error {
		if c.What == "truncate" && strings.HasPrefix(c.Name, "seg-") {
			return storetest.ErrDisk
		}
		return nil
	}

	var err error
	for i := 0; i < len(pairs) && err == nil; i++ {
		key, value := pairs[i][0], pairs[i][1]
		if d.Room(key, int64(len(key)+10), 1) == nil {
			d.Remove(key, value)
		}
		err = d.Commit()
	}

	if !errors.Is(err, storetest.ErrDisk) {
		t.Errorf("Commit returns %v, want %v", err, storetest.ErrDisk)
	}
	d.Close()
}

// Ensure that a start which cannot open SPARE goes on without it, even if the disk is full, and
// that the log says so once, until SPARE can be opened again.
func TestSpareCannotBeOpened(t *testing.T) {
	dir, d := newSmall(t, Options{})
	dir.Room = 20_000
	keys := 0
	for ; d.Room("", 300, 0) == nil; keys++ {
		d.Put(fmt.Sprint("key", keys), strings.Repeat("v", 280))
		if err := d.Commit(); err != nil {
			t.Fatal(err)
		}
	}
	d.Close()

	image, refused := dir.Kill(), 0
	image.Before = func(c storetest.Call) error {
		if c.What == "open" && c.Name == spareName && refused >= 0 {
			refused++
			return &os.PathError{Op: c.What, Path: c.Name, Err: os.ErrPermission}
		}
		return nil
	}

	log := &strings.Builder{}
	d, err := openSmall(image, Options{Log: slog.New(slog.NewTextHandler(log, nil))})
	if err != nil {
		t.Fatal(err)
	}

	wantTold := func(times int) {
		t.Helper()
		d.changed()
		if told := strings.Count(log.String(), "cannot open SPARE"); told != times {
			t.Errorf("the log tells of SPARE %d times, want %d:\n%s", told, times, log)
		}
	}

	wantTold(1)
	was := refused
	refused = -1 // SPARE can be opened
	wantTold(1)

	// SPARE is lost once more after it could be opened, so this is logged again.
	refused = was
	d.spare.f.Close()
	d.spare = logWriter{}
	wantTold(2)

	for i := range keys {
		if roomToDelete(d, fmt.Sprint("key", i)) == nil {
			d.Delete(fmt.Sprint("key", i))
		}
		if err := d.Commit(); err != nil {
			t.Fatal(err)
		}
	}

	wantTold(2)
	if err := d.Close(); err != nil {
		t.Errorf("Close: %v", err)
	}
}

// Ensure that SPARE gets its size back after somebody has cut or removed it, so that everything can
// still be deleted on a full disk.
func TestSpareIsCut(t *testing.T) {
	for _, what := range []string{"cut", "removed"} {
		synctest.Test(t, func(t *testing.T) {
			dir, d := newSmall(t, Options{})
			d.minCompact = 1 << 40
			key := func(i int) string { return strings.Repeat("k", 500) + fmt.Sprint(i) }
			write := func(i int) {
				d.Put(key(i), "value")
				if err := d.Commit(); err != nil {
					t.Fatal(err)
				}
			}

			const keys = 100
			for i := range keys {
				if err := d.Room("", 510, 0); err != nil {
					t.Fatal(err)
				}
				write(i)
			}

			if what == "removed" {
				if err := dir.Remove(spareName); err != nil {
					t.Fatal(err)
				}
			} else if f, err := dir.Extend(spareName); err != nil || f.Truncate(0) != nil {
				t.Fatal(err)
			}

			// A Commit checks the files, the next write restores SPARE, and then others fill the
			// disk.
			<-time.After(2 * lookTime)
			write(0)
			if err := d.Room("", 0, 0); err != nil {
				t.Fatal(err)
			}
			stamps, err := dir.Stamps()
			if err != nil {
				t.Fatal(err)
			}
			dir.Room = 1
			for _, stamp := range stamps {
				dir.Room += int(stamp.Size)
			}

			for i := range keys {
				if err := roomToDelete(d, key(i)); err != nil {
					t.Fatalf("SPARE was %s: no room for Delete %d of %d: %v", what, i, keys, err)
				}
				d.Delete(key(i))
				if err := d.Commit(); err != nil {
					t.Fatal(err)
				}
			}
			d.Close()
		})
	}
}

// Ensure that a compaction gives back most of SPARE once most keys have gone, and keeps enough.
func TestSpareShrinks(t *testing.T) {
	dir, d := newSmall(t, Options{})
	const keys = 2000
	for i := range keys {
		if err := d.Room("", 110, 0); err != nil {
			t.Fatal(err)
		}
		d.Put(strings.Repeat("k", 100)+fmt.Sprint(i), "value")
	}
	large := len(dir.Names[spareName].Data)

	for i := range keys - 1 {
		d.Delete(strings.Repeat("k", 100) + fmt.Sprint(i))
	}
	if _, err := d.rotate(); err != nil || d.compactNow() != nil {
		t.Fatal(err)
	}
	size, least := len(dir.Names[spareName].Data), int(d.toDelete(0))
	if size < least || size > 2*least+2*d.zerosAhead || size > large/2 {
		t.Errorf("SPARE has %d bytes, had %d with %d keys, and must have %d", size, large, keys, least)
	}
	d.Close()
}

// Ensure that Close after a failed Commit leaves SPARE alone: it may be another process's by now.
func TestSpareOfAnotherProcess(t *testing.T) {
	dir, d := newSmall(t, Options{})
	d.Put("key", "value")
	d.diskIsFull.Store(true)
	dir.Moved = storage.ErrMoved
	if err := d.Commit(); !errors.Is(err, storage.ErrMoved) {
		t.Fatal(err)
	}

	theirs := []byte("theirs")
	dir.Names[spareName] = storetest.FileOf(theirs)
	d.Close()
	if got := dir.Names[spareName].Data; !bytes.Equal(got, theirs) {
		t.Errorf("Close has made SPARE one of %d bytes", len(got))
	}
}

// Ensure that on a full disk the log stays in its file: a new one would take room from Deletes.
func TestFullDiskMakesNoFile(t *testing.T) {
	dir, d := newSmall(t, Options{Fsync: FsyncNever})
	d.minCompact = 1 << 40
	dir.Room = 20_000
	n := 0
	for ; d.Room("", 10, 0) == nil; n++ {
		d.Put(fmt.Sprint("key", n), "value")
		if err := d.Commit(); err != nil {
			t.Fatal(err)
		}
	}

	d.compactAfter = time.Now().Add(time.Hour) // otherwise the log may be compacted into SPARE
	dir.Before = func(c storetest.Call) error {
		if c.What == "create" {
			t.Errorf("in file %d of %d bytes %s is made", d.number(), d.size, c.Name)
		}
		return nil
	}

	number := d.number()
	for i := range n {
		if err := roomToDelete(d, fmt.Sprint("key", i)); err != nil {
			t.Fatal(err)
		}
		d.Delete(fmt.Sprint("key", i))
		if err := d.Commit(); err != nil {
			t.Fatal(err)
		}
	}

	if d.number() != number || d.size < d.segmentSize {
		t.Errorf("it goes on in file %d of %d bytes, and was in file %d", d.number(), d.size, number)
	}
	d.Close()
}

// Ensure that nothing is lost if a process is killed before a new name in the directory is on disk,
// and the power fails at any time during the next start: files that a snapshot replaces are removed
// only when the snapshot has its name on disk.
func TestKilledThenThePowerFails(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		random := rand.New(rand.NewPCG(4, 4))
		type image struct {
			dir *storetest.Dir
			h   storetest.History
		}
		var images []image

		dir, d := newSmall(t, Options{})
		h := storetest.NewHistory()
		dir.Before = func(c storetest.Call) error {
			if c.What == "sync" && c.Name == "" {
				synctest.Wait() // if this is a compaction's Sync: for the Commit that began it
				told := storetest.History{Told: h.Told, Done: h.Done.Clone()}
				images = append(images, image{dir.Kill(), told})
			}
			return nil
		}

		if err := storetest.Script(t, d, h); err != nil {
			t.Fatal(err)
		}
		dir.Before = nil
		d.Close()

		for n, i := range images {
			var after []*storetest.Dir
			i.dir.Before = func(storetest.Call) error {
				for range 10 {
					after = append(after, i.dir.Crash(random))
				}
				return nil
			}

			d, err := openSmall(i.dir, Options{})
			if err != nil {
				t.Fatalf("killed before Sync %d of the directory: %v", n, err)
			}
			d.Close()

			for m, dir := range after {
				checkKept(t, &i.h, dir, fmt.Sprintf("killed before Sync %d of the directory, and the "+
					"power failed before call %d of the next start", n, m/10))
			}
		}
	})
}

// Ensure that a start succeeds after a first start that failed at any call, and a second one that a
// power failure stopped at any call.
func TestFirstStartThatFailed(t *testing.T) {
	for fail := 1; fail < 60; fail++ {
		dir := storetest.New()
		dir.FailAt = fail
		d, err := openStill(dir, Options{})
		dir.FailAt = 0
		if err == nil {
			d.Close()
			continue
		}

		for stop := 1; stop < 60; stop = storetest.Next(stop, 2) {
			for seed := range uint64(3) {
				second := dir.Kill()
				var images []*storetest.Dir
				calls := 0
				second.Before = func(c storetest.Call) error {
					if calls++; calls == stop {
						images = append(images, second.Crash(rand.New(rand.NewPCG(seed, uint64(stop)))))
					}
					return nil
				}

				d, err := openStill(second, Options{})
				if err != nil {
					t.Fatalf("fail %d: second: %v", fail, err)
				}
				second.Before = nil
				d.stopTimer()

				for _, image := range images {
					third, err := openStill(image, Options{})
					if err != nil {
						t.Errorf("fail %d stop %d seed %d: %v", fail, stop, seed, err)
						continue
					}
					third.stopTimer()
				}
			}
		}
	}
}
