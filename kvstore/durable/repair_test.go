package durable

import (
	"bytes"
	"errors"
	"fmt"
	"kvserver/kvstore"
	"kvserver/kvstore/storage"
	"kvserver/kvstore/storetest"
	"maps"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"syscall"
	"testing"
)

// repaired repairs dir into a new directory, and fails if that changes dir.
func repaired(t *testing.T, dir *storetest.Dir) (out *storetest.Dir, r Report, err error) {
	t.Helper()
	before := map[string][]byte{}
	for name, f := range dir.Names {
		before[name] = slices.Clone(f.Data)
	}

	out = storetest.New()
	r, err = Repair(dir, out)

	for name, f := range dir.Names {
		if was, ok := before[name]; !ok || !bytes.Equal(was, f.Data) {
			t.Errorf("repair has changed %s", name)
		}
	}
	if len(dir.Names) != len(before) {
		t.Errorf("repair has removed something: %d files are left of %d", len(dir.Names),
			len(before))
	}
	return out, r, err
}

// Ensure that Repair saves everything except what is damaged, and says what that is.
func TestRepair(t *testing.T) {
	dir, name, starts := segment(t, 8)
	data := slices.Clone(dir.Names[name].Data)
	data[starts[3]+frameSize+2] ^= 1                          // the fourth frame's records
	bad := dir.With(name, append(data, make([]byte, 500)...)) // room is no loss

	out, report, err := repaired(t, bad)
	if err != nil {
		t.Fatal(err)
	}

	text := strings.Join(report.Lines, "\n")
	for _, want := range []string{
		fmt.Sprintf("DAMAGED bytes %d to %d of dir/seg-1.log", starts[3], starts[4]),
		fmt.Sprintf("LOST    frames 4 to 4, which came before offset %d of dir/seg-1.log",
			starts[4]),
		"saved   8 keys, 14 values",
	} {
		if !strings.Contains(text, want) {
			t.Errorf("repair does not say %q:\n%s", want, text)
		}
	}
	if strings.Count(text, "LOST") != 1 || !errors.Is(report.Err, ErrLost) {
		t.Errorf("repair tells of other losses:\n%s, %v", text, report.Err)
	}

	d, err := openStill(out, Options{})
	if err != nil {
		t.Fatal(err)
	}
	want := []string{"value0", "value1", "value2", "value4", "value5", "value6", "value7"}
	if got := d.Get("key"); !slices.Equal(got, want) {
		t.Errorf("after repair %q, want %q", got, want)
	}
	old, _, err := readID(bad)
	if id := d.current.header.id; err != nil || id == old || id == (storeID{}) {
		t.Errorf("the new store's id is %x, and the damaged one's %x, %v", d.current.header.id, old, err)
	}
	d.Close()

	again, report, err := repaired(t, out)
	if err != nil || report.Damaged || report.Lost {
		t.Errorf("repair of a good store: %v, %v", report, err)
	}
	if _, err := Repair(bad, again); !errors.Is(err, ErrNotEmpty) {
		t.Errorf("repair into a store: %v", err)
	}
	bad.Locked = true
	if _, err := Repair(bad, storetest.New()); !errors.Is(err, storage.ErrLocked) {
		t.Errorf("repair of a store that is in use: %v", err)
	}
}

// Ensure that Repair saves a frame behind a bad one that ends where the file ends.
func TestRepairSavesTheLastFrame(t *testing.T) {
	dir, name, starts := segment(t, 3)
	data := slices.Clone(dir.Names[name].Data)
	data[starts[1]+frameSize+2] ^= 1 // the second frame's records

	out, r, err := repaired(t, dir.With(name, data))
	if err != nil || !r.Lost {
		t.Errorf("%v, and repair says\n%s", err, strings.Join(r.Lines, "\n"))
	}
	wantAll(t, "repaired", out, map[string][]string{
		"key": {"value0", "value2"}, "": {""}, "kk": {""}})
}

