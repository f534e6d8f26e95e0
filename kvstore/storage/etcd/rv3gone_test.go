package etcd

import (
	"testing"
	"testing/synctest"
	"time"

	"kvserver/kvstore/storetest"
)

// while a heal waits for the answer to a request, attend checks, and cannot begin its steps for lack of room.
func TestRv3HealSteps(t *testing.T) {
	bad := 0
	for n := 1; n < 40; n++ {
		for k := range 8 {
			synctest.Test(t, func(t *testing.T) {
				e, h := newFakeEtcd(), storetest.NewHistory()
				d, w := e.open(t)
				commit(t, d, h, "k", "v")
				<-time.After(2*time.Second + beatTime/2)
				e.delete("kv/d/")
				w.mu.Lock()
				w.slow = 60 * time.Millisecond
				full := w.requests + n
				w.before = func(number int) {
					if number == full {
						go w.dir.check() // as attend does, once a second
					}
					if number == full+k {
						e.setFull(true)
						time.AfterFunc(50*time.Millisecond, func() { e.setFull(false) })
					}
				}
				w.mu.Unlock()
				d.Put("k", "w")
				h.Done.Put("k", "w")
				var err error
				for range 3 {
					if err = d.Commit(); err != nil {
						break
					}
					<-time.After(time.Second)
				}
				w.kill()
				<-d.Lost()
				d.Close()
				<-time.After(5 * time.Second)
				e.setFull(false)
				if err != nil {
					bad++
					t.Logf("%d+%d: Commit: %v; STORE there: %t", n, k, err, e.kvs["kv/n/STORE"].Key != nil)
				}
			})
		}
	}
	if bad > 0 {
		t.Errorf("%d servers ended", bad)
	}
}
