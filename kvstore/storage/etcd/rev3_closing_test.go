package etcd

import (
	"bytes"
	"errors"
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"kvserver/kvstore"
	"kvserver/kvstore/durable"
	"kvserver/kvstore/storetest"
)

// Ensure that a Commit is not refused while it can still arrive: another goroutine, as a compaction's, has
// found etcd full, and the request with which it closes the fence is under way.
func TestEtcdRefusedBeforeTheFenceIsClosed(t *testing.T) {
	for _, next := range []int{0, 100, 100 << 10} {
		t.Run(fmt.Sprint(next), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				e, h := newFakeEtcd(), storetest.NewHistory()
				dir, w := e.dir(t, t.Context(), "first:9999")
				s := &spy{etcdWire: w}
				dir.client.http.Transport = s
				d, err := durable.Open(t.Context(), dir.directory, durable.Options{})
				if err != nil {
					t.Fatal(err)
				}
				commit(t, d, h, "k", "v")
				<-time.After(2*time.Second + beatTime/2)
				other, err := dir.Create("snap-1.log.tmp")
				if err != nil {
					t.Fatal(err)
				}

				// The fence's request takes 0.75 s.
				first, isSlow := len(s.all), false
				w.mu.Lock()
				w.at, w.fault = w.requests+1, lostRequest // it is slow, and arrives later
				w.before = func(int) {
					s.mu.Lock()
					last := s.all[len(s.all)-1]
					s.mu.Unlock()
					if !isSlow && len(last.Success) == 1 && last.Success[0].Delete != nil &&
						bytes.Equal(last.Success[0].Delete.Key, []byte("kv/step")) {
						isSlow = true
						<-time.After(750 * time.Millisecond)
					}
				}
				w.mu.Unlock()
				go func() {
					<-time.After(1600 * time.Millisecond)
					e.setFull(true)
					other.WriteAt([]byte("snapshot"), 0)
					t.Log("the snapshot:", other.Sync())
				}()
				time.AfterFunc(2*time.Second, func() { e.setFull(false) })
				time.AfterFunc(2100*time.Millisecond, func() {
					e.mu.Lock()
					defer e.mu.Unlock()
					answer, err := e.txn(s.all[first])
					t.Log("arrives:", answer.Succeeded, err)
				})

				began := time.Now()
				value := string(mustRandom(40 << 10))
				d.Put("k", value)
				h.Done.Put("k", value)
				err = d.Commit()
				t.Log("Commit:", err, "after", time.Since(began))
				if errors.Is(err, kvstore.ErrTakenBack) {
					h.Done = h.Told.Clone()
				} else if err != nil {
					t.Fatal(err)
				}
				h.Told = h.Done.Clone()
				<-time.After(5 * time.Second)
				if next > 0 {
					commit(t, d, h, "new", string(mustRandom(next)))
				}
				<-time.After(5 * time.Second)
				w.kill()
				<-d.Lost()
				d.Close()
				after, _ := e.dir(t, t.Context(), "second:9999")
				again, err := durable.Open(t.Context(), after, durable.Options{})
				if err != nil {
					t.Errorf("%d: %v", next, err)
					return
				}
				defer again.Close()
				if !h.Told.Equal(again) {
					t.Errorf("%d: after a kill there are %d values of k, and %d of new", next,
						again.Count("k"), again.Count("new"))
				}
			})
		})
	}
}
