package kvstore

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"kvserver/kvstore/disktest"
)

// TestMain lets the test binary be a second process on a store.
func TestMain(m *testing.M) {
	if dir := os.Getenv("KVSTORE_TEST_OPEN"); dir != "" {
		_, err := Open(context.Background(), dir, Options{})
		fmt.Print(err)
		return
	}
	os.Exit(m.Run())
}

// ---- what is kept

// openSmall opens a store whose files are full soon.
func openSmall(dir Directory, opts Options) (*Durable, error) {
	d, err := OpenIn(context.Background(), dir, opts)
	if err == nil {
		d.mu.Lock() // the timer may have something to do
		d.segmentSize, d.minCompact = 1500, 2000
		if d.reserve > 0 {
			d.reserve, d.spare = 700, 100
		}
		d.mu.Unlock()
	}
	return d, err
}

// newSmall opens one in a new directory.
func newSmall(t *testing.T, opts Options) (*disktest.Dir, *Durable) {
	t.Helper()
	dir := disktest.New()
	d, err := openSmall(dir, opts)
	if err != nil {
		t.Fatal(err)
	}
	return dir, d
}

// settle waits for the compaction that runs.
func (d *Durable) settle() {
	if d.compacted != nil {
		d.noteCompaction(<-d.compacted)
	}
}

// history is what a script has done to a store: what the last Commit that
// returned nil covers, and what the next would have.
type history struct{ told, done model }

func (m model) clone() model {
	c := model{}
	for key, list := range m {
		c[key] = slices.Clone(list)
	}
	return c
}

// script does the same things to a store each time, until one fails.
func script(t *testing.T, d *Durable, h *history) error {
	random := rand.New(rand.NewPCG(7, 7))
	for range 60 {
		for range random.IntN(8) {
			randomStep(t, random, d, h.done)
		}
		if err := d.Commit(); err != nil {
			return err
		}
		h.told = h.done.clone()
		d.settle()
	}
	return nil
}

func (m model) equal(d *Durable) bool {
	return maps.EqualFunc(maps.Collect(d.All()), m, slices.Equal[[]string])
}

// checkKept opens what a crash left and wants all that was told, and nothing
// that was not done.
func (h *history) checkKept(t *testing.T, dir Directory, what string) {
	t.Helper()
	d, err := openSmall(dir, Options{})
	if err != nil {
		t.Fatalf("%s: %v", what, err)
	}
	if l, err := readLayout(dir); err != nil || len(l.obsolete) > 0 {
		t.Fatalf("%s: after opening there is still %q, %v", what, l.obsolete, err)
	}
	if !h.told.equal(d) && !h.done.equal(d) {
		t.Fatalf("%s: the store holds\n%v\nwant\n%v\nor\n%v", what, maps.Collect(d.All()), h.told,
			h.done)
	}
	if err := d.Close(); err != nil {
		t.Fatalf("%s: Close: %v", what, err)
	}
}

// Ensure that after a power failure behind any I/O call, and another one during
// the recovery, everything told is there and nothing deleted is back.
func TestCrashAfterEveryCall(t *testing.T) {
	total := disktest.New()
	d, err := openSmall(total, Options{})
	if err != nil {
		t.Fatal(err)
	}
	script(t, d, &history{model{}, model{}})
	if l, _ := readLayout(total); l.snapshot < 2 {
		t.Fatalf("the script compacts too little: %+v", l)
	}
	for n := range total.Calls {
		random := rand.New(rand.NewPCG(uint64(n), 1))
		dir := disktest.New()
		dir.FailAt, dir.Forever = n+1, true
		h := history{model{}, model{}}
		if d, err := openSmall(dir, Options{}); err == nil {
			script(t, d, &h)
		}
		image := dir.Crash(random)
		h.checkKept(t, image.Crash(random), fmt.Sprint("crash after call ", n))
		for m := 1; m < 40; m += 1 + random.IntN(8) {
			again := image.Crash(random)
			again.FailAt, again.Forever = m, true
			if d, err := openSmall(again, Options{}); err == nil {
				d.Close()
			}
			h.checkKept(t, again.Crash(random),
				fmt.Sprintf("crash after call %d, then %d of the recovery", n, m))
		}
	}
}

