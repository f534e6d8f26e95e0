package etcd

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"maps"
	"math"
	"net/http"
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
		// A server that asks without a pause is killed, so that the test ends.
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

			if err := room.RoomFor(100, 0, true); !errors.Is(err, syscall.ENOSPC) ||
				!strings.Contains(err.Error(), "alarm disarm") {
				t.Errorf("a write to a full cluster: %v", err)
			}

			// For longer than patienceTime: a cluster that is full is not silent.
			for range 20 {
				d.Get("k")
				if err := d.Commit(); err != nil {
					t.Fatalf("a read from a full cluster: %v", err)
				}
				<-time.After(time.Second)
			}

			if stage := dir.opts.Status.Stage(); !strings.Contains(stage, "etcd is full") {
				t.Errorf("the standby says %q", stage)
			}

			time.AfterFunc(cut-20*time.Second, func() { w.setCut(true) })
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

		if err := w.dir.RoomFor(100, 0, false); err != nil {
			t.Errorf("there is room again: %v", err)
		}
		commit(t, d, h, "k", "v")
		d.Close()
	})
}

// Ensure that a Commit to a cluster that has become full by surprise says at once that there is no
// room, also if nothing is new; and that the next Commit with room keeps all, or the end of the
// store, which waits for it.
func TestEtcdFullInACommit(t *testing.T) {
	for _, fsync := range []time.Duration{durable.FsyncAlways, time.Second} {
		for _, closes := range []bool{false, true} {
			synctest.Test(t, func(t *testing.T) { fullInACommit(t, fsync, closes) })
		}
	}
}

// fullInACommit fills a cluster between two Commits of a store with that Options.Fsync.
func fullInACommit(t *testing.T, fsync time.Duration, closes bool) {
	e, h, status := newFakeEtcd(), storetest.NewHistory(), new(storage.Status)
	dir, _ := e.dir(t, t.Context(), "first:9999")
	d, err := durable.Open(t.Context(), dir, durable.Options{Fsync: fsync, Status: status})
	if err != nil {
		t.Fatal(err)
	}
	commit(t, d, h, "k", "v")
	<-time.After(3 * time.Second)
	_, fsyncs, _ := status.Fsyncs.Read()

	// The first Commit with -fsync 1s does not wait for the disk.
	e.setFull(true)
	for i := range 4 {
		if i < 3 {
			d.Put("k", fmt.Sprint(i))
			h.Done.Put("k", fmt.Sprint(i))
		}
		began := time.Now()
		err := d.Commit()
		mayPass := i == 0 && fsync != durable.FsyncAlways
		if !errors.Is(err, storage.ErrNoRoom) && !mayPass || time.Since(began) > beatTime {
			t.Errorf("fsync %v: Commit number %d to a full cluster: %v, after %v", fsync, i, err,
				time.Since(began))
		}
		<-time.After(fsync + time.Second)
	}
	if path := d.Syncing(); !strings.HasSuffix(path, "/seg-1.log") {
		t.Errorf("fsync %v: a stop would wait for %q", fsync, path)
	}
	if _, n, _ := status.Fsyncs.Read(); n != fsyncs {
		t.Errorf("fsync %v: %d fsyncs count that found no room", fsync, n-fsyncs)
	}

	// Once there is room, signs of life notice it, and what was begun goes on where it was.
	time.AfterFunc(5*time.Second, func() { e.setFull(false) })
	if !closes {
		<-time.After(7 * time.Second)
		if err := d.Commit(); err != nil {
			t.Errorf("fsync %v: there is room again: %v", fsync, err)
		}
	}
	h.Told = h.Done.Clone()
	if err := d.Close(); err != nil {
		t.Errorf("fsync %v: Close: %v", fsync, err)
	}
	after, _ := e.dir(t, t.Context(), "second:9999")
	checkKept(t, h, after, "after the full cluster")
}

