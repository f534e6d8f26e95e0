// Package durable has a Memory with a write-ahead log: Open restores what was committed.
//
//	store.go    the Store: its operations, Commit, Close
//	journal.go  the end of the log: appending, fsync, the timer, and going on in the next file
//	spare.go    room on the disk, and SPARE, whose room goes to what frees some on a full disk
//	format.go   every byte of every file
//	scan.go     reading one log file, and judging where its good part ends
//	load.go     which files make the store, reading them in order, and a start
//	compact.go  a snapshot replaces full files
//	heal.go     files that others remove or change while the server runs
//	check.go, repair.go, backup.go  the commands of these names
//
// The glossary:
//
//	log      the data's, seg-N.log, also called the journal; only Options.Log is for people. A log
//	         file is one of its files, or a snapshot
//	frame    records of one Commit, or of a snapshot, or a part of them, with a checksum; a frame
//	         without records says what is on disk, or how the file ends
//	segment  a file of the log, seg-N.log. A full one is finished: the log goes on in the next.
//	         Compaction replaces full ones by one snapshot file, snap-N.log
//	spoiled  a file that somebody else has changed or removed; a heal writes all data again
package durable

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"kvserver/kvstore"
	"kvserver/kvstore/storage"
)

// Errors of a store.
var (
	// ErrNewer is returned when a newer program wrote the store.
	ErrNewer = storage.NewError("written by a newer kvserver",
		"Nothing was changed. Start the newer kvserver.")
	// ErrOlder is returned when an older program wrote the store in a format that
	// this one cannot read.
	ErrOlder = storage.NewError("written by an older kvserver", "Nothing was changed. Start the older "+
		"kvserver, and have the data written as text: kvserver -c -out FILE Dump")
	// ErrNoStore is returned by Backup and Repair when the directory to read has no store, and by
	// kvserver check if that is in etcd.
	ErrNoStore = storage.NewError("no store", "Give what the server has as -data.")
	// ErrNotEmpty is returned by Backup and Repair when the directory to write is not empty.
	ErrNotEmpty = storage.NewError("a copy needs a new or an empty directory",
		"Nothing was copied. Give another directory for the copy.")
	// ErrSpoiled is returned by Close, by Room and, in etcd, by Commit when others have changed the
	// files and the data could not be written again, and by Close when it could not find out
	// whether they have. Then answered data may be missing on disk.
	ErrSpoiled = storage.NewError("the files may not be as they were written",
		"Something may be lost. Look what is there: kvserver check DIR")
	// ErrOthers is returned by Close when files for which the next start is refused are in the
	// directory, and are not the store's to remove, or cannot be removed.
	ErrOthers = storage.NewError("files that do not belong to the store are in its directory",
		"Nothing is lost. Take these files out, then start again: before that a start is refused.")
)

// Values of Options.Fsync that are not a time between two fsyncs.
const (
	FsyncAlways time.Duration = 0  // at every Commit
	FsyncNever  time.Duration = -1 // only when a file is full and at Close; the kernel does the rest
)

// ParseFsync returns the value of Options.Fsync that text stands for: always, never, or a time from
// 1ms to 1h. ok says whether it is one of these.
func ParseFsync(text string) (fsync time.Duration, ok bool) {
	switch text {
	case "always":
		return FsyncAlways, true
	case "never":
		return FsyncNever, true
	}

	// One under a millisecond would be the same as always.
	fsync, err := time.ParseDuration(text)
	return fsync, err == nil && fsync >= time.Millisecond && fsync <= time.Hour
}

// Options say how a store is kept. The zero value is the safest.
type Options struct {
	// FsyncAlways, FsyncNever, or the time from a Commit to the fsync that covers it. If an fsync
	// takes longer, Commits wait for it. So a power failure loses the Commits of at most twice this
	// time. (By the clock they may be older, because nothing is committed while the disk stalls.)
	Fsync  time.Duration
	Log    *slog.Logger    // gets lines about what happens to the files; nil: none
	Status *storage.Status // gets Open's progress, fsyncs and compactions; nil: nothing is noted
}

