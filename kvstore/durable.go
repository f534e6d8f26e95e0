package kvstore

import (
	"bytes"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// Errors of Open, Check and Repair.
var (
	// ErrMissing is returned when the directory does not exist.
	ErrMissing = errors.New("the data directory does not exist")
	// ErrNotOurs is returned when what is there is not a store.
	ErrNotOurs = errors.New("not a data directory")
	// ErrLocked is returned when another process has the store open.
	ErrLocked = errors.New("the data directory is in use")
	// ErrNewer is returned when a newer program wrote the store.
	ErrNewer = errors.New("written by a newer kvserver")
)

// DamageError says where a file of the store is not as it was written.
type DamageError struct {
	File   string
	Offset int64  // of the bad frame, in bytes
	Frame  uint64 // its sequence number; 0: no frame, but the file
	What   string
}

func (e *DamageError) Error() string {
	if e.Frame == 0 {
		return fmt.Sprintf("%s is damaged: %s", e.File, e.What)
	}
	return fmt.Sprintf("%s is damaged at offset %d, frame %d: %s", e.File, e.Offset, e.Frame, e.What)
}

// Fsync values other than a time between two fsyncs.
const (
	FsyncAlways time.Duration = 0  // every Commit
	FsyncNever  time.Duration = -1 // when a file is full and at Close; else when the kernel pleases
)

// Options are how a store is kept. The zero value is the safest.
type Options struct {
	Fsync time.Duration // FsyncAlways, FsyncNever, or the most time that a Commit stays off the disk
	Log   *slog.Logger  // what happened to the files; nil: nobody wants to know
}

// Sizes of the log.
const (
	segmentSize  = 64 << 20 // bytes after which the log goes on in a new file
	minCompact   = 64 << 20 // bytes of full files below which they are left alone
	reserveSize  = 1 << 20  // bytes by which a file that is synced at every Commit grows at a time
	recordExtra  = 8        // bytes that a record takes beside its key and value, about
	tmpSuffix    = ".tmp"
	storeName    = "STORE"
	storeFormat  = "kvserver store, version %d, id %s\n"
	progressTime = time.Second // between two lines about a long load
)

// Durable is a KVStore whose Commit returns once everything before it is in a
// log on disk, from which Open makes the same store again. It is not safe for
// concurrent access. Between two calls it has at most two goroutines of its own,
// which only touch files that are full (compaction) or sync the current one.
//
// Reads are Memory's: nothing is read from disk after Open.
type Durable struct {
	*Memory
	dir  directory
	lock io.Closer
	id   storeID
	opts Options
	log  *slog.Logger

	number   uint64 // of the current file
	closed   int64  // bytes in full files and the snapshot
	snapshot int64  // bytes of the snapshot alone
	pending  []byte // records not written yet
	count    uint32 // of them

	segmentSize, minCompact int64           // the constants, but for tests
	reserve                 int             // that one too; 0 where nobody waits for fsync
	stop                    chan struct{}   // closed by Close: the compaction gives up
	compacted               chan compaction // the running compaction's end, one slot; nil: none runs

	mu       sync.Mutex // guards what the timer of Options.Fsync shares with Commit
	current  *logWriter
	sequence uint64      // of the last frame written
	synced   uint64      // of the last frame known to be on disk
	err      error       // the first failure; from then on nothing is written
	timer    *time.Timer // of Options.Fsync; nil while it does not run

	syncing atomic.Pointer[string] // the file whose Sync has not returned
}

// Open opens the store in the directory at path, which must exist; in an empty
// one it makes a new store. Other errors than the package's own are those of
// the file system. When it refuses what it finds, nothing is changed.
func Open(path string, opts Options) (*Durable, error) {
	dir, err := openDirectory(path)
	if err != nil {
		return nil, err
	}
	return open(dir, opts)
}

func open(dir directory, opts Options) (*Durable, error) {
	d := &Durable{Memory: NewMemory(), dir: dir, opts: opts, log: opts.Log, segmentSize: segmentSize, minCompact: minCompact, stop: make(chan struct{})}
	if opts.Fsync == FsyncAlways {
		d.reserve = reserveSize
	}
	if d.log == nil {
		d.log = slog.New(slog.DiscardHandler)
	}
	names, err := dir.List()
	if err != nil {
		return nil, err
	}
	if err := checkNames(dir, names); err != nil {
		return nil, err
	}
	if d.lock, err = dir.Lock(); err != nil {
		return nil, err
	}
	if err := d.load(); err != nil {
		d.lock.Close()
		return nil, err
	}
	return d, nil
}

// checkNames refuses a directory that is somebody else's.
func checkNames(dir directory, names []string) error {
	for _, name := range names {
		_, _, isLog := parseName(name)
		if !isLog && name != storeName && !strings.HasSuffix(name, tmpSuffix) && !isBeside(name) {
			return fmt.Errorf("%w: %s is none of its files", ErrNotOurs, dir.Path(name))
		}
	}
	return nil
}

// isBeside tells whether a file may be in a store's directory that is no part of
// the store: the lock, what Repair keeps, the file system's, and hidden ones.
func isBeside(name string) bool {
	return name == lockName || strings.HasPrefix(name, damagedPrefix) || name == "lost+found" || name[0] == '.'
}

// logName is the name of a log file.
func logName(kind uint32, number uint64) string {
	if kind == kindSnapshot {
		return fmt.Sprintf("snap-%d.log", number)
	}
	return fmt.Sprintf("seg-%d.log", number)
}

// parseName is the inverse of logName.
func parseName(name string) (kind uint32, number uint64, ok bool) {
	text, isLog := strings.CutSuffix(name, ".log")
	if t, found := strings.CutPrefix(text, "seg-"); found {
		kind, text = kindSegment, t
	} else if t, found := strings.CutPrefix(text, "snap-"); found {
		kind, text = kindSnapshot, t
	}
	number, err := strconv.ParseUint(text, 10, 64)
	const most = 1 << 62 // so that there is always a next one
	return kind, number, isLog && kind != 0 && err == nil && number < most && logName(kind, number) == name
}

// layout is which of a store's files count.
type layout struct {
	snapshot uint64   // the newest snapshot, 0: none
	segments []uint64 // after it, in order
	obsolete []string // files that the snapshot stands for, and temporary ones
}

// readLayout sorts the directory's names. Segments must follow one another.
func readLayout(dir directory) (l layout, err error) {
	names, err := dir.List()
	if err != nil {
		return l, err
	}
	for _, name := range names {
		if kind, number, ok := parseName(name); ok && kind == kindSnapshot {
			l.snapshot = max(l.snapshot, number)
		}
	}
	for _, name := range names {
		kind, number, ok := parseName(name)
		switch {
		case strings.HasSuffix(name, tmpSuffix), ok && kind == kindSnapshot && number < l.snapshot, ok && kind == kindSegment && number <= l.snapshot:
			l.obsolete = append(l.obsolete, name)
		case ok && kind == kindSegment:
			l.segments = append(l.segments, number)
		}
	}
	slices.Sort(l.segments)
	for i, number := range l.segments {
		if want := l.snapshot + 1 + uint64(i); number != want {
			return l, &DamageError{File: dir.Path(logName(kindSegment, want)), What: "the file is missing"}
		}
	}
	if len(l.segments) == 0 && (l.snapshot > 0 || slices.Contains(names, storeName)) {
		return l, &DamageError{File: dir.Path(logName(kindSegment, l.snapshot+1)), What: "the file is missing"}
	}
	return l, nil
}

// readID reads the STORE file; found is false in a directory that has none.
func readID(dir directory) (id storeID, found bool, err error) {
	names, err := dir.List()
	if err != nil || !slices.Contains(names, storeName) {
		return id, false, err
	}
	f, size, err := dir.Open(storeName)
	if err != nil {
		return id, true, err
	}
	defer f.Close()
	b := make([]byte, min(size, 200))
	if _, err := io.ReadFull(f, b); err != nil {
		return id, true, readError(dir.Path(storeName), err)
	}
	var version int
	var text string
	if _, err := fmt.Sscanf(string(b), storeFormat, &version, &text); err != nil {
		return id, true, &DamageError{File: dir.Path(storeName), What: "not as it was written"}
	}
	if version > fileVersion {
		return id, true, fmt.Errorf("%s: %w: version %d", dir.Path(storeName), ErrNewer, version)
	}
	if n, err := hex.Decode(id[:], []byte(text[:min(len(text), 2*len(id))])); err != nil || n != len(id) || fmt.Sprintf(storeFormat, fileVersion, text) != string(b) {
		return id, true, &DamageError{File: dir.Path(storeName), What: "not as it was written"}
	}
	return id, true, nil
}

// load makes the store what the log says, and the log ready to be written.
func (d *Durable) load() error {
	id, found, err := readID(d.dir)
	if err != nil {
		return err
	}
	l, err := readLayout(d.dir)
	switch {
	case err != nil:
		return err
	case !found && unfinished(d.dir, l):
		return d.create(l)
	case !found:
		return &DamageError{File: d.dir.Path(storeName), What: "the file is missing"}
	}
	d.id = id
	p := newProgress(d.log, d.dir, l)
	next := uint64(1)
	if l.snapshot > 0 {
		if next, d.snapshot, err = loadSnapshot(d.dir, d.id, l.snapshot, d.Memory, p.step); err != nil {
			return err
		}
		d.closed = d.snapshot
	}
	for i, number := range l.segments {
		last := i == len(l.segments)-1
		end, err := loadSegment(d.dir, d.id, number, next, last, d.Memory, p.step)
		if err != nil {
			return err
		}
		next = end.next
		if !last {
			d.closed += end.offset
		} else if err := d.reopen(end); err != nil {
			return err
		}
	}
	p.end(d.Memory)
	return d.removeAll(l.obsolete) // only now: nothing is touched when we refuse
}

// create makes a new store's first files: STORE comes last, so that a
// directory with a STORE is never without a log.
func (d *Durable) create(l layout) error {
	for _, number := range l.segments {
		l.obsolete = append(l.obsolete, logName(kindSegment, number))
	}
	if err := d.removeAll(l.obsolete); err != nil {
		return err
	}
	rand.Read(d.id[:])
	if err := d.rotate(); err != nil {
		return err
	}
	return writeID(d.dir, d.id)
}

// writeID writes the STORE file.
func writeID(dir directory, id storeID) error {
	f, err := dir.Create(storeName + tmpSuffix)
	if err != nil {
		return err
	}
	_, err = f.WriteAt(fmt.Appendf(nil, storeFormat, fileVersion, hex.EncodeToString(id[:])), 0)
	if err == nil {
		err = f.Sync()
	}
	if err := errors.Join(err, f.Close()); err != nil {
		return err
	}
	if err := dir.Rename(storeName+tmpSuffix, storeName); err != nil {
		return err
	}
	return dir.Sync()
}

// unfinished tells whether l is what a first start leaves that did not get to
// write STORE: at most a segment with no frame in it.
func unfinished(dir directory, l layout) bool {
	switch {
	case l.snapshot > 0 || len(l.segments) > 1:
		return false
	case len(l.segments) == 0:
		return true
	}
	f, size, err := dir.Open(logName(kindSegment, l.segments[0]))
	if err != nil {
		return false
	}
	f.Close()
	return size == headerSize
}

func (d *Durable) removeAll(names []string) error {
	for _, name := range names {
		if err := d.dir.Remove(name); err != nil {
			return err
		}
	}
	return nil
}

// checkHeader tells whether a file is the one that its name says.
func (l *logReader) checkHeader(want fileHeader) error {
	switch {
	case l.header.id != want.id:
		return &DamageError{File: l.path, What: "the file belongs to another store"}
	case l.header.kind != want.kind || l.header.number != want.number:
		return &DamageError{File: l.path, What: "the file is another one, renamed"}
	case want.first != 0 && l.header.first != want.first:
		return &DamageError{File: l.path, What: fmt.Sprintf("the file begins with frame %d instead of %d", l.header.first, want.first)}
	}
	return nil
}

// loadSnapshot adds a snapshot to m and returns the sequence that comes after.
func loadSnapshot(dir directory, id storeID, number uint64, m *Memory, step func(frame) error) (next uint64, size int64, err error) {
	l, err := openLog(dir, logName(kindSnapshot, number))
	if err != nil {
		return 0, 0, err
	}
	defer l.f.Close()
	if err := l.checkHeader(fileHeader{kind: kindSnapshot, id: id, number: number}); err != nil {
		return 0, 0, err
	}
	complete := false
	for {
		f, payload, err := l.read()
		switch {
		case err == errEnd && complete:
			return l.header.first, l.size, nil
		case err == errEnd || err == nil && complete:
			return 0, 0, &DamageError{File: l.path, Offset: l.offset, Frame: l.next, What: "the snapshot has no proper end"}
		case err != nil:
			return 0, 0, err
		case f.kind == frameEnd:
			complete = true
		default:
			if err := apply(m, string(payload), f.count); err != nil {
				return 0, 0, &DamageError{File: l.path, Offset: l.offset - f.padded(), Frame: f.sequence, What: err.Error()}
			}
		}
		if err := step(f); err != nil {
			return 0, 0, err
		}
	}
}

// segmentEnd is where a segment's good part ends.
type segmentEnd struct {
	header fileHeader
	next   uint64 // sequence of the frame that would follow
	offset int64
	torn   int64 // bytes after it, of frames that were never complete on disk
}

// loadSegment adds what a segment's frames did to m. In the last one a bad end
// that nobody was ever told of is torn, not damage.
func loadSegment(dir directory, id storeID, number, first uint64, last bool, m *Memory, step func(frame) error) (end segmentEnd, err error) {
	name := logName(kindSegment, number)
	l, err := openLog(dir, name)
	if err != nil {
		return end, err
	}
	defer l.f.Close()
	if err := l.checkHeader(fileHeader{kind: kindSegment, id: id, number: number, first: first}); err != nil {
		return end, err
	}
	for {
		f, payload, err := l.read()
		var damage *DamageError
		switch {
		case err == errEnd:
			return segmentEnd{header: l.header, next: l.next, offset: l.offset}, nil
		case errors.As(err, &damage) && last:
			rest, err := l.rest(dir, name)
			switch {
			case err != nil:
				return end, err
			case l.wasSynced(rest):
				return end, damage
			}
			torn := int64(len(bytes.TrimRight(rest, "\x00")))
			return segmentEnd{header: l.header, next: l.next, offset: l.offset, torn: torn}, nil
		case err != nil:
			return end, err
		}
		if err := apply(m, string(payload), f.count); err != nil {
			return end, &DamageError{File: l.path, Offset: l.offset - f.padded(), Frame: f.sequence, What: err.Error()}
		}
		if err := step(f); err != nil {
			return end, err
		}
	}
}

// reopen makes the last segment the current one: its good part, in a new file.
// After a failed fsync the kernel may serve from memory what is not on disk, and
// take it for written (Rebello et al., "Can Applications Recover from fsync
// Failures?", 2020).
func (d *Durable) reopen(end segmentEnd) error {
	h := end.header
	name := logName(h.kind, h.number)
	d.number, d.sequence, d.synced = h.number, end.next-1, end.next-1
	if end.torn > 0 {
		d.log.Warn("cut an incomplete commit off the end of the log, as a crash leaves it", "file", d.dir.Path(name), "offset", end.offset, "bytes", end.torn)
	}
	size, err := createLog(d.dir, name, h, func(w *logWriter) error {
		l, err := openLog(d.dir, name)
		if err != nil {
			return err
		}
		defer l.f.Close()
		left := end.offset - headerSize
		for buf := make([]byte, readSize(left)); left > 0; {
			n, err := io.ReadFull(l.r, buf[:min(left, int64(len(buf)))])
			if err != nil {
				return readError(l.path, err)
			}
			if err := w.write(buf[:n]); err != nil {
				return err
			}
			left -= int64(n)
		}
		return nil
	})
	if err != nil {
		return err
	}
	d.current, err = extendLog(d.dir, name, h, size)
	return err
}

// rotate goes on in a new file.
func (d *Durable) rotate() error {
	h := fileHeader{kind: kindSegment, id: d.id, number: d.number + 1, first: d.sequence + 1}
	name := logName(h.kind, h.number)
	size, err := createLog(d.dir, name, h, noFrames)
	if err != nil {
		return err
	}
	w, err := extendLog(d.dir, name, h, size)
	if err != nil {
		return err
	}
	if d.current != nil {
		d.closed += d.current.size
		if err := d.current.f.Close(); err != nil {
			return err
		}
	}
	d.mu.Lock()
	d.current, d.number = w, h.number
	d.mu.Unlock()
	return nil
}

// Put appends value to key's list.
func (d *Durable) Put(key, value string) {
	d.Memory.Put(key, value)
	d.record(opPut, key, value)
}

// Delete removes key and returns how many values it had.
func (d *Durable) Delete(key string) (removed int) {
	if removed = d.Memory.Delete(key); removed > 0 {
		d.record(opDelete, key)
	}
	return removed
}

// Update removes the first value equal to oldValue and appends newValue.
func (d *Durable) Update(key, oldValue, newValue string) (replaced bool) {
	if replaced = d.Memory.Update(key, oldValue, newValue); replaced {
		d.record(opUpdate, key, oldValue, newValue)
	} else {
		d.record(opPut, key, newValue)
	}
	return replaced
}

// record notes an operation for the next Commit, and writes a frame of what
// there is when that is much.
func (d *Durable) record(op byte, fields ...string) {
	d.pending = appendRecord(d.pending, op, fields...)
	d.count++
	if len(d.pending) >= maxFramePut {
		d.writeFrame(frameRecords)
	}
}

// fail keeps the first error. It returns what is kept.
func (d *Durable) fail(err error) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.err == nil {
		d.err = err
	}
	return d.err
}

