package etcd

import (
	"bytes"
	"cmp"
	"context"
	"crypto/rand"
	"crypto/tls"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"kvserver/kvstore/durable"
	"kvserver/kvstore/storage"
	"kvserver/kvstore/storetest"
)

// Ensure that whatever happens to any one request of a process, the store has exactly what was
// answered. If the fault can be repaired nobody notices it, and otherwise the next process has all
// that was answered.
func TestEtcdFaults(t *testing.T) {
	for i, fault := range []etcdFault{lostRequest, lostAnswer, doneTwice, noLeader, expired,
		noSpace, fills, killed, killedAfter, cutOff, doubtful} {
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

// Ensure that no request of a start does harm if the network delivers it once more, later.
func TestEtcdFaultsOfAStart(t *testing.T) {
	for n := range 12 {
		synctest.Test(t, func(t *testing.T) { etcdFaultAt(t, doneTwice, n+1) })
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
		noSpace, fills}, fault)
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

	// What is late would arrive among the requests of the next process.
	w.kill()
	w.mu.Lock()
	e.late = nil
	w.mu.Unlock()

	after, _ := e.dir(t, t.Context(), "second:9999")
	checkKept(t, h, after, fmt.Sprintf("request %d", n))
	if e.logins > 5 {
		t.Errorf("request %d: two processes log in %d times", n, e.logins)
	}
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
		if err := storetest.Commit(d); err != nil {
			return err
		}

		h.Told = h.Done.Clone()
		d.AwaitCompaction()
		<-time.After(100 * time.Millisecond)
	}
	return nil
}

// Ensure that an address that cannot be opened is refused with the reason, at once if it would be
// useless to wait, and that nothing is written to a prefix that is somebody else's.
func TestEtcdRefusals(t *testing.T) {
	plain := httptest.NewServer(http.NotFoundHandler())
	defer plain.Close()

	encrypted := httptest.NewTLSServer(http.NotFoundHandler())
	encrypted.Config.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, slog.LevelError)
	defer encrypted.Close()

	picky := httptest.NewUnstartedServer(http.NotFoundHandler())
	picky.TLS = &tls.Config{ClientAuth: tls.RequireAnyClientCert}
	picky.Config.ErrorLog = encrypted.Config.ErrorLog
	picky.StartTLS()
	defer picky.Close()

	ca := filepath.Join(t.TempDir(), "ca.pem")
	os.WriteFile(ca, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: picky.Certificate().Raw}), 0o600)
	at := func(s *httptest.Server) string { _, host, _ := strings.Cut(s.URL, "://"); return host }
	open := func(address string) error {
		dir, err := Open(t.Context(), address, Options{Addr: "new:9999"})
		if err == nil {
			_, err = durable.Open(t.Context(), dir, durable.Options{})
		}
		return err
	}

	for address, want := range map[string]error{
		"etcd:/host:1/kv":                  ErrAddress,
		"etcd://":                          ErrAddress,
		"etcd://host:2379":                 ErrAddress,
		"etcd://host/kv":                   ErrAddress,
		"etcds:http://host:2379/kv":        ErrAddress,
		"etcd://host:0x/kv?ca=%":           ErrAddress,
		"etcd://127.0.0.1:1/kv?ca=x.pem":   ErrAddress,
		"etcds://127.0.0.1:1/kv?cacert=x":  ErrAddress,
		"etcd://" + at(plain) + "/kv":      ErrRefused, // some other server answers there
		"etcd://" + at(encrypted) + "/kv":  ErrRefused,
		"etcds://" + at(plain) + "/kv":     ErrRefused,
		"etcds://" + at(encrypted) + "/kv": ErrRefused, // whose certificate nobody knows

		"etcds://" + at(picky) + "/kv?ca=" + ca:                        ErrRefused, // it wants a certificate
		"etcds://host:1/kv?ca=" + filepath.Join(t.TempDir(), "none"):   ErrRefused,
		"etcds://host:1/kv?cert=" + filepath.Join(t.TempDir(), "none"): ErrRefused,
	} {
		if err := open(address); !errors.Is(err, want) || !IsAddress(address) {
			t.Errorf("%s: %v, want %v", address, err, want)
		}
	}

	// The error says what is wrong with the address.
	for address, word := range map[string]string{
		"etcd://host/kv":                      "missing port",
		"etcds://host:1/kv?ca=lock_test.go":   "lock_test.go: it holds no certificate",
		"etcds://host:1/kv?cert=lock_test.go": "certificate",
		"etcd://host:1/kv?ca=%":               "invalid URL escape",

		"etcds://" + at(encrypted) + "/kv?ca=" + ca: "404 Not Found", // the certificate is good
	} {
		if err := open(address); err == nil || !strings.Contains(err.Error(), word) {
			t.Errorf("%s: %v, want a word of %q", address, err, word)
		}
	}

	// Here the address is right, and etcd, or what is in it, stands in the way.
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

	// All members refuse, so to wait would be useless.
	synctest.Test(t, func(t *testing.T) {
		e := newFakeEtcd()
		_, _, lock := e.locked(t)
		e.mu.Lock()
		e.down, e.stranger = "*", true
		e.mu.Unlock()
		began := time.Now()
		<-lock.Lost()
		if took := time.Since(began); took > 2*beatTime {
			t.Errorf("a refused server is lost after %v", took)
		}
	})
}

