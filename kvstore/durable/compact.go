package durable

import (
	"errors"
	"maps"
	"slices"
	"time"

	"kvserver/kvstore"
	"kvserver/kvstore/storage"
)

// errStopped ends a compaction because the store closes.
var errStopped = errors.New("the store closes")

// compact puts a snapshot in the place of all full files, in the background, when they have
// minCompact bytes, and more than waste times those of the live data. It is called when a file has
// become full, or the current one is empty, and the snapshot is what Memory holds then: no file is
// read again, and a bit that has rotted in one goes with it. It always takes the whole prefix of
// the log: a part of it, merged without what came before, would bring deleted keys back (bitcask
// issue 82, badger issue 2143, leveldb issue 184).
func (d *Store) compact() {
	if d.isCompacting() || d.fullBytes < d.minCompact ||
		d.fullBytes <= d.waste*d.liveBytes() || !d.mayCompact() {
		return
	}

	// The snapshot is taken here, by the owner: from now on it stays what it is.
	c, ended := d.newCompaction(), make(chan *compaction, 1)
	d.compacted = ended
	go func() {
		c.run()
		ended <- c
	}()
}

// liveBytes is how many bytes a snapshot of the store would take, about.
func (d *Store) liveBytes() int64 {
	// A key that has a deadline stands there twice.
	keys, values, bytes := d.Size()
	twice := int64(d.Expiring()) * (d.KeyBytes()/int64(max(keys, 1)) + recordExtra)
	return bytes + int64(keys+values)*recordExtra + twice
}

// isWasteful tells whether the log is so much larger than what it holds that the current
// file must not become full before it is compacted, as where nothing but Deletes come.
func (d *Store) isWasteful() bool {
	return !d.isCompacting() &&
		d.fullBytes+d.size > d.waste*d.liveBytes()+d.minCompact+d.segmentSize && d.mayCompact()
}

// mayCompact tells whether a compaction may begin, if none runs: none has failed a short time ago,
// the store does not close, and its directory knows of no lack of room.
func (d *Store) mayCompact() bool {
	select {
	case <-d.stop:
		return false // it would give up at once
	default:
		return !time.Now().Before(d.compactAfter) && d.dir.RoomFor(d.liveBytes(), true) == nil
	}
}

// isCompacting tells whether a compaction runs. If one has ended it takes that into account first.
func (d *Store) isCompacting() bool {
	// Nobody waits for it here, so its end is noticed by whoever asks.
	select {
	case c := <-d.compacted:
		d.noteCompaction(c)
	default:
	}
	return d.compacted != nil
}

// noteCompaction takes the end of a compaction into account. One that failed may have
// left files that are of no use any more: the next one removes them.
func (d *Store) noteCompaction(c *compaction) {
	d.compacted = nil
	d.noteSnapshot(c)

	switch c.err {
	case nil:
		// SPARE follows what the store holds, but not each change of it.
		d.spare.cut(2 * (d.toDelete(0) + int64(d.zerosAhead)))
		d.status.Compactions.Add(1)
		d.log.Info("compacted the log", "freed", c.replaced-c.bytes, "snapshot", c.bytes)
	case errStopped:
	default:
		d.compactAfter = time.Now().Add(compactTime)
		d.log.Error("cannot compact the log, it goes on growing; trying again", "in", compactTime,
			"error", c.err)
	}
}

// noteSnapshot takes the snapshot of a compaction into account. It may be there also where an error
// says that an old file could not be removed.
func (d *Store) noteSnapshot(c *compaction) {
	if !c.isDone() {
		return
	}
	d.snapshot = c.header.number
	d.fullBytes += c.bytes - c.replaced

	// The files that it stands for are ours no more.
	d.known[c.header.name()] = c.written
	own := d.ownFiles()
	maps.DeleteFunc(d.known, func(name string, _ storage.Stamp) bool {
		return !slices.Contains(own, name)
	})
}

