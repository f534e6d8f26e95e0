package storage

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// Ensure that a process that only asks whether a store is in use does not hinder its holder in
// making another LOCK, and that neither of them leaves a file open.
func TestInUseBesideALock(t *testing.T) {
	if runtime.GOOS == "windows" {
		return // nobody can remove a lock
	}
	path := t.TempDir()
	lock, err := mustOpen(t, path).Lock(t.Context())
	if err != nil {
		t.Fatal(err)
	}

	other, stop := mustOpen(t, path), make(chan struct{})
	var askers sync.WaitGroup
	for range 2 {
		askers.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
					other.InUse()
				}
			}
		})
	}

	makeAgain := func(times int) {
		t.Helper()
		for range times {
			os.Remove(filepath.Join(path, LockName))
			if err := lock.(*diskLock).Verify(); err != nil {
				t.Fatal(err)
			}
		}
	}
	makeAgain(100)
	close(stop)
	askers.Wait()

	// LOCK has two numbers by turns.
	before := lowestFile(t)
	makeAgain(2)
	if after := lowestFile(t); after > before {
		t.Errorf("the next file got the number %d before, and %d since", before, after)
	}
	lock.Close()
}

// lowestFile returns the number of a file that is opened now: the lowest one that is free.
func lowestFile(t *testing.T) uintptr {
	f, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	return f.Fd()
}

// Ensure that a passing error is not taken for a directory that was moved.
func TestLockLooksAgain(t *testing.T) {
	around := filepath.Join(t.TempDir(), "around")
	path := filepath.Join(around, "data")
	os.MkdirAll(path, 0o700)
	dir := mustOpen(t, path)
	lock, err := dir.Lock(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer lock.Close()

	verify := lock.Verify
	os.Rename(path, path+".old")
	if err := os.Symlink(path, path); err != nil {
		t.Logf("without links there is no such error: %v", err)
		return
	}
	if err := verify(); err == nil || errors.Is(err, ErrMoved) {
		t.Errorf("where the path is a loop: %v", err)
	}

	os.Remove(path)
	if err := verify(); !errors.Is(err, ErrMoved) {
		t.Errorf("where it is gone: %v", err)
	}

	os.Rename(path+".old", path)
	if err := verify(); err != nil {
		t.Errorf("where it is back: %v", err)
	}

	os.Rename(around, around+".old")
	os.WriteFile(around, nil, 0o600)
	if err := verify(); !errors.Is(err, ErrMoved) {
		t.Errorf("where a file is in its way: %v", err)
	}

	dir.Close()
	if err := verify(); err == nil || errors.Is(err, ErrMoved) {
		t.Errorf("where the directory itself cannot be read: %v", err)
	}
}

// mustOpen opens a directory.
func mustOpen(t *testing.T, path string) *Disk {
	d, err := OpenDisk(path, nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.Close() })
	return d
}

// Ensure that a store whose LOCK somebody has removed stays locked: the directory itself is locked,
// and where it cannot be, a start waits until a server that runs has made another LOCK.
func TestRemovedLockStillLocks(t *testing.T) {
	if runtime.GOOS == "windows" {
		return // nobody can remove a lock
	}
	for _, isPlain := range []bool{false, true} {
		for _, after := range []time.Duration{0, guardTime / 2, guardTime - 1, 3 * guardTime} {
			synctest.Test(t, func(t *testing.T) {
				path := t.TempDir()
				os.WriteFile(filepath.Join(path, StoreName), nil, 0o600)
				os.WriteFile(filepath.Join(path, LockName), nil, 0o600)
				first, second := mustOpen(t, path), mustOpen(t, path)
				first.isPlain, second.isPlain = isPlain, isPlain

				lock, err := first.Lock(t.Context())
				if err != nil {
					t.Fatal(err)
				}
				defer lock.Close()

				<-time.After(after)
				os.Remove(filepath.Join(path, LockName))
				if _, inUse := second.InUse(); !inUse && !isPlain {
					t.Errorf("plain %v: it is in use, and nobody says so", isPlain)
				}

				if _, err := second.Lock(t.Context()); !errors.Is(err, ErrLocked) {
					t.Errorf("plain %v, removed after %v: %v", isPlain, after, err)
				}
				if err := lock.Verify(); err != nil {
					t.Errorf("plain %v, removed after %v: the first one says %v", isPlain, after,
						err)
				}
			})
		}
	}
}

