package durable

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"kvserver/kvstore/storage"
	"kvserver/kvstore/storetest"
	"log/slog"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

// holes are ways to remove files from a store with a snapshot and several segments.
var holes = map[string]func(name string, kind uint32, number, last uint64) bool{
	"the file that is written": func(_ string, kind uint32, number, last uint64) bool {
		return kind == kindSegment && number == last
	},
	"a full file": func(_ string, kind uint32, number, last uint64) bool {
		return kind == kindSegment && number == last-1
	},
	"the snapshot": func(_ string, kind uint32, _, _ uint64) bool { return kind == kindSnapshot },
	"STORE": func(name string, _ uint32, _, _ uint64) bool {
		return name == storage.StoreName
	},
	"all logs":   func(_ string, kind uint32, _, _ uint64) bool { return kind != 0 },
	"everything": func(string, uint32, uint64, uint64) bool { return true },
}

// wantAll opens a store, and fails unless it holds exactly what want says.
func wantAll(t *testing.T, what string, dir storage.Directory, want map[string][]string) {
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

// removeThose removes the files of a store that isGone selects.
func removeThose(dir *storetest.Dir, d *Store, isGone func(string, uint32, uint64, uint64) bool) {
	for _, name := range slices.Sorted(maps.Keys(dir.Names)) {
		if kind, number, _ := parseName(name); isGone(name, kind, number, d.number) {
			dir.Remove(name)
		}
	}
}

// withHole returns an open store from whose directory somebody has removed files.
func withHole(t *testing.T, log io.Writer,
	isGone func(string, uint32, uint64, uint64) bool) (*storetest.Dir, *Store) {
	dir := storetest.New()
	d, err := openSmall(dir, Options{Log: slog.New(slog.NewTextHandler(log, nil))})
	if err != nil {
		t.Fatal(err)
	}
	storetest.Script(t, d, storetest.NewHistory())
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

// Ensure that files which somebody removes while the store is open are written again: after a
// Commit a second later, or after Close, everything is there.
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

// Ensure that a heal of removed files may fail, or be cut off, anywhere: then everything is there,
// or the next start refuses the store, and a later try succeeds.
func TestHealMayFail(t *testing.T) {
	for what, isGone := range holes {
		for n, failed := 1, true; failed; n = storetest.Next(n, 3) {
			synctest.Test(t, func(t *testing.T) {
				dir, d := withHole(t, io.Discard, isGone)
				<-time.After(3 * lookTime) // so that the timer has nothing more to do
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
				isEmpty := openErr == nil && what == "everything" && keysOf(again) == 0
				if openErr == nil {
					again.Close()
				}
				// Otherwise it is refused, or the power failed before anything was written.
				if !errors.As(openErr, new(*storage.DamageError)) && !isEmpty {
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

// Ensure that Close writes removed files again even shortly after a try that failed, and that Close
// fails if this try fails, too.
func TestCloseIsTheLastLook(t *testing.T) {
	for _, mended := range []bool{true, false} {
		synctest.Test(t, func(t *testing.T) {
			dir, d := withHole(t, io.Discard, holes["everything"])
			var refuses atomic.Bool
			refuses.Store(true)
			dir.Before = func(c storetest.Call) error {
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

// stolenDirectory is a directory that another process takes while a snapshot is written.
type stolenDirectory struct {
	*storage.Disk
	steal func()
}

func (s *stolenDirectory) Create(name string) (storage.File, error) {
	if strings.HasPrefix(name, "snap-") {
		s.steal()
	}
	return s.Disk.Create(name)
}

// Ensure that the snapshot of a heal does not get its name in a directory that another process has
// taken meanwhile.
func TestHealOfAStolenDirectory(t *testing.T) {
	if runtime.GOOS == "windows" {
		return // nobody can remove a lock
	}
	path := filepath.Join(t.TempDir(), "data")
	os.Mkdir(path, 0o700)
	dir := &stolenDirectory{Disk: mustDirectory(t, path)}
	dir.steal = func() {
		os.Rename(path, path+".old")
		os.Mkdir(path, 0o700)
		lock, err := mustDirectory(t, path).Lock(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { lock.Close() })
	}
	d, err := Open(t.Context(), dir, Options{})
	if err != nil {
		t.Fatal(err)
	}
	d.Put("k", "v")
	os.Remove(filepath.Join(path, storage.StoreName))
	d.looked = time.Time{}
	d.Commit()
	for _, at := range []string{path, path + ".old"} {
		if names, _ := filepath.Glob(filepath.Join(at, "snap-*.log")); len(names) > 0 {
			t.Errorf("%s has %q", at, names)
		}
	}
	d.Close()
}

// Ensure that a heal succeeds after a rotation that failed to make its new file.
func TestHealAfterAFailedRotation(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir, d := newSmall(t, Options{})
		var refuses atomic.Bool
		dir.Before = func(c storetest.Call) error {
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
		dir.Remove(storage.StoreName)
		d.looked = time.Time{}
		d.rotateAfter = time.Now().Add(time.Second)
		if err := d.Commit(); err != nil {
			t.Fatal(err)
		}
		if r, err := Check(dir); err != nil || r.Damaged {
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

// Ensure that a heal that fails leaves nothing for which a start would refuse the store when the
// removed file is put back.
func TestFailedHealLeavesNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir := storetest.New()
		var refuses atomic.Bool
		dir.Before = func(c storetest.Call) error {
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
		store := dir.Names[storage.StoreName]
		dir.Remove(storage.StoreName)
		refuses.Store(true)
		<-time.After(2 * time.Second)
		if err := d.Commit(); err != nil {
			t.Fatal(err)
		}
		refuses.Store(false)
		dir.Mu.Lock()
		dir.Names[storage.StoreName] = store
		dir.Mu.Unlock()
		r, err := Check(dir)
		if err != nil || r.Damaged {
			t.Errorf("check: %v %v", r, err)
		}
		if _, err := openSmall(dir.Kill(), Options{}); err != nil {
			t.Errorf("killed: %v", err)
		}
		d.Close()
	})
}

// spoils are changes that people and programs make to the files of a running store, in place.
var spoils = map[string]func(dir *storetest.Dir, d *Store){
	"the current file is emptied": func(dir *storetest.Dir, d *Store) {
		dir.Empty(logName(kindSegment, d.number))
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
		Backup(dir, out, nil)
		d.Put("since", "the backup")
		d.Commit()
		for name, file := range out.Names {
			dir.Empty(name)
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
			dir.Empty(name)
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
				for d.snapshot == 0 || d.number == d.snapshot+1 || d.size == headerSize {
					d.Put("more", strings.Repeat("v", 100))
					d.Delete("more")
					d.Put("k", "v")
					d.Commit()
					d.AwaitCompaction()
				}
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

// Ensure that the log says once each time the files cannot be checked any more, and that Close then
// returns an error.
func TestLooksThatFail(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		log := &strings.Builder{}
		dir, d := newSmall(t, Options{Log: slog.New(slog.NewTextHandler(log, nil))})
		var isBlind atomic.Bool
		isBlind.Store(true)
		dir.Before = func(c storetest.Call) error {
			if isBlind.Load() && c.What == "stat" {
				return syscall.EACCES
			}
			return nil
		}
		write := func() {
			for range 3 {
				<-time.After(lookTime)
				d.Put("k", "v")
				if err := d.Commit(); err != nil {
					t.Fatal(err)
				}
			}
		}
		write()
		isBlind.Store(false)
		write()
		isBlind.Store(true)
		if err := d.Close(); !errors.Is(err, ErrSpoiled) || !errors.Is(err, syscall.EACCES) {
			t.Errorf("Close: %v", err)
		}
		if n := strings.Count(log.String(), "cannot look"); n != 2 {
			t.Errorf("the log tells of it %d times:\n%s", n, log)
		}
	})
}

// Ensure that a file of somebody else's, for which the next start is refused, is logged once and
// starts no heal, and that Close names it.
func TestStrangeFile(t *testing.T) {
	for _, name := range []string{"seg-50.log", "photo.jpg"} {
		synctest.Test(t, func(t *testing.T) {
			log := &strings.Builder{}
			dir, d := newSmall(t, Options{Log: slog.New(slog.NewTextHandler(log, nil))})
			d.Put("k", "v")
			d.Commit()
			f, _ := dir.Create(name)
			f.Close()
			for range 10 {
				<-time.After(lookTime)
				d.Put("k", "v")
				if err := d.Commit(); err != nil {
					t.Fatal(err)
				}
			}
			if n := strings.Count(log.String(), "level=ERROR"); n != 1 || d.number > 2 ||
				!strings.Contains(log.String(), name) {
				t.Errorf("%s: %d errors, now in file %d:\n%s", name, n, d.number, log)
			}
			if err := d.Close(); err == nil || !strings.Contains(err.Error(), name) {
				t.Errorf("%s: Close: %v", name, err)
			}
			if dir.Names[name] == nil {
				t.Errorf("%s was removed", name)
			}
			if _, err := openSmall(dir.Kill(), Options{}); err == nil {
				t.Errorf("%s is in no start's way", name)
			}
			dir.Remove(name)
			again, err := openSmall(dir, Options{})
			if err != nil || len(again.Get("k")) != 11 {
				t.Errorf("opened again without %s: %v", name, err)
			}
		})
	}
}

// Ensure that an older log file which somebody puts into the directory is removed durably: a power
// failure does not bring it back.
func TestLeftoverIsRemoved(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir, d := newSmall(t, Options{})
		d.Put("key", "value")
		if err := d.Commit(); err != nil {
			t.Fatal(err)
		}
		older := slices.Clone(dir.Names["seg-1.log"].Data)
		for d.snapshot == 0 {
			d.Set("key", strings.Repeat("v", 100))
			if err := d.Commit(); err != nil {
				t.Fatal(err)
			}
			d.AwaitCompaction()
		}

		f, _ := dir.Create("seg-1.log")
		f.WriteAt(older, 0)
		f.Sync()
		f.Close()
		dir.Sync()
		<-time.After(lookTime)
		if err := d.Commit(); err != nil {
			t.Fatal(err)
		}
		for seed := range uint64(20) {
			wantAll(t, fmt.Sprint("seed ", seed), dir.Crash(rand.New(rand.NewPCG(seed, 1))),
				maps.Collect(d.All()))
		}
		d.Close()
	})
}

// Ensure that after a crash in a heal a start refuses the store only if the snapshot did not have
// its name yet, and that otherwise everything is there.
func TestCrashesInAHeal(t *testing.T) {
	for what, spoil := range spoils {
		synctest.Test(t, func(t *testing.T) {
			dir, d := newSmall(t, Options{})
			storetest.Script(t, d, storetest.NewHistory())
			<-time.After(2 * lookTime)
			d.Put("before", "all")
			d.Commit()
			spoil(dir, d)
			<-time.After(lookTime)
			synctest.Wait() // for the timer, which reads dir.Before

			random := rand.New(rand.NewPCG(5, 5))
			var images []*storetest.Dir
			var named []bool // for each image: the snapshot had its name on disk
			isNamed := false
			dir.Before = func(c storetest.Call) error {
				images, named = append(images, dir.Crash(random)), append(named, isNamed)
				if c.What == "rename" && strings.HasPrefix(c.Name, "snap-") {
					dir.Before = func(c storetest.Call) error { // from its Sync on
						images, named = append(images, dir.Crash(random)), append(named, isNamed)
						isNamed = isNamed || c.What != "sync"
						return nil
					}
				}
				return nil
			}
			if err := d.commit(); err != nil {
				t.Fatal(err)
			}
			if err := d.lookForFiles(time.Now()); err != nil {
				t.Fatal(err)
			}
			dir.Before = nil
			want := maps.Collect(d.All())
			opened := 0
			for i, image := range images {
				again, err := openSmall(image, Options{})
				if err != nil && named[i] {
					t.Errorf("%s: image %d of %d: %v", what, i, len(images), err)
				}
				if err != nil {
					continue
				}
				opened++
				// An emptied file looks like one of which nothing has reached the disk, and a
				// backup is a whole store.
				isAll := maps.EqualFunc(maps.Collect(again.All()), want, slices.Equal[[]string])
				if !isAll && (named[i] ||
					!strings.Contains(what, "emptied") && what != "a backup is put over it") {
					t.Errorf("%s: image %d of %d opens with other data", what, i, len(images))
				}
				again.Close()
			}
			t.Logf("%s: %d of %d images open", what, opened, len(images))
			d.Close()
		})
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
			for d.number == 1 {
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

// Ensure that behind a file of an older version a store goes on in a new file, because an older
// kvserver would take new kinds of records for damage, or in the old file if no new one can be
// made. Ensure that neither counts as changed.
func TestFileOfAnOlderVersion(t *testing.T) {
	for _, isFull := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			dir, d := newSmall(t, Options{})
			d.Put("k", "v")
			d.Close()
			b := dir.Names["seg-1.log"].Data
			binary.LittleEndian.PutUint32(b[8:], oldestVersion)
			binary.LittleEndian.PutUint32(b[60:], crc(0, b[:60]))

			if isFull {
				dir.Before = func(c storetest.Call) error {
					if c.What == "create" && c.Name == "seg-2.log.tmp" {
						return syscall.ENOSPC
					}
					return nil
				}
			}
			log := &strings.Builder{}
			d, err := openSmall(dir, Options{Log: slog.New(slog.NewTextHandler(log, nil))})
			if err != nil {
				t.Fatal(err)
			}
			size := len(dir.Names["seg-1.log"].Data)
			<-time.After(2 * lookTime)
			d.Put("k", "w")
			d.Take("k")
			if err := errors.Join(d.Commit(), d.Close()); err != nil {
				t.Fatal(err)
			}
			isNew := d.number == 2 && len(dir.Names["seg-1.log"].Data) == size
			if isNew == isFull || strings.Contains(log.String(), "written anew") {
				t.Errorf("full %v: now in file %d, the log says\n%s", isFull, d.number, log)
			}
			dir.Before = nil
			wantAll(t, "opened again", dir, map[string][]string{"k": {"w"}})
		})
	}
}

// Ensure that a rotation that fails leaves no file that is later taken for somebody else's.
func TestFailedRotationLeavesNoStranger(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		log := &strings.Builder{}
		dir, d := newSmall(t, Options{Log: slog.New(slog.NewTextHandler(log, nil))})
		dir.Before = func(c storetest.Call) error {
			if c.What == "sync" && c.Name == "" {
				return syscall.ENOSPC
			}
			return nil
		}
		for d.size < d.segmentSize {
			d.Put("key", strings.Repeat("v", 50))
			if err := d.Commit(); err != nil {
				t.Fatal(err)
			}
		}
		<-time.After(2 * lookTime)
		if err := errors.Join(d.Commit(), d.Close()); err != nil {
			t.Error(err)
		}
		if strings.Contains(log.String(), "none of this store's") {
			t.Errorf("the log says\n%s", log)
		}
	})
}

// Ensure that a crash before a heal has its snapshot on disk loses nothing if the files are good
// and only look changed, as after touch.
func TestCrashesInAHealOfGoodFiles(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir, d := newSmall(t, Options{})
		storetest.Script(t, d, storetest.NewHistory())
		d.minCompact = 1 << 40
		for number := d.number + 2; d.number < number; {
			d.Put("key", "value")
			if err := d.Commit(); err != nil {
				t.Fatal(err)
			}
		}
		<-time.After(2 * lookTime)
		if err := d.Commit(); err != nil {
			t.Fatal(err)
		}
		want := maps.Collect(d.All())

		name := logName(kindSegment, d.number-1)
		f, _ := dir.Extend(name)
		f.WriteAt(dir.Names[name].Data[:1], 0)
		f.Close()
		synctest.Wait() // for the timer, which reads dir.Before
		random := rand.New(rand.NewPCG(5, 5))
		var images []*storetest.Dir
		isWritten := false
		dir.Before = func(c storetest.Call) error {
			images = append(images, dir.Crash(random))
			isWritten = isWritten || c.What == "sync" && strings.HasPrefix(c.Name, "snap-")
			if isWritten && c.What == "remove" {
				dir.Before = nil // from here to the Sync after the rename the data has no name
			}
			return nil
		}
		number := d.number
		if err := d.lookForFiles(time.Now()); err != nil || d.number == number {
			t.Fatalf("in file %d, %v", d.number, err)
		}
		for i, image := range images {
			wantAll(t, fmt.Sprintf("image %d of %d", i, len(images)), image, want)
		}
		d.Close()
	})
}

// Ensure that if the files cannot be checked for a moment, that is not taken for a change, even
// when a file has just become full.
func TestNoHealOfWhatNobodySaw(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		log := &strings.Builder{}
		dir, d := newSmall(t, Options{Log: slog.New(slog.NewTextHandler(log, nil))})
		d.minCompact = 1 << 40
		dir.Before = func(c storetest.Call) error {
			if c.What == "stat" {
				return syscall.EMFILE
			}
			return nil
		}
		for d.number == 1 {
			d.Put("key", strings.Repeat("v", 100))
			if err := d.Commit(); err != nil {
				t.Fatal(err)
			}
		}
		dir.Before = nil
		for range 3 {
			<-time.After(lookTime)
			if err := d.Commit(); err != nil {
				t.Fatal(err)
			}
		}
		if d.number != 2 || strings.Contains(log.String(), "level=ERROR") {
			t.Errorf("now in file %d, the log says\n%s", d.number, log)
		}
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	})
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
		dir.Empty(logName(kindSnapshot, d.number-1))
		want := maps.Collect(d.All())

		<-time.After(lookTime)
		if err := d.Commit(); err != nil {
			t.Fatal(err)
		}
		wantAll(t, "a snapshot was emptied", dir.Crash(rand.New(rand.NewPCG(1, 1))), want)
		d.Close()
	})
}

// Ensure that a copy which is put over the only segment of a busy store is noticed, even though the
// copy has the last frame that was checked, and even if the file has grown since, or a frame has
// filled it exactly.
func TestHealOfACopyBetweenWrites(t *testing.T) {
	for _, c := range []struct{ zeros, size int }{{0, 100}, {640, 79}, {640, 80}} { // 5 frames of 128
		synctest.Test(t, func(t *testing.T) {
			dir, d := newSmall(t, Options{})
			d.segmentSize, d.minCompact = 1<<40, 1<<40
			if c.zeros > 0 {
				d.writing <- struct{}{}
				d.zerosAhead = c.zeros
				<-d.writing
			}
			write := func(key string) {
				t.Helper()
				d.Put(key, strings.Repeat("v", c.size))
				if err := d.Commit(); err != nil {
					t.Fatal(err)
				}
			}
			<-time.After(2 * lookTime)
			write("before")

			out := storetest.New()
			if _, err := Backup(dir, out, nil); err != nil {
				t.Fatal(err)
			}
			write("since1")
			for name, file := range out.Names {
				dir.Empty(name)
				f, _ := dir.Create(name)
				f.WriteAt(file.Data, 0)
				f.Close()
			}
			for i := range 21 {
				write(fmt.Sprintf("key%03d", i))
			}
			<-time.After(lookTime)
			write("after0")
			wantAll(t, fmt.Sprintf("%+v: a copy was put over it", c), dir.Kill(),
				maps.Collect(d.All()))
			d.Close()
		})
	}
}

// Ensure that a plain copy of the files which is put over them is noticed, whenever it was made and
// whenever it is put back: even if all that happens within a second, if the files keep their sizes,
// and if it is put back between a start and its first write.
func TestHealOfACopyAtAnyMoment(t *testing.T) {
	const keys, starts = 7, 2 // what is written, and after which of them a start comes
	for made := range keys {
		for back := made + 1; back < keys; back++ {
			synctest.Test(t, func(t *testing.T) {
				dir, d := newSmall(t, Options{})
				copied := map[string][]byte{}
				for i := range keys {
					d.Put(fmt.Sprint("key", i), "value")
					if err := d.Commit(); err != nil {
						t.Fatal(err)
					}
					if i == made {
						for name, file := range dir.Names {
							copied[name] = slices.Clone(file.Data)
						}
					}
					if i == starts {
						if err := d.Close(); err != nil {
							t.Fatal(err)
						}
						var err error
						if d, err = openSmall(dir, Options{}); err != nil {
							t.Fatalf("made at %d, put back at %d: %v", made, back, err)
						}
					}
					if i == back {
						for name, data := range copied {
							f, _ := dir.Create(name) // which empties it
							f.WriteAt(data, 0)
							f.Close()
						}
					}
				}

				<-time.After(lookTime)
				if err := d.Commit(); err != nil {
					t.Fatal(err)
				}
				what := fmt.Sprintf("made at %d, put back at %d", made, back)
				wantAll(t, what, dir.Kill(), maps.Collect(d.All()))
				d.Close()
			})
		}
	}
}

// Ensure that a store whose LOCK somebody removes, empties or replaces goes on, keeps a second
// process out, and can be started again.
func TestLockGoesUnderAStore(t *testing.T) {
	for what, spoil := range map[string]func(dir *storetest.Dir){
		"it is removed": func(dir *storetest.Dir) { dir.Remove(storage.LockName) },
		"it is emptied": func(dir *storetest.Dir) { dir.Empty(storage.LockName) },
		"it is replaced": func(dir *storetest.Dir) {
			f, _ := dir.Create("LOCK.tmp")
			f.Close()
			dir.Rename("LOCK.tmp", storage.LockName)
		},
	} {
		log := &strings.Builder{}
		dir, d := newSmall(t, Options{Log: slog.New(slog.NewTextHandler(log, nil))})
		spoil(dir)
		if _, err := openSmall(dir, Options{}); !errors.Is(err, storage.ErrLocked) {
			t.Errorf("%s: a second one: %v", what, err)
		}
		d.Put("key", "value")
		if err := d.Commit(); err != nil {
			t.Errorf("%s: %v", what, err)
		}
		if dir.Names[storage.LockName] == nil || strings.Contains(log.String(), "level=ERROR") {
			t.Errorf("%s: there is %v; the log says\n%s", what, dir.Names, log)
		}
		wantAll(t, what, dir.Crash(rand.New(rand.NewPCG(1, 1))), maps.Collect(d.All()))
		if err := d.Close(); err != nil {
			t.Errorf("%s: Close: %v", what, err)
		}
	}
}

// Ensure that a copy which is put over the current file, or in its place, is noticed, whichever
// call of a Commit that rotates it comes before.
func TestHealOfACopyInARotation(t *testing.T) {
	for _, isInPlace := range []bool{true, false} {
		for n, isOver := 1, false; !isOver; n++ {
			synctest.Test(t, func(t *testing.T) {
				dir, d := newSmall(t, Options{})
				d.minCompact = 1 << 40
				d.Put("before", "the copy")
				if err := d.Commit(); err != nil {
					t.Fatal(err)
				}
				copied := slices.Clone(dir.Names["seg-1.log"].Data)
				for d.size < d.segmentSize-200 {
					d.Put("since", "the copy")
					if err := d.Commit(); err != nil {
						t.Fatal(err)
					}
				}

				calls := 0
				dir.Before = func(storetest.Call) error {
					if calls++; calls == n && isInPlace {
						f, _ := dir.Create("seg-1.log")
						f.WriteAt(copied, 0)
						f.Close()
					} else if calls == n {
						dir.Mu.Lock()
						dir.Names["seg-1.log"] = storetest.FileOf(copied)
						dir.Mu.Unlock()
					}
					return nil
				}
				d.Put("last", strings.Repeat("v", 200))
				if err := d.Commit(); err != nil {
					t.Fatalf("call %d: %v", n, err)
				}
				dir.Before = nil
				isOver = calls < n
				<-time.After(lookTime)
				if err := d.Commit(); err != nil {
					t.Fatalf("call %d: %v", n, err)
				}
				what := fmt.Sprintf("call %d, in its place: %v", n, !isInPlace)
				wantAll(t, what, dir.Kill(), maps.Collect(d.All()))
				d.Close()
			})
		}
	}
}

// Ensure that a copy which is put over the current file is noticed even if it has the time that the
// file had when it was opened.
func TestHealOfACopyWithItsTime(t *testing.T) {
	path := t.TempDir()
	name := filepath.Join(path, "seg-1.log")
	d, err := openAt(path, Options{})
	if err != nil {
		t.Fatal(err)
	}
	copied, _ := os.ReadFile(name)
	info, _ := os.Stat(name)
	d.Put("k", "v")
	if err := d.Commit(); err != nil {
		t.Fatal(err)
	}
	os.WriteFile(name, copied, 0o600)
	os.Chtimes(name, info.ModTime(), info.ModTime())
	d.looked = time.Time{}
	if err := errors.Join(d.Commit(), d.Close()); err != nil {
		t.Fatal(err)
	}
	if d, err = openAt(path, Options{}); err != nil || len(d.Get("k")) == 0 {
		t.Fatalf("an answered Put is gone: %v", err)
	}
	d.Close()
}

// Ensure that a copy of STORE in its place, which a power failure would take away, is not believed.
func TestHealOfACopiedStore(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir, d := newSmall(t, Options{})
		d.Put("k", "v")
		d.Commit()
		copied := slices.Clone(dir.Names[storage.StoreName].Data)
		dir.Remove(storage.StoreName)
		f, _ := dir.Create(storage.StoreName)
		f.WriteAt(copied, 0)
		<-time.After(lookTime)
		if err := d.Commit(); err != nil {
			t.Fatal(err)
		}
		for seed := range uint64(10) {
			wantAll(t, "after a power failure", dir.Crash(rand.New(rand.NewPCG(seed, 1))),
				maps.Collect(d.All()))
		}
		d.Close()
	})
}

// Ensure that something that cannot be removed does not hold up a heal, and is logged once.
func TestHealBesideWhatStays(t *testing.T) {
	for _, name := range []string{"seg-0.log", "seg-1.log"} {
		path := t.TempDir()
		log := &strings.Builder{}
		d, err := openAt(path, Options{Log: slog.New(slog.NewTextHandler(log, nil))})
		if err != nil {
			t.Fatal(err)
		}
		d.Put("k", "v")
		d.Commit()
		os.WriteFile(filepath.Join(path, "photo.jpg"), nil, 0o600)
		os.Remove(filepath.Join(path, "seg-1.log"))
		os.MkdirAll(filepath.Join(path, name, "full"), 0o700)
		for range 5 {
			d.looked = time.Time{}
			if err := d.Commit(); err != nil {
				t.Fatal(err)
			}
		}
		if err := d.Close(); err == nil || !strings.Contains(err.Error(), name) {
			t.Errorf("%s: Close: %v", name, err)
		}
		if n := strings.Count(log.String(), "level=ERROR"); n > 3 {
			t.Errorf("%s: the log has %d errors:\n%s", name, n, log)
		}

		os.Remove(filepath.Join(path, "photo.jpg"))
		os.RemoveAll(filepath.Join(path, name))
		if d, err = openAt(path, Options{}); err != nil || len(d.Get("k")) == 0 {
			t.Fatalf("%s: without them: %v", name, err)
		}
		d.Close()
	}
}

// Ensure that Close heals a second time if the first try fails: only a failing call for the removed
// file itself loses data.
func TestCloseHealsAgain(t *testing.T) {
	lost := map[string]bool{}
	for n, isOver := 1, false; !isOver; n++ {
		synctest.Test(t, func(t *testing.T) {
			dir, d := newSmall(t, Options{})
			d.Put("k", "v")
			d.Commit()
			<-time.After(2 * lookTime)
			d.Commit()
			want := maps.Collect(d.All())
			dir.Remove("seg-1.log")
			dir.Sync()
			dir.Calls, dir.FailAt, dir.Failure = 0, n, syscall.EIO
			what := ""
			dir.Before = func(c storetest.Call) error {
				if dir.Calls+1 == n {
					what = c.What + " " + c.Name
				}
				return nil
			}
			err := d.Close()
			isOver = dir.Calls < n
			dir.FailAt, dir.Before = 0, nil
			again, openErr := openSmall(dir.Kill(), Options{})
			if openErr != nil || !maps.EqualFunc(maps.Collect(again.All()), want, slices.Equal) {
				lost[what] = true
				if err == nil {
					t.Errorf("%s fails, and all is lost, but Close says nothing", what)
				}
			}
		})
	}
	for what := range lost {
		if !strings.HasSuffix(what, " seg-1.log") {
			t.Errorf("one call that fails loses all: %s", what)
		}
	}
}

// Ensure that a file which somebody changes during a heal is soon written again, too, and that
// somebody who goes on with that does not keep the server from its work.
func TestHealOfWhatIsChangedMeanwhile(t *testing.T) {
	for _, goesOn := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			log, dir, heals := &strings.Builder{}, storetest.New(), 0
			dir.Before = func(c storetest.Call) error {
				if c.What == "rename" && strings.HasPrefix(c.Name, "snap-") {
					if heals++; heals == 1 || goesOn {
						dir.Empty(storage.StoreName)
					}
				}
				return nil
			}
			d, err := openSmall(dir, Options{Log: slog.New(slog.NewTextHandler(log, nil))})
			if err != nil {
				t.Fatal(err)
			}
			d.Put("k", "v")
			if err := d.Commit(); err != nil {
				t.Fatal(err)
			}

			dir.Remove("seg-1.log")
			looks := 2
			if goesOn {
				looks = 10 * int(compactTime/lookTime)
			}
			for range looks {
				<-time.After(lookTime)
				if err := d.Commit(); err != nil {
					t.Fatal(err)
				}
			}
			if !goesOn {
				wantAll(t, "changed once", dir.Kill(), maps.Collect(d.All()))
			} else if heals < 10 || heals > 20 {
				t.Errorf("in %d looks all was written %d times", looks, heals)
			}
			if n := strings.Count(log.String(), "level=ERROR"); n > 2*heals {
				t.Errorf("%d errors for %d heals:\n%s", n, heals, log)
			}
			d.Close()
		})
	}
}

