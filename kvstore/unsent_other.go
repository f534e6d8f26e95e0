//go:build !linux

package kvstore

// Unsent is not known here.
func Unsent(conn any) (bytes int, ok bool) { return 0, false }
