package etcd

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"slices"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"kvserver/kvstore"
	"kvserver/kvstore/durable"
	"kvserver/kvstore/storage"
	"kvserver/kvstore/storetest"
)

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
		if why := d.WhyLost(); storage.IsFull(why) {
			t.Errorf("the lock is lost for good, and yet somebody may wait for room: %v", why)
		}
		d.Close()
	})
}

// Ensure that while etcd refuses every put, a server with a standby goes on answering reads, that
// writes are refused with words that say what to do, and are taken again by themselves once there
// is room, and that the two never both serve, whenever the first is cut off.
func TestEtcdFull(t *testing.T) {
	t.Parallel()
	step := 2 * time.Second / time.Duration(storetest.Fewer(4, 4))
	for cut := 20 * time.Second; cut <= 26*time.Second; cut += step {
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
		value, fit := make([]byte, 128<<10), storetest.Fewer(96, 2)
		e.quota = int64(fit * len(value))
		d, w := e.open(t)
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
		if n < fit*22/96 || n > fit*84/96 {
			t.Errorf("%d values are written where there is room for %d", n, fit)
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
		<-time.After(3 * surveyTime) // at the end of one etcd forgets, and the next one sees it
		if err := w.dir.RoomFor(int64(len(value)), false); err != nil {
			t.Errorf("after all was deleted: %v", err)
		}
		if e.forgot == 0 {
			t.Error("etcd keeps what was deleted")
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

// Ensure that a Commit is taken back if etcd has no room for it, whichever of its requests finds that
// out: the store is what it was before, reads go on, and so do writes once there is room.
func TestEtcdCommitTakenBack(t *testing.T) {
	t.Parallel()
	large := make([]byte, 1200<<10)
	rand.Read(large)
	for n, isLarge := 1, true; n > 0; n++ {
		synctest.Test(t, func(t *testing.T) {
			e, h := newFakeEtcd(), storetest.NewHistory()
			dir, w := e.dir(t, t.Context(), "first:9999")
			d, err := durable.Open(t.Context(), dir.directory, durable.Options{})
			if err != nil {
				t.Fatal(err)
			}
			for i := range 12 { // pieces that may be joined
				commit(t, d, h, fmt.Sprint("k", i%3), rand.Text())
			}
			d.Expire("k1", 1<<40)
			h.Done.Expire("k1", 1<<40)
			commit(t, d, h, "k2", "last")
			<-time.After(beatTime / 2)

			full := w.count() + n
			w.mu.Lock()
			w.before = func(number int) {
				if number == full {
					e.setFull(true)
				}
			}
			w.mu.Unlock()
			d.Put("k0", "v")
			d.Set("k1", "v")
			d.Delete("k2")
			d.Put("new", "v")
			d.Put("large", string(large))
			began := time.Now()
			err = d.Commit()
			isFull := w.count() >= full
			if errors.Is(err, kvstore.ErrTakenBack) != isFull {
				t.Fatalf("request %d is refused: %v; %v", n, isFull, err)
			}
			if !isFull && isLarge { // now with a frame that waits for Sync as a whole
				n, isLarge, large = 0, false, large[:300<<10]
			} else if !isFull {
				n = -1
			}
			if !isFull {
				d.Close()
				return
			}
			if took := time.Since(began); took > time.Second || !h.Told.Equal(d) {
				t.Errorf("request %d: after %v there is not what was there before", n, took)
			}
			if err := d.Room("k0", 1, 1); !errors.Is(err, syscall.ENOSPC) {
				t.Errorf("request %d: then there is room: %v", n, err)
			}
			for range 5 { // reads
				if err := d.Commit(); err != nil {
					t.Errorf("request %d: a read: %v", n, err)
				}
				<-time.After(time.Second)
			}

			e.setFull(false)
			<-time.After(2 * time.Second)
			h.Done = h.Told.Clone()
			for range 12 {
				commit(t, d, h, "k1", rand.Text())
			}
			<-time.After(2 * time.Second)
			w.mu.Lock()
			for _, sent := range w.sent { // as if the network had delayed what has taken back
				if len(sent.Success) == 1 && sent.Success[0].Delete != nil {
					e.txn(sent)
				}
			}
			w.mu.Unlock()
			if e.kvs["kv/n/seg-2.log"].Key != nil {
				t.Errorf("request %d: something counts as gone", n)
			}
			w.kill()
			<-d.Lost()
			d.Close()
			after, _ := e.dir(t, t.Context(), "second:9999")
			checkKept(t, h, after, fmt.Sprintf("request %d", n))
		})
	}
}

// Ensure that a Commit is taken back as a whole, also a frame of it that was written early, before
// the timer wrote: what is done afterwards is done to the same values in the log as in memory.
func TestEtcdEarlyFrameTakenBack(t *testing.T) {
	t.Parallel()
	const second, step = time.Second, 10 * time.Millisecond
	for early := second - 10*step; early <= second+10*step; early += step {
		synctest.Test(t, func(t *testing.T) {
			e, h := newFakeEtcd(), storetest.NewHistory()
			dir, w := e.dir(t, t.Context(), "first:9999")
			d, err := durable.Open(t.Context(), dir.directory, durable.Options{})
			if err != nil {
				t.Fatal(err)
			}
			w.mu.Lock()
			w.slow = 20 * time.Millisecond // so that the timer's request takes some time
			w.mu.Unlock()
			commit(t, d, h, "k", "one")
			commit(t, d, h, "k", "two")
			<-time.After(early)
			d.Take("k")
			d.Put("large", strings.Repeat("x", 1100<<10))
			<-time.After(100 * time.Millisecond)
			e.setFull(true)
			d.Put("k", "three")
			if err := d.Commit(); !errors.Is(err, kvstore.ErrTakenBack) || !h.Told.Equal(d) {
				t.Fatalf("%v: %v, and there is not what was there before", early, err)
			}

			e.setFull(false)
			<-time.After(2 * time.Second)
			d.Remove("k", "two")
			h.Done = h.Told.Clone()
			h.Done.Remove("k", "two")
			if err := d.Commit(); err != nil {
				t.Fatal(err)
			}
			h.Told = h.Done.Clone()
			w.kill()
			<-d.Lost()
			d.Close()
			after, _ := e.dir(t, t.Context(), "second:9999")
			checkKept(t, h, after, early.String())
		})
	}
}

// Ensure that a refused Commit stays refused, and that nothing answered is harmed, whichever of its
// requests arrives late, or once more, and whenever that is: also if it had no answer at first.
func TestEtcdRefusedArrivesLate(t *testing.T) {
	t.Parallel()
	for _, fault := range []etcdFault{"", lostRequest, lostAnswer, noLeader} {
		for _, text := range []string{"", "AAAA", "longer than that"} {
			for _, pause := range []time.Duration{0, beatTime / 10, 3 * beatTime} {
				etcdRefusedArrivesLate(t, fault, text, pause)
			}
		}
	}
}

// etcdRefusedArrivesLate has a Commit of two requests, of which the first meets fault and the last a full
// cluster. After the pause there is a Commit of text, unless that is "", and then all that was
// sent for the refused one arrives again, before a kill.
func etcdRefusedArrivesLate(t *testing.T, fault etcdFault, text string, pause time.Duration) {
	synctest.Test(t, func(t *testing.T) {
		e, h := newFakeEtcd(), storetest.NewHistory()
		dir, w := e.dir(t, t.Context(), "first:9999")
		d, err := durable.Open(t.Context(), dir.directory, durable.Options{})
		if err != nil {
			t.Fatal(err)
		}
		commit(t, d, h, "k", "v")
		<-time.After(2*time.Second + beatTime/2) // then the timer has nothing to write
		w.mu.Lock()
		first, full := len(w.sent), w.requests+2
		w.at, w.fault = w.requests+1, fault
		w.before = func(number int) {
			if number == full {
				e.setFull(true)
			}
		}
		w.mu.Unlock()
		large := make([]byte, 100<<10)
		rand.Read(large)
		d.Put("k", string(large))
		began := time.Now()
		if err := d.Commit(); !errors.Is(err, kvstore.ErrTakenBack) || !h.Told.Equal(d) {
			t.Fatalf("%s: Commit: %v", fault, err)
		}
		if took := time.Since(began); took > 2*requestTime {
			t.Errorf("%s: it takes %v", fault, took)
		}

		w.mu.Lock()
		w.before = nil
		refused := slices.Clone(w.sent[first:])
		w.mu.Unlock()
		e.setFull(false)
		<-time.After(pause)
		late := func() {
			e.mu.Lock()
			defer e.mu.Unlock()
			for _, t := range refused {
				e.txn(t)
			}
		}
		if pause > beatTime && text != "" {
			h.Done = h.Told.Clone()
			commit(t, d, h, "k", text)
		}
		late()
		<-time.After(2 * time.Second)
		late()
		<-time.After(2 * time.Second)
		if err := d.Commit(); err != nil || e.list(keyRange{Key: []byte("kv/n/seg-2.log")}).KVs != nil {
			t.Errorf("%s: something counts as gone, %v", fault, err)
		}
		w.kill()
		<-d.Lost()
		d.Close()
		h.Done = h.Told.Clone()
		after, _ := e.dir(t, t.Context(), "second:9999")
		checkKept(t, h, after, fmt.Sprint(fault, ", ", text, ", ", pause))
	})
}

// Ensure that a piece of one file counts as refused, and not as gone, if etcd has refused a piece of
// another file while it was under way.
func TestEtcdRefusedTogether(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir, w, lock := newFakeEtcd().locked(t)
		lock.Held() // from now on nothing waits for room
		f, err := dir.Create("file")
		if err != nil {
			t.Fatal(err)
		}
		w.mu.Lock()
		next := w.requests + 1
		w.before = func(number int) {
			if number != next {
				return
			}
			if err := dir.closeFence(dir.fence.Load()); err != nil {
				t.Error(err)
			}
		}
		w.mu.Unlock()
		f.WriteAt([]byte("x"), 0)
		if err := f.Sync(); err != errFull || lock.Held() != nil {
			t.Errorf("Sync: %v; the lock: %v", err, lock.Held())
		}
		<-time.After(2 * time.Second)
		if err := f.Sync(); err != nil {
			t.Errorf("Sync once there is room: %v", err)
		}
		lock.Close()
	})
}

// Ensure that after a refused put there counts to be no room until puts are possible again, and that
// whoever hears of an older refusal then does not change that.
func TestEtcdNoRoomUntilChecked(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir, _, lock := newFakeEtcd().locked(t)
		<-time.After(beatTime / 2)
		was := dir.fence.Load()
		if err := dir.closeFence(was); err != nil {
			t.Fatal(err)
		}
		if err := dir.RoomFor(1, true); err != errFull {
			t.Errorf("after a refused put: %v", err)
		}
		dir.check()
		if err := errors.Join(dir.closeFence(was), dir.RoomFor(1, true)); err != nil {
			t.Errorf("once puts are possible: %v", err)
		}
		lock.Close()
	})
}

