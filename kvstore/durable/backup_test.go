package durable

import (
	"errors"
	"fmt"
	"io/fs"
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
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

// Ensure that a backup of a running store opens, at any moment, and holds what was told before
// it began, and that damage is not copied.
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
		if i%10 > 0 { // half a frame is in the file
			w := d.current
			w.f.WriteAt(appendFrame(nil, w.seed,
				frame{sequence: d.sequence + 1, synced: d.sequence},
				[]byte("half a frame"))[:45], w.size)
		}

		if _, err := Backup(dir, out); err != nil {
			t.Fatalf("backup %d: %v", i, err)
		}

		// Only the backup is to see the half frame.
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
		if kind, _ := parseName(name); kind.isLog() {
			data := slices.Clone(dir.Names[name].Data)
			data[headerSize+10] ^= 1 // in the first frame
			out := storetest.New()
			_, err := Backup(dir.With(name, data), out)
			delete(out.Names, storage.LockName)
			if err == nil || len(out.Names) > 0 {
				t.Errorf("%s, damaged, is copied: %v, %d files of kind %d; it has %d bytes", name,
					err, len(out.Names), kind, len(data))
			}
		}
	}

	full := storetest.New().With("photo.jpg", nil)
	if _, err := Backup(dir, full); !errors.Is(err, ErrNotEmpty) {
		t.Errorf("into a directory that is not empty: %v", err)
	}
}

// tornListing is a directory that a compaction changes while it is listed: its first three lists
// have neither the new snapshot nor the old files that this replaces.
type tornListing struct {
	*storetest.Dir
	lists int
}

func (l *tornListing) List() ([]string, error) {
	names, err := l.Dir.List()
	if l.lists++; l.lists <= 3 {
		names = slices.DeleteFunc(names, func(name string) bool {
			kind, _ := parseName(name)
			return kind == kindSnapshot
		})
	}
	return names, err
}

// Ensure that a list of names that a compaction changes meanwhile is not taken for damage.
func TestLookBesideACompaction(t *testing.T) {
	dir, d := newSmall(t, Options{})
	storetest.Script(t, d, storetest.NewHistory())
	if _, err := Backup(&tornListing{Dir: dir}, storetest.New()); err != nil {
		t.Errorf("backup: %v", err)
	}
	if r, err := Check(&tornListing{Dir: dir}); err != nil || r.Damaged {
		t.Errorf("check: %v, %v", r, err)
	}
	d.Close()
	r, err := Check(&tornListing{Dir: dir})
	if err != nil || !r.Damaged || !errors.As(r.Err, new(*storage.DamageError)) {
		t.Errorf("check where nobody else is: %v, %v, %v", r, r.Err, err)
	}
}

// Ensure that Check reports damage at once, even beside a server that makes one file after the
// other.
func TestCheckOfADamagedBusyStore(t *testing.T) {
	dir, d := newSmall(t, Options{})
	d.minCompact = 1 << 40
	for d.number() < 4 {
		d.Put("key", strings.Repeat("v", 100))
		d.Commit()
	}

	dir.Names["seg-2.log"].Data[headerSize+frameSize] ^= 1

	lists, writes := 0, false
	dir.Before = func(c storetest.Call) error {
		if c.What == "list" && !writes {
			writes = true
			defer func() { writes = false }()
			if lists++; lists > 20 {
				return storetest.ErrDisk // otherwise it would go on for ever
			}
			d.lookAfter = time.Now().Add(time.Hour) // so that the store does not notice
			for number := d.number(); d.number() == number; {
				d.Put("key", strings.Repeat("v", 100))
				d.Commit()
			}
		}
		return nil
	}

	if r, err := Check(dir); err != nil || !r.Damaged || lists > 5 {
		t.Errorf("after %d lists: %v, %v", lists, r, err)
	}
	dir.Before = nil
	d.Close()
}

