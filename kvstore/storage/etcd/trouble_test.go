package etcd

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"kvserver/kvstore/durable"
	"kvserver/kvstore/storage"
	"kvserver/kvstore/storetest"
)

// What people do to a cluster, and what happens to it by itself.

// delete removes the keys that begin with prefix.
func (e *fakeEtcd) delete(prefix string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.remove(keyRange{Key: []byte(prefix), End: below([]byte(prefix))}) {
		e.revision++
	}
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
	e.kvs, e.keys, e.revision, e.id = snapshot.kvs, snapshot.keys, snapshot.revision, id
}

// setCut sets whether the process is cut off.
func (w *etcdWire) setCut(isCut bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.cut = isCut
}

// tryOpen opens the store as a new process does that waits for the lock for that long.
func (e *fakeEtcd) tryOpen(t *testing.T, long time.Duration) (*durable.Store, error) {
	ctx, cancel := context.WithTimeout(t.Context(), long)
	defer cancel()
	dir, _ := e.dir(t, ctx, "try:9999")
	return durable.Open(ctx, dir, durable.Options{})
}

// commit puts a value and commits it, and fails the test if that fails.
func commit(t *testing.T, d *durable.Store, h *storetest.History, key, value string) {
	t.Helper()
	d.Put(key, value)
	h.Done.Put(key, value)
	if err := d.Commit(); err != nil {
		t.Fatalf("Put %s: %v", key, err)
	}
	h.Told = h.Done.Clone()
}

// ---- the lock

// Ensure that after the lock was deleted every other server waits for lockTime, because the holder
// may still answer reads, and that the holder goes on unless it is cut off. Only an empty prefix is
// taken at once.
func TestEtcdLockDeleted(t *testing.T) {
	for _, isCut := range []bool{false, true} {
		for _, watched := range []bool{false, true} {
			synctest.Test(t, func(t *testing.T) {
				e, h := newFakeEtcd(), storetest.NewHistory()
				began := time.Now()
				first, w := e.open(t)
				if took := time.Since(began); took > time.Second {
					t.Errorf("an empty prefix is taken after %v", took)
				}
				commit(t, first, h, "k", "v")
				if watched {
					if _, err := e.tryOpen(t, 10*time.Second); err == nil {
						t.Error("a standby takes a lock that is held")
					}
				}
				second := make(chan *durable.Store, 1)
				ctx, cancel := context.WithCancel(t.Context())
				stand := func() {
					dir, _ := e.dir(t, ctx, "second:9999")
					d, _ := durable.Open(ctx, dir, durable.Options{})
					second <- d
				}
				if watched {
					go stand()
					<-time.After(3 * time.Second)
				}
				w.setCut(isCut)
				e.delete("kv/lock")
				if !watched {
					go stand()
				}
				for range 4 * 10 { // a Get every quarter of a second
					first.Get("k")
					done := make(chan error, 1)
					go func() { done <- first.Commit() }()
					select {
					case err := <-done:
						select {
						case d := <-second:
							if err == nil {
								t.Errorf("cut off %v, watched %v: two serve", isCut, watched)
							}
							second <- d
						default:
						}
						if !isCut && err != nil {
							t.Errorf("the one that is not cut off ends: %v", err)
						}
						<-time.After(time.Second / 4)
					case <-time.After(12 * time.Second):
						t.Fatal("a Commit hangs")
					}
				}
				cancel()
				if d := <-second; (d != nil) != isCut {
					t.Errorf("cut off %v: the other one serves: %v", isCut, d != nil)
				} else if d != nil && !h.Told.Equal(d) {
					t.Error("what was told is lost")
				} else if d != nil {
					d.Close()
				}
				first.Close()
			})
		}
	}
}