// Ensure that nobody believes that a put cannot arrive any more before that is so: while one goroutine
// makes sure of it, another one can still put.
func TestEtcdRefusedNotTooEarly(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir, w, lock := newFakeEtcd().locked(t)
		lock.Held() // from now on nothing waits for room
		f, err := dir.Create("file")
		if err != nil {
			t.Fatal(err)
		}
		<-time.After(beatTime / 2)
		w.mu.Lock()
		w.slow = beatTime / 10
		w.mu.Unlock()
		go dir.closeFence(dir.fence.Load())
		synctest.Wait()
		f.WriteAt([]byte("x"), 0)
		began := time.Now()
		if err := f.Sync(); err == errFull && time.Since(began) < beatTime/10 {
			t.Error("it is refused, and an earlier try of it may still arrive")
		}
		<-time.After(2 * time.Second)
		lock.Close()
	})
}

// Ensure that the first Commit after a start can be taken back.
func TestEtcdFirstCommitTakenBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e, h := newFakeEtcd(), storetest.NewHistory()
		d, _ := e.open(t)
		commit(t, d, h, "k", "v")
		d.Close()
		d, _ = e.open(t)
		if err := d.Commit(); err != nil {
			t.Fatal(err)
		}
		e.setFull(true)
		d.Put("k", "w")
		if err := d.Commit(); !errors.Is(err, kvstore.ErrTakenBack) || !h.Told.Equal(d) {
			t.Errorf("the first Commit: %v", err)
		}
		e.setFull(false)
		<-time.After(2 * time.Second)
		commit(t, d, h, "k", "w")
		d.Close()
	})
}

