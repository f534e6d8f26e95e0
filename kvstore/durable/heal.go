package durable

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"kvserver/kvstore/storage"
)

// Other processes can remove, empty, replace or add files while the store is open: programs that
// clean up or rotate files called .log, or people who copy a backup over a running store. All data
// is in memory, so a heal writes it again.

// ownFiles returns the names of the files that make the store now.
func (d *Store) ownFiles() []string {
	return append(layout{snapshot: d.snapshot, last: d.number()}.names(), storage.StoreName)
}

// changes are what somebody else has done to the directory.
type changes struct {
	spoiled   []string // files of ours that are gone, or are not as we left them
	leftovers []string // useless log files, and temporary ones: a start may refuse them
	strangers []string // files that a start refuses, and that are not ours to remove
}

// changed finds out what has changed, and notes the state of SPARE. It costs a stat of each file.
// An error means that the files cannot be checked now.
func (d *Store) changed() (c changes, err error) {
	// Meanwhile the timer must not write to the current file.
	d.writing <- struct{}{}
	stamps, err := d.dir.Stamps()
	checkErr := d.current.check()
	isSpoiled := d.current.isSpoiled
	<-d.writing
	if !isSpoiled {
		err = cmp.Or(err, checkErr) // it cannot be read
	}
	if err != nil {
		return c, err
	}
	d.checkSpare(stamps)

	own := d.ownFiles()
	for _, name := range own {
		now, isThere := stamps[name]
		isGood := now.IsSame(d.stamps[name])

		// We change the current file ourselves, so its time says nothing.
		if name == d.current.header.name() {
			isGood = !isSpoiled && now.IsSameFile(d.current.stamp)
		}
		if !isThere || !isGood {
			c.spoiled = append(c.spoiled, name)
		}
	}

	// A start would take other log files for ours. Temporary files exist only while a file is made.
	for name := range stamps {
		kind, number := parseName(name)
		switch {
		case slices.Contains(own, name):
		case kind == kindTmp, kind.isLog() && number <= d.number():
			c.leftovers = append(c.leftovers, name)
		case kind.isLog(), kind == kindStrange,
			name == storage.LockName && d.isStrangeLock():
			c.strangers = append(c.strangers, name)
		}
	}
	slices.Sort(c.leftovers)
	slices.Sort(c.strangers)
	return c, nil
}

// isStrangeLock reports whether LOCK is no regular file, and cannot be made again.
func (d *Store) isStrangeLock() bool {
	err := checkFile(d.dir, storage.LockName)
	if err != nil {
		d.lock.Verify() // makes it again if it can
		err = checkFile(d.dir, storage.LockName)
	}
	return err != nil
}

// lookForFiles checks whether somebody has changed the store's files, and mends them: otherwise
// answered writes would be lost when the server ends. A heal that fails is tried again later. Until
// then writes are refused, while requests that read or free room go on in the file that the store
// has open. lookForFiles returns an error if the next start would refuse the files as they are, or
// if it could not look. While a compaction runs, changes of older files are not seen.
func (d *Store) lookForFiles() error {
	// A compaction that has ended does not count.
	began, isCompacting := time.Now(), d.isCompacting()
	c, err := d.changed()
	d.tellOfLooks(err)
	if err != nil {
		return fmt.Errorf("%w: %w", ErrSpoiled, err) // they may be; the next check will tell
	}

	// A running compaction makes and removes files, too, but never STORE or the current file.
	if isCompacting {
		if !slices.Contains(c.spoiled, storage.StoreName) &&
			!slices.Contains(c.spoiled, d.current.header.name()) {
			return nil
		}
		d.healing.Store(true) // so that a stop waits for this, too
		d.AwaitCompaction()
		d.healing.Store(false)
		return d.lookForFiles() // no compaction runs now, so all files count
	}

	// After a try that failed, what it has removed may not be on disk yet.
	if len(c.spoiled)+len(c.leftovers) > 0 || d.noHeal != nil {
		// If another process has the directory now, the files belong to that one.
		err = d.lock.Verify()
		if errors.Is(err, storage.ErrMoved) {
			return d.fail(err)
		}
		if err != nil {
			return err // the next check tries again
		}

		c, err = d.mend(c)
		if err != nil {
			// The next try comes soon, later ones less often, because everybody waits for each.
			d.healWait = min(max(2*d.healWait, lookTime, time.Since(began)), retryTime)
			d.lookAfter = time.Now().Add(d.healWait)
			d.noHeal = fmt.Errorf("%w: %w", ErrSpoiled, err)
			d.log.Error("cannot write the data again, so the server's end would lose it: writes are "+
				"refused; save it with kvserver -c Dump; trying again", "in", d.healWait, "error", err)
			return d.noHeal
		}
	}
	if d.noHeal != nil {
		d.log.Info("the files are whole again: writes are taken", "dir", d.dir.Path(""))
	}
	d.healWait, d.noHeal = 0, nil
	return d.tellOfOthers(slices.Concat(c.strangers, c.leftovers))
}

