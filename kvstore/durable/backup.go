package durable

import (
	"context"
	"errors"
	"fmt"
	"io/fs"

	"kvserver/kvstore/storage"
)

// Backup copies the store in dir to out, which is empty. It takes no lock of dir and asks no
// server: beside a process that has the store open it reads what that had written when Backup
// began, whole frames only, and that is everything that was answered by then. It checks what it
// copies; the copy opens like any store. step, if not nil, is told now and then how many bytes
// were copied of about how many.
func Backup(dir, out storage.Directory, step func(copied, total int64)) (r Report, err error) {
	err = fillDirectory(out, func() (err error) {
		for range readTries {
			c := copier{out: out, step: step}
			if err = c.copyAll(dir); err == nil {
				r.say("copied %d files, %d bytes to %s", c.made+1, c.copied, out.Path(""))
			}
			if !errors.Is(err, fs.ErrNotExist) { // in etcd what is open can be removed
				return err
			}
			if err := empty(out); err != nil {
				return err
			}
		}
		return err
	})
	return r, err
}

// fillDirectory has write fill a directory that is empty, and locked meanwhile. If it fails, the directory is
// empty again.
func fillDirectory(out storage.Directory, write func() error) error {
	lock, err := out.Lock(context.Background())
	if err != nil {
		return err
	}
	defer lock.Close()
	names, err := out.List() // only now: nobody else fills it
	if err != nil {
		return err
	}
	for _, name := range names {
		if !isBeside(name) {
			return fmt.Errorf("%w: %s is there: a copy needs a new or an empty directory",
				storage.ErrNotOurs, out.Path(name))
		}
	}

	err = write()
	if err == nil {
		err = lock.Held()
	}
	if err != nil {
		err = errors.Join(err, empty(out))
	}
	return err
}

// empty removes what there is of a store.
func empty(out storage.Directory) error {
	names, err := out.List()
	for _, name := range names {
		if !isBeside(name) {
			err = errors.Join(err, out.Remove(name))
		}
	}
	return err
}

// openAll opens all files of a store, so that what others append, or compact away, from now on
// does not matter: no file is read further than it is long now.
func openAll(dir storage.Directory) (s *files, err error) {
	for range readTries { // a compaction may take a file away between its name and its opening
		if s, err = findFiles(dir); err != nil {
			if errors.Is(err, fs.ErrNotExist) {
				continue
			}
			return nil, err
		}
		if len(s.logs) == 0 {
			return nil, fmt.Errorf("%w: %s is empty", storage.ErrNotOurs, dir.Path(""))
		}
		for i := range s.logs {
			l, openErr := s.open(i)
			if openErr != nil {
				err = openErr
				break
			}
			l.limit = l.size
		}
		if err == nil {
			return s, nil
		}
		s.close()
		if !errors.Is(err, fs.ErrNotExist) {
			return nil, err
		}
	}
	return nil, err
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

// copyAll copies the files in their order, and last STORE: before that the copy is no store.
func (c *copier) copyAll(dir storage.Directory) (err error) {
	if c.files, err = openAll(dir); err != nil {
		return err
	}
	for _, l := range c.logs {
		c.total += l.size
	}
	err = c.walk(visitor{begin: c.beginFile, frame: c.copyFrame, end: c.endFile})
	if c.w != nil {
		err = errors.Join(err, c.w.f.Close())
	}
	if err != nil {
		return err
	}
	return writeID(c.out, c.id)
}

func (c *copier) beginFile(l *logReader) (err error) {
	c.w, err = beginLog(c.out, logName(l.header.kind, l.header.number), l.header)
	return err
}

func (c *copier) copyFrame(l *logReader, f frame, payload []byte) error {
	if c.copied += f.padded(); c.step != nil {
		c.step(c.copied, c.total)
	}
	if f.kind == frameNext && l == c.logs[len(c.logs)-1] {
		return nil // the next file came after we began
	}
	return c.w.append(f, payload, 0)
}

// endFile ends the copy of a file. The last one's last frame says that all before it is on disk.
func (c *copier) endFile(l *logReader, end logEnd, isLast bool) (err error) {
	if isLast {
		last := frame{sequence: end.next, synced: end.next - 1, kind: frameCleanStop}
		if end.goesOn() {
			last.sequence, last.synced = end.next-1, end.next-2
		}
		err = c.w.append(last, nil, 0)
	}
	if err == nil {
		err = c.w.publish(c.out)
		c.w = nil
		c.made++
	}
	return err
}