// Ensure that the log is told once that etcd is full, or does not answer, however long that lasts.
func TestEtcdTroubleIsSaidOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newFakeEtcd()
		dir, w := e.dir(t, t.Context(), "new:9999")
		var log bytes.Buffer
		dir.client.log = slog.New(slog.NewTextHandler(&log, nil))
		lock, err := dir.Lock(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		for _, set := range []func(bool){e.setFull, w.setCut} {
			set(true)
			<-time.After(5 * time.Second)
			set(false)
			<-time.After(3 * time.Second)
		}
		lock.Close()
		synctest.Wait()
		for _, words := range []string{"writes are refused", "has room again", "trying again"} {
			if n := strings.Count(log.String(), words); n != 1 {
				t.Errorf("the log says %q %d times:\n%s", words, n, &log)
			}
		}
	})
}

// Ensure that a server that waits says what for: etcd does not answer yet, or not any more.
func TestEtcdSilenceIsSaid(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newFakeEtcd()
		dir, w := e.dir(t, t.Context(), "first:9999")
		dir.opts.Status = new(storage.Status)

		w.setCut(true)
		go durable.Open(t.Context(), dir, durable.Options{})
		<-time.After(5 * time.Second)
		if stage := dir.opts.Status.Stage(); stage != "etcd does not answer yet" {
			t.Errorf("a start says %q", stage)
		}
		<-time.After(time.Minute)

		d, _ := e.open(t)
		ctx, cancel := context.WithCancel(t.Context())
		dir, w = e.dir(t, ctx, "second:9999")
		dir.opts.Status = new(storage.Status)
		var log bytes.Buffer
		dir.client.log = slog.New(slog.NewTextHandler(&log, nil))

		ended := make(chan struct{})
		go func() {
			durable.Open(ctx, dir, durable.Options{})
			close(ended)
		}()

		<-time.After(10 * time.Second)
		w.setCut(true)
		<-time.After(33 * time.Second)
		stage := dir.opts.Status.Stage()
		if !strings.HasPrefix(stage, "standby: etcd does not answer, for 3") ||
			!strings.Contains(stage, "by process") {
			t.Errorf("a standby says %q", stage)
		}

		w.setCut(false)
		<-time.After(3 * time.Second)
		if stage := dir.opts.Status.Stage(); !strings.HasPrefix(stage, "standby: the data is in use") {
			t.Errorf("a standby says %q when etcd answers again", stage)
		}

		cancel()
		<-ended

		// The log is told of a silence once, though its length changes.
		if n := strings.Count(log.String(), "standing by"); n != 3 ||
			strings.Count(log.String(), " error=") != 1 || strings.Contains(log.String(), "<nil>") {
			t.Errorf("the log tells of %d stages:\n%s", n, &log)
		}
		d.Close()
	})
}

// words is a log that notes when it is told that etcd does not answer yet.
type words chan time.Time

func (w words) Write(line []byte) (int, error) {
	if bytes.Contains(line, []byte("etcd does not answer yet")) {
		w <- time.Now()
	}
	return len(line), nil
}

// Ensure that a start, a check, a backup and a repair say after a second that etcd does not answer
// yet, whether it accepts connections or not.
func TestEtcdSilenceIsSaidSoon(t *testing.T) {
	for what, do := range map[string]func(dir *smallDir){
		"a start":  func(dir *smallDir) { durable.Open(dir.ctx, dir, durable.Options{}) },
		"a lock":   func(dir *smallDir) { dir.Lock(dir.ctx) },
		"a check":  func(dir *smallDir) { durable.Check(dir) },
		"a backup": func(dir *smallDir) { durable.Backup(dir, storetest.New()) },
		"a repair": func(dir *smallDir) { durable.Repair(dir, storetest.New()) },
	} {
		for _, down := range []string{"", "*"} {
			synctest.Test(t, func(t *testing.T) {
				e := newFakeEtcd()
				dir, w := e.dir(t, t.Context(), "")
				w.setCut(down == "")
				e.setDown(down)
				said := make(words, 10)
				dir.client.log = slog.New(slog.NewTextHandler(said, nil))

				began := time.Now()
				go do(dir)
				<-time.After(time.Minute)
				if n := len(said); n != 1 {
					t.Fatalf("%s of silent members, down %q, says so %d times", what, down, n)
				}
				if took := (<-said).Sub(began); took > tellTime+tellTime/10 {
					t.Errorf("%s of silent members, down %q, says so after %v", what, down, took)
				}
			})
		}
	}
}

