// Package durable has a Memory with a log: what was committed is made again by the next Open.
//
//	store.go    the Store: its operations, Commit, Close
//	journal.go  the end of the log: appending, fsync, the timer, and going on in the next file
//	spare.go    room on the disk, and SPARE, from which a full disk's Deletes get theirs
//	format.go   every byte of every file
//	scan.go     reading one log file, and judging where its good part ends
//	load.go     which files are the store, reading them in their order, and a start
//	compact.go  a snapshot in the place of full files
//	heal.go     files that others remove or change under a running server
//	check.go, repair.go, backup.go  the commands of these names
package durable

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync/atomic"
	"time"

	"kvserver/kvstore"
	"kvserver/kvstore/storage"
)

// Errors of a store.
var (
	// ErrNewer is returned when a newer program wrote the store.
	ErrNewer = errors.New("written by a newer kvserver")
	// ErrOlder is returned when an older program wrote the store, in a format that
	// this one does not read.
	ErrOlder = errors.New("written by an older kvserver")
	// ErrNoStore is returned where a store is to be copied or repaired, and there is none.
	ErrNoStore = errors.New("no store yet: an empty directory")
	// ErrNotEmpty is returned where a store is to be copied or repaired to, and something is there.
	ErrNotEmpty = errors.New("a copy needs a new or an empty directory")
	// ErrSpoiled is returned by Close, and by Room, where others have changed the files, and they cannot
	// be written anew, or by Close where nobody can look whether they have: then not all that was
	// answered may be there.
	ErrSpoiled = errors.New("the files may not be as they were written")
)

// Fsync values other than a time between two fsyncs.
const (
	FsyncAlways time.Duration = 0  // every Commit
	FsyncNever  time.Duration = -1 // when a file is full and at Close; else when the kernel pleases
)

// Options are how a store is kept. The zero value is the safest.
type Options struct {
	// FsyncAlways, FsyncNever, or a time from a Commit to the fsync that covers it. If an fsync takes
	// longer, Commits wait for it. So a power failure takes the Commits of at most twice this time.
	// (They may be older than that by the clock, for nothing is committed while the disk stalls.)
	Fsync  time.Duration
	Log    *slog.Logger    // is told what happened to the files; nil: nobody is
	Status *storage.Status // is told how far Open is, and of fsyncs and compactions; nil: nobody is
}

// Sizes and times of the log.
const (
	maxRecord   = 1 << 31 // bytes of a record's key and values: a frame's length has 32 bits
	recordExtra = 8       // bytes that a record takes beside its key and value, about
	tmpSuffix   = ".tmp"  // of a file that is not whole on disk yet

	// Bytes of a frame beside its records, and of one that the timer may write before it.
	frameMost = 2*frameSize + 64

	// Full files and the snapshot are compacted when they have more than so many times the bytes of
	// the live data.
	maxWaste = 2

	progressTime = time.Second      // between two lines about a long load
	vouchTime    = time.Second      // from a Commit to a frame that says that it is on disk
	rotateTime   = time.Second      // until a new file that could not be made is tried again
	roomTime     = time.Second / 10 // until a full disk is asked for room again
	compactTime  = time.Minute      // until a compaction that failed is tried again, at most a heal, too
	lookTime     = time.Second      // between two looks at what others have done to the files
)