// Ensure that backups in real directories, three at a time beside a store that is written to and
// compacted, each hold what was told before, and that none can be made inside the store.
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
		_, err := backUpAt(path, filepath.Join(path, "copy"))
		if !errors.Is(err, storage.ErrInside) {
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
			// The counter gets one more value each time, so it begins anew now and then.
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

	// backUp checks that a copy holds what was told when it began.
	backUp := func(to string) error {
		least := told.Load()
		if _, err := backUpAt(path, to); err != nil {
			return err
		}
		copied, err := openAt(to, Options{})
		if err != nil {
			return err
		}
		defer copied.Close()

		most := int64(0)
		for _, values := range copied.All() {
			for _, v := range values {
				if n, err := strconv.ParseInt(v, 10, 64); err == nil {
					most = max(most, n)
				}
			}
		}
		if most < least {
			return fmt.Errorf("it holds what was told up to %d, want %d", most, least)
		}
		return nil
	}

	for i := range 3 {
		ended := make(chan error, 3)
		for range cap(ended) {
			to := filepath.Join(t.TempDir(), "copy")
			go func() { ended <- backUp(to) }()
		}
		for range cap(ended) {
			if err := <-ended; err != nil {
				t.Errorf("one of three backups, %d: %v", i, err)
			}
		}
	}
}

// Ensure that a backup ends, and holds everything, however often a compaction removes files before
// they are open, and that a backup of a store with a missing file does not go on for ever.
func TestBackupBesideFastCompactions(t *testing.T) {
	dir, d := newSmall(t, Options{Fsync: FsyncNever})
	d.minCompact = 1 << 40

	compactions, runs := 0, false
	dir.Before = func(c storetest.Call) error {
		if c.What != "open" || c.Name == storage.StoreName || runs || compactions == 50 {
			return nil
		}
		runs = true
		defer func() { runs = false }()
		compactions++
		d.Put("key", fmt.Sprint(compactions))
		d.Commit()
		if isNew, err := d.rotate(); err != nil || !isNew {
			t.Fatal(err)
		}
		return d.compactNow()
	}

	out := storetest.New()
	if _, err := Backup(dir, out); err != nil || compactions != 50 {
		t.Fatalf("after %d compactions: %v", compactions, err)
	}
	wantAll(t, "copied", out, maps.Collect(d.All()))

	dir.Before = nil
	dir.Remove(logName(kindSegment, d.number()))
	if _, err := Backup(dir, storetest.New()); !errors.As(err, new(*storage.DamageError)) {
		t.Errorf("without a file: %v", err)
	}
	d.Close()
}

// Ensure that a Backup and a Check begin again if a file is gone when it is read, and report only
// what the last try has read; and that they return any other error.
func TestReportOfASecondTry(t *testing.T) {
	dir, d := newSmall(t, Options{})
	d.minCompact = 1 << 40
	for d.number() < 2 {
		d.Put("key", strings.Repeat("v", 100))
		if err := d.Commit(); err != nil {
			t.Fatal(err)
		}
	}
	d.Close()

	for what, read := range map[string]func() (Report, error){
		"backup": func() (Report, error) { return Backup(dir, storetest.New()) },
		"check":  func() (Report, error) { return Check(dir) },
	} {
		dir.Before = nil
		want, err := read()
		if err != nil || len(want.Lines) == 0 {
			t.Fatalf("%s: %q, %v", what, want.Lines, err)
		}

		// The second file fails when its frames are to be read, after its header.
		for _, failure := range []error{fs.ErrNotExist, storetest.ErrDisk} {
			reads := 0
			dir.Before = func(c storetest.Call) error {
				if c == (storetest.Call{What: "read", Name: "seg-2.log"}) {
					if reads++; reads == 2 {
						return failure
					}
				}
				return nil
			}
			got, err := read()
			if failure == storetest.ErrDisk {
				if !errors.Is(err, failure) || reads != 2 {
					t.Errorf("%s: %v after %d reads, want %v", what, err, reads, failure)
				}
			} else if err != nil || reads < 4 || !slices.Equal(got.Lines, want.Lines) {
				t.Errorf("%s after %d reads: %q, %v; want %q", what, reads, got.Lines, err, want.Lines)
			}
		}
	}
}

