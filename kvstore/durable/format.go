package durable

import (
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"
	"kvserver/kvstore"
	"kvserver/kvstore/storage"
	"math"
	"slices"
	"strconv"
	"strings"
)

// The log's files. Numbers are little-endian, offsets multiples of 8.
//
//	file    = header frame*
//	header  = "kvserver" version:4 kind:4 store:16 number:8 first:8 zero:12 crc:4
//	frame   = "kvfr" length:4 sequence:8 synced:8 count:4 kind:4 crcPayload:4 crcFrame:4
//	          payload padding
//	payload = record*
//	record  = op:1 [place:uvarint] (length:uvarint bytes)*
//	          Put and Set: key value; Delete: key; Update: key old new; Remove: key value;
//	          List, in a snapshot: key n:uvarint and so many values, which come behind those
//	          that the key has; Take: key; Expire: key at:uvarint, in milliseconds of Unix time,
//	          0: it stays
//	          Update and Remove have first the place in the list of what went, so that
//	          nobody need search for it again
//
// A frame holds what one Commit made durable, or a part of it. Frames are
// numbered by sequence without a gap, from file to file; first is the number of
// a file's first. synced is the last frame that was known to be on disk when
// this one was written: a frame that later ones call synced cannot be missing
// but by damage.
//
// Every CRC (CRC-32C) of a frame begins with the store's random id and the file's kind
// and number, so neither stale bytes of other files nor log bytes inside values
// can pass for a frame. A length is believed once its frame's CRC holds and it
// fits the file.
const (
	fileMagic   = "kvserver"
	fileVersion = 3

	// What a version has that the one before it did not: 3 has List, Take and Expire. STORE stays what it was,
	// and says 2.
	oldestVersion = 2 // that can be read
	storeVersion  = 2

	headerSize = 64

	frameMagic = "kvfr"
	frameSize  = 40 // bytes, without payload
	// payload bytes after which a frame is closed: what recovery holds at a time, but for one large
	// record
	maxFramePut      = 1 << 20
	maxFrameSnapshot = 64 << 10 // the same in a snapshot: what one flipped bit takes
	kindSegment      = 1        // of a file: what was done
	kindSnapshot     = 2        // of a file: what was there
	frameRecords     = 0        // of a frame
	frameEnd         = 1        // of a frame: the last of a complete snapshot
	frameCleanStop   = 2        // of a frame: the store was closed
	frameSynced      = 3        // of a frame: it is there to say what is on disk
	frameNext        = 4        // of a frame: the last one, the log goes on in the next file
)

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

// crc is the checksum of b, begun with seed.
func crc(seed uint32, b []byte) uint32 { return crc32.Update(seed, castagnoli, b) }

// storeID is drawn when a store is made.
type storeID [16]byte

// fileHeader is the beginning of a log file.
type fileHeader struct {
	kind   uint32
	id     storeID
	number uint64
	// sequence of its first frame; of a snapshot: of the first frame after what it stands for
	first uint64
}

func (h fileHeader) encode() []byte {
	b := make([]byte, headerSize)
	copy(b, fileMagic)
	binary.LittleEndian.PutUint32(b[8:], fileVersion)
	binary.LittleEndian.PutUint32(b[12:], h.kind)
	copy(b[16:], h.id[:])
	binary.LittleEndian.PutUint64(b[32:], h.number)
	binary.LittleEndian.PutUint64(b[40:], h.first)
	binary.LittleEndian.PutUint32(b[60:], crc32.Checksum(b[:60], castagnoli))
	return b
}

