package durable

import (
	"errors"
	"log/slog"
	"sync"
	"time"

	"kvserver/kvstore/storage"
)

// journal is the end of the log, where it is written: it appends frames, has them on disk, writes
// frames that vouch for them, which is to say that they are on disk, and goes on in a new file. Two
// goroutines use it: the store's owner, and the timer, which syncs what the owner did not wait for.
type journal struct {
	// Read-only once the store is open.
	dir        storage.Directory
	id         storeID
	log        *slog.Logger
	status     *storage.Status
	fsync      time.Duration // Options.Fsync
	zerosAhead int           // bytes of zeros by which a file grows; 0: by none

	// The owner's.
	number      uint64    // of the current file
	size, room  int64     // bytes of its frames, and of zeros behind them, when the owner wrote last
	rotateAfter time.Time // before then no new file is tried
	toldNoFile  time.Time // when the log was told last that none can be made; zero: one can

	// The owner's, but the timer reads it: to change it takes writing. The disk is full, so all
	// room is kept for what frees.
	isFull bool

	// Two locks that are held while the disk works. Whoever writes a frame or changes the file
	// holds writing; whoever syncs holds fsyncs. Each has one slot, which is filled to take it. Who
	// needs both takes writing first.
	writing chan struct{}
	fsyncs  chan struct{}

	// mu guards what is below, and is never held while the disk works. Only whoever holds writing
	// changes current and sequence, and may read them without mu.
	mu         sync.Mutex
	current    *logWriter
	sequence   uint64      // of the last frame written
	synced     uint64      // of the last frame known to be on disk
	vouched    bool        // no frame is due that says that all before it is on disk
	err        error       // the first failure; from then on nothing is written
	timer      *time.Timer // that is to tick; nil: none is
	since      time.Time   // when the tick that runs began; zero: none runs
	timerEnded bool        // none is to become due any more

	ticks sync.WaitGroup // ticks that are due, or run
}

