package etcd

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"kvserver/kvstore/durable"
	"kvserver/kvstore/storage"
	"kvserver/kvstore/storetest"
	"log/slog"
	"maps"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
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
	id       string // of the cluster
	full     bool   // it is out of space, and refuses every put
	most     int    // bytes of a request, at most
	quota    int64
	inUse    int64                // bytes of the database beside kvs
	forgot   int64                // the revision of the last compaction
	down     string               // the member that does not answer; "": all do
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
	sent     []transaction    // those that have arrived
	before   func(n int)      // is called before each request; nil: nothing
	at       int              // the number of the request that fault happens to; 0: none
	fault    etcdFault        // what happens to it
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
	lostAnswer  etcdFault = "the answer is lost"
	doneTwice   etcdFault = "the request comes once more, later"
	noLeader    etcdFault = "there is no leader"
	expired     etcdFault = "the token has expired"
	noSpace     etcdFault = "the cluster is full for 20 s"
	killed      etcdFault = "the process is killed before it"
	killedAfter etcdFault = "the process is killed after it"
	cutOff      etcdFault = "the process is cut off from then on"
	doubtful    etcdFault = "the answer is lost, and its repetition is refused by all members"
	tooLate     etcdFault = "the answer comes when nobody waits for it any more"
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
	switch fault {
	case noSpace:
		w.full = true
		time.AfterFunc(20*time.Second, func() { w.setFull(false) })
	case killed:
		w.dead = true
	case cutOff:
		w.cut = true
	case expired:
		w.fakeEtcd.token = fmt.Sprint("token ", w.requests)
	}
	if number := w.requests; w.before != nil {
		w.mu.Unlock()
		w.before(number)
		w.mu.Lock()
	}
	if w.down == r.URL.Host {
		defer w.mu.Unlock()
		if w.stranger {
			return &http.Response{Status: "404 Not Found", StatusCode: 404, Body: http.NoBody}, nil
		}
		return nil, syscall.ECONNREFUSED
	}
	if w.dead || w.cut || fault == lostRequest {
		w.mu.Unlock()
		<-r.Context().Done()
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
		answer.Header.Cluster, answer.Header.Revision = e.id, e.revision
	}
	if w.requests%3 == 0 && len(w.late) > 0 { // the network has delayed it
		w.txn(w.late[0])
		w.late = w.late[1:]
	}
	switch fault {
	case tooLate:
		w.mu.Unlock()
		<-r.Context().Done()
		w.mu.Lock()
		return nil, r.Context().Err()
	case killedAfter:
		w.dead = true
		fallthrough
	case lostAnswer, doubtful:
		return nil, io.ErrUnexpectedEOF
	}
	return reply(answer, err), nil
}

// setFull sets whether the cluster refuses every put.
func (e *fakeEtcd) setFull(isFull bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.full = isFull
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
	isGone, isDown, e := w.dead || w.cut, w.down == r.URL.Host, w.fakeEtcd
	if other := w.other[r.URL.Host]; other != nil {
		e = other
	}
	answer := response{Leader: "b:1", Size: e.inUse, InUse: e.inUse}
	answer.Header.Cluster, answer.Header.Member = e.id, r.URL.Host
	for key, kv := range e.kvs {
		answer.Size += int64(len(key) + len(kv.Value))
		answer.InUse = answer.Size
	}
	quota := e.quota
	w.mu.Unlock()
	switch {
	case isDown:
		return nil, syscall.ECONNREFUSED
	case isGone:
		<-r.Context().Done()
		return nil, r.Context().Err()
	case strings.HasSuffix(r.URL.Path, "/metrics"):
		recorder := httptest.NewRecorder()
		fmt.Fprintf(recorder, "# HELP etcd_server_quota_backend_bytes The quota.\n"+
			"etcd_server_quota_backend_bytes %e\n", float64(quota))
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
		e.forgot = e.revision
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

// set puts a value. The caller has mu.
func (e *fakeEtcd) set(key string, value []byte) {
	if i, isThere := slices.BinarySearch(e.keys, key); !isThere {
		e.keys = slices.Insert(e.keys, i, key)
	}
	e.kvs[key] = keyValue{[]byte(key), value, e.revision}
}

// remove removes the keys of a range, and reports whether there were any. The caller has mu.
func (e *fakeEtcd) remove(q keyRange) bool {
	kvs := e.find(q).KVs
	if len(kvs) == 0 {
		return false
	}
	for _, kv := range kvs {
		delete(e.kvs, string(kv.Key))
	}
	first, _ := slices.BinarySearch(e.keys, string(kvs[0].Key))
	e.keys = slices.Delete(e.keys, first, first+len(kvs))
	return true
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
	isPut := func(op operation) bool { return op.Put != nil }
	if e.full && (slices.ContainsFunc(t.Success, isPut) || slices.ContainsFunc(t.Failure, isPut)) {
		return response{}, &refusal{"etcdserver: mvcc: database space exceeded", 8}
	}
	ops := t.Failure
	if a.Succeeded {
		ops = t.Success
	}
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

func (d *smallDir) Sizes() (segment, compact int64, reserve int) { return 1500, 2000, 0 }

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

// count returns how many requests the process has sent.
func (w *etcdWire) count() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.requests
}

// kill ends a process: no request of it arrives any more.
func (w *etcdWire) kill() {
	w.mu.Lock()
	w.dead = true
	w.mu.Unlock()
}

// ---- files

// Ensure that a file in etcd has what was written to it, and ends where it was cut, or where bytes
// before its end were replaced.
func TestEtcdFile(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newFakeEtcd()
		dir, _, lock := e.locked(t)
		defer lock.Close()
		random := rand.New(rand.NewPCG(1, 1))
		for round := range 30 {
			f, err := dir.Create("file")
			if err != nil {
				t.Fatal(err)
			}
			var want []byte
			for range 40 {
				at := len(want)
				if random.IntN(3) == 0 {
					at = random.IntN(len(want) + 1)
				}
				switch size := random.IntN(1 << random.IntN(18)); random.IntN(8) {
				case 0:
					f.Truncate(int64(at))
					want = want[:at]
				case 1:
					f.Sync()
				case 2:
					got := make([]byte, size)
					n, err := f.ReadAt(got, int64(at))
					if rest := want[min(at, len(want)):]; n != min(size, len(rest)) ||
						!bytes.Equal(got[:n], rest[:n]) || (n < size) != (err == io.EOF) {
						t.Fatalf("round %d: at %d of %d bytes: %d of %d are read, %v", round, at,
							len(want), n, size, err)
					}
				default:
					b := bytes.Repeat([]byte{byte(random.IntN(255) + 1)}, size)
					copy(b, want[at:min(len(want), at+random.IntN(size+1))])
					if _, err := f.WriteAt(b, int64(at)); err != nil {
						t.Fatal(err)
					}
					if !bytes.HasPrefix(want[at:], b) {
						want = append(want[:at], b...)
					}
				}
			}
			f.Sync()
			again, size, err := dir.Open("file")
			if err != nil {
				t.Fatal(err)
			}
			got, err := io.ReadAll(io.NewSectionReader(again, 0, size))
			if !bytes.Equal(got, want) || size != int64(len(want)) || err != nil {
				t.Fatalf("round %d: the file has %d bytes, says %d, want %d, %v", round, len(got),
					size, len(want), err)
			}
		}
		if err := dir.Remove("file"); err != nil ||
			e.list(keyRange{Key: dir.key("d/"), End: below(dir.key("d/"))}).Count > 0 {
			t.Errorf("a removed file leaves pieces: %v", err)
		}
	})
}

