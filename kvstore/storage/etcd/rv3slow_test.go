package etcd

import (
	"testing"
	"testing/synctest"
	"time"

	"kvserver/kvstore/storetest"
)

func TestRv3SlowVouch(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e, h := newFakeEtcd(), storetest.NewHistory()
		d, w := e.open(t)
		<-time.After(beatTime / 2)
		commit(t, d, h, "k", "v")
		<-time.After(900 * time.Millisecond)
		w.mu.Lock()
		w.slow = 1500 * time.Millisecond
		w.mu.Unlock()
		<-time.After(200 * time.Millisecond) // the timer's frame is under way
		for range 3 {
			began := time.Now()
			if err := d.Commit(); err != nil {
				t.Fatal(err)
			}
			t.Log("a read took", time.Since(began))
			<-time.After(100 * time.Millisecond)
		}
		w.mu.Lock()
		w.slow = 0
		w.mu.Unlock()
		d.Close()
	})
}
