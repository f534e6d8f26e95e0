package durable

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"kvserver/kvstore"
	"kvserver/kvstore/storage"
	"kvserver/kvstore/storetest"
	"log/slog"
	"maps"
	"math"
	"math/rand/v2"
	"os"
	"reflect"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

// TestMain runs the tests, or opens a store as a second process if TestRealDirectory says so.
func TestMain(m *testing.M) {
	if dir := os.Getenv("KVSTORE_TEST_OPEN"); dir != "" {
		_, err := openAt(dir, Options{})
		fmt.Print(err)
		return
	}

	// Each of thousands of stores begins with a slab, so the default would mean endless
	// collections.
	debug.SetGCPercent(1000)
	os.Exit(m.Run())
}

// openStill is Open, without the store's timer in real time: on a busy machine the timer would
// write to dir while the test looks at it.
func openStill(dir storage.Directory, opts Options) (*Store, error) {
	d, err := Open(context.Background(), dir, opts)
	if isFake := time.Now().Year() <= 2000; err == nil && !isFake { // fake time begins in 2000
		d.stopTimer()
	}
	return d, err
}

// openSmall opens a store with small files, which are full soon.
func openSmall(dir storage.Directory, opts Options) (*Store, error) {
	d, err := openStill(dir, opts)
	if err == nil {
		d.mu.Lock() // the timer may have something to do
		d.segmentSize, d.minCompact = 1500, 2000
		if d.zerosAhead > 0 {
			d.zerosAhead = 700
		}
		d.mu.Unlock()
	}
	return d, err
}

// newSmall is openSmall in a new directory.
func newSmall(t *testing.T, opts Options) (*storetest.Dir, *Store) {
	t.Helper()
	dir := storetest.New()
	d, err := openSmall(dir, opts)
	if err != nil {
		t.Fatal(err)
	}
	return dir, d
}

// keysOf returns how many keys d has.
func keysOf(d *Store) int {
	keys, _, _ := d.Size()
	return keys
}

// checkKept opens what a crash left, and fails unless the store holds everything that was told,
// and nothing that was not done.
func checkKept(t *testing.T, h *storetest.History, dir storage.Directory, what string) {
	t.Helper()
	d, err := openSmall(dir, Options{})
	if err != nil {
		t.Fatalf("%s: %v", what, err)
	}

	if l, err := readLayout(dir); err != nil || len(l.obsolete) > 0 {
		t.Fatalf("%s: after opening there is still %q, %v", what, l.obsolete, err)
	}
	if !h.Told.Equal(d) && !h.Done.Equal(d) {
		t.Fatalf("%s: the store holds\n%v\nwant\n%v\nor\n%v", what, maps.Collect(d.All()), h.Told,
			h.Done)
	}

	if err := d.Close(); err != nil {
		t.Fatalf("%s: Close: %v", what, err)
	}
}

// wantAll opens a store, and fails unless it holds exactly what want says.
func wantAll(t *testing.T, what string, dir storage.Directory, want map[string][]string) {
	t.Helper()
	d, err := openSmall(dir, Options{})
	if err != nil {
		t.Fatalf("%s: %v", what, err)
	}
	if got := maps.Collect(d.All()); !maps.EqualFunc(got, want, slices.Equal[[]string]) {
		t.Errorf("%s: %d keys, want %d", what, len(got), len(want))
	}
	d.Close()
}

// Ensure that a start writes only the frames that are in doubt: after a clean stop one, after a
// crash the last commits.
func TestStartCopiesNothing(t *testing.T) {
	for _, end := range []string{"a clean stop", "a compaction", "a kill"} {
		dir := storetest.New()
		d, err := openStill(dir, Options{})
		if err != nil {
			t.Fatal(err)
		}
		for range 100 {
			d.Put("key", strings.Repeat("v", 1000))
			d.Commit()
		}
		switch end {
		case "a clean stop":
			d.Close()
		case "a compaction": // before which there is a new file, as always
			if _, err := d.rotate(); err != nil {
				t.Fatal(err)
			}
			if err := d.compactNow(); err != nil {
				t.Fatal(err)
			}
		}

		image := dir.With(storage.LockName, nil)
		counting := &countingDir{Dir: image}
		if _, err := openStill(counting, Options{}); err != nil {
			t.Fatal(err)
		}

		most := 2000
		if end == "a kill" {
			most += image.Reserve // the zeros are cleared
		}
		if counting.written > most || counting.created > 1 { // tryFile makes one
			t.Errorf("after %s a start wrote %d bytes and made %d files", end,
				counting.written, counting.created)
		}
	}
}

