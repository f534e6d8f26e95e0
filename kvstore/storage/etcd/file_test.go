package etcd

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/iotest"
	"testing/synctest"
	"time"

	"kvserver/kvstore/durable"
	"kvserver/kvstore/storage"
	"kvserver/kvstore/storetest"
)

// Ensure that a file in etcd has what was written to it, and ends where it was cut, or where bytes
// before its end were replaced.
func TestEtcdFile(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newFakeEtcd()
		dir, _, lock := e.locked(t)
		defer lock.Close()
		random := rand.New(rand.NewPCG(1, 1))

		for round := range 30 {
			f := create(t, dir, "file")

			var want []byte
			for range 40 {
				at := len(want)
				if random.IntN(3) == 0 {
					at = random.IntN(len(want) + 1)
				}

				switch size := random.IntN(1 << random.IntN(18)); random.IntN(8) {
				case 0:
					if err := f.Truncate(int64(at)); err != nil {
						t.Fatal(err)
					}
					want = want[:at]
				case 1:
					if err := f.Sync(); err != nil {
						t.Fatal(err)
					}
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
					// Bytes that are there already replace nothing.
					copy(b, want[at:min(len(want), at+random.IntN(size+1))])
					if _, err := f.WriteAt(b, int64(at)); err != nil {
						t.Fatal(err)
					}
					if !bytes.HasPrefix(want[at:], b) {
						want = append(want[:at], b...)
					}
				}
			}

			syncErr := f.Sync()
			again, size, err := dir.Open("file")
			if err := errors.Join(syncErr, err); err != nil {
				t.Fatal(err)
			}
			got, err := io.ReadAll(io.NewSectionReader(again, 0, size))
			if !bytes.Equal(got, want) || size != int64(len(want)) || err != nil {
				t.Fatalf("round %d: the file has %d bytes, says %d, want %d, %v", round, len(got),
					size, len(want), err)
			}
		}

		end, err := dir.Extend("file")
		_, writeErr := end.WriteAt([]byte("x"), end.(*pieceFile).size+1)
		if cutErr := end.Truncate(end.(*pieceFile).size + 1); writeErr == nil || cutErr == nil {
			t.Errorf("a file gets a gap: %v, %v, %v", err, writeErr, cutErr)
		}
		if err := dir.Remove("file"); err != nil ||
			e.list(keyRange{Key: dir.key("d/"), End: below(dir.key("d/"))}).Count > 0 {
			t.Errorf("a removed file leaves pieces: %v", err)
		}
	})
}

// create makes a file, and fails the test if that fails.
func create(t *testing.T, dir storage.Directory, name string) storage.File {
	t.Helper()
	f, err := dir.Create(name)
	if err != nil {
		t.Fatal(err)
	}
	return f
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
		f := create(t, dir, "a")

		// Slow enough for renames and writes to overlap.
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
		if err := lock.Held(); err != nil || f.(*pieceFile).length() != 50 {
			t.Errorf("after renames beside writes: %v, and %d bytes", err, f.(*pieceFile).length())
		}
		lock.Close()
	})
}

// Ensure that whichever answer about a file of small writes comes too late, the file has all that
// was written, and nothing counts as gone.
func TestEtcdLateAnswers(t *testing.T) {
	t.Parallel()
	for _, data := range []string{randomText(300 << 10), shrinking(160<<10, 16)} {
		for n, reached := 1, true; reached; n = storetest.Next(n, 5) {
			reached = writesBeside(t, data, tooLate, n, 0)
		}
	}
}

// Ensure that whichever request about a file of small writes arrives too late, before or behind one
// that was sent in its place, the file has all that was written, and nothing counts as gone.
func TestEtcdLateRequests(t *testing.T) {
	t.Parallel()
	data := randomText(300 << 10)
	for n, reached := 1, true; reached; n = storetest.Next(n, 4) {
		for by := 4; by < 6; by++ {
			reached = writesBeside(t, data, delayed, n, by)
		}
	}
}

