package etcd

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"kvserver/kvstore/durable"
	"kvserver/kvstore/storage"
	"kvserver/kvstore/storetest"
)

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

					// A snapshot and a log, then as much again: "some seconds" takes that away.
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
						// A check sees the loss within this second. A write before a kill
						// must see it itself.
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

		// Up to one piece fewer than then: vouching for the last frame adds one.
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
			f := create(t, dir, name)

			for at := int64(0); at < 3; {
				write(t, f, &at, []byte("x"))
			}

			all := keyRange{Key: []byte("kv/d/"), End: []byte("kv/d0")}
			e.delete(string(e.list(all).KVs[2].Key))
			if err := change(f); err != nil || !errors.Is(lock.Held(), storage.ErrGone) {
				t.Errorf("a file of which a piece is gone is %s: %v", name, err)
			}

			_, err := dir.Stamps()
			if err := errors.Join(err, dir.Remove(name)); err != nil {
				t.Error(err)
			}
			if n := dir.pieces.Load(); n != 0 {
				t.Errorf("%s: %d pieces are counted after all", name, n)
			}
		}
	})
}

// Ensure that a write notices what somebody else has done to its file, also if the first try of it
// takes too long and it looks at its pieces.
func TestEtcdChangedByOthers(t *testing.T) {
	for what, change := range map[string]func(e *fakeEtcd, f *pieceFile){
		"a piece in the middle is gone": func(e *fakeEtcd, f *pieceFile) { e.delete(string(f.from(1))) },
		"a piece is added": func(e *fakeEtcd, f *pieceFile) {
			e.put(string(f.key(piece{number: f.count, start: f.size, size: 60 << 10})), "")
		},
		"its name is another file's": func(e *fakeEtcd, _ *pieceFile) { e.put("kv/n/file", "another") },
	} {
		synctest.Test(t, func(t *testing.T) {
			e := newFakeEtcd()
			dir, w, lock := e.locked(t)
			defer lock.Close()
			f := create(t, dir, "file")
			at := int64(0)
			for range 3 {
				write(t, f, &at, []byte("x"))
			}

			synctest.Wait()
			change(e, f.(*pieceFile))
			w.suffer(lostRequest, 0)
			write(t, f, &at, []byte(randomText(40<<10)))
			if err := lock.Held(); !errors.Is(err, storage.ErrGone) {
				t.Errorf("%s: %v", what, err)
			}
		})
	}
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

		// From here on all files count as gone.
		dir.lock.miss(errors.New("a test"))

		// While the check runs, a write finds out that its file's last piece is gone.
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

// Ensure that what is found to be gone while check runs, but not by it, still counts as gone after
// it.
func TestEtcdGoneBesideACheck(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir, w, lock := newFakeEtcd().locked(t)
		defer lock.Close()
		<-time.After(surveyTime / 2) // so that the next request is the check's below
		var once sync.Once
		w.mu.Lock()
		w.before = func(int) { once.Do(func() { dir.lock.miss(errors.New("a test")) }) }
		w.mu.Unlock()

		for _, want := range []error{storage.ErrGone, nil} { // after each check
			if err := errors.Join(lock.Verify(), lock.Held()); !errors.Is(err, want) {
				t.Errorf("after a check: %v, want %v", err, want)
			}
		}

		// As long as etcd does not answer it is not known what is gone.
		f, err := dir.Create("file")
		dir.lock.miss(errors.New("a test"))
		w.setCut(true)
		time.AfterFunc(3*time.Second, func() { w.setCut(false) })
		stamps, stampsErr := dir.Stamps()
		if err := errors.Join(err, stampsErr); err != nil || len(stamps) != 1 {
			t.Errorf("the files are said to be %v: %v", stamps, err)
		}

		// What is left of a file is of no use once anything is gone.
		w.delete("kv/n/file")
		lock.Verify()
		if _, err := f.ReadAt(make([]byte, 1), 0); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("a lost file reads as %v", err)
		}
	})
}

// Ensure that a removed step counts as something gone, and that after it a change that arrives once
// more, much later, changes nothing.
func TestEtcdStepIsGone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newFakeEtcd()
		dir, w, lock := e.locked(t)
		defer lock.Close()
		_, err := dir.Create("a")
		made := w.lastSent()
		if err := errors.Join(err, dir.Remove("a")); err != nil {
			t.Fatal(err)
		}

		e.delete("kv/step")
		if _, err := dir.Create("b"); !errors.Is(err, storage.ErrGone) {
			t.Errorf("without the step: %v", err)
		}
		if err := errors.Join(lock.Verify(), lock.Held()); err != nil {
			t.Errorf("after a check: %v", err)
		}

		e.arrive(made)
		if e.list(keyRange{Key: dir.key("n/a")}).Count > 0 {
			t.Error("a change of an earlier series is made once more")
		}
	})
}