// Ensure that a Commit that finds no room, and then that the lock is lost, says that: nothing may be
// answered any more.
func TestEtcdFullAndCutOff(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newFakeEtcd()
		d, w := e.open(t)
		e.setFull(true)
		d.Put("k", "v")
		if err := d.Commit(); !errors.Is(err, storage.ErrNoRoom) {
			t.Errorf("a full cluster: %v", err)
		}

		w.setCut(true)
		<-time.After(freshTime + time.Second)
		if err := d.Commit(); err == nil || errors.Is(err, storage.ErrNoRoom) {
			t.Errorf("cut off from a full cluster: %v", err)
		}
		d.Close()
	})

	// There is room again before it is cut off, so a Sync tries to find out what has arrived.
	synctest.Test(t, func(t *testing.T) {
		e := newFakeEtcd()
		dir, w, lock := e.locked(t)
		defer lock.Close()
		f, err := dir.Create("file")
		e.setFull(true)
		_, writeErr := f.WriteAt([]byte("x"), 0)
		fullErr := f.Sync()
		e.setFull(false)
		<-time.After(2 * beatTime)
		w.setCut(true)
		if err := errors.Join(err, writeErr); err != nil || !errors.Is(fullErr, storage.ErrNoRoom) ||
			f.Sync() == nil {
			t.Errorf("a Sync without room: %v, and once cut off it succeeds: %v", fullErr, err)
		}
	})
}

// Ensure that a piece that etcd has put, and refused because it has filled the quota, does no harm
// when the next one joins those before it.
func TestEtcdRefusedAndDone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newFakeEtcd()
		dir, w, lock := e.locked(t)
		defer lock.Close()
		f := create(t, dir, "file")
		const small = 100 * joinLeast // bytes, with which the rest is too large not to be joined
		at, text := int64(0), []byte(randomText(small+joinBytes-small/2))
		for range joinLeast {
			write(t, f, &at, text[at:at+100])
		}

		w.suffer(fills, 0)
		_, writeErr := f.WriteAt(text[at:at+100], at)
		if err := f.Sync(); !errors.Is(err, storage.ErrNoRoom) {
			t.Errorf("a write that fills the cluster: %v", err)
		}
		_, moreErr := f.WriteAt(text[at+100:], at+100)
		e.setFull(false)
		syncErr := f.Sync() // before a survey comes, which would settle it
		for errors.Is(syncErr, storage.ErrNoRoom) {
			<-time.After(pauseTime)
			syncErr = f.Sync()
		}
		if err := errors.Join(writeErr, moreErr, syncErr); err != nil {
			t.Error(err)
		}

		reader, _ := e.dir(t, t.Context(), "")
		again, size, err := reader.Open("file")
		if err != nil {
			t.Fatal(err)
		}
		got, err := io.ReadAll(io.NewSectionReader(again, 0, size))
		if !bytes.Equal(got, text) {
			t.Errorf("%d of %d bytes are read, or others: %v", len(got), len(text), err)
		}
	})
}

// Ensure that a server whose pieces were deleted while etcd is full writes all again once there is
// room, before it answers or ends: only it has the data.
func TestEtcdGoneWhileFull(t *testing.T) {
	for _, then := range []string{"a read", "a write", "a stop"} {
		synctest.Test(t, func(t *testing.T) {
			e, h := newFakeEtcd(), storetest.NewHistory()
			d, _ := e.open(t)
			for i := range 20 {
				commit(t, d, h, fmt.Sprint("k", i), rand.Text())
			}
			<-time.After(10 * time.Second)
			e.setFull(true)
			<-time.After(3 * time.Second)
			e.delete("kv/d/")
			time.AfterFunc(30*time.Second, func() { e.setFull(false) })

			switch then {
			case "a write":
				commit(t, d, h, "k", "v")
			case "a read":
				<-time.After(3 * time.Second)
				d.Get("k1")
				if err := storetest.Commit(d); err != nil {
					t.Error(err)
				}
			}
			if err := d.Close(); err != nil {
				t.Error(err)
			}
			after, _ := e.dir(t, t.Context(), "second:9999")
			checkKept(t, h, after, "after "+then+" in a full cluster")
		})
	}
}

