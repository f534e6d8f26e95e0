package durable

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"kvserver/kvstore"
	"kvserver/kvstore/storage"
	"log/slog"
	"math/rand/v2"
	"slices"
	"strings"
	"syscall"
	"time"

	crand "crypto/rand"
)

// layout is which of a store's files count.
type layout struct {
	snapshot uint64   // the newest snapshot, 0: none
	segments []uint64 // after it, in order
	obsolete []string // files that the snapshot stands for, and temporary ones
}

// readLayout sorts the directory's names. Segments must follow one another.
func readLayout(dir storage.Directory) (l layout, err error) {
	names, err := dir.List()
	if err != nil {
		return l, err
	}
	return layoutOf(dir, names)
}

// layoutOf is readLayout of names that were read.
func layoutOf(dir storage.Directory, names []string) (l layout, err error) {
	for _, name := range names {
		if kind, number, ok := parseName(name); ok && kind == kindSnapshot {
			l.snapshot = max(l.snapshot, number)
		}
	}
	for _, name := range names {
		kind, number, ok := parseName(name)
		switch {
		case strings.HasSuffix(name, tmpSuffix),
			ok && kind == kindSnapshot && number < l.snapshot,
			ok && kind == kindSegment && number <= l.snapshot:
			l.obsolete = append(l.obsolete, name)
		case ok && kind == kindSegment:
			l.segments = append(l.segments, number)
		}
	}
	slices.Sort(l.segments)
	for i, number := range l.segments {
		if want := l.snapshot + 1 + uint64(i); number != want {
			return l, &storage.DamageError{File: dir.Path(logName(kindSegment, want)),
				What: "the file is missing", Missing: true}
		}
	}
	if len(l.segments) == 0 && (l.snapshot > 0 || slices.Contains(names, storeName)) {
		return l, &storage.DamageError{File: dir.Path(logName(kindSegment, l.snapshot+1)),
			What: "the file is missing", Missing: true}
	}
	return l, nil
}

// majorityID is the id that most of the log files called names bear, how many that
// are, and of how many whose header can be read.
func majorityID(dir storage.Directory, names []string) (id storeID, most, of int) {
	votes := map[storeID]int{}
	for _, name := range names {
		if _, _, ok := parseName(name); !ok {
			continue
		}
		if l, err := openLog(dir, name); err == nil {
			l.f.Close()
			of++
			if votes[l.header.id]++; votes[l.header.id] > most {
				id, most = l.header.id, votes[l.header.id]
			}
		}
	}
	return id, most, of
}

// checkID tells whether STORE's id is that of the log files, or else which is wrong.
func checkID(dir storage.Directory, id storeID, l layout) error {
	other, most, of := majorityID(dir, l.names())
	if other == id || 2*most <= of {
		return nil // checkHeader complains of single files
	}
	return &storage.DamageError{File: dir.Path(storeName),
		What: fmt.Sprintf("it is another store's: %d of %d log files belong to store %x", most, of,
			other[:])}
}

// names are the names of the files that count.
func (l layout) names() (names []string) {
	if l.snapshot > 0 {
		names = append(names, logName(kindSnapshot, l.snapshot))
	}
	for _, number := range l.segments {
		names = append(names, logName(kindSegment, number))
	}
	return names
}

// load makes the store what the log says, and the log ready to be written, unless ctx is
// done before.
func (d *Store) load(ctx context.Context) error {
	l, err := d.find()
	if err != nil {
		return err
	}
	if len(l.segments) == 0 {
		return d.create(l)
	}
	p := newProgress(ctx, d.log, d.opts.Status, d.dir, l)
	next := uint64(1)
	if l.snapshot > 0 {
		next, d.fullBytes, err = loadSnapshot(d.dir, d.id, l.snapshot, d.Memory, p.step)
		if err != nil {
			return err
		}
	}
	ends, obsolete, err := loadSegments(d.dir, d.id, l.segments, next, d.Memory, p.step)
	if err != nil {
		return err
	}
	for _, end := range ends[:len(ends)-1] {
		d.fullBytes += end.offset
	}
	last := ends[len(ends)-1]
	// No frame in an empty file calls the end of the one before synced.
	if len(ends) > 1 && last.offset == headerSize {
		if err := d.renew(ends[len(ends)-2]); err != nil {
			return err
		}
	}
	if err := d.resume(last); err != nil {
		return err
	}
	p.end(d.Memory)
	// Only now: nothing is touched when we refuse.
	if err := d.removeAll(append(l.obsolete, obsolete...)); err != nil {
		return err
	}
	return d.dir.Sync() // a start before this one may have failed to do so
}