// Ensure that a standby starts its wait again if somebody had the lock between two looks that have
// found none.
func TestEtcdLockDeletedTwice(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e, h := newFakeEtcd(), storetest.NewHistory()
		d, _ := e.open(t)
		commit(t, d, h, "k", "v")
		d.Close()
		e.delete("kv/lock")
		dir, _ := e.dir(t, t.Context(), "standby:9999")
		w := sight{}
		if err := w.look(t.Context(), dir.directory); err != nil || w.isFree("me") {
			t.Fatalf("a lock that is missing is free at once: %v", err)
		}
		d, _ = e.open(t) // takes some seconds
		e.delete("kv/lock")
		if err := w.look(t.Context(), dir.directory); err != nil || w.isFree("me") {
			t.Errorf("the lock is free beside another server: %v", err)
		}
		d.Close()
	})
}

// Ensure that a lock that is deleted during a write is taken again, and the write goes on: nothing
// else is gone, so the data is not written again, and a crash then leaves a whole store.
func TestEtcdLockDeletedBesideWrite(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e, h := newFakeEtcd(), storetest.NewHistory()
		d, _ := e.open(t)
		commit(t, d, h, "k", "v")
		e.delete("kv/lock")
		commit(t, d, h, "k", "v")
		if e.kvs["kv/lock"].Key == nil || e.kvs["kv/n/seg-2.log"].Key != nil {
			t.Error("the lock is not taken anew, or all data is written anew")
		}
		d.Close()
	})
}

// ---- which cluster it is

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

