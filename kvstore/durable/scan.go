package durable

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"math/bits"
	"slices"
	"syscall"

	"kvserver/kvstore"
	"kvserver/kvstore/storage"
)

// logReader reads a log file frame by frame. A start and Check apply the frames, Backup copies
// them, and Repair reads on after damage. Another process may write the file meanwhile: frames
// that it writes after the file was first opened are left out.
type logReader struct {
	header fileHeader
	seed   uint32
	dir    storage.Directory
	name   string
	path   string // for messages
	r      *bufio.Reader
	f      storage.File  // nil: it is opened again when it is read
	stamp  storage.Stamp // the file's, when it was opened
	size   int64         // of the file, when it was opened or last read to its end
	limit  int64         // the size when it was first opened: frames beyond it were written since
	offset int64         // of the next frame
	next   uint64        // sequence of the next frame; 0: any, because the header does not say it
	buf    []byte        // the last payload with its padding, kept for the next one
	doubts []int64       // offsets of the frames that no later frame calls synced

	bad *storage.DamageError // what is wrong with the header; nil: nothing
}

// readerOf returns a reader of f from offset to its end, even if f grows meanwhile.
func readerOf(f storage.File, offset int64) io.Reader {
	return io.NewSectionReader(f, offset, math.MaxInt64-offset)
}

// openLog opens the file called name and reads its header. A damaged header is no error here: bad
// says what is wrong, and the reader cannot read frames until beginAfter gives it another header.
func openLog(d storage.Directory, name string) (*logReader, error) {
	l := &logReader{dir: d, name: name, path: d.Path(name)}
	err := l.open()
	if err != nil {
		return nil, err
	}
	l.limit = l.size

	b := make([]byte, headerSize)
	n, err := l.f.ReadAt(b, 0)
	if err != nil && err != io.EOF {
		l.close()
		return nil, err
	}

	// Repair reads the frames after a damaged header.
	h, err := decodeHeader(b[:n])
	switch {
	case errors.Is(err, ErrNewer), errors.Is(err, ErrOlder):
		l.close()
		return nil, fmt.Errorf("%s: %w", l.path, err)
	case err != nil:
		l.bad = &storage.DamageError{File: l.path, What: err.Error()}
	}
	l.beginAfter(h)
	return l, nil
}

// open opens the file, if it is not open.
func (l *logReader) open() (err error) {
	if l.f != nil {
		return nil
	}

	l.f, l.size, err = l.dir.Open(l.name)
	if err == nil {
		l.stamp, err = l.f.Stamp()
	}
	if err != nil {
		l.close()
	}
	return err
}

// close closes the file, if it is open.
func (l *logReader) close() {
	if l.f != nil {
		l.f.Close()
		l.f = nil
	}
}

// beginAfter makes the first frame after the header h the next one to be read.
func (l *logReader) beginAfter(h fileHeader) {
	l.header, l.seed, l.next, l.offset = h, h.seed(), h.first, headerSize
	if h.kind == kindSnapshot {
		l.next = 1 // frames of a snapshot have their own sequence; first is that of the log after it
	}
}

// openLogs opens the log files among names, and returns them in the same order. The caller closes
// them. On a disk, an open file stays readable even if somebody removes it. If there are too few
// descriptors, all files are closed again, and each is opened once more when it is read.
func openLogs(d storage.Directory, names []string) (logs []*logReader, err error) {
	// The newest first: then a frame in a newer file is never seen without all frames before it.
	areMany := false
	for _, name := range slices.Backward(names) {
		kind, _ := parseName(name)
		if !kind.isLog() {
			continue
		}

		l, err := openLog(d, name)
		if errors.Is(err, syscall.EMFILE) {
			areMany = true
			closeLogs(logs)
			l, err = openLog(d, name)
		}
		if err != nil {
			closeLogs(logs)
			return nil, err
		}
		logs = append(logs, l)

		// Only its header is needed now.
		if areMany {
			l.close()
		}
	}
	slices.Reverse(logs)
	return logs, nil
}

// closeLogs closes log files.
func closeLogs(logs []*logReader) {
	for _, l := range logs {
		l.close()
	}
}

// majorityID returns the id that most log files have, how many have it, and how many headers can be
// read.
func majorityID(logs []*logReader) (id storeID, most, of int) {
	votes := map[storeID]int{}
	for _, l := range logs {
		if l.bad != nil {
			continue
		}

		of++
		votes[l.header.id]++
		if votes[l.header.id] > most {
			id, most = l.header.id, votes[l.header.id]
		}
	}
	return id, most, of
}

// damageHere returns damage at the next frame.
func (l *logReader) damageHere(what string) *storage.DamageError {
	return &storage.DamageError{File: l.path, Offset: l.offset, Frame: l.next, What: what}
}

// checkHeader returns an error unless the file belongs to the store id and is the one that its name
// says. first is the frame with which it must begin; 0: any.
func (l *logReader) checkHeader(id storeID, first uint64) error {
	what := ""
	switch {
	case l.bad != nil:
		return l.bad
	case l.header.id != id:
		what = "the file belongs to another store"
	case l.header.name() != l.name:
		what = "the file is another one, renamed"
	case first != 0 && l.header.first != first:
		what = fmt.Sprintf("the file begins with frame %d instead of %d", l.header.first, first)
	default:
		return nil
	}
	return &storage.DamageError{File: l.path, What: what}
}

