package etcd

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"kvserver/kvstore"
	"kvserver/kvstore/durable"
	"kvserver/kvstore/storetest"
)

// Ensure that nothing counts as gone, so that reads go on, if a Commit is taken back after a large
// piece of an earlier one has arrived late, behind the smaller ones that were sent in its place.
func TestEtcdTakenBackAfterALatePiece(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e, h := newFakeEtcd(), storetest.NewHistory()
		d, w := e.openLarge(t, durable.Options{})
		commit(t, d, h, "k", "v")
		<-time.After(idleTime)
		w.failRequest(1, lostRequest)
		commit(t, d, h, "k", randomText(40<<10))
		e.mu.Lock()
		answer, err := e.txn(w.lost[0])
		e.mu.Unlock()
		if !answer.Succeeded || err != nil {
			t.Fatalf("the late piece does not arrive: %v", err)
		}
		<-time.After(3 * time.Second)
		commit(t, d, h, "k", "w")
		<-time.After(idleTime)

		w.beforeRequest(3, func() {
			e.setFull(true)
			time.AfterFunc(time.Minute, func() { e.setFull(false) })
		})
		d.Put("k", randomText(300<<10))
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

// Ensure that a refused Commit stays refused if a large request of it, which took too long, arrives
// late, whenever that is, and fills etcd: then the smaller one that is sent in its place is refused.
func TestEtcdSlowPieceFillsUp(t *testing.T) {
	for _, before := range []int{1, 12} { // with so many Commits before it, pieces are joined
		for _, next := range []int{0, 100, 100 << 10} {
			for n, isReached := 2, true; isReached; n++ {
				isReached = etcdSlowPieceFillsUp(t, before, next, n)
			}
		}
	}
}

// etcdSlowPieceFillsUp makes some Commits, and one whose first request arrives only before its n-th one.
// Then it makes a Commit of next bytes. It reports whether there were that many requests.
func etcdSlowPieceFillsUp(t *testing.T, before, next, n int) (isReached bool) {
	synctest.Test(t, func(t *testing.T) {
		e, h := newFakeEtcd(), storetest.NewHistory()
		d, w := e.openLarge(t, durable.Options{})
		for i := range before {
			commit(t, d, h, "k", randomText(2600+i))
		}
		<-time.After(idleTime)
		late := w.count() + n
		w.beforeRequest(n, func() {
			e.mu.Lock()
			defer e.mu.Unlock()
			e.txn(w.lost[0])
			e.full = true
			time.AfterFunc(time.Minute, func() { e.setFull(false) })
		})
		w.failRequest(1, lostRequest)
		text := randomText(62 << 10)
		d.Put("k", text)
		h.Done.Put("k", text)
		switch err := d.Commit(); {
		case errors.Is(err, kvstore.ErrTakenBack):
			h.Done = h.Told.Clone()
		case err != nil:
			t.Fatal(err)
		}
		isReached = w.count() >= late
		if h.Told = h.Done.Clone(); !h.Told.Equal(d) {
			t.Errorf("request %d: there is not what there should be", n)
		}

		<-time.After(3 * time.Second)
		e.setFull(false)
		<-time.After(3 * time.Second)
		if next > 0 {
			commit(t, d, h, "new", randomText(next))
		}
		w.kill()
		<-d.Lost()
		d.Close()
		after, _ := e.dir(t, t.Context(), "second:9999")
		checkKept(t, h, after, fmt.Sprintf("%d Commits, then %d bytes, request %d", before, next, n))
	})
	return isReached
}

// tornEnd makes a store with a Commit, and kills its server in the middle of the next one.
func tornEnd(t *testing.T, e *fakeEtcd, h *storetest.History) {
	d, w := e.openLarge(t, durable.Options{})
	commit(t, d, h, "k", "one")
	<-time.After(idleTime)
	w.failRequest(2, killed)
	d.Put("torn", randomText(300<<10))
	d.Commit()
	<-d.Lost()
	d.Close()
}

// Ensure that the first Commit after a start that has found a torn end can be taken back, also one of
// several frames.
func TestEtcdTakenBackBehindATornEnd(t *testing.T) {
	for _, frames := range []int{1, 3} {
		synctest.Test(t, func(t *testing.T) {
			e, h := newFakeEtcd(), storetest.NewHistory()
			tornEnd(t, e, h)
			d, w := e.openLarge(t, durable.Options{})
			d.Commit()
			<-time.After(idleTime)
			e.setFull(true)
			for range frames {
				d.Put("k", strings.Repeat("x", 1100<<10))
			}
			if err := d.Commit(); !errors.Is(err, kvstore.ErrTakenBack) || !h.Told.Equal(d) {
				t.Fatalf("%d frames: %v", frames, err)
			}
			e.setFull(false)
			<-time.After(5 * time.Second)
			commit(t, d, h, "k", "three")
			w.kill()
			<-d.Lost()
			d.Close()
			after, _ := e.dir(t, t.Context(), "third:9999")
			checkKept(t, h, after, "behind a torn end")
		})
	}
}

// Ensure that with -fsync 1s nothing answered is lost if etcd becomes full at the first write after a
// start that has found a torn end.
func TestEtcdFullBehindATornEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e, h := newFakeEtcd(), storetest.NewHistory()
		tornEnd(t, e, h)
		d, w := e.openLarge(t, durable.Options{Fsync: time.Second})
		d.Commit()
		<-time.After(beatTime / 2)
		e.setFull(true)
		commit(t, d, h, "k", "two") // answered
		d.Commit()
		e.setFull(false)
		<-time.After(5 * time.Second)
		commit(t, d, h, "k", strings.Repeat("x", 1000))
		<-time.After(5 * time.Second)
		w.kill()
		<-d.Lost()
		d.Close()
		after, _ := e.dir(t, t.Context(), "third:9999")
		checkKept(t, h, after, "behind a torn end")
	})
}