// Sizes and times of the log.
const (
	maxRecord   = 1 << 31 // bytes that one request adds to a frame, whose length has 32 bits
	recordExtra = 8       // bytes that a record takes beside its key and value, roughly
	tmpSuffix   = ".tmp"  // ends the name of a file that is not yet whole on disk

	// Bytes of a frame beside its records, and of a frame that the timer may write before it.
	frameMost = 2*frameSize + 64

	// Full files and the snapshot are compacted only when they have more than this many times the
	// bytes of the live data, except by a heal.
	maxWaste = 2

	progressTime = time.Second      // between two log lines about a long load
	vouchTime    = time.Second      // with FsyncAlways, from a Commit to a frame that vouches
	rotateTime   = time.Second      // before the next try of a new file, or of mostRefused (Room)
	roomTime     = time.Second / 10 // before a full disk is asked for room again
	retryTime    = time.Minute      // until the next try of a compaction; of a heal: at most this
	lookTime     = time.Second      // between two checks of what others have done to the files
	readTime     = 2 * time.Second  // for Close to read the current file again
)

// Store is a kvstore.Store whose Commit returns once everything before it is in a log, as durable
// as Options.Fsync says. From the log Open restores the same store. A Store is not safe for
// concurrent access: one goroutine, its owner, calls its methods, except those that say otherwise.
//
// It has two goroutines of its own: a compaction, which writes a snapshot and removes the full
// files that this replaces, and a timer, which syncs the current file and writes frames that say
// what is on disk. There is at most one of each at a time. (The lock may have goroutines, too.)
//
// Reads are Memory's. After Open files are read only to see what others have done to them.
type Store struct {
	*kvstore.Memory
	journal
	lock storage.Lock

	// Records for the next frame.
	pending  []byte
	count    uint32 // of these records
	owesSync bool   // a frame was written that no Commit has waited for yet, or not with success

	// Room on the disk.
	spare       logWriter // SPARE
	toldNoSpare bool      // it was logged that SPARE cannot be opened
	noRoom      error     // why the last write was refused
	refused     int64     // bytes of that write's key and values
	roomAfter   time.Time // until then no write as large is tried; nor mostRefused, if others fit
	mostRefused int64     // bytes of the largest write refused since all were taken; 0: none
	noDelete    refusal   // the last refused request that removes its key
	noRemove    refusal   // the last refused Remove or Take that leaves values

	// Compaction.
	segmentSize, minCompact int64            // the directory's Sizes
	fullBytes               int64            // bytes in full files and the snapshot
	snapshot                uint64           // number of the snapshot; 0: none
	compacted               chan *compaction // a compaction sends itself at its end; nil: none runs
	compactAfter            time.Time        // until then no compaction is tried
	stop                    chan struct{}    // closed by Close: the compaction gives up

	// What others have done to the files.
	lookAfter  time.Time                // until then the files are not checked
	healWait   time.Duration            // from the last failed heal to the next try
	noHeal     error                    // why the last heal failed: writes are refused
	stamps     map[string]storage.Stamp // of our files, except the current one, as we wrote or read them
	healing    atomic.Bool              // a heal runs, or waits; any goroutine may read it
	awaiting   atomic.Bool              // the owner waits for a compaction; any goroutine may read it
	toldOthers []string                 // files of others that were logged
	isBlind    bool                     // the last check of the files failed
}

// Open opens the store in dir; in an empty directory it makes a new store. The store then owns dir
// and closes it. Errors are those of this package, of package storage and of dir. If Open refuses
// what it finds, it has changed nothing but the lock, and dir still belongs to the caller.
func Open(ctx context.Context, dir storage.Directory, opts Options) (*Store, error) {
	d := &Store{Memory: kvstore.NewMemory(), lookAfter: time.Now().Add(lookTime),
		stamps: map[string]storage.Stamp{}, stop: make(chan struct{})}
	d.journal = journal{dir: dir, log: cmp.Or(opts.Log, slog.New(slog.DiscardHandler)),
		status: cmp.Or(opts.Status, new(storage.Status)), fsync: opts.Fsync,
		writing: make(chan struct{}, 1), fsyncs: make(chan struct{}, 1)}

	// Before the lock: a directory that is not a store's is not even locked.
	err := checkNames(dir)
	if err != nil {
		return nil, err
	}

	d.lock, err = dir.Lock(ctx)
	if err != nil {
		return nil, err
	}

	// From here on nobody else writes to the directory.
	d.segmentSize, d.minCompact, d.zerosAhead = dir.Sizes()
	err = d.loadIfWritable(ctx)
	if err != nil {
		if d.current != nil {
			d.current.f.Close()
		}
		d.lock.Close()
		return nil, err
	}

	// This opens SPARE, if it is there.
	d.changed()

	// Perhaps no frame says yet that all that was loaded is on disk.
	d.status.Set("")
	d.syncLater()
	return d, nil
}