// Ensure that Repair of a store without log files, or of no store, says so and makes nothing, and
// that Backup and Check say that there is none.
func TestRepairOfNothing(t *testing.T) {
	dir, name, _ := segment(t, 1)
	delete(dir.Names, name)
	out, _, err := repaired(t, dir)
	if !errors.Is(err, ErrNothingRead) {
		t.Error(err)
	}
	delete(out.Names, storage.LockName)
	if len(out.Names) > 0 {
		t.Errorf("of nothing it makes %q", slices.Sorted(maps.Keys(out.Names)))
	}

	// If there never was a store, nothing is damaged or lost.
	out, r, err := repaired(t, storetest.New().With(storage.LockName, nil))
	if !errors.Is(err, ErrNoStore) || len(r.Lines) > 0 || len(out.Names) > 0 {
		t.Errorf("of an empty directory: %v, %q", err, r.Lines)
	}
	_, err = Backup(storetest.New(), out)
	if !errors.Is(err, ErrNoStore) {
		t.Errorf("a backup of an empty directory: %v", err)
	}
	r, err = Check(storetest.New())
	if err != nil || !r.Empty || !strings.Contains(fmt.Sprint(r.Lines), "no store yet") {
		t.Errorf("a check of an empty directory: %+v, %v", r, err)
	}
}

// Ensure that Repair takes an older snapshot, and what came after it, if the newest
// is damaged, and says whether anything is lost.
func TestRepairUsesTheOlderSnapshot(t *testing.T) {
	dir, d := newSmall(t, Options{Fsync: FsyncNever})
	d.minCompact = 1 << 30
	var old map[string]*storetest.File
	h := storetest.NewHistory()
	random := rand.New(rand.NewPCG(7, 7))

	for snapshots := 0; snapshots < 3; {
		number := d.number()
		for range random.IntN(8) {
			storetest.RandomStep(t, random, d, h.Done)
		}
		d.Commit()

		// old has the snapshot before this one, and the files since.
		if d.number() > number && d.number()%3 == 0 {
			old = dir.With(storage.LockName, nil).Names
			if err := d.compactNow(); err != nil {
				t.Fatal(err)
			}
			snapshots++
		}
	}
	h.Told = h.Done.Clone()
	d.Close()

	l, _ := readLayout(dir)
	bad := dir.With(storage.LockName, nil)
	for name, f := range old { // as a crash leaves them behind a compaction
		if bad.Names[name] == nil {
			bad.Names[name] = f
		}
	}
	newest := logName(kindSnapshot, l.snapshot)
	bad.Names[newest] = storetest.FileOf(bad.Names[newest].Data[:headerSize+30])

	out, r, err := repaired(t, bad)
	if err != nil || !r.Damaged || r.Lost {
		t.Errorf("repair says %v, %v", r, err)
	}
	checkKept(t, h, out, "repaired with the older snapshot")

	// It is better than none even without its end.
	for name, f := range old {
		if kind, _ := parseName(name); kind == kindSnapshot {
			bad = bad.With(name, f.Data[:len(f.Data)-frameSize])
		}
	}
	out, r, err = repaired(t, bad)
	if err != nil || !r.Lost {
		t.Errorf("without the older snapshot's end repair says %v, %v", r, err)
	}
	checkKept(t, h, out, "repaired with the older snapshot without its end")

	bad = dir.With(newest, dir.Names[newest].Data[:headerSize+30])
	if _, r, err := repaired(t, bad); err == nil && !r.Lost {
		t.Errorf("without the older snapshot repair says %v", r)
	}
}

