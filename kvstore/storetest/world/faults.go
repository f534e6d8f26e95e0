package world

import (
	"context"
	"errors"
	"maps"
	"math/rand/v2"
	"regexp"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"kvserver/kvstore/durable"
	"kvserver/kvstore/storage"
	"kvserver/kvstore/storetest"
)

// rot damages a file of a store that was left quiet, in a third of cases.
func (w *world) rot() (rotten bool, mend func()) {
	r := w.random
	if !w.quiet || !Chance(r, 3) {
		return false, nil
	}

	names := slices.Sorted(maps.Keys(w.dir.Names))
	name := pick(r, names...)
	f := w.dir.Names[name]
	isLog := strings.HasSuffix(name, ".log")

	// The loss of a log file must be noticed, just as its damage.
	if isLog && Chance(r, 5) {
		delete(w.dir.Names, name)
		w.tell("%s is lost", name)
		return true, func() { w.dir.Names[name] = f }
	}

	if len(f.Data) == 0 {
		return false, nil
	}

	// One bit flips, in memory and on the disk.
	at, bit := r.IntN(len(f.Data)), byte(1)<<r.IntN(8)
	if len(f.Disk) != len(f.Data) { // a file that the store no longer uses
		return false, nil
	}

	flip := func() {
		f.Data[at] ^= bit
		f.Disk[at] ^= bit
	}
	flip()

	w.tell("bit %#x at %d of %s flips, of %d bytes", bit, at, name, len(f.Data))

	// The same flip again mends the file, and the world goes on with it.
	return true, flip
}

// repair repairs a copy of what is left into a new directory, perhaps with a failure in the middle,
// and opens the result. db is nil if nothing could be read.
func (w *world) repair() (r durable.Report, db *durable.Store) {
	calls, last := 0, pick(w.random, 0, w.random.IntN(100))
	out := storetest.New()
	out.Before = func(storetest.Call) error {
		if calls++; last > 0 && calls > last {
			return errors.New("the machine has failed")
		}
		return nil
	}

	// A repair that was killed is begun again.
	r, err := durable.Repair(w.dir.Kill(), out)
	if last > 0 && err != nil {
		out = storetest.New()
		r, err = durable.Repair(w.dir.Kill(), out)
	}
	out.Before = nil

	// If nothing could be read there is nothing to open.
	if errors.Is(err, durable.ErrNothingRead) {
		return r, nil
	}
	if err == nil {
		db, err = durable.Open(context.Background(), out, durable.Options{})
	}
	if err != nil {
		w.fail("a repair, or a start with what it has made: %v", err)
		return r, nil
	}
	return r, db
}

// slowLog is the reader of a process's log: it may be slow, or gone.
type slowLog struct {
	p     *process
	slow  time.Duration
	fails bool
}

func (l *slowLog) Write(line []byte) (int, error) {
	// Only warnings and errors go into the story, which would be too long otherwise.
	if m := regexp.MustCompile(`level=(WARN|ERROR).*`).Find(line); m != nil {
		l.p.tell("log: %s", m)
	}

	// When the process has ended nothing waits any more; otherwise its last lines would take hours.
	if l.slow > 0 && !isClosed(l.p.gone) {
		select {
		case <-time.After(l.slow):
		case <-l.p.gone:
		}
	}

	// A log whose reader has gone must not harm the server.
	if l.fails {
		return 0, syscall.EPIPE
	}
	return len(line), nil
}

// operate does to the process what an operator or a machine does: pauses, backups, checks,
// questions. It returns when the process has ended, or after up to four events.
func (p *process) operate() {
	r := rand.New(rand.NewPCG(p.seed, uint64(p.began.Nanosecond())+uint64(p.id())<<32))
	for range r.IntN(5) {
		select {
		case <-time.After(Between(r, 0, 5*time.Second)):
		case <-p.gone:
			return
		}

		switch r.IntN(7) {
		case 6:
			p.removeLock(r)
		case 5:
			p.tidyUp(r)

		// A moved directory ends the server's service, so this is rare.
		case 4:
			if Chance(r, 4) {
				p.move(r)
			}
		case 0:
			p.pause(Between(r, 0, 4*time.Second))
		case 1:
			p.backup(r)

		// A check only reads, and must not take data that is being written for damage.
		case 2:
			report, err := durable.Check(p.dir)
			if !p.isDisturbed() && (err != nil || report.Damaged) {
				p.fail("a check beside the server: %v, %v", report.Lines, err)
			}
		case 3:
			if n := p.server.CountActive(); n < 0 || n > p.settings.MaxClients {
				p.fail("%d clients are active", n)
			}
		}
	}
}