// fail ends all writing with err, unless an error has ended it before. It returns the first.
func (j *journal) fail(err error) error {
	j.mu.Lock()
	defer j.mu.Unlock()

	// What comes later is most often only a consequence.
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

// appendFrame writes a frame. The caller holds writing. If it fails all writing ends.
func (j *journal) appendFrame(kind uint32, payload []byte, count uint32) {
	j.mu.Lock()
	f := frame{sequence: j.sequence + 1, synced: j.synced, count: count, kind: kind}
	w, err := j.current, j.err
	j.mu.Unlock()
	if err != nil {
		return
	}

	// After a frame without records perhaps nothing is written for long, so add no zeros.
	zeros := j.zerosAhead
	if kind != frameRecords {
		zeros = 0
	}

	err = w.append(f, payload, zeros)
	if err != nil {
		j.fail(err)
	}

	// Only now: an fsync that ran meanwhile has not synced this frame.
	j.mu.Lock()
	j.sequence = f.sequence
	j.vouched = kind != frameRecords
	j.mu.Unlock()
}

// syncRest makes everything written so far durable, if it is not: after reads alone
// there is nothing to do. The timer calls it too, but one fsync runs at a time: Linux
// tells of a failed write once, to one of two, and the other would believe that all is
// on disk.
func (j *journal) syncRest() error {
	// What is read here is what the fsync covers: what is written from now on is not.
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
	err = w.sync()
	j.status.Fsyncs.Observe(time.Since(began).Seconds())

	// A file whose fsync failed is never trusted again: the kernel may have dropped what it could
	// not write, and the next fsync would say nothing of it. What was written meanwhile is not
	// covered.
	j.mu.Lock()
	defer j.mu.Unlock()
	if err != nil && j.err == nil {
		j.err = err
	}
	if j.err == nil {
		j.synced = max(j.synced, sequence)
	}
	return j.err
}

// goOn goes on in a new file, and returns the old one, to be closed; nil: no new one could be made.
// The old one's last frame says that another follows. Until that is written nothing has changed, so
// what fails before, such as a disk without room or a missing descriptor, leaves the log in the old
// file. What fails after it is an error.
func (j *journal) goOn() (old *logWriter, err error) {
	j.writing <- struct{}{}
	defer func() { <-j.writing }()

	// The timer may have written a frame since the owner's sync.
	err = j.syncRest()
	if err != nil {
		return nil, err
	}

	// Its first frame comes behind the one that says that it follows.
	h := fileHeader{kind: kindSegment, id: j.id, number: j.number + 1, first: j.sequence + 2}
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

	// From here on it is known that another file follows, so there is no way back. A crash before
	// this frame is on disk leaves an empty next file, which a start removes.
	j.appendFrame(frameNext, nil, 0)
	err = j.syncRest()
	if err != nil {
		return nil, errors.Join(err, w.f.Close())
	}

	// The old file becomes no shorter while the timer syncs it; the next fsync is of the new one.
	j.fsyncs <- struct{}{}
	defer func() { <-j.fsyncs }()
	old = j.current
	err = old.trim()
	if err != nil {
		return nil, errors.Join(err, w.f.Close())
	}

	// From here on the log is in the new file. A crash after this leaves a full file and an empty
	// one.
	j.mu.Lock()
	j.current, j.number = w, j.number+1
	j.mu.Unlock()
	j.size, j.room = w.size, w.room()
	return old, nil
}

// nextSegment makes the segment behind the current one, once that has room for the frame that says
// that another follows. If it fails there is none, or one that the next start takes for what a
// broken-off rotation leaves, and removes.
func (j *journal) nextSegment(h fileHeader) (*logWriter, error) {
	if j.zerosAhead > 0 {
		err := j.current.makeRoom(frameSize)
		j.room = j.current.room()
		if err != nil {
			return nil, err
		}
	}
	stamp, err := createLog(j.dir, h, nil)
	if err != nil {
		return nil, err
	}

	// It has its name on disk by now, but no frame, so it can still be taken back.
	w, err := extendLog(j.dir, h, stamp, headerSize)
	if err != nil {
		return nil, errors.Join(err, j.dir.Remove(h.name()), j.dir.Sync())
	}
	return w, nil
}

// awaitTimer waits for the timer's fsync where that takes longer than Options.Fsync: otherwise a
// stalled disk would let Commits return without bound. It returns what all writing has failed with.
func (j *journal) awaitTimer(now time.Time) error {
	j.mu.Lock()
	since := j.since
	j.mu.Unlock()

	if j.fsync > 0 && !since.IsZero() && now.Sub(since) > j.fsync {
		j.fsyncs <- struct{}{}
		<-j.fsyncs
	}
	return j.failure()
}

// syncLater starts the timer, if there is something for it to do and it does not run.
func (j *journal) syncLater() {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.startTimer(0)
}

// startTimer is syncLater for what may have waited so long already. The caller has mu.
func (j *journal) startTimer(waited time.Duration) {
	wait := j.fsync - waited
	switch j.fsync {
	case FsyncNever:
		return
	case FsyncAlways:
		wait = vouchTime // all is on disk, but no frame says so
	}

	// One tick is due at most, and none while one runs: that one calls this at its end.
	if j.timer == nil && j.since.IsZero() && j.err == nil && !j.timerEnded &&
		(j.synced < j.sequence || !j.vouched) {
		j.ticks.Add(1)
		j.timer = time.AfterFunc(wait, j.tick)
	}
}

// tick makes what was written durable, and writes a frame that says so: otherwise
// nobody could tell later whether a bad end had ever been on disk. It is the timer's
// goroutine, which ends with it.
func (j *journal) tick() {
	defer j.ticks.Done()

	// From here on awaitTimer can wait for it.
	began := time.Now()
	j.mu.Lock()
	j.timer, j.since = nil, began
	j.mu.Unlock()

	err := j.syncRest()
	if err == nil {
		j.vouch()
	}

	// What was written meanwhile has waited since then.
	j.mu.Lock()
	defer j.mu.Unlock()
	j.since = time.Time{}
	j.startTimer(time.Since(began))
}

// vouch writes a frame that says that all before it is on disk, and syncs it, if that is so and the
// last frame does not say it. It makes no room for that: on a full disk all room is for what frees,
// and where the file has none left the next frame says it.
func (j *journal) vouch() {
	// A frame written since the sync is not on disk yet: the next tick comes for that.
	j.writing <- struct{}{}
	j.mu.Lock()
	due := j.synced == j.sequence && !j.vouched
	if due && j.zerosAhead > 0 && (j.isFull || j.current.room() < 2*frameSize) {
		due, j.vouched = false, true // or the timer would come again and again
	}
	j.mu.Unlock()
	if due {
		j.appendFrame(frameSynced, nil, 0)
	}
	<-j.writing

	// Not while writing is held: Commits that only write need not wait for this.
	if due {
		j.syncRest()
	}
}

// stopTimer ends the timer for good, and waits for what it does, or is about to do.
func (j *journal) stopTimer() {
	// A tick that has begun may still want to start the next one.
	j.mu.Lock()
	j.timerEnded = true
	if j.timer != nil {
		wasStopped := j.timer.Stop()
		if wasStopped {
			j.ticks.Done() // in its place
		}
	}
	j.mu.Unlock()

	j.ticks.Wait()
}
