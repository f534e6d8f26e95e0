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
	name   atomic.Pointer[string]
	isDead atomic.Bool  // etcd has not all of it any more: what is written to it goes nowhere
	keys   atomic.Int64 // pieces that etcd has of it
	bytes  atomic.Int64 // that were written to it, about

	turn   chan struct{} // one slot, for who uses what is below: a request may take long
	pieces []piece       // what the file consists of, in order; between them are zeros
	size   int64         // of the file, in bytes
	count  int           // the number of the next piece
	last   []byte        // the key of the last one; nil: there is none
	hasGap bool          // a piece is missing before the last one

	// For writing.
	buf    []byte // written, but not sent: it belongs behind what there is
	tail   []byte // what the last, small pieces hold
	tails  int    // how many they are
	before []byte // the key of the piece before them; nil: there is none
	packed bytes.Buffer
	packer *flate.Writer // to packed; nil: not needed yet

	// For reading.
	page  map[string][]byte // the pieces that were read last, by their keys
	next  int               // the number of the piece behind them
	ahead int64             // how many bytes to ask for, if reading goes straight on
}

// piece is one write.
type piece struct {
	number          int
	start, to, size int64 // to is where the next one begins, if that has cut this one off
}

// newFile returns the open file with that id, of which nothing is known yet.
func newFile(d *directory, id, name string) *pieceFile {
	f := &pieceFile{d: d, id: id, turn: make(chan struct{}, 1)}
	f.name.Store(&name)
	return f
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
func (f *pieceFile) path() string { return f.d.Path(*f.name.Load()) }

// open finds out what there is of a file that was not open.
func (f *pieceFile) open() error {
	err := f.look()
	f.before = f.last
	if err == nil && (f.hasGap || f.count == 0) { // perhaps it was removed meanwhile
		err = f.isThere()
	}
	return err
}

// end is how large the file is.
func (f *pieceFile) end() int64 {
	f.turn <- struct{}{}
	defer func() { <-f.turn }()
	return f.size + int64(len(f.buf))
}

// look finds out which pieces there are behind those that are known.
func (f *pieceFile) look() error {
	all := f.d.key("d/" + f.id + "/")
	return f.d.each(f.from(f.count), below(all), func(kvs []keyValue) error {
		for _, kv := range kvs {
			var p piece
			fmt.Sscanf(strings.TrimPrefix(string(kv.Key), string(all)), "%x-%x-%x", &p.number,
				&p.start, &p.size)

			// A key that we cannot have written must not be taken for data.
			if p.number < 0 || p.start < 0 || p.start > fileMost || p.size < 0 ||
				p.size > 2*pieceMost || !bytes.Equal(kv.Key, f.key(p)) {
				return &storage.DamageError{File: f.path(),
					What: fmt.Sprintf("etcd has the key %q, which is none of ours", kv.Key)}
			}

			// A piece that begins behind the end shows that one before it is missing.
			f.keys.Add(1)
			f.bytes.Add(p.size + pieceExtra)
			f.hasGap = f.hasGap || p.start > f.size
			f.lay(p)
		}
		return nil
	})
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
}

// isThere returns an os.ErrNotExist if the file has lost its name.
func (f *pieceFile) isThere() (err error) {
	isGone := f.isDead.Load()
	// Without the lock, another process may have removed the file, or made another of its name.
	if f.d.lock == nil {
		var kvs []keyValue
		kvs, err = f.d.get(keyRange{Key: f.d.key("n/" + *f.name.Load())}, 0)
		isGone = len(kvs) == 0 || string(kvs[0].Value) != f.id
	}

	if err == nil && isGone {
		err = fmt.Errorf("%s: %w", f.path(), os.ErrNotExist)
	}
	return err
}

// hasHole tells whether etcd has not all pieces that it should have.
func (f *pieceFile) hasHole() (bool, error) {
	f.turn <- struct{}{}
	defer func() { <-f.turn }()

	there := map[string]bool{}
	all := f.d.key("d/" + f.id + "/")
	err := f.d.each(all, below(all), func(kvs []keyValue) error {
		for _, kv := range kvs {
			there[string(kv.Key)] = true
		}
		return nil
	})

	// A piece that was cut off may be missing: nobody reads it.
	f.keys.Store(int64(len(there)))
	return slices.ContainsFunc(f.pieces, func(p piece) bool { return !there[string(f.key(p))] }), err
}

func (f *pieceFile) ReadAt(b []byte, offset int64) (n int, err error) {
	f.turn <- struct{}{}
	defer func() { <-f.turn }()

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

// read is ReadAt of what is known. The caller has turn.
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

	// Reading goes straight on if this piece stands right behind the last page.
	isNext := p.number == f.next
	for f.ahead = max(f.ahead, pageFirst); ; {
		if err := f.fetchPage(i); err == errSmaller {
			f.ahead /= 2
		} else if err != nil {
			return nil, err
		} else {
			break
		}
	}

	// A larger page is worth its time only to somebody who reads straight on.
	if f.ahead *= 2; !isNext || f.ahead > pageMost {
		f.ahead = min(f.ahead/2, pageMost)
	}
	if data := f.page[string(f.key(p))]; data != nil {
		return data, nil
	}

	// It is not there.
	if err := f.isThere(); err != nil {
		return nil, err
	}

	// The writer may have joined the piece with others: read anew which pieces there are.
	before := f.pieces
	f.pieces, f.size, f.count, f.last = nil, 0, 0, nil
	f.keys.Store(0)
	if err := f.look(); err != nil {
		return nil, err
	}

	if !slices.Equal(before, f.pieces) {
		return nil, nil
	}

	// The piece is lost, and the reader finds zeros in its place.
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
	f.page, f.next = map[string][]byte{}, to.number+1
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
	f.turn <- struct{}{}
	defer func() { <-f.turn }()
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
		n := min(len(f.buf), int(f.d.client.piece.Load()))
		if err := f.put(f.buf[:n]); err == nil {
			f.buf = append(f.buf[:0], f.buf[n:]...)
		} else if err != errSmaller {
			return err
		} else {
			// The link or etcd wants less at a time: try again with a smaller piece.
			f.d.client.wasTooMuch()
		}
	}
	return nil
}