// errEnd is the end of a log file, after its last frame.
var errEnd = errors.New("end of the log")

// nextFrame returns the next frame and its payload, which is valid until the next call. The error
// is errEnd, a *storage.DamageError, or the file's.
func (l *logReader) nextFrame() (f frame, payload []byte, err error) {
	if l.offset == l.size {
		return f, nil, errEnd
	}

	// The head. Its length is not believed before its checksum has been verified.
	if l.size-l.offset < frameSize {
		return f, nil, l.damageHere("the file ends inside a frame's head")
	}

	var head [frameSize]byte
	_, err = io.ReadFull(l.r, head[:])
	if err != nil {
		return f, nil, l.readError(err)
	}

	f, ok := decodeFrame(head[:], l.seed)
	switch {
	case !ok:
		return f, nil, l.damageHere("the frame's checksum is wrong")
	case l.next > 0 && f.sequence != l.next:
		return f, nil, l.damageHere(
			fmt.Sprintf("frame %d is missing: here is %d", l.next, f.sequence))
	case l.size-l.offset < f.padded():
		return f, nil, l.damageHere("the file ends inside a frame")
	case l.offset+f.padded() > l.limit:
		return f, nil, errEnd
	}

	// The records.
	rest := l.padded(f)
	_, err = io.ReadFull(l.r, rest)
	if err != nil {
		return f, nil, l.readError(err)
	}

	payload = rest[:f.length]
	if crc(l.seed, payload) != f.crc {
		return f, nil, l.damageHere("the records' checksum is wrong")
	}

	// After damage the offset is still that of the bad frame.
	l.offset += f.padded()
	l.next = f.sequence + 1
	return f, payload, nil
}

// padded returns memory for the payload of f with its padding, which is valid until the next one is
// read.
func (l *logReader) padded(f frame) []byte {
	rest := int(f.padded() - frameSize)
	if cap(l.buf) < rest {
		l.buf = make([]byte, rest)
	}
	return l.buf[:rest]
}

// readError returns err, or damage if err says that the file became shorter meanwhile: a process
// that has the store open cuts off the room after the last frame of a full file.
func (l *logReader) readError(err error) error {
	if err == io.EOF || err == io.ErrUnexpectedEOF {
		return l.damageHere("the file became shorter meanwhile")
	}
	return err
}

// search looks, after the good part of the file, at every place where a frame can begin, for a head
// that isIt accepts, and returns its offset; 0: there is none. bytes is how many bytes lie before
// it, up to the last one that is not zero. search updates size if the file has another size by now.
func (l *logReader) search(isIt func(f frame, at int64) (bool, error)) (at, bytes int64, err error) {
	r := bufio.NewReaderSize(readerOf(l.f, l.offset), bufferSize)
	for at = l.offset; ; {
		head, err := r.Peek(frameSize)
		if err != nil && err != io.EOF {
			return 0, 0, err
		}
		if len(head) == 0 {
			l.size = at
			return 0, bytes, nil
		}

		f, isHead := decodeFrame(head, l.seed)
		if isHead {
			l.size = max(l.size, at+frameSize)
			found, err := isIt(f, at)
			if found || err != nil {
				return at, bytes, err
			}
		}

		// Frames begin at multiples of 8. last is the last byte of these 8 that is not zero.
		var word [8]byte
		n, _ := r.Read(word[:])
		last := (bits.Len64(binary.LittleEndian.Uint64(word[:])) + 7) / 8
		if last > 0 {
			bytes = at - l.offset + int64(last)
		}
		at += int64(n)
	}
}

// skip moves on to the next whole frame, whatever its sequence. found is false if there is none.
func (l *logReader) skip() (found bool, err error) {
	// A frame is whole if both its checksums are right.
	var next uint64
	at, _, err := l.search(func(f frame, at int64) (bool, error) {
		if at+f.padded() > l.size {
			return false, nil
		}
		next = f.sequence
		payload := l.padded(f)[:f.length]
		_, err := l.f.ReadAt(payload, at+frameSize)
		if err != nil {
			return false, err
		}
		return crc(l.seed, payload) == f.crc, nil
	})
	if err != nil || at == 0 {
		return false, err
	}

	l.offset, l.next = at, next
	l.r.Reset(readerOf(l.f, at))
	return true, nil
}

// tail says what is after the last good frame of a log file.
type tail int

const (
	nothing tail = iota // nothing, or zeros: room for frames
	torn                // a commit that was never whole on disk, as a crash leaves it
	damaged             // something that was once on disk
)

