package durable

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"kvserver/kvstore"
	"kvserver/kvstore/storage"
	"kvserver/kvstore/storetest"
	"log/slog"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
)

// Ensure that a log that ends anywhere opens with all its whole frames, whatever
// garbage follows, that the log says what was cut off, and that Check calls the file torn.
func TestTornEnd(t *testing.T) {
	dir, name, starts := segment(t, 12)
	whole := dir.Names[name].Data

	// Another store's frames.
	stale := storetest.New()
	d, err := openStill(stale, Options{Fsync: FsyncNever})
	if err != nil {
		t.Fatal(err)
	}
	d.zerosAhead = 0
	d.Put("stale", "stale")
	d.Commit()

	var ends []int // of the frames, without padding
	for _, start := range starts[:len(starts)-1] {
		ends = append(ends, start+frameSize+int(binary.LittleEndian.Uint32(whole[start+4:])))
	}

	for cut := headerSize; cut <= len(whole); cut = storetest.Next(cut, 4) {
		// What follows the cut: zeros, rubbish, and whole frames with another store's seed.
		behind := [][]byte{make([]byte, 1000), bytes.Repeat([]byte("\xff"), 100),
			stale.Names[name].Data[headerSize:]}
		for _, garbage := range [][]byte{nil, behind[cut%len(behind)]} {
			data, frames := append(slices.Clone(whole[:cut]), garbage...), 0
			for frames < len(starts)-1 && len(data) >= starts[frames+1] &&
				bytes.HasPrefix(data, whole[:ends[frames]]) {
				frames++ // whatever the bytes of the padding are
			}

			var log bytes.Buffer
			torn := dir.With(name, data)
			report, checkErr := Check(torn)
			d, err := openStill(torn,
				Options{Log: slog.New(slog.NewTextHandler(&log, nil))})
			if err != nil {
				t.Fatalf("cut at %d, %d bytes of garbage: %v", cut, len(garbage), err)
			}
			if got := len(d.Get("key")); got != frames {
				t.Fatalf("cut at %d: %d frames are there, want %d", cut, got, frames)
			}
			if lost := len(bytes.TrimRight(data[starts[frames]:],
				"\x00")); strings.Contains(log.String(), "incomplete commit") != (lost > 0) ||
				lost > 0 && !strings.Contains(log.String(), fmt.Sprint("bytes=", lost)) {
				t.Fatalf("cut at %d, %d bytes lost: the log says %s", cut, lost, log.String())
			} else if strings.HasPrefix(report.Lines[0], "torn ") != (lost > 0) || checkErr != nil {
				t.Fatalf("cut at %d, %d bytes lost: a check says %q, %v", cut, lost, report.Lines, checkErr)
			}

			d.zerosAhead = 500
			d.Put("key", "more")
			if err := d.Close(); err != nil {
				t.Fatal(err)
			}
			if d, err = openStill(torn, Options{}); err != nil ||
				len(d.Get("key")) != frames+1 {
				t.Fatalf("cut at %d: written on, then %v", cut, err)
			}
		}
	}
}

// Ensure that a commit which a start has cut off does not come back behind later commits, even if
// the log before it ends in a clean stop, or an earlier start could not clear it on disk.
func TestTornEndStaysCut(t *testing.T) {
	for _, afterStop := range []bool{false, true} {
		for _, startFails := range []bool{false, true} {
			tornEndStaysCut(t, afterStop, startFails)
		}
	}
}