// writesBeside writes data to a file in small pieces, while the n-th request suffers the fault,
// with a lateBy of by. It fails the test if a reader does not get all that was written, or if
// something counts as gone. reached says whether there were n requests.
func writesBeside(t *testing.T, data string, fault etcdFault, n, by int) (reached bool) {
	synctest.Test(t, func(t *testing.T) {
		e := newFakeEtcd()
		dir, w := e.dir(t, t.Context(), "")
		w.at, w.fault, w.lateBy = n, fault, by
		lock, err := dir.Lock(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		defer lock.Close()

		f := create(t, dir, "file")
		for i, at := 0, int64(0); at < int64(len(data)); i++ {
			size := int64(smallSize(i))
			write(t, f, &at, []byte(data[at:min(at+size, int64(len(data)))]))
			if fault == delayed {
				<-time.After(surveyTime / 9) // so that a check may find what is late
			}
			if err := lock.Held(); err != nil {
				t.Fatalf("request %d, late by %d: %v", n, by, err)
			}
		}
		reached = w.count() >= n

		// A late piece is counted by the next check.
		if fault == delayed {
			<-time.After(2 * surveyTime)
		}
		pieces := e.list(keyRange{Key: dir.key("d/"), End: below(dir.key("d/"))}).Count
		if counted := dir.pieces.Load(); counted != pieces {
			t.Errorf("request %d, late by %d: %d pieces are counted, and %d are there", n, by, counted,
				pieces)
		}

		reader, _ := e.dir(t, t.Context(), "")
		again, size, err := reader.Open("file")
		if err != nil {
			t.Fatal(err)
		}
		got, err := io.ReadAll(io.NewSectionReader(again, 0, size))
		if string(got) != data || err != nil {
			t.Errorf("request %d, late by %d: other %d bytes are read: %v", n, by, len(got), err)
		}
	})
	return reached
}

// Ensure that a late write, whose piece is joined with others afterwards, does not count as
// something gone; nor does a write that arrives twice, the second time after a join, before another
// is lost.
func TestEtcdLateThenJoined(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newFakeEtcd()
		dir, w, lock := e.locked(t)
		defer lock.Close()
		f := create(t, dir, "file")

		random := make([]byte, 300<<10)
		rand.NewChaCha8([32]byte{2}).Read(random)
		at := int64(0)
		put := func(size int64) {
			t.Helper()
			write(t, f, &at, random[at:at+size])
			<-time.After(surveyTime / 3)
			if err := lock.Held(); err != nil {
				t.Fatalf("behind %d bytes: %v", at, err)
			}
		}

		put(1 << 10)
		w.suffer(delayed, 4)
		put(17 << 10) // the put takes too long, and two parts are put in its place
		for range 30 {
			put(1 << 10)
		}

		first := w.lastSent()
		for range joinMost + 1 {
			put(100)
		}
		e.arrive(first)
		put(1 << 10)
		w.suffer(lostRequest, 0)
		put(40 << 10)
		<-time.After(2 * surveyTime)
		put(1)
	})
}

// Ensure that writes that arrive twice, the second one between the two reads of a look at the
// pieces, do not count as something gone.
func TestEtcdLateBesideALook(t *testing.T) {
	for at := 1; at < 8; at++ { // the request of the look before which it arrives
		synctest.Test(t, func(t *testing.T) {
			e := newFakeEtcd()
			dir, w, lock := e.locked(t)
			defer lock.Close()
			f := create(t, dir, "file")

			offset, sent := int64(0), [2]transaction{}
			for i := range joinMost + 2 {
				write(t, f, &offset, []byte("hello"))
				if i < len(sent) {
					sent[i] = w.lastSent()
				}
			}

			e.arrive(sent[0])
			w.mu.Lock()
			first := w.requests
			w.before = func(n int) {
				if n == first+at {
					e.arrive(sent[1])
				}
			}
			w.mu.Unlock()

			<-time.After(5 * surveyTime)
			if err := lock.Held(); err != nil {
				t.Errorf("before request %d: %v", at, err)
			}
		})
	}
}

// Ensure that as many pieces are counted as there are, whatever was written, joined and cut off
// before a look at them.
func TestEtcdCountAfterALook(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newFakeEtcd()
		dir, _, lock := e.locked(t)
		defer lock.Close()
		f, random := create(t, dir, "file").(*pieceFile), rand.New(rand.NewPCG(1, 1))
		for i := range 250 {
			text := []byte(randomText(1 + random.IntN(100)))
			if random.IntN(40) == 0 {
				text = []byte(randomText(2 * pieceFirst))
			}
			at := f.length()
			if random.IntN(40) == 0 {
				at = random.Int64N(at + 1)
			}
			write(t, f, &at, text)

			var err error
			if random.IntN(10) == 0 {
				end := f.access.enter()
				err = f.settle(nil)
				end()
			}
			pieces := e.list(*dir.all("d/")).Count
			if counted := dir.pieces.Load(); err != nil || counted != pieces {
				t.Fatalf("write %d: %d pieces are counted, and %d are there: %v", i, counted, pieces, err)
			}
		}
	})
}

