package durable

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"slices"
	"strings"
	"time"

	"kvserver/kvstore/storage"
)

// layout is which of a store's log files count: the newest snapshot, and all segments behind it.
type layout struct {
	snapshot uint64   // its number; 0: there is none
	last     uint64   // the last segment's number; 0: there is none
	obsolete []string // names of files that the snapshot stands for, and of temporary ones
}

// isTmp tells whether a file called name is one of ours that has not got its own name yet.
func isTmp(name string) bool {
	base, isTmp := strings.CutSuffix(name, tmpSuffix)
	_, _, isLog := parseName(base)
	return isTmp && (isLog || base == storage.StoreName)
}

// readLayout sorts the directory's names. It returns a *storage.DamageError if a segment is
// missing: they follow one another, and a store has at least one behind its snapshot.
func readLayout(dir storage.Directory) (l layout, err error) {
	names, err := dir.List()
	if err != nil {
		return l, err
	}

	// The newest snapshot stands for all files of lower numbers.
	for _, name := range names {
		kind, number, ok := parseName(name)
		if ok && kind == kindSnapshot {
			l.snapshot = max(l.snapshot, number)
		}
	}

	// A store is never taken for an empty one because its log is gone.
	if l.snapshot > 0 || slices.Contains(names, storage.StoreName) {
		l.last = l.snapshot + 1
	}

	// A crash in a compaction leaves the files for which the snapshot stands.
	for _, name := range names {
		kind, number, ok := parseName(name)
		switch {
		case isTmp(name),
			ok && kind == kindSnapshot && number < l.snapshot,
			ok && kind == kindSegment && number <= l.snapshot:
			l.obsolete = append(l.obsolete, name)
		case ok && kind == kindSegment:
			l.last = max(l.last, number)
		}
	}

	// Up to the first that is missing: a stranger's number may be huge.
	for number := l.snapshot + 1; number <= l.last; number++ {
		name := logName(kindSegment, number)
		if !slices.Contains(names, name) {
			return l, missingFile(dir, name)
		}
	}
	return l, nil
}

// missingFile is the damage that a file is missing.
func missingFile(dir storage.Directory, name string) *storage.DamageError {
	return &storage.DamageError{File: dir.Path(name), What: "the file is missing", Missing: true}
}

// names are the names of the files that count, in the order in which they are read.
func (l layout) names() (names []string) {
	if l.snapshot > 0 {
		names = append(names, logName(kindSnapshot, l.snapshot))
	}
	for number := l.snapshot + 1; number <= l.last; number++ {
		names = append(names, logName(kindSegment, number))
	}
	return names
}

// files are the log files of a store, open, to be read in their order.
type files struct {
	layout
	dir   storage.Directory
	id    storeID
	store storage.Stamp // what STORE was, when it was read
	logs  []*logReader  // for each of names

	// What comes next.
	at    int    // which of logs
	first uint64 // the frame with which it has to begin; 0: with any
	done  bool   // nothing is to be read any more
}

// findFiles finds out which files are the store, and opens them. A new store has none. They are open
// only where there is no error.
func findFiles(dir storage.Directory) (s *files, err error) {
	s = &files{dir: dir}

	// A directory without STORE is no store yet, or one that has lost it.
	s.id, s.store, err = readID(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return s, s.findNew()
	}
	if err != nil {
		return nil, err
	}

	s.layout, err = readLayout(dir)
	if err != nil {
		return nil, err
	}
	s.logs, err = openLogs(dir, s.names())
	if err != nil {
		return nil, err
	}
	if s.snapshot == 0 {
		s.first = 1
	}

	err = s.checkID()
	if err == nil {
		err = s.checkObsolete()
	}
	if err != nil {
		closeLogs(s.logs)
	}
	return s, err
}

// checkID returns an error if STORE says another id than most of the log files: then STORE is
// wrong. Where no id has the majority, checkHeader complains of single files.
func (s *files) checkID() error {
	other, most, of := majorityID(s.logs)
	if other == s.id || 2*most <= of {
		return nil
	}

	return &storage.DamageError{File: s.dir.Path(storage.StoreName),
		What: fmt.Sprintf("it is another store's: %d of %d log files belong to store %x", most, of,
			other[:])}
}