// countingDir counts bytes written and files created.
type countingDir struct {
	*storetest.Dir
	written, created int
}

type countingFile struct {
	storage.File
	d *countingDir
}

func (c *countingDir) Create(name string) (storage.File, error) {
	c.created++
	f, err := c.Dir.Create(name)
	return countingFile{f, c}, err
}

func (c *countingDir) Extend(name string) (storage.File, error) {
	f, err := c.Dir.Extend(name)
	return countingFile{f, c}, err
}

func (f countingFile) WriteAt(p []byte, off int64) (int, error) {
	f.d.written += len(p)
	return f.File.WriteAt(p, off)
}

// Ensure that an Update is loaded without a search: the log says where the value was.
func TestUpdatesAreLoadedByPlace(t *testing.T) {
	m := kvstore.NewMemory()
	for i := range 10 {
		m.Put("k", fmt.Sprint(i%5))
	}
	if err := apply(m, string(appendRecord(nil, opUpdate, 7, "k", "2", "x")), 1); err != nil {
		t.Fatal(err)
	}
	if got, want := m.Get("k"), []string{"0", "1", "2", "3", "4", "0", "1", "3", "4",
		"x"}; !slices.Equal(got, want) {
		t.Errorf("got %q, want %q: the second 2 is gone, which is at the place given", got, want)
	}

	if err := apply(m, string(appendRecord(nil, opUpdate, math.MaxInt, "k", "2", "y")), 1); err != nil {
		t.Fatal(err)
	}
	if got, want := m.Get("k"), []string{"0", "1", "3", "4", "0", "1", "3", "4", "x",
		"y"}; !slices.Equal(got, want) {
		t.Errorf("with a place that is none: got %q, want %q", got, want)
	}
}

// Ensure that Room refuses a record that is too large for a frame.
func TestRecordsTooLarge(t *testing.T) {
	d, err := openStill(storetest.New(), Options{})
	if err != nil {
		t.Fatal(err)
	}
	if err := d.Room("", maxRecord+1, 0); err == nil {
		t.Error("there is room for a record that is too large")
	}
}

// Ensure that a durable store does what every store must do.
func TestDurableIsAStore(t *testing.T) {
	storetest.TestStore(t, func() kvstore.Store {
		_, d := newSmall(t, Options{Fsync: FsyncNever})
		t.Cleanup(func() { d.Close() })
		return d
	})
}