// Ensure that nobody notices that a member is down.
func TestEtcdMemberDown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for i, down := range []string{"a:1", "b:1", "a:1", "b:1"} {
			e := newFakeEtcd()
			d, _ := e.open(t)

			// From the third time on some other server answers in the member's place.
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

		// A new store needs both members, and does not wait for anybody once both are there.
		e := newFakeEtcd()
		e.down = "a:1"
		time.AfterFunc(time.Second, func() { e.setDown("") })
		began := time.Now()
		d, _ := e.open(t)
		if took := time.Since(began); took < time.Second || took > 2*time.Second {
			t.Errorf("a new store begins after %v", took)
		}
		d.Close()
	})
}

// Ensure that a member of another cluster, or a cluster that was put back, is refused by name: no
// store is made there, and none is served from there.
func TestEtcdOtherCluster(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for _, member := range []string{"a:1", "b:1"} {
			e, h := newFakeEtcd(), storetest.NewHistory()
			d, _ := e.open(t)
			commit(t, d, h, "k", "v")

			other := newFakeEtcd()
			other.id = "2"
			e.mu.Lock()
			e.other[member] = other
			e.mu.Unlock()

			for i := range 30 { // the server goes on with the other member
				if i == 15 {
					e.delete("kv/n/STORE")
				}
				commit(t, d, h, "k", "v")
				<-time.After(time.Second)
			}

			if _, err := e.tryOpen(t, time.Minute); !errors.Is(err, ErrOther) ||
				!strings.Contains(err.Error(), member) {
				t.Errorf("a start where %s is another cluster: %v", member, err)
			}
			d.Close()
			if _, err := e.tryOpen(t, time.Minute); !errors.Is(err, ErrOther) {
				t.Errorf("a start where nobody serves: %v", err)
			}
			if len(other.kvs) > 0 {
				t.Error("something was written to the other cluster")
			}
		}

		// A standby has seen one cluster, and then only the other one answers.
		e, h := newFakeEtcd(), storetest.NewHistory()
		d, w := e.open(t)
		commit(t, d, h, "k", "v")
		other := newFakeEtcd()
		other.id = "2"

		time.AfterFunc(10*time.Second, func() {
			w.kill()
			e.mu.Lock()
			defer e.mu.Unlock()
			e.other["a:1"], e.down = other, "b:1"
		})

		if _, err := e.tryOpen(t, time.Minute); err == nil || len(other.kvs) > 0 {
			t.Errorf("a standby takes another cluster: %v, %d keys", err, len(other.kvs))
		}
		<-d.Lost()
		d.Close()

		// A new store does not begin while most members do not answer.
		e = newFakeEtcd()
		e.down = "b:1"
		if _, err := e.tryOpen(t, time.Minute); err == nil || len(e.kvs) > 0 {
			t.Errorf("a new store with one member of two: %v", err)
		}

		// The cluster is restored while a standby waits.
		e = newFakeEtcd()
		d, w = e.open(t)
		snapshot := e.copy()
		commit(t, d, h, "k", "v")
		time.AfterFunc(10*time.Second, func() {
			w.kill()
			e.restore(snapshot, e.id)
		})
		if _, err := e.tryOpen(t, time.Minute); !errors.Is(err, ErrOther) {
			t.Errorf("a standby whose cluster went back: %v", err)
		}
		<-d.Lost()
		d.Close()
	})
}

// Ensure that the cluster counts as another one only if all members are of another one: if one is,
// and the other refuses for another reason, nothing counts as gone.
func TestEtcdOtherBesideFull(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e, h := newFakeEtcd(), storetest.NewHistory()
		d, w := e.open(t)
		commit(t, d, h, "k", "v")
		other := newFakeEtcd()
		other.id = "2"

		for _, member := range []string{"a:1", "b:1"} {
			w.mu.Lock()
			e.other, e.full = map[string]*fakeEtcd{member: other}, true
			w.mu.Unlock()
			time.AfterFunc(5*time.Second, func() { e.setFull(false) })
			commit(t, d, h, "k", "v")
			<-time.After(2 * time.Second)

			if err := d.Commit(); err != nil || e.kvs["kv/n/seg-2.log"].Key != nil {
				t.Errorf("with another cluster at %s: %v, or all data is written anew", member, err)
			}
		}
		d.Close()
	})
}