// ErrUnfinished is returned where there is a part of a file and no store: a backup, a repair or a
// first start was stopped.
var ErrUnfinished = errors.New("an unfinished store")

// findNew is findFiles where there is no STORE. What a first start leaves that was stopped holds no
// data, and is obsolete. All else may hold some, and is refused.
func (s *files) findNew() error {
	l, err := readLayout(s.dir)
	var gap *storage.DamageError
	if err != nil && !errors.As(err, &gap) {
		return err
	}

	// A first start makes no snapshot and no second segment.
	missing := missingFile(s.dir, storage.StoreName)
	if l.snapshot > 0 || l.last > 1 || gap != nil {
		return missing
	}

	// At most one segment is left, and temporary files. A first start that was stopped has written
	// no more than headers; STORE's own temporary file may have a little more.
	s.obsolete = append(l.obsolete, l.names()...)
	for _, name := range s.obsolete {
		f, size, err := s.dir.Open(name)
		if err != nil {
			return err
		}
		f.Close()

		most := int64(headerSize)
		if strings.HasPrefix(name, storage.StoreName) {
			most = maxStoreFile
		}

		// A segment that has frames is a store's, or all that there is of a copy: Repair can read it.
		// A part of a file is of no use.
		switch {
		case size <= most:
		case isTmp(name):
			return fmt.Errorf("%w: %s has %d bytes of a copy, or of a first write, that was "+
				"broken off", ErrUnfinished, s.dir.Path(name), size)
		default:
			return missing
		}
	}
	return nil
}

// checkObsolete returns an error unless the segments that the snapshot stands for are what a
// crash leaves of a compaction: full, to their last frame. Others were put there:
// somebody restored an older copy over a newer store.
func (s *files) checkObsolete() error {
	for _, name := range s.obsolete {
		kind, _, isLog := parseName(name)
		if !isLog || kind != kindSegment {
			continue
		}

		// Read to its end, for only that says that the next file was there, too.
		var end logEnd
		l, err := openLog(s.dir, name)
		if err == nil {
			err = l.checkHeader(s.id, 0)
			if err == nil {
				end, err = l.scan(func(*logReader, frame, []byte) error { return nil })
			}
			l.close()
		}

		// A compaction beside us may have just removed it. A file that cannot be read now is not
		// called an older one.
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil && !errors.As(err, new(*storage.DamageError)) {
			return err
		}
		if err != nil || !end.goesOn() || end.tail == damaged {
			return &storage.DamageError{File: l.path, What: fmt.Sprintf(
				"it is older than snap-%d.log and no full file: an older copy was put over a "+
					"newer store, or writing removed files anew was stopped", s.snapshot)}
		}
	}
	return nil
}

// read reads the next file, and has each told of its frames. The last is the newest file, or the one
// before it if the newest is empty (judgeFile). After an error it can go on with the next file.
func (s *files) read(each func(l *logReader, f frame, payload []byte) error) (end logEnd,
	err error) {
	l, first := s.logs[s.at], s.first
	s.at++
	s.done = s.at == len(s.logs)
	s.first = 0 // nothing says how what follows damage has to begin

	// What is read has to be the file that belongs here.
	err = l.checkHeader(s.id, first)
	if err == nil {
		end, err = l.scan(each)
	}
	if err != nil {
		return end, err
	}

	// Whether it may end so depends on the files behind it.
	err = s.judgeFile(end)
	if err != nil {
		return end, err
	}
	s.first = end.next
	if end.header.kind == kindSnapshot {
		s.first = end.header.first // a snapshot counts its own frames
	}
	return end, nil
}

