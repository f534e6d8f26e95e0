package etcd

import (
	"crypto/rand"
	"errors"
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"kvserver/kvstore"
	"kvserver/kvstore/durable"
	"kvserver/kvstore/storetest"
)

// Ensure that a refused Commit stays refused if a large request of it, which took too long, arrives behind
// the look whether it has arrived, and the smaller one that is sent in its place finds etcd full.
func TestEtcdSlowPieceOfARefusedCommit(t *testing.T) {
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
				random := make([]byte, 140<<10)
				rand.Read(random)
				first, isLate := len(s.all), false
				w.mu.Lock()
				w.at, w.fault = w.requests+1, lostRequest // it is slow, and arrives later
				w.before = func(number int) {
					s.mu.Lock()
					late, last := s.all[first], s.all[len(s.all)-1]
					s.mu.Unlock()
					isSecond := len(last.Success) > 0 && last.Success[len(last.Success)-1].Put != nil &&
						len(last.Success[len(last.Success)-1].Put.Value) > 1000 && len(s.all) > first+1
					if !isLate && isSecond {
						isLate = true
						e.mu.Lock()
						answer, err := e.txn(late) // it reaches the quota
						t.Log("applied:", answer.Succeeded, err, string(late.Success[0].Put.Key))
						e.full = true
						e.mu.Unlock()
					}
				}
				w.mu.Unlock()
				d.Put("k", string(random[:40<<10]))
				err = d.Commit()
				if err == nil { // it is in etcd as a whole
					h.Done.Put("k", string(random[:40<<10]))
					h.Told = h.Done.Clone()
				} else if !errors.Is(err, kvstore.ErrTakenBack) || !h.Told.Equal(d) {
					t.Fatal(err)
				}
				<-time.After(3 * time.Second)
				e.setFull(false)
				<-time.After(3 * time.Second)
				h.Done = h.Told.Clone()
				if next > 0 {
					commit(t, d, h, "new", string(random[:next]))
				}
				w.kill()
				<-d.Lost()
				d.Close()
				after, _ := e.dir(t, t.Context(), "second:9999")
				func() {
					d, err := durable.Open(t.Context(), after, durable.Options{})
					if err != nil {
						t.Errorf("%d: %v", next, err)
						return
					}
					defer d.Close()
					if !h.Told.Equal(d) {
						what := ""
						for key, list := range d.All() {
							what += fmt.Sprint(" ", key, ": ", len(list))
						}
						t.Errorf("%d: after a kill there is%s", next, what)
					}
				}()
			})
		})
	}
}