// Ensure that a cluster of which no member answers does not count as another one, as may happen
// when something is gone.
func TestEtcdOtherWhileSilent(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newFakeEtcd()
		dir, _, lock := e.locked(t)
		e.setDown("*")
		if err := dir.client.adopt(t.Context()); err == nil || *dir.client.id.Load() != e.id {
			t.Errorf("silent members are accepted as cluster %q: %v", *dir.client.id.Load(), err)
		}

		e.setDown("")
		if err := dir.client.adopt(t.Context()); err != nil {
			t.Errorf("the cluster, once it answers: %v", err)
		}
		lock.Close()
	})
}

// Ensure that a request is sent again after a refusal that may pass, and after no other.
func TestEtcdRefusalsThatPass(t *testing.T) {
	for _, c := range []struct {
		codes   []int // gRPC's
		message string
		isFinal bool
	}{
		{[]int{1, 2, 4, 10, 13, 14, 16}, "etcdserver: not now", false},
		{[]int{3, 5, 6, 7, 9, 11, 12, 15}, "etcdserver: no", true},
		{[]int{3}, "etcdserver: revision of auth store is old", false},
		{[]int{8}, "etcdserver: too many requests", false},
		{[]int{8}, "etcdserver: mvcc: database space exceeded", true},
	} {
		for _, code := range c.codes {
			if got := isFinal(&refusal{c.message, code}); got != c.isFinal {
				t.Errorf("%d, %q is final: %v", code, c.message, got)
			}
		}
	}

	if !isTooMuch(&refusal{"grpc: received message larger than max (5 vs. 4)", 8}) {
		t.Error("an answer that is too large is not asked for in parts")
	}
	if errors.Is(named(errNoSpace), ErrRefused) {
		t.Error("a full cluster is said to want another address or password")
	}
	if !isFinal(fmt.Errorf("dial: %w", tls.RecordHeaderError{Msg: "no TLS"})) {
		t.Error("a server without TLS is asked again")
	}
}

// Ensure that a request fails only once all members have refused it, not if one of them has refused
// it twice, as when another goroutine's failure has changed which member is asked.
func TestEtcdRefusedByOne(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newFakeEtcd()
		d, w := e.open(t)
		<-time.After(beatTime / 2)
		w.mu.Lock()
		e.down, e.stranger = "b:1", true
		w.mu.Unlock()

		go func() {
			for range 30 {
				w.dir.client.member.Store(1)
				<-time.After(10 * time.Millisecond)
			}
		}()

		synctest.Wait()
		d.Put("k", "v")
		if err := d.Commit(); err != nil {
			t.Errorf("one of two members refuses: %v", err)
		}
		d.Close()
	})
}

// Ensure that a request fails only once all members have refused it one after the other, and that
// the error is theirs: what was before a failure that may pass does not count.
func TestEtcdRefusedAfterAFailure(t *testing.T) {
	refused, fails := &refusal{"etcdserver: no", 3}, &refusal{"etcdserver: no leader", 14}
	for _, c := range []struct {
		answers string // of a and b in turn: refused, fails, other cluster, good
		want    error
	}{
		{"rffrg", nil},
		{"rffrr", ErrRefused},
		{"rfoo", ErrOther},
		{"ofrr", ErrRefused},
		{"ro", ErrRefused},
		{"og", nil},
	} {
		synctest.Test(t, func(t *testing.T) {
			dir, _ := newFakeEtcd().dir(t, t.Context(), "")
			n, ours := 0, "1"
			dir.client.id.Store(&ours)
			dir.client.http.Transport = roundTrip(func(r *http.Request) (*http.Response, error) {
				var good response
				good.Header.Cluster = ours
				n++
				switch c.answers[n-1] {
				case 'r':
					return reply(response{}, refused), nil
				case 'f':
					return reply(response{}, fails), nil
				case 'o':
					good.Header.Cluster = "2"
				}
				return reply(good, nil), nil
			})

			_, err := dir.client.call(t.Context(), "kv/range", keyRange{}, 0)
			if !errors.Is(err, c.want) || n < len(c.answers) {
				t.Errorf("%s: after %d requests %v, want %v", c.answers, n, err, c.want)
			}
		})
	}
}

