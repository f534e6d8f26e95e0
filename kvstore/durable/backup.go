package durable

import (
	"context"
	"errors"
	"fmt"
	"io/fs"

	"kvserver/kvstore/storage"
)

// Backup copies the store in dir to out, which is empty. It takes no lock of dir and asks no server:
// beside a process that has the store open it reads at least what that had written when Backup
// began, whole frames only, and that is everything that was answered by then. It checks the
// checksums and the order of what it copies; the copy opens like any store. step, if not nil, is
// told after each frame how many bytes were copied of about how many.
func Backup(dir, out storage.Directory, step func(copied, total int64)) (r Report, err error) {
	err = fillDirectory(out, func() (err error) {
		var c copier
		beside(dir, func() (isStale bool) {
			c = copier{out: out, step: step}
			err = empty(out) // of what was copied before, in vain
			if err == nil {
				err = c.copyAll(dir)
			}
			return errors.Is(err, fs.ErrNotExist)
		})
		if err == nil {
			r.say("copied %d files, %d bytes of commits to %s", c.made+1, c.copied, out.Path(""))
		}
		return err
	})
	return r, err
}

// fillDirectory has write fill a directory that is empty, and locked meanwhile. If that fails, the
// directory is empty again, unless it is another process's by then.
func fillDirectory(out storage.Directory, write func() error) error {
	lock, err := out.Lock(context.Background())
	if err != nil {
		return err
	}
	defer lock.Close()

	// Looked at once it is locked, for nobody else fills it from then on.
	names, err := out.List()
	if err != nil {
		return err
	}
	for _, name := range names {
		if !isBeside(name) {
			return fmt.Errorf("%w: %s is there", ErrNotEmpty, out.Path(name))
		}
	}

	// Whoever took the lock meanwhile may have written there, too: then it is no copy, and what is
	// there is not ours to remove.
	err = write()
	lost := lock.Held()
	if lost != nil && !errors.Is(lost, storage.ErrGone) {
		return errors.Join(err, lost)
	}

	// Half a copy is of no use, and in the way of the next try.
	err = errors.Join(err, lost)
	if err != nil {
		err = errors.Join(err, empty(out))
	}
	return err
}

// empty removes what there is of a store.
func empty(out storage.Directory) error {
	// What cannot be removed is said, but the rest goes.
	names, err := out.List()
	for _, name := range names {
		if !isBeside(name) {
			err = errors.Join(err, out.Remove(name))
		}
	}
	return err
}

// copier copies the files of a store.
type copier struct {
	*files
	out           storage.Directory
	w             *logWriter // the copy of the file that is read
	made          int        // files so far
	copied, total int64      // bytes
	step          func(copied, total int64)
}

// copyAll copies the files in their order, and last STORE: before that the copy is no store. It
// fails with an fs.ErrNotExist if a compaction takes a file away before it is open.
func (c *copier) copyAll(dir storage.Directory) (err error) {
	c.files, err = findFiles(dir)
	if err != nil {
		return err
	}
	if len(c.logs) == 0 {
		return fmt.Errorf("%w: %s", ErrNoStore, dir.Path(""))
	}

	defer closeLogs(c.logs)
	for _, l := range c.logs {
		c.total += l.size
	}

	// A crash before STORE leaves a directory that no start takes for a store.
	for !c.done {
		_, err = createLog(c.out, c.logs[c.at].header, c.copyFile)
		if err != nil {
			return err
		}
		c.made++
	}
	_, err = writeID(c.out, c.id)
	return err
}

// copyFile copies the frames of the next file to w. The last one's last frame says that all before
// it is on disk.
func (c *copier) copyFile(w *logWriter) error {
	c.w = w
	end, err := c.read(c.copyFrame)
	if err != nil || !c.done {
		return err
	}

	// A copy ends as a clean stop does: what is damaged in it later is not taken for torn.
	last := frame{sequence: end.next, synced: end.next - 1, kind: frameCleanStop}
	if end.goesOn() {
		last.sequence, last.synced = end.next-1, end.next-2 // in the place of what was left out
	}
	return w.append(last, nil, 0)
}

// copyFrame copies a frame.
func (c *copier) copyFrame(l *logReader, f frame, payload []byte) error {
	c.copied += f.padded()
	if c.step != nil {
		c.step(c.copied, c.total)
	}

	// If the last file goes on, the next one came after we began, and is not in the copy.
	if f.kind == frameNext && l == c.logs[len(c.logs)-1] {
		return nil
	}
	return c.w.append(f, payload, 0)
}