// Ensure that a store of many files can be opened, checked, copied and repaired with few
// descriptors.
func TestFewDescriptors(t *testing.T) {
	dir, d := newSmall(t, Options{Fsync: FsyncNever})
	d.minCompact = 1 << 40
	for d.number() < 100 {
		d.Put(fmt.Sprint("key", d.number()), strings.Repeat("v", 100))
		if err := d.Commit(); err != nil {
			t.Fatal(err)
		}
	}
	want := maps.Collect(d.All())
	d.Close()

	// Each file open at the same time would be 100 and more.
	few := dir.Kill()
	few.Before = func(c storetest.Call) error {
		few.Mu.Lock()
		defer few.Mu.Unlock()
		if (c.What == "open" || c.What == "create") && few.Handles >= 5 {
			return &os.PathError{Op: c.What, Path: c.Name, Err: syscall.EMFILE}
		}
		return nil
	}

	if r, err := Check(few); err != nil || r.Damaged {
		t.Errorf("check: %v, %v", r, err)
	}

	for what, copy := range map[string]func(out storage.Directory) (Report, error){
		"backup": func(out storage.Directory) (Report, error) { return Backup(few, out) },
		"repair": func(out storage.Directory) (Report, error) { return Repair(few, out) },
	} {
		out := storetest.New()
		if r, err := copy(out); err != nil || r.Damaged {
			t.Errorf("%s: %v, %v", what, r, err)
		}
		wantAll(t, what, out, want)
	}

	if few.Handles != 0 {
		t.Errorf("%d files are open", few.Handles)
	}
	wantAll(t, "a start", few, want)
}

// Ensure that a store whose files an older version has made can be copied.
func TestBackupOfAnOlderVersion(t *testing.T) {
	dir, d := newSmall(t, Options{})
	d.Put("k", "v")
	d.Close()
	makeOlder(dir.Names["seg-1.log"].Data)

	out := storetest.New()
	if _, err := Backup(dir, out); err != nil {
		t.Fatal(err)
	}
	wantAll(t, "the copy", out, map[string][]string{"k": {"v"}})
}

// Ensure that a backup fails at a damaged frame in the middle of the log, and copies no STORE.
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
		if _, err := Backup(bad, out); err == nil || out.Names[storage.StoreName] != nil {
			t.Errorf("without %s of a full file: %v, and %d files are copied", what, err,
				len(out.Names))
		}
	}
}

// Ensure that a backup or a repair that fails, at whichever call, says so, and leaves no file
// except LOCK, so that it can be tried again.
func TestFailedCopyLeavesNoFile(t *testing.T) {
	dir, d := newSmall(t, Options{})
	storetest.Script(t, d, storetest.NewHistory())
	for i := range 3 { // so that a snapshot has several frames
		d.Put(fmt.Sprint("large", i), strings.Repeat("v", maxFrameSnapshot))
	}
	d.Close()

	for what, command := range map[string]func(dir, out storage.Directory) (Report, error){
		"backup": Backup, "repair": Repair,
	} {
		for n, reached := 1, true; reached; n++ {
			out := storetest.New()
			out.FailAt = n
			_, err := command(dir, out)
			reached = out.Calls >= n
			delete(out.Names, storage.LockName)
			if errors.Is(err, storetest.ErrDisk) != reached || reached && len(out.Names) > 0 {
				t.Errorf("%s, call %d: %v; there is %v", what, n, err, slices.Sorted(maps.Keys(out.Names)))
			}
		}
	}
}