// Ensure that when any one call fails, once or from then on, no Commit returns
// nil for what is not on disk, and what was told is there at the next start.
func TestEveryCallFails(t *testing.T) {
	for _, forever := range []bool{false, true} {
		for n, failed := 1, true; failed; n++ {
			dir := disktest.New()
			dir.FailAt, dir.Forever = n, forever
			h := history{model{}, model{}}
			d, err := openSmall(dir, Options{})
			if err == nil {
				if err = script(t, d, &h); err != nil {
					if again := d.Commit(); again == nil {
						t.Fatalf("call %d: Commit fails with %v, then returns nil", n, err)
					}
				}
				closeErr := d.Close()
				if err != nil && closeErr == nil {
					t.Fatalf("call %d: Close after %v returns nil", n, err)
				}
				err = closeErr
			} else if !errors.Is(err, disktest.ErrDisk) {
				t.Fatalf("call %d: Open: %v", n, err)
			}
			failed = dir.Calls >= n
			dir.FailAt = 0
			h.checkKept(t, dir.Crash(rand.New(rand.NewPCG(uint64(n), 2))),
				fmt.Sprintf("call %d failed (for ever: %v), then the power", n, forever))
			if err == nil {
				continue
			}
			dir.Locked = false
			what := fmt.Sprintf("call %d failed (for ever: %v), then", n, forever)
			h.checkKept(t, dir, what)
			// What a failed Sync left in the kernel's memory is not built upon.
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

// ---- what a hunt from outside has found

// Ensure that three power failures in a row, each in the recovery from the one before,
// lose nothing.
func TestCrashesInRecoveries(t *testing.T) {
	for seed := range uint64(150) {
		random := rand.New(rand.NewPCG(seed, 3))
		dir := disktest.New()
		dir.FailAt, dir.Forever = 1+random.IntN(500), true
		h := history{model{}, model{}}
		if d, err := openSmall(dir, Options{}); err == nil {
			script(t, d, &h)
		}
		image := dir.Crash(random)
		for range 3 {
			image.FailAt, image.Forever = 1+random.IntN(30), true
			if d, err := openSmall(image, Options{}); err == nil {
				d.Close()
			}
			image = image.Crash(random)
		}
		h.checkKept(t, image, fmt.Sprint("seed ", seed))
	}
}

// Ensure that a missing descriptor is no reason to end, wherever it is missing, and
// neither is a disk that is full when a new file is due.
func TestMissingDescriptors(t *testing.T) {
	for n, failed := 1, true; failed; n++ {
		dir := disktest.New()
		h := history{model{}, model{}}
		d, err := openSmall(dir, Options{})
		if err != nil {
			t.Fatal(err)
		}
		dir.FailAt, dir.Failure = dir.Calls+n, syscall.EMFILE
		d.rotateAfter = time.Time{}
		if err := script(t, d, &h); err != nil {
			t.Fatalf("call %d lacks a descriptor: %v", n, err)
		}
		failed = dir.Calls >= dir.FailAt
		if d.Close(); d.failure() != nil {
			t.Fatalf("call %d lacks a descriptor: %v", n, d.failure())
		}
		dir.FailAt = 0
		h.checkKept(t, dir, fmt.Sprintf("call %d lacked a descriptor, then", n))
	}
}

// Ensure that a rotation that is not possible is tried again, and the store goes on
// in the old file until then.
func TestRotationIsTriedAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for _, failure := range []error{syscall.EMFILE, syscall.ENOSPC} {
			dir := disktest.New()
			var refuses atomic.Bool // to create a file: the only call that fails
			dir.Before = func(c disktest.Call) error {
				if c.What == "create" && refuses.Load() {
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
				if err := d.Room(200, false); err != nil {
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
			for range 10 {
				put()
			}
			if d.number != 1 || strings.Count(log.String(), "cannot go on in a new file") != 1 {
				t.Errorf("%v: in file %d, the log says\n%s", failure, d.number, &log)
			}
			refuses.Store(false)
			<-time.After(rotateTime)
			put()
			put()
			if d.number != 2 || len(d.Get("key")) < 12 {
				t.Errorf("%v: later in file %d", failure, d.number)
			}
			if err := d.Close(); err != nil {
				t.Fatal(err)
			}
			if again, err := OpenIn(context.Background(), dir, Options{}); err != nil ||
				!slices.Equal(again.Get("key"), d.Get("key")) {
				t.Errorf("%v: opened again: %v", failure, err)
			}
		}
	})
}

// Ensure that a full disk lets a store start, read and Delete, that a write is
// refused before anything has changed, and that nothing is lost when room comes back.
func TestFullDisk(t *testing.T) {
	dir := disktest.New()
	d, err := OpenIn(context.Background(), dir, Options{})
	if err != nil {
		t.Fatal(err)
	}
	d.reserve, d.spare = 4096, 2048
	for i := range 100 {
		d.Put(fmt.Sprint("key", i), strings.Repeat("v", 100))
		d.Commit()
	}
	d.Close()
	size := 0
	for _, f := range dir.Names {
		size += len(f.Data)
	}
	for _, crashed := range []bool{false, true} {
		full := dir.With(lockName, nil)
		if full.Room = size; crashed {
			f := full.Names["seg-1.log"] // without the frame of a clean stop
			clear(f.Data[d.size-frameSize : d.size])
			copy(f.Disk, f.Data)
		}
		d, err := OpenIn(context.Background(), full, Options{})
		if err != nil {
			t.Fatalf("crashed: %v: a start on a full disk: %v", crashed, err)
		}
		d.reserve, d.spare = 4096, 2048
		held := len(d.Get("key7"))
		if err := d.Room(2000, false); !errors.Is(err, syscall.ENOSPC) {
			t.Errorf("room for a Put: %v", err)
		}
		if err := d.Room(100, false); !errors.Is(err, syscall.ENOSPC) {
			t.Errorf("a Put may take the room that is kept for Deletes: %v", err)
		}
		deleted := 0
		for i := range 5 {
			if err := d.Room(4, true); err != nil {
				t.Fatalf("room for a Delete: %v", err)
			}
			deleted += d.Delete(fmt.Sprint("key", i))
			if err := d.Commit(); err != nil {
				t.Fatal(err)
			}
		}
		full.Room = 0
		if err := d.Room(2000, false); err != nil {
			t.Errorf("with room again: %v", err)
		}
		d.Put("more", strings.Repeat("v", 2000))
		if err := d.Close(); err != nil {
			t.Fatal(err)
		}
		again, err := OpenIn(context.Background(), full, Options{})
		if err != nil || held != 1 || deleted != 5 || len(again.Get("key1")) != 0 ||
			len(again.Get("key7")) != 1 || len(again.Get("more")) != 1 {
			t.Errorf("crashed: %v: in the end: %v, %d keys", crashed, err, again.keys)
		}
	}
}

// Ensure that a start writes nothing but the frames that are in doubt: after a clean
// stop one, after a crash the last commits.
func TestStartCopiesNothing(t *testing.T) {
	for _, clean := range []bool{true, false} {
		dir := disktest.New()
		d, err := OpenIn(context.Background(), dir, Options{})
		if err != nil {
			t.Fatal(err)
		}
		for range 100 {
			d.Put("key", strings.Repeat("v", 1000))
			d.Commit()
		}
		if clean {
			d.Close()
		}
		image := dir.With(lockName, nil)
		counting := &countingDir{Dir: image}
		if _, err := OpenIn(context.Background(), counting, Options{}); err != nil {
			t.Fatal(err)
		}
		if counting.written > 2000 || counting.created > 0 {
			t.Errorf("clean stop: %v: a start wrote %d bytes and made %d files", clean,
				counting.written, counting.created)
		}
	}
}

// countingDir counts what is written.
type countingDir struct {
	*disktest.Dir
	written, created int
}

type countingFile struct {
	File
	d *countingDir
}

func (c *countingDir) Create(name string) (File, error) {
	c.created++
	f, err := c.Dir.Create(name)
	return countingFile{f, c}, err
}

func (c *countingDir) Extend(name string) (File, error) {
	f, err := c.Dir.Extend(name)
	return countingFile{f, c}, err
}

func (f countingFile) WriteAt(p []byte, off int64) (int, error) {
	f.d.written += len(p)
	return f.File.WriteAt(p, off)
}

// Ensure that a flipped bit is damage, not a torn end, once a second has passed
// without a Commit, and even in the last frame.
func TestIdleLogIsVouchedFor(t *testing.T) {
	for _, fsync := range []time.Duration{FsyncAlways, time.Second} {
		synctest.Test(t, func(t *testing.T) {
			dir := disktest.New()
			d, err := OpenIn(context.Background(), dir, Options{Fsync: fsync})
			if err != nil {
				t.Fatal(err)
			}
			for i := range 10 {
				d.Put("key", fmt.Sprint(i))
				d.Commit()
			}
			last := d.size - 20
			<-time.After(3 * time.Second)
			synctest.Wait()
			calls := dir.Calls
			<-time.After(time.Hour)
			if dir.Calls != calls {
				t.Errorf("fsync %v: %d calls in an idle hour", fsync, dir.Calls-calls)
			}
			for _, at := range []int64{200, last} {
				image := dir.Crash(rand.New(rand.NewPCG(1, 1)))
				data := slices.Clone(image.Names["seg-1.log"].Data)
				data[at] ^= 1
				var damage *DamageError
				if _, err := OpenIn(context.Background(), image.With("seg-1.log", data),
					Options{}); !errors.As(err, &damage) {
					t.Errorf("fsync %v: with a flipped bit at %d: %v", fsync, at, err)
				}
			}
			if err := d.Close(); err != nil {
				t.Error(err)
			}
		})
	}
}

// Ensure that what a start cuts is kept beside until the next clean stop.
func TestTornEndIsKept(t *testing.T) {
	dir, name, starts := segment(t, 3)
	data := slices.Clone(dir.Names[name].Data)
	data = data[:len(data)-5]
	torn := bytes.TrimRight(data[starts[2]:], "\x00")
	image := dir.With(name, data)
	kept := func() (names []string) {
		for n, f := range image.Names {
			if strings.HasPrefix(n, tornPrefix) {
				if names = append(names, n); !bytes.Equal(f.Disk, torn) {
					t.Errorf("%s holds %d bytes, want the %d that were torn", n, len(f.Disk),
						len(torn))
				}
			}
		}
		return names
	}
	d, err := OpenIn(context.Background(), image, Options{})
	if err != nil || len(d.Get("key")) != 2 || len(kept()) != 1 {
		t.Fatalf("a torn end: %v, kept in %q", err, kept())
	}
	image.Locked = false
	if d, err = OpenIn(context.Background(), image, Options{}); err != nil ||
		len(kept()) != 1 { // killed meanwhile
		t.Fatalf("a second start: %v, kept in %q", err, kept())
	}
	if err := d.Close(); err != nil || len(kept()) != 0 {
		t.Errorf("after a clean stop: %v, kept in %q", err, kept())
	}
}

// Ensure that a directory that is not ours any more ends the store, also where nothing is
// written, and before another file is made.
func TestMovedDirectory(t *testing.T) {
	dir, d := newSmall(t, Options{})
	d.Put("a", "1")
	if err := d.Commit(); err != nil {
		t.Fatal(err)
	}
	dir.Moved = ErrMoved
	d.Get("a")
	if err := d.Commit(); !errors.Is(err, ErrMoved) {
		t.Errorf("after a Get: %v, want %v", err, ErrMoved)
	}
	d.Close()
	dir = disktest.New()
	d, err := openSmall(dir, Options{})
	if err != nil {
		t.Fatal(err)
	}
	d.Put("a", "1")
	d.Commit()
	dir.Moved = ErrMoved
	for err == nil && d.number == 1 {
		d.Put("a", strings.Repeat("v", 100))
		err = d.Commit()
	}
	if !errors.Is(err, ErrMoved) || dir.Names["seg-2.log"] != nil {
		t.Errorf("at a rotation: %v, in file %d", err, d.number)
	}
	d.Close()
}

// Ensure that a real directory that is moved, replaced or removed is noticed, and
// that nothing is written to the one in its place.
func TestMovedRealDirectory(t *testing.T) {
	if runtime.GOOS == "windows" {
		return // the system lets nobody move a directory that is in use
	}
	for _, replace := range []bool{true, false} {
		t.Run(fmt.Sprint("replaced: ", replace), func(t *testing.T) {
			t.Parallel()
			path := filepath.Join(t.TempDir(), "data")
			os.Mkdir(path, 0o700)
			d, err := Open(context.Background(), path, Options{})
			if err != nil {
				t.Fatal(err)
			}
			d.Put("k", "v")
			if err := d.Commit(); err != nil {
				t.Fatal(err)
			}
			os.Rename(path, path+".old")
			if replace {
				os.Mkdir(path, 0o700)
				other, err := Open(context.Background(), path, Options{})
				if err != nil {
					t.Fatal(err)
				}
				defer other.Close()
			}
			d.segmentSize = 1
			<-d.Lost() // though nothing was asked
			d.Put("k", "w")
			if err := d.Commit(); !errors.Is(err, ErrMoved) {
				t.Errorf("replaced: %v: %v, want %v", replace, err, ErrMoved)
			}
			d.Close()
			if names, _ := filepath.Glob(filepath.Join(path, "seg-2*")); len(names) > 0 {
				t.Errorf("the directory in its place has %q", names)
			}
		})
	}
}

// holes are the ways to remove files from a store with a snapshot and two segments.
var holes = map[string]func(name string, kind uint32, number, last uint64) bool{
	"the file that is written": func(_ string, kind uint32, number, last uint64) bool {
		return kind == kindSegment && number == last
	},
	"a full file": func(_ string, kind uint32, number, last uint64) bool {
		return kind == kindSegment && number == last-1
	},
	"the snapshot": func(_ string, kind uint32, _, _ uint64) bool { return kind == kindSnapshot },
	"STORE":        func(name string, _ uint32, _, _ uint64) bool { return name == storeName },
	"all logs":     func(_ string, kind uint32, _, _ uint64) bool { return kind != 0 },
	"everything":   func(string, uint32, uint64, uint64) bool { return true },
}

// wantAll opens a directory and wants all of this in it.
func wantAll(t *testing.T, what string, dir Directory, want map[string][]string) {
	t.Helper()
	d, err := openSmall(dir, Options{})
	if err != nil {
		t.Fatalf("%s: %v", what, err)
	}
	if got := maps.Collect(d.All()); !maps.EqualFunc(got, want, slices.Equal[[]string]) {
		t.Errorf("%s: %d keys, want %d", what, len(got), len(want))
	}
	d.Close()
}

// removeThose removes the files of a store that isGone picks.
func removeThose(dir *disktest.Dir, d *Durable, isGone func(string, uint32, uint64, uint64) bool) {
	for _, name := range slices.Sorted(maps.Keys(dir.Names)) {
		if kind, number, _ := parseName(name); isGone(name, kind, number, d.number) {
			dir.Remove(name)
		}
	}
}

// withHole returns a store from which somebody has removed files while it is open.
func withHole(t *testing.T, log io.Writer,
	isGone func(string, uint32, uint64, uint64) bool) (*disktest.Dir, *Durable) {
	dir := disktest.New()
	d, err := openSmall(dir, Options{Log: slog.New(slog.NewTextHandler(log, nil))})
	if err != nil {
		t.Fatal(err)
	}
	script(t, d, &history{model{}, model{}})
	d.minCompact = 1 << 40
	for number := d.number + 2; d.number < number; {
		d.Put("key", "value")
		if err := d.Commit(); err != nil {
			t.Fatal(err)
		}
	}
	removeThose(dir, d, isGone)
	dir.Sync()
	return dir, d
}

// Ensure that files which somebody removes while the store is open are written anew: after a
// Commit a second later, or at Close, all is there.
func TestRemovedFilesAreWrittenAnew(t *testing.T) {
	for what, isGone := range holes {
		synctest.Test(t, func(t *testing.T) {
			var log bytes.Buffer
			dir, d := withHole(t, &log, isGone)
			<-time.After(lookTime)
			d.Put("after", "all")
			if err := d.Commit(); err != nil {
				t.Fatalf("%s: %v", what, err)
			}
			want := maps.Collect(d.All())
			wantAll(t, what+", after a crash", dir.Crash(rand.New(rand.NewPCG(1, 1))), want)
			d.Put("and", "more")
			if err := d.Commit(); err != nil {
				t.Fatalf("%s: %v", what, err)
			}
			want = maps.Collect(d.All())
			wantAll(t, what+", after a crash later", dir.Crash(rand.New(rand.NewPCG(2, 1))), want)
			if n := strings.Count(log.String(), "level=ERROR"); n != 1 ||
				!strings.Contains(log.String(), "all data is on disk again") {
				t.Errorf("%s: the log says\n%s", what, &log)
			}
			removeThose(dir, d, isGone)
			if err := d.Close(); err != nil {
				t.Fatalf("%s: Close: %v", what, err)
			}
			wantAll(t, what+", just before Close", dir, want)
		})
	}
}

// Ensure that writing removed files anew may fail, or be cut off, anywhere: what then is
// there is all, or refused, and a later try succeeds.
func TestHealMayFail(t *testing.T) {
	for what, isGone := range holes {
		for n, failed := 1, true; failed; n++ {
			synctest.Test(t, func(t *testing.T) {
				dir, d := withHole(t, io.Discard, isGone)
				<-time.After(3 * lookTime) // and the timer has nothing more to do
				d.Put("after", "all")
				if d.commit() != nil {
					t.Fatal("it fails before")
				}
				failAt := func(n int) (calls int) {
					dir.Mu.Lock()
					defer dir.Mu.Unlock()
					dir.FailAt = n
					return dir.Calls
				}
				call := failAt(0) + n
				failAt(call)
				err := d.Commit()
				want := maps.Collect(d.All())
				random := rand.New(rand.NewPCG(uint64(n), 4))
				where := fmt.Sprintf("%s, call %d", what, n)
				image := dir.Crash(random)
				again, openErr := openSmall(image.Kill(), Options{})
				isEmpty := openErr == nil && what == "everything" && again.keys == 0
				if openErr == nil {
					again.Close()
				}
				// Else it is refused, or the power failed before anything was written.
				if !errors.As(openErr, new(*DamageError)) && !isEmpty {
					wantAll(t, where+", after a crash", image, want)
				}
				failed = failAt(0) >= call
				if err != nil {
					d.Close()
					return
				}
				<-time.After(compactTime)
				d.Put("later", "more")
				if err := d.Commit(); err != nil {
					t.Fatalf("%s, call %d, later: %v", what, n, err)
				}
				want = maps.Collect(d.All())
				wantAll(t, where+", after another try", dir.Crash(random), want)
				d.Close()
			})
		}
	}
}

// Ensure that Close writes removed files anew even shortly after that was not possible, and
// that it fails where it is not possible still.
func TestCloseIsTheLastLook(t *testing.T) {
	for _, mended := range []bool{true, false} {
		synctest.Test(t, func(t *testing.T) {
			dir, d := withHole(t, io.Discard, holes["everything"])
			var refuses atomic.Bool
			refuses.Store(true)
			dir.Before = func(c disktest.Call) error {
				if c.What == "create" && refuses.Load() {
					return syscall.ENOSPC
				}
				return nil
			}
			<-time.After(lookTime)
			d.Put("after", "all")
			if err := d.Commit(); err != nil {
				t.Fatal(err)
			}
			refuses.Store(!mended)
			want := maps.Collect(d.All())
			err := d.Close()
			if (err == nil) != mended {
				t.Fatalf("mended: %v: Close: %v", mended, err)
			} else if !mended {
				return
			}
			wantAll(t, "closed", dir, want)
		})
	}
}

// Ensure that the same holds for a real directory, whose lock goes, too: it is taken again,
// unless another process has taken it.
func TestRemovedRealFiles(t *testing.T) {
	if runtime.GOOS == "windows" {
		return // nobody can remove a file that is in use
	}
	path := t.TempDir()
	d, err := Open(context.Background(), path, Options{})
	if err != nil {
		t.Fatal(err)
	}
	d.Put("k", "v")
	if err := d.Commit(); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{lockName, storeName, "seg-1.log"} {
		if err := os.Remove(filepath.Join(path, name)); err != nil {
			t.Fatal(err)
		}
	}
	d.looked = time.Time{}
	d.Put("k", "w")
	if err := d.Commit(); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(context.Background(), path, Options{}); !errors.Is(err, ErrLocked) {
		t.Errorf("a second one opens it: %v", err)
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	if d, err = Open(context.Background(), path, Options{}); err != nil ||
		!slices.Equal(d.Get("k"), []string{"v", "w"}) {
		t.Fatalf("opened again: %v", err)
	}
	for _, name := range []string{lockName, storeName} {
		os.Remove(filepath.Join(path, name))
	}
	lock, err := mustDirectory(t, path).Lock(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer lock.Close()
	d.looked = time.Time{}
	if err := d.Commit(); !errors.Is(err, ErrMoved) {
		t.Errorf("another process has the directory: %v", err)
	}
	if _, err := os.Stat(filepath.Join(path, storeName)); err == nil {
		t.Error("its directory was written to")
	}
	d.Close()
}

// stolenDirectory is one that another process takes while a snapshot is written.
type stolenDirectory struct {
	*osDirectory
	steal func()
}

func (s *stolenDirectory) Create(name string) (File, error) {
	if strings.HasPrefix(name, "snap-") {
		s.steal()
	}
	return s.osDirectory.Create(name)
}

// Ensure that what is written anew does not get its name in a directory that another process has
// taken meanwhile.
func TestHealOfAStolenDirectory(t *testing.T) {
	if runtime.GOOS == "windows" {
		return // nobody can remove a lock
	}
	path := t.TempDir()
	dir := &stolenDirectory{osDirectory: mustDirectory(t, path).(*osDirectory)}
	dir.steal = func() {
		os.Remove(filepath.Join(path, lockName))
		lock, err := mustDirectory(t, path).Lock(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { lock.Close() })
	}
	d, err := OpenIn(t.Context(), dir, Options{})
	if err != nil {
		t.Fatal(err)
	}
	d.Put("k", "v")
	os.Remove(filepath.Join(path, storeName))
	d.looked = time.Time{}
	d.Commit()
	if names, _ := filepath.Glob(filepath.Join(path, "snap-*.log")); len(names) > 0 {
		t.Errorf("the other process finds %q", names)
	}
	d.Close()
}

// Ensure that another file in the place of the one that is written is noticed.
func TestReplacedRealFile(t *testing.T) {
	if runtime.GOOS == "windows" {
		return // nobody can replace a file that is in use
	}
	path := t.TempDir()
	d, err := Open(context.Background(), path, Options{})
	if err != nil {
		t.Fatal(err)
	}
	d.Put("k", "v")
	if err := d.Commit(); err != nil {
		t.Fatal(err)
	}
	name := filepath.Join(path, "seg-1.log")
	b, _ := os.ReadFile(name)
	os.Remove(name)
	os.WriteFile(name, b, 0o600)
	d.Put("k", "w")
	if err := errors.Join(d.Commit(), d.Close()); err != nil {
		t.Fatal(err)
	}
	if d, err = Open(context.Background(), path, Options{}); err != nil ||
		!slices.Equal(d.Get("k"), []string{"v", "w"}) {
		t.Fatalf("opened again: %v", err)
	}
	d.Close()
}

// Ensure that who only asks whether a store is in use does not take a lock that is made anew.
func TestInUseBesideALock(t *testing.T) {
	if runtime.GOOS == "windows" {
		return // nobody can remove a lock
	}
	path := t.TempDir()
	lock, err := mustDirectory(t, path).Lock(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	other, stop := mustDirectory(t, path), make(chan struct{})
	var askers sync.WaitGroup
	for range 2 {
		askers.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
					other.InUse()
				}
			}
		})
	}
	for range 300 {
		os.Remove(filepath.Join(path, lockName))
		if err := lock.(*osLock).look(); err != nil {
			t.Fatal(err)
		}
	}
	close(stop)
	askers.Wait()
	lock.Close()
}

// Ensure that an error of the moment is not taken for a directory that was moved.
func TestLockLooksAgain(t *testing.T) {
	path := filepath.Join(t.TempDir(), "data")
	os.Mkdir(path, 0o700)
	dir := mustDirectory(t, path)
	lock, err := dir.Lock(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer lock.Close()
	look := lock.(interface{ look() error }).look
	os.Rename(path, path+".old")
	if err := os.Symlink(path, path); err != nil {
		t.Logf("without links there is no such error: %v", err)
		return
	}
	if err := look(); err == nil || errors.Is(err, ErrMoved) {
		t.Errorf("where the path is a loop: %v", err)
	}
	os.Remove(path)
	if err := look(); !errors.Is(err, ErrMoved) {
		t.Errorf("where it is gone: %v", err)
	}
	os.Rename(path+".old", path)
	if err := look(); err != nil {
		t.Errorf("where it is back: %v", err)
	}
}

// Ensure that Syncing names a file whenever the store waits for the disk: at a Commit, at a
// rotation and at Close, whose stalls an operator would want to understand.
func TestSyncingNamesTheFile(t *testing.T) {
	dir, d := newSmall(t, Options{})
	d.minCompact = 1 << 40 // a compaction would wait for the disk beside us
	waits := map[string]int{}
	dir.Before = func(c disktest.Call) error {
		if slices.Contains([]string{"sync", "truncate", "create", "rename"}, c.What) {
			waits[c.What]++
			if d.Syncing() == "" {
				t.Errorf("in file %d nothing is named while %q of %q is waited for", d.number,
					c.What, c.Name)
			}
		}
		return nil
	}
	for i := 0; d.number < 4; i++ {
		d.Put("k", strings.Repeat("v", i%200))
		if err := d.Commit(); err != nil {
			t.Fatal(err)
		}
	}
	if err := d.Close(); err != nil || d.Syncing() == "" {
		t.Errorf("Close: %v, and names %q", err, d.Syncing())
	}
	if waits["sync"] < 10 || waits["truncate"] < 3 || waits["create"] != 3 || waits["rename"] != 3 {
		t.Errorf("it waits for %v", waits)
	}
}

// Ensure that nothing but our own files is touched: who else has some in the
// directory is told so.
func TestOthersFilesStay(t *testing.T) {
	for _, name := range []string{"thesis.tmp", "download.iso.tmp", "cache.tmp", "seg-1.log.bak",
		"seg-01.log.tmp"} {
		dir := disktest.New().With(name, []byte("precious"))
		_, err := OpenIn(context.Background(), dir, Options{})
		if !errors.Is(err, ErrNotOurs) || !strings.Contains(err.Error(), name) ||
			dir.Names[name] == nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	dir := disktest.New().With("seg-1.log.tmp", []byte("half")) // as a killed start leaves it
	if _, err := OpenIn(context.Background(), dir, Options{}); err != nil ||
		dir.Names["seg-1.log.tmp"] != nil {
		t.Errorf("with our own temporary file: %v", err)
	}
}

// Ensure that an older copy that was put over a newer store is refused.
func TestOlderCopyOverNewer(t *testing.T) {
	dir, d := newSmall(t, Options{})
	d.minCompact = 1 << 30
	for i := range 30 {
		d.Put("key", fmt.Sprint(i))
		d.Commit()
	}
	older := dir.Crash(rand.New(rand.NewPCG(1, 1)))
	d.minCompact = 100
	for i := range 300 {
		d.Put("key", fmt.Sprint(i))
		d.Delete("key")
		d.Commit()
		d.settle()
	}
	d.Close()
	both := dir.With(lockName, nil)
	for name, f := range older.Names {
		both.Names[name] = f
	}
	var damage *DamageError
	if _, err := OpenIn(context.Background(), both, Options{}); !errors.As(err, &damage) ||
		!strings.Contains(err.Error(), "an older copy was put over a newer store") {
		t.Errorf("an older copy over a newer store: %v", err)
	}
	if r, err := check(both); err != nil || !r.Damaged {
		t.Errorf("check: %v, %v", r, err)
	}
}

// Ensure that a stalled fsync bounds what is answered without it, with one goroutine
// waiting.
func TestStalledFsyncHoldsCommitsBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir := &slowDir{Dir: disktest.New()}
		d, err := openSmall(dir, Options{Fsync: time.Second})
		if err != nil {
			t.Fatal(err)
		}
		d.segmentSize = 1 << 30
		const stall = 15 * time.Second
		dir.syncing = stall
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
		if after := time.Since(start) - waited; waited == 0 || after > 2200*time.Millisecond {
			t.Errorf("Commits went on for %v beside a stalled fsync, then waited %v", after, waited)
		}
		dir.syncing = 0
		d.Close()
	})
}

// Ensure that Close makes durable what was answered before it waits for a compaction.
func TestCloseSyncsFirst(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir := disktest.New()
		d, err := openSmall(dir, Options{Fsync: time.Hour})
		if err != nil {
			t.Fatal(err)
		}
		d.Put("k", "v")
		d.Commit()
		d.compacted = make(chan compactionEnd, 1)
		go d.Close()
		synctest.Wait() // for the compaction, which does not end
		if again, err := OpenIn(context.Background(), dir.Crash(rand.New(rand.NewPCG(1, 1))),
			Options{}); err != nil || len(again.Get("k")) != 1 {
			t.Errorf("while Close waits a power failure leaves %v", err)
		}
		d.compacted <- compactionEnd{err: errStopped}
	})
}

