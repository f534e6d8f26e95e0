package durable

import (
	"bytes"
	"errors"
	"io"
	"kvserver/kvstore/storage"
	"kvserver/kvstore/storetest"
	"log/slog"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

// holes are ways to remove files from a store with a snapshot and several segments.
var holes = map[string]func(name string, kind fileKind, number, last uint64) bool{
	"the file that is written": func(_ string, kind fileKind, number, last uint64) bool {
		return kind == kindSegment && number == last
	},
	"a full file": func(_ string, kind fileKind, number, last uint64) bool {
		return kind == kindSegment && number == last-1
	},
	"the snapshot": func(_ string, kind fileKind, _, _ uint64) bool { return kind == kindSnapshot },
	"STORE": func(name string, _ fileKind, _, _ uint64) bool {
		return name == storage.StoreName
	},
	"all logs":   func(_ string, kind fileKind, _, _ uint64) bool { return kind.isLog() },
	"everything": func(string, fileKind, uint64, uint64) bool { return true },
}

// removeThose removes the files of a store that isGone selects.
func removeThose(dir *storetest.Dir, d *Store, isGone func(string, fileKind, uint64, uint64) bool) {
	for _, name := range slices.Sorted(maps.Keys(dir.Names)) {
		if kind, number := parseName(name); isGone(name, kind, number, d.number()) {
			dir.Remove(name)
		}
	}
}

// withHole returns an open store from whose directory somebody has removed files.
func withHole(t *testing.T, log io.Writer,
	isGone func(string, fileKind, uint64, uint64) bool) (*storetest.Dir, *Store) {
	dir := storetest.New()
	d, err := openSmall(dir, Options{Log: slog.New(slog.NewTextHandler(log, nil))})
	if err != nil {
		t.Fatal(err)
	}

	storetest.Script(t, d, storetest.NewHistory())

	// From here on nothing is compacted, so that there are full files to remove.
	d.minCompact = 1 << 40
	for number := d.number() + 2; d.number() < number; {
		d.Put("key", "value")
		if err := d.Commit(); err != nil {
			t.Fatal(err)
		}
	}

	removeThose(dir, d, isGone)
	dir.Sync()
	return dir, d
}

// Ensure that files which somebody removes while the store is open are written again: after a
// Commit a second later, or after Close, everything is there.
func TestRemovedFilesAreWrittenAnew(t *testing.T) {
	for what, isGone := range holes {
		synctest.Test(t, func(t *testing.T) {
			var log bytes.Buffer
			dir, d := withHole(t, &log, isGone)
			<-time.After(lookTime)
			d.Put("after", "all")
			if err := d.Commit(); err != nil {
				t.Fatalf("%s: %v", what, err)
			}
			want := maps.Collect(d.All())
			wantAll(t, what+", after a crash", dir.Crash(rand.New(rand.NewPCG(1, 1))), want)

			d.Put("and", "more")
			if err := d.Commit(); err != nil {
				t.Fatalf("%s: %v", what, err)
			}
			want = maps.Collect(d.All())
			wantAll(t, what+", after a crash later", dir.Crash(rand.New(rand.NewPCG(2, 1))), want)

			if n := strings.Count(log.String(), "level=ERROR"); n != 1 ||
				!strings.Contains(log.String(), "all data is on disk again") {
				t.Errorf("%s: the log says\n%s", what, &log)
			}

			removeThose(dir, d, isGone)
			if err := d.Close(); err != nil {
				t.Fatalf("%s: Close: %v", what, err)
			}
			wantAll(t, what+", just before Close", dir, want)
		})
	}
}

// Ensure that STORE and the current file are written again if they are removed during a long
// compaction, and that no Commit is answered before.
func TestRemovedBesideACompaction(t *testing.T) {
	for _, isStore := range []bool{true, false} {
		synctest.Test(t, func(t *testing.T) {
			dir, d := newSmall(t, Options{})
			goOn := make(chan struct{})
			dir.Before = func(c storetest.Call) error {
				if c.What == "sync" && strings.HasPrefix(c.Name, "snap-") {
					<-goOn
				}
				return nil
			}
			fillUntil(d, d.isCompacting)

			dir.Mu.Lock()
			name := d.current.header.name()
			if isStore {
				name = storage.StoreName
			}
			delete(dir.Names, name)
			dir.Mu.Unlock()
			<-time.After(lookTime)

			answered := make(chan error, 1)
			go func() {
				d.Put("last", "v")
				answered <- d.Commit()
			}()
			synctest.Wait()
			if len(answered) > 0 || !d.IsHealing() {
				t.Errorf("%s is gone: a Commit is answered, or a stop would not wait", name)
			}

			close(goOn)
			if err := <-answered; err != nil {
				t.Fatal(err)
			}
			wantAll(t, "without "+name, dir.Kill(), maps.Collect(d.All()))
			d.Close()
		})
	}
}

// Ensure that after a heal that waited for a compaction and could not even begin, a stop does not
// wait for it, and that the next one succeeds.
func TestHealCannotBeginBehindACompaction(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir, d := newSmall(t, Options{})
		goOn, isBlind := make(chan struct{}), atomic.Bool{}
		dir.Before = func(c storetest.Call) error {
			if c.What == "sync" && strings.HasPrefix(c.Name, "snap-") {
				<-goOn
			}
			if c.What == "stat" && isBlind.Load() {
				return syscall.EACCES
			}
			return nil
		}
		fillUntil(d, d.isCompacting)
		dir.Remove(storage.StoreName)

		commit := func() {
			t.Helper()
			<-time.After(lookTime)
			if err := d.Commit(); err != nil || d.IsHealing() {
				t.Errorf("a stop would wait: %v; %v", d.IsHealing(), err)
			}
		}
		time.AfterFunc(2*lookTime, func() { // the Commit waits for the compaction
			isBlind.Store(true)
			close(goOn)
		})
		commit()
		isBlind.Store(false)
		commit()
		wantAll(t, "without STORE", dir.Kill(), maps.Collect(d.All()))
		d.Close()
	})
}