// Store is a KVStore whose Commit returns once everything before it is in a
// log on disk, from which Open makes the same store again. It is not safe for
// concurrent access: one goroutine, its owner, calls its methods, but for those that
// say otherwise.
//
// It has two goroutines of its own: a compaction, which writes a snapshot and removes the full
// files that it stands for, and a timer, which syncs the current file and writes the frames that
// say so. Neither runs twice at a time. (Its lock may have one more.)
//
// Reads are Memory's: nothing is read from disk after Open.
type Store struct {
	*kvstore.Memory
	journal
	lock storage.Lock

	// Records for the next frame.
	pending    []byte
	count      uint32 // of them
	wroteEarly bool   // a frame was written since the last Commit, for pending had become large

	// Room on the disk.
	spare       logWriter // SPARE
	noRoom      error     // why the last write was refused
	refused     int64     // bytes of that write's key and values
	roomAfter   time.Time // before then no write is tried that is as large
	mostRefused int64     // bytes of the largest one since the log said that there is room; 0: none

	// Compaction.
	segmentSize, minCompact int64            // the directory's Sizes
	waste                   int64            // maxWaste, but in tests
	fullBytes               int64            // bytes in full files and the snapshot
	snapshot                uint64           // number of the snapshot; 0: none
	compacted               chan *compaction // is sent the one that runs at its end; nil: none runs
	compactAfter            time.Time        // before then none is tried
	stop                    chan struct{}    // closed by Close: the compaction gives up

	// Looking whether others have changed the files.
	looked     time.Time                // when that was done last
	isSpoiled  bool                     // somebody has changed the current file since: look at once
	healAfter  time.Time                // before then no heal is tried
	healWait   time.Duration            // until the next try, after the last one has failed
	noHeal     error                    // that the last one has failed with: writes are refused
	known      map[string]storage.Stamp // our files, but the current one, as we wrote or read them
	healing    atomic.Bool              // a heal runs; any goroutine may look
	awaiting   atomic.Bool              // a compaction is waited for; any goroutine may look
	toldOthers []string                 // files of others that the log was told of
	isBlind    bool                     // nobody could look, the last time
}

// Open opens the store in dir, which becomes the store's; in an empty directory it makes a new
// store. Other errors than those of this package and of package storage are those of the file
// system. When it refuses what it finds, nothing is changed, and dir is the caller's still.
func Open(ctx context.Context, dir storage.Directory, opts Options) (*Store, error) {
	d := &Store{Memory: kvstore.NewMemory(), looked: time.Now(), waste: maxWaste,
		known: map[string]storage.Stamp{}, stop: make(chan struct{})}
	d.journal = journal{dir: dir, log: cmp.Or(opts.Log, slog.New(slog.DiscardHandler)),
		status: cmp.Or(opts.Status, new(storage.Status)), fsync: opts.Fsync,
		writing: make(chan struct{}, 1), fsyncs: make(chan struct{}, 1)}
	d.segmentSize, d.minCompact, d.zerosAhead = dir.Sizes()

	// Before the lock: what is none of ours is not even locked.
	err := checkNames(dir)
	if err != nil {
		return nil, err
	}

	d.lock, err = dir.Lock(ctx)
	if err != nil {
		return nil, err
	}

	// From here on nobody else writes there.
	err = d.loadIfWritable(ctx)
	if err != nil {
		if d.current != nil {
			d.current.f.Close()
		}
		d.lock.Close()
		return nil, err
	}

	// SPARE is opened, if it is there.
	d.changed()

	// What was loaded may be vouched for by no frame yet.
	d.status.Set("")
	d.syncLater()
	return d, nil
}

// loadIfWritable loads the store from a directory in which files can be made, or whose disk is
// full: that serves reads and Deletes.
func (d *Store) loadIfWritable(ctx context.Context) error {
	noFile := d.tryFile()
	if noFile != nil && !storage.IsFull(noFile) {
		return noFile
	}
	err := d.load(ctx)
	if err != nil || noFile == nil {
		return err
	}

	// Where the current file can grow there is room, but there are too many files.
	err = d.current.makeRoom(int64(d.zerosAhead))
	if err == nil {
		return noFile
	}
	return nil
}

// tryFile makes a file, and removes it. Where that cannot be done the log would grow in one file
// without end.
func (d *Store) tryFile() error {
	name := logName(kindSegment, 0) + tmpSuffix // nothing else uses this one
	f, err := d.dir.Create(name)
	if err == nil {
		err = errors.Join(f.Close(), d.dir.Remove(name))
	}
	if err != nil {
		return fmt.Errorf("no file can be made in the data directory: %w", err)
	}
	return nil
}

// listOurs lists the directory. Where there is anything that is no store's it is somebody else's,
// and refused.
func listOurs(dir storage.Directory) (names []string, err error) {
	names, err = dir.List()
	for _, name := range names {
		if !isStores(name) {
			return nil, fmt.Errorf("%w: %s is none of its files", storage.ErrNotOurs,
				dir.Path(name))
		}
	}
	return names, err
}

// checkNames returns an error if a start refuses what is in the directory before it has read it.
func checkNames(dir storage.Directory) error {
	names, err := listOurs(dir)
	for _, name := range names {
		err = cmp.Or(err, checkFile(dir, name))
	}
	return err
}

