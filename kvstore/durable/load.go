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

// layout says which of a store's log files count: the newest snapshot, and all segments after it.
type layout struct {
	snapshot uint64   // its number; 0: there is none
	last     uint64   // the last segment's number; 0: there is none
	obsolete []string // names of files that the snapshot replaces, and of temporary files
	shows    string   // the file that shows that another is missing; "": no such file
}

// readLayout sorts the directory's names. It returns a *storage.DamageError if a segment is
// missing: segments have consecutive numbers, and a store has at least one after its snapshot.
func readLayout(dir storage.Directory) (l layout, err error) {
	names, err := dir.List()
	if err != nil {
		return l, err
	}

	// The newest snapshot replaces all files of lower numbers, and the segment of its own.
	for _, name := range names {
		kind, number := parseName(name)
		if kind == kindSnapshot {
			l.snapshot = max(l.snapshot, number)
		}
	}

	// A store whose log is gone must never be taken for an empty one.
	if slices.Contains(names, storage.StoreName) {
		l.last = l.snapshot + 1
	}

	// A crash in a compaction leaves files that the snapshot replaces.
	for _, name := range names {
		kind, number := parseName(name)
		switch {
		case kind == kindTmp, kind == kindSnapshot && number < l.snapshot,
			kind == kindSegment && number <= l.snapshot:
			l.obsolete = append(l.obsolete, name)
		case kind == kindSegment:
			l.last = max(l.last, number)
		}
	}

	// This stops at the first missing file: somebody else's file may have a huge number.
	for number := l.snapshot + 1; number <= l.last; number++ {
		name := logName(kindSegment, number)
		if slices.Contains(names, name) {
			continue
		}

		// Name the file that shows the gap, too: perhaps that one is not the store's.
		missing := missingFile(dir, name)
		if number < l.last {
			l.shows = logName(kindSegment, l.last)
			missing.What += ": " + l.shows + " comes after it"
		} else if l.snapshot > 0 {
			l.shows = logName(kindSnapshot, l.snapshot)
			missing.What += ": " + l.shows + " comes before it"
		}
		return l, missing
	}
	return l, nil
}

// missingFile returns the damage that a file is missing.
func missingFile(dir storage.Directory, name string) *storage.DamageError {
	return &storage.DamageError{File: dir.Path(name), What: "the file is missing", Missing: true}
}

// names returns the names of the files that count, in the order in which they are read.
func (l layout) names() (names []string) {
	if l.snapshot > 0 {
		names = append(names, logName(kindSnapshot, l.snapshot))
	}
	for number := l.snapshot + 1; number <= l.last; number++ {
		names = append(names, logName(kindSegment, number))
	}
	return names
}

// files are the open log files of a store, which are read in order.
type files struct {
	layout
	dir   storage.Directory
	id    storeID
	store storage.Stamp // STORE's, when it was read
	logs  []*logReader  // one for each of names
	bytes int64         // of all logs

	// The next file to be read.
	at    int    // its place in logs
	first uint64 // the frame with which it must begin; 0: any
	done  bool   // there is none
}

