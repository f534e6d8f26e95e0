package storage

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync/atomic"
)

// Disk is a directory in the file system. It is held open: if its path comes to lead elsewhere, a
// Disk stays the directory that was opened. Any goroutine may use it.
type Disk struct {
	path string
	log  *slog.Logger
	root *os.Root
	self *os.File // the directory, for Sync; nil where the system cannot sync directories

	// For tests: do not lock the directory itself, as on a file system that cannot do that.
	isPlain bool

	// The log was told that files cannot be given to the directory's owner.
	notGiven atomic.Bool
}

// OpenDisk opens the directory at path, which must exist. Warnings for the operator go to log; nil:
// nowhere.
func OpenDisk(path string, log *slog.Logger) (*Disk, error) {
	// A missing directory is not created: perhaps a disk is not mounted.
	info, err := os.Stat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, fmt.Errorf("%w: %s", ErrMissing, quoteOdd(path))
	case err != nil:
		return nil, err
	case !info.IsDir():
		return nil, fmt.Errorf("%w: %s is a file", ErrNotOurs, quoteOdd(path))
	}

	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}

	d := &Disk{path: path, log: log}
	if d.root, err = os.OpenRoot(path); err != nil {
		return nil, err
	}

	// The directory is kept open so that Sync needs no new descriptor. (Windows cannot sync a
	// directory; NTFS journals names by itself.)
	if runtime.GOOS != "windows" {
		if d.self, err = d.root.Open("."); err != nil {
			d.root.Close()
			return nil, d.named("", err)
		}
	}
	return d, nil
}

// quoteOdd returns path for an error message. A path that begins or ends in white space, as a shell
// variable or a file often leaves it there, is quoted and explained.
func quoteOdd(path string) string {
	if path == strings.TrimSpace(path) {
		return path
	}
	return fmt.Sprintf("%q (it begins or ends in a blank or a newline)", path)
}

// Sizes are large: a disk has room, and is slow to make a file longer.
func (d *Disk) Sizes() (segment, compact int64, zeros int) {
	return 64 << 20, 64 << 20, 1 << 20
}

// RoomFor always returns nil: a disk says that it is full when somebody writes.
func (d *Disk) RoomFor(_, _ int64, _ bool) error { return nil }

// Path is the path of the file called name; for an empty name, of the directory.
func (d *Disk) Path(name string) string { return filepath.Join(d.path, name) }

// named returns err with the whole path in it: os.Root knows only the name.
func (d *Disk) named(name string, err error) error {
	var path *fs.PathError
	var link *os.LinkError

	switch {
	case errors.As(err, &path):
		return &fs.PathError{Op: path.Op, Path: d.Path(name), Err: path.Err}
	case errors.As(err, &link):
		return &fs.PathError{Op: link.Op, Path: d.Path(name), Err: link.Err}
	}
	return err
}

// open opens a regular file. It refuses anything else that has the name: to open a named pipe could
// block, and a link may lead to a file that is not the store's.
func (d *Disk) open(name string, flag int) (*os.File, error) {
	// If Lstat fails, go on: the error of OpenFile says more.
	info, err := d.root.Lstat(name)
	if err == nil && !info.Mode().IsRegular() {
		return nil, fmt.Errorf("%w: %s is no file", ErrNotOurs, d.Path(name))
	}

	f, err := d.root.OpenFile(name, flag, 0o600)
	return f, d.named(name, err)
}

// diskFile is a File whose Sync leaves out the time of the last change, where the system can do
// that: nobody will miss it, and it costs the file system another write.
type diskFile struct{ *os.File }

// Sync makes the file's contents durable.
func (f diskFile) Sync() error { return syncData(f.File) }

// Stamp describes the open file, even if its name leads to another one by now.
func (f diskFile) Stamp() (Stamp, error) {
	info, err := f.Stat()
	if err != nil {
		return Stamp{}, err
	}
	return stampOf(info), nil
}

// stampOf makes a Stamp of a file's info.
func stampOf(info fs.FileInfo) Stamp { return Stamp{info, info.Size(), info.ModTime()} }

// List reads the directory. It is sorted, as fs.ReadDir says.
func (d *Disk) List() (names []string, err error) {
	entries, err := fs.ReadDir(d.root.FS(), ".")
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names, d.named("", err)
}

// Stamps reads the directory and calls Lstat for each file, which takes some microseconds a file.
func (d *Disk) Stamps() (map[string]Stamp, error) {
	names, err := d.List()
	if err != nil {
		return nil, err
	}

	stamps := map[string]Stamp{}

	for _, name := range names {
		info, err := d.root.Lstat(name) // not Stat: somebody's link may lead anywhere
		switch {
		case errors.Is(err, fs.ErrNotExist):
			continue // somebody has removed the file since
		case err != nil:
			return nil, d.named(name, err)
		}
		stamps[name] = stampOf(info)
	}
	return stamps, nil
}

