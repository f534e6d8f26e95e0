//go:build !linux

package storage

import "os"

// syncData is Sync: here is no such call.
func syncData(f *os.File) error { return f.Sync() }
