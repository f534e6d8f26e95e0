package durable

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"slices"
	"strings"
	"time"

	"kvserver/kvstore"
	"kvserver/kvstore/storage"
)

// layout is which of a store's files count.
type layout struct {
	snapshot uint64   // number of the newest snapshot; 0: there is none
	segments []uint64 // numbers of the segments behind it, in order
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

	// A crash in a compaction leaves the files for which the snapshot stands.
	for _, name := range names {
		kind, number, ok := parseName(name)
		switch {
		case isTmp(name),
			ok && kind == kindSnapshot && number < l.snapshot,
			ok && kind == kindSegment && number <= l.snapshot:
			l.obsolete = append(l.obsolete, name)
		case ok && kind == kindSegment:
			l.segments = append(l.segments, number)
		}
	}

	// A store is never taken for an empty one because its log is gone.
	slices.Sort(l.segments)
	for i, number := range l.segments {
		if want := l.snapshot + 1 + uint64(i); number != want {
			return l, missingFile(dir, want)
		}
	}
	if len(l.segments) == 0 && (l.snapshot > 0 || slices.Contains(names, storage.StoreName)) {
		return l, missingFile(dir, l.snapshot+1)
	}
	return l, nil
}

// missingFile is the damage that a segment is missing.
func missingFile(dir storage.Directory, number uint64) error {
	return &storage.DamageError{File: dir.Path(logName(kindSegment, number)),
		What: "the file is missing", Missing: true}
}

// names are the names of the files that count, in the order in which they are read.
func (l layout) names() (names []string) {
	if l.snapshot > 0 {
		names = append(names, logName(kindSnapshot, l.snapshot))
	}
	for _, number := range l.segments {
		names = append(names, logName(kindSegment, number))
	}
	return names
}

// files are the log files of a store, open, to be read in their order.
type files struct {
	layout
	dir  storage.Directory
	id   storeID
	logs []*logReader // for each of names
}

// findFiles finds out which files are the store, and opens them: what a compaction beside us
// removes from now on stays readable on a disk. A new store has none. They are open only where
// there is no error.
func findFiles(dir storage.Directory) (s *files, err error) {
	s = &files{dir: dir}

	// A directory without STORE is no store yet, or one that has lost it.
	var found bool
	s.id, found, err = readID(dir)
	if err != nil {
		return nil, err
	}
	if !found {
		return s, s.findNew()
	}

	s.layout, err = readLayout(dir)
	if err != nil {
		return nil, err
	}
	s.logs, err = openLogs(dir, s.names())
	if err != nil {
		return nil, err
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
	missing := &storage.DamageError{File: s.dir.Path(storage.StoreName),
		What: "the file is missing", Missing: true}
	if l.snapshot > 0 || len(l.segments) > 1 || gap != nil {
		return missing
	}

	// At most one segment is left, and temporary files. A first start that was stopped has written
	// no more than headers; STORE's own temporary file may have a little more.
	s.obsolete = l.obsolete
	for _, number := range l.segments {
		s.obsolete = append(s.obsolete, logName(kindSegment, number))
	}

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
		kind, _, ok := parseName(name)
		if !ok || kind != kindSegment {
			continue
		}

		l, err := openLog(s.dir, name)
		if err != nil {
			return err // such as that a compaction beside us has just removed it
		}

		// Read to its end, for only that says that the next file was there, too.
		err = l.checkHeader(s.id, 0)
		var end logEnd
		if err == nil {
			end, err = l.scan(ignore)
		}
		l.f.Close()

		// A file that cannot be read now is not called an older one.
		if err != nil && !errors.As(err, new(*storage.DamageError)) {
			return err
		}
		if err != nil || !end.goesOn() || end.tail == damaged {
			return &storage.DamageError{File: s.dir.Path(name), What: fmt.Sprintf(
				"it is older than snap-%d.log and no full file: an older copy was put over a "+
					"newer store, or writing removed files anew was stopped", s.snapshot)}
		}
	}
	return nil
}

// visitor is what walk tells what it reads. Each of its functions may be nil but frame. An error
// that begin, frame or end returns is taken for one of reading the file.
type visitor struct {
	begin func(l *logReader) error
	frame func(l *logReader, f frame, payload []byte) error
	end   func(l *logReader, end logEnd, isLast bool) error

	// damage is told what is wrong with a file. If it returns nil the walk goes on with the next.
	// Without it the walk ends with the error.
	damage func(error) error
}

