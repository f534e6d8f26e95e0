package storage

import (
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"reflect"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"
)

// Ensure that a Disk does what a Directory must do, and that its errors name the whole path.
func TestDisk(t *testing.T) {
	path := t.TempDir()
	d := mustOpen(t, path)
	write := func(name, text string, off int64) {
		t.Helper()
		f, err := d.Extend(name)
		if errors.Is(err, fs.ErrNotExist) {
			f, err = d.Create(name)
		}
		if err == nil {
			_, err = f.WriteAt([]byte(text), off)
		}
		if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
			t.Fatal(err)
		}
	}

	read := func(name string) string {
		t.Helper()
		f, size, err := d.Open(name)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()

		b := make([]byte, size+10)
		n, err := f.ReadAt(b, 0)
		if err != io.EOF || int64(n) != size {
			t.Errorf("%s of %d bytes: %d, %v", name, size, n, err)
		}

		if _, err := f.WriteAt([]byte("x"), 0); err == nil {
			t.Errorf("%s was opened to be read, and is written", name)
		}
		return string(b[:n])
	}

	// Files.
	write("b", "first", 0)
	write("b", "THIRD", 8)
	write("a", "other", 0)
	if got := read("b"); got != "first\x00\x00\x00THIRD" {
		t.Errorf("a file is %q", got)
	}

	f, _ := d.Extend("b")
	if err := errors.Join(f.Truncate(3), f.Close()); err != nil || read("b") != "fir" {
		t.Errorf("cut off it is %q, %v", read("b"), err)
	}
	if f, err := d.Create("b"); err != nil || f.Close() != nil || read("b") != "" {
		t.Errorf("made anew it is %q, %v", read("b"), err)
	}

	// Names.
	if err := errors.Join(d.Rename("a", "c"), d.Sync()); err != nil || read("c") != "other" {
		t.Errorf("renamed: %v", err)
	}

	write("a", "another", 0)
	if err := d.Rename("a", "c"); err != nil || read("c") != "another" {
		t.Errorf("renamed to a name that is there: %v", err)
	}
	if names, err := d.List(); err != nil || !slices.Equal(names, []string{"b", "c"}) {
		t.Errorf("it has %q, %v", names, err)
	}

	if err := d.Remove("b"); err != nil {
		t.Error(err)
	}
	_, _, openErr := d.Open("b")
	_, extendErr := d.Extend("b")
	for what, err := range map[string]error{"Open": openErr, "Extend": extendErr,
		"Remove": d.Remove("b"), "Rename": d.Rename("b", "a")} {
		if !errors.Is(err, fs.ErrNotExist) || !strings.Contains(err.Error(), path) {
			t.Errorf("%s of no file: %v", what, err)
		}
	}
	if d.Path("b") != filepath.Join(path, "b") {
		t.Errorf("b is called %s", d.Path("b"))
	}
}

// Ensure that stamps differ after any change of a file, by anybody, and not otherwise.
func TestStampsOfADisk(t *testing.T) {
	path := t.TempDir()
	d, other := mustOpen(t, path), mustOpen(t, path)
	stamps := func(d *Disk) map[string]Stamp {
		t.Helper()
		s, err := d.Stamps()
		if err != nil {
			t.Fatal(err)
		}
		return s
	}

	f, _ := d.Create("file")
	f.WriteAt([]byte("12345678"), 0)
	was, err := f.Stamp()
	if err != nil {
		t.Fatal(err)
	}
	if now := stamps(other); len(now) != 1 || !now["file"].IsSame(was) || was.Size != 8 {
		t.Errorf("it was %v and is %v", was, now)
	}

	os.Rename(filepath.Join(path, "file"), filepath.Join(path, "away"))
	if now, err := f.Stamp(); err != nil || !now.IsSame(was) {
		t.Errorf("renamed it says that it is %v, %v", now, err)
	}

	f.Close()
	if _, err := f.Stamp(); err == nil {
		t.Error("closed it says what it is")
	}

	// Another file of the same content takes its place.
	f, _ = d.Create("file")
	f.WriteAt([]byte("12345678"), 0)
	f.Close()
	now := stamps(other)
	if now["file"].IsSameFile(was) || !now["away"].IsSame(was) {
		t.Errorf("of %v the other one is %v, and it is %v", was, now["file"], now["away"])
	}

	os.Truncate(filepath.Join(path, "away"), 7)
	if now := stamps(other)["away"]; !now.IsSameFile(was) || now.IsSame(was) || now.Size != 7 {
		t.Errorf("%v was cut off, and is %v", was, now)
	}
}

// Ensure that a file which is removed while Stamps reads the directory is left out. The list of
// this process's descriptors always has one that is gone after it was read: that of the list.
func TestStampsBesideARemoval(t *testing.T) {
	if runtime.GOOS != "linux" {
		return // there is no such directory
	}
	if stamps, err := mustOpen(t, "/proc/self/fd").Stamps(); err != nil || len(stamps) == 0 {
		t.Errorf("%d files, %v", len(stamps), err)
	}
}