// Ensure that Repair loses nothing, or fails, if the snapshot cannot be opened for a moment.
func TestRepairKeepsAGoodSnapshot(t *testing.T) {
	dir, d := newSmall(t, Options{})
	dir.Before = func(c storetest.Call) error {
		if c.What == "remove" {
			return storetest.ErrDisk
		}
		return nil
	}

	d.minCompact = 1 << 40
	for i := 0; d.number() < 4 || d.number() < 8 && d.compacted == nil; i++ {
		if d.number() == 3 {
			d.minCompact = 2000
		}

		// Four keys are written only once, so later files do not bring them back.
		if i >= 8 && i < 12 {
			d.Put("only"+fmt.Sprint(i), "value")
		}
		d.Set("key"+fmt.Sprint(i%10), strings.Repeat("v", 50)+fmt.Sprint(i))
		if err := d.Commit(); err != nil {
			t.Fatal(err)
		}
	}

	d.AwaitCompaction() // the snapshot is there, the old files could not be removed
	want := map[string]string{}
	for k, v := range d.All() {
		want[k] = v[0]
	}

	d.stopTimer()
	dir.Before = nil
	l, _ := readLayout(dir)
	if l.snapshot == 0 || len(l.obsolete) == 0 {
		t.Fatalf("%+v", l)
	}

	data := slices.Clone(dir.Names["seg-1.log"].Data)
	for i := 900; i < len(data); i++ {
		data[i] = 'x' // a bad block in a file that nobody needs
	}
	snap := logName(kindSnapshot, l.snapshot)

	// Open number nth of the snapshot fails; for 0 none does.
	for nth := 0; nth < 6; nth++ {
		image := dir.With("seg-1.log", data)
		n := 0
		image.Before = func(c storetest.Call) error {
			if c.What == "open" && c.Name == snap {
				if n++; n == nth {
					return &os.PathError{Op: "open", Path: snap, Err: syscall.EMFILE}
				}
			}
			return nil
		}

		out, r, err := repaired(t, image)
		if err != nil {
			continue // that is honest
		}
		after, err := openSmall(out, Options{})
		if err != nil {
			t.Fatal(err)
		}

		lost := 0
		for k, v := range want {
			if got := after.Get(k); len(got) != 1 || got[0] != v {
				lost++
			}
		}
		if lost > 0 || r.Lost {
			t.Errorf("open %d of the snapshot fails: %d of %d keys lost or other\n%s", nth, lost,
				len(want), strings.Join(r.Lines, "\n"))
		}
	}
}

// Ensure that Repair does not report a loss if nothing is lost: a crash can leave each of these.
func TestRepairOfNothingLost(t *testing.T) {
	// prev is a full segment, and last, the newest, has one frame.
	for what, crash := range map[string]func(prev, last []byte) (prevLeft, lastLeft []byte){
		"the last commit is missing": func(prev, last []byte) ([]byte, []byte) {
			return prev, last[:headerSize]
		},
		"a rotation was killed before its trim": func(prev, last []byte) ([]byte, []byte) {
			return append(slices.Clone(prev), make([]byte, 100)...), last
		},
		"a rotation was killed before its last frame": func(prev, last []byte) ([]byte, []byte) {
			return prev[:len(prev)-frameSize], last[:headerSize]
		},
		"a commit is torn": func(prev, last []byte) ([]byte, []byte) {
			return prev, append(bytes.TrimRight(last, "\x00"), "\x00\x00\x00\x00\x00\x00\x00\x00rubbish"...)
		},
	} {
		dir, d := fourSegments(t, Options{})
		d.Put("last", "value")
		if err := d.Commit(); err != nil {
			t.Fatal(err)
		}
		keys, _, _ := d.Size()
		d.stopTimer()

		image := dir.With(storage.StoreName, []byte("rubbish"))
		prevName, lastName := logName(kindSegment, d.number()-1), logName(kindSegment, d.number())
		prev, last := crash(image.Names[prevName].Data, image.Names[lastName].Data)
		if len(last) == headerSize {
			keys-- // its only frame is what we cut off
		}
		image = image.With(prevName, prev).With(lastName, last)

		out, r, err := repaired(t, image)
		if err != nil {
			t.Fatal(err)
		}
		after, err := openSmall(out, Options{})
		if err != nil {
			t.Fatal(err)
		}

		got, _, _ := after.Size()
		text := strings.Join(r.Lines, "\n")
		if got != keys || r.Lost || strings.Contains(text, "torn    ") != strings.HasSuffix(what, "torn") {
			t.Errorf("%s: %d of %d keys, and Repair says\n%s", what, got, keys, text)
		}
	}
}

