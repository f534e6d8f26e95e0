package durable

import (
	"bytes"
	"errors"
	"fmt"
	"kvserver/kvstore/storage"
	"kvserver/kvstore/storetest"
	"log/slog"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"
)

// Ensure that a store works in a real directory as in a fake one, that its files are private, and
// that only one process at a time can open it.
func TestRealDirectory(t *testing.T) {
	path := t.TempDir()
	os.Mkdir(filepath.Join(path, "lost+found"), 0o700) // as in the root of a disk
	os.WriteFile(filepath.Join(path, ".notes"), nil, 0o600)
	d, err := openAt(path, Options{})
	if err != nil {
		t.Fatal(err)
	}
	d.segmentSize, d.minCompact = 1500, 2000

	h := storetest.NewHistory()
	if err := storetest.Script(t, d, h); err != nil {
		t.Fatal(err)
	}

	if _, err := openAt(path, Options{}); !errors.Is(err, storage.ErrLocked) ||
		!strings.Contains(err.Error(), fmt.Sprint("by process ", os.Getpid())) {
		t.Errorf("opened twice: %v", err)
	}

	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), "KVSTORE_TEST_OPEN="+path, "GORACE=atexit_sleep_ms=0")
	out, err := cmd.Output()
	if err != nil || !strings.Contains(string(out), storage.ErrLocked.Error()) {
		t.Errorf("a second process opens it: %s, %v", out, err)
	}

	if r, err := checkAt(path); err != nil || r.Damaged ||
		!strings.HasPrefix(r.Lines[0], "in use  by process ") {
		t.Errorf("checked while open: %v, %v", r, err)
	}

	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	entries, _ := os.ReadDir(path)
	for _, e := range entries {
		if info, _ := e.Info(); !e.IsDir() && info.Mode().Perm() != 0o600 {
			t.Errorf("%s has mode %v", e.Name(), info.Mode())
		}
	}

	report, err := checkAt(path)
	if err != nil || report.Damaged {
		t.Errorf("Check: %v, %v", report, err)
	}

	l, _ := readLayout(mustDirectory(t, path))
	name := filepath.Join(path, logName(kindSnapshot, l.snapshot))
	b, _ := os.ReadFile(name)
	b[len(b)/2] ^= 1
	os.WriteFile(name, b, 0o600)

	to := filepath.Join(t.TempDir(), "saved")
	if report, err := repairAt(path, to); err != nil || !report.Damaged {
		t.Errorf("Repair of damage: %v, %v", report, err)
	}
	if now, _ := os.ReadFile(name); !bytes.Equal(now, b) {
		t.Error("the damaged file was changed")
	}

	if d, err = openAt(to, Options{}); err != nil {
		t.Fatal(err)
	}
	d.Close()
}

// mustDirectory opens a directory.
func mustDirectory(t *testing.T, path string) *storage.Disk {
	d, err := storage.OpenDisk(path, nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.Close() })
	return d
}

// Ensure that a directory that cannot be a store is refused by name.
func TestWrongPaths(t *testing.T) {
	path := t.TempDir()
	aFile := filepath.Join(path, "file")
	os.WriteFile(aFile, nil, 0o600)

	for where, want := range map[string]error{
		filepath.Join(path, "none"): storage.ErrMissing,
		aFile:                       storage.ErrNotOurs,
		path:                        storage.ErrNotOurs, // it holds a file
	} {
		for what, f := range map[string]func() error{
			"Open": func() error {
				_, err := openAt(where, Options{})
				return err
			},
			"Check": func() error { _, err := checkAt(where); return err },
			"Repair": func() error {
				_, err := repairAt(where, filepath.Join(t.TempDir(), "new"))
				return err
			},
		} {
			if err := f(); !errors.Is(err, want) || !strings.Contains(err.Error(), where) {
				t.Errorf("%s(%s): %v, want %v", what, where, err, want)
			}
		}
	}

	if names, _ := os.ReadDir(path); len(names) != 1 {
		t.Errorf("something was made: %v", names)
	}
}

