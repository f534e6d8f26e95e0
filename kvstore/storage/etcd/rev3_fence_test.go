package etcd

import (
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"kvserver/kvstore"
	"kvserver/kvstore/durable"
	"kvserver/kvstore/storetest"
)

// Ensure that nothing counts as gone if the request that closes the fence is slow, and meanwhile there is
// room again, and check opens the fence.
func TestEtcdFenceIsClosedLate(t *testing.T) {
	for _, fault := range []etcdFault{lostRequest, ""} {
		synctest.Test(t, func(t *testing.T) {
			e, h := newFakeEtcd(), storetest.NewHistory()
			dir, w := e.dir(t, t.Context(), "first:9999")
			d, err := durable.Open(t.Context(), dir.directory, durable.Options{})
			if err != nil {
				t.Fatal(err)
			}
			commit(t, d, h, "k", "v")
			<-time.After(2*time.Second + beatTime/2)
			e.setFull(true)
			time.AfterFunc(100*time.Millisecond, func() { e.setFull(false) })
			w.mu.Lock()
			w.at, w.fault = w.requests+3, fault // the fence's; both members have refused the put
			w.mu.Unlock()
			d.Put("k", "refused")
			if err := d.Commit(); !errors.Is(err, kvstore.ErrTakenBack) || !h.Told.Equal(d) {
				t.Errorf("%q: Commit: %v", fault, err)
			}
			h.Done = h.Told.Clone()
			<-time.After(3 * time.Second)
			commit(t, d, h, "k", "w")
			<-time.After(3 * time.Second)
			commit(t, d, h, "k", "x")
			if n := dir.lock.missed.Load(); n > 0 {
				t.Errorf("%q: something counts as gone, %d times", fault, n)
			}
			d.Close()
		})
	}
}
