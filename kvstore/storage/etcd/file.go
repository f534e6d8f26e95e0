package etcd

import (
	"bytes"
	"cmp"
	"compress/flate"
	"context"
	"errors"
	"fmt"
	"io"
	"kvserver/kvstore/storage"
	"os"
	"slices"
	"sort"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// Sizes of files and of their pieces.
const (
	fileMost  = 1 << 47  // bytes of a file
	packLeast = 512      // bytes of a piece that is compressed, at least
	joinLeast = 8        // pieces that are joined, at least
	joinMost  = 256      // pieces that are joined, at most
	joinBytes = 64 << 10 // bytes of pieces that are joined, at most: of larger ones there are few
	bufMost   = 4 << 20  // bytes in buf from which on a write waits while etcd is full
)

// pieceFile is an open file. Its pieces are the parts in which it was sent, in order. A piece that
// begins before the end of the file cuts off what follows its start. Small pieces are joined now
// and then, so that a file of small writes has few keys. Several goroutines may use a pieceFile.
type pieceFile struct {
	d      *directory
	id     string
	isDead atomic.Bool // the file was removed or is lost: what is written to it goes nowhere

	access access // guards what is below; it may be held while etcd is asked
	name   string
	extent

	// For writing.
	buf   []byte // bytes that were written after the last piece, and are not sent yet
	tail  []byte // the bytes of the last, small pieces
	tails int    // how many pieces tail holds
	// etcd was full when the first bytes of buf were sent, so it is not known whether it has them
	isUnsure bool

	// For reading.
	page  map[string][]byte // the pieces that were read last, by their keys
	ahead int64             // how many bytes to ask for next
}

// extent is what is known of a file's pieces.
type extent struct {
	pieces []piece // what the file consists of, in order; zeros where a piece is missing
	size   int64   // of the file, in bytes
	keys   int     // how many pieces etcd has, including those that were cut off
	count  int     // the number of the next piece
	last   []byte  // the key of the last piece; nil: there is none
	hasGap bool    // a piece before the last one is missing
}

// piece is what one put has added to a file: some bytes, or none where it only cuts.
type piece struct {
	number          int   // pieces of a file are numbered from 0
	start, to, size int64 // to is where the piece ends, or where a later one has cut it off
}

// newFile returns the open file with that id, of which no piece is known yet.
func newFile(d *directory, id, name string) *pieceFile {
	return &pieceFile{d: d, id: id, name: name, access: make(access, 1)}
}

// key is the key of a piece.
func (f *pieceFile) key(p piece) []byte {
	return f.d.key(fmt.Sprintf("d/%s/%08x-%012x-%06x", f.id, p.number, p.start, p.size))
}

// from is the start of the range of pieces with that number or a higher one.
func (f *pieceFile) from(number int) []byte {
	return f.d.key(fmt.Sprintf("d/%s/%08x", f.id, number))
}

// path is what people call the file.
func (f *pieceFile) path() string { return f.d.Path(f.name) }

// open reads which pieces the file has.
func (f *pieceFile) open() error {
	_, err := f.reread()
	if err == nil && (f.hasGap || f.count == 0) { // perhaps the file was removed meanwhile
		err = f.isThere()
	}
	return err
}

// length is the size of the file, with what is not sent yet.
func (f *pieceFile) length() int64 {
	defer f.access.enter()()
	return f.size + int64(len(f.buf))
}

// findPieces reads which pieces follow those that are known.
func (f *pieceFile) findPieces() error {
	all := f.d.all("d/" + f.id + "/")
	return f.d.each(f.from(f.count), all.End, func(kvs []keyValue) error {
		for _, kv := range kvs {
			var p piece
			fmt.Sscanf(strings.TrimPrefix(string(kv.Key), string(all.Key)), "%x-%x-%x", &p.number,
				&p.start, &p.size)

			// Do not take a key for data that kvserver cannot have written.
			if p.number < 0 || p.start < 0 || p.start > fileMost || p.size < 0 ||
				p.size > 2*pieceMost || !bytes.Equal(kv.Key, f.key(p)) {
				return &storage.DamageError{File: f.path(),
					What: fmt.Sprintf("etcd has the key %q, which is none of ours", kv.Key)}
			}

			// If a piece begins after the end, one before it is missing.
			f.hasGap = f.hasGap || p.start > f.size
			f.lay(p)
		}
		return nil
	})
}

// reread reads all pieces' keys again, and reports whether the file consists of other pieces than
// before.
func (f *pieceFile) reread() (changed bool, err error) {
	was := f.extent
	f.extent = extent{}
	if err := f.findPieces(); err != nil {
		f.extent = was
		return false, err
	}

	// The bytes of these pieces are not known, so they cannot be joined.
	f.tail, f.tails = nil, 0
	return !slices.Equal(was.pieces, f.pieces), nil
}

// lay adds a piece, and cuts off all that was known from its start on. An empty piece only cuts.
func (f *pieceFile) lay(p piece) {
	p.to = p.start + p.size

	// The piece in which the new one starts is cut off there. Those after it are dropped.
	i := sort.Search(len(f.pieces), func(i int) bool { return f.pieces[i].to > p.start })
	if i < len(f.pieces) && f.pieces[i].start < p.start {
		f.pieces[i].to = p.start
		i++
	}
	f.pieces = f.pieces[:i]
	if p.size > 0 {
		f.pieces = append(f.pieces, p)
	}

	f.size, f.count, f.last = p.to, p.number+1, f.key(p)
	f.keys++
}

// Stamp says which file this is.
func (f *pieceFile) Stamp() (storage.Stamp, error) { return storage.Stamp{ID: f.id}, nil }

// isThere returns an os.ErrNotExist if the file was removed or is lost.
func (f *pieceFile) isThere() (err error) {
	isGone := f.isDead.Load()
	// Without the lock, another process may have removed or replaced the file.
	if f.d.lock == nil {
		id, findErr := f.d.fileID(f.name)
		err, isGone = findErr, id != f.id
	}

	if err == nil && isGone {
		err = fmt.Errorf("%s: %w", f.path(), os.ErrNotExist)
	}
	return err
}

func (f *pieceFile) ReadAt(b []byte, offset int64) (n int, err error) {
	defer f.access.enter()()

	// What is left of a file that was removed or is lost is of no use.
	if f.isDead.Load() {
		return 0, f.isThere()
	}

	// Send what waits in buf first: read reads only pieces.
	if err := f.send(1); err != nil {
		return 0, err
	}
	if f.d.lock == nil && offset+int64(len(b)) > f.size { // another process may have written
		if err := f.findPieces(); err != nil {
			return 0, err
		}
	}
	return f.read(b, offset)
}

// read is ReadAt of the pieces that are known. The caller has access.
func (f *pieceFile) read(b []byte, offset int64) (n int, err error) {
	for n < len(b) && offset < f.size {
		// Find the first piece that ends after offset. It may begin after offset: then there is
		// a gap, which reads as zeros.
		i := sort.Search(len(f.pieces), func(i int) bool { return f.pieces[i].to > offset })
		part, next := b[n:], f.size
		if i < len(f.pieces) {
			next = f.pieces[i].start
		}

		if next > offset {
			part = part[:min(int64(len(part)), next-offset)]
			clear(part)
		} else {
			data, err := f.fetch(i)
			if err != nil {
				return n, err
			}
			if data == nil {
				continue // f.pieces has changed
			}
			part = part[:copy(part, data[offset-next:f.pieces[i].to-next])]
		}

		n += len(part)
		offset += int64(len(part))
	}

	// An io.ReaderAt returns an error with each short read.
	if n < len(b) {
		err = io.EOF
	}
	return n, err
}

// fetch returns the bytes of piece i, and keeps it and some after it in page. If etcd does not
// have the piece any more, the writer may have joined it with others: then fetch reads the pieces'
// keys again and returns nil. Otherwise the piece is lost, and fetch returns zeros.
func (f *pieceFile) fetch(i int) ([]byte, error) {
	p := f.pieces[i]
	if data := f.page[string(f.key(p))]; data != nil {
		return data, nil
	}

	// Files are read from beginning to end, so each page is larger than the one before while the
	// link is fast enough.
	f.ahead = min(max(2*f.ahead, pageFirst), pageMost)
	err := f.fetchPage(i)
	for err == errSmaller {
		f.ahead /= 2
		err = f.fetchPage(i)
	}
	if err != nil {
		return nil, err
	}
	if data := f.page[string(f.key(p))]; data != nil {
		return data, nil
	}

	// etcd does not have the piece.
	if err := f.isThere(); err != nil {
		return nil, err
	}

	changed, err := f.reread()
	if changed || err != nil {
		return nil, err
	}
	return make([]byte, p.size), nil
}

// fetchPage replaces page by the pieces from i on, of at most ahead bytes. It returns errSmaller if
// they are to be fewer.
func (f *pieceFile) fetchPage(i int) error {
	// Ask for at least one piece.
	from, to, sum := f.pieces[i], f.pieces[i], int64(0)
	for k := i; k < len(f.pieces) && k-i < keysMost; k++ {
		if sum += f.pieces[k].size; sum > f.ahead && k > i {
			break
		}
		to = f.pieces[k]
	}

	if to == from {
		sum = -from.size // the request cannot be smaller
	}

	kvs, err := f.d.get(keyRange{Key: f.key(from), End: append(f.key(to), 0)}, int(sum))
	if err != nil {
		return err
	}

	// Keep the pieces that are whole. One that does not unpack to the size in its key counts as
	// missing.
	f.page = map[string][]byte{}
	for _, kv := range kvs {
		text := string(kv.Key[max(0, len(kv.Key)-6):])
		var size int64
		fmt.Sscanf(text, "%x", &size)
		if data := unpack(kv.Value, size); int64(len(data)) == size {
			f.page[string(kv.Key)] = data
		}
	}
	return nil
}

// WriteAt writes. It skips bytes that are in the file already: a start writes again what may not be
// on a disk. If it changes a byte before the end of the file, it cuts off all after that byte.
func (f *pieceFile) WriteAt(b []byte, offset int64) (int, error) {
	defer f.access.enter()()
	rest := b

	// The file was removed or is lost: its bytes go nowhere, as those of a removed file on a disk.
	if f.isDead.Load() {
		return len(b), nil
	}

	// This write begins before the end: skip what is the same, and cut at the first difference.
	if offset != f.size+int64(len(f.buf)) {
		if err := f.send(1); err != nil {
			return 0, err
		}

		there := make([]byte, max(0, min(int64(len(b)), f.size-offset)))
		if _, err := f.read(there, offset); err != nil {
			return 0, err
		}

		same := 0
		for same < len(there) && there[same] == b[same] {
			same++
		}
		if rest = b[same:]; len(rest) == 0 {
			return len(b), nil
		}

		if offset+int64(same) != f.size {
			if err := f.cut(offset + int64(same)); err != nil {
				return 0, err
			}
		}
	}

	// Bytes wait in buf until they fill a piece, or for Sync. While there is no room they stay in
	// buf, and Sync says so. A snapshot or a very long value would take too much memory there, so
	// it waits for room here.
	f.buf = append(f.buf, rest...)
	for {
		err := f.send(pieceMost)
		if !errors.Is(err, storage.ErrNoRoom) {
			return len(b), err
		}
		if len(f.buf) < bufMost {
			return len(b), nil
		}
		wait(f.d.lock.ctx, beatTime)
	}
}

// send sends buf in pieces, while it has at least least bytes. If etcd is full it returns a
// storage.ErrNoRoom, and buf keeps the rest.
func (f *pieceFile) send(least int) error {
	for len(f.buf) >= least && !f.isDead.Load() {
		n, err := f.sendPiece()
		if err != nil {
			return f.unlessGone(err)
		}
		f.buf = append(f.buf[:0], f.buf[n:]...)
	}
	return nil
}

// sendPiece sends the first n bytes of buf. If it must first find out what has arrived, it does
// only that, n is 0, and the caller calls it again.
func (f *pieceFile) sendPiece() (n int, err error) {
	switch {
	case f.isUnsure && f.d.client.full.Load(): // signs of life find out when there is room again
		return 0, cmp.Or(context.Cause(f.d.lock.ctx), storage.ErrNoRoom)
	case f.isUnsure:
		err = f.settle(nil)
		f.isUnsure = err != nil
		return 0, err
	}

	n, err = f.put()
	if err == errSmaller || err == errUnlike { // what was given up may have arrived, or arrive later
		return 0, f.settle(err)
	}
	f.isUnsure = errors.Is(err, storage.ErrNoRoom)
	return n, err
}

// settle reads which pieces the file has by now, after a request that may have arrived though no
// answer said so, or that arrives later than others. Such a request puts bytes that buf began with,
// and may remove pieces that it joins. why is errSmaller or errUnlike if settle is called for one
// of these, otherwise nil.
func (f *pieceFile) settle(why error) error {
	was := f.extent
	isChanged, err := f.reread()
	if errors.As(err, new(*storage.DamageError)) {
		return f.d.lock.miss(err)
	}
	if err != nil {
		return err
	}

	// If there is less than was known, or more than that request can have put, or a comparison has
	// failed for another reason, it was somebody else.
	more := f.size - was.size
	if f.hasGap || f.count < was.count || more < 0 || more > int64(len(f.buf)) ||
		why == errUnlike && !isChanged {
		return f.d.lock.miss(errors.New("pieces were deleted"))
	}
	f.buf = append(f.buf[:0], f.buf[more:]...)
	f.d.pieces.Add(int64(f.keys - was.keys))
	return nil
}

// unlessGone returns err, unless that is a storage.ErrGone: the file has lost its name or pieces.
// Then the file is dead, writes to it go nowhere, as on a disk, and the lock's Held tells.
func (f *pieceFile) unlessGone(err error) error {
	if errors.Is(err, storage.ErrGone) {
		f.isDead.Store(true)
		return nil
	}
	return err
}

// put adds a piece of the first n bytes of buf. After an errSmaller, an errUnlike or a
// storage.ErrNoRoom the piece may have arrived, or may arrive later: the caller settles what the
// file has, and calls put again, which takes fewer bytes after errSmaller. After any other error no
// more pieces can be added.
func (f *pieceFile) put() (n int, err error) {
	// The speed of the link limits how many bytes are sent at a time, and most data shrinks when
	// it is packed.
	most := int(f.d.client.piece.Load())
	n = min(len(f.buf), pieceMost)
	data, joins := f.join(f.buf[:n])
	packed := pack(data)
	for len(packed) > most && n > most {
		// Some less, because the first part may shrink less than all.
		n = max(most, int(int64(n)*int64(most)/int64(len(packed))*7/8))
		data, joins = f.join(f.buf[:n])
		packed = pack(data)
	}

	p := piece{number: f.count, start: f.size, size: int64(len(data))}
	var ops []operation
	if joins {
		p.start -= int64(len(f.tail))
		ops = append(ops, deleteKeys(f.from(f.count-f.tails), f.from(f.count))) // data has their bytes
	}

	began := time.Now()
	if err := f.add(p, packed, ops...); err != nil {
		if err == errSmaller { // the link or etcd needs smaller pieces
			f.d.client.wasTooMuch(len(packed))
		}
		return n, err
	}
	f.d.client.tookPiece(len(packed), time.Since(began))

	// After small pieces were joined, or if with this one they are too large for that, the next
	// pieces that may be joined begin after this one.
	switch {
	case joins:
		f.keys -= f.tails
		f.d.pieces.Add(-int64(f.tails))
		f.d.client.garbage.Add(int64(len(f.tail)))
		fallthrough
	case f.isTailFull(n):
		f.tail, f.tails = f.tail[:0], 0
	default:
		f.tail = append(f.tail, data...)
		f.tails++
	}
	return n, nil
}

// join returns the bytes of the next piece: b, or once there are enough small pieces before it,
// their bytes and b. Otherwise a file of small writes would have a key for each.
func (f *pieceFile) join(b []byte) (data []byte, joins bool) {
	isEnough := f.tails >= joinMost || f.tails >= joinLeast && f.isTailFull(len(b))
	if !isEnough {
		return b, false
	}
	return append(f.tail, b...), true
}

// isTailFull reports whether tail with n more bytes would be too large to be joined.
func (f *pieceFile) isTailFull(n int) bool {
	return len(f.tail)+n > min(joinBytes, int(f.d.client.piece.Load()))
}

// add applies ops and puts a piece in one transaction, if the file still has its name, and etcd
// still has the file's last piece: so no write can leave a hole.
func (f *pieceFile) add(p piece, data []byte, ops ...operation) error {
	compare := []comparison{isValue(f.d.key("n/"+f.name), []byte(f.id))}
	if f.last != nil {
		compare = append(compare, exists(f.last))
	}
	if err := f.d.do(len(data), append(ops, putKey(f.key(p), data)), compare...); err != nil {
		return err
	}

	// check compares the number of pieces with etcd's, and RoomFor counts what was written since
	// the last survey.
	f.d.pieces.Add(1)
	f.d.client.spent.Add(int64(len(data)) + pieceExtra)
	f.d.client.plain.Add(p.size + pieceExtra)
	f.lay(p)
	return nil
}

// cut makes the file end at size, which is not after its end.
func (f *pieceFile) cut(size int64) error {
	if size > f.size {
		return errors.New("a file in etcd grows only by what is written")
	}

	// An empty piece marks the new end for every reader.
	err := f.add(piece{number: f.count, start: size}, nil)
	if err == errUnlike {
		err = f.d.lock.miss(err)
	}
	if err != nil {
		return f.unlessGone(err)
	}

	// Join only pieces after the cut: the one before it may have lost its end.
	f.tail, f.tails = nil, 0
	return nil
}

// packers are compressors to be used again: they are large, and no file needs one for itself.
var packers = sync.Pool{New: func() any {
	packer, _ := flate.NewWriter(nil, flate.BestSpeed)
	return packer
}}

// pack returns b compressed, or b itself if b is small or does not shrink. Each byte is expensive:
// it travels in base64, and every member has it in its log and its database.
func pack(b []byte) []byte {
	if len(b) < packLeast {
		return b
	}

	packer := packers.Get().(*flate.Writer)
	defer packers.Put(packer)
	var packed bytes.Buffer
	packer.Reset(&packed)
	packer.Write(b)

	// Bytes that do not shrink are sent as they are. unpack knows them by their size.
	if packer.Close(); packed.Len() >= len(b) {
		return b
	}
	return packed.Bytes()
}

// unpack is the inverse of pack, for a piece of that size. If b is not what pack has returned, the
// result may have another size.
func unpack(b []byte, size int64) []byte {
	if int64(len(b)) >= size {
		return b
	}
	unpacked, _ := io.ReadAll(io.LimitReader(flate.NewReader(bytes.NewReader(b)), size+1))
	return unpacked
}

func (f *pieceFile) Sync() error {
	defer f.access.enter()()
	return f.send(1)
}

func (f *pieceFile) Truncate(size int64) error {
	defer f.access.enter()()
	err := f.send(1)
	if err == nil && size != f.size && !f.isDead.Load() {
		err = f.cut(size)
	}
	return err
}

// Close releases memory. It does not send: Sync must come first.
func (f *pieceFile) Close() error {
	defer f.access.enter()()
	f.page, f.tail, f.tails = nil, nil, 0
	return nil
}
