package etcd

import (
	"bytes"
	"compress/flate"
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
	packLeast = 512      // bytes of a piece that is compressed
	joinLeast = 8        // pieces that are made one piece, at least
	joinMost  = 256      // the same, at most
	joinBytes = 64 << 10 // bytes of them: larger ones are few
)

// pieceFile is an open file: the writes that made it, one behind the other. A piece that begins
// before the end of what there is cuts that off. Small ones are made one piece, now and then, so
// that even a file of small writes has few. Several goroutines may use it.
type pieceFile struct {
	d      *directory
	id     string
	isDead atomic.Bool // etcd has not all of it any more: what is written to it goes nowhere

	access access // to what is below: a request may take long
	name   string
	extent

	// For writing.
	buf    []byte // written, but not sent: it belongs behind what there is
	tail   []byte // what the last, small pieces hold
	tails  int    // how many they are
	before []byte // the key of the piece before them; nil: there is none

	// For reading.
	page  map[string][]byte // the pieces that were read last, by their keys
	ahead int64             // how many bytes to ask for next
}

// extent is what there is of a file.
type extent struct {
	pieces []piece // what the file consists of, in order; between them are zeros
	size   int64   // of the file, in bytes
	keys   int     // how many pieces etcd has, also of those that were cut off
	count  int     // the number of the next piece
	last   []byte  // the key of the last one; nil: there is none
	hasGap bool    // a piece is missing before the last one
}

// piece is one write.
type piece struct {
	number          int
	start, to, size int64 // to is where the next one begins, if that has cut this one off
}

// newFile returns the open file with that id, of which nothing is known yet.
func newFile(d *directory, id, name string) *pieceFile {
	return &pieceFile{d: d, id: id, name: name, access: make(access, 1)}
}

// key is the key of a piece.
func (f *pieceFile) key(p piece) []byte {
	return f.d.key(fmt.Sprintf("d/%s/%08x-%012x-%06x", f.id, p.number, p.start, p.size))
}

// from is where the keys of the pieces from a number on begin.
func (f *pieceFile) from(number int) []byte {
	return f.d.key(fmt.Sprintf("d/%s/%08x", f.id, number))
}

// path is what people call the file.
func (f *pieceFile) path() string { return f.d.Path(f.name) }

// open finds out what there is of a file that was not open.
func (f *pieceFile) open() error {
	_, err := f.reread()
	if err == nil && (f.hasGap || f.count == 0) { // perhaps it was removed meanwhile
		err = f.isThere()
	}
	return err
}

// end is how large the file is.
func (f *pieceFile) end() int64 {
	defer f.access.begin()()
	return f.size + int64(len(f.buf))
}

// look finds out which pieces there are behind those that are known.
func (f *pieceFile) look() error {
	all := f.d.all("d/" + f.id + "/")
	return f.d.each(f.from(f.count), all.End, func(kvs []keyValue) error {
		for _, kv := range kvs {
			var p piece
			fmt.Sscanf(strings.TrimPrefix(string(kv.Key), string(all.Key)), "%x-%x-%x", &p.number,
				&p.start, &p.size)

			// A key that we cannot have written must not be taken for data.
			if p.number < 0 || p.start < 0 || p.start > fileMost || p.size < 0 ||
				p.size > 2*pieceMost || !bytes.Equal(kv.Key, f.key(p)) {
				return &storage.DamageError{File: f.path(),
					What: fmt.Sprintf("etcd has the key %q, which is none of ours", kv.Key)}
			}

			// A piece that begins behind the end shows that one before it is missing.
			f.hasGap = f.hasGap || p.start > f.size
			f.lay(p)
		}
		return nil
	})
}

// reread finds out anew which pieces there are, and tells whether they are others than were known.
func (f *pieceFile) reread() (changed bool, err error) {
	was := f.extent
	f.extent = extent{}
	if err := f.look(); err != nil {
		f.extent = was
		return false, err
	}

	// What the pieces hold is not known, so that none of them can be joined.
	f.tail, f.tails, f.before = nil, 0, f.last
	return !slices.Equal(was.pieces, f.pieces), nil
}

