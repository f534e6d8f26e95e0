package durable

import (
	"bytes"
	"context"
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

// spoils are changes that people and programs make to the files of a running store, in place.
var spoils = map[string]func(dir *storetest.Dir, d *Store){
	"the current file is emptied": func(dir *storetest.Dir, d *Store) {
		dir.Empty(logName(kindSegment, d.number()))
	},
	"a full file is emptied": func(dir *storetest.Dir, d *Store) {
		dir.Empty(logName(kindSegment, d.snapshot+1))
	},
	"the snapshot is emptied": func(dir *storetest.Dir, d *Store) {
		dir.Empty(logName(kindSnapshot, d.snapshot))
	},
	"STORE is emptied": func(dir *storetest.Dir, d *Store) { dir.Empty(storage.StoreName) },
	"everything is emptied": func(dir *storetest.Dir, d *Store) {
		for _, name := range d.ownFiles() {
			dir.Empty(name)
		}
	},
	"a byte of a full file is changed": func(dir *storetest.Dir, d *Store) {
		name := logName(kindSegment, d.snapshot+1)
		f, _ := dir.Extend(name)
		f.WriteAt([]byte{0xff}, headerSize+frameSize)
		f.Close()
	},
	"STORE becomes another store's": func(dir *storetest.Dir, d *Store) {
		writeID(dir, storeID{1, 2, 3})
	},
	"a backup is put over it": func(dir *storetest.Dir, d *Store) {
		out := storetest.New()
		Backup(dir, out)
		d.Put("since", "the backup")
		d.Commit()
		for name, file := range out.Names {
			f, _ := dir.Create(name)
			f.WriteAt(file.Data, 0)
			f.Close()
		}
	},
	"an older copy is put over it": func(dir *storetest.Dir, d *Store) {
		other := storetest.New()
		old, _ := Open(context.Background(), other, Options{})
		old.Put("old", "copy")
		old.Close()
		for _, name := range []string{"seg-1.log", storage.StoreName} {
			f, _ := dir.Create(name)
			f.WriteAt(other.Names[name].Data, 0)
			f.Close()
		}
	},
}

// Ensure that files which are changed in place under a store are written again: nothing that was
// answered is lost, whether the store goes on or is stopped, and even if writes come meanwhile.
func TestHealOfSpoiledFiles(t *testing.T) {
	for what, spoil := range spoils {
		for _, how := range []string{"goes on", "writes on", "is stopped"} {
			synctest.Test(t, func(t *testing.T) {
				log := &strings.Builder{}
				dir, d := newSmall(t, Options{Log: slog.New(slog.NewTextHandler(log, nil))})
				storetest.Script(t, d, storetest.NewHistory())

				// There must be a snapshot, a full file, and something in the current one.
				for d.snapshot == 0 || d.number() == d.snapshot+1 || d.size == headerSize {
					d.Put("more", strings.Repeat("v", 100))
					d.Delete("more")
					d.Put("k", "v")
					d.Commit()
					d.AwaitCompaction()
				}

				// This Commit checks the files, so the change comes between two checks.
				<-time.After(2 * lookTime)
				d.Put("before", "all")
				d.Commit()

				spoil(dir, d)
				if how == "writes on" {
					for range 30 {
						d.Put("meanwhile", strings.Repeat("v", 30))
						if err := d.Commit(); err != nil {
							t.Fatalf("%s, %s: %v", what, how, err)
						}
					}
				}

				if how != "is stopped" {
					<-time.After(lookTime)
					d.Put("after", "all")
					if err := d.Commit(); err != nil {
						t.Fatalf("%s, %s: %v", what, how, err)
					}
					wantAll(t, what+", "+how, dir.Kill(), maps.Collect(d.All()))
					if n := strings.Count(log.String(), "level=ERROR"); n > 1 {
						t.Errorf("%s, %s: %d errors in the log:\n%s", what, how, n, log)
					}
				}

				want := maps.Collect(d.All())
				if err := d.Close(); err != nil {
					t.Fatalf("%s, %s: Close: %v", what, how, err)
				}
				wantAll(t, what+", "+how+", closed", dir, want)
			})
		}
	}
}

// Ensure that a file which somebody changes just before it is full is written again, too.
func TestHealOfAFileThatBecomesFull(t *testing.T) {
	for what, spoil := range map[string]func(dir *storetest.Dir, name string){
		"emptied": func(dir *storetest.Dir, name string) { dir.Empty(name) },
		"removed": func(dir *storetest.Dir, name string) { dir.Remove(name) },
		"replaced": func(dir *storetest.Dir, name string) {
			data := slices.Clone(dir.Names[name].Data)
			dir.Remove(name)
			f, _ := dir.Create(name)
			f.WriteAt(data, 0)
			f.Close()
		},
	} {
		synctest.Test(t, func(t *testing.T) {
			dir, d := newSmall(t, Options{})
			d.minCompact = 1 << 40
			d.Put("before", "all")
			<-time.After(2 * lookTime)
			if err := d.Commit(); err != nil {
				t.Fatal(err)
			}

			spoil(dir, "seg-1.log")
			for d.number() == 1 {
				d.Put("key", strings.Repeat("v", 100))
				if err := d.Commit(); err != nil {
					t.Fatal(err)
				}
			}

			<-time.After(lookTime)
			d.Put("after", "all")
			if err := d.Commit(); err != nil {
				t.Fatal(err)
			}
			wantAll(t, what, dir.Kill(), maps.Collect(d.All()))
			d.Close()
		})
	}
}

// Ensure that a frame which has lost its end is noticed, even if the file grows beyond it again
// before the next check.
func TestHealOfATruncatedFrame(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir, d := newSmall(t, Options{})
		d.segmentSize = 1 << 20
		put := func() {
			d.Put("k", strings.Repeat("v", 1000))
			if err := d.Commit(); err != nil {
				t.Fatal(err)
			}
		}
		put()

		f := dir.Names["seg-1.log"]
		f.Data = f.Data[:500] // in place
		put()
		put()

		wantAll(t, "a frame was truncated", dir.Kill(), maps.Collect(d.All()))
		d.Close()
	})
}

