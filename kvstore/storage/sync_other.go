//go:build !linux

package storage

import "os"

// syncData is Sync: package syscall has no fdatasync for these systems.
func syncData(f *os.File) error { return f.Sync() }
