package durable

import (
	"errors"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"kvserver/kvstore/storage"
)

// journal is the end of the log, where it is written: it appends frames, has them on disk, writes
// frames that say what is on disk, and goes on in a new file. Two goroutines use it: the store's
// owner, and the timer, which syncs what the owner did not wait for.
type journal struct {
	// Read-only once the store is open.
	dir        storage.Directory
	id         storeID
	log        *slog.Logger
	status     *storage.Status
	fsync      time.Duration // Options.Fsync
	zerosAhead int           // bytes of zeros by which a file grows; 0: by none

	// The owner's.
	number uint64 // of the current file
	first  uint64 // sequence of its first frame
	// of the current file, as of the owner's last frame: bytes of frames, and of zeros behind them
	size, room  int64
	rotateAfter time.Time // no new file is tried before
	noNewFile   trouble
	isFull      bool // the disk is: all room is for what frees. Who changes it has writing

	// writing has one slot, for whoever writes a frame or changes the file, and fsyncs one for
	// whoever syncs. It is taken behind writing, where both are.
	writing chan struct{}
	fsyncs  chan struct{}

	// mu guards what is below. Whoever has writing is the only one to change current and sequence,
	// and may read them without it.
	mu       sync.Mutex
	current  *logWriter
	sequence uint64        // of the last frame written
	synced   uint64        // of the last frame known to be on disk
	vouched  bool          // the last frame says that all before it is on disk
	err      error         // the first failure; from then on nothing is written
	timer    *time.Timer   // nil while it does not run
	underWay chan struct{} // closed when the timer's fsync, which runs, has ended; nil: none runs
	since    time.Time     // when it began

	ticks      sync.WaitGroup // ticks that are due, or run
	timerEnded bool           // guarded by mu: none is to become due

	syncing atomic.Pointer[string] // the file whose Sync has not returned
}

// trouble is something that does not work for a while. It is worth a line of log when it begins,
// one each minute, and one when it is over.
type trouble struct {
	said time.Time // the zero time: there is none
}

// again tells whether it is to be said that it does not work, now.
func (t *trouble) again(now time.Time) bool {
	if !t.said.IsZero() && now.Sub(t.said) < time.Minute {
		return false
	}
	t.said = now
	return true
}

// over tells whether there was trouble, which has ended now.
func (t *trouble) over() bool {
	was := !t.said.IsZero()
	t.said = time.Time{}
	return was
}

// fail keeps the first error. It returns what is kept.
func (j *journal) fail(err error) error {
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.err == nil {
		j.err = err
	}
	return j.err
}

// failure returns the first error.
func (j *journal) failure() error {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.err
}

// appendFrame writes a frame. The caller has writing.
func (j *journal) appendFrame(kind uint32, payload []byte, count uint32) {
	j.mu.Lock()
	f := frame{sequence: j.sequence + 1, synced: j.synced, count: count, kind: kind}
	w, err := j.current, j.err
	j.mu.Unlock()
	if err != nil {
		return
	}
	zeros := j.zerosAhead
	if kind != frameRecords {
		zeros = 0 // nothing may follow for long
	}
	if err := w.append(f, payload, zeros); err != nil {
		j.fail(err)
	}
	j.mu.Lock()
	j.sequence = f.sequence // only now: a sync meanwhile has not synced it
	j.vouched = kind != frameRecords
	j.mu.Unlock()
}

