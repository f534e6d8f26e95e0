package durable

import (
	"cmp"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"
	"math"
	"strings"
	"time"

	"kvserver/kvstore"
	"kvserver/kvstore/storage"
)

// The log's files. Numbers are little-endian, and every offset is a multiple of 8.
//
//	file    = header frame*
//	header  = "kvserver" version:4 kind:4 store:16 number:8 first:8 zero:12 crc:4
//	frame   = "kvfr" length:4 sequence:8 synced:8 count:4 kind:4 crcPayload:4 crcFrame:4
//	          payload padding
//	payload = record*
//	record  = op:1 [place:uvarint] (length:uvarint bytes)*
//
// The fields of a record, by its operation:
//
//	Put, Set, Remove  key, value
//	Delete, Take      key
//	Update            key, old value, new value
//	List              key, n:uvarint, and n values, which are appended to the key's list; only in
//	                  a snapshot
//	Expire            key, at:uvarint, in milliseconds of Unix time; 0: the key has no deadline
//
// Before its fields a record of an Update or a Remove has the place of the removed value in the
// list, so that a load need not search for it.
//
// A segment's frame holds the records of one Commit, or some, or none. Its sequence is one more
// than that of the frame before it, also from segment to segment; a snapshot counts its own frames
// from 1. A header's first is the sequence of the segment's first frame, or of the first one that
// the snapshot does not replace. A frame's synced is the last frame that was known to be on disk
// when this one was written. If a later frame calls a frame synced, that frame was once on disk: if
// it is bad now, the file is damaged.
//
// Every CRC (CRC-32C) in a frame is seeded with the store's random id and the file's kind and
// number. So neither stale bytes of other files nor log bytes inside a value can be taken for a
// frame. A length is believed only if its frame's CRC is right and the frame fits into the file.
const (
	fileMagic   = "kvserver"
	fileVersion = 3 // has List, Take and Expire, which version 2 lacks

	oldestVersion = 2 // of a log file that can be read
	storeVersion  = 2 // of STORE, whose format has not changed since

	headerSize = 64 // bytes

	frameMagic = "kvfr"
	frameSize  = 40 // bytes, without payload

	// Bytes of payload after which a frame is closed, so that a load holds no more at a time
	// (except one large record). In a snapshot they are fewer, because one flipped bit costs a
	// whole frame.
	maxFramePut      = 1 << 20
	maxFrameSnapshot = 64 << 10

	// Kinds of frames.
	frameRecords   = 0
	frameEnd       = 1 // the last frame of a complete snapshot
	frameCleanStop = 2 // the store was closed
	frameSynced    = 3 // has no records: it only says what is on disk
	frameNext      = 4 // the last frame of a full file: the log goes on in the next one
)

// fileKind is what a file in a store's directory is, as its name says. A log file's header says it,
// too.
type fileKind uint32

const (
	kindStrange  fileKind = 0 // not a store's
	kindSegment  fileKind = 1 // a log file: what was done
	kindSnapshot fileKind = 2 // a log file: what the store held
	kindStore    fileKind = 3 // STORE
	kindSpare    fileKind = 4 // SPARE
	kindTmp      fileKind = 5 // a log file or STORE that does not have its final name yet
	kindBeside   fileKind = 6 // no part of a store, but it may be in the same directory
)

// isLog reports whether it is a log file's.
func (k fileKind) isLog() bool { return k == kindSegment || k == kindSnapshot }