// Ensure that names behave like those of a directory on a disk.
func TestEtcdNames(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir, _, lock := newFakeEtcd().locked(t)
		defer lock.Close()
		write := func(name, text string) {
			t.Helper()
			f, err := dir.Create(name)
			if err == nil {
				f.WriteAt([]byte(text), 0)
				err = f.Sync()
			}
			if err != nil {
				t.Error(err)
			}
		}
		read := func(name string) string {
			f, size, err := dir.Open(name)
			if err != nil {
				return "none"
			}
			defer f.Close()
			b := make([]byte, size)
			f.ReadAt(b, 0)
			return string(b)
		}
		write("a", "1")
		write("b", "2")
		if err := dir.Rename("a", "b"); err != nil {
			t.Error(err)
		}
		write("c", "3")
		write("c", "4")
		if list, err := dir.List(); !slices.Equal(list, []string{"b", "c"}) || err != nil {
			t.Errorf("the list is %q, %v", list, err)
		}
		for name, want := range map[string]string{"a": "none", "b": "1", "c": "4"} {
			if got := read(name); got != want {
				t.Errorf("%s holds %q, want %q", name, got, want)
			}
		}
		f, _, err := dir.Open("c")
		if err := errors.Join(err, dir.Remove("c")); err != nil {
			t.Error(err)
		}
		if _, err := f.ReadAt(make([]byte, 1), 0); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("a file that was removed reads as %v", err)
		}
		for what, err := range map[string]error{"rename": dir.Rename("x", "y"),
			"remove": dir.Remove("x")} {
			if !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("%s of nothing: %v", what, err)
			}
		}
	})
}

// write appends to a file, and fails the test if that fails.
func write(t *testing.T, f storage.File, at *int64, b []byte) {
	t.Helper()
	n, err := f.WriteAt(b, *at)
	if err := errors.Join(err, f.Sync()); err != nil {
		t.Fatal(err)
	}
	*at += int64(n)
}

// Ensure that a file may be renamed while it is written, and has all its bytes afterwards.
func TestEtcdRenameBesideWrite(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir, w, lock := newFakeEtcd().locked(t)
		f, err := dir.Create("a")
		if err != nil {
			t.Fatal(err)
		}
		w.mu.Lock()
		w.slow = 70 * time.Millisecond
		w.mu.Unlock()
		ended := make(chan struct{})
		go func() {
			defer close(ended)
			for i, at := 0, int64(0); i < 50; i++ {
				write(t, f, &at, []byte{byte(i)})
				<-time.After(10 * time.Millisecond)
			}
		}()
		for i := range 30 {
			names := []string{"a", "b", "a"}[i%2:]
			if err := dir.Rename(names[0], names[1]); err != nil {
				t.Fatal(err)
			}
		}
		<-ended
		if err := lock.Held(); err != nil || f.(*pieceFile).end() != 50 {
			t.Errorf("after renames beside writes: %v, and %d bytes", err, f.(*pieceFile).end())
		}
		lock.Close()
	})
}

// Ensure that whichever answer about a file of small writes comes too late, the file has all that
// was written, and nothing counts as gone.
func TestEtcdLateAnswers(t *testing.T) {
	t.Parallel()
	random := make([]byte, 80<<10)
	rand.NewChaCha8([32]byte{2}).Read(random)
	for n, reached := 1, true; reached; n = storetest.Next(n, 4) {
		synctest.Test(t, func(t *testing.T) {
			e := newFakeEtcd()
			dir, w := e.dir(t, t.Context(), "")
			w.at, w.fault = n, tooLate
			lock, err := dir.Lock(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			f, err := dir.Create("file")
			if err != nil {
				t.Fatal(err)
			}
			for at := int64(0); at < int64(len(random)); {
				write(t, f, &at, random[at:at+2<<10])
			}
			reached = w.count() >= n
			if err := lock.Held(); err != nil {
				t.Errorf("request %d: %v", n, err)
			}
			reader, _ := e.dir(t, t.Context(), "")
			again, size, err := reader.Open("file")
			if err != nil {
				t.Fatal(err)
			}
			got, err := io.ReadAll(io.NewSectionReader(again, 0, size))
			if !bytes.Equal(got, random) || err != nil {
				t.Errorf("request %d: %d bytes are read of %d: %v", n, len(got), len(random), err)
			}
			lock.Close()
		})
	}
}

// Ensure that a reader of a large file asks for as much at a time as etcd answers.
func TestEtcdReadAhead(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		dir, w, lock := newFakeEtcd().locked(t)
		f, err := dir.Create("file")
		if err != nil {
			t.Fatal(err)
		}
		large := make([]byte, 1<<20)
		rand.NewChaCha8([32]byte{3}).Read(large)
		const size = 6 << 20
		for at := int64(0); at < size; {
			write(t, f, &at, large)
		}
		before := w.count()
		for at := int64(0); at < size; at += int64(len(large)) {
			if n, err := f.ReadAt(large, at); n < len(large) {
				t.Fatal(err)
			}
		}
		// The first pages are smaller.
		n, most := w.count()-before, 10+int(size/pageMost)
		if n > most {
			t.Errorf("%d bytes are asked for in %d parts, want %d", size, n, most)
		}
		lock.Close()
	})
}