// Ensure that little of what is written to a full cluster waits in memory, and all of it arrives.
func TestEtcdFullWhileAFileIsMade(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newFakeEtcd()
		dir, _, lock := e.locked(t)
		defer lock.Close()
		f := create(t, dir, "snapshot")

		e.setFull(true)
		const parts = 8
		part, done := []byte(randomText(pieceMost)), make(chan error, 1)
		go func() {
			var err error
			for i := range int64(parts) {
				_, writeErr := f.WriteAt(part, i*pieceMost)
				err = errors.Join(err, writeErr)
			}
			done <- errors.Join(err, f.Sync())
		}()

		<-time.After(10 * time.Second)
		if n := len(f.(*pieceFile).buf); n > bufMost+pieceMost {
			t.Errorf("%d bytes wait in memory", n)
		}
		e.setFull(false)
		if err := <-done; err != nil || f.(*pieceFile).length() != parts*pieceMost {
			t.Errorf("then the file has %d bytes: %v", f.(*pieceFile).length(), err)
		}
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
		for w.dir.RoomFor(int64(len(value)), 0, false) == nil && n < 200 {
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
			if err := w.dir.RoomFor(10, 0, true); err != nil {
				t.Fatalf("Delete number %d of %d: %v", i, n, err)
			}
			d.Delete(fmt.Sprint(i))
			if err := d.Commit(); err != nil {
				t.Fatal(err)
			}
			d.AwaitCompaction()
		}

		<-time.After(3 * surveyTime) // at the end of one etcd forgets, and the next one sees it
		if err := w.dir.RoomFor(int64(len(value)), 0, false); err != nil {
			t.Errorf("after all was deleted: %v", err)
		}
		if e.forgot == 0 {
			t.Error("etcd keeps what was deleted")
		}
		d.Close()
	})
}

// Ensure that the quota counts whether members have it in their metrics, or in their status, as
// etcd 3.6 has; and that one that was raised is noticed there.
func TestEtcdQuotaOfAnyVersion(t *testing.T) {
	for _, is36 := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			const quota = 8 << 20
			e := newFakeEtcd()
			e.quota, e.is36 = quota, is36
			dir, _, lock := e.locked(t)

			<-time.After(surveyTime)
			if dir.RoomFor(quota/2, 0, false) != nil || dir.RoomFor(quota, 0, false) == nil {
				t.Errorf("3.6 %v: the quota of %d bytes does not count", is36, quota)
			}

			if segment, _, _ := dir.directory.Sizes(); segment != quota/16 {
				t.Errorf("3.6 %v: segments of %d bytes at a quota of %d", is36, segment, quota)
			}

			e.mu.Lock()
			e.quota = 3 * quota
			e.mu.Unlock()
			<-time.After(2 * surveyTime)
			if is36 && dir.RoomFor(quota, 0, false) != nil {
				t.Error("a raised quota is not noticed")
			}
			lock.Close()
		})
	}
}

// Ensure that etcd is asked again to forget old revisions if no member has answered, and not if one
// has.
func TestEtcdForgetsAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newFakeEtcd()
		dir, w := e.dir(t, t.Context(), "")
		e.put("key", "value")
		c := dir.client
		c.garbage.Store(garbageMost - 1)
		if c.forget(t.Context(), false); e.forgot > 0 {
			t.Error("etcd is asked to forget little garbage")
		}
		c.garbage.Store(garbageMost)
		for _, isCut := range []bool{true, false} {
			w.setCut(isCut)
			c.forget(t.Context(), false)
			if has := e.forgot > 0; has == isCut || (c.garbage.Load() == 0) != has {
				t.Errorf("cut off %v: revision %d is forgotten, %d bytes are not", isCut, e.forgot,
					c.garbage.Load())
			}
		}
	})
}