// Ensure that a snapshot which somebody empties or changes while it is written never replaces other
// files.
func TestSnapshotSpoiledWhileItIsWritten(t *testing.T) {
	for what, spoil := range map[string]func(dir *storetest.Dir, name string){
		"emptied": (*storetest.Dir).Empty,
		"changed": func(dir *storetest.Dir, name string) {
			dir.Mu.Lock()
			defer dir.Mu.Unlock()
			data := dir.Names[name].Data
			data[len(data)-1] ^= 1
		},
	} {
		synctest.Test(t, func(t *testing.T) {
			var log bytes.Buffer
			dir, d := newSmall(t, Options{Log: slog.New(slog.NewTextHandler(&log, nil))})
			dir.Before = func(c storetest.Call) error {
				if c.What == "sync" && strings.HasPrefix(c.Name, "snap-") {
					spoil(dir, c.Name)
				}
				return nil
			}

			fillUntil(d, func() bool { d.AwaitCompaction(); return strings.Contains(log.String(), "compact") })

			// The files that it was to replace are still there.
			want := maps.Collect(d.All())
			wantAll(t, "a compaction whose file was "+what+", then the power fails",
				dir.Crash(rand.New(rand.NewPCG(1, 1))), want)
			if err := d.Close(); err != nil {
				t.Fatal(err)
			}
			dir.Before = nil
			wantAll(t, "after a compaction whose file was "+what, dir, want)
		})
	}
}

// Ensure that a snapshot which somebody empties after the end of its compaction, but before the
// store has noted that end, is written again.
func TestSnapshotEmptiedUnnoticed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir, d := newSmall(t, Options{})
		for d.compacted == nil {
			d.Set("key", strings.Repeat("v", 100))
			if err := d.Commit(); err != nil {
				t.Fatal(err)
			}
		}
		synctest.Wait()
		dir.Empty(logName(kindSnapshot, d.number()-1))
		want := maps.Collect(d.All())

		<-time.After(lookTime)
		if err := d.Commit(); err != nil {
			t.Fatal(err)
		}
		wantAll(t, "a snapshot was emptied", dir.Crash(rand.New(rand.NewPCG(1, 1))), want)
		d.Close()
	})
}

