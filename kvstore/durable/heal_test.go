package durable

import (
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

// What is true of every heal is here. Each kind of change has its own file: removed_test.go,
// spoiled_test.go (files that are changed in place), replaced_test.go and added_test.go.

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

				<-time.After(retryTime)
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
	d.lookAfter = time.Time{}
	d.Commit()

	for _, at := range []string{path, path + ".old"} {
		if names, _ := filepath.Glob(filepath.Join(at, "snap-*.log")); len(names) > 0 {
			t.Errorf("%s has %q", at, names)
		}
	}
	d.Close()
}

// Ensure that removed files are written again only once it is known that the directory is still the
// store's, and that a Commit that finds that it is not fails at once.
func TestHealKnowsItsDirectory(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "data")
		os.Mkdir(path, 0o700)
		d, err := Open(t.Context(), mustDirectory(t, path), Options{})
		if err != nil {
			t.Fatal(err)
		}

		// While the path is a loop, nobody knows.
		os.Remove(filepath.Join(path, storage.StoreName))
		os.Rename(path, path+".old")
		if err := os.Symlink(path, path); err != nil {
			t.Logf("without links there is no such error: %v", err)
			return
		}

		for _, isKnown := range []bool{false, true} {
			if isKnown {
				os.Remove(path)
				os.Rename(path+".old", path)
			}
			<-time.After(lookTime)
			if err := d.Commit(); err != nil || d.number() > 1 != isKnown {
				t.Errorf("it is known where the directory is: %v; the log is in file %d, %v", isKnown,
					d.number(), err)
			}
		}

		// Then it leads nowhere.
		os.Remove(filepath.Join(path, storage.StoreName))
		os.Rename(path, path+".old")
		d.lookAfter = time.Time{}
		if err := d.Commit(); !errors.Is(err, storage.ErrMoved) {
			t.Errorf("the directory was moved: %v", err)
		}
		d.Close()
	})
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
		d.lookAfter = time.Time{}

		// The heal does not wait until a rotation would be tried again.
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
			if err := d.lookForFiles(); err != nil {
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

// Ensure that a crash before a heal has its snapshot on disk loses nothing if the files are good
// and only look changed, as after touch.
func TestCrashesInAHealOfGoodFiles(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir, d := newSmall(t, Options{})
		storetest.Script(t, d, storetest.NewHistory())
		d.minCompact = 1 << 40
		for number := d.number() + 2; d.number() < number; {
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

		name := logName(kindSegment, d.number()-1)
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

		number := d.number()
		if err := d.lookForFiles(); err != nil || d.number() == number {
			t.Fatalf("in file %d, %v", d.number(), err)
		}

		for i, image := range images {
			wantAll(t, fmt.Sprintf("image %d of %d", i, len(images)), image, want)
		}
		d.Close()
	})
}

// Ensure that a file which cannot be read is not taken for one that somebody has changed.
func TestNoHealOfWhatNobodyCanRead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		log := &strings.Builder{}
		dir, d := newSmall(t, Options{Log: slog.New(slog.NewTextHandler(log, nil))})
		var refuses atomic.Bool
		dir.Before = func(c storetest.Call) error {
			if c.What == "read" && refuses.Load() {
				return syscall.EIO
			}
			return nil
		}

		d.Put("key", "value")
		d.Commit()

		refuses.Store(true)
		for range 5 {
			<-time.After(lookTime)
			d.Put("key", "value")
			if err := d.Commit(); err != nil {
				t.Fatal(err)
			}
			wantAll(t, "killed", dir.Kill(), maps.Collect(d.All()))
		}

		if d.number() != 1 || strings.Count(log.String(), "level=ERROR") != 1 ||
			!strings.Contains(log.String(), "cannot look") {
			t.Errorf("now in file %d, the log says\n%s", d.number(), log)
		}
		if err := d.Close(); !errors.Is(err, ErrSpoiled) || !errors.Is(err, syscall.EIO) {
			t.Errorf("Close: %v", err)
		}

		refuses.Store(false)
		wantAll(t, "closed", dir, maps.Collect(d.All()))
	})
}

