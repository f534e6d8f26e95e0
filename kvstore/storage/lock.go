package storage

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"
	"sync"
	"syscall"
	"time"
)

// LockName is the file that says who holds the lock. It stays when the lock is given up, or a
// second process could lock another file than the first. One that was just made is removed where it
// could not be locked or signed, and with a directory that MakeDisk undoes.
const LockName = "LOCK"

// noticeTime is longer than a server takes to notice that its LOCK is gone, and to make it anew.
const noticeTime = 2*heldTime + heldTime/2

// Lock locks the directory, and the file LOCK in it, which says who holds it. The directory's own
// lock cannot be taken away from its holder; LOCK is for people, for older kvservers, and for file
// systems that do not lock directories, such as NFS. InUse takes both for moments. The lock does
// not wait for a process that holds it, but ctx ends the wait for one that may have lost LOCK.
func (d *Disk) Lock(ctx context.Context) (Lock, error) {
	// The directory first: whoever has it keeps all others out, whatever happens to LOCK.
	self, err := tryLock(d.lockSelf)
	if err != nil {
		return nil, d.lockError(err)
	}
	f, err := d.lockNamed(ctx)
	if err != nil {
		closeAll(self)
		return nil, d.lockError(err)
	}

	l := &diskLock{dir: d, self: self, stop: make(chan struct{}), ended: make(chan struct{}),
		lost: make(chan struct{})}

	// From here on LOCK is the one at which watch looks.
	err = l.sign(f)
	if err != nil {
		closeAll(self, f)
		return nil, err
	}
	go l.watch()
	return l, nil
}

// lockNamed locks LOCK. If it is missing beside a store, somebody has removed it, perhaps under a
// server that has the store open: then that server gets the time to make it anew.
func (d *Disk) lockNamed(ctx context.Context) (*os.File, error) {
	// A directory without STORE has nothing that a server could lose.
	_, lockErr := d.root.Lstat(LockName)
	_, storeErr := d.root.Lstat(StoreName)
	if errors.Is(lockErr, fs.ErrNotExist) && storeErr == nil {
		d.log.Warn("LOCK is missing beside a store: waiting, for a server may use the store still",
			"dir", d.path, "for", noticeTime)
		select {
		case <-time.After(noticeTime):
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}

	// It may be there again by now, and locked.
	return tryLock(d.lockFile)
}

// tryLock locks what others may have locked for a moment, to see whether it is in use. It tries for
// 50 ms.
func tryLock(lock func() (*os.File, error)) (f *os.File, err error) {
	f, err = lock()

	for tries := 10; tries > 0 && errors.Is(err, ErrLocked); tries-- {
		time.Sleep(5 * time.Millisecond)
		f, err = lock()
	}
	return f, err
}

// lockError is err, and names who holds the lock if somebody does.
func (d *Disk) lockError(err error) error {
	if errors.Is(err, ErrLocked) {
		return fmt.Errorf("%w: %s %s", ErrLocked, d.path, d.owner())
	}
	return err
}

// closeAll closes files, of which each may be nil.
func closeAll(files ...*os.File) (err error) {
	for _, f := range files {
		if f != nil {
			err = errors.Join(err, f.Close())
		}
	}
	return err
}

// InUse tells whether a process holds the lock, also this one.
func (d *Disk) InUse() (owner string, inUse bool) {
	// The directory first: LOCK may have been removed under a server.
	self, err := d.root.Open(".")
	if err == nil {
		defer self.Close()
		inUse = !d.isPlain && isLocked(self)
	}

	if !inUse && !d.hasLockedFile() {
		return "", false
	}
	return d.owner(), true
}

// owner is what LOCK says of who holds it.
func (d *Disk) owner() string {
	text := make([]byte, 200)
	n := 0
	f, err := d.open(LockName, os.O_RDONLY)
	if err == nil {
		n, _ = f.ReadAt(text, 0)
		f.Close()
	}

	// Only a help for people, so nothing depends on it.
	if n == 0 {
		return "by another process"
	}

	return "by " + strings.TrimSpace(string(text[:n]))
}

// diskLock is a locked directory with its LOCK, at which a goroutine looks now and then.
type diskLock struct {
	dir  *Disk
	self *os.File // the directory, locked; nil where that cannot be

	mu   sync.Mutex  // guards file and info: watch looks, and the store's owner
	file *os.File    // LOCK, locked
	info os.FileInfo // which file that is

	stop  chan struct{} // closed by Close
	ended chan struct{} // closed by watch when it has ended
	lost  chan struct{} // closed by watch, after it has set why
	why   error         // that the lock is lost
}

// heldTime is the time between two looks of watch.
const heldTime = time.Second

// sign makes f, which is locked, the lock's file, and writes into it who holds it.
func (l *diskLock) sign(f *os.File) error {
	// The server's user must be able to lock it, too.
	info, err := f.Stat()
	if err == nil {
		err = l.dir.own(LockName)
	}
	if err != nil {
		return err
	}
	l.file, l.info = f, info

	// Only a help for people, so it may fail.
	err = f.Truncate(0)
	if err == nil {
		host, _ := os.Hostname()
		fmt.Fprintf(f, "process %d on %s since %s\n", os.Getpid(), host,
			time.Now().UTC().Format(time.RFC3339))
	}
	return nil
}

// watch looks every heldTime whether the lock is still ours. It is the lock's goroutine, which ends
// when the lock is closed or lost.
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

		// What cannot be found out now is looked at again.
		err := l.Look()
		if errors.Is(err, ErrMoved) {
			l.why = err
			close(l.lost)
			return
		}
	}
}

