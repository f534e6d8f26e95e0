package storage

import (
	"os"
	"syscall"
)

// lockSelf does nothing: on Windows nobody can remove LOCK while it is open.
func (d *Disk) lockSelf() (*os.File, error) { return nil, nil }

// lockFile opens LOCK, or makes it if flag is os.O_CREATE, so that only this process may write it
// until it is closed. Others may read who that is. (Nobody can remove LOCK meanwhile, so again
// is never needed.)
func (d *Disk) lockFile(flag int) (*os.File, error) {
	path, err := syscall.UTF16PtrFromString(d.Path(LockName))
	if err != nil {
		return nil, err
	}

	mode := uint32(syscall.OPEN_EXISTING)
	if flag == os.O_CREATE {
		mode = syscall.OPEN_ALWAYS
	}

	// Not os.OpenFile, which lets others open the file for writing, too.
	const sharingViolation = syscall.Errno(32)
	h, err := syscall.CreateFile(path, syscall.GENERIC_READ|syscall.GENERIC_WRITE,
		syscall.FILE_SHARE_READ, nil, mode, syscall.FILE_ATTRIBUTE_NORMAL, 0)

	if err == sharingViolation {
		return nil, ErrLocked
	}
	if err != nil {
		return nil, &os.PathError{Op: "lock", Path: d.Path(LockName), Err: err}
	}
	return os.NewFile(uintptr(h), d.Path(LockName)), nil
}

// isLocked reports whether a process, which may be this one, holds the lock on the file: then it
// cannot be opened for writing. (It cannot either if this user may only read it.)
func isLocked(f *os.File) bool {
	again, err := os.OpenFile(f.Name(), os.O_RDWR, 0)
	if err != nil {
		return true
	}
	again.Close()
	return false
}

// keepOwner does nothing: on Windows files inherit the rights of their directory.
func keepOwner(root *os.Root, name string, info os.FileInfo) error { return nil }
