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

// Disk is a directory of the file system, held open: if its path comes to mean another
// one, this stays the one that was opened. Any goroutine may use it.
type Disk struct {
	path string
	log  *slog.Logger
	root *os.Root
	self *os.File // for Sync; nil where there is no such call

	// For tests: the directory itself is not locked, as on a disk that cannot do that.
	isPlain bool

	// The log was told that files cannot be given to the directory's owner.
	notGiven atomic.Bool
}

// OpenDisk returns the directory at path, which must exist. log, if not nil, is told what people
// should know.
func OpenDisk(path string, log *slog.Logger) (*Disk, error) {
	// A missing directory is not made: it may be a disk that is not mounted.
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

	// Kept open, so that a Sync needs no descriptor. (NTFS logs its names itself, and has no such
	// call.)
	if runtime.GOOS != "windows" {
		if d.self, err = d.root.Open("."); err != nil {
			d.root.Close()
			return nil, err
		}
	}
	return d, nil
}

// quoteOdd is path. Where it begins or ends in a character that nobody sees, as a shell variable or
// a file often leaves it there, it is in quotes, with a word on that.
func quoteOdd(path string) string {
	if path == strings.TrimSpace(path) {
		return path
	}
	return fmt.Sprintf("%q (it begins or ends in a blank or a newline)", path)
}

// Sizes are those of a disk, which is large, and slow to make a file longer.
func (d *Disk) Sizes() (segment, compact int64, reserve int) {
	return 64 << 20, 64 << 20, 1 << 20
}

// RoomFor knows nothing: a disk says that it is full when it is written.
func (d *Disk) RoomFor(int64, bool) error { return nil }

// Path is the path of the file called name.
func (d *Disk) Path(name string) string { return filepath.Join(d.path, name) }

// named is err with the whole path: os.Root knows the name alone.
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

// open opens a file, and nothing else: a named pipe of that name would hold us up, and a link lead
// out of the directory.
func (d *Disk) open(name string, flag int) (*os.File, error) {
	// What cannot be looked at is opened all the same, for that has the better error.
	info, err := d.root.Lstat(name)
	if err == nil && !info.Mode().IsRegular() {
		return nil, fmt.Errorf("%w: %s is no file", ErrNotOurs, d.Path(name))
	}

	f, err := d.root.OpenFile(name, flag, 0o600)
	return f, d.named(name, err)
}

// diskFile is a File whose Sync leaves out what nobody will miss, where the system can: when
// the file was changed. Writing that costs another write of the file system's own.
type diskFile struct{ *os.File }

// Sync makes what is in the file durable.
func (f diskFile) Sync() error { return syncData(f.File) }

// Stamp looks at the file, whatever has its name by now.
func (f diskFile) Stamp() (Stamp, error) {
	info, err := f.Stat()
	if err != nil {
		return Stamp{}, err
	}
	return stampOf(info), nil
}

// stampOf is what info says of a file.
func stampOf(info fs.FileInfo) Stamp { return Stamp{info, info.Size(), info.ModTime()} }

// List reads the directory.
func (d *Disk) List() (names []string, err error) {
	entries, err := fs.ReadDir(d.root.FS(), ".")
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names, d.named("", err)
}

// Stamps reads the directory and looks at each file: some microseconds for one.
func (d *Disk) Stamps() (map[string]Stamp, error) {
	names, err := d.List()
	if err != nil {
		return nil, err
	}

	// What goes while it is looked at is no error: others may remove files.
	stamps := map[string]Stamp{}

	for _, name := range names {
		info, err := d.root.Lstat(name) // a link of somebody's may lead anywhere
		switch {
		case errors.Is(err, fs.ErrNotExist):
			continue // it has gone since
		case err != nil:
			return nil, d.named(name, err)
		}
		stamps[name] = stampOf(info)
	}
	return stamps, nil
}

// Create makes a file that belongs to the directory's owner.
func (d *Disk) Create(name string) (File, error) {
	f, err := d.open(name, os.O_RDWR|os.O_CREATE|os.O_TRUNC)
	if err != nil {
		return nil, err
	}

	// Or the server, which is that owner, could not open what root's commands write.
	err = d.own(name)
	if err != nil {
		f.Close()
		return nil, err
	}
	return diskFile{f}, nil
}

