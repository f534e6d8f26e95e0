package durable

import (
	"errors"
	"fmt"
	"io/fs"
	"slices"

	"kvserver/kvstore"
	"kvserver/kvstore/storage"
)

// Report is what Check, Repair or Backup has found, a line for each thing.
type Report struct {
	Lines   []string
	Empty   bool // by Check: there is no store
	Damaged bool // something that was once on disk is not as it was written
	Lost    bool // by Repair: some of the damaged data could not be saved

	// Err is what all of it comes to: a DamageError of a Check that has found damage, ErrLost of a
	// Repair that could not save everything.
	Err error

	missing bool // a file was missing
	stray   bool // a file may be somebody else's
}

// say adds a line.
func (r *Report) say(format string, args ...any) {
	r.Lines = append(r.Lines, fmt.Sprintf(format, args...))
}

// damage notes err and returns nil if err is damage. It returns other errors.
func (r *Report) damage(err error) error {
	if !errors.As(err, new(*storage.DamageError)) {
		return err
	}

	r.Damaged, r.missing = true, r.missing || errors.Is(err, fs.ErrNotExist)
	r.stray = r.stray || errors.Is(err, ErrStray)
	r.say("DAMAGED %v", err)
	return nil
}

// beside runs read while another process may have the store open. A compaction of that process can
// remove a file before it is open, in etcd also later. So if the result is stale, beside runs read
// again, unless no file was made or removed since the last time.
func beside(dir storage.Directory, read func() (isStale bool)) {
	for before := []string(nil); read(); {
		names, err := dir.List()
		if err != nil || slices.Equal(names, before) {
			return
		}
		before = names
	}
}

// Check reads the whole store in dir and reports what is there and what is wrong. It changes
// nothing, and takes the lock only for moments, to see who holds it. While a process has the store
// open, Check reads what that process has written so far. If a compaction of that process removes
// files, Check begins again.
func Check(dir storage.Directory) (r Report, err error) {
	beside(dir, func() (isStale bool) {
		r, err = check(dir)
		_, inUse := dir.InUse()

		// A process that writes may have made or removed a file meanwhile.
		return errors.Is(err, fs.ErrNotExist) || r.missing && inUse
	})
	if r.Damaged {
		r.Err = &storage.DamageError{File: dir.Path(""), What: "see above"}
	}
	if r.stray {
		r.Err = fmt.Errorf("%w; %w", ErrStray, r.Err) // with its advice
	}
	return r, err
}

// check is Check, once.
func check(dir storage.Directory) (r Report, err error) {
	err = checkNames(dir)
	if err != nil {
		return r, err
	}

	// The reader of the report must know that there may be more by now.
	owner, inUse := dir.InUse()
	if inUse {
		r.say("in use  %s: read beside it, up to what is written by now", owner)
	}

	// If it is not clear which files make the store, nothing can be read.
	s, err := findFiles(dir)
	switch {
	case err != nil:
		return r, r.damage(err)
	case len(s.logs) == 0:
		r.Empty = true
		r.say("no store yet: an empty directory")
		return r, nil
	}

	// Even if one file is bad, the others are read, too.
	m := kvstore.NewMemory()
	defer closeLogs(s.logs)
	for !s.done {
		end, err := s.readFile(applyTo(m))
		path := dir.Path(end.header.name())
		switch {
		case err != nil:
			err = r.damage(err)
			if err != nil {
				return r, err
			}
		case end.tail == torn:
			r.say("torn    %s, %d bytes, then %d of an incomplete commit, as a crash leaves it: the "+
				"next start cuts it", path, end.offset, end.bytes)
		default:
			r.say("ok      %s, %d bytes", path, end.offset)
		}
	}

	for _, name := range s.obsolete {
		r.say("unused  %s, the next start removes it", dir.Path(name))
	}

	// If something is missing, the sums would not be those of the store.
	if !r.Damaged {
		keys, values, bytes := m.Size()
		r.say("holds %d keys, %d values, %d bytes of data", keys, values, bytes)
	}
	return r, nil
}