// Ensure that a reader counts no bytes twice while the writer joins pieces.
func TestEtcdJoinedWhileRead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newFakeEtcd()
		dir, _, lock := e.locked(t)
		f, err := dir.Create("file")
		if err != nil {
			t.Fatal(err)
		}
		at := int64(0)
		for range joinMost {
			write(t, f, &at, []byte("x"))
		}
		reader, _ := e.dir(t, t.Context(), "")
		was, size, err := reader.Open("file")
		if err != nil {
			t.Fatal(err)
		}
		write(t, f, &at, []byte("x"))
		if n, err := was.ReadAt(make([]byte, size), 0); n != joinMost {
			t.Errorf("%d bytes are read of %d: %v", n, size, err)
		}
		now, _, err := reader.Open("file")
		if a, b := was.(*pieceFile), now.(*pieceFile); err != nil || a.keys != 1 || b.keys != 1 {
			t.Errorf("%d pieces are counted, and %d by a new reader: %v", a.keys, b.keys, err)
		}
		lock.Close()
	})
}

// Ensure that pieces of files without a name are removed, and keys of others beside them stay.
func TestEtcdSweep(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newFakeEtcd()
		dir, _, lock := e.locked(t)
		for i := range 2 * othersMost {
			e.put(fmt.Sprint("kv/a", i), "x")
		}
		e.put("kv/d/"+strings.Repeat("A", 26)+"-1/00000000-000000000000-000001", "x")
		if err := dir.Sync(); err != nil || len(e.orphans()) > 0 {
			t.Errorf("%d pieces without a name stay: %v", len(e.orphans()), err)
		}
		lock.Close()
	})
}

// ---- a store

// Ensure that whatever happens to any one request of a process, the store has exactly what was
// answered. If the fault can be repaired nobody notices it, and otherwise the next process has all
// that was answered.
func TestEtcdFaults(t *testing.T) {
	for i, fault := range []etcdFault{lostRequest, lostAnswer, doneTwice, noLeader, expired,
		noSpace, killed, killedAfter, cutOff, doubtful} {
		t.Run(string(fault), func(t *testing.T) {
			t.Parallel()
			of := 10
			if fault == doubtful {
				of = 3
			}
			for n, reached := 1+i, true; reached; n = storetest.Next(n, of) {
				synctest.Test(t, func(t *testing.T) { reached = etcdFaultAt(t, fault, n) })
			}
		})
	}
}

// etcdFaultAt runs the script with a fault at request n, and reports whether there were that many
// requests.
func etcdFaultAt(t *testing.T, fault etcdFault, n int) (reached bool) {
	e := newFakeEtcd()
	e.token = "token"
	ctx, cancel := context.WithTimeout(t.Context(),
		time.Minute) // a standby waits for a dead cluster without end
	defer cancel()
	dir, w := e.dir(t, ctx, "first:9999")
	w.at, w.fault = n, fault
	h := storetest.NewHistory()
	d, err := durable.Open(ctx, dir, durable.Options{})
	switch {
	case err != nil:
	case fault == doubtful:
		err = slowScript(d, h)
	default:
		err = storetest.Script(t, d, h)
	}
	mended := slices.Contains([]etcdFault{lostRequest, lostAnswer, doneTwice, noLeader, expired,
		noSpace}, fault)
	if reached = w.count() >= n; err != nil && (!reached || mended) {
		t.Fatalf("request %d: %v", n, err)
	}
	switch {
	case err == nil && d.Close() == nil:
		h.Told = h.Done.Clone()
	case err != nil && d != nil:
		if again := d.Commit(); again == nil {
			t.Fatalf("request %d: after %v a Commit returns nil", n, err)
		}
		w.kill()
		<-d.Lost()
		d.Close()
	}
	w.kill()
	w.mu.Lock()
	e.late = nil
	w.mu.Unlock()
	after, _ := e.dir(t, t.Context(), "second:9999")
	checkKept(t, h, after, fmt.Sprintf("request %d", n))
	if pieces := e.orphans(); len(pieces) > 0 && fault != doneTwice {
		t.Fatalf("request %d leaves pieces without a name: %q", n, pieces)
	}
	return reached
}