// Ensure that repair takes an older snapshot, and what came after it, where the newest
// is damaged, and says whether anything is lost.
func TestRepairUsesTheOlderSnapshot(t *testing.T) {
	dir, d := newSmall(t, Options{Fsync: FsyncNever})
	d.minCompact = 1 << 30
	var old map[string]*disktest.File
	h := history{model{}, model{}}
	random := rand.New(rand.NewPCG(7, 7))
	for snapshots := 0; snapshots < 3; {
		number := d.number
		for range random.IntN(8) {
			randomStep(t, random, d, h.done)
		}
		d.Commit()
		if d.number > number && d.number%3 == 0 {
			old = dir.With(lockName, nil).Names
			d.minCompact, d.logBytes = 0, d.logBytes-1<<40 // whatever it holds
			d.compact()
			d.minCompact, d.logBytes = 1<<30, d.logBytes+1<<40
			d.settle()
			snapshots++
		}
	}
	h.told = h.done.clone()
	d.Close()
	l, _ := readLayout(dir)
	bad := dir.With(lockName, nil)
	for name, f := range old { // as a crash leaves them behind a compaction
		if bad.Names[name] == nil {
			bad.Names[name] = f
		}
	}
	newest := logName(kindSnapshot, l.snapshot)
	bad.Names[newest] = disktest.FileOf(bad.Names[newest].Data[:headerSize+30])
	r, err := RepairIn(bad, time.Time{})
	if err != nil || !r.Damaged || r.Lost {
		t.Errorf("repair says %v, %v", r, err)
	}
	h.checkKept(t, bad, "repaired with the older snapshot")
	bad = dir.With(newest, dir.Names[newest].Data[:headerSize+30])
	if r, err := RepairIn(bad, time.Time{}); err == nil && !r.Lost {
		t.Errorf("without the older snapshot repair says %v", r)
	}
}

// Ensure that a backup of a store that is written to, at any moment, opens and holds
// what was told before it began, and that damage is not copied.
func TestBackup(t *testing.T) {
	dir, d := newSmall(t, Options{Fsync: FsyncNever})
	h := history{model{}, model{}}
	random := rand.New(rand.NewPCG(9, 9))
	for i := range 100 {
		for range random.IntN(8) {
			randomStep(t, random, d, h.done)
		}
		if err := d.Commit(); err != nil {
			t.Fatal(err)
		}
		h.told = h.done.clone()
		out := disktest.New()
		if i%10 > 0 { // with something in the middle of its way to the file
			w := d.current
			w.f.WriteAt(appendFrame(nil, w.seed,
				frame{sequence: d.sequence + 1, synced: d.sequence},
				[]byte("half a frame"))[:45], w.size)
		}
		if _, err := BackupIn(dir, out, nil); err != nil {
			t.Fatalf("backup %d: %v", i, err)
		}
		d.current.f.WriteAt(make([]byte, 45), d.current.size)
		if r, err := check(out); err != nil || r.Damaged ||
			strings.Contains(fmt.Sprint(r), "torn") {
			t.Fatalf("backup %d: check says %v, %v", i, r, err)
		}
		h.checkKept(t, out, fmt.Sprint("backup ", i))
		d.settle()
	}
	d.minCompact = 1 << 30
	for d.size < headerSize+200 { // the newest file has something in it
		d.Put("key", strings.Repeat("v", 100))
		d.Commit()
	}
	d.Close()
	for name := range dir.Names {
		if kind, _, ok := parseName(name); ok {
			data := slices.Clone(dir.Names[name].Data)
			data[headerSize+10] ^= 1 // in the first frame
			out := disktest.New()
			if _, err := BackupIn(dir.With(name, data), out, nil); err == nil ||
				len(out.Names) > 0 {
				t.Errorf("%s, damaged, is copied: %v, %d files of kind %d; it has %d bytes", name,
					err, len(out.Names), kind, len(data))
			}
		}
	}
	full := disktest.New().With("photo.jpg", nil)
	if _, err := BackupIn(dir, full, nil); !errors.Is(err, ErrNotOurs) {
		t.Errorf("into a directory that is not empty: %v", err)
	}
}

// tornListing is a directory that a compaction changes while it is listed: once it has
// neither the new snapshot nor the oldest file that went for it.
type tornListing struct {
	*disktest.Dir
	lists int
}

func (l *tornListing) List() ([]string, error) {
	names, err := l.Dir.List()
	if l.lists++; l.lists <= 3 {
		names = slices.DeleteFunc(names, func(name string) bool {
			kind, _, _ := parseName(name)
			return kind == kindSnapshot
		})
	}
	return names, err
}

// Ensure that a listing of names that a compaction changes meanwhile is no damage.
func TestLookBesideACompaction(t *testing.T) {
	dir, d := newSmall(t, Options{})
	script(t, d, &history{model{}, model{}})
	if _, err := BackupIn(&tornListing{Dir: dir}, disktest.New(), nil); err != nil {
		t.Errorf("backup: %v", err)
	}
	if r, err := CheckIn(&tornListing{Dir: dir}); err != nil || r.Damaged {
		t.Errorf("check: %v, %v", r, err)
	}
	d.Close()
	if r, err := CheckIn(&tornListing{Dir: dir}); err != nil || !r.Damaged {
		t.Errorf("check where nobody else is: %v, %v", r, err)
	}
}

// Ensure that real backups, one after the other beside a store that is written to and
// compacted, each hold what was told before.
func TestBackupBesideARealStore(t *testing.T) {
	path := filepath.Join(t.TempDir(), "data")
	os.Mkdir(path, 0o700)
	d, err := Open(context.Background(), path, Options{Fsync: FsyncNever})
	if err != nil {
		t.Fatal(err)
	}
	d.segmentSize, d.minCompact = 20_000, 40_000
	var told atomic.Int64
	stop, stopped := make(chan struct{}), make(chan struct{})
	defer func() {
		close(stop)
		<-stopped
		d.Close()
		if _, err := Backup(path, filepath.Join(path, "copy"), nil); !errors.Is(err, ErrNotOurs) {
			t.Errorf("a backup inside the store: %v", err)
		}
	}()
	go func() {
		defer close(stopped)
		for i := int64(1); ; i++ {
			select {
			case <-stop:
				return
			default:
			}
			d.Put("counter", fmt.Sprint(i))
			d.Update("counter", fmt.Sprint(i-1), "x")
			d.Update("counter", "x", "y")
			d.Delete(fmt.Sprint("key", i%100))
			d.Put(fmt.Sprint("key", i%100), fmt.Sprint(i))
			if i%50 == 0 {
				d.Delete("counter")
				d.Put("counter", fmt.Sprint(i))
			}
			if err := d.Commit(); err != nil {
				t.Error(err)
				return
			}
			told.Store(i)
		}
	}()
	for i := range 12 {
		least := told.Load()
		to := filepath.Join(t.TempDir(), "copy")
		if _, err := Backup(path, to, nil); err != nil {
			t.Fatalf("backup %d: %v", i, err)
		}
		copied, err := Open(context.Background(), to, Options{})
		if err != nil {
			t.Fatalf("backup %d: %v", i, err)
		}
		most := int64(0)
		for _, values := range copied.All() {
			for _, v := range values {
				if n, err := strconv.ParseInt(v, 10, 64); err == nil {
					most = max(most, n)
				}
			}
		}
		if most < least {
			t.Errorf("backup %d holds what was told up to %d, want %d", i, most, least)
		}
		copied.Close()
	}
}