// Ensure that a STORE which somebody empties while a heal writes it does not stay empty.
func TestStoreEmptiedWhileItIsWritten(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir, d := newSmall(t, Options{})
		d.Put("k", "v")
		isEmptied := false
		dir.Before = func(c storetest.Call) error {
			if !isEmptied && c.What == "fstat" && c.Name == storage.StoreName+tmpSuffix {
				isEmptied = true
				dir.Empty(c.Name)
			}
			return nil
		}

		dir.Remove(storage.StoreName)
		for range 2 {
			<-time.After(2 * lookTime)
			if err := d.Commit(); err != nil {
				t.Fatal(err)
			}
		}

		if err := d.Close(); err != nil || !isEmptied {
			t.Errorf("Close: %v; STORE was emptied: %v", err, isEmptied)
		}
		wantAll(t, "after a STORE that was emptied", dir, map[string][]string{"k": {"v"}})
	})
}

// Ensure that Close returns an error, or the data is there, if a file is emptied before any call of
// Close up to its last check.
func TestEmptiedWhileItCloses(t *testing.T) {
	for _, name := range []string{storage.StoreName, "seg-1.log", "seg-2.log"} {
		for n, isOver := 1, false; !isOver; n++ {
			synctest.Test(t, func(t *testing.T) {
				dir, d := newSmall(t, Options{})
				fillUntil(d, func() bool { return d.number() == 2 })
				fillUntil(d, func() bool { return d.size > 500 })
				want, calls, wrote := maps.Collect(d.All()), 0, 0

				dir.Before = func(c storetest.Call) error {
					if calls++; calls == n {
						dir.Empty(name)
					}
					if c.Name == d.current.header.name() && c.What != "read" {
						wrote = calls
					}
					return nil
				}

				err := d.Close()
				dir.Before = nil
				isOver = wrote < n
				if err == nil && !isOver {
					wantAll(t, fmt.Sprintf("%s is emptied before call %d of %d", name, n, calls), dir, want)
				}
			})
		}
	}
}

// overwrites change bytes of a file in place.
var overwrites = map[string]func(b []byte){
	"zeros":   func(b []byte) { clear(b) },
	"garbage": func(b []byte) { copy(b, bytes.Repeat([]byte("Z"), len(b))) },
	"one bit": func(b []byte) { b[len(b)/2] ^= 1 },
}

// Ensure that Close notices if somebody has changed the middle of the current file, in any of its
// frames, and writes all data again; and that a crash meanwhile leaves all data, or what a start
// refuses, as it refused the file before.
func TestCloseHealsTheMiddle(t *testing.T) {
	for what, overwrite := range overwrites {
		for _, fsync := range []time.Duration{FsyncAlways, time.Second} {
			for at := 0; at < 6; at = storetest.Next(at, 2) {
				where := fmt.Sprintf("%s in frame %d, fsync %v", what, at+1, fsync)
				synctest.Test(t, func(t *testing.T) {
					closeHealsTheMiddle(t, where, overwrite, fsync, at)
				})
			}
		}
	}
}

// sixFrames opens a store in a new directory and makes six Commits. It returns where each one's
// frame starts, and where the last one ends.
func sixFrames(t *testing.T, opts Options) (dir *storetest.Dir, d *Store, starts []int64) {
	dir, d = newSmall(t, opts)
	starts = []int64{headerSize}
	for range 6 {
		d.Put("key", strings.Repeat("v", 100))
		if err := d.Commit(); err != nil {
			t.Fatal(err)
		}
		starts = append(starts, d.size)
	}
	return dir, d, starts
}

// closeHealsTheMiddle is TestCloseHealsTheMiddle for a change of one frame.
func closeHealsTheMiddle(t *testing.T, where string, overwrite func(b []byte), fsync time.Duration,
	at int) {
	log := &strings.Builder{}
	dir, d, starts := sixFrames(t, Options{Fsync: fsync, Log: slog.New(slog.NewTextHandler(log, nil))})
	<-time.After(3 * lookTime) // the last frame is vouched for
	synctest.Wait()            // for the timer, which writes to the file

	// No look sees this, because it is neither the beginning nor the end of the file.
	b := dir.Names["seg-1.log"].Data[starts[at]:starts[at+1]]
	overwrite(b[len(b)/2:])
	if err := d.Commit(); err != nil {
		t.Fatal(err)
	}
	want := maps.Collect(d.All())
	if _, err := openSmall(dir.Kill(), Options{}); !errors.As(err, new(*storage.DamageError)) {
		t.Fatalf("%s: the next start says %v", where, err)
	}

	// Close writes all again. What was changed does not matter to a crash meanwhile, only where.
	random := rand.New(rand.NewPCG(uint64(at), 1))
	var images []*storetest.Dir
	dir.Before = func(storetest.Call) error {
		if strings.HasPrefix(where, "one bit") {
			images = append(images, dir.Kill(), dir.Crash(random))
		}
		return nil
	}
	if err := d.Close(); err != nil {
		t.Fatalf("%s: Close: %v", where, err)
	}
	dir.Before = nil
	wantAll(t, where, dir, want)

	if n := strings.Count(log.String(), "level=ERROR"); n != 1 ||
		!strings.Contains(log.String(), "all data is on disk again") {
		t.Errorf("%s: the log says\n%s", where, log)
	}
	if opened := wantAllOrRefused(t, where, images, want); opened == 0 && len(images) > 0 {
		t.Errorf("%s: not one of %d images opens", where, len(images))
	}
}