// Ensure that a snapshot which somebody has renamed stays until the heal has written its own: if
// the heal is killed, it is the only copy of its data on disk.
func TestHealOfARenamedSnapshot(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir, d := newSmall(t, Options{})
		fillUntil(d, func() bool { d.AwaitCompaction(); return d.snapshot >= 2 })

		dir.Mu.Lock()
		is := logName(kindSnapshot, d.snapshot)
		dir.Names[logName(kindSnapshot, d.snapshot-1)] = dir.Names[is]
		delete(dir.Names, is)
		dir.Mu.Unlock()

		// The heal is killed when it begins to write its own snapshot.
		var killed *storetest.Dir
		next := logName(kindSnapshot, d.number()) + tmpSuffix
		dir.Before = func(c storetest.Call) error {
			if killed == nil && c.What == "create" && c.Name == next {
				killed = dir.Kill()
			}
			return nil
		}
		<-time.After(lookTime)
		d.Commit()
		want := maps.Collect(d.All())
		d.Close()

		killed.Locked = false
		saved := storetest.New()
		if r, err := Repair(killed, saved); err != nil {
			t.Fatal(err, r.Lines)
		}
		wantAll(t, "what a repair saves", saved, want)
	})
}

// Ensure that a store whose LOCK somebody removes, empties or replaces goes on, keeps a second
// process out, and can be started again.
func TestLockGoesUnderAStore(t *testing.T) {
	for what, spoil := range map[string]func(dir *storetest.Dir){
		"it is removed": func(dir *storetest.Dir) { dir.Remove(storage.LockName) },
		"it is emptied": func(dir *storetest.Dir) { dir.Empty(storage.LockName) },
		"it is replaced": func(dir *storetest.Dir) {
			f, _ := dir.Create("LOCK.tmp")
			f.Close()
			dir.Rename("LOCK.tmp", storage.LockName)
		},
	} {
		synctest.Test(t, func(t *testing.T) {
			log := &strings.Builder{}
			dir, d := newSmall(t, Options{Log: slog.New(slog.NewTextHandler(log, nil))})

			spoil(dir)
			if _, err := openSmall(dir, Options{}); !errors.Is(err, storage.ErrLocked) {
				t.Errorf("%s: a second one: %v", what, err)
			}

			<-time.After(lookTime)
			synctest.Wait() // the lock looks at the same moment
			d.Put("key", "value")
			if err := d.Commit(); err != nil {
				t.Errorf("%s: %v", what, err)
			}
			if dir.Names[storage.LockName] == nil || strings.Contains(log.String(), "level=ERROR") {
				t.Errorf("%s: there is %v; the log says\n%s", what, dir.Names, log)
			}
			wantAll(t, what, dir.Crash(rand.New(rand.NewPCG(1, 1))), maps.Collect(d.All()))
			if err := d.Close(); err != nil {
				t.Errorf("%s: Close: %v", what, err)
			}
		})
	}
}