// checkFile returns an error if a file that a start locks, or removes without reading it, is no file:
// there a start could fail when it has changed others.
func checkFile(dir storage.Directory, name string) error {
	kind, _, _ := parseName(name)
	if name != storage.LockName && kind != kindSnapshot && !isTmp(name) {
		return nil
	}

	// What cannot be opened may be a file of somebody else's that can be removed.
	f, _, err := dir.Open(name)
	if err == nil {
		f.Close()
	}
	if errors.Is(err, storage.ErrNotOurs) {
		return err
	}
	return nil
}

// isStores tells whether a file called name may be in a store's directory.
func isStores(name string) bool {
	_, _, isLog := parseName(name)
	return isLog || name == storage.StoreName || name == spareName || isTmp(name) || isBeside(name)
}

// isBeside tells whether a file may be in a store's directory that is no part of the store: the
// lock, hidden ones, and what systems put into the volumes that they mount.
func isBeside(name string) bool {
	switch name {
	case storage.LockName, "lost+found", "@eaDir", "#snapshot", "System Volume Information",
		"desktop.ini", "Thumbs.db":
		return true
	}
	return strings.HasPrefix(name, ".") || strings.HasPrefix(name, "aquota.")
}

// Put appends value to key's list.
func (d *Store) Put(key, value string) {
	d.Memory.Put(key, value)
	d.record(opPut, 0, key, value)
}

// Delete removes key and returns how many values it had.
func (d *Store) Delete(key string) (removed int) {
	// What changes nothing is not in the log.
	removed = d.Memory.Delete(key)
	if removed > 0 {
		d.record(opDelete, 0, key)
	}
	return removed
}

// Update removes the first value equal to oldValue and appends newValue.
func (d *Store) Update(key, oldValue, newValue string) (replaced bool) {
	// One that finds nothing to replace is a Put.
	place := d.Memory.UpdateAt(key, oldValue, newValue, -1)
	if place < 0 {
		d.record(opPut, 0, key, newValue)
	} else {
		d.record(opUpdate, place, key, oldValue, newValue)
	}
	return place >= 0
}

// Set makes value key's only one, and returns how many there were.
func (d *Store) Set(key, value string) (removed int) {
	removed = d.Memory.Set(key, value)
	d.record(opSet, 0, key, value)
	return removed
}

// Remove removes the first value equal to value.
func (d *Store) Remove(key, value string) (removed bool) {
	place := d.Memory.RemoveAt(key, value, -1)
	if place >= 0 {
		d.record(opRemove, place, key, value)
	}
	return place >= 0
}

// Take removes key's oldest value.
func (d *Store) Take(key string) (value string, ok bool) {
	value, ok = d.Memory.Take(key)
	if ok {
		d.record(opTake, 0, key)
	}
	return value, ok
}

// Expire has key go at a time, in milliseconds of Unix time; 0: it stays.
func (d *Store) Expire(key string, at int64) (ok bool) {
	at = writable(at)
	ok = d.Memory.Expire(key, at)
	if ok {
		d.note(appendExpire(d.pending, key, at), 1)
	}
	return ok
}

// PutUntil is Put and Expire in one step: both are in one frame. In the log it takes room for the
// key twice.
func (d *Store) PutUntil(key, value string, at int64) {
	at = writable(at)
	d.Memory.PutUntil(key, value, at)
	d.note(appendExpire(appendRecord(d.pending, opPut, 0, key, value), key, at), 2)
}

// writable is at, but for times before 1970, which the log cannot say. These are over, and so is
// the one that takes their place.
func writable(at int64) int64 {
	if at < 0 {
		return 1
	}
	return at
}

// record notes an operation for the next Commit.
func (d *Store) record(op byte, place int, fields ...string) {
	d.note(appendRecord(d.pending, op, place, fields...), 1)
}

// note makes pending what is to be in the next frame, which has so many records more. When that is
// much it is written before the Commit: a frame is bounded. Where one cannot have it the store
// ends, for memory has what the log cannot have.
func (d *Store) note(pending []byte, records uint32) {
	size := int64(len(pending) - len(d.pending))
	if size > maxRecord {
		d.fail(errTooLarge(size))
	}
	d.pending = pending
	d.count += records

	// The Commit has to sync this frame, too.
	if int64(len(d.pending)) >= min(maxFramePut, d.segmentSize) {
		d.writeFrame(frameRecords)
		d.wroteEarly = true
	}
}

