package etcd

import (
	"bytes"
	"crypto/rand"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"kvserver/kvstore"
	"kvserver/kvstore/durable"
	"kvserver/kvstore/storetest"
)

// spy is a wire that keeps what is sent, also what is lost.
type spy struct {
	*etcdWire
	mu  sync.Mutex
	all []transaction
}

func (s *spy) RoundTrip(r *http.Request) (*http.Response, error) {
	if r.Body != nil && strings.HasSuffix(r.URL.Path, "/kv/txn") {
		text, _ := io.ReadAll(r.Body)
		var t transaction
		json.Unmarshal(text, &t)
		s.mu.Lock()
		s.all = append(s.all, t)
		s.mu.Unlock()
		r.Body = io.NopCloser(bytes.NewReader(text))
	}
	return s.etcdWire.RoundTrip(r)
}

// Ensure that nothing counts as gone, so that reads go on, if a Commit is taken back after a large piece
// of an earlier one has arrived late, behind the smaller ones that were sent in its place.
func TestEtcdTakenBackAfterALatePiece(t *testing.T) {
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
		random := make([]byte, 300<<10)
		rand.Read(random)
		w.mu.Lock()
		w.at, w.fault = w.requests+1, lostRequest
		w.mu.Unlock()
		first := len(s.all)
		commit(t, d, h, "k", string(random[:40<<10]))
		late := s.all[first]
		e.mu.Lock()
		before := len(e.keys)
		answer, err := e.txn(late)
		t.Log("the late piece is applied:", answer.Succeeded, err, len(e.keys)-before)
		e.mu.Unlock()
		<-time.After(3 * time.Second)
		commit(t, d, h, "k", "w")
		<-time.After(2*time.Second + beatTime/2)

		full := w.count() + 3
		w.mu.Lock()
		w.before = func(number int) {
			if number == full {
				e.setFull(true)
				time.AfterFunc(time.Minute, func() { e.setFull(false) })
			}
		}
		w.mu.Unlock()
		d.Put("k", string(random))
		if err := d.Commit(); !errors.Is(err, kvstore.ErrTakenBack) || !h.Told.Equal(d) {
			t.Fatal(err)
		}
		for range 5 {
			<-time.After(time.Second)
			began := time.Now()
			if err := d.Commit(); err != nil || time.Since(began) > time.Second {
				t.Errorf("a read takes %v: %v", time.Since(began), err)
			}
		}
		if e.list(keyRange{Key: []byte("kv/n/seg-2.log")}).KVs != nil {
			t.Error("something counts as gone")
		}
		d.Close()
	})
}