// own gives a new file to the directory's owner.
func (d *Disk) own(name string) error {
	// The directory may have been given away since it was opened.
	info, err := d.root.Stat(".")
	if err != nil {
		return d.named("", err)
	}
	d.give(name, info)
	return nil
}

// give gives a file to the owner of what info is about. Where that cannot be done, as in a container
// that has no CAP_CHOWN, the file stays root's, and the log says so once: a store that root can use is
// better than none.
func (d *Disk) give(name string, info fs.FileInfo) {
	err := keepOwner(d.root, name, info)
	if err != nil && d.notGiven.CompareAndSwap(false, true) {
		d.log.Warn("files stay root's, for this process cannot give them to the owner of the store's "+
			"directory: that user's server cannot open them", "dir", d.path, "error", err)
	}
}

// Open opens a file to be read.
func (d *Disk) Open(name string) (File, int64, error) {
	f, err := d.open(name, os.O_RDONLY)
	if err != nil {
		return nil, 0, err
	}

	// The size is that of the open file, whatever has the name by now.
	info, err := f.Stat()
	if err != nil {
		f.Close()
		return nil, 0, err
	}
	return diskFile{f}, info.Size(), nil
}

// Extend opens a file to be read and written.
func (d *Disk) Extend(name string) (File, error) {
	f, err := d.open(name, os.O_RDWR)
	if err != nil {
		return nil, err
	}
	return diskFile{f}, nil
}

// Rename gives a file another name. It takes the place of one that has that name.
func (d *Disk) Rename(from, to string) error { return d.named(to, d.root.Rename(from, to)) }

// Remove removes a file.
func (d *Disk) Remove(name string) error { return d.named(name, d.root.Remove(name)) }

// Sync makes the names in the directory durable.
func (d *Disk) Sync() error {
	// NTFS needs no such call.
	if d.self == nil {
		return nil
	}
	return d.named("", syncNames(d.self))
}

// syncNames syncs an open directory: another function in tests.
var syncNames = (*os.File).Sync

// Close closes the directory. A lock of it, and its files, are closed by those who have them.
func (d *Disk) Close() error {
	if d.self != nil {
		d.self.Close()
	}
	return d.root.Close()
}

// MakeDisk opens the directory at path for a copy of the store at from, and makes it if it is not
// there. If this process may, it gives the directory to the owner of from. from is "" for a store
// that is in no directory: then it is the directory around path. undo removes a directory that was
// made, if it is empty but for LOCK, and gives one that was there back to its owner. log is OpenDisk's.
func MakeDisk(path, from string, log *slog.Logger) (d *Disk, undo func(), err error) {
	// Where the directory around it is missing, the path is probably mistyped.
	around, err := os.Stat(filepath.Dir(filepath.Clean(path)))
	if err != nil {
		return nil, nil, err
	}

	// A copy inside the store would be a stranger in its directory, which the next start refuses.
	source := around
	if from != "" {
		source, err = os.Stat(from)
		if err != nil {
			return nil, nil, err
		}
		if os.SameFile(source, around) {
			return nil, nil, fmt.Errorf("%w: %s is inside the store that is to be copied",
				ErrNotOurs, path)
		}
	}

	// A crash after this must not leave a copy in a directory that is not there.
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

	// Only what was done here is undone.
	undo = func() {
		if isNew {
			os.Remove(filepath.Join(path, LockName))
			os.Remove(path)
		}
	}
	if err != nil {
		undo()
		return nil, nil, err
	}

	// If that cannot be done the copy is root's, and no worse for it.
	was, err := d.root.Stat(".")
	if err != nil {
		return d, undo, nil
	}
	d.give(".", source)
	if !isNew {
		undo = func() {
			root, err := os.OpenRoot(path) // d may be closed by now
			if err == nil {
				keepOwner(root, ".", was)
				root.Close()
			}
		}
	}
	return d, undo, nil
}

// syncParent makes durable that path is there.
func syncParent(path string) error {
	parent, err := OpenDisk(filepath.Dir(filepath.Clean(path)), nil)
	if err != nil {
		return err
	}
	return errors.Join(parent.Sync(), parent.Close())
}