// Ensure that a large value arrives over a slow link, over one with slow answers, and at a cluster
// that takes only small requests, while the server keeps its lock, and that it can be read back.
func TestEtcdSlow(t *testing.T) {
	large := make([]byte, storetest.Fewer(1<<20, 8))
	rand.Read(large)

	for what, c := range map[string]struct {
		slow time.Duration
		rate int
		most int           // bytes of a request, at most
		size int           // bytes of the value, at most
		took time.Duration // by a Commit, at most
	}{
		"1 MB/s":      {0, 1 << 20, 3 << 19, 1 << 20, 10 * time.Second},
		"100 kB/s":    {0, 100 << 10, 3 << 19, 1 << 20, 40 * time.Second},
		"50 kB/s":     {0, 50 << 10, 3 << 19, 1 << 20, 60 * time.Second},
		"1.2 s":       {1200 * time.Millisecond, 0, 3 << 19, 1 << 20, 30 * time.Second},
		"small pages": {0, 0, 40 << 10, 1 << 18, time.Second},
	} {
		t.Run(what, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				e, h := newFakeEtcd(), storetest.NewHistory()
				e.most = c.most
				dir, w := e.dir(t, t.Context(), "first:9999")
				w.slow, w.rate = c.slow, c.rate

				d, err := durable.Open(t.Context(), dir.directory, durable.Options{})
				if err != nil {
					t.Fatal(err)
				}

				for range 2 {
					began := time.Now()
					commit(t, d, h, "k", string(large[:min(len(large), c.size)]))
					if took := time.Since(began); took > c.took {
						t.Errorf("it takes %v", took)
					}
				}

				if _, err := e.tryOpen(t, time.Minute); !errors.Is(err, context.DeadlineExceeded) {
					t.Errorf("a standby: %v", err)
				}

				for range 30 {
					commit(t, d, h, "small", "v")
					<-time.After(time.Second)
				}
				if err := d.Close(); err != nil {
					t.Error(err)
				}

				dir, w = e.dir(t, t.Context(), "second:9999")
				w.slow, w.rate = c.slow, c.rate
				checkKept(t, h, dir.directory, "read over that link")
			})
		})
	}
}

// Ensure that pieces soon become small enough for a link that has become slow, however much the
// data shrinks.
func TestEtcdSlower(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d, w := newFakeEtcd().open(t)

		random := make([]byte, storetest.Fewer(4<<20, 4))
		rand.Read(random)
		d.Put("random", string(random))
		if err := d.Commit(); err != nil {
			t.Fatal(err)
		}

		w.mu.Lock()
		w.rate = 50 << 10
		w.mu.Unlock()

		began := time.Now()
		d.Put("k", shrinking(1<<20, 10))
		if err := d.Commit(); err != nil {
			t.Fatal(err)
		}
		if took := time.Since(began); took > 8*time.Second {
			t.Errorf("the Commit takes %v", took)
		}
		d.Close()
	})
}

// Ensure that small pieces, which arrive soon over any link, do not make the next ones larger, and
// that large ones do.
func TestEtcdSmallPiecesProveNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir, _, lock := newFakeEtcd().locked(t)
		f := create(t, dir, "file")

		at := int64(0)
		for range 20 {
			write(t, f, &at, []byte("small"))
		}
		if most := dir.client.piece.Load(); most != pieceFirst {
			t.Errorf("after small pieces the next one may have %d bytes, want %d", most, pieceFirst)
		}
		write(t, f, &at, []byte(randomText(pieceFirst)))
		if most := dir.client.piece.Load(); most != 2*pieceFirst {
			t.Errorf("after a large one the next one may have %d bytes, want %d", most, 2*pieceFirst)
		}

		for most := int64(2*pieceFirst - 1); most > pieceLeast; most = dir.client.piece.Load() {
			dir.client.wasTooMuch(int(most))
		}
		if most := dir.client.piece.Load(); most != pieceLeast {
			t.Errorf("over the slowest link a piece may have %d bytes, want %d", most, pieceLeast)
		}
		lock.Close()
	})
}

// Ensure that the error has etcd's own words if etcd takes only tiny requests.
func TestEtcdTooLarge(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newFakeEtcd()
		d, _ := e.open(t)
		e.mu.Lock()
		e.most = 8 << 10
		e.mu.Unlock()

		value := make([]byte, 1<<20)
		rand.Read(value)
		d.Put("k", string(value))
		if err := d.Commit(); !errors.Is(err, ErrTooLarge) ||
			!strings.Contains(err.Error(), "etcdserver: request is too large") {
			t.Errorf("a large value: %v", err)
		}
		d.Close()
	})
}