// slowScript changes a store over some time, until a Commit fails.
func slowScript(d *durable.Store, h *storetest.History) error {
	for i := range 70 {
		key, value := fmt.Sprint(i%7), fmt.Sprint("value", i)
		d.Set(key, value)
		h.Done.Set(key, value)
		if err := d.Commit(); err != nil {
			return err
		}
		h.Told = h.Done.Clone()
		d.AwaitCompaction()
		<-time.After(100 * time.Millisecond)
	}
	return nil
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

// Ensure that a server that did not run or was cut off for a while answers nothing and writes
// nothing once another one may have taken over, and goes on if none has, and that the other one has
// all that was answered.
func TestEtcdTakeover(t *testing.T) {
	for _, away := range []time.Duration{2 * time.Second, 4 * time.Second, 8 * time.Second,
		20 * time.Second} {
		for _, standby := range []bool{true, false} {
			synctest.Test(t, func(t *testing.T) {
				e := newFakeEtcd()
				first, w := e.open(t)
				first.Put("k", "told")
				if err := first.Commit(); err != nil {
					t.Fatal(err)
				}
				<-time.After(3 * time.Second) // no request is under way any more
				w.setCut(true)
				var second *durable.Store
				began := time.Now()
				if standby {
					second, _ = e.open(t) // the first server is too slow: this one takes over
				} else {
					<-time.After(away)
				}
				if took := time.Since(began); standby && took > 6*time.Second {
					t.Errorf("the other one takes over after %v", took)
				}
				first.Get("k") // an old value by now
				done := make(chan error, 1)
				go func() { done <- first.Commit() }()
				<-time.After(max(0, away-time.Since(began)))
				w.setCut(false)
				err := <-done
				isLost := standby || away >= patienceTime
				if isLost != (err != nil) {
					t.Errorf("away for %v, standby %v: a Commit after a Get returns %v", away,
						standby, err)
				}
				if standby && away < patienceTime && !errors.Is(err, ErrTakenOver) {
					t.Errorf("away for %v: it is lost for %v, want %v", away, err, ErrTakenOver)
				}
				first.Put("k", "late")
				first.Commit()
				first.Close()
				if second == nil {
					second, _ = e.open(t)
				}
				want := []string{"told", "late"}
				if isLost {
					want = want[:1]
				}
				e.mu.Lock()
				before := maps.Clone(e.kvs)
				for _, t := range w.sent { // as if the network had delayed every request
					e.txn(t)
				}
				if !maps.EqualFunc(e.kvs, before,
					func(a, b keyValue) bool { return a.Revision == b.Revision }) {
					t.Errorf("away for %v, standby %v: late requests change something", away,
						standby)
				}
				e.mu.Unlock()
				if got := second.Get("k"); !slices.Equal(got, want) {
					t.Errorf("away for %v, standby %v: the next one has %q, want %q", away, standby,
						got, want)
				}
				second.Close()
			})
		}
	}
}

// Ensure that of several servers that start together one serves at a time, and each gets its turn;
// that a server that waits says for which one; and that a clean stop hands the store over at once.
func TestEtcdStandby(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newFakeEtcd()
		serving := make(chan *durable.Store)
		var handed time.Time
		for i := range 4 {
			go func() {
				status := new(storage.Status)
				dir, _ := e.dir(t, t.Context(), fmt.Sprint("host", i, ":9999"))
				dir.opts.Status = status
				go func() {
					<-time.After(time.Second)
					if stage := status.Stage(); stage != "" &&
						!strings.Contains(stage, "standby: the data is in use by process ") {
						t.Errorf("who waits says %q", stage)
					}
				}()
				d, err := durable.Open(t.Context(), dir, durable.Options{Status: status})
				if err != nil {
					t.Error(err)
				}
				if status.Stage() != "" || time.Since(status.Confirmed()) > 2*time.Second {
					t.Errorf("who serves says %q, and was confirmed %v ago", status.Stage(),
						time.Since(status.Confirmed()))
				}
				serving <- d
			}()
		}
		for i := range 4 {
			d := <-serving
			if took := time.Since(handed); i > 0 && took > time.Second {
				t.Errorf("server %d serves %v after the one before it has ended", i, took)
			}
			select {
			case <-serving:
				t.Fatal("two serve")
			case <-time.After(30 * time.Second):
			}
			if keys, _, _ := d.Size(); keys != i {
				t.Errorf("server %d finds %d keys", i, keys)
			}
			d.Put(fmt.Sprint(i), "v")
			if err := d.Commit(); err != nil {
				t.Error(err)
			}
			began := time.Now()
			if err := d.Close(); err != nil {
				t.Error(err)
			}
			if handed = time.Now(); handed.Sub(began) > time.Second {
				t.Errorf("Close takes %v", handed.Sub(began))
			}
		}
		dir, _ := e.dir(t, t.Context(), "")
		a, b := dir.newLock(), dir.newLock()
		w := sight{}
		err := w.look(t.Context(), dir.directory)
		took, err1 := a.take(t.Context(), &w)
		tookToo, err2 := b.take(t.Context(), &w)
		if err := errors.Join(err, err1, err2); !took || tookToo || err != nil {
			t.Errorf("two take the same lock: %v, %v, %v", took, tookToo, err)
		}
	})
}

// Ensure that a process that does not serve never waits for a server that is alive, but waits to
// see whether it is: repair and backup take the data of a server that has died.
func TestEtcdRepairBesideServer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newFakeEtcd()
		d, w := e.open(t)
		dir, _ := e.dir(t, t.Context(), "")
		if _, err := dir.Lock(t.Context()); !errors.Is(err, storage.ErrLocked) ||
			!strings.Contains(err.Error(), "which serves new:9999") {
			t.Errorf("beside a server: %v", err)
		}
		w.kill()
		<-d.Lost()
		d.Close()
		dir, _ = e.dir(t, t.Context(), "")
		lock, err := dir.Lock(t.Context())
		if err != nil {
			t.Fatalf("after its death: %v", err)
		}
		if n := dir.opts.Status.Takeovers(); n != 1 {
			t.Errorf("%d takeovers are counted, want 1", n)
		}
		lock.Close()
	})
}