// loadIfWritable loads the store if files can be made in its directory, or if its disk is
// full: then reads and Deletes still work.
func (d *Store) loadIfWritable(ctx context.Context) error {
	noFile := d.tryFile()
	if noFile != nil && !storage.IsFull(noFile) {
		return noFile
	}
	err := d.load(ctx)
	if err != nil || noFile == nil {
		return err
	}

	// If the current file can grow, the disk is not full: there are too many files.
	err = d.current.writeZeros(int64(d.zerosAhead))
	if err == nil {
		return noFile
	}
	return nil
}

// tryFile makes a file and removes it. If that cannot be done, the log would grow in a single file
// without end.
func (d *Store) tryFile() error {
	name := logName(kindSegment, 0) + tmpSuffix // a name that nothing else uses
	f, err := d.dir.Create(name)
	if err == nil {
		err = errors.Join(f.Close(), d.dir.Remove(name))
	}
	if err != nil {
		return fmt.Errorf("no file can be made in the data directory: %w", err)
	}
	return nil
}

// contents lists what is in a directory, except what may be beside a store.
func contents(dir storage.Directory) (names []string, err error) {
	names, err = dir.List()
	return slices.DeleteFunc(names, func(name string) bool {
		kind, _ := parseName(name)
		return kind == kindBeside
	}), err
}

// listOurs lists the files of a store. It refuses a directory with anything else in it.
func listOurs(dir storage.Directory) (names []string, err error) {
	names, err = contents(dir)
	for _, name := range names {
		kind, _ := parseName(name)
		if kind == kindStrange {
			return nil, fmt.Errorf("%w: %s is none of its files", storage.ErrNotOurs,
				dir.Path(name))
		}
	}
	return names, err
}

// checkNames returns an error if a start refuses the directory for the names in it, before it has
// read any log file.
func checkNames(dir storage.Directory) error {
	names, err := listOurs(dir)
	if err != nil {
		return err // a cluster that does not answer is asked once
	}
	for _, name := range append(names, storage.LockName) {
		err = cmp.Or(err, checkFile(dir, name))
	}
	return err
}

// checkFile returns an error if name is a file that a start locks, or removes unread, but is no
// regular file: then the start could fail after it has changed other files.
func checkFile(dir storage.Directory, name string) error {
	kind, _ := parseName(name)
	if name != storage.LockName && kind != kindSnapshot && kind != kindTmp {
		return nil
	}

	// Other errors do not matter: a file that cannot be opened can perhaps be removed.
	f, _, err := dir.Open(name)
	if err == nil {
		f.Close()
	}
	if errors.Is(err, storage.ErrNotOurs) {
		return err
	}
	return nil
}

// Put appends value to key's list.
func (d *Store) Put(key, value string) {
	d.Memory.Put(key, value)
	d.record(opPut, 0, key, value)
}

// Delete removes key and returns how many values it had.
func (d *Store) Delete(key string) (removed int) {
	// A Delete that changes nothing is not logged.
	removed = d.Memory.Delete(key)
	if removed > 0 {
		d.record(opDelete, 0, key)
	}
	return removed
}

// Update removes the first value equal to oldValue and appends newValue.
func (d *Store) Update(key, oldValue, newValue string) (replaced bool) {
	// An Update that finds nothing to replace is a Put.
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
	// The last value goes with its key. A Delete of that needs less room than a Remove.
	place := d.Memory.RemoveAt(key, value, -1)
	switch {
	case place < 0:
		return false
	case place == 0 && d.Count(key) == 0:
		d.record(opDelete, 0, key)
	default:
		d.record(opRemove, place, key, value)
	}
	return true
}

// Take removes key's oldest value.
func (d *Store) Take(key string) (value string, ok bool) {
	value, ok = d.Memory.Take(key)
	if ok {
		d.record(opTake, 0, key)
	}
	return value, ok
}

// Expire gives key a deadline, in milliseconds of Unix time; 0 takes it away.
func (d *Store) Expire(key string, at int64) (ok bool) {
	at = writable(at)
	ok = d.Memory.Expire(key, at)
	if ok {
		d.note(appendExpire(d.pending, key, at), 1)
	}
	return ok
}

