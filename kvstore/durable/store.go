// Package durable has a Memory with a log: what was committed is made again by the next Open.
//
//	store.go    the Store: its operations, Commit, Close
//	journal.go  who appends to the log, syncs it, and goes on in the next file
//	format.go   every byte of every file
//	load.go     reading at a start
//	compact.go  a snapshot in the place of full files
//	heal.go     files that were removed under a running server
//	check.go, repair.go, backup.go  the commands of these names
package durable

import (
	"context"
	"errors"
	"fmt"
	"kvserver/kvstore"
	"kvserver/kvstore/storage"
	"log/slog"
	"slices"
	"strings"
	"sync/atomic"
	"time"
)

// Errors of a store.
var (
	// ErrNewer is returned when a newer program wrote the store.
	ErrNewer = errors.New("written by a newer kvserver")
	// ErrOlder is returned when an older program wrote the store, in a format that
	// this one does not read.
	ErrOlder = errors.New("written by an older kvserver")
)

// Fsync values other than a time between two fsyncs.
const (
	FsyncAlways time.Duration = 0  // every Commit
	FsyncNever  time.Duration = -1 // when a file is full and at Close; else when the kernel pleases
)

// Options are how a store is kept. The zero value is the safest.
type Options struct {
	// FsyncAlways, FsyncNever, or a time from a Commit to the fsync that covers it. (Where fsyncs
	// take longer, the Commits of twice that time may be off the disk.)
	Fsync  time.Duration
	Log    *slog.Logger    // what happened to the files; nil: nobody wants to know
	Status *storage.Status // nil: nobody looks
}

// Sizes and times of the log.
const (
	maxRecord    = 1 << 31 // bytes of a record's key and values: a frame's length has 32 bits
	recordExtra  = 8       // bytes that a record takes beside its key and value, about
	tmpSuffix    = ".tmp"
	progressTime = time.Second      // between two lines about a long load
	vouchTime    = time.Second      // after a Commit, until a frame says that all before it is on disk
	rotateTime   = time.Second      // until a file that could not be made is tried again
	roomTime     = time.Second / 10 // until it is tried again whether a full disk has room
	maxWaste     = 2                // times the live data, that full files hold, until they are compacted
	compactTime  = time.Minute      // until a compaction that failed is, or a heal
	lookTime     = time.Second      // between two looks whether the files are there

	// Bytes of a frame beside its records, and of one that the timer may write before it.
	frameMost = 2*frameSize + 64
)

// Store is a KVStore whose Commit returns once everything before it is in a
// log on disk, from which Open makes the same store again. It is not safe for
// concurrent access. It has two goroutines of its own: a compaction, which only
// touches files that are full, and a timer, which syncs the current file and writes
// the frames that say so. Neither runs twice at a time. (Its lock may have one more.)
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
	spare     spareFile
	noRoom    error     // why the last write was refused
	refused   int64     // its bytes
	roomAfter time.Time // none that is as large is taken before

	// Compaction.
	segmentSize, minCompact int64  // the directory's Sizes
	waste                   int64  // maxWaste, but in tests
	fullBytes               int64  // bytes in full files and the snapshot
	snapshot                uint64 // number of the snapshot; 0: none
	// the running compaction's end, one slot; nil: none runs
	compacted    chan compactionEnd
	compactAfter time.Time     // none is tried before
	stop         chan struct{} // closed by Close: the compaction gives up

	// Looking whether others have changed the files.
	looked    time.Time                // when that was done last
	healAfter time.Time                // what is spoiled is not written anew before
	known     map[string]storage.Stamp // what the files were when we had done something to them
	lastSeen  seenFrame                // in the current file
	unhealed  []string                 // files of ours whose heal has failed
	// files of others that were told of
	toldStrangers, toldLeftovers []string
	healing                      atomic.Bool // heal runs
}

// Open opens the store in dir, which becomes the store's; in an empty directory it makes a new
// store. Other errors than those of this package and of package storage are those of the file
// system. When it refuses what it finds, nothing is changed, and dir is the caller's still.
func Open(ctx context.Context, dir storage.Directory, opts Options) (*Store, error) {
	d := &Store{Memory: kvstore.NewMemory(), looked: time.Now(), waste: maxWaste,
		stop: make(chan struct{}), journal: journal{dir: dir, log: opts.Log, status: opts.Status,
			fsync: opts.Fsync, writing: make(chan struct{}, 1), fsyncs: make(chan struct{}, 1)}}
	d.segmentSize, d.minCompact, d.zerosAhead = dir.Sizes()
	if d.log == nil {
		d.log = slog.New(slog.DiscardHandler)
	}
	if d.status == nil {
		d.status = new(storage.Status)
	}
	names, err := dir.List()
	if err != nil {
		return nil, err
	}
	if err := checkNames(dir, names); err != nil {
		return nil, err
	}
	if d.lock, err = dir.Lock(ctx); err != nil {
		return nil, err
	}
	noFile := d.tryFile()
	if err = noFile; err == nil || storage.IsFull(err) {
		err = d.load(ctx)
	}
	if noFile != nil && err == nil && d.current.makeRoom(int64(d.zerosAhead)) == nil {
		err = noFile // there is room, but no new file can be made: there are too many
	}
	if err != nil {
		if d.current != nil {
			d.current.f.Close()
		}
		d.lock.Close()
		return nil, err
	}
	d.learn(d.ownFiles()...)
	if d.spare, err = openSpare(dir); err != nil {
		d.log.Warn("cannot open the file that keeps room for what frees", "error", err)
	}
	d.status.Set("")
	d.syncLater()
	return d, nil
}