// walk reads the files in their order, and closes them. It ends with the newest, or with the one
// before that if a rotation was stopped between the two.
func (s *files) walk(v visitor) error {
	defer closeLogs(s.logs)

	next := uint64(1) // the frame with which a file has to begin; 0: with any

	// A snapshot's own header tells what comes behind it.
	if s.snapshot > 0 {
		next = 0
	}

	for i := range s.logs {
		end, isLast, err := s.visit(i, next, v)
		switch {
		// What follows damage is read for what it is, as nothing says how it has to begin.
		case err != nil && v.damage != nil:
			err, next = v.damage(err), 0
		case end.header.kind == kindSnapshot:
			next = end.header.first
		default:
			next = end.next
		}

		if err != nil || isLast {
			return err
		}
	}
	return nil
}

// visit reads one file, which has to begin with the frame first; 0: with any.
func (s *files) visit(i int, first uint64, v visitor) (end logEnd, isLast bool, err error) {
	// What is read has to be the file that belongs here.
	l := s.logs[i]
	err = l.checkHeader(s.id, first)
	if err != nil {
		return end, false, err
	}

	// begin is told before any frame, and end only of a file that may end so.
	if v.begin != nil {
		err = v.begin(l)
		if err != nil {
			return end, false, err
		}
	}
	end, err = l.scan(v.frame)
	if err != nil {
		return end, false, err
	}

	// Whether it may end so depends on the files behind it.
	isLast, err = s.judgeFile(i, end)
	if err != nil {
		return end, false, err
	}
	if v.end != nil {
		err = v.end(l, end, isLast)
	}
	return end, isLast, err
}

// judgeFile decides whether the i-th file may end so. isLast: nothing is to be read behind it.
func (s *files) judgeFile(i int, end logEnd) (isLast bool, err error) {
	newest := i == len(s.logs)-1
	at := &storage.DamageError{File: s.logs[i].path, Offset: end.offset, Frame: end.next}
	switch {
	// A snapshot has its name once all of it is on disk, so it has its end.
	case end.header.kind == kindSnapshot && !end.isWhole():
		if end.bad != nil {
			return false, end.bad
		}
		at.What = "the snapshot has no proper end"
		return false, at
	case end.header.kind == kindSnapshot:
		return false, nil

	// The newest segment may end anywhere, and be torn, but not say that another one follows.
	case end.tail == damaged:
		return false, end.bad
	case newest && end.goesOn() && s.isFollowed(end.header.number):
		return true, nil // a rotation came since we looked
	case newest && end.goesOn():
		following := missingFile(s.dir, end.header.number+1).(*storage.DamageError)
		following.What += ": " + at.File + " says that it follows"
		return false, following
	case newest:
		return true, nil

	// All others say so, but for the one before a segment that a rotation made before it was
	// stopped.
	case end.goesOn():
		return false, nil
	case i == len(s.logs)-2 && s.isUnused(s.logs[i+1], end.next):
		return true, nil
	}

	if end.bad != nil {
		return false, end.bad
	}
	at.What = "the frame that says that another file follows is missing"
	return false, at
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
	if err != nil {
		return err
	}
	d.id, d.snapshot = s.id, s.snapshot
	if len(s.logs) == 0 {
		return d.create(s.obsolete)
	}

	// Read everything. The last end is the current file's.
	p := &progress{ctx: ctx, log: d.log, status: d.status, start: time.Now(), told: time.Now(),
		files: len(s.logs)}
	ends, err := d.readAll(s, p)
	if err != nil {
		return err
	}

	// The walk has told of one end at least, or it had failed.
	last := ends[len(ends)-1]
	for _, end := range ends[:len(ends)-1] {
		d.fullBytes += end.offset
	}

	// No frame in an empty file calls the end of the one before synced.
	if n := len(ends) - 2; n >= 0 && last.offset == headerSize &&
		ends[n].header.kind == kindSegment {
		w, err := reopen(d.dir, ends[n])
		if err == nil {
			err = w.f.Close()
		}
		if err != nil {
			return err
		}
	}

	// From here on the log can be written.
	err = d.resume(last)
	if err != nil {
		return err
	}
	p.finish(d.Memory)

	// What was read may have names that are not on disk: who gave them was killed, or failed to.
	// Before they are, nothing may go that a snapshot stands for.
	err = d.dir.Sync()
	if err != nil {
		return err
	}

	// Only now: nothing is touched when we refuse. The files behind the last are those of a
	// rotation that was stopped.
	err = d.removeAll(append(s.obsolete, s.names()[len(ends):]...))
	if err != nil || !last.isOld {
		return err
	}

	// An older kvserver would take new kinds of records in its file for damage. It does not open
	// a newer file. (On a full disk the log goes on in the old one.)
	full, err := d.goOn()
	d.fullBytes += full
	return err
}

