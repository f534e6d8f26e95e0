package storage

import (
	"os"
	"syscall"
)

// lockSelf does nothing: nobody can remove LOCK while it is open.
func (d *Disk) lockSelf() (*os.File, error) { return nil, nil }

// lockFile opens LOCK to be written by this process alone, until that ends in whatever way. Others
// may read who it is. (Nobody can remove it meanwhile, so it is never to be made anew.)
func (d *Disk) lockFile() (*os.File, error) {
	path, err := syscall.UTF16PtrFromString(d.Path(LockName))
	if err != nil {
		return nil, err
	}

	// The os package shares what it opens with writers.
	const sharingViolation = syscall.Errno(32)
	h, err := syscall.CreateFile(path, syscall.GENERIC_READ|syscall.GENERIC_WRITE,
		syscall.FILE_SHARE_READ, nil, syscall.OPEN_ALWAYS, syscall.FILE_ATTRIBUTE_NORMAL, 0)

	if err == sharingViolation {
		return nil, ErrLocked
	}
	if err != nil {
		return nil, &os.PathError{Op: "lock", Path: d.Path(LockName), Err: err}
	}
	return os.NewFile(uintptr(h), d.Path(LockName)), nil
}

// isLocked tells whether somebody else who has the file open has the lock on it: then it cannot be
// opened to be written.
func isLocked(f *os.File) bool {
	again, err := os.OpenFile(f.Name(), os.O_RDWR, 0)
	if err != nil {
		return true
	}
	again.Close()
	return false
}

// keepOwner does nothing: files inherit their directory's rights.
func keepOwner(root *os.Root, name string, info os.FileInfo) error { return nil }
