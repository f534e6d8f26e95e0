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

// compact starts a compaction in the background, if the full files and the snapshot have at least
// minCompact bytes, and more than maxWaste times those of the live data: a new one then replaces
// all of these. compact is called when a file has become full, or while the current one is empty,
// and the new snapshot is what Memory holds then. So no file is read again, and a rotten bit goes
// with its file. A compaction always replaces the whole beginning of the log: a part of it, merged
// without what came before, would bring deleted keys back (bitcask issue 82, badger issue 2143,
// leveldb issue 184).
func (d *Store) compact() {
	if d.isCompacting() || d.fullBytes < d.minCompact ||
		d.fullBytes <= maxWaste*d.liveBytes() || !d.mayCompact() {
		return
	}

	// The owner takes the snapshot here, before it changes anything else.
	c, ended := d.newCompaction(), make(chan *compaction, 1)
	d.compacted = ended
	go func() {
		c.run()
		ended <- c
	}()
}

// compactNow is a compaction for which everybody waits.
func (d *Store) compactNow() error {
	c := d.newCompaction()
	c.run()
	d.noteCompaction(c)
	return c.err
}

// liveBytes returns roughly how many bytes a snapshot of the store would take.
func (d *Store) liveBytes() int64 {
	// A snapshot has a key with a deadline twice.
	keys, values, bytes := d.Size()
	twice := int64(d.Expiring()) * (d.KeyBytes()/int64(max(keys, 1)) + recordExtra)
	return bytes + int64(keys+values)*recordExtra + twice
}

// isWasteful reports whether the log is so much larger than the data that a compaction must
// not wait until the current file is full, as when only Deletes come.
func (d *Store) isWasteful() bool {
	return !d.isCompacting() &&
		d.fullBytes+d.size > maxWaste*d.liveBytes()+d.minCompact+d.segmentSize && d.mayCompact()
}

// mayCompact reports whether a compaction may begin, if none runs: none has failed a short time
// ago, the store does not close, and its directory knows of no lack of room. A compaction leaves
// room for Deletes, too, because the directory may learn only later what was freed.
func (d *Store) mayCompact() bool {
	select {
	case <-d.stop:
		return false // a compaction would give up at once
	default:
		return !time.Now().Before(d.compactAfter) &&
			d.dir.RoomFor(d.liveBytes(), d.toDelete(0), true) == nil
	}
}

// isCompacting reports whether a compaction runs. If one has ended, it notes its result first.
func (d *Store) isCompacting() bool {
	// Usually nobody waits for a compaction, so its end is noticed here.
	select {
	case c := <-d.compacted:
		d.noteCompaction(c)
	default:
	}
	return d.compacted != nil
}

// noteCompaction notes the result of a compaction. One that failed may have left useless files,
// which the next check of the files removes (mend), or the next compaction.
func (d *Store) noteCompaction(c *compaction) {
	d.compacted = nil
	d.noteSnapshot(c)

	switch c.err {
	case nil:
		// SPARE follows the size of the data, but not every change of it.
		d.spare.cut(2 * (d.toDelete(0) + int64(d.zerosAhead)))
		d.status.Compactions.Add(1)
		d.log.Info("compacted the log", "freed", c.replaced-c.bytes, "snapshot", c.bytes)
	case errStopped:
	default:
		d.compactAfter = time.Now().Add(retryTime)
		d.log.Error("cannot compact the log, it goes on growing; trying again", "in", retryTime,
			"error", c.err)
	}
}

// noteSnapshot notes the snapshot of a compaction. There may be one even after an error, if only an
// old file could not be removed.
func (d *Store) noteSnapshot(c *compaction) {
	if !c.isDone() {
		return
	}
	d.snapshot = c.header.number
	d.fullBytes += c.bytes - c.replaced
	d.noDelete, d.noRemove = refusal{}, refusal{} // the disk has more room now

	// The files that it replaces are not ours any more.
	d.stamps[c.header.name()] = c.written
	own := d.ownFiles()
	maps.DeleteFunc(d.stamps, func(name string, _ storage.Stamp) bool {
		return !slices.Contains(own, name)
	})
}

// compaction is a compaction before, while and after it runs. It shares nothing with the Store
// except the directory, so it may run on a goroutine of its own.
type compaction struct {
	dir      storage.Directory
	header   fileHeader       // of the snapshot, which replaces all segments up to its number
	store    kvstore.Snapshot // what these segments make
	replaced int64            // bytes of the files that the snapshot replaces
	stop     <-chan struct{}  // closed when the compaction is to give up; nil: it never does
	prepare  func() error     // of the snapshot's logWriter

	// How it ended.
	bytes   int64         // of the snapshot
	written storage.Stamp // the snapshot's; the zero Stamp: there is none
	err     error
}

// isDone reports whether there is a snapshot.
func (c *compaction) isDone() bool { return c.written.ID != nil }

// newCompaction returns a compaction of all full files. The current file must be empty: then the
// full ones make what Memory holds.
func (d *Store) newCompaction() *compaction {
	// The current file begins with the first frame after the snapshot.
	h := d.current.header
	return &compaction{dir: d.dir, store: d.Snapshot(), replaced: d.fullBytes, stop: d.stop,
		header: fileHeader{kind: kindSnapshot, id: h.id, number: h.number - 1, first: h.first}}
}

// run writes the snapshot, and then removes the files that it replaces: all of lower numbers, so
// that files which a failed compaction has left go, too. A crash leaves the old files, or the
// snapshot and any of the old files.
func (c *compaction) run() {
	c.written, c.err = createLog(c.dir, c.header, func(w *logWriter) error {
		w.prepare = c.prepare
		err := writeAll(w, c.store, c.stop)
		c.bytes = w.size
		return err
	})
	if c.err != nil {
		return
	}

	// Only now, because the snapshot has its name on disk.
	names, err := c.dir.List()
	for _, name := range names {
		kind, number := parseName(name)
		through := c.header.number
		if kind.isLog() && number < through || kind == kindSegment && number == through {
			err = errors.Join(err, c.dir.Remove(name))
		}
	}

	// Sync, because of spoiled files: if an emptied one came back after a crash, the start would
	// refuse the store.
	c.err = errors.Join(err, c.dir.Sync())
}

// writeAll writes what store holds as a snapshot's frames, until stop is closed. A key has all its
// values in one record; if these are too many it has several records (listPart).
func writeAll(w *logWriter, store kvstore.Snapshot, stop <-chan struct{}) error {
	var payload []byte
	f := frame{sequence: 1}

	// A store that closes waits for one frame at most; after the last one, until run has ended.
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

			// A key's deadline comes last, because a load needs the key before it.
			at, hasDeadline := store.Deadline(key)
			if len(values) == 0 && hasDeadline {
				payload = appendExpire(payload, key, at)
				f.count++
			}

			// Frames are short, because one flipped bit costs a whole frame.
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

// listPart returns how many of values the next record of a snapshot has.
func listPart(key string, values []string) int {
	// Each record has the key, so the records of a long key are large.
	most := max(maxFrameSnapshot, 8*len(key))

	for i, v := range values {
		most -= len(v) + 1
		if most < 0 {
			return i + 1
		}
	}
	return len(values)
}