// failure returns the first error.
func (d *Durable) failure() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.err
}

// writeFrame writes a frame of what is pending.
func (d *Durable) writeFrame(kind uint32) {
	if d.failure() == nil {
		d.mu.Lock()
		f := frame{sequence: d.sequence + 1, synced: d.synced, count: d.count, kind: kind}
		d.mu.Unlock()
		if err := d.current.append(f, d.pending, d.reserve); err != nil {
			d.fail(err)
		}
		d.mu.Lock()
		d.sequence = f.sequence // only now: a sync meanwhile has not synced it
		d.mu.Unlock()
	}
	d.pending, d.count = d.pending[:0], 0
	if cap(d.pending) > 4*maxFramePut {
		d.pending = nil
	}
}

// sync makes everything written so far durable. The timer calls it too.
func (d *Durable) sync() error {
	d.mu.Lock()
	w, sequence := d.current, d.sequence
	d.mu.Unlock()
	d.syncing.Store(&w.path)
	err := w.sync()
	d.syncing.Store(nil)
	d.mu.Lock()
	defer d.mu.Unlock()
	switch {
	case errors.Is(err, os.ErrClosed) && d.synced >= sequence:
		// Commit was faster, synced the full file itself and went on in the next.
	case err != nil && d.err == nil:
		d.err = err
	case d.err == nil:
		d.synced = max(d.synced, sequence)
	}
	return d.err
}