// Ensure that the timer of a server that knows that etcd is full makes nobody wait: no log is read
// again.
func TestEtcdTimerWhileFull(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e, h := newFakeEtcd(), storetest.NewHistory()
		d, _ := e.open(t)
		<-time.After(beatTime / 2)
		commit(t, d, h, "k", "v")
		e.setFull(true)
		memory := d.Memory
		for range 5 {
			<-time.After(time.Second)
			if err := d.Commit(); err != nil {
				t.Fatal(err)
			}
		}
		if d.Memory != memory {
			t.Error("the log was read again")
		}
		e.setFull(false)
		d.Close()
	})
}

// Ensure that what somebody deletes in a full cluster is written again once there is room, and that
// nobody is answered before.
func TestEtcdGoneWhileFull(t *testing.T) {
	for _, prefix := range []string{"kv/d/", "kv/n/"} {
		synctest.Test(t, func(t *testing.T) {
			e, h := newFakeEtcd(), storetest.NewHistory()
			d, w := e.open(t)
			commit(t, d, h, "k", "v")
			<-time.After(2 * time.Second) // then the timer has nothing to write
			e.setFull(true)
			<-time.After(2 * time.Second)
			e.delete(prefix)
			<-time.After(2 * time.Second)
			time.AfterFunc(10*time.Second, func() { e.setFull(false) })
			began := time.Now()
			err := d.Commit()
			if took := time.Since(began); err != nil || took < 10*time.Second {
				t.Errorf("%s: a read is answered after %v: %v", prefix, took, err)
			}
			w.kill()
			<-d.Lost()
			d.Close()
			after, _ := e.dir(t, t.Context(), "second:9999")
			checkKept(t, h, after, prefix)
		})
	}
}

