package etcd

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"kvserver/kvstore/durable"
	"kvserver/kvstore/storage"
	"kvserver/kvstore/storetest"
)

// Ensure that names behave like those of a directory on a disk.
func TestEtcdNames(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newFakeEtcd()
		dir, _, lock := e.locked(t)

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
		if n := dir.pieces.Load(); n != e.list(*dir.all("d/")).Count {
			t.Errorf("%d pieces are counted, which is wrong", n)
		}

		// The next process reads a file's pieces once, and notices that its name is another file's.
		lock.Close()
		dir, w, lock := e.locked(t)
		defer lock.Close()
		synctest.Wait()
		once, _, err := dir.Open("b")
		before := w.count()
		twice, _, otherErr := dir.Open("b")
		if err := errors.Join(err, otherErr); err != nil || once != twice || w.count() > before {
			t.Errorf("a file is read twice: %v", err)
		}
		e.put("kv/n/b", "another")
		if err := dir.Rename("b", "c"); !errors.Is(err, storage.ErrGone) {
			t.Errorf("a name that is another file's is renamed: %v", err)
		}
	})
}

// Ensure that pieces of files without a name are removed, and keys of others beside them stay.
func TestEtcdSweep(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newFakeEtcd()
		dir, _, lock := e.locked(t)
		// More keys than a process without the lock lists, and all sort before the pieces.
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

// Ensure that pieces of a removed file that could not be removed are removed by a later Sync.
func TestEtcdSweepAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newFakeEtcd()
		dir, w, lock := e.locked(t)

		for _, name := range []string{"f", "g"} {
			f, err := dir.Create(name)
			if err == nil {
				_, err = f.WriteAt([]byte("x"), 0)
			}
			if err = errors.Join(err, f.Sync(), f.Close(), dir.Sync()); err != nil {
				t.Fatal(err)
			}
		}

		synctest.Wait()
		w.at, w.fault = w.count()+2, doubtful // the first request removes the name
		if err := dir.Remove("f"); err == nil || len(e.orphans()) == 0 {
			t.Errorf("%v, and %d pieces stay", err, len(e.orphans()))
		}

		if err := dir.Sync(); err != nil || len(e.orphans()) > 0 {
			t.Errorf("after a Sync %d pieces stay: %v", len(e.orphans()), err)
		}
		before := w.count()
		if err := dir.Sync(); err != nil || w.count() > before {
			t.Errorf("another Sync asks for pieces without a name again: %v", err)
		}
		lock.Close()
	})
}

// Ensure that a store with keys that are not ours, whatever they look like, is refused or damaged,
// and that the keys stay.
func TestEtcdOddKeys(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for _, key := range []string{"kv/", "kv/n/", "kv/n//x", "kv/n/thesis", "kv/d/users/alice",
			"kv/d/", "kv/d", "kv/STORE", "kv/seg-1.log", "kv//lock", "kv/" + strings.Repeat("A", 26) + "-1/x",
			"kv/d/" + strings.Repeat("A", 26) + "-x/1"} {
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
		if _, err := durable.Backup(dir, local); err != nil {
			t.Errorf("backup beside a server: %v", err)
		}

		d.Close()
		other := newFakeEtcd()
		back, _ := other.dir(t, t.Context(), "")
		_, err = durable.Backup(back, storetest.New())
		_, repairErr := durable.Repair(back, storetest.New())
		for _, err := range []error{err, repairErr} {
			if err == nil || !strings.Contains(err.Error(), "no store at etcd://a:1,b:1/kv") {
				t.Errorf("a copy of an empty prefix: %v", err)
			}
		}

		if _, err := durable.Backup(local, back); err != nil {
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
			if _, err := durable.Backup(dir, local); err != nil {
				t.Errorf("the server compacts before request %d: %v", n, err)
			}
			reached = w.count() >= n

			// Then a check beside a compaction: its requests are counted from one again.
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
		if want := to != "etcd://h:1/k"; Overlap("etcd://h:1/kv", to) != want ||
			Overlap(to, "etcd://h:1/kv") != want {
			t.Errorf("a copy of kv in %s", to)
		}
	}
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
			_, err := durable.Backup(local, to)
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

// Ensure that the first start may be killed at any request, and the second one, too, and that the
// next start succeeds: there is no data to lose. A sixteenth of all pairs is tried.
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

	for first, more := 1, true; more; first = storetest.Next(first, 2) {
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