// judgeFile decides whether the file that was read may end so, and whether it is the last.
func (s *files) judgeFile(end logEnd) error {
	at := &storage.DamageError{File: s.dir.Path(end.header.name()), Offset: end.offset,
		Frame: end.next}
	switch {
	// A snapshot has its name once all of it is on disk, so it has its end.
	case end.header.kind == kindSnapshot && !end.isWhole():
		at.What = "the snapshot has no proper end"
		return cmp.Or(end.bad, error(at))
	case end.header.kind == kindSnapshot:
		return nil

	// The newest segment may end anywhere, and be torn, but not say that another one follows.
	case end.tail == damaged:
		return end.bad
	case s.done && end.goesOn() && !s.isFollowed(end.header.number): // or a rotation came meanwhile
		following := missingFile(s.dir, logName(kindSegment, end.header.number+1))
		following.What += ": " + at.File + " says that it follows"
		return following

	// Every earlier one must say that another follows. There is one exception: the next is the last
	// and has no frame, for the rotation that made it was stopped.
	case s.done, end.goesOn():
		return nil
	case s.at == len(s.logs)-1 && s.isUnused(s.logs[s.at], end.next):
		s.done = true
		return nil
	}

	// Whether the next one is unused cannot be told where its header cannot be read.
	var damage *storage.DamageError
	if s.at < len(s.logs) && s.logs[s.at].bad != nil && !errors.As(s.logs[s.at].bad, &damage) {
		return s.logs[s.at].bad
	}
	at.What = "the frame that says that another file follows is missing"
	return cmp.Or(end.bad, error(at))
}

// isFollowed tells whether there is a log file of a higher number now.
func (s *files) isFollowed(number uint64) bool {
	// Where nobody can look, nothing follows: then what is missing is said.
	names, _ := s.dir.List()
	return slices.ContainsFunc(names, func(name string) bool {
		_, other, ok := parseName(name)
		return ok && other > number
	})
}

// isUnused tells whether a file is a segment without a frame, and was made when the one before it
// had no frame from next on. (If it had, that file's end is damaged: a rotation has all of it on
// disk before it makes the next.)
func (s *files) isUnused(l *logReader, next uint64) bool {
	// Its header counts the frame that was to say that it follows.
	return l.checkHeader(s.id, 0) == nil && l.size == headerSize && l.header.first <= next+1
}

// load makes the store what the log says, and the log ready to be written, unless ctx is
// done before. If it refuses what it finds, nothing is changed. A crash in it leaves what the next
// load takes for the same.
func (d *Store) load(ctx context.Context) error {
	s, err := findFiles(d.dir)
	if err == nil && len(s.logs) == 0 {
		s, err = d.create(s.obsolete)
	}
	if err != nil {
		return err
	}
	d.id, d.snapshot = s.id, s.snapshot
	d.known[storage.StoreName] = s.store

	// Read everything. The last end is the current file's.
	ends, err := d.readAll(ctx, s)
	if err != nil {
		return err
	}

	// From here on the log can be written.
	err = d.resume(ends)
	if err != nil {
		return err
	}

	// What was read may have names that are not on disk: who gave them was killed, or failed to.
	// Before they are, nothing may go that a snapshot stands for.
	err = d.dir.Sync()
	if err != nil {
		return err
	}

	// Only now: nothing is touched when we refuse. The files behind the last are those of a
	// rotation that was stopped.
	err = d.removeAll(append(s.obsolete, s.names()[len(ends):]...))
	if err != nil || !ends[len(ends)-1].header.isOld {
		return err
	}

	// An older kvserver would take new kinds of records in its file for damage. It does not open
	// a newer file. (On a full disk the log goes on in the old one.)
	_, err = d.rotate()
	return err
}

// readAll applies what the files hold to Memory, tells how far it has come, and returns where each
// ends.
func (d *Store) readAll(ctx context.Context, s *files) (ends []logEnd, err error) {
	defer closeLogs(s.logs)
	start, told := time.Now(), time.Now()
	records, bytes, total := 0, int64(0), int64(0)
	for _, l := range s.logs {
		total += l.size
	}

	apply := applyTo(d.Memory)
	each := func(l *logReader, f frame, payload []byte) error {
		err := apply(l, f, payload)
		if err != nil {
			return err
		}
		records += int(f.count)
		bytes += f.padded()

		// A load of a second or less says nothing but its end.
		now := time.Now()
		if now.Sub(told) >= progressTime {
			told = now
			percent := 100 * bytes / max(total, 1)
			d.log.Info("loading", "records", records, "bytes", bytes, "percent", percent)
			d.status.Set(fmt.Sprintf("loading %d %%", percent))
		}
		return ctx.Err()
	}
	for !s.done {
		end, err := s.read(each)
		if err != nil {
			return nil, err
		}
		ends = append(ends, end)
	}

	keys, values, _ := d.Size()
	d.log.Info("loaded", "keys", keys, "values", values, "records", records, "files", len(s.logs),
		"bytes", total, "took", time.Since(start).Round(time.Millisecond))
	return ends, nil
}