// Ensure that a start touches no file but our own, and refuses a directory with others by
// name.
func TestOthersFilesStay(t *testing.T) {
	for _, name := range []string{"thesis.tmp", "download.iso.tmp", "cache.tmp", "seg-1.log.bak",
		"seg-01.log.tmp"} {
		dir := storetest.New().With(name, []byte("precious"))
		_, err := openStill(dir, Options{})
		if !errors.Is(err, storage.ErrNotOurs) || !strings.Contains(err.Error(), name) ||
			dir.Names[name] == nil {
			t.Errorf("%s: %v", name, err)
		}
	}

	dir := storetest.New().With("seg-1.log.tmp", []byte("half")) // as a killed start leaves it
	if _, err := openStill(dir, Options{}); err != nil ||
		dir.Names["seg-1.log.tmp"] != nil {
		t.Errorf("with our own temporary file: %v", err)
	}
}

// Ensure that Check refuses a LOCK that a start refuses.
func TestCheckOfAStrangeLock(t *testing.T) {
	path := t.TempDir()
	d, err := openAt(path, Options{})
	if err != nil {
		t.Fatal(err)
	}
	d.Close()

	lock := filepath.Join(path, storage.LockName)
	for what, make := range map[string]func() error{
		"directory": func() error { return os.Mkdir(lock, 0o700) },
		"link":      func() error { return os.Symlink("/no/such/file", lock) },
	} {
		os.Remove(lock)
		if err := make(); err != nil {
			t.Fatal(err)
		}
		_, openErr := openAt(path, Options{})
		if _, err := checkAt(path); !errors.Is(err, storage.ErrNotOurs) ||
			!errors.Is(openErr, storage.ErrNotOurs) {
			t.Errorf("a %s: a start: %v; Check: %v", what, openErr, err)
		}
	}
}

// Ensure that a directory with the name of LOCK or of a temporary file that cannot be removed is
// reported: once by the running store, by its Close, by Check, and by the next start. Ensure that
// such a directory is removed if it can be.
func TestDirectoryForAFile(t *testing.T) {
	if runtime.GOOS == "windows" {
		return // nobody can remove a lock
	}
	for _, name := range []string{storage.LockName, "STORE.tmp", "seg-0.log.tmp", "seg-7.log.tmp",
		"snap-1.log.tmp"} {
		path := t.TempDir()
		log := &strings.Builder{}
		d, err := openAt(path, Options{Log: slog.New(slog.NewTextHandler(log, nil))})
		if err != nil {
			t.Fatal(err)
		}

		d.Put("k", "v")
		inside := filepath.Join(path, name, "inside")
		os.Remove(filepath.Dir(inside))
		os.MkdirAll(inside, 0o700)
		for range 3 {
			d.lookAfter = time.Time{}
			if err := d.Commit(); err != nil {
				t.Fatal(err)
			}
		}

		told := strings.Count(log.String(), "the next start is refused")
		if told != 1 || !strings.Contains(log.String(), name) || d.number() > 1 {
			t.Errorf("%s: now in file %d, the log says\n%s", name, d.number(), log)
		}
		if err := d.Close(); err == nil || !strings.Contains(err.Error(), name) {
			t.Errorf("%s: Close: %v", name, err)
		}

		before, _ := filepath.Glob(filepath.Join(path, "*"))
		_, checkErr := checkAt(path)
		_, openErr := openAt(path, Options{})
		for what, err := range map[string]error{"Check": checkErr, "a start": openErr} {
			if !errors.Is(err, storage.ErrNotOurs) || !strings.Contains(err.Error(), name) {
				t.Errorf("%s: %s: %v", name, what, err)
			}
		}

		dir, err := storage.OpenDisk(path, nil)
		if err != nil {
			t.Fatal(err)
		}
		if r, err := Repair(dir, storetest.New()); err != nil || r.Lost {
			t.Errorf("%s: Repair, which needs none of these: %v, %q", name, err, r.Lines)
		}
		dir.Close()

		if after, _ := filepath.Glob(filepath.Join(path, "*")); !slices.Equal(after, before) {
			t.Errorf("%s: a start that was refused made %q of %q", name, after, before)
		}

		// If the directory is empty, the store removes it and makes its own file.
		os.RemoveAll(filepath.Dir(inside))
		os.WriteFile(filepath.Join(path, storage.LockName), nil, 0o600) // a start waits for one
		d, err = openAt(path, Options{Log: slog.New(slog.NewTextHandler(log, nil))})
		if err != nil || len(d.Get("k")) != 1 {
			t.Fatalf("%s: a start without it: %v", name, err)
		}

		os.Remove(filepath.Dir(inside))
		os.Mkdir(filepath.Dir(inside), 0o700)
		d.lookAfter = time.Time{}
		if err := errors.Join(d.Commit(), d.Close()); err != nil {
			t.Errorf("%s: Close beside an empty one: %v", name, err)
		}
		if told := strings.Count(log.String(), "the next start is refused"); told != 1 {
			t.Errorf("%s: with an empty one the log says\n%s", name, log)
		}
		if info, err := os.Lstat(filepath.Dir(inside)); err == nil && info.IsDir() {
			t.Errorf("%s is still a directory", name)
		}
	}
}

