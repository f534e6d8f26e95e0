package durable

import (
	"errors"
	"math/rand/v2"
	"sync/atomic"
	"syscall"
	"testing"

	"kvserver/kvstore/storage"
	"kvserver/kvstore/storetest"
)

// Ensure that all that was done since the last Commit is taken back if a cluster has no room for it,
// and that nothing is kept for that after a Commit.
func TestCommitIsTakenBack(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 1))
	dir, h := storetest.New(), storetest.NewHistory()
	dir.Reserve, dir.Segment, dir.Compact = 0, 4000, 4000
	var isFull atomic.Bool
	dir.Before = func(call storetest.Call) error {
		if call.What == "write" && isFull.Load() {
			return syscall.ENOSPC
		}
		return nil
	}
	d, err := Open(t.Context(), dir, Options{})
	if err != nil {
		t.Fatal(err)
	}
	taken := 0
	for n := range 3000 {
		for range random.IntN(5) {
			storetest.RandomStep(t, random, d, h.Done)
		}
		isFull.Store(random.IntN(3) == 0)
		err := d.Commit()
		isFull.Store(false)
		switch {
		case errors.Is(err, storage.ErrTakenBack):
			h.Done = h.Told.Clone()
			taken++
		case err != nil:
			t.Fatal(err)
		}
		if h.Told = h.Done.Clone(); !h.Told.Equal(d) {
			t.Fatalf("after Commit number %d, %v, there is not what there should be", n, err)
		}
		if len(d.before) > 0 {
			t.Fatalf("after Commit number %d, %v, %d changes are kept", n, err, len(d.before))
		}
		d.AwaitCompaction()
	}
	if taken < 500 {
		t.Errorf("only %d Commits are taken back", taken)
	}

	again, err := Open(t.Context(), dir.Kill(), Options{})
	if err != nil {
		t.Fatal(err)
	}
	if !h.Told.Equal(again) {
		t.Error("after kill -9 there is not what there should be")
	}
	again.Close()
	d.Close()
}

// Ensure that nothing is kept for requests that find nothing to change.
func TestNothingIsKeptOfNoChange(t *testing.T) {
	dir := storetest.New()
	dir.Reserve = 0
	d, err := Open(t.Context(), dir, Options{})
	if err != nil {
		t.Fatal(err)
	}
	d.Put("k", "v")
	if err := d.Commit(); err != nil {
		t.Fatal(err)
	}
	d.Delete("none")
	d.Take("none")
	d.Expire("none", 1)
	d.Remove("none", "v")
	d.Remove("k", "w")
	if len(d.before) > 0 {
		t.Errorf("it keeps %v", d.before)
	}
	d.Close()
}
