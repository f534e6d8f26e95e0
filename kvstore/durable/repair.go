package durable

import (
	"cmp"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"slices"

	"kvserver/kvstore"
	"kvserver/kvstore/storage"
)

// ErrNothingRead is returned by Repair when nothing can be read from which to make a store.
var ErrNothingRead = storage.NewError("not one frame can be read",
	"The data is lost. Restore a backup, or start empty.")

// ErrLost is in the report of a Repair that could not save everything.
var ErrLost = storage.NewError("some of what was there is lost",
	"A server can use what was saved. If a Delete was lost, old values are back.")

// Repair makes a store of what can still be read in dir, and reports what could not be read. The
// new store is in out, which must be empty. Repair changes nothing in dir.
//
// It reads like a start, but goes on after damage. A file is what its header says, whatever its
// name. Frames are applied in the order of their sequence, each once, and every gap in that order
// is reported, because nobody knows what was in it.
func Repair(dir, out storage.Directory) (r Report, err error) {
	names, err := listOurs(dir)
	if err != nil {
		return r, err
	}
	if len(names) == 0 {
		return r, fmt.Errorf("%w at %s", ErrNoStore, dir.Path(""))
	}

	// What a running process writes meanwhile would be taken for damage.
	owner, inUse := dir.InUse()
	if inUse {
		return r, fmt.Errorf("%w: %s %s", storage.ErrLocked, dir.Path(""), owner)
	}

	s := &salvage{dir: dir, report: &r, m: kvstore.NewMemory()}
	s.logs, err = openLogs(dir, names)
	if err != nil {
		return r, err
	}
	defer closeLogs(s.logs)

	// First find all whole frames, then choose those that fit together. If not everything could be
	// read, the new store is smaller.
	err = fillDirectory(out, func() error {
		err := s.findAllFrames()
		if err == nil {
			err = s.restore()
		}
		if err == nil {
			err = s.write(out)
		}
		return err
	})
	if err != nil {
		return r, err
	}

	if r.Lost {
		r.Err = fmt.Errorf("%w: %s", ErrLost, dir.Path(""))
	}
	keys, values, bytes := s.m.Size()
	r.say("saved   %d keys, %d values, %d bytes of data to %s", keys, values, bytes, out.Path(""))
	return r, nil
}

// salvage is what Repair finds in the files of a damaged store.
type salvage struct {
	dir    storage.Directory
	id     storeID
	report *Report

	logs      []*logReader // of all log files
	snapshots []*foundFile // the newest first
	segments  []*foundFile // the newest first
	m         *kvstore.Memory
	next      uint64 // sequence of the frame that would follow those applied to m
}

// foundFile is a log file with its whole frames.
type foundFile struct {
	*logReader
	frames []foundFrame
	whole  bool // it is a snapshot that has its end
	goesOn bool // the last frame says that another file follows
}

// foundFrame is a whole frame, and where it is.
type foundFrame struct {
	frame
	in     *foundFile
	offset int64
}

// sayDamaged reports something that is not as it was written.
func (s *salvage) sayDamaged(format string, args ...any) {
	s.report.Damaged = true
	s.report.say("DAMAGED "+format, args...)
}

// sayLost reports data that is lost.
func (s *salvage) sayLost(format string, args ...any) {
	s.report.Damaged, s.report.Lost = true, true
	s.report.say("LOST    "+format, args...)
}

// findID finds out which store this is: the one that STORE says, unless STORE cannot be read or
// most log files belong to another one.
func (s *salvage) findID() error {
	id, most, of := majorityID(s.logs)

	// A bad STORE is reported, but is no reason to give up.
	said, _, err := readID(s.dir)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		s.sayDamaged("%s is missing", s.dir.Path(storage.StoreName))
	case errors.As(err, new(*storage.DamageError)):
		s.sayDamaged("%v", err)
	case err != nil:
		return err
	case 2*most <= of:
		id = said
	case said != id:
		s.sayDamaged("%s is another store's", s.dir.Path(storage.StoreName))
	}
	s.id = id
	return nil
}

// findAllFrames finds all whole frames of all log files.
func (s *salvage) findAllFrames() error {
	err := s.findID()
	if err != nil {
		return err
	}

	frames := 0
	for _, l := range s.logs {
		isOurs := s.accept(l)
		if !isOurs {
			continue
		}
		file, err := s.findFrames(l)
		if err != nil {
			return err
		}

		// The header says what it is: the name may be wrong.
		frames += len(file.frames)
		if file.header.kind == kindSnapshot {
			s.snapshots = append(s.snapshots, file)
		} else {
			s.segments = append(s.segments, file)
		}
	}
	if frames == 0 {
		return ErrNothingRead
	}

	// If two segments have the same frame, the newer segment counts.
	newestFirst := func(a, b *foundFile) int {
		return cmp.Compare(b.header.number, a.header.number)
	}
	slices.SortStableFunc(s.snapshots, newestFirst)
	slices.SortStableFunc(s.segments, newestFirst)
	return nil
}

