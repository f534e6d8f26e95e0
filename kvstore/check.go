package kvstore

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"slices"
	"time"
)

// damagedPrefix begins the name of the directory in which Repair keeps what it
// found.
const damagedPrefix = "damaged-"

// Report is what Check or Repair has to say, a line for each thing.
type Report struct {
	Lines   []string
	Damaged bool // something that was on disk is not there any more
}

func (r *Report) say(format string, args ...any) {
	r.Lines = append(r.Lines, fmt.Sprintf(format, args...))
}

// damage takes note of err if it is damage; other errors are the caller's.
func (r *Report) damage(err error) error {
	var damage *DamageError
	if !errors.As(err, &damage) {
		return err
	}
	r.Damaged = true
	r.say("DAMAGED %v", err)
	return nil
}

// anyFrame is for whoever wants to load all of them.
func anyFrame(frame) error { return nil }

// Check reads the whole store in the directory at path and says what is there and
// what is wrong. It changes nothing, and takes no lock: beside a process that has the
// store open it reads what that has written so far.
func Check(path string) (Report, error) {
	dir, err := openDirectory(path)
	if err != nil {
		return Report{}, err
	}
	defer dir.Close()
	const tries = 5 // a compaction beside us may take files away
	for n := 1; ; n++ {
		r, err := check(dir)
		if !errors.Is(err, fs.ErrNotExist) || n == tries {
			return r, err
		}
	}
}

func check(dir directory) (r Report, err error) {
	names, err := dir.List()
	if err != nil {
		return r, err
	}
	if err := checkNames(dir, names); err != nil {
		return r, err
	}
	if owner, inUse := dir.InUse(); inUse {
		r.say("in use  %s: read beside it, up to what is written by now", owner)
	}
	d := &Durable{dir: dir}
	l, err := d.find()
	switch {
	case err != nil:
		return r, r.damage(err)
	case len(l.segments) == 0:
		r.say("no store yet: an empty directory")
		return r, nil
	}
	m, next := NewMemory(), uint64(1)
	if l.snapshot > 0 {
		var size int64
		if next, size, err = loadSnapshot(dir, d.id, l.snapshot, m, anyFrame); err == nil {
			r.say("ok      %s, %d bytes", dir.Path(logName(kindSnapshot, l.snapshot)), size)
		} else if err := r.damage(err); err != nil {
			return r, err
		}
	}
	for i := range l.segments {
		if next, err = r.checkSegment(dir, d.id, l.segments[i:], next, m); err != nil {
			return r, err
		}
	}
	for _, name := range l.obsolete {
		r.say("unused  %s, the next start removes it", dir.Path(name))
	}
	if !r.Damaged {
		keys, values, bytes := m.Size()
		r.say("holds %d keys, %d values, %d bytes of data", keys, values, bytes)
	}
	return r, nil
}

// checkSegment checks the first of these segments, adds it to m, and returns the
// sequence with which the next begins.
func (r *Report) checkSegment(dir directory, id storeID, numbers []uint64, first uint64, m *Memory) (next uint64, err error) {
	name := dir.Path(logName(kindSegment, numbers[0]))
	end, err := loadSegment(dir, id, numbers[0], first, len(numbers) <= 2, m, anyFrame)
	stopped := false
	if err == nil {
		stopped, err = checkNext(dir, id, numbers, end)
	}
	switch {
	case err != nil:
		return end.next, r.damage(err) // what follows is read for what it is
	case stopped:
		end.next = 0 // whatever the next one begins with
		r.say("ok      %s, %d bytes; the file after it is empty, as a rotation that was stopped leaves it", name, end.offset)
	case end.torn > 0:
		r.say("torn    %s, %d bytes, then %d of an incomplete commit with %d whole frames, as a crash leaves it: the next start cuts it, and keeps it beside", name, end.offset, end.torn, end.frames)
	default:
		r.say("ok      %s, %d bytes", name, end.offset)
	}
	return end.next, nil
}

// Repair makes a store that opens of what can still be read in the directory at
// path, and says what could not. The files that it found are kept in a
// subdirectory. A store without damage is left as it is.
func Repair(path string) (Report, error) {
	dir, err := openDirectory(path)
	if err != nil {
		return Report{}, err
	}
	return repair(dir, time.Now())
}