// wantAllOrRefused opens what crashes have left. It fails unless each start refuses damage, or
// holds exactly what want says. It returns how many do.
func wantAllOrRefused(t *testing.T, what string, images []*storetest.Dir,
	want map[string][]string) (opened int) {
	t.Helper()
	for i, image := range images {
		again, err := openSmall(image, Options{})
		if errors.As(err, new(*storage.DamageError)) {
			continue
		}
		if err != nil {
			t.Fatalf("%s: image %d of %d: %v", what, i, len(images), err)
		}

		if !maps.EqualFunc(maps.Collect(again.All()), want, slices.Equal[[]string]) {
			t.Errorf("%s: image %d of %d opens with other data", what, i, len(images))
		}
		opened++
		again.Close()
	}
	return opened
}

// Ensure that Close reads the current file a second time if it cannot be read, and returns an error
// if that fails, too: somebody may have changed it. Then the next start refuses what was changed.
func TestCloseCannotReadTheMiddle(t *testing.T) {
	for _, fails := range []int{1, 3} { // the second read is the first look's
		synctest.Test(t, func(t *testing.T) {
			dir, d := newSmall(t, Options{})
			d.Put("key", "value")
			if err := d.Commit(); err != nil {
				t.Fatal(err)
			}
			dir.Names["seg-1.log"].Data[headerSize] ^= 1

			failed := 0
			dir.Before = func(c storetest.Call) error {
				if c.What == "read" && c.Name == "seg-1.log" && failed < fails {
					failed++
					return syscall.EIO
				}
				return nil
			}
			err := d.Close()
			dir.Before = nil

			if fails > 1 {
				if !errors.Is(err, ErrSpoiled) || !errors.Is(err, syscall.EIO) {
					t.Errorf("Close: %v", err)
				}
				if _, err := openSmall(dir, Options{}); !errors.As(err, new(*storage.DamageError)) {
					t.Errorf("the next start says %v", err)
				}
				return
			}

			if err != nil {
				t.Errorf("Close: %v", err)
			}
			wantAll(t, "read again", dir, map[string][]string{"key": {"value"}})
		})
	}
}

// Ensure that Close writes the other files again even if the current one cannot be read.
func TestCloseCannotReadButHeals(t *testing.T) {
	for _, gone := range []string{storage.StoreName, "seg-1.log"} {
		dir, d := newSmall(t, Options{})
		d.minCompact = 1 << 40
		fillUntil(d, func() bool { return d.number() == 2 && d.size > headerSize })
		want := maps.Collect(d.All())
		dir.Remove(gone)

		// The first read is that of all frames.
		failed := false
		dir.Before = func(c storetest.Call) error {
			if c.What != "read" || c.Name != "seg-2.log" || failed {
				return nil
			}
			failed = true
			return syscall.EIO
		}
		d.AwaitCompaction()
		if err := d.fullLook(); !failed || !errors.Is(err, ErrSpoiled) {
			t.Errorf("%s: %v", gone, err)
		}
		dir.Before = nil
		wantAll(t, gone, dir.Kill(), want)
		d.Close()
	}
}