// errTooLarge is the error of a record that does not fit a frame.
func errTooLarge(bytes int64) error {
	return fmt.Errorf("a record of %d bytes is too large", bytes)
}

// writeFrame writes a frame of what is pending. If that fails the store has failed, which the next
// sync finds.
func (d *Store) writeFrame(kind uint32) {
	// Size and room are copied, for the timer may write as soon as it can.
	d.writing <- struct{}{}
	d.appendFrame(kind, d.pending, d.count)
	d.size, d.room, d.isSpoiled = d.current.size, d.current.room(), d.current.isSpoiled
	<-d.writing

	d.pending, d.count = d.pending[:0], 0
	if cap(d.pending) > 4*maxFramePut {
		d.pending = nil // one huge record does not keep its memory for ever
	}
}

// Syncing returns the path of a file for which the store waits: the disk has not confirmed what was
// done to it, or once Close has ended, what was done last. "" is none. Any goroutine may call it. A
// nil Store has none.
func (d *Store) Syncing() string {
	switch {
	case d == nil:
		return ""
	case d.healing.Load() || d.awaiting.Load():
		return d.dir.Path("the snapshot of a compaction")
	case len(d.writing)+len(d.fsyncs) > 0:
		d.mu.Lock()
		defer d.mu.Unlock()
		return d.current.path
	}
	return ""
}

// IsHealing tells whether all data is being written anew, which may take long, and is worth
// waiting for. Any goroutine may call it. A nil Store never does that.
func (d *Store) IsHealing() bool { return d != nil && d.healing.Load() }

// Lost is closed when the store is lost to another process, or its directory was moved; then
// Commit fails. It is nil where that cannot be, as of a nil Store.
func (d *Store) Lost() <-chan struct{} {
	if d == nil {
		return nil
	}
	return d.lock.Lost()
}

// WhyLost is the error that closed Lost. Any goroutine may call it after that.
func (d *Store) WhyLost() error { return d.lock.Held() }

// Commit returns once everything done to the store is as durable as Options.Fsync says. After
// an error it is unknown what since the last Commit (or, where that does not wait for it, since
// the last fsync) is on disk; nothing is written any more, and every Commit fails. About once a
// second, and where the last frame has gone, it looks whether others have removed or changed the
// files, and writes all data anew if so: that takes as long as a compaction, and everybody waits for
// it.
func (d *Store) Commit() error {
	err := d.commit()
	if err != nil {
		return err
	}

	now := time.Now()
	if d.isSpoiled || now.Sub(d.looked) >= lookTime {
		d.looked, d.isSpoiled = now, false
		d.lookForFiles(now)
		err = d.failure()
		if err != nil {
			return err
		}
	}

	// Last, for what was read is the truth only while nobody else can write.
	return d.held()
}

// held returns an error if the store is not ours any more. If files are gone they are written anew
// first: before that nothing may be answered.
func (d *Store) held() error {
	err := d.lock.Held()
	if errors.Is(err, storage.ErrGone) {
		d.AwaitCompaction() // it removes files, too
		err = d.lastLook()
		if err == nil {
			err = d.lock.Held()
		}
	}
	if err != nil {
		return d.fail(err)
	}
	return nil
}

// commit is Commit, but for the lock and the look at the files.
func (d *Store) commit() error {
	err := d.failure()
	if err != nil {
		return err
	}

	// Nothing to write: what was read is as durable as what was written before. But a log that is
	// much larger than what it holds is compacted also where nothing is written. Where the current
	// file is empty, all is in full files.
	wasteful, idle := d.isWasteful(), d.count == 0 && !d.wroteEarly
	if idle && !wasteful {
		return nil
	}
	if idle && d.size == headerSize {
		d.compact()
		return nil
	}

	// Write, then wait for the disk as Options.Fsync says. A file that is full is on disk before
	// the next one begins. (On a full disk the old one grows: what is left of the room is for what
	// frees.)
	now := time.Now()
	d.wroteEarly = false
	if d.count > 0 {
		d.writeFrame(frameRecords)
	}
	full := (d.size >= d.segmentSize && !d.isFull || wasteful) && !now.Before(d.rotateAfter)
	if d.fsync == FsyncAlways || full {
		err = d.syncRest()
	} else {
		err = d.awaitTimer(now)
	}
	if err != nil {
		return err
	}

	// Go on in a new file. Then all that the store holds is in full ones, and can be compacted.
	if full {
		isNew, err := d.rotate()
		if err != nil {
			return err
		}
		if isNew {
			d.compact()
		}
	}

	// What was not waited for is the timer's, and so is the frame that vouches for it.
	d.syncLater()
	return nil
}

