package storage_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"kvserver/kvstore/durable"
	"kvserver/kvstore/storage"
	"kvserver/kvstore/storetest"
	"kvserver/kvstore/storetest/is"
)

// Ensure that no answered write is lost, and that one store at most goes on, whichever call of a
// store LOCK is removed before, or replaced, while another store starts; and that what a power
// failure leaves without LOCK opens.
func TestSecondStartWithoutLock(t *testing.T) {
	for i := range 8 {
		l := lockLoss{isReal: i&1 > 0, isPlain: i&2 > 0, isReplaced: i&4 > 0}
		if l.isReal && runtime.GOOS == "windows" {
			continue // nobody can remove a lock
		}
		step := int64(1)
		if l.isReal {
			step = 5 // a real lock knows nothing of the store's calls
		}
		for n, isOver := int64(1), false; !isOver; n += step {
			synctest.Test(t, func(t *testing.T) { isOver = l.before(t, n) })
		}
	}
}

// lockLoss is a way to lose LOCK.
type lockLoss struct {
	isReal     bool // only LOCK is in a real directory; otherwise all is on a fake disk
	isPlain    bool // the directory itself is not locked
	isReplaced bool // LOCK is another file, a while before the second start; otherwise it is gone
}

// before loses LOCK before a store's call n, and reports whether the store makes fewer calls.
func (l lockLoss) before(t *testing.T, n int64) (isOver bool) {
	what := fmt.Sprintf("%+v, call %d", l, n)
	dir := storetest.New()
	dir.Segment, dir.Compact, dir.Reserve, dir.Plain = 1500, 2000, 700, l.isPlain
	place, open := l.place(t, dir)
	first, err := durable.Open(t.Context(), open(), durable.Options{})
	is.OK(t, err)

	var calls, answered atomic.Int64
	var left *storetest.Dir // after a power failure
	var kept int64          // keys that were answered before it
	second := make(chan *durable.Store, 1)
	dir.Before = func(storetest.Call) error {
		if calls.Add(1) == n {
			l.spoil(place)
			left, kept = dir.Crash(rand.New(rand.NewPCG(uint64(n), 1))), answered.Load()
			go l.startSecond(t, open(), second)
		}
		return nil
	}

	// The first store checks its lock once in the time that the first 15 writes take.
	for i := 0; err == nil && (i < 15 || calls.Load() >= n && len(second) == 0); i++ {
		err = put(first, answered.Load())
		if err == nil {
			answered.Add(1)
			<-time.After(90 * time.Millisecond)
		}
	}
	if calls.Swap(n) < n { // from here on LOCK stays
		is.OK(t, first.Close())
		return true
	}

	// If only LOCK was locked, and is another file, the first store must end.
	goesOn, ends := <-second, l.isPlain && l.isReplaced
	if ends != errors.Is(err, storage.ErrMoved) || ends == (err == nil) || ends != (goesOn != nil) {
		t.Fatalf("%s: the first one says %v; a second one starts: %v", what, err, goesOn != nil)
	}
	if ends {
		first.Close()
	} else {
		goesOn = first
	}
	is.OK(t, put(goesOn, answered.Add(1)-1))
	is.OK(t, goesOn.Close())
	if _, _, err := place.Open(storage.LockName); err != nil {
		t.Errorf("%s: LOCK is not made again: %v", what, err)
	}

	wantKeys(t, what, open(), answered.Load())
	wantKeys(t, what+", then a power failure", left, kept)
	return false
}

// place returns the directory that has LOCK, and what opens the directory of the store.
func (l lockLoss) place(t *testing.T, dir *storetest.Dir) (storage.Directory,
	func() storage.Directory) {
	if !l.isReal {
		return dir, func() storage.Directory { return dir }
	}

	path := t.TempDir()
	open := func() storage.Directory {
		d, err := storage.OpenDisk(path, nil)
		is.OK(t, err)
		t.Cleanup(func() { d.Close() })
		if l.isPlain {
			d.LockOnlyFile()
		}
		return realLock{dir, d}
	}

	// A start waits for LOCK only if STORE is there.
	place := open().(realLock).disk
	_, err := place.Create(storage.StoreName)
	is.OK(t, err)
	return place, open
}

// realLock is a fake disk whose LOCK is in a real directory.
type realLock struct {
	*storetest.Dir
	disk *storage.Disk
}

func (d realLock) Lock(ctx context.Context) (storage.Lock, error) { return d.disk.Lock(ctx) }

// spoil removes LOCK, or replaces it in one step.
func (l lockLoss) spoil(place storage.Directory) {
	if !l.isReplaced {
		place.Remove(storage.LockName)
		return
	}
	f, _ := place.Create("LOCK.tmp")
	f.Close()
	place.Rename("LOCK.tmp", storage.LockName)
	place.Sync() // a power failure must not leave LOCK.tmp
}

// startSecond starts a store, which it sends to second; nil: the lock is held.
func (l lockLoss) startSecond(t *testing.T, dir storage.Directory, second chan<- *durable.Store) {
	if l.isReplaced {
		<-time.After(1200 * time.Millisecond) // or both would write before the first one looks
	}
	db, err := durable.Open(t.Context(), dir, durable.Options{})
	if err != nil && !errors.Is(err, storage.ErrLocked) {
		t.Errorf("%+v: the second start: %v", l, err)
	}
	second <- db
}

// put writes key n and, so that a compaction is worth it, a value that is soon replaced.
func put(db *durable.Store, n int64) error {
	db.Put(fmt.Sprint("key", n), "v")
	db.Delete("old")
	db.Put("old", strings.Repeat("v", 100))
	return db.Commit()
}

// wantKeys wants that a store has the first n keys that were put.
func wantKeys(t *testing.T, what string, dir storage.Directory, n int64) {
	db, err := durable.Open(t.Context(), dir, durable.Options{})
	if err != nil {
		t.Fatalf("%s: %v", what, err)
	}
	for i := range n {
		if len(db.Get(fmt.Sprint("key", i))) == 0 {
			t.Errorf("%s: key%d of %d is lost", what, i, n)
		}
	}
	db.Close()
}