// findFrames finds the whole frames of one file.
func (s *salvage) findFrames(l *logReader) (*foundFile, error) {
	file := &foundFile{logReader: l}
	end, err := l.beginReading()
	if err != nil {
		return nil, err
	}
	defer l.endReading()

	each := func(l *logReader, f frame, _ []byte) error {
		file.frames = append(file.frames, foundFrame{f, file, l.offset - f.padded()})
		return nil
	}
	for {
		damage, err := l.readFrames(&end, each)
		if err != nil {
			return nil, err
		}
		if damage == nil {
			break
		}

		// A start takes a bad frame for a torn one unless a later frame calls it synced, and cuts
		// off what follows. Repair keeps each whole frame: so a bad place with one after it is
		// damage.
		end.bad = damage
		more, err := l.skip()
		if err == nil && !more {
			err = l.judgeTail(&end, damage)
		}
		if err != nil {
			return nil, err
		}
		s.sayBad(l, end, more)
		if !more {
			break
		}
		end.last = frameRecords // any frame may follow a bad place
	}

	// The last frame says how the file ends.
	file.goesOn, file.whole = end.goesOn(), end.isWhole()
	if l.header.kind == kindSnapshot && !file.whole {
		s.sayDamaged("%s has no proper end", l.path)
	}

	// If a segment's header cannot be read, its first frame says with which frame it begins.
	if l.header.kind == kindSegment && l.bad != nil && len(file.frames) > 0 {
		l.header.first = file.frames[0].sequence
	}
	s.report.say("read    %d frames of %s", len(file.frames), l.path)
	return file, nil
}

// accept reports whether a log file belongs to the store. If its header cannot be read, it is taken
// for the file that its name says.
func (s *salvage) accept(l *logReader) (isOurs bool) {
	switch {
	case l.bad != nil:
		s.sayDamaged("%v", l.bad)
		kind, number := parseName(l.name)
		l.beginAfter(fileHeader{kind: kind, id: s.id, number: number})
	case l.header.id != s.id:
		s.report.say("ignored %s: it belongs to another store", l.path)
		return false
	case l.header.name() != l.name:
		s.sayDamaged("%s is %s, renamed", l.path, l.header.name())
	}
	return true
}

// sayBad reports what is after end. If there is more, that goes up to the offset of l, where the
// next whole frame is.
func (s *salvage) sayBad(l *logReader, end logEnd, more bool) {
	switch {
	case more && l.offset == end.offset: // a whole frame, but not the one expected
		s.sayDamaged("%v", end.bad)
	case more:
		s.sayDamaged("bytes %d to %d of %s", end.offset, l.offset, l.path)
	case end.tail == damaged, end.tail == torn && l.header.kind == kindSnapshot:
		s.sayDamaged("%s: after %d bytes there is no whole frame", l.path, end.offset)
	case end.tail == torn: // as a crash leaves it
		s.report.say("torn    %s: after %d bytes there is no whole frame", l.path, end.offset)
	}
}

// restore makes m of the best snapshot and the frames after it.
func (s *salvage) restore() error {
	frames := s.inOrder()
	base := s.base(frames)

	_, err := s.applyAll(base.frames, 1)
	if err != nil {
		return err
	}
	if !base.whole {
		s.sayLost("a part of %s: it has no proper end", base.path)
	}

	// Every gap is a loss, whatever was in it. Frames that the snapshot replaces are left out.
	first, hasGap := s.firstBehind(base, frames)
	if hasGap {
		s.sayLostBehind(base)
	}
	s.next, err = s.applyAll(from(frames, first), first)
	if err == nil {
		s.sayLostEnd(base)
	}
	return err
}

// inOrder returns the frames of all segments in the order of their sequence, each once: if two
// segments have one, that of the newer segment.
func (s *salvage) inOrder() (frames []foundFrame) {
	for _, file := range s.segments {
		frames = append(frames, file.frames...)
	}
	slices.SortStableFunc(frames, func(a, b foundFrame) int {
		return cmp.Compare(a.sequence, b.sequence)
	})

	// Applied twice, a frame would double its values.
	once := frames[:0]
	for _, f := range frames {
		n := len(once)
		if n > 0 && once[n-1].sequence == f.sequence {
			s.sayDamaged("frame %d is there twice, at offset %d of %s", f.sequence, f.offset,
				f.in.path)
			continue
		}
		once = append(once, f)
	}
	return once
}

// from returns those of frames, which are in order, whose sequence is at least first.
func from(frames []foundFrame, first uint64) []foundFrame {
	i, _ := slices.BinarySearchFunc(frames, first,
		func(f foundFrame, first uint64) int { return cmp.Compare(f.sequence, first) })
	return frames[i:]
}

// isUnbroken reports whether no frame is missing among frames, which are in order, from first on.
func isUnbroken(frames []foundFrame, first uint64) bool {
	n := len(frames)
	return n == 0 || frames[n-1].sequence-first == uint64(n-1)
}

