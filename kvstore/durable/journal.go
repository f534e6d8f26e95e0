package durable

import (
	"errors"
	"time"
)

// fail keeps the first error. It returns what is kept.
func (d *Store) fail(err error) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.err == nil {
		d.err = err
	}
	return d.err
}

// failure returns the first error.
func (d *Store) failure() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.err
}

// writeFrame writes a frame of what is pending.
func (d *Store) writeFrame(kind uint32) {
	d.writing <- struct{}{}
	d.appendFrame(kind, d.pending, d.count)
	d.size, d.room = d.current.size, d.current.room()
	<-d.writing
	d.pending, d.count = d.pending[:0], 0
	if cap(d.pending) > 4*maxFramePut {
		d.pending = nil
	}
}

// appendFrame writes a frame. The caller has writing.
func (d *Store) appendFrame(kind uint32, payload []byte, count uint32) {
	d.mu.Lock()
	f := frame{sequence: d.sequence + 1, synced: d.synced, count: count, kind: kind}
	w, err := d.current, d.err
	d.mu.Unlock()
	if err != nil {
		return
	}
	reserve := d.reserve
	if kind != frameRecords {
		reserve = 0 // nothing may follow for long
	}
	if err := w.append(f, payload, reserve); err != nil {
		d.fail(err)
	}
	d.mu.Lock()
	d.sequence = f.sequence // only now: a sync meanwhile has not synced it
	d.vouched = kind != frameRecords
	d.mu.Unlock()
}

// syncRest makes everything written so far durable, if it is not: after reads alone
// there is nothing to do. The timer calls it too, but one fsync runs at a time: Linux
// tells of a failed write once, to one of two, and the other would believe that all is
// on disk.
func (d *Store) syncRest() error {
	d.fsyncs <- struct{}{}
	defer func() { <-d.fsyncs }()
	d.mu.Lock()
	w, sequence, err := d.current, d.sequence, d.err
	done := d.synced >= sequence
	d.mu.Unlock()
	if done || err != nil {
		return err
	}
	d.syncing.Store(&w.path)
	began := time.Now()
	err = w.sync()
	d.opts.Status.Fsyncs.Observe(time.Since(began).Seconds())
	d.syncing.Store(nil)
	d.mu.Lock()
	defer d.mu.Unlock()
	if err != nil && d.err == nil {
		d.err = err
	}
	if d.err == nil {
		d.synced = max(d.synced, sequence)
	}
	return d.err
}

// rotate goes on in a new file. The old one's last frame says so; until that is
// written nothing has changed, so what fails before, such as a disk without room or
// a missing descriptor, leaves the store in the old file.
func (d *Store) rotate() error {
	d.writing <- struct{}{}
	defer func() { <-d.writing }()
	if err := d.lock.Held(); err != nil {
		return err
	}
	defer d.syncing.Store(nil)
	if err := d.syncRest(); err != nil { // the timer may have written a frame
		return err
	}
	next := d.dir.Path(logName(kindSegment, d.number+1))
	d.syncing.Store(&next)
	h := fileHeader{kind: kindSegment, id: d.id, number: d.number + 1, first: d.sequence + 2}
	w, err := d.nextSegment(h)
	if err != nil {
		d.rotateAfter = time.Now().Add(rotateTime)
		d.log.Warn("cannot go on in a new file, so the old one grows; trying again", "error", err)
		return nil
	}
	d.appendFrame(frameNext, nil, 0)
	if err := d.syncRest(); err != nil {
		return errors.Join(err, w.f.Close())
	}
	d.fsyncs <- struct{}{} // the timer's has ended, and the next is of the new file
	defer func() { <-d.fsyncs }()
	old := d.current
	d.syncing.Store(&old.path)
	if err := errors.Join(old.trim(0), old.f.Close()); err != nil {
		return errors.Join(err, w.f.Close())
	}
	d.fullBytes += old.size
	d.mu.Lock()
	d.current, d.number = w, d.number+1
	d.mu.Unlock()
	d.size, d.room, d.first = w.size, w.room(), h.first
	d.learn(logName(kindSegment, d.number-1), logName(kindSegment, d.number))
	return nil
}

// nextSegment makes the segment behind the current one, if that has room for the frame that
// says so.
func (d *Store) nextSegment(h fileHeader) (*logWriter, error) {
	if d.reserve > 0 {
		err := d.current.extend(frameSize)
		if d.room = d.current.room(); err != nil {
			return nil, err
		}
	}
	return d.newSegment(h)
}

// newSegment makes an empty segment. If it fails none is there, or one that the
// next start takes for what it is.
func (d *Store) newSegment(h fileHeader) (*logWriter, error) {
	name := logName(h.kind, h.number)
	size, err := createLog(d.dir, name, h, noFrames)
	if err != nil {
		return nil, err
	}
	w, err := extendLog(d.dir, name, h, size)
	if err != nil {
		return nil, errors.Join(err, d.dir.Remove(name), d.dir.Sync())
	}
	return w, nil
}

// awaitTimer waits, where the timer's fsync takes longer than it may, for that to
// end: otherwise a stalled disk would let Commits return without bound.
func (d *Store) awaitTimer(now time.Time) error {
	d.mu.Lock()
	underWay, since := d.underWay, d.since
	d.mu.Unlock()
	if d.opts.Fsync > 0 && underWay != nil && now.Sub(since) > d.opts.Fsync {
		<-underWay
	}
	return d.failure()
}

// syncLater starts the timer, if there is something for it to do.
func (d *Store) syncLater() {
	wait := d.opts.Fsync
	switch wait {
	case FsyncNever:
		return
	case FsyncAlways:
		wait = vouchTime
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.timer == nil && d.underWay == nil && d.err == nil && !d.timerEnded &&
		(d.synced < d.sequence || !d.vouched) {
		d.ticks.Add(1)
		d.timer = time.AfterFunc(wait, d.tick)
	}
}

// tick makes what was written durable, and writes a frame that says so: otherwise
// nobody could tell later whether a bad end had ever been on disk. It is the timer's
// goroutine.
func (d *Store) tick() {
	defer d.ticks.Done()
	ended := make(chan struct{})
	d.mu.Lock()
	d.timer, d.underWay, d.since = nil, ended, time.Now()
	d.mu.Unlock()
	if d.syncRest() == nil {
		d.vouch()
	}
	d.mu.Lock()
	d.underWay = nil
	d.mu.Unlock()
	d.syncLater() // before anybody hears that this one has ended
	close(ended)
}

// vouch writes a frame that says that all before it is on disk, if that is so and
// the last frame does not say it. On a full disk the next frame will.
func (d *Store) vouch() {
	d.writing <- struct{}{}
	d.mu.Lock()
	due := d.synced == d.sequence && !d.vouched
	if due && d.reserve > 0 && d.current.room() < frameSize {
		due, d.vouched = false, true
	}
	d.mu.Unlock()
	if due {
		d.appendFrame(frameSynced, nil, 0)
	}
	<-d.writing
	if due {
		d.syncRest()
	}
}

// stopTimer ends the timer, and waits for what it does, or is about to do.
func (d *Store) stopTimer() {
	d.mu.Lock()
	d.timerEnded = true
	if d.timer != nil && d.timer.Stop() {
		d.ticks.Done()
	}
	d.mu.Unlock()
	d.ticks.Wait()
}
