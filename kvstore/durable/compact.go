package durable

import (
	"errors"
	"kvserver/kvstore"
	"kvserver/kvstore/storage"
	"time"
)

// compactionEnd is how a compaction ended.
type compactionEnd struct {
	bytes int64 // of the new snapshot
	freed int64 // of the files that it stands for
	err   error
}

// errStopped ends a compaction because the store closes.
var errStopped = errors.New("the store closes")

// compact puts a snapshot in the place of all full files, in the background, when they
// hold more than twice what there is. It is called when a file has become full, or is
// empty, and the snapshot is what Memory holds then: no file is read again, and a bit that
// has rotted in one goes with it. It always takes the whole prefix of the log: a part of it, merged
// without what came before, would bring deleted keys back (bitcask issue 82, badger
// issue 2143, leveldb issue 184).
func (d *Store) compact() {
	if d.isCompacting() || d.fullBytes < d.minCompact || d.fullBytes <= d.waste*d.LogBytes() {
		return
	}
	d.compacted = make(chan compactionEnd, 1)
	c := compaction{dir: d.dir, through: d.number - 1, store: d.Snapshot(), stop: d.stop}
	c.header = fileHeader{kind: kindSnapshot, id: d.id, number: c.through, first: d.first}
	go func(freed int64) {
		bytes, err := c.run()
		d.compacted <- compactionEnd{bytes, freed, err}
	}(d.fullBytes)
}

// isWasteful tells whether the log is so much larger than what it holds that the current
// file must not become full before it is compacted, as where nothing but Deletes come.
func (d *Store) isWasteful() bool {
	if d.fullBytes+d.size <= d.waste*d.LogBytes()+d.minCompact+d.segmentSize || d.isCompacting() {
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
	switch c.err {
	case nil:
		d.fullBytes += c.bytes - c.freed
		d.opts.Status.Compactions.Add(1)
		d.log.Info("compacted the log", "freed", c.freed-c.bytes, "snapshot", c.bytes)
	case errStopped:
	default:
		d.compactAfter = time.Now().Add(compactTime)
		d.log.Error("cannot compact the log, it goes on growing; trying again", "in", compactTime,
			"error", c.err)
	}
}

// compaction is one that is to run, or runs, on a goroutine of its own.
type compaction struct {
	dir     storage.Directory
	header  fileHeader
	through uint64           // the last segment that the snapshot stands for
	store   kvstore.Snapshot // what all segments through that one make
	stop    <-chan struct{}
}

// run writes the snapshot, and then removes the files for which it stands. It returns
// the snapshot's size.
func (c *compaction) run() (size int64, err error) {
	l, err := readLayout(c.dir)
	if err != nil {
		return 0, err
	}
	size, err = createLog(c.dir, logName(kindSnapshot, c.through), c.header,
		func(w *logWriter) error { return writeAll(w, c.store, c.stop) })
	if err != nil {
		return 0, err
	}
	var old []string
	if l.snapshot > 0 && l.snapshot < c.through { // it may be ours, from a try that failed
		old = append(old, logName(kindSnapshot, l.snapshot))
	}
	for _, number := range l.segments {
		if number <= c.through {
			old = append(old, logName(kindSegment, number))
		}
	}
	// what a compaction left that failed after its snapshot was there
	for _, name := range l.obsolete {
		if _, number, isLog := parseName(name); isLog && number <= c.through {
			old = append(old, name)
		}
	}
	for _, name := range old {
		if err := c.dir.Remove(name); err != nil {
			return 0, err
		}
	}
	return size, nil
}

// writeAll writes what store holds as a snapshot's frames, until stop is closed.
func writeAll(w *logWriter, store kvstore.Snapshot, stop <-chan struct{}) error {
	var payload []byte
	f := frame{sequence: 1}
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
		for _, v := range values {
			payload = appendRecord(payload, opPut, 0, key, v)
			if f.count++; len(payload) >= maxFrameSnapshot {
				if err := flush(); err != nil {
					return err
				}
			}
		}
	}
	if f.count > 0 {
		if err := flush(); err != nil {
			return err
		}
	}
	f.kind = frameEnd
	return flush()
}