func repair(dir directory, now time.Time) (r Report, err error) {
	if r, err = check(dir); err != nil || !r.Damaged {
		if err == nil {
			r.say("nothing to repair")
		}
		return r, err
	}
	lock, err := dir.Lock()
	if err != nil {
		return r, err
	}
	defer lock.Close()
	names, err := dir.List()
	if err != nil {
		return r, err
	}
	id, err := findID(dir, names)
	if err != nil {
		return r, err
	}
	var snapshot uint64
	var segments []uint64
	for _, name := range names {
		if kind, number, ok := parseName(name); ok && kind == kindSnapshot {
			snapshot = max(snapshot, number)
		} else if ok {
			segments = append(segments, number)
		}
	}
	slices.Sort(segments)
	segments = slices.DeleteFunc(segments, func(number uint64) bool { return number <= snapshot })
	s := salvage{dir: dir, id: id, m: NewMemory(), report: &r}
	if snapshot > 0 {
		if err := s.read(kindSnapshot, snapshot, false); err != nil {
			return r, err
		}
	}
	highest := snapshot
	for i, number := range segments {
		if number > highest+1 {
			r.say("LOST    what was between %s and %s: files are missing", dir.Path(logName(kindSegment, highest)), dir.Path(logName(kindSegment, number)))
		}
		if err := s.read(kindSegment, number, i == len(segments)-1); err != nil {
			return r, err
		}
		highest = number
	}
	if len(segments) == 0 {
		r.say("LOST    what came after %s: files are missing", dir.Path(logName(kindSnapshot, snapshot)))
	}

	// Everything found gets a second name before anything loses its first; the
	// new snapshot's name makes it the store, at once.
	kept := damagedPrefix + now.UTC().Format("20060102-150405")
	for _, name := range names {
		if !isBeside(name) {
			if err := dir.Keep(name, kept); err != nil {
				return r, err
			}
		}
	}
	next := s.last + 1
	segment := fileHeader{kind: kindSegment, id: id, number: highest + 2, first: next}
	if _, err := createLog(dir, logName(segment.kind, segment.number), segment, noFrames); err != nil {
		return r, err
	}
	whole := fileHeader{kind: kindSnapshot, id: id, number: highest + 1, first: next}
	_, err = createLog(dir, logName(whole.kind, whole.number), whole, func(w *logWriter) error {
		return writeAll(w, s.m, anyFrame)
	})
	if err != nil {
		return r, err
	}
	if err := writeID(dir, id); err != nil {
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
	r.say("repaired: %d keys, %d values, %d bytes of data; what was found is in %s", keys, values, bytes, dir.Path(kept))
	return r, nil
}

// findID returns the store's id, from STORE or from any log file's header.
func findID(dir directory, names []string) (id storeID, err error) {
	id, found, err := readID(dir)
	if found && err == nil {
		return id, nil
	}
	for _, name := range names {
		if _, _, ok := parseName(name); ok {
			if l, openErr := openLog(dir, name); openErr == nil {
				l.f.Close()
				return l.header.id, nil
			}
		}
	}
	return id, errors.Join(err, errors.New("no file says which store this is: nothing can be read"))
}

// salvage reads what is whole in damaged files.
type salvage struct {
	dir    directory
	id     storeID
	m      *Memory
	last   uint64 // highest sequence seen in a segment
	report *Report
}

// read adds the good frames of a file to s.m. It goes on behind bad ones at the
// next that is whole. Only the newest segment may end in unused room.
func (s *salvage) read(kind uint32, number uint64, newest bool) error {
	name := logName(kind, number)
	f, size, err := s.dir.Open(name)
	if err != nil {
		return err
	}
	defer f.Close()
	b := make([]byte, size)
	if _, err := io.ReadFull(f, b); err != nil {
		return readError(s.dir.Path(name), err)
	}
	seed := fileHeader{kind: kind, id: s.id, number: number}.seed()
	frames, lost := 0, 0
	bad := func(from, to int) {
		if from < to {
			lost++
			s.report.say("LOST    bytes %d to %d of %s", from, to, s.dir.Path(name))
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
		frames++
		if kind == kindSegment {
			s.last = max(s.last, head.sequence)
		}
		good = at + int(head.padded())
		at = good - 8
	}
	end := len(b)
	if newest {
		end = good + len(bytes.TrimRight(b[good:], "\x00"))
	}
	bad(good, end)
	if lost == 0 {
		s.report.say("read    all %d frames of %s", frames, s.dir.Path(name))
	} else {
		s.report.say("read    %d frames of %s", frames, s.dir.Path(name))
	}
	if h, err := decodeHeader(b); err == nil && kind == kindSnapshot && h.first > 0 {
		s.last = max(s.last, h.first-1)
	}
	return nil
}