// Ensure that a lock that is taken again is not put into another cluster, whichever requests arrive
// there, and that if there is a lock but no store, a new store needs most of the members, too.
func TestEtcdLockElsewhere(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e, h := newFakeEtcd(), storetest.NewHistory()
		d, w := e.open(t)
		commit(t, d, h, "k", "v")
		other := newFakeEtcd()
		other.id = "2"
		member := ""
		w.mu.Lock()
		w.before = func(n int) {
			w.mu.Lock()
			defer w.mu.Unlock()
			e.other = map[string]*fakeEtcd{}
			if n%2 == 0 {
				e.other[member] = other
			}
		}
		w.mu.Unlock()
		for i := range 20 {
			// One member at a time: if all members were of another cluster, that would be accepted.
			w.mu.Lock()
			member = []string{"a:1", "b:1"}[i%2]
			w.mu.Unlock()
			e.delete("kv/lock")
			<-time.After(2 * time.Second)
		}
		if len(other.kvs) > 0 {
			t.Errorf("another cluster has %q", other.keys)
		}
		w.kill()
		<-d.Lost()
		d.Close()

		other.put("kv/lock", "{}")
		e.mu.Lock()
		e.other, e.down = map[string]*fakeEtcd{"b:1": other}, "a:1"
		e.mu.Unlock()
		if _, err := e.tryOpen(t, time.Minute); err == nil || other.kvs["kv/n/STORE"].Key != nil {
			t.Errorf("a new store with one member of two: %v", err)
		}
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

// ---- what is gone

// Ensure that whatever of a store is taken away while a server runs, the server goes on with all
// that was answered, and so does the next start, also if nothing was done between that and the
// server's end.
func TestEtcdGone(t *testing.T) {
	last := func(e *fakeEtcd, name string, back int) string {
		id := string(e.kvs["kv/n/"+name].Value)
		prefix := []byte("kv/d/" + id + "/")
		kvs := e.list(keyRange{Key: prefix, End: below(prefix)}).KVs
		return string(kvs[max(0, len(kvs)-1-back)].Key)
	}
	current := func(e *fakeEtcd) string {
		for n := 100; ; n-- {
			if name := fmt.Sprintf("seg-%d.log", n); e.kvs["kv/n/"+name].Key != nil {
				return name
			}
		}
	}
	snapshot := func(e *fakeEtcd) string {
		for key := range e.kvs {
			if name, ok := strings.CutPrefix(key, "kv/n/snap"); ok {
				return "snap" + name
			}
		}
		return ""
	}
	takes := map[string]func(e *fakeEtcd, before *fakeEtcd){
		"the last piece":          func(e, _ *fakeEtcd) { e.delete(last(e, current(e), 0)) },
		"a piece of the newest":   func(e, _ *fakeEtcd) { e.delete(last(e, current(e), 1)) },
		"a piece of a snapshot":   func(e, _ *fakeEtcd) { e.delete(last(e, snapshot(e), 0)) },
		"the identity":            func(e, _ *fakeEtcd) { e.delete("kv/n/STORE") },
		"its pieces":              func(e, _ *fakeEtcd) { e.delete(last(e, "STORE", 0)) },
		"the newest name":         func(e, _ *fakeEtcd) { e.delete("kv/n/" + current(e)) },
		"the names":               func(e, _ *fakeEtcd) { e.delete("kv/n/") },
		"the pieces":              func(e, _ *fakeEtcd) { e.delete("kv/d/") },
		"the lock":                func(e, _ *fakeEtcd) { e.delete("kv/lock") },
		"the step":                func(e, _ *fakeEtcd) { e.delete("kv/step") },
		"all":                     func(e, _ *fakeEtcd) { e.delete("kv/") },
		"some seconds":            func(e, before *fakeEtcd) { e.restore(before, e.id) },
		"some seconds, elsewhere": func(e, before *fakeEtcd) { e.restore(before, "2") },
	}
	n, next := 0, 0
	for _, what := range slices.Sorted(maps.Keys(takes)) {
		for _, then := range []string{"a write", "writes", "a read", "nothing", "a pause",
			"a write and a kill"} {
			if n++; n < next {
				continue
			}
			next = storetest.Next(n, 2)
			// A write does not see that these are gone. A check does, within a second.
			if then == "a write and a kill" && slices.Contains([]string{"a piece of the newest",
				"a piece of a snapshot", "the identity", "its pieces", "the step"}, what) {
				continue
			}
			t.Run(what+", then "+then, func(t *testing.T) {
				t.Parallel()
				synctest.Test(t, func(t *testing.T) {
					e, h := newFakeEtcd(), storetest.NewHistory()
					d, w := e.open(t)
					write := func(n int) {
						t.Helper()
						for i := range n {
							commit(t, d, h, fmt.Sprint("k", i%20), rand.Text())
							d.AwaitCompaction()
						}
					}
					write(40)
					d.Delete("k0")
					h.Done.Delete("k0")
					write(15)
					<-time.After(time.Second / 3)
					before := e.copy()
					write(40)
					<-time.After(10 * time.Second)
					for range 5 { // so that the last piece is one of several small ones
						write(1)
					}
					takes[what](e, before)
					switch then {
					case "a write", "a write and a kill":
						write(1)
					case "writes":
						write(60)
					case "a read":
						d.Get("k1")
						<-time.After(2 * time.Second)
						if err := d.Commit(); err != nil {
							t.Fatal(err)
						}
					case "a pause":
						<-time.After(20 * time.Second)
						write(1)
					}
					if then == "nothing" {
						if err := d.Close(); err != nil {
							t.Fatal(err)
						}
					} else {
						if then != "a write and a kill" {
							<-time.After(time.Second)
						}
						if err := d.Commit(); err != nil {
							t.Fatal(err)
						}
						w.kill()
						<-d.Lost()
						d.Close()
					}
					after, _ := e.dir(t, t.Context(), "second:9999")
					checkKept(t, h, after, what)
					if pieces := e.orphans(); len(pieces) > 0 {
						t.Errorf("%d pieces have no name", len(pieces))
					}
				})
			})
		}
	}
}

// Ensure that a cluster that was put back to a moment at which there were as many pieces as now is
// not taken for unchanged, also if nobody writes any more.
func TestEtcdAsManyPieces(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e, h := newFakeEtcd(), storetest.NewHistory()
		dir, w := e.dir(t, t.Context(), "first:9999")
		d, err := durable.Open(t.Context(), dir.directory, durable.Options{})
		if err != nil {
			t.Fatal(err)
		}
		pieces := keyRange{Key: dir.key("d/"), End: below(dir.key("d/"))}
		for range 100 {
			commit(t, d, h, "k", rand.Text())
		}
		<-time.After(3 * time.Second) // the last frame is vouched for
		before := e.copy()
		count := e.list(pieces).Count
		for n := 0; n == 0 || e.list(pieces).Count != count-1; n++ {
			commit(t, d, h, "k", rand.Text())
		}
		<-time.After(3 * time.Second)
		if n := e.list(pieces).Count; n != count {
			t.Fatalf("there are %d pieces, want %d", n, count)
		}
		e.restore(before, e.id)
		d.Get("k")
		<-time.After(2 * time.Second)
		if err := d.Commit(); err != nil {
			t.Fatal(err)
		}
		w.kill()
		<-d.Lost()
		d.Close()
		dir, _ = e.dir(t, t.Context(), "second:9999")
		checkKept(t, h, dir.directory, "after that")
	})
}

