package durable

import (
	"errors"
	"syscall"
	"time"

	"kvserver/kvstore/storage"
)

// SPARE is a file of zeros that keeps room on the disk for what frees: when the disk is full it
// gives as much back as the log needs to go on. It has at least what it takes to delete every key,
// one at a time, and after a compaction at most twice that and twice zerosAhead. It belongs to the
// store's owner, who knows it as a logWriter without frames, and without a file where there is
// none.

const (
	spareName = "SPARE"

	// Bytes that the Delete of a key may take in the log beside the key: a frame's head, a
	// record's, and what fills both up to a multiple of 8.
	deleteExtra = frameSize + recordExtra + 8

	// The part of zerosAhead that SPARE has beside the room for Deletes: 64 KiB of 1 MiB, for
	// Removes.
	spareShare = 16
)

// growSpare makes SPARE have at least so many bytes, in steps of zerosAhead. What it could have
// before an error it has.
func (d *Store) growSpare(bytes int64) error {
	if d.spare.f == nil {
		f, err := d.dir.Create(spareName)
		if err != nil {
			return err
		}
		d.spare = logWriter{f: f, path: d.dir.Path(spareName)}
	}

	step := int64(d.zerosAhead)
	return d.spare.makeRoom(bytes + step - bytes%step)
}

// toDelete is how many bytes of log it takes to delete every key, one at a time, and a new key of
// so many bytes as well.
func (d *Store) toDelete(bytes int64) int64 {
	// Each Delete is a Commit of its own, and so a frame of its own.
	keys, _, _ := d.Size()
	return d.KeyBytes() + bytes + int64(keys+1)*deleteExtra +
		int64(d.zerosAhead/spareShare)
}

// Room returns an error, and nothing has changed, if the disk has no room for one more record of so
// many bytes of key and values. A record that is written nevertheless makes the next Commit fail,
// and ends the store. What frees, a Delete or a Remove, may use SPARE; other writes leave in SPARE,
// or in the log, what it takes to delete everything, and are refused while files are spoiled and
// cannot be written anew. A directory that wants no zeros ahead knows by itself what room it has.
func (d *Store) Room(bytes int64, frees bool) error {
	need := d.needFor(bytes)
	switch {
	case bytes+4*recordExtra > maxRecord:
		return errTooLarge(bytes)
	case d.failure() != nil: // the Commit will say it
		return nil
	case !frees && d.noHeal != nil:
		return d.noHeal
	case d.zerosAhead == 0:
		return d.dir.RoomFor(need, frees)
	case frees:
		return d.roomToFree(need)
	}

	// On a disk that was full just now, what was refused is refused again without a call.
	if d.isFull && bytes >= d.refused && time.Now().Before(d.roomAfter) {
		return d.noRoom
	}

	// Most often there is room, which this finds without a call.
	if d.room >= need && d.spare.fileSize >= d.toDelete(bytes) && !d.isFull &&
		(d.mostRefused == 0 || time.Now().Before(d.roomAfter)) {
		return nil
	}

	// Where almost all that is in the log was deleted, a compaction gives the room back. Half of SPARE
	// has to be enough for it, or writes would leave none to the compactions for Removes.
	err := d.roomToWrite(bytes)
	if err != nil && d.squeeze(d.spare.fileSize/2) {
		err = d.roomToWrite(bytes)
	}

	// The timer has to know whether the disk is full, and the next Room why.
	d.setFull(err != nil)
	if err != nil {
		d.noRoom, d.refused, d.mostRefused = err, bytes, max(d.mostRefused, bytes)
	}

	// Small writes may be taken where large ones are refused: that is not over before all find room. Of
	// very large ones that is known when one is taken.
	switch most := d.mostRefused; {
	case err != nil:
		d.roomAfter = time.Now().Add(roomTime)
	case most == 0:
	case bytes >= most, most <= 8*int64(d.zerosAhead) && d.roomToWrite(most) == nil:
		d.mostRefused = 0
		d.log.Info("there is room on the disk again: writes are taken", "dir", d.dir.Path(""))
	default:
		d.roomAfter = time.Now().Add(rotateTime)
	}
	return err
}

// needFor is how many bytes of log it takes to write what waits for the Commit, a record of so many
// bytes of key and values, and a frame around both.
func (d *Store) needFor(bytes int64) int64 {
	return int64(len(d.pending)) + bytes + 4*recordExtra + frameMost + frameSize
}

