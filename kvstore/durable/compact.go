package durable

import (
	"errors"
	"time"

	"kvserver/kvstore"
	"kvserver/kvstore/storage"
)

// compactionEnd is how a compaction ended.
type compactionEnd struct {
	through uint64 // the last segment that the snapshot stands for
	bytes   int64  // of the snapshot; 0: there is none
	freed   int64  // of the files that it stands for
	err     error

	// What the snapshot was when it had its name. The zero Stamp: nobody could look.
	written storage.Stamp
}

// errStopped ends a compaction because the store closes.
var errStopped = errors.New("the store closes")

// compact puts a snapshot in the place of all full files, in the background, when they have
// minCompact bytes, and more than waste times those of the live data. It is called when a file has
// become full, or the current one is empty, and the snapshot is what Memory holds then: no file is
// read again, and a bit that has rotted in one goes with it. It always takes the whole prefix of
// the log: a part of it, merged without what came before, would bring deleted keys back (bitcask
// issue 82, badger issue 2143, leveldb issue 184).
func (d *Store) compact() {
	if d.isCompacting() || d.fullBytes < d.minCompact || d.fullBytes <= d.waste*d.liveBytes() ||
		d.dir.RoomFor(d.liveBytes(), true) != nil {
		return
	}

	// The snapshot is taken here, by the owner: from now on it stays what it is.
	d.compacted = make(chan compactionEnd, 1)
	go d.newCompaction().runAside(d.compacted, d.fullBytes)
}

// liveBytes is how many bytes a snapshot of the store would take, about.
func (d *Store) liveBytes() int64 {
	// A key that has a deadline stands there twice.
	keys, values, bytes := d.Size()
	twice := int64(d.Expiring()) * (d.KeyBytes()/int64(max(keys, 1)) + recordExtra)
	return bytes + int64(keys+values)*recordExtra + twice
}

// newCompaction is one of all full files, at a moment when these make what Memory holds.
func (d *Store) newCompaction() *compaction {
	// The current file begins behind what the snapshot has.
	through := d.number - 1
	return &compaction{dir: d.dir, through: through, store: d.Snapshot(), stop: d.stop,
		header: fileHeader{kind: kindSnapshot, id: d.id, number: through, first: d.first}}
}

// isWasteful tells whether the log is so much larger than what it holds that the current
// file must not become full before it is compacted, as where nothing but Deletes come.
func (d *Store) isWasteful() bool {
	if d.fullBytes+d.size <= d.waste*d.liveBytes()+d.minCompact+d.segmentSize || d.isCompacting() ||
		d.dir.RoomFor(d.liveBytes(), true) != nil {
		return false
	}

	select {
	case <-d.stop: // a compaction would give up at once
		return false
	default:
		return true
	}
}

// isCompacting tells whether a compaction runs, or has failed a short time ago. If one has
// ended it takes that into account first.
func (d *Store) isCompacting() bool {
	// Nobody waits for it here, so its end is noticed by whoever asks.
	select {
	case c := <-d.compacted:
		d.noteCompaction(c)
	default:
	}
	return d.compacted != nil || time.Now().Before(d.compactAfter)
}

// noteCompaction takes the end of a compaction into account. One that failed may have
// left files that are of no use any more: the next one removes them.
func (d *Store) noteCompaction(c compactionEnd) {
	d.compacted = nil

	// The snapshot may be there also where an error says that an old file could not be removed.
	if c.bytes > 0 {
		d.snapshot = c.through
		d.fullBytes += c.bytes - c.freed
		d.learn(logName(kindSnapshot, c.through))

		// It may have been changed since then.
		if c.written.ID != nil {
			d.known[logName(kindSnapshot, c.through)] = c.written
		}
	}

	switch c.err {
	case nil:
		// SPARE follows what the store holds, but not each change of it.
		most := 2 * (d.toDelete(0) + int64(d.zerosAhead))
		if d.spare.size > most {
			d.spare.shrink(most)
		}
		d.status.Compactions.Add(1)
		d.log.Info("compacted the log", "freed", c.freed-c.bytes, "snapshot", c.bytes)
	case errStopped:
	default:
		d.compactAfter = time.Now().Add(compactTime)
		d.log.Error("cannot compact the log, it goes on growing; trying again", "in", compactTime,
			"error", c.err)
	}
}

// compaction is one that is to run, or runs. It touches nothing of the Store's, so it may run on a
// goroutine of its own.
type compaction struct {
	dir     storage.Directory
	header  fileHeader
	through uint64           // the last segment that the snapshot stands for
	store   kvstore.Snapshot // what all segments through that one make
	stop    <-chan struct{}  // closed when it is to give up; nil: it does not

	// prepare is run when all of the snapshot is on disk, before it gets its name. If it fails
	// there is no snapshot. nil: nothing is to be prepared.
	prepare func() error

	written storage.Stamp // of the snapshot, once run has written it
}

// runAside runs the compaction and sends its end, with the bytes of the files that it is about. It
// is the compaction's goroutine; ended has a slot for what it sends.
func (c *compaction) runAside(ended chan<- compactionEnd, freed int64) {
	bytes, err := c.run()
	ended <- compactionEnd{c.through, bytes, freed, err, c.written}
}

// run writes the snapshot, and then removes the files for which it stands: all of lower numbers,
// so that what a failed compaction has left goes, too. It returns the snapshot's size, 0 if there
// is none. A crash leaves the old files, or the snapshot and any of the old files.
func (c *compaction) run() (size int64, err error) {
	size, err = createLog(c.dir, c.header, c.fill)
	if err != nil {
		return 0, err
	}

	// From here on a change to it is somebody else's.
	stamps, _ := c.dir.Stamps()
	c.written = stamps[logName(kindSnapshot, c.through)]

	// Only now: the snapshot has its name on disk.
	names, err := c.dir.List()
	for _, name := range names {
		kind, number, isLog := parseName(name)
		if isLog && (number < c.through || number == c.through && kind == kindSegment) {
			err = errors.Join(err, c.dir.Remove(name))
		}
	}

	// One that somebody has emptied must not come back: below a snapshot a start wants full files.
	return size, errors.Join(err, c.dir.Sync())
}

// fill writes the snapshot's frames, and prepares.
func (c *compaction) fill(w *logWriter) error {
	err := writeAll(w, c.store, c.stop)
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
