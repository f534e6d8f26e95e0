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
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

// Ensure that repair saves all but what is damaged, and says what that is.
func TestRepair(t *testing.T) {
	dir, name, starts := segment(t, 8)
	data := slices.Clone(dir.Names[name].Data)
	data[starts[3]+frameSize+2] ^= 1                          // the fourth frame's records
	bad := dir.With(name, append(data, make([]byte, 500)...)) // room is no loss
	report, err := Repair(bad, time.Time{})
	if err != nil {
		t.Fatal(err)
	}
	text := strings.Join(report.Lines, "\n")
	for _, want := range []string{
		fmt.Sprintf("DAMAGED dir/seg-1.log is damaged at offset %d, frame 4", starts[3]),
		fmt.Sprintf("LOST    bytes %d to %d of dir/seg-1.log", starts[3], starts[4]),
		"repaired: 8 keys, 14 values",
	} {
		if !strings.Contains(text, want) {
			t.Errorf("repair does not say %q:\n%s", want, text)
		}
	}
	if strings.Count(text, "LOST") != 1 {
		t.Errorf("repair tells of other losses:\n%s", text)
	}
	d, err := Open(context.Background(), bad, Options{})
	if err != nil {
		t.Fatal(err)
	}
	want := []string{"value0", "value1", "value2", "value4", "value5", "value6", "value7"}
	if got := d.Get("key"); !slices.Equal(got, want) {
		t.Errorf("after repair %q, want %q", got, want)
	}
	d.Close()
	if report, err := Repair(bad, time.Time{}); err != nil || report.Damaged {
		t.Errorf("repair of a good store: %v, %v", report, err)
	}
}

// Ensure that Repair of a store of which every log file is gone says so, and changes nothing.
func TestRepairOfNothing(t *testing.T) {
	dir, name, _ := segment(t, 1)
	delete(dir.Names, name)
	found := slices.Sorted(maps.Keys(dir.Names))
	report, err := Repair(dir, time.Time{})
	text := strings.Join(report.Lines, "\n")
	if !errors.Is(err, ErrNothingRead) || !strings.Contains(text, "LOST    everything") {
		t.Errorf("%v, and it says\n%s", err, text)
	}
	if now := slices.Sorted(maps.Keys(dir.Names)); !slices.Equal(now, found) {
		t.Errorf("of %q it makes %q", found, now)
	}
}