// Ensure that a Repair that is killed anywhere leaves a whole store, or one that does not open, or
// no data.
func TestRepairIsKilled(t *testing.T) {
	dir, d := newSmall(t, Options{})
	h := storetest.NewHistory()
	if err := storetest.Script(t, d, h); err != nil {
		t.Fatal(err)
	}
	d.Close()
	bad := dir.With(storage.StoreName, []byte("rubbish"))

	for n, reached := 1, true; reached; n++ {
		out := storetest.New()
		out.FailAt, out.Forever = n, true
		_, err := Repair(bad, out)
		if reached = out.Calls >= n; reached && err == nil {
			t.Errorf("call %d fails, and Repair says nothing", n)
		}

		out.FailAt, out.Locked = 0, false
		out = out.Crash(rand.New(rand.NewPCG(uint64(n), 1)))
		a, err := openStill(out.Kill(), Options{})
		if err == nil && out.Names[storage.StoreName] != nil && !h.Told.Equal(a) {
			t.Errorf("killed at call %d: it opens with other data", n)
		}

		if out.Names[storage.StoreName] == nil && err == nil && len(out.Names) > 0 {
			for name, f := range out.Names {
				if len(f.Data) > headerSize {
					t.Errorf("killed at call %d: %s of %d bytes is taken for nothing", n, name,
						len(f.Data))
				}
			}
		}
	}
}

// Ensure that a Check, Backup or Repair that cannot read something fails, leaves no file open, and
// calls nothing lost, also with few descriptors, where each file is opened again when it is read.
func TestFailedReadsCloseTheirFiles(t *testing.T) {
	dir, d := fourSegments(t, Options{})
	for d.size > headerSize { // the newest file is empty
		d.Put("key", "value")
		d.Commit()
	}
	dir = dir.Kill()
	d.Close()

	commands := map[string]func(dir storage.Directory) (Report, error){
		"check":  Check,
		"backup": func(dir storage.Directory) (Report, error) { return Backup(dir, storetest.New()) },
		"repair": func(dir storage.Directory) (Report, error) { return Repair(dir, storetest.New()) },
	}
	for what, command := range commands {
		for _, isDamaged := range []bool{false, true} {
			data := slices.Clone(dir.Names["seg-2.log"].Data)
			if isDamaged {
				data[headerSize+frameSize] ^= 1
			}
			for n, reached := 1, true; reached; n++ {
				image, areFew, isLock := dir.With("seg-2.log", data), isDamaged, false
				image.FailAt = n
				image.Before = func(c storetest.Call) error {
					isLock = isLock || image.Calls+1 == n && c.Name == storage.LockName
					if areFew && c.What == "open" && c.Name == "seg-2.log" && image.Calls+1 < n {
						areFew = false
						return syscall.EMFILE
					}
					return nil
				}
				r, err := command(image)
				reached = image.Calls >= n
				if image.Handles != 0 || r.Lost && !isDamaged ||
					(reached && !isLock) != errors.Is(err, storetest.ErrDisk) { // nobody needs to read LOCK
					t.Errorf("%s, call %d failed: %v, and %d files are open: %q", what, n, err, image.Handles,
						r.Lines)
				}
			}
		}
	}
}

