// Package storetest has what tests of stores need: Model, which does what every store must do, and
// Dir, a directory in memory that is as unkind as a real one. Dir knows what a power failure would
// leave, its calls fail where a test tells them to, and it keeps no promise that a kernel does not
// make.
//
// To add a new kind of fault, add a few lines to a test's Dir.Before if the fault makes a call wait
// or fail, or to Dir.Crash if it is a way to lose data that was not synced.
package storetest

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"kvserver/kvstore/storage"
	"maps"
	"math/rand/v2"
	"os"
	"slices"
	"sync"
	"syscall"
	"time"
)

// ErrDisk is the error of a call that is told to fail and has no Failure of its own.
var ErrDisk = errors.New("input/output error")

// sector is the number of bytes that a disk writes as a whole or not at all.
const sector = 512

// Dir is a directory in memory; it is a storage.Directory. A file that does not exist cannot be
// renamed or removed. Create empties a file that exists instead of replacing it. Data that a failed
// Sync should have written is taken for written until it is written again. A Sync covers only the
// data that was there when it began, not what is written while it waits in Before.
//
// Its fields may be set while nobody uses it, or by a goroutine that has locked Mu.
type Dir struct {
	Mu      sync.Mutex       // guards the fields
	Names   map[string]*File // the files, as processes see them
	Room    int              // limit in bytes of all files together; 0: none
	Block   int              // files take whole blocks of so many bytes; 0: blocks of one byte
	Largest int              // limit in bytes of one file (RLIMIT_FSIZE); 0: none
	Locked  bool             // a process has the directory's own lock
	Plain   bool             // directories cannot be locked, as on NFS: there is only LOCK
	Moved   error            // the error of the lock's Held; nil: nothing has happened
	Handles int              // open files

	Calls   int   // I/O calls so far
	FailAt  int   // number of the call that fails, counted from 1; 0: none
	Failure error // its error; nil: ErrDisk
	Forever bool  // all later calls fail, too

	// Before, if not nil, is run before each call has its effect, with Mu unlocked: it may wait,
	// look at Dir, or return the error that the call fails with. After, if not nil, is run at the
	// end of each Sync, once it has had its effect or has failed.
	Before func(call Call) error
	After  func(call Call)

	// What Sizes returns, in bytes: a segment's size, the size of full segments that are compacted,
	// and how far zeros are written ahead of the log.
	Segment, Compact int64
	Reserve          int

	durable map[string]*File // Names as of the last Sync
	synced  int              // number of changes that the last Sync covered
	journal []change         // the changes of Names since then
}

// change is a change of names: a file gets the name to ("": it is removed) and loses the name from.
// If file is nil, it is the file that has the name from; otherwise it is a new file.
type change struct {
	file     *File
	from, to string
}

// apply does c to names.
func (c change) apply(names map[string]*File) {
	f := c.file
	if f == nil {
		f = names[c.from]
	}
	delete(names, c.from)

	// If the new name was another file's, that file is replaced, as a rename does it.
	if f != nil && c.to != "" {
		names[c.to] = f
	}
}

// Call is an I/O call, for Before and After.
type Call struct {
	What string // "write", "sync" and so on
	Name string // of the file; "" for the directory
}

// File is the content of a file: as processes see it (Data), and as it is on disk (Disk).
type File struct {
	Data, Disk []byte
	holder     *held         // the lock of the process that has locked the file; nil: of none
	dirty      map[int]int64 // sectors for the next Sync, each with changes at its last write
	changes    int64         // number of times that Data was changed
	synced     int64         // value of changes that the last Sync covered
}

// sync begins a Sync, and end ends it. If end is called without an error, what f held at the
// beginning is on disk. After an error the sectors are taken for written as well, as a kernel does.
func (f *File) sync() (end func(err error)) {
	// Data that is written while the Sync waits is not part of it, so the sectors are copied now.
	began, size, sectors, dirty := f.changes, len(f.Data), map[int][]byte{}, maps.Clone(f.dirty)
	for at := range dirty {
		if at*sector < size {
			sectors[at] = slices.Clone(f.Data[at*sector : min(size, (at+1)*sector)])
		}
	}

	return func(err error) {
		// A sector that was written again meanwhile waits for the next Sync.
		maps.DeleteFunc(f.dirty, func(at int, change int64) bool { return dirty[at] == change })
		// A Sync that began later and is over has put newer data on disk.
		if err != nil || began < f.synced {
			return
		}

		f.synced = began
		f.Disk = append(f.Disk, make([]byte, max(0, size-len(f.Disk)))...)[:size]

		for at, data := range sectors {
			copy(f.Disk[at*sector:], data)
		}
	}
}