// PutUntil is Put and Expire in one step: both are in one frame. The key is in the log twice.
func (d *Store) PutUntil(key, value string, at int64) {
	at = writable(at)
	d.Memory.PutUntil(key, value, at)
	d.note(appendExpire(appendRecord(d.pending, opPut, 0, key, value), key, at), 2)
}

// writable returns at. The log cannot express times before 1970: these become the first millisecond
// of 1970, which is over as well.
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

// note makes pending, which has this many more records than before, the payload of the next frame.
// A large payload is written before the Commit, because frames are bounded. A record that no frame
// can hold ends the store, because memory already has what the log cannot have.
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
		d.owesSync = true
	}
}

// errTooLarge returns the error for a record that does not fit into a frame.
func errTooLarge(bytes int64) error {
	return fmt.Errorf("a record of %d bytes is too large", bytes)
}

// writeFrame writes a frame with the pending records. If that fails, the store has failed, and the
// next sync returns the error.
func (d *Store) writeFrame(kind uint32) {
	// Size and room are copied here, because afterwards the timer may write.
	d.writing <- struct{}{}
	d.addFrame(kind, d.pending, d.count)
	d.size, d.room = d.current.size, d.current.zeros()
	if d.current.isSpoiled && d.noHeal == nil {
		d.lookAfter = time.Time{} // so that this Commit, or the next one, checks all files
	}
	<-d.writing

	d.pending, d.count = d.pending[:0], 0
	if cap(d.pending) > 4*maxFramePut {
		d.pending = nil // a huge record must not keep its memory for ever
	}
}

// Syncing returns the path of the file for which the store waits, because the disk has not yet
// confirmed what was done to it; "" if there is none, or if d is nil. After Close it is the path of
// the last file. Any goroutine may call it.
func (d *Store) Syncing() string {
	switch {
	case d == nil:
		return ""
	case d.healing.Load() || d.awaiting.Load():
		return d.dir.Path("the snapshot of a compaction")
	}

	d.mu.Lock()
	defer d.mu.Unlock()
	if len(d.writing)+len(d.fsyncs) > 0 || d.noRoomYet != nil {
		return d.current.path
	}
	return ""
}

// IsHealing reports whether all data is being written again after others have changed the files: a
// stop should wait for that, however long it takes. Any goroutine may call it, also of a nil Store.
func (d *Store) IsHealing() bool { return d != nil && d.healing.Load() }

// Lost returns a channel that is closed when another process has got the store, when its directory
// was moved, or when etcd is silent or refuses; then Commit fails. It is nil for a nil Store, and
// for a lock that does not notice this by itself. Any goroutine may call it.
func (d *Store) Lost() <-chan struct{} {
	if d == nil {
		return nil
	}
	return d.lock.Lost()
}

// WhyLost returns the reason for which Lost was closed. Any goroutine may call it after that.
func (d *Store) WhyLost() error { return d.lock.Held() }

// Commit returns once everything done to the store is as durable as Options.Fsync says. After a
// storage.ErrNoRoom the next Commit tries again. After any other error it is unknown which changes
// since the last Commit are on disk (since the last fsync, if Commits do not wait for it): nothing
// is written any more, and every later Commit fails. About once a second, and when the last frame
// is not where it was written, Commit checks whether others have removed or changed the files. If
// so it writes all data again: that takes as long as a compaction, and everybody waits for it.
// Where it makes a file it also waits for room.
func (d *Store) Commit() error {
	commitErr := d.commit()
	if commitErr != nil && !errors.Is(commitErr, storage.ErrNoRoom) {
		return commitErr
	}

	now := time.Now()
	if !now.Before(d.lookAfter) {
		d.lookAfter = now.Add(lookTime)
		d.lookForFiles()
		err := d.failure()
		if err != nil {
			return err
		}
	}

	// The lock comes last: what was read is only true while nobody else could write. commitErr is
	// nil, or there is no room.
	return cmp.Or(d.held(), commitErr)
}