// tornEndStaysCut has a start cut off the end of a log, behind a clean stop or not, perhaps after
// another start whose fsync of the log fails. It checks that what was cut stays away.
func tornEndStaysCut(t *testing.T, afterStop, startFails bool) {
	open := func(dir *storetest.Dir) *Store {
		d, err := openStill(dir, Options{})
		if err != nil {
			t.Fatal(err)
		}
		return d
	}
	// Frames of whole sectors.
	put := func(d *Store, key, v string, end int64) {
		n := end - d.current.size - frameSize - int64(len(key)) - 4
		d.Put(key, v+strings.Repeat("x", int(n)-len(v)))
		if err := d.Commit(); err != nil {
			t.Fatal(err)
		}
		if d.current.size != end {
			t.Fatalf("size %d, want %d", d.current.size, end)
		}
	}

	dir := storetest.New()
	d := open(dir)
	if afterStop {
		put(d, "a", "first", 512-frameSize)
		if err := d.Close(); err != nil {
			t.Fatal(err)
		}
		d = open(dir)
	} else {
		put(d, "a", "first", 512)
	}

	// A power failure may leave of a large Commit its second frame, but not the first.
	d.fsync = FsyncNever
	put(d, "b", "torn", 1024)
	put(d, "c", "CUT", 1536)
	data := slices.Clone(dir.Names["seg-1.log"].Data)
	clear(data[512:1024])
	image := dir.With("seg-1.log", data)

	if startFails {
		image.Before = func(c storetest.Call) error {
			if c.What == "sync" && c.Name == "seg-1.log" {
				image.Before = nil
				return storetest.ErrDisk
			}
			return nil
		}
		if _, err := openStill(image, Options{}); err == nil {
			t.Fatal("the start does not fail")
		}
	}

	// The next one succeeds, and answers.
	d = open(image)
	if len(d.Get("c")) != 0 {
		t.Fatal("c was not cut")
	}

	// The new b ends where the torn one did, so the old frame of c would fit behind it.
	put(d, "b", "new", 1024)
	d.Get("c") // a client is told that there is none
	if err := d.Commit(); err != nil {
		t.Fatal(err)
	}

	d = open(image.Crash(rand.New(rand.NewPCG(1, 1))))
	if c := d.Get("c"); len(c) != 0 {
		t.Errorf("behind a clean stop: %v, a start fails: %v: a commit that was cut, and answered "+
			"as not there, is back: %.10q", afterStop, startFails, c)
	}
}

// Ensure that a torn end on a full disk does not keep the store from starting, even if
// there are whole frames behind the torn one.
func TestTornEndOnAFullDisk(t *testing.T) {
	for hole := range 4 { // the frame that is torn
		dir := storetest.New()
		d, err := openStill(dir, Options{Fsync: FsyncNever})
		if err != nil {
			t.Fatal(err)
		}

		var starts []int64
		for range 4 {
			starts = append(starts, d.current.size)
			d.Put("key", "value")
			d.Commit()
		}

		full := dir.With("seg-1.log", dir.Names["seg-1.log"].Data[:d.size])
		full.Names["seg-1.log"].Data[starts[hole]+frameSize]++
		for _, f := range full.Names {
			full.Room += len(f.Data)
		}

		d, err = openStill(full, Options{})
		if err != nil || len(d.Get("key")) != hole {
			t.Fatalf("frame %d is torn on a full disk: %v", hole, err)
		}
	}
}

// Ensure that a start refuses every flipped bit before the last frame, names its place,
// and changes nothing; in the last frame it is a torn end.
func TestFlippedBits(t *testing.T) {
	dir, name, starts := segment(t, 8)
	whole := dir.Names[name].Data
	last := starts[len(starts)-2]

	for bit := 0; bit < 8*len(whole); bit = storetest.Next(bit, 5) {
		data := slices.Clone(whole)
		data[bit/8] ^= 1 << (bit % 8)
		bad := dir.With(name, data)
		d, err := openStill(bad, Options{})

		if bit/8 >= last {
			if padding := err == nil && len(d.Get("key")) == 8; err != nil ||
				len(d.Get("key")) != 7 && !padding {
				t.Fatalf("bit %d, in the last frame: %v", bit, err)
			}
			continue
		}

		if err == nil && len(d.Get("key")) == 8 {
			continue // in the padding: nobody reads it
		}

		var damage *storage.DamageError
		if !errors.As(err, &damage) && !errors.Is(err, ErrNewer) && !errors.Is(err, ErrOlder) {
			t.Fatalf("bit %d of byte %d: %v", bit%8, bit/8, err)
		}
		if damage != nil && bit/8 >= headerSize &&
			(damage.Offset > int64(bit/8) || damage.File != "dir/"+name || damage.Frame == 0) {
			t.Fatalf("bit %d of byte %d: the error names another place: %v", bit%8, bit/8, err)
		}

		if !bytes.Equal(bad.Names[name].Data, data) || len(bad.Names) != len(dir.Names) {
			t.Fatalf("bit %d of byte %d: refused, but something was changed", bit%8, bit/8)
		}
	}
}

