package durable

import (
	"bytes"
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
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

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

// removeThose removes the files of a store that isGone picks.
func removeThose(dir *storetest.Dir, d *Store, isGone func(string, uint32, uint64, uint64) bool) {
	for _, name := range slices.Sorted(maps.Keys(dir.Names)) {
		if kind, number, _ := parseName(name); isGone(name, kind, number, d.number) {
			dir.Remove(name)
		}
	}
}

// withHole returns a store from which somebody has removed files while it is open.
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
				isEmpty := openErr == nil && what == "everything" && keysOf(again) == 0
				if openErr == nil {
					again.Close()
				}
				// Else it is refused, or the power failed before anything was written.
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

// Ensure that Close writes removed files anew even shortly after that was not possible, and
// that it fails where it is not possible still.
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

// stolenDirectory is one that another process takes while a snapshot is written.
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

// Ensure that what is written anew does not get its name in a directory that another process has
// taken meanwhile.
func TestHealOfAStolenDirectory(t *testing.T) {
	if runtime.GOOS == "windows" {
		return // nobody can remove a lock
	}
	path := t.TempDir()
	dir := &stolenDirectory{Disk: mustDirectory(t, path)}
	dir.steal = func() {
		os.Remove(filepath.Join(path, storage.LockName))
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
	os.Remove(filepath.Join(path, storeName))
	d.looked = time.Time{}
	d.Commit()
	if names, _ := filepath.Glob(filepath.Join(path, "snap-*.log")); len(names) > 0 {
		t.Errorf("the other process finds %q", names)
	}
	d.Close()
}

// Ensure that a rotation that failed, and left its new file, does not spoil a heal.
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
		dir.Remove(storeName)
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

// Ensure that a heal that fails leaves nothing that is in the way when the file is put back.
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
