package storage

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
)

// Disk is a directory of the file system, held open: if its path comes to mean another
// one, this stays the one that was opened.
type Disk struct {
	path string
	log  *slog.Logger
	root *os.Root
	self *os.File // for Sync; nil where there is no such call

	isPlain bool        // the directory itself cannot be locked; for tests, which cannot find such a disk
	notOurs atomic.Bool // the log was told that files cannot be given to the directory's owner
}

// OpenDisk returns the directory at path, which must exist. log, if not nil, is told what people
// should know.
func OpenDisk(path string, log *slog.Logger) (*Disk, error) {
	info, err := os.Stat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, fmt.Errorf("%w: %s", ErrMissing, quoteOdd(path))
	case err != nil:
		return nil, err
	case !info.IsDir():
		return nil, fmt.Errorf("%w: %s is a file", ErrNotOurs, path)
	}
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	d := &Disk{path: path, log: log}
	if d.root, err = os.OpenRoot(path); err != nil {
		return nil, err
	}
	if runtime.GOOS != "windows" { // NTFS logs its names itself, and has no such call
		if d.self, err = d.root.Open("."); err != nil {
			d.root.Close()
			return nil, err
		}
	}
	return d, nil
}

// quoteOdd is path, or where it begins or ends in what nobody sees, path in quotes and what that
// is.
func quoteOdd(path string) string {
	odd := strings.TrimRight(path, " \t\r\n")
	switch {
	case odd == path && strings.TrimLeft(path, " \t\r\n") == path:
		return path
	case odd == path:
		return fmt.Sprintf("%q (it begins with a blank)", path)
	case strings.HasSuffix(path, "\n"):
		return fmt.Sprintf("%q (it ends in a newline)", path)
	}
	return fmt.Sprintf("%q (it ends in a blank)", path)
}

// Sizes are those of a disk, which is large, and slow to make a file longer.
func (d *Disk) Sizes() (segment, compact int64, reserve int) {
	return 64 << 20, 64 << 20, 1 << 20
}

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

// open opens a file, and nothing else: a named pipe of that name would hold us up.
func (d *Disk) open(name string, flag int) (*os.File, error) {
	if info, err := d.root.Stat(name); err == nil && !info.Mode().IsRegular() {
		return nil, fmt.Errorf("%w: %s is no file", ErrNotOurs, d.Path(name))
	}
	f, err := d.root.OpenFile(name, flag, 0o600)
	return f, d.named(name, err)
}

// osFile is a File whose Sync leaves out what nobody will miss, where the system can: when
// the file was changed. Writing that costs another write of the file system's own.
type diskFile struct{ *os.File }

func (f diskFile) Sync() error { return syncData(f.File) }

func (d *Disk) List() (names []string, err error) {
	entries, err := fs.ReadDir(d.root.FS(), ".")
	for _, e := range entries {
		names = append(names, e.Name())
	}
	slices.Sort(names)
	return names, d.named("", err)
}

// Stamps reads the directory and looks at each file: some microseconds for one.
func (d *Disk) Stamps() (map[string]Stamp, error) {
	names, err := d.List()
	if err != nil {
		return nil, err
	}
	stamps := map[string]Stamp{}
	for _, name := range names {
		info, err := d.root.Stat(name)
		if errors.Is(err, fs.ErrNotExist) {
			continue // it has gone since
		} else if err != nil {
			return nil, d.named(name, err)
		}
		stamps[name] = Stamp{info, info.Size(), info.ModTime()}
	}
	return stamps, nil
}

func (d *Disk) Create(name string) (File, error) {
	f, err := d.open(name, os.O_WRONLY|os.O_CREATE|os.O_TRUNC)
	if err != nil {
		return nil, err
	}
	if err := d.own(name); err != nil {
		f.Close()
		return nil, err
	}
	return diskFile{f}, nil
}

// own gives a new file to the directory's owner. Where that may not be done, as in a container
// that has no CAP_CHOWN, the file stays ours, and the log says so once.
func (d *Disk) own(name string) error {
	info, err := d.root.Stat(".")
	if err != nil {
		return d.named("", err)
	}
	err = keepOwner(d.root, name, info)
	if errors.Is(err, fs.ErrPermission) || errors.Is(err, syscall.EINVAL) {
		if d.notOurs.CompareAndSwap(false, true) {
			d.log.Warn("files stay root's, for this process may not give them to the directory's owner",
				"dir", d.path, "error", err)
		}
		return nil
	}
	return d.named(name, err)
}

func (d *Disk) Open(name string) (File, int64, error) {
	f, err := d.open(name, os.O_RDONLY)
	if err != nil {
		return nil, 0, err
	}
	info, err := f.Stat()
	if err != nil {
		f.Close()
		return nil, 0, err
	}
	return diskFile{f}, info.Size(), nil
}

func (d *Disk) Extend(name string) (File, error) {
	f, err := d.open(name, os.O_RDWR)
	if err != nil {
		return nil, err
	}
	return diskFile{f}, nil
}

func (d *Disk) Rename(from, to string) error { return d.named(to, d.root.Rename(from, to)) }
func (d *Disk) Remove(name string) error     { return d.named(name, d.root.Remove(name)) }

func (d *Disk) Sync() error {
	if d.self == nil {
		return nil
	}
	return d.named("", d.self.Sync())
}

func (d *Disk) Close() error {
	if d.self != nil {
		d.self.Close()
	}
	return d.root.Close()
}

// MakeDisk makes the directory at path for a copy of the store at from, for the same owner, unless
// it is there; from is "" for a store that is in no directory. undo removes what was made.
func MakeDisk(path, from string) (d *Disk, undo func(), err error) {
	around, err := os.Stat(filepath.Dir(filepath.Clean(path)))
	if err != nil {
		return nil, nil, err
	}
	source := around
	if from != "" {
		if source, err = os.Stat(from); err != nil {
			return nil, nil, err
		}
		if os.SameFile(source, around) {
			return nil, nil, fmt.Errorf("%w: %s is inside the store that is to be copied",
				ErrNotOurs, path)
		}
	}

	undo = func() {}
	switch err := os.Mkdir(path, 0o700); {
	case err == nil:
		undo = func() {
			os.Remove(filepath.Join(path, LockName))
			os.Remove(path)
		}
		if err := syncParent(path); err != nil {
			undo()
			return nil, nil, err
		}
	case !errors.Is(err, fs.ErrExist):
		return nil, nil, err
	}
	if d, err = OpenDisk(path, nil); err != nil {
		undo()
		return nil, nil, err
	}
	keepOwner(d.root, ".", source) // if it may not be done, the copy is root's
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