// resize makes f size bytes long.
func (f *File) resize(size int) {
	f.changes++

	if size < len(f.Data) {
		// Otherwise the bytes that are cut off would come back when the file grows again.
		clear(f.Data[size:])
	}

	f.Data = append(f.Data, make([]byte, max(0, size-len(f.Data)))...)[:size]
}

// FileOf returns a file with this data, all of it on disk.
func FileOf(data []byte) *File {
	return &File{Data: slices.Clone(data), Disk: slices.Clone(data), dirty: map[int]int64{}}
}

// New returns an empty directory with the sizes of a real one.
func New() *Dir {
	return &Dir{Names: map[string]*File{}, durable: map[string]*File{}, Segment: 64 << 20,
		Compact: 64 << 20, Reserve: 1 << 20}
}

// empty returns an empty directory with the limits and sizes of d.
func (d *Dir) empty() *Dir {
	e := New()
	e.Room, e.Segment, e.Compact, e.Reserve = d.Room, d.Segment, d.Compact, d.Reserve
	e.Largest, e.Block, e.Plain = d.Largest, d.Block, d.Plain
	return e
}

// With returns a directory on disk that holds the files of d, but has data as the file name.
func (d *Dir) With(name string, data []byte) *Dir {
	c := d.empty()
	c.Room = 0
	for n, f := range d.Names {
		c.Names[n] = FileOf(f.Data)
	}

	c.Names[name] = FileOf(data)

	// All of it is on disk, so that a power failure takes nothing away.
	c.durable = maps.Clone(c.Names)
	return c
}

// MayFail reports whether a real disk can fail the call with this error.
func (c Call) MayFail(failure error) bool {
	switch {
	case failure == syscall.EMFILE:
		return slices.Contains([]string{"list", "open", "create", "lock"}, c.What)
	case storage.IsFull(failure):
		return slices.Contains([]string{"write", "create", "rename", "sync", "lock"}, c.What)
	}
	return true
}

// call counts an I/O call and returns with Mu locked. Its error is the one that the call fails
// with.
func (d *Dir) call(what, name string) (err error) {
	// Before may look at d, and wait for goroutines that do, so it is run without Mu.
	if d.Before != nil {
		err = d.Before(Call{what, name})
	}

	// Every call is counted; otherwise FailAt would not mean the same call in each run.
	d.Mu.Lock()
	d.Calls++
	if err != nil || d.FailAt == 0 || d.Calls < d.FailAt || d.Calls > d.FailAt && !d.Forever {
		return err
	}

	switch {
	case d.Failure == nil:
		return ErrDisk
	case !(Call{what, name}).MayFail(d.Failure):
		return nil
	}
	return &os.PathError{Op: what, Path: d.Path(name), Err: d.Failure}
}

// change makes a change of names, which a power failure may undo until the next Sync.
func (d *Dir) change(c change) {
	d.watchLock(func() { c.apply(d.Names) })
	d.journal = append(d.journal, c)
}

// watchLock makes a change of Names. If the change takes LOCK from its holder, the holder notices
// at its next check, which is no call: nothing makes it fail or wait. The caller has locked Mu.
func (d *Dir) watchLock(change func()) {
	lock := d.Names[storage.LockName]
	change()
	if lock != nil && lock.holder != nil && lock != d.Names[storage.LockName] {
		h := lock.holder
		time.AfterFunc(guardTime-time.Since(h.began)%guardTime, func() { h.Verify() })
	}
}

// after runs After; the caller has not locked Mu.
func (d *Dir) after(call Call) {
	if d.After != nil {
		d.After(call)
	}
}

// Empty does what `: > name` does in a shell, while others may have the file open.
func (d *Dir) Empty(name string) {
	d.Mu.Lock()
	defer d.Mu.Unlock()
	if f := d.Names[name]; f != nil {
		f.resize(0)
	}
}

// Read returns the content of a file.
func (d *Dir) Read(name string) (data []byte, isThere bool) {
	d.Mu.Lock()
	defer d.Mu.Unlock()
	f, isThere := d.Names[name]
	if isThere {
		data = slices.Clone(f.Data)
	}
	return data, isThere
}

// Replace puts another file in the place of one, as `mv` does. Handles that are open keep the old
// file.
func (d *Dir) Replace(name string, data []byte) {
	d.Mu.Lock()
	defer d.Mu.Unlock()
	d.watchLock(func() { d.Names[name] = FileOf(data) })
}