// Ensure that if Close cannot write again what somebody has changed, the next start refuses it, and
// does not take it for a torn end, whatever Options.Fsync says.
func TestCloseCannotHealTheMiddle(t *testing.T) {
	for _, fsync := range []time.Duration{FsyncAlways, FsyncNever, time.Second} {
		for _, at := range []int{0, 5} {
			synctest.Test(t, func(t *testing.T) {
				dir, d, starts := sixFrames(t, Options{Fsync: fsync})
				dir.Names["seg-1.log"].Data[starts[at]+frameSize+20] ^= 1

				dir.Before = func(c storetest.Call) error {
					if c.What == "create" {
						return syscall.ENOSPC
					}
					return nil
				}
				err := d.Close()
				dir.Before = nil
				if !errors.Is(err, ErrSpoiled) {
					t.Errorf("fsync %v, frame %d: Close: %v", fsync, at+1, err)
				}

				again, err := openSmall(dir, Options{})
				if !errors.As(err, new(*storage.DamageError)) {
					t.Errorf("fsync %v, frame %d: the next start: %v", fsync, at+1, err)
					again.Close()
				}
			})
		}
	}
}

// Ensure that Close does not read the current file for long on a slow disk.
func TestCloseReadsForAShortTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		log := &strings.Builder{}
		dir := storetest.New()
		dir.Segment, dir.Compact, dir.Reserve = 64<<20, 64<<20, 1<<20
		d, err := Open(t.Context(), dir, Options{Fsync: FsyncNever,
			Log: slog.New(slog.NewTextHandler(log, nil))})
		if err != nil {
			t.Fatal(err)
		}
		for i := range 20 {
			d.Put(fmt.Sprint(i), strings.Repeat("v", 1<<20))
			d.Commit()
		}
		want := maps.Collect(d.All())

		dir.Before = func(c storetest.Call) error {
			if c.What == "read" {
				<-time.After(time.Second / 4)
			}
			return nil
		}
		began := time.Now()
		err = d.Close()
		if took := time.Since(began); err != nil || took > 2*readTime {
			t.Errorf("Close takes %v: %v", took, err)
		}
		dir.Before = nil
		wantAll(t, "a slow disk", dir, want)
		if !strings.Contains(log.String(), "no time to read all of the current file") {
			t.Errorf("the log says\n%s", log)
		}
	})
}

// Ensure that the timer does not write while Close reads the current file: Close would take its
// frame for somebody else's.
func TestCloseReadsBesideTheTimer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		log := &strings.Builder{}
		dir, d := newSmall(t, Options{Log: slog.New(slog.NewTextHandler(log, nil))})
		d.Put("key", "value")
		if err := d.Commit(); err != nil {
			t.Fatal(err)
		}

		var reads atomic.Int64
		dir.Before = func(c storetest.Call) error {
			if c.What == "read" {
				reads.Add(1)
				<-time.After(2 * vouchTime)
			}
			return nil
		}
		err := d.Close()
		if err != nil || reads.Load() == 0 || strings.Contains(log.String(), "ERROR") {
			t.Errorf("Close: %v after %d reads, and logs\n%s", err, reads.Load(), log)
		}
	})
}

// Ensure that Close does not read the current file where nobody can change it in place, as in etcd.
func TestCloseReadsNothingInEtcd(t *testing.T) {
	dir := storetest.New()
	dir.Segment, dir.Compact, dir.Reserve = 1<<20, 1<<20, 0
	d, err := Open(t.Context(), dir, Options{})
	if err != nil {
		t.Fatal(err)
	}
	d.Put("key", "value")
	dir.Before = func(c storetest.Call) error {
		if c.What == "read" {
			t.Error("Close reads", c.Name)
		}
		return nil
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
}

// Ensure that Close writes no frame if the store is another process's by then, whether the current
// file can be read or not.
func TestCloseWritesNothingIntoAnothersStore(t *testing.T) {
	for failure, want := range map[error]error{syscall.EIO: ErrSpoiled, nil: storage.ErrMoved} {
		dir, d := newSmall(t, Options{})
		d.Put("key", "value")
		if err := d.Commit(); err != nil {
			t.Fatal(err)
		}

		dir.Before = func(c storetest.Call) error {
			dir.Mu.Lock()
			defer dir.Mu.Unlock()
			switch {
			case c.What == "read" && c.Name == "seg-1.log":
				dir.Moved = storage.ErrMoved
				return failure
			case c.What == "write":
				t.Errorf("a read says %v: Close writes to %s", failure, c.Name)
			}
			return nil
		}
		if err := d.Close(); !errors.Is(err, want) {
			t.Errorf("a read says %v: Close: %v, want %v", failure, err, want)
		}
	}
}
