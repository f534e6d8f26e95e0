package durable

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"

	"kvserver/kvstore/storage"
)

// Backup copies the store in dir to out, which must be empty. It takes no lock of dir and asks no
// server. While a process has the store open, Backup reads at least what that process had written
// when Backup began, in whole frames: everything that was answered by then. It checks the
// checksums and the order of the frames that it copies. The copy opens like any store.
func Backup(dir, out storage.Directory) (r Report, err error) {
	err = fillDirectory(out, func() (err error) {
		var c copier
		beside(dir, func() (isStale bool) {
			c = copier{out: out}
			err = empty(out) // an earlier try may have left files
			if err == nil {
				err = c.copyAll(dir)
			}
			return errors.Is(err, fs.ErrNotExist)
		})
		if err == nil {
			r.say("copied %d files, %d bytes of commits to %s", c.at+1, c.copied, out.Path(""))
		}
		return err
	})
	return r, err
}

// fillDirectory locks an empty directory and runs write, which fills it. If that fails, the
// directory is emptied again, unless it is another process's by then.
func fillDirectory(out storage.Directory, write func() error) error {
	lock, err := out.Lock(context.Background())
	if err != nil {
		return err
	}
	defer lock.Close()

	// Checked only now that it is locked: from here on nobody else fills it.
	names, err := contents(out)
	if err != nil {
		return err
	}
	if len(names) > 0 {
		return fmt.Errorf("%w: %s is there", ErrNotEmpty, out.Path(names[0]))
	}

	// If another process has taken the lock, it may have written there, too: then this is no copy,
	// and the files are not ours to remove.
	err = write()
	lost := lock.Held()
	if lost != nil && !errors.Is(lost, storage.ErrGone) {
		return errors.Join(err, lost)
	}

	// Half a copy is useless, and the next try would refuse it.
	err = errors.Join(err, lost)
	if err != nil {
		err = errors.Join(err, empty(out))
	}
	return err
}

// empty removes all files of a store, or of a part of one.
func empty(out storage.Directory) error {
	// If one file cannot be removed, the others still are.
	names, err := contents(out)
	for _, name := range names {
		err = errors.Join(err, out.Remove(name))
	}
	return err
}

// copier copies the files of a store.
type copier struct {
	*files
	out    storage.Directory
	w      *logWriter // the copy of the file that is read
	copied int64      // bytes
}

// copyAll copies the log files in order, and then STORE: without it the copy is no store. It fails
// with fs.ErrNotExist if a compaction removes a file before it is open; in etcd, before it is read.
func (c *copier) copyAll(dir storage.Directory) (err error) {
	c.files, err = findFiles(dir)
	if err != nil {
		return err
	}
	if len(c.logs) == 0 {
		return cmp.Or(checkNames(dir), fmt.Errorf("%w at %s", ErrNoStore, dir.Path("")))
	}

	// STORE comes last. A start refuses a copy without it, or makes a new store if nothing has been
	// copied yet.
	defer closeLogs(c.logs)
	for !c.done {
		_, err = createLog(c.out, c.logs[c.at].header, c.copyFile)
		if err != nil {
			return err
		}
	}
	_, err = writeID(c.out, c.id)
	return err
}

// copyFile copies the frames of the next file to w. The last file gets one more frame, which says
// that everything before it is on disk.
func (c *copier) copyFile(w *logWriter) error {
	c.w = w
	end, err := c.readFile(c.copyFrame)
	if err != nil || !c.done {
		return err
	}

	// A copy ends like a clean stop, so that later damage in it is not taken for a torn end.
	last := frame{sequence: end.next, synced: end.next - 1, kind: frameCleanStop}
	if end.goesOn() {
		last.sequence, last.synced = end.next-1, end.next-2 // replaces the frame that was left out
	}
	return w.append(last, nil, 0)
}

// copyFrame copies a frame.
func (c *copier) copyFrame(l *logReader, f frame, payload []byte) error {
	c.copied += f.padded()

	// If the last file goes on, the next one was made after Backup began, and is not in the copy.
	if f.kind == frameNext && l == c.logs[len(c.logs)-1] {
		return nil
	}
	return c.w.append(f, payload, 0)
}