// Crash returns what a power failure now would leave. Of the data that was not synced any sectors
// may be lost, and any changes of names; but if a change of a name is lost, so are all later
// changes of that name. (ext4 and XFS write all changes of names to their journals in the order in
// which they were made. That is promised nowhere, and btrfs does not do it: see Pillai et al., "All
// File Systems Are Not Created Equal", 2014.)
func (d *Dir) Crash(random *rand.Rand) *Dir {
	d.Mu.Lock()
	defer d.Mu.Unlock()

	after := d.empty()
	names := maps.Clone(d.durable)

	// Of the changes from first on all, half or none are lost.
	first, odds := random.IntN(len(d.journal)+1), random.IntN(3) // with odds 0, 1 and 2
	lost := map[string]bool{}
	for i, c := range d.journal {
		if lost[c.from] || lost[c.to] || i >= first && random.IntN(2) >= odds {
			lost[c.from], lost[c.to] = c.from != "", c.to != ""
			continue
		}
		c.apply(names)
	}

	// A file is as long as on disk, as long as in memory, or of a length between.
	for _, name := range slices.Sorted(maps.Keys(names)) {
		f := names[name]
		least, most := min(len(f.Disk), len(f.Data)), max(len(f.Disk), len(f.Data))
		data := make([]byte, least+random.IntN(most-least+1))
		copy(data, f.Disk)

		// Each sector that was not synced is there or not, whatever happens to its neighbors.
		for at := 0; at < min(len(data), len(f.Data)); at += sector {
			if f.dirty[at/sector] > 0 && random.IntN(2) == 0 {
				copy(data[at:min(len(data), at+sector)], f.Data[at:])
			}
		}

		after.Names[name] = FileOf(data)
	}

	after.durable = maps.Clone(after.Names)
	return after
}

// Kill returns what the end of all processes now would leave: all data, because the kernel has it,
// but with no more of it on disk than before.
func (d *Dir) Kill() *Dir {
	d.Mu.Lock()
	defer d.Mu.Unlock()

	after := d.empty()

	// A file that has several entries here is one file in the copy as well.
	copies := map[*File]*File{nil: nil}
	clone := func(f *File) *File {
		if copies[f] == nil && f != nil {
			// Processes that have the old file open may go on writing, so nothing is shared.
			c := *f
			c.Data, c.Disk, c.dirty = slices.Clone(f.Data), slices.Clone(f.Disk), maps.Clone(f.dirty)
			c.holder = nil
			copies[f] = &c
		}
		return copies[f]
	}

	for name, f := range d.Names {
		after.Names[name] = clone(f)
	}
	for name, f := range d.durable {
		after.durable[name] = clone(f)
	}

	// Changes that were not synced stay so: a later power failure may still undo them.
	for _, c := range d.journal {
		after.journal = append(after.journal, change{clone(c.file), c.from, c.to})
	}
	return after
}

// Path returns the name of a file in errors.
func (d *Dir) Path(name string) string { return "dir/" + name }

// Sizes returns Segment, Compact and Reserve.
func (d *Dir) Sizes() (segment, compact int64, zeros int) {
	return d.Segment, d.Compact,
		d.Reserve
}

// RoomFor returns nil: data without room fails when it is written.
func (d *Dir) RoomFor(_, _ int64, _ bool) error { return nil }

// List returns the names of all files.
func (d *Dir) List() ([]string, error) {
	err := d.call("list", "")
	defer d.Mu.Unlock()
	if err != nil {
		return nil, err
	}
	return slices.Sorted(maps.Keys(d.Names)), nil
}

// open returns a new handle. The caller has locked Mu.
func (d *Dir) open(name string, f *File) *handle {
	d.Handles++
	return &handle{d: d, name: name, f: f}
}

// Create opens an empty file for writing.
func (d *Dir) Create(name string) (storage.File, error) {
	err := d.call("create", name)
	defer d.Mu.Unlock()
	if err != nil {
		return nil, err
	}

	f := d.Names[name]
	if f == nil {
		f = FileOf(nil)
		d.change(change{f, "", name})
	}

	// An existing file is emptied, not replaced, and whoever has it open sees that.
	f.resize(0)
	return d.open(name, f), nil
}

// Open opens an existing file, and returns its size in bytes.
func (d *Dir) Open(name string) (storage.File, int64, error) {
	err := d.call("open", name)
	defer d.Mu.Unlock()
	if err != nil {
		return nil, 0, err
	}

	f := d.Names[name]
	if f == nil {
		return nil, 0, &os.PathError{Op: "open", Path: d.Path(name), Err: os.ErrNotExist}
	}
	return d.open(name, f), int64(len(f.Data)), nil
}

