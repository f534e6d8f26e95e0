package durable

import (
	"cmp"
	"errors"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"kvserver/kvstore/storage"
)

// journal is the end of the log, where it is written. It appends frames, syncs them, writes frames
// that vouch for them (say that they are on disk), and goes on in a new file. Two goroutines change
// it: the store's owner, and the timer, which syncs what the owner did not wait for. Any goroutine
// may look at it with Store.Syncing.
type journal struct {
	// Read-only once the store is open.
	dir        storage.Directory
	log        *slog.Logger
	status     *storage.Status
	fsync      time.Duration // Options.Fsync
	zerosAhead int           // bytes of zeros by which a file grows; 0: none

	// The owner's.
	size, room  int64     // of the current file, as the owner left it: bytes of frames, and of zeros
	rotateAfter time.Time // until then Commit tries no new file because one is full
	toldNoFile  time.Time // when it was last logged that none can be made; zero: one can be made

	// The disk is full, so all room is kept for requests that free some. The owner sets it, and the
	// timer reads it.
	diskIsFull atomic.Bool

	// Two locks that are held while the disk works: whoever writes a frame or changes the file
	// holds writing, and whoever syncs it while there is a timer holds fsyncs. Each is a channel
	// with one slot, which is filled to take the lock. Whoever needs both takes writing first.
	writing chan struct{}
	fsyncs  chan struct{}

	// mu guards the fields below, and is never held while the disk works. current and sequence
	// change only under writing and mu together, so the holder of writing reads them without mu.
	mu         sync.Mutex
	current    *logWriter
	sequence   uint64      // of the last frame written
	synced     uint64      // of the last frame known to be on disk
	vouched    bool        // the last frame needs no frame that vouches for it
	err        error       // the first failure; from then on nothing is written
	noRoomYet  error       // the storage.ErrNoRoom of the last fsync; nil: that found room
	timer      *time.Timer // of the next tick; nil: none is due
	since      time.Time   // when the running tick began; zero: none runs
	timerEnded bool        // no tick may become due any more

	ticks sync.WaitGroup // ticks that are due or running
}

// number is the current file's. The owner calls it: nobody else changes the current file.
func (j *journal) number() uint64 { return j.current.header.number }

// fail ends all writing with err, unless an earlier error has. It returns the first error.
func (j *journal) fail(err error) error {
	j.mu.Lock()
	defer j.mu.Unlock()

	// Later errors are usually only consequences.
	if j.err == nil {
		j.err = err
	}
	return j.err
}

// failure returns the error that has ended all writing, if one has.
func (j *journal) failure() error {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.err
}

// addFrame writes a frame. The caller holds writing. After an error all writing ends.
func (j *journal) addFrame(kind uint32, payload []byte, count uint32) {
	j.mu.Lock()
	f := frame{sequence: j.sequence + 1, synced: j.synced, count: count, kind: kind}
	w, err := j.current, j.err
	j.mu.Unlock()
	if err != nil {
		return
	}

	// Only frames with records need zeros: the others are written only where there are some already.
	err = w.append(f, payload, j.zerosAhead)
	if err != nil {
		j.fail(err)
	}

	// Only now: an fsync that ran meanwhile has not covered this frame.
	j.mu.Lock()
	j.sequence = f.sequence
	j.vouched = kind != frameRecords
	j.mu.Unlock()
}

// syncRest makes everything written so far durable. If it already is, as after reads alone, there
// is nothing to do. After a storage.ErrNoRoom the next syncRest tries again. Owner and timer call
// it, but only one fsync runs at a time: Linux reports a failed write only once, so of two fsyncs
// one would believe that everything is on disk.
func (j *journal) syncRest() error {
	// The fsync covers frames up to this sequence, but none that are written from now on.
	j.fsyncs <- struct{}{}
	defer func() { <-j.fsyncs }()
	j.mu.Lock()
	w, sequence, err := j.current, j.sequence, j.err
	done := j.synced >= sequence
	j.mu.Unlock()
	if done || err != nil {
		return err
	}

	began := time.Now()
	err = w.trySync()
	if !errors.Is(err, storage.ErrNoRoom) {
		j.status.Fsyncs.Observe(time.Since(began).Seconds())
	}

	j.mu.Lock()
	defer j.mu.Unlock()
	j.noRoomYet = nil
	switch {
	case errors.Is(err, storage.ErrNoRoom):
		j.noRoomYet = err

	// A file whose fsync failed is never trusted again: the kernel may have dropped what it could
	// not write, and the next fsync would not report it.
	case err != nil && j.err == nil:
		j.err = err
	case j.err == nil:
		j.synced = max(j.synced, sequence)
	}
	return cmp.Or(j.err, j.noRoomYet)
}