// Ensure that every flipped bit of STORE is reported as damage of STORE, not of the log files, and
// that repair mends it without a loss.
func TestFlippedStore(t *testing.T) {
	dir, _, _ := segment(t, 3)
	whole := dir.Names[storage.StoreName].Data

	for bit := 0; bit < 8*len(whole); bit = storetest.Next(bit, 5) {
		data := slices.Clone(whole)
		data[bit/8] ^= 1 << (bit % 8)
		bad := dir.With(storage.StoreName, data)

		var damage *storage.DamageError
		if _, err := openStill(bad, Options{}); !errors.As(err, &damage) ||
			damage.File != "dir/STORE" {
			t.Fatalf("bit %d of byte %d: %v", bit%8, bit/8, err)
		}

		// A repair takes longer than a start, so it is tried for one bit in 50.
		if bit%50 > 0 {
			continue
		}
		out, r, err := repaired(t, bad)
		if err != nil || r.Lost {
			t.Fatalf("bit %d of byte %d: repair says %v, %v", bit%8, bit/8, r, err)
		}
		if d, err := openStill(out, Options{}); err != nil ||
			len(d.Get("key")) != 3 {
			t.Fatalf("bit %d of byte %d: after repair: %v", bit%8, bit/8, err)
		}
	}
}

// Ensure that a store of one log file without STORE is damaged, however short that file is, and
// that repair mends it without a loss. With a part of another file it is an unfinished copy.
func TestLostStore(t *testing.T) {
	for _, commits := range []int{1, 20} {
		dir, name, _ := segment(t, commits)
		delete(dir.Names, storage.StoreName)
		_, err := openStill(dir.Kill(), Options{})
		var damage *storage.DamageError
		if !errors.As(err, &damage) || damage.File != "dir/STORE" {
			t.Errorf("%d bytes: Open: %v", len(dir.Names[name].Data), err)
		}

		out, r, err := repaired(t, dir)
		if err != nil || r.Lost {
			t.Fatalf("repair says %v, %v", r, err)
		}
		d, err := openStill(out, Options{})
		if err != nil || len(d.Get("key")) != commits {
			t.Errorf("after repair: %v", err)
		}

		copied := dir.With("seg-2.log"+tmpSuffix, make([]byte, headerSize+1))
		_, err = openStill(copied, Options{})
		if !errors.Is(err, ErrUnfinished) {
			t.Errorf("beside a part of a file: Open: %v", err)
		}
	}
}

// fourSegments returns a store that writes its fourth file, and has compacted nothing.
func fourSegments(t *testing.T, opts Options) (*storetest.Dir, *Store) {
	dir, d := newSmall(t, opts)
	d.minCompact = 1 << 40
	for i := 0; d.number() < 4; i++ {
		d.Put("key"+fmt.Sprint(i), strings.Repeat("v", 50))
		if err := d.Commit(); err != nil {
			t.Fatal(err)
		}
	}
	return dir, d
}

// Ensure that a bad end of a full file is not taken for torn if the next file is empty, however
// many bytes are bad: the next one's header says where the full one ended. Only the frame that says
// that another file follows may be missing, as after a broken-off rotation.
func TestDamageBeforeAnEmptyFile(t *testing.T) {
	for what, spoil := range map[string]func(b []byte, n int) []byte{
		"cut":   func(b []byte, n int) []byte { return b[:len(b)-n] },
		"zeros": func(b []byte, n int) []byte { clear(b[len(b)-n:]); return b },
		"rubbish": func(b []byte, n int) []byte {
			for i := range n {
				b[len(b)-n+i] = 'x'
			}
			return b
		},
	} {
		synctest.Test(t, func(t *testing.T) {
			dir, d := fourSegments(t, Options{})
			want := maps.Collect(d.All())
			image := dir.Crash(rand.New(rand.NewPCG(1, 1)))
			d.Close()
			whole := image.Names["seg-3.log"].Data
			records := bytes.TrimRight(whole[:len(whole)-frameSize], "\x00") // without padding

			for n := 1; n <= 700; n = storetest.Next(n, 5) {
				data := spoil(slices.Clone(whole), n)
				bad := image.With("seg-3.log", data)
				r, err := Check(bad)
				if err != nil {
					t.Fatal(err)
				}

				again, err := openSmall(bad, Options{Fsync: FsyncNever})
				isDamage := errors.As(err, new(*storage.DamageError))
				isLossless := bytes.HasPrefix(data, records)

				switch {
				case err == nil && isLossless:
					got := maps.Collect(again.All())
					if !maps.EqualFunc(got, want, slices.Equal[[]string]) {
						t.Errorf("%s, %d bytes: %d of %d keys", what, n, len(got), len(want))
					}
				case !isDamage:
					t.Errorf("%s, %d bytes: Open: %v", what, n, err)
				}

				if r.Damaged != isDamage {
					t.Errorf("%s, %d bytes: Open: %v, and Check says %v", what, n, err, r.Lines)
				}
			}
		})
	}
}