// lay puts a piece behind what there is, and cuts off what is there already. An empty one only
// cuts.
func (f *pieceFile) lay(p piece) {
	p.to = p.start + p.size

	// A piece that reaches beyond the start of the new one is cut off there, and those behind
	// it are left out.
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

// Stamp tells which file it is, as the directory's Stamps does while that has all of it.
func (f *pieceFile) Stamp() (storage.Stamp, error) { return storage.Stamp{ID: f.id}, nil }

// isThere returns an os.ErrNotExist if the file has lost its name.
func (f *pieceFile) isThere() (err error) {
	isGone := f.isDead.Load()
	// Without the lock, another process may have removed the file, or made another of its name.
	if f.d.lock == nil {
		id, findErr := f.d.find(f.name)
		err, isGone = findErr, id != f.id
	}

	if err == nil && isGone {
		err = fmt.Errorf("%s: %w", f.path(), os.ErrNotExist)
	}
	return err
}

func (f *pieceFile) ReadAt(b []byte, offset int64) (n int, err error) {
	defer f.access.begin()()

	// What is left of a file that was removed, or is lost, is of no use.
	if f.isDead.Load() {
		return 0, f.isThere()
	}

	// What is written must be in pieces first, for read knows only those.
	if err := f.send(1); err != nil {
		return 0, err
	}
	if f.d.lock == nil && offset+int64(len(b)) > f.size { // another process may have written
		if err := f.look(); err != nil {
			return 0, err
		}
	}
	return f.read(b, offset)
}

// read is ReadAt of what is known. The caller has access.
func (f *pieceFile) read(b []byte, offset int64) (n int, err error) {
	for n < len(b) && offset < f.size {
		// Find the first piece that ends behind offset. Before it there may be zeros.
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
				continue // f.pieces have changed
			}
			part = part[:copy(part, data[offset-next:f.pieces[i].to-next])]
		}

		n += len(part)
		offset += int64(len(part))
	}

	// An io.ReaderAt explains each short read with an error.
	if n < len(b) {
		err = io.EOF
	}
	return n, err
}

// fetch returns the bytes of piece i, and keeps some that follow. Nil: there are others now, for
// who writes the file has made them one. If there are not, and it has its name, it is damaged:
// then they are zeros.
func (f *pieceFile) fetch(i int) ([]byte, error) {
	p := f.pieces[i]
	if data := f.page[string(f.key(p))]; data != nil {
		return data, nil
	}

	// Files are read from end to end, so each page is larger than the one before, while the link
	// can do it.
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

	// It is not there.
	if err := f.isThere(); err != nil {
		return nil, err
	}

	// The writer may have joined the piece with others. If not, it is lost, and the reader finds
	// zeros in its place.
	changed, err := f.reread()
	if changed || err != nil {
		return nil, err
	}
	return make([]byte, p.size), nil
}