// Ensure that another file in the place of a new segment or snapshot is noticed, whichever call it
// comes before once the first has its name.
func TestReplacedFileThatWasJustMade(t *testing.T) {
	for _, name := range []string{"seg-2.log", "seg-3.log", "snap-2.log"} {
		for n, isOver := int64(1), false; !isOver; n++ {
			synctest.Test(t, func(t *testing.T) {
				dir, d := newSmall(t, Options{})
				var calls atomic.Int64 // since the file has its name
				dir.Before = func(storetest.Call) error {
					if b, isThere := dir.Read(name); isThere {
						if calls.Add(1) == n {
							dir.Replace(name, append(b[:headerSize], make([]byte, 4<<10)...)) // zeros are room
						}
					}
					return nil
				}
				write := func() {
					d.Put("key", strings.Repeat("v", 100))
					d.Delete("old")
					d.Put("old", strings.Repeat("v", 100))
					if err := d.Commit(); err != nil {
						t.Fatalf("%s, call %d: %v", name, n, err)
					}
					d.AwaitCompaction()
				}
				for d.number < 4 {
					write()
				}
				isOver = calls.Load() < n
				<-time.After(lookTime)
				write()
				wantAll(t, fmt.Sprintf("%s, call %d", name, n), dir.Kill(), maps.Collect(d.All()))
				d.Close()
			})
		}
	}
}

