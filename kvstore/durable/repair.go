package durable

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"kvserver/kvstore"
	"kvserver/kvstore/storage"
	"slices"
	"time"
)

// damagedPrefix begins the name of the directory in which Repair keeps what it
// found.
const damagedPrefix = "damaged-"

// Repair makes a store that opens of what can still be read in dir, and says what could not. The
// files that it found are kept in a subdirectory, which now names. A store without damage is left
// as it is.
func Repair(dir storage.Directory, now time.Time) (r Report, err error) {
	if r, err = check(dir); err != nil || !r.Damaged {
		if err == nil {
			r.say("nothing to repair")
		}
		return r, err
	}
	lock, err := dir.Lock(context.Background())
	if err != nil {
		return r, err
	}
	defer lock.Close()
	names, err := dir.List()
	if err != nil {
		return r, err
	}
	s := salvage{dir: dir, m: kvstore.NewMemory(), report: &r}
	if s.id, err = findID(dir, names); err != nil {
		return r, err
	}
	highest, err := s.readAll(names)
	if err != nil {
		return r, err
	}
	if s.frames == 0 {
		return r, ErrNothingRead
	}
	kept, err := keepAll(dir, names, now)
	if err != nil {
		return r, err
	}
	// The new snapshot's name makes it the store, at once.
	next := s.last + 1
	segment := fileHeader{kind: kindSegment, id: s.id, number: highest + 2, first: next}
	if _, err := createLog(dir, logName(segment.kind, segment.number), segment,
		noFrames); err != nil {
		return r, err
	}
	whole := fileHeader{kind: kindSnapshot, id: s.id, number: highest + 1, first: next}
	_, err = createLog(dir, logName(whole.kind, whole.number), whole, func(w *logWriter) error {
		return writeAll(w, s.m.Snapshot(), nil)
	})
	if err != nil {
		return r, err
	}
	if err := writeID(dir, s.id); err != nil {
		return r, err
	}
	for _, name := range names {
		if _, _, ok := parseName(name); ok {
			if err := dir.Remove(name); err != nil {
				return r, err
			}
		}
	}
	keys, values, bytes := s.m.Size()
	r.say("repaired: %d keys, %d values, %d bytes of data; what was found is in %s", keys, values,
		bytes, dir.Path(kept))
	return r, dir.Sync()
}

// keepAll gives every file of the store a second name in a directory of its own,
// before any loses its first.
func keepAll(dir storage.Directory, names []string, now time.Time) (kept string, err error) {
	base := damagedPrefix + now.UTC().Format("20060102-150405")
	kept = base
	for n := 2; slices.Contains(names, kept); n++ {
		kept = fmt.Sprint(base, "-", n)
	}
	for _, name := range names {
		if !isBeside(name) {
			if err := dir.Keep(name, kept); err != nil {
				return "", err
			}
		}
	}
	return kept, nil
}

// findID returns the store's id: what most of the log files say, or else STORE.
func findID(dir storage.Directory, names []string) (id storeID, err error) {
	if id, most, of := majorityID(dir, names); most > 0 && 2*most >= of {
		return id, nil
	}
	id, found, err := readID(dir)
	if found && err == nil {
		return id, nil
	}
	return id, errors.Join(err, errors.New("no file says which store this is: nothing can be read"))
}

// salvage reads what is whole in damaged files.
type salvage struct {
	dir    storage.Directory
	id     storeID
	m      *kvstore.Memory
	last   uint64 // highest sequence seen in a segment
	frames int    // that could be read
	goesOn bool   // the last one of a file says that another follows
	before uint64 // number of the file before the one that is read
	report *Report
}

// readAll reads the best snapshot and the segments after it, and returns the highest
// number of a file.
func (s *salvage) readAll(names []string) (highest uint64, err error) {
	var snapshots, segments []uint64
	for _, name := range names {
		if kind, number, ok := parseName(name); ok && kind == kindSnapshot {
			snapshots = append(snapshots, number)
		} else if ok {
			segments = append(segments, number)
		}
	}
	slices.Sort(snapshots)
	slices.Sort(segments)
	base, err := s.base(snapshots, segments)
	if err != nil {
		return 0, err
	}
	highest = base
	segments = slices.DeleteFunc(segments, func(number uint64) bool { return number <= base })
	if base > 0 {
		if err := s.read(kindSnapshot, base, false); err != nil {
			return 0, err
		}
	}
	newest := len(segments) - 1 // but for empty ones
	for ; newest > 0; newest-- {
		f, size, err := s.dir.Open(logName(kindSegment, segments[newest]))
		if err != nil {
			return 0, err
		}
		if f.Close(); size != headerSize {
			break
		}
	}
	for i, number := range segments {
		s.before = highest
		if err := s.read(kindSegment, number, i >= newest); err != nil {
			return 0, err
		}
		highest = number
	}
	switch {
	case highest == 0:
		s.lose("everything: no log file is there")
	case s.goesOn || len(segments) == 0:
		s.lose("what came after %s: files are missing", s.dir.Path(logName(kindSegment, highest)))
	}
	for _, number := range snapshots { // a damaged one that was not the best
		highest = max(highest, number)
	}
	return highest, nil
}