// rotate goes on in a new file, or where none can be made in the old one. After an error the store
// has failed: the old file may be closed, and end with a frame behind which nothing may stand.
func (d *Store) rotate() (isNew bool, err error) {
	// Files that are gone do not keep it from that: a heal begins with a rotation.
	err = d.lock.Held()
	if err != nil && !errors.Is(err, storage.ErrGone) {
		return false, d.fail(err)
	}

	full, err := d.goOn()
	if err != nil {
		return false, d.fail(err)
	}
	if full == nil {
		return false, nil
	}

	// The next look has to see what somebody has done to the old file, or does to it from here on.
	d.fullBytes += full.size
	d.known[full.header.name()] = full.lastStamp()
	full.f.Close() // all of it is on disk
	return true, nil
}

// Close ends the store: what was done is made durable whatever Options.Fsync says, a last frame
// says so if the disk has room for it, and the lock is free. After a failed Commit it writes
// nothing more. It is called once.
func (d *Store) Close() error {
	// First what was answered, for to wait for a compaction may take long.
	close(d.stop)
	err := d.Commit()
	if err == nil {
		err = d.syncRest()
	}
	d.AwaitCompaction()

	// The last moment at which a heal has the data. The timer ends after it, for a heal syncs.
	if err == nil {
		err = d.lastLook()
	}
	if errors.Is(err, ErrSpoiled) {
		err = d.lastLook() // what failed once may not fail again
	}
	if err == nil {
		err = d.held()
	}
	d.stopTimer()

	// Without this frame the next start is as after a crash, and that is no error.
	if err == nil {
		err = d.writeCleanStop()
	}

	// On a full disk the room that is cut off goes to SPARE, for Deletes after the next start.
	d.writing <- struct{}{}
	if err == nil {
		err = d.current.trim()
	} else {
		d.current.sync() // what was answered may have waited for the timer
	}
	<-d.writing

	// Nothing can be mended any more, but told.
	if err == nil {
		err = d.isWhole()
	}
	d.writing <- struct{}{} // from here on nobody writes
	if err == nil && d.isFull {
		d.growSpare(d.toDelete(0))
	}
	if d.spare.f != nil {
		err = errors.Join(err, d.spare.f.Close())
	}
	return errors.Join(err, d.current.f.Close(), d.lock.Close(), d.dir.Close())
}

// isWhole returns an error if files of the store are not as they were written.
func (d *Store) isWhole() error {
	c, err := d.changed()
	if err == nil && len(c.spoiled) > 0 {
		err = fmt.Errorf("%w: %s", ErrSpoiled, strings.Join(c.spoiled, ", "))
	}
	return err
}

// writeCleanStop writes the frame that says that the store was closed, syncs it, and looks once
// more whether the store is ours. It does nothing where the disk has no room for it, and for the
// frame that says that another file follows.
func (d *Store) writeCleanStop() error {
	err := d.dir.RoomFor(2*frameSize, true)
	if d.zerosAhead > 0 {
		err = d.current.makeRoom(2 * frameSize)
	}
	switch {
	case storage.IsFull(err):
		return nil
	case err != nil:
		return err
	}

	// A flipped bit in front of this frame is damage at the next start, never a torn end.
	d.writeFrame(frameCleanStop)
	return errors.Join(d.syncRest(), d.lock.Held())
}

// AwaitCompaction waits for the compaction that runs, if one does, and takes it into account.
func (d *Store) AwaitCompaction() {
	if d.compacted == nil {
		return
	}

	d.awaiting.Store(true)
	defer d.awaiting.Store(false)
	d.noteCompaction(<-d.compacted)
}