// Ensure that a delete of many keys counts as done only once none of them is there.
func TestEtcdIsDone(t *testing.T) {
	e := newFakeEtcd()
	op := deleteKeys([]byte("k/1"), []byte("k/3"))
	keys := op.keys()
	for _, step := range []struct {
		op   operation
		done bool
	}{{putKey([]byte("k/2"), nil), false}, {op, true}, {putKey([]byte("k/3"), nil), true}} {
		answer, err := e.txn(transaction{Success: []operation{step.op, {Range: &keys}}})
		if err != nil {
			t.Fatal(err)
		}
		if got := op.isDone(answer.read(1).KVs); got != step.done {
			t.Errorf("it is done: %t, want %t", got, step.done)
		}
	}
}

// Ensure that an answered write stays although somebody deletes its piece, the last one or the one
// before, while a Commit is taken back and the log is read, before whichever request that is.
func TestEtcdGoneWhileTakenBack(t *testing.T) {
	for behind := range 2 {
		for n, isReached := 1, true; isReached; n++ {
			isReached = etcdGoneWhileTakenBack(t, behind, n)
		}
	}
}

// etcdGoneWhileTakenBack deletes the piece that has so many behind it at the n-th request of a Commit
// whose second one finds etcd full. It reports whether there were that many.
func etcdGoneWhileTakenBack(t *testing.T, behind, n int) (isReached bool) {
	synctest.Test(t, func(t *testing.T) {
		e, h := newFakeEtcd(), storetest.NewHistory()
		d, w := e.open(t)
		commit(t, d, h, "k", "one")
		<-time.After(2*time.Second + beatTime/2) // then the timer has nothing to write
		commit(t, d, h, "k", "two")
		var pieces []keyValue // the newest first
		for _, kv := range e.kvs {
			if strings.HasPrefix(string(kv.Key), "kv/d/") {
				pieces = append(pieces, kv)
			}
		}
		slices.SortFunc(pieces, func(a, b keyValue) int { return cmp.Compare(b.Revision, a.Revision) })

		full, gone := w.count()+2, w.count()+n
		w.mu.Lock()
		w.before = func(number int) {
			if number == gone {
				e.delete(string(pieces[behind].Key))
			}
			if number == full {
				e.setFull(true)
				time.AfterFunc(10*time.Second, func() { e.setFull(false) })
			}
		}
		w.mu.Unlock()
		large := make([]byte, 300<<10) // two requests
		rand.Read(large)
		d.Put("k", string(large))
		h.Done.Put("k", string(large))
		err := d.Commit()
		isReached = w.count() >= gone
		switch {
		case errors.Is(err, kvstore.ErrTakenBack):
			h.Done = h.Told.Clone()
		case err != nil:
			t.Errorf("request %d, %d behind: %v", n, behind, err)
		}
		if h.Told = h.Done.Clone(); !h.Told.Equal(d) {
			t.Errorf("request %d, %d behind: after %v there is not what there should be", n, behind, err)
		}

		<-time.After(25 * time.Second)
		if err := d.Commit(); err != nil {
			t.Errorf("request %d, %d behind: a read: %v", n, behind, err)
		}
		w.kill()
		<-d.Lost()
		d.Close()
		after, _ := e.dir(t, t.Context(), "second:9999")
		checkKept(t, h, after, fmt.Sprintf("request %d, %d behind", n, behind))
	})
	return isReached
}

