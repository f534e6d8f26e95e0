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

// isLargePut reports whether a transaction puts a large piece.
func isLargePut(t transaction) bool {
	n := len(t.Success)
	return n > 0 && t.Success[n-1].Put != nil && len(t.Success[n-1].Put.Value) > 1000
}

// Ensure that what was answered is in etcd all the time, also if a large request that joins pieces took
// too long, and arrives behind a smaller one that was sent in its place, and then etcd is full: whatever
// request of what follows is the last one before the server is killed.
func TestEtcdLateJoinBehindASmallerPiece(t *testing.T) {
	for dies := range 12 {
		synctest.Test(t, func(t *testing.T) {
			e, h := newFakeEtcd(), storetest.NewHistory()
			dir, w := e.dir(t, t.Context(), "first:9999")
			s := &spy{etcdWire: w}
			dir.client.http.Transport = s
			d, err := durable.Open(t.Context(), dir.directory, durable.Options{})
			if err != nil {
				t.Fatal(err)
			}
			for i := range 12 {
				commit(t, d, h, "k", string(mustRandom(2600+i)))
			}
			<-time.After(2*time.Second + beatTime/2)
			first, large, isKilled := len(s.all), 0, false
			w.mu.Lock()
			w.at, w.fault = w.requests+1, lostRequest // it is slow, and arrives later
			at := 0
			w.before = func(number int) {
				s.mu.Lock()
				late, last := s.all[first], s.all[len(s.all)-1]
				s.mu.Unlock()
				if isLargePut(last) {
					large++
				}
				e.mu.Lock()
				defer e.mu.Unlock()
				if large == 3 && at == 0 { // the second smaller piece
					at = number
					answer, err := e.txn(late)
					if !answer.Succeeded || err != nil {
						t.Errorf("it is not applied: %v", err)
					}
					e.full = true
					time.AfterFunc(20*time.Second, func() { e.setFull(false) })
				}
				if at > 0 && dies > 0 && number == at+dies {
					w.dead, isKilled = true, true
				}
			}
			w.mu.Unlock()
			value := string(mustRandom(62 << 10))
			h.Done.Put("k", value)
			d.Put("k", value)
			err = d.Commit()
			t.Logf("dies %d, killed %v: %v", dies, isKilled, err)
			if errors.Is(err, kvstore.ErrTakenBack) {
				h.Done = h.Told.Clone()
			} else if err == nil {
				h.Told = h.Done.Clone()
			}
			<-time.After(25 * time.Second)
			w.kill()
			<-d.Lost()
			d.Close()
			e.setFull(false)
			after, _ := e.dir(t, t.Context(), "second:9999")
			again, err := durable.Open(t.Context(), after, durable.Options{})
			if err != nil {
				t.Errorf("dies %d: %v", dies, err)
				return
			}
			if !h.Told.Equal(again) && !h.Done.Equal(again) {
				t.Errorf("dies %d: there are %d values, and 12 were answered", dies, again.Count("k"))
			}
			again.Close()
		})
	}
}