// Ensure that all bytes of a removed file, and what its pieces take beside them, count as what etcd
// is to forget.
func TestEtcdGarbageOfAFile(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newFakeEtcd()
		dir, _, lock := e.locked(t)
		_, otherErr := dir.Create("other")
		f, err := dir.Create("file")
		if err := errors.Join(err, otherErr); err != nil {
			t.Fatal(err)
		}

		at := int64(0)
		for range 2*joinMost + 10 {
			write(t, f, &at, []byte("small"))
		}
		pieces := e.list(*dir.all("d/")).Count
		before := dir.client.garbage.Load()
		if err := dir.Remove("file"); err != nil {
			t.Fatal(err)
		}
		if got, want := dir.client.garbage.Load()-before, at+pieces*pieceExtra; got != want {
			t.Errorf("a file of %d bytes in %d pieces is %d bytes of garbage, want %d", at, pieces, got,
				want)
		}
		lock.Close()
	})
}

// Ensure that of what was written before only much data is hoped to shrink as that did.
func TestEtcdRoomForWhatMayNotShrink(t *testing.T) {
	dir, _ := newFakeEtcd().dir(t, t.Context(), "")
	r := &dir.client.room
	r.quota.Store(80 << 20)
	r.spent.Store(1 << 20)
	r.plain.Store(10 << 20)
	for size, room := range map[int64]int64{pieceMost: pieceMost, 3 * pieceMost: 3 * pieceMost / 10} {
		margin := int64(10 << 20)
		for _, more := range []int64{0, -1} {
			r.limit.Store(r.spent.Load() + margin + room + more)
			if err := dir.RoomFor(size, 0, false); (err == nil) != (more == 0) {
				t.Errorf("room for %d bytes where there is room for %d: %v", size, room+more, err)
			}
		}
	}
}

// roundTrip is an http.RoundTripper.
type roundTrip func(r *http.Request) (*http.Response, error)

func (f roundTrip) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

// Ensure that what is written while the members are asked for their sizes counts: it may not be in
// these.
func TestEtcdQuotaCountsWritesBesideASurvey(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newFakeEtcd()
		dir, w := e.dir(t, t.Context(), "")
		e.put("kv/n/file", "id")
		c := dir.client
		c.quota.Store(64 << 20)

		c.survey(t.Context())
		room := c.limit.Load() - c.spent.Load()
		const written = 3 << 20
		c.http.Transport = roundTrip(func(r *http.Request) (*http.Response, error) {
			answer, err := w.RoundTrip(r)
			c.spent.Add(written)
			return answer, err
		})

		c.survey(t.Context())
		if left := c.limit.Load() - c.spent.Load(); left != room-int64(len(c.members))*written {
			t.Errorf("%d bytes are left of %d after %d writes of %d", left, room, len(c.members), written)
		}
	})
}

// tryToDo does a request about key with that many bytes of key and values, if there is room for it.
// removes is as for kvstore.Store's Room.
func tryToDo(t *testing.T, d *durable.Store, key string, bytes, removes int, do func()) (done bool) {
	t.Helper()
	done = d.Room(key, int64(bytes), removes) == nil
	if done {
		do()
	}

	if err := d.Commit(); err != nil {
		t.Fatal(err)
	}
	d.AwaitCompaction()
	<-time.After(10 * time.Millisecond)
	return done
}

// randomText returns a text of that many bytes, which cannot be packed.
func randomText(size int) string {
	text := make([]byte, size)
	rand.Read(text)
	return string(text)
}

