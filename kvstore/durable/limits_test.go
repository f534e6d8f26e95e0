package durable

import (
	"context"
	"errors"
	"fmt"
	"kvserver/kvstore/storage"
	"kvserver/kvstore/storetest"
	"math/rand/v2"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

// Ensure that restarts at the limit of a file's size use up nothing of what it takes to go on in the
// next file.
func TestLargestFileAndManyStarts(t *testing.T) {
	for _, starts := range []int{1, 5, 20} {
		dir, d := newSmall(t, Options{})
		d.segmentSize, dir.Segment, dir.Largest = 1<<20, 1<<20, 100_000
		n := 0
		var err error
		for ; err == nil; n++ {
			if err = d.Room(1010, false); err == nil {
				d.Put(fmt.Sprintf("key%07d", n), strings.Repeat("v", 1000))
				if err := d.Commit(); err != nil {
					t.Fatal(err)
				}
			}
		}
		for range starts {
			if err := d.Close(); err != nil {
				t.Fatalf("starts %d: Close: %v", starts, err)
			}
			if d, err = openSmall(dir, Options{}); err != nil {
				t.Fatal(err)
			}
			d.segmentSize = 1 << 20
		}
		for i := range n - 1 {
			key := fmt.Sprintf("key%07d", i)
			if err := d.Room(int64(len(key)), true); err != nil {
				t.Fatalf("starts %d, Delete %d of %d: %v", starts, i, n, err)
			}
			d.Delete(key)
			if err := d.Commit(); err != nil {
				t.Fatal(err)
			}
		}
		d.Close()
	}
}

// Ensure that everything can be deleted where the disk and the file become full at the same time.
func TestFullDiskAndLargestFile(t *testing.T) {
	for room := 104_000; room < 112_000; room += 168 {
		dir, d := newSmall(t, Options{})
		d.segmentSize, dir.Segment, dir.Largest, dir.Room = 1<<20, 1<<20, 100_000, room
		n := 0
		var err error
		for ; err == nil; n++ {
			if err = d.Room(1010, false); err == nil {
				d.Put(fmt.Sprintf("key%07d", n), strings.Repeat("v", 1000))
				if err := d.Commit(); err != nil {
					t.Fatal(err)
				}
			}
		}
		for i := range n - 1 {
			key := fmt.Sprintf("key%07d", i)
			if err := d.Room(int64(len(key)), true); err != nil {
				t.Fatalf("room %d, after %d Puts, Delete %d: %v", room, n, i, err)
			}
			d.Delete(key)
			if err := d.Commit(); err != nil {
				t.Fatal(err)
			}
		}
		d.Close()
	}
}

// Ensure that a copy that is put over the only segment is noticed where a frame then fills it exactly.
func TestHealOfACopyThatIsFilledExactly(t *testing.T) {
	for _, size := range []int{79, 80} { // with one of these a frame has 128 bytes
		synctest.Test(t, func(t *testing.T) {
			dir, d := newSmall(t, Options{})
			d.segmentSize, d.minCompact = 1<<40, 1<<40
			d.writing <- struct{}{}
			d.zerosAhead = 640 // five frames of 128 bytes
			<-d.writing
			write := func(key string) {
				t.Helper()
				d.Put(key, strings.Repeat("v", size))
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
			again, err := openSmall(dir.Kill(), Options{})
			if err != nil {
				t.Errorf("a copy was put over it: %v", err)
			} else if keysOf(again) != keysOf(d) {
				t.Errorf("lost silently: %d of %d keys", keysOf(again), keysOf(d))
			}
			d.Close()
		})
	}
}

// Ensure that a start is good after a first one that failed at any call, and a second one that a power
// failure stopped at any.
func TestFirstStartThatFailed(t *testing.T) {
	for fail := 1; fail < 60; fail++ {
		dir := storetest.New()
		dir.FailAt = fail
		d, err := Open(context.Background(), dir, Options{})
		dir.FailAt = 0
		if err == nil {
			d.Close()
			continue
		}
		for stop := 1; stop < 60; stop++ {
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
				d, err := Open(context.Background(), second, Options{})
				if err != nil {
					t.Fatalf("fail %d: second: %v", fail, err)
				}
				second.Before = nil
				d.stopTimer()
				for _, image := range images {
					third, err := Open(context.Background(), image, Options{})
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

// eioDir is a directory of which one file cannot be read.
type eioDir struct {
	*storetest.Dir
	name string
}

type eioFile struct{ storage.File }

func (eioFile) ReadAt([]byte, int64) (int, error) { return 0, syscall.EIO }

func (d eioDir) Open(name string) (storage.File, int64, error) {
	f, size, err := d.Dir.Open(name)
	if err == nil && name == d.name {
		return eioFile{f}, size, nil
	}
	return f, size, err
}

// Ensure that a header of the newest file that cannot be read is no damage of the one before.
func TestHeaderThatCannotBeRead(t *testing.T) {
	dir, d := newSmall(t, Options{})
	d.Put("a", "b")
	d.Commit()
	d.stopTimer()
	// A rotation that was stopped: the next file is there, without frames.
	if _, err := createLog(dir, fileHeader{kind: kindSegment, id: d.id, number: d.number + 1,
		first: d.sequence + 2}, nil); err != nil {
		t.Fatal(err)
	}
	_, err := Open(context.Background(), eioDir{dir.Kill(), logName(kindSegment, d.number+1)},
		Options{})
	var damage *storage.DamageError
	if err == nil || errors.As(err, &damage) {
		t.Errorf("an I/O error is told as damage of another file: %v", err)
	}
}