// Ensure that a heal removes nothing whose data it cannot read back from its snapshot.
func TestHealReadsBackFirst(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir, d := newSmall(t, Options{})
		var refuses atomic.Bool
		refuses.Store(true)
		dir.Before = func(c storetest.Call) error {
			if c.What == "read" && strings.HasPrefix(c.Name, "snap-") && refuses.Load() {
				return syscall.EIO
			}
			return nil
		}
		d.minCompact = 1 << 40
		fillUntil(d, func() bool { return d.number() == 3 })

		f, _ := dir.Extend("seg-1.log")
		f.WriteAt(dir.Names["seg-1.log"].Data[:1], 0) // it only looks changed
		f.Close()
		for range 3 {
			<-time.After(lookTime)
			if err := d.Commit(); err != nil {
				t.Fatal(err)
			}
			wantAll(t, "killed", dir.Kill(), maps.Collect(d.All()))
		}

		if err := d.Close(); !errors.Is(err, ErrSpoiled) || !errors.Is(err, syscall.EIO) {
			t.Errorf("Close: %v", err)
		}
		refuses.Store(false)
		wantAll(t, "closed", dir, maps.Collect(d.All()))
	})
}

// Ensure that a heal removes no file before STORE is on disk again, so that all is there for Repair
// if STORE cannot be written.
func TestHealWritesStoreFirst(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir, d := newSmall(t, Options{})
		var refuses atomic.Bool
		dir.Before = func(c storetest.Call) error {
			if c.What == "create" && c.Name == storage.StoreName+tmpSuffix && refuses.Load() {
				return syscall.EIO
			}
			return nil
		}

		d.minCompact = 1 << 40
		fillUntil(d, func() bool { return d.number() == 3 })

		refuses.Store(true)
		dir.Remove(storage.StoreName)
		f, _ := dir.Extend("seg-1.log")
		f.WriteAt(dir.Names["seg-1.log"].Data[:1], 0) // it only looks changed
		f.Close()
		<-time.After(lookTime)
		if err := d.Commit(); err != nil {
			t.Fatal(err)
		}

		killed := dir.Kill()
		killed.Locked = false
		out, r, err := repaired(t, killed)
		if err != nil || r.Lost {
			t.Fatalf("repair: %v, %q", err, r.Lines)
		}
		wantAll(t, "repaired", out, maps.Collect(d.All()))

		refuses.Store(false)
		if err := d.Close(); err != nil {
			t.Error(err)
		}
		wantAll(t, "closed", dir, maps.Collect(d.All()))
	})
}

// Ensure that the snapshot of a heal stays even if its name cannot be synced: by then it is the
// only copy of the data on disk.
func TestHealWhoseNameIsNotSynced(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir, d := newSmall(t, Options{})
		var refuses atomic.Bool
		refuses.Store(true)
		dir.Before = func(c storetest.Call) error {
			_, hasName := dir.Read(logName(kindSnapshot, 3))
			if hasName && c == (storetest.Call{What: "sync"}) && refuses.Load() {
				return syscall.EIO
			}
			return nil
		}

		d.minCompact = 1 << 40
		fillUntil(d, func() bool { return d.number() == 3 })

		dir.Remove("seg-1.log")
		<-time.After(lookTime)
		if err := d.Commit(); err != nil || d.snapshot != 0 {
			t.Fatalf("snapshot %d, %v", d.snapshot, err)
		}
		wantAll(t, "killed", dir.Kill(), maps.Collect(d.All()))

		refuses.Store(false)
		<-time.After(2 * lookTime)
		if err := d.Commit(); err != nil || d.snapshot == 0 {
			t.Fatalf("later: snapshot %d, %v", d.snapshot, err)
		}
		wantAll(t, "after the next try", dir.Kill(), maps.Collect(d.All()))

		if err := d.Close(); err != nil {
			t.Error(err)
		}
		wantAll(t, "closed", dir, maps.Collect(d.All()))
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

		for d.number() == 1 {
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

		if d.number() != 2 || strings.Contains(log.String(), "level=ERROR") {
			t.Errorf("now in file %d, the log says\n%s", d.number(), log)
		}
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	})
}