// Ensure that after a piece was taken away no piece is counted that is not there.
func TestEtcdCountAfterGone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newFakeEtcd()
		dir, _, lock := e.locked(t)
		defer lock.Close()
		for name, change := range map[string]func(f storage.File) error{
			"written": func(f storage.File) error {
				_, err := f.WriteAt([]byte("x"), 3)
				return errors.Join(err, f.Sync())
			},
			"cut": func(f storage.File) error { return f.Truncate(1) },
		} {
			f, err := dir.Create(name)
			if err != nil {
				t.Fatal(err)
			}
			for at := int64(0); at < 3; {
				write(t, f, &at, []byte("x"))
			}
			all := keyRange{Key: []byte("kv/d/"), End: []byte("kv/d0")}
			e.delete(string(e.list(all).KVs[2].Key))
			if err := change(f); err != nil || !errors.Is(lock.Held(), storage.ErrGone) {
				t.Errorf("a file of which a piece is gone is %s: %v", name, err)
			}
			_, err = dir.Stamps()
			if err := errors.Join(err, dir.Remove(name)); err != nil {
				t.Error(err)
			}
			if n := dir.pieces.Load(); n != 0 {
				t.Errorf("%s: %d pieces are counted after all", name, n)
			}
		}
	})
}

// Ensure that files that are found to be gone while check runs count as gone until all were made
// again.
func TestEtcdGoneMeanwhile(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newFakeEtcd()
		dir, w, lock := e.locked(t)
		defer lock.Close()
		file, err := dir.Create("a")
		_, otherErr := dir.Create("b")
		if err := errors.Join(err, otherErr); err != nil {
			t.Fatal(err)
		}
		f := file.(*pieceFile)
		for at := int64(0); at < 3; {
			write(t, f, &at, []byte("x"))
		}
		dir.lock.miss(errors.New("a test"))
		var once sync.Once
		w.mu.Lock()
		w.before = func(n int) {
			if isOurs := len(f.access) > 0; isOurs { // a request of the write below
				return
			}
			once.Do(func() {
				e.delete(string(f.last))
				at := f.size
				write(t, f, &at, []byte("x"))
				e.put(string(f.last)+"-", "") // so that the number of pieces is right
			})
		}
		w.mu.Unlock()
		was, err := dir.Stamps()
		if err != nil {
			t.Fatal(err)
		}
		for _, name := range []string{"a", "b"} {
			if err := lock.Held(); !errors.Is(err, storage.ErrGone) {
				t.Errorf("before %s is made anew: %v", name, err)
			}
			now, err := dir.Stamps()
			if err != nil || now[name].IsSame(was[name]) {
				t.Errorf("%s is lost, and has the stamp that it had: %v", name, err)
			}
			if _, err := dir.Create(name); err != nil {
				t.Error(err)
			}
		}
		if _, err := dir.Stamps(); err != nil || lock.Held() != nil {
			t.Errorf("once all was made anew: %v, %v", err, lock.Held())
		}
	})
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