// put adds a piece. With errSmaller it is to be tried again with fewer bytes: then both may be
// there, of which the first will be cut off by what follows. If it fails otherwise nobody else
// adds one.
func (f *pieceFile) put(b []byte) error {
	p, before, data := piece{number: f.count, start: f.size, size: int64(len(b))}, f.last, b
	var ops []operation

	// Once there are enough small pieces, this write and they become one piece: else a file of
	// small writes would have a key for each.
	isFull := len(f.tail)+len(b) > joinBytes
	joins := f.tails >= joinLeast && (isFull || f.tails >= joinMost) &&
		f.d.client.piece.Load() >= joinBytes
	if joins {
		data, before = append(f.tail, b...), f.before
		p.start -= int64(len(f.tail))
		p.size = int64(len(data))
		ops = append(ops, deleteKeys(f.from(f.count-f.tails), f.from(f.count)))
	}

	// etcd adds the piece only if the one before is there, so no write can leave a hole.
	began, packed := time.Now(), f.pack(data)
	if err := f.write(append(ops, putKey(f.key(p), packed)), before, len(packed)); err != nil {
		return err
	}
	f.d.client.tookPiece(len(packed), time.Since(began))

	// Count the pieces, so that check can tell whether one is missing.
	f.keys.Add(1)
	f.d.pieces.Add(1)
	f.bytes.Add(p.size + pieceExtra)

	// Where the small pieces were joined, or are too large to be joined, the next ones that
	// may be joined begin behind this piece.
	switch {
	case joins:
		f.keys.Add(-int64(f.tails))
		f.d.pieces.Add(-int64(f.tails))
		f.d.client.garbage.Add(int64(len(f.tail)))
		fallthrough
	case isFull:
		f.tail, f.tails, f.before = f.tail[:0], 0, f.key(p)
	default:
		f.tail = append(f.tail, b...)
		f.tails++
	}

	f.lay(p)
	return nil
}

// write does ops, if the file has its name and the piece before what they add is there. Else
// nothing that is written to it will be there, as on a disk if it was removed, and the lock says
// so.
func (f *pieceFile) write(ops []operation, before []byte, size int) error {
	compare := []comparison{isValue(f.d.key("n/"+*f.name.Load()), []byte(f.id))}
	if before != nil {
		compare = append(compare, isThere(before))
	}
	err := f.d.do(size, ops, compare...)
	if errors.Is(err, storage.ErrGone) {
		f.isDead.Store(true)
		err = nil
	}
	return err
}

// cut ends the file at size.
func (f *pieceFile) cut(size int64) error {
	if size > f.size {
		return errors.New("a file in etcd grows only by what is written")
	}

	// An empty piece marks the new end for everybody who reads the file.
	p := piece{number: f.count, start: size}
	if err := f.write([]operation{putKey(f.key(p), nil)}, f.last, 0); err != nil {
		return err
	}

	f.keys.Add(1)
	f.d.pieces.Add(1)
	f.lay(p)
	// Pieces are joined only behind the cut: those before it may have lost their ends.
	f.tail, f.tails, f.before = nil, 0, f.last
	return nil
}

// pack returns b, or the same compressed if that is smaller: base64, and the members' copies
// and logs, make each byte dear.
func (f *pieceFile) pack(b []byte) []byte {
	if len(b) < packLeast {
		return b
	}

	// A packer is large, and a file that is only read needs none.
	if f.packer == nil {
		f.packer, _ = flate.NewWriter(&f.packed, flate.BestSpeed)
	}

	f.packed.Reset()
	f.packer.Reset(&f.packed)
	f.packer.Write(b)
	// Bytes that do not shrink are sent as they are: unpack sees it by their size.
	if f.packer.Close(); f.packed.Len() >= len(b) {
		return b
	}
	return f.packed.Bytes()
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
	f.turn <- struct{}{}
	defer func() { <-f.turn }()
	return f.send(1)
}

func (f *pieceFile) Truncate(size int64) error {
	f.turn <- struct{}{}
	defer func() { <-f.turn }()
	err := f.send(1)
	if err == nil && size != f.size && !f.isDead.Load() {
		err = f.cut(size)
	}
	return err
}

// Close lets go of what was read.
func (f *pieceFile) Close() error {
	f.turn <- struct{}{}
	defer func() { <-f.turn }()
	f.page, f.tail, f.tails, f.before = nil, nil, 0, f.last
	return nil
}