// Ensure that a start makes no second LOCK if somebody removes the first one while the start tries
// to lock it.
func TestLockRemovedWhileItIsTried(t *testing.T) {
	if runtime.GOOS == "windows" {
		return // nobody can remove a lock
	}
	synctest.Test(t, func(t *testing.T) {
		path := t.TempDir()
		os.WriteFile(filepath.Join(path, StoreName), nil, 0o600)
		first, second := mustOpen(t, path), mustOpen(t, path)
		first.isPlain, second.isPlain = true, true

		lock, err := first.Lock(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		defer lock.Close()

		// Between two of the tries, which go on for 50 ms.
		time.AfterFunc(12*time.Millisecond, func() { os.Remove(filepath.Join(path, LockName)) })
		if _, err := second.Lock(t.Context()); !errors.Is(err, ErrLocked) {
			t.Errorf("the second one: %v", err)
		}
		if err := lock.Verify(); err != nil {
			t.Errorf("the first one: %v", err)
		}
	})
}

// Ensure that a store whose LOCK is missing can be locked if no process has the store, and that the
// wait for one can be ended.
func TestMissingLock(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		path := t.TempDir()
		os.WriteFile(filepath.Join(path, StoreName), nil, 0o600)
		d := mustOpen(t, path)
		if owner := d.owner(); owner != "by another process" {
			t.Errorf("without LOCK it is held %q", owner)
		}
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if _, err := d.Lock(ctx); !errors.Is(err, context.Canceled) {
			t.Errorf("where the start is broken off: %v", err)
		}
		lock, err := d.Lock(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		lock.Close()
	})
}

// Ensure that a start does not take a LOCK that a server has just made again and has not locked
// yet, where only LOCK is locked, and that nothing is left of an older LOCK's text.
func TestLockThatIsJustMade(t *testing.T) {
	older := strings.Repeat("by somebody ", 20)
	for text, wait := range map[string]time.Duration{"": noticeTime, older: 0} {
		synctest.Test(t, func(t *testing.T) {
			path := t.TempDir()
			os.WriteFile(filepath.Join(path, StoreName), nil, 0o600)
			os.WriteFile(filepath.Join(path, LockName), []byte(text), 0o600)
			d, began := mustOpen(t, path), time.Now()
			d.isPlain = true

			lock, err := d.Lock(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			lock.Close()
			if took := time.Since(began); took != wait {
				t.Errorf("a LOCK with %q is taken after %v, want %v", text, took, wait)
			}
			owner := d.owner()
			if !strings.HasPrefix(owner, "by process ") || strings.Contains(owner, "somebody") {
				t.Errorf("a LOCK with %q is now %q", text, owner)
			}
		})
	}
}

// Ensure that a path with white space around it is quoted.
func TestOddPaths(t *testing.T) {
	for path, want := range map[string]string{
		"/none":   "does not exist: /none",
		"/none\n": "does not exist: \"/none\\n\" (it begins or ends in a blank or a newline)",
		"/none ":  "does not exist: \"/none \" (it begins or ends in a blank or a newline)",
		" /none":  "does not exist: \" /none\" (it begins or ends in a blank or a newline)",
	} {
		if _, err := OpenDisk(path, nil); !errors.Is(err, ErrMissing) ||
			!strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v, want %q", path, err, want)
		}
	}

	file := filepath.Join(t.TempDir(), "file ")
	os.WriteFile(file, nil, 0o600)
	_, err := OpenDisk(filepath.Join(file, "data"), nil)
	if err == nil {
		t.Error("a file is a directory")
	}
	_, err = OpenDisk(file, nil)
	if runtime.GOOS != "windows" && !strings.Contains(fmt.Sprint(err), fmt.Sprintf("%q", file)) {
		t.Errorf("a file: %v", err)
	}
}

