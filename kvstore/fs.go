package kvstore

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"slices"
)

// directory is the file system as the durable store needs it: one directory,
// files known by their names in it. Tests bring others, that fail and forget.
type directory interface {
	// List returns the names of what is in the directory, in order.
	List() ([]string, error)
	// Create makes an empty file, in place of any that has the name, to be written.
	Create(name string) (file, error)
	// Open opens a file to be read, and returns its size in bytes.
	Open(name string) (file, int64, error)
	// Extend opens a file to be written further.
	Extend(name string) (file, error)
	Rename(from, to string) error
	Remove(name string) error
	// Keep gives a file a second name, in the directory's subdirectory in.
	Keep(name, in string) error
	// Sync makes creations, renames and removals durable.
	Sync() error
	// Lock keeps other processes from the directory until the lock is closed.
	// An ErrLocked names who has it.
	Lock() (io.Closer, error)
	// Path is what people call the file.
	Path(name string) string
}

// file is an open file. Nothing done to it is durable before the next Sync.
type file interface {
	io.Reader
	io.WriterAt
	Truncate(size int64) error
	Sync() error
	Close() error
}

const lockName = "LOCK" // never removed: a second process would lock another file than the first

// osDirectory is a real directory.
type osDirectory string

// openDirectory returns the directory at path, which must exist.
func openDirectory(path string) (osDirectory, error) {
	info, err := os.Stat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return "", fmt.Errorf("%w: %s", ErrMissing, path)
	case err != nil:
		return "", err
	case !info.IsDir():
		return "", fmt.Errorf("%w: %s is a file", ErrNotOurs, path)
	}
	return osDirectory(path), nil
}

func (d osDirectory) Path(name string) string { return filepath.Join(string(d), name) }

func (d osDirectory) List() (names []string, err error) {
	entries, err := os.ReadDir(string(d))
	for _, e := range entries {
		names = append(names, e.Name())
	}
	slices.Sort(names)
	return names, err
}

func (d osDirectory) Create(name string) (file, error) {
	return os.OpenFile(d.Path(name), os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
}

func (d osDirectory) Open(name string) (file, int64, error) {
	f, err := os.Open(d.Path(name))
	if err != nil {
		return nil, 0, err
	}
	info, err := f.Stat()
	if err != nil {
		f.Close()
		return nil, 0, err
	}
	return f, info.Size(), nil
}

func (d osDirectory) Extend(name string) (file, error) {
	return os.OpenFile(d.Path(name), os.O_WRONLY, 0o600)
}

func (d osDirectory) Rename(from, to string) error { return os.Rename(d.Path(from), d.Path(to)) }
func (d osDirectory) Remove(name string) error     { return os.Remove(d.Path(name)) }

func (d osDirectory) Keep(name, in string) error {
	if err := os.MkdirAll(d.Path(in), 0o700); err != nil {
		return err
	}
	if err := os.Link(d.Path(name), filepath.Join(d.Path(in), name)); err != nil {
		return err
	}
	return osDirectory(d.Path(in)).Sync()
}

func (d osDirectory) Sync() error {
	if runtime.GOOS == "windows" {
		return nil // NTFS logs its names itself, and has no such call
	}
	f, err := os.Open(string(d))
	if err != nil {
		return err
	}
	err = f.Sync()
	return errors.Join(err, f.Close())
}
