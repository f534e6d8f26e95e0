//go:build unix

package storage

import (
	"fmt"
	"os"
	"syscall"
)

// lockSelf opens the directory itself and takes an flock on it, which the kernel releases however
// the process ends. It returns nil if the file system does not lock directories.
func (d *Disk) lockSelf() (*os.File, error) {
	if d.isPlain {
		return nil, nil
	}
	f, err := d.root.Open(".")
	if err != nil {
		return nil, d.named("", err)
	}

	err = syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
	if err == nil {
		return f, nil
	}
	f.Close()
	if err == syscall.EWOULDBLOCK {
		return nil, ErrLocked
	}

	// This file system does not lock directories: LOCK alone has to do.
	return nil, nil
}

// lockFile opens LOCK, or makes it if flag is os.O_CREATE, and takes an flock on it, which the
// kernel releases however the process ends.
func (d *Disk) lockFile(flag int) (*os.File, error) {
	f, err := d.open(LockName, os.O_RDWR|flag)
	if err != nil {
		return nil, err
	}

	// A lock on a file that is no longer called LOCK keeps nobody out.
	err = syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
	switch {
	case err == nil && d.isThis(f, LockName):
		return f, nil
	case err == nil, err == syscall.EWOULDBLOCK:
		err = ErrLocked
	default:
		err = fmt.Errorf("flock %s: %w", d.Path(LockName), err)
	}
	f.Close()
	return nil, err
}

// isLocked reports whether another open file has an exclusive lock on the file. If not, it locks f
// shared until f is closed.
func isLocked(f *os.File) bool {
	return syscall.Flock(int(f.Fd()), syscall.LOCK_SH|syscall.LOCK_NB) == syscall.EWOULDBLOCK
}

// Who this process is, and how it gives a file away. Tests replace both.
var (
	geteuid = os.Geteuid
	lchown  = (*os.Root).Lchown
)

// keepOwner gives the file called name to the user and group that info names, if this process is
// root's: an administrator may repair or copy a store for the user that runs the server.
func keepOwner(root *os.Root, name string, info os.FileInfo) error {
	want, ok := info.Sys().(*syscall.Stat_t)
	if !ok || geteuid() != 0 {
		return nil
	}

	// Ask only for a real change: some file systems refuse every one.
	now, err := root.Lstat(name)
	if err == nil {
		has, ok := now.Sys().(*syscall.Stat_t)
		if ok && has.Uid == want.Uid && has.Gid == want.Gid {
			return nil
		}
	}

	return lchown(root, name, int(want.Uid), int(want.Gid))
}