// tellOfOthers logs files for which the next start is refused: strangers, which are not ours to
// remove, and leftovers that could not be removed. It logs a line for each change, not for each
// check.
func (d *Store) tellOfOthers(others []string) error {
	isTold := slices.Equal(others, d.toldOthers)
	d.toldOthers = others
	if len(others) == 0 {
		return nil
	}
	if !isTold {
		d.log.Error("files that do not belong to this store are in its directory: remove them, "+
			"or the next start is refused", "files", others, "dir", d.dir.Path(""))
	}

	paths := make([]string, len(others))
	for i, name := range others {
		paths[i] = d.dir.Path(name)
	}
	return fmt.Errorf("%w: %s", ErrOthers, strings.Join(paths, ", "))
}

// tellOfLooks logs when the files cannot be checked any more, and when that is over.
func (d *Store) tellOfLooks(err error) {
	switch isBlind := err != nil; {
	case isBlind && !d.isBlind:
		d.log.Error("cannot look whether somebody has changed the files; trying again", "error", err)
	case !isBlind && d.isBlind:
		d.log.Info("can look at the files again")
	}
	d.isBlind = err != nil
}

// lastLook is lookForFiles when there is no later try: at the end, after which nobody has the data
// in memory, and when the lock says that files are gone, because nothing may be answered before
// they are back.
func (d *Store) lastLook() error {
	d.lock.Verify() // in etcd this makes the directory check its files, too
	return d.lookForFiles()
}

// fullLook is lastLook after it has read the current file: all other looks read only the beginning
// and the end of that file. It takes as long as a start takes for one segment. A change in the
// middle that comes later, while Close writes its last frame, is not seen.
func (d *Store) fullLook() error {
	readErr := d.readBack()
	err := d.lastLook() // in any case, because other files may have to be written again
	if readErr != nil {
		return fmt.Errorf("%w: %w", ErrSpoiled, errors.Join(readErr, err))
	}
	return err
}

// readBack reads the current file, if it is on a disk, as a start does, and notes whether its
// frames are still as they were written, so that the next look heals it if not. An error means that
// it cannot be read. On a slow disk, or if no new file could be made for long, it reads for
// readTime only: a stop that takes longer is broken off.
func (d *Store) readBack() error {
	// Meanwhile the timer must not write.
	d.writing <- struct{}{}
	defer func() { <-d.writing }()
	w := d.current
	if !w.isShared {
		return nil
	}

	// Each frame has a checksum, and the sequence that follows the one before.
	l := &logReader{dir: d.dir, name: w.header.name(), path: w.path, f: lentFile{w.f}, size: w.size,
		limit: w.size}
	l.beginAfter(w.header)
	began, errSlow := time.Now(), errors.New("the disk is slow")
	end, err := l.scan(func(*logReader, frame, []byte) error {
		if time.Since(began) > readTime {
			return errSlow
		}
		return nil
	})
	switch {
	case err == errSlow:
		d.log.Warn("no time to read all of the current file again, so a change in it may be unseen",
			"file", w.path, "bytes", w.size, "read", l.offset)
		return nil
	case err != nil:
		return w.named("read", err)
	}
	w.isSpoiled = w.isSpoiled || end.offset != w.size
	return nil
}