// Ensure that a durable store is like the model, through many restarts, and that the size of its
// files stays within bounds.
func TestDurableIsLikeTheModel(t *testing.T) {
	for _, fsync := range []time.Duration{FsyncAlways, FsyncNever, time.Hour} {
		dir, m, h := storetest.New(), storetest.NewModel(), rand.New(rand.NewPCG(3, 3))
		for range 30 {
			d, err := openSmall(dir, Options{Fsync: fsync})
			if err != nil {
				t.Fatal(err)
			}
			storetest.CheckSame(t, d, m)

			for range 50 {
				for range h.IntN(10) {
					storetest.RandomStep(t, h, d, m)
				}
				if err := d.Commit(); err != nil {
					t.Fatal(err)
				}
				d.AwaitCompaction()

				var disk, live int64
				for _, f := range dir.Names {
					disk += int64(len(f.Data))
				}

				_, values, bytes := d.Size()
				live = bytes + int64(values)*recordExtra
				if most := 2*live + d.minCompact + 3*d.segmentSize; disk > most {
					t.Fatalf("%d bytes on disk for %d live ones, want at most %d", disk, live, most)
				}
			}

			storetest.CheckSame(t, d, m)
			if err := d.Close(); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// Ensure that Store itself has each method that writes: an embedded method of Memory would
// write no record, and its effect would be lost at the next start.
func TestDurableHasEveryMethod(t *testing.T) {
	store, durable := reflect.TypeFor[kvstore.Store](), reflect.TypeFor[*Store]()
	memorys := []string{"Get", "Size", "Footprint", "Reclaim", "View", "Measure", "Has", "Count",
		"Deadline", "Expiring", "NextDue", "TouchPays", "Touch", "Snapshot"}
	for i := range store.NumMethod() {
		name := store.Method(i).Name
		method, _ := durable.MethodByName(name)
		file, _ := runtime.FuncForPC(method.Func.Pointer()).FileLine(method.Func.Pointer())
		if isOwn := strings.Contains(file, "/durable/"); isOwn == slices.Contains(memorys, name) {
			t.Errorf("%s of Store is in %s", name, file)
		}
	}
}

// Ensure that a long load reports its progress each second.
func TestLoadTellsProgress(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir, d := newSmall(t, Options{})
		d.minCompact = 1 << 40
		for d.number() < 10 {
			d.Put("key", strings.Repeat("v", 100))
			d.Commit()
		}
		d.Close()

		var log bytes.Buffer
		status, stage := new(storage.Status), ""

		dir.Before = func(c storetest.Call) error {
			if c.What == "read" && c.Name != storage.StoreName {
				<-time.After(400 * time.Millisecond) // once for each header, and once for each file
				stage = status.Stage()
			}
			return nil
		}

		d, err := openSmall(dir, Options{Log: slog.New(slog.NewTextHandler(&log, nil)), Status: status})
		if err != nil {
			t.Fatal(err)
		}
		if stage != "loading 85 %" || status.Stage() != "" {
			t.Errorf("before the last file /healthz would say %q, and at last %q", stage,
				status.Stage())
		}
		if got := log.String(); strings.Count(got, "msg=loading") != 3 ||
			!strings.Contains(got, "records=81 bytes=12632 percent=85") {
			t.Errorf("after four seconds the log is\n%s", got)
		}
		d.Close()

		// A start that is to end meanwhile does so.
		ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
		defer cancel()
		if _, err := Open(ctx, dir, Options{}); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("Open: %v", err)
		}
	})
}

// fixedDir returns a directory with a store whose id is the same in every run.
func fixedDir(t testing.TB, commits int) *storetest.Dir {
	dir, id := storetest.New(), storeID{1, 2, 3}

	_, err := createLog(dir, fileHeader{kind: kindSegment, id: id, number: 1,
		first: 1}, func(w *logWriter) error {
		for i := range commits {
			payload := appendRecord(nil, opPut, 0, "key", fmt.Sprint(i))
			payload = appendRecord(payload, opUpdate, 0, "key", fmt.Sprint(i), "new")
			if err := w.append(frame{sequence: uint64(i + 1), synced: uint64(i), count: 2},
				payload, 0); err != nil {
				return err
			}
		}
		return nil
	})

	if err == nil {
		_, err = writeID(dir, id)
	}
	if err != nil {
		t.Fatal(err)
	}
	return dir
}

// Ensure that deadlines survive in the log and in snapshots, after a kill and a power failure, and
// that the ends of deadlines do, too.
func TestDeadlinesAreKept(t *testing.T) {
	for seed := 0; seed < 30; seed = storetest.Next(seed, 3) {
		random := rand.New(rand.NewPCG(uint64(seed), 9))
		dir, d := newSmall(t, Options{})
		want := map[string]int64{}

		for range 300 {
			key := fmt.Sprint("key", random.IntN(10))
			switch random.IntN(8) {
			case 0, 1:
				// The store itself does nothing when the time has come, so any time will do.
				at := int64(random.IntN(3)) * (1 << 40)
				if d.Expire(key, at) {
					want[key] = at
				}
			case 2:
				d.PutUntil(key, "v", 77)
				want[key] = 77
			case 3:
				d.Set(key, strings.Repeat("v", 100))
				delete(want, key)
			case 4:
				d.Delete(key)
			case 5:
				d.Take(key)
			case 6:
				d.Update(key, "v", "w")
			default:
				d.Put(key, "v")
			}

			if len(d.Get(key)) == 0 {
				delete(want, key)
			}

			if random.IntN(4) > 0 {
				continue
			}
			if err := d.Commit(); err != nil {
				t.Fatal(err)
			}
			d.AwaitCompaction()
		}

		d.Commit()
		for what, dir := range map[string]*storetest.Dir{"killed": dir.Kill(),
			"after a power failure": dir.Crash(random)} {
			again, err := openSmall(dir, Options{})
			if err != nil {
				t.Fatal(err)
			}

			for i := range 10 {
				key := fmt.Sprint("key", i)
				at, _ := again.Deadline(key)
				if at != want[key] || again.Count(key) != d.Count(key) {
					t.Errorf("%s: %s goes at %d, want %d", what, key, at, want[key])
				}
			}
			again.Close()
		}
		d.Close()
	}
}