// base returns the snapshot to begin with, the first that there is of these:
//
//   - the newest in which no frame is missing, and none after it; or an empty one, if no frame is
//     missing from the first on;
//   - the newest that has its end;
//   - the newest that has frames;
//   - an empty one.
func (s *salvage) base(frames []foundFrame) *foundFile {
	// Missing frames at the end cannot be noticed here, because no later frame shows the gap.
	isComplete := func(file *foundFile) bool {
		first, hasGap := s.firstBehind(file, frames)
		return file.whole && !hasGap && isUnbroken(file.frames, 1) &&
			isUnbroken(from(frames, first), first)
	}

	empty := &foundFile{logReader: &logReader{header: fileHeader{first: 1}}, whole: true}
	candidates := s.snapshots
	if len(frames) > 0 {
		candidates = append(candidates, empty)
	}

	// The first rule loses nothing, and each later one loses more.
	for _, isGood := range []func(*foundFile) bool{
		isComplete,
		func(file *foundFile) bool { return file.whole && file != empty },
		func(file *foundFile) bool { return len(file.frames) > 0 },
	} {
		i := slices.IndexFunc(candidates, isGood)
		if i >= 0 {
			return candidates[i]
		}
	}
	return empty
}

// firstBehind returns the sequence of the first frame that a snapshot does not replace. If its own
// header cannot be read, the segments after it say that: then hasGap reports whether there may
// have been frames before that one.
func (s *salvage) firstBehind(snapshot *foundFile, frames []foundFrame) (first uint64,
	hasGap bool) {
	if snapshot.bad == nil {
		return max(snapshot.header.first, 1), false // an older Repair wrote 0
	}

	// If there are none, it replaces all frames.
	first = 1
	if n := len(frames); n > 0 {
		first = frames[n-1].sequence + 1
	}

	// The newest segment comes first, so the last one here is the one right after the snapshot,
	// and that one decides, if it can.
	for _, file := range s.segments {
		if file.header.number > snapshot.header.number && file.header.first > 0 {
			first = file.header.first
			isCut := file.bad != nil && file.frames[0].offset > headerSize
			hasGap = isCut || file.header.number > snapshot.header.number+1
		}
	}
	return first, hasGap
}

// applyAll applies frames, the first of which should be next, and returns the sequence after the
// last one.
func (s *salvage) applyAll(frames []foundFrame, next uint64) (uint64, error) {
	var last foundFrame
	for _, f := range frames {
		if f.sequence > next {
			s.sayLost("frames %d to %d, which came before offset %d of %s", next, f.sequence-1,
				f.offset, f.in.path)
		}
		next = f.sequence + 1

		// One file is open at a time.
		if last.in != nil && last.in != f.in {
			last.in.close()
		}
		last = f

		// Payloads are read a second time here, because all together may be more than memory holds.
		payload := make([]byte, f.length)
		err := f.in.open()
		if err == nil {
			_, err = f.in.f.ReadAt(payload, f.offset+frameSize)
		}
		if err != nil {
			return next, fmt.Errorf("read %s: %w", f.in.path, err)
		}
		err = apply(s.m, string(payload), f.count)
		if err != nil {
			s.sayLost("a part of frame %d at offset %d of %s: %v", f.sequence, f.offset, f.in.path,
				err)
		}
	}
	return next, nil
}

// sayLostEnd reports what may be lost after the last frame.
func (s *salvage) sayLostEnd(base *foundFile) {
	// The newest segment that can be read at least in part.
	newest := base
	i := slices.IndexFunc(s.segments, func(file *foundFile) bool {
		return file.bad == nil || len(file.frames) > 0
	})
	if i >= 0 && s.segments[i].header.number > base.header.number {
		newest = s.segments[i]
	}

	switch {
	case newest == base, newest.goesOn:
		s.sayLostBehind(newest)
	case newest.header.first > s.next+1: // it has no frames
		s.sayLost("frames %d to %d, which came before %s", s.next, newest.header.first-1,
			newest.path)
	}
}

// sayLostBehind reports that what came after a file is lost.
func (s *salvage) sayLostBehind(file *foundFile) {
	s.sayLost("what came after %s: the next file is missing, or cannot be read", file.path)
}

// write writes what was saved to out: a snapshot, an empty segment after it, and STORE. STORE
// comes last, so that an unfinished copy is no store.
func (s *salvage) write(out storage.Directory) error {
	// The new store gets an id of its own, so that files of the damaged one cannot get into it.
	rand.Read(s.id[:])

	whole := fileHeader{kind: kindSnapshot, id: s.id, number: 1, first: s.next}
	_, err := createLog(out, whole, func(w *logWriter) error {
		return writeAll(w, s.m.Snapshot(), nil)
	})
	if err != nil {
		return err
	}

	// A store has at least one segment after its snapshot.
	segment := fileHeader{kind: kindSegment, id: s.id, number: 2, first: s.next}
	_, err = createLog(out, segment, nil)
	if err != nil {
		return err
	}
	_, err = writeID(out, s.id)
	return err
}
