package etcd

import (
	"bytes"
	"context"
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

				// A standby has taken over, however short away is: the test waits for it.
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

// Ensure that a server that is cut off answers nothing once another one has taken over, even if the
// answer to its last sign of life has come late.
func TestEtcdTakeoverBehindALateAnswer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newFakeEtcd()
		first, w := e.open(t)

		// Halfway between two signs of life: the next request is one.
		<-time.After(3*time.Second + beatTime/2)
		w.mu.Lock()
		w.at, w.fault = w.requests+1, slowAnswer
		w.mu.Unlock()
		<-time.After(beatTime)

		w.setCut(true)
		second, _ := e.open(t)

		first.Get("k")
		done := make(chan error, 1)
		go func() { done <- first.Commit() }()
		synctest.Wait()
		if len(done) > 0 {
			t.Errorf("beside the server that has taken over a Commit after a Get returns %v", <-done)
			done <- nil
		}

		w.setCut(false)
		<-done
		first.Close()
		second.Close()
	})
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
						t.Errorf("a standby says %q", stage)
					}
				}()

				d, err := durable.Open(t.Context(), dir, durable.Options{Status: status})
				if err != nil {
					t.Error(err)
				}

				if status.Stage() != "" || time.Since(status.Confirmed()) > 2*time.Second {
					t.Errorf("the server says %q, and was confirmed %v ago", status.Stage(),
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

		// Of two that both see that the lock is free, only one takes it.
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

		if n := dir.opts.Status.Takeovers.Load(); n != 1 {
			t.Errorf("%d takeovers are counted, want 1", n)
		}
		lock.Close()
	})
}

// Ensure that the number of takeovers goes on after somebody has deleted the lock.
func TestEtcdTakeoversAfterADelete(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newFakeEtcd()
		d, w := e.open(t)

		for range 2 {
			w.kill()
			<-d.Lost()
			d.Close()
			d, w = e.open(t)
		}

		dir, _ := e.dir(t, t.Context(), "standby:9999")
		go func() {
			<-time.After(beatTime) // the standby has seen the lock
			w.kill()
			e.delete("kv/lock")
		}()

		lock, err := dir.Lock(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if n := dir.opts.Status.Takeovers.Load(); n != 2 {
			t.Errorf("%d takeovers are counted, want 2", n)
		}
		lock.Close()
		<-d.Lost()
		d.Close()
	})
}

// Ensure that a clock that jumps costs one more sign of life, and nothing else.
func TestEtcdClockJumps(t *testing.T) {
	for _, jump := range []time.Duration{-time.Hour, time.Hour, 5 * time.Second} {
		synctest.Test(t, func(t *testing.T) {
			e := newFakeEtcd()
			d, w := e.open(t)
			<-time.After(10 * time.Second)

			// Round strips the monotonic reading, so that the times differ as after a jump.
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

				// A standby that has watched the lock, or one that comes when there is none.
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

// Ensure that a lock that is taken again is not put into another cluster, whichever requests arrive
// there, and that if there is a lock but no store, a new store needs most of the members, too.
func TestEtcdLockElsewhere(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e, h := newFakeEtcd(), storetest.NewHistory()
		d, w := e.open(t)
		commit(t, d, h, "k", "v")

		other := newFakeEtcd()
		other.id = "2"

		// For every second request one member is of the other cluster.
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

		e.mu.Lock() // for other, too: a survey may still be under way
		other.put("kv/lock", "{}")
		e.other, e.down = map[string]*fakeEtcd{"b:1": other}, "a:1"
		e.mu.Unlock()
		if _, err := e.tryOpen(t, time.Minute); err == nil || other.kvs["kv/n/STORE"].Key != nil {
			t.Errorf("a new store with one member of two: %v", err)
		}
	})
}

// Ensure that a server does not take the lock of another one in a cluster that is in the place of
// its own now, although its own lock had a higher revision.
func TestEtcdLockOfAnotherElsewhere(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		other, e := newFakeEtcd(), newFakeEtcd()
		_, _, otherLock := other.locked(t)
		defer otherLock.Close()
		e.revision = 1000
		_, _, lock := e.locked(t)
		defer lock.Close()

		theirs := other.copy()
		e.restore(theirs, "2")
		lock.Verify()
		if err := lock.Verify(); !errors.Is(err, ErrTakenOver) {
			t.Errorf("it says %v", err)
		}
		got, want := e.copy().kvs["kv/lock"].Value, theirs.kvs["kv/lock"].Value
		if !bytes.Equal(got, want) {
			t.Errorf("the lock is %s, and was %s", got, want)
		}
	})
}

// Ensure that a server goes on if etcd is put back to a state in which an earlier one had the lock.
func TestEtcdLockOfAnEarlierState(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newFakeEtcd()
		_, _, earlier := e.locked(t)
		before := e.copy()
		earlier.Close()

		_, _, lock := e.locked(t)
		defer lock.Close()
		e.restore(before, e.id)
		<-time.After(3 * surveyTime)
		if err := errors.Join(lock.Verify(), lock.Held()); err != nil {
			t.Error(err)
		}
	})
}

// Ensure that a server to which the answer was lost that it has the lock does not wait for itself.
func TestEtcdLockIsOursAlready(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir, w := newFakeEtcd().dir(t, t.Context(), "new:9999")
		w.at, w.fault = 2, lostAnswer // the first request looks at the lock, this one takes it

		began := time.Now()
		lock, err := dir.Lock(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if took := time.Since(began); took >= lockTime {
			t.Errorf("it takes %v", took)
		}
		if n := dir.opts.Status.Takeovers.Load(); n != 0 {
			t.Errorf("it counts as %d takeovers", n)
		}
		lock.Close()
	})
}

// Ensure that a lock that is missing is not taken if another server has had it since the last look.
func TestEtcdLockWasAnothersMeanwhile(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newFakeEtcd()
		_, _, lock := e.locked(t)
		lock.Close()
		e.delete("kv/lock")

		// Between the look after which the lock is free and the request that takes it.
		dir, w := e.dir(t, t.Context(), "new:9999")
		var mu sync.Mutex // several goroutines send requests
		last, times := time.Time{}, 0
		w.before = func(int) {
			mu.Lock()
			defer mu.Unlock()
			if now := time.Now(); now.Equal(last) && times == 0 {
				times++
				e.put("kv/step", "another's")
			} else {
				last = now
			}
		}

		began := time.Now()
		lock, err := dir.Lock(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		lock.Close() // from here on nobody sends requests
		if took := time.Since(began); times == 0 || took < 2*lockTime {
			t.Errorf("it is taken after %v, and another had it %d times", took, times)
		}
	})
}
