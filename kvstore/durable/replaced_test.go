package durable

import (
	"errors"
	"fmt"
	"kvserver/kvstore/storage"
	"kvserver/kvstore/storetest"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// Ensure that a copy which is put over the only segment of a busy store is noticed, even though the
// copy has the last frame that was checked, and even if the file has grown since, or a frame has
// filled it exactly.
func TestHealOfACopyBetweenWrites(t *testing.T) {
	for _, c := range []struct{ zeros, size int }{{0, 100}, {640, 79}, {640, 80}} { // 5 frames of 128
		synctest.Test(t, func(t *testing.T) {
			dir, d := newSmall(t, Options{})
			d.segmentSize, d.minCompact = 1<<40, 1<<40
			if c.zeros > 0 {
				// The timer reads zerosAhead while it writes.
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
			// This Commit checks the files, so the copy comes between two checks.
			write("before")

			out := storetest.New()
			if _, err := Backup(dir, out); err != nil {
				t.Fatal(err)
			}
			write("since1")

			// Only the segment: a copy of STORE alone would be noticed.
			dir.Empty("seg-1.log")
			f, _ := dir.Extend("seg-1.log")
			f.WriteAt(out.Names["seg-1.log"].Data, 0)
			f.Close()

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
	d.lookAfter = time.Time{}
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

				// The Deletes are there so that a compaction is worth it.
				write := func() {
					d.Put("key", strings.Repeat("v", 100))
					d.Delete("old")
					d.Put("old", strings.Repeat("v", 100))
					if err := d.Commit(); err != nil {
						t.Fatalf("%s, call %d: %v", name, n, err)
					}
					d.AwaitCompaction()
				}

				for d.number() < 4 {
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
	for number := d.number() + 2; d.number() < number; {
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