// Ensure that Repair trusts files no more than a start does: each of these is reported as a loss.
func TestRepairNamesEveryGap(t *testing.T) {
	first := func(image *storetest.Dir, id storeID, name string,
		number uint64) (f frame, b []byte) {
		b = slices.Clone(image.Names[name].Data)
		f, ok := decodeFrame(b[headerSize:], fileHeader{kind: kindSegment, id: id, number: number}.seed())
		if !ok {
			t.Fatal("no frame")
		}
		return f, b
	}

	for what, spoil := range map[string]func(image *storetest.Dir, id storeID){
		"the newest segment is all zeros": func(image *storetest.Dir, _ storeID) {
			clear(image.Names["seg-4.log"].Data)
		},
		"a header is missing, and what follows it": func(image *storetest.Dir, _ storeID) {
			image.Names["seg-2.log"].Data = nil
		},

		"a frame is cut out": func(image *storetest.Dir, id storeID) {
			f, b := first(image, id, "seg-2.log", 2)
			image.Names["seg-2.log"].Data = slices.Delete(b, headerSize, headerSize+int(f.padded()))
		},
		"a frame is in another's place": func(image *storetest.Dir, id storeID) {
			f, b := first(image, id, "seg-2.log", 2)
			size := int(f.padded())
			copy(b[headerSize+size:], b[headerSize:headerSize+size])
			image.Names["seg-2.log"].Data = b
		},

		"the records of a frame make no sense": func(image *storetest.Dir, id storeID) {
			f, b := first(image, id, "seg-2.log", 2)
			payload := bytes.Repeat([]byte("\xff"), int(f.length))
			copy(b[headerSize:], appendFrame(nil, fileHeader{kind: kindSegment, id: id, number: 2}.seed(), f,
				payload))
			image.Names["seg-2.log"].Data = b
		},

		"the newest segment is missing": func(image *storetest.Dir, _ storeID) {
			delete(image.Names, "seg-4.log")
		},
		"a segment is missing": func(image *storetest.Dir, _ storeID) {
			delete(image.Names, "seg-3.log")
		},

		"the only segment behind a snapshot is all zeros": func(image *storetest.Dir, _ storeID) {
			d, err := openSmall(image, Options{})
			if err != nil {
				t.Fatal(err)
			}
			d.Set("key", "v")

			for number := d.number(); d.number() == number; d.AwaitCompaction() {
				d.Set("more", strings.Repeat("v", 200))
				if err := d.Commit(); err != nil {
					t.Fatal(err)
				}
			}
			if err := d.compactNow(); err != nil {
				t.Fatal(err)
			}

			name := d.current.header.name()
			d.Close()
			clear(image.Names[name].Data)
		},

		"the newest segment has no frames, and begins too late": func(image *storetest.Dir, id storeID) {
			h := fileHeader{kind: kindSegment, id: id, number: 4}
			f, _ := first(image, id, "seg-4.log", 4)
			h.first = f.sequence + 2 // with + 1 only a frame without records may be missing
			image.Names["seg-4.log"].Data = h.encode()
		},
	} {
		dir, d := fourSegments(t, Options{})
		d.Close()
		image := dir.With(storage.LockName, nil)
		spoil(image, d.current.header.id)
		if _, r, err := repaired(t, image); err != nil || !r.Lost {
			t.Errorf("%s: %v, and repair says\n%s", what, err, strings.Join(r.Lines, "\n"))
		}
	}
}

// Ensure that a snapshot that is cut behind a frame is reported as a loss, and what it still has is
// saved.
func TestRepairOfACutSnapshot(t *testing.T) {
	dir, d := newSmall(t, Options{})
	for i := range 2000 {
		d.Put(fmt.Sprint("key", i), strings.Repeat("v", 100))
	}
	d.Commit()
	if err := d.compactNow(); err != nil {
		t.Fatal(err)
	}
	d.Close()

	name := logName(kindSnapshot, d.snapshot)
	f, ok := decodeFrame(dir.Names[name].Data[headerSize:],
		fileHeader{kind: kindSnapshot, id: d.current.header.id, number: d.snapshot}.seed())
	if !ok || int(f.padded()) > len(dir.Names[name].Data)/2 {
		t.Fatalf("the snapshot has no second frame: %+v", f)
	}

	cut := dir.With(name, dir.Names[name].Data[:headerSize+f.padded()])
	out, r, err := repaired(t, cut)
	if err != nil || !r.Lost {
		t.Errorf("%v, and repair says\n%s", err, strings.Join(r.Lines, "\n"))
	}
	again, err := openSmall(out, Options{})
	if err != nil || keysOf(again) != int(f.count) {
		t.Fatalf("%d keys, want the %d of the first frame: %v", keysOf(again), f.count, err)
	}
	again.Close()
}