// fetchPage reads the pieces from i on, as many as ahead says.
func (f *pieceFile) fetchPage(i int) error {
	// Ask for as many pieces as fit in ahead, but for at least one.
	from, to, sum := f.pieces[i], f.pieces[i], int64(0)
	for k := i; k < len(f.pieces) && k-i < keysMost; k++ {
		if sum += f.pieces[k].size; sum > f.ahead && k > i {
			break
		}
		to = f.pieces[k]
	}

	if to == from {
		sum = -from.size // there is nothing smaller to ask for
	}

	kvs, err := f.d.get(keyRange{Key: f.key(from), End: append(f.key(to), 0)}, int(sum))
	if err != nil {
		return err
	}

	// Keep what is whole. A value that does not unpack to the size in its key is left out, as
	// if etcd did not have it.
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

// WriteAt writes behind what there is. Before that it writes only what differs: from there on all
// that was there is cut off.
func (f *pieceFile) WriteAt(b []byte, offset int64) (int, error) {
	defer f.access.begin()()
	rest := b

	// The file was removed, or is lost: its bytes go nowhere, as on a disk.
	if f.isDead.Load() {
		return len(b), nil
	}

	// A write in the middle cuts off all that follows, so bytes that are there already are
	// skipped.
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

	// Bytes behind the end wait until they fill a piece, or for Sync.
	f.buf = append(f.buf, rest...)
	return len(b), f.send(pieceMost) // a whole piece need not wait for Sync
}

// send sends what is written in pieces, as long as there are least bytes.
func (f *pieceFile) send(least int) error {
	for len(f.buf) >= least && !f.isDead.Load() {
		n, err := f.put()
		if err == errSmaller {
			n, err = f.arrived(n)
		}
		if err != nil {
			return f.unlessGone(err)
		}
		f.buf = append(f.buf[:0], f.buf[n:]...)
	}
	return nil
}

// arrived is how many of n bytes, of which the answer is lost, are in etcd: all or none.
func (f *pieceFile) arrived(n int) (int, error) {
	before, keys := f.size, f.keys
	_, err := f.reread()
	if err != nil {
		return 0, err
	}

	// Otherwise somebody has taken pieces away.
	got := int(f.size - before)
	if f.hasGap || got != 0 && got != n {
		return 0, f.d.lock.miss(errors.New("pieces were deleted"))
	}
	f.d.pieces.Add(int64(f.keys - keys))
	return got, nil
}

// unlessGone is err, but for one that says that the file has not its name, or not all its pieces:
// nothing that is written to it will be there, as on a disk if it was removed, and the lock says
// so.
func (f *pieceFile) unlessGone(err error) error {
	if errors.Is(err, storage.ErrGone) {
		f.isDead.Store(true)
		return nil
	}
	return err
}

// put adds a piece of the first n bytes of buf. With errSmaller it is to be tried again with fewer,
// if it has not arrived. If it fails otherwise nobody else adds one.
func (f *pieceFile) put() (n int, err error) {
	// The link sets how many bytes are sent at a time, and most data is smaller once packed.
	most := int(f.d.client.piece.Load())
	n = min(len(f.buf), pieceMost)
	data, joins := f.join(f.buf[:n])
	packed := pack(data)
	for len(packed) > most && n > most {
		n = max(most, n*most/len(packed)*7/8) // a little less, for not all of it shrinks alike
		data, joins = f.join(f.buf[:n])
		packed = pack(data)
	}

	p, before := piece{number: f.count, start: f.size, size: int64(len(data))}, f.last
	var ops []operation
	if joins {
		p.start -= int64(len(f.tail))
		before = f.before
		ops = append(ops, deleteKeys(f.from(f.count-f.tails), f.from(f.count)))
	}

	began := time.Now()
	if err := f.add(p, packed, before, ops...); err != nil {
		if err == errSmaller { // the link or etcd wants less at a time
			f.d.client.wasTooMuch(len(packed))
		}
		return n, err
	}
	f.d.client.tookPiece(len(packed), time.Since(began))

	// Where the small pieces were joined, or are too large to be joined, the next ones that
	// may be joined begin behind this piece.
	switch {
	case joins:
		f.keys -= f.tails
		f.d.pieces.Add(-int64(f.tails))
		f.d.client.garbage.Add(int64(len(f.tail)))
		fallthrough
	case f.isTailFull(n):
		f.tail, f.tails, f.before = f.tail[:0], 0, f.last
	default:
		f.tail = append(f.tail, data...)
		f.tails++
	}
	return n, nil
}

// join returns what the next piece holds: b, or also the small pieces before it, once there are
// enough of them. Else a file of small writes would have a key for each.
func (f *pieceFile) join(b []byte) (data []byte, joins bool) {
	isEnough := f.tails >= joinMost || f.tails >= joinLeast && f.isTailFull(len(b))
	if !isEnough {
		return b, false
	}
	return append(f.tail, b...), true
}

// isTailFull tells whether n bytes more are too many to be joined later.
func (f *pieceFile) isTailFull(n int) bool {
	return len(f.tail)+n > min(joinBytes, int(f.d.client.piece.Load()))
}

// add does ops and puts a piece, if the file has its name and the piece before that one is there:
// so no write can leave a hole.
func (f *pieceFile) add(p piece, data, before []byte, ops ...operation) error {
	compare := []comparison{isValue(f.d.key("n/"+f.name), []byte(f.id))}
	if before != nil {
		compare = append(compare, isThere(before))
	}
	if err := f.d.do(len(data), append(ops, putKey(f.key(p), data)), compare...); err != nil {
		return err
	}

	// check can tell from their number whether one is missing, and RoomFor counts what was written
	// since the last survey.
	f.d.pieces.Add(1)
	f.d.client.spent.Add(int64(len(data)) + pieceExtra)
	f.lay(p)
	return nil
}

// cut ends the file at size.
func (f *pieceFile) cut(size int64) error {
	if size > f.size {
		return errors.New("a file in etcd grows only by what is written")
	}

	// An empty piece marks the new end for everybody who reads the file.
	if err := f.add(piece{number: f.count, start: size}, nil, f.last); err != nil {
		return f.unlessGone(err)
	}
	// Pieces are joined only behind the cut: those before it may have lost their ends.
	f.tail, f.tails, f.before = nil, 0, f.last
	return nil
}

// packers are for whoever compresses next: each is large, and no file needs one for itself.
var packers = sync.Pool{New: func() any {
	packer, _ := flate.NewWriter(nil, flate.BestSpeed)
	return packer
}}

// pack returns b, or the same compressed if that is smaller: base64, and the members' copies
// and logs, make each byte dear.
func pack(b []byte) []byte {
	if len(b) < packLeast {
		return b
	}

	packer := packers.Get().(*flate.Writer)
	defer packers.Put(packer)
	var packed bytes.Buffer
	packer.Reset(&packed)
	packer.Write(b)

	// Bytes that do not shrink are sent as they are: unpack sees it by their size.
	if packer.Close(); packed.Len() >= len(b) {
		return b
	}
	return packed.Bytes()
}

// unpack is the inverse. What is none of ours is no piece of that size.
func unpack(b []byte, size int64) []byte {
	if int64(len(b)) >= size {
		return b
	}
	unpacked, _ := io.ReadAll(io.LimitReader(flate.NewReader(bytes.NewReader(b)), size+1))
	return unpacked
}

func (f *pieceFile) Sync() error {
	defer f.access.begin()()
	return f.send(1)
}

func (f *pieceFile) Truncate(size int64) error {
	defer f.access.begin()()
	err := f.send(1)
	if err == nil && size != f.size && !f.isDead.Load() {
		err = f.cut(size)
	}
	return err
}

// Close lets go of what was read.
func (f *pieceFile) Close() error {
	defer f.access.begin()()
	f.page, f.tail, f.tails, f.before = nil, nil, 0, f.last
	return nil
}