// Ensure that another file in the place of one that a start reads is noticed, whichever call of the
// start it comes before, and that what was loaded is written again.
func TestReplacedFileThatWasJustRead(t *testing.T) {
	whole, d := newSmall(t, Options{})
	storetest.Script(t, d, storetest.NewHistory())
	d.minCompact = 1 << 40
	for number := d.number + 2; d.number < number; {
		d.Put("key", "value")
		d.Commit()
	}
	d.Put("last", "value")
	d.Commit()

	for _, name := range d.ownFiles() {
		for n, isOver := int64(1), false; !isOver; n++ {
			synctest.Test(t, func(t *testing.T) {
				dir := whole.Kill()
				dir.Locked = false
				var calls atomic.Int64
				dir.Before = func(storetest.Call) error {
					if calls.Add(1) == n {
						b, _ := dir.Read(name)
						clear(b[min(headerSize, len(b)/2):])
						dir.Replace(name, b)
					}
					return nil
				}
				again, err := openSmall(dir, Options{})
				made := calls.Swap(1 << 40) // from here on nothing is replaced
				if isOver = made < n; err != nil {
					return // it was read, and refused
				}
				<-time.After(lookTime)
				if err := again.Commit(); err != nil {
					t.Fatalf("%s, call %d: %v", name, n, err)
				}
				wantAll(t, fmt.Sprintf("%s, call %d", name, n), dir.Kill(), maps.Collect(again.All()))
				again.Close()
			})
		}
	}
	d.Close()
}

