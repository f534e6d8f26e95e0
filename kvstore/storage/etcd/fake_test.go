package etcd

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"os"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"kvserver/kvstore/durable"
	"kvserver/kvstore/storage"
	"kvserver/kvstore/storetest"
)

// TestMain makes the garbage collector run less often: each of thousands of stores begins with a
// slab.
func TestMain(m *testing.M) {
	debug.SetGCPercent(400)
	os.Exit(m.Run())
}

// fakeEtcd is a cluster in memory. It is as unkind as a real one, and so is its network, an
// etcdWire.
type fakeEtcd struct {
	mu       sync.Mutex
	kvs      map[string]keyValue
	keys     []string // of kvs, in order
	revision int64
	id       string               // of the cluster
	full     bool                 // it is out of space, and refuses every put
	most     int                  // bytes of a request, at most
	quota    int64                // bytes of the database, beyond which it becomes full; 0: none
	is36     bool                 // the quota is in the status, and the metrics are elsewhere
	inUse    int64                // bytes of the database beside kvs
	past     int64                // bytes of what was replaced or removed since the last compaction
	size     int64                // bytes of the database's file, which never shrinks
	forgot   int64                // the revision of the last compaction
	down     string               // the member that refuses connections; "*": all do; "": none does
	stranger bool                 // some other server answers in its place
	other    map[string]*fakeEtcd // members that belong to another cluster
	token    string               // that requests must have; "": none
	logins   int
	late     []transaction // transactions that will arrive once more
}

// etcdWire is the connection of one process to a fakeEtcd.
type etcdWire struct {
	*fakeEtcd
	dir      *smallDir // of the process
	requests int
	waiting  int              // requests that wait in vain for an answer
	sent     []transaction    // those that have arrived
	before   func(n int)      // is called before each request while the process lives; nil: nothing
	at       int              // the number of the request that fault happens to; 0: none
	fault    etcdFault        // what happens to it
	lateBy   int              // requests behind at, with which a late one arrives; 0: with every third
	draw     func() etcdFault // draws what happens to each request; nil: nothing
	dead     bool             // the process was killed
	cut      bool             // no request arrives, and no answer does
	slow     time.Duration    // how long each answer takes
	rate     int              // bytes a second of the link; 0: it takes no time
}

// etcdFault is what happens to one request, or from that request on.
type etcdFault string

const (
	lostRequest etcdFault = "the request is lost"
	delayed     etcdFault = "the request arrives after its sender has given it up"
	lostAnswer  etcdFault = "the answer is lost"
	doneTwice   etcdFault = "the request comes once more, later"
	noLeader    etcdFault = "there is no leader"
	expired     etcdFault = "the token has expired"
	noSpace     etcdFault = "the cluster is full for 20 s"
	fills       etcdFault = "the request fills the cluster for 20 s, and is refused and done"
	killed      etcdFault = "the process is killed before it"
	killedAfter etcdFault = "the process is killed after it"
	cutOff      etcdFault = "the process is cut off from then on"
	doubtful    etcdFault = "the answer is lost, and its repetition is refused by all members"
	tooLate     etcdFault = "the answer comes when nobody waits for it any more"
	slowAnswer  etcdFault = "the answer comes just before its sender would give up"
)

func newFakeEtcd() *fakeEtcd {
	return &fakeEtcd{kvs: map[string]keyValue{}, id: "1", revision: 1, most: 3 << 19,
		other: map[string]*fakeEtcd{}}
}