// Ensure that Repair saves everything, and calls nothing lost, if files only have wrong names,
// frames are in a wrong order, or there is a file too many.
func TestRepairOfWrongNames(t *testing.T) {
	for what, spoil := range map[string]func(image *storetest.Dir, id storeID){
		"two segments swapped names": func(image *storetest.Dir, _ storeID) {
			image.Names["seg-2.log"], image.Names["seg-3.log"] = image.Names["seg-3.log"],
				image.Names["seg-2.log"]
		},
		"a stray empty snapshot": func(image *storetest.Dir, _ storeID) {
			image.Names["snap-99.log"] = storetest.FileOf(nil)
		},

		"two frames swapped": func(image *storetest.Dir, id storeID) {
			b := image.Names["seg-2.log"].Data
			seed := fileHeader{kind: kindSegment, id: id, number: 2}.seed()
			f, _ := decodeFrame(b[headerSize:], seed)
			size := int(f.padded())

			if g, ok := decodeFrame(b[headerSize+size:], seed); !ok || g.padded() != f.padded() {
				t.Fatal("frames of different sizes")
			}

			one := slices.Clone(b[headerSize : headerSize+size])
			copy(b[headerSize:], b[headerSize+size:headerSize+2*size])
			copy(b[headerSize+size:], one)
		},

		"a segment is there twice": func(image *storetest.Dir, _ storeID) {
			image.Names["seg-9.log"] = image.Names["seg-2.log"]
		},
	} {
		dir, d := fourSegments(t, Options{})
		want := maps.Collect(d.All())
		d.Close()
		image := dir.With(storage.LockName, nil)
		spoil(image, d.current.header.id)

		out, r, err := repaired(t, image)
		text := strings.Join(r.Lines, "\n")
		if err != nil || r.Lost || !r.Damaged ||
			strings.HasSuffix(what, "twice") != strings.Contains(text, "is there twice") {
			t.Errorf("%s: %v, and repair says\n%s", what, err, text)
			continue
		}

		after, err := openSmall(out, Options{})
		if err != nil || !maps.EqualFunc(maps.Collect(after.All()), want, slices.Equal[[]string]) {
			t.Errorf("%s: after repair: %v", what, err)
		}
	}
}

// Ensure that Repair loses nothing, and applies nothing twice, if only the header of the
// snapshot cannot be read, even beside a file that a compaction had no time to remove.
func TestRepairOfASnapshotWithoutAHeader(t *testing.T) {
	for _, leftover := range []bool{false, true} {
		dir, d := fourSegments(t, Options{})
		old := slices.Clone(dir.Names["seg-3.log"].Data)
		if err := d.compactNow(); err != nil {
			t.Fatal(err)
		}
		d.Put("after", "all")
		want := maps.Collect(d.All())
		d.Close()

		image := dir.With(storage.LockName, nil)
		image.Names["snap-3.log"].Data[40] ^= 1 // in its header
		if leftover {
			image.Names["seg-3.log"] = storetest.FileOf(old)
		}

		out, r, err := repaired(t, image)
		if err != nil || r.Lost || !r.Damaged {
			t.Errorf("leftover %v: %v, and repair says\n%s", leftover, err,
				strings.Join(r.Lines, "\n"))
			continue
		}
		wantAll(t, fmt.Sprint("repaired, leftover ", leftover), out, want)
	}
}

// Ensure that if the header of the snapshot cannot be read, and the file behind it only in part or
// not at all, Repair applies nothing twice, reports exactly what is lost, and makes a store that
// works.
func TestRepairOfASnapshotWithoutASuccessor(t *testing.T) {
	const gap = "LOST    what came after dir/snap-3.log"
	for what, c := range map[string]struct {
		spoil func(image *storetest.Dir)
		lost  string   // "": nothing is
		gone  []string // what the keys that are lost begin with: each has its segment and a number
	}{
		"its header is bad": {func(image *storetest.Dir) {
			image.Names["seg-4.log"].Data[40] ^= 1
		}, "", nil},
		"its header and its first frames are bad": {func(image *storetest.Dir) {
			clear(image.Names["seg-4.log"].Data[:headerSize+3*(frameSize+64)])
		}, gap, []string{"in4-00", "in4-01", "in4-02"}},
		"it is missing": {func(image *storetest.Dir) {
			delete(image.Names, "seg-4.log")
		}, gap, []string{"in4-"}},
		"all are missing": {func(image *storetest.Dir) {
			delete(image.Names, "seg-4.log")
			delete(image.Names, "seg-5.log")
		}, gap, []string{"in4-", "in5-"}},
		"it is missing, and the next one is empty": {func(image *storetest.Dir) {
			delete(image.Names, "seg-4.log")
			image.Names["seg-5.log"].Data = image.Names["seg-5.log"].Data[:headerSize]
		}, gap, []string{"in4-", "in5-"}},
	} {
		for _, leftover := range []bool{false, true} {
			what := fmt.Sprintf("%s, leftover %v", what, leftover)

			dir, d := fourSegments(t, Options{})
			old := slices.Clone(dir.Names["seg-3.log"].Data)
			if err := d.compactNow(); err != nil {
				t.Fatal(err)
			}

			// Two files follow the snapshot, and the second one has a few commits.
			for i, more := 0, 5; more > 0; i++ {
				if d.number() == 5 {
					more--
				}
				d.Put(fmt.Sprintf("in%d-%02d", d.number(), i), strings.Repeat("v", 50))
				if err := d.Commit(); err != nil {
					t.Fatal(err)
				}
			}

			want := maps.Collect(d.All())
			for _, gone := range c.gone {
				maps.DeleteFunc(want, func(key string, _ []string) bool {
					return strings.HasPrefix(key, gone)
				})
			}
			d.Close()

			image := dir.With(storage.LockName, nil)
			image.Names["snap-3.log"].Data[40] ^= 1 // in its header
			if leftover {
				image.Names["seg-3.log"] = storetest.FileOf(old)
			}
			c.spoil(image)

			out, r, err := repaired(t, image)
			text := strings.Join(r.Lines, "\n")
			if err != nil || r.Lost != (c.lost != "") || !strings.Contains(text, c.lost) ||
				strings.Count(text, "LOST") > 1 || strings.Contains(text, "frame 0 ") {
				t.Errorf("%s: %v, and repair says\n%s", what, err, text)
			}
			wantAll(t, what, out.Kill(), want)

			after, err := openSmall(out, Options{})
			if err != nil {
				t.Fatal(err)
			}
			after.Put("after", "all")
			if err := after.Commit(); err != nil {
				t.Fatal(err)
			}
			want["after"] = []string{"all"}
			for seed := range uint64(10) {
				wantAll(t, what+", then the power failed",
					out.Crash(rand.New(rand.NewPCG(seed, 1))), want)
			}
			after.Close()
		}
	}
}