// Ensure that while a spoiled file cannot be written again, writes are refused, Deletes go on, and
// the store tries less and less often, and that writes are taken again once it has succeeded.
func TestNoWritesWithoutAHeal(t *testing.T) {
	for name, spoil := range map[string]func(dir *storetest.Dir){
		"seg-1.log is removed":        func(dir *storetest.Dir) { dir.Remove("seg-1.log") },
		"STORE is emptied":            func(dir *storetest.Dir) { dir.Empty(storage.StoreName) },
		"seg-1.log has a zero header": func(dir *storetest.Dir) { zeroHeader(dir, "seg-1.log") },
	} {
		synctest.Test(t, func(t *testing.T) {
			log := &strings.Builder{}
			dir, refuses := storetest.New(), atomic.Bool{}
			dir.Before = func(c storetest.Call) error {
				if c.What == "create" && refuses.Load() {
					return syscall.EPERM
				}
				return nil
			}
			d, err := openSmall(dir, Options{Log: slog.New(slog.NewTextHandler(log, nil))})
			if err != nil {
				t.Fatal(err)
			}
			d.Put("k", "v")
			d.Put("gone", "v")
			<-time.After(2 * lookTime) // so that the timer has nothing more to do
			if err := d.Commit(); err != nil {
				t.Fatal(err)
			}
			pass := func(looks int) {
				for range looks {
					<-time.After(lookTime)
					if err := d.Commit(); err != nil {
						t.Fatalf("%s: %v", name, err)
					}
				}
			}

			spoil(dir)
			refuses.Store(true)
			pass(5) // it is tried after 1, 2 and 4
			if err := d.Room(2, false); !errors.Is(err, ErrSpoiled) {
				t.Errorf("%s: room for a Put: %v", name, err)
			}
			if err := d.Room(4, true); err != nil || d.Delete("gone") != 1 {
				t.Errorf("%s: room for a Delete: %v", name, err)
			}
			if n := strings.Count(log.String(), "cannot write the data anew"); n != 3 {
				t.Errorf("%s: it was tried %d times, the log says\n%s", name, n, log)
			}

			refuses.Store(false)
			pass(5)
			if err := d.Room(2, false); err != nil || strings.Count(log.String(), "writes are taken") != 1 {
				t.Errorf("%s: room for a Put again: %v, the log says\n%s", name, err, log)
			}
			wantAll(t, name, dir.Kill(), maps.Collect(d.All()))
			if err := d.Close(); err != nil {
				t.Errorf("%s: Close: %v", name, err)
			}
		})
	}
}

