// Package storage says where a store is kept: in a Directory of files, each known by its name.
// Package etcd has a Directory in an etcd cluster, and package storetest one for tests.
//
//	storage.go  the contract: Directory, Lock, File, Stamp, and the errors of all directories
//	disk.go     Disk, a Directory in the file system
//	lock.go     the lock of a Disk: who holds it, and how its loss is noticed
//	tls.go      certificates in files, for a connection to where a store is kept, or to a server; a
//	            server's are read again while they are in use
//	status.go   what a store reports about itself while it is opened and used
//	lock_*.go, sync_*.go, limit_*.go  what differs between operating systems
package storage

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strconv"
	"strings"
	"syscall"
	"time"
	"unicode"
)

// Directory is where a store is kept: one flat directory of named files. Its methods return the
// errors of this package, or those of the operating system or the cluster.
type Directory interface {
	// List returns the names of all that is in the directory, sorted.
	List() ([]string, error)
	// Create makes an empty file for reading and writing. A file that has the name already loses
	// its contents.
	Create(name string) (File, error)
	// Open opens a file for reading, and returns its size in bytes.
	Open(name string) (File, int64, error)
	// Extend opens an existing file for reading and writing.
	Extend(name string) (File, error)
	// Rename gives a file another name, in one step. It replaces a file that has that name.
	Rename(from, to string) error
	// Remove removes a file. It returns fs.ErrNotExist if no file has that name.
	Remove(name string) error
	// Sync makes creations, renames and removals durable. A disk's opens no new descriptor.
	Sync() error
	// Lock keeps other processes out of the directory until the lock is closed. While another
	// process holds the lock, Lock fails with an ErrLocked that names that process (a disk, and
	// etcd for a command), or waits until it gets the lock or ctx is done (etcd for a server).
	Lock(ctx context.Context) (Lock, error)
	// InUse reports whether a process, which may be this one, holds the lock, and describes that
	// process. It changes nothing.
	InUse() (owner string, inUse bool)
	// Stamps returns the Stamp of the file that each name leads to now. It differs from the Stamp
	// of an open File if somebody has changed the file, or has put another one in its place.
	Stamps() (map[string]Stamp, error)
	// Path returns how people call the file of that name; for an empty name, the directory.
	Path(name string) string
	// Sizes returns the sizes that suit the directory, in bytes. The log goes on in a new file once
	// a file has segment bytes. While full files and the snapshot have fewer than compact bytes,
	// only a heal or a full disk has them compacted. The current file is extended by about that
	// many zeros at a time; if there are none, by what is written. The sizes may be known only
	// under the lock.
	Sizes() (segment, compact int64, zeros int)
	// RoomFor returns an error if the directory knows that it may have no room for that many more
	// bytes. It also leaves room for Deletes, which will take toDelete bytes, as far as it can. A
	// request that frees room may use room that other writes leave.
	RoomFor(bytes, toDelete int64, frees bool) error
	// Close releases what the directory holds open. Locks and files are closed by their owners.
	Close() error
}

// Lock is a process's exclusive right to a Directory.
type Lock interface {
	// Held returns an error once the loss of the right was noticed: the directory has been moved or
	// replaced, or another process may write to it. A lock in etcd also returns ErrGone, and waits
	// while it does not know whether it is held. Held is called after every batch of requests, so
	// it must be quick otherwise.
	Held() error
	// Verify checks the directory now, while Held only returns what was noticed before. It returns
	// an error if the right is lost (a disk's is ErrMoved), or if a disk cannot be checked now.
	Verify() error
	// Lost returns a channel that is closed when the lock has noticed that the right is lost. It
	// returns nil for a lock that does not notice a loss by itself.
	Lost() <-chan struct{}
	// Close releases the lock.
	Close() error
}

// File is an open file. A change of it is durable once the next Sync has returned nil.
type File interface {
	io.ReaderAt
	io.WriterAt
	Truncate(size int64) error
	Sync() error
	// Stamp returns what Directory.Stamps has for the file while nobody else touches it.
	Stamp() (Stamp, error)
	Close() error
}

// Stamp identifies a file and its state: it tells the file from another one of the same name, and
// from itself before a change.
type Stamp struct {
	ID      any       // which file: comparable, or an os.FileInfo
	Size    int64     // bytes; 0 in etcd
	Changed time.Time // when the contents changed last; the zero time where nobody knows
}

// IsSameFile reports whether both stamps are of one file, whatever its contents were.
func (s Stamp) IsSameFile(other Stamp) bool {
	// A disk's IDs have no value to compare: os.SameFile needs both.
	a, isInfo := s.ID.(fs.FileInfo)
	if isInfo {
		b, _ := other.ID.(fs.FileInfo)
		return os.SameFile(a, b)
	}

	return s.ID == other.ID
}