// RoundTrip is the method of http.RoundTripper.
func (w *etcdWire) RoundTrip(r *http.Request) (*http.Response, error) {
	var text []byte
	if r.Body != nil {
		text, _ = io.ReadAll(r.Body)
	}

	if !strings.Contains(r.URL.Path, "/kv/") && !strings.Contains(r.URL.Path, "/auth/") {
		return w.ask(r)
	}

	if err := w.carry(r, len(text)); err != nil {
		return nil, err
	}

	w.mu.Lock()
	w.requests++
	fault := etcdFault("")
	if w.requests == w.at {
		fault = w.fault
	}
	if w.draw != nil {
		fault = w.draw()
	}

	// These faults begin with the request, whatever becomes of it.
	switch fault {
	case noSpace:
		w.fillFor(20 * time.Second)
	case killed:
		w.dead = true
	case cutOff:
		w.cut = true
	case expired:
		w.fakeEtcd.token = fmt.Sprint("token ", w.requests)
	}

	// before may call methods that lock mu. A request of a killed process arrives nowhere.
	if number := w.requests; w.before != nil && !w.dead {
		w.mu.Unlock()
		w.before(number)
		w.mu.Lock()
	}

	if w.isDown(r.URL.Host) {
		defer w.mu.Unlock()
		if w.stranger {
			return &http.Response{Status: "404 Not Found", StatusCode: 404, Body: http.NoBody}, nil
		}
		return nil, syscall.ECONNREFUSED
	}

	// The sender of a delayed request never learns of it, and it arrives behind a later one.
	if fault == delayed {
		var t transaction
		json.Unmarshal(text, &t)
		w.late = append(w.late, t)
	}
	if w.dead || w.cut || fault == lostRequest || fault == delayed {
		w.waiting++
		w.mu.Unlock()
		<-r.Context().Done()
		w.mu.Lock()
		defer w.mu.Unlock()
		w.waiting--
		return nil, r.Context().Err()
	}

	defer w.mu.Unlock()
	var answer response
	var err error
	if fault == noLeader {
		err = &refusal{"etcdserver: no leader", 14}
	} else if w.fault == doubtful && (w.requests == w.at+1 || w.requests == w.at+2) {
		err = &refusal{"etcdserver: not now", 12}
	} else {
		var t transaction
		json.Unmarshal(text, &t)
		w.sent = append(w.sent, t)
		e := w.fakeEtcd
		if other := w.other[r.URL.Host]; other != nil {
			e = other
		}
		if answer, err = e.do(r, text, t); fault == doneTwice {
			w.late = append(w.late, t)
		}
		if fault == fills && err == nil && t.puts() {
			err = errNoSpace
			w.fillFor(20 * time.Second)
		}
		answer.Header.Cluster, answer.Header.Revision = e.id, e.revision
	}

	isDue := w.requests%3 == 0
	if w.lateBy > 0 {
		isDue = w.requests == w.at+w.lateBy
	}
	if isDue && len(w.late) > 0 { // the network has delayed it
		w.txn(w.late[0])
		w.late = w.late[1:]
	}

	// The request was done, whatever its sender learns.
	switch fault {
	case tooLate:
		w.mu.Unlock()
		<-r.Context().Done()
		w.mu.Lock()
		return nil, r.Context().Err()
	case slowAnswer:
		w.mu.Unlock()
		err := wait(r.Context(), requestTime-pauseTime)
		w.mu.Lock()
		if err != nil {
			return nil, err
		}
	case killedAfter:
		w.dead = true
		fallthrough
	case lostAnswer, doubtful:
		return nil, io.ErrUnexpectedEOF
	}

	return reply(answer, err), nil
}

// reply makes an HTTP response of an answer or an error.
func reply(answer response, err error) *http.Response {
	recorder := httptest.NewRecorder()
	if err != nil {
		recorder.WriteHeader(http.StatusServiceUnavailable)
		json.NewEncoder(recorder).Encode(err)
	} else {
		json.NewEncoder(recorder).Encode(answer)
	}
	return recorder.Result()
}

// carry takes as long as the link takes for a request of that many bytes.
func (w *etcdWire) carry(r *http.Request, size int) error {
	w.mu.Lock()
	long := w.slow
	if w.rate > 0 {
		long += time.Duration(size) * time.Second / time.Duration(w.rate)
	}
	w.mu.Unlock()

	if long == 0 {
		return nil
	}
	return wait(r.Context(), long)
}

