package storage

import (
	"io/fs"
	"os"
	"syscall"
)

// syncData is fdatasync(2).
func syncData(f *os.File) error {
	conn, err := f.SyscallConn()
	if err != nil {
		return err
	}

	// A signal may interrupt the call, which is no error of the disk: call again.
	controlErr := conn.Control(func(fd uintptr) {
		for {
			if err = syscall.Fdatasync(int(fd)); err != syscall.EINTR {
				return
			}
		}
	})

	if controlErr != nil {
		return controlErr
	}
	if err != nil {
		return &fs.PathError{Op: "fdatasync", Path: f.Name(), Err: err}
	}
	return nil
}