// variousStores returns directories with a good store and with others.
func variousStores(t *testing.T) map[string]*storetest.Dir {
	dir, d := newSmall(t, Options{})

	// Old files stay beside the snapshots, as after a kill in a compaction.
	dir.Before = func(c storetest.Call) error {
		if c.What == "remove" {
			return storetest.ErrDisk
		}
		return nil
	}

	for d.number() < 4 || d.size < headerSize+300 {
		d.Put("key", "value")
		d.Delete("key")
		if err := d.Commit(); err != nil {
			t.Fatal(err)
		}
		d.AwaitCompaction()
	}

	// In two copies the newest file has a bad frame, before others, and at its end.
	name := d.current.header.name()
	bad, torn := dir.Kill(), dir.Kill()
	bad.Names[name].Data[headerSize+frameSize] ^= 1
	torn.Names[name].Data[d.size-8] ^= 1

	// One has lost STORE. One ends with an empty file, as after a rotation; the file before it is
	// not read at once.
	lost, _, _ := segment(t, 1)
	delete(lost.Names, storage.StoreName)
	rotated, d := newSmall(t, Options{})
	d.Put("large", strings.Repeat("v", bufferSize))
	d.minCompact = 1 << 30
	if err := d.Commit(); err != nil || d.size > headerSize {
		t.Fatal(err)
	}
	return map[string]*storetest.Dir{"good": dir, "bad": bad, "torn": torn, "lost": lost,
		"rotated": rotated, "new": storetest.New()}
}

// Ensure that a start, a Check and a Repair in which a call fails return its error, or what they
// return without it if the call changes nothing: no file is called damaged for that, and no damage
// is overlooked.
func TestFailedCallIsNoDamage(t *testing.T) {
	// What each returns, as text.
	calls := map[string]func(dir *storetest.Dir) (string, error){
		"Open": func(dir *storetest.Dir) (string, error) {
			d, err := openSmall(dir, Options{})
			if err != nil {
				return "", err
			}
			return fmt.Sprint(d.sequence), nil
		},
		"Check": func(dir *storetest.Dir) (string, error) {
			r, err := check(dir)
			return fmt.Sprint(r.Lines), err
		},
		"Repair": func(dir *storetest.Dir) (string, error) {
			r, err := Repair(dir, storetest.New())
			return fmt.Sprint(r.Lines), err
		},
	}

	changes := func(call string) bool {
		return !slices.Contains([]string{"", "open", "read", "list", "stat", "fstat"}, call)
	}
	for what, image := range variousStores(t) {
		for name, call := range calls {
			want, wantErr := call(image.Kill())
			for n, reached := 1, true; reached; n = storetest.Next(n, 1) {
				for _, failure := range []error{syscall.EMFILE, syscall.EIO} {
					failing := image.Kill()
					failing.FailAt, failing.Failure = n, failure
					var failed string // the kind of the call
					failing.Before = func(c storetest.Call) error {
						if failing.Calls+1 == n {
							failed = c.What
						}
						return nil
					}

					got, err := call(failing)
					reached = failing.Calls >= n
					isSame := got == want && fmt.Sprint(err) == fmt.Sprint(wantErr)
					if !errors.Is(err, failure) && (!isSame || changes(failed) && failure == syscall.EIO) {
						t.Errorf("%s of a %s store, call %d (%s): %v: %q, %v, want %q, %v", name, what,
							n, failed, failure, got, err, want, wantErr)
					}
				}
			}
		}
	}
}

// Ensure that an older copy that was put over a newer store is refused.
func TestOlderCopyOverNewer(t *testing.T) {
	dir, d := newSmall(t, Options{})
	d.minCompact = 1 << 30
	for i := range 30 {
		d.Put("key", fmt.Sprint(i))
		d.Commit()
	}
	older := dir.Crash(rand.New(rand.NewPCG(1, 1)))

	// From here on, compactions replace the files that the copy has.
	d.minCompact = 100
	for i := range 300 {
		d.Put("key", fmt.Sprint(i))
		d.Delete("key")
		d.Commit()
		d.AwaitCompaction()
	}
	d.Close()

	both := dir.With(storage.LockName, nil)
	for name, f := range older.Names {
		both.Names[name] = f
	}

	var damage *storage.DamageError
	if _, err := openStill(both, Options{}); !errors.As(err, &damage) ||
		!strings.Contains(err.Error(), "an older copy was put over a newer store") {
		t.Errorf("an older copy over a newer store: %v", err)
	}
	if r, err := check(both); err != nil || !r.Damaged {
		t.Errorf("check: %v, %v", r, err)
	}
}