// ask answers a request for a member's status or metrics.
func (w *etcdWire) ask(r *http.Request) (*http.Response, error) {
	w.mu.Lock()
	isGone, isDown, e := w.dead || w.cut, w.isDown(r.URL.Host), w.fakeEtcd
	if other := w.other[r.URL.Host]; other != nil {
		e = other
	}
	answer := response{Leader: "b:1", InUse: e.measure(), Size: e.size}
	answer.Header.Cluster, answer.Header.Member = e.id, r.URL.Host
	quota, is36 := e.quota, e.is36
	w.mu.Unlock()
	if is36 {
		answer.Quota = quota
	}

	switch {
	case isDown:
		return nil, syscall.ECONNREFUSED
	case isGone:
		<-r.Context().Done()
		return nil, r.Context().Err()
	case strings.HasSuffix(r.URL.Path, "/metrics") && is36:
		return &http.Response{StatusCode: http.StatusNotFound, Body: http.NoBody}, nil
	case strings.HasSuffix(r.URL.Path, "/metrics"):
		recorder := httptest.NewRecorder()
		fmt.Fprintf(recorder, "# HELP etcd_server_quota_backend_bytes The quota.\n"+
			"etcd_server_quota_backend_bytes %e\nprocess_open_fds 1\n", float64(quota))
		return recorder.Result(), nil
	}
	return reply(answer, nil), nil
}

// do answers a request. The caller has mu.
func (e *fakeEtcd) do(r *http.Request, text []byte, t transaction) (a response, err error) {
	if len(text) > e.most {
		return a, &refusal{"etcdserver: request is too large", 3}
	}

	if strings.HasSuffix(r.URL.Path, "/auth/authenticate") {
		if !bytes.Contains(text, []byte(`"secret"`)) {
			return a, &refusal{"etcdserver: authentication failed, invalid user ID or password",
				3}
		}
		e.logins++
		return response{Token: e.token}, nil
	}

	if r.Header.Get("Authorization") != e.token {
		return a, &refusal{"etcdserver: invalid auth token", 16}
	}

	if strings.HasSuffix(r.URL.Path, "/kv/compaction") {
		e.forgot, e.past = e.revision, 0
		return a, nil
	}
	if strings.HasSuffix(r.URL.Path, "/kv/range") {
		var q keyRange
		json.Unmarshal(text, &q)
		a.found = e.find(q)
		return a, nil
	}
	return e.txn(t)
}

// find returns the result of a range. The caller has mu.
func (e *fakeEtcd) find(q keyRange) (f found) {
	end := string(q.End)
	if q.End == nil {
		end = string(q.Key) + "\x00"
	}

	first, _ := slices.BinarySearch(e.keys, string(q.Key))
	last, _ := slices.BinarySearch(e.keys, end)

	if f.Count = int64(last - first); q.CountOnly {
		return f
	}
	if q.Limit > 0 {
		last = min(last, first+q.Limit)
	}

	for _, key := range e.keys[first:last] {
		kv := e.kvs[key]
		if q.KeysOnly {
			kv.Value = nil
		}
		f.KVs = append(f.KVs, kv)
	}
	return f
}

// list is find for a caller that does not have mu.
func (e *fakeEtcd) list(q keyRange) found {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.find(q)
}

// measure returns how many bytes of the database are in use, and lets its file grow to that. The
// caller has mu.
func (e *fakeEtcd) measure() (inUse int64) {
	inUse = e.inUse + e.past
	for key, kv := range e.kvs {
		inUse += int64(len(key) + len(kv.Value))
	}
	e.size = max(e.size, inUse)
	return inUse
}

// set puts a value. The caller has mu.
func (e *fakeEtcd) set(key string, value []byte) {
	if i, isThere := slices.BinarySearch(e.keys, key); !isThere {
		e.keys = slices.Insert(e.keys, i, key)
	}
	e.past += int64(len(e.kvs[key].Value))
	e.kvs[key] = keyValue{[]byte(key), value, e.revision}
}

// put puts a key as another program does.
func (e *fakeEtcd) put(key, value string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.revision++
	e.set(key, []byte(value))
}

// write makes n revisions, as others do that use the cluster.
func (e *fakeEtcd) write(n int) {
	for range n {
		e.put("other", "")
	}
}

// remove removes the keys of a range, and reports whether there were any. The caller has mu.
func (e *fakeEtcd) remove(q keyRange) bool {
	kvs := e.find(q).KVs
	if len(kvs) == 0 {
		return false
	}
	for _, kv := range kvs {
		e.past += int64(len(kv.Key) + len(kv.Value))
		delete(e.kvs, string(kv.Key))
	}

	first, _ := slices.BinarySearch(e.keys, string(kvs[0].Key))
	e.keys = slices.Delete(e.keys, first, first+len(kvs))
	return true
}