// Syncing returns the path of a file that the disk has not confirmed yet, or "".
// Other goroutines may call it.
func (d *Durable) Syncing() string {
	if path := d.syncing.Load(); path != nil {
		return *path
	}
	return ""
}

// Commit returns once everything done to the store is as durable as
// Options.Fsync says. After an error it is unknown what since the last Commit
// is on disk; nothing is written any more, and every Commit fails.
func (d *Durable) Commit() error {
	if d.count > 0 {
		d.writeFrame(frameRecords)
	}
	if err := d.failure(); err != nil {
		return err
	}
	full := d.current.size >= d.segmentSize
	switch {
	case d.opts.Fsync == FsyncAlways || full:
		if err := d.syncRest(); err != nil {
			return err
		}
	case d.opts.Fsync > 0:
		d.syncLater()
	}
	if !full {
		return nil
	}
	if err := d.current.trim(); err != nil {
		return d.fail(err)
	}
	if err := d.rotate(); err != nil {
		return d.fail(err)
	}
	d.compact()
	return nil
}

// unsynced tells whether a frame is not known to be on disk.
func (d *Durable) unsynced() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.synced < d.sequence
}

// syncRest syncs if there is anything to sync: after reads alone there is not.
func (d *Durable) syncRest() error {
	if !d.unsynced() {
		return nil
	}
	return d.sync()
}

// syncLater sees to it that what was written is synced in time.
func (d *Durable) syncLater() {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.timer != nil || d.synced == d.sequence {
		return
	}
	d.timer = time.AfterFunc(d.opts.Fsync, func() {
		d.mu.Lock()
		d.timer = nil
		d.mu.Unlock()
		d.syncRest()
	})
}

// Close ends the store: what was done is made durable whatever Options.Fsync
// says, a last frame tells so, and the lock is free. After a failed Commit it
// writes nothing.
func (d *Durable) Close() error {
	close(d.stop)
	if d.compacted != nil {
		d.noteCompaction(<-d.compacted)
	}
	err := d.Commit()
	if err == nil {
		err = d.syncRest()
	}
	if err == nil {
		d.writeFrame(frameCleanStop)
		err = d.syncRest()
	}
	if err == nil {
		err = d.current.trim()
	}
	d.mu.Lock()
	if d.timer != nil {
		d.timer.Stop()
	}
	d.mu.Unlock()
	return errors.Join(err, d.current.f.Close(), d.lock.Close())
}