// Ensure that a whole file is refused if it is from a copy of the store that was written to as
// well, because the next file does not begin with the frame after it: some are missing, or are
// there twice.
func TestFileOfAWrittenCopy(t *testing.T) {
	made, d := newSmall(t, Options{})
	d.Close()
	write := func(value string) *storetest.Dir {
		dir := made.Kill()
		d, err := openSmall(dir, Options{})
		if err != nil {
			t.Fatal(err)
		}
		d.minCompact = 1 << 40
		for d.number() < 3 {
			d.Put("key", value)
			d.Commit()
		}
		d.Close()
		return dir
	}

	few, many := write(strings.Repeat("v", 100)), write("v")
	for what, mixed := range map[string]*storetest.Dir{
		"frames are missing":     many.With("seg-1.log", few.Names["seg-1.log"].Data),
		"frames are there twice": few.With("seg-1.log", many.Names["seg-1.log"].Data),
	} {
		_, err := openStill(mixed, Options{})
		if !errors.As(err, new(*storage.DamageError)) ||
			!strings.Contains(err.Error(), "seg-2.log is damaged: the file begins with frame") {
			t.Errorf("%s: %v", what, err)
		}
		if r, err := check(mixed); err != nil || !r.Damaged {
			t.Errorf("%s: check: %v, %v", what, r, err)
		}
	}
}

// Ensure that a start removes a segment that the snapshot replaces only if it is full and whole.
func TestReplacedSegment(t *testing.T) {
	dir, d := fourSegments(t, Options{})
	full := slices.Clone(dir.Names["seg-3.log"].Data)
	if err := d.compactNow(); err != nil {
		t.Fatal(err)
	}
	d.Close()

	flipped := slices.Clone(full)
	flipped[headerSize+50] ^= 1
	behind := func(more string) []byte { return append(slices.Clone(full), more...) }
	for _, c := range []struct {
		what    string
		data    []byte
		isWhole bool
	}{
		{"whole", full, true},
		{"with room for frames", behind(strings.Repeat("\x00", 2*frameSize)), true},
		{"with bytes behind it", behind("rubbish"), false},
		{"with its first frames behind it", behind(string(full[headerSize:])), false},
		{"without its last frame", full[:len(full)-frameSize], false},
		{"with a bit flipped", flipped, false},
		{"with nothing but a header", full[:headerSize], false},
		{"empty", nil, false},
	} {
		image := dir.With(storage.LockName, nil).With("seg-3.log", c.data)
		_, err := openStill(image, Options{})
		_, isThere := image.Names["seg-3.log"]
		if isDamage := errors.As(err, new(*storage.DamageError)); isDamage == c.isWhole ||
			isThere == c.isWhole {
			t.Errorf("a segment %s: it is still there: %v; %v", c.what, isThere, err)
		}
	}
}