// create makes a new store's files: STORE comes last, so that a directory with a STORE is never
// without a log.
func (d *Store) create(obsolete []string) (*files, error) {
	err := d.removeAll(obsolete)
	if err != nil {
		return nil, err
	}

	// A crash before STORE is there leaves a segment without frames, which findNew takes for
	// nothing.
	var id storeID
	rand.Read(id[:])
	_, err = createLog(d.dir, fileHeader{kind: kindSegment, id: id, number: 1, first: 1}, nil)
	if err == nil {
		_, err = writeID(d.dir, id)
	}
	if err != nil {
		return nil, err
	}
	d.log.Info("made a new store", "dir", d.dir.Path(""))
	return findFiles(d.dir)
}

// removeAll removes files, up to the first that cannot be removed.
func (d *Store) removeAll(names []string) error {
	for _, name := range names {
		err := d.dir.Remove(name)
		if err != nil {
			return err
		}
	}
	return nil
}

// resume makes the last segment the current one, at its end.
func (d *Store) resume(ends []logEnd) error {
	full, end := ends[:len(ends)-1], ends[len(ends)-1]
	for _, e := range full {
		d.fullBytes += e.offset
		d.known[e.header.name()] = e.stamp
	}

	// end is empty, so no frame says that the file before it is on disk.
	if n := len(full); n > 0 && end.frames == 0 && full[n-1].header.kind == kindSegment {
		w, err := reopen(d.dir, full[n-1])
		if err != nil {
			return err
		}
		d.known[w.header.name()] = w.lastStamp()
		err = w.f.Close()
		if err != nil {
			return err
		}
	}

	w, err := reopen(d.dir, end)
	if err != nil {
		return err
	}
	if end.tail == torn {
		d.log.Warn("cut an incomplete commit off the end of the log, as a crash leaves it", "file",
			w.path, "offset", end.offset, "bytes", end.bytes)
	}

	// From here on all that was loaded is on disk. (An older Repair wrote headers with first = 0:
	// then the first frame is 1.)
	last := max(end.next, 1) - 1
	d.number, d.sequence, d.synced = end.header.number, last, last
	d.vouched = end.frames == 0 || end.last != frameRecords
	d.current, d.size, d.room = w, w.size, w.room()
	return nil
}

// reopen opens a segment to be written further, from its end on. Nothing is copied: but the frames
// that no later one calls synced are written once more where they are. After a failed fsync the
// kernel may serve from memory what is not on disk, and take it for written (Rebello et al., "Can
// Applications Recover from fsync Failures?", 2020); what is written anew it has to write. What is
// behind the frames is cleared, also where it reads as zeros, for an earlier start may have cleared
// it in the kernel's memory alone. A crash in it leaves the same frames, and of what is cleared any
// part.
func reopen(dir storage.Directory, end logEnd) (*logWriter, error) {
	w, err := extendLog(dir, end.header, end.stamp, end.offset)
	if err != nil || end.doubt == end.size { // as after a clean stop
		return w, err
	}

	// Behind the frames the file is written as if it ended there.
	frames := io.NewSectionReader(w.f, end.doubt, end.offset-end.doubt)
	_, err = io.Copy(io.NewOffsetWriter(w.f, end.doubt), frames)
	if err == nil {
		err = w.makeRoom(end.size - end.offset)
	}
	if err == nil {
		err = w.f.Sync()
	}
	if err != nil {
		return nil, errors.Join(w.named("rewrite", err), w.f.Close())
	}
	return w, nil
}