// tryFile makes a file, and removes it. Where that cannot be done the log would grow in one file
// without end.
func (d *Store) tryFile() error {
	name := logName(kindSegment, 0) + tmpSuffix // which nothing else uses
	f, err := d.dir.Create(name)
	if err == nil {
		err = errors.Join(f.Close(), d.dir.Remove(name))
	}
	if err != nil {
		return fmt.Errorf("no file can be made in the data directory: %w", err)
	}
	return nil
}

// checkNames refuses a directory that is somebody else's.
func checkNames(dir storage.Directory, names []string) error {
	for _, name := range names {
		if _, _, isLog := parseName(name); !isLog && name != storage.StoreName &&
			name != spareName && !isTmp(name) && !isBeside(name) {
			return fmt.Errorf("%w: %s is none of its files", storage.ErrNotOurs, dir.Path(name))
		}
	}
	return nil
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
	if removed = d.Memory.Delete(key); removed > 0 {
		d.record(opDelete, 0, key)
	}
	return removed
}

// Update removes the first value equal to oldValue and appends newValue.
func (d *Store) Update(key, oldValue, newValue string) (replaced bool) {
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
	if value, ok = d.Memory.Take(key); ok {
		d.record(opTake, 0, key)
	}
	return value, ok
}

// Expire has key go at a time; 0: it stays.
func (d *Store) Expire(key string, at int64) (ok bool) {
	at = writable(at)
	if ok = d.Memory.Expire(key, at); ok {
		d.note(appendExpire(d.pending, key, at), 1)
	}
	return ok
}

// PutUntil is Put and Expire in one step: both are in one frame.
func (d *Store) PutUntil(key, value string, at int64) {
	at = writable(at)
	d.Memory.PutUntil(key, value, at)
	d.note(appendExpire(appendRecord(d.pending, opPut, 0, key, value), key, at), 2)
}

// writable is at, or of the times before 1970, which the log cannot say, the next one that it can:
// both are over.
func writable(at int64) int64 {
	if at < 0 {
		return 1
	}
	return at
}

// record notes an operation for the next Commit.
func (d *Store) record(op byte, place int, fields ...string) {
	if size := int64(sizeOf(fields)); size > maxRecord {
		d.fail(errTooLarge(size))
		return
	}
	d.note(appendRecord(d.pending, op, place, fields...), 1)
}

// note makes pending what is to be in the next frame, with so many records more, and writes that
// when it is much.
func (d *Store) note(pending []byte, records uint32) {
	d.pending = pending
	d.count += records
	if int64(len(d.pending)) >= min(maxFramePut, d.segmentSize) {
		d.writeFrame(frameRecords)
		d.wroteEarly = true
	}
}

// errTooLarge is the error of a record that does not fit a frame.
func errTooLarge(bytes int64) error { return fmt.Errorf("a record of %d bytes is too large", bytes) }