// Ensure that a start that finds pieces and no names fails, and removes nothing.
func TestEtcdNamesAreGone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e, h := newFakeEtcd(), storetest.NewHistory()
		d, _ := e.open(t)
		commit(t, d, h, "k", "v")
		d.Close()
		before := e.copy()
		e.delete("kv/n/")
		count := len(e.kvs)
		if _, err := e.tryOpen(t, time.Minute); !errors.As(err, new(*storage.DamageError)) {
			t.Errorf("a start without names: %v", err)
		}
		if len(e.kvs) != count {
			t.Errorf("%d keys are left of %d", len(e.kvs), count)
		}
		e.restore(before, e.id)
		dir, _ := e.dir(t, t.Context(), "second:9999")
		checkKept(t, h, dir, "with its names")
	})
}

// ---- prefixes

// Ensure that a new store inside another store's prefix is refused, and that a store takes no
// notice of one inside its own prefix.
func TestEtcdInnerPrefix(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e, h := newFakeEtcd(), storetest.NewHistory()
		open := func(prefix string) (*durable.Store, error) {
			dir, _ := e.dir(t, t.Context(), "new:9999")
			dir.prefix, dir.name = prefix+"/", "etcd://a:1,b:1/"+prefix
			return durable.Open(t.Context(), dir, durable.Options{})
		}
		outer, err := open("a/kv")
		if err != nil {
			t.Fatal(err)
		}
		commit(t, outer, h, "k", "v")
		for _, inside := range []string{"a/kv/x", "a/kv/x/y", "a/kv/n", "a/kv/d/x"} {
			if _, err := open(inside); !errors.Is(err, storage.ErrNotOurs) ||
				!strings.Contains(err.Error(), "a/kv/") {
				t.Errorf("%s: %v", inside, err)
			}
		}
		beside, err := open("a/kvx")
		if err != nil {
			t.Fatal(err)
		}
		around, err := open("a") // others are inside already
		if err != nil {
			t.Fatal(err)
		}
		for _, d := range []*durable.Store{around, beside, outer} {
			d.Put("k", "v")
			if err := d.Close(); err != nil {
				t.Error(err)
			}
		}
		for _, prefix := range []string{"a", "a/kv", "a/kvx"} {
			d, err := open(prefix)
			if err != nil {
				t.Fatalf("%s again: %v", prefix, err)
			}
			d.Close()
		}
	})
}

// ---- slow clusters

// Ensure that a large value arrives over a slow link, over one with slow answers, and at a cluster
// that takes only small requests, while the server keeps its lock, and that it can be read back.
func TestEtcdSlow(t *testing.T) {
	large := make([]byte, 1<<20)
	if storetest.IsRace() {
		large = large[:128<<10]
	}
	rand.Read(large)
	for what, c := range map[string]struct {
		slow time.Duration
		rate int
		most int           // bytes of a request, at most
		took time.Duration // by a Commit, at most
	}{
		"1 MB/s":      {0, 1 << 20, 3 << 19, 10 * time.Second},
		"100 kB/s":    {0, 100 << 10, 3 << 19, 40 * time.Second},
		"50 kB/s":     {0, 50 << 10, 3 << 19, 60 * time.Second},
		"1.2 s":       {1200 * time.Millisecond, 0, 3 << 19, 30 * time.Second},
		"small pages": {0, 0, 40 << 10, time.Second},
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
					commit(t, d, h, "k", string(large))
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
		random := make([]byte, 4<<20)
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

// ---- a full cluster

// Ensure that a server whose lock is deleted in a full cluster asks now and then whether it can
// take it again, and gives up when it would for an etcd that does not answer.
func TestEtcdFullWithoutALock(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e, h := newFakeEtcd(), storetest.NewHistory()
		d, w := e.open(t)
		commit(t, d, h, "k", "v")
		e.setFull(true)
		e.delete("kv/lock")

		const most = 1000
		before, began := w.count(), time.Now()
		w.mu.Lock()
		w.at, w.fault = before+most, killed
		w.mu.Unlock()
		err := w.dir.do(0, []operation{deleteKeys(w.dir.key("none"), nil)})
		asked, took := w.count()-before, time.Since(began)
		if err == nil || asked >= most || took < patienceTime/2 || took > 2*patienceTime {
			t.Errorf("after %v and %d requests it ends with %v", took, asked, err)
		}
		d.Close()
	})
}

