package durable

import (
	"errors"
	"fmt"
	"io/fs"
	"slices"

	"kvserver/kvstore"
	"kvserver/kvstore/storage"
)

// Report is what Check, Repair or Backup has to say, a line for each thing.
type Report struct {
	Lines   []string
	Empty   bool // by Check: there is no store
	Damaged bool // something that was on disk is not as it was
	Lost    bool // by Repair: some of that could not be saved

	missing bool // a file was not there
}

// say adds a line.
func (r *Report) say(format string, args ...any) {
	r.Lines = append(r.Lines, fmt.Sprintf(format, args...))
}

// damage takes note of err if it is damage, and returns nil; other errors are the caller's.
func (r *Report) damage(err error) error {
	if !errors.As(err, new(*storage.DamageError)) {
		return err
	}

	r.Damaged, r.missing = true, r.missing || errors.Is(err, fs.ErrNotExist)
	r.say("DAMAGED %v", err)
	return nil
}

// beside has read done beside a process that may have the store open: a compaction of that one can
// take a file away before it is open, or in etcd also later. So what is stale is read again, unless
// nobody has made or removed a file since it was last read.
func beside(dir storage.Directory, read func() (isStale bool)) {
	for before := []string(nil); read(); {
		names, err := dir.List()
		if err != nil || slices.Equal(names, before) {
			return
		}
		before = names
	}
}

// Check reads the whole store in dir and says what is there and what is wrong. It changes
// nothing, and takes no lock but to see who has it: beside a process that has the store open it
// reads what that has written so far. A compaction of that process may take files away: then Check
// begins again.
func Check(dir storage.Directory) (r Report, err error) {
	beside(dir, func() (isStale bool) {
		r, err = check(dir)
		_, inUse := dir.InUse()

		// Beside a process that writes, a file may have been made or removed meanwhile.
		return errors.Is(err, fs.ErrNotExist) || r.missing && inUse
	})
	return r, err
}

// check is Check, once.
func check(dir storage.Directory) (r Report, err error) {
	err = checkNames(dir)
	if err != nil {
		return r, err
	}

	// Whoever reads this has to know that there may be more by now.
	owner, inUse := dir.InUse()
	if inUse {
		r.say("in use  %s: read beside it, up to what is written by now", owner)
	}

	// Where it is not clear which files are the store, there is nothing to read.
	s, err := findFiles(dir)
	switch {
	case err != nil:
		return r, r.damage(err)
	case len(s.logs) == 0:
		r.Empty = true
		r.say("%v", ErrNoStore)
		return r, nil
	}

	// Whatever is wrong with one file, the others are read, too.
	m := kvstore.NewMemory()
	defer closeLogs(s.logs)
	for !s.done {
		end, err := s.read(applyTo(m))
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

	// Where something is missing, what was read is not what the store held.
	if !r.Damaged {
		keys, values, bytes := m.Size()
		r.say("holds %d keys, %d values, %d bytes of data", keys, values, bytes)
	}
	return r, nil
}