// Ensure that Repair uses the log alone if all of it is there and the snapshot is damaged, at its
// end or in the middle.
func TestRepairUsesTheLogAlone(t *testing.T) {
	dir, d := newSmall(t, Options{Fsync: FsyncNever})
	dir.Before = func(c storetest.Call) error {
		if c.What == "remove" {
			return storetest.ErrDisk
		}
		return nil
	}

	for i := 0; d.snapshot == 0; i++ {
		d.Set(fmt.Sprint("key", i%30), strings.Repeat("v", 100))
		if err := d.Commit(); err != nil {
			t.Fatal(err)
		}
		d.AwaitCompaction()
	}

	name := logName(kindSnapshot, d.snapshot)
	want := maps.Collect(d.All())
	image := dir.Kill()
	dir.Before = nil
	d.Close()

	for what, spoil := range map[string]func(b []byte) []byte{
		"without its end":  func(b []byte) []byte { return b[:len(b)-frameSize] },
		"without a frame":  func(b []byte) []byte { return b[:headerSize] },
		"with a bad frame": func(b []byte) []byte { b[headerSize+frameSize] ^= 1; return b },
	} {
		bad := image.With(name, spoil(slices.Clone(image.Names[name].Data)))
		out, r, err := repaired(t, bad)
		if err != nil || !r.Damaged || r.Lost {
			t.Errorf("%s: %v, and repair says\n%s", what, err, strings.Join(r.Lines, "\n"))
		}
		wantAll(t, what, out, want)
	}
}

// Ensure that if half of the log files are another store's, Repair saves those that belong to
// STORE, as a start would, and without STORE one half.
func TestRepairOfHalfAStore(t *testing.T) {
	dir, d := fourSegments(t, Options{})
	d.Close()
	otherDir, other := fourSegments(t, Options{})
	other.Close()

	image := dir.With(storage.LockName, nil)
	for _, name := range []string{"seg-1.log", "seg-2.log"} {
		image.Names[name] = otherDir.Names[name]
	}

	_, r, err := repaired(t, image)
	if text := strings.Join(r.Lines, "\n"); err != nil || !r.Lost ||
		!strings.Contains(text, "ignored dir/seg-1.log: it belongs to another store") ||
		!strings.Contains(text, "frames of dir/seg-4.log") {
		t.Errorf("%v, and repair says\n%s", err, text)
	}

	delete(image.Names, storage.StoreName)
	if _, r, err := repaired(t, image); err != nil || !r.Lost {
		t.Errorf("without STORE: %v, and repair says\n%s", err, strings.Join(r.Lines, "\n"))
	}
}