// Ensure that a wait for the lock, and a load, end when their context does.
func TestEtcdOpenIsStopped(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newFakeEtcd()
		d, _ := e.open(t)
		ctx, cancel := context.WithCancel(t.Context())
		time.AfterFunc(time.Minute, cancel)
		dir, _ := e.dir(t, ctx, "other:9999")
		began := time.Now()
		if _, err := durable.Open(ctx, dir, durable.Options{}); !errors.Is(err, context.Canceled) {
			t.Errorf("a standby that is stopped: %v", err)
		}
		if took := time.Since(began); took > time.Minute+time.Second {
			t.Errorf("it takes %v", took)
		}
		d.Put("k", "v")
		d.Close()
		dir, _ = e.dir(t, t.Context(), "other:9999")
		if _, err := durable.Open(ctx, dir, durable.Options{}); !errors.Is(err, context.Canceled) {
			t.Errorf("a start that is stopped: %v", err)
		}
	})
}

// Ensure that a clock that jumps costs one more sign of life, and nothing else.
func TestEtcdClockJumps(t *testing.T) {
	for _, jump := range []time.Duration{-time.Hour, time.Hour, 5 * time.Second} {
		synctest.Test(t, func(t *testing.T) {
			e := newFakeEtcd()
			d, w := e.open(t)
			<-time.After(10 * time.Second)
			l := w.dir.lock
			then := time.Now().Round(0).Add(-jump)
			l.confirmed.Store(&then)
			d.Put("k", "v")
			began := time.Now()
			if err := d.Commit(); err != nil || time.Since(began) > 2*beatTime {
				t.Errorf("a jump of %v: %v after %v", jump, err, time.Since(began))
			}
			d.Close()
		})
	}
}

// Ensure that a store survives patienceTime without an answer from etcd, and ends after it, also an
// idle one.
func TestEtcdSilence(t *testing.T) {
	for _, long := range []time.Duration{3 * time.Second, 9 * time.Second, 15 * time.Second} {
		synctest.Test(t, func(t *testing.T) {
			d, w := newFakeEtcd().open(t)
			w.setCut(true)
			select {
			case <-d.Lost():
				if long < patienceTime {
					t.Errorf("lost within %v", long)
				}
				if err := d.Commit(); !errors.Is(err, ErrUnreachable) {
					t.Errorf("after %v: %v", long, err)
				}
			case <-time.After(long):
				if long > patienceTime+2*requestTime {
					t.Errorf("not lost after %v", long)
				}
				w.setCut(false)
				d.Put("k", "v")
				if err := d.Commit(); err != nil {
					t.Errorf("after %v: %v", long, err)
				}
			}
			d.Close()
		})
	}
}

// Ensure that a store in etcd is checked, repaired and copied like one on a disk, and that copies
// work in both directions.
func TestEtcdCheckRepairBackup(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newFakeEtcd()
		d, _ := e.open(t)
		h := storetest.NewHistory()
		if err := storetest.Script(t, d, h); err != nil {
			t.Fatal(err)
		}
		dir, _ := e.dir(t, t.Context(), "")
		if r, err := durable.Check(dir); err != nil || r.Damaged ||
			!strings.Contains(fmt.Sprint(r.Lines), "in use  by process") {
			t.Errorf("check beside a server: %v, %v", r, err)
		}
		local, err := storage.OpenDisk(t.TempDir(), nil)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := durable.Backup(dir, local, nil); err != nil {
			t.Errorf("backup beside a server: %v", err)
		}
		d.Close()
		other := newFakeEtcd()
		back, _ := other.dir(t, t.Context(), "")
		if _, err := durable.Backup(local, back, nil); err != nil {
			t.Errorf("backup to etcd: %v", err)
		}
		checkKept(t, h, local, "the copy on a disk")
		back, _ = other.dir(t, t.Context(), "third:9999")
		checkKept(t, h, back, "the copy of the copy")
		for key, kv := range e.kvs {
			if strings.HasPrefix(key, "kv/d/") && len(kv.Value) > 200 {
				kv.Value[len(kv.Value)/2] ^= 1
			}
		}
		if r, err := durable.Check(dir); err != nil || !r.Damaged {
			t.Errorf("check of what is damaged: %v, %v", r, err)
		}
		repairer, _ := e.dir(t, t.Context(), "")
		saved, _ := newFakeEtcd().dir(t, t.Context(), "")
		if r, err := durable.Repair(repairer, saved); err != nil || !r.Lost {
			t.Errorf("repair: %v, %v", r, err)
		}
		if r, err := durable.Check(saved); err != nil || r.Damaged {
			t.Errorf("check of what is repaired: %v, %v", r, err)
		}
	})
}

