package durable

import (
	"errors"
	"fmt"
	"io/fs"
	"kvserver/kvstore"
	"kvserver/kvstore/storage"
)

// Report is what Check or Repair has to say, a line for each thing.
type Report struct {
	Lines   []string
	Damaged bool // something that was on disk is not as it was
	Lost    bool // by Repair: some of that could not be saved
}

func (r *Report) say(format string, args ...any) {
	r.Lines = append(r.Lines, fmt.Sprintf(format, args...))
}

// damage takes note of err if it is damage; other errors are the caller's.
func (r *Report) damage(err error) error {
	var damage *storage.DamageError
	if !errors.As(err, &damage) {
		return err
	}
	r.Damaged = true
	r.say("DAMAGED %v", err)
	return nil
}

// anyFrame is for whoever wants to load all of them.
func anyFrame(frame) error { return nil }

// Check reads the whole store in dir and says what is there and what is wrong. It changes
// nothing, and takes no lock but to see who has it: beside a process that has the store open it
// reads what that has written so far. A compaction of another process may take files away:
// then it looks again.
func Check(dir storage.Directory) (r Report, err error) {
	for range lookTries {
		r, err = check(dir)
		if _, inUse := dir.InUse(); !errors.Is(err, fs.ErrNotExist) && (!r.Damaged || !inUse) {
			break
		}
	}
	return r, err
}

// lookTries is how often Check and Backup begin again beside a compaction.
const lookTries = 20

func check(dir storage.Directory) (r Report, err error) {
	names, err := dir.List()
	if err != nil {
		return r, err
	}
	if err := checkNames(dir, names); err != nil {
		return r, err
	}
	if owner, inUse := dir.InUse(); inUse {
		r.say("in use  %s: read beside it, up to what is written by now", owner)
	}
	d := &Store{dir: dir}
	l, err := d.find()
	switch {
	case err != nil:
		return r, r.damage(err)
	case len(l.segments) == 0:
		r.say("no store yet: an empty directory")
		return r, nil
	}
	m, next := kvstore.NewMemory(), uint64(1)
	if l.snapshot > 0 {
		var size int64
		if next, size, err = loadSnapshot(dir, d.id, l.snapshot, m, anyFrame); err == nil {
			r.say("ok      %s, %d bytes", dir.Path(logName(kindSnapshot, l.snapshot)), size)
		} else if err := r.damage(err); err != nil {
			return r, err
		}
	}
	for numbers := l.segments; len(numbers) > 0; {
		if next, numbers, err = r.checkSegment(dir, d.id, numbers, next, m); err != nil {
			return r, err
		}
	}
	for _, name := range l.obsolete {
		r.say("unused  %s, the next start removes it", dir.Path(name))
	}
	if !r.Damaged {
		keys, values, bytes := m.Size()
		r.say("holds %d keys, %d values, %d bytes of data", keys, values, bytes)
	}
	return r, nil
}

// checkSegment checks the first of these segments, adds it to m, and returns the
// sequence with which the next begins, and the others.
func (r *Report) checkSegment(dir storage.Directory, id storeID, numbers []uint64, first uint64,
	m *kvstore.Memory) (next uint64, others []uint64, err error) {
	name := dir.Path(logName(kindSegment, numbers[0]))
	end, err := loadSegment(dir, id, numbers[0], first, len(numbers) <= 2, m, anyFrame)
	stopped := false
	if err == nil && end.goesOn && len(numbers) == 1 {
		if f, _, openErr := dir.Open(logName(kindSegment,
			numbers[0]+1)); openErr == nil { // a rotation came since we looked
			f.Close()
			numbers = append(numbers, numbers[0]+1)
		}
	}
	if err == nil {
		stopped, err = checkNext(dir, id, numbers, end)
	}
	switch {
	case err != nil:
		return end.next, numbers[1:], r.damage(err) // what follows is read for what it is
	case stopped:
		end.next = 0 // whatever the next one begins with
		r.say("ok      %s, %d bytes; the file after it is empty, as a rotation that was stopped "+
			"leaves it", name, end.offset)
	case end.torn > 0:
		r.say("torn    %s, %d bytes, then %d of an incomplete commit with %d whole frames, as a "+
			"crash leaves it: the next start cuts it, and keeps it beside", name, end.offset, end.torn,
			end.frames)
	default:
		r.say("ok      %s, %d bytes", name, end.offset)
	}
	return end.next, numbers[1:], nil
}