// Ensure that MakeDisk creates a directory for a copy, or takes one that exists and leaves it to
// its owner, that undo removes only what was created, and that no directory is created inside the
// store that is to be copied.
func TestMakeDisk(t *testing.T) {
	path := t.TempDir()
	from, to := filepath.Join(path, "from"), filepath.Join(path, "to")
	there := filepath.Join(path, "there")
	os.Mkdir(from, 0o700)
	os.Mkdir(there, 0o700)
	os.Chown(from, 12345, 12345) // only root can do this; the test is as good without it
	before, _ := os.Stat(there)

	isThere := func(path string) bool {
		_, err := os.Lstat(path)
		return err == nil
	}

	for _, at := range []string{to, there} {
		d, undo, err := MakeDisk(at, from, nil)
		if err != nil {
			t.Fatal(err)
		}

		if info, _ := os.Stat(at); runtime.GOOS != "windows" && info.Mode().Perm() != 0o700 {
			t.Errorf("%s has mode %v", at, info.Mode())
		}

		lock, err := d.Lock(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		lock.Close()
		d.Close()

		if after, _ := os.Stat(there); ownerOf(after) != ownerOf(before) {
			t.Errorf("%s is %v's, and was %v's", there, ownerOf(after), ownerOf(before))
		}
		if undo(); isThere(at) != (at == there) {
			t.Errorf("after undo %s is there: %v", at, isThere(at))
		}
	}

	// Another process may have made its copy there meanwhile.
	filled := filepath.Join(path, "filled")
	d, undo, err := MakeDisk(filled, from, nil)
	if err != nil {
		t.Fatal(err)
	}
	d.Close()
	for _, name := range []string{LockName, StoreName} {
		os.WriteFile(filepath.Join(filled, name), nil, 0o600)
	}

	undo()
	for _, name := range []string{LockName, StoreName} {
		if !isThere(filepath.Join(filled, name)) {
			t.Errorf("undo has removed %s of another process's copy", name)
		}
	}

	file := filepath.Join(path, "file")
	os.WriteFile(file, nil, 0o600)
	for at, want := range map[string]error{
		filepath.Join(from, "copy"): ErrInside, from: ErrInside, file: ErrNotOurs,
		filepath.Join(path, "none", "copy"): fs.ErrNotExist} {
		if _, _, err := MakeDisk(at, from, nil); !errors.Is(err, want) || at != file && at != from && isThere(at) {
			t.Errorf("%s: %v, want %v", at, err, want)
		}
	}

	var failed *fs.PathError
	_, _, err = MakeDisk(filepath.Join(file, "copy"), from, nil)
	if !errors.As(err, &failed) || failed.Op != "mkdir" {
		t.Errorf("in a file: %v", err)
	}
	_, _, err = MakeDisk(to, filepath.Join(path, "none"), nil)
	if !errors.Is(err, fs.ErrNotExist) || isThere(to) {
		t.Errorf("of no store: %v", err)
	}
}

// Ensure that a new directory for a copy is durable before MakeDisk returns, or is removed again.
func TestMadeDiskIsOnDisk(t *testing.T) {
	if runtime.GOOS == "windows" {
		return // Windows cannot sync a directory
	}
	defer func() { syncNames = (*os.File).Sync }()

	around := t.TempDir()
	to := filepath.Join(around, "to")
	for _, answer := range []error{io.ErrShortWrite, nil} {
		var synced []string
		syncNames = func(f *os.File) error {
			synced = append(synced, filepath.Clean(f.Name()))
			return answer
		}

		d, _, err := MakeDisk(to, "", nil)
		_, statErr := os.Stat(to)
		if !errors.Is(err, answer) || !slices.Equal(synced, []string{around}) ||
			(statErr == nil) != (err == nil) {
			t.Errorf("Sync of %q says %v: it is made: %v, %v", synced, answer, err, statErr)
		}
		if err == nil {
			d.Close()
		}
	}
}

// ownerOf is the owner of a file, where the system has owners.
func ownerOf(info os.FileInfo) (owner [2]uint64) {
	sys := reflect.Indirect(reflect.ValueOf(info.Sys()))
	for i, field := range []string{"Uid", "Gid"} {
		if v := sys.FieldByName(field); v.IsValid() {
			owner[i] = v.Uint()
		}
	}
	return owner
}

// Ensure that all calls ask the system, and return its error: a pipe cannot be synced, and nothing
// can be done with what is closed.
func TestSyncAsksTheSystem(t *testing.T) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}

	if err := (diskFile{w}).Sync(); err == nil {
		t.Error("a pipe is synced")
	}
	r.Close()
	w.Close()

	d, err := OpenDisk(t.TempDir(), nil)
	if err != nil {
		t.Fatal(err)
	}
	f, err := d.Create("file")
	if err != nil {
		t.Fatal(err)
	}

	if err := errors.Join(f.Sync(), d.Sync()); err != nil {
		t.Errorf("a file and a directory: %v", err)
	}

	f.Close()
	d.Close()
	for what, err := range map[string]error{
		"Sync of a file": f.Sync(), "Sync": d.Sync(), "List": errorOf(d.List()),
		"Stamps": errorOf(d.Stamps()), "Create": errorOf(d.Create("new")), "Extend": errorOf(d.Extend("file")),
		"Rename": d.Rename("file", "new"), "Remove": d.Remove("file"), "Lock": errorOf(d.Lock(t.Context())),
	} {
		if err == nil && (what != "Sync" || runtime.GOOS != "windows") {
			t.Errorf("%s of what is closed succeeds", what)
		}
	}
}

// errorOf returns err.
func errorOf[T any](_ T, err error) error { return err }

// Ensure that a file's stamp shows that others have overwritten it, though its size stays.
func TestStampOfAnOverwrittenFile(t *testing.T) {
	d := mustOpen(t, t.TempDir())
	stampOf := func() Stamp {
		stamps, err := d.Stamps()
		if err != nil {
			t.Fatal(err)
		}
		return stamps["f"]
	}

	os.WriteFile(d.Path("f"), []byte("a"), 0o600)
	// A file system's clock may be coarse: the two writes must be far apart.
	old := time.Now().Add(-time.Minute)
	os.Chtimes(d.Path("f"), old, old)
	before := stampOf()

	os.WriteFile(d.Path("f"), []byte("b"), 0o600)
	if after := stampOf(); after.Changed.Equal(before.Changed) {
		t.Errorf("it was changed at %v before and after", before.Changed)
	}
}
