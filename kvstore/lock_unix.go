//go:build unix

package kvstore

import (
	"fmt"
	"os"
	"syscall"
)

// lockFile opens LOCK and holds an flock on it, which ends with the process however
// that ends.
func (d *osDirectory) lockFile() (*os.File, error) {
	f, err := d.open(lockName, os.O_RDWR|os.O_CREATE)
	if err != nil {
		return nil, err
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		f.Close()
		if err == syscall.EWOULDBLOCK {
			return nil, ErrLocked
		}
		return nil, fmt.Errorf("flock %s: %w", d.Path(lockName), err)
	}
	return f, nil
}

// isLocked tells whether another process has the lock on f.
func isLocked(f *os.File) bool {
	return syscall.Flock(int(f.Fd()), syscall.LOCK_SH|syscall.LOCK_NB) == syscall.EWOULDBLOCK
}