// Ensure that a process that reads a file while another one writes it finds what is added, gets an
// os.ErrNotExist once the file was removed or replaced, and reads no wrong bytes after a read that
// has failed.
func TestEtcdFileReadBesideWriter(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newFakeEtcd()
		writer, _, lock := e.locked(t)
		defer lock.Close()
		piece := func(i int) string {
			return string(e.list(keyRange{Key: []byte("kv/d/"), End: []byte("kv/d0")}).KVs[i].Key)
		}

		// Each case changes file f, of three pieces, and returns what a read of all of it must end
		// with.
		for what, do := range map[string]func(f storage.File, reader *etcdWire) (size int, want error){
			"it is written": func(f storage.File, _ *etcdWire) (int, error) {
				at := int64(9)
				write(t, f, &at, []byte("333"))
				return 12, nil
			},
			"it is removed": func(storage.File, *etcdWire) (int, error) {
				writer.Remove("f")
				return 9, fs.ErrNotExist
			},
			"it is made anew": func(storage.File, *etcdWire) (int, error) {
				writer.Create("f")
				return 9, fs.ErrNotExist
			},
			"a read of it fails where a piece is gone": func(_ storage.File, w *etcdWire) (int, error) {
				e.delete(piece(1))
				before := w.count()
				w.mu.Lock()
				w.before = func(n int) { w.setCut(n > before+2 && n < before+4) }
				w.mu.Unlock()
				return 9, nil
			},
		} {
			f, err := writer.Create("f")
			if err != nil {
				t.Fatal(err)
			}
			for at := int64(0); at < 9; {
				write(t, f, &at, fmt.Append(nil, 111*(1+at/3)))
			}
			dir, w := e.dir(t, t.Context(), "")
			r, size, err := dir.Open("f")
			if size != 9 || err != nil {
				t.Fatalf("the file has %d bytes: %v", size, err)
			}
			n, want := do(f, w)
			b := make([]byte, n)
			got, err := r.ReadAt(b, 0)
			for range 2 {
				if errors.Is(err, ErrUnreachable) {
					got, err = r.ReadAt(b, 0)
				}
			}
			if !errors.Is(err, want) || want == nil && got != n {
				t.Errorf("%s: %d bytes are read of %d: %v, want %v", what, got, n, err, want)
			}
			writer.Remove("f")
		}

		// To open it again finds its new state, and takes no more requests if it has many pieces.
		f, err := writer.Create("f")
		if err != nil {
			t.Fatal(err)
		}
		dir, w := e.dir(t, t.Context(), "")
		asked := 0
		for at := int64(0); at < 60; {
			write(t, f, &at, []byte("111"))
			before := w.count()
			_, listErr := dir.List()
			_, size, err := dir.Open("f")
			if err := errors.Join(err, listErr); size != at || err != nil {
				t.Errorf("the file is opened with %d bytes of %d: %v", size, at, err)
			}
			if n := w.count() - before; asked > 0 && n != asked {
				t.Errorf("a list and an Open of %d pieces take %d requests, and before %d", at/3, n, asked)
			}
			asked = w.count() - before
		}

		// The file is removed while it is opened, some of its pieces first.
		dir, w = e.dir(t, t.Context(), "")
		w.mu.Lock()
		w.before = func(n int) {
			if n == 2 {
				e.delete("kv/n/f")
				e.delete(piece(0))
			}
		}
		w.mu.Unlock()
		if _, size, err := dir.Open("f"); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("a file that goes is opened with %d bytes: %v", size, err)
		}
	})
}

// Ensure that a check calls a changed piece damage, whatever the change is, if anything that was
// answered is lost with it, and that a repair still works.
func TestEtcdSpoiledPieces(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e, h := newFakeEtcd(), storetest.NewHistory()
		dir, _ := e.dir(t, t.Context(), "new:9999")
		d, err := durable.Open(t.Context(), dir.directory, durable.Options{})
		if err != nil {
			t.Fatal(err)
		}
		for i := range 3 {
			commit(t, d, h, fmt.Sprint("text", i), strings.Repeat("text", 500))
			commit(t, d, h, fmt.Sprint("random", i), shrinking(1000, 1))
		}
		d.Close()

		sizes := map[string]int64{}
		whole := e.copy()
		for key := range whole.kvs {
			if strings.HasPrefix(key, "kv/d/") {
				var size int64
				fmt.Sscanf(key[len(key)-6:], "%x", &size)
				sizes[key] = size
			}
		}
		for key, size := range sizes {
			was := whole.kvs[key].Value
			for what, value := range map[string][]byte{
				"empty": {}, "its half": was[:len(was)/2], "a zero more": append(slices.Clone(was), 0),
				"zeros": make([]byte, len(was)), "twice": slices.Concat(was, was),
				"more than its size, packed": pack(append(slices.Clone(unpack(was, size)),
					make([]byte, 1000)...)),
			} {
				e.restore(whole.copy(), e.id)
				e.put(key, string(value))
				checker, _ := e.dir(t, t.Context(), "")
				if r, err := durable.Check(checker); err == nil && !r.Damaged &&
					!strings.Contains(fmt.Sprint(r.Lines), "holds 6 keys, 6 values, 9036 bytes") {
					t.Errorf("%s is %s: %v", key, what, r.Lines)
				}
				saved, _ := newFakeEtcd().dir(t, t.Context(), "")
				if _, err := durable.Repair(checker, saved); err != nil {
					t.Errorf("repair where %s is %s: %v", key, what, err)
				}
			}
		}
	})
}

// Ensure that nobody notices that a member is down.
func TestEtcdMemberDown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for i, down := range []string{"a:1", "b:1", "a:1", "b:1"} {
			e := newFakeEtcd()
			d, _ := e.open(t)
			e.mu.Lock()
			e.down, e.stranger = down, i >= 2
			e.mu.Unlock()
			<-time.After(5 * beatTime)
			began := time.Now()
			for range 20 {
				d.Put("k", "v")
				if err := d.Commit(); err != nil {
					t.Fatal(err)
				}
			}
			d.Close()
			d, w := e.open(t)
			d.Close()
			if member := w.dir.client.member.Load(); down != "b:1" && member != 1 {
				t.Error("the leader is not the one that is asked")
			}
			if took := time.Since(began); took > time.Second {
				t.Errorf("without %s it takes %v", down, took)
			}
		}
	})
}

// Ensure that a store with keys that are not ours, whatever they look like, is refused or damaged,
// and that the keys stay.
func TestEtcdOddKeys(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for _, key := range []string{"kv/", "kv/n/", "kv/n//x", "kv/n/thesis", "kv/d/users/alice",
			"kv/d/", "kv/d", "kv/STORE", "kv/seg-1.log"} {
			e := newFakeEtcd()
			e.put(key, "x")
			dir, _ := e.dir(t, t.Context(), "new:9999")
			_, err := durable.Open(t.Context(), dir, durable.Options{})
			if !errors.Is(err, storage.ErrNotOurs) || len(e.kvs) != 1 {
				t.Errorf("beside %s: %v, and then there are %d keys", key, err, len(e.kvs))
			}
		}
		for _, piece := range []string{
			"00000001-000000000000-7fffffffffffffff", "00000001-000000000000-10000000000",
			"00000001--00000000001-000001",
			"00000001-ffffffffffff-000001", "00000001-000000000000--00001", "x",
			"00000001-000000000000-000001x", "1-0-1",
		} {
			e := newFakeEtcd()
			d, _ := e.open(t)
			d.Put("k", "v")
			d.Close()
			id := e.kvs["kv/n/seg-1.log"].Value
			e.put(fmt.Sprintf("kv/d/%s/%s", id, piece), "x")
			dir, _ := e.dir(t, t.Context(), "new:9999")
			_, err := durable.Open(t.Context(), dir, durable.Options{})
			if !errors.As(err, new(*storage.DamageError)) ||
				!strings.Contains(err.Error(), "none of ours") {
				t.Errorf("with a piece %q: %v", piece, err)
			}
		}
	})
}