// Ensure that an empty directory in the place of the next temporary file, or of STORE, does not
// keep a removed file from being written again.
func TestHealBesideADirectoryForAFile(t *testing.T) {
	if runtime.GOOS == "windows" {
		return // nobody can remove a file that is in use
	}
	for _, name := range []string{"seg-2.log.tmp", "snap-1.log.tmp", storage.StoreName} {
		path := t.TempDir()
		d, err := openAt(path, Options{})
		if err != nil {
			t.Fatal(err)
		}

		d.Put("k", "v")
		os.Remove(filepath.Join(path, name))
		os.Mkdir(filepath.Join(path, name), 0o700)
		os.Remove(filepath.Join(path, "seg-1.log"))
		d.lookAfter = time.Time{}
		if err := errors.Join(d.Commit(), d.Close()); err != nil {
			t.Fatalf("%s: %v", name, err)
		}

		if d, err = openAt(path, Options{}); err != nil || len(d.Get("k")) != 1 {
			t.Fatalf("%s: opened again: %v", name, err)
		}
		d.Close()
	}
}

// Ensure that a directory that is not ours any more ends the store, even if nothing is
// written, and before another file is made.
func TestMovedDirectory(t *testing.T) {
	dir, d := newSmall(t, Options{})
	d.Put("a", "1")
	if err := d.Commit(); err != nil {
		t.Fatal(err)
	}

	dir.Moved = storage.ErrMoved
	d.Get("a")
	if err := d.Commit(); !errors.Is(err, storage.ErrMoved) {
		t.Errorf("after a Get: %v, want %v", err, storage.ErrMoved)
	}
	d.Close()

	dir = storetest.New()
	d, err := openSmall(dir, Options{})
	if err != nil {
		t.Fatal(err)
	}
	d.Put("a", "1")
	d.Commit()

	dir.Moved = storage.ErrMoved
	for err == nil && d.number() == 1 {
		d.Put("a", strings.Repeat("v", 100))
		err = d.Commit()
	}
	if !errors.Is(err, storage.ErrMoved) || dir.Names["seg-2.log"] != nil {
		t.Errorf("at a rotation: %v, in file %d", err, d.number())
	}
	d.Close()
}

// Ensure that a real directory that is moved, replaced or removed is noticed, and
// that nothing is written to the one in its place.
func TestMovedRealDirectory(t *testing.T) {
	if runtime.GOOS == "windows" {
		return // the system lets nobody move a directory that is in use
	}
	for _, replace := range []bool{true, false} {
		t.Run(fmt.Sprint("replaced: ", replace), func(t *testing.T) {
			t.Parallel()
			path := filepath.Join(t.TempDir(), "data")
			os.Mkdir(path, 0o700)
			d, err := openAt(path, Options{})
			if err != nil {
				t.Fatal(err)
			}
			d.Put("k", "v")
			if err := d.Commit(); err != nil {
				t.Fatal(err)
			}

			os.Rename(path, path+".old")
			if replace {
				os.Mkdir(path, 0o700)
				other, err := openAt(path, Options{})
				if err != nil {
					t.Fatal(err)
				}
				defer other.Close()
			}

			// A rotation is due, and must make no file in the place of the old directory.
			d.segmentSize = 1
			<-d.Lost() // though nothing was asked
			d.Put("k", "w")
			if err := d.Commit(); !errors.Is(err, storage.ErrMoved) {
				t.Errorf("replaced: %v: %v, want %v", replace, err, storage.ErrMoved)
			}
			d.Close()

			if names, _ := filepath.Glob(filepath.Join(path, "seg-2*")); len(names) > 0 {
				t.Errorf("the directory in its place has %q", names)
			}
		})
	}
}

