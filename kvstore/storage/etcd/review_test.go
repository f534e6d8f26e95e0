package etcd

import (
	"crypto/rand"
	"errors"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"kvserver/kvstore"
	"kvserver/kvstore/durable"
	"kvserver/kvstore/storetest"
)

// Ensure that what was answered stays, and no panic, if somebody deletes keys while a Commit is taken
// back, whichever request that is before, and check sees it at once.
func TestEtcdNamesGoneWhileTakenBack(t *testing.T) {
	for _, gone := range []string{"kv/n/", "kv/n/seg-1.log", "kv/n/STORE", "kv/d/", "kv/step"} {
		for n, isReached := 1, true; isReached; n++ {
			synctest.Test(t, func(t *testing.T) {
				e, h := newFakeEtcd(), storetest.NewHistory()
				dir, w := e.dir(t, t.Context(), "first:9999")
				d, err := durable.Open(t.Context(), dir.directory, durable.Options{})
				if err != nil {
					t.Fatal(err)
				}
				commit(t, d, h, "k", "one")
				<-time.After(2*time.Second + beatTime/2) // then the timer has nothing to write
				commit(t, d, h, "k", "two")
				full, deleted := w.count()+2, w.count()+n
				w.mu.Lock()
				w.slow = 5 * time.Millisecond
				w.before = func(number int) {
					if number == deleted {
						e.delete(gone)
						go dir.check() // as attend does once a second
					}
					if number == full {
						e.setFull(true)
						time.AfterFunc(20*time.Second, func() { e.setFull(false) })
					}
				}
				w.mu.Unlock()
				large := make([]byte, 300<<10) // some requests
				rand.Read(large)
				d.Put("k", string(large))
				h.Done.Put("k", string(large))
				defer func() {
					if p := recover(); p != nil {
						t.Fatalf("%s, request %d: panic: %v", gone, n, p)
					}
				}()
				err = d.Commit()
				isReached = w.count() >= deleted && n < 40
				switch {
				case errors.Is(err, kvstore.ErrTakenBack):
					h.Done = h.Told.Clone()
				case err != nil:
					t.Errorf("%s, request %d: %v", gone, n, err)
				}
				if h.Told = h.Done.Clone(); !h.Told.Equal(d) {
					t.Errorf("%s, request %d: after %v there is not what there should be", gone, n, err)
				}
				<-time.After(25 * time.Second)
				if err := d.Commit(); err != nil {
					t.Errorf("%s, request %d: a read: %v", gone, n, err)
				}
				w.kill()
				<-d.Lost()
				d.Close()
				after, _ := e.dir(t, t.Context(), "second:9999")
				checkKept(t, h, after, fmt.Sprintf("%s, request %d", gone, n))
			})
			if t.Failed() {
				break
			}
		}
	}
}

// Ensure that with -fsync 1s nothing answered is lost if etcd becomes full at the first write after a
// start that has found a torn end.
func TestEtcdFullAfterATornStart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e, h := newFakeEtcd(), storetest.NewHistory()
		dir, w := e.dir(t, t.Context(), "first:9999")
		d, err := durable.Open(t.Context(), dir.directory, durable.Options{})
		if err != nil {
			t.Fatal(err)
		}
		commit(t, d, h, "k", "one")
		<-time.After(2*time.Second + beatTime/2)
		w.mu.Lock()
		w.at, w.fault = w.requests+2, killed // in the middle of a Commit
		w.mu.Unlock()
		large := make([]byte, 300<<10)
		rand.Read(large)
		d.Put("torn", string(large))
		d.Commit()
		<-d.Lost()
		d.Close()

		second, w := e.dir(t, t.Context(), "second:9999")
		d, err = durable.Open(t.Context(), second.directory, durable.Options{Fsync: time.Second})
		if err != nil {
			t.Fatal(err)
		}
		if !h.Told.Equal(d) {
			t.Fatal("not what was told")
		}
		d.Commit()
		<-time.After(beatTime / 2)
		e.setFull(true)
		commit(t, d, h, "k", "two") // answered
		d.Commit()
		e.setFull(false)
		<-time.After(5 * time.Second)
		commit(t, d, h, "k", "three"+strings.Repeat("x", 1000))
		<-time.After(5 * time.Second)
		w.kill()
		<-d.Lost()
		d.Close()
		after, _ := e.dir(t, t.Context(), "third:9999")
		checkKept(t, h, after, "torn")
	})
}

// Ensure that a store whose lock is lost while answered data waits for room can be closed.
func TestEtcdCloseOfALostLockWhileFull(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e, h := newFakeEtcd(), storetest.NewHistory()
		dir, w := e.dir(t, t.Context(), "first:9999")
		d, err := durable.Open(t.Context(), dir.directory, durable.Options{Fsync: time.Second})
		if err != nil {
			t.Fatal(err)
		}
		commit(t, d, h, "k", "v")
		<-time.After(3*time.Second + beatTime/2)
		commit(t, d, h, "k", "w")
		e.setFull(true)
		<-time.After(5 * time.Second)
		w.setCut(true)
		<-d.Lost()
		done := make(chan error, 1)
		go func() { done <- d.Close() }()
		select {
		case err := <-done:
			t.Log(err)
		case <-time.After(time.Hour):
			t.Error("Close takes more than an hour")
			e.setFull(false)
			w.setCut(false)
		}
	})
}