// Ensure that while etcd refuses every put, a server with a standby goes on answering reads, that
// writes are refused with words that say what to do, and are taken again by themselves once there
// is room, and that the two never both serve, whenever the first is cut off.
func TestEtcdFull(t *testing.T) {
	t.Parallel()
	for cut := 20 * time.Second; cut <= 26*time.Second; cut += 500 * time.Millisecond {
		synctest.Test(t, func(t *testing.T) {
			e, h := newFakeEtcd(), storetest.NewHistory()
			d, w := e.open(t)
			room := w.dir.directory
			commit(t, d, h, "k", "v")
			second := make(chan *durable.Store, 1)
			ctx, cancel := context.WithCancel(t.Context())
			dir, _ := e.dir(t, ctx, "second:9999")
			dir.opts.Status = new(storage.Status)
			go func() {
				d, _ := durable.Open(ctx, dir, durable.Options{})
				second <- d
			}()
			<-time.After(3 * time.Second)
			e.setFull(true)
			<-time.After(2 * time.Second)
			if err := room.RoomFor(100, true); !errors.Is(err, syscall.ENOSPC) ||
				!strings.Contains(err.Error(), "alarm disarm") {
				t.Errorf("a write to a full cluster: %v", err)
			}
			for range 20 {
				d.Get("k")
				if err := d.Commit(); err != nil {
					t.Fatalf("a read from a full cluster: %v", err)
				}
				<-time.After(time.Second)
			}
			if stage := dir.opts.Status.Stage(); !strings.Contains(stage, "etcd is full") {
				t.Errorf("who stands by says %q", stage)
			}
			time.AfterFunc(time.Until(time.Now().Add(cut-20*time.Second)), func() { w.setCut(true) })
			<-time.After(time.Second)
			e.setFull(false)
			for range 100 {
				d.Get("k")
				done := make(chan error, 1)
				go func() { done <- d.Commit() }()
				err := <-done
				select {
				case other := <-second:
					if err == nil {
						t.Errorf("cut off after %v: two serve", cut)
					}
					if !h.Told.Equal(other) {
						t.Error("what was told is lost")
					}
					second <- other
				default:
				}
				<-time.After(100 * time.Millisecond)
			}
			if d := <-second; d == nil {
				t.Error("nobody takes over")
			} else {
				d.Close()
			}
			cancel()
			d.Close()
		})
	}
	synctest.Test(t, func(t *testing.T) {
		e, h := newFakeEtcd(), storetest.NewHistory()
		d, w := e.open(t)
		e.setFull(true)
		<-time.After(10 * time.Second)
		e.setFull(false)
		<-time.After(2 * time.Second)
		if err := w.dir.RoomFor(100, false); err != nil {
			t.Errorf("there is room again: %v", err)
		}
		commit(t, d, h, "k", "v")
		d.Close()
	})
}

