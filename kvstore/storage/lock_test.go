package storage

import (
	"errors"
	"os"
	"path/filepath"
	"runtime"
	"sync"
	"testing"
)

// Ensure that who only asks whether a store is in use does not take a lock that is made anew.
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
	for range 300 {
		os.Remove(filepath.Join(path, LockName))
		if err := lock.(*diskLock).Look(); err != nil {
			t.Fatal(err)
		}
	}
	close(stop)
	askers.Wait()
	lock.Close()
}

// Ensure that an error of the moment is not taken for a directory that was moved.
func TestLockLooksAgain(t *testing.T) {
	path := filepath.Join(t.TempDir(), "data")
	os.Mkdir(path, 0o700)
	dir := mustOpen(t, path)
	lock, err := dir.Lock(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer lock.Close()
	look := lock.(interface{ Look() error }).Look
	os.Rename(path, path+".old")
	if err := os.Symlink(path, path); err != nil {
		t.Logf("without links there is no such error: %v", err)
		return
	}
	if err := look(); err == nil || errors.Is(err, ErrMoved) {
		t.Errorf("where the path is a loop: %v", err)
	}
	os.Remove(path)
	if err := look(); !errors.Is(err, ErrMoved) {
		t.Errorf("where it is gone: %v", err)
	}
	os.Rename(path+".old", path)
	if err := look(); err != nil {
		t.Errorf("where it is back: %v", err)
	}
}

// mustOpen opens a directory.
func mustOpen(t *testing.T, path string) *Disk {
	d, err := OpenDisk(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.Close() })
	return d
}