// findFiles finds out which files make the store, and opens them; closeLogs closes them. A new
// store has none. After an error none is open.
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
		return nil, s.perhapsStray(err, s.shows)
	}
	s.logs, err = openLogs(dir, s.names())
	if err != nil {
		return nil, err
	}
	if s.snapshot == 0 {
		s.first = 1
	}
	for _, l := range s.logs {
		s.bytes += l.size
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

// ErrStray is returned, with what else is wrong, when a log file may be somebody else's.
var ErrStray = storage.NewError("perhaps somebody else's file is in the data directory",
	"Nothing was changed. If the file is not this store's, take it out, and start again. Otherwise "+
		"restore a backup, or save what can be saved: kvserver repair DIR NEW")

// perhapsStray returns err, with an ErrStray if the log file called name may be the cause: it is
// shorter than a header, which no store's log file ever is, or it is another store's, or no regular
// file.
func (s *files) perhapsStray(err error, name string) error {
	if name == "" {
		return err
	}

	l, openErr := openLog(s.dir, name)
	isStray := errors.Is(openErr, storage.ErrNotOurs)
	if openErr == nil {
		isStray = l.size < headerSize || l.bad == nil && l.header.id != s.id
		l.close()
	}
	if isStray {
		err = fmt.Errorf("%w: %s is empty, or not this store's; %w", ErrStray, s.dir.Path(name), err)
	}
	return err
}

// checkID returns an error if STORE has another id than most of the log files: then STORE is
// wrong. If no id has a majority, checkHeader complains about single files.
func (s *files) checkID() error {
	other, most, of := majorityID(s.logs)
	if other == s.id || 2*most <= of {
		return nil
	}

	return &storage.DamageError{File: s.dir.Path(storage.StoreName),
		What: fmt.Sprintf("it is another store's: %d of %d log files belong to store %x", most, of,
			other[:])}
}

// ErrUnfinished is returned when there is a part of a file but no store: a backup, a repair or a
// first start was broken off.
var ErrUnfinished = storage.NewError("an unfinished store", "Nothing was changed. If it was a copy, "+
	"make it again, into an empty directory; remove what is there only if you want to start empty.")

// findNew is findFiles for a directory without STORE. Files that a broken-off first start leaves
// hold no data, and are obsolete. Anything else may hold data, and is refused.
func (s *files) findNew() error {
	l, err := readLayout(s.dir)
	if err != nil && !errors.As(err, new(*storage.DamageError)) {
		return err
	}

	// A first start makes no snapshot and no second segment.
	missing := missingFile(s.dir, storage.StoreName)
	if err != nil || l.snapshot > 0 || l.last > 1 {
		return missing
	}

	// At most one segment is left, and temporary files. A broken-off first start has written
	// only headers, and a little more to STORE's temporary file.
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
		kind, _ := parseName(name)

		// A segment with frames belongs to a store, or is all that there is of a copy: Repair can
		// read it. A part of a file is of no use.
		switch {
		case size <= most:
		case kind == kindTmp:
			return fmt.Errorf("%w: %s has %d bytes of a copy, or of a first write, that was "+
				"broken off", ErrUnfinished, s.dir.Path(name), size)
		default:
			return missing
		}
	}
	return nil
}

// checkObsolete returns an error unless the segments that the snapshot replaces are what a
// crash leaves of a compaction: full and whole. Somebody else has put any other there, as by
// restoring an older copy over a newer store, or a heal was broken off by a crash.
func (s *files) checkObsolete() error {
	for _, name := range s.obsolete {
		kind, _ := parseName(name)
		if kind != kindSegment {
			continue
		}

		// Only the last frame says that the file was full, so all of it is read.
		var end logEnd
		l, err := openLog(s.dir, name)
		if err == nil {
			err = l.checkHeader(s.id, 0)
			if err == nil {
				end, err = l.scan(func(*logReader, frame, []byte) error { return nil })
			}
			l.close()
		}

		// The compaction of a running server may just have removed it. A file that cannot be read
		// now is not called an older one.
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil && !errors.As(err, new(*storage.DamageError)) {
			return err
		}
		if err != nil || !end.goesOn() || end.tail == damaged {
			return &storage.DamageError{File: l.path, What: fmt.Sprintf(
				"it is older than snap-%d.log and no full file: an older copy was put over a "+
					"newer store, or the server was killed while it wrote removed files again", s.snapshot)}
		}
	}
	return nil
}

// readFile reads the next file, and calls each for its frames. The last file is the newest one, or,
// if a broken-off rotation made that, the one before it (checkEnd). After an error the next call
// reads the next file.
func (s *files) readFile(each func(l *logReader, f frame, payload []byte) error) (end logEnd,
	err error) {
	l, first := s.logs[s.at], s.first
	s.at++
	s.done = s.at == len(s.logs)
	s.first = 0 // after damage it is unknown how the next file must begin

	// It must be the file that belongs here.
	err = l.checkHeader(s.id, first)
	if err == nil {
		end, err = l.scan(each)
	}
	if err != nil {
		return end, err
	}

	// How it may end depends on the files after it.
	err = s.checkEnd(end)
	if err != nil {
		return end, err
	}
	s.first = end.next
	if end.header.kind == kindSnapshot {
		s.first = end.header.first // frames of a snapshot have their own sequence
	}
	return end, nil
}

