package durable

import (
	"errors"
	"fmt"
	"io/fs"
	"kvserver/kvstore/storage"
	"path/filepath"
	"slices"
	"time"
)

// lookForFiles looks whether somebody has removed or replaced a file of the store, as those do
// who clean up what is called .log, and if so has all of them written anew: to go on, or to end,
// would lose what was answered, and all of it is in memory. A heal that fails is tried again
// later; until then the store goes on in the file that it has open. (Nobody does that in etcd.)
func (d *Store) lookForFiles(now time.Time) error {
	d.isCompacting() // one that has ended does not count
	if d.reserve == 0 || d.compacted != nil || now.Before(d.healAfter) {
		return nil // a compaction that runs removes files, too
	}
	missing, err := d.missing()
	if missing == "" || err != nil {
		return nil // who knows: at the next look
	}
	if err := d.lookAtLock(); errors.Is(err, storage.ErrMoved) { // they are another process's
		return d.fail(err)
	} else if err != nil {
		return nil
	}
	d.log.Error("a file was removed while the server uses it; all data is written anew from memory",
		"missing", d.dir.Path(missing))
	if err := d.heal(); err != nil {
		d.healAfter = now.Add(compactTime)
		d.log.Error("cannot write the data anew, so the server's end would lose it: save it with "+
			"kvserver -c Dump; trying again", "in", compactTime, "error", err)
		return d.failure()
	}
	d.log.Info("all data is on disk again", "bytes", d.fullBytes)
	return nil
}

// lastLook is lookForFiles at the end, after which nobody has the data in memory: that it
// cannot be written anew is an error.
func (d *Store) lastLook() error {
	if d.reserve == 0 {
		return nil
	}
	d.healAfter = time.Time{}
	if err := d.lookForFiles(time.Now()); err != nil {
		return err
	}
	missing, err := d.missing()
	if err == nil && missing != "" {
		err = fmt.Errorf("%s was removed, and could not be written anew", d.dir.Path(missing))
	}
	return err
}

// lookAtLock tells whether the lock is ours now, where one can look.
func (d *Store) lookAtLock() error {
	if lock, ok := d.lock.(interface{ Look() error }); ok {
		return lock.Look()
	}
	return nil
}

// missing is the name of a file that is not where it was, or is another one: "" if there is
// none.
func (d *Store) missing() (name string, err error) {
	names, err := d.dir.List()
	if err != nil {
		return "", err
	}
	var gap *storage.DamageError
	current := logName(kindSegment, d.number)
	switch _, err := layoutOf(d.dir, names); {
	case !slices.Contains(names, storeName):
		return storeName, nil
	case errors.As(err, &gap):
		return filepath.Base(gap.File), nil
	case !slices.Contains(names, current):
		return current, nil
	}
	dir, ok := d.dir.(interface {
		IsOther(storage.File, string) bool
	})
	if ok && dir.IsOther(d.current.f, current) {
		return current, nil
	}
	return "", nil
}

// heal writes what the store holds as a snapshot, and goes on in a new segment behind it.
// The order is Repair's: the snapshot's name makes it the store, at once.
func (d *Store) heal() error {
	d.writing <- struct{}{}
	defer func() { <-d.writing }()
	d.fsyncs <- struct{}{}
	defer func() { <-d.fsyncs }()
	defer d.syncing.Store(nil)
	d.healing.Store(true)
	defer d.healing.Store(false)
	snapshot, first := logName(kindSnapshot, d.number+1), d.sequence+2
	path := d.dir.Path(snapshot)
	d.syncing.Store(&path)
	segment := fileHeader{kind: kindSegment, id: d.id, number: d.number + 2, first: first}
	// A rotation that failed may have left this; below the snapshot it would be no full file.
	err := d.dir.Remove(logName(kindSegment, d.number+1))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	w, err := d.newSegment(segment)
	if err != nil { // perhaps only the directory's Sync has failed, and its name is there
		if d.dir.Remove(logName(kindSegment, segment.number)) == nil {
			d.dir.Sync()
		}
		return err
	}
	var size int64
	if err = writeID(d.dir, d.id); err == nil {
		h := fileHeader{kind: kindSnapshot, id: d.id, number: d.number + 1, first: first}
		size, err = createLog(d.dir, snapshot, h, func(w *logWriter) error {
			if err := writeAll(w, d.Snapshot(), nil); err != nil {
				return err
			}
			return d.lookAtLock() // that took its time
		})
	}
	if err != nil {
		err = errors.Join(err, w.f.Close(), d.dir.Remove(logName(kindSegment, segment.number)))
		// Beside the snapshot the file that is open would count no more.
		undo := d.dir.Remove(snapshot)
		if errors.Is(undo, fs.ErrNotExist) {
			undo = nil
		}
		if undo = errors.Join(undo, d.dir.Sync()); undo != nil {
			d.fail(errors.Join(err, undo))
		}
		return err
	}
	// With this the old file is full, and may stay where it cannot be removed.
	if d.current.append(frame{sequence: first - 1, synced: d.synced, kind: frameNext}, nil, 0) == nil {
		d.current.sync()
	}
	d.current.f.Close()
	d.removeUpTo(d.number)
	d.mu.Lock()
	d.current, d.number = w, segment.number
	d.sequence, d.synced, d.vouched = first-1, first-1, true
	d.mu.Unlock()
	d.size, d.room, d.first, d.fullBytes = w.size, w.room(), first, size
	return nil
}

// removeUpTo removes the log files up to a number. What cannot be removed, the next
// compaction will try again.
func (d *Store) removeUpTo(last uint64) {
	names, _ := d.dir.List()
	for _, name := range names {
		if _, number, ok := parseName(name); ok && number <= last {
			d.dir.Remove(name)
		}
	}
	d.dir.Sync()
}
