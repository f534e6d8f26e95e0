package etcd

import (
	"bytes"
	"compress/flate"
	"fmt"
	"io"
	"kvserver/kvstore/storage"
	"os"
	"slices"
	"sort"
	"strings"
)

// pieceFile is an open file: the writes that made it, one over the other. Several goroutines
// may use it.
type pieceFile struct {
	d        *directory
	id, name string

	turn  chan struct{} // one slot, for who uses what is below: a request may take long
	size  int64         // of the file, in bytes
	count int           // of pieces: the number of the next
	buf   []byte        // written, but not sent
	at    int64         // the offset of buf

	packed bytes.Buffer  // a piece, compressed
	packer *flate.Writer // to packed; nil: not needed yet

	// For reading.
	known int        // pieces that are in spans, if none is missing
	found int        // that are
	spans []span     // what the file consists of, in order; between them are zeros
	page  []keyValue // the pieces that were read last
	first int        // the number of the first of them
	ahead int64      // how many bytes to ask for, at least, if reading goes straight on
}

// span says that the bytes between two offsets of a file are a piece's, or a part of it.
type span struct {
	from, to int64
	number   int
	start    int64 // where the piece's first byte would be
	size     int64 // of the piece
}

// key is the key of a piece.
func (f *pieceFile) key(number int, offset, size int64) []byte {
	return f.d.key(fmt.Sprintf("d/%s/%08x-%012x-%06x", f.id, number, offset, size))
}

// look finds out which pieces there are behind those that are known.
func (f *pieceFile) look() error {
	all := f.d.key("d/" + f.id + "/")
	for {
		from := f.d.key(fmt.Sprintf("d/%s/%08x", f.id, f.known))
		kvs, err := f.d.get(keyRange{Key: from, End: below(all), Limit: keysMost, KeysOnly: true})
		for _, kv := range kvs {
			var s span
			fmt.Sscanf(strings.TrimPrefix(string(kv.Key), string(all)), "%x-%x-%x", &s.number,
				&s.start, &s.size)
			if s.number < f.known || s.start < 0 || s.start > fileMost || s.size < 0 ||
				s.size > pieceMost || !bytes.Equal(kv.Key, f.key(s.number, s.start, s.size)) {
				return &storage.DamageError{File: f.d.Path(f.name),
					What: fmt.Sprintf("etcd has the key %q, which is none of ours", kv.Key)}
			}
			f.known = s.number + 1
			f.found++
			s.from, s.to = s.start, s.start+s.size
			f.lay(s)
		}
		if err != nil || len(kvs) < keysMost {
			f.count = max(f.count, f.known)
			return err
		}
	}
}

// isThere returns an os.ErrNotExist if the file has lost its name.
func (f *pieceFile) isThere() error {
	_, id, err := f.d.lookUp(f.name)
	if err == nil && id != f.id {
		err = fmt.Errorf("%s: %w", f.d.Path(f.name), os.ErrNotExist)
	}
	return err
}

// lay lays a piece over what there is. An empty one is where the file ends.
func (f *pieceFile) lay(s span) {
	isEnd := s.size == 0
	i := sort.Search(len(f.spans), func(i int) bool { return f.spans[i].to > s.from })
	rest := slices.Clone(f.spans[i:])
	f.spans = f.spans[:i]
	if len(rest) > 0 && rest[0].from < s.from {
		before := rest[0]
		before.to = s.from
		f.spans = append(f.spans, before)
	}
	if isEnd {
		f.size = s.from
		return
	}
	f.spans = append(f.spans, s)
	f.size = max(f.size, s.to)
	for _, behind := range rest {
		if behind.to > s.to {
			behind.from = max(behind.from, s.to)
			f.spans = append(f.spans, behind)
		}
	}
}