// zeroHeader overwrites the header of a log file.
func zeroHeader(dir *storetest.Dir, name string) {
	f, _ := dir.Extend(name)
	f.WriteAt(make([]byte, headerSize), 0)
	f.Close()
}

// vandal now and then does something to a file before a call: anything that a shell can do.
type vandal struct {
	dir *storetest.Dir

	mu     sync.Mutex // held while it acts, because that makes calls, too
	random *rand.Rand
	odds   int               // it acts before one call in this many; 0: never
	copies map[string][]byte // copies that it has made, by the files' names
	did    []string
}

// before is run before each call.
func (v *vandal) before(c storetest.Call) error {
	if !v.mu.TryLock() {
		return nil
	}
	defer v.mu.Unlock()
	if v.odds > 0 && v.random.IntN(v.odds) == 0 {
		v.act(c)
	}
	return nil
}

// act does something to one of the files.
func (v *vandal) act(c storetest.Call) {
	names, _ := v.dir.List()
	names = slices.DeleteFunc(names, func(name string) bool {
		return name == storage.LockName || isTmp(name)
	})
	if len(names) == 0 {
		return
	}
	name, other := names[v.random.IntN(len(names))], names[v.random.IntN(len(names))]
	data, _ := v.dir.Read(name)
	copied, isCopied := v.copies[name]
	overwrite := func(data []byte) {
		f, _ := v.dir.Create(name) // which empties it
		f.WriteAt(data, 0)
		f.Close()
	}

	what := v.random.IntN(10)
	v.did = append(v.did, fmt.Sprint(c, ": ", what, " to ", name))
	switch what {
	case 0:
		v.dir.Remove(name)
	case 1:
		v.dir.Empty(name)
	case 2:
		v.dir.Rename(other, name)
	case 3:
		v.dir.Replace(name, data)
	case 4:
		v.dir.Replace(name, data[:v.random.IntN(len(data)+1)])
	case 5:
		v.dir.Replace(name+tmpSuffix, data)
	case 6:
		v.copies[name] = data
	case 7, 8:
		if isCopied && what == 7 {
			v.dir.Replace(name, copied)
		} else if isCopied {
			overwrite(copied)
		}
	case 9:
		data, _ = v.dir.Read(other)
		overwrite(data)
	}
}