// Ensure that in a nearly full cluster Removes and Takes, however many come, leave the room that it
// takes to delete every key.
func TestEtcdQuotaKeepsRoomForDeletes(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		quota             int64
		valueSize, perKey int
	}{{4 << 20, 1000, 5}, {2 << 20, 300, 3}}[:storetest.Fewer(2, 2)] {
		synctest.Test(t, func(t *testing.T) {
			e := newFakeEtcd()
			e.quota = c.quota
			dir, _ := e.dir(t, t.Context(), "first:9999")
			d, err := durable.Open(t.Context(), dir.directory, durable.Options{})
			if err != nil {
				t.Fatal(err)
			}

			// Fill the cluster with keys of some values.
			const keySize = 20
			size := keySize + c.valueSize
			var keys, values []string
			for n, hasRoom := 0, true; hasRoom; n++ {
				if n%c.perKey == 0 {
					keys = append(keys, randomText(keySize))
				}
				key := keys[len(keys)-1]
				values = append(values, randomText(c.valueSize))
				hasRoom = tryToDo(t, d, key, size, 0, func() { d.Put(key, values[n]) })
			}

			// Remove what can be removed, but of each key one value.
			refused := 0
			for n := 0; refused < 300 && n < len(values)-1; n++ {
				key, isLast := keys[n/c.perKey], n%c.perKey == c.perKey-1
				if !isLast && !tryToDo(t, d, key, size, 1, func() { d.Remove(key, values[n]) }) {
					refused++
				}
			}

			left := slices.Collect(maps.Keys(maps.Collect(d.All())))
			if refused == 0 || len(left) < 20 {
				t.Fatalf("%+v: %d are refused, and there are %d keys", c, refused, len(left))
			}
			for i, key := range left {
				if !tryToDo(t, d, key, 2*len(key), math.MaxInt, func() { d.Delete(key) }) {
					d.Close()
					t.Fatalf("%+v: no room for Delete %d of %d", c, i, len(left))
				}
			}
			if err := d.Close(); err != nil {
				t.Error(err)
			}
		})
	}
}

// Ensure that a compaction leaves room for the Deletes that come before etcd is asked again what
// room it has, however little more than the compaction takes there was.
func TestEtcdCompactionKeepsRoomForDeletes(t *testing.T) {
	const valueSize, deadSize = 5000, 32 << 10
	for more := int64(0); more < valueSize; more += valueSize / int64(storetest.Fewer(8, 4)) {
		keys := 3 + int(more/100)
		synctest.Test(t, func(t *testing.T) {
			e := newFakeEtcd()
			e.quota = 2 << 20
			dir, _ := e.dir(t, t.Context(), "first:9999")
			d, err := durable.Open(t.Context(), dir.directory, durable.Options{})
			if err != nil {
				t.Fatal(err)
			}
			defer d.Close()
			<-time.After(surveyTime * 3 / 2) // from here on no time passes, so no survey gives room

			// Most of the log is dead, and there is no room to compact it.
			r, margin := &dir.client.room, e.quota/8
			r.limit.Store(r.spent.Load())
			for range 3 * margin / deadSize {
				d.Set("dead", randomText(deadSize))
				d.Commit()
			}
			d.Delete("dead")
			for i := range keys {
				d.Put(fmt.Sprint(i), randomText(valueSize))
			}
			if err := d.Commit(); err != nil {
				t.Fatal(err)
			}

			// Each Delete finds a little more room than the one before it, until there is enough for
			// a compaction.
			r.limit.Store(r.spent.Load() + margin/4 + valueSize + more)
			left := -1
			for i := range keys {
				if err := d.Room(fmt.Sprint(i), 10, math.MaxInt); err != nil {
					t.Fatalf("%d: Delete %d of %d, compacted with %d: %v", more, i, keys, left, err)
				}
				d.Delete(fmt.Sprint(i))
				if err := d.Commit(); err != nil {
					t.Fatal(err)
				}

				d.AwaitCompaction()
				if _, hasSegment := dir.names["seg-1.log"]; hasSegment {
					r.limit.Add(valueSize)
				} else if left < 0 {
					left = keys - i - 1
				}
			}
			if left < 1 {
				t.Errorf("%d: the log was compacted with %d of %d keys", more, left, keys)
			}
		})
	}
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