// Ensure that a server that writes all data again, or takes its lock again, waits for room, whichever
// request finds etcd full.
func TestEtcdFullWhileHealing(t *testing.T) {
	for _, gone := range []string{"kv/d/", "kv/n/STORE", "kv/lock"} {
		for _, hasLooked := range []bool{false, true} {
			for n, isReached := 1, true; isReached; n++ {
				isReached = etcdFullWhileHealing(t, gone, hasLooked, n)
			}
		}
	}
}

// etcdFullWhileHealing deletes the keys that begin with gone, and makes etcd full at the n-th request
// after that. It reports whether there were that many. If the server has just looked at its files, it
// does not look again, but the lock says that they are gone.
func etcdFullWhileHealing(t *testing.T, gone string, hasLooked bool, n int) (isReached bool) {
	synctest.Test(t, func(t *testing.T) {
		e, h := newFakeEtcd(), storetest.NewHistory()
		dir, w := e.dir(t, t.Context(), "first:9999")
		d, err := durable.Open(t.Context(), dir.directory, durable.Options{})
		if err != nil {
			t.Fatal(err)
		}
		commit(t, d, h, "k", "v")
		<-time.After(2*time.Second + beatTime/2) // then the timer has nothing to write
		if hasLooked {
			commit(t, d, h, "k", "v")
		}
		e.delete(gone)
		if hasLooked {
			dir.directory.lock.Verify()
		}
		full := w.count() + n
		w.mu.Lock()
		w.before = func(number int) {
			if number == full {
				e.setFull(true)
				time.AfterFunc(3*time.Second, func() { e.setFull(false) })
			}
		}
		w.mu.Unlock()
		d.Put("k", "w")
		h.Done.Put("k", "w")
		err = d.Commit()
		isEnd := err != nil && gone == "kv/lock" // a server may end, but not lose what was answered
		switch {
		case errors.Is(err, kvstore.ErrTakenBack):
			h.Done = h.Told.Clone()
		case err == nil:
			h.Told = h.Done.Clone()
		case !isEnd:
			t.Errorf("%s, request %d: %v", gone, n, err)
		}
		isReached = w.count() >= full
		<-time.After(15 * time.Second)
		if err := d.Commit(); err != nil && !isEnd {
			t.Errorf("%s, request %d: a read: %v", gone, n, err)
		}
		w.kill()
		<-d.Lost()
		d.Close()
		after, _ := e.dir(t, t.Context(), "second:9999")
		checkKept(t, h, after, fmt.Sprint(gone, ", request ", n))
	})
	return isReached
}

// Ensure that with -fsync 1s, where answered data may not be in etcd yet, that data waits for room
// while reads go on.
func TestEtcdFullBeforeTheTimer(t *testing.T) {
	for wait := time.Duration(0); wait < 2*time.Second; wait += 100 * time.Millisecond {
		synctest.Test(t, func(t *testing.T) {
			e, h := newFakeEtcd(), storetest.NewHistory()
			dir, w := e.dir(t, t.Context(), "first:9999")
			d, err := durable.Open(t.Context(), dir.directory, durable.Options{Fsync: time.Second})
			if err != nil {
				t.Fatal(err)
			}
			commit(t, d, h, "k", "v")
			<-time.After(wait)
			commit(t, d, h, "large", strings.Repeat("x", 3<<20)+rand.Text())
			e.setFull(true)
			for range 10 {
				began := time.Now()
				if err := d.Commit(); err != nil || time.Since(began) > time.Second {
					t.Errorf("a read: after %v: %v", time.Since(began), err)
				}
				<-time.After(time.Second)
			}
			e.setFull(false)
			<-time.After(5 * time.Second)
			commit(t, d, h, "k", "w")
			<-time.After(5 * time.Second)
			w.kill()
			<-d.Lost()
			d.Close()
			after, _ := e.dir(t, t.Context(), "second:9999")
			checkKept(t, h, after, wait.String())
		})
	}
}