// find finds out which files are the store. A layout without a segment is that of a
// new store.
func (d *Store) find() (l layout, err error) {
	var found bool
	if d.id, found, err = readID(d.dir); err != nil {
		return l, err
	}
	l, err = readLayout(d.dir)
	switch {
	case err != nil:
		return l, err
	case !found:
		if isNew, err := unfinished(d.dir, l); err != nil {
			return l, err
		} else if isNew {
			for _, number := range l.segments {
				l.obsolete = append(l.obsolete, logName(kindSegment, number))
			}
			l.segments = nil
			return l, nil
		}
		return l, &storage.DamageError{File: d.dir.Path(storeName), What: "the file is missing",
			Missing: true}
	}
	if err := checkID(d.dir, d.id, l); err != nil {
		return l, err
	}
	return l, checkObsolete(d.dir, d.id, l)
}

// checkObsolete tells whether the segments that the snapshot stands for are what a
// crash leaves of a compaction: full, to their last frame. Others were put there:
// somebody restored an older copy over a newer store.
func checkObsolete(dir storage.Directory, id storeID, l layout) error {
	for _, name := range l.obsolete {
		kind, number, ok := parseName(name)
		if !ok || kind != kindSegment {
			continue
		}
		end, err := loadSegment(dir, id, number, 0, false, kvstore.NewMemory(), anyFrame)
		if err != nil && (errors.Is(err, fs.ErrNotExist) || !errors.As(err, new(*storage.DamageError))) {
			return err // such as that a compaction beside us has just removed it
		}
		if err != nil || !end.goesOn {
			return &storage.DamageError{File: dir.Path(name), What: fmt.Sprintf(
				"it is older than snap-%d.log and no full file: an older copy was put over a "+
					"newer store, or a repair, or writing removed files anew, was stopped", l.snapshot)}
		}
	}
	return nil
}

// create makes a new store's first files: STORE comes last, so that a
// directory with a STORE is never without a log.
func (d *Store) create(l layout) error {
	if err := d.removeAll(l.obsolete); err != nil {
		return err
	}
	crand.Read(d.id[:])
	w, err := d.newSegment(fileHeader{kind: kindSegment, id: d.id, number: 1, first: 1})
	if err != nil {
		return err
	}
	d.current, d.number, d.first, d.size, d.room, d.vouched = w, 1, 1, w.size, w.room(), true
	d.log.Info("made a new store", "dir", d.dir.Path(""))
	return writeID(d.dir, d.id)
}

// unfinished tells whether l is what a first start leaves that did not get to
// write STORE: at most a segment with no frame in it.
func unfinished(dir storage.Directory, l layout) (bool, error) {
	switch {
	case l.snapshot > 0 || len(l.segments) > 1:
		return false, nil
	case len(l.segments) == 0:
		return true, nil
	}
	f, size, err := dir.Open(logName(kindSegment, l.segments[0]))
	if err != nil {
		return false, err
	}
	return size == headerSize, f.Close()
}

func (d *Store) removeAll(names []string) error {
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
		return &storage.DamageError{File: l.path, What: "the file belongs to another store"}
	case l.header.kind != want.kind || l.header.number != want.number:
		return &storage.DamageError{File: l.path, What: "the file is another one, renamed"}
	case want.first != 0 && l.header.first != want.first:
		return &storage.DamageError{File: l.path,
			What: fmt.Sprintf("the file begins with frame %d instead of %d", l.header.first,
				want.first)}
	}
	return nil
}