// checkEnd decides whether the file that was read may end as it does, and whether it is the last.
func (s *files) checkEnd(end logEnd) error {
	at := &storage.DamageError{File: s.dir.Path(end.header.name()), Offset: end.offset,
		Frame: end.next}
	switch {
	// A snapshot gets its name once all of it is on disk, so it must have its end.
	case end.header.kind == kindSnapshot && !end.isWhole():
		at.What = "the snapshot has no proper end"
		return cmp.Or(end.bad, error(at))
	case end.header.kind == kindSnapshot:
		return nil

	// The newest segment may end anywhere, and be torn, but must not say that another one follows.
	case end.tail == damaged:
		return end.bad
	case s.done && end.goesOn() && !s.isFollowed(end.header.number): // no rotation came meanwhile
		following := missingFile(s.dir, logName(kindSegment, end.header.number+1))
		following.What += ": " + at.File + " says that it follows"
		return following

	// Every earlier segment must say that another follows. There is one exception: the next one is
	// the last and has no frame, because the rotation that made it was broken off.
	case s.done, end.goesOn():
		return nil
	case s.at == len(s.logs)-1 && s.isUnused(s.logs[s.at], end.next):
		s.done = true
		return nil
	}

	// If this file is damaged itself, as in a copy for which the disk had no room, an empty file
	// after it may be the store's own. Without that file a start would take the damage for a torn
	// end.
	at.What = "the frame that says that another file follows is missing"
	next := s.logs[s.at]
	if end.bad != nil && next.size < headerSize {
		return end.bad
	}
	return s.perhapsStray(cmp.Or(end.bad, error(at)), next.name)
}

// isFollowed reports whether there is, or was, a segment with a higher number by now.
func (s *files) isFollowed(number uint64) bool {
	// If the directory cannot be read, nothing follows: then the file counts as missing.
	l, _ := readLayout(s.dir)
	return l.last > number
}

// isUnused reports whether l is a segment without frames that was made before the older file could
// have the frame with the sequence next. Then nothing of that file is missing. Otherwise its end is
// damaged: a rotation makes the next file only when all of the old one is on disk.
func (s *files) isUnused(l *logReader, next uint64) bool {
	// first is one higher than next if that frame (frameNext) was not written.
	return l.checkHeader(s.id, 0) == nil && l.size == headerSize && l.header.first <= next+1
}

// load applies the log to the store, and makes the log ready for writing, unless ctx is
// done before. If it refuses what it finds, it has changed nothing. After a crash in it the next
// load makes the same store.
func (d *Store) load(ctx context.Context) error {
	s, err := findFiles(d.dir)
	if err == nil && len(s.logs) == 0 {
		s, err = d.create(s.obsolete)
	}
	if err != nil {
		return err
	}
	d.snapshot = s.snapshot
	d.stamps[storage.StoreName] = s.store

	// Read everything. The last of ends is the current file's.
	ends, err := d.loadFiles(ctx, s)
	if err != nil {
		return err
	}

	// From here on the log can be written.
	err = d.resume(ends)
	if err != nil {
		return err
	}

	// The names of the files may not be on disk yet, because the process that made them was killed
	// or could not sync them. Before they are, nothing that a snapshot replaces may be removed.
	err = d.dir.Sync()
	if err != nil {
		return err
	}

	// Only now, because a load that refuses changes nothing. A file after the last of ends comes
	// from a broken-off rotation.
	err = d.removeAll(append(s.obsolete, s.names()[len(ends):]...))
	if err != nil || !ends[len(ends)-1].header.isOld {
		return err
	}

	// An older kvserver would take new kinds of records in a file of its own version for damage,
	// but it refuses a file of a newer version. (On a full disk the log goes on in the old file.)
	_, err = d.rotate()
	return err
}

