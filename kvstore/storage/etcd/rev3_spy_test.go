package etcd

import (
	"bytes"
	"crypto/rand"
	"encoding/json"
	"io"
	"net/http"
	"strings"
	"sync"
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

// mustRandom returns n bytes that do not shrink when they are packed.
func mustRandom(n int) []byte {
	b := make([]byte, n)
	rand.Read(b)
	return b
}