// Ensure that a deadline before 1970, as from a sum that overflows, is the same in the log as in
// memory: over.
func TestNegativeDeadlines(t *testing.T) {
	dir, d := newSmall(t, Options{})
	d.Put("a", "value")
	d.Expire("a", -5)
	d.PutUntil("b", "value", -1<<63)
	if err := d.Commit(); err != nil {
		t.Fatal(err)
	}

	again, err := openSmall(dir.Kill(), Options{})
	if err != nil {
		t.Fatal(err)
	}

	for _, key := range []string{"a", "b"} {
		want, isThere := d.Deadline(key)
		if got, _ := again.Deadline(key); got != want || !isThere || want > 1 {
			t.Errorf("%s goes at %d, and after a start at %d", key, want, got)
		}
	}
	again.Close()
	d.Close()
}

// Ensure that behind a file of an older version a store goes on in a new file, because an older
// kvserver would take new kinds of records for damage, or in the old file if no new one can be
// made. Ensure that neither counts as changed.
func TestFileOfAnOlderVersion(t *testing.T) {
	for _, isFull := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			dir, d := newSmall(t, Options{})
			d.Put("k", "v")
			d.Close()
			makeOlder(dir.Names["seg-1.log"].Data)

			if isFull {
				dir.Before = func(c storetest.Call) error {
					if c.What == "create" && c.Name == "seg-2.log.tmp" {
						return syscall.ENOSPC
					}
					return nil
				}
			}

			log := &strings.Builder{}
			d, err := openSmall(dir, Options{Log: slog.New(slog.NewTextHandler(log, nil))})
			if err != nil {
				t.Fatal(err)
			}
			size := len(dir.Names["seg-1.log"].Data)
			<-time.After(2 * lookTime)
			d.Put("k", "w")
			d.Take("k")
			if err := errors.Join(d.Commit(), d.Close()); err != nil {
				t.Fatal(err)
			}

			isNew := d.number() == 2 && len(dir.Names["seg-1.log"].Data) == size
			if isNew == isFull || strings.Contains(log.String(), "written again") {
				t.Errorf("full %v: now in file %d, the log says\n%s", isFull, d.number(), log)
			}
			dir.Before = nil
			wantAll(t, "opened again", dir, map[string][]string{"k": {"w"}})
		})
	}
}

// makeOlder makes a log file one of the oldest version that can be read.
func makeOlder(b []byte) {
	binary.LittleEndian.PutUint32(b[8:], oldestVersion)
	binary.LittleEndian.PutUint32(b[60:], crc(0, b[:60]))
}

// Ensure that ParseFsync takes always, never, and the times between its bounds.
func TestParseFsync(t *testing.T) {
	for text, want := range map[string]time.Duration{"always": FsyncAlways, "never": FsyncNever,
		"1ms": time.Millisecond, "1.5s": 3 * time.Second / 2, "1h": time.Hour} {
		if fsync, ok := ParseFsync(text); fsync != want || !ok {
			t.Errorf("%q is %v, %v, want %v", text, fsync, ok, want)
		}
	}
	for _, text := range []string{"", "Always", "0", "5", "0s", "-1s", "-1ns", "999us", "1h1ns"} {
		if fsync, ok := ParseFsync(text); ok {
			t.Errorf("%q is taken for %v", text, fsync)
		}
	}
}