// logEnd is where a log file's good part ends.
type logEnd struct {
	header fileHeader
	stamp  storage.Stamp // the file's, when it was opened for reading
	last   uint32        // the kind of the last good frame; frameRecords: perhaps there is none
	frames int           // how many are good
	next   uint64        // sequence of the frame that would follow
	offset int64         // of the end of the last good frame
	doubt  int64         // offset of the first frame that no later one calls synced; none: the end

	size  int64 // of the file
	tail  tail  // what is after offset
	bytes int64 // of a torn tail, up to its last byte that is not zero
	bad   error // why the tail is not part of the log; nil: there is none
}

// goesOn reports whether the last frame says that another file follows.
func (e logEnd) goesOn() bool { return e.last == frameNext }

// isLast reports whether no frame may follow the last one.
func (e logEnd) isLast() bool { return e.last == frameNext || e.last == frameEnd }

// isWhole reports whether the file is a complete snapshot.
func (e logEnd) isWhole() bool { return e.last == frameEnd && e.offset == e.size }

// bufferSize is how many bytes are read at a time.
const bufferSize = 1 << 18

// beginReading opens the file for reading from the next frame on, and returns the logEnd from which
// readFrames goes on. endReading closes the file.
func (l *logReader) beginReading() (end logEnd, err error) {
	err = l.open()
	if err != nil {
		return end, err
	}
	l.r = bufio.NewReaderSize(readerOf(l.f, l.offset), int(min(l.size, bufferSize)))
	return logEnd{header: l.header, stamp: l.stamp, size: l.size}, nil
}

// endReading closes the file and drops the buffers, because there may be many files.
func (l *logReader) endReading() {
	l.close()
	l.r, l.buf, l.doubts = nil, nil, nil
}

// scan reads all frames from the next one on, calls each for the good ones, and returns where they
// end. Then it closes the file. The error is one of each, or of reading the file. Damage is no
// error: the tail of the end says it.
func (l *logReader) scan(each func(l *logReader, f frame, payload []byte) error) (end logEnd,
	err error) {
	end, err = l.beginReading()
	if err != nil {
		return end, err
	}
	defer l.endReading()

	for judged := (logEnd{}); ; {
		damage, err := l.readFrames(&end, each)
		switch {
		case err != nil, damage == nil:
			return end, err
		case judged.offset == end.offset:
			return judged, nil
		}

		// A bad frame is judged, and then read once more, because another process may be writing
		// it. That process may even write a later frame that calls this one synced before judgeTail
		// looks: then judgeTail calls it damaged, but the second read finds it whole.
		judged = end
		err = l.judgeTail(&judged, damage)
		if err != nil {
			return end, err
		}
		l.r.Reset(readerOf(l.f, l.offset))
	}
}

// readFrames reads good frames, calls each for them, and moves end after them. damage is what is
// wrong there; nil: the file ends.
func (l *logReader) readFrames(end *logEnd, each func(*logReader, frame, []byte) error) (
	damage *storage.DamageError, err error) {
	end.size = max(end.size, l.size)
	for {
		end.offset, end.next, end.doubt = l.offset, l.next, l.offset
		if len(l.doubts) > 0 {
			end.doubt = l.doubts[0]
		}

		f, payload, err := l.nextFrame()
		switch {
		case err == errEnd:
			return nil, nil
		case errors.As(err, &damage):
			return damage, nil
		case err != nil:
			return nil, err
		case end.isLast():
			l.offset, l.next = end.offset, end.next // nextFrame has gone past this frame
			return l.damageHere("a frame follows the one that should be the last"), nil
		}

		err = each(l, f, payload)
		if err != nil {
			return nil, err
		}

		end.frames++
		end.last = f.kind

		// The frame that f calls synced is on disk. Only the frames after it, up to f, may not be.
		l.doubts = append(l.doubts, end.offset)
		left := int(min(f.sequence-min(f.synced, f.sequence), uint64(len(l.doubts))))
		l.doubts = slices.Delete(l.doubts, 0, len(l.doubts)-left)
	}
}

// judgeTail decides what the bytes after the good part of the file are. They begin with damage.
func (l *logReader) judgeTail(end *logEnd, damage error) error {
	// A later head that says that the bad frame was on disk is enough; its payload need not be
	// whole.
	later, bytes, err := l.search(func(f frame, _ int64) (bool, error) {
		return f.synced >= l.next, nil
	})
	if err != nil {
		return err
	}
	end.size = max(end.size, l.size)

	// With FsyncAlways a commit that was never whole on disk was never answered. But a frame that a
	// later one calls synced was on disk, and so was all of a file that says that another follows.
	// Zeros are only room: a rotation that was killed leaves them even after a file's last frame.
	switch {
	case later > 0, bytes > 0 && end.isLast():
		end.tail, end.bad = damaged, damage
	case bytes > 0:
		end.tail, end.bad, end.bytes = torn, damage, bytes
	}
	return nil
}

// applyTo returns a function for scan that applies each frame to m.
func applyTo(m *kvstore.Memory) func(*logReader, frame, []byte) error {
	return func(l *logReader, f frame, payload []byte) error {
		err := apply(m, string(payload), f.count)
		if err != nil {
			return &storage.DamageError{File: l.path, Offset: l.offset - f.padded(),
				Frame: f.sequence, What: err.Error()}
		}
		return nil
	}
}