// syncRest makes everything written so far durable, if it is not: after reads alone
// there is nothing to do. The timer calls it too, but one fsync runs at a time: Linux
// tells of a failed write once, to one of two, and the other would believe that all is
// on disk.
func (j *journal) syncRest() error {
	j.fsyncs <- struct{}{}
	defer func() { <-j.fsyncs }()
	j.mu.Lock()
	w, sequence, err := j.current, j.sequence, j.err
	done := j.synced >= sequence
	j.mu.Unlock()
	if done || err != nil {
		return err
	}
	j.syncing.Store(&w.path)
	began := time.Now()
	err = w.sync()
	j.status.Fsyncs.Observe(time.Since(began).Seconds())
	j.syncing.Store(nil)
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

// goOn goes on in a new file, and returns the bytes of the old one; 0: no new one could be made. The old one's last frame says that another follows; until that is
// written nothing has changed, so what fails before, such as a disk without room or a missing
// descriptor, leaves the log in the old file.
func (j *journal) goOn() (full int64, err error) {
	j.writing <- struct{}{}
	defer func() { <-j.writing }()
	defer j.syncing.Store(nil)
	if err := j.syncRest(); err != nil { // the timer may have written a frame
		return 0, err
	}

	next := j.dir.Path(logName(kindSegment, j.number+1))
	j.syncing.Store(&next)
	h := fileHeader{kind: kindSegment, id: j.id, number: j.number + 1, first: j.sequence + 2}
	w, err := j.nextSegment(h)
	if now := time.Now(); err != nil {
		j.rotateAfter = now.Add(rotateTime)
		if j.noNewFile.again(now) {
			j.log.Error("cannot go on in a new file, so the old one grows; trying again", "error",
				err)
		}
		return 0, nil
	}
	if j.noNewFile.over() {
		j.log.Info("the log goes on in a new file again", "file", w.path)
	}

	// From here on it is known that another file follows.
	j.appendFrame(frameNext, nil, 0)
	if err := j.syncRest(); err != nil {
		return 0, errors.Join(err, w.f.Close())
	}
	j.fsyncs <- struct{}{} // the timer's has ended, and the next is of the new file
	defer func() { <-j.fsyncs }()
	old := j.current
	j.syncing.Store(&old.path)
	if err := errors.Join(old.trim(), old.f.Close()); err != nil {
		return 0, errors.Join(err, w.f.Close())
	}
	j.mu.Lock()
	j.current, j.number = w, j.number+1
	j.mu.Unlock()
	j.size, j.room, j.first = w.size, w.room(), h.first
	return old.size, nil
}

// nextSegment makes the segment behind the current one, if that has room for the frame that
// says so.
func (j *journal) nextSegment(h fileHeader) (*logWriter, error) {
	if j.zerosAhead > 0 {
		err := j.current.makeRoom(frameSize)
		if j.room = j.current.room(); err != nil {
			return nil, err
		}
	}
	return j.newSegment(h)
}

// newSegment makes an empty segment. If it fails none is there, or one that the
// next start takes for what it is.
func (j *journal) newSegment(h fileHeader) (*logWriter, error) {
	name := logName(h.kind, h.number)
	size, err := createLog(j.dir, name, h, noFrames)
	if err != nil {
		return nil, err
	}
	w, err := extendLog(j.dir, name, h, size)
	if err != nil {
		return nil, errors.Join(err, j.dir.Remove(name), j.dir.Sync())
	}
	return w, nil
}

// awaitTimer waits, where the timer's fsync takes longer than it may, for that to
// end: otherwise a stalled disk would let Commits return without bound.
func (j *journal) awaitTimer(now time.Time) error {
	j.mu.Lock()
	underWay, since := j.underWay, j.since
	j.mu.Unlock()
	if j.fsync > 0 && underWay != nil && now.Sub(since) > j.fsync {
		<-underWay
	}
	return j.failure()
}

// syncLater starts the timer, if there is something for it to do.
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
		wait = vouchTime
	}
	if j.timer == nil && j.underWay == nil && j.err == nil && !j.timerEnded &&
		(j.synced < j.sequence || !j.vouched) {
		j.ticks.Add(1)
		j.timer = time.AfterFunc(wait, j.tick)
	}
}

// tick makes what was written durable, and writes a frame that says so: otherwise
// nobody could tell later whether a bad end had ever been on disk. It is the timer's
// goroutine.
func (j *journal) tick() {
	defer j.ticks.Done()
	ended, began := make(chan struct{}), time.Now()
	j.mu.Lock()
	j.timer, j.underWay, j.since = nil, ended, began
	j.mu.Unlock()
	if j.syncRest() == nil {
		j.vouch()
	}

	// What was written meanwhile has waited since then. The timer runs again before anybody hears
	// that this one has ended.
	j.mu.Lock()
	j.underWay = nil
	j.startTimer(time.Since(began))
	j.mu.Unlock()
	close(ended)
}

// vouch writes a frame that says that all before it is on disk, if that is so and
// the last frame does not say it. On a full disk the next frame will.
func (j *journal) vouch() {
	j.writing <- struct{}{}
	j.mu.Lock()
	due := j.synced == j.sequence && !j.vouched
	if due && j.zerosAhead > 0 && (j.isFull || j.current.room() < frameSize) {
		due, j.vouched = false, true
	}
	j.mu.Unlock()
	if due {
		j.appendFrame(frameSynced, nil, 0)
	}
	<-j.writing
	if due {
		j.syncRest()
	}
}

// stopTimer ends the timer, and waits for what it does, or is about to do.
func (j *journal) stopTimer() {
	j.mu.Lock()
	j.timerEnded = true
	if j.timer != nil && j.timer.Stop() {
		j.ticks.Done()
	}
	j.mu.Unlock()
	j.ticks.Wait()
}