// goOn goes on in a new file, and returns the old one for the caller to close; nil: no new file
// could be made. The last frame of the old file says that another follows. Before this frame
// nothing has changed, so a failure there, such as a full disk or too few descriptors, leaves the
// log in the old file. A failure after it is an error, and so is a failed fsync.
func (j *journal) goOn() (old *logWriter, err error) {
	j.writing <- struct{}{}
	defer func() { <-j.writing }()

	// The timer may have written a frame since the owner's last sync.
	err = awaitRoom(j.syncRest)
	if err != nil {
		return nil, err
	}

	// The new file's first frame follows the old file's last frame, which is not yet written.
	h := fileHeader{kind: kindSegment, id: j.current.header.id, number: j.number() + 1,
		first: j.sequence + 2}
	w, err := j.nextSegment(h)
	now := time.Now()
	if err != nil {
		j.rotateAfter = now.Add(rotateTime)
		if now.Sub(j.toldNoFile) >= time.Minute {
			j.toldNoFile = now
			j.log.Error("cannot go on in a new file, so the old one grows; trying again", "error",
				err)
		}
		return nil, nil
	}
	if !j.toldNoFile.IsZero() {
		j.toldNoFile = time.Time{}
		j.log.Info("the log goes on in a new file again", "file", w.path)
	}

	// With this frame there is no way back. A crash before it is on disk leaves an empty next file,
	// which a start removes.
	j.addFrame(frameNext, nil, 0)
	err = awaitRoom(j.syncRest)
	if err != nil {
		return nil, errors.Join(err, w.f.Close())
	}

	// The old file must not become shorter while the timer syncs it. The next fsync is of the new
	// one.
	j.fsyncs <- struct{}{}
	defer func() { <-j.fsyncs }()
	old = j.current
	err = old.trim()
	if err != nil {
		return nil, errors.Join(err, w.f.Close())
	}

	// From here on the log is in the new file. A crash now leaves a full file and an empty one.
	j.mu.Lock()
	j.current = w
	j.mu.Unlock()
	j.size, j.room = w.size, w.zeros()
	return old, nil
}

// nextSegment makes the segment after the current one, after it has made room in the current one
// for the frame that says that another follows. After an error there is no new segment, or an empty
// one, which the next start removes as what an unfinished rotation leaves.
func (j *journal) nextSegment(h fileHeader) (*logWriter, error) {
	if j.zerosAhead > 0 {
		err := j.current.writeZeros(frameSize)
		j.room = j.current.zeros()
		if err != nil {
			return nil, err
		}
	}
	stamp, err := createLog(j.dir, h, nil)
	if err != nil {
		return nil, err
	}

	// The new file has its name on disk by now, but no frame, so it can still be removed.
	w, err := extendLog(j.dir, h, stamp, headerSize)
	if err != nil {
		return nil, errors.Join(err, j.dir.Remove(h.name()), j.dir.Sync())
	}
	return w, nil
}

// awaitTimer waits for the timer's fsync if that takes longer than Options.Fsync. Otherwise Commits
// would go on returning while the disk stalls. It returns the error that has ended all writing, if
// there is one. If the last fsync found no room it tries again, because the timer may not run, and
// returns a storage.ErrNoRoom if there still is none.
func (j *journal) awaitTimer(now time.Time) error {
	j.mu.Lock()
	since := j.since
	j.mu.Unlock()

	if j.fsync > 0 && !since.IsZero() && now.Sub(since) > j.fsync {
		j.fsyncs <- struct{}{}
		<-j.fsyncs
	}

	j.mu.Lock()
	err, isOwed := j.err, j.noRoomYet != nil
	j.mu.Unlock()
	if err == nil && isOwed {
		err = j.syncRest()
	}
	return err
}

// syncLater starts the timer if there is something for it to do and it does not run already.
func (j *journal) syncLater() {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.startTimer(0)
}

// startTimer is syncLater for frames that may have waited this long already. The caller holds mu.
func (j *journal) startTimer(since time.Duration) {
	wait := j.fsync - since
	switch j.fsync {
	case FsyncNever:
		return
	case FsyncAlways:
		wait = vouchTime // everything is on disk, but no frame says so
	}

	// At most one tick is due, and none while one runs: that one calls startTimer at its end.
	if j.timer == nil && j.since.IsZero() && j.err == nil && !j.timerEnded &&
		(j.synced < j.sequence || !j.vouched) {
		j.ticks.Add(1)
		j.timer = time.AfterFunc(wait, j.tick)
	}
}

// tick makes durable what was written, and writes a frame that says so. Without that frame
// nobody could tell later whether a bad end of the log had ever been on disk. tick runs on
// the timer's goroutine, which ends with it.
func (j *journal) tick() {
	defer j.ticks.Done()

	// From here on awaitTimer can wait for this tick.
	began := time.Now()
	j.mu.Lock()
	j.timer, j.since = nil, began
	j.mu.Unlock()

	j.syncRest()
	j.vouch()

	// What was written meanwhile may have waited since the tick began.
	j.mu.Lock()
	defer j.mu.Unlock()
	j.since = time.Time{}
	j.startTimer(time.Since(began))
}

// vouch writes and syncs a frame that says that everything before it is on disk, if that is so and
// the last frame does not say it yet. It makes no room for this frame: on a full disk all room is
// for requests that free some, and in a file without room the next frame says it.
func (j *journal) vouch() {
	// A frame written since the sync is not on disk yet: the next tick comes for that.
	j.writing <- struct{}{}
	j.mu.Lock()
	due := j.synced == j.sequence && !j.vouched
	if due && j.zerosAhead > 0 && (j.diskIsFull.Load() || j.current.zeros() < 2*frameSize) {
		due, j.vouched = false, true // though no frame says it, or the timer would tick again and again
	}
	j.mu.Unlock()
	if due {
		j.addFrame(frameSynced, nil, 0)
	}
	<-j.writing

	// Not while writing is held, so that Commits that only write need not wait for this fsync.
	if due {
		j.syncRest()
	}
}

// stopTimer ends the timer for good, and waits for a tick that runs.
func (j *journal) stopTimer() {
	// A tick that runs must not start the next one.
	j.mu.Lock()
	j.timerEnded = true
	if j.timer != nil {
		wasStopped := j.timer.Stop()
		if wasStopped {
			j.ticks.Done() // the stopped tick cannot do it
		}
	}
	j.mu.Unlock()

	j.ticks.Wait()
}