// loadFiles applies all files to Memory, reports its progress, and returns where each file ends.
func (d *Store) loadFiles(ctx context.Context, s *files) (ends []logEnd, err error) {
	defer closeLogs(s.logs)
	start, told := time.Now(), time.Now()
	records, bytes := 0, int64(0)
	apply := applyTo(d.Memory)
	each := func(l *logReader, f frame, payload []byte) error {
		err := apply(l, f, payload)
		if err != nil {
			return err
		}
		records += int(f.count)
		bytes += f.padded()

		// A load of less than a second logs only its end.
		now := time.Now()
		if now.Sub(told) >= progressTime {
			told = now
			percent := 100 * bytes / max(s.bytes, 1)
			d.log.Info("loading", "records", records, "bytes", bytes, "percent", percent)
			d.status.Set(fmt.Sprintf("loading %d %%", percent))
		}
		return ctx.Err()
	}
	for !s.done {
		end, err := s.readFile(each)
		if err != nil {
			return nil, err
		}
		ends = append(ends, end)
	}

	keys, values, _ := d.Size()
	d.log.Info("loaded", "keys", keys, "values", values, "records", records, "files", len(s.logs),
		"bytes", s.bytes, "took", time.Since(start).Round(time.Millisecond))
	return ends, nil
}

// create makes a new store's files. STORE comes last, so that a directory with a STORE always has a
// log.
func (d *Store) create(obsolete []string) (*files, error) {
	err := d.removeAll(obsolete)
	if err != nil {
		return nil, err
	}

	// A crash before STORE is there leaves a segment without frames, which findNew ignores.
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

// removeAll removes files, and stops at the first that cannot be removed.
func (d *Store) removeAll(names []string) error {
	for _, name := range names {
		err := d.dir.Remove(name)
		if err != nil {
			return err
		}
	}
	return nil
}

// resume makes the last segment the current one, to be written at its end.
func (d *Store) resume(ends []logEnd) error {
	full, end := ends[:len(ends)-1], ends[len(ends)-1]
	for _, e := range full {
		d.fullBytes += e.offset
		d.stamps[e.header.name()] = e.stamp
	}

	// If the current file has no frames, none says that the full one before it is on disk.
	if n := len(full); n > 0 && end.frames == 0 && full[n-1].header.kind == kindSegment {
		w, err := reopen(d.dir, full[n-1])
		if err != nil {
			return err
		}
		d.stamps[w.header.name()], _ = w.lastStamp()
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

	// From here on everything that was loaded is on disk. (An older Repair wrote headers with
	// first = 0: there the first frame is 1.)
	last := max(end.next, 1) - 1
	d.sequence, d.synced = last, last
	d.vouched = end.frames == 0 || end.last != frameRecords
	d.current, d.size, d.room = w, w.size, w.zeros()
	return nil
}

// reopen opens a segment to go on writing at its end. It rewrites in place the frames that no later
// frame calls synced. After a failed fsync the kernel may serve data from memory that is
// not on disk, and take it for written (Rebello et al., "Can Applications Recover from fsync
// Failures?", 2020), but data that is written again it has to write. The bytes after the frames
// are cleared, even if they read as zeros, because an earlier start may have cleared them only in
// the kernel's memory. A crash in reopen leaves the same frames, and any part of the cleared bytes.
func reopen(dir storage.Directory, end logEnd) (*logWriter, error) {
	w, err := extendLog(dir, end.header, end.stamp, end.offset)
	if err != nil || end.doubt == end.size { // no frames and no zeros, as in a new file
		return w, err
	}

	// fileSize is end.offset, so writeZeros writes zeros over everything after the frames.
	frames := io.NewSectionReader(w.f, end.doubt, end.offset-end.doubt)
	_, err = io.Copy(io.NewOffsetWriter(w.f, end.doubt), frames)
	if err == nil {
		err = w.writeZeros(end.size - end.offset)
	}
	if err == nil {
		err = awaitRoom(w.f.Sync)
	}
	if err != nil {
		return nil, errors.Join(w.named("rewrite", err), w.f.Close())
	}
	return w, nil
}
