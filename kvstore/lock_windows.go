package kvstore

import (
	"fmt"
	"io"
	"os"
	"syscall"
)

// Lock opens the file for this process alone, which ends with the process
// however that ends.
func (d osDirectory) Lock() (io.Closer, error) {
	path, err := syscall.UTF16PtrFromString(d.Path(lockName))
	if err != nil {
		return nil, err
	}
	const sharingViolation = syscall.Errno(32)
	h, err := syscall.CreateFile(path, syscall.GENERIC_READ|syscall.GENERIC_WRITE, 0, nil, syscall.OPEN_ALWAYS, syscall.FILE_ATTRIBUTE_NORMAL, 0)
	if err == sharingViolation {
		return nil, fmt.Errorf("%w: %s by another process", ErrLocked, string(d))
	}
	if err != nil {
		return nil, &os.PathError{Op: "lock", Path: d.Path(lockName), Err: err}
	}
	return os.NewFile(uintptr(h), d.Path(lockName)), nil
}