// lentFile is a file that its reader does not close.
type lentFile struct{ storage.File }

func (lentFile) Close() error { return nil }

// mend brings the files back to what they should be, checks them again, and returns what is still
// wrong.
func (d *Store) mend(c changes) (left changes, err error) {
	isNew := func(name string) bool { return !slices.Contains(d.toldOthers, name) }
	switch {
	case len(c.spoiled) > 0:
		d.log.Error("files were removed or changed while the server uses them; all data is "+
			"written again from memory", "files", c.spoiled, "dir", d.dir.Path(""))
	case slices.ContainsFunc(c.leftovers, isNew):
		d.log.Error("files that are of no use any more are in the directory, as a copy that is "+
			"put over it leaves them; they are removed", "files", c.leftovers, "dir", d.dir.Path(""))
	}

	// Temporary files go first: heal may need their names. But with spoiled files a leftover log
	// file stays until the snapshot is there: it may be one of ours, renamed, with the only copy of
	// data.
	for _, name := range c.leftovers {
		kind, _ := parseName(name)
		if len(c.spoiled) == 0 || kind == kindTmp {
			d.dir.Remove(name) // if it stays, tellOfOthers says so
		}
	}
	if len(c.spoiled) > 0 {
		d.healing.Store(true)
		defer d.healing.Store(false)
		err = d.heal(slices.Concat(c.spoiled, c.leftovers))
		if err != nil {
			return c, err
		}
	}
	err = d.dir.Sync() // otherwise a power failure could bring them back
	if err != nil {
		return c, err
	}

	// Whoever changed the files may still be doing so.
	left, err = d.changed()
	switch {
	case err != nil:
		return left, err
	case len(left.spoiled) > 0:
		return left, fmt.Errorf("%s is changed by somebody again and again",
			d.dir.Path(left.spoiled[0]))
	case len(c.spoiled) > 0:
		d.log.Info("all data is on disk again", "bytes", d.fullBytes)
	}
	return left, nil
}

// heal writes all data again with a rotation and a compaction: it goes on in a new file, and a
// snapshot replaces all files before that one. If it fails, it can be tried again. The order is:
// sync the temporary snapshot, remove the spoiled files, rename the snapshot. The spoiled files go
// before the rename because below a snapshot a start accepts only full files. After a crash
// before the rename, a start may refuse what it finds.
func (d *Store) heal(spoiled []string) error {
	// A snapshot replaces only full files, so the current one must become full.
	isNew, err := d.rotate()
	if !isNew {
		return cmp.Or(err, errors.New("no new file can be made"))
	}

	// Close must not stop it, because the data is nowhere else.
	c := d.newCompaction()
	c.stop = nil
	c.prepare = func() error { return d.clearAway(spoiled) }

	c.run()
	d.noteSnapshot(c)
	if !c.isDone() {
		return c.err
	}
	return nil // files that could not be removed are leftovers at the next check
}

// clearAway writes STORE again if it is spoiled, and removes the other spoiled files. It does
// nothing if another process has the directory by now, because writing the snapshot may have taken
// long.
func (d *Store) clearAway(spoiled []string) error {
	err := d.lock.Verify()
	if err != nil {
		return err
	}

	// STORE comes first, so that nothing else has gone if it cannot be written.
	if slices.Contains(spoiled, storage.StoreName) {
		d.dir.Remove(storage.StoreName) // it may be no file
		stamp, err := writeID(d.dir, d.current.header.id)
		if err != nil {
			return err
		}
		d.stamps[storage.StoreName] = stamp
	}

	// Errors do not matter: some may be gone already.
	for _, name := range spoiled {
		kind, _ := parseName(name)
		if kind != kindTmp && kind != kindStore {
			d.dir.Remove(name)
		}
	}
	return nil
}