// Ensure that a store made by an older Repair, whose headers do not say with which frame the log
// begins, loses nothing that it has answered: in its first run, in those after crashes, and if it
// is repaired once more.
func TestStoreOfAnOlderRepair(t *testing.T) {
	m := kvstore.NewMemory()
	m.Put("saved", "value")
	dir, id := storetest.New(), storeID{1, 2, 3}

	for _, h := range []fileHeader{{kind: kindSnapshot, id: id, number: 1},
		{kind: kindSegment, id: id, number: 2}} {
		_, err := createLog(dir, h, func(w *logWriter) error {
			if h.kind == kindSegment {
				return nil
			}
			return writeAll(w, m.Snapshot(), nil)
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	if _, err := writeID(dir, id); err != nil {
		t.Fatal(err)
	}
	dir = dir.With(storage.LockName, nil) // a start waits for one

	want := map[string][]string{"saved": {"value"}}
	for run := range 3 {
		d, err := openSmall(dir, Options{})
		if err != nil {
			t.Fatalf("run %d: %v", run, err)
		}

		for i := range 3 {
			key := fmt.Sprintf("key%d-%d", run, i)
			d.Put(key, "value")
			want[key] = []string{"value"}
			if err := d.Commit(); err != nil {
				t.Fatal(err)
			}
		}

		d.stopTimer()
		for seed := range uint64(10) {
			dir = dir.Crash(rand.New(rand.NewPCG(seed, 1)))
			wantAll(t, fmt.Sprintf("run %d, then the power failed", run), dir.Kill(), want)
		}

		again, r, err := repaired(t, dir)
		if err != nil || r.Damaged {
			t.Errorf("run %d, repaired once more: %v, %q", run, err, r.Lines)
		}
		wantAll(t, fmt.Sprintf("run %d, repaired once more", run), again, want)
	}
}

// readingDir counts the bytes that are read from its files.
type readingDir struct {
	*storetest.Dir
	bytes int
}

type readingFile struct {
	storage.File
	d *readingDir
}

func (d *readingDir) Open(name string) (storage.File, int64, error) {
	f, size, err := d.Dir.Open(name)
	return readingFile{f, d}, size, err
}

func (f readingFile) ReadAt(p []byte, off int64) (int, error) {
	n, err := f.File.ReadAt(p, off)
	f.d.bytes += n
	return n, err
}

// Ensure that a repair does not read the rest of the file again for each bad place, whether later
// frames call it synced or not.
func TestRepairOfManyBadPlaces(t *testing.T) {
	const frames, places = 4000, 50
	for _, isSynced := range []bool{true, false} {
		dir, id, value := storetest.New(), storeID{1, 2, 3}, strings.Repeat("v", 1000)
		header := fileHeader{kind: kindSegment, id: id, number: 1, first: 1}
		_, err := createLog(dir, header, func(w *logWriter) error {
			for i := range uint64(frames) {
				f := frame{sequence: i + 1, count: 1}
				if isSynced {
					f.synced = i
				}
				payload := appendRecord(nil, opPut, 0, fmt.Sprint(i), value)
				w.buf = appendFrame(w.buf, w.seed, f, payload)
			}
			copy(w.end[:], w.buf[len(w.buf)-frameSize:])
			return w.write(w.buf)
		})
		if _, storeErr := writeID(dir, id); err != nil || storeErr != nil {
			t.Fatal(err, storeErr)
		}

		data := dir.Names["seg-1.log"].Data
		for i := range places {
			data[headerSize+len(data)/places*i+100] ^= 1
		}

		reading := &readingDir{Dir: dir}
		out := storetest.New()
		r, err := Repair(reading, out)
		if err != nil || !r.Lost {
			t.Fatalf("%v, %v", r, err)
		}

		// A bad place may cost some buffers, but not the rest of the file.
		if most := 3*len(data) + 3*places*bufferSize; reading.bytes > most {
			t.Errorf("of %d bytes with %d bad places it read %d, more than %d", len(data), places,
				reading.bytes, most)
		}

		d, err := openSmall(out, Options{})
		if err != nil || keysOf(d) != frames-places {
			t.Fatalf("%d keys, want %d; %v", keysOf(d), frames-places, err)
		}
		d.Close()
	}
}