// IsSame reports whether both stamps are of one file that nobody has changed in between.
func (s Stamp) IsSame(other Stamp) bool {
	return s.IsSameFile(other) && s.Size == other.Size && s.Changed.Equal(other.Changed)
}

// StoreName is the name of the file that every store has: it says which store it is.
const StoreName = "STORE"

// IsFull reports whether err says that there is no room: the disk is full, or a quota or a limit on
// the size of a file is used up.
func IsFull(err error) bool {
	return errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) ||
		errors.Is(err, syscall.EFBIG)
}

// ErrNoRoom is returned by a Sync that has found no room now. Nothing is lost: the file keeps what
// is not durable yet, and the next Sync tries again.
var ErrNoRoom = errors.New("no room now")

// NewError returns an error with advice: what the user can do about it. In the advice of a store's
// errors DIR stands for its directory.
func NewError(what, advice string) error { return &advised{errors.New(what), advice} }

// advised is an error with advice.
type advised struct {
	error
	advice string
}

func (e *advised) Unwrap() error { return e.error }

// Advice returns the advice of err, or of the first error in it that has some; "": none has.
func Advice(err error) string {
	if e := (*advised)(nil); errors.As(err, &e) {
		return e.advice
	}
	return ""
}

// Advise returns err, of the store in the directory at path, with advice in any case: if there is
// none for such an error, with otherwise.
func Advise(path string, err error, otherwise string) error {
	advice := Advice(err)
	switch {
	case advice != "":
	case errors.As(err, new(*DamageError)):
		advice = "Nothing was changed. Restore a backup, or save what can be saved: kvserver repair DIR NEW"
	case errors.Is(err, fs.ErrPermission):
		advice = "Start as the user who owns it, or let yours read and write it."
	case errors.Is(err, syscall.EROFS):
		advice = "Mount its file system for writing, or give another directory. kvserver check DIR and " +
			"kvserver backup DIR NEW only read it."
	default:
		advice = otherwise
	}

	// A shell takes a quoted path as one word.
	if strings.ContainsFunc(path, unicode.IsSpace) {
		path = strconv.Quote(path)
	}
	return &advised{err, strings.ReplaceAll(advice, "DIR", path)}
}

// Errors of directories.
var (
	// ErrMissing is returned when the directory does not exist.
	ErrMissing = NewError("the data directory does not exist",
		"Give the server's data directory. For a new server create it: mkdir -m 700 DIR")
	// ErrNotOurs is returned for a directory that is not a store, or a file that is not a store's.
	ErrNotOurs = NewError("not a data directory", "Nothing was changed. Take out what is not a "+
		"store's, or give another directory: for new data or a copy an empty one, not inside a store's.")
	// ErrInside is returned for a copy of a store into its own directory, or into one inside that;
	// in etcd also into a prefix around the store's.
	ErrInside = NewError("a store cannot be copied into itself",
		"Nothing was changed. Give another directory for the copy.")
	// ErrLocked is returned when another process has the store open.
	ErrLocked = NewError("the data directory is in use",
		"Nothing was changed. Stop that process first, or give another directory.")
	// ErrGone is returned when etcd does not have all files any more as they were written. A disk
	// never returns it. The right to write is not lost, but nothing may be answered before all data
	// was written again.
	ErrGone = errors.New("files of the data directory were removed or replaced")
	// ErrMoved is returned when the directory of an open store was moved, removed or replaced, or
	// when LOCK is another file by now and perhaps another process's.
	ErrMoved = NewError("the data directory is not where it was",
		"Put it back, then start again: all that was answered is in it.")
)

// DamageError says where a file of the store differs from what was written.
type DamageError struct {
	File   string // its path
	Offset int64  // of the bad frame, in bytes
	Frame  uint64 // the sequence number of the bad frame; 0: the whole file is bad, not one frame
	What   string // what is wrong

	Missing bool // the file is not there
}

// Is makes a missing file an fs.ErrNotExist too: while another process has the store open, the file
// may only have been replaced by newer ones, and a reader may try again.
func (e *DamageError) Is(target error) bool { return e.Missing && target == fs.ErrNotExist }

// Error names the file, and the frame if one frame is bad.
func (e *DamageError) Error() string {
	// Damage of a whole file has no offset.
	if e.Frame == 0 {
		return fmt.Sprintf("%s is damaged: %s", e.File, e.What)
	}
	return fmt.Sprintf("%s is damaged at offset %d, frame %d: %s", e.File, e.Offset, e.Frame,
		e.What)
}
