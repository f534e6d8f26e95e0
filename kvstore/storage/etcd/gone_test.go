package etcd

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
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
// not taken for unchanged, also if nobody writes any more; or if its revision is no older one any
// more once the server may take the lock, which is another process's there.
func TestEtcdAsManyPieces(t *testing.T) {
	synctest.Test(t, func(t *testing.T) { asManyPieces(t, false) })
	synctest.Test(t, func(t *testing.T) { asManyPieces(t, true) })
}

func asManyPieces(t *testing.T, isOthers bool) {
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

	if isOthers {
		before.put("kv/lock", "{}")
		time.AfterFunc(lockTime/2, func() { e.write(1000) })
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

// beforeThat lets a process write to the store and end, and returns the cluster as it is then. lock
// says what becomes of the lock: "killed" or "stopped", as the process, or "none".
func beforeThat(t *testing.T, e *fakeEtcd, h *storetest.History, lock string) *fakeEtcd {
	d, w := e.open(t)
	commit(t, d, h, "k", "old")
	if lock == "killed" {
		w.kill()
		<-d.Lost()
	}
	d.Close()
	if lock == "none" {
		e.delete("kv/lock")
	}
	return e.copy()
}

// keepOpening opens the store until that succeeds, as an init system starts a server again and
// again. nil: ctx has ended before.
func (e *fakeEtcd) keepOpening(t *testing.T, ctx context.Context) (d *durable.Store) {
	for d == nil && ctx.Err() == nil {
		dir, _ := e.dir(t, ctx, "standby:9999")
		d, _ = durable.Open(ctx, dir, durable.Options{})
		wait(ctx, 100*time.Millisecond)
	}
	return d
}

// Ensure that a server goes on with all that was answered when etcd was away for a while and comes
// back as it was before the server began, with another process's lock or none, and that a standby
// leaves it the time for that.
func TestEtcdPutBack(t *testing.T) {
	n, next := 0, 0
	for _, lock := range []string{"killed", "stopped", "none"} {
		for _, away := range []time.Duration{6, 0, 1, 3, 10} {
			for _, hasStandby := range []bool{false, true} {
				if n++; n < next {
					continue
				}
				next = storetest.Next(n, 3)

				away := away * time.Second
				t.Run(fmt.Sprint(lock, ", ", away, ", ", hasStandby), func(t *testing.T) {
					t.Parallel()
					synctest.Test(t, func(t *testing.T) { putBack(t, lock, away, hasStandby) })
				})
			}
		}
	}
}

// putBack puts etcd back once it was away for that long, as TestEtcdPutBack says. lock is as for
// beforeThat.
func putBack(t *testing.T, lock string, away time.Duration, hasStandby bool) {
	e, h := newFakeEtcd(), storetest.NewHistory()
	before := beforeThat(t, e, h, lock)
	d, _ := e.open(t)
	for range 20 {
		commit(t, d, h, "k", rand.Text())
	}

	var standby *durable.Store
	var wg sync.WaitGroup
	ctx, cancel := context.WithCancel(t.Context())
	if hasStandby {
		wg.Go(func() { standby = e.keepOpening(t, ctx) })
	}
	<-time.After(5 * time.Second)

	// Others make many revisions while the server waits for the lock.
	e.setDown("*")
	<-time.After(away)
	e.restore(before, e.id)
	e.setDown("")
	time.AfterFunc(lockTime/2, func() { e.write(100) })

	began := time.Now()
	commit(t, d, h, "k", "new")
	mustWait := lock != "none" || away >= freshTime
	if took := time.Since(began); took > lockTime+time.Second || took < lockTime && mustWait {
		t.Errorf("it takes %v", took)
	}
	if hasStandby {
		<-time.After(20 * time.Second)
		commit(t, d, h, "k", "newer")
	}
	cancel()
	if wg.Wait(); standby != nil {
		t.Error("two serve")
		standby.Close()
	}
	d.Close()

	after, _ := e.dir(t, t.Context(), "third:9999")
	checkKept(t, h, after, "after that")
}

// Ensure that a server that is stopped when etcd has gone back keeps all that was answered.
func TestEtcdPutBackBeforeAStop(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e, h := newFakeEtcd(), storetest.NewHistory()
		before := beforeThat(t, e, h, "killed")
		d, _ := e.open(t)
		for range 20 {
			commit(t, d, h, "k", "v")
		}

		<-time.After(2 * time.Second)
		e.restore(before, e.id)
		if err := d.Close(); err != nil {
			t.Error(err)
		}
		after, _ := e.dir(t, t.Context(), "third:9999")
		checkKept(t, h, after, "after that")
	})
}