// Ensure that as many pieces are counted as there are if the answer to a write came too late, also
// to one that joins pieces.
func TestEtcdCountAfterALateAnswer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newFakeEtcd()
		dir, w, lock := e.locked(t)
		defer lock.Close()
		f := create(t, dir, "file")

		for i, at := 0, int64(0); i < 100; i++ {
			w.suffer(tooLate, 0)
			write(t, f, &at, []byte(randomText(2<<10)))
			pieces := e.list(*dir.all("d/")).Count
			if counted := dir.pieces.Load(); counted != pieces {
				t.Fatalf("write %d: %d pieces are counted, and %d are there", i, counted, pieces)
			}
		}
		if err := lock.Held(); err != nil {
			t.Error(err)
		}
	})
}

// arrive has a transaction arrive that was sent before.
func (e *fakeEtcd) arrive(t transaction) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.txn(t)
}

// lastSent returns the transaction that was sent last.
func (w *etcdWire) lastSent() transaction {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.sent[len(w.sent)-1]
}

// suffer has the next request suffer the fault.
func (w *etcdWire) suffer(fault etcdFault, lateBy int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.at, w.fault, w.lateBy = w.requests+1, fault, lateBy
}

// Ensure that a key of somebody else among a file's pieces hides no deletion, and does not end a
// server that can write all its data again.
func TestEtcdKeyAmongPieces(t *testing.T) {
	for _, deleted := range [][]string{{"kv/d/%s/00000002", "kv/d/%s/00000003"}, {"kv/n/file"}} {
		synctest.Test(t, func(t *testing.T) {
			e := newFakeEtcd()
			dir, _, lock := e.locked(t)
			defer lock.Close()

			f := create(t, dir, "file")
			at := int64(0)
			for range 6 * (len(deleted) - 1) {
				write(t, f, &at, []byte("hello"))
			}
			write(t, f, &at, []byte("hello"))

			id := f.(*pieceFile).id
			e.put("kv/d/"+id+"/~", "x")
			for _, key := range deleted {
				e.delete(strings.Replace(key, "%s", id, 1))
			}

			_, err := f.WriteAt([]byte("more"), at)
			if err := errors.Join(err, f.Sync()); err != nil {
				t.Errorf("%s is deleted: %v", deleted, err)
			}
			<-time.After(5 * surveyTime)
			if lock.Held() == nil {
				t.Errorf("%s is deleted, and that was not found out", deleted)
			}
		})
	}
}

// Ensure that if a request arrives too late, and the process is killed at some request after that,
// the next one has all that was answered.
func TestEtcdKilledAfterALateRequest(t *testing.T) {
	t.Parallel()
	for n, reached := 1, true; reached; n = storetest.Next(n, 6) {
		for by := 4; by < 8; by++ {
			at := n + by + (7*n+11*by)%30
			synctest.Test(t, func(t *testing.T) { reached = killedAfterALate(t, n, by, at) })
		}
	}
}

// killedAfterALate writes a store, while the n-th request arrives by requests later, and the
// process is killed at request at. It fails the test if the next process has not what was answered.
// reached says whether there were n requests.
func killedAfterALate(t *testing.T, n, by, at int) (reached bool) {
	e, h := newFakeEtcd(), storetest.NewHistory()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute) // a standby would wait without end
	defer cancel()

	dir, w := e.dir(t, ctx, "first:9999")
	w.at, w.fault, w.lateBy = n, delayed, by
	w.before = func(n int) {
		if n == at {
			w.kill()
		}
	}

	d, err := durable.Open(ctx, &worldDir{dir.directory, 200 << 10}, durable.Options{})
	for i := 0; i < 40 && err == nil; i++ {
		key, value := fmt.Sprint(i%7), randomText(smallSize(i))
		d.Set(key, value)
		h.Done.Set(key, value)
		if err = d.Commit(); err == nil {
			h.Told = h.Done.Clone()
			d.AwaitCompaction()
			<-time.After(surveyTime / 9)
		}
	}

	reached = w.count() >= n
	w.kill()
	if d != nil {
		<-d.Lost()
		d.Close()
	}

	after, _ := e.dir(t, t.Context(), "second:9999")
	checkKept(t, h, after, fmt.Sprintf("request %d, late by %d, killed at %d", n, by, at))
	return reached
}

// smallSize is the size of the i-th write of a file, in bytes: several small ones are joined, and
// larger ones are put again in parts if the first put takes too long.
func smallSize(i int) int {
	if i%11 == 10 {
		return 40 << 10
	}
	return 7 << 10
}

