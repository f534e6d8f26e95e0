package durable

import (
	"errors"
	"syscall"
	"time"

	"kvserver/kvstore/storage"
)

// SPARE is a file of zeros that reserves room on the disk for requests that free some: when the
// disk is full, it is shortened so that the log can grow by as much. When a write is taken, SPARE
// and the room in the log have together the bytes of log that it takes to delete every key, one at
// a time. After a compaction SPARE has at most twice that and twice zerosAhead. It belongs to the
// store's owner, as a logWriter without frames; its file is nil while there is no SPARE.

const (
	spareName = "SPARE"

	// Bytes that the Delete of a key may take in the log beside the key: a frame's head, a
	// record's, and the padding to a multiple of 8.
	deleteExtra = frameSize + recordExtra + 8

	// The part of zerosAhead that SPARE has beside the bytes of all Deletes, as for the blocks of a
	// compaction's files (squeeze): 64 KiB of 1 MiB. Removes leave it.
	spareShare = 16
)

// growSpare makes SPARE at least this many bytes long, in steps of zerosAhead. After an error SPARE
// keeps what it has got by then.
func (d *Store) growSpare(bytes int64) error {
	if d.spare.f == nil {
		f, err := d.dir.Create(spareName)
		if err != nil {
			return err
		}
		d.spare = logWriter{f: f, path: d.dir.Path(spareName)}
	}

	step := int64(d.zerosAhead)
	return d.spare.writeZeros(bytes + step - bytes%step)
}

// toDelete returns how many bytes of log it takes to delete every key, one at a time, with one more
// key of this many bytes.
func (d *Store) toDelete(bytes int64) int64 {
	// Each Delete may be a Commit of its own, and so a frame of its own.
	keys, _, _ := d.Size()
	return d.KeyBytes() + bytes + int64(keys+1)*deleteExtra +
		int64(d.zerosAhead/spareShare)
}