// base is the snapshot to begin with: the newest whole one, or none, from which all
// segments up to the newest are there; else the newest, whatever can be read of it.
func (s *salvage) base(snapshots, segments []uint64) (number uint64, err error) {
	if len(snapshots) == 0 {
		return 0, nil
	}
	newest := snapshots[len(snapshots)-1]
	for _, number := range slices.Backward(append([]uint64{0}, snapshots...)) {
		whole := number == 0
		if !whole {
			_, _, err := loadSnapshot(s.dir, s.id, number, kvstore.NewMemory(), anyFrame)
			if whole = err == nil; !whole && !errors.As(err, new(*storage.DamageError)) {
				return 0, err // such as a missing descriptor: it may be whole
			}
		}
		for n := number + 1; whole && n <= newest; n++ {
			whole = slices.Contains(segments, n)
		}
		if whole {
			return number, nil
		}
	}
	return newest, nil
}

// lose says what is lost.
func (s *salvage) lose(format string, args ...any) {
	s.report.Lost = true
	s.report.say("LOST    "+format, args...)
}

// read adds the good frames of a file to s.m. It goes on behind bad ones at the
// next that is whole. Only the newest segment may end in unused room.
func (s *salvage) read(kind uint32, number uint64, newest bool) error {
	name := logName(kind, number)
	b, err := s.bytesOf(name)
	if err != nil {
		return err
	}
	seed := fileHeader{kind: kind, id: s.id, number: number}.seed()
	frames, lost := 0, 0
	if s.goesOn = false; len(b) < headerSize {
		lost++
		s.lose("%s: it is cut inside its header", s.dir.Path(name))
	}
	h, err := decodeHeader(b)
	if err == nil && kind == kindSegment {
		s.begins(number, h.first)
	}
	bad := func(from, to int) {
		if from < to {
			lost++
			s.lose("bytes %d to %d of %s", from, to, s.dir.Path(name))
		}
	}
	good := min(headerSize, len(b)) // the header has told all it can
	for at := good; at+frameSize <= len(b); at += 8 {
		head, ok := decodeFrame(b[at:], seed)
		if !ok || head.padded() > int64(len(b)-at) {
			continue
		}
		payload := b[at+frameSize : at+frameSize+int(head.length)]
		if crc(seed, payload) != head.crc || apply(s.m, string(payload), head.count) != nil {
			continue
		}
		bad(good, at)
		if frames == 0 && kind == kindSegment && err != nil { // the header could not tell
			s.begins(number, head.sequence)
		}
		frames++
		s.frames++
		s.goesOn = head.kind == frameNext
		if kind == kindSegment {
			s.last = max(s.last, head.sequence)
		}
		good = at + int(head.padded())
		at = good - 8
	}
	end := len(b)
	if newest || s.goesOn {
		end = good + len(bytes.TrimRight(b[good:], "\x00"))
	}
	bad(good, end)
	if lost == 0 {
		s.report.say("read    all %d frames of %s", frames, s.dir.Path(name))
	} else {
		s.report.say("read    %d frames of %s", frames, s.dir.Path(name))
	}
	if err == nil && kind == kindSnapshot && h.first > 0 {
		s.last = max(s.last, h.first-1)
	}
	return nil
}

// bytesOf returns what a file holds.
func (s *salvage) bytesOf(name string) ([]byte, error) {
	f, size, err := s.dir.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b := make([]byte, size)
	if _, err := f.ReadAt(b, 0); err != nil {
		return nil, readError(s.dir.Path(name), err)
	}
	return b, nil
}

// begins says what is lost where a segment begins with a frame that does not follow the last
// one that could be read.
func (s *salvage) begins(number, first uint64) {
	path := s.dir.Path(logName(kindSegment, number))
	switch {
	case first <= s.last+1:
	case s.before == 0 && number > 1:
		s.lose("what was before %s: files are missing", path)
	case number > s.before+1:
		s.lose("what was between %s and %s: files are missing",
			s.dir.Path(logName(kindSegment, s.before)), path)
	default:
		s.lose("frames %d to %d, which came before %s", s.last+1, first-1, path)
	}
}