// setOdds makes it act before one call in this many, and returns what it has done.
func (v *vandal) setOdds(odds int) (did string) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.odds = odds
	return strings.Join(v.did, "\n")
}

// Ensure that whatever is done to the files of a running store, before any of its calls, everything
// that was answered is there again soon after that ends.
func TestHealOfAnything(t *testing.T) {
	for seed := range uint64(60) {
		synctest.Test(t, func(t *testing.T) {
			random := rand.New(rand.NewPCG(seed, 1))
			dir := storetest.New()
			v := &vandal{dir: dir, random: rand.New(rand.NewPCG(seed, 2)), copies: map[string][]byte{}}
			dir.Before = v.before
			d, err := openSmall(dir, Options{Fsync: []time.Duration{FsyncAlways, time.Second}[seed%2]})
			if err != nil {
				t.Fatal(err)
			}
			v.setOdds(10 + random.IntN(200))
			commit := func() {
				t.Helper()
				if err := d.Commit(); err != nil {
					t.Fatalf("seed %d: %v, after\n%s", seed, err, v.setOdds(0))
				}
			}
			for i := range 100 + random.IntN(200) {
				d.Put(fmt.Sprint("key", random.IntN(20)), strings.Repeat("v", random.IntN(200)))
				d.Put("all", fmt.Sprint(i))
				if random.IntN(3) == 0 {
					d.Delete(fmt.Sprint("key", random.IntN(20)))
					<-time.After(time.Duration(random.IntN(int(lookTime))))
				}
				commit()
			}

			// A heal that has failed is tried again after at most a minute.
			did := v.setOdds(0)
			for range compactTime/lookTime + 5 {
				<-time.After(lookTime)
				d.Set("after", "all")
				commit()
			}
			d.AwaitCompaction()
			<-time.After(2 * lookTime) // for the timer's fsync
			what, want := fmt.Sprintf("seed %d, after\n%s\n", seed, did), maps.Collect(d.All())
			wantAll(t, what, dir.Kill(), want)
			wantAll(t, what+"power failure", dir.Crash(random), want)
			if err := d.Close(); err != nil {
				t.Fatalf("%sClose: %v", what, err)
			}
			wantAll(t, what+"closed", dir, want)
		})
	}
}