// Create makes or empties a file and gives it to the directory's owner, if root may do that (give).
func (d *Disk) Create(name string) (File, error) {
	f, err := d.open(name, os.O_RDWR|os.O_CREATE|os.O_TRUNC)
	if err != nil {
		return nil, err
	}

	// Without this the server, which may run as that owner, could not open what root's commands
	// write.
	d.own(name)
	return diskFile{f}, nil
}

// own gives a new file to the directory's owner.
func (d *Disk) own(name string) {
	// The directory may have been given away since it was opened.
	info, err := d.root.Stat(".")
	if err == nil {
		d.give(name, info)
	}
}

// give gives a file to the user and group that info names, if this process is root's. If root may
// not do that, as in a container without CAP_CHOWN, the file stays root's and the log says so once:
// a store that only root can use is better than none.
func (d *Disk) give(name string, info fs.FileInfo) {
	err := keepOwner(d.root, name, info)
	if err != nil && d.notGiven.CompareAndSwap(false, true) {
		d.log.Warn("files stay root's, for this process cannot give them to the owner of the store's "+
			"directory: that user's server cannot open them", "dir", d.path, "error", err)
	}
}

// Open opens a file for reading.
func (d *Disk) Open(name string) (File, int64, error) {
	f, err := d.open(name, os.O_RDONLY)
	if err != nil {
		return nil, 0, err
	}

	// Ask the open file for its size: its name may lead to another one by now.
	info, err := f.Stat()
	if err != nil {
		f.Close()
		return nil, 0, err
	}
	return diskFile{f}, info.Size(), nil
}

// Extend opens a file for reading and writing.
func (d *Disk) Extend(name string) (File, error) {
	f, err := d.open(name, os.O_RDWR)
	if err != nil {
		return nil, err
	}
	return diskFile{f}, nil
}

// Rename gives a file another name. It replaces a file that has that name.
func (d *Disk) Rename(from, to string) error { return d.named(to, d.root.Rename(from, to)) }

// Remove removes a file.
func (d *Disk) Remove(name string) error { return d.named(name, d.root.Remove(name)) }

// Sync makes the names in the directory durable.
func (d *Disk) Sync() error {
	if d.self == nil {
		return nil
	}
	return d.named("", syncNames(d.self))
}

// syncNames syncs an open directory. Tests replace it.
var syncNames = (*os.File).Sync

// Close closes the directory. Its lock and its files are closed by their owners.
func (d *Disk) Close() error {
	if d.self != nil {
		d.self.Close()
	}
	return d.root.Close()
}

// MakeDisk opens the directory at path for a copy of the store at from, and creates it if it is
// missing. It gives a directory that it has created to the owner of from, if this process may do
// that. If from is "", because that store is in no directory of a disk, the owner is that of path's
// parent. undo removes a directory that MakeDisk has created, if nothing but LOCK is in it. log is
// OpenDisk's.
func MakeDisk(path, from string, log *slog.Logger) (d *Disk, undo func(), err error) {
	// If the parent is missing too, the path is probably mistyped.
	around, err := os.Stat(filepath.Dir(filepath.Clean(path)))
	if err != nil {
		return nil, nil, &advised{err, "Nothing was copied. First create the directory around NEW."}
	}

	// The copy must not be among the source's files: the next start would refuse the source.
	source := around
	if from != "" {
		source, err = os.Stat(from)
		if err != nil {
			return nil, nil, err
		}
		target, err := os.Stat(path)
		if os.SameFile(source, around) || err == nil && os.SameFile(source, target) {
			return nil, nil, fmt.Errorf("%w: %s", ErrInside, path)
		}
	}

	// Sync the parent, or after a crash a finished copy may be gone with its directory.
	err = os.Mkdir(path, 0o700)
	isNew := err == nil
	if isNew {
		err = syncParent(path)
	} else if errors.Is(err, fs.ErrExist) {
		err = nil
	}
	if err == nil {
		d, err = OpenDisk(path, log)
	}

	// A directory that was there before stays, and stays its owner's: perhaps it is no place for a
	// copy. So does a new one that another process has filled meanwhile, with its LOCK.
	undo = func() {
		names, err := os.ReadDir(path)
		if isNew && err == nil && len(names) <= 1 {
			os.Remove(filepath.Join(path, LockName))
			os.Remove(path) // not if the one file is another
		}
	}
	if err != nil {
		undo()
		return nil, nil, err
	}

	if isNew {
		d.give(".", source)
	}
	return d, undo, nil
}

// syncParent makes the entry of path in its parent directory durable.
func syncParent(path string) error {
	parent, err := OpenDisk(filepath.Dir(filepath.Clean(path)), nil)
	if err != nil {
		return err
	}
	return errors.Join(parent.Sync(), parent.Close())
}
