package storage

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"
)

const LockName = "LOCK" // never removed: a second process would lock another file than the first

// osDirectory is a real directory, held open: if its path comes to mean another
// one, this stays the one that was opened.
type Disk struct {
	path string
	root *os.Root
	self *os.File // for Sync; nil where there is no such call
}

// OpenDisk returns the directory at path, which must exist.
func OpenDisk(path string) (*Disk, error) {
	info, err := os.Stat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, fmt.Errorf("%w: %s", ErrMissing, path)
	case err != nil:
		return nil, err
	case !info.IsDir():
		return nil, fmt.Errorf("%w: %s is a file", ErrNotOurs, path)
	}
	d := &Disk{path: path}
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

func (d *Disk) open(name string, flag int) (*os.File, error) {
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

// own gives a new file to the directory's owner.
func (d *Disk) own(name string) error {
	info, err := d.root.Stat(".")
	if err != nil {
		return d.named("", err)
	}
	return keepOwner(d.root, name, info)
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

// Lock locks the directory's LOCK file, which says who has it. InUse has it too, for
// moments.
func (d *Disk) Lock(context.Context) (Lock, error) {
	f, err := d.lockFile(0)
	for tries := 10; tries > 0 && errors.Is(err, ErrLocked); tries-- {
		time.Sleep(5 * time.Millisecond)
		f, err = d.lockFile(0)
	}
	if errors.Is(err, ErrLocked) {
		return nil, fmt.Errorf("%w: %s %s", ErrLocked, d.path, d.owner())
	} else if err != nil {
		return nil, err
	}
	l := &diskLock{dir: d, stop: make(chan struct{}), ended: make(chan struct{}),
		lost: make(chan struct{})}
	if err := l.sign(f); err != nil {
		f.Close()
		return nil, err
	}
	go l.watch()
	return l, nil
}

// InUse tells whether a process has the lock.
func (d *Disk) InUse() (owner string, inUse bool) {
	f, err := d.open(LockName, os.O_RDONLY)
	if err != nil {
		return "", false
	}
	defer f.Close()
	if isLocked(f) {
		return d.owner(), true
	}
	return "", false
}

// owner is what LOCK says of who has it.
func (d *Disk) owner() string {
	text := make([]byte, 200)
	n := 0
	if f, err := d.open(LockName, os.O_RDONLY); err == nil {
		n, _ = f.ReadAt(text, 0)
		f.Close()
	}
	if n == 0 {
		return "by another process"
	}
	return "by " + strings.TrimSpace(string(text[:n]))
}

// osLock is a locked LOCK file, at which a goroutine looks now and then.
type diskLock struct {
	dir *Disk

	mu   sync.Mutex // guards what is below: watch looks, and the store's owner
	file *os.File
	info os.FileInfo // of file

	stop, ended chan struct{} // closed by Close, and by watch when it has ended
	lost        chan struct{} // closed by watch, and after why was set
	why         error
}

// heldTime is the time between two looks of watch.
const heldTime = time.Second

// sign makes f, which is locked, the lock's file, and writes into it who has it.
func (l *diskLock) sign(f *os.File) error {
	info, err := f.Stat()
	if err == nil {
		err = l.dir.own(LockName)
	}
	if err != nil {
		return err
	}
	l.file, l.info = f, info
	if err := f.Truncate(0); err == nil { // only a help for people, so it may fail
		host, _ := os.Hostname()
		fmt.Fprintf(f, "process %d on %s since %s\n", os.Getpid(), host,
			time.Now().UTC().Format(time.RFC3339))
	}
	return nil
}

// watch looks every heldTime whether the lock is still ours. One goroutine for a lock, until
// it is closed or lost.
func (l *diskLock) watch() {
	defer close(l.ended)
	tick := time.NewTicker(heldTime)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
		case <-l.stop:
			return
		}
		if err := l.Look(); errors.Is(err, ErrMoved) {
			l.why = err
			close(l.lost)
			return
		}
	}
}

// Look tells whether the path still leads to the directory, and to the file in it that is
// locked: ErrMoved if not, another error if that cannot be found out now. Where only that file
// is gone it is made and locked anew: if another process had done so meanwhile, that one's
// would be there.
func (l *diskLock) Look() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	info, err := os.Stat(l.dir.Path(LockName))
	if err == nil && os.SameFile(info, l.info) {
		return nil
	}
	if errors.Is(err, fs.ErrNotExist) {
		isThere, thereErr := l.dir.isThere()
		if thereErr != nil {
			return thereErr
		}
		if isThere {
			if err = l.again(); err == nil {
				return nil
			}
		}
	}
	switch {
	case err == nil, errors.Is(err, fs.ErrExist), errors.Is(err, ErrLocked):
		return fmt.Errorf("%w: %s: another process has it, or another is there", ErrMoved, l.dir.path)
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, syscall.ENOTDIR):
		return fmt.Errorf("%w: %s: %w", ErrMoved, l.dir.path, err)
	}
	return err
}

// again makes and locks the lock's file anew.
func (l *diskLock) again() error {
	f, err := l.dir.lockFile(os.O_EXCL)
	if err != nil {
		return err
	}
	old := l.file
	if err := l.sign(f); err != nil {
		l.dir.root.Remove(LockName) // or the next look would take it for another's
		f.Close()
		return err
	}
	old.Close()
	return nil
}

// isThere tells whether the path still leads to the directory.
func (d *Disk) isThere() (bool, error) {
	ours, err := d.root.Stat(".")
	if err != nil {
		return false, err
	}
	theirs, err := os.Stat(d.path)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ENOTDIR) {
		return false, nil
	}
	return err == nil && os.SameFile(ours, theirs), err
}

// isThis tells whether f has that name.
func (d *Disk) isThis(f *os.File, name string) bool {
	ours, err := f.Stat()
	if err != nil {
		return false
	}
	theirs, err := d.root.Stat(name)
	return err == nil && os.SameFile(ours, theirs)
}

func (l *diskLock) Lost() <-chan struct{} { return l.lost }

// Held returns what watch has found.
func (l *diskLock) Held() error {
	select {
	case <-l.lost:
		return l.why
	default:
		return nil
	}
}

func (l *diskLock) Close() error {
	close(l.stop)
	<-l.ended
	return l.file.Close()
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
	case !errors.Is(err, fs.ErrExist):
		return nil, nil, err
	}
	if d, err = OpenDisk(path); err == nil {
		err = keepOwner(d.root, ".", source)
	}
	if err != nil {
		undo()
		return nil, nil, err
	}
	return d, undo, nil
}