// Ensure that files removed from a real directory are written again, also LOCK, and that no second
// process can open the store meanwhile.
func TestRemovedRealFiles(t *testing.T) {
	if runtime.GOOS == "windows" {
		return // nobody can remove a file that is in use
	}
	path := t.TempDir()
	d, err := openAt(path, Options{})
	if err != nil {
		t.Fatal(err)
	}
	d.Put("k", "v")
	if err := d.Commit(); err != nil {
		t.Fatal(err)
	}

	for _, name := range []string{storage.LockName, storage.StoreName, "seg-1.log"} {
		if err := os.Remove(filepath.Join(path, name)); err != nil {
			t.Fatal(err)
		}
	}
	link := filepath.Join(path, "seg-1.log") // out of the directory
	if err := os.Symlink("/no/such/file", link); err != nil {
		t.Fatal(err)
	}

	if _, err := openAt(path, Options{}); !errors.Is(err, storage.ErrLocked) {
		t.Errorf("a second one opens it while LOCK is gone: %v", err)
	}

	d.lookAfter = time.Time{}
	d.Put("k", "w")
	if err := d.Commit(); err != nil {
		t.Fatal(err)
	}
	if _, err := openAt(path, Options{}); !errors.Is(err, storage.ErrLocked) {
		t.Errorf("a second one opens it: %v", err)
	}

	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	if d, err = openAt(path, Options{}); err != nil ||
		!slices.Equal(d.Get("k"), []string{"v", "w"}) {
		t.Fatalf("opened again: %v", err)
	}
	d.Close()
}

// Ensure that another file in the place of the current one is noticed.
func TestReplacedRealFile(t *testing.T) {
	if runtime.GOOS == "windows" {
		return // nobody can replace a file that is in use
	}
	path := t.TempDir()
	d, err := openAt(path, Options{})
	if err != nil {
		t.Fatal(err)
	}
	d.Put("k", "v")
	if err := d.Commit(); err != nil {
		t.Fatal(err)
	}

	name := filepath.Join(path, "seg-1.log")
	b, _ := os.ReadFile(name)
	os.Remove(name)
	os.WriteFile(name, b, 0o600)
	d.Put("k", "w")
	if err := errors.Join(d.Commit(), d.Close()); err != nil {
		t.Fatal(err)
	}

	if d, err = openAt(path, Options{}); err != nil ||
		!slices.Equal(d.Get("k"), []string{"v", "w"}) {
		t.Fatalf("opened again: %v", err)
	}
	d.Close()
}

// hastyDisk is a directory in which after is called as soon as a file has its name, or is opened
// for writing.
type hastyDisk struct {
	*storage.Disk
	after func(call, name string)
}

func (h *hastyDisk) Rename(from, to string) error {
	err := h.Disk.Rename(from, to)
	h.after("Rename", to)
	return err
}

func (h *hastyDisk) Extend(name string) (storage.File, error) {
	f, err := h.Disk.Extend(name)
	h.after("Extend", name)
	return f, err
}