// Ensure that a snapshot which somebody has renamed stays until the heal has written its own: if
// the heal is killed, it is the only copy of its data on disk.
func TestHealOfARenamedSnapshot(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir, d := newSmall(t, Options{})
		fillUntil(d, func() bool { d.AwaitCompaction(); return d.snapshot >= 2 })
		dir.Mu.Lock()
		is := logName(kindSnapshot, d.snapshot)
		dir.Names[logName(kindSnapshot, d.snapshot-1)] = dir.Names[is]
		delete(dir.Names, is)
		dir.Mu.Unlock()

		var killed *storetest.Dir
		next := logName(kindSnapshot, d.number) + tmpSuffix
		dir.Before = func(c storetest.Call) error {
			if killed == nil && c.What == "create" && c.Name == next {
				killed = dir.Kill()
			}
			return nil
		}
		<-time.After(lookTime)
		d.Commit()
		want := maps.Collect(d.All())
		d.Close()

		killed.Locked = false
		saved := storetest.New()
		if r, err := Repair(killed, saved); err != nil {
			t.Fatal(err, r.Lines)
		}
		wantAll(t, "what a repair saves", saved, want)
	})
}

// fillUntil puts and deletes until isEnough returns true.
func fillUntil(d *Store, isEnough func() bool) {
	for !isEnough() {
		d.Set("key", strings.Repeat("v", 100))
		d.Delete("old")
		d.Put("old", strings.Repeat("v", 100))
		d.Commit()
	}
}