// Ensure that after a clean stop a start logs no warning, that even damage in the last
// frame is noticed, and that missing, foreign and misplaced files are refused.
func TestRefusals(t *testing.T) {
	dir := storetest.New()
	d, err := openSmall(dir, Options{})
	if err != nil {
		t.Fatal(err)
	}
	storetest.Script(t, d, storetest.NewHistory())

	d.minCompact = 1 << 30 // from here on keep several full files
	for i := range 300 {
		d.Put("key", fmt.Sprint(i))
		d.Commit()
	}
	d.Close()

	var log bytes.Buffer
	if d, err = openSmall(dir, Options{Log: slog.New(slog.NewTextHandler(&log,
		&slog.HandlerOptions{Level: slog.LevelWarn}))}); err != nil || log.Len() > 0 {
		t.Fatalf("after a clean stop: %v, %s", err, log.String())
	}

	d.minCompact = 1 << 30
	d.Put("one", "more")
	d.Close()

	l, _ := readLayout(dir)
	first, last := logName(kindSegment, l.snapshot+1), logName(kindSegment, l.last)
	snapshot := logName(kindSnapshot, l.snapshot)

	change := func(name string, f func(b []byte) []byte) *storetest.Dir {
		return dir.With(name, f(slices.Clone(dir.Names[name].Data)))
	}
	without := func(name string) *storetest.Dir {
		c := dir.With(name, nil)
		delete(c.Names, name)
		return c
	}
	cut := func(n int) func(b []byte) []byte {
		return func(b []byte) []byte { return b[:len(b)-n] }
	}

	newer := func(b []byte) []byte {
		b[8]++
		binary.LittleEndian.PutUint32(b[60:], crc(0, b[:60]))
		return b
	}
	older := func(b []byte) []byte {
		b[8] = oldestVersion - 1
		binary.LittleEndian.PutUint32(b[60:], crc(0, b[:60]))
		return b
	}

	seed := func(name string) uint32 {
		h, _ := decodeHeader(dir.Names[name].Data)
		return h.seed()
	}

	// The closed segment without its last frame, and the snapshot with one more.
	end, last1 := headerSize, 0
	for b := dir.Names[first].Data; end < len(b); {
		f, _ := decodeFrame(b[end:], seed(first))
		last1, end = end, end+int(f.padded())
	}

	var frames uint64
	for b, at := dir.Names[snapshot].Data, headerSize; at < len(b); frames++ {
		f, _ := decodeFrame(b[at:], seed(snapshot))
		at += int(f.padded())
	}
	again := func(b []byte) []byte {
		return appendFrame(b, seed(snapshot), frame{sequence: frames + 1, kind: frameEnd}, nil)
	}

	// A log whose third frame is bad or missing or that has a strange record, and files of another
	// store.
	whole, _, starts := segment(t, 5)
	flipped := slices.Clone(whole.Names["seg-1.log"].Data)
	flipped[starts[2]+8] ^= 1
	h, _ := decodeHeader(flipped)
	strange := appendFrame(slices.Clone(whole.Names["seg-1.log"].Data), h.seed(),
		frame{sequence: 6, synced: 5, count: 1}, appendRecord(nil, 200, 0, "k"))
	gap := slices.Concat(whole.Names["seg-1.log"].Data[:starts[2]],
		whole.Names["seg-1.log"].Data[starts[3]:])
	other := storetest.New()
	openStill(other, Options{})
	two, d := newSmall(t, Options{})
	d.rotate()
	d.Put("k", "v")
	d.Commit()

	for what, c := range map[string]struct {
		dir  *storetest.Dir
		want string
	}{
		"last data frame": {change(last,
			func(b []byte) []byte { b[len(b)-frameSize-12] ^= 1; return b }), "is damaged at " +
			"offset"},
		"closed segment cut": {change(first, cut(8)), first + " is damaged at offset"},
		"closed segment with more": {change(first, func(b []byte) []byte { return append(b, "more"...) }),
			first + " is damaged at offset"},

		"snapshot cut": {change(snapshot, cut(frameSize)), "the snapshot has no proper end"},
		"snapshot with more": {change(snapshot,
			func(b []byte) []byte {
				return append(b, b[headerSize:]...)
			}), snapshot + " is damaged"},

		"snapshot missing": {without(snapshot), "seg-1.log is damaged: the file is missing"},
		"segment missing":  {without(first), first + " is damaged: the file is missing"},
		"STORE missing":    {without(storage.StoreName), "STORE is damaged: the file is missing"},

		"STORE cut": {change(storage.StoreName, cut(5)),
			"STORE is damaged: not as it was written"},
		"STORE with more": {change(storage.StoreName,
			func(b []byte) []byte { return append(b, 'x') }), "STORE is damaged"},
		"newer STORE": {change(storage.StoreName, func(b []byte) []byte {
			line, _, _ := strings.Cut(strings.Replace(string(b), "version 2", "version 9", 1),
				", check")
			return fmt.Appendf([]byte(line), storeCheck, crc(0, []byte(line)))
		}), ErrNewer.Error()},

		"older STORE": {change(storage.StoreName,
			func([]byte) []byte {
				return []byte("kvserver store, version 1, id 00112233445566778899aabbccddeeff\n")
			}), ErrOlder.Error()},
		"older segment": {change(last, older), ErrOlder.Error()},
		"STORE with a short id": {change(storage.StoreName, func([]byte) []byte {
			line := fmt.Sprintf(storeFormat, storeVersion, "0123")
			return fmt.Appendf([]byte(line), storeCheck, crc(0, []byte(line)))
		}), "STORE is damaged: not as it was written"},
		"STORE of no version": {change(storage.StoreName,
			func(b []byte) []byte {
				return bytes.Replace(b, []byte("version 2"), []byte("version 3"), 1)
			}), "STORE is damaged: not as it was written"},

		"another store's STORE": {dir.With(storage.StoreName, other.Names[storage.StoreName].Data),
			"STORE is damaged: it is another store's"},
		"another store's half": {two.With("seg-1.log", other.Names["seg-1.log"].Data),
			"seg-1.log is damaged: the file belongs to another store"},
		"newest missing": {without(last), fmt.Sprintf("%s is damaged: the file is missing: dir/%s says "+
			"that it follows", last, logName(kindSegment, l.last-1))},
		"frame missing": {whole.With("seg-1.log", gap),
			fmt.Sprintf("seg-1.log is damaged at offset %d, frame 3: frame 3 is missing",
				starts[2])},

		"frame's head": {whole.With("seg-1.log", flipped), "frame 3: the frame's checksum is wrong"},
		"unknown record": {whole.With("seg-1.log", strange), fmt.Sprintf(
			"offset %d, frame 6: a record of the unknown kind 200", starts[5])},
		"copy cut in two files": {change(logName(kindSegment, l.last-1), cut(8)).With(last,
			dir.Names[last].Data[:10]), logName(kindSegment, l.last-1) + " is damaged at offset"},

		"closed segment's last": {change(first, func(b []byte) []byte { return b[:last1] }),
			"the frame that says that another file follows is missing"},
		"closed segment's end": {change(first,
			func(b []byte) []byte { clear(b[last1:]); return b }), first + " is damaged at offset"},
		"snapshot ends twice": {change(snapshot, again), fmt.Sprintf("offset %d, frame %d: a frame "+
			"follows the one that should be the last", len(dir.Names[snapshot].Data), frames+1)},

		"newer segment":  {change(last, newer), ErrNewer.Error()},
		"newer snapshot": {change(snapshot, newer), ErrNewer.Error()},
		"a huge number": {dir.With(fmt.Sprintf("seg-%d.log", uint64(1<<62-1)), nil),
			fmt.Sprintf("seg-%d.log is damaged: the file is missing", l.last+1)},
		"a number too far": {dir.With("seg-9223372036854775808.log", nil),
			storage.ErrNotOurs.Error()},

		"empty segment": {change(last, func(b []byte) []byte { return nil }),
			last + " is damaged: shorter than a header"},
		"another store's file": {dir.With(last, other.Names["seg-1.log"].Data),
			"the file belongs to another store"},
		"renamed file": {dir.With(last, dir.Names[snapshot].Data),
			"the file is another one, renamed"},

		"all logs gone": {func() *storetest.Dir {
			c := without(last)
			for n := range c.Names {
				if n != storage.StoreName && n != storage.LockName {
					delete(c.Names, n)
				}
			}
			return c
		}(), "the file is missing"},

		"somebody else's folder": {dir.With("photo.jpg", nil), storage.ErrNotOurs.Error()},
		"segment of zeros": {change(first, func(b []byte) []byte { clear(b); return b }),
			first + " is damaged: not a log file"},
	} {
		before := maps.Clone(c.dir.Names)
		_, err := openStill(c.dir, Options{})
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %q", what, err, c.want)
		}
		if c.dir.Locked || c.dir.Handles > 0 || !maps.Equal(before, c.dir.Names) {
			t.Errorf("%s: something was changed, or is still locked or open", what)
		}

		if errors.Is(err, storage.ErrNotOurs) || errors.Is(err, ErrNewer) ||
			errors.Is(err, ErrOlder) {
			_, checkErr := check(c.dir)
			_, _, repairErr := repaired(t, c.dir)
			if checkErr == nil || repairErr == nil || !maps.Equal(before, c.dir.Names) {
				t.Errorf("%s: check says %v, repair %v", what, checkErr, repairErr)
			}
			continue
		}

		report, checkErr := check(c.dir)
		isOne := strings.Count(fmt.Sprint(report.Lines), "DAMAGED") == 1 // not the next files, too
		if checkErr != nil || !report.Damaged || !isOne && what == "closed segment cut" {
			t.Errorf("%s: check says %v, %v", what, report, checkErr)
		}

		out, report, err := repaired(t, c.dir)
		if what == "all logs gone" {
			if err == nil || !maps.Equal(before, c.dir.Names) {
				t.Errorf("%s: repair says %v, %v", what, report, err)
			}
			continue
		}
		if err != nil || !report.Damaged {
			t.Errorf("%s: repair says %v, %v", what, report, err)
		}

		if what == "closed segment's end" && !strings.Contains(fmt.Sprint(report),
			"LOST    frames") {
			t.Errorf("%s: repair says %v", what, report)
		}

		if d, err := openStill(out, Options{}); err != nil {
			t.Errorf("%s: after repair: %v", what, err)
		} else {
			d.Put("after", "repair")
			d.Close()
			if report, err := check(out); err != nil || report.Damaged {
				t.Errorf("%s: check after repair: %v, %v", what, report, err)
			}
		}
	}
}