// Ensure that another file is noticed that somebody puts in the place of a real segment, snapshot
// or STORE as soon as that was made.
func TestReplacedRealFileThatWasJustMade(t *testing.T) {
	if runtime.GOOS == "windows" {
		return // nobody can replace a file that is in use
	}
	for _, which := range []string{"Rename seg-3.log", "Extend seg-2.log", "Rename snap-", "Rename STORE"} {
		path := t.TempDir()
		dir := &hastyDisk{Disk: mustDirectory(t, path), after: func(string, string) {}}
		d, err := openSmall(dir, Options{})
		if err != nil {
			t.Fatal(err)
		}

		replaced := false
		dir.after = func(call, name string) {
			if replaced || !strings.HasPrefix(call+" "+name, which) {
				return
			}
			replaced = true
			other, name := filepath.Join(path, ".other"), filepath.Join(path, name)
			b, _ := os.ReadFile(name)
			b = append(b[:min(len(b), headerSize)], make([]byte, 4<<10)...) // zeros are room
			if err := errors.Join(os.WriteFile(other, b, 0o600), os.Rename(other, name)); err != nil {
				t.Error(err)
			}
		}

		os.Remove(filepath.Join(path, storage.StoreName)) // so that it is written again
		for range 10 {
			// The Deletes are there so that a compaction is worth it.
			d.Put("key", strings.Repeat("v", 300))
			d.Delete("old")
			d.Put("old", strings.Repeat("v", 300))
			if err := d.Commit(); err != nil {
				t.Fatalf("%s: %v", which, err)
			}
			d.AwaitCompaction()
			for range 2 { // a file replaced during the first heal is found by the second check
				d.lookAfter = time.Time{}
				if err := d.Commit(); err != nil {
					t.Fatalf("%s: %v", which, err)
				}
			}

			// As if it were killed now.
			killed := t.TempDir()
			if err := os.CopyFS(killed, os.DirFS(path)); err != nil {
				t.Fatal(err)
			}
			wantAll(t, which, mustDirectory(t, killed), maps.Collect(d.All()))
		}

		if !replaced {
			t.Errorf("%s was not replaced", which)
		}
		if err := d.Close(); err != nil {
			t.Errorf("%s: Close: %v", which, err)
		}
	}
}

// Ensure that a real file whose middle somebody overwrites is written again by Close.
func TestOverwrittenRealFile(t *testing.T) {
	for what, overwrite := range overwrites {
		path := t.TempDir()
		d, err := openAt(path, Options{})
		if err != nil {
			t.Fatal(err)
		}
		for i := range 100 {
			d.Put(fmt.Sprint("key", i), "value")
			if err := d.Commit(); err != nil {
				t.Fatal(err)
			}
		}

		name := filepath.Join(path, "seg-1.log")
		b, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		middle := b[d.size/2:][:50]
		overwrite(middle)

		f, err := os.OpenFile(name, os.O_WRONLY, 0)
		if err == nil {
			_, err = f.WriteAt(middle, d.size/2)
		}
		if err = errors.Join(err, f.Close()); err != nil {
			t.Fatal(err)
		}

		want := maps.Collect(d.All())
		if err := d.Close(); err != nil {
			t.Errorf("%s: Close: %v", what, err)
		}
		wantAll(t, what, mustDirectory(t, path), want)
	}
}

// Ensure that a start says that a directory with a log file's name may be somebody else's.
func TestDirectoryAsLogFile(t *testing.T) {
	path := t.TempDir()
	d, err := openAt(path, Options{})
	if err != nil {
		t.Fatal(err)
	}
	d.Close()
	if err := os.Mkdir(filepath.Join(path, "seg-50.log"), 0o700); err != nil {
		t.Fatal(err)
	}
	if _, err := openAt(path, Options{}); !errors.Is(err, ErrStray) {
		t.Errorf("a start: %v", err)
	}
}

// at opens the directory at path, calls f, and closes the directory.
func at[T any](path string, f func(storage.Directory) (T, error)) (result T, err error) {
	dir, err := storage.OpenDisk(path, nil)
	if err != nil {
		return result, err
	}
	defer dir.Close()
	return f(dir)
}

// openAt opens the store in the directory at path.
func openAt(path string, opts Options) (*Store, error) {
	dir, err := storage.OpenDisk(path, nil)
	if err != nil {
		return nil, err
	}
	d, err := openStill(dir, opts)
	if err != nil {
		dir.Close()
	}
	return d, err
}

// checkAt checks the store in the directory at path.
func checkAt(path string) (Report, error) { return at(path, Check) }

// repairAt saves what it can of the store at path to a directory that it makes.
func repairAt(path, to string) (Report, error) {
	return toNew(path, to, Repair)
}

// backUpAt copies the store at path to a directory that it makes.
func backUpAt(path, to string) (Report, error) {
	return toNew(path, to, Backup)
}

// toNew opens the store at path, makes a directory at to, and calls make for both.
func toNew(path, to string, make func(dir, out storage.Directory) (Report, error)) (Report, error) {
	return at(path, func(dir storage.Directory) (Report, error) {
		out, undo, err := storage.MakeDisk(to, path, nil)
		if err != nil {
			return Report{}, err
		}
		report, err := make(dir, out)
		out.Close()
		if err != nil {
			undo()
		}
		return report, err
	})
}