// held returns an error if this process does not hold the lock any more. If the lock says that
// files are gone, the data is written again first: before that nothing may be answered.
func (d *Store) held() error {
	err := d.lock.Held()
	if errors.Is(err, storage.ErrGone) {
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

// commit is Commit without the checks of the files and of the lock.
func (d *Store) commit() error {
	err := d.failure()
	if err != nil {
		return err
	}

	// Nothing to write: what was read is as durable as the writes before it. But a log that is much
	// larger than the data is compacted even then. If the current file is empty, all data is in
	// full files already.
	wasteful, idle := d.isWasteful(), d.count == 0 && !d.owesSync
	if idle && !wasteful {
		return nil
	}
	if idle && d.size == headerSize {
		d.compact()
		return nil
	}

	// Write, then wait for the disk as Options.Fsync says. A full file is on disk before the next
	// one begins. (On a full disk the old file grows instead: the last room is for requests that
	// free some.)
	now := time.Now()
	d.owesSync = false
	if d.count > 0 {
		d.writeFrame(frameRecords)
	}
	isDue := d.size >= d.segmentSize && !d.diskIsFull.Load() || wasteful
	full := isDue && !now.Before(d.rotateAfter)
	if d.fsync == FsyncAlways || full {
		err = d.syncRest()
	} else {
		err = d.awaitTimer(now)
	}
	if err != nil {
		d.owesSync = true // if there was no room, the next Commit tries again
		return err
	}

	// Go on in a new file. Then all data is in full files, and can be compacted.
	if full {
		isNew, err := d.rotate()
		if err != nil {
			return err
		}
		if isNew {
			d.compact()
		}
	}

	// The timer syncs what was not waited for, and writes the frame that vouches for it.
	d.syncLater()
	return nil
}

// rotate goes on in a new file, or stays in the old one if no new file can be made. After an error
// the store has failed: the old file may end with a frame after which none may follow.
func (d *Store) rotate() (isNew bool, err error) {
	// Missing files are no reason to stop: a heal begins with a rotation.
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

	// The next check must notice what somebody has done to the old file, or does to it later.
	d.fullBytes += full.size
	d.stamps[full.header.name()], _ = full.lastStamp()
	full.f.Close() // no error matters: all of it is on disk
	return true, nil
}

// Close ends the store: it makes everything durable whatever Options.Fsync says, writes a last
// frame that says so if the disk has room for it, and gives up the lock. On a disk it reads the
// current file. If others have changed that or another file, it writes all data again. After a
// failed Commit it writes nothing more. It is called once. Nothing happens if d is nil.
func (d *Store) Close() error {
	if d == nil {
		return nil
	}

	// First what was answered, because waiting for a compaction may take long.
	close(d.stop)
	err := d.Commit()
	if err == nil || errors.Is(err, storage.ErrNoRoom) {
		err = awaitRoom(d.syncRest)
	}
	d.AwaitCompaction()

	// Afterwards no heal has the data any more. The timer may still run: only one syncs at a time.
	if err == nil {
		err = d.fullLook()
	}
	if errors.Is(err, ErrSpoiled) {
		err = d.fullLook() // what failed once may not fail again
	}
	if err == nil {
		err = d.held()
	}
	d.stopTimer()

	// Without this frame the next start is as after a crash, which is no error. But if frames are
	// damaged, that start would take them for a torn end, and cut off all that follows.
	isSpoiled := errors.Is(err, ErrSpoiled) && d.lock.Held() == nil
	if err == nil || isSpoiled {
		err = errors.Join(err, d.writeCleanStop())
	}

	// On a full disk SPARE gets the room that is cut off, for Deletes after the next start.
	d.writing <- struct{}{}
	if err == nil {
		err = d.current.trim()
	} else {
		d.current.sync() // answered writes may not be on disk yet, if the timer was to sync them
	}
	<-d.writing

	// Damage from here on cannot be mended, only reported.
	if err == nil {
		err = d.isWhole()
	}
	d.writing <- struct{}{} // from here on nobody writes
	if err == nil && d.diskIsFull.Load() {
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

// writeCleanStop writes the frame that says that the store was closed, syncs it, and checks the
// lock once more. It writes nothing if the disk has no room for this frame and for a frame that
// says that another file follows.
func (d *Store) writeCleanStop() error {
	err := d.dir.RoomFor(2*frameSize, 0, true)
	if d.zerosAhead > 0 {
		err = d.current.writeZeros(2 * frameSize)
	}
	switch {
	case storage.IsFull(err):
		return nil
	case err != nil:
		return err
	}

	// With this frame, the next start takes a flipped bit before it for damage, not for a torn end.
	d.writeFrame(frameCleanStop)
	return errors.Join(awaitRoom(d.syncRest), d.lock.Held())
}

// AwaitCompaction waits for the compaction that runs, if there is one, and notes its result.
func (d *Store) AwaitCompaction() {
	if d.compacted == nil {
		return
	}

	d.awaiting.Store(true)
	defer d.awaiting.Store(false)
	d.noteCompaction(<-d.compacted)
}