// Ensure that a backup that fails removes the directory that was made for it, but not one that was
// there before.
func TestFailedBackupLeavesNothing(t *testing.T) {
	path := t.TempDir()
	store, to, there := filepath.Join(path, "store"), filepath.Join(path, "copy"), t.TempDir()
	os.Mkdir(store, 0o700)
	os.WriteFile(filepath.Join(store, storage.StoreName), []byte("what is this"), 0o600)

	for _, to := range []string{to, there} {
		if _, err := backUpAt(store, to); !errors.As(err, new(*storage.DamageError)) {
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

// Ensure that a check finds no damage while a real store is written, rotated and compacted.
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
		for i := range 300 {
			d.Delete(fmt.Sprint("key", i%30))
			d.Put(fmt.Sprint("key", i%30), strings.Repeat("v", i*60))
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

// Ensure that a check finds no damage if frames are written, and the store is closed, between
// any two of its reads.
func TestCheckBesideEachWrite(t *testing.T) {
	for before := 1; before < 30; before++ { // the read before which that happens
		dir := storetest.New()
		dir.Reserve = 1000
		d, err := openStill(dir, Options{})
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

// Ensure that a backup locks its target before it checks that this is empty: so no two backups
// write there at a time, and none overwrites a store that was made while it waited.
func TestBackupLocksFirst(t *testing.T) {
	dir, d := newSmall(t, Options{})
	d.Put("k", "v")
	d.Close()

	out := storetest.New()
	out.Locked = true
	if _, err := Backup(dir, out); !errors.Is(err, storage.ErrLocked) || len(out.Names) > 0 {
		t.Errorf("beside another one: %v, %d files", err, len(out.Names))
	}

	// The other store is made while the backup waits for the lock.
	out = storetest.New()
	began := false
	out.Before = func(c storetest.Call) error {
		if c.What == "lock" && !began {
			began = true
			other, err := openStill(out, Options{})
			if err != nil {
				t.Fatal(err)
			}
			other.Put("other", "answered")
			if err := other.Close(); err != nil {
				t.Fatal(err)
			}
		}
		return nil
	}

	if _, err := Backup(dir, out); !errors.Is(err, ErrNotEmpty) {
		t.Errorf("over a store that was made meanwhile: %v", err)
	}
	again, err := openStill(out, Options{})
	if err != nil || len(again.Get("other")) != 1 {
		t.Errorf("that store: %v", err)
	}
}

// Ensure that what a killed backup leaves is not taken for an empty directory: a start refuses it
// by name, and changes nothing.
func TestBrokenOffBackup(t *testing.T) {
	dir, d := newSmall(t, Options{})
	storetest.Script(t, d, storetest.NewHistory())
	d.Close()

	refused := 0
	for n, reached := 1, true; reached; n++ {
		out := storetest.New()
		out.FailAt, out.Forever = n, true
		_, err := Backup(dir, out)
		if reached = out.Calls >= n; !reached {
			break
		}
		if err == nil {
			t.Errorf("call %d fails, and the backup says nothing", n)
		}

		out = out.Kill()
		before := maps.Clone(out.Names)
		largest := 0
		for _, f := range out.Names {
			largest = max(largest, len(f.Data))
		}

		_, err = openStill(out, Options{})
		switch {
		// STORE is copied last, so with it the copy is whole.
		case before[storage.StoreName] != nil && err == nil:
		case errors.Is(err, ErrUnfinished), errors.As(err, new(*storage.DamageError)):
			refused++
			if !maps.Equal(before, out.Names) {
				t.Errorf("killed at call %d: it is refused, but changed", n)
			}
			if r, err := Check(out); err == nil && !r.Damaged {
				t.Errorf("killed at call %d: check says %v", n, r.Lines)
			}
		case err == nil && largest > headerSize:
			t.Errorf("killed at call %d: a file of %d bytes is taken for nothing", n, largest)
		case err != nil:
			t.Errorf("killed at call %d: %v", n, err)
		}
	}

	if refused < 5 {
		t.Errorf("only %d of these are refused", refused)
	}
}

// Ensure that a backup which a power failure ended before any of its calls is whole, is refused, or
// holds no data, and that a backup that has ended is whole.
func TestPowerFailureInABackup(t *testing.T) {
	dir, d := newSmall(t, Options{})
	storetest.Script(t, d, storetest.NewHistory())
	want := maps.Collect(d.All())
	d.Close()

	random := rand.New(rand.NewPCG(1, 1))
	var images []*storetest.Dir
	out := storetest.New()
	out.Before = func(storetest.Call) error {
		for range 10 {
			images = append(images, out.Crash(random))
		}
		return nil
	}

	if _, err := Backup(dir, out); err != nil {
		t.Fatal(err)
	}
	out.Before = nil
	wantAll(t, "a power failure behind it", out.Crash(random), want)

	whole, refused, nothing := 0, 0, 0
	for i, image := range images {
		_, isStore := image.Names[storage.StoreName]
		hasData := slices.ContainsFunc(slices.Collect(maps.Values(image.Names)),
			func(f *storetest.File) bool { return len(f.Data) > maxStoreFile })

		again, err := openStill(image, Options{})
		switch {
		case errors.Is(err, ErrUnfinished), errors.As(err, new(*storage.DamageError)):
			refused++
		case err == nil && isStore && maps.EqualFunc(maps.Collect(again.All()), want, slices.Equal):
			whole++
		case err == nil && !isStore && !hasData:
			nothing++
		default:
			t.Errorf("image %d of %d: opened: %v, a store: %v, with data: %v", i, len(images), err, isStore,
				hasData)
		}
		if err == nil {
			again.Close()
		}
	}
	if whole == 0 || refused < 100 || nothing == 0 {
		t.Errorf("%d images are whole, %d refused, %d nothing", whole, refused, nothing)
	}
}

// Ensure that files which systems put into volumes do not disturb a store, and stay.
func TestFilesOfSystems(t *testing.T) {
	names := []string{"lost+found", "@eaDir", "#snapshot", ".snapshot", "System Volume Information",
		"desktop.ini", "Thumbs.db", "aquota.user", "aquota.group", ".report.tmp", ".cache.tmp"}

	dir := storetest.New()
	for _, name := range names {
		dir = dir.With(name, []byte("theirs"))
	}
	d, err := openSmall(dir, Options{})
	if err != nil {
		t.Fatal(err)
	}
	storetest.Script(t, d, storetest.NewHistory())
	if err := d.Close(); err != nil {
		t.Error(err)
	}

	if r, err := Check(dir); err != nil || r.Damaged {
		t.Errorf("check: %v, %v", r, err)
	}
	if _, err := openSmall(dir, Options{}); err != nil {
		t.Errorf("opened again: %v", err)
	}

	for _, name := range names {
		if dir.Names[name] == nil {
			t.Errorf("%s is gone", name)
		}
	}

	// These names are neither ours nor a system's.
	for _, name := range []string{"torn-notes.txt", "damaged-1", "seg-1.log.tmp.tmp", "STORE.old"} {
		_, err := openStill(storetest.New().With(name, nil), Options{})
		if !errors.Is(err, storage.ErrNotOurs) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// Ensure that a start refuses a directory in which no file can be made, but not one on a full disk.
func TestNoFileCanBeMade(t *testing.T) {
	for _, c := range []struct {
		err    error
		isFull bool
		opens  bool
	}{{os.ErrPermission, false, false}, {syscall.EROFS, false, false},
		{syscall.ENOSPC, false, false}, {syscall.EDQUOT, false, false}, // too many files
		{syscall.ENOSPC, true, true}, {syscall.EDQUOT, true, true}} {
		dir, d := newSmall(t, Options{})
		d.Put("k", "v")
		d.Close()

		dir.Before = func(call storetest.Call) error {
			if call.What == "create" {
				return &os.PathError{Op: call.What, Path: call.Name, Err: c.err}
			}
			return nil
		}
		if c.isFull {
			for _, f := range dir.Names {
				dir.Room += len(f.Data)
			}
		}

		again, err := openSmall(dir, Options{})
		if (err == nil) != c.opens || err != nil && !errors.Is(err, c.err) {
			t.Errorf("%v, the disk is full: %v: %v", c.err, c.isFull, err)
		}
		if err == nil && len(again.Get("k")) != 1 {
			t.Errorf("%v: it opens without its data", c.err)
		}
	}
}

// Ensure that a backup whose directory another process has taken removes nothing there.
func TestBackupIntoAStolenDirectory(t *testing.T) {
	dir, _, _ := segment(t, 3)
	out := storetest.New()

	out.Before = func(c storetest.Call) error {
		if c.What == "rename" && c.Name == storage.StoreName+tmpSuffix {
			out.Mu.Lock()
			out.Moved = storage.ErrMoved
			out.Names["seg-7.log"] = storetest.FileOf([]byte("theirs"))
			out.Mu.Unlock()
		}
		return nil
	}

	if _, err := Backup(dir, out); !errors.Is(err, storage.ErrMoved) {
		t.Errorf("a backup: %v", err)
	}
	if out.Names["seg-7.log"] == nil {
		t.Error("it has removed what another process has written")
	}
}

// Ensure that a backup begins only once, although a compaction removes its files: they are open by
// then.
func TestBackupHoldsItsFiles(t *testing.T) {
	dir, d := newSmall(t, Options{Fsync: FsyncNever})
	least := d.minCompact
	d.minCompact = 1 << 40
	for d.number() < 5 {
		d.Set("key", "before")
		if err := d.Commit(); err != nil {
			t.Fatal(err)
		}
	}
	d.minCompact = least

	out := storetest.New()
	isFirst := true
	out.Before = func(call storetest.Call) error {
		if call.What != "write" || !isFirst {
			return nil
		}
		isFirst = false
		for number := d.number(); d.number() == number; d.AwaitCompaction() {
			d.Set("key", "since")
			if err := d.Commit(); err != nil {
				t.Fatal(err)
			}
		}
		return nil
	}

	_, err := Backup(dir, out)
	if err != nil || d.snapshot == 0 || out.Names["seg-1.log"] == nil {
		t.Errorf("the backup: %v; the store has snapshot %d, and the copy %v", err, d.snapshot,
			slices.Sorted(maps.Keys(out.Names)))
	}
	wantAll(t, "the copy", out, map[string][]string{"key": {"before"}})
	d.Close()
}

// Ensure that a backup ends beside a writer that is as fast as the backup: it copies what was there
// when it began.
func TestBackupDoesNotFollow(t *testing.T) {
	dir, d := newSmall(t, Options{})
	d.segmentSize = 1 << 20
	write := func() {
		d.Put("k", strings.Repeat("v", 300))
		if err := d.Commit(); err != nil {
			t.Fatal(err)
		}
	}
	const first, most = 10, 500
	for range first {
		write()
	}

	writes := 0
	out := storetest.New()
	out.Before = func(call storetest.Call) error {
		if call.What == "write" {
			if writes++; writes < most {
				write()
			}
		}
		return nil
	}

	_, err := Backup(dir, out)
	if err != nil || writes < first || writes > 2*first {
		t.Errorf("%d writes for a copy of %d frames: %v", writes, first, err)
	}
	d.Close()
}

// Ensure that Check and Backup find no damage while the log goes on in a new file, in a directory
// without zeros ahead.
func TestBackupBesideARotation(t *testing.T) {
	for what, read := range map[string]func(dir storage.Directory) (Report, error){
		"check":  Check,
		"backup": func(dir storage.Directory) (Report, error) { return Backup(dir, storetest.New()) },
	} {
		synctest.Test(t, func(t *testing.T) {
			dir := storetest.New()
			dir.Reserve = 0
			d, err := openSmall(dir, Options{})
			if err != nil {
				t.Fatal(err)
			}
			d.minCompact = 1 << 40

			// The writer waits when the new file has its name, and goes on when the reader opens
			// its second file.
			hasName, mayGoOn := make(chan struct{}), make(chan struct{})
			var waits atomic.Bool
			var opens atomic.Int32

			dir.Before = func(c storetest.Call) error {
				dir.Mu.Lock()
				_, isThere := dir.Names["seg-2.log"]
				dir.Mu.Unlock()
				isSync := c == storetest.Call{What: "sync"}
				isOpen := c.What == "open" && strings.HasPrefix(c.Name, "seg-")

				if isThere && isSync && waits.CompareAndSwap(false, true) {
					close(hasName)
					<-mayGoOn
				}
				if isThere && isOpen && opens.Add(1) == 2 {
					close(mayGoOn)
					synctest.Wait()
				}
				return nil
			}

			ended := make(chan struct{})
			go func() {
				for d.number() < 2 {
					d.Put("k", strings.Repeat("v", 100))
					d.Commit()
				}
				d.Put("k", "after")
				d.Commit()
				close(ended)
			}()

			<-hasName
			if r, err := read(dir); err != nil || r.Damaged {
				t.Errorf("%s: %v, %q", what, err, r.Lines)
			}
			<-ended
			dir.Before = nil
			d.Close()
		})
	}
}

// Ensure that damage of the last commit in a copy is never taken for a torn end, even if the log
// went on in a new file while it was copied.
func TestDamagedBackup(t *testing.T) {
	for _, goesOn := range []bool{false, true} {
		dir, d := newSmall(t, Options{})
		d.Put("k", "v")
		if err := d.Commit(); err != nil {
			t.Fatal(err)
		}

		out := storetest.New()
		out.Before = func(c storetest.Call) error {
			if c.What == "create" && goesOn && d.number() == 1 {
				d.rotate()
			}
			return nil
		}
		_, err := Backup(dir, out)
		if err != nil || goesOn != (d.number() == 2) {
			t.Fatalf("goes on %v: segment %d: %v", goesOn, d.number(), err)
		}
		d.Close()

		// Any byte of the commit: its frame is the first, and the last with records.
		out.Before = nil
		wantAll(t, "the copy", out.Kill(), map[string][]string{"k": {"v"}})
		for i := headerSize; i < headerSize+frameSize+1; i++ {
			data := slices.Clone(out.Names["seg-1.log"].Data)
			data[i] ^= 1
			_, err := openSmall(out.With("seg-1.log", data), Options{})
			if !errors.As(err, new(*storage.DamageError)) {
				t.Fatalf("goes on %v, byte %d is bad: %v", goesOn, i, err)
			}
		}
	}
}