// Ensure that an Update is loaded without a search: the log says where the value was.
func TestUpdatesAreLoadedByPlace(t *testing.T) {
	m := NewMemory()
	for i := range 10 {
		m.Put("k", fmt.Sprint(i%5))
	}
	if err := apply(m, string(appendRecord(nil, opUpdate, 7, "k", "2", "x")), 1); err != nil {
		t.Fatal(err)
	}
	if got, want := m.Get("k"), []string{"0", "1", "2", "3", "4", "0", "1", "3", "4",
		"x"}; !slices.Equal(got, want) {
		t.Errorf("got %q, want %q: the second 2 is gone, which is at the place given", got, want)
	}
	if err := apply(m, string(appendRecord(nil, opUpdate, 1<<40, "k", "2", "y")), 1); err != nil {
		t.Fatal(err)
	}
	if got, want := m.Get("k"), []string{"0", "1", "3", "4", "0", "1", "3", "4", "x",
		"y"}; !slices.Equal(got, want) {
		t.Errorf("with a place that is none: got %q, want %q", got, want)
	}
}

// Ensure that a record too large for a frame ends the store instead of wrapping
// around, and that Room says so before.
func TestRecordsTooLarge(t *testing.T) {
	d, err := OpenIn(context.Background(), disktest.New(), Options{})
	if err != nil {
		t.Fatal(err)
	}
	if err := d.Room(maxRecord+1, false); err == nil {
		t.Error("there is room for a record that is too large")
	}
}

// ---- what a reader of the code has found

