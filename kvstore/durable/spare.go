package durable

import (
	"slices"
	"time"

	"kvserver/kvstore/storage"
)

// spareFile is a file of zeros, SPARE, which keeps room on the disk for what frees: when the disk is
// full it gives as much back as the log needs to go on. It is as large as it takes to delete every
// key, one at a time. It is the owner's.
type spareFile struct {
	file storage.File // nil: there is none
	size int64        // bytes
}

const (
	spareName = "SPARE"

	// Bytes that the Delete of a key may take in the log beside the key: a frame's head, a record's,
	// and what fills both up to a multiple of 8.
	deleteExtra = frameSize + recordExtra + 8

	// The part of a directory's reserve that the spare file has beside the room for Deletes: 64 KiB
	// of 1 MiB, for Removes.
	spareShare = 16
)

// openSpare opens the spare file, if there is one.
func openSpare(dir storage.Directory) (s spareFile, err error) {
	names, err := dir.List()
	if err != nil || !slices.Contains(names, spareName) {
		return s, err
	}
	f, size, err := dir.Open(spareName)
	if err != nil {
		return s, err
	}
	f.Close()
	if s.file, err = dir.Extend(spareName); err != nil {
		return spareFile{}, err
	}
	s.size = size
	return s, nil
}

// grow makes the spare file have at least so many bytes, in steps. What it can have it has, also
// where that fails.
func (s *spareFile) grow(dir storage.Directory, size, step int64) (err error) {
	if s.file == nil {
		if s.file, err = dir.Create(spareName); err != nil {
			return err
		}
		s.size = 0
	}
	size += step - size%step
	zeros := make([]byte, step)
	for s.size < size && err == nil {
		var n int
		n, err = s.file.WriteAt(zeros[:min(size-s.size, step)], s.size)
		s.size += int64(n)
	}
	return err
}

// shrink gives back what the spare file has more than so many bytes.
func (s *spareFile) shrink(size int64) error {
	if s.size <= size {
		return nil
	}
	err := s.file.Truncate(size)
	if err == nil {
		s.size = size
	}
	return err
}

// close closes the file.
func (s *spareFile) close() error {
	if s.file == nil {
		return nil
	}
	return s.file.Close()
}

// toDelete is how many bytes of log it takes to delete every key, one at a time, and a new one with
// so many bytes.
func (d *Store) toDelete(bytes int64) int64 {
	keys, _, _ := d.Size()
	return d.KeyBytes() + bytes + int64(keys+1)*deleteExtra +
		int64(d.zerosAhead/spareShare)
}

// Room returns an error, and nothing has changed, if the disk has no room for one
// more record of so many bytes of key and values. Who writes one nevertheless has the next
// Commit fail, and the store end. What frees, a Delete or a Remove, may use the spare file; other
// writes leave in that, or in the log, what it takes to delete everything. A
// directory that wants no zeros ahead knows by itself what room it has.
func (d *Store) Room(bytes int64, frees bool) error {
	need := int64(len(d.pending)) + bytes + 4*recordExtra + frameMost + frameSize
	switch {
	case bytes > maxRecord:
		return errTooLarge(bytes)
	case d.failure() != nil:
		return nil
	case d.zerosAhead == 0:
		return d.roomBeside(need, frees)
	case frees:
		return d.roomToFree(need)
	}

	spare := d.toDelete(bytes)
	if d.isFull && bytes >= d.refused && time.Now().Before(d.roomAfter) {
		return d.noRoom
	}
	if d.room >= need && d.spare.size >= spare && !d.isFull {
		return nil
	}
	if d.spare.size < spare && d.spare.grow(d.dir, spare, int64(d.zerosAhead)) != nil {
		need += max(0, spare-d.spare.size) // it grows in steps, and may have got enough
	}
	err := d.makeRoom(need)
	if wasFull := d.setFull(err != nil); err != nil {
		d.noRoom, d.refused, d.roomAfter = err, bytes, time.Now().Add(roomTime)
	} else if wasFull {
		d.log.Info("there is room on the disk again: writes are taken", "dir", d.dir.Path(""))
	}
	return err
}

// roomBeside is what a directory says that knows what room it has.
func (d *Store) roomBeside(bytes int64, frees bool) error {
	if dir, ok := d.dir.(interface{ Room(int64, bool) error }); ok {
		return dir.Room(bytes, frees)
	}
	return nil
}

// roomToFree is Room for what frees. Where the disk is full the spare file gives some back.
func (d *Store) roomToFree(need int64) error {
	err := d.makeRoom(need)
	if err != nil && d.squeeze() {
		err = d.makeRoom(need)
	}
	for err != nil && d.spare.size > 0 {
		d.setFull(true)
		left := max(0, d.spare.size-max(need, int64(d.zerosAhead)))
		if shrinkErr := d.spare.shrink(left); shrinkErr != nil {
			return shrinkErr
		}
		err = d.makeRoom(need)
	}
	return err
}

// squeeze compacts the log into the room that the spare file gives back, if that is enough, and
// gives back more than it takes: so Removes go on, too, where there are long keys. Everybody waits
// for it.
func (d *Store) squeeze() bool {
	need := d.liveBytes() + 2*headerSize + frameMost
	if d.isCompacting() || d.fullBytes+d.size < maxWaste*need || d.spare.size < need {
		return false
	}
	if d.count > 0 { // or the snapshot would have what the full files do not
		d.writeFrame(frameRecords)
		d.wroteEarly = true
	}
	before := d.number
	if d.spare.shrink(d.spare.size-need) != nil || d.rotate() != nil || d.number == before {
		return false
	}
	c := d.newCompaction()
	bytes, err := c.run()
	d.noteCompaction(compactionEnd{c.through, bytes, d.fullBytes, err})
	return err == nil
}

// setFull notes whether the disk is full, and returns whether it was.
func (d *Store) setFull(isFull bool) (was bool) {
	if was = d.isFull; was != isFull {
		d.writing <- struct{}{}
		d.isFull = isFull
		<-d.writing
	}
	return was
}

// makeRoom makes room for so many bytes in the current file.
func (d *Store) makeRoom(need int64) error {
	if d.room >= need {
		return nil
	}
	d.writing <- struct{}{}
	defer func() { <-d.writing }()
	err := d.current.makeRoom(max(need, int64(d.zerosAhead)))
	if d.room = d.current.room(); d.room >= need {
		return nil
	}
	return err
}

// checkSpare closes a spare file that somebody has removed: the next write makes it anew.
func (d *Store) checkSpare(stamps map[string]storage.Stamp) {
	if _, isThere := stamps[spareName]; d.spare.file != nil && !isThere {
		d.spare.close()
		d.spare = spareFile{}
	}
}