// sizeOf is how many bytes fields have together.
func sizeOf(fields []string) (bytes int) {
	for _, f := range fields {
		bytes += len(f)
	}
	return bytes
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

// Syncing returns the path of a file that the disk has not confirmed yet, or "". Other
// goroutines may call it. A nil Durable has none.
func (d *Store) Syncing() string {
	if d == nil {
		return ""
	}
	if path := d.syncing.Load(); path != nil {
		return *path
	}
	return ""
}

// IsHealing tells whether all data is being written anew, which may take long, and is worth
// waiting for. Other goroutines may ask. A nil Durable never does that.
func (d *Store) IsHealing() bool { return d != nil && d.healing.Load() }

// Lost is closed when the store is lost to another process, or its directory was moved; then
// Commit fails. It is nil where that cannot be, as of a nil Durable.
func (d *Store) Lost() <-chan struct{} {
	if d == nil {
		return nil
	}
	return d.lock.Lost()
}

// WhyLost is the error that closed Lost. Any goroutine may ask, after that.
func (d *Store) WhyLost() error { return d.lock.Held() }

// Commit returns once everything done to the store is as durable as Options.Fsync says. After
// an error it is unknown what since the last Commit (or, where that does not wait for it, since
// the last fsync) is on disk; nothing is written any more, and every Commit fails. About once a
// second it looks whether all files are there, and writes them anew where they are not: that
// takes as long as a compaction, and everybody waits for it.
func (d *Store) Commit() error {
	err := d.commit()
	if now := time.Now(); err == nil && now.Sub(d.looked) >= lookTime {
		d.looked = now
		err = d.lookForFiles(now)
	}
	if err == nil { // what was read is the truth only while nobody else can write
		err = d.held()
	}
	return err
}

// held tells whether the store is ours still, and there: if files are gone they are written anew
// before anything is answered.
func (d *Store) held() error {
	err := d.lock.Held()
	if errors.Is(err, storage.ErrGone) {
		d.AwaitCompaction() // it removes files, too
		if err = d.lastLook(); err == nil {
			err = d.lock.Held()
		}
	}
	if err != nil {
		return d.fail(err)
	}
	return nil
}

// commit is Commit, but for the lock.
func (d *Store) commit() error {
	// A log that is much larger than what it holds is compacted, also where nothing is written.
	wasteful, idle := d.isWasteful(), d.count == 0 && !d.wroteEarly
	if err := d.failure(); err != nil || idle && !wasteful {
		return err
	}
	if idle && d.size == headerSize {
		d.compact() // the current file is empty, so all is in full ones
		return nil
	}
	d.wroteEarly = false
	now := time.Now()
	if d.count > 0 {
		d.writeFrame(frameRecords)
	}
	// On a full disk the old file grows: what is left of the room is for what frees.
	full := (d.size >= d.segmentSize && !d.isFull || wasteful) && !now.Before(d.rotateAfter)
	var err error
	if d.fsync == FsyncAlways || full {
		err = d.syncRest()
	} else {
		err = d.awaitTimer(now)
	}
	if err != nil {
		return err
	}
	if number := d.number; full {
		if err := d.rotate(); err != nil {
			return err
		}
		if d.number > number { // all that the store holds is in full files
			d.compact()
		}
	}
	d.syncLater()
	return nil
}

// rotate goes on in a new file. Where none can be made it returns nil, and the log goes on in the
// old one. After an error the store has failed: the old file may be closed, and end with a frame
// behind which nothing may stand.
func (d *Store) rotate() error {
	if err := d.lock.Held(); err != nil && !errors.Is(err, storage.ErrGone) {
		return d.fail(err)
	}
	found, _ := d.changed() // if that is not known, nothing is
	full, err := d.goOn()
	if err != nil {
		return d.fail(err)
	}
	if full == 0 {
		return nil
	}
	d.fullBytes += full

	// A file that somebody has changed since the last look is not learned: the next look is to see it.
	written := []string{logName(kindSegment, d.number)}
	if old := logName(kindSegment, d.number-1); !slices.Contains(found.spoiled, old) {
		written = append(written, old)
	}
	d.learn(written...)
	return nil
}

// Close ends the store: what was done is made durable whatever Options.Fsync says, a last frame
// tells so if the disk has room for it, and the lock is free. After a failed Commit it writes
// nothing.
func (d *Store) Close() error {
	close(d.stop)
	err := d.Commit()
	if err == nil {
		err = d.syncRest()
	}
	d.endCompaction()
	if err == nil {
		err = d.lastLook()
	}
	if err == nil {
		err = d.held()
	}
	d.stopTimer()
	if err == nil {
		if d.zerosAhead > 0 {
			err = d.current.makeRoom(frameSize)
		}
		if err == nil {
			d.writeFrame(frameCleanStop)
			err = errors.Join(d.syncRest(), d.lock.Held())
		} else if storage.IsFull(err) {
			err = nil // all is on disk; the next start is as after a crash
		}
	}
	d.syncing.Store(&d.current.path)
	if err == nil {
		err = d.current.trim()
	}
	if d.isFull { // what was cut off is the next start's to delete with
		d.spare.grow(d.dir, d.toDelete(0), int64(d.zerosAhead))
	}
	return errors.Join(err, d.current.f.Close(), d.spare.close(), d.lock.Close(), d.dir.Close())
}

// AwaitCompaction waits for the compaction that runs, if one does, and takes it into account.
func (d *Store) AwaitCompaction() {
	if d.compacted != nil {
		d.noteCompaction(<-d.compacted)
	}
}

// endCompaction waits for the compaction that runs.
func (d *Store) endCompaction() {
	if d.compacted != nil {
		snapshot := d.dir.Path("the snapshot of a compaction")
		d.syncing.Store(&snapshot)
		d.noteCompaction(<-d.compacted)
		d.syncing.Store(nil)
	}
}