// Ensure that a Commit makes durable what a full frame took before it, too.
func TestCommitAfterAFullFrame(t *testing.T) {
	for _, fsync := range []time.Duration{FsyncAlways, time.Second} {
		synctest.Test(t, func(t *testing.T) {
			dir := disktest.New()
			d, err := OpenIn(context.Background(), dir, Options{Fsync: fsync})
			if err != nil {
				t.Fatal(err)
			}
			d.Put("k", strings.Repeat("v", maxFramePut)) // a frame of its own
			if err := d.Commit(); err != nil {
				t.Fatal(err)
			}
			<-time.After(fsync)
			synctest.Wait()
			for seed := range uint64(10) {
				after, err := OpenIn(context.Background(),
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

// Ensure that a store whose rotation was killed at any call goes on, also behind the
// next rotations and restarts.
func TestKilledRotation(t *testing.T) {
	for n := 1; ; n++ {
		dir := disktest.New()
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
		for d.number == 1 && d.failure() == nil && n < 40 {
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
			d.minCompact = 1 << 30
			for number := d.number; d.number < number+2; {
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

// errseqDir tells of a failed fsync once, to whoever asked first, and lets that one
// wait: so does Linux, which reports a failed write once for each open file.
type errseqDir struct {
	*disktest.Dir
	armed, failed atomic.Bool
	hold          chan struct{}
}

type errseqFile struct {
	File
	d *errseqDir
}

func (d *errseqDir) Extend(name string) (File, error) {
	f, err := d.Dir.Extend(name)
	return errseqFile{f, d}, err
}

func (f errseqFile) Sync() error {
	if f.d.armed.CompareAndSwap(true, false) {
		f.d.failed.Store(true)
		<-f.d.hold
		return disktest.ErrDisk
	}
	if f.d.failed.Load() {
		return nil // and nothing was written
	}
	return f.File.Sync()
}

// Ensure that a Commit beside the timer's fsync, which fails, does not take its own
// fsync's silence for success.
func TestFsyncErrorIsToldOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir := &errseqDir{Dir: disktest.New(), hold: make(chan struct{})}
		d, err := OpenIn(context.Background(), dir, Options{Fsync: time.Second})
		if err != nil {
			t.Fatal(err)
		}
		d.Put("k", "v")
		d.Commit()
		dir.armed.Store(true)
		<-time.After(time.Second)
		synctest.Wait() // the timer's fsync has failed, and the timer does not run yet
		ended := make(chan error, 1)
		go func() { ended <- d.syncRest() }() // as a Commit that has to
		synctest.Wait()
		close(dir.hold)
		if err := <-ended; !errors.Is(err, disktest.ErrDisk) {
			t.Errorf("beside a failed fsync another returns %v, want %v", err, disktest.ErrDisk)
		}
		d.Close()
	})
}

// Ensure that a check beside a store that is written to, rotated and compacted finds no
// damage.
func TestCheckBesideARealStore(t *testing.T) {
	path := t.TempDir()
	d, err := Open(context.Background(), path, Options{Fsync: FsyncNever})
	if err != nil {
		t.Fatal(err)
	}
	d.segmentSize, d.minCompact = 300_000, 600_000
	written := make(chan struct{})
	go func() {
		defer close(written)
		for i := range 1000 {
			d.Delete(fmt.Sprint("key", i%100))
			d.Put(fmt.Sprint("key", i%100), strings.Repeat("v", i%1000*20))
			if err := d.Commit(); err != nil {
				t.Error(err)
				return
			}
		}
	}()
	for on := true; on; {
		if r, err := Check(path); err != nil || r.Damaged {
			t.Errorf("check: %v, %v", r, err)
		}
		select {
		case <-written:
			on = false
		default:
		}
	}
	d.Close()
}

// Ensure that a store on a disk that is full to the last byte stops cleanly: all that it
// was told is on disk.
func TestStopOnAFullDisk(t *testing.T) {
	dir, name, starts := segment(t, 3)
	full := dir.With(name,
		dir.Names[name].Data[:starts[3]]) // as a power failure leaves it, without the zeros
	for _, f := range full.Names {
		full.Room += len(f.Data)
	}
	d, err := OpenIn(context.Background(), full, Options{})
	if err != nil {
		t.Fatal(err)
	}
	if err := d.Close(); err != nil {
		t.Errorf("a stop: %v", err)
	}
	if d, err = OpenIn(context.Background(), full, Options{}); err != nil ||
		len(d.Get("key")) != 3 {
		t.Errorf("after it: %v", err)
	}
}

// Ensure that a start that fails leaves no file open.
func TestFailedStartClosesItsFiles(t *testing.T) {
	for n := 1; ; n++ {
		dir := disktest.New()
		dir.FailAt = n
		d, err := OpenIn(context.Background(), dir, Options{})
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

// Ensure that a check beside a store finds no damage where frames are written between
// any two of its reads, and the store is closed.
func TestCheckBesideEachWrite(t *testing.T) {
	for before := 1; before < 30; before++ { // the read before which that happens
		dir := disktest.New()
		dir.Reserve = 1000
		d, err := OpenIn(context.Background(), dir, Options{})
		if err != nil {
			t.Fatal(err)
		}
		d.Put("key", "value")
		d.Commit()
		reads := 0
		dir.Before = func(c disktest.Call) error {
			if c.What == "read" {
				if reads++; reads == before {
					for range 3 {
						d.Put("key", "value")
						d.Commit()
					}
					d.Close()
				}
			}
			return nil
		}
		if r, err := CheckIn(dir); err != nil || r.Damaged {
			t.Errorf("before read %d: %v, %v", before, r.Lines, err)
		}
	}
}

// Ensure that a torn end on a full disk does not keep the store from starting, also
// where there are whole frames in it, and that no start leaves half a copy of it.
func TestTornEndOnAFullDisk(t *testing.T) {
	for hole := range 4 { // the frame that is torn
		dir := disktest.New()
		d, err := OpenIn(context.Background(), dir, Options{Fsync: FsyncNever})
		if err != nil {
			t.Fatal(err)
		}
		var starts []int64
		for range 4 {
			starts = append(starts, d.current.size)
			d.Put("key", "value")
			d.Commit()
		}
		full := dir.With("seg-1.log", dir.Names["seg-1.log"].Data[:d.size])
		full.Names["seg-1.log"].Data[starts[hole]+frameSize]++
		for _, f := range full.Names {
			full.Room += len(f.Data)
		}
		d, err = OpenIn(context.Background(), full, Options{})
		if err != nil || len(d.Get("key")) != hole {
			t.Fatalf("frame %d is torn on a full disk: %v", hole, err)
		}
		for name := range full.Names {
			if strings.HasPrefix(name, tornPrefix) {
				t.Errorf("%s is left", name)
			}
		}
	}
}

// Ensure that a backup does not end at a damaged frame in the middle of the log.
func TestBackupOfALogWithAHole(t *testing.T) {
	dir, d := newSmall(t, Options{})
	d.minCompact = 1 << 30
	for i := range 200 {
		d.Put(fmt.Sprint("key", i), strings.Repeat("v", 50))
		d.Commit()
	}
	d.Close()
	for what, damage := range map[string]func(b []byte) []byte{
		"a bit of the last frame": func(b []byte) []byte { b[len(b)-20] ^= 1; return b },
		"the last frame":          func(b []byte) []byte { return b[:len(b)-frameSize] },
	} {
		bad := dir.With("seg-2.log", damage(slices.Clone(dir.Names["seg-2.log"].Data)))
		out := disktest.New()
		if _, err := BackupIn(bad, out, nil); err == nil || out.Names[storeName] != nil {
			t.Errorf("without %s of a full file: %v, and %d files are copied", what, err,
				len(out.Names))
		}
	}
}

// segment returns a store's only log file with so many commits, not closed, and
// the offsets at which its frames begin.
func segment(t *testing.T, commits int) (dir *disktest.Dir, name string, starts []int) {
	dir, name = disktest.New(), "seg-1.log"
	d, err := OpenIn(context.Background(), dir, Options{})
	if err != nil {
		t.Fatal(err)
	}
	d.reserve = 0
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
// end, and goes when the file is full or the store closes.
func TestRoomForFrames(t *testing.T) {
	dir, d := newSmall(t, Options{})
	var sizes []int
	for i := range 5 {
		d.Put("key", fmt.Sprint("value", i))
		d.Commit()
		sizes = append(sizes, len(dir.Names["seg-1.log"].Data))
	}
	if sizes[0] < d.reserve || sizes[4] != sizes[0] {
		t.Errorf("five commits made files of %d bytes, want one size", sizes)
	}
	killed := dir.With("none", nil)
	delete(killed.Names, "none")
	var log bytes.Buffer
	d2, err := OpenIn(context.Background(), killed,
		Options{Log: slog.New(slog.NewTextHandler(&log, nil))})
	if err != nil || len(d2.Get("key")) != 5 || strings.Contains(log.String(), "incomplete") {
		t.Errorf("opened without a Close: %v, %v, the log says %s", d2.Get("key"), err,
			log.String())
	}
	for d.number == 1 {
		d.Put("key", "more")
		d.Commit()
	}
	d.Put("key", "last")
	d.Close()
	for name, f := range dir.Names {
		if kind, _, _ := parseName(name); kind == kindSegment &&
			len(bytes.TrimRight(f.Data, "\x00"))+8+d.spare <= len(f.Data) {
			t.Errorf("%s of %d bytes ends in many zeros", name, len(f.Data))
		}
		if len(f.Data) != len(f.Disk) {
			t.Errorf("%s has %d bytes, and on disk %d", name, len(f.Data), len(f.Disk))
		}
	}
}

// Ensure that a log that ends anywhere opens with all its whole frames, whatever
// garbage follows, and that what was cut off is reported.
func TestTornEnd(t *testing.T) {
	dir, name, starts := segment(t, 12)
	whole := dir.Names[name].Data
	stale := disktest.New() // another store's frames
	if d, err := OpenIn(context.Background(), stale, Options{Fsync: FsyncNever}); err == nil {
		d.reserve = 0
		d.Put("stale", "stale")
		d.Commit()
	}
	var ends []int // of the frames, without padding
	for _, start := range starts[:len(starts)-1] {
		ends = append(ends, start+frameSize+int(binary.LittleEndian.Uint32(whole[start+4:])))
	}
	for cut := headerSize; cut <= len(whole); cut++ {
		behind := [][]byte{make([]byte, 1000), bytes.Repeat([]byte("\xff"), 100),
			stale.Names[name].Data[headerSize:]}
		for _, garbage := range [][]byte{nil, behind[cut%len(behind)]} {
			data, frames := append(slices.Clone(whole[:cut]), garbage...), 0
			for frames < len(starts)-1 && len(data) >= starts[frames+1] &&
				bytes.HasPrefix(data, whole[:ends[frames]]) {
				frames++ // whatever stands in the place of the padding
			}
			var log bytes.Buffer
			torn := dir.With(name, data)
			d, err := OpenIn(context.Background(), torn,
				Options{Log: slog.New(slog.NewTextHandler(&log, nil))})
			if err != nil {
				t.Fatalf("cut at %d, %d bytes of garbage: %v", cut, len(garbage), err)
			}
			if got := len(d.Get("key")); got != frames {
				t.Fatalf("cut at %d: %d frames are there, want %d", cut, got, frames)
			}
			if lost := len(bytes.TrimRight(data[starts[frames]:],
				"\x00")); strings.Contains(log.String(), "incomplete commit") != (lost > 0) ||
				lost > 0 && !strings.Contains(log.String(), fmt.Sprint("bytes=", lost)) {
				t.Fatalf("cut at %d, %d bytes lost: the log says %s", cut, lost, log.String())
			}
			d.reserve = 500
			d.Put("key", "more")
			if err := d.Close(); err != nil {
				t.Fatal(err)
			}
			if d, err = OpenIn(context.Background(), torn, Options{}); err != nil ||
				len(d.Get("key")) != frames+1 {
				t.Fatalf("cut at %d: written on, then %v", cut, err)
			}
		}
	}
}

// Ensure that every flipped bit before the last frame is refused with its place,
// and that nothing is touched; in the last frame it is a torn end.
func TestFlippedBits(t *testing.T) {
	dir, name, starts := segment(t, 8)
	whole := dir.Names[name].Data
	last := starts[len(starts)-2]
	for bit := range 8 * len(whole) {
		data := slices.Clone(whole)
		data[bit/8] ^= 1 << (bit % 8)
		bad := dir.With(name, data)
		d, err := OpenIn(context.Background(), bad, Options{})
		if bit/8 >= last {
			if padding := err == nil && len(d.Get("key")) == 8; err != nil ||
				len(d.Get("key")) != 7 && !padding {
				t.Fatalf("bit %d, in the last frame: %v", bit, err)
			}
			continue
		}
		if err == nil && len(d.Get("key")) == 8 {
			continue // a padding byte, or one of the header's that says nothing
		}
		var damage *DamageError
		if !errors.As(err, &damage) && !errors.Is(err, ErrNewer) && !errors.Is(err, ErrOlder) {
			t.Fatalf("bit %d of byte %d: %v", bit%8, bit/8, err)
		}
		if damage != nil && bit/8 >= headerSize &&
			(damage.Offset > int64(bit/8) || damage.File != "dir/"+name || damage.Frame == 0) {
			t.Fatalf("bit %d of byte %d: the error names another place: %v", bit%8, bit/8, err)
		}
		if !bytes.Equal(bad.Names[name].Data, data) || len(bad.Names) != len(dir.Names) {
			t.Fatalf("bit %d of byte %d: refused, but something was changed", bit%8, bit/8)
		}
	}
}

// Ensure that every flipped bit of STORE is STORE's damage, not that of the logs, and
// that repair mends it without a loss.
func TestFlippedStore(t *testing.T) {
	dir, _, _ := segment(t, 3)
	whole := dir.Names[storeName].Data
	for bit := range 8 * len(whole) {
		data := slices.Clone(whole)
		data[bit/8] ^= 1 << (bit % 8)
		bad := dir.With(storeName, data)
		var damage *DamageError
		if _, err := OpenIn(context.Background(), bad, Options{}); !errors.As(err, &damage) ||
			damage.File != "dir/STORE" {
			t.Fatalf("bit %d of byte %d: %v", bit%8, bit/8, err)
		}
		if bit%50 > 0 {
			continue
		}
		if r, err := RepairIn(bad, time.Time{}); err != nil || r.Lost {
			t.Fatalf("bit %d of byte %d: repair says %v, %v", bit%8, bit/8, r, err)
		}
		if d, err := OpenIn(context.Background(), bad, Options{}); err != nil ||
			len(d.Get("key")) != 3 {
			t.Fatalf("bit %d of byte %d: after repair: %v", bit%8, bit/8, err)
		}
	}
}

// Ensure that after a clean stop even the last frame's damage is seen, that the
// start is silent, and that missing, foreign and misplaced files are refused.
func TestRefusals(t *testing.T) {
	dir := disktest.New()
	d, err := openSmall(dir, Options{})
	if err != nil {
		t.Fatal(err)
	}
	script(t, d, &history{model{}, model{}})
	d.minCompact = 1 << 30 // from here on keep several full files
	for i := range 300 {
		d.Put("key", fmt.Sprint(i))
		d.Commit()
	}
	d.Close()
	var log bytes.Buffer
	if d, err = openSmall(dir, Options{Log: slog.New(slog.NewTextHandler(&log,
		&slog.HandlerOptions{Level: slog.LevelWarn}))}); err != nil || log.Len() > 0 {
		t.Fatalf("after a clean stop: %v, %s", err, log.String())
	}
	d.minCompact = 1 << 30
	d.Put("one", "more")
	d.Close()
	l, _ := readLayout(dir)
	first, last := logName(kindSegment, l.segments[0]), logName(kindSegment,
		l.segments[len(l.segments)-1])
	snapshot := logName(kindSnapshot, l.snapshot)
	change := func(name string, f func(b []byte) []byte) *disktest.Dir {
		return dir.With(name, f(slices.Clone(dir.Names[name].Data)))
	}
	without := func(name string) *disktest.Dir {
		c := dir.With(name, nil)
		delete(c.Names, name)
		return c
	}
	cut := func(n int) func(b []byte) []byte { return func(b []byte) []byte { return b[:len(b)-n] } }
	newer := func(b []byte) []byte {
		b[8]++
		binary.LittleEndian.PutUint32(b[60:], crc(0, b[:60]))
		return b
	}
	older := func(b []byte) []byte {
		b[8]--
		binary.LittleEndian.PutUint32(b[60:], crc(0, b[:60]))
		return b
	}
	seed := func(name string) uint32 {
		h, _ := decodeHeader(dir.Names[name].Data)
		return h.seed()
	}
	// The closed segment without its last frame, and the snapshot with one more.
	end, last1 := headerSize, 0
	for b := dir.Names[first].Data; end < len(b); {
		f, _ := decodeFrame(b[end:], seed(first))
		last1, end = end, end+int(f.padded())
	}
	var frames uint64
	for b, at := dir.Names[snapshot].Data, headerSize; at < len(b); frames++ {
		f, _ := decodeFrame(b[at:], seed(snapshot))
		at += int(f.padded())
	}
	again := func(b []byte) []byte {
		return appendFrame(b, seed(snapshot), frame{sequence: frames + 1, kind: frameEnd}, nil)
	}
	whole, _, starts := segment(t, 5)
	gap := slices.Concat(whole.Names["seg-1.log"].Data[:starts[2]],
		whole.Names["seg-1.log"].Data[starts[3]:])
	other := disktest.New()
	OpenIn(context.Background(), other, Options{})
	for what, c := range map[string]struct {
		dir  *disktest.Dir
		want string
	}{
		"last data frame": {change(last,
			func(b []byte) []byte { b[len(b)-frameSize-12] ^= 1; return b }), "is damaged at " +
			"offset"},
		"closed segment cut": {change(first, cut(8)), first + " is damaged at offset"},
		"snapshot cut":       {change(snapshot, cut(frameSize)), "the snapshot has no proper end"},
		"snapshot with more": {change(snapshot,
			func(b []byte) []byte {
				return append(b, b[headerSize:]...)
			}), snapshot + " is damaged"},
		"snapshot missing": {without(snapshot), "seg-1.log is damaged: the file is missing"},
		"segment missing":  {without(first), first + " is damaged: the file is missing"},
		"STORE missing":    {without(storeName), "STORE is damaged: the file is missing"},
		"STORE cut": {change(storeName, cut(5)),
			"STORE is damaged: not as it was written"},
		"STORE with more": {change(storeName, func(b []byte) []byte { return append(b, 'x') }),
			"STORE is damaged"},
		"newer STORE": {change(storeName, func(b []byte) []byte {
			line, _, _ := strings.Cut(strings.Replace(string(b), "version 2", "version 9", 1),
				", check")
			return fmt.Appendf([]byte(line), storeCheck, crc(0, []byte(line)))
		}), ErrNewer.Error()},
		"older STORE": {change(storeName,
			func([]byte) []byte {
				return []byte("kvserver store, version 1, id 00112233445566778899aabbccddeeff\n")
			}), ErrOlder.Error()},
		"older segment": {change(last, older), ErrOlder.Error()},
		"STORE of no version": {change(storeName,
			func(b []byte) []byte {
				return bytes.Replace(b, []byte("version 2"), []byte("version 3"), 1)
			}), "STORE is damaged: not as it was written"},
		"another store's STORE": {dir.With(storeName, other.Names[storeName].Data),
			"STORE is damaged: it is another store's"},
		"newest missing": {without(last), last + " is damaged: the file is missing"},
		"frame missing": {whole.With("seg-1.log", gap),
			fmt.Sprintf("seg-1.log is damaged at offset %d, frame 3: frame 3 is missing",
				starts[2])},
		"closed segment's last": {change(first, func(b []byte) []byte { return b[:last1] }),
			"the frame that says that another file follows is missing"},
		"closed segment's end": {change(first,
			func(b []byte) []byte { clear(b[last1:]); return b }), first + " is damaged at offset"},
		"snapshot ends twice": {change(snapshot, again), "the snapshot has no proper end"},
		"newer segment":       {change(last, newer), ErrNewer.Error()},
		"newer snapshot":      {change(snapshot, newer), ErrNewer.Error()},
		"a number too far":    {dir.With("seg-9223372036854775808.log", nil), ErrNotOurs.Error()},
		"empty segment": {change(last, func(b []byte) []byte { return nil }),
			last + " is damaged: shorter than a header"},
		"another store's file": {dir.With(last, other.Names["seg-1.log"].Data),
			"the file belongs to another store"},
		"renamed file": {dir.With(last, dir.Names[snapshot].Data),
			"the file is another one, renamed"},
		"all logs gone": {func() *disktest.Dir {
			c := without(last)
			for n := range c.Names {
				if n != storeName {
					delete(c.Names, n)
				}
			}
			return c
		}(), "the file is missing"},
		"somebody else's folder": {dir.With("photo.jpg", nil), ErrNotOurs.Error()},
		"segment of zeros": {change(first, func(b []byte) []byte { clear(b); return b }),
			first + " is damaged: not a log file"},
	} {
		before := maps.Clone(c.dir.Names)
		_, err := OpenIn(context.Background(), c.dir, Options{})
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %q", what, err, c.want)
		}
		if c.dir.Locked || !maps.Equal(before, c.dir.Names) {
			t.Errorf("%s: something was changed or is still locked", what)
		}
		if errors.Is(err, ErrNotOurs) || errors.Is(err, ErrNewer) || errors.Is(err, ErrOlder) {
			_, checkErr := check(c.dir)
			_, repairErr := RepairIn(c.dir, time.Now())
			if checkErr == nil || repairErr == nil || !maps.Equal(before, c.dir.Names) {
				t.Errorf("%s: check says %v, repair %v", what, checkErr, repairErr)
			}
			continue
		}
		report, checkErr := check(c.dir)
		if checkErr != nil || !report.Damaged {
			t.Errorf("%s: check says %v, %v", what, report, checkErr)
		}
		report, err = RepairIn(c.dir, time.Time{})
		if what == "all logs gone" {
			if err == nil || !maps.Equal(before, c.dir.Names) {
				t.Errorf("%s: repair says %v, %v", what, report, err)
			}
			continue
		}
		if err != nil || !report.Damaged {
			t.Errorf("%s: repair says %v, %v", what, report, err)
		}
		if what == "closed segment's end" && !strings.Contains(fmt.Sprint(report),
			"LOST    bytes") {
			t.Errorf("%s: repair says %v", what, report)
		}
		if d, err := OpenIn(context.Background(), c.dir, Options{}); err != nil {
			t.Errorf("%s: after repair: %v", what, err)
		} else {
			d.Put("after", "repair")
			d.Close()
			if report, err := check(c.dir); err != nil || report.Damaged {
				t.Errorf("%s: check after repair: %v, %v", what, report, err)
			}
		}
	}
}

// Ensure that repair saves all but what is damaged, and says what that is.
func TestRepair(t *testing.T) {
	dir, name, starts := segment(t, 8)
	data := slices.Clone(dir.Names[name].Data)
	data[starts[3]+frameSize+2] ^= 1                          // the fourth frame's records
	bad := dir.With(name, append(data, make([]byte, 500)...)) // room is no loss
	report, err := RepairIn(bad, time.Time{})
	if err != nil {
		t.Fatal(err)
	}
	text := strings.Join(report.Lines, "\n")
	for _, want := range []string{
		fmt.Sprintf("DAMAGED dir/seg-1.log is damaged at offset %d, frame 4", starts[3]),
		fmt.Sprintf("LOST    bytes %d to %d of dir/seg-1.log", starts[3], starts[4]),
		"repaired: 8 keys, 14 values",
	} {
		if !strings.Contains(text, want) {
			t.Errorf("repair does not say %q:\n%s", want, text)
		}
	}
	if strings.Count(text, "LOST") != 1 {
		t.Errorf("repair tells of other losses:\n%s", text)
	}
	d, err := OpenIn(context.Background(), bad, Options{})
	if err != nil {
		t.Fatal(err)
	}
	want := []string{"value0", "value1", "value2", "value4", "value5", "value6", "value7"}
	if got := d.Get("key"); !slices.Equal(got, want) {
		t.Errorf("after repair %q, want %q", got, want)
	}
	d.Close()
	if report, err := RepairIn(bad, time.Time{}); err != nil || report.Damaged {
		t.Errorf("repair of a good store: %v, %v", report, err)
	}
}

// Ensure that Repair of a store of which every log file is gone says so, and changes nothing.
func TestRepairOfNothing(t *testing.T) {
	dir, name, _ := segment(t, 1)
	delete(dir.Names, name)
	found := slices.Sorted(maps.Keys(dir.Names))
	report, err := RepairIn(dir, time.Time{})
	text := strings.Join(report.Lines, "\n")
	if !errors.Is(err, ErrNothingRead) || !strings.Contains(text, "LOST    everything") {
		t.Errorf("%v, and it says\n%s", err, text)
	}
	if now := slices.Sorted(maps.Keys(dir.Names)); !slices.Equal(now, found) {
		t.Errorf("of %q it makes %q", found, now)
	}
}

// Ensure that a store in a log is like one in memory, through any number of
// restarts, and that its files stay within bounds.
func TestDurableIsLikeTheModel(t *testing.T) {
	for _, fsync := range []time.Duration{FsyncAlways, FsyncNever, time.Hour} {
		dir, m, h := disktest.New(), model{}, rand.New(rand.NewPCG(3, 3))
		for range 30 {
			d, err := openSmall(dir, Options{Fsync: fsync})
			if err != nil {
				t.Fatal(err)
			}
			checkSame(t, d, m)
			for range 50 {
				for range h.IntN(10) {
					randomStep(t, h, d, m)
				}
				if err := d.Commit(); err != nil {
					t.Fatal(err)
				}
				d.settle()
				var disk, live int64
				for _, f := range dir.Names {
					disk += int64(len(f.Data))
				}
				_, values, bytes := d.Size()
				live = bytes + int64(values)*recordExtra
				if most := 2*live + d.minCompact + 3*d.segmentSize; disk > most {
					t.Fatalf("%d bytes on disk for %d live ones, want at most %d", disk, live, most)
				}
			}
			checkSame(t, d, m)
			if err := d.Close(); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// Ensure that reads alone cost no I/O, and that a Commit costs one write and one
// fsync whatever it holds.
func TestCommitCosts(t *testing.T) {
	dir := disktest.New()
	d, err := OpenIn(context.Background(), dir, Options{})
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		do   func()
		want int
	}{
		{func() {}, 0},
		{func() { d.Get("k"); d.Delete("k") }, 0},
		{func() { d.Put("k", "v") }, 2},
		{func() { d.Get("k") }, 0},
		{func() {
			for range 1000 {
				d.Put("k", "v")
				d.Update("k", "v", "w")
			}
			d.Delete("k")
		}, 2},
	} {
		before := dir.Calls
		c.do()
		if err := d.Commit(); err != nil || dir.Calls-before != c.want {
			t.Errorf("%d I/O calls, want %d (%v)", dir.Calls-before, c.want, err)
		}
	}
}

// Ensure that with a time between fsyncs the first one comes in time, without
// another Commit, and that a failing one is not forgotten.
func TestFsyncInTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir := disktest.New()
		d, err := OpenIn(context.Background(), dir, Options{Fsync: time.Second})
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
		if err := d.Commit(); !errors.Is(err, disktest.ErrDisk) {
			t.Errorf("Commit after a failed fsync: %v", err)
		}
		if err := d.Close(); !errors.Is(err, disktest.ErrDisk) {
			t.Errorf("Close after a failed fsync: %v", err)
		}
	})
}

// slowDir is a disktest.Dir on which, once it is told so, writing takes a time.
type slowDir struct {
	*disktest.Dir
	writing, syncing time.Duration
	running, most    atomic.Int32 // Syncs at a time
}

type slowFile struct {
	File
	d *slowDir
}

func (d *slowDir) Extend(name string) (File, error) {
	f, err := d.Dir.Extend(name)
	return slowFile{f, d}, err
}

func (f slowFile) WriteAt(p []byte, off int64) (int, error) {
	<-time.After(f.d.writing)
	return f.File.WriteAt(p, off)
}

func (f slowFile) Sync() error {
	f.d.most.Store(max(f.d.most.Load(), f.d.running.Add(1)))
	defer f.d.running.Add(-1)
	err := f.File.Sync()
	<-time.After(f.d.syncing)
	return err
}

// Ensure that a timer's fsync does not count for what is written while it lasts.
func TestWriteDuringFsync(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir := &slowDir{Dir: disktest.New()}
		d, err := openSmall(dir, Options{Fsync: time.Second})
		if err != nil {
			t.Fatal(err)
		}
		dir.syncing = time.Second
		d.Put("a", "1")
		d.Commit()
		<-time.After(3 * time.Second / 2)
		d.Put("b", "2")
		d.Commit()
		<-time.After(5 * time.Second)
		if after, err := OpenIn(context.Background(), dir.Crash(rand.New(rand.NewPCG(1, 1))),
			Options{}); err != nil || len(after.Get("b")) != 1 {
			t.Errorf("long after the fsync was due a power failure leaves %q, %v", after.Get("b"),
				err)
		}
		d.Close()
	})
}

// Ensure that a large Commit is written in frames of a bounded size.
func TestLargeCommitIsSplit(t *testing.T) {
	dir := disktest.New()
	d, err := OpenIn(context.Background(), dir, Options{})
	if err != nil {
		t.Fatal(err)
	}
	d.spare = 0
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
	for err == nil {
		var f frame
		if f, _, err = l.read(); f.length > maxFramePut+2000 {
			t.Errorf("a frame has %d bytes", f.length)
		}
	}
	if err != errEnd || l.next < 5 {
		t.Errorf("after %d frames: %v", l.next-1, err)
	}
}

// Ensure that a timer's fsync during a Write does not count for what that writes.
func TestFsyncDuringWrite(t *testing.T) {
	for _, value := range []string{"small", strings.Repeat("fills the file", 100)} {
		synctest.Test(t, func(t *testing.T) {
			dir := &slowDir{Dir: disktest.New()}
			d, err := openSmall(dir, Options{Fsync: time.Second})
			if err != nil {
				t.Fatal(err)
			}
			d.Put("a", "1")
			d.Commit() // begins the second
			dir.writing = 2 * time.Second
			d.Put("b", value)
			if err := d.Commit(); err != nil {
				t.Fatal(err)
			}
			<-time.After(5 * time.Second)
			for seed := range uint64(20) {
				after, err := OpenIn(context.Background(),
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

// Ensure that unsynced frames that reached the disk out of order are a torn end,
// not damage, when nobody was promised them.
func TestUnsyncedFramesMayBeLost(t *testing.T) {
	dir := disktest.New()
	first, _ := OpenIn(context.Background(), dir, Options{Fsync: FsyncNever})
	first.reserve = 0
	var starts []int
	f := dir.Names["seg-1.log"]
	for i := range 5 {
		starts = append(starts, len(f.Data))
		first.Put("key", fmt.Sprint(i))
		first.Commit()
	}
	dir.Locked = false
	data := slices.Clone(f.Data)
	clear(data[starts[2]:starts[3]])
	d, err := OpenIn(context.Background(), dir.With("seg-1.log", data), Options{})
	if err != nil {
		t.Fatal(err)
	}
	if got := d.Get("key"); !slices.Equal(got, []string{"0", "1"}) {
		t.Errorf("got %q, want the two before the gap", got)
	}
	first.Close()
	data = slices.Clone(f.Data)
	clear(data[starts[2]:starts[3]])
	var damage *DamageError
	if _, err := OpenIn(context.Background(), dir.With("seg-1.log", data),
		Options{}); !errors.As(err, &damage) {
		t.Errorf("with a gap, after a stop that synced everything: %v", err)
	}
}

// Ensure that a compaction that fails anywhere, or is stopped, costs nothing but
// room, and is said.
func TestCompactionMayFail(t *testing.T) {
	dir, d := newSmall(t, Options{})
	d.minCompact = 1 << 30
	h := history{model{}, model{}}
	script(t, d, &h)
	dir.Locked = false
	if err := d.rotate(); err != nil {
		t.Fatal(err)
	}
	compaction := compaction{dir: dir.With(lockName, nil), through: d.number - 1, store: d.snapshot()}
	compaction.header = fileHeader{kind: kindSnapshot, id: d.id, number: d.number - 1,
		first: d.first}
	stop := make(chan struct{})
	close(stop)
	stopped := compaction
	stopped.stop = stop
	if _, err := stopped.run(); err != errStopped {
		t.Errorf("stopped, a compaction returns %v", err)
	}
	for n, failed := 1, true; failed; n++ {
		c := dir.With(lockName, nil)
		c.FailAt = n
		compaction.dir = c
		_, err := compaction.run()
		failed = c.Calls >= n
		c.FailAt = 0
		if failed && !errors.Is(err, disktest.ErrDisk) && err != nil {
			t.Fatalf("call %d: %v", n, err)
		}
		for name := range c.Names { // perhaps the disk is full
			if strings.HasPrefix(name, "snap") && strings.HasSuffix(name, tmpSuffix) {
				t.Fatalf("call %d failed: %s is left", n, name)
			}
		}
		h.checkKept(t, c, fmt.Sprint("compaction whose call failed: ", n))
	}
	var log bytes.Buffer
	d.log = slog.New(slog.NewTextHandler(&log, nil))
	d.noteCompaction(compactionEnd{err: disktest.ErrDisk})
	if !strings.Contains(log.String(), "cannot compact the log") {
		t.Errorf("the log says %q", log.String())
	}
}

// ---- what a second hunt has found

// fourSegments returns a store that is in its fourth file, and has compacted nothing.
func fourSegments(t *testing.T, opts Options) (*disktest.Dir, *Durable) {
	dir, d := newSmall(t, opts)
	d.minCompact = 1 << 40
	for i := 0; d.number < 4; i++ {
		d.Put("key"+fmt.Sprint(i), strings.Repeat("v", 50))
		if err := d.Commit(); err != nil {
			t.Fatal(err)
		}
	}
	return dir, d
}

// Ensure that the end of a full file is not taken for torn because the next one is empty: that
// one's header says where it ended.
func TestDamageBeforeAnEmptyFile(t *testing.T) {
	for _, how := range []string{"zeros", "cut", "rubbish"} {
		t.Run(how, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				dir, d := fourSegments(t, Options{})
				keys, _, _ := d.Size()
				<-time.After(time.Hour)
				image := dir.Crash(rand.New(rand.NewPCG(1, 1)))
				d.Close()
				data := slices.Clone(image.Names["seg-3.log"].Data)
				const n = 700 // bytes of a bad sector
				switch how {
				case "zeros":
					clear(data[len(data)-n:])
				case "cut":
					data = data[:len(data)-n]
				case "rubbish":
					for i := range n {
						data[len(data)-n+i] = 'x'
					}
				}
				image = image.With("seg-3.log", data)
				r, _ := CheckIn(image)
				again, err := openSmall(image, Options{})
				if !errors.As(err, new(*DamageError)) {
					got, _, _ := again.Size()
					t.Errorf("%s: Open: %v, %d of %d keys; Check says damaged: %v", how, err, got, keys,
						r.Damaged)
					again.stopTimer()
				}
			})
		})
	}
}

// Ensure that what a start cut, and could not clear on the disk, does not come back behind what
// is committed later.
func TestTornEndStaysCut(t *testing.T) {
	dir := disktest.New()
	open := func(dir *disktest.Dir) (*Durable, error) {
		return OpenIn(context.Background(), dir, Options{})
	}
	d, err := open(dir)
	if err != nil {
		t.Fatal(err)
	}
	// Frames of whole sectors.
	put := func(d *Durable, key, v string, end int64) {
		n := end - d.current.size - frameSize - int64(len(key)) - 4
		d.Put(key, v+strings.Repeat("x", int(n)-len(v)))
		if err := d.Commit(); err != nil {
			t.Fatal(err)
		}
		if d.current.size != end {
			t.Fatalf("size %d, want %d", d.current.size, end)
		}
	}
	put(d, "a", "first", 512)
	// What a power failure may leave of one large Commit: its second frame, not the first.
	d.opts.Fsync = FsyncNever
	put(d, "b", "torn", 1024)
	put(d, "c", "CUT", 1536)
	image := dir.Crash(rand.New(rand.NewPCG(1, 1)))
	data := slices.Clone(dir.Names["seg-1.log"].Data)
	clear(data[512:1024])
	image = image.With("seg-1.log", data)

	// A start whose fsync of the log fails.
	failed := false
	image.Before = func(c disktest.Call) error {
		if c.What == "sync" && c.Name == "seg-1.log" && !failed {
			failed = true
			return disktest.ErrDisk
		}
		return nil
	}
	if _, err := open(image); err == nil || !failed {
		t.Fatal("the start does not fail")
	}
	image.Before = nil
	// The next one succeeds, and answers.
	d, err = open(image)
	if err != nil {
		t.Fatal(err)
	}
	if len(d.Get("c")) != 0 {
		t.Fatal("c was not cut")
	}
	put(d, "b", "new", 1024)
	d.Get("c") // a client is told that there is none
	if err := d.Commit(); err != nil {
		t.Fatal(err)
	}
	d, err = open(image.Crash(rand.New(rand.NewPCG(1, 1))))
	if err != nil {
		t.Fatal(err)
	}
	if c := d.Get("c"); len(c) != 0 {
		t.Errorf("a commit that was cut, and answered as not there, is back: %.10q", c)
	}
}

// Ensure that after a start an idle log is vouched for, too.
func TestIdleAfterARestart(t *testing.T) {
	for _, restart := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			dir := disktest.New()
			d, err := OpenIn(context.Background(), dir, Options{})
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
				if d, err = OpenIn(context.Background(), dir, Options{}); err != nil {
					t.Fatal(err)
				}
			}
			<-time.After(time.Hour)
			image := dir.Crash(rand.New(rand.NewPCG(1, 1)))
			data := slices.Clone(image.Names["seg-1.log"].Data)
			data[last] ^= 1
			var damage *DamageError
			again, err := OpenIn(context.Background(), image.With("seg-1.log", data), Options{})
			if !errors.As(err, &damage) {
				t.Errorf("restart %v: a flipped bit in an old commit: %v, it has %d values", restart, err,
					len(again.Get("key")))
			}
			d.Close()
		})
	}
}

// Ensure that on a full disk a start's timer does not write, and does not try again and again.
func TestFullDiskIsNotVouchedFor(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir, d := newSmall(t, Options{})
		d.Put("key", "value")
		if err := d.Commit(); err != nil {
			t.Fatal(err)
		}
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

// Ensure that a rotation for which the disk has no room is no failure, however little is missing.
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
		// killed before the zeros got to disk, or another start's Deletes used them up
		dir = dir.Kill()
		f := dir.Names["seg-1.log"]
		f.Data = f.Data[:d.size]
		d, err := openSmall(dir, Options{})
		if err != nil {
			t.Fatal(err)
		}
		d.segmentSize = d.size // it is due
		used := 0
		for _, f := range dir.Names {
			used += len(f.Data)
		}
		dir.Room = used + free
		d.minCompact = -1 << 40 // wasteful, as when a compaction failed for want of room
		if err := d.Commit(); err != nil {
			t.Errorf("%d bytes free: %v", free, err)
		}
	}
}

// Ensure that a rotation that failed, and left its new file, does not spoil a heal.
func TestHealAfterAFailedRotation(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir, d := newSmall(t, Options{})
		var refuses atomic.Bool
		dir.Before = func(c disktest.Call) error {
			if c.What == "sync" && c.Name == "" && refuses.Load() {
				return syscall.ENOSPC
			}
			return nil
		}
		refuses.Store(true)
		for d.size < d.segmentSize {
			d.Put("key", strings.Repeat("v", 50))
			if err := d.Commit(); err != nil {
				t.Fatal(err)
			}
		}
		refuses.Store(false)
		dir.Remove(storeName)
		d.looked = time.Time{}
		d.rotateAfter = time.Now().Add(time.Second)
		if err := d.Commit(); err != nil {
			t.Fatal(err)
		}
		if r, err := CheckIn(dir); err != nil || r.Damaged {
			t.Errorf("a check beside the store: %v, %v", r, err)
		}
		if err := d.Close(); err != nil {
			t.Fatal(err)
		}
		if _, err := openSmall(dir, Options{}); err != nil {
			t.Error(err)
		}
	})
}

// Ensure that a heal that fails leaves nothing that is in the way when the file is put back.
func TestFailedHealLeavesNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir := disktest.New()
		var refuses atomic.Bool
		dir.Before = func(c disktest.Call) error {
			if c.What == "sync" && c.Name == "" && refuses.Load() {
				return syscall.ENOSPC
			}
			return nil
		}
		d, err := openSmall(dir, Options{})
		if err != nil {
			t.Fatal(err)
		}
		d.Put("key", "value")
		if err := d.Commit(); err != nil {
			t.Fatal(err)
		}
		store := dir.Names[storeName]
		dir.Remove(storeName)
		refuses.Store(true)
		<-time.After(2 * time.Second)
		if err := d.Commit(); err != nil {
			t.Fatal(err)
		}
		refuses.Store(false)
		dir.Mu.Lock()
		dir.Names[storeName] = store
		dir.Mu.Unlock()
		r, err := CheckIn(dir)
		if err != nil || r.Damaged {
			t.Errorf("check: %v %v", r, err)
		}
		if _, err := openSmall(dir.Kill(), Options{}); err != nil {
			t.Errorf("killed: %v", err)
		}
		d.Close()
	})
}