// Ensure that the files of a compaction that runs are not taken for somebody else's.
func TestNoHealOfACompaction(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		log, goOn := &strings.Builder{}, make(chan struct{})
		dir, d := newSmall(t, Options{Log: slog.New(slog.NewTextHandler(log, nil))})
		dir.Before = func(c storetest.Call) error {
			if strings.HasPrefix(c.Name, "snap-") && c.What == "sync" || c.What == "remove" {
				<-goOn
			}
			return nil
		}

		// First there is a temporary file.
		fillUntil(d, d.isCompacting)
		number := d.number()
		look(t, d, 3)
		goOn <- struct{}{}
		synctest.Wait() // for the snapshot; the files that it replaces are there still
		look(t, d, 3)
		close(goOn)
		d.AwaitCompaction()
		look(t, d, 3)
		if d.number() != number || strings.Contains(log.String(), "level=ERROR") {
			t.Errorf("file %d became file %d, the log says\n%s", number, d.number(), log)
		}
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	})
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
				looks = 10 * int(retryTime/lookTime)
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

// Ensure that while a spoiled file cannot be written again, writes are refused, Deletes go on, and
// the store tries less and less often, that writes are taken again once it has succeeded, and that
// a later failure begins anew.
func TestNoWritesWithoutAHeal(t *testing.T) {
	for name, spoil := range map[string]func(dir *storetest.Dir, segment string){
		"the segment is removed":        func(dir *storetest.Dir, s string) { dir.Remove(s) },
		"STORE is emptied":              func(dir *storetest.Dir, _ string) { dir.Empty(storage.StoreName) },
		"the segment has a zero header": zeroHeader,
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
			<-time.After(2 * lookTime) // so that the timer has nothing more to do
			if err := d.Commit(); err != nil {
				t.Fatal(err)
			}

			for round := 1; round <= 2; round++ {
				d.Put("gone", "v")
				look(t, d, 1)
				spoil(dir, d.current.header.name())
				refuses.Store(true)
				look(t, d, 5) // it is tried after 1, 2 and 4
				if err := d.Room("", 2, 0); !errors.Is(err, ErrSpoiled) {
					t.Errorf("%s: room for a Put: %v", name, err)
				}
				if err := roomToDelete(d, "gone"); err != nil || d.Delete("gone") != 1 {
					t.Errorf("%s: room for a Delete: %v", name, err)
				}
				if n := strings.Count(log.String(), "cannot write the data again"); n != 3*round {
					t.Errorf("%s: it was tried %d times, the log says\n%s", name, n, log)
				}

				refuses.Store(false)
				look(t, d, 5)
				if err := d.Room("", 2, 0); err != nil ||
					strings.Count(log.String(), "writes are taken") != round {
					t.Errorf("%s: room for a Put again: %v, the log says\n%s", name, err, log)
				}
			}
			wantAll(t, name, dir.Kill(), maps.Collect(d.All()))
			if err := d.Close(); err != nil {
				t.Errorf("%s: Close: %v", name, err)
			}
		})
	}
}

// Ensure that a heal that fails is tried less and less often, but at least every minute.
func TestHealIsTriedEveryMinute(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir, d := newSmall(t, Options{})
		tries, last, longest := 0, time.Now(), time.Duration(0)
		dir.Before = func(c storetest.Call) error {
			if c.What != "create" || !strings.HasPrefix(c.Name, "seg-") {
				return nil
			}
			tries++
			longest = max(longest, time.Since(last))
			last = time.Now()
			return syscall.EPERM
		}

		dir.Remove(storage.StoreName)
		look(t, d, 20*60)
		if longest > retryTime+lookTime || tries < 20 || tries > 20+6 { // 6 in the first minute
			t.Errorf("%d tries in 20 minutes, with pauses of up to %v", tries, longest)
		}
		dir.Before = nil
		d.Close()
	})
}

// look waits for this many checks of the files.
func look(t *testing.T, d *Store, checks int) {
	t.Helper()
	for range checks {
		<-time.After(lookTime)
		if err := d.Commit(); err != nil {
			t.Fatal(err)
		}
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
		return name == storage.LockName || strings.HasSuffix(name, tmpSuffix)
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
			for range retryTime/lookTime + 5 {
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

// fillUntil puts and deletes until isEnough returns true.
func fillUntil(d *Store, isEnough func() bool) {
	for !isEnough() {
		d.Set("key", strings.Repeat("v", 100))
		d.Delete("old")
		d.Put("old", strings.Repeat("v", 100))
		d.Commit()
	}
}