// compaction is one that is to run, runs, or has ended. It touches nothing of the Store's, so it
// may run on a goroutine of its own.
type compaction struct {
	dir      storage.Directory
	header   fileHeader       // the snapshot's; it stands for all segments up to its number
	store    kvstore.Snapshot // what these make
	replaced int64            // bytes of the files that it stands for
	stop     <-chan struct{}  // closed when it is to give up; nil: it does not

	// prepare is run when all of the snapshot is on disk, before it gets its name. If it fails
	// there is no snapshot. nil: nothing is to be prepared.
	prepare func() error

	// How it ended.
	bytes   int64         // of the snapshot
	written storage.Stamp // what that is; the zero Stamp: there is none
	err     error
}

// isDone tells whether there is a snapshot.
func (c *compaction) isDone() bool { return c.written.ID != nil }

// newCompaction is one of all full files, at a moment when these make what Memory holds.
func (d *Store) newCompaction() *compaction {
	// The current file begins behind what the snapshot has.
	return &compaction{dir: d.dir, store: d.Snapshot(), replaced: d.fullBytes, stop: d.stop,
		header: fileHeader{kind: kindSnapshot, id: d.id, number: d.number - 1,
			first: d.current.header.first}}
}

// run writes the snapshot, and then removes the files for which it stands: all of lower numbers,
// so that what a failed compaction has left goes, too. A crash leaves the old files, or the
// snapshot and any of the old files.
func (c *compaction) run() {
	c.written, c.err = createLog(c.dir, c.header, c.fill)
	if c.err != nil {
		return
	}

	// Only now: the snapshot has its name on disk.
	names, err := c.dir.List()
	for _, name := range names {
		kind, number, isLog := parseName(name)
		through := c.header.number
		if isLog && (number < through || number == through && kind == kindSegment) {
			err = errors.Join(err, c.dir.Remove(name))
		}
	}

	// Sync: an emptied file that came back after a crash would make the start refuse the store.
	c.err = errors.Join(err, c.dir.Sync())
}

// fill writes the snapshot's frames, and prepares.
func (c *compaction) fill(w *logWriter) error {
	err := writeAll(w, c.store, c.stop)
	c.bytes = w.size
	if err != nil || c.prepare == nil {
		return err
	}

	// What prepare removes may be the only other place where the data is.
	err = w.sync()
	if err != nil {
		return err
	}
	return c.prepare()
}

// writeAll writes what store holds as a snapshot's frames, until stop is closed: each key with all
// its values, or where these are many, with as many as make the key's own length a small part.
func writeAll(w *logWriter, store kvstore.Snapshot, stop <-chan struct{}) error {
	var payload []byte
	f := frame{sequence: 1}

	// A store that closes waits for one frame at most.
	flush := func() error {
		select {
		case <-stop:
			return errStopped
		default:
		}
		err := w.append(f, payload, 0)
		f.sequence++
		f.count, payload = 0, payload[:0]
		return err
	}

	for key, values := range store.All() {
		for len(values) > 0 {
			n := listPart(key, values)
			payload = appendList(payload, key, values[:n])
			f.count++
			values = values[n:]

			// A key's deadline comes last, for a load has to have the key first.
			at, hasDeadline := store.Deadline(key)
			if len(values) == 0 && hasDeadline {
				payload = appendExpire(payload, key, at)
				f.count++
			}

			// One flipped bit costs no more than a frame.
			if len(payload) < maxFrameSnapshot {
				continue
			}
			err := flush()
			if err != nil {
				return err
			}
		}
	}

	// The last frame says that the snapshot is complete.
	if f.count > 0 {
		err := flush()
		if err != nil {
			return err
		}
	}
	f.kind = frameEnd
	return flush()
}

// listPart is how many of values a record of a snapshot has, at most.
func listPart(key string, values []string) int {
	// The key stands in each record, so a long key has large records.
	most := max(maxFrameSnapshot, 8*len(key))

	for i, v := range values {
		most -= len(v) + 1
		if most < 0 {
			return i + 1
		}
	}
	return len(values)
}