// Ensure that a missing descriptor is not called damage.
func TestNoDescriptorIsNoDamage(t *testing.T) {
	dir, d := newSmall(t, Options{})
	refuse := true
	dir.Before = func(c disktest.Call) error {
		if refuse && c.What == "remove" {
			return disktest.ErrDisk
		}
		return nil
	}
	for i := 0; d.number < 8; i++ {
		d.Put("key", "value")
		d.Delete("key")
		if err := d.Commit(); err != nil {
			t.Fatal(err)
		}
		d.settle()
	}
	d.stopTimer()
	refuse = false
	for n := 1; n < 100; n++ {
		image := dir.Kill()
		image.FailAt, image.Failure = n, syscall.EMFILE
		r, err := check(image)
		if r.Damaged {
			t.Errorf("call %d: %v %v", n, r.Lines, err)
		}
		image = dir.Kill()
		image.FailAt, image.Failure = n, syscall.EMFILE
		if _, err := openSmall(image, Options{}); err != nil && strings.Contains(err.Error(), "damaged") {
			t.Errorf("call %d: Open: %v", n, err)
		}
	}
}

// Ensure that Repair takes a snapshot that cannot be opened for a moment for no worse than it is.
func TestRepairKeepsAGoodSnapshot(t *testing.T) {
	dir, d := newSmall(t, Options{})
	refuse := true
	dir.Before = func(c disktest.Call) error {
		if refuse && c.What == "remove" {
			return disktest.ErrDisk
		}
		return nil
	}
	d.minCompact = 1 << 40
	for i := 0; d.number < 4 || d.number < 8 && d.compacted == nil; i++ {
		if d.number == 3 {
			d.minCompact = 2000
		}
		if i >= 8 && i < 12 {
			d.Put("only"+fmt.Sprint(i), "value")
		}
		d.Set("key"+fmt.Sprint(i%10), strings.Repeat("v", 50)+fmt.Sprint(i))
		if err := d.Commit(); err != nil {
			t.Fatal(err)
		}
	}
	d.settle() // the snapshot is there, the old files could not be removed
	want := map[string]string{}
	for k, v := range d.All() {
		want[k] = v[0]
	}
	d.stopTimer()
	refuse = false
	dir.Before = nil
	l, _ := readLayout(dir)
	if l.snapshot == 0 || len(l.obsolete) == 0 {
		t.Fatalf("%+v", l)
	}
	data := slices.Clone(dir.Names["seg-1.log"].Data)
	for i := 900; i < len(data); i++ {
		data[i] = 'x' // a bad block in a file that nobody needs
	}
	snap := logName(kindSnapshot, l.snapshot)
	for nth := 0; nth < 6; nth++ {
		image := dir.With("seg-1.log", data)
		n := 0
		image.Before = func(c disktest.Call) error {
			if c.What == "open" && c.Name == snap {
				if n++; n == nth {
					return &os.PathError{Op: "open", Path: snap, Err: syscall.EMFILE}
				}
			}
			return nil
		}
		r, err := RepairIn(image, time.Now())
		if err != nil {
			continue // that is honest
		}
		image.Before = nil
		after, err := openSmall(image, Options{})
		if err != nil {
			t.Fatal(err)
		}
		lost := 0
		for k, v := range want {
			if got := after.Get(k); len(got) != 1 || got[0] != v {
				lost++
			}
		}
		if lost > 0 || r.Lost {
			t.Errorf("open %d of the snapshot fails: %d of %d keys lost or other\n%s", nth, lost,
				len(want), strings.Join(r.Lines, "\n"))
		}
	}
}

