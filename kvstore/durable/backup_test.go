package durable

import (
	"context"
	"errors"
	"fmt"
	"kvserver/kvstore/storage"
	"kvserver/kvstore/storetest"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
)

// Ensure that a backup of a store that is written to, at any moment, opens and holds
// what was told before it began, and that damage is not copied.
func TestBackup(t *testing.T) {
	dir, d := newSmall(t, Options{Fsync: FsyncNever})
	h := storetest.NewHistory()
	random := rand.New(rand.NewPCG(9, 9))
	for i := range 100 {
		for range random.IntN(8) {
			storetest.RandomStep(t, random, d, h.Done)
		}
		if err := d.Commit(); err != nil {
			t.Fatal(err)
		}
		h.Told = h.Done.Clone()
		out := storetest.New()
		if i%10 > 0 { // with something in the middle of its way to the file
			w := d.current
			w.f.WriteAt(appendFrame(nil, w.seed,
				frame{sequence: d.sequence + 1, synced: d.sequence},
				[]byte("half a frame"))[:45], w.size)
		}
		if _, err := Backup(dir, out, nil); err != nil {
			t.Fatalf("backup %d: %v", i, err)
		}
		d.current.f.WriteAt(make([]byte, 45), d.current.size)
		if r, err := check(out); err != nil || r.Damaged ||
			strings.Contains(fmt.Sprint(r), "torn") {
			t.Fatalf("backup %d: check says %v, %v", i, r, err)
		}
		checkKept(t, h, out, fmt.Sprint("backup ", i))
		d.AwaitCompaction()
	}
	d.minCompact = 1 << 30
	for d.size < headerSize+200 { // the newest file has something in it
		d.Put("key", strings.Repeat("v", 100))
		d.Commit()
	}
	d.Close()
	for name := range dir.Names {
		if kind, _, ok := parseName(name); ok {
			data := slices.Clone(dir.Names[name].Data)
			data[headerSize+10] ^= 1 // in the first frame
			out := storetest.New()
			if _, err := Backup(dir.With(name, data), out, nil); err == nil ||
				len(out.Names) > 0 {
				t.Errorf("%s, damaged, is copied: %v, %d files of kind %d; it has %d bytes", name,
					err, len(out.Names), kind, len(data))
			}
		}
	}
	full := storetest.New().With("photo.jpg", nil)
	if _, err := Backup(dir, full, nil); !errors.Is(err, storage.ErrNotOurs) {
		t.Errorf("into a directory that is not empty: %v", err)
	}
}

// tornListing is a directory that a compaction changes while it is listed: once it has
// neither the new snapshot nor the oldest file that went for it.
type tornListing struct {
	*storetest.Dir
	lists int
}

func (l *tornListing) List() ([]string, error) {
	names, err := l.Dir.List()
	if l.lists++; l.lists <= 3 {
		names = slices.DeleteFunc(names, func(name string) bool {
			kind, _, _ := parseName(name)
			return kind == kindSnapshot
		})
	}
	return names, err
}

// Ensure that a listing of names that a compaction changes meanwhile is no damage.
func TestLookBesideACompaction(t *testing.T) {
	dir, d := newSmall(t, Options{})
	storetest.Script(t, d, storetest.NewHistory())
	if _, err := Backup(&tornListing{Dir: dir}, storetest.New(), nil); err != nil {
		t.Errorf("backup: %v", err)
	}
	if r, err := Check(&tornListing{Dir: dir}); err != nil || r.Damaged {
		t.Errorf("check: %v, %v", r, err)
	}
	d.Close()
	if r, err := Check(&tornListing{Dir: dir}); err != nil || !r.Damaged {
		t.Errorf("check where nobody else is: %v, %v", r, err)
	}
}

// Ensure that real backups, one after the other beside a store that is written to and
// compacted, each hold what was told before.
func TestBackupBesideARealStore(t *testing.T) {
	path := filepath.Join(t.TempDir(), "data")
	os.Mkdir(path, 0o700)
	d, err := openAt(path, Options{Fsync: FsyncNever})
	if err != nil {
		t.Fatal(err)
	}
	d.segmentSize, d.minCompact = 20_000, 40_000
	var told atomic.Int64
	stop, stopped := make(chan struct{}), make(chan struct{})
	defer func() {
		close(stop)
		<-stopped
		d.Close()
		if _, err := backUpAt(path, filepath.Join(path, "copy"), nil); !errors.Is(err, storage.ErrNotOurs) {
			t.Errorf("a backup inside the store: %v", err)
		}
	}()
	go func() {
		defer close(stopped)
		for i := int64(1); ; i++ {
			select {
			case <-stop:
				return
			default:
			}
			d.Put("counter", fmt.Sprint(i))
			d.Update("counter", fmt.Sprint(i-1), "x")
			d.Update("counter", "x", "y")
			d.Delete(fmt.Sprint("key", i%100))
			d.Put(fmt.Sprint("key", i%100), fmt.Sprint(i))
			if i%50 == 0 {
				d.Delete("counter")
				d.Put("counter", fmt.Sprint(i))
			}
			if err := d.Commit(); err != nil {
				t.Error(err)
				return
			}
			told.Store(i)
		}
	}()
	for i := range 12 {
		least := told.Load()
		to := filepath.Join(t.TempDir(), "copy")
		if _, err := backUpAt(path, to, nil); err != nil {
			t.Fatalf("backup %d: %v", i, err)
		}
		copied, err := openAt(to, Options{})
		if err != nil {
			t.Fatalf("backup %d: %v", i, err)
		}
		most := int64(0)
		for _, values := range copied.All() {
			for _, v := range values {
				if n, err := strconv.ParseInt(v, 10, 64); err == nil {
					most = max(most, n)
				}
			}
		}
		if most < least {
			t.Errorf("backup %d holds what was told up to %d, want %d", i, most, least)
		}
		copied.Close()
	}
}