// delete removes the keys that begin with prefix.
func (e *fakeEtcd) delete(prefix string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.remove(keyRange{Key: []byte(prefix), End: below([]byte(prefix))}) {
		e.revision++
	}
}

// errNoSpace is how a full cluster refuses a put.
var errNoSpace = &refusal{"etcdserver: mvcc: database space exceeded", 8}

// puts reports whether a transaction may put a key, as etcd sees it.
func (t transaction) puts() bool {
	isPut := func(op operation) bool { return op.Put != nil }
	return slices.ContainsFunc(t.Success, isPut) || slices.ContainsFunc(t.Failure, isPut)
}

// cost is how many bytes a transaction may put.
func (t transaction) cost() (bytes int64) {
	for _, op := range t.Success {
		if op.Put != nil {
			bytes += int64(len(op.Put.Key) + len(op.Put.Value))
		}
	}
	return bytes
}

// txn applies a transaction. The caller has mu.
func (e *fakeEtcd) txn(t transaction) (a response, err error) {
	a.Succeeded = true
	for _, c := range t.Compare {
		kv := e.kvs[string(c.Key)]
		a.Succeeded = a.Succeeded && (c.Target == "VALUE" && kv.Key != nil &&
			bytes.Equal(kv.Value, c.Value) || c.Target == "MOD" && (c.Result == "GREATER" &&
			kv.Revision > c.Revision || c.Result == "" && kv.Revision == c.Revision))
	}

	if e.quota > 0 && t.puts() {
		e.measure()
		e.full = e.full || e.size+t.cost() >= e.quota
	}
	if e.full && t.puts() {
		return response{}, errNoSpace
	}

	ops := t.Failure
	if a.Succeeded {
		ops = t.Success
	}

	// A transaction that only reads makes no revision.
	if slices.ContainsFunc(ops, func(op operation) bool { return op.Range == nil }) {
		e.revision++
	}

	touched := map[string]bool{}
	for _, op := range ops {
		one := struct {
			Range found `json:"response_range"`
		}{}

		switch {
		case op.Put != nil && (touched[string(op.Put.Key)] || len(ops) > 128):
			return response{}, &refusal{"etcdserver: duplicate key given in txn request", 3}
		case op.Put != nil:
			touched[string(op.Put.Key)] = true
			e.set(string(op.Put.Key), op.Put.Value)
		case op.Delete != nil:
			for _, kv := range e.find(*op.Delete).KVs {
				touched[string(kv.Key)] = true
			}
			e.remove(*op.Delete)
		default:
			one.Range = e.find(*op.Range)
		}

		a.Responses = append(a.Responses, one)
	}
	return a, nil
}

// isDown reports whether a member refuses connections. The caller has mu.
func (e *fakeEtcd) isDown(member string) bool { return e.down == member || e.down == "*" }

// setDown sets which member refuses connections.
func (e *fakeEtcd) setDown(member string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.down = member
}

// setFull sets whether the cluster refuses every put.
func (e *fakeEtcd) setFull(isFull bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.full = isFull
}

// fillFor makes the cluster refuse every put for that long. The caller has mu.
func (e *fakeEtcd) fillFor(long time.Duration) {
	e.full = true
	time.AfterFunc(long, func() { e.setFull(false) })
}

// copy returns a snapshot of the cluster.
func (e *fakeEtcd) copy() *fakeEtcd {
	e.mu.Lock()
	defer e.mu.Unlock()
	return &fakeEtcd{kvs: maps.Clone(e.kvs), keys: slices.Clone(e.keys), revision: e.revision}
}

// restore makes the cluster what it was in a snapshot, with id as the cluster's id.
func (e *fakeEtcd) restore(snapshot *fakeEtcd, id string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.kvs, e.keys = maps.Clone(snapshot.kvs), slices.Clone(snapshot.keys)
	e.revision, e.id = snapshot.revision, id
}