// Ensure that Repair says what is lost where a file is cut inside its header, or between two
// frames.
func TestRepairSaysWhatIsLost(t *testing.T) {
	for _, cut := range []string{"header", "frames"} {
		dir, d := fourSegments(t, Options{})
		keys, _, _ := d.Size()
		d.Close()
		data := slices.Clone(dir.Names["seg-2.log"].Data)
		if cut == "header" {
			data = data[:20]
		} else {
			seed := fileHeader{kind: kindSegment, id: d.id, number: 2}.seed()
			f, ok := decodeFrame(data[headerSize:], seed)
			if !ok {
				t.Fatal("no frame")
			}
			data = data[:headerSize+f.padded()]
		}
		image := dir.With("seg-2.log", data)
		r, err := RepairIn(image, time.Now())
		if err != nil {
			t.Fatal(err)
		}
		after, err := openSmall(image, Options{})
		if err != nil {
			t.Fatal(err)
		}
		if got, _, _ := after.Size(); got < keys && !r.Lost {
			t.Errorf("cut in %s: %d of %d keys are left, and Repair says\n%s", cut, got, keys,
				strings.Join(r.Lines, "\n"))
		}
	}
}

// Ensure that Repair does not say so where nothing is.
func TestRepairOfNothingLost(t *testing.T) {
	for _, zeros := range []bool{false, true} {
		dir, d := fourSegments(t, Options{})
		d.Put("last", "value")
		if err := d.Commit(); err != nil {
			t.Fatal(err)
		}
		keys, _, _ := d.Size()
		name := logName(kindSegment, d.number)
		d.stopTimer()
		image := dir.With(storeName, []byte("rubbish"))
		if zeros { // a rotation that was killed before its trim
			prev := logName(kindSegment, d.number-1)
			image = image.With(prev, append(slices.Clone(image.Names[prev].Data), make([]byte, 100)...))
		} else {
			image = image.With(name, image.Names[name].Data[:headerSize])
			keys-- // its only frame is what we cut off
		}
		r, err := RepairIn(image, time.Now())
		if err != nil {
			t.Fatal(err)
		}
		after, err := openSmall(image, Options{})
		if err != nil {
			t.Fatal(err)
		}
		got, _, _ := after.Size()
		if got < keys || r.Lost {
			t.Errorf("zeros %v: %d of %d keys, and Repair says\n%s", zeros, got, keys,
				strings.Join(r.Lines, "\n"))
		}
	}
}

// Ensure that a Repair that is killed anywhere, and run again, loses nothing, and says so.
func TestKilledRepairThenAgain(t *testing.T) {
	for _, room := range []bool{false, true} {
		for n := 1; n < 200; n++ {
			dir, d := newSmall(t, Options{})
			d.minCompact = 1 << 40
			if !room {
				d.reserve, d.spare = 0, 0
			}
			h := history{model{}, model{}}
			if err := script(t, d, &h); err != nil {
				t.Fatal(err)
			}
			d.Close()
			image := dir.With(storeName, []byte("rubbish"))
			image.FailAt, image.Forever = n, true
			RepairIn(image, time.Now())
			reached := image.Calls >= n
			image.FailAt, image.Locked = 0, false
			image = image.Crash(rand.New(rand.NewPCG(uint64(n), 1)))
			if !reached {
				break
			}
			if a, err := openSmall(image.Kill(), Options{}); err == nil {
				if !h.told.equal(a) {
					t.Errorf("killed at call %d: opens with other data", n)
				}
			}
			r, err := RepairIn(image, time.Now())
			if err != nil {
				t.Errorf("call %d: %v", n, err)
			}
			if r.Lost {
				t.Errorf("killed at call %d: the next Repair says\n%s", n, strings.Join(r.Lines, "\n"))
			}
			a, err := openSmall(image, Options{})
			if err != nil || !h.told.equal(a) {
				t.Errorf("call %d: after repair: %v", n, err)
			}
		}
	}
}

// Ensure that a copy that fails leaves no file, so that it can be tried again.
func TestFailedBackupLeavesNoFile(t *testing.T) {
	dir, d := newSmall(t, Options{})
	script(t, d, &history{model{}, model{}})
	d.Close()
	for n := 1; ; n++ {
		out := disktest.New()
		out.FailAt = n
		_, err := BackupIn(dir, out, nil)
		if err == nil {
			break
		}
		out.FailAt = 0
		if len(out.Names) > 0 {
			t.Errorf("call %d: %v; there is %v", n, err, slices.Sorted(maps.Keys(out.Names)))
		}
	}
}

// ---- real files

// Ensure that a long key with many values, which a snapshot has once for each, is not
// compacted for nothing, and that it is when nothing but one Delete comes.
func TestCompactionIsWorthIt(t *testing.T) {
	d, err := openSmall(disktest.New(), Options{Fsync: FsyncNever})
	if err != nil {
		t.Fatal(err)
	}
	d.segmentSize, d.minCompact = 10_000, 10_000
	key, runs := strings.Repeat("k", 100), 0
	for i := range 5000 {
		d.Put(key, fmt.Sprint(i))
		d.Commit()
		if d.compacted != nil {
			runs++
			d.settle()
		}
	}
	if runs > 0 {
		t.Errorf("%d compactions in %d files with nothing to leave out", runs, d.number)
	}
	d.Delete(key)
	d.Commit()
	d.settle()
	if disk := d.fullBytes + d.size; disk > 2*10_000 {
		t.Errorf("%d bytes on disk for no data", disk)
	}
	d.Close()
}