// readAll applies what the files hold to Memory, and returns where each ends.
func (d *Store) readAll(s *files, p *progress) (ends []logEnd, err error) {
	for _, l := range s.logs {
		p.total += l.size
	}

	apply := applyTo(d.Memory)
	err = s.walk(visitor{
		frame: func(l *logReader, f frame, payload []byte) error {
			err := apply(l, f, payload)
			if err != nil {
				return err
			}
			return p.step(f)
		},
		end: func(_ *logReader, end logEnd, _ bool) error {
			ends = append(ends, end)
			return nil
		},
	})
	return ends, err
}

// create makes a new store's first files: STORE comes last, so that a
// directory with a STORE is never without a log.
func (d *Store) create(obsolete []string) error {
	err := d.removeAll(obsolete)
	if err != nil {
		return err
	}

	// A crash before STORE is there leaves a segment without frames, which findNew takes for
	// nothing.
	rand.Read(d.id[:])
	w, err := d.newSegment(fileHeader{kind: kindSegment, id: d.id, number: 1, first: 1})
	if err != nil {
		return err
	}

	d.current, d.number, d.first, d.size, d.room, d.vouched = w, 1, 1, w.size, w.room(), true
	d.log.Info("made a new store", "dir", d.dir.Path(""))
	return writeID(d.dir, d.id)
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

// resume makes a segment the current one, at its end.
func (d *Store) resume(end logEnd) error {
	w, err := reopen(d.dir, end)
	if err != nil {
		return err
	}
	if end.tail == torn {
		d.log.Warn("cut an incomplete commit off the end of the log, as a crash leaves it", "file",
			w.path, "offset", end.offset, "bytes", end.bytes, "later_frames", end.loose)
	}

	// From here on all that was loaded is on disk.
	d.number, d.sequence, d.synced = end.header.number, end.next-1, end.next-1
	d.vouched = end.frames == 0 || end.last != frameRecords
	d.current, d.size, d.room, d.first = w, w.size, w.room(), end.header.first
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
	w, err := extendLog(dir, end.header, end.offset)
	if err != nil {
		return nil, err
	}
	w.fileSize = end.size
	if end.doubt == end.size {
		return w, nil // as after a clean stop
	}

	frames := io.NewSectionReader(w.f, end.doubt, end.offset-end.doubt)
	behind := io.LimitReader(zeros{}, end.size-end.offset)
	_, err = io.Copy(io.NewOffsetWriter(w.f, end.doubt), io.MultiReader(frames, behind))
	if err == nil {
		err = w.f.Sync()
	}
	if err != nil {
		return nil, errors.Join(w.named("rewrite", err), w.f.Close())
	}
	return w, nil
}

// zeros reads as zeros without end.
type zeros struct{}

// Read fills b.
func (zeros) Read(b []byte) (n int, err error) {
	clear(b)
	return len(b), nil
}

// progress tells the log and the status how far a long load has come. It ends
// the load when ctx is done.
type progress struct {
	ctx            context.Context
	log            *slog.Logger
	status         *storage.Status
	start, told    time.Time // when the load began, and when the log was told last
	total, bytes   int64     // of all files, and of the frames that were loaded
	records, files int       // that were loaded, and that there are
}

// step takes note of a frame that was loaded. The error is that ctx is done.
func (p *progress) step(f frame) error {
	p.records += int(f.count)
	p.bytes += f.padded()

	// A load of a second or less says nothing but its end.
	now := time.Now()
	if now.Sub(p.told) >= progressTime {
		p.told = now
		percent := 100 * p.bytes / max(p.total, 1)
		p.log.Info("loading", "records", p.records, "bytes", p.bytes, "percent", percent)
		p.status.Set(fmt.Sprintf("loading %d %%", percent))
	}
	return p.ctx.Err()
}

// finish tells the log what was loaded.
func (p *progress) finish(m *kvstore.Memory) {
	keys, values, _ := m.Size()
	p.log.Info("loaded", "keys", keys, "values", values, "records", p.records, "files", p.files,
		"bytes", p.total, "took", time.Since(p.start).Round(time.Millisecond))
}