// Ensure that a backup and a check see no damage while a server compacts, whenever it does that.
func TestEtcdBackupBesideCompaction(t *testing.T) {
	t.Parallel()
	for n, reached := 1, true; reached; n = storetest.Next(n, 5) {
		synctest.Test(t, func(t *testing.T) {
			e := newFakeEtcd()
			d, _ := e.open(t)
			i := 0
			more := func(times int) {
				for range times {
					i++
					d.Set(fmt.Sprint(i%7), fmt.Sprint("value", i))
					d.Commit()
				}
				d.AwaitCompaction()
			}
			more(40)
			dir, w := e.dir(t, t.Context(), "")
			w.before = func(request int) {
				if request == n {
					more(60)
				}
			}
			local, err := storage.OpenDisk(t.TempDir(), nil)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := durable.Backup(dir, local, nil); err != nil {
				t.Errorf("the server compacts before request %d: %v", n, err)
			}
			reached = w.count() >= n
			w.mu.Lock()
			w.requests = 0
			w.mu.Unlock()
			if r, err := durable.Check(dir); err != nil || r.Damaged {
				t.Errorf("the server compacts before request %d of a check: %v, %v", n, r, err)
			}
			d.Close()
		})
	}
	for _, to := range []string{"etcd://h:1/kv/copy", "etcd://h:1/kv", "etcd://h:1/k"} {
		if Overlap("etcd://h:1/kv", to) != (to != "etcd://h:1/k") {
			t.Errorf("a copy of kv in %s", to)
		}
	}
}

// Ensure that a large commit is many pieces, or one if it shrinks enough, that many small commits
// are few pieces, and that files of many small pieces, as an earlier version left them, are read in
// parts.
func TestEtcdManyPieces(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		e := newFakeEtcd()
		dir, _ := e.dir(t, t.Context(), "new:9999")
		d, err := durable.Open(t.Context(), dir.directory, durable.Options{})
		if err != nil {
			t.Fatal(err)
		}
		h := storetest.NewHistory()
		put := func(key, value string) {
			t.Helper()
			d.Put(key, value)
			h.Done.Put(key, value)
			if err := d.Commit(); err != nil {
				t.Fatal(err)
			}
		}
		pieces := keyRange{Key: dir.key("d/"), End: below(dir.key("d/"))}
		before := e.list(pieces).Count
		put("text", strings.Repeat("text", 100<<10))
		if n := e.list(pieces).Count - before; n != 1 {
			t.Errorf("what shrinks enough is %d pieces", n)
		}
		put("quarter", shrinking(1<<20, 4))
		if n := e.list(pieces).Count - before; n > 1+5+1 {
			t.Errorf("with what shrinks to a quarter there are %d pieces", n)
		}
		random := make([]byte, 900<<10)
		rand.NewChaCha8([32]byte{1}).Read(random)
		put("large", string(random))
		const commits = 700
		for i := range commits {
			put("small", fmt.Sprint(i))
			if i%200 == 199 { // a large value now and then
				put("middle", string(random[:joinBytes]))
			}
			if n := e.list(pieces).Count; n > 500 {
				t.Fatalf("%d commits are %d pieces", i, n)
			}
		}
		d.Close()

		// Replace the pieces by small ones.
		kvs := e.list(pieces).KVs
		e.delete("kv/d/")
		numbers := map[string]int{}
		for _, kv := range kvs {
			id, piece, _ := strings.Cut(strings.TrimPrefix(string(kv.Key), "kv/d/"), "/")
			var number int
			var start, size int64
			fmt.Sscanf(piece, "%x-%x-%x", &number, &start, &size)
			for data := unpack(kv.Value, size); len(data) > 0; {
				n := min(len(data), 64)
				e.put(fmt.Sprintf("kv/d/%s/%08x-%012x-%06x", id, numbers[id], start, n),
					string(data[:n]))
				data, start = data[n:], start+int64(n)
				numbers[id]++
			}
		}
		if n := e.list(pieces).Count; n < 3*keysMost {
			t.Fatalf("there are only %d pieces", n)
		}
		h.Told = h.Done.Clone()
		dir, _ = e.dir(t, t.Context(), "new:9999")
		checkKept(t, h, dir.directory, "a store of many pieces")

		dir, _ = e.dir(t, t.Context(), "")
		lock, err := dir.Lock(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if err := dir.Remove("seg-1.log"); err != nil || len(e.orphans()) > 0 {
			t.Errorf("a file of many pieces leaves %d when it goes: %v", len(e.orphans()), err)
		}
		lock.Close()
	})
}

// Ensure that small commits are joined over a slow link, too.
func TestEtcdJoinsOnASlowLink(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newFakeEtcd()

		// In files of the usual size: compactions of small ones would leave few pieces, too.
		dir, w := e.dir(t, t.Context(), "new:9999")
		d, err := durable.Open(t.Context(), dir.directory, durable.Options{})
		if err != nil {
			t.Fatal(err)
		}
		w.dir.client.wasTooMuch(20 << 10)
		const commits = 500
		for i := range commits {
			d.Put("small", fmt.Sprint(i))
			if err := d.Commit(); err != nil {
				t.Fatal(err)
			}
		}
		pieces := keyRange{Key: w.dir.key("d/"), End: below(w.dir.key("d/"))}
		if n := e.list(pieces).Count; n > commits*2/3 {
			t.Errorf("%d commits are %d pieces", commits, n)
		}
		d.Close()
	})
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