// roomToWrite makes room for a record of so many bytes, and for what it then takes to delete
// everything.
func (d *Store) roomToWrite(bytes int64) error {
	// What SPARE cannot have must be in the log. It grows in steps, and may have got enough.
	need, wanted, had := d.needFor(bytes), d.toDelete(bytes), d.spare.fileSize
	if d.spare.fileSize < wanted {
		err := d.growSpare(wanted)
		if err != nil {
			need += max(0, wanted-d.spare.fileSize)
		}
	}

	// What SPARE has got in vain is for smaller writes.
	err := d.makeRoom(need)
	if err != nil {
		d.spare.cut(max(had, d.toDelete(0)+int64(d.zerosAhead)))
	}
	return err
}

// roomToFree is Room for what frees. Where the disk is full the log takes room from SPARE.
func (d *Store) roomToFree(need int64) error {
	err := d.makeRoomAnywhere(need)
	if err == nil {
		return nil
	}

	// A log that is much larger than the data gives back more than SPARE has.
	squeezed := d.squeeze(d.spare.fileSize)
	if squeezed {
		err = d.makeRoomAnywhere(need)
	}

	// Step by step, for another program may take what is given back.
	for err != nil && d.spare.fileSize > 0 {
		d.setFull(true)
		left := max(0, d.spare.fileSize-max(need, int64(d.zerosAhead)))
		shrinkErr := d.spare.cut(left)
		if shrinkErr != nil {
			return shrinkErr
		}
		err = d.makeRoomAnywhere(need)
	}
	return err
}

// makeRoomAnywhere is makeRoom, in the next file where the current one has all that a file may have
// (RLIMIT_FSIZE).
func (d *Store) makeRoomAnywhere(need int64) error {
	err := d.makeRoom(need)
	if errors.Is(err, syscall.EFBIG) && d.rotateEarly() {
		err = d.makeRoom(need)
	}
	return err
}

// squeeze compacts the log into room that SPARE gives back, if so many bytes are enough room, and the
// log gives back more than it takes: so Removes go on, too, where there are long keys, each of which
// is in the log with every value, and writes where almost all was deleted. It returns whether there is
// more room now. Everybody waits for it.
func (d *Store) squeeze(most int64) bool {
	// Each file takes whole blocks of the disk.
	need := d.liveBytes() + 2*headerSize + frameMost + int64(d.zerosAhead/spareShare)
	if d.isCompacting() || d.fullBytes+d.size < maxWaste*need || most < need || !d.mayCompact() {
		return false
	}

	// The room first, then a new file. If the log cannot go on there, SPARE stays smaller: what it
	// gave back is the log's.
	err := d.spare.cut(d.spare.fileSize - need)
	if err != nil || !d.rotateEarly() {
		return false
	}

	// Not aside: the room that it makes is wanted now.
	c := d.newCompaction()
	c.run()
	d.noteCompaction(c)
	return c.err == nil
}

// rotateEarly goes on in a new file before the Commit. It returns whether there is one.
func (d *Store) rotateEarly() bool {
	// The old file has all that memory has: a snapshot of that may take its place.
	if d.count > 0 {
		d.writeFrame(frameRecords)
		d.wroteEarly = true
	}

	isNew, err := d.rotate()
	return err == nil && isNew
}

// setFull notes whether the disk is full.
func (d *Store) setFull(isFull bool) {
	if d.isFull != isFull {
		d.writing <- struct{}{}
		d.isFull = isFull
		<-d.writing
	}
}

// makeRoom makes room for so many bytes in the current file, and for zerosAhead, if the disk has as
// much.
func (d *Store) makeRoom(need int64) error {
	if d.room >= need {
		return nil
	}

	// The timer writes the same file.
	d.writing <- struct{}{}
	defer func() { <-d.writing }()
	err := d.current.makeRoom(max(need, int64(d.zerosAhead)))
	d.room = d.current.room()
	if d.room >= need {
		return nil // what is missing was wanted, but is not needed
	}
	return err
}

// checkSpare opens SPARE if it is there, and notes what somebody has done to it: the next write makes
// one that was removed anew, and gives back to one that was cut. Without it the store goes on.
func (d *Store) checkSpare(stamps map[string]storage.Stamp) {
	stamp, isThere := stamps[spareName]
	switch {
	case isThere && d.spare.f == nil:
		f, err := d.dir.Extend(spareName)
		if err == nil {
			d.spare = logWriter{f: f, path: d.dir.Path(spareName), fileSize: stamp.Size}
		}
	case isThere:
		d.spare.fileSize = min(d.spare.fileSize, stamp.Size)
	case d.spare.f != nil:
		d.spare.f.Close()
		d.spare = logWriter{}
	}
}
