//go:build unix

package storage

import (
	"math"
	"syscall"
)

// OpenFiles returns how many files, connections included, the process may have open at a time.
func OpenFiles() int {
	var limit syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil {
		return math.MaxInt32
	}
	return int(min(uint64(limit.Cur), math.MaxInt32))
}
