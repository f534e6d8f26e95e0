package durable

import (
	"errors"
	"fmt"
	"kvserver/kvstore/storage"
	"kvserver/kvstore/storetest"
	"log/slog"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

// Ensure that a file of somebody else's, for which the next start is refused, is logged once and
// starts no heal, and that Close names it.
func TestStrangeFile(t *testing.T) {
	for _, name := range []string{"seg-50.log", "seg-2.log", "snap-99.log", "photo.jpg"} {
		synctest.Test(t, func(t *testing.T) {
			log := &strings.Builder{}
			dir, d := newSmall(t, Options{Log: slog.New(slog.NewTextHandler(log, nil))})
			d.Put("k", "v")
			d.Commit()

			f, _ := dir.Create(name)
			f.Close()
			for range 10 {
				<-time.After(lookTime)
				d.Put("k", "v")
				if err := d.Commit(); err != nil {
					t.Fatal(err)
				}
			}

			if n := strings.Count(log.String(), "level=ERROR"); n != 1 || d.number() > 2 ||
				!strings.Contains(log.String(), name) {
				t.Errorf("%s: %d errors, now in file %d:\n%s", name, n, d.number(), log)
			}
			err := d.Close()
			if !errors.Is(err, ErrOthers) || !strings.Contains(err.Error(), dir.Path(name)) ||
				!strings.Contains(storage.Advice(err), "Take these files out") {
				t.Errorf("%s: Close: %v; %s", name, err, storage.Advice(err))
			}
			if dir.Names[name] == nil {
				t.Errorf("%s was removed", name)
			}

			_, err = openSmall(dir.Kill(), Options{})
			if err == nil || !strings.Contains(err.Error(), dir.Path(name)) ||
				!strings.Contains(strings.ToLower(storage.Advice(err)), "take") {
				t.Errorf("a start beside %s: %v; %s", name, err, storage.Advice(err))
			}

			dir.Remove(name)
			again, err := openSmall(dir, Options{})
			if err != nil || len(again.Get("k")) != 11 {
				t.Errorf("opened again without %s: %v", name, err)
			}
		})
	}
}

// Ensure that a start, and Check, say that a log file may be somebody else's if it is another
// store's or too short, and do not say it of the store's own.
func TestStrayLogFile(t *testing.T) {
	dir, d := newSmall(t, Options{})
	d.minCompact = 1 << 40
	fillUntil(d, func() bool { return d.number() == 3 && d.size > headerSize })
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	other, old := newSmall(t, Options{})
	old.Put("old", "copy")
	old.Close()
	own, others := dir.Names["seg-3.log"].Data, other.Names["seg-1.log"].Data

	for _, c := range []struct {
		what, name string
		data       []byte
		isStray    bool
	}{
		{"another store's far behind", "seg-50.log", others, true},
		{"another store's right behind", "seg-4.log", others, true},
		{"another store's snapshot", "snap-99.log", others, true},
		{"a part of a header", "seg-50.log", others[:headerSize-1], true},
		{"the store's own far behind", "seg-50.log", own, false},
		{"the store's own right behind", "seg-4.log", own, false},
		{"a header that was overwritten", "seg-4.log", make([]byte, len(own)), false},
		{"a file that was emptied", "seg-3.log", nil, false},
	} {
		image := dir.With(c.name, c.data)
		_, err := openSmall(image, Options{})
		damage := (*storage.DamageError)(nil)
		if !errors.As(err, &damage) || errors.Is(err, ErrStray) != c.isStray ||
			c.isStray && !strings.Contains(err.Error(), image.Path(c.name)+" is empty, or not") {
			t.Errorf("%s: a start: %v", c.what, err)
		}
		r, err := Check(image)
		text := strings.Join(r.Lines, "\n")
		if err != nil || !r.Damaged || errors.Is(r.Err, ErrStray) != c.isStray ||
			strings.Contains(text, ErrStray.Error()) != c.isStray {
			t.Errorf("%s: Check: %v, and says\n%s", c.what, err, text)
		}
	}

	// A copy for which the disk had no room: without the empty file it would open, with less data.
	short := dir.Names["seg-2.log"].Data
	image := dir.With("seg-2.log", short[:len(short)-frameSize-1]).With("seg-3.log", nil)
	_, err := openSmall(image, Options{})
	if !errors.As(err, new(*storage.DamageError)) || errors.Is(err, ErrStray) {
		t.Errorf("a short copy: %v", err)
	}
	if _, err = openSmall(image.With("seg-3.log", others), Options{}); !errors.Is(err, ErrStray) {
		t.Errorf("another store's file behind a damaged one: %v", err)
	}
}

// Ensure that a log file which somebody puts into the directory is removed durably if its number is
// not higher than the newest file's, and that the log says so: a power failure does not bring it
// back, even if the first Sync after that fails.
func TestLeftoverIsRemoved(t *testing.T) {
	for what, nameOf := range map[string]func(d *Store) string{
		"an older segment": func(*Store) string { return "seg-1.log" },
		"the current segment's snapshot": func(d *Store) string {
			return logName(kindSnapshot, d.number())
		},
	} {
		synctest.Test(t, func(t *testing.T) {
			log := &strings.Builder{}
			dir, d := newSmall(t, Options{Log: slog.New(slog.NewTextHandler(log, nil))})
			d.Put("key", "value")
			if err := d.Commit(); err != nil {
				t.Fatal(err)
			}
			older := slices.Clone(dir.Names["seg-1.log"].Data)
			for d.snapshot == 0 {
				d.Set("key", strings.Repeat("v", 100))
				if err := d.Commit(); err != nil {
					t.Fatal(err)
				}
				d.AwaitCompaction()
			}

			// The file and its name are on disk, so only a Sync of the store takes them away for
			// good.
			f, _ := dir.Create(nameOf(d))
			f.WriteAt(older, 0)
			f.Sync()
			f.Close()
			dir.Sync()

			syncs := 0
			dir.Before = func(c storetest.Call) error {
				if c == (storetest.Call{What: "sync"}) {
					if syncs++; syncs == 1 {
						return storetest.ErrDisk
					}
				}
				return nil
			}
			look(t, d, 1)
			if err := d.Room("", 2, 0); !errors.Is(err, ErrSpoiled) {
				t.Errorf("%s: room for a Put before its removal is on disk: %v", what, err)
			}
			look(t, d, 1)
			if err := d.Room("", 2, 0); err != nil || !strings.Contains(log.String(), "they are removed") {
				t.Errorf("%s: room for a Put: %v; the log says\n%s", what, err, log)
			}
			for seed := range uint64(20) {
				wantAll(t, fmt.Sprintf("%s, seed %d", what, seed),
					dir.Crash(rand.New(rand.NewPCG(seed, 1))), maps.Collect(d.All()))
			}
			d.Close()
		})
	}
}

// Ensure that things that cannot be removed do not hold up a heal, and are logged once.
func TestHealBesideWhatStays(t *testing.T) {
	for _, name := range []string{"seg-0.log", "seg-1.log"} {
		path := t.TempDir()
		log := &strings.Builder{}
		d, err := openAt(path, Options{Log: slog.New(slog.NewTextHandler(log, nil))})
		if err != nil {
			t.Fatal(err)
		}
		d.Put("k", "v")
		d.Commit()

		os.WriteFile(filepath.Join(path, "photo.jpg"), nil, 0o600)
		os.Remove(filepath.Join(path, "seg-1.log"))
		// A directory that is not empty cannot be removed.
		stay := []string{name, "snap-0.log", "STORE.tmp", "seg-0.log.tmp", "seg-1.log.tmp"}
		for _, name := range stay {
			os.MkdirAll(filepath.Join(path, name, "full"), 0o700)
		}
		for range 5 {
			d.lookAfter = time.Time{}
			if err := d.Commit(); err != nil {
				t.Fatal(err)
			}
		}

		if err := d.Close(); err == nil || !strings.Contains(err.Error(), name) {
			t.Errorf("%s: Close: %v", name, err)
		}
		if n := strings.Count(log.String(), "level=ERROR"); n > 3 {
			t.Errorf("%s: the log has %d errors:\n%s", name, n, log)
		}

		os.Remove(filepath.Join(path, "photo.jpg"))
		for _, name := range stay {
			os.RemoveAll(filepath.Join(path, name))
		}
		if d, err = openAt(path, Options{}); err != nil || len(d.Get("k")) == 0 {
			t.Fatalf("%s: without them: %v", name, err)
		}
		d.Close()
	}
}

// Ensure that a rotation that fails leaves no file that is later taken for somebody else's.
func TestFailedRotationLeavesNoStranger(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		log := &strings.Builder{}
		dir, d := newSmall(t, Options{Log: slog.New(slog.NewTextHandler(log, nil))})
		dir.Before = func(c storetest.Call) error {
			if c.What == "sync" && c.Name == "" {
				return syscall.ENOSPC
			}
			return nil
		}

		for d.size < d.segmentSize {
			d.Put("key", strings.Repeat("v", 50))
			if err := d.Commit(); err != nil {
				t.Fatal(err)
			}
		}

		<-time.After(2 * lookTime)
		if err := errors.Join(d.Commit(), d.Close()); err != nil {
			t.Error(err)
		}
		if strings.Contains(log.String(), "do not belong to this store") {
			t.Errorf("the log says\n%s", log)
		}
	})
}