// ---- a start that is refused

// Ensure that an address that cannot be opened is refused with the reason, at once if it would be
// useless to wait, and that nothing is written to a prefix that is somebody else's.
func TestEtcdRefusals(t *testing.T) {
	plain := httptest.NewServer(http.NotFoundHandler())
	defer plain.Close()
	encrypted := httptest.NewTLSServer(http.NotFoundHandler())
	encrypted.Config.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, slog.LevelError)
	defer encrypted.Close()
	at := func(s *httptest.Server) string { _, host, _ := strings.Cut(s.URL, "://"); return host }
	for address, want := range map[string]error{
		"etcd:/host:1/kv":                  ErrAddress,
		"etcd://":                          ErrAddress,
		"etcd://host:2379":                 ErrAddress,
		"etcd://host/kv":                   ErrAddress,
		"etcds:http://host:2379/kv":        ErrAddress,
		"etcd://host:0x/kv?ca=%":           ErrAddress,
		"etcd://" + at(plain) + "/kv":      ErrRefused, // some other server answers there
		"etcd://" + at(encrypted) + "/kv":  ErrRefused,
		"etcds://" + at(plain) + "/kv":     ErrRefused,
		"etcds://" + at(encrypted) + "/kv": ErrRefused, // whose certificate nobody knows
		"etcds://host:1/kv?ca=" + filepath.Join(t.TempDir(), "none"):   ErrRefused,
		"etcds://host:1/kv?cert=" + filepath.Join(t.TempDir(), "none"): ErrRefused,
	} {
		dir, err := Open(t.Context(), address, Options{Addr: "new:9999"})
		if err == nil {
			_, err = durable.Open(t.Context(), dir, durable.Options{})
		}
		if !errors.Is(err, want) {
			t.Errorf("%s: %v, want %v", address, err, want)
		}
	}
	for address, word := range map[string]string{
		"etcd://host/kv":                      "missing port",
		"etcds://host:1/kv?ca=etcd_test.go":   "etcd_test.go has no certificate",
		"etcds://host:1/kv?cert=etcd_test.go": "certificate",
		"etcd://host:1/kv?ca=%":               "invalid URL escape",
	} {
		if _, err := Open(t.Context(), address, Options{}); err == nil ||
			!strings.Contains(err.Error(), word) {
			t.Errorf("%s: %v, want a word of %q", address, err, word)
		}
	}
	for what, c := range map[string]struct {
		user  string
		spoil func(e *fakeEtcd, w *etcdWire)
		want  error
		took  time.Duration
	}{
		"a wrong password": {"root:wrong", func(e *fakeEtcd, _ *etcdWire) { e.token = "t" },
			ErrRefused, 0},
		"a full cluster": {"", func(e *fakeEtcd, w *etcdWire) { e.full, w.dir.opts.Addr = true, "" },
			syscall.ENOSPC, 0},
		"nobody answers": {"", func(_ *fakeEtcd, w *etcdWire) { w.cut = true },
			ErrUnreachable, patienceTime},
		"somebody else's key": {"", func(e *fakeEtcd, _ *etcdWire) { e.put("kv/config", "x") },
			storage.ErrNotOurs, 0},
		"another one's key": {"", func(e *fakeEtcd, _ *etcdWire) { e.put("kv/zoo", "x") },
			storage.ErrNotOurs, 0},
		"somebody else's lock": {"", func(e *fakeEtcd, _ *etcdWire) { e.put("kv/lock", "x") },
			storage.ErrNotOurs, 0},
	} {
		t.Run(what, func(t *testing.T) {
			t.Setenv("KVSERVER_ETCD_USER", c.user)
			synctest.Test(t, func(t *testing.T) {
				e := newFakeEtcd()
				dir, w := e.dir(t, t.Context(), "new:9999")
				c.spoil(e, w)
				before := e.revision
				began := time.Now()
				if _, err := durable.Open(t.Context(), dir, durable.Options{}); !errors.Is(err, c.want) {
					t.Errorf("%v, want %v", err, c.want)
				}
				if took := time.Since(began); took > cmp.Or(c.took, time.Second)+requestTime {
					t.Errorf("it takes %v", took)
				}
				if e.revision > before && c.want == storage.ErrNotOurs {
					t.Error("something was written")
				}
			})
		})
	}
}

// put puts a key as another program does.
func (e *fakeEtcd) put(key, value string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.revision++
	e.set(key, []byte(value))
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

// Ensure that the first start may be killed at any request, and the second one, too, and that the
// next start succeeds: there is no data to lose. A fifth of all pairs is tried.
func TestEtcdStartIsKilledTwice(t *testing.T) {
	t.Parallel()
	// start starts a server, kills it at request n, and reports whether it got that far.
	start := func(t *testing.T, e *fakeEtcd, n int) bool {
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		dir, wire := e.dir(t, ctx, "x:9999")
		wire.at, wire.fault = n, killed
		d, _ := durable.Open(ctx, dir, durable.Options{})
		isReached := wire.count() >= n
		wire.kill()
		if d != nil {
			<-d.Lost()
			d.Close()
		}
		return isReached
	}

	for first, more := 1, true; more; first++ {
		for second, isReached := 1+first%8, true; isReached; second = storetest.Next(second, 8) {
			synctest.Test(t, func(t *testing.T) {
				e := newFakeEtcd()
				if more = start(t, e, first); !more {
					isReached = false
					return
				}
				isReached = start(t, e, second)
				dir, _ := e.dir(t, t.Context(), "x:9999")
				d, err := durable.Open(t.Context(), dir, durable.Options{})
				if err != nil {
					t.Fatalf("killed at request %d, and the next start at %d: %v", first, second, err)
				}
				d.Close()
			})
		}
	}
}