// Ensure that writes are refused before the quota is reached, that Deletes go on, and that values
// that were overwritten do not take room for long.
func TestEtcdQuota(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		e := newFakeEtcd()
		e.quota = 12 << 20
		d, w := e.open(t)
		value := make([]byte, 128<<10)
		n := 0
		for w.dir.RoomFor(int64(len(value)), false) == nil && n < 200 {
			rand.Read(value)
			d.Put(fmt.Sprint(n), string(value))
			if err := d.Commit(); err != nil {
				t.Fatal(err)
			}
			d.AwaitCompaction()
			<-time.After(100 * time.Millisecond)
			n++
		}
		if n < 22 || n > 84 {
			t.Errorf("%d values are written where there is room for 96", n)
		}
		<-time.After(2 * time.Second)
		for i := range n {
			if err := w.dir.RoomFor(10, true); err != nil {
				t.Fatalf("Delete number %d of %d: %v", i, n, err)
			}
			d.Delete(fmt.Sprint(i))
			if err := d.Commit(); err != nil {
				t.Fatal(err)
			}
			d.AwaitCompaction()
		}
		<-time.After(2 * time.Second)
		if err := w.dir.RoomFor(int64(len(value)), false); err != nil {
			t.Errorf("after all was deleted: %v", err)
		}
		if e.forgot == 0 {
			t.Error("etcd keeps what was deleted")
		}
		d.Close()
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

// Ensure that what a killed backup to etcd has left is never served as an empty store.
func TestEtcdBrokenOffBackup(t *testing.T) {
	local, err := storage.OpenDisk(t.TempDir(), nil)
	if err != nil {
		t.Fatal(err)
	}
	h := storetest.NewHistory()
	d, err := durable.Open(t.Context(), local, durable.Options{Fsync: durable.FsyncNever})
	if err != nil {
		t.Fatal(err)
	}
	for i := range 100 {
		commit(t, d, h, fmt.Sprint(i), rand.Text())
	}
	d.Close()
	for n, reached := 1, true; reached; n = storetest.Next(n, 5) {
		synctest.Test(t, func(t *testing.T) {
			if local, err = storage.OpenDisk(local.Path(""), nil); err != nil {
				t.Fatal(err)
			}
			e := newFakeEtcd()
			to, w := e.dir(t, t.Context(), "")
			w.at, w.fault = n, killed
			_, err := durable.Backup(local, to, nil)
			reached = w.count() >= n
			local.Close()
			pieces := e.list(keyRange{Key: []byte("kv/d/"), End: []byte("kv/d0")}).Count
			after, _ := e.dir(t, t.Context(), "new:9999")
			d, openErr := durable.Open(t.Context(), after, durable.Options{})
			switch {
			case openErr == nil && err == nil && !h.Told.Equal(d):
				t.Error("a copy is not the store")
			case openErr == nil && err != nil && pieces > 0 && !h.Told.Equal(d):
				t.Errorf("a backup that was killed before request %d is served as a store", n)
			case openErr != nil && !errors.Is(openErr, durable.ErrUnfinished) &&
				!errors.As(openErr, new(*storage.DamageError)):
				t.Errorf("killed before request %d: %v", n, openErr)
			}
			if openErr == nil {
				d.Close()
			}
		})
	}
}

// ---- words

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
		dir.log = slog.New(slog.NewTextHandler(&log, nil))
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
		if n := strings.Count(log.String(), "standing by"); n != 3 ||
			strings.Count(log.String(), " error=") != 1 || strings.Contains(log.String(), "<nil>") {
			t.Errorf("the log tells of %d stages:\n%s", n, &log)
		}
		d.Close()
	})
}

// Ensure that a store in a full cluster is closed without its last frame, and opens again.
func TestEtcdCloseWhileFull(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newFakeEtcd()
		e.quota = 64 << 20
		d, _ := e.open(t)
		d.Put("k", "v")
		if err := d.Commit(); err != nil {
			t.Fatal(err)
		}
		<-time.After(5 * time.Second)
		e.setFull(true)
		<-time.After(5 * time.Second)

		began := time.Now()
		if err := d.Close(); err != nil || time.Since(began) > time.Second {
			t.Errorf("Close: %v, after %v", err, time.Since(began))
		}
		e.setFull(false)
		again, _ := e.open(t)
		if got := again.Get("k"); len(got) != 1 {
			t.Errorf("then there are %q", got)
		}
		again.Close()
	})
}