// decodeHeader reads a file's header.
func decodeHeader(b []byte) (h fileHeader, err error) {
	switch {
	case len(b) < headerSize:
		return h, errors.New("shorter than a header")
	case string(b[:8]) != fileMagic:
		return h, errors.New("not a log file")
	case crc32.Checksum(b[:60], castagnoli) != binary.LittleEndian.Uint32(b[60:]):
		return h, errors.New("the header's checksum is wrong")
	case binary.LittleEndian.Uint32(b[8:]) < oldestVersion:
		return h, fmt.Errorf("%w: version %d", ErrOlder, binary.LittleEndian.Uint32(b[8:]))
	case binary.LittleEndian.Uint32(b[8:]) > fileVersion:
		return h, fmt.Errorf("%w: version %d", ErrNewer, binary.LittleEndian.Uint32(b[8:]))
	}
	h.kind = binary.LittleEndian.Uint32(b[12:])
	copy(h.id[:], b[16:])
	h.number = binary.LittleEndian.Uint64(b[32:])
	h.first = binary.LittleEndian.Uint64(b[40:])
	return h, nil
}

// seed is where the CRCs of the file's frames begin.
func (h fileHeader) seed() uint32 {
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

// padded is how many bytes the frame takes in all.
func (f frame) padded() int64 { return frameSize + (int64(f.length)+7)&^7 }

// appendFrame appends the frame of payload.
func appendFrame(b []byte, seed uint32, f frame, payload []byte) []byte {
	start := len(b)
	b = append(b, frameMagic...)
	b = binary.LittleEndian.AppendUint32(b, uint32(len(payload)))
	b = binary.LittleEndian.AppendUint64(b, f.sequence)
	b = binary.LittleEndian.AppendUint64(b, f.synced)
	b = binary.LittleEndian.AppendUint32(b, f.count)
	b = binary.LittleEndian.AppendUint32(b, f.kind)
	b = binary.LittleEndian.AppendUint32(b, crc(seed, payload))
	b = binary.LittleEndian.AppendUint32(b, crc(seed, b[start:]))
	b = append(b, payload...)
	for len(b)%8 != 0 {
		b = append(b, 0)
	}
	return b
}

// decodeFrame reads a frame's head and tells whether its CRC holds.
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

// appendRecord appends one operation on fields, the key first. place is an Update's or a Remove's.
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

// appendList appends a record of a snapshot: a key with some of its values.
func appendList(b []byte, key string, values []string) []byte {
	b = appendRecord(b, opList, 0, key)
	b = binary.AppendUvarint(b, uint64(len(values)))
	for _, v := range values {
		b = binary.AppendUvarint(b, uint64(len(v)))
		b = append(b, v...)
	}
	return b
}

// appendExpire appends a record of when key goes.
func appendExpire(b []byte, key string, at int64) []byte {
	return binary.AppendUvarint(appendRecord(b, opExpire, 0, key), uint64(at))
}

// hasPlace tells whether such a record says the place of the value that went.
func hasPlace(op byte) bool { return op == opUpdate || op == opRemove }

// fields takes a payload apart.
type fields struct {
	payload string
	bad     bool // something did not fit; from then on all is empty
}

// number takes a number off.
func (f *fields) number() (n uint64) {
	n, size := binary.Uvarint([]byte(f.payload[:min(len(f.payload), binary.MaxVarintLen64)]))
	if size <= 0 {
		f.payload, f.bad = "", true
		return 0
	}
	f.payload = f.payload[size:]
	return n
}

// text takes a string off.
func (f *fields) text() (s string) {
	n := f.number()
	if n > uint64(len(f.payload)) {
		f.payload, f.bad = "", true
		return ""
	}
	s, f.payload = f.payload[:n], f.payload[n:]
	return s
}

// apply does count records of payload to m.
func apply(m *kvstore.Memory, payload string, count uint32) error {
	f := fields{payload: payload}
	for range count {
		if f.payload == "" {
			return errors.New("fewer records than counted")
		}
		op := f.payload[0]
		f.payload = f.payload[1:]
		if err := f.applyRecord(m, op); err != nil {
			return err
		}
	}
	if f.payload != "" {
		return errors.New("more records than counted")
	}
	return nil
}

// applyRecord does one record of the kind op to m, if all of it is there.
func (f *fields) applyRecord(m *kvstore.Memory, op byte) error {
	place := 0
	if hasPlace(op) {
		place = int(min(f.number(), math.MaxInt32))
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
	if f.bad || number > math.MaxInt64 {
		return errBadRecord
	}

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
	case opList:
		for range number {
			if value := f.text(); f.bad {
				return errBadRecord
			} else {
				m.Put(key, value)
			}
		}
	case opTake:
		m.Take(key)
	case opExpire:
		m.Expire(key, int64(number))
	default:
		return fmt.Errorf("a record of the unknown kind %d", op)
	}
	return nil
}

var errBadRecord = errors.New("a record does not fit its frame")

// logWriter writes a log file. Behind its frames the file may have zeros, room
// for further ones: fsync takes half as long for bytes that only replace others,
// for then the file system has nothing of its own to write. (etcd and SQLite
// write their logs that way, too.)
type logWriter struct {
	f        storage.File
	name     string
	path     string // as people call it
	seed     uint32
	size     int64 // bytes up to the end of the last frame
	last     int64 // offset of the last frame that this writer has written; 0: none
	fileSize int64 // bytes of the file
	buf      []byte
}

// beginLog makes a log file under a temporary name: it has its own once publish has returned.
func beginLog(d storage.Directory, name string, h fileHeader) (*logWriter, error) {
	f, err := d.Create(name + tmpSuffix)
	if err != nil {
		return nil, err
	}
	w := &logWriter{f: f, name: name, path: d.Path(name), seed: h.seed()}
	if err := w.write(h.encode()); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return w, nil
}

// publish gives a file that beginLog made its name, once all of it is on disk. It closes the file.
func (w *logWriter) publish(d storage.Directory) error {
	err := w.sync()
	if closeErr := w.f.Close(); err == nil { // before the rename: Windows wants it so
		err = closeErr
	}
	if err == nil {
		err = d.Rename(w.name+tmpSuffix, w.name)
	}
	if err != nil {
		return err
	}
	if err = d.Sync(); err != nil {
		d.Remove(w.name) // or it would be taken for somebody else's
	}
	return err
}

// createLog makes a log file of fill's frames, and returns its size. If it fails there is none,
// but for a crash, which may leave a whole one.
func createLog(d storage.Directory, name string, h fileHeader,
	fill func(w *logWriter) error) (size int64, err error) {
	w, err := beginLog(d, name, h)
	if err == nil {
		if err = fill(w); err != nil {
			w.f.Close()
		} else {
			err = w.publish(d)
		}
	}
	if err != nil {
		d.Remove(name + tmpSuffix) // perhaps the disk is full
		return 0, err
	}
	return w.size, nil
}

// extendLog opens a log file of size bytes to be written further.
func extendLog(d storage.Directory, name string, h fileHeader, size int64) (*logWriter, error) {
	f, err := d.Extend(name)
	if err != nil {
		return nil, err
	}
	return &logWriter{f: f, name: name, path: d.Path(name), seed: h.seed(), size: size, fileSize: size}, nil
}

// noFrames is what a new segment is filled with.
func noFrames(*logWriter) error { return nil }

// append writes one frame, with so many zeros behind it where the file ends.
func (w *logWriter) append(f frame, payload []byte, zeros int) error {
	w.buf = appendFrame(w.buf[:0], w.seed, f, payload)
	size := w.size + int64(len(w.buf))
	if size > w.fileSize {
		w.buf = append(w.buf, make([]byte, zeros)...)
	}
	w.last = w.size
	err := w.write(w.buf)
	w.size = size
	if cap(w.buf) > 4*maxFramePut {
		w.buf = nil
	}
	return err
}

// write writes b at the end of what is there.
func (w *logWriter) write(b []byte) error {
	_, err := w.f.WriteAt(b, w.size)
	w.size += int64(len(b))
	w.fileSize = max(w.fileSize, w.size)
	return w.named("write", err)
}

// room is how many bytes of zeros there are behind the last frame.
func (w *logWriter) room() int64 { return w.fileSize - w.size }

// makeRoom makes room for so many bytes.
func (w *logWriter) makeRoom(bytes int64) error {
	if bytes <= w.room() {
		return nil
	}
	n, err := w.f.WriteAt(make([]byte, bytes-w.room()), w.fileSize)
	w.fileSize += int64(n)
	return w.named("write", err)
}

// trim cuts off the room that is left, durably.
func (w *logWriter) trim() error {
	if w.room() == 0 {
		return nil
	}
	w.fileSize = w.size
	if err := w.f.Truncate(w.fileSize); err != nil {
		return w.named("truncate", err)
	}
	return w.sync()
}

// sync makes what was written durable.
func (w *logWriter) sync() error { return w.named("fsync", w.f.Sync()) }

// named is err with the file's name, not the temporary one that it began with.
func (w *logWriter) named(op string, err error) error {
	if path := (*fs.PathError)(nil); errors.As(err, &path) {
		err = path.Err
	}
	if err == nil {
		return nil
	}
	return &fs.PathError{Op: op, Path: w.path, Err: err}
}

// The STORE file: which store this is. Its checksum is of all that stands before it,
// so a flipped bit is no other store, and no newer version.
const (
	storeFormat = "kvserver store, version %d, id %s"
	storeCheck  = ", check %08x\n"
	firstStore  = "kvserver store, version 1, id " // of what had no checksum yet
)

// maxStoreFile is more bytes than the STORE file has.
const maxStoreFile = 200

// readID reads the STORE file; found is false in a directory that has none.
func readID(dir storage.Directory) (id storeID, found bool, err error) {
	names, err := dir.List()
	if err != nil || !slices.Contains(names, storage.StoreName) {
		return id, false, err
	}
	f, size, err := dir.Open(storage.StoreName)
	if err != nil {
		return id, true, err
	}
	defer f.Close()
	b := make([]byte, min(size, maxStoreFile))
	if _, err := f.ReadAt(b, 0); err != nil && err != io.EOF {
		return id, true, readError(dir.Path(storage.StoreName), err)
	}
	if strings.HasPrefix(string(b), firstStore) {
		return id, true, fmt.Errorf("%s: %w: version 1", dir.Path(storage.StoreName), ErrOlder)
	}
	line, _, _ := strings.Cut(string(b), ", check ")
	if string(b) != line+fmt.Sprintf(storeCheck, crc32.Checksum([]byte(line), castagnoli)) {
		return id, true, &storage.DamageError{File: dir.Path(storage.StoreName), What: "not as it was written"}
	}
	var version int
	var text string
	if _, err := fmt.Sscanf(line, storeFormat, &version, &text); err == nil &&
		version != storeVersion {
		other := ErrNewer
		if version < storeVersion {
			other = ErrOlder
		}
		return id, true, fmt.Errorf("%s: %w: version %d", dir.Path(storage.StoreName), other, version)
	}
	if n, err := hex.Decode(id[:], []byte(text[:min(len(text), 2*len(id))])); err != nil ||
		n != len(id) || len(text) != 2*n {
		return id, true, &storage.DamageError{File: dir.Path(storage.StoreName), What: "not as it was written"}
	}
	return id, true, nil
}

// writeID writes the STORE file.
func writeID(dir storage.Directory, id storeID) error {
	f, err := dir.Create(storage.StoreName + tmpSuffix)
	if err != nil {
		return err
	}
	line := fmt.Sprintf(storeFormat, storeVersion, hex.EncodeToString(id[:]))
	line += fmt.Sprintf(storeCheck, crc32.Checksum([]byte(line), castagnoli))
	_, err = f.WriteAt([]byte(line), 0)
	if err == nil {
		err = f.Sync()
	}
	if err := errors.Join(err, f.Close()); err != nil {
		return err
	}
	if err := dir.Rename(storage.StoreName+tmpSuffix, storage.StoreName); err != nil {
		return err
	}
	return dir.Sync()
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
	return kind, number, isLog && kind != 0 && err == nil && number < most &&
		logName(kind, number) == name
}
