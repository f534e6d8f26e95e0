// Package storage is where a store is kept: a Directory of files that are known by their names.
// Package etcd has a Directory in an etcd cluster, and package storetest one for tests.
//
//	storage.go  the contract: Directory, Lock, File, Stamp, and the errors of all directories
//	disk.go     Disk, a Directory of the file system
//	lock.go     its lock: who holds it, and how its loss is noticed
//	status.go   what a store tells others of itself while it is opened and used
//	lock_*.go, sync_*.go, limit_*.go  what each system does in its own way
package storage

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"syscall"
	"time"
)

// Directory is where a store is kept, as the store needs it: one directory, files known by their
// names in it. But for InUse, Path and Sizes, whatever is asked can fail with the errors below, or
// with those of the system.
type Directory interface {
	// List returns the names of what is in the directory, in order.
	List() ([]string, error)
	// Create makes an empty file to be written; one that has the name is emptied.
	Create(name string) (File, error)
	// Open opens a file to be read, and returns its size in bytes.
	Open(name string) (File, int64, error)
	// Extend opens a file to be read and written further.
	Extend(name string) (File, error)
	// Rename gives a file another name, in one step; a file that has the name already is gone.
	Rename(from, to string) error
	// Remove removes a file; fs.ErrNotExist if there is none of that name.
	Remove(name string) error
	// Sync makes creations, renames and removals durable. It needs no descriptor
	// but those that are open.
	Sync() error
	// Lock keeps other processes from the directory until the lock is closed. Where one of them
	// holds it, it fails with an ErrLocked that names that process, or waits for it until ctx is
	// done, as suits the directory.
	Lock(ctx context.Context) (Lock, error)
	// InUse tells whether a process holds the lock, and which. It changes nothing.
	InUse() (owner string, inUse bool)
	// Stamps tells what each file is now, by its name: if somebody has changed one, or has put
	// another in its place, that is not what the File says of itself.
	Stamps() (map[string]Stamp, error)
	// Path is what people call the file of that name, or with no name the directory.
	Path(name string) string
	// Sizes are what suits the directory, in bytes: the log goes on in a new file when one has
	// segment bytes, full files are not compacted while they have less than compact bytes together,
	// and a file grows by reserve bytes of zeros at a time; 0: by what is written.
	Sizes() (segment, compact int64, reserve int)
	// RoomFor returns an error if the directory knows that it may have no room for so many bytes
	// more. What frees may take the last room.
	RoomFor(bytes int64, frees bool) error
	// Close gives back what the directory holds open.
	Close() error
}

// Lock is one process's right to a Directory.
type Lock interface {
	// Held returns an error once it was noticed that the right is lost: the directory is not where
	// it was, another one is there, or another process may write it. It is called after every batch
	// of requests, so it is quick.
	Held() error
	// Look is Held with a look of its own, where Held only says what was noticed: ErrMoved if the
	// right is lost, another error if that cannot be found out now.
	Look() error
	// Lost is closed when the right is lost and the lock has noticed by itself. It is nil for a
	// lock that does not notice by itself.
	Lost() <-chan struct{}
	// Close gives the right up.
	Close() error
}

// File is an open file. Nothing done to it is durable before the next Sync.
type File interface {
	io.ReaderAt
	io.WriterAt
	Truncate(size int64) error
	Sync() error
	// Stamp tells what the file is now, as Stamps does if the file still has a name.
	Stamp() (Stamp, error)
	Close() error
}

// Stamp tells a file from another one of its name, and from itself before it was changed.
type Stamp struct {
	ID      any       // which file: comparable, or an os.FileInfo
	Size    int64     // bytes
	Changed time.Time // the last change of what is in it; the zero time where nobody knows
}

// IsSameFile tells whether both are of one file, whatever is in it.
func (s Stamp) IsSameFile(other Stamp) bool {
	// A disk knows which file it is only from both at once.
	a, isInfo := s.ID.(fs.FileInfo)
	b, isOtherInfo := other.ID.(fs.FileInfo)
	if isInfo && isOtherInfo {
		return os.SameFile(a, b)
	}

	return s.ID == other.ID
}

// IsSame tells whether both are of one file that nobody has changed in between.
func (s Stamp) IsSame(other Stamp) bool {
	return s.IsSameFile(other) && s.Size == other.Size && s.Changed.Equal(other.Changed)
}

// StoreName is the file without which a directory is no store.
const StoreName = "STORE"

// IsFull tells whether err says that there is no room: on the disk, or in what we may use of it.
func IsFull(err error) bool {
	return errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) ||
		errors.Is(err, syscall.EFBIG)
}

// Errors of directories.
var (
	// ErrMissing is returned when the directory does not exist.
	ErrMissing = errors.New("the data directory does not exist")
	// ErrNotOurs is returned when what is there is not a store.
	ErrNotOurs = errors.New("not a data directory")
	// ErrLocked is returned when another process has the store open.
	ErrLocked = errors.New("the data directory is in use")
	// ErrGone is returned by Held of a lock in etcd, never of a disk's, when the directory has not
	// all files any more as they were written: the right to write there is not lost, but nothing
	// may be answered before they were written anew.
	ErrGone = errors.New("files of the data directory were removed or replaced")
	// ErrMoved is returned by Commit when the directory was moved, removed or
	// replaced while the store was open.
	ErrMoved = errors.New("the data directory is not where it was")
)

// DamageError says where a file of the store is not as it was written.
type DamageError struct {
	File   string // its path
	Offset int64  // of the bad frame, in bytes
	Frame  uint64 // its sequence number; 0: it is no frame that is bad, but the file
	What   string // what is wrong

	Missing bool // the file is not there
}

// Is makes a file that is missing an fs.ErrNotExist as well: beside a process that has the store
// open it may be there at the next look.
func (e *DamageError) Is(target error) bool { return e.Missing && target == fs.ErrNotExist }

// Error names the file, and the frame if it is one.
func (e *DamageError) Error() string {
	// What is wrong with a whole file has no offset.
	if e.Frame == 0 {
		return fmt.Sprintf("%s is damaged: %s", e.File, e.What)
	}
	return fmt.Sprintf("%s is damaged at offset %d, frame %d: %s", e.File, e.Offset, e.Frame,
		e.What)
}
