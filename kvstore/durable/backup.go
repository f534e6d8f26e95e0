package durable

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"kvserver/kvstore/storage"
	"strings"
)

// Backup copies the store in dir to out, which is empty. It takes no lock of dir and asks no
// server: beside a process that has the store open it reads what that has written, whole frames
// only, and that is at least everything that was answered before Backup began. It checks what it
// copies; the copy opens like any store. step, if not nil, is told now and then how many bytes
// were copied of about how many.
func Backup(dir, out storage.Directory, step func(copied, total int64)) (r Report, err error) {
	names, err := out.List()
	if err != nil {
		return r, err
	}
	for _, name := range names {
		if !isBeside(name) || strings.HasPrefix(name, damagedPrefix) ||
			strings.HasPrefix(name, tornPrefix) {
			return r, fmt.Errorf("%w: %s is there: a copy needs a new or an empty directory",
				storage.ErrNotOurs, out.Path(name))
		}
	}
	held, err := out.Lock(context.Background())
	if err != nil {
		return r, err
	}
	defer held.Close()
	for n := 1; ; n++ {
		c := copier{dir: dir, out: out, step: step}
		err := c.copyAll()
		if err == nil {
			r.say("copied %d files, %d bytes to %s", len(c.made)-1, c.copied, out.Path(""))
			return r, nil
		}
		for _, name := range c.made {
			if removeErr := out.Remove(name); !errors.Is(removeErr, fs.ErrNotExist) {
				err = errors.Join(err, removeErr)
			}
		}
		if !errors.Is(err, fs.ErrNotExist) || n == lookTries {
			return r, err
		}
	}
}

// copier copies the files of a store.
type copier struct {
	dir, out      storage.Directory
	id            storeID
	copied, total int64
	made          []string // names of files in out, and of one that is there for a moment
	step          func(copied, total int64)
}

// copyAll copies the snapshot, then segment by segment as long as one says that
// another follows, and last STORE: before that the copy is no store.
func (c *copier) copyAll() error {
	d := &Store{dir: c.dir}
	l, err := d.find()
	if err != nil {
		return err
	}
	if len(l.segments) == 0 {
		return fmt.Errorf("%w: %s is empty", storage.ErrNotOurs, c.dir.Path(""))
	}
	c.id = d.id
	for _, name := range l.names() {
		if f, size, err := c.dir.Open(name); err == nil {
			c.total += size
			f.Close()
		}
	}
	next := uint64(1)
	if l.snapshot > 0 {
		end, err := c.copyLog(kindSnapshot, l.snapshot, 0)
		if err != nil {
			return err
		}
		next = end.header.first
	}
	newest := l.segments[len(l.segments)-1]
	for number, goesOn := l.snapshot+1, true; goesOn; number++ {
		end, err := c.copyLog(kindSegment, number, next)
		if err != nil {
			return err
		}
		goesOn, next = end.goesOn, end.next
		isEmpty := false
		if !goesOn && number+1 == newest {
			if isEmpty, err = isEmptySegment(c.dir, c.id, newest, next); err != nil {
				return err
			}
		}
		if goesOn || number >= newest || isEmpty {
			continue
		}
		// Others follow: a rotation that came meanwhile, or damage.
		return &storage.DamageError{File: c.dir.Path(logName(kindSegment, number)), Offset: end.offset,
			Frame: end.next,
			What:  "the frame that says that another file follows is missing", Missing: true}
	}
	c.made = append(c.made, storeName, storeName+tmpSuffix)
	return writeID(c.out, c.id)
}

// copyLog copies the whole frames of a log file. The last segment's copy ends in a
// frame that says that all before it is on disk.
func (c *copier) copyLog(kind uint32, number, first uint64) (end segmentEnd, err error) {
	name := logName(kind, number)
	l, err := openLog(c.dir, name)
	if err != nil {
		return end, err
	}
	defer l.f.Close()
	if err := l.checkHeader(fileHeader{kind: kind, id: c.id, number: number,
		first: first}); err != nil {
		return end, err
	}
	end.header = l.header
	last := frame{}
	c.made = append(c.made, name)
	_, err = createLog(c.out, name, l.header, func(w *logWriter) error {
		for !end.goesOn {
			f, payload, err := l.read()
			var damage *storage.DamageError
			if errors.As(err, &damage) && kind == kindSegment {
				var rest []byte
				f, payload, rest, err = l.readAgain(damage)
				if _, synced := l.look(rest); errors.As(err, &damage) && !synced {
					err = errEnd // there is none, or one that never was on disk
				}
			}
			switch {
			case err == errEnd && kind == kindSnapshot && last.kind != frameEnd:
				return &storage.DamageError{File: l.path, Offset: l.offset, Frame: l.next,
					What: "the snapshot has no proper end"}
			case err == errEnd && kind == kindSnapshot:
				return nil
			case err == errEnd:
				return w.append(frame{sequence: l.next, synced: l.next - 1, kind: frameCleanStop},
					nil, 0)
			case err != nil:
				return err
			}
			if err := w.append(f, payload, 0); err != nil {
				return err
			}
			last, end.goesOn, end.next, end.offset = f, f.kind == frameNext, l.next, l.offset
			if c.copied += f.padded(); c.step != nil {
				c.step(c.copied, c.total)
			}
		}
		return nil
	})
	return end, err
}