// Ensure that any bytes in the place of a log are refused or read, without a
// panic, and that a store which opens once opens again.
func FuzzRecovery(f *testing.F) {
	const name = "seg-1.log"
	base := fixedDir(f, 5).With(storage.LockName, nil) // a start waits for one
	good := base.Names[name].Data
	f.Add(good)
	f.Add(good[:len(good)-3])
	f.Add(good[:headerSize])
	f.Add(append(slices.Clone(good), good[headerSize:]...))
	f.Add([]byte{})

	f.Fuzz(func(t *testing.T, data []byte) {
		c := base.With(name, data)
		d, err := openStill(c, Options{})
		if err == nil {
			d.Put("k", "v")
			if err := d.Close(); err != nil {
				t.Fatal(err)
			}
			if _, err := openStill(c, Options{}); err != nil {
				t.Fatalf("opened, closed, then: %v", err)
			}
			return
		}

		if r, err := check(c); err == nil && !r.Damaged {
			t.Fatal("refused by Open, good to Check")
		}
		if out, _, err := repaired(t, c); err == nil {
			if _, err := openStill(out, Options{}); err != nil {
				t.Fatalf("after repair: %v", err)
			}
		}
	})
}

// Ensure that any records in a frame are applied or refused, without a panic, and that no record is
// empty.
func FuzzRecords(f *testing.F) {
	f.Add(string(appendRecord(appendRecord(nil, opPut, 0, "k", "v"), opUpdate, 0, "k", "v", "w")),
		uint32(2))
	f.Add(string(appendRecord(nil, opDelete, 0, strings.Repeat("k", 200))), uint32(1))
	f.Add("\x01\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", uint32(1))
	f.Fuzz(func(t *testing.T, payload string, count uint32) {
		m := kvstore.NewMemory()
		if err := apply(m, payload, count); err == nil && int(count) > len(payload) {
			t.Fatalf("%d records in %d bytes", count, len(payload))
		}
	})
}