// loadSnapshot adds a snapshot to m and returns the sequence that comes after.
func loadSnapshot(dir storage.Directory, id storeID, number uint64, m *kvstore.Memory,
	step func(frame) error) (next uint64, size int64, err error) {
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
			return 0, 0, &storage.DamageError{File: l.path, Offset: l.offset, Frame: l.next,
				What: "the snapshot has no proper end"}
		case err != nil:
			return 0, 0, err
		case f.kind == frameEnd:
			complete = true
		default:
			if err := apply(m, string(payload), f.count); err != nil {
				return 0, 0, &storage.DamageError{File: l.path, Offset: l.offset - f.padded(),
					Frame: f.sequence, What: err.Error()}
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
	size   int64 // of the file: behind offset there may be zeros, or what is torn
	torn   int64 // bytes behind offset, of frames that were never complete on disk
	frames int   // whole ones among these, which came to disk before what stands before them
	bad    error // why the torn part is no part of the log
	doubt  int64 // offset of the first frame that no later one calls synced
	goesOn bool  // the last frame says that another file follows
	silent bool  // the last frame does not say that all before it is on disk
}

// loadSegments adds what the segments' frames did to m, and returns where each ends.
// The last two may be those of a rotation that a crash, or a full disk, has stopped:
// then the last is empty, and obsolete.
func loadSegments(dir storage.Directory, id storeID, numbers []uint64, next uint64, m *kvstore.Memory,
	step func(frame) error) (ends []segmentEnd, obsolete []string, err error) {
	for i, number := range numbers {
		end, err := loadSegment(dir, id, number, next, i >= len(numbers)-2, m, step)
		if err != nil {
			return nil, nil, err
		}
		ends = append(ends, end)
		next = end.next
		stopped, err := checkNext(dir, id, numbers[i:], end)
		if err != nil {
			return nil, nil, err
		}
		if stopped {
			return ends, []string{logName(kindSegment, numbers[i+1])}, nil
		}
	}
	return ends, nil, nil
}

// checkNext tells whether the end of the first of these segments fits the next one:
// full files say that another follows, and the last does not. stopped: the next one is
// what a stopped rotation has left.
func checkNext(dir storage.Directory, id storeID, numbers []uint64,
	end segmentEnd) (stopped bool, err error) {
	path := dir.Path(logName(kindSegment, numbers[0]))
	if len(numbers) == 2 && !end.goesOn {
		if stopped, err = isEmptySegment(dir, id, numbers[1], end.next); stopped || err != nil {
			return stopped, err
		}
	}
	switch {
	case len(numbers) == 1 && end.goesOn:
		return false, &storage.DamageError{File: dir.Path(logName(kindSegment, numbers[0]+1)),
			What: "the file is missing: " + path + " says that it follows", Missing: true}
	case len(numbers) == 1 || end.goesOn:
		return false, nil
	case end.bad != nil:
		return false, end.bad
	}
	return false, &storage.DamageError{File: path, Offset: end.offset, Frame: end.next,
		What: "the frame that says that another file follows is missing"}
}

// isEmptySegment tells whether a segment has no frame, and was made when the file before it
// held those before next. (With more, that file's end is damaged. Rotation has all of it on disk
// before it makes the next.)
func isEmptySegment(dir storage.Directory, id storeID, number, next uint64) (bool, error) {
	l, err := openLog(dir, logName(kindSegment, number))
	if errors.As(err, new(*storage.DamageError)) {
		return false, nil
	} else if err != nil {
		return false, err
	}
	defer l.f.Close()
	return l.header.id == id && l.header.number == number && l.size == headerSize &&
		l.header.first <= next+1, nil
}

// loadSegment adds what a segment's frames did to m; first 0 is any. In one of the last two,
// as last says, a bad end of which no frame says that it was on disk is torn, not damage.
func loadSegment(dir storage.Directory, id storeID, number, first uint64, last bool, m *kvstore.Memory,
	step func(frame) error) (end segmentEnd, err error) {
	name := logName(kindSegment, number)
	l, err := openLog(dir, name)
	if err != nil {
		return end, err
	}
	defer l.f.Close()
	if err := l.checkHeader(fileHeader{kind: kindSegment, id: id, number: number,
		first: first}); err != nil {
		return end, err
	}
	end.header, end.size = l.header, l.size
	var doubts []int64 // offsets of the frames that no later one calls synced
	for {
		end.offset, end.next, end.doubt = l.offset, l.next, l.offset
		if len(doubts) > 0 {
			end.doubt = doubts[0]
		}
		f, payload, err := l.read()
		var damage *storage.DamageError
		var rest []byte
		if errors.As(err, &damage) && last && !end.goesOn {
			f, payload, rest, err = l.readAgain(damage)
			end.size = max(end.size, l.size)
		}
		switch {
		case err == errEnd, errors.Is(err, errShorter) && end.goesOn:
			return end, nil
		// A rotation that was killed leaves zeros behind the frame that goes on.
		case errors.As(err, &damage) && (last || end.goesOn):
			return l.endTorn(end, damage, rest)
		case err != nil:
			return end, err
		case end.goesOn:
			return end, &storage.DamageError{File: l.path, Offset: end.offset, Frame: f.sequence,
				What: "a frame follows the one that should be the last"}
		}
		if err := apply(m, string(payload), f.count); err != nil {
			return end, &storage.DamageError{File: l.path, Offset: end.offset, Frame: f.sequence,
				What: err.Error()}
		}
		end.goesOn, end.silent = f.kind == frameNext, f.kind == frameRecords
		doubts = append(doubts, end.offset)
		known := int(min(f.sequence-min(f.synced, f.sequence), uint64(len(doubts))))
		if known < len(doubts) {
			doubts = slices.Delete(doubts, 0, len(doubts)-known)
		}
		if err := step(f); err != nil {
			return end, err
		}
	}
}

// endTorn looks at what follows the good part of a last segment. It is damage if a frame in it
// says that what is bad was on disk, or if the frame before says that the file ends there; else
// it is torn, or just zeros. rest is what follows; nil: nobody has looked.
func (l *logReader) endTorn(end segmentEnd, damage *storage.DamageError, rest []byte) (segmentEnd, error) {
	if rest == nil {
		var err error
		if rest, err = l.rest(); err != nil {
			return end, err
		}
	}
	end.torn = int64(len(bytes.TrimRight(rest, "\x00")))
	if end.torn == 0 {
		return end, nil
	}
	end.bad = damage
	synced := false
	if end.frames, synced = l.look(rest); synced || end.goesOn {
		return end, damage
	}
	return end, nil
}

// resume makes a segment the current one, at its end. Nothing is copied: but the
// frames that no later one calls synced are written once more where they are, and
// what was torn is kept beside and cleared. After a failed fsync the kernel may serve
// from memory what is not on disk, and take it for written (Rebello et al., "Can
// Applications Recover from fsync Failures?", 2020); what is written anew it has to
// write.
func (d *Store) resume(end segmentEnd) error {
	h := end.header
	name := logName(h.kind, h.number)
	d.number, d.sequence, d.synced, d.vouched = h.number, end.next-1, end.next-1, !end.silent
	if end.torn > 0 {
		kept, err := d.keepTorn(name, end)
		if errors.Is(err, syscall.ENOSPC) {
			kept = "nothing, for the disk is full" // no promise covers it, and reading and Delete must go on
		} else if err != nil {
			return fmt.Errorf("keeping the torn end of the log: %w", err)
		}
		d.log.Warn("cut an incomplete commit off the end of the log, as a crash leaves it", "file",
			d.dir.Path(name),
			"offset", end.offset, "bytes", end.torn, "whole_frames", end.frames, "kept_in", kept)
	}
	w, err := extendLog(d.dir, name, h, end.offset)
	if err != nil {
		return err
	}
	w.end = end.size
	names, err := d.dir.List()
	if slices.ContainsFunc(names, func(other string) bool {
		return strings.HasPrefix(other, tornPrefix+name+"-")
	}) { // a start that failed may have cleared what is torn in the kernel's memory alone
		end.torn = end.size - end.offset
	}
	if err := errors.Join(err, rewrite(w, end)); err != nil {
		w.f.Close()
		return err
	}
	d.current, d.size, d.room, d.first = w, w.size, w.room(), h.first
	return nil
}

// renew writes the doubtful end of a full segment once more.
func (d *Store) renew(end segmentEnd) error {
	w, err := extendLog(d.dir, logName(kindSegment, end.header.number), end.header, end.offset)
	if err != nil {
		return err
	}
	return errors.Join(rewrite(w, end), w.f.Close())
}

// rewrite writes the doubtful end of a segment once more, clears what is torn behind
// it, and syncs both.
func rewrite(w *logWriter, end segmentEnd) error {
	if end.doubt == end.offset && end.torn == 0 {
		return nil
	}
	buf := make([]byte, readSize(max(end.offset-end.doubt, end.torn)))
	for at := end.doubt; at < end.offset+end.torn; {
		b := buf[:min(int64(len(buf)), end.offset+end.torn-at)]
		if at < end.offset {
			b = b[:min(int64(len(b)), end.offset-at)]
			if _, err := w.f.ReadAt(b, at); err != nil {
				return w.named("read", err)
			}
		} else {
			clear(b)
		}
		if _, err := w.f.WriteAt(b, at); err != nil {
			return w.named("write", err)
		}
		at += int64(len(b))
	}
	return w.sync()
}

// tornPrefix begins the names of files in which a start keeps what it cut off. A
// clean stop removes them.
const tornPrefix = "torn-"

// keepTorn copies the torn end of a segment to a file of its own, durably.
func (d *Store) keepTorn(name string, end segmentEnd) (path string, err error) {
	f, _, err := d.dir.Open(name)
	if err != nil {
		return "", err
	}
	defer f.Close()
	b := make([]byte, end.torn)
	if _, err := f.ReadAt(b, end.offset); err != nil {
		return "", readError(d.dir.Path(name), err)
	}
	// A name of its own each time: a start that was killed may have left a whole one.
	kept := fmt.Sprintf("%s%s-%d-%08x", tornPrefix, name, end.offset, rand.Uint32())
	w, err := d.dir.Create(kept)
	if err != nil {
		return "", err
	}
	_, err = w.WriteAt(b, 0)
	if err == nil {
		err = w.Sync()
	}
	if err = errors.Join(err, w.Close()); err == nil {
		err = d.dir.Sync()
	}
	if err != nil {
		err = errors.Join(err, d.dir.Remove(kept)) // or each start would leave one more
	}
	return d.dir.Path(kept), err
}

// removeTorn removes what starts have cut off: by now the store was used, and
// nobody missed it.
func (d *Store) removeTorn() error {
	names, err := d.dir.List()
	if err != nil {
		return err
	}
	for _, name := range names {
		if strings.HasPrefix(name, tornPrefix) {
			err = errors.Join(err, d.dir.Remove(name))
		}
	}
	return err
}

// progress tells the log, and who looks at status, how far a long load has come. It ends
// the load when ctx is done.
type progress struct {
	ctx            context.Context
	log            *slog.Logger
	status         *storage.Status
	start, told    time.Time
	total, bytes   int64
	records, files int
}

// newProgress prepares to tell of the load of l.
func newProgress(ctx context.Context, log *slog.Logger, status *storage.Status, dir storage.Directory,
	l layout) *progress {
	p := &progress{ctx: ctx, log: log, status: status, start: time.Now(), told: time.Now()}
	count := func(name string) {
		if f, size, err := dir.Open(name); err == nil { // who reads it will complain
			p.total += size
			p.files++
			f.Close()
		}
	}
	if l.snapshot > 0 {
		count(logName(kindSnapshot, l.snapshot))
	}
	for _, number := range l.segments {
		count(logName(kindSegment, number))
	}
	return p
}

// step takes note of a frame that was loaded.
func (p *progress) step(f frame) error {
	p.records += int(f.count)
	p.bytes += f.padded()
	if now := time.Now(); now.Sub(p.told) >= progressTime {
		p.told = now
		percent := 100 * p.bytes / max(p.total, 1)
		p.log.Info("loading", "records", p.records, "bytes", p.bytes, "percent", percent)
		p.status.Set(fmt.Sprintf("loading %d %%", percent))
	}
	return p.ctx.Err()
}

func (p *progress) end(m *kvstore.Memory) {
	keys, values, _ := m.Size()
	p.log.Info("loaded", "keys", keys, "values", values, "records", p.records, "files", p.files,
		"bytes", p.total, "took", time.Since(p.start).Round(time.Millisecond))
}