// Ensure that the request that takes a Commit back does no harm if it arrives once more, later,
// even if the pieces' keys were read again in between.
func TestEtcdTakesBackOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e, h := newFakeEtcd(), storetest.NewHistory()
		dir, w := e.dir(t, t.Context(), "first:9999")
		d, err := durable.Open(t.Context(), dir.directory, durable.Options{})
		if err != nil {
			t.Fatal(err)
		}
		commit(t, d, h, "k", "v")
		<-time.After(beatTime / 2)
		large := make([]byte, 300<<10)
		rand.Read(large)
		full := w.count() + 3
		w.mu.Lock()
		w.before = func(number int) {
			if number == full {
				e.setFull(true)
			}
		}
		w.mu.Unlock()
		d.Put("large", string(large))
		if err := d.Commit(); !errors.Is(err, kvstore.ErrTakenBack) {
			t.Fatal(err)
		}

		e.setFull(false)
		<-time.After(2 * time.Second)
		w.mu.Lock()
		w.before = nil
		e.most = 60 << 10 // so that the next piece is refused, and the keys are read again
		sent := slices.Clone(w.sent)
		w.mu.Unlock()
		commit(t, d, h, "large", string(large[:100<<10]))
		w.kill()
		<-d.Lost()
		d.Close()
		e.mu.Lock()
		for _, t := range sent {
			if len(t.Success) == 1 && t.Success[0].Delete != nil {
				e.txn(t)
			}
		}
		e.mu.Unlock()
		after, _ := e.dir(t, t.Context(), "second:9999")
		checkKept(t, h, after, "then")
	})
}

// Ensure that a server that has lost its lock does not return from a Commit as if it was only taken
// back: what it has in memory is old.
func TestEtcdNotTakenBackWithoutALock(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e, h := newFakeEtcd(), storetest.NewHistory()
		d, w := e.open(t)
		commit(t, d, h, "k", "old")
		w.dir.lock.stop()           // the process stands still: it shows no signs of life
		end := w.dir.access.begin() // and does not check
		second, _ := e.open(t)      // takes over
		second.Set("k", "new")
		if err := second.Commit(); err != nil {
			t.Fatal(err)
		}
		e.setFull(true)
		time.AfterFunc(time.Second, end) // now it can find out
		d.Put("k", strings.Repeat("x", 100))
		if err := d.Commit(); err == nil || errors.Is(err, kvstore.ErrTakenBack) {
			t.Errorf("Commit without the lock: %v", err)
		}
		<-time.After(2 * time.Second) // then the first one may check again
		second.Close()
		d.Close()
	})
}

// Ensure that a Commit is taken back although answers to other requests were lost: to a sign of
// life, and to a Commit before it.
func TestEtcdTakenBackAfterLostAnswers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e, h := newFakeEtcd(), storetest.NewHistory()
		d, w := e.open(t)
		lose := func() {
			w.mu.Lock()
			w.at, w.fault = w.requests+1, lostAnswer
			w.mu.Unlock()
		}
		<-time.After(beatTime / 2)
		lose()
		commit(t, d, h, "k", "v")
		<-time.After(5500 * time.Millisecond)
		lose()
		<-time.After(time.Minute)
		e.setFull(true)
		time.AfterFunc(10*time.Second, func() { e.setFull(false) })
		d.Put("k", "x")
		began := time.Now()
		if err := d.Commit(); !errors.Is(err, kvstore.ErrTakenBack) || time.Since(began) > time.Second {
			t.Errorf("after %v: %v", time.Since(began), err)
		}
		d.Close()
		after, _ := e.dir(t, t.Context(), "second:9999")
		checkKept(t, h, after, "then")
	})
}