// Ensure that a record that no store writes is refused, although its frame's checksum is right.
func TestStrangeRecords(t *testing.T) {
	for what, record := range map[string][]byte{
		"a deadline over the largest int64": appendExpire(nil, "k", -1),
		"a list with fewer values than it says": append(appendRecord(nil, opList, 0, "k"),
			"\x02\x01v"...),
		"half a key":        appendRecord(nil, opDelete, 0, "key")[:3],
		"none":              nil,
		"an unknown kind":   appendRecord(nil, 200, 0, "k"),
		"half a second one": append(appendRecord(nil, opDelete, 0, "k"), opDelete),
	} {
		m := kvstore.NewMemory()
		m.Put("k", "v")
		err := apply(m, string(record), 1)
		_, hasDeadline := m.Deadline("k")
		if err == nil || hasDeadline {
			t.Errorf("%s: %v; the key has a deadline: %v", what, err, hasDeadline)
		}
	}
}

// eioDir is a directory in which one file cannot be read.
type eioDir struct {
	*storetest.Dir
	name string
}

type eioFile struct{ storage.File }

func (eioFile) ReadAt([]byte, int64) (int, error) { return 0, syscall.EIO }

func (d eioDir) Open(name string) (storage.File, int64, error) {
	f, size, err := d.Dir.Open(name)
	if err == nil && name == d.name {
		return eioFile{f}, size, nil
	}
	return f, size, err
}

// Ensure that an I/O error in the newest file's header is not reported as damage of the file
// before.
func TestHeaderThatCannotBeRead(t *testing.T) {
	dir, d := newSmall(t, Options{})
	d.Put("a", "b")
	d.Commit()
	d.stopTimer()

	// As after a broken-off rotation: the next file is there, without frames.
	next := fileHeader{kind: kindSegment, id: d.current.header.id, number: d.number() + 1,
		first: d.sequence + 2}
	if _, err := createLog(dir, next, nil); err != nil {
		t.Fatal(err)
	}

	_, err := openStill(eioDir{dir.Kill(), next.name()}, Options{})
	var damage *storage.DamageError
	if err == nil || errors.As(err, &damage) {
		t.Errorf("an I/O error is told as damage of another file: %v", err)
	}
}

// Ensure that the damage that a file is missing names the file that needs it: that one may be
// somebody else's.
func TestMissingFileNamesItsNeighbour(t *testing.T) {
	for _, stray := range []string{"snap-99.log", "seg-50.log"} {
		dir, _, _ := segment(t, 1)
		_, err := openStill(dir.With(stray, nil), Options{})
		if err == nil || !strings.Contains(err.Error(), stray) {
			t.Errorf("beside %s: %v", stray, err)
		}
	}
}