// dir opens the directory as a new process does. A process with an addr waits for the lock.
func (e *fakeEtcd) dir(t testing.TB, ctx context.Context, addr string) (*smallDir, *etcdWire) {
	t.Helper()
	opened, err := Open(ctx, "etcd://a:1,b:1/kv", Options{Addr: addr})
	if err != nil {
		t.Fatal(err)
	}

	d := &smallDir{opened.(*directory)}
	if e.token != "" && d.client.user == "" {
		d.client.user, d.client.password = "root", "secret"
	}
	w := &etcdWire{fakeEtcd: e, dir: d}
	d.client.http.Transport = w
	return d, w
}

// locked opens and locks the directory as a new process does.
func (e *fakeEtcd) locked(t testing.TB) (*smallDir, *etcdWire, storage.Lock) {
	t.Helper()
	dir, w := e.dir(t, t.Context(), "")
	lock, err := dir.Lock(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return dir, w, lock
}

// smallDir is a directory whose log files are full soon.
type smallDir struct{ *directory }

func (d *smallDir) Sizes() (segment, compact int64, zeros int) { return 1500, 2000, 0 }

// open opens the store as a new process does that waits for the lock.
func (e *fakeEtcd) open(t testing.TB) (*durable.Store, *etcdWire) {
	t.Helper()
	dir, w := e.dir(t, t.Context(), "new:9999")
	d, err := durable.Open(t.Context(), dir, durable.Options{})
	if err != nil {
		t.Fatal(err)
	}
	return d, w
}

// tryOpen opens the store as a new process does that waits for the lock for that long.
func (e *fakeEtcd) tryOpen(t *testing.T, long time.Duration) (*durable.Store, error) {
	ctx, cancel := context.WithTimeout(t.Context(), long)
	defer cancel()
	dir, _ := e.dir(t, ctx, "try:9999")
	return durable.Open(ctx, dir, durable.Options{})
}

// count returns how many requests the process has sent.
func (w *etcdWire) count() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.requests
}

// isWaiting reports whether a request waits in vain for an answer.
func (w *etcdWire) isWaiting() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.waiting > 0
}

// setCut sets whether the process is cut off.
func (w *etcdWire) setCut(isCut bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.cut = isCut
}

// kill ends a process: no request of it arrives any more.
func (w *etcdWire) kill() {
	w.mu.Lock()
	w.dead = true
	w.mu.Unlock()
}

// commit puts a value and commits it, and fails the test if that fails.
func commit(t *testing.T, d *durable.Store, h *storetest.History, key, value string) {
	t.Helper()
	d.Put(key, value)
	h.Done.Put(key, value)
	if err := storetest.Commit(d); err != nil {
		t.Fatalf("Put %s: %v", key, err)
	}
	h.Told = h.Done.Clone()
}

// checkKept opens the store in dir, and fails the test unless it holds exactly what was answered,
// or exactly what was done.
func checkKept(t *testing.T, h *storetest.History, dir storage.Directory, what string) {
	t.Helper()
	d, err := durable.Open(t.Context(), dir, durable.Options{})
	if err != nil {
		t.Fatalf("%s: %v", what, err)
	}

	if !h.Told.Equal(d) && !h.Done.Equal(d) {
		t.Fatalf("%s: the store holds\n%v\nwant\n%v\nor\n%v", what, maps.Collect(d.All()), h.Told,
			h.Done)
	}

	if err := d.Close(); err != nil {
		t.Fatalf("%s: Close: %v", what, err)
	}
}

// orphans returns the keys of pieces of files without a name.
func (e *fakeEtcd) orphans() (keys []string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	named := map[string]bool{}
	for key, kv := range e.kvs {
		if strings.HasPrefix(key, "kv/n/") {
			named[string(kv.Value)] = true
		}
	}

	for key := range e.kvs {
		if id, isPiece := strings.CutPrefix(key, "kv/d/"); isPiece &&
			!named[id[:strings.IndexByte(id, '/')]] {
			keys = append(keys, key)
		}
	}
	return keys
}

// shrinking returns n bytes, of which pack makes about n/times.
func shrinking(n, times int) string {
	random := rand.NewChaCha8([32]byte{1})
	text := make([]byte, 0, n)
	for len(text) < n {
		part := make([]byte, 32*times)
		random.Read(part[:32])
		text = append(text, part...)
	}
	return string(text[:n])
}
