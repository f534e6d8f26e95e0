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

// LockName is the file that says who holds the lock. It stays when the lock is released: if it were
// removed, two processes could lock two files of that name. Only Verify removes a LOCK: its own new
// one that it cannot lock or sign, and one that has replaced ours and nobody has locked; and so
// does MakeDisk's undo, with its directory.
const LockName = "LOCK"

// noticeTime is longer than a server takes to notice that its LOCK is gone, and to make another.
const noticeTime = 2*guardTime + guardTime/2

// Lock locks the directory itself, and the file LOCK in it. Nobody can take the directory's own
// lock away from its holder; LOCK is for people, for older kvservers, and for file systems that do
// not lock directories, such as NFS. InUse of another process may hold either for a moment, so Lock
// tries for 50 ms. It waits longer only for a process that may have lost LOCK, and ctx ends that
// wait.
func (d *Disk) Lock(ctx context.Context) (Lock, error) {
	l := &diskLock{dir: d, stop: make(chan struct{}), ended: make(chan struct{}),
		lost: make(chan struct{})}

	// The directory first: its lock keeps all others out, whatever happens to LOCK.
	var f *os.File
	self, err := tryLock(d.lockSelf)
	if err == nil {
		f, err = d.lockNamed(ctx, self == nil)
	}
	if err == nil {
		err = l.sign(f)
	}
	if err != nil {
		closeAll(self, f)
		return nil, d.lockError(err)
	}

	l.self = self
	go l.guard()
	return l, nil
}