// Ensure that nobody waits in a cluster that becomes full while the log goes on in a new file, or
// is compacted, whichever request finds that out, and that nothing is left of a file that was not
// made.
func TestEtcdRotationWhileFull(t *testing.T) {
	t.Parallel()
	for n, isReached := 1, true; isReached; n++ {
		synctest.Test(t, func(t *testing.T) {
			e, h := newFakeEtcd(), storetest.NewHistory()
			d, w := e.open(t)
			value := func() string { return rand.Text() + strings.Repeat("x", 1300) }
			for range 2 {
				commit(t, d, h, "k", value())
			}
			d.AwaitCompaction()
			<-time.After(beatTime / 2)

			full := w.count() + n
			w.mu.Lock()
			w.before = func(number int) {
				if number == full {
					e.setFull(true)
				}
			}
			w.mu.Unlock()
			prompt := func(what string, do func() error) {
				t.Helper()
				began := time.Now()
				err := do()
				if took := time.Since(began); took > time.Second {
					t.Errorf("request %d: %s takes %v", n, what, took)
				}
				if errors.Is(err, kvstore.ErrTakenBack) {
					h.Done = h.Told.Clone()
				} else if err != nil {
					t.Errorf("request %d: %s: %v", n, what, err)
				}
				h.Told = h.Done.Clone()
			}
			time.AfterFunc(time.Minute, func() { e.setFull(false) }) // or it would wait for ever
			for range 2 {
				text := value()
				d.Set("k", text)
				h.Done.Set("k", text)
				prompt("a Commit", d.Commit)
				prompt("a compaction", func() error { d.AwaitCompaction(); return nil })
			}
			for range 3 {
				<-time.After(time.Second)
				prompt("a read", d.Commit)
			}
			if isReached = w.count() >= full; n%2 == 0 { // now it ends in a full cluster
				prompt("Close", d.Close)
				e.setFull(false)
				<-time.After(lockTime)
			} else {
				e.setFull(false)
				<-time.After(2 * time.Second)
				for range 5 {
					commit(t, d, h, "k", rand.Text()+strings.Repeat("z", 400))
				}
				d.AwaitCompaction()
				for _, kv := range e.list(keyRange{Key: []byte("kv/n/"), End: []byte("kv/n0")}).KVs {
					if strings.HasSuffix(string(kv.Key), ".tmp") {
						t.Errorf("request %d: %s is left", n, kv.Key)
					}
				}
				w.kill()
				<-d.Lost()
				d.Close()
			}
			after, _ := e.dir(t, t.Context(), "second:9999")
			checkKept(t, h, after, fmt.Sprintf("request %d", n))
		})
	}
}

// Ensure that a store that only overwrites its data does not fill a small cluster: little data, and
// data that is larger than the quota until it is packed.
func TestEtcdQuotaOfOverwrites(t *testing.T) {
	t.Parallel()
	random := make([]byte, 16<<10)
	rand.Read(random)
	large := shrinking(1<<20, 50)
	for what, c := range map[string]struct {
		writes int
		value  func(i int) string
	}{
		"little data":            {300, func(i int) string { random[i]++; return string(random) }},
		"data that shrinks well": {130, func(int) string { return large }},
	} {
		synctest.Test(t, func(t *testing.T) {
			e, h := newFakeEtcd(), storetest.NewHistory()
			e.quota = 4 << 20
			dir, _ := e.dir(t, t.Context(), "first:9999")
			d, err := durable.Open(t.Context(), dir.directory, durable.Options{})
			if err != nil {
				t.Fatal(err)
			}
			for i := range storetest.Fewer(c.writes, 10) {
				text := c.value(i)
				if err := d.Room("", int64(len(text)), 0); err != nil {
					t.Fatalf("%s: write number %d: %v", what, i, err)
				}
				d.Set(fmt.Sprint(i%5), text)
				h.Done.Set(fmt.Sprint(i%5), text)
				if err := d.Commit(); err != nil {
					t.Fatalf("%s: write number %d: %v", what, i, err)
				}
				h.Told = h.Done.Clone()
				<-time.After(100 * time.Millisecond)
			}
			d.Close()
			after, _ := e.dir(t, t.Context(), "second:9999")
			checkKept(t, h, after, what)
		})
	}
}
