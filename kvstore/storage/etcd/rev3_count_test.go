package etcd

import (
	"bytes"
	"errors"
	"io"
	"net/http"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"kvserver/kvstore"
	"kvserver/kvstore/durable"
	"kvserver/kvstore/storetest"
)

// noCount is a spy of whose requests for a number of keys the first one gets no answer.
type noCount struct {
	*spy
	lost chan bool // receives once that request is given up
	done bool
}

func (s *noCount) RoundTrip(r *http.Request) (*http.Response, error) {
	if r.Body != nil && strings.HasSuffix(r.URL.Path, "/kv/range") {
		text, _ := io.ReadAll(r.Body)
		if isCount := bytes.Contains(text, []byte("count_only")); isCount && !s.done {
			<-r.Context().Done()
			s.done = true
			close(s.lost)
			return nil, r.Context().Err()
		}
		r.Body = io.NopCloser(bytes.NewReader(text))
	}
	return s.spy.RoundTrip(r)
}

// Ensure that nothing counts as gone, so that reads go on, if a piece has arrived late, check could not
// count the pieces, and then a Commit is taken back.
func TestEtcdTakenBackWhilePiecesAreNotCounted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e, h := newFakeEtcd(), storetest.NewHistory()
		dir, w := e.dir(t, t.Context(), "first:9999")
		s := &noCount{spy: &spy{etcdWire: w}, lost: make(chan bool)}
		dir.client.http.Transport = s
		d, err := durable.Open(t.Context(), dir.directory, durable.Options{})
		if err != nil {
			t.Fatal(err)
		}
		commit(t, d, h, "k", "v")
		<-time.After(2*time.Second + beatTime/2)
		w.mu.Lock()
		w.at, w.fault = w.requests+1, lostRequest
		w.mu.Unlock()
		first := len(s.all)
		random := string(mustRandom(300 << 10))
		commit(t, d, h, "k", random[:40<<10])
		s.mu.Lock()
		late := s.all[first]
		s.mu.Unlock()
		e.mu.Lock()
		if answer, err := e.txn(late); !answer.Succeeded || err != nil {
			t.Error("it does not arrive")
		}
		e.mu.Unlock()

		<-s.lost
		<-time.After(beatTime / 4)
		full := w.count() + 3
		w.mu.Lock()
		w.before = func(number int) {
			if number == full {
				e.setFull(true)
				time.AfterFunc(time.Minute, func() { e.setFull(false) })
			}
		}
		w.mu.Unlock()
		d.Put("k", random)
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
		if n := dir.lock.missed.Load(); n > 0 {
			t.Errorf("something counts as gone, %d times", n)
		}
		d.Close()
	})
}