// Extend is Open.
func (d *Dir) Extend(name string) (storage.File, error) {
	f, _, err := d.Open(name)
	return f, err
}

// Rename gives a file another name.
func (d *Dir) Rename(from, to string) error {
	err := d.call("rename", from)
	defer d.Mu.Unlock()
	if err != nil {
		return err
	}

	if d.Names[from] == nil {
		return &os.LinkError{Op: "rename", Old: from, New: to, Err: os.ErrNotExist}
	}

	d.change(change{nil, from, to})
	return nil
}

// Remove removes a file.
func (d *Dir) Remove(name string) error {
	err := d.call("remove", name)
	defer d.Mu.Unlock()
	if err != nil {
		return err
	}

	if d.Names[name] == nil {
		return &os.PathError{Op: "remove", Path: d.Path(name), Err: os.ErrNotExist}
	}

	d.change(change{nil, name, ""})
	return nil
}

// Stamps returns for each name which file has it, and when it was changed last.
func (d *Dir) Stamps() (map[string]storage.Stamp, error) {
	err := d.call("stat", "")
	defer d.Mu.Unlock()
	if err != nil {
		return nil, err
	}

	stamps := map[string]storage.Stamp{}
	for name, f := range d.Names {
		stamps[name] = f.stamp()
	}
	return stamps, nil
}

// stamp returns which file this is. The number of changes stands for the time, because two contents
// of a file never have the same number.
func (f *File) stamp() storage.Stamp {
	return storage.Stamp{ID: f, Size: int64(len(f.Data)), Changed: time.Unix(f.changes, 0)}
}

// Sync makes the names durable.
func (d *Dir) Sync() error {
	d.Mu.Lock()

	// The names are copied now: others may be added while the call waits.
	names, began := maps.Clone(d.Names), d.synced+len(d.journal)
	d.Mu.Unlock()
	err := d.call("sync", "")

	// A Sync that began later and is over has put newer names on disk.
	if err == nil && began >= d.synced {
		d.durable, d.journal, d.synced = names, d.journal[began-d.synced:], began
	}
	d.Mu.Unlock()

	// After may look at d, so it is run without Mu.
	d.after(Call{"sync", ""})
	return err
}

// Lock does what a disk's Lock does: it locks the directory itself, unless that is Plain, and LOCK,
// which others may remove, empty or replace. If STORE is there without LOCK it waits first.
func (d *Dir) Lock(context.Context) (storage.Lock, error) {
	err := d.call("lock", "")
	defer d.Mu.Unlock()
	switch {
	case err != nil:
		return nil, err
	case d.isLocked():
		return nil, storage.ErrLocked
	}

	d.Locked = !d.Plain
	if d.Names[storage.LockName] == nil && d.Names[storage.StoreName] != nil {
		d.Mu.Unlock()
		<-time.After(noticeTime)
		d.Mu.Lock()
	}

	// Where there is only LOCK, a process that runs may have made it again by now.
	if d.Plain && d.isLocked() {
		return nil, storage.ErrLocked
	}

	l := &held{d: d, began: time.Now(), hasDir: !d.Plain, file: d.Names[storage.LockName]}
	if l.file == nil {
		l.again()
	}
	l.file.holder = l
	return l, nil
}

// isLocked reports whether a process has locked the directory; if that is Plain, LOCK. The caller
// has locked Mu.
func (d *Dir) isLocked() bool {
	f := d.Names[storage.LockName]
	return d.Locked || d.Plain && f != nil && f.holder != nil
}

// InUse reports whether the lock is held.
func (d *Dir) InUse() (owner string, inUse bool) {
	d.Mu.Lock()
	defer d.Mu.Unlock()
	return "by a test", d.isLocked()
}

// Close does nothing.
func (d *Dir) Close() error { return nil }

// A disk's lock has these times: its holder looks at it every guardTime, and a start that finds
// STORE but no LOCK waits for noticeTime.
const (
	guardTime  = time.Second
	noticeTime = 2*guardTime + guardTime/2
)

// held is the lock of a Dir. It decides as a disk's lock does.
type held struct {
	d      *Dir
	began  time.Time
	hasDir bool  // the directory itself is locked, too
	file   *File // LOCK, as it was locked; nil once the lock is closed
	lost   error // why the lock is lost
}

// again makes a new file LOCK and locks it. The caller has locked Mu.
func (h *held) again() {
	h.release()
	h.file = FileOf(nil)
	h.file.holder = h
	h.d.change(change{h.file, "", storage.LockName})
}

// release unlocks the file, unless another process has taken it. The caller has locked Mu.
func (h *held) release() {
	if h.file != nil && h.file.holder == h {
		h.file.holder = nil
	}
}