// pause makes the process stand still, as SIGSTOP does: its calls do not return.
func (p *process) pause(d time.Duration) {
	// The pause counts before it begins, so that clients that wait meanwhile allow for it.
	p.mu.Lock()
	p.stalled += d
	p.paused = make(chan struct{})
	paused := p.paused
	p.mu.Unlock()

	p.tell("stands still for %v", d)
	wait(d)

	// Calls that wait in gate have read the channel before; closing it lets them go on.
	p.mu.Lock()
	p.paused = nil
	p.mu.Unlock()
	close(paused)
}

// calm keeps all other faults, and the process's end, away from the process while act is run: only
// what act does may then need mending. Nobody promises that files come back if the disk has failed
// or may be full: then act is not run.
func (p *process) calm(act func()) {
	select {
	case p.tidying <- struct{}{}:
		defer func() { <-p.tidying }()
	default: // the process is ending
		return
	}

	p.mu.Lock()
	isSound := !p.failed && p.after == nil && p.dir.Room == 0
	if isSound {
		p.plan = plan{}
	}
	p.mu.Unlock()
	if isSound {
		act()
	}
}

// tidyUp removes files of the store, as somebody does who takes them for old logs, or empties them,
// as log rotation does, or copies an old backup over them. The server must write them again within
// seconds if nothing else happens to it.
func (p *process) tidyUp(r *rand.Rand) {
	p.calm(func() {
		if Chance(r, 3) {
			p.restore(r)
		} else {
			p.removeSome(r)
		}
		p.startSecond()

		for range 5 {
			wait(1100 * time.Millisecond)

			// There may be no client left whose request would make the server look.
			p.server.Look()

			report, err := durable.Check(p.dir)
			if err == nil && !report.Damaged && !strings.HasPrefix(report.Lines[len(report.Lines)-1],
				"no store") {
				return
			}
		}
		p.fail("files that were removed are not written anew")
	})
}

// startSecond starts a second server, which must not succeed, whatever is left in the directory.
func (p *process) startSecond() {
	if db, err := durable.Open(context.Background(), p.dir, durable.Options{}); err == nil {
		db.Close()
		p.fail("a second server starts beside the first")
	}
}

// removeLock removes LOCK. Then a second server starts soon, or the process may be killed before it
// has made another LOCK.
func (p *process) removeLock(r *rand.Rand) {
	if p.isDisturbed() {
		return // a LOCK that was replaced is gone as well, if nobody has looked yet
	}
	if Chance(r, 2) {
		p.tell("somebody removes LOCK: %v", p.dir.Remove(storage.LockName))
		if Chance(r, 2) {
			p.kill(p.fsync != durable.FsyncNever && Chance(r, 2), "without a LOCK")
		}
		return
	}

	p.calm(func() {
		p.tell("somebody removes LOCK: %v, and a second server starts", p.dir.Remove(storage.LockName))
		wait(pick(r, 0, Between(r, 0, 2*time.Second)))
		p.startSecond()
		wait(1100 * time.Millisecond)
		if _, isThere := p.dir.Read(storage.LockName); !isThere {
			p.fail("LOCK is not made anew")
		}
	})
}

// removeSome removes or empties some files of the store, perhaps all.
func (p *process) removeSome(r *rand.Rand) {
	names, _ := p.dir.List()

	// Where there is only LOCK, a start takes a directory without STORE and LOCK for an empty one.
	if p.dir.Plain {
		names = slices.DeleteFunc(names, func(name string) bool { return name == storage.StoreName })
	}
	r.Shuffle(len(names), func(i, j int) { names[i], names[j] = names[j], names[i] })
	for _, name := range names[:r.IntN(len(names)+1)] {
		if Chance(r, 2) {
			p.tell("somebody empties %s", name)
			p.dir.Empty(name)
		} else {
			p.tell("somebody removes %s: %v", name, p.dir.Remove(name))
		}
	}
}

// restore copies a backup over the store, file by file, as cp does.
func (p *process) restore(r *rand.Rand) {
	copied := storetest.New()
	_, err := durable.Backup(p.dir, copied)
	if err != nil {
		p.fail("a backup beside the server: %v", err)
		return
	}

	// Data that is written during this wait is not in the backup.
	wait(Between(r, 0, 2*time.Second))
	if p.dir.Plain {
		delete(copied.Names, storage.LockName) // if LOCK was removed, a new one ends the server: see move
	}
	for _, name := range slices.Sorted(maps.Keys(copied.Names)) {
		p.tell("somebody puts a copy over %s", name)
		f, err := p.dir.Create(name)
		if err == nil {
			f.WriteAt(copied.Names[name].Data, 0)
			f.Close()
		}
	}
}