// Ensure that only regular files are opened: to open a named pipe would wait for a writer.
func TestPipeIsNoFile(t *testing.T) {
	if runtime.GOOS == "windows" {
		return // Windows has no named pipes in directories
	}
	path := t.TempDir()
	if err := exec.Command("mkfifo", filepath.Join(path, StoreName)).Run(); err != nil {
		t.Fatal(err)
	}

	d := mustOpen(t, path)
	if _, _, err := d.Open(StoreName); !errors.Is(err, ErrNotOurs) {
		t.Errorf("a named pipe: %v", err)
	}
}

// Ensure that a locked directory counts as in use, also where another file, which nobody has
// locked, has taken the place of LOCK.
func TestInUseBesideAnotherLock(t *testing.T) {
	if runtime.GOOS == "windows" {
		return // nobody can remove a lock
	}
	synctest.Test(t, func(t *testing.T) {
		path := t.TempDir()
		lock, err := mustOpen(t, path).Lock(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		defer lock.Close()

		name := filepath.Join(path, LockName)
		os.Remove(name)
		os.WriteFile(name, []byte("another"), 0o600)
		if owner, inUse := mustOpen(t, path).InUse(); !inUse || owner != "by another" {
			t.Errorf("in use %v, %s", inUse, owner)
		}
	})
}

// Ensure that where only LOCK is locked, a link in its place ends the lock, and that a new LOCK
// which cannot be locked is removed: otherwise it would count as another process's.
func TestLinkForPlainLock(t *testing.T) {
	if runtime.GOOS == "windows" {
		return // nobody can replace a lock
	}
	path := t.TempDir()
	d := mustOpen(t, path)
	d.isPlain = true
	lock, err := d.Lock(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer lock.Close()

	os.Remove(filepath.Join(path, LockName))
	os.Symlink("nowhere", filepath.Join(path, LockName))
	if err := lock.Verify(); !errors.Is(err, ErrMoved) {
		t.Errorf("Verify: %v", err)
	}
	if err := lock.(*diskLock).lockNew(); !errors.Is(err, ErrNotOurs) {
		t.Errorf("it locks a link: %v", err)
	}
	if err := lock.Verify(); err != nil {
		t.Errorf("behind a LOCK that could not be locked: %v", err)
	}
}

// Ensure that a LOCK that somebody has replaced is made again, with one line of log, if the
// directory itself is locked, and that a second server cannot get the lock meanwhile. If only LOCK
// was locked, or another process has locked the new file, the lock is lost.
func TestReplacedLock(t *testing.T) {
	if runtime.GOOS == "windows" {
		return // nobody can replace a lock
	}
	byFile := func(name string) {
		os.WriteFile(name+".new", []byte("process 1 on backup\n"), 0o400)
		os.Rename(name+".new", name)
	}
	byDirectory := func(name string) { os.Remove(name); os.Mkdir(name, 0o700) }
	byLink := func(name string) { os.Remove(name); os.Symlink("/etc/passwd", name) }

	// The new file may be held by a process that does not know the directory's lock. It is locked
	// before it gets its name, because guard may look at it at any time.
	byLocked := func(name string) {
		elsewhere := t.TempDir()
		f, err := mustOpen(t, elsewhere).lockFile(os.O_CREATE)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { f.Close() })
		os.Rename(filepath.Join(elsewhere, LockName), name)
	}

	for _, c := range []struct {
		what    string
		replace func(name string)
		isPlain bool // the directory is not locked
		isLost  bool
	}{
		{"a file", byFile, false, false},
		{"a directory", byDirectory, false, false},
		{"a link that leads out of the directory", byLink, false, false},
		{"a file, where directories are not locked", byFile, true, true},
		{"a file that another has locked", byLocked, false, true},
	} {
		path, log := t.TempDir(), &strings.Builder{}
		name := filepath.Join(path, LockName)
		first, second := mustOpen(t, path), mustOpen(t, path)
		first.log = slog.New(slog.NewTextHandler(log, nil))
		first.isPlain, second.isPlain = c.isPlain, c.isPlain

		lock, err := first.Lock(t.Context())
		if err != nil {
			t.Fatal(err)
		}

		c.replace(name)
		if !c.isPlain {
			if _, err := second.Lock(t.Context()); !errors.Is(err, ErrLocked) {
				t.Errorf("%s: a second one has the lock: %v", c.what, err)
			}
		}

		// If the lock is not lost, the first call makes LOCK again, and the second one finds it.
		for range 2 {
			if err := lock.Verify(); c.isLost != errors.Is(err, ErrMoved) || !c.isLost && err != nil {
				t.Errorf("%s: %v", c.what, err)
			}
		}

		text, _ := os.ReadFile(name)
		lines := strings.Count(log.String(), "\n")
		isOurs := strings.Contains(string(text), fmt.Sprint(os.Getpid()))
		if !c.isLost && (!isOurs || lines != 1) {
			t.Errorf("%s: LOCK says %q, and the log %q", c.what, text, log)
		}
		lock.Close()
	}
}

// Ensure that where only LOCK is locked, a new LOCK that another process has locked first stays
// that process's.
func TestNewLockOfAnother(t *testing.T) {
	if runtime.GOOS == "windows" {
		return // nobody can remove a lock
	}
	synctest.Test(t, func(t *testing.T) {
		path := t.TempDir()
		first, second := mustOpen(t, path), mustOpen(t, path)
		first.isPlain, second.isPlain = true, true
		lock, err := first.Lock(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		defer lock.Close()

		// LOCK is removed, made again, and locked before the first process can do it.
		os.Remove(filepath.Join(path, LockName))
		if first.isThis(lock.(*diskLock).file, LockName) {
			t.Error("the removed file counts as LOCK")
		}
		other, err := second.Lock(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		defer other.Close()

		if err := lock.(*diskLock).lockNew(); !errors.Is(err, ErrLocked) {
			t.Errorf("it locks another's LOCK: %v", err)
		}
		if err := lock.(*diskLock).again(); !errors.Is(err, os.ErrExist) {
			t.Errorf("it makes LOCK while another's is there: %v", err)
		}
		if !second.isThis(other.(*diskLock).file, LockName) {
			t.Error("it has removed another's LOCK")
		}
		if err := lock.Verify(); !errors.Is(err, ErrMoved) {
			t.Errorf("the first one says %v", err)
		}
	})
}

// Ensure that a start that fails because of LOCK alone, as beside an older kvserver, leaves the
// directory unlocked.
func TestFailedLockLeavesNothing(t *testing.T) {
	path := t.TempDir()
	older, d := mustOpen(t, path), mustOpen(t, path)
	f, err := older.lockFile(os.O_CREATE)
	if err != nil {
		t.Fatal(err)
	}

	if _, err := d.Lock(t.Context()); !errors.Is(err, ErrLocked) {
		t.Errorf("beside an older one: %v", err)
	}
	if _, inUse := d.InUse(); !inUse {
		t.Error("beside an older one it is not in use")
	}

	f.Close()
	if owner, inUse := d.InUse(); inUse {
		t.Errorf("it is in use %s", owner)
	}

	lock, err := d.Lock(t.Context())
	if err != nil {
		t.Fatalf("once that has gone: %v", err)
	}
	lock.Close()
}

// Ensure that a start that fails because the directory itself is locked leaves no file open, and
// that it tries for 50 ms.
func TestFailedLockClosesTheDirectory(t *testing.T) {
	if runtime.GOOS == "windows" {
		return // the directory is not locked
	}
	synctest.Test(t, func(t *testing.T) {
		path := t.TempDir()
		lock, err := mustOpen(t, path).Lock(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		defer lock.Close()

		second := mustOpen(t, path)
		before, began := lowestFile(t), time.Now()
		_, err = second.Lock(t.Context())
		if took := time.Since(began); !errors.Is(err, ErrLocked) || took != 50*time.Millisecond {
			t.Errorf("beside a holder: %v after %v", err, took)
		}
		if after := lowestFile(t); after > before {
			t.Errorf("the next file got the number %d before, and %d since", before, after)
		}
	})
}