// lockNamed locks LOCK. If LOCK is missing but STORE is there, somebody has removed LOCK, perhaps
// while a server has the store open: then lockNamed first gives that server time to make another,
// and to sign it, if the directory itself is not locked.
func (d *Disk) lockNamed(ctx context.Context, isAlone bool) (*os.File, error) {
	// This first try makes no LOCK: if it is missing, a server must first have that time.
	f, err := tryLock(func() (*os.File, error) { return d.lockFile(0) })
	isNew := err == nil && isAlone && isEmpty(f)
	if !isNew && !errors.Is(err, fs.ErrNotExist) {
		return f, err
	}
	closeAll(f)

	// Without STORE no server has a store open here, unless somebody has removed all its files.
	_, storeErr := d.root.Lstat(StoreName)
	if storeErr == nil {
		d.log.Warn("LOCK is missing or empty beside a store: waiting, for a server may use the "+
			"store still", "dir", d.path, "for", noticeTime)
		select {
		case <-time.After(noticeTime):
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}

	// It may be there again by now, and locked.
	return tryLock(func() (*os.File, error) { return d.lockFile(os.O_CREATE) })
}

// isEmpty reports whether nobody has signed LOCK, which f is: perhaps somebody has just made it.
func isEmpty(f *os.File) bool {
	info, err := f.Stat()
	return err == nil && info.Size() == 0
}

// tryLock calls lock again while that returns an ErrLocked, for 50 ms: InUse of another process may
// hold the lock for a moment.
func tryLock(lock func() (*os.File, error)) (f *os.File, err error) {
	f, err = lock()

	for tries := 10; tries > 0 && errors.Is(err, ErrLocked); tries-- {
		time.Sleep(5 * time.Millisecond)
		f, err = lock()
	}
	return f, err
}

// lockError returns err; an ErrLocked also names who holds the lock.
func (d *Disk) lockError(err error) error {
	if errors.Is(err, ErrLocked) {
		return fmt.Errorf("%w: %s %s", ErrLocked, d.path, d.owner())
	}
	return err
}

// closeAll closes those files that are not nil. No error matters: a lock ends whatever Close says.
func closeAll(files ...*os.File) {
	for _, f := range files {
		f.Close()
	}
}

// InUse reports whether a process, which may be this one, holds the lock.
func (d *Disk) InUse() (owner string, inUse bool) {
	// The directory first: somebody may have removed the LOCK of a server that runs.
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

// owner describes the process that holds the lock, as LOCK says it.
func (d *Disk) owner() string {
	text := make([]byte, 200)
	n := 0
	f, err := d.open(LockName, os.O_RDONLY)
	if err == nil {
		n, _ = f.ReadAt(text, 0)
		f.Close()
	}

	// The text is only for people: nothing depends on it.
	if n == 0 {
		return "by another process"
	}

	return "by " + strings.TrimSpace(string(text[:n]))
}

// diskLock is the lock of a Disk: the directory and LOCK, both locked. A goroutine checks it now
// and then.
type diskLock struct {
	dir  *Disk
	self *os.File // the directory, locked; nil where directories cannot be locked

	mu   sync.Mutex  // guards file and info: guard calls Verify, and the store's owner does
	file *os.File    // LOCK, locked
	info os.FileInfo // which file that is

	stop  chan struct{} // closed by Close
	ended chan struct{} // closed by guard when it ends
	lost  chan struct{} // closed by guard once it has set why
	why   error         // why the lock is lost; may be read once lost is closed
}

// guardTime is the time between two checks of guard.
const guardTime = time.Second

// sign makes f, which is locked, the lock's file, and writes the holder's name into it.
func (l *diskLock) sign(f *os.File) error {
	info, err := f.Stat()
	if err != nil {
		return err
	}
	l.file, l.info = f, info
	l.dir.own(LockName) // the server's user must be able to lock the file, too

	// The text is only for people, so it is no error if this fails.
	err = f.Truncate(0)
	if err == nil {
		host, _ := os.Hostname()
		fmt.Fprintf(f, "process %d on %s since %s\n", os.Getpid(), host,
			time.Now().UTC().Format(time.RFC3339))
	}
	return nil
}

// guard checks every guardTime that the lock is still ours. It runs as a goroutine of its own, and
// ends when the lock is closed or lost.
func (l *diskLock) guard() {
	defer close(l.ended)
	tick := time.Tick(guardTime)

	for {
		select {
		case <-tick:
		case <-l.stop:
			return
		}

		// Any other error says only that the check failed: the next one may not.
		err := l.Verify()
		if errors.Is(err, ErrMoved) {
			l.why = err
			close(l.lost)
			return
		}
	}
}

// Verify checks that the path still leads to the directory, and that the lock is ours: it returns
// an ErrMoved if not, and another error if that cannot be found out now. It replaces a LOCK that is
// gone; if that fails, it is an error only where the directory itself is not locked. If LOCK is
// another file now, Verify replaces it only while the directory itself is locked and no process has
// locked that file.
func (l *diskLock) Verify() error {
	l.mu.Lock()
	defer l.mu.Unlock()

	// Check the path, which the next start will use: it may lead elsewhere than to what we hold.
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

	// The directory's own lock keeps others out, so if this fails the next check may repair it.
	// (Only an older kvserver does not know that lock. It locks LOCK alone.)
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

	// Only LOCK was locked, and it is gone. Whoever has made another has the directory.
	err = l.again()
	if errors.Is(err, fs.ErrExist) || errors.Is(err, ErrLocked) {
		return taken
	}
	return err
}

// hasLockedFile reports whether some process has locked the file that is called LOCK now.
func (d *Disk) hasLockedFile() bool {
	f, err := d.open(LockName, os.O_RDONLY)
	if err != nil {
		return false
	}
	defer f.Close()
	return isLocked(f)
}

// again makes another LOCK, and locks and signs it. The caller has mu.
func (l *diskLock) again() error {
	f, err := l.dir.open(LockName, os.O_RDWR|os.O_CREATE|os.O_EXCL)
	if err != nil {
		return err
	}
	f.Close()
	return l.lockNew()
}

// lockNew locks and signs the LOCK that was just made, unless another process was faster: then that
// file is the other's. The caller has mu.
func (l *diskLock) lockNew() error {
	// InUse of another process may hold it for a moment.
	old := l.file
	f, err := tryLock(func() (*os.File, error) { return l.dir.lockFile(os.O_CREATE) })
	if err == nil {
		err = l.sign(f)
	}

	// The next check would take a LOCK that is not ours yet for another process's, so remove it.
	if err != nil {
		if !errors.Is(err, ErrLocked) {
			l.dir.root.Remove(LockName)
		}
		closeAll(f)
		return err
	}

	// Only now: until the new file is signed, the old one is the lock.
	old.Close()
	l.dir.log.Warn("LOCK was removed or replaced while it was locked: it was made again", "dir",
		l.dir.path)
	return nil
}

// isThere reports whether the path still leads to the directory.
func (d *Disk) isThere() (bool, error) {
	ours, err := d.root.Stat(".")
	if err != nil {
		return false, err
	}

	// A path that leads nowhere is an answer. A path that cannot be checked is an error.
	theirs, err := os.Stat(d.path)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ENOTDIR) {
		return false, nil
	}
	return err == nil && os.SameFile(ours, theirs), err
}

// isThis reports whether f is the file that has the name now.
func (d *Disk) isThis(f *os.File, name string) bool {
	// A lock is on the open file, and its name may lead to another one by now.
	ours, err := f.Stat()
	if err != nil {
		return false
	}

	theirs, err := d.root.Stat(name)
	return err == nil && os.SameFile(ours, theirs)
}

// Lost is closed by guard.
func (l *diskLock) Lost() <-chan struct{} { return l.lost }

// Held returns what guard has found. It makes no system call.
func (l *diskLock) Held() error {
	select {
	case <-l.lost:
		return l.why
	default:
		return nil
	}
}

// Close ends guard and releases the lock. The file LOCK stays.
func (l *diskLock) Close() error {
	close(l.stop)
	<-l.ended // or guard would use files that are closed
	closeAll(l.file, l.self)
	return nil
}