// Ensure that a reader of a large file asks for as much at a time as etcd answers, and not for more,
// and for less after an answer that took too long.
func TestEtcdReadAhead(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		dir, w, lock := newFakeEtcd().locked(t)
		f := create(t, dir, "file")

		const size = 8 << 20
		text := []byte(shrinking(pieceFirst, 10))
		for at := int64(0); at < size; {
			write(t, f, &at, text)
		}

		synctest.Wait() // so that no sign of life counts
		before, got := w.count(), make([]byte, pieceFirst)
		for at := int64(0); at < size; at += pieceFirst {
			if _, err := f.ReadAt(got, at); err != nil || !bytes.Equal(got, text) {
				t.Fatalf("at %d other bytes are read: %v", at, err)
			}

			page := 0
			for _, data := range f.(*pieceFile).page {
				page += len(data)
			}
			if page > pageMost {
				t.Errorf("%d bytes are asked for at a time", page)
			}
		}

		// The first pages are smaller.
		if n := w.count() - before; n > 8 {
			t.Errorf("%d bytes are asked for in %d parts", size, n)
		}

		var isLate sync.Once
		synctest.Wait() // so that no request is under way
		dir.client.http.Transport = roundTrip(func(r *http.Request) (*http.Response, error) {
			answer, err := w.RoundTrip(r)
			if strings.HasSuffix(r.URL.Path, "range") {
				isLate.Do(func() {
					answer.Body = io.NopCloser(iotest.ErrReader(context.DeadlineExceeded))
				})
			}
			return answer, err
		})
		if _, err := f.ReadAt(got, 0); err != nil || !bytes.Equal(got, text) {
			t.Errorf("after an answer that took too long other bytes are read: %v", err)
		}
		if ahead := f.(*pieceFile).ahead; ahead != pageMost/2 {
			t.Errorf("after an answer that took too long %d bytes are asked for, want %d", ahead, pageMost/2)
		}

		// To ask for less than one piece is not possible.
		reader, silent := w.fakeEtcd.dir(t, t.Context(), "")
		again, _, err := reader.Open("file")
		silent.setCut(true)
		if _, silentErr := again.ReadAt(got, 0); err != nil || !errors.Is(silentErr, ErrUnreachable) {
			t.Errorf("a read that nobody answers: %v, %v", err, silentErr)
		}
		lock.Close()
	})
}

// Ensure that a reader counts no bytes twice while the writer joins pieces.
func TestEtcdJoinedWhileRead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newFakeEtcd()
		dir, _, lock := e.locked(t)
		f := create(t, dir, "file")

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

		// Each case changes file f, of three pieces, and returns what a read of all of it must find,
		// and end with.
		const text = "111222333"
		for what, do := range map[string]func(f storage.File, reader *etcdWire) (text string, want error){
			"it is written": func(f storage.File, _ *etcdWire) (string, error) {
				at := int64(9)
				write(t, f, &at, []byte("333"))
				return "111222333333", nil
			},
			"it is removed": func(storage.File, *etcdWire) (string, error) {
				writer.Remove("f")
				return text, fs.ErrNotExist
			},
			"it is made anew": func(storage.File, *etcdWire) (string, error) {
				writer.Create("f")
				return text, fs.ErrNotExist
			},
			"a read of it fails where a piece is gone": func(_ storage.File, w *etcdWire) (string, error) {
				e.delete(piece(1))
				before := w.count()
				w.mu.Lock()
				w.before = func(n int) { w.setCut(n > before+2 && n < before+4) }
				w.mu.Unlock()
				return "111\x00\x00\x00333", nil
			},
			"its last piece is gone, before a cut": func(storage.File, *etcdWire) (string, error) {
				e.put(strings.Replace(piece(2), "00000002-000000000006-000003",
					"00000003-000000000009-000000", 1), "")
				e.delete(piece(2))
				return "111222\x00\x00\x00", nil
			},
			"nobody answers where a piece is gone": func(_ storage.File, w *etcdWire) (string, error) {
				e.delete(piece(1))
				before := w.count()
				w.mu.Lock()
				w.before = func(n int) { w.setCut(n > before+2) }
				w.mu.Unlock()
				return text, ErrUnreachable
			},
		} {
			f := create(t, writer, "f")
			for at := int64(0); at < 9; {
				write(t, f, &at, fmt.Append(nil, 111*(1+at/3)))
			}

			dir, w := e.dir(t, t.Context(), "")
			r, size, err := dir.Open("f")
			if size != 9 || err != nil {
				t.Fatalf("the file has %d bytes: %v", size, err)
			}

			text, want := do(f, w)
			b := bytes.Repeat([]byte("x"), len(text))
			n, err := r.ReadAt(b, 0)
			if !errors.Is(err, want) || want == nil && string(b[:n]) != text {
				t.Errorf("%s: %q is read of %q: %v, want %v", what, b[:n], text, err, want)
			}
			writer.Remove("f")
		}

		// To open it again finds its new state, and takes no more requests if it has many pieces.
		f := create(t, writer, "f")
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

		sizes, n, next := map[string]int64{}, 0, 0
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
				if n++; n < next {
					continue
				}
				next = storetest.Next(n, 2)
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
				n := min(len(data), 192)
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