// Ensure that a stop knows that all data is to be written again while that waits for room: until then
// memory alone has it.
func TestEtcdStopKnowsOfAHealWithoutRoom(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e, h := newFakeEtcd(), storetest.NewHistory()
		d, w := e.open(t)
		commit(t, d, h, "k", "v")
		<-time.After(idleTime)
		commit(t, d, h, "k", "v")
		e.delete("kv/d/")
		w.dir.lock.Verify()
		full := w.count() + 8
		w.beforeRequest(8, func() {
			e.setFull(true)
			time.AfterFunc(time.Minute, func() { e.setFull(false) })
		})
		ended := make(chan error, 1)
		go func() { ended <- d.Commit() }()
		for i := range 30 {
			<-time.After(time.Second + 10*time.Millisecond)
			if !d.IsHealing() {
				t.Fatalf("at look number %d a stop would not wait, and lose all", i)
			}
		}
		if err := <-ended; err != nil || w.count() < full || d.IsHealing() {
			t.Errorf("it ends with %v, and waits still: %t", err, d.IsHealing())
		}
		d.Close()
	})
}

// Ensure that a store whose lock is lost while answered data waits for room can be closed.
func TestEtcdCloseOfALostLockWhileFull(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e, h := newFakeEtcd(), storetest.NewHistory()
		d, w := e.openLarge(t, durable.Options{Fsync: time.Second})
		commit(t, d, h, "k", "v")
		<-time.After(idleTime)
		commit(t, d, h, "k", "w")
		e.setFull(true)
		<-time.After(5 * time.Second)
		w.setCut(true)
		<-d.Lost()
		ended := make(chan error, 1)
		go func() { ended <- d.Close() }()
		select {
		case <-ended:
		case <-time.After(time.Hour):
			t.Error("Close takes more than an hour")
			e.setFull(false)
			w.setCut(false)
		}
	})
}

// Ensure that what was answered stays if somebody deletes keys while a Commit is taken back, whichever
// request that is before, and check sees it at once.
func TestEtcdNamesGoneWhileTakenBack(t *testing.T) {
	for _, gone := range []string{"kv/n/", "kv/n/seg-1.log", "kv/n/STORE", "kv/d/", "kv/step"} {
		for n, isReached := 1, true; isReached && !t.Failed(); n++ {
			isReached = etcdNamesGoneWhileTakenBack(t, gone, n)
		}
	}
}

// etcdNamesGoneWhileTakenBack deletes the keys that begin with gone before the n-th request of a Commit
// whose second one finds etcd full. It reports whether there were that many.
func etcdNamesGoneWhileTakenBack(t *testing.T, gone string, n int) (isReached bool) {
	synctest.Test(t, func(t *testing.T) {
		e, h := newFakeEtcd(), storetest.NewHistory()
		d, w := e.openLarge(t, durable.Options{})
		commit(t, d, h, "k", "one")
		<-time.After(idleTime)
		commit(t, d, h, "k", "two")
		full, deleted := w.count()+2, w.count()+n
		w.mu.Lock()
		w.slow = 5 * time.Millisecond
		w.before = func(number int) {
			if number == deleted {
				e.delete(gone)
				go w.dir.check() // as attend does once a second
			}
			if number == full {
				e.setFull(true)
				time.AfterFunc(20*time.Second, func() { e.setFull(false) })
			}
		}
		w.mu.Unlock()
		text := randomText(300 << 10) // some requests
		d.Put("k", text)
		h.Done.Put("k", text)
		err := d.Commit()
		isReached = w.count() >= deleted && n < 40 // a heal that waits for room asks again and again
		switch {
		case errors.Is(err, kvstore.ErrTakenBack):
			h.Done = h.Told.Clone()
		case err != nil:
			t.Errorf("%s, request %d: %v", gone, n, err)
		}
		if h.Told = h.Done.Clone(); !h.Told.Equal(d) {
			t.Errorf("%s, request %d: after %v there is not what there should be", gone, n, err)
		}

		<-time.After(25 * time.Second)
		if err := d.Commit(); err != nil {
			t.Errorf("%s, request %d: a read: %v", gone, n, err)
		}
		w.kill()
		<-d.Lost()
		d.Close()
		after, _ := e.dir(t, t.Context(), "second:9999")
		checkKept(t, h, after, fmt.Sprintf("%s, request %d", gone, n))
	})
	return isReached
}
