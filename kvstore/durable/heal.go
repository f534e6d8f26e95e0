package durable

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"kvserver/kvstore/storage"
)

// Other processes can remove, empty, replace or add files while the store is open: those that
// clean up what is called .log, that rotate logs, that copy a backup over what runs. All data is
// in memory, so a heal writes it anew.

// ownFiles are the names of the files that make the store now.
func (d *Store) ownFiles() []string {
	return append(layout{snapshot: d.snapshot, last: d.number}.names(), storage.StoreName)
}

// changes are what somebody else has done to the directory.
type changes struct {
	spoiled   []string // files of ours that are gone, or are not what they were
	leftovers []string // log files of no use, and temporary ones: a start may refuse them
	strangers []string // what a start refuses, and is not ours to remove
}

// changed looks what has changed, and takes note of what it sees. It costs a look at each file. An
// error says that nobody can look now.
func (d *Store) changed() (c changes, err error) {
	// The timer does not make the current file longer meanwhile.
	d.writing <- struct{}{}
	stamps, err := d.dir.Stamps()
	isIntact, end := d.current.check() == nil, d.current.fileSize
	<-d.writing
	if err != nil {
		return c, err
	}
	d.checkSpare(stamps)

	own := d.ownFiles()
	for _, name := range own {
		now, isThere := stamps[name]
		isGood := now.IsSame(d.known[name])

		// The current file changes because we write it, so its time says nothing.
		if name == d.current.header.name() {
			isGood = isIntact && now.IsSameFile(d.current.stamp) &&
				(now.Size >= end || !d.current.isWatched)
		}
		if !isThere || !isGood {
			c.spoiled = append(c.spoiled, name)
		}
	}

	// A start takes log files that are none of ours for ours. Temporary ones there are only while a
	// file is made.
	for name := range stamps {
		_, number, isLog := parseName(name)
		switch {
		case slices.Contains(own, name):
		case isTmp(name), isLog && number <= d.number:
			c.leftovers = append(c.leftovers, name)
		case isLog, !isStores(name), name == storage.LockName && d.isStrangeLock():
			c.strangers = append(c.strangers, name)
		}
	}
	slices.Sort(c.leftovers)
	slices.Sort(c.strangers)
	return c, nil
}

// isStrangeLock tells whether LOCK is no file, and cannot be made anew.
func (d *Store) isStrangeLock() bool {
	err := checkFile(d.dir, storage.LockName)
	if err != nil {
		d.lock.Look() // makes it anew
		err = checkFile(d.dir, storage.LockName)
	}
	return err != nil
}