// Look tells whether the path still leads to the directory, and the lock is ours: ErrMoved if not,
// another error if that cannot be found out now. A LOCK that is gone is made anew, and also one that
// was replaced, where the directory itself is locked and no other process has locked the new one.
func (l *diskLock) Look() error {
	l.mu.Lock()
	defer l.mu.Unlock()

	// By the path, not by the directory that is held open: that a start would not find.
	isThere, err := l.dir.isThere()
	switch {
	case err != nil:
		return err
	case !isThere:
		return fmt.Errorf("%w: %s is gone, or another", ErrMoved, l.dir.path)
	}

	info, err := l.dir.root.Lstat(LockName)
	taken := fmt.Errorf("%w: %s is another file now", ErrMoved, l.dir.Path(LockName))
	switch {
	case err == nil && os.SameFile(info, l.info):
		return nil

	// The directory's own lock keeps others out, so what fails here may wait for the next look. (An
	// older kvserver knows LOCK alone.)
	case l.self != nil:
		if l.dir.hasLockedFile() {
			return taken
		}
		l.dir.root.Remove(LockName)
		l.again()
		return nil

	case err == nil:
		return taken
	case !errors.Is(err, fs.ErrNotExist):
		return err
	}

	// Whoever has made LOCK meanwhile has the directory.
	err = l.again()
	if errors.Is(err, fs.ErrExist) || errors.Is(err, ErrLocked) {
		return taken
	}
	return err
}

// hasLockedFile tells whether LOCK, whichever file that is, is locked.
func (d *Disk) hasLockedFile() bool {
	f, err := d.open(LockName, os.O_RDONLY)
	if err != nil {
		return false
	}
	defer f.Close()
	return isLocked(f)
}

// again makes and locks LOCK anew.
func (l *diskLock) again() error {
	f, err := l.dir.open(LockName, os.O_RDWR|os.O_CREATE|os.O_EXCL)
	if err != nil {
		return err
	}
	f.Close()

	// InUse may have it locked for a moment.
	old := l.file
	f, err = tryLock(l.dir.lockFile)
	if err == nil {
		err = l.sign(f)
	}

	// A LOCK that is not locked and signed the next look would take for another process's.
	if err != nil {
		if !errors.Is(err, ErrLocked) {
			l.dir.root.Remove(LockName)
		}
		closeAll(f)
		return err
	}

	// Only now: until the new one is signed the old one still is the lock.
	old.Close()
	l.dir.log.Warn("LOCK was removed or replaced while it was locked: it was made anew", "dir",
		l.dir.path)
	return nil
}

// isThere tells whether the path still leads to the directory.
func (d *Disk) isThere() (bool, error) {
	ours, err := d.root.Stat(".")
	if err != nil {
		return false, err
	}

	// A path that leads nowhere is an answer; one that cannot be looked at is none.
	theirs, err := os.Stat(d.path)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ENOTDIR) {
		return false, nil
	}
	return err == nil && os.SameFile(ours, theirs), err
}

// isThis tells whether f is the file that has the name now.
func (d *Disk) isThis(f *os.File, name string) bool {
	// A lock is on the file that was opened, whatever its name leads to.
	ours, err := f.Stat()
	if err != nil {
		return false
	}

	theirs, err := d.root.Stat(name)
	return err == nil && os.SameFile(ours, theirs)
}

// Lost is closed by watch.
func (l *diskLock) Lost() <-chan struct{} { return l.lost }

// Held returns what watch has found.
func (l *diskLock) Held() error {
	// Nothing is looked at here, so it costs nothing after each batch.
	select {
	case <-l.lost:
		return l.why
	default:
		return nil
	}
}

// Close ends watch, and gives the lock up. LOCK stays.
func (l *diskLock) Close() error {
	close(l.stop)
	<-l.ended // or it would look at files that are closed
	return closeAll(l.file, l.self)
}