// Ensure that a server ends, and changes nothing, if it was cut off from etcd while that was put
// back, and another server has served there, whatever has become of that one, and of its lock.
func TestEtcdPutBackUnderAnother(t *testing.T) {
	serve := func(t *testing.T, lock, then string) {
		e, h := newFakeEtcd(), storetest.NewHistory()
		before := beforeThat(t, e, h, lock)
		first, wire := e.open(t)
		for i := range 20 {
			first.Put("k", fmt.Sprint(i))
			if err := first.Commit(); err != nil {
				t.Fatal(err)
			}
		}
		<-time.After(3 * time.Second)

		wire.setCut(true)
		e.restore(before, e.id)
		other, w := e.open(t)
		commit(t, other, h, "k", "of the other one")
		if then == "killed" || then == "killed, and its lock deleted" {
			w.kill()
			<-time.After(time.Second) // it stands still, and does not say that it has ended
		} else if then == "stopped" {
			other.Close()
		}
		if then == "killed, and its lock deleted" {
			e.delete("kv/lock")
		}

		// The other one has taken a lock that was given back at once: wait until no sign of life is
		// fresh.
		wire.setCut(false)
		<-time.After(lockTime)
		first.Get("k")
		if err := first.Commit(); !errors.Is(err, ErrRestored) {
			t.Errorf("a read of the first one: %v, want %v", err, ErrRestored)
		}
		first.Close()

		if then == "well" {
			commit(t, other, h, "k", "of the other one")
		}
		if then != "stopped" {
			w.kill()
			<-other.Lost()
			other.Close()
		}
		after, _ := e.dir(t, t.Context(), "third:9999")
		checkKept(t, h, after, "after that")
	}

	for _, lock := range []string{"killed", "stopped", "none"} {
		for _, then := range []string{"well", "stopped", "killed", "killed, and its lock deleted"} {
			t.Run(lock+", "+then, func(t *testing.T) {
				t.Parallel()
				synctest.Test(t, func(t *testing.T) { serve(t, lock, then) })
			})
		}
	}
}

// Ensure that a server ends if somebody shows life in an older state of etcd, in the lock or by a
// change of names, also if that one seems to have begun long ago, because its clock is behind.
func TestEtcdPutBackBesideLife(t *testing.T) {
	for _, key := range []string{"kv/lock", "kv/step"} {
		synctest.Test(t, func(t *testing.T) {
			e, h := newFakeEtcd(), storetest.NewHistory()
			before := beforeThat(t, e, h, "killed")
			lock := string(before.kvs["kv/lock"].Value)
			d, _ := e.open(t)
			for range 20 {
				commit(t, d, h, "k", "v")
			}

			e.restore(before, e.id)
			time.AfterFunc(lockTime-beatTime, func() { e.put(key, string(before.kvs[key].Value)) })
			if err := d.Commit(); err != nil { // the last sign of life is fresh
				t.Error(err)
			}
			d.Put("k", "new")
			err := d.Commit()
			if !errors.Is(err, ErrRestored) || string(e.kvs["kv/lock"].Value) != lock {
				t.Errorf("beside somebody who changes %s: %v, want %v", key, err, ErrRestored)
			}
			d.Close()
		})
	}
}

// Ensure that a server waits again if etcd is put back once more: what it has seen before that says
// nothing about a server that had the lock in between.
func TestEtcdPutBackTwice(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e, h := newFakeEtcd(), storetest.NewHistory()
		before := beforeThat(t, e, h, "killed")
		d, _ := e.open(t)
		<-time.After(beatTime / 2)
		for range 60 {
			commit(t, d, h, "k", "v")
		}

		// The revision is higher than at the last sign of life, and lower than after the last
		// commit.
		again := time.Now().Add(lockTime - beatTime)
		e.restore(before, e.id)
		e.write(40)
		time.AfterFunc(lockTime-beatTime, func() { e.restore(before, e.id) })
		<-time.After(2 * time.Second)

		// If that comes while all data is written again, the server ends instead, with all data there:
		// names of the first try count as lost until somebody removes them, and nobody does.
		d.Put("k", "new")
		if err := d.Commit(); err != nil && !errors.Is(err, storage.ErrGone) {
			t.Error(err)
		}
		if took := time.Since(again); took < lockTime {
			t.Errorf("the lock is taken after %v", took)
		}
		d.Close()
	})
}

// Ensure that a server leaves another one its lock, also at once after that was taken, in an older
// state of etcd whose revision is no older one any more, because others write there, too.
func TestEtcdPutBackAmongOthers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e, h := newFakeEtcd(), storetest.NewHistory()
		before := beforeThat(t, e, h, "stopped")
		first, _ := e.open(t)
		for range 60 {
			first.Put("k", "v")
			if err := first.Commit(); err != nil {
				t.Fatal(err)
			}
		}
		<-time.After(3*time.Second + beatTime/2) // its next sign of life comes before the other one's

		e.restore(before, e.id)
		other, w := e.open(t)
		commit(t, other, h, "k", "of the other one")
		e.write(200)

		first.Put("k", "late")
		if err := first.Commit(); !errors.Is(err, ErrRestored) {
			t.Errorf("a write of the first one: %v, want %v", err, ErrRestored)
		}
		first.Close()
		commit(t, other, h, "k", "of the other one")

		w.kill()
		<-other.Lost()
		other.Close()
		after, _ := e.dir(t, t.Context(), "third:9999")
		checkKept(t, h, after, "after that")
	})
}
