package kvstore

import (
	"errors"
	"log/slog"
	"time"
)

// compaction is how one ended.
type compaction struct {
	bytes int64 // of the new snapshot
	freed int64 // of the files that it stands for
	err   error
}

// errStopped ends a compaction because the store closes.
var errStopped = errors.New("the store closes")

// compact puts a snapshot in the place of all full files, in the background,
// when they hold more than twice what there is. It always takes the whole
// prefix of the log: a part of it, merged without what came before, would bring
// deleted keys back (bitcask issue 82, badger issue 2143, leveldb issue 184).
func (d *Durable) compact() {
	select {
	case c := <-d.compacted:
		d.noteCompaction(c)
	default:
	}
	live := d.Memory.bytes + int64(d.Memory.values)*recordExtra
	live = max(live, d.snapshot) // which has a long key once for each of its values
	if d.compacted != nil || d.closed < d.minCompact || d.closed <= 2*live {
		return
	}
	d.compacted = make(chan compaction, 1)
	go func(closed int64, through uint64) {
		bytes, err := writeSnapshot(d.dir, d.id, through, d.stop)
		d.compacted <- compaction{bytes, closed, err}
	}(d.closed, d.number-1)
}

// noteCompaction takes the end of a compaction into account. One that failed
// has changed nothing; the next full file is another chance.
func (d *Durable) noteCompaction(c compaction) {
	d.compacted = nil
	switch c.err {
	case nil:
		d.closed += c.bytes - c.freed
		d.snapshot = c.bytes
		d.log.Info("compacted the log", "freed", c.freed-c.bytes, "snapshot", c.bytes)
	case errStopped:
	default:
		d.log.Error("cannot compact the log, it goes on growing; trying again when the next file is full", "error", c.err)
	}
}

// writeSnapshot writes the snapshot of all files through a number, then removes
// them. It runs beside the store and reads only files that are full.
func writeSnapshot(dir Directory, id storeID, through uint64, stop <-chan struct{}) (size int64, err error) {
	l, err := readLayout(dir)
	if err != nil {
		return 0, err
	}
	goOn := func(frame) error {
		select {
		case <-stop:
			return errStopped
		default:
			return nil
		}
	}
	m, next := NewMemory(), uint64(1)
	var old []string
	if l.snapshot > 0 {
		if next, _, err = loadSnapshot(dir, id, l.snapshot, m, goOn); err != nil {
			return 0, err
		}
		old = append(old, logName(kindSnapshot, l.snapshot))
	}
	for _, number := range l.segments {
		if number > through {
			break
		}
		end, err := loadSegment(dir, id, number, next, false, m, goOn)
		if err != nil {
			return 0, err
		}
		if !end.goesOn {
			return 0, &DamageError{File: dir.Path(logName(kindSegment, number)), Offset: end.offset, Frame: end.next, What: "its end is missing"}
		}
		next = end.next
		old = append(old, logName(kindSegment, number))
	}
	h := fileHeader{kind: kindSnapshot, id: id, number: through, first: next}
	size, err = createLog(dir, logName(kindSnapshot, through), h, func(w *logWriter) error {
		return writeAll(w, m, goOn)
	})
	if err != nil {
		return 0, err
	}
	for _, name := range old {
		if err := dir.Remove(name); err != nil {
			return 0, err
		}
	}
	return size, nil
}

// writeAll writes what m holds as a snapshot's frames, while goOn lets it.
func writeAll(w *logWriter, m *Memory, goOn func(frame) error) error {
	var payload []byte
	f := frame{sequence: 1}
	flush := func() error {
		if err := goOn(f); err != nil {
			return err
		}
		err := w.append(f, payload, 0)
		f.sequence++
		f.count, payload = 0, payload[:0]
		return err
	}
	for key, values := range m.All() {
		for _, v := range values {
			payload = appendRecord(payload, opPut, 0, key, v)
			if f.count++; len(payload) >= maxFrameSnapshot {
				if err := flush(); err != nil {
					return err
				}
			}
		}
	}
	if f.count > 0 {
		if err := flush(); err != nil {
			return err
		}
	}
	f.kind = frameEnd
	return flush()
}

// progress tells the log how far a long load has come.
type progress struct {
	log            *slog.Logger
	start, told    time.Time
	total, bytes   int64
	records, files int
}

// newProgress prepares to tell of the load of l.
func newProgress(log *slog.Logger, dir Directory, l layout) *progress {
	p := &progress{log: log, start: time.Now(), told: time.Now()}
	count := func(name string) {
		if f, size, err := dir.Open(name); err == nil { // who reads it will complain
			p.total += size
			p.files++
			f.Close()
		}
	}
	if l.snapshot > 0 {
		count(logName(kindSnapshot, l.snapshot))
	}
	for _, number := range l.segments {
		count(logName(kindSegment, number))
	}
	return p
}

// step takes note of a frame that was loaded.
func (p *progress) step(f frame) error {
	p.records += int(f.count)
	p.bytes += f.padded()
	if now := time.Now(); now.Sub(p.told) >= progressTime {
		p.told = now
		p.log.Info("loading", "records", p.records, "bytes", p.bytes, "percent", 100*p.bytes/max(p.total, 1))
	}
	return nil
}

func (p *progress) end(m *Memory) {
	keys, values, _ := m.Size()
	p.log.Info("loaded", "keys", keys, "values", values, "records", p.records, "files", p.files, "bytes", p.total, "took", time.Since(p.start).Round(time.Millisecond))
}