// Ensure that STORE and the current file are written again if they are removed during a long
// compaction, and that no Commit is answered before.
func TestRemovedBesideACompaction(t *testing.T) {
	for _, isStore := range []bool{true, false} {
		synctest.Test(t, func(t *testing.T) {
			dir, d := newSmall(t, Options{})
			goOn := make(chan struct{})
			dir.Before = func(c storetest.Call) error {
				if c.What == "sync" && strings.HasPrefix(c.Name, "snap-") {
					<-goOn
				}
				return nil
			}
			fillUntil(d, d.isCompacting)

			dir.Mu.Lock()
			name := d.current.header.name()
			if isStore {
				name = storage.StoreName
			}
			delete(dir.Names, name)
			dir.Mu.Unlock()
			<-time.After(lookTime)

			answered := make(chan error, 1)
			go func() {
				d.Put("last", "v")
				answered <- d.Commit()
			}()
			synctest.Wait()
			if len(answered) > 0 || !d.IsHealing() {
				t.Errorf("%s is gone: a Commit is answered, or a stop would not wait", name)
			}
			close(goOn)
			if err := <-answered; err != nil {
				t.Fatal(err)
			}
			wantAll(t, "without "+name, dir.Kill(), maps.Collect(d.All()))
			d.Close()
		})
	}
}

// Ensure that a snapshot which somebody empties while it is written never replaces other files.
func TestSnapshotEmptiedWhileItIsWritten(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log bytes.Buffer
		dir, d := newSmall(t, Options{Log: slog.New(slog.NewTextHandler(&log, nil))})
		dir.Before = func(c storetest.Call) error {
			if c.What == "sync" && strings.HasPrefix(c.Name, "snap-") {
				dir.Empty(c.Name)
			}
			return nil
		}
		fillUntil(d, func() bool { d.AwaitCompaction(); return strings.Contains(log.String(), "compact") })
		want := maps.Collect(d.All())
		if err := d.Close(); err != nil {
			t.Fatal(err)
		}
		dir.Before = nil
		wantAll(t, "after a compaction whose file was emptied", dir, want)
	})
}

// Ensure that Close returns an error, or the data is there, if a file is emptied before any call of
// Close up to its last check.
func TestEmptiedWhileItCloses(t *testing.T) {
	for _, name := range []string{storage.StoreName, "seg-1.log", "seg-2.log"} {
		for n, isOver := 1, false; !isOver; n++ {
			synctest.Test(t, func(t *testing.T) {
				dir, d := newSmall(t, Options{})
				fillUntil(d, func() bool { return d.number == 2 })
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
