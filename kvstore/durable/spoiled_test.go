package durable

import (
	"bytes"
	"context"
	"fmt"
	"kvserver/kvstore/storage"
	"kvserver/kvstore/storetest"
	"log/slog"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
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