func (f *pieceFile) ReadAt(b []byte, offset int64) (n int, err error) {
	f.turn <- struct{}{}
	defer func() { <-f.turn }()
	if err := f.send(1); err != nil {
		return 0, err
	}
	if f.known < f.count || offset+int64(len(b)) > f.size { // another process may have written
		if err := f.look(); err != nil {
			return 0, err
		}
	}
	for n < len(b) && offset < f.size {
		i := sort.Search(len(f.spans), func(i int) bool { return f.spans[i].to > offset })
		next := f.size
		if i < len(f.spans) {
			next = f.spans[i].from
		}
		part := b[n:]
		if next > offset {
			part = part[:min(int64(len(part)), next-offset)]
			clear(part)
		} else {
			s := f.spans[i]
			data, err := f.piece(i)
			if err != nil {
				return n, err
			}
			part = part[:copy(part, data[offset-s.start:s.to-s.start])]
		}
		n += len(part)
		offset += int64(len(part))
	}
	if n < len(b) {
		err = io.EOF
	}
	return n, err
}

// piece returns the bytes of span i's piece.
func (f *pieceFile) piece(i int) ([]byte, error) {
	s := f.spans[i]
	if k := s.number - f.first; k >= 0 && k < len(f.page) {
		return f.page[k].Value, nil
	}
	if s.number == f.first+len(f.page) {
		f.ahead = min(max(2*f.ahead, aheadLeast), pageMost)
	} else {
		f.ahead = aheadLeast
	}
	f.first, f.page = s.number, nil
	for sum := int64(0); i < len(f.spans) && f.spans[i].number == f.first+len(f.page) &&
		len(f.page) < keysMost && (sum == 0 || sum+f.spans[i].size <= f.ahead); i++ {
		s = f.spans[i]
		sum += s.size
		f.page = append(f.page, keyValue{Key: f.key(s.number, s.start, s.size),
			Value: make([]byte, s.size)})
	}
	kvs, err := f.d.get(keyRange{Key: f.page[0].Key,
		End: append(slices.Clone(f.page[len(f.page)-1].Key), 0)})
	if err == nil && len(kvs) < len(f.page) { // it is damaged, if it is still there
		err = f.isThere()
	}
	if err != nil {
		f.page = nil
		return nil, err
	}
	k := 0
	for _, kv := range kvs {
		for k < len(f.page) && !bytes.Equal(f.page[k].Key, kv.Key) {
			k++
		}
		if k == len(f.page) {
			break
		}
		data := unpack(kv.Value, int64(len(f.page[k].Value)))
		if len(data) == len(f.page[k].Value) {
			f.page[k].Value = data
		}
	}
	return f.page[0].Value, nil
}

func (f *pieceFile) WriteAt(b []byte, offset int64) (int, error) {
	f.turn <- struct{}{}
	defer func() { <-f.turn }()
	if offset != f.at+int64(len(f.buf)) {
		if err := f.send(1); err != nil {
			return 0, err
		}
		f.at = offset
	}
	f.buf = append(f.buf, b...)
	return len(b), f.send(pieceMost) // a whole piece need not wait for Sync
}

// send sends what is written in pieces, as long as there are least bytes.
func (f *pieceFile) send(least int) error {
	for len(f.buf) >= least {
		n := min(len(f.buf), pieceMost)
		if err := f.put(f.at, f.buf[:n]); err != nil {
			return err
		}
		f.at += int64(n)
		f.buf = append(f.buf[:0], f.buf[n:]...)
	}
	return nil
}

// put adds a piece. If it fails the lock is lost, so no other one has its number.
func (f *pieceFile) put(offset int64, b []byte) error {
	if err := f.d.do(putKey(f.key(f.count, offset, int64(len(b))), f.pack(b))); err != nil {
		return err
	}
	f.count++
	f.size = max(f.size, offset+int64(len(b)))
	return nil
}

// pack returns b, or the same compressed if that is smaller: base64, and the members' copies
// and logs, make each byte dear.
func (f *pieceFile) pack(b []byte) []byte {
	if len(b) < packLeast {
		return b
	}
	if f.packer == nil {
		f.packer, _ = flate.NewWriter(&f.packed, flate.BestSpeed)
	}
	f.packed.Reset()
	f.packer.Reset(&f.packed)
	f.packer.Write(b)
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
	if err != nil || size == f.size {
		return err
	}
	if err = f.put(size, nil); err == nil {
		f.size = size
	}
	return err
}

func (f *pieceFile) Close() error { return nil }