// Ensure that a compaction which is tried again, where nothing was written since the first try
// has put its snapshot there and then failed, does not remove that snapshot.
func TestCompactionIsTriedAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir := disktest.New()
		var refuses atomic.Bool
		dir.Before = func(c disktest.Call) error {
			if c.What == "remove" && strings.HasPrefix(c.Name, "seg-") && refuses.Load() {
				return disktest.ErrDisk
			}
			return nil
		}
		d, err := openSmall(dir, Options{})
		if err != nil {
			t.Fatal(err)
		}
		d.Put("kept", "value")
		refuses.Store(true)
		least := d.minCompact
		for d.minCompact = 1 << 40; d.compacted == nil; {
			d.Put("key", "value")
			d.Delete("key")
			if err := d.Commit(); err != nil {
				t.Fatal(err)
			}
			if d.number == 10 {
				d.minCompact = least
			}
		}
		d.settle()
		refuses.Store(false)
		<-time.After(compactTime)
		if err := d.Commit(); err != nil {
			t.Fatal(err)
		}
		if d.compacted == nil {
			t.Fatal("there is no second try")
		}
		d.settle()
		again, err := openSmall(dir.Kill(), Options{})
		if err != nil || len(again.Get("kept")) != 1 {
			t.Errorf("after a kill: %v", err)
		}
		d.Close()
	})
}

// Ensure that what a compaction leaves that cannot remove a file goes with the next one.
func TestCompactionRemovesLeftovers(t *testing.T) {
	dir := disktest.New()
	var refuses atomic.Bool
	dir.Before = func(c disktest.Call) error {
		if c.What == "remove" && refuses.Load() {
			return disktest.ErrDisk
		}
		return nil
	}
	d, err := openSmall(dir, Options{Fsync: FsyncNever})
	if err != nil {
		t.Fatal(err)
	}
	churn := func() {
		for number := d.number; d.number < number+5; {
			d.Put("key", "value")
			d.Delete("key")
			if err := d.Commit(); err != nil {
				t.Fatal(err)
			}
		}
		d.settle()
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
}

// Ensure that neither a stop and a start, nor a compaction that fails again and again,
// makes one file after the other where nothing is written.
func TestNoFilesForNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir := disktest.New()
		var refuses atomic.Bool
		refuses.Store(true)
		dir.Before = func(c disktest.Call) error {
			if refuses.Load() && c.What == "create" && strings.HasPrefix(c.Name, "snap") {
				return disktest.ErrDisk
			}
			return nil
		}
		d, err := openSmall(dir, Options{Fsync: FsyncNever})
		if err != nil {
			t.Fatal(err)
		}
		for d.number < 10 {
			d.Put("key", "value")
			d.Delete("key")
			if err := d.Commit(); err != nil {
				t.Fatal(err)
			}
		}
		var number uint64
		for round := range 10 {
			<-time.After(compactTime)
			if err := d.Commit(); err != nil {
				t.Fatal(err)
			}
			d.settle()
			if round == 2 {
				number = d.number
			}
		}
		for range 5 {
			if err := d.Close(); err != nil {
				t.Fatal(err)
			}
			if d, err = openSmall(dir, Options{Fsync: FsyncNever}); err != nil {
				t.Fatal(err)
			}
		}
		if d.number > number {
			t.Errorf("file %d after file %d, and nothing was written", d.number, number)
		}
		refuses.Store(false)
		<-time.After(compactTime)
		d.Commit()
		d.settle()
		if disk := d.fullBytes + d.size; disk > 1000 {
			t.Errorf("%d bytes on disk for no data", disk)
		}
		d.Close()
	})
}

// Ensure that a bit that rots in a full file is healed by the next compaction.
func TestCompactionHeals(t *testing.T) {
	dir := disktest.New()
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
	if r, err := CheckIn(dir); err != nil || !r.Damaged {
		t.Fatalf("a rotten file: %v, %v", r, err)
	}
	d.minCompact = 0
	d.Delete("key")
	d.Put("key", "value")
	for number := d.number; d.number == number; {
		d.Put("other", "value")
		d.Commit()
	}
	d.settle()
	d.Close()
	if r, err := CheckIn(dir); err != nil || r.Damaged {
		t.Errorf("after a compaction: %v, %v", r, err)
	}
	if d, err = OpenIn(context.Background(), dir, Options{}); err != nil ||
		!slices.Equal(d.Get("key"), []string{"value"}) {
		t.Errorf("opened again: %v", err)
	}
}

// Ensure that the disk holds no more than twice the live data and what two files may have,
// whatever comes: nothing but Deletes, a huge key, a store that falls quiet while it is
// compacted, and one whose compaction has failed.
func TestDiskUseIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir := disktest.New()
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
			if most := 2*d.logBytes + d.minCompact + d.segmentSize +
				2000; disk > most { // and zeros, and what has just come
				t.Fatalf("%s: %d bytes on disk, want at most %d for %d of data", what, disk, most,
					d.logBytes)
			}
		}
		commit := func(what string) {
			t.Helper()
			if err := d.Commit(); err != nil {
				t.Fatal(err)
			}
			d.settle()
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
		// and perhaps it is compacted now, but is asked nothing more than
		if err := d.Commit(); err != nil {
			t.Fatal(err)
		}
		d.settle()
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
		d.settle()
		dir.Mu.Lock()
		dir.FailAt = 0
		dir.Mu.Unlock()
		<-time.After(compactTime)
		commit("after a failure")
		d.Close()
	})
}

// Ensure that a real directory is kept as a fake one, private, and for one
// process at a time.
func TestRealDirectory(t *testing.T) {
	path := t.TempDir()
	os.Mkdir(filepath.Join(path, "lost+found"), 0o700) // as in the root of a disk
	os.WriteFile(filepath.Join(path, ".notes"), nil, 0o600)
	d, err := Open(context.Background(), path, Options{})
	if err != nil {
		t.Fatal(err)
	}
	d.segmentSize, d.minCompact = 1500, 2000
	h := history{model{}, model{}}
	if err := script(t, d, &h); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(context.Background(), path, Options{}); !errors.Is(err, ErrLocked) ||
		!strings.Contains(err.Error(), fmt.Sprint("by process ", os.Getpid())) {
		t.Errorf("opened twice: %v", err)
	}
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), "KVSTORE_TEST_OPEN="+path, "GORACE=atexit_sleep_ms=0")
	if out, err := cmd.Output(); err != nil || !strings.Contains(string(out), ErrLocked.Error()) {
		t.Errorf("a second process opens it: %s, %v", out, err)
	}
	if r, err := Check(path); err != nil || r.Damaged ||
		!strings.HasPrefix(r.Lines[0], "in use  by process ") {
		t.Errorf("checked while open: %v, %v", r, err)
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	entries, _ := os.ReadDir(path)
	for _, e := range entries {
		if info, _ := e.Info(); !e.IsDir() && info.Mode().Perm() != 0o600 {
			t.Errorf("%s has mode %v", e.Name(), info.Mode())
		}
	}
	report, err := Check(path)
	if err != nil || report.Damaged {
		t.Errorf("Check: %v, %v", report, err)
	}
	if report, err := Repair(path); err != nil || report.Damaged {
		t.Errorf("Repair: %v, %v", report, err)
	}
	l, _ := readLayout(mustDirectory(t, path))
	name := filepath.Join(path, logName(kindSnapshot, l.snapshot))
	b, _ := os.ReadFile(name)
	b[len(b)/2] ^= 1
	os.WriteFile(name, b, 0o600)
	if report, err := Repair(path); err != nil || !report.Damaged {
		t.Errorf("Repair of damage: %v, %v", report, err)
	}
	kept, _ := filepath.Glob(filepath.Join(path, damagedPrefix+"*", "snap-*.log"))
	if len(kept) != 1 {
		t.Errorf("the damaged file is not kept: %q", kept)
	}
	if d, err = Open(context.Background(), path, Options{}); err != nil {
		t.Fatal(err)
	}
	d.Close()
}

// mustDirectory opens a directory.
func mustDirectory(t *testing.T, path string) Directory {
	d, err := openDirectory(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.Close() })
	return d
}

// Ensure that a copy that fails leaves nothing behind: not the directory that was made for it.
func TestFailedBackupLeavesNothing(t *testing.T) {
	path := t.TempDir()
	store, to, there := filepath.Join(path, "store"), filepath.Join(path, "copy"), t.TempDir()
	os.Mkdir(store, 0o700)
	os.WriteFile(filepath.Join(store, storeName), []byte("what is this"), 0o600)
	for _, to := range []string{to, there} {
		if _, err := Backup(store, to, nil); !errors.As(err, new(*DamageError)) {
			t.Errorf("a copy of a damaged store: %v", err)
		}
	}
	if _, err := os.Stat(to); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the directory that was made is there: %v", err)
	}
	if _, err := os.Stat(there); err != nil {
		t.Errorf("the directory that was there is not: %v", err)
	}
}

// Ensure that a directory that cannot be a store is refused by name.
func TestWrongPaths(t *testing.T) {
	path := t.TempDir()
	aFile := filepath.Join(path, "file")
	os.WriteFile(aFile, nil, 0o600)
	for where, want := range map[string]error{
		filepath.Join(path, "none"): ErrMissing,
		aFile:                       ErrNotOurs,
		path:                        ErrNotOurs, // it holds a file
	} {
		for what, f := range map[string]func() error{
			"Open": func() error {
				_, err := Open(context.Background(), where, Options{})
				return err
			},
			"Check":  func() error { _, err := Check(where); return err },
			"Repair": func() error { _, err := Repair(where); return err },
		} {
			if err := f(); !errors.Is(err, want) || !strings.Contains(err.Error(), where) {
				t.Errorf("%s(%s): %v, want %v", what, where, err, want)
			}
		}
	}
	if names, _ := os.ReadDir(path); len(names) != 1 {
		t.Errorf("something was made: %v", names)
	}
}

// Ensure that Durable has each method of a KVStore itself: one that it has of Memory would
// write no record, and what it did would be gone after the next start.
func TestDurableHasEveryMethod(t *testing.T) {
	store, durable := reflect.TypeFor[KVStore](), reflect.TypeFor[*Durable]()
	for i := range store.NumMethod() {
		name := store.Method(i).Name
		method, _ := durable.MethodByName(name)
		file, _ := runtime.FuncForPC(method.Func.Pointer()).FileLine(method.Func.Pointer())
		if isOwn := strings.HasSuffix(file, "durable.go"); isOwn == (name == "Get") {
			t.Errorf("%s of Durable is in %s", name, file)
		}
	}
}

// Ensure that a long load says how far it is.
func TestLoadTellsProgress(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log bytes.Buffer
		p := &progress{ctx: t.Context(), status: new(Status),
			log: slog.New(slog.NewTextHandler(&log, nil)), start: time.Now(), told: time.Now(),
			total: 1000}
		for range 5 {
			<-time.After(400 * time.Millisecond)
			p.step(frame{count: 10, length: 56})
		}
		if stage := p.status.Stage(); stage != "loading 28 %" {
			t.Errorf("after two seconds /healthz would say %q", stage)
		}
		if got := log.String(); strings.Count(got, "msg=loading") != 1 ||
			!strings.Contains(got, "records=30 bytes=288 percent=28") {
			t.Errorf("after two seconds the log is\n%s", got)
		}
	})
}

// fixedDir is a store with an id that does not change from run to run.
func fixedDir(t testing.TB, commits int) *disktest.Dir {
	dir, id := disktest.New(), storeID{1, 2, 3}
	_, err := createLog(dir, "seg-1.log", fileHeader{kind: kindSegment, id: id, number: 1,
		first: 1}, func(w *logWriter) error {
		for i := range commits {
			payload := appendRecord(nil, opPut, 0, "key", fmt.Sprint(i))
			payload = appendRecord(payload, opUpdate, 0, "key", fmt.Sprint(i), "new")
			if err := w.append(frame{sequence: uint64(i + 1), synced: uint64(i), count: 2},
				appendRecord(payload, opDelete, 0, "none")[:len(payload)], 0); err != nil {
				return err
			}
		}
		return nil
	})
	if err == nil {
		err = writeID(dir, id)
	}
	if err != nil {
		t.Fatal(err)
	}
	return dir
}

// Ensure that any bytes in the place of a log are refused or read, without a
// panic, and that what opens goes on to open.
func FuzzRecovery(f *testing.F) {
	const name = "seg-1.log"
	base := fixedDir(f, 5)
	good := base.Names[name].Data
	f.Add(good)
	f.Add(good[:len(good)-3])
	f.Add(good[:headerSize])
	f.Add(append(slices.Clone(good), good[headerSize:]...))
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, data []byte) {
		c := base.With(name, data)
		d, err := OpenIn(context.Background(), c, Options{})
		if err == nil {
			d.Put("k", "v")
			if err := d.Close(); err != nil {
				t.Fatal(err)
			}
			if _, err := OpenIn(context.Background(), c, Options{}); err != nil {
				t.Fatalf("opened, closed, then: %v", err)
			}
			return
		}
		if r, err := check(c); err == nil && !r.Damaged {
			t.Fatal("refused by Open, good to Check")
		}
		if _, err := RepairIn(c, time.Time{}); err == nil {
			if _, err := OpenIn(context.Background(), c, Options{}); err != nil {
				t.Fatalf("after repair: %v", err)
			}
		}
	})
}

// Ensure that any records in a frame are applied or refused, without a panic.
func FuzzRecords(f *testing.F) {
	f.Add(string(appendRecord(appendRecord(nil, opPut, 0, "k", "v"), opUpdate, 0, "k", "v", "w")),
		uint32(2))
	f.Add(string(appendRecord(nil, opDelete, 0, strings.Repeat("k", 200))), uint32(1))
	f.Add("\x01\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", uint32(1))
	f.Fuzz(func(t *testing.T, payload string, count uint32) {
		m := NewMemory()
		if err := apply(m, payload, count); err == nil && int(count) > len(payload) {
			t.Fatalf("%d records in %d bytes", count, len(payload))
		}
	})
}