// Ensure that repair takes an older snapshot, and what came after it, where the newest
// is damaged, and says whether anything is lost.
func TestRepairUsesTheOlderSnapshot(t *testing.T) {
	dir, d := newSmall(t, Options{Fsync: FsyncNever})
	d.minCompact = 1 << 30
	var old map[string]*storetest.File
	h := storetest.NewHistory()
	random := rand.New(rand.NewPCG(7, 7))
	for snapshots := 0; snapshots < 3; {
		number := d.number
		for range random.IntN(8) {
			storetest.RandomStep(t, random, d, h.Done)
		}
		d.Commit()
		if d.number > number && d.number%3 == 0 {
			old = dir.With(storage.LockName, nil).Names
			d.minCompact, d.waste = 0, 0 // whatever it holds
			d.compact()
			d.minCompact, d.waste = 1<<30, maxWaste
			d.AwaitCompaction()
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
	r, err := Repair(bad, time.Time{})
	if err != nil || !r.Damaged || r.Lost {
		t.Errorf("repair says %v, %v", r, err)
	}
	checkKept(t, h, bad, "repaired with the older snapshot")
	bad = dir.With(newest, dir.Names[newest].Data[:headerSize+30])
	if r, err := Repair(bad, time.Time{}); err == nil && !r.Lost {
		t.Errorf("without the older snapshot repair says %v", r)
	}
}

// Ensure that Repair takes a snapshot that cannot be opened for a moment for no worse than it is.
func TestRepairKeepsAGoodSnapshot(t *testing.T) {
	dir, d := newSmall(t, Options{})
	refuse := true
	dir.Before = func(c storetest.Call) error {
		if refuse && c.What == "remove" {
			return storetest.ErrDisk
		}
		return nil
	}
	d.minCompact = 1 << 40
	for i := 0; d.number < 4 || d.number < 8 && d.compacted == nil; i++ {
		if d.number == 3 {
			d.minCompact = 2000
		}
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
	refuse = false
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
		r, err := Repair(image, time.Now())
		if err != nil {
			continue // that is honest
		}
		image.Before = nil
		after, err := openSmall(image, Options{})
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

// Ensure that Repair says what is lost where a file is cut inside its header, or between two
// frames.
func TestRepairSaysWhatIsLost(t *testing.T) {
	for _, cut := range []string{"header", "frames"} {
		dir, d := fourSegments(t, Options{})
		keys, _, _ := d.Size()
		d.Close()
		data := slices.Clone(dir.Names["seg-2.log"].Data)
		if cut == "header" {
			data = data[:20]
		} else {
			seed := fileHeader{kind: kindSegment, id: d.id, number: 2}.seed()
			f, ok := decodeFrame(data[headerSize:], seed)
			if !ok {
				t.Fatal("no frame")
			}
			data = data[:headerSize+f.padded()]
		}
		image := dir.With("seg-2.log", data)
		r, err := Repair(image, time.Now())
		if err != nil {
			t.Fatal(err)
		}
		after, err := openSmall(image, Options{})
		if err != nil {
			t.Fatal(err)
		}
		if got, _, _ := after.Size(); got < keys && !r.Lost {
			t.Errorf("cut in %s: %d of %d keys are left, and Repair says\n%s", cut, got, keys,
				strings.Join(r.Lines, "\n"))
		}
	}
}

// Ensure that Repair does not say so where nothing is.
func TestRepairOfNothingLost(t *testing.T) {
	for _, zeros := range []bool{false, true} {
		dir, d := fourSegments(t, Options{})
		d.Put("last", "value")
		if err := d.Commit(); err != nil {
			t.Fatal(err)
		}
		keys, _, _ := d.Size()
		name := logName(kindSegment, d.number)
		d.stopTimer()
		image := dir.With(storeName, []byte("rubbish"))
		if zeros { // a rotation that was killed before its trim
			prev := logName(kindSegment, d.number-1)
			image = image.With(prev, append(slices.Clone(image.Names[prev].Data), make([]byte, 100)...))
		} else {
			image = image.With(name, image.Names[name].Data[:headerSize])
			keys-- // its only frame is what we cut off
		}
		r, err := Repair(image, time.Now())
		if err != nil {
			t.Fatal(err)
		}
		after, err := openSmall(image, Options{})
		if err != nil {
			t.Fatal(err)
		}
		got, _, _ := after.Size()
		if got < keys || r.Lost {
			t.Errorf("zeros %v: %d of %d keys, and Repair says\n%s", zeros, got, keys,
				strings.Join(r.Lines, "\n"))
		}
	}
}

// Ensure that a Repair that is killed anywhere, and run again, loses nothing, and says so.
func TestKilledRepairThenAgain(t *testing.T) {
	for _, room := range []bool{false, true} {
		for n := 1; n < 200; n++ {
			dir, d := newSmall(t, Options{})
			d.minCompact = 1 << 40
			if !room {
				d.reserve, d.spare = 0, 0
			}
			h := storetest.NewHistory()
			if err := storetest.Script(t, d, h); err != nil {
				t.Fatal(err)
			}
			d.Close()
			image := dir.With(storeName, []byte("rubbish"))
			image.FailAt, image.Forever = n, true
			Repair(image, time.Now())
			reached := image.Calls >= n
			image.FailAt, image.Locked = 0, false
			image = image.Crash(rand.New(rand.NewPCG(uint64(n), 1)))
			if !reached {
				break
			}
			if a, err := openSmall(image.Kill(), Options{}); err == nil {
				if !h.Told.Equal(a) {
					t.Errorf("killed at call %d: opens with other data", n)
				}
			}
			r, err := Repair(image, time.Now())
			if err != nil {
				t.Errorf("call %d: %v", n, err)
			}
			if r.Lost {
				t.Errorf("killed at call %d: the next Repair says\n%s", n, strings.Join(r.Lines, "\n"))
			}
			a, err := openSmall(image, Options{})
			if err != nil || !h.Told.Equal(a) {
				t.Errorf("call %d: after repair: %v", n, err)
			}
		}
	}
}