// Operations of a record.
const (
	opPut    = 1
	opDelete = 2
	opUpdate = 3
	opSet    = 4
	opRemove = 5
	opList   = 6
	opTake   = 7
	opExpire = 8
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// crc returns the checksum of b with a seed.
func crc(seed uint32, b []byte) uint32 { return crc32.Update(seed, castagnoli, b) }

// storeID tells a store from all others. It is a random number, drawn when the store is made.
type storeID [16]byte

// fileHeader is the beginning of a log file.
type fileHeader struct {
	kind   fileKind // of a log file
	id     storeID
	number uint64
	// The sequence of the file's first frame; in a snapshot, of the first frame that it does not
	// replace.
	first uint64

	isOld bool // after decodeHeader: the file's version is older than fileVersion
}

// name returns the file's name.
func (h fileHeader) name() string { return logName(h.kind, h.number) }

// encode returns the header as bytes.
func (h fileHeader) encode() []byte {
	b := make([]byte, headerSize)
	copy(b, fileMagic)
	binary.LittleEndian.PutUint32(b[8:], fileVersion)
	binary.LittleEndian.PutUint32(b[12:], uint32(h.kind))
	copy(b[16:], h.id[:])
	binary.LittleEndian.PutUint64(b[32:], h.number)
	binary.LittleEndian.PutUint64(b[40:], h.first)

	// The checksum covers all bytes before it, also the zeros from byte 48 on.
	binary.LittleEndian.PutUint32(b[60:], crc32.Checksum(b[:60], castagnoli))
	return b
}

// decodeHeader reads a file's header, of any version from oldestVersion on.
func decodeHeader(b []byte) (h fileHeader, err error) {
	switch {
	case len(b) < headerSize:
		return h, errors.New("shorter than a header")
	case string(b[:8]) != fileMagic:
		return h, errors.New("not a log file")
	// The checksum is checked before the version: a flipped bit must not look like a newer program.
	case crc32.Checksum(b[:60], castagnoli) != binary.LittleEndian.Uint32(b[60:]):
		return h, errors.New("the header's checksum is wrong")
	case binary.LittleEndian.Uint32(b[8:]) < oldestVersion:
		return h, fmt.Errorf("%w: version %d", ErrOlder, binary.LittleEndian.Uint32(b[8:]))
	case binary.LittleEndian.Uint32(b[8:]) > fileVersion:
		return h, fmt.Errorf("%w: version %d", ErrNewer, binary.LittleEndian.Uint32(b[8:]))
	}

	h.kind = fileKind(binary.LittleEndian.Uint32(b[12:]))
	copy(h.id[:], b[16:])
	h.number = binary.LittleEndian.Uint64(b[32:])
	h.first = binary.LittleEndian.Uint64(b[40:])
	h.isOld = binary.LittleEndian.Uint32(b[8:]) < fileVersion
	return h, nil
}

// seed returns the seed of the CRCs of the file's frames.
func (h fileHeader) seed() uint32 {
	// first is left out, so that frames can be checked even if the header is damaged.
	b := append(h.id[:len(h.id):len(h.id)], byte(h.kind))
	b = binary.LittleEndian.AppendUint64(b, h.number)
	return crc32.Checksum(b, castagnoli)
}

// frame is a frame's head.
type frame struct {
	length   uint32 // bytes of payload
	sequence uint64
	synced   uint64
	count    uint32 // records
	kind     uint32
	crc      uint32 // of the payload
}

// padded returns how many bytes the frame takes, with head and padding.
func (f frame) padded() int64 { return frameSize + (int64(f.length)+7)&^7 }

// appendFrame appends the frame f with its payload. It computes f's length and CRC.
func appendFrame(b []byte, seed uint32, f frame, payload []byte) []byte {
	// The second CRC covers only the head: a reader needs the length before it has the payload.
	start := len(b)
	b = append(b, frameMagic...)
	b = binary.LittleEndian.AppendUint32(b, uint32(len(payload)))
	b = binary.LittleEndian.AppendUint64(b, f.sequence)
	b = binary.LittleEndian.AppendUint64(b, f.synced)
	b = binary.LittleEndian.AppendUint32(b, f.count)
	b = binary.LittleEndian.AppendUint32(b, f.kind)
	b = binary.LittleEndian.AppendUint32(b, crc(seed, payload))
	b = binary.LittleEndian.AppendUint32(b, crc(seed, b[start:]))

	// The next frame begins at a multiple of 8.
	b = append(b, payload...)
	for len(b)%8 != 0 {
		b = append(b, 0)
	}
	return b
}

// decodeFrame decodes a frame's head; ok is false if its CRC is wrong.
func decodeFrame(b []byte, seed uint32) (f frame, ok bool) {
	if len(b) < frameSize || string(b[:4]) != frameMagic ||
		crc(seed, b[:36]) != binary.LittleEndian.Uint32(b[36:]) {
		return f, false
	}

	return frame{
		length:   binary.LittleEndian.Uint32(b[4:]),
		sequence: binary.LittleEndian.Uint64(b[8:]),
		synced:   binary.LittleEndian.Uint64(b[16:]),
		count:    binary.LittleEndian.Uint32(b[24:]),
		kind:     binary.LittleEndian.Uint32(b[28:]),
		crc:      binary.LittleEndian.Uint32(b[32:]),
	}, true
}

// appendRecord appends one operation and its fields, the key first. place is the removed value's
// place in the list, for an Update or a Remove.
func appendRecord(b []byte, op byte, place int, fields ...string) []byte {
	b = append(b, op)
	if hasPlace(op) {
		b = binary.AppendUvarint(b, uint64(place))
	}

	for _, f := range fields {
		b = binary.AppendUvarint(b, uint64(len(f)))
		b = append(b, f...)
	}
	return b
}

// appendList appends a List: a key with some of its values.
func appendList(b []byte, key string, values []string) []byte {
	b = appendRecord(b, opList, 0, key)
	b = binary.AppendUvarint(b, uint64(len(values)))
	for _, v := range values {
		b = binary.AppendUvarint(b, uint64(len(v)))
		b = append(b, v...)
	}
	return b
}

// appendExpire appends an Expire: key's deadline.
func appendExpire(b []byte, key string, at int64) []byte {
	return binary.AppendUvarint(appendRecord(b, opExpire, 0, key), uint64(at))
}

// hasPlace reports whether a record of this operation has the removed value's place.
func hasPlace(op byte) bool { return op == opUpdate || op == opRemove }

// fields reads a payload field by field.
type fields struct {
	payload string // the rest of it
	bad     bool   // a field did not fit; from then on all fields are empty
}

// number takes a number off the payload.
func (f *fields) number() (n uint64) {
	// A number ends inside the payload.
	n, size := binary.Uvarint([]byte(f.payload[:min(len(f.payload), binary.MaxVarintLen64)]))
	if size <= 0 {
		f.payload, f.bad = "", true
		return 0
	}

	f.payload = f.payload[size:]
	return n
}

// text takes a string off the payload.
func (f *fields) text() (s string) {
	n := f.number()
	if n > uint64(len(f.payload)) {
		f.payload, f.bad = "", true
		return ""
	}

	s, f.payload = f.payload[:n], f.payload[n:]
	return s
}

// apply applies payload's records to m. There must be exactly count of them. If not, it returns an
// error, but the records before that have been applied.
func apply(m *kvstore.Memory, payload string, count uint32) error {
	f := fields{payload: payload}
	for range count {
		if f.payload == "" {
			return errors.New("fewer records than counted")
		}
		op := f.payload[0]
		f.payload = f.payload[1:]
		err := f.applyRecord(m, op)
		if err != nil {
			return err
		}
	}

	if f.payload != "" {
		return errors.New("more records than counted")
	}
	return nil
}

// applyRecord applies one record of the operation op to m, if it is complete.
func (f *fields) applyRecord(m *kvstore.Memory, op byte) error {
	place := 0
	if hasPlace(op) {
		place = int(min(f.number(), math.MaxInt32)) // a hint: if that value is not there, search
	}

	key := f.text()
	var value, newValue string
	var number uint64
	switch op {
	case opPut, opSet, opRemove:
		value = f.text()
	case opUpdate:
		value, newValue = f.text(), f.text()
	case opList, opExpire:
		number = f.number()
	}

	// Only a List can be applied in part: of other records all fields have been read by now.
	if f.bad || number > math.MaxInt64 {
		return errBadRecord
	}

	// These are the methods that the owner called, so a load makes the same store.
	switch op {
	case opPut:
		m.Put(key, value)
	case opDelete:
		m.Delete(key)
	case opUpdate:
		m.UpdateAt(key, value, newValue, place)
	case opSet:
		m.Set(key, value)
	case opRemove:
		m.RemoveAt(key, value, place)
	case opTake:
		m.Take(key)
	case opExpire:
		m.Expire(key, int64(number))

	// A snapshot's list, with as many values as it says.
	case opList:
		for range number {
			value = f.text()
			if f.bad {
				return errBadRecord
			}
			m.Put(key, value)
		}

	default:
		return fmt.Errorf("a record of the unknown kind %d", op)
	}
	return nil
}

// errBadRecord is returned for a record that does not fit its frame, or whose number is too large.
var errBadRecord = errors.New("a record does not fit its frame")

// logWriter writes a log file. Behind its frames the file may have zeros, which are room for
// further frames: an fsync takes half as long for bytes that only replace others, because then the
// file system has no metadata to write. (etcd and SQLite write their logs like this, too.)
type logWriter struct {
	f        storage.File
	path     string     // for messages
	header   fileHeader // of a log file; zero for STORE and SPARE
	seed     uint32     // of the frames' CRCs
	size     int64      // bytes up to the end of the last frame
	fileSize int64      // bytes of the file
	buf      []byte     // the last frame written, kept for the next one

	// createFile runs prepare, if it is not nil, when all of the file is on disk, and its beginning
	// and end were checked, before the file gets its name. If prepare fails, there is no file.
	prepare func() error

	// What others have done to the file. Only files on a disk can be changed in place. A copy that
	// somebody puts over such a file lacks its end.
	stamp     storage.Stamp   // which file it is
	isSpoiled bool            // somebody has changed the file, or it is not the expected one
	isShared  bool            // the file can be changed in place
	end       [frameSize]byte // the last bytes of the last frame, or of the header
	found     [frameSize]byte // what was last read there
}

// createFile makes a file and has fill write it. The file gets its name once all of it is on disk:
// a crash leaves the whole file, or none of that name. After an error the file is removed, with one
// exception: if only the last Sync failed, STORE and a file with prepare stay. A crash may bring a
// removed file back, whole. The stamp identifies the file: if the name leads to another one later,
// somebody else has put it there.
func createFile(d storage.Directory, name string, fill func(w *logWriter) error) (
	stamp storage.Stamp, err error) {
	f, err := d.Create(name + tmpSuffix)
	if err != nil {
		return stamp, err
	}

	// Errors have the name without tmpSuffix. The bytes are on disk before the file gets its name.
	w := &logWriter{f: f, path: d.Path(name)}
	err = fill(w)
	w.readBackIfShared(d) // only now: fill need not read back each frame
	if err == nil {
		err = w.sync()
	}
	if err == nil {
		stamp, err = w.lastStamp()
	}

	// Only a good file may take the place of others.
	if err == nil && w.prepare != nil {
		err = w.prepare()
	}
	err = cmp.Or(err, f.Close()) // before the rename: Windows requires that
	if err == nil {
		err = d.Rename(name+tmpSuffix, name)
	}

	// On a full disk an unfinished file would take the room that others need.
	if err != nil {
		d.Remove(name + tmpSuffix)
		return storage.Stamp{}, err
	}

	// The name is on disk before anybody relies on it.
	err = d.Sync()
	if err != nil {
		// A log file that is left would be taken for somebody else's. But STORE, and what has taken
		// the place of others, stay: without them there would be no store.
		if name != storage.StoreName && w.prepare == nil {
			d.Remove(name)
		}
		return storage.Stamp{}, err
	}
	return stamp, nil
}

// createLog makes a log file as createFile does, with a header and the frames that fill writes;
// nil: none.
func createLog(d storage.Directory, h fileHeader, fill func(w *logWriter) error) (
	stamp storage.Stamp, err error) {
	h.isOld = false // a copy of an older file is not older
	return createFile(d, h.name(), func(w *logWriter) error {
		w.header, w.seed = h, h.seed()
		copy(w.end[:], h.encode()[headerSize-frameSize:])
		err := w.write(h.encode())
		if err == nil && fill != nil {
			err = fill(w)
		}
		return err
	})
}

// extendLog opens a log file to go on writing at end, where its last frame ends. The writer is
// spoiled if this is not the file that was made or read before, whose Stamp is stamp.
func extendLog(d storage.Directory, h fileHeader, stamp storage.Stamp, end int64) (*logWriter,
	error) {
	f, err := d.Extend(h.name())
	if err != nil {
		return nil, err
	}

	w := &logWriter{f: f, path: d.Path(h.name()), header: h, seed: h.seed(), size: end,
		fileSize: end}
	w.readBackIfShared(d)
	w.stamp, err = f.Stamp()
	w.isSpoiled = !w.stamp.IsSameFile(stamp)
	if err == nil && w.isShared {
		_, err = f.ReadAt(w.end[:], end-frameSize)
	}
	if err != nil {
		return nil, errors.Join(w.named("read", err), f.Close())
	}
	return w, nil
}

// append writes one frame, and if the file must grow for it, this many zeros after it.
func (w *logWriter) append(f frame, payload []byte, zeros int) error {
	w.buf = appendFrame(w.buf[:0], w.seed, f, payload)

	// Frame and zeros are one write, so the file grows only once for many frames.
	start, size := w.size, w.size+int64(len(w.buf))
	if size > w.fileSize {
		w.buf = append(w.buf, make([]byte, zeros)...)
	}

	// The zeros are not part of the log, which ends with the frame.
	err := w.write(w.buf)
	w.size = size

	// The frame before is checked only now, because it may vanish while this one is written.
	w.checkLast(start)
	copy(w.end[:], w.buf[size-start-frameSize:])

	// A huge record must not keep its memory for ever.
	if cap(w.buf) > 4*maxFramePut {
		w.buf = nil
	}
	return err
}

// write writes b at the end of the frames.
func (w *logWriter) write(b []byte) error {
	_, err := w.f.WriteAt(b, w.size)
	w.size += int64(len(b))
	w.fileSize = max(w.fileSize, w.size)
	return w.named("write", err)
}

// zeros returns how many bytes of zeros there are after the last frame.
func (w *logWriter) zeros() int64 { return w.fileSize - w.size }

// leastZeros is how many zeros, in bytes, writeZeros does not halve any more on a full disk.
const leastZeros = 512

// writeZeros writes zeros until there are this many bytes of them after the last frame. What it
// could write before an error stays.
func (w *logWriter) writeZeros(bytes int64) error {
	if bytes <= w.zeros() {
		return nil
	}

	// The zeros are written, because a hole made by Truncate reserves no room.
	zeros := make([]byte, min(bytes-w.zeros(), 1<<20))
	for w.zeros() < bytes {
		n, err := w.f.WriteAt(zeros[:min(bytes-w.zeros(), int64(len(zeros)))], w.fileSize)
		w.fileSize += int64(n)

		// os.File does not say how much of a failed write is on the disk. A smaller one may fit.
		if storage.IsFull(err) && len(zeros) > leastZeros {
			zeros = zeros[:len(zeros)/2]
			continue
		}
		if err != nil {
			return w.named("write", err)
		}
	}
	return nil
}

// readBackIfShared has checkLast and check read back a file that others can change in place. That
// is a file on a disk: of all directories only a disk's Sizes have zeros.
func (w *logWriter) readBackIfShared(d storage.Directory) {
	_, _, zeros := d.Sizes()
	w.isShared = zeros > 0
}

// checkLast checks whether the last frame, which ends at end, is still where it was written. An
// older copy that somebody has put over the file lacks it. A file that cannot be read is not
// spoiled.
func (w *logWriter) checkLast(end int64) error {
	if !w.isShared {
		return nil
	}

	_, err := w.f.ReadAt(w.found[:], end-frameSize)
	w.isSpoiled = w.isSpoiled || err == io.EOF || err == nil && w.found != w.end
	return err
}

// check returns an error if the file's beginning or end is not as it was written, or cannot be
// read.
func (w *logWriter) check() error {
	err := w.checkLast(w.size)
	if err == nil && w.isShared && w.header.kind != 0 { // STORE has no header
		var b [headerSize]byte
		_, err = w.f.ReadAt(b[:], 0)

		// The bytes may differ, because an older version may have made the file.
		h, headErr := decodeHeader(b[:])
		w.isSpoiled = w.isSpoiled || err == nil && (headErr != nil || h != w.header)
	}

	if w.isSpoiled {
		err = errors.New("somebody has changed it")
	}
	return w.named("read", err)
}

// lastStamp returns the stamp of a file to which no more is written: the zero Stamp, which no file
// has, if somebody has changed it.
func (w *logWriter) lastStamp() (stamp storage.Stamp, err error) {
	// The stamp comes first: a change after it will show in the file's next stamp.
	stamp, err = w.f.Stamp()
	err = cmp.Or(err, w.check())
	if w.isSpoiled {
		stamp = storage.Stamp{}
	}
	return stamp, err
}

// trim cuts off the room after the last frame, durably.
func (w *logWriter) trim() error {
	if w.zeros() == 0 {
		return nil
	}

	// The new length is on disk before anybody relies on it.
	err := w.cut(w.size)
	if err != nil {
		return err
	}
	return w.sync()
}

// cut shortens the file to size bytes, if it is longer.
func (w *logWriter) cut(size int64) error {
	if w.fileSize <= size {
		return nil
	}

	err := w.f.Truncate(size)
	if err != nil {
		return w.named("truncate", err)
	}
	w.fileSize = size
	return nil
}

// sync makes durable what was written. If there is no room now, it waits.
func (w *logWriter) sync() error { return awaitRoom(w.trySync) }

// trySync is sync that returns a storage.ErrNoRoom instead of waiting.
func (w *logWriter) trySync() error { return w.named("fsync", w.f.Sync()) }

// awaitRoom calls sync until it does not return a storage.ErrNoRoom.
func awaitRoom(sync func() error) error {
	err := sync()
	for errors.Is(err, storage.ErrNoRoom) {
		<-time.After(roomTime)
		err = sync()
	}
	return err
}

// named returns err with w's path, which lacks tmpSuffix; nil if err is nil.
func (w *logWriter) named(op string, err error) error {
	// The path that the directory put into the error is left out.
	if path := (*fs.PathError)(nil); errors.As(err, &path) {
		err = path.Err
	}
	if err == nil {
		return nil
	}
	return &fs.PathError{Op: op, Path: w.path, Err: err}
}

// The STORE file says which store this is. Its checksum covers all bytes before it, so that a
// flipped bit is taken neither for another store nor for a newer version.
const (
	storeFormat  = "kvserver store, version %d, id %s"
	storeCheck   = ", check %08x\n"
	firstStore   = "kvserver store, version 1, id " // version 1, which had no checksum
	maxStoreFile = 200                              // bytes: more than any version has
)

// readID reads the STORE file, and returns its stamp, too. The error is ErrOlder, ErrNewer, a
// *storage.DamageError, or the directory's: fs.ErrNotExist if there is no such file.
func readID(dir storage.Directory) (id storeID, stamp storage.Stamp, err error) {
	f, size, err := dir.Open(storage.StoreName)
	if err != nil {
		return id, stamp, err
	}
	defer f.Close()
	stamp, err = f.Stamp()
	if err != nil {
		return id, stamp, err
	}

	b := make([]byte, min(size, maxStoreFile))
	_, err = f.ReadAt(b, 0)
	if err != nil && err != io.EOF {
		return id, stamp, err
	}

	// Nothing is believed if the checksum is wrong. Only version 1 has none.
	path := dir.Path(storage.StoreName)
	if strings.HasPrefix(string(b), firstStore) {
		return id, stamp, fmt.Errorf("%s: %w: version 1", path, ErrOlder)
	}
	line, _, _ := strings.Cut(string(b), ", check ")
	isWhole := string(b) == line+fmt.Sprintf(storeCheck, crc(0, []byte(line)))

	// If the checksum is right, some kvserver wrote the file, perhaps another version.
	var version int
	var text string
	_, scanErr := fmt.Sscanf(line, storeFormat, &version, &text)
	said, hexErr := hex.DecodeString(text)
	switch {
	case isWhole && scanErr == nil && version > storeVersion:
		return id, stamp, fmt.Errorf("%s: %w: version %d", path, ErrNewer, version)
	case !isWhole || hexErr != nil || len(said) != len(id):
		return id, stamp, &storage.DamageError{File: path, What: "not as it was written"}
	}
	return storeID(said), stamp, nil
}

// writeID writes the STORE file, and returns its stamp. The file gets its name once all of it is on
// disk, so a crash leaves the old STORE, if there was one, or the new one.
func writeID(dir storage.Directory, id storeID) (storage.Stamp, error) {
	line := fmt.Sprintf(storeFormat, storeVersion, hex.EncodeToString(id[:]))
	line += fmt.Sprintf(storeCheck, crc(0, []byte(line)))
	return createFile(dir, storage.StoreName, func(w *logWriter) error {
		copy(w.end[:], line[len(line)-frameSize:])
		return w.write([]byte(line))
	})
}

// logNames are the names of log files, by their kinds.
var logNames = map[fileKind]string{kindSegment: "seg-%d.log", kindSnapshot: "snap-%d.log"}

// logName returns the name of a log file.
func logName(kind fileKind, number uint64) string { return fmt.Sprintf(logNames[kind], number) }

// parseName returns what the file called name is, and if it is a log file, its number.
func parseName(name string) (kind fileKind, number uint64) {
	switch name {
	case storage.StoreName:
		return kindStore, 0
	case spareName:
		return kindSpare, 0

	// LOCK, and what systems put into the volumes that they mount.
	case storage.LockName, "lost+found", "@eaDir", "#snapshot", "System Volume Information",
		"desktop.ini", "Thumbs.db":
		return kindBeside, 0
	}
	if strings.HasPrefix(name, ".") || strings.HasPrefix(name, "aquota.") {
		return kindBeside, 0
	}

	base, isTmp := strings.CutSuffix(name, tmpSuffix)
	if isTmp {
		kind, _ = parseName(base)
	}
	if kind.isLog() || kind == kindStore {
		return kindTmp, 0
	}

	// seg-007.log is no log file: otherwise two names would mean the same file.
	const most = 1 << 62 // so that there is always a next one
	for kind, format := range logNames {
		_, err := fmt.Sscanf(name, format, &number)
		if err == nil && number < most && logName(kind, number) == name {
			return kind, number
		}
	}
	return kindStrange, 0
}