// Held returns what the last check has found.
func (h *held) Held() error {
	h.d.Mu.Lock()
	defer h.d.Mu.Unlock()
	return cmp.Or(h.d.Moved, h.lost)
}

// Verify makes a new LOCK if that was removed. A LOCK that is another file now it replaces only if
// the directory itself is locked; otherwise the lock is lost.
func (h *held) Verify() error {
	h.d.Mu.Lock()
	defer h.d.Mu.Unlock()

	switch f := h.d.Names[storage.LockName]; {
	case h.file == nil, f == h.file, h.lost != nil, h.d.Moved != nil:
	case f != nil && !h.hasDir:
		h.lost = fmt.Errorf("%w: LOCK is another file now", storage.ErrMoved)
	default:
		h.again()
	}
	return cmp.Or(h.d.Moved, h.lost)
}

// Lost returns nil: nobody waits for the loss of this lock.
func (h *held) Lost() <-chan struct{} { return nil }

// Close releases the lock. The file LOCK stays.
func (h *held) Close() error {
	h.d.Mu.Lock()
	defer h.d.Mu.Unlock()
	h.release()
	h.file = nil
	if h.hasDir {
		h.d.Locked = false
	}
	return nil
}

// handle is an open File.
type handle struct {
	d      *Dir
	name   string
	f      *File
	closed bool
}

// call is Dir.call, which also fails on a closed handle. It returns with Mu locked.
func (h *handle) call(what string) error {
	err := h.d.call(what, h.name)
	if h.closed {
		return os.ErrClosed
	}
	return err
}

func (h *handle) ReadAt(p []byte, off int64) (int, error) {
	err := h.call("read")
	defer h.d.Mu.Unlock()
	if err != nil {
		return 0, err
	}

	n := copy(p, h.f.Data[min(int(off), len(h.f.Data)):])

	// An io.ReaderAt returns an error whenever it reads less than it was asked for.
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

// blocks returns how many bytes of the disk a file takes.
func (d *Dir) blocks(f *File) int {
	block := max(1, d.Block)
	return (len(f.Data) + block - 1) / block * block
}

func (h *handle) WriteAt(p []byte, off int64) (int, error) {
	err := h.call("write")
	defer h.d.Mu.Unlock()

	// A write that fails may have written a part.
	n := len(p)
	if err != nil {
		n /= 2
	}

	// Bytes that are overwritten, or that fill the file's last block, need no free room.
	if h.d.Room > 0 {
		free := h.d.Room
		for _, f := range h.d.Names {
			free -= h.d.blocks(f)
		}
		if most := max(0, h.d.blocks(h.f)+max(0, free)-int(off)); n > most {
			n, err = most, &os.PathError{Op: "write", Path: h.d.Path(h.name), Err: syscall.ENOSPC}
		}
	}

	if most := max(0, h.d.Largest-int(off)); h.d.Largest > 0 && n > most {
		n, err = most, &os.PathError{Op: "write", Path: h.d.Path(h.name), Err: syscall.EFBIG}
	}

	if n > 0 {
		h.f.resize(max(len(h.f.Data), int(off)+n))
		copy(h.f.Data[off:], p[:n])

		// A power failure may take these sectors until the next Sync.
		for at := int(off) / sector; at <= (int(off)+n-1)/sector; at++ {
			h.f.dirty[at] = h.f.changes
		}
	}

	// As os.File, which does not say how much a failed call wrote.
	if err != nil {
		n = 0
	}
	return n, err
}

func (h *handle) Truncate(size int64) error {
	err := h.call("truncate")
	defer h.d.Mu.Unlock()
	if err == nil {
		h.f.resize(int(size))
	}
	return err
}

func (h *handle) Stamp() (storage.Stamp, error) {
	err := h.call("fstat")
	defer h.d.Mu.Unlock()
	if err != nil {
		return storage.Stamp{}, err
	}
	return h.f.stamp(), nil
}

func (h *handle) Sync() error {
	h.d.Mu.Lock()

	// Data that is written while the call waits is not part of this Sync.
	end := h.f.sync()
	h.d.Mu.Unlock()

	err := h.call("sync")
	end(err)
	h.d.Mu.Unlock()

	h.d.after(Call{"sync", h.name})
	return err
}

func (h *handle) Close() error {
	h.d.Mu.Lock()
	defer h.d.Mu.Unlock()

	// A second Close is a mistake of the caller, which a real file reports as well.
	if h.closed {
		return os.ErrClosed
	}
	h.closed = true
	h.d.Handles--
	return nil
}
