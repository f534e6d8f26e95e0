package durable

import (
	"errors"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"kvserver/kvstore"
	"kvserver/kvstore/storetest"
)

// Ensure that the timer, when it stands still for a moment between its fsync and its end, syncs no frame
// that the owner has written early: such a frame could not be taken back any more.
func TestTimerThatStandsStillSyncsNoEarlyFrame(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir := storetest.New()
		dir.Reserve = 0
		var isSlow, isFull atomic.Bool
		dir.Before = func(call storetest.Call) error {
			if call.What == "sync" && isSlow.Load() {
				<-time.After(time.Second)
			}
			if call.What == "write" && isFull.CompareAndSwap(true, false) {
				return syscall.ENOSPC
			}
			return nil
		}
		d, err := Open(t.Context(), dir, Options{})
		if err != nil {
			t.Fatal(err)
		}
		d.Put("k", "v")
		if err := d.Commit(); err != nil {
			t.Fatal(err)
		}
		isSlow.Store(true)
		<-time.After(vouchTime + time.Second/2) // now the timer syncs its frame

		// The timer's goroutine stands still behind that fsync, as if it had lost its processor: here it
		// waits for fsyncs.
		stands := make(chan bool)
		go func() {
			d.fsyncs <- struct{}{}
			<-stands
			<-d.fsyncs
		}()
		synctest.Wait()
		d.Put("large", strings.Repeat("x", 2*maxFramePut)) // a frame that is written early
		close(stands)
		synctest.Wait()
		isSlow.Store(false)
		<-time.After(2 * time.Second)

		isFull.Store(true)
		d.Put("k", "w")
		if err := d.Commit(); !errors.Is(err, kvstore.ErrTakenBack) {
			t.Fatalf("Commit: %v", err)
		}
		if d.Count("large") != 0 {
			t.Error("memory has what was refused")
		}
		again, err := Open(t.Context(), dir.Kill(), Options{})
		if err != nil {
			t.Fatal(err)
		}
		if again.Count("large") != 0 {
			t.Error("after kill -9 there is what was refused")
		}
		again.Close()
		d.Close()
	})
}
