package etcd

import (
	"crypto/rand"
	"errors"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"kvserver/kvstore"
	"kvserver/kvstore/durable"
	"kvserver/kvstore/storetest"
)

// Ensure that the first Commit after a start that has found a torn end can be taken back, also one of
// several frames.
func TestEtcdTornStartTakenBack(t *testing.T) {
	for _, times := range []int{1, 3} {
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
			d, err = durable.Open(t.Context(), second.directory, durable.Options{})
			if err != nil {
				t.Fatal(err)
			}
			d.Commit()
			<-time.After(2*time.Second + beatTime/2)
			e.setFull(true)
			for range times {
				d.Put("k", strings.Repeat("x", 1100<<10))
			}
			if err := d.Commit(); !errors.Is(err, kvstore.ErrTakenBack) || !h.Told.Equal(d) {
				t.Fatalf("%d: %v", times, err)
			}
			e.setFull(false)
			<-time.After(5 * time.Second)
			h.Done = h.Told.Clone()
			commit(t, d, h, "k", "three")
			w.kill()
			<-d.Lost()
			d.Close()
			after, _ := e.dir(t, t.Context(), "third:9999")
			checkKept(t, h, after, "torn")
		})
	}
}

// Ensure that a stop knows that all data is to be written again while that waits for room: until then
// memory alone has it.
func TestEtcdStopKnowsOfAHealWithoutRoom(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e, h := newFakeEtcd(), storetest.NewHistory()
		d, w := e.open(t)
		commit(t, d, h, "k", "v")
		<-time.After(2*time.Second + beatTime/2)
		commit(t, d, h, "k", "v")
		e.delete("kv/d/")
		w.dir.directory.lock.Verify()
		full := w.count() + 8
		w.mu.Lock()
		w.before = func(number int) {
			if number == full {
				e.setFull(true)
				time.AfterFunc(time.Minute, func() { e.setFull(false) })
			}
		}
		w.mu.Unlock()
		go d.Commit()
		heals, looks := 0, 0
		for range 30 {
			<-time.After(time.Second + 10*time.Millisecond)
			looks++
			if d.IsHealing() {
				heals++
			}
		}
		t.Log(w.count() >= full, heals, looks)
		if heals < looks {
			t.Errorf("at %d of %d looks a stop would not wait, and lose all", looks-heals, looks)
		}
		<-time.After(time.Minute)
		d.Close()
	})
}