// lookForFiles looks whether somebody has changed the store's files, and mends that: to go on, or
// to end, would lose what was answered. A heal that fails is tried again later; until then writes are
// refused, and what only reads or frees goes on in the file that the store has open. It returns an
// error if the next start would refuse the files as they are.
func (d *Store) lookForFiles(now time.Time) error {
	if now.Before(d.healAfter) {
		return nil
	}

	// One that has ended does not count.
	isCompacting := d.isCompacting()
	c, err := d.changed()
	d.tellOfLooks(err)
	if err != nil {
		return fmt.Errorf("%w: %w", ErrSpoiled, err) // perhaps; at the next look
	}

	// A compaction that runs makes and removes files, too, but neither STORE nor the current one.
	if isCompacting {
		if !slices.Contains(c.spoiled, storage.StoreName) &&
			!slices.Contains(c.spoiled, d.current.header.name()) {
			return nil
		}
		d.healing.Store(true) // a stop waits for this, too
		d.AwaitCompaction()
		d.healing.Store(false)
		return d.lookForFiles(now)
	}

	if len(c.spoiled)+len(c.leftovers) > 0 {
		// If another process has the directory now, the files are that one's.
		err = d.lock.Look()
		if errors.Is(err, storage.ErrMoved) {
			return d.fail(err)
		}
		if err != nil {
			return err // at the next look
		}

		c, err = d.mend(c)
		if err != nil {
			// Soon, and then less often, for everybody waits for each try.
			d.healWait = min(max(2*d.healWait, lookTime, time.Since(now)), compactTime)
			d.healAfter = time.Now().Add(d.healWait)
			d.noHeal = fmt.Errorf("%w: %w", ErrSpoiled, err)
			d.log.Error("cannot write the data anew, so the server's end would lose it: writes are "+
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

// tellOfOthers tells the log of files with which the next start is refused: strangers are not ours to
// remove, and leftovers could not be. A line for each change, not one for each look.
func (d *Store) tellOfOthers(others []string) error {
	if len(others) > 0 && !slices.Equal(others, d.toldOthers) {
		d.log.Error("files that are none of this store's were put into its directory: take them away, "+
			"or the next start is refused", "files", others, "dir", d.dir.Path(""))
	}
	d.toldOthers = others
	if len(others) > 0 {
		return fmt.Errorf("the next start is refused before these are taken out of %s: %s",
			d.dir.Path(""), strings.Join(others, ", "))
	}
	return nil
}

// tellOfLooks tells the log where nobody can look at the files any more, and where that is over.
func (d *Store) tellOfLooks(err error) {
	switch isBlind := err != nil; {
	case isBlind && !d.isBlind:
		d.log.Error("cannot look whether somebody has changed the files; trying again", "error", err)
	case !isBlind && d.isBlind:
		d.log.Info("can look at the files again")
	}
	d.isBlind = err != nil
}

// lastLook is lookForFiles where there is no later try: at the end, after which nobody has the data
// in memory, and when the lock says that files are gone, for before they are back nothing may be
// answered.
func (d *Store) lastLook() error {
	d.healAfter = time.Time{}
	d.lock.Look() // which tells the directory to look, too
	return d.lookForFiles(time.Now())
}

// mend brings the files back to what they should be, looks whether they are, and returns what is
// left.
func (d *Store) mend(c changes) (left changes, err error) {
	isNew := func(name string) bool { return !slices.Contains(d.toldOthers, name) }
	switch {
	case len(c.spoiled) > 0:
		d.log.Error("files were removed or changed while the server uses them; all data is "+
			"written anew from memory", "files", c.spoiled, "dir", d.dir.Path(""))
	case slices.ContainsFunc(c.leftovers, isNew):
		d.log.Error("files that are of no use any more are in the directory, as a copy that is "+
			"put over it leaves them; they are removed", "files", c.leftovers, "dir", d.dir.Path(""))
	}

	// Temporary files first: they may have the names of files that are to be made. A log file may be
	// one of ours with another name, and the only place of its data until the snapshot is there.
	for _, name := range c.leftovers {
		if len(c.spoiled) == 0 || isTmp(name) {
			d.dir.Remove(name) // if it stays, that is told of
		}
	}
	if len(c.spoiled) > 0 {
		err = d.heal(slices.Concat(c.spoiled, c.leftovers))
		if err != nil {
			return c, err
		}
	}
	err = d.dir.Sync() // or a power failure brings them back
	if err != nil {
		return c, err
	}

	// Whoever changed the files may do so still.
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

// heal writes all data anew, as a rotation and a compaction do: it goes on in a new file, and then
// puts a snapshot in the place of all files before that. Where it stops nothing has to be undone.
// The order is: sync the temporary snapshot, remove the spoiled files, rename the snapshot. Below a
// snapshot a start accepts only full files. After a crash before the rename a start may refuse what
// it finds.
func (d *Store) heal(spoiled []string) error {
	d.healing.Store(true)
	defer d.healing.Store(false)

	// A snapshot stands for full files, so the current one has to become full.
	isNew, err := d.rotate()
	if err != nil {
		return err
	}
	if !isNew {
		return errors.New("no new file can be made")
	}

	// It is not stopped while the store closes, for nobody else has the data.
	c := d.newCompaction()
	c.stop = nil
	c.prepare = func() error { return d.clearAway(spoiled) }

	c.run()
	d.noteSnapshot(c)
	if !c.isDone() {
		return c.err
	}
	return nil // what could not be removed is tried again, and told of
}

// clearAway removes spoiled files, and writes STORE anew if it is one of them, unless the directory is
// another process's by now: the snapshot took its time.
func (d *Store) clearAway(spoiled []string) error {
	err := d.lock.Look()
	if err != nil {
		return err
	}

	// A part of them may be gone already.
	for _, name := range spoiled {
		if !isTmp(name) {
			d.dir.Remove(name)
		}
	}

	// STORE is on disk before the snapshot has its name, for with that the store is whole.
	if slices.Contains(spoiled, storage.StoreName) {
		stamp, err := writeID(d.dir, d.id)
		if err != nil {
			return err
		}
		d.known[storage.StoreName] = stamp
	}
	return nil
}