// Room returns an error, and has changed nothing, if the disk has no room for one more record with
// this many bytes of key and values. If that record were written anyway, the next Commit could
// fail, and end the store. Requests that free room (Delete, Remove, Take) may use SPARE, and those
// of them that remove the key may use all of it. All other requests leave enough room, in SPARE or
// in the log, to delete everything. Writes are also refused while spoiled files cannot be written
// again. A directory without zerosAhead knows itself what room it has.
func (d *Store) Room(key string, bytes int64, removes int) error {
	need, frees := d.needFor(bytes), removes > 0
	switch {
	case bytes+4*recordExtra > maxRecord:
		return errTooLarge(bytes)
	case d.failure() != nil: // the Commit will return it
		return nil
	case !frees && d.noHeal != nil:
		return d.noHeal
	case frees && d.room >= need && d.spare.fileSize >= d.toDelete(0): // the usual case
		return nil
	case frees && removes >= d.Count(key): // the log gets the key alone
		return d.roomToFree(&d.noDelete, d.needFor(min(bytes, 2*int64(len(key)))), 0)
	case frees:
		return d.roomToFree(&d.noRemove, need, d.toDelete(0))
	case d.zerosAhead == 0:
		return d.dir.RoomFor(need, d.toDelete(bytes), false)
	}

	// Shortly after a refusal, a write that is as large is refused without asking the disk.
	if d.diskIsFull.Load() && bytes >= d.refused && time.Now().Before(d.roomAfter) {
		return d.noRoom
	}

	// Usually there is room, and this finds it without asking the disk.
	if d.room >= need && d.spare.fileSize >= d.toDelete(bytes) && !d.diskIsFull.Load() &&
		(d.mostRefused == 0 || time.Now().Before(d.roomAfter)) {
		return nil
	}

	// If almost all that is in the log was deleted, a compaction makes room. It must be possible in
	// half of SPARE: otherwise writes would leave no room for the compactions that Removes need.
	err := d.roomToWrite(bytes)
	if err != nil && d.squeeze(d.spare.fileSize/2) {
		err = d.roomToWrite(bytes)
	}

	// The timer must know whether the disk is full, and the next Room why.
	d.diskIsFull.Store(err != nil)
	if err != nil {
		d.noRoom, d.refused, d.mostRefused = err, bytes, max(d.mostRefused, bytes)
	}

	// While large writes are refused, small ones may be taken. The log says that there is room
	// again once the largest refused write would fit. A very large one is only tried when it comes
	// again.
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

// needFor returns how many bytes of log it takes to write the pending records, one more record with
// this many bytes of key and values, and a frame around them.
func (d *Store) needFor(bytes int64) int64 {
	return int64(len(d.pending)) + bytes + 4*recordExtra + frameMost + frameSize
}

// roomToWrite makes room for a record of this many bytes, and enough room to delete everything
// afterwards.
func (d *Store) roomToWrite(bytes int64) error {
	return d.roomBeside(d.needFor(bytes), d.toDelete(bytes))
}

// roomBeside makes room for need bytes in the log, and leaves wanted bytes for Deletes.
func (d *Store) roomBeside(need, wanted int64) error {
	// What SPARE cannot get must be in the log. (SPARE grows in steps, and may have enough in spite
	// of an error.)
	had := d.spare.fileSize
	if had < wanted {
		err := d.growSpare(wanted)
		if err != nil {
			need += max(0, wanted-d.spare.fileSize)
		}
	}

	// The request is refused, so what SPARE has got for it is given back for smaller ones.
	err := d.makeRoom(need)
	if err != nil {
		d.spare.cut(max(had, d.toDelete(0)+int64(d.zerosAhead)))
	}
	return err
}

// refusal is the last request of one kind that found no room. The zero value: there is none.
type refusal struct {
	why   error
	need  int64     // bytes of log
	until time.Time // the end of its time
}

// roomToFree is Room for a request that frees room. last is the last refusal: shortly after it, a
// request that needs as many bytes, or more, is refused without asking the disk, which takes many
// calls.
func (d *Store) roomToFree(last *refusal, need, wanted int64) error {
	if d.zerosAhead == 0 {
		return d.dir.RoomFor(need, wanted, true)
	}

	if need >= last.need && time.Now().Before(last.until) {
		return last.why
	}

	err := d.takeRoom(need, wanted)
	if err != nil {
		*last = refusal{why: err, need: need, until: time.Now().Add(roomTime)}
	}
	return err
}

// takeRoom makes room for need bytes in the log. On a full disk the log takes room from SPARE, but
// leaves wanted bytes for Deletes.
func (d *Store) takeRoom(need, wanted int64) error {
	err := d.makeRoomAnywhere(need, wanted)
	if err == nil {
		return nil
	}

	// If the log is much larger than the data, a compaction frees more than SPARE has.
	if d.squeeze(d.spare.fileSize) {
		err = d.makeRoomAnywhere(need, wanted)
	}

	// Step by step, because another program may take what SPARE gives back.
	for err != nil && d.spare.fileSize > wanted {
		d.diskIsFull.Store(true)
		left := max(wanted, d.spare.fileSize-max(need, int64(d.zerosAhead)))
		shrinkErr := d.spare.cut(left)
		if shrinkErr != nil {
			return shrinkErr
		}
		err = d.makeRoomAnywhere(need, wanted)
	}
	return err
}

// makeRoomAnywhere is roomBeside, in a new file if the current one is as large as a file may be
// (RLIMIT_FSIZE).
func (d *Store) makeRoomAnywhere(need, wanted int64) error {
	err := d.roomBeside(need, wanted)
	if errors.Is(err, syscall.EFBIG) && d.rotateEarly() {
		err = d.roomBeside(need, wanted)
	}
	return err
}

// squeeze compacts the log into room that SPARE gives back, if at most this many bytes are enough
// and the compaction frees more than it takes. Without it a full disk would stop two things:
// Removes where keys are long, because the log has the key once for every value; and other writes,
// even when almost everything was deleted. It reports whether there is more room now. Everybody
// waits for it.
func (d *Store) squeeze(most int64) bool {
	// Each file takes whole blocks of the disk.
	need := d.liveBytes() + 2*headerSize + frameMost + int64(d.zerosAhead/spareShare)
	if d.isCompacting() || d.fullBytes+d.size < maxWaste*need || most < need || !d.mayCompact() {
		return false
	}

	// First the room, then a new file. If there can be no new file, SPARE stays smaller: the log
	// uses what it gave back.
	err := d.spare.cut(d.spare.fileSize - need)
	if err != nil || !d.rotateEarly() || d.compactNow() != nil {
		return false
	}

	// Otherwise the next squeeze would find no room in SPARE.
	d.growSpare(d.toDelete(0))
	return true
}

// rotateEarly goes on in a new file before the Commit. It reports whether there is one.
func (d *Store) rotateEarly() bool {
	// The old file gets everything that memory has, so that a snapshot may replace it.
	if d.count > 0 {
		d.writeFrame(frameRecords)
		d.owesSync = true
	}

	isNew, _ := d.rotate() // after an error there is none
	return isNew
}

// makeRoom makes room for this many bytes in the current file, and if the disk has as much, for at
// least zerosAhead.
func (d *Store) makeRoom(need int64) error {
	if d.room >= need {
		return nil
	}

	// The timer writes the same file.
	d.writing <- struct{}{}
	defer func() { <-d.writing }()
	err := d.current.writeZeros(max(need, int64(d.zerosAhead)))
	d.room = d.current.zeros()
	if d.room >= need {
		return nil // more was wanted, but this is enough
	}
	return err
}

// checkSpare opens SPARE if it is there, and notes if somebody has removed or shortened it: the
// next write makes it again, or as long as it should be. The store also works without it. If SPARE
// cannot be opened, that is logged once.
func (d *Store) checkSpare(stamps map[string]storage.Stamp) {
	stamp, isThere := stamps[spareName]
	switch {
	case isThere && d.spare.f == nil:
		f, err := d.dir.Extend(spareName)
		if err == nil {
			d.spare = logWriter{f: f, path: d.dir.Path(spareName), fileSize: stamp.Size}
		} else if !d.toldNoSpare {
			d.log.Error("cannot open SPARE, so a full disk may have no room for Deletes: let the "+
				"server read and write this file, or remove it, and the server makes another", "error",
				err)
		}
		d.toldNoSpare = err != nil
	case isThere:
		d.spare.fileSize = min(d.spare.fileSize, stamp.Size)
		d.toldNoSpare = false
	case d.spare.f != nil:
		d.spare.f.Close()
		d.spare = logWriter{}
	}
}