// Ensure that a backup does not end at a damaged frame in the middle of the log.
func TestBackupOfALogWithAHole(t *testing.T) {
	dir, d := newSmall(t, Options{})
	d.minCompact = 1 << 30
	for i := range 200 {
		d.Put(fmt.Sprint("key", i), strings.Repeat("v", 50))
		d.Commit()
	}
	d.Close()
	for what, damage := range map[string]func(b []byte) []byte{
		"a bit of the last frame": func(b []byte) []byte { b[len(b)-20] ^= 1; return b },
		"the last frame":          func(b []byte) []byte { return b[:len(b)-frameSize] },
	} {
		bad := dir.With("seg-2.log", damage(slices.Clone(dir.Names["seg-2.log"].Data)))
		out := storetest.New()
		if _, err := Backup(bad, out, nil); err == nil || out.Names[storeName] != nil {
			t.Errorf("without %s of a full file: %v, and %d files are copied", what, err,
				len(out.Names))
		}
	}
}

// Ensure that a copy that fails leaves no file, so that it can be tried again.
func TestFailedBackupLeavesNoFile(t *testing.T) {
	dir, d := newSmall(t, Options{})
	storetest.Script(t, d, storetest.NewHistory())
	d.Close()
	for n := 1; ; n++ {
		out := storetest.New()
		out.FailAt = n
		_, err := Backup(dir, out, nil)
		if err == nil {
			break
		}
		out.FailAt = 0
		if len(out.Names) > 0 {
			t.Errorf("call %d: %v; there is %v", n, err, slices.Sorted(maps.Keys(out.Names)))
		}
	}
}

// Ensure that a copy that fails leaves nothing behind: not the directory that was made for it.
func TestFailedBackupLeavesNothing(t *testing.T) {
	path := t.TempDir()
	store, to, there := filepath.Join(path, "store"), filepath.Join(path, "copy"), t.TempDir()
	os.Mkdir(store, 0o700)
	os.WriteFile(filepath.Join(store, storeName), []byte("what is this"), 0o600)
	for _, to := range []string{to, there} {
		if _, err := backUpAt(store, to, nil); !errors.As(err, new(*storage.DamageError)) {
			t.Errorf("a copy of a damaged store: %v", err)
		}
	}
	if _, err := os.Stat(to); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the directory that was made is there: %v", err)
	}
	if _, err := os.Stat(there); err != nil {
		t.Errorf("the directory that was there is not: %v", err)
	}
}

// Ensure that a check beside a store that is written to, rotated and compacted finds no
// damage.
func TestCheckBesideARealStore(t *testing.T) {
	path := t.TempDir()
	d, err := openAt(path, Options{Fsync: FsyncNever})
	if err != nil {
		t.Fatal(err)
	}
	d.segmentSize, d.minCompact = 300_000, 600_000
	written := make(chan struct{})
	go func() {
		defer close(written)
		for i := range 1000 {
			d.Delete(fmt.Sprint("key", i%100))
			d.Put(fmt.Sprint("key", i%100), strings.Repeat("v", i%1000*20))
			if err := d.Commit(); err != nil {
				t.Error(err)
				return
			}
		}
	}()
	for on := true; on; {
		if r, err := checkAt(path); err != nil || r.Damaged {
			t.Errorf("check: %v, %v", r, err)
		}
		select {
		case <-written:
			on = false
		default:
		}
	}
	d.Close()
}

// Ensure that a check beside a store finds no damage where frames are written between
// any two of its reads, and the store is closed.
func TestCheckBesideEachWrite(t *testing.T) {
	for before := 1; before < 30; before++ { // the read before which that happens
		dir := storetest.New()
		dir.Reserve = 1000
		d, err := Open(context.Background(), dir, Options{})
		if err != nil {
			t.Fatal(err)
		}
		d.Put("key", "value")
		d.Commit()
		reads := 0
		dir.Before = func(c storetest.Call) error {
			if c.What == "read" {
				if reads++; reads == before {
					for range 3 {
						d.Put("key", "value")
						d.Commit()
					}
					d.Close()
				}
			}
			return nil
		}
		if r, err := Check(dir); err != nil || r.Damaged {
			t.Errorf("before read %d: %v, %v", before, r.Lines, err)
		}
	}
}