// move puts another directory in the place of the process's own, or, where there is only LOCK,
// another file in the place of that. The process must notice both.
func (p *process) move(r *rand.Rand) {
	if p.dir.Plain && Chance(r, 2) {
		p.tell("its LOCK is replaced")
		p.dir.Replace(storage.LockName, nil)
	} else {
		p.tell("its directory is moved")
		p.dir.Mu.Lock()
		p.dir.Moved = storage.ErrMoved
		p.dir.Mu.Unlock()
	}

	// From now on writes may fail, and soon they must: see checkMoved.
	p.mu.Lock()
	if !p.failed {
		p.since = time.Now()
	}
	p.failed, p.moved = true, time.Now()
	p.mu.Unlock()
}

// backup copies the store beside the process, perhaps to a slow place, and checks the copy. A copy
// that was broken off must never be taken for an empty store.
func (p *process) backup(r *rand.Rand) {
	// Everything that is answered before the copy begins must be in it.
	least := p.answered()
	to, late := storetest.New(), pick(r, 0, 0, Between(r, 0, 50*time.Millisecond))

	var calls atomic.Int64
	last := pick(r, 0, 0, 1+r.Int64N(40))
	to.Before = func(storetest.Call) error {
		wait(late)
		if calls.Add(1); last > 0 && calls.Load() > last {
			return errors.New("the backup was killed")
		}
		return nil
	}

	err := p.copyTo(to, Chance(r, 3))
	to.Before = nil
	isBroken := err != nil && last > 0 && calls.Load() > last
	if err != nil && !isBroken {
		// If the disk has failed, the backup may fail as well.
		if !p.isDisturbed() {
			p.fail("a backup beside the server: %v", err)
		}
		return
	}

	// Nobody has the copy open any more. STORE is written last: if it is there the copy is whole,
	// even if it has no keys.
	to = to.Kill()
	isWhole := to.Names[storage.StoreName] != nil
	bytes := 0
	for _, f := range to.Names {
		bytes = max(bytes, len(f.Data))
	}

	db, err := durable.Open(context.Background(), to, durable.Options{})
	switch keys := 0; {
	case err == nil:
		defer db.Close()
		if keys, _, _ = db.Size(); keys > 0 || isWhole {
			p.checkCopy(db, least)
		} else if bytes > 1000 {
			// A start makes a new store only of files that hold no more than headers; this copy
			// held data.
			p.fail("a backup that was broken off is served as an empty store")
		}
	case !isBroken:
		p.fail("a backup does not open: %v", err)
	}
}

// copyTo copies the store, perhaps while two other backups run: if two go to one place, one must be
// refused.
func (p *process) copyTo(to *storetest.Dir, beside bool) error {
	places := []*storetest.Dir{to}
	if beside {
		places = append(places, to, storetest.New())
	}

	errs := make([]error, 3)
	var all sync.WaitGroup
	for i, place := range places {
		all.Go(func() { _, errs[i] = durable.Backup(p.dir, place) })
	}
	all.Wait()

	switch {
	case !beside:
	case errs[0] == nil && errs[1] == nil:
		p.fail("two backups are made at one place")
	case errs[0] != nil && errs[1] == nil:
		return errs[2]
	}
	return errors.Join(errs[0], errs[2])
}

// answered returns the values of answered Puts to shared lists.
func (w *world) answered() map[string][]string {
	w.mu.Lock()
	defer w.mu.Unlock()

	least := map[string][]string{}
	for key, operations := range w.history {
		for _, o := range operations {
			// Nobody removes values from shared lists, so they must still be there.
			if o.Verb == "Put" && o.Answered > 0 && o.Failure == 0 && strings.HasPrefix(key, "shared") {
				least[key] = append(least[key], o.New)
			}
		}
	}
	return least
}

// checkCopy wants that a copy of the store has these values, and none that was not sent.
func (w *world) checkCopy(db *durable.Store, least map[string][]string) {
	for key, values := range least {
		list := db.Get(key)
		for _, v := range values {
			if !slices.Contains(list, v) {
				w.fail("%s is in no backup, though it was answered before", v)
			}
		}
	}
	w.knownAll(db)
}
