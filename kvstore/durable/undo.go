package durable

import (
	"fmt"
	"strings"

	"kvserver/kvstore/storage"
)

// A cluster of which others take the room, too, can be full at any Commit, whatever it said before.
// Such a Commit must not wait until somebody makes room, because reads would wait with it. So it is
// taken back: its frames from the log, and its changes from memory. Nobody was told of them yet.

// before is what a key held before a change.
type before struct {
	key      string
	values   []string // nil: there was no such key
	deadline int64    // 0: none
}

// mayTakeBack reports whether a Commit that ended with err can be taken back. On a disk that is not
// needed, because Room finds out what room there is. And where Commits are answered before the fsync
// there is no way back.
func (d *Store) mayTakeBack(err error) bool { return d.takesBack() && storage.IsFull(err) }

// takesBack reports whether a Commit can be taken back at all. Then only Commits sync what they
// have written, so that the last frame that is synced is always the end of a Commit.
func (j *journal) takesBack() bool { return j.zerosAhead == 0 && j.fsync == FsyncAlways }

// keep keeps what key holds, before a change. A key that is changed again is kept again: to find out
// would cost more.
func (d *Store) keep(key string) {
	if !d.takesBack() {
		return
	}
	was := before{key: strings.Clone(key), values: d.Get(key)}
	if d.Expiring() > 0 {
		was.deadline, _ = d.Deadline(key)
	}
	d.before = append(d.before, was)
}

// keepOld is keep before a change that does nothing if there is no such key.
func (d *Store) keepOld(key string) {
	if d.takesBack() && d.Count(key) > 0 {
		d.keep(key)
	}
}

// forgetBefore forgets what keep has kept, after a Commit.
func (d *Store) forgetBefore() {
	clear(d.before) // or the values would stay in memory
	d.before = d.before[:0]
}

// takeBack makes the store what it was at the last Commit, for which there is no room, as why says.
// It returns an ErrTakenBack.
func (d *Store) takeBack(why error) error {
	err := d.journal.takeBack()
	if err != nil {
		return err
	}

	// Of a key that was changed several times the first is the one to go back to.
	isBack := map[string]bool{}
	for _, was := range d.before {
		if isBack[was.key] {
			continue
		}
		isBack[was.key] = true
		d.Memory.Delete(was.key)
		for _, value := range was.values {
			d.Memory.Put(was.key, value)
		}
		d.Memory.Expire(was.key, was.deadline)
	}
	d.forgetBefore()
	d.pending, d.count, d.wroteEarly = d.pending[:0], 0, false
	return fmt.Errorf("%w: %w", storage.ErrTakenBack, why)
}

// takeBack takes all frames out of the log that are not synced, after the directory had no room for
// them. Then more can be written.
func (j *journal) takeBack() error {
	j.writing <- struct{}{}
	defer func() { <-j.writing }()
	j.fsyncs <- struct{}{}
	defer func() { <-j.fsyncs }()

	err := j.current.cut(j.safe)
	if err != nil {
		return err
	}

	// The frame that vouches for the last one has no room either: the next Commit's does.
	j.mu.Lock()
	defer j.mu.Unlock()
	j.current.size, j.size, j.written = j.safe, j.safe, j.safe
	j.sequence, j.vouched, j.err = j.synced, true, nil
	return nil
}
